// Writes: in place where the disk has clusters of its own, else to new ones, with what stood there
// around them.
#include <algorithm>
#include <cerrno>

#include "base/check.h"
#include "block/fiber_io.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace kvartz::block::qcow2 {
namespace {

constexpr uint64_t kZeroChunk = 64 << 10;
alignas(4096) uint8_t g_zeros[kZeroChunk];  // never written to

void AppendZeros(uint64_t bytes, std::vector<iovec>& iov) {
  for (; bytes > 0; bytes -= std::min(bytes, kZeroChunk))
    iov.push_back({g_zeros, std::min(bytes, kZeroChunk)});
}

}  // namespace

// What a write makes of neighbouring clusters that can't be written in place.
struct Qcow2Node::AllocatedRun {
  uint64_t first = 0;  // cluster of the disk
  uint64_t clusters = 0;
  bool reuse = false;  // their clusters in the file are there, and ours alone
  bool whole_first = false, whole_last = false;  // all of that cluster is copied
  Run host;
  uint64_t from = 0, end = 0;  // what the guest writes
  // What is written: subclusters (or clusters) in full.
  uint64_t copy_from = 0, copy_end = 0;
};

bool Qcow2Node::WaitForBusy(uint64_t first, uint64_t end) {
  for (Busy* busy : busy_) {
    if (busy->first < end && first < busy->end) {
      busy->waiting.Wait();
      return true;
    }
  }
  return false;
}

// The slice with clusters [first, end), to be changed. Null: some were busy, ask again.
int Qcow2Node::FreeSlice(uint64_t first, uint64_t end, Slice** slice) {
  *slice = nullptr;
  if (meta_->cache().crowded()) {
    if (int rc = meta_->Commit()) return rc;
  }
  if (WaitForBusy(first, end)) return 0;
  Slice* found = nullptr;
  if (int rc = meta_->WritableSlice(first << meta_->geometry().cluster_bits, &found)) return rc;
  if (!WaitForBusy(first, end)) *slice = found;
  return 0;
}

int Qcow2Node::WriteRange(uint64_t offset, uint64_t length, IovCursor from) {
  IoBatch in_place;
  int rc = 0;
  while (length > 0) {
    Mapping mapping;
    if ((rc = meta_->Map(offset, length, &mapping)) != 0) break;
    uint64_t bytes = mapping.length;
    if (mapping.kind == Mapping::Kind::kData && mapping.copied) {
      if ((rc = meta_->RefuseMetadata(mapping.host, bytes)) != 0) break;
      IoBatch::Item& item = in_place.Add();
      item.request.kind = Request::Kind::kWrite;
      item.request.offset = mapping.host;
      item.request.length = bytes;
      from.Take(bytes, item.iov);
      file_->Debug(DebugEvent::kWriteAio);
      in_place.Start(meta_->data_node(), item);
    } else {
      if ((rc = AllocateAndWrite(offset, length, from, &bytes)) != 0) break;
    }
    offset += bytes;
    length -= bytes;
  }
  int io = in_place.Wait();
  return rc != 0 ? rc : io;
}

// As many clusters from `offset` on as are alike; at least one.
void Qcow2Node::PlanRun(const Slice& slice, uint64_t offset, uint64_t length, AllocatedRun& run) {
  const Geometry& geo = meta_->geometry();
  uint64_t end =
      std::min(offset + length, (offset / meta_->slice_covers() + 1) * meta_->slice_covers());
  uint64_t index = meta_->IndexInSlice(offset);
  uint64_t entry = meta_->Entry(slice, index);
  auto owned = [&](uint64_t e) {
    return !(e & kPacked) && (e & kCopied) && ((e & kOffsetMask) != 0 || data_file_);
  };
  run.first = offset >> geo.cluster_bits;
  run.reuse = owned(entry);
  run.from = offset;
  run.host.offset = run.reuse ? entry & kOffsetMask : 0;
  uint64_t clusters = 1;
  for (; (run.first + clusters) << geo.cluster_bits < end; clusters++) {
    uint64_t next = meta_->Entry(slice, index + clusters);
    if (owned(next) != run.reuse) break;
    if (run.reuse && (next & kOffsetMask) != run.host.offset + (clusters << geo.cluster_bits))
      break;
    // Without subclusters, one that can be written in place is.
    if (run.reuse && geo.subclusters == 1 && !(next & kZeroFlag)) break;
  }
  run.clusters = clusters;
  run.end = std::min(end, (run.first + clusters) << geo.cluster_bits);
}

