// The architectural state of one x86-64 CPU, the same for every engine: what is saved, migrated,
// shown and compared. Intel SDM vol. 3 ch. 2; AMD APM vol. 2.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "base/state_visitor.h"

namespace kvartz::cpu {

enum Gpr : uint8_t {
  kRax,
  kRcx,
  kRdx,
  kRbx,
  kRsp,
  kRbp,
  kRsi,
  kRdi,
  kR8,
  kR9,
  kR10,
  kR11,
  kR12,
  kR13,
  kR14,
  kR15
};
enum SegReg : uint8_t { kEs, kCs, kSs, kDs, kFs, kGs, kSegCount };

// Descriptor cache. `attributes` in VMX order: type(0-3) s(4) dpl(5-6) p(7) avl(12) l(13) db(14)
// g(15) unusable(16).
struct Segment {
  uint64_t base = 0;
  uint32_t limit = 0;  // in bytes, granularity applied
  uint32_t attributes = 0;
  uint16_t selector = 0;

  static constexpr uint32_t kTypeMask = 0xf, kS = 1 << 4, kP = 1 << 7, kAvl = 1 << 12, kL = 1 << 13,
                            kDb = 1 << 14, kG = 1 << 15, kUnusable = 1 << 16;
  unsigned type() const { return attributes & kTypeMask; }
  unsigned dpl() const { return (attributes >> 5) & 3; }
};

struct TableRegister {
  uint64_t base = 0;
  uint16_t limit = 0;
};

// Events under way, in the terms of struct kvm_vcpu_events.
struct PendingEvents {
  bool exception_pending = false, exception_has_error = false;
  uint8_t exception_vector = 0;
  uint32_t exception_error = 0;
  bool interrupt_injected = false;
  uint8_t interrupt_vector = 0;
  uint8_t interrupt_shadow = 0;  // 1: after MOV SS, 2: after STI
  bool nmi_injected = false, nmi_pending = false, nmi_masked = false;
  uint32_t sipi_vector = 0;
};

// Values as KVM_MP_STATE_*.
enum class MpState : uint8_t { kRunnable, kUninitialized, kInitReceived, kHalted, kSipiReceived };

struct X86State {
  std::array<uint64_t, 16> gpr{};
  uint64_t rip = 0;
  uint64_t rflags = 2;
  std::array<Segment, kSegCount> seg{};
  Segment ldtr, tr;
  TableRegister gdtr, idtr;
  uint64_t cr0 = 0, cr2 = 0, cr3 = 0, cr4 = 0, cr8 = 0;
  uint64_t efer = 0;
  uint64_t apic_base = 0;
  uint64_t xcr0 = 1;
  std::array<uint64_t, 8> dr{};       // 4 and 5 unused
  std::vector<uint8_t> xsave;         // standard (non-compacted) format, header included
  std::map<uint32_t, uint64_t> msrs;  // all others, by index
  std::array<uint8_t, 1024> lapic{};  // register page, xAPIC layout, as KVM_GET_LAPIC
  PendingEvents events;
  MpState mp_state = MpState::kRunnable;

  void VisitState(StateVisitor& visitor);
};

// The state after RESET (SDM vol. 3 table 10-1) for CPU `index`; index 0 is the bootstrap
// processor, whose LINT0 is set up for the 8259 (virtual wire, MP specification 3.6.2.2), since
// direct boot has no firmware that would do it. `signature`: EAX of CPUID leaf 1, found in EDX. The
// XSAVE area has the legacy region and header only; an engine extends it with zeros.
X86State ResetState(unsigned index, uint32_t apic_id, uint32_t signature);
X86State ResetState(unsigned index);

}  // namespace kvartz::cpu
