#!/usr/bin/env python3
"""How fast disk images are: kvartz img and kvartz nbd beside qemu-img and qemu-nbd, interleaved in one run.

Conversions are timed from start to end of the process, the files in the host's page cache. The other rows are 4 KiB requests
with a stride that touches another cluster each time: over NBD of one public client (qemu-img bench) on the two servers, and of
each tool's own bench on the file. A ratio above 1 means that Kvartz is faster.
"""

import argparse
import datetime
import json
import os
import platform
import random
import select
import statistics
import subprocess
import tempfile
import time

MIB = 1 << 20
STRIDE = 1003520  # 245 * 4096: another cluster each time, all of them in the end

# Name, source, arguments, target of the ratio. The source of what is compressed is smaller.
CONVERSIONS = [
    ("raw to qcow2, full", "full.raw", ["-f", "raw", "-O", "qcow2"], 1.3),
    ("raw to qcow2, sparse", "sparse.raw", ["-f", "raw", "-O", "qcow2"], 1.3),
    ("qcow2 to raw, full", "full.qcow2", ["-f", "qcow2", "-O", "raw"], 1.3),
    ("qcow2 to raw, sparse", "sparse.qcow2", ["-f", "qcow2", "-O", "raw"], 1.3),
    ("raw to qcow2, -c zlib", "text.raw", ["-f", "raw", "-c", "-O", "qcow2"], 1.8),
    ("raw to qcow2, -c zstd", "text.raw", ["-f", "raw", "-c", "-o", "compression_type=zstd", "-O", "qcow2"], 1.5),
]


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


