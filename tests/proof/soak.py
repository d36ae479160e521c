#!/usr/bin/env python3
"""Two guests under load for long: memory of the VMMs, the guests' clocks, what their kernels say.

  ./dev soak [MINUTES]     (30)

One guest has two processors, one has one; each forks, maps memory, runs node's and LuaJIT's compiled code, and reads and
writes a disk and a network. Prints a table at the end, and exits with 1 if a guest ended, stood still, complained, computed
something else than before, its clock drifted by more than 50 ms, or a VMM's memory besides the guest's kept growing.
build/proof/soak-*.log is what the guests printed, build/proof/soak.json what was measured."""

import argparse
import http.server
import json
import os
import re
import statistics
import sys
import threading
import time

import proof

SAMPLE_S = 5
MOST_DRIFT_MS = 50
MOST_OWN_MIB = 256  # code memory and all else but the guest's RAM
MOST_GROWTH_MIB = 16  # of that, from the middle of the time to its end
SILENCE_S = 60
STOPPED_S = 10  # if this process didn't run for so long, the host stood still, or somebody stopped all of it
NET_BYTES = 8 << 20
COMPLAINTS = re.compile(r"BUG:|Oops|WARNING:|[Pp]anic|stall|lockup|blocked for more than|Call Trace|general protection|segfault"
                        r"|traps:|trap [a-z]|unstable|I/O error|Out of memory|allocation failure|unhandled|MCE|@fault")

# What kernels and clients say when they were stopped themselves.
OF_STANDSTILL = re.compile(r"timed out|stall|lockup|stuck for|Call Trace|BUG: workqueue|unstable")


def resident_mib(pid):
    """(besides the guest's RAM, which is told apart by its memfd; that RAM)"""
    own = guest = 0
    is_guest = False
    with open(f"/proc/{pid}/smaps", encoding="utf-8") as smaps:
        for line in smaps:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                is_guest = "/memfd:ram " in line
            elif line.startswith("Pss:"):  # code memory is mapped twice
                kib = int(line.split()[1])
                own, guest = (own, guest + kib) if is_guest else (own + kib, guest)
    return own / 1024, guest / 1024


