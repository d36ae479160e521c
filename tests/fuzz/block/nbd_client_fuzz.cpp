// What a server sends to the NBD client: it is refused, or answers come to all calls.
#include <sys/socket.h>

#include <cerrno>

#include "block/nbd/client.h"
#include "fuzz/block/image_fuzz.h"

using namespace kvartz;
using namespace kvartz::block;

namespace {

int Wait(nbd::Client& client, nbd::Client::Call& call) {
  if (client.broken()) return -EIO;
  struct Waiting {
    Fiber* fiber;
    int result;
  } waiting = {Fiber::Current(), 0};
  call.owner = &waiting;
  call.done = [](nbd::Client::Call* done, int result) {
    auto* waits = static_cast<Waiting*>(done->owner);
    waits->result = result;
    waits->fiber->Wake();
  };
  client.Send(&call);
  Fiber::Suspend();
  return waiting.result;
}

void Use(nbd::Client& client) {
  uint8_t buffer[4096];
  iovec iov = {buffer, sizeof buffer};
  nbd::Client::Call read = {
      .command = nbd::Command::kRead, .length = sizeof buffer, .iov = &iov, .iov_count = 1};
  (void)Wait(client, read);
  std::vector<nbd::StatusExtent> extents;
  nbd::Client::Call status = {
      .command = nbd::Command::kBlockStatus, .length = 4096, .extents = &extents};
  (void)Wait(client, status);
}

}  // namespace

namespace {

// A client whose server has said `bytes`, and no more.
std::shared_ptr<nbd::Client> Connect(EventLoop& loop, std::span<const uint8_t> bytes) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) < 0) std::abort();
  UniqueFd peer(ends[1]);
  if (write(peer.get(), bytes.data(), bytes.size()) < 0 && !bytes.empty()) std::abort();
  shutdown(peer.get(), SHUT_WR);
  return std::make_shared<nbd::Client>(loop, UniqueFd(ends[0]));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static std::unique_ptr<EventLoop> loop = *EventLoop::Create();
  if (size > (64 << 10)) return 0;
  auto client = Connect(*loop, {data, size});
  RunInFiber(*loop, [&] {
    Result<> greeted = client->Handshake(size % 2 == 0 ? "disk" : "");
    if (!greeted) {
      if (greeted.error().what.empty()) std::abort();
      return;
    }
    client->Start();
    Use(*client);
    client->End();
  });
  client = Connect(*loop, {data, size});
  RunInFiber(*loop, [&] { (void)client->List(); });
  return 0;
}
