#include "machine/acpi/microvm_acpi.h"

#include "device/core/acpi_reduced.h"

namespace kvartz::machine {

using namespace aml;

namespace {
Bytes Dsdt(const MicrovmAcpiConfig& config) {
  Terms system;
  if (config.serial) {
    system.push_back(Device(
        "COM1", {Name("_HID", EisaId("PNP0501")), Name("_UID", Integer(1)),
                 Name("_CRS", Resources({IoPorts(0x3f8, 8),
                                         Interrupts(Trigger::kEdge, Sharing::kExclusive, {4})}))}));
  }
  if (config.rtc) {
    system.push_back(Device(
        "RTC_", {Name("_HID", EisaId("PNP0B00")),
                 Name("_CRS", Resources({IoPorts(0x70, 2),
                                         Interrupts(Trigger::kEdge, Sharing::kExclusive, {8})}))}));
  }
  if (config.fw_cfg) {
    system.push_back(Device("FWCF", {Name("_HID", String("QEMU0002")), Name("_STA", Integer(0xb)),
                                     Name("_CRS", Resources({IoPorts(0x510, 12)}))}));
  }
  for (size_t i = 0; i < config.slots.size(); i++) {
    char name[] = {'V', 'R', static_cast<char>('0' + i / 10), static_cast<char>('0' + i % 10), 0};
    system.push_back(Device(
        name, {Name("_HID", String("LNRO0005")), Name("_UID", Integer(i)), Name("_CCA", Integer(1)),
               Name("_CRS", Resources({Memory32Fixed(config.slots[i].base, config.slot_size),
                                       Interrupts(Trigger::kLevel, Sharing::kExclusive,
                                                  {config.slots[i].gsi})}))}));
  }
  // The generic event device (5.6.9) has one event: the power button.
  system.push_back(Device("PWRB", {Name("_HID", EisaId("PNP0C0C")), Name("_UID", Integer(0))}));
  system.push_back(
      Device("GED_", {Name("_HID", String("ACPI0013")), Name("_UID", Integer(0)),
                      Name("_CRS", Resources({Interrupts(Trigger::kEdge, Sharing::kExclusive,
                                                         {config.power_button_gsi})})),
                      Method("_EVT", 1, Serialized::kYes, {Notify("\\_SB_.PWRB", 0x80)})}));
  system.push_back(ProcessorDevices(config.cpus));
  Bytes off = Integer(AcpiReduced::kSleepTypeOff);
  return Concat({Scope("\\_SB_", system),
                 Name("\\_S5_", Package({off, Integer(0), Integer(0), Integer(0)}))});
}
}  // namespace

AcpiTables BuildMicrovmAcpi(const MicrovmAcpiConfig& config) {
  AcpiTables tables;
  Fadt fadt;
  fadt.dsdt = tables.Add("DSDT", 2, Dsdt(config));
  fadt.flags = Fadt::kHwReduced | Fadt::kReset;
  fadt.boot_arch = Fadt::kNoVga | (config.rtc ? 0 : Fadt::kNoRtc);
  auto port = [&](uint16_t offset) {
    return Fadt::Register{1, 8, static_cast<uint64_t>(config.registers + offset)};
  };
  fadt.reset = port(AcpiReduced::kReset);
  fadt.reset_value = AcpiReduced::kResetValue;
  fadt.sleep_control = port(AcpiReduced::kControl);
  fadt.sleep_status = port(AcpiReduced::kStatus);
  std::vector<uint32_t> list = {AddFadt(tables, fadt)};
  list.push_back(tables.Add("APIC", 3, MadtBody(config.cpus, LegacyPics::kNo, {})));
  tables.Finish(list);
  return tables;
}

}  // namespace kvartz::machine
