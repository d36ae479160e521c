// kvartz-vmm: runs one virtual machine.
#include <fmt/core.h>
#include <malloc.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <csignal>

#include "base/log.h"
#include "base/print.h"
#include "vmm/command_line.h"
#include "vmm/process.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

Result<> SetUpLog(const VmConfig& config) {
  log::SetProgram("kvartz-vmm");
  if (!config.log_categories.empty()) {
    Result<> enabled = log::EnableCategories(config.log_categories);
    if (!enabled) return Fail(std::move(enabled).error().In("-d " + config.log_categories));
    log::SetLevel(LogLevel::kInfo);
  }
  if (!config.log_file.empty()) {
    Result<> opened = log::SetFile(config.log_file);
    if (!opened) return Fail(std::move(opened).error().In("-D " + config.log_file));
  }
  return {};
}

// What happens in the process that stays (with -daemonize: the child).
Result<int> RunMachine(VmConfig config, Daemon& daemon) {
  TRY(SetUpLog(config));
  Pidfile pidfile;
  if (!config.pidfile.empty()) TRY(pidfile.Take(config.pidfile));
  if (!config.process_name.empty()) prctl(PR_SET_NAME, config.process_name.c_str());
  bool engine_was_chosen = !config.accels.empty();
  std::unique_ptr<Vm> vm = TRY(Vm::Create(std::move(config)));
  // Who named no engine is told which one it is.
  if (!engine_was_chosen) Print(stderr, "kvartz-vmm: {}\n", vm->engine_reason());
  TRY(daemon.Ready());
  return vm->Run();
}

// A vCPU's thread allocates while it translates. With an arena of its own the heap would grow page
// by page, each a system call.
void SetUpHeap() {
  mallopt(M_ARENA_MAX, 1);
  mallopt(M_TOP_PAD, 1 << 20);
}

int Main(int argc, char** argv) {
  OccupyStandardStreams();
  SetUpHeap();
  signal(SIGPIPE, SIG_IGN);
  Result<CommandLine> line = ParseCommandLine(std::span(argv + 1, static_cast<size_t>(argc - 1)));
  auto refuse = [](const Error& error) {
    Print(stderr, "kvartz-vmm: {}\n", error.what);
    return 1;
  };
  if (!line) return refuse(line.error());
  if (!line->information.empty()) {
    Print("{}", line->information);
    return 0;
  }
  Daemon daemon;
  if (line->config.daemonize) {
    Result<Daemon::Role> role = daemon.Fork();
    if (!role) return refuse(role.error());
    if (*role == Daemon::Role::kParent) return daemon.WaitForChild();
  }
  Result<int> code = RunMachine(std::move(line->config), daemon);
  return code ? *code : refuse(code.error());
}

}  // namespace
}  // namespace kvartz::vmm

int main(int argc, char** argv) { return kvartz::vmm::Main(argc, argv); }
