"""An S3 server of its own process, and before it a proxy that can be slow, fail and hang up.

In a process of its own because some calls of tiledbsoma hold the interpreter's lock while they
wait for the server. Faults are set by posting JSON to ``/__faults`` of the proxy:

    every   every n-th GET or HEAD (or ``method``) of an object is a fault; 0: none
    kind    "503", "500", "403", "drop" (the connection is closed half-way) or "hang" (no answer
            for hang_s)
    limit   so many faults at most; -1: no limit
    delay_s each request is answered so much later
    match   only requests whose path contains this
    hang_s  seconds that a hanging request is kept

``GET /__seen`` tells the requests, faults and body bytes since the faults were set.
"""

from __future__ import annotations

import http.client
import io
import json
import logging
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pyarrow import fs

CALM: dict[str, Any] = {
    "every": 0, "kind": "503", "limit": -1, "delay_s": 0.0, "match": "", "hang_s": 5.0,
    "method": "",
}  # fmt: skip
_BODY = '<?xml version="1.0"?><Error><Code>{}</Code><Message>made to fail</Message></Error>'
_OF_CHUNKS = {
    "transfer-encoding",
    "content-encoding",
    "x-amz-decoded-content-length",
    "x-amz-trailer",
    "x-amz-content-sha256",
}
_CODES = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}


class S3:
    """A running server: its address, through the proxy and straight, and its faults."""

    def __init__(self, straight: int, proxied: int) -> None:
        self.straight = f"http://127.0.0.1:{straight}"
        self.address = f"http://127.0.0.1:{proxied}"

    def options(self, *, through_proxy: bool = True) -> dict[str, str]:
        """TileDB settings that lead to it."""
        return {
            "vfs.s3.endpoint_override": self.address if through_proxy else self.straight,
            "vfs.s3.region": "us-east-1",
            "vfs.s3.no_sign_request": "true",  # no credentials in the tests' environment
        }

    def faults(self, **given: Any) -> None:
        """Set the faults, and count anew."""
        body = json.dumps({**CALM, **given}).encode()
        with urllib.request.urlopen(f"{self.address}/__faults", data=body, timeout=10):
            pass

    def seen(self) -> dict[str, Any]:
        """Counts since the faults were set: ``requests``, ``faults``, ``bytes``, ``paths``."""
        with urllib.request.urlopen(f"{self.address}/__seen", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def make_bucket(self, name: str) -> None:
        place = fs.S3FileSystem(
            endpoint_override=self.straight, region="us-east-1", allow_bucket_creation=True
        )
        place.create_dir(name)


@contextmanager
def s3_server() -> Iterator[S3]:
    """Start the server and the proxy; stop them at the end."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        straight, proxied = map(int, process.stdout.readline().split())
        yield S3(straight, proxied)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=20)


class _State:
    def __init__(self, upstream: int) -> None:
        self.upstream, self.lock = upstream, threading.Lock()
        self.reset(CALM)

    def reset(self, faults: dict[str, Any]) -> None:
        self.faults = dict(faults)
        self.seen = {"requests": 0, "faults": 0, "bytes": 0, "paths": {}}
        self._number = 0

    def fault(self, method: str, path: str) -> bool:
        with self.lock:
            self.seen["requests"] += 1
            every = self.faults["every"]
            wanted = [self.faults["method"]] if self.faults["method"] else ["GET", "HEAD"]
            if not every or method not in wanted or self.faults["match"] not in path:
                return False
            self._number += 1
            limit = self.faults["limit"]
            if self._number % every or (0 <= limit <= self.seen["faults"]):
                return False
            self.seen["faults"] += 1
            return True


def _unchunked(stream: Any) -> bytes:
    """The content of a body that comes as chunks: size in hexadecimal, bytes; trailers last."""
    parts = []
    while size := int(stream.readline().split(b";")[0], 16):
        parts.append(stream.read(size))
        stream.readline()
    while stream.readline().strip():
        pass
    return b"".join(parts)


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: _State

    def log_message(self, *_: Any) -> None:
        pass

    def _own(self) -> bool:
        if self.path == "/__faults":
            size = int(self.headers["Content-Length"])
            self.state.reset(json.loads(self.rfile.read(size)))
            self._answer(200, b"{}")
            return True
        if self.path == "/__seen":
            self._answer(200, json.dumps(self.state.seen).encode())
            return True
        return False

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = _unchunked(self.rfile)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = _unchunked(io.BytesIO(body))  # the server does not do it for unsigned requests
        return body

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self) -> None:
        if self._own():
            return
        faults = self.state.faults
        body = self._body()
        time.sleep(faults["delay_s"])
        if not self.state.fault(self.command, self.path):
            self._forward(body)
        elif faults["kind"] == "hang":
            time.sleep(faults["hang_s"])
            self.close_connection = True
        elif faults["kind"] == "drop":
            self._forward(body, half=True)
        else:
            self._answer(int(faults["kind"]), _BODY.format(_CODES[faults["kind"]]).encode())

    def _forward(self, body: bytes, *, half: bool = False) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.state.upstream, timeout=60)
        kept = {k: v for k, v in self.headers.items() if k.lower() not in _OF_CHUNKS}
        kept["Content-Length"] = str(len(body))
        upstream.request(self.command, self.path, body, kept)
        found = upstream.getresponse()
        data = found.read()
        self.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        if half:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(data)
            with self.state.lock:
                self.state.seen["bytes"] += len(data)
                paths = self.state.seen["paths"]
                key = self.path.split("?")[0]
                paths[key] = paths.get(key, 0) + len(data)
        upstream.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815


def _main() -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    straight = moto.get_host_and_port()[1]
    _Proxy.state = _State(straight)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(straight, proxy.server_address[1], flush=True)
    sys.stdin.read()  # until whoever started us is done, or dead
    moto.stop()


if __name__ == "__main__":
    _main()
