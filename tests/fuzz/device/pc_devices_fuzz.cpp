// The registers of a PC's devices: configuration space and BARs, fw_cfg with its DMA, timers,
// interrupt controllers, ACPI. Input: records of 12 bytes, {operation, size, port or offset,
// value}; each runs one access and lets some time pass.
#include <cstring>
#include <memory>

#include "device/char/i8042.h"
#include "device/core/fw_cfg.h"
#include "device/irq/ioapic.h"
#include "device/irq/pic_8259.h"
#include "device/pci/i440fx.h"
#include "device/pci/piix3.h"
#include "device/pci/piix4_pm.h"
#include "device/test_env.h"
#include "device/timer/hpet.h"
#include "device/timer/pit_8254.h"
#include "device/timer/rtc.h"

using namespace kvartz;

namespace {
struct Sample final : PciDevice, IoHandler {
  explicit Sample(const DeviceEnv& env)
      : PciDevice(env, {.vendor = 0x1af4, .device = 0x1041, .interrupt_pin = 1}) {
    AddBar(0, PciBarKind::kIo, 32, this, 4);
    AddBar(1, PciBarKind::kMemory32, 4096, this);
    AddBar(2, PciBarKind::kMemory64, 16384, this);
    AddMsix(4, 5);
    AddMsi(3);
  }
  void VisitState(StateVisitor& v) override {
    v.Version(1);
    PciDevice::VisitState(v);
  }
  uint64_t IoRead(uint64_t offset, unsigned) override { return offset; }
  void IoWrite(uint64_t offset, unsigned, uint64_t value) override {
    NotifyMsix(value & 7);
    NotifyMsi(value & 31);
    SetIntx(value & 8);
  }
};

struct Forward final : IrqSink {
  void SetIrq(unsigned line, bool level) override { target->SetIrq(line, level); }
  IrqSink* target = nullptr;
};

struct Fanout final : IrqSink {
  void SetIrq(unsigned line, bool level) override {
    if (line < 16) pic->SetIrq(line, level);
    ioapic->SetIrq(line, level);
  }
  PicPair* pic = nullptr;
  IoApic* ioapic = nullptr;
};

struct Machine {
  Machine()
      : ram(*RamBlock::Create("ram", 2 << 20)),
        bus(forward),
        pic(env.Env("pic"), IrqLine(output, 0)),
        ioapic(env.Env("ioapic")),
        pit(env.Env("pit"), IrqLine(lines, 0)),
        rtc(env.Env("rtc"), IrqLine(lines, 8), env.clock, 0),
        hpet(env.Env("hpet"), {&lines, 0xff0000, [this](bool on) { pit.SetIrqConnected(!on); }}),
        i8042(env.Env("i8042")),
        fw_cfg(env.Env("fw_cfg")),
        host(env.Env("host"), ram, ram),
        isa(env.Env("isa"), lines),
        pm(env.Env("pm"), IrqLine(lines, 9)),
        sample(env.Env("sample")),
        config(env.Env("config"), bus) {
    lines.pic = &pic;
    lines.ioapic = &ioapic;
    forward.target = &isa;
    (void)bus.Plug(host, 0), (void)bus.Plug(isa, 8), (void)bus.Plug(pm, 11),
        (void)bus.Plug(sample, 16);
    fw_cfg.SetFile("etc/file", std::vector<uint8_t>(5000, 1));
    Region region;
    region.name = "ram";
    region.kind = RegionKind::kRam;
    region.size = 0xa0000;
    region.ram = ram;
    env.memory.Add(region);
    Map(env.memory, IoApic::kBase, IoApic::kSize, ioapic, ioapic.lock(), 8);
    Map(env.memory, Hpet::kBase, Hpet::kSize, hpet, hpet.lock(), 8);
    Map(env.ports, PciConfigPorts::kBase, 8, config, config.lock(), 4);
    Map(env.ports, FwCfg::kBase, 12, fw_cfg, fw_cfg.lock(), 8);
    Map(env.ports, Rtc::kBase, 2, rtc, rtc.lock(), 1);
    for (Device* device :
         std::initializer_list<Device*>{&pic, &ioapic, &pit, &rtc, &hpet, &i8042, &fw_cfg, &host,
                                        &isa, &pm, &sample, &config}) {
      devices.push_back(device);
      test::MiniMachine::ResetDevice(*device);
    }
  }
  static void Map(AddressSpace& space, uint64_t base, uint64_t size, IoHandler& handler,
                  Mutex& lock, unsigned max) {
    Region region;
    region.name = "device";
    region.base = base;
    region.size = size;
    region.handler = &handler;
    region.lock = &lock;
    region.max_access = max;
    space.Add(region);
  }
  template <typename Handler>
  void Direct(Handler& device, uint64_t offset, bool write, uint8_t value) {
    LockGuard guard(device.lock());
    if (write) {
      device.IoWrite(offset, 1, value);
    } else {
      device.IoRead(offset, 1);
    }
  }
  void Visit(StateVisitor& v) {
    for (Device* device : devices) v.Section(device->id(), [&] { device->VisitState(v); });
  }

