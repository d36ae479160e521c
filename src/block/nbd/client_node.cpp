// Protocol nbd: an export of an NBD server.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/call_on.h"
#include "block/driver.h"
#include "block/fiber_io.h"
#include "block/io_batch.h"
#include "block/nbd/client_link.h"

namespace kvartz::block {
namespace nbd {
namespace {

constexpr uint64_t kMostZeroes = 1 << 30;  // of one request without payload

// Loop-owned. Requests become calls one to one, in pieces where the server wants them smaller.
class NbdNode final : public Node {
 public:
  NbdNode(EventLoop& loop, std::string name, std::shared_ptr<ClientLink> link, bool read_only)
      : Node(loop, std::move(name)), link_(std::move(link)) {
    Listen();
    const ExportInfo& info = link_->info();
    size_bytes_ = info.size;
    read_only_ = read_only || (info.flags & kReadOnly);
    limits_.request_alignment = info.min_block;
    limits_.discard_granularity = info.flags & kSendTrim ? info.min_block : 0;
  }
  ~NbdNode() override { link_->Abandon(); }
  // The connection comes along: a server may serve one alone.
  Result<> MoveTo(EventLoop& to) override {
    if (&to == &loop()) return {};
    CallOn(to, loop(), [&] { link_ = link_->MoveTo(to); });
    Listen();
    SetLoop(to);
    return {};
  }

  const char* driver() const override { return "nbd"; }
  void Drain() override {
    while (FinishLateOnes() || under_way_ > 0) {
      if (under_way_ > 0) loop().RunOnce(-1);
    }
  }
  Result<Extent> Status(uint64_t offset, uint64_t length) override;
  Result<> Close() override {
    Result<> flushed;
    if (!read_only_) flushed = Flush(*this);
    link_->Close();
    return flushed;
  }
  Result<> SetReadOnly(bool read_only) override {
    if (!read_only && (link_->info().flags & kReadOnly))
      return Unsupported("being written to: the server offers it read-only");
    read_only_ = read_only;
    return {};
  }
  Result<uint64_t> AllocatedBytes() override {
    return Fail(ErrorCode::kUnsupported, "the server doesn't tell");
  }
  // A smaller image in a larger export is none of ours.
  Result<> Resize(const ResizeOptions& options) override {
    if (options.size == size_bytes_ || (!options.exact && options.size < size_bytes_)) return {};
    return Unsupported("another size");
  }

 private:
  struct Piece {
    Client::Call call;
    Request* request;
    NbdNode* node;
    std::vector<iovec> iov;
    unsigned* left;  // pieces of the request
  };
  void Listen() {
    link_->on_change = [this] { Resume(); };
  }
  void Submit(Request* request) override;
  uint32_t CallOf(const Request& request, Client::Call& call, uint64_t& most) const;
  void Send(Piece* piece);
  void OnDone(Piece* piece, int result);
  void Conclude(Piece* piece, int result);
  void Resume();
  int AwaitStatus(uint64_t offset, uint32_t length, std::vector<StatusExtent>& extents);

