// "Newstyle negotiation" of the NBD protocol, the server's side.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/log.h"
#include "block/nbd/connection.h"

namespace kvartz::block::nbd {
namespace {

constexpr unsigned kMostContexts = 64;  // of one client
constexpr uint32_t kPreferredBlock = 4096;

template <typename T>
void Append(std::vector<uint8_t>& to, const T& value) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  to.insert(to.end(), bytes, bytes + sizeof value);
}

// Takes a number, or a text with its length before it, off the front; false if it isn't there.
template <typename T>
bool Take(std::span<const uint8_t>& from, T& value) {
  if (from.size() < sizeof value) return false;
  std::memcpy(&value, from.data(), sizeof value);
  from = from.subspan(sizeof value);
  return true;
}

bool TakeText(std::span<const uint8_t>& from, std::string& text) {
  Be32 length;
  if (!Take(from, length) || length > kMostName || length > from.size()) return false;
  text.assign(reinterpret_cast<const char*>(from.data()), length);
  from = from.subspan(length);
  return true;
}

}  // namespace

int Connection::Reply(Option option, uint32_t type, std::span<const uint8_t> data) {
  OptionReply reply;
  reply.magic = kOptionReplyMagic;
  reply.option = static_cast<uint32_t>(option);
  reply.type = type;
  reply.length = static_cast<uint32_t>(data.size());
  iovec iov[2] = {{&reply, sizeof reply}, {const_cast<uint8_t*>(data.data()), data.size()}};
  return stream_.Write(iov);
}

int Connection::Refuse(Option option, uint32_t type, const std::string& text) {
  return Reply(option, type, {reinterpret_cast<const uint8_t*>(text.data()), text.size()});
}

int Connection::Handshake() {
  struct Greeting {
    Be64 magic, option_magic;
    Be16 flags;
  } greeting;
  greeting.magic = kMagic;
  greeting.option_magic = kOptionMagic;
  greeting.flags = kFixedNewstyle | kNoZeroes;
  if (int rc = stream_.Write({reinterpret_cast<const uint8_t*>(&greeting), sizeof greeting}))
    return rc;
  Be32 flags;
  if (int rc = stream_.ReadStruct(flags)) return rc;
  if (flags & ~uint32_t{kFixedNewstyle | kNoZeroes}) return -EPROTO;
  no_zeroes_ = (flags & kNoZeroes) != 0;
  for (bool begins = false; !begins;) {
    OptionHeader header;
    if (int rc = stream_.ReadStruct(header)) return rc;
    if (header.magic != kOptionMagic) return -EPROTO;
    auto option = static_cast<Option>(uint32_t{header.option});
    if (header.length > kMostOption) {
      if (option == Option::kExportName) return -EPROTO;
      if (int rc = stream_.Skip(header.length)) return rc;
      if (int rc = Refuse(option, kErrTooBig, "the option is too long")) return rc;
      continue;
    }
    Payload data(header.length);
    if (int rc = stream_.Read(data)) return rc;
    if (int rc = OnOption(option, data, begins)) return rc;
  }
  return 0;
}

// "Baseline", FORCEDTLS: nothing is told before.
int Connection::StartTls(const Payload& data) {
  if (!data.empty()) return Refuse(Option::kStartTls, kErrInvalid, "the option takes no data");
  if (!server_.tls()) return Refuse(Option::kStartTls, kErrPolicy, "this server has no TLS");
  if (stream_.has_tls()) return Refuse(Option::kStartTls, kErrInvalid, "TLS has begun already");
  if (int rc = Reply(Option::kStartTls, kRepAck)) return rc;
  Result<> begun = stream_.StartTls(server_.tls(), "");
  if (begun) return 0;
  static log::RateLimit limit;
  if (limit.Pass()) KLOG(kWarn, "nbd: a client is refused: {}", begun.error().what);
  return -EPROTO;
}

int Connection::OnOption(Option option, const Payload& data, bool& begins) {
  if (server_.tls() && !stream_.has_tls() && option != Option::kStartTls &&
      option != Option::kAbort) {
    if (option == Option::kExportName) return -EPERM;
    return Refuse(option, kErrTlsRequired, "this server wants TLS (STARTTLS) first");
  }
  switch (option) {
    case Option::kExportName:
      begins = true;
      return ExportName(data);
    case Option::kAbort:
      if (int rc = Reply(option, kRepAck)) return rc;
      return -ECONNABORTED;
    case Option::kList:
      if (!data.empty()) return Refuse(option, kErrInvalid, "the option takes no data");
      return List();
    case Option::kStructuredReply:
      if (!data.empty()) return Refuse(option, kErrInvalid, "the option takes no data");
      structured_ = true;
      return Reply(option, kRepAck);
    case Option::kInfo:
    case Option::kGo:
      return InfoOrGo(option, data, begins);
    case Option::kListMetaContext:
    case Option::kSetMetaContext:
      return MetaContext(option, data);
    case Option::kStartTls:
      return StartTls(data);
  }
  return Refuse(option, kErrUnsupported, "unknown option");
}

uint16_t Connection::TransmissionFlags(const Export& of) const {
  uint16_t flags = kHasFlags | kSendFlush | kSendFua | kCanMultiConn | kSendCache;
  flags |= of.writable ? kSendTrim | kSendWriteZeroes | kSendFastZero : kReadOnly;
  if (structured_) flags |= kSendDf;
  return flags;
}

