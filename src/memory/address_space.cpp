#include "memory/address_space.h"

#include <algorithm>
#include <bit>

#include "base/check.h"

namespace kvartz {
namespace {

// Adds the parts of `region` below `limit` that no range of `ranges` (sorted) covers yet.
void AddVisibleParts(const std::shared_ptr<const Region>& region, uint64_t limit,
                     std::vector<FlatRange>& ranges) {
  if (region->base >= limit) return;
  uint64_t end = region->base + std::min(region->size, limit - region->base);
  uint64_t at = region->base;
  std::vector<FlatRange> parts;
  auto add = [&](uint64_t from, uint64_t to) {
    if (from < to) parts.push_back({from, to - from, from - region->base, region});
  };
  for (const FlatRange& range : ranges) {
    if (range.end() <= at) continue;
    if (range.base >= end) break;
    add(at, range.base);
    at = std::max(at, range.end());
  }
  add(at, end);
  size_t middle = ranges.size();
  ranges.insert(ranges.end(), parts.begin(), parts.end());
  std::inplace_merge(ranges.begin(), ranges.begin() + static_cast<ptrdiff_t>(middle), ranges.end(),
                     [](const FlatRange& a, const FlatRange& b) { return a.base < b.base; });
}

}  // namespace

const FlatRange* FlatView::Find(uint64_t address) const {
  auto it = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                             [](uint64_t a, const FlatRange& range) { return a < range.base; });
  if (it == ranges_.begin()) return nullptr;
  --it;
  return address - it->base < it->size ? &*it : nullptr;
}

AddressSpace::AddressSpace(std::string name, uint64_t limit)
    : name_(std::move(name)),
      limit_(limit),
      view_(std::make_shared<const FlatView>(std::vector<FlatRange>{})) {}

AddressSpace::RegionId AddressSpace::Add(Region region) {
  VERIFY(std::has_single_bit(region.min_access) && std::has_single_bit(region.max_access));
  VERIFY(region.min_access <= region.max_access && region.max_access <= 8);
  VERIFY(region.size % region.min_access == 0);
  if (region.kind == RegionKind::kIo) {
    VERIFY(region.handler != nullptr);
  } else {
    VERIFY(region.ram && region.ram_offset <= region.ram->size() &&
           region.size <= region.ram->size() - region.ram_offset);
  }
  LockGuard guard(mutex_);
  RegionId id = next_id_++;
  entries_.push_back({id, std::make_shared<const Region>(std::move(region))});
  Publish();
  return id;
}

void AddressSpace::Remove(RegionId id) {
  LockGuard guard(mutex_);
  auto removed = std::erase_if(entries_, [id](const Entry& entry) { return entry.id == id; });
  VERIFY(removed == 1);
  Publish();
}

void AddressSpace::SetDoorbells(RegionId id, std::vector<Doorbell> doorbells) {
  LockGuard guard(mutex_);
  auto entry =
      std::find_if(entries_.begin(), entries_.end(), [id](const Entry& e) { return e.id == id; });
  VERIFY(entry != entries_.end());
  auto changed = std::make_shared<Region>(*entry->region);
  changed->doorbells = std::move(doorbells);
  entry->region = std::move(changed);
  Publish();
}

AddressSpace::Batch::Batch(AddressSpace& space) : space_(space) {
  LockGuard guard(space_.mutex_);
  space_.batch_depth_++;
}

AddressSpace::Batch::~Batch() {
  LockGuard guard(space_.mutex_);
  space_.batch_depth_--;
  if (std::exchange(space_.batch_changed_, false)) space_.Publish();
}

void AddressSpace::Publish() {
  if (batch_depth_ > 0) {
    batch_changed_ = true;
    return;
  }
  // From the one that wins everywhere downwards; each fills what is still free.
  std::vector<std::shared_ptr<const Region>> order;
  order.reserve(entries_.size());
  for (auto entry = entries_.rbegin(); entry != entries_.rend(); ++entry)
    order.push_back(entry->region);
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return a->priority > b->priority; });
  std::vector<FlatRange> ranges;
  for (const auto& region : order) AddVisibleParts(region, limit_, ranges);

  auto after = std::make_shared<const FlatView>(std::move(ranges));
  std::shared_ptr<const FlatView> before = after;
  {
    LockGuard guard(view_mutex_);
    view_.swap(before);
  }
  generation_.fetch_add(1, std::memory_order_release);
  for (Listener* listener : listeners_) listener->ViewChanged(*before, *after);
}

void AddressSpace::AddListener(Listener* listener) {
  LockGuard guard(mutex_);
  listeners_.push_back(listener);
  listener->ViewChanged(FlatView({}), *view());
}

void AddressSpace::RemoveListener(Listener* listener) {
  LockGuard guard(mutex_);
  std::erase(listeners_, listener);
}

std::shared_ptr<const FlatView> AddressSpace::view() const {
  LockGuard guard(view_mutex_);
  return view_;
}

void ViewCache::Refresh() {
  // In this order: a change in between makes the view newer than the generation, and the next Get
  // looks again.
  generation_ = space_.generation();
  view_ = space_.view();
}

}  // namespace kvartz
