#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "base/check.h"
#include "base/fd.h"
#include "base/sync.h"
#include "cpu/x86/interp/native.h"

namespace kvartz::cpu::x86 {
namespace {

// Executable memory, mapped twice: written here, run there. Never both in one mapping.
class StubArena {
 public:
  StubArena() { status_ = Map(); }

  const Result<>& status() const { return status_; }

  // All the stubs that there can be fit.
  NativeStub Add(std::span<const uint8_t> code) {
    VERIFY(exec_ != nullptr && used_ + code.size() <= kSize);
    std::memcpy(write_ + used_, code.data(), code.size());
    auto* stub = reinterpret_cast<NativeStub>(exec_ + used_);
    used_ += (code.size() + 15) & ~size_t{15};
    return stub;
  }

 private:
  // Rows x forms x immediates at about 100 bytes; touched as far as used.
  static constexpr size_t kSize = 16 << 20;

  Result<> Map() {
    UniqueFd fd = TRY(CreateMemFd("kvartz-stubs", kSize));
    write_ = TRY(MapOnce(fd, PROT_WRITE, "writable"));
    exec_ = TRY(MapOnce(fd, PROT_EXEC, "executable"));
    return {};
  }
  static Result<uint8_t*> MapOnce(const UniqueFd& fd, int access, const char* what) {
    void* map = mmap(nullptr, kSize, PROT_READ | access, MAP_SHARED, fd.get(), 0);
    if (map == MAP_FAILED)
      return Fail(ErrnoError(errno, std::string("cannot map ") + what + " memory"));
    return static_cast<uint8_t*>(map);
  }

  Result<> status_;
  uint8_t* write_ = nullptr;
  uint8_t* exec_ = nullptr;
  size_t used_ = 0;
};

enum Field : uint8_t { kFieldXmm0, kFieldReg, kFieldRm, kFieldVvvv, kFieldIs4 };

// The bytes of one stub, built front to back. rdi: NativeFrame, rsi: XsaveArea.
class Emitter {
 public:
  explicit Emitter(const Insn& insn) : insn_(insn), row_(*insn.row) {}

  std::vector<uint8_t> Build() {
    x87_ = false;
    for (unsigned i = 0; i < row_.operand_count; ++i) {
      const OperandKind kind = row_.operands[i].kind;
      x87_ |= kind == OperandKind::kSt0 || kind == OperandKind::kSti;
    }
    x87_ |= row_.map == OpcodeMap::kPrimary && row_.opcode >= 0xd8 && row_.opcode <= 0xdf;
    Prologue();
    Instruction();
    Epilogue();
    return code_;
  }

 private:
  void Byte(unsigned value) { code_.push_back(static_cast<uint8_t>(value)); }
  void Bytes(std::initializer_list<unsigned> values) {
    for (unsigned value : values) Byte(value);
  }
  void Disp32(size_t value) {
    for (unsigned i = 0; i < 4; ++i) Byte(static_cast<unsigned>(value >> (8 * i)) & 0xff);
  }
  // ModRM of register `reg` and [rdi + offset].
  void Frame(unsigned reg, size_t offset) {
    Byte(0x80 | (reg & 7) << 3 | 7);
    Disp32(offset);
  }
  static constexpr size_t Slot(unsigned field) {
    return offsetof(NativeFrame, vector) + field * 32;
  }

  enum class Move { kLoad, kStore };
  void MoveVector(Move move, unsigned field) {
    const unsigned opcode = move == Move::kLoad ? 0x10 : 0x11;  // (v)movups
    if (row_.vex) {
      Bytes({0xc5, 0xfc, opcode});
    } else {
      Bytes({0x0f, opcode});
    }
    Frame(field, Slot(field));
  }
  void MoveMmx(Move move, unsigned field) {
    Bytes({0x0f, move == Move::kLoad ? 0x6fu : 0x7fu});
    Frame(field, Slot(field));
  }
  void MoveGpr(Move move, unsigned reg, size_t offset) {
    Bytes({0x48, move == Move::kLoad ? 0x8bu : 0x89u});
    Frame(reg, offset);
  }

  // Calls `each(kind of register file, field)` for the register operands.
  template <typename Each>
  void ForRegisters(Each each) const {
    for (unsigned i = 0; i < row_.operand_count; ++i) {
      const OperandKind kind = row_.operands[i].kind;
      using enum OperandKind;
      switch (kind) {
        case kXmm:
        case kYmm:
          each(File::kVector, kFieldReg, i);
          break;
        case kXmmRm:
        case kYmmRm:
          if (!insn_.has_memory()) each(File::kVector, kFieldRm, i);
          break;
        case kXmmRmReg:
        case kYmmRmReg:
          each(File::kVector, kFieldRm, i);
          break;
        case kXmmVvvv:
        case kYmmVvvv:
          each(File::kVector, kFieldVvvv, i);
          break;
        case kXmmIs4:
        case kYmmIs4:
          each(File::kVector, kFieldIs4, i);
          break;
        case kFixedXmm:
          each(File::kVector, kFieldXmm0, i);
          break;
        case kMm:
          each(File::kMmx, kFieldReg, i);
          break;
        case kMmRm:
          if (!insn_.has_memory()) each(File::kMmx, kFieldRm, i);
          break;
        case kMmRmReg:
          each(File::kMmx, kFieldRm, i);
          break;
        case kReg:
          each(File::kGpr, kFieldReg, i);
          break;
        case kRm:
          if (!insn_.has_memory()) each(File::kGpr, kFieldRm, i);
          break;
        case kRmReg:
          each(File::kGpr, kFieldRm, i);
          break;
        default:
          break;
      }
    }
  }
  enum class File { kVector, kMmx, kGpr };

