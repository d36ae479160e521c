// What -d in_asm, op, out_asm and exec print.
#include "cpu/x86/code_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "cpu/x86/guest_case.h"

namespace kvartz::cpu::x86 {
namespace {

using testing::HasSubstr;
using testing::Not;

GUEST_CODE(code_log_program, "mov %rsp, %rbp; add $5, %eax; out %al, $0xf4")
// A loop over two pages, so that one unit is entered by the other, five times.
GUEST_CODE(code_log_loop, R"(
2: mov $5, %ecx
0: mov 8(%rsp), %rdx
  adc %rdx, -8(%rsp)
  jmp 1f
  .skip 4096 - (. - 2b)
1: dec %ecx
  jnz 0b
  out %al, $0xf4)")

// Log items can't be switched off again: each program runs in a process of its own.
std::string LogOf(bool jit, const char* items,
                  std::span<const uint8_t> program = CODE_OF(code_log_program)) {
  char path[] = "/tmp/kvartz-code-log-XXXXXX";
  const int fd = mkstemp(path);
  EXPECT_GE(fd, 0);
  close(fd);
  auto run = [&] {
    if (!log::SetFile(path) || !log::EnableCategories(items)) _exit(1);
    log::SetLevel(LogLevel::kInfo);
    GuestCase guest(Mode::kLong64, 0, "max", 1, SoftOptions{.jit = jit});
    guest.Load(program);
    _exit(guest.Run().vector == -1 ? 0 : 2);
  };
  EXPECT_EXIT(run(), testing::ExitedWithCode(0), "");
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  unlink(path);
  return text.str();
}

TEST(CodeLogTest, GuestCodeIsShownWhenItIsTranslated) {
  const std::string text = LogOf(true, "in_asm");
  EXPECT_THAT(text, HasSubstr("info: in_asm: cpu 0: unit at 0x8000, "));
  EXPECT_THAT(text, HasSubstr("in_asm: cpu 0: 0x0000000000008000: 48 89 e5                        "
                              "MOV rm, r\n"));
  EXPECT_THAT(text, HasSubstr("0x0000000000008003: 83 c0 05                        ADD "));
  EXPECT_THAT(text, HasSubstr("0x0000000000008006: e6 f4                           OUT "));
  EXPECT_THAT(text, Not(HasSubstr("out_asm")));
}

TEST(CodeLogTest, GuestCodeIsShownWhenItIsInterpreted) {
  const std::string text = LogOf(false, "in_asm,out_asm");
  EXPECT_THAT(text, HasSubstr("in_asm: cpu 0: interpreted block at 0x8000, 3 instructions\n"));
  EXPECT_THAT(text, HasSubstr("0x0000000000008000: 48 89 e5 "));
  EXPECT_THAT(text, Not(HasSubstr("out_asm")));
}

// ADD EAX,5 runs as it is: its bytes are among the host's.
TEST(CodeLogTest, HostCodeIsShownByItsBytes) {
  const std::string text = LogOf(true, "out_asm");
  EXPECT_THAT(text, HasSubstr("out_asm: cpu 0: unit at 0x8000, "));
  std::string bytes;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t at = line.rfind(": ");
    if (line.find("unit at") == std::string::npos) bytes += line.substr(at + 2) + " ";
  }
  EXPECT_THAT(bytes, HasSubstr("83 c0 05 "));
  EXPECT_THAT(text, Not(HasSubstr("in_asm")));
}

TEST(CodeLogTest, DecisionsAreShownByInstructionAndCheck) {
  const std::string text = LogOf(true, "op", CODE_OF(code_log_loop));
  EXPECT_THAT(text, HasSubstr("op: cpu 0: unit at 0x8000, 64-bit supervisor"));
  EXPECT_THAT(text, HasSubstr(": MOV r, rm: copied, memory by check "));
  EXPECT_THAT(text, HasSubstr("writes RSP+[-0x8, +0x10), asks slot "));
  EXPECT_THAT(text, HasSubstr("0x9002: JNZ rel: branch, "));
  EXPECT_THAT(text, HasSubstr("0x9000: DEC rm: copied, flags read later: OSZAPC"));
  EXPECT_THAT(text, Not(HasSubstr("exec")));
}

size_t Count(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++count;
  return count;
}

TEST(CodeLogTest, EachEntryIntoAUnitIsShown) {
  const std::string text = LogOf(true, "exec", CODE_OF(code_log_loop));
  EXPECT_EQ(Count(text, "exec: cpu 0: unit at 0x8000, CPL 0\n"), 1u);
  // And when a check has failed.
  EXPECT_GE(Count(text, "exec: cpu 0: unit at 0x8005, CPL 0\n"), 4u);
  EXPECT_EQ(Count(text, "exec: cpu 0: unit at 0x9000, CPL 0\n"), 5u);
}

TEST(CodeLogTest, EachInterpretedBlockIsShown) {
  const std::string text = LogOf(false, "exec", CODE_OF(code_log_loop));
  EXPECT_EQ(Count(text, "exec: cpu 0: interpreted block at 0x8005, CPL 0\n"), 4u);
  EXPECT_EQ(Count(text, "exec: cpu 0: interpreted block at 0x9000, CPL 0\n"), 5u);
}

}  // namespace
}  // namespace kvartz::cpu::x86
