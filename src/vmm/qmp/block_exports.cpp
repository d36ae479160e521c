// nbd-server-*, block-export-*: nodes that others reach.
#include <fmt/core.h>

#include <boost/json/array.hpp>

#include "vmm/qmp/block_commands.h"
#include "vmm/storage/bitmaps.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using block::NodePtr;
using Kind = QmpType::Kind;
using Value = Result<json::value>;

// SocketAddressLegacy.
constexpr QmpMember kInetMembers[] = {{"host", kQmpString}, {"port", kQmpString}};
constexpr QmpMember kUnixMembers[] = {{"path", kQmpString}};
constexpr QmpType kInet{.kind = Kind::kObject, .members = kInetMembers};
constexpr QmpType kUnix{.kind = Kind::kObject, .members = kUnixMembers};
constexpr QmpMember kInetData[] = {{"data", kInet}};
constexpr QmpMember kUnixData[] = {{"data", kUnix}};
constexpr const char* const kAddressTypes[] = {"inet", "unix"};
constexpr QmpType kAddressType{.kind = Kind::kEnum, .words = kAddressTypes};
constexpr QmpMember kAddressTag[] = {{"type", kAddressType}};
constexpr QmpBranch kAddressBranches[] = {{"inet", kInetData}, {"unix", kUnixData}};
constexpr QmpType kAddress{
    .kind = Kind::kUnion, .members = kAddressTag, .tag = "type", .branches = kAddressBranches};
constexpr QmpMember kStartMembers[] = {{"addr", kAddress},
                                       {"tls-creds", kQmpString, kOptional},
                                       {"tls-authz", kQmpString, kOptional},
                                       {"max-connections", kQmpInt, kOptional}};

Value ServerStart(Vm& vm, const json::object& arguments) {
  if (arguments.contains("tls-authz"))
    return Fail(ErrorCode::kUnsupported, "not supported yet: tls-authz");
  std::shared_ptr<const TlsCredentials> tls;
  if (arguments.contains("tls-creds")) {
    tls = TRY(vm.storage().FindTls(Text(arguments, "tls-creds")));
    if (tls->endpoint() != TlsSpec::Endpoint::kServer)
      return Fail(ErrorCode::kInvalid, "Expecting TLS credentials with a server endpoint");
  }
  const json::object& data = arguments.at("addr").at("data").as_object();
  block::nbd::Address address{.path = Text(data, "path"), .host = Text(data, "host")};
  if (data.contains("port")) address.port = Text(data, "port");
  uint64_t most = TRY(Count(arguments, "max-connections"));
  if (most > 65535) return Fail(ErrorCode::kInvalid, "max-connections: at most 65535");
  TRY(vm.storage().exports().Start(address, static_cast<unsigned>(most), std::move(tls)));
  return Done();
}

Value ServerStop(Vm& vm, const json::object&) {
  TRY(vm.storage().exports().Stop());
  return Done();
}

Result<> CheckTexts(const ExportSettings& settings) {
  if (settings.name.size() > 4096) return Fail(ErrorCode::kInvalid, "export name too long");
  if (settings.description.size() > 4096) return Fail(ErrorCode::kInvalid, "description too long");
  return {};
}

constexpr QmpMember kAddMembers[] = {{"device", kQmpString},
                                     {"name", kQmpString, kOptional},
                                     {"description", kQmpString, kOptional},
                                     {"writable", kQmpBool, kOptional},
                                     {"bitmap", kQmpString, kOptional}};
Value ServerAdd(Vm& vm, const json::object& arguments) {
  Storage& storage = vm.storage();
  ExportSettings settings;
  settings.node = TRY(storage.RequireNode(Text(arguments, "device")));
  settings.id = settings.name = Text(arguments, "name", Text(arguments, "device"));
  settings.description = Text(arguments, "description");
  settings.writable = Flag(arguments, "writable") && !settings.node->read_only();
  if (arguments.contains("bitmap")) {
    settings.bitmaps.push_back(
        TRY(RequireBitmap(storage.registry(), settings.node, Text(arguments, "bitmap"))));
  }
  TRY(CheckTexts(settings));
  TRY(storage.exports().Add(settings));
  return Done();
}

