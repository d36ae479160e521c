// One CPU of the own engine: the outer loop.
#include <fmt/core.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>

#include "base/check.h"
#include "base/log.h"
#include "cpu/polling.h"
#include "cpu/x86/engine.h"
#include "cpu/x86/fault.h"
#include "cpu/x86/host_trap.h"
#include "cpu/x86/interp/block_cache.h"
#include "cpu/x86/jit/engine.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {
namespace {

// What a sleeping CPU wakes up for.
constexpr uint32_t kWakeUps = request::kInterrupt | request::kNmi | request::kInit |
                              request::kSipi | request::kKick | request::kSafepoint |
                              request::kFlushTlb | request::kTimer;

int TimerSignal() { return SIGRTMIN + 2; }

// The CPU whose timer interrupts this thread.
thread_local Cpu* timer_target = nullptr;

void OnTimer(int) {
  if (timer_target) SetRequest(*timer_target, request::kTimer);
}

// The code at `linear` without side effects, as far as it is mapped. Returns how much.
unsigned PeekCode(Cpu& cpu, uint64_t linear, uint8_t* bytes, unsigned size) {
  unsigned done = 0;
  while (done < size) {
    uint64_t physical = 0;
    const FlatRange* range =
        mmu::Probe(cpu, linear + done, &physical) ? cpu.tlb->Find(physical) : nullptr;
    if (!range || range->region->kind == RegionKind::kIo) break;
    bytes[done++] = *range->Host(physical);
  }
  return done;
}

// An instruction that no table has, and that isn't one of those that are there to be undefined
// (UD0, UD1, UD2).
void LogUndefined(Cpu& cpu, unsigned index) {
  static log::RateLimit limit;
  uint64_t linear =
      cpu.code_mode == CodeMode::k64 ? cpu.rip : (cpu.seg[kCs].base + cpu.rip) & 0xffffffff;
  uint8_t bytes[15] = {};
  unsigned size = PeekCode(cpu, linear, bytes, sizeof(bytes));
  bool on_purpose =
      size >= 2 && bytes[0] == 0x0f && (bytes[1] == 0x0b || bytes[1] == 0xb9 || bytes[1] == 0xff);
  if (on_purpose || size == 0) return;
  DecodeContext context{.mode = cpu.code_mode,
                        .protected_mode = cpu.protected_mode() && !cpu.virtual_8086(),
                        .cpl = cpu.cpl};
  Insn insn;
  if (Decode(context, {bytes, size}, &insn) != DecodeStatus::kInvalid || !limit.Pass()) return;
  std::string text;
  for (unsigned i = 0; i < size; i++) text += fmt::format(" {:02x}", bytes[i]);
  KLOG(kWarn, "cpu {}: undefined instruction at {:#x}:{:#x}: the guest gets #UD; bytes{}", index,
       cpu.seg[kCs].selector, cpu.rip, text);
}

constexpr size_t kHugePage = 2 << 20;
// What is mapped at first: one more than needed.
constexpr size_t kStateBytes = (sizeof(jit::State) + 2 * kHugePage - 1) / kHugePage * kHugePage;

}  // namespace

