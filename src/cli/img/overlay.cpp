#include "cli/img/overlay.h"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "base/fd.h"

namespace kvartz::cli::img {

Result<block::NodePtr> TemporaryOverlay(Session& session, block::NodePtr base) {
  char path[] = "/var/tmp/kvartz-XXXXXX";
  UniqueFd fd(mkstemp(path));
  if (!fd) return Fail(ErrnoError(errno, "cannot make a temporary file in /var/tmp"));
  struct Unlink {
    const char* path;
    ~Unlink() { unlink(path); }
  } cleanup = {path};
  block::Options create;
  create.Set("size", std::to_string(base->size_bytes()));
  TRY(block::CreateImage(session.env(), "qcow2", path, std::move(create)));
  ImageName name = {.name = path, .format = "qcow2"};
  block::NodePtr overlay =
      TRY(session.Open(name, {.cache_no_flush = true, .discard_unmap = true, .no_backing = true}));
  TRY(overlay->SetBacking(std::move(base)));
  return overlay;
}

}  // namespace kvartz::cli::img
