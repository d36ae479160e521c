// Random operations on one image, against a disk in memory.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "block/test_disk.h"

namespace kvartz::block {

class ModelRun {
 public:
  ModelRun(EventLoop& loop, uint64_t seed) : random_(seed), disk_(loop) {}
  virtual ~ModelRun() = default;

  void Run() {
    Setup();
    if (testing::Test::HasFatalFailure()) return;
    for (int i = 0; i < kSteps && !testing::Test::HasFailure(); i++) Step();
    if (testing::Test::HasFailure()) return;
    CheckAll();
    EXPECT_EQ(disk_.Close(), "");
    if (HavePeer() && !testing::Test::HasFailure()) CheckByPeer();
  }
  std::string trace;

  static constexpr int kSteps = 100;

 protected:
  // Makes the image, opens it as disk_, and fills model_ with what it shows.
  virtual void Setup() = 0;
  virtual void Step() = 0;
  // The image closed; what the peer's tools make of it.
  virtual void CheckByPeer() = 0;

  struct Range {
    uint64_t offset = 0, length = 0;
  };
  // It was written to.
  virtual void Touched(Range) {}

  uint64_t Below(uint64_t limit) { return limit == 0 ? 0 : random_() % limit; }
  bool OneIn(uint64_t n) { return Below(n) == 0; }
  std::string Noise(uint64_t length) {
    std::string text(length, '\0');
    if (OneIn(2)) {
      std::fill(text.begin(), text.end(), static_cast<char>(random_()));
      return text;
    }
    for (size_t i = 0; i < length; i++) text[i] = static_cast<char>(random_() >> 24);
    return text;
  }

  Range AnyRange() {
    uint64_t unit = OneIn(3) ? 1 : (OneIn(2) ? 512 : std::min<uint64_t>(unit_bytes_, 65536));
    if (model_.empty()) return {};
    uint64_t offset = Below(model_.size()) / unit * unit;
    uint64_t most = std::min<uint64_t>(model_.size() - offset, 5 * unit_bytes_ + 777);
    uint64_t length = std::min<uint64_t>(Below(most + 1), 600000);
    if (unit > 1) length = std::min(model_.size() - offset, (length / unit + 1) * unit);
    return {offset, length};
  }

  void Write() {
    Range range = AnyRange();
    std::string data = Noise(range.length);
    trace += "write " + std::to_string(range.offset) + " " + std::to_string(range.length) + "\n";
    ASSERT_EQ(disk_.Write(range.offset, data), 0);
    model_.replace(range.offset, range.length, data);
    Touched(range);
  }

  void ReadSome() {
    Range range = AnyRange();
    trace += "read " + std::to_string(range.offset) + " " + std::to_string(range.length) + "\n";
    Compare(range.offset, disk_.Read(range.offset, range.length));
  }

  void Compare(uint64_t offset, const std::string& data) {
    auto [ours, theirs] =
        std::mismatch(data.begin(), data.end(), model_.begin() + static_cast<ptrdiff_t>(offset));
    if (ours == data.end()) return;
    uint64_t at = offset + static_cast<uint64_t>(ours - data.begin());
    ADD_FAILURE() << "differs at " << at << ": " << int(uint8_t(*ours)) << " for "
                  << int(uint8_t(*theirs));
  }

  void CompareWhole() { Compare(0, disk_.Read(0, model_.size())); }

  void Zeroes() {
    Range range = AnyRange();
    bool unmap = OneIn(2);
    trace += "zero " + std::to_string(range.offset) + " " + std::to_string(range.length) +
             (unmap ? " unmap\n" : "\n");
    ASSERT_EQ(disk_.WriteZeroes(range.offset, range.length, unmap), 0);
    std::fill_n(model_.begin() + static_cast<ptrdiff_t>(range.offset), range.length, '\0');
    Touched(range);
  }

  // Each unit is as before or zeros; what isn't a whole unit is as before.
  void Discard() {
    Range range = AnyRange();
    trace += "discard " + std::to_string(range.offset) + " " + std::to_string(range.length) + "\n";
    ASSERT_EQ(disk_.Discard(range.offset, range.length), 0);
    uint64_t unit = discard_unit_ ? discard_unit_ : unit_bytes_;
    uint64_t end = range.offset + range.length;
    if (unit == 1) {
      std::string now = disk_.Read(range.offset, range.length);
      for (uint64_t i = 0; i < range.length; i++) {
        if (now[i] == '\0') model_[range.offset + i] = '\0';
      }
    }
    for (uint64_t at = (range.offset + unit - 1) / unit * unit; unit > 1 && at < end; at += unit) {
      uint64_t length = std::min(unit, model_.size() - at);
      if (at + length > end) break;
      std::string now = disk_.Read(at, length);
      if (now == std::string(length, '\0')) model_.replace(at, length, now);
    }
    Touched(range);
    CompareWhole();
  }

