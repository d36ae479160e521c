// Handlers of the options that describe the machine itself. Each takes one option's argument;
// errors name what is wrong with it, the option's name is added by the caller.
#pragma once

#include "vmm/command_line.h"

namespace kvartz::vmm {

Result<> Machine(CommandLine& line, std::string_view argument);
Result<> Accel(CommandLine& line, std::string_view argument);
Result<> EnableKvm(CommandLine& line, std::string_view argument);
Result<> Cpu(CommandLine& line, std::string_view argument);
Result<> Smp(CommandLine& line, std::string_view argument);
Result<> Memory(CommandLine& line, std::string_view argument);
Result<> MemPrealloc(CommandLine& line, std::string_view argument);
Result<> Name(CommandLine& line, std::string_view argument);
Result<> Uuid(CommandLine& line, std::string_view argument);
Result<> Rtc(CommandLine& line, std::string_view argument);
Result<> Boot(CommandLine& line, std::string_view argument);
Result<> FwCfg(CommandLine& line, std::string_view argument);
Result<> Global(CommandLine& line, std::string_view argument);
Result<> NoAcpi(CommandLine& line, std::string_view argument);
Result<> NoHpet(CommandLine& line, std::string_view argument);
Result<> Kernel(CommandLine& line, std::string_view argument);
Result<> Initrd(CommandLine& line, std::string_view argument);
Result<> Append(CommandLine& line, std::string_view argument);
Result<> Bios(CommandLine& line, std::string_view argument);
Result<> DataDirectory(CommandLine& line, std::string_view argument);
Result<> Device(CommandLine& line, std::string_view argument);
Result<> Debugcon(CommandLine& line, std::string_view argument);
Result<> Action(CommandLine& line, std::string_view argument);
Result<> Incoming(CommandLine& line, std::string_view argument);
Result<> Overcommit(CommandLine& line, std::string_view argument);
// Checks and settles what needs all of them.
Result<> FinishMachine(CommandLine& line);

}  // namespace kvartz::vmm
