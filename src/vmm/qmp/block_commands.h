// QMP's commands on disks, nodes and jobs: their tables, and what several of them share.
#pragma once

#include <boost/json/object.hpp>
#include <span>
#include <string>

#include "vmm/qmp/qmp_commands.h"
#include "vmm/storage/storage.h"

namespace kvartz::vmm {

std::span<const QmpCommand> BlockNodeCommands();
std::span<const QmpCommand> BlockJobCommands();
std::span<const QmpCommand> JobControlCommands();
std::span<const QmpCommand> BlockBitmapCommands();
std::span<const QmpCommand> BlockExportCommands();
std::span<const QmpCommand> BlockQueryCommands();
std::span<const QmpCommand> TransactionCommands();

// Arguments of commands that are transaction actions, too.
extern const std::span<const QmpMember> kSnapshotMembers, kSnapshotSyncMembers,
    kBlockdevBackupMembers, kDriveBackupMembers, kBitmapAddMembers, kBitmapNameMembers,
    kBitmapMergeMembers;

inline constexpr const char* const kQmpSnapshotModes[] = {"existing", "absolute-paths"};
inline constexpr QmpType kQmpSnapshotMode{.kind = QmpType::Kind::kEnum, .words = kQmpSnapshotModes};

// Fiber, all of them.
Result<block::Options> OptionsOf(const boost::json::object& object);
// Of "device" or "node-name", which one command takes either of.
Result<block::NodePtr> DeviceOrNode(Storage& storage, const boost::json::object& arguments);

struct TakenSnapshot {
  block::NodePtr node, overlay;
};
Result<TakenSnapshot> TakeSnapshot(Storage& storage, const boost::json::object& arguments);
Result<TakenSnapshot> TakeSnapshotSync(Storage& storage, const boost::json::object& arguments);

// An image that a command names by file: made (unless mode is "existing") and opened.
struct ImageWish {
  std::string filename;
  std::string format;  // empty: as the source's; of an existing one: found out
  std::string node_name;
  bool existing = false;
  uint64_t size = 0;
  block::NodePtr recorded_backing;  // named in an image that is made; may be null
  block::NodePtr backing;           // stands below it here; null: nothing
  block::NodePtr like;              // opened with this one's cache mode
};
Result<block::NodePtr> OpenWish(Storage& storage, const ImageWish& wish);

// The job's id. `group`: whose other jobs it ends with; may be null.
using JobGroupPtr = std::shared_ptr<block::JobGroup>;
Result<std::string> StartBackupCommand(Storage& storage, const boost::json::object& arguments,
                                       const JobGroupPtr& group);
Result<std::string> StartDriveBackup(Storage& storage, const boost::json::object& arguments,
                                     const JobGroupPtr& group);

}  // namespace kvartz::vmm
