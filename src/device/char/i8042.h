// 8042 keyboard controller, as far as machines without a PS/2 keyboard use it, and system control
// port A (0x92). Threads: guarded by its slot. Spec: Intel 8042 firmware interface as in the PIIX3
// datasheet 2.5 and the IBM PS/2 technical reference, "Keyboard/auxiliary device controller".
// Modelled: self tests, command byte, output port, the reset pulse, A20 state. Missing: keyboard
// and mouse (nothing answers on the ports); A20 is always open, only its bit is kept.
#pragma once

#include <cstdint>

#include "device/core/device.h"

namespace kvartz {

class I8042 final : public MmioDevice {
 public:
  // Its ports; the handler's offset is the port number.
  static constexpr uint16_t kData = 0x60, kCommand = 0x64, kPort92 = 0x92;

  explicit I8042(const DeviceEnv& env) : MmioDevice(env) {}

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  uint64_t IoRead(uint64_t port, unsigned size) override;
  void IoWrite(uint64_t port, unsigned size, uint64_t value) override;

 private:
  void Command(uint8_t command);
  void Data(uint8_t value);
  void Answer(uint8_t value, bool from_aux = false);
  void WriteOutputPort(uint8_t value);

  uint8_t command_byte_ = 0x47;
  uint8_t output_ = 0;  // the byte in the output buffer
  bool output_full_ = false, output_aux_ = false, last_was_command_ = true;
  uint8_t expects_ = 0;  // the command whose data byte comes next; 0: none
  bool a20_ = true;
};

}  // namespace kvartz
