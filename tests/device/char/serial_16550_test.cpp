#include "device/char/serial_16550.h"

#include <gtest/gtest.h>

namespace kvartz {
namespace {

struct Line : IrqSink, MsiSink, MachineControl {
  bool level = false;
  int rises = 0;
  void SetIrq(unsigned, bool now) override {
    rises += now && !level;
    level = now;
  }
  void SendMsi(uint64_t, uint32_t) override {}
  void Ask(Request, const std::string&) override {}
  void ExitProcess(int) override {}
};

// Registers and bits by the numbers of the PC16550D datasheet.
constexpr unsigned kData = 0, kIer = 1, kIir = 2, kFcr = 2, kLcr = 3, kMcr = 4, kLsr = 5, kMsr = 6,
                   kScr = 7;

class Serial16550Test : public testing::Test {
 protected:
  Serial16550Test()
      : loop_(std::move(EventLoop::Create(EventLoop::Backend::kAuto, time_)).value()),
        vm_clock_(time_),
        env_{"serial0", memory_, ports_, *loop_, vm_clock_, line_, line_},
        uart_(std::make_unique<Serial16550>(env_, IrqLine(line_, 4))) {
    vm_clock_.Start();
    host::ChardevConfig config;
    config.kind = host::ChardevConfig::Kind::kRingbuf;
    chardev_ = std::move(host::Chardev::Create(config, *loop_)).value();
    EXPECT_TRUE(uart_->ConnectChardev(*chardev_));
    Turn();
  }
  ~Serial16550Test() override { uart_.reset(); }

  uint8_t In(unsigned reg) {
    LockGuard guard(uart_->lock());
    return static_cast<uint8_t>(uart_->IoRead(reg, 1));
  }
  void Out(unsigned reg, uint8_t value) {
    LockGuard guard(uart_->lock());
    uart_->IoWrite(reg, 1, value);
  }
  void Turn() {
    for (int i = 0; i < 4; ++i) {
      time_.Advance(2'000'000);
      loop_->RunOnce(0);
    }
  }
  void Type(std::string_view text) {
    chardev_->RingbufWrite(text);
    loop_->RunOnce(0);
  }