  void Prologue() {
    if (x87_) {
      Bytes({0x48, 0x0f, 0xae, 0x0e});  // fxrstor64 [rsi]
    } else {
      ForRegisters([this](File file, unsigned field, unsigned) {
        if (file == File::kVector) MoveVector(Move::kLoad, field);
        if (file == File::kMmx) MoveMmx(Move::kLoad, field), mmx_ = true;
        if (file == File::kGpr) MoveGpr(Move::kLoad, 0, offsetof(NativeFrame, gpr));
      });
      if ((row_.attributes & kStrLen) != 0) {
        MoveGpr(Move::kLoad, 0, offsetof(NativeFrame, rax));
        MoveGpr(Move::kLoad, 2, offsetof(NativeFrame, rdx));
      }
      if ((row_.attributes & kFp) != 0) {
        Bytes({0x0f, 0xae});  // ldmxcsr
        Frame(2, offsetof(NativeFrame, mxcsr));
      }
    }
    if (row_.flags.tested != 0) {
      Byte(0xff);  // push flags; popfq
      Frame(6, offsetof(NativeFrame, flags));
      Byte(0x9d);
    }
  }

  // The guest's instruction with renamed operands.
  void Instruction() {
    const bool memory = insn_.has_memory();
    unsigned modrm = insn_.modrm;
    if (x87_) {
      if (memory) modrm = 0x80 | (modrm & 0x38) | 7;
    } else {
      const unsigned reg = RegNumber(modrm);
      modrm = memory ? 0x80 | reg << 3 | 7 : 0xc0 | reg << 3 | RmNumber(modrm);
    }
    if (row_.vex) {
      const unsigned map = row_.map == OpcodeMap::k0f ? 1 : row_.map == OpcodeMap::k0f38 ? 2 : 3;
      const unsigned vvvv = UsesVvvv() ? unsigned{kFieldVvvv} : 0u;
      Bytes({0xc4, 0xe0 | map,
             (insn_.w() ? 0x80u : 0u) | (~vvvv & 15) << 3 | unsigned{insn_.vex_l} << 2 |
                 insn_.vex_pp});
    } else {
      switch (row_.prefix) {
        case PrefixRule::k66:
          Byte(0x66);
          break;
        case PrefixRule::kF3:
          Byte(0xf3);
          break;
        case PrefixRule::kF2:
          Byte(0xf2);
          break;
        default:
          break;
      }
      if (insn_.w() && !x87_) Byte(0x48);  // register fields are below 8: no other REX bit
      if (row_.map != OpcodeMap::kPrimary) Byte(0x0f);
      if (row_.map == OpcodeMap::k0f38) Byte(0x38);
      if (row_.map == OpcodeMap::k0f3a) Byte(0x3a);
    }
    Byte(row_.opcode);
    if (row_.has_modrm) Byte(modrm);
    if (memory) Disp32(offsetof(NativeFrame, memory));
    if (row_.imm[0] == ImmKind::kIb) Byte(static_cast<uint8_t>(insn_.imm));
    if (row_.imm[0] == ImmKind::kIs4) Byte(kFieldIs4 << 4);
  }

  unsigned RegNumber(unsigned modrm) const {
    unsigned number = (modrm >> 3) & 7;  // an opcode extension stays
    ForRegisters([&](File file, unsigned field, unsigned) {
      if (field == kFieldReg) number = file == File::kGpr ? 0 : unsigned{kFieldReg};
    });
    return number;
  }
  unsigned RmNumber(unsigned modrm) const {
    unsigned number = modrm & 7;
    ForRegisters([&](File file, unsigned field, unsigned) {
      if (field == kFieldRm) number = file == File::kGpr ? 0 : unsigned{kFieldRm};
    });
    return number;
  }
  bool UsesVvvv() const {
    bool used = false;
    ForRegisters([&](File, unsigned field, unsigned) { used |= field == kFieldVvvv; });
    return used;
  }

