#!/usr/bin/env python3
"""A fuzzer: whatever comes from outside may cost itself, but nothing else.

    python3 tests/tools/fuzz.py [--seconds 20] [--seed N] [--only NAME …] [--case NAME:NUMBER]

Odd inputs are made from good ones, and handed to the parts that take them: events, stored events, replies of the
queue, its error texts, spools, quota answers, reply headers, account files, configurations and questions to the API.
An exception that is not documented, an answer of 500 and more, or a value of which nobody knows what became of it is
a failure: it is printed with what repeats it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Callable

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from collecting import QuickStop, Run, config_of  # noqa: E402
from support import NOW, QUOTA, SAMPLES, Site, event, put, reading, rows  # noqa: E402

import usage_dashboard as app  # noqa: E402

RAW = {"@1e400": "1e400", "@-1e400": "-1e400", "@nan": "NaN", "@inf": "Infinity", "@1.0": "1.0", "@-0": "-0",
       "@1e3": "1e3", "@long": "9" * 5000, "@deep": "[" * 3000 + "]" * 3000,
       "@twice": '{"a": 1, "a": [2]}'}  # fmt: skip
NUMBERS = [0, 1, -1, 2, 5, 300, 18000, 604800, 10**9, 10**12, 10**12 + 1, 2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63,
           -(2**63), 2**64, 10**18, 10**30, 10**400, 0.1, -0.0, 1.5, 1e18, 1e308, -1e308, 5e-324]  # fmt: skip
TEXTS = ["", " ", "\0", "\n", "\x1b[2J", "\ud800", "\udfff", "a\ud800@x.com", "\u202e", "é", "😀", "null", "0", "-1",
         "1e999", "١٢", "nan", "inf", "true", "%", "_", "\\", "'", '"', "a@b.cd", "sk-abcdefgh", "x" * 300, "a" * 5000,
         "../../x", "[::1]", "2026-08-22T13:00:00Z", "2099-12-31T23:59:59.999999999+23:59", "0000-00-00T00:00:00Z",
         "127.0.0.1:80"]  # fmt: skip


class Dice(random.Random):
    """Random numbers, and odd things made of them."""

    def value(self, depth: int = 0) -> Any:
        """Return any JSON value."""
        kind = self.randrange(9 if depth < 3 else 7)
        if kind < 2:
            return self.choice(NUMBERS)
        if kind < 4:
            return self.choice(TEXTS)
        if kind == 4:
            return self.choice([None, True, False])
        if kind == 5:
            return self.choice(list(RAW))
        if kind == 6:
            return self.choice(NUMBERS) * self.choice([1, -1]) + self.randrange(3)
        if kind == 7:
            return [self.value(depth + 1) for _ in range(self.randrange(4))]
        return {str(self.choice(TEXTS)): self.value(depth + 1) for _ in range(self.randrange(4))}

    def bent(self, content: Any, times: int = 3) -> Any:
        """Return a copy of a value with up to so many odd places."""
        content = json.loads(json.dumps(content))
        for _ in range(self.randrange(times + 1)):
            holder, key = {"": content}, ""
            while isinstance(holder[key], (dict, list)) and holder[key] and self.random() < 0.85:
                holder = holder[key]
                key = self.choice(list(holder)) if isinstance(holder, dict) else self.randrange(len(holder))
            if holder is None or self.random() < 0.8 or not isinstance(holder, dict) or key == "":
                if key == "" and "" in holder and holder[""] is content:
                    content = self.value()
                else:
                    holder[key] = self.value()
            elif self.random() < 0.5:
                del holder[key]
            else:
                holder[self.choice(TEXTS)] = holder[key]
        return content

    def json(self, content: Any) -> bytes:
        """Write it as JSON, with numbers and shapes that Python would not write."""
        text = json.dumps(content, ensure_ascii=self.random() < 0.7)
        for name, raw in RAW.items():
            text = text.replace(json.dumps(name), raw)
        return text.encode("utf-8", "surrogatepass")

    def damaged(self, data: bytes) -> bytes:
        """Return bytes of which some are cut off, changed or put in, mostly none."""
        for _ in range(self.choice([0, 0, 0, 0, 1, 1, 2, 5])):
            at = self.randrange(len(data) + 1)
            kind = self.randrange(4)
            if kind == 0:
                data = data[:at]
            elif kind == 1:
                data = data[:at] + bytes([self.randrange(256)]) + data[at + 1 :]
            elif kind == 2:
                more = self.choice([b"\0", b"\r\n", b"\n", b"\xff", b"{", b"[", b'"', b"0", b","])
                data = data[:at] + more + data[at:]
            else:
                data = data[:at] + data[self.randrange(len(data) + 1) :][:200] + data[at:]
        return data


GOOD_EVENTS = [json.loads(raw) for raw in SAMPLES]
FAULT = {"type": "t", "code": "c", "message": "m a@b.cd sk-abcdefgh1"}
FAILURE = {"status_code": 429, "body": json.dumps({"error": FAULT})}
HEADERS = {"X-Codex-Plan-Type": ["plus"], "X-Codex-Primary-Used-Percent": ["12"],
           "X-Codex-Primary-Reset-At": [str(int(NOW))], "X-Codex-Primary-Window-Minutes": ["300"],
           "X-Codex-Secondary-Used-Percent": ["1.5"], "X-Codex-Secondary-Window-Minutes": ["10080"],
           "X-Codex-Secondary-Reset-After-Seconds": ["60"], "X-Codex-Bengalfox-Limit-Name": ["Other"],
           "X-Codex-Bengalfox-Primary-Used-Percent": ["3"], "X-Codex-Credits-Balance": ["9"],
           "X-Codex-Credits-Unlimited": ["false"], "X-Codex-Active-Limit": ["codex_bengalfox"],
           "Anthropic-Ratelimit-Unified-Status": ["allowed"], "Anthropic-Ratelimit-Unified-5h-Utilization": ["0.5"],
           "Anthropic-Ratelimit-Unified-5h-Reset": [str(int(NOW) + 60)]}  # fmt: skip


def raw_events(dice: Dice) -> list[Any]:
    """Return a batch as a queue may hand it over."""
    batch: list[Any] = []
    for _ in range(dice.randrange(1, 8)):
        content = dict(dice.choice(GOOD_EVENTS))
        if dice.random() < 0.3:
            content.update(failed=True, fail=dict(FAILURE))
        if dice.random() < 0.3:
            content["response_headers"] = HEADERS
        bent = dice.bent(content)
        kind = dice.randrange(12)
        if kind == 0:
            batch.append(app.Oversized(dice.randrange(10**9)))
        elif kind == 1:
            with contextlib.suppress(ValueError, RecursionError):
                batch.append(json.loads(dice.json(bent).decode("utf-8", "replace")))  # as over HTTP
        else:
            batch.append(dice.damaged(dice.json(bent)))
    return batch


class Fuzzer:
    """All targets, in a folder of their own; each takes dice and raises for what must not be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = app.Store(folder / "usage.db")
        (folder / "site").mkdir()
        self.site = Site(folder / "site")
        put(self.site.store, *(event(NOW - 3600 * n, model=f"m{n % 7}", failed=n % 2) for n in range(50)))
        put(self.site.store, event(app._EARLIEST_AT, model="\ufffd"), event(app._LATEST_AT - 1, source=""))
        self.site.store.save_reading(reading(ts_epoch=NOW - 90))
        names = [name[len("fuzz_") :] for name in dir(self) if name.startswith("fuzz_")]
        self.targets: dict[str, Callable[[Dice], Any]] = {name: getattr(self, f"fuzz_{name}") for name in names}

    def close(self) -> None:
        """Close what was opened."""
        self.site.close()
        self.store.close()

    def fuzz_events(self, dice: Dice) -> None:
        """Parse, account for all, store, and find the same numbers in the database."""
        batch = raw_events(dice)
        parsed = app.parse_events(batch)
        assert len(parsed.events) + len(parsed.rejects) + parsed.ignored == len(batch), "values are missing"
        for reject in parsed.rejects:
            json.loads(reject.event or "0", parse_constant=lambda name: 1 / 0)
            assert "sk-abcdefgh" not in (reject.event or ""), "a secret in a reject"
        assert "sk-abcdefgh" not in "".join(one.error or "" for one in parsed.events), "a secret in an error"
        before = self.store.counts
        assert self.store.store_batch(parsed, before["sequence"] + 1, NOW)
        after = self.store.counts
        assert sum(after[name] - before[name] for name in ("stored", "rejected", "ignored")) == len(batch)
        if dice.random() < 0.02:
            assert self.store.find_faults() == []
            self.store.usage(app.Window(0, 5e9), 86400, 0)

    def fuzz_replies(self, dice: Dice) -> None:
        """Read replies to the end of the stream, which is always told in words."""
        good = [b"$5\r\nhello\r\n", b"$-1\r\n", b"*-1\r\n", b":12\r\n", b"+OK\r\n", b"-ERR no\r\n",
                b"*2\r\n$1\r\na\r\n:1\r\n", b"$0\r\n\r\n", b"*1\r\n" * 6, b"$99999999999\r\n",
                b":" + b"9" * 30 + b"\r\n", b"*100001\r\n", b"HTTP/1.1 400\r\n"]  # fmt: skip
        stream = io.BytesIO(b"".join(dice.damaged(dice.choice(good)) for _ in range(dice.randrange(1, 12))))
        reader = app.RespReader(stream, max_line=64, max_bulk=16, max_skipped=64, max_items=8)
        with contextlib.suppress(app.QueueFault):
            while True:
                at = stream.tell()
                reader.read_reply()
                assert stream.tell() > at, "a reply of nothing"

    def fuzz_errors(self, dice: Dice) -> None:
        """Name a fault for whatever the queue says."""
        said = ["ERR unknown command", "NOAUTH Authentication required.", "WRONGPASS invalid",
                "IP banned due to too many failed attempts. Try again in 29m58s", "ERR invalid management key",
                "again in 99999999h0m0s", "again in 1s"]  # fmt: skip
        text = dice.damaged(dice.choice(said).encode()) + dice.choice(TEXTS).encode("utf-8", "replace")
        fault = app._fault_of_reply(text.decode("utf-8", "replace"))
        assert isinstance(fault, app.QueueFault) and fault.state and "sk-abcdefgh1" not in str(fault)

    def fuzz_spool(self, dice: Dice) -> None:
        """Start on a spool of good, bent and damaged lines: every good batch is stored once, and recording goes on."""
        folder = Path(tempfile.mkdtemp(dir=str(self.folder)))
        spool, expected = app.Spool(folder / "usage.db.spool"), []
        for sequence in range(1, dice.randrange(2, 6)):
            parsed = app.parse_events([json.dumps({**GOOD_EVENTS[0], "request_id": f"good{sequence}"}).encode()])
            start = len((folder / "usage.db.spool").read_bytes()) if sequence > 1 else 0
            spool.append(sequence, parsed)
            expected.append(f"good{sequence}")
            line = (folder / "usage.db.spool").read_bytes()[start:].strip()
            for _ in range(dice.randrange(3)):  # another one, from somebody else
                content = json.loads(line.partition(b" ")[2])
                bent = dice.bent(content[1:], 4)
                content[1:] = bent if isinstance(bent, list) else [bent]
                content[0] = dice.choice([sequence, str(sequence), None, -1, 1.5])
                text = dice.json(dice.choice([content, content, content, dice.value()])).replace(b"good", b"odd-")
                sums = hashlib.sha256(text).hexdigest()[:16].encode()
                with open(folder / "usage.db.spool", "ab") as stream:
                    stream.write(b"\n" + dice.damaged(sums + b" " + text).replace(b"good", b"odd-"))
        with contextlib.closing(app.Store(folder / "usage.db")) as store:
            run = Run(config_of(cliproxy_port=1), store, QuickStop())
            run.wait_for_state("refused", "unreachable")
            run.end()
            found = [row[0] for row in rows(store.path, "SELECT request_id FROM events WHERE request_id LIKE 'good%'")]
            assert sorted(found) == sorted(expected), f"{found} is not {expected}"
            assert store.find_faults() == []
        shutil.rmtree(folder)

    def fuzz_quota(self, dice: Dice) -> None:
        """Parse an answer, store its reading, and answer the page from it."""
        body = dice.damaged(dice.json(dice.bent(dice.choice(QUOTA["samples"]).get("body"), 5)))
        app.classify_failure(dice.choice([401, 402, 403, 404, 429, 500, 502]), body)
        with contextlib.suppress(ValueError, RecursionError, app.QuotaFault):
            self._save(app.parse_quota(_told(body), NOW), json.dumps(app._without_identity(_told(body))))

    def fuzz_headers(self, dice: Dice) -> None:
        """The same from the headers of a reply, as an event brings them."""
        provider = dice.choice(sorted(app.HEADER_READERS))
        content = {**GOOD_EVENTS[0], "provider": provider, "timestamp": "2026-11-01T12:00:00Z", "failed": False}
        content["response_headers"] = dice.bent(HEADERS, 6)
        for one in app.parse_events([dice.json(content)]).events:
            if one.quota_headers:
                self._save(app.parse_quota(app.HEADER_READERS[provider](one.quota_headers), NOW), None)

    def _save(self, parsed: app.Reading, raw_json: str | None) -> None:
        row = app.reading_row(parsed, ("an@example.com", "#3f9a2c"), "plus", NOW - 1, raw_json)
        for window in app.windows_of(row):
            assert window.used_percent is None or 0 <= window.used_percent <= 100, "an impossible percentage"
        self.site.store.save_reading(row, lambda before: app.merge_traffic_reading(row, before, NOW))
        self._ask("/api/quota", 200)

    def fuzz_accounts(self, dice: Dice) -> None:
        """Look through a folder with an odd account file."""
        good = {"type": "codex", "email": "a@b.cd", "account_id": "x", "access_token": "h.e30.s",
                "id_token": "h.eyJhIjoxfQ.s", "expired": "2026-11-01T12:00:00Z", "disabled": False, "proxy_url": "",
                "last_refresh": "x"}  # fmt: skip
        folder = self.folder / "accounts"
        folder.mkdir(exist_ok=True)
        (folder / "codex-good.json").write_text(json.dumps({**good, "email": "good@b.cd"}))
        (folder / "codex-odd.json").write_bytes(dice.damaged(dice.json(dice.bent(good))))
        _, files, _ = app.find_account_files([folder])
        assert any(file.email == "good@b.cd" for file in files), "one file costs another"

    def fuzz_config(self, dice: Dice) -> None:
        """Load a file: settings that are sound, or all faults in one error that repeats no secret."""
        good = json.loads((TESTS.parent / "config.example.json").read_text())
        good.update(management_password="hush-hush-1", dashboard_password="hush-hush-2")
        path = self.folder / "config.json"
        path.write_bytes(dice.damaged(dice.json(dice.bent(good))))
        try:
            config, _ = app.load_config(path, env={})
        except app.ConfigError as error:
            assert "hush" not in str(error), "a secret in a message"
            return
        assert set(vars(config)) == set(good) and config.database_path.is_absolute()
        app.find_account_files(config.auth_dirs())
        with contextlib.suppress(OSError):
            config.database_path.exists()  # a path that no system takes is a fault of the file
        if config.dashboard_host not in ("0.0.0.0", "127.0.0.1"):
            with contextlib.suppress(app.DashboardError):
                app.make_server(config.dashboard_host[:300], 0).server_close()

    def fuzz_api(self, dice: Dice) -> None:
        """Ask with any parameters and headers; what cannot be answered is told in words."""
        good = {"range": ["today", "1h", "all", "90d"], "start": ["0", str(NOW - 9e6), "4102444800"], "end": ["1"],
                "tz_offset": ["0", "345", "-840"], "bucket": ["auto", "hour"], "limit": ["1", "500"],
                "before": [f"{NOW}_3"], "account": ["an@example.com"], "model": ["m1"], "status": ["ok", "failed"],
                "q": ["m", "%"], "force": ["2"]}  # fmt: skip
        told = []
        for _ in range(dice.randrange(6)):
            name = dice.choice(list(good)) if dice.random() < 0.97 else dice.choice(TEXTS)
            value = dice.choice(good.get(name, TEXTS)) if dice.random() < 0.6 else str(dice.value())[:2000]
            told.append(f"{_quoted(dice, name)}={_quoted(dice, value)}")
        path = dice.choice(["/api/summary", "/api/requests", "/api/quota", "/api/health", "/"]) + "?" + "&".join(told)
        names = "If-None-Match Accept-Encoding Authorization Origin Referer Content-Length Host Sec-Fetch-Site".split()
        headers = {name: dice.choice(TEXTS) for name in names if dice.random() < 0.1}
        self._ask(path, None, dice.choice(["GET", "GET", "GET", "HEAD", "POST"]), headers)

    def _ask(self, path: str, status: int | None, method: str = "GET", headers: Any = ()) -> None:
        lines = [f"{method} {path} HTTP/1.0", *(f"{name}: {value}" for name, value in dict(headers).items()), "", ""]
        head = "\r\n".join(lines).encode("utf-8", "surrogatepass").replace(b"\0", b"\x01")
        received = self.site.raw(head)
        reply = http.client.HTTPResponse(_Wire(received), method=method)
        reply.begin()
        body = reply.read()
        assert status in (None, reply.status) and reply.status < 500, f"{reply.status} {body[:200]!r}"
        if reply.status >= 400 and method != "HEAD":
            assert set(json.loads(body)) == {"error", "code"}, body
        elif reply.status == 200 and method != "HEAD" and "json" in reply.headers["Content-Type"]:
            json.loads(body, parse_constant=lambda name: 1 / 0)
        assert "fault=" not in self.site.log.read_text(), self.site.log.read_text()[-500:]


