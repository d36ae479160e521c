// Random operations on images of each format that is written, but qcow2 (qcow2/model_test.cpp).
//
//   KVARTZ_BLOCK_CASES   how many images of each (each with some 100 operations)
//   KVARTZ_BLOCK_SEED    the first one's seed
//   KVARTZ_BLOCK_PEER    of how many closes one is followed by a look with the peer's tools (4)
#include "block/model.h"

namespace kvartz::block {
namespace {

struct Kind {
  const char* name;     // of the test
  const char* format;   // ours
  const char* peers;    // the peer's name of it; null: it knows none
  const char* options;  // of create; if we don't create it: of cryptsetup luksFormat
  uint64_t unit_bytes;
  uint64_t granularity;  // of sizes
  uint64_t discard_unit = 0;
  bool resizes = false;
  bool peer_checks = false;  // qemu-img check knows it
  const char* opens = "";    // options of open, ours and the peer's
  bool scrambled = false;    // what is new reads as noise, not as zeros, and nothing is checked
};

// Where it is installed need not be in a user's path.
constexpr char kCryptsetup[] = "PATH=$PATH:/usr/sbin:/sbin; ";

constexpr char kSecret[] = "passphrase";

constexpr Kind kKinds[] = {
    {"Raw", "raw", "raw", "", 4096, 1, 1, true},
    {"VdiDynamic", "vdi", "vdi", "", 1 << 20, 512, 0, false, true},
    {"VdiStatic", "vdi", "vdi", ",static=on", 1 << 20, 512, 0, false, true},
    {"VpcDynamic", "vpc", "vpc", ",subformat=dynamic,force_size=on", 2 << 20, 512},
    {"VpcFixed", "vpc", "vpc", ",subformat=fixed,force_size=on", 2 << 20, 512},
    {"VhdxDynamic", "vhdx", "vhdx", ",subformat=dynamic,block_size=1M", 1 << 20, 1 << 20, 0, false,
     true},
    {"VhdxFixed", "vhdx", "vhdx", ",subformat=fixed,block_size=1M", 1 << 20, 1 << 20, 0, false,
     true},
    {"VmdkSparse", "vmdk", "vmdk", ",subformat=monolithicSparse", 65536, 512, 0, false, true},
    {"Luks", "luks", "luks", ",key-secret=key,iter-time=1", 4096, 512, 1, true, false,
     "key-secret=key", true},
    {"Luks2", "luks", nullptr, "--sector-size 512", 4096, 512, 1, true, false, "key-secret=key",
     true},
    {"Luks2LargeSectors", "luks", nullptr, "--sector-size 4096", 4096, 4096, 1, true, false,
     "key-secret=key", true},
    {"VmdkFlat", "vmdk", "vmdk", ",subformat=monolithicFlat", 65536, 512, 1, false, true},
    {"VmdkParts", "vmdk", "vmdk", ",subformat=twoGbMaxExtentSparse", 65536, 512, 0, false, true},
};

class FormatRun final : public ModelRun {
 public:
  FormatRun(EventLoop& loop, uint64_t seed, const Kind* kind)
      : ModelRun(loop, seed), kind_(*kind) {}

 private:
  void Setup() override {
    format_ = kind_.format;
    checks_ = !kind_.scrambled;
    unit_bytes_ = kind_.unit_bytes;
    discard_unit_ = kind_.discard_unit;
    uint64_t unit = kind_.granularity;
    uint64_t size = (1 + Below((OneIn(3) ? 6 : 2) * kMiB / unit)) * unit;
    path_ = dir_.path() + "/a.img";
    disk_.env().secret = [](const std::string&) { return std::string(kSecret); };
    disk_.more_options = kind_.opens;
    ASSERT_NO_FATAL_FAILURE(Make(size));
    ASSERT_EQ(disk_.Open(path_, format_), "");
    // Where the format rounds sizes up.
    model_.assign(disk_.node->size_bytes(), '\0');
    ASSERT_GE(model_.size(), size);
    LearnFrom(0);
    CompareWhole();
  }

  void Make(uint64_t size) {
    std::string options = "size=" + std::to_string(size) + kind_.options;
    trace = options + "\n";
    if (kind_.peers) {
      ASSERT_EQ(disk_.Create(path_, options, format_), "");
      return;
    }
    constexpr uint64_t kHeaderBytes = 1 << 20;
    std::string format =
        "cryptsetup -q luksFormat --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000"
        " --luks2-metadata-size 16k --luks2-keyslots-size 256k --offset " +
        std::to_string(kHeaderBytes / 512);
    CommandResult made =
        RunCommand(kCryptsetup + std::string("truncate -s ") + std::to_string(kHeaderBytes + size) +
                   " " + path_ + " && printf " + kSecret + " | " + format + " " + kind_.options +
                   " " + path_ + " -");
    ASSERT_EQ(made.status, 0) << made.output;
  }

  void Step() override {
    switch (Below(16)) {
      case 0:
      case 1:
      case 2:
      case 3:
        return Write();
      case 4:
      case 5:
      case 6:
        return ReadSome();
      case 7:
      case 8:
        return Zeroes();
      case 9:
        return Discard();
      case 10:
        return FlushIt();
      case 11:
        return Reopen();
      case 12:
        return CheckAll();
      case 13:
        return Resize();
      default:
        return Together();
    }
  }

  void Resize() {
    if (!kind_.resizes) return;
    uint64_t size = Below(2 * kMiB / kind_.granularity) * kind_.granularity;
    trace += "resize " + std::to_string(size) + "\n";
    ASSERT_EQ(disk_.Resize(size, OneIn(2) ? Preallocation::kOff : Preallocation::kFull), "");
    const uint64_t known = std::min<uint64_t>(size, model_.size());
    model_.resize(size, '\0');
    ASSERT_EQ(disk_.node->size_bytes(), size);
    LearnFrom(known);
    CompareWhole();
  }

  // What is new at `offset` and behind it.
  void LearnFrom(uint64_t offset) {
    if (!kind_.scrambled || offset == model_.size()) return;
    uint64_t length = model_.size() - offset;
    model_.replace(offset, length, disk_.Read(offset, length));
  }

  void CheckByPeer() override {
    if (!kind_.peers) return;
    if (kind_.peer_checks) {
      CommandResult check =
          RunCommand("qemu-img check -f " + std::string(kind_.peers) + " " + path_);
      EXPECT_EQ(check.status, 0) << check.output;
    }
    if (*kind_.opens == '\0') return CompareByPeer();
    CompareByPeer(std::string(" --object secret,id=key,data=") + kSecret,
                  " driver=" + format_ + "," + kind_.opens + ",file.filename=" + path_);
  }

  const Kind& kind_;
};

class FormatModel : public testing::TestWithParam<Kind> {};

TEST_P(FormatModel, RandomOperationsLeaveWhatTheyShould) {
  if (!GetParam().peers &&
      RunCommand(kCryptsetup + std::string("command -v cryptsetup")).status != 0)
    GTEST_SKIP() << "cryptsetup (package cryptsetup-bin) is not installed";
  RunModels<FormatRun>(3, &GetParam());
}

INSTANTIATE_TEST_SUITE_P(Formats, FormatModel, testing::ValuesIn(kKinds),
                         [](const auto& param) { return param.param.name; });

}  // namespace
}  // namespace kvartz::block
