// The terminal on standard input in raw mode, given back as it was however the process ends.
#pragma once

#include "base/result.h"

namespace kvartz::host {

// Process-wide (there is one controlling terminal); main thread.
namespace terminal {
enum class Signals { kOn, kOff };
// Raw mode on `fd`, output processing kept. kOff: Ctrl-C, Ctrl-\ and Ctrl-Z arrive as bytes.
// Errors: `fd` isn't a terminal, or is raw already.
Result<> EnterRaw(int fd, Signals signals);
// As it was before EnterRaw. Does nothing if that wasn't called.
void Restore();
}  // namespace terminal

}  // namespace kvartz::host
