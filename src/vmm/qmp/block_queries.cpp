// query-block and its like.
#include "block/graph.h"
#include "vmm/qmp/block_commands.h"
#include "vmm/storage/describe.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using Value = Result<json::value>;

Value QueryBlock(Vm& vm, const json::object&) { return TRY(DescribeDrives(vm.storage())); }

constexpr QmpMember kStatsArguments[] = {{"query-nodes", kQmpBool, kOptional}};
Value QueryBlockstats(Vm& vm, const json::object& arguments) {
  if (Flag(arguments, "query-nodes")) return DescribeNodeStatistics(vm.storage());
  json::array rows;
  for (const auto& drive : vm.storage().drives())
    rows.push_back(DescribeStatistics(vm.storage(), *drive));
  return rows;
}

constexpr QmpMember kNodesArguments[] = {{"flat", kQmpBool, kOptional}};
Value QueryNamedBlockNodes(Vm& vm, const json::object& arguments) {
  json::array rows;
  block::Registry::Change change(vm.storage().registry());
  Chain chain = Flag(arguments, "flat") ? Chain::kFlat : Chain::kWhole;
  for (const block::NodePtr& node : vm.storage().registry().nodes())
    rows.push_back(TRY(DescribeNode(vm.storage(), node, vm.storage().DriveOn(*node), chain)));
  return rows;
}

constexpr auto kFiber = QmpCommand::Where::kFiber;
constexpr QmpCommand kCommands[] = {
    {"query-block", {}, QueryBlock, kFiber},
    {"query-blockstats", kStatsArguments, QueryBlockstats, kFiber},
    {"query-named-block-nodes", kNodesArguments, QueryNamedBlockNodes, kFiber},
};

}  // namespace

std::span<const QmpCommand> BlockQueryCommands() { return kCommands; }

}  // namespace kvartz::vmm
