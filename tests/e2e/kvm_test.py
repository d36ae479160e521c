"""The KVM engine under a whole PC. Where /dev/kvm emulates ring 0 in software this takes seconds, and what it lacks stays
unasked: the firmware uses none of it."""

import os

from harness import Skip, test

# The bits of CPUID that an emulating backend gives back although they are hidden are in leaves 1 and 7.
CPU = ["-cpu", "max,level=1,-cx16,kvm=off"]
# Prints a text on the debug port, then ends the VMM with code 33 (0x10 * 2 + 1).
BOOT_SECTOR = (b"\xfc\x31\xc0\x8e\xd8\xbe\x1a\x7c\xba\x02\x04\xac\x84\xc0\x74\x03\xee\xeb\xf8\xb0\x10\xba\xf4\x00\xee\xf4"
               b"boot sector runs\n\0").ljust(510, b"\0") + b"\x55\xaa"


def start(context, irqchip, *arguments):
    if context.is_peer:
        raise Skip("the peer takes no force=on")
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as error:
        raise Skip(f"/dev/kvm: {error.strerror}") from None
    return context.start_bare("-M", "pc", "-accel", f"kvm,force=on,kernel-irqchip={irqchip}", *CPU, "-m", "64", "-display",
                              "none", "-serial", "none", "-monitor", "none", "-nic", "none", "-no-reboot", "-chardev",
                              "stdio,id=debug", "-device", "isa-debugcon,iobase=0x402,chardev=debug", *arguments)


@test()
def kvm_runs_firmware(context):
    start(context, "on").expect(r"No bootable device")


@test(cpus=2)
def kvm_runs_firmware_on_two_cpus_with_devices_outside(context):
    vm = start(context, "split", "-smp", "2")
    vm.expect(r"Found 2 cpu\(s\)")
    vm.expect(r"No bootable device")


@test()
def kvm_boots_a_disk(context):
    with open(context.path("boot.img"), "wb") as image:
        image.write(BOOT_SECTOR.ljust(1 << 20, b"\0"))
    vm = start(context, "split", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-drive",
               f"file={context.path('boot.img')},format=raw,if=virtio")
    vm.expect(r"boot sector runs")
    vm.expect_exit(33)
