// 16550A UART (isa-serial).     Threads: guarded by its bus slot; the chardev's side runs on the
// main loop. Spec: National Semiconductor PC16550D datasheet (June 1995), section 8 "Registers".
// Modelled: FIFOs, all five interrupt sources, loopback, break, receive time-out, modem lines that
// follow the connection. Missing: parity and framing errors (the host side has none), the divisor's
// effect on speed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "device/core/device.h"
#include "host/chardev/chardev.h"

namespace kvartz {

class Serial16550 final : public MmioDevice, private host::CharUser {
 public:
  static constexpr uint64_t kPortCount = 8;
  // Where PC software looks for COM1..COM4.
  static constexpr uint16_t kIoBase[4] = {0x3f8, 0x2f8, 0x3e8, 0x2e8};
  static constexpr unsigned kIrq[4] = {4, 3, 4, 3};

  Serial16550(const DeviceEnv& env, IrqLine irq);
  ~Serial16550() override;

  // Connects the host's side; without one, output is dropped and nothing arrives. Before the
  // machine runs. Errors: the chardev has no free port.
  Result<> ConnectChardev(host::Chardev& chardev);

  // IoHandler; called with the lock held.
  uint64_t IoRead(uint64_t offset, unsigned size) override;
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;
  // Device.
  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  void Quiesce() override;

 private:
  static constexpr size_t kFifoSize = 16;
  static constexpr size_t kOutMax = 16384;
  // Output is gathered this long, so that a chatty guest doesn't wake the loop for each byte.
  static constexpr int64_t kGatherNs = 1'000'000;

  // host::CharUser; on the loop, take the lock.
  size_t CanReceive() override;
  void Receive(std::span<const uint8_t> data) override;
  void CharEventArrived(host::CharEvent event) override;
  void CharWritable() override;

  // With the lock held.
  uint8_t ReadReceiver();
  void WriteTransmitter(uint8_t byte);
  void WriteFifoControl(uint8_t value);
  void WriteModemControl(uint8_t value);
  void PushReceived(uint8_t byte, uint8_t line_bits);
  uint8_t InterruptId() const;
  uint8_t LineStatus() const;
  void UpdateModemStatus();
  void UpdateIrq();
  bool TransmitterHasRoom() const { return out_.size() + kFifoSize <= kOutMax; }
  size_t RxLimit() const { return fcr_ & 1 ? kFifoSize : 1; }
  void ArmRxTimeout();
  void AcceptInputIfStalled();
  // On the loop, take the lock.
  void RxTimeout();
  void FlushOutput();

  IrqLine irq_;
  uint8_t ier_ = 0, fcr_ = 0, lcr_ = 0, mcr_ = 0, msr_ = 0, scr_ = 0;
  uint16_t divisor_ = 0;
  uint8_t line_errors_ = 0;  // LSR bits 1..4, cleared when read
  bool thre_pending_ = false;
  bool rx_timed_out_ = false;
  std::array<uint8_t, kFifoSize> rx_data_{};
  std::array<uint8_t, kFifoSize> rx_errors_{};  // LSR bits that came with each byte
  uint8_t rx_begin_ = 0, rx_count_ = 0;
  std::vector<uint8_t> out_;  // transmitted, on its way to the loop
  bool flush_armed_ = false;
  bool input_stalled_ = false;  // CanReceive said 0

  // Loop-owned.
  std::unique_ptr<host::Chardev::Port> port_;
  std::vector<uint8_t> sending_;  // older than out_
  size_t sent_ = 0;

  Timer rx_timer_;
  Timer flush_timer_;
  Timer input_timer_;
};

}  // namespace kvartz
