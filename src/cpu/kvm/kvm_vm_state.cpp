// The state of what KVM emulates for the whole VM: interrupt controllers, PIT, clock.
#include <fmt/core.h>

#include <cstring>

#include "cpu/kvm/kvm_accel.h"
#include "cpu/kvm/kvm_api.h"

namespace kvartz::cpu::kvm {
namespace {

constexpr uint64_t kIoapicBase = 0xfec00000;
constexpr uint64_t kRedirectionMasked = 1 << 16;

void VisitPic(StateVisitor& v, kvm_pic_state& pic) {
  v.Field("last_irr", pic.last_irr);
  v.Field("irr", pic.irr);
  v.Field("imr", pic.imr);
  v.Field("isr", pic.isr);
  v.Field("priority_add", pic.priority_add);
  v.Field("irq_base", pic.irq_base);
  v.Field("read_reg_select", pic.read_reg_select);
  v.Field("poll", pic.poll);
  v.Field("special_mask", pic.special_mask);
  v.Field("init_state", pic.init_state);
  v.Field("auto_eoi", pic.auto_eoi);
  v.Field("rotate_on_auto_eoi", pic.rotate_on_auto_eoi);
  v.Field("special_fully_nested_mode", pic.special_fully_nested_mode);
  v.Field("init4", pic.init4);
  v.Field("elcr", pic.elcr);
  v.Field("elcr_mask", pic.elcr_mask);
  if (v.loading()) v.Bounded("priority_add", pic.priority_add, 0, 7);
}

void VisitIoapic(StateVisitor& v, kvm_ioapic_state& ioapic) {
  v.Field("base_address", ioapic.base_address);
  v.Field("ioregsel", ioapic.ioregsel);
  v.Field("id", ioapic.id);
  v.Field("irr", ioapic.irr);
  uint64_t entries[KVM_IOAPIC_NUM_PINS];
  for (unsigned i = 0; i < KVM_IOAPIC_NUM_PINS; ++i) entries[i] = ioapic.redirtbl[i].bits;
  v.Field("redirection", entries);
  for (unsigned i = 0; i < KVM_IOAPIC_NUM_PINS; ++i) ioapic.redirtbl[i].bits = entries[i];
}

// Without count_load_time, the host's clock: KVM starts a loaded count anew.
void VisitPit(StateVisitor& v, kvm_pit_state2& pit) {
  constexpr std::string_view kNames[] = {"channel0", "channel1", "channel2"};
  for (unsigned i = 0; i < 3; ++i) {
    kvm_pit_channel_state& channel = pit.channels[i];
    v.Section(kNames[i], [&] {
      v.Field("count", channel.count);
      v.Field("latched_count", channel.latched_count);
      v.Field("count_latched", channel.count_latched);
      v.Field("status_latched", channel.status_latched);
      v.Field("status", channel.status);
      v.Field("read_state", channel.read_state);
      v.Field("write_state", channel.write_state);
      v.Field("write_latch", channel.write_latch);
      v.Field("rw_mode", channel.rw_mode);
      v.Field("mode", channel.mode);
      v.Field("bcd", channel.bcd);
      v.Field("gate", channel.gate);
    });
  }
  v.Field("flags", pit.flags);
}

// Gets, shows to the visitor, and puts back what it loaded.
template <typename T, typename Visit>
void VisitKernel(StateVisitor& v, std::string_view name, int vm, unsigned long get,
                 unsigned long set, T& state, Visit visit) {
  if (Ioctl(vm, get, &state) < 0) return v.Reject(fmt::format("{}: KVM doesn't tell", name));
  v.Section(name, [&] { visit(state); });
  if (!v.loading() || v.failed()) return;
  if (Ioctl(vm, set, &state) < 0) v.Reject(fmt::format("{}: KVM doesn't take it", name));
}

}  // namespace

void KvmAccel::VisitState(StateVisitor& v) {
  v.Version(1);
  if (v.saving() && !stopped_ && !clock_loaded_) {
    kvm_clock_data clock{};
    if (Ioctl(vm_.get(), KVM_GET_CLOCK, &clock) >= 0) stopped_clock_ns_ = clock.clock;
  }
  v.Field("clock_ns", stopped_clock_ns_);
  if (v.loading()) clock_loaded_ = true;

  auto mode = static_cast<uint8_t>(config_.irqchip);
  v.Field("irqchip", mode);
  if (mode != static_cast<uint8_t>(config_.irqchip)) {
    return v.Reject("saved with another kernel-irqchip= than this machine's");
  }
  if (config_.irqchip != IrqchipMode::kKernel) return;
  constexpr std::string_view kNames[] = {"pic_master", "pic_slave", "ioapic"};
  for (uint32_t id : {KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC}) {
    kvm_irqchip chip{};
    chip.chip_id = id;
    VisitKernel(v, kNames[id], vm_.get(), KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, chip, [&](auto& c) {
      if (id == KVM_IRQCHIP_IOAPIC) {
        VisitIoapic(v, c.chip.ioapic);
      } else {
        VisitPic(v, c.chip.pic);
      }
    });
  }
  kvm_pit_state2 pit{};
  VisitKernel(v, "pit", vm_.get(), KVM_GET_PIT2, KVM_SET_PIT2, pit,
              [&](kvm_pit_state2& p) { VisitPit(v, p); });
}

// As KVM made them; the machine's own reset of the devices comes with the board.
Result<> KvmAccel::ResetVm() {
  if (config_.irqchip != IrqchipMode::kKernel) return {};
  for (uint32_t id : {KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC}) {
    kvm_irqchip chip{};
    chip.chip_id = id;
    TRY(KVM_CALL(vm_.get(), KVM_GET_IRQCHIP, &chip));
    if (id == KVM_IRQCHIP_IOAPIC) {
      chip.chip.ioapic = {};
      chip.chip.ioapic.base_address = kIoapicBase;
      for (auto& entry : chip.chip.ioapic.redirtbl) entry.bits = kRedirectionMasked;
    } else {
      uint8_t elcr_mask = chip.chip.pic.elcr_mask;
      chip.chip.pic = {};
      chip.chip.pic.elcr_mask = elcr_mask;
    }
    TRY(KVM_CALL(vm_.get(), KVM_SET_IRQCHIP, &chip));
  }
  kvm_pit_state2 pit{};
  for (kvm_pit_channel_state& channel : pit.channels) {
    channel.count = 0x10000;
    channel.mode = 0xff;  // none programmed yet
    channel.gate = 1;
  }
  pit.channels[2].gate = 0;  // the speaker's, port 61h
  TRY(KVM_CALL(vm_.get(), KVM_SET_PIT2, &pit));
  return {};
}

}  // namespace kvartz::cpu::kvm
