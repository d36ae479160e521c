// -chardev, and the short forms of -serial, -monitor, -qmp and -debugcon.
#include <fmt/core.h>

#include <set>

#include "base/text.h"
#include "vmm/command_line.h"
#include "vmm/keyval.h"

namespace kvartz::vmm {
namespace {

using host::ChardevConfig;
using Kind = ChardevConfig::Kind;

#define COMMON                                                                        \
  PROPERTY(ChardevConfig, "mux", mux, "several users share it"),                      \
      PROPERTY(ChardevConfig, "logfile", logfile, "a copy of the output goes there"), \
      PROPERTY(ChardevConfig, "logappend", logappend, "keep what the log file holds")

constexpr PropertySpec kPlain[] = {COMMON};
constexpr PropertySpec kStdio[] = {
    PROPERTY(ChardevConfig, "signal", signal, "Ctrl-C ends the program"), COMMON};
constexpr PropertySpec kFile[] = {
    PROPERTY(ChardevConfig, "path", path, "file for the output"),
    PROPERTY(ChardevConfig, "append", append, "keep what the file holds"),
    PROPERTY(ChardevConfig, "input-path", input_path, "file that is read"), COMMON};
constexpr PropertySpec kPipe[] = {
    PROPERTY(ChardevConfig, "path", path, "named pipe, or the common part of .in and .out"),
    COMMON};
constexpr PropertySpec kRingbuf[] = {
    PROPERTY(ChardevConfig, "size", size, "bytes that are kept, a power of two"), COMMON};
constexpr PropertySpec kSocket[] = {
    PROPERTY(ChardevConfig, "path", path, "unix socket"),
    PROPERTY(ChardevConfig, "host", host, "TCP: address"),
    PROPERTY(ChardevConfig, "port", port, "TCP: port"),
    PROPERTY(ChardevConfig, "server", server, "listen instead of connecting"),
    PROPERTY(ChardevConfig, "wait", wait, "server: start only when a client has come"),
    PROPERTY(ChardevConfig, "telnet", telnet, "speak telnet"),
    PROPERTY(ChardevConfig, "reconnect", reconnect_s, "client: seconds until the next try"),
    COMMON};
#undef COMMON

struct KindRow {
  const char* name;
  Kind kind;
  std::span<const PropertySpec> properties;
  const char* help;
};
constexpr KindRow kKinds[] = {
    {"file", Kind::kFile, kFile, "output to a file"},
    {"null", Kind::kNull, kPlain, "drops output, has no input"},
    {"pipe", Kind::kPipe, kPipe, "named pipes"},
    {"pty", Kind::kPty, kPlain, "a pseudo terminal, whose path is printed"},
    {"ringbuf", Kind::kRingbuf, kRingbuf, "keeps the last output in memory"},
    {"memory", Kind::kRingbuf, kRingbuf, "the same as ringbuf"},
    {"socket", Kind::kSocket, kSocket, "unix or TCP socket, server or client"},
    {"stdio", Kind::kStdio, kStdio, "the terminal"},
};
constexpr std::string_view kNotYet[] = {
    "vc",   "udp",     "serial",  "parallel", "tty",     "spicevmc", "spiceport", "qemu-vdagent",
    "dbus", "braille", "msmouse", "wctablet", "testdev", "hub",      "websocket"};

Result<const KindRow*> FindKind(std::string_view name) {
  std::vector<std::string_view> names;
  for (const KindRow& row : kKinds) {
    if (name == row.name) return &row;
    names.emplace_back(row.name);
  }
  for (std::string_view known : kNotYet) {
    if (name == known)
      return Fail(ErrorCode::kUnsupported, fmt::format("not supported yet: {}", name));
  }
  std::string_view nearest = NearestName(name, names);
  return Fail(ErrorCode::kInvalid,
              fmt::format("unknown kind '{}'; {}", name,
                          nearest.empty() ? "-chardev help lists the kinds"
                                          : fmt::format("did you mean {}?", nearest)));
}

Result<ChardevConfig> Build(const KindRow& kind, Properties properties, const std::string& id) {
  ChardevConfig config;
  config.kind = kind.kind;
  config.id = id;
  // What every connection does anyway.
  for (const char* given : {"nodelay", "delay", "ipv4", "ipv6", "tight"}) properties.Remove(given);
  config.wait = true;
  TRY(ApplyProperties(kind.properties, properties, kind.name, &config));
  bool tcp = !config.host.empty() || !config.port.empty();
  if (kind.kind == Kind::kSocket) {
    if (tcp == !config.path.empty())
      return Fail(ErrorCode::kInvalid, "a socket needs either path= or host= and port=");
    if (tcp && config.port.empty()) return Fail(ErrorCode::kInvalid, "port= is missing");
    if (!config.server && properties.Find("wait"))
      return Fail(ErrorCode::kInvalid, "wait= is for server=on");
    if (config.server && config.reconnect_s)
      return Fail(ErrorCode::kInvalid, "reconnect= is for clients");
  }
  config.wait = config.wait && config.server;
  if ((kind.kind == Kind::kFile || kind.kind == Kind::kPipe) && config.path.empty()) {
    return Fail(ErrorCode::kInvalid, "path= is missing");
  }
  return config;
}

Result<> AddUnique(CommandLine& line, ChardevConfig chardev) {
  for (const ChardevConfig& other : line.config.chardevs) {
    if (other.id == chardev.id)
      return Fail(ErrorCode::kExists,
                  fmt::format("id={}: another chardev has this id", chardev.id));
  }
  line.config.chardevs.push_back(std::move(chardev));
  return {};
}

ChardevConfig* Find(CommandLine& line, std::string_view id) {
  for (ChardevConfig& chardev : line.config.chardevs) {
    if (chardev.id == id) return &chardev;
  }
  return nullptr;
}

// -device isa-serial without a place gets the first free one.
void GiveSerialIndexes(CommandLine& line) {
  std::set<std::string> taken;
  for (const DeviceSpec& device : line.config.machine.devices) {
    const std::string* index = device.properties.Find("index");
    if (device.driver == "isa-serial" && index) taken.insert(*index);
  }
  for (DeviceSpec& device : line.config.machine.devices) {
    if (device.driver != "isa-serial" || device.properties.Find("index") ||
        device.properties.Find("iobase"))
      continue;
    unsigned free = 0;
    while (taken.contains(std::to_string(free))) ++free;
    device.properties.Set("index", std::to_string(free));
    taken.insert(std::to_string(free));
  }
}

}  // namespace

Result<ChardevConfig> ParseChardev(std::string_view text) {
  Properties properties = TRY(ParseKeyval(text, "backend"));
  std::string kind_name = Take(&properties, "backend"), id = Take(&properties, "id");
  const KindRow* kind = TRY(FindKind(kind_name));
  if (id.empty()) return Fail(ErrorCode::kInvalid, "id= is missing");
  return Build(*kind, std::move(properties), id);
}

Result<ChardevConfig> ParseShortChardev(std::string_view text, const std::string& id,
                                        bool* monitor) {
  *monitor = text.starts_with("mon:");
  if (*monitor) text.remove_prefix(4);
  if (text.starts_with("chardev:")) {
    ChardevConfig reference;
    reference.id = text.substr(8);
    return reference;
  }
  size_t colon = text.find(':');
  std::string_view kind = text.substr(0, colon);
  std::string_view rest = colon == std::string_view::npos ? "" : text.substr(colon + 1);
  Properties properties;
  if (kind == "file" || kind == "pipe") {
    properties.Set("path", std::string(rest));  // commas belong to the name
  } else if (kind == "unix") {
    properties = TRY(ParseKeyval(rest, "path"));
    kind = "socket";
  } else if (kind == "tcp" || kind == "telnet") {
    properties = TRY(ParseKeyval(rest, "address"));
    std::string address = Take(&properties, "address");
    size_t port = address.rfind(':');
    if (port == std::string::npos)
      return Fail(ErrorCode::kInvalid, fmt::format("{}: must be {}:HOST:PORT", text, kind));
    std::string host = address.substr(0, port);
    if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
    properties.Set("host", host);
    properties.Set("port", address.substr(port + 1));
    if (kind == "telnet") properties.Set("telnet", "on");
    kind = "socket";
  } else if (kind.starts_with("/dev/")) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: the host's own serial port {}", kind));
  } else {
    properties = TRY(ParseKeyval(text, "kind"));
    std::string name = Take(&properties, "kind");
    const KindRow* row = TRY(FindKind(name));
    ChardevConfig config = TRY(Build(*row, std::move(properties), id));
    // The monitor wants the keys that would otherwise end the program.
    if (*monitor) config.signal = false;
    config.mux = config.mux || *monitor;
    return config;
  }
  const KindRow* row = TRY(FindKind(kind));
  ChardevConfig config = TRY(Build(*row, std::move(properties), id));
  config.mux = config.mux || *monitor;
  return config;
}

