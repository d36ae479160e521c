#!/usr/bin/env python3
"""How long until the guest runs, and how much memory the VMM takes: kvartz-vmm beside QEMU, interleaved in one run.

The machine is a microvm with one virtio disk and one virtio network card. "First instruction" is from before the VMM's
exec to the arrival of the byte that the guest's first instructions write to its serial port. "Own memory" is then what
/proc/PID/smaps counts as resident, less the guest's RAM (which both keep in a memfd, so that it can be told apart).
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PEER = "qemu-system-x86_64"


def build_guest(directory):
    sources = os.path.join(os.path.dirname(HERE), "tests/guest")
    path = os.path.join(directory, "first")
    subprocess.run(["as", "--32", "-o", path + ".o", os.path.join(sources, "first.S")], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-T", os.path.join(sources, "pvh.ld"), "-o", path, path + ".o"], check=True)


def command(vmm, accel, directory):
    line = [vmm, "-accel", accel, "-m", "256", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-kernel", os.path.join(directory, "first"),
            "-drive", f"file={directory}/disk.img,format=raw,if=none,id=d", "-device", "virtio-blk-device,drive=d",
            "-netdev", "user,id=n", "-device", "virtio-net-device,netdev=n"]
    if os.path.basename(vmm) == PEER:
        return line + ["-M", "microvm,memory-backend=ram", "-object", "memory-backend-memfd,id=ram,size=256M"]
    if accel == "kvm":
        line[2] = "kvm,force=on"  # a few instructions run on any KVM, also where it is not fit for an operating system
    return line + ["-M", "microvm"]


def own_memory_kib(pid):
    """Resident memory of a process in KiB without its memfds (the guest's RAM)."""
    total = 0
    with open(f"/proc/{pid}/smaps", encoding="utf-8") as smaps:
        is_guest_ram = False
        for line in smaps:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                is_guest_ram = "memfd:" in line
            elif line.startswith("Rss:") and not is_guest_ram:
                total += int(line.split()[1])
    return total


def measure(arguments):
    """Runs the VMM until the guest's byte arrives. Returns (seconds, own KiB), or what it printed instead."""
    started = time.monotonic()
    with subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            while data := os.read(process.stdout.fileno(), 4096):
                if b"@" in data:
                    return time.monotonic() - started, own_memory_kib(process.pid)
            return process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        finally:
            process.kill()


def version(vmm):
    return subprocess.run([vmm, "-version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def cpu_name():
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        return re.search(r"model name\s*: (.*)", info.read())[1]


def markdown(result):
    rows = ["| VMM | engine | first instruction, median (ms) | fastest | slowest | own memory, median (MiB) |",
            "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        if "failed" in row:
            rows.append(f"| {row['vmm']} | {row['accel']} | not measured: {row['failed']} | | | |")
        else:
            rows.append("| {vmm} | {accel} | {median_ms:.1f} | {min_ms:.1f} | {max_ms:.1f} | {own_mib:.1f} |".format(**row))
    host = result["host"]
    return (f"# Start and memory of a microvm with one disk and one network card\n\n{result['runs']} interleaved runs each, "
            f"on {result['date']}: {host['cpu']}, {host['cpus']} CPUs, Linux {host['kernel']}, load {host['load']:.1f}; KVM: "
            f"{host['kvm']}.\n{'; '.join(result['versions'])}.\n\n" + "\n".join(rows) +
            "\n\nMade by `./dev bench startup`; bench/startup.py says what is counted.\n")


def kvm_kind():
    if not os.path.exists("/dev/kvm"):
        return "none"
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        return "hardware" if re.search(r"\b(vmx|svm)\b", info.read()) else "a software backend (no VMX or SVM)"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True)
    parser.add_argument("--results", required=True, help="directory for startup.md and startup.json")
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    vmms = [arguments.vmm] + ([PEER] if shutil.which(PEER) else [])
    accels = (["kvm"] if os.access("/dev/kvm", os.R_OK | os.W_OK) else []) + ["tcg"]
    cases = {(vmm, accel): [] for accel in accels for vmm in vmms}
    with tempfile.TemporaryDirectory() as directory:
        build_guest(directory)
        with open(os.path.join(directory, "disk.img"), "wb") as disk:
            disk.truncate(64 << 20)
        for _ in range(arguments.runs):
            for (vmm, accel), samples in cases.items():
                samples.append(measure(command(vmm, accel, directory)))
    result = {"date": datetime.date.today().isoformat(), "runs": arguments.runs, "versions": [version(vmm) for vmm in vmms],
              "host": {"cpu": cpu_name(), "cpus": os.cpu_count(), "kernel": platform.release(), "kvm": kvm_kind(),
                       "load": os.getloadavg()[0]}, "rows": []}
    for (vmm, accel), samples in cases.items():
        row = {"vmm": os.path.basename(vmm), "accel": accel}
        failed = next((sample for sample in samples if isinstance(sample, list)), None)
        if failed is not None:
            row["failed"] = "".join(failed) or "it ended without a word"
        else:
            seconds, kib = zip(*samples)
            row |= {"median_ms": 1e3 * statistics.median(seconds), "min_ms": 1e3 * min(seconds),
                    "max_ms": 1e3 * max(seconds), "own_mib": statistics.median(kib) / 1024}
        result["rows"].append(row)
    os.makedirs(arguments.results, exist_ok=True)
    with open(os.path.join(arguments.results, "startup.json"), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    with open(os.path.join(arguments.results, "startup.md"), "w", encoding="utf-8") as file:
        file.write(markdown(result))
    print(markdown(result))
    return 1 if any("failed" in row and row["vmm"] != PEER for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
