// The block cache: code that changes, crosses pages, runs into limits or is interrupted.
#include <gtest/gtest.h>

#include "cpu/x86/interp/machine.h"

namespace kvartz::cpu::x86 {
namespace {

TEST(RunLoop, AStoreIntoTheNextInstructionTakesEffect) {
  TestMachine machine;
  // mov byte [rip+1], 7 (the immediate of the next instruction); mov al, 0; ud2
  machine.SetCode({0xc6, 0x05, 0x01, 0x00, 0x00, 0x00, 0x07, 0xb0, 0x00, 0x0f, 0x0b});
  ASSERT_EQ(machine.Run(), kUD);
  EXPECT_EQ(machine.cpu.gpr[kRax] & 0xff, 7u);
  // Again, now that the page is known to hold code and is writable in the TLB.
  machine.cpu.rip = TestMachine::kCode;
  machine.Store<uint8_t>(TestMachine::kCode + 6, 9);
  FlushBlocks(machine.cpu);
  ASSERT_EQ(machine.Run(), kUD);
  EXPECT_EQ(machine.cpu.gpr[kRax] & 0xff, 9u);
}

TEST(RunLoop, ALoopThatRewritesItself) {
  TestMachine machine;
  // 1: add eax, imm8 (rewritten each time: +1); inc byte [rip - 7]; dec ecx; jnz 1b; ud2
  machine.SetCode(
      {0x83, 0xc0, 0x01, 0xfe, 0x05, 0xf9, 0xff, 0xff, 0xff, 0xff, 0xc9, 0x75, 0xf3, 0x0f, 0x0b});
  machine.cpu.gpr[kRcx] = 10;
  ASSERT_EQ(machine.Run(), kUD);
  EXPECT_EQ(machine.cpu.gpr[kRax], 55u);
}

TEST(RunLoop, DataBesideCodeKeepsTheBlocks) {
  TestMachine machine;
  // 1: inc dword [rdi]; dec ecx; jnz 1b; ud2: the counter lies in the code's page
  machine.SetCode({0xff, 0x07, 0xff, 0xc9, 0x75, 0xfa, 0x0f, 0x0b});
  machine.cpu.gpr[kRdi] = TestMachine::kCode + 0x800;
  machine.cpu.gpr[kRcx] = 1000;
  ASSERT_EQ(machine.Run(), kUD);
  EXPECT_EQ(machine.Load<uint32_t>(TestMachine::kCode + 0x800), 1000u);
  const auto& blocks = *static_cast<BlockCache*>(machine.cpu.blocks);
  EXPECT_LT(blocks.decoded_blocks(), 10u);
}

TEST(RunLoop, AnInstructionAcrossPages) {
  TestMachine machine;
  const uint64_t edge = TestMachine::kCode + 0x1000;
  const uint8_t code[] = {0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 0x0f, 0x0b};  // mov rax, imm64; ud2
  for (uint64_t first = 1; first < 10; ++first) {
    FlushBlocks(machine.cpu);
    std::memcpy(machine.ram(edge - first), code, sizeof code);
    for (int round = 0; round < 2; ++round) {
      machine.cpu.gpr[kRax] = 0;
      machine.cpu.rip = edge - first;
      ASSERT_EQ(machine.Run(), kUD);
      EXPECT_EQ(machine.cpu.gpr[kRax], 0x0807060504030201u);
      EXPECT_EQ(machine.cpu.rip, edge - first + 10);
    }
  }
}

TEST(RunLoop, AWriteToTheSecondPageOfACrossingInstruction) {
  TestMachine machine;
  const uint64_t edge = TestMachine::kCode + 0x1000;
  // at edge - 5: 1: mov eax, imm32 (crosses); then inc byte [edge]... the immediate's last byte;
  // dec ecx; jnz 1b; ud2
  const uint8_t code[] = {0xb8, 0,    0,    0,    /*edge:*/ 0, 0x80, 0x03,
                          0x01, 0xff, 0xc9, 0x75, 0xf4,        0x0f, 0x0b};
  std::memcpy(machine.ram(edge - 4), code, sizeof code);
  FlushBlocks(machine.cpu);
  machine.cpu.rip = edge - 4;
  machine.cpu.gpr[kRbx] = edge;
  machine.cpu.gpr[kRcx] = 3;
  ASSERT_EQ(machine.Run(), kUD);
  EXPECT_EQ(machine.cpu.gpr[kRax], 0x02000000u);
}

TEST(RunLoop, FetchFaults) {
  TestMachine machine;
  machine.cpu.rip = TestMachine::kNotPresent;
  ASSERT_EQ(machine.Run(), kPF);
  EXPECT_EQ(machine.cpu.cr2, TestMachine::kNotPresent);
  EXPECT_EQ(machine.cpu.rip, TestMachine::kNotPresent);
  // The second page is missing: CR2 is there, RIP at the instruction.
  machine.Store<uint16_t>(TestMachine::kNotPresent - 2, 0xb848);
  machine.cpu.rip = TestMachine::kNotPresent - 2;
  ASSERT_EQ(machine.Run(), kPF);
  EXPECT_EQ(machine.cpu.cr2, TestMachine::kNotPresent);
  EXPECT_EQ(machine.cpu.rip, TestMachine::kNotPresent - 2);
  // An instruction that ends with the page needs no second one.
  machine.Store<uint16_t>(TestMachine::kNotPresent - 2, 0xc3f3);
  machine.cpu.rip = TestMachine::kNotPresent - 2;
  FlushBlocks(machine.cpu);
  machine.cpu.gpr[kRsp] = TestMachine::kStack;
  machine.Store<uint64_t>(TestMachine::kStack, TestMachine::kNotPresent);
  ASSERT_EQ(machine.Run(), kPF);
  EXPECT_EQ(machine.cpu.rip, TestMachine::kNotPresent);
}

TEST(RunLoop, UndefinedAndTooLong) {
  TestMachine machine;
  machine.SetCode({0x90, 0x0f, 0xff, 0xc0});
  ASSERT_EQ(machine.Run(), kUD);
  EXPECT_EQ(machine.cpu.rip, TestMachine::kCode + 1);
  std::vector<uint8_t> prefixes(16, 0x66);
  machine.SetCode(prefixes);
  ASSERT_EQ(machine.Run(), kGP);
  EXPECT_EQ(machine.cpu.fault.error, 0u);
}

TEST(RunLoop, TheCodeSegmentEnds) {
  TestMachine machine(CodeMode::k16);
  machine.cpu.seg[kCs].base = TestMachine::kCode;
  machine.cpu.seg[kCs].limit = 0x103;
  std::vector<uint8_t> code(0x200, 0x40);  // inc ax
  code[0x103] = 0xb0;                      // mov al, imm8: the second byte is behind the limit
  machine.SetCode(code);
  machine.cpu.rip = 0;
  ASSERT_EQ(machine.Run(), kGP);
  EXPECT_EQ(machine.cpu.rip, 0x103u);
  EXPECT_EQ(machine.cpu.gpr[kRax], 0x103u);
  code[0x103] = 0x40;
  machine.SetCode(code);
  machine.cpu.rip = 0;
  ASSERT_EQ(machine.Run(), kGP);
  EXPECT_EQ(machine.cpu.rip, 0x104u);
}

TEST(RunLoop, ARequestInterruptsARepetition) {
  TestMachine machine;
  machine.SetCode({0xf3, 0x48, 0xab});  // rep stosq
  machine.cpu.gpr[kRdi] = TestMachine::kData;
  machine.cpu.gpr[kRcx] = 5;
  ASSERT_FALSE(machine.Step(2));
  EXPECT_EQ(machine.cpu.gpr[kRcx], 3u);
  EXPECT_EQ(machine.cpu.gpr[kRdi], TestMachine::kData + 2 * 8);
  EXPECT_EQ(machine.cpu.rip, TestMachine::kCode);
}

TEST(RunLoop, TheCacheIsBounded) {
  TestMachine machine;
  // Fills 7 MiB with code that is one block a few bytes: jmp +0 chains.
  const uint64_t begin = TestMachine::kCode, end = 0x90000;
  for (uint64_t at = begin; at + 2 < end; at += 2) {
    machine.Store<uint16_t>(at, at == TestMachine::kNotPresent - 2 ? 0x0b0f : 0x00eb);
  }
  auto& blocks = *static_cast<BlockCache*>(machine.cpu.blocks);
  for (int round = 0; round < 12; ++round) {
    machine.cpu.rip = begin;
    if (round % 2 == 1) {
      FlushBlocks(machine.cpu);
    }
    ASSERT_EQ(machine.Run(), kUD);
  }
  EXPECT_GT(blocks.decoded_blocks(), 0x10000u);
}

}  // namespace
}  // namespace kvartz::cpu::x86
