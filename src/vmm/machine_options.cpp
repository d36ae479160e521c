#include "vmm/machine_options.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "base/fd.h"
#include "vmm/keyval.h"

namespace kvartz::vmm {
namespace {

constexpr uint64_t kMemoryMin = 1 << 20;
constexpr unsigned kCpusMax = 255;
constexpr uint64_t kFwCfgFileMax = 64 << 20;

Result<std::vector<uint8_t>> ReadSmallFile(const std::string& path, uint64_t max_size) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));  // a FIFO must not hold us up
  struct stat info;
  if (!fd || fstat(fd.get(), &info) != 0) return Fail(ErrnoError(errno, "cannot open " + path));
  if (!S_ISREG(info.st_mode) || static_cast<uint64_t>(info.st_size) > max_size) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{}: must be a file of at most {} MiB", path, max_size >> 20));
  }
  std::vector<uint8_t> data(static_cast<size_t>(info.st_size));
  size_t done = 0;
  while (done < data.size()) {
    ssize_t count = read(fd.get(), data.data() + done, data.size() - done);
    if (count < 0) return Fail(ErrnoError(errno, "cannot read " + path));
    if (count == 0) break;
    done += static_cast<size_t>(count);
  }
  data.resize(done);
  return data;
}

void AddAccels(CommandLine& line, std::string_view names) {
  while (!names.empty()) {
    size_t colon = names.find(':');
    line.config.accels.emplace_back(names.substr(0, colon));
    names = colon == std::string_view::npos ? "" : names.substr(colon + 1);
  }
}

std::string ListMachines() {
  std::string text = "Machine types:\n";
  for (const machine::MachineType& type : machine::MachineTypes()) {
    if (!type.alias.empty())
      text += fmt::format("{:28} {} (alias of {})\n", type.alias, type.description, type.name);
    text += fmt::format("{:28} {}\n", type.name, type.description);
  }
  return text;
}

Result<> Refuse(std::string_view what) {
  return Fail(ErrorCode::kUnsupported, fmt::format("not supported yet: {}", what));
}

}  // namespace

Result<> Machine(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "type"));
  if (AsksForHelp(properties)) {
    line.information = ListMachines();
    return {};
  }
  if (properties.Find("type")) {
    line.config.machine.type = Take(&properties, "type");
    const machine::MachineType* type = TRY(machine::FindMachineType(line.config.machine.type));
    line.microvm = type->board == machine::BoardKind::kMicrovm;
  }
  AddAccels(line, Take(&properties, "accel"));
  if (properties.Find("memory-backend")) line.memory_backend = Take(&properties, "memory-backend");
  // Nothing that these would switch exists here: off is what is so.
  for (const char* absent : {"dump-guest-core", "mem-merge", "nvdimm", "suppress-vmdesc", "hmat"}) {
    if (TRY(TakeBool(&properties, absent, false)) && absent != std::string_view("mem-merge") &&
        absent != std::string_view("dump-guest-core")) {
      return Refuse(fmt::format("{}=on", absent));
    }
  }
  for (const auto& [name, value] : properties.all()) {
    std::string spelled = name;
    std::ranges::replace(spelled, '_', '-');
    line.config.machine.options.emplace_back(spelled, value);
  }
  return {};
}

