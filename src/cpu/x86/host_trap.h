// Exceptions of the host's CPU that are the guest's: SIGFPE and SIGSEGV in translated code and in
// the native vector stubs.
#pragma once

#include <csetjmp>
#include <cstdint>

namespace kvartz::cpu::x86 {

namespace jit {
class Engine;
}

// Once a process, before guest code runs. Signals that are not the engine's go to who had them
// before.
void InstallTrapHandlers();
// Whose translated code the calling thread runs; null: none.
void SetTrapEngine(jit::Engine* engine);
// While `exit` is set, SIGFPE on the calling thread goes there with siglongjmp. Null: not.
void SetTrapExit(sigjmp_buf* exit);
// MXCSR at the SIGFPE that went to the exit last.
uint32_t TrappedMxcsr();

}  // namespace kvartz::cpu::x86
