#!/usr/bin/env python3
"""Hostile guests against a VMM that is built with AddressSanitizer and UndefinedBehaviorSanitizer.

  ./dev hostile [MINUTES]     (10)

tests/guest/hostile.cpp (random instructions in rings 0 and 3, code that changes itself and the other processor's, page tables
full of garbage) for three quarters of the time, with two processors and with one; tests/guest/chaos.cpp (random values to
every port and device register) for the rest. The machine is reset every so often, since such a guest ends up destroying
itself. Exits with 1 if a VMM crashed, was caught at an error, stopped answering, or has guest RAM without guards around it."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time

import proof

sys.path.insert(0, os.path.join(proof.ROOT, "tests/e2e"))

import chaos_test  # noqa: E402
import harness  # noqa: E402

RESET_S = 0.5
GUARD_BYTES = 64 << 10
REPORT = re.compile(r"AddressSanitizer|runtime error|LeakSanitizer|VERIFY|UndefinedBehavior")


def hostile_program(directory):
    program = os.path.join(directory, "hostile")
    guests = os.path.join(proof.ROOT, "tests/guest")
    subprocess.run(["g++", "-m64", "-std=c++23", "-Os", "-ffreestanding", "-fno-pic", "-no-pie", "-mno-red-zone", "-fno-exceptions",
                    "-fno-rtti", "-fno-stack-protector", "-mgeneral-regs-only", "-nostdlib", "-static", "-w",
                    f"-Wl,-T,{guests}/pvh.ld,--build-id=none,--no-warn-rwx-segments", "-o", program,
                    os.path.join(guests, "hostile.cpp")], check=True)
    return program


def mappings(pid):
    """[(start, end, permissions, name)], ascending."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        for line in maps:
            addresses, permissions, *rest = line.split(maxsplit=5)
            start, end = (int(number, 16) for number in addresses.split("-"))
            yield start, end, permissions, rest[3].strip() if len(rest) > 3 else ""


def check_guards(pid):
    """Whatever is next to guest memory can't be accessed."""
    maps = list(mappings(pid))
    found = 0
    for index, (start, end, _, name) in enumerate(maps):
        if not re.match(r"/memfd:(?!kvartz-)", name):
            continue
        found += 1
        before, after = maps[index - 1], maps[index + 1]
        for neighbour, touches in ((before, before[1] == start), (after, after[0] == end)):
            if not touches or neighbour[2] != "---p" or neighbour[1] - neighbour[0] < GUARD_BYTES:
                raise harness.Failure(f"no guard beside {name} at {start:#x}-{end:#x}: {neighbour}")
    if found == 0:
        raise harness.Failure("found no guest memory among the VMM's mappings")
    return found


def attack(context, program, machine, cpus, seconds, number):
    """Returns (starts of the guest, rounds that it told of)."""
    serial, socket = context.path(f"serial{number}"), context.path(f"qmp{number}")
    vm = context.start_bare("-M", machine, "-accel", "kvartz", "-m", "64", "-smp", str(cpus), "-display", "none", "-serial",
                            f"file:{serial}", "-monitor", "none", "-nic", "none", "-kernel", program, "-qmp",
                            f"unix:{socket},server=on,wait=off")
    qmp = harness.Qmp(vm, socket)
    qmp.call("qmp_capabilities")
    guarded = check_guards(vm.pid)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and vm.runs_until(min(deadline, time.monotonic() + RESET_S)):
            qmp.call("system_reset")
        if vm.runs_until(time.monotonic()):
            qmp.call("query-status")
            qmp.call("quit")
    except ConnectionError:
        pass  # it has just gone: its last words say why
    code = vm.wait()
    if code != 0 or REPORT.search(vm.output):
        raise harness.Failure(f"exit code {code}; {vm.tail()}")
    with open(serial, "rb") as file:
        text = file.read()
    return text.count(b"@"), text.count(b".") * 256, guarded


def run(vmm, minutes):
    with tempfile.TemporaryDirectory(prefix="kvartz-hostile-") as directory:
        context = harness.Context(vmm, "", directory)
        try:
            program = hostile_program(directory)
            seconds = minutes * 60 * 3 / 4
            slices = max(2, round(seconds / 60))
            for number in range(slices):
                machine, cpus = ("pc", "microvm")[number // 2 % 2], 2 - number % 2
                starts, rounds, guarded = attack(context, program, machine, cpus, seconds / slices, number)
                print(f"hostile: {machine}, {cpus} CPU, {seconds / slices:.0f} s: {starts} starts, {rounds} rounds or a few more, "
                      f"{guarded} blocks of guest memory guarded", flush=True)
                if rounds == 0:
                    raise harness.Failure("the guest did nothing")
            for machine, devices in (("pc", chaos_test.PCI), ("microvm", chaos_test.MMIO)):
                chaos_test.run_for(context, machine, devices, minutes * 60 / 8)
                print(f"hostile: {machine}, random device registers, {minutes * 60 / 8:.0f} s", flush=True)
        finally:
            context.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True)
    parser.add_argument("minutes", type=float, nargs="?", default=10)
    arguments = parser.parse_args()
    # A report ends the process with a code of its own; leaks are looked for at the end.
    os.environ.setdefault("ASAN_OPTIONS", "exitcode=86:detect_leaks=1:abort_on_error=0")
    os.environ.setdefault("UBSAN_OPTIONS", "halt_on_error=1:print_stacktrace=1:exitcode=87")
    try:
        run(os.path.abspath(arguments.vmm), arguments.minutes)
    except harness.Failure as failure:
        sys.exit(f"hostile: FAILED: {failure}")
    print(f"hostile: {arguments.minutes:g} minutes, all is well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
