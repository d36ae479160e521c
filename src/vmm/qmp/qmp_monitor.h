// A QMP session: the machine monitor protocol, one JSON value a command.
#pragma once

#include <boost/json/stream_parser.hpp>
#include <boost/json/value.hpp>
#include <deque>
#include <string>
#include <string_view>

#include "vmm/monitor.h"
#include "vmm/vm.h"

namespace kvartz::vmm {

struct QmpCommand;

// Loop-owned. Each connection begins anew: greeting, qmp_capabilities, commands. A command that
// waits runs in a fiber; those behind it wait for its answer.
class QmpMonitor final : public Monitor, private VmObserver {
 public:
  QmpMonitor(Vm& vm, bool pretty);
  ~QmpMonitor() override;
  bool busy() const override { return busy_; }

 private:
  // A command longer than this is refused.
  static constexpr size_t kCommandMax = 1 << 20;
  static constexpr unsigned kDepthMax = 64;

  // What the client sent, in order.
  struct Item {
    boost::json::value request;
    std::string malformed;  // why there is no request
  };

  size_t CanReceive() override { return busy_ || !items_.empty() ? 0 : Monitor::CanReceive(); }
  void Receive(std::span<const uint8_t> data) override;
  void CharEventArrived(host::CharEvent event) override;
  void VmEvent(std::string_view name, std::string_view data) override;

  void Begin();
  void Take(Item item);
  void HandleItems();
  void Handle(const boost::json::value& request);
  void Execute(std::string_view name, boost::json::object arguments, const boost::json::value* id);
  void Start(const QmpCommand& command, boost::json::object arguments,
             const boost::json::value* id);
  void Negotiate(const boost::json::object& arguments, const boost::json::value* id);
  void Answer(const QmpCommand& command, Result<boost::json::value> result,
              const boost::json::value* id);
  void Reply(boost::json::object answer, const boost::json::value* id);
  void ReplyError(const char* error_class, std::string_view text, const boost::json::value* id);
  void SendValue(const boost::json::value& value);
  void Malformed(std::string_view why);

  Vm& vm_;
  const bool pretty_;
  boost::json::stream_parser parser_;
  size_t command_bytes_ = 0;
  bool skip_line_ = false;  // after a syntax error
  bool negotiated_ = false;
  std::deque<Item> items_;
  bool handling_ = false;
  bool busy_ = false;     // a fiber runs a command
  uint64_t session_ = 0;  // counts connections: answers of an earlier one go nowhere
};

}  // namespace kvartz::vmm
