#include "device/core/fw_cfg.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/endian.h"

namespace kvartz {

namespace {
constexpr uint64_t kSelectorPort = 0, kDataPort = 1, kDmaHigh = 4, kDmaLow = 8;
constexpr size_t kNameSize = 56;
constexpr uint32_t kFeatureTraditional = 1 << 0, kFeatureDma = 1 << 1;
constexpr char kDmaSignature[] = "QEMU CFG";

// A DMA request, in guest memory.
struct DmaRequest {
  Be32 control, length;
  Be64 address;
};
static_assert(sizeof(DmaRequest) == 16);
constexpr uint32_t kDmaError = 1 << 0, kDmaRead = 1 << 1, kDmaSkip = 1 << 2, kDmaSelect = 1 << 3,
                   kDmaWrite = 1 << 4;

struct DirectoryEntry {
  Be32 size;
  Be16 select, reserved;
  char name[kNameSize];
};
static_assert(sizeof(DirectoryEntry) == 64);
}  // namespace

FwCfg::FwCfg(const DeviceEnv& env) : MmioDevice(env), memory_(env.memory) {
  SetItem(kSignature, {'Q', 'E', 'M', 'U'});
  SetInteger(kId, kFeatureTraditional | kFeatureDma, 4);
  BuildDirectory();
}

void FwCfg::SetItem(uint16_t key, std::vector<uint8_t> data) { items_[key] = std::move(data); }

void FwCfg::SetInteger(uint16_t key, uint64_t value, unsigned size) {
  std::vector<uint8_t> data(size);
  for (unsigned i = 0; i < size; i++) data[i] = value >> (8 * i);
  SetItem(key, std::move(data));
}

void FwCfg::SetFile(const std::string& name, std::vector<uint8_t> data) {
  VERIFY(name.size() < kNameSize);
  auto [file, added] = files_.try_emplace(name, next_file_);
  if (added) next_file_++;
  SetItem(file->second, std::move(data));
  BuildDirectory();
}

void FwCfg::BuildDirectory() {
  std::vector<uint8_t> directory(4 + files_.size() * sizeof(DirectoryEntry));
  Be32 count(static_cast<uint32_t>(files_.size()));
  std::memcpy(directory.data(), &count, 4);
  size_t at = 4;
  for (const auto& [name, key] : files_) {
    DirectoryEntry entry{};
    entry.size = static_cast<uint32_t>(items_[key].size());
    entry.select = key;
    name.copy(entry.name, kNameSize - 1);
    std::memcpy(&directory[at], &entry, sizeof entry);
    at += sizeof entry;
  }
  items_[kFileDirectory] = std::move(directory);
}

void FwCfg::Select(uint16_t key) {
  key_ = key;
  position_ = 0;
}

uint8_t FwCfg::NextByte() {
  auto item = items_.find(key_);
  if (item == items_.end() || position_ >= item->second.size()) return 0;
  return item->second[position_++];
}

// Copies the next `length` bytes of the item; beyond its end, zeroes.
bool FwCfg::Transfer(uint64_t address, uint32_t length) {
  static const std::vector<uint8_t> kNothing;
  auto item = items_.find(key_);
  const std::vector<uint8_t>& data = item == items_.end() ? kNothing : item->second;
  uint32_t rest = position_ < data.size() ? data.size() - position_ : 0;
  uint32_t copied = std::min(length, rest);
  if (copied && !memory_.Write(Gpa(address), &data[position_], copied)) return false;
  position_ += copied;
  constexpr uint8_t kZeroes[4096] = {};
  while (copied < length) {
    uint32_t chunk = std::min<uint32_t>(length - copied, sizeof kZeroes);
    if (!memory_.Write(Gpa(address + copied), kZeroes, chunk)) return false;
    copied += chunk;
  }
  return true;
}

void FwCfg::RunDma(uint64_t address) {
  DmaRequest request;
  if (!memory_.ReadObject(Gpa(address), &request)) return;
  uint32_t control = request.control;
  if (control & kDmaSelect) Select(control >> 16);
  bool ok = true;
  if (control & kDmaRead) {
    ok = Transfer(request.address, request.length);
  } else if (control & kDmaWrite) {
    ok = false;
  } else if (control & kDmaSkip) {
    auto item = items_.find(key_);
    uint32_t size = item == items_.end() ? 0 : item->second.size();
    position_ = std::min<uint64_t>(uint64_t{position_} + request.length, std::max(size, position_));
  }
  Be32 done(ok ? 0u : kDmaError);
  memory_.WriteObject(Gpa(address), done);
}

uint64_t FwCfg::IoRead(uint64_t offset, unsigned size) {
  if (offset == kDataPort && size == 1) return NextByte();
  if (offset >= kDmaHigh && offset + size <= kDmaLow + 4) {
    uint64_t value = 0;
    for (unsigned i = 0; i < size; i++)
      value |= uint64_t(uint8_t(kDmaSignature[offset - kDmaHigh + i])) << (8 * i);
    return value;
  }
  return 0;
}

void FwCfg::IoWrite(uint64_t offset, unsigned size, uint64_t value) {
  if (offset == kSelectorPort && size == 2) Select(value);
  if (offset == kDmaHigh && size == 4) dma_high_ = __builtin_bswap32(value);
  if (offset == kDmaHigh && size == 8) RunDma(__builtin_bswap64(value));
  if (offset == kDmaLow && size == 4) {
    uint64_t address = uint64_t{dma_high_} << 32 | __builtin_bswap32(value);
    dma_high_ = 0;
    RunDma(address);
  }
}

void FwCfg::Reset(ResetPhase phase) {
  if (phase != ResetPhase::kEnter) return;
  Select(0);
  dma_high_ = 0;
}

void FwCfg::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Field("key", key_);
  v.Field("position", position_);
  v.Field("dma_high", dma_high_);
}

}  // namespace kvartz
