// The state of a vCPU, between KVM's structures and X86State.
#include <fmt/core.h>

#include <algorithm>
#include <cstring>

#include "base/log.h"
#include "cpu/kvm/kvm_accel.h"
#include "cpu/kvm/kvm_api.h"
#include "cpu/kvm/kvm_vcpu.h"

namespace kvartz::cpu::kvm {
namespace {

constexpr uint32_t kMsrTsc = 0x10;
constexpr uint32_t kMsrTscDeadline = 0x6e0;

// KVM's registers in the order of Gpr.
constexpr __u64 kvm_regs::* kGprs[16] = {
    &kvm_regs::rax, &kvm_regs::rcx, &kvm_regs::rdx, &kvm_regs::rbx, &kvm_regs::rsp, &kvm_regs::rbp,
    &kvm_regs::rsi, &kvm_regs::rdi, &kvm_regs::r8,  &kvm_regs::r9,  &kvm_regs::r10, &kvm_regs::r11,
    &kvm_regs::r12, &kvm_regs::r13, &kvm_regs::r14, &kvm_regs::r15};
constexpr kvm_segment kvm_sregs2::* kSegments[kSegCount] = {&kvm_sregs2::es, &kvm_sregs2::cs,
                                                            &kvm_sregs2::ss, &kvm_sregs2::ds,
                                                            &kvm_sregs2::fs, &kvm_sregs2::gs};

Segment FromKvm(const kvm_segment& from) {
  Segment to{.base = from.base, .limit = from.limit, .selector = from.selector};
  to.attributes = from.type | uint32_t{from.s} << 4 | uint32_t{from.dpl} << 5 |
                  uint32_t{from.present} << 7 | uint32_t{from.avl} << 12 | uint32_t{from.l} << 13 |
                  uint32_t{from.db} << 14 | uint32_t{from.g} << 15 | uint32_t{from.unusable} << 16;
  return to;
}

kvm_segment ToKvm(const Segment& from) {
  kvm_segment to{};
  auto bit = [&](uint32_t mask) { return static_cast<uint8_t>((from.attributes & mask) != 0); };
  to.base = from.base;
  to.limit = from.limit;
  to.selector = from.selector;
  to.type = static_cast<uint8_t>(from.type());
  to.s = bit(Segment::kS);
  to.dpl = static_cast<uint8_t>(from.dpl());
  to.present = bit(Segment::kP);
  to.avl = bit(Segment::kAvl);
  to.l = bit(Segment::kL);
  to.db = bit(Segment::kDb);
  to.g = bit(Segment::kG);
  to.unusable = bit(Segment::kUnusable);
  return to;
}

kvm_dtable ToKvm(const TableRegister& from) {
  kvm_dtable to{};
  to.base = from.base;
  to.limit = from.limit;
  return to;
}

void GetRegs(const kvm_regs& regs, const kvm_sregs2& sregs, X86State* state) {
  for (unsigned i = 0; i < 16; ++i) state->gpr[i] = regs.*kGprs[i];
  state->rip = regs.rip;
  state->rflags = regs.rflags;
  for (unsigned i = 0; i < kSegCount; ++i) state->seg[i] = FromKvm(sregs.*kSegments[i]);
  state->ldtr = FromKvm(sregs.ldt);
  state->tr = FromKvm(sregs.tr);
  state->gdtr = {sregs.gdt.base, sregs.gdt.limit};
  state->idtr = {sregs.idt.base, sregs.idt.limit};
  state->cr0 = sregs.cr0;
  state->cr2 = sregs.cr2;
  state->cr3 = sregs.cr3;
  state->cr4 = sregs.cr4;
  state->cr8 = sregs.cr8;
  state->efer = sregs.efer;
  state->apic_base = sregs.apic_base;
}

kvm_regs RegsOf(const X86State& state) {
  kvm_regs regs{};
  for (unsigned i = 0; i < 16; ++i) regs.*kGprs[i] = state.gpr[i];
  regs.rip = state.rip;
  regs.rflags = state.rflags;
  return regs;
}

// Without PDPTRs: KVM reads them from memory.
kvm_sregs2 SregsOf(const X86State& state) {
  kvm_sregs2 sregs{};
  for (unsigned i = 0; i < kSegCount; ++i) sregs.*kSegments[i] = ToKvm(state.seg[i]);
  sregs.ldt = ToKvm(state.ldtr);
  sregs.tr = ToKvm(state.tr);
  sregs.gdt = ToKvm(state.gdtr);
  sregs.idt = ToKvm(state.idtr);
  sregs.cr0 = state.cr0;
  sregs.cr2 = state.cr2;
  sregs.cr3 = state.cr3;
  sregs.cr4 = state.cr4;
  sregs.cr8 = state.cr8;
  sregs.efer = state.efer;
  sregs.apic_base = state.apic_base;
  return sregs;
}

PendingEvents FromKvm(const kvm_vcpu_events& from) {
  PendingEvents to;
  to.exception_pending = from.exception.injected != 0;
  to.exception_vector = from.exception.nr;
  to.exception_has_error = from.exception.has_error_code != 0;
  to.exception_error = from.exception.error_code;
  to.interrupt_injected = from.interrupt.injected != 0 && from.interrupt.soft == 0;
  to.interrupt_vector = from.interrupt.nr;
  to.interrupt_shadow = from.interrupt.shadow;
  to.nmi_injected = from.nmi.injected != 0;
  to.nmi_pending = from.nmi.pending != 0;
  to.nmi_masked = from.nmi.masked != 0;
  to.sipi_vector = from.sipi_vector;
  return to;
}

kvm_vcpu_events ToKvm(const PendingEvents& from) {
  kvm_vcpu_events to{};
  to.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR |
             KVM_VCPUEVENT_VALID_SHADOW;
  to.exception.injected = from.exception_pending;
  to.exception.nr = from.exception_pending ? from.exception_vector : 0;
  to.exception.has_error_code = from.exception_has_error;
  to.exception.error_code = from.exception_error;
  to.interrupt.injected = from.interrupt_injected;
  to.interrupt.nr = from.interrupt_vector;
  to.interrupt.shadow = from.interrupt_shadow;
  to.nmi.injected = from.nmi_injected;
  to.nmi.pending = from.nmi_pending;
  to.nmi.masked = from.nmi_masked;
  to.sipi_vector = from.sipi_vector;
  return to;
}

kvm_msr_entry Entry(uint32_t index, uint64_t value = 0) {
  kvm_msr_entry entry{};
  entry.index = index;
  entry.data = value;
  return entry;
}

// kvm_msrs with room for `count` entries.
class MsrBuffer {
 public:
  explicit MsrBuffer(size_t count)
      : bytes_(sizeof(kvm_msrs) + count * sizeof(kvm_msr_entry)),
        header_(new(bytes_.data()) kvm_msrs{}) {}
  kvm_msrs* operator->() { return header_; }
  kvm_msrs* get() { return header_; }

