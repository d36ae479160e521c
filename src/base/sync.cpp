#include "base/sync.h"

#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/check.h"

namespace kvartz {

Thread::Thread(const std::string& name, std::function<void()> body) {
  // The new thread inherits the mask of this one: block first, so that no handler ever runs there.
  // Faults stay deliverable.
  sigset_t blocked, before;
  sigfillset(&blocked);
  for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT}) {
    sigdelset(&blocked, fault);
  }
  VERIFY(pthread_sigmask(SIG_SETMASK, &blocked, &before) == 0);
  thread_ = std::thread([visible = name.substr(0, 15), body = std::move(body)] {
    pthread_setname_np(pthread_self(), visible.c_str());
    body();
  });
  VERIFY(pthread_sigmask(SIG_SETMASK, &before, nullptr) == 0);
}

Thread& Thread::operator=(Thread&& other) noexcept {
  if (this != &other) {
    Join();
    thread_ = std::move(other.thread_);
  }
  return *this;
}

void Thread::Join() {
  if (thread_.joinable()) thread_.join();
}

int CurrentThreadId() {
  thread_local const int id = static_cast<int>(syscall(SYS_gettid));
  return id;
}

}  // namespace kvartz
