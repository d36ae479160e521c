// A load for a disk that finds out whether it keeps what it is given: random writes, zeroes,
// discards and reads past the page cache, each block stamped with its number and how often it was
// written.
//
//   diskload DEVICE [COUNT]    COUNT operations, or until a line comes on standard input; then
//   every block is read
//
// Prints "load: N operations" now and then, and at the end "load: verified ..." or "load: FAILED
// ..." (exit status 1).
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdint>
#include <vector>

namespace {

constexpr uint64_t kBlock = 4096, kRunMax = 16;
constexpr uint32_t kUnknown = 0, kZero = 1;  // what a block holds, else its generation

int fd;
uint64_t blocks;
std::vector<uint32_t> content;
uint64_t* buffer;
uint32_t generation = kZero;
uint64_t seed = 88172645463325252u;

uint64_t Random(uint64_t below) {  // xorshift64
  seed ^= seed << 13;
  seed ^= seed >> 7;
  seed ^= seed << 17;
  return seed % below;
}

[[noreturn]] void Fail(const char* what, uint64_t block) {
  printf("load: FAILED to %s at block %llu: %m\n", what, static_cast<unsigned long long>(block));
  exit(1);
}

uint64_t Stamp(uint64_t block, uint32_t held, uint64_t word) {
  return held == kZero ? 0 : (block << 32 | held) * 0x9e3779b97f4a7c15 + word;
}

void Write(uint64_t first, uint64_t count) {
  uint32_t held = ++generation;
  for (uint64_t i = 0; i < count; i++) {
    for (uint64_t word = 0; word < kBlock / 8; word++)
      buffer[i * kBlock / 8 + word] = Stamp(first + i, held, word);
  }
  if (pwrite(fd, buffer, count * kBlock, first * kBlock) != static_cast<ssize_t>(count * kBlock))
    Fail("write", first);
  for (uint64_t i = 0; i < count; i++) content[first + i] = held;
}

void Verify(uint64_t first, uint64_t count) {
  if (pread(fd, buffer, count * kBlock, first * kBlock) != static_cast<ssize_t>(count * kBlock))
    Fail("read", first);
  for (uint64_t i = 0; i < count; i++) {
    uint32_t held = content[first + i];
    for (uint64_t word = 0; held != kUnknown && word < kBlock / 8; word++) {
      if (buffer[i * kBlock / 8 + word] == Stamp(first + i, held, word)) continue;
      printf("load: FAILED: block %llu holds %016llx, not generation %u\n",
             static_cast<unsigned long long>(first + i),
             static_cast<unsigned long long>(buffer[i * kBlock / 8 + word]), held);
      exit(1);
    }
  }
}

void Range(unsigned long request, const char* what, uint32_t held, uint64_t first, uint64_t count) {
  uint64_t range[2] = {first * kBlock, count * kBlock};
  if (ioctl(fd, request, range) < 0) Fail(what, first);
  for (uint64_t i = 0; i < count; i++) content[first + i] = held;
}

void Operate() {
  uint64_t count = 1 + Random(kRunMax), first = Random(blocks - count + 1), which = Random(100);
  if (which < 65) {
    Write(first, count);
  } else if (which < 88) {
    Verify(first, count);
  } else if (which < 94) {
    Range(BLKZEROOUT, "zero", kZero, first, count);
  } else if (which < 97) {
    Range(BLKDISCARD, "discard", kUnknown, first, count);
  } else if (fsync(fd) < 0) {
    Fail("flush", 0);
  }
}

bool LineIsThere() {
  pollfd input = {0, POLLIN, 0};
  return poll(&input, 1, 0) > 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  unsigned long limit = argc > 2 ? strtoul(argv[2], nullptr, 10) : 0;
  fd = open(argv[1], O_RDWR | O_DIRECT);
  uint64_t size = 0;
  if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) < 0) Fail("open", 0);
  blocks = size / kBlock;
  content.resize(blocks);
  buffer = static_cast<uint64_t*>(aligned_alloc(kBlock, kRunMax * kBlock));
  setvbuf(stdout, nullptr, _IOLBF, 0);
  unsigned long done = 0;
  for (; limit ? done < limit : done % 16 != 0 || !LineIsThere(); done++) {
    if (done % 500 == 0) printf("load: %lu operations\n", done);
    Operate();
  }
  // What a discard left isn't defined: it may differ between copies of the disk.
  for (uint64_t block = 0; block < blocks; block++) {
    if (content[block] == kUnknown) Write(block, 1);
  }
  if (fsync(fd) < 0) Fail("flush", 0);
  for (uint64_t first = 0; first < blocks; first += kRunMax)
    Verify(first, blocks - first < kRunMax ? blocks - first : kRunMax);
  printf("load: verified after %lu operations\n", done);
}
