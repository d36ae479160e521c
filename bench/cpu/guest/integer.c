// Integer arithmetic and control flow.
#include <string.h>

#include "bench.h"

static NOINLINE void quicksort(int *a, int low, int high) {
  while (low < high) {
    int i = low, j = high, pivot = a[(low + high) >> 1];
    while (i <= j) {
      while (a[i] < pivot) i++;
      while (a[j] > pivot) j--;
      if (i <= j) {
        int swapped = a[i];
        a[i++] = a[j];
        a[j--] = swapped;
      }
    }
    if (j - low < high - i) {
      quicksort(a, low, j);
      low = i;
    } else {
      quicksort(a, i, high);
      high = j;
    }
  }
}

uint64_t sort_numbers(int *numbers) {
  uint32_t state = 4242;
  for (int i = 0; i < SORT_COUNT; i++) numbers[i] = (int)(state = state * 1664525u + 1013904223u);
  quicksort(numbers, 0, SORT_COUNT - 1);
  for (int i = 1; i < SORT_COUNT; i++)
    if (numbers[i - 1] > numbers[i]) return 0;
  uint64_t hash = 0;
  for (int i = 0; i < SORT_COUNT; i += 97) hash = hash * 31 + (uint32_t)numbers[i];
  return hash;
}

static int sorted[SORT_COUNT];
static uint64_t run_sort(void) { return sort_numbers(sorted); }

#define BYTES (1 << 20)
static uint8_t bytes[BYTES];
static int setup_bytes(void) {
  seed(7);
  for (int i = 0; i < BYTES; i++) bytes[i] = random_u32() >> 24;
  return SETUP_OK;
}

static uint32_t crc_table[256];
static int setup_crc(void) {
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t c = i;
    for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
    crc_table[i] = c;
  }
  return setup_bytes();
}

static uint64_t run_crc(void) {
  uint32_t c = ~0u;
  for (int i = 0; i < BYTES; i++) c = crc_table[(c ^ bytes[i]) & 255] ^ (c >> 8);
  return ~c;
}

// FIPS 180-4: the constants of 4.2.2, one block of 6.2.2.
static const uint32_t sha256_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
#define ROTR(x, n) (((x) >> (n)) | ((x) << (32 - (n))))

