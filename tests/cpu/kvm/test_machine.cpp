#include "cpu/kvm/test_machine.h"

#include <cstring>

#include "cpu/kvm/payloads.h"

namespace kvartz::cpu::kvm {
namespace {

constexpr int64_t kDeadlineNs = 60'000'000'000;
constexpr uint32_t kTssLimit = 0x167;

}  // namespace

void PrintTo(const Access& access, std::ostream* out) {
  *out << (access.write ? "write" : "read") << access.size << " +0x" << std::hex << access.offset
       << " = 0x" << access.value << std::dec;
}

// Ports and memory where a payload reports, or whose accesses are noted.
class TestMachine::Device final : public IoHandler {
 public:
  Device(TestMachine& machine, bool reports) : machine_(machine), reports_(reports) {}
  uint64_t IoRead(uint64_t offset, unsigned size) override {
    uint64_t value = machine_.pattern >> 8 * (offset & 7);
    if (size < 8) value &= (1ull << 8 * size) - 1;
    Note({offset, size, false, value});
    return value;
  }
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
    if (!reports_) return Note({offset, size, true, value});
    LockGuard guard(machine_.mutex_);
    if (offset == kDonePort - kDonePort) {
      machine_.done_ = true;
      machine_.done_value_ = value;
    } else {
      machine_.reports_.push_back(value);
    }
    machine_.changed_.NotifyAll();
  }

 private:
  void Note(const Access& access) {
    LockGuard guard(machine_.mutex_);
    machine_.accesses_.push_back(access);
    machine_.changed_.NotifyAll();
  }
  TestMachine& machine_;
  const bool reports_;
};

Region RamRegion(const std::string& name, uint64_t base, std::shared_ptr<RamBlock> ram) {
  Region region;
  region.name = name;
  region.kind = RegionKind::kRam;
  region.base = base;
  region.size = ram->size();
  region.ram = std::move(ram);
  return region;
}

Region IoRegion(const std::string& name, uint64_t base, uint64_t size, IoHandler& handler) {
  Region region;
  region.name = name;
  region.base = base;
  region.size = size;
  region.handler = &handler;
  return region;
}

uint64_t AddressOf(const char* label) {
  return kImage + static_cast<uint64_t>(label - payload_image);
}

bool OnHardware() { return ProbeKvm().verdict == KvmFitness::Verdict::kFit; }

TestMachine::TestMachine()
    : clock_(host_clock_), memory_("memory", 1ull << 40), ports_("ports", 1 << 16) {}

std::unique_ptr<TestMachine> TestMachine::Create(const MachineOptions& options) {
  std::unique_ptr<TestMachine> machine(new TestMachine());
  TestMachine& m = *machine;
  m.ram_ = RamBlock::Create("ram", kRamSize).value();
  m.report_device_ = std::make_unique<Device>(m, true);
  m.pio_device_ = std::make_unique<Device>(m, false);
  m.mmio_device_ = std::make_unique<Device>(m, false);
  m.memory_.Add(RamRegion("ram", 0, m.ram_));
  m.memory_.Add(IoRegion("mmio", kMmio, 0x2000, *m.mmio_device_));
  m.ports_.Add(IoRegion("report", kDonePort, 8, *m.report_device_));
  m.ports_.Add(IoRegion("pio", kPioPort, 8, *m.pio_device_));
  m.FillMemory();

  AccelConfig config;
  config.memory = &m.memory_;
  config.ports = &m.ports_;
  config.clock = &m.clock_;
  config.host = &m;
  config.irqchip = options.irqchip;
  config.cpu_count = options.cpus;
  config.topology.sockets = options.cpus;
  config.kvm.dirty_ring_entries = options.dirty_ring;
  // An emulating backend gives back the bits of leaves 1, 7 and 0xd that it is asked to hide, but
  // not the leaves.
  std::string model = options.model;
  if (model.empty()) model = OnHardware() ? "max" : "max,level=1,-cx16";
  config.model = ParseCpuModel(model).value();
  Result<std::unique_ptr<Accel>> accel = CreateKvm(config);
  if (!accel) {
    ADD_FAILURE() << accel.error().what;
    return nullptr;
  }
  m.accel_ = std::move(*accel);
  m.exits_.resize(options.cpus);
  for (unsigned i = 0; i < options.cpus; ++i) {
    Result<std::unique_ptr<Vcpu>> vcpu = m.accel_->CreateVcpu(i);
    if (!vcpu) {
      ADD_FAILURE() << vcpu.error().what;
      return nullptr;
    }
    m.vcpus_.push_back(std::move(*vcpu));
  }
  return machine;
}

