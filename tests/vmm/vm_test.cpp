// A whole machine in this process: its life, its monitors, and its state in a file.
#include "vmm/vm.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <boost/json/parse.hpp>
#include <cstdlib>
#include <fstream>

#include "memory/guest_memory.h"
#include "vmm/snapshot.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;

// A firmware image of 64 KiB whose last 16 bytes jump to `code` at its begin, in real mode.
std::string Firmware(std::string code) {
  code.resize(0x10000, '\x90');
  // jmp far f000:0000 at f000:fff0.
  code.replace(0xfff0, 5, std::string("\xea\x00\x00\x00\xf0", 5));
  return code;
}

class VmTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/kvartz-vm-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    dir_ = name;
  }
  void TearDown() override { std::system(("rm -rf " + dir_).c_str()); }

  VmConfig Config(const std::string& code) {
    std::string firmware = dir_ + "/bios.bin";
    std::ofstream(firmware, std::ios::binary) << Firmware(code);
    VmConfig config;
    config.accels = {"kvartz"};
    config.machine.type = "pc";
    config.machine.ram_bytes = 16 << 20;
    config.machine.boot.firmware = firmware;
    for (const char* id : {"qmp", "serial0"}) {
      host::ChardevConfig chardev;
      chardev.id = id;
      chardev.kind = host::ChardevConfig::Kind::kRingbuf;
      config.chardevs.push_back(chardev);
    }
    config.monitors.push_back({"qmp", MonitorConfig::Mode::kQmp, false});
    config.machine.devices.push_back({"isa-serial", "serial0", {{"chardev", "serial0"}}});
    config.machine.devices.push_back(
        {"isa-debug-exit", "exit", {{"iobase", "0x501"}, {"iosize", "1"}}});
    return config;
  }

  std::unique_ptr<Vm> Make(VmConfig config) {
    auto vm = Vm::Create(std::move(config));
    EXPECT_TRUE(vm) << vm.error().what;
    if (!vm) return nullptr;
    for (int i = 0; i < 3; ++i) (*vm)->loop().RunOnce(0);
    return std::move(*vm);
  }

  host::Chardev& Char(Vm& vm, size_t index) { return *vm.chardevs()[index]; }

  // Sends one QMP line; the answers and events that came, each as a value.
  std::vector<json::value> Qmp(Vm& vm, const std::string& line) {
    if (!line.empty()) Char(vm, 0).RingbufWrite(line + "\n");
    for (int i = 0; i < 3; ++i) vm.loop().RunOnce(0);
    std::vector<json::value> values;
    std::string text = Char(vm, 0).RingbufRead(65536);
    for (size_t end; (end = text.find("\r\n")) != std::string::npos; text.erase(0, end + 2)) {
      values.push_back(json::parse(text.substr(0, end)));
    }
    return values;
  }
  std::string ErrorClass(const json::value& answer) {
    const json::value* error = answer.as_object().if_contains("error");
    return error ? std::string(error->at("class").as_string()) : "";
  }
  std::string EventNames(const std::vector<json::value>& values) {
    std::string names;
    for (const json::value& value : values) {
      if (const json::value* event = value.as_object().if_contains("event"))
        names += std::string(event->as_string()) + " ";
      if (value.as_object().contains("return")) names += "return ";
    }
    return names;
  }
  template <typename Condition>
  bool RunUntil(Vm& vm, Condition condition) {
    for (int i = 0; i < 2000 && !condition(); ++i) vm.loop().RunOnce(10'000'000);
    return condition();
  }

  std::string dir_;
};

