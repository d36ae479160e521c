#!/usr/bin/env python3
"""Guest instructions a second in the own engine, on one core, beside QEMU's TCG: a bare-metal loop of integer work with a
known number of instructions (tests/guest/integer_loop.S), timed between two bytes on its serial port. Interleaved runs."""

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
ITERATIONS = 50_000_000
PER_ITERATION = 10


def build_guest(directory):
    sources = os.path.join(os.path.dirname(HERE), "tests/guest")
    path = os.path.join(directory, "loop")
    subprocess.run(["as", "--32", "--defsym", f"ITERATIONS={ITERATIONS}", "-o", path + ".o",
                    os.path.join(sources, "integer_loop.S")], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "--no-warn-rwx-segments", "-T", os.path.join(sources, "pvh.ld"), "-o", path,
                    path + ".o"], check=True)
    return path


def run(vmm, guest):
    """Seconds between the guest's two bytes."""
    command = [vmm, "-accel", "tcg", "-M", "pc", "-m", "64", "-nodefaults", "-display", "none", "-serial", "stdio", "-kernel",
               guest]
    started = None
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            while data := os.read(process.stdout.fileno(), 4096):
                if b"<" in data:
                    started = time.monotonic()
                if b">" in data:
                    return time.monotonic() - started
        finally:
            process.kill()
    raise SystemExit(f"{vmm}: ended before the loop did")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True)
    parser.add_argument("--results", required=True, help="directory for integer_loop.md and integer_loop.json")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    vmms = [arguments.vmm] + ([PEER] if shutil.which(PEER) else [])
    rates = {vmm: [] for vmm in vmms}
    with tempfile.TemporaryDirectory() as directory:
        guest = build_guest(directory)
        for _ in range(arguments.runs):
            for vmm in vmms:
                rates[vmm].append(ITERATIONS * PER_ITERATION / run(vmm, guest) / 1e6)
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        cpu = re.search(r"model name\s*: (.*)", info.read())[1]
    result = {"date": datetime.date.today().isoformat(), "runs": arguments.runs, "cpu": cpu, "kernel": platform.release(),
              "load": os.getloadavg()[0],
              "million_instructions_a_second": {os.path.basename(vmm): {"median": statistics.median(values), "min": min(values),
                                                                       "max": max(values)} for vmm, values in rates.items()}}
    lines = ["# Integer loop in the own engine", "",
             f"{arguments.runs} interleaved runs each, on {result['date']}: {cpu}, Linux {result['kernel']}, load "
             f"{result['load']:.1f}.", "", "| VMM | million instructions/s, median | slowest | fastest |", "|---|---|---|---|"]
    for name, row in result["million_instructions_a_second"].items():
        lines.append(f"| {name} | {row['median']:.0f} | {row['min']:.0f} | {row['max']:.0f} |")
    lines += ["", "Made by `./dev bench integer_loop`; the peer translates (TCG), the own engine interprets.", ""]
    os.makedirs(arguments.results, exist_ok=True)
    with open(os.path.join(arguments.results, "integer_loop.json"), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    with open(os.path.join(arguments.results, "integer_loop.md"), "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
