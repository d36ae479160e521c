// The engine's account of itself: one row a number.
#include <iterator>

#include "cpu/x86/jit/engine.h"

namespace kvartz::cpu::x86::jit {
namespace {

struct CounterRow {
  uint64_t Counters::* value;
  const char* name;
  const char* meaning;
};
constexpr CounterRow kRows[] = {
    {&Counters::units, "units translated", "pieces of guest code, at most 48 instructions each"},
    {&Counters::unit_insns, "instructions translated", "guest instructions in them"},
    {&Counters::dispatches, "dispatches", "returns to C++ to be told which unit comes next"},
    {&Counters::links, "links", "direct branches tied to the unit that they go to"},
    {&Counters::fills, "slot fills", "translations that the page tables were asked for"},
    {&Counters::fill_failures, "slot fill failures",
     "accesses that no slot can hold: device, fault, page boundary, watched page"},
    {&Counters::executes, "interpreted in units",
     "instructions within units that the interpreter's functions carry out"},
    {&Counters::steps, "interpreted outside",
     "instructions of no unit, or whose access no slot can hold"},
    {&Counters::killed_units, "units dropped",
     "their code changed, or how their accesses are checked"},
    {&Counters::evictions, "evictions", "a region of code memory was full, its units are dropped"},
    {&Counters::flushes, "flushes", "all units dropped: RAM or ROM moved"},
    {&Counters::traps, "host exceptions", "that were the guest's: #DE, #GP, #MF, #XM"},
    {&Counters::units16, "16-bit units translated", "of those translated"},
    {&Counters::units32, "32-bit units translated", "of those translated"},
};
static_assert(sizeof(Counters) == std::size(kRows) * sizeof(uint64_t), "a row for each counter");

}  // namespace

std::vector<EngineStatistic> Engine::Statistics() const {
  std::vector<EngineStatistic> rows = {
      {"code bytes", memory_.size(), "memory for translated code"},
      {"code bytes used", store_.bytes_used(),
       "units, dropped ones too until their region is emptied"},
      {"units", store_.live(), "that can be entered"},
      {"units waiting", store_.dropped(), "dropped, their memory still taken"},
      {"pages", pages_.size(), "of guest code with units, counted by mode"},
  };
  for (const CounterRow& row : kRows) rows.push_back({row.name, counters_.*row.value, row.meaning});
  return rows;
}

}  // namespace kvartz::cpu::x86::jit
