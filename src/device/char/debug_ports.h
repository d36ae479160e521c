// isa-debugcon: what the guest writes to its port goes to a chardev; reading answers 0xe9, by which
// firmware finds it. isa-debug-exit: a write of v ends the process with the code (v << 1) | 1.
// Threads: guarded by their slots; the chardev is written to on the main loop.
#pragma once

#include <memory>
#include <string>

#include "device/core/device.h"
#include "host/chardev/chardev.h"

namespace kvartz {

class DebugConsole final : public MmioDevice, private host::CharUser {
 public:
  DebugConsole(const DeviceEnv& env, uint8_t readback) : MmioDevice(env), readback_(readback) {}
  ~DebugConsole() override;
  Result<> Connect(host::Chardev& chardev);

  void Reset(ResetPhase) override {}
  void VisitState(StateVisitor& visitor) override { visitor.Version(1); }
  void Quiesce() override { Flush(); }
  uint64_t IoRead(uint64_t, unsigned) override { return readback_; }
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;

 private:
  static constexpr size_t kMaxPending = 65536;
  size_t CanReceive() override { return 0; }
  void Receive(std::span<const uint8_t>) override {}
  void CharWritable() override { Flush(); }
  void Flush();  // main loop, without the lock

  const uint8_t readback_;
  std::unique_ptr<host::Chardev::Port> port_;
  std::string pending_;  // written by the guest, not yet given to the chardev
  bool scheduled_ = false;
  // Outlives the device in tasks that were posted to the loop.
  std::shared_ptr<DebugConsole*> self_ = std::make_shared<DebugConsole*>(this);
};

class DebugExit final : public MmioDevice {
 public:
  using MmioDevice::MmioDevice;
  void Reset(ResetPhase) override {}
  void VisitState(StateVisitor& visitor) override { visitor.Version(1); }
  uint64_t IoRead(uint64_t, unsigned) override { return 0; }
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
    env_.machine.ExitProcess(static_cast<int>((value << 1 | 1) & 0xff));
  }
};

}  // namespace kvartz
