#include "cpu/x86/oracle/soft_cpu.h"

#include <csetjmp>

#include "base/check.h"
#include "cpu/x86/cpu.h"

namespace kvartz::cpu::x86::oracle {

SoftCpu::SoftCpu() {
  auto ram = RamBlock::Create("oracle", 4 << 20);
  VERIFY(ram);
  ram_ = *ram;
  Region region;
  region.name = "ram";
  region.kind = RegionKind::kRam;
  region.size = ram_->size();
  region.ram = ram_;
  memory_.Add(region);
  MapPages(kCode, kCodePhysical, kCodeSize, kCodePage);
  MapPages(kData, kDataPhysical, kDataWritable, kWritable);
  MapPages(kData + kDataWritable, kDataPhysical + kDataWritable, kDataReadOnly, kReadOnly);
  tlb_ = std::make_unique<Tlb>(memory_, tables_.data());
  cpu_.tlb = tlb_.get();
  cpu_.cr0 = cr0::kPe | cr0::kPg | cr0::kWp | cr0::kNe | cr0::kMp | cr0::kEt;
  cpu_.cr4 = cr4::kPae | cr4::kOsfxsr | cr4::kOsxmmexcpt | cr4::kOsxsave;
  cpu_.xcr0 = 7;
  cpu_.efer = efer::kLme | efer::kLma | efer::kNxe | efer::kSce;
  cpu_.cr3 = kTables;
}

void SoftCpu::MapPages(uint64_t linear, uint64_t physical, uint64_t size, uint64_t bits) {
  for (uint64_t at = 0; at < size; at += 4096) {
    uint64_t table = kTables;
    for (unsigned shift : {39, 30, 21}) {
      auto* entry =
          reinterpret_cast<uint64_t*>(ram_->host() + table) + ((linear + at) >> shift & 511);
      if (!*entry) {
        *entry = next_table_ | 7;
        next_table_ += 0x1000;
      }
      table = *entry & 0xffffffffff000;
    }
    reinterpret_cast<uint64_t*>(ram_->host() + table)[(linear + at) >> 12 & 511] =
        (physical + at) | bits;
  }
}

Outcome SoftCpu::Run(const Case& test) {
  const Registers& in = test.registers;
  const bool long_mode = test.mode == Mode::k64;
  std::copy(in.gpr.begin(), in.gpr.end(), cpu_.gpr);
  cpu_.rflags = in.rflags;
  cpu_.fpu = in.fpu;
  cpu_.events = {};
  for (unsigned i = 0; i < kSegCount; ++i) {
    Segment& seg = cpu_.seg[i];
    seg = Segment{0, 0xffffffff,
                  Segment::kP | Segment::kS | Segment::kG | 3 << 5 | 3 | Segment::kDb, 0x2b};
  }
  cpu_.seg[kCs].attributes = Segment::kP | Segment::kS | Segment::kG | 3 << 5 | 0xb |
                             (long_mode ? Segment::kL : Segment::kDb);
  cpu_.seg[kCs].selector = long_mode ? 0x33 : 0x23;
  cpu_.seg[kGs].base = long_mode ? kGsBase : 0;
  UpdateMode(cpu_);
  cpu_.requests = 0;
  cpu_.insn_rip = cpu_.rip = in.rip;

  Outcome out;
  jmp_buf exit;
  cpu_.fault_exit = &exit;
  if (setjmp(exit) == 0) {
    if (test.undefined_encoding) Raise(cpu_, kUD);
    // Without TF a repeated string instruction runs to its end.
    do {
      cpu_.rip = in.rip + test.insn.length;
      test.insn.exec(cpu_, test.insn);
    } while (cpu_.rip == in.rip && !(in.rflags & rflags::kTf) && test.insn.has(kRep));
  } else {
    out.fault = cpu_.fault.vector;
    out.error = cpu_.fault.has_error ? cpu_.fault.error : 0;
    if (out.fault == kPF) out.fault_address = cpu_.cr2;
    cpu_.rip = in.rip;
  }
  cpu_.fault_exit = nullptr;
  std::copy(cpu_.gpr, cpu_.gpr + 16, out.registers.gpr.begin());
  out.registers.rip = cpu_.rip;
  out.registers.rflags = cpu_.rflags;
  out.registers.fpu = cpu_.fpu;
  return out;
}

}  // namespace kvartz::cpu::x86::oracle
