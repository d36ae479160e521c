// The architectural state of the own engine's CPU, in and out.
#include "cpu/x86/engine.h"
#include "cpu/x86/interp/block_cache.h"
#include "cpu/x86/jit/engine.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint64_t kX2Apic = 0xc00;

}  // namespace

void SoftVcpu::LoadXsave(const std::vector<uint8_t>& area) {
  cpu.fpu = XsaveArea{};
  if (area.size() < 576) return;
  uint64_t present = 0;
  std::memcpy(&present, &area[512], 8);
  XsaveArea fresh;
  std::memcpy(static_cast<void*>(&fresh), area.data(), std::min(area.size(), sizeof(fresh)));
  // Components that the header leaves out have their initial values.
  if (!(present & 1)) {
    const XsaveArea initial;
    uint32_t mxcsr = fresh.mxcsr;
    std::memcpy(static_cast<void*>(&fresh), &initial, 24);
    std::memset(fresh.st, 0, sizeof(fresh.st));
    fresh.mxcsr = mxcsr;
  }
  if (!(present & 2)) std::memset(fresh.xmm, 0, sizeof(fresh.xmm));
  if (!(present & 6)) fresh.mxcsr = 0x1f80;
  if (!(present & 4) || area.size() < sizeof(XsaveArea))
    std::memset(fresh.ymm_high, 0, sizeof(fresh.ymm_high));
  fresh.mxcsr &= 0xffff;
  fresh.mxcsr_mask = 0xffff;
  fresh.xstate_bv = limits_.xcr0 & 7;
  fresh.xcomp_bv = 0;
  std::memset(fresh.header_reserved, 0, sizeof(fresh.header_reserved));
  cpu.fpu = fresh;
}

// Everything but MSRs, the local APIC and events.
void SoftVcpu::LoadRegisters(const X86State& state) {
  for (unsigned i = 0; i < 16; i++) cpu.gpr[i] = state.gpr[i];
  cpu.rip = cpu.insn_rip = state.rip;
  cpu.rflags = (state.rflags & 0x3f7fd7) | 2;
  for (unsigned i = 0; i < kSegCount; i++) cpu.seg[i] = state.seg[i];
  cpu.ldtr = state.ldtr;
  cpu.tr = state.tr;
  cpu.gdtr = state.gdtr;
  cpu.idtr = state.idtr;
  cpu.cr0 = state.cr0 | cr0::kEt;
  cpu.cr2 = state.cr2;
  cpu.cr3 = state.cr3;
  cpu.cr4 = state.cr4 & limits_.cr4;
  cpu.efer = state.efer & limits_.efer;
  if (!(cpu.cr0 & cr0::kPg)) cpu.efer &= ~efer::kLma;
  cpu.xcr0 = (state.xcr0 & limits_.xcr0) | 1;
  for (unsigned i = 0; i < 8; i++) cpu.dr[i] = state.dr[i];
  cpu.dr[6] = (cpu.dr[6] & 0xe00f) | 0xffff0ff0;
  cpu.dr[7] = (cpu.dr[7] & 0xffff2bff) | 0x400;
  tlb_.FlushAll();
  tlb_.SwitchTo(cpu.cr4 & cr4::kPcide ? cpu.cr3 & 0xfff : 0, false);
  UpdateMode(cpu);
}

Result<> SoftVcpu::SetState(const X86State& state) {
  LoadRegisters(state);
  LoadXsave(state.xsave);
  for (const auto& [index, value] : state.msrs) {
    // 64-bit segment bases are part of the segments.
    if (index == 0xc0000100 || index == 0xc0000101) continue;
    RestoreMsr(cpu, index, value);
  }
  uint64_t base = state.apic_base;
  if (!limits_.x2apic && (base & kX2Apic) == kX2Apic) base &= ~0x400ull;
  lapic_.SetBase(base);
  tlb_.local_apic_page = (base & 0xc00) == 0x800 ? base & 0xffffff000ull : ~0ull;
  lapic_.Load(state.lapic.data());
  if (lapic_.deadline_mode() && msrs.tsc_deadline) WriteMsr(cpu, 0x6e0, msrs.tsc_deadline);
  if (state.cr8) lapic_.SetCr8(state.cr8 & 15);
  cpu.events = state.events;
  cpu.mp_state = state.mp_state;
  __atomic_store_n(&cpu.requests, __atomic_load_n(&cpu.requests, __ATOMIC_SEQ_CST) & request::kKick,
                   __ATOMIC_SEQ_CST);
  uint32_t look = request::kInterrupt | request::kTimer;
  if (cpu.events.interrupt_shadow) look |= request::kShadow;
  if (cpu.mp_state == MpState::kSipiReceived) {
    cpu.mp_state = MpState::kInitReceived;
    startup_vector_ = static_cast<uint8_t>(cpu.events.sipi_vector);
    look |= request::kSipi;
  }
  SetRequest(cpu, look);
  UpdateMode(cpu);
  FlushBlocks(cpu);
  if (jit_) jit_->Flush();
  return {};
}

Result<> SoftVcpu::GetState(X86State* state) {
  for (unsigned i = 0; i < 16; i++) state->gpr[i] = cpu.gpr[i];
  state->rip = cpu.rip;
  state->rflags = cpu.rflags;
  for (unsigned i = 0; i < kSegCount; i++) state->seg[i] = cpu.seg[i];
  state->ldtr = cpu.ldtr;
  state->tr = cpu.tr;
  state->gdtr = cpu.gdtr;
  state->idtr = cpu.idtr;
  state->cr0 = cpu.cr0;
  state->cr2 = cpu.cr2;
  state->cr3 = cpu.cr3;
  state->cr4 = cpu.cr4;
  state->cr8 = lapic_.cr8();
  state->efer = cpu.efer;
  state->apic_base = cpu.apic_base;
  state->xcr0 = cpu.xcr0;
  for (unsigned i = 0; i < 8; i++) state->dr[i] = cpu.dr[i];
  XsaveArea area = cpu.fpu;
  area.xstate_bv = limits_.xcr0 & 7 ? limits_.xcr0 & 7 : 3;
  area.xcomp_bv = 0;
  const auto* bytes = reinterpret_cast<const uint8_t*>(&area);
  state->xsave.assign(bytes, bytes + (limits_.xcr0 & 4 ? sizeof(area) : 576));
  state->msrs.clear();
  ListMsrs(
      cpu,
      [](uint32_t index, uint64_t value, void* context) {
        (*static_cast<X86State*>(context)).msrs[index] = value;
      },
      state);
  lapic_.Save(state->lapic.data());
  state->events = cpu.events;
  if (__atomic_load_n(&cpu.requests, __ATOMIC_SEQ_CST) & request::kNmi)
    state->events.nmi_pending = true;
  state->mp_state = cpu.mp_state;
  if (__atomic_load_n(&cpu.requests, __ATOMIC_SEQ_CST) & request::kHalt)
    state->mp_state = MpState::kHalted;
  return {};
}

Result<> SoftVcpu::Reset() {
  msrs = MsrState{};
  pic_output_ = false;
  external_interrupt_ = false;
  X86State state = ResetState(index_, lapic_.apic_id(), cpuid_.Lookup(1, 0).eax);
  // The TSC goes on with the machine's clock, so that it is the same on every CPU.
  state.msrs.erase(0x10);
  TRY(SetState(state));
  cpu.insn_count = 0;
  return {};
}

}  // namespace kvartz::cpu::x86
