// A small machine around a device under test: spaces, clock that is moved by hand, and records of
// what the device does.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/event_loop.h"
#include "device/core/device.h"
#include "memory/address_space.h"

namespace kvartz::test {

// Lines as the device drives them: their level now, and how often each rose.
struct RecordedLines final : IrqSink {
  void SetIrq(unsigned line, bool level) override {
    if (level && !levels[line]) rises[line]++;
    levels[line] = level;
  }
  bool levels[256] = {};
  int rises[256] = {};
};

struct MiniMachine : MsiSink, MachineControl {
  MiniMachine() : vm_clock(clock), memory("memory", 1ull << 40), ports("ports", 0x10000) {
    loop = std::move(*EventLoop::Create(EventLoop::Backend::kEpoll, clock));
    clock.Set(1'000'000'000);
    vm_clock.Start();
  }
  DeviceEnv Env(const std::string& id) {
    return {id, memory, ports, *loop, vm_clock, *this, *this, nullptr};
  }
  // Time passes, and what falls due happens, step by step.
  void Pass(int64_t ns, int64_t step_ns = 100'000) {
    while (ns > 0) {
      int64_t step = std::min(ns, step_ns);
      clock.Advance(step);
      loop->RunOnce(0);
      ns -= step;
    }
  }
  static void ResetDevice(Device& device) {
    for (ResetPhase phase : {ResetPhase::kEnter, ResetPhase::kHold, ResetPhase::kExit}) {
      LockGuard guard(device.lock());
      device.Reset(phase);
    }
  }

  void SendMsi(uint64_t address, uint32_t data) override { messages.emplace_back(address, data); }
  void Ask(Request request, const std::string& who) override {
    requests.emplace_back(request, who);
  }
  void ExitProcess(int code) override { exit_code = code; }

  ManualClock clock;
  VmClock vm_clock;
  AddressSpace memory, ports;
  std::unique_ptr<EventLoop> loop;
  std::vector<std::pair<uint64_t, uint32_t>> messages;
  std::vector<std::pair<Request, std::string>> requests;
  int exit_code = -1;
};

// State of `from` loaded into `to` reads the same there.
template <typename T>
bool StateMoves(T& from, T& to, std::string* why = nullptr) {
  auto visit = [](T& device) {
    return [&device](StateVisitor& v) {
      LockGuard guard(device.lock());
      device.VisitState(v);
    };
  };
  std::vector<uint8_t> bytes = SaveState(visit(from));
  Result<> loaded = LoadState(bytes, visit(to));
  if (!loaded && why) *why = loaded.error().what;
  return loaded && DumpState(visit(from)) == DumpState(visit(to));
}

}  // namespace kvartz::test
