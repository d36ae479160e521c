"""Block devices of the host: loop devices, where the host lets us make some."""

import os
import subprocess
import unittest

from harness import MIB, ImageTest


class HostDeviceTest(ImageTest):
    def device(self, size=8 * MIB, *options):
        """A loop device over a file of ours."""
        backing = self.path(f"backing{size}")
        with open(backing, "wb") as file:
            file.truncate(size)
        done = subprocess.run(["losetup", "--find", "--show", *options, backing], capture_output=True, text=True, check=False)
        if done.returncode:
            self.skipTest(f"no loop devices here: {done.stderr.strip()}")
        device = done.stdout.strip()
        self.addCleanup(subprocess.run, ["losetup", "--detach", device], check=True)
        return device, backing

    def blocks(self, path):
        return os.stat(path).st_blocks * 512

    def test_sizes_and_contents(self):
        device, _ = self.device()
        info = self.ours("info", "-f", "raw", "--output=json", device).stdout
        self.assertIn('"virtual-size": 8388608', info)
        self.same("info", "-f", "raw", device)
        raw = self.write_raw("a.raw", 8 * MIB, seed=1)
        for cache in ("writeback", "none", "directsync", "writethrough"):
            self.ours("convert", "-n", "-f", "raw", "-O", "raw", "-t", cache, raw, device)
            self.ours("compare", "-f", "raw", "-F", "raw", "-T", cache, raw, device)
            self.run_tool("cmp", raw, device)

    def test_qcow2_on_a_device(self):
        device, _ = self.device(16 * MIB)
        raw = self.write_raw("a.raw", 4 * MIB, seed=2)
        self.ours("create", "-f", "qcow2", device, "4M")
        for cache in ("writeback", "none"):
            self.ours("convert", "-n", "-f", "raw", "-O", "qcow2", "-t", cache, raw, device)
            self.peers("check", "-f", "qcow2", device)
            self.peers("compare", "-f", "raw", "-F", "qcow2", raw, device)
        # No room for more than the device has.
        big = self.write_raw("b.raw", 32 * MIB, seed=3)
        with open(self.path(big), "r+b") as file:
            file.write(os.urandom(32 * MIB))
        self.ours("create", "-f", "qcow2", device, "32M")
        done = self.ours("convert", "-n", "-f", "raw", "-O", "qcow2", big, device, code=1)
        self.assertIn("No space left", done.stderr)
        self.peers("check", "-f", "qcow2", device)

    def test_luks_on_a_device(self):
        with open(self.path("key"), "w", encoding="ascii") as file:
            file.write("secret")
        secret = ["--object", f"secret,id=k,file={self.path('key')}"]
        device, _ = self.device(16 * MIB)
        raw = self.write_raw("a.raw", 8 * MIB, seed=4)
        self.ours("convert", *secret, "-f", "raw", "-O", "luks", "-o", "key-secret=k,iter-time=10", raw, device)
        image = f"driver=raw,size=8M,file.driver=luks,file.key-secret=k,file.file.driver=host_device,file.file.filename={device}"
        for tool in (self.ours, self.peers):
            tool("convert", *secret, "--image-opts", "-O", "raw", image, "out.raw")
            self.run_tool("cmp", raw, "out.raw")
        done = self.ours("create", *secret, "-f", "luks", "-o", "key-secret=k,iter-time=10", device, "20M", code=1)
        self.assertRegex(done.stderr, "needs|No space")

    def test_discard_reaches_it(self):
        device, backing = self.device()
        with open(self.path("full"), "wb") as file:
            file.write(os.urandom(8 * MIB))
        self.ours("convert", "-n", "-f", "raw", "-O", "raw", "full", device)
        os.sync()
        full = self.blocks(backing)
        zeros = self.write_raw("zeros", 8 * MIB, seed=5, pieces=0)
        self.ours("convert", "-n", "-f", "raw", "-O", "raw", zeros, device)
        os.sync()
        self.run_tool("cmp", zeros, device)
        self.assertLess(self.blocks(backing), full // 2)

    def test_large_sectors(self):
        device, _ = self.device(8 * MIB, "--sector-size", "4096")
        raw = self.write_raw("a.raw", 8 * MIB, seed=6)
        self.ours("convert", "-n", "-f", "raw", "-O", "raw", "-t", "none", raw, device)
        self.run_tool("cmp", raw, device)
        self.ours("create", "-f", "qcow2", "-o", "cluster_size=4k", device, "1M")
        self.ours("convert", "-n", "-f", "raw", "-O", "qcow2", "-t", "none", self.write_raw("b.raw", MIB, seed=7), device)
        self.peers("compare", "-f", "raw", "-F", "qcow2", "b.raw", device)
        self.peers("check", "-f", "qcow2", device)

    def test_read_only_ones(self):
        device, _ = self.device(MIB, "--read-only")
        self.ours("info", "-f", "raw", device)
        raw = self.write_raw("a.raw", MIB, seed=8)
        done = self.ours("convert", "-n", "-f", "raw", "-O", "raw", raw, device, code=1)
        self.assertRegex(done.stderr, "not writable|Read-only|not permitted")
        self.assertEqual(done.stderr.count("\n"), 1)
        done = self.ours("resize", "-f", "raw", device, "2M", code=1)
        self.assertEqual(done.stderr.count("\n"), 1)

    def test_resizes_are_refused(self):
        device, _ = self.device(MIB)
        done = self.ours("resize", "-f", "raw", device, "2M", code=1)
        self.assertIn("device", done.stderr)
        done = self.ours("convert", "-n", "-f", "raw", "-O", "raw", self.write_raw("a.raw", 2 * MIB, seed=9), device, code=1)
        self.assertIn("smaller", done.stderr)

    def test_permission(self):
        if os.geteuid() != 0:
            self.skipTest("only root can become somebody else")
        device, _ = self.device(MIB)
        program = self.path(".bin", "qemu-img")
        os.chmod(self.directory, 0o755)
        for words in (["info", "-f", "raw", device], ["dd", "-f", "raw", "-O", "raw", f"if={device}", f"of={self.path('x')}"]):
            done = subprocess.run([program, *words], capture_output=True, text=True, check=False, user=65534, group=65534,
                                  extra_groups=[])
            if "cannot execute" in done.stderr or done.returncode == 126:
                self.skipTest("the program isn't executable for others")
            self.assertEqual(done.returncode, 1, done)
            self.assertRegex(done.stderr, "not readable by uid 65534")
            self.assertEqual(done.stderr.count("\n"), 1)

    def test_other_devices_are_refused(self):
        for name in ("/dev/null", "/dev/tty", "/dev/zero"):
            done = self.ours("info", "-f", "raw", name, code=1)
            self.assertEqual(done.stderr.count("\n"), 1)


if __name__ == "__main__":
    unittest.main()
