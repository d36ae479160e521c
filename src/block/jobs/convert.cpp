#include "block/jobs/convert.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "base/check.h"
#include "block/graph.h"
#include "block/jobs/zero_scan.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kPieceBytes = 512 << 10;  // small enough to stay in the processor's cache
constexpr uint64_t kLargestZero = 1 << 30;   // of one request
constexpr uint64_t kSector = 512;
constexpr size_t kPage = 4096;

struct FreeDeleter {
  void operator()(uint8_t* memory) const { free(memory); }
};

}  // namespace

ConvertJob::ConvertJob(EventLoop& loop, std::string id, ConvertOptions options)
    : Job(loop, std::move(id)), options_(std::move(options)) {}

Result<> ConvertJob::DoRun() {
  piece_bytes_ = kPieceBytes;
  if (options_.compressed) {
    unit_ = TRY(options_.target->Info()).cluster_size;
    VERIFY(unit_ > 0);
    piece_bytes_ = std::max(unit_, kPieceBytes / unit_ * unit_);
  }
  from_ = options_.source_offset;
  to_ = options_.target_offset;
  for (const NodePtr& source : options_.sources) left_ += source->size_bytes();
  left_ = std::min(left_ - std::min(left_, from_), options_.length);
  SetTotal(left_);
  if (options_.host_copy) host_copier_ = std::make_unique<HostCopier>(loop());
  // The workers end together; this fiber is one of them.
  unsigned others = std::max(1u, options_.workers) - 1;
  unsigned running = others;
  Fiber* self = Fiber::Current();
  bool waiting = false;
  for (unsigned i = 0; i < others; i++) {
    Fiber::Start([&] {
      Result<> done = Work();
      if (!done && failed_) failed_ = std::move(done);
      if (--running == 0 && waiting) self->Wake();
    });
  }
  Result<> done = Work();
  if (!done && failed_) failed_ = std::move(done);
  waiting = true;
  while (running > 0) Fiber::Suspend();
  return std::move(failed_);
}

Result<> ConvertJob::Work() {
  std::unique_ptr<uint8_t, FreeDeleter> memory;
  std::span<uint8_t> buffer;
  while (failed_) {
    Piece piece;
    {
      FiberLock lock(next_);
      if (!failed_ || left_ == 0) return {};
      Result<Piece> next = NextPiece();
      if (!next) {
        // Nobody waits for a turn that never comes.
        failed_ = std::unexpected(next.error());
        turns_.WakeAll();
        return {};
      }
      piece = *next;
    }
    if (piece.kind == Piece::Kind::kData && buffer.empty()) {
      memory.reset(
          static_cast<uint8_t*>(aligned_alloc(kPage, (piece_bytes_ + kPage - 1) / kPage * kPage)));
      if (!memory) return Fail(ErrorCode::kNoSpace, "out of memory");
      buffer = {memory.get(), piece_bytes_};
    }
    Result<> copied = Copy(piece, buffer);
    if (copied) copied = Step(piece.length);
    if (!copied) {
      if (failed_) failed_ = std::move(copied);
      turns_.WakeAll();
      return {};
    }
  }
  return {};
}

// What the source is made of at `offset`, up to `end`.
Result<ConvertJob::Stretch> ConvertJob::Examine(Node& source, uint64_t offset, uint64_t end) {
  if (options_.only_dirty) {
    auto dirty = options_.only_dirty->NextDirty(offset, end);
    if (!dirty || dirty->offset > offset)
      return Stretch{Piece::Kind::kSkip, dirty ? dirty->offset : end};
    end = std::min(end, dirty->offset + dirty->length);
  }
  if (options_.sparse_bytes == 0) return Stretch{Piece::Kind::kData, end};
  Node* base = nullptr;
  if (options_.only_allocated) base = options_.base ? options_.base : BackingOf(&source);
  Result<ChainExtent> status = StatusAbove(source, base, offset, end - offset);
  if (!status && options_.salvage)
    return Stretch{Piece::Kind::kData, std::min(end, offset + kSector)};
  ChainExtent found = TRY(std::move(status));
  if (found.extent.length == 0)
    return Fail(ErrorCode::kIo, fmt::format("'{}' ends too early", source.name()));
  uint64_t until = std::min(end, offset + found.extent.length);
  if (options_.only_allocated && !found.extent.allocated) return Stretch{Piece::Kind::kSkip, until};
  return Stretch{found.reads_as_zeros() ? Piece::Kind::kZero : Piece::Kind::kData, until};
}

