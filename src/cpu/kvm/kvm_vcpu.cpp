#include "cpu/kvm/kvm_vcpu.h"

#include <fmt/core.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/log.h"
#include "base/sync.h"
#include "cpu/kvm/kvm_accel.h"
#include "cpu/kvm/kvm_api.h"

namespace kvartz::cpu::kvm {
namespace {

// Wakes a vCPU thread out of the guest. Its handler does nothing: the interruption is the message.
int KickSignal() {
  static const int signal = [] {
    struct sigaction action{};
    action.sa_handler = [](int) {};
    sigaction(SIGRTMIN, &action, nullptr);
    return SIGRTMIN;
  }();
  return signal;
}

}  // namespace

Result<std::unique_ptr<KvmVcpu>> KvmVcpu::Create(KvmAccel& accel, unsigned index,
                                                 const CpuidTable& cpuid) {
  std::unique_ptr<KvmVcpu> vcpu(new KvmVcpu(accel, index));
  vcpu->apic_id_ = ApicIdOf(index, accel.config().topology);
  vcpu->signature_ = cpuid.Lookup(1, 0).eax;
  vcpu->fd_.Reset(TRY(KVM_CALL(accel.vm_fd(), KVM_CREATE_VCPU, vcpu->apic_id_)));
  TRY(vcpu->Map(accel.ring_bytes()));
  TRY(vcpu->SetCpuid(cpuid));
  KickSignal();
  return vcpu;
}

KvmVcpu::~KvmVcpu() {
  accel_.Forget(this);
  if (ring_ != nullptr) munmap(ring_, ring_entries_ * sizeof(kvm_dirty_gfn));
  if (run_ != nullptr) munmap(run_, run_bytes_);
}

KvmVcpu::KvmVcpu(KvmAccel& accel, unsigned index)
    : accel_(accel),
      index_(index),
      memory_(*accel.config().memory),
      ports_(*accel.config().ports) {}

Result<> KvmVcpu::Map(size_t ring_bytes) {
  run_bytes_ = accel_.run_bytes();
  auto map = [&](size_t bytes, off_t offset) -> Result<void*> {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), offset);
    if (at == MAP_FAILED) {
      return kvartz::Fail(ErrnoError(errno, fmt::format("KVM: cannot map CPU {}", index_)));
    }
    return at;
  };
  run_ = static_cast<kvm_run*>(TRY(map(run_bytes_, 0)));
  constexpr size_t kPage = 4096;
  if (run_bytes_ > KVM_COALESCED_MMIO_PAGE_OFFSET * kPage) {
    collected_ = reinterpret_cast<kvm_coalesced_mmio_ring*>(reinterpret_cast<char*>(run_) +
                                                            KVM_COALESCED_MMIO_PAGE_OFFSET * kPage);
  }
  if (ring_bytes != 0) {
    ring_ = static_cast<kvm_dirty_gfn*>(TRY(map(ring_bytes, KVM_DIRTY_LOG_PAGE_OFFSET * kPage)));
    ring_entries_ = ring_bytes / sizeof(kvm_dirty_gfn);
  }
  return {};
}

Result<> KvmVcpu::SetCpuid(const CpuidTable& cpuid) {
  const std::vector<CpuidLeaf>& leaves = cpuid.leaves();
  std::vector<char> bytes(sizeof(kvm_cpuid2) + leaves.size() * sizeof(kvm_cpuid_entry2));
  auto* table = new (bytes.data()) kvm_cpuid2{};
  table->nent = static_cast<uint32_t>(leaves.size());
  for (size_t i = 0; i < leaves.size(); ++i) {
    const CpuidLeaf& leaf = leaves[i];
    kvm_cpuid_entry2& entry = table->entries[i];
    entry = {};
    entry.function = leaf.leaf;
    entry.index = leaf.subleaf;
    entry.flags = leaf.indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
    entry.eax = leaf.eax;
    entry.ebx = leaf.ebx;
    entry.ecx = leaf.ecx;
    entry.edx = leaf.edx;
  }
  TRY(KVM_CALL(fd_.get(), KVM_SET_CPUID2, table));
  return {};
}

