"""A headless Chromium to look at pages with, driven by the DevTools protocol: what a page says, and how it looks."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect  # comes with Prefect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page. Its profile and pictures go to `folder`."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        self._folder = folder
        # Graphs are drawn by WebGL, which SwiftShader does without a GPU.
        self._process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1500,1100",
             "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--remote-debugging-port=0",
             f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._calls = 0
        self._socket = connect(self._address(), max_size=None, proxy=None)

    def _address(self) -> str:
        said = self._folder / "profile" / "DevToolsActivePort"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            with suppress(FileNotFoundError, IndexError, httpx.HTTPError):
                port = said.read_text().splitlines()[0]
                pages = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=30).json()
                return next(str(page["webSocketDebuggerUrl"]) for page in pages if page["type"] == "page")
            assert self._process.poll() is None, "the browser ended"
            time.sleep(0.1)
        raise AssertionError("the browser did not start")

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)

    def _call(self, method: str, **parameters: Any) -> Any:
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=120))
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return answer["result"]

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, address: str, *words: str) -> str:
        """Go there and wait until the page has these words; what it says then."""
        self._call("Page.navigate", url=address)
        return self.read(*words)

    def read(self, *words: str) -> str:
        """Wait until the page has these words; what it says then."""
        deadline = time.monotonic() + 240
        text = ""
        while time.monotonic() < deadline:
            text = str(self.ask("document.body ? document.body.innerText : ''"))
            if all(word in text for word in words):
                return text
            time.sleep(0.2)
        self.picture("missing")
        raise AssertionError(f"the page does not say {[word for word in words if word not in text]}, but: {text}")

    def click(self, label: str, *words: str) -> str:
        """Click what has that label, and wait until the page has these words; what it says then."""
        find = (
            f"[...document.querySelectorAll('body *')].filter(e => e.innerText?.trim() === {json.dumps(label)}).pop()"
        )
        assert self.ask(f"Boolean({find})"), f"there is no {label} to click"
        self.ask(f"{find}.click()")
        return self.read(*words)

    def picture(self, name: str) -> Path:
        """A PNG of what is to be seen."""
        path = self._folder / f"{name}.png"
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))
        return path
