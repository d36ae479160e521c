#include "machine/board.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

#include "host/chardev/chardev.h"
#include "machine/temp_file.h"
#include "machine/test_board.h"

namespace kvartz::machine {
namespace {

using Request = MachineControl::Request;
using test::MultibootImage;
using test::TempFile;
using test::TestBoard;

MachineConfig Config(const std::string& type, const std::string& kernel) {
  MachineConfig config;
  config.type = type;
  config.ram_bytes = 32 << 20;
  config.boot.kernel = kernel;
  config.devices.push_back({"isa-debug-exit", "", Properties{{"iobase", "0xf4"}, {"iosize", "4"}}});
  return config;
}

// mov dx, 0xf4; mov al, 0x21; out dx, al; hlt; jmp -3
const std::vector<uint8_t> kExit = {0x66, 0xba, 0xf4, 0x00, 0xb0, 0x21, 0xee, 0xf4, 0xeb, 0xfd};

TEST(MachineTypes, NamesAndAliases) {
  EXPECT_EQ((*FindMachineType("pc"))->board, BoardKind::kPc);
  EXPECT_EQ((*FindMachineType("pc-i440fx-jammy"))->board, BoardKind::kPc);
  EXPECT_EQ((*FindMachineType("microvm"))->board, BoardKind::kMicrovm);
  Result<const MachineType*> wrong = FindMachineType("microwm");
  ASSERT_FALSE(wrong);
  EXPECT_NE(wrong.error().what.find("'microvm'"), std::string::npos);
}

class BoardKinds : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    cpu::KvmFitness::Verdict verdict = cpu::ProbeKvm().verdict;
    bool usable =
        verdict == cpu::KvmFitness::Verdict::kFit || verdict == cpu::KvmFitness::Verdict::kEmulated;
    if (accel() == "kvm" && !usable) GTEST_SKIP() << cpu::ProbeKvm().why;
  }
  // "BOARD-ENGINE".
  std::string board() const { return GetParam().substr(0, GetParam().find('-')); }
  std::string accel() const { return GetParam().substr(GetParam().find('-') + 1); }
};
INSTANTIATE_TEST_SUITE_P(All, BoardKinds,
                         testing::Values("pc-kvartz", "microvm-kvartz", "pc-kvm", "microvm-kvm"));

TEST_P(BoardKinds, RunsAKernelAndResets) {
  TempFile kernel(MultibootImage(kExit));
  TestBoard machine(accel());
  Result<> made = machine.Create(Config(board(), kernel.path()));
  ASSERT_TRUE(made) << made.error().what;
  EXPECT_EQ(machine.exit_code(), -1) << "nothing runs before ResumeAll";
  machine.threads().ResumeAll();
  EXPECT_TRUE(machine.RunUntil([&] { return machine.exit_code() == 0x43; }));
  machine.ExitProcess(-1);
  ASSERT_TRUE(machine.threads().Reset());
  EXPECT_TRUE(machine.RunUntil([&] { return machine.exit_code() == 0x43; }))
      << "the kernel is loaded anew";
  machine.threads().PauseAll();
  EXPECT_FALSE(machine.threads().running());
}

TEST_P(BoardKinds, StateMovesToAFreshMachine) {
  // Counts in EAX until the word at 0x90000 says 1: cmp dword [0x90000], 1; je +3; inc eax; jmp
  // -12; then the exit.
  std::vector<uint8_t> code = {0x31, 0xc0, 0x83, 0x3d, 0x00, 0x00, 0x09,
                               0x00, 0x01, 0x74, 0x03, 0x40, 0xeb, 0xf4};
  code.insert(code.end(), kExit.begin(), kExit.end());
  TempFile kernel(MultibootImage(code));
  MachineConfig config = Config(board(), kernel.path());
  std::vector<uint8_t> state, ram;
  std::string dump;
  {
    TestBoard machine(accel());
    Result<> made = machine.Create(config);
    ASSERT_TRUE(made) << made.error().what;
    machine.threads().ResumeAll();
    machine.RunUntil([] { return false; }, 100'000'000);
    machine.threads().PauseAll();
    auto visit = [&](StateVisitor& v) { machine.board().VisitState(v); };
    state = SaveState(visit);
    dump = DumpState(visit);
    RamBlock& block = *machine.board().ram_blocks()[0];
    ram.assign(block.host(), block.host() + block.size());
  }
  TestBoard machine(accel());
  ASSERT_TRUE(machine.Create(config));
  auto visit = [&](StateVisitor& v) { machine.board().VisitState(v); };
  Result<> loaded = LoadState(state, visit);
  ASSERT_TRUE(loaded) << loaded.error().what;
  EXPECT_EQ(DumpState(visit), dump);
  RamBlock& block = *machine.board().ram_blocks()[0];
  std::copy(ram.begin(), ram.end(), block.host());
  block.host()[0x90000] = 1;
  machine.threads().ResumeAll();
  EXPECT_TRUE(machine.RunUntil([&] { return machine.exit_code() == 0x43; }));
}

TEST_P(BoardKinds, TripleFaultAsksForAReset) {
  TempFile kernel(MultibootImage({0x0f, 0x0b}));  // ud2 without an IDT
  TestBoard machine(accel());
  ASSERT_TRUE(machine.Create(Config(board(), kernel.path())));
  machine.threads().ResumeAll();
  EXPECT_TRUE(machine.RunUntil([&] { return !machine.requests().empty(); }));
  EXPECT_EQ(machine.requests()[0].first, Request::kReset);
}

