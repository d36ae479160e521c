// The host's ends that devices are connected to, found by the id that the user gave them.
#pragma once

#include <memory>
#include <string>

namespace kvartz {

class EventLoop;

namespace block {
class Node;
}
namespace host {
class Chardev;
class NetBackend;
}  // namespace host

// Main loop only. What is returned outlives every device; null: there is no such thing.
class HostBackends {
 public:
  virtual ~HostBackends() = default;
  virtual block::Node* FindDrive(const std::string& id) = 0;        // drive=
  virtual host::NetBackend* FindNetdev(const std::string& id) = 0;  // netdev=
  virtual host::Chardev* FindChardev(const std::string& id) = 0;    // chardev=
  virtual EventLoop* FindIoThread(const std::string& id) = 0;       // iothread=
};

}  // namespace kvartz
