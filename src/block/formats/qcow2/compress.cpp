// Compressed clusters.
// Spec: qcow2.txt, "Compressed Clusters": zlib: deflate without header, window of 4096 bytes; zstd:
// one frame.
#include <libdeflate.h>
#include <zlib.h>
#include <zstd.h>

#include <memory>

#include "block/formats/qcow2/qcow2_node.h"

namespace kvartz::block::qcow2 {
namespace {

struct ZstdFree {
  void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
  void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
};
struct DeflateFree {
  void operator()(libdeflate_decompressor* context) const { libdeflate_free_decompressor(context); }
};

class Deflater {
 public:
  Deflater() {
    ok_ = deflateInit2(&stream_, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) ==
          Z_OK;
  }
  ~Deflater() {
    if (ok_) deflateEnd(&stream_);
  }
  Deflater(const Deflater&) = delete;
  Deflater& operator=(const Deflater&) = delete;
  bool Run(std::span<const uint8_t> from, std::vector<uint8_t>& to) {
    if (!ok_ || deflateReset(&stream_) != Z_OK) return false;
    stream_.next_in = const_cast<uint8_t*>(from.data());
    stream_.avail_in = static_cast<uInt>(from.size());
    stream_.next_out = to.data();
    stream_.avail_out = static_cast<uInt>(to.size());
    if (deflate(&stream_, Z_FINISH) != Z_STREAM_END) return false;
    to.resize(to.size() - stream_.avail_out);
    return true;
  }

 private:
  z_stream stream_ = {};
  bool ok_ = false;
};

}  // namespace

bool Compress(Compression format, std::span<const uint8_t> cluster, std::vector<uint8_t>& packed) {
  packed.resize(cluster.size() - 1);
  if (format == Compression::kZlib) {
    thread_local Deflater deflater;
    return deflater.Run(cluster, packed);
  }
  thread_local std::unique_ptr<ZSTD_CCtx, ZstdFree> context(ZSTD_createCCtx());
  if (!context) return false;
  size_t size = ZSTD_compressCCtx(context.get(), packed.data(), packed.size(), cluster.data(),
                                  cluster.size(), ZSTD_CLEVEL_DEFAULT);
  if (ZSTD_isError(size)) return false;
  packed.resize(size);
  return true;
}

bool Decompress(Compression format, std::span<const uint8_t> packed, std::span<uint8_t> cluster) {
  if (format == Compression::kZlib) {
    thread_local std::unique_ptr<libdeflate_decompressor, DeflateFree> context(
        libdeflate_alloc_decompressor());
    size_t size = 0;
    return context &&
           libdeflate_deflate_decompress(context.get(), packed.data(), packed.size(),
                                         cluster.data(), cluster.size(),
                                         &size) == LIBDEFLATE_SUCCESS &&
           size == cluster.size();
  }
  // Padding follows the frame: only a stream tells where that ends.
  thread_local std::unique_ptr<ZSTD_DCtx, ZstdFree> context(ZSTD_createDCtx());
  if (!context) return false;
  ZSTD_DCtx_reset(context.get(), ZSTD_reset_session_only);
  ZSTD_inBuffer in = {packed.data(), packed.size(), 0};
  ZSTD_outBuffer out = {cluster.data(), cluster.size(), 0};
  while (out.pos < out.size) {
    size_t before_in = in.pos, before_out = out.pos;
    size_t left = ZSTD_decompressStream(context.get(), &out, &in);
    if (ZSTD_isError(left)) return false;
    if (left == 0) break;
    if (in.pos == before_in && out.pos == before_out) return false;
  }
  return out.pos == out.size;
}

}  // namespace kvartz::block::qcow2
