#include "cpu/x86/jit/engine.h"

#include <asm/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <utility>

#include "base/check.h"
#include "cpu/x86/code_log.h"
#include "cpu/x86/engine.h"
#include "cpu/x86/host_trap.h"
#include "cpu/x86/interp/block_cache.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86::jit {
namespace {

constexpr uint64_t kPageMask = ~0xfffull;

Engine& EngineOf(void* state) { return *static_cast<Engine*>(static_cast<State*>(state)->engine); }

// Then the host also has XSAVE, and allows it.
bool HostHasAvx() { return __builtin_cpu_supports("avx") != 0; }

size_t JumpIndex(uint64_t target) { return ((target >> 12) ^ target) % kJumpEntries; }

}  // namespace

Engine::Engine(State& state, const FeatureSet& features) : state_(state), features_(features) {
  state_.self = &state_;
  state_.engine = this;
  cpu().tlb->follower = this;
  const auto address = reinterpret_cast<uintptr_t>(&state_);
  if (address + sizeof(State) < uintptr_t{1} << 31) memory_.SetState(static_cast<int32_t>(address));
}

Result<std::unique_ptr<Engine>> Engine::Create(State& state, const FeatureSet& features,
                                               size_t code_bytes) {
  std::unique_ptr<Engine> engine(new Engine(state, features));
  TRY(engine->memory_.Map(code_bytes));
  InstallTrapHandlers();
  Assembler as = engine->memory_.At(0);
  const StubTargets targets = {.fill = OnFill,
                               .execute = OnExecute,
                               .execute_end = OnExecuteEnd,
                               .interpret = OnInterpret,
                               .dispatch = OnDispatch,
                               .link = OnLink,
                               .link_same = OnLinkSame,
                               .leave = OnLeave,
                               .read_tsc = OnReadTsc,
                               .read_tscp = OnReadTscp,
                               .avx = HostHasAvx(),
                               .xsave = HostHasAvx()};
  engine->stubs_ = EmitStubs(as, targets);
  engine->stubs_end_ = engine->memory_.OffsetOf(as.here());
  engine->Flush();
  engine->counters_ = {};
  return engine;
}

Engine::~Engine() { cpu().tlb->follower = nullptr; }

bool Engine::Supports(const Cpu& cpu) { return Translatable(cpu); }

void Engine::AttachThread() {
  syscall(SYS_arch_prctl, ARCH_SET_GS, &state_);
  SetTrapEngine(this);
}

// ---- flags

void Engine::TakeFlags() {
  const unsigned saved = state_.saved_flags;
  const uint64_t status = (saved >> 8 & 0xd5) | ((saved & 1) != 0 ? rflags::kOf : 0);
  cpu().rflags = (cpu().rflags & ~rflags::kStatus) | status;
}

void Engine::GiveFlags() {
  const uint64_t flags = cpu().rflags;
  state_.saved_flags =
      static_cast<uint16_t>((flags & 0xd5) << 8 | 0x200 | ((flags & rflags::kOf) != 0 ? 1 : 0));
}

// ---- running

void Engine::Run() {
  Block* block = Locate();
  if (block == nullptr) return;
  GiveFlags();
  state_.vector_live = state_.x87_live = 0;
  stubs_.enter(&state_, block->entries.body);
}

Block* Engine::Locate(Grouping grouping) {
  Cpu& c = cpu();
  for (;;) {
    if (Requested(c) || !Supports(c)) return nullptr;
    c.insn_rip = c.rip;
    const uint64_t linear = CodeLinear(c, c.rip);
    const uint8_t* host = FetchCode(c, linear);
    if (host != nullptr && CodePageFits(c, linear)) {
      const uint16_t mode = Mode();
      const auto key =
          static_cast<uint16_t>(mode | (grouping == Grouping::kSingle ? mode::kSingle : 0));
      Block* block = Obtain(host, key);
      if (block != nullptr) {
        const unsigned cls = c.tlb->data_class();
        SwitchTo(mode, cls);
        state_.page = c.rip - (linear & 0xfff);
        EnterPage(*block->page, state_.page, linear & kPageMask);
        if (block->next_page != nullptr)
          EnterPage(*block->next_page, state_.page + kPageSize, (linear & kPageMask) + kPageSize);
        if (LogsExecution()) [[unlikely]] {
          LogExecution(c, "unit");
        } else if (grouping == Grouping::kShared) {
          state_.jumps[cls][JumpIndex(c.rip)] = Go(block->entries.checked);
        }
        Entered(mode);
        return block;
      }
    }
    ++counters_.steps;
    StepInstruction(c);
  }
}

