"""kvartz img beside qemu-img: the same words, the same codes, and each accepts what the other wrote."""

import json
import os
import signal
import subprocess
import unittest

from harness import MIB, ImageTest, without


class WordsTest(ImageTest):
    def test_mistakes_end_with_the_same_code(self):
        self.peers("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
        for line in """info nope;info;create -f qcow2;create -f foo x 1G;create -f qcow2 x abc;create -f qcow2 -o foo=1 x 1G
                check -r foo a.qcow2;convert a.qcow2;convert -O raw nope x;convert -W;compare a.qcow2;compare a.qcow2 nope
                snapshot -a foo a.qcow2;resize a.qcow2;resize a.qcow2 +x;measure;map nope;foo;info -z x;commit a.qcow2
                rebase a.qcow2;dd if=a.qcow2;dd x=1;bitmap a.qcow2;amend a.qcow2;create -f qcow2 x.qcow2
                create -f qcow2 -b nope y.qcow2;create -f qcow2 -b a.qcow2 y.qcow2;convert -n -O raw a.qcow2 nope
                convert -S x a b;convert -m 20 a b;info --output=xml a.qcow2;check nope;convert -c -O raw a.qcow2 o
                resize a.qcow2 512k;convert -O raw --target-is-zero a.qcow2 o;snapshot -d nope a.qcow2
                bitmap --remove a.qcow2 nope;measure -O vdi a.qcow2;compare -s a.qcow2 a.qcow2;measure -O qcow2 a.qcow2
                convert --salvage -C a.qcow2 o;convert --skip-broken-bitmaps -O qcow2 a.qcow2 o
                convert -c -O qcow2 -o preallocation=full a.qcow2 o;convert -O qcow2 -B nope -F qcow2 a.qcow2 o
                amend -o backing_file=a.qcow2 a.qcow2;amend -o data_file=x a.qcow2;amend -o data_file_raw=on a.qcow2
                resize a.qcow2 -1G;resize --shrink a.qcow2 -1G;resize a.qcow2 -x""".replace("\n", ";").split(";"):
            with self.subTest(line=line.strip()):
                self.same(*line.split())

    def test_formats_of_unseen_backing_files_are_known(self):
        self.assertIn("unknown image format", self.ours("create", "-u", "-f", "qcow2", "-b", "nope", "-F", "foo", "a.qcow2", "1M", code=1).stderr)
        self.assertFalse(os.path.exists(self.path("a.qcow2")))

    def test_errors_as_json(self):
        done = self.ours("--json", "info", "nope", code=1)
        error = json.loads(done.stderr)
        self.assertEqual((error["class"], error["exit-code"]), ("not-found", 1))

    def test_help_tells_of_files_options(self):
        """Once it knows that it will be a file."""
        for named, words in ((False, ("create", "-f", "vdi")), (True, ("create", "-f", "vdi", "x")), (False, ("convert", "-O", "vdi", "a")),
                             (True, ("convert", "-O", "vdi", "a", "x"))):
            for tool in (self.ours, self.peers):
                printed = tool(*words, "-o", "help").stdout
                self.assertEqual(("nocow=" in printed, "Specify the target filename" in printed), (named, not named), words)

    def test_options_of_new_images(self):
        for fmt, options in (("qcow2", "cluster_size=4k,preallocation=metadata,lazy_refcounts=on,nocow=on"),
                             ("qcow2", "encryption=off,compat=0.10,extent_size_hint=0"), ("raw", "nocow=on"),
                             ("vmdk", "toolsversion=10,subformat=twoGbMaxExtentSparse,zeroed_grain=on"),
                             ("vhdx", "block_size=1M,log_size=2M,block_state_zero=on"), ("vdi", "static=off,nocow=off")):
            with self.subTest(fmt=fmt, options=options):
                self.same("create", "-f", fmt, "-o", options, "a.img", "20M")
        self.assertIn("no number", self.ours("create", "-f", "vmdk", "-o", "toolsversion=x", "b.img", "1M", code=1).stderr)
        self.assertIn("encrypt.format=luks", self.ours("create", "-f", "qcow2", "-o", "encryption=on", "b.img", "1M", code=1).stderr)

    def test_output_that_nobody_takes(self):
        self.ours("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
        for number in range(30):  # more than is printed at once
            self.ours("snapshot", "-c", f"snapshot{number}", "a.qcow2")

        def code(redirection):
            done = self.run_tool("bash", "-c", f"{self.path('.bin', 'qemu-img')} info --output=json a.qcow2 {redirection}", code=None)
            self.assertNotIn("terminate", done.stderr)
            return done.returncode

        self.assertEqual(code("| true; exit ${PIPESTATUS[0]}"), 0)
        self.assertEqual(code("> /dev/full"), 1)
        self.assertEqual(code(">&-"), 0)
        # What is printed doesn't land in the image.
        self.run_tool("bash", "-c", f"{self.path('.bin', 'qemu-img')} create -f raw a.raw 1M >&-")
        with open(self.path("a.raw"), "rb") as file:
            self.assertEqual(file.read(), bytes(MIB))
        self.run_tool("bash", "-c", f"{self.path('.bin', 'qemu-img')} info nope 2>&-", code=1)

    def test_raw(self):
        self.write_raw("a.raw", 10 * MIB, seed=1)
        self.write_raw("b.raw", 9 * MIB, seed=2)
        for line in ("info a.raw", "info --output=json a.raw", "map a.raw", "map --output=json a.raw", "check a.raw",
                     "map --output=json -f raw --start-offset=1M --max-length=64k a.raw", "measure -O raw a.raw",
                     "measure --output=json a.raw", "snapshot -l a.raw", "compare a.raw b.raw", "compare -s a.raw b.raw",
                     "compare -p a.raw a.raw", "create -f raw new.raw 5G", "resize -f raw new.raw +1M",
                     "resize -f raw --shrink new.raw 1M", "resize -f raw new.raw -1k", "resize -f raw -q new.raw 3M"):
            with self.subTest(line=line):
                self.same(*line.split())

    def test_progress_by_signal(self):
        self.write_raw("a.raw", 64 * MIB, seed=1)
        process = subprocess.Popen([self.path(".bin", "qemu-img"), "convert", "-r", "20M", "-S", "0", "a.raw", "b.raw"],
                                   cwd=self.directory, stderr=subprocess.PIPE, text=True)
        # The target is there once it runs, and its handler with it.
        while not os.path.exists(self.path("b.raw")) and process.poll() is None:
            pass
        while os.path.getsize(self.path("b.raw")) == 0 and process.poll() is None:
            pass
        lines = b""
        os.set_blocking(process.stderr.fileno(), False)
        while not lines and process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            try:
                lines = os.read(process.stderr.fileno(), 100)
            except BlockingIOError:
                pass
        process.kill()
        process.wait()
        process.stderr.close()
        self.assertRegex(lines.decode(), r"^    \([0-9.]+/100%\)\n")


class Qcow2Test(ImageTest):
    def test_preallocated_overlays_show_their_base(self):
        """With subclusters: a cluster has its place, and still nothing of its own."""
        self.write_raw("base.raw", MIB + 512, seed=3)
        for preallocation in ("metadata", "falloc", "full"):
            words = ("-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o", f"extended_l2=on,preallocation={preallocation}")
            for maker in (self.ours, self.peers):
                maker("create", "-q", *words, "a.qcow2", str(MIB + 512))
                self.same("map", "--output=json", "a.qcow2")
                self.run_tool(self.path(".bin", "qemu-io"), "-f", "qcow2", "-c", "write -P 7 70k 512", "-c", "write -z 300k 100k", "a.qcow2")
                self.run_tool("cp", "base.raw", "wanted.raw")
                self.peer_io("wanted.raw", "write -P 7 70k 512", "write -z 300k 100k", fmt="raw")
                self.peers("compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "wanted.raw")
                self.ours("compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "wanted.raw")
                self.peers("check", "a.qcow2")
        self.same("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o", "preallocation=metadata", "b.qcow2")

    def chain(self):
        self.peers("create", "-q", "-f", "qcow2", "base.qcow2", "20M")
        self.peer_io("base.qcow2", "write -P 1 0 1M", "write -P 2 5M 300k", "write -P 3 12M 64k")
        self.peers("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2")
        self.peer_io("mid.qcow2", "write -P 4 512k 1M", "write -z 5M 128k")
        self.peers("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "24M")
        self.peer_io("top.qcow2", "write -P 5 12M 64k", "write -P 6 23M 128k")

    def test_words(self):
        self.chain()
        self.peers("snapshot", "-c", "first", "top.qcow2")
        self.peers("bitmap", "--add", "top.qcow2", "bitmap0")
        for line in ("info top.qcow2", "info --output=json top.qcow2", "info --backing-chain top.qcow2",
                     "info --backing-chain --output=json top.qcow2", "check top.qcow2", "check --output=json top.qcow2",
                     "map top.qcow2", "map --output=json top.qcow2", "map -s 1M -l 5M top.qcow2", "snapshot -l top.qcow2", "measure -O qcow2 top.qcow2",
                     "measure -O qcow2 --output=json top.qcow2", "measure -O qcow2 --size 1G", "measure top.qcow2",
                     "measure -O qcow2 -o cluster_size=4k,preallocation=metadata --size 7G --output=json",
                     "create -f qcow2 new.qcow2 1G", "create -f qcow2 -b base.qcow2 -F qcow2 new2.qcow2",
                     "create -f qcow2 -o cluster_size=2M,lazy_refcounts=on,compat=1.1 new3.qcow2 1G", "compare top.qcow2 mid.qcow2",
                     "create -f qcow2 -q new4.qcow2 3M"):
            with self.subTest(line=line):
                self.same(*line.split())

    def test_convert_both_ways(self):
        raw = self.write_raw("a.raw", 9 * MIB + 512, seed=7)
        for options in ((), ("-c",), ("-o", "cluster_size=4k"), ("-c", "-o", "compression_type=zstd"), ("-W",), ("-m", "1"),
                        ("-S", "0"), ("-S", "64k"), ("-o", "compat=0.10"), ("-o", "extended_l2=on"), ("-o", "preallocation=metadata"),
                        ("-c", "-W", "-m", "16")):
            with self.subTest(options=options):
                self.ours("convert", "-f", "raw", "-O", "qcow2", *options, raw, "a.qcow2")
                self.peers("check", "a.qcow2")
                self.identical(raw, "a.qcow2", "-f", "raw")
                self.peers("convert", "-f", "raw", "-O", "qcow2", *[o for o in options if o != "-W"], raw, "b.qcow2")
                self.ours("convert", "-O", "raw", "b.qcow2", "b.raw")
                self.identical(raw, "b.raw", "-f", "raw", "-F", "raw")

    def test_convert_parts_and_targets(self):
        self.chain()
        self.ours("convert", "-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2", "top.qcow2", "flat.qcow2")
        self.identical("top.qcow2", "flat.qcow2")
        self.assertEqual(self.info("flat.qcow2")["backing-filename"], "mid.qcow2")
        self.ours("convert", "-O", "qcow2", "base.qcow2", "mid.qcow2", "joined.qcow2")
        self.peers("convert", "-O", "raw", "base.qcow2", "mid.qcow2", "joined.raw")
        self.identical("joined.qcow2", "joined.raw")
        self.peers("snapshot", "-c", "old", "base.qcow2")
        self.peer_io("base.qcow2", "write -P 9 0 2M")
        self.ours("convert", "-l", "snapshot.name=old", "-O", "raw", "base.qcow2", "ours.raw")
        self.peers("convert", "-l", "old", "-O", "raw", "base.qcow2", "peer.raw")
        self.identical("ours.raw", "peer.raw")
        self.write_raw("dirty.raw", 24 * MIB, seed=9, pieces=40)
        self.ours("convert", "-n", "-O", "raw", "top.qcow2", "dirty.raw")
        self.identical("top.qcow2", "dirty.raw")

    def test_convert_onto_a_backing_file(self):
        """What is zeros above it mustn't show it."""
        self.peers("create", "-q", "-f", "qcow2", "base.qcow2", "5M")
        self.peer_io("base.qcow2", "write -P 7 0 5M")
        self.peers("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "7M")
        self.peer_io("top.qcow2", "write -z 0 64k", "write -P 0 128k 64k", "write -P 9 256k 64k", "write -P 9 3M 4k", "write -z 3500k 7k",
                     "write -P 5 6M 1k")
        for options in ((), ("-o", "cluster_size=2M"), ("-o", "compat=0.10"), ("-o", "extended_l2=on"), ("-o", "cluster_size=512"),
                        ("-S", "0"), ("-W",), ("-c",)):
            with self.subTest(options=options):
                self.ours("convert", "-O", "qcow2", *options, "-B", "base.qcow2", "-F", "qcow2", "top.qcow2", "copy.qcow2")
                self.peers("check", "copy.qcow2")
                self.identical("top.qcow2", "copy.qcow2")
        # A backing file that the user names is no stranger.
        self.ours("--untrusted", "convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "base.qcow2", "copy.qcow2")

    def test_rebase_of_what_stood_alone(self):
        self.peers("create", "-q", "-f", "qcow2", "base.qcow2", "5M")
        self.peer_io("base.qcow2", "write -P 7 0 5M")
        for compat in ("1.1", "0.10"):
            self.ours("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", "a.qcow2", "7M")
            self.run_tool(self.path(".bin", "qemu-io"), "-c", "write -P 9 256k 64k", "-c", "discard 256k 64k", "-c", "write -z 1M 1M", "a.qcow2")
            self.peers("convert", "-O", "raw", "a.qcow2", "a.raw")
            self.ours("rebase", "-b", "base.qcow2", "-F", "qcow2", "a.qcow2")
            self.identical("a.qcow2", "a.raw", "-F", "raw")
            self.peers("check", "a.qcow2")

    def test_copying_by_the_host(self):
        raw = self.write_raw("a.raw", 24 * MIB, seed=31, pieces=40)
        self.peers("convert", "-f", "raw", "-O", "qcow2", raw, "a.qcow2")
        self.peers("create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "top.qcow2")
        for source, out in ((raw, "raw"), ("a.qcow2", "raw"), ("top.qcow2", "raw"), (raw, "qcow2")):
            self.ours("convert", "-C", "-O", out, source, "out.img")
            self.identical("a.raw", "out.img", "-f", "raw", "-F", out)
        for words in (["-c"], ["-S", "4k"]):
            self.assertIn("Cannot enable copy offloading", self.ours("convert", "-C", *words, "-O", "qcow2", raw, "out.img", code=1).stderr)

    def test_bitmaps_are_copied(self):
        self.chain()
        self.peers("bitmap", "--add", "-g", "32k", "top.qcow2", "b0")
        self.peer_io("top.qcow2", "write -P 7 1M 200k")
        self.ours("convert", "--bitmaps", "-O", "qcow2", "top.qcow2", "copy.qcow2")
        ours = self.info("copy.qcow2")["format-specific"]["data"]["bitmaps"]
        self.assertEqual(ours, [{"flags": ["auto"], "name": "b0", "granularity": 32768}])

    def test_commit(self):
        for options in ((), ("-d",), ("-b", "base.qcow2")):
            with self.subTest(options=options):
                self.chain()
                self.peers("convert", "-O", "raw", "top.qcow2", "want.raw")
                self.assertEqual(self.ours("commit", *options, "top.qcow2").stdout, "Image committed.\n")
                self.identical("top.qcow2", "want.raw")
                into = "base.qcow2" if "-b" in options else "mid.qcow2"
                self.identical(into, "want.raw")
                for image in ("base.qcow2", "mid.qcow2", "top.qcow2"):
                    self.peers("check", image)

    def test_rebase(self):
        for new, unsafe in (("base.qcow2", False), ("", False), ("other.qcow2", False), ("mid.qcow2", True)):
            with self.subTest(new=new):
                self.chain()
                self.peers("create", "-q", "-f", "qcow2", "other.qcow2", "10M")
                self.peer_io("other.qcow2", "write -P 4 0 3M")
                self.peers("convert", "-O", "raw", "top.qcow2", "want.raw")
                self.ours("rebase", *(["-u"] if unsafe else []), "-b", new, *(["-F", "qcow2"] if new else []), "top.qcow2")
                self.assertEqual(self.info("top.qcow2").get("backing-filename", ""), new)
                self.identical("top.qcow2", "want.raw")
                self.peers("check", "top.qcow2")

    def test_snapshots(self):
        self.chain()
        self.peers("convert", "-O", "raw", "base.qcow2", "want.raw")
        self.ours("snapshot", "-c", "s1", "base.qcow2")
        self.peer_io("base.qcow2", "write -P 9 0 8M")
        self.peers("check", "base.qcow2")
        self.same("snapshot", "-l", "base.qcow2")
        self.ours("snapshot", "-a", "s1", "base.qcow2")
        self.identical("base.qcow2", "want.raw")
        self.ours("snapshot", "-d", "s1", "base.qcow2")
        self.assertEqual(self.peers("snapshot", "-l", "base.qcow2").stdout, "")
        self.peers("check", "base.qcow2")

    def test_resize_check_amend_bitmap(self):
        self.chain()
        self.assertEqual(self.ours("resize", "base.qcow2", "+4M").stdout, "Image resized.\n")
        self.assertEqual(self.info("base.qcow2")["virtual-size"], 24 * MIB)
        self.same("resize", "base.qcow2", "-4M")  # not without --shrink
        self.ours("resize", "base.qcow2", "--shrink", "-4M")
        self.assertEqual(self.info("base.qcow2")["virtual-size"], 20 * MIB)
        self.ours("resize", "--shrink", "base.qcow2", "6M")
        self.peers("check", "base.qcow2")
        self.ours("bitmap", "--add", "base.qcow2", "one")
        self.ours("bitmap", "--disable", "--clear", "base.qcow2", "one")
        self.assertEqual(self.info("base.qcow2")["format-specific"]["data"]["bitmaps"][0]["flags"], [])
        self.ours("bitmap", "--add", "mid.qcow2", "two")
        self.ours("bitmap", "--merge=two", "--source-file=mid.qcow2", "--source-format=qcow2", "base.qcow2", "one")
        self.ours("bitmap", "--remove", "base.qcow2", "one")
        self.peers("check", "base.qcow2")
        self.same("measure", "-O", "qcow2", "base.qcow2")
        self.ours("amend", "-o", "compat=0.10", "base.qcow2")
        self.assertEqual(self.info("base.qcow2")["format-specific"]["data"]["compat"], "0.10")
        self.peers("check", "base.qcow2")

    def test_data_files_are_renamed(self):
        self.ours("create", "-q", "-f", "qcow2", "-o", "data_file=a.data,data_file_raw=on", "a.qcow2", "1M")
        os.rename(self.path("a.data"), self.path("b.data"))
        where = "driver=qcow2,file.filename=a.qcow2,data-file.filename=b.data"
        self.ours("amend", "--image-opts", "-o", "data_file=b.data,data_file_raw=off", where)
        data = self.info("a.qcow2")["format-specific"]["data"]
        self.assertEqual((data["data-file"], data["data-file-raw"]), ("b.data", False))
        self.peers("check", "a.qcow2")

    def test_check_repairs(self):
        self.peers("create", "-q", "-f", "qcow2", "a.qcow2", "8M")
        self.peer_io("a.qcow2", "write -P 1 0 1M")
        with open(self.path("a.qcow2"), "r+b") as file:
            file.seek(0, os.SEEK_END)
            end = file.tell()
            file.truncate(end + 65536)
            file.seek(2 * 65536)  # the first refcount block: one cluster more than is used
            counts = bytearray(file.read(2 * (end // 65536 + 1)))
            counts[-1] = 1
            file.seek(2 * 65536)
            file.write(counts)
        words = [without(tool("check", "a.qcow2", code=3).stdout, r"Image end offset: \d+") for tool in (self.ours, self.peers)]
        self.assertEqual(*words)
        done = self.ours("check", "-r", "leaks", "a.qcow2")
        self.assertIn("The following inconsistencies were found and repaired:\n\n    1 leaked clusters\n    0 corruptions", done.stdout)
        self.peers("check", "a.qcow2")

    def test_image_opts_and_json_names(self):
        self.chain()
        self.same("info", "--image-opts", "driver=qcow2,file.filename=top.qcow2")
        self.same("info", "file:top.qcow2")
        name = 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "top.qcow2"}}'
        self.same("info", "--output=json", name)
        self.ours("compare", name, "top.qcow2")
        self.ours("compare", "--image-opts", "driver=qcow2,file.filename=top.qcow2",
                  "driver=raw,offset=0,file.driver=qcow2,file.file.filename=top.qcow2", code=None)

    def test_locks_and_force_share(self):
        self.chain()
        holder = subprocess.Popen(["qemu-io", "top.qcow2"], cwd=self.directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        holder.stdin.write("read 0 512\n")
        holder.stdin.flush()
        holder.stdout.readline()
        try:
            self.assertRegex(self.ours("convert", "-O", "raw", "top.qcow2", "x.raw", code=1).stderr, "use|lock")
            self.ours("info", "-U", "top.qcow2")
        finally:
            holder.communicate()

    def test_dd(self):
        self.chain()
        for words in (("bs=1M", "count=3"), ("bs=64k", "skip=3", "count=50"), ("bs=512",), ("bs=1M", "skip=30")):
            self.ours("dd", "-O", "raw", *words, "if=base.qcow2", "of=ours.raw")
            self.peers("dd", "-O", "raw", *words, "if=base.qcow2", "of=peer.raw")
            with open(self.path("ours.raw"), "rb") as a, open(self.path("peer.raw"), "rb") as b:
                self.assertEqual(a.read(), b.read(), words)


if __name__ == "__main__":
    unittest.main()
