#include "device/virtio/virtio_blk.h"

#include <fmt/core.h>
#include <linux/virtio_ids.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>

#include "base/check.h"

namespace kvartz {
namespace {

constexpr PropertySpec kProperties[] = {
    PROPERTY(BlkConfig, "drive", drive, "the disk image: id of a -drive or -blockdev"),
    PROPERTY(BlkConfig, "iothread", iothread,
             "thread that serves the disk: id of an -object iothread"),
    PROPERTY(BlkConfig, "serial", serial, "serial number, at most 20 characters"),
    PROPERTY(BlkConfig, "num-queues", num_queues, "number of queues (65535: one)"),
    PROPERTY(BlkConfig, "queue-size", queue_size,
             "elements of a queue, a power of two from 4 to 1024"),
    PROPERTY(BlkConfig, "config-wce", config_wce, "the guest may switch the write cache"),
    PROPERTY(BlkConfig, "write-cache", write_cache, "write cache at the start"),
    PROPERTY(BlkConfig, "logical_block_size", logical_block_size, "bytes of a sector"),
    PROPERTY(BlkConfig, "physical_block_size", physical_block_size,
             "bytes that the medium writes at once"),
    PROPERTY(BlkConfig, "min_io_size", min_io_size,
             "bytes of the smallest request that performs well"),
    PROPERTY(BlkConfig, "opt_io_size", opt_io_size, "bytes of the request that performs best"),
    PROPERTY(BlkConfig, "discard", discard, "offer discard"),
    PROPERTY(BlkConfig, "write-zeroes", write_zeroes, "offer write zeroes"),
    PROPERTY(BlkConfig, "max-discard-sectors", max_discard_sectors,
             "512-byte sectors of one discard"),
    PROPERTY(BlkConfig, "max-write-zeroes-sectors", max_write_zeroes_sectors,
             "512-byte sectors of one write zeroes"),
    PROPERTY(BlkConfig, "share-rw", share_rw, "others may write to the image too"),
    PROPERTY(BlkConfig, "rerror", rerror, "what a read error does: report, ignore, stop"),
    PROPERTY(BlkConfig, "werror", werror, "what a write error does: report, ignore, enospc, stop"),
    VIRTIO_PROPERTIES(BlkConfig),
};

constexpr unsigned kSectorSize = 512;
// The configuration space ends before the fields of secure erase, which isn't offered.
constexpr size_t kSpaceSize = offsetof(virtio_blk_config, max_secure_erase_sectors);

bool IsBlockSize(uint32_t size) {
  return std::has_single_bit(size) && size >= 512 && size <= 32768;
}

}  // namespace

const std::span<const PropertySpec> kBlkProperties = kProperties;

// One element on its way.
struct VirtioBlk::BlkRequest {
  block::DiskRequest io;
  VirtqElement element;
  VirtioBlk* blk = nullptr;
  uint16_t queue = 0;
  uint32_t life = 0;
  uint8_t* status = nullptr;  // in guest memory
  uint32_t written = 0;       // bytes, for the used ring
  // The data between header and status.
  iovec* data = nullptr;
  unsigned data_count = 0;
  uint64_t data_bytes = 0;
};

Result<std::unique_ptr<VirtioBlk>> VirtioBlk::Create(const DeviceEnv& env, BlkConfig config,
                                                     DiskPort& port) {
  auto invalid = [](std::string what) { return Fail(ErrorCode::kInvalid, std::move(what)); };
  if (config.num_queues == BlkConfig::kAutoQueues) config.num_queues = 1;
  if (config.num_queues < 1 || config.num_queues > 256) return invalid("num-queues: from 1 to 256");
  if (!std::has_single_bit(config.queue_size) || config.queue_size < 4 ||
      config.queue_size > 1024) {
    return invalid("queue-size: a power of two from 4 to 1024");
  }
  config.logical_block_size =
      std::max(config.logical_block_size, port.disk->limits().request_alignment);
  config.physical_block_size = std::max(config.physical_block_size, config.logical_block_size);
  if (!IsBlockSize(config.logical_block_size) || !IsBlockSize(config.physical_block_size)) {
    return invalid("logical_block_size and physical_block_size: powers of two from 512 to 32768");
  }
  if (config.min_io_size % config.logical_block_size != 0 ||
      config.opt_io_size % config.logical_block_size != 0) {
    return invalid("min_io_size and opt_io_size: multiples of the logical block size");
  }
  return std::unique_ptr<VirtioBlk>(new VirtioBlk(env, config, port));
}

VirtioBlk::VirtioBlk(const DeviceEnv& env, const BlkConfig& config, DiskPort& port)
    : VirtioDevice(env, VIRTIO_ID_BLOCK, config.virtio,
                   std::vector<uint16_t>(config.num_queues, config.queue_size)),
      config_(config),
      port_(port),
      disk_(*port.disk),
      read_only_(disk_.read_only()),
      limits_(disk_.limits()) {
  uint32_t logical = config_.logical_block_size;
  TakeSize();
  space_.seg_max = config_.queue_size - 2u;
  space_.blk_size = logical;
  space_.physical_block_exp =
      static_cast<uint8_t>(std::countr_zero(config_.physical_block_size / logical));
  space_.min_io_size =
      static_cast<uint16_t>(std::min<uint32_t>(config_.min_io_size / logical, UINT16_MAX));
  space_.opt_io_size = config_.opt_io_size / logical;
  space_.num_queues = config_.num_queues;
  space_.max_discard_sectors = config_.max_discard_sectors;
  space_.max_discard_seg = 1;
  space_.discard_sector_alignment = std::max(limits_.discard_granularity, logical) / kSectorSize;
  space_.max_write_zeroes_sectors = config_.max_write_zeroes_sectors;
  space_.max_write_zeroes_seg = 1;
  space_.write_zeroes_may_unmap = 1;
  write_cache_ = config_.write_cache == OnOffAuto::kAuto ? limits_.write_cache
                                                         : config_.write_cache == OnOffAuto::kOn;
  port_.on_resized = [this] {
    LockGuard guard(lock());
    TakeSize();
    ConfigChanged();
  };
}

VirtioBlk::~VirtioBlk() {
  port_.on_resized = nullptr;
  VERIFY(under_way_ == 0);
}

void VirtioBlk::TakeSize() {
  uint32_t logical = config_.logical_block_size;
  space_.capacity = disk_.size_bytes() / logical * logical / kSectorSize;
}

uint64_t VirtioBlk::DeviceFeatures() const {
  uint64_t features = 1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_BLK_SIZE |
                      1ull << VIRTIO_BLK_F_TOPOLOGY | 1ull << VIRTIO_BLK_F_FLUSH;
  if (config_.config_wce) features |= 1ull << VIRTIO_BLK_F_CONFIG_WCE;
  if (config_.num_queues > 1) features |= 1ull << VIRTIO_BLK_F_MQ;
  if (read_only_) return features | 1ull << VIRTIO_BLK_F_RO;
  if (config_.discard) features |= 1ull << VIRTIO_BLK_F_DISCARD;
  if (config_.write_zeroes) features |= 1ull << VIRTIO_BLK_F_WRITE_ZEROES;
  return features;
}

std::span<const uint8_t> VirtioBlk::ConfigSpace() {
  space_.wce = write_cache_;
  return {reinterpret_cast<const uint8_t*>(&space_), kSpaceSize};
}

void VirtioBlk::ConfigWritten(unsigned offset, std::span<const uint8_t> bytes,
                              VirtioInterface /*by*/) {
  if (offset == offsetof(virtio_blk_config, wce) && config_.config_wce)
    write_cache_ = bytes[0] != 0;
}

// 5.2.6.2: a driver that can't flush, or has switched the cache off, counts on each write.
bool VirtioBlk::WriteBack() const {
  return Negotiated(VIRTIO_BLK_F_FLUSH) && (write_cache_ || !Negotiated(VIRTIO_BLK_F_CONFIG_WCE));
}

// ---- requests (5.2.6)

VirtioBlk::BlkRequest* VirtioBlk::NewRequest() {
  if (free_.empty()) {
    requests_.push_back(std::make_unique<BlkRequest>());
    requests_.back()->blk = this;
    free_.reserve(requests_.size());
    return requests_.back().get();
  }
  BlkRequest* request = free_.back();
  free_.pop_back();
  return request;
}

void VirtioBlk::QueueKicked(unsigned index) {
  // Before any request there is one to pop into.
  BlkRequest* request = NewRequest();
  Virtqueue& ring = queue(index);
  unsigned budget = 2u * ring.registers.size;
  do {
    ring.DisableKicks();
    while (ring.Pop(&request->element)) {
      request->queue = static_cast<uint16_t>(index);
      request->life = life_;
      ++under_way_;
      Begin(request);
      request = NewRequest();
      if (--budget == 0) {
        free_.push_back(request);
        return RingDoorbell(index);
      }
    }
  } while (ring.EnableKicks());
  free_.push_back(request);
}

// Separates header, data and status. False: no place for one of them.
bool VirtioBlk::Parse(BlkRequest* request, virtio_blk_outhdr* header) {
  VirtqElement& element = request->element;
  if (element.CopyOut(0, header, sizeof *header) != sizeof *header || element.writable_bytes < 1)
    return false;
  iovec& last = element.writable.back();
  request->status = static_cast<uint8_t*>(last.iov_base) + last.iov_len - 1;
  request->written = static_cast<uint32_t>(std::min<uint64_t>(element.writable_bytes, UINT32_MAX));
  if (--last.iov_len == 0) element.writable.pop_back();
  bool to_device = header->type & VIRTIO_BLK_T_OUT;
  size_t skip = to_device ? sizeof *header : 0;
  std::vector<iovec>& pieces = to_device ? element.readable : element.writable;
  size_t first = 0;
  while (first < pieces.size() && pieces[first].iov_len <= skip) skip -= pieces[first++].iov_len;
  if (skip > 0) {
    pieces[first].iov_base = static_cast<uint8_t*>(pieces[first].iov_base) + skip;
    pieces[first].iov_len -= skip;
  }
  request->data = pieces.data() + first;
  request->data_count = static_cast<unsigned>(pieces.size() - first);
  request->data_bytes =
      to_device ? element.readable_bytes - sizeof *header : element.writable_bytes - 1;
  return true;
}

void VirtioBlk::Begin(BlkRequest* request) {
  virtio_blk_outhdr header;
  if (!Parse(request, &header)) {
    --under_way_;
    free_.push_back(request);
    return NeedReset("block request without header or status");
  }
  switch (header.type) {
    case VIRTIO_BLK_T_IN:
      return BeginTransfer(request, block::Request::Kind::kRead, header.sector);
    case VIRTIO_BLK_T_OUT:
      return BeginTransfer(request, block::Request::Kind::kWrite, header.sector);
    case VIRTIO_BLK_T_FLUSH:
      request->io = {};
      request->io.kind = block::Request::Kind::kFlush;
      return Submit(request);
    case VIRTIO_BLK_T_GET_ID:
      return AnswerId(request);
    case VIRTIO_BLK_T_DISCARD:
      return BeginRange(request, block::Request::Kind::kDiscard);
    case VIRTIO_BLK_T_WRITE_ZEROES:
      return BeginRange(request, block::Request::Kind::kWriteZeroes);
    default:
      return Complete(request, VIRTIO_BLK_S_UNSUPP);
  }
}

void VirtioBlk::BeginTransfer(BlkRequest* request, block::Request::Kind kind, uint64_t sector) {
  uint64_t sectors = request->data_bytes / kSectorSize;
  bool write = kind == block::Request::Kind::kWrite;
  if (request->data_bytes % kSectorSize != 0 || sectors > space_.capacity ||
      sector > space_.capacity - sectors || (write && read_only_)) {
    disk_.CountInvalid(kind);
    return Complete(request, VIRTIO_BLK_S_IOERR);
  }
  if (sectors == 0) return Complete(request, VIRTIO_BLK_S_OK);
  request->io = {};
  request->io.kind = kind;
  request->io.offset = sector * kSectorSize;
  request->io.length = request->data_bytes;
  request->io.iov = request->data;
  request->io.iov_count = request->data_count;
  request->io.fua = write && !WriteBack();
  Submit(request);
}

// Both types are odd, so that `data` is what the driver wrote: one segment.
void VirtioBlk::BeginRange(BlkRequest* request, block::Request::Kind kind) {
  bool zeroes = kind == block::Request::Kind::kWriteZeroes;
  if (!Negotiated(zeroes ? VIRTIO_BLK_F_WRITE_ZEROES : VIRTIO_BLK_F_DISCARD)) {
    return Complete(request, VIRTIO_BLK_S_UNSUPP);
  }
  virtio_blk_discard_write_zeroes range;
  if (request->data_bytes != sizeof range ||
      request->element.CopyOut(sizeof(virtio_blk_outhdr), &range, sizeof range) != sizeof range) {
    return Complete(request, VIRTIO_BLK_S_IOERR);
  }
  bool unmap = range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
  if ((range.flags & ~VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) != 0 || (unmap && !zeroes)) {
    return Complete(request, VIRTIO_BLK_S_UNSUPP);
  }
  uint32_t limit = zeroes ? config_.max_write_zeroes_sectors : config_.max_discard_sectors;
  if (range.num_sectors > limit || range.num_sectors > space_.capacity ||
      range.sector > space_.capacity - range.num_sectors || read_only_) {
    disk_.CountInvalid(kind);
    return Complete(request, VIRTIO_BLK_S_IOERR);
  }
  if (range.num_sectors == 0) return Complete(request, VIRTIO_BLK_S_OK);
  request->io = {};
  request->io.kind = kind;
  request->io.offset = range.sector * kSectorSize;
  request->io.length = uint64_t{range.num_sectors} * kSectorSize;
  request->io.unmap = unmap;
  request->io.fua = zeroes && !WriteBack();
  Submit(request);
}

void VirtioBlk::AnswerId(BlkRequest* request) {
  char id[VIRTIO_BLK_ID_BYTES] = {};
  config_.serial.copy(id, sizeof id);
  request->element.CopyIn(0, id, sizeof id);
  Complete(request, VIRTIO_BLK_S_OK);
}

void VirtioBlk::Submit(BlkRequest* request) {
  request->io.done = Done;
  request->io.owner = request;
  disk_.Start(&request->io);
}

void VirtioBlk::Done(block::DiskRequest* io, int result) {
  auto* request = static_cast<BlkRequest*>(io->owner);
  VirtioBlk& blk = *request->blk;
  LockGuard guard(blk.lock());
  uint16_t index = request->queue;
  blk.Complete(request, result >= 0          ? VIRTIO_BLK_S_OK
                        : result == -ENOTSUP ? VIRTIO_BLK_S_UNSUPP
                                             : VIRTIO_BLK_S_IOERR);
  blk.FinishQueue(index);
}

// Without interrupting: QueueKicked's caller and Done do.
void VirtioBlk::Complete(BlkRequest* request, uint8_t status) {
  if (request->life == life_) {
    *request->status = status;
    queue(request->queue).Fill(request->element, request->written);
  }
  request->element.hold.reset();
  --under_way_;
  free_.push_back(request);
}

// Requests that limits held up go on; failed ones that the disk keeps remain so until the machine
// goes on.
void VirtioBlk::DrainRequests() {
  RunOnLoop(disk_.loop(), [&] {
    disk_.Drain();
    disk_.Hold();
  });
}

void VirtioBlk::DropRequests() {
  RunOnLoop(disk_.loop(), [&] { disk_.DropKept(); });
}

// ---- start, reset, state

void VirtioBlk::Started() {
  disk_.loop().Post([disk = &disk_] { disk->Release(); });
}

void VirtioBlk::DeviceReset() {
  ++life_;
  write_cache_ = config_.write_cache == OnOffAuto::kAuto ? limits_.write_cache
                                                         : config_.write_cache == OnOffAuto::kOn;
  // Not here: they come back through Done, which takes the lock.
  if (under_way_ > 0) disk_.loop().Post([disk = &disk_] { disk->DropKept(); });
}

void VirtioBlk::VisitDevice(StateVisitor& v) {
  v.Version(1);
  if (v.saving() && under_way_ > 0)
    v.Reject("the disk failed requests and keeps them until the machine goes on");
  v.Field("write_cache", write_cache_);
}

}  // namespace kvartz
