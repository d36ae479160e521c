#include "block/crypto/crypt_node.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "block/fiber_io.h"
#include "block/io_batch.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kPieceBytes = 1 << 20;    // of memory a request takes at once
constexpr uint64_t kThreadBytes = 64 << 10;  // from here on, a thread is worth waking
constexpr unsigned kThreads = 4;
constexpr uint32_t kSector = 512;

}  // namespace

// Units [from, end) are being written. Where one of two that overlap isn't of whole units, the
// later waits.
class CryptNode::WritingGuard {
 public:
  WritingGuard(CryptNode& node, uint64_t from, uint64_t end, bool partly) : node_(node) {
    mine_.from = from;
    mine_.end = end;
    mine_.partly = partly;
    while (Writing* other = FindOther()) other->waiting.Wait();
    place_ = node.writing_.insert(node.writing_.end(), &mine_);
  }
  ~WritingGuard() {
    node_.writing_.erase(place_);
    mine_.waiting.WakeAll();
  }
  WritingGuard(const WritingGuard&) = delete;
  WritingGuard& operator=(const WritingGuard&) = delete;

 private:
  Writing* FindOther() const {
    for (Writing* other : node_.writing_) {
      if (other->from < mine_.end && mine_.from < other->end && (other->partly || mine_.partly))
        return other;
    }
    return nullptr;
  }
  CryptNode& node_;
  Writing mine_;
  std::list<Writing*>::iterator place_;
};

CryptNode::CryptNode(NodePtr below, std::shared_ptr<const SectorCipher> cipher,
                     const Layout& layout, bool read_only)
    : Node(below->loop(), below->name()),
      below_(std::move(below)),
      layout_(layout),
      cipher_(std::move(cipher)),
      unit_(std::max(layout.sector_bytes, below_->limits().request_alignment)),
      workers_(loop(), kThreads) {
  VERIFY(layout_.offset % below_->limits().request_alignment == 0);
  size_bytes_ = layout.size;
  read_only_ = read_only || below_->read_only();
  grows_ = layout.grows;
  limits_.write_cache = below_->limits().write_cache;
}

void CryptNode::Drain() {
  do {
    below_->Drain();
  } while (FinishLateOnes() || workers_.FinishOne() || in_fibers() > 0);
}

Result<> CryptNode::SetReadOnly(bool read_only) {
  read_only_ = read_only;
  return {};
}

void CryptNode::Submit(Request* request) {
  switch (request->kind) {
    case Request::Kind::kFlush:
      return below_->Start(request);
    case Request::Kind::kDiscard:  // it would show which parts are in use
      return FinishLater(request, 0);
    case Request::Kind::kWriteZeroes:
      if (request->no_fallback) return FinishLater(request, -ENOTSUP);
      break;
    default:
      break;
  }
  if (request->length == 0) return FinishLater(request, 0);
  if (!cipher_) return FinishLater(request, -EACCES);
  if (grows_ && request->kind != Request::Kind::kRead)
    size_bytes_ = std::max(size_bytes_, request->offset + request->length);
  SubmitInFiber(request, [this](Request& own) { return Handle(own); });
}

int CryptNode::Handle(const Request& request) {
  if (request.kind != Request::Kind::kRead) {
    if (int rc = WritePieces(request)) return rc;
    return request.fua ? FlushNode(*below_) : 0;
  }
  auto whole = [&](const iovec& iov) { return iov.iov_len % layout_.sector_bytes == 0; };
  bool in_place = (request.offset | request.length) % unit_ == 0 &&
                  std::all_of(request.iov, request.iov + request.iov_count, whole);
  return in_place ? ReadWhole(request) : ReadPieces(request);
}

void CryptNode::Compute(uint64_t bytes, const std::function<void()>& job) {
  if (bytes < kThreadBytes) return job();
  workers_.Run(job);
}

void CryptNode::Transform(uint64_t from, std::span<uint8_t> bytes, bool encrypt) {
  uint64_t sector = layout_.first_sector + from / kSector;
  if (encrypt) {
    cipher_->Encrypt(sector, layout_.sector_bytes, bytes);
  } else {
    cipher_->Decrypt(sector, layout_.sector_bytes, bytes);
  }
}

// Into the caller's memory, and decrypted there.
int CryptNode::ReadWhole(const Request& request) {
  Request inner = {.kind = Request::Kind::kRead,
                   .offset = Below(request.offset),
                   .length = request.length,
                   .iov = request.iov,
                   .iov_count = request.iov_count};
  if (int rc = Await(*below_, inner)) return rc;
  Compute(request.length, [&] {
    uint64_t at = request.offset;
    for (unsigned i = 0; i < request.iov_count; i++) {
      const iovec& iov = request.iov[i];
      Transform(at, {static_cast<uint8_t*>(iov.iov_base), iov.iov_len}, false);
      at += iov.iov_len;
    }
  });
  return 0;
}

int CryptNode::ReadUnits(uint64_t from, std::span<uint8_t> bytes) {
  if (int rc = ReadAt(*below_, Below(from), bytes)) return rc;
  Compute(bytes.size(), [&] { Transform(from, bytes, false); });
  return 0;
}

int CryptNode::WriteUnits(uint64_t from, std::span<uint8_t> bytes) {
  Compute(bytes.size(), [&] { Transform(from, bytes, true); });
  return WriteAt(*below_, Below(from), bytes);
}

int CryptNode::ReadPieces(const Request& request) {
  IovCursor cursor(request.iov, request.iov_count);
  const uint64_t end = request.offset + request.length;
  SecretBytes buffer;
  for (uint64_t at = request.offset; at < end;) {
    uint64_t from = at / unit_ * unit_;
    uint64_t stop = std::min(end, from + kPieceBytes);
    buffer.resize((stop + unit_ - 1) / unit_ * unit_ - from);
    if (int rc = ReadUnits(from, buffer)) return rc;
    cursor.CopyIn(std::span<const uint8_t>(buffer).subspan(at - from, stop - at));
    at = stop;
  }
  return 0;
}

// The caller's memory stays as it is: what is written is encrypted in a copy.
int CryptNode::WritePieces(const Request& request) {
  IovCursor cursor(request.iov, request.iov_count);
  const bool zeros = request.kind == Request::Kind::kWriteZeroes;
  const uint64_t end = request.offset + request.length;
  SecretBytes buffer;
  for (uint64_t at = request.offset; at < end;) {
    uint64_t from = at / unit_ * unit_;
    uint64_t stop = std::min(end, from + kPieceBytes);
    uint64_t to = (stop + unit_ - 1) / unit_ * unit_;
    bool head = at > from, tail = stop < to;
    WritingGuard guard(*this, from, to, head || tail);
    buffer.resize(to - from);
    std::span<uint8_t> bytes(buffer);
    if (head || (tail && to - from == unit_)) {
      if (int rc = ReadUnits(from, bytes.first(unit_))) return rc;
    }
    if (tail && to - from > unit_) {
      if (int rc = ReadUnits(to - unit_, bytes.last(unit_))) return rc;
    }
    std::span<uint8_t> changed = bytes.subspan(at - from, stop - at);
    if (zeros) {
      std::memset(changed.data(), 0, changed.size());
    } else {
      cursor.CopyOut(changed);
    }
    if (int rc = WriteUnits(from, bytes)) return rc;
    at = stop;
  }
  return 0;
}

}  // namespace kvartz::block
