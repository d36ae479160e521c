// The translator's outside: translated units of one vCPU, where they are found, and how control
// gets from one to the next.
//
// Units are kept by the physical page that their code lies in (its host address) and the mode, and
// know their RIP only as an offset from State::page. So a page that is mapped elsewhere, or into
// another address space, needs no new translation. What may be wrong after a change of mapping is
// asked at each entry from another page (State::code_pages).
#pragma once

#include <bitset>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/result.h"
#include "base/sync.h"
#include "cpu/accel.h"
#include "cpu/x86/cpu.h"
#include "cpu/x86/jit/block_store.h"
#include "cpu/x86/jit/code_memory.h"
#include "cpu/x86/jit/mode.h"
#include "cpu/x86/jit/perf_map.h"
#include "cpu/x86/jit/state.h"
#include "cpu/x86/jit/stubs.h"
#include "cpu/x86/jit/translator.h"
#include "cpu/x86/jit/unit.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86::jit {

// What happened, for -d and the curious.
struct Counters {
  uint64_t units = 0, unit_insns = 0;  // translated
  uint64_t dispatches = 0, links = 0;  // asked where to go on; direct branches tied
  uint64_t fills = 0,
           fill_failures = 0;  // slots filled after a look at the page tables; interpreted instead
  uint64_t executes = 0;       // instructions given to the interpreter's functions
  uint64_t steps = 0;          // instructions interpreted outside of a unit
  uint64_t killed_units = 0;   // their code changed
  uint64_t evictions = 0, flushes = 0;  // a region was emptied; all was
  uint64_t traps = 0;                   // host exceptions that were the guest's
  uint64_t units16 = 0, units32 = 0;    // of `units`: of 16-bit and of 32-bit code
};

// Owned by the vCPU's thread.
class Engine final : private Tlb::Follower {
 public:
  // Errors: no executable memory.
  static Result<std::unique_ptr<Engine>> Create(State& state, const FeatureSet& features,
                                                size_t code_bytes);
  ~Engine() override;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // The mode can be translated.
  static bool Supports(const Cpu& cpu);
  // Runs until something is requested or the mode isn't supported. As RunBlocks.
  void Run();
  // Code on the page of a watch was written. Any thread; CheckPages follows.
  void NoteWritten(const uint32_t* word);
  // Of a page that was written, no unit is entered before those whose code changed are dropped.
  void CheckPages();
  // Drops everything (the memory map changed).
  void Flush();
  // The thread that will call Run.
  void AttachThread();

  const Counters& counters() const { return counters_; }
  // The stubs get a name.
  void PublishStubs(const PerfMap& map);
  // Of the parked vCPU.
  std::vector<EngineStatistic> Statistics() const;
  // A signal came while translated code ran: continues in the interpreter. False: not of this code.
  bool OnTrap(void* ucontext);

 private:
  Engine(State& state, const FeatureSet& features);

  struct Adaptation;

  static uint64_t OnFill(void* state, uint64_t address, uint64_t site);
  static uint64_t OnExecute(void* state, uint64_t s0, uint64_t insn);
  static uint64_t OnExecuteEnd(void* state, uint64_t s0, uint64_t insn);
  static uint64_t OnInterpret(void* state, uint64_t, uint64_t site);
  static uint64_t OnDispatch(void* state, uint64_t target, uint64_t);
  static uint64_t OnLink(void* state, uint64_t target, uint64_t exit);
  static uint64_t OnLinkSame(void* state, uint64_t, uint64_t exit);
  static uint64_t OnReadTsc(void* state);
  static uint64_t OnReadTscp(void* state);
  static uint64_t OnLeave(void* state, uint64_t, uint64_t after_call);

