"""Ratios, targets and failures of the guest-speed benchmark's runs, and its tables."""

import math
import statistics

import suite
from runner import MEMORY_MIB, NATIVE, OURS, TCG

LOWER_IS_BETTER = ("s", "us")


def speed(record, name):
    """(value in its unit, the same so that more is faster) of a workload in one run, or None."""
    if name == suite.BOOT:
        seconds = record["boot_seconds"]
        return seconds and (seconds, 1 / seconds)
    result = record["results"].get(name)
    if not result or not result["value"]:
        return None
    value, is_low = result["value"], result["unit"] in LOWER_IS_BETTER
    if not suite.by_wall_clock(name):
        cpu = result["cpu"] if record["machine"] == NATIVE else result["vmm_cpu"]
        if cpu <= 0:
            return None
        value *= cpu / result["seconds"] if is_low else result["seconds"] / cpu
    return value, 1 / value if is_low else value


def speeds(records, machine, name, cpus):
    """{round: (value, more is faster)}"""
    programs = name in suite.PROGRAMS
    found = {record["round"]: speed(record, name) for record in records
             if record["machine"] == machine and record["cpus"] == cpus and record["programs"] == programs}
    return {number: pair for number, pair in found.items() if pair}


def ratio(numerator, denominator):
    """Median of the ratios round by round, so that slow drifts of the host cancel, and half the spread of their middle half
    (of all of them when they are fewer than four), in percent; or None."""
    ratios = sorted(numerator[number][1] / denominator[number][1] for number in numerator if number in denominator)
    if not ratios:
        return None
    middle, cut = statistics.median(ratios), len(ratios) // 4
    spread = 50 * (ratios[-1 - cut] - ratios[cut]) / middle if len(ratios) > 1 else None
    return {"ratio": middle, "spread_percent": spread}


def median(values):
    return statistics.median(values) if values else None


def geomean(values):
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def is_met(value, target):
    return None if target is None else value is not None and value >= target


def unit_of(records, name):
    return next((record["results"][name]["unit"] for record in records if name in record["results"]), "s")


def row(records, group, name):
    cpus = 2 if name.startswith("mt_") else 1
    native, tcg, ours = (speeds(records, machine, name, cpus) for machine in (NATIVE, TCG, OURS))
    versus, of_native, tcg_of_native = ratio(ours, tcg), ratio(ours, native), ratio(tcg, native)
    values = {machine: [value for value, _ in found.values()]
              for machine, found in (("native", native), ("tcg", tcg), ("kvartz", ours))}
    return {"group": group.name, "name": name, "unit": unit_of(records, name), "rounds": values, "target": group.members[name],
            "versus_tcg": versus and versus["ratio"], "spread_percent": versus and versus["spread_percent"],
            "of_native": of_native and of_native["ratio"], "tcg_of_native": tcg_of_native and tcg_of_native["ratio"],
            "met": is_met(versus and versus["ratio"], group.members[name])}


def mean_row(name, rows, target, size):
    """The geometric mean of rows; of a part of the workloads (`size` is the number of all) it is held to no target."""
    ratios = [r["versus_tcg"] for r in rows if r["versus_tcg"]]
    mean = geomean(ratios)
    of_native = geomean([r["of_native"] for r in rows if r["of_native"]])
    met = is_met(mean, target) and len(ratios) == size if len(rows) == size else None
    return {"name": name, "counted": len(ratios), "of": size, "versus_tcg": mean, "of_native": of_native, "target": target,
            "met": met}


def scaling(records, name):
    """How many times as fast two threads are on two processors as on one."""
    result = {"name": name}
    for key, machine in (("native", NATIVE), ("tcg", TCG), ("kvartz", OURS)):
        found = ratio(speeds(records, machine, name, 2), speeds(records, machine, name, 1))
        result[key] = found and found["ratio"]
    return result | {"target": suite.THREADS_SCALE[1], "met": is_met(result["kvartz"], suite.THREADS_SCALE[1])}


def faults(record, expected):
    """What must not happen, in words: a workload's own complaints, results that differ from the host's, a guest whose clock
    goes otherwise than the host's."""
    yield from record["failures"]
    yield from (f"{name}: not available in the guest" for name in record["skipped"] if name in expected)
    for name, result in record["results"].items():
        if result["checksum"] != expected.get(name, result["checksum"]):
            yield f"{name}: computed {result['checksum']}, the host {expected[name]}"
        seconds, host_seconds = result["seconds"], result["host_seconds"]
        if record["machine"] != NATIVE and abs(host_seconds - seconds) > max(0.2, 0.1 * seconds):
            yield f"{name}: {seconds:.2f} s by the guest's clock, {host_seconds:.2f} s by the host's"


