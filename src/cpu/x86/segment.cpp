#include "cpu/x86/segment.h"

#include <algorithm>

#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86 {

namespace {

// Segments whose base is 0 and whose limit can't be exceeded.
bool IsFlat(const Segment& s) {
  return s.base == 0 && s.limit == 0xffffffff && !(s.attributes & Segment::kUnusable) &&
         (s.attributes & (Segment::kS | Segment::kP)) == (Segment::kS | Segment::kP) &&
         (s.type() & 0xc) != 4;
}

// `checked`: types count (protected mode).
void SetSegmentEnds(Cpu& cpu, unsigned seg, bool checked) {
  const Segment& s = cpu.seg[seg];
  const bool code = s.type() & 8, expands_down = (s.type() & 0xc) == 4;
  const bool usable = !expands_down && !(checked && (s.attributes & Segment::kUnusable));
  const bool readable = usable && (!checked || !code || (s.type() & 2));
  const bool writable = usable && (!checked || (!code && (s.type() & 2)));
  const uint64_t end = uint64_t{s.limit} + 1, end16 = std::min<uint64_t>(end, 0x10000);
  cpu.segment_end[0][0][seg] = readable ? end : 0;
  cpu.segment_end[0][1][seg] = writable ? end : 0;
  cpu.segment_end[1][0][seg] = readable ? end16 : 0;
  cpu.segment_end[1][1][seg] = writable ? end16 : 0;
}

bool InstructionBreakpoints(const Cpu& cpu) {
  for (unsigned i = 0; i < 4; i++) {
    if ((cpu.dr[7] >> (2 * i) & 3) && !(cpu.dr[7] >> (16 + 4 * i) & 3)) return true;
  }
  return false;
}

}  // namespace

void UpdateMode(Cpu& cpu) {
  const Segment& cs = cpu.seg[kCs];
  bool is64 = cpu.long_mode() && (cs.attributes & Segment::kL);
  cpu.code_mode = is64                           ? CodeMode::k64
                  : cs.attributes & Segment::kDb ? CodeMode::k32
                                                 : CodeMode::k16;
  cpu.cpl = static_cast<uint8_t>(cpu.seg[kSs].dpl());
  cpu.stack_size = is64 ? 8 : cpu.seg[kSs].attributes & Segment::kDb ? 4 : 2;
  if (is64) {
    cpu.flat_read = cpu.flat_write = 1 << kEs | 1 << kCs | 1 << kSs | 1 << kDs;
    cpu.flat_segments = true;
  } else {
    bool checked = cpu.protected_mode() && !cpu.virtual_8086();
    cpu.flat_read = cpu.flat_write = 0;
    for (unsigned i = 0; i < kSegCount; i++) {
      const Segment& s = cpu.seg[i];
      SetSegmentEnds(cpu, i, checked);
      if (!IsFlat(s)) continue;
      bool code = s.type() & 8;
      if (!checked || !code || (s.type() & 2)) cpu.flat_read |= static_cast<uint8_t>(1 << i);
      if (!checked || (!code && (s.type() & 2))) cpu.flat_write |= static_cast<uint8_t>(1 << i);
    }
    cpu.flat_segments = (cpu.flat_read & 0xf) == 0xf;
  }
  if (cpu.tlb) {
    bool user = cpu.cpl == 3;
    bool ac = cpu.rflags & rflags::kAc;
    Tlb::Class data = user ? (ac && (cpu.cr0 & cr0::kAm) ? Tlb::kNever : Tlb::kUser)
                           : (ac && (cpu.cr4 & cr4::kSmap) ? Tlb::kNoSmap : Tlb::kSupervisor);
    cpu.tlb->SetClasses(data, user ? Tlb::kUser : Tlb::kSupervisor);
  }
  bool step = (cpu.rflags & (rflags::kTf | rflags::kRf)) ||
              ((cpu.dr[7] & 0xff) && InstructionBreakpoints(cpu));
  if (step) {
    if (!(cpu.requests & request::kStep)) SetRequest(cpu, request::kStep);
  } else if (cpu.requests & request::kStep) {
    ClearRequest(cpu, request::kStep);
  }
}

