"""LUKS, alone and within qcow2, both ways: QEMU's tools and cryptsetup read what we write, and we what they wrote."""

import base64
import ctypes
import ctypes.util
import hashlib
import json
import os
import shutil
import struct
import subprocess
import unittest

from harness import MIB, ImageTest, without

# The peer aborts where a split key isn't whole sectors: with keys of 192 bits.
CIPHERS = ["aes-128", "aes-256", "serpent-128", "serpent-256", "twofish-128", "twofish-256"]
HASHES = ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"]


class LuksTest(ImageTest):
    def setUp(self):
        super().setUp()
        for name, text in (("one", "the first passphrase"), ("two", "zwei"), ("three", "x" * 3000)):
            with open(self.path(name), "w", encoding="ascii") as file:
                file.write(text)

    @property
    def secrets(self):
        return [word for name in ("one", "two", "three") for word in
                ("--object", f"secret,id={name},file={self.path(name)}")]

    @staticmethod
    def luks(name, secret="one"):
        return f"driver=luks,key-secret={secret},file.filename={name}"

    @staticmethod
    def qcow2(name, secret="one"):
        return f"driver=qcow2,encrypt.key-secret={secret},file.filename={name}"

    def read(self, tool, image):
        """What `tool` reads from it."""
        tool("convert", *self.secrets, "--image-opts", "-O", "raw", image, "read.raw")
        with open(self.path("read.raw"), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    def digest(self, name):
        with open(self.path(name), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    def write(self, tool, raw, fmt, name, options):
        options = ",".join(["key-secret=one", "iter-time=10", *options])
        if fmt == "qcow2":
            options = "encrypt.format=luks," + ",".join("encrypt." + option for option in options.split(","))
        tool("convert", *self.secrets, "-f", "raw", "-O", fmt, "-o", options, raw, name)

    def opts_of(self, fmt, name, secret="one"):
        return self.luks(name, secret) if fmt == "luks" else self.qcow2(name, secret)


class BothWaysTest(LuksTest):
    @staticmethod
    def each():
        for cipher in CIPHERS:
            for mode in ("xts", "cbc"):
                yield [f"cipher-alg={cipher}", f"cipher-mode={mode}"]
        for cipher, mode in (("aes-256", "xts"), ("aes-256", "cbc"), ("aes-128", "ctr"), ("twofish-128", "cbc")):
            for iv in ("plain", "essiv,ivgen-hash-alg=sha256"):
                yield [f"cipher-alg={cipher}", f"cipher-mode={mode}", f"ivgen-alg={iv}"]
        yield ["cipher-alg=cast5-128", "cipher-mode=cbc"]

    def test_peer_reads_every_cipher(self):
        raw = self.write_raw("a.raw", 300 * 1024, seed=1)
        for options in self.each():
            self.write(self.ours, raw, "luks", "a.luks", options)
            self.assertEqual(self.read(self.peers, self.luks("a.luks")), self.digest(raw), options)
            self.assertEqual(self.read(self.ours, self.luks("a.luks")), self.digest(raw), options)
        self.same("info", "--output=json", "a.luks")

    def test_peer_reads_every_hash(self):
        raw = self.write_raw("a.raw", 70 * 1024, seed=2)
        for name in HASHES:
            self.write(self.ours, raw, "luks", "a.luks", ["hash-alg=" + name])
            self.assertEqual(self.read(self.peers, self.luks("a.luks")), self.digest(raw), name)
        self.same("info", "a.luks")

    def test_peer_reads_qcow2_of_every_cipher(self):
        raw = self.write_raw("a.raw", 300 * 1024, seed=3)
        for options in list(self.each())[::4]:
            self.write(self.ours, raw, "qcow2", "a.qcow2", options)
            self.assertEqual(self.read(self.peers, self.qcow2("a.qcow2")), self.digest(raw), options)
            self.assertEqual(self.read(self.ours, self.qcow2("a.qcow2")), self.digest(raw), options)
        self.same("info", "--output=json", "a.qcow2")

    def test_we_read_what_the_peer_writes(self):
        raw = self.write_raw("a.raw", 3 * MIB + 512, seed=4)
        for fmt, options in (("luks", []), ("luks", ["cipher-alg=twofish-128", "cipher-mode=cbc", "ivgen-alg=plain"]),
                             ("luks", ["cipher-mode=cbc", "ivgen-alg=essiv", "ivgen-hash-alg=sha256", "hash-alg=sha512"]),
                             ("qcow2", []), ("qcow2", ["cipher-alg=serpent-256"])):
            self.write(self.peers, raw, fmt, "a.img", options)
            self.assertEqual(self.read(self.ours, self.opts_of(fmt, "a.img")), self.digest(raw), options)
            self.same("info", "a.img")

    def test_writes_in_place(self):
        """Over what the peer wrote, with holes, in small pieces and large."""
        for fmt in ("luks", "qcow2"):
            raw = self.write_raw("a.raw", 4 * MIB, seed=5)
            self.write(self.peers, raw, fmt, "a.img", [])
            other = self.write_raw("b.raw", 4 * MIB, seed=6, pieces=40)
            self.ours("convert", *self.secrets, "-n", "--target-image-opts", "-f", "raw", other, self.opts_of(fmt, "a.img"))
            self.assertEqual(self.read(self.peers, self.opts_of(fmt, "a.img")), self.digest(other))


class ImagesTest(LuksTest):
    """What images do besides being read and written."""

    def test_qcow2_of_every_kind(self):
        raw = self.write_raw("a.raw", 2 * MIB + 1024, seed=7, pieces=20)
        for options in ("cluster_size=512", "cluster_size=4k", "cluster_size=2M", "compat=0.10", "extended_l2=on",
                        "preallocation=metadata", "preallocation=falloc", "preallocation=full",
                        "extended_l2=on,preallocation=metadata", "data_file=data", "lazy_refcounts=on"):
            words = f"encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time=10,{options}"
            self.ours("convert", *self.secrets, "-f", "raw", "-O", "qcow2", "-o", words, raw, "a.qcow2")
            self.assertEqual(self.read(self.peers, self.qcow2("a.qcow2")), self.digest(raw), options)
            self.peers("check", *self.secrets, "--image-opts", self.qcow2("a.qcow2"))
            self.ours("check", "a.qcow2")  # which takes no key
            # Nothing of it in clear.
            for name in ("a.qcow2", "data"):
                if os.path.exists(self.path(name)):
                    self.assertFalse(self.shows(raw, name), options)
            self.ours("create", *self.secrets, "-f", "qcow2", "-o", words, "new.qcow2", "1M")
            self.assertEqual(self.read(self.peers, self.qcow2("new.qcow2")), hashlib.sha256(bytes(MIB)).hexdigest(), options)

    def test_data_files_shrink_and_grow(self):
        """Within a cluster: what is new reads as zeros, not as the host's zeros decrypted."""
        raw = self.write_raw("a.raw", 3 * MIB, seed=10)
        options = "encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time=10,data_file=data,cluster_size=2M"
        self.ours("convert", *self.secrets, "-f", "raw", "-O", "qcow2", "-S", "0", "-o", options, raw, "a.qcow2")
        image = self.qcow2("a.qcow2")
        for size in (1451520, 2 * MIB + 512, 5 * MIB, 512, 3 * MIB):
            self.ours("resize", *self.secrets, "--shrink", "--image-opts", image, str(size))
            os.truncate(self.path(raw), size)
            self.assertEqual(self.read(self.ours, image), self.digest(raw), size)
            self.assertEqual(self.read(self.peers, image), self.digest(raw), size)

    def test_info_needs_no_key(self):
        self.write(self.ours, self.write_raw("a.raw", MIB, seed=8), "qcow2", "a.qcow2", [])
        self.ours("snapshot", *self.secrets, "--image-opts", "-c", "s1", self.qcow2("a.qcow2"))
        self.ours("bitmap", *self.secrets, "--image-opts", "--add", self.qcow2("a.qcow2"), "b1")
        self.same("info", "--output=json", "a.qcow2")
        self.assertIn("b1", self.ours("info", "a.qcow2").stdout)

    def shows(self, raw, name):
        with open(self.path(raw), "rb") as file:
            sectors = {data for data in iter(lambda: file.read(512), b"") if data != bytes(512)}
        with open(self.path(name), "rb") as file:
            return any(data in sectors for data in iter(lambda: file.read(512), b""))

    def test_snapshots_resize_and_chains(self):
        raw = self.write_raw("a.raw", 2 * MIB, seed=8)
        self.write(self.ours, raw, "qcow2", "a.qcow2", [])
        image = self.qcow2("a.qcow2")
        self.ours("snapshot", *self.secrets, "--image-opts", "-c", "s1", image)
        other = self.write_raw("b.raw", 2 * MIB, seed=9, pieces=30)
        self.ours("convert", *self.secrets, "-n", "--target-image-opts", "-f", "raw", other, image)
        self.assertEqual(self.read(self.peers, image), self.digest(other))
        self.ours("snapshot", *self.secrets, "--image-opts", "-a", "s1", image)
        self.assertEqual(self.read(self.peers, image), self.digest(raw))
        self.ours("resize", *self.secrets, "--image-opts", image, "3M")
        self.ours("resize", *self.secrets, "--image-opts", "--shrink", image, "1536k")
        os.truncate(self.path(raw), 1536 * 1024)
        self.assertEqual(self.read(self.peers, image), self.digest(raw))
        self.peers("check", *self.secrets, "--image-opts", image)
        # A plain overlay on it, moved to a plain base.
        self.ours("create", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "top.qcow2", "1536k")
        top = "driver=qcow2,file.filename=top.qcow2,backing.encrypt.key-secret=one"
        self.assertEqual(self.read(self.ours, top), self.digest(raw))
        self.ours("rebase", *self.secrets, "--image-opts", "-b", "", top)
        self.assertEqual(self.read(self.peers, "driver=qcow2,file.filename=top.qcow2"), self.digest(raw))

    def test_luks_resizes(self):
        raw = self.write_raw("a.raw", MIB, seed=10)
        self.write(self.ours, raw, "luks", "a.luks", [])
        self.ours("resize", *self.secrets, "--image-opts", self.luks("a.luks"), "2M")
        self.peers("resize", *self.secrets, "--image-opts", "--shrink", self.luks("a.luks"), "1M")
        self.assertEqual(self.read(self.ours, self.luks("a.luks")), self.digest(raw))
        self.ours("resize", *self.secrets, "--image-opts", "--shrink", self.luks("a.luks"), "512k")
        self.assertEqual(os.path.getsize(self.path("a.luks")), 2068480 + 512 * 1024)

    def test_measure_agrees(self):
        """What qemu-img 7.2 says; it measures how fast it derives keys, seconds long, each time."""
        for fmt, options, required, full in (
                ("luks", "key-secret=one", 10739486720, 10739486720),
                ("qcow2", "encrypt.format=luks,encrypt.key-secret=one", 3997696, 10741415936),
                ("qcow2", "encrypt.format=luks,encrypt.key-secret=one,cluster_size=4k", 28356608, 10765774848)):
            said = self.ours("measure", *self.secrets, "-O", fmt, "-o", options, "--size", "10G", "--output=json").stdout
            self.assertEqual(json.loads(said), {"required": required, "fully-allocated": full})

    def test_help_and_words(self):
        for verb in ("create", "amend"):
            self.assertIn("iter-time=<num>", self.ours(verb, "-f", "luks", "-o", "help").stdout)
        peers = self.peers("create", *self.secrets, "-f", "luks", "-o", "key-secret=one,iter-time=10", "a.luks", "1M").stdout
        ours = self.ours("create", *self.secrets, "-f", "luks", "-o", "key-secret=one,iter-time=10", "a.luks", "1M").stdout
        self.assertEqual(sorted(ours.split()), sorted(peers.split()))
        done = self.ours("check", *self.secrets, "--image-opts", self.luks("a.luks"), code=63)
        self.assertIn("does not support checks", done.stderr)

    def test_old_method_is_read(self):
        raw = self.write_raw("a.raw", 2 * MIB + 512, seed=11)
        words = "encrypt.format=aes,encrypt.key-secret=two"
        self.peers("convert", *self.secrets, "-f", "raw", "-O", "qcow2", "-o", words, raw, "a.qcow2")
        self.assertEqual(self.read(self.ours, self.qcow2("a.qcow2", "two")), self.digest(raw))
        self.same("info", "a.qcow2")
        done = self.ours("resize", *self.secrets, "--image-opts", self.qcow2("a.qcow2", "two"), "4M", code=1)
        self.assertIn("convert it", done.stderr)
        done = self.ours("create", *self.secrets, "-f", "qcow2", "-o", words, "b.qcow2", "1M", code=1)
        self.assertIn("encrypt.format=luks", done.stderr)


class KeySlotsTest(LuksTest):
    def opens(self, tool, fmt, secret, code=0):
        tool("convert", *self.secrets, "--image-opts", "-O", "raw", self.opts_of(fmt, "a.img", secret), "out.raw", code=code)

    def amend(self, fmt, options, secret="one", code=0, tool=None, force=False):
        prefix = "" if fmt == "luks" else "encrypt."
        words = ",".join(prefix + option for option in options.split(","))
        return (tool or self.ours)("amend", *(["--force"] if force else []), *self.secrets, "--image-opts", "-o", words,
                                   self.opts_of(fmt, "a.img", secret), code=code)

    def test_slots_come_and_go(self):
        for fmt in ("luks", "qcow2"):
            raw = self.write_raw("a.raw", MIB, seed=20)
            self.write(self.ours, raw, fmt, "a.img", [])
            self.amend(fmt, "state=active,new-secret=two,iter-time=10")
            self.amend(fmt, "state=active,new-secret=three,keyslot=5,iter-time=10", secret="two")
            for secret in ("one", "two", "three"):
                self.opens(self.peers, fmt, secret)
            self.same("info", "a.img")
            self.amend(fmt, "state=inactive,old-secret=one", secret="two")
            self.opens(self.peers, fmt, "one", code=1)
            self.opens(self.ours, fmt, "one", code=1)
            self.amend(fmt, "state=inactive,keyslot=5", secret="two")
            self.opens(self.ours, fmt, "three", code=1)
            self.opens(self.peers, fmt, "two")
            self.assertEqual(self.read(self.ours, self.opts_of(fmt, "a.img", "two")), self.digest(raw))

    def test_refusals(self):
        self.write(self.ours, self.write_raw("a.raw", MIB, seed=21), "luks", "a.img", [])
        before = self.digest("a.img")
        for options, says in (("state=inactive,old-secret=one", "last active"), ("state=inactive,keyslot=0", "last active"),
                              ("state=inactive,keyslot=3", "already erased"), ("state=inactive,old-secret=two", "No keyslots match"),
                              ("state=inactive,keyslot=8", "keyslot=8"), ("state=inactive", "must be given"),
                              ("state=active", "new-secret"), ("state=active,new-secret=nope", "no secret 'nope'"),
                              ("state=active,new-secret=two,keyslot=0", "Refusing to overwrite"),
                              ("state=active,new-secret=two,old-secret=one", "old-secret"), ("state=x", "state=x"),
                              ("state=inactive,keyslot=0,iter-time=5", "iter-time"), ("keyslot=1", "state"),
                              ("state=active,new-secret=two,size=1M", "size")):
            done = self.amend("luks", options, code=1)
            self.assertIn(says, done.stderr)
            self.assertEqual(done.stderr.count("\n"), 1)
        self.assertEqual(self.digest("a.img"), before)
        self.amend("luks", "state=inactive,keyslot=0", force=True)
        self.opens(self.ours, "luks", "one", code=1)
        self.assertIn("no key slot is active", self.amend("luks", "state=active,new-secret=one", code=1).stderr)

    def test_all_slots(self):
        self.write(self.ours, self.write_raw("a.raw", MIB, seed=22), "luks", "a.img", [])
        for _ in range(7):
            self.amend("luks", "state=active,new-secret=two,iter-time=10")
        self.assertIn("all keyslots are in use", self.amend("luks", "state=active,new-secret=three", code=1).stderr)
        self.amend("luks", "state=inactive,old-secret=two")
        info = json.loads(self.peers("info", "--output=json", "a.img").stdout)["format-specific"]["data"]
        self.assertEqual([slot["active"] for slot in info["slots"]], [True] + [False] * 7)

    def test_wrong_and_missing_keys(self):
        for fmt in ("luks", "qcow2"):
            self.write(self.ours, self.write_raw("a.raw", MIB, seed=23), fmt, "a.img", [])
            for image, says in ((self.opts_of(fmt, "a.img", "two"), "wrong passphrase"),
                                (self.opts_of(fmt, "a.img", "nope"), "no secret 'nope'"),
                                (f"driver={fmt},file.filename=a.img", "key-secret' is required")):
                done = self.ours("convert", *self.secrets, "--image-opts", "-O", "raw", image, "out.raw", code=1)
                self.assertIn(says, done.stderr)
                self.assertEqual(done.stderr.count("\n"), 1)
            self.assertIn("key-secret", self.ours("convert", "-O", "raw", "a.img", "out.raw", code=1).stderr)
            self.same("info", "a.img")

    def test_secrets_that_are_encrypted(self):
        if not shutil.which("openssl"):
            self.skipTest("openssl isn't installed")
        key, iv = "41" * 32, "42" * 16
        with open(self.path("cipher"), "wb") as file:
            file.write(self.run_binary(["openssl", "enc", "-aes-256-cbc", "-K", key, "-iv", iv, "-in", self.path("one")]))
        objects = ["--object", f"secret,id=master,format=base64,data={base64.b64encode(base64.b64encode(bytes.fromhex(key))).decode()}",
                   "--object", f"secret,id=one,keyid=master,iv={base64.b64encode(bytes.fromhex(iv)).decode()},file={self.path('cipher')}"]
        self.write(self.ours, self.write_raw("a.raw", MIB, seed=24), "luks", "a.img", [])
        self.ours("convert", *objects, "--image-opts", "-O", "raw", self.luks("a.img"), "out.raw")
        self.run_tool("cmp", "a.raw", "out.raw")
        wrong = [word.replace("iv=Q", "iv=R") for word in objects]
        done = self.ours("convert", *wrong, "--image-opts", "-O", "raw", self.luks("a.img"), "out.raw", code=1)
        self.assertRegex(done.stderr, "decrypted|passphrase")

    @staticmethod
    def run_binary(command):
        return subprocess.run(command, capture_output=True, check=True).stdout


class CryptsetupTest(LuksTest):
    def setUp(self):
        super().setUp()
        if not shutil.which("cryptsetup"):
            self.skipTest("cryptsetup isn't installed")

    def cryptsetup(self, *arguments):
        return self.run_tool("cryptsetup", "-q", *arguments)

    def format(self, name, kind, cipher="aes-xts-plain64", bits=512, size=18 * MIB, more=()):
        with open(self.path(name), "wb") as file:
            file.truncate(size)
        pbkdf = [] if "--pbkdf" in more else ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
        self.cryptsetup("luksFormat", "--type", kind, "-c", cipher, "-s", str(bits), *pbkdf, *more, name, "one")

    def volume_key(self, name):
        if os.path.exists(self.path("key")):
            os.remove(self.path("key"))
        self.cryptsetup("luksDump", "--dump-volume-key", "--volume-key-file", "key", "--key-file", "one", name)
        with open(self.path("key"), "rb") as file:
            return file.read()

    def test_luks1(self):
        for cipher, bits in (("aes-xts-plain64", 256), ("aes-cbc-essiv:sha256", 256), ("aes-cbc-plain", 128)):
            raw = self.write_raw("a.raw", 2 * MIB, seed=30)
            self.format("a.luks", "luks1", cipher, bits, size=8 * MIB)
            target = "driver=raw,size=2M,file.driver=luks,file.key-secret=one,file.file.filename=a.luks"
            self.ours("convert", *self.secrets, "-n", "--target-image-opts", "-f", "raw", raw, target)
            self.assertEqual(self.read(self.peers, target), self.digest(raw), cipher)
            # A key slot of each maker opens for the others.
            self.cryptsetup("luksAddKey", "--pbkdf-force-iterations", "1000", "--key-file", "one", "a.luks", "two")
            self.ours("amend", *self.secrets, "--image-opts", "-o", "state=active,new-secret=three,iter-time=10",
                      self.luks("a.luks", "two"))
            self.cryptsetup("luksOpen", "--test-passphrase", "--key-file", "three", "a.luks")
            self.assertIn("luks", self.same("info", "a.luks").stdout)

    def test_cryptsetup_opens_ours(self):
        raw = self.write_raw("a.raw", MIB, seed=31)
        for options in ([], ["cipher-mode=cbc", "ivgen-alg=essiv"], ["hash-alg=sha512"], ["cipher-alg=aes-192", "cipher-mode=cbc"]):
            self.write(self.ours, raw, "luks", "a.luks", options)
            self.cryptsetup("luksOpen", "--test-passphrase", "--key-file", "one", "a.luks")
            self.run_tool("cryptsetup", "-q", "luksOpen", "--test-passphrase", "--key-file", "two", "a.luks", code=2)

    def test_keys_of_192_bits(self):
        self.format("a.luks", "luks1", "aes-cbc-plain64", 192, size=4 * MIB)
        raw = self.write_raw("a.raw", MIB, seed=34)
        self.ours("convert", *self.secrets, "-n", "--target-image-opts", "-f", "raw", raw, self.luks("a.luks"))
        self.ours("convert", *self.secrets, "--image-opts", "-O", "raw", f"driver=raw,size=1M,{self.nested('a.luks')}", "out.raw")
        self.run_tool("cmp", raw, "out.raw")

    @staticmethod
    def nested(name):
        return f"file.driver=luks,file.key-secret=one,file.file.filename={name}"

    def test_luks2_keys(self):
        """Key slots of every kind."""
        argon = ["--pbkdf-force-iterations", "4", "--pbkdf-memory", "4096", "--pbkdf-parallel", "2"]
        for more in (["--pbkdf", "argon2id", *argon], ["--pbkdf", "argon2i", *argon],
                     ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha512"]):
            self.format("a.luks", "luks2", more=more)
            self.ours("convert", *self.secrets, "--image-opts", "-O", "raw", self.luks("a.luks"), "out.raw")
            done = self.ours("convert", *self.secrets, "--image-opts", "-O", "raw", self.luks("a.luks", "two"), "out.raw", code=1)
            self.assertIn("wrong passphrase", done.stderr)
            self.cryptsetup("luksAddKey", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "one",
                            "a.luks", "two")
            self.ours("convert", *self.secrets, "--image-opts", "-O", "raw", self.luks("a.luks", "two"), "out.raw")
            self.assertIn("version: 2", self.ours("info", "-f", "luks", "a.luks").stdout)
        done = self.ours("amend", *self.secrets, "--image-opts", "-o", "state=active,new-secret=two", self.luks("a.luks"), code=1)
        self.assertIn("not supported yet", done.stderr)

    def test_luks2_payload(self):
        """In sectors of 512 bytes it is that of a LUKS1 volume with the same key."""
        for cipher, bits in (("aes-xts-plain64", 512), ("aes-cbc-essiv:sha256", 256), ("aes-cbc-plain64", 128)):
            self.format("a.luks", "luks2", cipher, bits, size=18 * MIB, more=["--sector-size", "512"])
            self.volume_key("a.luks")
            raw = self.write_raw("a.raw", 2 * MIB, seed=32)
            self.ours("convert", *self.secrets, "-n", "--target-image-opts", "-f", "raw", raw, self.luks("a.luks"))
            self.format("b.luks", "luks1", cipher, bits, size=4 * MIB, more=["--volume-key-file", "key"])
            offset = json.loads(self.peers("info", "--output=json", "b.luks").stdout)["format-specific"]["data"]["payload-offset"]
            with open(self.path("a.luks"), "rb") as a, open(self.path("b.luks"), "r+b") as b:
                a.seek(16 * MIB)
                b.seek(offset)
                b.write(a.read(2 * MIB))
            self.assertEqual(self.read(self.peers, f"driver=raw,size=2M,file.driver=luks,file.key-secret=one,"
                                                   f"file.file.filename=b.luks"), self.digest(raw), cipher)

    def test_luks2_large_sectors(self):
        """Those of 4096 bytes are one unit of XTS each, numbered in units of 512; another library agrees."""
        library = ctypes.util.find_library("crypto")
        if not library:
            self.skipTest("libcrypto isn't installed")
        crypto = ctypes.CDLL(library)
        crypto.EVP_CIPHER_CTX_new.restype = crypto.EVP_aes_256_xts.restype = ctypes.c_void_p
        self.format("a.luks", "luks2", more=["--sector-size", "4096"])
        key = self.volume_key("a.luks")
        raw = self.write_raw("a.raw", 2 * MIB, seed=33, pieces=50)
        self.ours("convert", *self.secrets, "-n", "--target-image-opts", "-f", "raw", raw, self.luks("a.luks"))
        self.assertEqual(self.read(self.ours, self.luks("a.luks")), self.digest(raw))
        with open(self.path("a.luks"), "rb") as file:
            file.seek(16 * MIB)
            payload = file.read(2 * MIB)
        clear = bytearray()
        context = ctypes.c_void_p(crypto.EVP_CIPHER_CTX_new())
        for at in range(0, len(payload), 4096):
            out, length = ctypes.create_string_buffer(4096 + 16), ctypes.c_int()
            crypto.EVP_DecryptInit_ex(context, ctypes.c_void_p(crypto.EVP_aes_256_xts()), None, key,
                                      struct.pack("<QQ", at // 512, 0))
            crypto.EVP_DecryptUpdate(context, out, ctypes.byref(length), payload[at:at + 4096], 4096)
            clear += out.raw[:4096]
        crypto.EVP_CIPHER_CTX_free(context)
        self.assertEqual(hashlib.sha256(clear).hexdigest(), self.digest(raw))

    def test_luks2_second_header(self):
        self.format("a.luks", "luks2")
        self.ours("convert", *self.secrets, "--image-opts", "-O", "raw", self.luks("a.luks"), "out.raw")
        with open(self.path("a.luks"), "r+b") as file:  # the first one's JSON is torn
            file.seek(5000)
            file.write(b"torn")
        self.ours("convert", *self.secrets, "--image-opts", "-O", "raw", self.luks("a.luks"), "out.raw")
        with open(self.path("a.luks"), "r+b") as file:  # the second's, too
            file.seek(16384 + 5000)
            file.write(b"torn")
        done = self.ours("info", "-f", "luks", "a.luks", code=1)
        self.assertIn("checksum is wrong", done.stderr)

    def test_luks2_is_raw_unless_named(self):
        self.format("a.luks", "luks2")
        self.assertEqual(without(self.ours("info", "a.luks").stdout, "disk size.*\n"),
                         without(self.peers("info", "a.luks").stdout, "disk size.*\n"))


class HostileHeaderTest(LuksTest):
    def test_headers_that_lie(self):
        self.write(self.ours, self.write_raw("a.raw", MIB, seed=40), "luks", "a.luks", [])
        with open(self.path("a.luks"), "rb") as file:
            good = file.read()
        slot = 208
        for offset, value, says in ((8, b"rot13\0", "cipher 'rot13'"), (40, b"xts-plane\0", "cipher mode"), (72, b"crc32\0", "hash"),
                                    (8, b"a" * 32, "terminated"), (104, struct.pack(">I", 1), "payload|apart"),
                                    (104, struct.pack(">I", 0xffffffff), "wrong|cut|reach|size|virtual"), (108, struct.pack(">I", 0), "key of 0"),
                                    (108, struct.pack(">I", 0xffffffff), "key of"), (164, struct.pack(">I", 0), "no iterations"),
                                    (slot, b"\1\2\3\4", "neither"), (slot + 4, struct.pack(">I", 0), "no iterations"),
                                    (slot + 4, struct.pack(">I", 0xffffffff), "iterations; 500000000"),
                                    (slot + 40, struct.pack(">I", 0xffffffff), "payload"), (slot + 40, struct.pack(">I", 0), "overlaps"),
                                    (slot + 44, struct.pack(">I", 0xffffffff), "stripes"), (slot + 88, struct.pack(">I", 8), "overlap")):
            with open(self.path("bad.luks"), "wb") as file:
                file.write(good[:offset] + value + good[offset + len(value):])
            done = self.ours("convert", *self.secrets, "--image-opts", "-O", "raw", self.luks("bad.luks"), "out.raw", code=None)
            if offset == 104 and value[0] == 0xff:
                continue  # a payload behind the end is an empty one
            self.assertEqual(done.returncode, 1, says)
            self.assertRegex(done.stderr, says)
            self.assertEqual(done.stderr.count("\n"), 1)

    def test_cut_short(self):
        self.write(self.ours, self.write_raw("a.raw", MIB, seed=41), "luks", "a.luks", [])
        for size in (200000, 4096, 592, 100, 6):
            os.truncate(self.path("a.luks"), size)
            done = self.ours("convert", *self.secrets, "--image-opts", "-O", "raw", self.luks("a.luks"), "out.raw", code=1)
            self.assertRegex(done.stderr, "LUKS")
            self.assertEqual(done.stderr.count("\n"), 1)


if __name__ == "__main__":
    unittest.main()
