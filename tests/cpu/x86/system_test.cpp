// System instructions: privileges, control registers, ports, MSRs, CPUID. SDM vol. 2 and vol. 3 ch.
// 2; vol. 1 ch. 19.
#include "cpu/x86/guest_case.h"

namespace kvartz::cpu::x86 {
namespace {

GUEST_CODE(sys_hlt, "hlt")
GUEST_CODE(sys_cli, "cli")
GUEST_CODE(sys_mov_cr, "mov %cr0, %rax")
GUEST_CODE(sys_mov_dr, "mov %dr7, %rax")
GUEST_CODE(sys_lgdt, "lgdt 0x9000")
GUEST_CODE(sys_invlpg, "invlpg 0x9000")
GUEST_CODE(sys_wrmsr, "wrmsr")
GUEST_CODE(sys_rdmsr, "rdmsr")
GUEST_CODE(sys_in, "in $0x80, %al")
GUEST_CODE(sys_out_word, "out %ax, $0x87")
GUEST_CODE(sys_wbinvd, "wbinvd")
GUEST_CODE(sys_swapgs, "swapgs")
GUEST_CODE(sys_ltr, "ltr %ax")
GUEST_CODE(sys_clts, "clts")
GUEST_CODE(sys_sgdt, "sgdt 0x9000; ud2")
GUEST_CODE(sys_smsw, "smsw %eax; ud2")
GUEST_CODE(sys_str, "str %eax; ud2")
GUEST_CODE(sys_rdtsc, "rdtsc; ud2")
GUEST_CODE(sys_rdpmc, "xor %ecx, %ecx; rdpmc")
GUEST_CODE(sys_rdfsbase, "rdfsbase %rax; ud2")
GUEST_CODE(sys_xgetbv, "xor %ecx, %ecx; xgetbv; ud2")
GUEST_CODE(sys_rsm, "rsm")
GUEST_CODE(sys_vmxon, "vmxon 0x9000")
GUEST_CODE(sys_vmrun, "vmrun")
GUEST_CODE(sys_monitor, "monitor")
GUEST_CODE(sys_lldt_null, "xor %eax, %eax; lldt %ax; ud2")
GUEST_CODE(sys_ltr_null, "xor %eax, %eax; ltr %ax")
GUEST_CODE(sys_ltr_busy, "mov $0x48, %eax; ltr %ax")
GUEST_CODE(sys_cr0_nw, "mov %cr0, %rax; bts $29, %rax; mov %rax, %cr0")
GUEST_CODE(sys_cr0_pg_off, "mov %cr0, %rax; btr $31, %rax; mov %rax, %cr0")
GUEST_CODE(sys_cr0_high, "mov %cr0, %rax; bts $32, %rax; mov %rax, %cr0")
GUEST_CODE(sys_cr4_reserved, "mov %cr4, %rax; bts $31, %rax; mov %rax, %cr4")
GUEST_CODE(sys_cr4_pae_off, "mov %cr4, %rax; btr $5, %rax; mov %rax, %cr4")
GUEST_CODE(
    sys_cr4_pcide_cr3,
    "mov %cr3, %rax; or $8, %rax; mov %rax, %cr3; mov %cr4, %rax; bts $17, %rax; mov %rax, %cr4")
GUEST_CODE(sys_cr3_reserved, "mov %cr3, %rax; bts $51, %rax; mov %rax, %cr3")
GUEST_CODE(sys_cr1, ".byte 0x0f, 0x20, 0xc8")
GUEST_CODE(sys_cr8_big, "mov $16, %eax; mov %rax, %cr8")
GUEST_CODE(sys_dr4, "mov %dr4, %rax; ud2")
GUEST_CODE(sys_dr7_high, "mov $1, %rax; shl $32, %rax; mov %rax, %dr7")
GUEST_CODE(sys_efer_reserved, "mov $0xc0000080, %ecx; rdmsr; bts $2, %eax; wrmsr")
GUEST_CODE(sys_efer_lme, "mov $0xc0000080, %ecx; rdmsr; btr $8, %eax; wrmsr")
GUEST_CODE(sys_unknown_msr, "mov $0x12345, %ecx; rdmsr")
GUEST_CODE(sys_pat_bad, "mov $0x277, %ecx; mov $2, %eax; xor %edx, %edx; wrmsr")
GUEST_CODE(sys_lstar_bad, "mov $0xc0000082, %ecx; xor %eax, %eax; mov $0x8000, %edx; wrmsr")
GUEST_CODE(sys_xsetbv_bad,
           "mov %cr4, %rax; bts $18, %rax; mov %rax, %cr4; xor %ecx, %ecx; xor %edx, %edx; mov $5, "
           "%eax; xsetbv")
GUEST_CODE(sys_invpcid_type, "mov $4, %eax; invpcid 0x9000, %rax")
GUEST_CODE(sys_int1, ".byte 0xf1")

struct Row {
  const char* name;
  unsigned cpl;
  std::span<const uint8_t> code;
  int vector;
  uint64_t cr4 = 0;
  uint32_t error = 0;
};

TEST(System, Faults) {
  const Row rows[] = {
      {"HLT", 3, CODE_OF(sys_hlt), kGP},
      {"CLI", 3, CODE_OF(sys_cli), kGP},
      {"MOV CR", 3, CODE_OF(sys_mov_cr), kGP},
      {"MOV DR", 3, CODE_OF(sys_mov_dr), kGP},
      {"LGDT", 3, CODE_OF(sys_lgdt), kGP},
      {"INVLPG", 3, CODE_OF(sys_invlpg), kGP},
      {"WRMSR", 3, CODE_OF(sys_wrmsr), kGP},
      {"RDMSR", 3, CODE_OF(sys_rdmsr), kGP},
      {"IN", 3, CODE_OF(sys_in), kGP},
      {"WBINVD", 3, CODE_OF(sys_wbinvd), kGP},
      {"SWAPGS", 3, CODE_OF(sys_swapgs), kGP},
      {"LTR", 3, CODE_OF(sys_ltr), kGP},
      {"CLTS", 3, CODE_OF(sys_clts), kGP},
      {"SGDT with UMIP", 3, CODE_OF(sys_sgdt), kGP, cr4::kUmip},
      {"SGDT without UMIP", 3, CODE_OF(sys_sgdt), kUD},
      {"SGDT with UMIP at CPL 0", 0, CODE_OF(sys_sgdt), kUD, cr4::kUmip},
      {"SMSW with UMIP", 3, CODE_OF(sys_smsw), kGP, cr4::kUmip},
      {"STR with UMIP", 3, CODE_OF(sys_str), kGP, cr4::kUmip},
      {"RDTSC with TSD", 3, CODE_OF(sys_rdtsc), kGP, cr4::kTsd},
      {"RDTSC without TSD", 3, CODE_OF(sys_rdtsc), kUD},
      {"RDPMC", 0, CODE_OF(sys_rdpmc), kGP},
      {"RDFSBASE without FSGSBASE", 0, CODE_OF(sys_rdfsbase), kUD},
      {"XGETBV without OSXSAVE", 0, CODE_OF(sys_xgetbv), kUD},
      {"RSM", 0, CODE_OF(sys_rsm), kUD},
      {"VMXON", 0, CODE_OF(sys_vmxon), kUD},
      {"VMRUN", 0, CODE_OF(sys_vmrun), kUD},
      {"MONITOR isn't offered", 0, CODE_OF(sys_monitor), kUD},
      {"LLDT null", 0, CODE_OF(sys_lldt_null), kUD},
      {"LTR null", 0, CODE_OF(sys_ltr_null), kGP},
      {"LTR busy", 0, CODE_OF(sys_ltr_busy), kGP, 0, kTssSelector},
      {"CR0.NW without CD", 0, CODE_OF(sys_cr0_nw), kGP},
      {"CR0.PG off in 64-bit mode", 0, CODE_OF(sys_cr0_pg_off), kGP},
      {"CR0 high half", 0, CODE_OF(sys_cr0_high), kGP},
      {"CR4 reserved", 0, CODE_OF(sys_cr4_reserved), kGP},
      {"CR4.PAE off in long mode", 0, CODE_OF(sys_cr4_pae_off), kGP},
      {"CR4.PCIDE with a PCID in CR3", 0, CODE_OF(sys_cr4_pcide_cr3), kGP},
      {"CR3 reserved", 0, CODE_OF(sys_cr3_reserved), kGP},
      {"CR1", 0, CODE_OF(sys_cr1), kUD},
      {"CR8 too big", 0, CODE_OF(sys_cr8_big), kGP},
      {"DR4 with DE", 0, CODE_OF(sys_dr4), kUD, cr4::kDe},
      {"DR7 high half", 0, CODE_OF(sys_dr7_high), kGP},
      {"EFER reserved", 0, CODE_OF(sys_efer_reserved), kGP},
      {"EFER.LME with paging", 0, CODE_OF(sys_efer_lme), kGP},
      {"unknown MSR", 0, CODE_OF(sys_unknown_msr), kGP},
      {"PAT with a reserved type", 0, CODE_OF(sys_pat_bad), kGP},
      {"LSTAR not canonical", 0, CODE_OF(sys_lstar_bad), kGP},
      {"XCR0: AVX without SSE", 0, CODE_OF(sys_xsetbv_bad), kGP},
      {"INVPCID type 4", 0, CODE_OF(sys_invpcid_type), kGP},
      {"INT1", 0, CODE_OF(sys_int1), kDB},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    GuestCase guest(Mode::kLong64, row.cpl);
    guest.initial.cr4 |= row.cr4;
    guest.Load(row.code);
    Outcome end = guest.Run();
    EXPECT_EQ(end.vector, row.vector);
    EXPECT_EQ(end.error, row.error);
  }
}

GUEST_CODE(sys_io_allowed, "in $0x80, %al; out %ax, $0x87; out %al, $0xf4")

// The permission bitmap: a clear bit allows a port, a word needs both of its bits.
TEST(System, IoPermissions) {
  GuestCase guest(Mode::kLong64, 3);
  auto* bitmap = guest.at(kTssAt + 0x68);
  bitmap[0x80 / 8] &= static_cast<uint8_t>(~0x81);  // 0x80 and 0x87
  guest.Load(CODE_OF(sys_in));
  EXPECT_EQ(guest.Run().vector, kPF);  // IN succeeds; the zeros after it access address 0xff
  guest.Load(CODE_OF(sys_out_word));
  EXPECT_EQ(guest.Run().vector, kGP);
  bitmap[0x88 / 8] &= static_cast<uint8_t>(~1);
  bitmap[0xf4 / 8] &= static_cast<uint8_t>(~(1 << 4));
  guest.Load(CODE_OF(sys_io_allowed));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRax] & 0xff, 0xffu);
  guest.initial.tr.limit = 0x68 + 0x80 / 8 - 1;  // the bitmap ends before the port's byte
  EXPECT_EQ(guest.Run().vector, kGP);
}

