#include "block/nbd/connection.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "block/graph.h"

namespace kvartz::block::nbd {
namespace {

constexpr unsigned kMostJobs = 64;
constexpr uint64_t kMostBytes = 64 << 20;
constexpr int64_t kHandshakeNs = 30'000'000'000;
constexpr size_t kMostExtents = 4096;  // of one answer to block status
constexpr size_t kMostAtOnce = 128;    // replies of one write

}  // namespace

uint32_t ToWire(int error) {
  switch (error) {
    case 0:
    case EPERM:
    case EIO:
    case ENOMEM:
    case EINVAL:
    case ENOSPC:
    case EOVERFLOW:
    case ENOTSUP:
    case ESHUTDOWN:
      return static_cast<uint32_t>(error);
    case EROFS:
      return EPERM;
    case EFBIG:
    case EDQUOT:
      return ENOSPC;
    default:
      return EIO;
  }
}

int FromWire(uint32_t error) {
  bool known =
      error <= static_cast<uint32_t>(ESHUTDOWN) && ToWire(static_cast<int>(error)) == error;
  return known ? -static_cast<int>(error) : -EIO;
}

// A request of the client, until its reply is sent.
struct Connection::Job {
  Connection* connection;
  RequestHeader header;
  Request request;
  iovec iov;
  std::unique_ptr<uint8_t[]> data;  // of reads and writes
  Payload status;                   // whole chunks of block status
  bool hole = false;                // a read of zeros
  int result = 0;
  SimpleReply simple;
  struct {
    ChunkHeader header;
    Be64 offset;
  } chunk;
  struct {
    ChunkHeader header;
    Be64 offset;
    Be32 length;
  } hole_chunk;
  struct {
    ChunkHeader header;
    Be32 error;
    Be16 length;
  } error;

