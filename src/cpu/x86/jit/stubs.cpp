#include "cpu/x86/jit/stubs.h"

#include <cstddef>

#include "cpu/x86/jit/assembler.h"
#include "cpu/x86/jit/state.h"
#include "cpu/x86/jit/translator.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86::jit {
namespace {

constexpr HostReg kHostSaved[] = {kRegBx, kRegBp, kReg12, kReg13, kReg14, kReg15};

HostMem Gs(size_t offset) { return HostMem::Gs(offset); }

// The code of the stubs, one after the other.
class StubEmitter {
 public:
  StubEmitter(Assembler& as, const StubTargets& targets) : as_(as), targets_(targets) {}

  Stubs Run() {
    Stubs stubs;
    save_vectors_ = as_.run();
    SaveVectors();
    stubs.load_vectors = load_vectors_ = as_.run();
    LoadVectors();
    save_x87_ = as_.run();
    SaveX87();
    stubs.load_x87 = load_x87_ = as_.run();
    LoadX87();
    stubs.enter = reinterpret_cast<Stubs::Enter>(as_.run());
    Enter();
    stubs.exit = as_.run();
    Exit();
    for (unsigned cls = 0; cls < kClassCount; ++cls) {
      for (unsigned write = 0; write < 2; ++write) {
        stubs.fill[cls][write] = as_.run();
        Fill(cls, write != 0, false);
        stubs.fill_at[cls][write] = as_.run();
        Fill(cls, write != 0, true);
      }
    }
    stubs.execute = as_.run();
    Called(targets_.execute);
    stubs.execute_end = as_.run();
    Jumped(targets_.execute_end);
    stubs.interpret = as_.run();
    Jumped(targets_.interpret);
    stubs.dispatch = as_.run();
    Jumped(targets_.dispatch);
    stubs.enter_page[0] = as_.run();
    EnterPage(Tlb::kSupervisor, stubs.dispatch);
    stubs.enter_page[1] = as_.run();
    EnterPage(Tlb::kUser, stubs.dispatch);
    stubs.link = as_.run();
    Jumped(targets_.link);
    stubs.link_same = as_.run();
    SaveFlags();
    Jumped(targets_.link_same);
    stubs.read_tsc = as_.run();
    ReadTsc(targets_.read_tsc);
    stubs.read_tscp = as_.run();
    ReadTsc(targets_.read_tscp);
    stubs.leave = as_.run();
    SaveFlags();
    as_.Byte(0x41), as_.Byte(0x58 | (kS1 & 7));  // pop: behind the call
    Jumped(targets_.leave);
    return stubs;
  }

 private:
  static bool InHost(unsigned guest) { return HostOf(guest) != kNoReg; }
  void StoreGprs() {
    for (unsigned guest = 0; guest < 16; ++guest) {
      if (InHost(guest)) as_.Store(GprAt(guest), HostOf(guest));
    }
  }
  void LoadGprs() {
    for (unsigned guest = 0; guest < 16; ++guest) {
      if (InHost(guest)) as_.Load(HostOf(guest), GprAt(guest));
    }
  }
  // To State::saved_flags; S0 is spoilt.
  void SaveFlags() {
    as_.Mov(kS0, kRegAx);
    as_.FlagsToAx();
    as_.StoreAx(Gs(offsetof(State, saved_flags)));
    as_.Mov(kRegAx, kS0);
  }
  // From State::saved_flags; spoils nothing else but S1.
  void LoadFlags() {
    as_.Mov(kS1, kRegAx);
    as_.LoadAx(Gs(offsetof(State, saved_flags)));
    as_.AxToFlags();
    as_.Mov(kRegAx, kS1);
  }