GUEST_CODE(sys_rep_outs, R"(
  mov $0x9000, %esi
  mov $0x402, %edx
  mov $5, %ecx
  cld
  rep outsb
  out %al, $0xf4)")
GUEST_CODE(sys_rep_ins, R"(
  mov $0x9000, %edi
  mov $0x402, %edx
  mov $3, %ecx
  rep insb
  std
  mov $0x9010, %edi
  mov $2, %ecx
  rep insl
  out %al, $0xf4)")

TEST(System, StringIo) {
  GuestCase guest(Mode::kLong64);
  memcpy(guest.at(0x9000), "hello", 5);
  guest.Load(CODE_OF(sys_rep_outs));
  Outcome end = guest.Run();
  EXPECT_EQ(guest.board.output, "hello");
  EXPECT_EQ(end.state.gpr[kRsi], 0x9005u);
  EXPECT_EQ(end.state.gpr[kRcx], 0u);
  guest.Load(CODE_OF(sys_rep_ins));
  end = guest.Run();
  EXPECT_EQ(guest.Get<uint32_t>(0x9000) & 0xffffff, 0xe9e9e9u);
  EXPECT_EQ(end.state.gpr[kRdi], 0x9008u);
}

GUEST_CODE(sys_cpuid, R"(
  mov $1, %eax
  cpuid
  mov %ecx, %esi
  mov %cr4, %rax
  bts $18, %rax
  mov %rax, %cr4
  mov $1, %eax
  cpuid
  mov %ecx, %edi
  mov $7, %eax
  xor %edx, %edx
  xor %ecx, %ecx
  xsetbv
  mov $0xd, %eax
  xor %ecx, %ecx
  cpuid
  mov %ebx, %ebp
  xor %ecx, %ecx
  xgetbv
  mov %eax, %r8d
  out %al, $0xf4)")

