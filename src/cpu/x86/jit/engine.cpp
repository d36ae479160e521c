#include "cpu/x86/jit/engine.h"

#include <asm/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>

#include "base/check.h"
#include "cpu/x86/host_trap.h"
#include "cpu/x86/interp/block_cache.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86::jit {
namespace {

// A unit's code at most: 48 instructions of some 150 bytes with their cold paths and thunks.
constexpr size_t kUnitRoom = 32 << 10;
constexpr uint64_t kPageMask = ~0xfffull;
constexpr uint16_t kSingleAfter = 32;  // failures
// In State::code_pages: what no target is away from by an offset. (A page may begin at any RIP
// where CS isn't aligned.)
constexpr uint64_t kNoPage = 0x8000000000000001;
constexpr unsigned kIdleRechecks = 8;

Engine& EngineOf(void* state) { return *static_cast<Engine*>(static_cast<State*>(state)->engine); }

// A change of the code changes it, but for one in 2^64.
uint64_t Digest(const uint8_t* page, const std::vector<CodeRange>& ranges) {
  uint64_t digest = ranges.size();
  for (const CodeRange& range : ranges) {
    for (unsigned done = 0; done < range.size; done += 8) {
      uint64_t word = 0;
      std::memcpy(&word, page + range.offset + done, std::min(8u, range.size - done));
      digest = (digest ^ word) * 0x9e3779b97f4a7c15;
      digest ^= digest >> 29;
    }
  }
  return digest;
}

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
  stubs_.enter(&state_, block->code.body);
}

