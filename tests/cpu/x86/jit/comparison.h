// What two runs of one program differ in, and how a program reads.
#pragma once

#include <string>

#include "cpu/x86/jit/program_board.h"

namespace kvartz::cpu::x86::programs {

// The status flags at a fault are compared only if this is set: an engine may leave those undefined
// that the program overwrites before it reads them. What a program reads is always compared.
constexpr bool kCompareFaultFlags = false;

// One line for each difference; empty if there is none. `first` ran without translation.
std::string Compare(const Image& image, ProgramBoard& first, const End& first_end,
                    ProgramBoard& second, const End& second_end);

std::string Describe(const Program& program);
std::string Disassemble(const Program& program, const Image& image);

}  // namespace kvartz::cpu::x86::programs
