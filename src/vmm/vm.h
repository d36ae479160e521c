// One virtual machine in this process: its board, the host's sides of its devices, its monitors,
// and its life.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/event_loop.h"
#include "base/fd.h"
#include "device/core/backends.h"
#include "machine/board.h"
#include "machine/vcpu_threads.h"
#include "vmm/config.h"
#include "vmm/io_thread.h"
#include "vmm/run_state.h"
#include "vmm/storage/storage.h"

namespace kvartz {
class VirtioBalloon;
}

namespace kvartz::vmm {

class Monitor;

// Is told what happens to the machine. Called on the main loop.
class VmObserver {
 public:
  virtual ~VmObserver() = default;
  // `name`: "STOP"; `data`: a JSON object, or empty.
  virtual void VmEvent(std::string_view name, std::string_view data) = 0;
};

// Loop-owned by the main loop, but for Ask and ExitProcess (any thread).
class Vm final : public MachineControl, private HostBackends, private StorageOwner {
 public:
  // Sets up everything; nothing runs yet. Errors: whatever is missing, unsuitable or taken, by the
  // option that asked for it.
  static Result<std::unique_ptr<Vm>> Create(VmConfig config);
  ~Vm() override;

  // The main loop, until the machine ends. Returns the process's exit code.
  int Run();

  const VmConfig& config() const { return config_; }
  EventLoop& loop() { return *loop_; }
  machine::Board& board() { return *board_; }
  machine::VcpuThreads& vcpus() { return *vcpus_; }
  // Which engine runs the machine, and why.
  const std::string& engine_reason() const { return engine_.reason; }
  const std::string& engine_name() const { return engine_.name; }
  RunState state() const { return state_; }
  bool running() const { return state_ == RunState::kRunning; }
  // Run returns, or will do so soon.
  bool exiting() const { return exiting_; }
  const std::vector<std::unique_ptr<host::Chardev>>& chardevs() const { return chardevs_; }
  Storage& storage() { return *storage_; }
  const std::vector<std::pair<std::string, std::unique_ptr<host::NetBackend>>>& netdevs() const {
    return netdevs_;
  }

  // The user's wishes. Those that depend on the state say why they can't be fulfilled.
  void Stop();
  Result<> Continue();
  Result<> SystemReset(Cause cause);
  void PowerDown();
  void Quit(Cause cause);
  // Saves the stopped machine; it stays stopped (state paused). Errors: the host's.
  Result<> Save(const std::string& path);

  // The machine's memory balloon. Errors: it has none.
  Result<VirtioBalloon*> FindBalloon();

  // When the loop's present turn is over, unless the machine is gone by then.
  void Later(std::function<void(Vm& vm)> action);

  void AddObserver(VmObserver* observer) { observers_.push_back(observer); }
  void RemoveObserver(VmObserver* observer) { std::erase(observers_, observer); }

  // MachineControl.
  void Ask(Request request, const std::string& who) override;
  void ExitProcess(int code) override;

 private:
  explicit Vm(VmConfig config);
  // HostBackends.
  Result<DiskPort*> ConnectDisk(const DiskWish& wish) override { return storage_->Connect(wish); }
  host::NetBackend* FindNetdev(const std::string& id) override;
  host::Chardev* FindChardev(const std::string& id) override;
  // StorageOwner.
  void StorageEvent(std::string_view name, const boost::json::object& data) override;
  void PauseForIoError() override;
  EventLoop* FindIoThread(const std::string& id) override;

  Result<> Setup();
  Result<> OpenChardevs();
  Result<> OpenNetdevs();
  Result<> OpenMonitors();
  Result<> WatchSignals();
  void OnSignal();

  void Emit(std::string_view name, std::string_view data = {});
  void StopIn(RunState state);
  void Handle(Request request, const std::string& who);
  Result<> Reset(Cause cause);
  // The machine ends, or (-no-shutdown) stays powered off.
  void Shutdown(Cause cause, int exit_code = 0);
  void GuestPanicked();
  void Exit(int code);

  VmConfig config_;
  cpu::AccelChoice engine_;
  std::unique_ptr<EventLoop> loop_;
  std::vector<std::unique_ptr<host::Chardev>> chardevs_;
  UniqueFd signals_;
  std::vector<std::unique_ptr<IoThread>> io_threads_;
  std::unique_ptr<Storage> storage_;
  std::vector<std::pair<std::string, std::unique_ptr<host::NetBackend>>> netdevs_;
  VmClock clock_{MonotonicClock::Instance()};
  std::unique_ptr<machine::Board> board_;
  std::unique_ptr<machine::VcpuThreads> vcpus_;
  std::vector<std::unique_ptr<Monitor>> monitors_;

  RunState state_ = RunState::kPrelaunch;
  std::atomic<uint32_t> requests_{0};  // one bit a Request that was posted and not yet handled
  int exit_code_ = 0;
  bool exiting_ = false;
  std::vector<VmObserver*> observers_;
  // Outlives the machine in tasks that were posted to the loop.
  std::shared_ptr<Vm*> self_;
};

}  // namespace kvartz::vmm
