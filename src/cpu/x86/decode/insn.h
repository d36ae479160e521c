// A decoded instruction, and the rows of the instruction tables that it comes from.
//
// The tables are integer.def, system.def, sse.def, avx.def, x87.def. A row is in the manual's
// notation:
//
//   INSN(ADD, "01 /r", "rm, r", "m---mmmm", kLock)     what it does: void Exec_ADD(Cpu&, const
//   Insn&) PICK(ADD, ...)                                     ... or: ExecFn Pick_ADD(const Insn&),
//   asked once, when decoding NATIVE(ADDPS, ...)                                 ... or:
//   ExecNative, which runs it on the host's CPU
//
// Encoding, in this order: [VEX.(128|256|LIG|LZ).(NP|66|F3|F2).(0F|0F38|0F3A).(W0|W1|WIG)] |
// [NP|66|F3|F2] [REX.W|!REX.W|
//   !REX.B]; the opcode bytes ("0F 38 F0", "50+r"); then a ModRM part: "/r", "/0".."/7", a fixed
//   byte ("0F 01 D0"), a fixed byte with a register ("D8 C0+i"); then immediates: ib iw id iz iv(8
//   bytes with REX.W) cz(relative, size of iz) cb mo (moffs) cp (ptr16:16/32), "ib ib", "iw ib" and
//   "/is4". No prefix token: 66 is the operand size, F2 and F3 are ignored (or REP). NP: none of
//   the three. 66: neither F2 nor F3. Among the rows that match, the one with the most constraints
//   wins; a row whose feature the guest lacks doesn't match. REX.W: only with W=1; rows with it win
//   over rows without.
// Operands: the tokens are in operand_tokens.def. Operands that are memory only or register only
// restrict ModRM.mod. Flags: columns O D I S Z A P C; '-' untouched, 'm' modified, 't' tested, 'b'
// both, '0', '1', 'u' undefined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/x86/cpu.h"
#include "cpu/x86/decode/features.h"

