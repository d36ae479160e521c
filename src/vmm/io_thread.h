// A thread with an event loop of its own, for disks (-object iothread).
#pragma once

#include <memory>
#include <string>

#include "base/event_loop.h"
#include "base/sync.h"
#include "vmm/config.h"

namespace kvartz::vmm {

// Owned by the main thread. What runs on the loop is gone or at rest before this is destroyed.
class IoThread {
 public:
  static Result<std::unique_ptr<IoThread>> Create(const IoThreadConfig& config) {
    std::unique_ptr<IoThread> made(new IoThread(config.id));
    made->loop_ = TRY(EventLoop::Create());
    made->loop_->SetPolling(static_cast<int64_t>(config.poll_max_ns));
    return made;
  }
  ~IoThread() { Stop(); }

  // Once. Returns when the loop runs: until then it takes anybody for its thread.
  void Start() {
    if (thread_.joinable()) return;
    Mutex mutex;
    CondVar changed;
    bool runs = false;
    loop_->Post([&] {
      LockGuard guard(mutex);
      runs = true;
      changed.NotifyAll();
    });
    thread_ = Thread("io-" + id_, [this] { loop_->Run(); });
    LockGuard guard(mutex);
    changed.Wait(guard, [&] { return runs; });
  }
  void Stop() {
    if (!thread_.joinable()) return;
    loop_->Stop();
    thread_.Join();
  }
  const std::string& id() const { return id_; }
  EventLoop& loop() { return *loop_; }

 private:
  explicit IoThread(std::string id) : id_(std::move(id)) {}
  const std::string id_;
  std::unique_ptr<EventLoop> loop_;
  Thread thread_;
};

}  // namespace kvartz::vmm
