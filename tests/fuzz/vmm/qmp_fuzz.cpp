// QMP: what a client sends, to a real machine that stands still.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "vmm/vm.h"

namespace {

using namespace kvartz;

// An image that is nothing but HLT.
std::string Firmware() {
  char path[] = "/tmp/kvartz-qmp-fuzz-bios-XXXXXX";
  int fd = mkstemp(path);
  std::string image(65536, '\xf4');
  if (fd < 0 || write(fd, image.data(), image.size()) != static_cast<ssize_t>(image.size()))
    abort();
  close(fd);
  return path;
}

// An empty disk.
std::string Image() {
  char path[] = "/tmp/kvartz-qmp-fuzz-disk-XXXXXX";
  int fd = mkstemp(path);
  if (fd < 0 || ftruncate(fd, 1 << 20) != 0) abort();
  close(fd);
  return path;
}

std::unique_ptr<vmm::Vm> MakeVm() {
  vmm::VmConfig config;
  config.accels = {"kvartz"};
  config.machine.type = "pc";
  config.machine.ram_bytes = 4 << 20;
  static const std::string firmware = Firmware();
  config.machine.boot.firmware = firmware;
  config.start_paused = true;
  static const std::string image = Image();
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
  // Commands that name files find an empty directory.
  static const bool elsewhere = [] {
    char directory[] = "/tmp/kvartz-qmp-fuzz-XXXXXX";
    return mkdtemp(directory) && chdir(directory) == 0;
  }();
  if (!elsewhere) abort();
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
