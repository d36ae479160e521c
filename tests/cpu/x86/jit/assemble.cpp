// Items to bytes: which flags are undefined where, a place for each item, references to items.
#include <algorithm>
#include <cstring>
#include <map>

#include "cpu/x86/jit/program.h"

namespace kvartz::cpu::x86::programs {
namespace {

class Assembler {
 public:
  Assembler(const Program& program, const std::vector<bool>& keep) : program_(program) {
    for (const Section& section : program.sections) {
      for (const Item& item : section.items) {
        const bool wanted = keep.empty() || keep[static_cast<size_t>(item.id)];
        const bool possible =
            item.needs < 0 || keep.empty() || keep[static_cast<size_t>(item.needs)];
        if (item.must_stay || (wanted && possible)) items_.push_back(&item);
      }
    }
    undefined_.resize(items_.size());
    places_.resize(items_.size());
  }

  bool Run(Image* image) {
    TraceFlags();
    if (!Place()) return false;
    image->code.assign(kCodeBytes, 0xcc);
    image->lines.clear();
    for (size_t i = 0; i < items_.size(); ++i) {
      Write(i, image);
      image->lines.push_back({.offset = places_[i],
                              .size = Size(i),
                              .undefined = undefined_[i] | items_[i]->undefined,
                              .end = items_[i]->flow == Item::Flow::kEnd});
    }
    WriteControl(image);
    return true;
  }

 private:
  // The item with this id, or the next that is left.
  size_t Find(int id) const {
    auto at = std::lower_bound(items_.begin(), items_.end(), id,
                               [](const Item* item, int wanted) { return item->id < wanted; });
    return static_cast<size_t>(at - items_.begin());
  }

  bool Merge(size_t at, uint64_t flags) {
    if ((undefined_[at] | flags) == undefined_[at]) return false;
    undefined_[at] |= flags;
    return true;
  }

  // Which flags may be undefined at the start of each item. An item that tests such flags gets an
  // instruction in front that defines all.
  void TraceFlags() {
    uint64_t returned = 0;
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t i = 0; i < items_.size(); ++i) {
        const Item& item = *items_[i];
        uint64_t flags = NeedsDefiner(i) ? 0 : undefined_[i];
        flags = (flags & ~item.defined) | item.undefined;
        for (int target : item.targets) changed |= Merge(Find(target), flags);
        if (item.flow == Item::Flow::kReturn) {
          changed |= (returned | flags) != returned;
          returned |= flags;
        }
        if (item.flow == Item::Flow::kNext || item.flow == Item::Flow::kBranch ||
            item.flow == Item::Flow::kCall) {
          changed |= Merge(i + 1, item.flow == Item::Flow::kCall ? flags | returned : flags);
        }
      }
    }
  }
  bool NeedsDefiner(size_t i) const { return (undefined_[i] & items_[i]->tested) != 0; }
  size_t Size(size_t i) const { return items_[i]->code.size() + (NeedsDefiner(i) ? 2 : 0); }

  bool Place() {
    uint64_t end = 0;
    for (const Section& section : program_.sections) {
      if (section.offset < end) return false;
      end = section.offset;
      for (size_t i = Find(section.items.front().id);
           i < items_.size() && items_[i]->id <= section.items.back().id; ++i) {
        places_[i] = end;
        end += Size(i);
      }
    }
    return end <= kCodeBytes;
  }

  void Write(size_t i, Image* image) const {
    const Item& item = *items_[i];
    uint8_t* at = image->code.data() + places_[i];
    if (NeedsDefiner(i)) {
      *at++ = 0x39;  // CMP between two low registers
      *at++ = static_cast<uint8_t>(0xc0 | (item.id * 7 & 0x3f));
    }
    std::copy(item.code.begin(), item.code.end(), at);
    const Layout layout = LayoutOf(program_.shape);
    const uint64_t base =
        layout.code - layout.code_base + (program_.high_half ? kHighHalf : uint64_t{0});
    for (const Fixup& fixup : item.fixups) {
      uint64_t value = (fixup.target < 0 ? 0 : places_[Find(fixup.target)]) +
                       static_cast<uint64_t>(fixup.addend);
      if (fixup.end != 0) {
        value -= static_cast<uint64_t>(at - image->code.data()) + fixup.end;
        // Out of reach: to the next instruction, which the item allows for.
        if (fixup.size == 1 && static_cast<uint64_t>(static_cast<int8_t>(value)) != value)
          value = 0;
      } else {
        value += base;
      }
      std::memcpy(at + fixup.at, &value, fixup.size);
    }
  }

  void WriteControl(Image* image) const {
    image->control.assign(kPage, 0);
    for (size_t i = 0; i < program_.counters.size(); ++i)
      std::memcpy(&image->control[i * 4], &program_.counters[i], 4);
    const Layout layout = LayoutOf(program_.shape);
    for (size_t i = 0; i < program_.jump_table.size(); ++i) {
      const uint64_t target = layout.code - layout.code_base +
                              places_[Find(program_.jump_table[i])] +
                              (program_.high_half ? kHighHalf : uint64_t{0});
      std::memcpy(&image->control[kJumpTableAt - kCountersAt + i * 8], &target, 8);
    }
  }

  const Program& program_;
  std::vector<const Item*> items_;
  std::vector<uint64_t> undefined_;
  std::vector<uint64_t> places_;
};

}  // namespace

bool Assemble(const Program& program, const std::vector<bool>& keep, Image* image) {
  return Assembler(program, keep).Run(image);
}

}  // namespace kvartz::cpu::x86::programs
