// The machine-wide side of the own engine: interrupt messages, stopping the world, dirty tracking.
#include "cpu/x86/engine.h"

#include <fmt/core.h>

#include <algorithm>

#include "base/check.h"
#include "base/log.h"
#include "cpu/x86/interp/native.h"
#include "cpu/x86/jit/engine.h"

namespace kvartz::cpu {

Result<std::unique_ptr<Accel>> CreateSoftEngine(const AccelConfig& config) {
  return x86::SoftAccel::Create(config);
}

}  // namespace kvartz::cpu

namespace kvartz::cpu::x86 {
namespace {

constexpr uint32_t kSignature = 0x40000000;

// Leaves that are the engine's own: who it is, and at what rate time runs (1 GHz, TSC and APIC
// timer alike).
void AddEngineLeaves(CpuidTable* table) {
  if (table->Has("hypervisor")) {
    CpuidLeaf& signature = table->At(kSignature);
    signature.eax = kSignature + 0x10;
    bool kvm = table->Has("kvmclock");
    const char* text = kvm ? "KVMKVMKVM\0\0\0" : "KvartzKvartz";
    std::memcpy(&signature.ebx, text, 4);
    std::memcpy(&signature.ecx, text + 4, 4);
    std::memcpy(&signature.edx, text + 8, 4);
    CpuidLeaf& rates = table->At(kSignature + 0x10);
    rates.eax = 1'000'000;
    rates.ebx = Lapic::kHz / 1000;
  }
  if (table->Lookup(0, 0).eax < 0x15) return;
  CpuidLeaf& crystal = table->At(0x15);
  crystal.eax = crystal.ebx = 1;
  crystal.ecx = Lapic::kHz;
  if (table->Lookup(0, 0).eax < 0x16) return;
  CpuidLeaf& rate = table->At(0x16);
  rate.eax = rate.ebx = 1000;
}

}  // namespace

Result<std::unique_ptr<Accel>> SoftAccel::Create(const AccelConfig& config) {
  TRY(PrepareStubs());
  std::unique_ptr<SoftAccel> accel(new SoftAccel(config));
  if (config.soft.perf_map)
    accel->perf_map_ = TRY(jit::PerfMap::Create(jit::PerfMap::PathOfProcess()));
  CpuidTable supported = SoftCpuid(config.model);
  std::vector<std::string> dropped;
  for (unsigned i = 0; i < config.cpu_count; i++) {
    auto* where = i == 0 ? &dropped : nullptr;
    accel->cpuid_.push_back(
        TRY(BuildCpuid(config.model, supported, i, config.cpu_count, config.topology, where)));
    AddEngineLeaves(&accel->cpuid_.back());
  }
  for (const std::string& name : dropped)
    KLOG(kInfo, "cpu: feature '{}' of the model is left out", name);
  accel->vcpus_.resize(config.cpu_count);
  config.memory->AddListener(accel.get());
  return accel;
}

SoftAccel::~SoftAccel() { config_.memory->RemoveListener(this); }

Result<std::unique_ptr<Vcpu>> SoftAccel::CreateVcpu(unsigned index) {
  VERIFY(index < vcpus_.size() && !vcpus_[index]);
  std::unique_ptr<SoftVcpu> vcpu = TRY(SoftVcpu::Create(*this, index));
  LockGuard guard(world_mutex_);
  vcpus_[index] = vcpu.get();
  tlbs_.push_back(&vcpu->tlb_);
  return vcpu;
}

// ---- interrupts

void SoftAccel::Accept(SoftVcpu& target, uint32_t icr) {
  auto vector = static_cast<uint8_t>(icr);
  bool level_triggered = icr >> 15 & 1;
  switch (static_cast<DeliveryMode>(icr >> 8 & 7)) {
    case DeliveryMode::kFixed:
    case DeliveryMode::kLowestPriority:
      if (!target.lapic().accepts_fixed()) return;
      target.lapic().Accept(vector, level_triggered);
      return target.Request(request::kInterrupt);
    case DeliveryMode::kNmi:
      return target.Request(request::kNmi);
    case DeliveryMode::kInit:
      // The level de-assert message does nothing since Pentium 4.
      if (level_triggered && !(icr >> 14 & 1)) return;
      return target.Request(request::kInit);
    case DeliveryMode::kStartup:
      return target.RequestStartup(vector);
    case DeliveryMode::kExtInt:
      target.external_interrupt_ = true;
      return target.Request(request::kInterrupt);
    default:
      return;  // SMI: no SMM
  }
}

void SoftAccel::Deliver(uint32_t destination, bool logical, bool x2apic_destination, uint32_t icr,
                        unsigned shorthand, const SoftVcpu* self) {
  bool lowest =
      static_cast<DeliveryMode>(icr >> 8 & 7) == DeliveryMode::kLowestPriority && shorthand == 0;
  SoftVcpu* best = nullptr;
  auto count = static_cast<unsigned>(vcpus_.size());
  unsigned start = lowest ? rotation_.fetch_add(1, std::memory_order_relaxed) : 0;
  for (unsigned i = 0; i < count; i++) {
    SoftVcpu* vcpu = vcpus_[(start + i) % count];
    if (!vcpu) continue;
    if (shorthand == 1 && vcpu != self) continue;
    if (shorthand == 3 && vcpu == self) continue;
    if (shorthand == 0 && !vcpu->lapic().Matches(destination, logical, x2apic_destination))
      continue;
    if (!lowest) {
      Accept(*vcpu, icr);
    } else if (vcpu->lapic().accepts_fixed() &&
               (!best || vcpu->lapic().priority() < best->lapic().priority())) {
      best = vcpu;
    }
  }
  if (best) Accept(*best, icr);
}

void SoftAccel::SendMsi(uint64_t address, uint32_t data) {
  // Address: 0xfee00000 | destination << 12 | redirection hint << 3 | logical << 2 (SDM vol.
  // 3 11.11).
  if ((address & ~0xfffffull) != 0xfee00000) return;
  bool logical = address >> 2 & 1;
  uint32_t icr = data & 0xc7ff;
  if ((address >> 3 & 1) && logical && (icr & 0x700) == 0)
    icr |= static_cast<uint32_t>(DeliveryMode::kLowestPriority) << 8;
  Deliver(static_cast<uint32_t>(address >> 12 & 0xff), logical, false, icr);
}

void SoftAccel::SetPicOutput(bool level) {
  if (SoftVcpu* bootstrap = vcpus_[0]) bootstrap->SetPicOutput(level);
}

Result<uint64_t> SoftAccel::AddIrqFd(int, uint64_t, uint32_t) {
  return Fail(ErrorCode::kUnsupported,
              "the own engine takes interrupts by message, not by descriptor");
}

// ---- the world

void SoftAccel::RequestAll(uint32_t bits) {
  for (SoftVcpu* vcpu : vcpus_) {
    if (vcpu) vcpu->Request(bits);
  }
}

void SoftAccel::EnterGuest() {
  LockGuard guard(world_mutex_);
  world_cond_.Wait(guard, [this] { return !stopped_; });
  running_++;
}

void SoftAccel::LeaveGuest() {
  LockGuard guard(world_mutex_);
  running_--;
  if (stopped_) world_cond_.NotifyAll();
}

void SoftAccel::Safepoint() {
  LeaveGuest();
  EnterGuest();
}

void SoftAccel::StopFor(Cpu* self) {
  LockGuard guard(world_mutex_);
  if (stopped_ && self && stopper_ == self) {
    stop_depth_++;
    return;
  }
  // While it waits for its turn, this CPU is stopped itself.
  if (self) {
    running_--;
    if (stopped_) world_cond_.NotifyAll();
  }
  world_cond_.Wait(guard, [this] { return !stopped_; });
  stopped_ = true;
  stopper_ = self;
  stop_depth_ = 1;
  for (SoftVcpu* vcpu : vcpus_) {
    if (vcpu && &vcpu->cpu != self) vcpu->Request(request::kSafepoint);
  }
  world_cond_.Wait(guard, [this] { return running_ == 0; });
}

void SoftAccel::ResumeFor(Cpu* self) {
  LockGuard guard(world_mutex_);
  if (--stop_depth_ > 0) return;
  stopped_ = false;
  stopper_ = nullptr;
  if (self) running_++;
  world_cond_.NotifyAll();
}

void SoftAccel::CodeWritten(const uint32_t* word) {
  for (SoftVcpu* vcpu : vcpus_) {
    if (!vcpu) continue;
    if (vcpu->jit_) vcpu->jit_->NoteWritten(word);
    vcpu->Request(request::kCodeWritten);
  }
}

// Decoded code is known by its host address: it may stay while all RAM and ROM does.
void SoftAccel::ViewChanged(const FlatView& before, const FlatView& after) {
  const bool kept =
      std::all_of(before.ranges().begin(), before.ranges().end(), [&after](const FlatRange& range) {
        if (range.region->kind == RegionKind::kIo) return true;
        const FlatRange* now = after.Find(range.base);
        return now && now->region->kind != RegionKind::kIo && now->end() >= range.end() &&
               now->Host(range.base) == range.Host(range.base);
      });
  RequestAll(kept ? request::kFlushTlb : request::kFlushTlb | request::kFlushCode);
}

Result<> SoftAccel::SetDirtyTracking(bool enabled) {
  StopFor(nullptr);
  for (const FlatRange& range : config_.memory->view()->ranges()) {
    if (range.region->kind == RegionKind::kRam) range.region->ram->dirty().SetEnabled(enabled);
  }
  for (Tlb* tlb : tlbs_) tlb->DropAllWritable();
  ResumeFor(nullptr);
  return {};
}

void SoftAccel::ClockStarted() {
  for (SoftVcpu* vcpu : vcpus_) {
    if (vcpu) vcpu->Request(request::kTimer);
  }
}

// No state beyond the CPUs': time is the machine's clock.
void SoftAccel::VisitState(StateVisitor& visitor) { visitor.Version(1); }

}  // namespace kvartz::cpu::x86