  static size_t Fpu(size_t offset) { return offsetof(State, cpu) + offsetof(Cpu, fpu) + offset; }
  // (V)MOVUPS of the low half, VEXTRACTF128/VINSERTF128 of the high one.
  void MoveLow(unsigned opcode, unsigned reg) {
    as_.RegMem(Assembler::k32, 0x0f | opcode << 8, reg,
               Gs(Fpu(offsetof(XsaveArea, xmm) + reg * 16)));
  }
  void MoveHigh(unsigned opcode, unsigned reg) {
    const HostMem mem = Gs(Fpu(offsetof(XsaveArea, ymm_high) + reg * 16));
    const bool load = opcode == 0x18;
    as_.StatePrefix(mem);
    as_.Byte(0xc4);
    as_.Byte((reg < 8 ? 0x80u : 0u) | 0x40 | 0x20 | 3);
    as_.Byte((load ? (~reg & 15) << 3 : 0x78u) | 4 | 1);
    as_.Byte(opcode);
    as_.ModRmMem(reg & 7, mem);
    as_.Byte(1);
  }
  void Mxcsr(unsigned digit, size_t offset) {
    as_.RegMem(Assembler::k32, 0xae0f, digit, Gs(offset));
  }

  void SaveVectors() {
    for (unsigned reg = 0; reg < 16; ++reg) MoveLow(0x11, reg);
    if (targets_.avx) {
      for (unsigned reg = 0; reg < 16; ++reg) MoveHigh(0x19, reg);
      as_.Byte(0xc5), as_.Byte(0xf8), as_.Byte(0x77);  // vzeroupper
    }
    Mxcsr(3, Fpu(offsetof(XsaveArea, mxcsr)));
    Mxcsr(2, offsetof(State, host_mxcsr));
    as_.StoreByte(Gs(offsetof(State, vector_live)), 0);
    as_.Ret();
  }
  void LoadVectors() {
    for (unsigned reg = 0; reg < 16; ++reg) MoveLow(0x10, reg);
    if (targets_.avx) {
      for (unsigned reg = 0; reg < 16; ++reg) MoveHigh(0x18, reg);
    }
    Mxcsr(2, Fpu(offsetof(XsaveArea, mxcsr)));
    as_.StoreByte(Gs(offsetof(State, vector_live)), 1);
    as_.Ret();
  }

  // XSAVE64 and XRSTOR64 of the x87 component alone, by digit of 0F AE. It counts as in use
  // meanwhile; the header's bit is put back. RAX, RDX are used.
  void MoveX87(unsigned digit) {
    const HostMem in_use = Gs(Fpu(offsetof(XsaveArea, xstate_bv)));
    as_.RegMem(Assembler::k32, 0xff, 6, in_use);  // push
    as_.RegMem(Assembler::k32, 0x80, 1, in_use);  // or
    as_.Byte(1);
    as_.MovImm32(kRegAx, 1);
    as_.MovImm32(kRegDx, 0);
    as_.RegMem(Assembler::k64, 0xae0f, digit, Gs(Fpu(0)));
    as_.RegMem(Assembler::k32, 0x8f, 0, in_use);  // pop
  }
  // None of it waits for a pending exception.
  void SaveX87() {
    if (!targets_.xsave) return;
    MoveX87(4);
    as_.Byte(0xdb), as_.Byte(0xe3);                                               // fninit
    as_.RegMem(Assembler::k32, 0xb70f, kRegAx, Gs(offsetof(State, x87_offset)));  // movzx
    as_.Add(kRegAx, Gs(offsetof(State, x87_page)));
    as_.Store(Gs(Fpu(offsetof(XsaveArea, fip))), kRegAx);
    as_.Load(kRegAx, Gs(offsetof(State, x87_address)));
    as_.Store(Gs(Fpu(offsetof(XsaveArea, fdp))), kRegAx);
    as_.LoadAx(Gs(offsetof(State, x87_opcode)));
    as_.StoreAx(Gs(Fpu(offsetof(XsaveArea, fop))));
    as_.StoreByte(Gs(offsetof(State, x87_live)), 0);
    as_.Ret();
  }
  void LoadX87() {
    if (!targets_.xsave) return;
    as_.Byte(0x50 | kRegAx), as_.Byte(0x50 | kRegDx);
    as_.Load(kRegAx, Gs(Fpu(offsetof(XsaveArea, fdp))));
    as_.Store(Gs(offsetof(State, x87_address)), kRegAx);
    as_.LoadAx(Gs(Fpu(offsetof(XsaveArea, fop))));
    as_.StoreAx(Gs(offsetof(State, x87_opcode)));
    as_.Load(kRegDx, Gs(Fpu(offsetof(XsaveArea, fip))));
    as_.Mov(kRegAx, kRegDx);
    as_.RegReg(Assembler::k32, 0x81, 4, kRegAx);  // and
    as_.Dword(0xfff);
    as_.StoreAx(Gs(offsetof(State, x87_offset)));
    as_.RegReg(Assembler::k64, 0x81, 4, kRegDx);
    as_.Dword(0xfffff000);
    as_.Store(Gs(offsetof(State, x87_page)), kRegDx);
    MoveX87(5);
    as_.StoreByte(Gs(offsetof(State, x87_live)), 1);
    as_.Byte(0x58 | kRegDx), as_.Byte(0x58 | kRegAx);
    as_.Ret();
  }

