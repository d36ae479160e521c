#include "vmm/command_line.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

namespace kvartz::vmm {
namespace {

using testing::HasSubstr;

Result<CommandLine> Parse(const std::vector<const char*>& arguments) {
  return ParseCommandLine(arguments);
}

VmConfig Config(const std::vector<const char*>& arguments) {
  Result<CommandLine> line = Parse(arguments);
  EXPECT_TRUE(line) << line.error().what;
  return line ? std::move(line->config) : VmConfig{};
}

std::string Refusal(const std::vector<const char*>& arguments) {
  Result<CommandLine> line = Parse(arguments);
  EXPECT_FALSE(line);
  if (line) return "";
  EXPECT_EQ(line.error().what.find('\n'), std::string::npos);
  return line.error().what;
}

std::string Property(const DeviceSpec& device, const char* name) {
  const std::string* value = device.properties.Find(name);
  return value ? *value : "(none)";
}

std::string Option(const block::Options& options, const std::string& name) {
  auto it = options.all().find(name);
  return it == options.all().end() ? "(none)" : it->second.text;
}

const DeviceSpec* FindDevice(const VmConfig& config, const std::string& driver) {
  for (const DeviceSpec& device : config.machine.devices) {
    if (device.driver == driver) return &device;
  }
  return nullptr;
}

TEST(CommandLineTest, DirectBoot) {
  VmConfig config = Config(
      {"-M", "pc", "-m", "256", "-nographic", "-kernel", "k", "-initrd", "i", "-append", "a b=c"});
  EXPECT_EQ(config.machine.type, "pc");
  EXPECT_EQ(config.machine.ram_bytes, 256u << 20);
  EXPECT_EQ(config.machine.boot.kernel, "k");
  EXPECT_EQ(config.machine.boot.initrd, "i");
  EXPECT_EQ(config.machine.boot.cmdline, "a b=c");
  ASSERT_EQ(config.chardevs.size(), 1u);
  EXPECT_EQ(config.chardevs[0].kind, host::ChardevConfig::Kind::kStdio);
  EXPECT_TRUE(config.chardevs[0].mux);
  EXPECT_FALSE(config.chardevs[0].signal);
  ASSERT_EQ(config.monitors.size(), 1u);
  EXPECT_EQ(config.monitors[0].chardev, config.chardevs[0].id);
  const DeviceSpec* serial = FindDevice(config, "isa-serial");
  ASSERT_TRUE(serial);
  EXPECT_EQ(Property(*serial, "chardev"), config.chardevs[0].id);
}

TEST(CommandLineTest, EachRowHasAHelpTextAndItsOwnName) {
  std::set<std::string_view> names;
  for (const OptionRow& row : OptionRows()) {
    EXPECT_TRUE(names.insert(row.name).second) << row.name;
    EXPECT_NE(row.help[0], 0) << row.name;
    EXPECT_NE(HelpText().find(std::string("  -") + row.name), std::string::npos);
  }
}

// An option that takes an argument is refused without one; none crashes on an odd one.
TEST(CommandLineTest, EachRowSurvivesOddArguments) {
  for (const OptionRow& row : OptionRows()) {
    std::string option = std::string("-") + row.name;
    if (row.argument) {
      EXPECT_NE(Refusal({option.c_str()}).find(option), std::string::npos);
    }
    for (const char* odd :
         {"", ",", "=", ",,,=", "{}", "{\"a\":{\"b\":[1]}}", "x=y", "help", "\xff\xfe"}) {
      Result<CommandLine> line = Parse({option.c_str(), odd});
      EXPECT_TRUE(line || !line.error().what.empty());
    }
  }
}

TEST(CommandLineTest, UnknownOptionsNameTheNearest) {
  EXPECT_NE(Refusal({"-kernal", "x"}).find("-kernel"), std::string::npos);
  EXPECT_NE(Refusal({"--kernal", "x"}).find("-kernel"), std::string::npos);
  EXPECT_NE(Refusal({"-vnc", ":0"}).find("not supported yet: -vnc"), std::string::npos);
  EXPECT_NE(Refusal({"-hda", "a.img"}).find("if=virtio"), std::string::npos);
  EXPECT_NE(Refusal({"a.img"}).find("a.img"), std::string::npos);
}

TEST(CommandLineTest, RefusalsNameOptionAndArgument) {
  EXPECT_NE(Refusal({"-drive", "if=virtio,format=raw"}).find("file="), std::string::npos);
  EXPECT_NE(Refusal({"-drive", "file=a.img,if=virtio,cache=fast"}).find("fast"), std::string::npos);
  EXPECT_TRUE(
      Refusal({"-drive", "file=a.img,if=virtio,cache=fast"}).starts_with("-drive file=a.img"));
  EXPECT_NE(Refusal({"-drive", "file=a.img,if=virtio,bps=1,bps_rd=1"}).find("bps"),
            std::string::npos);
  EXPECT_NE(Refusal({"-drive", "file=a.img"}).find("if=virtio"), std::string::npos);
  EXPECT_NE(Refusal({"-m", "12x"}).find("12x"), std::string::npos);
  EXPECT_NE(Refusal({"-smp", "0"}).find("-smp"), std::string::npos);
  EXPECT_NE(Refusal({"-smp", "4000"}).find("4000"), std::string::npos);
  EXPECT_NE(Refusal({"-append", "x"}).find("-kernel"), std::string::npos);
  EXPECT_NE(Refusal({"-initrd", "x"}).find("-kernel"), std::string::npos);
  EXPECT_NE(Refusal({"-device", "virtio-blk-cpi,help"}).find("'virtio-blk-pci'"),
            std::string::npos);
  EXPECT_NE(Refusal({"-M", "pcc"}).find("pc"), std::string::npos);
  EXPECT_NE(Refusal({"-uuid", "1234"}).find("UUID"), std::string::npos);
  EXPECT_NE(Refusal({"-mon", "chardev=nope"}).find("nope"), std::string::npos);
  EXPECT_NE(Refusal({"-daemonize", "-nographic"}).find("-daemonize"), std::string::npos);
  EXPECT_NE(Refusal({"-serial", "vc"}).find("not supported yet: vc"), std::string::npos);
  EXPECT_NE(Refusal({"-chardev", "stdoi,id=x"}).find("stdio"), std::string::npos);
  EXPECT_NE(Refusal({"-chardev", "null,id=x", "-chardev", "null,id=x"}).find("another"),
            std::string::npos);
}

// QEMU's rules since its version 6.2: cores before sockets.
TEST(CommandLineTest, Topology) {
  auto topology = [](const char* argument) {
    cpu::CpuTopology t = Config({"-smp", argument}).machine.topology;
    return std::array{t.sockets, t.dies, t.cores, t.threads};
  };
  using T = std::array<unsigned, 4>;
  EXPECT_EQ(topology("4"), (T{1, 1, 4, 1}));
  EXPECT_EQ(topology("8,sockets=2"), (T{2, 1, 4, 1}));
  EXPECT_EQ(topology("8,cores=2"), (T{4, 1, 2, 1}));
  EXPECT_EQ(topology("8,cores=2,sockets=2"), (T{2, 1, 2, 2}));
  EXPECT_EQ(topology("sockets=2,dies=2,cores=2,threads=2"), (T{2, 2, 2, 2}));
  EXPECT_EQ(Config({"-smp", "cores=3"}).machine.cpu_count, 3u);
  Refusal({"-smp", "5,cores=2"});
  Refusal({"-smp", "2,maxcpus=4"});
}

TEST(CommandLineTest, SerialForms) {
  VmConfig config =
      Config({"-serial", "unix:/tmp/s,server=on,wait=off", "-serial",
              "tcp:127.0.0.1:44,server,nowait", "-serial", "file:/tmp/a,b", "-serial", "null"});
  ASSERT_EQ(config.chardevs.size(), 4u);
  EXPECT_EQ(config.chardevs[0].path, "/tmp/s");
  EXPECT_TRUE(config.chardevs[0].server);
  EXPECT_FALSE(config.chardevs[0].wait);
  EXPECT_EQ(config.chardevs[1].host, "127.0.0.1");
  EXPECT_EQ(config.chardevs[1].port, "44");
  EXPECT_EQ(config.chardevs[2].path, "/tmp/a,b");
  EXPECT_EQ(config.chardevs[3].kind, host::ChardevConfig::Kind::kNull);
  EXPECT_TRUE(Config({"-serial", "unix:/tmp/s,server=on"}).chardevs[0].wait);
  EXPECT_EQ(FindDevice(Config({"-serial", "none"}), "isa-serial"), nullptr);
}

TEST(CommandLineTest, QmpOverChardevAndShortForm) {
  VmConfig config =
      Config({"-qmp", "unix:/tmp/q,server=on,wait=off", "-chardev",
              "socket,id=m,path=/tmp/r,server=on,wait=off", "-mon", "chardev=m,mode=control"});
  ASSERT_EQ(config.monitors.size(), 2u);
  EXPECT_EQ(config.monitors[0].mode, MonitorConfig::Mode::kQmp);
  EXPECT_EQ(config.monitors[1].mode, MonitorConfig::Mode::kQmp);
  EXPECT_EQ(config.monitors[1].chardev, "m");
}

TEST(CommandLineTest, NodefaultsLeavesNothing) {
  VmConfig config = Config({"-nodefaults", "-nographic"});
  EXPECT_TRUE(config.chardevs.empty());
  EXPECT_TRUE(config.machine.devices.empty());
  EXPECT_TRUE(config.netdevs.empty());
}

TEST(CommandLineTest, DrivesAndTheirDevices) {
  VmConfig config = Config({"-nodefaults", "-drive",
                            "file=a,,b.img,format=raw,if=virtio,cache=none,readonly=on,serial=S1"});
  ASSERT_EQ(config.drives.size(), 1u);
  EXPECT_EQ(Option(config.drives[0].options, "filename"), "a,b.img");
  EXPECT_EQ(Option(config.drives[0].options, "driver"), "raw");
  EXPECT_EQ(Option(config.drives[0].options, "cache.direct"), "on");
  EXPECT_EQ(Option(config.drives[0].options, "read-only"), "on");
  const DeviceSpec* disk = FindDevice(config, "virtio-blk-pci");
  ASSERT_TRUE(disk);
  EXPECT_EQ(Property(*disk, "drive"), config.drives[0].id);
  EXPECT_EQ(Property(*disk, "serial"), "S1");
}

TEST(CommandLineTest, OptionsOfDrives) {
  VmConfig config = Config(
      {"-nodefaults", "-object", "iothread,id=io", "-drive",
       "file=a.img,format=qcow2,if=none,id=d,cache=writethrough,snapshot=on,copy-on-read=on,"
       "throttling.iops-total=100,throttling.iops-total-max=200,bps_rd=1000,group=g,werror=stop,"
       "rerror=ignore,detect-zeroes=unmap,discard=unmap,l2-cache-size=1M,file.locking=off",
       "-device", "virtio-blk-pci,drive=d,iothread=io,share-rw=on"});
  ASSERT_EQ(config.drives.size(), 1u);
  const DriveConfig& drive = config.drives[0];
  EXPECT_TRUE(drive.writethrough && drive.snapshot && drive.copy_on_read && drive.share_write);
  EXPECT_EQ(drive.iothread, "io");
  EXPECT_EQ(drive.throttle_group, "g");
  EXPECT_EQ(drive.limits.buckets[block::ThrottleLimits::kIopsTotal].average, 100u);
  EXPECT_EQ(drive.limits.buckets[block::ThrottleLimits::kIopsTotal].max, 200u);
  EXPECT_EQ(drive.limits.buckets[block::ThrottleLimits::kBpsRead].average, 1000u);
  EXPECT_EQ(drive.werror, "stop");
  EXPECT_EQ(drive.rerror, "ignore");
  for (const auto& [name, value] :
       {std::pair{"detect-zeroes", "unmap"}, std::pair{"discard", "unmap"},
        std::pair{"l2-cache-size", "1M"}, std::pair{"file.locking", "off"}}) {
    EXPECT_EQ(Option(drive.options, name), value);
  }
}

TEST(CommandLineTest, BlockdevsAreKeptInOrderWithTheirOptions) {
  VmConfig config =
      Config({"-nodefaults", "-blockdev", "driver=file,node-name=f,filename=x.img,cache.direct=on",
              "-blockdev",
              R"({"driver":"qcow2","node-name":"q","read-only":true,"backing":null,"file":"f"})",
              "-device", "virtio-blk-pci,drive=q,share-rw=on"});
  ASSERT_EQ(config.nodes.size(), 2u);
  EXPECT_EQ(Option(config.nodes[0].options, "cache.direct"), "on");
  EXPECT_EQ(Option(config.nodes[1].options, "read-only"), "on");
  EXPECT_EQ(Option(config.nodes[1].options, "backing"), "");
  EXPECT_EQ(Option(config.nodes[1].options, "file"), "f");
  EXPECT_TRUE(config.nodes[0].share_write && config.nodes[1].share_write);
  EXPECT_NE(Refusal({"-blockdev", "driver=file,filename=x"}).find("node-name"), std::string::npos);
}

TEST(CommandLineTest, SecretsAreNotShown) {
  VmConfig config = Config({"-nodefaults", "-object", "secret,id=s,data=hidden", "-object",
                            "throttle-group,id=g,x-iops-total=5"});
  ASSERT_EQ(config.objects.size(), 2u);
  EXPECT_EQ(config.objects[0].option, "-object secret,id=s");
  EXPECT_EQ(Option(config.objects[0].options, "data"), "hidden");
  EXPECT_EQ(config.objects[1].type, "throttle-group");
}

TEST(CommandLineTest, NetworkCards) {
  VmConfig config = Config({"-nodefaults", "-nic",
                            "user,model=virtio-net-pci,mac=52:54:00:00:00:01,hostfwd=tcp::22-:22"});
  ASSERT_EQ(config.netdevs.size(), 1u);
  const DeviceSpec* card = FindDevice(config, "virtio-net-pci");
  ASSERT_TRUE(card);
  EXPECT_EQ(Property(*card, "netdev"), config.netdevs[0].id);
  EXPECT_EQ(Property(*card, "mac"), "52:54:00:00:00:01");
  EXPECT_EQ(*config.netdevs[0].properties.Find("hostfwd"), "tcp::22-:22");
  config = Config({"-nodefaults", "-nic", "user,hostfwd=tcp::22-:22,hostfwd=udp::53-:53"});
  EXPECT_EQ(*config.netdevs[0].properties.Find("hostfwd"), "tcp::22-:22");
  EXPECT_EQ(*config.netdevs[0].properties.Find("hostfwd.1"), "udp::53-:53");
  EXPECT_EQ(Config({"-net", "nic", "-net", "user"}).netdevs.size(), 1u);
  EXPECT_TRUE(Config({"-nic", "none"}).netdevs.empty());
  EXPECT_TRUE(Config({"-net", "none"}).netdevs.empty());
}

TEST(CommandLineTest, MemoryBackends) {
  VmConfig config = Config({"-object", "memory-backend-memfd,id=m,size=64M,share=on,prealloc=on",
                            "-machine", "pc,memory-backend=m"});
  EXPECT_EQ(config.machine.ram_bytes, 64u << 20);
  EXPECT_TRUE(config.machine.ram_options.prealloc);
  EXPECT_NE(Refusal({"-object", "memory-backend-ram,id=m,size=64M"}).find("memory-backend=m"),
            std::string::npos);
  EXPECT_NE(Refusal({"-machine", "pc,memory-backend=z"}).find('z'), std::string::npos);
}

TEST(CommandLineTest, WhatScriptsPassIsAccepted) {
  VmConfig config = Config({"-no-user-config",
                            "-display",
                            "none",
                            "-vga",
                            "none",
                            "-parallel",
                            "none",
                            "-net",
                            "none",
                            "-msg",
                            "timestamp=on",
                            "-sandbox",
                            "off",
                            "-name",
                            "guest=g,debug-threads=on",
                            "-rtc",
                            "base=utc,driftfix=none",
                            "-boot",
                            "strict=off",
                            "-overcommit",
                            "mem-lock=off",
                            "-action",
                            "reboot=shutdown,shutdown=pause",
                            "-global",
                            "PIIX4_PM.disable_s3=1",
                            "-accel",
                            "tcg,thread=multi",
                            "-machine",
                            "pc,usb=off,dump-guest-core=off",
                            "-uuid",
                            "12345678-9abc-def0-1234-56789abcdef0"});
  EXPECT_EQ(config.machine.name, "g");
  EXPECT_EQ(config.reboot, RebootAction::kShutdown);
  EXPECT_EQ(config.shutdown, ShutdownAction::kPause);
  EXPECT_EQ(config.accels, std::vector<std::string>{"tcg"});
  EXPECT_EQ((*config.machine.uuid)[4], 0x9a);
}

TEST(CommandLineTest, EnginesTakeTheirOptions) {
  VmConfig config = Config({"-accel", "tcg,tb-size=128,jit=off,thread=multi"});
  EXPECT_EQ(config.accels, std::vector<std::string>{"tcg"});
  EXPECT_FALSE(config.machine.soft.jit);
  EXPECT_EQ(config.machine.soft.code_bytes, 128ull << 20);
  EXPECT_TRUE(Config({"-accel", "kvartz"}).machine.soft.jit);
  config = Config({"-accel", "kvm:kvartz,kernel-irqchip=split,tb-size=32"});
  EXPECT_EQ(config.machine.kvm.irqchip, cpu::IrqchipMode::kUser);
  EXPECT_EQ(config.machine.soft.code_bytes, 32ull << 20);

  EXPECT_THAT(Refusal({"-accel", "kvartz,jti=off"}), HasSubstr("did you mean jit=?"));
  EXPECT_THAT(Refusal({"-accel", "kvartz,thread=single"}), HasSubstr("thread=single"));
  EXPECT_THAT(Refusal({"-accel", "kvartz,tb-size=2"}), HasSubstr("tb-size='2'"));
  EXPECT_THAT(Refusal({"-accel", "kvartz,kernel-irqchip=on"}), HasSubstr("kernel-irqchip="));
  EXPECT_THAT(Refusal({"-accel", "kvm,tb-size=64"}), HasSubstr("tb-size="));
}

TEST(CommandLineTest, PerfMapIsOffUnlessAskedFor) {
  EXPECT_FALSE(Config({}).perf_map);
  EXPECT_TRUE(Config({"-perfmap", "-accel", "kvartz,tb-size=32"}).perf_map);
}

TEST(CommandLineTest, ListsAreInformation) {
  for (std::vector<const char*> arguments : {std::vector<const char*>{"-help"},
                                             {"-version"},
                                             {"-M", "help"},
                                             {"-cpu", "help"},
                                             {"-device", "help"},
                                             {"-device", "virtio-rng-pci,help"},
                                             {"-device", "driver=virtconsole,help"},
                                             {"-netdev", "help"},
                                             {"-chardev", "help"},
                                             {"-object", "help"},
                                             {"-accel", "help"}}) {
    Result<CommandLine> line = Parse(arguments);
    ASSERT_TRUE(line);
    EXPECT_FALSE(line->information.empty()) << arguments[0];
  }
}

}  // namespace
}  // namespace kvartz::vmm
