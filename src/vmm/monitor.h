// What the two kinds of monitor have in common: a chardev's port with an unbounded but watched
// output.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "host/chardev/chardev.h"

namespace kvartz::vmm {

// Loop-owned.
class Monitor : public host::CharUser {
 public:
  ~Monitor() override = default;

  Result<> ConnectTo(host::Chardev& chardev) {
    port_ = TRY(chardev.Connect(*this));
    return {};
  }
  // A command waits in a fiber.
  virtual bool busy() const { return false; }

 protected:
  // More than this waiting to be read by the client: no further command is taken.
  static constexpr size_t kOutputHigh = 65536;
  // A client that reads nothing loses events beyond this.
  static constexpr size_t kOutputMax = 16 << 20;

  void Send(std::string_view text) {
    output_ += text;
    Flush();
  }
  bool backlogged() const { return output_.size() > kOutputHigh; }
  bool flooded() const { return output_.size() > kOutputMax; }
  void DropOutput() { output_.clear(); }
  host::Chardev::Port& port() { return *port_; }

  size_t CanReceive() override { return backlogged() ? 0 : 4096; }
  void CharWritable() override { Flush(); }

 private:
  void Flush() {
    bool was = backlogged();
    output_.erase(0, port_->Write(output_));
    if (was && !backlogged()) port_->AcceptInput();
  }

  std::string output_;
  std::unique_ptr<host::Chardev::Port> port_;
};

}  // namespace kvartz::vmm
