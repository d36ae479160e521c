// Reads, and how requests get into fibers.
#include <algorithm>
#include <cerrno>
#include <functional>

#include "base/check.h"
#include "block/fiber_io.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace kvartz::block::qcow2 {

bool Qcow2Node::InBacking(uint64_t offset) const {
  return backing_ && offset < backing_->size_bytes() && offset < size_bytes_;
}

bool Qcow2Node::ReadsZero(const Mapping& mapping, uint64_t offset) const {
  return mapping.kind == Mapping::Kind::kZero ||
         (mapping.kind == Mapping::Kind::kUnallocated && !InBacking(offset));
}

void Qcow2Node::Submit(Request* request) {
  switch (request->kind) {
    case Request::Kind::kRead:
      if (request->length == 0) return FinishLater(request, 0);
      if (TryRead(request)) return;
      break;
    case Request::Kind::kWrite:
      if (request->length == 0) return FinishLater(request, 0);
      if (!request->compressed && TryWrite(request)) return;
      break;
    case Request::Kind::kFlush:
      if (read_only_) return FinishLater(request, 0);
      if (!meta_->dirty() && !meta_->committing() && !data_file_) return file_->Start(request);
      break;
    case Request::Kind::kDiscard:
      if (request->length == 0) return FinishLater(request, 0);
      break;
    case Request::Kind::kWriteZeroes:
      if (request->length == 0) return FinishLater(request, 0);
      break;
  }
  Handle(request);
}

bool Qcow2Node::HasItself(uint64_t offset, uint64_t length) {
  if (!backing_) return true;
  Mapping mapping;
  return meta_->TryMap(offset, length, &mapping) == Metadata::Cached::kYes &&
         mapping.length >= length && mapping.kind != Mapping::Kind::kUnallocated;
}

bool Qcow2Node::TryRead(Request* request) {
  Mapping mapping;
  if (meta_->TryMap(request->offset, request->length, &mapping) != Metadata::Cached::kYes ||
      mapping.length < request->length) {
    return false;
  }
  if (mapping.kind == Mapping::Kind::kData && old_encryption()) return false;
  if (mapping.kind == Mapping::Kind::kData) {
    request->offset = mapping.host;
    file_->Debug(DebugEvent::kReadAio);
    meta_->data_node().Start(request);
    return true;
  }
  if (mapping.kind == Mapping::Kind::kCompressed) return false;
  if (ReadsZero(mapping, request->offset)) {
    IovCursor(request->iov, request->iov_count).Fill(request->length, 0);
    FinishLater(request, 0);
    return true;
  }
  if (fleecing() || request->offset + request->length > backing_->size_bytes()) return false;
  file_->Debug(DebugEvent::kReadBackingAio);
  backing_->Start(request);
  return true;
}

// In place, in one piece.
bool Qcow2Node::TryWrite(Request* request) {
  Mapping mapping;
  if (meta_->TryMap(request->offset, request->length, &mapping) != Metadata::Cached::kYes ||
      mapping.kind != Mapping::Kind::kData || !mapping.copied || mapping.length < request->length) {
    return false;
  }
  if (!meta_->MayWrite(mapping.host, request->length)) return false;
  // Its entry may not be on stable storage, which a flush of the file alone doesn't change.
  if (request->fua && (meta_->dirty() || meta_->committing())) return false;
  if (!free_op_) {
    ops_.push_back(std::make_unique<Op>());
    free_op_ = ops_.back().get();
    free_op_->next_free = nullptr;
  }
  Op* op = free_op_;
  free_op_ = op->next_free;
  op->inner = *request;
  op->outer = request;
  op->node = this;
  op->parity = meta_->Enter();
  op->inner.offset = mapping.host;
  op->inner.owner = op;
  op->inner.done = [](Request* inner, int result) {
    Op* done = static_cast<Op*>(inner->owner);
    Request* outer = done->outer;
    Qcow2Node* node = done->node;
    node->meta_->Leave(done->parity);
    node->in_flight_--;
    done->next_free = node->free_op_;
    node->free_op_ = done;
    outer->done(outer, result);
  };
  in_flight_++;
  file_->Debug(DebugEvent::kWriteAio);
  meta_->data_node().Start(&op->inner);
  return true;
}

void Qcow2Node::Handle(Request* request) {
  SubmitInFiber(request, [this](Request& own) {
    unsigned parity = meta_->Enter();
    int rc = Process(own);
    meta_->Leave(parity);
    return rc;
  });
}

int Qcow2Node::Process(Request& request) {
  if (meta_->corrupt() && request.kind != Request::Kind::kRead) return -EIO;
  IovCursor cursor(request.iov, request.iov_count);
  int rc = 0;
  switch (request.kind) {
    case Request::Kind::kRead:
      return ReadRange(request.offset, request.length, cursor);
    case Request::Kind::kWrite:
      rc = request.compressed ? WriteCompressed(request.offset, request.length, cursor)
                              : WriteRange(request.offset, request.length, cursor);
      break;
    case Request::Kind::kFlush:
      return meta_->Commit();
    case Request::Kind::kDiscard:
      rc = DiscardRange(request.offset, request.length);
      break;
    case Request::Kind::kWriteZeroes:
      rc = ZeroRange(request.offset, request.length, request.unmap, request.no_fallback);
      break;
  }
  if (rc != 0) return rc;
  return request.fua || !limits_.write_cache ? meta_->Commit() : 0;
}

