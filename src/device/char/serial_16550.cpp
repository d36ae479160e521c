#include "device/char/serial_16550.h"

#include <fmt/core.h>

#include <algorithm>

#include "device/core/backends.h"
#include "device/core/device_types.h"

namespace kvartz {

Result<std::unique_ptr<Device>> MakeIsaSerial(DeviceRequest& request);

namespace {

// Registers (table 2 of the datasheet).
enum Reg : uint64_t {
  kData = 0,
  kIer = 1,
  kIirFcr = 2,
  kLcr = 3,
  kMcr = 4,
  kLsr = 5,
  kMsr = 6,
  kScr = 7
};

constexpr uint8_t kIerRx = 0x01, kIerThre = 0x02, kIerLine = 0x04, kIerModem = 0x08,
                  kIerMask = 0x0f;
// Table 5, "Interrupt Control Functions".
constexpr uint8_t kIirNone = 0x01, kIirModem = 0x00, kIirThre = 0x02, kIirRx = 0x04,
                  kIirLine = 0x06, kIirTimeout = 0x0c, kIirFifos = 0xc0;
constexpr uint8_t kFcrEnable = 0x01, kFcrClearRx = 0x02, kFcrKept = 0xc9;
constexpr uint8_t kLcrDlab = 0x80;
constexpr uint8_t kMcrDtr = 0x01, kMcrRts = 0x02, kMcrOut1 = 0x04, kMcrOut2 = 0x08, kMcrLoop = 0x10,
                  kMcrMask = 0x1f;
constexpr uint8_t kLsrData = 0x01, kLsrOverrun = 0x02, kLsrBreak = 0x10, kLsrErrors = 0x1e,
                  kLsrThre = 0x20, kLsrTemt = 0x40, kLsrFifoError = 0x80;
constexpr uint8_t kMsrCts = 0x10, kMsrDsr = 0x20, kMsrRi = 0x40, kMsrDcd = 0x80, kMsrDeltas = 0x0f,
                  kMsrTrailingRi = 0x04;

constexpr uint8_t kRxTrigger[4] = {1, 4, 8, 14};  // FCR bits 6, 7
constexpr int64_t kBaudBase = 115200;             // 1.8432 MHz / 16

struct IsaSerialConfig {
  uint32_t index = 0;
  uint32_t iobase = 0;
  uint32_t irq = 0;
  std::string chardev;
};
constexpr PropertySpec kIsaSerialProperties[] = {
    PROPERTY(IsaSerialConfig, "index", index, "0 to 3: COM1 to COM4"),
    PROPERTY(IsaSerialConfig, "iobase", iobase, "first I/O port, if not that of the index"),
    PROPERTY(IsaSerialConfig, "irq", irq, "interrupt line, if not that of the index"),
    PROPERTY(IsaSerialConfig, "chardev", chardev, "id of the host's side"),
};

}  // namespace

Serial16550::Serial16550(const DeviceEnv& env, IrqLine irq)
    : MmioDevice(env),
      irq_(irq),
      rx_timer_(env.loop, env.clock, [this] { RxTimeout(); }),
      flush_timer_(env.loop, [this] { FlushOutput(); }),
      input_timer_(env.loop, [this] {
        if (port_) port_->AcceptInput();
      }) {
  Reset(ResetPhase::kEnter);
}

Serial16550::~Serial16550() = default;

Result<> Serial16550::ConnectChardev(host::Chardev& chardev) {
  port_ = TRY(chardev.Connect(*this));
  return {};
}

// ---- the guest's side ----

uint64_t Serial16550::IoRead(uint64_t offset, unsigned) {
  switch (offset & 7) {
    case kData:
      return lcr_ & kLcrDlab ? divisor_ & 0xff : ReadReceiver();
    case kIer:
      return lcr_ & kLcrDlab ? divisor_ >> 8 : ier_;
    case kIirFcr: {
      uint8_t id = InterruptId();
      if (id == kIirThre) {
        thre_pending_ = false;
        UpdateIrq();
      }
      return id | (fcr_ & kFcrEnable ? kIirFifos : 0);
    }
    case kLcr:
      return lcr_;
    case kMcr:
      return mcr_;
    case kLsr: {
      uint8_t status = LineStatus();
      line_errors_ = 0;
      UpdateIrq();
      return status;
    }
    case kMsr: {
      uint8_t status = msr_;
      msr_ &= ~kMsrDeltas;
      UpdateIrq();
      return status;
    }
    default:
      return scr_;
  }
}

void Serial16550::IoWrite(uint64_t offset, unsigned, uint64_t value64) {
  uint8_t value = static_cast<uint8_t>(value64);
  switch (offset & 7) {
    case kData:
      if (lcr_ & kLcrDlab) {
        divisor_ = static_cast<uint16_t>((divisor_ & 0xff00) | value);
      } else {
        WriteTransmitter(value);
      }
      break;
    case kIer:
      if (lcr_ & kLcrDlab) {
        divisor_ = static_cast<uint16_t>((divisor_ & 0x00ff) | value << 8);
      } else {
        // Enabling it while the transmitter is idle raises it at once.
        if ((value & ~ier_ & kIerThre) && TransmitterHasRoom()) thre_pending_ = true;
        ier_ = value & kIerMask;
        UpdateIrq();
      }
      break;
    case kIirFcr:
      WriteFifoControl(value);
      break;
    case kLcr:
      lcr_ = value;
      break;
    case kMcr:
      WriteModemControl(value);
      break;
    case kScr:
      scr_ = value;
      break;
    default:  // LSR and MSR are written in the factory only
      break;
  }
}

uint8_t Serial16550::ReadReceiver() {
  // An empty receiver shows what it held last.
  if (rx_count_ == 0) return rx_data_[(rx_begin_ + kFifoSize - 1) % kFifoSize];
  uint8_t byte = rx_data_[rx_begin_];
  rx_begin_ = (rx_begin_ + 1) % kFifoSize;
  --rx_count_;
  if (rx_count_ > 0) line_errors_ |= rx_errors_[rx_begin_];
  rx_timed_out_ = false;
  ArmRxTimeout();
  UpdateIrq();
  AcceptInputIfStalled();
  return byte;
}

void Serial16550::WriteTransmitter(uint8_t byte) {
  thre_pending_ = false;
  if (mcr_ & kMcrLoop) {
    PushReceived(byte, 0);
  } else if (port_ && out_.size() < kOutMax) {
    out_.push_back(byte);
    if (!flush_armed_) {
      flush_armed_ = true;
      flush_timer_.Arm(env_.loop.clock().NowNs() + kGatherNs);
    } else if (!TransmitterHasRoom()) {
      flush_timer_.Arm(0);
    }
  }
  thre_pending_ = TransmitterHasRoom();
  UpdateIrq();
}

void Serial16550::WriteFifoControl(uint8_t value) {
  bool toggled = (value ^ fcr_) & kFcrEnable;
  if (toggled || ((value & kFcrEnable) && (value & kFcrClearRx))) {
    rx_count_ = 0;
    rx_timed_out_ = false;
    rx_timer_.Cancel();
  }
  // What was transmitted is on the wire already: there is nothing to clear.
  fcr_ = value & kFcrEnable ? value & kFcrKept : 0;
  UpdateIrq();
  AcceptInputIfStalled();
}

void Serial16550::WriteModemControl(uint8_t value) {
  mcr_ = value & kMcrMask;
  UpdateModemStatus();
  UpdateIrq();
  AcceptInputIfStalled();
}

// In loopback the four modem outputs are wired to the four inputs (section 8.6.7).
void Serial16550::UpdateModemStatus() {
  uint8_t lines = kMsrCts | kMsrDsr | kMsrDcd;
  if (mcr_ & kMcrLoop) {
    lines = (mcr_ & kMcrRts ? kMsrCts : 0) | (mcr_ & kMcrDtr ? kMsrDsr : 0) |
            (mcr_ & kMcrOut1 ? kMsrRi : 0) | (mcr_ & kMcrOut2 ? kMsrDcd : 0);
  }
  uint8_t changed = (msr_ ^ lines) & 0xf0;
  // RI's delta is the trailing edge only.
  if (lines & kMsrRi) changed &= ~kMsrRi;
  static_assert(kMsrRi >> 4 == kMsrTrailingRi);
  msr_ = static_cast<uint8_t>(lines | (msr_ & kMsrDeltas) | changed >> 4);
}

uint8_t Serial16550::LineStatus() const {
  uint8_t status = line_errors_;
  if (rx_count_ > 0) status |= kLsrData;
  if (TransmitterHasRoom()) status |= kLsrThre | kLsrTemt;
  for (unsigned i = 0; (fcr_ & kFcrEnable) && i < rx_count_; ++i) {
    if (rx_errors_[(rx_begin_ + i) % kFifoSize]) status |= kLsrFifoError;
  }
  return status;
}

uint8_t Serial16550::InterruptId() const {
  if ((ier_ & kIerLine) && line_errors_) return kIirLine;
  if (ier_ & kIerRx) {
    unsigned trigger = fcr_ & kFcrEnable ? kRxTrigger[fcr_ >> 6] : 1;
    if (rx_count_ >= trigger) return kIirRx;
    if (rx_timed_out_) return kIirTimeout;
  }
  if ((ier_ & kIerThre) && thre_pending_) return kIirThre;
  if ((ier_ & kIerModem) && (msr_ & kMsrDeltas)) return kIirModem;
  return kIirNone;
}

void Serial16550::UpdateIrq() { irq_.Set(InterruptId() != kIirNone); }

void Serial16550::PushReceived(uint8_t byte, uint8_t error_bits) {
  if (rx_count_ >= RxLimit()) {
    line_errors_ |= kLsrOverrun;
    // Without FIFOs the new byte replaces the old one (section 8.6.4, bit 1).
    if (!(fcr_ & kFcrEnable)) rx_data_[rx_begin_] = byte;
  } else {
    unsigned at = (rx_begin_ + rx_count_) % kFifoSize;
    rx_data_[at] = byte;
    rx_errors_[at] = error_bits;
    if (rx_count_++ == 0) line_errors_ |= error_bits;
    rx_timed_out_ = false;
    ArmRxTimeout();
  }
  UpdateIrq();
}

// Bytes below the trigger level that nobody fetches for four character times (section 8.6.3).
void Serial16550::ArmRxTimeout() {
  if (rx_count_ == 0 || !(fcr_ & kFcrEnable)) {
    rx_timer_.Cancel();
    return;
  }
  constexpr int64_t kBitsPerChar = 10;
  int64_t char_ns = kBitsPerChar * 1'000'000'000 * std::max<int64_t>(divisor_, 1) / kBaudBase;
  rx_timer_.Arm(env_.clock.NowNs() + 4 * char_ns);
}

void Serial16550::AcceptInputIfStalled() {
  if (!input_stalled_ || rx_count_ * 2 > RxLimit() || (mcr_ & kMcrLoop)) return;
  input_stalled_ = false;
  input_timer_.Arm(0);
}

// ---- the host's side, on the loop ----

void Serial16550::RxTimeout() {
  LockGuard guard(lock_);
  if (rx_count_ == 0) return;
  rx_timed_out_ = true;
  UpdateIrq();
}

void Serial16550::FlushOutput() {
  for (;;) {
    if (sent_ == sending_.size()) {
      sending_.clear();
      sent_ = 0;
      LockGuard guard(lock_);
      flush_armed_ = false;
      if (out_.empty()) return;
      bool was_full = !TransmitterHasRoom();
      sending_.swap(out_);
      if (was_full) {
        thre_pending_ = true;
        UpdateIrq();
      }
    }
    sent_ += port_->Write(std::span(sending_).subspan(sent_));
    if (sent_ < sending_.size()) {
      // CharWritable goes on.
      LockGuard guard(lock_);
      flush_armed_ = true;
      return;
    }
  }
}

void Serial16550::CharWritable() { FlushOutput(); }

size_t Serial16550::CanReceive() {
  LockGuard guard(lock_);
  size_t room = mcr_ & kMcrLoop || rx_count_ >= RxLimit() ? 0 : RxLimit() - rx_count_;
  if (room == 0) input_stalled_ = true;
  return room;
}

void Serial16550::Receive(std::span<const uint8_t> data) {
  LockGuard guard(lock_);
  for (uint8_t byte : data) PushReceived(byte, 0);
}

void Serial16550::CharEventArrived(host::CharEvent event) {
  if (event != host::CharEvent::kBreak) return;
  LockGuard guard(lock_);
  if (!(mcr_ & kMcrLoop)) PushReceived(0, kLsrBreak);
}

// ---- Device ----

void Serial16550::Reset(ResetPhase phase) {
  if (phase == ResetPhase::kHold) irq_.Set(false);
  if (phase != ResetPhase::kEnter) return;
  rx_timer_.Cancel();
  // Table 3, "Reset configuration". The divisor is undefined; firmware sets it.
  ier_ = fcr_ = lcr_ = mcr_ = scr_ = 0;
  divisor_ = 12;
  line_errors_ = 0;
  thre_pending_ = rx_timed_out_ = false;
  rx_begin_ = rx_count_ = 0;
  rx_data_ = {};
  rx_errors_ = {};
  msr_ = kMsrCts | kMsrDsr | kMsrDcd;
  AcceptInputIfStalled();
}

void Serial16550::Quiesce() {
  if (!port_) return;
  FlushOutput();
  LockGuard guard(lock_);
  if (sent_ == sending_.size()) return;
  // The host is slow: what it hasn't taken belongs to the state.
  out_.insert(out_.begin(), sending_.begin() + static_cast<ptrdiff_t>(sent_), sending_.end());
  sending_.clear();
  sent_ = 0;
  flush_armed_ = true;
  flush_timer_.Arm(env_.loop.clock().NowNs() + kGatherNs);
}

void Serial16550::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Field("ier", ier_);
  v.Field("fcr", fcr_);
  v.Field("lcr", lcr_);
  v.Field("mcr", mcr_);
  v.Field("msr", msr_);
  v.Field("scr", scr_);
  v.Field("divisor", divisor_);
  v.Field("line_errors", line_errors_);
  v.Field("thre_pending", thre_pending_);
  v.Field("rx_timed_out", rx_timed_out_);
  v.Field("rx_data", rx_data_);
  v.Field("rx_errors", rx_errors_);
  v.Field("rx_begin", rx_begin_);
  v.Field("rx_count", rx_count_);
  v.Field("out", out_, 2 * kOutMax);
  if (!v.loading()) return;
  v.Bounded("rx_begin", rx_begin_, 0, kFifoSize - 1);
  v.Bounded("rx_count", rx_count_, 0, kFifoSize);
  ier_ &= kIerMask;
  mcr_ &= kMcrMask;
  line_errors_ &= kLsrErrors;
  rx_begin_ %= kFifoSize;
  rx_count_ = std::min<uint8_t>(rx_count_, kFifoSize);
  if (!port_) out_.clear();
  if (!out_.empty()) {
    flush_armed_ = true;
    flush_timer_.Arm(0);
  }
  if (!rx_timed_out_) ArmRxTimeout();
  AcceptInputIfStalled();
  UpdateIrq();
}

