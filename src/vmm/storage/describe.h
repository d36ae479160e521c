// What QMP and HMP say of nodes, disks and jobs.
#pragma once

#include <boost/json/array.hpp>
#include <boost/json/object.hpp>

#include "vmm/storage/storage.h"

namespace kvartz::vmm {

// kFlat: an image's backing images are not told with it.
enum class Chain : uint8_t { kWhole, kFlat };

// Fiber, all of them. ImageInfo and BlockDeviceInfo of QMP; `drive`: whose limits and cache they
// are (may be null).
Result<boost::json::object> DescribeImage(Storage& storage, const block::NodePtr& node,
                                          Chain chain);
Result<boost::json::object> DescribeNode(Storage& storage, const block::NodePtr& node, Drive* drive,
                                         Chain chain);
Result<boost::json::array> DescribeDrives(Storage& storage);
// BlockStats of QMP: a device with its chain, and all nodes by themselves.
boost::json::object DescribeStatistics(Storage& storage, Drive& drive);
boost::json::array DescribeNodeStatistics(Storage& storage);

}  // namespace kvartz::vmm