TestMachine::~TestMachine() {
  Park();
  vcpus_.clear();
}

uint64_t TestMachine::Read(uint64_t gpa) const {
  uint64_t value;
  std::memcpy(&value, ram_->host() + gpa, sizeof(value));
  return value;
}

void TestMachine::Write(uint64_t gpa, uint64_t value) {
  std::memcpy(ram_->host() + gpa, &value, sizeof(value));
}

std::vector<LogEntry> TestMachine::Log() const {
  std::vector<LogEntry> log(std::min<uint64_t>(Read(kShared + 0x10), 64));
  std::memcpy(log.data(), ram_->host() + kLog, log.size() * sizeof(LogEntry));
  return log;
}

void TestMachine::FillMemory() {
  constexpr uint64_t kPresent = 1, kWritable = 2, kUser = 4, kLarge = 0x80, kUncached = 0x10;
  constexpr uint64_t kAll = kPresent | kWritable | kUser;
  Write(kPml4, kPdpt | kAll);
  Write(kPml4 + 8 * 511, kPdpt | kAll);
  Write(kPdpt, kPd | kAll);
  Write(kPdpt + 8 * 3, kPdHigh | kAll);
  Write(kPdpt + 8 * 510, kPd | kAll);  // -2 GiB
  for (uint64_t i = 0; i < 512; ++i) {
    Write(kPd + 8 * i, i * 0x200000 | kLarge | kAll);
    Write(kPdHigh + 8 * i, (0xc0000000 + i * 0x200000) | kLarge | kUncached | kAll);
    Write(kPt + 8 * i, (kPages + i * 0x1000) | kAll);
  }
  Write(kPd + 8 * (kPages / 0x200000), kPt | kAll);

  // Selectors as payloads.cpp uses them.
  constexpr uint64_t kDescriptors[] = {
      0,
      0x00cf9b000000ffff,  // 08 32-bit code
      0x00af9b000000ffff,  // 10 64-bit code
      0x00cf93000000ffff,  // 18 data
      0x00cffb000000ffff,  // 20 user 32-bit code
      0x00cff3000000ffff,  // 28 user data
      0x00affb000000ffff,  // 30 user 64-bit code
      0,
      0x0000890000000000 | kTssLimit | (kTss & 0xffff) << 16,  // 40 TSS
      0,
  };
  std::memcpy(ram_->host() + kGdt, kDescriptors, sizeof(kDescriptors));
  Write(kShared + 0xf00, (sizeof(kDescriptors) - 1) | kGdt << 16);  // operand of LGDT
  Write(kShared + 0xe00, 0xfff | kIdt << 16);                       // of LIDT
  uint64_t stubs = AddressOf(pl_stubs);
  for (uint64_t vector = 0; vector < 256; ++vector) {
    uint64_t stub = stubs + 16 * vector;
    // Present, DPL 3, interrupt gate, selector 10.
    Write(kIdt + 16 * vector, (stub & 0xffff) | 0x10 << 16 | 0xee00ull << 32 | (stub >> 16) << 48);
    Write(kIdt + 16 * vector + 8, 0);
  }
  Write(kTss + 4, kStackTop - 0x800);  // RSP0
  // Ring 3 has the ports below 0x7f8: a bitmap of zeros behind the TSS proper.
  Write(kTss + 0x60, 0x68ull << 48);
  auto size = static_cast<size_t>(payload_image_end - payload_image);
  std::memcpy(ram_->host() + kImage, payload_image, size);
  std::memcpy(ram_->host() + kSipiPage, pl_ap_start, 0x1000);
}

