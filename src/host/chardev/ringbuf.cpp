#include "host/chardev/ringbuf.h"

#include <fmt/core.h>

#include <bit>

#include "host/chardev/chardev.h"

namespace kvartz::host {
namespace {

// Loop-owned.
class NullBackend final : public CharBackend {
 public:
  explicit NullBackend(Chardev& chardev) : chardev_(chardev) {}
  void Start() override { chardev_.SetOpen(true); }
  size_t Write(std::span<const uint8_t> data) override { return data.size(); }
  std::string Describe() const override { return "null"; }

 private:
  Chardev& chardev_;
};

}  // namespace

void RingbufBackend::Start() { chardev_.SetOpen(true); }

size_t RingbufBackend::Write(std::span<const uint8_t> data) {
  kept_.append(reinterpret_cast<const char*>(data.data()), data.size());
  if (kept_.size() > size_) kept_.erase(0, kept_.size() - size_);
  return data.size();
}

std::string RingbufBackend::Take(size_t max_bytes) {
  std::string taken = kept_.substr(0, max_bytes);
  kept_.erase(0, taken.size());
  return taken;
}

Result<std::unique_ptr<CharBackend>> MakeNullBackend(Chardev& chardev) {
  return std::make_unique<NullBackend>(chardev);
}

Result<std::unique_ptr<CharBackend>> MakeRingbufBackend(Chardev& chardev) {
  size_t size = chardev.config().size;
  if (!std::has_single_bit(size) || size > (64u << 20)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("size={}: a ring buffer's size is a power of two up to 64M", size));
  }
  return std::make_unique<RingbufBackend>(chardev, size);
}

}  // namespace kvartz::host