def prepare(directory, size):
    generator = random.Random(1)
    block = generator.randbytes(8 * MIB)
    words = [generator.randbytes(generator.randrange(3, 9)).hex() for _ in range(2000)]
    with open(f"{directory}/full.raw", "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    with open(f"{directory}/sparse.raw", "wb") as file:
        file.truncate(size)
        for offset in range(0, size, 64 * MIB):
            file.seek(offset)
            file.write(block[:MIB])
    with open(f"{directory}/text.raw", "wb") as file:
        text = " ".join(generator.choice(words) for _ in range(1 << 20)).encode()
        while file.tell() < size // 8:
            file.write(text[:size // 8 - file.tell()])
    for name in ("full", "sparse"):
        run("qemu-img", "convert", "-O", "qcow2", f"{name}.raw", f"{name}.qcow2", cwd=directory)


def convert_row(programs, directory, source, arguments, rounds):
    times = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            if os.path.exists(f"{directory}/out"):
                os.remove(f"{directory}/out")
            started = time.monotonic()
            run(*program, "convert", *arguments, source, "out", cwd=directory)
            times[name].append(time.monotonic() - started)
    run("qemu-img", "compare", source, "out", cwd=directory)
    os.remove(f"{directory}/out")
    return times


def request_seconds(program, fmt, image, count, depth, write, **options):
    """What 4 KiB requests to an image take, by its `bench`."""
    output = run(*program, "bench", "-f", fmt, "-c", str(count), "-d", str(depth), "-s", "4k", "-S", str(STRIDE),
                 *(["-w"] if write else []), image, **options)
    return float(output.split("Run completed in ")[1].split()[0])


class Server:
    def __init__(self, program, directory, image):
        self.pid_file = f"{directory}/pid"
        run(*program, "--fork", "--pid-file", self.pid_file, "-t", "-k", f"{directory}/socket", "-f", "qcow2", image, cwd=directory)

    def stop(self):
        with open(self.pid_file, encoding="ascii") as file:
            pid = int(file.read())
        descriptor = os.pidfd_open(pid)
        os.kill(pid, 15)
        select.select([descriptor], [], [])
        os.close(descriptor)


def nbd_row(servers, directory, preallocation, write, depth, count, rounds):
    times = {name: [] for name in servers}
    for _ in range(rounds):
        for name, program in servers.items():
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"preallocation={preallocation}", "nbd.qcow2", "10G", cwd=directory)
            server = Server(program, directory, "nbd.qcow2")
            times[name].append(request_seconds(["qemu-img"], "raw", f"nbd+unix:///?socket={directory}/socket", count, depth, write))
            server.stop()
    return times


def bench_row(programs, directory, preallocation, write, depth, count, rounds):
    times = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"preallocation={preallocation}", "bench.qcow2", "10G", cwd=directory)
            times[name].append(request_seconds(program, "qcow2", "bench.qcow2", count, depth, write, cwd=directory))
            os.remove(f"{directory}/bench.qcow2")
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True, help="a program of the build whose kvartz is measured")
    parser.add_argument("--results")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=4096, help="of the images that are converted, MiB")
    parser.add_argument("--requests", type=int, default=20000, help="of each row of 4 KiB requests")
    parser.add_argument("--directory", help="where the images are (default: /var/tmp)", default="/var/tmp")
    options = parser.parse_args()
    kvartz = os.path.join(os.path.dirname(os.path.abspath(options.vmm)), "kvartz")
    programs = {"kvartz": [kvartz, "img"], "peer": ["qemu-img"]}
    servers = {"kvartz": [kvartz, "nbd"], "peer": ["qemu-nbd"]}
    rows = []

    def add(name, times, target):
        median = {key: statistics.median(values) for key, values in times.items()}
        ratio = median["peer"] / median["kvartz"]
        rows.append({"name": name, "kvartz_s": median["kvartz"], "peer_s": median["peer"], "ratio": ratio, "target": target,
                     "times": times})
        print(f"{name}: {median['kvartz']:.3f} s, peer {median['peer']:.3f} s, ratio {ratio:.2f} (target {target})", flush=True)

    with tempfile.TemporaryDirectory(prefix="kvartz-bench-", dir=options.directory) as directory:
        prepare(directory, options.size * MIB)
        for name, source, arguments, target in CONVERSIONS:
            add(name, convert_row(programs, directory, source, arguments, options.rounds), target)
        for prefix, row, by_name in (("NBD", nbd_row, servers), ("bench", bench_row, programs)):
            for preallocation, write in (("metadata", False), ("metadata", True), ("off", False), ("off", True)):
                for depth in (1, 32):
                    state = "preallocated" if preallocation != "off" else "empty"
                    add(f"{prefix} {'write' if write else 'read'} 4k, {state}, depth {depth}",
                        row(by_name, directory, preallocation, write, depth, options.requests, options.rounds),
                        1.3 if write and preallocation == "off" else 1.0)
    if options.results:
        write_results(options, rows)


def write_results(options, rows):
    about = {"date": datetime.date.today().isoformat(), "rounds": options.rounds, "size_mib": options.size,
             "requests": options.requests, "cpus": os.cpu_count(), "kernel": platform.release(),
             "peer": run("qemu-img", "--version").splitlines()[0]}
    with open(os.path.join(options.results, "img.json"), "w", encoding="utf-8") as file:
        json.dump({"about": about, "rows": rows}, file, indent=1)
        file.write("\n")
    with open(os.path.join(options.results, "img.md"), "w", encoding="utf-8") as file:
        file.write("# Disk images: kvartz img and kvartz nbd beside QEMU's\n\n"
                   f"Medians of {about['rounds']} interleaved rounds on {about['date']}; images of {about['size_mib']} MiB (an eighth "
                   f"with -c), {about['requests']} requests a row; {about['cpus']} CPUs, Linux {about['kernel']}; {about['peer']}.\n"
                   "A ratio above 1 means that Kvartz is faster.\n\n"
                   "| row | Kvartz, s | QEMU, s | ratio | target | met |\n|---|---|---|---|---|---|\n")
        for row in rows:
            met = "yes" if row["ratio"] >= row["target"] else "**no**"
            file.write(f"| {row['name']} | {row['kvartz_s']:.3f} | {row['peer_s']:.3f} | {row['ratio']:.2f} | {row['target']} | {met} |\n")


if __name__ == "__main__":
    main()
