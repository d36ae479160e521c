#include "device/char/i8042.h"

namespace kvartz {

namespace {
constexpr uint8_t kStatusOutputFull = 0x01, kStatusSelfTest = 0x04, kStatusCommand = 0x08,
                  kStatusUnlocked = 0x10, kStatusAux = 0x20;
constexpr uint8_t kReadCommandByte = 0x20, kWriteCommandByte = 0x60, kDisableAux = 0xa7,
                  kEnableAux = 0xa8, kTestAux = 0xa9, kSelfTest = 0xaa, kTestKeyboard = 0xab,
                  kDisableKeyboard = 0xad, kEnableKeyboard = 0xae, kReadInputPort = 0xc0,
                  kReadOutputPort = 0xd0, kWriteOutputPort = 0xd1, kWriteKeyboardBuffer = 0xd2,
                  kWriteAuxBuffer = 0xd3, kWriteAux = 0xd4, kA20Off = 0xdd, kA20On = 0xdf,
                  kPulse = 0xf0;
constexpr uint8_t kByteKeyboardOff = 0x10, kByteAuxOff = 0x20;
constexpr uint8_t kPortResetReleased = 0x01, kPortA20 = 0x02;
}  // namespace

void I8042::Answer(uint8_t value, bool from_aux) {
  output_ = value;
  output_full_ = true;
  output_aux_ = from_aux;
}

void I8042::WriteOutputPort(uint8_t value) {
  a20_ = value & kPortA20;
  if (!(value & kPortResetReleased))
    env_.machine.Ask(MachineControl::Request::kReset, "keyboard controller");
}

void I8042::Command(uint8_t command) {
  last_was_command_ = true;
  expects_ = 0;
  switch (command) {
    case kReadCommandByte:
      return Answer(command_byte_);
    case kDisableAux:
      command_byte_ |= kByteAuxOff;
      return;
    case kEnableAux:
      command_byte_ &= ~kByteAuxOff;
      return;
    case kDisableKeyboard:
      command_byte_ |= kByteKeyboardOff;
      return;
    case kEnableKeyboard:
      command_byte_ &= ~kByteKeyboardOff;
      return;
    case kTestAux:
    case kTestKeyboard:
      return Answer(0x00);
    case kSelfTest:
      return Answer(0x55);
    case kReadInputPort:
      return Answer(0x80);
    case kReadOutputPort:
      return Answer(kPortResetReleased | (a20_ ? kPortA20 : 0));
    case kWriteCommandByte:
    case kWriteOutputPort:
    case kWriteKeyboardBuffer:
    case kWriteAuxBuffer:
    case kWriteAux:
      expects_ = command;
      return;
    case kA20Off:
      a20_ = false;
      return;
    case kA20On:
      a20_ = true;
      return;
  }
  // Pulses the lines of the output port whose bits are 0; bit 0 is the processor's reset.
  if (command >= kPulse && !(command & 1))
    env_.machine.Ask(MachineControl::Request::kReset, "keyboard controller");
}

void I8042::Data(uint8_t value) {
  last_was_command_ = false;
  switch (expects_) {
    case kWriteCommandByte:
      command_byte_ = value;
      break;
    case kWriteOutputPort:
      WriteOutputPort(value);
      break;
    case kWriteKeyboardBuffer:
      Answer(value);
      break;
    case kWriteAuxBuffer:
      Answer(value, true);
      break;
  }
  expects_ = 0;
}

uint64_t I8042::IoRead(uint64_t port, unsigned) {
  switch (port) {
    case kData:
      output_full_ = false;
      return output_;
    case kCommand:
      return (output_full_ ? kStatusOutputFull | (output_aux_ ? kStatusAux : 0) : 0) |
             kStatusSelfTest | (last_was_command_ ? kStatusCommand : 0) | kStatusUnlocked;
    default:
      return a20_ ? kPortA20 : 0;
  }
}

void I8042::IoWrite(uint64_t port, unsigned, uint64_t value) {
  switch (port) {
    case kData:
      return Data(value);
    case kCommand:
      return Command(value);
    default:
      a20_ = value & kPortA20;
      if (value & 1) env_.machine.Ask(MachineControl::Request::kReset, "port 0x92");
  }
}

void I8042::Reset(ResetPhase phase) {
  if (phase != ResetPhase::kEnter) return;
  command_byte_ = 0x47;
  output_ = 0;
  output_full_ = output_aux_ = false;
  last_was_command_ = true;
  expects_ = 0;
  a20_ = true;
}

void I8042::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Field("command_byte", command_byte_);
  v.Field("output", output_);
  v.Field("output_full", output_full_);
  v.Field("output_aux", output_aux_);
  v.Field("last_was_command", last_was_command_);
  v.Field("expects", expects_);
  v.Field("a20", a20_);
}

}  // namespace kvartz
