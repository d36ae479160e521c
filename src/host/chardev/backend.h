// What a kind of chardev implements: the host's end.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "base/event_loop.h"
#include "base/fd.h"
#include "base/result.h"

namespace kvartz::host {

class Chardev;
struct ChardevConfig;

// Loop-owned by its Chardev, which it tells of input and of connections (Input, SetOpen) from its
// loop callbacks only.
class CharBackend {
 public:
  virtual ~CharBackend() = default;
  // Called once, when the chardev is ready for input and events.
  virtual void Start() = 0;
  // Writes what the host takes without waiting and returns how much. After less than everything it
  // calls Chardev::Writable when there is room.
  virtual size_t Write(std::span<const uint8_t> data) = 0;
  // The users take input again (or not): rearm the input.
  virtual void InputRoomChanged() {}
  virtual void Disconnect() {}
  virtual std::string Describe() const = 0;
  // The descriptor to wait for with poll(POLLOUT) at the end of the process; -1: nothing to wait
  // for.
  virtual int output_fd() const { return -1; }
};

Result<std::unique_ptr<CharBackend>> MakeNullBackend(Chardev& chardev);
Result<std::unique_ptr<CharBackend>> MakeStdioBackend(Chardev& chardev, EventLoop& loop);
Result<std::unique_ptr<CharBackend>> MakeFileBackend(Chardev& chardev, EventLoop& loop);
Result<std::unique_ptr<CharBackend>> MakePipeBackend(Chardev& chardev, EventLoop& loop);
Result<std::unique_ptr<CharBackend>> MakePtyBackend(Chardev& chardev, EventLoop& loop);
Result<std::unique_ptr<CharBackend>> MakeSocketBackend(Chardev& chardev, EventLoop& loop);

}  // namespace kvartz::host
