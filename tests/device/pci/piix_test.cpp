// Expected values: Intel 82441FX (290549), 82371SB (290550) and 82371AB (290562) datasheets;
// ACPI 6.4, 4.8.3.
#include <gtest/gtest.h>

#include "device/pci/i440fx.h"
#include "device/pci/pci_config.h"
#include "device/pci/piix3.h"
#include "device/pci/piix4_pm.h"
#include "device/test_env.h"

namespace kvartz {
namespace {

using Request = MachineControl::Request;

struct Forward final : IrqSink {
  void SetIrq(unsigned line, bool level) override { target->SetIrq(line, level); }
  IrqSink* target = nullptr;
};

struct PiixTest : testing::Test {
  PiixTest()
      : ram(*RamBlock::Create("ram", 2 << 20)),
        rom(*RamBlock::Create("rom", 256 << 10)),
        bus(forward),
        host(machine.Env("host"), ram, rom),
        isa(machine.Env("isa"), lines),
        pm(machine.Env("pm"), IrqLine(lines, 9)),
        ports(machine.Env("ports"), bus),
        memory_view(machine.memory),
        ports_view(machine.ports) {
    forward.target = &isa;
    EXPECT_TRUE(bus.Plug(host, 0) && bus.Plug(isa, 8) && bus.Plug(pm, 11));
    Region region;
    region.name = "config";
    region.base = 0xcf8;
    region.size = 8;
    region.handler = &ports;
    region.lock = &ports.lock();
    region.max_access = 4;
    machine.ports.Add(region);
    for (Device* device : std::initializer_list<Device*>{&host, &isa, &pm, &ports})
      test::MiniMachine::ResetDevice(*device);
    for (size_t i = 0; i < rom->size(); i++) rom->host()[i] = 0xb0;
  }
  void Out(uint16_t port, unsigned size, uint32_t value) {
    BusWrite(ports_view, port, size, value);
  }
  uint32_t In(uint16_t port, unsigned size) { return BusRead(ports_view, port, size); }
  void WriteConfig(unsigned devfn, unsigned offset, unsigned size, uint32_t value) {
    Out(0xcf8, 4, 1u << 31 | devfn << 8 | (offset & 0xfc));
    Out(0xcfc + (offset & 3), size, value);
  }
  uint32_t ReadConfig(unsigned devfn, unsigned offset, unsigned size) {
    Out(0xcf8, 4, 1u << 31 | devfn << 8 | (offset & 0xfc));
    return In(0xcfc + (offset & 3), size);
  }
  uint8_t Peek(uint64_t address) { return BusRead(memory_view, address, 1); }

