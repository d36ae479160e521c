// Protocols http and https: a resource that is read by ranges.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <list>

#include "base/log.h"
#include "block/crypto/secret_bytes.h"
#include "block/driver.h"
#include "block/io_batch.h"
#include "block/protocols/http_client.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kSector = 512;
constexpr uint64_t kDefaultReadahead = 256 << 10;
constexpr uint64_t kMaxReadahead = 64 << 20;
constexpr uint64_t kMaxTimeout = 10000;
constexpr size_t kMaxBlocks = 16;    // of readahead that are kept
constexpr unsigned kMaxLogged = 10;  // errors

// Loop-owned. Requests run in fibers. What is read in small pieces is fetched in larger ones, which
// are kept for those that follow.
class HttpNode final : public Node {
 public:
  HttpNode(EventLoop& loop, std::string name, std::string driver,
           std::shared_ptr<HttpClient> client, uint64_t readahead)
      : Node(loop, std::move(name)),
        driver_(std::move(driver)),
        client_(std::move(client)),
        readahead_(readahead) {
    size_bytes_ = (client_->size_bytes() + kSector - 1) / kSector * kSector;
    read_only_ = true;
  }

  const char* driver() const override { return driver_.c_str(); }
  void Drain() override {
    while (FinishLateOnes() || in_fibers() > 0) {
      if (in_fibers() > 0) loop().RunOnce(-1);
    }
  }
  Result<Extent> Status(uint64_t offset, uint64_t length) override {
    return Extent{.length = std::min(length, size_bytes_ - offset),
                  .allocated = true,
                  .data = true,
                  .has_offset = true,
                  .offset = offset,
                  .file = this};
  }
  Result<> Close() override { return {}; }
  Result<> SetReadOnly(bool read_only) override {
    if (!read_only) return Unsupported("writing");
    return {};
  }
  Result<uint64_t> AllocatedBytes() override {
    return Fail(ErrorCode::kUnsupported, "the server doesn't tell");
  }

 private:
  struct Block {
    uint64_t from = 0;
    std::vector<uint8_t> bytes;
    bool loading = true;
    int result = 0;
    FiberQueue waiting;
  };

  void Submit(Request* request) override {
    if (request->kind != Request::Kind::kRead || request->length == 0)
      return FinishLater(request, 0);
    SubmitInFiber(request, [this](Request& own) { return Read(own); });
  }

  int Read(const Request& request) {
    IovCursor cursor(request.iov, request.iov_count);
    uint64_t at = request.offset;
    uint64_t end = std::min(request.offset + request.length, client_->size_bytes());
    while (at < end) {
      uint64_t bytes = 0;
      if (int rc = ReadSome(at, end - at, cursor, bytes)) return rc;
      at += bytes;
    }
    at = std::max(at, request.offset);
    cursor.Fill(request.offset + request.length - at, 0);
    return 0;
  }

  int ReadSome(uint64_t at, uint64_t length, IovCursor& cursor, uint64_t& bytes) {
    std::shared_ptr<Block> block = FindBlock(at);
    if (!block && length >= readahead_) {
      bytes = std::min(length, std::max<uint64_t>(readahead_, 1 << 20));
      std::vector<uint8_t> buffer(bytes);
      if (int rc = Fetch(at, buffer)) return rc;
      cursor.CopyIn(buffer);
      return 0;
    }
    if (!block) block = LoadBlock(at);
    while (block->loading) block->waiting.Wait();
    if (block->result) return block->result;
    uint64_t skip = at - block->from;
    bytes = std::min(length, block->bytes.size() - skip);
    cursor.CopyIn(std::span<const uint8_t>(block->bytes).subspan(skip, bytes));
    return 0;
  }

  std::shared_ptr<Block> FindBlock(uint64_t at) {
    for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
      if (at < (*it)->from || at - (*it)->from >= (*it)->bytes.size()) continue;
      blocks_.splice(blocks_.begin(), blocks_, it);
      return blocks_.front();
    }
    return nullptr;
  }

  std::shared_ptr<Block> LoadBlock(uint64_t at) {
    auto block = std::make_shared<Block>();
    block->from = at;
    block->bytes.resize(std::min(readahead_, client_->size_bytes() - at));
    blocks_.push_front(block);
    if (blocks_.size() > kMaxBlocks) blocks_.pop_back();
    block->result = Fetch(at, block->bytes);
    block->loading = false;
    if (block->result) blocks_.remove(block);
    block->waiting.WakeAll();
    return block;
  }

  int Fetch(uint64_t at, std::span<uint8_t> out) {
    Result<> read = client_->Read(at, out);
    if (read) return 0;
    if (logged_ < kMaxLogged) {
      logged_++;
      KLOG(kWarn, "'{}': cannot read {} bytes at {}: {}", name(), out.size(), at,
           read.error().what);
    }
    return -EIO;
  }

  const std::string driver_;
  const std::shared_ptr<HttpClient> client_;
  const uint64_t readahead_;
  unsigned logged_ = 0;
  std::list<std::shared_ptr<Block>> blocks_;  // the one used last first
};

