// Paging: accessed and dirty bits, page sizes, address space changes, code that changes under the
// CPU. SDM vol. 3 ch. 4.
#include "cpu/x86/mmu.h"

#include <algorithm>

#include "cpu/x86/guest_case.h"
#include "memory/guest_memory.h"

namespace kvartz::cpu::x86 {
namespace {

GUEST_CODE(mmu_read, "mov 0x100000, %eax; out %al, $0xf4")
GUEST_CODE(mmu_write, "movl $0x12345678, 0x100000; out %al, $0xf4")
GUEST_CODE(mmu_read32, ".code32; mov 0x100000, %eax; out %al, $0xf4")
GUEST_CODE(mmu_write32, ".code32; movl $0x12345678, 0x100000; out %al, $0xf4")

constexpr uint64_t kA = 0x20, kD = 0x40;

TEST(Mmu, AccessedAndDirty) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(mmu_read));
  EXPECT_EQ(guest.Run().vector, -1);
  EXPECT_EQ(guest.Pte(kTestPage) & (kA | kD), kA);
  for (uint64_t table : {kTablesAt, kTablesAt + 0x1000, kTablesAt + 0x2000}) {
    EXPECT_EQ(guest.Get<uint64_t>(table) & (kA | kD), kA) << table;
  }
  EXPECT_EQ(guest.Pte(kOtherPage) & (kA | kD), 0u);
  guest.Load(CODE_OF(mmu_write));
  EXPECT_EQ(guest.Run().vector, -1);
  EXPECT_EQ(guest.Pte(kTestPage) & (kA | kD), kA | kD);
  EXPECT_EQ(guest.Get<uint64_t>(kTablesAt + 0x2000) & kD, 0u);  // no D above the leaf
  EXPECT_EQ(guest.Get<uint32_t>(kTestPage), 0x12345678u);
}

TEST(Mmu, AccessedAndDirtyLegacy) {
  for (Mode mode : {Mode::kPaged32, Mode::kPae32}) {
    GuestCase guest(mode);
    guest.Load(CODE_OF(mmu_read32));
    EXPECT_EQ(guest.Run().vector, -1);
    EXPECT_EQ(guest.Pte(kTestPage) & (kA | kD), kA);
    guest.Load(CODE_OF(mmu_write32));
    EXPECT_EQ(guest.Run().vector, -1);
    EXPECT_EQ(guest.Pte(kTestPage) & (kA | kD), kA | kD);
  }
}

// A denied write sets no D bit.
TEST(Mmu, FaultsLeaveDirtyAlone) {
  GuestCase guest(Mode::kLong64);
  guest.initial.cr0 |= cr0::kWp;
  guest.SetPte(kTestPage, kTestPage | 1);
  guest.Load(CODE_OF(mmu_write));
  EXPECT_EQ(guest.Run().vector, kPF);
  EXPECT_EQ(guest.Pte(kTestPage) & kD, 0u);
}

GUEST_CODE(mmu_large,
           "mov 0x40200008, %eax; movl $1, 0x40200010; mov $0x80000018, %ecx; mov (%rcx), %ebx; "
           "out %al, $0xf4")
GUEST_CODE(mmu_large32, ".code32; mov 0x40400008, %eax; movl $1, 0x40400010; out %al, $0xf4")

TEST(Mmu, LargePages) {
  GuestCase guest(Mode::kLong64);
  // 1 GiB at 2 GiB, 2 MiB at 1 GiB + 2 MiB, both to the test page's 2 MiB or the memory's
  // beginning.
  guest.Put<uint64_t>(kTablesAt + 0x1000 + 2 * 8, 0x83);
  guest.Put<uint64_t>(kTablesAt + 0x1000 + 1 * 8, (kTablesAt + 0x4000) | 3);
  guest.Put<uint64_t>(kTablesAt + 0x4000 + 8, 0x200000 | 0x83);
  guest.Put<uint32_t>(0x200008, 0xabcd);
  guest.Put<uint32_t>(0x18, 0x4321);
  guest.Load(CODE_OF(mmu_large));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRax], 0xabcdu);
  EXPECT_EQ(end.state.gpr[kRbx], 0x4321u);
  EXPECT_EQ(guest.Get<uint32_t>(0x200010), 1u);
  EXPECT_EQ(guest.Get<uint64_t>(kTablesAt + 0x4000 + 8) & (kA | kD), kA | kD);
  EXPECT_EQ(guest.Get<uint64_t>(kTablesAt + 0x1000 + 16) & (kA | kD), kA);
}

