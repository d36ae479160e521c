"""kvartz io beside qemu-io: the same words for the same commands."""

import json
import re
import signal
import subprocess
import unittest

from harness import MIB, ImageTest, without

# The peer gives no sensible times for aio_write -z.
RATES = (r"(\d\d\.\d\d sec|\d+:\d\d:\d\d\.\d\d) \(.*\)", r"\d+:\d\d:\d\d\.\d\d,.*")


class IoTest(ImageTest):
    def both(self, *words, image="t.qcow2", fmt="qcow2", size="8M", text=None):
        """The same commands on images that are alike; what is said must be alike, and so must the images be."""
        outputs = []
        for program, name in (("qemu-io", "peer." + image), (self.path(".bin", "qemu-io"), "ours." + image)):
            self.peers("create", "-q", "-f", fmt, name, size)
            done = self.run_tool(program, *words, name, code=None, **({"input": text} if text else {}))
            says = without(done.stdout, *RATES).replace(name, image)
            outputs.append((says, done.returncode))
        self.assertEqual(outputs[1], outputs[0], " ".join(words) + done.stderr)
        self.peers("compare", "peer." + image, "ours." + image)
        self.peers("check", "ours." + image, code=None if fmt not in ("qcow2", "vdi") else 0)
        return outputs[0][0]

    def commands(self, *commands, **options):
        return self.both(*[word for command in commands for word in ("-c", command)], **options)

    def test_reads_and_writes(self):
        says = self.commands(
            "write 0 64k", "write -P 7 64k 64k", "read -P 7 64k 64k", "read -P 8 64k 64k", "read -v 65500 40", "write -z 1M 64k",
            "write -z -u 2M 64k", "write -c 3M 64k", "write -z -n 4M 64k", "write -f 5M 4k", "write -q 10 11", "read -q 0 512",
            "write -P 0x41 100 50", "read -v 96 64", "read -v -q 0 16", "readv 0 512 1k 4k", "writev -P 5 10k 512 4k",
            "writev -q 10k 512", "readv -P 5 10k 512 4k", "readv -v 10k 16 16", "read -l 512 -P 0xcd 0 1k", "read -s 1 -l 3 -P 4 0 512",
            "read -p 0 512", "read 0 0", "write 0 0", "read -P 0xcd -s 10 0 20", "w 7M 1M", "r -P 0xcd 7M 1M")
        self.assertIn("Pattern verification failed at offset 65536, 65536 bytes", says)

    def test_asynchronous(self):
        # One at a time: in what order several end is nobody's promise.
        for command in ("aio_write -P 3 64k 64k", "aio_write -z -u 128k 64k", "aio_write -f -P 3 0 1k 1k", "aio_read -P 0 0 64k",
                        "aio_read -P 9 0 1k", "aio_read -q 0 1k", "aio_read -v 0 16"):
            self.commands(command, "aio_flush")
        many = [f"aio_write -q -P {i + 1} {i}k 1k" for i in range(200)]
        self.commands(*many, "aio_flush", *[f"read -P {i + 1} {i}k 1k" for i in range(200)])

    def test_vm_state(self):
        self.commands("write -b -P 9 0 1k", "read -b -P 9 0 1k", "read -b -P 0 1k 1k")

    def test_the_image(self):
        self.commands("length", "truncate 9M", "length", "truncate -m full 10M", "flush", "write 64k 192k", "write 2M 64k", "map", "alloc 0 10M",
                      "alloc 64k", "alloc 2M 100", "alloc 20M", "discard 64k 64k", "discard -q 128k 64k", "discard -C 192k 64k", "l", "truncate 6M", "length", "sleep 1", "f", "d 0 64k", "a 0", "read -P 0 64k 192k")
        says = self.commands("info")
        self.assertIn("cluster size: 64 KiB", says)
        self.commands("info", "length", "write 5 1000", "map", image="t.raw", fmt="raw")
        self.commands("write 0 1M", "map", "alloc 0 2M", image="t.vdi", fmt="vdi")

    def test_faults(self):
        """The same commands fail by the same rules of blkdebug."""
        rules = [
            {"inject-error": [{"event": "write_aio", "once": True}]},
            {"inject-error": [{"event": "read_aio", "errno": 28, "iotype": "read"}]},
            {"inject-error": [{"event": "none", "sector": 6144, "once": True, "iotype": "write"}]},
            {"inject-error": [{"event": "write_aio", "state": 2, "once": True, "immediately": True}],
             "set-state": [{"event": "write_aio", "state": 1, "new_state": 2}]},
            {"inject-error": [{"event": "read_aio", "state": 3}, {"event": "write_aio", "state": 5, "once": True}],
             "set-state": [{"event": "write_aio", "new_state": 3}, {"event": "read_aio", "state": 3, "new_state": 5}]},
        ]
        commands = ["write 3M 64k", "write 1M 64k", "flush", "read 1M 64k", "write 3M 512", "read 3M 512", "write 1M 512"]
        words = [word for command in commands for word in ("-c", command)]
        for rule in rules:
            for fmt in ("raw", "qcow2"):
                failed = []
                for program in (["qemu-io"], [self.path(".bin", "qemu-io")]):
                    self.peers("create", "-q", "-f", fmt, "a.img", "8M")
                    # Clusters that are there already: what an allocation does is each one's own business.
                    self.peer_io("a.img", "write 0 8M", fmt=fmt)
                    image = {"driver": fmt, "file": {"driver": "blkdebug", "image": {"driver": "file", "filename": "a.img"}, **rule}}
                    done = self.run_tool(*program, *words, "json:" + json.dumps(image), code=None)
                    lines = [line for line in (done.stdout + done.stderr).splitlines() if "failed" in line or "ops;" not in line]
                    # How an image is closed that can't be written to is told in each one's own words.
                    failed.append([line.strip() for line in lines if not line.startswith("qemu-io: ")])
                self.assertEqual(failed[0], failed[1], f"{fmt}: {rule}")

    def test_mistakes(self):
        self.commands(
            "read 0", "read -P a 0 512", "read x 512", "read 0 x", "read 7M 2M", "write 8M 512", "foo", "read 0 3G", "write -n 0 512",
            "read -P 1 -l 600 0 512", "read -P 1 -s 600 0 512", "read -P 256 0 1", "discard 11M 1", "alloc x", "truncate x",
            "truncate -m foo 1M", "discard 0", "alloc", "length x", "sleep x", "sleep 1 2", "aio_write -z 0 512 512", "help foo", "open",
            "close x", "write -z -P 1 0 512", "write -u 0 512", "write -s /nowhere 0 512", "write -c 0 100", "aio_read 20M 512", "aio_flush",
            "aio_write 20M 512", "aio_flush", "readv 20M 512", "writev 20M 512", "reopen -r -w")
        for words in (["-r", "-c", "write 0 512"], ["-c", "close", "-c", "length"], ["-c", "open t.qcow2"], ["-c", "quit", "-c", "foo"]):
            self.both(*words)
        for words in (["nofile"], ["-c", "length"], ["-t", "foo", "x"], ["-d", "foo", "x"], ["--nope"], ["-C", "x"], ["-i", "native", "x"]):
            done = self.run_tool(self.path(".bin", "qemu-io"), *words, code=1)
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)

    def test_reopen(self):
        self.commands("reopen -r", "write 0 512", "reopen -w", "write 0 512", "reopen -c writethrough", "write 0 4k", "reopen -c foo",
                      "read -P 0xcd 0 4k")
        self.commands("close", "open -r peer.t.qcow2", "write 0 512", "read 0 1")

    def test_standard_input(self):
        self.both(text="write 0 64k\n\nlength\nread -P 1 0 1\nfoo\nmap")
        self.both(text="length\nquit\nlength\n")

    def test_other_ways_to_open(self):
        self.peers("create", "-q", "-f", "qcow2", "a.qcow2", "4M")
        io = self.path(".bin", "qemu-io")
        self.run_tool(io, "-s", "-c", "write -P 1 0 1M", "-c", "read -P 1 0 1M", "a.qcow2")
        self.run_tool(io, "-c", "read -P 0 0 1M", "--image-opts", "driver=qcow2,file.filename=a.qcow2")
        self.run_tool(io, "-c", "open -o driver=qcow2,file.filename=a.qcow2", "-c", "read -P 0 0 1M")
        self.run_tool(io, "-m", "-t", "none", "-c", "write -P 3 0 1M", "-c", "read -P 3 0 1M", "a.qcow2")
        with open(self.path("pattern"), "wb") as file:
            file.write(b"abc")
        self.run_tool(io, "-c", "write -s pattern 0 10", "a.qcow2")
        self.assertIn("61 62 63 61 62 63 61 62 63 61 ", self.run_tool("qemu-io", "-c", "read -v 0 10", "a.qcow2").stdout)
        self.peers("create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2")
        self.run_tool(io, "-C", "-c", "read -P 3 100k 4k", "b.qcow2")
        self.run_tool(io, "-c", "open -C b.qcow2", "-c", "read -P 3 300k 4k")
        self.assertEqual([row["start"] for row in json.loads(self.peers("map", "--output=json", "b.qcow2").stdout) if row["depth"] == 0],
                         [64 << 10, 256 << 10])
        self.run_tool(io, "-C", "-r", "-c", "read 0 1", "b.qcow2", code=1)
        self.run_tool(io, "-r", "-U", "-c", "read 0 1", "a.qcow2")
        self.run_tool(io, "-U", "-c", "read 0 1", "a.qcow2", code=1)

    def test_answers_while_input_is_slow(self):
        """What is under way is done while nobody types."""
        self.peers("create", "-q", "-f", "raw", "a.raw", "1M")
        child = subprocess.Popen([self.path(".bin", "qemu-io"), "-f", "raw", self.path("a.raw")], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, text=True)
        self.addCleanup(child.stdout.close)
        child.stdin.write("aio_write 0 64k\n")
        child.stdin.flush()
        line = child.stdout.readline()
        self.assertRegex(line, re.escape("wrote 65536/65536 bytes at offset 0"))
        child.send_signal(signal.SIGTERM)
        child.stdin.close()
        child.wait(20)


if __name__ == "__main__":
    unittest.main()
