// transaction: several actions at one moment of the guest's writes, all of them or none.
#include <fmt/core.h>

#include <boost/json/array.hpp>
#include <functional>
#include <vector>

#include "base/log.h"
#include "vmm/qmp/block_bitmaps.h"
#include "vmm/qmp/block_commands.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using Kind = QmpType::Kind;
using Value = Result<json::value>;

// What an action leaves behind: how to undo it, and what is left to do once all have succeeded.
struct Outcome {
  std::function<Result<>()> undo = nullptr;
  std::function<Result<>()> commit = nullptr;
};
// `group`: of the jobs that it starts; null: each ends by itself.
using Action = Result<Outcome> (*)(Storage& storage, const json::object& data,
                                   const JobGroupPtr& group);

Result<Outcome> Snapshot(Storage& storage, const json::object& data, const JobGroupPtr&) {
  TakenSnapshot taken = TRY(TakeSnapshot(storage, data));
  return Outcome{.undo = [&storage, taken] {
    return storage.registry().UndoSnapshot(taken.node, taken.overlay);
  }};
}

Result<Outcome> SnapshotSync(Storage& storage, const json::object& data, const JobGroupPtr&) {
  TakenSnapshot taken = TRY(TakeSnapshotSync(storage, data));
  return Outcome{.undo = [&storage, taken] {
    return storage.registry().UndoSnapshot(taken.node, taken.overlay);
  }};
}

template <Result<std::string> (*kStart)(Storage&, const json::object&, const JobGroupPtr&)>
Result<Outcome> Backup(Storage& storage, const json::object& data, const JobGroupPtr& group) {
  std::string id = TRY(kStart(storage, data, group));
  return Outcome{.undo = [&storage, id] { return storage.jobs().Cancel(id, true); }};
}

Result<Outcome> Add(Storage& storage, const json::object& data, const JobGroupPtr&) {
  TRY(BitmapAdd(storage, data));
  return Outcome{.undo = [&storage, data] { return BitmapRemove(storage, data); }};
}

// At the end: what is removed can't be brought back.
Result<Outcome> Remove(Storage& storage, const json::object& data, const JobGroupPtr&) {
  NamedBitmap bitmap = TRY(NamedBitmapOf(storage, data));
  TRY(RequireBitmap(storage.registry(), bitmap.node, bitmap.name));
  return Outcome{.commit = [&storage, data] { return BitmapRemove(storage, data); }};
}

// Puts the contents back that a bitmap had.
Result<std::function<Result<>()>> Restorer(Storage& storage, const json::object& data,
                                           const char* name) {
  NamedBitmap bitmap = TRY(NamedBitmapOf(storage, data, name));
  auto copy = TRY(CopyOfBitmap(storage.registry(), bitmap.node, bitmap.name));
  return [&storage, bitmap, copy]() -> Result<> {
    TRY(ClearBitmap(storage.registry(), bitmap.node, bitmap.name));
    return MergeBitmap(storage.registry(), bitmap.node, bitmap.name, *copy);
  };
}

Result<Outcome> Clear(Storage& storage, const json::object& data, const JobGroupPtr&) {
  auto restore = TRY(Restorer(storage, data, "name"));
  TRY(BitmapClear(storage, data));
  return Outcome{.undo = std::move(restore)};
}

Result<Outcome> Merge(Storage& storage, const json::object& data, const JobGroupPtr&) {
  auto restore = TRY(Restorer(storage, data, "target"));
  TRY(BitmapMerge(storage, data));
  return Outcome{.undo = std::move(restore)};
}

template <bool kEnabled>
Result<Outcome> Enable(Storage& storage, const json::object& data, const JobGroupPtr&) {
  NamedBitmap bitmap = TRY(NamedBitmapOf(storage, data));
  bool before = TRY(RequireBitmap(storage.registry(), bitmap.node, bitmap.name))->enabled();
  TRY(EnableBitmap(storage.registry(), bitmap.node, bitmap.name, kEnabled));
  return Outcome{.undo = [&storage, bitmap, before] {
    return EnableBitmap(storage.registry(), bitmap.node, bitmap.name, before);
  }};
}

Result<Outcome> Abort(Storage&, const json::object&, const JobGroupPtr&) {
  return Fail(ErrorCode::kState, "Transaction aborted using Abort action");
}

