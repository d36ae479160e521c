#include "cpu/x86/jit/program_board.h"

#include <algorithm>
#include <cstring>

#include "base/sync.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86::programs {
namespace {

// #PF: the demand page becomes present, at either of its addresses, and the program goes on. What
// else faults ends it, in vector 14's stub.
GUEST_CODE(programs_demand64, R"(.code64
  push %rax
  mov %cr2, %rax
  shr $12, %rax
  and $0x1ff, %eax
  cmp $0x12a, %eax
  je 1f
  cmp $0x18a, %eax
  je 1f
0: pop %rax
  push $0x5070
  ret
1: testb $1, 8(%rsp)
  jnz 0b
  movl $0x52a007, 0x1f0000(,%rax,8)
  pop %rax
  add $8, %rsp
  iretq)")
// The same for 32-bit programs in user mode: those at CPL 0 would find the frames on their stack.
#define DEMAND32(store)                                                             \
  ".code32; push %eax; mov %cr2, %eax; shr $12, %eax; cmp $0x12a, %eax; je 1f;"     \
  "cmp $0x18a, %eax; je 1f; 0: pop %eax; push $0x5070; ret;"                        \
  "1: testb $3, 12(%esp); jz 0b; testb $1, 4(%esp); jnz 0b; movl $0x52a007, " store \
  ";"                                                                               \
  "pop %eax; add $4, %esp; iret"
GUEST_CODE(programs_demand_pae, DEMAND32("%ss:0x1f0000(,%eax,8)"))
GUEST_CODE(programs_demand32, DEMAND32("%ss:0x1f0000(,%eax,4)"))
#undef DEMAND32
// NMI: counted, nothing else changes.
GUEST_CODE(programs_nmi64, ".code64\n lock incl 0x6100\n iretq")
GUEST_CODE(programs_nmi32, ".code32\n lock incl %ss:0x6100\n iret")
constexpr uint64_t kDemandHandler = 0x5800, kNmiHandler = 0x5900, kNmiStack = 0x6400;

constexpr uint64_t kLowStacks = kInnerStack & ~(kPage - 1);
constexpr uint64_t kLowBytes = 0x15000;  // tables and stubs
constexpr uint64_t kUserPage = 7, kSupervisor = 3, kReadOnly = 5;
constexpr uint64_t kNoMemory = 0x8000000;  // physical: behind the RAM
// Pushed by these vectors (SDM vol. 3 table 6-1).
bool HasError(int vector) {
  return vector == kDF || (vector >= kTS && vector <= kPF) || vector == kAC;
}

}  // namespace

ProgramBoard::ProgramBoard(Shape shape, const SoftOptions& soft)
    : layout_(LayoutOf(shape)),
      guest_(layout_.mode, 0, "max", 1, soft),
      memory_(guest_.board.memory()),
      stack_(kStackBytes, 0x5a) {
  for (unsigned v = 0; v < 256; v++) {
    // OUT again and again: so that a run can be ended twice.
    guest_.Put<uint32_t>(GuestCase::Stub(v), 0xfcebf4e6);
    if (layout_.mode == Mode::kReal16) continue;
    // In long mode exceptions have a stack of their own, below no program's stack pointer.
    guest_.SetGate(v, 0xe, v == kEndVector ? 3 : 0, guest_.IsLong() ? kCode64 : kCode32,
                   GuestCase::Stub(v), guest_.IsLong() ? 1 : 0);
  }
  if (!layout_.is64() && !layout_.real_segments) SetDescriptors();
  if (layout_.paged) MapPages();
  if (layout_.paged && !layout_.is16()) SetHandlers();
  X86State& state = guest_.initial;
  state.cr0 |= cr0::kNe | cr0::kMp | (layout_.paged ? cr0::kWp : 0);
  state.cr4 |= cr4::kOsfxsr | cr4::kOsxmmexcpt | cr4::kOsxsave;
  if (guest_.IsLong()) state.cr4 |= cr4::kFsgsbase;
  state.xcr0 = 7;
  EXPECT_TRUE(guest_.board.vcpu().SetState(state));
  if (layout_.paged) {
    page_table_.assign(guest_.at(guest_.pte_address(0)), guest_.at(guest_.pte_address(0)) + kPage);
    low_stacks_.assign(guest_.at(kLowStacks), guest_.at(kLowStacks) + kPage);
  }
  // Without paging all of it can be written.
  if (!layout_.paged)
    low_memory_.assign(guest_.at(0),
                       guest_.at(layout_.is16() ? layout_.code + 0x10000 : LastByte() + 1));
}

