#include "block/driver.h"

#include <fmt/format.h>

#include <cstring>

namespace kvartz::block {

extern const Driver kFileDriver;
extern const Driver kHostDeviceDriver;
extern const Driver kRawDriver;
extern const Driver kNbdDriver;
extern const Driver kQcow2Driver;
extern const Driver kVdiDriver;
extern const Driver kLuksDriver;
extern const Driver kHttpDriver;
extern const Driver kHttpsDriver;
extern const Driver kVmdkDriver;
extern const Driver kVhdxDriver;
extern const Driver kVpcDriver;
extern const Driver kThrottleDriver;
extern const Driver kFaultDriver;
extern const Driver kCopyOnReadDriver;

namespace {

constexpr const Driver* kDrivers[] = {
    &kFileDriver, &kHostDeviceDriver, &kRawDriver,      &kQcow2Driver, &kVdiDriver,
    &kVmdkDriver, &kVpcDriver,        &kNbdDriver,      &kVhdxDriver,  &kLuksDriver,
    &kHttpDriver, &kHttpsDriver,      &kThrottleDriver, &kFaultDriver, &kCopyOnReadDriver,
};

// How images begin whose formats we lack, from each format's specification.
struct Magic {
  const char* format;
  size_t offset;
  std::string_view bytes;
};
constexpr Magic kMissing[] = {
    {"vmdk", 0, "COWD"},
    {"qed", 0, std::string_view("QED\0", 4)},
    {"parallels", 0, "WithoutFreeSpace"},
    {"parallels", 0, "WithouFreSpacExt"},
};

std::unexpected<Error> NotSupported(const std::string& name, std::string_view format) {
  return Fail(ErrorCode::kUnsupported,
              fmt::format("not supported yet: disk image '{0}' is in format {1}; convert it to raw "
                          "(qemu-img convert -O raw '{0}' '{0}.raw')",
                          name, format));
}

}  // namespace

std::span<const Driver* const> AllDrivers() { return kDrivers; }

const Driver* FindDriver(std::string_view name) {
  for (const Driver* driver : kDrivers) {
    if (driver->name == name) return driver;
  }
  return nullptr;
}

Result<const Driver*> RequireDriver(const std::string& name, const std::string& image) {
  if (const Driver* driver = FindDriver(name)) return driver;
  for (const Magic& magic : kMissing) {
    if (name == magic.format) return NotSupported(image, name);
  }
  std::string known;
  for (const Driver* driver : kDrivers) {
    if (!known.empty()) known += ", ";
    known += driver->name;
  }
  return Fail(ErrorCode::kInvalid, fmt::format("unknown image format '{}' ({})", name, known));
}

Result<const Driver*> ProbeFormat(std::span<const uint8_t> head, const std::string& image) {
  const Driver* best = &kRawDriver;
  int best_score = 0;
  for (const Driver* driver : kDrivers) {
    int score = driver->probe ? driver->probe(head) : 0;
    if (score > best_score) {
      best = driver;
      best_score = score;
    }
  }
  for (const Magic& magic : kMissing) {
    if (best_score == 0 && head.size() >= magic.offset + magic.bytes.size() &&
        std::memcmp(head.data() + magic.offset, magic.bytes.data(), magic.bytes.size()) == 0) {
      return NotSupported(image, magic.format);
    }
  }
  return best;
}

}  // namespace kvartz::block
