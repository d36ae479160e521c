// Control and state of the vector and x87 units: MXCSR, FXSAVE, XSAVE and kin, x87 environment.
// Intel SDM vol. 1 ch. 8, 13.
#include <algorithm>
#include <cstddef>

#include "cpu/x86/interp/native.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint64_t kX87 = 1, kSseState = 2, kAvxState = 4;
constexpr uint32_t kMxcsrMask = 0xffff;
constexpr unsigned kHeaderOffset = 512, kAvxOffset = 576;

uint64_t LinearBase(const Cpu& cpu, const Insn& insn) {
  return cpu.code_mode == CodeMode::k64 && insn.segment < kFs ? 0 : cpu.seg[insn.segment].base;
}

void RequireAlignment(Cpu& cpu, const Insn& insn, uint64_t offset, unsigned alignment) {
  if ((LinearBase(cpu, insn) + offset) & (alignment - 1)) Raise(cpu, kGP, 0);
}

// Whole areas are moved in pieces; the last byte of every page is reached before anything changes.
void ReadArea(Cpu& cpu, const Insn& insn, uint64_t offset, void* data, unsigned size) {
  for (unsigned done = 0; done < size;) {
    const unsigned piece = std::min(64u, size - done);
    ReadMemBytes(cpu, insn.seg(), offset + done, static_cast<uint8_t*>(data) + done, piece);
    done += piece;
  }
}
void CheckArea(Cpu& cpu, const Insn& insn, uint64_t offset, unsigned size) {
  for (unsigned done = 0; done < size; done += 64)
    CheckWrite(cpu, insn.seg(), offset + done, std::min(64u, size - done));
}
void WriteArea(Cpu& cpu, const Insn& insn, uint64_t offset, const void* data, unsigned size) {
  for (unsigned done = 0; done < size;) {
    const unsigned piece = std::min(64u, size - done);
    WriteMemBytes(cpu, insn.seg(), offset + done, static_cast<const uint8_t*>(data) + done, piece);
    done += piece;
  }
}

unsigned XmmCount(const Cpu& cpu) { return cpu.code_mode == CodeMode::k64 ? 16 : 8; }

// Without REX.W the instruction and data pointers are 32 bits and a selector, which this CPU always
// stores as 0 (CPUID.7.EBX[13]).
uint64_t StoredPointer(const Insn& insn, uint64_t pointer) {
  return insn.w() ? pointer : static_cast<uint32_t>(pointer);
}

// The legacy region as FXSAVE lays it out.
void FillX87(const Cpu& cpu, const Insn& insn, uint8_t* area) {
  XsaveArea image = cpu.fpu;
  image.fip = StoredPointer(insn, image.fip);
  image.fdp = StoredPointer(insn, image.fdp);
  image.reserved = 0;
  std::memcpy(area, &image, 24);
  for (unsigned i = 0; i < 8; ++i) {
    std::memcpy(area + 32 + 16 * i, image.st[i], 10);
    std::memset(area + 32 + 16 * i + 10, 0, 6);
  }
}
void FillMxcsr(const Cpu& cpu, uint8_t* area) {
  std::memcpy(area + 24, &cpu.fpu.mxcsr, 4);
  std::memcpy(area + 28, &kMxcsrMask, 4);
}

// FSW's summary bits follow from exceptions and masks, whatever was loaded.
void NormalizeFsw(XsaveArea& fpu) {
  const bool pending = (fpu.fsw & ~fpu.fcw & 0x3f) != 0;
  fpu.fsw = static_cast<uint16_t>(pending ? fpu.fsw | 0x8080 : fpu.fsw & ~0x8080);
}

void LoadX87(Cpu& cpu, const Insn& insn, const uint8_t* area) {
  XsaveArea& fpu = cpu.fpu;
  const uint32_t mxcsr = fpu.mxcsr;
  std::memcpy(static_cast<void*>(&fpu), area, 24);
  fpu.mxcsr = mxcsr;
  fpu.reserved = 0;
  fpu.fcw = static_cast<uint16_t>((fpu.fcw & 0x1f3f) | 0x40);
  fpu.fop &= 0x7ff;
  fpu.fip = StoredPointer(insn, fpu.fip);
  fpu.fdp = StoredPointer(insn, fpu.fdp);
  for (unsigned i = 0; i < 8; ++i) std::memcpy(fpu.st[i], area + 32 + 16 * i, 10);
  NormalizeFsw(fpu);
}

