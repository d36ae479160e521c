"""Drives a VMM like a person at its console would: starts it, waits for what it prints, types, speaks QMP.

Waits are for events (output, an exit, a message) with a limit; nothing sleeps. A limit is generous: it only ends a test
that has failed already.
"""

import fcntl
import json
import os
import re
import select
import shutil
import socket
import subprocess
import time

GUEST_PROMPT = "kvartz# "
# An interpreter on a loaded two-core machine takes this long at worst for what takes a second on hardware.
BOOT_SECONDS = 240


class Failure(Exception):
    """What was expected did not happen; the text says what did."""


class Skip(Exception):
    """The test cannot run here; the text says why."""


TESTS = {}


def test(seconds=300, cpus=1, slow=False):
    """Registers a test. `seconds` is ctest's limit, `cpus` how many host CPUs it keeps busy."""
    def register(function):
        TESTS[function.__name__] = function
        function.seconds, function.cpus, function.slow = seconds, cpus, slow
        return function
    return register


class Context:
    """What a test is given: the VMM to try, the guests, a directory of its own."""

    def __init__(self, vmm, guest, directory):
        self.vmm, self.guest, self.directory = vmm, guest, directory
        self.is_peer = "qemu" in os.path.basename(vmm)
        self._vms = []

    def path(self, name):
        return os.path.join(self.directory, name)

    def disk(self, name="disk.img", megabytes=64):
        """An empty raw image."""
        with open(self.path(name), "wb") as file:
            file.truncate(megabytes << 20)
        return self.path(name)

    def bootable_disk(self, name="boot.img", image="disk.img"):
        """A private copy of a disk that boots."""
        return shutil.copyfile(os.path.join(self.guest, image), self.path(name))

    def bare_metal(self, source):
        """Builds a guest program of tests/guest; returns the ELF file that -kernel takes."""
        guests = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "guest")
        program = self.path(os.path.splitext(source)[0])
        subprocess.run(["g++", "-m32", "-std=c++23", "-Os", "-ffreestanding", "-fno-pic", "-fno-exceptions", "-fno-rtti",
                        "-fno-stack-protector", "-mno-sse", "-nostdlib", "-static", "-no-pie", "-w",
                        f"-Wl,-T,{guests}/pvh.ld,--build-id=none,--no-warn-rwx-segments", "-o", program,
                        os.path.join(guests, source)], check=True)
        return program

    def kernel(self, words, kernel="vmlinuz"):
        """The arguments that boot the test kernel and initramfs with `words` on its command line."""
        return ["-kernel", os.path.join(self.guest, kernel), "-initrd", os.path.join(self.guest, "initrd.img"),
                "-append", "console=ttyS0 quiet panic=-1 " + words]

    def run(self, command, words="", kernel="vmlinuz"):
        """The same, to run a shell command in the guest."""
        return self.kernel(f'{words} kvartz.run="{command}"', kernel)

    def start(self, *arguments, machine="pc", accel="tcg"):
        """Starts a machine with its first serial port on the standard streams."""
        command = [self.vmm, "-M", machine, "-display", "none", "-serial", "stdio", "-no-reboot"]
        if "-nographic" in arguments:
            command = [self.vmm, "-M", machine, "-no-reboot"]
        if accel:
            command += ["-accel", accel]
        return self.start_bare(*command[1:], *arguments)

    def start_bare(self, *arguments, user=None):
        vm = Vm([self.vmm, *arguments], user)
        self._vms.append(vm)
        return vm

    def close(self):
        for vm in self._vms:
            vm.kill()


