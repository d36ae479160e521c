"""Writers that are killed in the midst of it: what was flushed is there, and the image has leaks at worst.

  KVARTZ_KILLS   how many (default: a slice)      KVARTZ_SEED   the first image's seed
"""

import os
import random
import select
import subprocess
import sys
import time
import unittest

from harness import MIB, ImageTest

SIZE = 8 * MIB
UNIT = 4096
KILLS_OF_ONE_IMAGE = 20
OPTIONS = ("", "cluster_size=4k", "cluster_size=512", "cluster_size=4k,refcount_bits=1", "compat=0.10", "lazy_refcounts=on",
           "extended_l2=on", "extended_l2=on,cluster_size=16k", "cluster_size=2M", "compression_type=zstd", "refcount_bits=64")


class Writer:
    """A script of groups of writes. A group's writes may be under way together; after it all is flushed, and a line says so."""

    MARK = b"read 512/512"

    def __init__(self, generator, groups, compressed):
        self.groups = []
        lines = []
        for _ in range(groups):
            group = {}
            asynchronous = generator.random() < 0.5
            for _ in range(generator.randrange(1, 9)):
                unit = generator.choice([1, 1, 4, 16, 40])
                first = generator.randrange(SIZE // UNIT - unit)
                if any(at in group for at in range(first, first + unit)):
                    continue
                value = generator.randrange(1, 256)
                where = f"{first * UNIT} {unit * UNIT}"
                kind = generator.randrange(10)
                if kind < 6:
                    lines.append(f"{'aio_write' if asynchronous else 'write'} -q -P {value} {where}")
                elif kind < 7:
                    lines.append(f"write -q -z {where}")
                    value = 0
                elif kind < 8:
                    lines.append(f"write -q -z -u {where}")
                    value = 0
                elif kind < 9 and compressed:
                    first, unit = first // 16 * 16, 16
                    if any(at in group for at in range(first, first + unit)):
                        continue
                    lines.append(f"write -q -c -P {value} {first * UNIT} {unit * UNIT}")
                else:
                    lines.append(f"discard -q {where}")
                    value = None  # as before, or zeros
                group.update({at: value for at in range(first, first + unit)})
            lines += ["aio_flush", "flush", "read 0 512"]  # which fails if the server is gone
            self.groups.append(group)
        self.text = "\n".join(lines) + "\n"


class KillTest(ImageTest):
    patience_s = 900  # of a machine with much else to do

    def create(self, generator):
        options = generator.choice(OPTIONS)
        self.lazy = "lazy" in options
        self.compressed = "cluster_size" not in options
        self.small_clusters = "cluster_size=512" in options
        words = ["-o", options] if options else []
        self.state = [{0}] * (SIZE // UNIT)  # what is in the unit's sectors
        if generator.random() < 0.3:
            self.peers("create", "-q", "-f", "raw", "base.raw", str(SIZE))
            self.peer_io("base.raw", "write -P 77 1M 3M", fmt="raw")
            self.state[MIB // UNIT:4 * MIB // UNIT] = [{77}] * (3 * MIB // UNIT)
            words += ["-b", "base.raw", "-F", "raw"]
        self.ours("create", "-q", "-f", "qcow2", *words, "a.qcow2", str(SIZE))
        return options

    def start(self, through_nbd):
        """(the process to kill, the process that takes commands)"""
        io = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "cwd": self.directory}
        if not through_nbd:
            writer = subprocess.Popen([self.path(".bin", "qemu-io"), "-f", "qcow2", "a.qcow2"], **io)
            return writer, writer
        server = subprocess.Popen([self.path(".bin", "qemu-nbd"), "-v", "--discard=unmap", "-f", "qcow2", "-k", self.path("socket"), "a.qcow2"],
                                  cwd=self.directory, stderr=subprocess.PIPE)
        server.stderr.readline()  # it is ready
        return server, subprocess.Popen(["stdbuf", "-i0", "-oL", "qemu-io", "-f", "raw", f"nbd+unix:///?socket={self.path('socket')}"], **io)

    def kill_one(self, generator, through_nbd):
        """Answers what groups were flushed, and the group that was under way."""
        script = Writer(generator, 60, self.compressed and not through_nbd)
        victim, writer = self.start(through_nbd)
        marks, end = generator.randrange(40), time.monotonic() + 60
        delay = generator.random() * generator.choice([0.001, 0.01, 0.05])
        output = b""
        os.set_blocking(writer.stdin.fileno(), False)
        left = script.text.encode()
        try:
            while output.count(Writer.MARK) < marks and time.monotonic() < end:
                readable, writable, _ = select.select([writer.stdout], [writer.stdin] if left else [], [], 1)
                if writable:
                    left = left[os.write(writer.stdin.fileno(), left[:4096]):]
                if readable:
                    data = os.read(writer.stdout.fileno(), 65536)
                    if not data:
                        break
                    output += data
            select.select([], [], [], delay)
        finally:
            victim.kill()
            victim.wait()
            if writer is not victim:
                writer.kill()
        output += writer.stdout.read()
        writer.wait()
        for stream in (writer.stdin, writer.stdout, victim.stderr):
            if stream:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
        done = output.count(Writer.MARK)
        return script.groups[:done], script.groups[done] if done < len(script.groups) else {}

    def verify(self, flushed, under_way, what):
        self.ours("info", "a.qcow2")  # waits where the killed process's last requests still hold it, as the peer wouldn't
        if self.lazy:  # refcounts are mended when it is opened
            self.run_tool(self.path(".bin", "qemu-io"), "-c", "length", "a.qcow2")
        check = self.peers("check", "-q", "a.qcow2", code=None)
        self.assertIn(check.returncode, (0, 3), f"{what}: {check.stdout}{check.stderr}")
        self.peers("convert", "-O", "raw", "a.qcow2", "now.raw")
        with open(self.path("now.raw"), "rb") as file:
            now = file.read()
        allowed = list(self.state)
        for group in flushed:
            for at, value in group.items():
                allowed[at] = {value} if value is not None else allowed[at] | {0}
        for at, value in under_way.items():
            allowed[at] = allowed[at] | {0 if value is None else value}
        for at in range(SIZE // UNIT):
            unit = now[at * UNIT:(at + 1) * UNIT]
            self.state[at] = set(unit)
            self.assertLessEqual(self.state[at], allowed[at], f"{what}: at {at * UNIT:#x}")
            if len(self.state[at]) == 1:
                continue
            # A write that was under way may have come in part, by whole sectors, where its clusters are smaller.
            sectors = [unit[sector:sector + 512] for sector in range(0, UNIT, 512)]
            self.assertTrue(all(sector.count(sector[0]) == 512 for sector in sectors), f"{what}: torn at {at * UNIT:#x}")
            self.assertTrue(self.small_clusters and len(allowed[at]) > 1, f"{what}: torn at {at * UNIT:#x}")

    def test_kills(self):
        kills, seed = int(os.environ.get("KVARTZ_KILLS", "12")), int(os.environ.get("KVARTZ_SEED", "1"))
        groups = 0
        for kill in range(kills):
            image = seed + kill // KILLS_OF_ONE_IMAGE
            if kill % KILLS_OF_ONE_IMAGE == 0 or kills < 2 * KILLS_OF_ONE_IMAGE:
                image = seed + kill if kills < 2 * KILLS_OF_ONE_IMAGE else image
                generator = random.Random(image)
                options = self.create(generator)
            what = f"seed {image}, options '{options}', kill {kill}"
            flushed, under_way = self.kill_one(generator, through_nbd=kill % 4 == 3)
            self.verify(flushed, under_way, what)
            groups += len(flushed)
            if kill % KILLS_OF_ONE_IMAGE == KILLS_OF_ONE_IMAGE - 1 or kill == kills - 1:
                self.ours("check", "-q", "-r", "leaks", "a.qcow2")
                self.peers("check", "-q", "a.qcow2")
            if kill % 50 == 49:
                print(f"{kill + 1} kills, {groups} groups of writes were flushed before them", file=sys.stderr, flush=True)


if __name__ == "__main__":
    unittest.main()
