// What an HTTP server answers: the image is refused, or its reads end, one way or the other.
// Replies are parted by 0xff; in them 0xfe is the range that was asked for, and 0xfd as many bytes.
#include <netinet/in.h>
#include <sys/socket.h>

#include <charconv>
#include <map>
#include <string_view>

#include "base/log.h"
#include "fuzz/block/image_fuzz.h"

using namespace kvartz;
using namespace kvartz::block;

namespace {

constexpr char kReplyEnds = '\xff', kRange = '\xfe', kBody = '\xfd';
constexpr size_t kMaxInput = 16 << 10, kMaxReply = 64 << 10;

// Answers each request with the next reply, and closes. Loop-owned.
class Server {
 public:
  explicit Server(EventLoop& loop)
      : loop_(loop), listener_(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    auto* any = reinterpret_cast<sockaddr*>(&address);
    if (bind(listener_.get(), any, length) < 0 || listen(listener_.get(), 64) < 0 ||
        getsockname(listener_.get(), any, &length) < 0)
      std::abort();
    // All that the library asks for comes here, whatever host a redirect names.
    std::string proxy = "http://127.0.0.1:" + std::to_string(ntohs(address.sin_port));
    for (const char* name : {"http_proxy", "https_proxy"}) setenv(name, proxy.c_str(), 1);
    for (const char* name : {"no_proxy", "NO_PROXY"}) unsetenv(name);
    loop_.Watch(listener_.get(), FdEvents::kRead, [this](FdEvents) { Accept(); });
  }

  void Answer(std::string_view replies) { replies_ = replies; }
  void HangUp() {
    while (!clients_.empty()) Close(clients_.begin()->first);
  }

 private:
  struct Client {
    UniqueFd fd;
    std::string request;
  };

  void Accept() {
    UniqueFd fd(accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (fd.get() < 0) return;
    int key = fd.get();
    clients_[key].fd = std::move(fd);
    loop_.Watch(key, FdEvents::kRead, [this, key](FdEvents) { OnRequest(key); });
  }

  void OnRequest(int key) {
    Client& client = clients_[key];
    char buffer[4096];
    ssize_t bytes = read(key, buffer, sizeof buffer);
    if (bytes < 0 && errno == EAGAIN) return;
    if (bytes > 0) {
      client.request.append(buffer, static_cast<size_t>(bytes));
      if (client.request.find("\r\n\r\n") == std::string::npos) return;
      std::string reply = NextReply(client.request);
      (void)!write(key, reply.data(), reply.size());
    }
    Close(key);
  }

  void Close(int key) {
    loop_.Unwatch(key);
    clients_.erase(key);
  }

  std::string NextReply(std::string_view request) {
    size_t end = std::min(replies_.find(kReplyEnds), replies_.size());
    std::string_view next = replies_.substr(0, end);
    replies_.remove_prefix(std::min(end + 1, replies_.size()));
    uint64_t from = 0, last = 0;
    if (size_t at = request.find("bytes="); at != std::string_view::npos) {
      const char* stop = request.data() + request.size();
      const char* dash = std::from_chars(request.data() + at + 6, stop, from).ptr;
      std::from_chars(dash + 1, stop, last);
    }
    std::string reply;
    for (char c : next) {
      if (c == kRange) {
        reply += std::to_string(from) + "-" + std::to_string(last);
      } else if (c == kBody) {
        reply.append(std::min(last - from + 1, kMaxReply), 'x');
      } else {
        reply += c;
      }
      if (reply.size() > kMaxReply) break;
    }
    return reply;
  }

  EventLoop& loop_;
  UniqueFd listener_;
  std::map<int, Client> clients_;
  std::string_view replies_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static std::unique_ptr<EventLoop> loop = *EventLoop::Create();
  static Server server(*loop);
  log::SetLevel(LogLevel::kError);
  if (size > kMaxInput) return 0;
  server.Answer({reinterpret_cast<const char*>(data), size});
  OpenEnv env = {.loop = *loop};
  RunInFiber(*loop, [&] {
    Options options;
    for (auto [key, value] : {std::pair("driver", "http"), std::pair("url", "http://host/disk"),
                              std::pair("timeout", "1"), std::pair("readahead", "4k")})
      options.Set(key, value);
    Result<NodePtr> node = OpenNode(env, std::move(options), {.read_only = true});
    if (!node) {
      if (node.error().what.empty()) std::abort();
      return;
    }
    UseImage(**node);
    (void)(*node)->Close();
  });
  server.HangUp();
  return 0;
}
