// Vector and x87 instructions: those of NATIVE rows, and masked moves and gathers, whose elements
// may fault one by one.
#include <algorithm>
#include <array>
#include <bit>

#include "cpu/x86/interp/native.h"
#include "cpu/x86/interp/vector_plan.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86 {

void CheckVectorEnabled(Cpu& cpu, VectorClass vector_class) {
  switch (vector_class) {
    case VectorClass::kX87:
      if (cpu.cr0 & (cr0::kEm | cr0::kTs)) Raise(cpu, kNM);
      return;
    case VectorClass::kMmx:
      if (cpu.cr0 & cr0::kEm) Raise(cpu, kUD);
      break;
    case VectorClass::kSse:
      if ((cpu.cr0 & cr0::kEm) || !(cpu.cr4 & cr4::kOsfxsr)) Raise(cpu, kUD);
      break;
    case VectorClass::kAvx:
      if (!(cpu.cr4 & cr4::kOsxsave) || (cpu.xcr0 & 6) != 6) Raise(cpu, kUD);
      break;
  }
  if (cpu.cr0 & cr0::kTs) Raise(cpu, kNM);
}

void CheckX87Pending(Cpu& cpu) {
  constexpr uint16_t kErrorSummary = 0x80;
  // With CR0.NE clear the error goes out on FERR#, which this board leaves unconnected: no x86-64
  // system relies on it.
  if ((cpu.fpu.fsw & kErrorSummary) && (cpu.cr0 & cr0::kNe)) Raise(cpu, kMF);
}

void TurnX87(XsaveArea& fpu, unsigned top) {
  const unsigned turn = (((fpu.fsw >> 11) & 7) - top) & 7;
  if (turn == 0) return;
  uint8_t turned[8][16];
  for (unsigned i = 0; i < 8; ++i) std::memcpy(turned[(i + turn) & 7], fpu.st[i], 16);
  std::memcpy(fpu.st, turned, sizeof(fpu.st));
  fpu.fsw = static_cast<uint16_t>((fpu.fsw & ~0x3800) | top << 11);
}

void EnterMmx(XsaveArea& fpu) {
  TurnX87(fpu, 0);
  fpu.ftw = 0xff;
}

namespace {

void LoadVector(const Cpu& cpu, unsigned reg, uint8_t* slot, bool vex) {
  std::memcpy(slot, cpu.fpu.xmm[reg], 16);
  if (vex) std::memcpy(slot + 16, cpu.fpu.ymm_high[reg], 16);
}
void StoreVector(Cpu& cpu, unsigned reg, const uint8_t* slot, bool vex) {
  std::memcpy(cpu.fpu.xmm[reg], slot, 16);
  if (vex) std::memcpy(cpu.fpu.ymm_high[reg], slot + 16, 16);
}

void CheckAlignment(Cpu& cpu, const Insn& insn, uint64_t offset, unsigned size) {
  const uint64_t base =
      cpu.code_mode == CodeMode::k64 && insn.segment < kFs ? 0 : cpu.seg[insn.segment].base;
  if ((base + offset) & (size - 1)) Raise(cpu, kGP, 0);
}

// MMX registers are numbered physically, the XSAVE area's relative to TOP.
uint8_t* MmxRegister(XsaveArea& fpu, unsigned reg) { return fpu.st[(reg - (fpu.fsw >> 11)) & 7]; }

void CommitRegister(Cpu& cpu, const Insn& insn, const VectorPlan& plan, const NativeFrame& frame) {
  const VectorPlan::Register& out = plan.inputs[0];
  const unsigned reg = out.Number(insn);
  switch (out.file) {
    case VectorPlan::File::kVector:
      StoreVector(cpu, reg, frame.vector[out.slot], plan.vex);
      break;
    case VectorPlan::File::kMmx:
      std::memcpy(cpu.fpu.st[reg & 7], frame.vector[out.slot], 8);
      std::memset(cpu.fpu.st[reg & 7] + 8, 0xff, 2);
      break;
    case VectorPlan::File::kGpr:
      cpu.gpr[reg] = frame.gpr;
      break;
  }
}

void ExecX87(Cpu& cpu, const Insn& insn, const VectorPlan& plan) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  CheckX87Pending(cpu);
  NativeFrame frame;
  uint64_t offset = 0;
  if (insn.has_memory()) {
    offset = EffectiveAddress(cpu, insn);
    // A masked response writes the operand, an unmasked one doesn't: what is there must be known in
    // either case.
    if (plan.memory_written) CheckWrite(cpu, insn.seg(), offset, plan.memory_size);
    ReadMemBytes(cpu, insn.seg(), offset, frame.memory, plan.memory_size);
  }
  frame.flags = cpu.rflags & rflags::kStatus;
  XsaveArea& fpu = cpu.fpu;
  const uint32_t mxcsr_mask = fpu.mxcsr_mask;
  const uint64_t fdp = fpu.fdp;  // without a memory operand it stays, whatever the host does
  // With CR0.NE clear a pending error is ignored (as with IGNNE#): masked, or the host would raise
  // it.
  const auto pending = static_cast<uint16_t>(fpu.fsw & ~fpu.fcw & 0x3f);
  const auto control = static_cast<uint16_t>(fpu.fcw | pending);
  if (pending) {
    fpu.fcw = control;
    fpu.fsw = static_cast<uint16_t>(fpu.fsw & ~0x8080);
  }
  FindStub(insn)(&frame, &fpu);
  if (pending && fpu.fcw == control) {
    fpu.fcw = static_cast<uint16_t>(fpu.fcw & ~pending);
    if (fpu.fsw & ~fpu.fcw & 0x3f) fpu.fsw |= 0x8080;
  }
  fpu.mxcsr_mask = mxcsr_mask;
  fpu.fip = cpu.insn_rip;
  fpu.fop = static_cast<uint16_t>((insn.opcode & 7) << 8 | insn.modrm);
  fpu.fdp = insn.has_memory() ? offset : fdp;
  if (plan.memory_written) WriteMemBytes(cpu, insn.seg(), offset, frame.memory, plan.memory_size);
  if (plan.flags_written)
    cpu.rflags = (cpu.rflags & ~rflags::kStatus) | (frame.flags & rflags::kStatus);
}

}  // namespace