Result<> AddChardev(CommandLine& line, std::string_view argument) {
  if (argument == "help" || argument == "?") {
    line.information = "Character devices:\n";
    for (const KindRow& row : kKinds)
      line.information += fmt::format("{:10} {}\n", row.name, row.help);
    return {};
  }
  return AddUnique(line, TRY(ParseChardev(argument)));
}

Result<> AddMonitor(CommandLine& line, std::string_view text, MonitorConfig::Mode mode,
                    bool pretty) {
  if (text == "none") return {};
  std::string id = fmt::format("compat_monitor{}", line.config.monitors.size());
  bool monitor = false;
  ChardevConfig chardev = TRY(ParseShortChardev(text, id, &monitor));
  if (monitor) return Fail(ErrorCode::kInvalid, "mon: is for serial ports");
  line.config.monitors.push_back({chardev.id, mode, pretty});
  if (text.starts_with("chardev:")) return {};
  return AddUnique(line, std::move(chardev));
}

Result<> AddMon(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "chardev"));
  MonitorConfig monitor;
  monitor.chardev = Take(&properties, "chardev");
  std::string mode = Take(&properties, "mode", "readline");
  if (mode != "readline" && mode != "control")
    return Fail(ErrorCode::kInvalid, fmt::format("mode={}: readline or control", mode));
  monitor.mode = mode == "control" ? MonitorConfig::Mode::kQmp : MonitorConfig::Mode::kHmp;
  monitor.pretty = TRY(TakeBool(&properties, "pretty", false));
  Take(&properties, "id");
  TRY(RefuseRest(properties, "chardev mode pretty id"));
  if (monitor.mode == MonitorConfig::Mode::kHmp) line.monitor_given = true;
  line.config.monitors.push_back(monitor);
  return {};
}