constexpr const char* const kModes[] = {"safe", "hard"};
constexpr QmpType kMode{.kind = Kind::kEnum, .words = kModes};
constexpr QmpMember kRemoveMembers[] = {{"name", kQmpString}, {"mode", kMode, kOptional}};
constexpr QmpMember kDelMembers[] = {{"id", kQmpString}, {"mode", kMode, kOptional}};

Exports::Mode ModeOf(const json::object& arguments) {
  return Text(arguments, "mode") == "hard" ? Exports::Mode::kHard : Exports::Mode::kSafe;
}

Value ServerRemove(Vm& vm, const json::object& arguments) {
  Exports& exports = vm.storage().exports();
  if (!exports.listening()) return Fail(ErrorCode::kState, "NBD server not running");
  const Exports::One* one = exports.FindName(Text(arguments, "name"));
  if (!one) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("Export '{}' is not found", Text(arguments, "name")));
  }
  std::string id = one->settings.id;
  TRY(exports.Remove(id, ModeOf(arguments)));
  return Done();
}

Value ExportDel(Vm& vm, const json::object& arguments) {
  TRY(vm.storage().exports().Remove(Text(arguments, "id"), ModeOf(arguments)));
  return Done();
}

constexpr const char* const kExportTypes[] = {"nbd"};
constexpr QmpType kExportType{.kind = Kind::kEnum, .words = kExportTypes};
constexpr QmpMember kBitmapOfNode[] = {{"node", kQmpString}, {"name", kQmpString}};
constexpr QmpType kExportBitmap{
    .kind = Kind::kEither, .element = &kQmpString, .members = kBitmapOfNode};
constexpr QmpType kExportBitmaps{.kind = Kind::kArray, .element = &kExportBitmap};
constexpr QmpMember kExportAddMembers[] = {{"type", kExportType},
                                           {"id", kQmpString},
                                           {"node-name", kQmpString},
                                           {"writable", kQmpBool, kOptional},
                                           {"name", kQmpString, kOptional},
                                           {"description", kQmpString, kOptional},
                                           {"bitmaps", kExportBitmaps, kOptional}};
Value ExportAdd(Vm& vm, const json::object& arguments) {
  Storage& storage = vm.storage();
  ExportSettings settings;
  settings.id = Text(arguments, "id");
  settings.node = TRY(storage.registry().Require(Text(arguments, "node-name")));
  settings.name = Text(arguments, "name", Text(arguments, "node-name"));
  settings.description = Text(arguments, "description");
  settings.writable = Flag(arguments, "writable");
  if (const json::value* bitmaps = arguments.if_contains("bitmaps")) {
    for (const json::value& one : bitmaps->as_array()) {
      NodePtr node = settings.node;
      std::string name;
      if (const json::object* object = one.if_object()) {
        node = TRY(storage.RequireNode(Text(*object, "node")));
        name = Text(*object, "name");
      } else {
        name = std::string(one.as_string());
      }
      settings.bitmaps.push_back(TRY(RequireBitmap(storage.registry(), node, name)));
    }
  }
  TRY(CheckTexts(settings));
  TRY(storage.exports().Add(settings));
  return Done();
}

Value QueryExports(Vm& vm, const json::object&) {
  json::array rows;
  for (const Exports::One& one : vm.storage().exports().list()) {
    const NodePtr& node = one.gate->node();
    rows.push_back(json::object{{"id", one.settings.id},
                                {"type", "nbd"},
                                {"node-name", node ? node->node_name() : ""},
                                {"shutting-down", false}});
  }
  return rows;
}

constexpr auto kFiber = QmpCommand::Where::kFiber;
constexpr QmpCommand kCommands[] = {
    {"block-export-add", kExportAddMembers, ExportAdd, kFiber},
    {"block-export-del", kDelMembers, ExportDel, kFiber},
    {"nbd-server-add", kAddMembers, ServerAdd, kFiber},
    {"nbd-server-remove", kRemoveMembers, ServerRemove, kFiber},
    {"nbd-server-start", kStartMembers, ServerStart, kFiber},
    {"nbd-server-stop", {}, ServerStop, kFiber},
    {"query-block-exports", {}, QueryExports, kFiber},
};

}  // namespace

std::span<const QmpCommand> BlockExportCommands() { return kCommands; }

}  // namespace kvartz::vmm
