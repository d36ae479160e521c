// ELF kernels: PVH (Xen's "x86/HVM direct boot ABI", docs/misc/pvh.pandoc), else Linux's vmlinux by
// the 64-bit boot protocol.
#include <cstring>

#include "machine/loader/elf.h"
#include "machine/loader/initrd_check.h"
#include "machine/loader/kernel.h"

namespace kvartz::machine {

namespace {
constexpr uint32_t kStartMagic = 0x336ec578;

// xen/include/public/arch-x86/hvm/start_info.h, version 1.
struct StartInfo {
  uint32_t magic = kStartMagic, version = 1, flags = 0, module_count = 0;
  uint64_t modules = 0, cmdline = 0, rsdp = 0, memory_map = 0;
  uint32_t memory_map_entries = 0, reserved = 0;
};
static_assert(sizeof(StartInfo) == 56);
struct StartModule {
  uint64_t address = 0, size = 0, cmdline = 0, reserved = 0;
};
struct StartMemory {
  uint64_t address = 0, size = 0;
  uint32_t type = 0, reserved = 0;
};

class ElfKernel final : public Kernel {
 public:
  ElfKernel(BootFile file, ElfImage image) : file_(std::move(file)), image_(std::move(image)) {}
  const char* kind() const override {
    return image_.pvh_entry ? "ELF with a PVH entry" : "Linux vmlinux";
  }
  Result<> OpenInitrd(const std::string& initrd) override {
    initrd_ = TRY(BootFile::Open("initrd", initrd));
    return CheckInitrd(initrd_);
  }
  Result<CpuEntry> Load(BootSpace& space) override;

 private:
  Result<CpuEntry> PvhEntry(BootSpace& space, uint64_t initrd_base);
  BootFile file_, initrd_;
  ElfImage image_;
};

Result<CpuEntry> ElfKernel::Load(BootSpace& space) {
  TRY(image_.Load(file_, space.memory, space.ram_end));
  uint64_t initrd_base = 0;
  if (initrd_) {
    initrd_base = PlaceHigh(image_.end(), space.ram_end, initrd_.size());
    if (!initrd_base)
      return initrd_.Bad(NeedsMemory(image_.end() + initrd_.size(), space.ram_end),
                         ErrorCode::kNoSpace);
    TRY(LoadRange(space.memory, initrd_base, initrd_, 0, initrd_.size()));
  }
  if (image_.pvh_entry) return PvhEntry(space, initrd_base);
  LowArea low(space);
  CpuEntry entry;
  entry.mode = CpuEntry::Mode::kLong64;
  entry.rip = image_.ToPhysical(image_.entry);
  LinuxParams params;
  params.initrd_base = initrd_base;
  params.initrd_size = initrd_.size();
  entry.rsi = TRY(PutLinuxParams(low, space, params));
  TRY(PrepareEntry(low, &entry));
  return entry;
}

Result<CpuEntry> ElfKernel::PvhEntry(BootSpace& space, uint64_t initrd_base) {
  LowArea low(space);
  StartInfo info;
  info.cmdline = TRY(low.PutString(space.cmdline));
  info.rsdp = space.rsdp;
  if (initrd_) {
    StartModule module{initrd_base, initrd_.size(), 0, 0};
    info.modules = TRY(low.Put(&module, sizeof module));
    info.module_count = 1;
  }
  std::vector<StartMemory> map;
  for (const E820Entry& e : space.e820) map.push_back({e.base, e.size, e.type, 0});
  info.memory_map = TRY(low.Put(map.data(), map.size() * sizeof(StartMemory)));
  info.memory_map_entries = map.size();
  CpuEntry entry;
  entry.rbx = TRY(low.Put(&info, sizeof info));
  entry.rip = *image_.pvh_entry;
  TRY(PrepareEntry(low, &entry));
  return entry;
}
}  // namespace

Result<std::unique_ptr<Kernel>> OpenElfKernel(BootFile file) {
  ElfImage image = TRY(ElfImage::Parse(file));
  if (!image.pvh_entry && !image.is_64bit) {
    return file.Bad(
        "is a 32-bit ELF file with neither a PVH note nor a multiboot header: not a kernel that "
        "can be started");
  }
  return std::make_unique<ElfKernel>(std::move(file), std::move(image));
}

}  // namespace kvartz::machine
