#!/usr/bin/env python3
"""What disks cost beside their data: the way of a request through Disk and filters, a qcow2 file's tables, opening a chain of 100
images, the memory of a disk of 16 TiB. The last two beside qemu-io, interleaved.

What qcow2 takes is told for as many requests as `bench` sends unless told, and for fewer: the first ones of a process load the
tables. Both images' processes run on the same processor: those of rented hosts differ in speed.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time

import img

MIB = 1 << 20
LAYERS = 100
# Each of these places has an L2 table of its own; all of them together fill the default cache.
HUGE, PLACES = 16 << 40, 8192
TARGETS = {"way": 1.1, "qcow2_percent": 10, "chain_ms": 20, "chain_mib": 32}


def request_ways(build, rounds):
    """Nanoseconds of a 4 KiB read of a file in memory, by way."""
    subprocess.run(["cmake", "--build", build, "--target", "disk-path"], check=True, stdout=subprocess.DEVNULL)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        for _ in range(64):
            file.write(os.urandom(MIB))
        file.flush()
        output = subprocess.run([os.path.join(build, "bin", "disk-path"), file.name, str(rounds)], check=True, capture_output=True,
                                text=True).stdout
    rows = [json.loads(line) for line in output.splitlines()]
    straight = rows[0]["ns"]
    # Of the same round: what else the machine does changes all of its ways.
    return [{"name": row["name"], "ns": statistics.median(row["ns"]),
             "ratio": statistics.median(ns / base for ns, base in zip(row["ns"], straight))} for row in rows]


def qcow2_percent(kvartz, directory, write, depth, requests, rounds):
    """What 4 KiB requests to a preallocated qcow2 take more than those to a raw file."""
    times = {"raw": [], "qcow2": []}
    for kind, options in (("raw", []), ("qcow2", ["-o", "preallocation=metadata"])):
        subprocess.run([kvartz, "img", "create", "-q", "-f", kind, *options, f"bench.{kind}", "10G"], cwd=directory, check=True)
    for turn in range(rounds + 1):
        for kind, seconds in times.items():
            taken = img.request_seconds([kvartz, "img"], kind, f"bench.{kind}", requests, depth, write, cwd=directory,
                                        preexec_fn=lambda: os.sched_setaffinity(0, [0]))
            if turn > 0:  # the first one fills the host's page cache
                seconds.append(taken)
    return 100 * (statistics.median(qcow2 / raw for qcow2, raw in zip(times["qcow2"], times["raw"])) - 1)


def run(program, image, commands, cwd):
    """Seconds and peak memory in MiB of a process that opens an image and executes commands."""
    started = time.monotonic()
    process = subprocess.Popen([*program, "-r", "-f", "qcow2", image], cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    process.stdin.write(commands.encode())
    process.stdin.close()
    peak_kib = 0
    while process.poll() is None:
        peak_kib = max(peak_kib, peak_of(process.pid))
    if process.returncode != 0:
        raise SystemExit(f"{program[0]} of {image}: exit code {process.returncode}")
    return time.monotonic() - started, peak_kib / 1024


def peak_of(pid):
    """KiB so far; 0 if it has ended. wait4 would tell at least what the parent took when it was forked."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("VmHWM")), 0)


def compare(programs, images, commands, cwd, rounds):
    """Medians, by program and image."""
    measured = {(name, image): [] for name in programs for image in images}
    for _ in range(rounds):
        for name, program in programs.items():
            for image in images:
                measured[name, image].append(run(program, image, commands, cwd))
    return {key: (statistics.median(one[0] for one in values), statistics.median(one[1] for one in values))
            for key, values in measured.items()}


