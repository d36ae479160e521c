// The smallest machine that guest programs of the CPU tests run on: RAM, a debug console on port
// 0x402 and a serial transmitter on 0x3f8 (both collected as text), an exit port (0xf4), and the
// own engine.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/sync.h"
#include "cpu/accel.h"
#include "cpu/x86/engine.h"
#include "memory/address_space.h"

namespace kvartz::cpu::x86 {

// Guarded by its own lock where several vCPUs meet.
class BareBoard final : public AccelHost, public IoHandler {
 public:
  explicit BareBoard(uint64_t ram_bytes, unsigned cpu_count = 1, const std::string& model = "max",
                     const SoftOptions& soft = {})
      : memory_("memory", 1ull << 40),
        ports_("ports", 0x10000),
        clock_(MonotonicClock::Instance()) {
    auto ram = RamBlock::Create("ram", ram_bytes);
    EXPECT_TRUE(ram);
    ram_ = *ram;
    uint64_t low = std::min<uint64_t>(ram_bytes, 0xc0000000);
    memory_.Add(MakeRam(low));
    ports_.Add(MakePorts());
    AccelConfig config;
    config.memory = &memory_;
    config.ports = &ports_;
    config.clock = &clock_;
    config.host = this;
    config.cpu_count = cpu_count;
    config.topology.cores = cpu_count;
    auto request = ParseCpuModel(model);
    EXPECT_TRUE(request) << (request ? "" : request.error().what);
    config.model = *request;
    config.soft = soft;
    auto accel = CreateSoftEngine(config);
    EXPECT_TRUE(accel) << (accel ? "" : accel.error().what);
    accel_ = std::move(*accel);
    for (unsigned i = 0; i < cpu_count; i++) {
      auto vcpu = accel_->CreateVcpu(i);
      EXPECT_TRUE(vcpu) << (vcpu ? "" : vcpu.error().what);
      vcpus_.push_back(std::move(*vcpu));
    }
    clock_.Start();
    accel_->ClockStarted();
  }

  SoftVcpu& vcpu(unsigned index = 0) { return static_cast<SoftVcpu&>(*vcpus_[index]); }
  Cpu& cpu(unsigned index = 0) { return vcpu(index).cpu; }
  uint8_t* ram() { return ram_->host(); }
  Accel& accel() { return *accel_; }
  AddressSpace& memory() { return memory_; }
  VmClock& clock() { return clock_; }

  // Ends Run from another thread.
  void Stop() { Exit(-1); }
  // Runs all CPUs until the guest writes to the exit port, or triple-faults. Returns the value
  // written, or -1.
  int Run() {
    done_ = false;
    exit_code_ = -1;
    std::vector<Thread> threads;
    for (size_t i = 1; i < vcpus_.size(); i++) {
      threads.emplace_back("vcpu" + std::to_string(i), [this, i] { RunOne(*vcpus_[i]); });
    }
    RunOne(*vcpus_[0]);
    for (auto& vcpu : vcpus_) vcpu->Kick();
    threads.clear();
    return exit_code_;
  }

  std::string output;
  bool echo = false;  // also to standard output, as it comes
  int triple_faults = 0;
  std::string failure;

  // ---- AccelHost
  uint8_t AcknowledgePic() override { return 0xff; }
  void BroadcastEoi(uint8_t) override {}
  void TripleFault(unsigned) override {
    triple_faults++;
    Exit(-1);
  }
  void EngineFailed(unsigned, const std::string& why) override { failure = why; }

  // ---- IoHandler
  uint64_t IoRead(uint64_t offset, unsigned size) override {
    if (offset == 0x3fd) return 0x60;  // transmitter empty
    if (offset == 0x402) return 0xe9;
    return ~0ull;
  }
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
    if (offset == 0x402 || offset == 0x3f8) {
      output += static_cast<char>(value);
      if (echo) {
        putchar(static_cast<char>(value));
        fflush(stdout);
      }
    }
    if (offset == 0xf4) Exit(static_cast<int>(value & 0xffffffff));
  }

 private:
  Region MakeRam(uint64_t size) {
    Region region;
    region.name = "ram";
    region.kind = RegionKind::kRam;
    region.size = size;
    region.ram = ram_;
    return region;
  }
  Region MakePorts() {
    Region region;
    region.name = "ports";
    region.size = 0x10000;
    region.handler = this;
    region.lock = &port_lock_;
    return region;
  }
  // A kick may be left over from the run before.
  void RunOne(Vcpu& vcpu) {
    while (!done_ && vcpu.Run() == Vcpu::Exit::kKicked) {
    }
  }
  void Exit(int code) {
    exit_code_ = code;
    done_ = true;
    for (auto& vcpu : vcpus_) vcpu->Kick();
  }

  AddressSpace memory_, ports_;
  VmClock clock_;
  Mutex port_lock_;
  std::shared_ptr<RamBlock> ram_;
  std::unique_ptr<Accel> accel_;
  std::vector<std::unique_ptr<Vcpu>> vcpus_;
  int exit_code_ = -1;
  std::atomic<bool> done_{false};
};

}  // namespace kvartz::cpu::x86
