"""Real kernels and firmware: to user space, to a login, with disks and networks."""

import re
import socket

from harness import Failure, drawn, expect_equal, test

DISK = "file={},format=raw,if=virtio"


def expect_power_off(vm):
    vm.expect(r"reboot: Power down")
    vm.expect_exit(0)


@test()
def linux_boots_to_user_space(context):
    vm = context.start("-m", "256", *context.run("nproc; uname -r; cat /proc/cpuinfo"))
    vm.expect(r"^kvartz: userspace")
    expect_equal(vm.expect(r"^(\d+)\n6\.\d+\.\d+.*-cloud-amd64\n")[1], "1", "nproc")
    vm.expect(r"^kvartz: exit status 0")
    expect_power_off(vm)
    for complaint in (r"BUG:.*", r"WARNING:.*", r"Call Trace:.*", r"soft lockup.*"):
        if re.search(complaint, vm.output):
            raise Failure(f"the kernel complains: {re.search(complaint, vm.output)[0]}; {vm.tail()}")


@test(cpus=2)
def linux_boots_with_two_cpus(context):
    # Each CPU adds to one file under a lock that the file system keeps; no addition may be lost.
    add = ("i=0; while [ $i -lt 100 ]; do until mkdir /lock 2>/dev/null; do :; done; read n < /n; echo $((n+1)) > /n; "
           "rmdir /lock; i=$((i+1)); done")
    work = f"nproc; echo 0 > /n; echo '{add}' > /add; taskset 1 sh /add & taskset 2 sh /add; wait; echo sum $(cat /n)"
    vm = context.start("-m", "256", "-smp", "2", *context.run(work))
    vm.expect(r"^kvartz: userspace")
    expect_equal(vm.expect(r"^(\d+)\n")[1], "2", "nproc")
    vm.expect(r"^sum 200\n")
    vm.expect(r"^kvartz: exit status 0")
    expect_power_off(vm)


@test()
def linux_uses_its_disk_and_network(context):
    vm = context.start("-m", "256", "-drive", DISK.format(context.disk()), "-nic", "user,model=virtio-net-pci",
                       *context.kernel("kvartz.demo"))
    vm.expect(r"^kvartz: kernel: Linux .* x86_64 GNU/Linux")
    vm.expect(r"^kvartz: disk: /dev/vda has 67108864 bytes; 1048576 written and read back")
    vm.expect(r"^kvartz: network: eth0 has 10\.0\.2\.15/24 from DHCP, gateway 10\.0\.2\.2")
    vm.expect(r"^kvartz: ping: .* 3 packets received, 0% packet loss")
    expect_power_off(vm)
    with open(context.path("disk.img"), "rb") as image:
        expect_equal(image.read(28), b"kvartz writes, kvartz reads\n", "the image's first bytes")


@test()
def firmware_and_grub_boot_a_disk_to_a_login(context):
    vm = context.start("-m", "256", "-drive", DISK.format(context.bootable_disk()), "-nic", "none")
    vm.expect(r"GRUB loads the kernel")
    vm.expect(r"kvartz login: ")
    vm.send("root\r")
    vm.expect(r"# ")
    vm.send("uname -s; grep -c vda1 /proc/mounts; poweroff\r")
    vm.expect(r"Linux\n1\n")
    expect_power_off(vm)


@test(seconds=120)
def grub_takes_commands_on_the_firmwares_console(context):
    # Debian's rescue image knows of no serial port: it asks the firmware for its screen and its keyboard.
    vm = context.start("-nographic", "-m", "128", "-nic", "none", "-drive",
                       DISK.format(context.bootable_disk(image="rescue.img")))
    vm.expect(drawn("GNU GRUB  version 2."))
    vm.expect(drawn("`c' for a command-line."))
    vm.send("c")
    vm.expect(drawn("grub> "))
    vm.type_on_screen("echo at $grub_cpu-$grub_platform")
    vm.expect(drawn("at i386-pc"))
    vm.expect(drawn("grub> "))
    vm.type_on_screen("ls")
    vm.expect(drawn("(hd0) "))
    vm.expect(drawn("grub> "))
    vm.type_on_screen("halt")
    vm.expect_exit(0)


@test()
def kernel_boots_through_its_pvh_entry(context):
    vm = context.start("-m", "256", *context.run("echo reached", kernel="vmlinux"))
    vm.expect(r"^reached\n")
    expect_power_off(vm)


@test()
def microvm_boots_with_mmio_devices(context):
    disk = context.disk(megabytes=8)
    # Without ACPI's power-off the guest ends by a reboot, which -no-reboot makes the end of the VMM.
    vm = context.start("-m", "256", "-drive", f"file={disk},format=raw,if=none,id=d", "-device", "virtio-blk-device,drive=d",
                       "-netdev", "user,id=n", "-device", "virtio-net-device,netdev=n",
                       *context.kernel("reboot=t kvartz.reboot kvartz.demo"), machine="microvm")
    vm.expect(r"^kvartz: disk: /dev/vda has 8388608 bytes; 1048576 written and read back")
    vm.expect(r"^kvartz: network: eth0 has 10\.0\.2\.15/24 from DHCP")
    vm.expect(r"^kvartz: demo: all is well")
    vm.expect_exit(0)


@test()
def guest_reaches_every_virtio_device(context):
    check = ("head -c 16 /dev/hwrng | wc -c; echo to the host > /dev/hvc0; cat /sys/bus/virtio/drivers/virtio_balloon/"
             "virtio*/device; cat /sys/class/misc/hw_random/rng_current")
    vm = context.start("-m", "256", "-device", "virtio-rng-pci", "-device", "virtio-balloon-pci", "-device",
                       "virtio-serial-pci", "-chardev", f"file,id=c,path={context.path('hvc0')}", "-device",
                       "virtconsole,chardev=c", "-nic", "none", *context.run(check))
    vm.expect(r"^16\n")
    vm.expect(r"^0x0005\n")
    vm.expect(r"^virtio_rng\.0\n")
    expect_power_off(vm)
    with open(context.path("hvc0"), encoding="utf-8") as file:
        expect_equal(file.read().replace("\r", ""), "to the host\n", "what the guest wrote to hvc0")


@test()
def host_reaches_a_forwarded_port(context):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = ("ip link set lo up; ip link set eth0 up; udhcpc -i eth0 -n -q -f -s /etc/udhcpc >/dev/null 2>&1; "
             "echo serving; read line < /dev/ttyS0")
    vm = context.start("-m", "256", "-nic", f"user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{port}-:7",
                       *context.run("nc -ll -p 7 -e cat & " + serve))
    vm.expect(r"^serving")
    payload = bytes(range(256)) * 1024
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.settimeout(60)
        connection.sendall(payload)
        echoed = b""
        while len(echoed) < len(payload):
            data = connection.recv(65536)
            if not data:
                raise Failure(f"the guest closed the connection after {len(echoed)} bytes; {vm.tail()}")
            echoed += data
    expect_equal(echoed == payload, True, "the guest echoes what it got")
    vm.send("done\n")
    expect_power_off(vm)
