#include "cpu/x86_state.h"

#include <cstring>

namespace kvartz::cpu {
namespace {

constexpr size_t kMinXsave = 576;    // legacy region and header, SDM vol. 1 sec. 13.4
constexpr size_t kMaxXsave = 16384;  // AMX tiles end at 11008
constexpr size_t kMaxMsrs = 4096;
constexpr size_t kMsrRecord = 12;  // index, value

void VisitSegment(StateVisitor& v, std::string_view name, Segment& segment) {
  v.Section(name, [&] {
    v.Field("selector", segment.selector);
    v.Field("base", segment.base);
    v.Field("limit", segment.limit);
    v.Field("attributes", segment.attributes);
  });
}

void VisitTable(StateVisitor& v, std::string_view name, TableRegister& table) {
  v.Section(name, [&] {
    v.Field("base", table.base);
    v.Field("limit", table.limit);
  });
}

void VisitEvents(StateVisitor& v, PendingEvents& events) {
  v.Field("exception_pending", events.exception_pending);
  v.Field("exception_has_error", events.exception_has_error);
  v.Field("exception_vector", events.exception_vector);
  v.Field("exception_error", events.exception_error);
  v.Field("interrupt_injected", events.interrupt_injected);
  v.Field("interrupt_vector", events.interrupt_vector);
  v.Field("interrupt_shadow", events.interrupt_shadow);
  v.Field("nmi_injected", events.nmi_injected);
  v.Field("nmi_pending", events.nmi_pending);
  v.Field("nmi_masked", events.nmi_masked);
  v.Field("sipi_vector", events.sipi_vector);
  if (!v.loading()) return;
  v.Bounded("exception_vector", events.exception_vector, 0, 31);
  v.Bounded("interrupt_shadow", events.interrupt_shadow, 0, 3);
  v.Bounded("sipi_vector", events.sipi_vector, 0, 255);
}

void VisitMsrs(StateVisitor& v, std::map<uint32_t, uint64_t>& msrs) {
  std::vector<uint8_t> bytes;
  if (v.saving()) {
    bytes.resize(msrs.size() * kMsrRecord);
    uint8_t* at = bytes.data();
    for (const auto& [index, value] : msrs) {
      std::memcpy(at, &index, 4);
      std::memcpy(at + 4, &value, 8);
      at += kMsrRecord;
    }
  }
  v.Field("msrs", bytes, kMaxMsrs * kMsrRecord);
  if (!v.loading() || v.failed()) return;
  if (bytes.size() % kMsrRecord != 0) return v.Reject("msrs: not a whole number of records");
  msrs.clear();
  for (size_t at = 0; at < bytes.size(); at += kMsrRecord) {
    uint32_t index;
    uint64_t value;
    std::memcpy(&index, &bytes[at], 4);
    std::memcpy(&value, &bytes[at + 4], 8);
    msrs[index] = value;
  }
}

constexpr uint32_t kDataSegment = Segment::kP | Segment::kS | 3;    // read, write, accessed
constexpr uint32_t kCodeSegment = Segment::kP | Segment::kS | 0xb;  // execute, read, accessed

void PutLapic(X86State& state, unsigned offset, uint32_t value) {
  std::memcpy(&state.lapic[offset], &value, 4);
}

// SDM vol. 3 sec. 11.4.7.1.
void ResetLapic(X86State& state, unsigned index, uint32_t apic_id) {
  constexpr uint32_t kMasked = 1 << 16, kExtInt = 7 << 8;
  PutLapic(state, 0x20, apic_id << 24);
  PutLapic(state, 0x30, 0x50014);  // integrated APIC, highest LVT entry 5
  PutLapic(state, 0xe0, 0xffffffff);
  PutLapic(state, 0xf0, 0xff);
  for (unsigned lvt = 0x320; lvt <= 0x370; lvt += 0x10) PutLapic(state, lvt, kMasked);
  if (index == 0) PutLapic(state, 0x350, kExtInt);
}

}  // namespace

void X86State::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Field("gpr", gpr);
  v.Field("rip", rip);
  v.Field("rflags", rflags);
  constexpr std::string_view kNames[kSegCount] = {"es", "cs", "ss", "ds", "fs", "gs"};
  for (unsigned i = 0; i < kSegCount; ++i) VisitSegment(v, kNames[i], seg[i]);
  VisitSegment(v, "ldtr", ldtr);
  VisitSegment(v, "tr", tr);
  VisitTable(v, "gdtr", gdtr);
  VisitTable(v, "idtr", idtr);
  v.Field("cr0", cr0);
  v.Field("cr2", cr2);
  v.Field("cr3", cr3);
  v.Field("cr4", cr4);
  v.Field("cr8", cr8);
  v.Field("efer", efer);
  v.Field("apic_base", apic_base);
  v.Field("xcr0", xcr0);
  v.Field("dr", dr);
  v.Field("xsave", xsave, kMaxXsave);
  VisitMsrs(v, msrs);
  v.Field("lapic", lapic);
  v.Section("events", [&] { VisitEvents(v, events); });
  v.Field("mp_state", mp_state);
  if (!v.loading()) return;
  v.Bounded("mp_state", static_cast<uint64_t>(mp_state), 0,
            static_cast<uint64_t>(MpState::kSipiReceived));
  v.Bounded("cr8", cr8, 0, 15);
  v.Bounded("xsave size", xsave.size(), kMinXsave, kMaxXsave);
}