// Low, if there is room: translated code names it absolutely then. In huge pages, since that code
// asks for something of it all the time.
jit::State* NewState() {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* map = mmap(nullptr, kStateBytes, PROT_READ | PROT_WRITE, kFlags | MAP_32BIT, -1, 0);
  if (map == MAP_FAILED) map = mmap(nullptr, kStateBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  VERIFY(map != MAP_FAILED);
  auto* at = static_cast<uint8_t*>(map);
  const size_t front = -reinterpret_cast<uintptr_t>(at) % kHugePage;
  if (front != 0) munmap(at, front);
  munmap(at + front + kStateBytes - kHugePage, kHugePage - front);
  madvise(at + front, kStateBytes - kHugePage, MADV_HUGEPAGE);
  return new (at + front) jit::State;
}
void FreeState(jit::State* state) {
  state->~State();
  munmap(state, kStateBytes - kHugePage);
}

SoftVcpu::SoftVcpu(SoftAccel& accel, unsigned index, std::unique_ptr<BlockCache> blocks)
    : state_(NewState(), FreeState),
      cpu(state_->cpu),
      accel_(accel),
      index_(index),
      cpuid_(accel.cpuid(index)),
      limits_(CpuLimits::FromCpuid(cpuid_)),
      tlb_(*accel.config().memory, &state_->tlb[0][0]),
      ports_(*accel.config().ports),
      blocks_(std::move(blocks)),
      polling_ns_(PollingNs(accel.config().cpu_count)),
      lapic_(cpu, *this, ApicIdOf(index, accel.config().topology), index == 0) {
  cpu.vcpu = this;
  cpu.tlb = &tlb_;
  cpu.blocks = blocks_.get();
  tlb_.local_apic = &lapic_;
  tlb_.code_listener = &accel;
  tlb_.physical_bits = limits_.physical_bits;
  tlb_.gigabyte_pages = cpuid_.Has("pdpe1gb");
  if (accel.config().cpu_count > 1) tlb_.world = &accel;
}

Result<std::unique_ptr<SoftVcpu>> SoftVcpu::Create(SoftAccel& accel, unsigned index) {
  auto blocks = TRY(BlockCache::Create(FeatureSet::FromCpuid(accel.cpuid(index))));
  std::unique_ptr<SoftVcpu> vcpu(new SoftVcpu(accel, index, std::move(blocks)));
  struct sigaction action = {};
  action.sa_handler = OnTimer;
  action.sa_flags = SA_RESTART;
  if (sigaction(TimerSignal(), &action, nullptr) != 0)
    return Fail(ErrnoError(errno, "cannot set up the vCPU timer signal"));
  const SoftOptions& options = accel.config().soft;
  if (options.jit) {
    const uint64_t code_bytes = TRY(CodeBytesOfCpu(options, accel.config().cpu_count));
    vcpu->jit_ =
        TRY(jit::Engine::Create(*vcpu->state_, FeatureSet::FromCpuid(vcpu->cpuid_), code_bytes));
    if (accel.perf_map() != nullptr) vcpu->jit_->PublishStubs(*accel.perf_map());
  }
  TRY(vcpu->Reset());
  return vcpu;
}

SoftVcpu::~SoftVcpu() {
  if (timer_thread_) timer_delete(timer_);
  LockGuard guard(accel_.world_mutex_);
  if (accel_.vcpus_[index_] == this) accel_.vcpus_[index_] = nullptr;
  std::erase(accel_.tlbs_, &tlb_);
}

Result<std::vector<EngineStatistic>> SoftVcpu::JitStatistics() const {
  if (!jit_) {
    return Fail(ErrorCode::kUnsupported,
                "JIT information is not there: guest code is interpreted (jit=off)");
  }
  return jit_->Statistics();
}

// ---- from any thread

void SoftVcpu::Request(uint32_t bits) {
  SetRequest(cpu, bits);
  if (sleeping_) {
    LockGuard guard(sleep_mutex_);
    sleep_cond_.NotifyAll();
  }
}

void SoftVcpu::Kick() { Request(request::kKick); }
void SoftVcpu::Nmi() { Request(request::kNmi); }

void SoftVcpu::RequestStartup(uint8_t vector) {
  startup_vector_ = vector;
  Request(request::kSipi);
}

void SoftVcpu::SetPicOutput(bool level) {
  pic_output_ = level;
  if (level) Request(request::kInterrupt);
}

// ---- LapicBus

int64_t SoftVcpu::NowNs() const { return accel_.config().clock->NowNs(); }

void SoftVcpu::ArmTimer(int64_t deadline_ns) {
  // A timer that fires too early is harmless (it is armed again then), so only earlier deadlines
  // need the host.
  if (deadline_ns >= timer_armed_for_ || timer_thread_ == 0) return;
  int64_t host_ns = accel_.config().clock->ToBaseNs(deadline_ns);
  if (host_ns == INT64_MAX) return;
  if (host_ns <= 0) host_ns = 1;
  itimerspec when = {};
  when.it_value.tv_sec = host_ns / 1'000'000'000;
  when.it_value.tv_nsec = host_ns % 1'000'000'000;
  timer_armed_for_ = deadline_ns;
  timer_settime(timer_, TIMER_ABSTIME, &when, nullptr);
}

void SoftVcpu::SendIpi(uint64_t icr, bool x2apic_destination) {
  auto low = static_cast<uint32_t>(icr);
  auto destination = static_cast<uint32_t>(icr >> (x2apic_destination ? 32 : 56));
  // IPIs are edges, whatever the trigger bit says, but for INIT's de-assert.
  uint32_t message =
      (low >> 8 & 7) == static_cast<uint32_t>(DeliveryMode::kInit) ? low & 0xc7ff : low & 0x47ff;
  accel_.Deliver(destination, low >> 11 & 1, x2apic_destination, message, low >> 18 & 3, this);
}

void SoftVcpu::EndOfInterrupt(uint8_t vector) {
  if (AccelHost* host = accel_.config().host) host->BroadcastEoi(vector);
}

CpuidLeaf SoftVcpu::Cpuid(uint32_t leaf, uint32_t subleaf) const {
  CpuidLeaf answer = cpuid_.Lookup(leaf, subleaf);
  if (leaf == 1) {
    answer.ecx &= ~(1u << 27);
    if (cpu.cr4 & cr4::kOsxsave) answer.ecx |= 1u << 27;
    if (!lapic_.enabled()) answer.edx &= ~(1u << 9);
  }
  if (leaf == 0xd && subleaf <= 1 && answer.ebx)
    answer.ebx = cpu.xcr0 & 4 ? sizeof(XsaveArea) : 576;
  return answer;
}

// ---- the loop

void SoftVcpu::PrepareThread() {
  int thread = CurrentThreadId();
  if (thread != timer_thread_) {
    if (timer_thread_) timer_delete(timer_);
    timer_thread_ = 0;
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = TimerSignal();
    event._sigev_un._tid = thread;
    if (timer_create(CLOCK_MONOTONIC, &event, &timer_) == 0) timer_thread_ = thread;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, TimerSignal());
    pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  }
  timer_target = &cpu;
  timer_armed_for_ = INT64_MAX;
  ArmTimer(lapic_.deadline_ns());
}