X86State TestMachine::LongMode(const char* label, unsigned index) {
  X86State state;
  EXPECT_TRUE(vcpus_[index]->GetState(&state).has_value());
  constexpr uint32_t kData = 0x93 | Segment::kDb | Segment::kG;
  for (Segment& segment : state.seg) {
    segment = {.base = 0, .limit = 0xffffffff, .attributes = kData, .selector = 0x18};
  }
  state.seg[kCs].selector = 0x10;
  state.seg[kCs].attributes = 0x9b | Segment::kL | Segment::kG;
  state.tr = {.base = kTss, .limit = kTssLimit, .attributes = 0x8b, .selector = 0x40};
  state.ldtr = {.base = 0, .limit = 0, .attributes = Segment::kUnusable, .selector = 0};
  state.gdtr = {.base = kGdt, .limit = 0x4f};
  state.idtr = {.base = kIdt, .limit = 0xfff};
  state.cr0 = 0x80010033;  // PG WP NE ET MP PE
  state.cr3 = kPml4;
  state.cr4 = 0x620;   // PAE, OSFXSR, OSXMMEXCPT
  state.efer = 0xd00;  // LMA LME NXE
  state.rip = AddressOf(label);
  state.rflags = 2;
  state.gpr[kRsp] = index == 0 ? kStackTop : kApStackTop;
  state.mp_state = MpState::kRunnable;
  return state;
}

void TestMachine::Start(const char* label, unsigned index) {
  X86State state = LongMode(label, index);
  Result<> result = vcpus_[index]->SetState(state);
  ASSERT_TRUE(result.has_value()) << result.error().what;
}

void TestMachine::ThreadBody(unsigned index) {
  for (;;) {
    Vcpu::Exit exit = vcpus_[index]->Run();
    exits_[index] = exit;
    if (exit == Vcpu::Exit::kKicked && !parking_) continue;
    LockGuard guard(mutex_);
    if (exit != Vcpu::Exit::kKicked) ++stopped_;
    changed_.NotifyAll();
    return;
  }
}

void TestMachine::Resume() {
  {
    LockGuard guard(mutex_);
    done_ = false;
    stopped_ = 0;
  }
  parking_ = false;
  accel_->ClockStarted();
  for (unsigned i = 0; i < vcpus_.size(); ++i) {
    threads_.emplace_back("vcpu", [this, i] { ThreadBody(i); });
  }
}

void TestMachine::Park() {
  if (threads_.empty()) return;
  parking_ = true;
  for (auto& vcpu : vcpus_) vcpu->Kick();
  threads_.clear();
  accel_->ClockStopped();
}

bool TestMachine::WaitFor(const std::function<bool()>& done) {
  LockGuard guard(mutex_);
  return changed_.WaitFor(guard, kDeadlineNs, [&] { return done() || stopped_ > 0; }) && done();
}

bool TestMachine::WaitReports(size_t count) {
  return WaitFor([&] { return reports_.size() >= count; });
}

bool TestMachine::WaitEois(size_t count) {
  return WaitFor([&] { return eois_.size() >= count; });
}

bool TestMachine::WaitDone() {
  return WaitFor([&] { return done_; });
}

uint64_t TestMachine::Run() {
  Resume();
  bool done = WaitDone();
  Park();
  if (done) return done_value_;
  X86State state;
  EXPECT_TRUE(vcpus_[0]->GetState(&state).has_value());
  std::string why = failures_.empty() ? "" : failures_[0];
  if (!triple_faults_.empty()) why = "triple fault";
  ADD_FAILURE() << "payload did not end; CPU 0 at image offset 0x" << std::hex << state.rip - kImage
                << " " << why;
  return ~0ull;
}

std::vector<uint64_t> TestMachine::reports() {
  LockGuard guard(mutex_);
  return reports_;
}
std::vector<Access> TestMachine::accesses() {
  LockGuard guard(mutex_);
  return accesses_;
}
std::vector<unsigned> TestMachine::triple_faults() {
  LockGuard guard(mutex_);
  return triple_faults_;
}
std::vector<std::string> TestMachine::failures() {
  LockGuard guard(mutex_);
  return failures_;
}
std::vector<uint8_t> TestMachine::eois() {
  LockGuard guard(mutex_);
  return eois_;
}

uint8_t TestMachine::AcknowledgePic() { return on_acknowledge ? on_acknowledge() : 0xff; }

void TestMachine::BroadcastEoi(uint8_t vector) {
  LockGuard guard(mutex_);
  eois_.push_back(vector);
  changed_.NotifyAll();
}

void TestMachine::TripleFault(unsigned index) {
  LockGuard guard(mutex_);
  triple_faults_.push_back(index);
}

void TestMachine::EngineFailed(unsigned, const std::string& why) {
  LockGuard guard(mutex_);
  failures_.push_back(why);
}

}  // namespace kvartz::cpu::kvm
