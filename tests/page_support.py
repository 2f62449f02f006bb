"""The page in a browser, read as a person reads it, and a site with known numbers behind it."""

from __future__ import annotations

import http.server
import json
import re
import threading
import zlib

from support import event, put, reading

import usage_dashboard as app

PAGE = (app.BASE_DIR / "usage-dashboard.html").read_text(encoding="utf-8")
LANGS = ("en", "vi")
HOUR = 3600

# What is drawn, read from the pixels: the plot's edges, the marks under it, and of each bar the heights of its kinds.
CHART = """
const canvas = document.querySelector('#chart');
const {width, height} = canvas;
const k = width / canvas.clientWidth;
const {data} = canvas.getContext('2d').getImageData(0, 0, width, height);
const rgba = (x, y) => data.subarray((y * width + x) * 4, (y * width + x) * 4 + 4);
const inked = (x, y) => rgba(x, y)[3] > 100;
const middle = width >> 1;
const lines = [...Array(height).keys()].filter((y) => {
  for (let x = middle; x < width * .9; x += 1) if (!inked(x, y)) return false;
  return true;
});
const base = Math.max(...lines);
let left = middle, right = middle;
while (inked(left - 1, base)) left -= 1;
while (inked(right + 1, base)) right += 1;
const count = Number(canvas.getAttribute('aria-valuemax')) + 1;
const slot = (right - left) / count;
const legend = [...document.querySelectorAll('#legend button')].map((b) =>
  [b.dataset.kind, getComputedStyle(b.firstChild).backgroundColor.match(/\\d+/g).map(Number)]);
const kindAt = (x, y) => {
  const pixel = rgba(x, y);
  const found = pixel[3] > 100 && legend.find(([, colour]) => colour.every((part, i) => Math.abs(part - pixel[i]) < 3));
  return found ? found[0] : null;
};
const faint = new Set();
const bars = [...Array(count).keys()].map((index) => {
  const x = Math.round(left + (index + .5) * slot), bar = {};
  for (let y = 0; y < height; y += 1) {
    const kind = kindAt(x, y);
    if (kind) bar[kind] = (bar[kind] ?? 0) + 1 / k;
    if (kind && rgba(x, y)[3] < 200 && y < base) faint.add(index);
  }
  return bar;
});
const marks = [];
for (let index = 0; index < count; index += 1) {
  const x = Math.round(left + index * slot), y = base + Math.round(3 * k);
  if (inked(x - 1, y) || inked(x, y) || inked(x + 1, y)) marks.push(index);
}
return {left: left / k, slot: slot / k, top: Math.min(...lines) / k, base: base / k, bars, marks, faint: [...faint]};
"""


def dictionary():
    """Return each word's key with its English and its Vietnamese text."""
    block = re.search(r'<script type="text/plain" id="i18n">\n(.*?)\n *</script>', PAGE, re.S).group(1)
    return {key: texts for key, *texts in (line.strip().split(" | ") for line in block.split("\n"))}


WORDS = dictionary()


def fill(site):
    """Store three requests, of which one failed, and the quota of four accounts."""
    b = {"source": "b@example.com", "auth_index": "bb"}
    put(
        site.store,
        event(at=site.now - 0.2 * HOUR, **tokens(90_122, 88_000, 3_021, 1_990, 93_143)),
        event(at=site.now - 2 * HOUR, model="gpt-5.5", **b, **tokens(4_210, 2_048, 950, 512, 5_160)),
        event(at=site.now - 2.1 * HOUR, **b, **tokens(0, 0, 0, 0, 0), failed=1, status_code=429,
              error="429 usage_limit_reached: The usage limit"),
    )  # fmt: skip
    save_quota(site, "an@example.com", 62, 5)
    save_quota(site, "b@example.com", 20, 71, state="limited", limit_reached=1)
    save_quota(site, "weekly@example.com", None, 88)
    site.store.save_quota_state("old@example.com", "#old", "plus", "relogin", "sign in again", site.now)


def tokens(*numbers):
    """Name five sums as an event does."""
    names = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "total_tokens")
    return dict(zip(names, numbers))


def save_quota(site, email, five, week, **changes):
    """Store a reading one minute old, with what is left of the two windows."""
    windows, columns = [], {}
    both = (("5h", "primary", 18000, five, 2), ("7d", "secondary", 604800, week, 96))
    for label, place, seconds, left, hours in both:
        used = None if left is None else 100 - left
        reset_at = None if left is None else app.utc_text(site.now + hours * HOUR)
        facts = {"used_percent": used, "remaining_percent": left, "reset_at": reset_at}
        columns.update({f"{place}_{name}": value for name, value in facts.items()})
        if left is not None:
            windows.append({"label": label, "seconds": seconds, "meter": None, **facts})
    tag = f"#{zlib.crc32(email.encode()):08x}"
    row = {"email": email, "account_id_tag": tag, "ts_epoch": site.now - 60, "windows": json.dumps(windows)}
    site.store.save_reading(reading(**row, **columns, **changes))


def many(site, count):
    """Store requests ten seconds apart, each with other figures."""
    put(site.store, *[event(at=site.now - 30 - 10 * n, input_tokens=1000 + n, total_tokens=1020 + n, request_id=f"r{n}")
                      for n in range(count)])  # fmt: skip


def set_state(site, state, **changes):
    """Let the collector be in a state, with the program's own words for it."""
    site.status.update({"state": state, "message": app.STATE_REMEDIES[state], **changes})


