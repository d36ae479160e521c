"""VDI, VHD, VMDK and VHDX, both ways: the peer reads what we write, and we what it wrote."""

import random
import subprocess
import unittest

from harness import MIB, ImageTest

# Format, options, whether -c is needed to write.
VARIANTS = [
    ("vdi", "", False),
    ("vdi", "static=on", False),
    ("vpc", "", False),
    ("vpc", "force_size=on", False),
    ("vpc", "subformat=fixed", False),
    ("vpc", "subformat=fixed,force_size=on", False),
    ("vmdk", "", False),
    ("vmdk", "zeroed_grain=on", False),
    ("vmdk", "subformat=monolithicFlat", False),
    ("vmdk", "subformat=streamOptimized", True),
    ("vhdx", "", False),
    ("vhdx", "subformat=fixed", False),
    ("vhdx", "block_size=1M", False),
]
SIZES = [0, 512, MIB - 512, 3 * MIB + 1024, 40 * MIB]


def by_chs(fmt, options):
    return fmt == "vpc" and "force_size" not in options


class FormatsTest(ImageTest):
    @staticmethod
    def each():
        for fmt, options, stream in VARIANTS:
            for size in SIZES:
                # The peer can't make, or can't open, the smallest of some.
                if (size == 0 and fmt in ("vpc", "vhdx")) or (size <= 512 and fmt == "vmdk"):
                    continue
                yield fmt, (["-o", options] if options else []), stream, size

    def test_peer_reads_what_we_convert(self):
        for fmt, options, _, size in self.each():
            raw = self.write_raw("a.raw", size, seed=size + 1)
            self.ours("convert", "-f", "raw", "-O", fmt, *options, raw, "a.img")
            self.peers("compare", "-f", "raw", "-F", fmt, raw, "a.img")
            if fmt != "vpc" and "monolithicFlat" not in str(options):
                self.peers("check", "-f", fmt, "a.img")

    def test_we_read_what_the_peer_converts(self):
        for fmt, options, _, size in self.each():
            raw = self.write_raw("a.raw", size, seed=size + 2)
            self.peers("convert", "-f", "raw", "-O", fmt, *options, raw, "a.img")
            self.ours("compare", "-f", "raw", "-F", fmt, raw, "a.img")
            self.ours("convert", "-f", fmt, "-O", "raw", "a.img", "b.raw")
            self.identical(raw, "b.raw", "-f", "raw", "-F", "raw")

    def test_created_images_are_as_the_peers(self):
        for fmt, options, _, size in self.each():
            self.peers("create", "-f", fmt, *options, "peer.img", str(size))
            self.ours("create", "-f", fmt, *options, "ours.img", str(size))
            peer, ours = self.info("peer.img", "-f", fmt), self.info("ours.img", "-f", fmt)
            for key in ("virtual-size", "cluster-size", "format"):
                self.assertEqual(peer.get(key), ours.get(key), key)

    def test_info_agrees(self):
        for fmt, options, _, size in self.each():
            self.peers("create", "-f", fmt, *options, "a.img", str(size))
            self.same("info", "-f", fmt, "a.img")
            self.same("info", "-f", fmt, "--output=json", "a.img")

    def test_writes_in_place(self):
        """Into images of either maker; zeros, too."""
        for fmt, options, stream, size in self.each():
            if stream or size < MIB:
                continue
            for maker in (self.ours, self.peers):
                raw = self.write_raw("a.raw", size, seed=3)
                maker("convert", "-f", "raw", "-O", fmt, *options, raw, "a.img")
                # Over it, into what is new, and zeros.
                other = self.write_raw("b.raw", size, seed=4, pieces=5)
                self.ours("convert", "-n", "-f", "raw", "-O", fmt, other, "a.img")
                self.peers("compare", "-f", "raw", "-F", fmt, other, "a.img")

    def test_map_agrees(self):
        for fmt, options, _, size in self.each():
            raw = self.write_raw("a.raw", size, seed=5)
            self.peers("convert", "-f", "raw", "-O", fmt, *options, raw, "a.img")
            # The peer doesn't tell what VHDX has, and looks into the files of static VDI and VHD.
            looks = any(word in str(options) for word in ("stream", "static", "Flat"))
            if fmt not in ("vhdx", "vpc") and not looks and size % MIB == 0:
                self.same("map", "-f", fmt, "--output=json", "a.img")


