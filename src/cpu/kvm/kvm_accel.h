// The KVM engine: a VM and what is common to its vCPUs.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/fd.h"
#include "base/sync.h"
#include "cpu/accel.h"
#include "cpu/kvm/kvm_doorbells.h"
#include "cpu/kvm/kvm_irq.h"
#include "cpu/kvm/kvm_memory.h"
#include "cpu/kvm/kvm_uapi.h"

namespace kvartz::cpu::kvm {

class KvmVcpu;

// Any thread, as Accel says.
class KvmAccel final : public Accel {
 public:
  static Result<std::unique_ptr<KvmAccel>> Create(const AccelConfig& config);
  ~KvmAccel() override;

  const char* name() const override { return "kvm"; }
  Result<std::unique_ptr<Vcpu>> CreateVcpu(unsigned index) override;
  const CpuidTable& cpuid(unsigned index) const override { return cpuids_[index]; }
  uint64_t tsc_khz() const override { return tsc_khz_; }
  IrqchipMode irqchip() const override { return config_.irqchip; }

  void SendMsi(uint64_t address, uint32_t data) override { interrupts_.SendMsi(address, data); }
  void SetPicOutput(bool level) override;
  void SetGsi(unsigned gsi, bool level) override { interrupts_.SetGsi(gsi, level); }
  Result<uint64_t> AddIrqFd(int event_fd, uint64_t msi_address, uint32_t msi_data) override {
    return interrupts_.AddIrqFd(event_fd, msi_address, msi_data);
  }
  void RemoveIrqFd(uint64_t id) override { interrupts_.RemoveIrqFd(id); }
  Interrupts& interrupts() { return interrupts_; }

  Result<> SetDirtyTracking(bool enabled) override;
  Result<> SyncDirty() override;

  void ClockStarted() override;
  void ClockStopped() override;
  void VisitState(StateVisitor& visitor) override;
  Result<> ResetVm() override;

  // ---- for vCPUs ----
  const AccelConfig& config() const { return config_; }
  int vm_fd() const { return vm_.get(); }
  MemorySlots& memory() { return memory_; }
  void DrainCollected(kvm_coalesced_mmio_ring* ring, ViewCache& memory, ViewCache& ports) {
    if (memory_bells_.collects() || port_bells_.collects()) collected_.Drain(ring, memory, ports);
  }
  size_t run_bytes() const { return run_bytes_; }
  size_t ring_bytes() const { return config_.kvm.dirty_ring_entries * sizeof(kvm_dirty_gfn); }
  size_t xsave_bytes() const { return xsave_bytes_; }
  // The MSRs that KVM saves; the same for every vCPU.
  std::vector<uint32_t> SavedMsrs();
  // All rings, or the one of a vCPU that found its full.
  Result<> ReapRings();
  void Forget(KvmVcpu* vcpu);

 private:
  KvmAccel(const AccelConfig& config, UniqueFd device, UniqueFd vm);
  Result<> Init();
  Result<> MakeIrqchip();
  Result<> MakeCpuids();
  Result<CpuidTable> SupportedCpuid();
  Result<> EnableMsrExits();

  const AccelConfig config_;
  const UniqueFd device_;
  const UniqueFd vm_;
  size_t run_bytes_ = 0;
  size_t xsave_bytes_ = 0;
  std::atomic<uint64_t> tsc_khz_{0};
  std::vector<CpuidTable> cpuids_;
  MemorySlots memory_;
  Doorbells memory_bells_;
  Doorbells port_bells_;
  CollectedWrites collected_;
  Interrupts interrupts_;

  Mutex mutex_;
  std::vector<KvmVcpu*> vcpus_ GUARDED_BY(mutex_);  // by index; null: not made yet
  std::vector<uint32_t> saved_msrs_ GUARDED_BY(mutex_);
  Mutex ring_mutex_;

  // While guest time stands still.
  bool stopped_ = false;
  uint64_t stopped_clock_ns_ = 0;
  bool clock_loaded_ = false;
};

}  // namespace kvartz::cpu::kvm
