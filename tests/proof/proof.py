"""What the proofs share: where their files are, how a guest or its native twin is started and listened to."""

import os
import select
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def built(name):
    return os.path.join(ROOT, "build/proof", name)


def build():
    subprocess.run([os.path.join(ROOT, "tests/proof/build.sh")], check=True)


def guest_command(vmm, words, *, cpus=1, memory_mib=1024, serial="stdio", options=()):
    """A guest with the proofs' root file system; what it writes there is gone when it ends."""
    return [vmm, "-nodefaults", "-no-user-config", "-display", "none", "-serial", serial, "-no-reboot", "-M", "pc", "-cpu",
            "max", "-accel", "kvartz", "-m", str(memory_mib), "-smp", str(cpus), "-kernel", built("kernel"), "-initrd",
            built("initrd.img"), "-append", f"console=ttyS0 quiet panic=-1 root=/dev/vda {' '.join(words)}",
            "-drive", f"file={built('root.img')},if=none,id=d,format=raw,snapshot=on", "-device",
            "virtio-blk-pci,drive=d", *options]


def native_command(words):
    """The same programs in the same file system on this host; mounts end with it."""
    script = 'mount -t proc proc "$0/proc" && mount -t devpts devpts "$0/dev/pts" && exec chroot "$0" env -i "$@"'
    return ["unshare", "--mount", "sh", "-c", script, built("rootfs"), *words, "/bin/sh", "/proof/start.sh"]


class Process:
    """A process whose output is taken line by line."""

    def __init__(self, command, **more):
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT, **more)
        self._out = self._process.stdout.fileno()
        self._rest = b""
        self.pid = self._process.pid

    def lines(self, seconds):
        """Lines that came within that time, at once when there are some; None: it has ended."""
        if not select.select([self._out], [], [], seconds)[0]:
            return []
        data = os.read(self._out, 65536)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in lines]

    def wait(self):
        return self._process.wait()

    def kill(self):
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def follow(command, take, silence_s):
    """Gives each line to `take` until the process ends, or is silent for too long; how it ended, in words."""
    process = Process(command)
    last = time.monotonic()
    try:
        while time.monotonic() - last < silence_s:
            lines = process.lines(1)
            if lines is None:
                return f"exit code {process.wait()}"
            if lines:
                last = time.monotonic()
            for line in lines:
                take(line)
        return f"silent for {silence_s} s"
    finally:
        process.kill()