// Units of the class are of another mode from now on, or their code lies elsewhere in its segment:
// those that the jump table still leads to say so in their checked entries.
void Engine::SwitchTo(uint16_t mode, unsigned cls) {
  const CodeSegment segment = CodeSegment::Of(cpu());
  if (jump_modes_[cls] == mode && jump_segments_[cls] == segment) [[likely]]
    return;
  // Where segments are flat, slots hold neither the first page nor the last
  // (translator_legacy.cpp).
  constexpr uint16_t kRule = mode::kLegacy | mode::kFlat;
  if (((jump_modes_[cls] ^ mode) & kRule) != 0) ClearSlots(cls);
  jump_modes_[cls] = mode;
  jump_segments_[cls] = segment;
  LeavePages(0);
  LeavePages(1);
}

// A unit of `mode` is about to run.
void Engine::Entered(uint16_t mode) {
  // Code of 32 bits takes the upper halves for 0. What 64-bit code left there is undefined now (SDM
  // vol. 1 3.4.1.1).
  if ((mode & mode::kLegacy) != 0) {
    for (unsigned reg = 0; reg < 8; ++reg) cpu().gpr[reg] &= 0xffffffff;
  }
  const Tlb& tlb = *cpu().tlb;
  seen_changes_ = tlb.changes();
  state_.asid[0] = tlb.asid(0);
  state_.asid[1] = tlb.asid(1);
  state_.running_mode = mode;
}

uint64_t Engine::Dispatch() {
  ++counters_.dispatches;
  Block* block = Locate();
  if (block == nullptr) return Go(stubs_.exit);
  GiveFlags();
  return Go(block->entries.body);
}

// Where to go on at Cpu::rip, perhaps in another mode: the jump table knows, and what it says is
// checked there.
uint64_t Engine::Branched() {
  Cpu& c = cpu();
  if (Requested(c) || !Supports(c)) return Go(stubs_.exit);
  const unsigned cls = c.tlb->data_class();
  const uint16_t mode = Mode();
  if (jump_modes_[cls] != mode || jump_segments_[cls] != CodeSegment::Of(c)) return Dispatch();
  Entered(mode);
  GiveFlags();
  return state_.jumps[cls][JumpIndex(c.rip)];
}

uint64_t Engine::OnDispatch(void* state, uint64_t target, uint64_t) {
  Engine& engine = EngineOf(state);
  engine.TakeFlags();
  engine.cpu().rip = target;
  if (!mmu::Canonical(engine.cpu(), target)) [[unlikely]]
    return engine.Undo(Branch::Unpack(engine.state_.branch));
  return engine.Dispatch();
}

// The branch raises its exception when it is interpreted.
uint64_t Engine::Undo(Branch branch) {
  cpu().gpr[kRsp] -= branch.popped;
  return Interpret({.count = 1, .offset = branch.offset});
}

uint64_t Engine::OnLink(void* state, uint64_t target, uint64_t exit) {
  Engine& engine = EngineOf(state);
  engine.TakeFlags();
  engine.cpu().rip = target;
  return engine.Link(static_cast<uint32_t>(exit));
}

uint64_t Engine::OnLinkSame(void* state, uint64_t, uint64_t number) {
  Engine& engine = EngineOf(state);
  engine.TakeFlags();
  engine.cpu().rip =
      engine.state_.page + engine.store_.exit(static_cast<uint32_t>(number)).site.offset;
  return engine.Link(static_cast<uint32_t>(number));
}

uint64_t Engine::Link(uint32_t number) {
  const uint64_t evictions = counters_.evictions, steps = counters_.steps;
  Block* block = Locate();
  if (block == nullptr) return Go(stubs_.exit);
  GiveFlags();
  if (counters_.evictions == evictions && counters_.steps == steps && !LogsExecution()) {
    Exit& exit = store_.exit(number);
    if (exit.from->page != nullptr && exit.to == nullptr) {
      ++counters_.links;
      const uint8_t* target = !exit.site.same_page                ? block->entries.checked
                              : block->offset > exit.from->offset ? block->entries.body
                                                                  : block->entries.polled;
      memory_.At(0).Patch(exit.site.distance, target);
      store_.Tie(number, block);
    }
  }
  return Go(block->entries.body);
}

uint64_t Engine::OnReadTsc(void* state) { return EngineOf(state).cpu().vcpu->Tsc(); }

uint64_t Engine::OnReadTscp(void* state) {
  Cpu& cpu = EngineOf(state).cpu();
  cpu.gpr[kRcx] = static_cast<uint32_t>(cpu.vcpu->msrs.tsc_aux);
  return cpu.vcpu->Tsc();
}

