#include "block/jobs/mirror.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "base/call_on.h"
#include "base/check.h"
#include "base/log.h"
#include "block/fiber_io.h"
#include "block/graph.h"

namespace kvartz::block {
namespace {

constexpr uint32_t kDefaultGranularity = 64 << 10, kMostGranularity = 64 << 20;
constexpr uint64_t kPieceBytes = 1 << 20;
constexpr int64_t kIdleNs = 50'000'000;
// What may be left when the guest is made to wait for it; after so many passes, whatever is.
constexpr uint64_t kFewBytes = 16 << 20;
constexpr unsigned kMostPasses = 10;

}  // namespace

MirrorJob::MirrorJob(Registry& registry, const MirrorSettings& settings, const char* type,
                     uint32_t whole_bytes)
    : CopyJob(registry, settings.source->loop(), settings, Clear::kBefore,
              {settings.on_source_error, settings.on_target_error}),
      type_(type),
      settings_(settings),
      whole_bytes_(whole_bytes),
      background_(settings.copy_mode == MirrorSettings::CopyMode::kBackground) {
  uint32_t granularity = settings_.granularity ? settings_.granularity : kDefaultGranularity;
  todo_ = std::make_shared<DirtyBitmap>("", settings_.source->size_bytes(),
                                        std::max(granularity, whole_bytes_));
  if (settings_.buffer_bytes != 0)
    parallel_ = static_cast<unsigned>(
        std::clamp<uint64_t>(settings_.buffer_bytes / kPieceBytes, 1, parallel_));
  copier_ = {.source = settings_.source.get(),
             .target = settings_.target.get(),
             .unmap = settings_.unmap,
             .partial = whole_bytes_ != 0};
}

Result<> MirrorJob::Prepare() {
  filter_ =
      std::make_shared<MirrorTopNode>(settings_.source, commits_ ? "commit_top" : "mirror_top");
  filter_->set_node_name(settings_.filter_node_name);
  TRY(InsertFilter(filter_, settings_.source, settings_.target));
  registry_.On(*settings_.source, [&] {
    if (background_) {
      settings_.source->Attach(todo_);
    } else {
      filter_->Arm({.target = settings_.target.get(),
                    .locks = &locks_,
                    .todo = todo_.get(),
                    .unit = std::max<uint64_t>(whole_bytes_, 1),
                    .copy = [this](uint64_t offset, uint64_t length) {
                      bool reading = false;
                      return CopyRange(offset, length, &reading);
                    }});
    }
  });
  return {};
}

Result<> MirrorJob::DoRun() {
  if (settings_.sync == Sync::kFull) {
    todo_->Set(0, todo_->size_bytes());
  } else if (settings_.sync == Sync::kTop) {
    Node* base = commits_ ? settings_.target.get() : BackingOf(settings_.source.get());
    TRY(MarkAllocated(*settings_.source, base, Layers::kAll));
  }
  for (;;) {
    TRY(CopyDirty());
    if (!ready_now_) {
      ready_now_ = true;
      BecomeReady();
    }
    if (complete_wished() || soft_cancelled()) return {};
    Idle(loop().clock().NowNs() + kIdleNs);
    TRY(Pace(0));
  }
}

// In step is what has been copied but for a little: a guest that never rests would never let it be
// more.
bool MirrorJob::MayStop() {
  if (at_once_) return false;
  bool few = todo_->dirty_bytes() <= kFewBytes;
  if (!ready_now_) return few;
  if (!complete_wished() && !soft_cancelled()) return false;
  return few || ++passes_ >= kMostPasses;
}

int MirrorJob::CopyRange(uint64_t offset, uint64_t length, bool* reading) {
  return copier_.Copy(offset, length, reading);
}

// On the job's loop, while the guest waits.
Result<> MirrorJob::CopyTheRest() {
  at_once_ = true;
  Result<> result = CopyDirty();
  if (result) result = Flush(*settings_.target);
  return result;
}

Result<> MirrorJob::DoFinalize() {
  return OnMain([&]() -> Result<> {
    Registry::Quiesced quiet(registry_, filter_.get());
    TRY(registry_.On(*filter_, [&] { return CopyTheRest(); }));
    return soft_cancelled() ? Result<>{} : Pivot();
  });
}

// Main loop.
Result<> MirrorJob::Pivot() {
  registry_.On(*filter_, [&] {
    filter_->Disarm();
    settings_.source->Detach(*todo_);
  });
  claims_.Release();
  NodePtr target = settings_.target;
  if (settings_.replaces) {
    TRY(registry_.RemoveFilter(filter_));
    TRY(registry_.Replace(settings_.replaces, target, {target.get()}));
  } else {
    TRY(registry_.Replace(filter_, target));
    TRY(registry_.RemoveFilter(filter_));
  }
  pivoted_ = true;
  return {};
}

void MirrorJob::DoClean(const Result<>& /*result*/) {
  OnMain([&] {
    if (!pivoted_) {
      Registry::Quiesced quiet(registry_, filter_.get());
      registry_.On(*settings_.source, [&] {
        filter_->Disarm();
        settings_.source->Detach(*todo_);
      });
      claims_.Release();
      if (registry_.PtrOf(*filter_)) {
        Result<> removed = registry_.RemoveFilter(filter_);
        if (!removed) KLOG(kError, "{}: {}", who(), removed.error().what);
      }
      if (commits_ && base_was_read_only_) {
        NodePtr base = settings_.target;
        Result<> back = registry_.On(*base, [&] { return base->SetReadOnly(true); });
        if (!back) KLOG(kWarn, "{}: {}", who(), back.error().what);
      }
    }
    filter_.reset();
    settings_.source.reset();
    settings_.target.reset();
    settings_.replaces.reset();
    registry_.CollectUnused();
  });
}

// ---- starting ----

namespace {

Result<> CheckTarget(Registry& registry, const NodePtr& source, const NodePtr& target) {
  if (source == target) return Fail(ErrorCode::kInvalid, "Can't mirror node into itself");
  TRY(registry.CheckUnused(*target));
  if (target->read_only())
    return Fail(ErrorCode::kInvalid, fmt::format("target '{}' is read-only", target->node_name()));
  if (&target->loop() != &source->loop()) TRY(registry.MoveTo(target, source->loop()));
  if (target->size_bytes() < source->size_bytes())
    TRY(registry.Resize(target, source->size_bytes()));
  if (target->size_bytes() == source->size_bytes()) return {};
  return Fail(ErrorCode::kInvalid,
              fmt::format("target '{}' has {} bytes, source '{}' {}", target->node_name(),
                          target->size_bytes(), source->node_name(), source->size_bytes()));
}

// Of a target that gets a part and isn't yet on what shows the rest: bytes of a cluster. Else 0.
Result<uint32_t> WholeBytes(const NodePtr& target, Sync sync) {
  const Driver* driver = FindDriver(SkipFilters(target.get())->driver());
  if (sync == Sync::kFull || BackingOf(target.get()) || !driver || !driver->has_backing) return 0;
  return static_cast<uint32_t>(TRY(target->Info()).cluster_size);
}

}  // namespace

Result<> StartMirror(const LiveJobs& live, MirrorSettings settings) {
  Registry& registry = live.registry;
  TRY(live.jobs.CheckId(settings.job_id));
  if (settings.sync != Sync::kFull && settings.sync != Sync::kTop && settings.sync != Sync::kNone)
    return Fail(ErrorCode::kInvalid, "sync of a mirror is full, top or none");
  if (settings.granularity != 0 &&
      (!std::has_single_bit(settings.granularity) || settings.granularity < 512 ||
       settings.granularity > kMostGranularity)) {
    return Fail(ErrorCode::kInvalid, "granularity: a power of two from 512 to 64M");
  }
  if (settings.sync == Sync::kTop && !BackingOf(settings.source.get())) settings.sync = Sync::kFull;
  Registry::Quiesced quiet(registry, settings.source.get());
  TRY(registry.CheckFree(*settings.source));
  TRY(CheckTarget(registry, settings.source, settings.target));
  uint32_t whole_bytes = TRY(
      registry.On(*settings.target, [&] { return WholeBytes(settings.target, settings.sync); }));
  auto job = std::make_shared<MirrorJob>(registry, settings, "mirror", whole_bytes);
  TRY(job->Prepare());
  return live.jobs.Start(job, settings.job);
}

// Of the node that a disk writes to.
Result<> StartActiveCommit(const LiveJobs& live, const CommitSettings& settings) {
  Registry& registry = live.registry;
  MirrorSettings mirror;
  static_cast<CommonSettings&>(mirror) = settings;
  mirror.source = settings.top;
  mirror.target = settings.base;
  mirror.sync = Sync::kTop;
  mirror.on_source_error = mirror.on_target_error = settings.on_error;
  NodePtr base = settings.base;
  Registry::Quiesced quiet(registry, settings.top.get());
  bool was_read_only = base->read_only();
  Result<> ready = registry.On(*base, [&]() -> Result<> {
    if (was_read_only) TRY(base->SetReadOnly(false));
    uint64_t size = mirror.source->size_bytes();
    if (base->size_bytes() < size) return base->Resize({.size = size, .zero_added = true});
    if (base->size_bytes() > size)
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("not supported yet: '{}' is larger than '{}'", base->name(),
                              mirror.source->name()));
    return {};
  });
  if (ready) {
    auto job = std::make_shared<MirrorJob>(registry, mirror, "commit", 0);
    job->CommitInto(was_read_only);
    ready = job->Prepare();
    if (ready) return live.jobs.Start(job, settings.job);
  }
  if (was_read_only && !base->read_only()) {
    Result<> back = registry.On(*base, [&] { return base->SetReadOnly(true); });
    if (!back) KLOG(kWarn, "{}", back.error().what);
  }
  return ready;
}

}  // namespace kvartz::block
