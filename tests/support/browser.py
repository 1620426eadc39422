"""A headless Chromium for tests of pages, driven over WebDriver (https://www.w3.org/TR/webdriver2/) by Debian's
`chromium-driver`. Knows nothing of this project.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 120
"""That a command may take, on a machine with much other work."""
ROOT = Path(__file__).parents[2]


def missing() -> str | None:
    """What this machine lacks, as the reason of a skipped test."""
    programs = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    return None if all(programs) else "needs Chromium and its driver (Debian: chromium, chromium-driver)"


def axe_script() -> Path:
    """axe-core, from npm in this checkout, or the file that the variable AXE_CORE names. It may not exist."""
    return Path(os.environ.get("AXE_CORE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))


class Browser:
    """One session."""

    def __init__(self, address: str):
        self._address = address
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._address += f"/session/{session['sessionId']}"

    def _send(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return json.load(response)["value"]

    def open(self, page: Path) -> None:
        """Loads a page; its messages and requests are collected from now on."""
        self.messages()
        self.requests()
        self._send("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in JavaScript returns; it may return a promise."""
        return self._send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def messages(self) -> list[str]:
        """Of the console, since the last call."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses that were requested, since the last call."""
        entries = self._send("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def look(self, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Sets the size of the screen in CSS pixels, and the preferred colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Of the whole page."""
        shot = self._command("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def print(self, path: Path) -> None:
        """As PDF."""
        path.write_bytes(base64.b64decode(self._command("Page.printToPDF", paperWidth=8.27, paperHeight=11.7)["data"]))

    def _command(self, name: str, **arguments: Any) -> Any:
        return self._send("POST", "/goog/cdp/execute", {"cmd": name, "params": arguments})

    def close(self) -> None:
        self._send("DELETE", "")


@contextmanager
def headless_browser() -> Iterator[Browser]:
    """A browser for as long as the block runs."""
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            lines = iter(driver.stdout.readline, "")  # type: ignore[union-attr]
            port = next(found[1] for line in lines if (found := re.search(r"successfully on port (\d+)", line)))
            browser = Browser(f"http://127.0.0.1:{port}")
            try:
                yield browser
            finally:
                browser.close()
        finally:
            driver.terminate()
