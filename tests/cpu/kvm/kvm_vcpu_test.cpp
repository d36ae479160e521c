#include "cpu/kvm/kvm_vcpu.h"

#include <gmock/gmock.h>

#include "base/log.h"
#include "cpu/kvm/payloads.h"
#include "cpu/kvm/test_machine.h"

namespace kvartz::cpu::kvm {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class KvmVcpuTest : public ::testing::Test {
 protected:
  void SetUp() override { REQUIRE_KVM(); }
};

// What a handler noted of a fault, but for where and when.
struct Fault {
  uint64_t vector, error, cs, cr2;
  bool operator==(const Fault&) const = default;
};
void PrintTo(const Fault& fault, std::ostream* out) {
  *out << std::hex << "{vector " << fault.vector << " error " << fault.error << " cs " << fault.cs
       << " cr2 " << fault.cr2 << "}";
}

// CR2 is compared for page faults only.
std::vector<Fault> FaultsOf(const TestMachine& machine) {
  std::vector<Fault> faults;
  for (const LogEntry& entry : machine.Log()) {
    faults.push_back({entry.vector, entry.error, entry.cs, entry.vector == 14 ? entry.cr2 : 0});
  }
  return faults;
}

TEST_F(KvmVcpuTest, RunsAndStops) {
  auto machine = TestMachine::Create();
  machine->Start(pl_done);
  EXPECT_EQ(machine->Run(), 0x600du);
  EXPECT_EQ(machine->last_exit(), Vcpu::Exit::kKicked);
}

TEST_F(KvmVcpuTest, GoesFromRealModeToLongModeByItself) {
  auto machine = TestMachine::Create();
  X86State state;
  ASSERT_TRUE(machine->vcpu().GetState(&state).has_value());
  state.seg[kCs].selector = kImage >> 4;
  state.seg[kCs].base = kImage;
  state.rip = AddressOf(pl_real) - kImage;
  ASSERT_TRUE(machine->vcpu().SetState(state).has_value());
  EXPECT_EQ(machine->Run(), 1u);
  EXPECT_THAT(machine->reports(), ElementsAre(0x16, 0x32, 0x40));
}

// Error codes and CR2 as in SDM vol. 3 ch. 6.
TEST_F(KvmVcpuTest, FaultsOfRing0) {
  auto machine = TestMachine::Create();
  machine->Start(pl_faults);
  EXPECT_EQ(machine->Run(), 2u);
  EXPECT_THAT(FaultsOf(*machine),
              ElementsAre(Fault{6, 0, 0x10, 0}, Fault{13, 0, 0x10, 0}, Fault{13, 0x7c, 0x10, 0},
                          Fault{0, 0, 0x10, 0}, Fault{14, 0, 0x10, kPages + 8},
                          Fault{14, 2, 0x10, kPages + 16}, Fault{14, 3, 0x10, kPages + 0x1000},
                          Fault{14, 0x11, 0x10, kPages + 0x2000}));
}

TEST_F(KvmVcpuTest, FaultsOfRing3ReachRing0) {
  auto machine = TestMachine::Create();
  machine->Start(pl_user_faults);
  EXPECT_EQ(machine->Run(), 3u);
  EXPECT_THAT(FaultsOf(*machine),
              ElementsAre(Fault{6, 0, 0x33, 0}, Fault{13, 0, 0x33, 0}, Fault{0, 0, 0x33, 0},
                          Fault{14, 5, 0x33, kPages + 0x1000}, Fault{14, 6, 0x33, kPages + 0x2008},
                          Fault{14, 0x15, 0x33, kPages + 0x3000}, Fault{3, 0, 0x33, 0}));
}

TEST_F(KvmVcpuTest, PagingKeepsAccessedAndDirtyAndForgetsByInvlpg) {
  auto machine = TestMachine::Create();
  machine->SetShared(0, 0x1234);
  machine->Start(pl_paging);
  EXPECT_EQ(machine->Run(), 4u);
  // A; A and D; before and after INVLPG; read at -2 GiB; ran at -2 GiB.
  EXPECT_THAT(machine->reports(), ElementsAre(0x20, 0x60, 0xaaaa, 0xbbbb, 0x1234, 0xffffffff));
}

TEST_F(KvmVcpuTest, CompatibilityModeRuns) {
  auto machine = TestMachine::Create();
  machine->Start(pl_compat);
  EXPECT_EQ(machine->Run(), 28u);
  EXPECT_EQ(machine->Shared(0), 0u);
  EXPECT_EQ(machine->Shared(1) & 0xffffffff, 1u);  // 40 was INC EAX
  EXPECT_EQ(machine->Shared(2) & 0xffffffff, 0xd000u);
}

TEST_F(KvmVcpuTest, PortsOfEveryWidthAndStrings) {
  auto machine = TestMachine::Create();
  machine->Start(pl_ports);
  EXPECT_EQ(machine->Run(), 5u);
  std::vector<Access> expected = {
      {0, 1, true, 0x44},    {0, 2, true, 0x3344},  {0, 4, true, 0x11223344},
      {1, 1, false, 0x22},   {2, 2, false, 0x4433}, {4, 4, false, 0x88776655},
      {1, 1, true, 'h'},     {1, 1, true, 'e'},     {1, 1, true, 'l'},
      {1, 1, true, 'l'},     {1, 1, true, 'o'},     {2, 2, false, 0x4433},
      {2, 2, false, 0x4433}, {2, 2, false, 0x4433}};
  EXPECT_EQ(machine->accesses(), expected);
  EXPECT_EQ(machine->Shared(0), 0x22u);
  EXPECT_EQ(machine->Shared(1), 0x4433u);
  EXPECT_EQ(machine->Shared(2), 0x88776655u);
  EXPECT_EQ(machine->Shared(3), 0x443344334433u);
}

TEST_F(KvmVcpuTest, MemoryDevicesSeeEveryWidth) {
  auto machine = TestMachine::Create();
  machine->Start(pl_mmio);
  EXPECT_EQ(machine->Run(), 6u);
  std::vector<Access> accesses = machine->accesses();
  std::vector<Access> first = {{0, 1, true, 0x11},        {2, 2, true, 0x2222},
                               {4, 4, true, 0x33333333},  {8, 8, true, 0x4444555566667777},
                               {1, 1, false, 0x22},       {2, 2, false, 0x4433},
                               {4, 4, false, 0x88776655}, {8, 8, false, 0x8877665544332211}};
  ASSERT_GE(accesses.size(), first.size());
  EXPECT_EQ(std::vector(accesses.begin(), accesses.begin() + 8), first);
  // The rest by bytes, however it was cut: across the page's end, a string move, 16 bytes at once.
  std::map<uint64_t, unsigned> bytes;
  for (auto it = accesses.begin() + 8; it != accesses.end(); ++it) {
    ASSERT_TRUE(it->write);
    for (unsigned i = 0; i < it->size; ++i) bytes[it->offset + i] = it->value >> 8 * i & 0xff;
  }
  for (unsigned i = 0; i < 8; ++i) EXPECT_EQ(bytes[0xffd + i], 8 - i);
  for (unsigned i = 0; i < 8; ++i) EXPECT_EQ(bytes[0x40 + i], i < 4 ? 0xa1u : 0xb2u);
  for (unsigned i = 0; i < 16; ++i) EXPECT_EQ(bytes[0x80 + i], 0xa1u + 0x11 * (i / 4));
  EXPECT_EQ(bytes.size(), 32u);
  EXPECT_EQ(machine->Shared(0), 0x22u);
  EXPECT_EQ(machine->Shared(1), 0x4433u);
  EXPECT_EQ(machine->Shared(2), 0x88776655u);
  EXPECT_EQ(machine->Shared(3), 0x8877665544332211u);
}

TEST_F(KvmVcpuTest, KickEndsRunWhereverTheGuestIs) {
  for (const char* label : {pl_spin, pl_user_spin, pl_halt}) {
    SCOPED_TRACE(AddressOf(label) - kImage);
    auto machine = TestMachine::Create();
    machine->Start(label);
    for (size_t round = 1; round <= 5; ++round) {
      machine->Resume();
      ASSERT_TRUE(machine->WaitReports(1));
      machine->Park();
      EXPECT_EQ(machine->last_exit(), Vcpu::Exit::kKicked);
    }
  }
}

TEST_F(KvmVcpuTest, KickBeforeRunIsKept) {
  auto machine = TestMachine::Create();
  machine->Start(pl_spin);
  machine->vcpu().Kick();
  EXPECT_EQ(machine->vcpu().Run(), Vcpu::Exit::kKicked);
  EXPECT_TRUE(machine->reports().empty());
}

TEST_F(KvmVcpuTest, NmiInterruptsAndWakes) {
  auto machine = TestMachine::Create();
  machine->SetShared(0, 2);
  machine->SetShared(1, 1);
  machine->Start(pl_wait);
  machine->Resume();
  ASSERT_TRUE(machine->WaitReports(1));
  machine->vcpu().Nmi();
  EXPECT_TRUE(machine->WaitDone());
  machine->Park();
  EXPECT_EQ(machine->Counter(2), 1u);
}

TEST_F(KvmVcpuTest, TripleFaultIsReported) {
  auto machine = TestMachine::Create();
  machine->Start(pl_triple);
  EXPECT_EQ(machine->vcpu().Run(), Vcpu::Exit::kTripleFault);
  EXPECT_THAT(machine->triple_faults(), ElementsAre(0));
}

TEST_F(KvmVcpuTest, UnknownMsrsAreGeneralProtectionFaults) {
  auto machine = TestMachine::Create();
  machine->Start(pl_msr);
  EXPECT_EQ(machine->Run(), 27u);
  EXPECT_THAT(FaultsOf(*machine), ElementsAre(Fault{13, 0, 0x10, 0}, Fault{13, 0, 0x10, 0}));
}

TEST_F(KvmVcpuTest, UnknownMsrsAreLoggedWhenAskedFor) {
  ASSERT_TRUE(log::EnableCategories("guest_errors").has_value());
  auto machine = TestMachine::Create();
  machine->Start(pl_msr);
  EXPECT_EQ(machine->Run(), 27u);
  EXPECT_THAT(FaultsOf(*machine), ElementsAre(Fault{13, 0, 0x10, 0}, Fault{13, 0, 0x10, 0}));
}

// ---- what emulating backends can't do, and how it is reported ----

TEST_F(KvmVcpuTest, FailureToEmulateNamesTheInstructionAndCanBeMended) {
  if (OnHardware()) GTEST_SKIP() << "the host's CPU runs POPCNT in ring 0";
  auto machine = TestMachine::Create();
  machine->Start(pl_popcnt);
  EXPECT_EQ(machine->vcpu().Run(), Vcpu::Exit::kFailed);
  ASSERT_EQ(machine->failures().size(), 1u);
  EXPECT_THAT(machine->failures()[0], HasSubstr("f3 48 0f b8 c3"));
  // In its place: the result, and the next instruction.
  X86State state;
  ASSERT_TRUE(machine->vcpu().GetState(&state).has_value());
  state.gpr[kRax] = 8;
  state.rip = AddressOf(pl_popcnt_after);
  ASSERT_TRUE(machine->vcpu().SetState(state).has_value());
  EXPECT_EQ(machine->Run(), 31u);
  EXPECT_THAT(machine->reports(), ElementsAre(8));
}

TEST_F(KvmVcpuTest, FailureToEmulateCanBecomeAnException) {
  auto machine = TestMachine::Create();
  machine->Start(pl_int3);
  if (OnHardware()) {
    EXPECT_EQ(machine->Run(), 33u);
  } else {
    EXPECT_EQ(machine->vcpu().Run(), Vcpu::Exit::kFailed);
    X86State state;
    ASSERT_TRUE(machine->vcpu().GetState(&state).has_value());
    ++state.rip;
    state.events.exception_pending = true;
    state.events.exception_vector = 3;
    ASSERT_TRUE(machine->vcpu().SetState(state).has_value());
    EXPECT_EQ(machine->Run(), 33u);
  }
  EXPECT_EQ(machine->Counter(3), 1u);
}

TEST_F(KvmVcpuTest, SyscallReachesRing0) {
  if (!OnHardware()) GTEST_SKIP() << "SYSCALL stays in ring 3 on this backend: " << ProbeKvm().why;
  auto machine = TestMachine::Create();
  machine->Start(pl_syscall);
  EXPECT_EQ(machine->Run(), 32u);
  EXPECT_THAT(machine->reports(), ElementsAre(0x10));
}

TEST_F(KvmVcpuTest, PagingOf32Bits) {
  if (!OnHardware()) GTEST_SKIP() << "no 32-bit paging on this backend: " << ProbeKvm().why;
  auto machine = TestMachine::Create();
  for (uint64_t i = 0; i < 512; ++i) {  // one table of 4 MiB pages, two entries a word
    machine->Write(kPages + 8 * i, (2 * i << 22 | 0x83) | (2 * i + 1) << 54 | 0x83ull << 32);
  }
  machine->SetShared(0, kPages);
  X86State state;
  ASSERT_TRUE(machine->vcpu().GetState(&state).has_value());
  state.seg[kCs].selector = kImage >> 4;
  state.seg[kCs].base = kImage;
  state.rip = AddressOf(pl_real32) - kImage;
  ASSERT_TRUE(machine->vcpu().SetState(state).has_value());
  EXPECT_EQ(machine->Run(), 0x3232u);
}

// ---- debugging ----

TEST_F(KvmVcpuTest, SingleStepStopsAfterEachInstruction) {
  auto machine = TestMachine::Create();
  machine->Start(pl_step);
  DebugRequest request;
  request.single_step = true;
  ASSERT_TRUE(machine->vcpu().SetDebug(request).has_value());
  uint64_t rip = AddressOf(pl_step);
  for (uint64_t length : {1, 5, 3, 1}) {
    ASSERT_EQ(machine->vcpu().Run(), Vcpu::Exit::kDebug);
    rip += length;
    EXPECT_EQ(machine->vcpu().debug_stop().rip, rip);
    EXPECT_EQ(machine->vcpu().debug_stop().vector, 1);
  }
  ASSERT_TRUE(machine->vcpu().SetDebug({}).has_value());
  EXPECT_EQ(machine->Run(), 30u);
  EXPECT_THAT(machine->reports(), ElementsAre(11));
}

TEST_F(KvmVcpuTest, HardwareBreakpointStopsBeforeTheInstruction) {
  auto machine = TestMachine::Create();
  machine->Start(pl_step);
  DebugRequest request;
  request.hardware.push_back({.address = AddressOf(pl_step_end)});
  ASSERT_TRUE(machine->vcpu().SetDebug(request).has_value());
  ASSERT_EQ(machine->vcpu().Run(), Vcpu::Exit::kDebug);
  EXPECT_EQ(machine->vcpu().debug_stop().rip, AddressOf(pl_step_end));
  EXPECT_EQ(machine->vcpu().debug_stop().dr6 & 1, 1u);
  request.hardware.resize(5);
  EXPECT_FALSE(machine->vcpu().SetDebug(request).has_value());
  ASSERT_TRUE(machine->vcpu().SetDebug({}).has_value());
  EXPECT_EQ(machine->Run(), 30u);
}

TEST_F(KvmVcpuTest, SoftwareBreakpointStops) {
  if (!OnHardware()) GTEST_SKIP() << "INT3 does not stop on this backend: " << ProbeKvm().why;
  auto machine = TestMachine::Create();
  machine->Start(pl_int3);
  DebugRequest request;
  request.software_breakpoints = true;
  ASSERT_TRUE(machine->vcpu().SetDebug(request).has_value());
  ASSERT_EQ(machine->vcpu().Run(), Vcpu::Exit::kDebug);
  EXPECT_EQ(machine->vcpu().debug_stop().vector, 3);
  EXPECT_EQ(machine->vcpu().debug_stop().rip, AddressOf(pl_int3));
}

}  // namespace
}  // namespace kvartz::cpu::kvm
