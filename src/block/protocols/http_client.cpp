#include "block/protocols/http_client.h"

#include <fmt/format.h>
#include <strings.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <optional>

#include "base/check.h"
#include "block/protocols/http_library.h"

namespace kvartz::block {
namespace {

constexpr long kMaxRedirects = 10;
constexpr long kMaxConnections = 8;
constexpr uint64_t kSlowest = 1024;  // bytes a second
constexpr long kPartialContent = 206, kRangeNotSatisfiable = 416, kOk = 200;
constexpr size_t kMaxEtag = 1024;
constexpr size_t kMaxHeaders = 256 << 10;  // bytes, of all replies to one request

struct ContentRange {
  uint64_t from = 0, end = 0, total = 0;
};

// "bytes 0-499/1234", "bytes */1234" (RFC 9110, section 14.4).
std::optional<ContentRange> ParseContentRange(std::string_view text) {
  ContentRange range;
  if (!text.starts_with("bytes ")) return std::nullopt;
  text.remove_prefix(6);
  auto number = [&](uint64_t& value, char behind) {
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc()) return false;
    text.remove_prefix(static_cast<size_t>(end - text.data()));
    if (behind == '\0') return text.empty();
    if (text.empty() || text[0] != behind) return false;
    text.remove_prefix(1);
    return true;
  };
  if (text.starts_with("*/")) {
    text.remove_prefix(2);
  } else {
    if (!number(range.from, '-') || !number(range.end, '/') || range.end < range.from ||
        range.end == UINT64_MAX)
      return std::nullopt;
    range.end++;
  }
  if (!number(range.total, '\0') || range.end > range.total) return std::nullopt;
  return range;
}

std::string_view Trim(std::string_view text) {
  size_t from = text.find_first_not_of(" \t");
  if (from == std::string_view::npos) return {};
  size_t end = text.find_last_not_of(" \t\r\n");
  return text.substr(from, end - from + 1);
}

}  // namespace

struct HttpClient::Impl {
  const CurlLibrary* curl = nullptr;
  CURLM* multi = nullptr;
  curl_slist* headers = nullptr;
  std::vector<CURL*> idle;  // easy handles
};

// One GET under way, on its fiber's stack.
struct HttpClient::Transfer {
  uint64_t from = 0;
  std::span<uint8_t> out;
  bool first = false;  // the one that finds out about size and ranges

  const CurlLibrary* curl = nullptr;
  CURL* easy = nullptr;
  Fiber* fiber = nullptr;
  char message[CURL_ERROR_SIZE] = {};
  CURLcode code = CURLE_OK;
  long status = 0;
  size_t received = 0, header_bytes = 0;
  // Of the last reply: redirects have some, too.
  std::optional<ContentRange> range;
  std::string etag;
  bool encoded = false;
  bool refused = false;  // by us, for what the reply is

  // False: that is enough.
  bool OnHeader(std::string_view line) {
    header_bytes += line.size();
    if (header_bytes > kMaxHeaders) return false;
    Learn(line);
    return true;
  }
  void Learn(std::string_view line) {
    if (line.starts_with("HTTP/")) {
      range.reset();
      etag.clear();
      encoded = false;
      return;
    }
    size_t colon = line.find(':');
    if (colon == std::string_view::npos) return;
    std::string_view name = line.substr(0, colon), value = Trim(line.substr(colon + 1));
    auto is = [&](std::string_view wanted) {
      return name.size() == wanted.size() &&
             strncasecmp(name.data(), wanted.data(), wanted.size()) == 0;
    };
    if (is("Content-Range")) range = ParseContentRange(value);
    if (is("ETag")) etag = value.substr(0, kMaxEtag);
    if (is("Content-Encoding")) encoded = value != "identity";
  }
  // False: nothing more of it is wanted.
  bool OnBody(const char* data, size_t bytes) {
    curl->easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
    if (status != kPartialContent || !range || range->from != from ||
        range->end - range->from > out.size() || encoded || bytes > out.size() - received) {
      refused = true;
      return false;
    }
    std::memcpy(out.data() + received, data, bytes);
    received += bytes;
    return true;
  }
};

HttpClient::HttpClient(EventLoop& loop, HttpOptions options)
    : loop_(loop),
      options_(std::move(options)),
      timer_(loop, [this] { Act(CURL_SOCKET_TIMEOUT, 0); }),
      impl_(std::make_unique<Impl>()) {}

