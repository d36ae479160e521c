// Port I/O.
#include "cpu/x86/engine.h"
#include "cpu/x86/interp/system.h"

namespace kvartz::cpu::x86 {
namespace {

// IOPL and the TSS's permission bitmap (SDM vol. 1 19.5).
void CheckPermission(Cpu& cpu, uint16_t port, unsigned size) {
  if (!cpu.protected_mode() || (cpu.cpl <= Iopl(cpu) && !cpu.virtual_8086())) return;
  bool wide = cpu.tr.type() & 8;
  if (!wide || cpu.tr.limit < 0x67) Raise(cpu, kGP, 0);
  uint32_t at = ReadSystem<uint16_t>(cpu, cpu.tr.base + 0x66) + port / 8u;
  if (at + 1 > cpu.tr.limit) Raise(cpu, kGP, 0);
  uint32_t bits = ReadSystem<uint16_t>(cpu, cpu.tr.base + at);
  if (bits >> (port % 8) & ((1u << size) - 1)) Raise(cpu, kGP, 0);
}

void CheckBreakpoints(Cpu& cpu, uint16_t port, unsigned size) {
  if (!(cpu.dr[7] & 0xff) || !(cpu.cr4 & cr4::kDe)) return;
  static constexpr unsigned kLength[4] = {1, 2, 8, 4};
  for (unsigned i = 0; i < 4; i++) {
    if (!(cpu.dr[7] >> (2 * i) & 3) || (cpu.dr[7] >> (16 + 4 * i) & 3) != 2) continue;
    unsigned length = kLength[cpu.dr[7] >> (18 + 4 * i) & 3];
    uint64_t start = cpu.dr[i] & ~uint64_t{length - 1};
    if (port < start + length && start < port + size) {
      cpu.pending_dr6 |= static_cast<uint8_t>(1 << i);
      SetRequest(cpu, request::kDebugTrap);
    }
  }
}

uint32_t ReadPort(Cpu& cpu, uint16_t port, unsigned size) {
  CheckBreakpoints(cpu, port, size);
  return static_cast<uint32_t>(BusRead(cpu.vcpu->ports(), port, size));
}

void WritePort(Cpu& cpu, uint16_t port, unsigned size, uint32_t value) {
  CheckBreakpoints(cpu, port, size);
  BusWrite(cpu.vcpu->ports(), port, size, value);
}

unsigned PortSize(const Cpu& cpu, const Insn& insn) {
  return insn.opcode & 1 ? PlainSize(cpu, insn) : 1;
}

uint16_t Port(const Cpu& cpu, const Insn& insn) {
  return insn.opcode & 8 ? static_cast<uint16_t>(cpu.gpr[kRdx]) : static_cast<uint8_t>(insn.imm);
}

uint64_t Truncate(uint64_t value, unsigned size) {
  return size == 8   ? value
         : size == 4 ? static_cast<uint32_t>(value)
                     : static_cast<uint16_t>(value);
}

// Index and count registers have the address size.
void Advance(Cpu& cpu, unsigned reg, unsigned size, unsigned address_size) {
  uint64_t step = cpu.rflags & rflags::kDf ? 0 - uint64_t{size} : size;
  WriteGpr(cpu, reg, address_size, Truncate(cpu.gpr[reg] + step, address_size));
}

// Runs `once` as the prefix says; after each iteration other events may come first.
template <typename Fn>
void Repeat(Cpu& cpu, const Insn& insn, Fn once) {
  if (!(insn.flags & (kHasRep | kHasRepne))) return once();
  while (Truncate(cpu.gpr[kRcx], insn.address_size) != 0) {
    once();
    uint64_t count = Truncate(cpu.gpr[kRcx] - 1, insn.address_size);
    WriteGpr(cpu, kRcx, insn.address_size, count);
    if (count && __atomic_load_n(&cpu.requests, __ATOMIC_RELAXED)) {
      cpu.rip = cpu.insn_rip;
      return;
    }
  }
}

}  // namespace

void Exec_IN(Cpu& cpu, const Insn& insn) {
  unsigned size = PortSize(cpu, insn);
  uint16_t port = Port(cpu, insn);
  CheckPermission(cpu, port, size);
  WriteGpr(cpu, kRax, size, ReadPort(cpu, port, size));
}

void Exec_OUT(Cpu& cpu, const Insn& insn) {
  unsigned size = PortSize(cpu, insn);
  uint16_t port = Port(cpu, insn);
  CheckPermission(cpu, port, size);
  uint64_t mask = size == 4 ? 0xffffffff : (1u << size * 8) - 1;
  WritePort(cpu, port, size, static_cast<uint32_t>(cpu.gpr[kRax] & mask));
}

void Exec_INS(Cpu& cpu, const Insn& insn) {
  unsigned size = PortSize(cpu, insn);
  auto port = static_cast<uint16_t>(cpu.gpr[kRdx]);
  CheckPermission(cpu, port, size);
  Repeat(cpu, insn, [&] {
    uint64_t at = Truncate(cpu.gpr[kRdi], insn.address_size);
    CheckWrite(cpu, kEs, at, size);
    WriteSized(cpu, kEs, at, size, ReadPort(cpu, port, size));
    Advance(cpu, kRdi, size, insn.address_size);
  });
}

void Exec_OUTS(Cpu& cpu, const Insn& insn) {
  unsigned size = PortSize(cpu, insn);
  auto port = static_cast<uint16_t>(cpu.gpr[kRdx]);
  CheckPermission(cpu, port, size);
  Repeat(cpu, insn, [&] {
    uint64_t value = ReadSized(cpu, insn.seg(), Truncate(cpu.gpr[kRsi], insn.address_size), size);
    WritePort(cpu, port, size, static_cast<uint32_t>(value));
    Advance(cpu, kRsi, size, insn.address_size);
  });
}

}  // namespace kvartz::cpu::x86
