// Another side of an oracle case: a whole machine that runs the instruction as part of a block, as
// guests do, with translation or without.
#pragma once

#include <vector>

#include "cpu/x86/guest_case.h"
#include "cpu/x86/oracle/case_generator.h"
#include "cpu/x86/oracle/soft_cpu.h"
#include "memory/guest_memory.h"

namespace kvartz::cpu::x86::oracle {

class BoardCpu final : public CaseRunner {
 public:
  explicit BoardCpu(const SoftOptions& soft);
  uint8_t* data() override { return guest_.at(kDataPhysical); }
  Outcome Run(const Case& test) override;

 private:
  static constexpr uint64_t kNewTables = 0x400000, kCodePhysical = 0x500000,
                            kDataPhysical = 0x600000;
  void MapPages(uint64_t linear, uint64_t physical, uint64_t size, uint64_t bits);
  void SetCode(const Case& test);
  void Load(const Case& test);
  Outcome RunOnce(const Case& test);

  GuestCase guest_;
  GuestMemory memory_;
  uint64_t next_table_ = kNewTables;
  std::vector<uint8_t> code_;    // the pages of code
  std::vector<uint8_t> before_;  // data, before the case
};

}  // namespace kvartz::cpu::x86::oracle
