#include "vmm/hmp/hmp_commands.h"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <vector>

#include "base/fiber.h"
#include "base/text.h"
#include "device/virtio/virtio_balloon.h"
#include "host/net/net_backend.h"
#include "vmm/command_line.h"
#include "vmm/hmp/hmp_block.h"
#include "vmm/hmp/hmp_inspect.h"
#include "vmm/keyval.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

std::string Done(const Result<>& result) {
  return result ? "" : "Error: " + result.error().what + "\n";
}

std::string_view NextWord(std::string_view* text) {
  text->remove_prefix(std::min(text->find_first_not_of(" \t\r\n"), text->size()));
  std::string_view word = text->substr(0, text->find_first_of(" \t\r\n"));
  text->remove_prefix(word.size());
  return word;
}

using Tables = std::span<const std::span<const HmpCommand>>;

const HmpCommand* Find(Tables tables, std::string_view name) {
  for (std::span<const HmpCommand> table : tables) {
    for (const HmpCommand& command : table) {
      if (name == command.name || (command.alias && name == command.alias)) return &command;
    }
  }
  return nullptr;
}

// All rows by name.
std::vector<const HmpCommand*> Sorted(Tables tables) {
  std::vector<const HmpCommand*> rows;
  for (std::span<const HmpCommand> table : tables) {
    for (const HmpCommand& command : table) rows.push_back(&command);
  }
  std::ranges::sort(rows, {}, [](const HmpCommand* row) { return std::string_view(row->name); });
  return rows;
}

std::string Unknown(Tables tables, std::string_view name, std::string_view help) {
  std::vector<std::string_view> names;
  for (const HmpCommand* command : Sorted(tables)) names.emplace_back(command->name);
  std::string_view nearest = NearestName(name, names);
  return fmt::format("unknown command: '{}'; {}\n", name,
                     nearest.empty() ? fmt::format("'{}' lists the commands", help)
                                     : fmt::format("did you mean '{}'?", nearest));
}

std::string List(Tables tables, std::string_view prefix) {
  std::string text;
  for (const HmpCommand* command : Sorted(tables)) {
    std::string names =
        command->alias ? fmt::format("{}|{}", command->name, command->alias) : command->name;
    std::string left = fmt::format("{}{} {}", prefix, names, command->arguments);
    text += fmt::format("{:32} {}\n", left, command->help);
  }
  return text;
}

std::string Run(const HmpCommand& command, HmpContext& context, std::string_view arguments) {
  if (command.where == HmpCommand::Where::kFiber) return command.run(context, arguments);
  std::string text;
  RunOutsideFibers([&] { text = command.run(context, arguments); });
  return text;
}

// ---- info ----

std::string InfoStatus(HmpContext& context, std::string_view) {
  RunState state = context.vm.state();
  if (state == RunState::kRunning) return "VM status: running\n";
  if (state == RunState::kPaused) return "VM status: paused\n";
  return fmt::format("VM status: paused ({})\n", RunStateName(state));
}
std::string InfoVersion(HmpContext&, std::string_view) { return VersionText(); }
std::string InfoName(HmpContext& context, std::string_view) {
  const std::string& name = context.vm.config().machine.name;
  return name.empty() ? "" : name + "\n";
}
std::string InfoEngine(HmpContext& context, std::string_view) {
  return context.vm.engine_reason() + "\n";
}
std::string InfoKvm(HmpContext& context, std::string_view) {
  return fmt::format("kvm support: {}\n",
                     context.vm.engine_name() == "kvm" ? "enabled" : "disabled");
}
std::string InfoCpus(HmpContext& context, std::string_view) {
  std::string text;
  for (unsigned i = 0; i < context.vm.board().vcpu_count(); ++i) {
    text += fmt::format("{} CPU #{}: thread_id={}\n", i == context.cpu ? '*' : ' ', i,
                        context.vm.vcpus().thread_id(i));
  }
  return text;
}
std::string InfoChardev(HmpContext& context, std::string_view) {
  std::string text;
  for (const auto& chardev : context.vm.chardevs())
    text += fmt::format("{}: filename={}\n", chardev->id(), chardev->description());
  return text;
}
std::string InfoNetwork(HmpContext& context, std::string_view) {
  std::string text;
  for (const auto& [id, backend] : context.vm.netdevs())
    text += fmt::format("{}: {}\n", id, backend->Describe());
  return text;
}
std::string InfoQtree(HmpContext& context, std::string_view) {
  std::string text;
  context.vm.board().ForEachDevice([&](kvartz::Device& device) { text += device.id() + "\n"; });
  return text;
}

std::string InfoBalloon(HmpContext& context, std::string_view) {
  Result<VirtioBalloon*> balloon = context.vm.FindBalloon();
  if (!balloon) return "Error: " + balloon.error().what + "\n";
  return fmt::format("balloon: actual={}\n", (*balloon)->GuestBytes() >> 20);
}

