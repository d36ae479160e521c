// What an image tells of itself, and what can be done to it besides I/O: snapshots, bitmaps, check,
// amend. Names and meanings are those of qemu-img 7.2's JSON.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "base/result.h"

namespace kvartz::block {

class DirtyBitmap;
class Options;

struct InfoField;
// A JSON-like value, in order, for people and programs alike.
struct InfoValue {
  using Object = std::vector<InfoField>;
  using Array = std::vector<InfoValue>;
  std::variant<bool, uint64_t, std::string, Object, Array> value;
};
struct InfoField {
  std::string name = {};  // with dashes: "refcount-bits"
  InfoValue value;
};

struct SnapshotInfo {
  std::string id = {};         // a number as text, unique; given by the image when created
  std::string name = {};       // may be empty
  uint64_t vm_state_size = 0;  // bytes; 0: of the disk alone
  int64_t date_sec = 0;        // since 1970, UTC
  uint32_t date_nsec = 0;
  uint64_t vm_clock_nsec = 0;
  uint64_t icount = UINT64_MAX;  // UINT64_MAX: not known
  uint64_t disk_size = 0;        // bytes of the disk when it was taken
};

struct ImageInfo {
  std::string format = {};  // driver name
  uint64_t virtual_size = 0;
  uint64_t cluster_size = 0;  // 0: none
  bool encrypted = false;
  bool compressed = false;
  bool dirty = false;  // wasn't closed, and needs repair
  bool corrupt = false;
  uint64_t vm_state_offset = 0;
  std::string backing_filename = {};       // as the image has it; empty: none
  std::string full_backing_filename = {};  // relative to the image
  std::string backing_format = {};         // empty: not recorded
  std::vector<SnapshotInfo> snapshots = {};
  InfoValue::Object specific = {};  // "format-specific": {"data": this}
};

// Internal snapshots. Fiber: all.
class SnapshotStore {
 public:
  virtual ~SnapshotStore() = default;
  virtual const std::vector<SnapshotInfo>& List() const = 0;
  // id and disk_size are filled in; answers the whole.
  virtual Result<SnapshotInfo> Create(SnapshotInfo snapshot) = 0;
  // By id, else by name; the error names it.
  virtual Result<> Apply(const std::string& id_or_name) = 0;
  virtual Result<> Delete(const std::string& id_or_name) = 0;
  // The (read-only) image shows the snapshot until it is closed.
  virtual Result<> ShowReadOnly(const std::string& id_or_name) = 0;
  // The VM state that the next Create takes along, or that the last Apply brought: bytes beyond the
  // disk. Reads beyond what was written give zeros.
  virtual Result<> WriteVmState(uint64_t offset, std::span<const uint8_t> bytes) = 0;
  virtual Result<> ReadVmState(uint64_t offset, std::span<uint8_t> bytes) = 0;
};

struct BitmapInfo {
  std::string name = {};
  uint32_t granularity = 65536;  // bytes, a power of two
  bool enabled = true;           // "auto": tracks writes
  bool in_use = false;           // wasn't stored when the image was last closed: inconsistent
  bool persistent = true;
};

// Dirty bitmaps that are kept in the image. Fiber: all. Contents are in DirtyBitmaps, attached to
// the node while they are enabled; Close stores them.
class BitmapStore {
 public:
  virtual ~BitmapStore() = default;
  virtual std::vector<BitmapInfo> List() const = 0;
  // Null: there is none, or it is inconsistent.
  virtual std::shared_ptr<DirtyBitmap> Find(const std::string& name) = 0;
  virtual Result<> Add(const BitmapInfo& bitmap) = 0;
  virtual Result<> Remove(const std::string& name) = 0;  // inconsistent ones, too
  virtual Result<> Clear(const std::string& name) = 0;
  virtual Result<> Enable(const std::string& name, bool enabled) = 0;
  // What `source` has becomes dirty in `name`.
  virtual Result<> Merge(const std::string& name, const DirtyBitmap& source) = 0;
  // Writes them to the image now.
  virtual Result<> Store() = 0;
};

enum class Repair : uint8_t { kNone, kLeaks, kAll };

struct CheckResult {
  uint64_t corruptions = 0, leaks = 0, check_errors = 0;  // what is left, after repair
  uint64_t corruptions_fixed = 0, leaks_fixed = 0;
  uint64_t image_end_offset = 0;
  uint64_t total_clusters = 0, allocated_clusters = 0, fragmented_clusters = 0,
           compressed_clusters = 0;
};

using ProgressFn = std::function<void(uint64_t done, uint64_t total)>;
using ReportFn = std::function<void(const std::string& line)>;

// What changes an image as a whole. Fiber: all, with no request under way.
class ImageEditor {
 public:
  virtual ~ImageEditor() = default;
  // `report` gets one line a finding, without a line end.
  virtual Result<CheckResult> Check(Repair repair, const ReportFn& report) = 0;
  // Options of create_options (driver.h) that may change; refuses those that can't.
  virtual Result<> Amend(Options& options, const ProgressFn& progress) = 0;
  // Records another backing file (empty: none), which isn't opened.
  virtual Result<> RecordBacking(const std::string& filename, const std::string& format) = 0;
  // The image has nothing of its own any more; all comes from the backing node.
  virtual Result<> MakeEmpty() = 0;
};

}  // namespace kvartz::block
