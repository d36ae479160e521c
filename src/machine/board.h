// A machine: RAM, an engine with its vCPUs, devices and firmware tables, wired together.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/event_loop.h"
#include "base/result.h"
#include "base/state_visitor.h"
#include "cpu/accel.h"
#include "device/core/device.h"
#include "device/core/device_types.h"
#include "machine/machine_config.h"
#include "memory/address_space.h"

namespace kvartz {
class HostBackends;
class PciDevice;
}  // namespace kvartz

namespace kvartz::machine {

// What a board is given. Everything outlives it.
struct BoardEnv {
  EventLoop& loop;          // the main loop
  VmClock& clock;           // guest time; started and stopped by VcpuThreads
  MachineControl& control;  // told of reset, power-off, triple faults
  HostBackends& backends;
  std::string accel;  // "kvm" or "kvartz", of cpu::ChooseAccel
};

// Loop-owned, but for what the engine and devices call from other threads (interrupts, triple
// faults). While vCPUs run only PlugDevice, PowerButton, InjectNmi and the getters may be called;
// everything else wants them parked (vcpu_threads.h).
class Board : private cpu::AccelHost, private MsiSink {
 public:
  // Builds the machine, loads kernel or firmware, and leaves everything in its reset state. Errors:
  // unknown machine type, option or device; missing, damaged or unsuitable kernel, initrd or
  // firmware; too little memory; the engine's and the host's.
  static Result<std::unique_ptr<Board>> Create(const MachineConfig& config, const BoardEnv& env);
  ~Board() override;
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  const MachineConfig& config() const { return config_; }
  const MachineType& type() const { return type_; }
  AddressSpace& memory() { return memory_; }
  AddressSpace& ports() { return ports_; }
  cpu::Accel& accel() { return *accel_; }
  unsigned vcpu_count() const { return vcpus_.size(); }
  cpu::Vcpu& vcpu(unsigned index) { return *vcpus_[index]; }

  // Adds a device of devices.def. Errors: unknown driver or property, no free slot, the driver's
  // own.
  Result<Device*> PlugDevice(const DeviceSpec& spec);
  // By id; null: there is none.
  Device* FindDevice(const std::string& id);
  // All devices, in the order in which they were added (the board's own first).
  void ForEachDevice(const std::function<void(Device&)>& visit);

  // All devices in three phases, VM-wide engine state and vCPUs; the kernel or firmware is loaded
  // anew.
  Result<> Reset();
  // As pressing it: the guest is asked to power off (system_powerdown).
  virtual void PowerButton() = 0;
  // To all CPUs (inject-nmi).
  void InjectNmi();

  // The whole machine but for the contents of RAM. Errors of the engine are reported through the
  // visitor.
  void VisitState(StateVisitor& visitor);
  // The blocks whose contents belong to the state (RAM, and ROM that the guest may have shadowed),
  // each once.
  const std::vector<std::shared_ptr<RamBlock>>& ram_blocks() const { return ram_blocks_; }

  // Devices stop touching guest memory, and may again.
  void Quiesce();
  void Resume();

 protected:
  Board(const MachineConfig& config, const MachineType& type, const BoardEnv& env);

  // Each board's part, in the order of construction.
  virtual Result<> TakeOptions() = 0;
  virtual Result<> MapRam() = 0;
  virtual Result<> WireDevices() = 0;
  virtual Result<> AttachPci(PciDevice& device, const Properties& properties) = 0;
  virtual Result<> AttachVirtioMmio(const DeviceSpec& spec, const DeviceType& type,
                                    const Properties& properties, Device** out) = 0;
  // Firmware tables, kernel and initrd go to RAM, vCPU 0 to its entry point. At the end of every
  // reset.
  virtual Result<> LoadBoot() = 0;

  DeviceEnv MakeEnv(const std::string& id);
  // Takes over a device that the board wired itself.
  template <typename T>
  T& Own(std::unique_ptr<T> device) {
    T& reference = *device;
    devices_.push_back(std::move(device));
    return reference;
  }
  void MapPorts(MmioDevice& device, const std::string& name, uint16_t base, uint16_t count,
                IoHandler* handler = nullptr);
  Result<std::shared_ptr<RamBlock>> AddRam(const std::string& name, uint64_t size_bytes);

  const MachineConfig config_;
  const MachineType type_;
  const BoardEnv env_;
  AddressSpace memory_;
  AddressSpace ports_;
  std::vector<std::shared_ptr<RamBlock>> ram_blocks_;
  std::unique_ptr<cpu::Accel> accel_;
  std::vector<std::unique_ptr<Device>> devices_;
  std::vector<std::unique_ptr<cpu::Vcpu>> vcpus_;
};

}  // namespace kvartz::machine
