// img bench: requests in a row, many at once, and how long they took.
#include <fmt/core.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "base/clock.h"
#include "base/fiber.h"
#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

using block::Node;
using block::Request;

struct Load {
  bool write = false;
  bool drain_on_flush = true;
  uint64_t count = 75000;
  uint64_t depth = 64;
  uint64_t flush_interval = 0;
  uint64_t offset = 0, size = 4096, step = 0;
  uint64_t pattern = 0;
};

// Loop-owned; the fiber that runs it waits until the last request is done.
class Bench {
 public:
  Bench(Node& node, const Load& load) : node_(node), load_(load), slots_(load.depth) {
    size_t bytes = load.depth * load.size;
    memory_.reset(static_cast<uint8_t*>(aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
    for (size_t i = 0; memory_ && i < bytes; i++) memory_[i] = static_cast<uint8_t>(load.pattern);
    offset_ = load.offset;
  }
  bool ok() const { return memory_ != nullptr; }

  int Run() {
    fiber_ = Fiber::Current();
    for (Slot& slot : slots_) {
      slot.bench = this;
      slot.iov = {memory_.get() + static_cast<size_t>(&slot - slots_.data()) * load_.size,
                  load_.size};
      idle_.push_back(&slot);
    }
    flush_.bench = this;
    Fill();
    while (done_ < load_.count && error_ == 0) Fiber::Suspend();
    while (under_way_ > 0) Fiber::Suspend();
    return error_;
  }

 private:
  struct Slot {
    Request request;
    iovec iov;
    Bench* bench;
  };

  void Fill() {
    while (error_ == 0 && !idle_.empty() && started_ < load_.count && !flushing_) {
      if (FlushDue()) return;
      Slot* slot = idle_.back();
      idle_.pop_back();
      slot->request = {.kind = load_.write ? Request::Kind::kWrite : Request::Kind::kRead,
                       .offset = offset_,
                       .length = load_.size,
                       .iov = &slot->iov,
                       .iov_count = 1};
      slot->request.done = OnDone;
      slot->request.owner = slot;
      offset_ += load_.step ? load_.step : load_.size;
      if (offset_ > node_.size_bytes() - load_.size) offset_ = load_.offset;
      started_++;
      under_way_++;
      node_.Start(&slot->request);
    }
  }

  // True: nothing more now.
  bool FlushDue() {
    if (load_.flush_interval == 0 || started_ == flushed_at_ ||
        started_ % load_.flush_interval != 0)
      return false;
    if (load_.drain_on_flush && under_way_ > 0) return true;
    flushed_at_ = started_;
    flushing_ = load_.drain_on_flush;
    flush_.request = {.kind = Request::Kind::kFlush};
    flush_.request.done = [](Request* request, int result) {
      auto* slot = static_cast<Slot*>(request->owner);
      Bench& bench = *slot->bench;
      if (slot != &bench.flush_) delete slot;
      bench.flushing_ = false;
      bench.OnOne(result);
    };
    Slot* slot = load_.drain_on_flush ? &flush_ : new Slot(flush_);
    slot->request.owner = slot;
    under_way_++;
    node_.Start(&slot->request);
    return flushing_;
  }

  static void OnDone(Request* request, int result) {
    auto* slot = static_cast<Slot*>(request->owner);
    slot->bench->idle_.push_back(slot);
    slot->bench->done_++;
    slot->bench->OnOne(result);
  }

  void OnOne(int result) {
    under_way_--;
    if (result < 0 && error_ == 0) error_ = result;
    Fill();
    if ((done_ >= load_.count || error_ != 0) && under_way_ == 0) fiber_->Wake();
  }

  struct FreeDeleter {
    void operator()(uint8_t* memory) const { free(memory); }
  };
  Node& node_;
  const Load load_;
  std::unique_ptr<uint8_t[], FreeDeleter> memory_;
  std::vector<Slot> slots_;
  std::vector<Slot*> idle_;
  Slot flush_ = {};
  Fiber* fiber_ = nullptr;
  uint64_t offset_ = 0, started_ = 0, done_ = 0, under_way_ = 0, flushed_at_ = 0;
  bool flushing_ = false;
  int error_ = 0;
};

Result<Load> TakeLoad(const Arguments& arguments) {
  Load load;
  load.write = arguments.Has("w");
  load.drain_on_flush = !arguments.Has("no-drain");
  if (auto text = arguments.Find("c")) load.count = TRY(TakeCount(*text, "request count"));
  if (auto text = arguments.Find("d")) load.depth = TRY(TakeCount(*text, "queue depth"));
  if (auto text = arguments.Find("flush-interval"))
    load.flush_interval = TRY(TakeCount(*text, "flush interval"));
  if (auto text = arguments.Find("pattern")) load.pattern = TRY(TakeCount(*text, "pattern byte"));
  if (auto text = arguments.Find("o")) load.offset = TRY(TakeSize(*text, "offset"));
  if (auto text = arguments.Find("s")) load.size = TRY(TakeSize(*text, "buffer size"));
  if (auto text = arguments.Find("S")) load.step = TRY(TakeSize(*text, "step size"));
  constexpr uint64_t kMostMemory = uint64_t{1} << 30;
  if (load.depth < 1 || load.size < 1 || load.pattern > 0xff)
    return Fail(ErrorCode::kInvalid,
                "queue depth and buffer size must be positive, the pattern a byte");
  if (load.depth > kMostMemory / load.size)
    return Fail(ErrorCode::kInvalid, "queue depth times buffer size must be at most 1G");
  if (load.flush_interval && !load.write)
    return Fail(ErrorCode::kInvalid, "--flush-interval is only available in write tests");
  if (load.flush_interval && load.flush_interval < load.depth)
    return Fail(ErrorCode::kInvalid, "Flush interval can't be smaller than depth");
  return load;
}

Result<int> Run(Session& session, const Arguments& arguments) {
  Load load = TRY(TakeLoad(arguments));
  ImageName image = TRY(TakeImage(arguments));
  block::NodeOptions options = {.read_only = !load.write,
                                .force_share = !load.write && arguments.Has("force-share")};
  TRY(ApplyCache(arguments.Get("t", "writeback"), options));
  if (arguments.Has("n")) options.cache_direct = true;
  TRY(block::CheckAio(arguments.Get("i", "io_uring")));
  block::NodePtr node = TRY(session.Open(image, options));
  if (load.offset > node->size_bytes() || load.size > node->size_bytes() - load.offset)
    return Fail(ErrorCode::kInvalid, "the image is smaller than offset and buffer size");
  session.Say(
      "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size "
      "{})\n",
      load.count, load.write ? "write" : "read", load.size, load.depth, load.offset,
      load.step ? load.step : load.size);
  if (load.flush_interval) session.Say("Sending flush every {} requests\n", load.flush_interval);
  Bench bench(*node, load);
  if (!bench.ok()) return Fail(ErrorCode::kNoSpace, "out of memory");
  const Clock& clock = session.loop().clock();
  int64_t start_ns = clock.NowNs();
  int error = bench.Run();
  int64_t end_ns = clock.NowNs();
  if (error) return Fail(ErrnoError(-error, "Failed request"));
  session.Say("Run completed in {:.3f} seconds.\n", static_cast<double>(end_ns - start_ns) / 1e9);
  return 0;
}

constexpr OptionSpec kOptions[] = {
    kObject,
    kImageOpts,
    kQuiet,
    kFormat,
    kCache,
    kForceShare,
    {'c', {}, "COUNT", "number of requests (default 75000)"},
    {'d', {}, "DEPTH", "requests under way at once (default 64)"},
    {0, "flush-interval", "N", "flush after each N requests (with -w)"},
    {'i', {}, "AIO", "threads, native or io_uring: the best there is is taken"},
    {'n', {}, {}, "past the host's page cache"},
    {0, "no-drain", {}, "go on while a flush is under way"},
    {'o', {}, "OFFSET", "where to begin"},
    {0, "pattern", "BYTE", "what to write"},
    {'s', {}, "BUFFER_SIZE", "bytes of a request (default 4k)"},
    {'S', {}, "STEP_SIZE", "bytes from one request to the next"},
    {'w', {}, {}, "write instead of reading"},
};

}  // namespace

const Verb kBench = {"bench", "FILENAME", "measures how fast requests are", kOptions, Run};

}  // namespace kvartz::cli::img