void ExecNative(Cpu& cpu, const Insn& insn) {
  const VectorPlan& plan = VectorPlan::Of(*insn.row);
  if (plan.x87) return ExecX87(cpu, insn, plan);
  CheckVectorEnabled(cpu, plan.vector_class);
  NativeFrame frame;
  uint64_t offset = 0;
  const bool memory = insn.has_memory();
  const bool mmx = plan.mmx && !(memory && plan.mmx_in_rm);
  const unsigned memory_size = plan.MemorySize(insn);
  if (mmx) CheckX87Pending(cpu);
  if (memory) {
    offset = EffectiveAddress(cpu, insn);
    if (plan.align) CheckAlignment(cpu, insn, offset, memory_size);
    if (!plan.memory_written) {
      ReadMemBytes(cpu, insn.seg(), offset, frame.memory, memory_size);
    } else if (plan.fp) {
      CheckWrite(cpu, insn.seg(), offset, memory_size);  // a page fault leaves MXCSR alone
    }
  }
  for (unsigned i = 0; i < plan.input_count; ++i) {
    const VectorPlan::Register& in = plan.inputs[i];
    if (in.is_rm && memory) continue;
    const unsigned reg = in.Number(insn);
    switch (in.file) {
      case VectorPlan::File::kVector:
        LoadVector(cpu, reg, frame.vector[in.slot], plan.vex);
        break;
      case VectorPlan::File::kMmx:
        std::memcpy(frame.vector[in.slot], MmxRegister(cpu.fpu, reg), 8);
        break;
      case VectorPlan::File::kGpr:
        frame.gpr = cpu.gpr[reg];
        break;
    }
  }
  if (plan.string_lengths) {
    frame.rax = cpu.gpr[kRax];
    frame.rdx = cpu.gpr[kRdx];
  }
  bool completed = true;
  if (plan.fp) {
    frame.mxcsr = cpu.fpu.mxcsr & ~0x3fu;
    completed = CallWithMxcsr(FindStub(insn), frame, cpu.fpu);
  } else {
    FindStub(insn)(&frame, &cpu.fpu);
  }
  if (mmx && !plan.memory_written) EnterMmx(cpu.fpu);  // before a SIMD exception is reported
  if (plan.fp) cpu.fpu.mxcsr |= frame.mxcsr & 0x3f;
  if (!completed) Raise(cpu, (cpu.cr4 & cr4::kOsxmmexcpt) ? kXM : kUD);
  const bool to_memory = plan.memory_written && memory;
  if (to_memory) WriteMemBytes(cpu, insn.seg(), offset, frame.memory, memory_size);
  if (mmx) EnterMmx(cpu.fpu);
  if (plan.writes_register && !to_memory) CommitRegister(cpu, insn, plan, frame);
  if (plan.string_index) cpu.gpr[kRcx] = static_cast<uint32_t>(frame.rcx);
  if (plan.string_mask) StoreVector(cpu, 0, frame.vector[0], plan.vex);
  if (plan.flags_written)
    cpu.rflags = (cpu.rflags & ~rflags::kStatus) | (frame.flags & rflags::kStatus);
}

