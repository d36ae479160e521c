#include "cpu/kvm/kvm_api.h"

#include <fcntl.h>
#include <sys/ioctl.h>

#include <cerrno>
#include <string>

namespace kvartz::cpu::kvm {

int Ioctl(int fd, unsigned long request, unsigned long argument) {
  int result;
  do {
    result = ioctl(fd, request, argument);
  } while (result < 0 && errno == EINTR);
  return result < 0 ? -errno : result;
}

Result<int> Call(int fd, unsigned long request, unsigned long argument, const char* name) {
  int result = Ioctl(fd, request, argument);
  if (result < 0) return Fail(ErrnoError(-result, std::string("KVM: ") + name));
  return result;
}

int Extension(int fd, unsigned long capability) {
  int result = Ioctl(fd, KVM_CHECK_EXTENSION, capability);
  return result < 0 ? 0 : result;
}

Result<> Enable(int fd, uint32_t capability, uint64_t argument, const char* name) {
  kvm_enable_cap request{};
  request.cap = capability;
  request.args[0] = argument;
  TRY(Call(fd, KVM_ENABLE_CAP, &request, name));
  return {};
}

Result<UniqueFd> OpenDevice() {
  UniqueFd fd(open("/dev/kvm", O_RDWR | O_CLOEXEC));
  if (!fd) {
    switch (errno) {
      case ENOENT:
      case ENODEV:
      case ENXIO:
        return Fail(ErrorCode::kNotFound,
                    "/dev/kvm is not there: switch virtualisation on in the firmware and load the "
                    "module kvm_intel or kvm_amd");
      case EACCES:
      case EPERM:
        return Fail(ErrorCode::kPermission,
                    "/dev/kvm may not be opened: add the user to the group that owns it (usually "
                    "kvm)");
      default:
        return Fail(ErrnoError(errno, "cannot open /dev/kvm"));
    }
  }
  int version = Ioctl(fd.get(), KVM_GET_API_VERSION);
  if (version != KVM_API_VERSION) {
    return Fail(ErrorCode::kUnsupported, "/dev/kvm speaks version " + std::to_string(version) +
                                             " of its interface, this program version 12");
  }
  return fd;
}

}  // namespace kvartz::cpu::kvm
