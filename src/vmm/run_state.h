// What a machine is doing, by the names of QMP's RunState.
#pragma once

namespace kvartz::vmm {

enum class RunState {
  kPrelaunch,  // not started yet (-S), or reset while stopped
  kRunning,
  kPaused,         // stopped by the user
  kIoError,        // stopped by a disk's error policy (werror=, rerror=)
  kShutdown,       // powered off, kept by -no-shutdown
  kInternalError,  // the engine can't go on
  kGuestPanicked,
  kSaveVm,     // its state is being written
  kInMigrate,  // its state is being read
};
const char* RunStateName(RunState state);

// Why a machine ends or is reset, by the names of QMP's ShutdownCause.
enum class Cause {
  kHostError,
  kHostSignal,
  kHostQmpQuit,
  kHostQmpSystemReset,
  kHostUi,  // Ctrl-a x, the human monitor
  kGuestShutdown,
  kGuestReset,
  kGuestPanic,
};
const char* CauseName(Cause cause);
bool CausedByGuest(Cause cause);

}  // namespace kvartz::vmm
