// Random instruction cases: an encoding of a table row, and registers and memory that make it do
// something of interest (page edges, faults, special floating-point values) without leading the
// host astray.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/x86/oracle/insn_encoder.h"
#include "cpu/x86/oracle/native_cpu.h"

namespace kvartz::cpu::x86::oracle {

struct Poke {
  uint64_t address;
  uint64_t value;
};

struct Case : EncodedInsn {
  Mode mode = Mode::k64;
  Registers registers;
  std::vector<Poke> pokes;  // writable data to set before
};

class CaseGenerator : public InsnEncoder {
 public:
  CaseGenerator(uint64_t seed, const FeatureSet& features)
      : InsnEncoder(seed), features_(features) {}

  // False if the row can't be tried this time (try again) or at all.
  bool Generate(const Row& row, Mode mode, Case* out);

 private:
  void RandomRegisters(Case* out);
  bool AimMemory(Case* out);
  bool AimImplicit(const Row& row, Case* out);
  bool AimBranch(Case* out);
  uint64_t Target();
  uint64_t CodeTarget();

  FeatureSet features_;
};

// Rows that a user-mode program can't try in isolation, with the reason; null if it can.
const char* WhyExcluded(const Row& row);

}  // namespace kvartz::cpu::x86::oracle