// Not for logs and messages: "user:password@".
std::string WithoutCredentials(std::string url) {
  size_t host = url.find("://");
  if (host == std::string::npos) return url;
  host += 3;
  size_t at = url.substr(0, url.find_first_of("/?#", host)).rfind('@');
  if (at != std::string::npos && at >= host) url.erase(host, at + 1 - host);
  return url;
}

Result<std::string> SecretOf(const OpenEnv& env, Options& options, const char* key) {
  std::optional<std::string> id = options.Take(key);
  if (!id) return std::string();
  if (!env.secret) return Fail(ErrorCode::kNotFound, fmt::format("there is no secret '{}'", *id));
  return env.secret(*id);
}

Result<HttpOptions> TakeHttpOptions(const OpenEnv& env, Options& options) {
  HttpOptions http;
  http.url = options.Take("url", "");
  std::string filename = options.Take("filename", "");
  if (http.url.empty()) http.url = filename;
  http.username = options.Take("username", "");
  http.password = TRY(SecretOf(env, options, "password-secret"));
  http.proxy_username = options.Take("proxy-username", "");
  http.proxy_password = TRY(SecretOf(env, options, "proxy-password-secret"));
  http.cookie = options.Take("cookie", "");
  if (options.Has("cookie-secret")) {
    if (!http.cookie.empty())
      return Fail(ErrorCode::kInvalid, "cookie and cookie-secret can't be used together");
    http.cookie = TRY(SecretOf(env, options, "cookie-secret"));
  }
  http.verify_peer = TRY(options.TakeBool("sslverify", true));
  http.timeout_s = TRY(options.TakeNumber("timeout", http.timeout_s));
  if (http.timeout_s == 0 || http.timeout_s > kMaxTimeout)
    return Fail(ErrorCode::kInvalid,
                fmt::format("timeout={}: it is 1 to {} (seconds)", http.timeout_s, kMaxTimeout));
  if (http.cookie.find_first_of("\r\n") != std::string::npos)
    return Fail(ErrorCode::kInvalid, "the cookie has more than one line");
  return http;
}

Result<NodePtr> Open(const OpenEnv& env, const NodeOptions& node, Options& options,
                     const std::string& driver) {
  HttpOptions http = TRY(TakeHttpOptions(env, options));
  uint64_t readahead = TRY(options.TakeSize("readahead", kDefaultReadahead));
  TRY(options.RefuseRest(
      driver, {"url", "readahead", "sslverify", "timeout", "cookie", "cookie-secret", "username",
               "password-secret", "proxy-username", "proxy-password-secret"}));
  if (readahead == 0 || readahead % kSector != 0 || readahead > kMaxReadahead)
    return Fail(ErrorCode::kInvalid,
                fmt::format("readahead={}: it is a multiple of 512, up to 64 MiB", readahead));
  if (!http.url.starts_with(driver + "://")) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' doesn't begin with {}://", WithoutCredentials(http.url), driver));
  }
  std::string name = WithoutCredentials(http.url);
  if (!node.read_only && !node.auto_read_only) {
    return Fail(ErrorCode::kPermission,
                fmt::format("'{}' can only be read: open it read-only", name));
  }
  std::shared_ptr<HttpClient> client = TRY(HttpClient::Create(env.loop, std::move(http)));
  Result<> opened = client->Open();
  if (!opened) return Fail(std::move(opened).error().In(fmt::format("cannot read '{}'", name)));
  return std::make_shared<HttpNode>(env.loop, std::move(name), driver, std::move(client),
                                    readahead);
}

}  // namespace

extern const Driver kHttpDriver;
const Driver kHttpDriver = {
    .name = "http",
    .kind = Driver::Kind::kProtocol,
    .open = [](const OpenEnv& env, const NodeOptions& node,
               Options& options) { return Open(env, node, options, "http"); },
};
extern const Driver kHttpsDriver;
const Driver kHttpsDriver = {
    .name = "https",
    .kind = Driver::Kind::kProtocol,
    .open = [](const OpenEnv& env, const NodeOptions& node,
               Options& options) { return Open(env, node, options, "https"); },
};

}  // namespace kvartz::block
