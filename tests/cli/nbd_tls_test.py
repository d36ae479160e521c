"""NBD within TLS, lists of exports, and connections that are lost: beside qemu-nbd, qemu-img, libnbd and nbdkit."""

import os
import shutil
import socket
import struct
import subprocess
import tempfile
import unittest

from harness import MIB, ImageTest
from nbd_test import NbdServer


def certificate(directory, name, template, issuer=None):
    """NAME-cert.pem and NAME-key.pem, signed by ca-*.pem of `issuer` or by itself."""
    path = lambda part: os.path.join(directory, f"{name}-{part}.pem")
    run = lambda *words: subprocess.run(["certtool", *words], check=True, capture_output=True)
    run("--generate-privkey", "--key-type=ecdsa", "--outfile", path("key"))
    with open(path("info"), "w", encoding="ascii") as file:
        file.write(template)
    words = ["--template", path("info"), "--load-privkey", path("key"), "--outfile", path("cert")]
    if issuer:
        run("--generate-certificate", "--load-ca-certificate", os.path.join(issuer, "ca-cert.pem"), "--load-ca-privkey",
            os.path.join(issuer, "ca-key.pem"), *words)
    else:
        run("--generate-self-signed", *words)


@unittest.skipUnless(shutil.which("certtool") and shutil.which("psktool"), "certtool (package gnutls-bin) isn't installed")
class NbdTlsTest(NbdServer):
    @classmethod
    def setUpClass(cls):
        holder = tempfile.TemporaryDirectory(prefix="kvartz-tls-")
        cls.addClassCleanup(holder.cleanup)
        cls.pki, cls.stranger, cls.nameless = (os.path.join(holder.name, name) for name in ("pki", "stranger", "nameless"))
        for directory in (cls.pki, cls.stranger, cls.nameless):
            os.mkdir(directory)
        for directory in (cls.pki, cls.stranger):
            certificate(directory, "ca", "cn = CA\nca\ncert_signing_key\nexpiration_days = 10\n")
            certificate(directory, "server", "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\n"
                        "signing_key\nexpiration_days = 10\n", directory)
            certificate(directory, "client", "cn = client\ntls_www_client\nsigning_key\nexpiration_days = 10\n", directory)
        shutil.copy(os.path.join(cls.pki, "ca-cert.pem"), cls.nameless)
        subprocess.run(["psktool", "-u", "qemu", "-p", os.path.join(cls.pki, "keys.psk")], check=True, capture_output=True)
        subprocess.run(["psktool", "-u", "qemu", "-p", os.path.join(cls.stranger, "keys.psk")], check=True, capture_output=True)

    def credentials(self, kind, endpoint, directory=None, more=""):
        return ["--object", f"tls-creds-{kind},id=tls0,dir={directory or self.pki},endpoint={endpoint}{more}"]

    def serve_tls(self, kind, *arguments, more="", program=None):
        return self.serve(*self.credentials(kind, "server", more=more), "--tls-creds", "tls0", *arguments, program=program)

    def client(self, kind, *more, directory=None, options=""):
        hostname = ",tls-hostname=localhost" if kind == "x509" else ""
        return [*self.credentials(kind, "client", directory), "--image-opts", *more,
                f"driver=nbd,server.type=unix,server.path={self.path('socket')},tls-creds=tls0{hostname}{options}"]

    def test_both_ways(self):
        raw = self.write_raw("a.raw", 16 * MIB, seed=1, pieces=40)
        for kind in ("x509", "psk"):
            for server in (None, "qemu-nbd"):
                for reader in (self.ours, self.peers):
                    if server and reader == self.peers:
                        continue
                    with self.subTest(kind=kind, server=server or "ours", reader=reader.__name__):
                        self.serve_tls(kind, "-f", "raw", raw, program=server)
                        # The peer's 7.2 has no tls-hostname for unix sockets in old builds: the name is checked by us alone.
                        reader("convert", "-O", "raw", *self.client(kind), "out.raw")
                        self.run_tool("cmp", raw, "out.raw")
                        self.stop()

    def test_writes(self):
        raw = self.write_raw("a.raw", 16 * MIB, seed=2, pieces=40)
        self.peers("create", "-q", "-f", "qcow2", "t.qcow2", "16M")
        self.serve_tls("psk", "t.qcow2")
        self.ours("create", "-q", "-f", "qcow2", "o.qcow2", "1M")
        io = [self.path(".bin", "qemu-io"), *self.credentials("psk", "client"), "-c", "write -P 5 0 8M", "-c", "read -P 5 0 8M", "-c",
              "flush", "--image-opts", f"driver=nbd,server.type=unix,server.path={self.path('socket')},tls-creds=tls0"]
        self.run_tool(*io)
        self.stop()
        self.run_tool("qemu-io", "-c", "read -P 5 0 8M", "t.qcow2")
        self.peers("check", "-q", "t.qcow2")
        self.assertTrue(raw)

    def test_over_tcp(self):
        raw = self.write_raw("a.raw", 4 * MIB, seed=3)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.run_tool(self.path(".bin", "qemu-nbd"), "--fork", "--pid-file", self.path("pid"), "-t", "-e", "8", "-b", "127.0.0.1", "-p", port,
                      "-f", "raw", "-r", *self.credentials("x509", "server"), "--tls-creds", "tls0", raw)
        self.addCleanup(self.stop)
        options = f"driver=nbd,server.type=inet,server.host=localhost,server.port={port},tls-creds=tls0"
        for reader in (self.ours, self.peers):
            reader("convert", *self.credentials("x509", "client"), "--image-opts", "-O", "raw", options, "out.raw")
            self.run_tool("cmp", raw, "out.raw")
        if shutil.which("nbdinfo"):
            done = self.run_tool("nbdinfo", "--size", f"nbds://localhost:{port}/?tls-certificates={self.pki}")
            self.assertEqual(done.stdout.strip(), str(4 * MIB))
            self.run_tool("nbdcopy", f"nbds://localhost:{port}/?tls-certificates={self.pki}", "copy.raw")
            self.run_tool("cmp", raw, "copy.raw")
        for program in (self.path(".bin", "qemu-nbd"), "qemu-nbd"):
            done = self.run_tool(program, "-L", "-b", "localhost", "-p", port, *self.credentials("x509", "client"), "--tls-creds", "tls0")
            self.assertIn(f"size:  {4 * MIB}", done.stdout)

    def test_nbdkit(self):
        if not shutil.which("nbdkit"):
            self.skipTest("nbdkit isn't installed")
        for kind, words in (("x509", [f"--tls-certificates={self.pki}", "--tls-verify-peer"]), ("psk", [f"--tls-psk={self.pki}/keys.psk"])):
            self.run_tool("nbdkit", "-P", self.path("pid"), "-U", self.path("socket"), "--tls=require", *words, "pattern", "1M")
            self.addCleanup(self.stop)
            self.ours("convert", "-O", "raw", *self.client(kind), "out.raw")
            with open(self.path("out.raw"), "rb") as file:
                self.assertEqual(file.read(24), struct.pack(">QQQ", 0, 8, 16))
            self.stop()
            os.remove(self.path("socket"))

    def test_refusals(self):
        raw = self.write_raw("a.raw", MIB, seed=4)
        plain = f"driver=nbd,server.type=unix,server.path={self.path('socket')}"
        self.serve_tls("x509", "-f", "raw", raw)
        said = lambda *words: self.ours("info", *words, code=1).stderr
        self.assertIn("demands TLS", said("--image-opts", plain))
        self.assertIn("certificate", said(*self.client("x509", directory=self.stranger)))
        self.assertTrue(said(*self.client("x509", directory=self.nameless)))  # no certificate of ours
        self.assertIn("name", said(*self.client("x509", options=",tls-hostname=elsewhere")).replace("hostname", "name"))
        self.assertIn("tls-hostname", said(*self.credentials("x509", "client"), "--image-opts", plain + ",tls-creds=tls0"))
        self.assertIn("endpoint", said(*self.credentials("x509", "server"), "--image-opts", plain + ",tls-creds=tls0"))
        self.assertIn("no TLS credentials", said("--image-opts", plain + ",tls-creds=nope"))
        self.ours("info", *self.client("x509"))  # it still serves
        self.stop()
        self.serve_tls("x509", "-f", "raw", raw, more=",verify-peer=no")
        self.ours("info", *self.client("x509", directory=self.nameless))
        self.stop()
        self.serve_tls("psk", "-f", "raw", raw)
        self.assertIn("TLS handshake failed", said(*self.client("psk", directory=self.stranger)))
        self.stop()
        self.serve("-f", "raw", raw)
        self.assertIn("offers no TLS", said(*self.client("psk")))
        for more in ("tls-creds-x509,id=t", "tls-creds-x509,id=t,dir=/nowhere", f"tls-creds-psk,id=t,dir={self.pki},username=nobody",
                     f"tls-creds-psk,id=t,dir={self.pki},nope=1", f"tls-creds-x509,id=t,dir={self.pki},priority=NOPE"):
            self.assertEqual(said("--object", more, raw).count("\n"), 1)

    def test_nothing_is_smuggled_before_tls(self):
        """What comes in the clear behind STARTTLS isn't taken for something that came within TLS."""
        self.serve_tls("psk", "-f", "raw", self.write_raw("a.raw", MIB, seed=5))
        option = lambda number: b"IHAVEOPT" + struct.pack(">II", number, 0)
        for data in (option(5) + option(3), option(3), option(8), b"IHAVEOPT" + struct.pack(">II", 1, 0)):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(20)
                peer.connect(self.path("socket"))
                peer.sendall(struct.pack(">I", 3) + data)
                peer.shutdown(socket.SHUT_WR)
                answer = b""
                while more := peer.recv(65536):
                    answer += more
                self.assertNotIn(struct.pack(">QII", 0x3e889045565a9, 3, 2), answer)
                self.assertNotIn(struct.pack(">QII", 0x3e889045565a9, 8, 1), answer)
        self.ours("info", *self.client("psk"))


