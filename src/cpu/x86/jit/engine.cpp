#include "cpu/x86/jit/engine.h"

#include <asm/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "cpu/x86/engine.h"
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
constexpr size_t kMostInsnBytes = 15;
constexpr unsigned kIdleRechecks = 8;

Engine& EngineOf(void* state) { return *static_cast<Engine*>(static_cast<State*>(state)->engine); }

// Then the host also has XSAVE, and allows it.
bool HostHasAvx() { return __builtin_cpu_supports("avx") != 0; }

// CS begins at 0, and has no end in code of this size.
bool RipIsLinear(uint16_t mode) {
  return (mode & mode::kLegacy) == 0 ||
         ((mode & mode::kCode32) != 0 && (mode & mode::kCodeFlat) != 0);
}

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
        block->page->rechecks = 0;
        EnterPage(*block->page, state_.page, linear & kPageMask);
        if (block->next_page != nullptr)
          EnterPage(*block->next_page, state_.page + kPageSize, (linear & kPageMask) + kPageSize);
        if (grouping == Grouping::kShared) {
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
  if (counters_.evictions == evictions && counters_.steps == steps) {
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
  if (state_.misses[0][site.slot] == 0 && Adapt(site, address)) return Resume(site.offset);
  const Access access = site.write() ? Access::kWrite : Access::kRead;
  if ((address & 0xfff) + site.span <= 4096 && mmu::TryMap(c, address, access)) {
    Tlb& tlb = *c.tlb;
    const TlbEntry& entry = tlb.data(address);
    if (tlb.changes() == seen_changes_ &&
        (site.write() ? entry.write : entry.read) == tlb.Tag(address)) {
      ++counters_.fills;
      (&state_.slots[0][0])[site.slot] = {address & kPageMask, entry.addend};
      (&state_.used[0][0])[site.slot >> kSlotChunkBits] = 1;
      if (tlb.data_class() == Tlb::kSupervisor && address >> 63 == 0)
        state_.lower_in_supervisor = 1;
      return 0;
    }
  }
  ++counters_.fill_failures;
  if ((address & 0xfff) + site.span <= 4096 || !site.shared()) return Interpret(site);
  // Accesses that were checked together lie on two pages: checked one by one they do better.
  const uint8_t* host = UnitCode(site);
  Block* block = host == nullptr ? nullptr : store_.Find(Key(host, running_mode()));
  if (block != nullptr && ++block->failures == kSingleAfter) {
    single_.insert(Key(host, running_mode()));
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

// After 256 misses of a slot. True if its unit is gone, to be made in another way.
bool Engine::Adapt(const Site& site, uint64_t address) {
  // What a miss costs, in checks that ask the TLB.
  constexpr uint32_t kMissCost = 12;
  // Rarer ones come from slots that many places share, or from switches of address spaces.
  constexpr uint64_t kTicksAMiss = 100000;
  state_.misses[0][site.slot] = 1;
  const uint64_t now = __builtin_ia32_rdtsc(), before = std::exchange(since_[site.slot], now);
  if (now - before > 256 * kTicksAMiss) return false;
  const uint8_t* host = UnitCode(site);
  Block* block = host == nullptr ? nullptr : store_.Find(Key(host, running_mode()));
  if (block == nullptr) return false;
  Adaptation& unit = adapted_[block->key];
  auto& [groups, upper] = unit.polymorphic;
  const bool in_upper = address >> 63 != 0;
  if (unit.settled) {
    if (!groups[site.group] || upper[site.group] == in_upper) return false;
    upper[site.group] = in_upper;
  }
  for (size_t group = 0; !unit.settled && group < unit.counting.size(); ++group) {
    const uint16_t slot = unit.counting[group];
    const bool this_one = slot == site.slot;
    const uint32_t misses = this_one ? 256 : state_.misses[0][slot] - 1;
    groups[group] = misses * kMissCost > state_.checks[0][slot];
    const Slot& last = state_.slots[0][slot];
    upper[group] = this_one || last.page == last.addend ? in_upper : last.page >> 63 != 0;
  }
  unit.settled = !unit.counting.empty();
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
  return Go(block->entries.body);
}

uint64_t Engine::OnInterpret(void* state, uint64_t, uint64_t site) {
  Engine& engine = EngineOf(state);
  const Site what = *reinterpret_cast<const Site*>(site);
  if (what.shared()) engine.NoteNeedless(engine.UnitCode(what));
  return engine.Interpret(what);
}

// The site may be gone when this is done with it.
uint64_t Engine::Interpret(const Site& site) {
  Cpu& c = cpu();
  const unsigned count = site.count;
  const uint8_t* unit = site.shared() ? UnitCode(site) : nullptr;
  TakeFlags();
  c.rip = state_.page + site.offset;
  for (unsigned i = 0; i < count; ++i) {
    const uint64_t before = c.rip;
    ++counters_.steps;
    StepInstruction(c);
    if (Requested(c)) return Go(stubs_.exit);
    if (c.rip - before - 1 > 14 || !Supports(c)) {
      if (unit != nullptr && i + 1 < count) NoteNeedless(unit);
      break;
    }
  }
  return Dispatch();
}

// A check failed of accesses that didn't follow (a null pointer that the program tests itself,
// mostly), or that don't fit into their segment together. If that goes on the unit checks each
// access where it is made.
void Engine::NoteNeedless(const uint8_t* unit) {
  Block* block = store_.Find(Key(unit, running_mode()));
  if (block == nullptr || ++block->failures != kSingleAfter) return;
  single_.insert(block->key);
  Kill(block);
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

// ---- units

// A change of the code changes it, but for one in 2^64.
uint64_t Engine::Digest(const Block& block, const uint8_t* page, const uint8_t* next) const {
  uint64_t digest = block.range_count;
  const CodeRange* ranges = store_.ranges(block);
  for (const CodeRange* range = ranges; range < ranges + block.range_count; ++range) {
    const uint8_t* code =
        range->offset < kPageSize ? page + range->offset : next + (range->offset - kPageSize);
    for (unsigned done = 0; done < range->size; done += 8) {
      uint64_t word = 0;
      std::memcpy(&word, code + done, std::min(8u, range->size - done));
      digest = (digest ^ word) * 0x9e3779b97f4a7c15;
      digest ^= digest >> 29;
    }
  }
  return digest;
}

Block* Engine::Obtain(const uint8_t* host, uint16_t mode) {
  Block* block = store_.Find(Key(host, mode));
  if (block != nullptr && block->next_page == nullptr) return block;
  Unit::Built built = Unit::Built::kNeedsNext;
  if (block == nullptr) block = Translate(host, mode, nullptr, &built);
  if (built != Unit::Built::kNeedsNext) return block;
  // The next page's fetch may raise a fault: the instruction's. Where CS ends or wraps in between
  // is left to the interpreter.
  if (!RipIsLinear(mode)) return nullptr;
  const uint64_t next_page = (cpu().rip & kPageMask) + kPageSize;
  if (CodeLinear(cpu(), next_page) != next_page) return nullptr;
  const uint8_t* next = FetchCode(cpu(), next_page);
  if (next == nullptr) return nullptr;
  if (block != nullptr && block->next_page->host != next) {
    Kill(block);
    block = nullptr;
  }
  return block != nullptr ? block : Translate(host, mode, next, &built);
}

// The page that runs, or follows it, holds code of `page`. Stubs::enter_page does the same.
void Engine::EnterPage(const CodePage& page, uint64_t rip, uint64_t linear) {
  uint64_t& entered = state_.code_pages[page.slot];
  if (entered == rip) return;
  const unsigned half = linear >> 63;
  if (state_.entered_count[half] == kEntered) LeavePages(half);
  state_.entered[half][state_.entered_count[half]++] = static_cast<uint16_t>(page.slot);
  state_.entered_pages[(linear >> 12) % kEnteredHash] = 1;
  entered = rip;
  entered_elsewhere_ |= rip != linear;
}

CodePage* Engine::PageOf(const uint8_t* host, uint16_t mode) {
  const auto* base =
      reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(host) & kPageMask);
  const uint64_t key = Key(base, mode);
  std::unique_ptr<CodePage>& page = pages_[key];
  if (page == nullptr) {
    page = std::make_unique<CodePage>();
    page->key = key;
    page->host = base;
    page->watch = WatchCode(cpu(), base);
    page->word = page->watch.word;
    watched_.emplace(page->word, page.get());
    page->slot = free_code_slots_.back();
    free_code_slots_.pop_back();
    state_.code_hosts[page->slot] = base;
  }
  return page.get();
}

// The watch may have been taken by somebody else's write since.
CodePage* Engine::CurrentPage(const uint8_t* host, uint16_t mode) {
  CodePage* page = PageOf(host, mode);
  if (__atomic_load_n(page->watch.word, __ATOMIC_SEQ_CST) == page->watch.value) return page;
  return Recheck(page) != nullptr ? page : PageOf(host, mode);
}

Block* Engine::Translate(const uint8_t* host, uint16_t mode, const uint8_t* next,
                         Unit::Built* built) {
  if (free_code_slots_.size() < 2) Flush();
  if (!store_.HasRoom()) Evict();
  const auto offset = static_cast<unsigned>(reinterpret_cast<uintptr_t>(host) & 0xfff);
  CodePage* page = CurrentPage(host, mode);
  CodePage* next_page = next == nullptr ? nullptr : CurrentPage(next, mode);
  const Grouping grouping = (mode & mode::kSingle) != 0 || single_.contains(Key(host, mode))
                                ? Grouping::kSingle
                                : Grouping::kShared;
  Unit::Pages bytes{.first = page->host, .next = next};
  uint8_t next_bytes[kMostInsnBytes];
  if (cpu().tlb->world != nullptr) {
    // Others may be writing there: what is translated must be what the digest is of.
    std::memcpy(code_copy_, page->host, kPageSize);
    bytes.first = code_copy_;
    if (next != nullptr)
      bytes.next = static_cast<uint8_t*>(std::memcpy(next_bytes, next, sizeof(next_bytes)));
  }
  *built = unit_.Build(DecodeContextOf(mode, features_), UnitModeOf(mode), bytes, offset, grouping);
  if (*built != Unit::Built::kOk) return nullptr;
  return Emit(page, unit_.crosses() ? next_page : nullptr, mode, bytes);
}

// What unit_ holds.
Block* Engine::Emit(CodePage* page, CodePage* next_page, uint16_t mode, const Unit::Pages& bytes) {
  const uint16_t offset = unit_[0].offset;
  const uint64_t key = Key(page->host + offset, mode);
  const unsigned cls = ClassOf(mode);
  BlockStore::Region& region = store_.region();
  memory_.Populate(region.used + kUnitRoom);
  Assembler as = memory_.At(region.used);
  const auto adapted = adapted_.empty() ? adapted_.end() : adapted_.find(key);
  Adaptation* adaptation = adapted == adapted_.end() ? nullptr : &adapted->second;
  const TranslationContext where = {
      .stubs = &stubs_,
      .data_class = cls,
      .first_read_slot = next_read_slot_[cls],
      .first_write_slot = next_write_slot_[cls],
      .code_slot = page->slot,
      .next_code_slot = next_page == nullptr ? 0 : next_page->slot,
      .mode = RipIsLinear(mode) ? mode & ~unsigned{mode::kSingle} : 0,
      .first_exit = store_.NextExit(),
      .exit_step = store_.exit_step(),
      .counts_checks = adaptation != nullptr && !adaptation->settled,
      .polymorphic =
          adaptation == nullptr ? TranslationContext::Polymorphic{} : adaptation->polymorphic,
      .pages = {.first = page->host, .next = next_page == nullptr ? nullptr : next_page->host}};
  const EntryPoints entries = Translator(unit_, as, where, buffers_).Run();
  if (where.counts_checks) {
    adaptation->counting.clear();
    for (unsigned group = 0; group < unit_.group_count(); ++group) {
      const uint16_t slot = unit_.group(group).slot;
      adaptation->counting.push_back(slot);
      state_.misses[0][slot] = 1;
      state_.checks[0][slot] = 0;
    }
  }
  next_read_slot_[cls] = (next_read_slot_[cls] + buffers_.reads) % kWriteSlots;
  next_write_slot_[cls] = (next_write_slot_[cls] + buffers_.writes) % (kSlots - kWriteSlots);
  Block* block = store_.Add(buffers_, unit_.ranges());
  block->key = key;
  block->mode = mode;
  block->offset = offset;
  block->entries = entries;
  block->end = as.run();
  block->page = page;
  block->next_page = next_page;
  block->digest = Digest(*block, bytes.first, bytes.next);
  region.used = (memory_.OffsetOf(as.here()) + 15) & ~size_t{15};
  page->blocks.push_back(block);
  if (next_page != nullptr && next_page != page) next_page->blocks.push_back(block);
  store_.Insert(block);
  ++counters_.units;
  counters_.unit_insns += unit_.count();
  if ((mode & mode::kCode16) != 0) ++counters_.units16;
  if ((mode & mode::kCode32) != 0) ++counters_.units32;
  Publish(*block);
  return block;
}

// Nothing finds the unit any more, and nothing of others goes there directly.
void Engine::Forget(Block* block) {
  while (block->incoming != kNoExit) {
    const uint32_t number = block->incoming;
    const ExitSite& site = store_.exit(number).site;
    memory_.At(0).Patch(site.distance, site.thunk);
    store_.Untie(number);
  }
  store_.ForExits(*block, [this](uint32_t number) { store_.Untie(number); });
  std::erase(block->page->blocks, block);
  if (block->next_page != nullptr) std::erase(block->next_page->blocks, block);
  store_.Remove(block);
  block->page = block->next_page = nullptr;
}

// It may be running now, and goes on to its end.
void Engine::Kill(Block* block) {
  ++counters_.killed_units;
  Forget(block);
  memory_.At(memory_.OffsetOf(block->entries.body_write)).Call(stubs_.leave);
  // Jump tables keep its checked entry. From there flags are in saved_flags, where a unit that had
  // no use for them wouldn't leave them.
  memory_.At(memory_.OffsetOf(block->entries.checked - memory_.delta())).Jmp(stubs_.dispatch);
}

// The oldest region of code memory becomes the one that is filled. None of its code is running, or
// will be returned to.
void Engine::Evict() {
  ++counters_.evictions;
  for (Block& block : store_.oldest().blocks) {
    CodePage* pages[] = {block.page, block.next_page};
    if (block.page == nullptr) continue;
    Forget(&block);
    for (CodePage* page : pages) {
      if (page != nullptr && page->blocks.empty()) Drop(page);
      if (pages[0] == pages[1]) break;
    }
  }
  store_.Advance();
  for (auto& table : state_.jumps) std::fill_n(table, kJumpEntries, Go(stubs_.dispatch));
}

// After a write to a page of code: units that are as they were stay, and the page is watched anew.
// Null: it holds code no more, or is written again and again while nothing of it runs.
CodePage* Engine::Recheck(CodePage* page) {
  const bool idle = ++page->rechecks > kIdleRechecks;
  if (!idle) page->watch = WatchCode(cpu(), page->host);
  std::vector<Block*> changed;
  for (Block* block : page->blocks) {
    if (idle || Digest(*block) != block->digest) changed.push_back(block);
  }
  for (Block* block : changed) Kill(block);
  if (!page->blocks.empty()) return page;
  Drop(page);
  return nullptr;
}

// It may be watched for nothing now: until the next write.
void Engine::Drop(CodePage* page) {
  const auto [first, last] = watched_.equal_range(page->word);
  for (auto it = first; it != last; ++it) {
    if (it->second != page) continue;
    watched_.erase(it);
    break;
  }
  state_.code_pages[page->slot] = kNoPage;
  state_.code_hosts[page->slot] = nullptr;
  free_code_slots_.push_back(page->slot);
  pages_.erase(page->key);
}

void Engine::NoteWritten(const uint32_t* word) {
  auto written = written_.Lock();
  if (written->empty() || written->back() != word) written->push_back(word);
}

// Where other CPUs run, each waits here until all are between two instructions. So one that writes
// code goes on when nobody runs the old code any more; and one that was told of a write, which is
// before it happens, sees what was written.
void Engine::CheckPages() {
  std::vector<const uint32_t*> words;
  std::swap(words, *written_.Lock());
  World* world = words.empty() ? nullptr : cpu().tlb->world;
  if (world != nullptr) world->Stop(cpu());
  std::vector<CodePage*> pages;
  for (const uint32_t* word : words) {
    const auto [first, last] = watched_.equal_range(word);
    for (auto it = first; it != last; ++it) pages.push_back(it->second);
  }
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  for (CodePage* page : pages) {
    if (world != nullptr ||
        __atomic_load_n(page->watch.word, __ATOMIC_SEQ_CST) != page->watch.value)
      Recheck(page);
  }
  if (world != nullptr) world->Resume(cpu());
}

void Engine::Flush() {
  ++counters_.flushes;
  ++counters_.evictions;
  pages_.clear();
  watched_.clear();
  LeavePages(0);
  LeavePages(1);
  free_code_slots_.clear();
  for (unsigned i = kCodeSlots; i-- > 0;) free_code_slots_.push_back(i);
  std::fill_n(state_.code_pages, kCodeSlots, kNoPage);
  for (auto& table : state_.jumps) std::fill_n(table, kJumpEntries, Go(stubs_.dispatch));
  single_.clear();
  adapted_.clear();
  std::memset(state_.misses, 1, sizeof(state_.misses));
  const size_t begin = (stubs_end_ + 63) & ~size_t{63};
  store_.Reset(begin, memory_.size(), kUnitRoom);
  memory_.Discard(begin);
  std::memset(static_cast<void*>(state_.slots), kSlotClear, sizeof(state_.slots));
}

// ---- slots and entered pages mirror the TLB

void Engine::ClearSlots(unsigned cls) {
  for (unsigned first = 0; first < kSlotChunks; first += 8) {
    uint64_t used;
    std::memcpy(&used, &state_.used[cls][first], 8);
    if (used == 0) continue;
    std::memset(&state_.used[cls][first], 0, 8);
    for (unsigned chunk = first; used != 0; ++chunk, used >>= 8) {
      if ((used & 0xff) == 0) continue;
      Slot* slots = &state_.slots[cls][chunk << kSlotChunkBits];
      std::memset(static_cast<void*>(slots), kSlotClear, sizeof(Slot) << kSlotChunkBits);
    }
  }
}

void Engine::LeavePages(unsigned half) {
  for (unsigned i = 0; i < state_.entered_count[half]; ++i)
    state_.code_pages[state_.entered[half][i]] = kNoPage;
  state_.entered_count[half] = 0;
  if (state_.entered_count[0] + state_.entered_count[1] != 0) return;
  std::memset(state_.entered_pages, 0, sizeof(state_.entered_pages));
  entered_elsewhere_ = false;
}

void Engine::DropAll() {
  ClearSlots(Tlb::kSupervisor);
  state_.lower_in_supervisor = 0;
  LeavePages(1);
  DropLowerHalf();
}

void Engine::DropLowerHalf() {
  ClearLowerSlots();
  LeavePages(0);
}

// Slots are soon filled again from the TLB: to look for the few would take longer.
void Engine::ClearLowerSlots() {
  ClearSlots(Tlb::kUser);
  ClearSlots(Tlb::kNoSmap);
  if (state_.lower_in_supervisor) ClearSlots(Tlb::kSupervisor);
  state_.lower_in_supervisor = 0;
}

void Engine::DropPage(uint64_t linear) {
  if (linear >> 63) ClearSlots(Tlb::kSupervisor);
  ClearLowerSlots();
  LeavePage(linear);
}

void Engine::DropLowerHalfAnd(std::span<const uint64_t> pages) {
  ClearSlots(Tlb::kSupervisor);
  DropLowerHalf();
  for (const uint64_t page : pages) LeavePage(page);
}

void Engine::LeavePage(uint64_t linear) {
  if (!state_.entered_pages[(linear >> 12) % kEnteredHash]) return;
  if (entered_elsewhere_) {
    LeavePages(0);
    LeavePages(1);
    return;
  }
  const unsigned half = linear >> 63;
  for (unsigned i = 0; i < state_.entered_count[half]; ++i) {
    uint64_t& entered = state_.code_pages[state_.entered[half][i]];
    if (entered == linear) entered = kNoPage;
  }
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
