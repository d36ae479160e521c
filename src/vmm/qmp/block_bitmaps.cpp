// block-dirty-bitmap-*.
#include "vmm/qmp/block_bitmaps.h"

#include <bit>
#include <boost/json/array.hpp>

#include "vmm/qmp/block_commands.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using block::NodePtr;
using Kind = QmpType::Kind;
using Value = Result<json::value>;

constexpr QmpMember kAdd[] = {{"node", kQmpString},
                              {"name", kQmpString},
                              {"granularity", kQmpInt, kOptional},
                              {"persistent", kQmpBool, kOptional},
                              {"disabled", kQmpBool, kOptional}};
constexpr QmpMember kName[] = {{"node", kQmpString}, {"name", kQmpString}};
// A bitmap of the same node by its name, or of any node.
constexpr QmpType kSource{.kind = Kind::kEither, .element = &kQmpString, .members = kName};
constexpr QmpType kSources{.kind = Kind::kArray, .element = &kSource};
constexpr QmpMember kMerge[] = {
    {"node", kQmpString}, {"target", kQmpString}, {"bitmaps", kSources}};

template <Result<> (*kAction)(Storage&, const json::object&)>
Value Run(Vm& vm, const json::object& arguments) {
  TRY(kAction(vm.storage(), arguments));
  return Done();
}

constexpr auto kFiber = QmpCommand::Where::kFiber;
constexpr QmpCommand kCommands[] = {
    {"block-dirty-bitmap-add", kAdd, Run<BitmapAdd>, kFiber},
    {"block-dirty-bitmap-clear", kName, Run<BitmapClear>, kFiber},
    {"block-dirty-bitmap-disable", kName, Run<BitmapDisable>, kFiber},
    {"block-dirty-bitmap-enable", kName, Run<BitmapEnable>, kFiber},
    {"block-dirty-bitmap-merge", kMerge, Run<BitmapMerge>, kFiber},
    {"block-dirty-bitmap-remove", kName, Run<BitmapRemove>, kFiber},
};

}  // namespace

const std::span<const QmpMember> kBitmapAddMembers = kAdd;
const std::span<const QmpMember> kBitmapNameMembers = kName;
const std::span<const QmpMember> kBitmapMergeMembers = kMerge;

std::span<const QmpCommand> BlockBitmapCommands() { return kCommands; }

Result<NamedBitmap> NamedBitmapOf(Storage& storage, const json::object& arguments,
                                  const char* name) {
  return NamedBitmap{TRY(storage.RequireNode(Text(arguments, "node"))), Text(arguments, name)};
}

Result<> BitmapAdd(Storage& storage, const json::object& arguments) {
  NamedBitmap bitmap = TRY(NamedBitmapOf(storage, arguments));
  uint64_t granularity = TRY(Count(arguments, "granularity", 65536));
  if (!std::has_single_bit(granularity) || granularity < 512 || granularity > (1u << 31))
    return Fail(ErrorCode::kInvalid, "Granularity must be a power of 2 from 512 to 2147483648");
  return AddBitmap(storage.registry(), bitmap.node,
                   {.name = bitmap.name,
                    .granularity = static_cast<uint32_t>(granularity),
                    .persistent = Flag(arguments, "persistent"),
                    .disabled = Flag(arguments, "disabled")});
}

Result<> BitmapRemove(Storage& storage, const json::object& arguments) {
  NamedBitmap bitmap = TRY(NamedBitmapOf(storage, arguments));
  return RemoveBitmap(storage.registry(), bitmap.node, bitmap.name);
}

Result<> BitmapClear(Storage& storage, const json::object& arguments) {
  NamedBitmap bitmap = TRY(NamedBitmapOf(storage, arguments));
  return ClearBitmap(storage.registry(), bitmap.node, bitmap.name);
}

Result<> BitmapEnable(Storage& storage, const json::object& arguments) {
  NamedBitmap bitmap = TRY(NamedBitmapOf(storage, arguments));
  return EnableBitmap(storage.registry(), bitmap.node, bitmap.name, true);
}

Result<> BitmapDisable(Storage& storage, const json::object& arguments) {
  NamedBitmap bitmap = TRY(NamedBitmapOf(storage, arguments));
  return EnableBitmap(storage.registry(), bitmap.node, bitmap.name, false);
}

Result<> BitmapMerge(Storage& storage, const json::object& arguments) {
  block::Registry& registry = storage.registry();
  NamedBitmap target = TRY(NamedBitmapOf(storage, arguments, "target"));
  // All are looked up before anything is merged.
  std::vector<std::shared_ptr<block::DirtyBitmap>> sources;
  for (const json::value& one : arguments.at("bitmaps").as_array()) {
    NamedBitmap source = one.is_string() ? NamedBitmap{target.node, std::string(one.as_string())}
                                         : TRY(NamedBitmapOf(storage, one.as_object()));
    sources.push_back(TRY(CopyOfBitmap(registry, source.node, source.name)));
  }
  for (const auto& source : sources) TRY(MergeBitmap(registry, target.node, target.name, *source));
  return {};
}

}  // namespace kvartz::vmm
