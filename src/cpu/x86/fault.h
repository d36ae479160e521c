// Exceptions and interrupts: raising and delivering them (SDM vol. 3 ch. 6).
#pragma once

#include "cpu/x86/cpu.h"

namespace kvartz::cpu::x86 {

// Where an event comes from; decides about privilege checks, error codes and the flags that are
// pushed.
enum class EventKind : uint8_t {
  kFault,              // exception that reports the instruction itself (RF is pushed as 1)
  kTrap,               // exception that reports the next one; also aborts
  kExternal,           // interrupt or NMI
  kSoftware,           // INT n
  kSoftwareException,  // INT3, INTO
  kInt1,               // ICEBP
};

struct Event {
  uint8_t vector = 0;
  EventKind kind = EventKind::kFault;
  bool has_error = false;
  uint32_t error = 0;
};

// Enters the handler. cpu.rip is what will be pushed. Faults on the way are raised to
// cpu.fault_exit.
void EnterHandler(Cpu& cpu, const Event& event);

// Delivers `event`, and what goes wrong meanwhile (contributory, double, triple faults). False:
// triple fault, the CPU shuts down.
[[nodiscard]] bool Deliver(Cpu& cpu, Event event);

// The exception that Raise left in cpu.fault, as an event.
Event RaisedEvent(const Cpu& cpu);

// #DB with these DR6 bits (B0-B3, BD, BS, BT), delivered as a trap, or raised as a fault.
[[nodiscard]] bool DeliverDebugTrap(Cpu& cpu, uint64_t dr6_bits);
[[noreturn]] void RaiseDebugFault(Cpu& cpu, uint64_t dr6_bits);

namespace dr6 {
constexpr uint64_t kBd = 1 << 13, kBs = 1 << 14, kBt = 1 << 15, kFixed = 0xffff0ff0;
}

}  // namespace kvartz::cpu::x86
