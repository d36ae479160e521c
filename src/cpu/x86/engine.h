// The own engine: Accel and Vcpu on translated code, and the interpreter where that doesn't reach.
#pragma once

#include <csetjmp>
#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/sync.h"
#include "cpu/accel.h"
#include "cpu/x86/cpu.h"
#include "cpu/x86/jit/perf_map.h"
#include "cpu/x86/lapic.h"
#include "cpu/x86/mmu.h"
#include "cpu/x86/msr.h"

namespace kvartz::cpu::x86 {

class BlockCache;
class SoftAccel;
namespace jit {
class Engine;
struct State;
}  // namespace jit

// One CPU of the own engine. Owned by its vCPU thread; Kick, Nmi and what the LAPICs call come from
// any thread.
class SoftVcpu final : public Vcpu, public LapicBus {
 public:
  static Result<std::unique_ptr<SoftVcpu>> Create(SoftAccel& accel, unsigned index);
  ~SoftVcpu() override;

  Exit Run() override;
  void Kick() override;
  void Nmi() override;
  Result<> GetState(X86State* state) override;
  Result<> SetState(const X86State& state) override;
  Result<> Reset() override;
  unsigned index() const override { return index_; }
  Result<std::vector<EngineStatistic>> JitStatistics() const override;

  // ---- for system instructions
  ViewCache& ports() { return ports_; }
  CpuidLeaf Cpuid(uint32_t leaf, uint32_t subleaf) const;
  const CpuidTable& cpuid() const { return cpuid_; }
  uint64_t Tsc() const { return static_cast<uint64_t>(NowNs()) + msrs.tsc_offset; }
  Lapic& lapic() { return lapic_; }
  SoftAccel& accel() { return accel_; }
  const CpuLimits& limits() const { return limits_; }
  MsrState msrs;

  // ---- LapicBus
  int64_t NowNs() const override;
  void ArmTimer(int64_t deadline_ns) override;
  void SendIpi(uint64_t icr, bool x2apic_destination) override;
  void EndOfInterrupt(uint8_t vector) override;

  // ---- from any thread
  void Request(uint32_t bits);  // and wakes it
  void RequestStartup(uint8_t vector);
  void SetPicOutput(bool level);

  // How translated code does; null: there is none (jit=off).
  const jit::Engine* jit() const { return jit_.get(); }

 private:
  std::unique_ptr<jit::State, void (*)(jit::State*)> state_;

 public:
  Cpu& cpu;

 private:
  friend class SoftAccel;
  SoftVcpu(SoftAccel& accel, unsigned index, std::unique_ptr<BlockCache> blocks);
  enum class Next { kGo, kLeave, kShutdown };
  Next HandleRequests();
  Next HandleWorld(uint32_t requests);
  Next HandleEvents(uint32_t requests);
  Next Sleep();
  Next Step();
  Next DeliverRestored();
  Next Interrupt();
  bool InstructionBreakpoint(uint64_t* dr6_bits) const;
  void HandleInit();
  void HandleStartup();
  void PrepareThread();
  void LoadRegisters(const X86State& state);
  void LoadXsave(const std::vector<uint8_t>& area);

  SoftAccel& accel_;
  const unsigned index_;
  const CpuidTable cpuid_;
  const CpuLimits limits_;
  Tlb tlb_;
  ViewCache ports_;
  std::unique_ptr<BlockCache> blocks_;
  std::unique_ptr<jit::Engine> jit_;
  Mutex sleep_mutex_;
  CondVar sleep_cond_;
  std::atomic<bool> sleeping_{false};
  const int64_t polling_ns_;   // polling.h
  bool polling_pays_ = false;  // what it slept for last came in that time
  std::atomic<bool> pic_output_{false}, external_interrupt_{false};
  std::atomic<uint8_t> startup_vector_{0};
  // The host timer that interrupts running guest code, of the thread that runs the vCPU.
  timer_t timer_{};
  int timer_thread_ = 0;  // 0: no timer
  int64_t timer_armed_for_ = INT64_MAX;
  jmp_buf fault_exit_;
  Lapic lapic_;
};

// Any thread; CreateVcpu before any of them runs.
class SoftAccel final : public Accel,
                        public World,
                        public AddressSpace::Listener,
                        public PageWatch::Listener {
 public:
  static Result<std::unique_ptr<Accel>> Create(const AccelConfig& config);
  ~SoftAccel() override;

  const char* name() const override { return "kvartz"; }
  Result<std::unique_ptr<Vcpu>> CreateVcpu(unsigned index) override;
  const CpuidTable& cpuid(unsigned index) const override { return cpuid_[index]; }
  uint64_t tsc_khz() const override { return 1'000'000; }
  IrqchipMode irqchip() const override { return IrqchipMode::kUser; }
  void SendMsi(uint64_t address, uint32_t data) override;
  void SetPicOutput(bool level) override;
  void SetGsi(unsigned gsi, bool level) override {}
  Result<uint64_t> AddIrqFd(int event_fd, uint64_t msi_address, uint32_t msi_data) override;
  void RemoveIrqFd(uint64_t id) override {}
  Result<> SetDirtyTracking(bool enabled) override;
  Result<> SyncDirty() override { return {}; }
  void ClockStarted() override;
  void ClockStopped() override {}
  void VisitState(StateVisitor& visitor) override;
  Result<> ResetVm() override { return {}; }

  const AccelConfig& config() const { return config_; }
  // Null: nobody asked for one.
  const jit::PerfMap* perf_map() const { return perf_map_ ? &*perf_map_ : nullptr; }
  // An interrupt message to every APIC that it names. `icr_like`: delivery mode, trigger, level,
  // vector as in an ICR's low half.
  void Deliver(uint32_t destination, bool logical, bool x2apic_destination, uint32_t icr_like,
               unsigned shorthand = 0, const SoftVcpu* self = nullptr);

  // ---- World
  void Stop(Cpu& self) override { StopFor(&self); }
  void Resume(Cpu& self) override { ResumeFor(&self); }
  const std::vector<Tlb*>& tlbs() const override { return tlbs_; }
  // `self` null: a thread that runs no vCPU.
  void StopFor(Cpu* self);
  void ResumeFor(Cpu* self);
  // A vCPU thread enters or leaves the state in which it may run guest code; Safepoint lets others
  // stop the world.
  void EnterGuest();
  void LeaveGuest();
  void Safepoint();

  // ---- PageWatch::Listener
  void CodeWritten(const uint32_t* word) override;

  // ---- AddressSpace::Listener
  void ViewChanged(const FlatView& before, const FlatView& after) override;

 private:
  friend class SoftVcpu;
  explicit SoftAccel(const AccelConfig& config) : config_(config) {}
  void Accept(SoftVcpu& target, uint32_t icr_like);
  void RequestAll(uint32_t bits);

  AccelConfig config_;
  std::optional<jit::PerfMap> perf_map_;
  std::vector<CpuidTable> cpuid_;
  std::vector<SoftVcpu*> vcpus_;  // by index; null: not made (yet)
  std::vector<Tlb*> tlbs_;

  Mutex world_mutex_;
  CondVar world_cond_;
  unsigned running_ = 0;    // vCPU threads in guest code
  bool stopped_ = false;    // somebody holds the world
  Cpu* stopper_ = nullptr;  // who; null: a thread that runs no vCPU
  unsigned stop_depth_ = 0;
  std::atomic<unsigned> rotation_{0};  // where lowest-priority delivery starts to look
};

// What the interpreter can do on this host: native vector instructions only as far as the host has
// them.
CpuidTable SoftCpuid(const CpuModelRequest& request);

}  // namespace kvartz::cpu::x86