def crc32c(data):
    crc = 0xffffffff
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    return crc ^ 0xffffffff


class VhdxLogTest(ImageTest):
    def killed(self):
        """A VHDX whose writer was killed: its log counts. The table on disk is as if it had never been written."""
        self.peers("create", "-q", "-f", "vhdx", "-o", "block_size=1M", "a.vhdx", "64M")
        # By lines: it is killed before it would print what it holds back.
        writer = subprocess.Popen(["stdbuf", "-i0", "-oL", "qemu-io", "-f", "vhdx", self.path("a.vhdx")], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        for byte in range(1, 6):
            writer.stdin.write(f"write -q -P {byte} {byte}M 1M\n")
        writer.stdin.write("flush\nlength\n")
        writer.stdin.flush()
        text = ""
        while "64 MiB" not in text:
            text += writer.stdout.readline()
        writer.kill()
        writer.communicate()
        # It puts its log's name into the header for a moment only; and the table's sector isn't written yet.
        with open(self.path("a.vhdx"), "r+b") as file:
            file.seek(MIB + 4 * 8192 + 32)  # of the fifth entry: each has another
            log_guid = file.read(16)
            for offset in (64 << 10, 128 << 10):
                file.seek(offset)
                header = bytearray(file.read(4096))
                header[48:64] = log_guid
                header[4:8] = bytes(4)
                header[4:8] = crc32c(header).to_bytes(4, "little")
                file.seek(offset)
                file.write(header)
            file.seek(2 * MIB + 5 * 8)
            self.assertNotEqual(file.read(8), bytes(8))
            file.seek(2 * MIB + 5 * 8)
            file.write(bytes(8))

    def test_is_replayed(self):
        self.killed()
        self.run_tool("cp", "a.vhdx", "b.vhdx")
        self.assertIn("log must be replayed", self.ours("info", "a.vhdx", code=1).stderr)
        io = self.path(".bin", "qemu-io")
        reads = [word for byte in range(1, 6) for word in ("-c", f"read -P {byte} {byte}M 1M")]
        self.run_tool(io, "-f", "vhdx", *reads, "a.vhdx")
        self.run_tool("qemu-io", "-f", "vhdx", *reads, "b.vhdx")
        self.peers("check", "a.vhdx")
        self.peers("compare", "a.vhdx", "b.vhdx")

    def test_of_garbage_is_refused(self):
        self.killed()
        with open(self.path("a.vhdx"), "rb") as file:
            good = file.read()
        generator = random.Random(1)
        for _ in range(20):
            bad = bytearray(good)
            for _ in range(3):
                bad[MIB + generator.randrange(65536)] ^= 1 << generator.randrange(8)
            with open(self.path("a.vhdx"), "wb") as file:
                file.write(bad)
            done = self.run_tool(self.path(".bin", "qemu-io"), "-f", "vhdx", "-c", "read 0 1M", "a.vhdx", code=None)
            self.assertIn(done.returncode, (0, 1))


class HostileVmdkTest(ImageTest):
    def descriptor(self, extent):
        with open(self.path("evil.vmdk"), "w", encoding="ascii") as file:
            file.write(f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n{extent}\n')

    def test_extents_elsewhere_are_not_followed(self):
        for name in ("/etc/passwd", "../../../../etc/passwd", "..", "sub/x"):
            self.descriptor(f'RW 1 FLAT "{name}" 0')
            done = self.ours("convert", "-O", "raw", "evil.vmdk", "out.raw", code=1)
            self.assertRegex(done.stderr, "outside of the descriptor's directory|no file name")

    def test_extents_that_are_too_short(self):
        self.write_raw("x-flat.vmdk", MIB, seed=1)
        self.descriptor('RW 4096 FLAT "x-flat.vmdk" 0')
        self.assertIn("fewer than", self.ours("info", "evil.vmdk", code=1).stderr)
        self.descriptor('RW 1024 FLAT "x-flat.vmdk" 1024')
        self.ours("info", "evil.vmdk")


if __name__ == "__main__":
    unittest.main()