Result<uint64_t> KvmVcpu::TscKhz() {
  uint64_t hz = TRY(accel_.config().model.Number("tsc-frequency", 0));
  if (hz != 0 && Extension(accel_.vm_fd(), KVM_CAP_TSC_CONTROL) > 0) {
    TRY(KVM_CALL(fd_.get(), KVM_SET_TSC_KHZ, static_cast<unsigned long>(hz / 1000)));
  }
  auto khz = static_cast<uint64_t>(TRY(KVM_CALL(fd_.get(), KVM_GET_TSC_KHZ, 0ul)));
  if (hz != 0 && khz != hz / 1000) {
    return kvartz::Fail(
        ErrorCode::kUnsupported,
        fmt::format("CPU property 'tsc-frequency': this host can't scale its TSC of "
                    "{} kHz to {} kHz",
                    khz, hz / 1000));
  }
  return khz;
}

// The order matters: the request first, then what stops KVM_RUN before it enters the guest, then
// what ends it inside.
void KvmVcpu::Ask(Request request) {
  requests_.fetch_or(request);
  std::atomic_ref(run_->immediate_exit).store(1);
  if (int thread = thread_id_; thread != 0 && thread != CurrentThreadId()) {
    syscall(SYS_tgkill, getpid(), thread, KickSignal());
  }
}

void KvmVcpu::PicOutput(bool level) {
  pic_output_ = level;
  if (level) Ask(kLook);
}

void KvmVcpu::EnterThread() {
  int thread = CurrentThreadId();
  if (thread_id_ == thread) return;
  sigset_t kick;
  sigemptyset(&kick);
  sigaddset(&kick, KickSignal());
  pthread_sigmask(SIG_UNBLOCK, &kick, nullptr);
  thread_id_ = thread;
}

Vcpu::Exit KvmVcpu::Run() {
  EnterThread();
  if (Result<> result = LeaveResetState(); !result) return Fail(result.error().what);
  bool stopping = false;
  for (;;) {
    // Cleared before the requests are read: one that comes later sets it again.
    std::atomic_ref(run_->immediate_exit).store(0);
    uint32_t requests = requests_.exchange(0);
    if ((requests & kNmi) != 0) Ioctl(fd_.get(), KVM_NMI);
    stopping |= (requests & kKick) != 0;
    if (stopping) {
      // KVM_RUN once more: it completes an access whose answer is in kvm_run, and enters no guest.
      std::atomic_ref(run_->immediate_exit).store(1);
    } else if (index_ == 0 && accel_.config().irqchip == IrqchipMode::kUser) {
      OfferPicInterrupt();
    }
    int result = ioctl(fd_.get(), KVM_RUN, 0);
    int error = result < 0 ? errno : 0;
    if (collected_ != nullptr) accel_.DrainCollected(collected_, memory_, ports_);
    if (error == EINTR && stopping) return Exit::kKicked;
    if (error == EINTR || error == EAGAIN) continue;  // EAGAIN: an application processor woke up
    std::optional<Exit> exit = error != 0 ? HandleError(error) : HandleExit();
    if (exit) return *exit;
  }
}

// Split irqchip: the 8259's interrupt goes in when the guest can take it; until then KVM_RUN
// returns when it can.
void KvmVcpu::OfferPicInterrupt() {
  if (!pic_output_) {
    run_->request_interrupt_window = 0;
    return;
  }
  if (!run_->ready_for_interrupt_injection) {
    run_->request_interrupt_window = 1;
    return;
  }
  run_->request_interrupt_window = 0;
  kvm_interrupt interrupt{};
  interrupt.irq = accel_.config().host->AcknowledgePic();
  if (int result = Ioctl(fd_.get(), KVM_INTERRUPT, &interrupt); result < 0) {
    KLOG(kWarn, "KVM: vector {:#x} of the PIC is lost: {}", interrupt.irq, strerror(-result));
  }
  run_->ready_for_interrupt_injection = 0;  // until KVM says so again
}

