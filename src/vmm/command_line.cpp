#include "vmm/command_line.h"

#include <fmt/core.h>

#include "base/text.h"
#include "vmm/machine_options.h"

namespace kvartz::vmm {
namespace {

// Options that other programs and scripts pass and that ask for what is so anyway.
Result<> Harmless(CommandLine&, std::string_view) { return {}; }

Result<> Help(CommandLine& line, std::string_view) {
  line.information = HelpText();
  return {};
}
Result<> Version(CommandLine& line, std::string_view) {
  line.information = VersionText();
  return {};
}
Result<> Nographic(CommandLine& line, std::string_view) {
  line.nographic = true;
  return {};
}
Result<> NoDefaults(CommandLine& line, std::string_view) {
  line.no_defaults = true;
  return {};
}
Result<> NoReboot(CommandLine& line, std::string_view) {
  line.config.reboot = RebootAction::kShutdown;
  return {};
}
Result<> NoShutdown(CommandLine& line, std::string_view) {
  line.config.shutdown = ShutdownAction::kPause;
  return {};
}
Result<> Paused(CommandLine& line, std::string_view) {
  line.config.start_paused = true;
  return {};
}
Result<> Daemonize(CommandLine& line, std::string_view) {
  line.config.daemonize = true;
  return {};
}
Result<> Pidfile(CommandLine& line, std::string_view argument) {
  line.config.pidfile = argument;
  return {};
}
Result<> LogFile(CommandLine& line, std::string_view argument) {
  line.config.log_file = argument;
  return {};
}
Result<> LogCategories(CommandLine& line, std::string_view argument) {
  line.config.log_categories = argument;
  return {};
}
Result<> PerfMap(CommandLine& line, std::string_view) {
  line.config.perf_map = true;
  return {};
}
Result<> Serial(CommandLine& line, std::string_view argument) {
  if (line.serials.size() >= 4)
    return Fail(ErrorCode::kNoSpace, "a machine has at most 4 serial ports");
  line.serials.emplace_back(argument);
  return {};
}
Result<> Parallel(CommandLine&, std::string_view argument) {
  if (argument == "none" || argument == "null") return {};
  return Fail(ErrorCode::kUnsupported, "not supported yet: parallel ports; use -parallel none");
}
Result<> Display(CommandLine&, std::string_view argument) {
  if (argument == "none") return {};
  return Fail(ErrorCode::kUnsupported,
              "not supported yet: displays; use -display none or -nographic");
}
Result<> Vga(CommandLine&, std::string_view argument) {
  if (argument == "none") return {};
  return Fail(ErrorCode::kUnsupported,
              "not supported yet: graphics cards; use -vga none and a serial console");
}
Result<> Monitor(CommandLine& line, std::string_view argument) {
  line.monitor_given = true;
  if (argument != "none") line.monitors.emplace_back(argument);
  return {};
}
Result<> Qmp(CommandLine& line, std::string_view argument) {
  return AddMonitor(line, argument, MonitorConfig::Mode::kQmp, false);
}
Result<> QmpPretty(CommandLine& line, std::string_view argument) {
  return AddMonitor(line, argument, MonitorConfig::Mode::kQmp, true);
}
Result<> Sandbox(CommandLine&, std::string_view argument) {
  if (argument.starts_with("off")) return {};
  return Fail(ErrorCode::kUnsupported,
              "not supported yet; confine the process from outside, or use -sandbox off");
}
Result<> Disk(CommandLine&, std::string_view argument) {
  return Fail(ErrorCode::kUnsupported,
              fmt::format("not supported yet: IDE disks; use -drive file={},format=raw,if=virtio",
                          argument));
}

constexpr OptionRow kRows[] = {
    {"h", nullptr, "the same as -help", Help},
    {"help", nullptr, "print this list and exit", Help},
    {"version", nullptr, "print the version and exit", Version},

    {"machine", "TYPE[,option=value...]", "machine type and its options; 'help' lists the types",
     Machine},
    {"M", "TYPE[,option=value...]", "the same as -machine", Machine},
    {"accel", "NAME[,option=value...]",
     "engine: kvm, or kvartz (alias tcg; jit=on|off, tb-size=MIB); several: the first that is fit",
     Accel},
    {"enable-kvm", nullptr, "the same as -accel kvm", EnableKvm},
    {"cpu", "MODEL[,+feature][,-feature]", "processor model; 'help' lists the models", Cpu},
    {"smp", "N[,sockets=][,cores=][,threads=]",
     "number of processors and their topology (default 1)", Smp},
    {"m", "SIZE", "guest memory in MiB, or with a suffix (default 128M)", Memory},
    {"mem-prealloc", nullptr, "take all guest memory from the host at the start", MemPrealloc},
    {"name", "NAME[,process=TITLE]", "name of the guest, and of the process", Name},
    {"uuid", "UUID", "the machine's UUID", Uuid},
    {"rtc", "base=utc|localtime|DATE", "the real-time clock at the start", Rtc},
    {"boot", "order=LETTERS[,menu=on]", "what the firmware boots: c disk, d cdrom, n network",
     Boot},
    {"smbios", "type=N,field=value...", "texts of the SMBIOS tables", AddSmbios},
    {"fw_cfg", "name=NAME,file=FILE|string=TEXT", "a file that the guest's firmware can read",
     FwCfg},
    {"global", "DRIVER.PROPERTY=VALUE", "a default for a property of a device", Global},
    {"no-acpi", nullptr, "no ACPI tables", NoAcpi},
    {"no-hpet", nullptr, "no HPET", NoHpet},

    {"kernel", "FILE", "kernel: bzImage, ELF with a PVH note, or multiboot", Kernel},
    {"initrd", "FILE", "initial RAM disk, or multiboot modules", Initrd},
    {"append", "TEXT", "the kernel's command line", Append},
    {"bios", "FILE", "firmware image", Bios},
    {"L", "DIRECTORY", "where firmware is searched first", DataDirectory},

    {"drive", "file=FILE,format=FORMAT,if=virtio[,option=value...]",
     "a disk: cache=, snapshot=on, discard=, detect-zeroes=, copy-on-read=, throttling.*=, "
     "werror=, "
     "readonly=",
     AddDrive},
    {"blockdev", "driver=DRIVER,node-name=ID,...", "the host's side of a disk", AddBlockdev},
    {"device", "DRIVER[,property=value...]", "a device; 'help' lists the drivers", Device},
    {"object", "TYPE,id=ID[,property=value...]",
     "iothread, memory-backend-ram, memory-backend-memfd, secret, throttle-group, tls-creds-psk, "
     "tls-creds-x509",
     AddObject},
    {"netdev", "TYPE,id=ID[,option=value...]", "the host's side of a network card: user, tap",
     AddNetdev},
    {"nic", "TYPE[,model=DRIVER][,mac=MAC]...",
     "a network card with its host side; none: no default card", AddNic},
    {"net", "nic|user|tap|none[,...]", "the older spelling of -nic", AddNet},

    {"chardev", "KIND,id=ID[,option=value...]",
     "a character device: stdio, socket, pty, file, null...", AddChardev},
    {"serial", "DEVICE",
     "serial port on stdio, mon:stdio, pty, file:, unix:, tcp:, chardev:ID, null or none", Serial},
    {"parallel", "none", "parallel ports are not supported yet", Parallel},
    {"monitor", "DEVICE", "human monitor on stdio, unix:, tcp:...", Monitor},
    {"qmp", "DEVICE", "QMP on unix:PATH,server=on,wait=off, tcp:HOST:PORT...", Qmp},
    {"qmp-pretty", "DEVICE", "as -qmp, with line breaks", QmpPretty},
    {"mon", "chardev=ID[,mode=control|readline]", "a monitor on a chardev", AddMon},
    {"debugcon", "DEVICE", "what firmware writes to port 0xe9", Debugcon},
    {"nographic", nullptr, "serial console and monitor on the terminal; Ctrl-a h lists the keys",
     Nographic},
    {"display", "none", "displays are not supported yet", Display},
    {"vga", "none", "graphics cards are not supported yet", Vga},
    {"k", "LAYOUT", "keyboard layout (there is no display that would need it)", Harmless},

    {"S", nullptr, "wait for 'cont' before the first instruction", Paused},
    {"no-reboot", nullptr, "exit when the guest reboots", NoReboot},
    {"no-shutdown", nullptr, "stay when the guest powers off", NoShutdown},
    {"action", "reboot=|shutdown=|panic=", "what follows a reboot, power-off or panic of the guest",
     Action},
    {"incoming", "file:PATH", "go on with the machine that was saved there", Incoming},
    {"daemonize", nullptr, "go to the background when the machine is set up", Daemonize},
    {"pidfile", "FILE", "write the process id there", Pidfile},
    {"D", "FILE", "write the log there", LogFile},
    {"d", "ITEM[,ITEM...]",
     "log items: guest_errors, unimp, int, cpu_reset, in_asm, op, out_asm, exec", LogCategories},
    {"perfmap", nullptr, "name translated code for perf, in /tmp/perf-PID.map", PerfMap},
    {"overcommit", "mem-lock=on|off", "keep guest memory out of swap", Overcommit},
    {"nodefaults", nullptr, "no default serial port, monitor and network card", NoDefaults},
    {"sandbox", "off", "a confined process is not supported yet", Sandbox},
    {"msg", "timestamp=on|off", "accepted; log lines have no time", Harmless},
    {"no-user-config", nullptr, "accepted; no configuration files are read", Harmless},
    {"no-fd-bootchk", nullptr, "accepted; there are no floppies", Harmless},
};

// Known elsewhere, not supported here yet: refused by name.
constexpr std::string_view kUnsupported[] = {
    "add-fd",
    "acpitable",
    "alt-grab",
    "async-teardown",
    "audio",
    "audiodev",
    "cdrom",
    "chroot",
    "compat",
    "ctrl-grab",
    "dfilter",
    "dtb",
    "dump-vmstate",
    "echr",
    "fda",
    "fdb",
    "fsdev",
    "full-screen",
    "gdb",
    "icount",
    "iscsi",
    "loadvm",
    "mem-path",
    "mtdblock",
    "numa",
    "only-migratable",
    "option-rom",
    "pflash",
    "plugin",
    "preconfig",
    "readconfig",
    "rotate",
    "runas",
    "s",
    "sd",
    "seed",
    "semihosting",
    "set",
    "singlestep",
    "snapshot",
    "spice",
    "tpmdev",
    "trace",
    "usb",
    "usbdevice",
    "virtfs",
    "vnc",
    "watchdog",
    "watchdog-action",
    "win2k-hack",
    "writeconfig",
    "xen-domid",
};
constexpr const char* kDisks[] = {"hda", "hdb", "hdc", "hdd"};

const OptionRow* FindRow(std::string_view name) {
  for (const OptionRow& row : OptionRows()) {
    if (name == row.name) return &row;
  }
  return nullptr;
}

std::unexpected<Error> Refused(std::string_view option, Result<> why) {
  return Fail(std::move(why).error().In(std::string(option)));
}

Result<> Unknown(std::string_view option, std::string_view name) {
  for (std::string_view known : kUnsupported) {
    if (name == known)
      return Fail(ErrorCode::kUnsupported, fmt::format("not supported yet: -{}", name));
  }
  std::vector<std::string_view> names;
  for (const OptionRow& row : OptionRows()) names.emplace_back(row.name);
  std::string_view nearest = NearestName(name, names);
  return Fail(ErrorCode::kInvalid,
              nearest.empty()
                  ? fmt::format("{}: unknown option; -help lists the options", option)
                  : fmt::format("{}: unknown option; did you mean -{}?", option, nearest));
}

}  // namespace

std::span<const OptionRow> OptionRows() { return kRows; }

Result<CommandLine> ParseCommandLine(std::span<const char* const> arguments) {
  CommandLine line;
  for (size_t i = 0; i < arguments.size(); ++i) {
    std::string_view option = arguments[i];
    if (!option.starts_with('-') || option == "-") return Refused(option, Disk(line, option));
    std::string_view name = option.substr(option.starts_with("--") ? 2 : 1);
    for (const char* disk : kDisks) {
      if (name == disk) {
        return Refused(option, Disk(line, i + 1 < arguments.size() ? arguments[i + 1] : "FILE"));
      }
    }
    const OptionRow* row = FindRow(name);
    if (!row) TRY(Unknown(option, name));
    std::string_view argument;
    std::string shown(option);
    if (row->argument) {
      if (i + 1 >= arguments.size()) {
        return Fail(ErrorCode::kInvalid,
                    fmt::format("{}: an argument is missing: {}", option, row->argument));
      }
      argument = arguments[++i];
      shown += " " + std::string(argument.substr(0, 200));
    }
    Result<> handled = row->handle(line, argument);
    if (!handled) return Fail(std::move(handled).error().In(shown));
    if (!line.information.empty()) return line;
  }
  TRY(FinishMachine(line));
  TRY(FinishBackends(line));
  return line;
}

std::string HelpText() {
  std::string text =
      VersionText() +
      "usage: kvartz-vmm [option...]\n\n"
      "Runs one virtual machine. For example, a kernel and an initial RAM disk on the terminal:\n"
      "  kvartz-vmm -m 512 -nographic -kernel vmlinuz -initrd initrd.img -append console=ttyS0\n\n"
      "Options (commas within values are doubled; many also take a JSON object):\n";
  for (const OptionRow& row : OptionRows()) {
    std::string left = fmt::format("  -{}{}{}", row.name, row.argument ? " " : "",
                                   row.argument ? row.argument : "");
    if (left.size() > 38) {
      text += fmt::format("{}\n{:40}{}\n", left, "", row.help);
    } else {
      text += fmt::format("{:40}{}\n", left, row.help);
    }
  }
  text +=
      "\nOn a console that is shared with the monitor: Ctrl-a x ends the machine, Ctrl-a c "
      "switches to the\n"
      "monitor and back, Ctrl-a h lists the other keys.\n";
  return text;
}

std::string VersionText() { return "Kvartz virtual machine monitor (kvartz-vmm) version 0.1.0\n"; }

}  // namespace kvartz::vmm