  Command command() const { return static_cast<Command>(uint16_t{header.type}); }
};

namespace {

// Status costs no round trip to another server.
bool IsLocal(const Node& node) {
  const Node *file = node.file(), *backing = node.backing();
  if (!file && std::string_view(node.driver()) != "file") return false;
  return (!file || IsLocal(*file)) && (!backing || IsLocal(*backing));
}

}  // namespace

Connection::Connection(Server& server, EventLoop& loop, UniqueFd socket)
    : server_(server),
      loop_(loop),
      stream_(loop, std::move(socket)),
      deadline_(loop, [this] { End(); }) {}

void Connection::Start() {
  deadline_.Arm(loop_.clock().NowNs() + kHandshakeNs);
  reading_ = true;
  Fiber::Start(
      [self = shared_from_this()] {
        int rc = self->Handshake();
        self->deadline_.Cancel();
        if (rc == 0) self->Transmit();
        self->reading_ = false;
        self->End();
      },
      [self = shared_from_this()] { self->server_.Gone(self.get(), self->export_ != nullptr); });
}

// Returns when the client is gone and nothing is under way any more.
void Connection::Transmit() {
  bool writing = true;
  Fiber::Start([this, &writing] {
    WriteReplies();
    writing = false;
    room_.WakeAll();
  });
  while (!failed_ && TakeRequest() == 0) {
  }
  failed_ = true;
  while (under_way_ > 0 || !replies_.empty()) {
    if (writer_) writer_->Wake();
    room_.Wait();
  }
  reading_ = false;
  while (writing) {
    if (writer_) writer_->Wake();
    room_.Wait();
  }
  // What was written and not flushed is safe then, as with a local program that ends.
  if (export_->writable) FlushNode(*export_->node);
}

int Connection::CheckRequest(const RequestHeader& header) const {
  auto command = static_cast<Command>(uint16_t{header.type});
  uint64_t size = export_->node->size_bytes(), offset = header.offset, length = header.length;
  bool moves = command == Command::kRead || command == Command::kWrite;
  if (command == Command::kFlush) return offset != 0 || length != 0 ? EINVAL : 0;
  bool writes =
      command == Command::kWrite || command == Command::kTrim || command == Command::kWriteZeroes;
  if (writes && !export_->writable) return EPERM;
  if (moves && length > kMostPayload) return EOVERFLOW;
  if (offset > size || length > size - offset) return writes ? ENOSPC : EINVAL;
  if (command != Command::kCache &&
      (offset | length) % export_->node->limits().request_alignment != 0)
    return EINVAL;
  uint16_t allowed = kFua;
  if (command == Command::kRead) allowed |= structured_ ? kDf : 0;
  if (command == Command::kWriteZeroes) allowed |= kNoHole | kFastZero;
  if (command == Command::kBlockStatus) allowed |= kReqOne;
  if (header.flags & ~allowed) return EINVAL;
  if (command == Command::kBlockStatus && (length == 0 || contexts_.empty() || !structured_))
    return EINVAL;
  if (command > Command::kBlockStatus || command == Command::kDisconnect) return EINVAL;
  return 0;
}

int Connection::TakeRequest() {
  RequestHeader header;
  if (int rc = stream_.ReadStruct(header)) return rc;
  if (header.magic != kRequestMagic) return -EPROTO;
  auto command = static_cast<Command>(uint16_t{header.type});
  if (command == Command::kDisconnect) return -ECONNABORTED;
  bool is_write = command == Command::kWrite;
  // Nobody sends so much in good faith.
  if (is_write && header.length > kMostPayload) return -EPROTO;
  int refused = CheckRequest(header);
  bool moves = refused == 0 && (is_write || command == Command::kRead);
  uint64_t bytes = moves ? uint32_t{header.length} : 0;
  while (!failed_ && under_way_ > 0 &&
         (under_way_ >= kMostJobs || bytes_under_way_ + bytes > kMostBytes))
    room_.Wait();
  if (failed_) return -EPIPE;
  auto job = std::make_unique<Job>();
  job->connection = this;
  job->header = header;
  if (refused) {
    if (is_write) {
      if (int rc = stream_.Skip(header.length)) return rc;
    }
  } else if (bytes > 0) {
    job->data.reset(new (std::nothrow) uint8_t[bytes]);
    if (!job->data) return -ENOMEM;
    if (is_write) {
      if (int rc = stream_.Read({job->data.get(), bytes})) return rc;
    }
  }
  under_way_++;
  bytes_under_way_ += bytes;
  Job* begun = job.release();
  if (refused) {
    Finish(begun, -refused);
  } else {
    Begin(begun);
  }
  return 0;
}

void Connection::Begin(Job* job) {
  const RequestHeader& header = job->header;
  Request& request = job->request;
  request = {.fua = (header.flags & kFua) != 0, .offset = header.offset, .length = header.length};
  request.owner = job;
  request.done = [](Request* done, int result) {
    auto* finished = static_cast<Job*>(done->owner);
    finished->connection->Finish(finished, result);
  };
  switch (job->command()) {
    case Command::kRead:
    case Command::kWrite:
      request.kind =
          job->command() == Command::kRead ? Request::Kind::kRead : Request::Kind::kWrite;
      if (job->command() == Command::kRead) request.fua = false;
      job->iov = {job->data.get(), request.length};
      request.iov = &job->iov;
      request.iov_count = request.length > 0 ? 1 : 0;
      if (request.kind == Request::Kind::kRead && structured_ && !(header.flags & kDf) &&
          request.length > 0 && IsLocal(*export_->node)) {
        return Fiber::Start([this, job] { ReadJob(job); });
      }
      break;
    case Command::kFlush:
      request.kind = Request::Kind::kFlush;
      break;
    case Command::kTrim:
      request.kind = Request::Kind::kDiscard;
      break;
    case Command::kWriteZeroes:
      request.kind = Request::Kind::kWriteZeroes;
      request.unmap = !(header.flags & kNoHole);
      request.no_fallback = (header.flags & kFastZero) != 0;
      break;
    case Command::kBlockStatus:
      return Fiber::Start([this, job] { StatusJob(job); });
    default:  // kCache: the host's cache knows best
      return Finish(job, 0);
  }
  export_->node->Start(&request);
}

// One context's extents, as pairs of length and flags.
int Connection::Describe(const Context& context, uint64_t offset, uint64_t length, bool one,
                         Payload& out) {
  Node& node = *export_->node;
  const uint64_t end = offset + length;
  StatusExtent last;
  bool any = false;
  size_t count = 0;
  auto emit = [&](uint64_t bytes, uint32_t flags) {
    if (any && last.flags == flags) {
      last.length = static_cast<uint32_t>(last.length + bytes);
      return;
    }
    if (any)
      out.insert(out.end(), reinterpret_cast<uint8_t*>(&last),
                 reinterpret_cast<uint8_t*>(&last + 1));
    count += any;
    last.length = static_cast<uint32_t>(bytes);
    last.flags = flags;
    any = true;
  };
  while (offset < end && count < kMostExtents && !(one && count > 0)) {
    uint64_t bytes = end - offset;
    uint32_t flags = 0;
    if (context.kind == Context::Kind::kBitmap) {
      auto dirty = context.bitmap->NextDirty(offset, end);
      flags = dirty && dirty->offset == offset ? 1 : 0;
      bytes = flags ? dirty->length : (dirty ? dirty->offset - offset : bytes);
    } else {
      Result<ChainExtent> found = StatusAbove(node, nullptr, offset, bytes);
      if (!found || found->extent.length == 0) return -EIO;
      bytes = std::min(bytes, found->extent.length);
      if (context.kind == Context::Kind::kDepth) {
        flags = found->extent.allocated ? static_cast<uint32_t>(found->depth) + 1 : 0;
      } else {
        bool data = found->extent.data && found->extent.allocated;
        flags = (data ? 0 : kStateHole) | (found->reads_as_zeros() ? kStateZero : 0);
      }
    }
    emit(bytes, flags);
    offset += bytes;
  }
  if (any && !(one && count > 0))
    out.insert(out.end(), reinterpret_cast<uint8_t*>(&last), reinterpret_cast<uint8_t*>(&last + 1));
  return 0;
}

void Connection::StatusJob(Job* job) {
  const RequestHeader& header = job->header;
  int rc = 0;
  for (size_t i = 0; rc == 0 && i < contexts_.size(); i++) {
    Payload extents;
    rc = Describe(contexts_[i], header.offset, header.length, (header.flags & kReqOne) != 0,
                  extents);
    struct {
      ChunkHeader chunk;
      Be32 context;
    } head;
    head.chunk.magic = kStructuredReplyMagic;
    head.chunk.flags = i + 1 == contexts_.size() ? kChunkDone : 0;
    head.chunk.type = kChunkStatus;
    head.chunk.cookie = header.cookie;
    head.chunk.length = static_cast<uint32_t>(sizeof head.context + extents.size());
    head.context = contexts_[i].id;
    const auto* bytes = reinterpret_cast<const uint8_t*>(&head);
    job->status.insert(job->status.end(), bytes, bytes + sizeof head);
    job->status.insert(job->status.end(), extents.begin(), extents.end());
  }
  Finish(job, rc);
}

// What is known to be zeros is neither read nor sent.
void Connection::ReadJob(Job* job) {
  Node& node = *export_->node;
  Result<ChainExtent> found = StatusAbove(node, nullptr, job->request.offset, job->request.length);
  job->hole = found && found->extent.length >= job->request.length && found->reads_as_zeros();
  if (job->hole) return Finish(job, 0);
  export_->node->Start(&job->request);
}

// Replies of one turn of the loop go out together.
void Connection::Finish(Job* job, int result) {
  job->result = result;
  replies_.push_back(job);
  if (std::exchange(flush_posted_, true)) return;
  loop_.Post([self = shared_from_this()] {
    self->flush_posted_ = false;
    if (self->writer_) self->writer_->Wake();
  });
}

void Connection::AppendReply(Job& job, std::vector<iovec>& iov) {
  auto chunk = [&](ChunkHeader& header, uint16_t type, size_t length) {
    header.magic = kStructuredReplyMagic;
    header.flags = kChunkDone;
    header.type = type;
    header.cookie = job.header.cookie;
    header.length = static_cast<uint32_t>(length);
  };
  bool read = job.command() == Command::kRead;
  uint32_t length = job.header.length;
  if (job.result < 0 && structured_ && (read || job.command() == Command::kBlockStatus)) {
    chunk(job.error.header, kChunkError, sizeof job.error - sizeof job.error.header);
    job.error.error = ToWire(-job.result);
    job.error.length = 0;
    iov.push_back({&job.error, sizeof job.error});
  } else if (job.command() == Command::kBlockStatus && job.result == 0) {
    iov.push_back({job.status.data(), job.status.size()});
  } else if (read && structured_ && length == 0) {
    chunk(job.chunk.header, kChunkNone, 0);
    iov.push_back({&job.chunk.header, sizeof job.chunk.header});
  } else if (job.hole) {
    chunk(job.hole_chunk.header, kChunkHole, sizeof job.hole_chunk - sizeof job.hole_chunk.header);
    job.hole_chunk.offset = job.header.offset;
    job.hole_chunk.length = length;
    iov.push_back({&job.hole_chunk, sizeof job.hole_chunk});
  } else if (read && structured_) {
    chunk(job.chunk.header, kChunkData, sizeof job.chunk.offset + length);
    job.chunk.offset = job.header.offset;
    iov.push_back({&job.chunk, sizeof job.chunk});
    iov.push_back({job.data.get(), length});
  } else {
    job.simple.magic = kSimpleReplyMagic;
    job.simple.error = ToWire(-job.result);
    job.simple.cookie = job.header.cookie;
    iov.push_back({&job.simple, sizeof job.simple});
    if (read && job.result == 0 && length > 0) iov.push_back({job.data.get(), length});
  }
}

void Connection::WriteReplies() {
  std::vector<iovec> iov;
  while (reading_ || !replies_.empty()) {
    if (replies_.empty()) {
      writer_ = Fiber::Current();
      Fiber::Suspend();
      writer_ = nullptr;
      continue;
    }
    std::deque<Job*> batch;
    iov.clear();
    while (!replies_.empty() && batch.size() < kMostAtOnce) {
      batch.push_back(replies_.front());
      replies_.pop_front();
      AppendReply(*batch.back(), iov);
    }
    if (!failed_ && stream_.Write(iov) != 0) {
      failed_ = true;
      End();  // who reads notices
    }
    for (Job* job : batch) {
      std::unique_ptr<Job> sent(job);
      under_way_--;
      if (sent->data) bytes_under_way_ -= uint32_t{sent->header.length};
    }
    room_.WakeAll();
  }
}

}  // namespace kvartz::block::nbd
