// Guest programs of a few instructions: a mode is set up by hand, the program runs, and how it
// ended is read back.
//
//   GUEST_CODE(name, "mode directive and instructions")   assembles at build time; the code runs at
//   kCode GuestCase guest(Mode::kLong64);  guest.Load(CODE_OF(name));  Outcome end = guest.Run();
//
// Every exception and interrupt ends the program in its vector's stub; "out %al, $0xf4" ends it
// normally.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <span>

#include "cpu/x86/bare_board.h"

#define GUEST_CODE(name, text)                           \
  extern "C" const uint8_t name##_begin[], name##_end[]; \
  asm(".pushsection .rodata\n" #name "_begin:\n" text "\n" #name "_end:\n.code64\n.popsection\n");
#define CODE_OF(name) std::span<const uint8_t>(name##_begin, name##_end)

namespace kvartz::cpu::x86 {

enum class Mode { kReal16, kFlat32, kPaged32, kPae32, kLong64, kCompat32 };

constexpr uint64_t kGdtAt = 0x1000, kIdtAt = 0x2000, kTssAt = 0x3000, kStubsAt = 0x5000,
                   kStackTop = 0x7000, kInnerStack = 0x6c00, kIstStack = 0x6800, kCode = 0x8000,
                   kUserStack = 0xb000, kData = 0x9000, kTablesAt = 0x10000, kTestPage = 0x100000,
                   kOtherPage = 0x101000;

// GDT selectors.
constexpr uint16_t kCode32 = 0x08, kData32 = 0x10, kCode64 = 0x18, kUserCode32 = 0x23,
                   kUserData = 0x2b, kUserCode64 = 0x33, kCode16 = 0x38, kData16 = 0x40,
                   kTssSelector = 0x48, kAbsentData = 0x58, kExecuteOnly = 0x60,
                   kReadOnlyData = 0x68, kConforming = 0x70, kTss2 = 0x78, kTaskGateSelector = 0x80,
                   kCallGateSelector = 0x88, kLdtSelector = 0x98;

struct Outcome {
  int vector = -1;  // -1: ended by itself
  uint32_t error = 0;
  uint64_t rip = 0, flags = 0, sp = 0;  // as pushed
  uint16_t cs = 0, ss = 0;
  X86State state;
};

class GuestCase {
 public:
  explicit GuestCase(Mode mode, unsigned cpl = 0, const std::string& model = "max",
                     unsigned cpus = 1, const SoftOptions& soft = {})
      : board(16 << 20, cpus, model, soft), mode_(mode) {
    BuildTables();
    X86State state;
    EXPECT_TRUE(board.vcpu().GetState(&state));
    for (auto& s : state.seg) s = Data(cpl);
    state.gdtr = {kGdtAt, 0xff};
    state.idtr = {kIdtAt, static_cast<uint16_t>(IsLong() ? 0xfff : 0x7ff)};
    state.tr = {.base = kTssAt, .limit = 0x2067, .attributes = 0x8b, .selector = kTssSelector};
    state.cr0 = 0x11;
    state.rip = kCode;
    state.gpr[kRsp] = cpl == 3 ? kUserStack : kStackTop;
    state.rflags = 2;
    switch (mode) {
      case Mode::kReal16:
        state.cr0 = 0x10;
        state.idtr = {0, 0x3ff};
        for (auto& s : state.seg)
          s = {.base = 0, .limit = 0xffff, .attributes = 0x93, .selector = 0};
        break;
      case Mode::kFlat32:
        break;
      case Mode::kPaged32:
        state.cr0 |= 0x80000000;
        state.cr4 = cr4::kPse;
        state.cr3 = kTablesAt;
        break;
      case Mode::kPae32:
        state.cr0 |= 0x80000000;
        state.cr4 = cr4::kPae;
        state.efer = efer::kNxe;
        state.cr3 = kTablesAt + 0x1000;
        break;
      case Mode::kLong64:
      case Mode::kCompat32:
        state.cr0 |= 0x80000000;
        state.cr4 = cr4::kPae;
        state.efer = efer::kNxe | efer::kLme | efer::kLma | efer::kSce;
        state.cr3 = kTablesAt;
        break;
    }
    if (mode != Mode::kReal16) state.seg[kCs] = Code(cpl, mode == Mode::kLong64);
    initial = state;
  }

  bool IsLong() const { return mode_ == Mode::kLong64 || mode_ == Mode::kCompat32; }
  uint8_t* at(uint64_t address) { return board.ram() + address; }
  template <typename T>
  T Get(uint64_t address) {
    T value;
    memcpy(&value, at(address), sizeof(T));
    return value;
  }
  template <typename T>
  void Put(uint64_t address, T value) {
    memcpy(at(address), &value, sizeof(T));
  }
  // The page-table entry (8 bytes, or 4 in kPaged32) of a page below 2 MiB.
  uint64_t pte_address(uint64_t page) const {
    return mode_ == Mode::kPaged32 ? kTablesAt + 0x1000 + (page >> 12) * 4
                                   : kTablesAt + 0x3000 + (page >> 12) * 8;
  }
  void SetPte(uint64_t page, uint64_t entry) {
    mode_ == Mode::kPaged32 ? Put<uint32_t>(pte_address(page), static_cast<uint32_t>(entry))
                            : Put<uint64_t>(pte_address(page), entry);
  }
  uint64_t Pte(uint64_t page) {
    return mode_ == Mode::kPaged32 ? Get<uint32_t>(pte_address(page))
                                   : Get<uint64_t>(pte_address(page));
  }

  void SetGdt(uint16_t selector, uint64_t low) { Put<uint64_t>(kGdtAt + (selector & ~7u), low); }
  // A gate: type 0xe interrupt, 0xf trap, 5 task; ist in long mode.
  void SetGate(unsigned vector, unsigned type, unsigned dpl, uint16_t selector, uint64_t target,
               unsigned ist = 0, bool present = true) {
    uint64_t low = (target & 0xffff) | uint64_t{selector} << 16 | uint64_t{ist} << 32 |
                   uint64_t{type} << 40 | uint64_t{dpl} << 45 | uint64_t{present} << 47 |
                   (target >> 16 & 0xffff) << 48;
    if (IsLong()) {
      Put<uint64_t>(kIdtAt + vector * 16, low);
      Put<uint64_t>(kIdtAt + vector * 16 + 8, target >> 32);
    } else {
      Put<uint64_t>(kIdtAt + vector * 8, low);
    }
  }
  static uint64_t Stub(unsigned vector) { return kStubsAt + vector * 8; }

  void Load(std::span<const uint8_t> code, uint64_t address = kCode) {
    memcpy(at(address), code.data(), code.size());
  }

  Outcome Run() {
    EXPECT_TRUE(board.vcpu().SetState(initial));
    return Continue();
  }
  // Goes on from the present state.
  Outcome Continue() {
    Outcome end;
    exit_code = board.Run();
    EXPECT_TRUE(board.vcpu().GetState(&end.state));
    uint64_t rip = end.state.rip;
    if (rip < kStubsAt || rip >= Stub(256)) return end;
    end.vector = static_cast<int>((rip - kStubsAt) / 8);
    ReadFrame(end);
    return end;
  }

  BareBoard board;
  X86State initial;
  int exit_code = 0;

 private:
  static Segment Data(unsigned cpl) {
    return {.base = 0,
            .limit = 0xffffffff,
            .attributes = 0xc093 | cpl << 5,
            .selector = cpl == 3 ? kUserData : kData32};
  }
  static Segment Code(unsigned cpl, bool is64) {
    uint16_t selector = is64 ? (cpl ? kUserCode64 : kCode64) : cpl ? kUserCode32 : kCode32;
    return {.base = 0,
            .limit = 0xffffffff,
            .attributes = (is64 ? 0xa09bu : 0xc09bu) | cpl << 5,
            .selector = selector};
  }

  void ReadFrame(Outcome& end) {
    static constexpr uint32_t kWithError = 1 << 8 | 0x1f << 10 | 1 << 17;
    bool real = !(end.state.cr0 & 1);
    unsigned width = real ? 2 : IsLong() ? 8 : 4;
    uint64_t sp = real ? end.state.gpr[kRsp] & 0xffff : end.state.gpr[kRsp];
    auto pop = [&]() -> uint64_t {
      uint64_t value = 0;
      memcpy(&value, at(sp), width);
      sp += width;
      return value;
    };
    if (!real && end.vector < 32 && (kWithError >> end.vector & 1))
      end.error = static_cast<uint32_t>(pop());
    end.rip = pop();
    end.cs = static_cast<uint16_t>(pop());
    end.flags = pop();
    if (IsLong() || (end.cs & 3) != (end.state.seg[kCs].selector & 3) ||
        (end.flags & rflags::kVm)) {
      end.sp = pop();
      end.ss = static_cast<uint16_t>(pop());
    }
  }

  void BuildTables() {
    uint64_t gdt[32] = {};
    gdt[1] = 0x00cf9b000000ffff;
    gdt[2] = 0x00cf93000000ffff;
    gdt[3] = 0x00af9b000000ffff;
    gdt[4] = 0x00cffb000000ffff;
    gdt[5] = 0x00cff3000000ffff;
    gdt[6] = 0x00affb000000ffff;
    gdt[7] = 0x00009b000000ffff;
    gdt[8] = 0x000093000000ffff;
    gdt[9] = 0x00008b0000002067 | kTssAt << 16;
    gdt[11] = 0x00cf13000000ffff;  // not present
    gdt[12] = 0x00cf99000000ffff;  // execute only
    gdt[13] = 0x00cf91000000ffff;  // read only
    gdt[14] = 0x00cf9f000000ffff;  // conforming
    memcpy(at(kGdtAt), gdt, sizeof(gdt));
    for (unsigned v = 0; v < 256; v++) {
      static constexpr uint8_t kStub[] = {0xe6, 0xf4, 0xeb, 0xfe};
      memcpy(at(Stub(v)), kStub, sizeof(kStub));
      if (mode_ == Mode::kReal16) {
        Put<uint32_t>(v * 4, static_cast<uint32_t>(Stub(v)));
      } else {
        SetGate(v, 0xe, 0, IsLong() ? kCode64 : kCode32, Stub(v));
      }
    }
    // TSS: inner stack, IST 1, an I/O bitmap that allows nothing (0x2000 bytes and the terminator).
    if (IsLong()) {
      Put<uint64_t>(kTssAt + 4, kInnerStack);
      Put<uint64_t>(kTssAt + 36, kIstStack);
    } else {
      Put<uint32_t>(kTssAt + 4, kInnerStack);
      Put<uint16_t>(kTssAt + 8, kData32);
    }
    Put<uint16_t>(kTssAt + 0x66, 0x68);
    memset(at(kTssAt + 0x68), 0xff, 0x1f98);
    BuildPaging();
  }

  // The first 2 MiB in 4 KiB pages, identity-mapped; supervisor pages but for code, data and user
  // stack.
  void BuildPaging() {
    auto flags = [](unsigned page) { return page >= 8 && page <= 0xb ? 7u : 3u; };
    if (mode_ == Mode::kPaged32) {
      Put<uint32_t>(kTablesAt, (kTablesAt + 0x1000) | 7);
      for (unsigned i = 0; i < 512; i++)
        Put<uint32_t>(kTablesAt + 0x1000 + i * 4, i << 12 | flags(i));
      return;
    }
    Put<uint64_t>(kTablesAt, (kTablesAt + 0x1000) | 7);
    Put<uint64_t>(kTablesAt + 0x1000, (kTablesAt + 0x2000) | (mode_ == Mode::kPae32 ? 1 : 7));
    Put<uint64_t>(kTablesAt + 0x2000, (kTablesAt + 0x3000) | 7);
    for (unsigned i = 0; i < 512; i++)
      Put<uint64_t>(kTablesAt + 0x3000 + i * 8, uint64_t{i} << 12 | flags(i));
  }

  Mode mode_;
};

}  // namespace kvartz::cpu::x86