Result<> Accel(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "accel"));
  std::string names = Take(&properties, "accel");
  if (names == "help" || names == "?") {
    line.information =
        "Accelerators:\n"
        "kvm      the host's KVM (kernel-irqchip=on|split, dirty-ring-size=N, force=on)\n"
        "kvartz   the own engine, alias tcg (jit=on|off, tb-size=MIB, thread=multi)\n";
    return {};
  }
  size_t first = line.config.accels.size();
  AddAccels(line, names);
  // Whose options may follow; a name that isn't known is refused later.
  bool kvm = names.empty(), soft = names.empty();
  for (size_t i = first; i < line.config.accels.size(); ++i) {
    const std::string& name = line.config.accels[i];
    kvm |= name != "kvartz" && name != "tcg";
    soft |= name != "kvm";
  }
  const auto take = [&](std::initializer_list<const char*> wanted) {
    std::vector<std::pair<std::string, std::string>> options;
    for (const char* name : wanted) {
      if (properties.Find(name)) options.emplace_back(name, Take(&properties, name));
    }
    return options;
  };
  std::string known;
  if (kvm) {
    line.config.force_kvm = TRY(TakeBool(&properties, "force", line.config.force_kvm));
    auto options = take({"kernel-irqchip", "dirty-ring-size"});
    if (!options.empty()) line.config.machine.kvm = TRY(cpu::ParseKvmOptions(options));
    known = "kernel-irqchip dirty-ring-size force";
  }
  if (soft) {
    auto options = take({"jit", "tb-size", "thread"});
    if (!options.empty()) line.config.machine.soft = TRY(cpu::ParseSoftOptions(options));
    known += known.empty() ? "jit tb-size thread" : " jit tb-size thread";
  }
  return RefuseRest(properties, known);
}

Result<> EnableKvm(CommandLine& line, std::string_view) {
  line.config.accels.emplace_back("kvm");
  return {};
}

Result<> Cpu(CommandLine& line, std::string_view argument) {
  if (argument == "help" || argument == "?") {
    line.information = "Processor models:\n";
    for (const std::string& name : cpu::CpuModelNames()) line.information += name + "\n";
    return {};
  }
  line.config.machine.cpu_model = TRY(cpu::ParseCpuModel(std::string(argument)));
  return {};
}

Result<> Smp(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "cpus"));
  auto take = [&](const char* name) { return TakeNumber(&properties, name, 0, 1, kCpusMax); };
  uint64_t cpus = TRY(take("cpus")), max = TRY(take("maxcpus"));
  uint64_t sockets = TRY(take("sockets")), dies = TRY(take("dies")), cores = TRY(take("cores")),
           threads = TRY(take("threads"));
  if (TRY(take("clusters")) > 1) return Refuse("clusters=");
  TRY(RefuseRest(properties, "cpus maxcpus sockets dies cores threads"));
  dies = std::max<uint64_t>(dies, 1);
  uint64_t total = max ? max : cpus;
  if (total == 0)
    total = std::max<uint64_t>(sockets, 1) * dies * std::max<uint64_t>(cores, 1) *
            std::max<uint64_t>(threads, 1);
  // What isn't said is made up of cores first.
  if (cores == 0) {
    sockets = std::max<uint64_t>(sockets, 1);
    threads = std::max<uint64_t>(threads, 1);
    cores = total / (sockets * dies * threads);
  } else if (sockets == 0) {
    threads = std::max<uint64_t>(threads, 1);
    sockets = total / (cores * dies * threads);
  } else if (threads == 0) {
    threads = total / (sockets * dies * cores);
  }
  if (cpus == 0) cpus = total;
  if (sockets * dies * cores * threads != total || total > kCpusMax) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("sockets ({}) x dies ({}) x cores ({}) x threads ({}) must be the number of "
                    "processors ({}), at most {}",
                    sockets, dies, cores, threads, total, kCpusMax));
  }
  if (cpus != total)
    return Refuse(fmt::format("maxcpus={} beyond cpus={} (processor hot-plug)", total, cpus));
  line.config.machine.cpu_count = static_cast<unsigned>(cpus);
  line.config.machine.topology = {static_cast<unsigned>(sockets), static_cast<unsigned>(dies),
                                  static_cast<unsigned>(cores), static_cast<unsigned>(threads)};
  return {};
}

Result<> Memory(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "size"));
  std::string size_text = Take(&properties, "size", "128");
  Result<uint64_t> size = ParseSize(size_text, 'M');
  if (!size) return Fail(std::move(size).error().In(size_text));
  Result<uint64_t> max = ParseSize(Take(&properties, "maxmem", size_text), 'M');
  if (!max || *max != *size) return Refuse("maxmem= beyond the size (memory hot-plug)");
  Take(&properties, "slots");
  TRY(RefuseRest(properties, "size"));
  if (*size < kMemoryMin) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{} bytes are too little memory; a machine needs at least 1M", *size));
  }
  line.config.machine.ram_bytes = (*size + kPageSize - 1) & ~(kPageSize - 1);
  line.ram_given = true;
  return {};
}