// SDM vol. 3 figure 3-8. `flags`: G D L AVL.
void ProgramBoard::SetDescriptor(uint16_t selector, uint64_t base, uint64_t limit, unsigned type,
                                 unsigned flags) {
  const uint64_t raw = flags & 8 ? limit >> 12 : limit;
  for (unsigned user = 0; user < 2; ++user) {
    const uint64_t access = 0x90 | type | (user ? 0x60u : 0);
    guest_.SetGdt(static_cast<uint16_t>(selector + user * 8),
                  (raw & 0xffff) | (base & 0xffffff) << 16 | access << 40 |
                      (raw >> 16 & 0xf) << 48 | uint64_t{flags} << 52 | (base >> 24 & 0xff) << 56);
  }
}

void ProgramBoard::SetDescriptors() {
  const unsigned size = layout_.is16() ? 0 : 4;
  const uint64_t limit = layout_.is16() ? 0xffff : 0xffffffff;
  const auto base = [](uint64_t value) { return static_cast<uint32_t>(value); };
  SetDescriptor(kOwnCode, base(layout_.code_base), limit, 0xb, size ? 8 | size : 0);
  SetDescriptor(kAliasCode, base(layout_.code_base - kAliasShift), limit, 0xb, size ? 8 | size : 0);
  SetDescriptor(kOtherCode, layout_.code, 0xffff, 0xb, size ^ 4);
  const uint64_t end = layout_.data_offset() + 0x1800;
  const bool large = end > 0xfffff;
  SetDescriptor(kTightData, layout_.data_base, end - 1, 3, large ? 8 | size : size);
  SetDescriptor(kDownData, layout_.data_base, layout_.data_offset() + 0xfff, 7,
                large ? 8 | size : size);
  SetDescriptor(kOwnData, base(layout_.data_base), layout_.paged ? limit : LastByte(), 3,
                size ? 8 | size : 0);
}

void ProgramBoard::SetHandlers() {
  const bool is_long = guest_.IsLong();
  const uint16_t code = is_long ? kCode64 : kCode32;
  guest_.Load(is_long                        ? CODE_OF(programs_demand64)
              : layout_.mode == Mode::kPae32 ? CODE_OF(programs_demand_pae)
                                             : CODE_OF(programs_demand32),
              kDemandHandler);
  guest_.SetGate(kPF, 0xe, 0, code, kDemandHandler, is_long ? 1 : 0);
  guest_.Load(is_long ? CODE_OF(programs_nmi64) : CODE_OF(programs_nmi32), kNmiHandler);
  guest_.SetGate(kNMI, 0xe, 0, code, kNmiHandler, is_long ? 2 : 0);
  if (is_long) guest_.Put<uint64_t>(kTssAt + 44, kNmiStack);  // IST 2
}

bool ProgramBoard::Interruptible(const Program& program) const {
  return guest_.IsLong() || (layout_.paged && !layout_.is16() && program.cpl == 3);
}

