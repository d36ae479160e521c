// The command line: one table of options, in the spelling that scripts and management programs use
// for this kind of program.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "vmm/config.h"

namespace kvartz::vmm {

// What the handlers fill. Finish() turns what only makes sense together (defaults, -nographic, -net
// pairs) into `config`.
struct CommandLine {
  VmConfig config;
  // Print this and exit with success, if it isn't empty (-help, -version, -device help).
  std::string information;

  // Until Finish:
  bool nographic = false;
  bool no_defaults = false;
  bool microvm = false;
  bool networking_given = false;  // a -nic, -net or -netdev, so there is no default card
  std::vector<std::string> serials;
  std::vector<std::string> monitors;
  bool monitor_given = false;
  std::vector<Properties> net_cards, net_backends;  // -net nic, -net user|tap
  std::vector<BackendConfig> memory_backends;
  std::string memory_backend;                                // -machine memory-backend=
  std::vector<std::pair<std::string, std::string>> globals;  // "driver.property", value
  unsigned max_cpus = 0;
  bool ram_given = false;

  // The name of a virtio driver ("blk") on the machine's own bus.
  std::string VirtioDriver(const std::string& device) const;
};

// Errors: one line that begins with the option: "-drive file=a.img,if=ide: not supported yet: ...".
Result<CommandLine> ParseCommandLine(std::span<const char* const> arguments);

std::string HelpText();
std::string VersionText();

// One option. What a handler gets is the argument, "" for options without.
struct OptionRow {
  const char* name;
  const char* argument;  // null: takes none
  const char* help;
  Result<> (*handle)(CommandLine& line, std::string_view argument);
};
std::span<const OptionRow> OptionRows();

// The parts of Finish and of the handlers that deal with backends (backend_options.cpp).
Result<host::ChardevConfig> ParseChardev(std::string_view text);
// -serial's and -monitor's short forms; `*monitor` is set where "mon:" asks for a monitor on the
// same chardev.
Result<host::ChardevConfig> ParseShortChardev(std::string_view text, const std::string& id,
                                              bool* monitor);
Result<> AddDrive(CommandLine& line, std::string_view argument);
Result<> AddBlockdev(CommandLine& line, std::string_view argument);
Result<> AddNetdev(CommandLine& line, std::string_view argument);
Result<> AddNic(CommandLine& line, std::string_view argument);
Result<> AddNet(CommandLine& line, std::string_view argument);
Result<> AddObject(CommandLine& line, std::string_view argument);
Result<> AddChardev(CommandLine& line, std::string_view argument);
Result<> AddMon(CommandLine& line, std::string_view argument);
Result<> AddMonitor(CommandLine& line, std::string_view text, MonitorConfig::Mode mode,
                    bool pretty);
Result<> FinishConsoles(CommandLine& line);
Result<> FinishBackends(CommandLine& line);
// The parts that deal with disks (storage_options.cpp).
void FinishDrives(CommandLine& line);
Result<> AddStorageObject(CommandLine& line, const std::string& type, const std::string& id,
                          const Properties& properties, const std::string& option);
Result<> AddSmbios(CommandLine& line, std::string_view argument);

}  // namespace kvartz::vmm
