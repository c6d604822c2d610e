"""A vLLM server of a lab model, and a proxy before it that fails on demand and remembers what passed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = str(Path(__file__).parents[1] / "lab" / "models" / "teacher-totals")
KEY = "sesame-5d1f0c"
SERVED = "totals"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def vllm_server(
    log: Path,
    port: int,
    *flags: str,
    options: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Serves MODEL under SERVED to whoever has KEY, or what `options` say; up in half a minute or so."""
    teacher = {"model": MODEL, "served-model-name": SERVED, "max-model-len": "160", "api-key": KEY}
    given = {
        "host": "127.0.0.1",
        "port": str(port),
        "dtype": "float32",
        **(teacher if options is None else options),
    }
    arguments = [word for key, value in given.items() for word in (f"--{key}", value)]
    module = ["-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *flags]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *module, *arguments],
            stdout=output,
            stderr=output,
            env=os.environ | quiet | dict(environment or {}),
            start_new_session=True,
        )
    try:
        wait_for(process, port, log)
        yield process
    finally:
        end(process)


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/version"):
            return
        time.sleep(0.2)
    raise AssertionError(f"no server: {log.read_text(errors='replace')[-2000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Its engine is a process of its own, in the same session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Proxy:
    """An HTTP server in a thread that passes everything on, but for what a test asks of it."""

    def __init__(self, upstream: int) -> None:
        self.calls = 0
        """Completions that were asked for, the refused ones included."""
        self.most_at_once = 0
        self.keys: set[str | None] = set()
        """Authorization headers, as they came."""
        self.failures: list[tuple[int, str]] = []
        """(status, message) of the next answers."""
        self.rewrite: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
        self.delay = 0.0
        """Seconds before a completion is passed on..."""
        self.quick_calls = 0
        """...but for these first ones."""
        self.stop_after: int | None = None
        """Completions after which it goes away, with the others under way cut off."""
        self._upstream = upstream
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._connections: set[socket.socket] = set()
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def stop(self) -> None:
        """Nobody listens any more, and what was under way is cut off."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                proxy._connections.add(self.connection)

            def do_GET(self) -> None:
                proxy._pass_on(self, b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                proxy._complete(self, body)

            def log_message(self, *_: Any) -> None: ...

        return Handler

    def _complete(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        with self._lock:
            self.calls += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            failure = self.failures.pop(0) if self.failures else None
            delay = self.delay if self.calls > self.quick_calls else 0
            over = self.stop_after is not None and self.calls > self.stop_after
        try:
            if over:
                self.stop()
            elif failure is not None:
                self._answer(handler, failure[0], json.dumps({"error": {"message": failure[1]}}).encode())
            else:
                time.sleep(delay)
                self._pass_on(handler, body)
        finally:
            with self._lock:
                self._at_once -= 1

    def _pass_on(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self.keys.add(handler.headers["Authorization"])
        onward = http.client.HTTPConnection("127.0.0.1", self._upstream)
        key = handler.headers["Authorization"] or f"Bearer {KEY}"
        headers = {"Authorization": key, "Content-Type": "application/json"}
        onward.request(handler.command, handler.path, body, headers)
        response = onward.getresponse()
        found = response.read()
        onward.close()
        if response.status == 200:
            found = json.dumps(self.rewrite(json.loads(found))).encode()
        self._answer(handler, response.status, found)

    def _answer(self, handler: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        with suppress(OSError):  # whoever asked has gone
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