class Guest:
    def __init__(self, vmm, name, cpus, memory_mib, url):
        self.name, self.cpus = name, cpus
        disk = proof.built(f"soak-{name}.img")
        with open(disk, "wb") as file:
            file.truncate(512 << 20)
        options = ["-drive", f"file={disk},if=none,id=e,format=raw", "-device", "virtio-blk-pci,drive=e", "-netdev", "user,id=n",
                   "-device", "virtio-net-pci,netdev=n"]
        words = ["loglevel=5", "PROOF=soak.sh", f"PROOF_NET={url}"]
        self.process = proof.Process(proof.guest_command(vmm, words, cpus=cpus, memory_mib=memory_mib, options=options))
        self.log = open(proof.built(f"soak-{name}.log"), "w", encoding="utf-8")
        self.offsets, self.memory, self.rounds, self.complaints = [], [], {}, []
        self.ended, self.heard = None, time.monotonic()

    def take(self, lines, now):
        self.heard = time.monotonic()
        for line in lines:
            self.log.write(line + "\n")
            clock = re.search(r"@clock (\d+)\.(\d{9})", line)
            load = re.search(r"@load (\w+) (\d+) ", line)
            if clock:
                guest = int(clock[1]) + int(clock[2]) * 1e-9
                self.offsets.append((time.monotonic(), (now - guest) * 1e3))
            elif load:
                self.rounds[load[1]] = int(load[2])
            if COMPLAINTS.search(line):
                self.complaints.append((time.monotonic(), line))

    def listen(self, until):
        """In a thread of its own, so that a line's time of arrival is known."""
        while time.monotonic() < until and self.ended is None:
            lines = self.process.lines(1)
            if lines is None:
                self.ended = f"ended with exit code {self.process.wait()}"
            elif lines:
                self.take(lines, time.time())
            elif time.monotonic() - self.heard > SILENCE_S:
                self.ended = f"silent for {SILENCE_S} s"

    def drift_ms(self):
        """How the guest's clock went against the host's. A line is late, never early: of each tenth of the time the least
        delay counts."""
        if len(self.offsets) < 200:
            return None
        first, last = self.offsets[0][0], self.offsets[-1][0]
        tenths = [[] for _ in range(10)]
        for moment, offset in self.offsets:
            tenths[min(9, int((moment - first) / (last - first) * 10))].append(offset)
        least = [min(tenth) for tenth in tenths if tenth]
        return max(least) - min(least)

    def own_complaints(self, standstills):
        """Without those that a standstill of the host explains: within the minute after it."""
        return [line for moment, line in self.complaints if not (
            OF_STANDSTILL.search(line) and any(-SAMPLE_S <= moment - end < 60 for end, _ in standstills))]

    def faults(self, standstills):
        own = [mib for _, mib, _ in self.memory]
        drift = self.drift_ms()
        faults = [self.ended] if self.ended else []
        faults += [f"says: {line}" for line in self.own_complaints(standstills)[:10]]
        faults += [] if drift is not None else ["told the time too rarely"]
        faults += [f"its clock drifted by {drift:.1f} ms"] if drift is not None and drift > MOST_DRIFT_MS else []
        faults += [f"no round of {name} ended" for name in ("forks", "maps", "node", "luajit", "disk", "network")
                   if name not in self.rounds]
        if own and max(own) > MOST_OWN_MIB:
            faults.append(f"the VMM takes {max(own):.0f} MiB besides the guest's")
        half = own[len(own) // 2:]
        # Code memory fills up at first.
        if len(own) * SAMPLE_S > 600 and statistics.mean(half[-3:]) - statistics.mean(half[:3]) > MOST_GROWTH_MIB:
            faults.append("the VMM's memory keeps growing")
        return faults


def serve():
    """The URL of a file that guests fetch; they see this host's loopback as 10.0.2.2."""
    data = bytes(range(256)) * (NET_BYTES // 256)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802, a name of the library's
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://10.0.2.2:{server.server_port}/"


def print_table(guests):
    print("| minute |" + "".join(f" {g.name}: VMM's own MiB | guest's MiB |" for g in guests))
    print("|---|" + "---|---|" * len(guests))
    samples = min(len(g.memory) for g in guests)
    for i in sorted({*range(0, samples, max(1, samples // 15)), samples - 1} - {-1}):
        print(f"| {guests[0].memory[i][0]:.1f} |" + "".join(f" {g.memory[i][1]:.1f} | {g.memory[i][2]:.0f} |" for g in guests))
    print("\n| guest | clock, drift | median delay of a line | rounds of load | complaints |")
    print("|---|---|---|---|---|")
    for g in guests:
        drift = g.drift_ms()
        delay = statistics.median(offset for _, offset in g.offsets) if g.offsets else float("nan")
        rounds = ", ".join(f"{name} {count}" for name, count in sorted(g.rounds.items()))
        print(f"| {g.name} | {'?' if drift is None else f'{drift:.1f} ms'} | {delay:.1f} ms | {rounds} | {len(g.complaints)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True)
    parser.add_argument("minutes", type=float, nargs="?", default=30)
    arguments = parser.parse_args()
    proof.build()
    url = serve()
    started = time.monotonic()
    until = started + arguments.minutes * 60
    guests = [Guest(arguments.vmm, "smp2", 2, 1024, url), Guest(arguments.vmm, "smp1", 1, 768, url)]
    standstills = []  # (end, seconds)
    threads = [threading.Thread(target=g.listen, args=(until,)) for g in guests]
    try:
        for thread in threads:
            thread.start()
        while time.monotonic() < until and not all(g.ended for g in guests):
            for g in guests:
                if g.ended is None:
                    try:
                        g.memory.append(((time.monotonic() - started) / 60, *resident_mib(g.process.pid)))
                    except (FileNotFoundError, ProcessLookupError):  # it has ended this very moment
                        pass
            before = time.monotonic()
            threads[0].join(SAMPLE_S)
            if time.monotonic() - before > SAMPLE_S + STOPPED_S:
                standstills.append((time.monotonic(), time.monotonic() - before - SAMPLE_S))
        for thread in threads:
            thread.join()
    finally:
        for g in guests:
            g.process.kill()
            g.log.close()
            os.remove(proof.built(f"soak-{g.name}.img"))
    with open(proof.built("soak.json"), "w", encoding="utf-8") as file:
        json.dump({g.name: {"offsets_ms": g.offsets, "memory_mib": g.memory, "rounds": g.rounds, "complaints": g.complaints}
                   for g in guests}, file)
    print_table(guests)
    faults = [f"{g.name}: {fault}" for g in guests for fault in g.faults(standstills)]
    for end, seconds in standstills:
        print(f"soak: the host stood still for {seconds:.0f} s until minute {(end - started) / 60:.1f}; "
              "stalls that guests complain of in the minute after it don't count")
    print("\n".join(f"soak: FAILED: {fault}" for fault in faults) or f"soak: {arguments.minutes:g} minutes, all is well")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