Result<ConvertJob::Piece> ConvertJob::NextPiece() {
  Node* source = options_.sources[source_].get();
  while (from_ >= source->size_bytes()) {
    from_ -= source->size_bytes();
    source = options_.sources[++source_].get();
    run_ = {};
  }
  uint64_t end = std::min(source->size_bytes(), from_ + left_);
  if (run_.end <= from_) {
    run_ = TRY(Examine(*source, from_, end));
    // Compressed clusters are written whole, so pieces begin and end with them.
    if (options_.compressed && run_.end < end && (to_ + run_.end - from_) % unit_ != 0) {
      uint64_t whole = (to_ + run_.end - from_) / unit_ * unit_;
      if (whole > to_) {
        run_.end = from_ + (whole - to_);
      } else {
        run_ = {Piece::Kind::kData, std::min(end, from_ + (to_ / unit_ + 1) * unit_ - to_)};
      }
    }
  }
  Piece piece = {
      .kind = run_.kind, .source = source, .from = from_, .to = to_, .length = run_.end - from_};
  if (piece.kind == Piece::Kind::kData) {
    // Pieces end where their numbers are round, for whatever clusters the nodes have.
    uint64_t most = piece_bytes_ - to_ % piece_bytes_;
    piece.length = std::min(piece.length, most);
  }
  piece.sequence = sequence_++;
  from_ += piece.length;
  to_ += piece.length;
  left_ -= piece.length;
  return piece;
}

Result<> ConvertJob::ReadPiece(const Piece& piece, std::span<uint8_t> bytes) {
  int rc = ReadAt(*piece.source, piece.from, bytes);
  if (rc == 0) return {};
  if (!options_.salvage) return Fail(IoError(*piece.source, "read", piece.from, rc));
  for (uint64_t at = 0; at < bytes.size(); at += kSector) {
    std::span<uint8_t> sector = bytes.subspan(at, std::min<uint64_t>(kSector, bytes.size() - at));
    rc = ReadAt(*piece.source, piece.from + at, sector);
    if (rc == 0) continue;
    std::fill(sector.begin(), sector.end(), 0);
    if (options_.on_unreadable)
      options_.on_unreadable(IoError(*piece.source, "read", piece.from + at, rc).what);
  }
  return {};
}

void ConvertJob::AwaitTurn(const Piece& piece) {
  if (options_.out_of_order) return;
  while (turn_ != piece.sequence && failed_) turns_.Wait();
}

void ConvertJob::EndTurn(const Piece& piece) {
  if (options_.out_of_order) return;
  turn_ = piece.sequence + 1;
  turns_.WakeAll();
}

// False: it is read and written, as if nobody had asked.
bool ConvertJob::CopyByHost(const Piece& piece) {
  if (!options_.host_copy || host_copy_failed_ || piece.kind != Piece::Kind::kData) return false;
  AwaitTurn(piece);
  if (!failed_) return true;
  int rc = host_copier_->Copy(*piece.source, piece.from, *options_.target, piece.to, piece.length);
  host_copy_failed_ = rc != 0;
  if (rc == 0) EndTurn(piece);
  return rc == 0;
}

