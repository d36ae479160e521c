// x86-64 machine code, byte by byte: what the translator and its stubs emit. Intel SDM vol. 2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvartz::cpu::x86::jit {

enum HostReg : uint8_t {
  kRegAx,
  kRegCx,
  kRegDx,
  kRegBx,
  kRegSp,
  kRegBp,
  kRegSi,
  kRegDi,
  kReg8,
  kReg9,
  kReg10,
  kReg11,
  kReg12,
  kReg13,
  kReg14,
  kReg15,
  kNoReg = 0xff
};
constexpr HostReg kS0 = kReg10, kS1 = kReg11;  // the translator's own
constexpr HostReg kGuestSp = kReg15;
// Where a guest's general register lives (state.h); kNoReg: in Cpu::gpr.
constexpr HostReg HostOf(unsigned guest) {
  if (guest == 4) return kGuestSp;
  return guest == 10 || guest == 11 || guest == 15 ? kNoReg : static_cast<HostReg>(guest);
}

enum Condition : uint8_t { kCcO, kCcNo, kCcB, kCcAe, kCcE, kCcNe, kCcBe, kCcA, kCcS, kCcNs };

// A memory operand: relative to State (gs), or base + index << scale + disp.
struct HostMem {
  HostReg base = kNoReg, index = kNoReg;
  uint8_t scale = 0;
  int32_t disp = 0;
  bool gs = false;
  static HostMem Gs(size_t offset) { return {.disp = static_cast<int32_t>(offset), .gs = true}; }
};

// Writes to memory that is mapped twice: `at` to write, `at + delta` to run.
class Assembler {
 public:
  // `state`: the address of State if it lies in the lowest 2 GiB (then it is named absolutely,
  // which is shorter and faster), else 0 (then by GS).
  Assembler(uint8_t* at, uint8_t* end, ptrdiff_t delta, int32_t state)
      : at_(at), end_(end), delta_(delta), state_(state) {}

  uint8_t* here() const { return at_; }          // where the next byte is written
  uint8_t* run() const { return at_ + delta_; }  // ... and runs
  size_t room() const { return static_cast<size_t>(end_ - at_); }

  void Byte(unsigned value) { *at_++ = static_cast<uint8_t>(value); }
  void Dword(uint32_t value) { Put(&value, 4); }
  void Qword(uint64_t value) { Put(&value, 8); }
  void Put(const void* data, size_t size) {
    std::memcpy(at_, data, size);
    at_ += size;
  }

  // ---- an instruction: [prefix] REX opcode ModRM. `opcode`: up to three bytes, the first one in
  // the lowest.
  enum Width : uint8_t { k32, k64 };
  void Rex(Width width, unsigned reg, unsigned index, unsigned base) {
    unsigned rex = 0x40 | (width == k64 ? 8 : 0) | (reg >> 3 & 1) << 2 | (index >> 3 & 1) << 1 |
                   (base >> 3 & 1);
    if (rex != 0x40) Byte(rex);
  }
  void Opcode(uint32_t opcode) {
    do Byte(opcode & 0xff);
    while ((opcode >>= 8) != 0);
  }
  void RegReg(Width width, uint32_t opcode, unsigned reg, unsigned rm) {
    Rex(width, reg, 0, rm);
    Opcode(opcode);
    Byte(0xc0 | (reg & 7) << 3 | (rm & 7));
  }
  void RegMem(Width width, uint32_t opcode, unsigned reg, const HostMem& mem) {
    StatePrefix(mem);
    Rex(width, reg, mem.index == kNoReg ? 0 : mem.index & 15,
        mem.base == kNoReg ? 0 : mem.base & 15);
    Opcode(opcode);
    ModRmMem(reg & 7, mem);
  }
  void StatePrefix(const HostMem& mem) {
    if (mem.gs && state_ == 0) Byte(0x65);
  }
  // ModRM, SIB and displacement; the caller has put the upper bits of the registers in a prefix.
  void ModRmMem(unsigned reg, HostMem mem) {
    reg <<= 3;
    if (mem.gs) mem.disp += state_;
    if (mem.base == kNoReg) {  // [disp32] or [index*scale + disp32]: SIB without base
      Byte(reg | 4);
      Byte(unsigned{mem.scale} << 6 | (mem.index == kNoReg ? 4u : mem.index & 7u) << 3 | 5);
      Dword(static_cast<uint32_t>(mem.disp));
      return;
    }
    const bool sib = mem.index != kNoReg || (mem.base & 7) == 4;
    const unsigned mod = mem.disp == 0 && (mem.base & 7) != 5        ? 0
                         : mem.disp == static_cast<int8_t>(mem.disp) ? 0x40
                                                                     : 0x80;
    Byte(mod | reg | (sib ? 4u : mem.base & 7u));
    if (sib) {
      Byte(unsigned{mem.scale} << 6 | (mem.index == kNoReg ? 4u : mem.index & 7u) << 3 |
           (mem.base & 7u));
    }
    if (mod == 0x40) Byte(static_cast<uint8_t>(mem.disp));
    if (mod == 0x80) Dword(static_cast<uint32_t>(mem.disp));
  }