Vcpu::Exit SoftVcpu::Run() {
  PrepareThread();
  if (timer_thread_ == 0) {
    accel_.config().host->EngineFailed(index_, "the host refuses a timer for the vCPU thread");
    return Exit::kFailed;
  }
  if (jit_) jit_->AttachThread();
  accel_.EnterGuest();
  cpu.fault_exit = &fault_exit_;
  Next next = Next::kGo;
  if (setjmp(fault_exit_) != 0) {
    cpu.pending_dr6 = 0;
    ClearRequest(cpu, request::kDebugTrap | request::kHalt);
    if (log::CategoryEnabled(log::Category::kInt)) {
      KLOG(kInfo, "cpu {}: exception {} error {:#x} at {:#x}:{:#x} cr2 {:#x}", index_,
           cpu.fault.vector, cpu.fault.error, cpu.seg[kCs].selector, cpu.insn_rip, cpu.cr2);
    }
    if (cpu.fault.vector == kUD) LogUndefined(cpu, index_);
    next = x86::Deliver(cpu, RaisedEvent(cpu)) ? Next::kGo : Next::kShutdown;
  } else {
    next = DeliverRestored();
  }
  while (next == Next::kGo) {
    if (__atomic_load_n(&cpu.requests, __ATOMIC_RELAXED)) {
      next = HandleRequests();
    } else if (jit_ && jit::Engine::Supports(cpu)) {
      jit_->Run();
    } else {
      RunBlocks(cpu);
    }
  }
  accel_.LeaveGuest();
  timer_target = nullptr;
  SetTrapEngine(nullptr);
  if (next == Next::kLeave) return Exit::kKicked;
  accel_.config().host->TripleFault(index_);
  return Exit::kTripleFault;
}

// Events that a saved state had under way.
SoftVcpu::Next SoftVcpu::DeliverRestored() {
  PendingEvents& events = cpu.events;
  bool ok = true;
  if (events.exception_pending) {
    events.exception_pending = false;
    ok = x86::Deliver(cpu, {.vector = events.exception_vector,
                            .has_error = events.exception_has_error,
                            .error = events.exception_error});
  } else if (events.nmi_injected) {
    events.nmi_injected = false;
    events.nmi_masked = true;
    ok = x86::Deliver(cpu, {.vector = kNMI, .kind = EventKind::kExternal});
  } else if (events.interrupt_injected) {
    events.interrupt_injected = false;
    ok = x86::Deliver(cpu, {.vector = events.interrupt_vector, .kind = EventKind::kExternal});
  }
  return ok ? Next::kGo : Next::kShutdown;
}

