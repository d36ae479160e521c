// Units: found, made, dropped when their code changes, and emptied out of code memory.
#include <algorithm>
#include <utility>

#include "cpu/x86/jit/engine.h"

namespace kvartz::cpu::x86::jit {
namespace {

constexpr uint64_t kPageMask = ~0xfffull;
// A unit's code at most: 48 instructions of some 150 bytes with their cold paths and thunks.
constexpr size_t kUnitRoom = 32 << 10;
constexpr size_t kMostInsnBytes = 15;
constexpr size_t kMostAdapted = 16384;  // places; more are forgotten with the next region

}  // namespace

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
      digest = Digested(digest, word);
    }
  }
  return digest;
}

Block* Engine::Find(const uint8_t* host, uint16_t mode) {
  for (;;) {
    Block* block = store_.Find(Key(host, mode));
    if (block == nullptr) return nullptr;
    CodePage* page = block->page;
    if (!page->stale) page = block->next_page;
    if (page == nullptr || !page->stale) return block;
    Recheck(page);
  }
}

Block* Engine::Obtain(const uint8_t* host, uint16_t mode) {
  Block* block = Find(host, mode);
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
  if (!page->stale && __atomic_load_n(page->watch.word, __ATOMIC_SEQ_CST) == page->watch.value)
    return page;
  return Recheck(page) != nullptr ? page : PageOf(host, mode);
}

Block* Engine::Translate(const uint8_t* host, uint16_t mode, const uint8_t* next,
                         Unit::Built* built) {
  if (free_code_slots_.size() < 2) DropStale();
  if (free_code_slots_.size() < 2) Flush();
  if (!store_.HasRoom()) Evict();
  const auto offset = static_cast<unsigned>(reinterpret_cast<uintptr_t>(host) & 0xfff);
  CodePage* page = CurrentPage(host, mode);
  CodePage* next_page = next == nullptr ? nullptr : CurrentPage(next, mode);
  Unit::Pages bytes{.first = page->host, .next = next};
  uint8_t next_bytes[kMostInsnBytes];
  if (cpu().tlb->world != nullptr) {
    // Others may be writing there: what is translated must be what the digest is of.
    std::memcpy(code_copy_, page->host, kPageSize);
    bytes.first = code_copy_;
    if (next != nullptr)
      bytes.next = static_cast<uint8_t*>(std::memcpy(next_bytes, next, sizeof(next_bytes)));
  }
  auto immediates = Unit::Immediates::kFixed;
  const auto build = [&](const LoneAccesses& lone) {
    *built = unit_.Build(DecodeContextOf(mode, features_), UnitModeOf(mode), bytes, offset, lone,
                         immediates);
  };
  const auto found = adapted_.empty() ? adapted_.end() : adapted_.find(Key(host, mode));
  Adaptation* adaptation = found == adapted_.end() ? nullptr : &found->second;
  LoneAccesses lone = (mode & mode::kSingle) != 0 ? ~LoneAccesses()
                      : adaptation != nullptr     ? adaptation->lone
                                                  : LoneAccesses();
  build(lone);
  if (*built != Unit::Built::kOk) return nullptr;
  Changed& changed = ChangedAt(Key(host, mode));
  if (changed.key == Key(host, mode)) {
    const uint64_t before = std::exchange(changed.shape, unit_.Shape());
    if (before == changed.shape) {
      immediates = Unit::Immediates::kLoaded;
      build(lone);
    }
  }
  if (adaptation != nullptr && adaptation->failing.any()) {
    for (unsigned group = 0; group < unit_.group_count(); ++group) {
      if (adaptation->failing[group]) lone |= unit_.Members(group);
    }
    *adaptation = {};
    adaptation->lone = lone;
    build(lone);
  }
  return Emit(page, unit_.crosses() ? next_page : nullptr, mode, bytes, adaptation);
}

// What unit_ holds.
Block* Engine::Emit(CodePage* page, CodePage* next_page, uint16_t mode, const Unit::Pages& bytes,
                    Adaptation* adaptation) {
  const uint16_t offset = unit_[0].offset;
  const uint64_t key = Key(page->host + offset, mode);
  const unsigned cls = ClassOf(mode);
  BlockStore::Region& region = store_.region();
  memory_.Populate(region.used + kUnitRoom);
  Assembler as = memory_.At(region.used);
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
      .counts_checks = adaptation != nullptr && adaptation->stage == Adaptation::kCounting,
      .polymorphic =
          adaptation == nullptr ? TranslationContext::Polymorphic{} : adaptation->polymorphic,
      .pages = {.first = page->host, .next = next_page == nullptr ? nullptr : next_page->host}};
  const EntryPoints entries = Translator(unit_, as, where, buffers_).Run();
  if (where.counts_checks) {
    adaptation->counting.clear();
    for (unsigned group = 0; group < unit_.group_count(); ++group) {
      const uint16_t slot = unit_.group(group).slot;
      adaptation->counting.push_back(slot);
      state_.misses[slot] = 1;
      state_.checks[slot] = 0;
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

// What leads into units without being an exit of another.
void Engine::ForgetTargets() {
  for (auto& table : state_.jumps) std::fill_n(table, kJumpEntries, Go(stubs_.dispatch));
  std::memset(state_.singles, 0, sizeof(state_.singles));
}

// The oldest region of code memory becomes the one that is filled. None of its code is running, or
// will be returned to.
void Engine::Evict() {
  ++counters_.evictions;
  if (adapted_.size() > kMostAdapted) adapted_.clear();
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
  ForgetTargets();
}

// After a write to a page of code: units that are as they were stay, and the page is watched anew.
// Null: it holds code no more.
CodePage* Engine::Recheck(CodePage* page) {
  page->stale = false;
  page->watch = WatchCode(cpu(), page->host);
  state_.code_hosts[page->slot] = page->host;
  std::vector<Block*> changed;
  for (Block* block : page->blocks) {
    if (Digest(*block) != block->digest) changed.push_back(block);
  }
  for (Block* block : changed) {
    Changed& place = ChangedAt(block->key);
    if (place.key != block->key) place = {.key = block->key};
    adapted_.erase(block->key);
    Kill(block);
  }
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

// Pages that were written and not entered since.
void Engine::DropStale() {
  std::vector<CodePage*> stale;
  for (const auto& [key, page] : pages_) {
    if (page->stale) stale.push_back(page.get());
  }
  for (CodePage* page : stale) {
    while (!page->blocks.empty()) Kill(page->blocks.back());
    Drop(page);
  }
}

void Engine::NoteWritten(const uint32_t* word) {
  auto written = written_.Lock();
  if (written->empty() || written->back() != word) written->push_back(word);
}

// No unit is running: each is looked up when it is entered next, by Find. Until then the page may
// be written freely. Where other CPUs run, each waits here until all are between two instructions.
// So one that writes code goes on when nobody runs the old code any more; and one that was told of
// a write, which is before it happens, sees what was written.
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
    if (world == nullptr &&
        __atomic_load_n(page->watch.word, __ATOMIC_SEQ_CST) == page->watch.value)
      continue;
    page->stale = true;
    state_.code_pages[page->slot] = kNoPage;
    state_.code_hosts[page->slot] = nullptr;
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
  ForgetTargets();
  adapted_.clear();
  std::memset(state_.misses, 1, sizeof(state_.misses));
  const size_t begin = (stubs_end_ + 63) & ~size_t{63};
  store_.Reset(begin, memory_.size(), kUnitRoom);
  memory_.Discard(begin);
  std::memset(static_cast<void*>(state_.slots), kSlotClear, sizeof(state_.slots));
}

}  // namespace kvartz::cpu::x86::jit
