#include "machine/pc.h"

#include <fmt/core.h>

#include <algorithm>

#include "base/endian.h"
#include "device/char/i8042.h"
#include "device/core/fw_cfg.h"
#include "device/core/properties.h"
#include "device/irq/ioapic.h"
#include "device/irq/pic_8259.h"
#include "device/pci/i440fx.h"
#include "device/pci/pci_config.h"
#include "device/pci/piix3.h"
#include "device/pci/piix4_pm.h"
#include "device/timer/hpet.h"
#include "device/timer/pit_8254.h"
#include "device/timer/rtc.h"
#include "machine/acpi/pc_acpi.h"
#include "machine/board_options.h"
#include "machine/irq_router.h"
#include "machine/smbios.h"
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

Result<> PcBoard::OpenFirmware() {
  BootFile file = TRY(FindFirmware(config_.boot, "bios-256k.bin"));
  constexpr uint64_t kUnit = 64 << 10, kMost = 16 * kMiB;
  if (file.size() % kUnit || file.size() > kMost) {
    return file.Bad(
        "is no firmware for a PC: its size must be a multiple of 64 KiB, up to 16 MiB, and is " +
        std::to_string(file.size()));
  }
  bios_ = TRY(RamBlock::Create("bios", file.size()));
  TRY(file.Read(0, bios_->host(), file.size()));
  Region region;
  region.name = "bios";
  region.kind = RegionKind::kRom;
  region.base = k4GiB - file.size();
  region.size = file.size();
  region.ram = bios_;
  memory_.Add(std::move(region));
  return {};
}

void PcBoard::WireInterrupts() {
  isa_irqs_ = router_.get();
  Pit8254* pit = nullptr;
  if (irqchip_ == cpu::IrqchipMode::kUser) {
    pic_output_ = std::make_unique<PicOutput>(*accel_);
    pic_ = &Own(std::make_unique<PicPair>(MakeEnv("pic"), IrqLine(*pic_output_, 0)));
    MapPorts(*pic_, PicPair::kMaster, 2, PicPair::kMaster);
    MapPorts(*pic_, PicPair::kSlave, 2, PicPair::kSlave);
    MapPorts(*pic_, PicPair::kElcr, 2, PicPair::kElcr);
    ioapic_ = &Own(std::make_unique<IoApic>(MakeEnv("ioapic")));
    MapMmio(*ioapic_, IoApic::kBase, IoApic::kSize);
    pit = &Own(std::make_unique<Pit8254>(MakeEnv("pit"), IrqLine(*router_, 0)));
    MapPorts(*pit, Pit8254::kBase, 4, Pit8254::kBase);
    MapPorts(*pit, Pit8254::kSpeaker, 1, Pit8254::kSpeaker);
  }
  router_->Connect(pic_, ioapic_);
  rtc_ = &Own(std::make_unique<Rtc>(MakeEnv("rtc"), IrqLine(*router_, 8), WallClock::Instance(),
                                    RtcOffset(config_.rtc)));
  MapPorts(*rtc_, Rtc::kBase, 2);
  FillCmos();
  if (options_.hpet) {
    // PCI doesn't use the pins beyond the ISA lines. The kernel's PIT can't be replaced.
    Hpet::Wiring wiring{router_.get(), 0xff0000, {}};
    if (pit) wiring.replaced = [pit](bool legacy) { pit->SetIrqConnected(!legacy); };
    hpet_ = &Own(std::make_unique<Hpet>(MakeEnv("hpet"), std::move(wiring)));
    MapMmio(*hpet_, Hpet::kBase, Hpet::kSize);
  }
}