TEST(Mmu, LargePageReservedBits) {
  GuestCase guest(Mode::kLong64);
  guest.Put<uint64_t>(kTablesAt + 0x1000 + 1 * 8, (kTablesAt + 0x4000) | 3);
  guest.Put<uint64_t>(kTablesAt + 0x4000 + 8, 0x200000 | 0x83 | 1 << 13);  // 20:13 must be 0
  guest.Load(CODE_OF(mmu_large));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kPF);
  EXPECT_EQ(end.error, 9u);
}

TEST(Mmu, FourMegabytePages) {
  GuestCase guest(Mode::kPaged32);
  guest.Put<uint32_t>(kTablesAt + 0x101 * 4, 0x00400000 | 0x83);
  guest.Put<uint32_t>(0x400008, 0xbeef);
  guest.Load(CODE_OF(mmu_large32));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRax], 0xbeefu);
  EXPECT_EQ(guest.Get<uint32_t>(0x400010), 1u);
  EXPECT_EQ(guest.Get<uint32_t>(kTablesAt + 0x101 * 4) & (kA | kD), kA | kD);
}

// After INVLPG, CR3 loads and INVPCID the new mapping is seen; large pages as a whole.
GUEST_CODE(mmu_invlpg, R"(
  mov 0x100000, %eax
  movq $0x102003, 0x13800       # test page -> 0x102000
  invlpg 0x100000
  mov 0x100000, %ebx
  movq $0x103003, 0x13800
  mov %cr3, %rdx
  mov %rdx, %cr3
  mov 0x100000, %ecx
  movq $0x102003, 0x13800
  mov %cr4, %rdx
  xor $0x80, %rdx
  mov %rdx, %cr4                # PGE toggles: everything
  mov 0x100000, %esi
  out %al, $0xf4)")

TEST(Mmu, Invalidation) {
  GuestCase guest(Mode::kLong64);
  guest.Put<uint32_t>(0x100000, 1);
  guest.Put<uint32_t>(0x102000, 2);
  guest.Put<uint32_t>(0x103000, 3);
  guest.Load(CODE_OF(mmu_invlpg));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRax], 1u);
  EXPECT_EQ(end.state.gpr[kRbx], 2u);
  EXPECT_EQ(end.state.gpr[kRcx], 3u);
  EXPECT_EQ(end.state.gpr[kRsi], 2u);
}

// INVLPG of any address in a large page drops what was used of it elsewhere.
GUEST_CODE(mmu_invlpg_large, R"(
  mov 0x40205000, %eax
  movq $0x400083, 0x14008
  invlpg 0x40200000
  mov 0x40205000, %ebx
  out %al, $0xf4)")

TEST(Mmu, InvlpgOfLargePage) {
  GuestCase guest(Mode::kLong64);
  guest.Put<uint64_t>(kTablesAt + 0x1000 + 8, (kTablesAt + 0x4000) | 3);
  guest.Put<uint64_t>(kTablesAt + 0x4000 + 8, 0x200083);
  guest.Put<uint32_t>(0x205000, 1);
  guest.Put<uint32_t>(0x405000, 2);
  guest.Load(CODE_OF(mmu_invlpg_large));
  Outcome end = guest.Run();
  EXPECT_EQ(end.state.gpr[kRax], 1u);
  EXPECT_EQ(end.state.gpr[kRbx], 2u);
}

