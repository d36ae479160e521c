"""One run of the guest-speed benchmark: starts a VMM (or the program itself), reads what it prints, notes host times."""

import os
import re
import select
import shutil
import subprocess
import time
import tty

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.join(ROOT, "build/bench")
QEMU = "qemu-system-x86_64"
NATIVE, TCG, OURS = "native", "TCG", "Kvartz"
MEMORY_MIB = 512
SILENCE_S = 400  # a guest that prints nothing for so long hangs: no workload takes that long, even when interpreted


def built(name):
    return os.path.join(BUILD, name)


def vmm_command(machine, vmm, kernel_words, *, cpus=1, disk="disk.img", initrd="initrd.img"):
    """The command lines of the two VMMs differ in the engine's name alone."""
    program, accel = (QEMU, "tcg,thread=multi") if machine == TCG else (vmm, "kvartz")
    return [program, "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot", "-M", "pc",
            "-cpu", "max", "-accel", accel, "-m", str(MEMORY_MIB), "-smp", str(cpus), "-kernel", built("kernel"),
            "-initrd", built(initrd), "-append", f"console=ttyS0 quiet {kernel_words}",
            "-drive", f"file={built(disk)},if=none,id=d,format=raw,readonly=on", "-device", "virtio-blk-pci,drive=d"]


def guest_command(machine, vmm, names, secs, cpus, programs):
    words = f"BENCH_SECS={secs} BENCH_ONLY={','.join(names) or '-'}" + (" BENCH_PROGRAMS=/dev/vda" if programs else "")
    return vmm_command(machine, vmm, words, cpus=cpus, disk="programs.img" if programs else "disk.img")


def native_command(names, secs, cpus, programs):
    command = [built("bench"), "--native", "--cpus", str(cpus), "--secs", str(secs), "--only", ",".join(names),
               "--disk", built("disk.img")]
    if not programs:
        return command
    tree = built("rootfs")
    return ["unshare", "-m", "sh", "-c", f'mount -t tmpfs tmpfs "{tree}/tmp" && exec "$@"', "sh", *command, "--programs", tree]


def cpu_seconds(pid):
    """CPU time that a process has taken: clock_getcpuclockid(3)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def host_ticks():
    with open("/proc/stat", encoding="ascii") as stat:
        fields = [int(field) for field in stat.readline().split()[1:9]]
    return {"total": sum(fields), "idle": fields[3] + fields[4], "steal": fields[7]}


class Record:
    """What a run printed, line by line, with the host's times."""

    def __init__(self, pid):
        self.pid = pid
        self.started = time.monotonic()
        self.marks = {}
        self.results, self.failures, self.skipped, self.info = {}, [], [], {}
        self.boot = None
        self.done = False
        self.last_lines = []

    def line(self, text):
        moment = time.monotonic(), cpu_seconds(self.pid)
        self.last_lines = (self.last_lines + [text])[-5:]
        words = text.split()
        if not words:
            return
        if words[0] == "BENCHGO":
            self.marks[words[1]] = moment
        elif words[0] == "BENCH" and len(words) == 9:
            self.result(words, moment)
        elif words[0] == "BENCHINFO":
            self.info[words[1]] = " ".join(words[2:])
            if words[1] == "init":
                self.boot = moment[0] - self.started
        elif words[0] == "BENCHFAIL":
            self.failures.append(" ".join(words[1:]))
        elif words[0] == "BENCHSKIP":
            self.skipped.append(words[1])
        elif words[0] == "BENCHDONE":
            self.done = True

    def result(self, words, moment):
        name, unit, checksum = words[1], words[3], words[8]
        value, seconds, cpu, units, first = (float(words[i]) for i in (2, 4, 5, 6, 7))
        wall, vmm_cpu = (moment[i] - self.marks[name][i] for i in (0, 1))
        self.results[name] = {"value": value, "unit": unit, "seconds": seconds, "cpu": cpu, "units": int(units),
                              "first_unit_seconds": first, "checksum": checksum, "host_seconds": wall, "vmm_cpu": vmm_cpu}