// One action a row.
struct ActionRow {
  const char* type;
  const std::span<const QmpMember>& members;
  Action run;
  bool in_groups = true;  // completion-mode=grouped; what isn't undone when a job fails later: no
};
const std::span<const QmpMember> kNoMembers;
constexpr ActionRow kActions[] = {
    {"abort", kNoMembers, Abort},
    {"block-dirty-bitmap-add", kBitmapAddMembers, Add, false},
    {"block-dirty-bitmap-clear", kBitmapNameMembers, Clear, false},
    {"block-dirty-bitmap-disable", kBitmapNameMembers, Enable<false>, false},
    {"block-dirty-bitmap-enable", kBitmapNameMembers, Enable<true>, false},
    {"block-dirty-bitmap-merge", kBitmapMergeMembers, Merge, false},
    {"block-dirty-bitmap-remove", kBitmapNameMembers, Remove, false},
    {"blockdev-backup", kBlockdevBackupMembers, Backup<StartBackupCommand>},
    {"blockdev-snapshot", kSnapshotMembers, Snapshot},
    {"blockdev-snapshot-sync", kSnapshotSyncMembers, SnapshotSync},
    {"drive-backup", kDriveBackupMembers, Backup<StartDriveBackup>},
};

constexpr QmpMember kActionMembers[] = {{"type", kQmpString}, {"data", kQmpOptions}};
constexpr QmpType kAction{.kind = Kind::kObject, .members = kActionMembers};
constexpr QmpType kActionList{.kind = Kind::kArray, .element = &kAction};
constexpr const char* const kCompletionModes[] = {"individual", "grouped"};
constexpr QmpType kCompletionMode{.kind = Kind::kEnum, .words = kCompletionModes};
constexpr QmpMember kPropertyMembers[] = {{"completion-mode", kCompletionMode, kOptional}};
constexpr QmpType kProperties{.kind = Kind::kObject, .members = kPropertyMembers};
constexpr QmpMember kTransactionMembers[] = {{"actions", kActionList},
                                             {"properties", kProperties, kOptional}};

Result<const ActionRow*> CheckAction(const json::object& action, size_t index, bool grouped) {
  std::string type = Text(action, "type");
  for (const ActionRow& row : kActions) {
    if (type != row.type) continue;
    if (grouped && !row.in_groups) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("Action '{}' does not support Transaction property completion-mode = "
                              "grouped",
                              type));
    }
    TRY(CheckQmpMembers(row.members, action.at("data").as_object(),
                        fmt::format("actions.{}.data", index)));
    return &row;
  }
  return Fail(ErrorCode::kInvalid,
              fmt::format("argument 'actions.{}.type' doesn't take the value '{}'", index, type));
}

Value Transaction(Vm& vm, const json::object& arguments) {
  Storage& storage = vm.storage();
  const json::array& actions = arguments.at("actions").as_array();
  const json::value* properties = arguments.if_contains("properties");
  const bool grouped =
      properties && Text(properties->as_object(), "completion-mode", "individual") == "grouped";
  std::vector<const ActionRow*> rows;
  rows.reserve(actions.size());
  for (size_t i = 0; i < actions.size(); ++i)
    rows.push_back(TRY(CheckAction(actions[i].as_object(), i, grouped)));
  JobGroupPtr group = grouped ? std::make_shared<block::JobGroup>() : nullptr;
  // No request of a guest comes between the actions.
  block::Registry::Quiesced quiesced(storage.registry());
  std::vector<Outcome> outcomes;
  for (size_t i = 0; i < rows.size(); ++i) {
    Result<Outcome> outcome =
        rows[i]->run(storage, actions[i].as_object().at("data").as_object(), group);
    if (outcome) {
      outcomes.push_back(std::move(*outcome));
      continue;
    }
    for (auto it = outcomes.rbegin(); it != outcomes.rend(); ++it) {
      Result<> undone = it->undo ? it->undo() : Result<>();
      if (!undone) KLOG(kError, "transaction: cannot undo an action: {}", undone.error().what);
    }
    outcomes.clear();  // and with them what holds nodes
    storage.registry().CollectUnused();
    return Fail(std::move(outcome).error());
  }
  if (group) storage.jobs().CloseGroup(group);
  for (const Outcome& outcome : outcomes) {
    if (outcome.commit) TRY(outcome.commit());
  }
  return json::object();
}

constexpr QmpCommand kCommands[] = {
    {"transaction", kTransactionMembers, Transaction, QmpCommand::Where::kFiber},
};

}  // namespace

std::span<const QmpCommand> TransactionCommands() { return kCommands; }

}  // namespace kvartz::vmm
