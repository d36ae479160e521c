// Slots and entered pages mirror the TLB: what it drops is dropped here.
#include "cpu/x86/jit/engine.h"

namespace kvartz::cpu::x86::jit {

void Engine::ClearSlots(unsigned cls) {
  const unsigned begin = cls * kSlotChunks, end = begin + kSlotChunks;
  for (unsigned first = begin; first < end; first += 8) {
    uint64_t used;
    std::memcpy(&used, &state_.used[first], 8);
    if (used == 0) continue;
    std::memset(&state_.used[first], 0, 8);
    for (unsigned chunk = first; used != 0; ++chunk, used >>= 8) {
      if ((used & 0xff) == 0) continue;
      Slot* slots = &state_.slots[chunk << kSlotChunkBits];
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
  for (unsigned cls = 0; cls < kClassCount; ++cls) {
    for (unsigned at = cls * kSlots + kWriteSlots; at < (cls + 1) * kSlots; ++at) {
      if (at % (1u << kSlotChunkBits) == 0 && !state_.used[at >> kSlotChunkBits]) {
        at += (1u << kSlotChunkBits) - 1;
        continue;
      }
      Slot& slot = state_.slots[at];
      if (slot.page + slot.addend == reinterpret_cast<uint64_t>(host_page))
        std::memset(static_cast<void*>(&slot), kSlotClear, sizeof(slot));
    }
  }
}

void Engine::DropAllWrites() { DropAll(); }

}  // namespace kvartz::cpu::x86::jit