SoftVcpu::Next SoftVcpu::HandleRequests() {
  uint32_t requests = __atomic_load_n(&cpu.requests, __ATOMIC_SEQ_CST);
  Next next = HandleWorld(requests);
  if (next != Next::kGo) return next;
  if (cpu.mp_state == MpState::kUninitialized || cpu.mp_state == MpState::kInitReceived)
    return Sleep();
  if (requests & request::kHalt) {
    ClearRequest(cpu, request::kHalt);
    cpu.mp_state = MpState::kHalted;
  }
  next = HandleEvents(requests);
  if (next != Next::kGo) return next;
  if (cpu.mp_state == MpState::kHalted) return Sleep();
  // Under an interrupt shadow, and while stepping, instructions run one at a time.
  if (__atomic_load_n(&cpu.requests, __ATOMIC_RELAXED) & (request::kShadow | request::kStep))
    return Step();
  return Next::kGo;
}

// What concerns the machine rather than the program.
SoftVcpu::Next SoftVcpu::HandleWorld(uint32_t requests) {
  if (requests & request::kSafepoint) {
    ClearRequest(cpu, request::kSafepoint);
    accel_.Safepoint();
  }
  if (requests & request::kFlushTlb) {
    ClearRequest(cpu, request::kFlushTlb);
    tlb_.View();
    tlb_.FlushAll();
    if (requests & request::kFlushCode) {
      ClearRequest(cpu, request::kFlushCode);
      FlushBlocks(cpu);
      if (jit_) jit_->Flush();
    }
    tlb_.DropRetiredViews();
  }
  if (requests & request::kCodeWritten) {
    ClearRequest(cpu, request::kCodeWritten);
    if (jit_) jit_->CheckPages();
  }
  if (requests & request::kTimer) {
    ClearRequest(cpu, request::kTimer);
    timer_armed_for_ = INT64_MAX;
    lapic_.RunTimer();
  }
  if (requests & request::kInit) {
    ClearRequest(cpu, request::kInit);
    HandleInit();
  }
  if (requests & request::kSipi) {
    ClearRequest(cpu, request::kSipi);
    HandleStartup();
  }
  // Before events are taken notice of: what stays a request is looked at by the next Run.
  if (requests & request::kKick) {
    ClearRequest(cpu, request::kKick);
    return Next::kLeave;
  }
  if (requests & request::kNmi) {
    ClearRequest(cpu, request::kNmi);
    cpu.events.nmi_pending = true;
  }
  return Next::kGo;
}

// Between two instructions, in order of priority (SDM vol. 3 6.9): traps, NMI, interrupts.
SoftVcpu::Next SoftVcpu::HandleEvents(uint32_t requests) {
  PendingEvents& events = cpu.events;
  if (events.interrupt_shadow) {
    if (events.nmi_pending) SetRequest(cpu, request::kNmi);  // look again after the shadow
    return Next::kGo;
  }
  if (requests & request::kDebugTrap) {
    ClearRequest(cpu, request::kDebugTrap);
    uint64_t bits = cpu.pending_dr6;
    cpu.pending_dr6 = 0;
    if (!DeliverDebugTrap(cpu, bits)) return Next::kShutdown;
  }
  if (events.nmi_pending && !events.nmi_masked) {
    events.nmi_pending = false;
    events.nmi_masked = true;
    cpu.mp_state = MpState::kRunnable;
    if (!x86::Deliver(cpu, {.vector = kNMI, .kind = EventKind::kExternal})) return Next::kShutdown;
    return Next::kGo;
  }
  return requests & request::kInterrupt ? Interrupt() : Next::kGo;
}

SoftVcpu::Next SoftVcpu::Interrupt() {
  // Cleared first: what arrives from now on sets it again. With IF clear, setting IF does.
  ClearRequest(cpu, request::kInterrupt);
  cpu.interrupt_waiting = !(cpu.rflags & rflags::kIf);
  if (cpu.interrupt_waiting) return Next::kGo;
  int vector = lapic_.Pending();
  if (vector >= 0) {
    lapic_.Acknowledge(static_cast<uint8_t>(vector));
  } else if (external_interrupt_.exchange(false) || (pic_output_ && lapic_.AcceptsPic())) {
    vector = accel_.config().host->AcknowledgePic();
  } else {
    return Next::kGo;
  }
  SetRequest(cpu, request::kInterrupt);  // perhaps there is another one
  cpu.mp_state = MpState::kRunnable;
  bool ok =
      x86::Deliver(cpu, {.vector = static_cast<uint8_t>(vector), .kind = EventKind::kExternal});
  return ok ? Next::kGo : Next::kShutdown;
}

