#include "vmm/storage/describe.h"

#include "block/dirty_bitmap.h"
#include "block/graph.h"
#include "vmm/storage/bitmaps.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using block::NodePtr;

json::value ToJson(const block::InfoValue& value);

json::object ToJson(const block::InfoValue::Object& fields) {
  json::object object;
  for (const block::InfoField& field : fields) object[field.name] = ToJson(field.value);
  return object;
}

// Depth: a format's own information is nested as deep as its driver writes it.
json::value ToJson(const block::InfoValue& value) {
  return std::visit(
      [](const auto& held) -> json::value {
        using Held = std::decay_t<decltype(held)>;
        if constexpr (std::is_same_v<Held, block::InfoValue::Object>) {
          return ToJson(held);
        } else if constexpr (std::is_same_v<Held, block::InfoValue::Array>) {
          json::array array;
          for (const block::InfoValue& element : held) array.push_back(ToJson(element));
          return array;
        } else if constexpr (std::is_same_v<Held, std::string>) {
          return json::value(json::string(held));
        } else {
          return json::value(held);
        }
      },
      value.value);
}

json::array ToJson(const std::vector<block::SnapshotInfo>& snapshots) {
  json::array array;
  for (const block::SnapshotInfo& one : snapshots) {
    json::object row{{"id", one.id},
                     {"name", one.name},
                     {"vm-state-size", one.vm_state_size},
                     {"date-sec", one.date_sec},
                     {"date-nsec", one.date_nsec},
                     {"vm-clock-sec", one.vm_clock_nsec / 1'000'000'000},
                     {"vm-clock-nsec", one.vm_clock_nsec % 1'000'000'000}};
    if (one.icount != UINT64_MAX) row["icount"] = one.icount;
    array.push_back(std::move(row));
  }
  return array;
}

json::object ImageFields(const block::Node& node, const block::ImageInfo& info,
                         const Result<uint64_t>& allocated) {
  json::object image{{"filename", node.name()},
                     {"format", info.format},
                     {"virtual-size", info.virtual_size},
                     {"dirty-flag", info.dirty}};
  if (allocated) image["actual-size"] = *allocated;  // an NBD server doesn't tell
  if (info.cluster_size > 0) image["cluster-size"] = info.cluster_size;
  if (info.encrypted) image["encrypted"] = true;
  if (info.compressed) image["compressed"] = true;
  if (!info.snapshots.empty()) image["snapshots"] = ToJson(info.snapshots);
  if (!info.backing_filename.empty()) {
    image["backing-filename"] = info.backing_filename;
    image["full-backing-filename"] = info.full_backing_filename;
    if (!info.backing_format.empty()) image["backing-filename-format"] = info.backing_format;
  }
  if (!info.specific.empty())
    image["format-specific"] = json::object{{"type", info.format}, {"data", ToJson(info.specific)}};
  return image;
}

void AddLimits(const block::ThrottleGroup* group, json::object& node) {
  using Limits = block::ThrottleLimits;
  static constexpr std::pair<const char*, Limits::Index> kNames[] = {
      {"bps", Limits::kBpsTotal},   {"bps_rd", Limits::kBpsRead},   {"bps_wr", Limits::kBpsWrite},
      {"iops", Limits::kIopsTotal}, {"iops_rd", Limits::kIopsRead}, {"iops_wr", Limits::kIopsWrite},
  };
  Limits limits = group ? group->limits() : Limits();
  for (auto [name, index] : kNames) node[name] = limits.buckets[index].average;
  if (!group) return;
  node["group"] = group->name();
  if (limits.iops_size > 0) node["iops_size"] = limits.iops_size;
  for (auto [name, index] : kNames) {
    const block::ThrottleBucket& bucket = limits.buckets[index];
    if (bucket.max == 0) continue;
    node[std::string(name) + "_max"] = bucket.max;
    node[std::string(name) + "_max_length"] = bucket.max_length;
  }
}

const char* IoStatus(Storage& storage, const block::Disk& disk) {
  return CallOn(storage.loop(), disk.loop(), [&] {
    if (!disk.io_failed()) return "ok";
    return disk.io_no_space() ? "nospace" : "failed";
  });
}

unsigned ChainDepth(block::Node* node) {
  unsigned depth = 0;
  while ((node = block::BackingOf(node))) ++depth;
  return depth;
}

json::object OperationFields(const char* prefix, const block::DiskStatistics::Operation& one) {
  std::string name(prefix);
  return {{name + "_bytes", one.bytes},
          {name + "_operations", one.operations},
          {name + "_total_time_ns", one.total_time_ns},
          {name + "_merged", 0},  // no device here merges requests
          {"failed_" + name + "_operations", one.failed},
          {"invalid_" + name + "_operations", one.invalid}};
}

// BlockDeviceStats. A node tells of its writes' reach alone.
enum class Counts : uint8_t { kAll, kReach };
json::object StatisticsFields(const block::DiskStatistics& counted, uint64_t highest_write,
                              Counts counts) {
  json::object fields{{"account_invalid", counts == Counts::kAll},
                      {"account_failed", counts == Counts::kAll},
                      {"timed_stats", json::array()},
                      {"wr_highest_offset", highest_write}};
  for (auto [prefix, operation] :
       {std::pair{"rd", &counted.read}, std::pair{"wr", &counted.write},
        std::pair{"flush", &counted.flush}, std::pair{"unmap", &counted.unmap}}) {
    for (auto& field : OperationFields(prefix, *operation))
      fields[field.key()] = std::move(field.value());
  }
  // Flushes have no bytes, and aren't merged.
  fields.erase("flush_bytes");
  fields.erase("flush_merged");
  if (counted.idle_time_ns >= 0) fields["idle_time_ns"] = counted.idle_time_ns;
  return fields;
}

// A node with the files below it ("parent", as the field has it). On the node's loop.
json::object NodeStatistics(const block::Node& node) {
  json::object row{{"node-name", node.node_name()},
                   {"stats", StatisticsFields({}, node.highest_write(), Counts::kReach)}};
  if (block::InfoValue::Object counts = node.Counts(); !counts.empty()) {
    json::object& specific = row["driver-specific"].emplace_object();
    specific = ToJson(counts);
    specific["driver"] = node.driver();
  }
  const block::Node* data = node.data_file() ? node.data_file() : node.file();
  if (data) row["parent"] = NodeStatistics(*data);
  return row;
}

// From the lowest image up, so that a long chain needs no deep stack.
json::object ChainStatistics(block::Node& top) {
  std::vector<block::Node*> chain;
  for (block::Node* node = &top; node; node = block::BackingOf(node)) chain.push_back(node);
  json::object below;
  for (auto it = chain.rbegin(); it != chain.rend(); ++it) {
    json::object row = NodeStatistics(**it);
    if (!below.empty()) row["backing"] = std::move(below);
    below = std::move(row);
  }
  return below;
}

}  // namespace

Result<json::object> DescribeImage(Storage& storage, const NodePtr& node, Chain chain) {
  block::Registry& registry = storage.registry();
  // From the lowest image up, so that a long chain needs no deep stack.
  std::vector<NodePtr> nodes{node};
  if (chain == Chain::kWhole) {
    for (block::Node* at = node.get(); (at = block::BackingOf(at));)
      nodes.push_back(registry.PtrOf(*at));
  }
  json::object below;
  for (auto it = nodes.rbegin(); it != nodes.rend(); ++it) {
    const NodePtr& one = *it;
    auto describe = [&]() -> Result<json::object> {
      block::ImageInfo info = TRY(one->Info());
      return ImageFields(*one, info, one->AllocatedBytes());
    };
    json::object image = TRY(registry.On(*one, describe));
    if (!below.empty()) image["backing-image"] = std::move(below);
    below = std::move(image);
  }
  return below;
}

Result<json::object> DescribeNode(Storage& storage, const NodePtr& node, Drive* drive,
                                  Chain chain) {
  const block::NodeOptions& options = node->opened_with();
  json::object device{
      {"node-name", node->node_name()},
      {"file", node->name()},
      {"drv", node->driver()},
      {"ro", node->read_only()},
      {"encrypted", false},
      {"detect_zeroes", block::NameOf(node->detect_zeroes())},
      {"write_threshold", storage.registry().On(*node, [&] { return node->write_threshold(); })},
      {"backing_file_depth", chain == Chain::kWhole ? ChainDepth(node.get()) : 0},
      {"cache", json::object{{"writeback", !options.writethrough},
                             {"direct", options.cache_direct},
                             {"no-flush", options.cache_no_flush}}}};
  AddLimits(drive ? drive->disk().throttle().get() : nullptr, device);
  if (block::Node* backing = block::BackingOf(node.get())) device["backing_file"] = backing->name();
  json::object image = TRY(DescribeImage(storage, node, chain));
  if (image.contains("encrypted")) device["encrypted"] = true;
  device["image"] = std::move(image);
  json::array bitmaps = DescribeBitmaps(storage.registry(), *node);
  if (!bitmaps.empty()) device["dirty-bitmaps"] = std::move(bitmaps);
  return device;
}

Result<json::array> DescribeDrives(Storage& storage) {
  // Nobody puts other nodes there meanwhile.
  block::Registry::Change change(storage.registry());
  json::array disks;
  for (const auto& drive : storage.drives()) {
    json::object row{{"device", drive->id()},
                     {"locked", false},
                     {"removable", drive->device().empty()},
                     {"type", "unknown"}};
    if (!drive->device().empty()) {
      row["qdev"] = drive->QdevPath();
      row["io-status"] = IoStatus(storage, drive->disk());
    }
    // Filters that jobs put there are theirs.
    if (block::Node* top = block::SkipFilters(drive->disk().node().get())) {
      row["inserted"] =
          TRY(DescribeNode(storage, storage.registry().PtrOf(*top), drive.get(), Chain::kWhole));
    }
    disks.push_back(std::move(row));
  }
  return disks;
}

json::object DescribeStatistics(Storage& storage, Drive& drive) {
  block::Registry::Change change(storage.registry());
  // Filters that jobs put there are theirs.
  block::Node* top = block::SkipFilters(drive.disk().node().get());
  json::object row;
  block::DiskStatistics counted = CallOn(storage.loop(), drive.disk().loop(), [&] {
    if (top) row = ChainStatistics(*top);
    return drive.disk().statistics();
  });
  row["device"] = drive.id();
  row["stats"] = StatisticsFields(counted, counted.write_highest_offset, Counts::kAll);
  if (!drive.device().empty()) row["qdev"] = drive.QdevPath();
  return row;
}

json::array DescribeNodeStatistics(Storage& storage) {
  block::Registry& registry = storage.registry();
  block::Registry::Change change(registry);
  json::array rows;
  for (const NodePtr& node : registry.nodes())
    rows.push_back(registry.On(*node, [&] { return NodeStatistics(*node); }));
  return rows;
}

}  // namespace kvartz::vmm
