#include <algorithm>
#include <bit>
#include <span>

#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86 {

Tlb::Tlb(const AddressSpace& memory, TlbEntry* tables)
    : tables_(tables), view_(memory), pcids_(std::make_unique<Pcid[]>(4096)) {
  SetClasses(kSupervisor, kSupervisor);
  now_.asid[0] = NewAsid();
  now_.asid[1] = NewAsid();
  pcids_[0] = {epoch_, static_cast<uint16_t>(now_.asid[0])};
}

void Tlb::ForgetTables() {
  std::fill(std::begin(walked_), std::end(walked_), TableEntry{});
  walk_epoch_ = 1;
}

uint16_t Tlb::NewAsid() {
  if (next_asid_ == 4096) {
    std::memset(static_cast<void*>(tables_), 0, kClassCount * kEntries * sizeof(TlbEntry));
    std::memset(large_2m_, 0, sizeof(large_2m_));
    std::memset(large_1g_, 0, sizeof(large_1g_));
    std::memset(writable_, 0, sizeof(writable_));
    ForgetTables();
    epoch_++;
    next_asid_ = 1;
    now_.asid[1] = next_asid_++;
    upper_local_count_ = 0;
  }
  return next_asid_++;
}

void Tlb::SwitchTo(unsigned pcid, bool keep) {
  pcid_ = pcid;
  if (upper_local_count_ > std::size(upper_local_)) {
    upper_local_count_ = 0;
    now_.asid[1] = NewAsid();
    Tell(&Follower::DropAll);
  } else if (upper_local_count_ > 0) {
    const std::span<const uint64_t> pages(upper_local_, upper_local_count_);
    for (const uint64_t page : pages) {
      for (unsigned cls = 0; cls < kNever; cls++) entry(static_cast<Class>(cls), page) = {};
    }
    upper_local_count_ = 0;
    changes_++;
    if (follower) follower->DropLowerHalfAnd(pages);
  } else {
    Tell(&Follower::DropLowerHalf);
  }
  if (keep && pcids_[pcid].epoch == epoch_) {
    now_.asid[0] = pcids_[pcid].asid;
    return;
  }
  now_.asid[0] = NewAsid();
  pcids_[pcid] = {epoch_, static_cast<uint16_t>(now_.asid[0])};
}

void Tlb::NoteUpperLocal(uint64_t linear) {
  const size_t known = std::min<size_t>(upper_local_count_, std::size(upper_local_));
  if (std::find(upper_local_, upper_local_ + known, linear) != upper_local_ + known) return;
  if (upper_local_count_ < std::size(upper_local_)) upper_local_[upper_local_count_] = linear;
  if (upper_local_count_ <= std::size(upper_local_)) upper_local_count_++;
}

void Tlb::FlushAll() {
  epoch_++;
  upper_local_count_ = std::size(upper_local_) + 1;
  SwitchTo(pcid_, false);
}

void Tlb::FlushPcid(unsigned pcid) {
  if (pcid == pcid_) {
    SwitchTo(pcid, false);
  } else {
    pcids_[pcid].epoch = 0;
  }
}

void Tlb::NoteLargePage(uint64_t linear, unsigned shift) {
  if (shift >= 30) {
    large_1g_[(linear >> 36) % 16] |= 1ull << ((linear >> 30) % 64);
  } else if (shift >= 21) {
    uint64_t bits = shift == 22 ? 3 : 1;  // 4 MiB pages cover two regions
    uint64_t first = shift == 22 ? (linear >> 21) % 64 & ~1ull : (linear >> 21) % 64;
    large_2m_[(linear >> 27) % 64] |= bits << first;
  }
}

void Tlb::FlushPage(uint64_t linear) {
  if (++walk_epoch_ == 512) ForgetTables();
  unsigned shift = 12;
  if (large_2m_[(linear >> 27) % 64] >> ((linear >> 21) % 64) & 1) shift = 22;  // at least
  if (large_1g_[(linear >> 36) % 16] >> ((linear >> 30) % 64) & 1) shift = 30;
  if (shift == 12) {
    changes_++;
    if (follower) follower->DropPage(linear & ~0xfffull);
    for (unsigned cls = 0; cls < kNever; cls++) entry(static_cast<Class>(cls), linear) = {};
    return;
  }
  Tell(linear >> 63 ? &Follower::DropAll : &Follower::DropLowerHalf);
  const uint64_t pages = std::min<uint64_t>(1ull << (shift - 12), kEntries);
  const uint64_t first = (linear >> 12 & ~(pages - 1)) % kEntries;
  for (unsigned cls = 0; cls < kNever; cls++) {
    for (TlbEntry& e : std::span(tables_ + cls * kEntries + first, pages)) {
      uint64_t tag = e.read | e.write | e.execute;  // the same page in all that are not 0
      if ((tag ^ linear) >> shift == 0) e = {};
    }
  }
}

void Tlb::DropWritable(const uint8_t* host_page) {
  changes_++;
  if (follower) follower->DropWrites(host_page);
  uint64_t& groups = WritableGroups(host_page);
  for (uint64_t left = groups; left != 0; left &= left - 1) {
    const auto group = static_cast<unsigned>(std::countr_zero(left));
    bool others = false;  // that share the groups' place
    for (unsigned cls = 0; cls < kNever; cls++) {
      for (TlbEntry& e : std::span(tables_ + cls * kEntries + group * kGroup, kGroup)) {
        if (e.write == 0) continue;
        const auto* page = reinterpret_cast<const uint8_t*>((e.write & ~0xfffull) + e.addend);
        if (page == host_page) {
          e.write = 0;
        } else {
          others |= &WritableGroups(page) == &groups;
        }
      }
    }
    if (!others) groups &= ~(uint64_t{1} << group);
  }
}

void Tlb::DropAllWritable() {
  Tell(&Follower::DropAllWrites);
  for (unsigned i = 0; i < kNever * kEntries; i++) tables_[i].write = 0;
}

const FlatView& Tlb::View() {
  uint64_t generation = view_.space().generation();
  if (generation != generation_) [[unlikely]] {
    generation_ = generation;
    last_range_ = nullptr;
    FlushAll();
    if (held_) retired_.push_back(std::move(held_));
    held_ = view_.Hold();
  }
  return *held_;
}

const FlatRange* Tlb::Find(uint64_t physical) {
  const FlatView& view = View();
  if (last_range_ && physical - last_range_->base < last_range_->size) return last_range_;
  const FlatRange* range = view.Find(physical);
  if (range && range->region->kind == RegionKind::kRam) last_range_ = range;
  return range;
}

}  // namespace kvartz::cpu::x86
