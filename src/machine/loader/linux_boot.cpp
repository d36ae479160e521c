// Linux bzImage by the 64-bit or 32-bit boot protocol. Documentation/arch/x86/boot.rst of the Linux
// sources, protocol 2.15.
#include <algorithm>
#include <cstring>

#include "base/endian.h"
#include "machine/loader/initrd_check.h"
#include "machine/loader/kernel.h"

namespace kvartz::machine {

namespace {
// Offsets in the image, and as well in the boot parameters.
constexpr unsigned kSetupSects = 0x1f1, kSysSize = 0x1f4, kBootFlag = 0x1fe, kHeaderEnd = 0x201,
                   kHeader = 0x202, kVersion = 0x206, kTypeOfLoader = 0x210, kLoadFlags = 0x211,
                   kCode32Start = 0x214, kRamdiskImage = 0x218, kRamdiskSize = 0x21c,
                   kCmdLinePtr = 0x228, kInitrdAddrMax = 0x22c, kAlignment = 0x230,
                   kXLoadFlags = 0x236, kCmdlineSize = 0x238, kSetupData = 0x250,
                   kPrefAddress = 0x258, kInitSize = 0x260;
// Boot parameters only.
constexpr unsigned kAcpiRsdp = 0x070, kE820Count = 0x1e8, kE820Table = 0x2d0, kE820Max = 128,
                   kParamsSize = 4096;
constexpr uint8_t kLoadedHigh = 1 << 0, kKeepSegments = 1 << 6;
constexpr uint16_t kXlf64 = 1 << 0;
constexpr uint8_t kUndefinedLoader = 0xff;
constexpr uint64_t kDefaultLoad = 0x100000;
constexpr uint32_t kDefaultInitrdMax = 0x37ffffff;

template <typename T>
T Get(const std::vector<uint8_t>& bytes, unsigned offset) {
  EndianInt<T, std::endian::little> value(0);
  if (offset + sizeof(T) <= bytes.size()) std::memcpy(&value, &bytes[offset], sizeof(T));
  return value;
}
template <typename T>
void Put(std::vector<uint8_t>& bytes, unsigned offset, T value) {
  EndianInt<T, std::endian::little> wire(value);
  std::memcpy(&bytes[offset], &wire, sizeof(T));
}

class BzImage final : public Kernel {
 public:
  explicit BzImage(BootFile file) : file_(std::move(file)) {}
  Result<> Parse();
  const char* kind() const override { return "Linux bzImage"; }
  Result<> OpenInitrd(const std::string& initrd) override;
  Result<CpuEntry> Load(BootSpace& space) override;