namespace kvartz::cpu::x86 {

using PickFn = ExecFn (*)(const Insn& insn);

// ---- attributes of a row
enum Attribute : uint32_t {
  kLock = 1 << 0,        // LOCK is allowed when the first operand is memory
  kNo64 = 1 << 1,        // invalid in 64-bit mode
  kOnly64 = 1 << 2,      // valid in 64-bit mode only
  kDefault64 = 1 << 3,   // operand size 8 in 64-bit mode, 2 with 66
  kForce64 = 1 << 4,     // operand size 8 in 64-bit mode, always
  kPrivileged = 1 << 5,  // #GP(0) unless CPL is 0 (checked by the decoder)
  kProtected = 1 << 6,   // #UD in real and virtual-8086 mode
  kAlign = 1 << 7,       // the memory operand must be aligned to its size, else #GP(0)
  kBranch = 1 << 8,      // may change RIP other than to the next instruction
  kEndsBlock =
      1 << 9,  // may change the mode, the address space or interruptibility. Implied by system.def
  kRep = 1 << 10,         // string instruction: F2/F3 repeat
  kNative = 1 << 11,      // set by NATIVE
  kSystem = 1 << 12,      // set for the rows of system.def
  kVsib = 1 << 13,        // set from the operands: the index is a vector register
  kModIgnored = 1 << 14,  // set from the operands: MOV CR/DR read ModRM as if mod were 3
  kFp = 1 << 15,          // uses MXCSR
  kNoWrite = 1 << 16,     // NATIVE: the first operand is only read
  kStrLen = 1 << 17,      // PCMPESTRx: lengths in RAX and RDX
  kStrIndex = 1 << 18,    // PCMPxSTRI: result in RCX
  kStrMask = 1 << 19,     // PCMPxSTRM: result in XMM0
};

// ---- operands
enum class OperandKind : uint8_t {
  kNone,
  kReg,        // general register, Insn::reg (ModRM.reg or the opcode's low bits)
  kRm,         // general register Insn::rm, or memory
  kRmReg,      // general register Insn::rm
  kVvvv,       // general register Insn::vvvv
  kMem,        // memory
  kFixedReg,   // general register number Operand::fixed
  kImm,        // Insn::imm
  kImm2,       // Insn::imm2
  kOne,        // the constant 1
  kRel,        // Insn::imm, relative to the next instruction
  kFar,        // ptr16:16/32: offset Insn::imm, selector Insn::imm2
  kMoffs,      // memory at Insn::disp
  kSreg,       // segment register Insn::reg
  kFixedSreg,  // segment register number Operand::fixed
  kCr,
  kDr,  // Insn::reg
  kStrSrc,
  kStrDst,  // string operands: seg:[rSI], ES:[rDI]
  kXmm,
  kXmmRm,
  kXmmRmReg,
  kXmmVvvv,
  kXmmIs4,  // vector register by field; kXmmRm may be memory of Operand::size
  kYmm,
  kYmmRm,
  kYmmRmReg,
  kYmmVvvv,
  kYmmIs4,
  kMm,
  kMmRm,
  kMmRmReg,
  kFixedXmm,  // XMM register number Operand::fixed (BLENDV's XMM0)
  kVsibMem,   // gather
  kSt0,
  kSti,  // x87: ST(0), ST(rm)
};
// Operand::size, when it isn't a number of bytes (OperandSize resolves it).
constexpr uint8_t kSizeNone = 0;          // unspecified (LEA, INVLPG, FXSAVE...)
constexpr uint8_t kSizeOperand = 0xff;    // that of the instruction (Insn::operand_size)
constexpr uint8_t kSizeW = 0xfe;          // 8 with W, else 4
constexpr uint8_t kSizeRegOrWord = 0xfd;  // register: that of the instruction; memory: 2
constexpr uint8_t kSizeRegOrByte = 0xfc;  // register: 8 with W, else 4; memory: 1
struct Operand {
  OperandKind kind = OperandKind::kNone;
  uint8_t size = kSizeNone;  // bytes, or a kSize... code
  uint8_t fixed = 0;
};

// What a row does to the status flags: masks of RFLAGS bits.
struct FlagEffects {
  uint16_t tested = 0, modified = 0, cleared = 0, set = 0,
           undefined = 0;  // modified excludes the other three
  uint16_t written() const { return modified | cleared | set | undefined; }
};

enum class OpcodeMap : uint8_t { kPrimary, k0f, k0f38, k0f3a };
enum class PrefixRule : uint8_t { kAny, kNp, k66, kF3, kF2 };
enum class ImmKind : uint8_t { kNone, kIb, kIw, kId, kIz, kIv, kCb, kCz, kMoffs, kCp, kIs4 };
enum class Tri : uint8_t { kAny, kNo, kYes };

// One row, parsed. Immutable.
struct Row {
  // as written
  const char* mnemonic = "";
  const char* encoding = "";
  const char* operand_text = "";
  const char* flag_text = "";
  uint32_t attributes = 0;
  Feature features[2] = {Feature::kAlways, Feature::kAlways};
  ExecFn exec = nullptr;  // one of the two
  PickFn pick = nullptr;
  // parsed
  bool vex = false;
  OpcodeMap map = OpcodeMap::kPrimary;
  uint8_t opcode = 0;
  bool opcode_register = false;  // "+r": the opcode's low three bits are a register
  PrefixRule prefix = PrefixRule::kAny;
  Tri w = Tri::kAny;  // REX.W or VEX.W
  Tri vex_l = Tri::kAny;
  bool rex_b_clear = false;  // "!REX.B"
  bool has_modrm = false;
  uint8_t modrm_mask = 0, modrm_value = 0;  // bits of ModRM that must match
  Tri memory = Tri::kAny;                   // ModRM must name memory (kYes) or a register (kNo)
  bool sti = false;                         // "C0+i"
  ImmKind imm[2] = {ImmKind::kNone, ImmKind::kNone};
  Operand operands[5];
  uint8_t operand_count = 0;
  FlagEffects flags;
};

// ---- prefixes and other one-bit facts of an Insn
enum InsnFlag : uint8_t {
  kHasLock = 1 << 0,
  kHasRep = 1 << 1,    // F3 is the last of F2 and F3
  kHasRepne = 1 << 2,  // F2 is
  kHas66 = 1 << 3,
  kHas67 = 1 << 4,
  kHasSegment = 1 << 5,  // an override that counts
  kHasVex = 1 << 6,
  kHasMemory = 1 << 7,  // ModRM names memory
};

constexpr uint8_t kBaseRip = 16;     // Insn::base: RIP of the next instruction
constexpr uint8_t kNoRegister = 17;  // Insn::base, Insn::index: none
constexpr uint8_t kHighByte = 16;    // Insn::reg, Insn::rm of byte operands: 16..19 are AH CH DH BH

// A decoded instruction: one cache line, position independent (RIP-relative operands keep RIP as
// their base).
struct alignas(64) Insn {
  ExecFn exec;     // what to call
  const Row* row;  // the row it matches
  int64_t imm;   // first immediate, sign-extended from its encoded size; relative target; offset of
                 // a far pointer
  int64_t disp;  // displacement, sign-extended; moffs
  uint8_t bytes[15];
  uint8_t length;
  uint8_t operand_size;  // bytes: 1, 2, 4, 8 (1: the first operand is a byte)
  uint8_t address_size;  // bytes: 2, 4, 8
  uint8_t opcode;        // the last opcode byte
  uint8_t modrm;
  uint8_t reg;   // ModRM.reg with REX.R, or the opcode's register with REX.B; kHighByte + n in byte
                 // operands
  uint8_t rm;    // ModRM.rm with REX.B (register form); kHighByte + n in byte operands
  uint8_t base;  // 0..15, kBaseRip, kNoRegister
  uint8_t index;        // 0..15 (vector register for VSIB), kNoRegister
  uint8_t scale : 2;    // shift
  uint8_t segment : 3;  // SegReg of the memory operand (or of a string's source)
  uint8_t vex_l : 1;
  uint8_t vex_pp : 2;  // 0 none, 1 66, 2 F3, 3 F2
  uint8_t flags;       // InsnFlag
  uint8_t rex;         // 0x40..0x4f, or 0. With VEX: its W R X B as a REX would give them
  uint8_t vvvv;
  uint16_t imm2;  // second immediate: ENTER's level, selector of a far pointer, INSERTQ

