#include "machine/acpi/pc_acpi.h"

#include <string>

#include "device/core/acpi_pm.h"

namespace kvartz::machine {

using namespace aml;

namespace {
constexpr uint64_t kPciHoleEnd = 0xfec00000, kHpet = 0xfed00000;
constexpr char kPirqNames[4][5] = {"PRQA", "PRQB", "PRQC", "PRQD"};
constexpr char kLinkNames[4][5] = {"LNKA", "LNKB", "LNKC", "LNKD"};
constexpr unsigned kPirqOff = 0x80;

// One of the four links between a PCI interrupt line and an ISA line (6.2.13); its state is a PIRQ
// register of the PIIX3.
Bytes LinkDevice(unsigned index) {
  Bytes pirq = Path(std::string("\\_SB_.PCI0.ISA_.") + kPirqNames[index]);
  Bytes off = And(pirq, Integer(kPirqOff));
  // Five bytes of the descriptor come before the interrupt's number.
  constexpr unsigned kNumberOffset = 5;
  return Device(
      kLinkNames[index],
      {Name("_HID", EisaId("PNP0C0F")), Name("_UID", Integer(index + 1)),
       Name("_PRS", Resources({Interrupts(Trigger::kLevel, Sharing::kShared, {5, 10, 11})})),
       Name("BUF0", Resources({Interrupts(Trigger::kLevel, Sharing::kShared, {0})})),
       Method("_STA", 0, Serialized::kNo, {If(off, {Return(Integer(0x9))}), Return(Integer(0xb))}),
       Method("_DIS", 0, Serialized::kNo, {Or(pirq, Integer(kPirqOff), pirq)}),
       Method(
           "_CRS", 0, Serialized::kYes,
           {CreateDwordField(Path("BUF0"), kNumberOffset, "IRQ0"), Store(Integer(0), Path("IRQ0")),
            If(Equal(off, Integer(0)), {Store(And(pirq, Integer(0xf)), Path("IRQ0"))}),
            Return(Path("BUF0"))}),
       Method("_SRS", 1, Serialized::kYes,
              {CreateDwordField(Arg(0), kNumberOffset, "IRQ1"), Store(Path("IRQ1"), pirq)})});
}

// Pin p of slot s pulls PIRQ (p + s - 1) mod 4; the power management function pulls the SCI.
Bytes RoutingTable(uint8_t sci) {
  Terms entries;
  for (unsigned slot = 0; slot < 32; slot++) {
    for (unsigned pin = 0; pin < 4; pin++) {
      uint64_t address = uint64_t{slot} << 16 | 0xffff;
      if (slot == 1 && pin == 0) {
        entries.push_back(Package({Integer(address), Integer(pin), Integer(0), Integer(sci)}));
      } else {
        entries.push_back(Package(
            {Integer(address), Integer(pin), Path(kLinkNames[(slot + pin + 3) & 3]), Integer(0)}));
      }
    }
  }
  return Package(entries);
}

Bytes PciWindows(const PcAcpiConfig& config) {
  Terms windows = {BusNumbers(0, 0xff),
                   IoPorts(0xcf8, 8),
                   IoWindow(0x0000, 0x0cf7),
                   IoWindow(0x0d00, 0xffff),
                   MemoryWindow32(0xa0000, 0xbffff, Cacheable::kYes),
                   MemoryWindow32(config.pci_hole_begin, kPciHoleEnd - 1, Cacheable::kNo)};
  if (config.pci_window64_end > config.pci_window64_begin) {
    windows.push_back(
        MemoryWindow64(config.pci_window64_begin, config.pci_window64_end - 1, Cacheable::kYes));
  }
  return Resources(windows);
}

Bytes SerialPort(unsigned index) {
  constexpr uint16_t kBase[] = {0x3f8, 0x2f8, 0x3e8, 0x2e8};
  constexpr uint8_t kIrq[] = {4, 3, 4, 3};
  char name[] = {'C', 'O', 'M', static_cast<char>('1' + index), 0};
  return Device(name,
                {Name("_HID", EisaId("PNP0501")), Name("_UID", Integer(index + 1)),
                 Name("_CRS", Resources({IoPorts(kBase[index], 8), IrqNoFlags(kIrq[index])}))});
}

Bytes IsaBridge(const PcAcpiConfig& config) {
  Terms body = {
      Name("_ADR", Integer(0x00010000)), OperationRegion("PIRQ", RegionSpace::kPciConfig, 0x60, 4),
      Field("PIRQ", FieldAccess::kByte, {{"PRQA", 8}, {"PRQB", 8}, {"PRQC", 8}, {"PRQD", 8}}),
      Device("RTC_", {Name("_HID", EisaId("PNP0B00")),
                      Name("_CRS", Resources({IoPorts(0x70, 2), IrqNoFlags(8)}))})};
  for (unsigned i = 0; i < 4; i++) {
    if (config.serial_ports >> i & 1) body.push_back(SerialPort(i));
  }
  return Device("ISA_", body);
}

Bytes Dsdt(const PcAcpiConfig& config) {
  Terms system = {Device(
      "PCI0", {Name("_HID", EisaId("PNP0A03")), Name("_ADR", Integer(0)), Name("_UID", Integer(0)),
               Name("_BBN", Integer(0)), Name("_CRS", PciWindows(config)),
               Name("_PRT", RoutingTable(config.sci)), IsaBridge(config)})};
  for (unsigned i = 0; i < 4; i++) system.push_back(LinkDevice(i));
  if (config.hpet) {
    system.push_back(Device("HPET", {Name("_HID", EisaId("PNP0103")), Name("_UID", Integer(0)),
                                     Name("_CRS", Resources({Memory32Fixed(kHpet, 0x400)}))}));
  }
  if (config.fw_cfg) {
    system.push_back(Device("FWCF", {Name("_HID", String("QEMU0002")), Name("_STA", Integer(0xb)),
                                     Name("_CRS", Resources({IoPorts(0x510, 12)}))}));
  }
  system.push_back(ProcessorDevices(config.cpus));
  Bytes zero = Integer(AcpiPm::kSleepTypeOff);
  return Concat(
      {Scope("\\_SB_", system), Name("\\_S5_", Package({zero, zero, Integer(0), Integer(0)}))});
}
}  // namespace

AcpiTables BuildPcAcpi(const PcAcpiConfig& config) {
  AcpiTables tables;
  Fadt fadt;
  fadt.facs = tables.AddFacs();
  fadt.dsdt = tables.Add("DSDT", 2, Dsdt(config));
  fadt.sci = config.sci;
  fadt.pm1_event = config.pm_base + AcpiPm::kPm1Status;
  fadt.pm1_control = config.pm_base + AcpiPm::kPm1Control;
  fadt.pm_timer = config.pm_base + AcpiPm::kTimer;
  fadt.gpe0 = config.pm_base + AcpiPm::kGpeStatus;
  fadt.gpe0_length = 4;
  fadt.century = 0x32;
  fadt.boot_arch = Fadt::kLegacyDevices | Fadt::kNoVga;
  fadt.flags = Fadt::kWbinvd | Fadt::kC1 | Fadt::kSleepButtonIsDevice | Fadt::kRtcNotFixed |
               Fadt::kReset | (config.hpet ? Fadt::kPlatformClock : 0);
  fadt.reset = {1, 8, 0xcf9};
  fadt.reset_value = 6;
  std::vector<uint32_t> list = {AddFadt(tables, fadt)};
  list.push_back(
      tables.Add("APIC", 3, MadtBody(config.cpus, LegacyPics::kYes, {5, config.sci, 10, 11})));
  if (config.hpet) list.push_back(tables.Add("HPET", 1, HpetBody(kHpet)));
  // Windows' emulated devices table: RTC and PM timer need no workarounds.
  list.push_back(tables.Add("WAET", 1, {3, 0, 0, 0}));
  tables.Finish(list);
  return tables;
}

}  // namespace kvartz::machine