// ---- MASKMOVQ, MASKMOVDQU: bytes selected by the mask's sign bits go to DS:rDI (SDM vol. 2).
namespace {

void MaskMove(Cpu& cpu, const Insn& insn, const uint8_t* data, const uint8_t* mask,
              unsigned count) {
  const uint64_t address_mask = insn.address_size == 8   ? ~0ull
                                : insn.address_size == 4 ? 0xffffffffull
                                                         : 0xffffull;
  // All bytes are checked before one is written.
  for (unsigned i = 0; i < count; ++i) {
    if (mask[i] & 0x80) CheckWrite(cpu, insn.seg(), (cpu.gpr[kRdi] + i) & address_mask, 1);
  }
  for (unsigned i = 0; i < count; ++i) {
    if (mask[i] & 0x80)
      WriteMem<uint8_t>(cpu, insn.seg(), (cpu.gpr[kRdi] + i) & address_mask, data[i]);
  }
}

}  // namespace

void Exec_MASKMOVQ(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kMmx);
  CheckX87Pending(cpu);
  EnterMmx(cpu.fpu);
  MaskMove(cpu, insn, cpu.fpu.st[insn.reg & 7], cpu.fpu.st[insn.rm & 7], 8);
}
void Exec_MASKMOVDQU(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kSse);
  MaskMove(cpu, insn, cpu.fpu.xmm[insn.reg], cpu.fpu.xmm[insn.rm], 16);
}
void Exec_VMASKMOVDQU(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kAvx);
  MaskMove(cpu, insn, cpu.fpu.xmm[insn.reg], cpu.fpu.xmm[insn.rm], 16);
}

void Exec_EMMS(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kMmx);
  CheckX87Pending(cpu);
  EnterMmx(cpu.fpu);
  cpu.fpu.ftw = 0;
}

void Exec_VZEROUPPER(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kAvx);
  const unsigned count = cpu.code_mode == CodeMode::k64 ? 16 : 8;
  std::memset(cpu.fpu.ymm_high, 0, count * 16);
}
void Exec_VZEROALL(Cpu& cpu, const Insn& insn) {
  Exec_VZEROUPPER(cpu, insn);
  std::memset(cpu.fpu.xmm, 0, (cpu.code_mode == CodeMode::k64 ? 16 : 8) * 16);
}

// ---- VMASKMOVPS/PD, VPMASKMOVD/Q: elements whose mask bit is clear are neither read nor written,
// and don't fault.
namespace {

struct Vector256 {
  alignas(32) uint8_t bytes[32] = {};
};

Vector256 Get(const Cpu& cpu, unsigned reg) {
  Vector256 value;
  LoadVector(cpu, reg, value.bytes, true);
  return value;
}

// The sign bit of element `index`.
bool Selected(const Vector256& mask, unsigned index, unsigned element_size) {
  return (mask.bytes[(index + 1) * element_size - 1] & 0x80) != 0;
}

void MaskedMove(Cpu& cpu, const Insn& insn, unsigned element_size, bool store) {
  CheckVectorEnabled(cpu, VectorClass::kAvx);
  const unsigned size = insn.vex_l ? 32 : 16;
  const uint64_t offset = EffectiveAddress(cpu, insn);
  const Vector256 mask = Get(cpu, insn.vvvv);
  if (store) {
    const Vector256 data = Get(cpu, insn.reg);
    for (unsigned i = 0; i < size / element_size; ++i) {
      if (Selected(mask, i, element_size))
        CheckWrite(cpu, insn.seg(), offset + i * element_size, element_size);
    }
    for (unsigned i = 0; i < size / element_size; ++i) {
      if (!Selected(mask, i, element_size)) continue;
      WriteMemBytes(cpu, insn.seg(), offset + i * element_size, data.bytes + i * element_size,
                    element_size);
    }
    return;
  }
  Vector256 result;
  for (unsigned i = 0; i < size / element_size; ++i) {
    if (!Selected(mask, i, element_size)) continue;
    ReadMemBytes(cpu, insn.seg(), offset + i * element_size, result.bytes + i * element_size,
                 element_size);
  }
  StoreVector(cpu, insn.reg, result.bytes, true);
}

}  // namespace