// Serial ports and monitors, with the defaults that depend on each other.
Result<> FinishConsoles(CommandLine& line) {
  bool isa_serial_given = false;
  for (const DeviceSpec& device : line.config.machine.devices)
    isa_serial_given |= device.driver == "isa-serial";
  bool default_serial = line.serials.empty() && !isa_serial_given && !line.no_defaults;
  bool default_monitor = !line.monitor_given && !line.no_defaults;
  if (line.nographic && default_serial && default_monitor) {
    line.serials.emplace_back("mon:stdio");
  } else if (line.nographic) {
    if (default_serial) line.serials.emplace_back("stdio");
    if (default_monitor) {
      bool console_takes_it = false;
      for (const std::string& serial : line.serials)
        console_takes_it |= serial.find("stdio") != std::string::npos;
      if (!console_takes_it) line.monitors.emplace_back("stdio");
    }
  } else if (default_serial) {
    line.serials.emplace_back("null");  // other programs show it in a window
  }
  for (size_t i = 0; i < line.serials.size(); ++i) {
    const std::string& text = line.serials[i];
    if (text == "none") continue;
    bool monitor = false;
    Result<ChardevConfig> chardev = ParseShortChardev(text, fmt::format("serial{}", i), &monitor);
    if (!chardev) return Fail(std::move(chardev).error().In("-serial " + text));
    line.config.machine.devices.push_back(
        {"isa-serial",
         fmt::format("serial{}", i),
         {{"index", fmt::format("{}", i)}, {"chardev", chardev->id}}});
    if (monitor) line.config.monitors.push_back({chardev->id, MonitorConfig::Mode::kHmp, false});
    if (text.find("chardev:") == std::string::npos) TRY(AddUnique(line, std::move(*chardev)));
  }
  for (const std::string& text : line.monitors) {
    Result<> added = AddMonitor(line, text, MonitorConfig::Mode::kHmp, false);
    if (!added) return Fail(std::move(added).error().In("-monitor " + text));
  }
  GiveSerialIndexes(line);
  for (const ChardevConfig& chardev : line.config.chardevs) {
    if (line.config.daemonize && chardev.kind == Kind::kStdio) {
      return Fail(ErrorCode::kInvalid,
                  "-daemonize: there is no terminal in the background; use -display none, and "
                  "-serial and -monitor "
                  "on a file, socket or pty");
    }
  }
  for (const MonitorConfig& monitor : line.config.monitors) {
    if (!Find(line, monitor.chardev)) {
      return Fail(
          ErrorCode::kNotFound,
          fmt::format(
              "monitor on chardev '{0}': there is no such chardev; add -chardev KIND,id={0}",
              monitor.chardev));
    }
  }
  return {};
}

}  // namespace kvartz::vmm
