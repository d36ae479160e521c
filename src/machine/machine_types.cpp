#include <string_view>

#include "machine/machine_config.h"

namespace kvartz::machine {

const std::vector<MachineType>& MachineTypes() {
  static const std::vector<MachineType> kTypes = {
      {"pc-i440fx-kvartz-0.1", "pc", BoardKind::kPc, "PC (i440FX + PIIX3), the default"},
      {"microvm-kvartz-0.1", "microvm", BoardKind::kMicrovm,
       "minimal machine: virtio-mmio, no PCI, fastest start"},
  };
  return kTypes;
}

Result<const MachineType*> FindMachineType(const std::string& name) {
  std::vector<std::string_view> names;
  for (const MachineType& type : MachineTypes()) {
    if (name == type.name || name == type.alias) return &type;
    names.push_back(type.name);
    if (!type.alias.empty()) names.push_back(type.alias);
  }
  // Other VMMs' versions of the same board (pc-i440fx-7.2, pc-i440fx-jammy, pc-i440fx-rhel7.6.0)
  // are the newest of ours.
  constexpr std::string_view kForeign = "pc-i440fx-", kOurs = "pc-i440fx-kvartz";
  if (name.starts_with(kForeign) && name.size() > kForeign.size() && !name.starts_with(kOurs))
    return FindMachineType("pc");
  std::string_view nearest = NearestName(name, names);
  return Fail(ErrorCode::kNotFound,
              "machine type '" + name + "' is not known" +
                  (nearest.empty() ? std::string("; see -machine help")
                                   : ", did you mean '" + std::string(nearest) + "'?"));
}

}  // namespace kvartz::machine
