// NBD client: what a server said of an export, and requests to it.
#pragma once

#include <cerrno>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "block/nbd/address.h"
#include "block/nbd/protocol.h"
#include "block/nbd/stream.h"
#include "block/node.h"

namespace kvartz::block::nbd {

struct ExportInfo {
  uint64_t size = 0;
  uint16_t flags = 0;
  uint32_t min_block = 1, max_block = kMostPayload;
  bool structured = false;
  bool has_allocation = false;  // block status tells base:allocation, as context `allocation_id`
  uint32_t allocation_id = 0;
};

// What a server tells of one of its exports.
struct OfferedExport {
  std::string name = {}, description = {};
  uint64_t size = 0;
  uint16_t flags = 0;  // 0: nothing but the name is known
  uint32_t min_block = 0, preferred_block = 0, max_block = 0;
  std::vector<std::string> contexts = {};
};

// What TLS takes, if `credentials` are there.
struct ClientTls {
  std::shared_ptr<const TlsCredentials> credentials = nullptr;
  std::string hostname = {};
};

// Loop-owned. One fiber reads, one writes, until End. What a server sends beyond its protocol ends
// the connection: requests under way and to come end with kLost.
class Client : public std::enable_shared_from_this<Client> {
 public:
  Client(EventLoop& loop, UniqueFd socket, ClientTls tls = {})
      : stream_(loop, std::move(socket)), tls_(std::move(tls)) {}
  // The result of requests when the connection is gone: no server sends it.
  static constexpr int kLost = -ENOTCONN;

  // Fiber: the negotiation, up to the transmission.
  Result<> Handshake(const std::string& name);
  // Fiber: instead of Handshake; the connection is of no use afterwards.
  Result<std::vector<OfferedExport>> List();
  const ExportInfo& info() const { return info_; }
  void Start();  // after the handshake
  // Fiber: tells the server and waits until the fibers are gone.
  void End();
  // Without telling anybody; who is under way is told.
  void Break() { stream_.Shutdown(); }
  // To another loop, with no call under way: Pause (fiber), then Resume on that one's thread.
  void Pause();
  void Resume(EventLoop& loop);

  struct Call {
    Command command = Command::kRead;
    uint16_t flags = 0;
    uint64_t offset = 0;
    uint32_t length = 0;
    const iovec* iov = nullptr;  // kRead, kWrite
    unsigned iov_count = 0;
    std::vector<StatusExtent>* extents = nullptr;    // kBlockStatus
    void (*done)(Call* call, int result) = nullptr;  // never from within Send
    void* owner = nullptr;
    uint64_t received = 0;
    int result = 0;
  };
  void Send(Call* call);  // not when it is broken()
  bool idle() const { return calls_.empty() && queue_.empty(); }
  bool broken() const { return broken_; }

 private:
  enum class Style : uint8_t { kOld, kNew, kFixedNew };
  Result<> Greet();
  Result<> ReadOldExport();
  Result<> SkipReserved();
  Result<> Negotiate(const std::string& name);
  Result<std::vector<uint8_t>> ReadReply(Option option, uint32_t& type);
  int SendOption(Option option, std::span<const uint8_t> data);
  Result<> AskForAllocation(const std::string& name);
  Result<> Go(const std::string& name);
  Result<> ExportName(const std::string& name);
  Result<> OnInfo(std::span<const uint8_t> data);
  Result<> Examine(OfferedExport& one);
  Result<> ListContexts(OfferedExport& one);

  void AwaitFibers();
  void WriteLoop();
  void ReadLoop();
  int ReadReplies();
  int ReadChunk();
  int ReadData(Call& call, uint64_t length);
  int ReadHole(Call& call);
  int ReadStatus(Call& call, uint64_t length);
  int ReadError(Call& call, uint64_t length);
  void Conclude(uint64_t cookie, int result);
  void FailAll();

  Stream stream_;
  const ClientTls tls_;
  ExportInfo info_;
  Style style_ = Style::kFixedNew;
  bool has_reserved_ = false;                  // zeros follow what NBD_OPT_EXPORT_NAME is answered
  std::unordered_map<uint64_t, Call*> calls_;  // sent, by cookie
  std::vector<Call*> queue_;                   // not sent yet
  uint64_t next_cookie_ = 1;
  Fiber* writer_ = nullptr;
  Fiber* ender_ = nullptr;
  unsigned fibers_ = 0;
  bool broken_ = false, ending_ = false, pausing_ = false;
};

}  // namespace kvartz::block::nbd