constexpr HmpCommand kInfos[] = {
    {"accelerators", "engine", "", "which engine runs the machine, and why", InfoEngine},
    {"balloon", nullptr, "", "the guest's memory less what the balloon holds, in MiB", InfoBalloon},
    {"chardev", nullptr, "", "character devices", InfoChardev},
    {"cpus", nullptr, "", "CPUs and their threads", InfoCpus},
    {"jit", nullptr, "", "what the translator of guest code did", InfoJit},
    {"kvm", nullptr, "", "whether KVM runs the machine", InfoKvm},
    {"mtree", nullptr, "", "the maps of memory and I/O ports", InfoMtree},
    {"name", nullptr, "", "the machine's name", InfoName},
    {"network", nullptr, "", "network backends", InfoNetwork},
    {"qtree", "devices", "", "devices", InfoQtree},
    {"registers", nullptr, "[-a]", "registers of the CPU (of all)", InfoRegisters},
    {"status", nullptr, "", "whether the machine runs", InfoStatus},
    {"version", nullptr, "", "this program's version", InfoVersion},
};

Tables Infos() {
  static const std::span<const HmpCommand> tables[] = {kInfos, BlockInfos()};
  return tables;
}

// ---- commands ----

std::string Info(HmpContext& context, std::string_view arguments) {
  std::string_view name = NextWord(&arguments);
  if (name.empty()) return List(Infos(), "info ");
  const HmpCommand* info = Find(Infos(), name);
  return info ? Run(*info, context, arguments) : Unknown(Infos(), name, "info");
}
std::string Help(HmpContext&, std::string_view) { return List(HmpCommandTables(), ""); }
std::string Stop(HmpContext& context, std::string_view) {
  context.vm.Stop();
  return "";
}
std::string Cont(HmpContext& context, std::string_view) { return Done(context.vm.Continue()); }
std::string Quit(HmpContext& context, std::string_view) {
  context.vm.Quit(Cause::kHostQmpQuit);
  return "";
}
std::string SystemReset(HmpContext& context, std::string_view) {
  return Done(context.vm.SystemReset(Cause::kHostQmpSystemReset));
}
std::string SystemPowerdown(HmpContext& context, std::string_view) {
  context.vm.PowerDown();
  return "";
}
std::string Nmi(HmpContext& context, std::string_view) {
  context.vm.board().InjectNmi();
  return "";
}
std::string Cpu(HmpContext& context, std::string_view arguments) {
  std::string_view word = NextWord(&arguments);
  unsigned index = 0;
  auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), index);
  if (error != std::errc() || end != word.data() + word.size() ||
      index >= context.vm.board().vcpu_count()) {
    return fmt::format("Error: there is no CPU '{}'\n", word);
  }
  context.cpu = index;
  return "";
}
std::string Balloon(HmpContext& context, std::string_view arguments) {
  std::string_view word = NextWord(&arguments);
  Result<uint64_t> size = ParseSize(word, 'M');
  if (!size || *size == 0) return fmt::format("Error: '{}': a size in MiB is expected\n", word);
  Result<VirtioBalloon*> balloon = context.vm.FindBalloon();
  if (!balloon) return "Error: " + balloon.error().what + "\n";
  (*balloon)->SetTarget(*size);
  return "";
}
std::string Save(HmpContext& context, std::string_view arguments) {
  std::string path(NextWord(&arguments));
  if (path.empty()) return "Error: the name of a file is missing\n";
  return Done(context.vm.Save(path));
}

constexpr HmpCommand kCommands[] = {
    {"balloon", nullptr, "MIB", "ask the guest to keep this much of its memory", Balloon},
    {"cont", "c", "", "let the machine run", Cont},
    {"cpu", nullptr, "N", "the CPU that 'info registers' and 'x' mean", Cpu},
    {"help", "?", "", "this list", Help},
    {"info", nullptr, "[WHAT]", "show something; without WHAT, list what there is", Info,
     HmpCommand::Where::kFiber},
    {"nmi", nullptr, "", "a non-maskable interrupt for all CPUs", Nmi},
    {"quit", "q", "", "end the machine", Quit},
    {"savestate", nullptr, "FILE",
     "stop, and save everything but the disks (continue with -incoming file:FILE)", Save},
    {"stop", "s", "", "stop the machine", Stop},
    {"system_powerdown", nullptr, "", "press the power button", SystemPowerdown},
    {"system_reset", nullptr, "", "press the reset button", SystemReset},
    {"x", nullptr, "/FMT ADDRESS", "memory at a virtual address; FMT: count, o x d u c, b h w g",
     DumpVirtual},
    {"xp", nullptr, "/FMT ADDRESS", "memory at a physical address", DumpPhysical},
};

}  // namespace

std::span<const std::span<const HmpCommand>> HmpCommandTables() {
  static const std::span<const HmpCommand> tables[] = {kCommands, BlockHmpCommands()};
  return tables;
}

std::string RunHmpCommand(HmpContext& context, std::string_view line) {
  std::string_view name = NextWord(&line);
  if (name.empty()) return "";
  // "x/10i": the format may touch the name.
  size_t slash = name.find('/');
  std::string rest(line);
  if (slash != std::string_view::npos && slash > 0) {
    rest = std::string(name.substr(slash)) + rest;
    name = name.substr(0, slash);
  }
  const HmpCommand* command = Find(HmpCommandTables(), name);
  return command ? Run(*command, context, rest) : Unknown(HmpCommandTables(), name, "help");
}

}  // namespace kvartz::vmm