SoftVcpu::Next SoftVcpu::Sleep() {
  uint32_t shadow = request::kShadow;
  ClearRequest(cpu, shadow);
  cpu.events.interrupt_shadow = 0;
  accel_.LeaveGuest();
  auto awake = [this] {
    return (__atomic_load_n(&cpu.requests, __ATOMIC_SEQ_CST) & kWakeUps) != 0;
  };
  const int64_t deadline = lapic_.deadline_ns();
  const int64_t host_ns =
      deadline == INT64_MAX ? INT64_MAX : accel_.config().clock->ToBaseNs(deadline);
  const Clock& host = MonotonicClock::Instance();
  const int64_t began_ns = host.NowNs();
  const int64_t until_ns = polling_pays_ ? std::min(host_ns, began_ns + polling_ns_) : 0;
  while (!awake() && host.NowNs() < until_ns) __builtin_ia32_pause();
  if (!awake()) {
    LockGuard guard(sleep_mutex_);
    sleeping_ = true;
    if (host_ns == INT64_MAX) {
      sleep_cond_.Wait(guard, awake);
    } else {
      int64_t left = host_ns - host.NowNs();
      if (left <= 0 || !sleep_cond_.WaitFor(guard, left, awake)) SetRequest(cpu, request::kTimer);
    }
    sleeping_ = false;
  }
  polling_pays_ = host.NowNs() - began_ns <= polling_ns_;
  accel_.EnterGuest();
  return Next::kGo;
}

bool SoftVcpu::InstructionBreakpoint(uint64_t* bits) const {
  uint64_t linear =
      cpu.code_mode == CodeMode::k64 ? cpu.rip : (cpu.seg[kCs].base + cpu.rip) & 0xffffffff;
  *bits = 0;
  for (unsigned i = 0; i < 4; i++) {
    if ((cpu.dr[7] >> (2 * i) & 3) && !(cpu.dr[7] >> (16 + 4 * i) & 3) && cpu.dr[i] == linear)
      *bits |= 1ull << i;
  }
  return *bits != 0;
}

SoftVcpu::Next SoftVcpu::Step() {
  uint64_t bits = 0;
  bool resume = cpu.rflags & rflags::kRf;
  if (!resume && (cpu.dr[7] & 0xff) && InstructionBreakpoint(&bits)) {
    cpu.dr[6] = (cpu.dr[6] & ~0xfull) | bits;
    cpu.dr[7] &= ~0x2000ull;
    return x86::Deliver(cpu, {.vector = kDB, .kind = EventKind::kFault}) ? Next::kGo
                                                                         : Next::kShutdown;
  }
  bool trap = cpu.rflags & rflags::kTf;
  if (resume) SetRflags(cpu, cpu.rflags & ~rflags::kRf);
  cpu.events.interrupt_shadow = 0;
  ClearRequest(cpu, request::kShadow);
  cpu.no_trap = false;
  StepInstruction(cpu);
  if (!trap || cpu.no_trap || cpu.events.interrupt_shadow == 1) return Next::kGo;
  bits = dr6::kBs | cpu.pending_dr6;
  cpu.pending_dr6 = 0;
  ClearRequest(cpu, request::kDebugTrap);
  return DeliverDebugTrap(cpu, bits) ? Next::kGo : Next::kShutdown;
}

// ---- RESET, INIT, SIPI

void SoftVcpu::HandleInit() {
  uint64_t cache_bits = cpu.cr0 & (cr0::kCd | cr0::kNw);
  X86State state = ResetState(index_, lapic_.apic_id(), cpuid_.Lookup(1, 0).eax);
  XsaveArea fpu = cpu.fpu;
  uint64_t xcr0 = cpu.xcr0;
  LoadRegisters(state);
  cpu.fpu = fpu;
  cpu.xcr0 = xcr0;
  cpu.cr0 = (cpu.cr0 & ~(cr0::kCd | cr0::kNw)) | cache_bits;
  lapic_.ResetByInit();
  cpu.events = {};
  ClearRequest(cpu, request::kHalt | request::kShadow | request::kDebugTrap);
  cpu.mp_state = index_ == 0 ? MpState::kRunnable : MpState::kInitReceived;
}

void SoftVcpu::HandleStartup() {
  if (cpu.mp_state != MpState::kInitReceived && cpu.mp_state != MpState::kUninitialized) return;
  uint8_t vector = startup_vector_;
  cpu.seg[kCs].selector = static_cast<uint16_t>(vector << 8);
  cpu.seg[kCs].base = static_cast<uint64_t>(vector) << 12;
  cpu.rip = 0;
  cpu.mp_state = MpState::kRunnable;
  UpdateMode(cpu);
}

}  // namespace kvartz::cpu::x86
