#include "vmm/vm.h"

#include <fmt/core.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json/serialize.hpp>
#include <csignal>

#include "base/log.h"
#include "base/print.h"
#include "cpu/polling.h"
#include "device/virtio/virtio_balloon.h"
#include "host/net/net_factory.h"
#include "vmm/hmp/hmp_monitor.h"
#include "vmm/qmp/qmp_monitor.h"
#include "vmm/snapshot.h"

namespace kvartz::vmm {
namespace {

// How long output that the terminal or a client hasn't taken may hold up the end of the process.
constexpr int kDrainMs = 1000;

constexpr std::pair<RunState, const char*> kStateNames[] = {
    {RunState::kPrelaunch, "prelaunch"},
    {RunState::kRunning, "running"},
    {RunState::kPaused, "paused"},
    {RunState::kIoError, "io-error"},
    {RunState::kShutdown, "shutdown"},
    {RunState::kInternalError, "internal-error"},
    {RunState::kGuestPanicked, "guest-panicked"},
    {RunState::kSaveVm, "save-vm"},
    {RunState::kInMigrate, "inmigrate"},
};

struct CauseRow {
  Cause cause;
  const char* name;
  bool guest;
};
constexpr CauseRow kCauses[] = {
    {Cause::kHostError, "host-error", false},
    {Cause::kHostSignal, "host-signal", false},
    {Cause::kHostQmpQuit, "host-qmp-quit", false},
    {Cause::kHostQmpSystemReset, "host-qmp-system-reset", false},
    {Cause::kHostUi, "host-ui", false},
    {Cause::kGuestShutdown, "guest-shutdown", true},
    {Cause::kGuestReset, "guest-reset", true},
    {Cause::kGuestPanic, "guest-panic", true},
};

std::string CauseData(Cause cause) {
  return fmt::format(R"({{"guest": {}, "reason": "{}"}})", CausedByGuest(cause), CauseName(cause));
}

}  // namespace

const char* RunStateName(RunState state) {
  for (const auto& [value, name] : kStateNames) {
    if (value == state) return name;
  }
  return "?";
}

const char* CauseName(Cause cause) {
  for (const CauseRow& row : kCauses) {
    if (row.cause == cause) return row.name;
  }
  return "?";
}

bool CausedByGuest(Cause cause) {
  for (const CauseRow& row : kCauses) {
    if (row.cause == cause) return row.guest;
  }
  return false;
}

Vm::Vm(VmConfig config) : config_(std::move(config)), self_(std::make_shared<Vm*>(this)) {}

void Vm::Later(std::function<void(Vm& vm)> action) {
  loop_->Post([self = self_, action = std::move(action)] {
    if (*self != nullptr) action(**self);
  });
}

Vm::~Vm() {
  *self_ = nullptr;
  if (vcpus_) vcpus_->PauseAll();
  // Commands under way are waited for: their fibers can't be given up.
  auto busy = [](const auto& monitor) { return monitor->busy(); };
  while (std::ranges::any_of(monitors_, busy)) loop_->RunOnce(-1);
  // What was set up before something failed is on their loops already.
  for (const auto& io_thread : io_threads_) io_thread->Start();
  if (storage_) storage_->EndWork();
  monitors_.clear();
  vcpus_.reset();
  board_.reset();
  netdevs_.clear();
  if (storage_) storage_->Close();
  for (const auto& io_thread : io_threads_) io_thread->Stop();
  if (signals_) loop_->Unwatch(signals_.get());
  for (const auto& chardev : chardevs_) chardev->Drain(kDrainMs);
}

// ---- setting up ----

Result<std::unique_ptr<Vm>> Vm::Create(VmConfig config) {
  std::unique_ptr<Vm> vm(new Vm(std::move(config)));
  TRY(vm->Setup());
  return vm;
}

Result<> Vm::Setup() {
  if (config_.force_kvm && config_.accels == std::vector<std::string>{"kvm"}) {
    engine_ = {"kvm", "KVM, fit or not, as asked for"};
  } else {
    engine_ = TRY(cpu::ChooseAccel(config_.accels));
  }
  if (config_.perf_map) {
    if (engine_.name != "kvartz" || !config_.machine.soft.jit) {
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("-perfmap: {}; add -accel kvartz,jit=on",
                              engine_.name == "kvartz" ? "guest code is interpreted (jit=off)"
                                                       : "KVM translates no guest code"));
    }
    config_.machine.soft.perf_map = true;
  }
  loop_ = TRY(EventLoop::Create());
  if (engine_.name == "kvartz") loop_->SetPolling(cpu::PollingNs(config_.machine.cpu_count));
  // With signals at their defaults still: one of these may wait for a client.
  TRY(OpenChardevs());
  TRY(WatchSignals());
  for (const IoThreadConfig& config : config_.iothreads) {
    Result<std::unique_ptr<IoThread>> made = IoThread::Create(config);
    if (!made) return Fail(std::move(made).error().In("-object iothread,id=" + config.id));
    io_threads_.push_back(std::move(*made));
  }
  storage_ = std::make_unique<Storage>(*loop_, static_cast<StorageOwner&>(*this));
  TRY(storage_->Open(config_));
  TRY(OpenNetdevs());
  machine::BoardEnv env{*loop_, clock_, *this, *this, engine_.name};
  board_ = TRY(machine::Board::Create(config_.machine, env));
  if (Result<VirtioBalloon*> balloon = FindBalloon()) {
    (*balloon)->OnChange([this](uint64_t bytes) {
      Emit("BALLOON_CHANGE", fmt::format(R"({{"actual": {}}})", bytes));
    });
  }
  if (config_.lock_memory && mlockall(MCL_CURRENT | MCL_FUTURE) != 0) {
    return Fail(ErrnoError(errno, "-overcommit mem-lock=on: cannot lock memory; raise ulimit -l"));
  }
  for (const auto& io_thread : io_threads_) io_thread->Start();
  vcpus_ = std::make_unique<machine::VcpuThreads>(*board_);
  TRY(OpenMonitors());
  if (!config_.load_path.empty()) {
    state_ = RunState::kInMigrate;
    Result<> loaded = LoadMachine(*board_, config_.load_path);
    if (!loaded) return Fail(std::move(loaded).error().In("-incoming file:" + config_.load_path));
    state_ = RunState::kPaused;
  }
  return {};
}

