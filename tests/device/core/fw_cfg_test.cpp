// Expected values: docs/specs/fw_cfg.rst of QEMU.
#include "device/core/fw_cfg.h"

#include <gtest/gtest.h>

#include "device/test_env.h"
#include "memory/ram.h"

namespace kvartz {
namespace {

struct FwCfgTest : testing::Test {
  FwCfgTest() : ram(*RamBlock::Create("ram", 1 << 20)), fw(machine.Env("fw_cfg")) {
    Region region;
    region.name = "ram";
    region.kind = RegionKind::kRam;
    region.size = ram->size();
    region.ram = ram;
    machine.memory.Add(region);
  }
  void Select(uint16_t key) { fw.IoWrite(0, 2, key); }
  std::string ReadText(size_t size) {
    std::string text;
    for (size_t i = 0; i < size; i++) text.push_back(static_cast<char>(fw.IoRead(1, 1)));
    return text;
  }
  // Runs a DMA request that lies at 0x1000; returns its control word afterwards.
  uint32_t Dma(uint32_t control, uint32_t length, uint64_t address) {
    GuestMemory memory(machine.memory);
    uint32_t words[4] = {__builtin_bswap32(control), __builtin_bswap32(length),
                         __builtin_bswap32(address >> 32),
                         __builtin_bswap32(static_cast<uint32_t>(address))};
    memory.Write(Gpa(0x1000), words, sizeof words);
    fw.IoWrite(4, 4, 0);
    fw.IoWrite(8, 4, __builtin_bswap32(0x1000));
    uint32_t result;
    memory.Read(Gpa(0x1000), &result, 4);
    return __builtin_bswap32(result);
  }

  test::MiniMachine machine;
  std::shared_ptr<RamBlock> ram;
  FwCfg fw;
};

TEST_F(FwCfgTest, SignatureIdAndEnd) {
  Select(0);
  EXPECT_EQ(ReadText(6), std::string("QEMU\0\0", 6));
  Select(1);
  EXPECT_EQ(ReadText(4), std::string("\3\0\0\0", 4));
  Select(0x7777);
  EXPECT_EQ(ReadText(2), std::string("\0\0", 2));
  EXPECT_EQ(fw.IoRead(4, 8), 0x4746432055'4d4551u) << "QEMU CFG, read as bytes";
}

TEST_F(FwCfgTest, DirectoryIsSorted) {
  fw.SetFile("etc/zeta", {1, 2, 3});
  fw.SetFile("bootorder", {'x'});
  Select(0x19);
  EXPECT_EQ(ReadText(4), std::string("\0\0\0\2", 4));
  std::string first = ReadText(64), second = ReadText(64);
  EXPECT_EQ(first.substr(0, 4), std::string("\0\0\0\1", 4));
  EXPECT_EQ(first.substr(4, 2), std::string("\0\x21", 2));
  EXPECT_STREQ(first.c_str() + 8, "bootorder");
  EXPECT_STREQ(second.c_str() + 8, "etc/zeta");
  Select(0x20);
  EXPECT_EQ(ReadText(3), "\1\2\3");
}

TEST_F(FwCfgTest, DmaSelectsSkipsAndReads) {
  fw.SetFile("a", {10, 11, 12, 13});
  EXPECT_EQ(Dma(0x20 << 16 | 8 | 4, 1, 0), 0u);
  EXPECT_EQ(Dma(2, 5, 0x2000), 0u);
  EXPECT_EQ(std::string(reinterpret_cast<char*>(ram->host()) + 0x2000, 5),
            std::string("\13\14\15\0\0", 5));
  EXPECT_EQ(Dma(0x20 << 16 | 8 | 2, 4, 0xfffff), 1u) << "beyond RAM";
  EXPECT_EQ(Dma(16, 4, 0x2000), 1u) << "writing isn't offered";
  EXPECT_EQ(Dma(2, 0xffffffff, 0x2000), 1u);
}

TEST_F(FwCfgTest, StateMoves) {
  fw.SetFile("a", {10, 11, 12, 13});
  Select(0x20);
  ReadText(2);
  FwCfg other(machine.Env("fw_cfg"));
  other.SetFile("a", {10, 11, 12, 13});
  EXPECT_TRUE(test::StateMoves(fw, other));
  EXPECT_EQ(other.IoRead(1, 1), 12u);
}

}  // namespace
}  // namespace kvartz
