"""Random commands on a few qcow2 images that stand on each other, by our tools in one directory and by QEMU's in another:
after each of them all images show the same in both.

  KVARTZ_WALKS   how many walks (default: a few)      KVARTZ_SEED   the first one's seed
"""

import os
import random
import shutil
import sys
import unittest

from harness import MIB, ImageTest

COMMANDS = 60
MOST_IMAGES = 6
SIZES = (4096 * 7, MIB, 2 * MIB + 65536 * 3, 3 * MIB, 5 * MIB + 512, 8 * MIB)


class Image:
    def __init__(self, size, backing, compat):
        self.size, self.backing, self.compat = size, backing, compat
        self.snapshots = []  # names, with the size then


class Walk:
    def __init__(self, test, seed):
        self.test, self.random = test, random.Random(seed)
        self.images, self.log, self.made = {}, [], 0
        for directory in ("ours", "peer"):
            shutil.rmtree(test.path(directory), ignore_errors=True)
            os.makedirs(test.path(directory))

    def chance(self, likelihood):
        return self.random.random() < likelihood

    def both(self, tool, *words):
        """Whether it went well, with both."""
        self.log.append(f"{tool} {' '.join(words)}")
        ours = self.test.run_tool(self.test.path(".bin", tool), *words, code=None, inside="ours")
        peer = self.test.run_tool(tool, *words, code=None, inside="peer")
        self.test.assertEqual(ours.returncode, peer.returncode, f"{ours.stdout}{ours.stderr} / {peer.stdout}{peer.stderr}")
        return ours.returncode == 0

    def img(self, *words):
        return self.both("qemu-img", *words)

    # ---- what is looked at

    def differs(self, a, b, *words):
        return self.test.peers("compare", "-f", "qcow2", *words, a, b, code=None).returncode != 0

    def examine(self):
        for name in self.images:
            self.test.assertFalse(self.differs(f"ours/{name}", f"peer/{name}", "-F", "qcow2"), f"{name} differs")
            self.test.peers("check", f"ours/{name}")
            self.test.ours("check", f"ours/{name}")

    def keep(self, name, *words):
        """A command that mustn't change what is seen."""
        self.test.peers("convert", "-O", "raw", f"ours/{name}", "before.raw")
        done = self.img(*words, name)
        self.test.assertFalse(self.differs(f"ours/{name}", "before.raw", "-F", "raw"), f"{name} isn't what it was")
        # Seen: QEMU 7.2's rebase of version 2 loses zeros.
        if self.differs(f"peer/{name}", "before.raw", "-F", "raw"):
            shutil.copy(self.test.path("ours", name), self.test.path("peer", name))
        return done

    # ---- what is done

    def chain(self, name):
        names = []
        while name:
            names.append(name)
            name = self.images[name].backing
        return names

    def users(self, name):
        return [other for other, image in self.images.items() if image.backing == name]

    def options(self):
        compat = "0.10" if self.chance(0.25) else "1.1"
        cluster_size = self.random.choice(["512", "4k", "32k", "64k", "64k", "2M"])
        options = [f"cluster_size={cluster_size}", f"compat={compat}"]
        if compat == "1.1":
            extra = ["lazy_refcounts=on", f"refcount_bits={self.random.choice([8, 32, 64])}", "compression_type=zstd"]
            if cluster_size in ("32k", "64k", "2M"):
                extra.append("extended_l2=on")
            options += [option for option in extra if self.chance(0.2)]
        return compat, options

    def new_name(self):
        self.made += 1
        return f"image{self.made}"

    def create(self):
        name, (compat, options) = self.new_name(), self.options()
        size, backing, words = self.random.choice(SIZES), None, []
        if self.images and self.chance(0.7):
            backing = self.random.choice(sorted(self.images))
            words = ["-b", backing, "-F", "qcow2"]
            size = self.images[backing].size if self.chance(0.5) else size
        elif self.chance(0.2):
            options.append(f"preallocation={self.random.choice(['metadata', 'falloc', 'full'])}")
        if self.img("create", "-q", "-f", "qcow2", *words, "-o", ",".join(options), name, str(size)):
            self.images[name] = Image(size, backing, compat)

    def write(self, name):
        image, words = self.images[name], []
        for _ in range(self.random.randint(1, 4)):
            unit = self.random.choice([512, 512, 4096, 65536])
            offset = self.random.randrange(max(1, image.size // unit)) * unit
            length = min(image.size - offset, self.random.choice([512, 1024, 1536, 4096, 65536, 3 * 65536, MIB]))
            kinds = [f"write -P {self.random.randrange(256)}", "write -P 0", "write -z", "write -z -u"]
            # What a discard leaves of version 2 on another image isn't said.
            kinds.append("discard" if image.compat != "0.10" or not image.backing else "write -z")
            words += ["-c", f"{self.random.choice([kinds[0], *kinds])} {offset} {length}"]
        self.both("qemu-io", "-d", "unmap", *words, name)

    def commit(self, name):
        below = self.chain(name)[1:]
        if not below or any(len(self.users(other)) > 1 for other in below):
            return
        base, words = self.random.choice([(below[0], []), (below[0], ["-d"]), (None, ["-b"])])
        if base is None:
            base = self.random.choice(below)
            words = ["-b", base]
        if self.img("commit", *words, name):
            self.images[base].size = max(self.images[base].size, self.images[name].size)

    def rebase(self, name):
        others = [other for other in sorted(self.images) if name not in self.chain(other)]
        backing = self.random.choice([*others, ""])
        if self.keep(name, "rebase", "-b", backing, *(["-F", "qcow2"] if backing else [])):
            self.images[name].backing = backing or None

    def convert(self, _):
        if len(self.images) >= MOST_IMAGES:
            return
        source, name, (compat, options) = self.random.choice(sorted(self.images)), self.new_name(), self.options()
        backing, words = None, []
        if self.images[source].backing and self.chance(0.6):
            backing = self.random.choice(self.chain(source)[1:])
            words = ["-B", backing, "-F", "qcow2"]
        for word, likelihood in (("-c", 0.25), ("-W", 0.3), ("-m1", 0.3), (f"-S{self.random.choice(['0', '512', '4k', '64k'])}", 0.25)):
            if self.chance(likelihood):
                words.append(word)
        if self.img("convert", "-O", "qcow2", *words, "-o", ",".join(options), source, name):
            self.images[name] = Image(self.images[source].size, backing, compat)
            self.test.assertFalse(self.differs(f"ours/{source}", f"ours/{name}", "-F", "qcow2"), f"{name} isn't {source}")

    def convert_into(self, name):
        sources = [other for other in sorted(self.images) if name not in self.chain(other) and self.images[other].size <= self.images[name].size]
        if sources:
            source, words = self.random.choice(sources), ["-W"] if self.chance(0.3) else []
            self.img("convert", "-n", "-O", "qcow2", *words, source, name)

    def compare(self, name):
        other = self.random.choice(sorted(self.images))
        self.img("compare", *(["-s"] if self.chance(0.1) else []), name, other)

    def resize(self, name):
        image, size = self.images[name], self.random.choice(SIZES)
        if image.snapshots and image.compat == "0.10":  # refused, by QEMU even if the size is the same
            return
        if self.img("resize", "-q", "--shrink", name, str(size)):
            image.size = size

    def snapshot(self, name):
        image = self.images[name]
        kind = self.random.choice(["-c", "-c", "-a", "-d"]) if image.snapshots else "-c"
        if kind == "-c":
            snapshot = (f"snapshot{len(self.log)}", image.size)
        else:
            snapshot = self.random.choice(image.snapshots)
        if not self.img("snapshot", kind, snapshot[0], name):
            return
        if kind == "-c":
            image.snapshots.append(snapshot)
        elif kind == "-a":
            image.size = snapshot[1]
        else:
            image.snapshots.remove(snapshot)

    def amend(self, name):
        compat = self.random.choice(["0.10", "1.1"])
        if not self.images[name].snapshots and self.keep(name, "amend", "-o", f"compat={compat}"):
            self.images[name].compat = compat

    def remove(self, name):
        if len(self.images) > MOST_IMAGES // 2:
            self.log.append(f"rm {name}")
            del self.images[name]

    def step(self):
        if not self.images or (len(self.images) < MOST_IMAGES and self.chance(0.12)):
            return self.create()
        top = self.random.choice([name for name in sorted(self.images) if not self.users(name)])
        likelihoods = {self.write: 40, self.commit: 6, self.rebase: 12, self.convert: 12, self.convert_into: 4, self.compare: 2, self.resize: 8,
                       self.snapshot: 8, self.amend: 3, self.remove: 3}
        self.random.choices(list(likelihoods), likelihoods.values())[0](top)


class WalkTest(ImageTest):
    place = "/dev/shm"

    def run_tool(self, *command, inside=None, **options):
        if inside:
            command = ("env", "-C", self.path(inside), *command)
        return super().run_tool(*command, **options)

    def test_walks(self):
        walks, first = int(os.environ.get("KVARTZ_WALKS", "3")), int(os.environ.get("KVARTZ_SEED", "1"))
        for seed in range(first, first + walks):
            walk = Walk(self, seed)
            try:
                for _ in range(COMMANDS):
                    walk.step()
                    walk.examine()
            except AssertionError as error:
                raise AssertionError("\n".join([f"seed {seed}:", *walk.log[-15:], str(error)])) from error
            if walks > 3:
                print(f"walk {seed}: {len(walk.log)} commands", file=sys.stderr, flush=True)


if __name__ == "__main__":
    unittest.main()
