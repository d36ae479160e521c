// From a board's interrupt lines (GSIs) to its interrupt controllers.
#pragma once

#include "cpu/accel.h"
#include "device/irq/ioapic.h"
#include "device/irq/pic_8259.h"

namespace kvartz::machine {

// Immutable once wired. GSI n is line n of the 8259 pair (n < 16) and pin n of the I/O APIC, but
// for GSI 0, which arrives at pin 2 (the MADT says so). With the controllers in the kernel it hands
// over the GSI.
class IrqRouter final : public IrqSink {
 public:
  explicit IrqRouter(cpu::Accel& accel) : accel_(accel) {}
  void Connect(PicPair* pic, IoApic* ioapic) {
    pic_ = pic;
    ioapic_ = ioapic;
  }
  void SetIrq(unsigned gsi, bool level) override {
    if (accel_.irqchip() == cpu::IrqchipMode::kKernel) {
      accel_.SetGsi(gsi, level);
      return;
    }
    if (pic_ && gsi < 16) pic_->SetIrq(gsi, level);
    if (ioapic_) ioapic_->SetIrq(gsi == 0 ? 2 : gsi, level);
  }

 private:
  cpu::Accel& accel_;
  PicPair* pic_ = nullptr;
  IoApic* ioapic_ = nullptr;
};

// INTR of the 8259 pair, as a line.
class PicOutput final : public IrqSink {
 public:
  explicit PicOutput(cpu::Accel& accel) : accel_(accel) {}
  void SetIrq(unsigned, bool level) override { accel_.SetPicOutput(level); }

 private:
  cpu::Accel& accel_;
};

// Hands on to a sink that is made after those who pull its lines.
class IrqForward final : public IrqSink {
 public:
  void Connect(IrqSink& target) { target_ = &target; }
  void SetIrq(unsigned line, bool level) override {
    if (target_) target_->SetIrq(line, level);
  }

 private:
  IrqSink* target_ = nullptr;
};

}  // namespace kvartz::machine
