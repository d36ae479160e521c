// What a client sends to the NBD server: the connection ends, and all that it held is given back.
#include <sys/socket.h>

#include "block/nbd/server.h"
#include "fuzz/block/image_fuzz.h"

using namespace kvartz;
using namespace kvartz::block;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static std::unique_ptr<EventLoop> loop = *EventLoop::Create();
  if (size > (64 << 10)) return 0;
  UniqueFd fd(memfd_create("image", MFD_CLOEXEC));
  if (ftruncate(fd.get(), 1 << 20) < 0) std::abort();
  OpenEnv env = {.loop = *loop};
  std::string path = "/proc/self/fd/" + std::to_string(fd.get());
  auto offered = std::make_shared<nbd::Export>();
  offered->node =
      *RunInFiber(*loop, [&] { return OpenFilename(env, path, "raw", {.locking = false}); });
  offered->writable = true;
  offered->allocation_depth = true;
  {
    nbd::Server server(*loop, UniqueFd(), 0);
    server.Add(offered);
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) < 0) std::abort();
    UniqueFd peer(ends[1]);
    if (write(peer.get(), data, size) < 0 && size > 0) std::abort();
    shutdown(peer.get(), SHUT_WR);
    server.Serve(UniqueFd(ends[0]));
    std::vector<uint8_t> answers(64 << 10);
    while (server.clients() > 0) {
      loop->RunOnce(1'000'000);
      while (read(peer.get(), answers.data(), answers.size()) > 0) {
      }
    }
  }
  RunInFiber(*loop, [&] { (void)offered->node->Close(); });
  return 0;
}
