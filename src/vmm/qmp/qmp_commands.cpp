#include "vmm/qmp/qmp_commands.h"

#include <fmt/core.h>

#include <boost/json/array.hpp>
#include <boost/json/object.hpp>

#include "device/virtio/virtio_balloon.h"
#include "vmm/hmp/hmp_commands.h"
#include "vmm/hmp/hmp_inspect.h"
#include "vmm/qmp/block_commands.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using Value = Result<json::value>;

constexpr std::span<const QmpMember> kNone;

// After the answer, as clients expect: what follows may end the connection.
template <typename Action>
Value Later(Vm& vm, Action action) {
  vm.Later(action);
  return Done();
}

// ---- the machine's life ----

Value QueryStatus(Vm& vm, const json::object&) {
  return json::object{
      {"status", RunStateName(vm.state())}, {"singlestep", false}, {"running", vm.running()}};
}
Value Stop(Vm& vm, const json::object&) {
  vm.Stop();
  return Done();
}
Value Cont(Vm& vm, const json::object&) {
  TRY(vm.Continue());
  return Done();
}
Value Quit(Vm& vm, const json::object&) {
  return Later(vm, [](Vm& later) { later.Quit(Cause::kHostQmpQuit); });
}
Value SystemReset(Vm& vm, const json::object&) {
  return Later(vm, [](Vm& later) { (void)later.SystemReset(Cause::kHostQmpSystemReset); });
}
Value SystemPowerdown(Vm& vm, const json::object&) {
  return Later(vm, [](Vm& later) { later.PowerDown(); });
}
Value InjectNmi(Vm& vm, const json::object&) {
  vm.board().InjectNmi();
  return Done();
}
constexpr QmpMember kSaveArguments[] = {{"filename", kQmpString}};
Value SaveState(Vm& vm, const json::object& arguments) {
  TRY(vm.Save(Text(arguments, "filename")));
  return Done();
}

// ---- what it is ----

Value QueryVersion(Vm&, const json::object&) { return QmpVersion(); }

Value QueryName(Vm& vm, const json::object&) {
  json::object name;
  if (!vm.config().machine.name.empty()) name["name"] = vm.config().machine.name;
  return name;
}

