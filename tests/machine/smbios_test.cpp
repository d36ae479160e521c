// Structure by DSP0134 3.0.
#include "machine/smbios.h"

#include <gtest/gtest.h>

#include <cstring>
#include <map>

namespace kvartz::machine {
namespace {

struct Parsed {
  explicit Parsed(const std::vector<uint8_t>& tables) {
    size_t at = 0;
    while (at + 4 <= tables.size()) {
      uint8_t type = tables[at], length = tables[at + 1];
      size_t text = at + length;
      std::vector<std::string> strings;
      if (tables.at(text) == 0) {
        text++;
      } else {
        while (tables.at(text)) {
          strings.emplace_back(reinterpret_cast<const char*>(&tables[text]));
          text += strings.back().size() + 1;
        }
      }
      order.push_back(type);
      areas[type].assign(tables.begin() + at, tables.begin() + at + length);
      texts[type] = strings;
      at = text + 1;
      end = at;
    }
  }
  std::vector<int> order;
  std::map<int, std::vector<uint8_t>> areas;
  std::map<int, std::vector<std::string>> texts;
  size_t end = 0;
};

TEST(Smbios, StructuresAndSums) {
  SmbiosConfig texts;
  texts.serial = "S123";
  texts.oem_strings = {"one", "two"};
  SmbiosInput input;
  input.texts = &texts;
  input.machine_name = "pc-test";
  for (int i = 0; i < 16; i++) input.uuid[i] = i;
  input.sockets = 2;
  input.cores_per_socket = 4;
  input.threads_per_socket = 8;
  input.ram = {{0, 3ull << 30}, {4ull << 30, 30ull << 30}};
  SmbiosTables built = BuildSmbios(input);
  Parsed parsed(built.tables);
  EXPECT_EQ(parsed.end, built.tables.size());
  EXPECT_EQ(parsed.order, (std::vector<int>{0, 1, 3, 4, 4, 11, 16, 17, 17, 17, 19, 19, 32, 127}));
  const std::vector<uint8_t>& system = parsed.areas[1];
  ASSERT_EQ(system.size(), 0x1bu);
  EXPECT_EQ((std::vector<uint8_t>(system.begin() + 8, system.begin() + 24)),
            (std::vector<uint8_t>{3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15}));
  EXPECT_EQ(parsed.texts[1][system[7] - 1], "S123");
  EXPECT_EQ(parsed.texts[11], (std::vector<std::string>{"one", "two"}));
  EXPECT_EQ(parsed.areas[0].size(), 0x18u);
  EXPECT_EQ(parsed.areas[3].size(), 0x16u);
  EXPECT_EQ(parsed.areas[4].size(), 0x30u);
  EXPECT_EQ(parsed.areas[4][0x23], 4);
  EXPECT_EQ(parsed.areas[4][0x25], 8);
  EXPECT_EQ(parsed.areas[16].size(), 0x17u);
  EXPECT_EQ(parsed.areas[17].size(), 0x28u);
  EXPECT_EQ(parsed.areas[17][0x0c] | parsed.areas[17][0x0d] << 8, 1024)
      << "33 GiB: two of 16 and one of 1";
  EXPECT_EQ(parsed.areas[19].size(), 0x1fu);

  std::vector<uint8_t> placed = built.PlaceAt(0xf0000);
  uint8_t whole = 0, intermediate = 0;
  for (int i = 0; i < 31; i++) whole += placed[i];
  for (int i = 16; i < 31; i++) intermediate += placed[i];
  EXPECT_EQ(whole, 0);
  EXPECT_EQ(intermediate, 0);
  EXPECT_EQ(std::memcmp(&placed[0], "_SM_", 4), 0);
  EXPECT_EQ(placed[0x1c] | placed[0x1d] << 8, 14);
  EXPECT_EQ(placed[0x18] | placed[0x19] << 8 | placed[0x1a] << 16, 0xf0020);
}

}  // namespace
}  // namespace kvartz::machine