Result<std::shared_ptr<HttpClient>> HttpClient::Create(EventLoop& loop, HttpOptions options) {
  const CurlLibrary* curl = TRY(LoadCurl());
  std::shared_ptr<HttpClient> client(new HttpClient(loop, std::move(options)));
  client->impl_->curl = curl;
  if (!client->options_.cookie.empty()) {
    // The library's own option for it would send it to the hosts that redirects name, too.
    client->impl_->headers =
        curl->slist_append(nullptr, ("Cookie: " + client->options_.cookie).c_str());
    if (!client->impl_->headers) return Fail(ErrorCode::kNoSpace, "out of memory");
  }
  CURLM* multi = client->impl_->multi = curl->multi_init();
  if (!multi) return Fail(ErrorCode::kNoSpace, "out of memory");
  curl->multi_setopt(multi, CURLMOPT_SOCKETDATA, client.get());
  curl->multi_setopt(
      multi, CURLMOPT_SOCKETFUNCTION, +[](CURL*, curl_socket_t fd, int what, void* self, void*) {
        static_cast<HttpClient*>(self)->OnSocket(fd, what);
        return 0;
      });
  curl->multi_setopt(multi, CURLMOPT_TIMERDATA, client.get());
  curl->multi_setopt(
      multi, CURLMOPT_TIMERFUNCTION, +[](CURLM*, long timeout_ms, void* self) {
        static_cast<HttpClient*>(self)->OnTimer(timeout_ms);
        return 0;
      });
  curl->multi_setopt(multi, CURLMOPT_MAX_HOST_CONNECTIONS, kMaxConnections);
  return client;
}

HttpClient::~HttpClient() {
  for (CURL* easy : impl_->idle) impl_->curl->easy_cleanup(easy);
  if (impl_->headers) impl_->curl->slist_free_all(impl_->headers);
  if (!impl_->multi) return;
  impl_->curl->multi_setopt(impl_->multi, CURLMOPT_SOCKETFUNCTION, nullptr);
  impl_->curl->multi_setopt(impl_->multi, CURLMOPT_TIMERFUNCTION, nullptr);
  for (int fd : watched_) loop_.Unwatch(fd);
  impl_->curl->multi_cleanup(impl_->multi);
}

void HttpClient::OnTimer(long timeout_ms) {
  constexpr int64_t kMillisecond = 1'000'000;
  if (timeout_ms < 0) return timer_.Cancel();
  timer_.Arm(loop_.clock().NowNs() + timeout_ms * kMillisecond);
}

void HttpClient::OnSocket(int fd, int what) {
  if (what == CURL_POLL_REMOVE) {
    if (watched_.erase(fd)) loop_.Unwatch(fd);
    return;
  }
  auto events =
      static_cast<FdEvents>(((what & CURL_POLL_IN) ? 1 : 0) | ((what & CURL_POLL_OUT) ? 2 : 0));
  if (!watched_.insert(fd).second) return loop_.Rearm(fd, events);
  loop_.Watch(fd, events, [this, fd](FdEvents ready) {
    auto bits = static_cast<uint32_t>(ready);
    Act(fd, ((bits & 1) ? CURL_CSELECT_IN : 0) | ((bits & 2) ? CURL_CSELECT_OUT : 0));
  });
}

// Lets the library go on, and wakes those whose transfers have ended.
void HttpClient::Act(int fd, int events) {
  std::shared_ptr<HttpClient> keep = shared_from_this();
  int running = 0;
  impl_->curl->multi_socket_action(impl_->multi, fd, events, &running);
  int left = 0;
  while (CURLMsg* message = impl_->curl->multi_info_read(impl_->multi, &left)) {
    if (message->msg != CURLMSG_DONE) continue;
    Transfer* transfer = nullptr;
    impl_->curl->easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &transfer);
    transfer->code = message->data.result;
    impl_->curl->easy_getinfo(transfer->easy, CURLINFO_RESPONSE_CODE, &transfer->status);
    impl_->curl->multi_remove_handle(impl_->multi, transfer->easy);
    transfer->fiber->Wake();
  }
}

void HttpClient::Configure(Transfer& transfer) const {
  CURL* easy = transfer.easy;
  impl_->curl->easy_reset(easy);
  auto set = [&](CURLoption option, auto value) { impl_->curl->easy_setopt(easy, option, value); };
  auto set_text = [&](CURLoption option, const std::string& value) {
    if (!value.empty()) set(option, value.c_str());
  };
  const bool secure = options_.url.starts_with("https:");
  set(CURLOPT_URL, options_.url.c_str());
  set(CURLOPT_PROTOCOLS_STR, "http,https");
  set(CURLOPT_REDIR_PROTOCOLS_STR, secure ? "https" : "http,https");
  set(CURLOPT_FOLLOWLOCATION, 1L);
  set(CURLOPT_MAXREDIRS, kMaxRedirects);
  set(CURLOPT_NOSIGNAL, 1L);
  set(CURLOPT_USERAGENT, "Kvartz");
  set(CURLOPT_SSL_VERIFYPEER, options_.verify_peer ? 1L : 0L);
  set(CURLOPT_SSL_VERIFYHOST, options_.verify_peer ? 2L : 0L);
  set_text(CURLOPT_USERNAME, options_.username);
  set_text(CURLOPT_PASSWORD, options_.password);
  set_text(CURLOPT_PROXYUSERNAME, options_.proxy_username);
  set_text(CURLOPT_PROXYPASSWORD, options_.proxy_password);
  if (impl_->headers) set(CURLOPT_HTTPHEADER, impl_->headers);
  auto timeout = static_cast<long>(options_.timeout_s);
  set(CURLOPT_CONNECTTIMEOUT, timeout);
  set(CURLOPT_LOW_SPEED_TIME, timeout);
  set(CURLOPT_LOW_SPEED_LIMIT, static_cast<long>(kSlowest));
  set(CURLOPT_TIMEOUT, 2 * timeout + static_cast<long>(transfer.out.size() / kSlowest));
  set(CURLOPT_ERRORBUFFER, transfer.message);
  set(CURLOPT_PRIVATE, &transfer);
  set(CURLOPT_HEADERDATA, &transfer);
  set(
      CURLOPT_HEADERFUNCTION, +[](char* data, size_t size, size_t count, void* to) {
        bool wanted = static_cast<Transfer*>(to)->OnHeader({data, size * count});
        return wanted ? size * count : size_t{0};
      });
  set(CURLOPT_WRITEDATA, &transfer);
  set(
      CURLOPT_WRITEFUNCTION, +[](char* data, size_t size, size_t count, void* to) {
        return static_cast<Transfer*>(to)->OnBody(data, size * count) ? size * count : size_t{0};
      });
  std::string range = fmt::format("{}-{}", transfer.from, transfer.from + transfer.out.size() - 1);
  set(CURLOPT_RANGE, range.c_str());
}

