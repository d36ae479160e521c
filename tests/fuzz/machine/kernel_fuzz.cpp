// Kernels of every kind: whatever the file holds is loaded or refused.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#include "machine/loader/kernel.h"

using namespace kvartz;
using namespace kvartz::machine;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr uint64_t kRam = 8 << 20;
  static AddressSpace memory("memory", 1ull << 40);
  static std::shared_ptr<RamBlock> ram = [] {
    std::shared_ptr<RamBlock> block = *RamBlock::Create("ram", kRam);
    Region region;
    region.name = "ram";
    region.kind = RegionKind::kRam;
    region.size = kRam;
    region.ram = block;
    memory.Add(region);
    return block;
  }();
  UniqueFd fd(memfd_create("kernel", MFD_CLOEXEC));
  if (write(fd.get(), data, size) != static_cast<ssize_t>(size)) std::abort();
  Result<BootFile> file = BootFile::FromFd("kernel", "kernel", std::move(fd));
  if (!file) return 0;
  Result<std::unique_ptr<Kernel>> kernel = Kernel::Open(std::move(*file));
  if (!kernel) return 0;
  BootSpace space{memory,
                  kRam,
                  {{0, 0x9fc00, E820Entry::kRam}, {0x100000, kRam - 0x100000, E820Entry::kRam}},
                  0xe0000,
                  "console=ttyS0"};
  Result<CpuEntry> entry = (*kernel)->Load(space);
  if (!entry) return 0;
  cpu::X86State state;
  ApplyEntry(*entry, &state);
  return 0;
}
