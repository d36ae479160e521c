// Speed of the interpreter on small loops, in guest instructions a second of CPU time (./dev test
// slow).
#include <gtest/gtest.h>

#include <cstdio>
#include <ctime>

#include "cpu/x86/interp/machine.h"

namespace kvartz::cpu::x86 {
namespace {

struct Loop {
  const char* name;
  std::vector<uint8_t> code;  // ends in ud2; RCX counts down
};

const Loop kLoops[] = {
    // 1: add rax, rbx; xor rdx, rax; lea rsi, [rax+rdx*2]; dec rcx; jnz 1b; ud2
    {"register arithmetic",
     {0x48, 0x01, 0xd8, 0x48, 0x31, 0xc2, 0x48, 0x8d, 0x34, 0x50, 0x48, 0xff, 0xc9, 0x75, 0xf1,
      0x0f, 0x0b}},
    // 1: mov rax, [rdi]; add rax, rcx; mov [rdi+8], rax; movzx edx, byte [rdi+9]; cmp edx, 5; je
    // 2f; dec ecx; jnz 1b; 2: ud2
    {"loads and stores",
     {0x48, 0x8b, 0x07, 0x48, 0x01, 0xc8, 0x48, 0x89, 0x47, 0x08, 0x0f, 0xb6, 0x57, 0x09,
      0x81, 0xfa, 0xff, 0xff, 0xff, 0x7f, 0x74, 0x04, 0xff, 0xc9, 0x75, 0xe6, 0x0f, 0x0b}},
    // 1: call 2f; dec ecx; jnz 1b; ud2; 2: push rbx; pop rbx; ret
    {"calls", {0xe8, 0x06, 0x00, 0x00, 0x00, 0xff, 0xc9, 0x75, 0xf7, 0x0f, 0x0b, 0x53, 0x5b, 0xc3}},
};

// CPU time, so that a busy machine shows less.
double Seconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

TEST(InterpreterSpeedSlow, Loops) {
  for (const Loop& loop : kLoops) {
    TestMachine machine;
    machine.SetCode(loop.code);
    machine.cpu.gpr[kRcx] = 20'000'000;
    machine.cpu.gpr[kRdi] = TestMachine::kData;
    const double begin = Seconds();
    EXPECT_EQ(machine.Run(), kUD) << loop.name;
    const double seconds = Seconds() - begin;
    std::printf("%-20s %7.1f million instructions/s\n", loop.name,
                static_cast<double>(machine.cpu.insn_count) / seconds / 1e6);
  }
}

}  // namespace
}  // namespace kvartz::cpu::x86
