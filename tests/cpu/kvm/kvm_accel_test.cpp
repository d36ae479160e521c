#include "cpu/kvm/kvm_accel.h"

#include <gmock/gmock.h>

#include "cpu/kvm/payloads.h"
#include "cpu/kvm/test_machine.h"

namespace kvartz::cpu::kvm {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class KvmAccelTest : public ::testing::Test {
 protected:
  void SetUp() override { REQUIRE_KVM(); }
};

// LOCK is atomic between CPUs; INIT, SIPI and interrupts go between them.
TEST_F(KvmAccelTest, TwoCpusCountTogether) {
  for (IrqchipMode mode : {IrqchipMode::kKernel, IrqchipMode::kUser}) {
    auto machine = TestMachine::Create({.irqchip = mode, .cpus = 2});
    constexpr uint64_t kRounds = 20000;
    machine->SetShared(1, kRounds);
    machine->Start(pl_smp);
    EXPECT_EQ(machine->Run(), 25u);
    EXPECT_EQ(machine->Shared(0), 2 * kRounds);
    EXPECT_EQ(machine->Counter(0x51), 1u);
    EXPECT_EQ(machine->Counter(0x52), 1u);
  }
}

TEST_F(KvmAccelTest, ClockPageIsFilled) {
  auto machine = TestMachine::Create();
  if (!machine->accel().cpuid(0).Has("kvmclock")) GTEST_SKIP() << "KVM offers no clock here";
  machine->Start(pl_kvmclock);
  EXPECT_EQ(machine->Run(), 26u);
  EXPECT_NE(machine->reports()[0], 0u);  // multiplier
  EXPECT_EQ(machine->Read(0x500000) % 2, 0u);
}

TEST_F(KvmAccelTest, GuestSeesItsModel) {
  auto machine = TestMachine::Create({.model = "Haswell-noTSX,level=1,-cx16,model-id=Kvartz Test"});
  auto leaf = [&](uint32_t number) {
    machine->SetShared(0, number);
    machine->SetShared(1, 0);
    machine->Start(pl_cpuid);
    EXPECT_EQ(machine->Run(), 34u);
    return std::array{uint32_t(machine->Shared(2)), uint32_t(machine->Shared(3)),
                      uint32_t(machine->Shared(4)), uint32_t(machine->Shared(5))};
  };
  EXPECT_EQ(leaf(0)[0], 1u);
  EXPECT_EQ(leaf(1)[0], 0x306c1u);  // family 6 model 60 stepping 1
  EXPECT_EQ(leaf(1)[2] >> 13 & 1, 0u);
  EXPECT_EQ(leaf(0x40000000)[1], 0x4b4d564bu);  // "KVMK"
  std::array brand = leaf(0x80000002);
  EXPECT_EQ(std::string(reinterpret_cast<char*>(brand.data()), 11), "Kvartz Test");
}

TEST_F(KvmAccelTest, HiddenHypervisorHasNoLeaves) {
  auto machine = TestMachine::Create({.model = "max,level=1,kvm=off"});
  EXPECT_EQ(machine->accel().cpuid(0).Find(0x40000000, 0), nullptr);
  EXPECT_FALSE(machine->accel().cpuid(0).Has("kvmclock"));
}

TEST_F(KvmAccelTest, MaskingReachesTheGuest) {
  if (!OnHardware()) {
    GTEST_SKIP() << "bits of leaves 1, 7 and 0xd come back on this backend: " << ProbeKvm().why;
  }
  auto machine = TestMachine::Create({.model = "max,-popcnt"});
  machine->SetShared(0, 1);
  machine->Start(pl_cpuid);
  EXPECT_EQ(machine->Run(), 34u);
  EXPECT_EQ(machine->Shared(4) >> 23 & 1, 0u);
}

TEST_F(KvmAccelTest, KnowsItsTscFrequency) {
  auto machine = TestMachine::Create();
  EXPECT_GT(machine->accel().tsc_khz(), 100'000u);
  EXPECT_STREQ(machine->accel().name(), "kvm");
}

TEST_F(KvmAccelTest, CreationRefusesBadModels) {
  AddressSpace memory("memory", 1ull << 40), ports("ports", 1 << 16);
  struct Host final : AccelHost {
    uint8_t AcknowledgePic() override { return 0; }
    void BroadcastEoi(uint8_t) override {}
    void TripleFault(unsigned) override {}
    void EngineFailed(unsigned, const std::string&) override {}
  } host;
  AccelConfig config;
  config.memory = &memory;
  config.ports = &ports;
  config.host = &host;
  config.model.model = "Haswel";
  Result<std::unique_ptr<Accel>> accel = CreateKvm(config);
  ASSERT_FALSE(accel.has_value());
  EXPECT_THAT(accel.error().what, HasSubstr("did you mean 'Haswell'"));
  config.model = ParseCpuModel("max,tsc-frequency=1000").value();
  accel = CreateKvm(config);
  ASSERT_TRUE(accel.has_value());
  EXPECT_FALSE((*accel)->CreateVcpu(0).has_value());
}

// The same CPU twice: the kernel refuses, and says so.
TEST_F(KvmAccelTest, CpuCantBeMadeTwice) {
  auto machine = TestMachine::Create();
  Result<std::unique_ptr<Vcpu>> again = machine->accel().CreateVcpu(0);
  ASSERT_FALSE(again.has_value());
  EXPECT_THAT(again.error().what, HasSubstr("KVM_CREATE_VCPU"));
}

TEST_F(KvmAccelTest, MachinesComeAndGo) {
  for (int i = 0; i < 20; ++i) {
    auto machine = TestMachine::Create({.cpus = 2});
    machine->Start(pl_done);
    EXPECT_EQ(machine->Run(), 0x600du);
  }
}

// Found by running it, not by looking for a module's name.
TEST(KvmProbe, AgreesWithTheEngine) {
  const KvmFitness& fitness = ProbeKvm();
  EXPECT_FALSE(fitness.why.empty());
  EXPECT_EQ(fitness.why.find('\n'), std::string::npos);
  REQUIRE_KVM();
  auto machine = TestMachine::Create();
  machine->Start(pl_popcnt);
  if (fitness.verdict == KvmFitness::Verdict::kFit) {
    EXPECT_EQ(machine->Run(), 31u);
    EXPECT_THAT(machine->reports(), ElementsAre(8));
  } else {
    EXPECT_EQ(machine->vcpu().Run(), Vcpu::Exit::kFailed);
  }
}

// What the host has no means for, with the reason.
TEST(KvmNotHere, IsSaid) {
  REQUIRE_KVM();
  if (OnHardware()) GTEST_SKIP() << "this host has hardware virtualisation";
  GTEST_SKIP() << "not tested on this backend: Linux user space, ring-3 debugging, exact interrupt "
                  "timing, nested virtualisation, SMM, PMU";
}

}  // namespace
}  // namespace kvartz::cpu::kvm
