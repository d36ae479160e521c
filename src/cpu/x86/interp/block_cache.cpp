#include "cpu/x86/interp/block_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "cpu/x86/code_log.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr size_t kArenaBytes = 16 << 20;
constexpr unsigned kMaxInsns = 48;
constexpr size_t kMaxBlockBytes = sizeof(Block) + kMaxInsns * sizeof(Insn);

size_t RoomInPage(uint64_t linear) { return 4096 - (linear & 4095); }

[[noreturn]] void RaiseUndecodable(Cpu& cpu, DecodeStatus status) {
  if (status == DecodeStatus::kTooLong) {
    Raise(cpu, kGP, 0);
  }
  Raise(cpu, kUD);
}

// Bytes of code before CS's limit, at most 15 (0 in 64-bit mode means nothing: there is no limit).
size_t RoomInSegment(const Cpu& cpu) {
  if (cpu.code_mode == CodeMode::k64) {
    return sizeof Insn::bytes;
  }
  const uint64_t limit = cpu.seg[kCs].limit;
  return cpu.rip > limit
             ? 0
             : static_cast<size_t>(std::min<uint64_t>(limit - cpu.rip + 1, sizeof Insn::bytes));
}

}  // namespace

Result<std::unique_ptr<BlockCache>> BlockCache::Create(const FeatureSet& features) {
  void* map = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return Fail(ErrnoError(errno, "cannot map memory for decoded code"));
  return std::unique_ptr<BlockCache>(new BlockCache(features, static_cast<uint8_t*>(map)));
}

BlockCache::BlockCache(const FeatureSet& features, uint8_t* arena)
    : features_(features), arena_(arena), buckets_(new Block*[1 << kBucketBits]()) {}

BlockCache::~BlockCache() { munmap(arena_, kArenaBytes); }

void BlockCache::Flush() {
  std::fill_n(buckets_.get(), 1 << kBucketBits, nullptr);
  used_ = 0;
  ++flushes_;
}

DecodeContext BlockCache::Context(const Cpu& cpu) const {
  return {.mode = cpu.code_mode,
          .protected_mode = cpu.protected_mode() && !cpu.virtual_8086(),
          .cpl = cpu.cpl,
          .features = features_};
}

Block* BlockCache::FindSlow(Cpu& cpu, uint64_t linear, const uint8_t* host, uint16_t mode) {
  Block*& first = Bucket(host, mode);
  for (Block** place = &first; *place != nullptr; place = &(*place)->next) {
    Block* block = *place;
    if (block->host != host || block->mode != mode) {
      continue;
    }
    *place = block->next;
    if ((block->second == nullptr && block->valid()) || Revalidate(cpu, linear, block)) {
      block->next = first;
      first = block;
      return block;
    }
    block->host = nullptr;  // links to it don't match any more
    break;
  }
  return Build(cpu, linear, host, mode);
}

// A write to the page often spares the block: then it is watched anew.
bool BlockCache::Revalidate(Cpu& cpu, uint64_t linear, Block* block) {
  if (block->second != nullptr) {
    if (FetchCode(cpu, linear + RoomInPage(linear)) != block->second) {
      return false;
    }
    if (block->valid()) {
      return true;
    }
    block->second_watch = WatchCode(cpu, block->second);
  }
  block->watch = WatchCode(cpu, block->host);
  const uint8_t* code = block->host;
  for (const Insn& insn : std::span<const Insn>(block->insns, block->count)) {
    const size_t first = block->second == nullptr ? insn.length : RoomInPage(linear);
    if (std::memcmp(insn.bytes, code, first) != 0 ||
        (first < insn.length &&
         std::memcmp(insn.bytes + first, block->second, insn.length - first) != 0)) {
      return false;
    }
    code += insn.length;
  }
  return true;
}