// Two address spaces with PCIDs 1 and 2: each sees its own page, with and without flushes; INVPCID
// reaches the other one.
GUEST_CODE(mmu_pcid, R"(
  mov $0x10, %rax
  shl $12, %rax
  or $1, %rax
  mov $1, %r14
  shl $63, %r14                 # do not flush
  mov $0x20002, %r15
  mov %rax, %cr3
  mov 0x100000, %ebx            # 1
  mov %r15, %cr3
  mov 0x100000, %ecx            # 2
  lea (%rax,%r14), %rdx
  mov %rdx, %cr3
  mov 0x100000, %esi            # 1
  lea (%r15,%r14), %rdx
  mov %rdx, %cr3
  mov 0x100000, %edi            # 2
  movq $0x103003, 0x13800       # PCID 1's page changes while PCID 2 runs
  movq $1, 0x9000
  movq $0x100000, 0x9008
  mov $0, %edx
  invpcid 0x9000, %rdx
  lea (%rax,%r14), %rdx
  mov %rdx, %cr3
  mov 0x100000, %ebp            # 3
  mov %cr3, %r13
  out %al, $0xf4)")

TEST(Mmu, Pcid) {
  GuestCase guest(Mode::kLong64);
  guest.initial.cr4 |= cr4::kPcide;
  memcpy(guest.at(0x20000), guest.at(kTablesAt), 0x4000);
  guest.Put<uint64_t>(0x20000, 0x21003);
  guest.Put<uint64_t>(0x21000, 0x22003);
  guest.Put<uint64_t>(0x22000, 0x23003);
  guest.Put<uint64_t>(0x23800, 0x102003);
  guest.Put<uint32_t>(0x100000, 1);
  guest.Put<uint32_t>(0x102000, 2);
  guest.Put<uint32_t>(0x103000, 3);
  guest.Load(CODE_OF(mmu_pcid));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRbx], 1u);
  EXPECT_EQ(end.state.gpr[kRcx], 2u);
  EXPECT_EQ(end.state.gpr[kRsi], 1u);
  EXPECT_EQ(end.state.gpr[kRdi], 2u);
  EXPECT_EQ(end.state.gpr[kRbp], 3u);
  EXPECT_EQ(end.state.gpr[kR13], 0x10001u);  // bit 63 isn't stored
}

// Five levels, where asked for.
GUEST_CODE(mmu_la57_low, "mov $0x0001000000100000, %rax; mov (%rax), %ebx; out %al, $0xf4")
GUEST_CODE(mmu_la57, "mov $0x0100000000100000, %rax; mov (%rax), %ebx; out %al, $0xf4")

TEST(Mmu, FiveLevels) {
  GuestCase guest(Mode::kLong64, 0, "max,+la57");
  guest.initial.cr4 |= cr4::kLa57;
  guest.initial.cr3 = 0x20000;
  guest.Put<uint64_t>(0x20000, kTablesAt | 7);  // the lowest 256 TiB
  guest.Put<uint64_t>(0x20008, kTablesAt | 7);  // and the next
  guest.Put<uint32_t>(kTestPage, 77);
  guest.Load(CODE_OF(mmu_la57));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kGP);  // 2^56 isn't canonical with 57 bits
  guest.initial.gpr = {};
  guest.Load(CODE_OF(mmu_la57_low));
  end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRbx], 77u);
}

// ---- code that changes

GUEST_CODE(mmu_patch_next, R"(
  xor %eax, %eax
  movb $42, 1f+1(%rip)          # in the same block as what it changes
1: mov $1, %al
  out %al, $0xf4)")
GUEST_CODE(mmu_patch_loop, R"(
  xor %ebx, %ebx
  mov $1000, %ecx
1: mov $0, %eax
  add %eax, %ebx
  mov %ecx, 1b+1(%rip)          # each round adds the next value
  dec %ecx
  jnz 1b
  out %al, $0xf4)")

TEST(Mmu, SelfModifyingCode) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(mmu_patch_next));
  Outcome end = guest.Run();
  EXPECT_EQ(end.state.gpr[kRax] & 0xff, 42u);
  guest.Load(CODE_OF(mmu_patch_loop));
  end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  // Rounds see 0, 1000, 999, ... 2.
  EXPECT_EQ(end.state.gpr[kRbx], 1000u * 1001 / 2 - 1);
}