def read_lines(terminal, record, process):
    """Feeds the record until the process has ended and its output is read, or is silent for too long."""
    buffer, last = b"", time.monotonic()
    while time.monotonic() - last < SILENCE_S:
        ended = process.poll() is not None
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                return
            last = time.monotonic()
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                record.line(line.decode("latin1").strip("\r"))
        elif ended:
            return
    record.failures.append(f"silent for {SILENCE_S} s, after: {' | '.join(record.last_lines)}")


def start(command):
    """The process and the terminal that it prints to."""
    ours, its = os.openpty()
    tty.setraw(its)
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    return process, ours


def stop(process, terminal):
    process.kill()
    process.wait()
    os.close(terminal)


def warm(path):
    """Reads a file, so that the host's page cache has it: what is measured is the VMM, not the host's disk."""
    with open(path, "rb") as file, open(os.devnull, "wb") as null:
        shutil.copyfileobj(file, null, 1 << 20)


def run(machine, vmm, names, secs, cpus=1, programs=False):
    """Results of one run as a dictionary that JSON can hold."""
    warm(built("programs.img" if programs else "disk.img"))
    if machine == NATIVE:
        command = native_command(names, secs, cpus, programs)
    else:
        command = guest_command(machine, vmm, names, secs, cpus, programs)
    before = host_ticks()
    process, terminal = start(command)
    record = Record(process.pid)
    try:
        read_lines(terminal, record, process)
    finally:
        stop(process, terminal)
    if record.info.get("cpus", str(cpus)) != str(cpus) and machine != NATIVE:
        record.failures.append(f"the guest found {record.info['cpus']} of {cpus} processors")
    if not record.done and not any(failure.startswith("silent") for failure in record.failures):
        record.failures.append(f"ended early (status {process.returncode}), after: {' | '.join(record.last_lines)}")
    ticks = {key: value - before[key] for key, value in host_ticks().items()}
    return {"machine": machine, "cpus": cpus, "programs": programs, "results": record.results,
            "failures": record.failures, "skipped": record.skipped, "info": record.info, "boot_seconds": record.boot,
            "wall_seconds": time.monotonic() - record.started,
            "host_idle": ticks["idle"] / ticks["total"], "host_steal": ticks["steal"] / ticks["total"]}


def idle_memory(machine, vmm, settle_s=3):
    """KiB resident in a VMM whose guest waits at a shell's prompt: (all, the guest's RAM). The RAM is in a memfd, which it is
    told apart by."""
    command = vmm_command(machine, vmm, "", initrd="shell.img")
    if machine == TCG:
        command += ["-machine", "memory-backend=ram", "-object", f"memory-backend-memfd,id=ram,size={MEMORY_MIB}M"]
    process, terminal = start(command)
    output, deadline = b"", time.monotonic() + SILENCE_S
    try:
        while not re.search(rb"# (\x1b\[6n)?$", output):
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"{machine}: no prompt after: {output[-300:].decode('latin1')}")
            if select.select([terminal], [], [], 0.1)[0]:
                output += os.read(terminal, 4096)
        time.sleep(settle_s)  # what the guest's start left over runs out
        return resident_kib(process.pid)
    finally:
        stop(process, terminal)


def resident_kib(pid):
    # Pss, not Rss: code memory that is mapped twice takes its pages once.
    total = guest = 0
    with open(f"/proc/{pid}/smaps", encoding="utf-8") as smaps:
        for line in smaps:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                is_guest_ram = re.search(r"/memfd:(ram|memory-backend-memfd) ", line)
            elif line.startswith("Pss:"):
                total += int(line.split()[1])
                guest += int(line.split()[1]) if is_guest_ram else 0
    return total, guest