class _Wire(io.BytesIO):
    """Bytes as a socket."""

    def makefile(self, mode: str) -> io.BytesIO:
        return self


def _told(body: bytes) -> Any:
    return json.loads(body.decode("utf-8", "replace"))


def _quoted(dice: Dice, text: str) -> str:
    from urllib.parse import quote

    if dice.random() < 0.1:
        return "".join(c for c in text if c.isascii() and c > " ")
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


def run(folder: Path, seconds: float, seed: int, only: list[str], number: int | None = None) -> tuple[int, list[str]]:
    """Run the targets in turns for so long, or one case; return how many cases there were, and the failures."""
    fuzzer, failures, cases = Fuzzer(folder), [], 0
    names = [name for name in fuzzer.targets if not only or name in only]
    until, first = time.monotonic() + seconds, number or 0
    with contextlib.closing(fuzzer):
        while time.monotonic() < until and len(failures) < 10:
            for name in names:
                try:
                    fuzzer.targets[name](Dice(f"{seed}:{name}:{first}"))
                except Exception:
                    text = traceback.format_exc()
                    failures.append(f"--seed {seed} --case {name}:{first}\n{text[-3000:]}")
                cases += 1
            if number is not None:
                break
            first += 1
    return cases, failures


def main() -> int:
    """Run it and print what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--case", metavar="NAME:NUMBER")
    options = parser.parse_args()
    name, _, number = (options.case or "").partition(":")
    only = [name] if name else options.only
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        cases, failures = run(Path(folder), options.seconds, options.seed, only, int(number) if number else None)
    for failure in failures:
        print(failure)
    print(f"fuzz: seed {options.seed}, {cases} cases, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