GUEST_CODE(mmu_before, "mov $1, %eax; out %al, $0xf4")
GUEST_CODE(mmu_after, "mov $2, %eax; out %al, $0xf4")

// A device writes new code: the next run sees it.
TEST(Mmu, CodeWrittenByDevice) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(mmu_before));
  EXPECT_TRUE(guest.board.vcpu().SetState(guest.initial));
  EXPECT_EQ(guest.Continue().state.gpr[kRax], 1u);
  GuestMemory dma(guest.board.memory());
  std::span<const uint8_t> code = CODE_OF(mmu_after);
  EXPECT_TRUE(dma.Write(Gpa(kCode), code.data(), code.size()));
  // Without SetState, which would flush the block cache: only the program counter goes back.
  guest.board.cpu().rip = kCode;
  EXPECT_EQ(guest.Continue().state.gpr[kRax], 2u);
}

// ---- devices behind the MMU

class Recorder final : public IoHandler {
 public:
  struct Event {
    bool write;
    uint64_t offset;
    unsigned size;
    uint64_t value;
    bool operator==(const Event&) const = default;
  };
  uint64_t IoRead(uint64_t offset, unsigned size) override {
    events.push_back({false, offset, size, 0});
    return 0x1122334455667788;
  }
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
    events.push_back({true, offset, size, value});
  }
  std::vector<Event> events;
};

GUEST_CODE(mmu_device, R"(
  mov 0x1ff000, %eax
  movb $9, 0x1ff005
  movq $1, 0x1ff008
  orl $0x80, 0x1ff010
  movups 0x1ff020, %xmm0
  mov %eax, 0x1ffffe            # two bytes to the device, two to RAM
  out %al, $0xf4)")

TEST(Mmu, Devices) {
  GuestCase guest(Mode::kLong64);
  guest.initial.cr4 |= cr4::kOsfxsr;
  Recorder recorder;
  Region region;
  region.name = "recorder";
  region.base = 0x1ff000;
  region.size = 0x1000;
  region.priority = 1;
  region.handler = &recorder;
  guest.board.memory().Add(region);
  guest.Put<uint64_t>(kTablesAt + 0x2000 + 8, 0x200083);
  guest.Load(CODE_OF(mmu_device));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRax], 0x55667788u);
  const std::vector<Recorder::Event> expected = {
      {false, 0, 4, 0},
      {true, 5, 1, 9},
      {true, 8, 8, 1},
      {false, 0x10, 4, 0},
      {true, 0x10, 4, 0x55667788 | 0x80},
      {false, 0x20, 8, 0},
      {false, 0x28, 8, 0},
      {true, 0xffe, 2, 0x7788},
  };
  EXPECT_TRUE(recorder.events == expected);
  EXPECT_EQ(guest.Get<uint16_t>(0x200000), 0x5566u);
}

TEST(Mmu, DirtyTracking) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(mmu_write));
  EXPECT_EQ(guest.Run().vector, -1);  // a writable translation is cached now
  ASSERT_TRUE(guest.board.accel().SetDirtyTracking(true));
  guest.board.cpu().rip = kCode;
  EXPECT_EQ(guest.Continue().vector, -1);
  std::vector<uint64_t> pages;
  auto view = guest.board.memory().view();
  view->ranges()[0].region->ram->dirty().Collect([&](uint64_t page) { pages.push_back(page); });
  EXPECT_NE(std::find(pages.begin(), pages.end(), kTestPage >> 12), pages.end());
  EXPECT_EQ(std::find(pages.begin(), pages.end(), kOtherPage >> 12), pages.end());
  pages.clear();
  guest.board.cpu().rip = kCode;
  EXPECT_EQ(guest.Continue().vector, -1);
  view->ranges()[0].region->ram->dirty().Collect([&](uint64_t page) { pages.push_back(page); });
  EXPECT_NE(std::find(pages.begin(), pages.end(), kTestPage >> 12), pages.end());
}

}  // namespace
}  // namespace kvartz::cpu::x86
