// Persistent dirty bitmaps. Spec: qcow2.txt, "Bitmaps".
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "block/dirty_bitmap.h"
#include "block/formats/qcow2/layout.h"
#include "block/image_info.h"

namespace kvartz::block::qcow2 {

class Qcow2Node;
struct Run;

struct BitmapDisk {
  Be64 table_offset;
  Be32 table_entries;
  Be32 flags;
  uint8_t type;  // 1: dirty tracking
  uint8_t granularity_bits;
  Be16 name_size;
  Be32 extra_data_size;
};
static_assert(sizeof(BitmapDisk) == 24);
constexpr uint32_t kBitmapInUse = 1, kBitmapAuto = 2, kBitmapExtraCompatible = 4;

struct BitmapEntry {
  BitmapInfo info;
  uint64_t table_offset = 0;
  uint32_t table_entries = 0;
  uint32_t flags = 0;
  std::vector<uint8_t> extra = {};
  bool stored = false;  // the directory on disk has it
};
Result<std::vector<BitmapEntry>> ParseBitmaps(std::span<const uint8_t> bytes, uint32_t count);
std::vector<uint8_t> SerializeBitmaps(const std::vector<BitmapEntry>& bitmaps);

// Loop-owned. While the image is writable its bitmaps are marked as in use on disk, and attached to
// the node; StoreAll writes them.
class Bitmaps final : public BitmapStore {
 public:
  explicit Bitmaps(Qcow2Node& node) : node_(node) {}
  Result<> Load();
  Result<> StoreAll();

  std::vector<BitmapInfo> List() const override;
  std::shared_ptr<DirtyBitmap> Find(const std::string& name) override;
  Result<> Add(const BitmapInfo& bitmap) override;
  Result<> Remove(const std::string& name) override;
  Result<> Clear(const std::string& name) override;
  Result<> Enable(const std::string& name, bool enabled) override;
  Result<> Merge(const std::string& name, const DirtyBitmap& source) override;
  Result<> Store() override;

  const std::vector<BitmapEntry>& entries() const { return entries_; }

 private:
  Result<BitmapEntry*> Get(const std::string& name);
  Result<> LoadContents(const BitmapEntry& entry, DirtyBitmap& bitmap);
  Result<> StoreContents(BitmapEntry& entry, const DirtyBitmap& bitmap);
  // The directory in another place, and the header; then the old one and `released` are freed.
  Result<> WriteDirectory(const std::vector<Run>& released);
  Result<> CollectContents(const BitmapEntry& entry, std::vector<Run>& released);
  Result<> MarkInUse();

  Qcow2Node& node_;
  std::vector<BitmapEntry> entries_;
  std::map<std::string, std::shared_ptr<DirtyBitmap>> contents_;  // of consistent ones
  bool marked_ = false;                                           // all are in use on disk
};

}  // namespace kvartz::block::qcow2