// A unit that was dropped is entered, or run into by itself, at its body.
uint64_t Engine::OnLeave(void* state, uint64_t, uint64_t after_call) {
  Engine& engine = EngineOf(state);
  engine.TakeFlags();
  const Block* block = engine.store_.At(engine.memory_.At(0).run(),
                                        reinterpret_cast<const uint8_t*>(after_call) - 1);
  VERIFY(block != nullptr);
  engine.cpu().rip = engine.state_.page + block->offset;
  return engine.Dispatch();
}

// ---- slow paths

uint64_t Engine::OnFill(void* state, uint64_t address, uint64_t site) {
  return EngineOf(state).Fill(address, *reinterpret_cast<const Site*>(site));
}

uint64_t Engine::Fill(uint64_t address, const Site& site) {
  Cpu& c = cpu();
  const bool crosses = (address & 0xfff) + site.span > kPageSize;
  if (state_.misses[site.slot] == 0 && !crosses && Adapt(site, address)) return Resume(site.offset);
  const Access access = site.write() ? Access::kWrite : Access::kRead;
  if (!crosses && mmu::TryMap(c, address, access)) {
    Tlb& tlb = *c.tlb;
    const TlbEntry& entry = tlb.data(address);
    if (tlb.changes() == seen_changes_ &&
        (site.write() ? entry.write : entry.read) == tlb.Tag(address)) {
      ++counters_.fills;
      state_.slots[site.slot] = {address & kPageMask, entry.addend};
      state_.used[site.slot >> kSlotChunkBits] = 1;
      if (tlb.data_class() == Tlb::kSupervisor && address >> 63 == 0)
        state_.lower_in_supervisor = 1;
      return 0;
    }
  }
  ++counters_.fill_failures;
  if (!site.shared()) return Interpret(site);
  if (NoteFailure(UnitCode(site), site.group) == Failure::kSeldom && !crosses)
    return Interpret(site);
  return ResumeSingle(site);
}

// In a unit with a check for each access, which the site's stub then goes to by itself.
uint64_t Engine::ResumeSingle(const Site& site) {
  const uint64_t evictions = counters_.evictions, steps = counters_.steps;
  const auto at = reinterpret_cast<uint64_t>(&site);
  TakeFlags();
  cpu().rip = state_.page + site.offset;
  Block* block = Locate(Grouping::kSingle);
  if (block == nullptr) return Go(stubs_.exit);
  GiveFlags();
  const uint64_t body = Go(block->entries.body);
  if (counters_.evictions == evictions && counters_.steps == steps && block->next_page == nullptr &&
      !LogsExecution())
    state_.singles[(at >> kSingleShift) % kSingles] = {at, body};
  return body;
}

// The first byte of a site's unit. The fetch may raise a fault: as of the site.
const uint8_t* Engine::UnitCode(const Site& site) {
  TakeFlags();
  cpu().rip = cpu().insn_rip = state_.page + site.offset;
  return FetchCode(cpu(), CodeLinear(cpu(), state_.page + site.unit));
}

// After 256 misses of a slot. True if its unit is gone, to be made in another way.
bool Engine::Adapt(const Site& site, uint64_t address) {
  // What a miss costs, in checks that ask the TLB.
  constexpr uint32_t kMissCost = 12;
  // Rarer ones come from slots that many places share, or from switches of address spaces.
  constexpr uint64_t kTicksAMiss = 100000;
  state_.misses[site.slot] = 1;
  const uint64_t now = __builtin_ia32_rdtsc(), before = std::exchange(since_[site.slot], now);
  if (now - before > 256 * kTicksAMiss) return false;
  const uint8_t* host = UnitCode(site);
  Block* block = host == nullptr ? nullptr : store_.Find(Key(host, running_mode()));
  if (block == nullptr) return false;
  Adaptation& unit = adapted_[block->key];
  auto& [groups, upper] = unit.polymorphic;
  const bool in_upper = address >> 63 != 0;
  if (unit.stage == Adaptation::kSettled) {
    if (!groups[site.group] || upper[site.group] == in_upper) return false;
    upper[site.group] = in_upper;
  }
  const bool settled = unit.stage == Adaptation::kSettled;
  for (size_t group = 0; !settled && group < unit.counting.size(); ++group) {
    const uint16_t slot = unit.counting[group];
    const bool this_one = slot == site.slot;
    const uint32_t misses = this_one ? 256 : state_.misses[slot] - 1;
    groups[group] = misses * kMissCost > state_.checks[slot];
    const Slot& last = state_.slots[slot];
    upper[group] = this_one || last.page == last.addend ? in_upper : last.page >> 63 != 0;
  }
  unit.stage = unit.counting.empty() ? Adaptation::kCounting : Adaptation::kSettled;
  Kill(block);
  return true;
}

// In a unit that begins at `offset`.
uint64_t Engine::Resume(uint16_t offset) {
  TakeFlags();
  cpu().rip = state_.page + offset;
  Block* block = Locate();
  if (block == nullptr) return Go(stubs_.exit);
  GiveFlags();
  return Go(block->entries.body);
}