std::optional<Vcpu::Exit> KvmVcpu::HandleExit() {
  switch (run_->exit_reason) {
    case KVM_EXIT_IO:
      HandleIo();
      return std::nullopt;
    case KVM_EXIT_MMIO:
      HandleMmio();
      return std::nullopt;
    case KVM_EXIT_IRQ_WINDOW_OPEN:
    case KVM_EXIT_INTR:
    case KVM_EXIT_HLT:
      return std::nullopt;
    case KVM_EXIT_IOAPIC_EOI:
      accel_.config().host->BroadcastEoi(run_->eoi.vector);
      return std::nullopt;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
      HandleMsr();
      return std::nullopt;
    case KVM_EXIT_DIRTY_RING_FULL:
      return HandleFullRing();
    case KVM_EXIT_SHUTDOWN:
    case KVM_EXIT_SYSTEM_EVENT:
      accel_.config().host->TripleFault(index_);
      return Exit::kTripleFault;
    case KVM_EXIT_DEBUG:
      return HandleDebug();
    case KVM_EXIT_INTERNAL_ERROR:
      return HandleInternalError();
    case KVM_EXIT_FAIL_ENTRY:
      return Fail(
          fmt::format("KVM: the processor refuses to enter the guest (reason {:#x} on host "
                      "CPU {}); the guest's state is not valid for it",
                      uint64_t{run_->fail_entry.hardware_entry_failure_reason},
                      uint32_t{run_->fail_entry.cpu}));
    default:
      return Fail(fmt::format("KVM: unexpected exit {} (hardware reason {:#x})",
                              uint32_t{run_->exit_reason},
                              uint64_t{run_->hw.hardware_exit_reason}));
  }
}

// Another thread may have emptied the ring meanwhile; one that stays full for ever has lost
// entries.
std::optional<Vcpu::Exit> KvmVcpu::HandleFullRing() {
  uint64_t before = ring_next_;
  if (Result<> result = accel_.ReapRings(); !result) return Fail(result.error().what);
  constexpr unsigned kPatience = 1000;
  full_in_vain_ = ring_next_ == before ? full_in_vain_ + 1 : 0;
  if (full_in_vain_ < kPatience) return std::nullopt;
  return Fail("KVM: the dirty ring overflowed; use a larger dirty-ring-size, or 0 for the log");
}

std::optional<Vcpu::Exit> KvmVcpu::HandleError(int error) {
  if (error == EFAULT && run_->exit_reason == KVM_EXIT_MEMORY_FAULT) {
    uint64_t fields[3];  // flags, guest address, size
    std::memcpy(fields, &run_->hw, sizeof(fields));
    return Fail(fmt::format("KVM: no host memory behind guest address {:#x}: {}", fields[1],
                            strerror(error)));
  }
  return Fail(fmt::format("KVM_RUN: {}", strerror(error)));
}

Vcpu::Exit KvmVcpu::Fail(const std::string& why) {
  accel_.config().host->EngineFailed(index_, why);
  return Exit::kFailed;
}

// Also the string forms: `count` accesses, their data one behind the other.
void KvmVcpu::HandleIo() {
  const auto& io = run_->io;
  auto* data = reinterpret_cast<uint8_t*>(run_) + io.data_offset;
  for (uint32_t i = 0; i < io.count; ++i, data += io.size) {
    uint64_t value = 0;
    if (io.direction == KVM_EXIT_IO_OUT) {
      std::memcpy(&value, data, io.size);
      BusWrite(ports_, io.port, io.size, value);
    } else {
      value = BusRead(ports_, io.port, io.size);
      std::memcpy(data, &value, io.size);
    }
  }
}

void KvmVcpu::HandleMmio() {
  auto& mmio = run_->mmio;
  uint64_t value = 0;
  unsigned size = std::min<unsigned>(mmio.len, sizeof(value));
  if (mmio.is_write) {
    std::memcpy(&value, mmio.data, size);
    WriteAny(memory_, mmio.phys_addr, size, value);
  } else {
    value = ReadAny(memory_, mmio.phys_addr, size);
    std::memcpy(mmio.data, &value, sizeof(value));
  }
}

// Asked for only while the guest's errors are logged: the answer is #GP, as without.
void KvmVcpu::HandleMsr() {
  bool write = run_->exit_reason == KVM_EXIT_X86_WRMSR;
  if (write) {
    KLOG_GUEST("CPU {}: unknown MSR {:#x} written with {:#x}", index_, uint32_t{run_->msr.index},
               uint64_t{run_->msr.data});
  } else {
    KLOG_GUEST("CPU {}: unknown MSR {:#x} read", index_, uint32_t{run_->msr.index});
  }
  run_->msr.error = 1;
}

