// Memory: chains of pointers, copies, string instructions, atomic operations.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "bench.h"

#define HOPS 200000
static char *chain;
static size_t chain_position;

static int setup_chain(size_t size) {
  size_t count = size / 64;
  uint32_t *order = malloc(count * sizeof *order);
  chain = map_small_pages(size);
  if (!chain || !order) return SETUP_FAILED;
  seed(1);
  for (size_t i = 0; i < count; i++) order[i] = i;
  for (size_t i = count - 1; i > 0; i--) {  // Sattolo's shuffle: one cycle through all of them
    size_t j = ((uint64_t)random_u32() * i) >> 32;
    uint32_t swapped = order[i];
    order[i] = order[j];
    order[j] = swapped;
  }
  for (size_t i = 0; i < count; i++) *(void **)(chain + 64 * i) = chain + 64 * (size_t)order[i];
  free(order);
  return SETUP_OK;
}
static int setup_chain_64m(void) { return setup_chain(64 << 20); }
static int setup_chain_16k(void) { return setup_chain(16 << 10); }
static uint64_t run_chain(void) {
  void **p = (void **)(chain + chain_position);
  for (int i = 0; i < HOPS; i++) p = *p;
  chain_position = (char *)p - chain;
  return chain_position + 1;
}

#define MIB16 (16 << 20)
static uint8_t *source, *target;
static int setup_copy(void) {
  source = map_small_pages(33 << 20);
  if (!source) return SETUP_FAILED;
  target =
      source + MIB16 +
      37 * 4096;  // not a power of two apart: they share no entry of a direct-mapped software TLB
  memset(source, 0x5a, MIB16);
  memset(target, 1, MIB16);
  return SETUP_OK;
}
static int setup_copy_aliased(void) {
  source = map_small_pages(33 << 20);
  if (!source) return SETUP_FAILED;
  target = source + MIB16;  // each of its pages shares an entry with one of the source
  memset(source, 0x5a, 2 * MIB16);
  return SETUP_OK;
}

static void *(*volatile memcpy_pointer)(void *, const void *, size_t) = memcpy;
static uint64_t run_memcpy(void) {
  memcpy_pointer(target, source, MIB16);
  return target[12345];
}
static uint64_t run_memcpy_small(void) {  // 8 to 263 bytes
  uint64_t total = 0;
  for (int i = 0; i < 20000; i++) {
    size_t size = 8 + ((i * 37) & 255);
    memcpy_pointer(target + (i & 1023), source + ((i * 7) & 1023), size);
    total += size;
  }
  return total + target[100];
}

static void rep_movsb(void *to, const void *from, size_t size) {
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size)::"memory");
}
static uint64_t run_movsb(void) {
  for (int i = 0; i < 64; i++) rep_movsb(target + i * 65536, source + i * 65536, 65536);
  return target[777];
}
static uint64_t run_movsb_aliased(void) {
  rep_movsb(target, source, 65536);
  return target[777];
}
static uint64_t run_stosq(void) {  // what Linux's clear_page does
  for (int i = 0; i < 1024; i++) {
    void *to = target + i * 4096;
    size_t count = 512;
    __asm__ volatile("rep stosq" : "+D"(to), "+c"(count) : "a"(0x0101010101010101ull) : "memory");
  }
  return target[4095];
}

#define STRINGS 65536
static char strings[STRINGS];
static int setup_strings(void) {
  memset(strings, 'x', STRINGS);
  seed(3);
  for (size_t end = 4 + (random_u32() >> 24); end < STRINGS; end += 4 + (random_u32() >> 24))
    strings[end] = 0;
  strings[STRINGS - 1] = 0;
  return SETUP_OK;
}
static size_t (*volatile strlen_pointer)(const char *) = strlen;
static uint64_t run_strlen(void) {
  uint64_t hash = 0;
  for (int k = 0; k < 40; k++)
    for (size_t at = 0; at < STRINGS - 1;) {
      size_t length = strlen_pointer(strings + at);
      hash = hash * 3 + length;
      at += length + 1;
    }
  return hash;
}

static uint64_t counter;
static uint64_t run_atomic(void) {
  for (int i = 0; i < 200000; i++) {
    __atomic_fetch_add(&counter, 3, __ATOMIC_SEQ_CST);
    uint64_t expected = counter;
    __atomic_compare_exchange_n(&counter, &expected, expected + 1, 0, __ATOMIC_SEQ_CST,
                                __ATOMIC_SEQ_CST);
  }
  return counter % 800000 == 0;
}

const struct workload memory_workloads[] = {
    {.name = "ptr_16k",
     .unit = "Mhop/s",
     .work = HOPS / 1e6,
     .setup = setup_chain_16k,
     .run = run_chain,
     .varies = 1},
    {.name = "ptr_64m",
     .unit = "Mhop/s",
     .work = HOPS / 1e6,
     .setup = setup_chain_64m,
     .run = run_chain,
     .varies = 1},
    {.name = "memcpy_16m",
     .unit = "MB/s",
     .work = MIB16 / 1e6,
     .setup = setup_copy,
     .run = run_memcpy},
    {.name = "memcpy_small",
     .unit = "Mcopy/s",
     .work = 0.02,
     .setup = setup_copy,
     .run = run_memcpy_small},
    {.name = "rep_movsb",
     .unit = "MB/s",
     .work = 64 * 65536 / 1e6,
     .setup = setup_copy,
     .run = run_movsb},
    {.name = "rep_stosq_4k",
     .unit = "MB/s",
     .work = 1024 * 4096 / 1e6,
     .setup = setup_copy,
     .run = run_stosq},
    {.name = "movsb_alias",
     .unit = "MB/s",
     .work = 65536 / 1e6,
     .setup = setup_copy_aliased,
     .run = run_movsb_aliased},
    {.name = "strlen",
     .unit = "MB/s",
     .work = 40 * 65535 / 1e6,
     .setup = setup_strings,
     .run = run_strlen},
    {.name = "atomic", .unit = "Mop/s", .work = 0.4, .run = run_atomic},
    {0}};
