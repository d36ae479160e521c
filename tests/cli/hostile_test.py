"""Images that were made to do harm: each known trick ends with one line, and with nothing read, allocated or looped."""

import os
import resource
import struct
import unittest
import zlib

from harness import MIB, ImageTest

COPIED, PACKED = 1 << 63, 1 << 62
MOST_BYTES = 512 * MIB  # of address space that a victim may take
SECRET = "root:x:0:0"


class HostileTest(ImageTest):
    def setUp(self):
        super().setUp()
        self.peers("create", "-q", "-f", "qcow2", "evil.qcow2", "64M")
        self.peer_io("evil.qcow2", "write -P 1 0 64k", "write -P 2 64k 64k")

    def victim(self, *words, code=1, tool="qemu-img"):
        """One of our programs with little memory and little time."""

        def limit():
            resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))

        done = self.run_tool(self.path(".bin", tool), *words, code=code, timeout=30, preexec_fn=limit)
        self.assertNotIn(SECRET, done.stdout + done.stderr)
        if code == 1 and tool == "qemu-img":
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        return done

    def put(self, offset, form, *values, name="evil.qcow2"):
        with open(self.path(name), "r+b") as file:
            file.seek(offset)
            file.write(struct.pack(form, *values))

    def get(self, offset, form):
        with open(self.path("evil.qcow2"), "rb") as file:
            file.seek(offset)
            return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    @property
    def l1(self):
        return self.get(40, ">Q")

    @property
    def l2(self):
        return self.get(self.l1, ">Q") & ~COPIED

    def is_corrupt(self):
        return "corrupt: true" in self.peers("info", "evil.qcow2").stdout

    # ---- files of other names ----

    def test_untrusted_images_open_no_other_file(self):
        self.peers("rebase", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", "evil.qcow2")
        self.assertIn("isn't followed", self.victim("--untrusted", "convert", "-O", "raw", "evil.qcow2", "out.raw").stderr)
        self.assertIn("isn't followed", self.victim("--untrusted", "map", "evil.qcow2").stderr)
        self.victim("info", "evil.qcow2", code=0)  # opens nothing but the image
        self.assertIn("isn't followed", self.victim("--untrusted", "info", "--backing-chain", "evil.qcow2").stderr)
        # Guests write qcow2 headers into raw disks.
        os.rename(self.path("evil.qcow2"), self.path("disk.raw"))
        self.victim("convert", "-f", "raw", "-O", "raw", "disk.raw", "out.raw", code=0)
        with open(self.path("out.raw"), "rb") as file:
            self.assertEqual(file.read(4), b"QFI\xfb")
        self.assertIn("isn't followed", self.victim("--untrusted", "convert", "-O", "raw", "disk.raw", "out.raw").stderr)

    def test_names_that_are_options(self):
        """json: and protocols as the name of a backing file are files, too, that aren't followed."""
        for name in ('json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}', "nbd://127.0.0.1:1/x", "/dev/zero"):
            self.peers("rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "evil.qcow2")
            self.assertIn("isn't followed", self.victim("--untrusted", "convert", "-O", "raw", "evil.qcow2", "out.raw").stderr)

    def test_data_files(self):
        with open(self.path("victim"), "w", encoding="ascii") as file:
            file.write(SECRET + "\n" * 4096)
        self.peers("create", "-q", "-f", "qcow2", "-o", "data_file=d.raw,data_file_raw=on", "evil.qcow2", "4096")
        with open(self.path("evil.qcow2"), "r+b") as file:
            data = file.read(65536)
            at = data.index(b"d.raw")
            file.seek(at - 4)
            file.write(struct.pack(">I", 6) + b"victim\0\0")
        self.assertIn("isn't followed", self.victim("--untrusted", "convert", "-O", "raw", "evil.qcow2", "out.raw").stderr)
        self.assertIn("isn't followed", self.victim("--untrusted", "dd", "if=evil.qcow2", "of=out.raw").stderr)
        self.victim("info", "evil.qcow2", code=0)

    def test_loops(self):
        self.peers("create", "-q", "-f", "qcow2", "b.qcow2", "64M")
        self.peers("rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", "evil.qcow2")
        for back in ("evil.qcow2", "./evil.qcow2", self.path("evil.qcow2")):
            self.peers("rebase", "-u", "-b", back, "-F", "qcow2", "b.qcow2")
            self.assertIn("loop", self.victim("convert", "-O", "raw", "evil.qcow2", "out.raw").stderr)
            self.assertIn("loop", self.victim("info", "--backing-chain", "evil.qcow2").stderr)
        self.peers("rebase", "-u", "-b", "evil.qcow2", "-F", "qcow2", "evil.qcow2")
        self.assertIn("loop", self.victim("convert", "-O", "raw", "evil.qcow2", "out.raw").stderr)
        os.symlink("evil.qcow2", self.path("link.qcow2"))
        self.peers("rebase", "-u", "-b", "link.qcow2", "-F", "qcow2", "evil.qcow2")
        self.assertIn("loop", self.victim("convert", "-O", "raw", "evil.qcow2", "out.raw").stderr)

    # ---- numbers that are too large ----

    def test_giant_tables(self):
        for offset, form, value in ((36, ">I", 0xffffffff), (36, ">I", 4 << 20), (56, ">I", 0xffffffff), (56, ">I", 200), (60, ">I", 0xffffffff),
                                    (60, ">I", 65536), (20, ">I", 63), (20, ">I", 8), (24, ">Q", 1 << 63), (24, ">Q", 1 << 60), (96, ">I", 7),
                                    (100, ">I", 0xffffffff), (8, ">Q", 1 << 62), (16, ">I", 0x7fffffff), (40, ">Q", 1 << 55), (48, ">Q", 1 << 55)):
            with self.subTest(offset=offset, value=value):
                with open(self.path("evil.qcow2"), "rb") as file:
                    good = file.read()
                self.put(offset, form, value)
                for words in (("convert", "-O", "raw", "evil.qcow2", "out.raw"), ("check", "evil.qcow2"), ("snapshot", "-l", "evil.qcow2")):
                    done = self.victim(*words, code=None)
                    self.assertIn(done.returncode, (0, 1, 2, 3), done.stderr)
                    self.assertNotIn("memory", done.stderr)
                with open(self.path("evil.qcow2"), "wb") as file:
                    file.write(good)

    def test_giant_bitmap_directories(self):
        self.peers("bitmap", "--add", "evil.qcow2", "b")
        with open(self.path("evil.qcow2"), "rb") as file:
            good = file.read()
        extension = good.index(struct.pack(">II", 0x23852875, 24)) + 8
        # Whether they say that they are in step with the data, or nothing.
        for autoclear in (1, 0):
            for offset, form, value in ((0, ">I", 0xffffffff), (8, ">Q", 1 << 40), (8, ">Q", 1 << 63), (16, ">Q", 1 << 62)):
                with self.subTest(autoclear=autoclear, offset=offset, value=value):
                    with open(self.path("evil.qcow2"), "wb") as file:
                        file.write(good)
                        file.truncate(8 << 40)  # which has room for it
                    self.put(88, ">Q", autoclear)
                    self.put(extension + offset, form, value)
                    for words in (("check", "evil.qcow2"), ("bitmap", "--add", "evil.qcow2", "c"), ("check", "-r", "all", "evil.qcow2")):
                        done = self.victim(*words, code=None)
                        self.assertIn(done.returncode, (0, 1, 2, 3), done.stderr)
                        self.assertNotIn("memory", done.stderr)
                    self.assertIn(self.victim("-f", "qcow2", "-c", "write 10M 64k", "evil.qcow2", code=None, tool="qemu-io").returncode, (0, 1))

    def test_snapshot_tables_of_garbage(self):
        self.peers("snapshot", "-c", "one", "evil.qcow2")
        table = self.get(64, ">Q")
        for offset, form, value in ((0, ">Q", 1 << 60), (8, ">I", 0xffffffff), (12, ">H", 0xffff), (14, ">H", 0xffff), (36, ">I", 0xffffffff)):
            with self.subTest(offset=offset):
                with open(self.path("evil.qcow2"), "rb") as file:
                    good = file.read()
                self.put(table + offset, form, value)
                for words in (("snapshot", "-l", "evil.qcow2"), ("snapshot", "-a", "one", "evil.qcow2"), ("check", "evil.qcow2"),
                              ("convert", "-l", "one", "-O", "raw", "evil.qcow2", "out.raw")):
                    self.assertIn(self.victim(*words, code=None).returncode, (0, 1, 2, 3))
                with open(self.path("evil.qcow2"), "wb") as file:
                    file.write(good)

    def test_refcount_table_in_the_header(self):
        self.put(48, ">Q", 0)
        before = self.get(0, ">Q")
        self.victim("convert", "-n", "-O", "qcow2", "-f", "raw", "/dev/null", "evil.qcow2", code=None)
        self.victim("-c", "write 1M 64k", "-c", "flush", "evil.qcow2", code=None, tool="qemu-io")
        self.assertEqual(self.get(0, ">Q"), before)

    # ---- data that are tables ----

    def test_writes_into_tables_are_refused(self):
        targets = {"header": 0x0, "refcount table": 0x10000, "refcount block": 0x20000, "L1": None, "L2": None}
        with open(self.path("evil.qcow2"), "rb") as file:
            good = file.read()
        for name, target in targets.items():
            with self.subTest(target=name):
                with open(self.path("evil.qcow2"), "wb") as file:
                    file.write(good)
                target = {"L1": self.l1, "L2": self.l2}.get(name, target)
                self.put(self.l2, ">Q", target | COPIED)
                whole = None
                if name == "header":  # an entry without an offset: not allocated
                    self.victim("-c", "write 0 4k", "evil.qcow2", code=0, tool="qemu-io")
                    self.assertFalse(self.is_corrupt())
                    continue
                with open(self.path("evil.qcow2"), "rb") as file:
                    whole = file.read()
                done = self.victim("-c", "write 4k 4k", "-c", "write 64k 4k", "evil.qcow2", tool="qemu-io")
                self.assertEqual(done.stdout.count("write failed: Input/output error"), 2, done.stdout)
                self.assertTrue(self.is_corrupt())
                with open(self.path("evil.qcow2"), "rb") as file:
                    now = file.read()
                self.assertEqual(now[65536:], whole[65536:])
                self.assertIn("marked as corrupt", self.victim("-c", "write 0 4k", "evil.qcow2", tool="qemu-io").stderr)

    def test_tables_that_overlap(self):
        self.put(self.l1, ">Q", 0x20000 | COPIED)  # the L2 table is the refcount block
        self.victim("-c", "write 1M 4k", "evil.qcow2", tool="qemu-io")
        self.assertTrue(self.is_corrupt())

    def test_free_tables_are_not_given_away(self):
        """Refcounts say that the tables are free."""
        self.put(0x20000, ">HHHHHH", 0, 0, 0, 0, 0, 0)
        before = self.get(0, ">Q"), self.l1, self.l2
        self.victim("-c", "write -P 3 1M 1M", "-c", "read -P 3 1M 1M", "-c", "read -P 1 0 64k", "evil.qcow2", code=0, tool="qemu-io")
        self.assertEqual((self.get(0, ">Q"), self.l1, self.l2), before)
        self.victim("-c", "read -P 3 1M 1M", "evil.qcow2", code=0, tool="qemu-io")

    def test_entries_beyond_the_file(self):
        for entry in (1 << 40 | COPIED, (1 << 55) | COPIED, (1 << 40) + 512 | COPIED, PACKED | 1 << 40, PACKED | COPIED - PACKED - 1):
            with self.subTest(entry=hex(entry)):
                self.put(self.l2, ">Q", entry)
                peer = self.run_tool("qemu-io", "-r", "-c", "read 0 4k", "evil.qcow2", code=None)
                ours = self.victim("-r", "-c", "read 0 4k", "evil.qcow2", code=None, tool="qemu-io")
                self.assertEqual(ours.returncode, peer.returncode, ours.stdout + peer.stdout)
                self.assertLess(os.path.getsize(self.path("evil.qcow2")), 2 * MIB)

    def test_clusters_far_apart(self):
        """64 clusters of 512 bytes, over a sparse file of 8 TiB: what is between them costs nothing."""
        cluster, end = 512, 8 << 40
        with open(self.path("far.qcow2"), "wb") as file:
            file.write(struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 9, 64 * cluster, 0, 2, cluster, 2 * cluster, 1,
                                   0, 0, 0, 0, 0, 4, 104))
            file.seek(cluster)
            file.write(struct.pack(">Q", 4 * cluster | COPIED))
            file.seek(2 * cluster)
            file.write(struct.pack(">Q", 3 * cluster))
            file.seek(3 * cluster)
            file.write(struct.pack(">5H", 1, 1, 1, 1, 1))
            file.seek(4 * cluster)
            file.write(struct.pack(">64Q", *(end // 64 * (i + 1) - cluster | COPIED for i in range(64))))
            file.truncate(end)
        done = self.victim("check", "-f", "qcow2", "far.qcow2", code=2)
        self.assertEqual((done.stdout + done.stderr).count("refcount=0 reference=1"), 64)
        self.victim("check", "-r", "all", "-f", "qcow2", "far.qcow2", code=None)
        self.victim("convert", "-f", "qcow2", "-O", "raw", "far.qcow2", "out.raw", code=0)

    def test_compressed_bombs(self):
        """A stream that would go on for ever, one that is none, and one that is too short."""
        deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
        bomb = deflate.compress(b"\0" * 64 * MIB) + deflate.flush()
        end = os.path.getsize(self.path("evil.qcow2"))
        for packed in (bomb[:65536], b"\xff" * 4096, b"", deflate_of(b"x" * 100)):
            with open(self.path("evil.qcow2"), "r+b") as file:
                file.seek(end)
                file.write(packed + b"\0" * (131072 - len(packed)))
            sectors = max(0, (len(packed) + 511) // 512 - 1)
            self.put(self.l2, ">Q", PACKED | min(sectors, 127) << 54 | end)
            done = self.victim("convert", "-O", "raw", "evil.qcow2", "out.raw", code=None)
            self.assertIn(done.returncode, (0, 1))
            if packed is not bomb[:65536] and done.returncode == 0:
                self.fail("what isn't a cluster was taken for one")


def deflate_of(data):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
    return deflate.compress(data) + deflate.flush()


if __name__ == "__main__":
    unittest.main()
