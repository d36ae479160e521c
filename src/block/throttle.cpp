#include "block/throttle.h"

#include <fmt/format.h>

#include <algorithm>

#include "block/options.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kMost = 1'000'000'000'000'000;  // QEMU's THROTTLE_VALUE_MAX
constexpr double kNsPerSec = 1e9;
constexpr const char* kNames[] = {"bps-total",  "bps-read",  "bps-write",
                                  "iops-total", "iops-read", "iops-write"};

size_t DirectionIndex(ThrottleGroup::Direction direction) { return static_cast<size_t>(direction); }

bool Applies(size_t bucket, ThrottleGroup::Direction direction) {
  size_t which = bucket % 3;  // total, read, write
  return which == 0 || which == 1 + DirectionIndex(direction);
}

}  // namespace

const char* ThrottleLimits::NameOf(Index index) { return kNames[index]; }

bool ThrottleLimits::any() const {
  return std::any_of(std::begin(buckets), std::end(buckets),
                     [](const ThrottleBucket& bucket) { return bucket.average > 0; });
}

Result<> ThrottleLimits::Check() const {
  auto invalid = [](std::string what) { return Fail(ErrorCode::kInvalid, std::move(what)); };
  for (size_t total : {size_t{kBpsTotal}, size_t{kIopsTotal}}) {
    for (size_t one : {total + 1, total + 2}) {
      if ((buckets[total].average && buckets[one].average) ||
          (buckets[total].max && buckets[one].max)) {
        return invalid(fmt::format("{} and {} can't be used together", kNames[total], kNames[one]));
      }
    }
  }
  for (size_t i = 0; i < kBuckets; i++) {
    const ThrottleBucket& bucket = buckets[i];
    if (bucket.average > kMost || bucket.max > kMost)
      return invalid(fmt::format("{}: at most {}", kNames[i], kMost));
    if (bucket.max_length == 0) return invalid(fmt::format("{}-max-length: at least 1", kNames[i]));
    if (bucket.max_length > 1 && bucket.max == 0)
      return invalid(fmt::format("{0}-max-length needs {0}-max", kNames[i]));
    if (bucket.max > 0 && bucket.average == 0)
      return invalid(fmt::format("{0}-max needs {0}", kNames[i]));
    if (bucket.max > 0 && bucket.max < bucket.average)
      return invalid(fmt::format("{0}-max is less than {0}", kNames[i]));
    if (bucket.max > 0 && bucket.max_length > kMost / bucket.max)
      return invalid(fmt::format("{}-max-length is too long", kNames[i]));
  }
  if (iops_size > 0 && !buckets[kIopsTotal].average && !buckets[kIopsRead].average &&
      !buckets[kIopsWrite].average) {
    return invalid("iops-size needs a limit of operations");
  }
  return {};
}

Result<ThrottleLimits> ThrottleLimits::Take(Options& options, const std::string& prefix) {
  ThrottleLimits limits;
  for (size_t i = 0; i < kBuckets; i++) {
    std::string name = prefix + kNames[i];
    limits.buckets[i].average = TRY(options.TakeSize(name, 0));
    limits.buckets[i].max = TRY(options.TakeSize(name + "-max", 0));
    limits.buckets[i].max_length = TRY(options.TakeNumber(name + "-max-length", 1));
  }
  limits.iops_size = TRY(options.TakeSize(prefix + "iops-size", 0));
  TRY(limits.Check());
  return limits;
}

// ---- the group ----

struct ThrottleGroup::Member::Shared {
  EventLoop& loop;
  std::function<void()> ready;  // null once the member is gone; used on the loop's thread
};

ThrottleLimits ThrottleGroup::limits() const {
  LockGuard guard(mutex_);
  return limits_;
}

void ThrottleGroup::SetLimits(const ThrottleLimits& limits) {
  LockGuard guard(mutex_);
  limits_ = limits;
  for (Level& level : levels_) level = {};
  leaked_ns_ = clock_.NowNs();
  limited_ = limits.any();
  if (!limits.any()) return LetAllGo();
  WakeFirst(Direction::kRead);
  WakeFirst(Direction::kWrite);
}

