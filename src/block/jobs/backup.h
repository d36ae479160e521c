// Job backup: the disk as it was when the job began, in another image.
#pragma once

#include <memory>
#include <string>

#include "block/filters/copy_before_write.h"
#include "block/jobs/copy_job.h"
#include "block/jobs/range_copier.h"

namespace kvartz::block {

class BackupJob final : public CopyJob {
 public:
  // `bitmap`: of the settings; may be null. `unit`: bytes, what is copied at once at least.
  BackupJob(Registry& registry, const BackupSettings& settings, std::shared_ptr<DirtyBitmap> bitmap,
            uint32_t unit);
  const char* type() const override { return "backup"; }
  // Fiber, main loop, source quiesced: the point in time. On error nothing has changed.
  Result<> Prepare();

 private:
  Result<> DoRun() override;
  Result<> DoFinalize() override;
  void DoClean(const Result<>& result) override;
  int CopyRange(uint64_t offset, uint64_t length, bool* reading) override;
  Result<> CheckSound() override;
  std::string SourceName() const override { return settings_.source->name(); }
  std::string TargetName() const override { return settings_.target->name(); }
  void BeforeWrite(uint64_t offset, uint64_t length);
  void ChooseRanges();
  Result<> LeaveLowerLayers();
  void UpdateBitmap(bool success);

  BackupSettings settings_;
  RangeCopier copier_;
  const std::shared_ptr<DirtyBitmap> bitmap_;
  std::shared_ptr<DirtyBitmap> since_;  // what is written from the point in time on
  std::shared_ptr<CopyBeforeWriteNode> filter_;
  int broken_ = 0;  // -errno: what was there can't be copied any more
  bool broken_reading_ = false;
};

}  // namespace kvartz::block