 private:
  BootFile file_, initrd_;
  std::vector<uint8_t> head_;  // boot sector and setup header
  uint64_t payload_offset_ = 0, payload_size_ = 0;
  uint16_t version_ = 0;
  bool entry64_ = false;
};

Result<> BzImage::Parse() {
  head_ = TRY(file_.ReadSome(0, 0x290));
  if (head_.size() < 0x290)
    return file_.Bad("is truncated within its setup header; copy or download it again");
  version_ = Get<uint16_t>(head_, kVersion);
  if (Get<uint16_t>(head_, kBootFlag) != 0xaa55 || version_ < 0x200)
    return file_.Bad("has a damaged setup header; copy or download it again");
  if (!(head_[kLoadFlags] & kLoadedHigh))
    return file_.Bad("is a zImage, which is not supported; build a bzImage",
                     ErrorCode::kUnsupported);
  unsigned setup_sects = head_[kSetupSects] ? head_[kSetupSects] : 4;
  payload_offset_ = (setup_sects + 1) * 512;
  uint64_t paragraphs =
      version_ >= 0x204 ? Get<uint32_t>(head_, kSysSize) : Get<uint16_t>(head_, kSysSize);
  uint64_t said = payload_offset_ + paragraphs * 16;
  // The last paragraph need not be whole (memtest86+).
  if (said > file_.size() + 15) {
    return file_.Bad("is truncated: its header says " + std::to_string(said) + " bytes, it has " +
                     std::to_string(file_.size()) + "; copy or download it again");
  }
  payload_size_ = file_.size() - payload_offset_;
  if (paragraphs) payload_size_ = std::min(payload_size_, paragraphs * 16);
  if (payload_size_ == 0)
    return file_.Bad("holds no kernel behind its setup code; copy or download it again");
  entry64_ =
      version_ >= 0x20c && (Get<uint16_t>(head_, kXLoadFlags) & kXlf64) && payload_size_ > 0x200;
  return {};
}

Result<> BzImage::OpenInitrd(const std::string& initrd) {
  initrd_ = TRY(BootFile::Open("initrd", initrd));
  return CheckInitrd(initrd_);
}

Result<CpuEntry> BzImage::Load(BootSpace& space) {
  unsigned longest = version_ >= 0x206 ? Get<uint32_t>(head_, kCmdlineSize) : 255;
  if (space.cmdline.size() > longest) {
    return Fail(ErrorCode::kInvalid, "the kernel's command line has " +
                                         std::to_string(space.cmdline.size()) +
                                         " characters, this kernel takes " +
                                         std::to_string(longest) + "; shorten -append");
  }
  // The kernel unpacks itself in place; init_size covers all that it touches before it knows the
  // memory map.
  uint64_t load = kDefaultLoad, room = payload_size_;
  if (version_ >= 0x20a) {
    uint64_t preferred = Get<uint64_t>(head_, kPrefAddress);
    room = std::max<uint64_t>(room, Get<uint32_t>(head_, kInitSize));
    // Where it runs in any case: a kernel that is loaded lower moves itself up there.
    if (preferred >= kDefaultLoad && preferred <= UINT32_MAX) load = preferred;
  }
  uint64_t initrd_room = (initrd_.size() + 0xfff) & ~0xfffull;
  if (load + room + initrd_room > space.ram_end)
    return file_.Bad(NeedsMemory(load + room + initrd_room, space.ram_end), ErrorCode::kNoSpace);

  LinuxParams params;
  params.setup_header.assign(head_.begin() + kSetupSects,
                             head_.begin() + std::min<unsigned>(0x202 + head_[kHeaderEnd], 0x290));
  if (initrd_) {
    uint64_t max = version_ >= 0x203 ? Get<uint32_t>(head_, kInitrdAddrMax) : kDefaultInitrdMax;
    uint64_t limit = std::min(space.ram_end, max + 1);
    params.initrd_size = initrd_.size();
    params.initrd_base = PlaceHigh(load + room, limit, initrd_.size());
    if (!params.initrd_base)
      return initrd_.Bad("does not fit between the kernel and the highest address that it takes (" +
                             std::to_string(max) + ")",
                         ErrorCode::kNoSpace);
    TRY(LoadRange(space.memory, params.initrd_base, initrd_, 0, initrd_.size()));
  }
  TRY(LoadRange(space.memory, load, file_, payload_offset_, payload_size_));

  LowArea low(space);
  CpuEntry entry;
  entry.rsi = TRY(PutLinuxParams(low, space, params));
  entry.mode = entry64_ ? CpuEntry::Mode::kLong64 : CpuEntry::Mode::kProtected32;
  entry.rip = entry64_ ? load + 0x200 : load;
  TRY(PrepareEntry(low, &entry));
  return entry;
}
}  // namespace

Result<uint64_t> PutLinuxParams(LowArea& low, const BootSpace& space, const LinuxParams& params) {
  std::vector<uint8_t> page(kParamsSize);
  if (params.setup_header.empty()) {
    Put<uint16_t>(page, kBootFlag, 0xaa55);
    std::memcpy(&page[kHeader], "HdrS", 4);
    Put<uint16_t>(page, kVersion, 0x20f);
    page[kLoadFlags] = kLoadedHigh;
    Put<uint32_t>(page, kAlignment, 0x200000);
  } else {
    std::copy(params.setup_header.begin(), params.setup_header.end(), page.begin() + kSetupSects);
  }
  page[kTypeOfLoader] = kUndefinedLoader;
  page[kLoadFlags] &= ~kKeepSegments;
  Put<uint32_t>(page, kCode32Start, kDefaultLoad);
  Put<uint32_t>(page, kRamdiskImage, params.initrd_base);
  Put<uint32_t>(page, kRamdiskSize, params.initrd_size);
  Put<uint64_t>(page, kSetupData, 0);
  Put<uint32_t>(page, kCmdLinePtr, TRY(low.PutString(space.cmdline)));
  Put<uint64_t>(page, kAcpiRsdp, space.rsdp);
  unsigned count = std::min<size_t>(space.e820.size(), kE820Max);
  page[kE820Count] = count;
  for (unsigned i = 0; i < count; i++) {
    Put<uint64_t>(page, kE820Table + 20 * i, space.e820[i].base);
    Put<uint64_t>(page, kE820Table + 20 * i + 8, space.e820[i].size);
    Put<uint32_t>(page, kE820Table + 20 * i + 16, space.e820[i].type);
  }
  return low.Put(page.data(), page.size(), 0x1000);
}

Result<std::unique_ptr<Kernel>> OpenBzImage(BootFile file) {
  auto kernel = std::make_unique<BzImage>(std::move(file));
  TRY(kernel->Parse());
  return kernel;
}

}  // namespace kvartz::machine
