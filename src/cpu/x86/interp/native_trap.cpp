// Unmasked SIMD exceptions: the stub runs with the guest's masks and the host reports the exception
// as SIGFPE.
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include "cpu/x86/interp/native.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint32_t kMasks = 0x1f80;

// Where the thread's stub under way left off, and the MXCSR it trapped with.
thread_local sigjmp_buf* stub_exit = nullptr;
thread_local volatile uint32_t trapped_mxcsr = 0;

void OnFloatingPointSignal(int signal, siginfo_t* info, void* context) {
  if (!stub_exit) {
    ::signal(signal, SIG_DFL);  // not ours: dies of it when the instruction runs again
    return;
  }
  trapped_mxcsr = static_cast<ucontext_t*>(context)->uc_mcontext.fpregs->mxcsr;
  siglongjmp(*stub_exit, 1);
}

bool InstallHandler() {
  struct sigaction action = {};
  action.sa_sigaction = OnFloatingPointSignal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGFPE, &action, nullptr) == 0;
}

}  // namespace

bool CallWithMxcsr(NativeStub stub, NativeFrame& frame, XsaveArea& fpu) {
  if ((frame.mxcsr & kMasks) == kMasks) [[likely]] {
    stub(&frame, &fpu);
    return true;
  }
  // A process has one handler a signal; it tells by stub_exit whether the signal is the engine's.
  [[maybe_unused]] static const bool installed = InstallHandler();
  sigjmp_buf exit;
  if (sigsetjmp(exit, 0) != 0) {
    stub_exit = nullptr;
    frame.mxcsr = trapped_mxcsr;
    asm volatile("ldmxcsr %0" : : "m"(frame.host_mxcsr));
    return false;
  }
  stub_exit = &exit;
  stub(&frame, &fpu);
  stub_exit = nullptr;
  return true;
}

}  // namespace kvartz::cpu::x86