Vcpu::Exit KvmVcpu::HandleDebug() {
  const kvm_debug_exit_arch& arch = run_->debug.arch;
  debug_stop_ = {.rip = arch.pc, .dr6 = arch.dr6, .vector = static_cast<uint8_t>(arch.exception)};
  return Exit::kDebug;
}

// The CPU may run on after its state was put right: Run does so when it is called again.
Vcpu::Exit KvmVcpu::HandleInternalError() {
  kvm_regs regs{};
  Ioctl(fd_.get(), KVM_GET_REGS, &regs);
  const auto& failure = run_->emulation_failure;
  if (run_->internal.suberror != KVM_INTERNAL_ERROR_EMULATION) {
    std::string data;
    unsigned count = std::min<unsigned>(run_->internal.ndata, std::size(run_->internal.data));
    for (unsigned i = 0; i < count; ++i) {
      data += fmt::format(" {:#x}", uint64_t{run_->internal.data[i]});
    }
    return Fail(fmt::format("KVM: internal error {} at rip {:#x}:{}",
                            uint32_t{run_->internal.suberror}, uint64_t{regs.rip}, data));
  }
  std::string bytes;
  if (failure.ndata >= 3 &&
      (failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0) {
    unsigned size = std::min<unsigned>(failure.insn_size, sizeof(failure.insn_bytes));
    for (unsigned i = 0; i < size; ++i) bytes += fmt::format(" {:02x}", failure.insn_bytes[i]);
  }
  return Fail(fmt::format("KVM: cannot emulate the instruction at rip {:#x}:{}", uint64_t{regs.rip},
                          bytes.empty() ? " bytes not known" : bytes));
}

Result<> KvmVcpu::SetDebug(const DebugRequest& request) {
  kvm_guest_debug debug{};
  if (request.any()) debug.control = KVM_GUESTDBG_ENABLE;
  if (request.single_step) debug.control |= KVM_GUESTDBG_SINGLESTEP;
  if (request.software_breakpoints) debug.control |= KVM_GUESTDBG_USE_SW_BP;
  if (!request.hardware.empty()) debug.control |= KVM_GUESTDBG_USE_HW_BP;
  constexpr size_t kRegisters = 4;
  if (request.hardware.size() > kRegisters) {
    return kvartz::Fail(ErrorCode::kNoSpace, "a CPU has 4 hardware breakpoints");
  }
  // DR7, SDM vol. 3 sec. 18.2.4: L bit, R/W and LEN of each.
  debug.arch.debugreg[7] = request.hardware.empty() ? 0 : 0x600;
  for (size_t i = 0; i < request.hardware.size(); ++i) {
    const DebugRequest::Hardware& each = request.hardware[i];
    uint64_t length = each.size == 8 ? 2 : each.size - 1u;
    if (each.kind == DebugRequest::Hardware::Kind::kExecute) length = 0;
    debug.arch.debugreg[i] = each.address;
    debug.arch.debugreg[7] |= 2ull << 2 * i;
    debug.arch.debugreg[7] |= (length << 2 | static_cast<uint64_t>(each.kind)) << (16 + 4 * i);
  }
  TRY(KVM_CALL(fd_.get(), KVM_SET_GUEST_DEBUG, &debug));
  return {};
}

bool KvmVcpu::ReapRing() {
  bool any = false;
  while (ring_ != nullptr) {
    kvm_dirty_gfn& entry = ring_[ring_next_ % ring_entries_];
    std::atomic_ref flags(entry.flags);
    if ((flags.load(std::memory_order_acquire) & KVM_DIRTY_GFN_F_MASK) != KVM_DIRTY_GFN_F_DIRTY) {
      break;
    }
    accel_.memory().MarkDirty(entry.slot & 0xffff, entry.offset);
    flags.store(KVM_DIRTY_GFN_F_RESET, std::memory_order_release);
    ++ring_next_;
    any = true;
  }
  return any;
}

}  // namespace kvartz::cpu::kvm