int Connection::ExportName(const Payload& data) {
  if (data.size() > kMostName) return -EPROTO;
  export_ = server_.Find(std::string(data.begin(), data.end()));
  if (!export_) return -ENOENT;
  if (contexts_of_ != export_) contexts_.clear();
  struct {
    Be64 size;
    Be16 flags;
    uint8_t zeroes[124] = {};
  } reply;
  reply.size = export_->node->size_bytes();
  reply.flags = TransmissionFlags(*export_);
  return stream_.Write({reinterpret_cast<const uint8_t*>(&reply),
                        no_zeroes_ ? sizeof reply - sizeof reply.zeroes : sizeof reply});
}

int Connection::List() {
  for (const auto& one : server_.exports()) {
    Payload data;
    Append(data, Be32(static_cast<uint32_t>(one->name.size())));
    data.insert(data.end(), one->name.begin(), one->name.end());
    data.insert(data.end(), one->description.begin(), one->description.end());
    if (int rc = Reply(Option::kList, kRepServer, data)) return rc;
  }
  return Reply(Option::kList, kRepAck);
}

int Connection::SendInfo(const Export& chosen, Option option, std::span<const uint8_t> wanted) {
  auto send = [&](uint16_t type, const Payload& more) {
    Payload data;
    Append(data, Be16(type));
    data.insert(data.end(), more.begin(), more.end());
    return Reply(option, kRepInfo, data);
  };
  Be16 type;
  while (Take(wanted, type)) {
    int rc = 0;
    if (type == kInfoName) rc = send(kInfoName, Payload(chosen.name.begin(), chosen.name.end()));
    if (type == kInfoDescription && !chosen.description.empty())
      rc = send(kInfoDescription, Payload(chosen.description.begin(), chosen.description.end()));
    if (rc) return rc;
  }
  Payload blocks;
  Append(blocks, Be32(chosen.node->limits().request_alignment));
  Append(blocks, Be32(kPreferredBlock));
  Append(blocks, Be32(kMostPayload));
  if (int rc = send(kInfoBlockSize, blocks)) return rc;
  Payload info;
  Append(info, Be64(chosen.node->size_bytes()));
  Append(info, Be16(TransmissionFlags(chosen)));
  return send(kInfoExport, info);
}

int Connection::InfoOrGo(Option option, const Payload& data, bool& begins) {
  std::span<const uint8_t> rest(data);
  std::string name;
  Be16 count;
  if (!TakeText(rest, name) || !Take(rest, count) || rest.size() != uint32_t{count} * 2)
    return Refuse(option, kErrInvalid, "the option is malformed");
  std::shared_ptr<Export> chosen = server_.Find(name);
  if (!chosen) return Refuse(option, kErrUnknown, fmt::format("export '{}' not present", name));
  if (int rc = SendInfo(*chosen, option, rest)) return rc;
  if (int rc = Reply(option, kRepAck)) return rc;
  if (option == Option::kInfo) return 0;
  begins = true;
  export_ = std::move(chosen);
  if (contexts_of_ != export_) contexts_.clear();
  return 0;
}

std::vector<Connection::Context> Connection::ContextsOf(const Export& of) const {
  std::vector<Context> contexts = {{Context::Kind::kAllocation, "base:allocation", 0, nullptr}};
  if (of.allocation_depth)
    contexts.push_back({Context::Kind::kDepth, "qemu:allocation-depth", 1, nullptr});
  uint32_t id = 2;
  for (const auto& bitmap : of.bitmaps)
    contexts.push_back(
        {Context::Kind::kBitmap, "qemu:dirty-bitmap:" + bitmap->name(), id++, bitmap});
  return contexts;
}

int Connection::MetaContext(Option option, const Payload& data) {
  if (!structured_) return Refuse(option, kErrInvalid, "structured replies come first");
  std::span<const uint8_t> rest(data);
  std::string name;
  Be32 count;
  if (!TakeText(rest, name) || !Take(rest, count))
    return Refuse(option, kErrInvalid, "the option is malformed");
  std::vector<std::string> queries;
  for (uint32_t i = 0; i < count; i++) {
    std::string query;
    if (!TakeText(rest, query)) return Refuse(option, kErrInvalid, "the option is malformed");
    queries.push_back(std::move(query));
  }
  if (!rest.empty()) return Refuse(option, kErrInvalid, "the option is malformed");
  std::shared_ptr<Export> of = server_.Find(name);
  if (!of) return Refuse(option, kErrUnknown, fmt::format("export '{}' not present", name));
  bool list = option == Option::kListMetaContext;
  std::vector<Context> chosen;
  for (const Context& context : ContextsOf(*of)) {
    bool wanted = list && queries.empty();
    for (const std::string& query : queries) {
      // "base:" and "qemu:dirty-bitmap:" list what is below them.
      bool all_below = list && query.ends_with(':') && context.name.starts_with(query);
      wanted = wanted || query == context.name || all_below;
    }
    if (!wanted || chosen.size() == kMostContexts) continue;
    chosen.push_back(context);
    Payload reply;
    Append(reply, Be32(list ? 0 : context.id));
    reply.insert(reply.end(), context.name.begin(), context.name.end());
    if (int rc = Reply(option, kRepMetaContext, reply)) return rc;
  }
  if (!list) {
    contexts_ = std::move(chosen);
    contexts_of_ = of;
  }
  return Reply(option, kRepAck);
}

}  // namespace kvartz::block::nbd
