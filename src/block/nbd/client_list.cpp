// What a server offers: NBD_OPT_LIST, NBD_OPT_INFO and NBD_OPT_LIST_META_CONTEXT.
#include <fmt/format.h>

#include <cstring>
#include <tuple>

#include "block/nbd/client.h"
#include "block/nbd/client_wire.h"

namespace kvartz::block::nbd {
namespace {
constexpr unsigned kMostReplies = 4096;

std::unexpected<Error> DoesntList() {
  return Fail(ErrorCode::kPermission, "the NBD server doesn't list its exports");
}
}  // namespace

Result<std::vector<OfferedExport>> Client::List() {
  TRY(Greet());
  if (style_ == Style::kOld)
    return std::vector{OfferedExport{.size = info_.size, .flags = info_.flags}};
  if (style_ == Style::kNew) return DoesntList();
  uint32_t type = 0;
  if (int rc = SendOption(Option::kStructuredReply, {})) return Lost(rc);
  TRY(ReadReply(Option::kStructuredReply, type));
  if (type == kErrTlsRequired) return NeedsTls();
  info_.structured = type == kRepAck;
  std::vector<OfferedExport> exports;
  if (int rc = SendOption(Option::kList, {})) return Lost(rc);
  while (true) {
    std::vector<uint8_t> reply = TRY(ReadReply(Option::kList, type));
    if (type == kRepAck) break;
    if (type & kRepError) return DoesntList();
    Be32 length;
    if (type != kRepServer || reply.size() < sizeof length || exports.size() == kMostReplies)
      return Broken("a malformed list");
    std::memcpy(&length, reply.data(), sizeof length);
    if (length > reply.size() - sizeof length) return Broken("a malformed list");
    OfferedExport& one = exports.emplace_back();
    auto text = reply.begin() + sizeof length;
    one.name.assign(text, text + uint32_t{length});
    one.description.assign(text + uint32_t{length}, reply.end());
  }
  for (OfferedExport& one : exports) TRY(Examine(one));
  // The answer doesn't matter.
  if (SendOption(Option::kAbort, {}) == 0) std::ignore = ReadReply(Option::kAbort, type);
  return exports;
}

Result<> Client::Examine(OfferedExport& one) {
  std::vector<uint8_t> data;
  AppendText(data, one.name);
  Append(data, Be16(2));
  Append(data, Be16(kInfoDescription));
  Append(data, Be16(kInfoBlockSize));
  if (int rc = SendOption(Option::kInfo, data)) return Lost(rc);
  for (unsigned i = 0;; i++) {
    uint32_t type = 0;
    std::vector<uint8_t> reply = TRY(ReadReply(Option::kInfo, type));
    if (type == kRepAck) break;
    if (type & kRepError) return {};  // an old server, or one that hides it: its name is all
    if (type != kRepInfo || i == kMostReplies) return Broken("an unknown reply");
    bool describes = reply.size() >= 2 && At<Be16>(reply, 0) == kInfoDescription;
    if (describes) {
      one.description.assign(reply.begin() + 2, reply.end());
      continue;
    }
    if (reply.size() == 14 && At<Be16>(reply, 0) == kInfoBlockSize)
      one.preferred_block = At<Be32>(reply, 6);
    info_.max_block = 0;
    TRY(OnInfo(reply));
    if (reply.size() == 14) {
      one.min_block = info_.min_block;
      one.max_block = At<Be32>(reply, 10);
    } else {
      one.size = info_.size;
      one.flags = info_.flags;
    }
  }
  return info_.structured ? ListContexts(one) : Result<>();
}

Result<> Client::ListContexts(OfferedExport& one) {
  std::vector<uint8_t> data;
  AppendText(data, one.name);
  Append(data, Be32(0));
  if (int rc = SendOption(Option::kListMetaContext, data)) return Lost(rc);
  while (true) {
    uint32_t type = 0;
    std::vector<uint8_t> reply = TRY(ReadReply(Option::kListMetaContext, type));
    if (type == kRepAck || (type & kRepError)) return {};
    if (type != kRepMetaContext || reply.size() < sizeof(Be32) ||
        one.contexts.size() == kMostReplies)
      return Broken("a malformed context");
    one.contexts.emplace_back(reply.begin() + sizeof(Be32), reply.end());
  }
}

}  // namespace kvartz::block::nbd