Result<> Vm::OpenChardevs() {
  for (const host::ChardevConfig& config : config_.chardevs) {
    auto quit = [this] { Quit(Cause::kHostUi); };
    Result<std::unique_ptr<host::Chardev>> made = host::Chardev::Create(config, *loop_, quit);
    if (!made) return Fail(std::move(made).error().In("chardev " + config.id));
    chardevs_.push_back(std::move(*made));
  }
  return {};
}

Result<> Vm::OpenNetdevs() {
  for (const BackendConfig& config : config_.netdevs) {
    Result<std::unique_ptr<host::NetBackend>> made =
        host::CreateNetBackend(config.properties.all(), *loop_);
    if (!made) return Fail(std::move(made).error().In(config.option));
    netdevs_.emplace_back(config.id, std::move(*made));
  }
  return {};
}

Result<> Vm::OpenMonitors() {
  for (const MonitorConfig& config : config_.monitors) {
    std::unique_ptr<Monitor> monitor;
    if (config.mode == MonitorConfig::Mode::kQmp) {
      monitor = std::make_unique<QmpMonitor>(*this, config.pretty);
    } else {
      monitor = std::make_unique<HmpMonitor>(*this);
    }
    Result<> connected = monitor->ConnectTo(*FindChardev(config.chardev));
    if (!connected) return Fail(std::move(connected).error().In("monitor"));
    monitors_.push_back(std::move(monitor));
  }
  return {};
}

Result<> Vm::WatchSignals() {
  sigset_t set;
  sigemptyset(&set);
  for (int number : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&set, number);
  if (pthread_sigmask(SIG_BLOCK, &set, nullptr) != 0)
    return Fail(ErrnoError(errno, "cannot block signals"));
  signals_.Reset(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!signals_) return Fail(ErrnoError(errno, "cannot make a signalfd"));
  loop_->Watch(signals_.get(), FdEvents::kRead, [this](FdEvents) { OnSignal(); });
  return {};
}

void Vm::OnSignal() {
  signalfd_siginfo info;
  if (read(signals_.get(), &info, sizeof(info)) != sizeof(info)) return;
  Print(stderr, "kvartz-vmm: terminating on signal {} from pid {}\n", info.ssi_signo, info.ssi_pid);
  Quit(Cause::kHostSignal);
}

// ---- what devices connect to ----

host::NetBackend* Vm::FindNetdev(const std::string& id) {
  for (const auto& [name, backend] : netdevs_) {
    if (name == id) return backend.get();
  }
  return nullptr;
}

host::Chardev* Vm::FindChardev(const std::string& id) {
  for (const auto& chardev : chardevs_) {
    if (chardev->id() == id) return chardev.get();
  }
  return nullptr;
}

EventLoop* Vm::FindIoThread(const std::string& id) {
  for (const auto& io_thread : io_threads_) {
    if (io_thread->id() == id) return &io_thread->loop();
  }
  return nullptr;
}

Result<VirtioBalloon*> Vm::FindBalloon() {
  VirtioBalloon* found = nullptr;
  board_->ForEachDevice([&](Device& device) {
    auto* transport = dynamic_cast<VirtioTransport*>(&device);
    if (transport && !found) found = dynamic_cast<VirtioBalloon*>(&transport->virtio_device());
  });
  if (!found)
    return Fail(ErrorCode::kNotFound, "the machine has no balloon; add -device virtio-balloon-pci");
  return found;
}

// ---- life ----

