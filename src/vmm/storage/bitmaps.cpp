#include "vmm/storage/bitmaps.h"

#include <fmt/core.h>

#include <algorithm>
#include <boost/json/object.hpp>
#include <optional>

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using block::BitmapInfo;
using block::DirtyBitmap;
using block::NodePtr;
using block::Registry;

std::optional<BitmapInfo> Stored(block::Node& node, const std::string& name) {
  if (!node.bitmaps()) return std::nullopt;
  for (const BitmapInfo& info : node.bitmaps()->List()) {
    if (info.name == name) return info;
  }
  return std::nullopt;
}

std::shared_ptr<DirtyBitmap> Attached(const block::Node& node, const std::string& name) {
  for (const auto& bitmap : node.attached_bitmaps()) {
    // Those of jobs have no name.
    if (!name.empty() && bitmap->name() == name) return bitmap;
  }
  return nullptr;
}

// On the node's loop.
Result<std::shared_ptr<DirtyBitmap>> Find(block::Node& node, const std::string& name) {
  if (std::optional<BitmapInfo> stored = Stored(node, name)) {
    if (stored->in_use) {
      return Fail(ErrorCode::kState,
                  fmt::format("Bitmap '{}' is inconsistent and cannot be used", name));
    }
    if (std::shared_ptr<DirtyBitmap> bitmap = node.bitmaps()->Find(name)) return bitmap;
  }
  if (std::shared_ptr<DirtyBitmap> bitmap = Attached(node, name)) return bitmap;
  return Fail(ErrorCode::kNotFound, fmt::format("Dirty bitmap '{}' not found", name));
}

// For what changes it: not while a job uses it.
Result<std::shared_ptr<DirtyBitmap>> FindFree(block::Node& node, const std::string& name) {
  std::shared_ptr<DirtyBitmap> bitmap = TRY(Find(node, name));
  if (!bitmap->busy()) return bitmap;
  return Fail(
      ErrorCode::kBusy,
      fmt::format("Bitmap '{}' is currently in use by another operation and cannot be used", name));
}

Result<> Add(block::Node& node, const BitmapSettings& settings) {
  if (settings.name.empty()) return Fail(ErrorCode::kInvalid, "Bitmap name cannot be empty");
  if (settings.name.size() > 1023) return Fail(ErrorCode::kInvalid, "Bitmap name too long");
  if (Stored(node, settings.name) || Attached(node, settings.name)) {
    return Fail(ErrorCode::kExists, fmt::format("Bitmap already exists: {}", settings.name));
  }
  if (settings.persistent) {
    if (!node.bitmaps()) {
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("Cannot store dirty bitmap in a {} image", node.driver()));
    }
    return node.bitmaps()->Add({.name = settings.name,
                                .granularity = settings.granularity,
                                .enabled = !settings.disabled});
  }
  auto bitmap =
      std::make_shared<DirtyBitmap>(settings.name, node.size_bytes(), settings.granularity);
  bitmap->set_enabled(!settings.disabled);
  node.Attach(std::move(bitmap));
  return {};
}

}  // namespace

Result<std::shared_ptr<DirtyBitmap>> RequireBitmap(Registry& registry, const NodePtr& node,
                                                   const std::string& name) {
  return registry.On(*node, [&] { return Find(*node, name); });
}

Result<> AddBitmap(Registry& registry, const NodePtr& node, const BitmapSettings& settings) {
  return registry.On(*node, [&] { return Add(*node, settings); });
}

Result<> RemoveBitmap(Registry& registry, const NodePtr& node, const std::string& name) {
  return registry.On(*node, [&]() -> Result<> {
    std::optional<BitmapInfo> stored = Stored(*node, name);
    if (stored && stored->in_use) return node->bitmaps()->Remove(name);
    std::shared_ptr<DirtyBitmap> bitmap = TRY(FindFree(*node, name));
    if (stored) return node->bitmaps()->Remove(name);
    node->Detach(*bitmap);
    return {};
  });
}

Result<> ClearBitmap(Registry& registry, const NodePtr& node, const std::string& name) {
  return registry.On(*node, [&]() -> Result<> {
    std::shared_ptr<DirtyBitmap> bitmap = TRY(FindFree(*node, name));
    if (Stored(*node, name)) return node->bitmaps()->Clear(name);
    bitmap->ClearAll();
    return {};
  });
}

Result<> EnableBitmap(Registry& registry, const NodePtr& node, const std::string& name,
                      bool enabled) {
  return registry.On(*node, [&]() -> Result<> {
    std::shared_ptr<DirtyBitmap> bitmap = TRY(FindFree(*node, name));
    if (Stored(*node, name)) return node->bitmaps()->Enable(name, enabled);
    bitmap->set_enabled(enabled);
    return {};
  });
}

Result<> MergeBitmap(Registry& registry, const NodePtr& node, const std::string& name,
                     const DirtyBitmap& source) {
  return registry.On(*node, [&]() -> Result<> {
    std::shared_ptr<DirtyBitmap> bitmap = TRY(FindFree(*node, name));
    if (bitmap->size_bytes() != source.size_bytes()) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("Bitmaps are of different sizes (destination size is {} and source "
                              "size is {})",
                              bitmap->size_bytes(), source.size_bytes()));
    }
    if (Stored(*node, name)) return node->bitmaps()->Merge(name, source);
    bitmap->Merge(source);
    return {};
  });
}

Result<std::shared_ptr<DirtyBitmap>> CopyOfBitmap(Registry& registry, const NodePtr& node,
                                                  const std::string& name) {
  return registry.On(*node, [&]() -> Result<std::shared_ptr<DirtyBitmap>> {
    std::shared_ptr<DirtyBitmap> bitmap = TRY(Find(*node, name));
    auto copy = std::make_shared<DirtyBitmap>(name, bitmap->size_bytes(), bitmap->granularity());
    copy->Merge(*bitmap);
    return copy;
  });
}

json::array DescribeBitmaps(Registry& registry, block::Node& node) {
  return registry.On(node, [&] {
    json::array rows;
    auto add = [&](const DirtyBitmap& bitmap, bool persistent) {
      rows.push_back(json::object{{"name", bitmap.name()},
                                  {"count", bitmap.dirty_bytes()},
                                  {"granularity", bitmap.granularity()},
                                  {"recording", bitmap.enabled()},
                                  {"busy", bitmap.busy()},
                                  {"persistent", persistent}});
    };
    std::vector<BitmapInfo> stored;
    if (node.bitmaps()) stored = node.bitmaps()->List();
    for (const BitmapInfo& info : stored) {
      std::shared_ptr<DirtyBitmap> bitmap = info.in_use ? nullptr : node.bitmaps()->Find(info.name);
      if (bitmap) {
        add(*bitmap, true);
      } else {
        rows.push_back(json::object{{"name", info.name},
                                    {"count", 0},
                                    {"granularity", info.granularity},
                                    {"recording", false},
                                    {"busy", false},
                                    {"persistent", true},
                                    {"inconsistent", true}});
      }
    }
    for (const auto& bitmap : node.attached_bitmaps()) {
      bool known = std::ranges::any_of(
          stored, [&](const BitmapInfo& info) { return info.name == bitmap->name(); });
      if (!known && !bitmap->name().empty()) add(*bitmap, false);
    }
    return rows;
  });
}

}  // namespace kvartz::vmm
