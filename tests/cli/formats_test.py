"""VDI, VHD, VMDK and VHDX, both ways: the peer reads what we write, and we what it wrote."""

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
