// The interpreter's side of an oracle case: one CPU in user mode, paging on, with the same pages at
// the same addresses.
#pragma once

#include <memory>

#include "cpu/x86/mmu.h"
#include "cpu/x86/oracle/case_generator.h"
#include "memory/address_space.h"

namespace kvartz::cpu::x86::oracle {

// What runs cases beside the host.
class CaseRunner {
 public:
  virtual ~CaseRunner() = default;
  virtual uint8_t* data() = 0;
  virtual Outcome Run(const Case& test) = 0;
};

class SoftCpu final : public CaseRunner {
 public:
  SoftCpu();
  uint8_t* data() override { return ram_->host() + kDataPhysical; }
  Outcome Run(const Case& test) override;

 private:
  static constexpr uint64_t kTables = 0x10000, kCodePhysical = 0x100000, kDataPhysical = 0x200000;
  enum Protection : uint64_t {
    kCodePage = 0x7,
    kWritable = uint64_t{1} << 63 | 0x7,
    kReadOnly = uint64_t{1} << 63 | 0x5
  };
  void MapPages(uint64_t linear, uint64_t physical, uint64_t size, uint64_t bits);

  std::shared_ptr<RamBlock> ram_;
  AddressSpace memory_{"memory", uint64_t{1} << 40};
  std::vector<TlbEntry> tables_{Tlb::kClassCount * Tlb::kEntries};
  std::unique_ptr<Tlb> tlb_;
  Cpu cpu_;
  uint64_t next_table_ = kTables + 0x1000;
};

}  // namespace kvartz::cpu::x86::oracle
