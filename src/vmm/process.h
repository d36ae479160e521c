// The process as the host sees it: -daemonize and -pidfile.
#pragma once

#include <string>

#include "base/fd.h"
#include "base/result.h"

namespace kvartz::vmm {

// Main thread, before there are others.
class Daemon {
 public:
  enum class Role { kParent, kChild };
  // The child has a session of its own; its errors still go to the terminal, until Ready.
  Result<Role> Fork();
  // In the child: the machine is set up. Leaves the terminal and lets the parent end with success.
  // Nothing if it never forked.
  Result<> Ready();
  // In the parent: 0 if the child became ready, else 1 (the child has said why).
  int WaitForChild();

 private:
  UniqueFd pipe_;
};

// A file with our process id, locked while we live and removed at the end. Main thread.
class Pidfile {
 public:
  Pidfile() = default;
  ~Pidfile();
  Pidfile(const Pidfile&) = delete;
  Pidfile& operator=(const Pidfile&) = delete;
  // Errors: cannot be written; in use by another process (says which).
  Result<> Take(const std::string& path);

 private:
  std::string path_;
  UniqueFd fd_;
};

}  // namespace kvartz::vmm