class Vm:
    def __init__(self, command, user=None):
        self.command = command
        self.output = ""
        self._seen = 0
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT, user=user)
        self._out = self._process.stdout.fileno()
        fcntl.fcntl(self._out, fcntl.F_SETFL, os.O_NONBLOCK)

    @property
    def pid(self):
        return self._process.pid

    def _read(self, deadline):
        """Waits for output; False at its end."""
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([self._out], [], [], left)[0]:
            raise TimeoutError
        data = os.read(self._out, 65536)
        self.output += data.decode(errors="replace").replace("\r", "")
        return bool(data)

    def expect(self, pattern, seconds=BOOT_SECONDS):
        """Waits until `pattern` appears after what was expected before; returns the match."""
        deadline = time.monotonic() + seconds
        regex = re.compile(pattern, re.MULTILINE)
        while True:
            match = regex.search(self.output, self._seen)
            if match:
                self._seen = match.end()
                return match
            try:
                if not self._read(deadline):
                    raise Failure(f"the VMM ended (exit code {self._process.wait()}) before '{pattern}'; {self.tail()}")
            except TimeoutError:
                raise Failure(f"no '{pattern}' within {seconds} s; {self.tail()}") from None

    def send(self, text):
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def type_on_screen(self, text):
        """Sends `text` and a return as fast as it shows: a BIOS buffers 15 keys, and drops what comes after."""
        for part in [text[i:i + 8] for i in range(0, len(text), 8)]:
            self.send(part)
            self.expect(drawn(part))
        self.send("\r")

    def runs_until(self, deadline):
        """Waits for the end or for `deadline`; True if it still runs then."""
        try:
            while self._read(deadline):
                pass
            return False
        except TimeoutError:
            return True

    def wait(self, seconds=60):
        """Waits for the end; returns the exit code."""
        deadline = time.monotonic() + seconds
        if self.runs_until(deadline):
            raise Failure(f"still running after {seconds} s; {self.tail()}")
        return self._process.wait()

    def expect_exit(self, code=0, seconds=60):
        actual = self.wait(seconds)
        if actual != code:
            raise Failure(f"exit code {actual}, not {code}; {self.tail()}")

    def tail(self):
        lines = self.output.strip().splitlines()[-25:]
        return "the last lines of " + " ".join(self.command) + ":\n" + "\n".join("  | " + line for line in lines)

    def kill(self):
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class Qmp:
    """A client of the VMM's QMP socket (-qmp unix:PATH,server=on,wait=off)."""

    def __init__(self, vm, path, seconds=30):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(seconds)
        self._connect(vm, path, time.monotonic() + seconds)
        # Of "rw", each write would forget what was read ahead.
        self._lines = self._socket.makefile("r", encoding="utf-8", newline="\n")
        self.events = []
        self.greeting = self._receive()

    def _connect(self, vm, path, deadline):
        while True:
            try:
                return self._socket.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                # Nothing announces that a server listens: look again in a moment, or when the VMM says something.
                if time.monotonic() > deadline or not vm.runs_until(time.monotonic() + 0.02):
                    raise Failure(f"nobody listens on {path}; {vm.tail()}") from None

    def _receive(self):
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise Failure("QMP: no answer") from None
        if not line:
            raise Failure("QMP: the connection was closed")
        return json.loads(line)

    def send_text(self, text):
        """Sends any text; returns the answer to it (events are kept)."""
        self._socket.sendall((text + "\n").encode())
        while True:
            message = self._receive()
            if "event" not in message:
                return message
            self.events.append(message)

    def call(self, command, **arguments):
        """Executes a command; returns what it returns."""
        request = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        answer = self.send_text(json.dumps(request))
        if "return" not in answer:
            raise Failure(f"QMP: {command}: {answer}")
        return answer["return"]

    def event(self, name):
        """Waits for an event; returns its data."""
        while True:
            for index, message in enumerate(self.events):
                if message["event"] == name:
                    return self.events.pop(index).get("data", {})
            message = self._receive()
            if "event" not in message:
                raise Failure(f"QMP: an answer to nothing: {message}")
            self.events.append(message)


def drawn(text):
    """A pattern for text that a program draws on a terminal: the cursor may be moved between any two characters."""
    return r"(?:\x1b\[[\d;]*[A-Za-z])*".join(re.escape(character) for character in text)


def expect_equal(actual, expected, what):
    if actual != expected:
        raise Failure(f"{what}: {actual!r}, not {expected!r}")
