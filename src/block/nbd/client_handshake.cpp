// The negotiation of the NBD protocol, the client's side. Fixed newstyle is what servers have
// spoken since 2011; older ones have one export without a name (oldstyle), or take a name and no
// options.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "block/nbd/client.h"
#include "block/nbd/client_wire.h"

namespace kvartz::block::nbd {
namespace {

constexpr unsigned kMostReplies = 1024;  // of one option
constexpr const char* kAllocation = "base:allocation";

// Of a peer: printable, and not too long.
std::string Quote(std::span<const uint8_t> bytes) {
  std::string text(bytes.begin(),
                   bytes.begin() + static_cast<ptrdiff_t>(std::min<size_t>(bytes.size(), 200)));
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, '?');
  return text;
}

std::unexpected<Error> NoTls() {
  return Fail(ErrorCode::kPermission, "the NBD server offers no TLS, and tls-creds asks for it");
}

}  // namespace

int Client::SendOption(Option option, std::span<const uint8_t> data) {
  OptionHeader header;
  header.magic = kOptionMagic;
  header.option = static_cast<uint32_t>(option);
  header.length = static_cast<uint32_t>(data.size());
  iovec iov[2] = {{&header, sizeof header}, {const_cast<uint8_t*>(data.data()), data.size()}};
  return stream_.Write(iov);
}

Result<std::vector<uint8_t>> Client::ReadReply(Option option, uint32_t& type) {
  OptionReply reply;
  if (int rc = stream_.ReadStruct(reply)) return Lost(rc);
  if (reply.magic != kOptionReplyMagic) return Broken("an option's reply has no magic number");
  if (reply.option != static_cast<uint32_t>(option)) return Broken("a reply to another option");
  if (reply.length > kMostOption) return Broken("an option's reply is too long");
  type = reply.type;
  std::vector<uint8_t> data(reply.length);
  if (int rc = stream_.Read(data)) return Lost(rc);
  return data;
}

Result<> Client::Greet() {
  struct {
    Be64 magic, option_magic;
  } greeting;
  if (int rc = stream_.ReadStruct(greeting)) return Lost(rc);
  if (greeting.magic != kMagic) return Fail(ErrorCode::kInvalid, "the peer is no NBD server");
  if (greeting.option_magic == kOldStyleMagic) {
    style_ = Style::kOld;
    return tls_.credentials ? NoTls() : ReadOldExport();
  }
  if (greeting.option_magic != kOptionMagic) return Broken("an unknown style of negotiation");
  Be16 flags;
  if (int rc = stream_.ReadStruct(flags)) return Lost(rc);
  style_ = flags & kFixedNewstyle ? Style::kFixedNew : Style::kNew;
  has_reserved_ = !(flags & kNoZeroes);
  Be32 answer = uint32_t{flags} & (kFixedNewstyle | kNoZeroes);
  if (int rc = stream_.Write({reinterpret_cast<const uint8_t*>(&answer), sizeof answer}))
    return Lost(rc);
  if (!tls_.credentials) return {};
  if (style_ != Style::kFixedNew) return NoTls();
  uint32_t type = 0;
  if (int rc = SendOption(Option::kStartTls, {})) return Lost(rc);
  TRY(ReadReply(Option::kStartTls, type));
  if (type != kRepAck) return NoTls();
  return stream_.StartTls(tls_.credentials, tls_.hostname);
}

Result<> Client::ReadOldExport() {
  struct {
    Be64 size;
    Be32 flags;
  } reply;
  if (int rc = stream_.ReadStruct(reply)) return Lost(rc);
  if (reply.flags > UINT16_MAX) return Broken("unknown flags");
  info_.size = reply.size;
  info_.flags = static_cast<uint16_t>(reply.flags);
  return SkipReserved();
}

Result<> Client::SkipReserved() {
  uint8_t reserved[kReservedBytes];
  if (int rc = stream_.Read(reserved)) return Lost(rc);
  return {};
}

Result<> Client::Handshake(const std::string& name) {
  if (name.size() > kMostName)
    return Fail(ErrorCode::kInvalid, "the export's name is longer than 4096 bytes");
  TRY(Greet());
  TRY(Negotiate(name));
  if (!(info_.flags & kHasFlags)) return Broken("no transmission flags");
  if (info_.size > uint64_t{INT64_MAX}) return Broken("an impossible size");
  return {};
}

