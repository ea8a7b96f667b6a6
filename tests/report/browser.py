"""A headless Chromium, spoken to by the DevTools protocol over two pipes."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = "chromium-headless-shell"
DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"


def what_is_missing() -> str | None:
    """Why there is no browser here; None if there is one."""
    return None if shutil.which(PROGRAM) else f"{PROGRAM} is not installed"


class Browser:
    """One page of a browser that reaches no network, and every event that the page caused.

    Commands and answers are JSON, each ended by a NUL, on the descriptors 3 and 4 of the browser
    (--remote-debugging-pipe).
    """

    def __init__(self):
        self.events: list[dict[str, Any]] = []
        self._ids = itertools.count(1)

    def __enter__(self) -> "Browser":
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = [PROGRAM, "--remote-debugging-pipe", "--disable-gpu", OFFLINE,
                   f"--user-data-dir={self._profile.name}"]  # fmt: skip
        if os.geteuid() == 0:
            command.append("--no-sandbox")
        # Its own 3 and 4 are these pipes: the shell puts them there.
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._session = b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Network", "Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        os.close(self._write)  # at that it ends
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        self._profile.cleanup()

    def call(self, method: str, **parameters) -> dict[str, Any]:
        """Give a command, and wait for its answer."""
        number = next(self._ids)
        command = {"id": number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        answer = self._wait(lambda message: message.get("id") == number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _wait(self, is_it: Callable[[dict], bool]) -> dict[str, Any]:
        while True:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._read], [], [], 60)
                data = os.read(self._read, 1 << 16) if ready else b""
                assert data, "the browser ended, or does not answer"
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(line)
            if "method" in message:
                self.events.append(message)
            if is_it(message):
                return message

    def open(self, path: Path) -> None:
        """Show a file, and wait until all of it was loaded and drawn once."""
        self.call("Page.navigate", url=path.as_uri())
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")
        self.run(DRAWN)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def move_mouse(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.run(DRAWN)

    def resize(self, width: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        self.run(DRAWN)

    def asked_for(self) -> list[str]:
        """The addresses of everything that was asked for."""
        sent = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [parameters["request"]["url"] for parameters in sent]

    def complaints(self) -> list[dict[str, Any]]:
        """What the console shows, and exceptions that nobody caught."""
        loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event["method"] in loud]

    def picture(self, path: Path) -> None:
        """Write what is shown as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))