// loop: in al, 0x3fd; test 0x20...: counts 'a', 'b', 'c' ... to the serial port for ever; keeps the
// count in RAM at 0x500.
//   mov byte [0x500], 'a'
// l: mov dx, 0x3fd / in al, dx / test al, 0x20 / jz l
//   mov dx, 0x3f8 / mov al, [0x500] / out dx, al / inc byte [0x500]
//   cmp byte [0x500], 'z'+1 / jne l / mov byte [0x500], 'a' / jmp l
const std::string kAlphabet(
    "\x31\xc0\x8e\xd8"              // xor ax,ax; mov ds,ax
    "\xc6\x06\x00\x05\x61"          // mov byte [0x500],'a'
    "\xba\xfd\x03\xec\xa8\x20"      // mov dx,0x3fd; in al,dx; test al,0x20
    "\x74\xf8"                      // jz -8
    "\xba\xf8\x03\xa0\x00\x05\xee"  // mov dx,0x3f8; mov al,[0x500]; out dx,al
    "\xfe\x06\x00\x05"              // inc byte [0x500]
    "\x80\x3e\x00\x05\x7b"          // cmp byte [0x500],'z'+1
    "\x75\xe6"                      // jne -26
    "\xc6\x06\x00\x05\x61"          // mov byte [0x500],'a'
    "\xeb\xdf",                     // jmp -33
    4 + 5 + 6 + 2 + 7 + 4 + 5 + 2 + 5 + 2);

// mov dx,0x501; mov al,0x10; out dx,al; hlt: ends with (0x10 << 1) | 1.
const std::string kDebugExit("\xba\x01\x05\xb0\x10\xee\xf4\xeb\xfd", 9);

TEST_F(VmTest, QmpNegotiatesAndRefuses) {
  VmConfig config = Config(kAlphabet);
  config.start_paused = true;
  auto vm = Make(std::move(config));
  ASSERT_TRUE(vm);
  auto greeting = Qmp(*vm, "");
  ASSERT_EQ(greeting.size(), 1u);
  EXPECT_TRUE(greeting[0].at("QMP").at("version").at("qemu").at("major").is_int64());
  EXPECT_EQ(ErrorClass(Qmp(*vm, R"({"execute": "query-status"})").at(0)), "CommandNotFound");
  EXPECT_EQ(EventNames(Qmp(*vm, R"({"execute": "qmp_capabilities"})")), "return ");
  EXPECT_EQ(ErrorClass(Qmp(*vm, R"({"execute": "qmp_capabilities"})").at(0)), "CommandNotFound");
  EXPECT_EQ(ErrorClass(Qmp(*vm, R"({"execute": "nonesuch"})").at(0)), "CommandNotFound");
  for (const char* bad :
       {R"({"execute": 7})", R"({"execute": "stop", "arguments": {"x": 1}})",
        R"({"execute": "stop" "x"})", R"([1])", R"({"execute": "stop", "extra": 1})",
        R"({"execute": "human-monitor-command"})", R"({"execute": "stop", "arguments": 1})",
        R"({"execute": "human-monitor-command", "arguments": {"command-line": 5}})", "}{",
        R"("\ud800")"}) {
    auto answers = Qmp(*vm, bad);
    ASSERT_EQ(answers.size(), 1u) << bad;
    EXPECT_EQ(ErrorClass(answers[0]), "GenericError") << bad;
  }
  auto with_id = Qmp(*vm, R"({"execute": "query-status", "id": [1, "a"]})");
  EXPECT_EQ(with_id.at(0).at("id"), json::parse(R"([1, "a"])"));
  EXPECT_EQ(with_id.at(0).at("return").at("status").as_string(), "prelaunch");
  EXPECT_EQ(with_id.at(0).at("return").at("running").as_bool(), false);
  // Two commands without anything between, and one in pieces.
  EXPECT_EQ(Qmp(*vm, R"({"execute":"query-version"}{"execute":"query-name"})").size(), 2u);
  Char(*vm, 0).RingbufWrite(R"({"exec)");
  EXPECT_EQ(Qmp(*vm, R"(ute": "query-kvm"})").size(), 1u);
}

