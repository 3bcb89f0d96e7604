"""Chromium, driven through its DevTools protocol with the standard library alone: pages as people see them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-port=0",
)


class NoBrowserError(Exception):
    """There is no Chromium on this machine, or it does not start; the text says why."""


@dataclass
class View:
    """A page after it has loaded.

    Args:
        text: What can be read on it.
        errors: What its console calls an error.
        plots: Data and layout of each plotly figure.
        seconds: From the beginning of the navigation until all that was waited for was there.
        json_bytes: Of the answers to its requests for data, decoded.
        png: A screenshot.
    """

    text: str = ""
    errors: list[str] = field(default_factory=list)
    plots: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    json_bytes: int = 0
    png: bytes = b""


class Browser:
    """One Chromium with one page. A context manager."""

    def __init__(self, width: int = 1400, height: int = 1600) -> None:
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        if program is None:
            raise NoBrowserError("Chromium is not installed (Debian: apt-get install chromium)")
        self._home = tempfile.mkdtemp(prefix="chromium-")
        self._process = subprocess.Popen(
            [
                program,
                *_SWITCHES,
                f"--user-data-dir={self._home}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._socket = _WebSocket(self._address())
        except BaseException:
            self.close()
            raise
        self._number = 0
        self._events: deque[dict[str, Any]] = deque()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def look(
        self,
        url: str,
        *,
        words: tuple[str, ...] = (),
        plots: int = 0,
        timeout: float = 60.0,
        png: bool = True,
    ) -> View:
        """Open a page, and wait until ``words`` can be read, ``plots`` are drawn, and nothing is fetched any more."""
        self.call("Page.navigate", url="about:blank")
        self._settle(0.1)
        self._events.clear()
        view, started = View(), time.monotonic()
        self.call("Page.navigate", url=url)
        ready = (
            f"{json.dumps(words)}.every(w => document.body.innerText.includes(w)) && "
            f"document.querySelectorAll('.js-plotly-plot:has(.main-svg)').length >= {plots}"
        )
        while True:
            if self.evaluate(f"Boolean(document.body && {ready})") and not self._is_fetching():
                break
            if time.monotonic() - started > timeout:
                text = self.evaluate("document.body ? document.body.innerText : ''")
                raise AssertionError(
                    f"{url}: after {timeout} s there is no {words} and {plots} plots in {text!r}"
                )
            time.sleep(0.02)
        view.seconds = time.monotonic() - started
        self._settle(0.3)
        view.text = self.evaluate("document.body.innerText")
        view.plots = json.loads(
            self.evaluate(
                "JSON.stringify([...document.querySelectorAll('.js-plotly-plot')]"
                ".map(p => ({data: p.data, title: (p.layout.title && p.layout.title.text) || ''})))"
            )
        )
        view.errors, view.json_bytes = self._errors(), self._json_bytes()
        if png:
            view.png = base64.b64decode(self.call("Page.captureScreenshot")["data"])
        return view

    def evaluate(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.receive())
            if message.get("id") == self._number:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']}")
                return message["result"]
            self._events.append(message)

    def _settle(self, seconds: float) -> None:
        time.sleep(seconds)
        self.evaluate("1")

    def _is_fetching(self) -> bool:
        begun = {e["params"]["requestId"] for e in self._of("Network.requestWillBeSent")}
        ended = {
            e["params"]["requestId"]
            for kind in ("Network.loadingFinished", "Network.loadingFailed")
            for e in self._of(kind)
        }
        return bool(begun - ended)

    def _json_bytes(self) -> int:
        data = {
            e["params"]["requestId"]
            for e in self._of("Network.requestWillBeSent")
            if "/api/" in e["params"]["request"]["url"]
        }
        return sum(
            e["params"]["dataLength"]
            for e in self._of("Network.dataReceived")
            if e["params"]["requestId"] in data
        )

    def _errors(self) -> list[str]:
        found = [str(e["params"]["exceptionDetails"]) for e in self._of("Runtime.exceptionThrown")]
        found += [
            str(e["params"]["args"])
            for e in self._of("Runtime.consoleAPICalled")
            if e["params"]["type"] == "error"
        ]
        entries = [e["params"]["entry"] for e in self._of("Log.entryAdded")]
        return found + [f"{e['text']} {e.get('url', '')}" for e in entries if e["level"] == "error"]

    def _of(self, method: str) -> list[dict[str, Any]]:
        return [e for e in self._events if e.get("method") == method]

    def _address(self) -> str:
        file, deadline = Path(self._home) / "DevToolsActivePort", time.monotonic() + 60
        while not file.exists() or not file.read_text().strip():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise NoBrowserError("Chromium is installed, and does not start here")
            time.sleep(0.05)
        port = file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [p for p in json.load(answer) if p["type"] == "page"]
        return pages[0]["webSocketDebuggerUrl"]


class _WebSocket:
    """As much of RFC 6455 as the protocol needs: whole text messages."""

    def __init__(self, address: str) -> None:
        host, _, path = address.removeprefix("ws://").partition("/")
        name, _, port = host.partition(":")
        self._socket = socket.create_connection((name, int(port)), timeout=120)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._rest = b""
        while b"\r\n\r\n" not in self._rest:
            self._rest += self._socket.recv(4096)
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        assert b" 101 " in head.splitlines()[0], head

    def send(self, text: str) -> None:
        data, mask = text.encode(), os.urandom(4)
        size = len(data)
        if size < 126:
            head = struct.pack(">BB", 0x81, 0x80 | size)
        elif size < 1 << 16:
            head = struct.pack(">BBH", 0x81, 0x80 | 126, size)
        else:
            head = struct.pack(">BBQ", 0x81, 0x80 | 127, size)
        self._socket.sendall(head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))

    def receive(self) -> str:
        parts = []
        while True:
            first, second = self._take(2)
            size = second & 0x7F
            if size == 126:
                (size,) = struct.unpack(">H", self._take(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", self._take(8))
            data = self._take(size)
            if first & 0x0F in (0, 1):
                parts.append(data)
            if first & 0x80 and first & 0x0F in (0, 1):
                return b"".join(parts).decode()

    def close(self) -> None:
        self._socket.close()

    def _take(self, count: int) -> bytes:
        while len(self._rest) < count:
            more = self._socket.recv(1 << 20)
            if not more:
                raise AssertionError("Chromium has ended")
            self._rest += more
        found, self._rest = self._rest[:count], self._rest[count:]
        return found