void SetRflags(Cpu& cpu, uint64_t value) {
  uint64_t changed = cpu.rflags ^ value;
  cpu.rflags = value;
  if (changed & (rflags::kTf | rflags::kRf | rflags::kAc | rflags::kVm)) UpdateMode(cpu);
  if ((changed & value & rflags::kIf) && cpu.interrupt_waiting)
    SetRequest(cpu, request::kInterrupt);
}

static bool DescriptorAddress(Cpu& cpu, uint16_t selector, unsigned size, uint64_t* address) {
  uint64_t base = cpu.gdtr.base, limit = cpu.gdtr.limit;
  if (selector & 4) {
    if (cpu.ldtr.attributes & Segment::kUnusable || !(cpu.ldtr.attributes & Segment::kP))
      return false;
    base = cpu.ldtr.base;
    limit = cpu.ldtr.limit;
  }
  if ((selector & 0xfff8u) + size - 1 > limit) return false;
  *address = base + (selector & 0xfff8);
  return true;
}

bool ReadDescriptor(Cpu& cpu, uint16_t selector, Descriptor* descriptor) {
  if (!DescriptorAddress(cpu, selector, 8, &descriptor->address)) return false;
  descriptor->low = ReadSystem<uint64_t>(cpu, descriptor->address);
  descriptor->high = 0;
  return true;
}

bool ReadDescriptor16(Cpu& cpu, uint16_t selector, Descriptor* descriptor) {
  if (!DescriptorAddress(cpu, selector, 16, &descriptor->address)) return false;
  descriptor->low = ReadSystem<uint64_t>(cpu, descriptor->address);
  descriptor->high = ReadSystem<uint64_t>(cpu, descriptor->address + 8);
  return true;
}

Segment ToSegment(uint16_t selector, const Descriptor& descriptor) {
  Segment s;
  s.base = descriptor.base();
  s.limit = descriptor.limit();
  s.attributes = descriptor.attributes();
  s.selector = selector;
  return s;
}

void MarkAccessed(Cpu& cpu, Descriptor* descriptor) {
  if (descriptor->low >> 40 & 1) return;
  descriptor->low |= 1ull << 40;
  WriteSystem<uint8_t>(cpu, descriptor->address + 5, static_cast<uint8_t>(descriptor->low >> 40));
}

void SetBusy(Cpu& cpu, const Descriptor& descriptor, bool busy) {
  auto byte = ReadSystem<uint8_t>(cpu, descriptor.address + 5);
  WriteSystem<uint8_t>(cpu, descriptor.address + 5,
                       static_cast<uint8_t>(busy ? byte | 2 : byte & ~2));
}

void LoadRealSegment(Cpu& cpu, SegReg seg, uint16_t selector) {
  Segment& s = cpu.seg[seg];
  s.selector = selector;
  s.base = static_cast<uint64_t>(selector) << 4;
  if (cpu.virtual_8086()) {
    s.limit = 0xffff;
    s.attributes = 0xf3;
    return;
  }
  // Real mode keeps the limit ("big real mode"); a CS load makes the segment readable and writable
  // data-like code.
  s.attributes = (s.attributes & ~(Segment::kUnusable | Segment::kTypeMask | 0x60)) | Segment::kS |
                 Segment::kP | 3;
  if (seg == kCs) s.attributes &= ~Segment::kL;
}

void LoadNullSegment(Cpu& cpu, SegReg seg, uint16_t selector) {
  // 64-bit code uses the base even of a null FS or GS; only a load clears it. SS keeps its DPL: it
  // is the CPL.
  Segment& s = cpu.seg[seg];
  uint32_t dpl = seg == kSs ? s.attributes & 0x60 : 0;
  s = Segment{};
  s.selector = selector;
  s.attributes = Segment::kUnusable | dpl;
}

Descriptor CheckStackSegment(Cpu& cpu, uint16_t selector, unsigned cpl, Vector vector,
                             uint32_t ext) {
  if (IsNull(selector)) Raise(cpu, vector, ext);
  uint32_t error = SelectorError(selector) | ext;
  Descriptor d;
  if (!ReadDescriptor(cpu, selector, &d)) Raise(cpu, vector, error);
  if ((selector & 3u) != cpl || !d.writable_data() || d.dpl() != cpl) Raise(cpu, vector, error);
  if (!d.present()) Raise(cpu, kSS, error);
  return d;
}