TEST_F(VmTest, EveryCommandWithoutNeededArgumentsAnswers) {
  VmConfig config = Config(kAlphabet);
  config.start_paused = true;
  auto vm = Make(std::move(config));
  ASSERT_TRUE(vm);
  Qmp(*vm, R"({"execute": "qmp_capabilities"})");
  auto commands = Qmp(*vm, R"({"execute": "query-commands"})");
  for (const json::value& row : commands.at(0).at("return").as_array()) {
    std::string name(row.at("name").as_string());
    if (name == "qmp_capabilities" || name == "quit") continue;
    auto answers = Qmp(*vm, R"({"execute": ")" + name + R"("})");
    ASSERT_FALSE(answers.empty()) << name;
    EXPECT_TRUE(answers.back().as_object().contains("return") ||
                ErrorClass(answers.back()) == "GenericError" ||
                answers.back().as_object().contains("event"))
        << name;
  }
}

TEST_F(VmTest, RunsStopsContinuesResetsQuits) {
  VmConfig config = Config(kAlphabet);
  config.start_paused = true;
  auto vm = Make(std::move(config));
  ASSERT_TRUE(vm);
  Qmp(*vm, R"({"execute": "qmp_capabilities"})");
  EXPECT_EQ(EventNames(Qmp(*vm, R"({"execute": "cont"})")), "RESUME return ");
  std::string output;
  ASSERT_TRUE(
      RunUntil(*vm, [&] { return (output += Char(*vm, 1).RingbufRead(65536)).size() >= 52; }));
  EXPECT_TRUE(output.starts_with("abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"))
      << output.substr(0, 60);
  EXPECT_EQ(EventNames(Qmp(*vm, R"({"execute": "stop"})")), "STOP return ");
  Char(*vm, 1).RingbufRead(65536);
  for (int i = 0; i < 3; ++i) vm->loop().RunOnce(1'000'000);
  EXPECT_EQ(Char(*vm, 1).RingbufRead(65536), "") << "a stopped machine prints nothing";
  auto reset = Qmp(*vm, R"({"execute": "system_reset"})");
  EXPECT_EQ(EventNames(reset), "return RESET ");
  EXPECT_EQ(reset.back().at("data"),
            json::parse(R"({"guest": false, "reason": "host-qmp-system-reset"})"));
  EXPECT_EQ(vm->state(), RunState::kPrelaunch);
  auto quit = Qmp(*vm, R"({"execute": "quit"})");
  EXPECT_EQ(EventNames(quit), "return SHUTDOWN ");
  EXPECT_EQ(quit.back().at("data"), json::parse(R"({"guest": false, "reason": "host-qmp-quit"})"));
  EXPECT_EQ(vm->Run(), 0);
}

TEST_F(VmTest, DebugExitEndsWithItsCode) {
  auto vm = Make(Config(kDebugExit));
  ASSERT_TRUE(vm);
  EXPECT_EQ(vm->Run(), 0x21);
}

// lidt with a limit of 0, then int3: a triple fault.
TEST_F(VmTest, TripleFaultIsAResetWhichNoRebootTurnsIntoTheEnd) {
  VmConfig config = Config(
      std::string("\x31\xc0\x8e\xd8\x66\xc7\x06\x00\x05\x00\x00\x00\x00\xc7\x06\x04\x05\x00\x00"
                  "\x0f\x01\x1e\x00\x05\xcc\xf4",
                  26));
  config.reboot = RebootAction::kShutdown;
  auto vm = Make(std::move(config));
  ASSERT_TRUE(vm);
  Qmp(*vm, R"({"execute": "qmp_capabilities"})");
  EXPECT_EQ(vm->Run(), 0);
  auto events = Qmp(*vm, "");
  ASSERT_FALSE(events.empty());
  EXPECT_EQ(events.back().at("data"), json::parse(R"({"guest": true, "reason": "guest-reset"})"));
}

