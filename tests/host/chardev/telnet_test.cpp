#include "host/chardev/telnet.h"

#include <gtest/gtest.h>

namespace kvartz::host::telnet {
namespace {

std::span<const uint8_t> Bytes(std::string_view text) {
  return std::span(reinterpret_cast<const uint8_t*>(text.data()), text.size());
}

// Commands as RFC 854 defines them, byte by byte and at once.
TEST(TelnetTest, CommandsAreFilteredOut) {
  constexpr std::string_view kInput(
      "a\xff\xfd\x01"                   // IAC DO ECHO
      "b\xff\xff"                       // a literal 255
      "c\xff\xf3"                       // IAC BRK
      "d\xff\xfa\x18\x00xterm\xff\xf0"  // IAC SB TERMINAL-TYPE IS xterm IAC SE
      "e",
      23);
  for (size_t step : {size_t{1}, kInput.size()}) {
    InputFilter filter;
    std::string plain;
    bool line_break = false;
    for (size_t at = 0; at < kInput.size(); at += step)
      filter.Filter(Bytes(kInput.substr(at, step)), &plain, &line_break);
    EXPECT_EQ(plain,
              "ab\xff"
              "cde");
    EXPECT_TRUE(line_break);
  }
}

TEST(TelnetTest, OutputDoublesIac) {
  std::string out;
  Escape(Bytes("x\xffy"), &out);
  EXPECT_EQ(out, "x\xff\xffy");
}

}  // namespace
}  // namespace kvartz::host::telnet