  test::MiniMachine machine;
  test::RecordedLines lines;
  std::shared_ptr<RamBlock> ram, rom;
  Forward forward;
  PciBus bus;
  I440fx host;
  Piix3 isa;
  Piix4Pm pm;
  PciConfigPorts ports;
  ViewCache memory_view, ports_view;
};

TEST_F(PiixTest, ConfigurationPorts) {
  EXPECT_EQ(ReadConfig(0, 0, 4), 0x12378086u);
  EXPECT_EQ(ReadConfig(8, 0, 4), 0x70008086u);
  EXPECT_EQ(ReadConfig(11, 0, 4), 0x71138086u);
  EXPECT_EQ(ReadConfig(8, 0x0e, 1), 0x80u) << "multifunction";
  EXPECT_EQ(ReadConfig(11, 2, 2), 0x7113u);
  EXPECT_EQ(ReadConfig(16, 0, 4), 0xffffffffu);
  EXPECT_EQ(In(0xcf8, 4), 1u << 31 | 16 << 8);
  Out(0xcf8, 4, 0);
  EXPECT_EQ(In(0xcfc, 4), 0xffffffffu) << "not enabled";
  Out(0xcf8, 4, 1u << 31 | 1 << 16);
  EXPECT_EQ(In(0xcfc, 4), 0xffffffffu) << "another bus";
}

TEST_F(PiixTest, ResetControlRegister) {
  Out(0xcf9, 1, 0x02);
  EXPECT_TRUE(machine.requests.empty());
  Out(0xcf9, 1, 0x06);
  ASSERT_EQ(machine.requests.size(), 1u);
  EXPECT_EQ(machine.requests[0].first, Request::kReset);
}

TEST_F(PiixTest, ShadowRam) {
  ram->host()[0xf1234] = 0x11;
  ram->host()[0xc8000] = 0x22;
  EXPECT_EQ(Peek(0xf1234), 0xb0) << "ROM after reset";
  EXPECT_EQ(Peek(0xe0000), 0xb0);
  EXPECT_EQ(Peek(0xc8000), 0xff) << "no option ROM";
  WriteConfig(0, 0x59, 1, 0x20);  // write RAM, read ROM
  BusWrite(memory_view, 0xf1234, 1, 0x33);
  EXPECT_EQ(Peek(0xf1234), 0xb0);
  EXPECT_EQ(ram->host()[0xf1234], 0x33);
  WriteConfig(0, 0x59, 1, 0x10);  // read RAM, write protected
  EXPECT_EQ(Peek(0xf1234), 0x33);
  BusWrite(memory_view, 0xf1234, 1, 0x44);
  EXPECT_EQ(Peek(0xf1234), 0x33);
  WriteConfig(0, 0x5b, 1, 0x03);  // 0xc8000
  EXPECT_EQ(Peek(0xc8000), 0x22);
  BusWrite(memory_view, 0xc8000, 1, 0x55);
  EXPECT_EQ(Peek(0xc8000), 0x55);
  EXPECT_EQ(Peek(0xcc000), 0xff);
  test::MiniMachine::ResetDevice(host);
  EXPECT_EQ(Peek(0xf1234), 0xb0);
}

TEST_F(PiixTest, PciInterruptsFollowTheirRoutes) {
  WriteConfig(8, 0x60, 4, 0x0b0b0a0a);
  forward.SetIrq(1, true);  // INTA of slot 1: PIRQ A
  EXPECT_TRUE(lines.levels[10]);
  forward.SetIrq(3, true);  // PIRQ C
  EXPECT_TRUE(lines.levels[11]);
  WriteConfig(8, 0x60, 1, 0x05);
  EXPECT_TRUE(lines.levels[5]);
  EXPECT_FALSE(lines.levels[10]);
  WriteConfig(8, 0x60, 1, 0x80);
  EXPECT_FALSE(lines.levels[5]);
  forward.SetIrq(3, false);
  EXPECT_FALSE(lines.levels[11]);
  EXPECT_EQ(isa.LineOf(4, 1), 11) << "INTA of slot 4 is PIRQ D";
}

TEST_F(PiixTest, PmTimerPowerButtonAndOff) {
  EXPECT_EQ(In(0x608, 4), 0xffffffffu) << "not decoded yet";
  WriteConfig(11, 0x40, 4, 0x601);
  WriteConfig(11, 0x80, 1, 1);
  uint32_t before = In(0x608, 4);
  machine.clock.Advance(1'000'000'000);
  EXPECT_EQ((In(0x608, 4) - before) & 0xffffff, 3579545u);
  EXPECT_EQ(In(0x604, 2) & 1, 1u) << "SCI_EN";
  pm.PressPowerButton();
  EXPECT_FALSE(lines.levels[9]);
  EXPECT_EQ(In(0x600, 2) & 0x100, 0x100u);
  Out(0x602, 2, 0x100);
  EXPECT_TRUE(lines.levels[9]);
  Out(0x600, 2, 0x100);
  EXPECT_FALSE(lines.levels[9]);
  Out(0x604, 2, 1 << 10 | 1 << 13);
  EXPECT_TRUE(machine.requests.empty()) << "S-state 1 isn't offered";
  Out(0x604, 2, 1 << 13);
  ASSERT_EQ(machine.requests.size(), 1u);
  EXPECT_EQ(machine.requests[0].first, Request::kPowerOff);
}

TEST_F(PiixTest, PmTimerOverflowInterrupts) {
  WriteConfig(11, 0x40, 4, 0x601);
  WriteConfig(11, 0x80, 1, 1);
  Out(0x600, 2, 1);
  Out(0x602, 2, 1);
  machine.Pass(3'000'000'000, 10'000'000);  // bit 23 changes every 2.34 s
  EXPECT_TRUE(lines.levels[9]);
  EXPECT_TRUE(In(0x600, 2) & 1);
  Out(0x600, 2, 1);
  EXPECT_FALSE(lines.levels[9]);
}

TEST_F(PiixTest, GeneralEventsAndSmbus) {
  WriteConfig(11, 0x40, 4, 0x601), WriteConfig(11, 0x80, 1, 1);
  Out(0x60e, 2, 0x0004);
  pm.RaiseGpe(2);
  EXPECT_TRUE(lines.levels[9]);
  Out(0x60c, 2, 0x0004);
  EXPECT_FALSE(lines.levels[9]);
  WriteConfig(11, 0x90, 4, 0x701), WriteConfig(11, 0xd2, 1, 0x09);
  Out(0x702, 1, 0x48);
  EXPECT_EQ(In(0x700, 1), 0x04u) << "nobody answers";
  Out(0x700, 1, 0xff);
  EXPECT_EQ(In(0x700, 1), 0u);
}

TEST_F(PiixTest, StateMoves) {
  WriteConfig(0, 0x59, 1, 0x30), WriteConfig(8, 0x60, 4, 0x0b0b0a0a),
      WriteConfig(11, 0x40, 4, 0x601), WriteConfig(11, 0x80, 1, 1);
  std::vector<uint8_t> saved = SaveState([&](StateVisitor& v) {
    v.Section("host", [&] { host.VisitState(v); });
    v.Section("isa", [&] { isa.VisitState(v); });
    v.Section("pm", [&] { pm.VisitState(v); });
  });
  for (Device* device : std::initializer_list<Device*>{&host, &isa, &pm})
    test::MiniMachine::ResetDevice(*device);
  EXPECT_EQ(In(0x608, 4), 0xffffffffu);
  Result<> loaded = LoadState(saved, [&](StateVisitor& v) {
    v.Section("host", [&] { host.VisitState(v); });
    v.Section("isa", [&] { isa.VisitState(v); });
    v.Section("pm", [&] { pm.VisitState(v); });
  });
  ASSERT_TRUE(loaded) << loaded.error().what;
  EXPECT_NE(In(0x608, 4), 0xffffffffu);
  EXPECT_EQ(ReadConfig(8, 0x60, 4), 0x0b0b0a0au);
  BusWrite(memory_view, 0xf0000, 1, 0x77);
  EXPECT_EQ(Peek(0xf0000), 0x77);
}

}  // namespace
}  // namespace kvartz
