// One client of an NBD server.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "block/fiber_io.h"
#include "block/nbd/protocol.h"
#include "block/nbd/server.h"
#include "block/nbd/stream.h"

namespace kvartz::block::nbd {

// Loop-owned. One fiber reads, one writes; requests are the node's meanwhile.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(Server& server, EventLoop& loop, UniqueFd socket);
  void Start();
  void End() { stream_.Shutdown(); }
  bool is_leaving() const { return stream_.PeerIsGone(); }
  const Export* chosen() const { return export_.get(); }  // null: not yet

 private:
  // Something that the client asked to be told of with block status.
  struct Context {
    enum class Kind : uint8_t { kAllocation, kDepth, kBitmap };
    Kind kind = Kind::kAllocation;
    std::string name = {};
    uint32_t id = 0;
    std::shared_ptr<DirtyBitmap> bitmap = nullptr;
  };
  struct Job;
  using Payload = std::vector<uint8_t>;

  // Handshake (connection_handshake.cpp). Answers: 0 the transmission begins, else -errno.
  int Handshake();
  int OnOption(Option option, const Payload& data, bool& begins);
  int ExportName(const Payload& data);
  int StartTls(const Payload& data);
  int List();
  int InfoOrGo(Option option, const Payload& data, bool& begins);
  int MetaContext(Option option, const Payload& data);
  int SendInfo(const Export& chosen, Option option, std::span<const uint8_t> wanted);
  int Reply(Option option, uint32_t type, std::span<const uint8_t> data = {});
  int Refuse(Option option, uint32_t type, const std::string& text);
  std::vector<Context> ContextsOf(const Export& of) const;
  uint16_t TransmissionFlags(const Export& of) const;

  // Transmission.
  void Transmit();
  int TakeRequest();
  int CheckRequest(const RequestHeader& header) const;  // 0 or an errno for the client
  void Begin(Job* job);
  void StatusJob(Job* job);
  void ReadJob(Job* job);
  int Describe(const Context& context, uint64_t offset, uint64_t length, bool one, Payload& out);
  void Finish(Job* job, int result);
  void WriteReplies();
  void AppendReply(Job& job, std::vector<iovec>& iov);

  Server& server_;
  EventLoop& loop_;
  Stream stream_;
  Timer deadline_;
  bool no_zeroes_ = false, structured_ = false;
  std::shared_ptr<Export> export_;
  std::shared_ptr<Export> contexts_of_;
  std::vector<Context> contexts_;

  std::deque<Job*> replies_;
  Fiber* writer_ = nullptr;
  bool flush_posted_ = false, reading_ = false, failed_ = false;
  unsigned under_way_ = 0;
  uint64_t bytes_under_way_ = 0;
  FiberQueue room_;
};

}  // namespace kvartz::block::nbd
