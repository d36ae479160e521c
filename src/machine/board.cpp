#include "machine/board.h"

#include <fmt/core.h>

#include <algorithm>

#include "base/check.h"
#include "base/log.h"
#include "device/pci/pci_device.h"
#include "machine/irq_router.h"
#include "machine/loader/kernel.h"
#include "machine/microvm.h"
#include "machine/pc.h"
#include "machine/smbios.h"

namespace kvartz::machine {

namespace {
constexpr uint64_t kMemoryLimit = 1ull << 52;  // physical addresses of x86-64
constexpr uint64_t k4GiB = 1ull << 32;
constexpr uint64_t kMmioSlotSize = 512;

// Gives a handler that thinks in its own offsets a window of ports.
class PortWindow final : public IoHandler {
 public:
  PortWindow(IoHandler& target, uint64_t offset) : target_(target), offset_(offset) {}
  uint64_t IoRead(uint64_t offset, unsigned size) override {
    return target_.IoRead(offset_ + offset, size);
  }
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
    target_.IoWrite(offset_ + offset, size, value);
  }

 private:
  IoHandler& target_;
  const uint64_t offset_;
};
}  // namespace

Board::Board(const MachineConfig& config, const MachineType& type, const BoardEnv& env)
    : config_(config),
      type_(type),
      env_(env),
      memory_("memory", kMemoryLimit),
      ports_("ports", 0x10000) {}

Board::~Board() { VERIFY(devices_.empty() && vcpus_.empty()); }

void Board::DestroyDevices() {
  vcpus_.clear();
  while (!devices_.empty()) devices_.pop_back();
}

Result<std::unique_ptr<Board>> Board::Create(const MachineConfig& config, const BoardEnv& env) {
  const MachineType* type = TRY(FindMachineType(config.type));
  std::unique_ptr<Board> board;
  if (type->board == BoardKind::kPc) {
    board = std::make_unique<PcBoard>(config, *type, env);
  } else {
    board = std::make_unique<MicrovmBoard>(config, *type, env);
  }
  TRY(board->Build());
  return board;
}

Result<> Board::Build() {
  if (!config_.boot.dtb.empty()) {
    return Fail(ErrorCode::kUnsupported,
                "machine type '" + type_.name + "' takes no device tree; leave out -dtb");
  }
  TRY(TakeOptions());
  TRY(MapRam());
  cpu::AccelConfig accel;
  accel.memory = &memory_;
  accel.ports = &ports_;
  accel.loop = &env_.loop;
  accel.clock = &env_.clock;
  accel.host = this;
  if (env_.accel == "kvm" && config_.kvm.irqchip) irqchip_ = *config_.kvm.irqchip;
  accel.irqchip = irqchip_;
  accel.kvm = config_.kvm;
  accel.soft = config_.soft;
  accel.cpu_count = config_.cpu_count;
  accel.topology = config_.topology;
  accel.model = config_.cpu_model;
  accel_ = env_.accel == "kvm" ? TRY(cpu::CreateKvm(accel)) : TRY(cpu::CreateSoftEngine(accel));
  router_ = std::make_unique<IrqRouter>(*accel_);
  TRY(WireDevices());
  for (const DeviceSpec& spec : config_.devices) TRY(PlugDevice(spec));
  for (unsigned i = 0; i < config_.cpu_count; i++) vcpus_.push_back(TRY(accel_->CreateVcpu(i)));
  return Reset();
}

Result<> Board::MapPcRam(uint64_t low_limit, uint64_t hole_begin, uint64_t hole_end) {
  std::shared_ptr<RamBlock> ram =
      TRY(RamBlock::Create("ram", config_.ram_bytes, config_.ram_options));
  ram_blocks_.push_back(ram);
  low_ram_bytes_ = std::min(config_.ram_bytes, low_limit);
  AddressSpace::Batch batch(memory_);
  auto map = [&](uint64_t base, uint64_t offset, uint64_t end_offset) {
    if (offset >= end_offset) return;
    Region region;
    region.name = "ram";
    region.kind = RegionKind::kRam;
    region.base = base;
    region.size = end_offset - offset;
    region.ram = ram;
    region.ram_offset = offset;
    memory_.Add(std::move(region));
  };
  map(0, 0, std::min(low_ram_bytes_, hole_begin));
  map(hole_end, hole_end, low_ram_bytes_);
  map(k4GiB, low_ram_bytes_, config_.ram_bytes);
  return {};
}

DeviceEnv Board::MakeEnv(const std::string& id) {
  return {id, memory_, ports_, env_.loop, env_.clock, *this, env_.control, &env_.backends};
}