// Runs on while another thread interrupts and kicks, until the program has ended and no interrupt
// is under way.
int ProgramBoard::RunInterrupted(uint64_t seed) {
  std::atomic<bool> ended{false};
  int code;
  {
    Thread pest("pest", [&] {
      oracle::InsnEncoder random(seed);
      while (!ended) {
        for (uint64_t spin = random.Below(2000); spin > 0 && !ended; --spin) {
          asm volatile("pause");
        }
        random.Chance(80) ? guest_.board.vcpu().Nmi() : guest_.board.vcpu().Kick();
      }
    });
    code = guest_.board.Run();
    ended = true;
  }
  const Cpu& cpu = guest_.board.cpu();
  const auto under_way = [&] {
    return cpu.events.nmi_pending || cpu.events.nmi_masked ||
           (__atomic_load_n(&cpu.requests, __ATOMIC_SEQ_CST) & request::kNmi) != 0;
  };
  while (code != -1 && under_way()) code = guest_.board.Run();
  return code;
}

void ProgramBoard::MapArea(uint64_t linear, uint64_t pages, uint64_t flags, bool aliased) {
  for (uint64_t i = 0; i < pages; ++i) {
    const uint64_t entry = (linear + layout_.physical_offset + i * kPage) | flags;
    guest_.SetPte(linear + i * kPage, entry);
    if (aliased) guest_.SetPte(linear + kAlias + i * kPage, entry);
  }
}

void ProgramBoard::MapPages() {
  // Nothing but tables and stubs, which programs can't change, and the stacks of exceptions.
  for (uint64_t page = 0; page < 0x200; ++page) {
    const bool stack = page == (kLowStacks >> 12);
    const bool table = page < (kLowBytes >> 12);
    guest_.SetPte(page << 12, table ? page << 12 | (stack ? 0x63 : 0x61) : 0);
  }
  guest_.SetPte(kPageTableLinear, (guest_.pte_address(0) & ~uint64_t{0xfff}) | kSupervisor);
  const bool aliased = !layout_.is16();
  MapArea(layout_.code, kCodePages, kReadOnly, aliased);
  MapArea(layout_.data, kDataPages, kUserPage, aliased);
  if (!layout_.is16()) MapArea(layout_.stack, kStackPages, kUserPage, false);
  for (uint64_t alias : {uint64_t{0}, aliased ? kAlias : uint64_t{0}}) {
    const auto set = [&](unsigned number, uint64_t entry) {
      guest_.SetPte(layout_.data + alias + number * kPage, entry);
    };
    const uint64_t physical = layout_.data + layout_.physical_offset;
    set(kReadOnlyPage, (physical + kReadOnlyPage * kPage) | kReadOnly);
    set(kSupervisorPage, (physical + kSupervisorPage * kPage) | kSupervisor);
    set(kAbsentPage, 0);
    set(kDemandPage, 0);
    set(kNoMemoryPage, kNoMemory | kUserPage);
  }
  if (guest_.IsLong()) guest_.Put<uint64_t>(kTablesAt + 256 * 8, (kTablesAt + 0x1000) | 7);
}

std::vector<ProgramBoard::Area> ProgramBoard::Areas() {
  const uint64_t offset = layout_.physical_offset;
  std::vector<Area> areas = {
      {"code", layout_.code, {guest_.at(layout_.code + offset), kCodeBytes}},
      {"data", layout_.data, {guest_.at(layout_.data + offset), kDataBytes}}};
  if (!layout_.is16())
    areas.push_back({"stack", layout_.stack, {guest_.at(layout_.stack + offset), kStackBytes}});
  if (layout_.paged)
    areas.push_back({"page table", kPageTableLinear, {guest_.at(guest_.pte_address(0)), kPage}});
  return areas;
}

// As a device would write: decoded code is told of it.
void ProgramBoard::Put(uint64_t physical, std::span<const uint8_t> bytes) {
  for (size_t at = 0; at < bytes.size(); at += kPage) {
    const size_t size = std::min<size_t>(kPage, bytes.size() - at);
    if (std::memcmp(guest_.at(physical + at), bytes.data() + at, size) != 0)
      memory_.Write(Gpa(physical + at), bytes.data() + at, size);
  }
}

