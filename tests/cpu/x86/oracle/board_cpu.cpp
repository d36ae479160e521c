#include "cpu/x86/oracle/board_cpu.h"

#include <algorithm>
#include <cstring>

#include "cpu/x86/page_walk.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86::oracle {
namespace {

// So that the instruction runs from code that ran before, too.
constexpr unsigned kRuns = 2;

constexpr uint64_t kOwnPages = 512;  // from 0 on: tables and stubs

// These show TF, which then has to be as on the host.
bool ReadsTf(const Case& test) { return !test.undefined_encoding && Is(*test.insn.row, {"PUSHF"}); }

}  // namespace

BoardCpu::BoardCpu(const SoftOptions& soft)
    : guest_(x86::Mode::kLong64, 3, "max", 1, soft),
      memory_(guest_.board.memory()),
      code_(kCodeSize, 0xcc),
      before_(kDataSize) {
  // Tables and stubs, which cases can't use.
  for (uint64_t page = 0; page < kOwnPages; ++page) guest_.SetPte(page << 12, page << 12 | 3);
  MapPages(kCode, kCodePhysical, kCodeSize, 7);
  MapPages(kData, kDataPhysical, kDataWritable, uint64_t{1} << 63 | 7);
  MapPages(kData + kDataWritable, kDataPhysical + kDataWritable, kDataReadOnly,
           uint64_t{1} << 63 | 5);
  // Vectors that INT3 and INT1 reach from user mode.
  guest_.SetGate(kBP, 0xe, 3, kCode64, GuestCase::Stub(kBP));
  X86State& state = guest_.initial;
  state.cr0 |= cr0::kWp | cr0::kNe | cr0::kMp;
  state.cr4 |= cr4::kOsfxsr | cr4::kOsxmmexcpt | cr4::kOsxsave;
  state.xcr0 = 7;
  EXPECT_TRUE(guest_.board.vcpu().SetState(state));
}

void BoardCpu::MapPages(uint64_t linear, uint64_t physical, uint64_t size, uint64_t bits) {
  for (uint64_t at = 0; at < size; at += 4096) {
    uint64_t table = kTablesAt;
    for (unsigned shift : {39, 30, 21}) {
      const uint64_t place = table + ((linear + at) >> shift & 511) * 8;
      if (guest_.Get<uint64_t>(place) == 0) {
        guest_.Put<uint64_t>(place, next_table_ | 7);
        next_table_ += 0x1000;
      }
      table = guest_.Get<uint64_t>(place) & 0xffffffffff000;
    }
    guest_.Put<uint64_t>(table + ((linear + at) >> 12 & 511) * 8, (physical + at) | bits);
  }
}

void BoardCpu::SetCode(const Case& test) {
  std::fill(code_.begin(), code_.end(), uint8_t{0xcc});
  std::copy(test.code.begin(), test.code.end(),
            code_.begin() + static_cast<long>(test.registers.rip - kCode));
  for (uint64_t at = 0; at < kCodeSize; at += 0x1000) {
    if (std::memcmp(guest_.at(kCodePhysical + at), &code_[at], 0x1000) != 0)
      memory_.Write(Gpa(kCodePhysical + at), &code_[at], 0x1000);
  }
}

void BoardCpu::Load(const Case& test) {
  const Registers& in = test.registers;
  const bool long_mode = test.mode == Mode::k64;
  Cpu& cpu = guest_.board.cpu();
  std::copy(in.gpr.begin(), in.gpr.end(), cpu.gpr);
  // What ends the case is the breakpoint behind the instruction, mostly: single steps aren't
  // blocks.
  cpu.rflags = ReadsTf(test) ? in.rflags : in.rflags & ~rflags::kTf;
  cpu.fpu = in.fpu;
  cpu.fpu.xstate_bv = 7;
  cpu.events = {};
  for (Segment& seg : cpu.seg) {
    seg = Segment{0, 0xffffffff,
                  Segment::kP | Segment::kS | Segment::kG | 3 << 5 | 3 | Segment::kDb, kUserData};
  }
  cpu.seg[kCs].attributes = Segment::kP | Segment::kS | Segment::kG | 3 << 5 | 0xb |
                            (long_mode ? Segment::kL : Segment::kDb);
  cpu.seg[kCs].selector = long_mode ? kUserCode64 : kUserCode32;
  cpu.seg[kGs].base = long_mode ? kGsBase : 0;
  cpu.cr2 = 0;
  cpu.insn_rip = cpu.rip = in.rip;
  __atomic_fetch_and(&cpu.requests, request::kCodeWritten, __ATOMIC_SEQ_CST);
  UpdateMode(cpu);
  SetRflags(cpu, cpu.rflags);
}

Outcome BoardCpu::RunOnce(const Case& test) {
  Load(test);
  guest_.board.Run();
  const Cpu& cpu = guest_.board.cpu();
  Outcome out;
  std::copy(cpu.gpr, cpu.gpr + 16, out.registers.gpr.begin());
  out.registers.fpu = cpu.fpu;
  out.fault = static_cast<unsigned>((cpu.rip - kStubsAt) / 8);
  EXPECT_LT(out.fault, 256u) << "no exception ended the case";
  // What it pushed.
  uint64_t sp = cpu.gpr[kRsp];
  if (out.fault == kDF || (out.fault >= kTS && out.fault <= kPF) || out.fault == kAC) {
    out.error = guest_.Get<uint32_t>(sp);
    sp += 8;
  }
  out.registers.rip = guest_.Get<uint64_t>(sp);
  out.registers.rflags = guest_.Get<uint64_t>(sp + 16);
  out.registers.gpr[kRsp] = guest_.Get<uint64_t>(sp + 24);
  if (out.fault == kPF) out.fault_address = cpu.cr2;
  // The host has nothing there.
  if (out.fault == kPF && out.fault_address < kOwnPages << 12) out.error &= ~pf::kPresent;
  if (out.fault == kBP) out.registers.rip -= 1;
  // A jump came to its end where the next instruction can't be fetched, or not all of it.
  const uint64_t fetched = out.fault_address - out.registers.rip;
  const bool fetch = out.fault == kPF && out.registers.rip != test.registers.rip &&
                     (fetched == 0 || (fetched < 15 && out.fault_address % 4096 == 0));
  if (out.fault == kBP || out.fault == kDB || fetch) {
    out.fault = kNoFault;
    out.error = 0;
    out.fault_address = 0;
  }
  return out;
}

Outcome BoardCpu::Run(const Case& test) {
  SetCode(test);
  std::memcpy(before_.data(), data(), kDataSize);
  Outcome out = RunOnce(test);
  for (unsigned run = 1; run < kRuns; ++run) {
    std::memcpy(data(), before_.data(), kDataSize);
    out = RunOnce(test);
  }
  return out;
}

}  // namespace kvartz::cpu::x86::oracle
