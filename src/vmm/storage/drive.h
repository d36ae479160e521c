// A disk of the machine under the names that users and events have for it.
#pragma once

#include <memory>
#include <string>

#include "block/disk.h"
#include "device/core/backends.h"

namespace kvartz::vmm {

class Storage;

// Owned by the main loop; what the disk tells comes on the disk's loop and is posted over. Of a
// -drive (which has an id), or made for the device that uses a -blockdev node.
class Drive final : public block::DiskOwner {
 public:
  // One of `id` and `device` is empty.
  Drive(Storage& storage, std::string id, std::string device, EventLoop& disk_loop);

  const std::string& id() const { return id_; }          // empty: of a -blockdev node
  const std::string& device() const { return device_; }  // id of the device; empty: none
  // As messages name it.
  std::string Name() const { return id_.empty() ? device_ : id_; }
  // As QMP's "qdev" does; empty: no device.
  std::string QdevPath() const;
  block::Disk& disk() { return *disk_; }
  DiskPort& port() { return port_; }
  // Errors: another device has it.
  Result<> Connect(const std::string& device);
  // rerror= and werror=, "auto" leaves what is. Errors: unknown ones.
  Result<> SetPolicies(const std::string& on_read, const std::string& on_write);

 private:
  void DiskFailed(block::Disk& disk, const block::DiskFailure& failure) override;
  void DiskResized(block::Disk& disk) override;

  Storage& storage_;
  const std::string id_;
  std::string device_;
  DiskPort port_;
  std::unique_ptr<block::Disk> disk_;
};

}  // namespace kvartz::vmm