void ProgramBoard::LoadMemory(const Program& program, const Image& image,
                              std::span<const uint8_t> data) {
  const uint64_t offset = layout_.physical_offset;
  if (!layout_.paged) Put(0, low_memory_);
  Put(layout_.code + offset, image.code);
  const uint64_t at = layout_.data + offset;
  Put(at, data.subspan(0, kCountersAt));
  Put(at + kCountersAt, image.control);
  Put(at + kCountersAt + kPage, data.subspan(kCountersAt + kPage));
  if (!layout_.is16()) Put(layout_.stack + offset, stack_);
  if (layout_.paged) {
    Put(kLowStacks, low_stacks_);  // which programs at CPL 0 can write
    std::memcpy(guest_.at(guest_.pte_address(0)), page_table_.data(), kPage);
    if (program.code_writable) {
      MapArea(layout_.code, kCodePages, kUserPage, !layout_.is16());
    }
  }
}

void ProgramBoard::SetKind(Program::Segment kind, Segment* s) const {
  const auto data = static_cast<uint32_t>(layout_.data - s->base);
  switch (kind) {
    case Program::Segment::kUsual:
      return;
    case Program::Segment::kTight:
      s->limit = std::min(s->limit, data + 0x17ff);
      return;
    case Program::Segment::kDown:
      s->limit = data + 0x7f;
      s->attributes |= 4;
      return;
    case Program::Segment::kReadOnly:
      s->attributes &= ~2u;
      return;
    case Program::Segment::kNull:
      s->attributes |= Segment::kUnusable;
      return;
  }
}

void ProgramBoard::LoadCpu(const Program& program, uint64_t entry) {
  const X86State& initial = guest_.initial;
  Cpu& cpu = guest_.board.cpu();
  std::copy(program.gpr, program.gpr + 16, cpu.gpr);
  cpu.rip = cpu.insn_rip = entry;
  cpu.rflags = program.rflags;
  cpu.fpu = program.fpu;
  cpu.fpu.xstate_bv = 7;
  const uint16_t user = program.cpl == 3 ? 8 | 3 : 0;
  for (unsigned i = 0; i < kSegCount; ++i) {
    Segment& s = cpu.seg[i];
    s = {.base = layout_.data_base,
         .limit = 0xffffffff,
         .attributes = 0xc093 | program.cpl << 5,
         .selector = program.cpl == 3 ? kUserData : kData32};
    if (layout_.is16()) s.limit = 0xffff, s.attributes = 0x93 | program.cpl << 5;
    if (i == kDs || i == kEs) s.base -= program.segment_shift;
    if (i == kFs) s.base += kFsBase;
    if (i == kGs) s.base += kGsBase;
    if (!layout_.is64()) s.base = static_cast<uint32_t>(s.base);
    // Without paging, nothing that isn't put back can be reached.
    if (!layout_.paged) s.limit = static_cast<uint32_t>(LastByte() - s.base);
    if (program.shape == Shape::kUnreal16 && i != kSs)
      s.limit = static_cast<uint32_t>(layout_.code + 0xffff - s.base);
    if (program.shape == Shape::kUnaligned16 && i != kSs) s.limit = 0xffffffff;
    if (layout_.real_segments)
      s.selector = static_cast<uint16_t>(s.base >> 4);
    else if (layout_.data_base != 0)
      s.selector = kOwnData | user;
    if (program.shape == Shape::kVm86) s.attributes = 0xf3;
    SetKind(program.segments[i], &s);
  }
  Segment& code = cpu.seg[kCs];
  code.base = layout_.code_base;
  if (layout_.is16()) code.limit = 0xffff;
  if (program.shape != Shape::kVm86) code.attributes += 8;
  code.selector = static_cast<uint16_t>(program.cpl == 3 ? kUserCode32 : kCode32);
  if (layout_.is64()) {
    code.attributes ^= Segment::kL | Segment::kDb;
    code.selector = program.cpl == 3 ? kUserCode64 : kCode64;
  }
  if (layout_.real_segments)
    code.selector = static_cast<uint16_t>(code.base >> 4);
  else if (layout_.code_base != 0)
    code.selector = kOwnCode | user;
  cpu.ldtr = initial.ldtr;
  cpu.tr = initial.tr;
  cpu.gdtr = initial.gdtr;
  cpu.idtr = initial.idtr;
  cpu.cr0 = initial.cr0 | program.cr0_bits | cr0::kEt;
  cpu.cr2 = 0;
  cpu.cr3 = initial.cr3;
  cpu.events = {};
  cpu.mp_state = MpState::kRunnable;
  cpu.pending_dr6 = 0;
  cpu.dr[6] = 0xffff0ff0;
  __atomic_fetch_and(&cpu.requests, request::kCodeWritten, __ATOMIC_SEQ_CST);
  cpu.tlb->FlushAll();
  UpdateMode(cpu);
}

