"""HTTP and HTTPS: images behind servers that behave, and behind those that don't."""

import base64
import http.server
import os
import re
import shutil
import ssl
import subprocess
import threading
import time
import unittest

from harness import MIB, ImageTest


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the test's directory by ranges; what comes before the file's name makes it misbehave."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range"), self.headers.get("Cookie")))
        try:
            self.serve()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def serve(self):
        _, trick, name = self.path.split("/", 2)
        try:
            with open(os.path.join(self.server.directory, name), "rb") as file:
                data = file.read()
        except OSError:
            return self.answer(404)
        if trick == "whole":
            return self.answer(200, data)
        if trick == "moved":
            return self.answer(302, Location=f"/plain/{name}")
        if trick == "circle":
            return self.answer(302, Location=self.path)
        if trick == "elsewhere":
            return self.answer(302, Location=f"file://{self.server.directory}/{name}")
        if trick == "away":  # the same server by another name
            return self.answer(302, Location=f"http://localhost:{self.server.server_port}/plain/{name}")
        if trick == "chatty":
            return self.answer(206, **{f"X-{i}": "x" * 1000 for i in range(1000)})
        if trick == "private" and self.headers.get("Authorization") != "Basic " + base64.b64encode(b"me:pass1").decode():
            return self.answer(401, WWW_Authenticate='Basic realm="x"')
        if trick == "cookie" and self.headers.get("Cookie") != "k=v":
            return self.answer(403)
        first, last = (int(text) for text in re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        last = min(last, len(data) - 1)
        if first >= len(data):
            return self.answer(416, Content_Range=f"bytes */{len(data)}")
        part = data[first:last + 1]
        ranged = {"Content_Range": f"bytes {first}-{last}/{len(data)}", "ETag": '"1"'}
        if trick in ("shifts", "grows", "shrinks", "encodes", "replaced", "short", "long", "unsized", "huge", "slow") and (
                first > 0 or last > 0 or trick in ("huge", "unsized")):
            self.misbehave(trick, first, last, data, part, ranged)
            return None
        return self.answer(206, part, **ranged)

    def misbehave(self, trick, first, last, data, part, ranged):
        if trick == "shifts":
            ranged["Content_Range"] = f"bytes {first + 512}-{last + 512}/{len(data)}"
        elif trick == "grows":
            ranged["Content_Range"] = f"bytes {first}-{last}/{len(data) * 2}"
        elif trick == "shrinks":
            return self.answer(416, Content_Range="bytes */1")
        elif trick == "encodes":
            ranged["Content_Encoding"] = "gzip"
        elif trick == "replaced":
            ranged["ETag"] = '"2"'
        elif trick == "short":
            part = part[:len(part) // 2]
        elif trick == "long":
            part += bytes(4096)
        elif trick == "unsized":
            ranged["Content_Range"] = f"bytes {first}-{last}/*"
        elif trick == "huge":
            ranged["Content_Range"] = f"bytes {first}-{last}/{(1 << 64) - 1}"
        elif trick == "slow":
            ranged["Content_Length"] = str(len(part))
            self.answer(206, part[:1], **ranged)
            return self.server.gone.wait(30)
        return self.answer(206, part, **ranged)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # a client that breaks off


class HttpTest(ImageTest):
    def serve(self, context=None):
        server = Server(("127.0.0.1", 0), Handler)
        server.directory, server.requests, server.gone = self.directory, [], threading.Event()
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()

        def stop():
            server.gone.set()
            server.shutdown()
            thread.join()
            server.server_close()
        self.addCleanup(stop)
        self.server = server
        return f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}"

    def same_bytes(self, a, b):
        self.run_tool("cmp", a, b)

    def write_file(self, name, text):
        with open(self.path(name), "w", encoding="ascii") as file:
            file.write(text)
        return name

    def test_reads_what_is_there(self):
        raw = self.write_raw("a.raw", 5 * MIB + 512, seed=1)
        self.peers("convert", "-f", "raw", "-O", "qcow2", raw, "a.qcow2")
        url = self.serve()
        self.ours("compare", "-f", "raw", "-F", "raw", raw, f"{url}/plain/a.raw")
        self.ours("convert", "-O", "raw", f"{url}/plain/a.qcow2", "b.raw")
        self.same_bytes(raw, "b.raw")
        self.ours("compare", "-F", "qcow2", "-f", "raw", raw, f"{url}/moved/a.qcow2")
        self.assertIn("file format: qcow2", self.ours("info", f"{url}/plain/a.qcow2").stdout)
        self.ours("create", "-f", "qcow2", "-b", f"{url}/plain/a.qcow2", "-F", "qcow2", "top.qcow2")
        self.ours("compare", "-f", "raw", "-F", "qcow2", raw, "top.qcow2")

    def test_by_options(self):
        raw = self.write_raw("a.raw", MIB, seed=2)
        url = self.serve()
        for more in ("", ",file.readahead=4k", ",file.timeout=20", ",file.readahead=1M"):
            self.ours("convert", "--image-opts", "-O", "raw", f"driver=raw,file.driver=http,file.url={url}/plain/a.raw{more}",
                      "b.raw")
            self.same_bytes(raw, "b.raw")
        for more, says in ((",file.readahead=1000", "readahead"), (",file.timeout=0", "timeout"), (",file.nope=1", "nope"),
                           (",file.sslverify=maybe", "sslverify")):
            done = self.ours("info", "--image-opts", f"driver=raw,file.driver=http,file.url={url}/plain/a.raw{more}", code=1)
            self.assertIn(says, done.stderr)
        done = self.ours("info", "--image-opts", f"driver=raw,file.driver=https,file.url={url}/plain/a.raw", code=1)
        self.assertIn("https://", done.stderr)

    def test_sizes_that_are_no_sectors(self):
        url = self.serve()
        for size in (0, 1, 511, 513, 262145):
            with open(self.path("a.raw"), "wb") as file:
                file.write(b"\x5a" * size)
            self.ours("convert", "-f", "raw", "-O", "raw", f"{url}/plain/a.raw", "b.raw")
            with open(self.path("b.raw"), "rb") as file:
                data = file.read()
            self.assertEqual(data, b"\x5a" * size + bytes(-size % 512))

    def test_credentials(self):
        self.write_raw("a.raw", MIB, seed=3)
        self.write_file("pass", "pass1")
        self.write_file("jar", "k=v")
        url = self.serve()
        secret = ["--object", f"secret,id=p,file={self.path('pass')}", "--object", f"secret,id=c,file={self.path('jar')}"]
        base = f"driver=raw,file.driver=http,file.url={url}"
        self.ours("info", *secret, "--image-opts", f"{base}/private/a.raw,file.username=me,file.password-secret=p")
        self.ours("info", *secret, "--image-opts", f"{base}/cookie/a.raw,file.cookie-secret=c")
        self.ours("info", "--image-opts", f"{base}/cookie/a.raw,file.cookie=k=v")
        for options in ("/private/a.raw", "/private/a.raw,file.username=me,file.password-secret=c", "/cookie/a.raw"):
            done = self.ours("info", *secret, "--image-opts", base + options, code=1)
            self.assertRegex(done.stderr, "refuses with status 40[13]")
        self.server.requests.clear()
        self.ours("info", "--image-opts", f"{base}/away/a.raw,file.cookie=k=v")
        self.assertEqual({(path, cookie) for path, _, cookie in self.server.requests}, {("/away/a.raw", "k=v"), ("/plain/a.raw", None)})
        done = self.ours("info", f"{url.replace('//', '//me:hunter2@')}/private/a.raw", code=1)
        self.assertNotIn("hunter2", done.stderr)

    def test_errors_are_one_line(self):
        self.write_raw("a.raw", MIB, seed=4)
        url = self.serve()
        closed = "http://127.0.0.1:1"
        for address, says in ((f"{url}/whole/a.raw", "doesn't support ranges"), (f"{url}/plain/none", "status 404"),
                              (f"{url}/circle/a.raw", "redirects"), (f"{url}/elsewhere/a.raw", "rotocol"),
                              (f"{url}/chatty/a.raw", "more headers"),
                              (f"{url}/unsized/a.raw", "another part|how large"), (f"{url}/huge/a.raw", "18446744073709551615"),
                              (f"{closed}/a", "Failed to connect"), ("http://nowhere.invalid/a", "resolve")):
            done = self.ours("info", address, code=1)
            self.assertRegex(done.stderr, says)
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        done = self.ours("convert", "-n", "-f", "raw", "-O", "raw", "a.raw", f"{url}/plain/a.raw", code=1)
        self.assertIn("read-only", done.stderr)

    def test_servers_that_change_their_mind(self):
        self.write_raw("a.raw", MIB, seed=5)
        url = self.serve()
        for trick in ("shifts", "grows", "shrinks", "encodes", "replaced", "short", "long"):
            done = self.ours("convert", "-f", "raw", "-O", "raw", f"{url}/{trick}/a.raw", "b.raw", code=None)
            # What is too long is cut off by the length that was announced, or refused.
            self.assertEqual(done.returncode, 1, trick)

    def test_server_that_stalls(self):
        self.write_raw("a.raw", MIB, seed=6)
        url = self.serve()
        start = time.monotonic()
        self.ours("convert", "-O", "raw", "--image-opts", f"driver=raw,file.driver=http,file.url={url}/slow/a.raw,file.timeout=1",
                  "b.raw", code=1)
        self.assertLess(time.monotonic() - start, 25)

    def test_https(self):
        if not shutil.which("openssl"):
            self.skipTest("openssl isn't installed")
        raw = self.write_raw("a.raw", MIB, seed=7)
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", self.path("key"), "-out",
                        self.path("cert"), "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
                       check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path("cert"), self.path("key"))
        url = self.serve(context)
        self.assertRegex(self.ours("info", f"{url}/plain/a.raw", code=1).stderr, "ertificate")
        self.ours("convert", "-O", "raw", "--image-opts",
                  f"driver=raw,file.driver=https,file.sslverify=off,file.url={url}/plain/a.raw", "b.raw")
        self.same_bytes(raw, "b.raw")

    def test_small_reads_are_joined(self):
        raw = self.write_raw("a.raw", 4 * MIB, seed=8, pieces=200)
        self.peers("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, "a.qcow2")
        url = self.serve()
        self.ours("compare", "-f", "raw", "-F", "qcow2", raw, f"{url}/plain/a.qcow2")
        self.assertLess(len(self.server.requests), 64)


if __name__ == "__main__":
    unittest.main()
