// Boot protocols: Documentation/arch/x86/boot.rst (Linux), docs/misc/pvh.pandoc (Xen), multiboot
// 0.6.96; ELF by the System V ABI.
#include "machine/loader/kernel.h"

#include <elf.h>
#include <gtest/gtest.h>

#include <cstring>

#include "machine/temp_file.h"

namespace kvartz::machine {
namespace {

using test::MultibootImage;
using test::TempFile;

constexpr uint64_t kRam = 64 << 20;

struct LoaderTest : testing::Test {
  LoaderTest() : memory("memory", 1ull << 40), ram(*RamBlock::Create("ram", kRam)) {
    Region region;
    region.name = "ram";
    region.kind = RegionKind::kRam;
    region.size = kRam;
    region.ram = ram;
    memory.Add(region);
  }
  BootSpace Space(const std::string& cmdline = "console=ttyS0", uint64_t ram_end = kRam) {
    return {memory,
            ram_end,
            {{0, 0x9fc00, E820Entry::kRam}, {0x100000, ram_end - 0x100000, E820Entry::kRam}},
            0xe0000,
            cmdline};
  }
  template <typename T>
  T At(uint64_t address) {
    T value;
    std::memcpy(&value, ram->host() + address, sizeof value);
    return value;
  }
  std::string TextAt(uint64_t address) {
    return reinterpret_cast<const char*>(ram->host() + address);
  }
  static std::string ErrorOf(const std::vector<uint8_t>& image) {
    TempFile file(image);
    auto kernel = Kernel::OpenPath(file.path());
    return kernel ? "no error" : kernel.error().what;
  }

