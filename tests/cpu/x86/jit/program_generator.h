// Random programs: straight runs of random instructions, jumps and loops between them, calls, and
// what translated code finds hard: flags read late, code that changes, mappings that change.
#pragma once

#include "cpu/x86/jit/insn_picker.h"

namespace kvartz::cpu::x86::programs {

class ProgramGenerator {
 public:
  explicit ProgramGenerator(const FeatureSet& features) : features_(features) {}
  // The program of this seed; the same every time.
  Program Generate(uint64_t seed, Shape shape, unsigned cpl);

 private:
  void Start(uint64_t seed, Shape shape, unsigned cpl);
  void FillSection(Section* section, unsigned count, bool function);
  void AddItem(Section* section, bool function);
  void EndSection(Section* section, bool function);
  void ResolveTargets();

  // Items by kind.
  void Plain(Item* item, bool function);
  void Branch(Item* item);
  void BackEdge(Item* item, const Section& section);
  void QuietBackEdge(Item* item, int target, uint64_t counter);
  void TightLoop(Item* item);
  void Indirect(Item* item);
  void Call(Item* item);
  void FlagsOnStack(Item* item);
  void Frame(Item* item);
  void AllRegisters(Item* item);
  void Far(Item* item);
  void FarThereAndBack(Item* item);
  void FarTarget(Item* item, unsigned size, int64_t shift, unsigned selector);
  unsigned CodeSelector(unsigned selector) const;
  void Patchable(Item* item);
  void Patch(Item* item, const Section& section);
  void EditMapping(Item* item);
  void LoadSegment(Item* item);

  void Bytes(Item* item, std::initializer_list<unsigned> bytes);
  void Number(Item* item, uint64_t value, unsigned bytes);
  // ModRM and displacement for [at], an offset within DS; `reg` is ModRM's middle field.
  void Absolute(Item* item, unsigned reg, uint64_t at);
  void Relative(Item* item, unsigned size, int target);
  int Ahead() { return next_id_ + static_cast<int>(Below(6)); }
  uint64_t Below(uint64_t limit) { return picker_->Below(limit); }
  bool Chance(unsigned percent) { return picker_->Chance(percent); }
  const Layout& layout() const { return picker_->layout(); }
  unsigned near_size() const { return layout().is16() ? 2 : 4; }

  // A target that stands for function n (counted down) until the functions are there.
  static constexpr int kFunction = -100;
  static constexpr unsigned kFunctions = 2;

  const FeatureSet features_;
  std::unique_ptr<InsnPicker> picker_;
  Program program_;
  int next_id_ = 0;
  std::vector<int> function_ids_;  // of the first item of each function
};

}  // namespace kvartz::cpu::x86::programs
