// img snapshot.
#include <fmt/core.h>

#include <ctime>

#include "base/clock.h"
#include "base/print.h"
#include "cli/img/img.h"
#include "cli/img/output.h"

namespace kvartz::cli::img {
namespace {

Result<> Change(block::SnapshotStore& store, const Arguments& arguments) {
  if (auto name = arguments.Find("c")) {
    block::SnapshotInfo snapshot = {.name = *name};
    int64_t now_ns = HostRealtimeNs();
    snapshot.date_sec = now_ns / 1'000'000'000;
    snapshot.date_nsec = static_cast<uint32_t>(now_ns % 1'000'000'000);
    snapshot.icount = 0;
    Result<block::SnapshotInfo> made = store.Create(std::move(snapshot));
    if (!made)
      return Fail(std::move(made).error().In(fmt::format("Could not create snapshot '{}'", *name)));
  } else if (auto wanted = arguments.Find("a")) {
    Result<> applied = store.Apply(*wanted);
    if (!applied)
      return Fail(
          std::move(applied).error().In(fmt::format("Could not apply snapshot '{}'", *wanted)));
  } else if (auto victim = arguments.Find("d")) {
    Result<> deleted = store.Delete(*victim);
    if (!deleted)
      return Fail(
          std::move(deleted).error().In(fmt::format("Could not delete snapshot '{}'", *victim)));
  }
  return {};
}

Result<int> Run(Session& session, const Arguments& arguments) {
  ImageName image = TRY(TakeImage(arguments));
  int actions = 0;
  for (const char* key : {"l", "a", "c", "d"})
    actions += static_cast<int>(arguments.All(key).size());
  if (actions > 1) return Misuse("Cannot mix '-l', '-a', '-c', '-d'");
  bool list = actions == 0 || arguments.Has("l");
  block::NodeOptions options = {.read_only = list,
                                .force_share = list && arguments.Has("force-share")};
  if (!list && arguments.Has("force-share"))
    return Fail(ErrorCode::kInvalid, "--force-share conflicts with -a, -c and -d: they write");
  options.no_backing = true;
  block::NodePtr node = TRY(session.Open(image, options));
  block::SnapshotStore* store = node->snapshots();
  if (list) {
    if (store && !store->List().empty()) Print("Snapshot list:\n{}", SnapshotTable(store->List()));
    return 0;
  }
  if (!store)
    return Fail(ErrorCode::kUnsupported, fmt::format("'{}': format {} doesn't support snapshots",
                                                     image.name, node->driver()));
  TRY(Change(*store, arguments));
  TRY(session.Close(node));
  return 0;
}

constexpr OptionSpec kOptions[] = {
    kObject,
    kImageOpts,
    kFormat,
    kForceShare,
    kQuiet,
    {'l', {}, {}, "list all snapshots"},
    {'a', {}, "SNAPSHOT", "the disk becomes what it was"},
    {'c', {}, "SNAPSHOT", "make one"},
    {'d', {}, "SNAPSHOT", "delete it"},
};

}  // namespace

const Verb kSnapshot = {"snapshot", "FILENAME",
                        "lists, makes, applies and deletes internal snapshots", kOptions, Run};

}  // namespace kvartz::cli::img
