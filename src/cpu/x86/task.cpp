// Hardware task switches (SDM vol. 3 ch. 7).
#include "cpu/x86/fault.h"
#include "cpu/x86/mmu.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {
namespace {

// Offsets in a TSS; registers in the order of their numbers, segments in the order of SegReg.
struct TssLayout {
  unsigned width;
  uint32_t minimum_limit;
  uint32_t ip, flags, registers, segments, ldt;
  unsigned segment_count;
};
constexpr TssLayout kLayout16 = {2, 0x2b, 14, 16, 18, 34, 42, 4};
constexpr TssLayout kLayout32 = {4, 0x67, 32, 36, 40, 72, 96, 6};
constexpr uint32_t kCr3 = 28, kTrapBit = 100;

struct TaskState {
  uint32_t cr3 = 0, eip = 0, eflags = 0;
  uint32_t gpr[8] = {};
  uint16_t seg[kSegCount] = {};
  uint16_t ldt = 0;
  bool trap = false;
};

uint32_t Get(Cpu& cpu, uint64_t address, unsigned width) {
  return width == 4 ? ReadSystem<uint32_t>(cpu, address) : ReadSystem<uint16_t>(cpu, address);
}

void Put(Cpu& cpu, uint64_t address, unsigned width, uint64_t value) {
  if (width == 4) {
    WriteSystem<uint32_t>(cpu, address, static_cast<uint32_t>(value));
  } else {
    WriteSystem<uint16_t>(cpu, address, static_cast<uint16_t>(value));
  }
}

TaskState ReadTask(Cpu& cpu, uint64_t base, const TssLayout& layout) {
  TaskState task;
  unsigned w = layout.width;
  if (w == 4) {
    task.cr3 = ReadSystem<uint32_t>(cpu, base + kCr3);
    task.trap = ReadSystem<uint16_t>(cpu, base + kTrapBit) & 1;
  }
  task.eip = Get(cpu, base + layout.ip, w);
  task.eflags = Get(cpu, base + layout.flags, w);
  for (unsigned i = 0; i < 8; i++)
    task.gpr[i] = Get(cpu, base + layout.registers + i * w, w) | (w == 2 ? 0xffff0000u : 0);
  for (unsigned i = 0; i < layout.segment_count; i++)
    task.seg[i] = ReadSystem<uint16_t>(cpu, base + layout.segments + i * w);
  task.ldt = ReadSystem<uint16_t>(cpu, base + layout.ldt);
  return task;
}

void SaveTask(Cpu& cpu, const TssLayout& layout, uint64_t flags) {
  uint64_t base = cpu.tr.base;
  unsigned w = layout.width;
  // All of it or nothing: the first and the last byte decide.
  mmu::CheckSystemWrite(cpu, base + layout.ip,
                        layout.segments + layout.segment_count * w - layout.ip);
  Put(cpu, base + layout.ip, w, cpu.rip);
  Put(cpu, base + layout.flags, w, flags);
  for (unsigned i = 0; i < 8; i++) Put(cpu, base + layout.registers + i * w, w, cpu.gpr[i]);
  for (unsigned i = 0; i < layout.segment_count; i++) {
    WriteSystem<uint16_t>(cpu, base + layout.segments + i * w, cpu.seg[i].selector);
  }
}

// From here on the new task runs: errors are its own, #TS mostly.
void LoadTaskLdt(Cpu& cpu, uint16_t selector, uint32_t ext) {
  cpu.ldtr = Segment{};
  cpu.ldtr.selector = selector;
  cpu.ldtr.attributes = Segment::kUnusable;
  if (IsNull(selector)) return;
  uint32_t error = SelectorError(selector) | ext;
  Descriptor d;
  if ((selector & 4) || !ReadDescriptor(cpu, selector, &d)) Raise(cpu, kTS, error);
  if (!d.system() || d.type() != kLdt || !d.present()) Raise(cpu, kTS, error);
  cpu.ldtr = ToSegment(selector, d);
}

void LoadTaskCode(Cpu& cpu, uint16_t selector, uint32_t ext) {
  uint32_t error = SelectorError(selector) | ext;
  Descriptor d;
  if (IsNull(selector) || !ReadDescriptor(cpu, selector, &d)) Raise(cpu, kTS, error);
  unsigned rpl = selector & 3;
  if (!d.code() || (d.conforming() ? d.dpl() > rpl : d.dpl() != rpl)) Raise(cpu, kTS, error);
  if (!d.present()) Raise(cpu, kNP, error);
  MarkAccessed(cpu, &d);
  cpu.seg[kCs] = ToSegment(selector, d);
}

void LoadTaskStack(Cpu& cpu, uint16_t selector, unsigned cpl, uint32_t ext) {
  Descriptor d = CheckStackSegment(cpu, selector, cpl, kTS, ext);
  MarkAccessed(cpu, &d);
  cpu.seg[kSs] = ToSegment(selector, d);
}

void LoadTaskData(Cpu& cpu, SegReg seg, uint16_t selector, unsigned cpl, uint32_t ext) {
  LoadNullSegment(cpu, seg, selector);
  if (IsNull(selector)) return;
  uint32_t error = SelectorError(selector) | ext;
  Descriptor d;
  if (!ReadDescriptor(cpu, selector, &d) || !d.readable()) Raise(cpu, kTS, error);
  if (!d.conforming() && (d.dpl() < cpl || d.dpl() < (selector & 3u))) Raise(cpu, kTS, error);
  if (!d.present()) Raise(cpu, kNP, error);
  MarkAccessed(cpu, &d);
  cpu.seg[seg] = ToSegment(selector, d);
}

void LoadTaskSegments(Cpu& cpu, const TaskState& task, uint32_t ext) {
  static constexpr SegReg kData[] = {kEs, kDs, kFs, kGs};
  if (cpu.virtual_8086()) {
    for (unsigned i = 0; i < kSegCount; i++)
      LoadRealSegment(cpu, static_cast<SegReg>(i), task.seg[i]);
    UpdateMode(cpu);
    return;
  }
  // Until each is loaded: its selector with nothing behind it.
  for (unsigned i = 0; i < kSegCount; i++)
    LoadNullSegment(cpu, static_cast<SegReg>(i), task.seg[i]);
  unsigned cpl = task.seg[kCs] & 3;
  SetCpl(cpu, cpl);
  UpdateMode(cpu);
  LoadTaskCode(cpu, task.seg[kCs], ext);
  LoadTaskStack(cpu, task.seg[kSs], cpl, ext);
  UpdateMode(cpu);
  for (SegReg seg : kData) LoadTaskData(cpu, seg, task.seg[seg], cpl, ext);
  UpdateMode(cpu);
}

}  // namespace

