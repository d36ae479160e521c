// QMP: what a client sends, to a real machine that stands still.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>

#include "vmm/vm.h"

namespace {

using namespace kvartz;

// A file without a name: what opens it by its path leaves nothing behind.
std::string MemoryFile(const std::string& content) {
  int fd = memfd_create("file", MFD_CLOEXEC);
  if (fd < 0 || write(fd, content.data(), content.size()) != static_cast<ssize_t>(content.size()))
    abort();
  return "/proc/self/fd/" + std::to_string(fd);
}

// An empty directory, which goes away at the end with what was put there.
class WorkingDirectory {
 public:
  WorkingDirectory() {
    if (!mkdtemp(path_) || chdir(path_) != 0) abort();
  }
  ~WorkingDirectory() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  WorkingDirectory(const WorkingDirectory&) = delete;

 private:
  char path_[32] = "/tmp/kvartz-qmp-fuzz-XXXXXX";
};

std::unique_ptr<vmm::Vm> MakeVm() {
  vmm::VmConfig config;
  config.accels = {"kvartz"};
  config.machine.type = "pc";
  config.machine.ram_bytes = 4 << 20;
  static const std::string firmware = MemoryFile(std::string(65536, '\xf4'));  // nothing but HLT
  config.machine.boot.firmware = firmware;
  config.start_paused = true;
  static const std::string image = MemoryFile(std::string(1 << 20, '\0'));  // an empty disk
  block::Options disk;
  disk.Set("driver", "raw");
  disk.Set("node-name", "d");
  disk.Set("file.driver", "file");
  disk.Set("file.filename", image);
  disk.Set("file.locking", "off");
  config.nodes.push_back({"-blockdev d", std::move(disk)});
  config.machine.devices.push_back({"virtio-blk-pci", "vd", {{"drive", "d"}}});
  host::ChardevConfig chardev;
  chardev.id = "qmp";
  chardev.kind = host::ChardevConfig::Kind::kRingbuf;
  config.chardevs.push_back(chardev);
  config.monitors.push_back({"qmp", vmm::MonitorConfig::Mode::kQmp, false});
  auto vm = vmm::Vm::Create(std::move(config));
  if (!vm) abort();
  (*vm)->loop().RunOnce(0);
  return std::move(*vm);
}

}  // namespace

// Between inputs jobs and commands are under way: what their fibers own only their stacks know,
// which are no place where leaks are looked for.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const WorkingDirectory directory;  // where commands that name files find none
  // Not destroyed at the end: the fibers that it closes its disk in are gone by then.
  static auto& vm = *new std::unique_ptr<vmm::Vm>(MakeVm());
  host::Chardev& chardev = *vm->chardevs()[0];
  chardev.RingbufWrite("\n{\"execute\": \"qmp_capabilities\"}\n");
  chardev.RingbufWrite({reinterpret_cast<const char*>(data), size});
  for (int turn = 0; turn < 3; ++turn) vm->loop().RunOnce(0);
  // A client that sent anything gets answers in JSON, each on its line.
  std::string answers = chardev.RingbufRead(65536);
  if (!answers.empty() && !answers.ends_with("\r\n")) __builtin_trap();
  if (vm->exiting()) {
    vm.reset();
    vm = MakeVm();
  }
  return 0;
}
