#include "cpu/x86/oracle/native_cpu.h"

#include <immintrin.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/ucontext.h>

#include <cstdio>
#include <cstdlib>

#include "base/check.h"
#include "cpu/x86/host_modes.h"

namespace kvartz::cpu::x86::oracle {
namespace {

// What the entry code needs, at a fixed place known to it.
struct Context {
  uint64_t gpr[16];   // loaded on entry
  uint64_t frame[5];  // RIP, CS, RFLAGS, RSP, SS for IRETQ
  uint64_t host_rsp;
  uint64_t gs_base;
  alignas(64) XsaveArea fpu;
};
Context context;
Outcome outcome;

extern "C" void OracleEnter(Context* context);
extern "C" char OracleResume[];

}  // namespace
}  // namespace kvartz::cpu::x86::oracle

// rdi: Context. Saves what the caller owns, loads the guest's registers and goes there with IRETQ;
// the signal handler comes back to OracleResume with rsp as it was.
asm(R"(
.globl OracleEnter
.globl OracleResume
OracleEnter:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, 168(%rdi)
  movq 176(%rdi), %rax
  wrgsbase %rax
  movl $0x2b, %eax
  movl %eax, %ds
  movl %eax, %es
  movl $7, %eax
  xorl %edx, %edx
  xrstor64 192(%rdi)
  leaq 128(%rdi), %rsp
  movq 0(%rdi), %rax
  movq 8(%rdi), %rcx
  movq 16(%rdi), %rdx
  movq 24(%rdi), %rbx
  movq 40(%rdi), %rbp
  movq 48(%rdi), %rsi
  movq 64(%rdi), %r8
  movq 72(%rdi), %r9
  movq 80(%rdi), %r10
  movq 88(%rdi), %r11
  movq 96(%rdi), %r12
  movq 104(%rdi), %r13
  movq 112(%rdi), %r14
  movq 120(%rdi), %r15
  movq 56(%rdi), %rdi
  iretq
OracleResume:
  cld
  fninit
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
)");

