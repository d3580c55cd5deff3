"""The report as a browser shows it: headless Chromium, over the pipe of its DevTools protocol. Skipped where there is no Chromium."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import select
import shutil
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tsrfast.suite.report import load_results, load_run, render

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 90.0  # seconds for an answer; the machine may be busy
PHONE, DESKTOP = 390, 1280

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: neither the variable CHROMIUM nor the PATH names one")


class Browser:
    """A page in a browser of its own. Messages are JSON that ends with a zero byte, on descriptors 3 (to it) and 4 (from it)."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs, answers)]  # 3 and 4 may be in use here
        (profile / "log").touch()
        actions = [
            (os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4),
            (os.POSIX_SPAWN_OPEN, 1, str(profile / "log"), os.O_WRONLY | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]  # fmt: skip
        words = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._pid = os.posix_spawn(CHROMIUM, words, os.environ, file_actions=actions, setpgroup=0)
        for fd in (theirs, answers, *high):
            os.close(fd)
        self._log, self._waiting, self._number, self._session = profile / "log", b"", 0, {}
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; what the browser says meanwhile is kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._number:
                assert "error" not in said, (method, said["error"])
                return said["result"]
            self.events.append(said)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._read, 1 << 20) if ready else b""
            if not piece:
                pytest.fail(f"Chromium does not answer: {self._log.read_text()[-2000:]}")
            self._waiting += piece
        first, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(first)

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Load a page anew in a window of that width, and wait until it and its images are there."""
        phone = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.events.clear()
        assert "errorText" not in self.ask("Page.navigate", url=page.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def evaluate(self, script: str) -> Any:
        """The JSON value of a script in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors, warnings and exceptions since the page was opened."""
        self.ask("Runtime.evaluate", expression="0")  # what was said before this answer has arrived
        found = []
        for e in self.events:
            what = e.get("params", {})
            if e.get("method") == "Runtime.exceptionThrown":
                found.append(str(what["exceptionDetails"]))
            if e.get("method") == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
                found.append(str(what["args"]))
            if e.get("method") == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
                found.append(what["entry"]["text"])
        return found

    def picture(self, whole: bool = False) -> bytes:
        """PNG of the window, or of the whole page."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def pdf(self) -> bytes:
        """The page as it prints, on A4."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69}
        return base64.b64decode(self.ask("Page.printToPDF", printBackground=False, **size)["data"])

    def close(self) -> None:
        """End the browser and its helpers: a group of their own."""
        os.close(self._write)
        os.close(self._read)
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a whole run, every experiment of it."""
    out = tmp_path_factory.mktemp("report")
    return render(load_results(tiny.out / "results.json"), out, run=load_run(tiny.out / "run.json"))


WIDE = """[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.right > innerWidth + 1 && box.width > 0 && getComputedStyle(e).position !== 'absolute' && !e.closest('.scroll, .frame, pre');
}).map(e => e.tagName + ' ' + e.className + ': ' + e.textContent.slice(0, 40))"""


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_loads_whole_and_fits(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.complaints() == []
    images = browser.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt.length])")
    assert len(images) >= 15
    assert all(complete and across > 0 and words > 0 for complete, across, words in images)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("innerWidth") == width  # a page too wide would have made the phone zoom out
    assert browser.evaluate(WIDE) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= browser.evaluate("innerWidth")
    # What is too wide scrolls inside its own box, and the keyboard reaches it.
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.scroll, .frame')].map(e => [e.scrollWidth > e.clientWidth, getComputedStyle(e).overflowX, e.tabIndex])"
    )
    assert any(overflows for overflows, _, _ in boxes) or width == DESKTOP
    assert all(overflow == "auto" and index == 0 for _, overflow, index in boxes)


def test_links_lead_somewhere(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP)
    links = browser.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert len(links) >= 20
    assert all(link.startswith("#") for link in links)  # self-contained
    lost = "[...document.querySelectorAll('a')].filter(a => !document.getElementById(a.getAttribute('href').slice(1))).length"
    assert browser.evaluate(lost) == 0
    assert browser.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == browser.evaluate(
        "document.querySelectorAll('[id]').length"
    )
    for link in (links[0], links[-1]):  # the reader is taken there
        browser.evaluate(f"document.querySelector('a[href=\"{link}\"]').click()")
        top = browser.evaluate(f"document.getElementById('{link[1:]}').getBoundingClientRect().top")
        assert -2 <= top < 844, link
    assert browser.complaints() == []


CONTRAST = """(() => {
  const light = c => c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                      .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const paper = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; }
                       return [255, 255, 255]; };
  let worst = [99, ''];
  for (const e of document.querySelectorAll('p, li, td, th, dt, dd, a, b, h1, h2, h3, summary, caption, span, figcaption, code')) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color).slice(0, 3)), light(paper(e).slice(0, 3))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < worst[0]) worst = [ratio, e.tagName + ' ' + e.className];
  }
  return worst;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_is_legible_light_and_dark(browser: Browser, page: Path, dark: bool) -> None:
    """Text against what is behind it: 4.5 to 1, as WCAG 2.1 (1.4.3) asks."""
    browser.open(page, DESKTOP, dark=dark)
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 3 * 64) == dark
    ratio, where = browser.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    assert browser.complaints() == []


def test_prints_pages_with_content(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP, dark=True)
    sheets = printed(browser.pdf())
    assert 10 <= len(sheets) <= 120
    shown = [sheet.count(b"Tj") + sheet.count(b"TJ") + sheet.count(b" Do") for sheet in sheets]
    assert min(shown) > 0
    assert sum(sheet.count(b" Do") for sheet in sheets) >= browser.evaluate("document.images.length")
    # On paper nothing can be scrolled to: every box shows all it has.
    browser.ask("Emulation.setEmulatedMedia", media="print")
    hidden = "[...document.querySelectorAll('.scroll, .frame')].filter(e => getComputedStyle(e).overflowX !== 'visible').length"
    assert browser.evaluate(hidden) == 0
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def printed(pdf: bytes) -> list[bytes]:
    """What each page of a PDF by Chromium draws: its unpacked content stream."""
    objects = {int(n): body for n, body in re.findall(rb"(?s)(?:^|\n)(\d+) 0 obj\b(.*?)\nendobj", pdf)}
    sheets = []
    for body in objects.values():
        contents = re.search(rb"/Contents (\d+) 0 R", body)
        if re.search(rb"/Type\s*/Page\b", body) and contents:
            stream = re.search(rb"(?s)stream\r?\n(.*)\nendstream", objects[int(contents[1])])
            assert stream is not None
            sheets.append(zlib.decompress(stream[1]))
    return sheets