  std::shared_ptr<ClientLink> link_;
  unsigned under_way_ = 0;
  std::vector<Piece*> parked_;  // until there is a connection again
  FiberQueue changed_;
};

// Answers an errno: the server can't.
uint32_t NbdNode::CallOf(const Request& request, Client::Call& call, uint64_t& most) const {
  const ExportInfo& info = link_->info();
  most = info.max_block;
  uint16_t fua = request.fua && (info.flags & kSendFua) ? kFua : 0;
  switch (request.kind) {
    case Request::Kind::kRead:
      call.command = Command::kRead;
      return 0;
    case Request::Kind::kWrite:
      if (request.compressed) return ENOTSUP;
      call.command = Command::kWrite;
      call.flags = fua;
      return 0;
    case Request::Kind::kFlush:
      call.command = Command::kFlush;
      return 0;
    case Request::Kind::kDiscard:
      call.command = Command::kTrim;
      most = kMostZeroes;
      return 0;
    case Request::Kind::kWriteZeroes:
      break;
  }
  call.command = Command::kWriteZeroes;
  most = kMostZeroes;
  call.flags = fua;
  if (!request.unmap) call.flags |= kNoHole;
  if (request.no_fallback && (info.flags & kSendFastZero)) call.flags |= kFastZero;
  if (!(info.flags & kSendWriteZeroes)) return ENOTSUP;
  return request.no_fallback && !(info.flags & kSendFastZero) ? ENOTSUP : 0;
}

void NbdNode::Submit(Request* request) {
  const ExportInfo& info = link_->info();
  if (request->kind == Request::Kind::kFlush && !(info.flags & kSendFlush))
    return FinishLater(request, 0);
  if (request->kind == Request::Kind::kDiscard && !(info.flags & kSendTrim))
    return FinishLater(request, 0);
  Client::Call prototype;
  uint64_t most = 0;
  if (uint32_t error = CallOf(*request, prototype, most))
    return FinishLater(request, -static_cast<int>(error));
  if (request->length == 0 && request->kind != Request::Kind::kFlush)
    return FinishLater(request, 0);
  bool moves = request->kind == Request::Kind::kRead || request->kind == Request::Kind::kWrite;
  IovCursor cursor(request->iov, request->iov_count);
  uint64_t count = std::max<uint64_t>(1, (request->length + most - 1) / most);
  auto* left = new unsigned(static_cast<unsigned>(count));
  request->result = 0;
  under_way_++;
  uint64_t offset = request->offset, rest = request->length;
  for (uint64_t i = 0; i < count; i++) {
    auto* piece = new Piece{prototype, request, this, {}, left};
    uint64_t length = std::min(rest, most);
    piece->call.offset = request->kind == Request::Kind::kFlush ? 0 : offset;
    piece->call.length = static_cast<uint32_t>(length);
    if (moves) {
      cursor.Take(length, piece->iov);
      piece->call.iov = piece->iov.data();
      piece->call.iov_count = static_cast<unsigned>(piece->iov.size());
    }
    piece->call.owner = piece;
    piece->call.done = [](Client::Call* call, int result) {
      auto* done = static_cast<Piece*>(call->owner);
      done->node->OnDone(done, result);
    };
    offset += length;
    rest -= length;
    Send(piece);
  }
}

void NbdNode::Send(Piece* piece) {
  if (Client* client = link_->client()) return client->Send(&piece->call);
  if (!link_->worth_waiting()) return Conclude(piece, Client::kLost);
  parked_.push_back(piece);
}

void NbdNode::OnDone(Piece* piece, int result) {
  if (result == Client::kLost && link_->OnLost()) return Send(piece);
  Conclude(piece, result);
}

void NbdNode::Conclude(Piece* piece, int result) {
  std::unique_ptr<Piece> done(piece);
  Request* of = done->request;
  if (result && of->result == 0) of->result = result;
  if (--*done->left > 0) return;
  delete done->left;
  under_way_--;
  // The client calls in a fiber of its own.
  FinishLater(of, of->result);
}

// Connected again, or never.
void NbdNode::Resume() {
  std::vector<Piece*> parked = std::exchange(parked_, {});
  for (Piece* piece : parked) Send(piece);
  changed_.WakeAll();
}

int NbdNode::AwaitStatus(uint64_t offset, uint32_t length, std::vector<StatusExtent>& extents) {
  struct Wait {
    Fiber* fiber;
    int result;
  };
  while (true) {
    Client* client = link_->client();
    if (!client && !link_->worth_waiting()) return Client::kLost;
    if (!client) {
      changed_.Wait();
      continue;
    }
    Wait wait = {Fiber::Current(), 0};
    Client::Call call = {.command = Command::kBlockStatus, .flags = kReqOne, .offset = offset};
    call.length = length;
    call.extents = &extents;
    call.owner = &wait;
    call.done = [](Client::Call* done, int result) {
      auto* waiting = static_cast<Wait*>(done->owner);
      waiting->result = result;
      waiting->fiber->Wake();
    };
    client->Send(&call);
    Fiber::Suspend();
    if (wait.result != Client::kLost || !link_->OnLost()) return wait.result;
  }
}

Result<Extent> NbdNode::Status(uint64_t offset, uint64_t length) {
  if (!link_->info().has_allocation) return Node::Status(offset, length);
  constexpr uint64_t kMost = uint64_t{2} << 30;
  std::vector<StatusExtent> extents;
  if (int rc = AwaitStatus(offset, static_cast<uint32_t>(std::min(length, kMost)), extents))
    return Fail(IoError(*this, "examine", offset, rc));
  Extent extent = {.length = std::min(length, kMost), .allocated = true, .data = true};
  if (!extents.empty() && extents[0].length > 0) {
    extent.length = std::min<uint64_t>(extent.length, extents[0].length);
    extent.zero = (extents[0].flags & kStateZero) != 0;
    extent.data = !(extents[0].flags & kStateHole);
  }
  extent.has_offset = true;
  extent.offset = offset;
  extent.file = this;
  return extent;
}

Result<Location> LocationOf(Options& options) {
  Location location;
  if (auto filename = options.Take("filename")) return ParseLocation(*filename);
  // "server": {"type": "unix", "path": ...}, or flat, as of old.
  Options server = options.TakeBelow("server");
  Options& from = server.empty() ? options : server;
  from.Take("type");
  location.address.path = from.Take("path", "");
  location.address.host = from.Take("host", "");
  location.address.port = from.Take("port", kDefaultPort);
  TRY(server.RefuseRest("server of nbd", {"type", "path", "host", "port"}));
  location.name = options.Take("export", "");
  if (location.address.path.empty() && location.address.host.empty())
    return Fail(ErrorCode::kInvalid, "nbd: neither path= nor host= is given");
  return location;
}

Result<int64_t> TakeSeconds(Options& options, const std::string& key) {
  constexpr uint64_t kMost = 1'000'000;
  uint64_t seconds = TRY(options.TakeNumber(key, 0));
  if (seconds > kMost)
    return Fail(ErrorCode::kInvalid, fmt::format("{}={}: too many seconds", key, seconds));
  return static_cast<int64_t>(seconds) * 1'000'000'000;
}

Result<> TakeTls(const OpenEnv& env, Options& options, LinkOptions& how) {
  std::optional<std::string> id = options.Take("tls-creds");
  how.tls.hostname = options.Take("tls-hostname", how.location.address.host);
  if (!id) {
    if (how.tls.hostname != how.location.address.host)
      return Fail(ErrorCode::kInvalid, "tls-hostname= goes with tls-creds= alone");
    return {};
  }
  if (!env.tls)
    return Fail(ErrorCode::kNotFound, fmt::format("tls-creds={}: there are no objects here", *id));
  how.tls.credentials = TRY(env.tls(*id));
  if (how.tls.credentials->endpoint() != TlsSpec::Endpoint::kClient)
    return Fail(ErrorCode::kInvalid,
                fmt::format("tls-creds={}: it has endpoint=server, and a client's is needed", *id));
  return {};
}

Result<NodePtr> Open(const OpenEnv& env, const NodeOptions& node, Options& options) {
  std::string filename = options.Has("filename") ? options.all().at("filename").text : "";
  Location location = TRY(LocationOf(options));
  std::string name = filename;
  if (name.empty())
    name = location.address.path.empty()
               ? fmt::format("nbd://{}/{}", location.address.Text(), location.name)
               : fmt::format("nbd+unix:///{}?socket={}", location.name, location.address.path);
  LinkOptions how = {.location = std::move(location)};
  how.reconnect_delay_ns = TRY(TakeSeconds(options, "reconnect-delay"));
  how.open_timeout_ns = TRY(TakeSeconds(options, "open-timeout"));
  TRY(TakeTls(env, options, how));
  TRY(options.RefuseRest(
      "nbd", {"server.type", "server.path", "server.host", "server.port", "path", "host", "port",
              "export", "tls-creds", "tls-hostname", "reconnect-delay", "open-timeout"}));
  auto link = std::make_shared<ClientLink>(env.loop, std::move(how));
  Result<> opened = link->Open();
  if (!opened) return Fail(std::move(opened).error().In(fmt::format("'{}'", name)));
  if (!node.read_only && (link->info().flags & kReadOnly) && !node.auto_read_only) {
    link->Close();
    return Fail(ErrorCode::kPermission,
                fmt::format("'{}': the NBD server offers this export read-only", name));
  }
  return std::make_shared<NbdNode>(env.loop, std::move(name), std::move(link), node.read_only);
}

}  // namespace
}  // namespace nbd

extern const Driver kNbdDriver;
const Driver kNbdDriver = {.name = "nbd", .kind = Driver::Kind::kProtocol, .open = nbd::Open};

}  // namespace kvartz::block
