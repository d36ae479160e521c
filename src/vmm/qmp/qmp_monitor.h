// A QMP session: the machine monitor protocol, one JSON value a command.
#pragma once

#include <boost/json/stream_parser.hpp>
#include <boost/json/value.hpp>
#include <string>
#include <string_view>

#include "vmm/monitor.h"
#include "vmm/vm.h"

namespace kvartz::vmm {

// Loop-owned. Each connection begins anew: greeting, qmp_capabilities, commands.
class QmpMonitor final : public Monitor, private VmObserver {
 public:
  QmpMonitor(Vm& vm, bool pretty);
  ~QmpMonitor() override;

 private:
  // A command longer than this is refused.
  static constexpr size_t kCommandMax = 1 << 20;
  static constexpr unsigned kDepthMax = 64;

  void Receive(std::span<const uint8_t> data) override;
  void CharEventArrived(host::CharEvent event) override;
  void VmEvent(std::string_view name, std::string_view data) override;

  void Begin();
  void Handle(const boost::json::value& request);
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
};

}  // namespace kvartz::vmm
