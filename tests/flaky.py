"""Storage that refuses: an S3 server behind a proxy that stumbles on request, and permissions that bind root too."""

from __future__ import annotations

import ctypes
import http.client
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# What a client may send once more: before or after the request was carried out, or with half of the answer.
FAULTS = ("refused", "carried out", "unanswered", "cut")
BUCKET = "bucket"


class Flaky(ThreadingHTTPServer):
    """A proxy in front of an HTTP server; every fault is counted.

    Attributes:
        share: of requests that go wrong, drawn from a generator with a seed.
        script: what becomes of the next requests, before the generator is asked: one of FAULTS, None, or the code of an
            S3 error.
        seen: faults by kind, and ``requests`` in all.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = (host, port)
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.calm()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def calm(self) -> None:
        self.share, self.script, self.nameless = 0.0, list[str | None](), False
        self.seen.clear()

    @contextmanager
    def stumbling(self, share: float = 0.05, seed: int = 0) -> Iterator[Counter[str]]:
        """So many requests go wrong meanwhile; the value counts them."""
        self.calm()
        self._random, self.share = random.Random(seed), share
        try:
            yield self.seen
        finally:
            self.share = 0.0

    def fault(self, method: str) -> tuple[str | None, str]:
        """What becomes of a request, and the code that it is answered with if it is answered wrongly."""
        with self._lock:
            self.seen["requests"] += 1
            kind, code = None, "InternalError"
            if self.script:
                kind = self.script.pop(0)
            elif self.share and self._random.random() < self.share:
                kind = self._random.choice(FAULTS if method == "GET" else FAULTS[:3])
                code = self._random.choice(["InternalError", "SlowDown"])
            if kind is not None and kind not in FAULTS:
                kind, code = "refused", kind
            self.seen[str(kind)] += 1
            return kind, code

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were killed leave broken pipes."""


_STATUS = {"InternalError": 500, "SlowDown": 503, "InvalidAccessKeyId": 403, "AccessDenied": 403}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Flaky

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self._body()
        kind, code = self.server.fault(self.command)
        if kind == "refused":
            return self._refuse(code)
        connection = http.client.HTTPConnection(*self.server.upstream)
        headers = {
            k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect", "transfer-encoding")
        }
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if kind == "carried out":
            return self._refuse(code)
        if kind == "unanswered":
            self.close_connection = True
            return None
        if self.server.nameless:
            content = content.replace(b"<Condition>If-None-Match</Condition>", b"")
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", size or "0")
        self.end_headers()
        if kind == "cut":
            self.close_connection = True
            content = content[: len(content) // 2]
        if self.command != "HEAD":
            self.wfile.write(content)
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, code: str) -> None:
        content = f"<Error><Code>{code}</Code><Message>{code} of the test</Message></Error>".encode()
        self.send_response(_STATUS[code])
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/xml")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@cache
def server() -> Flaky:
    """The proxy, one a process, with moto's S3 and an empty bucket behind it."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    return Flaky(host, port)


def variables() -> dict[str, str]:
    """What points S3 clients at the proxy, in this process and its children."""
    return {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server().url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "no_proxy": "127.0.0.1,localhost",
    }


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Flaky]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables().items():
            patch.setenv(name, value)
        for name in [name for name in os.environ if name.lower() in ("http_proxy", "all_proxy")]:
            patch.delenv(name)
        yield server()


@pytest.fixture
def s3(s3_server: Flaky) -> Flaky:
    """S3 clients of this process find a bucket, behind a proxy that does nothing wrong until it is told to."""
    s3_server.calm()
    return s3_server


# Permissions do not bind root; without the capabilities to override them (1) and to search everywhere (2), they do.
_BOUND = """
import ctypes, os, sys
if os.geteuid() == 0:
    for capability in (1, 2):
        assert ctypes.CDLL(None, use_errno=True).prctl(24, capability, 0, 0, 0) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@contextmanager
def permissions_bind() -> Iterator[None]:
    """The same for this thread, and those that it starts meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    # capget(2): a header, then effective, permitted and inheritable capabilities, 32 of them a number.
    libc, header, now = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, now) == 0
    less = (ctypes.c_uint32 * 6)(*now)
    less[0] &= ~(1 << 1 | 1 << 2)
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, now) == 0


def bound(*argv: str) -> list[str]:
    """Arguments of a Python that runs Python with these, bound by permissions whoever runs it."""
    return ["-c", _BOUND, *argv]