class NbdLinkTest(NbdServer):
    def test_list(self):
        self.peers("create", "-q", "-f", "qcow2", "a.qcow2", "3M")
        self.peers("bitmap", "--add", "--disable", "a.qcow2", "b0")
        for server in (None, "qemu-nbd"):
            for words in (["-r", "-x", "exp", "-D", "a disk", "-B", "b0", "-A"], [], ["-x", "w"]):
                self.serve(*words, "a.qcow2", program=server)
                lists = [self.run_tool(program, "-L", "-k", self.path("socket")).stdout for program in ("qemu-nbd", self.path(".bin", "qemu-nbd"))]
                self.assertEqual(*lists)
                self.stop()
        self.assertIn("cannot connect", self.run_tool(self.path(".bin", "qemu-nbd"), "-L", "-k", self.path("nowhere"), code=1).stderr)

    def test_several_exports(self):
        for name, byte in (("a", 1), ("b", 2)):
            self.peers("create", "-q", "-f", "qcow2", name, "1M")
            self.peer_io(name, f"write -P {byte} 0 1M")
        self.serve("-x", "one", "-x", "two", "a", "b")
        for name, byte in (("one", 1), ("two", 2)):
            self.run_tool("qemu-io", "-r", "-f", "raw", "-c", f"read -P {byte} 0 1M", f"nbd+unix:///{name}?socket={self.path('socket')}")
        self.assertIn("exports available: 2", self.run_tool("qemu-nbd", "-L", "-k", self.path("socket")).stdout)
        self.stop()
        for words in (["a", "b"], ["-x", "one", "a", "b"], ["-x", "one", "-x", "one", "a", "b"], ["-B", "x", "-x", "1", "-x", "2", "a", "b"]):
            self.run_tool(self.path(".bin", "qemu-nbd"), "-k", self.path("socket"), *words, code=1)

    def start_io(self, options):
        child = subprocess.Popen([self.path(".bin", "qemu-io"), "--image-opts",
                                  f"driver=nbd,server.type=unix,server.path={self.path('socket')}{options}"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        for stream in (child.stdin, child.stdout, child.stderr):
            self.addCleanup(stream.close)
        return child

    def say(self, child, command):
        child.stdin.write(command + "\n")
        child.stdin.flush()
        return child.stdout.readline()

    def kill_server(self):
        """At once, as a crash does."""
        with open(self.path("pid"), encoding="ascii") as file:
            pid = int(file.read())
        descriptor = os.pidfd_open(pid)
        os.kill(pid, 9)
        import select
        select.select([descriptor], [], [], 30)
        os.close(descriptor)
        os.remove(self.path("pid"))

    def test_reconnects(self):
        raw = self.write_raw("a.raw", 4 * MIB, seed=6)
        for server in (None, "qemu-nbd"):
            self.serve("-f", "raw", raw, program=server)
            child = self.start_io(",reconnect-delay=60")
            self.assertIn("wrote 4096/4096", self.say(child, "write -P 9 0 4k"))
            child.stdout.readline()
            self.kill_server()
            # Under way while nobody serves.
            child.stdin.write("aio_write -P 8 4k 4k\naio_read -P 9 0 4k\naio_flush\n")
            child.stdin.flush()
            self.assertIn("is lost", child.stderr.readline())
            if os.path.exists(self.path("socket")):
                os.remove(self.path("socket"))
            self.serve("-f", "raw", raw, program=server)
            lines = [child.stdout.readline() for _ in range(4)]
            self.assertIn("wrote 4096/4096", "".join(lines))
            self.assertIn("read 4096/4096", "".join(lines))
            self.assertNotIn("failed", "".join(lines))
            child.stdin.write("quit\n")
            self.assertEqual(child.wait(30), 0)
            self.stop()
            self.run_tool("qemu-io", "-f", "raw", "-c", "read -P 8 4k 4k", raw)

    def test_another_export_is_not_taken_for_it(self):
        self.serve("-f", "raw", self.write_raw("a.raw", 4 * MIB, seed=7))
        child = self.start_io(",reconnect-delay=60")
        self.say(child, "read 0 4k")
        child.stdout.readline()
        self.kill_server()
        self.serve("-f", "raw", self.write_raw("b.raw", 2 * MIB, seed=7))
        self.assertIn("read failed", self.say(child, "read 0 4k"))

    def test_without_patience(self):
        raw = self.write_raw("a.raw", 4 * MIB, seed=8)
        for option in ("", ",reconnect-delay=1"):  # with the latter it ends while it still tries
            with self.subTest(option):
                self.serve("-f", "raw", raw)
                child = self.start_io(option)
                self.say(child, "read 0 4k")
                child.stdout.readline()
                self.kill_server()
                self.assertIn("read failed", self.say(child, "read 0 4k"))
                child.stdin.write("quit\n")
                self.assertEqual(child.wait(30), 1)

    def test_opening_waits(self):
        raw = self.write_raw("a.raw", MIB, seed=9)
        child = self.start_io(",open-timeout=60")
        self.serve("-f", "raw", raw)
        self.assertIn("read 512/512", self.say(child, "read 0 512"))
        child.stdin.write("quit\n")
        child.wait(30)
        self.stop()
        done = self.ours("info", "--image-opts", f"driver=nbd,server.type=unix,server.path={self.path('nowhere')},open-timeout=1", code=1)
        self.assertIn("cannot connect", done.stderr)

    def test_servers_that_say_nothing(self):
        """Nobody accepts, or nobody speaks: the loop isn't held up, and it ends in time."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path("mute"))
            listener.listen()
            done = self.ours("info", "--image-opts", f"driver=nbd,server.type=unix,server.path={self.path('mute')},open-timeout=1", code=1)
            self.assertIn("doesn't answer", done.stderr)


if __name__ == "__main__":
    unittest.main()