void LoadSegment(Cpu& cpu, SegReg seg, uint16_t selector) {
  if (!cpu.protected_mode() || cpu.virtual_8086()) {
    LoadRealSegment(cpu, seg, selector);
    UpdateMode(cpu);
    return;
  }
  if (IsNull(selector)) {
    // SS may be null in 64-bit mode below CPL 3.
    if (seg == kSs && !(cpu.code_mode == CodeMode::k64 && cpu.cpl < 3 && (selector & 3) == cpu.cpl))
      Raise(cpu, kGP, 0);
    LoadNullSegment(cpu, seg, selector);
    UpdateMode(cpu);
    return;
  }
  Descriptor d;
  if (seg == kSs) {
    d = CheckStackSegment(cpu, selector, cpu.cpl, kGP, 0);
  } else {
    uint32_t error = SelectorError(selector);
    if (!ReadDescriptor(cpu, selector, &d)) Raise(cpu, kGP, error);
    if (!d.readable()) Raise(cpu, kGP, error);
    if (!d.conforming() && (d.dpl() < cpu.cpl || d.dpl() < (selector & 3u))) Raise(cpu, kGP, error);
    if (!d.present()) Raise(cpu, kNP, error);
  }
  MarkAccessed(cpu, &d);
  cpu.seg[seg] = ToSegment(selector, d);
  UpdateMode(cpu);
}

void SetCpl(Cpu& cpu, unsigned cpl) {
  cpu.seg[kSs].attributes = (cpu.seg[kSs].attributes & ~0x60u) | cpl << 5;
}

void SetCs(Cpu& cpu, uint16_t selector, const Descriptor& descriptor, unsigned cpl) {
  cpu.seg[kCs] = ToSegment(static_cast<uint16_t>((selector & 0xfffc) | cpl), descriptor);
  SetCpl(cpu, cpl);
  UpdateMode(cpu);
}

Stack PresentStack(Cpu& cpu) {
  return {.ss = cpu.seg[kSs],
          .sp = cpu.gpr[kRsp],
          .cpl = cpu.cpl,
          .is64 = cpu.code_mode == CodeMode::k64};
}

namespace {

// Linear address of `size` stack bytes at `offset`, checked as SS accesses are.
uint64_t StackLinear(Cpu& cpu, const Stack& stack, uint64_t offset, unsigned size) {
  uint32_t error = stack.fresh ? SelectorError(stack.ss.selector) | stack.ext : 0;
  if (stack.is64) {
    if (!mmu::Canonical(cpu, offset) || !mmu::Canonical(cpu, offset + size - 1))
      Raise(cpu, kSS, error);
    return offset;
  }
  const Segment& s = stack.ss;
  uint64_t last = offset + size - 1;
  bool bad = s.attributes & Segment::kUnusable;
  if ((s.type() & 0xc) == 4) {
    bad |= offset <= s.limit || last > (s.attributes & Segment::kDb ? 0xffffffff : 0xffffu);
  } else {
    bad |= last > s.limit;
  }
  if (bad) Raise(cpu, kSS, error);
  return (s.base + offset) & 0xffffffff;
}

}  // namespace

void Push(Cpu& cpu, Stack& stack, unsigned size, uint64_t value) {
  uint64_t offset = (stack.sp - size) & stack.mask();
  uint64_t linear = StackLinear(cpu, stack, offset, size);
  mmu::WriteAs(cpu, stack.cpl, linear, &value, size);
  stack.sp = offset | (stack.sp & ~stack.mask());
}

uint64_t Pop(Cpu& cpu, Stack& stack, unsigned size) {
  uint64_t offset = stack.sp & stack.mask();
  uint64_t linear = StackLinear(cpu, stack, offset, size);
  uint64_t value = 0;
  mmu::ReadAs(cpu, stack.cpl, linear, &value, size);
  stack.sp = ((offset + size) & stack.mask()) | (stack.sp & ~stack.mask());
  return value;
}

void CommitSp(Cpu& cpu, const Stack& stack) {
  uint64_t mask = stack.mask();
  cpu.gpr[kRsp] =
      mask == 0xffffffff ? stack.sp & mask : (cpu.gpr[kRsp] & ~mask) | (stack.sp & mask);
}

}  // namespace kvartz::cpu::x86
