// A machine with its loop, clock and a record of what it asks for, as the process would run it.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/event_loop.h"
#include "base/sync.h"
#include "device/core/backends.h"
#include "machine/board.h"
#include "machine/vcpu_threads.h"

namespace kvartz::machine::test {

class TestBoard : public MachineControl, public HostBackends {
 public:
  explicit TestBoard(std::string accel = "kvartz")
      : clock_(MonotonicClock::Instance()), accel_(std::move(accel)) {
    loop_ = std::move(*EventLoop::Create());
  }
  ~TestBoard() override { Destroy(); }
  // The machine goes; chardevs that it used may go then.
  void Destroy() {
    threads_.reset();
    board_.reset();
  }
  Result<> Create(const MachineConfig& config) {
    board_ = TRY(Board::Create(config, {*loop_, clock_, *this, *this, accel_}));
    threads_ = std::make_unique<VcpuThreads>(*board_);
    return {};
  }
  // Turns the loop until `done` or the time is over.
  bool RunUntil(const std::function<bool()>& done, int64_t timeout_ns = 60'000'000'000) {
    int64_t end = MonotonicClock::Instance().NowNs() + timeout_ns;
    while (!done()) {
      if (MonotonicClock::Instance().NowNs() > end) return false;
      loop_->RunOnce(10'000'000);
    }
    return true;
  }
  Board& board() { return *board_; }
  VcpuThreads& threads() { return *threads_; }

  void Ask(Request request, const std::string& who) override {
    auto record = record_.Lock();
    record->requests.emplace_back(request, who);
  }
  void ExitProcess(int code) override { record_.Lock()->exit_code = code; }
  int exit_code() { return record_.Lock()->exit_code; }
  std::vector<std::pair<Request, std::string>> requests() { return record_.Lock()->requests; }

  Result<DiskPort*> ConnectDisk(const DiskWish&) override {
    return Fail(ErrorCode::kNotFound, "there is no disk");
  }
  host::NetBackend* FindNetdev(const std::string&) override { return nullptr; }
  host::Chardev* FindChardev(const std::string& id) override {
    return id == "con" ? chardev_ : nullptr;
  }
  EventLoop& loop() { return *loop_; }
  void SetChardev(host::Chardev* chardev) { chardev_ = chardev; }

 private:
  struct Record {
    std::vector<std::pair<Request, std::string>> requests;
    int exit_code = -1;
  };
  VmClock clock_;
  std::unique_ptr<EventLoop> loop_;
  std::string accel_;
  Guarded<Record> record_;
  host::Chardev* chardev_ = nullptr;
  std::unique_ptr<Board> board_;
  std::unique_ptr<VcpuThreads> threads_;
};

}  // namespace kvartz::machine::test
