// Internal snapshots. Spec: qcow2.txt, "Snapshots".
#pragma once

#include <string>
#include <vector>

#include "block/formats/qcow2/layout.h"
#include "block/image_info.h"

namespace kvartz::block::qcow2 {

class Qcow2Node;
class Metadata;

struct SnapshotDisk {
  Be64 l1_table_offset;
  Be32 l1_size;
  Be16 id_size;
  Be16 name_size;
  Be32 date_sec;
  Be32 date_nsec;
  Be64 vm_clock_nsec;
  Be32 vm_state_size;  // the extra data has it in full
  Be32 extra_data_size;
};
static_assert(sizeof(SnapshotDisk) == 40);

// One of the table, with what was found behind what we know.
struct SnapshotEntry {
  SnapshotInfo info;
  uint64_t l1_offset = 0;
  uint32_t l1_entries = 0;
  std::vector<uint8_t> unknown_extra = {};
};

// The table of `count` snapshots at the beginning of `bytes`; `used`: how long it is. Errors:
// kState if `bytes` is too short, else what is broken.
Result<std::vector<SnapshotEntry>> ParseSnapshots(std::span<const uint8_t> bytes, uint32_t count,
                                                  uint64_t disk_size, uint64_t* used);
std::vector<uint8_t> SerializeSnapshots(const std::vector<SnapshotEntry>& snapshots);

// Loop-owned. While they run, no request is under way.
class Snapshots final : public SnapshotStore {
 public:
  explicit Snapshots(Qcow2Node& node) : node_(node) {}
  Result<> Load();

  const std::vector<SnapshotInfo>& List() const override { return list_; }
  Result<SnapshotInfo> Create(SnapshotInfo snapshot) override;
  Result<> Apply(const std::string& id_or_name) override;
  Result<> Delete(const std::string& id_or_name) override;
  Result<> ShowReadOnly(const std::string& id_or_name) override;
  Result<> WriteVmState(uint64_t offset, std::span<const uint8_t> bytes) override;
  Result<> ReadVmState(uint64_t offset, std::span<uint8_t> bytes) override;

  std::vector<SnapshotEntry>& entries() { return entries_; }
  uint64_t table_bytes() const { return table_bytes_; }
  // Writes the table to another place, and then the header that names it.
  Result<> WriteTable();

 private:
  Result<size_t> Find(const std::string& id_or_name) const;
  Result<std::vector<uint64_t>> ReadL1(const SnapshotEntry& entry);
  void UpdateList();
  std::unexpected<Error> Undo(int rc);

  Qcow2Node& node_;
  std::vector<SnapshotEntry> entries_;
  std::vector<SnapshotInfo> list_;
  uint64_t table_bytes_ = 0;
};

// Fiber: every cluster that the tables below `l1` reach gets `delta` more references. L2 tables
// that are left to the active image alone, and their clusters, are marked so (kCopied), if
// `active`.
enum class TableOwner : uint8_t { kSnapshot, kActive };
int AddReferences(Metadata& metadata, std::vector<uint64_t>& l1, int64_t delta, TableOwner owner);

}  // namespace kvartz::block::qcow2
