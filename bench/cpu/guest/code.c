// Code that writes code.
#include <string.h>
#include <sys/mman.h>

#include "bench.h"

static uint8_t *code;
static int setup_code(void) {
  code = mmap(NULL, 65536, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return code == MAP_FAILED ? SETUP_FAILED : SETUP_OK;
}
static void written(void) { __asm__ volatile("" ::: "memory"); }
static uint32_t call(const uint8_t *function, uint32_t argument) {
  return ((uint32_t (*)(uint32_t))function)(argument);
}

static uint64_t run_patch(void) {  // change an immediate, call
  uint64_t sum = 0;
  code[0] = 0xb8;  // mov eax, imm32
  code[5] = 0xc3;  // ret
  for (uint32_t i = 0; i < 500; i++) {
    memcpy(code + 1, &i, 4);
    written();
    sum += call(code, 0);
  }
  return sum;
}

static uint64_t run_self(void) {              // a loop that changes an immediate within itself
  static const uint8_t loop[] = {0x31, 0xc0,  // xor eax, eax
                                 0x89, 0x3d, 0x01, 0x00, 0x00,
                                 0x00,  // again: mov [rip+1], edi, the next instruction's immediate
                                 0xba, 0x00, 0x00, 0x00, 0x00,  // mov edx, imm32
                                 0x01, 0xd0,                    // add eax, edx
                                 0xff, 0xcf,                    // dec edi
                                 0x75, 0xef,                    // jnz again
                                 0xc3};                         // ret
  memcpy(code + 256, loop, sizeof loop);
  written();
  return call(code + 256, 500);
}

static uint64_t run_generate(void) {  // write 4 KiB of code, run it 50 times, write it anew
  uint64_t sum = 0;
  for (uint32_t generation = 0; generation < 8; generation++) {
    uint8_t *p = code;
    *p++ = 0x89;  // mov eax, edi
    *p++ = 0xf8;
    for (uint32_t i = 0; i < 580; i++) {
      uint32_t immediate = i * 2654435761u + generation;
      *p++ = 0x05;  // add eax, imm32
      memcpy(p, &immediate, 4);
      p += 4;
      *p++ = 0xd1;  // rol eax, 1
      *p++ = 0xc0;
    }
    *p++ = 0xc3;
    written();
    for (int k = 0; k < 50; k++) sum += call(code, k);
  }
  return sum;
}

const struct workload code_workloads[] = {
    {.name = "smc_patch", .unit = "kpatch/s", .work = 0.5, .setup = setup_code, .run = run_patch},
    {.name = "smc_self", .unit = "kiter/s", .work = 0.5, .setup = setup_code, .run = run_self},
    {.name = "jit_gen", .unit = "gen/s", .work = 8, .setup = setup_code, .run = run_generate},
    {0}};
