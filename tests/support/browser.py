"""A headless browser, driven over its own protocol through a pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str | None:
    """A browser on this machine; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page. A context manager."""

    def __init__(self, program: str, folder: Path, *, width: int = 1200, height: int = 760) -> None:
        """`folder` is for the browser's own files."""
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        options = (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
            f"--window-size={width},{height}", f"--user-data-dir={folder}", "about:blank",
        )  # fmt: skip
        # The protocol wants the file descriptors 3 and 4; copies above them are not overwritten.
        copies = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (theirs_in, theirs_out)]
        nowhere = os.open(os.devnull, os.O_RDWR)
        placed = zip((nowhere, nowhere, nowhere, *copies), range(5), strict=True)
        actions = [(os.POSIX_SPAWN_DUP2, source, target) for source, target in placed]
        self._pid = os.posix_spawn(program, [program, *options], dict(os.environ), file_actions=actions)
        for each in (theirs_in, theirs_out, nowhere, *copies):
            os.close(each)
        self._in, self._out = os.fdopen(ours_in, "rb", 0), os.fdopen(ours_out, "wb", 0)
        self._held = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """What the browser said of the page: exceptions of its script, and what its policy refused."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        # A page in the background does less.
        self._call("Page.bringToFront")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def open(self, url: str) -> None:
        """Goes to a page."""
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 30.0) -> None:
        """Waits until an expression holds in the page."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"{script} did not come true: {self.complaints}"
            time.sleep(0.03)

    def picture(self) -> bytes:
        """The page as a PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)
        self._in.close()
        self._out.close()

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._listen(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            part = self._in.read(1 << 16)
            assert part, "the browser has ended"
            self._held += part
        first, _, self._held = self._held.partition(b"\0")
        return dict(json.loads(first))

    def _listen(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(message["params"]["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.complaints.append(message["params"]["entry"]["text"])
