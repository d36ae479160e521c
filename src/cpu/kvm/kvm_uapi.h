// The kernel's structures and numbers. Include this, not <linux/kvm.h>: in C++ that gives
// structures that end in an array the wrong size (and their ioctls wrong numbers) before Linux 6.5.
#pragma once

#include <linux/stddef.h>
#ifdef __DECLARE_FLEX_ARRAY
#undef __DECLARE_FLEX_ARRAY
#endif
#define __DECLARE_FLEX_ARRAY(TYPE, NAME) TYPE NAME[0]  // NOLINT: the kernel's name
#include <linux/kvm.h>

static_assert(sizeof(kvm_cpuid2) == 8 && sizeof(kvm_msrs) == 8 && sizeof(kvm_irq_routing) == 8);

// Newer than the oldest headers that we build with.
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
