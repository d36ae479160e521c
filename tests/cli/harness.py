"""What the tests of the tools share: a directory, our program and its peers, and comparing the two."""

import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
KVARTZ = os.path.abspath(os.environ.get("KVARTZ", os.path.join(ROOT, "build/dev/bin/kvartz")))
MIB = 1 << 20


class ImageTest(unittest.TestCase):
    """Each test runs in an empty directory of its own."""

    place = None  # where that is
    patience_s = 120  # for one program

    def setUp(self):
        if not shutil.which("qemu-img"):
            self.skipTest("qemu-img isn't installed")
        directory = tempfile.TemporaryDirectory(prefix="kvartz-cli-", dir=self.place)
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        # By this name it speaks of itself as the peer does.
        os.makedirs(self.path(".bin"))
        for name in ("qemu-img", "qemu-io", "qemu-nbd"):
            os.symlink(KVARTZ, self.path(".bin", name))

    def path(self, *parts):
        return os.path.join(self.directory, *parts)

    def run_tool(self, *command, code=0, timeout=None, **options):
        timeout = timeout or self.patience_s
        done = subprocess.run(command, cwd=self.directory, capture_output=True, timeout=timeout, text=True, **options)
        if code is not None:
            self.assertEqual(done.returncode, code, f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done

    def ours(self, *arguments, **options):
        return self.run_tool(self.path(".bin", "qemu-img"), *arguments, **options)

    def peers(self, *arguments, code=0, **options):
        # It measures how fast it derives keys, and gives up if the measure comes out as nothing.
        for _ in range(8):
            done = self.run_tool("qemu-img", *arguments, code=None, **options)
            if "Unable to get accurate CPU usage" not in done.stderr:
                break
        if code is not None:
            self.assertEqual(done.returncode, code, f"qemu-img {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done

    def peer_io(self, image, *commands, fmt=None):
        words = [word for command in commands for word in ("-c", command)]
        done = self.run_tool("qemu-io", *(["-f", fmt] if fmt else []), *words, image)
        self.assertNotIn("failed", done.stdout + done.stderr)
        return done

    def same(self, *arguments):
        """Both say the same, word for word, and end with the same code."""
        peers = self.peers(*arguments, code=None)
        ours = self.ours(*arguments, code=None)
        what = " ".join(arguments)
        self.assertEqual(ours.stdout, peers.stdout, f"{what}: {ours.stderr}")
        self.assertEqual(ours.returncode, peers.returncode, f"{what}: {ours.stderr}{peers.stderr}")
        if ours.returncode:
            self.assertTrue(ours.stdout or ours.stderr.startswith("qemu-img: "), what)
            self.assertLessEqual(ours.stderr.count("\n"), 1, ours.stderr)
        return ours

    def identical(self, a, b, *options):
        self.peers("compare", *options, a, b)

    def write_raw(self, name, size, seed, pieces=12):
        """A sparse raw image with random data, runs of one byte and holes."""
        generator = random.Random(seed)
        with open(self.path(name), "wb") as file:
            file.truncate(size)
            for _ in range(pieces):
                if size == 0:
                    break
                length = min(size, generator.choice([512, 4096, 70000, 300000]))
                file.seek(generator.randrange(size - length + 1))
                kind = generator.randrange(3)
                file.write(generator.randbytes(length) if kind else bytes([generator.randrange(256)]) * length)
            file.truncate(size)
        return name

    def info(self, name, *options):
        return json.loads(self.peers("info", "--output=json", *options, name).stdout)


def without(text, *patterns):
    """What must differ, taken out."""
    for pattern in patterns:
        text = re.sub(pattern, "", text)
    return text