Result<> MemPrealloc(CommandLine& line, std::string_view) {
  line.config.machine.ram_options.prealloc = true;
  return {};
}

Result<> Name(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "guest"));
  line.config.machine.name = Take(&properties, "guest");
  line.config.process_name = Take(&properties, "process");
  TRY(TakeBool(&properties, "debug-threads", true));  // threads always have names
  return RefuseRest(properties, "guest process debug-threads");
}

Result<> Uuid(CommandLine& line, std::string_view argument) {
  std::array<uint8_t, 16> uuid{};
  size_t digits = 0;
  for (char c : argument) {
    if (c == '-') continue;
    int digit = c >= '0' && c <= '9'                     ? c - '0'
                : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10
                                                         : -1;
    if (digit < 0 || digits == 32) {
      digits = 0;
      break;
    }
    uuid[digits / 2] = static_cast<uint8_t>(uuid[digits / 2] << 4 | digit);
    ++digits;
  }
  if (digits != 32) {
    return Fail(ErrorCode::kInvalid,
                "a UUID has 32 hexadecimal digits: 12345678-1234-1234-1234-123456789abc");
  }
  line.config.machine.uuid = uuid;
  return {};
}

Result<> Rtc(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, ""));
  machine::RtcConfig& rtc = line.config.machine.rtc;
  std::string base = Take(&properties, "base", "utc");
  if (base == "utc" || base == "localtime") {
    rtc.base =
        base == "utc" ? machine::RtcConfig::Base::kUtc : machine::RtcConfig::Base::kLocaltime;
  } else {
    tm date = {};
    const char* end = strptime(base.c_str(), "%Y-%m-%d", &date);
    if (end && *end == 'T') end = strptime(end, "T%H:%M:%S", &date);
    if (!end || *end) {
      return Fail(
          ErrorCode::kInvalid,
          fmt::format("base={}: must be utc, localtime, or a date such as 2026-01-31T12:00:00",
                      base));
    }
    rtc.base = machine::RtcConfig::Base::kDate;
    rtc.date_s = timegm(&date);
  }
  if (Take(&properties, "clock", "host") != "host") return Refuse("clock= other than host");
  if (Take(&properties, "driftfix", "none") != "none") return Refuse("driftfix= other than none");
  return RefuseRest(properties, "base clock driftfix");
}

Result<> Boot(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "order"));
  machine::BootConfig& boot = line.config.machine.boot;
  boot.order = Take(&properties, "order", boot.order);
  if (boot.order.find_first_not_of("acdnop") != std::string::npos) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("order={}: the letters are a, b (floppies), c (disk), d (cdrom), n (network)",
                    boot.order));
  }
  if (properties.Find("menu")) boot.menu = TRY(TakeBool(&properties, "menu", false));
  if (properties.Find("splash-time")) {
    boot.splash_time_ms =
        static_cast<unsigned>(TRY(TakeNumber(&properties, "splash-time", 0, 0, 0xffff)));
  }
  if (TRY(TakeBool(&properties, "strict", false))) return Refuse("strict=on");
  return RefuseRest(properties, "order menu splash-time strict");
}

Result<> FwCfg(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "name"));
  std::string name = Take(&properties, "name"), path = Take(&properties, "file"),
              text = Take(&properties, "string");
  if (name.empty() || name.size() > 55)
    return Fail(ErrorCode::kInvalid, "name= must have 1 to 55 characters");
  if (path.empty() == text.empty())
    return Fail(ErrorCode::kInvalid, "either file= or string= is needed");
  TRY(RefuseRest(properties, "name file string"));
  std::vector<uint8_t> data(text.begin(), text.end());
  if (!path.empty()) data = TRY(ReadSmallFile(path, kFwCfgFileMax));
  line.config.machine.fw_cfg_files.emplace_back(name, std::move(data));
  return {};
}

