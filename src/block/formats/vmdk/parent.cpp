#include "block/formats/vmdk/parent.h"

#include <fmt/format.h>

#include <cstring>

#include "block/formats/random_id.h"
#include "block/graph.h"

namespace kvartz::block::vmdk {

uint32_t NewCid() {
  auto id = RandomId();
  uint32_t cid;
  std::memcpy(&cid, id.data(), sizeof cid);
  return cid & 0xfffffffe;
}

std::string WithCid(std::string text, uint32_t cid) {
  size_t at = text.starts_with("CID=") ? 0 : text.find("\nCID=");
  if (at == std::string::npos) return text;
  at = text.find('=', at) + 1;
  size_t end = text.find_first_not_of("0123456789abcdefABCDEF", at);
  std::string number = fmt::format("{:08x}", cid);
  // Within the place that it has, where that is long enough.
  return text.replace(at, (end == std::string::npos ? text.size() : end) - at, number);
}

Result<uint32_t> CidOf(Node& image) {
  Node& real = *SkipFilters(&image);
  if (real.driver() == std::string_view("vmdk")) {
    ImageInfo info = TRY(real.Info());
    for (const InfoField& field : info.specific) {
      const auto* cid = std::get_if<uint64_t>(&field.value.value);
      if (cid && field.name == "cid") return static_cast<uint32_t>(*cid);
    }
  }
  return Fail(ErrorCode::kInvalid,
              fmt::format("'{}' can't be below a VMDK: it is none, or has no CID", image.name()));
}

Result<> CheckParent(const Node& child, const Descriptor& descriptor, Node& parent) {
  if (descriptor.parent_cid == kNoParent)
    return child.Unsupported("a backing file that it wasn't made with");
  uint32_t cid = TRY(CidOf(parent));
  if (cid == descriptor.parent_cid) return {};
  return Fail(ErrorCode::kInvalid,
              fmt::format("'{}' was changed since '{}' was made on it (CID {:08x}, not {:08x})",
                          parent.name(), child.name(), cid, descriptor.parent_cid));
}

void TellParent(const Node& child, const Descriptor& descriptor, ImageInfo& info) {
  if (descriptor.parent_cid == kNoParent || descriptor.parent_hint.empty()) return;
  info.backing_filename = descriptor.parent_hint;
  info.backing_format = "vmdk";
  info.full_backing_filename = ResolveRelative(child.name(), descriptor.parent_hint);
}

}  // namespace kvartz::block::vmdk