Value QueryUuid(Vm& vm, const json::object&) {
  std::array<uint8_t, 16> uuid = vm.config().machine.uuid.value_or(std::array<uint8_t, 16>{});
  std::string text;
  for (size_t i = 0; i < uuid.size(); ++i) {
    text += fmt::format("{}{:02x}", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", uuid[i]);
  }
  return json::object{{"UUID", text}};
}

Value QueryKvm(Vm& vm, const json::object&) {
  cpu::KvmFitness::Verdict verdict = cpu::ProbeKvm().verdict;
  return json::object{{"enabled", vm.engine_name() == "kvm"},
                      {"present", verdict != cpu::KvmFitness::Verdict::kAbsent}};
}

Value QueryTarget(Vm&, const json::object&) { return json::object{{"arch", "x86_64"}}; }

Value QueryMemorySize(Vm& vm, const json::object&) {
  return json::object{{"base-memory", vm.config().machine.ram_bytes}};
}

Value QueryCpusFast(Vm& vm, const json::object&) {
  const cpu::CpuTopology& topology = vm.config().machine.topology;
  json::array cpus;
  for (unsigned i = 0; i < vm.board().vcpu_count(); ++i) {
    unsigned threads = topology.threads, cores = topology.cores * topology.dies;
    json::object place{{"core-id", i / threads % cores},
                       {"thread-id", i % threads},
                       {"socket-id", i / (threads * cores)}};
    cpus.push_back(json::object{{"thread-id", vm.vcpus().thread_id(i)},
                                {"props", std::move(place)},
                                {"qom-path", fmt::format("/machine/unattached/device[{}]", i)},
                                {"cpu-index", i},
                                {"target", "x86_64"}});
  }
  return cpus;
}

Value QueryMachines(Vm&, const json::object&) {
  json::array machines;
  for (const machine::MachineType& type : machine::MachineTypes()) {
    json::object row{{"name", type.name},
                     {"numa-mem-supported", false},
                     {"cpu-max", 255},
                     {"hotpluggable-cpus", false},
                     {"deprecated", false}};
    if (!type.alias.empty()) row["alias"] = type.alias;
    machines.push_back(std::move(row));
  }
  return machines;
}

Value QueryChardev(Vm& vm, const json::object&) {
  json::array chardevs;
  for (const auto& chardev : vm.chardevs()) {
    chardevs.push_back(json::object{
        {"frontend-open", true}, {"filename", chardev->description()}, {"label", chardev->id()}});
  }
  return chardevs;
}

// ---- talking to parts of it ----

Result<host::Chardev*> FindChardev(Vm& vm, const std::string& id) {
  for (const auto& chardev : vm.chardevs()) {
    if (chardev->id() == id) return chardev.get();
  }
  return Fail(ErrorCode::kNotFound, fmt::format("there is no chardev '{}'", id));
}

constexpr QmpMember kRingbufReadArguments[] = {
    {"device", kQmpString}, {"size", kQmpInt}, {"format", kQmpString, kOptional}};
constexpr QmpMember kRingbufWriteArguments[] = {
    {"device", kQmpString}, {"data", kQmpString}, {"format", kQmpString, kOptional}};

Result<host::Chardev*> FindRingbuf(Vm& vm, const json::object& arguments) {
  host::Chardev* chardev = TRY(FindChardev(vm, Text(arguments, "device")));
  if (chardev->config().kind != host::ChardevConfig::Kind::kRingbuf) {
    return Fail(ErrorCode::kInvalid, fmt::format("chardev '{}' is no ringbuf", chardev->id()));
  }
  if (arguments.contains("format") && Text(arguments, "format") != "utf8") {
    return Fail(ErrorCode::kUnsupported, "not supported yet: format other than utf8");
  }
  return chardev;
}

Value RingbufRead(Vm& vm, const json::object& arguments) {
  host::Chardev* chardev = TRY(FindRingbuf(vm, arguments));
  int64_t size = arguments.at("size").as_int64();
  if (size <= 0) return Fail(ErrorCode::kInvalid, "size must be positive");
  std::string text = chardev->RingbufRead(static_cast<size_t>(size));
  // JSON carries text only: what isn't ASCII can't be told from damaged UTF-8 here.
  for (char& c : text) {
    if (static_cast<unsigned char>(c) >= 0x80) c = '?';
  }
  return json::value(json::string(text));
}

Value RingbufWrite(Vm& vm, const json::object& arguments) {
  host::Chardev* chardev = TRY(FindRingbuf(vm, arguments));
  chardev->RingbufWrite(Text(arguments, "data"));
  return Done();
}

constexpr QmpMember kBreakArguments[] = {{"id", kQmpString}};
Value SendBreak(Vm& vm, const json::object& arguments) {
  host::Chardev* chardev = TRY(FindChardev(vm, Text(arguments, "id")));
  chardev->Break();
  return Done();
}

constexpr QmpMember kBalloonArguments[] = {{"value", kQmpInt}};
Value SetBalloon(Vm& vm, const json::object& arguments) {
  VirtioBalloon* balloon = TRY(vm.FindBalloon());
  int64_t value = arguments.at("value").as_int64();
  if (value <= 0) return Fail(ErrorCode::kInvalid, "value must be a size in bytes");
  balloon->SetTarget(static_cast<uint64_t>(value));
  return Done();
}
Value QueryBalloon(Vm& vm, const json::object&) {
  VirtioBalloon* balloon = TRY(vm.FindBalloon());
  return json::object{{"actual", balloon->GuestBytes()}};
}

constexpr QmpMember kHmpArguments[] = {{"command-line", kQmpString},
                                       {"cpu-index", kQmpInt, kOptional}};
Value HumanMonitorCommand(Vm& vm, const json::object& arguments) {
  const json::value* cpu = arguments.if_contains("cpu-index");
  if (cpu && (cpu->as_int64() < 0 || cpu->as_int64() >= vm.board().vcpu_count())) {
    return Fail(ErrorCode::kInvalid, "cpu-index: there is no such CPU");
  }
  HmpContext context{vm, cpu ? static_cast<unsigned>(cpu->as_int64()) : 0};
  return json::value(json::string(RunHmpCommand(context, Text(arguments, "command-line"))));
}

Value QueryJit(Vm& vm, const json::object&) {
  return json::object{{"human-readable-text", TRY(JitText(vm))}};
}

Value QueryCommands(Vm&, const json::object&) {
  json::array names{json::object{{"name", "qmp_capabilities"}}};
  for (std::span<const QmpCommand> table : QmpCommandTables()) {
    for (const QmpCommand& command : table) names.push_back(json::object{{"name", command.name}});
  }
  return names;
}

constexpr QmpCommand kCommands[] = {
    {"balloon", kBalloonArguments, SetBalloon},
    {"chardev-send-break", kBreakArguments, SendBreak},
    {"cont", kNone, Cont},
    {"human-monitor-command", kHmpArguments, HumanMonitorCommand, QmpCommand::Where::kFiber},
    {"inject-nmi", kNone, InjectNmi},
    {"query-balloon", kNone, QueryBalloon},
    {"query-chardev", kNone, QueryChardev},
    {"query-commands", kNone, QueryCommands},
    {"query-cpus-fast", kNone, QueryCpusFast},
    {"query-kvm", kNone, QueryKvm},
    {"query-machines", kNone, QueryMachines},
    {"query-memory-size-summary", kNone, QueryMemorySize},
    {"query-name", kNone, QueryName},
    {"query-status", kNone, QueryStatus},
    {"query-target", kNone, QueryTarget},
    {"query-uuid", kNone, QueryUuid},
    {"query-version", kNone, QueryVersion},
    {"quit", kNone, Quit},
    {"ringbuf-read", kRingbufReadArguments, RingbufRead},
    {"ringbuf-write", kRingbufWriteArguments, RingbufWrite},
    {"stop", kNone, Stop},
    {"system_powerdown", kNone, SystemPowerdown},
    {"system_reset", kNone, SystemReset},
    {"x-kvartz-save-state", kSaveArguments, SaveState},
    {"x-query-jit", kNone, QueryJit},
};

}  // namespace

std::span<const std::span<const QmpCommand>> QmpCommandTables() {
  static const std::span<const QmpCommand> tables[] = {kCommands,
                                                       BlockNodeCommands(),
                                                       BlockJobCommands(),
                                                       JobControlCommands(),
                                                       BlockBitmapCommands(),
                                                       BlockExportCommands(),
                                                       BlockQueryCommands(),
                                                       TransactionCommands()};
  return tables;
}

const QmpCommand* FindQmpCommand(std::string_view name) {
  for (std::span<const QmpCommand> table : QmpCommandTables()) {
    for (const QmpCommand& command : table) {
      if (name == command.name) return &command;
    }
  }
  return nullptr;
}

json::object QmpVersion() {
  return {{"qemu", json::object{{"micro", 0}, {"minor", 2}, {"major", 7}}},
          {"package", "kvartz-vmm 0.1.0"}};
}

}  // namespace kvartz::vmm