Result<> ConvertJob::Copy(const Piece& piece, std::span<uint8_t> buffer) {
  if (CopyByHost(piece)) return {};
  std::span<uint8_t> bytes;
  if (piece.kind == Piece::Kind::kData) {
    bytes = buffer.subspan(0, piece.length);
    TRY(ReadPiece(piece, bytes));
  }
  AwaitTurn(piece);
  if (!failed_) return {};
  IoBatch batch;
  if (piece.kind == Piece::Kind::kData && options_.compressed) {
    StartCompressed(batch, piece, bytes);
  } else if (piece.kind == Piece::Kind::kData) {
    StartWrites(batch, piece, bytes);
  } else if (piece.kind == Piece::Kind::kZero && !options_.target_is_zero) {
    StartZeroes(batch, piece.to, piece.length);
  }
  EndTurn(piece);
  if (int rc = batch.Wait()) return Fail(IoError(*options_.target, "write", piece.to, rc));
  return {};
}

void ConvertJob::StartWrite(IoBatch& batch, uint64_t offset, std::span<const uint8_t> bytes,
                            bool compressed) {
  IoBatch::Item& item = batch.Add();
  item.request.kind = Request::Kind::kWrite;
  item.request.compressed = compressed;
  item.request.offset = offset;
  item.request.length = bytes.size();
  item.iov.push_back({const_cast<uint8_t*>(bytes.data()), bytes.size()});
  batch.Start(*options_.target, item);
}

void ConvertJob::StartZeroes(IoBatch& batch, uint64_t offset, uint64_t length) {
  while (length > 0) {
    uint64_t part = std::min(length, kLargestZero);
    IoBatch::Item& item = batch.Add();
    item.request.kind = Request::Kind::kWriteZeroes;
    item.request.unmap = options_.sparse_bytes != 0;
    item.request.offset = offset;
    item.request.length = part;
    batch.Start(*options_.target, item);
    offset += part;
    length -= part;
  }
}

// Zeros within data are left out (or made by the target), in units of sparse_bytes counted from the
// start of the target.
void ConvertJob::StartWrites(IoBatch& batch, const Piece& piece, std::span<const uint8_t> bytes) {
  if (options_.sparse_bytes == 0) return StartWrite(batch, piece.to, bytes, false);
  uint64_t at = 0;
  while (at < bytes.size()) {
    std::span<const uint8_t> rest = bytes.subspan(at);
    uint64_t first = options_.sparse_bytes - (piece.to + at) % options_.sparse_bytes;
    bool zero = false;
    uint64_t run;
    if (first < options_.sparse_bytes && first < rest.size()) {
      run = first;
      zero = IsZero(rest.subspan(0, run));
    } else {
      run = LikeRun(rest, options_.sparse_bytes, &zero);
    }
    if (!zero) {
      StartWrite(batch, piece.to + at, rest.subspan(0, run), false);
    } else if (!options_.target_is_zero) {
      StartZeroes(batch, piece.to + at, run);
    }
    at += run;
  }
}

bool ConvertJob::IsWhole(uint64_t offset, uint64_t length) const {
  uint64_t end = offset + length;
  return offset % unit_ == 0 && (end % unit_ == 0 || end == options_.target->size_bytes());
}

// Where one source ends and the next begins within a cluster, that cluster is written plainly.
void ConvertJob::StartCompressed(IoBatch& batch, const Piece& piece,
                                 std::span<const uint8_t> bytes) {
  for (uint64_t at = 0; at < bytes.size();) {
    std::span<const uint8_t> rest = bytes.subspan(at);
    uint64_t to = piece.to + at;
    uint64_t most = std::min<uint64_t>(rest.size(), unit_ - to % unit_);
    if (!IsWhole(to, most)) {
      StartWrite(batch, to, rest.subspan(0, most), false);
      at += most;
      continue;
    }
    bool zero = false;
    uint64_t run = LikeRun(rest, unit_, &zero);
    if (!IsWhole(to, run)) run = run / unit_ * unit_;
    if (!zero || options_.sparse_bytes == 0) {
      StartWrite(batch, to, rest.subspan(0, run), true);
    } else if (!options_.target_is_zero) {
      StartZeroes(batch, to, run);
    }
    at += run;
  }
}

}  // namespace kvartz::block
