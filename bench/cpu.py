#!/usr/bin/env python3
"""Guest speed: the workloads of bench/cpu, natively, under QEMU's TCG and under Kvartz's own engine, interleaved.

  ./dev bench cpu                                  everything: 5 rounds, real programs too (as root)
  ./dev bench cpu --rounds 1 --secs 0.2 --only integer,syscall,mt_*      a quick look at groups, names or patterns

With --only the tables go to build/bench/quick instead of the results' directory. build/bench/runs.json has each run.
Exits with 1 when Kvartz failed a workload, computed something else than the host or its guest's clock drifted; a missed
target is no failure."""

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

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "cpu"))

import report  # noqa: E402
import runner  # noqa: E402
import suite  # noqa: E402
from runner import NATIVE, OURS, TCG  # noqa: E402


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True)
    parser.add_argument("--results", required=True, help="directory for cpu.md and cpu.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--secs", type=float, default=1.0, help="of each workload in each round (default 1)")
    parser.add_argument("--only", metavar="PATTERNS", help="names, patterns and groups, with commas between them")
    parser.add_argument("--real", action=argparse.BooleanOptionalAction,
                        help="real programs of a Debian root file system; on, unless --only does not name them")
    return parser.parse_args()


def chosen_names(arguments):
    names = suite.select(arguments.only or "*")
    if arguments.real is not None:
        names = [name for name in names if name not in suite.PROGRAMS]
    return names + suite.PROGRAMS if arguments.real else names


def runs_of_a_round(names):
    """[(workloads, processors, real programs?)]: what each machine runs in a round."""
    workloads = [name for name in names if name in suite.WORKLOADS]
    threaded = [name for name in workloads if name.startswith("mt_")]
    programs = [name for name in names if name in suite.PROGRAMS]
    runs = [(workloads, 1, False)] if workloads or suite.BOOT in names else []
    runs += [(threaded, 2, False)] if threaded else []
    return runs + ([(programs, 1, True)] if programs else [])


def run_one(arguments, number, machine, workloads, cpus, programs):
    record = runner.run(machine, arguments.vmm, workloads, arguments.secs, cpus, programs)
    kind = "programs" if programs else "workloads"
    print(f"round {number}: {machine}, {cpus} CPU, {len(record['results'])} of {len(workloads)} {kind}, "
          f"{record['wall_seconds']:.0f} s", *(f"FAILED: {failure}" for failure in record["failures"]), sep="; ",
          file=sys.stderr, flush=True)
    return record | {"round": number}


def run_round(arguments, number, names):
    return [run_one(arguments, number, machine, workloads, cpus, programs)
            for workloads, cpus, programs in runs_of_a_round(names) for machine in (NATIVE, TCG, OURS)
            if workloads or machine != NATIVE]


def median_memory(samples):
    """samples: [{machine: (resident KiB, guest RAM's KiB)}]"""
    rows = []
    for machine in samples[0] if samples else ():
        resident, guest = (statistics.median(sample[machine][i] for sample in samples) / 1024 for i in (0, 1))
        rows.append({"machine": machine, "resident_mib": resident, "guest_mib": guest, "own_mib": resident - guest})
    return rows


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=runner.ROOT).stdout


def commit():
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return output_of("git", "rev-parse", "--short", "HEAD").strip() + (" with changes" if changed else "")


def versions(vmm, records):
    return {"kvartz": output_of(vmm, "-version").splitlines()[0], "commit": commit(),
            "qemu": output_of(runner.QEMU, "-version").splitlines()[0],
            "guest_kernel": next((record["info"]["kernel"] for record in records
                                  if record["machine"] != NATIVE and "kernel" in record["info"]), "unknown")}


def host(load, records):
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        cpu = re.search(r"model name\s*: (.*)", info.read())[1]
    seconds = sum(record["wall_seconds"] for record in records) or 1
    shares = {part: sum(record[f"host_{part}"] * record["wall_seconds"] for record in records) / seconds
              for part in ("idle", "steal")}
    return {"cpu": cpu, "cpus": os.cpu_count(), "kernel": platform.release(), "load": load, **shares}


def write(directory, result, text):
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "cpu.json"), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    with open(os.path.join(directory, "cpu.md"), "w", encoding="utf-8") as file:
        file.write(text)


def main():
    arguments = parse_arguments()
    arguments.vmm = os.path.abspath(arguments.vmm)
    if not shutil.which(runner.QEMU):
        raise SystemExit(f"{runner.QEMU} is missing; run ./dev setup")
    names = chosen_names(arguments)
    programs = any(name in suite.PROGRAMS for name in names)
    subprocess.run([os.path.join(HERE, "cpu/build.sh"), *(["programs"] if programs else [])], check=True)
    load, records, memory = os.getloadavg()[0], [], []
    for number in range(1, arguments.rounds + 1):
        records += run_round(arguments, number, names)
        if suite.IDLE_MEMORY in names:
            memory.append({machine: runner.idle_memory(machine, arguments.vmm) for machine in (TCG, OURS)})
    result = {"date": datetime.date.today().isoformat(), "rounds": arguments.rounds, "secs": arguments.secs,
              "host": host(load, records), "versions": versions(arguments.vmm, records), **report.evaluate(records, names),
              "idle_memory": median_memory(memory)}
    text = report.markdown(result)
    write(runner.built("quick") if arguments.only else arguments.results, result, text)
    with open(runner.built("runs.json"), "w", encoding="utf-8") as file:
        json.dump(records, file, indent=1)
    print(text)
    return 1 if OURS in result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
