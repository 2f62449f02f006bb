"""A small client of the W3C WebDriver protocol for Chromium, by way of chromedriver.

with Browser() as browser:
    browser.goto("http://127.0.0.1:8320/")
    browser.wait_until("document.querySelector('h1') !== null")
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any, Iterator

from sockets import PATIENCE_S, comes_up
from support import free_port

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-quic",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-proxy-server",
]  # fmt: skip
KEYS = {
    "Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c", "Space": " ", "End": "\ue010", "Home": "\ue011",
    "ArrowLeft": "\ue012", "ArrowRight": "\ue014",
}  # fmt: skip
PRESS = ({"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})

# Asks again at every frame, so that nothing that shows up on the screen is missed.
WAIT_UNTIL = """
const [expression, timeout, done] = arguments;
const ask = new Function('return (' + expression + ');');
const end = performance.now() + timeout;
const look = () => {
  let value = null, fault = null;
  try { value = ask(); } catch (thrown) { fault = String(thrown); }
  if (value) done({value: value instanceof Node ? true : value});
  else if (performance.now() > end) done({fault: fault || 'it is ' + String(value)});
  else requestAnimationFrame(look);
};
look();
"""


class WebDriverError(Exception):
    """What chromedriver answers to a command that it cannot carry out; `code` is its error code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One headless Chromium with one tab; a context manager.

    `width` and `height` are CSS pixels and `scale` is devicePixelRatio.
    """

    START_S = PATIENCE_S
    COMMAND_S = PATIENCE_S + 30

    def __init__(self, width: int = 1440, height: int = 900, accept_lang: str = "en-US", dark: bool = False) -> None:
        self.width = width
        self.height = height
        self.accept_lang = accept_lang
        self.dark = dark
        self.scale = 1.0
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._profile = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._base = ""
        self._session = ""
        self._media: dict[str, str] = {}
        self._print = False

    def __enter__(self) -> Browser:
        self._profile = tempfile.mkdtemp(prefix="browser-")
        try:
            self._start_driver()
            self._open_session()
            self.resize(self.width, self.height)
            self.emulate(dark=self.dark)
            self.goto("about:blank")  # away from the browser's own first page, and its requests
            self.requested_urls()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._session:
            with contextlib.suppress(OSError, WebDriverError):
                self._call("DELETE", "")
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    # -- pages

    def goto(self, url: str) -> None:
        """Load a page and wait for its load event."""
        self._call("POST", "/url", {"url": url})

    @contextlib.contextmanager
    def before_load(self, source: str) -> Iterator[None]:
        """Run a script in every page that is loaded meanwhile, before the page's own."""
        made = self.cdp("Page.addScriptToEvaluateOnNewDocument", source=source)
        try:
            yield
        finally:
            self.cdp("Page.removeScriptToEvaluateOnNewDocument", **made)

    def script(self, source: str, *args: Any) -> Any:
        """Run the body of a function in the page; `arguments` are args, a promise is awaited."""
        return self._call("POST", "/execute/sync", {"script": source, "args": list(args)})

    def run_async(self, source: str, *args: Any) -> Any:
        """Run the body of a function in the page, and return what it hands to its last argument, a function."""
        return self._call("POST", "/execute/async", {"script": source, "args": list(args)})

    def wait_until(self, expression: str, timeout: float = PATIENCE_S) -> Any:
        """Return the expression's first true value; AssertionError when there is none in time."""
        deadline = time.monotonic() + timeout
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                answer = self.run_async(WAIT_UNTIL, expression, left_s * 1000)
            except WebDriverError as fault:
                # The page was left meanwhile: ask the next one.
                if fault.code not in ("javascript error", "unknown error", "stale element reference"):
                    raise
                answer = {"fault": str(fault)}
                if time.monotonic() < deadline:
                    continue
            if "fault" not in answer:
                return answer["value"]
            raise AssertionError(f"not true within {timeout:g} s: {expression} ({answer['fault']})")

    @contextlib.contextmanager
    def other_tab(self) -> Iterator[None]:
        """Open another tab in front of this one, which is hidden meanwhile, and close it at the end."""
        here = self._call("GET", "/window")
        made = self._call("POST", "/window/new", {"type": "tab"})
        self._call("POST", "/window", {"handle": made["handle"]})
        try:
            yield
        finally:
            self._call("DELETE", "/window")
            self._call("POST", "/window", {"handle": here})

    # -- elements

    def find(self, css: str) -> dict[str, str]:
        """Return the first element that matches, to be passed to script()."""
        return self._call("POST", "/element", {"using": "css selector", "value": css})

    def click(self, css: str) -> None:
        """Click as a user does: the element must be visible and not covered."""
        self._call("POST", f"/element/{self.find(css)[ELEMENT]}/click", {})

    def text(self, css: str) -> str:
        """Return the visible text of the first element that matches."""
        return self._call("GET", f"/element/{self.find(css)[ELEMENT]}/text")

    def select(self, css: str, value: str) -> None:
        """Choose an option of a select element by its value."""
        self.click(f'{css} option[value="{value}"]')

    def press(self, *keys: str) -> None:
        """Press keys one after another: names of KEYS, or text to type."""
        codes = [code for key in keys for code in KEYS.get(key, key)]
        actions = [{"type": kind, "value": code} for code in codes for kind in ("keyDown", "keyUp")]
        self._act({"type": "key", "id": "keyboard", "actions": actions})

    def move_to(self, css: str, x: float, y: float) -> None:
        """Move the mouse to an offset in CSS pixels from the top left corner of an element."""
        self.script("arguments[0].scrollIntoView({block: 'nearest', behavior: 'instant'});", self.find(css))
        self._point("mouse", self._move(css, x, y))

    def press_mouse(self) -> None:
        """Press and release the left button where the mouse is."""
        self._point("mouse", *PRESS)

    def tap(self, css: str, x: float, y: float) -> None:
        """Touch an element with a finger, at an offset in CSS pixels from its top left corner."""
        self._point("touch", self._move(css, x, y), *PRESS)

    def _move(self, css: str, x: float, y: float) -> dict[str, Any]:
        look = "const box = arguments[0].getBoundingClientRect(); return [box.left, box.top];"
        left, top = self.script(look, self.find(css))
        return {"type": "pointerMove", "duration": 0, "x": round(left + x), "y": round(top + y)}

    def _point(self, kind: str, *actions: dict[str, Any]) -> None:
        self._act({"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions})

    def _act(self, source: dict[str, Any]) -> None:
        self._call("POST", "/actions", {"actions": [source]})

    # -- the window

    def resize(self, width: int, height: int, scale: float | None = None) -> None:
        """Set the size of the page in CSS pixels; a real window cannot be as narrow as a phone."""
        self.scale = self.scale if scale is None else scale
        size = {"width": width, "height": height, "deviceScaleFactor": self.scale, "mobile": False}
        self.cdp("Emulation.setDeviceMetricsOverride", **size)

    def emulate(self, dark: bool | None = None, reduced_motion: bool | None = None, print: bool | None = None) -> None:
        """Set what the user prefers and the medium; None leaves it as it is."""
        if dark is not None:
            self._media["prefers-color-scheme"] = "dark" if dark else "light"
        if reduced_motion is not None:
            self._media["prefers-reduced-motion"] = "reduce" if reduced_motion else "no-preference"
        if print is not None:
            self._print = print
        features = [{"name": name, "value": value} for name, value in self._media.items()]
        self.cdp("Emulation.setEmulatedMedia", media="print" if self._print else "", features=features)

    def cdp(self, method: str, **params: Any) -> Any:
        """Send a command of the Chrome DevTools Protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": method, "params": params})

    # -- logs

    def console_errors(self) -> list[str]:
        """Return the errors on the console since the last look: exceptions, refused or failed loads."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def requested_urls(self) -> list[str]:
        """Return the URLs asked for since the last look, the pages' own included."""
        entries = self._call("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    # -- chromedriver

    def _start_driver(self) -> None:
        port = free_port()
        self._base = f"http://127.0.0.1:{port}"
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        self._process = subprocess.Popen(
            ["chromedriver", f"--port={port}"], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if not comes_up(self._process, lambda: self._send("GET", "/status")["ready"], self.START_S):
            raise AssertionError("chromedriver does not start")

    def _open_session(self) -> None:
        flags = [*FLAGS, f"--user-data-dir={self._profile}", f"--accept-lang={self.accept_lang}",
                 f"--window-size={self.width},{self.height}"]  # fmt: skip
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": find_browser(), "args": flags},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            "timeouts": {"script": self.COMMAND_S * 1000, "pageLoad": 30_000},
        }
        self._session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._send(method, f"/session/{self._session}{path}", body)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json; charset=utf-8"}
        request = urllib.request.Request(self._base + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=self.COMMAND_S + 10) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as fault:
            with fault:
                value = json.load(fault)["value"]
            raise WebDriverError(value["error"], value["message"].split("\n")[0]) from None
