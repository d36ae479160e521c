#include "machine/board_options.h"

#include <unistd.h>

#include <cctype>
#include <charconv>
#include <ctime>

#include "device/core/fw_cfg.h"
#include "machine/wall_clock.h"

namespace kvartz::machine {

namespace {
constexpr int64_t kSecond = 1000000000;
}

Properties MachineOptions(const MachineConfig& config) {
  Properties properties;
  for (const auto& [name, value] : config.options) properties.Set(name, value);
  return properties;
}

Result<cpu::IrqchipMode> ChooseIrqchip(const std::string& mode, const std::string& accel) {
  if (!mode.empty() && mode != "on" && mode != "off" && mode != "split") {
    return Fail(ErrorCode::kInvalid,
                "machine option kernel-irqchip: '" + mode + "' is none of on, off, split");
  }
  if (accel != "kvm") {
    if (mode == "on" || mode == "split") {
      return Fail(ErrorCode::kUnsupported,
                  "kernel-irqchip=" + mode + " needs KVM; leave it out or use -accel kvm");
    }
    return cpu::IrqchipMode::kUser;
  }
  if (mode == "off")
    return Fail(ErrorCode::kUnsupported, "not supported: kernel-irqchip=off with KVM; use split");
  return mode == "split" ? cpu::IrqchipMode::kUser : cpu::IrqchipMode::kKernel;
}

Result<uint64_t> ParseSize(const std::string& what, const std::string& text) {
  uint64_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  std::string suffix(end, text.data() + text.size());
  unsigned shift = 0;
  if (suffix.size() == 1) {
    switch (std::toupper(static_cast<unsigned char>(suffix[0]))) {
      case 'K':
        shift = 10;
        break;
      case 'M':
        shift = 20;
        break;
      case 'G':
        shift = 30;
        break;
      default:
        error = std::errc::invalid_argument;
    }
  }
  if (error != std::errc() || suffix.size() > 1 || value << shift >> shift != value) {
    return Fail(ErrorCode::kInvalid, what + ": '" + text + "' is not a size; write 512M or 3G");
  }
  return value << shift;
}

Result<int> ParsePciAddress(const std::string& id, const Properties& properties) {
  if (const std::string* bus = properties.Find("bus"); bus && *bus != "pci.0" && *bus != "pci") {
    return Fail(ErrorCode::kNotFound,
                "device '" + id + "': there is no bus '" + *bus + "', only pci.0");
  }
  const std::string* text = properties.Find("addr");
  if (!text) return -1;
  unsigned slot = 0, function = 0;
  const char* begin = text->data();
  const char* end = begin + text->size();
  if (text->starts_with("0x") || text->starts_with("0X")) begin += 2;
  auto [dot, error] = std::from_chars(begin, end, slot, 16);
  if (error == std::errc() && dot != end) {
    if (*dot == '.') {
      if (end - dot > 3 && dot[1] == '0' && (dot[2] == 'x' || dot[2] == 'X')) dot += 2;
      auto [rest, function_error] = std::from_chars(dot + 1, end, function, 16);
      if (function_error != std::errc() || rest != end) error = std::errc::invalid_argument;
    } else {
      error = std::errc::invalid_argument;
    }
  }
  if (error != std::errc() || slot > 31 || function > 7) {
    return Fail(ErrorCode::kInvalid,
                "device '" + id + "': addr=" + *text +
                    " is no PCI address; write SLOT or SLOT.FUNCTION (hexadecimal, to 1f.7)");
  }
  return slot << 3 | function;
}

Result<bool> ParseMultifunction(const std::string& id, const Properties& properties) {
  const std::string* text = properties.Find("multifunction");
  if (!text || *text == "off" || *text == "false" || *text == "no") return false;
  if (*text == "on" || *text == "true" || *text == "yes") return true;
  return Fail(ErrorCode::kInvalid,
              "device '" + id + "': multifunction=" + *text + " is neither on nor off");
}

Result<std::optional<uint32_t>> ParseBootIndex(const std::string& id,
                                               const Properties& properties) {
  const std::string* text = properties.Find("bootindex");
  if (!text) return std::optional<uint32_t>();
  uint32_t index = 0;
  auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), index);
  if (error != std::errc() || end != text->data() + text->size()) {
    return Fail(ErrorCode::kInvalid, "device '" + id + "': bootindex=" + *text + " is no number");
  }
  return index;
}

Result<BootFile> FindFirmware(const BootConfig& boot, const std::string& fallback) {
  const std::string& name = boot.firmware.empty() ? fallback : boot.firmware;
  std::vector<std::string> directories = boot.data_dirs;
  for (const char* directory : {"/usr/share/seabios", "/usr/share/qemu"})
    directories.push_back(directory);
  if (!boot.firmware.empty() && access(name.c_str(), F_OK) == 0)
    return BootFile::Open("firmware", name);
  if (name.find('/') == std::string::npos) {
    for (const std::string& directory : directories) {
      std::string path = directory + "/" + name;
      if (access(path.c_str(), F_OK) == 0) return BootFile::Open("firmware", path);
    }
  }
  if (boot.firmware.empty()) {
    return Fail(
        ErrorCode::kNotFound,
        "there is no kernel and no firmware: give -kernel, or install the package seabios (" +
            name + ")");
  }
  return BootFile::Open("firmware", name);
}

Result<> AddUserFiles(const MachineConfig& config, FwCfg& fw_cfg) {
  for (const auto& [name, data] : config.fw_cfg_files) {
    if (name.empty() || name.size() > FwCfg::kMaxName) {
      return Fail(ErrorCode::kInvalid,
                  "-fw_cfg name='" + name + "': names have 1 to 55 characters");
    }
    fw_cfg.SetFile(name, data);
  }
  return {};
}

int64_t RtcOffset(const RtcConfig& config) {
  time_t now = WallClock::Instance().NowNs() / kSecond;
  switch (config.base) {
    case RtcConfig::Base::kUtc:
      return 0;
    case RtcConfig::Base::kLocaltime: {
      tm local;
      localtime_r(&now, &local);
      return local.tm_gmtoff;
    }
    case RtcConfig::Base::kDate:
      return config.date_s - now;
  }
  return 0;
}

}  // namespace kvartz::machine
