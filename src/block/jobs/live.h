// Jobs on disks that are in use: mirror, backup, stream, commit (blockdev-mirror, blockdev-backup,
// block-stream, block-commit). Each of the functions checks, changes the graph as needed and starts
// the job; the job undoes or completes the change. Fiber, main loop.
//
// Errors say what isn't possible, and who uses a node that is needed. A guest's acknowledged writes
// are in the image that its disk stands on, at any moment.
#pragma once

#include <memory>
#include <string>

#include "block/dirty_bitmap.h"
#include "block/disk.h"
#include "block/jobs/job_list.h"
#include "block/registry.h"

namespace kvartz::block {

struct LiveJobs {
  Registry& registry;
  JobList& jobs;
};

// What of the source is copied.
enum class Sync : uint8_t { kFull, kTop, kNone, kIncremental, kBitmap };
Result<Sync> ParseSync(const std::string& name);
// What becomes of the bitmap of an incremental backup.
enum class BitmapMode : uint8_t { kOnSuccess, kNever, kAlways };
Result<BitmapMode> ParseBitmapMode(const std::string& name);

struct CommonSettings {
  std::string job_id = {};
  uint64_t speed = 0;  // bytes a second; 0: no limit
  JobSettings job = {};
  std::string filter_node_name = {};  // of the filter that it inserts; empty: any
};

struct MirrorSettings : CommonSettings {
  NodePtr source = nullptr;
  NodePtr target = nullptr;  // as large as the source, or made so
  Sync sync = Sync::kFull;   // kFull, kTop, kNone
  enum class CopyMode : uint8_t { kBackground, kWriteBlocking } copy_mode = CopyMode::kBackground;
  uint32_t granularity = 0;   // a power of two, 512 to 64 MiB; 0: 64 KiB
  uint64_t buffer_bytes = 0;  // under way at once; 0: 16 MiB
  bool unmap = true;
  ErrorPolicy on_source_error = ErrorPolicy::kReport, on_target_error = ErrorPolicy::kReport;
  NodePtr replaces = nullptr;  // null: the source
};
Result<> StartMirror(const LiveJobs& live, MirrorSettings settings);

struct BackupSettings : CommonSettings {
  NodePtr source = nullptr;
  NodePtr target = nullptr;  // of the same size
  Sync sync = Sync::kFull;   // all but kTop's bitmap ones need `bitmap`
  std::string bitmap = {};   // of the source
  BitmapMode bitmap_mode = BitmapMode::kOnSuccess;
  bool compress = false;
  ErrorPolicy on_source_error = ErrorPolicy::kReport, on_target_error = ErrorPolicy::kReport;
};
Result<> StartBackup(const LiveJobs& live, BackupSettings settings);

struct StreamSettings : CommonSettings {
  NodePtr top = nullptr;                        // gets what the layers between have
  NodePtr base = nullptr;                       // stays below it; null: nothing does
  std::string backing_file = {};                // recorded instead of the base's name; empty: that
  ErrorPolicy on_error = ErrorPolicy::kReport;  // kIgnore: goes on, keeps the base
};
Result<> StartStream(const LiveJobs& live, StreamSettings settings);

struct CommitSettings : CommonSettings {
  NodePtr top = nullptr;   // what a disk writes to: becomes ready, and Complete pivots to the base
  NodePtr base = nullptr;  // null: the lowest one
  std::string backing_file = {};  // recorded in top's overlays instead of the base's name
  ErrorPolicy on_error = ErrorPolicy::kReport;
};
Result<> StartCommit(const LiveJobs& live, CommitSettings settings);

// No job: what `disk`'s topmost image has goes into the one below it, and it is empty then. Its
// guest waits. Errors: nothing is below, or others use it.
Result<> CommitAtOnce(Registry& registry, const NodePtr& disk);

}  // namespace kvartz::block
