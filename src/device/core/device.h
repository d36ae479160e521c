// What every device is, and what it is given.
#pragma once

#include <cstdint>
#include <string>

#include "base/event_loop.h"
#include "base/state_visitor.h"
#include "base/sync.h"
#include "memory/address_space.h"
#include "memory/guest_memory.h"

namespace kvartz {

class HostBackends;

// Receives the level of interrupt lines: an interrupt controller, or the board's router. Any
// thread; a leaf: it may be called with a device's lock held and never calls back into a device.
class IrqSink {
 public:
  virtual ~IrqSink() = default;
  virtual void SetIrq(unsigned line, bool level) = 0;
};

// One wire to a sink. Copyable; an unconnected line swallows.
class IrqLine {
 public:
  IrqLine() = default;
  IrqLine(IrqSink& sink, unsigned line) : sink_(&sink), line_(line) {}
  void Set(bool level) const {
    if (sink_) sink_->SetIrq(line_, level);
  }
  void Pulse() const {
    Set(true);
    Set(false);
  }
  unsigned number() const { return line_; }

 private:
  IrqSink* sink_ = nullptr;
  unsigned line_ = 0;
};

// Message-signalled interrupts go here (the accelerator). Any thread, a leaf.
class MsiSink {
 public:
  virtual ~MsiSink() = default;
  virtual void SendMsi(uint64_t address, uint32_t data) = 0;
};

// What a device asks of the machine as a whole. Any thread; handled later on the main loop.
class MachineControl {
 public:
  // kInternalError: the engine can't go on; the machine stops, to be looked at.
  enum class Request { kReset, kPowerOff, kPanicked, kInternalError };
  virtual ~MachineControl() = default;
  virtual void Ask(Request request, const std::string& who) = 0;
  // isa-debug-exit: end the process with this code.
  virtual void ExitProcess(int code) = 0;
};

// The surroundings of a device, given to its constructor and copied there; what it refers to
// outlives the device.
struct DeviceEnv {
  std::string id;  // "serial0", the user's id=, or a path such as "pci.0/03.0"
  AddressSpace& memory;
  AddressSpace& ports;
  EventLoop& loop;       // the main loop
  const VmClock& clock;  // guest time
  MsiSink& msi;
  MachineControl& machine;
  HostBackends* backends = nullptr;  // drives, netdevs, chardevs, I/O threads; null: none
};

// A reset reaches every device in three rounds: all enter, then all hold, then all exit.
enum class ResetPhase {
  kEnter,  // registers take their reset values; timers and transfers end; nothing leaves the device
  kHold,   // outputs (interrupt lines) take their reset level
  kExit,   // the device may act again
};

// Guarded by its slot: lock() is held around every call below but Quiesce/Resume, around I/O (the
// bus takes it) and around the timer and host callbacks of the device (which take it themselves
// with a LockGuard at their top).
class Device {
 public:
  explicit Device(const DeviceEnv& env) : env_(env) {}
  virtual ~Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  virtual void Reset(ResetPhase phase) = 0;
  virtual void VisitState(StateVisitor& visitor) = 0;
  // The machine is about to be stopped or saved: returns when nothing of the device touches guest
  // memory any more. Called on the main loop, without the lock, vCPUs parked. Resume undoes it.
  virtual void Quiesce() {}
  virtual void Resume() {}

  const std::string& id() const { return env_.id; }
  Mutex& lock() { return lock_; }

 protected:
  const DeviceEnv env_;
  Mutex lock_;
};

// A device that answers at ranges of memory or ports.
class MmioDevice : public Device, public IoHandler {
 public:
  using Device::Device;
};

}  // namespace kvartz