void Board::MapPortsAt(MmioDevice& device, const DeviceRequest::PortRange& range,
                       unsigned max_access) {
  Region region;
  region.name = device.id();
  region.base = range.base;
  region.size = range.count;
  region.handler = &device;
  if (range.handler_offset) {
    port_windows_.push_back(std::make_unique<PortWindow>(device, range.handler_offset));
    region.handler = port_windows_.back().get();
  }
  region.lock = &device.lock();
  region.max_access = max_access;
  ports_.Add(std::move(region));
}

void Board::MapPorts(MmioDevice& device, uint16_t base, uint16_t count, uint64_t handler_offset,
                     unsigned max_access) {
  MapPortsAt(device, {base, count, handler_offset}, max_access);
}

void Board::MapMmio(MmioDevice& device, uint64_t base, uint64_t size,
                    std::vector<Doorbell> doorbells) {
  Region region;
  region.name = device.id();
  region.base = base;
  region.size = size;
  region.priority = 1;
  region.handler = &device;
  region.lock = &device.lock();
  region.doorbells = std::move(doorbells);
  memory_.Add(std::move(region));
}

Result<Device*> Board::PlugDevice(const DeviceSpec& spec) {
  const DeviceType* type = TRY(FindDeviceType(spec.driver));
  std::string id = spec.id.empty() ? fmt::format("{}.{}", spec.driver, auto_ids_++) : spec.id;
  if (FindDevice(id))
    return Fail(ErrorCode::kExists,
                "there is a device with id '" + id + "' already; choose another id=");
  DeviceEnv env = MakeEnv(id);
  DeviceRequest request{.env = env, .properties = spec.properties, .devices = devices_};
  if (type->bus == DeviceBus::kIsa) {
    if (!isa_irqs_) {
      return Fail(ErrorCode::kUnsupported,
                  "machine type '" + type_.name + "' has no ISA bus for '" + spec.driver + "'");
    }
    request.isa_irqs = isa_irqs_;
  }
  MmioSlot slot;
  if (type->bus == DeviceBus::kVirtioMmio) {
    slot = TRY(TakeMmioSlot(spec));
    request.irq = slot.irq;
  }
  Result<std::unique_ptr<Device>> made = type->make(request);
  if (!made) return Fail(std::move(made).error());
  Device& device = Own(std::move(*made));
  Result<> placed;
  switch (type->bus) {
    case DeviceBus::kPci:
      placed = AttachPci(dynamic_cast<PciDevice&>(device), spec.properties);
      break;
    case DeviceBus::kIsa:
      for (const DeviceRequest::PortRange& range : request.ports) {
        MapPortsAt(dynamic_cast<MmioDevice&>(device), range, 4);
      }
      break;
    case DeviceBus::kVirtioMmio:
      MapMmio(dynamic_cast<MmioDevice&>(device), slot.base, kMmioSlotSize,
              std::move(request.doorbells));
      break;
    case DeviceBus::kVirtioSerial:
      break;
  }
  if (!placed) {
    devices_.pop_back();
    return Fail(std::move(placed).error());
  }
  for (ResetPhase phase : {ResetPhase::kEnter, ResetPhase::kHold, ResetPhase::kExit}) {
    LockGuard guard(device.lock());
    device.Reset(phase);
  }
  return &device;
}

Device* Board::FindDevice(const std::string& id) {
  for (const auto& device : devices_) {
    if (device->id() == id) return device.get();
  }
  return nullptr;
}

void Board::ForEachDevice(const std::function<void(Device&)>& visit) {
  for (const auto& device : devices_) visit(*device);
}

Result<> Board::Reset() {
  for (ResetPhase phase : {ResetPhase::kEnter, ResetPhase::kHold, ResetPhase::kExit}) {
    for (const auto& device : devices_) {
      LockGuard guard(device->lock());
      device->Reset(phase);
    }
  }
  TRY(accel_->ResetVm());
  for (const auto& vcpu : vcpus_) TRY(vcpu->Reset());
  return LoadBoot();
}

std::vector<uint32_t> Board::ApicIds() const {
  std::vector<uint32_t> ids;
  for (unsigned i = 0; i < config_.cpu_count; i++) {
    const cpu::CpuidTable& table = accel_->cpuid(i);
    const cpu::CpuidLeaf* topology = table.Find(0xb, 0);
    ids.push_back(topology && topology->ebx ? topology->edx : table.Lookup(1, 0).ebx >> 24);
  }
  return ids;
}

uint64_t Board::PhysicalLimit() const {
  unsigned bits = accel_->cpuid(0).Lookup(0x80000008, 0).eax & 0xff;
  return 1ull << std::clamp(bits, 32u, 52u);
}