namespace kvartz::cpu::x86::oracle {
namespace {

static_assert(offsetof(Context, frame) == 128 && offsetof(Context, host_rsp) == 168 &&
              offsetof(Context, gs_base) == 176 && offsetof(Context, fpu) == 192);

constexpr int kGreg[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// The vector state that the kernel saved in the signal frame, components in their initial state
// filled in.
void TakeFpu(const ucontext_t& uc, XsaveArea* fpu) {
  const auto* saved = reinterpret_cast<const uint8_t*>(uc.uc_mcontext.fpregs);
  std::memcpy(static_cast<void*>(fpu), saved, 512);
  uint64_t xstate_bv;
  std::memcpy(&xstate_bv, saved + 512, 8);
  if (!(xstate_bv & 1)) {
    const XsaveArea init;
    std::memcpy(static_cast<void*>(fpu), &init, 24);
    std::memset(fpu->st, 0, sizeof(fpu->st));
  }
  if (!(xstate_bv & 2)) std::memset(fpu->xmm, 0, sizeof(fpu->xmm));
  if (xstate_bv & 4) {
    std::memcpy(fpu->ymm_high, saved + 576, sizeof(fpu->ymm_high));
  } else {
    std::memset(fpu->ymm_high, 0, sizeof(fpu->ymm_high));
  }
}

void Handler(int signal, siginfo_t* info, void* raw) {
  auto& uc = *static_cast<ucontext_t*>(raw);
  greg_t* regs = uc.uc_mcontext.gregs;
  const auto rip = static_cast<uint64_t>(regs[REG_RIP]);
  const bool from_case = context.host_rsp != 0;
  if (!from_case) {
    fprintf(stderr, "signal %d outside a case at %#lx (address %p)\n", signal, rip, info->si_addr);
    _exit(99);
  }
  for (unsigned i = 0; i < 16; ++i)
    outcome.registers.gpr[i] = static_cast<uint64_t>(regs[kGreg[i]]);
  outcome.registers.rip = rip;
  outcome.registers.rflags = static_cast<uint64_t>(regs[REG_EFL]);
  outcome.fault = static_cast<unsigned>(regs[REG_TRAPNO]);
  outcome.error = static_cast<uint32_t>(regs[REG_ERR]);
  outcome.fault_address = static_cast<uint64_t>(regs[REG_CR2]);
  TakeFpu(uc, &outcome.registers.fpu);

  regs[REG_RIP] = reinterpret_cast<greg_t>(OracleResume);
  regs[REG_RSP] = static_cast<greg_t>(context.host_rsp);
  regs[REG_EFL] = 0x202;
  regs[REG_CSGSFS] = (regs[REG_CSGSFS] & ~0xffffll) | 0x33;
  // The case's MXCSR and x87 state must not stay behind.
  uc.uc_mcontext.fpregs->mxcsr = 0x1f80;
  uc.uc_mcontext.fpregs->swd = 0;
  context.host_rsp = 0;
}

constexpr int kSignals[] = {SIGBUS, SIGILL, SIGTRAP};

struct sigaction OurAction() {
  struct sigaction action = {};
  action.sa_sigaction = Handler;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  return action;
}

}  // namespace

NativeCpu::NativeCpu() {
  const auto map = [](uint64_t address, uint64_t size, int protection) {
    void* got = mmap(reinterpret_cast<void*>(address), size, protection,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    VERIFY(got == reinterpret_cast<void*>(address));
  };
  map(kCode, kCodeSize, PROT_READ | PROT_WRITE | PROT_EXEC);
  map(kData, kDataSize, PROT_READ | PROT_WRITE);
  std::memset(reinterpret_cast<void*>(kCode), 0xcc, kCodeSize);
  mprotect(reinterpret_cast<void*>(kData + kDataWritable), kDataReadOnly, PROT_READ);
  static uint8_t stack[65536];
  stack_t alternate = {};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof(stack);
  sigaltstack(&alternate, nullptr);
  const struct sigaction action = OurAction();
  for (int signal : kSignals) sigaction(signal, &action, nullptr);
}

NativeCpu::~NativeCpu() {
  for (int signal : kSignals) ::signal(signal, SIG_DFL);
  munmap(reinterpret_cast<void*>(kCode), kCodeSize);
  munmap(reinterpret_cast<void*>(kData), kDataSize);
}

void NativeCpu::SetCode(uint64_t address, std::span<const uint8_t> code) {
  std::memset(reinterpret_cast<void*>(last_code_), 0xcc, last_code_size_);
  std::memcpy(reinterpret_cast<void*>(address), code.data(), code.size());
  last_code_ = address;
  last_code_size_ = code.size();
}

void NativeCpu::SetData(const uint8_t* bytes) {
  std::memcpy(data(), bytes, kDataWritable);
  if (std::memcmp(data() + kDataWritable, bytes + kDataWritable, kDataReadOnly) != 0) {
    mprotect(data() + kDataWritable, kDataReadOnly, PROT_READ | PROT_WRITE);
    std::memcpy(data() + kDataWritable, bytes + kDataWritable, kDataReadOnly);
    mprotect(data() + kDataWritable, kDataReadOnly, PROT_READ);
  }
}

Outcome NativeCpu::Run(const Registers& registers, Mode mode) {
  std::memcpy(context.gpr, registers.gpr.data(), sizeof(context.gpr));
  context.frame[0] = registers.rip;
  context.frame[1] = mode == Mode::k64 ? 0x33 : kUser32Cs;
  context.frame[2] = registers.rflags;
  context.frame[3] = registers.gpr[kRsp];
  context.frame[4] = 0x2b;
  context.gs_base = kGsBase;
  context.fpu = registers.fpu;
  context.fpu.xstate_bv = 7;
  context.fpu.xcomp_bv = 0;
  // These belong to the engine when no case runs.
  const struct sigaction action = OurAction();
  struct sigaction engine_fpe, engine_segv;
  sigaction(SIGFPE, &action, &engine_fpe);
  sigaction(SIGSEGV, &action, &engine_segv);
  OracleEnter(&context);
  sigaction(SIGFPE, &engine_fpe, nullptr);
  sigaction(SIGSEGV, &engine_segv, nullptr);
  _mm_setcsr(0x1f80);
  // A trap is the expected end.
  if (outcome.fault == kDB) {
    outcome.fault = kNoFault;
  } else if (outcome.fault == kBP) {
    outcome.fault = kNoFault;
    outcome.registers.rip -= 1;
  }
  if (outcome.fault != kPF) outcome.fault_address = 0;
  return outcome;
}

}  // namespace kvartz::cpu::x86::oracle