TEST_F(VmTest, HumanMonitorCommands) {
  VmConfig config = Config(kAlphabet);
  config.start_paused = true;
  auto vm = Make(std::move(config));
  ASSERT_TRUE(vm);
  Qmp(*vm, R"({"execute": "qmp_capabilities"})");
  auto hmp = [&](const std::string& line) {
    auto answers =
        Qmp(*vm, R"({"execute": "human-monitor-command", "arguments": {"command-line": ")" + line +
                     R"("}})");
    return std::string(answers.back().at("return").as_string());
  };
  EXPECT_EQ(hmp("info status"), "VM status: paused (prelaunch)\n");
  EXPECT_NE(hmp("info registers").find("RIP=000000000000fff0"), std::string::npos);
  EXPECT_NE(hmp("xp /5xb 0xfffffff0").find("0xea 0x00 0x00 0x00 0xf0"), std::string::npos);
  EXPECT_NE(hmp("x/1xb 0xfffffff0").find("0xea"), std::string::npos);
  EXPECT_NE(hmp("info mtree").find("serial0"), std::string::npos);
  EXPECT_NE(hmp("info chardev").find("serial0: filename=ringbuf"), std::string::npos);
  EXPECT_NE(hmp("halp").find("help"), std::string::npos);
  EXPECT_NE(hmp("xp /zz").find("Error"), std::string::npos);
  EXPECT_EQ(hmp("cont"), "");
  EXPECT_EQ(hmp("info status"), "VM status: running\n");
  for (const char* line : {"help", "info", "info cpus", "info block", "info network", "info qtree",
                           "info version", "info kvm"}) {
    EXPECT_FALSE(hmp(line).empty() && std::string_view(line) != "info block" &&
                 std::string_view(line) != "info network")
        << line;
  }
}

// Real mode is interpreted: the numbers are there, and small.
TEST_F(VmTest, JitInformation) {
  VmConfig config = Config(kAlphabet);
  config.machine.cpu_count = config.machine.topology.cores = 2;
  auto vm = Make(std::move(config));
  ASSERT_TRUE(vm);
  Qmp(*vm, R"({"execute": "qmp_capabilities"})");
  ASSERT_TRUE(vm->Continue());
  auto answers = Qmp(*vm, R"({"execute": "x-query-jit"})");
  ASSERT_FALSE(answers.empty());
  const std::string text(answers.back().at("return").at("human-readable-text").as_string());
  for (const char* part : {"CPU#0\n", "\nCPU#1\n", "\nunits translated ", "\ncode bytes used "})
    EXPECT_NE(text.find(part), std::string::npos) << part << " in " << text;
  EXPECT_TRUE(vm->running());
  answers = Qmp(*vm, R"({"execute": "human-monitor-command",
                         "arguments": {"command-line": "info jit"}})");
  EXPECT_EQ(std::string(answers.back().at("return").as_string()).substr(0, 6), "CPU#0\n");
}

TEST_F(VmTest, JitInformationIsRefusedWithoutTranslation) {
  VmConfig config = Config(kAlphabet);
  config.machine.soft.jit = false;
  auto vm = Make(std::move(config));
  ASSERT_TRUE(vm);
  Qmp(*vm, R"({"execute": "qmp_capabilities"})");
  auto answers = Qmp(*vm, R"({"execute": "x-query-jit"})");
  ASSERT_EQ(ErrorClass(answers.back()), "GenericError");
  EXPECT_NE(std::string(answers.back().at("error").at("desc").as_string()).find("jit=off"),
            std::string::npos);
  answers = Qmp(*vm, R"({"execute": "human-monitor-command",
                         "arguments": {"command-line": "info jit"}})");
  const std::string text(answers.back().at("return").as_string());
  EXPECT_EQ(text.substr(0, 7), "Error: ");
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
}

