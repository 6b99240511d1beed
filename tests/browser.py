"""A browser without a window, for what can only be seen in one: widths, pictures, errors.

It is driven over two pipes with the Chrome DevTools Protocol: JSON messages that end in a NUL.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--remote-debugging-pipe"),
)
# Pixels: widths of window, page and charts; the least text, and the least within charts.
MEASURE = """(() => {
  const shown = found => [...found].filter(one => one.checkVisibility());
  const written = shown(document.querySelectorAll("body *")).filter(
    one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  const size = one => parseFloat(getComputedStyle(one).fontSize);
  const scaled = one => size(one) * Math.hypot(one.getScreenCTM().a, one.getScreenCTM().b);
  return {
    window: innerWidth,
    page: document.documentElement.scrollWidth,
    charts: shown(document.querySelectorAll("svg")).map(one => one.getBoundingClientRect().width),
    text: Math.min(...written.filter(one => !one.closest("svg")).map(size)),
    drawn: Math.min(...written.filter(one => one.matches("svg text, svg tspan")).map(scaled)),
  };
})()"""
SECONDS = 60.0  # that an answer may take on a busy machine


class Page:
    """An open page.

    Attributes:
        errors: exceptions, and what was written to the console as an error or warning.
        asked: addresses of all that was loaded.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.errors: list[str] = []
        self.asked: list[str] = []
        self._commands, self._answers = commands, answers
        self._sent, self._session, self._left, self._events = 0, "", b"", set[str]()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int) -> None:
        """Opens a file in a window of that many pixels, as a phone or desktop would."""
        self.errors.clear()
        self.asked.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._read()

    def run(self, script: str) -> Any:
        """Returns what a script on the page comes to, as plain data."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> bytes:
        """Returns the page as PNG, all of its length."""
        size = self.run("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        taken = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the answer to a command of the protocol."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._left:
            assert select.select([self._answers], [], [], end - time.monotonic())[0], "no answer"
            read = os.read(self._answers, 1 << 16)
            assert read, "the browser has ended"
            self._left += read
        message, self._left = self._left.split(b"\0", 1)
        found = dict(json.loads(message))
        event, params = found.get("method", ""), found.get("params", {})
        self._events.add(event)
        if event == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        level = params.get("type") or params.get("entry", {}).get("level")
        told = event in ("Runtime.consoleAPICalled", "Log.entryAdded")
        if event == "Runtime.exceptionThrown" or (told and level in ("error", "warning")):
            self.errors.append(json.dumps(params))
        return found


def check_readable(page: Page, path: Path, charts: int) -> None:
    """Asserts that a page is whole and readable on a phone and on a desktop.

    Args:
        page: of a browser.
        path: the HTML file.
        charts: how many it shows.
    """
    for width in (390, 1280):
        page.open(path, width)
        found = page.run(MEASURE)
        # A phone zooms out where a page is wider than its window.
        assert width == found["window"] >= found["page"], "the page scrolls sideways"
        assert len(found["charts"]) == charts, found["charts"]
        assert all(0.8 * min(width, 900) < chart <= width for chart in found["charts"]), found
        assert found["text"] >= 14, "text is small"
        assert found["drawn"] >= 13.5, "text in a chart is small"
        assert page.errors == [], page.errors
        assert page.asked == [path.resolve().as_uri()], page.asked


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Yields a page of a browser, which is ended after; skips the test where there is none.

    Args:
        folder: for the browser's own files.
    """
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: install one of {', '.join(NAMES)}")
    # The browser reads commands at its descriptor 3 and writes answers at 4.
    (its_in, to), (answers, its_out) = os.pipe(), os.pipe()
    started = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
    child = subprocess.Popen(
        [
            *("/bin/bash", "-c", started, "", str(its_in), str(its_out)),
            *(found, *FLAGS, f"--user-data-dir={folder / 'browser'}"),
        ],
        pass_fds=(its_in, its_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_in)
    os.close(its_out)
    try:
        yield Page(to, answers)
    finally:
        child.terminate()
        child.wait(30)
        os.close(to)
        os.close(answers)