Result<> PcBoard::WirePci() {
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

Result<> PcBoard::WireDevices() {
  if (config_.boot.kernel.empty()) {
    if (!config_.boot.initrd.empty() || !config_.boot.cmdline.empty()) {
      return Fail(ErrorCode::kInvalid,
                  "-initrd and -append go with a kernel; give one with -kernel");
    }
    TRY(OpenFirmware());
  } else {
    if (!config_.boot.firmware.empty()) {
      return Fail(ErrorCode::kUnsupported,
                  "not supported yet: -kernel together with -bios; a kernel needs no firmware "
                  "here, leave out -bios");
    }
    kernel_ = TRY(Kernel::OpenPath(config_.boot.kernel));
    if (!config_.boot.initrd.empty()) TRY(kernel_->OpenInitrd(config_.boot.initrd));
  }
  WireInterrupts();
  I8042& i8042 = Own(std::make_unique<I8042>(MakeEnv("i8042")));
  MapPorts(i8042, I8042::kData, 1, I8042::kData);
  MapPorts(i8042, I8042::kCommand, 1, I8042::kCommand);
  MapPorts(i8042, I8042::kPort92, 1, I8042::kPort92);
  TRY(WirePci());
  fw_cfg_ = &Own(std::make_unique<FwCfg>(MakeEnv("fw_cfg")));
  MapPorts(*fw_cfg_, FwCfg::kBase, 12, 0, 8);
  return AddUserFiles(config_, *fw_cfg_);
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
  int wanted = TRY(ParsePciAddress(device.id(), properties));
  std::optional<uint32_t> boot_index = TRY(ParseBootIndex(device.id(), properties));
  if (TRY(ParseMultifunction(device.id(), properties))) device.SetMultifunction();
  uint8_t devfn = TRY(pci_->Plug(device, wanted));
  if (boot_index) boot_devices_.push_back({*boot_index, devfn});
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
  std::sort(wanted.begin(), wanted.end(), [](const Wanted& a, const Wanted& b) {
    if (a.info.size_bytes != b.info.size_bytes) return a.info.size_bytes > b.info.size_bytes;
    return std::pair(a.devfn, a.index) < std::pair(b.devfn, b.index);
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

// Bit n: COM(n+1) is there.
unsigned PcBoard::SerialPorts() const {
  constexpr uint16_t kPorts[] = {0x3f8, 0x2f8, 0x3e8, 0x2e8};
  unsigned found = 0;
  ViewCache ports(ports_);
  for (unsigned i = 0; i < 4; i++) found |= (ports.Get().Find(kPorts[i]) ? 1u : 0) << i;
  return found;
}

// \_SB.PCI0's window for 64-bit BARs lies behind RAM, as far as the processor reaches and no
// further than needed.
AcpiTables PcBoard::Acpi() const {
  PcAcpiConfig acpi;
  acpi.cpus.apic_ids = ApicIds();
  acpi.pci_hole_begin = pci_hole_begin_;
  constexpr uint64_t kGiB = 1ull << 30, kWindow = 512 * kGiB;
  uint64_t ram_end = k4GiB + config_.ram_bytes - low_ram_bytes_;
  acpi.pci_window64_begin = (ram_end + kGiB - 1) / kGiB * kGiB;
  acpi.pci_window64_end = std::max(acpi.pci_window64_begin,
                                   std::min(acpi.pci_window64_begin + kWindow, PhysicalLimit()));
  acpi.pm_base = kPmBase;
  acpi.sci = kSciLine;
  acpi.hpet = hpet_ != nullptr;
  acpi.fw_cfg = fw_cfg_ != nullptr;
  acpi.serial_ports = SerialPorts();
  return BuildPcAcpi(acpi);
}

// Open Firmware paths of the functions with a bootindex, one a line; SeaBIOS looks at their class
// names no closer than this.
std::vector<uint8_t> PcBoard::BootOrder() const {
  std::string text;
  std::vector<BootDevice> sorted = boot_devices_;
  std::sort(sorted.begin(), sorted.end());
  for (const BootDevice& device : sorted) {
    uint32_t base_class = pci_->ConfigRead(device.devfn, pci::kClass + 2, 1);
    unsigned function = device.devfn & 7;
    std::string at =
        fmt::format("{:x}", device.devfn >> 3) + (function ? fmt::format(",{:x}", function) : "");
    text += "/pci@i0cf8/";
    switch (base_class) {
      case 1:
        text += "scsi@" + at + "/disk@0,0";
        break;
      case 2:
        text += "ethernet@" + at + "/ethernet-phy@0";
        break;
      default:
        text += "pci@" + at;
    }
    text += "\n";
  }
  if (text.empty()) return {};
  return std::vector<uint8_t>(text.c_str(), text.c_str() + text.size() + 1);
}

void PcBoard::FillFwCfg() {
  FwCfg& fw = *fw_cfg_;
  if (config_.uuid)
    fw.SetItem(FwCfg::kUuid, std::vector<uint8_t>(config_.uuid->begin(), config_.uuid->end()));
  fw.SetInteger(FwCfg::kRamSize, config_.ram_bytes, 8);
  // Without a display, SeaBIOS's messages and int 10h text go to the first serial port.
  fw.SetInteger(FwCfg::kNoGraphic, SerialPorts() & 1, 2);
  fw.SetInteger(FwCfg::kCpuCount, config_.cpu_count, 2);
  fw.SetInteger(FwCfg::kMaxCpus, config_.cpu_count, 2);
  fw.SetInteger(FwCfg::kBootMenu, config_.boot.menu.value_or(false), 2);
  fw.SetItem(FwCfg::kNuma, std::vector<uint8_t>(8 * (1 + config_.cpu_count)));
  fw.SetInteger(FwCfg::kIrq0Override, 1, 4);
  // S5 by its type, S3 and S4 not offered.
  fw.SetFile("etc/system-states", {0x80, 0, 0, 1, 2, 0x80});
  std::vector<uint8_t> e820;
  auto add = [&](uint64_t base, uint64_t size, uint32_t type) {
    struct {
      Le64 base, size;
      Le32 type;
    } entry{base, size, type};
    const auto* bytes = reinterpret_cast<const uint8_t*>(&entry);
    e820.insert(e820.end(), bytes, bytes + sizeof entry);
  };
  add(0, low_ram_bytes_, E820Entry::kRam);
  if (config_.ram_bytes > low_ram_bytes_)
    add(k4GiB, config_.ram_bytes - low_ram_bytes_, E820Entry::kRam);
  add(0xfeffc000, 0x4000, E820Entry::kReserved);
  fw.SetFile("etc/e820", std::move(e820));
  if (options_.acpi) {
    AcpiTables acpi = Acpi();
    fw.SetFile("etc/acpi/tables", acpi.tables());
    fw.SetFile("etc/acpi/rsdp", acpi.rsdp());
    fw.SetFile("etc/table-loader", acpi.LoaderScript());
  }
  SmbiosTables smbios = Smbios();
  fw.SetFile("etc/smbios/smbios-anchor", smbios.anchor);
  fw.SetFile("etc/smbios/smbios-tables", smbios.tables);
  if (std::vector<uint8_t> order = BootOrder(); !order.empty())
    fw.SetFile("bootorder", std::move(order));
  if (config_.boot.splash_time_ms) {
    fw.SetFile("etc/boot-menu-wait", {static_cast<uint8_t>(*config_.boot.splash_time_ms),
                                      static_cast<uint8_t>(*config_.boot.splash_time_ms >> 8)});
  }
}

Result<> PcBoard::LoadBoot() {
  {
    LockGuard guard(fw_cfg_->lock());
    FillFwCfg();
  }
  if (!kernel_) return {};  // the processor begins in the firmware
  PlayFirmware();
  uint64_t rsdp = 0;
  if (options_.acpi) rsdp = TRY(PlaceTables(Acpi()));
  BootSpace space{memory_, low_ram_bytes_, E820(), rsdp, config_.boot.cmdline};
  CpuEntry entry = TRY(kernel_->Load(space));
  return EnterKernel(entry);
}

}  // namespace kvartz::machine
