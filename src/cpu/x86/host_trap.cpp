#include "cpu/x86/host_trap.h"

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include "cpu/x86/jit/engine.h"

namespace kvartz::cpu::x86 {
namespace {

thread_local jit::Engine* trap_engine = nullptr;
thread_local sigjmp_buf* trap_exit = nullptr;
thread_local volatile uint32_t trapped_mxcsr = 0;

// Who had the signals before; written once, before the handlers are in place.
struct sigaction former_fpe, former_segv;

void OnSignal(int signal, siginfo_t* info, void* context) {
  if (trap_engine != nullptr && trap_engine->OnTrap(context)) return;
  if (signal == SIGFPE && trap_exit != nullptr) {
    trapped_mxcsr = static_cast<ucontext_t*>(context)->uc_mcontext.fpregs->mxcsr;
    siglongjmp(*trap_exit, 1);
  }
  // Not ours: the instruction runs again under the former handler.
  sigaction(signal, signal == SIGFPE ? &former_fpe : &former_segv, nullptr);
}

bool Install() {
  struct sigaction action = {};
  action.sa_sigaction = OnSignal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  return sigaction(SIGFPE, &action, &former_fpe) == 0 &&
         sigaction(SIGSEGV, &action, &former_segv) == 0;
}

}  // namespace

void InstallTrapHandlers() {
  // A process has one handler a signal; it tells by its thread whose the signal is.
  [[maybe_unused]] static const bool installed = Install();
}

void SetTrapEngine(jit::Engine* engine) { trap_engine = engine; }
void SetTrapExit(sigjmp_buf* exit) { trap_exit = exit; }
uint32_t TrappedMxcsr() { return trapped_mxcsr; }

}  // namespace kvartz::cpu::x86