  void Enter() {  // (rdi: State*, rsi: target)
    for (HostReg reg : kHostSaved) as_.Rex(Assembler::k32, 0, 0, reg), as_.Byte(0x50 | (reg & 7));
    as_.Lea(kRegSp, {.base = kRegSp, .disp = -8});
    as_.Store(Gs(offsetof(State, host_rsp)), kRegSp);
    as_.Store(Gs(offsetof(State, jump_to)), kRegSi);
    LoadFlags();
    LoadGprs();
    as_.JmpMem(Gs(offsetof(State, jump_to)));
  }
  void Exit() {
    as_.Load(kRegSp, Gs(offsetof(State, host_rsp)));
    as_.Lea(kRegSp, {.base = kRegSp, .disp = 8});
    for (unsigned i = std::size(kHostSaved); i-- > 0;) {
      as_.Rex(Assembler::k32, 0, 0, kHostSaved[i]);
      as_.Byte(0x58 | (kHostSaved[i] & 7));
    }
    as_.Ret();
  }

  void SaveIfLive(size_t live, const uint8_t* save) {
    as_.CmpByte(Gs(live), 0);
    uint8_t* none = as_.Jcc(kCcE, as_.run());
    as_.Call(save);
    as_.PatchHere(none);
  }
  void LoadIfTold(uint8_t flag, const uint8_t* load) {
    as_.Load(kS1, Gs(offsetof(State, site)));
    as_.RegMem(Assembler::k32, 0xf6, 0, {.base = kS1, .disp = offsetof(Site, flags)});  // test byte
    as_.Byte(flag);
    uint8_t* none = as_.Jcc(kCcE, as_.run());
    as_.Call(load);
    as_.PatchHere(none);
  }
  // The guest's registers to memory, the call; then the flags are those of TEST RAX,RAX.
  void CallHelper(Helper helper, int32_t align) {
    StoreGprs();
    SaveIfLive(offsetof(State, vector_live), save_vectors_);
    SaveIfLive(offsetof(State, x87_live), save_x87_);
    as_.Mov(kRegSi, kS0);
    as_.Mov(kRegDx, kS1);
    as_.Load(kRegDi, Gs(offsetof(State, self)));
    if (align) as_.Lea(kRegSp, {.base = kRegSp, .disp = -align});
    as_.MovImm64(kRegAx, reinterpret_cast<uint64_t>(helper));
    as_.RegReg(Assembler::k32, 0xff, 2, kRegAx);  // call rax
    if (align) as_.Lea(kRegSp, {.base = kRegSp, .disp = align});
    as_.RegReg(Assembler::k64, 0x85, kRegAx, kRegAx);
  }
  void GoTo() {  // RAX
    as_.Store(Gs(offsetof(State, jump_to)), kRegAx);
    as_.Load(kS0, Gs(offsetof(State, cpu) + offsetof(Cpu, rip)));  // for a checked entry
    LoadFlags();
    LoadGprs();
    as_.JmpMem(Gs(offsetof(State, jump_to)));
  }
  void Jumped(Helper helper) {
    CallHelper(helper, 0);
    GoTo();
  }
  // Returns to the unit if the helper says 0, with what the site uses loaded.
  void Called(Helper helper) {
    as_.Store(Gs(offsetof(State, site)), kS1);
    CallHelper(helper, 8);
    uint8_t* elsewhere = as_.Jcc(kCcNe, as_.run());
    LoadIfTold(Site::kVectors, load_vectors_);
    LoadIfTold(Site::kX87, load_x87_);
    LoadGprs();
    as_.Ret();
    as_.PatchHere(elsewhere);
    as_.Lea(kRegSp, {.base = kRegSp, .disp = 8});  // not back to the unit
    GoTo();
  }

