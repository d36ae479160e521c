// Random instruction cases: an encoding of a table row, and registers and memory that make it do
// something of interest (page edges, faults, special floating-point values) without leading the
// host astray.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "cpu/x86/decode/insn.h"
#include "cpu/x86/oracle/native_cpu.h"

namespace kvartz::cpu::x86::oracle {

struct Poke {
  uint64_t address;
  uint64_t value;
};

struct Case {
  Mode mode = Mode::k64;
  Registers registers;
  std::vector<uint8_t> code;
  std::vector<Poke> pokes;          // writable data to set before
  bool undefined_encoding = false;  // no row matches: #UD is expected
  Insn insn;
};

class CaseGenerator {
 public:
  CaseGenerator(uint64_t seed, const FeatureSet& features) : random_(seed), features_(features) {}

  // False if the row can't be tried this time (try again) or at all.
  bool Generate(const Row& row, Mode mode, Case* out);
  uint64_t Random() { return random_(); }
  uint64_t Below(uint64_t limit) { return random_() % limit; }
  bool Chance(unsigned percent) { return Below(100) < percent; }
  // A value that tends to corner cases.
  uint64_t Value();
  void FillInteresting(uint8_t* bytes, unsigned size);

 private:
  bool Encode(const Row& row, Case* out);
  void EncodePrefixes(const Row& row, Case* out, unsigned* rex);
  void EncodeModrm(const Row& row, Case* out);
  void EncodeImmediates(const Row& row, Case* out);
  void RandomRegisters(Case* out);
  bool AimMemory(Case* out);
  bool AimImplicit(const Row& row, Case* out);
  bool AimBranch(Case* out);
  uint64_t Target();
  uint64_t CodeTarget();

  std::mt19937_64 random_;
  FeatureSet features_;
  size_t displacement_at_ = 0;  // where in the code the displacement stands
  unsigned displacement_size_ = 0;
  size_t immediate_at_ = 0;
};

// Rows that a user-mode program can't try in isolation, with the reason; null if it can.
const char* WhyExcluded(const Row& row);

}  // namespace kvartz::cpu::x86::oracle
