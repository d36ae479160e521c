"""A guest that writes random values to every port and register cannot stop, crash or hang the VMM."""

import time

from harness import Failure, Qmp, Skip, test

PCI = ["-drive", "file={disk},format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d", "-netdev", "user,id=n",
       "-device", "virtio-net-pci,netdev=n", "-device", "virtio-rng-pci", "-device", "virtio-balloon-pci", "-device",
       "virtio-serial-pci", "-chardev", "null,id=c", "-device", "virtconsole,chardev=c"]
MMIO = [word.replace("-pci", "-device") for word in PCI]


def run_for(context, machine, devices, seconds):
    """Runs the guest for that long; where it switches its machine off (which it may), a new one starts."""
    if context.is_peer:
        raise Skip("the peer asserts in its serial port when this guest runs")
    guest, disk = context.bare_metal("chaos.cpp"), context.disk(megabytes=1)
    deadline = time.monotonic() + seconds
    starts = 0
    while starts == 0 or time.monotonic() < deadline:
        starts += 1
        path = context.path(f"qmp{starts}")
        vm = context.start_bare("-M", machine, "-accel", "tcg", "-m", "64", "-display", "none", "-serial", "null",
                                "-monitor", "none", "-nic", "none", "-kernel", guest, "-qmp",
                                f"unix:{path},server=on,wait=off", *(word.format(disk=disk) for word in devices))
        try:
            qmp = Qmp(vm, path)
            qmp.call("qmp_capabilities")
            if vm.runs_until(deadline):
                qmp.call("query-status")  # it is there, and it answers
                qmp.call("quit")
        except (ConnectionError, Failure):
            if vm.runs_until(time.monotonic() + 1):
                raise
            # The guest switched it off this very moment: the exit code tells.
        code = vm.wait()
        if code != 0:
            raise Failure(f"the guest ended the VMM with exit code {code}; {vm.tail()}")


@test(seconds=120)
def hostile_guest_cannot_stop_a_pc(context):
    run_for(context, "pc", PCI, 15)


@test(seconds=120)
def hostile_guest_cannot_stop_a_microvm(context):
    run_for(context, "microvm", MMIO, 10)


@test(seconds=300, slow=True)
def hostile_guest_cannot_stop_a_pc_for_long(context):
    run_for(context, "pc", PCI, 60)
