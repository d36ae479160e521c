#include "machine/microvm.h"

#include "device/pci/pci_device.h"
#include "machine/irq_router.h"

namespace kvartz::machine {

MicrovmBoard::MicrovmBoard(const MachineConfig& config, const MachineType& type,
                           const BoardEnv& env)
    : Board(config, type, env) {}
MicrovmBoard::~MicrovmBoard() { DestroyDevices(); }
void MicrovmBoard::PowerButton() {}
Result<> MicrovmBoard::TakeOptions() {
  return Fail(ErrorCode::kUnsupported, "not supported yet: machine type 'microvm'; use -M pc");
}
Result<> MicrovmBoard::MapRam() { return {}; }
Result<> MicrovmBoard::WireDevices() { return {}; }
Result<> MicrovmBoard::AttachPci(PciDevice&, const Properties&) { return {}; }
Result<Board::MmioSlot> MicrovmBoard::TakeMmioSlot(const DeviceSpec&) { return MmioSlot{}; }
Result<> MicrovmBoard::LoadBoot() { return {}; }

}  // namespace kvartz::machine