  void Epilogue() {
    if (row_.flags.written() != 0) {
      Bytes({0x9c, 0x8f});  // pushfq; pop flags
      Frame(0, offsetof(NativeFrame, flags));
    }
    if (x87_) {
      // FNSTSW AX is the one x87 instruction with a general register operand.
      MoveGpr(Move::kStore, 0, offsetof(NativeFrame, gpr));
      Bytes({0x48, 0x0f, 0xae, 0x06});  // fxsave64 [rsi]
      Bytes({0xdb, 0xe3});              // fninit
      RestoreMxcsr();
      Byte(0xc3);
      return;
    }
    if ((row_.attributes & kFp) != 0) {
      Bytes({0x0f, 0xae});  // stmxcsr
      Frame(3, offsetof(NativeFrame, mxcsr));
      RestoreMxcsr();
    }
    ForRegisters([this](File file, unsigned field, unsigned operand) {
      if (operand != 0) return;
      if (file == File::kVector) MoveVector(Move::kStore, field);
      if (file == File::kMmx) MoveMmx(Move::kStore, field);
      if (file == File::kGpr) MoveGpr(Move::kStore, 0, offsetof(NativeFrame, gpr));
    });
    if ((row_.attributes & kStrIndex) != 0) MoveGpr(Move::kStore, 1, offsetof(NativeFrame, rcx));
    if ((row_.attributes & kStrMask) != 0) MoveVector(Move::kStore, kFieldXmm0);
    if (mmx_) Bytes({0x0f, 0x77});            // emms
    if (row_.vex) Bytes({0xc5, 0xf8, 0x77});  // vzeroupper
    Byte(0xc3);
  }
  void RestoreMxcsr() {
    Bytes({0x0f, 0xae});  // ldmxcsr
    Frame(2, offsetof(NativeFrame, host_mxcsr));
  }

  const Insn& insn_;
  const Row& row_;
  bool x87_ = false;
  bool mmx_ = false;
  std::vector<uint8_t> code_;
};

// Stubs by row, variant (register or memory, W, L; x87: the register) and immediate. Guarded by its
// lock; published stubs are read without it.
class StubTable {
 public:
  const Result<>& status() const { return arena_.status(); }
  NativeStub Find(const Insn& insn) {
    const size_t row = static_cast<size_t>(insn.row - InsnRows().data());
    std::atomic<Variants*>& entry = rows_[row];
    Variants* variants = entry.load(std::memory_order_acquire);
    if (!variants) variants = AddRow(entry, insn.row->imm[0] == ImmKind::kIb ? 256 : 1);
    const size_t index =
        Variant(insn) * variants->immediates + (variants->immediates == 256 ? insn.imm & 0xff : 0);
    NativeStub stub = variants->stubs[index].load(std::memory_order_acquire);
    return stub ? stub : Build(insn, variants->stubs[index]);
  }

 private:
  static constexpr unsigned kVariants = 16;
  struct Variants {
    size_t immediates;
    std::unique_ptr<std::atomic<NativeStub>[]> stubs;
  };

  // W makes another stub only where it changes what the instruction does: a guest must not be able
  // to fill the arena with encodings of the same thing.
  static bool UsesW(const Row& row) {
    bool uses = (row.attributes & kStrLen) != 0;
    for (unsigned i = 0; i < row.operand_count; ++i) uses |= row.operands[i].size == kSizeW;
    return uses;
  }
  static unsigned Variant(const Insn& insn) {
    if (insn.row->sti) return insn.modrm & 7;
    const bool w = insn.w() && UsesW(*insn.row);
    return (insn.has_memory() ? 1u : 0u) | (w ? 2u : 0u) | unsigned{insn.vex_l} << 2;
  }
  Variants* AddRow(std::atomic<Variants*>& entry, size_t immediates) {
    LockGuard guard(mutex_);
    if (Variants* there = entry.load(std::memory_order_acquire)) return there;
    auto variants = std::make_unique<Variants>();
    variants->immediates = immediates;
    variants->stubs = std::make_unique<std::atomic<NativeStub>[]>(kVariants * immediates);
    entry.store(variants.get(), std::memory_order_release);
    owned_.push_back(std::move(variants));
    return owned_.back().get();
  }
  NativeStub Build(const Insn& insn, std::atomic<NativeStub>& slot) {
    LockGuard guard(mutex_);
    if (NativeStub there = slot.load(std::memory_order_acquire)) return there;
    NativeStub stub = arena_.Add(Emitter(insn).Build());
    slot.store(stub, std::memory_order_release);
    return stub;
  }

  std::vector<std::atomic<Variants*>> rows_{InsnRows().size()};
  Mutex mutex_;
  StubArena arena_;
  std::vector<std::unique_ptr<Variants>> owned_;
};

// Shared by every CPU of the process: code for the host, no guest state.
StubTable& Table() {
  static StubTable table;
  return table;
}

}  // namespace

Result<> PrepareStubs() {
  if (const Result<>& status = Table().status(); !status) {
    return Fail(
        Error(status.error())
            .In("the own engine runs vector and x87 instructions from executable memory, which "
                "this host refuses (a limit or a security policy of the process?)"));
  }
  return {};
}

NativeStub FindStub(const Insn& insn) { return Table().Find(insn); }

}  // namespace kvartz::cpu::x86
