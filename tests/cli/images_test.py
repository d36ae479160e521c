"""Images of many kinds, each made by one of the two programs and examined by both.

  KVARTZ_IMAGES   how many (default: a slice)      KVARTZ_SEED   the first one's seed
"""

import json
import os
import random
import sys
import unittest

from harness import MIB, ImageTest

GIB, TIB = 1 << 30, 1 << 40
QCOW2_OPTIONS = ("compat=0.10", "compat=1.1", "lazy_refcounts=on", "extended_l2=on", "compression_type=zstd", "preallocation=metadata",
                 "preallocation=falloc", "preallocation=full")
OTHERS = {"raw": ([], ["preallocation=falloc"]), "vdi": ([], ["static=on"]),
          "vpc": (["force_size=on"], ["force_size=on", "subformat=fixed"]), "vhdx": ([], ["subformat=fixed"], ["block_size=2M"]),
          "vmdk": ([], ["subformat=monolithicFlat"], ["adapter_type=lsilogic"], ["subformat=twoGbMaxExtentFlat"],
                   ["subformat=twoGbMaxExtentSparse"]),
          "luks": (["key-secret=k", "iter-time=10"], ["key-secret=k", "iter-time=10", "cipher-alg=twofish-256", "hash-alg=sha512"])}
KEY = ["--object", "secret,id=k,data=generated"]
# What a format can't have larger; flat and fixed images are files of that size, and the peer reads all of a VHDX to compare it.
LARGEST = {"vpc": 2000 * GIB, "vmdk": 2 * TIB, "vdi": 8 * TIB, "vhdx": 256 * GIB, "raw": 8 * TIB}


