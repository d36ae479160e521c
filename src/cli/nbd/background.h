// A process that goes to the background once it is ready.
#pragma once

#include "base/fd.h"
#include "base/result.h"

namespace kvartz::cli {

// Not thread-safe: before any thread or event loop there is.
class Background {
 public:
  // True in the child, which goes on; false in the parent.
  Result<bool> Fork();
  // The parent: the exit code, 0 once the child is ready, 1 if it ends before.
  int AwaitReady();
  // The child: lets the parent go, and the terminal.
  void Ready();

 private:
  UniqueFd read_, write_;
};

}  // namespace kvartz::cli
