#include "cpu/x86/kvm_clock.h"

#include "base/clock.h"
#include "base/endian.h"
#include "cpu/x86/engine.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint32_t kWallClockOld = 0x11, kSystemTimeOld = 0x12, kWallClock = 0x4b564d00,
                   kSystemTime = 0x4b564d01;

struct WallClock {
  Le32 version, seconds, nanoseconds;
};
static_assert(sizeof(WallClock) == 12);

struct VcpuTime {
  Le32 version, pad0;
  Le64 tsc_timestamp, system_time;
  Le32 tsc_to_system_mul;
  int8_t tsc_shift;
  uint8_t flags;
  uint8_t pad[2];
};
static_assert(sizeof(VcpuTime) == 32);

void WritePhysical(Cpu& cpu, uint64_t address, const void* data, unsigned size) {
  for (unsigned i = 0; i < size; i += 4) {
    uint32_t word;
    std::memcpy(&word, static_cast<const uint8_t*>(data) + i, 4);
    BusWrite(cpu.tlb->view_cache(), address + i, 4, word);
  }
}

// Host time when guest time was 0.
void WriteWallClock(Cpu& cpu, uint64_t address) {
  int64_t zero = HostRealtimeNs() - cpu.vcpu->NowNs();
  WallClock clock{.version = 2u,
                  .seconds = static_cast<uint32_t>(zero / 1'000'000'000),
                  .nanoseconds = static_cast<uint32_t>(zero % 1'000'000'000)};
  WritePhysical(cpu, address, &clock, sizeof(clock));
}

// The TSC ticks once a nanosecond of guest time, so what is written once stays true, also across
// stops and migrations.
void WriteSystemTime(Cpu& cpu, uint64_t address) {
  VcpuTime time{};
  time.version = 2u;
  time.tsc_timestamp = cpu.vcpu->msrs.tsc_offset;
  time.system_time = 0u;
  time.tsc_to_system_mul = 0x80000000u;  // (delta << 1) * 2^31 / 2^32
  time.tsc_shift = 1;
  time.flags = 1;  // the same on all CPUs
  WritePhysical(cpu, address, &time, sizeof(time));
}

}  // namespace

bool KvmClockOwns(uint32_t msr) {
  return msr == kWallClockOld || msr == kSystemTimeOld || msr == kWallClock || msr == kSystemTime;
}

bool ReadKvmClock(Cpu& cpu, uint32_t msr, uint64_t* value) {
  const MsrState& msrs = cpu.vcpu->msrs;
  *value = msr == kWallClock || msr == kWallClockOld ? msrs.kvm_wall_clock : msrs.kvm_system_time;
  return true;
}

bool WriteKvmClock(Cpu& cpu, uint32_t msr, uint64_t value) {
  MsrState& msrs = cpu.vcpu->msrs;
  if (msr == kWallClock || msr == kWallClockOld) {
    msrs.kvm_wall_clock = value;
    if (value) WriteWallClock(cpu, value & ~3ull);
  } else {
    msrs.kvm_system_time = value;
    if (value & 1) WriteSystemTime(cpu, value & ~3ull);
  }
  return true;
}

}  // namespace kvartz::cpu::x86