  void ReadTsc(uint64_t (*helper)(void*)) {
    constexpr HostReg kSaved[] = {kRegCx, kRegSi, kRegDi, kReg8, kReg9};
    SaveIfLive(offsetof(State, vector_live), save_vectors_);
    SaveIfLive(offsetof(State, x87_live), save_x87_);
    for (HostReg reg : kSaved) as_.Rex(Assembler::k32, 0, 0, reg), as_.Byte(0x50 | (reg & 7));
    static_assert((sizeof(uint64_t) * (1 + std::size(kSaved))) % 16 == 0,
                  "with the return address");
    as_.Load(kRegDi, Gs(offsetof(State, self)));
    as_.MovImm64(kRegAx, reinterpret_cast<uint64_t>(helper));
    as_.RegReg(Assembler::k32, 0xff, 2, kRegAx);  // call rax
    as_.Mov(kRegDx, kRegAx);
    Shift(Assembler::k64, 5, kRegDx, 32);
    as_.RegReg(Assembler::k32, 0x8b, kRegAx, kRegAx);  // mov: the lower half
    for (unsigned i = std::size(kSaved); i-- > 0;) {
      as_.Rex(Assembler::k32, 0, 0, kSaved[i]);
      as_.Byte(0x58 | (kSaved[i] & 7));
    }
    as_.Ret();
  }

  // The TLB's entry for the address in S0, page number modulo their number, by way of `at`; the
  // result names its fields.
  auto FindEntry(HostReg at, unsigned cls) {
    static_assert(sizeof(TlbEntry) == 32);
    as_.RegReg(Assembler::k32, 0x8b, at, kS0);  // mov
    Shift(Assembler::k32, 5, at, 12 - 5);
    as_.RegReg(Assembler::k32, 0x81, 4, at);  // and
    as_.Dword((Tlb::kEntries - 1) * sizeof(TlbEntry));
    return [at, table = offsetof(State, tlb) + cls * sizeof(State::tlb[0])](size_t field) {
      return HostMem{.base = at, .disp = static_cast<int32_t>(table + field), .gs = true};
    };
  }