  Cpu& cpu() { return state_.cpu; }
  void TakeFlags();  // State::saved_flags -> Cpu::rflags
  void GiveFlags();
  uint64_t Go(const uint8_t* target) { return reinterpret_cast<uint64_t>(target); }
  uint64_t Fill(uint64_t address, const Site& site);
  uint64_t Execute(const ExecuteSite& site, bool ends);
  uint64_t Interpret(const Site& site);
  uint64_t Dispatch();
  uint64_t Link(uint32_t exit);
  // kSingle: a unit with a check for each access.
  enum class Grouping : uint8_t { kShared, kSingle };
  // The unit at Cpu::rip, or null: leave.
  Block* Locate(Grouping grouping = Grouping::kShared);
  uint64_t Branched();
  uint64_t Undo(Branch branch);
  uint64_t Resume(uint16_t offset);
  bool Adapt(const Site& site, uint64_t address);
  const uint8_t* UnitCode(const Site& site);
  enum class Failure : uint8_t { kSeldom, kOften };
  Failure NoteFailure(const uint8_t* unit, unsigned group);
  uint64_t ResumeSingle(const Site& site);
  void SwitchTo(uint16_t mode, unsigned cls);
  void Entered(uint16_t mode);
  // As it is wanted at Cpu::rip.
  Block* Obtain(const uint8_t* host, uint16_t mode);
  // The unit, if its code is as it was. Null: there is none.
  Block* Find(const uint8_t* host, uint16_t mode);
  // `next`: the page that follows, if that is known. Null: `built` says why.
  Block* Translate(const uint8_t* host, uint16_t mode, const uint8_t* next, Unit::Built* built);
  Block* Emit(CodePage* page, CodePage* next_page, uint16_t mode, const Unit::Pages& bytes,
              Adaptation* adaptation);
  // `page`, `next`: its bytes, and those of the page behind.
  uint64_t Digest(const Block& block, const uint8_t* page, const uint8_t* next) const;
  uint64_t Digest(const Block& block) const {
    return Digest(block, block.page->host, block.next_page ? block.next_page->host : nullptr);
  }
  void EnterPage(const CodePage& page, uint64_t rip, uint64_t linear);
  void Publish(const Block& block) const;
  CodePage* PageOf(const uint8_t* host, uint16_t mode);
  void Kill(Block* block);
  void Forget(Block* block);
  void ForgetTargets();
  void Evict();
  CodePage* Recheck(CodePage* page);
  void Drop(CodePage* page);
  void DropStale();
  CodePage* CurrentPage(const uint8_t* host, uint16_t mode);
  void ClearSlots(unsigned cls);
  void ClearLowerSlots();
  void LeavePages(unsigned half);
  // ---- Tlb::Follower
  void DropAll() override;
  void DropLowerHalf() override;
  void DropPage(uint64_t linear) override;
  void DropLowerHalfAnd(std::span<const uint64_t> pages) override;
  void LeavePage(uint64_t linear);
  void DropWrites(const uint8_t* host_page) override;
  void DropAllWrites() override;
  uint16_t running_mode() const { return static_cast<uint16_t>(state_.running_mode); }
  uint16_t Mode() const { return ModeOf(state_.cpu); }
  static uint64_t Key(const uint8_t* host, uint16_t mode) {
    return reinterpret_cast<uint64_t>(host) << 16 | mode;
  }

  State& state_;
  const FeatureSet features_;
  CodeMemory memory_;
  Stubs stubs_;
  size_t stubs_end_ = 0;  // of memory_
  BlockStore store_;
  std::unordered_map<uint64_t, std::unique_ptr<CodePage>> pages_;
  std::unordered_multimap<const uint32_t*, CodePage*> watched_;  // pages_ by watch
  Guarded<std::vector<const uint32_t*>> written_;
  uint8_t code_copy_[kPageSize];
  // How a unit's accesses are checked, if not as units are at first.
  struct Adaptation {
    // If some slot misses again and again, the unit is made to count how often each is asked; then
    // those accesses that are better off asking the TLB do so.
    enum : uint8_t { kSlots, kCounting, kSettled } stage = kSlots;
    std::vector<uint16_t> counting;  // slots of its groups
    TranslationContext::Polymorphic polymorphic;
    // Accesses whose common check failed again and again, and the groups which are the next.
    LoneAccesses lone;
    std::bitset<2 * kMaxUnitInsns> failing;
    struct Failures {
      unsigned count = 0;
      uint64_t since = 0;  // time stamp
    };
    std::vector<Failures> failures;  // by group
  };
  std::unordered_map<uint64_t, Adaptation> adapted_;  // by key
  // Places where units were dropped because their code changed, by hash of the key; and how the
  // code there was last time, but for its immediates (Unit::Shape).
  struct Changed {
    uint64_t key = 0, shape = 0;
  };
  static constexpr unsigned kChanged = 1024;
  Changed changed_[kChanged];
  Changed& ChangedAt(uint64_t key) { return changed_[(key * 0x9e3779b97f4a7c15) >> 54]; }
  uint64_t since_[kClassCount * kSlots] = {};  // time stamp of a slot's last 256th miss
  std::vector<unsigned> free_code_slots_;
  uint16_t jump_modes_[kClassCount] = {};
  CodeSegment jump_segments_[kClassCount];
  bool entered_elsewhere_ = false;  // a page is entered whose linear address isn't its RIP's
  unsigned next_read_slot_[kClassCount] = {}, next_write_slot_[kClassCount] = {};
  uint64_t seen_changes_ = 0;  // of the TLB, when a unit was entered last
  Unit unit_;
  Translator::Buffers buffers_;
  Site trap_site_;
  Counters counters_;
};

}  // namespace kvartz::cpu::x86::jit
