#include "machine/pc.h"

#include <algorithm>

#include "base/check.h"
#include "device/char/i8042.h"
#include "device/core/properties.h"
#include "device/irq/ioapic.h"
#include "device/irq/pic_8259.h"
#include "device/pci/i440fx.h"
#include "device/pci/pci_config.h"
#include "device/pci/piix3.h"
#include "device/pci/piix4_pm.h"
#include "device/timer/pit_8254.h"
#include "device/timer/rtc.h"
#include "machine/board_options.h"
#include "machine/irq_router.h"
#include "machine/wall_clock.h"

namespace kvartz::machine {

namespace {
constexpr uint64_t k4GiB = 1ull << 32, kMiB = 1 << 20;
constexpr uint64_t kVgaBegin = 0xa0000, kEbda = 0x9fc00;
constexpr uint64_t kPciHoleEnd = IoApic::kBase;
constexpr unsigned kSciLine = 9;
constexpr uint8_t kPmSlot = 1, kPmFunction = 3;
// Where SeaBIOS puts the PIIX4's blocks.
constexpr uint16_t kPmBase = 0x600, kSmbusBase = 0x700;
// The lines that SeaBIOS routes PCI interrupts to.
constexpr uint8_t kPirqAb = 10, kPirqCd = 11;
constexpr uint16_t kBarIoBegin = 0xc000;
}  // namespace

PcBoard::PcBoard(const MachineConfig& config, const MachineType& type, const BoardEnv& env)
    : Board(config, type, env) {}

PcBoard::~PcBoard() { DestroyDevices(); }

Result<> PcBoard::TakeOptions() {
  BoardOptions options;
  constexpr PropertySpec kTable[] = {
      COMMON_BOARD_OPTIONS,
      PROPERTY(BoardOptions, "hpet", hpet, "high precision event timer"),
      PROPERTY(BoardOptions, "smm", smm, "system management mode"),
      PROPERTY(BoardOptions, "vmport", vmport, "VMware's port"),
      PROPERTY(BoardOptions, "usb", usb, "a USB controller"),
      PROPERTY(BoardOptions, "max-ram-below-4g", max_ram_below_4g, "where RAM ends below 4 GiB"),
  };
  TRY(ApplyProperties(kTable, MachineOptions(config_), "machine type '" + type_.name + "'",
                      &options));
  for (auto [on, name] :
       {std::pair(options.smm == OnOffAuto::kOn, "smm"),
        std::pair(options.vmport == OnOffAuto::kOn, "vmport"), std::pair(options.usb, "usb")}) {
    if (on)
      return Fail(ErrorCode::kUnsupported,
                  std::string("not supported yet: machine option ") + name + "=on; leave it out");
  }
  irqchip_ = TRY(ChooseIrqchip(options.kernel_irqchip, env_.accel));
  options_.acpi = options.acpi;
  options_.hpet = options.hpet;
  if (!options.max_ram_below_4g.empty()) {
    options_.max_ram_below_4g = TRY(ParseSize("max-ram-below-4g", options.max_ram_below_4g));
    if (options_.max_ram_below_4g < 16 * kMiB || options_.max_ram_below_4g > 0xe0000000) {
      return Fail(ErrorCode::kInvalid,
                  "machine option max-ram-below-4g must be between 16M and 3.5G");
    }
  }
  return {};
}

Result<> PcBoard::MapRam() {
  if (config_.ram_bytes < 2 * kMiB) {
    return Fail(ErrorCode::kInvalid, "machine type '" + type_.name +
                                         "' needs at least 2 MiB of memory; give it more with -m");
  }
  uint64_t limit = config_.ram_bytes < 0xe0000000 ? 0xe0000000 : 0xc0000000;
  if (options_.max_ram_below_4g) limit = options_.max_ram_below_4g;
  TRY(MapPcRam(limit, kVgaBegin, kMiB));
  pci_hole_begin_ = std::max<uint64_t>(low_ram_bytes_, 0x80000000);
  return {};
}

Result<> PcBoard::WireDevices() {
  if (config_.boot.kernel.empty()) {
    return Fail(ErrorCode::kUnsupported, "no kernel to start; give one with -kernel");
  } else {
    kernel_ = TRY(Kernel::OpenPath(config_.boot.kernel));
    if (!config_.boot.initrd.empty()) TRY(kernel_->OpenInitrd(config_.boot.initrd));
  }
  isa_irqs_ = router_.get();
  bool user_irqchip = irqchip_ == cpu::IrqchipMode::kUser;
  if (user_irqchip) {
    pic_output_ = std::make_unique<PicOutput>(*accel_);
    pic_ = &Own(std::make_unique<PicPair>(MakeEnv("pic"), IrqLine(*pic_output_, 0)));
    MapPorts(*pic_, PicPair::kMaster, 2, PicPair::kMaster);
    MapPorts(*pic_, PicPair::kSlave, 2, PicPair::kSlave);
    MapPorts(*pic_, PicPair::kElcr, 2, PicPair::kElcr);
    ioapic_ = &Own(std::make_unique<IoApic>(MakeEnv("ioapic")));
    MapMmio(*ioapic_, IoApic::kBase, IoApic::kSize);
    Pit8254& pit = Own(std::make_unique<Pit8254>(MakeEnv("pit"), IrqLine(*router_, 0)));
    MapPorts(pit, Pit8254::kBase, 4, Pit8254::kBase);
    MapPorts(pit, Pit8254::kSpeaker, 1, Pit8254::kSpeaker);
  }
  router_->Connect(pic_, ioapic_);
  rtc_ = &Own(std::make_unique<Rtc>(MakeEnv("rtc"), IrqLine(*router_, 8), WallClock::Instance(),
                                    RtcOffset(config_.rtc)));
  MapPorts(*rtc_, Rtc::kBase, 2);
  FillCmos();
  I8042& i8042 = Own(std::make_unique<I8042>(MakeEnv("i8042")));
  MapPorts(i8042, I8042::kData, 1, I8042::kData);
  MapPorts(i8042, I8042::kCommand, 1, I8042::kCommand);
  MapPorts(i8042, I8042::kPort92, 1, I8042::kPort92);

  pirq_ = std::make_unique<IrqForward>();
  pci_ = std::make_unique<PciBus>(*pirq_);
  host_bridge_ = &Own(std::make_unique<I440fx>(MakeEnv("pci.0/00.0"), ram_blocks_[0], bios_));
  TRY(pci_->Plug(*host_bridge_, 0));
  isa_bridge_ = &Own(std::make_unique<Piix3>(MakeEnv("pci.0/01.0"), *router_));
  TRY(pci_->Plug(*isa_bridge_, 1 << 3));
  pirq_->Connect(*isa_bridge_);
  pm_ = &Own(std::make_unique<Piix4Pm>(MakeEnv("pci.0/01.3"), IrqLine(*router_, kSciLine)));
  TRY(pci_->Plug(*pm_, kPmSlot << 3 | kPmFunction));
  Region apm;
  apm.name = "apm";
  apm.base = Piix4Pm::kApm;
  apm.size = 2;
  apm.handler = &pm_->apm();
  apm.lock = &pm_->lock();
  apm.max_access = 1;
  ports_.Add(std::move(apm));
  PciConfigPorts& config_ports =
      Own(std::make_unique<PciConfigPorts>(MakeEnv("pci-config"), *pci_));
  MapPorts(config_ports, PciConfigPorts::kBase, 8, 0, 4);
  return {};
}

// Bytes of the CMOS that firmware reads (SeaBIOS src/hw/rtc.h, src/fw/paravirt.c; IBM PC AT
// technical reference).
void PcBoard::FillCmos() {
  auto set16 = [&](uint8_t index, uint64_t value) {
    value = std::min<uint64_t>(value, 0xffff);
    rtc_->SetByte(index, value);
    rtc_->SetByte(index + 1, value >> 8);
  };
  set16(0x15, 640);
  uint64_t extended_kib = (low_ram_bytes_ - kMiB) / 1024;
  set16(0x17, extended_kib);
  set16(0x30, extended_kib);
  set16(0x34, low_ram_bytes_ > 16 * kMiB ? (low_ram_bytes_ - 16 * kMiB) / 65536 : 0);
  uint64_t above = (config_.ram_bytes - low_ram_bytes_) / 65536;
  rtc_->SetByte(0x5b, above);
  rtc_->SetByte(0x5c, above >> 8);
  rtc_->SetByte(0x5d, above >> 16);
  rtc_->SetByte(0x5f, std::min(config_.cpu_count - 1, 255u));
  rtc_->SetByte(0x14, 0x02);  // a mathematics coprocessor
  uint8_t order[3] = {};
  for (size_t i = 0; i < 3 && i < config_.boot.order.size(); i++) {
    switch (config_.boot.order[i]) {
      case 'a':
        order[i] = 1;
        break;
      case 'c':
        order[i] = 2;
        break;
      case 'd':
        order[i] = 3;
        break;
      case 'n':
        order[i] = 4;
        break;
    }
  }
  rtc_->SetByte(0x3d, order[1] << 4 | order[0]);
  rtc_->SetByte(0x38, order[2] << 4 | 1);  // no check of the boot sector's signature on floppies
}

Result<> PcBoard::AttachPci(PciDevice& device, const Properties& properties) {
  int devfn = TRY(ParsePciAddress(device.id(), properties));
  TRY(pci_->Plug(device, devfn));
  return {};
}

Result<Board::MmioSlot> PcBoard::TakeMmioSlot(const DeviceSpec& spec) {
  return Fail(ErrorCode::kUnsupported, "'" + spec.driver +
                                           "' is for virtio-mmio, which machine type '" +
                                           type_.name + "' has not; use the -pci variant");
}

void PcBoard::PowerButton() { pm_->PressPowerButton(); }

std::vector<E820Entry> PcBoard::E820() const {
  std::vector<E820Entry> map = {
      {0, kEbda, E820Entry::kRam},
      {kEbda, kVgaBegin - kEbda, E820Entry::kReserved},
      {kFirmwareTables, kMiB - kFirmwareTables, E820Entry::kReserved},
      {kMiB, low_ram_bytes_ - kMiB, E820Entry::kRam},
      {0xfeffc000, 0x4000, E820Entry::kReserved},  // KVM's identity map and task state segment
      {0xfffc0000, 0x40000, E820Entry::kReserved},
  };
  if (config_.ram_bytes > low_ram_bytes_)
    map.push_back({k4GiB, config_.ram_bytes - low_ram_bytes_, E820Entry::kRam});
  return map;
}

void PcBoard::PlayFirmware() {
  {
    LockGuard guard(host_bridge_->lock());
    host_bridge_->ShadowAll();
  }
  {
    LockGuard guard(isa_bridge_->lock());
    isa_bridge_->SetRoutes(kPirqAb, kPirqCd);
  }
  {
    LockGuard guard(pm_->lock());
    pm_->Enable(kPmBase, kSmbusBase);
  }
  // PCI lines are level-triggered.
  ViewCache ports(ports_);
  uint16_t levels = 1 << kPirqAb | 1 << kPirqCd | 1 << kSciLine;
  BusWrite(ports, PicPair::kElcr, 1, levels & 0xff);
  BusWrite(ports, PicPair::kElcr + 1, 1, levels >> 8);
  AssignBars();
}

// Largest first, each aligned to its size.
void PcBoard::AssignBars() {
  struct Wanted {
    uint8_t devfn;
    unsigned index;
    PciDevice::BarInfo info;
  };
  std::vector<Wanted> wanted;
  for (unsigned devfn = 0; devfn < 256; devfn++) {
    PciDevice* device = pci_->Find(devfn);
    if (!device) continue;
    for (unsigned i = 0; i < 6; i++) {
      if (device->bar_info(i).size_bytes)
        wanted.push_back({static_cast<uint8_t>(devfn), i, device->bar_info(i)});
    }
    uint32_t pin = pci_->ConfigRead(devfn, pci::kInterruptPin, 1);
    pci_->ConfigWrite(devfn, pci::kInterruptLine, 1, isa_bridge_->LineOf(devfn >> 3, pin));
  }
  std::stable_sort(wanted.begin(), wanted.end(), [](const Wanted& a, const Wanted& b) {
    return a.info.size_bytes > b.info.size_bytes;
  });
  uint64_t next_io = kBarIoBegin, next_memory = std::max<uint64_t>(pci_hole_begin_, 0xe0000000);
  for (const Wanted& bar : wanted) {
    bool io = bar.info.kind == PciBarKind::kIo;
    uint64_t& next = io ? next_io : next_memory;
    uint64_t base = (next + bar.info.size_bytes - 1) & ~(bar.info.size_bytes - 1);
    if (base + bar.info.size_bytes > (io ? 0x10000 : kPciHoleEnd))
      continue;  // left to the operating system
    next = base + bar.info.size_bytes;
    pci_->ConfigWrite(bar.devfn, pci::kBar0 + 4 * bar.index, 4, base);
    uint32_t command = pci_->ConfigRead(bar.devfn, pci::kCommand, 2);
    pci_->ConfigWrite(bar.devfn, pci::kCommand, 2,
                      command | (io ? pci::kCommandIo : pci::kCommandMemory));
  }
}

Result<> PcBoard::LoadBoot() {
  PlayFirmware();
  BootSpace space{memory_, low_ram_bytes_, E820(), 0, config_.boot.cmdline};
  CpuEntry entry = TRY(kernel_->Load(space));
  return EnterKernel(entry);
}

}  // namespace kvartz::machine