TEST_P(BoardKinds, BadInputIsNamed) {
  TempFile kernel(MultibootImage(kExit));
  auto error = [&](const std::function<void(MachineConfig&)>& change) {
    MachineConfig config = Config(board(), kernel.path());
    change(config);
    TestBoard machine(accel());
    Result<> made = machine.Create(config);
    return made ? std::string("no error") : made.error().what;
  };
  auto has = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
  };
  std::string text = error([](MachineConfig& c) { c.boot.kernel = "/nonexistent/vmlinuz"; });
  EXPECT_TRUE(has(text, "/nonexistent/vmlinuz") && has(text, "no directory '/nonexistent'"))
      << text;
  text = error([](MachineConfig& c) { c.boot.initrd = "/nonexistent/initrd"; });
  EXPECT_TRUE(has(text, "/nonexistent/initrd")) << text;
  text = error([](MachineConfig& c) { c.ram_bytes = 1 << 20; });
  EXPECT_TRUE(has(text, "at least 2 MiB") && has(text, "-m")) << text;
  text = error([](MachineConfig& c) { c.options.emplace_back("hpett", "on"); });
  EXPECT_TRUE(has(text, "hpett")) << text;
  text = error([](MachineConfig& c) { c.devices.push_back({"isa-debug-exti", "", {}}); });
  EXPECT_TRUE(has(text, "isa-debug-exit")) << text;
  text = error([](MachineConfig& c) { c.boot.dtb = "x.dtb"; });
  EXPECT_TRUE(has(text, "-dtb")) << text;
  text = error([&](MachineConfig& c) { c.boot.initrd = "/etc/passwd"; });
  EXPECT_EQ(text, "no error") << "a multiboot module";
}

TEST(PcBoard, NoKernelAndNoFirmware) {
  MachineConfig config;
  config.boot.firmware = "/nonexistent/bios.bin";
  TestBoard machine;
  Result<> made = machine.Create(config);
  ASSERT_FALSE(made);
  EXPECT_NE(made.error().what.find("/nonexistent/bios.bin"), std::string::npos);
}

// Runs what KVARTZ_BOOT_KERNEL, _INITRD, _APPEND, _MACHINE, _ACCEL, _BIOS name with its serial port
// on standard output.
TEST(BoardSlow, RunsAGuest) {
  auto env = [](const char* name) {
    return getenv(name) ? std::string(getenv(name)) : std::string();
  };
  if (env("KVARTZ_BOOT_KERNEL").empty() && env("KVARTZ_BOOT_BIOS").empty())
    GTEST_SKIP() << "KVARTZ_BOOT_KERNEL names no kernel";
  TestBoard machine(env("KVARTZ_BOOT_ACCEL").empty() ? "kvartz" : env("KVARTZ_BOOT_ACCEL"));
  host::ChardevConfig console;
  console.id = "con";
  console.kind = host::ChardevConfig::Kind::kFile;
  console.path = env("KVARTZ_BOOT_LOG").empty() ? "/dev/stdout" : env("KVARTZ_BOOT_LOG");
  auto chardev = host::Chardev::Create(console, machine.loop());
  ASSERT_TRUE(chardev) << chardev.error().what;
  machine.SetChardev(chardev->get());
  MachineConfig config;
  config.type = env("KVARTZ_BOOT_MACHINE").empty() ? "pc" : env("KVARTZ_BOOT_MACHINE");
  config.ram_bytes = 512 << 20;
  config.cpu_count = env("KVARTZ_BOOT_CPUS").empty() ? 1 : std::stoi(env("KVARTZ_BOOT_CPUS"));
  config.topology.sockets = config.cpu_count;
  config.boot.kernel = env("KVARTZ_BOOT_KERNEL");
  config.boot.initrd = env("KVARTZ_BOOT_INITRD");
  config.boot.cmdline = env("KVARTZ_BOOT_APPEND");
  config.boot.firmware = env("KVARTZ_BOOT_BIOS");
  bool firmware = config.boot.kernel.empty();
  config.devices.push_back(
      {firmware ? "isa-debugcon" : "isa-serial", "", Properties{{"chardev", "con"}}});
  if (firmware) config.devices.back().properties.Set("iobase", "0x402");
  Result<> made = machine.Create(config);
  ASSERT_TRUE(made) << made.error().what;
  ViewCache ports(machine.board().ports());
  for (const FlatRange& range : ports.Get().ranges()) {
    printf("ports %04lx-%04lx %s\n", range.base, range.end() - 1, range.region->name.c_str());
  }
  machine.threads().ResumeAll();
  int64_t seconds =
      env("KVARTZ_BOOT_SECONDS").empty() ? 120 : std::stoi(env("KVARTZ_BOOT_SECONDS"));
  machine.RunUntil([&] { return !machine.requests().empty() || machine.exit_code() >= 0; },
                   seconds * 1'000'000'000);
  for (const auto& [request, who] : machine.requests())
    printf("request %d by %s\n", static_cast<int>(request), who.c_str());
  machine.Destroy();
}

}  // namespace
}  // namespace kvartz::machine