class Between:
    """Stand between the browser and a dashboard.

    `changes` edit the answer of a path, `faults` take its place: functions of the handler, which has reply().
    """

    def __init__(self, site):
        self.changes, self.faults, self.asked = {}, {}, []
        between = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.partition("?")[0]
                between.asked.append(self.path)
                fault = between.faults.get(path + "?force=1" if "force=1" in self.path else path)
                if fault:
                    return fault(self)
                answer, body = site.ask(self.path)
                if path in between.changes:
                    content = json.loads(body)
                    between.changes[path](content)
                    body = json.dumps(content).encode()
                kept = {name: answer.headers[name] for name in ("Content-Type", "Content-Security-Policy")}
                self.reply(answer.status, body, **kept)

            def reply(self, status, body, **headers):
                self.send_response(status)
                for name, text in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), text)
                self.end_headers()
                self.wfile.write(body)

            def refuse(self, status, code, **headers):
                self.reply(status, json.dumps({"error": "said in English", "code": code}).encode(), **headers)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def change_quotas(self, **of_accounts):
        """Edit the quota rows by the name before the @ of their address: with a dict, or a function of the row."""

        def change(body):
            for row in body["quotas"]:
                edit = of_accounts.get(row["email"].partition("@")[0], {})
                edit(row) if callable(edit) else row.update(edit)

        self.changes["/api/quota"] = change

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Page:
    """The page in the browser, which it can do all that a Browser can; what goes wrong in it fails the test."""

    def __init__(self, browser, site):
        self.browser, self.site, self.hosts, self.faults_expected = browser, site, set(), False

    def __getattr__(self, name):
        return getattr(self.browser, name)

    def open(self, query="?range=24h", server=None, fresh=True, ready=True):
        """Load it as a first visitor, or with `fresh=False` as one who was here; returns itself."""
        host = f"http://127.0.0.1:{(server or self.site).port}/"
        self.hosts.add(host)
        if fresh:
            self.browser.goto(host + "favicon.ico")  # of the same origin, without the page
            self.browser.script("localStorage.clear()")
            self.browser.console_errors()
        self.browser.goto(host + query)
        if ready:
            self.wait_until("document.querySelector('#kpi-requests').title")
            self.wait_until("!document.body.classList.contains('booting')")
        return self

    def js(self, expression, *arguments):
        """Return the value of an expression in the page."""
        return self.browser.script(f"return {expression}", *arguments)

    def all(self, css, expression="e.textContent"):
        """Return the text, or another expression, of every element `e` that matches."""
        return self.js(f"[...document.querySelectorAll(arguments[0])].map((e) => {expression})", css)

    def one(self, css, expression="e.textContent"):
        """Return the same of the first one."""
        return self.js(f"((e) => {expression})(document.querySelector(arguments[0]))", css)

    def wait_for(self, css, expression):
        """Wait until an expression of the first element `e` that matches is true."""
        self.wait_until(f"((e) => e && ({expression}))(document.querySelector({json.dumps(css)}))")

    def wait_for_text(self, css, text):
        """Wait until the first element that matches has this text somewhere in it."""
        self.wait_for(css, f"e.textContent.includes({json.dumps(text)})")

    def wait_for_requests(self, count):
        """Wait until the figure of the requests is this one."""
        self.wait_for("#kpi-requests", f"e.title === '{count:,}'")

    def wait_for_rows(self, count):
        """Wait until the list of requests has so many rows."""
        self.wait_until(f"document.querySelectorAll('#requests tr[data-id]').length === {count}")

    def speak(self, lang):
        """Switch the language."""
        self.click(f"#lang-{lang}")
        self.wait_until(f"document.documentElement.lang === '{lang}'")

    def picked(self, name):
        """Return what a select of the filter line shows."""
        return self.one(f"#f-{name}", "e.selectedOptions[0].textContent")

    def pick(self, name, begin):
        """Choose in a select of the filter line what begins like this."""
        self.script("""
          const [e, begin] = arguments;
          e.selectedIndex = [...e.options].findIndex((o) => o.text.startsWith(begin));
          e.dispatchEvent(new Event('change'));""", self.find(f"#f-{name}"), begin)  # fmt: skip

    def figure(self, name):
        """Return a figure exactly."""
        return int(self.one(f"#kpi-{name}", "e.title").replace(",", ""))

    def account(self, email, expression="e.innerText.replace(/\\s+/g, ' ')"):
        """Return the words of an account's row, or another expression of it, `e`."""
        return self.one(f"#accounts tr:is([data-email='{email}'], [data-account='{email}'])", expression)

    def chart(self):
        """Return what the canvas shows, see CHART; lengths are CSS pixels."""
        return self.browser.script(CHART)

    def hover(self, index):
        """Put the mouse on a bar, and return what is read out."""
        drawn = self.chart()
        self.move_to("#chart", drawn["left"] + (index + 0.5) * drawn["slot"], drawn["top"] + 12)
        self.wait_for("#chart", f"e.getAttribute('aria-valuenow') === '{index}'")
        return self.text("#chart-readout")

    def buckets(self):
        """Return the rows of the table behind the canvas as (time, requests, tokens, failed), unknown ones as None."""
        rows = self.all("#chart-body tr", "[...e.cells].map((c) => c.textContent.replaceAll(',', ''))")
        times = self.all("#chart-body th")
        return [
            (time, *(None if row[i] == "—" else int(row[i]) for i in (1, 2, 8))) for time, row in zip(times, rows)
        ]

    def check(self):
        errors = self.browser.console_errors()
        if self.faults_expected:  # the browser notes each failed load itself
            errors = [error for error in errors if "Failed to load resource" not in error]
        assert errors == []
        others = [url for url in self.browser.requested_urls() if not url.startswith((*self.hosts, "data:"))]
        assert others == []