void ProgramBoard::TranslateStack(uint64_t* address) const {
  if (*address - layout_.stack < kStackBytes) *address += layout_.physical_offset;
  if (*address - layout_.data < kDataBytes) *address += layout_.physical_offset;
  if (*address >= 16 << 20) *address = 0;
}

// What the exception pushed, and the flags there without status bits: those in the registers are
// compared.
void ProgramBoard::ReadFrame(End* end) {
  const Cpu& cpu = guest_.board.cpu();
  const bool real = !cpu.protected_mode();
  const unsigned width = real ? 2 : guest_.IsLong() ? 8 : 4;
  uint64_t sp = cpu.gpr[kRsp];
  const auto at = [&] {
    const uint64_t offset = cpu.stack_size == 2 ? sp & 0xffff : sp;
    uint64_t address =
        guest_.IsLong() ? sp & ~kHighHalf : static_cast<uint32_t>(offset + cpu.seg[kSs].base);
    TranslateStack(&address);
    return guest_.at(address);
  };
  const auto pop = [&] {
    uint64_t value = 0;
    std::memcpy(&value, at(), width);
    sp += width;
    return value;
  };
  if (!real && HasError(end->vector)) end->error = static_cast<uint32_t>(pop());
  end->rip = pop();
  end->cs = static_cast<uint16_t>(pop());
  uint8_t* flags = at();
  end->rflags = pop();
  end->rsp = cpu.gpr[kRsp];
  if (guest_.IsLong() || (cpl_ != 0 && !real)) {
    end->rsp = pop();
    end->ss = static_cast<uint16_t>(pop());
  }
  flags[0] = static_cast<uint8_t>(flags[0] & ~rflags::kStatus);
  flags[1] = static_cast<uint8_t>(flags[1] & ~(rflags::kStatus >> 8));
}

End ProgramBoard::Finish() {
  const Cpu& cpu = guest_.board.cpu();
  End end;
  end.cr2 = cpu.cr2;
  end.rip = cpu.rip;
  end.rflags = cpu.rflags;
  end.rsp = cpu.gpr[kRsp];
  const bool in_stub = cpu.rip >= kStubsAt && cpu.rip < GuestCase::Stub(256) && cpu.cpl == 0 &&
                       cpu.seg[kCs].base == 0;
  if (!in_stub) return end;
  end.vector = static_cast<int>((cpu.rip - kStubsAt) / 8);
  ReadFrame(&end);
  return end;
}

End ProgramBoard::Run(const Program& program, const Image& image, std::span<const uint8_t> data,
                      Interruptions interruptions) {
  cpl_ = program.cpl;
  LoadMemory(program, image, data);
  const uint64_t high = program.high_half ? kHighHalf : 0;
  LoadCpu(program, (layout_.code - layout_.code_base + image.lines.front().offset) | high);
  BareBoard& board = guest_.board;
  board.triple_faults = 0;
  const bool interrupted =
      interruptions == Interruptions::kSome && program.interrupted && Interruptible(program);
  const int code = interrupted ? RunInterrupted(program.seed) : board.Run();
  End end = Finish();
  end.triple_fault = board.triple_faults > 0;
  end.stopped = code == -1 && !end.triple_fault;
  return end;
}

}  // namespace kvartz::cpu::x86::programs
