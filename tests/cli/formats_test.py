"""VDI, VHD, VMDK and VHDX, both ways: the peer reads what we write, and we what it wrote."""

import random
import struct
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
    ("vmdk", "subformat=twoGbMaxExtentFlat", False),
    ("vmdk", "subformat=twoGbMaxExtentSparse", False),
    ("vmdk", "subformat=twoGbMaxExtentSparse,zeroed_grain=on", False),
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
            if fmt != "vpc" and "Flat" not in str(options):
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


class ChecksTest(ImageTest):
    def test_vhdx(self):
        self.ours("create", "-q", "-f", "vhdx", "-o", "block_size=1M", "a.vhdx", "8M")
        self.run_tool(self.path(".bin", "qemu-io"), "-f", "vhdx", "-c", "write -q 0 3M", "a.vhdx")
        self.ours("check", "-q", "a.vhdx")
        table = 3 * MIB  # of block places, where our images have it
        with open(self.path("a.vhdx"), "rb") as file:
            file.seek(table + 8)
            second = int.from_bytes(file.read(8), "little")
        for block, entry, says in ((0, second, "what is at"), (1, 1 << 42 | 6, "block 1 is beyond the end"), (2, 7, "block 2 is in state 7")):
            self.run_tool("cp", "a.vhdx", "b.vhdx")
            with open(self.path("b.vhdx"), "r+b") as file:
                file.seek(table + 8 * block)
                file.write(entry.to_bytes(8, "little"))
            self.assertIn(says, self.ours("check", "b.vhdx", code=2).stderr)

    def test_flat_vmdk(self):
        self.ours("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "a.vmdk", "8M")
        self.same("check", "a.vmdk")


class VhdxLogTest(ImageTest):
    def name_log(self, file, guid):
        for offset in (64 << 10, 128 << 10):
            file.seek(offset)
            header = bytearray(file.read(4096))
            header[48:64] = guid
            header[4:8] = bytes(4)
            header[4:8] = crc32c(header).to_bytes(4, "little")
            file.seek(offset)
            file.write(header)

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
            self.name_log(file, file.read(16))
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

    def test_zeros_stay_within_the_file(self):
        io = self.path(".bin", "qemu-io")
        self.peers("create", "-q", "-f", "vhdx", "-o", "block_size=1M", "a.vhdx", "64M")
        self.run_tool(io, "-f", "vhdx", "-c", "write -q -P 7 0 2M", "a.vhdx")
        with open(self.path("a.vhdx"), "r+b") as file:
            size = file.seek(0, 2)
            entry = bytearray(4096)  # one descriptor; tail 0, sequence number 1
            entry[:96] = struct.pack("<4sIIIQII16sQQ4sIQQQ", b"loge", 0, len(entry), 0, 1, 1, 0, b"G" * 16, size, size,
                                     b"zero", 0, 1 << 42, size - MIB, 1)
            entry[4:8] = crc32c(entry).to_bytes(4, "little")
            file.seek(MIB)
            file.write(entry)
            self.name_log(file, b"G" * 16)
        self.run_tool(io, "-f", "vhdx", "-c", "read -P 7 0 1M", "-c", "read -P 0 1M 1M", "a.vhdx")
        with open(self.path("a.vhdx"), "rb") as file:
            self.assertEqual(file.seek(0, 2), size)

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


class VmdkParentsTest(ImageTest):
    """Chains of VMDK: each image has a part of its own, the lowest is flat or sparse."""

    def chain(self, maker, subformat="monolithicSparse", options=()):
        self.write_raw("base.raw", 4 * MIB, seed=1)
        self.peers("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", "base.raw", "base.vmdk")
        maker("create", "-q", "-f", "vmdk", *options, "-b", "base.vmdk", "-F", "vmdk", "middle.vmdk")
        self.peer_io("middle.vmdk", "write -P 2 1M 100k", "write -P 3 3000k 7k", fmt="vmdk")
        # What stands on an image names it as it is now.
        maker("create", "-q", "-f", "vmdk", *options, "-b", "middle.vmdk", "-F", "vmdk", "top.vmdk")

    def test_both_ways(self):
        for maker in (self.peers, self.ours):
            for subformat in ("monolithicSparse", "monolithicFlat"):
                for options in ((), ("-o", "zeroed_grain=on")):
                    self.chain(maker, subformat, options)
                    self.ours("compare", "top.vmdk", "middle.vmdk")
                    # Parts of grains, whole ones, zeros, at the end.
                    io = self.path(".bin", "qemu-io")
                    self.run_tool(io, "-f", "vmdk", "-c", "write -P 4 1M 512", "-c", "write -P 5 1100k 200k", "-c",
                                  "write -z 2M 70k", "-c", "write -P 6 4095k 1k", "-c", "write -z 3000k 1k", "top.vmdk")
                    self.peers("convert", "-f", "vmdk", "-O", "raw", "top.vmdk", "peer.raw")
                    self.ours("convert", "-f", "vmdk", "-O", "raw", "top.vmdk", "ours.raw")
                    self.identical("peer.raw", "ours.raw", "-f", "raw", "-F", "raw")
                    self.peer_io("top.vmdk", "read -P 4 1M 512", "read -P 2 1049088 75k", "read -P 5 1100k 200k",
                                 "read -P 0 2M 70k", "read -P 6 4095k 1k", "read -P 0 3000k 1k", "read -P 3 3001k 6k",
                                 fmt="vmdk")
                    self.peers("check", "-f", "vmdk", "top.vmdk")
                    if "Flat" not in subformat:  # the peer doesn't look for its holes here
                        self.same("map", "-f", "vmdk", "--output=json", "top.vmdk")
                    self.same("info", "-f", "vmdk", "--output=json", "top.vmdk")

    def test_parts_of_2_gib(self):
        """The parent's and the child's don't end at the same places; the child is larger."""
        io = self.path(".bin", "qemu-io")
        for maker in (self.peers, self.ours):
            for subformat in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicSparse"):
                maker("create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", "base.vmdk", "3G")
                self.peer_io("base.vmdk", "write -P 1 2047M 2M", "write -P 2 3071M 1M", fmt="vmdk")
                maker("create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "-b", "base.vmdk", "-F", "vmdk", "top.vmdk",
                      "5G")
                self.run_tool(io, "-f", "vmdk", "-c", "write -P 4 2147483136 1k", "-c", "write -P 5 3145727k 70k", "-c", "write -P 6 4095M 2M",
                              "-c", "write -z 2048k 1M", "top.vmdk")
                wanted = ("read -P 1 2047M 1048064", "read -P 4 2147483136 1k", "read -P 1 2147484160 1048064", "read -P 2 3071M 1023k",
                          "read -P 5 3145727k 70k", "read -P 0 3145797k 100k", "read -P 6 4095M 2M", "read -P 0 2048k 1M")
                self.peer_io("top.vmdk", *wanted, fmt="vmdk")
                self.run_tool(io, "-r", "-f", "vmdk", *(part for command in wanted for part in ("-c", command)), "top.vmdk")
                self.peers("compare", "-f", "vmdk", "-F", "vmdk", "top.vmdk", "top.vmdk")
                self.peers("check", "-f", "vmdk", "top.vmdk")
                self.ours("check", "-f", "vmdk", "top.vmdk")
                self.same("info", "-f", "vmdk", "--output=json", "top.vmdk")
                if subformat != "twoGbMaxExtentFlat":
                    self.same("map", "-f", "vmdk", "--output=json", "top.vmdk")
                # Who writes to the parent is noticed, whoever it is.
                self.run_tool(io, "-f", "vmdk", "-c", "write -P 7 0 64k", "base.vmdk")
                self.assertIn("'base.vmdk' was changed since", self.ours("convert", "-O", "raw", "top.vmdk", "out.raw", code=1).stderr)
                self.assertNotEqual(self.peers("convert", "-f", "vmdk", "-O", "raw", "top.vmdk", "out.raw", code=None).returncode, 0)

    def test_streams_have_parents(self):
        self.chain(self.peers)
        for maker in (self.peers, self.ours):
            self.ours("convert", "-c", "-O", "vmdk", "-o", "subformat=streamOptimized", "-B", "middle.vmdk", "-F", "vmdk", "top.vmdk",
                      "s.vmdk")
            maker("compare", "-f", "vmdk", "-F", "vmdk", "top.vmdk", "s.vmdk")
        for options in ("subformat=monolithicFlat", "subformat=twoGbMaxExtentFlat"):
            self.assertIn("can't have a backing file", self.ours("create", "-f", "vmdk", "-o", options, "-b", "base.vmdk", "-F", "vmdk", "x.vmdk",
                                                                 code=1).stderr)
            self.assertIn("zeroed_grain", self.ours("create", "-f", "vmdk", "-o", options + ",zeroed_grain=on", "x.vmdk", "1M", code=1).stderr)
        self.assertIn("unknown subformat", self.ours("create", "-f", "vmdk", "-o", "subformat=vmfsFlat", "x.vmdk", "1M", code=1).stderr)

    def test_what_changed_is_refused(self):
        self.chain(self.peers)
        self.peer_io("middle.vmdk", "write -P 9 0 64k", fmt="vmdk")
        self.assertIn("'middle.vmdk' was changed since 'top.vmdk' was made on it",
                      self.ours("info", "--backing-chain", "top.vmdk", code=None).stderr +
                      self.ours("convert", "-O", "raw", "top.vmdk", "out.raw", code=1).stderr)
        self.assertIn("may not change", self.ours("commit", "-f", "vmdk", "middle.vmdk", code=1).stderr)

    def test_untrusted_ones_are_not_followed(self):
        self.chain(self.peers)
        done = self.ours("--untrusted", "convert", "-O", "raw", "top.vmdk", "out.raw", code=1)
        self.assertIn("has the backing file 'middle.vmdk', which isn't followed", done.stderr)

    def test_parents_must_be_there_and_vmdk(self):
        self.chain(self.peers)
        self.run_tool("rm", "middle.vmdk")
        self.assertIn("middle.vmdk", self.ours("convert", "-O", "raw", "top.vmdk", "out.raw", code=1).stderr)
        self.run_tool("cp", "base.raw", "middle.vmdk")
        self.ours("convert", "-O", "raw", "top.vmdk", "out.raw", code=1)
        self.run_tool("cp", "top.vmdk", "middle.vmdk")  # on itself
        self.assertIn("loop", self.ours("convert", "-O", "raw", "middle.vmdk", "out.raw", code=1).stderr)
        self.assertIn("is a VMDK", self.ours("create", "-f", "vmdk", "-b", "base.raw", "-F", "raw", "x.vmdk", code=1).stderr)


class DifferencingTest(ImageTest):
    def test_vhd_names_its_parent(self):
        self.peers("create", "-q", "-f", "vpc", "a.vhd", "8M")
        with open(self.path("a.vhd"), "r+b") as file:
            data = bytearray(file.read())

            def seal(at, size, sum_at):
                data[at + sum_at:at + sum_at + 4] = bytes(4)
                data[at + sum_at:at + sum_at + 4] = (~sum(data[at:at + size]) & 0xffffffff).to_bytes(4, "big")

            for at in (0, len(data) - 512):
                data[at + 60:at + 64] = (4).to_bytes(4, "big")
                seal(at, 512, 64)
            name = "parent.vhd".encode("utf-16-be")
            data[512 + 64:512 + 64 + len(name)] = name
            seal(512, 1024, 36)
            file.seek(0)
            file.write(data)
        self.assertIn("differencing VHD (its parent is 'parent.vhd')", self.ours("info", "a.vhd", code=1).stderr)

    def test_vhdx_names_its_parent(self):
        self.peers("create", "-q", "-f", "vhdx", "a.vhdx", "8M")
        with open(self.path("a.vhdx"), "r+b") as file:
            data = bytearray(file.read())
            metadata = 2 * MIB if data[2 * MIB:2 * MIB + 8] == b"metadata" else data.find(b"metadata")
            count = int.from_bytes(data[metadata + 10:metadata + 12], "little")
            entry = metadata + 32
            parameters = metadata + int.from_bytes(data[entry + 16:entry + 20], "little")
            data[parameters + 4] |= 2  # has a parent
            key, value = "relative_path".encode("utf-16-le"), "..\\parent.vhdx".encode("utf-16-le")
            place = 96 << 10
            locator = bytes(16) + bytes(2) + (1).to_bytes(2, "little")
            locator += (32).to_bytes(4, "little") + (32 + len(key)).to_bytes(4, "little")
            locator += len(key).to_bytes(2, "little") + len(value).to_bytes(2, "little") + key + value
            data[metadata + place:metadata + place + len(locator)] = locator
            guid = bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")
            row = guid + place.to_bytes(4, "little") + len(locator).to_bytes(4, "little") + (4).to_bytes(4, "little") + bytes(4)
            data[entry + 32 * count:entry + 32 * count + 32] = row
            data[metadata + 10:metadata + 12] = (count + 1).to_bytes(2, "little")
            file.seek(0)
            file.write(data)
        self.assertIn("differencing VHDX (its parent is '..\\parent.vhdx')", self.ours("info", "a.vhdx", code=1).stderr)


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
