#include "base/state_visitor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "base/crc32c.h"
#include "base/endian.h"

namespace kvartz {
namespace {

using testing::HasSubstr;

enum class Mode : uint32_t { kOff, kOn = 0x80000000 };

struct Device {
  uint8_t narrow = 1;
  int32_t negative = -5;
  uint64_t wide = 0x1122334455667788;
  bool flag = true;
  Mode mode = Mode::kOn;
  std::array<uint16_t, 3> pairs = {1, 2, 3};
  uint32_t plain[2] = {7, 8};
  std::vector<uint8_t> fifo = {1, 2, 3};
  std::string name = "eth0";
  uint32_t seen_version = 0;

  void VisitState(StateVisitor& v) {
    seen_version = v.Version(3);
    v.Field("narrow", narrow);
    v.Field("negative", negative);
    v.Field("wide", wide);
    v.Field("flag", flag);
    v.Field("mode", mode);
    v.Field("pairs", pairs);
    v.Field("plain", plain);
    v.Field("fifo", fifo, 16);
    v.Field("name", name, 16);
  }
  bool operator==(const Device&) const = default;
};

std::vector<uint8_t> Save(const std::function<void(StateVisitor&)>& visit) {
  return SaveState(visit);
}

std::string LoadError(const std::vector<uint8_t>& bytes,
                      const std::function<void(StateVisitor&)>& visit) {
  auto result = LoadState(bytes, visit);
  return result ? "" : result.error().what;
}

// A stream of the given items, with a right header and checksum.
std::vector<uint8_t> Stream(const std::string& items) {
  std::string text = std::string("KVZSTATE\1\0\0\0", 12) + items;
  std::vector<uint8_t> bytes(text.begin(), text.end());
  Le32 crc = Crc32c(bytes);
  bytes.resize(bytes.size() + 4);
  std::memcpy(&bytes[bytes.size() - 4], &crc, 4);
  return bytes;
}

TEST(Crc32c, MatchesRfc3720) {
  // RFC 3720, B.4: 32 bytes of zeros, of ones, and incrementing; the check value of "123456789".
  std::vector<uint8_t> bytes(32, 0);
  EXPECT_EQ(Crc32c(bytes), 0x8a9136aau);
  bytes.assign(32, 0xff);
  EXPECT_EQ(Crc32c(bytes), 0x62a8ab43u);
  for (uint8_t i = 0; i < 32; i++) bytes[i] = i;
  EXPECT_EQ(Crc32c(bytes), 0x46dd794eu);
  auto span = std::span<const uint8_t>(bytes);
  EXPECT_EQ(Crc32c(span.subspan(13), Crc32c(span.first(13))), 0x46dd794eu);
  std::string_view digits = "123456789";
  EXPECT_EQ(Crc32c({reinterpret_cast<const uint8_t*>(digits.data()), 9}), 0xe3069283u);
}

TEST(StateVisitor, RestoresEveryKindOfField) {
  Device saved;
  auto bytes = Save([&](StateVisitor& v) { v.Section("dev", [&] { saved.VisitState(v); }); });
  Device loaded = {.narrow = 0,
                   .negative = 0,
                   .wide = 0,
                   .flag = false,
                   .mode = Mode::kOff,
                   .pairs = {},
                   .plain = {},
                   .fifo = {},
                   .name = "",
                   .seen_version = 0};
  EXPECT_EQ(
      LoadError(bytes, [&](StateVisitor& v) { v.Section("dev", [&] { loaded.VisitState(v); }); }),
      "");
  EXPECT_EQ(loaded, saved);
  EXPECT_EQ(loaded.seen_version, 3u);
}

TEST(StateVisitor, SectionsComeInAnyOrderAndOptionalOnesMayBeMissing) {
  uint32_t a = 1, b = 2;
  auto bytes = Save([&](StateVisitor& v) {
    v.Section("a", [&] { v.Field("x", a); });
    v.Section("b", [&] { v.Field("x", b); });
  });
  uint32_t a2 = 0, b2 = 0, c2 = 9;
  EXPECT_EQ(LoadError(bytes,
                      [&](StateVisitor& v) {
                        v.Section("b", [&] { v.Field("x", b2); });
                        v.Section(
                            "c", [&] { v.Field("x", c2); }, StateVisitor::Presence::kOptional);
                        v.Section("a", [&] { v.Field("x", a2); });
                      }),
            "");
  EXPECT_EQ(a2, 1u);
  EXPECT_EQ(b2, 2u);
  EXPECT_EQ(c2, 9u);
}

TEST(StateVisitor, MissingFieldsKeepTheirValueAndUnknownOnesAreSkipped) {
  uint32_t x = 1;
  auto bytes = Save([&](StateVisitor& v) { v.Field("old", x); });
  uint32_t fresh = 42;
  EXPECT_EQ(LoadError(bytes, [&](StateVisitor& v) { v.Field("fresh", fresh); }), "");
  EXPECT_EQ(fresh, 42u);
}

TEST(StateVisitor, AMissingRequiredSectionIsNamed) {
  auto bytes = Save([](StateVisitor& v) { v.Section("pci", [] {}); });
  EXPECT_EQ(LoadError(bytes,
                      [](StateVisitor& v) { v.Section("pci", [&] { v.Section("net0", [] {}); }); }),
            "saved state: pci.net0 is missing");
}

TEST(StateVisitor, ARequiredSectionThatNobodyKnowsIsAnError) {
  auto bytes = Save([](StateVisitor& v) {
    v.Section("pci", [&] {
      v.Section("net1", [] {});
      v.Section("hint", [] {}, StateVisitor::Presence::kOptional);
    });
  });
  EXPECT_EQ(LoadError(bytes, [](StateVisitor& v) { v.Section("pci", [] {}); }),
            "saved state: pci.net1 isn't part of this machine");
  EXPECT_EQ(LoadError(bytes,
                      [](StateVisitor& v) { v.Section("pci", [&] { v.Section("net1", [] {}); }); }),
            "");
}

TEST(StateVisitor, ANewerVersionIsRefused) {
  auto bytes = Save([](StateVisitor& v) { v.Section("uart", [&] { v.Version(2); }); });
  EXPECT_THAT(LoadError(bytes, [](StateVisitor& v) { v.Section("uart", [&] { v.Version(1); }); }),
              HasSubstr("uart is version 2, and this program knows it up to 1"));
}

TEST(StateVisitor, IntegersMayChangeWidthIfTheValueFits) {
  uint64_t wide = 200;
  auto bytes = Save([&](StateVisitor& v) { v.Field("x", wide); });
  uint8_t narrow = 0;
  EXPECT_EQ(LoadError(bytes, [&](StateVisitor& v) { v.Field("x", narrow); }), "");
  EXPECT_EQ(narrow, 200);
  int8_t too_narrow = 3;
  EXPECT_EQ(LoadError(bytes, [&](StateVisitor& v) { v.Field("x", too_narrow); }),
            "saved state: x is out of range");
  EXPECT_EQ(too_narrow, 3);
  int16_t negative = -1;
  bytes = Save([&](StateVisitor& v) { v.Field("x", negative); });
  uint64_t positive = 5;
  EXPECT_EQ(LoadError(bytes, [&](StateVisitor& v) { v.Field("x", positive); }),
            "saved state: x is out of range");
  int64_t extended = 0;
  EXPECT_EQ(LoadError(bytes, [&](StateVisitor& v) { v.Field("x", extended); }), "");
  EXPECT_EQ(extended, -1);
  int8_t lowest = -128;
  bytes = Save([&](StateVisitor& v) { v.Field("x", lowest); });
  int8_t back = 0;
  EXPECT_EQ(LoadError(bytes, [&](StateVisitor& v) { v.Field("x", back); }), "");
  EXPECT_EQ(back, -128);
}

TEST(StateVisitor, SizesOfBytesAreChecked) {
  std::vector<uint8_t> fifo(17, 1);
  auto bytes = Save([&](StateVisitor& v) { v.Field("fifo", fifo, 17); });
  std::vector<uint8_t> small = {9};
  EXPECT_EQ(LoadError(bytes, [&](StateVisitor& v) { v.Field("fifo", small, 16); }),
            "saved state: fifo has 17 bytes, at most 16 are allowed");
  EXPECT_EQ(small, std::vector<uint8_t>{9});
  std::array<uint8_t, 16> fixed{};
  EXPECT_EQ(LoadError(bytes, [&](StateVisitor& v) { v.Field("fifo", fixed); }),
            "saved state: fifo has 17 bytes, not 16");
}

TEST(StateVisitor, NothingIsLoadedAfterAnError) {
  uint32_t x = 1, y = 2;
  auto bytes = Save([&](StateVisitor& v) {
    v.Field("x", x);
    v.Field("y", y);
  });
  uint32_t x2 = 0, y2 = 0;
  EXPECT_EQ(LoadError(bytes,
                      [&](StateVisitor& v) {
                        v.Field("x", x2);
                        v.Bounded("x", x2, 5, 6);
                        EXPECT_TRUE(v.failed());
                        v.Field("y", y2);
                        v.Section("z", [] { FAIL(); });
                      }),
            "saved state: has x 0x1, which is not in 0x5..0x6");
  EXPECT_EQ(y2, 0u);
}

TEST(StateVisitor, EveryFlippedBitAndEveryCutIsNoticed) {
  Device device;
  auto visit = [&](StateVisitor& v) { device.VisitState(v); };
  auto good = Save(visit);
  for (size_t i = 0; i < good.size() * 8; i++) {
    auto bad = good;
    bad[i / 8] ^= static_cast<uint8_t>(1 << i % 8);
    EXPECT_NE(LoadError(bad, visit), "") << i;
  }
  for (size_t size = 0; size < good.size(); size++) {
    EXPECT_NE(LoadError({good.begin(), good.begin() + static_cast<ptrdiff_t>(size)}, visit), "");
  }
}

TEST(StateVisitor, DamageBehindARightChecksumIsNoticed) {
  using namespace std::string_literals;
  uint32_t x = 0;
  auto visit = [&](StateVisitor& v) { v.Field("x", x); };
  EXPECT_EQ(LoadError(Stream("\3\1x\0\5\0\0\0\0\0\0\0"s), visit), "");
  EXPECT_EQ(x, 5u);
  for (const auto& items : {
           "\3"s,                          // no name
           "\3\0\0"s,                      // an empty one
           "\3\5x"s,                       // longer than what is left
           "\3\1x\0\5"s,                   // an integer cut off
           "\4\1x\xff\xff\xff\xff"s,       // bytes that aren't there
           "\1\1x\1\xff\xff\xff\x7f"s,     // a section that isn't there
           "\7\1x\0\0"s,                   // no such kind
           "\4\1x\0\0\0\0\4\1x\0\0\0\0"s,  // twice the same name
           "\4\1x\0\0\0\0"s,               // another kind than expected
       }) {
    EXPECT_NE(LoadError(Stream(items), visit), "") << testing::PrintToString(items);
  }
}

TEST(StateVisitor, DumpIsOneFieldALine) {
  Device device;
  EXPECT_EQ(DumpState([&](StateVisitor& v) { v.Section("dev", [&] { device.VisitState(v); }); }),
            "dev.version = 3\n"
            "dev.narrow = 0x1\n"
            "dev.negative = -0x5\n"
            "dev.wide = 0x1122334455667788\n"
            "dev.flag = 0x1\n"
            "dev.mode = 0x80000000\n"
            "dev.pairs = [6] 01 00 02 00 03 00\n"
            "dev.plain = [8] 07 00 00 00 08 00 00 00\n"
            "dev.fifo = [3] 01 02 03\n"
            "dev.name = \"eth0\"\n");
}

}  // namespace
}  // namespace kvartz