int Vm::Run() {
  if (!config_.start_paused && !exiting_) {
    Result<> started = Continue();
    if (!started) {
      KLOG(kError, "{}", started.error().what);
      return 1;
    }
  }
  if (!exiting_) loop_->Run();
  vcpus_->PauseAll();
  for (const auto& chardev : chardevs_) chardev->Drain(kDrainMs);
  return exit_code_;
}

void Vm::Emit(std::string_view name, std::string_view data) {
  for (VmObserver* observer : std::vector(observers_)) observer->VmEvent(name, data);
}

void Vm::StorageEvent(std::string_view name, const boost::json::object& data) {
  Emit(name, boost::json::serialize(data));
}

void Vm::PauseForIoError() {
  if (running()) StopIn(RunState::kIoError);
}

void Vm::StopIn(RunState state) {
  bool was_running = running();
  vcpus_->PauseAll();
  state_ = state;
  if (was_running) Emit("STOP");
}

void Vm::Stop() {
  if (running()) StopIn(RunState::kPaused);
}

Result<> Vm::Continue() {
  if (running()) return {};
  if (state_ == RunState::kShutdown || state_ == RunState::kInternalError) {
    return Fail(ErrorCode::kState, "the machine must be reset first: system_reset");
  }
  state_ = RunState::kRunning;
  Emit("RESUME");
  vcpus_->ResumeAll();
  return {};
}

Result<> Vm::SystemReset(Cause cause) {
  if (config_.reboot == RebootAction::kShutdown) {
    Shutdown(cause);
    return {};
  }
  return Reset(cause);
}

Result<> Vm::Reset(Cause cause) {
  bool was_running = running();
  vcpus_->PauseAll();
  // What the guest asked for until now is settled by this.
  requests_ &= ~(1u << static_cast<unsigned>(Request::kReset));
  Result<> reset = board_->Reset();
  if (!reset) {
    KLOG(kError, "reset: {}", reset.error().what);
    StopIn(RunState::kInternalError);
    return reset;
  }
  Emit("RESET", CauseData(cause));
  if (was_running) {
    vcpus_->ResumeAll();
  } else {
    state_ = RunState::kPrelaunch;
  }
  return {};
}

void Vm::PowerDown() {
  board_->PowerButton();
  Emit("POWERDOWN");
}

void Vm::Quit(Cause cause) {
  config_.shutdown = ShutdownAction::kExit;
  Shutdown(cause);
}

void Vm::Shutdown(Cause cause, int exit_code) {
  if (exiting_) return;
  Emit("SHUTDOWN", CauseData(cause));
  if (config_.shutdown == ShutdownAction::kPause) {
    StopIn(RunState::kShutdown);
  } else {
    Exit(exit_code);
  }
}

void Vm::GuestPanicked() {
  bool pause = config_.panic == PanicAction::kPause;
  if (config_.panic == PanicAction::kNone) {
    Emit("GUEST_PANICKED", R"({"action": "run"})");
    return;
  }
  Emit("GUEST_PANICKED", pause ? R"({"action": "pause"})" : R"({"action": "poweroff"})");
  StopIn(RunState::kGuestPanicked);
  if (!pause) Shutdown(Cause::kGuestPanic, config_.panic == PanicAction::kExitFailure ? 1 : 0);
}

void Vm::Exit(int code) {
  if (exiting_) return;
  exiting_ = true;
  exit_code_ = code;
  vcpus_->PauseAll();
  // Not before what was written has had its turn.
  loop_->Post([this] { loop_->Stop(); });
}

Result<> Vm::Save(const std::string& path) {
  if (state_ == RunState::kInternalError)
    return Fail(ErrorCode::kState, "the machine has failed; there is nothing to save");
  StopIn(RunState::kSaveVm);
  Result<> saved = SaveMachine(*board_, path);
  state_ = RunState::kPaused;
  return saved;
}

void Vm::Ask(Request request, const std::string& who) {
  uint32_t bit = 1u << static_cast<unsigned>(request);
  if (requests_.fetch_or(bit) & bit) return;
  loop_->Post([self = self_, request, bit, who] {
    Vm* vm = *self;
    if (!vm || !(vm->requests_.fetch_and(~bit) & bit) || vm->exiting_) return;
    vm->Handle(request, who);
  });
}

void Vm::Handle(Request request, const std::string& who) {
  switch (request) {
    case Request::kReset:
      (void)SystemReset(Cause::kGuestReset);
      break;
    case Request::kPowerOff:
      Shutdown(Cause::kGuestShutdown);
      break;
    case Request::kPanicked:
      GuestPanicked();
      break;
    case Request::kInternalError:
      StopIn(RunState::kInternalError);
      // Nobody could look at it: end instead of standing still.
      if (monitors_.empty()) Exit(1);
      break;
  }
}

void Vm::ExitProcess(int code) {
  loop_->Post([self = self_, code] {
    if (*self) (*self)->Exit(code);
  });
}

}  // namespace kvartz::vmm