  AddressSpace memory;
  std::shared_ptr<RamBlock> ram;
};

template <typename T>
void Put(std::vector<uint8_t>& image, size_t offset, T value) {
  std::memcpy(&image[offset], &value, sizeof value);
}

// A bzImage of protocol 2.15 with a 64-bit entry: 4 setup sectors, 64 KiB of payload.
std::vector<uint8_t> BzImage() {
  std::vector<uint8_t> image(5 * 512 + 65536);
  image[0x1f1] = 4;
  Put<uint32_t>(image, 0x1f4, 65536 / 16);
  Put<uint16_t>(image, 0x1fe, 0xaa55);
  image[0x200] = 0xeb, image[0x201] = 0x6a;
  std::memcpy(&image[0x202], "HdrS", 4);
  Put<uint16_t>(image, 0x206, 0x20f);
  image[0x211] = 1;
  Put<uint32_t>(image, 0x214, 0x100000);
  Put<uint32_t>(image, 0x22c, 0x7fffffff);
  Put<uint32_t>(image, 0x230, 0x200000);
  image[0x234] = 1;
  Put<uint16_t>(image, 0x236, 1);
  Put<uint32_t>(image, 0x238, 2047);
  Put<uint64_t>(image, 0x258, 0x1000000);
  Put<uint32_t>(image, 0x260, 0x800000);
  for (size_t i = 5 * 512; i < image.size(); i++) image[i] = i;
  return image;
}

TEST_F(LoaderTest, BzImageBy64BitProtocol) {
  TempFile file(BzImage()), initrd(std::vector<uint8_t>(10000, 0x77));
  auto kernel = Kernel::OpenPath(file.path());
  ASSERT_TRUE(kernel) << kernel.error().what;
  ASSERT_TRUE((*kernel)->OpenInitrd(initrd.path()));
  BootSpace space = Space();
  auto entry = (*kernel)->Load(space);
  ASSERT_TRUE(entry) << entry.error().what;
  EXPECT_EQ(entry->mode, CpuEntry::Mode::kLong64);
  EXPECT_EQ(entry->rip, 0x1000200u);
  EXPECT_EQ(At<uint8_t>(0x1000000 + 5), static_cast<uint8_t>(5 * 512 + 5));
  uint64_t params = entry->rsi;
  EXPECT_EQ(At<uint32_t>(params + 0x202), 0x53726448u);
  EXPECT_EQ(At<uint8_t>(params + 0x210), 0xff);
  EXPECT_EQ(TextAt(At<uint32_t>(params + 0x228)), "console=ttyS0");
  EXPECT_EQ(At<uint64_t>(params + 0x70), 0xe0000u);
  EXPECT_EQ(At<uint8_t>(params + 0x1e8), 2);
  EXPECT_EQ(At<uint64_t>(params + 0x2d0 + 20), 0x100000u);
  uint32_t initrd_base = At<uint32_t>(params + 0x218);
  EXPECT_EQ(At<uint32_t>(params + 0x21c), 10000u);
  EXPECT_EQ(initrd_base % 4096, 0u);
  EXPECT_GE(initrd_base, 0x1800000u);
  EXPECT_EQ(At<uint8_t>(initrd_base + 9999), 0x77);
  // One to one page tables.
  uint64_t pdpt = At<uint64_t>(entry->page_tables) & ~0xfffull;
  uint64_t directory = At<uint64_t>(pdpt + 24) & ~0xfffull;
  EXPECT_EQ(At<uint64_t>(directory + 8), 0xc0200083u);
}

TEST_F(LoaderTest, OldBzImageBy32BitProtocol) {
  std::vector<uint8_t> image = BzImage();
  Put<uint16_t>(image, 0x206, 0x204);
  TempFile file(image);
  BootSpace space = Space();
  auto entry = (*Kernel::OpenPath(file.path()))->Load(space);
  ASSERT_TRUE(entry);
  EXPECT_EQ(entry->mode, CpuEntry::Mode::kProtected32);
  EXPECT_EQ(entry->rip, 0x100000u);
}

TEST_F(LoaderTest, BzImageRefusals) {
  std::vector<uint8_t> image = BzImage();
  std::vector<uint8_t> cut(image.begin(), image.end() - 100);
  std::string text = ErrorOf(cut);
  EXPECT_NE(text.find("truncated"), std::string::npos) << text;
  EXPECT_NE(text.find(std::to_string(cut.size())), std::string::npos) << text;
  EXPECT_NE(ErrorOf({image.begin(), image.begin() + 0x220}).find("truncated"), std::string::npos);
  // Its size is given in paragraphs of 16 bytes: the last one need not be whole.
  TempFile almost({image.begin(), image.end() - 15});
  EXPECT_TRUE(Kernel::OpenPath(almost.path()));
  EXPECT_NE(ErrorOf({image.begin(), image.end() - 16}).find("truncated"), std::string::npos);
  EXPECT_NE(ErrorOf(std::vector<uint8_t>(4096, 'x')).find("not a kernel"), std::string::npos);
  EXPECT_NE(ErrorOf({}).find("empty"), std::string::npos);
  EXPECT_NE(Kernel::OpenPath("/tmp").error().what.find("not a regular file"), std::string::npos);

  TempFile file(image);
  auto kernel = Kernel::OpenPath(file.path());
  BootSpace small = Space("", 16 << 20);
  auto entry = (*kernel)->Load(small);
  ASSERT_FALSE(entry);
  EXPECT_NE(entry.error().what.find("needs at least 24 MiB"), std::string::npos)
      << entry.error().what;
  BootSpace wordy = Space(std::string(3000, 'a'));
  entry = (*kernel)->Load(wordy);
  ASSERT_FALSE(entry);
  EXPECT_NE(entry.error().what.find("2047"), std::string::npos) << entry.error().what;
}

// An ELF64 file with one segment at `address` and, if asked for, the PVH note.
std::vector<uint8_t> Elf64(uint64_t address, bool pvh) {
  struct {
    Elf64_Ehdr header{};
    Elf64_Phdr load{}, note{};
    Elf64_Nhdr note_header{4, 4, 18};
    char name[4] = {'X', 'e', 'n', 0};
    uint32_t entry = 0;
    uint8_t code[16] = {0xf4, 0xeb, 0xfd};
  } file;
  std::memcpy(file.header.e_ident,
              "\x7f"
              "ELF\2\1\1",
              7);
  file.header.e_type = ET_EXEC;
  file.header.e_machine = EM_X86_64;
  file.header.e_entry = 0xffffffff81000000 + 4;
  file.header.e_phoff = sizeof(Elf64_Ehdr);
  file.header.e_phentsize = sizeof(Elf64_Phdr);
  file.header.e_phnum = pvh ? 2 : 1;
  file.entry = address;
  file.load = {PT_LOAD,
               PF_R | PF_X,
               offsetof(decltype(file), code),
               0xffffffff81000000,
               address,
               sizeof file.code,
               8192,
               4096};
  file.note = {PT_NOTE, PF_R, offsetof(decltype(file), note_header), 0, 0, 20, 20, 4};
  const auto* bytes = reinterpret_cast<const uint8_t*>(&file);
  return {bytes, bytes + sizeof file};
}

TEST_F(LoaderTest, PvhStartInfo) {
  TempFile file(Elf64(0x1000000, true)), initrd(std::vector<uint8_t>(5000, 0x66));
  ram->host()[0x1000000 + 100] = 0xaa;
  auto kernel = Kernel::OpenPath(file.path());
  ASSERT_TRUE(kernel) << kernel.error().what;
  ASSERT_TRUE((*kernel)->OpenInitrd(initrd.path()));
  BootSpace space = Space();
  auto entry = (*kernel)->Load(space);
  ASSERT_TRUE(entry) << entry.error().what;
  EXPECT_EQ(entry->mode, CpuEntry::Mode::kProtected32);
  EXPECT_EQ(entry->rip, 0x1000000u);
  EXPECT_EQ(At<uint8_t>(0x1000000), 0xf4);
  EXPECT_EQ(At<uint8_t>(0x1000000 + 100), 0) << "bss";
  EXPECT_EQ(At<uint32_t>(entry->rbx), 0x336ec578u);
  EXPECT_EQ(At<uint32_t>(entry->rbx + 4), 1u);
  EXPECT_EQ(At<uint32_t>(entry->rbx + 12), 1u);
  uint64_t module = At<uint64_t>(entry->rbx + 16);
  EXPECT_EQ(At<uint8_t>(At<uint64_t>(module)), 0x66);
  EXPECT_EQ(At<uint64_t>(module + 8), 5000u);
  EXPECT_EQ(TextAt(At<uint64_t>(entry->rbx + 24)), "console=ttyS0");
  EXPECT_EQ(At<uint64_t>(entry->rbx + 32), 0xe0000u);
  uint64_t map = At<uint64_t>(entry->rbx + 40);
  EXPECT_EQ(At<uint32_t>(entry->rbx + 48), 2u);
  EXPECT_EQ(At<uint64_t>(map + 24), 0x100000u);
  EXPECT_EQ(At<uint32_t>(map + 24 + 16), 1u);
}

TEST_F(LoaderTest, VmlinuxWithoutNoteBy64BitProtocol) {
  TempFile file(Elf64(0x1000000, false));
  BootSpace space = Space();
  auto entry = (*Kernel::OpenPath(file.path()))->Load(space);
  ASSERT_TRUE(entry);
  EXPECT_EQ(entry->mode, CpuEntry::Mode::kLong64);
  EXPECT_EQ(entry->rip, 0x1000004u) << "the entry's virtual address, translated";
  EXPECT_EQ(At<uint32_t>(entry->rsi + 0x202), 0x53726448u);
}

TEST_F(LoaderTest, ElfRefusals) {
  std::vector<uint8_t> image = Elf64(0x1000000, true);
  EXPECT_NE(ErrorOf({image.begin(), image.end() - 8}).find("truncated"), std::string::npos);
  std::vector<uint8_t> other = image;
  other[18] = EM_AARCH64;
  EXPECT_NE(ErrorOf(other).find("another processor"), std::string::npos);
  TempFile high(Elf64(0x10000000, true)), low(Elf64(0x8000, true));
  BootSpace space = Space();
  auto entry = (*Kernel::OpenPath(high.path()))->Load(space);
  ASSERT_FALSE(entry);
  EXPECT_NE(entry.error().what.find("257 MiB"), std::string::npos) << entry.error().what;
  entry = (*Kernel::OpenPath(low.path()))->Load(space);
  ASSERT_FALSE(entry);
  EXPECT_NE(entry.error().what.find("below 1 MiB"), std::string::npos) << entry.error().what;
}

TEST_F(LoaderTest, MultibootWithModules) {
  TempFile file(MultibootImage({0xf4})), one({1, 2, 3}), two({4});
  auto kernel = Kernel::OpenPath(file.path());
  ASSERT_TRUE(kernel) << kernel.error().what;
  ASSERT_TRUE((*kernel)->OpenInitrd(one.path() + " first,,arg," + two.path()));
  BootSpace space = Space("-v");
  auto entry = (*kernel)->Load(space);
  ASSERT_TRUE(entry) << entry.error().what;
  EXPECT_EQ(entry->rax, 0x2badb002u);
  EXPECT_EQ(entry->rip, 0x100020u);
  EXPECT_EQ(At<uint8_t>(0x100020), 0xf4);
  uint64_t info = entry->rbx;
  EXPECT_EQ(At<uint32_t>(info) & 0x4d, 0x4du);
  EXPECT_EQ(At<uint32_t>(info + 8), (kRam - 0x100000) / 1024);
  EXPECT_EQ(TextAt(At<uint32_t>(info + 16)), file.path() + " -v");
  ASSERT_EQ(At<uint32_t>(info + 20), 2u);
  uint32_t modules = At<uint32_t>(info + 24);
  EXPECT_EQ(At<uint32_t>(modules + 4) - At<uint32_t>(modules), 3u);
  EXPECT_EQ(At<uint8_t>(At<uint32_t>(modules) + 2), 3);
  EXPECT_EQ(TextAt(At<uint32_t>(modules + 8)), one.path() + " first,arg");
  EXPECT_EQ(At<uint32_t>(modules + 16) % 4096, 0u);
  EXPECT_EQ(At<uint32_t>(info + 44), 48u);
  EXPECT_EQ(At<uint32_t>(At<uint32_t>(info + 48)), 20u);
}

TEST_F(LoaderTest, EntryRegisters) {
  cpu::X86State state;
  CpuEntry entry{CpuEntry::Mode::kLong64, 0x1000200, 0, 0, 0x7000, 0x500, 0x9000};
  ApplyEntry(entry, &state);
  EXPECT_EQ(state.rip, 0x1000200u);
  EXPECT_EQ(state.gpr[cpu::kRsi], 0x7000u);
  EXPECT_EQ(state.cr3, 0x9000u);
  EXPECT_EQ(state.efer, 0x500u);
  EXPECT_EQ(state.seg[cpu::kCs].selector, 0x10);
  EXPECT_EQ(state.seg[cpu::kDs].selector, 0x18);
  EXPECT_TRUE(state.seg[cpu::kCs].attributes & cpu::Segment::kL);
  EXPECT_FALSE(state.rflags & 0x200);
}

}  // namespace
}  // namespace kvartz::machine