void InitX87(XsaveArea& fpu) {
  TurnX87(fpu, 0);
  fpu.fcw = 0x37f;
  fpu.fsw = 0;
  fpu.ftw = 0;
  fpu.fop = 0;
  fpu.fip = fpu.fdp = 0;
}

void CheckMxcsr(Cpu& cpu, uint32_t value) {
  if (value & ~kMxcsrMask) Raise(cpu, kGP, 0);
}

// Full tag word (2 bits a physical register) from the abridged one and the contents (SDM vol.
// 1 8.1.7).
uint16_t FullTags(const XsaveArea& fpu) {
  const unsigned top = (fpu.fsw >> 11) & 7;
  uint16_t tags = 0;
  for (unsigned physical = 0; physical < 8; ++physical) {
    unsigned tag = 3;
    if (fpu.ftw & (1 << physical)) {
      const uint8_t* value = fpu.st[(physical - top) & 7];
      uint64_t mantissa;
      uint16_t exponent;
      std::memcpy(&mantissa, value, 8);
      std::memcpy(&exponent, value + 8, 2);
      exponent &= 0x7fff;
      if (exponent == 0 && mantissa == 0) {
        tag = 1;
      } else {
        tag = exponent == 0 || exponent == 0x7fff || !(mantissa >> 63) ? 2 : 0;
      }
    }
    tags = static_cast<uint16_t>(tags | tag << (2 * physical));
  }
  return tags;
}

// The environment in memory, four layouts by operand size and mode (SDM vol. 1 figures 8-9 to
// 8-12).
struct Environment {
  uint8_t bytes[28] = {};
  unsigned size = 28;
};

bool RealFormat(const Cpu& cpu) { return !cpu.protected_mode() || cpu.virtual_8086(); }

Environment MakeEnvironment(const Cpu& cpu, const Insn& insn) {
  const XsaveArea& fpu = cpu.fpu;
  Environment env;
  const bool wide = insn.operand_size != 2;
  env.size = wide ? 28 : 14;
  const unsigned step = wide ? 4 : 2;
  const auto put = [&](unsigned slot, uint32_t value) {
    std::memcpy(env.bytes + slot * step, &value, step);
  };
  const uint32_t high = wide ? 0xffff0000u : 0;
  put(0, fpu.fcw | high);
  put(1, fpu.fsw | high);
  put(2, FullTags(fpu) | high);
  const uint32_t fip = static_cast<uint32_t>(fpu.fip), fdp = static_cast<uint32_t>(fpu.fdp);
  if (!RealFormat(cpu)) {
    put(3, fip);
    put(4, wide ? uint32_t{fpu.fop} << 16 : 0);
    put(5, fdp);
    put(6, high);
  } else if (wide) {
    put(3, (fip & 0xffff) | high);
    put(4, (fip >> 16 & 0xffff) << 12 | fpu.fop);
    put(5, (fdp & 0xffff) | high);
    put(6, (fdp >> 16 & 0xffff) << 12);
  } else {
    put(3, fip);
    put(4, (fip >> 16 & 0xf) << 12 | fpu.fop);
    put(5, fdp);
    put(6, (fdp >> 16 & 0xf) << 12);
  }
  return env;
}

void LoadEnvironment(Cpu& cpu, const Insn& insn, const Environment& env) {
  XsaveArea& fpu = cpu.fpu;
  const bool wide = insn.operand_size != 2;
  const unsigned step = wide ? 4 : 2;
  const auto get = [&](unsigned slot) {
    uint32_t value = 0;
    std::memcpy(&value, env.bytes + slot * step, step);
    return value;
  };
  fpu.fcw = static_cast<uint16_t>((get(0) & 0x1f3f) | 0x40);
  TurnX87(fpu, get(1) >> 11 & 7);
  fpu.fsw = static_cast<uint16_t>(get(1));
  const uint32_t tags = get(2);
  fpu.ftw = 0;
  for (unsigned i = 0; i < 8; ++i) {
    if ((tags >> (2 * i) & 3) != 3) fpu.ftw = static_cast<uint8_t>(fpu.ftw | 1 << i);
  }
  if (!RealFormat(cpu)) {
    fpu.fip = get(3);
    fpu.fop = wide ? get(4) >> 16 & 0x7ff : 0;
    fpu.fdp = get(5);
  } else {
    const unsigned bits = wide ? 0xffff : 0xf;
    fpu.fip = (get(3) & 0xffff) | (get(4) >> 12 & bits) << 16;
    fpu.fop = get(4) & 0x7ff;
    fpu.fdp = (get(5) & 0xffff) | (get(6) >> 12 & bits) << 16;
  }
  NormalizeFsw(fpu);
}

