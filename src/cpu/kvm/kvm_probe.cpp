// Is /dev/kvm fit to run operating systems? Found out by running one instruction.
//
// Behind some /dev/kvm there is no hardware: a module runs ring 3 natively and ring 0 in KVM's
// instruction emulator, which knows the instructions that touch devices and few others. POPCNT in
// 64-bit ring 0 tells: hardware runs it, the emulator gives up.
#include <fmt/core.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "cpu/accel.h"
#include "cpu/kvm/kvm_api.h"

namespace kvartz::cpu {
namespace {

using Verdict = KvmFitness::Verdict;

// Guest memory: three page tables, then code.
constexpr size_t kPage = 4096, kTables = 3, kMemory = (kTables + 1) * kPage;
constexpr uint64_t kCodeAddress = kTables * kPage;
constexpr uint64_t kPattern = 0x123456789abcdef0;  // 32 bits set
constexpr uint8_t kPort = 0xee;
constexpr uint8_t kCode[] = {
    0xf3, 0x48,  0x0f, 0xb8, 0xc3,  // popcnt rax, rbx
    0xe6, kPort,                    // out kPort, al
};

// Flat 64-bit ring 0, the first 2 MiB mapped one to one.
void FillMemory(uint8_t* memory) {
  constexpr uint64_t kPresentWritable = 3, kLarge = 0x80;
  auto put = [&](size_t at, uint64_t entry) { std::memcpy(memory + at, &entry, sizeof(entry)); };
  put(0, kPage | kPresentWritable);
  put(kPage, 2 * kPage | kPresentWritable);
  put(2 * kPage, kLarge | kPresentWritable);
  std::memcpy(memory + kCodeAddress, kCode, sizeof(kCode));
}

Result<> EnterLongMode(int vcpu) {
  kvm_sregs sregs{};
  TRY(KVM_CALL(vcpu, KVM_GET_SREGS, &sregs));
  kvm_segment flat{};
  flat.limit = 0xffffffff;
  flat.type = 3;
  flat.present = flat.s = flat.g = flat.db = 1;
  flat.selector = 16;
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
  flat.type = 11;
  flat.db = 0;
  flat.l = 1;
  flat.selector = 8;
  sregs.cs = flat;
  sregs.cr0 = 0x80000011;  // PG, ET, PE
  sregs.cr3 = 0;
  sregs.cr4 = 0x20;    // PAE
  sregs.efer = 0x500;  // LMA, LME
  TRY(KVM_CALL(vcpu, KVM_SET_SREGS, &sregs));
  kvm_regs regs{};
  regs.rip = kCodeAddress;
  regs.rbx = kPattern;
  regs.rflags = 2;
  TRY(KVM_CALL(vcpu, KVM_SET_REGS, &regs));
  return {};
}

Result<KvmFitness> RunOneInstruction(int device) {
  UniqueFd vm(TRY(KVM_CALL(device, KVM_CREATE_VM, 0ul)));
  auto mapping = [](size_t size, int flags, int fd) -> Result<uint8_t*> {
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (at == MAP_FAILED) return Fail(ErrnoError(errno, "cannot map memory"));
    return static_cast<uint8_t*>(at);
  };
  struct Unmap {
    uint8_t* at;
    size_t size;
    ~Unmap() { munmap(at, size); }
  };
  uint8_t* memory = TRY(mapping(kMemory, MAP_PRIVATE | MAP_ANONYMOUS, -1));
  Unmap unmap_memory{memory, kMemory};
  FillMemory(memory);
  kvm_userspace_memory_region region{};
  region.memory_size = kMemory;
  region.userspace_addr = reinterpret_cast<uintptr_t>(memory);
  TRY(KVM_CALL(vm.get(), KVM_SET_USER_MEMORY_REGION, &region));
  UniqueFd vcpu(TRY(KVM_CALL(vm.get(), KVM_CREATE_VCPU, 0ul)));
  auto size = static_cast<size_t>(TRY(KVM_CALL(device, KVM_GET_VCPU_MMAP_SIZE, 0ul)));
  uint8_t* mapped = TRY(mapping(size, MAP_SHARED, vcpu.get()));
  Unmap unmap_run{mapped, size};
  auto* run = reinterpret_cast<kvm_run*>(mapped);
  TRY(EnterLongMode(vcpu.get()));
  TRY(KVM_CALL(vcpu.get(), KVM_RUN, 0ul));

  kvm_regs regs{};
  TRY(KVM_CALL(vcpu.get(), KVM_GET_REGS, &regs));
  constexpr uint64_t kBitsSet = 32;
  if (run->exit_reason == KVM_EXIT_IO && run->io.port == kPort && regs.rax == kBitsSet) {
    return KvmFitness{Verdict::kFit, "/dev/kvm runs guests on the host's CPU"};
  }
  if (run->exit_reason == KVM_EXIT_INTERNAL_ERROR) {
    return KvmFitness{Verdict::kEmulated,
                      "/dev/kvm emulates the guest's kernel in software (this host has no hardware "
                      "virtualisation) and can't run an operating system"};
  }
  return KvmFitness{Verdict::kBroken,
                    fmt::format("/dev/kvm does not run a test program (exit {}, rax {:#x})",
                                uint32_t{run->exit_reason}, uint64_t{regs.rax})};
}

KvmFitness Probe() {
  Result<UniqueFd> device = kvm::OpenDevice();
  if (!device) {
    switch (device.error().code) {
      case ErrorCode::kNotFound:
        return {Verdict::kAbsent, device.error().what};
      case ErrorCode::kPermission:
        return {Verdict::kNoPermission, device.error().what};
      default:
        return {Verdict::kBroken, device.error().what};
    }
  }
  Result<KvmFitness> fitness = RunOneInstruction(device->get());
  if (!fitness) {
    return {Verdict::kBroken, "/dev/kvm can't make a virtual machine: " + fitness.error().what};
  }
  return *fitness;
}

}  // namespace

const KvmFitness& ProbeKvm() {
  static const KvmFitness fitness = Probe();
  return fitness;
}

}  // namespace kvartz::cpu