  bool has_memory() const { return (flags & kHasMemory) != 0; }
  bool locked() const { return (flags & kHasLock) != 0; }
  bool w() const { return (rex & 8) != 0; }
  unsigned mod() const { return modrm >> 6; }
  // ModRM.reg as an opcode extension (0..7).
  unsigned digit() const { return modrm >> 3 & 7; }
  SegReg seg() const { return static_cast<SegReg>(segment); }
  bool has(Attribute attribute) const { return (row->attributes & attribute) != 0; }
  std::span<const uint8_t> code() const { return {bytes, length}; }
};
static_assert(sizeof(Insn) == 64);

// ---- decoding
struct DecodeContext {
  CodeMode mode = CodeMode::k64;
  bool protected_mode = true;  // CR0.PE set and not virtual-8086
  uint8_t cpl = 0;
  FeatureSet features = FeatureSet::All();
};

enum class DecodeStatus {
  kOk,
  kTruncated,  // the code goes on after the end of `bytes` (fewer than 15 were given)
  kInvalid,    // #UD
  kTooLong,    // #GP(0)
};

// Decodes the instruction at the start of `bytes` (at most 15 are read). On kOk all of *insn is
// set; otherwise its contents are unspecified. Never reads behind `bytes`.
DecodeStatus Decode(const DecodeContext& context, std::span<const uint8_t> bytes, Insn* insn);

// All rows, in table order. Built at the first call (well below a millisecond); immutable.
std::span<const Row> InsnRows();

// Size of an operand in bytes, 0 if it has none.
unsigned OperandSize(const Insn& insn, const Operand& operand);

// Runs the instruction on the host's CPU, with guest registers (rows declared with NATIVE).
void ExecNative(Cpu& cpu, const Insn& insn);

// ---- effective address
// Register file as the address fields of an Insn number it: 16 is RIP, 17 reads zero.
inline uint64_t AddressRegister(const Cpu& cpu, unsigned number) {
  uint64_t value;
  std::memcpy(&value, reinterpret_cast<const char*>(&cpu) + offsetof(Cpu, gpr) + number * 8, 8);
  return value;
}
static_assert(offsetof(Cpu, rip) == offsetof(Cpu, gpr) + kBaseRip * 8);
static_assert(offsetof(Cpu, zero) == offsetof(Cpu, gpr) + kNoRegister * 8);

inline uint64_t EffectiveAddress(const Cpu& cpu, const Insn& insn) {
  const uint64_t address = AddressRegister(cpu, insn.base) +
                           (AddressRegister(cpu, insn.index) << insn.scale) +
                           static_cast<uint64_t>(insn.disp);
  if (insn.address_size == 8) [[likely]] {
    return address;
  }
  return insn.address_size == 4 ? static_cast<uint32_t>(address) : static_cast<uint16_t>(address);
}

}  // namespace kvartz::cpu::x86