int Qcow2Node::ReadRange(uint64_t offset, uint64_t length, IovCursor to) {
  IoBatch batch;
  std::vector<FromBelow> from_below;
  int rc = 0;
  while (length > 0) {
    Mapping mapping;
    rc = meta_->Map(offset, length, &mapping);
    if (rc != 0) break;
    uint64_t bytes = mapping.length;
    if (mapping.kind == Mapping::Kind::kCompressed) {
      rc = ReadCompressed(mapping, offset, bytes, to);
      if (rc != 0) break;
      to.Skip(bytes);
    } else if (ReadsZero(mapping, offset)) {
      to.Fill(bytes, 0);
    } else if (mapping.kind == Mapping::Kind::kData && old_encryption()) {
      rc = ReadOldEncryption(mapping.host, offset, bytes, to);
      if (rc != 0) break;
      to.Skip(bytes);
    } else {
      bool data = mapping.kind == Mapping::Kind::kData;
      if (!data) bytes = std::min(bytes, std::min(backing_->size_bytes(), size_bytes_) - offset);
      IoBatch::Item& item = batch.Add();
      item.request.kind = Request::Kind::kRead;
      item.request.offset = data ? mapping.host : offset;
      item.request.length = bytes;
      if (!data && fleecing()) from_below.push_back({offset, bytes, to});
      to.Take(bytes, item.iov);
      file_->Debug(data ? DebugEvent::kReadAio : DebugEvent::kReadBackingAio);
      batch.Start(data ? meta_->data_node() : *backing_, item);
    }
    offset += bytes;
    length -= bytes;
  }
  int io = batch.Wait();
  if (rc == 0) rc = io;
  for (size_t i = 0; rc == 0 && i < from_below.size(); i++) rc = ReadWhatCame(from_below[i]);
  return rc;
}

// Of what was read from below: what is here by now.
int Qcow2Node::ReadWhatCame(FromBelow& piece) {
  while (piece.length > 0) {
    Mapping mapping;
    if (int rc = meta_->Map(piece.offset, piece.length, &mapping)) return rc;
    if (mapping.kind != Mapping::Kind::kUnallocated) {
      if (int rc = ReadRange(piece.offset, mapping.length, piece.to)) return rc;
    }
    piece.to.Skip(mapping.length);
    piece.offset += mapping.length;
    piece.length -= mapping.length;
  }
  return 0;
}

int Qcow2Node::ReadCompressed(const Mapping& mapping, uint64_t offset, uint64_t length,
                              IovCursor to) {
  const Geometry& geo = meta_->geometry();
  if (mapping.host_bytes > 2 * geo.cluster_size || data_file_)
    return meta_->Broken("a compressed cluster is larger than a cluster");
  std::vector<uint8_t> packed(mapping.host_bytes);
  file_->Debug(DebugEvent::kReadCompressed);
  if (int rc = meta_->ReadBytes(mapping.host, packed)) return rc;
  std::vector<uint8_t> cluster(geo.cluster_size);
  bool good = false;
  std::function<void()> unpack = [&] {
    good = Decompress(meta_->header.compression, packed, cluster);
  };
  // Alone it is faster here.
  if (in_flight_ + in_fibers() > 1) {
    workers_.Run(unpack);
  } else {
    unpack();
  }
  if (!good) return meta_->Broken("a compressed cluster can't be unpacked");
  to.CopyIn(std::span<const uint8_t>(cluster).subspan(geo.InCluster(offset), length));
  return 0;
}

void Qcow2Node::Drain() {
  do {
    if (crypt_) crypt_->Drain();
    if (data_file_) data_file_->Drain();
    if (backing_) backing_->Drain();
    file_->Drain();
  } while (FinishLateOnes() || workers_.FinishOne() || in_flight_ + in_fibers() > 0);
}

Result<Extent> Qcow2Node::Status(uint64_t offset, uint64_t length) {
  Mapping mapping;
  if (int rc = meta_->Map(offset, std::min(length, size_bytes_ - offset), &mapping))
    return Fail(IoError(*this, "read the tables of", offset, rc));
  Extent extent = {.length = mapping.length};
  switch (mapping.kind) {
    case Mapping::Kind::kUnallocated:
      return extent;
    case Mapping::Kind::kZero:
      extent.allocated = extent.zero = true;
      break;
    case Mapping::Kind::kData:
      extent.allocated = extent.data = true;
      break;
    case Mapping::Kind::kCompressed:
      extent.allocated = extent.data = extent.compressed = true;
      return extent;
  }
  if (mapping.has_host && !encryption_) {
    extent.has_offset = true;
    extent.offset = mapping.host;
    extent.file = &meta_->data_node();
  }
  return extent;
}

}  // namespace kvartz::block::qcow2