TEST(System, CpuidFollowsTheState) {
  GuestCase guest(Mode::kLong64);
  if (!guest.board.vcpu().cpuid().Has("avx")) GTEST_SKIP() << "the host has no AVX";
  guest.Load(CODE_OF(sys_cpuid));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_FALSE(end.state.gpr[kRsi] & 1 << 27);
  EXPECT_TRUE(end.state.gpr[kRdi] & 1 << 27);
  EXPECT_EQ(end.state.gpr[kRbp], 832u);
  EXPECT_EQ(end.state.gpr[kR8], 7u);
}

GUEST_CODE(sys_msrs, R"(
  mov $0x10, %ecx
  mov $0x1234, %edx
  xor %eax, %eax
  wrmsr                          # TSC
  rdtsc
  mov %edx, %esi
  mov $0x3b, %ecx
  rdmsr
  mov %edx, %edi                 # TSC_ADJUST moved with it
  mov $0xc0000103, %ecx
  mov $77, %eax
  xor %edx, %edx
  wrmsr
  rdtscp
  mov %ecx, %ebx
  rdpid %r8
  mov $0xc0000102, %ecx
  mov $0x1000, %eax
  xor %edx, %edx
  wrmsr
  swapgs
  mov $0xc0000101, %ecx
  rdmsr
  mov %eax, %r9d
  mov $0x2ff, %ecx
  mov $0xc06, %eax
  wrmsr
  rdmsr
  mov %eax, %r10d
  out %al, $0xf4)")

