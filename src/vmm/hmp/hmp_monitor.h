// The human monitor on a chardev: a prompt, a line editor with a history.
#pragma once

#include <string>
#include <vector>

#include "vmm/hmp/hmp_commands.h"
#include "vmm/monitor.h"

namespace kvartz::vmm {

// Loop-owned.
class HmpMonitor final : public Monitor {
 public:
  explicit HmpMonitor(Vm& vm) : context_{vm} {}
  bool busy() const override { return busy_; }

 private:
  static constexpr size_t kLineMax = 4096;
  static constexpr size_t kHistoryMax = 64;

  size_t CanReceive() override { return busy_ || !keys_.empty() ? 0 : Monitor::CanReceive(); }
  void Receive(std::span<const uint8_t> data) override;
  void HandleKeys();
  void CharEventArrived(host::CharEvent event) override;

  void Key(uint8_t key);
  void EscapeKey(uint8_t key);
  void Enter();
  void Print(const std::string& text);
  void Replace(const std::string& line);
  void Prompt();

  HmpContext context_;
  std::string line_;
  std::vector<std::string> history_;
  size_t history_at_ = 0;
  enum class Escape { kNone, kEsc, kCsi } escape_ = Escape::kNone;
  bool last_was_return_ = false;
  std::string keys_;  // typed, not yet handled
  bool handling_ = false;
  bool busy_ = false;  // a fiber runs a command
};

}  // namespace kvartz::vmm