uint64_t Engine::OnInterpret(void* state, uint64_t, uint64_t site) {
  Engine& engine = EngineOf(state);
  const Site what = *reinterpret_cast<const Site*>(site);
  if (what.shared()) engine.NoteFailure(engine.UnitCode(what), what.group);
  return engine.Interpret(what);
}

// The site may be gone when this is done with it.
uint64_t Engine::Interpret(const Site& site) {
  Cpu& c = cpu();
  const unsigned count = site.count, group = site.group;
  const uint8_t* unit = site.shared() ? UnitCode(site) : nullptr;
  TakeFlags();
  c.rip = state_.page + site.offset;
  for (unsigned i = 0; i < count; ++i) {
    const uint64_t before = c.rip;
    ++counters_.steps;
    StepInstruction(c);
    if (Requested(c)) return Go(stubs_.exit);
    if (c.rip - before - 1 > 14 || !Supports(c)) {
      if (unit != nullptr && i + 1 < count) NoteFailure(unit, group);
      break;
    }
  }
  return Dispatch();
}

// The common check of a group failed: its accesses lie on two pages, or didn't follow (behind a
// null pointer that the program tests itself, mostly), or don't fit into their segment together. If
// that goes on and on they are checked one by one, each where it is made.
Engine::Failure Engine::NoteFailure(const uint8_t* unit, unsigned group) {
  constexpr unsigned kFew = 4, kMost = 32;
  constexpr uint64_t kTicksAFailure = 30000;  // rarer ones cost less than more checks would
  Block* block = unit == nullptr ? nullptr : store_.Find(Key(unit, running_mode()));
  if (block == nullptr) return Failure::kSeldom;
  Adaptation& adaptation = adapted_[block->key];
  if (adaptation.failures.size() <= group) adaptation.failures.resize(group + 1);
  auto& [count, since] = adaptation.failures[group];
  if (++count % kMost == 0) {
    const uint64_t now = __builtin_ia32_rdtsc(), before = std::exchange(since, now);
    if (now - before < kMost * kTicksAFailure) {
      adaptation.failing[group] = true;
      Kill(block);
    }
  }
  return count < kFew ? Failure::kSeldom : Failure::kOften;
}

uint64_t Engine::OnExecute(void* state, uint64_t, uint64_t site) {
  return EngineOf(state).Execute(*reinterpret_cast<const ExecuteSite*>(site), false);
}

uint64_t Engine::OnExecuteEnd(void* state, uint64_t, uint64_t site) {
  return EngineOf(state).Execute(*reinterpret_cast<const ExecuteSite*>(site), true);
}

uint64_t Engine::Execute(const ExecuteSite& site, bool ends) {
  const Insn& insn = site.insn;
  ++counters_.executes;
  Cpu& c = cpu();
  TakeFlags();
  c.insn_rip = state_.page + site.offset;
  const uint64_t next = c.insn_rip + insn.length;
  c.rip = next;
  insn.exec(c, insn);
  if (ends) return Branched();
  if (Requested(c) || c.rip != next || Mode() != running_mode()) return Dispatch();
  if (c.tlb->changes() != seen_changes_) {
    // Is the rest of the unit still what comes next?
    const uint64_t linear = CodeLinear(c, next);
    if (linear % kPageSize == 0) return Dispatch();
    c.insn_rip = next;
    if (FetchCode(c, linear) != site.next) return Dispatch();
    Entered(running_mode());
  }
  GiveFlags();
  return 0;
}

// ---- host exceptions

bool Engine::OnTrap(void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* rip = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (!memory_.Contains(rip)) return false;
  const Block* block = store_.At(memory_.At(0).run(), rip);
  if (block == nullptr) return false;
  const auto at = static_cast<uint32_t>(rip - block->entries.checked);
  const InsnMark* marks = store_.marks(*block);
  const InsnMark* mark = nullptr;
  for (const InsnMark* next = marks; next < marks + block->mark_count && next->begin <= at; ++next)
    mark = next;
  if (mark == nullptr) return false;
  ++counters_.traps;
  if (mark->flags_in_host) {
    const auto flags = static_cast<uint64_t>(registers[REG_EFL]);
    state_.saved_flags =
        static_cast<uint16_t>((flags & 0xd5) << 8 | 0x200 | ((flags & rflags::kOf) != 0 ? 1 : 0));
  }
  trap_site_ = {.count = 1, .offset = mark->offset};
  registers[REG_R11] = reinterpret_cast<greg_t>(&trap_site_);
  registers[REG_RIP] = reinterpret_cast<greg_t>(stubs_.interpret);
  return true;
}

}  // namespace kvartz::cpu::x86::jit