def failures(records):
    """{machine: [text]}"""
    expected = {name: result["checksum"] for record in records if record["machine"] == NATIVE
                for name, result in record["results"].items()}
    found = {}
    for record in records:
        for text in faults(record, expected):
            found.setdefault(record["machine"], []).append(f"round {record['round']}: {text}")
    return found


def evaluate(records, names):
    rows = [row(records, group, name) for group in suite.GROUPS for name in group.members if name in names]
    means = []
    for group in suite.GROUPS:
        members = [r for r in rows if r["group"] == group.name]
        if members and group.geomean:
            means.append(mean_row(group.name, members, group.geomean, len(group.members)))
    in_suite = [group for group in suite.GROUPS if group.in_suite]
    counted = [r for r in rows if any(r["group"] == group.name for group in in_suite)]
    if counted:
        means.append(mean_row("whole suite", counted, suite.SUITE_GEOMEAN, sum(len(group.members) for group in in_suite)))
    return {"workloads": rows, "geometric_means": means,
            "scaling": [scaling(records, name) for name in names if name.startswith("mt_")], "failures": failures(records)}


def number(value):
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def verdict(met):
    return {None: "-", True: "yes", False: "**no**"}[met]


def table(head, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def workload_table(rows):
    head = ["group", "workload", "unit", "native", "TCG", "Kvartz", "Kvartz/TCG", "±%", "Kvartz/native", "TCG/native",
            "target", "met"]
    cells = [[r["group"], r["name"], r["unit"],
              *(number(median(r["rounds"][machine])) for machine in ("native", "tcg", "kvartz")),
              *(number(r[key]) for key in ("versus_tcg", "spread_percent", "of_native", "tcg_of_native", "target")),
              verdict(r["met"])] for r in rows]
    return table(head, cells)


def mean_table(rows):
    return ["## Geometric means", ""] + table(
        ["of", "workloads", "Kvartz/TCG", "Kvartz/native", "target", "met"],
        [[r["name"], f"{r['counted']} of {r['of']}", *(number(r[key]) for key in ("versus_tcg", "of_native", "target")),
          verdict(r["met"])] for r in rows])


def scaling_table(rows):
    return ["## Two threads: two processors beside one", ""] + table(
        ["workload", "native", "TCG", "Kvartz", "target", "met"],
        [[r["name"], *(number(r[key]) for key in ("native", "tcg", "kvartz", "target")), verdict(r["met"])]
         for r in rows])


def memory_table(rows):
    return [f"## Memory of an idle guest of {MEMORY_MIB} MiB at its prompt", ""] + table(
        ["VMM", "resident (MiB)", "touched guest RAM (MiB)", "engine and devices (MiB)"],
        [[r["machine"], f"{r['resident_mib']:.1f}", f"{r['guest_mib']:.1f}", f"{r['own_mib']:.1f}"] for r in rows])


def failure_list(found):
    if not found:
        return ["No failures: all checksums are the host's, and the guests' clocks go with the host's.", ""]
    return ["## Failures", ""] + [f"- {machine}, {text}" for machine, texts in found.items() for text in texts] + [""]


def counted_targets(result):
    verdicts = [r["met"] for key in ("workloads", "geometric_means", "scaling") for r in result[key] if r["met"] is not None]
    return [f"Targets met: {sum(verdicts)} of {len(verdicts)}.", ""]


def heading(result):
    host, versions = result["host"], result["versions"]
    return ["# Guest speed: own engine, TCG, native", "",
            f"Rounds: {result['rounds']}, interleaved, {result['secs']:g} s a workload, on {result['date']}: {host['cpu']}, "
            f"{host['cpus']} CPUs, Linux {host['kernel']}, load {host['load']:.1f} at the start, "
            f"{100 * host['idle']:.0f}% idle and {100 * host['steal']:.0f}% stolen meanwhile.",
            f"{versions['kvartz']}, commit {versions['commit']}; {versions['qemu']}; guest kernel "
            f"{versions['guest_kernel']}.", "",
            "Medians; rates are per CPU second that the VMM took (disk, threads, timer and boot: per second of wall time). A",
            "ratio above 1 means that the first is faster. ±%: half the spread of the middle half of the rounds' ratios.", ""]


def markdown(result):
    tables = (("workloads", workload_table), ("geometric_means", mean_table), ("scaling", scaling_table),
              ("idle_memory", memory_table))
    lines = heading(result) + [line for key, make in tables if result[key] for line in make(result[key])]
    lines += counted_targets(result) + failure_list(result["failures"])
    return "\n".join(lines + ["Made by `./dev bench cpu`; bench/cpu/suite.py has the targets.", ""])
