// The kernel's KVM interface (Linux Documentation/virt/kvm/api.rst): calls with errors as values,
// and what headers older than the kernel lack.
#pragma once

#include <cstdint>

#include "base/fd.h"
#include "base/result.h"
#include "cpu/kvm/kvm_uapi.h"

namespace kvartz::cpu::kvm {

// An ioctl, repeated while a signal interrupts it. Returns its value, or -errno.
int Ioctl(int fd, unsigned long request, unsigned long argument = 0);
inline int Ioctl(int fd, unsigned long request, const void* argument) {
  return Ioctl(fd, request, reinterpret_cast<unsigned long>(argument));
}

// The same with an error that names the call ("KVM_SET_REGS").
Result<int> Call(int fd, unsigned long request, unsigned long argument, const char* name);
inline Result<int> Call(int fd, unsigned long request, const void* argument, const char* name) {
  return Call(fd, request, reinterpret_cast<unsigned long>(argument), name);
}
#define KVM_CALL(fd, request, argument) \
  ::kvartz::cpu::kvm::Call((fd), (request), (argument), #request)

// The answer of KVM_CHECK_EXTENSION; 0: not there.
int Extension(int fd, unsigned long capability);
// KVM_ENABLE_CAP with one argument.
Result<> Enable(int fd, uint32_t capability, uint64_t argument, const char* name);

// /dev/kvm, read-write. Errors: absent, no permission, an interface of another version; each says
// the remedy.
Result<UniqueFd> OpenDevice();

}  // namespace kvartz::cpu::kvm