Block* BlockCache::Build(Cpu& cpu, uint64_t linear, const uint8_t* host, uint16_t mode) {
  if (used_ + kMaxBlockBytes > kArenaBytes) {
    Flush();
  }
  auto* block = new (arena_ + used_) Block{};
  block->host = host;
  block->mode = mode;
  block->watch = WatchCode(cpu, host);
  const DecodeContext context = Context(cpu);
  const size_t room = RoomInPage(linear);
  const size_t in_segment = RoomInSegment(cpu);
  if (in_segment == 0) {
    Raise(cpu, kGP, 0);
  }
  size_t done = 0;
  while (block->count < kMaxInsns && done < room) {
    const size_t limit = done == 0 ? in_segment : sizeof Insn::bytes;
    Insn* insn = &block->insns[block->count];
    const DecodeStatus status = Decode(context, {host + done, std::min(room - done, limit)}, insn);
    if (status != DecodeStatus::kOk) {
      if (done != 0) {
        break;
      }
      if (status != DecodeStatus::kTruncated) {
        RaiseUndecodable(cpu, status);
      }
      if (room >= limit) {
        Raise(cpu, kGP, 0);  // the instruction goes on behind CS's limit
      }
      BuildCrossing(cpu, linear, block);
      done = block->insns[0].length;
      break;
    }
    done += insn->length;
    ++block->count;
    if ((insn->row->attributes & (kBranch | kEndsBlock)) != 0) {
      break;
    }
  }
  block->bytes = static_cast<uint16_t>(done);
  if (LogsGuestCode()) {
    LogGuestCode(cpu, "interpreted block", linear, block->count);
    uint64_t at = linear;
    for (const Insn& insn : std::span<const Insn>(block->insns, block->count)) {
      LogGuestInsn(cpu, at, insn);
      at += insn.length;
    }
  }
  const Insn& last = block->insns[block->count - 1];
  block->direct =
      !last.has(kBranch) || last.row->imm[0] == ImmKind::kCb || last.row->imm[0] == ImmKind::kCz;
  block->changes_mode = last.has(kEndsBlock);
  used_ += sizeof(Block) + block->count * sizeof(Insn);
  Block*& bucket = Bucket(host, mode);
  block->next = bucket;
  bucket = block;
  ++decoded_blocks_;
  return block;
}

// A block of the one instruction that begins at the end of a page.
void BlockCache::BuildCrossing(Cpu& cpu, uint64_t linear, Block* block) {
  const size_t first = RoomInPage(linear);
  const uint8_t* second = FetchCode(cpu, linear + first);
  uint8_t bytes[sizeof Insn::bytes];
  std::memcpy(bytes, block->host, first);
  if (second != nullptr) {
    block->second_watch = WatchCode(cpu, second);
    std::memcpy(bytes + first, second, sizeof bytes - first);
  } else {
    FetchBytes(cpu, linear + first, bytes + first, static_cast<unsigned>(sizeof bytes - first));
    static constexpr uint32_t kNever = 1;
    block->second_watch = {&kNever, 0};
    second = bytes;  // no page: matches nothing
  }
  block->second = second;
  const size_t in_segment = RoomInSegment(cpu);
  const DecodeStatus status = Decode(Context(cpu), {bytes, in_segment}, &block->insns[0]);
  if (status == DecodeStatus::kTruncated) {
    Raise(cpu, kGP, 0);
  }
  if (status != DecodeStatus::kOk) {
    RaiseUndecodable(cpu, status);
  }
  block->count = 1;
}

const Insn* BlockCache::DecodeUncached(Cpu& cpu, uint64_t linear) {
  const size_t in_segment = RoomInSegment(cpu);
  uint8_t bytes[sizeof Insn::bytes];
  size_t have = std::min(in_segment, RoomInPage(linear));
  if (have == 0) {
    Raise(cpu, kGP, 0);
  }
  FetchBytes(cpu, linear, bytes, static_cast<unsigned>(have));
  DecodeStatus status = Decode(Context(cpu), {bytes, have}, &uncached_);
  if (status == DecodeStatus::kTruncated && have < in_segment) {
    FetchBytes(cpu, linear + have, bytes + have, static_cast<unsigned>(in_segment - have));
    have = in_segment;
    status = Decode(Context(cpu), {bytes, have}, &uncached_);
  }
  if (status == DecodeStatus::kTruncated) {
    Raise(cpu, kGP, 0);
  }
  if (status != DecodeStatus::kOk) {
    RaiseUndecodable(cpu, status);
  }
  return &uncached_;
}

}  // namespace kvartz::cpu::x86
