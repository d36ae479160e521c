// A vCPU of KVM: the run loop, and its state.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "base/fd.h"
#include "cpu/accel.h"
#include "cpu/kvm/kvm_uapi.h"

namespace kvartz::cpu::kvm {

class KvmAccel;

// Owned by its vCPU thread (or by whoever parked it); Kick, Nmi, PicOutput and ReapRing from any
// thread.
class KvmVcpu final : public Vcpu {
 public:
  static Result<std::unique_ptr<KvmVcpu>> Create(KvmAccel& accel, unsigned index,
                                                 const CpuidTable& cpuid);
  ~KvmVcpu() override;

  Exit Run() override;
  void Kick() override { Ask(kKick); }
  void Nmi() override { Ask(kNmi); }
  Result<> GetState(X86State* state) override;
  Result<> SetState(const X86State& state) override;
  Result<> Reset() override;
  unsigned index() const override { return index_; }
  Result<> SetDebug(const DebugRequest& request) override;
  DebugStop debug_stop() const override { return debug_stop_; }

  Result<uint64_t> TscKhz();
  // The INTR line of the 8259 pair, of the bootstrap processor.
  void PicOutput(bool level);
  // Guest time stands still or runs on: the TSC as it was at `host_tsc`, and again from there.
  void FreezeTsc(uint64_t host_tsc);
  void ThawTsc(uint64_t host_tsc);
  // Takes the pages out of the dirty ring. True if there were any. Serialized by the caller.
  bool ReapRing();

 private:
  enum Request : uint32_t { kKick = 1, kNmi = 2, kLook = 4 };

  KvmVcpu(KvmAccel& accel, unsigned index);
  Result<> Map(size_t ring_bytes);
  Result<> SetCpuid(const CpuidTable& cpuid);

  void Ask(Request request);
  void EnterThread();
  void OfferPicInterrupt();
  std::optional<Exit> HandleExit();
  std::optional<Exit> HandleError(int error);
  std::optional<Exit> HandleFullRing();
  void HandleIo();
  void HandleMmio();
  void HandleMsr();
  Exit HandleDebug();
  Exit HandleInternalError();
  Exit Fail(const std::string& why);

  Result<> LeaveResetState();
  Result<> GetMsrs(X86State* state);
  Result<> SetMsrs(const X86State& state, bool deadline);
  Result<> GetExtended(X86State* state);
  Result<> SetExtended(const X86State& state);
  std::optional<int64_t> TscOffset() const;
  void SetTscOffset(int64_t offset);

  KvmAccel& accel_;
  const unsigned index_;
  uint32_t apic_id_ = 0;
  uint32_t signature_ = 0;
  UniqueFd fd_;
  kvm_run* run_ = nullptr;
  size_t run_bytes_ = 0;
  kvm_coalesced_mmio_ring* collected_ = nullptr;
  kvm_dirty_gfn* ring_ = nullptr;
  size_t ring_entries_ = 0;
  uint64_t ring_next_ = 0;  // under the VM's ring lock
  unsigned full_in_vain_ = 0;

  std::atomic<uint32_t> requests_{0};
  std::atomic<int> thread_id_{0};
  std::atomic<bool> pic_output_{false};

  ViewCache memory_;
  ViewCache ports_;
  bool untouched_ = true;           // as KVM made it: in its reset state already
  std::vector<uint32_t> msr_list_;  // those that this CPU has
  std::map<uint32_t, uint64_t> reset_msrs_;
  std::optional<uint64_t> frozen_tsc_;
  DebugStop debug_stop_;
};

}  // namespace kvartz::cpu::kvm