static NOINLINE void sha256_block(uint32_t *hash, const uint8_t *block) {
  uint32_t w[64];
  for (int i = 0; i < 16; i++) {
    uint32_t word;
    memcpy(&word, block + 4 * i, 4);
    w[i] = __builtin_bswap32(word);
  }
  for (int i = 16; i < 64; i++) {
    uint32_t s0 = ROTR(w[i - 15], 7) ^ ROTR(w[i - 15], 18) ^ (w[i - 15] >> 3);
    uint32_t s1 = ROTR(w[i - 2], 17) ^ ROTR(w[i - 2], 19) ^ (w[i - 2] >> 10);
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  uint32_t a = hash[0], b = hash[1], c = hash[2], d = hash[3], e = hash[4], f = hash[5],
           g = hash[6], h = hash[7];
  for (int i = 0; i < 64; i++) {
    uint32_t t1 = h + (ROTR(e, 6) ^ ROTR(e, 11) ^ ROTR(e, 25)) + ((e & f) ^ (~e & g)) +
                  sha256_constants[i] + w[i];
    uint32_t t2 = (ROTR(a, 2) ^ ROTR(a, 13) ^ ROTR(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    // clang-format off
    h = g; g = f; f = e; e = d + t1;
    d = c; c = b; b = a; a = t1 + t2;
    // clang-format on
  }
  uint32_t sums[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; i++) hash[i] += sums[i];
}

#define SHA256_BYTES (1 << 18)
static uint64_t run_sha256(void) {
  uint32_t hash[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  for (int i = 0; i < SHA256_BYTES; i += 64) sha256_block(hash, bytes + i);
  return fnv1a(hash, sizeof hash);
}

// Multiplications, divisions, shifts by a register, bit scans, wide multiplications.
static uint64_t run_muldiv(void) {
  uint64_t x = 0x123456789abcdefull, sum = 0;
  for (int i = 1; i <= 100000; i++) {
    x = x * 6364136223846793005ull + 1442695040888963407ull;
    uint64_t divisor = (x >> 33) | 1;
    sum += x / divisor;
    sum ^= x % (uint32_t)(divisor | 3);
    sum += (uint64_t)(((unsigned __int128)x * divisor) >> 64);
    sum = (sum << (x & 31)) | (sum >> (64 - (x & 31)) * ((x & 31) != 0));
    sum += __builtin_ctzll(x | 1ull << 63);
  }
  return sum;
}

// clang-format off
// A bytecode machine with threaded dispatch. Its program counts the Collatz steps of 3000, 2999, ... 1.
enum opcode { LDI, ADD, ADDI, MUL3P1, SHR1, ANDI, MOV, BZ, BNZ, JMP, BNE1, LDM, STM, DECR, XORR, HALT };
struct bytecode {
  uint8_t op, a, b;
  int32_t imm;
};
static const struct bytecode collatz[] = {
    /*0*/ {LDI, 0, 0, 3000},   /*1*/ {LDI, 5, 0, 0},   /*2*/ {MOV, 1, 0, 0},
    /*3*/ {BNE1, 1, 0, 5},     /*4*/ {JMP, 0, 0, 16},  /*5*/ {MOV, 2, 1, 0},
    /*6*/ {ANDI, 2, 0, 1},     /*7*/ {BZ, 2, 0, 10},   /*8*/ {MUL3P1, 1, 0, 0},
    /*9*/ {JMP, 0, 0, 11},     /*10*/ {SHR1, 1, 0, 0}, /*11*/ {ADDI, 5, 0, 1},
    /*12*/ {LDM, 3, 5, 0},     /*13*/ {ADD, 3, 1, 0},  /*14*/ {STM, 3, 5, 0},
    /*15*/ {JMP, 0, 0, 3},     /*16*/ {XORR, 6, 5, 0}, /*17*/ {DECR, 0, 0, 0},
    /*18*/ {BNZ, 0, 0, 2},     /*19*/ {HALT, 0, 0, 0}};

static NOINLINE uint64_t execute(const struct bytecode *base) {
  static void *const labels[] = {&&ldi, &&add, &&addi, &&mul3p1, &&shr1, &&andi, &&mov, &&bz,
                                 &&bnz, &&jmp, &&bne1, &&ldm, &&stm, &&decr, &&xorr, &&halt};
  uint64_t r[8] = {0}, memory[256] = {0}, count = 0;
  const struct bytecode *p = base;
#define NEXT do { count++; goto *labels[p->op]; } while (0)
  NEXT;
ldi: r[p->a] = p->imm; p++; NEXT;
add: r[p->a] += r[p->b]; p++; NEXT;
addi: r[p->a] += p->imm; p++; NEXT;
mul3p1: r[p->a] = r[p->a] * 3 + 1; p++; NEXT;
shr1: r[p->a] >>= 1; p++; NEXT;
andi: r[p->a] &= p->imm; p++; NEXT;
mov: r[p->a] = r[p->b]; p++; NEXT;
bz: p = r[p->a] == 0 ? base + p->imm : p + 1; NEXT;
bnz: p = r[p->a] != 0 ? base + p->imm : p + 1; NEXT;
jmp: p = base + p->imm; NEXT;
bne1: p = r[p->a] != 1 ? base + p->imm : p + 1; NEXT;
ldm: r[p->a] = memory[r[p->b] & 255]; p++; NEXT;
stm: memory[r[p->b] & 255] = r[p->a]; p++; NEXT;
decr: r[p->a]--; p++; NEXT;
xorr: r[p->a] ^= r[p->b] * 2654435761u; p++; NEXT;
halt:
  return r[6] ^ memory[17] ^ count << 32;
}
// clang-format on

static uint64_t run_bytecode(void) { return execute(collatz); }

static NOINLINE int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
static int (*volatile fibonacci_pointer)(int) = fibonacci;
static uint64_t run_calls(void) { return fibonacci_pointer(24); }

struct object {
  uint32_t (*method)(struct object *, uint32_t);
  uint32_t value;
};
static NOINLINE uint32_t method_add(struct object *o, uint32_t x) { return x + o->value; }
static NOINLINE uint32_t method_xor(struct object *o, uint32_t x) { return x ^ (o->value + 3); }
static NOINLINE uint32_t method_scale(struct object *o, uint32_t x) { return x * 5 + o->value; }
static NOINLINE uint32_t method_halve(struct object *o, uint32_t x) { return (x >> 1) + o->value; }

static struct object objects[1024];
static int setup_objects(void) {
  uint32_t (*const methods[4])(struct object *, uint32_t) = {method_add, method_xor, method_scale,
                                                             method_halve};
  seed(99);
  for (int i = 0; i < 1024; i++) objects[i] = (struct object){methods[random_u32() >> 30], i};
  return SETUP_OK;
}
static uint64_t run_indirect_calls(void) {
  uint32_t x = 1;
  for (int k = 0; k < 100; k++)
    for (int i = 0; i < 1024; i++) x = objects[i].method(&objects[i], x);
  return x;
}

const struct workload integer_workloads[] = {
    {.name = "int_sort", .unit = "Melem/s", .work = SORT_COUNT / 1e6, .run = run_sort},
    {.name = "int_crc32", .unit = "MB/s", .work = BYTES / 1e6, .setup = setup_crc, .run = run_crc},
    {.name = "int_sha256",
     .unit = "MB/s",
     .work = SHA256_BYTES / 1e6,
     .setup = setup_bytes,
     .run = run_sha256},
    {.name = "int_muldiv", .unit = "Miter/s", .work = 0.1, .run = run_muldiv},
    {.name = "interp_goto", .unit = "Mop/s", .work = 2150715 / 1e6, .run = run_bytecode},
    {.name = "call_ret", .unit = "Mcall/s", .work = 150049 / 1e6, .run = run_calls},
    {.name = "icall",
     .unit = "Mcall/s",
     .work = 0.1024,
     .setup = setup_objects,
     .run = run_indirect_calls},
    {0}};
