// Bare-metal programs, assembled with the test (payloads.cpp). Position: payload_image is loaded at
// kImage.
#pragma once

extern "C" {
extern const char payload_image[], payload_image_end[];
extern const char pl_stubs[];     // 256 interrupt stubs of 16 bytes
extern const char pl_ap_start[];  // goes to kSipiPage

// Entry points, 64-bit ring 0 unless said otherwise.
extern const char pl_done[], pl_real[], pl_faults[], pl_user_faults[], pl_paging[], pl_ports[],
    pl_mmio[], pl_collected[], pl_doorbells[], pl_wait[], pl_halt_wait[], pl_spin[], pl_halt[],
    pl_user_spin[], pl_self_ipi[], pl_x2apic[], pl_apic_timer[], pl_tsc_deadline[], pl_pit[],
    pl_pic[], pl_ioapic[], pl_extint[], pl_level[], pl_dirty[], pl_hot[], pl_rom[], pl_smp[],
    pl_kvmclock[], pl_msr[], pl_compat[], pl_move[], pl_step[], pl_step_end[], pl_popcnt[],
    pl_popcnt_after[], pl_triple[], pl_syscall[], pl_int3[], pl_touch_all[], pl_hot_spin[],
    pl_irqfd_line[], pl_reset_probe[], pl_cpuid[], pl_real32[];
}