Environment ReadEnvironment(Cpu& cpu, const Insn& insn, uint64_t offset) {
  Environment env;
  env.size = insn.operand_size != 2 ? 28 : 14;
  ReadArea(cpu, insn, offset, env.bytes, env.size);
  return env;
}

}  // namespace

// ---- MXCSR
void Exec_LDMXCSR(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kSse);
  const uint32_t value = ReadMem<uint32_t>(cpu, insn.seg(), EffectiveAddress(cpu, insn));
  CheckMxcsr(cpu, value);
  cpu.fpu.mxcsr = value;
}
void Exec_STMXCSR(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kSse);
  WriteMem<uint32_t>(cpu, insn.seg(), EffectiveAddress(cpu, insn), cpu.fpu.mxcsr);
}
void Exec_VLDMXCSR(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kAvx);
  Exec_LDMXCSR(cpu, insn);
}
void Exec_VSTMXCSR(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kAvx);
  Exec_STMXCSR(cpu, insn);
}

// ---- FXSAVE, FXRSTOR
void Exec_FXSAVE(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  const uint64_t offset = EffectiveAddress(cpu, insn);
  RequireAlignment(cpu, insn, offset, 16);
  uint8_t area[416] = {};
  FillX87(cpu, insn, area);
  unsigned size = 160;
  if (cpu.cr4 & cr4::kOsfxsr) {
    FillMxcsr(cpu, area);
    std::memcpy(area + 160, cpu.fpu.xmm, XmmCount(cpu) * 16);
    size += XmmCount(cpu) * 16;
  }
  CheckArea(cpu, insn, offset, 512);
  WriteArea(cpu, insn, offset, area, size);
}
void Exec_FXRSTOR(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  const uint64_t offset = EffectiveAddress(cpu, insn);
  RequireAlignment(cpu, insn, offset, 16);
  uint8_t area[512];
  ReadArea(cpu, insn, offset, area, sizeof(area));
  if (cpu.cr4 & cr4::kOsfxsr) {
    uint32_t mxcsr;
    std::memcpy(&mxcsr, area + 24, 4);
    CheckMxcsr(cpu, mxcsr);
    cpu.fpu.mxcsr = mxcsr;
    std::memcpy(cpu.fpu.xmm, area + 160, XmmCount(cpu) * 16);
  }
  LoadX87(cpu, insn, area);
}