TEST_F(VmTest, PerfMapIsRefusedWithoutTranslation) {
  VmConfig config = Config(kAlphabet);
  config.perf_map = true;
  config.machine.soft.jit = false;
  auto vm = Vm::Create(std::move(config));
  ASSERT_FALSE(vm);
  EXPECT_NE(vm.error().what.find("-perfmap: guest code is interpreted"), std::string::npos);
}

TEST_F(VmTest, CodeMemoryMustBeEnoughForAllCpus) {
  VmConfig config = Config(kAlphabet);
  config.machine.cpu_count = config.machine.topology.cores = 3;
  config.machine.soft.code_bytes = 8 << 20;
  auto vm = Vm::Create(std::move(config));
  ASSERT_FALSE(vm);
  EXPECT_NE(vm.error().what.find("tb-size=8"), std::string::npos) << vm.error().what;
}

// Runs, is saved in the midst of the alphabet, goes on in a fresh machine where it stopped.
TEST_F(VmTest, SavedMachineGoesOnInAFreshOne) {
  std::string path = dir_ + "/state";
  auto first = Make(Config(kAlphabet));
  ASSERT_TRUE(first);
  ASSERT_TRUE(first->Continue());
  std::string output;
  ASSERT_TRUE(RunUntil(
      *first, [&] { return (output += Char(*first, 1).RingbufRead(65536)).size() >= 100; }));
  ASSERT_TRUE(first->Save(path));
  for (int i = 0; i < 5; ++i) first->loop().RunOnce(2'000'000);
  output += Char(*first, 1).RingbufRead(65536);
  std::string dump = DumpState([&](StateVisitor& v) { first->board().VisitState(v); });
  first.reset();

  VmConfig config = Config(kAlphabet);
  config.load_path = path;
  auto second = Make(std::move(config));
  ASSERT_TRUE(second);
  EXPECT_EQ(second->state(), RunState::kPaused);
  EXPECT_EQ(DumpState([&](StateVisitor& v) { second->board().VisitState(v); }), dump);
  ASSERT_TRUE(second->Continue());
  size_t before = output.size();
  ASSERT_TRUE(RunUntil(*second, [&] {
    return (output += Char(*second, 1).RingbufRead(65536)).size() >= before + 100;
  }));
  for (size_t i = 0; i < output.size(); ++i)
    ASSERT_EQ(output[i], static_cast<char>('a' + i % 26)) << "at " << i;
}

TEST_F(VmTest, DamagedStateIsRefused) {
  std::string path = dir_ + "/state";
  auto vm = Make(Config(kAlphabet));
  ASSERT_TRUE(vm);
  ASSERT_TRUE(vm->Save(path));
  vm.reset();
  std::ifstream file(path, std::ios::binary);
  std::string good((std::istreambuf_iterator<char>(file)), {});
  auto load = [&](const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
    VmConfig config = Config(kAlphabet);
    config.load_path = path;
    return Vm::Create(std::move(config)).has_value();
  };
  EXPECT_TRUE(load(good));
  EXPECT_FALSE(load(""));
  EXPECT_FALSE(load(good.substr(0, good.size() / 2)));
  EXPECT_FALSE(load(good.substr(0, good.size() - 1)));
  for (size_t at : {size_t{0}, size_t{9}, size_t{20}, good.size() / 2, good.size() - 2}) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x40);
    EXPECT_FALSE(load(bad)) << at;
  }
}

TEST_F(VmTest, SetupErrorsNameTheOption) {
  VmConfig config = Config(kAlphabet);
  block::Options options;
  options.Set("driver", "raw");
  options.Set("file.driver", "file");
  options.Set("file.filename", "/nope.img");
  config.drives.push_back({.option = "-drive file=/nope.img", .id = "d", .options = options});
  auto vm = Vm::Create(std::move(config));
  ASSERT_FALSE(vm);
  EXPECT_TRUE(vm.error().what.starts_with("-drive file=/nope.img: ")) << vm.error().what;
}

}  // namespace
}  // namespace kvartz::vmm
