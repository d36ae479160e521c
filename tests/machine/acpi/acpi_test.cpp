// The tables as iasl reads them; structure by ACPI 6.4, ch. 5.2.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "machine/acpi/microvm_acpi.h"
#include "machine/acpi/pc_acpi.h"

namespace kvartz::machine {
namespace {

constexpr uint64_t kBase = 0xe0000;

struct Placed {
  explicit Placed(const AcpiTables& tables) : bytes(tables.PlaceAt(kBase)) {}
  uint64_t Le(uint64_t address, unsigned size) const {
    uint64_t value = 0;
    for (unsigned i = 0; i < size; i++) value |= uint64_t{bytes.at(address - kBase + i)} << (8 * i);
    return value;
  }
  std::string Text(uint64_t address, size_t size) const {
    return std::string(reinterpret_cast<const char*>(&bytes.at(address - kBase)), size);
  }
  uint8_t Sum(uint64_t address, size_t size) const {
    uint8_t sum = 0;
    for (size_t i = 0; i < size; i++) sum += bytes.at(address - kBase + i);
    return sum;
  }
  // By the XSDT.
  uint64_t Find(const std::string& signature) const {
    uint64_t xsdt = Le(kBase + 24, 8);
    for (uint64_t at = 36; at < Le(xsdt + 4, 4); at += 8) {
      if (Text(Le(xsdt + at, 8), 4) == signature) return Le(xsdt + at, 8);
    }
    return signature == "DSDT" ? Le(Find("FACP") + 140, 8) : 0;
  }
  std::vector<uint8_t> bytes;
};

PcAcpiConfig PcConfig() {
  PcAcpiConfig config;
  config.cpus.apic_ids = {0, 1, 2};
  config.pci_hole_begin = 0x80000000;
  config.pci_window64_begin = 0x200000000;
  config.pci_window64_end = 0x300000000;
  config.pm_base = 0x600;
  config.fw_cfg = true;
  config.serial_ports = 1;
  return config;
}

MicrovmAcpiConfig MicrovmConfig() {
  MicrovmAcpiConfig config;
  config.cpus.apic_ids = {0, 1};
  config.slots = {{0xfeb00000, 16}, {0xfeb00200, 17}};
  config.registers = 0x600;
  config.power_button_gsi = 9;
  config.serial = config.rtc = true;
  return config;
}

void CheckRsdpAndSums(const Placed& placed) {
  EXPECT_EQ(placed.Text(kBase, 8), "RSD PTR ");
  EXPECT_EQ(placed.Sum(kBase, 20), 0);
  EXPECT_EQ(placed.Sum(kBase, 36), 0);
  uint64_t rsdt = placed.Le(kBase + 16, 4), xsdt = placed.Le(kBase + 24, 8);
  EXPECT_EQ(placed.Text(rsdt, 4), "RSDT");
  ASSERT_EQ(placed.Text(xsdt, 4), "XSDT");
  for (uint64_t table :
       {rsdt, xsdt, placed.Find("FACP"), placed.Find("APIC"), placed.Find("DSDT")}) {
    ASSERT_NE(table, 0u);
    EXPECT_EQ(placed.Sum(table, placed.Le(table + 4, 4)), 0) << placed.Text(table, 4);
  }
}

// Disassembles a table, compiles what comes out, and returns the text. Empty: iasl isn't there.
std::string Disassemble(const Placed& placed, const std::string& signature) {
  if (std::system("command -v iasl > /dev/null 2>&1") != 0) return "";
  char directory[] = "/tmp/kvartz-acpi-XXXXXX";
  if (!mkdtemp(directory)) return "";
  std::string stem = std::string(directory) + "/t";
  uint64_t table = placed.Find(signature);
  std::ofstream(stem + ".dat", std::ios::binary) << placed.Text(table, placed.Le(table + 4, 4));
  std::string commands =
      "cd " + std::string(directory) + " && iasl -d t.dat > log 2>&1 && iasl -oa t.dsl >> log 2>&1";
  int result = std::system(commands.c_str());
  std::stringstream text, log;
  text << std::ifstream(stem + ".dsl").rdbuf();
  log << std::ifstream(std::string(directory) + "/log").rdbuf();
  EXPECT_EQ(result, 0) << log.str();
  EXPECT_NE(log.str().find(" 0 Errors"), std::string::npos) << log.str();
  std::filesystem::remove_all(directory);
  return text.str();
}

TEST(PcAcpi, StructureIsWhole) {
  Placed placed(BuildPcAcpi(PcConfig()));
  CheckRsdpAndSums(placed);
  uint64_t fadt = placed.Find("FACP");
  EXPECT_EQ(placed.Le(fadt + 40, 4), placed.Le(fadt + 140, 8));
  EXPECT_EQ(placed.Text(placed.Le(fadt + 36, 4), 4), "FACS");
  EXPECT_EQ(placed.Le(fadt + 36, 4) % 64, 0u);
  EXPECT_EQ(placed.Le(fadt + 46, 2), 9u);
  EXPECT_EQ(placed.Le(fadt + 56, 4), 0x600u);
  EXPECT_EQ(placed.Le(fadt + 64, 4), 0x604u);
  EXPECT_EQ(placed.Le(fadt + 76, 4), 0x608u);
}

TEST(PcAcpi, DsdtDisassembles) {
  std::string text = Disassemble(Placed(BuildPcAcpi(PcConfig())), "DSDT");
  if (text.empty()) GTEST_SKIP() << "iasl is not installed";
  for (const char* part : {"Name (_HID, EisaId (\"PNP0A03\")", "Device (LNKA)", "Device (LNKD)",
                           "Name (\\_S5, Package", "OperationRegion (PIRQ, PCI_Config, 0x60, 0x04)",
                           "Device (COM1)", "Device (HPET)", "Device (C002)", "QEMU0002"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
  EXPECT_NE(text.find("0xFEBFFFFF"), std::string::npos);
  EXPECT_NE(text.find("0x00000002FFFFFFFF"), std::string::npos);
}

TEST(PcAcpi, OtherTablesDisassemble) {
  Placed placed(BuildPcAcpi(PcConfig()));
  std::string madt = Disassemble(placed, "APIC");
  if (madt.empty()) GTEST_SKIP() << "iasl is not installed";
  EXPECT_NE(madt.find("Local Apic ID : 02"), std::string::npos) << madt;
  EXPECT_NE(madt.find("Address : FEC00000"), std::string::npos);
  std::string fadt = Disassemble(placed, "FACP");
  EXPECT_NE(fadt.find("Reset Register Supported (V2) : 1"), std::string::npos) << fadt;
  EXPECT_NE(Disassemble(placed, "HPET").find("00000000FED00000"), std::string::npos);
}

TEST(MicrovmAcpi, TablesDisassemble) {
  Placed placed(BuildMicrovmAcpi(MicrovmConfig()));
  CheckRsdpAndSums(placed);
  std::string text = Disassemble(placed, "DSDT");
  if (text.empty()) GTEST_SKIP() << "iasl is not installed";
  for (const char* part : {"LNRO0005", "ACPI0013", "Method (_EVT, 1, Serialized)",
                           "Notify (\\_SB.PWRB, 0x80)", "Device (COM1)"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
  std::string fadt = Disassemble(placed, "FACP");
  EXPECT_NE(fadt.find("Hardware Reduced (V5) : 1"), std::string::npos) << fadt;
}

// What SeaBIOS and OVMF do with the script gives what the board itself places.
TEST(PcAcpi, LoaderScriptBuildsTheSame) {
  AcpiTables tables = BuildPcAcpi(PcConfig());
  std::vector<uint8_t> script = tables.LoaderScript();
  ASSERT_EQ(script.size() % 128, 0u);
  std::vector<uint8_t> files[2] = {tables.rsdp(), tables.tables()};
  uint64_t addresses[2] = {kBase, kBase + 64};
  auto index = [](const uint8_t* name) {
    return std::strcmp(reinterpret_cast<const char*>(name), "etc/acpi/rsdp") ? 1 : 0;
  };
  auto le32 = [](const uint8_t* p) { return p[0] | p[1] << 8 | p[2] << 16 | uint32_t{p[3]} << 24; };
  for (size_t at = 0; at < script.size(); at += 128) {
    const uint8_t* c = &script[at];
    uint32_t command = le32(c);
    std::vector<uint8_t>& file = files[index(c + 4)];
    if (command == 2) {
      uint32_t offset = le32(c + 116);
      uint64_t value = 0;
      for (unsigned i = 0; i < c[120]; i++) value |= uint64_t{file[offset + i]} << (8 * i);
      value += addresses[index(c + 60)];
      for (unsigned i = 0; i < c[120]; i++) file[offset + i] = value >> (8 * i);
    } else if (command == 3) {
      uint32_t offset = le32(c + 60), start = le32(c + 64), length = le32(c + 68);
      uint8_t sum = 0;
      for (uint32_t i = 0; i < length; i++) sum += file[start + i];
      file[offset] -= sum;
    } else {
      EXPECT_EQ(command, 1u);
    }
  }
  std::vector<uint8_t> whole = files[0];
  whole.resize(64);
  whole.insert(whole.end(), files[1].begin(), files[1].end());
  EXPECT_EQ(whole, tables.PlaceAt(kBase));
}

}  // namespace
}  // namespace kvartz::machine
