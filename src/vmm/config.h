// What one run of the program is to be: plain values, made by the command line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "block/options.h"
#include "block/throttle.h"
#include "device/core/properties.h"
#include "host/chardev/chardev.h"
#include "machine/machine_config.h"

namespace kvartz::vmm {

struct MonitorConfig {
  enum class Mode { kQmp, kHmp };
  std::string chardev;
  Mode mode = Mode::kHmp;
  bool pretty = false;
};

// -blockdev.
struct NodeConfig {
  std::string option;  // as the user wrote it, for errors
  block::Options options;
  bool share_write = false;  // the device that uses it says share-rw=on
};

// -drive.
struct DriveConfig {
  std::string option;
  std::string id;
  block::Options options;  // of its node, as for blockdev-add
  bool writethrough = false;
  bool share_write = false;
  bool snapshot = false;  // writes go to an image that nobody keeps
  bool copy_on_read = false;
  std::string throttle_group = {};  // empty: one of its own, if there are limits
  block::ThrottleLimits limits = {};
  std::string rerror = "auto", werror = "auto";
  std::string iothread = {};  // of the device that uses it; empty: the main loop
};

// -object secret, throttle-group.
struct ObjectConfig {
  std::string option;
  std::string type;
  std::string id;
  block::Options options;
};

// -object iothread.
struct IoThreadConfig {
  std::string id;
  uint64_t poll_max_ns = 32768;  // EventLoop::SetPolling
};

// A thing with an id whose options another table takes apart.
struct BackendConfig {
  std::string option;
  std::string id;
  Properties properties;
};

// -action, -no-reboot, -no-shutdown.
enum class RebootAction { kReset, kShutdown };
enum class ShutdownAction { kExit, kPause };
enum class PanicAction { kPause, kShutdown, kExitFailure, kNone };

struct VmConfig {
  machine::MachineConfig machine;
  std::vector<std::string> accels;
  bool force_kvm = false;  // -accel kvm,force=on: also where it can't run an operating system
                           // (tests, measurements)

  std::vector<host::ChardevConfig> chardevs;
  std::vector<MonitorConfig> monitors;
  std::vector<ObjectConfig> objects;
  std::vector<NodeConfig> nodes;
  std::vector<DriveConfig> drives;
  std::vector<BackendConfig> netdevs;
  std::vector<IoThreadConfig> iothreads;

  bool start_paused = false;  // -S
  RebootAction reboot = RebootAction::kReset;
  ShutdownAction shutdown = ShutdownAction::kExit;
  PanicAction panic = PanicAction::kShutdown;
  bool daemonize = false;
  bool lock_memory = false;  // -overcommit mem-lock=on
  std::string pidfile;
  std::string process_name;
  std::string log_file;
  std::string log_categories;
  bool perf_map = false;  // -perfmap
  std::string load_path;  // -incoming file:PATH
};

}  // namespace kvartz::vmm
