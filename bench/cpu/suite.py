"""What the guest-speed benchmark measures: groups of workloads, and how many times as fast as TCG each must be."""

import dataclasses
import fnmatch
import os

HERE = os.path.dirname(os.path.abspath(__file__))
FLOOR = 1.0  # nothing may be slower than TCG, except what has no target at all
THREADS_SCALE = 2, 1.8  # with that many vCPUs, mt_* at least that many times as fast as with one
SUITE_GEOMEAN = 5.0

BOOT = "boot"  # from exec to the guest's first process; part of every run of a guest
IDLE_MEMORY = "idle_memory"  # a table of its own


def real_programs():
    with open(os.path.join(HERE, "programs/list"), encoding="utf-8") as lines:
        return [line.split("\t")[0] for line in lines if "\t" in line]


@dataclasses.dataclass(frozen=True)
class Group:
    name: str
    geomean: float | None  # target of the group's geometric mean
    members: dict  # name: target of each, None without
    in_suite: bool = True  # counts in the geometric mean of the whole suite


def each(target, *names):
    return dict.fromkeys(names, target)


GROUPS = (
    Group("integer", 1.7, each(1.2, "int_sort", "int_crc32", "int_sha256", "int_muldiv", "ptr_16k", "ptr_64m")),
    Group("control", 3, each(FLOOR, "interp_goto", "call_ret", "icall", "lua")),
    Group("strings", 5, each(FLOOR, "memcpy_16m", "memcpy_small", "strlen", "rep_movsb", "rep_stosq_4k", "movsb_alias")),
    Group("vector", 12, each(FLOOR, "sse2_matmul", "sse2_int", "avx2_matmul", "fp_nbody", "x87")),
    Group("kernel", 3, each(1.5, "syscall", "clock_gettime", "page_fault", "mprotect", "signal", "fork_exec", "fork_wait",
                            "pipe_pingpong", "file_tmpfs")),
    Group("code", 5, each(FLOOR, "smc_patch", "smc_self", "jit_gen")),
    Group("compression", None, each(3.0, "gzip")),
    Group("disk", None, each(2.0, "blk_rand4k") | each(1.5, "blk_seq_read")),
    Group("atomics", None, each(None, "atomic")),
    Group("threads", None, each(FLOOR, "mt_sort", "mt_atomic")),
    Group("timer", None, each(None, "timer_1ms_late"), in_suite=False),
    Group("start", None, each(2.5, BOOT), in_suite=False),
    Group("programs", 8, each(FLOOR, *real_programs()), in_suite=False),
)
WORKLOADS = [name for group in GROUPS if group.name not in ("start", "programs") for name in group.members]
PROGRAMS = real_programs()


def select(patterns):
    """Names that match a comma-separated list of names, patterns and groups."""
    names = WORKLOADS + PROGRAMS + [BOOT, IDLE_MEMORY]
    chosen = set()
    for pattern in patterns.split(","):
        found = {name for group in GROUPS if group.name == pattern for name in group.members}
        found |= set(fnmatch.filter(names, pattern))
        if not found:
            groups = " ".join(group.name for group in GROUPS)
            raise SystemExit(f"nothing is called '{pattern}'; groups: {groups}; names: {' '.join(names)}")
        chosen |= found
    return [name for name in names if name in chosen]


def by_wall_clock(name):
    """Does it wait, or use two processors? What doesn't is measured by the CPU time that the VMM took, which a busy host
    changes less."""
    return name.startswith(("blk_", "mt_", "timer_")) or name == BOOT
