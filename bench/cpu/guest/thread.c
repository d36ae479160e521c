// Two threads, on as many processors as the machine has.
#include <pthread.h>

#include "bench.h"

static int numbers[2][SORT_COUNT];
static uint64_t sums[2];

static uint64_t run_both(void *(*body)(void *)) {
  pthread_t threads[2];
  for (long i = 0; i < 2; i++)
    if (pthread_create(&threads[i], NULL, body, (void *)i)) return 0;
  for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
  return sums[0] == sums[1] ? sums[0] : 0;
}

static void *sort(void *index) {
  long i = (long)index;
  sums[i] = 0;
  for (int k = 0; k < 8; k++) sums[i] += sort_numbers(numbers[i]);
  return NULL;
}
static uint64_t run_sort(void) { return run_both(sort); }

static uint64_t counter;
static void *count(void *index) {
  for (int k = 0; k < 200000; k++) __atomic_fetch_add(&counter, 1, __ATOMIC_SEQ_CST);
  sums[(long)index] = 1;
  return NULL;
}
static uint64_t run_atomic(void) {
  counter = 0;
  return run_both(count) ? counter : 0;
}

const struct workload thread_workloads[] = {
    {.name = "mt_sort", .unit = "Melem/s", .work = 16 * SORT_COUNT / 1e6, .run = run_sort},
    {.name = "mt_atomic", .unit = "Mop/s", .work = 0.4, .run = run_atomic},
    {0}};