 private:
  std::vector<char> bytes_;
  kvm_msrs* header_;
};

}  // namespace

// The first call finds out which of KVM's MSRs this CPU has: KVM_GET_MSRS stops at one that it
// hasn't.
Result<> KvmVcpu::GetMsrs(X86State* state) {
  bool learn = msr_list_.empty();
  std::vector<uint32_t> wanted = learn ? accel_.SavedMsrs() : msr_list_;
  state->msrs.clear();
  MsrBuffer buffer(wanted.size());
  for (size_t at = 0; at < wanted.size();) {
    size_t count = wanted.size() - at;
    for (size_t i = 0; i < count; ++i) buffer->entries[i] = Entry(wanted[at + i]);
    buffer->nmsrs = static_cast<uint32_t>(count);
    auto got = static_cast<size_t>(TRY(KVM_CALL(fd_.get(), KVM_GET_MSRS, buffer.get())));
    for (size_t i = 0; i < got; ++i) {
      state->msrs[buffer->entries[i].index] = buffer->entries[i].data;
    }
    at += got + 1;
  }
  if (learn) {
    for (const auto& [index, value] : state->msrs) msr_list_.push_back(index);
  }
  return {};
}

// An MSR that can't be set is no error if it holds the value already (a read-only one).
Result<> KvmVcpu::SetMsrs(const X86State& state, bool deadline) {
  std::vector<kvm_msr_entry> entries;
  for (const auto& [index, value] : state.msrs) {
    if ((index == kMsrTscDeadline) == deadline) entries.push_back(Entry(index, value));
  }
  MsrBuffer buffer(entries.size());
  for (size_t at = 0; at < entries.size();) {
    size_t count = entries.size() - at;
    std::memcpy(buffer->entries, &entries[at], count * sizeof(kvm_msr_entry));
    buffer->nmsrs = static_cast<uint32_t>(count);
    at += static_cast<size_t>(TRY(KVM_CALL(fd_.get(), KVM_SET_MSRS, buffer.get())));
    if (at == entries.size()) break;
    MsrBuffer present(1);
    present->nmsrs = 1;
    present->entries[0] = Entry(entries[at].index);
    int got = Ioctl(fd_.get(), KVM_GET_MSRS, present.get());
    if (got != 1 && entries[at].data == 0) {
      ++at;  // not there, and zero is what it would be
    } else if (got == 1 && present->entries[0].data == entries[at].data) {
      ++at;
    } else {
      return kvartz::Fail(ErrorCode::kUnsupported,
                          fmt::format("KVM: CPU {} can't take MSR {:#x} = {:#x} here", index_,
                                      uint32_t{entries[at].index}, uint64_t{entries[at].data}));
    }
  }
  return {};
}

Result<> KvmVcpu::GetExtended(X86State* state) {
  state->xsave.assign(accel_.xsave_bytes(), 0);
  bool large = accel_.xsave_bytes() > sizeof(kvm_xsave);
  TRY(Call(fd_.get(), large ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, state->xsave.data(),
           "KVM_GET_XSAVE2"));
  kvm_xcrs xcrs{};
  TRY(KVM_CALL(fd_.get(), KVM_GET_XCRS, &xcrs));
  for (uint32_t i = 0; i < std::min<uint32_t>(xcrs.nr_xcrs, KVM_MAX_XCRS); ++i) {
    if (xcrs.xcrs[i].xcr == 0) state->xcr0 = xcrs.xcrs[i].value;
  }
  return {};
}

Result<> KvmVcpu::SetExtended(const X86State& state) {
  std::vector<uint8_t> area = state.xsave;
  size_t size = accel_.xsave_bytes();
  bool lost = std::any_of(area.begin() + static_cast<ptrdiff_t>(std::min(size, area.size())),
                          area.end(), [](uint8_t byte) { return byte != 0; });
  if (lost) {
    return kvartz::Fail(
        ErrorCode::kUnsupported,
        fmt::format("KVM: this host's CPU lacks the register state of {} bytes that "
                    "CPU {} was saved with",
                    area.size(), index_));
  }
  area.resize(size);
  TRY(KVM_CALL(fd_.get(), KVM_SET_XSAVE, area.data()));
  kvm_xcrs xcrs{};
  xcrs.nr_xcrs = 1;
  xcrs.xcrs[0].value = state.xcr0;
  // A CPU without XSAVE has no XCR0 to set.
  if (state.xcr0 != 1) TRY(KVM_CALL(fd_.get(), KVM_SET_XCRS, &xcrs));
  return {};
}

Result<> KvmVcpu::GetState(X86State* state) {
  kvm_regs regs{};
  kvm_sregs2 sregs{};
  kvm_mp_state mp_state{};
  kvm_vcpu_events events{};
  kvm_debugregs debug{};
  TRY(KVM_CALL(fd_.get(), KVM_GET_MP_STATE, &mp_state));
  TRY(KVM_CALL(fd_.get(), KVM_GET_REGS, &regs));
  TRY(KVM_CALL(fd_.get(), KVM_GET_SREGS2, &sregs));
  TRY(KVM_CALL(fd_.get(), KVM_GET_VCPU_EVENTS, &events));
  TRY(KVM_CALL(fd_.get(), KVM_GET_DEBUGREGS, &debug));
  GetRegs(regs, sregs, state);
  TRY(GetExtended(state));
  TRY(GetMsrs(state));
  if (frozen_tsc_) state->msrs[kMsrTsc] = *frozen_tsc_;
  std::copy_n(debug.db, 4, state->dr.begin());
  state->dr[6] = debug.dr6;
  state->dr[7] = debug.dr7;
  kvm_lapic_state lapic{};
  TRY(KVM_CALL(fd_.get(), KVM_GET_LAPIC, &lapic));
  std::memcpy(state->lapic.data(), lapic.regs, state->lapic.size());
  state->events = FromKvm(events);
  state->mp_state = static_cast<MpState>(
      std::min<uint32_t>(mp_state.mp_state, static_cast<uint32_t>(MpState::kSipiReceived)));
  return {};
}

// In this order: the APIC's mode (apic_base) before its page, the clock before what is timed by it,
// pending events last.
Result<> KvmVcpu::SetState(const X86State& state) {
  TRY(LeaveResetState());
  kvm_regs regs = RegsOf(state);
  kvm_sregs2 sregs = SregsOf(state);
  kvm_vcpu_events events = ToKvm(state.events);
  kvm_debugregs debug{};
  std::copy_n(state.dr.begin(), 4, debug.db);
  debug.dr6 = state.dr[6];
  debug.dr7 = state.dr[7];
  kvm_lapic_state lapic{};
  std::memcpy(lapic.regs, state.lapic.data(), state.lapic.size());
  kvm_mp_state mp_state{};
  mp_state.mp_state = static_cast<uint32_t>(state.mp_state);

  TRY(KVM_CALL(fd_.get(), KVM_SET_REGS, &regs));
  TRY(SetExtended(state));
  TRY(KVM_CALL(fd_.get(), KVM_SET_SREGS2, &sregs));
  TRY(SetMsrs(state, false));
  TRY(KVM_CALL(fd_.get(), KVM_SET_DEBUGREGS, &debug));
  TRY(KVM_CALL(fd_.get(), KVM_SET_LAPIC, &lapic));
  TRY(SetMsrs(state, true));
  TRY(KVM_CALL(fd_.get(), KVM_SET_MP_STATE, &mp_state));
  TRY(KVM_CALL(fd_.get(), KVM_SET_VCPU_EVENTS, &events));
  if (auto tsc = state.msrs.find(kMsrTsc); tsc != state.msrs.end()) frozen_tsc_ = tsc->second;
  return {};
}

// As made by KVM, a vCPU is in its reset state; what its MSRs hold then is kept for later resets.
Result<> KvmVcpu::LeaveResetState() {
  if (!untouched_) return {};
  untouched_ = false;
  X86State state;
  TRY(GetMsrs(&state));
  reset_msrs_ = std::move(state.msrs);
  return {};
}

Result<> KvmVcpu::Reset() {
  if (untouched_) return {};
  X86State state = ResetState(index_, apic_id_, signature_);
  for (auto& [index, value] : reset_msrs_) state.msrs[index] = value;
  state.msrs[kMsrTsc] = 0;
  return SetState(state);
}

std::optional<int64_t> KvmVcpu::TscOffset() const {
  int64_t offset = 0;
  kvm_device_attr attribute{};
  attribute.group = KVM_VCPU_TSC_CTRL;
  attribute.attr = KVM_VCPU_TSC_OFFSET;
  attribute.addr = reinterpret_cast<uintptr_t>(&offset);
  if (Ioctl(fd_.get(), KVM_GET_DEVICE_ATTR, &attribute) < 0) return std::nullopt;
  return offset;
}

void KvmVcpu::SetTscOffset(int64_t offset) {
  kvm_device_attr attribute{};
  attribute.group = KVM_VCPU_TSC_CTRL;
  attribute.attr = KVM_VCPU_TSC_OFFSET;
  attribute.addr = reinterpret_cast<uintptr_t>(&offset);
  Ioctl(fd_.get(), KVM_SET_DEVICE_ATTR, &attribute);
}

void KvmVcpu::FreezeTsc(uint64_t host_tsc) {
  if (std::optional<int64_t> offset = TscOffset()) {
    frozen_tsc_ = host_tsc + static_cast<uint64_t>(*offset);
  }
}

void KvmVcpu::ThawTsc(uint64_t host_tsc) {
  if (frozen_tsc_) SetTscOffset(static_cast<int64_t>(*frozen_tsc_ - host_tsc));
  frozen_tsc_.reset();
  Ioctl(fd_.get(),
        KVM_KVMCLOCK_CTRL);  // the guest's watchdogs may know; not every guest has the clock
}

}  // namespace kvartz::cpu::kvm
