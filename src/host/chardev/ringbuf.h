// A chardev that keeps the last bytes that were written to it, for a reader to fetch.
#pragma once

#include <string>

#include "host/chardev/backend.h"

namespace kvartz::host {

// Loop-owned.
class RingbufBackend final : public CharBackend {
 public:
  RingbufBackend(Chardev& chardev, size_t size) : chardev_(chardev), size_(size) {}
  void Start() override;
  size_t Write(std::span<const uint8_t> data) override;
  std::string Describe() const override { return "ringbuf"; }
  std::string Take(size_t max_bytes);

 private:
  Chardev& chardev_;
  const size_t size_;
  std::string kept_;
};

Result<std::unique_ptr<CharBackend>> MakeRingbufBackend(Chardev& chardev);

}  // namespace kvartz::host