void ThrottleGroup::Leak() {
  int64_t now = clock_.NowNs();
  double seconds = static_cast<double>(now - leaked_ns_) / kNsPerSec;
  leaked_ns_ = now;
  for (size_t i = 0; i < ThrottleLimits::kBuckets; i++) {
    const ThrottleBucket& bucket = limits_.buckets[i];
    Level& level = levels_[i];
    level.level = std::max(0.0, level.level - static_cast<double>(bucket.average) * seconds);
    level.burst_level =
        std::max(0.0, level.burst_level - static_cast<double>(bucket.max) * seconds);
  }
}

// How long until each bucket in question has room. A bucket holds what may come at once: a burst's
// worth, or a tenth of a second's; and while bursting, `max` is kept to in the same way.
int64_t ThrottleGroup::WaitNs(Direction direction) {
  Leak();
  double seconds = 0;
  for (size_t i = 0; i < ThrottleLimits::kBuckets; i++) {
    const ThrottleBucket& bucket = limits_.buckets[i];
    if (bucket.average == 0 || !Applies(i, direction)) continue;
    auto average = static_cast<double>(bucket.average), max = static_cast<double>(bucket.max);
    double room = bucket.max ? max * static_cast<double>(bucket.max_length) : average / 10;
    seconds = std::max(seconds, (levels_[i].level - room) / average);
    if (bucket.max_length > 1)
      seconds = std::max(seconds, (levels_[i].burst_level - max / 10) / max);
  }
  return static_cast<int64_t>(seconds * kNsPerSec);
}

void ThrottleGroup::Account(Direction direction, uint64_t bytes) {
  double operations = 1;
  if (limits_.iops_size > 0 && bytes > limits_.iops_size)
    operations = static_cast<double>(bytes) / static_cast<double>(limits_.iops_size);
  for (size_t i = 0; i < ThrottleLimits::kBuckets; i++) {
    if (!Applies(i, direction)) continue;
    double units = i < ThrottleLimits::kIopsTotal ? static_cast<double>(bytes) : operations;
    levels_[i].level += units;
    if (limits_.buckets[i].max_length > 1) levels_[i].burst_level += units;
  }
}

void ThrottleGroup::WakeFirst(Direction direction) {
  auto& line = waiting_[DirectionIndex(direction)];
  if (line.empty()) return;
  line.front()->loop.Post([first = line.front()] {
    if (first->ready) first->ready();
  });
}

void ThrottleGroup::LetAllGo() {
  for (auto& line : waiting_) {
    for (const Waiter& waiter : line) {
      waiter->loop.Post([waiter] {
        if (waiter->ready) waiter->ready();
      });
    }
    line.clear();
  }
}

ThrottleGroup::Member::Member(std::shared_ptr<ThrottleGroup> group, EventLoop& loop,
                              std::function<void()> ready)
    : group_(std::move(group)),
      shared_(std::make_shared<Shared>(loop, std::move(ready))),
      timer_(loop, [shared = shared_] { shared->ready(); }) {}

ThrottleGroup::Member::~Member() {
  timer_.Cancel();
  shared_->ready = nullptr;
  Withdraw();
}

void ThrottleGroup::Member::Withdraw() {
  LockGuard guard(group_->mutex_);
  for (Direction direction : {Direction::kRead, Direction::kWrite}) {
    auto& line = group_->waiting_[DirectionIndex(direction)];
    if (std::erase(line, shared_) > 0) group_->WakeFirst(direction);
  }
}

bool ThrottleGroup::Member::Admit(Direction direction, uint64_t bytes) {
  if (!group_->limited_.load(std::memory_order_relaxed)) return true;
  LockGuard guard(group_->mutex_);
  auto& line = group_->waiting_[DirectionIndex(direction)];
  bool first = line.empty() || line.front() == shared_;
  int64_t wait = first ? group_->WaitNs(direction) : 0;
  if (first && wait <= 0) {
    group_->Account(direction, bytes);
    if (!line.empty()) line.pop_front();
    group_->WakeFirst(direction);
    return true;
  }
  if (std::find(line.begin(), line.end(), shared_) == line.end()) line.push_back(shared_);
  if (!first) return false;  // who is before us wakes us
  int64_t deadline = group_->clock_.NowNs() + wait;
  if (!timer_.armed() || timer_.deadline_ns() > deadline) timer_.Arm(deadline);
  return false;
}

void ThrottleGroup::Member::Count(Direction direction, uint64_t bytes) {
  LockGuard guard(group_->mutex_);
  group_->Leak();
  group_->Account(direction, bytes);
}

}  // namespace kvartz::block
