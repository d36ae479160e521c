#include "vmm/storage/drive.h"

#include <fmt/core.h>

#include "vmm/storage/storage.h"

namespace kvartz::vmm {

Drive::Drive(Storage& storage, std::string id, std::string device, EventLoop& disk_loop)
    : storage_(storage), id_(std::move(id)), device_(std::move(device)) {
  disk_ = std::make_unique<block::Disk>(disk_loop, Name(), this);
  port_.disk = disk_.get();
}

std::string Drive::QdevPath() const {
  return device_.empty() ? "" : fmt::format("/machine/peripheral/{}/virtio-backend", device_);
}

Result<> Drive::Connect(const std::string& device) {
  if (!device_.empty()) {
    return Fail(ErrorCode::kBusy,
                fmt::format("drive={}: device '{}' is connected to it", id_, device_));
  }
  device_ = device;
  return {};
}

Result<> Drive::SetPolicies(const std::string& on_read, const std::string& on_write) {
  block::ErrorPolicy read = disk_->on_read_error(), write = disk_->on_write_error();
  if (on_read != "auto") {
    read = TRY(block::ParseErrorPolicy(on_read));
    if (read == block::ErrorPolicy::kEnospc)
      return Fail(ErrorCode::kInvalid,
                  "rerror=enospc: reads need no space; it is report, ignore or stop");
  }
  if (on_write != "auto") write = TRY(block::ParseErrorPolicy(on_write));
  disk_->SetErrorPolicies(read, write);
  return {};
}

void Drive::DiskFailed(block::Disk&, const block::DiskFailure& failure) {
  storage_.PostFailure(*this, failure);
}

void Drive::DiskResized(block::Disk&) {
  if (port_.on_resized) port_.on_resized();
}

}  // namespace kvartz::vmm
