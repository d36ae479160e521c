// A CPU of the own engine with 8 MiB of RAM and nothing else: code goes in, registers come out. One
// thread.
#pragma once

#include <csetjmp>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cpu/x86/cpu.h"
#include "cpu/x86/interp/block_cache.h"
#include "cpu/x86/mmu.h"
#include "memory/address_space.h"

namespace kvartz::cpu::x86 {

class TestMachine {
 public:
  static constexpr uint64_t kRamBytes = 8 << 20;
  static constexpr uint64_t kCode = 0x10000, kData = 0x20000, kStack = 0x40000;
  static constexpr uint64_t kTables =
      0x100000;  // page tables of the 64-bit mode: the first GiB, identity
  static constexpr uint64_t kNotPresent = 0x30000;  // this page isn't mapped in 64-bit mode
  static constexpr uint64_t kReadOnly = 0x31000;    // this one is read-only

  explicit TestMachine(CodeMode mode = CodeMode::k64) : memory_("memory", uint64_t{1} << 40) {
    ram_ = *RamBlock::Create("ram", kRamBytes);
    Region region;
    region.name = "ram";
    region.kind = RegionKind::kRam;
    region.size = kRamBytes;
    region.ram = ram_;
    memory_.Add(region);
    tlb_ = std::make_unique<Tlb>(memory_, tables_.data());
    blocks_ = *BlockCache::Create(FeatureSet::All());
    cpu.tlb = tlb_.get();
    cpu.blocks = blocks_.get();
    SetMode(mode);
  }

  uint8_t* ram(uint64_t address) { return ram_->host() + address; }
  template <typename T>
  T Load(uint64_t address) {
    T value;
    std::memcpy(&value, ram(address), sizeof value);
    return value;
  }
  template <typename T>
  void Store(uint64_t address, T value) {
    std::memcpy(ram(address), &value, sizeof value);
  }

  // 64-bit user mode with paging; 32-bit flat and 16-bit real mode without.
  void SetMode(CodeMode mode) {
    const bool real = mode == CodeMode::k16;
    const uint32_t size = mode == CodeMode::k32 ? Segment::kDb : 0;
    const uint32_t dpl = mode == CodeMode::k64 ? 3 << 5 : 0;
    for (Segment& segment : cpu.seg) {
      segment = {.base = 0,
                 .limit = real ? 0xffffu : ~0u,
                 .attributes = Segment::kP | Segment::kS | 3 | size | dpl,
                 .selector = 0};
    }
    cpu.seg[kCs].attributes |= 8 | (mode == CodeMode::k64 ? Segment::kL : 0);
    cpu.cr0 = real ? 0 : cr0::kPe | cr0::kWp;
    if (mode == CodeMode::k64) {
      BuildPageTables();
      cpu.cr0 |= cr0::kPg;
      cpu.cr3 = kTables;
      cpu.cr4 = cr4::kPae;
      cpu.efer = efer::kLme | efer::kLma;
    }
    UpdateMode(cpu);
  }

  void SetCode(std::span<const uint8_t> code) {
    std::memcpy(ram(kCode), code.data(), code.size());
    FlushBlocks(cpu);  // host writes aren't watched
    cpu.rip = kCode;
    cpu.gpr[kRsp] = kStack;
  }
  void SetCode(std::initializer_list<uint8_t> code) {
    SetCode(std::span(code.begin(), code.size()));
  }

  // Executes `count` instructions (REP: iterations). The vector of the fault, if there is one.
  std::optional<unsigned> Step(unsigned count = 1) {
    jmp_buf exit;
    cpu.fault_exit = &exit;
    if (setjmp(exit) != 0) {
      return cpu.fault.vector;
    }
    SetRequest(cpu, request::kStep);
    for (unsigned i = 0; i < count; ++i) {
      StepInstruction(cpu);
    }
    ClearRequest(cpu, request::kStep);
    return std::nullopt;
  }
  // Runs until something is requested or faults. INT3-like ends: put an undefined instruction
  // there.
  std::optional<unsigned> Run() {
    jmp_buf exit;
    cpu.fault_exit = &exit;
    if (setjmp(exit) != 0) {
      return cpu.fault.vector;
    }
    ClearRequest(cpu, ~0u);
    for (;;) {
      RunBlocks(cpu);
      const uint32_t requests = __atomic_load_n(&cpu.requests, __ATOMIC_RELAXED);
      ClearRequest(cpu, request::kCodeWritten);
      if ((requests & ~request::kCodeWritten) != 0) {
        return std::nullopt;
      }
    }
  }

  Cpu cpu;

 private:
  void BuildPageTables() {
    constexpr uint64_t kPresentWritableUser = 7;
    Store<uint64_t>(kTables, (kTables + 0x1000) | kPresentWritableUser);
    Store<uint64_t>(kTables + 0x1000, (kTables + 0x2000) | kPresentWritableUser);
    Store<uint64_t>(kTables + 0x2000, (kTables + 0x3000) | kPresentWritableUser);
    for (uint64_t i = 1; i < 4; ++i) {
      Store<uint64_t>(kTables + 0x2000 + i * 8, (i << 21) | 0x80 | kPresentWritableUser);
    }
    for (uint64_t i = 0; i < 512; ++i) {
      const uint64_t page = i << 12;
      Store<uint64_t>(kTables + 0x3000 + i * 8,
                      page == kNotPresent ? 0 : page | (page == kReadOnly ? 5 : 7));
    }
  }

  AddressSpace memory_;
  std::shared_ptr<RamBlock> ram_;
  std::vector<TlbEntry> tables_{Tlb::kClassCount * Tlb::kEntries};
  std::unique_ptr<Tlb> tlb_;
  std::unique_ptr<BlockCache> blocks_;
};

}  // namespace kvartz::cpu::x86
