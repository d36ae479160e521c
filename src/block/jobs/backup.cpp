#include "block/jobs/backup.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/call_on.h"
#include "base/check.h"
#include "base/log.h"
#include "block/fiber_io.h"
#include "block/graph.h"

namespace kvartz::block {
namespace {

constexpr uint32_t kLeastUnit = 64 << 10;
constexpr int64_t kIdleNs = 1'000'000'000;
constexpr unsigned kExtentsATurn = 64;

bool StandsOn(Node& overlay, Node& node) {
  Node* below = BackingOf(&overlay);
  while (below && below != SkipFilters(&node)) below = BackingOf(below);
  return below != nullptr;
}

}  // namespace

BackupJob::BackupJob(Registry& registry, const BackupSettings& settings,
                     std::shared_ptr<DirtyBitmap> bitmap, uint32_t unit)
    : CopyJob(registry, settings.source->loop(), settings, Clear::kAfter,
              {settings.on_source_error, settings.on_target_error}),
      settings_(settings),
      bitmap_(std::move(bitmap)) {
  todo_ = std::make_shared<DirtyBitmap>("", settings_.source->size_bytes(), unit);
  copier_ = {.source = settings_.source.get(),
             .target = settings_.target.get(),
             .partial = settings_.sync != Sync::kFull};
  if (settings_.compress) copier_.compressed_unit = unit;
}

// Before the guest goes on: afterwards its writes would have to be told from what was there.
void BackupJob::ChooseRanges() {
  bool by_bitmap = settings_.sync == Sync::kIncremental || settings_.sync == Sync::kBitmap;
  by_bitmap ? todo_->Merge(*bitmap_) : todo_->Set(0, todo_->size_bytes());
}

// sync=top: what the guest writes to meanwhile is copied, whoever had it; the rest is as it was.
Result<> BackupJob::LeaveLowerLayers() {
  Node& top = *settings_.source;
  Node* below = BackingOf(&top);
  if (!below) return {};
  unsigned looked = 0;
  for (uint64_t at = 0; at < top.size_bytes();) {
    ChainExtent found = TRY(StatusAbove(top, below, at, top.size_bytes() - at));
    if (found.extent.length == 0)
      return Fail(ErrorCode::kIo, fmt::format("'{}' ends too early", top.name()));
    if (!found.extent.allocated) todo_->Clear(at, found.extent.length);
    at += found.extent.length;
    if (++looked % kExtentsATurn == 0) TRY(Pace(0));
  }
  return {};
}

Result<> BackupJob::Prepare() {
  filter_ = std::make_shared<CopyBeforeWriteNode>(settings_.source);
  filter_->set_node_name(settings_.filter_node_name);
  TRY(InsertFilter(filter_, settings_.source, settings_.target));
  registry_.On(*settings_.source, [&] {
    ChooseRanges();
    if (bitmap_) {
      bitmap_->set_busy(true);
      since_ = std::make_shared<DirtyBitmap>("", bitmap_->size_bytes(), bitmap_->granularity());
      if (bitmap_->enabled()) settings_.source->Attach(since_);
    }
    Node& target = *SkipFilters(settings_.target.get());
    target.set_fleecing(StandsOn(target, *settings_.source));
    filter_->Arm(
        {.todo = todo_.get(),
         .target = settings_.target.get(),
         .copy = [this](uint64_t offset, uint64_t length) { BeforeWrite(offset, length); }});
  });
  return {};
}

// A guest isn't kept from writing by a backup that fails.
void BackupJob::BeforeWrite(uint64_t offset, uint64_t length) {
  uint64_t unit = todo_->granularity();
  uint64_t from = offset / unit * unit;
  uint64_t end = std::min(todo_->size_bytes(), (offset + length + unit - 1) / unit * unit);
  RangeLocks::Guard lock(locks_, from, end - from);
  for (uint64_t at = from; broken_ == 0;) {
    auto dirty = todo_->NextDirty(at, end);
    if (!dirty) return;
    bool reading = false;
    if (int rc = CopyRange(dirty->offset, dirty->length, &reading)) {
      broken_ = rc;
      broken_reading_ = reading;
      WakeIdle();
      return;
    }
    todo_->Clear(dirty->offset, dirty->length);
    Skip(dirty->length);
    at = dirty->offset + dirty->length;
  }
}

Result<> BackupJob::CheckSound() {
  if (broken_ == 0) return {};
  return Fail(ErrnoError(-broken_, fmt::format("cannot {} '{}' before the guest overwrote it",
                                               broken_reading_ ? "read" : "save to",
                                               broken_reading_ ? SourceName() : TargetName())));
}

int BackupJob::CopyRange(uint64_t offset, uint64_t length, bool* reading) {
  return copier_.Copy(offset, length, reading);
}

Result<> BackupJob::DoRun() {
  if (settings_.sync == Sync::kTop) TRY(LeaveLowerLayers());
  SetTotal(todo_->dirty_bytes());
  if (settings_.sync != Sync::kNone) return CopyDirty();
  for (;;) {
    TRY(CheckSound());
    Idle(loop().clock().NowNs() + kIdleNs);
    TRY(Pace(0));
  }
}

Result<> BackupJob::DoFinalize() {
  TRY(CheckSound());
  return Flush(*settings_.target);
}

void BackupJob::UpdateBitmap(bool success) {
  if (!bitmap_) return;
  settings_.source->Detach(*since_);
  bitmap_->set_busy(false);
  bool clear = settings_.bitmap_mode == BitmapMode::kAlways ||
               (success && settings_.bitmap_mode == BitmapMode::kOnSuccess);
  if (!clear) return;
  bitmap_->ClearAll();
  bitmap_->Merge(*since_);
  // What wasn't copied remains to be; where it was overwritten uncopied `since_` has it.
  if (!success) bitmap_->Merge(*todo_);
}

void BackupJob::DoClean(const Result<>& result) {
  OnMain([&] {
    {
      Registry::Quiesced quiet(registry_, filter_.get());
      registry_.On(*settings_.source, [&] {
        filter_->Disarm();
        SkipFilters(settings_.target.get())->set_fleecing(false);
        UpdateBitmap(result.has_value());
      });
      claims_.Release();
      Result<> removed = registry_.RemoveFilter(filter_);
      if (!removed) KLOG(kError, "{}: {}", who(), removed.error().what);
    }
    filter_.reset();
    settings_.source.reset();
    settings_.target.reset();
    registry_.CollectUnused();
  });
}

// ---- starting ----

namespace {

Result<std::shared_ptr<DirtyBitmap>> FindBitmap(Node& node, const std::string& name) {
  for (const auto& bitmap : node.attached_bitmaps()) {
    if (bitmap->name() != name) continue;
    if (!bitmap->busy()) return bitmap;
    return Fail(ErrorCode::kBusy,
                fmt::format("Bitmap '{}' is currently in use by another operation", name));
  }
  if (BitmapStore* store = node.bitmaps()) {
    if (auto bitmap = store->Find(name)) return bitmap;
  }
  return Fail(ErrorCode::kNotFound, fmt::format("Bitmap '{}' could not be found", name));
}

Result<> CheckSettings(const BackupSettings& settings) {
  auto invalid = [](const char* what) { return Fail(ErrorCode::kInvalid, what); };
  bool by_bitmap = settings.sync == Sync::kBitmap || settings.sync == Sync::kIncremental;
  if (by_bitmap && settings.bitmap.empty()) return invalid("this sync mode needs a bitmap");
  if (settings.sync == Sync::kIncremental && settings.bitmap_mode != BitmapMode::kOnSuccess)
    return invalid("sync=incremental goes with bitmap-mode=on-success");
  if (settings.sync == Sync::kNone && !settings.bitmap.empty())
    return invalid("sync mode 'none' does not produce meaningful bitmap outputs");
  if (!settings.bitmap.empty() && !by_bitmap && settings.bitmap_mode == BitmapMode::kNever)
    return invalid("a bitmap with bitmap-mode=never has no effect with this sync mode");
  if (settings.source == settings.target) return invalid("Source and target cannot be the same");
  return {};
}

Result<uint32_t> UnitOf(const NodePtr& target, bool compress) {
  ImageInfo info = TRY(target->Info());
  uint64_t unit = std::max<uint64_t>(kLeastUnit, info.cluster_size);
  if (!compress) return static_cast<uint32_t>(unit);
  const Driver* driver = FindDriver(SkipFilters(target.get())->driver());
  if (!driver || !driver->can_compress || info.cluster_size == 0)
    return Fail(ErrorCode::kInvalid,
                fmt::format("Compression is not supported for '{}'", target->name()));
  return static_cast<uint32_t>(info.cluster_size);
}

}  // namespace

Result<> StartBackup(const LiveJobs& live, BackupSettings settings) {
  Registry& registry = live.registry;
  TRY(live.jobs.CheckId(settings.job_id));
  TRY(CheckSettings(settings));
  const NodePtr& source = settings.source;
  const NodePtr& target = settings.target;
  Registry::Quiesced quiet(registry, source.get());
  TRY(registry.CheckFree(*source));
  // An overlay of the source may be the target of sync=none; whatever else uses it, mustn't.
  TRY(registry.CheckUnused(*target));
  if (target->read_only())
    return Fail(ErrorCode::kInvalid, fmt::format("target '{}' is read-only", target->node_name()));
  if (&target->loop() != &source->loop()) TRY(registry.MoveTo(target, source->loop()));
  if (target->size_bytes() != source->size_bytes()) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("target '{}' has {} bytes, source '{}' {}", target->node_name(),
                            target->size_bytes(), source->node_name(), source->size_bytes()));
  }
  std::shared_ptr<DirtyBitmap> bitmap;
  if (!settings.bitmap.empty()) bitmap = TRY(FindBitmap(*source, settings.bitmap));
  uint32_t unit = TRY(registry.On(*target, [&] { return UnitOf(target, settings.compress); }));
  auto job = std::make_shared<BackupJob>(registry, settings, std::move(bitmap), unit);
  TRY(job->Prepare());
  return live.jobs.Start(job, settings.job);
}

}  // namespace kvartz::block