Result<> Global(CommandLine& line, std::string_view argument) {
  // What these ask for is so: there is no sleep state S3 or S4, and lost timer ticks are delivered
  // late.
  for (std::string_view fulfilled :
       {"PIIX4_PM.disable_s3=1", "PIIX4_PM.disable_s4=1", "ICH9-LPC.disable_s3=1",
        "ICH9-LPC.disable_s4=1", "kvm-pit.lost_tick_policy=delay"}) {
    if (argument == fulfilled) return {};
  }
  size_t equals = argument.find('='), dot = argument.substr(0, equals).find('.');
  if (equals == std::string_view::npos || dot == std::string_view::npos) {
    return Fail(ErrorCode::kInvalid, "must be DRIVER.PROPERTY=VALUE");
  }
  TRY(FindDeviceType(std::string(argument.substr(0, dot))));
  line.globals.emplace_back(std::string(argument.substr(0, equals)),
                            std::string(argument.substr(equals + 1)));
  return {};
}

Result<> NoAcpi(CommandLine& line, std::string_view) {
  line.config.machine.options.emplace_back("acpi", "off");
  return {};
}
Result<> NoHpet(CommandLine& line, std::string_view) {
  line.config.machine.options.emplace_back("hpet", "off");
  return {};
}
Result<> Kernel(CommandLine& line, std::string_view argument) {
  line.config.machine.boot.kernel = argument;
  return {};
}
Result<> Initrd(CommandLine& line, std::string_view argument) {
  line.config.machine.boot.initrd = argument;
  return {};
}
Result<> Append(CommandLine& line, std::string_view argument) {
  line.config.machine.boot.cmdline = argument;
  return {};
}
Result<> Bios(CommandLine& line, std::string_view argument) {
  line.config.machine.boot.firmware = argument;
  return {};
}
Result<> DataDirectory(CommandLine& line, std::string_view argument) {
  line.config.machine.boot.data_dirs.emplace_back(argument);
  return {};
}

Result<> Device(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "driver"));
  std::string driver = Take(&properties, "driver");
  if (driver == "help" || driver == "?") {
    static constexpr std::pair<DeviceBus, const char*> kBuses[] = {
        {DeviceBus::kPci, "PCI"},
        {DeviceBus::kIsa, "ISA"},
        {DeviceBus::kVirtioMmio, "virtio-bus"},
        {DeviceBus::kVirtioSerial, "virtio-serial-bus"}};
    for (const DeviceType& type : DeviceTypes()) {
      const char* bus = "";
      for (const auto& [kind, name] : kBuses) bus = kind == type.bus ? name : bus;
      line.information +=
          fmt::format("name \"{}\", bus {}, desc \"{}\"\n", type.name, bus, type.description);
    }
    return {};
  }
  if (driver.empty())
    return Fail(ErrorCode::kInvalid, "driver= is missing; -device help lists the drivers");
  const DeviceType* type = TRY(FindDeviceType(driver));
  if (AsksForHelp(properties)) {
    line.information = DescribeDevice(*type);
    return {};
  }
  std::string id = Take(&properties, "id");
  for (const DeviceSpec& other : line.config.machine.devices) {
    if (!id.empty() && other.id == id)
      return Fail(ErrorCode::kExists, fmt::format("id={}: another device has this id", id));
  }
  line.config.machine.devices.push_back({driver, id, std::move(properties)});
  return {};
}

Result<> Debugcon(CommandLine& line, std::string_view argument) {
  bool monitor = false;
  host::ChardevConfig chardev = TRY(ParseShortChardev(argument, "debugcon", &monitor));
  if (monitor) return Refuse("mon: on a debug console");
  line.config.machine.devices.push_back(
      {"isa-debugcon", "", {{"chardev", chardev.id}, {"iobase", "0xe9"}}});
  if (!argument.starts_with("chardev:")) line.config.chardevs.push_back(std::move(chardev));
  return {};
}