Engine::Block* Engine::Locate(Grouping grouping) {
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
      Block* block = Find(host, key);
      if (block == nullptr) block = Translate(host, key);
      if (block != nullptr) {
        const unsigned cls = c.tlb->data_class();
        SwitchTo(mode, cls);
        state_.page = c.rip - (linear & 0xfff);
        block->page->rechecks = 0;
        uint64_t& entered = state_.code_pages[block->page->slot];
        if (entered != state_.page) {
          (linear >> 63 ? entered_upper_ : entered_lower_)[cls].push_back(block->page->slot);
          entered = state_.page;
        }
        if (grouping == Grouping::kShared) {
          state_.jumps[cls][JumpIndex(c.rip)] = Go(block->code.checked);
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
  LeavePages(entered_lower_[cls]);
  LeavePages(entered_upper_[cls]);
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
  running_mode_ = mode;
}

uint64_t Engine::Dispatch() {
  ++counters_.dispatches;
  Block* block = Locate();
  if (block == nullptr) return Go(stubs_.exit);
  GiveFlags();
  return Go(block->code.body);
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
  return Interpret({.offset = branch.offset, .count = 1});
}

uint64_t Engine::OnLink(void* state, uint64_t target, uint64_t exit) {
  Engine& engine = EngineOf(state);
  engine.TakeFlags();
  engine.cpu().rip = target;
  return engine.Link(static_cast<uint32_t>(exit));
}

uint64_t Engine::Link(uint32_t number) {
  const uint64_t flushes = counters_.flushes, steps = counters_.steps;
  Block* from = exits_[number].from;
  Block* block = Locate();
  if (block == nullptr) return Go(stubs_.exit);
  GiveFlags();
  if (counters_.flushes == flushes && counters_.steps == steps && from->page != nullptr) {
    ++counters_.links;
    Exit& exit = exits_[number];
    const uint8_t* target = !exit.site.same_page           ? block->code.checked
                            : block->offset > from->offset ? block->code.body
                                                           : block->code.polled;
    memory_.At(0).Patch(exit.site.distance, target);
    block->incoming.push_back(number);
  }
  return Go(block->code.body);
}

// ---- slow paths

uint64_t Engine::OnFill(void* state, uint64_t address, uint64_t site) {
  return EngineOf(state).Fill(address, Site::Unpack(site));
}

uint64_t Engine::Fill(uint64_t address, Site site) {
  Cpu& c = cpu();
  if (state_.misses[0][site.slot] == 0 && Polymorphic(site, address)) return Resume(site.offset);
  const Access access = site.write ? Access::kWrite : Access::kRead;
  if ((address & 0xfff) + site.span <= 4096 && mmu::TryMap(c, address, access)) {
    Tlb& tlb = *c.tlb;
    const TlbEntry& entry = tlb.data(address);
    if (tlb.changes() == seen_changes_ &&
        (site.write ? entry.write : entry.read) == tlb.Tag(address)) {
      ++counters_.fills;
      (&state_.slots[0][0])[site.slot] = {address & kPageMask, entry.addend};
      state_.used[site.slot / kSlots] = 1;
      if (tlb.data_class() == Tlb::kSupervisor && address >> 63 == 0)
        state_.lower_in_supervisor = 1;
      return 0;
    }
  }
  ++counters_.fill_failures;
  if ((address & 0xfff) + site.span <= 4096 || !site.shared) return Interpret(site);
  // Accesses that were checked together lie on two pages: checked one by one they do better.
  const uint8_t* host = UnitCode(site);
  Block* block = host == nullptr ? nullptr : Find(host, running_mode_);
  if (block != nullptr && ++block->failures == kSingleAfter) {
    single_.insert(Key(host, running_mode_));
    Kill(block);
  }
  return Resume(site.offset, Grouping::kSingle);
}

// The first byte of a site's unit. The fetch may raise a fault: as of the site.
const uint8_t* Engine::UnitCode(const Site& site) {
  TakeFlags();
  cpu().rip = cpu().insn_rip = state_.page + site.offset;
  return FetchCode(cpu(), CodeLinear(cpu(), state_.page + site.unit));
}

// After 256 misses of a slot: true if they came so fast that the unit is better off asking the TLB
// there; then the unit is gone.
bool Engine::Polymorphic(const Site& site, uint64_t address) {
  constexpr uint64_t kTicksAMiss = 1000;
  state_.misses[0][site.slot] = 1;
  const uint64_t now = __builtin_ia32_rdtsc();
  const bool fast = now - since_[site.slot] < 256 * kTicksAMiss;
  since_[site.slot] = now;
  if (!fast) return false;
  const uint8_t* host = UnitCode(site);
  Block* block = host == nullptr ? nullptr : Find(host, running_mode_);
  if (block == nullptr) return false;
  auto& [groups, upper] = polymorphic_[Key(host, running_mode_)];
  // It asks already: the TLB is too small for it.
  if (groups[site.group] && upper[site.group] == (address >> 63 != 0)) return false;
  groups.set(site.group);
  upper.set(site.group, address >> 63 != 0);
  Kill(block);
  return true;
}

// In a unit that begins at `offset`.
uint64_t Engine::Resume(uint16_t offset, Grouping grouping) {
  TakeFlags();
  cpu().rip = state_.page + offset;
  Block* block = Locate(grouping);
  if (block == nullptr) return Go(stubs_.exit);
  GiveFlags();
  return Go(block->code.body);
}

uint64_t Engine::OnInterpret(void* state, uint64_t, uint64_t site) {
  Engine& engine = EngineOf(state);
  const Site what = Site::Unpack(site);
  if (what.shared) engine.NoteNeedless(engine.UnitCode(what));
  return engine.Interpret(what);
}

uint64_t Engine::Interpret(Site site) {
  Cpu& c = cpu();
  const uint8_t* unit = site.shared ? UnitCode(site) : nullptr;
  TakeFlags();
  c.rip = state_.page + site.offset;
  for (unsigned i = 0; i < site.count; ++i) {
    const uint64_t before = c.rip;
    ++counters_.steps;
    StepInstruction(c);
    if (Requested(c)) return Go(stubs_.exit);
    if (c.rip - before - 1 > 14 || !Supports(c)) {
      if (unit != nullptr && i + 1 < site.count) NoteNeedless(unit);
      break;
    }
  }
  return Dispatch();
}

// A check failed of accesses that didn't follow (a null pointer that the program tests itself,
// mostly), or that don't fit into their segment together. If that goes on the unit checks each
// access where it is made.
void Engine::NoteNeedless(const uint8_t* unit) {
  Block* block = Find(unit, running_mode_);
  if (block == nullptr || ++block->failures != kSingleAfter) return;
  single_.insert(Key(unit, running_mode_));
  Kill(block);
}

uint64_t Engine::OnExecute(void* state, uint64_t s0, uint64_t insn) {
  return EngineOf(state).Execute(s0, *reinterpret_cast<const Insn*>(insn), false);
}

uint64_t Engine::OnExecuteEnd(void* state, uint64_t s0, uint64_t insn) {
  return EngineOf(state).Execute(s0, *reinterpret_cast<const Insn*>(insn), true);
}

uint64_t Engine::Execute(uint64_t s0, const Insn& insn, bool ends) {
  ++counters_.executes;
  Cpu& c = cpu();
  TakeFlags();
  c.insn_rip = state_.page + (s0 & 0xfff);
  const uint64_t next = c.insn_rip + insn.length;
  c.rip = next;
  insn.exec(c, insn);
  if (ends) return Branched();
  if (Requested(c) || c.rip != next || Mode() != running_mode_) return Dispatch();
  if (c.tlb->changes() != seen_changes_) {
    // Is the rest of the unit still what comes next?
    const uint8_t* host;
    std::memcpy(&host, &insn + 1, sizeof(host));
    const uint64_t linear = CodeLinear(c, next);
    if (linear % kPageSize == 0) return Dispatch();
    c.insn_rip = next;
    if (FetchCode(c, linear) != host) return Dispatch();
    Entered(running_mode_);
  }
  GiveFlags();
  return 0;
}

// ---- units

Engine::Block* Engine::Find(const uint8_t* host, uint16_t mode) {
  const uint64_t key = Key(host, mode);
  Quick& quick = QuickAt(key);
  if (quick.key == key) return quick.block;
  const auto it = blocks_.find(key);
  if (it == blocks_.end()) return nullptr;
  quick = {key, it->second.get()};
  return quick.block;
}

Engine::Page* Engine::PageOf(const uint8_t* host, uint16_t mode) {
  const auto* base =
      reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(host) & kPageMask);
  std::unique_ptr<Page>& page = pages_[Key(base, mode)];
  if (page == nullptr) {
    page = std::make_unique<Page>();
    page->host = base;
    page->mode = mode;
    page->watch = WatchCode(cpu(), base);
    page->word = page->watch.word;
    watched_.emplace(page->word, page.get());
    page->slot = free_code_slots_.back();
    free_code_slots_.pop_back();
  }
  return page.get();
}

Engine::Block* Engine::Translate(const uint8_t* host, uint16_t mode) {
  if (free_code_slots_.empty() || memory_.At(used_).room() < kUnitRoom) Flush();
  const auto offset = static_cast<unsigned>(reinterpret_cast<uintptr_t>(host) & 0xfff);
  Page* page = PageOf(host, mode);
  // The watch may have been taken by somebody else's write since.
  if (__atomic_load_n(page->watch.word, __ATOMIC_SEQ_CST) != page->watch.value) {
    if (Recheck(page) == nullptr) page = PageOf(host, mode);
  }
  const DecodeContext context = DecodeContextOf(mode, features_);
  const uint64_t key = Key(host, mode);
  const Grouping grouping =
      (mode & mode::kSingle) != 0 || single_.contains(key) ? Grouping::kSingle : Grouping::kShared;
  if (!unit_.Build(context, UnitModeOf(mode), page->host, offset, grouping)) return nullptr;
  const unsigned cls = ClassOf(mode);
  memory_.Populate(used_ + kUnitRoom);
  Assembler as = memory_.At(used_);
  const auto known = polymorphic_.find(key);
  const TranslationContext::Polymorphic polymorphic =
      known == polymorphic_.end() ? TranslationContext::Polymorphic{} : known->second;
  const TranslationContext where = {.stubs = &stubs_,
                                    .data_class = cls,
                                    .first_slot = next_slot_[cls],
                                    .code_slot = page->slot,
                                    .first_exit = static_cast<uint32_t>(exits_.size()),
                                    .polymorphic = polymorphic,
                                    .page = page->host};
  next_slot_[cls] = (next_slot_[cls] + unit_.group_count()) % kSlots;
  auto block = std::make_unique<Block>();
  block->host = host;
  block->mode = mode;
  block->offset = static_cast<uint16_t>(offset);
  block->code = Translator(unit_, as, where).Run();
  block->end = as.run();
  block->page = page;
  block->ranges = unit_.ranges();
  block->digest = Digest(page->host, block->ranges);
  block->first_exit = where.first_exit;
  for (const ExitSite& exit : block->code.exits) exits_.push_back({exit, block.get()});
  used_ = (memory_.OffsetOf(as.here()) + 15) & ~size_t{15};
  page->blocks.push_back(block.get());
  by_code_[block->code.checked] = block.get();
  ++counters_.units;
  counters_.unit_insns += unit_.count();
  if ((mode & mode::kCode16) != 0) ++counters_.units16;
  if ((mode & mode::kCode32) != 0) ++counters_.units32;
  Publish(*block);
  Block* result = block.get();
  blocks_[key] = std::move(block);
  return result;
}

void Engine::Kill(Block* block) {
  ++counters_.killed_units;
  std::erase(block->page->blocks, block);
  block->page = nullptr;
  Assembler as = memory_.At(memory_.OffsetOf(block->code.body_write));
  as.Jmp(block->code.leave);
  // Jump tables keep its checked entry. From there flags are in saved_flags, where a unit that had
  // no use for them wouldn't leave them.
  memory_.At(memory_.OffsetOf(block->code.checked - memory_.delta())).Jmp(stubs_.dispatch);
  for (const uint32_t number : block->incoming) {
    if (exits_[number].from->page == nullptr) continue;  // killed: its code isn't what it was
    as.Patch(exits_[number].site.distance, exits_[number].site.thunk);
  }
  block->incoming.clear();
  Quick& quick = QuickAt(Key(block->host, block->mode));
  if (quick.block == block) quick = {};
  const auto it = blocks_.find(Key(block->host, block->mode));
  dead_.push_back(std::move(it->second));  // its exits and marks may be asked for until the flush
  blocks_.erase(it);
}

// After a write to a page of code: units that are as they were stay, and the page is watched anew.
// Null: it holds code no more, or is written again and again while nothing of it runs.
Engine::Page* Engine::Recheck(Page* page) {
  const bool idle = ++page->rechecks > kIdleRechecks;
  if (!idle) page->watch = WatchCode(cpu(), page->host);
  std::vector<Block*> changed;
  for (Block* block : page->blocks) {
    if (idle || Digest(page->host, block->ranges) != block->digest) changed.push_back(block);
  }
  for (Block* block : changed) Kill(block);
  if (!page->blocks.empty()) return page;
  // It may be watched for nothing now: until the next write.
  const auto [first, last] = watched_.equal_range(page->word);
  for (auto it = first; it != last; ++it) {
    if (it->second != page) continue;
    watched_.erase(it);
    break;
  }
  state_.code_pages[page->slot] = kNoPage;
  free_code_slots_.push_back(page->slot);
  pages_.erase(Key(page->host, page->mode));
  return nullptr;
}

void Engine::NoteWritten(const uint32_t* word) {
  auto written = written_.Lock();
  if (written->empty() || written->back() != word) written->push_back(word);
}

void Engine::CheckPages() {
  std::vector<const uint32_t*> words;
  std::swap(words, *written_.Lock());
  std::vector<Page*> pages;
  for (const uint32_t* word : words) {
    const auto [first, last] = watched_.equal_range(word);
    for (auto it = first; it != last; ++it) pages.push_back(it->second);
  }
  for (Page* page : pages) {
    if (__atomic_load_n(page->watch.word, __ATOMIC_SEQ_CST) != page->watch.value) Recheck(page);
  }
}

void Engine::Flush() {
  ++counters_.flushes;
  blocks_.clear();
  dead_.clear();
  pages_.clear();
  by_code_.clear();
  watched_.clear();
  exits_.clear();
  for (unsigned cls = 0; cls < kClassCount; ++cls) {
    entered_lower_[cls].clear();
    entered_upper_[cls].clear();
  }
  free_code_slots_.clear();
  for (unsigned i = kCodeSlots; i-- > 0;) free_code_slots_.push_back(i);
  std::fill_n(state_.code_pages, kCodeSlots, kNoPage);
  for (auto& table : state_.jumps) std::fill_n(table, kJumpEntries, Go(stubs_.dispatch));
  std::fill(std::begin(quick_), std::end(quick_), Quick{});
  single_.clear();
  polymorphic_.clear();
  std::memset(state_.misses, 1, sizeof(state_.misses));
  used_ = (stubs_end_ + 63) & ~size_t{63};
  memory_.Discard(used_);
  std::memset(static_cast<void*>(state_.slots), kSlotClear, sizeof(state_.slots));
}

// ---- slots and entered pages mirror the TLB

void Engine::ClearSlots(unsigned cls) {
  if (!state_.used[cls]) return;
  state_.used[cls] = 0;
  std::memset(static_cast<void*>(state_.slots[cls]), kSlotClear, sizeof(state_.slots[cls]));
}

void Engine::LeavePages(std::vector<unsigned>& entered) {
  for (const unsigned slot : entered) state_.code_pages[slot] = kNoPage;
  entered.clear();
}

void Engine::DropAll() {
  ClearSlots(Tlb::kSupervisor);
  state_.lower_in_supervisor = 0;
  for (auto& entered : entered_upper_) LeavePages(entered);
  DropLowerHalf();
}

void Engine::DropLowerHalf() {
  ClearSlots(Tlb::kUser);
  ClearSlots(Tlb::kNoSmap);
  if (state_.lower_in_supervisor) ClearSlots(Tlb::kSupervisor);
  state_.lower_in_supervisor = 0;
  for (auto& entered : entered_lower_) LeavePages(entered);
}

void Engine::DropWrites(const uint8_t* host_page) {
  for (auto& slots : state_.slots) {
    for (Slot& slot : slots) {
      if (slot.page + slot.addend == reinterpret_cast<uint64_t>(host_page))
        std::memset(static_cast<void*>(&slot), kSlotClear, sizeof(slot));
    }
  }
}

void Engine::DropAllWrites() { DropAll(); }

// ---- host exceptions

Engine::Block* Engine::BlockAt(const uint8_t* run) {
  auto it = by_code_.upper_bound(run);
  if (it == by_code_.begin()) return nullptr;
  Block* block = (--it)->second;
  return run < block->end ? block : nullptr;
}

bool Engine::OnTrap(void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* rip = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (!memory_.Contains(rip)) return false;
  const Block* block = BlockAt(rip);
  if (block == nullptr) return false;
  const auto at = static_cast<uint32_t>(rip - block->code.checked);
  const InsnMark* mark = nullptr;
  for (const InsnMark& candidate : block->code.marks) {
    if (candidate.begin > at) break;
    mark = &candidate;
  }
  if (mark == nullptr) return false;
  ++counters_.traps;
  if (mark->flags_in_host) {
    const auto flags = static_cast<uint64_t>(registers[REG_EFL]);
    state_.saved_flags =
        static_cast<uint16_t>((flags & 0xd5) << 8 | 0x200 | ((flags & rflags::kOf) != 0 ? 1 : 0));
  }
  registers[REG_R11] = static_cast<greg_t>(Site{.offset = mark->offset, .count = 1}.Pack());
  registers[REG_RIP] = reinterpret_cast<greg_t>(stubs_.interpret);
  return true;
}

}  // namespace kvartz::cpu::x86::jit