// ---- XSAVE family: standard and compacted layouts of x87, SSE and AVX state.
namespace {

void CheckXsave(Cpu& cpu) {
  if (!(cpu.cr4 & cr4::kOsxsave)) Raise(cpu, kUD);
  if (cpu.cr0 & cr0::kTs) Raise(cpu, kNM);
}

uint64_t RequestedFeatures(const Cpu& cpu) {
  const uint64_t mask = (cpu.gpr[kRdx] & 0xffffffff) << 32 | (cpu.gpr[kRax] & 0xffffffff);
  return mask & cpu.xcr0;
}

// Components that aren't in their initial configuration.
uint64_t InUse(const Cpu& cpu) {
  const XsaveArea& fpu = cpu.fpu;
  const auto any = [](const auto& bytes) {
    return std::any_of(&bytes[0][0], &bytes[0][0] + sizeof(bytes),
                       [](uint8_t b) { return b != 0; });
  };
  uint64_t in_use = 0;
  if (fpu.fcw != 0x37f || fpu.fsw || fpu.ftw || fpu.fop || fpu.fip || fpu.fdp || any(fpu.st))
    in_use |= kX87;
  if (any(fpu.xmm)) in_use |= kSseState;
  if (any(fpu.ymm_high)) in_use |= kAvxState;
  return in_use;
}

enum class Layout { kStandard, kInitOptimized, kCompacted };

void Save(Cpu& cpu, const Insn& insn, Layout layout) {
  CheckXsave(cpu);
  const uint64_t offset = EffectiveAddress(cpu, insn);
  RequireAlignment(cpu, insn, offset, 64);
  const uint64_t requested = RequestedFeatures(cpu);
  const uint64_t in_use = InUse(cpu);
  const uint64_t stored = layout == Layout::kStandard ? requested : requested & in_use;
  const bool compacted = layout == Layout::kCompacted;
  const unsigned avx_bytes = XmmCount(cpu) * 16;

  uint64_t header[2] = {};
  if (compacted) {
    // XSAVEC: MXCSR outside its initial value counts as SSE state in use.
    uint64_t bv = requested & in_use;
    if ((requested & kSseState) && cpu.fpu.mxcsr != 0x1f80) bv |= kSseState;
    header[0] = bv;
    header[1] = requested | uint64_t{1} << 63;
  } else {
    ReadArea(cpu, insn, offset + kHeaderOffset, header, 8);
    header[0] = (header[0] & ~requested) | (requested & in_use);
  }
  CheckArea(cpu, insn, offset, (requested & kAvxState) ? kAvxOffset + 256 : kAvxOffset);

  uint8_t legacy[416] = {};
  FillX87(cpu, insn, legacy);
  FillMxcsr(cpu, legacy);
  if (stored & kX87) {
    WriteArea(cpu, insn, offset, legacy, 24);
    WriteArea(cpu, insn, offset + 32, legacy + 32, 128);
  }
  const bool mxcsr =
      compacted ? (header[0] & kSseState) != 0 : (requested & (kSseState | kAvxState)) != 0;
  if (mxcsr) WriteArea(cpu, insn, offset + 24, legacy + 24, 8);
  if (stored & kSseState || (compacted && (header[0] & kSseState))) {
    WriteArea(cpu, insn, offset + 160, cpu.fpu.xmm, XmmCount(cpu) * 16);
  }
  if (stored & kAvxState) WriteArea(cpu, insn, offset + kAvxOffset, cpu.fpu.ymm_high, avx_bytes);
  WriteArea(cpu, insn, offset + kHeaderOffset, header, compacted ? 16 : 8);
}

}  // namespace

void Exec_XSAVE(Cpu& cpu, const Insn& insn) { Save(cpu, insn, Layout::kStandard); }
void Exec_XSAVEOPT(Cpu& cpu, const Insn& insn) { Save(cpu, insn, Layout::kInitOptimized); }
void Exec_XSAVEC(Cpu& cpu, const Insn& insn) { Save(cpu, insn, Layout::kCompacted); }

void Exec_XRSTOR(Cpu& cpu, const Insn& insn) {
  CheckXsave(cpu);
  const uint64_t offset = EffectiveAddress(cpu, insn);
  RequireAlignment(cpu, insn, offset, 64);
  uint8_t area[kAvxOffset];
  ReadArea(cpu, insn, offset, area, sizeof(area));
  uint64_t header[8];
  std::memcpy(header, area + kHeaderOffset, sizeof(header));
  const bool compacted = (header[1] >> 63) != 0;
  const uint64_t format = compacted ? header[1] & ~(uint64_t{1} << 63) : cpu.xcr0;
  if ((!compacted && header[1] != 0) || (format & ~cpu.xcr0) || (header[0] & ~format) ||
      (!compacted && header[2] != 0) ||
      (compacted && std::any_of(header + 2, header + 8, [](uint64_t word) { return word != 0; }))) {
    Raise(cpu, kGP, 0);
  }
  const uint64_t requested = RequestedFeatures(cpu);
  const uint64_t present = header[0];
  uint8_t avx[256];
  const unsigned avx_bytes = XmmCount(cpu) * 16;
  if (requested & present & kAvxState) ReadArea(cpu, insn, offset + kAvxOffset, avx, avx_bytes);
  const bool load_mxcsr = compacted ? (requested & present & kSseState) != 0
                                    : (requested & (kSseState | kAvxState)) != 0;
  uint32_t mxcsr = cpu.fpu.mxcsr;
  if (load_mxcsr) {
    std::memcpy(&mxcsr, area + 24, 4);
    CheckMxcsr(cpu, mxcsr);
  } else if (compacted && (requested & kSseState)) {
    mxcsr = 0x1f80;
  }

  XsaveArea& fpu = cpu.fpu;
  fpu.mxcsr = mxcsr;
  if (requested & kX87) {
    if (present & kX87) {
      LoadX87(cpu, insn, area);
    } else {
      InitX87(fpu);
      std::memset(fpu.st, 0, sizeof(fpu.st));
    }
  }
  if (requested & kSseState) {
    if (present & kSseState) {
      std::memcpy(fpu.xmm, area + 160, avx_bytes);
    } else {
      std::memset(fpu.xmm, 0, avx_bytes);
    }
  }
  if (requested & kAvxState) {
    if (present & kAvxState) {
      std::memcpy(fpu.ymm_high, avx, avx_bytes);
    } else {
      std::memset(fpu.ymm_high, 0, avx_bytes);
    }
  }
}

