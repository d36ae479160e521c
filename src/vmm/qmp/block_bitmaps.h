// What block-dirty-bitmap-* do, also as actions of a transaction. Fiber, all of it.
#pragma once

#include <boost/json/object.hpp>
#include <string>

#include "vmm/storage/bitmaps.h"
#include "vmm/storage/storage.h"

namespace kvartz::vmm {

struct NamedBitmap {
  block::NodePtr node;
  std::string name;
};
// Of arguments "node" and `name`.
Result<NamedBitmap> NamedBitmapOf(Storage& storage, const boost::json::object& arguments,
                                  const char* name = "name");

Result<> BitmapAdd(Storage& storage, const boost::json::object& arguments);
Result<> BitmapRemove(Storage& storage, const boost::json::object& arguments);
Result<> BitmapClear(Storage& storage, const boost::json::object& arguments);
Result<> BitmapEnable(Storage& storage, const boost::json::object& arguments);
Result<> BitmapDisable(Storage& storage, const boost::json::object& arguments);
Result<> BitmapMerge(Storage& storage, const boost::json::object& arguments);

}  // namespace kvartz::vmm