SmbiosTables Board::Smbios() const {
  SmbiosInput input;
  input.texts = &config_.smbios;
  input.machine_name = type_.name;
  if (config_.uuid) input.uuid = *config_.uuid;
  input.sockets = config_.topology.sockets;
  input.cores_per_socket = config_.topology.dies * config_.topology.cores;
  input.threads_per_socket = input.cores_per_socket * config_.topology.threads;
  cpu::CpuidLeaf features = accel_->cpuid(0).Lookup(1, 0);
  input.cpuid_signature = features.eax;
  input.cpuid_features = features.edx;
  input.ram.push_back({0, low_ram_bytes_});
  if (config_.ram_bytes > low_ram_bytes_)
    input.ram.push_back({k4GiB, config_.ram_bytes - low_ram_bytes_});
  return BuildSmbios(input);
}

Result<uint64_t> Board::PlaceTables(const AcpiTables& acpi) {
  GuestMemory memory(memory_);
  std::vector<uint8_t> tables = acpi.PlaceAt(kFirmwareTables);
  if (tables.size() > kSmbiosTables - kFirmwareTables) {
    return Fail(ErrorCode::kNoSpace,
                "the ACPI tables for " + std::to_string(config_.cpu_count) + " CPUs are too long");
  }
  memory.Write(Gpa(kFirmwareTables), tables.data(), tables.size());
  std::vector<uint8_t> smbios = Smbios().PlaceAt(kSmbiosTables);
  if (smbios.size() > kSmbiosEnd - kSmbiosTables) {
    return Fail(ErrorCode::kNoSpace, "the SMBIOS tables are too long; shorten -smbios");
  }
  memory.Write(Gpa(kSmbiosTables), smbios.data(), smbios.size());
  return kFirmwareTables;
}

Result<> Board::EnterKernel(const CpuEntry& entry) {
  cpu::X86State state;
  TRY(vcpus_[0]->GetState(&state));
  ApplyEntry(entry, &state);
  return vcpus_[0]->SetState(state);
}

void Board::InjectNmi() {
  for (const auto& vcpu : vcpus_) vcpu->Nmi();
}

void Board::VisitState(StateVisitor& v) {
  std::string type = type_.name;
  uint64_t ram_bytes = config_.ram_bytes;
  uint32_t cpus = config_.cpu_count;
  v.Section("machine", [&] {
    v.Version(1);
    v.Field("type", type, 64);
    v.Field("ram_bytes", ram_bytes);
    v.Field("cpus", cpus);
    if (type != type_.name)
      v.Reject("was saved from machine type '" + type + "', this is '" + type_.name + "'");
    v.Bounded("ram_bytes", ram_bytes, config_.ram_bytes, config_.ram_bytes);
    v.Bounded("cpus", cpus, config_.cpu_count, config_.cpu_count);
  });
  // Interrupt lines move while devices are loaded; what receives them is loaded after: controllers
  // (the first devices), then the engine, then vCPUs.
  auto device_state = [&](Device& device) {
    v.Section(device.id(), [&] {
      LockGuard guard(device.lock());
      device.VisitState(v);
    });
  };
  for (size_t i = devices_.size(); i > 0; i--) device_state(*devices_[i - 1]);
  v.Section("accel", [&] { accel_->VisitState(v); });
  for (const auto& vcpu : vcpus_) {
    cpu::X86State state;
    // Also when loading: fields that the stream lacks keep their values.
    if (Result<> got = vcpu->GetState(&state); !got) v.Reject(got.error().what);
    v.Section(fmt::format("cpu{}", vcpu->index()), [&] { state.VisitState(v); });
    if (v.loading() && !v.failed()) {
      if (Result<> set = vcpu->SetState(state); !set) v.Reject(set.error().what);
    }
  }
}

void Board::StartTime() {
  env_.clock.Start();
  accel_->ClockStarted();
  for (const auto& device : devices_) device->Resume();
}

void Board::StopTime() {
  for (const auto& device : devices_) device->Quiesce();
  accel_->ClockStopped();
  env_.clock.Stop();
}

uint8_t Board::AcknowledgePic() { return pic_ ? pic_->Acknowledge() : 0xff; }

void Board::BroadcastEoi(uint8_t vector) {
  if (ioapic_) ioapic_->EndOfInterrupt(vector);
}

void Board::TripleFault(unsigned index) {
  if (log::CategoryEnabled(log::Category::kCpuReset)) {
    log::Write(LogLevel::kInfo, fmt::format("triple fault on CPU {}", index));
  }
  env_.control.Ask(MachineControl::Request::kReset, "triple fault");
}

void Board::EngineFailed(unsigned index, const std::string& why) {
  KLOG(kError, "CPU {}: {}", index, why);
  env_.control.Ask(MachineControl::Request::kInternalError, why);
}

void Board::SendMsi(uint64_t address, uint32_t data) { accel_->SendMsi(address, data); }

}  // namespace kvartz::machine
