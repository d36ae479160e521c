#include "block/formats/vhdx_log.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>
#include <vector>

#include "base/crc32c.h"
#include "block/fiber_io.h"

namespace kvartz::block::vhdx {
namespace {

constexpr uint64_t kSector = 4096;
constexpr uint32_t kMostLog = 64 << 20;  // held in memory; what writers make is 1 MiB
constexpr uint64_t kMostWork = 16;       // times the log
constexpr uint64_t kMostBytes = uint64_t{INT64_MAX} / 2;

std::unexpected<Error> Bad(const std::string& what) {
  return Fail(ErrorCode::kInvalid, "VHDX: the log can't be replayed: " + what);
}

struct Entry {
  LogEntryHeader header;
  std::vector<uint8_t> bytes;
};

class Log {
 public:
  Log(std::vector<uint8_t> bytes, const Guid& guid)
      : bytes_(std::move(bytes)), guid_(guid), budget_(kMostWork * bytes_.size()) {}

  // The valid entry at `offset`.
  std::optional<Entry> At(uint64_t offset) const {
    Entry entry;
    std::memcpy(&entry.header, &bytes_[offset], sizeof entry.header);
    const LogEntryHeader& header = entry.header;
    uint32_t length = header.entry_length;
    if (std::string_view(header.signature.data(), 4) != "loge" || header.log_guid != guid_ ||
        length < kSector || length % kSector != 0 || length > bytes_.size() ||
        header.tail % kSector != 0 || header.tail >= bytes_.size() || header.sequence_number == 0)
      return std::nullopt;
    uint64_t descriptors =
        (sizeof header + uint64_t{header.descriptor_count} * sizeof(LogDescriptor) + kSector - 1) /
        kSector * kSector;
    // Entries that are none could make us go through the whole log for each sector of it.
    if (descriptors > length || length > budget_) return std::nullopt;
    budget_ -= length;
    entry.bytes.resize(length);
    uint64_t first = std::min<uint64_t>(length, bytes_.size() - offset);
    std::memcpy(entry.bytes.data(), &bytes_[offset], first);
    std::memcpy(entry.bytes.data() + first, bytes_.data(), length - first);
    std::memset(entry.bytes.data() + offsetof(LogEntryHeader, checksum), 0, sizeof(Le32));
    if (Crc32c(entry.bytes) != header.checksum) return std::nullopt;
    return entry;
  }

  // 2.3.3: of the runs of entries with numbers one after the other, whose last one says that it
  // begins within the run, the one with the highest number. From its tail on.
  std::vector<Entry> ActiveSequence() const {
    std::vector<Entry> best;
    uint64_t best_number = 0;
    for (uint64_t start = 0; start < bytes_.size(); start += kSector) {
      std::vector<Entry> run;
      std::vector<uint64_t> offsets;
      uint64_t taken = 0;
      for (uint64_t offset = start; taken < bytes_.size();) {
        std::optional<Entry> entry = At(offset);
        if (!entry || (!run.empty() &&
                       entry->header.sequence_number != run.back().header.sequence_number + 1))
          break;
        taken += entry->bytes.size();
        offsets.push_back(offset);
        offset = (offset + entry->bytes.size()) % bytes_.size();
        run.push_back(std::move(*entry));
      }
      if (run.empty() || run.back().header.sequence_number <= best_number) continue;
      for (size_t i = 0; i < run.size(); i++) {
        if (offsets[i] != run.back().header.tail) continue;
        best_number = run.back().header.sequence_number;
        best.assign(std::make_move_iterator(run.begin() + static_cast<ptrdiff_t>(i)),
                    std::make_move_iterator(run.end()));
        break;
      }
      // Later starts within this run give parts of it.
      if (!offsets.empty() && offsets.back() > start) start = offsets.back();
    }
    return best;
  }

