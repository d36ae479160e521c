// The firmware configuration device (QEMU's fw_cfg): named data for firmware and kernels. Threads:
// guarded by its slot. Spec: docs/specs/fw_cfg.rst of QEMU. Modelled: selector and data ports, DMA
// (select, read, skip), the file directory. Missing: items that the guest writes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "device/core/device.h"

namespace kvartz {

class FwCfg final : public MmioDevice {
 public:
  static constexpr uint16_t kBase = 0x510;  // 12 ports; the handler's offsets are 0..11

  enum Key : uint16_t {
    kSignature = 0x00,
    kId = 0x01,
    kUuid = 0x02,
    kRamSize = 0x03,
    kNoGraphic = 0x04,
    kCpuCount = 0x05,
    kNuma = 0x0d,
    kBootMenu = 0x0e,
    kMaxCpus = 0x0f,
    kFileDirectory = 0x19,
    kFirstFile = 0x20,
    kIrq0Override = 0x8002,
  };

  explicit FwCfg(const DeviceEnv& env);

  // Before the machine runs, or at reset. Integers are little-endian.
  void SetItem(uint16_t key, std::vector<uint8_t> data);
  void SetInteger(uint16_t key, uint64_t value, unsigned size);
  static constexpr size_t kMaxName = 55;
  // A named file ("etc/e820"). Replaces an earlier one.
  void SetFile(const std::string& name, std::vector<uint8_t> data);

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  uint64_t IoRead(uint64_t offset, unsigned size) override;
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;

 private:
  void Select(uint16_t key);
  uint8_t NextByte();
  void RunDma(uint64_t address);
  bool Transfer(uint64_t address, uint32_t length);
  void BuildDirectory();

  GuestMemory memory_;
  std::map<uint16_t, std::vector<uint8_t>> items_;
  std::map<std::string, uint16_t> files_;  // sorted by name, as the directory is
  uint16_t next_file_ = kFirstFile;
  uint16_t key_ = 0;
  uint32_t position_ = 0;
  uint32_t dma_high_ = 0;
};

}  // namespace kvartz
