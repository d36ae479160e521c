"""The NBD server beside public clients, and the client beside public servers."""

import json
import os
import select
import shutil
import socket
import struct
import subprocess
import unittest

from harness import MIB, ImageTest


class NbdServer(ImageTest):
    def serve(self, *arguments, program=None):
        """Starts a server in the background; answers the name of its export."""
        self.run_tool(program or self.path(".bin", "qemu-nbd"), "--fork", "--pid-file", self.path("pid"), "-t", "-e", "8",
                      "-k", self.path("socket"), *arguments)
        self.addCleanup(self.stop)
        return f"nbd+unix:///?socket={self.path('socket')}"

    def stop(self):
        if not os.path.exists(self.path("pid")):
            return
        with open(self.path("pid"), encoding="ascii") as file:
            pid = int(file.read())
        os.remove(self.path("pid"))
        # It is nobody's child any more: what it holds open tells when it has gone.
        descriptor = os.pidfd_open(pid)
        os.kill(pid, 15)
        select.select([descriptor], [], [], 30)
        os.close(descriptor)

    def connect(self):
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(20)
        peer.connect(self.path("socket"))
        self.addCleanup(peer.close)
        return peer


class NbdTest(NbdServer):
    def chain(self):
        self.peers("create", "-q", "-f", "qcow2", "base.qcow2", "64M")
        self.peer_io("base.qcow2", "write -P 3 1M 5M", "write -z 8M 1M")
        self.peers("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
        self.peers("bitmap", "--add", "top.qcow2", "b0")
        self.peer_io("top.qcow2", "write -P 4 20M 2M")
        self.peers("convert", "-O", "raw", "top.qcow2", "want.raw")

    def same_bytes(self, a, b):
        self.run_tool("cmp", a, b)

    def test_clients_read_all(self):
        self.chain()
        uri = self.serve("-r", "top.qcow2")
        self.peers("convert", "-O", "raw", uri, "peer.raw")
        self.same_bytes("peer.raw", "want.raw")
        self.ours("convert", "-O", "raw", uri, "ours.raw")
        self.same_bytes("ours.raw", "want.raw")
        if shutil.which("nbdcopy"):
            self.run_tool("nbdcopy", uri, "nbdcopy.raw")
            self.same_bytes("nbdcopy.raw", "want.raw")
        self.ours("compare", uri, "want.raw")

    def test_clients_write(self):
        raw = self.write_raw("a.raw", 32 * MIB, seed=4, pieces=60)
        for writer in ("peer", "ours", "nbdcopy"):
            if writer == "nbdcopy" and not shutil.which("nbdcopy"):
                continue
            with self.subTest(writer=writer):
                self.peers("create", "-q", "-f", "qcow2", "t.qcow2", "32M")
                uri = self.serve("--discard=unmap", "t.qcow2")
                if writer == "nbdcopy":
                    self.run_tool("nbdcopy", "--connections=4", raw, uri)
                else:
                    (self.peers if writer == "peer" else self.ours)("convert", "-n", "-f", "raw", "-O", "raw", raw, uri)
                self.stop()
                self.peers("check", "t.qcow2")
                self.identical(raw, "t.qcow2", "-f", "raw")

    def test_our_client_and_their_server(self):
        self.chain()
        uri = self.serve("-f", "qcow2", "top.qcow2", program="qemu-nbd")
        self.ours("compare", uri, "want.raw")
        ours = json.loads(self.ours("map", "--output=json", uri).stdout)
        peers = json.loads(self.peers("map", "--output=json", uri).stdout)
        self.assertEqual(ours, peers)
        raw = self.write_raw("a.raw", 64 * MIB, seed=5, pieces=30)
        self.ours("convert", "-n", "-f", "raw", "-O", "raw", raw, uri)
        self.stop()
        self.identical(raw, "top.qcow2", "-f", "raw")

    def test_zeros_take_no_space(self):
        for fmt, options in (("raw", ()), ("qcow2", ()), ("raw", ("-s",))):
            with self.subTest(fmt=fmt, options=options):
                self.ours("create", "-q", "-f", fmt, "zeros.img", "8M")
                self.peer_io("zeros.img", "write -P 7 1M 1M", fmt=fmt)
                before = os.stat(self.path("zeros.img")).st_blocks
                uri = self.serve("-f", fmt, "--discard=unmap", "--detect-zeroes=unmap", "--aio=native", *options, "zeros.img")
                self.peer_io(uri, "write -P 0 0 6M", "read -P 0 0 8M", fmt="raw")
                self.stop()
                after = os.stat(self.path("zeros.img")).st_blocks
                (self.assertEqual if options else self.assertLess)(after, before)
        self.assertIn("unmap", self.run_tool(self.path(".bin", "qemu-nbd"), "--detect-zeroes=unmap", "zeros.img", code=1).stderr)
        self.assertIn("aio", self.run_tool(self.path(".bin", "qemu-nbd"), "--aio=nope", "zeros.img", code=1).stderr)

    def test_old_servers(self):
        """Without a negotiation, without options, and with zeros where there is something else now."""
        if not shutil.which("nbdkit"):
            self.skipTest("nbdkit isn't installed")
        self.write_raw("a.raw", 2 * MIB, seed=6)
        uri = f"nbd+unix:///?socket={self.path('socket')}"
        named = f"nbd+unix:///x?socket={self.path('socket')}"
        for style in ("--oldstyle", "--mask-handshake=0", "--mask-handshake=1", "--mask-handshake=2"):
            with self.subTest(style):
                self.run_tool("cp", "a.raw", "served.raw")
                self.run_tool("nbdkit", "-P", self.path("pid"), "-U", self.path("socket"), style, "file", self.path("served.raw"))
                self.addCleanup(self.stop)
                self.ours("convert", "-O", "raw", uri, "out.raw")
                self.same_bytes("out.raw", "a.raw")
                listed, theirs = (self.run_tool(program, "-L", "-k", self.path("socket"), code=None)
                                  for program in (self.path(".bin", "qemu-nbd"), "qemu-nbd"))
                self.assertEqual(listed.returncode, theirs.returncode, theirs.stderr)
                if style == "--oldstyle":  # nbdkit then offers flushes and doesn't do them: nobody can write
                    self.assertIn(f"size:  {2 * MIB}", listed.stdout)
                    self.assertIn("has no export 'x'", self.ours("info", named, code=1).stderr)
                else:
                    self.run_tool(self.path(".bin", "qemu-io"), "-f", "raw", "-c", "write -P 5 64k 128k", "-c", "flush", uri)
                self.stop()
                os.remove(self.path("socket"))
                if style == "--oldstyle":
                    continue
                self.run_tool("cmp", "-n", str(64 << 10), "served.raw", "a.raw")
                self.peer_io("served.raw", "read -P 5 64k 128k", fmt="raw")

    def test_contexts(self):
        if not shutil.which("nbdinfo"):
            self.skipTest("nbdinfo isn't installed")
        self.chain()
        arguments = ["-A", "-B", "b0", "-D", "a disk", "-r", "top.qcow2"]
        answers = []
        for program in (None, "qemu-nbd"):
            # The peer offers a bitmap that is enabled only where it may write.
            self.peers("bitmap", "--disable", "top.qcow2", "b0")
            uri = self.serve(*arguments, program=program)
            answers.append([self.run_tool("nbdinfo", f"--map={context}", uri).stdout for context in
                            ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0")])
            info = json.loads(self.run_tool("nbdinfo", "--json", uri).stdout)["exports"][0]
            answers[-1].append((info["export-size"], info["description"], sorted(info["contexts"]), info["is_read_only"]))
            self.stop()
        self.assertEqual(*answers)

    def test_snapshot_keeps_the_image(self):
        raw = self.write_raw("a.raw", 8 * MIB, seed=6)
        uri = self.serve("-s", "-f", "raw", raw)
        self.peer_io(uri, "write -P 7 0 8M", "read -P 7 0 8M", fmt="raw")
        self.stop()
        self.run_tool("qemu-io", "-f", "raw", "-c", "read 0 512", raw)
        again = self.write_raw("b.raw", 8 * MIB, seed=6)
        self.same_bytes(raw, again)

    def test_ends_with_its_last_client(self):
        raw = self.write_raw("a.raw", MIB, seed=7)
        server = subprocess.Popen([self.path(".bin", "qemu-nbd"), "-v", "-f", "raw", "-k", self.path("socket"), self.path(raw)],
                                  stderr=subprocess.PIPE, text=True)
        self.assertIn("ready", server.stderr.readline())
        self.ours("info", f"nbd+unix:///?socket={self.path('socket')}")
        self.assertEqual(server.wait(30), 0)
        server.stderr.close()
        self.assertFalse(os.path.exists(self.path("socket")))

    def test_errors_are_one_line(self):
        raw = self.write_raw("a.raw", MIB, seed=8)
        for words, says in ((["nope"], "nope"), ([], "image file name"), (["-x", "a", "-k", "/nope/s", raw], "/nope/s"),
                            (["--tls-creds", "x", raw], "no TLS credentials"), (["-c", "/dev/nbd0", raw], "kernel"),
                            (["-B", "b", raw], "not found")):
            done = self.run_tool(self.path(".bin", "qemu-nbd"), *words, code=1)
            self.assertIn(says, done.stderr)
            self.assertEqual(done.stderr.count("\n"), 1)
        self.assertIn("cannot connect", self.ours("info", "nbd+unix:///?socket=nowhere", code=1).stderr)
        uri = self.serve("-r", "-x", "one", raw)
        self.assertIn("no export 'two'", self.ours("info", uri.replace("///", "///two"), code=1).stderr)
        self.assertIn("read-only", self.ours("convert", "-n", "-O", "raw", raw, uri.replace("///", "///one"), code=1).stderr)

    def test_reads_of_zeros_send_none(self):
        self.chain()
        self.serve("-r", "top.qcow2")
        peer = self.connect()

        def take(size):
            data = b""
            while len(data) < size:
                more = peer.recv(size - len(data))
                self.assertTrue(more, "the server has gone")
                data += more
            return data

        def option(number, data=b""):
            """Asked for, and accepted."""
            peer.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
            kind = 0
            while kind != 1:
                magic, _, kind, length = struct.unpack(">QIII", take(20))
                self.assertEqual(magic, 0x3e889045565a9)
                take(length)

        def read(offset, length, flags=0):
            """The type and the content of the one chunk of the reply."""
            peer.sendall(struct.pack(">IHHQQI", 0x25609513, flags, 0, 7, offset, length))
            magic, done, kind, cookie, size = struct.unpack(">IHHQI", take(20))
            self.assertEqual((magic, done, cookie), (0x668e33ef, 1, 7))
            return kind, take(size)

        take(18)
        peer.sendall(struct.pack(">I", 3))
        option(8)  # structured replies
        option(7, struct.pack(">IH", 0, 0))  # go
        do_not_fragment = 4
        for zeros in (0, 8 * MIB, 40 * MIB):  # from nowhere, written in the lower image, from nowhere
            self.assertEqual(read(zeros, 65536), (2, struct.pack(">QI", zeros, 65536)))
            self.assertEqual(read(zeros, 65536, do_not_fragment), (1, struct.pack(">Q", zeros) + bytes(65536)))
        edge = 20 * MIB - 65536
        self.assertEqual(read(edge, 131072), (1, struct.pack(">Q", edge) + bytes(65536) + b"\4" * 65536))


class HostilePeersTest(NbdServer):
    def test_clients_that_break_the_protocol(self):
        uri = self.serve("-f", "raw", self.write_raw("a.raw", MIB, seed=9))
        option = b"IHAVEOPT"
        go = option + struct.pack(">IIIH", 7, 6, 0, 0)
        bad = [b"\xff" * 64, struct.pack(">I", 3) + b"\0" * 16, struct.pack(">I", 3) + option + struct.pack(">II", 7, 1 << 31),
               struct.pack(">I", 3) + option + struct.pack(">IIIH", 7, 6, 0xffffffff, 1),
               struct.pack(">I", 3) + option + struct.pack(">III", 10, 4, 5),
               struct.pack(">I", 3) + go + struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 0xffffffff),
               struct.pack(">I", 3) + go + struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 1 << 62, 4096),
               struct.pack(">I", 3) + go + struct.pack(">IHHQQI", 0x25609513, 0xffff, 99, 1, 0, 4096),
               struct.pack(">I", 3) + go + b"\0" * 28]
        for data in bad:
            peer = self.connect()
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass
        self.ours("info", uri)  # it still serves

    def test_servers_that_break_the_protocol(self):
        greeting = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
        reply = struct.pack(">QIII", 0x3e889045565a9, 8, 1, 0)
        for data in (b"", b"\0" * 100, greeting, greeting + b"\0" * 40, greeting + struct.pack(">QIII", 0x3e889045565a9, 8, 1, 1 << 31),
                     greeting + reply + struct.pack(">QIII", 0x3e889045565a9, 10, 4, 2) + b"xx",
                     greeting + reply + struct.pack(">QIII", 0x3e889045565a9, 10, 1, 0) +
                     struct.pack(">QIIIHQH", 0x3e889045565a9, 7, 3, 12, 0, 1 << 63, 1) + struct.pack(">QIII", 0x3e889045565a9, 7, 1, 0)):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(self.path("evil"))
                listener.listen()
                client = subprocess.Popen([self.path(".bin", "qemu-img"), "info", f"nbd+unix:///?socket={self.path('evil')}"],
                                          stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
                peer, _ = listener.accept()
                with peer:
                    peer.sendall(data)
                    peer.shutdown(socket.SHUT_WR)
                    _, errors = client.communicate(timeout=20)
                self.assertEqual((client.returncode, errors.count("\n")), (1, 1), errors)
            os.remove(self.path("evil"))


if __name__ == "__main__":
    unittest.main()
