// Debian's kernel on the bare board: entered at its 64-bit entry with boot parameters, as far as it
// comes without devices. Linux Documentation/arch/x86/boot.rst. The guest is made by
// tests/guest/build.sh.
#include <elf.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

#include "cpu/x86/bare_board.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {
namespace {

std::string GuestFile(const char* name) {
  const char* cache = getenv("KVARTZ_CACHE");
  std::string base =
      cache ? cache : std::string(getenv("HOME") ? getenv("HOME") : "/root") + "/.cache/kvartz";
  return base + "/guests/current/" + name;
}

std::vector<uint8_t> ReadFile(const std::string& path) {
  std::vector<uint8_t> data;
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return data;
  struct stat st;
  fstat(fd, &st);
  data.resize(static_cast<size_t>(st.st_size));
  size_t done = 0;
  while (done < data.size()) {
    ssize_t n = read(fd, data.data() + done, data.size() - done);
    if (n <= 0) break;
    done += static_cast<size_t>(n);
  }
  close(fd);
  return data;
}

// Loads the ELF at its physical addresses; the 64-bit entry is that of the first segment.
uint64_t LoadKernel(BareBoard& board, const std::vector<uint8_t>& elf) {
  Elf64_Ehdr header;
  memcpy(&header, elf.data(), sizeof(header));
  for (unsigned i = 0; i < header.e_phnum; i++) {
    Elf64_Phdr segment;
    memcpy(&segment, elf.data() + header.e_phoff + i * sizeof(segment), sizeof(segment));
    if (segment.p_type == PT_LOAD)
      memcpy(board.ram() + segment.p_paddr, elf.data() + segment.p_offset, segment.p_filesz);
  }
  return header.e_entry;
}

constexpr uint64_t kBootParams = 0x10000, kCommandLine = 0x20000, kTables = 0x30000, kGdt = 0x2f000;

void WriteBootParams(BareBoard& board, const std::vector<uint8_t>& bzimage,
                     const char* command_line, uint64_t ram) {
  uint8_t* zero = board.ram() + kBootParams;
  memset(zero, 0, 4096);
  memcpy(zero + 0x1f1, bzimage.data() + 0x1f1, 0x77);
  zero[0x210] = 0xff;  // type_of_loader
  auto put32 = [&](unsigned at, uint32_t v) { memcpy(zero + at, &v, 4); };
  put32(0x228, kCommandLine);
  strcpy(reinterpret_cast<char*>(board.ram() + kCommandLine), command_line);
  struct __attribute__((packed)) E820 {
    uint64_t base, size;
    uint32_t type;
  } map[] = {{0, 0x9fc00, 1}, {0x100000, ram - 0x100000, 1}};
  std::vector<uint8_t> initrd = ReadFile(GuestFile("initrd.img"));
  uint64_t initrd_at = (ram - initrd.size()) & ~0xfffull;
  memcpy(board.ram() + initrd_at, initrd.data(), initrd.size());
  put32(0x218, static_cast<uint32_t>(initrd_at));
  put32(0x21c, static_cast<uint32_t>(initrd.size()));
  zero[0x1e8] = 2;
  memcpy(zero + 0x2d0, map, sizeof(map));
}

// Identity-mapped long mode with flat segments, as the boot protocol asks.
void EnterLongMode(BareBoard& board, uint64_t entry) {
  auto* tables = reinterpret_cast<uint64_t*>(board.ram() + kTables);
  memset(tables, 0, 6 * 4096);
  tables[0] = (kTables + 4096) | 3;
  for (unsigned i = 0; i < 4; i++) tables[512 + i] = (kTables + 8192 + i * 4096) | 3;
  for (unsigned i = 0; i < 2048; i++) tables[1024 + i] = uint64_t{i} << 21 | 0x83;
  auto* gdt = reinterpret_cast<uint64_t*>(board.ram() + kGdt);
  gdt[2] = 0x00af9b000000ffff;
  gdt[3] = 0x00cf93000000ffff;
  X86State state;
  ASSERT_TRUE(board.vcpu().GetState(&state));
  state.gdtr = {kGdt, 31};
  auto segment = [](uint16_t selector, uint32_t attributes) {
    Segment s;
    s.selector = selector;
    s.limit = 0xffffffff;
    s.attributes = attributes;
    return s;
  };
  for (auto& s : state.seg) s = segment(0x18, 0xc093);
  state.seg[kCs] = segment(0x10, 0xa09b);
  state.cr0 = 0x80000011;
  state.cr3 = kTables;
  state.cr4 = 0x20;
  state.efer = 0x500;
  state.rip = entry;
  state.rflags = 2;
  state.gpr[kRsi] = kBootParams;
  ASSERT_TRUE(board.vcpu().SetState(state));
}

TEST(BootKernelSlow, PrintsItsBanner) {
  std::vector<uint8_t> elf = ReadFile(GuestFile("vmlinux"));
  std::vector<uint8_t> bzimage = ReadFile(GuestFile("vmlinuz"));
  if (elf.empty() || bzimage.empty()) GTEST_SKIP() << "no guest kernel; run tests/guest/build.sh";
  constexpr uint64_t kRam = 256 << 20;
  BareBoard board(kRam);
  board.echo = getenv("KVARTZ_ECHO") != nullptr;
  LoadKernel(board, elf);
  const char* extra = getenv("KVARTZ_APPEND");
  std::string command =
      std::string("earlyprintk=serial,0x3f8,115200 console=ttyS0 panic=-1 reboot=t ") +
      (extra ? extra : "");
  WriteBootParams(board, bzimage, command.c_str(), kRam);
  EnterLongMode(board, 0x1000000);
  // Without devices the kernel never ends by itself.
  Mutex mutex;
  CondVar over;
  bool done = false;
  Thread watchdog("watchdog", [&] {
    LockGuard guard(mutex);
    over.WaitFor(guard, 60'000'000'000, [&] { return done; });
    board.Stop();
  });
  board.Run();
  {
    LockGuard guard(mutex);
    done = true;
  }
  over.NotifyAll();
  Cpu& cpu = board.cpu();
  printf("\nrip %#lx insns %lu cr2 %#lx\n", cpu.rip, cpu.insn_count, cpu.cr2);
  EXPECT_NE(board.output.find("Linux version 6."), std::string::npos) << board.output;
}

}  // namespace
}  // namespace kvartz::cpu::x86
