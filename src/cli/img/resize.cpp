// img resize.
#include <fmt/core.h>

#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

Result<uint64_t> NewSize(uint64_t old_size, std::string text) {
  char sign = text.empty() ? '\0' : text[0];
  bool relative = sign == '+' || sign == '-';
  if (relative) text.erase(0, 1);
  uint64_t size = TRY(TakeSize(text, "image size"));
  if (!relative) return size;
  if (sign == '+') {
    if (size > uint64_t{INT64_MAX} - old_size)
      return Fail(ErrorCode::kInvalid, "New image size must be less than 8 EiB");
    return old_size + size;
  }
  if (size >= old_size) return Fail(ErrorCode::kInvalid, "New image size must be positive");
  return old_size - size;
}

Result<int> Run(Session& session, const Arguments& arguments) {
  if (arguments.operands.size() != 2) return Misuse("Expecting image file name and size");
  ImageName image = {arguments.operands[0], arguments.Get("format"), arguments.Has("image-opts")};
  block::ResizeOptions resize;
  if (auto name = arguments.Find("preallocation"))
    resize.preallocation = TRY(block::ParsePreallocation(*name));
  block::NodePtr node = TRY(session.Open(image, {}));
  uint64_t old_size = node->size_bytes();
  resize.size = TRY(NewSize(old_size, arguments.operands[1]));
  resize.zero_added = true;
  if (resize.size < old_size && resize.preallocation != block::Preallocation::kOff)
    return Fail(ErrorCode::kInvalid, "Preallocation can only be used for growing images");
  if (resize.size < old_size && !arguments.Has("shrink")) {
    return Fail(ErrorCode::kState,
                "Use the --shrink option to perform a shrink operation: it deletes all data beyond "
                "the new end");
  }
  TRY(node->Resize(resize));
  TRY(session.Close(node));
  session.Say("Image resized.\n");
  return 0;
}

constexpr OptionSpec kOptions[] = {
    kObject, kImageOpts,
    kFormat, {0, "preallocation", "MODE", "of what is added: off, metadata, falloc, full"},
    kQuiet,  {0, "shrink", {}, "the new size may be smaller: what is beyond it is lost"},
};

}  // namespace

const Verb kResize = {"resize", "FILENAME [+|-]SIZE", "makes an image larger or smaller", kOptions,
                      Run};

}  // namespace kvartz::cli::img