X86State ResetState(unsigned index, uint32_t apic_id, uint32_t signature) {
  X86State state;
  state.gpr[kRdx] = signature;
  state.rip = 0xfff0;
  for (Segment& segment : state.seg) segment = {.limit = 0xffff, .attributes = kDataSegment};
  state.seg[kCs] = {
      .base = 0xffff0000, .limit = 0xffff, .attributes = kCodeSegment, .selector = 0xf000};
  state.ldtr = {.limit = 0xffff, .attributes = Segment::kP | 2};
  state.tr = {.limit = 0xffff, .attributes = Segment::kP | 0xb};
  state.gdtr.limit = state.idtr.limit = 0xffff;
  state.cr0 = 0x60000010;
  state.dr[6] = 0xffff0ff0;
  state.dr[7] = 0x400;
  state.apic_base = 0xfee00800 | (index == 0 ? 0x100 : 0);

  state.xsave.resize(kMinXsave);
  auto put16 = [&](size_t at, uint16_t value) { std::memcpy(&state.xsave[at], &value, 2); };
  put16(0, 0x40);         // FCW
  state.xsave[4] = 0xff;  // abridged tag word: eight registers that hold zero
  put16(24, 0x1f80);      // MXCSR
  state.xsave[512] = 3;   // XSTATE_BV: x87 and SSE

  state.msrs = {
      {0x10, 0},   // IA32_TIME_STAMP_COUNTER
      {0x174, 0},  // IA32_SYSENTER_CS, ESP, EIP
      {0x175, 0},
      {0x176, 0},
      {0x1a0, 1},                   // IA32_MISC_ENABLE: fast strings
      {0x277, 0x0007040600070406},  // IA32_PAT
      {0x2ff, 0},                   // IA32_MTRR_DEF_TYPE
      {0xc0000081, 0},              // STAR, LSTAR, CSTAR, FMASK
      {0xc0000082, 0},
      {0xc0000083, 0},
      {0xc0000084, 0},
      {0xc0000102, 0},  // KERNEL_GS_BASE
  };
  ResetLapic(state, index, apic_id);
  state.mp_state = index == 0 ? MpState::kRunnable : MpState::kUninitialized;
  return state;
}

X86State ResetState(unsigned index) { return ResetState(index, index, 0); }

}  // namespace kvartz::cpu