std::vector<std::string> DescribeIsaSerial() {
  return DescribeProperties<IsaSerialConfig>(kIsaSerialProperties);
}

Result<std::unique_ptr<Device>> MakeIsaSerial(DeviceRequest& request) {
  IsaSerialConfig config;
  TRY(ApplyProperties(kIsaSerialProperties, request.properties, "isa-serial", &config));
  if (config.index > 3 || config.iobase > 65536 - Serial16550::kPortCount || config.irq > 15) {
    return Fail(ErrorCode::kInvalid,
                "isa-serial: index is 0 to 3, iobase at most 0xfff8, irq at most 15");
  }
  if (!config.iobase) config.iobase = Serial16550::kIoBase[config.index];
  if (!config.irq) config.irq = Serial16550::kIrq[config.index];
  IrqLine irq = request.isa_irqs ? IrqLine(*request.isa_irqs, config.irq) : IrqLine();
  auto serial = std::make_unique<Serial16550>(request.env, irq);
  if (!config.chardev.empty()) {
    host::Chardev* chardev =
        request.env.backends ? request.env.backends->FindChardev(config.chardev) : nullptr;
    if (!chardev) {
      return Fail(
          ErrorCode::kNotFound,
          fmt::format("isa-serial: chardev={0}: there is no such chardev; add -chardev KIND,id={0}",
                      config.chardev));
    }
    TRY(serial->ConnectChardev(*chardev));
  }
  request.ports.push_back({static_cast<uint16_t>(config.iobase), Serial16550::kPortCount, 0});
  return serial;
}

}  // namespace kvartz
