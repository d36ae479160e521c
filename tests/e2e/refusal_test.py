"""Bad input is refused before anything runs: exit code 1, and one line that names the thing (and, ours, the remedy)."""

import os
import re
import socket

from harness import Failure, Qmp, Skip, expect_equal, test


def expect_refusal(context, arguments, names, user=None):
    """Starts the VMM with `arguments`; it must end with 1 and one line that matches `names`."""
    vm = context.start_bare("-M", "pc", "-display", "none", "-serial", "none", "-nic", "none", *arguments, user=user)
    vm.expect_exit(1, seconds=30)
    lines = vm.output.strip().splitlines()
    # The peer's wording is its own; that it refuses is what the two have in common.
    if not context.is_peer and (len(lines) != 1 or not re.search(names, lines[0])):
        raise Failure(f"not one line with '{names}' for {arguments}; {vm.tail()}")


def expect_our_refusal(context, arguments, names):
    """The same for what the peer lets pass."""
    if not context.is_peer:
        expect_refusal(context, arguments, names)


@test(seconds=60)
def bad_kernels_are_refused(context):
    expect_refusal(context, ["-kernel", "/no/such/kernel"], r"/no/such/kernel.*(No such file|exist)")
    with open(context.path("text"), "w", encoding="utf-8") as file:
        file.write("this is no kernel\n" * 1000)
    expect_refusal(context, ["-kernel", context.path("text")], r"/text.*not a .*(kernel|bzImage)")
    kernel = os.path.join(context.guest, "vmlinuz")
    with open(kernel, "rb") as whole, open(context.path("half"), "wb") as half:
        half.write(whole.read(1 << 20))
    expect_our_refusal(context, ["-kernel", context.path("half")], r"/half.*(truncated|beyond|end of (the )?file|short)")
    expect_refusal(context, ["-kernel", kernel, "-initrd", "/no/such/initrd"], r"/no/such/initrd.*(No such file|exist)")
    expect_refusal(context, ["-initrd", kernel], r"-initrd.*-kernel")
    expect_refusal(context, ["-append", "x"], r"-append.*-kernel")


@test(seconds=60)
def bad_disks_are_refused(context):
    drive = "file={},format=raw,if=virtio"
    expect_refusal(context, ["-drive", drive.format("/no/such/image")], r"/no/such/image.*(No such file|exist)")
    expect_refusal(context, ["-drive", drive.format(context.directory)], re.escape(context.directory))
    expect_refusal(context, ["-drive", drive.format(context.disk()) + ",sizee=1"], r"sizee")
    expect_refusal(context, ["-drive", f"file={context.disk()},format=nonesuch,if=virtio"], r"nonesuch")
    expect_refusal(context, ["-device", "virtio-blk-pci,drive=nope"], r"nope")


@test(seconds=60)
def images_in_use_are_refused_with_the_holder(context):
    disk = context.disk()
    arguments = ["-drive", f"file={disk},format=raw,if=virtio"]
    first = context.start("-S", "-nic", "none", "-m", "64", "-monitor", "none", "-qmp",
                          f"unix:{context.path('qmp')},server=on,wait=off", *arguments)
    Qmp(first, context.path("qmp"))  # it answers, so it holds its image
    expect_refusal(context, arguments, rf"{re.escape(disk)}.*(lock|in use).*{first.pid}")


@test(seconds=60)
def unreadable_images_are_refused(context):
    disk = context.disk()
    os.chmod(disk, 0)
    user = None
    if os.geteuid() == 0:  # who may read everything
        user = "nobody"
        os.chmod(context.directory, 0o755)
    try:
        expect_refusal(context, ["-drive", f"file={disk},format=raw,if=virtio"], r"disk\.img.*(Permission denied|not readable)", user)
    except PermissionError:
        raise Skip("nobody cannot reach the VMM's program; run as another user than root") from None


@test(seconds=60)
def unknown_words_are_refused_with_the_nearest(context):
    expect_refusal(context, ["-kernal", "x"], r"-kernal.*-kernel")
    expect_refusal(context, ["-device", "virtio-blk-pcie"], r"virtio-blk-pcie.*virtio-blk-pci")
    expect_refusal(context, ["-cpu", "haswel"], r"haswel")
    expect_refusal(context, ["-netdev", "usr,id=n"], r"usr.*user")
    expect_refusal(context, ["-device", "virtio-net-pci,netdev=none"], r"none")
    expect_refusal(context, ["-accel", "hvx"], r"hvx")
    expect_our_refusal(context, ["-d", "int,trace"], r"'trace'")
    expect_our_refusal(context, ["-perfmap", "-accel", "kvartz,jit=off"], r"-perfmap.*jit=off")
    expect_our_refusal(context, ["-accel", "kvartz,tb-sise=64"], r"tb-sise.*tb-size")
    expect_our_refusal(context, ["-accel", "kvartz,thread=single"], r"thread=single")
    expect_our_refusal(context, ["-accel", "kvartz,tb-size=8", "-smp", "3"], r"tb-size=8.*3 CPUs")


@test(seconds=60)
def impossible_sizes_are_refused(context):
    kernel = os.path.join(context.guest, "vmlinuz")
    expect_our_refusal(context, ["-m", "1", "-kernel", kernel], r"memory|RAM|-m")
    expect_refusal(context, ["-m", "12x"], r"12x")
    expect_our_refusal(context, ["-smp", "0"], r"-smp|0")
    expect_refusal(context, ["-smp", "4000"], r"4000")


@test(seconds=60)
def taken_ports_are_refused(context):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        expect_refusal(context, ["-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"], rf"{port}.*in use")
        expect_refusal(context, ["-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{port}-:22", "-device",
                                 "virtio-net-pci,netdev=n"], rf"{port}")


@test(seconds=60)
def machines_without_kvm_are_refused_when_asked_for_it(context):
    if os.path.exists("/dev/kvm"):
        raise Skip("this host has /dev/kvm")
    vm = context.start_bare("-M", "pc", "-accel", "kvm", "-display", "none", "-nic", "none")
    vm.expect_exit(1, seconds=30)
    expect_equal("/dev/kvm" in vm.output, True, "the message names /dev/kvm")


@test(seconds=60)
def help_and_version_are_answered(context):
    for option, needle in (("-version", r"version \d+\.\d+"), ("-help", r"-kernel"), ("-machine help", r"(?m)^pc\b"),
                           ("-cpu help", r"qemu64"), ("-device help", r"virtio-blk-pci")):
        vm = context.start_bare(*option.split())
        vm.expect_exit(0, seconds=30)
        if not re.search(needle, vm.output):
            raise Failure(f"{option} does not show {needle}; {vm.tail()}")


@test(seconds=60)
def devices_list_their_properties(context):
    vm = context.start_bare("-device", "virtio-rng-pci,help")
    vm.expect_exit(0, seconds=30)
    for line in (r"virtio-rng-pci options:", r"  addr=<int32> .*\(default: -1\)", r"  max-bytes=<uint64> .*\(default: \d+\)"):
        if not re.search(f"^{line}$", vm.output, re.MULTILINE):
            raise Failure(f"no line '{line}'; {vm.tail()}")
    expect_our_refusal(context, ["-device", "virtio-rgn-pci,help"], r"virtio-rgn-pci.*'virtio-rng-pci'")