  // ---- the ones in use. None of MOV and LEA touches a flag.
  void Mov(HostReg to, HostReg from) { RegReg(k64, 0x8b, to, from); }
  void Load(HostReg to, const HostMem& mem) { RegMem(k64, 0x8b, to, mem); }
  void Store(const HostMem& mem, HostReg from) { RegMem(k64, 0x89, from, mem); }
  void Lea(HostReg to, const HostMem& mem) { RegMem(k64, 0x8d, to, mem); }
  uint8_t* LeaRip(HostReg to) {  // patched as a branch is
    Rex(k64, to, 0, 0);
    Byte(0x8d);
    Byte((to & 7) << 3 | 5);
    at_ += 4;
    return at_ - 4;
  }
  void IncDword(const HostMem& mem) { RegMem(k32, 0xff, 0, mem); }
  void Add(HostReg to, const HostMem& mem) { RegMem(k64, 0x03, to, mem); }
  void Sub(HostReg to, const HostMem& mem) { RegMem(k64, 0x2b, to, mem); }
  void Cmp(HostReg left, const HostMem& mem) { RegMem(k64, 0x3b, left, mem); }
  void CmpImm(HostReg left, int32_t value) {
    RegReg(k64, 0x81, 7, left);
    Dword(static_cast<uint32_t>(value));
  }
  void CmpDword(const HostMem& mem, int8_t value) {
    RegMem(k32, 0x83, 7, mem);
    Byte(static_cast<uint8_t>(value));
  }
  void CmpByte(const HostMem& mem, int8_t value) {
    RegMem(k32, 0x80, 7, mem);
    Byte(static_cast<uint8_t>(value));
  }
  void StoreByte(const HostMem& mem, uint8_t value) {
    RegMem(k32, 0xc6, 0, mem);
    Byte(value);
  }
  void StoreDword(const HostMem& mem, uint32_t value) {
    RegMem(k32, 0xc7, 0, mem);
    Dword(value);
  }
  void StoreImm(const HostMem& mem, int32_t value) {  // 8 bytes, sign-extended
    RegMem(k64, 0xc7, 0, mem);
    Dword(static_cast<uint32_t>(value));
  }
  void MovImm32(HostReg to, uint32_t value) {  // zero-extended
    Rex(k32, 0, 0, to);
    Byte(0xb8 | (to & 7));
    Dword(value);
  }
  void MovImm64(HostReg to, uint64_t value) {
    Rex(k64, 0, 0, to);
    Byte(0xb8 | (to & 7));
    Qword(value);
  }
  void Ret() { Byte(0xc3); }
  void JmpMem(const HostMem& mem) { RegMem(k32, 0xff, 4, mem); }

  // Relative branches; `target` as it runs. The result is where the four bytes of the distance are
  // written.
  uint8_t* Jmp(const uint8_t* target) { return Relative(0xe9, target); }
  uint8_t* Call(const uint8_t* target) { return Relative(0xe8, target); }
  uint8_t* Jcc(unsigned condition, const uint8_t* target) {
    return Relative(0x800f | condition << 8, target);
  }
  void Patch(uint8_t* distance, const uint8_t* target) const {
    const auto value = static_cast<int32_t>(target - (distance + delta_ + 4));
    std::memcpy(distance, &value, 4);
  }
  void PatchHere(uint8_t* distance) const { Patch(distance, run()); }

  // Flags <-> AX in two bytes (State::saved_flags): LAHF, SETO AL; ADD AL,7FH, SAHF.
  void FlagsToAx() {
    Byte(0x9f);
    Byte(0x0f), Byte(0x90), Byte(0xc0);
  }
  void AxToFlags() {
    Byte(0x04), Byte(0x7f);
    Byte(0x9e);
  }
  void LoadAx(const HostMem& mem) { Byte(0x66), RegMem(k32, 0x8b, 0, mem); }
  void StoreAx(const HostMem& mem) {
    // operand-size prefix before GS: both orders are valid
    Byte(0x66), RegMem(k32, 0x89, 0, mem);
  }

 private:
  uint8_t* Relative(unsigned opcode, const uint8_t* target) {
    Opcode(opcode);
    uint8_t* distance = at_;
    at_ += 4;
    Patch(distance, target);
    return distance;
  }

  uint8_t* at_;
  uint8_t* end_;
  ptrdiff_t delta_;
  int32_t state_;
};

}  // namespace kvartz::cpu::x86::jit
