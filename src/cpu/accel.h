// The engine interface: what runs virtual CPUs. Two engines: KVM (kvm/) and our own (x86/).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/event_loop.h"
#include "base/result.h"
#include "cpu/cpuid.h"
#include "cpu/x86_state.h"
#include "memory/address_space.h"

namespace kvartz::cpu {

// Where the interrupt controllers live.
enum class IrqchipMode {
  kUser,    // PIC, PIT and IOAPIC are devices; local APICs belong to the engine (own engine: always
            // this; KVM: split irqchip)
  kKernel,  // PIC, IOAPIC, PIT and local APICs in KVM
};

// What an engine asks of the board. Called on vCPU threads.
class AccelHost {
 public:
  virtual ~AccelHost() = default;
  // INTA cycle: the vector of the 8259 pair (kUser).
  virtual uint8_t AcknowledgePic() = 0;
  // A local APIC ended a level-triggered interrupt: the IOAPIC clears its remote IRR (kUser).
  virtual void BroadcastEoi(uint8_t vector) = 0;
  // The guest ran into a triple fault on CPU `index`.
  virtual void TripleFault(unsigned index) = 0;
  // CPU `index` can't go on: an engine failure, described in one line. The machine stops with an
  // error status.
  virtual void EngineFailed(unsigned index, const std::string& why) = 0;
};

// -accel kvm,NAME=VALUE,...
struct KvmOptions {
  std::optional<IrqchipMode> irqchip;  // kernel-irqchip=on|split; none: the board's choice
  uint32_t dirty_ring_entries = 0;     // dirty-ring-size=N, a power of two; 0: dirty log
};
// Errors: unknown name (nearest match), malformed or unsupported value.
Result<KvmOptions> ParseKvmOptions(const std::vector<std::pair<std::string, std::string>>& options);

// -accel kvartz,NAME=VALUE,...
struct SoftOptions {
  bool jit = true;          // translate guest code; off: interpret it
  uint64_t code_bytes = 0;  // tb-size=MIB: for translated code, all CPUs together; 0: the default
  bool perf_map = false;    // -perfmap: /tmp/perf-PID.map names translated code
};
// Errors: as above.
Result<SoftOptions> ParseSoftOptions(
    const std::vector<std::pair<std::string, std::string>>& options);
// Each CPU's part of the memory for translated code, whole pages. The default is 64 MiB together,
// and more where that would be less than 4 MiB a CPU. Errors: less than that was asked for.
Result<uint64_t> CodeBytesOfCpu(const SoftOptions& options, unsigned cpu_count);

struct AccelConfig {
  AddressSpace* memory = nullptr;
  AddressSpace* ports = nullptr;
  EventLoop* loop = nullptr;  // for engine timers where they need one
  VmClock* clock = nullptr;   // guest time; the TSC follows it
  AccelHost* host = nullptr;
  IrqchipMode irqchip = IrqchipMode::kUser;
  unsigned cpu_count = 1;
  CpuTopology topology;
  CpuModelRequest model;
  KvmOptions kvm;
  SoftOptions soft;
};

// What a debugger wants to be told of (SDM vol. 3 ch. 18). The guest's own use of the debug
// registers rests meanwhile.
struct DebugRequest {
  bool single_step = false;
  bool software_breakpoints = false;  // INT3 stops instead of raising #BP
  struct Hardware {
    enum class Kind : uint8_t { kExecute, kWrite, kAccess = 3 };  // DR7 R/W
    uint64_t address = 0;
    Kind kind = Kind::kExecute;
    uint8_t size = 1;  // 1, 2, 4, 8
  };
  std::vector<Hardware> hardware;  // at most 4
  bool any() const { return single_step || software_breakpoints || !hardware.empty(); }
};
struct DebugStop {
  uint64_t rip = 0;
  uint64_t dr6 = 0;
  uint8_t vector = 0;  // 1 #DB, 3 #BP
};

// A number that an engine tells of itself, for people.
struct EngineStatistic {
  const char* name;
  uint64_t value;
  const char* meaning;
};

// One virtual CPU. Everything but Kick and Nmi is called on its own thread, or while that is
// parked.
class Vcpu {
 public:
  enum class Exit {
    kKicked,       // Kick was called
    kTripleFault,  // reported to the host already
    kFailed,       // reported to the host already
    kDebug,        // what SetDebug asked for; debug_stop() says where
  };
  virtual ~Vcpu() = default;
  // Runs guest code (and sleeps in HLT) until kicked or unable to go on.
  virtual Exit Run() = 0;
  // Makes Run return soon, or its next call return at once. Any thread.
  virtual void Kick() = 0;
  // Pulls the NMI pin (edge). Any thread.
  virtual void Nmi() = 0;
  virtual Result<> GetState(X86State* state) = 0;
  virtual Result<> SetState(const X86State& state) = 0;
  // To the values of RESET (index 0 is the bootstrap processor; the others wait for SIPI).
  virtual Result<> Reset() = 0;
  virtual unsigned index() const = 0;
  // Errors: more than the engine can do.
  virtual Result<> SetDebug(const DebugRequest& request) {
    return Fail(ErrorCode::kUnsupported, "not supported yet: guest debugging in this engine");
  }
  virtual DebugStop debug_stop() const { return {}; }
  // What the translator of guest code did (info jit). Errors: nothing is translated here.
  virtual Result<std::vector<EngineStatistic>> JitStatistics() const {
    return Fail(ErrorCode::kUnsupported,
                "JIT information is there with the own engine only: -accel kvartz");
  }
};

// A virtual machine's engine. Any thread, unless said otherwise.
class Accel {
 public:
  virtual ~Accel() = default;
  virtual const char* name() const = 0;  // "kvm", "kvartz"
  virtual Result<std::unique_ptr<Vcpu>> CreateVcpu(unsigned index) = 0;
  virtual const CpuidTable& cpuid(unsigned index) const = 0;
  virtual uint64_t tsc_khz() const = 0;
  virtual IrqchipMode irqchip() const = 0;

