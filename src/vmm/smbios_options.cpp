// -smbios type=N,field=value...
#include <fmt/core.h>

#include "vmm/command_line.h"
#include "vmm/keyval.h"
#include "vmm/machine_options.h"

namespace kvartz::vmm {
namespace {

using machine::SmbiosConfig;

struct Field {
  int type;
  const char* name;
  std::string SmbiosConfig::* member;
};
constexpr Field kFields[] = {
    {0, "vendor", &SmbiosConfig::bios_vendor},
    {0, "version", &SmbiosConfig::bios_version},
    {0, "date", &SmbiosConfig::bios_date},
    {1, "manufacturer", &SmbiosConfig::manufacturer},
    {1, "product", &SmbiosConfig::product},
    {1, "version", &SmbiosConfig::version},
    {1, "serial", &SmbiosConfig::serial},
    {1, "sku", &SmbiosConfig::sku},
    {1, "family", &SmbiosConfig::family},
    {2, "manufacturer", &SmbiosConfig::board_manufacturer},
    {2, "product", &SmbiosConfig::board_product},
    {2, "version", &SmbiosConfig::board_version},
    {2, "serial", &SmbiosConfig::board_serial},
    {2, "asset", &SmbiosConfig::board_asset},
    {3, "manufacturer", &SmbiosConfig::chassis_manufacturer},
    {3, "version", &SmbiosConfig::chassis_version},
    {3, "serial", &SmbiosConfig::chassis_serial},
    {3, "asset", &SmbiosConfig::chassis_asset},
    {3, "sku", &SmbiosConfig::chassis_sku},
};

}  // namespace

Result<> AddSmbios(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, ""));
  if (!properties.Find("type"))
    return Fail(ErrorCode::kUnsupported, "type= is missing (file= is not supported yet)");
  uint64_t type = TRY(TakeNumber(&properties, "type", 0, 0, 255));
  SmbiosConfig& smbios = line.config.machine.smbios;
  if (type == 11) {
    for (const auto& [name, value] : properties.all()) {
      if (name != "value")
        return Fail(ErrorCode::kUnsupported, fmt::format("{}=: type 11 takes value= only", name));
      smbios.oem_strings.push_back(value);
    }
    return {};
  }
  if (type > 3)
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: type={} (0 to 3, and 11)", type));
  if (type == 1 && properties.Find("uuid")) {
    TRY(Uuid(line, Take(&properties, "uuid")));
  }
  std::string known;
  for (const Field& field : kFields) {
    if (field.type != static_cast<int>(type)) continue;
    known += (known.empty() ? "" : " ") + std::string(field.name);
    if (properties.Find(field.name)) smbios.*field.member = Take(&properties, field.name);
  }
  return RefuseRest(properties, known);
}

}  // namespace kvartz::vmm
