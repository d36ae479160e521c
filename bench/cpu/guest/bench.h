// The guest-speed benchmark: what the groups of workloads share.
#ifndef BENCH_H
#define BENCH_H

#include <stddef.h>
#include <stdint.h>

#define NOINLINE __attribute__((noinline))

enum { SETUP_OK = 0, SETUP_FAILED = -1, SETUP_UNAVAILABLE = 1 };

// A workload runs in a forked child of its own: setup(), one run() to warm up, then run() again and
// again for the time asked. Each run() is one unit of work and returns a checksum of what it
// computed; all units must return the same, never 0.
struct workload {
  const char *name, *unit;
  double work;         // of one run(), in the unit (a rate: per second)
  int (*setup)(void);  // may be NULL
  uint64_t (*run)(void);
  void (*finish)(void);      // may be NULL
  double (*measured)(void);  // what is reported instead of a rate, or NULL
  int varies;  // run() goes on where it stopped: the checksum is not the same each time
};

// Each ends with a row without a name.
extern const struct workload integer_workloads[], memory_workloads[], vector_workloads[],
    kernel_workloads[], library_workloads[], code_workloads[], disk_workloads[], thread_workloads[];

extern const char *disk_path;
extern int is_native;  // a process of the host, not the first process of a guest

double now(void);  // seconds of CLOCK_MONOTONIC

// This program under the name EXIT_AT_ONCE does nothing but exit with EXIT_AT_ONCE_CODE.
#define EXIT_AT_ONCE "exit-at-once"
#define EXIT_AT_ONCE_CODE 42

// The same numbers everywhere: a linear congruential generator, and the FNV-1a hash of a buffer.
void seed(uint32_t value);
uint32_t random_u32(void);
uint64_t fnv1a(const void *data, size_t size);

// Memory without huge pages; NULL when there is none.
void *map_small_pages(size_t size);

// Fills and sorts SORT_COUNT numbers. Returns a checksum, 0 when they are not sorted.
#define SORT_COUNT 65536
uint64_t sort_numbers(int *numbers);

#endif
