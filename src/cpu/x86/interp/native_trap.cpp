// Unmasked SIMD exceptions: the stub runs with the guest's masks and the host reports the exception
// as SIGFPE.
#include <setjmp.h>

#include "cpu/x86/host_trap.h"
#include "cpu/x86/interp/native.h"

namespace kvartz::cpu::x86 {

bool CallWithMxcsr(NativeStub stub, NativeFrame& frame, XsaveArea& fpu) {
  constexpr uint32_t kMasks = 0x1f80;
  if ((frame.mxcsr & kMasks) == kMasks) [[likely]] {
    stub(&frame, &fpu);
    return true;
  }
  InstallTrapHandlers();
  sigjmp_buf exit;
  if (sigsetjmp(exit, 0) != 0) {
    SetTrapExit(nullptr);
    frame.mxcsr = TrappedMxcsr();
    asm volatile("ldmxcsr %0" : : "m"(frame.host_mxcsr));
    return false;
  }
  SetTrapExit(&exit);
  stub(&frame, &fpu);
  SetTrapExit(nullptr);
  return true;
}

}  // namespace kvartz::cpu::x86
