// Reads of a disk whose 4 KiB blocks each begin with their own number.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"

#define BLOCK 4096
#define CHUNK (1 << 20)
static int disk = -1;
static uint64_t disk_size, position;
static uint8_t *buffer;

static int setup_disk(void) {
  // Around the guest's page cache; natively through the host's, which is what the VMM reads from as
  // well.
  disk = open(disk_path, O_RDONLY | (is_native ? 0 : O_DIRECT));
  if (disk < 0) return SETUP_UNAVAILABLE;
  disk_size = lseek(disk, 0, SEEK_END);
  return posix_memalign((void **)&buffer, BLOCK, CHUNK) ? SETUP_FAILED : SETUP_OK;
}

static int holds_number(const uint8_t *block, uint64_t number) {
  uint64_t found;
  memcpy(&found, block, sizeof found);
  return found == number;
}
static uint64_t run_sequential(void) {
  for (int i = 0; i < 8; i++) {
    if (pread(disk, buffer, CHUNK, position) != CHUNK) return 0;
    for (int k = 0; k < CHUNK; k += BLOCK)
      if (!holds_number(buffer + k, (position + k) / BLOCK)) return 0;
    position += CHUNK;
    if (position + CHUNK > disk_size) position = 0;
  }
  return 1;
}
static uint64_t run_random(void) {
  for (int i = 0; i < 100; i++) {
    uint64_t number = ((uint64_t)random_u32() * (disk_size / BLOCK)) >> 32;
    if (pread(disk, buffer, BLOCK, number * BLOCK) != BLOCK || !holds_number(buffer, number))
      return 0;
  }
  return 1;
}

const struct workload disk_workloads[] = {
    {.name = "blk_seq_read",
     .unit = "MB/s",
     .work = 8 * CHUNK / 1e6,
     .setup = setup_disk,
     .run = run_sequential},
    {.name = "blk_rand4k", .unit = "IOPS", .work = 100, .setup = setup_disk, .run = run_random},
    {0}};