 private:
  const std::vector<uint8_t> bytes_;
  const Guid guid_;
  mutable uint64_t budget_;  // bytes still to be summed
};

// Where the log's changes may go: not to the file's identifier, the headers or the log.
bool MayChange(const Header& header, uint64_t offset, uint64_t length) {
  if (offset % kSector != 0 || length % kSector != 0 || length == 0 || length > kMostBytes ||
      offset > kMostBytes)
    return false;
  uint64_t end = offset + length, log_end = header.log_offset + header.log_length;
  return offset >= kRegionTableOffsets[0] && (end <= header.log_offset || offset >= log_end);
}

Result<> Apply(Node& file, const Header& header, const Entry& entry) {
  uint64_t sector =
      (sizeof entry.header + uint64_t{entry.header.descriptor_count} * sizeof(LogDescriptor) +
       kSector - 1) /
      kSector * kSector;
  for (uint32_t i = 0; i < entry.header.descriptor_count; i++) {
    LogDescriptor descriptor;
    std::memcpy(&descriptor, &entry.bytes[sizeof entry.header + i * sizeof descriptor],
                sizeof descriptor);
    std::string_view kind(descriptor.signature.data(), 4);
    bool zero = kind == "zero";
    uint64_t length = zero ? uint64_t{descriptor.leading_or_length} : kSector;
    if ((!zero && kind != "desc") || descriptor.sequence_number != entry.header.sequence_number ||
        !MayChange(header, descriptor.file_offset, length))
      return Bad(fmt::format("descriptor {} of entry {} makes no sense", i,
                             uint64_t{entry.header.sequence_number}));
    if (zero) {
      // Zero anyway is what the file doesn't reach: an entry is no reason to fill the host's disk.
      uint64_t offset = descriptor.file_offset;
      if (offset >= file.size_bytes()) continue;
      length = std::min(length, file.size_bytes() - offset);
      if (int rc = WriteZeroesAt(file, offset, length, true))
        return Fail(IoError(file, "write", offset, rc));
      continue;
    }
    if (sector + kSector > entry.bytes.size()) return Bad("an entry has too few data sectors");
    LogDataSector data;
    std::memcpy(&data, &entry.bytes[sector], sizeof data);
    sector += kSector;
    uint64_t number = uint64_t{data.sequence_high} << 32 | data.sequence_low;
    if (std::string_view(data.signature.data(), 4) != "data" ||
        number != entry.header.sequence_number)
      return Bad("a data sector is of another entry");
    std::array<uint8_t, kSector> whole;
    std::memcpy(whole.data(), &descriptor.leading_or_length, 8);
    std::memcpy(&whole[8], data.data.data(), data.data.size());
    std::memcpy(&whole[kSector - 4], &descriptor.trailing, 4);
    TRY(WriteExactly(file, descriptor.file_offset, whole));
  }
  return {};
}

}  // namespace

Result<> ReplayLog(Node& file, const Header& header) {
  uint64_t offset = header.log_offset, length = header.log_length;
  if (header.log_version != 0) return Bad("its version isn't known");
  if (length == 0 || length % kMiB != 0 || offset % kMiB != 0 || offset < kMiB ||
      length > kMostLog || offset > file.size_bytes() || length > file.size_bytes() - offset)
    return Bad(fmt::format("it is said to be at {:#x}, {} bytes", offset, length));
  std::vector<uint8_t> bytes(length);
  TRY(ReadExactly(file, offset, bytes));
  std::vector<Entry> entries = Log(std::move(bytes), header.log_guid).ActiveSequence();
  if (entries.empty()) return Bad("it has no valid entries");
  const LogEntryHeader& last = entries.back().header;
  if (file.size_bytes() < last.flushed_file_offset)
    return Bad(fmt::format("the file was cut off: it had {} bytes at least",
                           uint64_t{last.flushed_file_offset}));
  if (last.last_file_offset > kMostBytes) return Bad("the file's size makes no sense");
  for (const Entry& entry : entries) TRY(Apply(file, header, entry));
  if (file.size_bytes() < last.last_file_offset) TRY(file.Resize({.size = last.last_file_offset}));
  return Flush(file);
}

}  // namespace kvartz::block::vhdx