void SwitchTask(Cpu& cpu, uint16_t selector, const Descriptor& tss, TaskSwitch kind, bool has_error,
                uint32_t error, uint32_t ext) {
  bool wide = tss.type() & 8;
  const TssLayout& layout = wide ? kLayout32 : kLayout16;
  const TssLayout& old_layout = cpu.tr.type() & 8 ? kLayout32 : kLayout16;
  if (tss.limit() < layout.minimum_limit) Raise(cpu, kTS, SelectorError(selector) | ext);
  bool nested = kind == TaskSwitch::kCall || kind == TaskSwitch::kEvent;

  TaskState task = ReadTask(cpu, tss.base(), layout);
  Descriptor old;
  bool have_old = ReadDescriptor(cpu, cpu.tr.selector, &old);
  uint64_t flags = kind == TaskSwitch::kReturn ? cpu.rflags & ~rflags::kNt : cpu.rflags;
  SaveTask(cpu, old_layout, flags);
  if (nested) WriteSystem<uint16_t>(cpu, tss.base(), cpu.tr.selector);
  if (!nested && have_old) SetBusy(cpu, old, false);
  if (kind != TaskSwitch::kReturn) SetBusy(cpu, tss, true);

  cpu.tr = ToSegment(selector, tss);
  cpu.tr.attributes |= 2;
  cpu.cr0 |= cr0::kTs;
  cpu.dr[7] &= ~0x155ull;  // local breakpoints are the old task's
  if (wide && (cpu.cr0 & cr0::kPg)) mmu::LoadCr3(cpu, task.cr3);
  uint64_t keep = nested ? rflags::kNt : 0;
  cpu.rflags = ((task.eflags & 0x3f7fd5) | 2 | keep) & ~(wide ? 0ull : rflags::kVm);
  for (unsigned i = 0; i < 8; i++) cpu.gpr[i] = task.gpr[i];
  cpu.rip = cpu.insn_rip = task.eip;
  cpu.no_trap = true;

  LoadTaskLdt(cpu, task.ldt, ext);
  LoadTaskSegments(cpu, task, ext);
  if (cpu.rflags & rflags::kIf) SetRequest(cpu, request::kInterrupt);
  if (has_error) {
    Stack stack = PresentStack(cpu);
    Push(cpu, stack, layout.width, error);
    CommitSp(cpu, stack);
  }
  if (cpu.rip > cpu.seg[kCs].limit) Raise(cpu, kGP, 0);
  if (task.trap) {
    cpu.dr[6] |= dr6::kBt;
    SetRequest(cpu, request::kDebugTrap);
  }
}

}  // namespace kvartz::cpu::x86