  ManualClock time_;
  std::unique_ptr<EventLoop> loop_;
  VmClock vm_clock_;
  AddressSpace memory_{"memory", 1ull << 40}, ports_{"ports", 65536};
  Line line_;
  std::unique_ptr<host::Chardev> chardev_;
  DeviceEnv env_;
  std::unique_ptr<Serial16550> uart_;
};

TEST_F(Serial16550Test, ResetValues) {
  EXPECT_EQ(In(kIer), 0x00);
  EXPECT_EQ(In(kIir), 0x01);
  EXPECT_EQ(In(kLcr), 0x00);
  EXPECT_EQ(In(kMcr), 0x00);
  EXPECT_EQ(In(kLsr), 0x60);
  EXPECT_EQ(In(kMsr), 0xb0);
}

// Software tells a 16550A by this (section 8.4: IIR bits 6 and 7; scratch register).
TEST_F(Serial16550Test, DetectedAs16550A) {
  Out(kScr, 0x5a);
  EXPECT_EQ(In(kScr), 0x5a);
  Out(kFcr, 0x01);
  EXPECT_EQ(In(kIir), 0xc1);
  Out(kFcr, 0x00);
  EXPECT_EQ(In(kIir), 0x01);
  Out(kIer, 0xff);
  EXPECT_EQ(In(kIer), 0x0f);
}

TEST_F(Serial16550Test, DivisorLatchIsBehindDlab) {
  Out(kLcr, 0x83);
  Out(kData, 0x34);
  Out(kIer, 0x12);
  EXPECT_EQ(In(kData), 0x34);
  EXPECT_EQ(In(kIer), 0x12);
  Out(kLcr, 0x03);
  EXPECT_EQ(In(kIer), 0x00);
}

TEST_F(Serial16550Test, OutputKeepsItsOrder) {
  std::string sent;
  for (int i = 0; i < 3000; ++i) {
    if (!(In(kLsr) & 0x20)) Turn();
    Out(kData, static_cast<uint8_t>('a' + i % 26));
    sent.push_back(static_cast<char>('a' + i % 26));
  }
  Turn();
  EXPECT_EQ(chardev_->RingbufRead(10000), sent);
}

TEST_F(Serial16550Test, TransmitterInterrupt) {
  Out(kIer, 0x02);
  EXPECT_TRUE(line_.level) << "enabling it while empty raises it";
  EXPECT_EQ(In(kIir), 0x02);
  EXPECT_FALSE(line_.level) << "reading IIR ends it";
  EXPECT_EQ(In(kIir), 0x01);
  Out(kData, 'x');
  EXPECT_TRUE(line_.level) << "the byte is gone at once";
  Out(kIer, 0x00);
  EXPECT_FALSE(line_.level);
}

TEST_F(Serial16550Test, ReceiverWithoutFifoHoldsOneByte) {
  Out(kIer, 0x01);
  Type("ab");
  EXPECT_TRUE(line_.level);
  EXPECT_EQ(In(kIir), 0x04);
  EXPECT_EQ(In(kLsr), 0x61);
  EXPECT_EQ(In(kData), 'a');
  EXPECT_FALSE(line_.level);
  Turn();
  EXPECT_EQ(In(kData), 'b');
}

TEST_F(Serial16550Test, FifoTriggerAndTimeout) {
  Out(kFcr, 0x81);  // trigger at 8
  Out(kIer, 0x01);
  Type("1234567");
  EXPECT_FALSE(line_.level);
  // Four characters of 10 bits at 9600 baud (the divisor of reset is 12): 4.17 ms.
  time_.Advance(4'000'000);
  loop_->RunOnce(0);
  EXPECT_FALSE(line_.level);
  time_.Advance(200'000);
  loop_->RunOnce(0);
  EXPECT_TRUE(line_.level);
  EXPECT_EQ(In(kIir), 0xcc);
  EXPECT_EQ(In(kData), '1');
  EXPECT_FALSE(line_.level) << "reading a byte restarts the time-out";
  Type("89");
  EXPECT_TRUE(line_.level);
  EXPECT_EQ(In(kIir), 0xc4);
}

TEST_F(Serial16550Test, FullFifoHoldsTheHostBack) {
  Out(kFcr, 0x01);
  std::string sent;
  for (int i = 0; i < 100; ++i) sent.push_back(static_cast<char>('A' + i % 50));
  Type(sent);
  std::string received;
  for (int i = 0; i < 1000 && received.size() < sent.size(); ++i) {
    while (In(kLsr) & 0x01) received.push_back(static_cast<char>(In(kData)));
    Turn();
  }
  EXPECT_EQ(received, sent);
}

// Section 8.6.7: data comes back, and the modem outputs reach the inputs.
TEST_F(Serial16550Test, Loopback) {
  Out(kMcr, 0x10);
  EXPECT_EQ(In(kMsr) & 0xf0, 0x00);
  Out(kMcr, 0x1a);  // RTS, OUT2: what Linux's autoconfig writes; it expects CTS and DCD
  EXPECT_EQ(In(kMsr) & 0xf0, 0x90);
  Out(kData, 0x77);
  EXPECT_EQ(In(kLsr) & 0x01, 0x01);
  EXPECT_EQ(In(kData), 0x77);
  Turn();
  EXPECT_EQ(chardev_->RingbufRead(10), "");
  Out(kData, 1);
  Out(kData, 2);
  EXPECT_EQ(In(kLsr) & 0x03, 0x03) << "overrun";
  EXPECT_EQ(In(kLsr) & 0x02, 0x00) << "cleared by reading";
}

TEST_F(Serial16550Test, ModemStatusInterrupt) {
  Out(kMcr, 0x10);
  In(kMsr);
  Out(kIer, 0x08);
  EXPECT_FALSE(line_.level);
  Out(kMcr, 0x12);  // RTS -> CTS
  EXPECT_TRUE(line_.level);
  EXPECT_EQ(In(kIir), 0x00);
  EXPECT_EQ(In(kMsr), 0x11);
  EXPECT_FALSE(line_.level);
  Out(kMcr, 0x16);  // OUT1 -> RI: no delta on its leading edge
  EXPECT_EQ(In(kMsr) & 0x0f, 0x00);
  Out(kMcr, 0x12);
  EXPECT_EQ(In(kMsr) & 0x0f, 0x04);
}

TEST_F(Serial16550Test, BreakIsALineStatusInterrupt) {
  Out(kFcr, 0x01);
  Out(kIer, 0x05);
  chardev_->Break();
  EXPECT_EQ(In(kIir), 0xc6);
  EXPECT_EQ(In(kLsr) & 0x91, 0x91);
  EXPECT_EQ(In(kData), 0x00);
  EXPECT_EQ(In(kLsr) & 0x90, 0x00);
}

TEST_F(Serial16550Test, StateMovesToAnother) {
  Out(kFcr, 0xc1);
  Out(kIer, 0x05);
  Out(kScr, 0x42);
  Type("hello");
  auto visit_of = [](Serial16550& uart) {
    return [&uart](StateVisitor& v) { uart.VisitState(v); };
  };
  std::vector<uint8_t> saved = SaveState(visit_of(*uart_));
  Line line;
  DeviceEnv env{"serial0", memory_, ports_, *loop_, vm_clock_, line, line};
  Serial16550 other(env, IrqLine(line, 4));
  ASSERT_TRUE(LoadState(saved, visit_of(other)));
  EXPECT_EQ(DumpState(visit_of(other)), DumpState(visit_of(*uart_)));
  Turn();
  EXPECT_TRUE(line.level) << "the time-out goes on";
  LockGuard guard(other.lock());
  for (char c : std::string_view("hello"))
    EXPECT_EQ(other.IoRead(kData, 1), static_cast<uint64_t>(c));
}

}  // namespace
}  // namespace kvartz
