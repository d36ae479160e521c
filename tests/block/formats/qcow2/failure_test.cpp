// A full disk and failing I/O: the request that met it fails, the image stays sound.
#include <gtest/gtest.h>

#include <random>

#include "block/memory_node.h"
#include "block/test_disk.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kUnit = 1024;

class Qcow2Failure : public testing::Test {
 protected:
  void Open(const std::string& options, uint64_t seed) {
    TempDir dir(TempDir::Place::kMemory);
    std::string path = dir.path() + "/a";
    ASSERT_EQ(disk_.Create(path, options), "");
    file_ = std::make_shared<MemoryNode>(*loop_, ReadFile(path), seed);
    disk_.node = OpenOn(file_, false);
    ASSERT_TRUE(disk_.node);
    random_.seed(seed);
  }
  NodePtr OpenOn(std::shared_ptr<MemoryNode> file, bool for_check) {
    Options options;
    options.Set("driver", "qcow2");
    options.SetNode("file", std::move(file));
    auto node = disk_.InFiber([&] {
      return OpenNode(disk_.env(), options, {.discard_unmap = true, .for_check = for_check});
    });
    EXPECT_TRUE(node) << node.error().what;
    return node ? *node : nullptr;
  }
  // Writes all over; `model` has what each unit may read as.
  void Load(std::vector<std::string>& model, int operations, int* failed) {
    for (int i = 0; i < operations; i++) {
      uint64_t at = random_() % model.size();
      uint64_t kind = random_() % 8;
      char fill = kind < 6 ? static_cast<char>('a' + random_() % 26) : '\0';
      int rc = kind < 6   ? disk_.Write(at * kUnit, std::string(kUnit, fill))
               : kind < 7 ? disk_.WriteZeroes(at * kUnit, kUnit, true)
                          : disk_.Flush();
      *failed += rc != 0;
      if (kind >= 7) continue;
      if (rc == 0) model[at].clear();
      model[at] += fill;
    }
  }
  void Expect(TestDisk& disk, const std::vector<std::string>& model) {
    for (uint64_t at = 0; at < model.size(); at++) {
      std::string unit = disk.Read(at * kUnit, kUnit);
      ASSERT_EQ(unit, std::string(kUnit, unit[0]));
      EXPECT_NE(model[at].find(unit[0]), std::string::npos) << "unit " << at;
    }
  }
  void ExpectSound(const std::string& bytes, const std::vector<std::string>& model) {
    TestDisk after(*loop_);
    after.node = OpenOn(std::make_shared<MemoryNode>(*loop_, bytes), true);
    ASSERT_TRUE(after.node);
    CheckResult result;
    std::string found = after.Check(Repair::kNone, &result);
    EXPECT_EQ(result.corruptions + result.check_errors, 0u) << found;
    Expect(after, model);
  }

  std::unique_ptr<EventLoop> loop_ = MakeLoop();
  TestDisk disk_{*loop_};
  std::shared_ptr<MemoryNode> file_;
  std::mt19937_64 random_;
};

TEST_F(Qcow2Failure, AFullDiskIsSurvived) {
  for (uint64_t seed = 1; seed <= 20; seed++) {
    Open(seed % 2 ? "size=1M,cluster_size=4k" : "size=1M,cluster_size=512,refcount_bits=64", seed);
    std::vector<std::string> model(kMiB / kUnit, std::string(1, '\0'));
    int failed = 0;
    file_->set_room(300 << 10);
    Load(model, 1500, &failed);
    EXPECT_GT(failed, 0);
    Expect(disk_, model);
    file_->set_room(UINT64_MAX);
    failed = 0;
    Load(model, 300, &failed);
    EXPECT_EQ(failed, 0);
    EXPECT_EQ(disk_.Close(), "");
    ExpectSound(file_->bytes(), model);
  }
}

TEST_F(Qcow2Failure, FailingWritesLeaveTheRest) {
  for (uint64_t seed = 1; seed <= 40; seed++) {
    Open(seed % 2 ? "size=1M,cluster_size=4k" : "size=1M,cluster_size=512,lazy_refcounts=on", seed);
    std::vector<std::string> model(kMiB / kUnit, std::string(1, '\0'));
    int failed = 0;
    file_->set_failures(20);
    Load(model, 600, &failed);
    EXPECT_GT(failed, 0);
    Expect(disk_, model);
    file_->set_failures(0);
    EXPECT_EQ(disk_.Flush(), 0);
    EXPECT_EQ(disk_.Close(), "");
    ExpectSound(file_->bytes(), model);
  }
}

}  // namespace
}  // namespace kvartz::block
