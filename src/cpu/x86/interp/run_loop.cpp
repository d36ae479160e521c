// The inner loop: blocks of decoded instructions, one after the other.
#include "cpu/x86/code_log.h"
#include "cpu/x86/interp/block_cache.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86 {
namespace {

uint64_t CodeAddress(const Cpu& cpu) {
  return cpu.code_mode == CodeMode::k64 ? cpu.rip
                                        : static_cast<uint32_t>(cpu.rip + cpu.seg[kCs].base);
}

// Host address of the code at `linear`; null if no memory answers there.
const uint8_t* Fetch(Cpu& cpu, uint64_t linear) {
  const TlbEntry& entry = cpu.tlb->code(linear);
  if (entry.execute == cpu.tlb->Tag(linear)) [[likely]] {
    return reinterpret_cast<const uint8_t*>(linear + entry.addend);
  }
  return FetchCode(cpu, linear);
}

void Execute(Cpu& cpu, const Insn& insn) {
  cpu.insn_rip = cpu.rip;
  cpu.rip += insn.length;
  ++cpu.insn_count;
  insn.exec(cpu, insn);
}

// All of the block's code lies within CS's limit.
bool WithinLimit(const Cpu& cpu, const Block& block) {
  return cpu.code_mode == CodeMode::k64 || cpu.rip + block.bytes - 1 <= cpu.seg[kCs].limit;
}

// The block that follows `previous` (null: unknown, or the mode may have changed).
Block* Next(Cpu& cpu, BlockCache& cache, Block* previous, uint64_t linear, const uint8_t* host,
            uint16_t mode) {
  if (previous == nullptr || !previous->direct) {
    return cache.Find(cpu, linear, host, mode);
  }
  for (const Block::Link& link : previous->links) {
    if (link.host == host && link.block->host == host && link.block->second == nullptr &&
        link.block->valid()) {
      return link.block;
    }
  }
  const uint64_t flushes = cache.flushes();
  Block* block = cache.Find(cpu, linear, host, mode);
  if (cache.flushes() == flushes) {
    previous->links[1] = previous->links[0];
    previous->links[0] = {host, block};
  }
  return block;
}

}  // namespace

void RunBlocks(Cpu& cpu) {
  BlockCache& cache = *static_cast<BlockCache*>(cpu.blocks);
  uint16_t mode = ModeKey(cpu);
  Block* block = nullptr;  // null: the next one is looked up from scratch
  uint64_t block_linear = 0;
  while (!Requested(cpu)) {
    cpu.insn_rip = cpu.rip;  // faults of the fetch report it
    const uint64_t linear = CodeAddress(cpu);
    // Within one page the translation stands: what could change it ends a block with changes_mode,
    // or is a request.
    const uint8_t* host = block != nullptr && (linear ^ block_linear) < 4096
                              ? block->host + (linear - block_linear)
                              : Fetch(cpu, linear);
    if (host == nullptr) [[unlikely]] {
      Execute(cpu, *cache.DecodeUncached(cpu, linear));
      mode = ModeKey(cpu);
      block = nullptr;
      continue;
    }
    block = Next(cpu, cache, block, linear, host, mode);
    block_linear = linear;
    if (LogsExecution()) [[unlikely]]
      LogExecution(cpu, "interpreted block");
    if (!WithinLimit(cpu, *block)) [[unlikely]] {
      StepInstruction(cpu);
      mode = ModeKey(cpu);
      block = nullptr;
      continue;
    }
    const Insn* insn = block->insns;
    const Insn* const end = insn + block->count;
    uint64_t rip = cpu.rip;
    do {
      cpu.insn_rip = rip;
      rip += insn->length;  // only the last instruction may change it, or one that sets a request
      cpu.rip = rip;
      ++cpu.insn_count;
      insn->exec(cpu, *insn);
      if (Requested(cpu)) [[unlikely]] {
        return;
      }
    } while (++insn != end);
    if (block->changes_mode) {
      mode = ModeKey(cpu);
      block = nullptr;
    }
  }
}

void StepInstruction(Cpu& cpu) {
  BlockCache& cache = *static_cast<BlockCache*>(cpu.blocks);
  if (LogsExecution()) [[unlikely]]
    LogExecution(cpu, "interpreted instruction");
  cpu.insn_rip = cpu.rip;
  const uint64_t linear = CodeAddress(cpu);
  const uint8_t* host = Fetch(cpu, linear);
  if (host == nullptr) {
    Execute(cpu, *cache.DecodeUncached(cpu, linear));
    return;
  }
  const Block* block = cache.Find(cpu, linear, host, ModeKey(cpu));
  const Insn& insn = block->insns[0];
  if (cpu.code_mode != CodeMode::k64 && cpu.rip + insn.length - 1 > cpu.seg[kCs].limit) {
    Raise(cpu, kGP, 0);
  }
  Execute(cpu, insn);
}

void FlushBlocks(Cpu& cpu) { static_cast<BlockCache*>(cpu.blocks)->Flush(); }

}  // namespace kvartz::cpu::x86
