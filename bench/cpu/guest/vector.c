// Floating point and vectors.
#include <immintrin.h>
#include <string.h>

#include "bench.h"

#define N 96
#define MATMUL_MFLOP (2.0 * N * N * N / 1e6)
static double a[N][N] __attribute__((aligned(64))), b[N][N] __attribute__((aligned(64))),
    product[N][N] __attribute__((aligned(64)));
static int setup_matmul(void) {
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) {
      a[i][j] = (i * 3 + j) % 17 * 0.37;
      b[i][j] = (i + j * 5) % 13 * 0.91 - 3;
    }
  return SETUP_OK;
}
static int setup_matmul_avx2(void) {
  return __builtin_cpu_supports("avx2") ? setup_matmul() : SETUP_UNAVAILABLE;
}

static uint64_t run_matmul_sse2(void) {
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j += 4) {
      __m128d low = _mm_setzero_pd(), high = _mm_setzero_pd();
      for (int k = 0; k < N; k++) {
        __m128d factor = _mm_set1_pd(a[i][k]);
        low = _mm_add_pd(low, _mm_mul_pd(factor, _mm_load_pd(&b[k][j])));
        high = _mm_add_pd(high, _mm_mul_pd(factor, _mm_load_pd(&b[k][j + 2])));
      }
      _mm_store_pd(&product[i][j], low);
      _mm_store_pd(&product[i][j + 2], high);
    }
  return fnv1a(product, sizeof product);
}
__attribute__((target("avx2"))) static uint64_t run_matmul_avx2(void) {
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j += 8) {
      __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
      for (int k = 0; k < N; k++) {
        __m256d factor = _mm256_set1_pd(a[i][k]);
        low = _mm256_add_pd(low, _mm256_mul_pd(factor, _mm256_load_pd(&b[k][j])));
        high = _mm256_add_pd(high, _mm256_mul_pd(factor, _mm256_load_pd(&b[k][j + 4])));
      }
      _mm256_store_pd(&product[i][j], low);
      _mm256_store_pd(&product[i][j + 4], high);
    }
  return fnv1a(product, sizeof product);
}

#define BYTES (1 << 18)
static uint8_t bytes[BYTES];
static int setup_bytes(void) {
  seed(7);
  for (int i = 0; i < BYTES; i++) bytes[i] = random_u32() >> 24;
  return SETUP_OK;
}
static uint64_t run_sse2_integers(
    void) {  // shifts, unpacks, multiplications, comparisons, shuffles
  __m128i sum = _mm_setzero_si128(), factor = _mm_set1_epi16(77);
  for (int i = 0; i < BYTES; i += 32) {
    __m128i x = _mm_loadu_si128((void *)(bytes + i)), y = _mm_loadu_si128((void *)(bytes + i + 16));
    __m128i low = _mm_mullo_epi16(_mm_unpacklo_epi8(x, y), factor);
    __m128i high = _mm_madd_epi16(_mm_unpackhi_epi8(x, y), factor);
    __m128i mask = _mm_cmpgt_epi8(x, y);
    sum = _mm_add_epi32(sum, _mm_xor_si128(_mm_srli_epi16(low, 3), _mm_slli_epi32(high, 2)));
    sum = _mm_add_epi8(sum, _mm_and_si128(mask, _mm_sad_epu8(x, y)));
    sum = _mm_shuffle_epi32(sum, 0x39);
  }
  return fnv1a(&sum, sizeof sum);
}

// Five bodies and their gravity, in scalar doubles.
#define BODIES 5
#define STEPS 5000
struct body {
  double at[3], speed[3], mass;
};
static struct body bodies[BODIES];

static void place_bodies(void) {
  for (int i = 0; i < BODIES; i++) {
    for (int j = 0; j < 3; j++) {
      bodies[i].at[j] = (i * 7 + j * 3) % 11 * 0.9 + i;
      bodies[i].speed[j] = (i - j) * 0.1;
    }
    bodies[i].mass = 1.0 / (i + 1);
  }
}
static void attract(struct body *p, struct body *q) {
  double dx = p->at[0] - q->at[0], dy = p->at[1] - q->at[1], dz = p->at[2] - q->at[2];
  double square = dx * dx + dy * dy + dz * dz + 0.01,
         force = 0.001 / (square * __builtin_sqrt(square));
  p->speed[0] -= dx * q->mass * force;
  p->speed[1] -= dy * q->mass * force;
  p->speed[2] -= dz * q->mass * force;
  q->speed[0] += dx * p->mass * force;
  q->speed[1] += dy * p->mass * force;
  q->speed[2] += dz * p->mass * force;
}
static uint64_t run_nbody(void) {
  place_bodies();
  for (int step = 0; step < STEPS; step++) {
    for (int i = 0; i < BODIES; i++)
      for (int j = i + 1; j < BODIES; j++) attract(&bodies[i], &bodies[j]);
    for (int i = 0; i < BODIES; i++)
      for (int j = 0; j < 3; j++) bodies[i].at[j] += 0.001 * bodies[i].speed[j];
  }
  return fnv1a(bodies, sizeof bodies);
}

static uint64_t run_x87(void) {
  long double x = 1.25L, y = 0.75L, z = 0;
  for (int i = 0; i < 50000; i++) {
    long double root;
    x = x * y + 0.3L;
    y = (x - y) / (x + 1.5L);
    __asm__("fsqrt" : "=t"(root) : "0"(x * x + y * y));  // sqrtl would look after errno
    z += root - (long double)(i & 7);
    if (z > 1000.0L) z -= 999.5L;
  }
  return fnv1a(&z, 10);
}

const struct workload vector_workloads[] = {
    {.name = "sse2_matmul",
     .unit = "MFLOP/s",
     .work = MATMUL_MFLOP,
     .setup = setup_matmul,
     .run = run_matmul_sse2},
    {.name = "avx2_matmul",
     .unit = "MFLOP/s",
     .work = MATMUL_MFLOP,
     .setup = setup_matmul_avx2,
     .run = run_matmul_avx2},
    {.name = "sse2_int",
     .unit = "MB/s",
     .work = BYTES / 1e6,
     .setup = setup_bytes,
     .run = run_sse2_integers},
    {.name = "fp_nbody", .unit = "kstep/s", .work = STEPS / 1e3, .run = run_nbody},
    {.name = "x87", .unit = "Miter/s", .work = 0.05, .run = run_x87},
    {0}};
