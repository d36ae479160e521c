// A random program as a list of items, each of which can be left out, and its assembly.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/x86/jit/layout.h"

namespace kvartz::cpu::x86::programs {

// A field of an item's code that holds the place of another item.
struct Fixup {
  uint8_t at = 0;
  uint8_t size = 0;
  uint8_t end = 0;  // not 0: relative to this offset, the end of the instruction
  int target = -1;  // an item's id; -1: the start of the code pages
  int64_t addend = 0;
};

// One or a few instructions that belong together; execution enters at the first only.
struct Item {
  enum class Flow {
    kNext,    // to the next item
    kBranch,  // to the next item, or to one of the targets
    kCall,    // likewise: comes back to the next item by a return
    kJump,    // to one of the targets
    kReturn,  // to behind some call
    kEnd,
  };
  int id = 0;  // ascending within a program
  std::vector<uint8_t> code;
  std::vector<Fixup> fixups;
  Flow flow = Flow::kNext;
  std::vector<int> targets;
  int needs = -1;          // the item that this one modifies: without it, this one goes too
  int patch_at = -1;       // offset of a byte in `code` that may be modified
  bool must_stay = false;  // the end of a section
  // Status flags: read before this item wrote them; surely written with a defined value; left
  // undefined.
  uint64_t tested = 0, defined = 0, undefined = 0;
};

// Items that lie one behind the other.
struct Section {
  uint64_t offset = 0;  // from the start of the code pages
  std::vector<Item> items;
};

struct Program {
  uint64_t seed = 0;
  Shape shape = Shape::k64;
  unsigned cpl = 3;
  std::vector<Section> sections;  // the first is where it starts; the others are functions
  std::vector<int> jump_table;    // items
  std::vector<uint32_t> counters;
  // The state it starts in.
  uint64_t gpr[16] = {};
  uint64_t rflags = 2;
  uint64_t cr0_bits = 0;       // besides the usual
  uint64_t segment_shift = 0;  // base of DS and ES, down from the layout's
  // By segment register, in protected mode.
  enum class Segment : uint8_t { kUsual, kTight, kDown, kReadOnly, kNull };
  Segment segments[6] = {};
  XsaveArea fpu;
  uint64_t data_seed = 0;
  bool code_writable = false;
  bool high_half = false;    // runs in the upper half of the address space
  bool interrupted = false;  // is to be run with interrupts at random times
};

struct Image {
  struct Line {
    uint64_t offset = 0;  // of an item, from the start of the code pages
    size_t size = 0;
    uint64_t undefined = 0;  // flags that may be undefined when it begins, or at its fault
    bool end = false;
  };
  std::vector<uint8_t> code;     // all code pages
  std::vector<uint8_t> control;  // the control page
  std::vector<Line> lines;
};

// False if the sections don't fit their places. `keep`: by id, which items are left; empty: all.
bool Assemble(const Program& program, const std::vector<bool>& keep, Image* image);

}  // namespace kvartz::cpu::x86::programs