Result<> Client::Negotiate(const std::string& name) {
  if (style_ == Style::kNew) return ExportName(name);
  if (style_ == Style::kOld) {
    if (name.empty()) return {};
    return Fail(ErrorCode::kNotFound,
                fmt::format("the NBD server has no export '{}': it speaks the old style, and its "
                            "only export has no name",
                            Quote({reinterpret_cast<const uint8_t*>(name.data()), name.size()})));
  }
  uint32_t type = 0;
  if (int rc = SendOption(Option::kStructuredReply, {})) return Lost(rc);
  TRY(ReadReply(Option::kStructuredReply, type));
  if (type == kErrTlsRequired) return NeedsTls();
  info_.structured = type == kRepAck;
  if (!info_.structured && !(type & kRepError)) return Broken("an unknown reply");
  if (info_.structured) TRY(AskForAllocation(name));
  return Go(name);
}

Result<> Client::AskForAllocation(const std::string& name) {
  std::vector<uint8_t> data;
  AppendText(data, name);
  Append(data, Be32(1));
  AppendText(data, kAllocation);
  if (int rc = SendOption(Option::kSetMetaContext, data)) return Lost(rc);
  for (unsigned i = 0; i < kMostReplies; i++) {
    uint32_t type = 0;
    std::vector<uint8_t> reply = TRY(ReadReply(Option::kSetMetaContext, type));
    if (type == kRepAck || (type & kRepError)) return {};
    if (type != kRepMetaContext || reply.size() < sizeof(Be32))
      return Broken("a malformed context");
    std::string_view context(reinterpret_cast<const char*>(reply.data()) + 4, reply.size() - 4);
    if (context != kAllocation) return Broken("a context that wasn't asked for");
    info_.has_allocation = true;
    info_.allocation_id = At<Be32>(reply, 0);
  }
  return Broken("too many contexts");
}

Result<> Client::OnInfo(std::span<const uint8_t> data) {
  if (data.size() < 2) return Broken("a malformed information");
  uint16_t type = At<Be16>(data, 0);
  if (type == kInfoExport) {
    if (data.size() != 12) return Broken("a malformed information");
    info_.size = At<Be64>(data, 2);
    info_.flags = At<Be16>(data, 10);
  } else if (type == kInfoBlockSize) {
    if (data.size() != 14) return Broken("a malformed information");
    info_.min_block = At<Be32>(data, 2);
    uint32_t most = At<Be32>(data, 10);
    bool power = info_.min_block != 0 && (info_.min_block & (info_.min_block - 1)) == 0;
    if (!power || info_.min_block > 65536 || most < info_.min_block)
      return Broken("impossible block sizes");
    info_.max_block = std::min(most, kMostPayload) / info_.min_block * info_.min_block;
  }
  return {};
}

Result<> Client::Go(const std::string& name) {
  std::vector<uint8_t> data;
  AppendText(data, name);
  Append(data, Be16(1));
  Append(data, Be16(kInfoBlockSize));
  if (int rc = SendOption(Option::kGo, data)) return Lost(rc);
  for (unsigned i = 0; i < kMostReplies; i++) {
    uint32_t type = 0;
    std::vector<uint8_t> reply = TRY(ReadReply(Option::kGo, type));
    if (type == kRepAck) return {};
    if (type == kErrUnsupported) return ExportName(name);
    if (type == kErrTlsRequired) return NeedsTls();
    if (type == kErrUnknown)
      return Fail(ErrorCode::kNotFound, fmt::format("the NBD server has no export '{}'{}{}", name,
                                                    reply.empty() ? "" : ": ", Quote(reply)));
    if (type & kRepError)
      return Fail(ErrorCode::kPermission,
                  fmt::format("the NBD server refuses export '{}' (error {:#x}){}{}", name,
                              type & ~kRepError, reply.empty() ? "" : ": ", Quote(reply)));
    if (type != kRepInfo) return Broken("an unknown reply");
    TRY(OnInfo(reply));
  }
  return Broken("too much information");
}

// Servers from before NBD_OPT_GO.
Result<> Client::ExportName(const std::string& name) {
  if (int rc = SendOption(Option::kExportName,
                          {reinterpret_cast<const uint8_t*>(name.data()), name.size()}))
    return Lost(rc);
  struct {
    Be64 size;
    Be16 flags;
  } reply;
  if (int rc = stream_.ReadStruct(reply)) return Lost(rc);
  info_.size = reply.size;
  info_.flags = reply.flags;
  return has_reserved_ ? SkipReserved() : Result<>();
}

}  // namespace kvartz::block::nbd