  test::MiniMachine env;
  test::RecordedLines output;
  Fanout lines;
  Forward forward;
  std::shared_ptr<RamBlock> ram;
  PciBus bus;
  PicPair pic;
  IoApic ioapic;
  Pit8254 pit;
  Rtc rtc;
  Hpet hpet;
  I8042 i8042;
  FwCfg fw_cfg;
  I440fx host;
  Piix3 isa;
  Piix4Pm pm;
  Sample sample;
  PciConfigPorts config;
  std::vector<Device*> devices;
};
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Machine m;
  ViewCache memory(m.env.memory), ports(m.env.ports);
  for (size_t at = 0; at + 12 <= size && at < 12 * 400; at += 12) {
    uint8_t operation = data[at];
    unsigned width = 1u << (data[at + 1] & 3);
    uint16_t where;
    uint64_t value;
    std::memcpy(&where, data + at + 2, 2);
    std::memcpy(&value, data + at + 4, 8);
    bool write = operation & 0x80;
    constexpr uint16_t kPicPorts[] = {0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1},
                       kKbcPorts[] = {0x60, 0x64, 0x92},
                       kPitPorts[] = {0x40, 0x41, 0x42, 0x43, 0x61};
    switch (operation & 15) {
      case 0:
        m.Direct(m.pic, kPicPorts[where % 6], write, value);
        break;
      case 1:
        m.Direct(m.pit, kPitPorts[where % 5], write, value);
        break;
      case 2:
        m.Direct(m.i8042, kKbcPorts[where % 3], write, value);
        break;
      case 3:
        BusWrite(ports, 0x70, 1, where),
            write ? BusWrite(ports, 0x71, 1, value) : void(BusRead(ports, 0x71, 1));
        break;
      case 4:
        write ? BusWrite(memory, Hpet::kBase + where % Hpet::kSize, width, value)
              : void(BusRead(memory, Hpet::kBase + where % Hpet::kSize, width));
        break;
      case 5:
        BusWrite(memory, IoApic::kBase, 4, where), BusWrite(memory, IoApic::kBase + 0x10, 4, value);
        break;
      case 6:
        m.ioapic.EndOfInterrupt(value);
        break;
      case 7:
        (void)m.pic.Acknowledge();
        break;
      case 8:
        // One of the four functions.
        BusWrite(ports, 0xcf8, 4,
                 1u << 31 | (where & 0xff) | std::array{0, 8, 11, 16}[where >> 8 & 3] << 8);
        write ? BusWrite(ports, 0xcfc + (where & 3), width > 4 ? 4 : width, value)
              : void(BusRead(ports, 0xcfc, 4));
        break;
      case 9:
        write ? BusWrite(ports, where, width, value) : void(BusRead(ports, where, width));
        break;
      case 10:
        write ? BusWrite(memory, value & 0xffffffffff, width, where)
              : void(BusRead(memory, value & 0xffffffffff, width));
        break;
      case 11:
        write ? BusWrite(ports, 0x510 + where % 12, width, value)
              : void(BusRead(ports, 0x510 + where % 12, width));
        break;
      case 12:  // a DMA request in RAM
        BusWrite(memory, 0x1000, 8, value), BusWrite(memory, 0x1008, 8, __builtin_bswap64(where));
        BusWrite(ports, 0x518, 4, __builtin_bswap32(0x1000));
        break;
      case 13:
        m.lines.SetIrq(where % 24, write);
        break;
      case 14:
        m.env.Pass(1 + value % 3'000'000'000, 1'000'000'000);
        break;
      case 15:
        m.env.Pass(100'000 + where * 100);
        break;
    }
  }
  // What came out can be saved and loaded.
  std::vector<uint8_t> state = SaveState([&](StateVisitor& v) { m.Visit(v); });
  Machine other;
  if (!LoadState(state, [&](StateVisitor& v) { other.Visit(v); })) std::abort();
  return 0;
}