Result<> Action(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, ""));
  VmConfig& config = line.config;
  for (const auto& [name, value] : properties.all()) {
    if (name == "reboot" && value == "reset") {
      config.reboot = RebootAction::kReset;
    } else if (name == "reboot" && value == "shutdown") {
      config.reboot = RebootAction::kShutdown;
    } else if (name == "shutdown" && value == "poweroff") {
      config.shutdown = ShutdownAction::kExit;
    } else if (name == "shutdown" && value == "pause") {
      config.shutdown = ShutdownAction::kPause;
    } else if (name == "panic" && value == "pause") {
      config.panic = PanicAction::kPause;
    } else if (name == "panic" && value == "shutdown") {
      config.panic = PanicAction::kShutdown;
    } else if (name == "panic" && value == "exit-failure") {
      config.panic = PanicAction::kExitFailure;
    } else if (name == "panic" && value == "none") {
      config.panic = PanicAction::kNone;
    } else {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("{}={}: known are reboot=reset|shutdown, shutdown=poweroff|pause and "
                              "panic=pause|shutdown|exit-failure|none",
                              name, value));
    }
  }
  return {};
}

Result<> Incoming(CommandLine& line, std::string_view argument) {
  if (!argument.starts_with("file:")) return Refuse("incoming state other than file:PATH");
  line.config.load_path = argument.substr(5);
  return {};
}

Result<> Overcommit(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, ""));
  line.config.lock_memory = TRY(TakeBool(&properties, "mem-lock", false));
  if (TRY(TakeBool(&properties, "cpu-pm", false))) return Refuse("cpu-pm=on");
  return RefuseRest(properties, "mem-lock cpu-pm");
}

Result<> FinishMachine(CommandLine& line) {
  machine::MachineConfig& config = line.config.machine;
  if (config.boot.kernel.empty() && (!config.boot.cmdline.empty() || !config.boot.initrd.empty())) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{} is given without a kernel; add -kernel FILE",
                            config.boot.cmdline.empty() ? "-initrd" : "-append"));
  }
  for (const auto& [name, value] : line.globals) {
    size_t dot = name.find('.');
    for (DeviceSpec& device : config.devices) {
      std::string property = name.substr(dot + 1);
      if (device.driver == name.substr(0, dot) && !device.properties.Find(property))
        device.properties.Set(property, value);
    }
  }
  bool backend_found = line.memory_backend.empty();
  for (BackendConfig& backend : line.memory_backends) {
    if (backend.id != line.memory_backend) {
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("{}: not supported yet: memory that isn't the machine's; add "
                              "-machine memory-backend={}",
                              backend.option, backend.id));
    }
    backend_found = true;
    uint64_t size = TRY(TakeSize(&backend.properties, "size", config.ram_bytes));
    if (line.ram_given && size != config.ram_bytes) {
      return Fail(ErrorCode::kInvalid, fmt::format("{}: size= and -m differ", backend.option));
    }
    config.ram_bytes = size;
    config.ram_options.prealloc =
        TRY(TakeBool(&backend.properties, "prealloc", config.ram_options.prealloc));
    config.ram_options.shared =
        TRY(TakeBool(&backend.properties, "share", config.ram_options.shared));
    uint64_t huge_size = TRY(TakeSize(&backend.properties, "hugetlbsize", 2 << 20));
    if (TRY(TakeBool(&backend.properties, "hugetlb", false))) {
      config.ram_options.huge_pages = huge_size == 1 << 30 ? RamOptions::HugePages::kHugetlb1G
                                                           : RamOptions::HugePages::kHugetlb2M;
    }
    Result<> rest = RefuseRest(backend.properties, "size prealloc share hugetlb hugetlbsize");
    if (!rest) return Fail(std::move(rest).error().In(backend.option));
  }
  if (!backend_found) {
    return Fail(ErrorCode::kNotFound,
                fmt::format("-machine memory-backend={0}: there is no -object with id={0}",
                            line.memory_backend));
  }
  return {};
}

}  // namespace kvartz::vmm