// ---- x87 control
void Exec_FNINIT(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  InitX87(cpu.fpu);
}
void Exec_FNCLEX(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  cpu.fpu.fsw &= 0x7f00;
}
// Of the 8087 and 80287; no operation since.
void Exec_FNENI(Cpu& cpu, const Insn& insn) { CheckVectorEnabled(cpu, VectorClass::kX87); }
void Exec_FNDISI(Cpu& cpu, const Insn& insn) { CheckVectorEnabled(cpu, VectorClass::kX87); }
void Exec_FNSETPM(Cpu& cpu, const Insn& insn) { CheckVectorEnabled(cpu, VectorClass::kX87); }

void Exec_FWAIT(Cpu& cpu, const Insn& insn) {
  constexpr uint64_t kBoth = cr0::kMp | cr0::kTs;
  if ((cpu.cr0 & kBoth) == kBoth) Raise(cpu, kNM);
  CheckX87Pending(cpu);
}

void Exec_FLDCW(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  CheckX87Pending(cpu);
  const uint16_t value = ReadMem<uint16_t>(cpu, insn.seg(), EffectiveAddress(cpu, insn));
  cpu.fpu.fcw = static_cast<uint16_t>((value & 0x1f3f) | 0x40);
  NormalizeFsw(cpu.fpu);
}
void Exec_FNSTCW(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  WriteMem<uint16_t>(cpu, insn.seg(), EffectiveAddress(cpu, insn), cpu.fpu.fcw);
}
void Exec_FNSTSW(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  if (insn.has_memory()) {
    WriteMem<uint16_t>(cpu, insn.seg(), EffectiveAddress(cpu, insn), cpu.fpu.fsw);
  } else {
    cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xffffull) | cpu.fpu.fsw;
  }
}

void Exec_FNSTENV(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  const uint64_t offset = EffectiveAddress(cpu, insn);
  const Environment env = MakeEnvironment(cpu, insn);
  CheckArea(cpu, insn, offset, env.size);
  WriteArea(cpu, insn, offset, env.bytes, env.size);
  cpu.fpu.fcw |= 0x3f;
  NormalizeFsw(cpu.fpu);
}
void Exec_FLDENV(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  CheckX87Pending(cpu);
  LoadEnvironment(cpu, insn, ReadEnvironment(cpu, insn, EffectiveAddress(cpu, insn)));
}
void Exec_FNSAVE(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  const uint64_t offset = EffectiveAddress(cpu, insn);
  const Environment env = MakeEnvironment(cpu, insn);
  CheckArea(cpu, insn, offset, env.size + 80);
  WriteArea(cpu, insn, offset, env.bytes, env.size);
  for (unsigned i = 0; i < 8; ++i)
    WriteArea(cpu, insn, offset + env.size + 10 * i, cpu.fpu.st[i], 10);
  InitX87(cpu.fpu);
}
void Exec_FRSTOR(Cpu& cpu, const Insn& insn) {
  CheckVectorEnabled(cpu, VectorClass::kX87);
  CheckX87Pending(cpu);
  const uint64_t offset = EffectiveAddress(cpu, insn);
  const Environment env = ReadEnvironment(cpu, insn, offset);
  uint8_t registers[8][10];
  ReadArea(cpu, insn, offset + env.size, registers, sizeof(registers));
  LoadEnvironment(cpu, insn, env);
  for (unsigned i = 0; i < 8; ++i) std::memcpy(cpu.fpu.st[i], registers[i], 10);
}

}  // namespace kvartz::cpu::x86