  // Asks the TLB first.
  void Fill(unsigned cls, bool write, bool whole) {
    constexpr HostReg kSaved[] = {kRegAx, kRegCx, kRegDx};
    for (HostReg reg : kSaved) as_.Byte(0x50 | reg);
    as_.Load(kS1, {.base = kRegSp, .disp = sizeof(uint64_t) * std::size(kSaved)});
    as_.Lea(kS1, {.base = kS1, .disp = Site::kDistance});
    const auto field = [&](HostReg to, size_t offset) {
      as_.RegMem(Assembler::k32, 0xb70f, to,  // movzx
                 {.base = kS1, .disp = static_cast<int32_t>(offset)});
    };
    const auto slot = [](size_t offset) {
      return HostMem{.base = kRegAx,
                     .disp = static_cast<int32_t>(offsetof(State, slots) + offset),
                     .gs = true};
    };
    field(kRegAx, offsetof(Site, slot));
    Shift(Assembler::k32, 4, kRegAx, 4);
    static_assert(sizeof(Slot) == 16);
    if (!whole) as_.Add(kS0, slot(offsetof(Slot, page)));
    const auto entry = FindEntry(kRegCx, cls);
    // The tag that the last byte's page must have.
    field(kRegDx, offsetof(Site, span));
    as_.Lea(kRegDx, {.base = kRegDx, .index = kS0, .disp = -1});
    as_.RegReg(Assembler::k64, 0x81, 4, kRegDx);  // and
    as_.Dword(0xfffff000);
    uint8_t* tagged = nullptr;
    if (cls == Tlb::kSupervisor) {
      as_.RegReg(Assembler::k64, 0x85, kS0, kS0);  // test: which half?
      uint8_t* lower = as_.Jcc(kCcNs, as_.run());
      as_.RegMem(Assembler::k64, 0x0b, kRegDx, Gs(offsetof(State, asid) + 8));  // or
      tagged = as_.Jmp(as_.run());
      as_.PatchHere(lower);
      as_.StoreByte(Gs(offsetof(State, lower_in_supervisor)), 1);
    }
    as_.RegMem(Assembler::k64, 0x0b, kRegDx, Gs(offsetof(State, asid)));
    if (tagged != nullptr) as_.PatchHere(tagged);
    as_.Cmp(kRegDx, entry(write ? offsetof(TlbEntry, write) : offsetof(TlbEntry, read)));
    uint8_t* miss = as_.Jcc(kCcNe, as_.run());
    as_.Mov(kRegDx, kRegAx);
    CountMiss(kRegDx);
    uint8_t* often = as_.Jcc(kCcB, as_.run());
    as_.RegReg(Assembler::k64, 0x81, 4, kS0);  // and: the page
    as_.Dword(0xfffff000);
    as_.Store(slot(offsetof(Slot, page)), kS0);
    as_.Load(kS0, entry(offsetof(TlbEntry, addend)));
    as_.Store(slot(offsetof(Slot, addend)), kS0);
    Shift(Assembler::k32, 5, kRegDx, kSlotChunkBits);
    as_.StoreByte({.base = kRegDx, .disp = offsetof(State, used), .gs = true}, 1);
    for (unsigned i = std::size(kSaved); i-- > 0;) as_.Byte(0x58 | kSaved[i]);
    as_.Ret();
    as_.PatchHere(miss);
    const auto single = [](size_t offset) {
      return HostMem{.base = kRegCx,
                     .disp = static_cast<int32_t>(offsetof(State, singles) + offset),
                     .gs = true};
    };
    as_.RegReg(Assembler::k32, 0x8b, kRegCx, kS1);  // mov
    Shift(Assembler::k32, 5, kRegCx, kSingleShift);
    as_.RegReg(Assembler::k32, 0x81, 4, kRegCx);  // and
    as_.Dword(kSingles - 1);
    Shift(Assembler::k32, 4, kRegCx, 4);
    static_assert(sizeof(SingleUnit) == 16);
    as_.Cmp(kS1, single(offsetof(SingleUnit, site)));
    uint8_t* no_single = as_.Jcc(kCcNe, as_.run());
    as_.Mov(kRegDx, kRegAx);
    CountMiss(kRegDx);
    uint8_t* single_often = as_.Jcc(kCcB, as_.run());
    as_.Load(kRegCx, single(offsetof(SingleUnit, body)));
    as_.Store(Gs(offsetof(State, jump_to)), kRegCx);
    for (unsigned i = std::size(kSaved); i-- > 0;) as_.Byte(0x58 | kSaved[i]);
    as_.Lea(kRegSp, {.base = kRegSp, .disp = 8});  // not back to the unit
    LoadFlags();
    as_.JmpMem(Gs(offsetof(State, jump_to)));
    as_.PatchHere(no_single);
    as_.PatchHere(single_often);
    as_.PatchHere(often);
    for (unsigned i = std::size(kSaved); i-- > 0;) as_.Byte(0x58 | kSaved[i]);
    Called(targets_.fill);
  }
  // Of a slot, whose offset among the slots becomes its number. Carry: for the 256th time.
  void CountMiss(HostReg slot) {
    Shift(Assembler::k32, 5, slot, 4);
    as_.RegMem(Assembler::k32, 0x80, 0,  // add byte
               {.base = slot, .disp = offsetof(State, misses), .gs = true});
    as_.Byte(1);
  }
  // As Engine::EnterPage, if the TLB knows the page.
  void EnterPage(unsigned code_class, const uint8_t* dispatch) {
    constexpr HostReg kSaved[] = {kRegAx, kRegCx, kRegDx, kRegBx};
    for (HostReg reg : kSaved) as_.Byte(0x50 | reg);
    const auto at_slot = [](size_t array) {
      return HostMem{.index = kS1, .scale = 3, .disp = static_cast<int32_t>(array), .gs = true};
    };
    as_.RegReg(Assembler::k32, 0x8b, kRegAx, kS1);  // mov
    Shift(Assembler::k32, 5, kRegAx, 16);
    as_.RegMem(Assembler::k32, 0x3b, kRegAx, Gs(offsetof(State, running_mode)));  // cmp
    uint8_t* left = as_.Jcc(kCcNe, as_.run());
    as_.RegReg(Assembler::k32, 0xb70f, kS1, kS1);  // movzx
    const auto entry = FindEntry(kRegAx, code_class);
    as_.Mov(kRegCx, kS0);  // the linear page
    as_.RegReg(Assembler::k64, 0x81, 4, kRegCx);
    as_.Dword(0xfffff000);
    as_.Mov(kRegBx, kS0);  // the half
    Shift(Assembler::k64, 5, kRegBx, 63);
    as_.RegMem(Assembler::k64, 0x8b, kRegDx,
               {.index = kRegBx, .scale = 3, .disp = offsetof(State, asid), .gs = true});
    as_.RegReg(Assembler::k64, 0x0b, kRegDx, kRegCx);  // or
    as_.Cmp(kRegDx, entry(offsetof(TlbEntry, execute)));
    uint8_t* unknown = as_.Jcc(kCcNe, as_.run());
    as_.Mov(kRegDx, kRegCx);
    as_.Add(kRegDx, entry(offsetof(TlbEntry, addend)));
    as_.Cmp(kRegDx, at_slot(offsetof(State, code_hosts)));
    uint8_t* other = as_.Jcc(kCcNe, as_.run());
    const HostMem count = {
        .index = kRegBx, .scale = 2, .disp = offsetof(State, entered_count), .gs = true};
    as_.RegMem(Assembler::k32, 0x8b, kRegDx, count);
    as_.RegReg(Assembler::k32, 0x81, 7, kRegDx);  // cmp
    as_.Dword(kEntered);
    uint8_t* full = as_.Jcc(kCcAe, as_.run());
    as_.RegMem(Assembler::k32, 0xff, 0, count);  // inc
    static_assert(kEntered == 4096);
    Shift(Assembler::k32, 4, kRegBx, 12);
    as_.RegReg(Assembler::k32, 0x0b, kRegBx, kRegDx);  // or
    as_.Byte(0x66);                                    // mov word
    as_.RegMem(Assembler::k32, 0x89, kS1,
               {.index = kRegBx, .scale = 1, .disp = offsetof(State, entered), .gs = true});
    as_.Store(at_slot(offsetof(State, code_pages)), kRegCx);
    Shift(Assembler::k32, 5, kRegCx, 12);
    as_.RegReg(Assembler::k32, 0x81, 4, kRegCx);
    as_.Dword(kEnteredHash - 1);
    as_.StoreByte({.base = kRegCx, .disp = offsetof(State, entered_pages), .gs = true}, 1);
    for (unsigned i = std::size(kSaved); i-- > 0;) as_.Byte(0x58 | kSaved[i]);
    as_.Ret();
    as_.PatchHere(left);
    as_.PatchHere(unknown);
    as_.PatchHere(other);
    as_.PatchHere(full);
    for (unsigned i = std::size(kSaved); i-- > 0;) as_.Byte(0x58 | kSaved[i]);
    as_.Lea(kRegSp, {.base = kRegSp, .disp = 8});  // not back to the unit
    as_.Jmp(dispatch);
  }
  void Shift(Assembler::Width width, unsigned digit, HostReg reg, unsigned count) {
    as_.RegReg(width, 0xc1, digit, reg);
    as_.Byte(count);
  }

  Assembler& as_;
  const StubTargets& targets_;
  const uint8_t* save_vectors_ = nullptr;
  const uint8_t* load_vectors_ = nullptr;
  const uint8_t* save_x87_ = nullptr;
  const uint8_t* load_x87_ = nullptr;
};

}  // namespace

Stubs EmitStubs(Assembler& assembler, const StubTargets& targets) {
  return StubEmitter(assembler, targets).Run();
}

}  // namespace kvartz::cpu::x86::jit
