#include "cpu/kvm/kvm_accel.h"

#include <fmt/core.h>
#include <sys/mman.h>
#include <x86intrin.h>

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/log.h"
#include "cpu/kvm/kvm_api.h"
#include "cpu/kvm/kvm_vcpu.h"

namespace kvartz::cpu::kvm {
namespace {

// Three pages for real mode on Intel CPUs that can't run it, and their page table: below the
// firmware, above the APICs.
constexpr uint64_t kIdentityMap = 0xfeffc000;
constexpr uint64_t kTss = 0xfeffd000;

// What a VM can't be without.
struct Needed {
  int capability;
  const char* name;
};
constexpr Needed kNeeded[] = {
    {KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"},
    {KVM_CAP_IRQFD, "KVM_CAP_IRQFD"},
    {KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD"},
    {KVM_CAP_XCRS, "KVM_CAP_XCRS"},
    {KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI"},
    {KVM_CAP_SREGS2, "KVM_CAP_SREGS2"},
    {KVM_CAP_READONLY_MEM, "KVM_CAP_READONLY_MEM"},
    {KVM_CAP_SPLIT_IRQCHIP, "KVM_CAP_SPLIT_IRQCHIP"},
};

}  // namespace

Result<std::unique_ptr<KvmAccel>> KvmAccel::Create(const AccelConfig& config) {
  VERIFY(config.memory != nullptr && config.ports != nullptr && config.host != nullptr);
  UniqueFd device = TRY(OpenDevice());
  for (const Needed& needed : kNeeded) {
    if (Extension(device.get(), static_cast<unsigned long>(needed.capability)) > 0) continue;
    return Fail(
        ErrorCode::kUnsupported,
        fmt::format("KVM of this host lacks {}: it takes Linux 5.17 or newer", needed.name));
  }
  UniqueFd vm(TRY(KVM_CALL(device.get(), KVM_CREATE_VM, 0ul)));
  std::unique_ptr<KvmAccel> accel(new KvmAccel(config, std::move(device), std::move(vm)));
  TRY(accel->Init());
  return accel;
}

KvmAccel::KvmAccel(const AccelConfig& config, UniqueFd device, UniqueFd vm)
    : config_(config),
      device_(std::move(device)),
      vm_(std::move(vm)),
      memory_(vm_.get(), config.kvm.dirty_ring_entries != 0),
      memory_bells_(vm_.get(), Doorbells::Space::kMemory),
      port_bells_(vm_.get(), Doorbells::Space::kPorts),
      interrupts_(vm_.get(), config.irqchip),
      vcpus_(config.cpu_count) {}

KvmAccel::~KvmAccel() {
  config_.memory->RemoveListener(&memory_);
  config_.memory->RemoveListener(&memory_bells_);
  config_.ports->RemoveListener(&port_bells_);
}

Result<> KvmAccel::Init() {
  run_bytes_ = static_cast<size_t>(TRY(KVM_CALL(device_.get(), KVM_GET_VCPU_MMAP_SIZE, 0ul)));
  int xsave = Extension(vm_.get(), KVM_CAP_XSAVE2);
  xsave_bytes_ = std::max<size_t>(static_cast<size_t>(xsave), sizeof(kvm_xsave));
  TRY(MakeCpuids());
  // AMD's hardware needs neither; the calls cost nothing there.
  uint64_t identity_map = kIdentityMap;
  TRY(KVM_CALL(vm_.get(), KVM_SET_IDENTITY_MAP_ADDR, &identity_map));
  TRY(KVM_CALL(vm_.get(), KVM_SET_TSS_ADDR, static_cast<unsigned long>(kTss)));
  TRY(EnableMsrExits());
  if (ring_bytes() != 0) {
    uint32_t capability = Extension(vm_.get(), KVM_CAP_DIRTY_LOG_RING_ACQ_REL) > 0
                              ? KVM_CAP_DIRTY_LOG_RING_ACQ_REL
                              : KVM_CAP_DIRTY_LOG_RING;
    auto most = static_cast<size_t>(Extension(vm_.get(), capability));
    if (ring_bytes() > most) {
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("KVM: dirty-ring-size={} is more than this host's {}",
                              config_.kvm.dirty_ring_entries, most / sizeof(kvm_dirty_gfn)));
    }
    TRY(Enable(vm_.get(), capability, ring_bytes(), "KVM_CAP_DIRTY_LOG_RING"));
  }
  // Before the interrupt controllers: each of these calls waits for the readers of what it
  // replaces, and a slot made after them waits for them all.
  config_.memory->AddListener(&memory_);
  TRY(MakeIrqchip());
  config_.memory->AddListener(&memory_bells_);
  config_.ports->AddListener(&port_bells_);
  return {};
}

Result<> KvmAccel::MakeIrqchip() {
  if (config_.irqchip == IrqchipMode::kUser) {
    return Enable(vm_.get(), KVM_CAP_SPLIT_IRQCHIP, Interrupts::kPins, "KVM_CAP_SPLIT_IRQCHIP");
  }
  TRY(KVM_CALL(vm_.get(), KVM_CREATE_IRQCHIP, 0ul));
  kvm_pit_config pit{};
  pit.flags = KVM_PIT_SPEAKER_DUMMY;
  TRY(KVM_CALL(vm_.get(), KVM_CREATE_PIT2, &pit));
  return interrupts_.Init();
}

Result<> KvmAccel::EnableMsrExits() {
  if (!log::CategoryEnabled(log::Category::kGuestErrors)) return {};
  if (Extension(vm_.get(), KVM_CAP_X86_USER_SPACE_MSR) == 0) return {};
  return Enable(vm_.get(), KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN,
                "KVM_CAP_X86_USER_SPACE_MSR");
}

// What KVM and the host's CPU can do, and what KVM does itself without saying so.
Result<CpuidTable> KvmAccel::SupportedCpuid() {
  constexpr size_t kEntries = 256;
  std::vector<char> bytes(sizeof(kvm_cpuid2) + kEntries * sizeof(kvm_cpuid_entry2));
  auto* list = new (bytes.data()) kvm_cpuid2{};
  list->nent = kEntries;
  TRY(KVM_CALL(device_.get(), KVM_GET_SUPPORTED_CPUID, list));
  std::vector<CpuidLeaf> leaves;
  leaves.reserve(list->nent);
  for (uint32_t i = 0; i < list->nent; ++i) {
    const kvm_cpuid_entry2& entry = list->entries[i];
    leaves.push_back({.leaf = entry.function,
                      .subleaf = entry.index,
                      .eax = entry.eax,
                      .ebx = entry.ebx,
                      .ecx = entry.ecx,
                      .edx = entry.edx,
                      .indexed = (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) != 0});
  }
  CpuidTable table(std::move(leaves));
  table.Add("hypervisor x2apic arat kvm-hint-dedicated");
  if (Extension(vm_.get(), KVM_CAP_TSC_DEADLINE_TIMER) > 0) table.Add("tsc-deadline");
  // A guest that counts on an invariant TSC can't move to a host of another frequency: only when
  // asked for.
  bool migratable = TRY(config_.model.Number("migratable", 1)) != 0;
  if (migratable) {
    bool asked = std::ranges::any_of(config_.model.features,
                                     [](const auto& f) { return f.first == "invtsc" && f.second; });
    if (!asked) table.Remove("invtsc");
  }
  return table;
}

Result<> KvmAccel::MakeCpuids() {
  CpuidTable supported = TRY(SupportedCpuid());
  bool hidden = TRY(config_.model.Number("kvm", 1)) == 0;
  for (unsigned i = 0; i < config_.cpu_count; ++i) {
    std::vector<std::string> dropped;
    CpuidTable table =
        TRY(BuildCpuid(config_.model, supported, i, config_.cpu_count, config_.topology, &dropped));
    if (!hidden) {
      // Documentation/virt/kvm/x86/cpuid.rst: KVM_CPUID_SIGNATURE.
      CpuidLeaf& leaf = table.At(0x40000000);
      leaf.eax = 0x40000001;
      std::memcpy(&leaf.ebx, "KVMKVMKVM\0\0\0", 12);
      table.At(0x40000001);
    }
    cpuids_.push_back(std::move(table));
    if (i == 0) {
      for (const std::string& name : dropped) {
        KLOG(kInfo, "this host lacks CPU feature '{}' of model '{}'", name, config_.model.model);
      }
    }
  }
  return {};
}

Result<std::unique_ptr<Vcpu>> KvmAccel::CreateVcpu(unsigned index) {
  VERIFY(index < config_.cpu_count);
  if (std::optional<Error> error = memory_.TakeError()) return Fail(std::move(*error));
  std::unique_ptr<KvmVcpu> vcpu = TRY(KvmVcpu::Create(*this, index, cpuids_[index]));
  if (index == 0) tsc_khz_ = TRY(vcpu->TscKhz());
  LockGuard guard(mutex_);
  vcpus_[index] = vcpu.get();
  return vcpu;
}

void KvmAccel::Forget(KvmVcpu* vcpu) {
  LockGuard guard(mutex_);
  std::ranges::replace(vcpus_, vcpu, nullptr);
}

void KvmAccel::SetPicOutput(bool level) {
  LockGuard guard(mutex_);
  if (vcpus_[0] != nullptr) vcpus_[0]->PicOutput(level);
}

std::vector<uint32_t> KvmAccel::SavedMsrs() {
  LockGuard guard(mutex_);
  if (saved_msrs_.empty()) {
    constexpr size_t kMost = 1024;
    std::vector<char> bytes(sizeof(kvm_msr_list) + kMost * sizeof(uint32_t));
    auto* list = new (bytes.data()) kvm_msr_list{};
    list->nmsrs = kMost;
    if (Ioctl(device_.get(), KVM_GET_MSR_INDEX_LIST, list) >= 0) {
      saved_msrs_.assign(list->indices, list->indices + list->nmsrs);
      std::ranges::sort(saved_msrs_);
    }
  }
  return saved_msrs_;
}

Result<> KvmAccel::SetDirtyTracking(bool enabled) { return memory_.SetTracking(enabled); }

Result<> KvmAccel::SyncDirty() {
  if (ring_bytes() != 0) return ReapRings();
  return memory_.Sync();
}

Result<> KvmAccel::ReapRings() {
  LockGuard ring_guard(ring_mutex_);
  bool any = false;
  {
    LockGuard guard(mutex_);
    for (KvmVcpu* vcpu : vcpus_) any |= vcpu != nullptr && vcpu->ReapRing();
  }
  if (any) TRY(KVM_CALL(vm_.get(), KVM_RESET_DIRTY_RINGS, 0ul));
  return {};
}

void KvmAccel::ClockStopped() {
  kvm_clock_data clock{};
  if (Ioctl(vm_.get(), KVM_GET_CLOCK, &clock) >= 0) stopped_clock_ns_ = clock.clock;
  stopped_ = true;
  uint64_t now = __rdtsc();
  LockGuard guard(mutex_);
  for (KvmVcpu* vcpu : vcpus_) {
    if (vcpu != nullptr) vcpu->FreezeTsc(now);
  }
}

void KvmAccel::ClockStarted() {
  if (stopped_ || clock_loaded_) {
    kvm_clock_data clock{};
    clock.clock = stopped_clock_ns_;
    if (int result = Ioctl(vm_.get(), KVM_SET_CLOCK, &clock); result < 0) {
      KLOG(kWarn, "KVM_SET_CLOCK: {}", strerror(-result));
    }
  }
  stopped_ = clock_loaded_ = false;
  uint64_t now = __rdtsc();
  LockGuard guard(mutex_);
  for (KvmVcpu* vcpu : vcpus_) {
    if (vcpu != nullptr) vcpu->ThawTsc(now);
  }
}

}  // namespace kvartz::cpu::kvm

namespace kvartz::cpu {

Result<std::unique_ptr<Accel>> CreateKvm(const AccelConfig& config) {
  return TRY(kvm::KvmAccel::Create(config));
}

}  // namespace kvartz::cpu