TEST(System, Msrs) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(sys_msrs));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRsi], 0x1234u);
  EXPECT_EQ(end.state.gpr[kRdi], 0x1233u);  // less the time that had passed
  EXPECT_EQ(end.state.gpr[kRbx], 77u);
  EXPECT_EQ(end.state.gpr[kR8], 77u);
  EXPECT_EQ(end.state.gpr[kR9], 0x1000u);
  EXPECT_EQ(end.state.gpr[kR10], 0xc06u);
}

GUEST_CODE(sys_lmsw,
           ".code16; mov $1, %ax; lmsw %ax; xor %ax, %ax; lmsw %ax; smsw %bx; out %al, $0xf4")

TEST(System, LmswSetsPeAndNeverClearsIt) {
  GuestCase guest(Mode::kReal16);
  guest.Load(CODE_OF(sys_lmsw));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRbx] & 0xffff, 0x11u);
}

// MOV SS holds off interrupts for one instruction: the pending one comes after it.
TEST(System, MovSsShadow) {
  GuestCase guest(Mode::kFlat32);
  static constexpr uint8_t kPlain[] = {0x8c, 0xd1, 0xfb, 0x8e, 0xd1,
                                       0x90, 0x90, 0xf4};  // mov ecx, ss; sti; mov ss, ecx; nop...
  guest.Load(kPlain);
  guest.board.accel().SetPicOutput(true);
  EXPECT_TRUE(guest.board.vcpu().SetState(guest.initial));
  guest.board.accel().SetPicOutput(true);
  Outcome end = guest.Continue();
  EXPECT_EQ(end.vector, 0xff);
  // STI's shadow covers MOV SS; MOV SS's covers the next.
  EXPECT_EQ(end.rip, kCode + 6);
}

}  // namespace
}  // namespace kvartz::cpu::x86
