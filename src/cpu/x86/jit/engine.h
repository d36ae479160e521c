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
#include <map>
#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/result.h"
#include "base/sync.h"
#include "cpu/accel.h"
#include "cpu/x86/cpu.h"
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
  uint64_t killed_units = 0, flushes = 0;  // code changed; code memory was full
  uint64_t traps = 0;                      // host exceptions that were the guest's
  uint64_t units16 = 0, units32 = 0;       // of `units`: of 16-bit and of 32-bit code
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
  // Units whose code changed are dropped.
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
  struct Page;
  struct Block {
    const uint8_t* host = nullptr;
    uint16_t mode = 0;
    uint16_t offset = 0;
    Translation code;
    uint8_t* end = nullptr;  // behind its code, as it runs
    Page* page = nullptr;
    uint32_t first_exit = 0;
    std::vector<uint32_t> incoming;
    std::vector<CodeRange> ranges;
    uint64_t digest = 0;    // of them
    uint16_t failures = 0;  // accesses of a group that didn't lie in one page
  };
  struct Page {
    const uint8_t* host = nullptr;
    uint16_t mode = 0;
    CodeWatch watch{};
    const uint32_t* word = nullptr;  // as it is in watched_
    unsigned rechecks = 0;           // since a unit of it was looked up
    unsigned slot = 0;
    std::vector<Block*> blocks;
  };
  struct Exit {
    ExitSite site;
    Block* from = nullptr;
  };

  Engine(State& state, const FeatureSet& features);

  static uint64_t OnFill(void* state, uint64_t address, uint64_t site);
  static uint64_t OnExecute(void* state, uint64_t s0, uint64_t insn);
  static uint64_t OnExecuteEnd(void* state, uint64_t s0, uint64_t insn);
  static uint64_t OnInterpret(void* state, uint64_t, uint64_t site);
  static uint64_t OnDispatch(void* state, uint64_t target, uint64_t);
  static uint64_t OnLink(void* state, uint64_t target, uint64_t exit);

  Cpu& cpu() { return state_.cpu; }
  void TakeFlags();  // State::saved_flags -> Cpu::rflags
  void GiveFlags();
  uint64_t Go(const uint8_t* target) { return reinterpret_cast<uint64_t>(target); }
  uint64_t Fill(uint64_t address, Site site);
  uint64_t Execute(uint64_t s0, const Insn& insn, bool ends);
  uint64_t Interpret(Site site);
  uint64_t Dispatch();
  uint64_t Link(uint32_t exit);
  // The unit at Cpu::rip, or null: leave.
  Block* Locate(Grouping grouping = Grouping::kShared);
  uint64_t Branched();
  uint64_t Undo(Branch branch);
  uint64_t Resume(uint16_t offset, Grouping grouping = Grouping::kShared);
  bool Polymorphic(const Site& site, uint64_t address);
  const uint8_t* UnitCode(const Site& site);
  void NoteNeedless(const uint8_t* unit);
  void SwitchTo(uint16_t mode, unsigned cls);
  void Entered(uint16_t mode);
  Block* Find(const uint8_t* host, uint16_t mode);
  Block* Translate(const uint8_t* host, uint16_t mode);
  void Publish(const Block& block) const;
  Page* PageOf(const uint8_t* host, uint16_t mode);
  void Kill(Block* block);
  Page* Recheck(Page* page);
  void ClearSlots(unsigned cls);
  void LeavePages(std::vector<unsigned>& entered);
  // ---- Tlb::Follower
  void DropAll() override;
  void DropLowerHalf() override;
  void DropWrites(const uint8_t* host_page) override;
  void DropAllWrites() override;
  uint16_t Mode() const { return ModeOf(state_.cpu); }
  Block* BlockAt(const uint8_t* run);
  static uint64_t Key(const uint8_t* host, uint16_t mode) {
    return reinterpret_cast<uint64_t>(host) << 16 | mode;
  }

  State& state_;
  const FeatureSet features_;
  CodeMemory memory_;
  Stubs stubs_;
  size_t stubs_end_ = 0, used_ = 0;  // of memory_
  std::unordered_map<uint64_t, std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Block>> dead_;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  std::unordered_multimap<const uint32_t*, Page*> watched_;  // pages_ by watch
  Guarded<std::vector<const uint32_t*>> written_;
  std::map<const uint8_t*, Block*> by_code_;  // first byte, as it runs
  std::unordered_map<uint64_t, TranslationContext::Polymorphic> polymorphic_;  // of blocks, by key
  uint64_t since_[kClassCount * kSlots] =
      {};                                // time stamp when a slot's misses were looked at last
  std::unordered_set<uint64_t> single_;  // blocks whose accesses are checked one by one
  std::vector<Exit> exits_;
  // code_pages in use, of the lower and of the upper half.
  std::vector<unsigned> entered_lower_[kClassCount], entered_upper_[kClassCount];
  std::vector<unsigned> free_code_slots_;
  uint16_t jump_modes_[kClassCount] = {};
  CodeSegment jump_segments_[kClassCount];
  unsigned next_slot_[kClassCount] = {};
  uint64_t seen_changes_ = 0;  // of the TLB, when a unit was entered last
  uint16_t running_mode_ = 0;
  struct Quick {
    uint64_t key;
    Block* block;
  } quick_[1 << 14] = {};  // of blocks_
  Quick& QuickAt(uint64_t key) {
    return quick_[(key >> 16 ^ key >> 28 ^ (key & 0xffff) >> 7) % std::size(quick_)];
  }
  Unit unit_;
  Counters counters_;
};

}  // namespace kvartz::cpu::x86::jit