  // A message-signalled interrupt, also from a user-space IOAPIC. Never blocks.
  virtual void SendMsi(uint64_t address, uint32_t data) = 0;
  // kUser: level of the PIC's INTR output (LINT0 of the bootstrap processor).
  virtual void SetPicOutput(bool level) = 0;
  // kKernel: level of a GSI (0..15 reach PIC and IOAPIC, the rest the IOAPIC).
  virtual void SetGsi(unsigned gsi, bool level) = 0;

  // A signal on `event_fd` raises the MSI without a VMM thread where the engine can (KVM irqfd).
  // Errors: not supported here.
  virtual Result<uint64_t> AddIrqFd(int event_fd, uint64_t msi_address, uint32_t msi_data) = 0;
  virtual void RemoveIrqFd(uint64_t id) = 0;

  // Begins and ends the collection of dirty pages into the RAM blocks' DirtyBitmaps; Sync fetches
  // what the engine holds.
  virtual Result<> SetDirtyTracking(bool enabled) = 0;
  virtual Result<> SyncDirty() = 0;

  // Guest time starts and stops (all vCPUs are parked): TSC, kvmclock, in-kernel timers.
  virtual void ClockStarted() = 0;
  virtual void ClockStopped() = 0;
  // VM-wide state (in-kernel irqchip, PIT, clock). vCPUs parked.
  virtual void VisitState(StateVisitor& visitor) = 0;
  virtual Result<> ResetVm() = 0;
};

Result<std::unique_ptr<Accel>> CreateKvm(const AccelConfig& config);
Result<std::unique_ptr<Accel>> CreateSoftEngine(const AccelConfig& config);

// Fitness of /dev/kvm, found by running a vCPU. Probed once a process.
struct KvmFitness {
  enum class Verdict { kFit, kAbsent, kNoPermission, kEmulated, kBroken };
  Verdict verdict = Verdict::kAbsent;
  std::string why;  // one line: what was found
};
const KvmFitness& ProbeKvm();

// Chooses an engine by -accel's names in order of preference ("kvm", "kvartz"; "tcg" is an alias of
// the latter). Empty: kvm where it is fit, else kvartz.
struct AccelChoice {
  std::string name;    // "kvm" or "kvartz"
  std::string reason;  // one line for the user: which engine, and why
};
// Errors: an unknown name; "kvm" alone where it is absent or not fit (says which, and the remedy).
Result<AccelChoice> ChooseAccel(const std::vector<std::string>& names);
// The same for a given verdict; `probe` is called only if the answer depends on it.
Result<AccelChoice> ChooseAccel(const std::vector<std::string>& names,
                                const std::function<const KvmFitness&()>& probe);

}  // namespace kvartz::cpu