  void FlushIt() {
    trace += "flush\n";
    EXPECT_EQ(disk_.Flush(), 0);
  }

  void CheckAll() {
    trace += "check\n";
    CompareWhole();
    if (!checks_ || !disk_.node->editor()) return;
    EXPECT_EQ(disk_.Check(), "");
  }

  virtual void Reopen() {
    trace += "reopen\n";
    ASSERT_EQ(disk_.Close(), "");
    if (HavePeer() && OneIn(FromEnvironment("KVARTZ_BLOCK_PEER", 4))) CheckByPeer();
    ASSERT_EQ(disk_.Open(path_, format_), "");
    CompareWhole();
  }

  void CompareByPeer() { CompareByPeer("", " driver=" + format_ + ",file.filename=" + path_); }
  // `objects`: --object ... of what `options` name.
  void CompareByPeer(const std::string& objects, const std::string& options) {
    if (model_.empty()) return;
    std::string raw = dir_.path() + "/model.raw";
    WriteFile(raw, model_);
    CommandResult compare = RunCommand("qemu-img compare --image-opts" + objects + options +
                                       " driver=raw,file.filename=" + raw);
    EXPECT_EQ(compare.status, 0) << compare.output;
  }

  // Several at once, which touch the same clusters but not the same bytes.
  void Together() {
    if (model_.size() < 8192) return;
    struct One {
      Request request;
      std::string data;
      iovec iov;
      int* left;
      int result = -1;
    };
    uint64_t unit = uint64_t{512} << Below(4);
    uint64_t base = Below(model_.size() - std::min<uint64_t>(model_.size() / 2, 16 * unit) + 1);
    std::vector<uint64_t> places;
    for (uint64_t at = base; at + unit <= model_.size() && places.size() < 16; at += unit)
      places.push_back(at);
    std::shuffle(places.begin(), places.end(), random_);
    std::vector<One> all(places.size());
    int left = static_cast<int>(all.size());
    trace += "together " + std::to_string(base) + " " + std::to_string(unit) + "\n";
    for (size_t i = 0; i < all.size(); i++) {
      One& one = all[i];
      one.left = &left;
      one.data = Noise(unit);
      one.iov = {one.data.data(), one.data.size()};
      uint64_t kind = Below(8);
      one.request.kind = kind < 5   ? Request::Kind::kWrite
                         : kind < 6 ? Request::Kind::kWriteZeroes
                                    : Request::Kind::kRead;
      one.request.unmap = OneIn(2);
      one.request.offset = places[i];
      one.request.length = unit;
      one.request.iov = &one.iov;
      one.request.iov_count = 1;
      one.request.owner = &one;
      one.request.done = [](Request* request, int result) {
        One& finished = *static_cast<One*>(request->owner);
        finished.result = result;
        --*finished.left;
      };
    }
    std::vector<Request> asked;
    for (One& one : all) asked.push_back(one.request);
    for (One& one : all) disk_.node->Start(&one.request);
    if (OneIn(4)) disk_.node->Drain();
    while (left > 0) disk_.loop().RunOnce(-1);
    for (size_t i = 0; i < all.size(); i++) {
      ASSERT_EQ(all[i].result, 0);
      if (asked[i].kind == Request::Kind::kRead) {
        Compare(places[i], all[i].data);
      } else if (asked[i].kind == Request::Kind::kWrite) {
        model_.replace(places[i], unit, all[i].data);
        Touched({places[i], unit});
      } else {
        model_.replace(places[i], unit, std::string(unit, '\0'));
        Touched({places[i], unit});
      }
    }
  }

  std::mt19937_64 random_;
  TempDir dir_{TempDir::Place::kMemory};
  TestDisk disk_;
  std::string format_ = "qcow2";
  bool checks_ = true;           // the format has checks
  uint64_t unit_bytes_ = 65536;  // what the format allocates at a time
  uint64_t discard_unit_ = 0;    // what discarding leaves whole; 0: as much
  std::string path_;
  std::string model_;
};

// KVARTZ_BLOCK_CASES images from KVARTZ_BLOCK_SEED on.
template <typename Kind, typename... Args>
void RunModels(uint64_t few, Args... args) {
  uint64_t seed = FromEnvironment("KVARTZ_BLOCK_SEED", 1);
  uint64_t cases = FromEnvironment("KVARTZ_BLOCK_CASES", few);
  auto loop = MakeLoop();
  for (uint64_t i = 0; i < cases; i++) {
    Kind run(*loop, seed + i, args...);
    run.Run();
    if (testing::Test::HasFailure())
      FAIL() << "seed " << seed + i << "\n" << run.trace.substr(0, 20000);
  }
}

}  // namespace kvartz::block
