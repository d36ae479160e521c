// The host's ends that devices are connected to, found by the id that the user gave them.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "base/result.h"

namespace kvartz {

class EventLoop;

namespace block {
class Disk;
}
namespace host {
class Chardev;
class NetBackend;
}  // namespace host

// A disk, as the device has it that is connected to it. Outlives the device.
struct DiskPort {
  block::Disk* disk = nullptr;
  std::function<void()> on_resized;  // the device's, or null; called on the disk's loop
};
// What a device asks for with drive= and its like.
struct DiskWish {
  std::string drive;
  std::string device_id;
  std::string iothread;  // empty: the main loop
  bool share_write = false;
  std::string rerror = "auto", werror = "auto";
};

// Main loop only. What is returned outlives every device; null: there is no such thing.
class HostBackends {
 public:
  virtual ~HostBackends() = default;
  // drive=. Errors: there is none, another device has it, it can't be served as wished.
  virtual Result<DiskPort*> ConnectDisk(const DiskWish& wish) = 0;
  virtual host::NetBackend* FindNetdev(const std::string& id) = 0;  // netdev=
  virtual host::Chardev* FindChardev(const std::string& id) = 0;    // chardev=
};

}  // namespace kvartz
