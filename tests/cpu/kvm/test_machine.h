// A machine for bare-metal payloads on the KVM engine: RAM, a report device, and page tables,
// descriptors and handlers that a payload in long mode needs.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/event_loop.h"
#include "base/sync.h"
#include "cpu/accel.h"
#include "cpu/kvm/kvm_accel.h"
#include "memory/address_space.h"
#include "memory/ram.h"

namespace kvartz::cpu::kvm {

// Guest-physical layout; mapped one to one below 1 GiB, and again at -2 GiB.
constexpr uint64_t kPml4 = 0x1000, kPdpt = 0x2000, kPd = 0x3000, kPdHigh = 0x4000, kPt = 0x5000;
constexpr uint64_t kGdt = 0x6000, kIdt = 0x7000, kTss = 0x8000;
constexpr uint64_t kShared =
    0x9000;  // resume rip, x2apic flag, log count; parameters from 0x20; see payloads.cpp
constexpr uint64_t kCounters = 0x9100, kLog = 0xa000;
constexpr uint64_t kStackTop = 0xf000, kApStackTop = 0xe000;
constexpr uint64_t kImage = 0x10000;  // payloads.cpp
constexpr uint64_t kSipiPage =
    0x40000;  // application processors start here (a copy of the image's trampoline)
constexpr uint64_t kPages = 0x400000;  // the 2 MiB that are mapped by 4 KiB pages
constexpr uint64_t kRamSize = 16 << 20;
constexpr uint64_t kMmio = 0xd0000000;  // the test device in memory, two pages
constexpr uint16_t kDonePort = 0x500, kReportPort = 0x504, kPioPort = 0x510;

// As the handlers of the payloads note them.
struct LogEntry {
  uint64_t vector, error, rip, cs, rflags, rsp, cr2, ss;
};

struct Access {
  uint64_t offset;
  unsigned size;
  bool write;
  uint64_t value;
  bool operator==(const Access&) const = default;
};
void PrintTo(const Access& access, std::ostream* out);

struct MachineOptions {
  IrqchipMode irqchip = IrqchipMode::kKernel;
  unsigned cpus = 1;
  uint32_t dirty_ring = 0;
  std::string model = "";  // empty: everything that payloads may use here
};

// Guarded by its lock where vCPU threads reach it.
class TestMachine final : private AccelHost {
 public:
  static std::unique_ptr<TestMachine> Create(const MachineOptions& options = {});
  ~TestMachine() override;

  Accel& accel() { return *accel_; }
  KvmAccel& kvm() { return static_cast<KvmAccel&>(*accel_); }
  Vcpu& vcpu(unsigned index = 0) { return *vcpus_[index]; }
  AddressSpace& memory() { return memory_; }
  AddressSpace& ports() { return ports_; }
  RamBlock& ram() { return *ram_; }

  // Guest memory.
  uint64_t Read(uint64_t gpa) const;
  void Write(uint64_t gpa, uint64_t value);
  uint64_t Shared(unsigned parameter) const { return Read(kShared + 0x20 + 8 * parameter); }
  void SetShared(unsigned parameter, uint64_t value) {
    Write(kShared + 0x20 + 8 * parameter, value);
  }
  uint64_t Counter(unsigned vector) const { return Read(kCounters + 8 * vector); }
  std::vector<LogEntry> Log() const;

  // CPU `index` is to start at `label` of payloads.cpp, in 64-bit ring 0.
  void Start(const char* label, unsigned index = 0);
  X86State LongMode(const char* label, unsigned index = 0);

  // Runs CPUs (all of them) until a payload writes to the done port; its value. ~0 and a test
  // failure after 60 s or when a CPU stopped otherwise.
  uint64_t Run();
  // In steps: threads start; wait for a condition; threads are parked.
  void Resume();
  void Park();
  bool WaitFor(const std::function<bool()>& done);  // called under the lock
  bool WaitReports(size_t count);
  bool WaitEois(size_t count);
  bool WaitDone();

  // What happened.
  std::vector<uint64_t> reports();
  std::vector<Access> accesses();  // of the test device in memory and ports
  std::vector<unsigned> triple_faults();
  std::vector<std::string> failures();
  std::vector<uint8_t> eois();
  uint64_t done_value() const { return done_value_; }
  Vcpu::Exit last_exit(unsigned index = 0) const { return exits_[index]; }

  // What reads of the test device answer: `pattern` shifted by the offset in bytes.
  uint64_t pattern = 0x8877665544332211;
  // The vector that the PIC would give; asked for once an acknowledge.
  std::function<uint8_t()> on_acknowledge;

 private:
  class Device;
  TestMachine();
  uint8_t AcknowledgePic() override;
  void BroadcastEoi(uint8_t vector) override;
  void TripleFault(unsigned index) override;
  void EngineFailed(unsigned index, const std::string& why) override;
  void FillMemory();
  void ThreadBody(unsigned index);

  MonotonicClock& host_clock_ = MonotonicClock::Instance();
  VmClock clock_;
  AddressSpace memory_;
  AddressSpace ports_;
  std::shared_ptr<RamBlock> ram_;
  std::unique_ptr<Device> report_device_, pio_device_, mmio_device_;
  std::unique_ptr<Accel> accel_;
  std::vector<std::unique_ptr<Vcpu>> vcpus_;
  std::vector<Thread> threads_;
  std::vector<Vcpu::Exit> exits_;
  std::atomic<bool> parking_{false};

  Mutex mutex_;
  CondVar changed_;
  bool done_ = false;
  unsigned stopped_ = 0;  // CPUs that left Run unasked
  uint64_t done_value_ = 0;
  std::vector<uint64_t> reports_;
  std::vector<Access> accesses_;
  std::vector<unsigned> triple_faults_;
  std::vector<std::string> failures_;
  std::vector<uint8_t> eois_;
};

Region RamRegion(const std::string& name, uint64_t base, std::shared_ptr<RamBlock> ram);
Region IoRegion(const std::string& name, uint64_t base, uint64_t size, IoHandler& handler);

// The guest-physical address of a label of payloads.cpp.
uint64_t AddressOf(const char* label);
// This host's KVM runs ring 0 on hardware.
bool OnHardware();

// Skips the test where /dev/kvm can't be used at all.
#define REQUIRE_KVM()                                                                          \
  do {                                                                                         \
    auto verdict_ = ProbeKvm().verdict;                                                        \
    if (verdict_ != KvmFitness::Verdict::kFit && verdict_ != KvmFitness::Verdict::kEmulated) { \
      GTEST_SKIP() << ProbeKvm().why;                                                          \
    }                                                                                          \
  } while (0)

}  // namespace kvartz::cpu::kvm