void Exec_VMASKMOVPS(Cpu& cpu, const Insn& insn) { MaskedMove(cpu, insn, 4, insn.opcode == 0x2e); }
void Exec_VMASKMOVPD(Cpu& cpu, const Insn& insn) { MaskedMove(cpu, insn, 8, insn.opcode == 0x2f); }
void Exec_VPMASKMOVD(Cpu& cpu, const Insn& insn) { MaskedMove(cpu, insn, 4, insn.opcode == 0x8e); }
void Exec_VPMASKMOVQ(Cpu& cpu, const Insn& insn) { MaskedMove(cpu, insn, 8, insn.opcode == 0x8e); }

// ---- Gathers (SDM vol. 2, VGATHERDPS): elements are loaded in order; each one done clears its
// mask element, so a fault leaves a restartable state. Destination, mask and index must be three
// registers (#UD).
namespace {

uint64_t GatherAddress(const Cpu& cpu, const Insn& insn, int64_t index) {
  const uint64_t address = AddressRegister(cpu, insn.base) +
                           (static_cast<uint64_t>(index) << insn.scale) +
                           static_cast<uint64_t>(insn.disp);
  return insn.address_size == 8 ? address : static_cast<uint32_t>(address);
}

void Gather(Cpu& cpu, const Insn& insn, unsigned index_size, unsigned element_size) {
  CheckVectorEnabled(cpu, VectorClass::kAvx);
  if (insn.reg == insn.index || insn.reg == insn.vvvv || insn.index == insn.vvvv) Raise(cpu, kUD);
  const unsigned count = (insn.vex_l ? 32u : 16u) / std::max(index_size, element_size);
  const Vector256 indices = Get(cpu, insn.index);
  Vector256 mask = Get(cpu, insn.vvvv);
  Vector256 result = Get(cpu, insn.reg);
  // A selected element's mask is all ones while it waits.
  for (unsigned i = 0; i < 32 / element_size; ++i) {
    std::memset(mask.bytes + i * element_size,
                i < count && Selected(mask, i, element_size) ? 0xff : 0, element_size);
  }
  std::memset(result.bytes + count * element_size, 0, 32 - count * element_size);
  for (unsigned i = 0; i < count; ++i) {
    if (!Selected(mask, i, element_size)) continue;
    int64_t index = 0;
    if (index_size == 4) {
      int32_t narrow;
      std::memcpy(&narrow, indices.bytes + i * 4, 4);
      index = narrow;
    } else {
      std::memcpy(&index, indices.bytes + i * 8, 8);
    }
    // State as of the elements done so far, in case this one faults.
    if (i != 0) {
      StoreVector(cpu, insn.reg, result.bytes, true);
      StoreVector(cpu, insn.vvvv, mask.bytes, true);
    }
    ReadMemBytes(cpu, insn.seg(), GatherAddress(cpu, insn, index), result.bytes + i * element_size,
                 element_size);
    std::memset(mask.bytes + i * element_size, 0, element_size);
  }
  StoreVector(cpu, insn.reg, result.bytes, true);
  StoreVector(cpu, insn.vvvv, Vector256().bytes, true);
}

}  // namespace

void Exec_VPGATHERDD(Cpu& cpu, const Insn& insn) { Gather(cpu, insn, 4, 4); }
void Exec_VPGATHERDQ(Cpu& cpu, const Insn& insn) { Gather(cpu, insn, 4, 8); }
void Exec_VPGATHERQD(Cpu& cpu, const Insn& insn) { Gather(cpu, insn, 8, 4); }
void Exec_VPGATHERQQ(Cpu& cpu, const Insn& insn) { Gather(cpu, insn, 8, 8); }
void Exec_VGATHERDPS(Cpu& cpu, const Insn& insn) { Gather(cpu, insn, 4, 4); }
void Exec_VGATHERDPD(Cpu& cpu, const Insn& insn) { Gather(cpu, insn, 4, 8); }
void Exec_VGATHERQPS(Cpu& cpu, const Insn& insn) { Gather(cpu, insn, 8, 4); }
void Exec_VGATHERQPD(Cpu& cpu, const Insn& insn) { Gather(cpu, insn, 8, 8); }

}  // namespace kvartz::cpu::x86