int Qcow2Node::AllocateAndWrite(uint64_t offset, uint64_t length, IovCursor& from, uint64_t* done) {
  const Geometry& geo = meta_->geometry();
  *done = 0;
  if (meta_->cache().crowded()) {
    if (int rc = meta_->Commit()) return rc;
  }
  if (int rc = meta_->RefuseMetadata(0, 0)) return rc;
  uint64_t first = offset >> geo.cluster_bits;
  if (WaitForBusy(first, first + 1)) return 0;  // mapped anew
  Slice* slice = meta_->TryWritableSlice(offset);
  if (!slice) {
    if (int rc = meta_->WritableSlice(offset, &slice)) return rc;
    if (WaitForBusy(first, first + 1)) return 0;
  }
  // It may have been written meanwhile.
  Mapping mapping;
  if (meta_->TryMap(offset, length, &mapping) != Metadata::Cached::kYes) return 0;
  if (mapping.kind == Mapping::Kind::kData && mapping.copied) return 0;
  AllocatedRun run;
  PlanRun(*slice, offset, length, run);
  for (Busy* busy : busy_) {
    if (busy->first < run.first + run.clusters && run.first < busy->end)
      run.clusters = busy->first - run.first;
  }
  BusyGuard guard(*this, run.first, run.first + run.clusters);
  if (data_file_) {
    run.host.offset = run.first << geo.cluster_bits;
  } else if (!run.reuse) {
    if (int rc = meta_->Allocate(run.clusters, &run.host)) return rc;
    run.clusters = run.host.clusters;
    if (encryption_) run.host.zeroed = false;  // not once they are decrypted
    guard.Shorten(run.first + run.clusters);
  } else if (int rc = meta_->RefuseMetadata(run.host.offset, run.clusters << geo.cluster_bits)) {
    return rc;
  }
  run.end = std::min(run.end, (run.first + run.clusters) << geo.cluster_bits);
  int rc = FindEdges(run);
  if (rc == 0) rc = WriteRun(run, from);
  if (rc == 0) rc = LinkRun(run);
  if (rc != 0) {
    if (!run.reuse && !data_file_) meta_->FreeLater(run.host.offset, run.host.clusters);
    return rc;
  }
  *done = run.end - run.from;
  return 0;
}

// A cluster that has contents elsewhere moves as a whole.
int Qcow2Node::FindEdges(AllocatedRun& run) {
  if (run.reuse || data_file_) return 0;
  Slice* slice = nullptr;
  if (int rc = meta_->WritableSlice(run.from, &slice)) return rc;
  auto has_contents = [&](uint64_t i) {
    uint64_t entry = meta_->Entry(*slice, meta_->IndexInSlice(run.from) + i);
    return (entry & kPacked) || (entry & kOffsetMask) != 0;
  };
  run.whole_first = has_contents(0);
  run.whole_last = has_contents(run.clusters - 1);
  return 0;
}

// Whether [from, end) reads as zeros by the tables of this image.
int Qcow2Node::AllZero(uint64_t from, uint64_t end, bool* zero, bool* marked) {
  *zero = true;
  if (marked) *marked = true;
  end = std::max(from, std::min(end, meta_->l1().size() * meta_->geometry().l2_covers));
  while (from < end) {
    Mapping mapping;
    if (int rc = meta_->Map(from, end - from, &mapping)) return rc;
    if (!ReadsZero(mapping, from)) {
      *zero = false;
      return 0;
    }
    if (marked && mapping.kind != Mapping::Kind::kZero) *marked = false;
    from += mapping.length;
  }
  return 0;
}

// One write: what stood before, what the guest writes, what stood behind.
int Qcow2Node::WriteRun(AllocatedRun& run, IovCursor& from) {
  const Geometry& geo = meta_->geometry();
  uint64_t start = run.first << geo.cluster_bits;
  uint64_t unit = geo.subcluster_size;
  run.copy_from = run.whole_first ? start : run.from / unit * unit;
  run.copy_end = run.whole_last ? start + (run.clusters << geo.cluster_bits)
                                : (run.end + unit - 1) / unit * unit;
  // A subcluster that is written in place isn't copied: others may be writing to it.
  Mapping edge;
  if (run.reuse && run.copy_from < run.from) {
    if (int rc = meta_->Map(run.from, 1, &edge)) return rc;
    if (edge.kind == Mapping::Kind::kData) run.copy_from = run.from;
  }
  if (run.reuse && run.copy_end > run.end) {
    if (int rc = meta_->Map(run.end - 1, 1, &edge)) return rc;
    if (edge.kind == Mapping::Kind::kData) run.copy_end = run.end;
  }
  bool head_zero = true, tail_zero = true;
  if (int rc = AllZero(run.copy_from, run.from, &head_zero)) return rc;
  if (int rc = AllZero(run.end, run.copy_end, &tail_zero)) return rc;
  std::vector<uint8_t> head, tail;
  if (!head_zero) {
    head.resize(run.from - run.copy_from);
    iovec iov = {head.data(), head.size()};
    file_->Debug(DebugEvent::kCowRead);
    if (int rc = ReadRange(run.copy_from, head.size(), IovCursor(&iov, 1))) return rc;
  }
  if (!tail_zero) {
    // Nothing of the backing node shows behind the end of the disk.
    tail.resize(run.copy_end - run.end);
    uint64_t readable = std::min(run.copy_end, meta_->l1().size() * geo.l2_covers) - run.end;
    iovec iov = {tail.data(), readable};
    file_->Debug(DebugEvent::kCowRead);
    if (int rc = ReadRange(run.end, readable, IovCursor(&iov, 1))) return rc;
  }
  IoBatch batch;
  IoBatch::Item& item = batch.Add();
  uint64_t write_from = run.from, write_end = run.end;
  if (!head.empty()) {
    item.iov.push_back({head.data(), head.size()});
    write_from = run.copy_from;
  } else if (!run.host.zeroed && run.copy_from < run.from) {
    AppendZeros(run.from - run.copy_from, item.iov);
    write_from = run.copy_from;
  }
  from.Take(run.end - run.from, item.iov);
  if (!tail.empty()) {
    item.iov.push_back({tail.data(), tail.size()});
    write_end = run.copy_end;
  } else if (!run.host.zeroed && run.copy_end > run.end) {
    AppendZeros(run.copy_end - run.end, item.iov);
    write_end = run.copy_end;
  }
  item.request.kind = Request::Kind::kWrite;
  item.request.offset = run.host.offset + (write_from - start);
  item.request.length = write_end - write_from;
  file_->Debug(DebugEvent::kWriteAio);
  batch.Start(meta_->data_node(), item);
  return batch.Wait();
}

