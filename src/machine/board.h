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
class IoApic;
class PciDevice;
class PicPair;
}  // namespace kvartz

namespace kvartz::machine {

class IrqRouter;
struct CpuEntry;
class AcpiTables;
struct SmbiosTables;

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

  // Guest time goes on, devices resume; and the reverse: devices are quiet (their transfers have
  // ended), time stands still. By VcpuThreads, vCPUs parked.
  void StartTime();
  void StopTime();

 protected:
  Board(const MachineConfig& config, const MachineType& type, const BoardEnv& env);

  // Each board's part, in the order of construction.
  virtual Result<> TakeOptions() = 0;  // sets irqchip_
  virtual Result<> MapRam() = 0;
  virtual Result<> WireDevices() = 0;  // connects router_, sets isa_irqs_ if there is an ISA bus
  // Plugs the function where addr= and bus= say.
  virtual Result<> AttachPci(PciDevice& device, const Properties& properties) = 0;
  struct MmioSlot {
    uint64_t base = 0;
    IrqLine irq;
  };
  // A free virtio-mmio slot.
  virtual Result<MmioSlot> TakeMmioSlot(const DeviceSpec& spec) = 0;
  // Firmware tables, kernel and initrd go to RAM, vCPU 0 to its entry point. At the end of every
  // reset.
  virtual Result<> LoadBoot() = 0;

  // Where boards put firmware tables when there is no firmware: RAM that the memory map calls
  // reserved.
  static constexpr uint64_t kFirmwareTables = 0xe0000, kSmbiosTables = 0xf0000,
                            kSmbiosEnd = 0x100000;
  // Writes them and the SMBIOS tables there; returns the RSDP's address. Errors: too long.
  Result<uint64_t> PlaceTables(const AcpiTables& acpi);
  SmbiosTables Smbios() const;
  // The bootstrap processor begins there.
  Result<> EnterKernel(const CpuEntry& entry);

  // From the CPUID tables: local APIC ids, and the highest physical address plus one.
  std::vector<uint32_t> ApicIds() const;
  uint64_t PhysicalLimit() const;

  DeviceEnv MakeEnv(const std::string& id);
  // Takes over a device that the board wired itself.
  template <typename T>
  T& Own(std::unique_ptr<T> device) {
    T& reference = *device;
    devices_.push_back(std::move(device));
    return reference;
  }
  // Maps ports [base, base + count); the handler's offset of the first one is `handler_offset`.
  void MapPorts(MmioDevice& device, uint16_t base, uint16_t count, uint64_t handler_offset = 0,
                unsigned max_access = 1);
  void MapMmio(MmioDevice& device, uint64_t base, uint64_t size,
               std::vector<Doorbell> doorbells = {});
  // Creates the machine's RAM and maps it as PCs do: up to `low_limit` below 4 GiB, the rest above.
  // [hole_begin, hole_end) of the block stays unmapped.
  Result<> MapPcRam(uint64_t low_limit, uint64_t hole_begin, uint64_t hole_end);
  // vCPUs and devices go, the last first. At the top of each derived destructor: devices refer to
  // its buses.
  void DestroyDevices();

  const MachineConfig config_;
  const MachineType type_;
  const BoardEnv env_;
  cpu::IrqchipMode irqchip_ = cpu::IrqchipMode::kUser;
  AddressSpace memory_;
  AddressSpace ports_;
  std::vector<std::shared_ptr<RamBlock>> ram_blocks_;  // the first is RAM itself
  uint64_t low_ram_bytes_ = 0;                         // below 4 GiB, from 0
  std::unique_ptr<cpu::Accel> accel_;
  std::unique_ptr<IrqRouter> router_;
  PicPair* pic_ = nullptr;
  IoApic* ioapic_ = nullptr;
  IrqSink* isa_irqs_ = nullptr;
  std::vector<std::unique_ptr<IoHandler>> port_windows_;
  std::vector<std::unique_ptr<Device>> devices_;
  std::vector<std::unique_ptr<cpu::Vcpu>> vcpus_;

 private:
  Result<> Build();
  void MapPortsAt(MmioDevice& device, const DeviceRequest::PortRange& range, unsigned max_access);
  // cpu::AccelHost and MsiSink.
  uint8_t AcknowledgePic() final;
  void BroadcastEoi(uint8_t vector) final;
  void TripleFault(unsigned index) final;
  void EngineFailed(unsigned index, const std::string& why) final;
  void SendMsi(uint64_t address, uint32_t data) final;

  unsigned auto_ids_ = 0;
};

}  // namespace kvartz::machine