def make_chain(kvartz, directory):
    create = [kvartz, "img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, "0.qcow2", "10G"], cwd=directory, check=True)
    for i in range(1, LAYERS):
        subprocess.run([*create, "-b", f"{i - 1}.qcow2", "-F", "qcow2", f"{i}.qcow2"], cwd=directory, check=True)
    return "0.qcow2", f"{LAYERS - 1}.qcow2"


def make_huge(kvartz, directory):
    subprocess.run([kvartz, "img", "create", "-q", "-f", "qcow2", "huge.qcow2", str(HUGE)], cwd=directory, check=True)
    writes = "".join(f"write -q {i * (HUGE // PLACES)} 512\n" for i in range(PLACES))
    subprocess.run([kvartz, "io", "-t", "unsafe", "-f", "qcow2", "huge.qcow2"], cwd=directory, input=writes, text=True, check=True,
                   stdout=subprocess.DEVNULL)
    return "huge.qcow2"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True, help="a program of the build that is measured")
    parser.add_argument("--results")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    bin_directory = os.path.dirname(os.path.abspath(options.vmm))
    kvartz = os.path.join(bin_directory, "kvartz")
    programs = {"kvartz": [kvartz, "io"], "peer": ["qemu-io"]}
    rows = []

    def add(name, ours, peers, target, unit):
        rows.append({"name": name, "kvartz": ours, "peer": peers, "target": target, "unit": unit})
        print(f"{name}: {ours:.2f} {unit}" + (f", peer {peers:.2f}" if peers is not None else "") +
              (f" (target {target})" if target else ""), flush=True)

    for way in request_ways(os.path.dirname(bin_directory), options.rounds):
        add(f"4 KiB read, {way['name']}", way["ns"], None, None, "ns")
        if way["ratio"] != 1:
            add(f"4 KiB read, {way['name']}, times the node alone", way["ratio"], None, TARGETS["way"], "x")
    with tempfile.TemporaryDirectory(prefix="kvartz-bench-", dir="/var/tmp") as directory:
        for write in (False, True):
            for depth in (1, 32):
                for requests, target in ((20000, None), (75000, TARGETS["qcow2_percent"])):
                    add(f"4 KiB {'write' if write else 'read'}, preallocated qcow2 beyond raw, depth {depth}, {requests} requests",
                        qcow2_percent(kvartz, directory, write, depth, requests, options.rounds), None, target, "%")
        single, chain = make_chain(kvartz, directory)
        medians = compare(programs, (single, chain), "read 0 512\n", directory, options.rounds)
        for what, index, unit, scale, target in (("time", 0, "ms", 1000, "chain_ms"), ("memory", 1, "MiB", 1, "chain_mib")):
            by_program = {name: (medians[name, chain][index] - medians[name, single][index]) * scale for name in programs}
            add(f"chain of {LAYERS}, {what} beyond one image's", by_program["kvartz"], by_program["peer"], TARGETS[target], unit)
        huge = make_huge(kvartz, directory)
        for what, places in (("opened", 1), ("its cache filled", PLACES)):
            reads = "".join(f"read -q {i * (HUGE // PLACES)} 512\n" for i in range(places))
            medians = compare(programs, (huge,), reads, directory, min(3, options.rounds))
            add(f"disk of 16 TiB, memory, {what}", medians["kvartz", huge][1], medians["peer", huge][1], None, "MiB")
    if options.results:
        write_results(options, rows)


def write_results(options, rows):
    peer = subprocess.run(["qemu-io", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    about = {"date": datetime.date.today().isoformat(), "rounds": options.rounds, "cpus": os.cpu_count(),
             "kernel": platform.release(), "peer": peer}
    with open(os.path.join(options.results, "disks.json"), "w", encoding="utf-8") as file:
        json.dump({"about": about, "rows": rows}, file, indent=1)
        file.write("\n")
    with open(os.path.join(options.results, "disks.md"), "w", encoding="utf-8") as file:
        file.write("# What disks cost beside their data\n\n"
                   f"Medians of {about['rounds']} interleaved rounds on {about['date']}; {about['cpus']} CPUs, Linux "
                   f"{about['kernel']}; {about['peer']}.\nReads through Disk are of a raw file in memory, 16 at once; memory is a process's peak.\n\n"
                   "| row | Kvartz | QEMU | target | met |\n|---|---|---|---|---|\n")
        for row in rows:
            peers = f"{row['peer']:.2f} {row['unit']}" if row["peer"] is not None else ""
            target, met = (f"{row['target']} {row['unit']}", "yes" if row["kvartz"] <= row["target"] else "**no**") if row["target"] \
                else ("", "")
            file.write(f"| {row['name']} | {row['kvartz']:.2f} {row['unit']} | {peers} | {target} | {met} |\n")


if __name__ == "__main__":
    main()
