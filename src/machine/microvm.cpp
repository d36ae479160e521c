#include "machine/microvm.h"

#include <fmt/core.h>

#include <algorithm>

#include "device/core/acpi_reduced.h"
#include "device/core/fw_cfg.h"
#include "device/irq/ioapic.h"
#include "device/irq/pic_8259.h"
#include "device/pci/pci_device.h"
#include "device/timer/pit_8254.h"
#include "device/timer/rtc.h"
#include "machine/acpi/microvm_acpi.h"
#include "machine/board_options.h"
#include "machine/irq_router.h"
#include "machine/wall_clock.h"

namespace kvartz::machine {

namespace {
constexpr uint64_t k4GiB = 1ull << 32, kMiB = 1 << 20;
constexpr unsigned kPowerButtonGsi = 9;
constexpr uint16_t kAcpiPorts = 0x600;
// Lines of virtio-mmio: beyond the ISA lines with ACPI, else where the 8259 pair has free ones.
constexpr unsigned kFirstGsi = 16, kFirstIsaLine = 5;
}  // namespace

MicrovmBoard::MicrovmBoard(const MachineConfig& config, const MachineType& type,
                           const BoardEnv& env)
    : Board(config, type, env) {}

MicrovmBoard::~MicrovmBoard() { DestroyDevices(); }

Result<> MicrovmBoard::TakeOptions() {
  BoardOptions options;
  constexpr PropertySpec kTable[] = {
      COMMON_BOARD_OPTIONS,
      PROPERTY(BoardOptions, "pic", pic, "8259 interrupt controllers"),
      PROPERTY(BoardOptions, "pit", pit, "8254 timer"),
      PROPERTY(BoardOptions, "rtc", rtc, "real-time clock"),
      PROPERTY(BoardOptions, "pcie", pcie, "a PCI bus"),
      PROPERTY(BoardOptions, "isa-serial", isa_serial, "serial ports"),
      PROPERTY(BoardOptions, "auto-kernel-cmdline", auto_kernel_cmdline,
               "without ACPI: tell the kernel of virtio-mmio devices on its command line"),
      PROPERTY(BoardOptions, "x-option-roms", option_roms, "option ROMs"),
  };
  TRY(ApplyProperties(kTable, MachineOptions(config_), "machine type '" + type_.name + "'",
                      &options));
  for (auto [on, name] : {std::pair(options.pcie == OnOffAuto::kOn, "pcie"),
                          std::pair(options.option_roms, "x-option-roms")}) {
    if (on)
      return Fail(ErrorCode::kUnsupported,
                  std::string("not supported yet: machine option ") + name + "=on; leave it out");
  }
  // The kernel's controllers take it milliseconds to make, which is most of this machine's start.
  std::string mode = options.kernel_irqchip;
  if (mode.empty() && env_.accel == "kvm") mode = "split";
  irqchip_ = TRY(ChooseIrqchip(mode, env_.accel));
  options_.acpi = options.acpi;
  // With ACPI a guest finds I/O APIC and local APICs there, and needs neither.
  options_.pic = options.pic == OnOffAuto::kAuto ? !options.acpi : options.pic == OnOffAuto::kOn;
  options_.pit = options.pit == OnOffAuto::kAuto ? !options.acpi : options.pit == OnOffAuto::kOn;
  options_.rtc = options.rtc != OnOffAuto::kOff;
  options_.isa_serial = options.isa_serial;
  options_.auto_kernel_cmdline = options.auto_kernel_cmdline;
  return {};
}

Result<> MicrovmBoard::MapRam() {
  if (config_.ram_bytes < 2 * kMiB) {
    return Fail(ErrorCode::kInvalid, "machine type '" + type_.name +
                                         "' needs at least 2 MiB of memory; give it more with -m");
  }
  uint64_t limit = config_.ram_bytes < 0xe0000000 ? 0xe0000000 : 0xc0000000;
  return MapPcRam(limit, limit, limit);
}

Result<> MicrovmBoard::WireDevices() {
  if (config_.boot.kernel.empty() || !config_.boot.firmware.empty()) {
    return Fail(ErrorCode::kUnsupported,
                "machine type '" + type_.name +
                    "' starts a kernel without firmware: give -kernel, leave out -bios");
  }
  kernel_ = TRY(Kernel::OpenPath(config_.boot.kernel));
  if (!config_.boot.initrd.empty()) TRY(kernel_->OpenInitrd(config_.boot.initrd));
  if (options_.isa_serial) isa_irqs_ = router_.get();
  if (irqchip_ == cpu::IrqchipMode::kUser) {
    ioapic_ = &Own(std::make_unique<IoApic>(MakeEnv("ioapic")));
    MapMmio(*ioapic_, IoApic::kBase, IoApic::kSize);
    if (options_.pic) {
      pic_output_ = std::make_unique<PicOutput>(*accel_);
      pic_ = &Own(std::make_unique<PicPair>(MakeEnv("pic"), IrqLine(*pic_output_, 0)));
      MapPorts(*pic_, PicPair::kMaster, 2, PicPair::kMaster);
      MapPorts(*pic_, PicPair::kSlave, 2, PicPair::kSlave);
      MapPorts(*pic_, PicPair::kElcr, 2, PicPair::kElcr);
    }
    if (options_.pit) {
      Pit8254& pit = Own(std::make_unique<Pit8254>(MakeEnv("pit"), IrqLine(*router_, 0)));
      MapPorts(pit, Pit8254::kBase, 4, Pit8254::kBase);
      MapPorts(pit, Pit8254::kSpeaker, 1, Pit8254::kSpeaker);
    }
  }
  router_->Connect(pic_, ioapic_);
  if (options_.rtc) {
    Rtc& rtc = Own(std::make_unique<Rtc>(MakeEnv("rtc"), IrqLine(*router_, 8),
                                         WallClock::Instance(), RtcOffset(config_.rtc)));
    MapPorts(rtc, Rtc::kBase, 2);
  }
  AcpiReduced& acpi = Own(std::make_unique<AcpiReduced>(MakeEnv("acpi")));
  MapPorts(acpi, kAcpiPorts, AcpiReduced::kSize);
  if (!config_.fw_cfg_files.empty()) {
    FwCfg& fw_cfg = Own(std::make_unique<FwCfg>(MakeEnv("fw_cfg")));
    MapPorts(fw_cfg, FwCfg::kBase, 12, 0, 8);
    TRY(AddUserFiles(config_, fw_cfg));
  }
  return {};
}

Result<> MicrovmBoard::AttachPci(PciDevice& device, const Properties&) {
  return Fail(ErrorCode::kUnsupported,
              "device '" + device.id() + "' is for PCI, which machine type '" + type_.name +
                  "' has not; use the -device variant (virtio-blk-device...)");
}

Result<Board::MmioSlot> MicrovmBoard::TakeMmioSlot(const DeviceSpec& spec) {
  for (const char* of_pci : {"addr", "multifunction"}) {
    if (!spec.properties.Find(of_pci)) continue;
    return Fail(ErrorCode::kInvalid,
                "device '" + spec.driver + "': " + of_pci + "= is for PCI devices");
  }
  if (slots_.size() == kMmioSlots) {
    return Fail(ErrorCode::kNoSpace,
                "no virtio-mmio slot is free for '" + spec.driver + "': there are 8");
  }
  unsigned index = slots_.size();
  unsigned line = (options_.acpi ? kFirstGsi : kFirstIsaLine) + index;
  slots_.push_back({kMmioBase + index * kMmioStride, IrqLine(*router_, line)});
  return slots_.back();
}

void MicrovmBoard::PowerButton() { IrqLine(*router_, kPowerButtonGsi).Pulse(); }

std::string MicrovmBoard::CommandLine() const {
  std::string line = config_.boot.cmdline;
  if (options_.acpi || !options_.auto_kernel_cmdline) return line;
  for (const MmioSlot& slot : slots_) {
    line += fmt::format("{}virtio_mmio.device={}@{:#x}:{}", line.empty() ? "" : " ", kMmioStride,
                        slot.base, slot.irq.number());
  }
  return line;
}

Result<> MicrovmBoard::LoadBoot() {
  uint64_t rsdp = 0;
  if (options_.acpi) {
    MicrovmAcpiConfig acpi;
    acpi.cpus.apic_ids = ApicIds();
    for (const MmioSlot& slot : slots_) acpi.slots.push_back({slot.base, slot.irq.number()});
    acpi.slot_size = kMmioStride;
    acpi.registers = kAcpiPorts;
    acpi.power_button_gsi = kPowerButtonGsi;
    acpi.rtc = options_.rtc;
    acpi.fw_cfg = !config_.fw_cfg_files.empty();
    acpi.serial = ViewCache(ports_).Get().Find(0x3f8) != nullptr;
    rsdp = TRY(PlaceTables(BuildMicrovmAcpi(acpi)));
  }
  BootSpace space{memory_, low_ram_bytes_, {}, rsdp, CommandLine()};
  space.e820 = {
      {0, BootSpace::kLowEnd, E820Entry::kRam},
      {kFirmwareTables, kMiB - kFirmwareTables, E820Entry::kReserved},
      {kMiB, low_ram_bytes_ - kMiB, E820Entry::kRam},
      {0xfeffc000, 0x4000, E820Entry::kReserved},  // KVM's identity map and task state segment
  };
  if (config_.ram_bytes > low_ram_bytes_)
    space.e820.push_back({k4GiB, config_.ram_bytes - low_ram_bytes_, E820Entry::kRam});
  return EnterKernel(TRY(kernel_->Load(space)));
}

}  // namespace kvartz::machine