int Qcow2Node::LinkRun(const AllocatedRun& run) {
  const Geometry& geo = meta_->geometry();
  Slice* slice = meta_->TryWritableSlice(run.from);
  if (!slice) {
    if (int rc = meta_->WritableSlice(run.from, &slice)) return rc;
  }
  for (uint64_t i = 0; i < run.clusters; i++) {
    uint64_t guest = (run.first + i) << geo.cluster_bits;
    uint64_t index = meta_->IndexInSlice(guest);
    uint64_t old = meta_->Entry(*slice, index);
    uint64_t bits = meta_->SubBits(*slice, index);
    uint64_t host = run.host.offset + (i << geo.cluster_bits);
    if (geo.subclusters > 1) {
      if (old & kPacked) bits = 0;
      uint64_t from = std::max(run.copy_from, guest) - guest;
      uint64_t end = std::min(run.copy_end, guest + geo.cluster_size) - guest;
      for (uint64_t sub = from / geo.subcluster_size; sub * geo.subcluster_size < end; sub++)
        bits = (bits | uint64_t{1} << sub) & ~(uint64_t{1} << (32 + sub));
    }
    if (!run.reuse) meta_->ReleaseEntry(old, false);
    meta_->SetEntry(slice, index, host | kCopied, bits);
  }
  return 0;
}

// ---- compressed ----

int Qcow2Node::WriteCompressed(uint64_t offset, uint64_t length, IovCursor from) {
  const Geometry& geo = meta_->geometry();
  if (data_file_ || encryption_) return -ENOTSUP;
  bool to_end = offset + length == size_bytes_;
  if (geo.InCluster(offset) != 0 || (geo.InCluster(length) != 0 && !to_end)) return -EINVAL;
  std::vector<uint8_t> cluster;
  while (length > 0) {
    uint64_t bytes = std::min(length, geo.cluster_size);
    cluster.assign(geo.cluster_size, 0);
    from.CopyOut(std::span<uint8_t>(cluster).first(bytes));
    bool stored = false;
    if (int rc = WriteCompressedCluster(offset, cluster, &stored)) return rc;
    if (!stored) {
      iovec iov = {cluster.data(), bytes};
      if (int rc = WriteRange(offset, bytes, IovCursor(&iov, 1))) return rc;
    }
    offset += bytes;
    length -= bytes;
  }
  return 0;
}

int Qcow2Node::WriteCompressedCluster(uint64_t offset, std::span<const uint8_t> cluster,
                                      bool* stored) {
  const Geometry& geo = meta_->geometry();
  std::vector<uint8_t> packed;
  bool smaller = false;
  workers_.Run([&] { smaller = Compress(meta_->header.compression, cluster, packed); });
  if (!smaller) return 0;
  if (meta_->cache().crowded()) {
    if (int rc = meta_->Commit()) return rc;
  }
  uint64_t first = offset >> geo.cluster_bits;
  Slice* slice = nullptr;
  do {
    while (WaitForBusy(first, first + 1)) {
    }
    if (int rc = meta_->WritableSlice(offset, &slice)) return rc;
  } while (WaitForBusy(first, first + 1));
  BusyGuard guard(*this, first, first + 1);
  uint64_t host = 0;
  if (int rc = meta_->AllocateBytes(packed.size(), &host)) return rc;
  uint64_t sectors = ((host + packed.size() - 1) >> 9) - (host >> 9);
  uint64_t entry = kPacked | sectors << geo.csize_shift | host;
  file_->Debug(DebugEvent::kWriteCompressed);
  int rc = meta_->WriteBytes(host, packed);
  if (rc == 0) rc = meta_->WritableSlice(offset, &slice);
  if (rc != 0) {
    meta_->ReleaseEntry(entry, false);
    return rc;
  }
  uint64_t index = meta_->IndexInSlice(offset);
  meta_->ReleaseEntry(meta_->Entry(*slice, index), false);
  meta_->SetEntry(slice, index, entry, 0);
  *stored = true;
  return 0;
}

}  // namespace kvartz::block::qcow2