class Recipe:
    """What an image is to be, from a seed."""

    def __init__(self, seed):
        self.generator = generator = random.Random(seed)
        self.seed = seed
        self.maker, self.examiner = ("ours", "peer") if seed % 2 else ("peer", "ours")
        self.format = "qcow2" if generator.random() < 0.7 else generator.choice(sorted(OTHERS))
        self.options, self.secrets = [], []  # secrets: what options have of them
        self.size = generator.choice([0, 512, 65536, MIB + 512, generator.randrange(64 * MIB) // 512 * 512, 4 * GIB, TIB, 16 * TIB, 64 * TIB])
        if self.format == "qcow2":
            self.choose_qcow2()
        else:
            self.options = list(generator.choice(OTHERS[self.format]))
            whole = self.format == "luks" or any(word in " ".join(self.options) for word in ("static", "fixed", "Flat", "falloc"))
            self.secrets = self.options if self.format == "luks" else []
            self.size = min(self.size, 32 * MIB if whole else LARGEST[self.format])
            self.size = max(self.size, MIB) // MIB * MIB if self.format in ("vhdx", "vpc") else max(self.size, 512)
        self.backing = None
        self.unit = getattr(self, "cluster_size", 65536)
        self.touched = set()

    def choose_qcow2(self):
        generator = self.generator
        self.cluster_size = generator.choice([512, 4096, 65536, 65536, 65536, 2 * MIB])
        self.options = [f"cluster_size={self.cluster_size}"]
        extra = generator.choice(QCOW2_OPTIONS)
        if extra == "extended_l2=on":
            self.cluster_size = max(self.cluster_size, 16384)
            self.options = [f"cluster_size={self.cluster_size}"]
        self.options.append(extra)
        # What is preallocated reads as anything when it is encrypted.
        if extra != "compat=0.10" and "preallocation" not in extra and generator.random() < 0.4:
            self.options.append(f"refcount_bits={generator.choice([1, 2, 8, 16, 32, 64])}")
        # An L1 table has at most 32 MiB; and what is preallocated takes time.
        entry = 16 if extra == "extended_l2=on" else 8
        self.most = (4 << 20) * self.cluster_size * (self.cluster_size // entry)
        self.size = min(self.size, self.most)
        if "preallocation" in extra:
            self.size = min(self.size, 32 * MIB)
        # What is preallocated reads as anything when it is encrypted.
        if extra != "compat=0.10" and "preallocation" not in extra and generator.random() < 0.2:
            self.secrets = ["encrypt.format=luks", "encrypt.key-secret=k", "encrypt.iter-time=10"]
            self.options += self.secrets
        self.small_refcounts = any(option in ("refcount_bits=1", "refcount_bits=2") for option in self.options)

    def has(self, offset, length):
        return "prealloc" in str(self.options) or any(at in self.touched for at in range(offset // self.unit, (offset + length) // self.unit))

    def words(self):
        return [*(KEY if self.secrets else []), *(["-o", ",".join(self.options)] if self.options else [])]

    def copy_words(self):
        return ["-o", ",".join(self.secrets)] if self.secrets else []

    def image(self, name, flag=True):
        """As words for a tool, which knows the flag -f."""
        if not self.secrets:
            return ["-f", self.format, name] if flag else [name]
        secret = "key-secret" if self.format == "luks" else "encrypt.key-secret"
        return [*KEY, "json:" + json.dumps({"driver": self.format, secret: "k", "file": {"driver": "file", "filename": name}})]

    def __str__(self):
        return f"seed {self.seed}: {self.format} of {self.size} by {self.maker}, {','.join(self.options)}"


class ImagesTest(ImageTest):
    maxDiff = None
    patience_s = 900
    place = "/dev/shm"  # files of 64 TiB, which ext4 hasn't

    def tool(self, who, *words, **options):
        return (self.ours if who == "ours" else self.peers)(*words, **options)

    def io(self, who, image, commands):
        program = self.path(".bin", "qemu-io") if who == "ours" else "qemu-io"
        words = [word for command in commands for word in ("-c", command)]
        done = self.run_tool(program, *words, *image)
        self.assertNotIn("failed", done.stdout + done.stderr)

    def write(self, recipe, name, reference):
        """The same random writes to the image and to a sparse file beside it."""
        generator, size = recipe.generator, recipe.size
        if size == 0:
            return
        commands, raw = [], []
        for _ in range(generator.randrange(1, 12)):
            length = min(size, generator.choice([512, 4096, 70000, 300000]) // 512 * 512)
            offset = generator.choice([0, size - length, generator.randrange(size - length + 1)]) // 512 * 512
            kind = generator.randrange(8)
            value = generator.randrange(1, 256)
            # Seen: QEMU 7.2 packs clusters of an image with subclusters, and the next write ends with an I/O error.
            compressed = (recipe.format == "qcow2" and kind == 7 and not recipe.secrets and
                          not (recipe.maker == "peer" and "extended_l2=on" in recipe.options))
            if compressed:
                length = recipe.cluster_size
                offset = offset // length * length
                # The peer packs only what isn't there yet.
                if offset + length > size or recipe.has(offset, length):
                    continue
            recipe.touched.update(range(offset // recipe.unit, (offset + length - 1) // recipe.unit + 1))
            if kind == 6:
                commands.append(f"write -z -u {offset} {length}")
                raw.append(f"write -z {offset} {length}")
            else:
                commands.append(f"write {'-c ' if compressed else ''}-P {value} {offset} {length}")
                raw.append(f"write -P {value} {offset} {length}")
        if commands:
            self.io(recipe.maker, recipe.image(name), commands)
            self.io("peer", ["-f", "raw", reference], raw)

    def add_backing(self, recipe):
        """One to three layers below."""
        generator = recipe.generator
        below, fmt = "base.raw", "raw"
        with open(self.path(below), "wb") as file:
            file.truncate(max(512, min(recipe.size, 16 * MIB)))
        self.io("peer", ["-f", "raw", below], ["write -P 9 0 512", f"write -P 8 {max(0, os.path.getsize(self.path(below)) // 2 // 512 * 512)} 512"])
        for layer in range(generator.randrange(3)):
            self.tool(recipe.maker, "create", "-q", "-f", "qcow2", "-b", below, "-F", fmt, f"layer{layer}.qcow2")
            below, fmt = f"layer{layer}.qcow2", "qcow2"
            self.io(recipe.maker, ["-f", "qcow2", below], [f"write -P {layer + 1} 0 512"])
        recipe.backing = (below, fmt)
        self.peers("convert", "-O", "raw", "-f", fmt, below, "ref.raw")
        os.truncate(self.path("ref.raw"), recipe.size)
        return ["-b", below, "-F", fmt]

    def make(self, recipe):
        """The image, its contents in ref.raw; answers what is in its snapshots."""
        generator, qcow2 = recipe.generator, recipe.format == "qcow2"
        with open(self.path("ref.raw"), "wb") as file:
            file.truncate(recipe.size)
        prealloc = any("prealloc" in option for option in recipe.options)
        backing = self.add_backing(recipe) if qcow2 and not prealloc and generator.random() < 0.35 else []
        self.tool(recipe.maker, "create", "-q", "-f", recipe.format, *recipe.words(), *backing, "a.img", str(recipe.size))
        if recipe.format == "luks":  # or what wasn't written reads as anything
            self.io(recipe.maker, recipe.image("a.img"), [f"write -P 0 0 {recipe.size}"])
        version3 = qcow2 and "compat=0.10" not in recipe.options
        if version3 and generator.random() < 0.4 and recipe.size > 0:
            for bitmap in range(generator.randrange(1, 4)):
                self.tool(recipe.maker, "bitmap", "--add", "-g", str(65536 << bitmap), *recipe.image("a.img"), f"bitmap{bitmap}")
        self.write(recipe, "a.img", "ref.raw")
        snapshots = {}
        if qcow2 and not recipe.small_refcounts and generator.random() < 0.4:
            for snapshot in range(generator.randrange(1, 3)):
                self.tool(recipe.maker, "snapshot", "-c", f"snapshot{snapshot}", *recipe.image("a.img", flag=False))
                if recipe.size <= 64 * MIB:
                    self.run_tool("cp", "--sparse=always", "ref.raw", f"snapshot{snapshot}.raw")
                    snapshots[f"snapshot{snapshot}"] = f"snapshot{snapshot}.raw"
                self.write(recipe, "a.img", "ref.raw")
        elif qcow2 and generator.random() < 0.3 and 0 < recipe.size < min(16 * TIB, recipe.most - 3 * MIB):
            self.tool(recipe.maker, "resize", "-q", *recipe.image("a.img"), str(recipe.size + 3 * MIB))
            os.truncate(self.path("ref.raw"), recipe.size + 3 * MIB)
            recipe.size += 3 * MIB
            self.write(recipe, "a.img", "ref.raw")
        return snapshots

    def examine(self, recipe, snapshots):
        checkable = recipe.format in ("qcow2", "vdi", "vhdx", "vmdk")
        for who in ("peer", "ours"):
            if checkable:
                self.tool(who, "check", "-q", *recipe.image("a.img"))
            self.tool(who, "compare", "-q", "-F", "raw", *recipe.image("a.img"), "ref.raw")
            for name, raw in snapshots.items():
                self.tool(who, "convert", "-l", name, "-O", "raw", *recipe.image("a.img"), "shown.raw")
                self.run_tool("cmp", "shown.raw", raw)
        self.ours("verify", "-q", *recipe.image("a.img"), code=0 if checkable else None)
        infos = [json.loads(self.tool(who, "info", "-f", recipe.format, "--output=json", "a.img").stdout) for who in ("peer", "ours")]
        for key in ("virtual-size", "cluster-size", "format", "backing-filename", "snapshots"):
            self.assertEqual(infos[0].get(key), infos[1].get(key), key)
        data = [info.get("format-specific", {}).get("data", {}) for info in infos]
        if recipe.format == "qcow2":
            self.assertEqual(*data)
        # What the other one makes of it, written by itself.
        if recipe.size <= 64 * MIB:
            compress = ["-c"] if recipe.format == "qcow2" and not recipe.secrets and recipe.generator.random() < 0.5 else []
            self.tool(recipe.examiner, "convert", *compress, "-O", recipe.format, *recipe.copy_words(), *recipe.image("a.img"),
                      "copy.img")
            if checkable:
                self.tool(recipe.maker, "check", "-q", *recipe.image("copy.img"))
            self.tool(recipe.maker, "compare", "-q", "-F", "raw", *recipe.image("copy.img"), "ref.raw")

    def test_images(self):
        count, seed = int(os.environ.get("KVARTZ_IMAGES", "10")), int(os.environ.get("KVARTZ_SEED", "1"))
        kinds = {}
        for number in range(seed, seed + count):
            recipe = Recipe(number)
            good = False
            with self.subTest(recipe=str(recipe)):
                snapshots = self.make(recipe)
                self.examine(recipe, snapshots)
                good = True
                kinds[(recipe.format, recipe.maker)] = kinds.get((recipe.format, recipe.maker), 0) + 1
            if not good:
                print(f"not good: {recipe}", file=sys.stderr, flush=True)
            for name in os.listdir(self.directory):
                if name != ".bin":
                    os.remove(self.path(name))
        if count >= 100:
            print(f"{sum(kinds.values())} of {count} images are good: {kinds}", file=sys.stderr)


if __name__ == "__main__":
    unittest.main()