Result<> HttpClient::Run(Transfer& transfer) {
  std::shared_ptr<HttpClient> keep = shared_from_this();
  transfer.curl = impl_->curl;
  if (impl_->idle.empty()) {
    transfer.easy = impl_->curl->easy_init();
    if (!transfer.easy) return Fail(ErrorCode::kNoSpace, "out of memory");
  } else {
    transfer.easy = impl_->idle.back();
    impl_->idle.pop_back();
  }
  Configure(transfer);
  transfer.fiber = Fiber::Current();
  if (CURLMcode error = impl_->curl->multi_add_handle(impl_->multi, transfer.easy)) {
    impl_->idle.push_back(transfer.easy);
    return Fail(ErrorCode::kIo, impl_->curl->multi_strerror(error));
  }
  Fiber::Suspend();
  Result<> outcome = Outcome(transfer);
  // It points to what is gone from now on.
  impl_->curl->easy_reset(transfer.easy);
  impl_->idle.push_back(transfer.easy);
  return outcome;
}

Result<> HttpClient::Outcome(const Transfer& transfer) const {
  if (transfer.header_bytes > kMaxHeaders)
    return Fail(ErrorCode::kIo, "the server sends more headers than make sense");
  if (transfer.code != CURLE_OK && !transfer.refused) {
    const char* why =
        transfer.message[0] ? transfer.message : impl_->curl->easy_strerror(transfer.code);
    return Fail(ErrorCode::kIo, why);
  }
  switch (transfer.status) {
    case kPartialContent:
      break;
    case kRangeNotSatisfiable:
      if (transfer.first) return {};
      return Fail(ErrorCode::kIo, "it is shorter than it was when it was opened");
    case kOk:
      return Fail(ErrorCode::kUnsupported,
                  "the server doesn't support ranges (it sends the whole file): download it first");
    case 401:
    case 403:
    case 407:
      return Fail(ErrorCode::kPermission,
                  fmt::format("the server refuses with status {}: are username, password-secret or "
                              "cookie-secret right?",
                              transfer.status));
    case 404:
    case 410:
      return Fail(ErrorCode::kNotFound,
                  fmt::format("the server doesn't have it (status {})", transfer.status));
    default:
      return Fail(ErrorCode::kIo,
                  fmt::format("the server answers with status {}", transfer.status));
  }
  if (transfer.encoded)
    return Fail(ErrorCode::kUnsupported, "the server sends it encoded (Content-Encoding)");
  if (!transfer.range || transfer.refused || transfer.received != transfer.out.size() ||
      transfer.range->end - transfer.range->from != transfer.out.size())
    return Fail(ErrorCode::kIo, "the server sends another part than the one it was asked for");
  if (!transfer.first && (transfer.range->total != size_bytes_ ||
                          (!etag_.empty() && !transfer.etag.empty() && transfer.etag != etag_)))
    return Fail(ErrorCode::kIo, "it has changed since it was opened");
  return {};
}

Result<> HttpClient::Open() {
  uint8_t byte = 0;
  Transfer transfer;
  transfer.out = {&byte, 1};
  transfer.first = true;
  TRY(Run(transfer));
  if (!transfer.range || (transfer.status == kRangeNotSatisfiable && transfer.range->total != 0))
    return Fail(ErrorCode::kIo, "the server doesn't say how large it is");
  if (transfer.range->total > uint64_t{INT64_MAX} - 512)
    return Fail(ErrorCode::kInvalid,
                fmt::format("the server says that it has {} bytes", transfer.range->total));
  size_bytes_ = transfer.range->total;
  etag_ = transfer.etag;
  return {};
}

Result<> HttpClient::Read(uint64_t offset, std::span<uint8_t> out) {
  if (out.empty()) return {};
  Transfer transfer;
  transfer.from = offset;
  transfer.out = out;
  return Run(transfer);
}

}  // namespace kvartz::block
