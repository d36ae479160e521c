// Multiboot 1 kernels with modules. "Multiboot Specification version 0.6.96".
#include <algorithm>
#include <cstring>

#include "base/endian.h"
#include "machine/loader/elf.h"
#include "machine/loader/kernel.h"

namespace kvartz::machine {

namespace {
// Header flags (3.1.2) and information flags (3.3).
constexpr uint32_t kHasAddresses = 1 << 16,
                   kKnownRequirements = 0x7;  // alignment, memory, video (no video mode is set)
constexpr uint32_t kInfoMemory = 1 << 0, kInfoCmdline = 1 << 2, kInfoModules = 1 << 3,
                   kInfoMemoryMap = 1 << 6, kInfoLoaderName = 1 << 9;
constexpr uint32_t kLoaderMagic = 0x2badb002;
constexpr uint64_t kPage = 0x1000;
constexpr size_t kMaxModules = 1024;

struct Header {
  Le32 magic, flags, checksum, header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr;
};
struct Info {
  Le32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4],
      mmap_length, mmap_addr, drives_length, drives_addr, config_table, boot_loader_name, apm_table,
      vbe[4];
};
static_assert(sizeof(Info) == 88);
struct Module {
  Le32 start, end, string, reserved;
};
struct MemoryEntry {
  Le32 size;  // of what follows
  Le64 base, length;
  Le32 type;
};
static_assert(sizeof(MemoryEntry) == 24);

// Splits "a.elf arguments,b.elf" at its commas; two commas stand for one.
std::vector<std::string> SplitModules(const std::string& text) {
  std::vector<std::string> parts(1);
  for (size_t i = 0; i < text.size(); i++) {
    if (text[i] != ',') {
      parts.back() += text[i];
    } else if (i + 1 < text.size() && text[i + 1] == ',') {
      parts.back() += text[i++];
    } else {
      parts.emplace_back();
    }
  }
  std::erase(parts, "");
  return parts;
}

class MultibootKernel final : public Kernel {
 public:
  explicit MultibootKernel(BootFile file) : file_(std::move(file)) {}
  Result<> Parse(uint32_t header_offset);
  const char* kind() const override { return "multiboot"; }
  Result<> OpenInitrd(const std::string& initrd) override;
  Result<CpuEntry> Load(BootSpace& space) override;

 private:
  struct LoadedModule {
    BootFile file;
    std::string text;
  };
  BootFile file_;
  ElfImage image_;
  std::vector<LoadedModule> modules_;
};

Result<> MultibootKernel::Parse(uint32_t offset) {
  Header header{};
  std::vector<uint8_t> bytes = TRY(file_.ReadSome(offset, sizeof header));
  std::memcpy(&header, bytes.data(), bytes.size());
  uint32_t flags = header.flags;
  if (flags & 0xffff & ~kKnownRequirements) {
    return file_.Bad("asks for multiboot features that are not known (flags " +
                         std::to_string(flags & 0xffff) + ")",
                     ErrorCode::kUnsupported);
  }
  if (!(flags & kHasAddresses)) {
    image_ = TRY(ElfImage::Parse(file_));
    if (image_.is_64bit)
      return file_.Bad(
          "is a 64-bit ELF file, multiboot loads 32-bit ones; use objcopy -O elf32-i386",
          ErrorCode::kUnsupported);
    image_.entry = image_.ToPhysical(image_.entry);
    return {};
  }
  uint64_t load = header.load_addr, text_offset = uint64_t{header.header_addr} - load;
  if (header.header_addr < load || text_offset > offset)
    return file_.Bad("has a damaged multiboot header; copy or download it again");
  ElfImage::Segment segment;
  segment.file_offset = offset - text_offset;
  segment.physical = segment.virtual_address = load;
  uint64_t load_end = header.load_end_addr ? uint64_t{header.load_end_addr}
                                           : load + file_.size() - segment.file_offset;
  uint64_t bss_end = std::max<uint64_t>(header.bss_end_addr, load_end);
  if (load_end < load || load_end - load > file_.size() - segment.file_offset) {
    return file_.Bad("is truncated: its header says more than the " + std::to_string(file_.size()) +
                     " bytes that it has; copy or download it again");
  }
  segment.file_size = load_end - load;
  segment.memory_size = bss_end - load;
  image_.segments.push_back(segment);
  image_.entry = header.entry_addr;
  return {};
}

Result<> MultibootKernel::OpenInitrd(const std::string& initrd) {
  for (const std::string& text : SplitModules(initrd)) {
    if (modules_.size() == kMaxModules)
      return Fail(ErrorCode::kInvalid, "more than 1024 multiboot modules in -initrd");
    modules_.push_back({TRY(BootFile::Open("module", text.substr(0, text.find(' ')))), text});
  }
  return {};
}

Result<CpuEntry> MultibootKernel::Load(BootSpace& space) {
  TRY(image_.Load(file_, space.memory, space.ram_end));
  LowArea low(space);
  Info info{};
  info.flags = kInfoMemory | kInfoCmdline | kInfoMemoryMap | kInfoLoaderName |
               (modules_.empty() ? 0 : kInfoModules);
  info.mem_lower = BootSpace::kLowEnd / 1024;
  info.mem_upper = (space.ram_end - BootSpace::kHigh) / 1024;
  info.cmdline =
      TRY(low.PutString(file_.path() + (space.cmdline.empty() ? "" : " " + space.cmdline)));
  info.boot_loader_name = TRY(low.PutString("kvartz"));

  uint64_t next = (image_.end() + kPage - 1) & ~(kPage - 1);
  std::vector<Module> table;
  for (const LoadedModule& module : modules_) {
    uint64_t end = next + module.file.size();
    if (end > space.ram_end)
      return module.file.Bad(NeedsMemory(end, space.ram_end), ErrorCode::kNoSpace);
    TRY(LoadRange(space.memory, next, module.file, 0, module.file.size()));
    table.push_back({uint32_t(next), uint32_t(end), uint32_t(TRY(low.PutString(module.text))), 0u});
    next = (end + kPage - 1) & ~(kPage - 1);
  }
  if (!table.empty()) info.mods_addr = TRY(low.Put(table.data(), table.size() * sizeof(Module)));
  info.mods_count = table.size();

  std::vector<MemoryEntry> map;
  for (const E820Entry& e : space.e820)
    map.push_back({uint32_t{20}, e.base, e.size, uint32_t{e.type}});
  info.mmap_addr = TRY(low.Put(map.data(), map.size() * sizeof(MemoryEntry)));
  info.mmap_length = map.size() * sizeof(MemoryEntry);

  CpuEntry entry;
  entry.rax = kLoaderMagic;
  entry.rbx = TRY(low.Put(&info, sizeof info));
  entry.rip = image_.entry;
  TRY(PrepareEntry(low, &entry));
  return entry;
}
}  // namespace

Result<std::unique_ptr<Kernel>> OpenMultiboot(BootFile file, uint32_t header_offset) {
  auto kernel = std::make_unique<MultibootKernel>(std::move(file));
  TRY(kernel->Parse(header_offset));
  return kernel;
}

}  // namespace kvartz::machine
