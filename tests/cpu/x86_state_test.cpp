#include "cpu/x86_state.h"

#include <gtest/gtest.h>

#include <cstring>

namespace kvartz::cpu {
namespace {

X86State Sample() {
  X86State state = ResetState(1, 3, 0x663);
  for (unsigned i = 0; i < 16; ++i) state.gpr[i] = 0x0101010101010101ull * i;
  state.seg[kFs].base = 0xffff888000000000;
  state.cr3 = 0x1000;
  state.xsave.assign(832, 0);
  state.xsave[600] = 0x5a;
  state.msrs[0xc0000103] = 7;
  state.lapic[0x80] = 0x20;
  state.events.nmi_masked = true;
  state.mp_state = MpState::kHalted;
  return state;
}

void Visit(X86State& state, StateVisitor& visitor) {
  visitor.Section("cpu", [&] { state.VisitState(visitor); });
}

std::string Dump(X86State state) {
  return DumpState([&](StateVisitor& v) { Visit(state, v); });
}

TEST(X86State, SavedAndLoadedIsTheSame) {
  X86State saved = Sample(), loaded;
  std::vector<uint8_t> bytes = SaveState([&](StateVisitor& v) { Visit(saved, v); });
  Result<> result = LoadState(bytes, [&](StateVisitor& v) { Visit(loaded, v); });
  ASSERT_TRUE(result.has_value()) << result.error().what;
  EXPECT_EQ(Dump(loaded), Dump(saved));
  EXPECT_EQ(loaded.msrs, saved.msrs);
  EXPECT_EQ(loaded.xsave, saved.xsave);
}

TEST(X86State, LoadingChecksWhatItReads) {
  X86State saved = Sample(), loaded;
  saved.cr8 = 16;
  std::vector<uint8_t> bytes = SaveState([&](StateVisitor& v) { Visit(saved, v); });
  EXPECT_FALSE(LoadState(bytes, [&](StateVisitor& v) { Visit(loaded, v); }).has_value());

  saved = Sample();
  saved.xsave.resize(100);
  bytes = SaveState([&](StateVisitor& v) { Visit(saved, v); });
  EXPECT_FALSE(LoadState(bytes, [&](StateVisitor& v) { Visit(loaded, v); }).has_value());
}

// SDM vol. 3 table 10-1, sec. 11.4.7.1 (local APIC).
TEST(ResetState, IsTheManuals) {
  X86State bsp = ResetState(0, 0, 0x663);
  EXPECT_EQ(bsp.seg[kCs].base + bsp.rip, 0xfffffff0u);
  EXPECT_EQ(bsp.seg[kCs].selector, 0xf000);
  EXPECT_EQ(bsp.rflags, 2u);
  EXPECT_EQ(bsp.cr0, 0x60000010u);
  EXPECT_EQ(bsp.gpr[kRdx], 0x663u);
  EXPECT_EQ(bsp.dr[6], 0xffff0ff0u);
  EXPECT_EQ(bsp.dr[7], 0x400u);
  EXPECT_EQ(bsp.idtr.limit, 0xffff);
  EXPECT_EQ(bsp.apic_base, 0xfee00900u);
  EXPECT_EQ(bsp.msrs.at(0x277), 0x0007040600070406u);
  EXPECT_EQ(bsp.mp_state, MpState::kRunnable);

  X86State ap = ResetState(5, 9, 0x663);
  EXPECT_EQ(ap.apic_base, 0xfee00800u);
  EXPECT_EQ(ap.mp_state, MpState::kUninitialized);
  uint32_t id, lint0;
  std::memcpy(&id, &ap.lapic[0x20], 4);
  std::memcpy(&lint0, &ap.lapic[0x350], 4);
  EXPECT_EQ(id, 9u << 24);
  EXPECT_EQ(lint0, 0x10000u);
}

}  // namespace
}  // namespace kvartz::cpu
