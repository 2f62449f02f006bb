#!/usr/bin/env python3
"""CLIProxyAPI Usage Dashboard: collect, store and show the usage of a CLIProxyAPI account pool.

One process takes usage records off the proxy's Redis-compatible queue, keeps them in SQLite and serves one
page with its JSON API. Only Python's standard library is needed. Banners name the sections and what each
holds; a section uses only those above it.
"""

from __future__ import annotations

import base64
import csv
import errno
import gc
import gzip
import hashlib
import hmac
import io
import itertools
import json
import math
import operator
import os
import queue
import random
import re
import select
import signal
import socket
import sqlite3
import stat
import struct
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict, deque, namedtuple
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPSConnection, IncompleteRead, responses
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Callable, Collection, ContextManager, Iterable, Iterator, Mapping, NamedTuple, Sequence, Tuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

__version__ = "3.1.0"
BASE_DIR = Path(__file__).resolve().parent

# -------------------- base: errors, log, times, back-off, private files, masks and scrubbing of texts


class DashboardError(Exception):
    """A fault in words for people: what is wrong and what to do."""

    exit_code = 1
    http_status = 500
    code = "internal_error"


class ApiError(DashboardError):
    """Report what is not answered or done, with the status, the stable code and the headers of the answer."""

    def __init__(self, http_status: int, code: str, message: str, headers: Mapping[str, str] = {}):
        super().__init__(message)
        self.http_status, self.code, self.headers = http_status, code, headers
        self.exit_code = 2 if http_status == 400 else 1  # the command line asked for it


class Log:
    """Write one flushed line per event to a stream (stdout); values must be free of keys, tokens and mails."""

    def __init__(self, stream=None):
        self._stream = stream if stream is not None else sys.stdout
        self._last: dict[str, dict[str, Any]] = {}
        self._lock, self._dropped = threading.Lock(), 0

    def line(self, text: str) -> None:
        """Write a line, or drop and count it where nobody reads (a full pipe); a broken stream is no fault either."""
        with self._lock:
            with suppress(OSError, ValueError):  # not all that can be written to can be asked whether it takes more
                if not select.select([], [self._stream], [], 0)[1]:
                    self._dropped += 1
                    return
            told, self._dropped = f"log dropped={self._dropped}\n" if self._dropped else "", 0
            with suppress(OSError, ValueError):
                # A pipe that takes more takes 4 KB, and blocks for what is longer.
                print(told + text[:1000], file=self._stream, flush=True)

    def once(self, name: str, **values: Any) -> None:
        """Write an event unless the last one of its name had the same values."""
        if self._last.get(name) != values:
            self._last[name] = values
            self.event(name, **values)

    def event(self, name: str, **values: Any) -> None:
        """Write ``name key=value …``; values with spaces are quoted."""
        texts = {key: str(value) for key, value in values.items()}
        quoted = {key: json.dumps(text, ensure_ascii=False) for key, text in texts.items() if re.search(r'[\s"]', text)}
        self.line(" ".join([name, *map("=".join, {**texts, **quoted}.items())]))


_HOUR_MINUTE = r"(?:[01]\d|2[0-3]):[0-5]\d"
_RFC3339 = re.compile(
    rf"(\d\d\d\d-\d\d-\d\d[Tt ]{_HOUR_MINUTE}):([0-5]\d(?:\.\d{{1,9}})?)([Zz]|[+-]{_HOUR_MINUTE})\Z", re.ASCII
)
_EARLIEST_AT = 1577836800.0  # 2020-01-01, before which no proxy of this kind existed
_LATEST_AT = 4102444800.0  # 2100-01-01


def cache(values: dict[Any, Any], key: Any, value: Any, limit: int = 4096) -> Any:
    """Cache an expensive value and return it; a full cache is emptied."""
    if len(values) >= limit:
        values.clear()
    values[key] = value
    return value


def parse_time(text: str) -> tuple[float, str]:
    """Parse RFC 3339 text into (epoch seconds, UTC text to the microsecond). ValueError also outside 2020 to 2100."""
    match = _RFC3339.match(text)
    if match is None:
        raise ValueError("not an RFC 3339 time")
    minute, seconds, zone = match.groups()
    epoch, utc = _read_minute(minute, zone)
    return epoch + float(seconds), f"{utc}{seconds[:2]}.{seconds[3:9]:0<6}Z"


@lru_cache(maxsize=500)
def _read_minute(minute: str, zone: str) -> tuple[int, str]:
    """Return a minute's epoch second and its UTC text up to the seconds; events of one minute share this work."""
    at = datetime.fromisoformat(minute + zone.upper().replace("Z", "+00:00"))
    epoch = int(at.timestamp())
    if not _EARLIEST_AT <= epoch < _LATEST_AT:
        raise ValueError("outside 2020 to 2100")
    return epoch, f"{at.astimezone(timezone.utc):%Y-%m-%dT%H:%M:}"


def utc_text(epoch_s: float | None) -> str | None:
    """Format epoch seconds as ISO UTC text to the second; None stays None."""
    return None if epoch_s is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch_s))


def local_minute(epoch_s: float) -> str:
    """Format epoch seconds as this machine's local time, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(epoch_s))


def monotonic_s() -> float:
    """Return monotonic seconds, counting time asleep where the OS supports it (CLOCK_BOOTTIME)."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def backoff(first_s: float = 1.0, limit_s: float = 60.0, jitter=random.random) -> Iterator[float]:
    """Yield waits that double from ``first_s`` to ``limit_s`` seconds, each cut by up to a quarter at random."""
    while True:
        yield first_s * (1 - 0.25 * jitter())
        first_s = min(first_s * 2, limit_s)


def make_private(path: Path) -> None:
    """Create the file if it is missing, 0600 and, by root, for its folder's owner; another user's stays as it is."""
    is_new = not path.exists()
    os.close(os.open(str(path), os.O_RDWR | os.O_CREAT, 0o600))
    with suppress(PermissionError):  # check names a file that others can read
        os.chmod(str(path), 0o600)
        if is_new and hasattr(os, "geteuid") and os.geteuid() == 0:
            folder = path.parent.stat()
            os.chown(str(path), folder.st_uid, folder.st_gid)


def where_raised(error: BaseException) -> str:
    """Describe an unexpected exception by type and line only: its message may quote user data."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{type(error).__name__} at line {trace.tb_lineno if trace else 0}"


def short_tag(*parts: str) -> str:
    """Return six hex digits that are the same for the same text and do not reveal it."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:6]


def os_reason(error: BaseException) -> str:
    """Return an operating system's error in its own short words, without addresses or paths."""
    if isinstance(error, (socket.timeout, TimeoutError)):
        return "no answer in time"
    if isinstance(error, (socket.gaierror, TypeError, UnicodeError)):  # two of them for what can be no name
        return "the name is unknown"
    return getattr(error, "strerror", None) or type(error).__name__


def within(deadline_s: float, call: Callable[..., Any], *values: Any, stop: Any = None) -> Any:
    """Return what a call returns, or raise what it raises; TimeoutError where it takes longer or a stop comes."""
    outcomes: list[Any] = []

    def run() -> None:
        try:
            outcomes.append((call(*values), None))
        except Exception as error:  # raised below, in the caller's thread
            outcomes.append((None, error))

    # A socket's timeout begins again with every byte, and looking up a name has none.
    thread = threading.Thread(target=run, name=call.__name__, daemon=True)
    thread.start()
    ends_at = time.monotonic() + deadline_s
    while thread.is_alive() and time.monotonic() < ends_at and not (stop and stop.is_set()):
        thread.join(min(0.2, deadline_s) if stop else deadline_s)
    if not outcomes:
        raise TimeoutError
    result, error = outcomes[0]
    if error is not None:
        raise error
    return result


_MAIL = re.compile(r"[^@\s]{1,64}@[^@\s]+\.[^@\s]+\Z")


def looks_like_mail(text: str) -> bool:
    """Return whether a source is an e-mail address, the only kind that may be stored as sent."""
    return len(text) <= 254 and _MAIL.match(text) is not None


def mask_key(text: str) -> str:
    """Mask what may be a key: its ends and a stable tag, or the tag alone where the ends would reveal too much."""
    if not text:
        return ""
    tag = short_tag(text)
    return f"{text[:3]}…{text[-4:]} #{tag}" if len(text) >= 16 else f"… #{tag}"


def tag_of_mask(mask: str) -> str:
    """Return the tag of a masked key, which all masks of one key share; a mask that has none is its own."""
    return mask[-7:] if re.search(r"#[0-9a-f]{6}\Z", mask) else mask


def mask_mail(mail: str, others: Iterable[str] = ()) -> str:
    """Shorten an address to a beginning that tells it from others: ``an.nguyen@x.com`` becomes ``a***@x.com``."""
    name, at, domain = mail.partition("@")
    names = [other.partition("@")[0] for other in others if other != mail and other.partition("@")[2] == domain]
    length = next((n for n in range(1, len(name)) if not any(one.startswith(name[:n]) for one in names)), len(name))
    return f"{name[:length]}***@{domain}" if at else "***"


def _printable(text: str) -> str:
    """Replace what neither SQLite's shell nor a terminal takes: control characters and lone surrogates."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


# In this order. Each tries a run of letters once, from its beginning, so that no text takes more than linear time.
_SECRETS = (
    re.compile(r"(?<![^\s<>\"'])@*[^\s@<>\"']+@[^\s<>\"']*\.[A-Za-z]{2,}"),  # mails
    re.compile(  # long runs with a digit
        r"(?<![A-Za-z0-9_\-+/=.])(?=[A-Za-z0-9_\-+/=.]{20})[A-Za-z_\-+/=.]*\d[A-Za-z0-9_\-+/=.]*", re.ASCII
    ),
    re.compile(
        r"\b(?:(?:sk|pk|rk|key|org|proj|user|acct|ghp|xai)[-_]|AIza|ya29|eyJ)[-_.A-Za-z0-9]{5,}"  # keys that begin so
        r"|\b\d{1,3}(?:\.\d{1,3}){3}\b|(?<![\w:])(?:[0-9a-fA-F]{0,4}:){3,7}[0-9a-fA-F]{0,4}(?![\w:])"  # addresses
    ),
)


def without_secrets(text: str, limit: int = 160) -> str:
    """Return a sentence without mails, keys, long ids and addresses, at most ``limit`` characters long."""
    text = text[:4096]
    for pattern in _SECRETS:
        text = pattern.sub("…", text)
    short = " ".join(text.split())
    return _printable(short if len(short) <= limit else short[: limit - 1] + "…")


_LONGEST_ERROR = 256 * 1024


def _json_error(body: Any) -> tuple[str, str]:
    """Return (code, message) of a body in the error shapes of OpenAI, Claude and Gemini; empty where there is none."""
    content: Any = None
    if isinstance(body, str) and len(body) <= _LONGEST_ERROR and body.lstrip().startswith(("{", "[")):
        with suppress(ValueError, RecursionError):
            content = json.loads(body)
    if isinstance(content, list) and content:
        content = content[0]
    if not isinstance(content, dict):
        return "", ""
    error = next((content[name] for name in ("error", "detail") if content.get(name)), content)
    if not isinstance(error, dict):
        return "", error if isinstance(error, str) else ""
    words = [error.get(name) for name in ("code", "status", "type", "message")]
    code, state, kind, message = (word if isinstance(word, str) else "" for word in words)
    return code or kind or state, message


def _finite(value: Any) -> float | None:
    """Return a number, also from a text that is one; None for anything else, NaN and infinity included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    with suppress(ValueError, OverflowError):
        return float(value) if abs(float(value)) < 1e18 else None
    return None


# -------------------- config: settings from defaults, file, environment and flags, all faults in one error


class ConfigError(DashboardError):
    """Report all faults of the configuration at once."""

    exit_code = 2

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("\n".join(["The configuration has faults:", *(f"  - {fault}" for fault in faults)]))


COLLECT_MODES = ("auto", "pop", "http", "subscribe")
PRICE_KINDS = ("input", "cached", "cache_write", "output")


def _number_from(low: float, high: float, default: float) -> Any:
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class Config:
    """The effective settings; the README's table says what each key means."""

    cliproxy_host: str = "127.0.0.1"
    cliproxy_port: int = _number_from(1, 65535, 6379)
    cliproxy_tls: bool = False
    management_password: str = field(default="", repr=False)
    queue_key: str = "usage"
    collect_mode: str = "auto"
    poll_interval_seconds: float = _number_from(0.1, 3600, 2)
    quota_refresh_seconds: int = _number_from(0, 86400, 300)
    auth_dir: str = "~/.cliproxyapi"
    database: str = "usage.db"
    retention_days: int = _number_from(0, 36500, 0)
    names: Mapping[str, str] = field(default_factory=dict)  # by tag or mail in small letters
    prices: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    alert_urls: Sequence[str] = field(default_factory=list, repr=False)
    alert_below_percent: int = _number_from(1, 99, 20)
    dashboard_host: str = "0.0.0.0"
    dashboard_port: int = _number_from(0, 65535, 8320)
    dashboard_password: str = field(default="", repr=False)

    @property
    def has_default_queue(self) -> bool:
        """Return whether host and port were left alone, so that the proxy's own port may be tried too."""
        return (self.cliproxy_host, self.cliproxy_port) == (Config.cliproxy_host, Config.cliproxy_port)

    @property
    def database_path(self) -> Path:
        """Return the absolute path of the database; a relative name counts from the script's folder."""
        return BASE_DIR / os.path.expanduser(self.database)

    def auth_dirs(self) -> list[Path]:
        """Return the folders to look for account files in; the first that has any is the one to use."""
        others = ["~/.cli-proxy-api"] if self.auth_dir == Config.auth_dir else []
        return [Path(os.path.expanduser(name)) for name in (self.auth_dir, *others)]


_NAME = re.compile(r"[^\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]{1,60}")  # nothing that moves other text
_NAMED = re.compile(r"#[0-9a-f]{6}|[^@\s]{1,64}@[^@\s]+\.[^@\s]+( #[0-9a-f]{6})?")


def _faults_of_names(names: Any) -> Iterator[str]:
    """Yield what is wrong with the owner's names for keys and accounts."""
    if not isinstance(names, dict):
        yield 'must be an object, such as {"#3f9a2c": "An\'s laptop", "ops@example.org": "Ops"}'
        return
    for target, name in names.items():
        if not _NAMED.fullmatch(target.lower()):
            yield f'has "{target}", which must be a key\'s tag ("#3f9a2c"), a mail, or both ("ops@example.org #1c9e40")'
        if not isinstance(name, str) or not re.fullmatch(_NAME, name.strip()):
            yield f'must give "{target}" a name of 1 to 60 letters in double quotes, on one line'
    words = Counter(str(word).strip().lower() for item in names.items() for word in item)
    yield from (f'has "{word}" twice; each name must tell whose it is' for word, count in words.items() if count > 1)


def _price_fault(prices: Any) -> str | None:
    form = '{"gpt-5.4": {"input": 2.5, "cached": 0.25, "cache_write": 2.5, "output": 15}}, in USD for a million tokens '
    form += "from 0 to 1000000 without quotes, where cached and cache_write may be missing"
    if not isinstance(prices, dict):
        return f"must be of the form {form}"
    wrong = []
    for model, price in prices.items():
        for kind, usd in {"input": None, "output": None, **(price if isinstance(price, dict) else {})}.items():
            is_price = type(usd) in (int, float) and 0 <= usd <= 1e6
            if not (kind in PRICE_KINDS if is_price else usd is None and kind in ("cached", "cache_write")):
                wrong.append(f"{json.dumps(kind)} of {json.dumps(model)}")
    return f"has no allowed value for {', '.join(wrong)}; the form is {form}" if wrong else None


def _fault_of(key: str, value: Any) -> str | None:
    """Return what is wrong with the value of a known key; None where nothing is."""
    if key == "names":
        return "; it ".join(_faults_of_names(value)) or None
    if key == "prices":
        return _price_fault(value)
    low, high = Config.__dataclass_fields__[key].metadata.get("range", (None, None))
    if low is not None:
        kind, types = ("number", (int, float)) if isinstance(low, float) else ("whole number", int)
        is_number = isinstance(value, types) and not isinstance(value, bool)
        return None if is_number and low <= value <= high else f"must be a {kind} from {low} to {high}, without quotes"
    if key == "cliproxy_tls":
        return None if isinstance(value, bool) else "must be true or false, without quotes"
    if key == "collect_mode":
        modes = ", ".join(f'"{mode}"' for mode in COLLECT_MODES)
        return None if value in COLLECT_MODES else f"must be one of {modes}"
    if key == "alert_urls":
        return _fault_of_urls(value)
    if not isinstance(value, str):
        return "must be a text in double quotes"
    if re.search(r"[\0-\x1f\x7f\ud800-\udfff]", value):
        return "must not hold line breaks or other control characters"
    if not value.strip() and not key.endswith("_password"):
        return "must not be empty"
    if key.endswith("_host") and re.search(r"[/\s]|\A[^:]+:\d+\Z", value.strip()):
        return 'must be a host name or address alone, such as "127.0.0.1", without http://, port, path and spaces'
    return None


def _fault_of_urls(value: Any) -> str | None:
    """Return what is wrong, without the addresses, which are secrets."""
    if not isinstance(value, list):
        return 'must be a list of addresses, ["https://…"]'
    for number, url in enumerate(value, 1):
        with suppress(ValueError):
            parts = urlsplit(url if isinstance(url, str) and re.match(r"[!-~]+\Z", url) else "")
            if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
                continue
        return f"must hold http:// or https:// addresses without spaces and line breaks; number {number} is none"
    return None


def load_config(
    path: Path | None = None, env: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """Return settings and warnings; a named file must exist. Raises ConfigError with all faults in one message."""
    faults: list[str] = []
    warnings: list[str] = []
    values: dict[str, Any] = {}
    shown = path if path is not None else BASE_DIR / "config.json"
    env = os.environ if env is None else env
    entries = [(str(shown), *item) for item in _read_config_file(shown, path is not None, faults).items()]
    names = [name for name in ("CLIPROXY_MANAGEMENT_PASSWORD", "MANAGEMENT_PASSWORD") if env.get(name)]
    entries += [(f"the environment variable {name}", "management_password", env[name]) for name in names[:1]]
    entries += [("the command line", *item) for item in (flags or {}).items() if item[1] is not None]
    known = [*asdict(Config()), "management_key"]
    for where, key, value in entries:
        name = "management_password" if key == "management_key" else key
        fault = _fault_of(name, value) if key in known else None
        if key not in known:
            import difflib

            close = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            warnings.append(f'{where}: the key "{key}" is unknown and ignored{hint}')
        elif fault:
            faults.append(f'{where}: "{key}" {fault}')
        else:
            is_host = name.endswith("_host")  # an address of version 6 may stand in brackets
            values[name] = re.sub(r"^\[(.*)\]$", r"\1", value.strip()) if is_host else value
    values["names"] = _by_target(values.get("names", {}))
    config = Config(**values)
    own = (config.dashboard_host, "localhost", "127.0.0.1", "::1")
    for number, url in enumerate(map(urlsplit, config.alert_urls), 1):
        if url.hostname in own and (url.port or {"http": 80, "https": 443}[url.scheme]) == config.dashboard_port:
            faults.append(f'"alert_urls": number {number} is the address of this dashboard itself; name who is told')
    if faults:
        raise ConfigError([*faults, *warnings])  # which often name the cause
    return config, warnings


def _read_config_file(path: Path, required: bool, faults: list[str]) -> dict[str, Any]:
    content, fault = {}, None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        fault = "does not exist; copy config.example.json there or leave out --config" if required else None
    except (OSError, UnicodeDecodeError) as error:
        fault = f"cannot be read: {getattr(error, 'strerror', 'it is not UTF-8 text')}"
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno} column {error.colno}: {error.msg}" if hasattr(error, "lineno") else ""
        fault = f"is not valid JSON{where}; compare it with config.example.json"
    if not isinstance(content, dict):
        content, fault = {}, "must hold one JSON object, { … }"
    if fault:
        faults.append(f"{path} {fault}")
    return content


def _by_target(names: Mapping[str, str]) -> dict[str, str]:
    return {target.lower(): name.strip() for target, name in names.items()}


class Names:
    """The owner's names by tag or mail, read again when the config file changes; one with faults changes nothing."""

    def __init__(self, by_target: Mapping[str, str] = {}, path: Path | None = None, log: Log | None = None):
        self.by_target, self.version = by_target, 0
        self._path, self._log, self._seen = path, log or Log(), None
        self._lock = threading.Lock()  # answers made at once wait for the one that reads

    def look(self) -> None:
        """Read the file again if it is another one than at the last look."""
        with self._lock:
            seen, faults = None, []
            with suppress(OSError, AttributeError):  # there is no file
                status = self._path.stat()
                seen = (status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return
            self._seen = seen
            names = _read_config_file(self._path, False, faults).get("names", {})
            faults += [f'{self._path}: "names" {fault}' for fault in _faults_of_names(names)]
            if faults:
                self._log.line(f"warning: {faults[0]}; the names stay as they were")
            elif _by_target(names) != self.by_target:
                self.by_target = _by_target(names)
                self.version += 1


# -------------------- resp: the wire protocol of the queue: encoder, reader, client


class QueueFault(DashboardError):
    """The queue cannot be read; ``state`` is the collector's state that shows it to people."""

    state = "unreachable"

    def __init__(
        self, message: str, state: str | None = None, is_no_failed_login: bool = False, lasts_s: float | None = None
    ):
        super().__init__(message)
        self.state, self.lasts_s = state or self.state, lasts_s  # nothing is sent before so many seconds have passed
        self.held: Source | None = None  # whose connection stays open, since its end tells of a restart
        self.is_no_failed_login = is_no_failed_login  # for sure; a key without an answer may have been counted as wrong


class Misconfigured(QueueFault):
    """A fault whose own words say what to change."""


class ConnectionClosed(QueueFault):
    """The end of the stream."""

    state = "closed"

    def __init__(self):
        super().__init__("the queue closed the connection")


class NotResp(QueueFault):
    """Bytes that are no RESP reply; an HTTP answer means a reverse proxy in front of the queue."""

    state = "not_resp"


class ErrorReply(str):
    """The text of a ``-…`` reply; a value, since one of many pipelined replies may be an error."""


class Oversized(int):
    """A bulk string over the cap: its length in bytes; its content was skipped."""


def encode_command(*words: Any) -> bytes:
    """Encode one command as a RESP array of bulk strings; words are bytes, text (sent as UTF-8) or numbers."""
    encoded = [word if isinstance(word, bytes) else str(word).encode("utf-8") for word in words]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(data), data) for data in encoded)


class RespReader:
    """Read RESP2 replies, each one whole: bytes, str, int, list, None, ErrorReply or Oversized. Limits in bytes."""

    def __init__(self, stream, max_line=64 * 1024, max_bulk=8 << 20, max_skipped=512 << 20, max_items=100_000):
        self._stream, self._max_line, self._max_bulk = stream, max_line, max_bulk
        self._max_skipped, self._max_items = max_skipped, max_items

    def read_reply(self, depth: int = 0) -> Any:
        """Read one whole reply; the commonest kind, a bulk string, is looked at first."""
        line = self._read_line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return self._read_bulk(_reply_number(rest))
        if kind == b"+":
            return rest.decode("utf-8", "replace")
        if kind == b"-":
            return ErrorReply(rest.decode("utf-8", "replace"))
        if kind == b":":
            return _reply_number(rest)
        if kind == b"*":
            count = _reply_number(rest)
            if count == -1:
                return None
            if not 0 <= count <= self._max_items or depth >= 100:
                raise NotResp(f"the queue announced a list of {count} items at depth {depth}")
            return [self.read_reply(depth + 1) for _ in range(count)]
        raise NotResp("the queue sent bytes of another protocol instead of a RESP reply")

    def _read_line(self) -> bytes:
        line = self._stream.readline(self._max_line)
        if line.startswith((b"HTTP/", b"<")):
            raise NotResp("the queue sent an HTTP answer instead of a RESP reply", is_no_failed_login=True)
        if not line.endswith(b"\r\n"):
            if len(line) >= self._max_line or line.endswith(b"\n"):
                raise NotResp("the queue sent a line that is too long for a RESP reply, or does not end like one")
            raise ConnectionClosed
        return line[:-2]

    def _read_bulk(self, length: int) -> Any:
        if length == -1:
            return None
        if not 0 <= length <= self._max_skipped:
            raise NotResp(f"the queue announced a value of {length} bytes")
        left = length + 2  # with the end of the line
        while length > self._max_bulk and left > 2:
            piece = self._stream.read(min(left - 2, 64 * 1024))
            if not piece:
                raise ConnectionClosed
            left -= len(piece)
        data = self._stream.read(left)
        if len(data) < left:
            raise ConnectionClosed
        if data[-2:] != b"\r\n":
            raise NotResp("the queue sent a value whose length does not fit")
        return Oversized(length) if length > self._max_bulk else data[:-2]


def _reply_number(text: bytes) -> int:
    if not (text.isdigit() and len(text) < 20) and not re.match(rb"[+-]\d{1,19}\Z", text):
        raise NotResp("the queue sent a length or number that is none")
    return int(text)


def connect_tcp(host: str, port: int, tls: bool = False, timeout_s: float = 10.0) -> socket.socket:
    """Open a connection; ``timeout_s`` limits each wait. Raises QueueFault with the remedy."""
    try:
        plain = socket.create_connection((host, port), timeout=timeout_s)
    except (OSError, UnicodeError) as error:
        state = "refused" if isinstance(error, ConnectionRefusedError) else "unreachable"
        raise QueueFault(f"{host}:{port} cannot be reached: {os_reason(error)}", state) from None
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if not tls:
        return plain
    import ssl

    try:  # without ALPN: the proxy sends every connection that negotiated http/1.1 to its HTTP side
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except (OSError, ValueError) as error:
        plain.close()
        raise _tls_fault(f"{host}:{port}", error) from error


def _tls_fault(place: str, error: Any) -> QueueFault:
    found = f'{place} does not speak TLS; set "cliproxy_tls": false'
    if hasattr(error, "verify_message"):
        found = f"{place} shows a certificate that this system does not trust ({error.verify_message}); for a "
        found += "self-signed one, start the dashboard with SSL_CERT_FILE=/path/to/that-certificate.pem"
    return Misconfigured(found, "closed")


def _fault_of_connection(error: Exception) -> QueueFault:
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return ConnectionClosed()
    return QueueFault(f"the connection to the queue broke: {os_reason(error)}")


class RespClient:
    """RESP over one connection: commands out in one write, whole replies in."""

    def __init__(self, connect: Callable[[], socket.socket]):
        self.socket = connect()
        self._stream = self.socket.makefile("rb", 256 * 1024)
        self._reader = RespReader(self._stream)

    def send(self, *commands: bytes) -> None:
        """Send encoded commands in one write."""
        try:
            self.socket.sendall(b"".join(commands))
        except OSError as error:
            raise _fault_of_connection(error) from error

    def receive(self) -> Any:
        """Read the next whole reply."""
        try:
            return self._reader.read_reply()
        except (OSError, ValueError) as error:
            raise _fault_of_connection(error) from error

    def call(self, *words: Any) -> Any:
        """Send one command and read its reply."""
        self.send(encode_command(*words))
        return self.receive()

    def close(self) -> None:
        """Close the connection, also under a thread that reads from it; what was not read is gone."""
        with suppress(OSError):  # the other side was quicker
            self.socket.shutdown(socket.SHUT_RDWR)
        for thing in (self._stream, self.socket):
            with suppress(OSError):
                thing.close()


# -------------------- events: queue records parsed into events: masks, token rules of each provider


class Rejected(ValueError):
    """An event that cannot be stored; the sentence contains no value of the event."""


class Context(NamedTuple):
    """What many events have in common, cleaned and masked; each combination is stored once."""

    auth_index: str | None
    source: str
    provider: str
    endpoint: str
    auth_type: str
    alias: str
    reasoning_effort: str
    service_tier: str
    api_key: str
    account: str = ""  # of account files; after a "?" where their mail is all that tells, which alone says: one of them


class Contexts(dict):
    """The contexts read so far, by the values sent, and the function that names their accounts."""

    def __init__(self, account_of: Callable[[Context, str], str] = lambda context, token_hash: ""):
        self.account_of = account_of


class Event(NamedTuple):
    """One upstream attempt as stored, but for ``plan`` and ``quota_headers``; None is unknown, zero is measured."""

    timestamp: str
    ts_epoch: float
    context: Context
    model: str
    input_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    total_tokens: int | None
    cached_tokens: int | None
    cache_write_tokens: int | None
    latency_ms: int | None
    failed: int
    ttft_ms: int | None
    status_code: int | None
    error: str | None
    request_id: str | None
    plan: str = ""
    quota_headers: dict[str, str] | None = None


class Reject(NamedTuple):
    """The record of an event that could not be stored: reason, length in bytes, masked JSON where it was an object."""

    reason: str
    length: int
    event: str | None


class Parsed(NamedTuple):
    """A parsed batch; events, rejects and ignored add up to the number of values handed over."""

    events: list[Event]
    rejects: list[Reject]
    ignored: int


class Recent:
    """The latest events, by ``execution_id``, or with ``by_values`` also by time, index, model, tokens and latency."""

    def __init__(self, most: int = 10_000):
        self.by_values, self._most = False, most
        self._seen: OrderedDict[int, None] = OrderedDict()

    def has_seen(self, content: Mapping[str, Any], event: Event) -> bool:
        """Return whether the event came before, and remember it."""
        name = content.get("execution_id")
        if name and isinstance(name, str):
            known = hash((name, event.model))  # one call may tell of an image model as well
        elif self.by_values:
            model_tokens_and_latency = event[3:11]
            known = hash((content["timestamp"], event.context.auth_index, *model_tokens_and_latency, event.request_id))
        else:
            return False
        came_before = known in self._seen
        self._seen[known] = None
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)
        return came_before


_LARGEST_NUMBER = 10**12  # no request of any model comes near, and no sum of such numbers overflows


def check_event(event: Event) -> Event:
    """Return an event that was read back from a file, if parse_event could have made it. Raises Rejected."""
    texts = (event.timestamp, event.model, event.plan, *(value or "" for value in event.context))
    numbers = [getattr(event, name) for name in Event._fields if name.endswith(("_tokens", "_ms", "_code"))]
    texts += (event.error or "", event.request_id or "")
    are_texts = all(isinstance(text, str) and text.isprintable() for text in texts)
    are_counts = event.failed in (0, 1) and all(number == _number(number, "a count") for number in numbers)
    if not are_texts or not are_counts or not _EARLIEST_AT <= float(event.ts_epoch) < _LATEST_AT:
        raise Rejected("one of its values is none of its kind")
    return event


def _mask_source(text: str) -> str:
    return text if looks_like_mail(text) else mask_key(text)


def parse_events(raws: Sequence[Any], contexts: Contexts = Contexts(), recent: Recent | None = None) -> Parsed:
    """Parse values of the queue: JSON as bytes, decoded objects or Oversized; repeats of ``recent`` are ignored."""
    parsed, ignored = Parsed([], [], 0), 0
    step = 100  # decoding more at once is not faster, and decoded events take ten times the memory of their JSON
    for first in range(0, len(raws), step):
        part = raws[first : first + step]
        for raw, content in zip(part, _decode(part)):
            try:
                if isinstance(content, Rejected):
                    raise content
                event = parse_event(content, contexts)
            except Exception as error:  # a value of a kind that nobody thought of costs its own event alone
                reason = str(error) if isinstance(error, Rejected) else f"it cannot be read: {where_raised(error)}"
                parsed.rejects.append(Reject(reason, _length_of(raw), masked_json(content)))
                continue
            if event is None or (recent is not None and recent.has_seen(content, event)):
                ignored += 1
            else:
                parsed.events.append(event)
    return parsed._replace(ignored=ignored)


def _length_of(raw: Any) -> int:
    if isinstance(raw, Oversized):
        return int(raw)
    try:
        return len(raw if isinstance(raw, bytes) else json.dumps(raw, default=repr))
    except (RecursionError, ValueError):
        return 0  # nested too deeply to be written again


def _decode(raws: Sequence[Any]) -> list[Any]:
    """Decode events at once, as one array; zeros between them prove that each event was a single JSON value."""
    with suppress(TypeError, ValueError, RecursionError):
        joined = _loads(b"[" + b",0,".join(raws) + b"]")
        if len(joined) == 2 * len(raws) - 1 and not any(joined[1::2]):
            return joined[::2]
    return [_decode_one(raw) for raw in raws]


def _decode_one(raw: Any) -> Any:
    if isinstance(raw, Oversized):
        return Rejected("it is larger than an event can be")
    if not isinstance(raw, bytes):
        return raw
    if raw[8:9] == b"{" and raw[:1] != b"{":
        raw = raw[8:]  # one fork's list in a Redis has 8 bytes of time in front of each event
    try:
        return _loads(raw)
    except (ValueError, RecursionError) as error:
        return Rejected(f"it is not JSON: {type(error).__name__}")


def compact(raw: Any) -> Any:
    """Return a value of the queue; a large one decoded and without what is not stored, or as Oversized."""
    if not isinstance(raw, bytes) or len(raw) < 16 * 1024:
        return raw
    content = _decode_one(raw)
    if not isinstance(content, dict):
        return Oversized(len(raw))
    of_tokens = (*_SENT_COUNTS, "read_tokens", "write_tokens", "cache_input_mode")
    parts = {"fail": ("status_code", "error_code"), "tokens": of_tokens}
    names = (*_CONTEXT_NAMES, *_KEPT_OF_REJECT.split(), *parts, "token_breakdown", "response_headers", "execution_id")
    texts = ((name, content[name]) for name in names if name in content)
    kept = {name: value[:1024] if isinstance(value, str) else value for name, value in texts}
    for name in parts:
        if isinstance(kept.get(name), dict):
            kept[name] = {key: kept[name][key] for key in parts[name] if key in kept[name]}
    fail = content.get("fail")
    body = (isinstance(fail, dict) and fail.get("body")) or content.get("error_message")
    kept["error_message"] = body if isinstance(body, str) and len(body) <= _LONGEST_ERROR else None
    if "response_headers" in kept:
        headers = _quota_headers(kept["response_headers"], str(kept.get("provider")).lower()) or {}
        kept["response_headers"] = {name: [text] for name, text in headers.items()}
    return kept


_MARK = re.compile(rb'["[\]{},]')
_REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.S)


def elements_of(pieces: Iterable[bytes], largest: int = 8 << 20) -> Iterator[bytes | Oversized]:
    """Split a JSON array that comes in pieces into its elements, not decoded. Raises ValueError for anything else.

    An element of more than ``largest`` bytes is not kept, and comes as Oversized.
    """
    data, at, depth, dropped, in_string = b"", 0, 0, 0, False  # data: from the beginning of the element at hand
    is_array = False
    for piece in pieces:
        data, start = data + piece, 0
        while at < len(data):
            if in_string:
                at = _REST_OF_STRING.match(data, at).end()
                in_string = data[at : at + 1] != b'"'
                if in_string:  # goes on with the next piece, perhaps behind a backslash
                    break
                at += 1
                continue
            mark = _MARK.search(data, at)
            kind, at = (mark.group(), mark.end()) if mark else (b"", len(data))
            in_string = kind == b'"'
            depth += (kind in (b"[", b"{")) - (kind in (b"]", b"}"))
            if (kind, depth) in ((b",", 1), (b"]", 0)):
                length = dropped + at - 1 - start
                if length > largest:
                    yield Oversized(length)
                elif data[start : at - 1].strip():
                    yield data[start : at - 1]
            if (kind, depth) in ((b"[", 1), (b",", 1), (b"]", 0)):
                start, dropped, is_array = at, 0, True
        data, at = data[start:], at - start
        if len(data) > largest:
            dropped, data, at = dropped + at, data[at:], 0
    if depth or not is_array:
        raise ValueError("not an array")


def _loads(raw: bytes) -> Any:
    return json.loads(raw.decode("utf-8"), parse_constant=int)  # which takes no NaN


def parse_event(content: Any, contexts: Contexts) -> Event | None:
    """Parse one decoded record, masked; None for control messages and warm-ups, which are no usage. Raises Rejected."""
    if not isinstance(content, dict):
        raise Rejected("it is not a JSON object")
    get = content.get
    if len(content) == 1 and "timestamp" not in content and next(iter(content.values())) is True:
        return None  # {"refresh": true}, {"heartbeat": true} …
    try:
        ts_epoch, timestamp = parse_time(get("timestamp"))
    except TypeError:
        raise Rejected("timestamp is missing or not a text") from None
    except ValueError as error:
        raise Rejected(f"timestamp is {error}") from None
    if len(content) > 1 and _OF_RECORDS.isdisjoint(content):
        raise Rejected("it has nothing of a usage record but a time")
    model, context = _context_of(content, contexts)
    failed, status, error, has_reply = _outcome(content)
    usage = _usage(content, context.provider)
    if get("generate") is False and not failed and not any(usage):
        return None  # a warm-up; with tokens it is a request
    # Without a reply of its own, an attempt comes with the headers of one before, perhaps of another account.
    headers = _quota_headers(get("response_headers"), context.provider) if has_reply else None
    return Event(
        *(timestamp, ts_epoch, context, model),
        *usage,
        latency_ms=_number(get("latency_ms"), "latency_ms"),
        failed=failed,
        ttft_ms=_number(get("ttft_ms"), "ttft_ms") or None,  # the proxy writes 0 where no first token was seen
        status_code=status,
        error=error,
        request_id=_text(get("request_id"), "request_id", 64) or None,
        plan="" if failed or not headers else headers.get("x-codex-plan-type", "").strip().lower()[:32],
        quota_headers=headers,
    )


_CONTEXT_NAMES = ("model", "access_token_sha256", "api_key_hash", "response_service_tier", *Context._fields[:-1])


def _context_of(content: Mapping[str, Any], contexts: Contexts) -> tuple[str, Context]:
    """Return (model, context) of an event, cleaned once for all events with the same values."""
    values = tuple(map(content.get, _CONTEXT_NAMES))
    try:
        return contexts[values]
    except (KeyError, TypeError):  # the latter with a list or an object, where a text belongs
        found = _read_context(content, contexts)
    # Texts alone are safe as keys: 1 and true are equal. Long ones are not worth their memory.
    is_safe = all(value is None or (isinstance(value, str) and len(value) <= 512) for value in values)
    return cache(contexts, values, found) if is_safe else found


def _read_context(content: Mapping[str, Any], contexts: Contexts) -> tuple[str, Context]:
    get = content.get
    source, token_hash = _text(get("source"), "source", 512), get("access_token_sha256")
    is_clients_key = source == get("api_key") and not looks_like_mail(source)  # it names nobody
    model = _text(get("model"), "model") or "unknown"
    served, index = get("response_service_tier"), get("auth_index")
    context = Context(
        auth_index=None if index is None else _text(str(index) if type(index) is int else index, "auth_index", 128),
        source="" if is_clients_key else _mask_source(source),
        provider=_text(get("provider"), "provider").lower(),
        endpoint=_text(get("endpoint"), "endpoint"),
        auth_type=_text(get("auth_type"), "auth_type", 32),
        alias=_text(get("alias"), "alias"),
        reasoning_effort=_text(get("reasoning_effort"), "reasoning_effort", 32),
        service_tier=_text(served if served and isinstance(served, str) else get("service_tier"), "service_tier", 32),
        api_key=mask_key(_text(get("api_key"), "api_key", 512)) or _mask_of_hash(get("api_key_hash")),
    )
    account = contexts.account_of(context, token_hash.lower() if isinstance(token_hash, str) else "")
    return model, context._replace(account=account)


def _mask_of_hash(value: Any) -> str:
    """Return the mask of a key of which only a hash is sent; a SHA-256 begins with the tag of the key itself."""
    if not isinstance(value, str) or not value:
        return ""
    return f"… #{value[:6].lower() if re.match('[0-9A-Fa-f]{8,64}$', value) else short_tag(value)}"


def _text(value: Any, name: str, limit: int = 200) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Rejected(f"{name} is not a text")
    return _printable(value[:limit])


def _number(value: Any, name: str) -> int | None:
    """Return a count; None for a negative one, which senders use for "not known". Raises Rejected."""
    if value is None or (type(value) is int and 0 <= value <= _LARGEST_NUMBER):
        return value
    if isinstance(value, float) and value.is_integer():
        return _number(int(value), name)
    if type(value) is not int:
        raise Rejected(f"{name} is not a whole number")
    if value > _LARGEST_NUMBER:
        raise Rejected(f"{name} is larger than 10^12")
    return None


# By provider: how the headers begin that tell of quota, and the one that decides what the others are about.
QUOTA_HEADERS = {
    "codex": ("X-Codex-", "X-Codex-Active-Limit"),
    "claude": ("Anthropic-Ratelimit-Unified-", "Anthropic-Ratelimit-Unified-Status"),
}


def _quota_headers(headers: Any, provider: str) -> dict[str, str] | None:
    """Return the quota headers of a reply and no other: the rest contains cookies and ids."""
    if provider not in QUOTA_HEADERS or not isinstance(headers, dict):
        return None
    prefix, decisive = QUOTA_HEADERS[provider]
    starts, size = (prefix, prefix.lower()), len(prefix)
    kept = {
        name.lower(): _printable(values[0][:100])
        for name, values in headers.items()
        if name[:size] in starts and isinstance(values, list) and values and isinstance(values[0], str)
    }
    decision = headers.get(decisive, headers.get(decisive.lower()))
    is_clear = decision is None or (isinstance(decision, list) and len(decision) == 1 and decisive.lower() in kept)
    return kept if is_clear and 0 < len(kept) <= 80 else None  # eight groups of ten


def _usage(content: Mapping[str, Any], provider: str) -> tuple[int | None, ...]:
    """Return input with cache, output with reasoning, reasoning, total, cached and written tokens. Raises Rejected."""
    breakdown = content.get("token_breakdown")
    if isinstance(breakdown, dict) and breakdown.get("schema_version") == 2 and breakdown.get("quality") == "complete":
        with suppress(Rejected, KeyError, TypeError):  # an odd breakdown is no reason to lose the plain counts
            into, out = breakdown["input"], breakdown["output"]
            counts = (into["total_tokens"], out["total_tokens"], out["reasoning_tokens"], breakdown["total_tokens"])
            counts += (into["cache_read_tokens"], into["cache_write_tokens"])
            if sum(counts[4:]) > counts[0]:
                raise Rejected("the cache is larger than the input")
            return tuple(map(_number, counts, ["token_breakdown"] * len(counts)))
    tokens = content.get("tokens")
    if tokens is None:
        return (None,) * 6
    if not isinstance(tokens, dict):
        raise Rejected("tokens is not an object")
    counts = _plain_usage(tokens, provider, content.get("executor_type") == "ClaudeExecutor")
    return tuple(map(_number, counts, ["tokens, added up,"] * len(counts)))


def _sum(*numbers: int | None) -> int | None:
    """Add the known numbers; None where none is known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


_SENT_COUNTS = tuple(
    f"{name}_tokens" for name in ("input", "output", "reasoning", "total", "cached", "cache_read", "cache_creation")
)
_THOUGHTS_APART = ("gemini", "gemini-cli", "vertex", "aistudio", "antigravity", "interactions")


def _plain_usage(tokens: Mapping[str, Any], provider: str, is_claude: bool) -> tuple[int | None, ...]:
    """Add what is sent apart: the cache of Claude, the thoughts of Gemini, and any cache larger than its input."""
    names, mode = _SENT_COUNTS, str(tokens.get("cache_input_mode")).lower()
    if "read_tokens" in tokens and tokens.get("input_tokens") is None:
        names = ("read_tokens", "write_tokens", *names[2:])  # of a fork: input and output
    try:
        given, out, reasoning, total, cached, read, written = map(_number, map(tokens.get, names), names)
    except Rejected as fault:
        raise Rejected(f"tokens.{fault}") from None
    is_claude = is_claude or provider == "claude"
    # Before v7.0.3 there is none, up to v7.2.66 it stays 0, but for Claude, whose cached_tokens may be the writes.
    if read is None or not (read or is_claude):
        read = cached
    cache = (read or 0) + (written or 0)
    is_apart = mode == "separate_from_input" or (is_claude and mode != "included_in_input")
    into = (given or 0) + cache if cache > (given or 0) or (is_apart and given is not None) else given
    before, out = out, _sum(out, reasoning) if out is not None and provider in _THOUGHTS_APART else out
    if not total or (into != given and total == _sum(given, before)):  # so is Claude's total before v7.1.26
        total = _sum(into, out)
    return into, out, reasoning, total, read, written


def _outcome(content: Mapping[str, Any]) -> tuple[int, int | None, str | None, bool]:
    """Return whether an attempt failed, its status (None: 0 or absent), the reason, and whether a reply had begun."""
    flag, fail, outcome = content.get("failed"), content.get("fail"), content.get("outcome")
    if fail is not None and not isinstance(fail, dict):
        raise Rejected("fail is not an object")
    if flag not in (None, True, False):
        raise Rejected("failed is neither true nor false")
    status = _number(fail.get("status_code"), "fail.status_code") or None if fail else None
    status = status or (499 if outcome in ("canceled", "cancelled") else None)
    if not (flag or outcome == "failed" or (status or 0) >= 400):
        return 0, status, None, True
    body = (fail and fail.get("body")) or content.get("error_message")
    has_reply = not _network_words(body) or body.startswith(_STREAM_TEXTS)
    return 1, status, failure_reason(status, body, fail and fail.get("error_code")), has_reply


# What the proxy's own texts begin with where a reply had begun, and end with where there was none.
_STREAM_TEXTS = ("stream error: ", "claude executor: upstream returned error", "upstream stream returned an error")
_NETWORK_TEXTS = {
    **{text: text for text in ("connection refused", "no such host", "no route to host", "network is unreachable")},
    **dict.fromkeys(("connection reset by peer", "broken pipe", "client connection lost"), "connection reset"),
    **dict.fromkeys(("i/o timeout", "tls handshake timeout", "context deadline exceeded"), "no answer in time"),
    **dict.fromkeys(("connection timed out", "timeout awaiting response headers"), "no answer in time"),
    **dict.fromkeys(("request canceled", "request canceled while waiting for connection"), "no answer in time"),
    **dict.fromkeys(("eof", "unexpected eof"), "stream broken off"),
    "context canceled": "client left",
    "server misbehaving": "no such host",  # the answer of a name server that is broken
    "proxy authentication required": "egress proxy: login refused",
}


def _network_words(body: Any) -> str:
    """Return what one of the proxy's own texts says, in words of a fixed list; empty for any other text."""
    if not isinstance(body, str):
        return ""
    if body.startswith(_STREAM_TEXTS):
        return "stream broken off" if body.startswith(_STREAM_TEXTS[0]) else "error within the stream"
    end = f": {body[-1000:].rstrip()}"
    words = _NETWORK_TEXTS.get(end.rpartition(": ")[2].partition(" (")[0].lower(), "")
    if not words and (": tls: " in end or ": x509: " in end):
        words = "TLS failure"
    if not words and (": http2: " in end or ": stream error: stream ID" in end):
        words = "stream broken off"
    is_of_proxy = ": proxyconnect tcp: " in end or ": socks connect tcp " in end
    return f"egress proxy: {words or 'no connection'}" if is_of_proxy else words


def failure_reason(status: int | None, body: Any, error_code: Any = None) -> str | None:
    """Return shortly, without keys and mails, why a call failed: ``429 usage_limit_reached: The usage limit …``."""
    code, message = _json_error(body)
    if not code and isinstance(error_code, str) and re.match(r"[A-Za-z]\w{1,63}\Z", error_code):
        code = error_code
    if code or message:
        reason = ": ".join(part for part in (code, message or _network_words(body)) if part)
        return without_secrets(reason if status is None else f"{status} {reason}")
    own = {200: "stream broken off", 499: "client left", 529: "Overloaded"}
    words = _network_words(body) or own.get(status or 0) or responses.get(status or 0, "")
    return f"{status or ''} {words}".strip() or None


def failure_kind(status: int | None, error: str | None) -> str:
    """Return a failure's reason without what differs from one request to the next, so that equal ones add up."""
    prefix = f"{status} " if (error or "").startswith(f"{status} ") else ""
    words_with_a_digit = r"(?<![^\s:,;()\[\]\"'])[^\s:,;()\[\]\"'\d]*\d[^\s:,;()\[\]\"']*"  # ids, times, amounts
    return prefix + re.sub(words_with_a_digit, "…", (error or "")[len(prefix) :])


_KEPT_OF_REJECT = (
    "timestamp latency_ms ttft_ms source auth_index failed outcome generate accounting_version provider executor_type "
    "model alias endpoint auth_type api_key request_id reasoning_effort service_tier response_service_tier"
)
_OF_RECORDS = {"tokens", "token_breakdown", "fail", *_KEPT_OF_REJECT.split()} - {"timestamp", "source", "failed"}


def masked_json(content: Any) -> str | None:
    """Return what may be kept of a rejected event as JSON, masked as a good one is; None where it was no object."""
    if not isinstance(content, dict):
        return None
    names = (*_KEPT_OF_REJECT.split(), "tokens", "token_breakdown")
    kept: dict[str, Any] = {name: _harmless(content[name]) for name in names if name in content}
    for name, mask in (("source", _mask_source), ("api_key", mask_key)):
        if isinstance(content.get(name), str):
            kept[name] = mask(content[name][:512])
    if isinstance(content.get("fail"), dict):
        kept["fail"] = _harmless({"status_code": content["fail"].get("status_code")})
    return json.dumps(kept, ensure_ascii=True)


def _harmless(value: Any, depth: int = 0) -> Any:
    """Return numbers, and a short text without secrets; of what is in an object numbers alone, else its type's name."""
    if isinstance(value, dict) and depth < 3:
        return {without_secrets(str(key), 40): _harmless(item, depth + 1) for key, item in list(value.items())[:20]}
    if value is None or isinstance(value, (bool, int, float)):
        return value if value is None or abs(value) < 2**63 else "number"  # JSON has no infinity
    if isinstance(value, str) and (not depth or value in ("complete", "inconsistent", "unclassified")):
        return without_secrets(value, 200)
    return type(value).__name__


# How fast requests were. A value is one byte, the number of its bin: 0 is unknown, and each bin ends at 9/8 of where it
# begins, so that one value stands for all in it within 6 %. A request is three bytes: its latency and its first token
# (ms), and its tokens in 100 seconds. Speeds are any number of requests and blocks in a row. A block counts up to
# 65,535 requests: a head (255, the first bin, the requests, the lengths of what follows), then a count for each bin and
# measure in two bytes, first all low ones and then the high ones up to the last that is not 0.

_BIN_BEGINS = [0.0, *((9 / 8) ** power for power in range(-18, 235))]
_COUNTS = 3 * (len(_BIN_BEGINS) + 1)
_BLOCK = struct.Struct("<BBHHH")
_MOST_COUNTED = 0xFFFF


def speeds_of(latency_ms: int, ttft_ms: int, output_tokens: int | None) -> bytes:
    """Return a request's speeds, of which -1 is unknown; tokens per second are known where the first came before."""
    begins, rate = _BIN_BEGINS, -1.0
    if output_tokens and 0 <= ttft_ms < latency_ms:
        rate = output_tokens * 1e5 / (latency_ms - ttft_ms)
    return bytes((bisect_right(begins, latency_ms), bisect_right(begins, ttft_ms), bisect_right(begins, rate)))


def join_speeds(speeds: bytes | None, more: str | None) -> bytes | None:
    """Add speeds in hexadecimal digits to others; where a block is shorter than the requests, one is made of them."""
    joined = (speeds or b"") + bytes.fromhex(more or "")
    is_list = len(joined) <= 240 and joined[:1] < b"\xff"
    return (joined or None) if is_list else b"".join(map(_block_of, _counted(joined)))


def _block_of(number: int) -> bytes:
    counts = number >> 48
    first = max(0, (counts & -counts).bit_length() - 1) // 48
    pairs = (counts >> 48 * first).to_bytes(2 * _COUNTS, "little")
    low, high = pairs[::2].rstrip(b"\0"), pairs[1::2].rstrip(b"\0")
    return _BLOCK.pack(255, first + 1, number & _MOST_COUNTED, len(low), len(high)) + low + high


def _counted(speeds: bytes) -> list[int]:
    """Return the counts of speeds, as numbers of two bytes for each; the first ones are the requests."""
    numbers, listed, at = [0], [], 0
    while at < len(speeds):
        start, at = at, speeds.find(b"\xff", at)
        at = len(speeds) if at < 0 else at
        listed.append(speeds[start:at])
        if at < len(speeds):
            _, first, requests, low, high = _BLOCK.unpack_from(speeds, at)
            start, at = at + _BLOCK.size, at + _BLOCK.size + low + high
            counts = bytearray(2 * max(low, high))
            counts[: 2 * low : 2], counts[1 : 2 * high : 2] = speeds[start : start + low], speeds[start + low : at]
            numbers.append((int.from_bytes(counts, "little") << 48 * first) + requests)
    requests = b"".join(listed)
    for start in range(0, len(requests), 765):  # as many as one byte can count
        some, counts = requests[start : start + 765], bytearray(2 * _COUNTS)
        for measure in range(3):
            for number, count in Counter(some[measure::3]).items():
                counts[6 * number + 2 * measure] = count
        counts[:6] = len(some) // 3, 0, 0, 0, 0, 0
        numbers.append(int.from_bytes(counts.rstrip(b"\0"), "little"))
    added = [0]
    for number in numbers:
        if (added[-1] & _MOST_COUNTED) + (number & _MOST_COUNTED) > _MOST_COUNTED:
            added.append(number)
        else:
            added[-1] += number
    return added


def count_speeds(speeds: bytes) -> int:
    """Count speeds. Counts are the digits of one number, four bytes each, so that they are added up as numbers are."""
    total = 0
    for number in _counted(speeds):
        pairs = number.to_bytes((number.bit_length() + 15) // 16 * 2, "little")
        digits = bytearray(2 * len(pairs))
        digits[::4], digits[1::4] = pairs[::2], pairs[1::2]
        total += int.from_bytes(digits, "little")
    return total


_UNKNOWN_SPEED = {
    "latency_ms": {"p50": None, "p95": None},
    "ttft_ms": {"p50": None, "p95": None},
    "tokens_per_second": {"p50": None},
}


def speed_json(counts: int) -> dict[str, Any]:
    """Return the percentiles by nearest rank of what was counted; None for one of fewer than five values."""
    sample = counts & 0xFFFFFFFF
    if sample < 5:  # as in thousands of rows, which share what is unknown
        return {**_UNKNOWN_SPEED, "sample": sample}
    lanes = struct.unpack(f"<{_COUNTS}I", counts.to_bytes(4 * _COUNTS, "little"))

    def value(below: Sequence[int], percent: int, unit: int) -> float | None:
        middle = _BIN_BEGINS[bisect_left(below, -(-below[-1] * percent // 100))] * 18 / 17
        return float(f"{middle / unit:.4g}") if below[-1] >= 5 else None

    shown: dict[str, Any] = {"sample": sample}
    for measure, (name, unknown) in enumerate(_UNKNOWN_SPEED.items()):
        below = list(itertools.accumulate(lanes[3 + measure :: 3]))
        shown[name] = {part: value(below, int(part[1:]), 100 if measure == 2 else 1) for part in unknown}
    return shown


# -------------------- prices: list prices of models, and what tokens come to at them


PRICES_AS_OF = "2026-11"
# USD for a million tokens, standard tier, short context: input, cached, cache write, output, and whose price it is, by
# names and aliases. A cached or written token for which the vendor names no price (-) costs what any input does.
_LIST = """
1.25 0.125 - 10: gpt-5 gpt-5-codex gpt-5.1 gpt-5.1-codex gpt-5.1-codex-max gpt-5-chat-latest gpt-5.1-chat-latest
0.25 0.025 - 2: gpt-5-mini gpt-5.1-codex-mini | 4 0.4 5 20: gpt-5.6 gpt-5.6-sol | 0.2 0.02 0.25 1.2: gpt-5.6-luna
0.05 0.005 - 0.4: gpt-5-nano | 2 0.2 2.5 12: gpt-5.6-terra | 0.15 0.075 - 0.6: gpt-4o-mini | 1.1 0.275 - 4.4: o4-mini
1.75 0.175 - 14: gpt-5.2 gpt-5.2-codex gpt-5.3-codex gpt-5.2-chat-latest | 30 - - 180: gpt-5.4-pro gpt-5.5-pro
2.5 0.25 - 15: gpt-5.4 | 0.75 0.075 - 4.5: gpt-5.4-mini | 0.2 0.02 - 1.25: gpt-5.4-nano | 0.1 0.025 - 0.4: gpt-4.1-nano
5 0.5 - 30: gpt-5.5 | 2.5 1.25 - 10: gpt-4o | 20 - - 80: o3-pro
15 - - 120: gpt-5-pro | 2 0.5 - 8: gpt-4.1 o3 | 0.4 0.1 - 1.6: gpt-4.1-mini | 1.1 0.55 - 4.4: o3-mini
1 0.1 1.25 5: claude-haiku-4-5 | 2 0.2 2.5 10: claude-sonnet-5 | 2 0.1 2.5 10: claude-sonnet-5-5
3 0.3 3.75 15: claude-sonnet-4-5 claude-sonnet-4-6 | 4 0.2 5 20: claude-opus-5-5 | 0.1 0.01 0.125 0.5: claude-haiku-5-5
5 0.5 6.25 25: claude-opus-4-5 claude-opus-4-6 claude-opus-4-7 claude-opus-4-8 claude-opus-5
10 1 12.5 50: claude-fable-5
1.25 0.125 - 10: gemini-2.5-pro | 1.5 0.15 - 9: gemini-3.5-flash | 0.3 - - 2.5: gemini-2.5-flash-image
0.3 0.03 - 2.5: gemini-2.5-flash gemini-3.5-flash-lite | 0.1 0.01 - 0.4: gemini-2.5-flash-lite
2 0.2 - 12: gemini-3.1-pro-preview gemini-3.1-pro gemini-3.1-pro-high gemini-3.1-pro-low gemini-3-pro-image-preview
0.5 0.05 - 3: gemini-3-flash-preview gemini-3-flash gemini-3.1-flash-image-preview
0.75 0.075 - 3.75: gemini-3.6-flash gemini-3.7-flash | 0.25 0.025 - 1.5: gemini-3.1-flash-lite
0.6 0.1 - 3: kimi-k2.5 | 0.95 0.16 - 4: kimi-k2.6 | 1.25 0.2 - 2.5: grok-4.3 | 1 0.2 - 2: grok-code-fast-1
0.95 0.19 - 4: kimi-k2.7-code | 3 0.3 3 15: kimi-k3 | 0.6 0.11 - 2.2: glm-4.6 glm-4.7 | 0.28 0.028 - 0.4: deepseek-v3.2
2 0.3 - 6: grok-4.5 | 2 0.5 - 6: grok-4.6 | 0.6 - - 2.2: glm-4.5
1 0.2 - 3.2: glm-5 | 1.4 0.26 - 4.4: glm-5.1 glm-5.2 glm-5.3 | 0.3 0.03 0.375 1.2: minimax-m2.5 minimax-m2 minimax-m2.1
1.32 0.044 - 3.96: deepseek-v4-pro | 0.3 0.006 - 1.2: deepseek-v4-flash | 0.28 0.028 - 0.42: deepseek-chat
"""
_DATE = re.compile(r"(?:[-@]20\d\d(?:0\d|1[0-2])[0-3]\d|-20\d\d-(?:0\d|1[0-2])-[0-3]\d)\Z", re.ASCII)
PRICED_TOKENS = ("input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens")
Price = Tuple[float, ...]  # for a million of each of these, the first without the next two


def list_prices(more: Mapping[str, Mapping[str, float | None]] = {}) -> dict[str, Price]:
    """Return the built-in list with what the configuration adds or overrides, by names in lower case."""
    listed = (entry.split(": ") for line in _LIST.strip().splitlines() for entry in line.split(" | "))
    known: list[tuple[str, list[Any]]] = [(model, usd.split()) for usd, models in listed for model in models.split()]
    known += [(model.lower(), [*map(price.get, PRICE_KINDS)]) for model, price in more.items()]
    return {model: tuple(float(usd[0] if one in ("-", None) else one) for one in usd) for model, usd in known}


def price_of(prices: Mapping[str, Price], model: str | None) -> Price | None:
    """Return a model's price by its exact name, or by that before a date; None without."""
    name = (model or "").lower()
    return prices.get(name) or prices.get(_DATE.sub("", name))


def cost_at(price: Price, counts: Sequence[int | None]) -> float:
    """Return USD, never negative, for counts of PRICED_TOKENS."""
    into, cached, written, out = (count or 0 for count in counts)
    return sum(map(operator.mul, price, (max(0, into - cached - written), cached, written, out))) / 1e6


# -------------------- accounts: account files, whose an event is by them, and which identities are one account


_LARGEST_BODY = 1024 * 1024
_FIVE_HOURS_S, _WEEK_S = 5 * 3600, 7 * 86400


def by_key(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """Return the values of each key, both in the order of their coming."""
    groups: dict[Any, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


class Identity(NamedTuple):
    """One (auth_index, source, account) that events came with; times are epoch seconds."""

    id: int
    auth_index: str
    source: str
    account: str
    provider: str
    plan: str
    first_at: float
    last_at: float


class Account:
    """One row of the accounts table, as the identities that count for it tell; ``account`` is what a file decided."""

    def __init__(self, identities: Sequence[Identity]):
        # The newest knows best.
        self.identities = sorted(identities, key=lambda one: (one.last_at, one.id), reverse=True)

        def latest(name: str, accepted: Callable[[str], bool] = bool) -> str:
            return next(filter(accepted, (getattr(one, name) for one in self.identities)), "")

        self.provider, self.plan, self.account = latest("provider"), latest("plan"), latest("account")
        self.auth_index, self.mail = latest("auth_index"), latest("source", looks_like_mail)
        self.first_at, self.last_at = min(one.first_at for one in self.identities), self.identities[0].last_at
        self.identity_ids = [one.id for one in self.identities if one.id]
        # Each with when it was last seen.
        self.indexes = {one.auth_index: one.last_at for one in reversed(self.identities) if one.id}
        self.tag = tag_of(self.account) or own_tag(min(self.identity_ids), self.mail)
        sources = [one.source for one in self.identities]
        # The keys of several clients are none of the account's.
        self.source = self.mail or (sources[0] if len(set(sources)) == 1 else "")
        self.name = self.source or (f"index {self.auth_index}" if self.auth_index else "unknown")
        if self.account and not self.mail:
            texts = (text for text in (self.account, sources[0]) if text != self.tag and tag_of(text) == self.tag)
            self.name = next(texts, f"{self.provider} {self.tag}")

    def takes_over(self, old: Account) -> bool:
        """Return whether this newer login of the same mail replaces the older one."""
        if self.provider and old.provider and self.provider != old.provider:
            return False
        if not self.auth_index or not old.auth_index:
            return True  # without an index there is nothing to tell them apart by
        same_plan = self.plan == old.plan or not self.plan or not old.plan
        # A new login's first request may start before the old one's last stream ends.
        return same_plan and old.last_at <= self.first_at + 900


def resolve_accounts(identities: Iterable[Identity]) -> list[Account]:
    """Group identities into accounts: by what files decided, else by index, with those that it took over from.

    Of two known accounts with one mail, nothing but a file tells which it is. The id 0 is a row of the quota table.
    """

    def key_of(one: Identity) -> tuple[str, ...]:
        return (tag_of(one.account),) if one.account else (one.auth_index, "" if one.auth_index else one.source)

    ordered = sorted(identities, key=lambda one: (one.first_at, one.id))
    grouped = [Account(group) for group in by_key((key_of(one), one) for one in ordered).values()]
    unclear = {account.tag for account in grouped if not account.account}
    grouped = [account for account in grouped if account.account not in unclear]  # else its readings alone
    known_of = Counter(account.mail for account in grouped if account.account)
    accounts: list[Account] = []
    by_mail: dict[str, list[Account]] = {}
    for account in grouped:
        same_mail = by_mail.setdefault(account.mail, []) if account.mail else []
        may_join = not account.account and known_of[account.mail] < 2
        earlier = next((known for known in same_mail if may_join and account.takes_over(known)), None)
        if earlier is None:
            accounts.append(account)
            same_mail.append(account)
        else:
            both = Account([*earlier.identities, *account.identities])
            accounts[accounts.index(earlier)] = same_mail[same_mail.index(earlier)] = both
    _name_apart(accounts)
    return accounts


def tag_of(account: str) -> str:
    """Return the tag of what account files decided; empty where they decided nothing."""
    return "#" + short_tag("", account) if account and not account.startswith("#") else account


def own_tag(identity_id: int, mail: str) -> str:
    """Return the tag of an account that no file decided, by its oldest identity: it outlives a new login."""
    return "#" + short_tag("identity", str(identity_id), mail)  # no account id has three parts


def owner_name(names: Mapping[str, str], account: Account) -> str | None:
    """Return the owner's name for an account; behind a name for several of one mail stands what tells them apart."""
    mail = account.mail.lower()
    own, shared = names.get(f"{mail} {account.tag}"), names.get(mail)
    return own or (shared and shared + account.name[len(mail) :])


def account_of(context: Context, accounts: Iterable[Account]) -> Account | None:
    """Return the account of an event as far as it is stored; what the files do not decide, its index does."""
    if context.account and not context.account.startswith("?"):
        tag = tag_of(context.account)
        return next((one for one in accounts if one.account and one.tag == tag), None)
    index = context.auth_index or ""
    same = [one for one in accounts if index in one.indexes and (index or one.source == context.source)]
    return max(same, key=lambda one: (one.account != "", one.indexes[index]), default=None)


def _name_apart(accounts: Sequence[Account]) -> None:
    """Rename accounts that share a name: by plan, else provider, else a short tag."""
    for mark in (lambda one: one.plan, lambda one: one.provider, lambda one: one.tag):
        for twins in by_key((one.name, one) for one in accounts).values():
            marks = [mark(one) for one in twins]
            if len(twins) > 1 and all(marks) and len(set(marks)) > 1:
                for one, text in zip(twins, marks):
                    one.name = f"{one.name} ({text})"


class AccountFile(NamedTuple):
    """One account file; ``auth_index`` is what the proxy gives it since v7.0.0, where it sees the same path."""

    name: str
    email: str
    account_id: str
    plan: str
    access_token: str
    disabled: bool
    proxy_url: str
    freshness: str
    auth_index: str = ""
    subscription_until: str | None = None
    seat: str = ""  # who, where several people share an account id
    provider: str = "codex"
    token_hash: str = ""

    @property
    def tag(self) -> str:
        """Return a stable tag of the account, which does not reveal its id; by the mail where there is no id."""
        return "#" + (short_tag(self.account_id, self.seat) if self.account_id else short_tag("", self.email))

    @property
    def former_tags(self) -> set[str]:
        """Return the tags that the account may have had: in 3.0.0, or while less was known of its seat."""
        seats = ("", self.email, self.email.lower())
        return {"#" + short_tag(self.account_id, seat) for seat in seats if self.account_id} - {self.tag}

    @property
    def account(self) -> str:
        """Return what this file decides: the tag of its account id; nothing, where its mail is all; else its name."""
        return self.tag if self.account_id else "" if looks_like_mail(self.email) else self.email

    def __repr__(self) -> str:
        return f"AccountFile({self.name!r})"


def find_account_files(folders: Sequence[Path]) -> tuple[Path, list[AccountFile], list[str]]:
    """Return the first folder with account files, each Codex account's freshest one, and words for each odd one."""
    files = AccountFiles(folders)
    files.look()
    codex = (file for file in files.by_tag.values() if file.provider == "codex")
    return files.folder, sorted(codex, key=lambda file: (file.email, file.plan)), files.problems


def _completed(files: Sequence[AccountFile]) -> Iterator[AccountFile]:
    """Yield files with the account id and seat that some lack; several mails under one id are colleagues."""
    ids: dict[Any, set[str]] = {}
    for file in files:
        ids.setdefault((file.provider, file.email), set()).update([file.account_id] if file.account_id else [])
        ids.setdefault(("seats", file.account_id), set()).update([file.seat] if file.seat else [])
        ids.setdefault(("mails", file.account_id), set()).add(file.email.lower())
    for file in files:
        account_id = file.account_id or _only(ids[file.provider, file.email])
        is_shared = len(ids["mails", account_id]) > 1
        seat = file.seat or (file.email.lower() if is_shared else _only(ids["seats", account_id]))
        yield file._replace(account_id=account_id, seat=seat)


def _only(texts: Collection[str] | None) -> str:
    return next(iter(texts)) if texts and len(texts) == 1 else ""


def read_account_file(path: Path) -> AccountFile | None:
    """Read one file; None where it is no account's. Raises ValueError that says what is odd."""
    content = _read_json_file(path)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    provider, token = _word(content.get("type")).lower(), _word(content.get("access_token"))
    if provider != "codex" and not (provider and token):
        return None
    claims = _claims(_word(content.get("id_token"))) or _claims(token)
    about = _member(claims, "https://api.openai.com/auth")
    account_id = _word(content.get("account_id")) or _word(about.get("chatgpt_account_id"))
    if provider == "codex" and not re.fullmatch(r"[!-~]*", token + account_id):
        raise ValueError("its token or account id holds letters that cannot be sent")
    return AccountFile(
        path.name,
        _word(content.get("email")) or _word(claims.get("email")) or _printable(path.stem),
        account_id,
        _word(about.get("chatgpt_plan_type")).lower()[:32],
        token,
        content.get("disabled") is True,
        _word(content.get("proxy_url")),
        utc_text(_epoch(content.get("last_refresh")) or _epoch(content.get("expired"))) or "",
        auth_index_of(os.path.abspath(str(path)), provider),
        utc_text(_epoch(about.get("chatgpt_subscription_active_until"))),
        _word(about.get("chatgpt_user_id")) or _word(about.get("user_id")),
        provider,
        hashlib.sha256(token.encode("utf-8", "replace")).hexdigest() if token else "",
    )


def auth_index_of(path: str, provider: str = "codex") -> str:
    """Return the ``auth_index`` that proxies since v7.0.0 derive from an account file's absolute path."""
    return hashlib.sha256(f"{provider}:{path}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


class AccountFiles:
    """The account files as they are, read again when they change, and whose an event is by them."""

    def __init__(self, folders: Sequence[Path], monotonic: Callable[[], float] = monotonic_s):
        self.contexts, self.changes, self.folder = Contexts(self.account_of), 0, folders[0]
        self.problems: list[str] = []
        self.by_tag: dict[str, AccountFile] = {}  # the freshest of each, an enabled one before all others
        self._folders, self._monotonic, self._looked_s = folders, monotonic, float("-inf")
        self._read: dict[str, tuple[Any, AccountFile | None]] = {}
        self._accounts: dict[Any, set[str]] = {}  # by the hash of a token, by index, and by (provider, mail)

    def look(self, pause_s: float = 0.0) -> None:
        """Read the files that have changed since the last look, if that is at least so many seconds ago."""
        now_s = self._monotonic()
        if now_s - self._looked_s < pause_s:
            return
        self._looked_s, before, self._read, self.problems = now_s, self._read, {}, []
        found = ((folder, self._read_folder(folder, before)) for folder in self._folders)
        self.folder, files = next((pair for pair in found if pair[1]), (self._folders[0], []))
        if self._read == before:
            return
        self.contexts.clear()
        self.changes += 1
        # An event may have waited: the hashes of former tokens are kept, the newest of them.
        former = [item for item in self._accounts.items() if len(item[0]) == 64]
        self._accounts, self.by_tag = dict(former[-10_000:]), {}
        present: dict[Any, set[str]] = {}
        ordered = sorted(files, key=lambda file: (file.provider == "codex", not file.disabled, file.freshness))
        for file in _completed(ordered):
            self.by_tag[file.tag] = file
            for key in (file.token_hash, file.auth_index, (file.provider, file.email.lower())):
                present.setdefault(key, set()).add(file.account)
        present.pop("", None)
        self._accounts.update(present)

    @property
    def renamed(self) -> dict[tuple[str, str], str]:
        """By an account's former tag and its mail, the one that it has now."""
        files = self.by_tag.values()
        return {(tag, file.email.lower()): file.tag for file in files for tag in file.former_tags - {*self.by_tag}}

    def _read_folder(self, folder: Path, before: Mapping[str, tuple[Any, AccountFile | None]]) -> list[AccountFile]:
        try:
            names = sorted(name for name in os.listdir(str(folder)) if name.lower().endswith(".json"))
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self.problems.append(f"{folder} cannot be read: {os_reason(error)}")
            return []
        found = (self._read_changed(os.path.join(str(folder), name), before) for name in names)
        return [file for file in found if file is not None]

    def _read_changed(self, path: str, before: Mapping[str, tuple[Any, AccountFile | None]]) -> AccountFile | None:
        stamp, (known_stamp, file) = None, before.get(path, (None, None))
        with suppress(OSError):  # a link that leads nowhere, or where this user may not look: reading it says so
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                return None
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp is None or stamp != known_stamp:
            try:
                file = read_account_file(Path(path))
            except ValueError as error:  # perhaps half-written: what it held before holds on
                masked_name = re.sub(r"^(\w+-)?([^@]?)[^@]*@", r"\1\2***@", os.path.basename(path))
                self.problems.append(f"{_printable(masked_name)} is skipped: {error}")
        self._read[path] = stamp, file
        return file

    def account_of(self, context: Context, token_hash: str) -> str:
        """Return whose an event is by token, else path, else by mail with a ``?`` in front: a tag or a file's name."""
        if token_hash and token_hash not in self._accounts:
            self.look(0.2)
        account = _only(self._accounts.get(token_hash)) or _only(self._accounts.get(context.auth_index or ""))
        same_mail = self._accounts.get((context.provider, context.source.lower()), set())
        return account or ("?" + _only(same_mail) if any(same_mail) else "")


def _read_json_file(path: Path) -> Any:
    try:
        with open(str(path), "rb") as stream:
            data = stream.read(_LARGEST_BODY + 1)
    except OSError as error:
        raise ValueError(os_reason(error)) from error
    if len(data) > _LARGEST_BODY:
        raise ValueError("it is too large for an account file")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("it is empty, half-written or not JSON") from None


def _word(value: Any) -> str:
    return _printable(value.strip()) if isinstance(value, str) else ""


def _claims(token: str) -> Mapping[str, Any]:
    """Decode the claims of a JWT without checking its signature, for display only; {} where it is none."""
    with suppress(ValueError, RecursionError):
        _, text, _ = token.split(".")
        return _member({"claims": json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))}, "claims")
    return {}


def _member(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object within an object, empty where there is none."""
    member = content.get(name)
    return member if isinstance(member, dict) else {}


def _epoch(value: Any) -> float | None:
    """Return a time in RFC 3339, epoch seconds or milliseconds as epoch seconds; None outside 2020 to 2100."""
    with suppress(AttributeError, ValueError):
        return parse_time(value.strip())[0]
    at = _finite(value) or 0.0
    seconds = at / 1000 if at > 1e11 else at
    return seconds if _EARLIEST_AT <= seconds < _LATEST_AT else None


# -------------------- store: the SQLite file, the only SQL: schema steps, writes, summaries


class StoreError(DashboardError):
    """The database cannot be used; the file is never replaced or repaired by itself."""

    http_status = 503
    code = "storage_error"


def _flock(handle: int, is_shared: bool = False) -> None:
    import fcntl

    fcntl.flock(handle, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _lock_path(database: Path) -> Path:
    return Path(f"{os.path.realpath(str(database))}.lock")


def lock_database(database: Path, lock: Callable[[int], None] = _flock, patience_s: float = 1.0) -> str:
    """Take the right of one process to record into a database until it ends; return why there is no lock here."""
    try:
        make_private(_lock_path(database))
        handle = os.open(str(_lock_path(database)), os.O_RDWR)  # stays open, and so the lock is held
    except OSError as error:
        raise StoreError(_store_reason(database, error)) from error
    deadline = time.monotonic() + patience_s  # a holder that was killed is given the time to end
    while True:
        try:
            lock(handle)
            return ""
        except BlockingIOError:
            time.sleep(0.05)
        except (OSError, ImportError) as error:  # as on some network file systems
            return f"usage.db.lock cannot be locked ({os_reason(error)}): a second start will not be noticed"
        if time.monotonic() > deadline:
            os.close(handle)
            told = {"pid": "unknown", "port": "unknown", **lock_holder(database)}
            holder = "process {pid}, port {port}".format(**told)
            message = f"{database} is in use by a dashboard that runs already ({holder}); stop that one"
            raise StoreError(f'{message}, or name another file with "database"')


def name_holder(database: Path, port: int) -> None:
    """Write into the lock's file who has it, for those that come later."""
    _lock_path(database).write_text(json.dumps({"pid": os.getpid(), "port": port}), encoding="utf-8")


def lock_holder(database: Path) -> dict[str, int]:
    """Return the ``pid`` and ``port`` of the dashboard that records into a database; {} where none is known of."""
    with suppress(OSError, ImportError, ValueError, AttributeError):
        with _lock_path(database).open("rb") as stream:
            try:
                _flock(stream.fileno(), is_shared=True)
            except BlockingIOError:
                told = json.loads(stream.read(200))
                return {name: told[name] for name in ("pid", "port") if type(told.get(name)) is int}
    return {}


BUCKET_S = 900  # every zone's offset is a multiple of 15 minutes, so these buckets fit every local hour and day

_TOKEN_NAMES = "input_tokens output_tokens reasoning_tokens cached_tokens cache_write_tokens total_tokens".split()
SUM_NAMES = ["requests", "failed", "rate_limited", *_TOKEN_NAMES]
_priced_tokens = operator.itemgetter(*map(SUM_NAMES.index, PRICED_TOKENS))


# Tables of sums with the seconds of their buckets, which begin at multiples of that in UTC. ``usage_by_time`` keeps
# everything together. The others keep apart (identity, model, client key, reason), where reason 0 is success. A key of
# -1 is unknown, 0 is a request without a key; reason 1 is an unknown failure.
_ROLL_UPS = {"usage_by_week": 7 * 86400, "usage_by_day": 86400, "usage_by_hour": 3600, "usage_by_quarter": BUCKET_S}

# Schema steps. Each is frozen as it was released: it uses no constant of this file, and never changes again. A new
# one goes to the end. Each runs in a transaction of its own, which also sets PRAGMA user_version to its number.


def _columns_of(db, table: str) -> list[str]:
    return [row[1].lower() for row in db.execute(f"PRAGMA table_xinfo({table})")]  # those that are computed too


def _add_columns(db, table: str, columns: str) -> None:
    present = _columns_of(db, table)
    for column in columns.split(", "):
        if column.split()[0] not in present:
            db.execute(f"ALTER TABLE {table} ADD COLUMN {column}")


_STEP_5_COLUMNS = {
    "events": "timestamp TEXT, ts_epoch REAL, auth_index INTEGER, source TEXT, model TEXT, input_tokens INTEGER, "
    "output_tokens INTEGER, reasoning_tokens INTEGER, total_tokens INTEGER, latency_ms INTEGER, failed INTEGER, "
    "cached_tokens INTEGER, cache_write_tokens INTEGER, ttft_ms INTEGER, status_code INTEGER, error TEXT, "
    "request_id TEXT, context_id INTEGER",
    "quota_snapshots": "timestamp TEXT, ts_epoch REAL, email TEXT, plan TEXT, allowed INTEGER, limit_reached INTEGER, "
    "primary_used_percent INTEGER, primary_remaining_percent INTEGER, primary_reset_at TEXT, "
    "secondary_used_percent INTEGER, secondary_remaining_percent INTEGER, secondary_reset_at TEXT, "
    "credits_balance TEXT, raw_json TEXT, account_id_tag TEXT, source TEXT, windows TEXT, last_at REAL",
}
_STEP_5_TABLES = (
    "meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "models(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    # The auth_index as it was sent: in events its column's affinity makes numbers of some hex texts.
    "identities(id INTEGER PRIMARY KEY, auth_index TEXT NOT NULL, source TEXT NOT NULL, "
    "provider TEXT NOT NULL DEFAULT '', plan TEXT NOT NULL DEFAULT '', first_at REAL NOT NULL, last_at REAL NOT NULL, "
    "UNIQUE(auth_index, source))",
    "contexts(id INTEGER PRIMARY KEY, identity_id INTEGER NOT NULL, provider TEXT NOT NULL, "
    "endpoint TEXT NOT NULL, auth_type TEXT NOT NULL, alias TEXT NOT NULL, reasoning_effort TEXT NOT NULL, "
    "service_tier TEXT NOT NULL, api_key TEXT NOT NULL, "
    "UNIQUE(identity_id, provider, endpoint, auth_type, alias, reasoning_effort, service_tier, api_key))",
    "rejected_events(id INTEGER PRIMARY KEY, timestamp TEXT, ts_epoch REAL, reason TEXT, length INTEGER, event TEXT)",
    "outages(id INTEGER PRIMARY KEY, from_at REAL NOT NULL, to_at REAL, reason TEXT NOT NULL, lost INTEGER)",
    "quota_accounts(email TEXT NOT NULL, account_id_tag TEXT NOT NULL, plan TEXT, state TEXT NOT NULL, "
    "message TEXT, state_at REAL NOT NULL, snapshot_id INTEGER, subscription_until TEXT, "
    "PRIMARY KEY(email, account_id_tag)) WITHOUT ROWID",
)


def _step_tables(db) -> list[str]:
    """Make the tables of 3.0.0, or complete those of the original and of other programs."""
    for table, columns in _STEP_5_COLUMNS.items():
        db.execute(f"CREATE TABLE IF NOT EXISTS {table}(id INTEGER PRIMARY KEY, {columns})")
        _add_columns(db, table, columns)
    done = [line for table in _STEP_5_COLUMNS for line in _take_over(db, table)]
    db.execute("UPDATE quota_snapshots SET windows = NULL WHERE windows IS NOT NULL")  # another program's
    for table in _STEP_5_TABLES:
        db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
    db.execute(
        "INSERT INTO quota_accounts(email, account_id_tag, plan, state, state_at, snapshot_id) "
        "SELECT email, '', plan, CASE WHEN allowed = 0 OR limit_reached = 1 THEN 'limited' ELSE 'ok' END, ts_epoch, id "
        "FROM quota_snapshots WHERE id IN (SELECT MAX(id) FROM quota_snapshots "
        "WHERE email IS NOT NULL AND ts_epoch IS NOT NULL GROUP BY email) "
        "AND NOT EXISTS (SELECT 1 FROM quota_accounts)"  # as in a file of 3.0.0 that was dumped, which has no version
    )
    return done


_STEP_6_OLD_SUMS = "requests, failed, input_tokens, output_tokens, reasoning_tokens, cached_tokens, total_tokens"
_STEP_6_SUMS = f"{_STEP_6_OLD_SUMS}, rate_limited, cache_write_tokens"
_STEP_6_ADDED = ", ".join(f"SUM({name})" for name in _STEP_6_SUMS.split(", "))
_STEP_6_CELL = "identity_id, model_id, key_id, reason_id"
_STEP_6_TABLES = (
    "client_keys(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    "reasons(id INTEGER PRIMARY KEY, status_code INTEGER, error TEXT NOT NULL, UNIQUE(status_code, error))",
    "new_identities(id INTEGER PRIMARY KEY, auth_index TEXT NOT NULL, source TEXT NOT NULL, "
    "account TEXT NOT NULL DEFAULT '', provider TEXT NOT NULL DEFAULT '', plan TEXT NOT NULL DEFAULT '', "
    "first_at REAL NOT NULL, last_at REAL NOT NULL, UNIQUE(auth_index, source, account))",
    # The quota windows of an account, known by its tag, beyond their end.
    "quota_window_history(id INTEGER PRIMARY KEY, account TEXT NOT NULL, label TEXT NOT NULL, "
    "start_at REAL, end_at REAL, read_at REAL NOT NULL, peak_percent NUMERIC NOT NULL)",
    # Under which labels the metrics count an identity's requests to a model.
    "series(identity_id INTEGER, model_id INTEGER, account TEXT NOT NULL, model TEXT NOT NULL, "
    "PRIMARY KEY(identity_id, model_id)) WITHOUT ROWID",
)
_STEP_6_MENDED = {
    **_STEP_5_COLUMNS,
    "identities": "first_at REAL NOT NULL, last_at REAL NOT NULL",
    "quota_accounts": "email TEXT, account_id_tag TEXT, plan TEXT, message TEXT, state_at REAL NOT NULL",
}


def _step_roll_ups(db) -> list[str]:
    """Sum up by client key and reason too; below the retention floor, where rows are deleted, the old sums are kept."""
    done = [line for table in _STEP_5_COLUMNS for line in _take_over(db, table)]
    floor = (db.execute("SELECT value FROM meta WHERE key = 'events_floor'").fetchone() or (0,))[0]
    _mend_odd_values(db)
    for table in _STEP_6_TABLES:
        db.execute(f"CREATE TABLE {table}")
    _add_keys_and_reasons(db)
    db.execute(
        "INSERT INTO identities(auth_index, source, first_at, last_at) SELECT IFNULL(CAST(auth_index AS TEXT), '') "
        "AS a, IFNULL(source, '') AS s, MIN(ts_epoch), MAX(ts_epoch) FROM events "
        "WHERE context_id IS NULL AND ts_epoch IS NOT NULL GROUP BY a, s ON CONFLICT(auth_index, source) DO UPDATE "
        "SET first_at = MIN(first_at, excluded.first_at), last_at = MAX(last_at, excluded.last_at)"
    )
    db.execute(
        "INSERT INTO models(name) SELECT DISTINCT IFNULL(model, 'unknown') FROM events WHERE 1 "
        "ON CONFLICT(name) DO NOTHING"
    )
    db.execute("CREATE INDEX IF NOT EXISTS events_by_time ON events(ts_epoch)")
    names = ", ".join(f"'usage_by_{name}'" for name in ("time", "account", "model", "hour", "day"))
    old = {row[0] for row in db.execute(f"SELECT name FROM sqlite_master WHERE name IN ({names})")}
    for table in old:
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    sums = ", ".join(f"{name} INTEGER NOT NULL" for name in _STEP_6_SUMS.split(", "))
    joined = ", join_speeds(NULL, group_concat(speeds, ''))"
    _sum_up_rows(db, floor)
    if floor and "usage_by_hour" in old:
        _add_old_sums(db, floor)
    db.execute(f"CREATE TABLE usage_by_time(bucket INTEGER PRIMARY KEY, {sums})")
    db.execute(f"INSERT INTO usage_by_time SELECT bucket, {_STEP_6_ADDED} FROM summed GROUP BY bucket")
    for table, quarters in (("quarter", 1), ("hour", 4), ("day", 96), ("week", 672)):
        has_speeds = quarters > 1
        db.execute(
            f"CREATE TABLE usage_by_{table}(bucket INTEGER NOT NULL, identity_id INTEGER NOT NULL, "
            "model_id INTEGER NOT NULL, key_id INTEGER NOT NULL, reason_id INTEGER NOT NULL, "
            f"{sums}{', speeds BLOB' * has_speeds}, PRIMARY KEY(bucket, {_STEP_6_CELL})) WITHOUT ROWID"
        )
        db.execute(
            f"INSERT INTO usage_by_{table} SELECT bucket / {quarters} AS b, {_STEP_6_CELL}, {_STEP_6_ADDED}"
            f"{joined * has_speeds} FROM summed GROUP BY b, {_STEP_6_CELL}"
        )
    for table in (*(f"old_{table}" for table in old), "summed"):
        db.execute(f"DROP TABLE {table}")
    _keep_accounts(db)
    # The number of rows that were not counted as they were stored; a 3.0.0 that was still adopting had counted some.
    db.execute(
        "INSERT INTO meta SELECT 'adopted', (SELECT COUNT(*) FROM events) "
        "+ IFNULL((SELECT value FROM meta WHERE key = 'deleted'), 0) "
        "- IFNULL((SELECT value FROM meta WHERE key = 'stored'), 0) WHERE 1 "
        "ON CONFLICT(key) DO UPDATE SET value = excluded.value"
    )
    db.execute("DELETE FROM meta WHERE key IN ('adopt_next', 'adopt_last')")
    # 3.0.0 wrote no row for a reading that was the same again, but when it was last true.
    db.execute(
        "UPDATE quota_snapshots SET ts_epoch = last_at, "
        "timestamp = strftime('%Y-%m-%dT%H:%M:%SZ', last_at, 'unixepoch') "
        "WHERE last_at > ts_epoch AND id IN (SELECT snapshot_id FROM quota_accounts)"
    )
    return done


def _take_over(db, table: str) -> Iterator[str]:
    """Keep only columns and rows of a table that another program declared, and yield what was removed."""
    query = "SELECT type, name, sql FROM sqlite_master WHERE tbl_name = ? COLLATE NOCASE AND sql IS NOT NULL"
    for kind, name, sql in db.execute(query, (table,)).fetchall():
        if kind == "table":
            body, _, rest = " ".join(sql.split()).partition("(")[2].rpartition(")")
        elif sql != "CREATE INDEX events_by_time ON events(ts_epoch)":
            db.execute('DROP {} "{}"'.format(kind, name.replace('"', '""')))
            yield f"{table}: the {kind} {name} of another program is dropped"
    ours = ["id INTEGER PRIMARY KEY", *_STEP_5_COLUMNS[table].split(", ")]
    known = [column.split()[0] for column in ours]
    found = db.execute(f"PRAGMA table_info({table})").fetchall()
    more = {'"{}"'.format(row[1].replace('"', '""')): row[2] for row in found if row[1].lower() not in known}
    declared = [*ours, *map(" ".join, more.items())]
    if not rest and {ours[0]} <= {*body.strip().split(", ")} <= {*declared}:
        return
    keeps_ids = [(row[1].lower(), row[2].upper()) for row in found if row[5]] == [("id", "INTEGER")]
    db.execute("PRAGMA legacy_alter_table = ON")  # views that name the table stay as they are
    db.execute(f"CREATE TABLE rebuilt_{table}({', '.join(declared)})")
    columns = ", ".join([*known[1:], *more])
    ids = "id" if keeps_ids else "NULL"
    count = db.execute(f"INSERT INTO rebuilt_{table}(id, {columns}) SELECT {ids}, {columns} FROM {table}").rowcount
    db.execute(f"DROP TABLE {table}")
    db.execute(f"ALTER TABLE rebuilt_{table} RENAME TO {table}")
    yield f"{table}: {count:,} rows are kept without the constraints of another program"


def _mend_odd_values(db) -> None:
    """Make of what an adopted file holds in place of a count, a time or a text what it means, or NULL."""
    encoding = db.execute("PRAGMA encoding").fetchone()[0]
    db.create_function("as_text", 1, lambda raw: raw.decode(encoding, "backslashreplace"))
    for table, columns in _STEP_6_MENDED.items():
        names, kinds = zip(*(column.split(" ", 1) for column in columns.split(", ")))
        old, new = ", ".join(names), ", ".join(map(_mended, names, kinds))
        db.execute(f"UPDATE OR REPLACE {table} SET ({old}) = ({new}) WHERE ({old}) IS NOT ({new})")
    for table, name in (("models", "name"), ("identities", "auth_index"), ("identities", "source")):
        text = f"as_text(CAST({name} AS BLOB))"  # with the id, because another row may have this text
        db.execute(f"UPDATE {table} SET {name} = {text} || ' #' || id WHERE {name} IS NOT {text}")
    for table in _STEP_5_COLUMNS:  # behind the greatest id there is, SQLite gives new ones at random
        (last,) = db.execute(f"SELECT IFNULL(MAX(id), 0) FROM {table} WHERE id < 1 << 50").fetchone()
        ids = db.execute(f"SELECT id FROM {table} WHERE id >= 1 << 50 ORDER BY id").fetchall()
        pairs = [(last + number, old) for number, (old,) in enumerate(ids, 1)]
        db.executemany(f"UPDATE {table} SET id = ? WHERE id = ?", pairs)
    db.execute(  # the newest reading with a time that is known
        "UPDATE quota_accounts SET snapshot_id = (SELECT MAX(id) FROM quota_snapshots s WHERE ts_epoch IS NOT NULL "
        "AND s.email = quota_accounts.email AND IFNULL(s.account_id_tag, '') = quota_accounts.account_id_tag) "
        "WHERE snapshot_id NOT IN (SELECT id FROM quota_snapshots WHERE ts_epoch IS NOT NULL)"
    )


def _mended(name: str, kind: str) -> str:
    """Return what a column's value means, as SQL, in which texts and BLOBs are greater than any number."""
    if name == "failed":
        return "IFNULL(failed <> 0 AND typeof(failed) IN ('integer', 'real') OR failed LIKE 'true', 0)"
    if name == "context_id":
        return "(SELECT id FROM contexts WHERE id = context_id)"
    if kind == "TEXT" or name == "auth_index":
        is_odd = f"typeof({name}) = 'blob' OR {name} GLOB '*[^\x01-~]*' OR instr({name}, char(0))"
        return f"CASE WHEN {is_odd} THEN as_text(CAST({name} AS BLOB)) ELSE {name} END"
    if kind.startswith("REAL"):
        seconds = f"WHEN {name} >= 1577836800 AND {name} < 4102444800 THEN {name}"
        milliseconds = f"{seconds.replace('00 ', '00000 ')} / 1000.0"
        return f"CASE {seconds} {milliseconds} ELSE {'0' if 'NOT NULL' in kind else 'NULL'} END"
    is_whole = "" if name.endswith("_percent") else f" AND {name} = CAST({name} AS INTEGER)"
    return f"CASE WHEN {name} BETWEEN 0 AND 1000000000000{is_whole} THEN {name} END"


def _add_keys_and_reasons(db) -> None:
    db.execute("INSERT INTO client_keys(name) SELECT DISTINCT api_key FROM contexts WHERE api_key <> ''")
    db.execute("ALTER TABLE contexts ADD COLUMN key_id INTEGER NOT NULL DEFAULT 0")
    db.execute("UPDATE contexts SET key_id = (SELECT id FROM client_keys WHERE name = api_key) WHERE api_key <> ''")
    db.execute("INSERT INTO reasons VALUES (1, NULL, '')")
    _add_columns(db, "events", "reason_id INTEGER")
    db.execute("UPDATE events SET reason_id = NULL WHERE reason_id IS NOT NULL")  # another program's
    known: dict[Any, int] = {}
    for status, error in db.execute("SELECT DISTINCT status_code, error FROM events WHERE failed <> 0"):
        _reason_id(db, known, status, error)
    db.create_function("reason_id_of", 2, lambda status, error: _reason_id(db, known, status, error))
    db.execute("UPDATE events SET reason_id = reason_id_of(status_code, error) WHERE failed <> 0")


def _sum_up_rows(db, floor: int) -> None:
    """Sum up the rows at and above the floor (in buckets of 900 s), with the speeds of successes."""
    counts = ", ".join(f"SUM(IFNULL(e.{name}, 0)) AS {name}" for name in _STEP_6_OLD_SUMS.split(", ")[1:])
    db.execute(
        "CREATE TEMP TABLE summed AS SELECT CAST(e.ts_epoch AS INTEGER) / 900 AS bucket, COALESCE(c.identity_id, "
        "(SELECT id FROM identities WHERE auth_index = IFNULL(CAST(e.auth_index AS TEXT), '') "
        "AND source = IFNULL(e.source, ''))) AS identity_id, "
        "(SELECT id FROM models WHERE name = IFNULL(e.model, 'unknown')) AS model_id, "
        f"IFNULL(c.key_id, -1) AS key_id, IFNULL(e.reason_id, 0) AS reason_id, COUNT(*) AS requests, {counts}, "
        "SUM(failed AND status_code IS 429) AS rate_limited, SUM(IFNULL(e.cache_write_tokens, 0)) AS "
        "cache_write_tokens, group_concat(CASE WHEN NOT e.failed THEN hex(speeds_of(IFNULL(e.latency_ms, -1), "
        "IFNULL(e.ttft_ms, -1), e.output_tokens)) END, '') AS speeds FROM events e "
        "LEFT JOIN contexts c ON c.id = e.context_id WHERE e.ts_epoch >= ? GROUP BY 1, 2, 3, 4, 5",
        (floor * 900,),
    )


def _add_old_sums(db, floor: int) -> None:
    """Add what is below the floor; what is before 2020 comes of rows that had no sound time.

    3.0.0 kept quarters by account, and hours by account and model: each hour's cells are dealt out to its quarters in
    their order, as two rulers laid side by side, so that every cell and every quarter keep their sums.
    """
    tokens = _STEP_6_OLD_SUMS.split(", ")[2:]
    dealt, kept = ["passed", "failed", *tokens], ", ".join(tokens)
    ends = ", ".join(f"SUM(b.{name}) AS {name}_end" for name in dealt)
    ruler = f"SELECT a.*, {ends} FROM ({{0}} LIMIT -1) a JOIN ({{0}} LIMIT -1) b USING (hour, identity_id) "
    ruler += "WHERE b.place <= a.place GROUP BY a.hour, a.identity_id, a.place"  # a limit lets SQLite index the parts
    quarters = f"SELECT bucket / 4 AS hour, identity_id, bucket AS place, requests - failed AS passed, failed, {kept} "
    quarters += "FROM old_usage_by_account WHERE bucket >= 1753152 AND bucket < ?1"
    cells = "SELECT bucket AS hour, identity_id, 2 * model_id + status AS place, requests * (status = 0) AS passed, "
    cells += f"requests * status AS failed, {kept} FROM old_usage_by_hour WHERE bucket >= 438288 AND bucket < ?1 / 4"
    parts = ", ".join(
        f"MAX(0, MIN(q.{name}_end, c.{name}_end) - MAX(q.{name}_end - q.{name}, c.{name}_end - c.{name})) AS {name}"
        for name in dealt
    )
    db.execute(
        "INSERT INTO summed SELECT bucket, identity_id, cell / 2, -1, cell % 2, passed + failed, failed, "
        f"{kept}, 0, 0, NULL FROM (SELECT q.place AS bucket, identity_id, c.place AS cell, {parts} "
        f"FROM ({ruler.format(quarters)}) q JOIN ({ruler.format(cells)}) c USING (hour, identity_id)) "
        f"WHERE {' + '.join(dealt)} > 0",
        (floor,),
    )


def _keep_accounts(db) -> None:
    """Keep with an identity what account files decide of it, and no client's key as its source."""
    columns = "id, auth_index, source, provider, plan, first_at, last_at"
    db.execute(f"INSERT INTO new_identities({columns}) SELECT {columns} FROM identities")
    db.execute("DROP TABLE identities")
    db.execute("ALTER TABLE new_identities RENAME TO identities")
    db.execute(  # one of several clients' keys; the others stay, and name nobody beside it
        "UPDATE OR IGNORE identities SET source = '' WHERE source NOT LIKE '%@%' "
        "AND id IN (SELECT identity_id FROM contexts WHERE api_key = source) "
        "AND id NOT IN (SELECT identity_id FROM contexts WHERE api_key <> source)"
    )


_SCHEMA_STEPS = ((5, _step_tables), (6, _step_roll_ups))


def _meta_in(db, key: str, unknown: Any = None) -> Any:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return unknown if row is None or row[0] is None else row[0]


def _put_meta(db, key: str, value: Any) -> None:
    db.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT(key) DO UPDATE SET value = excluded.value", (key, value))


def _id_of(db, table: str, unique: Mapping[str, Any], more: Mapping[str, Any] = {}) -> int:
    """Return the id of the row with these unique columns; insert it, with ``more``, if missing."""
    where = " AND ".join(f"{name} IS ?" for name in unique)
    row = db.execute(f"SELECT id FROM {table} WHERE {where}", tuple(unique.values())).fetchone()
    if row is not None:
        return row[0]
    values = {**unique, **more}
    columns, marks = ", ".join(values), ", ".join("?" * len(values))
    return db.execute(f"INSERT INTO {table}({columns}) VALUES ({marks})", tuple(values.values())).lastrowid


def _reason_id(db, known: dict[Any, int], status: int | None, error: str | None) -> int:
    """Return the id of a failure's reason, inserted if it is new; beyond 2,000 it is counted as its status' "other"."""
    if (status, error) in known:
        return known[status, error]
    reason = {"status_code": status, "error": failure_kind(status, error)}
    row = db.execute("SELECT 1 FROM reasons WHERE status_code IS ? AND error = ?", tuple(reason.values()))
    if not row.fetchone() and db.execute("SELECT COUNT(*) FROM reasons").fetchone()[0] >= 2000:
        reason["error"] = "other"
    return cache(known, (status, error), _id_of(db, "reasons", reason))


def _list(table: str, columns: Iterable[str]) -> str:
    return ", ".join(f"{table}.{name}" for name in columns)


def _dicts(cursor) -> list[dict[str, Any]]:
    """Return the rows of a query by the names of its columns."""
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row)) for row in cursor.fetchall()]


# One event, as it is read back. A row of the original has no context: its identity follows from its own columns.
_EVENTS = "events e LEFT JOIN contexts c ON c.id = e.context_id"
_IDENTITY_OF = (
    "COALESCE(c.identity_id, (SELECT i.id FROM identities i WHERE "
    "i.auth_index = IFNULL(CAST(e.auth_index AS TEXT), '') AND i.source = IFNULL(e.source, '') ORDER BY i.id LIMIT 1))"
)
_MODEL_OF = "IFNULL(e.model, 'unknown')"
_MODEL_ID_OF = f"(SELECT id FROM models WHERE name = {_MODEL_OF})"
_KEY_OF = "IFNULL(c.key_id, -1)"
_REASON_OF = "IFNULL(e.reason_id, 0)"
_SPEEDS_OF = "speeds_of(IFNULL(e.latency_ms, -1), IFNULL(e.ttft_ms, -1), e.output_tokens)"
# What sums are kept apart by, on an event and in a roll-up.
_CELL_COLUMNS = {
    _IDENTITY_OF: "r.identity_id",
    _MODEL_ID_OF: "r.model_id",
    _KEY_OF: "r.key_id",
    _REASON_OF: "r.reason_id",
}
_EVENT_SUMS = "COUNT(*) AS requests, SUM(e.failed) AS failed, SUM(e.failed AND e.status_code IS 429) AS rate_limited, "
_EVENT_SUMS += ", ".join(f"SUM(IFNULL(e.{name}, 0)) AS {name}" for name in _TOKEN_NAMES)
_OWN_EVENT_COLUMNS = tuple(name for name in Event._fields if name not in ("context", "plan", "quota_headers"))
_own_event_values = operator.itemgetter(*map(Event._fields.index, _OWN_EVENT_COLUMNS))
_EVENT_COLUMNS = (*_OWN_EVENT_COLUMNS, "auth_index", "source", "context_id", "reason_id")
_INSERT_EVENT = f"INSERT INTO events({', '.join(_EVENT_COLUMNS)}) VALUES ({', '.join('?' * len(_EVENT_COLUMNS))})"
_TOUCH_IDENTITY = (
    "UPDATE identities SET first_at = MIN(first_at, ?), last_at = MAX(last_at, ?), provider = ?, "
    "plan = IFNULL(?, plan) WHERE id = ?"
)

# The sums of the rows just written, as cells of usage_by_quarter; each roll-up adds them up to its own buckets.
_ADDED = ", ".join(f"SUM({name}) AS {name}" for name in SUM_NAMES)
_CREATE_BATCH = (
    f"CREATE TEMP TABLE batch(bucket, identity_id, model_id, key_id, reason_id, {', '.join(SUM_NAMES)}, speeds)"
)
_SUM_UP_BATCH = (
    f"INSERT INTO batch SELECT CAST(e.ts_epoch AS INTEGER) / {BUCKET_S} AS b, c.identity_id, m.id, c.key_id, "
    f"{_REASON_OF} AS r, {_EVENT_SUMS}, group_concat(CASE WHEN NOT e.failed THEN hex({_SPEEDS_OF}) END, '') "
    "FROM events e JOIN contexts c ON c.id = e.context_id "  # all that is new has a context, so that joins are quicker
    "JOIN models m ON m.name = e.model WHERE e.id > ? GROUP BY b, c.identity_id, m.id, c.key_id, r"
)


def _add_batch_to(table: str) -> str:
    keys = "bucket" if table == "usage_by_time" else "bucket, identity_id, model_id, key_id, reason_id"
    columns, values, changes = SUM_NAMES, _ADDED, [f"{name} = {name} + excluded.{name}" for name in SUM_NAMES]
    if _ROLL_UPS.get(table, BUCKET_S) > BUCKET_S:
        columns, values = [*columns, "speeds"], f"{values}, join_speeds(NULL, group_concat(speeds, ''))"
        changes.append("speeds = join_speeds(speeds, hex(excluded.speeds))")
    return (
        f"INSERT INTO {table}({keys}, {', '.join(columns)}) "
        f"SELECT bucket * {BUCKET_S} / {_ROLL_UPS.get(table, BUCKET_S)} AS {keys}, {values} FROM batch "
        f"GROUP BY {keys.replace('bucket', '1')} ON CONFLICT({keys}) DO UPDATE SET {', '.join(changes)}"
    )


_ADD_BATCH = tuple(map(_add_batch_to, ("usage_by_time", *_ROLL_UPS)))

# An outage lost what the queue had forgotten before it ended, and all where the proxy did not publish.
_OUTAGE_LOST = "(reason = 'publishing_off' OR IFNULL(to_at, ?) - from_at > ?)"
SHORTEST_RETENTION_S = 60.0
_DAY_S = 86400.0
# The newest of the events stored last, unless by a clock that was in another year.
_LAST_EVENT_AT = (
    "(SELECT MAX(ts_epoch) FROM (SELECT ts_epoch FROM events ORDER BY id DESC LIMIT 100) "
    f"WHERE ts_epoch < ?1 + {2 * _DAY_S})"
)
# Where an outage that ends in the future has ended: with the first event in it.
_MENDED_END = "MAX(from_at, MIN(?1, IFNULL((SELECT MIN(ts_epoch) FROM events WHERE ts_epoch > from_at), ?1)))"


class Window(NamedTuple):
    """A span of time, ``start <= t < end``, in epoch seconds."""

    start: float
    end: float


EVER = Window(_EARLIEST_AT, _LATEST_AT)
# What a list of requests can be sorted by, and the column of each.
SORTS = {"time": "ts_epoch", "latency": "latency_ms", "ttft": "ttft_ms", "tokens": "total_tokens"}


class Order(NamedTuple):
    """How a list of requests is sorted, ``desc`` or ``asc``; then by id, and unknown values come last in both."""

    sort: str = "time"
    direction: str = "desc"


class Filters(NamedTuple):
    """What an answer is narrowed to; None is everything. ``status`` is ``ok``, ``failed`` or a failure's code.

    ``account`` is its name or mail, ``key`` a client key's mask or tag, or ``none``; both may be one of the owner's
    ``names``.
    """

    account: str | None = None
    model: str | None = None
    status: str | None = None
    text: str | None = None
    key: str | None = None
    names: Mapping[str, str] = {}


_NO_FILTERS = Filters()
Sums = Tuple[int, ...]


def add_sums(rows: Iterable[Sequence[int]]) -> Sums:
    """Add rows of sums, as SUM_NAMES orders them; zeros where there are none."""
    return tuple(map(sum, zip(*rows))) or (0,) * len(SUM_NAMES)


class Cell(NamedTuple):
    """What sums are kept apart by; ``key`` is a client key's mask, empty where none was sent, None if unknown."""

    account: Account
    model: str
    key: str | None


class Usage(NamedTuple):
    """Sums of a window by bucket start (epoch seconds) and by cell, the most frequent failures first, and speeds."""

    buckets: dict[int, Sums]
    cells: dict[Cell, Sums]
    failures: list[dict[str, Any]]
    speeds: dict[Cell, bytes]

    def by(self, part: str) -> dict[Any, list[Cell]]:
        """Return the cells of each ``account``, ``model`` or ``key``."""
        return by_key((getattr(cell, part), cell) for cell in self.cells)


# One connection writes, one reads, one searches, each behind its lock. A transaction is SQL alone: no network, no
# waiting. Whatever a commit makes true beside the file (``changes``, ids in memory) is set while its lock is still
# held, and whatever is rolled back is forgotten: ids of rows that were not written are never used again.


class Store:
    """Events, roll-ups and readings in one SQLite file, the only place with SQL; ``changes`` counts its commits."""

    def __init__(self, path: Path, busy_timeout_s: float = 2.0, announce: Callable[[str], None] = lambda line: None):
        self.path = path
        self.changes = 0
        self._write_lock, self._read_lock, self._search_lock = (threading.RLock() for _ in range(3))
        self._ids: dict[Any, Any] = {}  # of contexts, with that of their identity, and of reasons
        self._tokens: dict[Any, int] = {}  # of spans that ended two hours before, for which no record comes any more
        self._accounts: tuple[int, list[Account]] = (-1, [])
        self._busy_timeout_s, self._announce = busy_timeout_s, announce
        self._open()

    def _open(self) -> None:
        try:
            make_private(self.path)
            self._writer = self._connect()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(_store_reason(self.path, error)) from error
        try:
            self._writer.execute("PRAGMA cache_size = -500")  # KiB; the system caches the file, a batch touches less
            self._migrate()
            self._ids.clear()
            self._writer.execute(_CREATE_BATCH)
            self._reader, self._searcher, self._is_closing = self._connect(), self._connect(), False
            for db in (self._reader, self._searcher):
                db.execute("PRAGMA cache_size = -500")
                db.execute("PRAGMA query_only = ON")
            self._searcher.set_progress_handler(lambda: self._is_closing, 50_000)
            self._known_counts = _counts_in(self._reader)
            self._opened_files = self._file_ids()
        except (sqlite3.Error, StoreError) as error:
            self._writer.close()
            raise error if isinstance(error, StoreError) else StoreError(_store_reason(self.path, error)) from error

    def _connect(self):
        timeout_s = self._busy_timeout_s
        db = sqlite3.connect(str(self.path), timeout=timeout_s, isolation_level=None, check_same_thread=False)
        db.create_function("join_speeds", 2, join_speeds)
        db.create_function("speeds_of", 3, speeds_of)
        return db

    def _migrate(self) -> None:
        db = self._writer
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > _SCHEMA_STEPS[-1][0]:
            message = f"{self.path} was written by a newer version of this dashboard; install that version"
            raise StoreError(f'{message}, or name another file with "database"')
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA journal_size_limit = 16777216")  # what stays on the disk after the log was larger once
        rows = _rows_to_adopt(db)
        if rows:
            self._announce(f"adopting {rows:,} rows of {self.path.name}, once; a million take some seconds")
        for number, step in (one for one in _SCHEMA_STEPS if one[0] > version):
            with self._transaction(db, "BEGIN IMMEDIATE", "COMMIT"):
                done: Sequence[str] = ()
                if db.execute("PRAGMA user_version").fetchone()[0] < number:  # no other process was faster
                    done = step(db)
                    db.execute(f"PRAGMA user_version = {number}")
            for line in done:
                self._announce(line)

    def close(self) -> None:
        """Close the connections, also under a search; the write-ahead log is folded into the file."""
        self._is_closing = True
        with self._write_lock, self._read_lock, self._search_lock:
            for db in (self._reader, self._searcher, self._writer):
                db.close()

    def follow_file(self, mark: int) -> str | None:
        """Open and mark what is at the path now, if it is another file, and return what happened. Raises StoreError."""
        if not self.is_elsewhere:
            return None
        with self._write_lock, self._read_lock, self._search_lock:
            with suppress(sqlite3.Error):  # or a file that was renamed would miss what is in its log
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self.close()
            for path, opened, found in zip(self._paths, self._opened_files, self._file_ids()):
                if found == opened is not None:  # the log of the file that is gone would be taken for the new one's
                    path.unlink()
            self._opened_files = [None] * 3
            event = "was replaced or moved" if self.path.exists() else "was deleted"
            self._open()
            self.changes += 1
            opened, self._opened_files = self._opened_files, [None] * 3  # until it is marked, or it is begun again
            self.put_meta("sequence", mark)  # that in it is of other batches, and would take ours for stored
            self.put_meta("file_changed_at", time.time())
            self._opened_files = opened
        return f"{self.path.name} {event}; what is at its path now is used"

    @property
    def is_elsewhere(self) -> bool:
        """Whether what is at the path is another file than the open one, or none."""
        return self._opened_files[0] is None or self._file_ids()[0] != self._opened_files[0]

    @property
    def _paths(self) -> list[Path]:
        return [Path(f"{self.path}{suffix}") for suffix in ("", "-wal", "-shm")]

    def _file_ids(self) -> list[tuple[int, int] | None]:
        """Return (device, inode) of the file, its write-ahead log and its index; None where there is none."""
        found = (path.stat() if path.exists() else None for path in self._paths)
        return [status and (status.st_dev, status.st_ino) for status in found]

    @contextmanager
    def _transaction(self, db, begin: str, end: str) -> Iterator[Any]:
        """Run statements between BEGIN and its end; SQLite's errors become StoreError."""
        try:
            db.execute(begin)
            yield db
            db.execute(end)
        except BaseException as error:
            self._ids.clear()
            with suppress(sqlite3.Error):  # not begun, rolled back already, closed, or damaged beyond even that
                db.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            with suppress(sqlite3.Error):  # it would keep the pages of a damaged file after that was mended
                db.execute("PRAGMA shrink_memory")
            raise StoreError(_store_reason(self.path, error)) from error

    @contextmanager
    def _write(self, changes: bool = True) -> Iterator[Any]:
        """Open a transaction that writes; ``changes``: its commit can alter an answer."""
        with self._write_lock:  # held until what the commit makes true is counted
            with self._transaction(self._writer, "BEGIN IMMEDIATE", "COMMIT") as db:
                rows_before = db.total_changes
                yield db
            self.changes += changes and db.total_changes > rows_before

    @contextmanager
    def _read(self, is_search: bool = False) -> Iterator[Any]:
        """Open a transaction that reads; a search may take seconds, in which nothing but another search waits."""
        with self._search_lock if is_search else self._read_lock:  # before the choice: follow_file opens others
            with self._transaction(self._searcher if is_search else self._reader, "BEGIN", "ROLLBACK") as db:
                yield db

    # Writing

    def store_batch(self, parsed: Parsed, sequence: int, now: float) -> bool:
        """Store a batch with roll-ups, counts and mark; False where it was before: ``sequence`` grows with each."""
        with self._write(changes=bool(parsed.events)) as db:
            if sequence <= _counts_in(db)["sequence"]:
                return False
            parked = self._insert_or_park(db, parsed.events) if parsed.events else []
            rejects = [*parsed.rejects, *parked]
            if rejects:
                db.executemany(
                    "INSERT INTO rejected_events(timestamp, ts_epoch, reason, length, event) VALUES (?, ?, ?, ?, ?)",
                    [(utc_text(now), now, *reject) for reject in rejects],
                )
                db.execute("DELETE FROM rejected_events WHERE id <= (SELECT MAX(id) FROM rejected_events) - 1000")
            _put_meta(db, "sequence", sequence)
            _count(db, stored=len(parsed.events) - len(parked), rejected=len(rejects), ignored=parsed.ignored)
        return True

    def _insert_or_park(self, db, events: Sequence[Event]) -> list[Reject]:
        """Insert events; where one of them is the fault, halve them until it stands alone, and return its Reject."""
        db.execute("SAVEPOINT part")
        try:
            self._insert_events(db, events)
        except Exception as error:
            if type(error) in (sqlite3.OperationalError, sqlite3.InternalError, sqlite3.DatabaseError):
                raise  # full, locked, damaged: whichever the row
            db.execute("ROLLBACK TO part")
            self._ids.clear()
            if len(events) > 1:
                middle = len(events) // 2
                return self._insert_or_park(db, events[:middle]) + self._insert_or_park(db, events[middle:])
            kept = {name: _harmless(value) for name, value in events[0]._asdict().items() if name != "context"}
            text = json.dumps(kept, default=repr)
            return [Reject(f"the database does not take it: {where_raised(error)}", len(text), text)]
        finally:
            if db.in_transaction:
                db.execute("RELEASE part")
        return []

    def _insert_events(self, db, events: Sequence[Event]) -> None:
        last_id = db.execute("SELECT IFNULL(MAX(id), 0) FROM events").fetchone()[0]
        rows: list[tuple[Any, ...]] = []
        by_identity: dict[int, list[Event]] = {}
        for event in events:
            context = event.context
            identity_id, context_id = self._ids.get(context) or self._find_context(db, event)
            reason_id = _reason_id(db, self._ids, event.status_code, event.error) if event.failed else None
            rows.append((*_own_event_values(event), context.auth_index, context.source, context_id, reason_id))
            by_identity.setdefault(identity_id, []).append(event)
        db.executemany(_INSERT_EVENT, rows)
        new = "SELECT DISTINCT model FROM events WHERE id > ? AND model NOT IN (SELECT name FROM models)"
        db.execute(f"INSERT INTO models(name) {new}", (last_id,))
        db.executemany(_TOUCH_IDENTITY, [_touch(key, members) for key, members in by_identity.items()])
        db.execute(_SUM_UP_BATCH, (last_id,))
        for statement in _ADD_BATCH:
            db.execute(statement)
        db.execute("DELETE FROM batch")

    def _find_context(self, db, event: Event) -> tuple[int, int]:
        """Return (identity id, context id) of an event's context, both inserted where they are new."""
        values = event.context._asdict()
        identity = {name: values.pop(name) or "" for name in ("auth_index", "source", "account")}
        identity["account"] = self._decide(db, **identity)
        times = {"first_at": event.ts_epoch, "last_at": event.ts_epoch}
        identity_id = _id_of(db, "identities", identity, times)
        key_id = _id_of(db, "client_keys", {"name": values["api_key"]}) if values["api_key"] else 0
        context_id = _id_of(db, "contexts", {"identity_id": identity_id, **values}, {"key_id": key_id})
        return cache(self._ids, event.context, (identity_id, context_id))

    def _decide(self, db, auth_index: str, source: str, account: str) -> str:
        """Return whose an event is: what the files say, unless its index tells it better; it holds for the past too."""
        known = db.execute(
            "SELECT account, source FROM identities WHERE auth_index = ? AND account <> '' ORDER BY last_at DESC",
            (auth_index or None,),
        ).fetchall()
        is_same_mail = bool(known) and (known[0][0], source) in known
        if known and (account in ("", "?") or (account.startswith("?") and is_same_mail)):
            return known[0][0]
        account = account.lstrip("?")
        if not known and account:
            self._adopt(db, {auth_index: account})
        elif known and account != known[0][0]:
            self._ids.clear()  # from now on the index is another account's
        return account

    def _adopt(self, db, decisions: Mapping[Any, str]) -> None:
        """Let decisions, by index or (index, source), hold for what was before, and for quota readings of that time."""
        rows = db.execute("SELECT auth_index, source, id FROM identities WHERE account = ''").fetchall()
        for index, source, identity_id in rows:
            account, former = decisions.get((index, source)) or decisions.get(index), own_tag(identity_id, source)
            if account and index:
                db.execute("UPDATE OR IGNORE identities SET account = ? WHERE id = ?", (account, identity_id))
                if db.execute("SELECT 1 FROM quota_accounts WHERE account_id_tag = ?", (former,)).fetchone():
                    self._move_quota(db, source, former, tag_of(account))

    def decide_accounts(self, account_of: Callable[[Context, str], str], renamed: Mapping[Any, str] = {}) -> None:
        """Let the account files decide of what was stored before they were there, or by an account's former tag."""
        columns = "auth_index, source, provider"
        with self._write() as db:
            known = db.execute("SELECT account, source, id FROM identities WHERE account <> ''")
            found = [(renamed.get((row[0], row[1].lower())), row[2]) for row in known]
            db.executemany("UPDATE OR IGNORE identities SET account = ? WHERE id = ?", (row for row in found if row[0]))
            rows = db.execute(f"SELECT {columns} FROM identities WHERE account = '' ORDER BY last_at").fetchall()
            found = [(*row[:2], account_of(Context(*row, *[""] * 6), "").lstrip("?")) for row in rows]
            by_index = {index: account for index, _, account in found if account}
            self._adopt(db, {**by_index, **{(index, source): account for index, source, account in found}})

    def delete_some(self, before: float, rows: int = 2000) -> int:
        """Delete up to ``rows`` events older than the full hour at or before ``before``; their sums stay."""
        before = min(before, (self.span() or (0.0, 0.0))[1])
        floor = int(before) // 3600 * 3600 // BUCKET_S
        with self._write() as db:
            if floor > _meta_in(db, "events_floor", 0):
                _put_meta(db, "events_floor", floor)
            done = db.execute(
                "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE ts_epoch < ? ORDER BY ts_epoch LIMIT ?)",
                (floor * BUCKET_S, rows),
            ).rowcount
            _count(db, deleted=done)
        return done

    # Small values and counts

    @property
    def counts(self) -> dict[str, int]:
        """How many events were ever stored, rejected and so on, as last known while the database cannot be read."""
        with suppress(StoreError), self._read() as db:
            self._known_counts = _counts_in(db)
        return dict(self._known_counts)

    @property
    def event_count(self) -> int:
        """The number of rows in ``events``, without counting them."""
        counts = self.counts
        return counts["stored"] + counts["adopted"] - counts["deleted"]

    @property
    def byte_count(self) -> int:
        """The size of the database with its write-ahead log."""
        return sum(path.stat().st_size for path in self._paths if path.exists())

    def check_writable(self) -> None:
        """Open and end a transaction that writes, so that nothing is popped that could not be stored."""
        with self._write(changes=False):
            pass

    def get_meta(self, key: str) -> Any:
        """Return a small value by its key; None where there is none."""
        with self._read() as db:
            return _meta_in(db, key)

    def put_meta(self, key: str, value: Any) -> None:
        """Write a small value; None is none."""
        with self._write(changes=False) as db:
            _put_meta(db, key, value)

    # Outages

    def begin_outage(self, at: float, reason: str, is_measured: bool = False) -> None:
        """Open an outage unless one is open, not before the last event unless its length was measured."""
        with self._write() as db:
            last = None if is_measured else db.execute(f"SELECT {_LAST_EVENT_AT}", (at,)).fetchone()[0]
            db.execute(
                "INSERT INTO outages(from_at, reason) SELECT ?, ? "
                "WHERE NOT EXISTS (SELECT 1 FROM outages WHERE to_at IS NULL)",
                (max(at, last or 0.0), reason),
            )

    def mend_outages(self, now: float) -> None:
        """Correct outages that were recorded by a clock that has been set since: none begins or ends after now."""
        with self._write() as db:
            begin = f"MIN(?1, IFNULL({_LAST_EVENT_AT}, ?1))"
            db.execute(f"UPDATE outages SET from_at = {begin} WHERE to_at IS NULL AND from_at > ?1", (now,))
            db.execute("DELETE FROM outages WHERE from_at > ?", (now + _DAY_S,))
            lost = f"reason = 'publishing_off' OR {_MENDED_END} - from_at > ?2"
            db.execute(
                f"UPDATE outages SET to_at = {_MENDED_END}, lost = {lost} WHERE to_at > ?1 + {SHORTEST_RETENTION_S}",
                (now, _meta_in(db, "retention_s", SHORTEST_RETENTION_S)),
            )

    def end_outage(self, at: float, restart_lost: bool | None = None) -> None:
        """End the open outage, by a restart that lost records or not where told; a shorter one is dropped otherwise."""
        self.mend_outages(at)
        with self._write() as db:
            network = "to_at IS NULL AND reason <> 'publishing_off'"
            if restart_lost is None:
                db.execute(f"DELETE FROM outages WHERE {network} AND from_at > ?", (at - SHORTEST_RETENTION_S,))
            else:
                db.execute(f"UPDATE outages SET reason = 'proxy_restarted' WHERE {network}")
            db.execute(
                f"UPDATE outages SET to_at = MAX(from_at, ?), lost = ? OR {_OUTAGE_LOST} WHERE to_at IS NULL",
                (at, bool(restart_lost), at, _meta_in(db, "retention_s", SHORTEST_RETENTION_S)),
            )

    def outages(self, window: Window, now: float) -> list[dict[str, Any]]:
        """List the spans in which nothing was recorded, and whether requests were lost; ``to`` None goes on still."""
        with self._read() as db:
            rows = db.execute(
                f"SELECT from_at, to_at, reason, IFNULL(lost, {_OUTAGE_LOST}) FROM outages "
                "WHERE from_at < ? AND (to_at IS NULL OR to_at > ?) ORDER BY from_at LIMIT 500",
                (now, _meta_in(db, "retention_s", SHORTEST_RETENTION_S), window.end, window.start),
            ).fetchall()
        return [{"from": start, "to": end, "reason": reason, "lost": bool(lost)} for start, end, reason, lost in rows]

    # Reading usage

    def accounts(self) -> list[Account]:
        """Return the accounts that all identities seen so far make up."""
        with self._read() as db:
            return self._accounts_in(db)

    def _owners_in(self, db) -> dict[int, Account]:
        return {identity_id: account for account in self._accounts_in(db) for identity_id in account.identity_ids}

    def _accounts_in(self, db) -> list[Account]:
        version = self.changes
        if self._accounts[0] != version:
            rows = db.execute(
                "SELECT id, auth_index, source, account, provider, plan, first_at, last_at "
                "FROM identities UNION ALL SELECT 0, '', email, account_id_tag, 'codex', "
                "IFNULL(plan, ''), 0, 0 FROM quota_accounts WHERE account_id_tag <> ''"
            )
            self._accounts = (version, resolve_accounts(Identity(*row) for row in rows))
        return self._accounts[1]

    def usage(self, window: Window, bucket_s: int, offset_s: int, filters: Filters = _NO_FILTERS) -> Usage:
        """Sum up a window, in buckets cut ``offset_s`` east of UTC."""

        def cell_of(identity_id: int, model_id: int, key_id: int) -> Cell:
            return Cell(owners[identity_id], models[model_id], keys.get(key_id))

        with self._read() as db:
            plan = _UsagePlan(db, window, filters, self._accounts_in(db))
            owners, models, keys = self._owners_in(db), _models_in(db), _keys_in(db)
            buckets = {row[0] * bucket_s - offset_s: row[1:-1] for row in plan.by_bucket(db, bucket_s, offset_s)}
            rows = [(cell_of(*row[:3]), row[3], row[4:-1], row[-1]) for row in plan.sums(db, _CELL_COLUMNS)]
            parts = by_key((reason_id, (cell, sums[0], at)) for cell, reason_id, sums, at in rows if reason_id)
            failures = self._failures_in(db, plan, parts)
            speeds = by_key((row[:3], row[3]) for row in plan.speeds(db))
        told = by_key((cell_of(*ids), b"".join(parts)) for ids, parts in speeds.items())
        cells = by_key((cell, sums) for cell, _, sums, _ in rows)
        speeds = {cell: b"".join(parts) for cell, parts in told.items()}
        return Usage(buckets, {cell: add_sums(sums) for cell, sums in cells.items()}, failures, speeds)

    @staticmethod
    def _failures_in(db, plan: _UsagePlan, parts: Mapping[int, Sequence[Any]]) -> list[dict[str, Any]]:
        """Return the most frequent failures, from (cell, requests, time of the newest) by reason."""
        reasons = _dicts(db.execute("SELECT id, status_code, NULLIF(error, '') AS error FROM reasons"))
        known = [row for row in reasons if row["id"] in parts]
        failures = [{**row, "requests": sum(part[1] for part in parts[row["id"]])} for row in known]
        failures = sorted(failures, key=operator.itemgetter("requests"), reverse=True)[:50]
        for failure in failures:
            reason_id, accounts = failure.pop("id"), Counter()
            for cell, requests, _ in parts[reason_id]:
                accounts[cell.account.name] += requests
            failure["last_at"] = plan.last_quarter(db, reason_id, max(part[2] for part in parts[reason_id]))
            failure["accounts"] = [name for name, _ in accounts.most_common()]
        return failures

    def sums_by(self, part: str, window: Window, filters: Filters = _NO_FILTERS) -> list[tuple[Any, Sums]]:
        """Sum up a window by Account, ``model``, ``key`` (mask) or ``status`` (code, or ``ok``) alone."""
        with self._read() as db:
            column, values = {
                "account": (_IDENTITY_OF, self._owners_in(db)),
                "model": (_MODEL_ID_OF, _models_in(db)),
                "key": (_KEY_OF, _keys_in(db)),
                "status": (_REASON_OF, {0: "ok", **dict(db.execute("SELECT id, status_code FROM reasons").fetchall())}),
            }[part]
            plan = _UsagePlan(db, window, filters, self._accounts_in(db))
            rows = plan.sums(db, {column: _CELL_COLUMNS[column]})
            return [(values.get(row[0]), row[1:-1]) for row in rows]

    def series(self, most: int) -> dict[tuple[str, str], Sums]:
        """Return all that was ever counted, by labels for account and model, which stay as they were given first.

        So no sum ever falls, whatever an account is called later. Pairs beyond ``most`` are added up to ``other``.
        """
        with self._read() as db:
            rows = db.execute(f"SELECT identity_id, model_id, {_ADDED} FROM usage_by_week GROUP BY 1, 2").fetchall()
            given = {row[:2]: row[2:] for row in db.execute("SELECT * FROM series")}
            owners, models = self._owners_in(db), _models_in(db)
        labels, new = set(given.values()), [row[:2] for row in rows if row[:2] not in given]
        for identity_id, model_id in new:
            label = (owners[identity_id].name, models[model_id])
            label = label if label in labels or len(labels) < most else ("other", "other")
            given[identity_id, model_id] = label
            labels.add(label)
        if new:
            with self._write(changes=False) as db:
                added = [(*pair, *given[pair]) for pair in new]
                db.executemany("INSERT OR IGNORE INTO series VALUES (?, ?, ?, ?)", added)
        by_label = by_key((given[row[:2]], row[2:]) for row in rows)
        return {label: add_sums(parts) for label, parts in by_label.items()}

    def span(self) -> tuple[float, float] | None:
        """Return the times of the first quarter hour and the last event ever counted; None where there is none."""
        with self._read() as db:
            oldest = f"(SELECT MIN(bucket) * {BUCKET_S}.0 FROM usage_by_time)"
            first, last = db.execute(f"SELECT {oldest}, IFNULL(MAX(ts_epoch), {oldest}) FROM events").fetchone()
        return None if first is None else (first, last)

    def tokens(self, spans: Iterable[tuple[Account | None, float | None, float]], now: float) -> list[int | None]:
        """Sum up what accounts used from a start to an end; None where that, or a part of it, was not recorded."""
        first, last = self.span() or (math.inf, 0.0)
        after_all = (max(now, last) // _WEEK_S + 1) * _WEEK_S  # where a bucket of each size ends
        lost = f"SELECT from_at, IFNULL(to_at, ?) FROM outages WHERE IFNULL(lost, {_OUTAGE_LOST})"

        def sum_up(account: Account | None, start: float | None, end: float) -> int | None:
            if account is None or not account.identity_ids or start is None or start < first:
                return None
            if any(from_at < end and to_at > start for from_at, to_at in losses):
                return None
            start, end = (at if at >= floor_at else round(at / BUCKET_S) * BUCKET_S for at in (start, end))
            key = (tuple(account.identity_ids), start, end)
            tokens = self._tokens.get(key)
            if tokens is None:
                tokens = _tokens_of(db, account, start, end if account.last_at >= end else after_all)
            return cache(self._tokens, key, tokens) if end < min(now, last) - 7200 else tokens

        with self._read() as db:
            floor_at = _meta_in(db, "events_floor", 0) * BUCKET_S
            losses = db.execute(lost, (now, now, _meta_in(db, "retention_s", SHORTEST_RETENTION_S))).fetchall()
            return [sum_up(*span) for span in spans]

    def requests(
        self, limit: int, window: Window = EVER, filters: Filters = _NO_FILTERS, before: Any = None, order=Order()
    ) -> list[dict[str, Any]]:
        """List single events; ``before`` is the (value sorted by, id) of the last one seen."""
        by_time, is_down, rows = order.sort == "time", order.direction == "desc", []
        before = before or (math.inf if is_down else -math.inf, 0)
        with self._read(is_search=bool(filters.text) or not by_time) as db:
            accounts = self._accounts_in(db)
            start, end = max(window.start, _meta_in(db, "events_floor", 0) * BUCKET_S), window.end
            condition, values = _conditions(db, filters, accounts, on_rows=True)
            owners = self._owners_in(db)
            if by_time:  # so that the index is entered where the list goes on
                start, end = (start, min(end, before[0] + 1e-6)) if is_down else (max(start, before[0]), end)
            for span in _spans_to_search(db, Window(start, end), filters, accounts, order):
                bound = (max(start, span.start), min(end, span.end), *before, *values, limit - len(rows))
                rows += _dicts(db.execute(_list_events(order, condition), bound))
                if len(rows) >= limit:
                    break
        for row in rows:
            row.update({name: row[name] or None for name in (*_CONTEXT_COLUMNS, "auth_index")})
            owner = owners.get(row.pop("identity_id"))
            row["account"] = owner.name if owner else row["source"] or row["auth_index"] or "unknown"
            row["account_name"] = owner_name(filters.names, owner) if owner else None
            row["key_name"] = filters.names.get(tag_of_mask(row["api_key"] or ""))
        return rows

    # Quota: rows as they are; what they mean is known in readings

    def save_reading(self, row: Mapping[str, Any], merge: Callable[[Any], Any] | None = None) -> None:
        """Save a quota reading as its account's newest; ``merge`` makes it of the newest so far, None: not at all."""
        with self._write() as db:
            self._move_quota(db, row["email"], row["account_id_tag"], row["account_id_tag"])
            newest = "(SELECT snapshot_id FROM quota_accounts WHERE email = ? AND account_id_tag = ?)"
            account = row["email"], row["account_id_tag"]
            found = db.execute(f"SELECT * FROM quota_snapshots WHERE id = {newest}", account)
            merged = merge(next(iter(_dicts(found)), None)) if merge else row
            if merged is None:
                return
            columns = ("id", *_SNAPSHOT_COLUMNS)
            inserted = db.execute(
                f"INSERT OR REPLACE INTO quota_snapshots({', '.join(columns)}) "
                f"VALUES ({', '.join('?' * len(columns))})",
                [merged.get(name) for name in columns],
            )
            account = [merged.get(name) for name in ("email", "account_id_tag", "plan", "state", "message", "ts_epoch")]
            self._put_quota_state(db, *account, merged.get("id") or inserted.lastrowid)
            for span in merged.get("spans", ()):
                self._follow_window(db, row["account_id_tag"], merged["ts_epoch"], *span)

    @staticmethod
    def _follow_window(db, account: str, at: float, label: str, end_at, seconds, used_percent: float) -> None:
        """Let the account's window of that label go on as it is read now, or end it where this is the next one."""
        start_at = end_at - seconds if end_at and seconds else None
        known = "quota_window_history WHERE account = ?1 AND label = ?2 ORDER BY id DESC"
        newest = db.execute(f"SELECT id, end_at, peak_percent FROM {known} LIMIT 1", (account, label)).fetchone()
        row_id, reset_at, peak = newest or (None, None, 0)
        has_moved = end_at is None or reset_at is None or end_at - reset_at > 120
        has_passed = reset_at is not None and reset_at <= at and has_moved
        has_fallen = used_percent < peak - (0 if has_moved else 1)  # a point is no fall: percentages are rounded
        if has_fallen and not has_passed:
            db.execute("UPDATE quota_window_history SET end_at = ? WHERE id = ?", (at, row_id))
        if peak and (has_fallen or has_passed):  # one of which nothing was used has not begun
            row_id, peak = None, 0
        db.execute(
            "INSERT OR REPLACE INTO quota_window_history(id, account, label, start_at, end_at, read_at, peak_percent) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row_id, account, label, start_at, end_at, at, max(peak, used_percent)),
        )
        rest = f"SELECT id FROM {known} LIMIT -1 OFFSET {1 + MOST_ENDED}"
        db.execute(f"DELETE FROM quota_window_history WHERE id IN ({rest})", (account, label))

    def quota_windows(self) -> list[dict[str, Any]]:
        """List the quota windows that go on and those that have ended, newest first."""
        with self._read() as db:
            return _dicts(db.execute("SELECT * FROM quota_window_history ORDER BY id DESC"))

    def save_quota_state(
        self, email: str, tag: str, plan: str | None, state: str, message: str | None, now: float
    ) -> None:
        """Record why an account has no new reading; the last good one stays beside it."""
        with self._write() as db:
            self._put_quota_state(db, email, tag, plan, state, message, now, None)

    @staticmethod
    def _put_quota_state(db, email, tag, plan, state, message, at, snapshot_id) -> None:
        db.execute(
            "INSERT INTO quota_accounts(email, account_id_tag, plan, state, message, state_at, snapshot_id) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT(email, account_id_tag) DO UPDATE SET "
            "plan = COALESCE(excluded.plan, plan), snapshot_id = COALESCE(excluded.snapshot_id, snapshot_id), "
            + ", ".join(  # what was never read says nothing against what is known
                f"{name} = CASE excluded.state WHEN 'never' THEN {name} ELSE excluded.{name} END"
                for name in ("message", "state_at", "state")
            ),
            (email, tag, plan, state, message, at, snapshot_id),
        )
        if tag:  # the account id is known now: the row adopted by its mail alone is this one
            db.execute("DELETE FROM quota_accounts WHERE email = ? AND account_id_tag = ''", (email,))

    @staticmethod
    def _move_quota(db, email: str, former_tag: str, tag: str) -> None:
        """Let the row that an account has under another mail, or under a former tag, be its row from now on."""
        best = db.execute(
            "SELECT email, account_id_tag FROM quota_accounts WHERE account_id_tag = ? OR (email = ? AND "
            "account_id_tag = ?) ORDER BY snapshot_id IS NULL, state_at DESC",
            (tag, email, former_tag),
        ).fetchone()
        if tag and best:
            where = "WHERE email = ? AND account_id_tag = ?"
            change = f"UPDATE OR REPLACE quota_accounts SET email = ?, account_id_tag = ? {where}"
            db.execute(change, (email, tag, *best))
            db.execute(f"DELETE FROM quota_accounts {where} AND account_id_tag <> ?", (email, former_tag, tag))
            db.execute("UPDATE quota_window_history SET account = ? WHERE account = ?", (tag, former_tag))

    def register_quota_accounts(self, files: Sequence[AccountFile], messages: Mapping[str, str], now: float) -> None:
        """Add the accounts of these files, with a message by state; of known ones only ``disabled`` is changed."""
        mails = Counter(file.email for file in files)
        known = "SELECT CASE WHEN allowed = 0 OR limit_reached = 1 THEN 'limited' ELSE 'ok' END FROM quota_snapshots s "
        known = f"({known} WHERE s.id = snapshot_id AND excluded.state <> 'disabled')"  # as it was before
        with self._write() as db:
            for file in files:
                state = "disabled" if file.disabled else "never"
                by_mail = ("", tag_of(file.email)) if mails[file.email] == 1 else ()
                for former_tag in (*file.former_tags, *by_mail):
                    self._move_quota(db, file.email, former_tag, file.tag)
                db.execute(
                    "INSERT INTO quota_accounts(email, account_id_tag, plan, state, message, state_at) "
                    "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT(email, account_id_tag) DO UPDATE SET "
                    f"state = IFNULL({known}, excluded.state), state_at = excluded.state_at, "
                    f"message = CASE WHEN {known} IS NULL THEN excluded.message END "
                    "WHERE (state = 'disabled') <> (excluded.state = 'disabled')",
                    (file.email, file.tag, file.plan or None, state, messages[state], now),
                )
                db.execute(
                    "UPDATE quota_accounts SET subscription_until = ? WHERE email = ? AND account_id_tag = ?",
                    (file.subscription_until, file.email, file.tag),
                )

    def forget_quota_accounts(self, accounts: Iterable[tuple[str, str]]) -> None:
        """Take accounts (email, tag) off the quota table; their readings stay."""
        with self._write() as db:
            db.executemany("DELETE FROM quota_accounts WHERE email = ? AND account_id_tag = ?", accounts)

    def quotas(self) -> list[dict[str, Any]]:
        """List each account's state with the columns of its last good reading, None where it has none, by mail."""
        query = (
            "SELECT a.email, a.account_id_tag, COALESCE(NULLIF(s.plan, ''), a.plan) AS plan, a.state, a.message, "
            f"a.state_at, a.subscription_until, s.id, {_list('s', _SNAPSHOT_COLUMNS[3:])} "
            "FROM quota_accounts a LEFT JOIN quota_snapshots s ON s.id = a.snapshot_id ORDER BY a.email, a.plan"
        )
        with self._read() as db:
            return _dicts(db.execute(query))

    def readings_since(self, since: float, most: int = 2000) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Return the readings since then by (email, tag), of the ``most`` newest rows of all accounts."""
        query = (
            "SELECT email, account_id_tag, ts_epoch, windows FROM quota_snapshots WHERE windows IS NOT NULL "
            "AND ts_epoch >= ? AND id > (SELECT MAX(id) FROM quota_snapshots) - ? ORDER BY id"
        )
        with self._read() as db:
            rows = _dicts(db.execute(query, (since, most)))
        return by_key(((row["email"], row["account_id_tag"] or ""), row) for row in rows)

    def downsample_snapshots(self, before: float) -> None:
        """Keep one reading an hour and account of those older than ``before``, and every account's newest."""
        with self._write() as db:
            db.execute(
                "DELETE FROM quota_snapshots WHERE ts_epoch < ? AND id NOT IN (SELECT MAX(id) FROM quota_snapshots "
                "WHERE ts_epoch < ? GROUP BY email, IFNULL(account_id_tag, ''), CAST(ts_epoch AS INTEGER) / 3600) "
                "AND id NOT IN (SELECT snapshot_id FROM quota_accounts WHERE snapshot_id IS NOT NULL)",
                (before, before),
            )

    # Proof

    def find_faults(self) -> list[str]:
        """Compare the file with itself: its structure, and the roll-ups against the rows they were made of."""
        with self._read() as db:
            found = [row[0] for row in db.execute("PRAGMA quick_check(5)").fetchall()]
            if found != ["ok"]:
                return [f"the file is damaged: {found[0]}"]
            floor = _meta_in(db, "events_floor", 0)
            query = f"SELECT {', '.join(_CELL_COLUMNS)}, {_EVENT_SUMS} FROM {_EVENTS} WHERE e.ts_epoch >= ? "
            events = set(db.execute(f"{query} GROUP BY 1, 2, 3, 4", (floor * BUCKET_S,)))
            quarters, above = _cells_in(db, "usage_by_quarter"), _cells_in(db, "usage_by_quarter", floor)
            faults = [] if above == events else ["usage_by_quarter does not add up to the events"]
            odd = [table for table in list(_ROLL_UPS)[:-1] if _cells_in(db, table) != quarters]
            times = db.execute(f"SELECT {', '.join(SUM_NAMES)} FROM usage_by_time")
            odd += ["usage_by_time"] if add_sums(times) != add_sums(row[4:] for row in quarters) else []
        return [*faults, *(f"{table} does not add up to usage_by_quarter" for table in odd)]


def _counts_in(db) -> dict[str, int]:
    values = dict(db.execute("SELECT key, value FROM meta"))
    names = ("sequence", "stored", "rejected", "ignored", "adopted", "deleted")
    return {name: values.get(name, 0) for name in names}


def _count(db, **added: int) -> None:
    """Add to counts in the database itself, so that two that write keep them right."""
    db.executemany(
        "INSERT INTO meta VALUES (?, ?) ON CONFLICT(key) DO UPDATE SET value = value + excluded.value",
        [(name, number) for name, number in added.items() if number],
    )


def _rows_to_adopt(db) -> int:
    """Return the number of events in a file of an earlier version; 0 for one of this version."""
    if db.execute("PRAGMA user_version").fetchone()[0] >= _SCHEMA_STEPS[-1][0] or not _columns_of(db, "events"):
        return 0
    return db.execute("SELECT COUNT(*) FROM events").fetchone()[0]


def _touch(identity_id: int, events: Sequence[Event]) -> tuple[Any, ...]:
    """Return what a batch's events of one identity tell of it, as _TOUCH_IDENTITY binds it."""
    times = [event.ts_epoch for event in events]
    provider = next(filter(None, (event.context.provider for event in reversed(events))), "")
    plan = next(filter(None, (event.plan for event in reversed(events))), None)
    return min(times), max(times), provider, plan, identity_id


def events_to_adopt(path: Path) -> int:
    """Return how many events a file of an earlier version has, without changing it; 0 for none. Raises StoreError."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            return _rows_to_adopt(db)
    except sqlite3.Error as error:
        raise StoreError(_store_reason(path, error)) from error


def _cells_in(db, table: str, first: int = 0) -> set[tuple[int, ...]]:
    columns = ", ".join(_CELL_COLUMNS.values())
    return set(db.execute(f"SELECT {columns}, {_ADDED} FROM {table} r WHERE bucket >= ? GROUP BY {columns}", (first,)))


def _models_in(db) -> dict[int, str]:
    return dict(db.execute("SELECT id, name FROM models").fetchall())


def _keys_in(db) -> dict[int, str]:
    """Return the client keys by id, each as its fullest mask: what has one tag is one key; 0 is none."""
    rows = db.execute("SELECT id, name FROM client_keys ORDER BY LENGTH(name), name").fetchall()
    fullest = {tag_of_mask(mask): mask for _, mask in rows}
    return {0: "", **{key_id: fullest[tag_of_mask(mask)] for key_id, mask in rows}}


def back_up(source: Path, target: Path) -> tuple[int, int]:
    """Copy a database, also while it is in use, prove the copy, and return its requests and tokens. Raises StoreError.

    A target that exists is left alone; what fails leaves nothing behind.
    """
    import tempfile

    try:
        _refuse_existing(target)
        if str(target) in [f"{source}{end}" for end in ("-wal", "-shm", "-journal", ".spool", ".lock")]:
            raise StoreError(f"{target} is a name that the database itself uses; take another")
        if not source.is_file():
            raise StoreError(f"there is no database {source} to back up; name it with --db")
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as folder:
            part = Path(folder, target.name)
            make_private(part)
            with closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True)) as db:
                counted = _copy_in_one_step(db, part)
            _refuse_existing(target)  # one that was made meanwhile
            os.replace(part, target)
        return counted
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {os_reason(error)}; name a place that this user may") from error
    except sqlite3.Error as error:
        raise StoreError(f"no backup was made of {source} to {target}: {error}; nothing is left of it") from error


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(str(target)):
        raise StoreError(f"{target} exists already; name a file that does not, nothing is written over")


def _copy_in_one_step(db, part: Path) -> tuple[int, int]:
    with closing(sqlite3.connect(str(part))) as copy:
        db.backup(copy)
        found = copy.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(f"the copy is not sound ({found}), so the database itself may be damaged")
        return copy.execute("SELECT COUNT(*), IFNULL(SUM(total_tokens), 0) FROM events").fetchone()


def _store_reason(path: Path, error: BaseException) -> str:
    text = str(error).lower()
    if isinstance(error, OSError):
        reason = os_reason(error)
        return f'{path} cannot be opened: {reason}; give this user the right to write there, or set "database"'
    if "locked" in text or "busy" in text:
        return f"{path} is locked by another program; close it there, recording goes on by itself"
    if "full" in text:
        return f"no room on the disk of {path}; free some, recording goes on by itself"
    if "readonly" in text or "unable to open" in text:
        return f"{path} or its folder cannot be written; give this user the right to (chown, chmod u+w)"
    if "not a database" in text or "malformed" in text:
        return f"{path} is damaged or no SQLite database; move it away (it is not overwritten) and start again"
    return f'{path} cannot be used: {error}; if another program made it, set "database" to another file'


MOST_ENDED = 8  # windows of one label that are kept beyond their end

_SNAPSHOT_COLUMNS = (
    "email account_id_tag plan ts_epoch timestamp allowed limit_reached primary_used_percent primary_remaining_percent "
    "primary_reset_at secondary_used_percent secondary_remaining_percent secondary_reset_at windows credits_balance "
    "raw_json source"
).split()

_CONTEXT_COLUMNS = tuple(name for name in Context._fields if name not in ("auth_index", "source", "account"))
_LIST_EVENTS = (
    f"SELECT e.id, {_list('e', _OWN_EVENT_COLUMNS)}, e.source, {_list('c', _CONTEXT_COLUMNS)}, "
    f"IFNULL(i.auth_index, CAST(e.auth_index AS TEXT)) AS auth_index, {_IDENTITY_OF} AS identity_id "
    f"FROM {_EVENTS} LEFT JOIN identities i ON i.id = c.identity_id WHERE e.id IN "
)


def _list_events(order: Order, condition: str) -> str:
    """Return the SQL of a list: which rows are in it, then all about them."""
    column, sign, events = f"e.{SORTS[order.sort]}", "<" if order.direction == "desc" else ">", _EVENTS
    unknown = -1 if order.direction == "desc" else 10**15  # beyond all that are known
    if order.sort != "time":
        # Rows lie about as they came: reading a part of the table from end to end takes a third of the index's time.
        ends = (f"(SELECT {end}(id) FROM events WHERE ts_epoch >= ?1 AND ts_epoch < ?2)" for end in ("MIN", "MAX"))
        condition += f" AND e.id BETWEEN {' AND '.join(ends)}"
        column, events = f"IFNULL({column}, {unknown})", _EVENTS.replace("events e", "events e NOT INDEXED")
    behind = f"({column}, e.id) {sign} (IFNULL(?3, {unknown}), ?4)"
    within = f"e.ts_epoch >= ?1 AND e.ts_epoch < ?2 AND {behind}{condition}"
    in_order = f"ORDER BY {column} {order.direction}, e.id {order.direction}"
    return f"{_LIST_EVENTS} (SELECT e.id FROM {events} WHERE {within} {in_order} LIMIT ?) {in_order}"


def _spans_to_search(db, window: Window, filters: Filters, accounts: Sequence[Account], order: Order) -> Iterable[Any]:
    """Return the spans that contain what the filters ask for, in the order of a list by time; else the whole window."""
    condition, values = _conditions(db, filters, accounts, on_rows=False)
    if not condition or order.sort != "time":
        return [window]
    buckets = db.execute(
        f"SELECT DISTINCT r.bucket FROM usage_by_quarter r WHERE r.bucket > ? AND r.bucket <= ?{condition} "
        f"ORDER BY r.bucket {order.direction}",
        (window.start / BUCKET_S - 1, window.end / BUCKET_S, *values),
    )
    return (Window(bucket * BUCKET_S, (bucket + 1) * BUCKET_S) for (bucket,) in buckets)


_SEARCHED = "e.model e.source e.error c.alias c.endpoint c.reasoning_effort c.service_tier".split()


def _conditions(db, filters: Filters, accounts: Sequence[Account], on_rows: bool) -> tuple[str, list[Any]]:
    """Return the filters as SQL conditions on ``events e`` or on a roll-up ``r``, with the values to bind."""
    identity, model, key, reason = _CELL_COLUMNS if on_rows else _CELL_COLUMNS.values()
    parts, values = [], []
    if filters.account is not None:
        by_mail = filters.names.get  # a name for several of one mail filters as the mail does
        called = (
            (one.identity_ids, (one.name, one.mail, owner_name(filters.names, one), by_mail(one.mail.lower())))
            for one in accounts
        )
        listed = ", ".join(str(identity_id) for ids, names in called for identity_id in ids if filters.account in names)
        parts.append(f"{identity} IN ({listed})")
    if filters.key is not None:
        asked = {tag_of_mask(filters.key), f"#{filters.key.lower().lstrip('#')}"}
        asked.update(tag for tag, name in filters.names.items() if name == filters.key)
        asked.update([""] if filters.key == "none" else [])
        listed = ", ".join(str(key_id) for key_id, mask in _keys_in(db).items() if tag_of_mask(mask) in asked)
        parts.append(f"{key} IN ({listed})")
    if filters.model is not None:
        parts.append(f"{_MODEL_OF} = ?" if on_rows else f"{model} = (SELECT id FROM models WHERE name = ?)")
        values.append(filters.model)
    if filters.status in ("ok", "failed"):
        parts.append(f"{reason} {'<>' if filters.status == 'failed' else '='} 0")
    elif filters.status is not None:
        parts.append(f"{reason} IN (SELECT id FROM reasons WHERE status_code = ?)")
        values.append(int(filters.status))
    if filters.text and on_rows:
        text = re.sub(r"([\\%_])", r"\\\1", filters.text)
        key_text = text.replace("…", "#").lstrip("#")  # a mask is "start…end #tag"
        searched = dict.fromkeys(_SEARCHED, f"%{text}%")
        searched.update({"e.request_id": f"{text}%", "e.status_code": text})  # 503 stands in many random ids
        searched["'#' || REPLACE(c.api_key, '…', '#')"] = f"%#{key_text}%"
        parts.append("(" + " OR ".join(f"{column} LIKE ? ESCAPE '\\'" for column in searched) + ")")
        values += searched.values()
    return "".join(f" AND {part}" for part in parts), values


# The plan of a summary. A window is cut into whole days, then whole hours before and after them, then whole quarter
# hours, and what is left at its two ends is read from the rows, so that sums are exact to the microsecond:
#
#     rows | quarters | hours | days … days | hours | quarters | rows
#
# A chart's buckets are cut at local marks, so only roll-ups whose buckets fit them take part: in a zone half an hour
# off, quarters do. Below the floor the rows are deleted: there a cut quarter counts as a whole.


class _UsagePlan:
    """Plan one summary: whole buckets from the roll-ups, partial ones at the ends from the rows."""

    def __init__(self, db, window: Window, filters: Filters, accounts: Sequence[Account]):
        self._start, self._end = window
        (newest,) = db.execute("SELECT MAX(ts_epoch) FROM events").fetchone()
        if newest is not None and newest < window.end:  # nothing is behind the end
            self._end = -(-window.end // _WEEK_S) * _WEEK_S
        self._floor_at = _meta_in(db, "events_floor", 0) * BUCKET_S
        self._levels = list(_ROLL_UPS)  # the coarsest first
        self._of_rows, self._of_roll_up = (_conditions(db, filters, accounts, on_rows) for on_rows in (True, False))

    def by_bucket(self, db, bucket_s: int, offset_s: int) -> Iterable[Any]:
        """Return rows of local bucket number and sums."""
        levels = [table for table in self._levels if bucket_s % _ROLL_UPS[table] == offset_s % _ROLL_UPS[table] == 0]
        if levels and not self._of_roll_up[0]:
            levels = ["usage_by_time"]
        in_rows = f"(CAST(e.ts_epoch AS INTEGER) + {offset_s}) / {bucket_s}"
        first = (int(self._start) + offset_s) // bucket_s  # a cut quarter of deleted requests begins before it
        in_roll_up = f"MAX({first}, (r.bucket * {{seconds}} + {offset_s}) / {bucket_s})"
        return self.sums(db, {in_rows: in_roll_up}, levels=levels)

    def speeds(self, db) -> Iterable[Any]:
        """Return rows of identity, model, client key and speeds of successes."""
        of_rows, of_roll_up = (", ".join(list(columns)[:3]) for columns in (_CELL_COLUMNS, _CELL_COLUMNS.values()))
        of_rows = f"SELECT {of_rows}, {_SPEEDS_OF} {{where}} AND NOT e.failed"
        of_roll_up = f"SELECT {of_roll_up}, r.speeds {{where}} AND r.speeds IS NOT NULL"
        query, values = self._union(self._levels[:-1], of_rows, of_roll_up)
        return db.execute(query, values) if query else []

    def last_quarter(self, db, reason_id: int, last_at: float) -> int:
        """Return when the quarter hour of a reason's last request began, from the time of it that sums() tell."""
        first, (condition, bound) = int(last_at // BUCKET_S), self._of_roll_up
        where = f"r.bucket > ? AND r.bucket < ? AND r.reason_id = ?{condition} ORDER BY 1 DESC LIMIT 1"
        values = (first, min(first + 7 * 96, self._end // BUCKET_S), reason_id, *bound)
        found = db.execute(f"SELECT r.bucket FROM usage_by_quarter r WHERE {where}", values).fetchone()
        return (found[0] if found else first) * BUCKET_S

    def _spans(self, levels: Sequence[str]) -> list[tuple[str | None, float, float]]:
        finest_s = _ROLL_UPS.get(levels[-1], BUCKET_S) if levels else BUCKET_S
        start, end, floor_at = self._start, self._end, self._floor_at
        if start < floor_at:
            start = start // finest_s * finest_s
        if end < floor_at:
            end = -(-end // finest_s) * finest_s
        middle = min(max(start, floor_at), end)
        return [*_cut(levels or ["usage_by_quarter"], start, middle), *_cut(levels, middle, end)]

    def sums(self, db, columns: Mapping[str, str], levels: Sequence[str] | None = None) -> Iterable[Any]:
        """Return rows of columns (SQL on ``events e`` and on a roll-up ``r``), their sums, and when the last was."""
        in_rows, in_roll_up = ", ".join(columns), ", ".join(columns.values())
        # A chart's in the order of the table, so that SQLite sums up as it reads; over few rows below the rest.
        order, last = ("r.bucket", "r.bucket") if "r.bucket" in in_roll_up else (in_roll_up, "MAX(r.bucket)")
        of_rows = f"SELECT {in_rows}, {_EVENT_SUMS}, MAX(e.ts_epoch) {{where}} GROUP BY {in_rows}"
        of_roll_up = f"SELECT {in_roll_up}, {_ADDED}, {last} * {{seconds}} {{where}} GROUP BY {order}"
        query, values = self._union(self._levels if levels is None else levels, of_rows, of_roll_up)
        keys = ", ".join(f"k{number}" for number in range(len(columns)))
        parts = f"WITH parts({keys}, {', '.join(SUM_NAMES)}, last_at) AS ({query})"
        added = f"{parts} SELECT {keys}, {_ADDED}, MAX(last_at) FROM parts GROUP BY {keys}"
        return db.execute(added, values) if query else []

    def _union(self, levels: Sequence[str], of_rows: str, of_roll_up: str) -> tuple[str, list[Any]]:
        """Return one query made of one for each span, and the values to bind."""
        parts, bound = [], []
        for roll_up, start, end in self._spans(levels):
            table, column, query = _EVENTS, "e.ts_epoch", of_rows
            condition, values = self._of_roll_up if roll_up else self._of_rows
            if roll_up:
                seconds = str(_ROLL_UPS.get(roll_up, BUCKET_S))
                table, column, query = f"{roll_up} r", "r.bucket", of_roll_up.replace("{seconds}", seconds)
            parts.append(query.replace("{where}", f"FROM {table} WHERE {column} >= ? AND {column} < ?{condition}"))
            bound += [start, end, *values]
        return " UNION ALL ".join(parts), bound


def _cut(levels: Sequence[str], start: float, end: float) -> Iterable[tuple[str | None, float, float]]:
    """Cut a span into (roll-up, first, last bucket), the coarsest in the middle, and (None, start, end) at the ends."""
    if start < end and not levels:
        yield None, start, end
    elif start < end:
        size_s = _ROLL_UPS.get(levels[0], BUCKET_S)
        first, last = -int(-start // size_s), int(end // size_s)
        if first < last:
            yield from _cut(levels[1:], start, first * size_s)
            yield levels[0], first, last
            yield from _cut(levels[1:], last * size_s, end)
        else:
            yield from _cut(levels[1:], start, end)


_TOKENS_IN_ROWS = f"SELECT SUM(e.total_tokens) FROM {_EVENTS} WHERE e.ts_epoch >= ? AND e.ts_epoch < ? "
_TOKENS_IN_ROWS += f"AND {_IDENTITY_OF} = ?"
_TOKENS_IN_BUCKETS = (  # each is looked up, so that those of all other accounts are not read
    "WITH RECURSIVE each(n) AS (SELECT ? UNION ALL SELECT n + 1 FROM each WHERE n + 1 < ?) "
    "SELECT SUM(total_tokens) FROM each CROSS JOIN {} WHERE bucket = n AND identity_id = ?"
)


def _tokens_of(db, account: Account, start: float, end: float) -> int:
    ids = [one.id for one in account.identities if one.id and one.last_at >= start]
    tokens = 0
    for (table, *ends), key in itertools.product(_cut(list(_ROLL_UPS), start, end), ids):
        query = _TOKENS_IN_BUCKETS.format(table) if table else _TOKENS_IN_ROWS
        tokens += db.execute(query, (*ends, key)).fetchone()[0] or 0
    return tokens


# -------------------- quota: ChatGPT's usage answers and headers, and the one client of chatgpt.com


class QuotaWindow(NamedTuple):
    """One quota window, ``seconds`` long, of an extra ``meter`` or of the account itself; None is unknown."""

    label: str
    seconds: int | None
    used_percent: float | None
    reset_at: float | None
    meter: str | None
    more: Mapping[str, Any] = {}  # a meter's other name as feature, its read_at (ISO); a budget's used, limit, unit

    @property
    def governs(self) -> bool:
        """Return whether the account stops where this window is used up."""
        return self.meter in (None, "budget")

    @property
    def names(self) -> set[str]:
        """Return the meter's names, spelled alike; the account's own is one too."""
        return {meter_key(name) for name in (self.meter, self.more.get("feature")) if name} or {""}

    @property
    def remaining_percent(self) -> float | None:
        """What is left, in percent; None is unknown."""
        return None if self.used_percent is None else _tidy(100 - self.used_percent)

    def is_due(self, now: float) -> bool:
        """Return whether the reset has passed, which makes ``used_percent`` obsolete."""
        return self.reset_at is not None and self.reset_at <= now

    def as_json(self) -> dict[str, Any]:
        """Return the window as the database and ``/api/quota`` hold it, its reset as ISO UTC text."""
        shown = {**self._asdict(), "remaining_percent": self.remaining_percent, "reset_at": utc_text(self.reset_at)}
        return {**shown.pop("more"), **shown}


def meter_key(name: str) -> str:
    """Return what all spellings of a meter's name have in common: in headers ``codex_bengalfox`` is ``Bengalfox``."""
    return re.sub(r"\Acodex_(?=.)", "", name.strip().lower().replace("-", "_"))


class Reading(NamedTuple):
    """The content of one reply."""

    state: str
    plan: str | None
    allowed: bool | None
    limit_reached: bool | None
    windows: list[QuotaWindow]
    credits_balance: str | None
    reason: str | None = None  # what limits it besides its windows, or lets it go on
    reset_credits: int | None = None
    has_credits: bool = False


class QuotaFault(DashboardError):
    """Report why an account's quota could not be read; ``state`` is the stable code shown beside it."""

    def __init__(self, state: str):
        super().__init__(QUOTA_MESSAGES[state])
        self.state = state


QUOTA_MESSAGES = {
    "expired": "the access token has expired; the proxy renews it by itself, usually with the next request",
    "relogin": "the login is no longer valid; sign in again in the proxy",
    "deactivated": "the workspace or account is deactivated",
    "blocked": "blocked by Cloudflare, not a sign-in problem; try later or set proxy_url in the account file",
    "region_blocked": "ChatGPT refuses this country or region; set proxy_url in the account file",
    "rate_limited": "asked too often; wait a few minutes",
    "server_error": "ChatGPT has a fault of its own; try later",
    "network": "chatgpt.com cannot be reached from this machine",
    "timeout": "chatgpt.com did not answer in time",
    "bad_response": "the answer was not the expected JSON",
    "no_token": "the account file has no access token; sign in again in the proxy",
    "disabled": "the account is disabled in its file and not asked",
    "never": "not asked yet; Refresh Quota asks ChatGPT",
    "proxy_unsupported": "a SOCKS proxy is set, which is not supported here; use an http:// one",
}


def parse_quota(payload: Any, now: float) -> Reading:
    """Parse a reply of the usage endpoint, which is undocumented; impossible numbers are unknown. Raises QuotaFault."""
    if not isinstance(payload, dict):
        raise QuotaFault("bad_response")
    limits, credits = _member(payload, "rate_limit"), _member(payload, "credits")
    flags = (limits.get("allowed"), limits.get("limit_reached"))
    allowed, reached = (flag if isinstance(flag, bool) else None for flag in flags)
    main = _windows_of_limits(limits, None, now, used_up=reached is True or allowed is False)
    budget = _budget_windows(payload, now)
    reason = _reason_of(payload, budget)
    # Five hours at 0 % are rounded; the flags, where present, show whether the account is let through.
    binding = [window for window in main if not limits.get("decides") and (window.label != "5h" or not allowed)]
    if reached or allowed is False or reason or any(window.remaining_percent == 0 for window in binding):
        state = "limited"
    else:
        state = "ok" if main or budget else "no_windows"
    resets = _finite(_member(payload, "rate_limit_reset_credits").get("available_count"))
    balance = "unlimited" if credits.get("unlimited") is True else credits.get("balance")
    return Reading(
        state,
        _word(payload.get("plan_type")).lower()[:32] or None,
        allowed,
        reached,
        main + budget + _extra_windows(payload, now),
        None if balance is None or isinstance(balance, (bool, dict, list)) else _printable(str(balance)[:32]),
        reason,
        int(resets) if resets is not None and resets >= 0 else None,
        credits.get("has_credits") is True or credits.get("unlimited") is True,
    )


def _budget_windows(payload: Mapping[str, Any], now: float) -> list[QuotaWindow]:
    """Return the account's own spending limit as a window, if it has one."""
    limit = _member(_member(payload, "spend_control"), "individual_limit")
    more: dict[str, Any] = {"used": _finite(limit.get("used")), "limit": _finite(limit.get("limit"))}
    if _finite(limit.get("used_percent")) is None and None not in more.values() and more["limit"] > 0:
        limit = {**limit, "used_percent": 100 * more["used"] / more["limit"]}
    window = _quota_window(limit, 0, "budget", now, used_up=False)
    more["unit"] = _printable(_word(limit.get("unit"))[:20]) or "credits"
    is_known = window is not None and (window.used_percent is not None or more["limit"] is not None)
    return [window._replace(label="budget", more=more)] if is_known else []


def _reason_of(payload: Mapping[str, Any], budget: Sequence[QuotaWindow]) -> str | None:
    """Return the limit that a reply names as reached, as a code of plain words; None for none."""
    kind = payload.get("rate_limit_reached_type")
    kind = _word(kind.get("type") if isinstance(kind, dict) else kind)
    is_spent = _member(payload, "spend_control").get("reached") is True
    told = {
        "spending_limit_reached": is_spent or any(window.remaining_percent == 0 for window in budget),
        "overage_limit_reached": _member(payload, "credits").get("overage_limit_reached"),
        kind if re.fullmatch("[a-z_]{3,60}", kind) else "limit_reached": bool(kind),
    }
    return next((reason for reason, is_reached in told.items() if is_reached is True), None)


def _windows_of_limits(limits: Mapping[str, Any], meter: str | None, now: float, used_up=False) -> list[QuotaWindow]:
    slots = (("primary_window", _FIVE_HOURS_S), ("secondary_window", _WEEK_S))
    windows = (_quota_window(limits.get(slot), seconds, meter, now, used_up) for slot, seconds in slots)
    return [window for window in windows if window is not None]


_LONGEST_WINDOW_S = 10 * 366 * 86400


def _quota_window(content: Any, slot_seconds: int, meter: str | None, now: float, used_up: bool) -> QuotaWindow | None:
    if not isinstance(content, dict):
        return None
    seconds = int(_finite(content.get("limit_window_seconds")) or 0)
    if seconds > _LONGEST_WINDOW_S:
        return None
    used, reset_at = _finite(content.get("used_percent")), _reset_at(content, now)
    if used is not None:
        used = _tidy(min(100.0, max(0.0, used)))
    elif used_up and reset_at is not None:
        used = 100
    label = window_label(seconds if seconds > 0 else slot_seconds)
    return QuotaWindow(f"{meter} {label}" if meter else label, seconds if seconds > 0 else None, used, reset_at, meter)


def _tidy(number: float) -> float:
    return int(number) if float(number).is_integer() else round(number, 2)


def _reset_at(content: Mapping[str, Any], now: float) -> float | None:
    """Return when a window resets, in epoch seconds; None where that is missing or outside 2020 to 2100."""
    after_s = _finite(content.get("reset_after_seconds"))
    return _epoch(content.get("reset_at")) or _epoch(None if after_s is None or after_s < 0 else now + after_s)


def window_label(seconds: int) -> str:
    """Return the name of a window by its length: the usual ones within 5 %, others in their largest whole unit."""
    usual = ((_FIVE_HOURS_S, "5h"), (86400, "1d"), (_WEEK_S, "7d"), (30 * 86400, "30d"), (365 * 86400, "365d"))
    for length, label in usual:
        if abs(seconds - length) <= 0.05 * length:
            return label
    for unit, letter in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{_tidy(round(seconds / unit, 1))}{letter}"
    return f"{seconds}s"


def fullest(windows: Sequence[QuotaWindow], label: str) -> QuotaWindow | None:
    """Return the window of that label; of several the one that is used up the most."""
    same = [window for window in windows if window.label == label]
    return max(same, key=lambda window: -1.0 if window.used_percent is None else window.used_percent, default=None)


def _extra_windows(payload: Mapping[str, Any], now: float) -> list[QuotaWindow]:
    windows = _windows_of_limits(_member(payload, "code_review_rate_limit"), "Code review", now)
    extra = payload.get("additional_rate_limits")
    for item in extra[:20] if isinstance(extra, list) else []:
        if isinstance(item, dict):
            feature = _word(item.get("metered_feature"))[:60]
            meter = _word(item.get("limit_name"))[:60] or feature or "Other"
            meter = f"{meter} meter" if meter.lower() == "budget" else meter  # it is not the account's
            unknown = QuotaWindow(meter, None, None, None, meter)
            found = _windows_of_limits(_member(item, "rate_limit"), meter, now) or [unknown]
            found = [window._replace(more={"feature": feature} if feature else {}) for window in found]
            windows += [] if any(found[0].names & window.names for window in windows) else found
    return windows


def payload_of_headers(headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the ``x-codex-…`` headers of a reply in the shape of the usage endpoint's answer."""
    groups = {match.group(1) for match in map(_GROUP_HEADER.fullmatch, headers) if match}
    meters = {
        meter_key(group): {
            "limit_name": headers.get(f"x-codex-{group}-limit-name"),
            "metered_feature": f"codex_{group}",
            "rate_limit": _limits_of_headers(headers, f"{group}-"),
        }
        for group in sorted(groups - {"primary", "secondary"})
    }
    own, active = _limits_of_headers(headers, ""), headers.get("x-codex-active-limit", "").strip()
    if meter_key(active) not in ("", "codex", "premium"):  # what has no group's name is that meter's
        if re.fullmatch(r"[\w.-]+", active):
            meters.setdefault(meter_key(active), {}).update(metered_feature=active, rate_limit=own)
        own = {}
    return {
        "plan_type": headers.get("x-codex-plan-type"),
        "rate_limit": own,
        "additional_rate_limits": list(meters.values()),
        "credits": {
            "has_credits": headers.get("x-codex-credits-has-credits", "").lower() == "true",
            "unlimited": headers.get("x-codex-credits-unlimited", "").lower() == "true",
            "balance": headers.get("x-codex-credits-balance") or None,
        },
    }


_GROUP_HEADER = re.compile(r"x-codex-(.+)-(?:limit-name|(?:primary|secondary)-used-percent)")
_MEMBER_HEADER = re.compile(r"anthropic-ratelimit-unified-((\d{1,3})([hd])(?:_.+)?)-utilization")


def _limits_of_headers(headers: Mapping[str, str], group: str) -> dict[str, Any]:
    limits = {}
    for slot in ("primary", "secondary"):
        prefix = f"x-codex-{group}{slot}-"
        minutes, used = _finite(headers.get(prefix + "window-minutes")), _finite(headers.get(prefix + "used-percent"))
        resets = (headers.get(prefix + "reset-at"), headers.get(prefix + "reset-after-seconds"))
        limits[f"{slot}_window"] = _window_of_headers(used, 60 * (minutes or 0), *resets)
    return limits


def _window_of_headers(used: float | None, seconds: float, reset_at: Any, after_s: Any = None) -> dict[str, Any] | None:
    """Return a window as the usage endpoint has it; None where percentage, length or reset is no sound one."""
    resets = {"reset_at": reset_at, "reset_after_seconds": after_s}
    is_known = used is not None and used >= 0 and 0 < seconds <= _LONGEST_WINDOW_S
    if is_known and _reset_at(resets, _EARLIEST_AT) is not None:
        return {"used_percent": used, "limit_window_seconds": seconds, **resets}
    return None


def payload_of_claude(headers: Mapping[str, str]) -> dict[str, Any]:
    """Return Claude's ``anthropic-ratelimit-unified-…`` headers in the same shape; 5h and 7d are the account's."""
    members: dict[str, Any] = {}
    for match in filter(None, map(_MEMBER_HEADER.fullmatch, sorted(headers))):
        member, length, unit = match.groups()
        share, seconds = _finite(headers[match.group()]), int(length) * {"h": 3600, "d": 86400}[unit]
        used = 100 * share if share is not None and share <= 2 else None  # beyond that it is no share of 1
        members[member] = _window_of_headers(used, seconds, headers.get(f"{match.group()[:-12]}-reset"))
    own = {"primary_window": members.pop("5h", None), "secondary_window": members.pop("7d", None)}
    status = headers.get("anthropic-ratelimit-unified-status", "").lower()
    reached = {"allowed": False, "allowed_warning": False, "rejected": True}.get(status)
    extra = [{"limit_name": name, "rate_limit": {"primary_window": window}} for name, window in members.items()]
    return {
        "rate_limit": {**own, "limit_reached": reached, "decides": reached is not None},
        "additional_rate_limits": extra,
        "credits": {"has_credits": headers.get("anthropic-ratelimit-unified-overage-status", "").startswith("allowed")},
    }


# By provider, as in QUOTA_HEADERS: how its headers are put into the shape of the usage endpoint's answer.
HEADER_READERS = {"codex": payload_of_headers, "claude": payload_of_claude}


def classify_failure(status: int, body: bytes) -> str:
    """Return the state that an HTTP status other than 200 stands for, by status and error code."""
    code, message = _json_error(body.decode("utf-8", "replace"))
    reason = code or message
    if status == 402 or "deactivated" in reason:
        return "deactivated"
    if status == 401:
        return "expired" if code == "token_expired" or not code else "relogin"
    if status == 403:
        if "unsupported_country" in reason:
            return "region_blocked"
        return "relogin" if code else "blocked"
    if status == 429:
        return "rate_limited"
    return "server_error" if status >= 500 else "bad_response"


def fetch_usage(file: AccountFile, deadline_s: float = 20.0) -> Any:
    """Return ChatGPT's decoded reply for one account, within ``deadline_s`` altogether. Raises QuotaFault."""
    if not file.access_token:
        raise QuotaFault("no_token")
    proxies = proxies_of(file)
    if (proxies.get("https") or proxies.get("all", "")).lower().startswith("socks"):
        raise QuotaFault("proxy_unsupported")
    headers = {"User-Agent": "codex-cli", "Accept": "application/json", "Authorization": f"Bearer {file.access_token}"}
    if file.account_id:
        headers["ChatGPT-Account-Id"] = file.account_id
    asked = ("https://chatgpt.com/backend-api/wham/usage", headers, None, deadline_s, _LARGEST_BODY + 1, proxies)
    try:
        status, body = within(deadline_s, ask_url, *asked)
    except (OSError, HTTPException, ValueError) as error:  # TimeoutError is one of them
        cause = getattr(error, "reason", error)
        raise QuotaFault("timeout" if isinstance(cause, (socket.timeout, TimeoutError)) else "network") from None
    if status != 200:
        raise QuotaFault(classify_failure(status, body))
    try:
        return json.loads(body.decode("utf-8") if len(body) <= _LARGEST_BODY else "")
    except (ValueError, RecursionError):
        raise QuotaFault("bad_response") from None


def ask_url(
    url: str, headers: dict[str, str], body: bytes | None, timeout_s: float, most: int = 0, proxies: Any = None
) -> tuple[int, bytes]:
    """Return the status of a reply, which may be a redirect that is not followed, and ``most`` bytes of its body."""
    import urllib.request

    opener, content, ends_at = urllib.request.OpenerDirector(), b"", time.monotonic() + timeout_s
    for handler in (urllib.request.ProxyHandler(proxies), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
        opener.add_handler(handler)
    with opener.open(urllib.request.Request(url, body, headers), timeout=timeout_s) as reply:
        while len(content) < most and (piece := reply.read1(most - len(content))):
            content += piece
            if time.monotonic() > ends_at:  # nobody waits for it any more
                raise TimeoutError("the reply did not end in time")
        return reply.status, content


def proxies_of(file: AccountFile) -> dict[str, str]:
    """Return the proxies for chatgpt.com: the account's own, else the environment's; ``direct`` means none."""
    from urllib.request import getproxies

    if file.proxy_url.lower() in ("direct", "none"):
        return {}
    return {"https": file.proxy_url} if file.proxy_url else getproxies()


# -------------------- readings: stored quota readings: from traffic, as they stand now, forecasts, the pool


def snapshot_of(file: AccountFile, payload: Any, now: float) -> dict[str, Any]:
    """Return the row of ``quota_snapshots`` for a reply, with its ``state``; ids and mail of the reply left out."""
    raw_json = json.dumps(_without_identity(payload), ensure_ascii=False)
    return reading_row(parse_quota(payload, now), (file.email, file.tag), file.plan, now, raw_json)


def reading_row(
    reading: Reading, account: tuple[str, str], plan: str, at: float, raw_json: str | None = None, provider="codex"
) -> dict[str, Any]:
    """Return the row of ``quota_snapshots`` for an account's (mail, tag) reading; from traffic without ``raw_json``."""
    columns = {
        f"{place}_{name}": window and window.as_json()[name]
        for place, window in ((place, fullest(reading.windows, label)) for place, label, _ in _PLACES)
        for name in ("used_percent", "remaining_percent", "reset_at")
    }
    facts = {"provider": provider, "reason": reading.reason, "reset_credits": reading.reset_credits}
    return {
        "timestamp": utc_text(at),
        "ts_epoch": at,
        "email": account[0],
        "account_id_tag": account[1],
        "plan": reading.plan or plan or None,
        "allowed": reading.allowed,
        "limit_reached": reading.limit_reached,
        **columns,
        "windows": _windows_json(reading.windows, facts),
        "credits_balance": reading.credits_balance,
        "raw_json": raw_json,
        "source": "traffic" if raw_json is None else "refresh",
        "state": reading.state,
        "message": reading.reason.replace("_", " ") if reading.reason else QUOTA_MESSAGES.get(reading.state),
        "spans": [
            (window.label, window.reset_at, window.seconds, window.used_percent)
            for window in reading.windows
            if window.governs and window is fullest(reading.windows, window.label) and window.used_percent is not None
        ],
    }


def _windows_json(windows: Iterable[QuotaWindow], facts: Mapping[str, Any]) -> str:
    return json.dumps({**facts, "windows": [window.as_json() for window in windows]}, ensure_ascii=False)


def _without_identity(value: Any, depth: int = 0) -> Any:
    """Copy a reply without what identifies a person; mails and long keys in its texts become an ellipsis."""
    if isinstance(value, dict) and depth < 8:
        kept = {key: item for key, item in value.items() if key not in ("email", "user_id", "account_id")}
        return {without_secrets(str(key), 80): _without_identity(item, depth + 1) for key, item in kept.items()}
    if isinstance(value, list) and depth < 8:
        return [_without_identity(item, depth + 1) for item in value[:100]]
    if isinstance(value, str):
        return without_secrets(value, 300)
    return value if isinstance(value, (int, float, bool, type(None))) else None


_PLACES = (("primary", "5h", _FIVE_HOURS_S), ("secondary", "7d", _WEEK_S))


def windows_of(row: Mapping[str, Any]) -> list[QuotaWindow]:
    """Return the windows of a stored reading; the original kept two, in columns only, and local times of reset."""
    if row["windows"]:
        return [
            QuotaWindow(
                *(item["label"], item["seconds"], item["used_percent"], _epoch(item["reset_at"]), item["meter"]),
                {name: item[name] for name in ("feature", "read_at", "used", "limit", "unit") if name in item},
            )
            for item in content_of(row)["windows"]
        ]
    return [
        QuotaWindow(label, seconds, row[f"{place}_used_percent"], _epoch(row[f"{place}_reset_at"]), None)
        for place, label, seconds in _PLACES
        if row[f"{place}_used_percent"] is not None
    ]


def content_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored reading's windows, provider, reason and reset credits; 3.0.0 kept the windows alone."""
    content = json.loads(row["windows"] or "[]")
    unknown = {"provider": "codex", "reason": None, "reset_credits": None}
    return {**unknown, **(content if isinstance(content, dict) else {"windows": content})}


def merge_traffic_reading(row: dict[str, Any], before: Mapping[str, Any] | None, now: float) -> dict[str, Any] | None:
    """Return the row to save, with what the headers lack from ``before`` or in its place; None where that is newer.

    A reading of extra meters alone changes these and nothing else.
    """
    if before is None:
        return row
    fresh, known = windows_of(row), windows_of(before)
    own = [window for window in fresh if window.meter is None]
    for old in known:
        read_at = _epoch(old.more.get("read_at")) or before["ts_epoch"]
        if row["ts_epoch"] < read_at <= now and any(old.names & new.names for new in own or fresh):
            return None
    kept = [old for old in known if not any(old.names & new.names for new in fresh)]
    fresh = [window if window.meter is None else _as_known(window, known, row["timestamp"]) for window in fresh]
    facts, last = content_of(row), content_of(before)
    if not own:
        return {**before, "state": "never", "windows": _windows_json(kept + fresh, last)}
    kept = [old._replace(more={"read_at": before["timestamp"], **old.more}) for old in kept]
    merged = {**row, "credits_balance": row["credits_balance"] or before["credits_balance"]}
    if facts["reason"] is None and _lasts(last["reason"], kept, now):
        facts["reason"] = last["reason"]
        merged.update(state="limited", message=last["reason"].replace("_", " "))
    merged["windows"] = _windows_json(fresh + kept, {**facts, "reset_credits": last["reset_credits"]})
    if before["source"] == "traffic" and before["ts_epoch"] // 300 == row["ts_epoch"] // 300:
        merged["id"] = before["id"]
    return merged


def _as_known(window: QuotaWindow, known: Sequence[QuotaWindow], read_at: str) -> QuotaWindow:
    """Return an extra meter's window with its time, by the name that it had, unless that was a mere code."""
    old = next((old for old in known if old.names & window.names), window)
    meter = window.meter if old.meter == old.more.get("feature") else old.meter
    label = window.label.replace(window.meter, meter, 1)
    return window._replace(meter=meter, label=label, more={**old.more, **window.more, "read_at": read_at})


def _lasts(reason: str | None, windows: Sequence[QuotaWindow], now: float) -> bool:
    """Return whether an account is still limited by what no headers tell."""
    is_back = any(window.meter == "budget" and window.is_due(now) for window in windows)
    return reason not in (None, "rate_limit_reached", "runs_on_credits") and not is_back


class TrafficReadings:
    """Take quota readings from the replies to the accounts' own requests, once a minute, of certain accounts."""

    def __init__(self, files: AccountFiles, store: Store, clock=time.time, monotonic=monotonic_s):
        self._files, self._store, self._clock, self._monotonic = files, store, clock, monotonic
        self._waiting: dict[tuple[str | None, ...], Event] = {}
        self._next_s = float("-inf")
        self._replies: dict[tuple[tuple[str, str], ...], str | None] = {}

    def note(self, events: Iterable[Event]) -> None:
        """Remember the newest reading of each account and meter for save_due()."""
        for event in events:
            headers = event.quota_headers
            if headers and self._is_own(event, headers):
                context, meter = event.context, headers.get("x-codex-active-limit")
                key = (context.auth_index, context.source, context.account, meter)
                if key not in self._waiting or event.ts_epoch >= self._waiting[key].ts_epoch:
                    self._waiting[key] = event

    def _is_own(self, event: Event, headers: Mapping[str, str]) -> bool:
        """Return whether the headers are this attempt's own: one without a reply shows those of one before."""
        reply = tuple(headers.items())
        index = self._replies.get(reply) or cache(self._replies, reply, event.context.auth_index, 2000)
        if index != event.context.auth_index or not event.failed:
            return index == event.context.auth_index
        reading = self._reading_of(event, event.ts_epoch)
        used_up = reading.state == "limited" or any(window.remaining_percent == 0 for window in reading.windows)
        return event.status_code == 429 and used_up

    @staticmethod
    def _reading_of(event: Event, read_at: float) -> Reading:
        return parse_quota(HEADER_READERS[event.context.provider](event.quota_headers or {}), read_at)

    def save_due(self) -> None:
        """Save the readings that wait, once a minute at most. Raises StoreError."""
        now_s = self._monotonic()
        if not self._waiting or now_s < self._next_s:
            return
        accounts = self._store.accounts()
        self._waiting = {key: event for key, event in self._waiting.items() if not self._save(event, accounts)}
        self._next_s = now_s + 60 * (not self._waiting)

    def _save(self, event: Event, accounts: Sequence[Account]) -> bool:
        """Save the reading of an event, and return False where its account is known only once it is committed."""
        account, decided = account_of(event.context, accounts), event.context.account
        if account is None and tag_of(decided) not in self._files.by_tag:
            return (decided, event.context.source.lower()) in self._files.renamed  # nothing is stored under this one
        now = self._clock()
        read_at = min(now, event.ts_epoch + (event.ttft_ms or 0) / 1000)
        reading = self._reading_of(event, read_at)
        owner = self._owner_of(event.context, account, reading.plan or "")
        windows = [window for window in reading.windows if window.used_percent is not None]
        own = [window for window in windows if window.meter is None]
        if not own:
            reading = reading._replace(state="never", windows=windows)
        elif reading.has_credits and not event.failed and any(window.remaining_percent == 0 for window in own):
            reading = reading._replace(state="ok", reason="runs_on_credits")
        if windows and owner is not None:
            row = reading_row(reading, owner, "", read_at, provider=event.context.provider)
            self._store.save_reading(row, lambda before: merge_traffic_reading(row, before, now))
        return True

    def _owner_of(self, context: Context, account: Account | None, plan: str) -> tuple[str, str] | None:
        """Return the quota row (mail, tag) of the account that has the request; None where that is not certain."""
        is_certain = context.account != "" and not context.account.startswith("?")
        file = self._files.by_tag.get(account.tag if account else tag_of(context.account))
        if file is not None:
            # By the mail alone, and with another index: perhaps of an account whose file is elsewhere.
            is_other = not is_certain and account and len(account.indexes) > 1 and file.plan not in ("", plan)
            return None if file.disabled or is_other else (file.email, file.tag)
        is_clear = is_certain or not context.account
        return (account.mail, account.tag) if account and account.mail and is_clear else None


PACE_S = 3600.0  # the pace is that of the last hour


def usage_points(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Return (time, used percent, reset) of an account's main windows, by label in order of time; no unknown ones."""
    points: dict[str, dict[float, tuple[float, float, float]]] = {}
    for row in rows:
        for window in windows_of(row) if row["ts_epoch"] else ():
            if window.governs and window.used_percent is not None and window.reset_at is not None:
                read_at = _epoch(window.more.get("read_at")) or row["ts_epoch"]
                points.setdefault(window.label, {})[read_at] = read_at, window.used_percent, window.reset_at
    return {label: sorted(by_time.values()) for label, by_time in points.items()}


def forecast(points: Sequence[tuple[float, float, float]], now: float) -> dict[str, Any] | None:
    """Return whether a window lasts until its reset at the pace of the last hour; None where that cannot be known."""
    same: list[tuple[float, float, float]] = []
    for at, used, reset_at in points:
        if same and (used < same[-1][1] or abs(reset_at - same[-1][2]) > 120):
            same = []  # it was reset in between, or has not begun
        if at >= now - PACE_S:
            same.append((at, used, reset_at))
    if len(same) < 3:
        return None
    (first_at, first_used, _), (at, used, reset_at) = same[0], same[-1]
    rise, lasted_s = used - first_used, at - first_at
    if lasted_s < 600 or now - at > 900 or used >= 100 or reset_at <= now:
        return None
    ends = [at + (100 - used) / max(rise + off, 1e-9) * lasted_s for off in (-1, 0, 1)]
    slow, likely, fast = (end if end < reset_at else None for end in ends)
    if (slow is None) != (fast is None):  # percentages are rounded, and one more or less would turn the verdict
        return None
    return {"used_per_hour": round(rise / lasted_s * 3600, 2), "runs_out_at": utc_text(likely)}


def window_worths(store: Store, now: float) -> list[dict[str, Any]]:
    """Return the known windows of all accounts, newest first, with tokens and tokens per percent; None is unknown."""
    windows, accounts = store.quota_windows(), {account.tag: account for account in store.accounts()}
    spans: list[Any] = []
    for row in windows:
        # Below 3 % rounding is all; and what was used long after a reading is not in its percentage.
        account, end = accounts.get(row["account"]) if row["peak_percent"] >= 3 else None, row["end_at"] or 0.0
        spans += [(account, row["start_at"], end), (account, min(end, row["read_at"] + 300), end)]
    sums = store.tokens(spans, now)
    for row, tokens, unread in zip(windows, sums[::2], sums[1::2]):
        per_percent = None if tokens is None else round((tokens - unread) / row["peak_percent"])
        row.update(tokens=tokens, tokens_per_percent=per_percent)
    return windows


def add_worths(store: Store, quotas: Iterable[Mapping[str, Any]], now: float) -> None:
    """Add to the windows of ``/api/quota`` what they are worth, and those of the same label that have ended."""
    by_label = by_key(((row["account"], row["label"]), row) for row in window_worths(store, now))
    for account, window in ((row["account_id_tag"], window) for row in quotas for window in row["windows"]):
        known, left = by_label.get((account, window["label"]), []), window["remaining_percent"]
        ended = [row for row in known if row["peak_percent"] and (row["end_at"] or math.inf) <= now]
        worth = {"tokens": None, "tokens_per_percent": None}
        if left is not None and known[:1] != ended[:1]:
            worth = {name: known[0][name] for name in worth}
        per_percent, told = worth["tokens_per_percent"], ("peak_percent", *worth)
        window.update(worth, tokens_left=None if per_percent is None else round(per_percent * left))
        history = ({"ended_at": utc_text(row["end_at"]), **{name: row[name] for name in told}} for row in ended)
        window["history"] = list(history)[:MOST_ENDED]


def quotas_at(store: Store, now: float, names: Mapping[str, str] = {}) -> list[dict[str, Any]]:
    """Return the rows of ``/api/quota`` as they stand now, with the owner's ``names``."""
    accounts, history, rows = store.accounts(), store.readings_since(now - PACE_S), []
    for row in store.quotas():
        points = usage_points([*history.get((row["email"], row["account_id_tag"]), ()), row])
        answer = _quota_json(row, points, now)
        account = _account_of_quota(answer, accounts)
        rows.append({**answer, "account": account and account.name, "name": account and owner_name(names, account)})
    return rows


def _quota_json(row: Mapping[str, Any], points: Mapping[str, Sequence[Any]], now: float) -> dict[str, Any]:
    """Return a row of ``/api/quota`` as it stands now; ``points`` hold the readings of the last hour."""
    windows, facts = windows_of(row), content_of(row)
    state = state_at(row["state"], windows, now, facts["reason"])
    current = [window._replace(used_percent=None) if window.is_due(now) else window for window in windows]
    left = [window.remaining_percent for window in current if window.governs and window.remaining_percent is not None]
    facts["reason"] = facts["reason"] if state == "limited" or (state == "ok" and 0 in left) else None
    answer = {**row, **facts, "state": state}
    if state in ("ok", "reset_due") and not facts["reason"]:
        answer["message"] = None
    answer["remaining_percent"] = min(left, default=None)
    answer["windows"] = [
        {**window.as_json(), "due": window.is_due(now), "forecast": forecast(points.get(window.label, ()), now)}
        for window in current
    ]
    for place, label, _ in _PLACES:
        if any(window.label == label and window.is_due(now) for window in windows):
            answer.update({f"{place}_used_percent": None, f"{place}_remaining_percent": None})
    read_at = row["ts_epoch"]
    answer["age_seconds"] = None if read_at is None or read_at > now + 60 else max(0, int(now - read_at))
    return answer


def state_at(state: str, windows: Sequence[QuotaWindow], now: float, reason: str | None = None) -> str:
    """Return an account's state now: one that was limited by a window whose reset has passed is ``reset_due``."""
    main = [window for window in windows if window.governs]
    spent = [window for window in main if window.remaining_percent == 0 and not window.is_due(now)]
    is_due = any(window.is_due(now) for window in main)
    return "reset_due" if state == "limited" and is_due and not spent and not _lasts(reason, main, now) else state


def _account_of_quota(row: Mapping[str, Any], accounts: Sequence[Account]) -> Account | None:
    """Return the account that a quota row belongs to, if there is just one."""
    same = [account for account in accounts if account.tag == row["account_id_tag"]]
    same = same or [one for one in accounts if one.mail == row["email"] and one.provider in (row["provider"], "")]
    return same[0] if len(same) == 1 else None


def pool_of(quotas: Sequence[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    """Sum up what governs all rows of ``/api/quota`` by length; a limited account has nothing left in any."""
    by_label: dict[str, list[tuple[dict, dict]]] = {}
    for row in quotas:
        is_of_use = row["state"] not in ("disabled", "deactivated", "relogin", "no_token")
        prefix = "" if row.get("provider", "codex") == "codex" else f"{row['provider']} "
        for window in row["windows"]:
            if is_of_use and window["meter"] in (None, "budget"):
                by_label.setdefault(prefix + window["label"], []).append((row, window))
    ordered = sorted(by_label.items(), key=lambda item: item[1][0][1]["seconds"] or 0)
    pools = (_pool_of_label(label, members, now) for label, members in ordered)
    return [pool for pool in pools if pool["accounts"]]


def _pool_of_label(label: str, members: Sequence[tuple[dict, dict]], now: float) -> dict[str, Any]:
    known = [(row, window) for row, window in members if window["remaining_percent"] is not None]
    left = [0 if row["state"] == "limited" else window["remaining_percent"] for row, window in known]
    next_reset_at = min((window["reset_at"] for _, window in known if window["reset_at"]), default=None)
    pool: dict[str, Any] = {
        "label": label,
        "accounts": len(known),
        "remaining_percent": round(sum(left) / len(left), 1) if left else None,
        "next_reset_at": next_reset_at,
        "forecast": None,
    }
    paces = [window["forecast"] for (_, window), remaining in zip(known, left) if remaining]  # a limited one has none
    one_plan = len({row["plan"] for row, _ in known}) == 1
    # An account whose window came back is unknown, and may be full again.
    if next_reset_at and paces and None not in paces and one_plan and len(known) == len(members):
        per_hour = sum(pace["used_per_hour"] for pace in paces)
        runs_out_at = utc_text(now + sum(left) / per_hour * 3600) if per_hour else None
        lasts = runs_out_at is None or runs_out_at >= next_reset_at
        pool["forecast"] = {"runs_out_at": None if lasts else runs_out_at, "until": next_reset_at}
    return pool


# -------------------- alerts: what its owner is told of, once a cause, and sending it


class Alert(NamedTuple):
    """One sentence for the owner; ``account`` is masked, and None where it is of no account."""

    kind: str
    text: str
    account: str | None = None


ALERT_TITLES = {
    "low_quota": "Quota is low",
    "limited": "Account is limited",
    "needs_person": "Account needs you",
    "back": "Account is back",
    "not_recording": "Not recording",
    "recording": "Recording again",
    "failing": "Requests fail",
    "test": "Test",
}
_NEEDS_PERSON = ("relogin", "deactivated", "blocked")
_OVER = Alert("over", "")  # the end of a cause that is no news
_ENDS = ("over", "back", "recording")


def alerts_of(before: Mapping[str, float], now: Mapping[str, Alert], at: float) -> tuple[list[Alert], dict[str, float]]:
    """Return what is to be told, each new cause and the ends that are news, and the causes that last.

    ``before`` has the causes that were told, with their times. In ``now`` is each cause that is there, or how it ended
    where the opposite is known; what is unknown stands in neither, and changes nothing.
    """
    ended = {key for key, alert in now.items() if alert.kind in _ENDS}
    told = (alert for key, alert in now.items() if (key in ended) == (key in before) and alert != _OVER)
    return list(dict.fromkeys(told)), {key: before.get(key, at) for key in (*before, *now) if key not in ended}


def _joined(alerts: Sequence[Alert]) -> list[Alert]:
    """Join what many accounts have in common to one message for each kind: receivers refuse a flood."""
    joined = []
    for kind, some in by_key((alert.kind, alert) for alert in alerts).items():
        rest = f" … and {len(some) - 5} more." if len(some) > 5 else ""
        joined += [Alert(kind, " ".join(alert.text for alert in some[:5]) + rest)] if rest else some
    return joined


def quota_causes(quotas: Sequence[Mapping[str, Any]], below_percent: float) -> dict[str, Alert]:
    """Return the causes that rows of ``/api/quota`` show; a limited account is not low as well."""
    causes = {}
    mails = [row["email"] for row in quotas]
    for row in quotas:
        name = row["email"] if "@" not in row["email"] else mask_mail(row["email"], mails)
        name += f" ({row['account_id_tag']})" if mails.count(row["email"]) > 1 else ""
        key, state = f"{row['email']} {row['account_id_tag']}", row["state"]
        windows = [window for window in row["windows"] if window["meter"] in (None, "budget")]
        back = Alert("back", f"{name} is back.", name)
        if state in _NEEDS_PERSON:
            text = f"{name} needs a person: {QUOTA_MESSAGES[state]}."
            causes[f"needs_person {key}"] = Alert("needs_person", text, name)
        elif state in ("ok", "no_windows", "limited"):
            causes[f"needs_person {key}"] = back
        if state == "limited":
            resets = [window["reset_at"] for window in windows if window["remaining_percent"] == 0]
            until = f", until {local_minute(_epoch(max(resets)))}" if resets and None not in resets else ""
            causes[f"limited {key}"] = Alert("limited", f"{name} is limited{until}.", name)
            continue
        if state in ("ok", "no_windows"):
            causes[f"limited {key}"] = back
        for window in windows:
            left, place = window["remaining_percent"], f"low_quota {key} {window['label']}"
            if window["due"] or (left is not None and left >= below_percent + 5):
                causes[place] = _OVER
            elif left is not None and left < below_percent:
                resets = f"; it resets {local_minute(_epoch(window['reset_at']))}" if window["reset_at"] else ""
                text = f"{name} has {left:g} % of its {window['label']} window left{resets}."
                causes[place] = Alert("low_quota", text, name)
    return causes


def failing_cause(sums: Sequence[int]) -> dict[str, Alert]:
    """Return whether half of a quarter hour's requests fail for another reason than 429; {} for fewer than 20."""
    requests, failed, rate_limited = sums[:3]
    if requests < 20:
        return {}
    failed -= rate_limited
    text = f"{failed:,} of {requests:,} requests in 15 minutes failed, and {rate_limited:,} were rate-limited."
    return {"failing": Alert("failing", text) if 2 * failed >= requests else _OVER}


class Alerter:
    """Look once a minute, and after a refresh, whether there is something to tell, and send it to all addresses."""

    def __init__(self, config: Config, store: Store, status: Callable[[], Any], log: Log, stop: Any, clock=time.time):
        self._config, self._store, self._status, self._log = config, store, status, log
        self._stop, self._clock = stop, clock
        self._state = alert_state(store, clock())
        self._idle_since: float | None = None  # since when nothing is recorded

    def run(self, last_refresh: Callable[[], Any], look_s: float = 60.0) -> None:
        """Look until ``stop``; a fault ends only this look. ``last_refresh`` changes with each refresh of the quota."""
        looked_s, known = float("-inf"), last_refresh()
        while not self._stop.wait(min(2.0, look_s)):
            if monotonic_s() - looked_s >= look_s or last_refresh() != known:
                looked_s, known = monotonic_s(), last_refresh()
                try:
                    self.look()
                except Exception as error:  # the thread's loop
                    self._log.event("alerts", fault=error if isinstance(error, StoreError) else where_raised(error))

    def look(self) -> None:
        """Tell what is new; what was told is kept first, so that a restart does not tell it again."""
        now, before = self._clock(), self._state["causes"]
        causes = self._recording_cause(now)
        with suppress(StoreError):  # while the database cannot be read, that is what there is to tell
            causes.update(quota_causes(quotas_at(self._store, now), self._config.alert_below_percent))
            buckets = self._store.usage(Window(now - 900, now), 900, 0).buckets
            causes.update(failing_cause(add_sums(buckets.values())))
        alerts, lasting = alerts_of(before, causes, now)
        self._keep(causes=lasting)
        for alert in _joined(alerts):
            outcomes = [self._send(number, url, alert) for number, url in enumerate(self._config.alert_urls, 1)]
            if any(outcomes):
                today = local_minute(now)[:10]
                self._keep(sent_on=today, sent=1 + self._state["sent"] * (self._state["sent_on"] == today))
            if not all(outcomes):
                self._keep(last_failed_at=now)

    def _recording_cause(self, now: float) -> dict[str, Alert]:
        status = self._status()
        if status["state"] in ("recording", "waiting"):
            self._idle_since = None
            since = self._state["causes"].get("not_recording")
            if since is None:
                return {}
            outages = self._store.outages(Window(since - 300, now), now)
            lost = "requests were lost" if any(outage["lost"] for outage in outages) else "no loss is known of"
            minutes = int(now - min([since - 300, *(outage["from"] for outage in outages)])) // 60
            text = f"Requests are recorded again, after {minutes // 60} h {minutes % 60} min; {lost}."
            return {"not_recording": Alert("recording", text)}
        self._idle_since = min(now, self._idle_since or now, status["since"] or now)
        if now - self._idle_since < 300:
            return {}
        text = f"Nothing is recorded since {local_minute(self._idle_since)}: {status['message']}"
        return {"not_recording": Alert("not_recording", text)}

    def _keep(self, **changes: Any) -> None:
        if {**self._state, **changes} != self._state:
            self._state.update(changes)
            with suppress(StoreError):  # it is kept in memory, and a full disk is worth telling
                self._store.put_meta("alerts", json.dumps(self._state))

    def _send(self, number: int, url: str, alert: Alert) -> bool:
        for pause_s in (1.0, 5.0, 0.0):
            fault = send_alert(url, alert, self._clock(), self._stop)
            if fault is None:
                return True
            if self._stop.wait(pause_s):
                break
        self._log.event("alerts", kind=alert.kind, receiver=number, fault=fault)
        return False


def alert_state(store: Store, now: float) -> dict[str, Any]:
    """Return what is kept of alerts: the causes that were told, how many were sent today, and the last failure."""
    state = {"causes": {}, "sent_on": "", "sent": 0, "last_failed_at": None}
    with suppress(StoreError, ValueError, TypeError):
        state.update(json.loads(store.get_meta("alerts") or "{}"))
    return state if state["sent_on"] == local_minute(now)[:10] else {**state, "sent": 0}


def send_alert(url: str, alert: Alert, at: float, stop: Any = None) -> str | None:
    """Send an alert in the form that its address asks for, and return why it did not arrive, without the address."""
    try:
        status, _ = within(10.0, ask_url, *_form_of(url, alert, at), 10.0, stop=stop)
    except (OSError, HTTPException, ValueError) as error:  # TimeoutError is one of them
        cause = error.reason if isinstance(getattr(error, "reason", None), OSError) else error
        reason = getattr(cause, "reason", None)  # of TLS; the text of a wrong certificate names the host
        return reason if isinstance(reason, str) else os_reason(cause)
    return None if 200 <= status < 300 else f"it answered with status {status}"


def receiver_of(url: str) -> str:
    """Return the kind of a receiver, by its host: Telegram, ntfy, Slack, Discord or a webhook."""
    host = urlsplit(url).hostname or ""
    known = {"api.telegram.org": "Telegram", "ntfy.sh": "ntfy", "hooks.slack.com": "Slack"}
    is_discord = re.search(r"(\A|\.)discord(app)?\.com\Z", host)
    return known.get(host, "ntfy" if host.startswith("ntfy.") else "Discord" if is_discord else "webhook")


def _form_of(url: str, alert: Alert, at: float) -> tuple[str, dict[str, str], bytes]:
    kind, title, parts = receiver_of(url), ALERT_TITLES[alert.kind], urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "cliproxy-usage-dashboard"}
    if user:
        headers["Authorization"] = "Basic " + base64.b64encode(unquote(user).encode()).decode()
    parts = parts._replace(netloc=host, fragment="")
    content: Any = {"title": title, "text": alert.text, "kind": alert.kind, "account": alert.account, "at": at}
    if kind == "Telegram":
        content = {**dict(parse_qsl(parts.query)), "text": f"{title}: {alert.text}"}
        parts = parts._replace(query="")
    elif kind == "ntfy":
        parts = parts._replace(query=urlencode([*parse_qsl(parts.query), ("title", title)]))
        headers["Content-Type"] = "text/plain; charset=utf-8"
    elif kind != "webhook":
        content = {"content" if kind == "Discord" else "text": f"{title}: {alert.text}"}
    body = alert.text if kind == "ntfy" else json.dumps(content, ensure_ascii=False)
    return urlunsplit(parts), headers, body.encode("utf-8", "replace")


# -------------------- sources: the ways to take records: pop, http, subscribe


PROXY_PORT = 8317
_NOT_THERE = ("refused", "unreachable")
_REFUSALS = ("wrong_password", "no_password")


class PopResult(NamedTuple):
    """What a source took: values for parse_events, whether more may wait, and the fault behind those that are whole."""

    values: list[Any]
    full: bool
    fault: QueueFault | None


class NoQueue(NotResp):
    """A server that answers in RESP, and serves no queue over it."""


class NotFound(QueueFault):
    """A 404 of the management API: a route that is not there."""

    state = "closed"


# Patterns of an error reply of a proxy or a Redis, what it means, and the state where it is another than the kind's.
_REPLIES: tuple[tuple[str, type[QueueFault], str, str | None], ...] = (
    ("home mode", QueueFault, "the usage queue is switched off there", "home_mode"),
    ("remote management disabled", QueueFault, "the proxy takes no login from another machine", "remote_disabled"),
    ("key not set", QueueFault, "the proxy has no management key", "closed"),
    ("mtls", NoQueue, "this version of the proxy does not serve its queue over RESP", None),
    ("noauth|missing management key", QueueFault, "a management key is needed", "no_password"),
    ("invalid management key", QueueFault, "the management key is refused", "wrong_password"),
    ("wrongpass|invalid password", QueueFault, "the Redis server there refuses the password", "wrong_password"),
    ("unsupported channel", QueueFault, "the proxy does not know this queue_key", "wrong_queue_key"),
    ("wrongtype", QueueFault, "queue_key names something in that Redis that is no list", "wrong_queue_key"),
    (r"unknown command\W+auth", NoQueue, "the server there knows no AUTH", None),
    (r"unknown command\W+subscribe", Misconfigured, 'SUBSCRIBE is unknown; set "collect_mode": "auto"', "not_resp"),
)


def _fault_of_reply(reply: str) -> QueueFault:
    """Return what an error reply means; its own words are shown where they are unknown, without secrets."""
    text = reply.lower()
    known = (kind(message, state) for pattern, kind, message, state in _REPLIES if re.search(pattern, text))
    fault = next(known, None) or QueueFault(f"the queue answered: {without_secrets(reply, 100)}")
    if "ip banned due to too many failed attempts" in text:  # "Try again in 29m59s", as Go writes durations
        match = re.search(r"again in (?:(\d{1,9})h)?(?:(\d{1,9})m)?(\d{1,9})s", text)
        hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 30, 0)
        left_s = min(hours * 3600 + minutes * 60 + seconds, int(_DAY_S))
        fault = QueueFault(f"the login was answered with a ban of {left_s} more seconds", "banned", lasts_s=left_s)
    fault.is_no_failed_login = fault.state not in _REFUSALS
    return fault


def _log_in(client: RespClient, password: str) -> None:
    """Send AUTH; a Redis that needs no password is fine. Raises QueueFault."""
    reply = client.call("AUTH", password)
    if isinstance(reply, ErrorReply) and not re.search("without any password|no password is set", reply.lower()):
        raise _fault_of_reply(reply)
    if not isinstance(reply, str):
        raise NotResp("the login was answered with something else than OK")


class Source:
    """One way to take values off the queue: open(), which takes nothing, take(count) many times, and close()."""

    mode = ""
    largest_batch = 500
    unread = 0  # values that have arrived already
    is_proxy = True
    list_length: int | None = None
    api: ProxyApi | None = None  # where a proxy may be asked over HTTP
    _client: Any = None  # with a socket
    before_login: Callable[[], None] = staticmethod(lambda: None)  # when connected; what it raises keeps the key here

    def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            self._client.close()

    def abort(self) -> None:
        """Wake a thread that waits for an answer."""
        self.close()

    def has_ended(self) -> bool:
        """Return whether the other side has ended the connection of the login, on which no reply is awaited."""
        with suppress(OSError, TypeError, ValueError):  # there is none any more
            return bool(select.select([self._client.socket], [], [], 0)[0])
        return False


class PopSource(Source):
    """Pop values off a list with pipelined single RPOPs, which every proxy and every Redis knows."""

    mode = "pop"
    largest_batch = 64  # what a kill can cost: the proxy forgets an event as it writes the reply
    is_proxy = False

    def __init__(self, connect: Callable[[], socket.socket], password: str, key: str):
        self._connect, self._password, self._key = connect, password, key
        self._pop = encode_command("RPOP", key)
        self._early: list[Any] = []

    def open(self) -> None:
        """Log in with AUTH as the very first bytes, since all else counts towards the ban; without a key, pop."""
        self._client = RespClient(self._connect)
        self.before_login()
        if not self._password:
            reply = self._client.call("RPOP", self._key)
            if isinstance(reply, ErrorReply):
                raise _fault_of_reply(reply)
            self._early = [] if reply is None else [reply]
            self.list_length = self.unread = len(self._early)
            return
        _log_in(self._client, self._password)
        length = self._client.call("LLEN", self._key)
        self.is_proxy = isinstance(length, ErrorReply) and "unknown command" in length.lower()
        if isinstance(length, int):
            self.list_length = length
        elif not self.is_proxy:
            raise _fault_of_reply(str(length))

    def take(self, count: int) -> PopResult:
        """Send so many pops and read their replies."""
        values, empty, fault = self._early, False, None
        self._early, self.unread = [], 0
        try:
            self._client.send(self._pop * count)
            for _ in range(count):
                reply = self._client.receive()
                if isinstance(reply, ErrorReply):
                    fault = fault or _fault_of_reply(reply)
                elif reply is None:
                    empty = True
                else:
                    values.append(compact(reply))
        except QueueFault as broken:
            fault = fault or broken
        return PopResult(values, not empty and fault is None, fault)


def _pieces_of(reply: Any) -> Iterator[bytes]:
    """Yield an answer in pieces: older Pythons would allocate the most that is allowed. Raises IncompleteRead."""
    size = 0
    for piece in iter(lambda: reply.read(256 * 1024), b""):
        size += len(piece)
        yield piece
    if reply.length or (reply.length is None and not size):  # the latter where its headers were cut
        raise IncompleteRead(b"")


_V0, _V8 = "/v0/management", "/v8/management"
_CONFIG, _PUBLISHING, _QUEUE = f"{_V0}/config", f"{_V0}/usage-statistics-enabled", f"{_V0}/usage-queue"
_FILES, _KEYS = f"{_V0}/auth-files", f"{_V0}/api-key-usage"
# The routes of the older tree, which proxies before version 8 have alone, and what they are called in the newer one.
_TWINS = {
    _CONFIG: f"{_V8}/config",
    _PUBLISHING: f"{_V8}/config/observability/usage/usage-statistics-enabled",
    _QUEUE: f"{_V8}/observability/usage/queue",
    _FILES: f"{_V8}/credentials",
}


class ProxyApi:
    """The proxy's management API over HTTP; never asked through a proxy of the environment."""

    def __init__(self, host: str, port: int, tls: bool, password: str, timeout_s: float = 10.0):
        self._host, self._port, self._tls, self._password, self._timeout_s = host, port, tls, password, timeout_s
        self._connection: Any = None
        self.socket: Any = None
        self._has_v8: bool | None = None
        self.config: Any = None  # where it was asked for to log in
        self.version: str | None = None
        self.clock_ahead_s: float | None = None
        self.has_refused = False
        self.sent = 0  # requests with the key

    def get(self, path: str, before_login: Callable[[], None] = lambda: None) -> Any:
        """Return the decoded JSON of a 200, of the tree that has the route. Raises QueueFault for anything else.

        Version 8's tree is tried after the first 404, once; what is not known there is not asked of it.
        """
        route, *query = re.split(r"(?=\?)", path)
        twin = _TWINS.get(route)
        if not self._has_v8:
            try:
                return self._get(path, before_login)
            except NotFound:
                if self._has_v8 is False or twin is None:
                    raise
                self._has_v8 = False
        elif twin is None:
            raise NotFound("what this is called in version 8 of the proxy is not known")
        answer = self._get("".join([twin, *query]), before_login)
        self._has_v8 = True
        return answer

    def ask(self, path: str) -> Any:
        """Return an answer as get() does, within the time limit as a whole."""
        limit = threading.Timer(self._timeout_s, self.abort)
        limit.start()
        try:
            return self.get(path)
        finally:
            limit.cancel()
            self.close()

    def _get(self, path: str, before_login: Callable[[], None]) -> Any:
        try:
            status, content = self._exchange(path, before_login)
            if status == 200:
                return json.loads(content) if isinstance(content, bytes) else content
        except (OSError, HTTPException) as error:
            self.close()
            place = f"{self._host}:{self._port}"
            if hasattr(error, "verify_message"):
                raise _tls_fault(place, error) from error
            is_cut = isinstance(error, IncompleteRead)
            said = f"{place} does not answer HTTP: {'the answer breaks off' if is_cut else os_reason(error)}"
            raise QueueFault(said, "refused" if isinstance(error, ConnectionRefusedError) else None) from error
        except (ValueError, RecursionError):
            raise NotResp("the management API answered with something else than the JSON asked for") from None
        self.has_refused = status in (401, 403)
        if self.has_refused:
            fault = _fault_of_reply(content[:1000].decode("utf-8", "replace"))
            if status == 401 and fault.state == "unreachable":  # in words of another server, which counts as well
                fault = QueueFault("the management key is refused", "wrong_password")
            raise fault
        if status == 404:
            raise NotFound("the proxy has its management API switched off", None, True)
        is_no_failed_login = status in (502, 503)  # of a web server that did not reach the proxy
        raise QueueFault(f"the management API answered with status {status}", None, is_no_failed_login)

    def has_example_keys(self) -> bool:
        """Return whether ``/`` warns of template keys in the proxy's config; asked for without the key."""
        try:
            return b"Example API key detected" in self._exchange("/", lambda: None)[1]
        except (OSError, HTTPException, ValueError):
            return False
        finally:
            self.close()  # the next call must count its login

    def _exchange(self, path: str, before_login: Callable[[], None]) -> tuple[int, Any]:
        """Return the status with the answer's first 4 MiB; of the queue its elements, large ones without the rest."""
        if self._connection is None:
            kind = HTTPSConnection if self._tls else HTTPConnection
            self._connection = kind(self._host, self._port, timeout=self._timeout_s)
            self._connection.connect()
            before_login()
        self.sent += path != "/"
        key = self._password.encode("utf-8").decode("latin-1")
        self._connection.request("GET", path, headers={} if path == "/" else {"Authorization": f"Bearer {key}"})
        self.socket = self._connection.sock  # which the connection may forget before the answer is read
        reply = self._connection.getresponse()
        self.version = reply.headers.get("X-CPA-VERSION") or self.version
        with suppress(TypeError, ValueError):  # it tells no date
            self.clock_ahead_s = parsedate_to_datetime(reply.headers.get("Date")).timestamp() - time.time()
        pieces, content = _pieces_of(reply), b""
        if reply.status == 200 and "queue" in path:
            return reply.status, list(itertools.islice(map(compact, elements_of(pieces)), 5000))
        for piece in pieces:
            content += piece
            if len(content) > 4 << 20:
                self.close()  # the rest is not read
                break
        return reply.status, content

    def abort(self) -> None:
        """Wake a thread that waits for an answer; close() would wait as long as it does."""
        with suppress(OSError, AttributeError):  # the other side was quicker, or there is no connection
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class HttpSource(Source):
    """Pop values off the queue by the management API, for proxies that do not speak RESP here."""

    mode = "http"

    def __init__(self, api: ProxyApi):
        self._client = api
        self.abort = api.abort

    def open(self) -> None:
        """Log in with a question that takes nothing off the queue."""
        self._client.config = self._client.get(_CONFIG, self.before_login)

    def take(self, count: int) -> PopResult:
        """Ask for so many; the answer is whole or none."""
        try:
            values = self._client.get(f"{_QUEUE}?count={count}")
        except NotFound:
            return PopResult([], False, QueueFault("the proxy takes the key, and has no queue over HTTP", "no_queue"))
        except QueueFault as fault:
            has_ended = isinstance(fault.__cause__, (ConnectionResetError, BrokenPipeError))
            return PopResult([], False, ConnectionClosed() if has_ended else fault)
        return PopResult(values, len(values) >= count, None)


class SubscribeSource(Source):
    """Subscribe to a channel, then pop what waited in the queue, which gets nothing new from then on."""

    mode = "subscribe"

    def __init__(self, connect: Callable[[], socket.socket], password: str, key: str, wait_s: float):
        self._connect, self._password, self._key, self._wait_s = connect, password, key, wait_s
        self._backlog, self._is_drained = PopSource(connect, password, key), False
        self._inbox: Any = queue.Queue(2_000)

    def open(self) -> None:
        """Log in, subscribe, and open the second connection, which takes the backlog."""
        self._client = RespClient(self._connect)
        self.before_login()
        if self._password:
            _log_in(self._client, self._password)
        reply = self._client.call("SUBSCRIBE", self._key)
        if isinstance(reply, ErrorReply):
            raise _fault_of_reply(reply)
        self._backlog.open()
        self.is_proxy = self._backlog.is_proxy
        self._client.socket.settimeout(None)
        threading.Thread(target=self._listen, args=(self._client,), name="subscriber", daemon=True).start()

    def _listen(self, client: RespClient) -> None:
        while True:
            try:
                frame = client.receive()
            except QueueFault as fault:
                self._inbox.put(fault)
                return
            if isinstance(frame, list) and len(frame) == 3 and frame[0] == b"message":
                self._inbox.put(compact(frame[2]))

    unread = property(lambda self: self._inbox.qsize())  # type: ignore[assignment]

    def take(self, count: int) -> PopResult:
        """Return what waited in the queue, then what is published; waits up to the poll interval for the first."""
        if not self._is_drained:
            result = self._backlog.take(min(count, self._backlog.largest_batch))
            if not result.full:
                self._backlog.close()
                self._is_drained = True
            return result
        values: list[Any] = []
        with suppress(queue.Empty):
            values.append(self._inbox.get(timeout=self._wait_s))
            while len(values) < count and not isinstance(values[-1], QueueFault):
                values.append(self._inbox.get_nowait())
        fault = values.pop() if values and isinstance(values[-1], QueueFault) else None
        return PopResult(values, self.unread > 0 and fault is None, fault)

    def close(self) -> None:
        super().close()
        self._backlog.close()


def open_source(config: Config, on_endpoint: Callable[[str], None], logins: RefusedLogins) -> Source:
    """Return the source at the configured queue or, while both keys are at their defaults, at the proxy's own port."""
    found, first = Source(), None
    try:
        found = _open_at(config, config.cliproxy_port, on_endpoint, logins)
        if not config.has_default_queue or found.is_proxy or found.list_length:
            return found
    except QueueFault as fault:
        is_refused = fault.state in ("wrong_password", "wrong_queue_key")
        if not config.has_default_queue or not (fault.state in _NOT_THERE or is_refused and _is_redis(config)):
            raise  # a proxy has refused the key: one attempt of five, and at its other port it would be the next
        first = fault
    try:
        better = _open_at(config, PROXY_PORT, on_endpoint, logins)
    except QueueFault as fault:
        if fault.state in _NOT_THERE and first is None:
            on_endpoint(f"{config.cliproxy_host}:{config.cliproxy_port}")
            return found
        found.close()
        if fault.state not in _NOT_THERE:
            raise
        raise QueueFault(f"{first}, nor does port {PROXY_PORT} answer", first.state) from fault
    found.close()
    return better


def _open_at(config: Config, port: int, on_endpoint: Callable[[str], None], logins: RefusedLogins) -> Source:
    """Open the configured kind of source; ``auto`` turns to HTTP where RESP cannot be spoken."""
    host, password, key = config.cliproxy_host, config.management_password, config.queue_key
    on_endpoint(f"{host}:{port}")
    connect = partial(connect_tcp, host, port, config.cliproxy_tls)
    api = ProxyApi(host, port, config.cliproxy_tls, password)
    source: Source = PopSource(connect, password, key)
    if config.collect_mode == "subscribe":
        source = SubscribeSource(connect, password, key, min(config.poll_interval_seconds, 2.0))
    elif config.collect_mode == "http":
        source = HttpSource(api)
    login = (host, port, password)
    try:
        _open_or_close(source, login, logins, connect)
    except QueueFault as no_resp:
        is_other = isinstance(no_resp, NotResp)
        if (is_other or (no_resp.state == "closed" and config.collect_mode == "http")) and api.has_example_keys():
            raise QueueFault("the proxy serves nothing but a warning page", "example_keys") from no_resp
        if isinstance(no_resp, NoQueue) and not password:
            raise QueueFault("a management key is needed", "no_password", True) from no_resp
        if not is_other or config.collect_mode != "auto" or not password:
            raise
        source = HttpSource(api)
        try:
            _open_or_close(source, login, logins, connect)
        except QueueFault as fault:
            # Without even the proxy's version header it is another web server, whose words mean nothing here.
            is_proxy = isinstance(no_resp, NoQueue) or api.version is not None
            raise fault if is_proxy or fault.state not in ("closed", *_NOT_THERE) else no_resp from None
    source.api = api if source.is_proxy and password else None
    return source


def _open_or_close(source: Source, login: Sequence[Any], logins: RefusedLogins, connect: Any) -> None:
    refusal = logins.refusal(login)
    if refusal is not None:
        raise QueueFault("the management key was refused before", refusal)
    used, wait_s, states = logins.used(login)
    if wait_s:
        said = f"{used} logins were without a success; the next goes out at {local_minute(logins.clock() + wait_s)}"
        used_up = QueueFault(said, (states[-1] or "unreachable").replace("shut", "closed"), lasts_s=wait_s)
        fault = _empty_command(connect) if set(states) == {"shut"} else used_up
        if fault is not None:
            raise fault if isinstance(fault, ConnectionClosed) else used_up
        logins.forget()  # they met a proxy that was closed to everybody, and now it is open
    source.before_login = lambda: logins.spend(login)
    try:
        source.open()
    except BaseException as fault:
        if isinstance(fault, QueueFault) and fault.state == "banned":
            fault.held = source
        else:
            source.close()
        if isinstance(fault, ConnectionClosed) and isinstance(_empty_command(connect), ConnectionClosed):
            logins.settle("shut")
        elif isinstance(fault, QueueFault):
            logins.settle(None if fault.is_no_failed_login else fault.state)
        raise
    logins.forget()


def _is_redis(config: Config) -> bool:
    connect = partial(connect_tcp, config.cliproxy_host, config.cliproxy_port, config.cliproxy_tls, timeout_s=2.0)
    return isinstance(getattr(_empty_command(connect), "__cause__", None), socket.timeout)  # it passes over it


def _empty_command(connect: Callable[[], socket.socket]) -> QueueFault | None:
    """Return how an empty command fares, which counts as no failed login; None: it was answered as a proxy does."""
    try:
        with closing(RespClient(connect)) as client:
            client.send(b"*0\r\n")
            is_proxy = isinstance(client.receive(), ErrorReply)
            return None if is_proxy else NotResp("the server there answers as neither a proxy nor a Redis does")
    except QueueFault as fault:
        return fault


# -------------------- collector: the loop from source to store: spool, proxy facts, outages


STATE_REMEDIES = {
    "starting": "Starting.",
    "recording": "Recording.",
    "waiting": "Connected; there was nothing to record yet.",
    "refused": "Nothing listens there: start CLIProxyAPI, or set cliproxy_host and cliproxy_port to where it listens "
    "(8317 by default).",
    "unreachable": "It is tried again by itself; if it stays so, check cliproxy_host, cliproxy_port and the network.",
    "closed": "The proxy closes the connection without a word: set remote-management.secret-key (version 8: "
    "management.secret-key) in its config.yaml, or set cliproxy_tls to true if it serves TLS.",
    "no_password": "Set management_password to the proxy's management key (remote-management.secret-key; version 8: "
    "management.secret-key).",
    "wrong_password": "Correct management_password (or touch config.json after correcting the proxy's key); until then "
    "it is not sent again, since five failures lock this machine out of the proxy for 30 minutes.",
    "banned": "The proxy has locked this address out after failed logins; recording goes on by itself when that ends. "
    "Restarting the proxy lifts it at once.",
    "remote_disabled": "Set remote-management.allow-remote: true (version 8: management.allow-remote) in the proxy's "
    "config.yaml, or run the dashboard on the proxy's machine.",
    "home_mode": "The proxy runs in home mode and gives no usage; collect from its home node.",
    "not_resp": "A web server answers there instead of the queue; set cliproxy_port to the proxy's own port, or "
    "collect_mode to http.",
    "wrong_queue_key": 'Set "queue_key": "usage"; on a Redis server, the list that your forwarder fills.',
    "no_queue": 'If "collect_mode" is "http", set it to "auto": proxies older than v6.10.8 have no queue over HTTP. '
    "Otherwise this one is a fork without a queue, or older than v6.9.38: use another.",
    "foreign_list": "That list is another program's; to destroy no more of it, nothing is popped until config.json "
    "changes or the dashboard restarts: set queue_key to the list that your forwarder fills, or cliproxy_port to the "
    "proxy's (8317).",
    "example_keys": "Put keys of your own in place of the template ones (your-api-key-1 …) under api-keys in the "
    "proxy's config.yaml; until then it serves nobody.",
    "publishing_off": "Set usage-statistics-enabled: true (version 8: observability.usage.usage-statistics-enabled) in "
    "the proxy's config.yaml; until then it records nothing.",
    "storage_error": "Nothing is taken from the queue until the database can be written again.",
}
_CONNECTED = ("recording", "waiting", "publishing_off")
_LONG_WAITS_S = {"no_queue": 300.0, **dict.fromkeys((*_REFUSALS, "foreign_list"), math.inf)}

_open_private = partial(os.open, mode=0o600)
_FOR_EVER_S = 1e9  # a list in a Redis keeps what nobody takes


RETENTION_LINE = "redis-usage-queue-retention-seconds: 3600 in the proxy's config.yaml (in observability.usage with v8)"


def retention_warning(retention_s: float, poll_interval_s: float) -> str:
    """Return what is wrong where the proxy forgets about as quickly as it is asked, and which lines change it."""
    return (
        f"the proxy forgets after {retention_s:g} s and is asked every {poll_interval_s:g} s, so requests can be lost; "
        f'set "poll_interval_seconds": 2 here, or {RETENTION_LINE}'
    )


# Spool and mark. The proxy forgets an event as it writes the reply, so from then on it exists only here:
#
#   pop → parse and mask → append to the spool (a numbered batch), with fsync at each poll → later one transaction:
#   rows, roll-ups and the number as the mark → empty the spool
#
# Killed before the append, what was in flight is gone: at most PopSource.largest_batch events. Killed after it, the
# next start finds the batch in the spool. If its number is above the mark it was not committed and is stored now;
# otherwise it was committed, and only emptying the spool was missed. So nothing spooled is lost or stored twice. A
# commit costs an SD card some thirty pages and an append one, so commits wait for 500 rows, half a minute, or a reader.


class Spool:
    """Batches on their way into the database, each a line: check sum and JSON. Its time tells of the last turn."""

    def __init__(self, path: Path):
        self.path = path
        self._touched_at = 0.0
        self.odd_path, self.odd_lines = Path(f"{path}.unreadable"), 0

    def append(self, sequence: int, parsed: Parsed) -> None:
        """Write one batch with its sequence number. Raises OSError."""
        content = [sequence, [Event._fields, Context._fields], parsed.events, parsed.rejects, parsed.ignored]
        text = json.dumps(content, ensure_ascii=True).encode()
        with open(str(self.path), "ab", opener=_open_private) as stream:
            # The line feed in front ends a line that a kill or a full disk may have cut off before.
            stream.write(b"\n%s %s" % (_checksum(text), text))

    def sync(self) -> None:
        """Bring what was appended onto the disk. Raises OSError."""
        with open(str(self.path), "rb") as stream:
            os.fsync(stream.fileno())

    def read(self) -> Iterator[tuple[int, Parsed]]:
        """Yield the batches that a previous run left, and keep lines of another version aside. Raises OSError."""
        if not self.path.exists():
            return
        with open(str(self.path), "rb") as stream:
            for line in iter(lambda: stream.readline(8 << 20), b""):
                checksum, _, text = line.rstrip(b"\n").partition(b" ")
                if not text or _checksum(text) != checksum:
                    continue  # cut off by a kill, or damaged: no batch of ours can be read from it any more
                try:
                    yield _batch_of_json(json.loads(text))
                except Exception:  # a right check sum, and still none: of another version, or of somebody else
                    make_private(self.odd_path)
                    with open(str(self.odd_path), "ab") as aside:
                        aside.write(line)
                    self.odd_lines += 1

    def clear(self) -> None:
        """Forget all batches; the file stays, for its time."""
        if self.path.exists():
            os.truncate(str(self.path), 0)

    def touch(self, now: float) -> None:
        """Record that recording is alive, at most every 15 seconds."""
        if not 0 <= now - self._touched_at < 15:
            self._touched_at = now
            make_private(self.path)
            os.utime(str(self.path), (now, now))


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()


def _batch_of_json(content: Any) -> tuple[int, Parsed]:
    """Return a batch of the spool; an event in it that is none becomes a Reject. Raises anything for no batch."""
    sequence, names, rows, rejects, ignored = content
    if not all(type(number) is int and 0 <= number < 2**53 for number in (sequence, ignored)):
        raise ValueError("no numbers of a batch")
    events, parked = [], [Reject(str(reason), int(length), event and str(event)) for reason, length, event in rejects]
    for row in rows:
        try:
            events.append(check_event(_event_of_row(names, row)))
        except Exception as error:
            reason = f"in the spool: {error if isinstance(error, Rejected) else where_raised(error)}"
            parked.append(Reject(reason, 0, None))
    return sequence, Parsed(events, parked, ignored)


def _event_of_row(names: Sequence[Any], row: Sequence[Any]) -> Event:
    """Return an event of a spool that another version may have written; 3.0.0 wrote the context's values flat."""
    if isinstance(names[0], str):
        values = context = dict(zip(names, row))
    else:
        values = dict(zip(names[0], row))
        context = dict(zip(names[1], values["context"]))
    values["context"] = Context(*(context.get(name, "") for name in Context._fields))
    return Event(*(values.get(name, Event._field_defaults.get(name)) for name in Event._fields))


class Journal:
    """What was popped and is not in the database yet: on the spool, and committed after a while, or for a reader.

    A commit can take seconds, where the database is locked. What is popped meanwhile does not wait for it: two locks.
    """

    most_rows, longest_s = 500, 30.0

    def __init__(self, store: Store, log: Log, clock: Callable[[], float], monotonic: Callable[[], float]):
        self._store, self._log, self._clock, self._monotonic = store, log, clock, monotonic
        self.spool = Spool(Path(f"{store.path}.spool"))
        self._committing = threading.RLock()
        self._lock = threading.Lock()  # of what follows
        self._batches: list[tuple[int, Parsed]] = []
        self._unspooled = 0  # batches that are in memory alone, on a full disk
        self._since_s = 0.0
        self._sequence = store.counts["sequence"]
        self._is_replayed = self._is_stuck = False

    @property
    def rows(self) -> int:
        """The number of values that wait."""
        return sum(len(batch.events) + len(batch.rejects) + batch.ignored for _, batch in list(self._batches))

    @property
    def is_due(self) -> bool:
        """Whether it is time to commit: many rows, a long wait, or a spool that takes no more."""
        is_long = self._monotonic() - self._since_s >= self.longest_s
        return bool(self._batches) and (is_long or self.rows >= self.most_rows or self._unspooled > 0)

    def hold(self, parsed: Parsed) -> None:
        """Append a batch to the spool; on a full disk it is kept in memory alone, and nothing more may be popped."""
        with self._lock:
            if not self._batches:
                self._since_s = self._monotonic()
            self._sequence += 1
            self._batches.append((self._sequence, parsed))
            try:
                self.spool.append(self._sequence, parsed)
            except OSError as error:
                self._unspooled += 1
                self._log.once("spool", fault=os_reason(error))

    def sync(self) -> None:
        """Bring the spool onto the disk, once a poll."""
        if self._batches and not self._unspooled:
            with self.logged_fault():
                self.spool.sync()

    def flush(self) -> None:
        """Commit all that waits, first what a previous run left. Raises StoreError."""
        with self._committing:
            try:
                self._follow_file()
                if not self._is_replayed:
                    self._replay()
                self._commit(list(self._batches))
            except StoreError:
                self._is_stuck = True
                raise
            self._is_stuck = False

    def _commit(self, waiting: Sequence[tuple[int, Parsed]]) -> None:
        if not waiting:
            return
        events, rejects, ignored = zip(*(parsed for _, parsed in waiting))
        joined = itertools.chain.from_iterable
        merged = Parsed(list(joined(events)), list(joined(rejects)), sum(ignored))
        self._store.store_batch(merged, waiting[-1][0], self._clock())
        with self._lock, self.logged_fault():
            del self._batches[: len(waiting)]
            if not self._batches:  # some may have come meanwhile
                self._unspooled = 0
                self.spool.clear()

    def check(self) -> None:
        """Raise StoreError where what waits could not be committed now; also notice another file at the path."""
        with self._committing:
            self._follow_file()
            if self._batches:
                self._store.check_writable()

    def flush_for_reader(self, patience_s: float = 0.2) -> None:
        """Commit for somebody who reads, and wait for it so long; while nothing can be stored, do not even try."""
        if not self._is_stuck and (self._batches or self._store.is_elsewhere):
            with suppress(StoreError, TimeoutError):  # the collector meets it too, and says so
                within(patience_s, self.flush)

    def close(self) -> None:
        """Commit at the end; where that is impossible, log what is on the spool and what is lost."""
        try:
            self.flush()
        except StoreError as error:
            sizes = [len(parsed.events) for _, parsed in self._batches]
            lost = sum(sizes[len(sizes) - self._unspooled :])
            self._log.event("collector", fault=error, spooled=sum(sizes) - lost, lost=lost)

    def _replay(self) -> None:
        """Store what a previous run had popped but not committed, each batch once. Raises StoreError."""
        replayed = 0
        with self.logged_fault():
            for sequence, parsed in self.spool.read():
                if self._store.store_batch(parsed, sequence, self._clock()):
                    self._sequence = sequence
                    replayed += len(parsed.events)
            self.spool.clear()
        self._is_replayed = True
        if replayed:
            self._log.event("spool", replayed=replayed)
        if self.spool.odd_lines:
            fault = f"{self.spool.odd_lines} lines are no batches"
            self._log.event("spool", fault=fault, kept_in=self.spool.odd_path.name)

    def _follow_file(self) -> None:
        """Go on with the file that is at the database's path now, if it is another one. Raises StoreError."""
        with self._lock:
            mark = self._batches[0][0] - 1 if self._batches else self._sequence
        event = self._store.follow_file(mark)
        if event is not None:
            self._log.event("store", fault=event)

    @contextmanager
    def logged_fault(self) -> Iterator[None]:
        """Log an OSError of the spool instead of raising it."""
        try:
            yield
        except OSError as error:
            self._log.once("spool", fault=os_reason(error))


def _setting(answer: Any, name: str) -> Any:
    """Return a setting of the proxy's usage: alone, or of a configuration, of whose two layouts the newer one wins."""
    with suppress(KeyError, TypeError):
        answer = {**answer, **answer["observability"]["usage"]}
    return answer.get(name) if isinstance(answer, dict) else answer


# Providers that are asked to count tokens too, and whose failures at that make no record.
_COUNTING = ("claude", "gemini", "vertex", "aistudio", "antigravity", "interactions", "xai", "kimi", "unknown")


class Attempts(NamedTuple):
    """What the proxy has counted for one auth_index or masked key since its start."""

    good: int = 0
    bad: int = 0
    is_recorded: bool = True  # whether each failure makes a record


class ProxyFacts:
    """Ask the proxy about itself: with a key that just worked, never again after a refusal, and seldom."""

    _PAUSE_S = 56.0
    _MOST, _SPAN_S = 13, 600.0  # each question costs the proxy 60 ms

    def __init__(self, status: CollectorStatus, store: Store, log: Log, poll_interval_s: float, clock=time.time):
        self._status, self._store, self._log, self._clock = status, store, log, clock
        self._poll_interval_s = poll_interval_s
        self._api: ProxyApi | None = None
        self._asked: list[float] = []
        self._failed: set[str] = set()  # routes, on this connection
        self._asked_at = 0.0
        self.has_example_keys = False

    def connect(self, source: Source, goes_on: bool = False) -> None:
        """Ask by a new connection, from the beginning unless it goes on with the last one."""
        self._api = source.api
        if goes_on:
            return
        self._failed.clear()
        self._status.publishing = self._status.retention_seconds = None
        self.has_example_keys, self._asked_at = False, 0.0
        if not source.is_proxy:
            self._learn_retention(_FOR_EVER_S)
        elif self._store.get_meta("retention_s") == _FOR_EVER_S:
            self._store.put_meta("retention_s", None)
        config = self._api and (self._api.config or self._question(_CONFIG, most=2))
        if isinstance(config, dict):
            seconds = _finite(_setting(config, "redis-usage-queue-retention-seconds")) or 0.0
            # Proxies before v6.10.1 have no such setting and keep records for 60 s, the default of later ones.
            self._learn_retention(min(seconds, 3600.0) if seconds > 0 else SHORTEST_RETENTION_S)
            self._learn_publishing(config)
        self._look()
        self.ask()

    def _question(self, path: str, most: int = 1) -> Any:
        """Return an answer; None where it fails, or where ten minutes have no room for so many requests more."""
        api, now = self._api, self._clock()
        self._asked = [at for at in self._asked if 0 <= now - at < self._SPAN_S]
        if api is None or len(self._asked) + most > self._MOST:
            return None
        sent = api.sent
        try:
            return api.ask(path)
        except QueueFault:
            self._failed.add(path)
            if api.has_refused:
                self._api = None
            return None
        finally:
            self._asked.extend([now] * (api.sent - sent))  # two where both trees were tried

    def _learn_publishing(self, answer: Any) -> None:
        publishing = _setting(answer, "usage-statistics-enabled")
        if isinstance(publishing, bool):
            self._status.publishing, self._asked_at = publishing, self._clock()

    def ask(self) -> None:
        """Ask, where it is time to, whether the proxy publishes and whether template keys stand in its config."""
        now = self._clock()
        if not 0 <= now - self._asked_at < self._PAUSE_S:
            self._asked_at = now
            self._learn_publishing(self._question(_PUBLISHING))
            self._look()

    def _look(self) -> None:
        api = self._api
        if api is not None:
            self._status.proxy_version, self._status.clock_ahead_seconds = api.version, api.clock_ahead_s
            self.has_example_keys = api.has_example_keys()

    def attempts(self) -> tuple[dict[Any, Attempts], bool]:
        """Return what the proxy has counted since its start, and whether of all; a route that failed is not asked."""
        most = {_FILES: 2, _KEYS: 1}  # which has no twin
        files, keys = (path not in self._failed and self._question(path, most[path]) for path in most)
        attempts: dict[Any, Attempts] = {}
        is_whole = False
        with suppress(AttributeError, TypeError, Rejected):  # what has another shape ends it
            listed = (files or {}).get("files") or ()
            told = [(file.get("auth_index"), file.get("type") == "codex", file) for file in listed]
            for provider, entries in (keys or {}).items():
                is_recorded = provider.lower() not in _COUNTING
                told += [(mask_key(name.rpartition("|")[2]), is_recorded, entry) for name, entry in entries.items()]
            for name, is_recorded, entry in told:
                good, bad, were_recorded = attempts.get(name, Attempts())  # entries may share a key
                more_good, more_bad = (_number(entry.get(word), word) for word in ("success", "failed"))
                attempts[name] = Attempts(good + more_good, bad + more_bad, is_recorded and were_recorded)
            is_whole = bool(attempts and files and keys is not None and keys is not False)
        return attempts, is_whole

    def note_events(self) -> None:
        """Take events as a sign that the proxy publishes; where it denied that, ask again in two seconds."""
        self.has_example_keys = False
        if self._api is None:
            self._status.publishing = None
        elif self._status.publishing is not False:
            self._learn_publishing(True)
        else:  # left from before it was switched off, or it is on again
            self._asked_at = min(self._asked_at, self._clock() - self._PAUSE_S + 2)

    def abort(self) -> None:
        """Give up a question that is on its way; nothing is asked until the next connect()."""
        api, self._api = self._api, None
        if api is not None:
            api.abort()

    def state(self, otherwise: str) -> str:
        """Return why nothing comes although the connection is well; else ``otherwise``."""
        if self.has_example_keys:
            return "example_keys"
        return "publishing_off" if self._status.publishing is False else otherwise

    def _learn_retention(self, seconds: float) -> None:
        """Record how long the queue keeps what nobody takes, and warn where that is hardly longer than the pause."""
        if self._store.get_meta("retention_s") != seconds:
            self._store.put_meta("retention_s", seconds)
        warning = "retention_short" if seconds < 2 * self._poll_interval_s else None
        if warning and not self._status.warning:
            self._log.event("collector", warning=retention_warning(seconds, self._poll_interval_s))
        self._status.warning = warning
        self._status.retention_seconds = None if seconds == _FOR_EVER_S else seconds


class Rival:
    """Compare the attempts that the proxy counts with the records that come, to notice a program that takes some.

    It counts some that make no record, so two signs alone are believed: nothing comes at all for a while, or failures
    are missing, of providers each of whose failures makes a record.
    """

    def __init__(self, facts: ProxyFacts, status: CollectorStatus, poll_interval_s: float, clock, monotonic):
        self._facts, self._status, self._clock, self._monotonic = facts, status, clock, monotonic
        self._poll_interval_s = poll_interval_s
        self._turn_s = self._read_s = -math.inf
        self.connect()

    def connect(self) -> None:
        """Begin with a new connection, or after a gap: what was missed before is unknown."""
        self._attempts: dict[Any, Attempts] = {}
        self._sums = [0, 0, 0, 0]  # attempts counted and records that came, of each first all and then these failures
        self._readings: deque[tuple[float, ...]] = deque(maxlen=144)  # of a day: time and sums
        self._is_awaiting = False  # records of the last one, which may be on their way

    def note(self, parsed: Parsed) -> None:
        """Count what came, but not what a client left: the proxy does not count it either."""
        for event in parsed.events:
            if event.failed:  # which the second event of an image tool never is
                has_left = event.status_code == 499 or "client left" in (event.error or "")
                names = (event.context.auth_index, event.context.source)
                known = next((self._attempts[name] for name in names if name in self._attempts), Attempts())
                self._sums[2] -= has_left
                self._sums[3] += known.is_recorded and not has_left
        self._sums[2] += len(parsed.events) + len(parsed.rejects) + parsed.ignored
        self._sums[3] += len(parsed.rejects)

    def turn(self) -> None:
        """Read the counters every 10 minutes, and judge when their records must be here; with the queue empty."""
        before, self._turn_s = self._turn_s, self._monotonic()
        retention_s = self._status.retention_seconds or SHORTEST_RETENTION_S
        if not self._status.publishing or self._status.warning:
            self.connect()
            self._status.rival = None
        elif self._turn_s - before > max(2 * self._poll_interval_s, min(SHORTEST_RETENTION_S, retention_s)):
            self.connect()
        elif not self._is_awaiting and self._turn_s - self._read_s >= 600:
            self._read_s, self._is_awaiting = self._turn_s, True
            self._read()
        elif self._is_awaiting and before - self._read_s >= max(5.0, self._poll_interval_s):
            self._is_awaiting = False
            rival = self._judge()
            if rival and self._status.rival is None:
                self._facts.ask()  # whether it publishes: it may have been switched off a moment ago
            self._status.rival = rival if self._status.publishing else None

    def _read(self) -> None:
        """Add what the counters have grown by; one that fell, or is new, has not."""
        attempts, _ = self._facts.attempts()
        for name, now in attempts.items():
            old = self._attempts.get(name, now)
            if now.good >= old.good and now.bad >= old.bad:
                self._sums[0] += now.good - old.good + now.bad - old.bad
                self._sums[1] += now.is_recorded * (now.bad - old.bad)
        self._attempts = attempts or self._attempts
        self._readings.append((self._clock(), *self._sums))

    def _judge(self) -> dict[str, float] | None:
        """Return the verdict over the shortest span since a reading that allows one."""
        grown, last = 0, self._sums[0]
        for at, *sums in itertools.islice(reversed(self._readings), 1, None):
            every, failed, came, came_failed = map(operator.sub, self._sums, sums)
            grown, last = grown + (sums[0] < last), sums[0]
            are_even = came_failed > 0.8 * failed
            if came <= 0 and every >= 10 and grown >= 3:
                return {"expected": every, "received": 0, "since": at}
            if failed - came_failed >= 3 and not are_even:
                return {"expected": failed, "received": max(0, came_failed), "since": at}
            if (are_even and failed >= 5) or (every >= 10 and came > 0.8 * every):
                break
        return None


class OutageLog:
    """The spans in which nothing is recorded. One that cannot be written yet is kept until it can."""

    def __init__(self, store: Store, poll_interval_s: float, clock=time.time, monotonic=monotonic_s):
        self._store, self._clock, self._monotonic = store, clock, monotonic
        self._longest_turn_s = SHORTEST_RETENTION_S + 2 * poll_interval_s
        self._turn_s: float | None = None
        self._ahead_s = 0.0  # of the clock before the monotonic one
        self._open: tuple[float, str] | None = None  # since when, and why

    def begin(self, reason: str, at: float | None = None) -> None:
        """Record that recording stopped; an outage that is open already goes on, with its first reason."""
        self._turn_s, self._open = None, self._open or (self._clock() if at is None else at, reason)
        with suppress(StoreError):  # then it is written with its end; the state tells of the database
            self._store.begin_outage(*self._open)

    def end(self, restart_lost: bool | None = None) -> None:
        """Record that recording goes on; where the proxy restarted, whether that lost records. Raises StoreError."""
        if self._open is not None:
            self._store.begin_outage(*self._open)
        self._store.end_outage(self._clock(), restart_lost=restart_lost)
        self._open = None

    def turn(self, publishing: bool | None) -> None:
        """Record as outages that the proxy publishes nothing, and that this machine slept longer than it remembers."""
        _, reason = self._open or (None, None)
        # The database takes writes again where the turn came so far.
        if reason == "storage_error" or (reason == "publishing_off" and publishing is not False):
            self.end()
        elif reason is None and publishing is False:
            self.begin("publishing_off")
        before, self._turn_s = self._turn_s, self._monotonic()
        ahead_s, self._ahead_s = self._ahead_s, self._clock() - self._turn_s
        if abs(self._ahead_s - ahead_s) > SHORTEST_RETENTION_S:  # the clock was set
            self._store.mend_outages(self._clock())
        gap_s = 0.0 if before is None else self._turn_s - before
        if gap_s > self._longest_turn_s and self._open is None:
            self._store.begin_outage(self._clock() - gap_s, "stopped", is_measured=True)
            self._store.end_outage(self._clock())


class RefusedLogins:
    """Logins without a success, as salted hashes: a refused one is not sent again, any other thrice in half an hour."""

    MOST, SPAN_S = 3, 1800.0  # five wrong keys ban this address for 30 minutes, its owner's panel included

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, monotonic=monotonic_s):
        self._store, self.clock, self._monotonic = store, clock, monotonic
        self.config_time = 0  # a refusal ends as it changes

    def spend(self, login: Sequence[Any]) -> None:
        """Write down a login that is about to go out. Raises StoreError."""
        salt, tries = self._recent()
        self._write(salt, [*tries, [self._hash(login, salt), self.clock(), self._monotonic(), self.config_time, ""]])

    def settle(self, state: str | None) -> None:
        """Write down what became of a login that has just gone out; None is known to be no failed one."""
        salt, tries = self._recent()
        if tries and tries[-1][-1] == "":
            *login, _ = tries.pop()
            self._write(salt, [*tries, [*login, state]] if state else tries)

    def used(self, login: Sequence[Any]) -> tuple[int, float, list[str]]:
        """Return how many of the three logins are used, in how many seconds one may go out, and what they met."""
        tries = [tried for tried in self._tries_of(login) if self._left_s(tried) > 0]
        left_s = [0.0] * self.MOST + sorted(map(self._left_s, tries))
        return len(tries), left_s[-self.MOST], [state for *_, state in tries]

    def refusal(self, login: Sequence[Any]) -> str | None:
        """Return the state that this login was refused with; None where it was not, or the config has changed."""
        met = (state for *_, config_time, state in self._tries_of(login) if config_time == self.config_time)
        return next((state for state in met if state in _REFUSALS), None)

    def forget(self) -> None:
        """Forget all logins: one has worked, and what it brought is worth more than a fault in here."""
        with suppress(StoreError):
            self._store.put_meta("logins", None)

    def _tries_of(self, login: Sequence[Any]) -> list[list[Any]]:
        salt, tries = self._recent()
        return [tried for tried in tries if tried[0] == self._hash(login, salt)]

    def _recent(self) -> tuple[str, list[list[Any]]]:
        with suppress(TypeError, ValueError):
            salt, tries = json.loads(self._store.get_meta("logins"))
            return salt, [tried for tried in tries if self._left_s(tried) > 0 or tried[-1] in _REFUSALS]
        return os.urandom(16).hex(), []

    def _write(self, salt: str, tries: Sequence[Any]) -> None:
        self._store.put_meta("logins", json.dumps([salt, tries[-20:]]))

    def _left_s(self, tried: Sequence[Any]) -> float:
        """Return for how long a login counts, by the clock and by the time since boot: a clock may be set."""
        _, at, uptime_s, _, _ = tried
        by_uptime = self._monotonic() - uptime_s
        return self.SPAN_S - min(abs(self.clock() - at), by_uptime if by_uptime >= 0 else self.SPAN_S)

    @staticmethod
    def _hash(login: Sequence[Any], salt: str) -> str:
        return hashlib.sha256((salt + json.dumps(list(login))).encode()).hexdigest()


@dataclass
class CollectorStatus:
    """The collector's state for people and programs; times are epoch seconds."""

    state: str
    since: float
    message: str
    endpoint: str
    until: float | None = None
    mode: str | None = None
    last_event: float | None = None
    publishing: bool | None = None
    proxy_version: str | None = None
    retention_seconds: float | None = None
    clock_ahead_seconds: float | None = None
    warning: str | None = None
    rival: dict[str, float] | None = None

    def as_json(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Return the status as ``/api/health`` shows it, with how many events were stored, rejected and ignored."""
        return dict(asdict(self), events=counts["stored"], rejected=counts["rejected"], ignored=counts["ignored"])


# The collector's states. starting → recording or waiting, turn by turn, as long as the connection and the database
# hold. A fault of the queue (its class names the state) or of the database (storage_error) ends the session and begins
# an outage; after a wait the next session begins with a flush, so that nothing more is popped while something waits
# to be stored. The first good pop of a session ends the outage. publishing_off is a session that works, at a proxy
# that records nothing. Only a changed address, key or config file leads out of wrong_password and no_password.


class Collector:
    """Take events off the queue and store them until ``stop``, the only thing it sleeps on: states and waiting."""

    _MOST_STRANGE = 20

    def __init__(
        self,
        config: Config,
        store: Store,
        log: Log,
        stop: threading.Event,
        load: Callable[[], Config] | None = None,
        config_path: Path | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = monotonic_s,
    ):
        self._config, self._store, self._log, self._stop, self._clock = config, store, log, stop, clock
        self._load, self._config_path = load or (lambda: config), config_path
        self.journal = Journal(store, log, clock, monotonic)
        self._decided_changes = 0
        self._backoff = backoff()
        self._files = AccountFiles(config.auth_dirs(), monotonic)
        self._readings = TrafficReadings(self._files, store, clock, monotonic)
        self._outages = OutageLog(store, config.poll_interval_seconds, clock, monotonic)
        self._refused = RefusedLogins(store, clock, monotonic)
        self._recent = Recent()
        self._source = Source()
        self._is_proven = False  # whether this session has had a good reply to a pop; of one that had, until the next:
        self._records, self._recorded_at = 0, 0.0
        self._was_busy = self._has_held_out = False
        self._restart_lost: bool | None = None
        self._strange: float = 0  # values that were no records, while none was one
        self._lock = threading.Lock()
        endpoint = f"{config.cliproxy_host}:{config.cliproxy_port}"
        self._status = CollectorStatus("starting", clock(), STATE_REMEDIES["starting"], endpoint)
        self._status.last_event = (store.span() or [None])[-1]
        self._facts = ProxyFacts(self._status, store, log, config.poll_interval_seconds, clock)
        self._rival = Rival(self._facts, self._status, config.poll_interval_seconds, clock, monotonic)

    def status(self) -> dict[str, Any]:
        """Return the state and what is known of the proxy, as ``/api/health`` shows it."""
        with self._lock:
            status = replace(
                self._status,
                since=min(self._status.since, self._clock()),  # the clock may have been set back meanwhile
                message=self._status.message.replace(str(self._store.path), self._store.path.name),
            )
        return status.as_json(self._store.counts)

    def run(self) -> None:
        """Collect until ``stop`` is set, whatever is raised; what was popped by then is stored first."""
        with suppress(OSError):
            alive_at = self.journal.spool.path.stat().st_mtime  # in a run before
            self._outages.begin("stopped", min(alive_at, self._clock()))
        try:
            while not self._stop.is_set():
                try:
                    self._turn()
                except Exception as error:  # the thread's loop: an unforeseen fault must be seen, and not end it
                    self._enter("unreachable", f"the dashboard has a fault of its own: {where_raised(error)}")
                    self._stop.wait(next(self._backoff))
        finally:
            self.journal.close()

    def _turn(self) -> None:
        """Run one session, and wait after the fault that ended it."""
        try:
            self._session()
        except QueueFault as fault:
            self._enter(fault.state, fault)
            self._outages.begin(fault.state)
            self._wait_after(fault)
        except StoreError as error:
            self._enter_storage_error(error)
            self._stop.wait(next(self._backoff))

    def interrupt(self) -> None:
        """Abort a wait for the other side: replies that are not here by now are given up."""
        self._source.abort()
        self._facts.abort()

    def probe(self) -> dict[str, Any]:
        """Log in once, pop nothing, and return the status that this shows."""
        if self._config.collect_mode == "subscribe":  # what is published to a listener is lost with it
            self._config = replace(self._config, collect_mode="pop")
        try:
            source = self._open()
            self._facts.connect(source)
            source.close()
            self._enter(self._facts.state("waiting"))
        except QueueFault as fault:
            self._enter(fault.state, fault)
        return self.status()

    # One session

    def _session(self) -> None:
        """Collect over one connection, and over the next where that has ended because it was idle."""
        if self._is_proven:
            self._was_busy = self._clock() - self._recorded_at <= SHORTEST_RETENTION_S
            self._is_proven = False
        self.journal.flush()
        self._store.check_writable()
        goes_on = False
        while not self._stop.is_set():
            source = self._source = self._open()
            try:
                self._facts.connect(source, goes_on)
                if not goes_on:
                    self._rival.connect()
                    self._restart_lost = self._loss_of_restart()
                self._status.mode, self._recent.by_values = source.mode, source.mode == "subscribe"
                goes_on = self._collect(source)
            finally:
                self._source = Source()
                source.close()
                while source.unread:
                    self._hold(source.take(source.largest_batch).values)

    def _open(self) -> Source:
        *_, self._refused.config_time = self._login()
        return open_source(self._config, partial(setattr, self._status, "endpoint"), self._refused)

    def _collect(self, source: Source) -> bool:
        """Pop, spool, store and wait in turn, until the connection ends because it is idle (True), or at a stop.

        No reply is on its way meanwhile, so that a kill or a lock costs none.
        """
        count = few = 16  # where little comes, more would only be more empty replies
        connected_at = self._clock()
        while source.unread or not self._stop.is_set():
            left = math.inf if source.is_proxy else self._MOST_STRANGE - self._strange
            if left <= 0:
                raise QueueFault(f"{self._MOST_STRANGE} values came, and none was a usage record", "foreign_list")
            result = source.take(int(min(count, source.largest_batch, left)))
            more = result.full and not self._stop.is_set()
            recorded = self._hold(result.values)
            count = source.largest_batch if more else few
            if not more:
                self.journal.sync()
            fault = self._store_if_due(source, at_rest=not more) or result.fault
            if fault is None:
                self._after_turn(recorded, is_empty=not result.full)
                if not result.full and source.mode != "subscribe":
                    self._stop.wait(self._config.poll_interval_seconds)
                continue
            if isinstance(fault, ConnectionClosed):
                if self._is_proven and self._clock() - max(connected_at, self._recorded_at) > 60:
                    return True
                fault.state = "unreachable"  # not the silent refusal that this means at the login
            raise fault
        return False

    def _store_if_due(self, source: Source, at_rest: bool) -> QueueFault | None:
        """Commit what is due, and pop nothing while that fails; what a subscription delivers meanwhile is spooled."""
        waits = backoff(0.5, 10.0)
        while not self._stop.is_set():
            try:
                if self.journal.is_due:
                    self.journal.flush()
                elif at_rest:
                    self.journal.check()
                return None
            except StoreError as error:
                self._enter_storage_error(error)
            self._stop.wait(next(waits))
            if source.unread:
                result = source.take(source.largest_batch)
                self._hold(result.values)
                if result.fault is not None:
                    return result.fault
        return None

    def _hold(self, values: Sequence[Any]) -> int:
        """Parse and spool what was popped, and return how many records were in it."""
        if not values:
            return 0
        self._files.look(2.0)
        parsed = parse_events(values, self._files.contexts, self._recent)
        self._readings.note(parsed.events)
        self._rival.note(parsed)
        self.journal.hold(parsed)
        self._follow_files(2.0)  # which can wait for the database
        if parsed.events:
            newest = max(event.ts_epoch for event in parsed.events)
            self._status.last_event = max(newest, self._status.last_event or 0.0)
        self._strange = -math.inf if parsed.events else self._strange + len(parsed.rejects)
        return len(parsed.events) + len(parsed.rejects)

    def _follow_files(self, pause_s: float) -> None:
        """Notice account files that have changed, and what they tell of events that are stored already."""
        self._files.look(pause_s)
        if self._files.changes != self._decided_changes:
            with suppress(StoreError):  # then at the next turn
                self._store.decide_accounts(self._files.account_of, self._files.renamed)
                self._decided_changes = self._files.changes

    def _after_turn(self, recorded: int, is_empty: bool) -> None:
        """Update state, outages and what is known of the proxy after each turn; recording ends with a quiet hour."""
        if self._stop.is_set():
            return
        with self.journal.logged_fault():
            self.journal.spool.touch(self._clock())
        self._follow_files(10.0)
        if not self._is_proven:
            self._is_proven = True
            self._backoff = backoff()
            self._outages.end(self._restart_lost)
            self._records, self._recorded_at = 0, 0.0
        now = self._clock()
        if recorded:
            self._records, self._recorded_at = self._records + recorded, now
            self._facts.note_events()
        self._facts.ask()
        self._outages.turn(self._status.publishing)
        self._enter(self._facts.state("waiting" if now - self._recorded_at > 3600 else "recording"))
        if is_empty:
            self._rival.turn()
        try:
            self._readings.save_due()
        except StoreError as error:  # readings come with the next requests again; events are not held up for them
            self._log.event("quota", fault=error)

    def _loss_of_restart(self) -> bool | None:
        """Return whether a restart of the proxy cost records; None where there was none for sure."""
        if not self._records:
            return None
        attempts, is_whole = self._facts.attempts()
        # A proxy that has counted fewer attempts than it handed over records has begun again. One that does not tell
        # has where nobody listened a moment ago.
        counted = sum(told.good + told.bad for told in attempts.values())
        has_restarted = 2 * counted < self._records if is_whole else self._status.state == "refused"
        return self._was_busy if has_restarted else None

    # States and waiting

    def _enter(self, state: str, detail: Any = "") -> None:
        """Change the state, with a text or the fault that it is for; a change is logged once."""
        remedy = "" if isinstance(detail, Misconfigured) else STATE_REMEDIES[state]
        message = ". ".join(filter(None, [str(detail), remedy]))
        lasts_s = getattr(detail, "lasts_s", None)
        until = None if lasts_s is None else self._clock() + lasts_s
        with self._lock:
            status = self._status
            if status.state != state:
                status.since = self._clock()
            status.state, status.message, status.until = state, message, until
        self._log.once("collector", state=state, endpoint=status.endpoint, message=message)

    def _enter_storage_error(self, error: StoreError) -> None:
        self._enter("storage_error", error)
        self._outages.begin("storage_error")

    def _login(self) -> list[Any]:
        """Return what a refusal depends on: where the key goes, the key, and the config file's time."""
        config, written_at = self._config, 0
        with suppress(OSError, AttributeError):  # there is no file
            written_at = self._config_path.stat().st_mtime_ns
        return [config.cliproxy_host, config.cliproxy_port, config.management_password, written_at]

    def _wait_after(self, fault: QueueFault) -> None:
        """Wait as a fault needs it; a long wait ends with another config, or with the connection that was banned."""
        seconds = _LONG_WAITS_S.get(fault.state)
        if fault.lasts_s is not None:
            seconds = next(self._backoff) if fault.held is None else fault.lasts_s + 1
        if seconds is None:
            self._stop.wait(next(self._backoff))
            return
        before, held = self._login(), None if self._has_held_out else fault.held
        self._has_held_out = False  # where a ban is told again after the end of a connection, that was no restart
        while seconds > 0 and not self._stop.wait(min(3.0, seconds)):
            seconds -= 3.0
            self._has_held_out = held is not None and held.has_ended()
            try:
                self._config = self._load()
            except ConfigError as error:
                self._log.once("config", fault=error)
            if self._has_held_out or self._login() != before:
                self._backoff, self._strange = backoff(), 0
                break
        if fault.held is not None:
            fault.held.close()


# -------------------- refresher: rounds of quota calls on request, and hourly chores


class QuotaRefresher:
    """Refresh the quota of all accounts, one after the other, one round at a time, never by itself."""

    def __init__(
        self, config: Config, store: Store, log: Log, stop: Any, fetch=fetch_usage, clock=time.time, gap_s=(0.5, 1.0)
    ):
        self._config, self._store, self._log, self._stop = config, store, log, stop
        self._fetch, self._clock, self._gap_s = fetch, clock, gap_s
        self._running = threading.Lock()
        self._progress = (0, 0)
        self._round_at: float | None = store.get_meta("quota_round_at")
        self.known_files: int | None = None

    @property
    def refreshing(self) -> bool:
        """Return whether a round is under way."""
        return self._running.locked()

    def state(self) -> dict[str, Any]:
        """Return progress, cool-down and the last round's start (epoch seconds), as ``/api/quota`` shows them."""
        done, total = self._progress
        return {
            "refreshing": self.refreshing,
            "progress": {"done": done, "total": total},
            "cooldown_seconds": self.cooldown_s(),
            "last_refresh": self._round_at,
        }

    def cooldown_s(self) -> int:
        """Return the whole seconds until the next round; one in the future, by a wrong clock, does not count."""
        wait_s = self._config.quota_refresh_seconds
        left_s = wait_s - self._clock() + (-math.inf if self._round_at is None else self._round_at)
        return int(left_s + 0.999) if 0 < left_s <= wait_s else 0

    def start(self) -> threading.Thread:
        """Begin a round in the background and return its thread. Raises ApiError."""
        if not self._running.acquire(blocking=False):
            self._log.line("refresh_quota: already running")
            raise ApiError(409, "refresh_running", "refresh_quota: already running")
        wait_s = self.cooldown_s()
        found = ([], []) if wait_s else self._find_files()
        if all(file.disabled for file in found[0]):
            self._running.release()
            if wait_s:
                message = f"the quota was refreshed just now; try again in {wait_s} s"
                raise ApiError(429, "cooldown", message, {"Retry-After": str(wait_s)})
            self._log.line(f"refresh_quota: found {len(found[0])} auth files")
            message = 'no Codex account file to ask; set "auth_dir" to the proxy\'s auth-dir (v8: oauth.auth-dir)'
            raise ApiError(409, "no_account_files", message)
        self._progress = (0, 0)
        thread = threading.Thread(target=self._round, args=found, name="quota", daemon=True)
        thread.start()
        return thread

    def register_accounts(self, files: Sequence[AccountFile] | None = None) -> None:
        """List the accounts of all files, or of these, in the quota table before they are asked."""
        files = self._find_files()[0] if files is None else files
        self._store.register_quota_accounts(files, QUOTA_MESSAGES, self._clock())

    def _find_files(self) -> tuple[list[AccountFile], list[str]]:
        _, files, problems = find_account_files(self._config.auth_dirs())
        self.known_files = len(files)
        for problem in problems:
            self._log.line(f"refresh_quota: {problem}")
        return files, problems

    def _round(self, files: list[AccountFile], problems: list[str]) -> None:
        try:
            self._refresh_all(files, problems)
        except StoreError as error:
            self._log.event("refresh_quota", fault=error)
        finally:
            self._running.release()

    def _refresh_all(self, files: list[AccountFile], problems: list[str]) -> None:
        self.register_accounts(files)
        self._log.line(f"refresh_quota: found {len(files)} auth files")
        if any(file.access_token and not file.disabled for file in files):
            self._round_at = self._clock()
            self._store.put_meta("quota_round_at", self._round_at)
        asked = [file for file in files if not file.disabled]
        skipped = len(files) - len(asked)
        mails = [file.email for file in files]
        for number, file in enumerate(asked):
            self._progress = (skipped + number, len(files))
            if number and self._stop.wait(random.uniform(*self._gap_s)):
                return
            is_clear = "@" in file.email and mails.count(file.email) == 1
            try:
                self._refresh(file, mask_mail(file.email, mails) + ("" if is_clear else f" ({file.tag})"))
            except Exception as error:  # the thread's loop: one account's odd fault must not spoil the round
                self._log.event("refresh_quota", fault=error if isinstance(error, StoreError) else where_raised(error))
        self._progress = (len(files), len(files))
        if files and not problems:
            self._forget_absent(files)

    def _refresh(self, file: AccountFile, name: str) -> None:
        self._log.line(f"refresh_quota: fetching quota for {name}...")
        present = find_account_files(self._config.auth_dirs())[1]  # the proxy may have renewed the token by now
        file = next((one for one in present if one.tag == file.tag), file)
        try:
            row = snapshot_of(file, self._fetch(file), self._clock())
        except QuotaFault as fault:
            account = (file.email, file.tag, file.plan or None)
            self._store.save_quota_state(*account, fault.state, str(fault), self._clock())
            self._log.line(f"refresh_quota: no quota for {name}: {fault}")
        else:
            self._store.save_reading(row)
            self._log.line(f"refresh_quota: saved quota for {name}")

    def _forget_absent(self, files: Sequence[AccountFile]) -> None:
        """Delete accounts without a file from the table, except those seen in the traffic of the last week."""
        now, mails, kept = self._clock(), {file.email for file in files}, {(file.email, file.tag) for file in files}
        gone = []
        for row in self._store.quotas():
            has_file = row["email"] in mails and content_of(row)["provider"] == "codex"
            is_seen = row["source"] == "traffic" and now - row["ts_epoch"] < _WEEK_S and not has_file
            if (row["email"], row["account_id_tag"]) not in kept and not is_seen:
                gone.append((row["email"], row["account_id_tag"]))
        self._store.forget_quota_accounts(gone)


def keep_house(
    store: Store, refresher: QuotaRefresher, retention_days: int, log: Log, stop: threading.Event, clock=time.time
) -> None:
    """Register accounts, downsample old readings and delete old events each hour until ``stop``, in small steps."""
    while True:
        try:
            refresher.register_accounts()
            now, span = clock(), store.span()
            if not span or now - span[1] <= _DAY_S:  # else by a clock that is ahead: what is old is unknown
                store.downsample_snapshots(now - 14 * _DAY_S)
                while retention_days and store.delete_some(now - retention_days * _DAY_S) and not stop.wait(0.02):
                    pass
        except Exception as error:  # the thread's loop
            log.event("housekeeping", fault=error if isinstance(error, StoreError) else where_raised(error))
        if stop.wait(3600):
            return


# -------------------- web: routes, the HTTP server, the page


RANGES = {"1h": 3600, "5h": 5 * 3600, "24h": 86400, "7d": 7 * 86400, "30d": 30 * 86400, "90d": 90 * 86400}
RANGE_NAMES = ("today", "yesterday", *RANGES, "all")


class Query(dict):
    """A question's parameters by name; every method raises ApiError where one has a value that is not allowed."""

    def choice(self, name: str, allowed: Sequence[str]) -> str | None:
        """Return one of the allowed words."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise ApiError(400, f"bad_{name}", f"{name} must be one of {', '.join(allowed)}")
        return value

    def whole(self, name: str, low: int, high: int, default: int) -> int:
        """Return a whole number from ``low`` to ``high``."""
        text = self.get(name, str(default))
        if not re.match(r"[+-]?\d{1,9}\Z", text, re.ASCII) or not low <= int(text) <= high:
            raise ApiError(400, f"bad_{name}", f"{name} must be a whole number from {low} to {high}")
        return int(text)

    def moment(self, name: str) -> float | None:
        """Return a time in epoch seconds."""
        text = self.get(name)
        if text is None:
            return None
        if not re.match(r"\d{1,10}(\.\d{1,9})?\Z", text, re.ASCII) or float(text) > _LATEST_AT:
            allowed = f"must be a time in epoch seconds, from 0 to {int(_LATEST_AT)}"
            raise ApiError(400, f"bad_{name}", f"{name} {allowed}; {text[:40]} is none")
        return float(text)

    def zone(self) -> timezone | None:
        """Return the viewer's zone, None for this machine's."""
        minutes = self.whole("tz_offset", -14 * 60, 14 * 60, 0)
        if minutes % 15:
            raise ApiError(400, "bad_tz_offset", "tz_offset must be a multiple of 15, in minutes east of UTC")
        return timezone(timedelta(minutes=minutes)) if "tz_offset" in self else None

    def bucket_s(self, window: Window, default: str) -> int:
        """Return the seconds of a bucket: an hour, or what suits the window where it says ``auto``."""
        length, most = window.end - window.start, 3000
        if (self.choice("bucket", ("auto", "hour")) or default) == "auto":
            # Each range may be an hour longer, where the proxy's clock is ahead.
            sizes = ((2 * 3600, 300), (6 * 3600, 900), (49 * 3600, 3600), (193 * 3600, 3 * 3600))
            fitting = (seconds for longest, seconds in sizes if length <= longest)
            return next(fitting, math.ceil(length / most / 86400) * 86400)
        if length / 3600 > most:
            raise ApiError(400, "bad_bucket", f"this window has over {most} hours; add bucket=auto for longer ones")
        return 3600

    def filters(self, names: Names) -> Filters:
        """Return what narrows the answer; the owner's ``names`` are understood too."""
        status = self.get("status", "ok")
        if not re.match(r"(ok|failed|[45]\d\d)\Z", status, re.ASCII):
            raise ApiError(400, "bad_status", "status must be ok, failed, or the code of a failure, 400 to 599")
        account, model, key = self.get("account"), self.get("model"), self.get("key")
        return Filters(account, model, self.get("status"), self.get("q"), key, names.by_target)

    def cursor(self, order: Order) -> tuple[float | None, int] | None:
        """Return the value and the id of the request that a list in this order goes on behind."""
        own, value = "_".join(order), r"\d{1,16}(?:\.\d{1,9})?" + "|null" * (order.sort != "time")
        match = re.match(rf"{own}_({value})_(\d{{1,18}})\Z", self.get("before", ""), re.ASCII)
        if "before" in self and match is None:
            raise ApiError(400, "bad_before", f'before must be the "next" of an earlier answer sorted as {own}')
        return (json.loads(match.group(1)), int(match.group(2))) if match else None


@dataclass
class App:
    """What the routes answer from; collector and refresher are asked for their state only."""

    config: Config
    store: Store
    refresher: QuotaRefresher
    collector_status: Callable[[], dict[str, Any]]
    log: Log
    clock: Callable[[], float] = time.time
    demo: bool = False
    names: Names = field(default_factory=Names)
    flush: Callable[[], None] = lambda: None  # has what was popped committed, for whoever reads
    started_at: float = field(default_factory=time.monotonic)
    run_id: str = field(default_factory=lambda: os.urandom(4).hex())

    def __post_init__(self) -> None:
        self.prices = list_prices(self.config.prices)


def _window(app: App, query: Query, now: float) -> tuple[str, Window]:
    """Return the range's name and window; the end of one up to now may be the newest event's, an hour ahead at most."""
    name = query.choice("range", RANGE_NAMES) or "today"
    start, end = query.moment("start"), query.moment("end")
    oldest, newest = app.store.span() or (now, now)
    anchor = now if end is None else end
    day = datetime.fromtimestamp(anchor, query.zone()).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    if start is None:
        starts = {"today": day.timestamp(), "yesterday": (day - timedelta(days=1)).timestamp(), "all": oldest}
        start = starts.get(name, anchor - RANGES.get(name, 0))
    if end is None and name == "yesterday":
        end = day.timestamp()
    elif end is None:
        end = max(now, newest + 0.001) if name == "all" or newest + 0.001 <= now + 3600 else now
    if not start < end:
        raise ApiError(400, "bad_window", f"start must be before end; {start:.3f} is not before {end:.3f}")
    return name, Window(start, end)


def _window_before(window: Window, name: str, query: Query) -> Window:
    """Return what a window is compared with: the same hours of the local day before, else as much time right before."""
    if name not in ("today", "yesterday") or {"start", "end"} <= query.keys():
        return Window(window.start - (window.end - window.start), window.start)

    def day_before(at: float) -> float:
        moment = datetime.fromtimestamp(at, query.zone())
        if datetime.fromtimestamp(at - 0.001, query.zone()).date() < moment.date():  # at 1:00 where midnight is skipped
            moment = moment.replace(hour=0)
        return (moment - timedelta(days=1)).timestamp()

    return Window(*map(day_before, window))


def _cost(app: App, model: str | None, counts: Sequence[int | None]) -> float | None:
    price = price_of(app.prices, model)
    return price and cost_at(price, counts)


def _sums_json(parts: Sequence[tuple[Sums, float | None]]) -> dict[str, Any]:
    """Add up sums and their costs; each part has its own, so that all groupings agree."""
    costs = [cost for _, cost in parts if cost is not None]
    worth = {"cost_usd": round(math.fsum(costs), 9) if costs else None}
    worth["unpriced_tokens"] = sum(sums[-1] for sums, cost in parts if cost is None)
    return {**dict(zip(SUM_NAMES, add_sums(sums for sums, _ in parts))), **worth}


def api_summary(app: App, query: Query) -> dict[str, Any]:
    """Answer ``/api/summary``: sums of a window, by bucket (zero-filled), model, account and client key."""
    now, zone = app.clock(), query.zone()
    name, window = _window(app, query, now)
    bucket_s = query.bucket_s(window, "auto" if name == "all" else "hour")
    offset = datetime.fromtimestamp(now, timezone.utc).astimezone(zone).utcoffset()
    offset_s = int(offset.total_seconds()) // BUCKET_S * BUCKET_S
    filters = query.filters(app.names)._replace(text=None)  # a search narrows the list of requests only
    usage = app.store.usage(window, bucket_s, offset_s, filters)
    told = _teller(app, usage)
    summary = told(usage.cells)
    starts = range((int(window.start) + offset_s) // bucket_s * bucket_s - offset_s, math.ceil(window.end), bucket_s)
    return {
        "range": None if {"start", "end"} <= query.keys() and "range" not in query else name,
        "start": window.start,
        "end": window.end,
        "now": now,
        "bucket_seconds": bucket_s,
        "prices_as_of": PRICES_AS_OF,
        "speed": summary.pop("speed"),
        "summary": summary,
        "previous": _sums_before(app, _window_before(window, name, query), filters),
        "hours": _hours(usage.buckets, starts, zone),
        **_breakdowns(usage, filters, told),
        "failures": usage.failures,
        "outages": app.store.outages(window, now),
        "first_record": (app.store.span() or [None])[0],
        **({"choices": _choices(app, window, filters, usage)} if query.whole("choices", 0, 1, 0) else {}),
    }


def _teller(app: App, usage: Usage) -> Callable[[Iterable[Cell]], dict[str, Any]]:
    """Return what tells of cells: their sums, what these come to at list price, and how fast they were."""
    worths = {cell: (sums, _cost(app, cell.model, _priced_tokens(sums))) for cell, sums in usage.cells.items()}
    counted = {cell: count_speeds(speeds) for cell, speeds in usage.speeds.items() if len(speeds) > 60}

    def told(cells: Iterable[Cell]) -> dict[str, Any]:
        few = b"".join(usage.speeds.get(cell, b"") for cell in cells if cell not in counted)
        speed = speed_json(count_speeds(few) + sum(counted.get(cell, 0) for cell in cells))
        return {**_sums_json([worths[cell] for cell in cells]), "speed": speed}

    return told


def _sums_before(app: App, before: Window, filters: Filters) -> dict[str, Any] | None:
    """Return the sums that a window is compared with; None where the records do not reach back so far."""
    if (app.store.span() or [math.inf])[0] > before.start:
        return None
    models = app.store.sums_by("model", before, filters)
    return _sums_json([(sums, _cost(app, model, _priced_tokens(sums))) for model, sums in models])


def _hours(buckets: Mapping[int, Sums], starts: range, zone: Any) -> list[dict[str, Any]]:
    nothing, local = add_sums([]), partial(datetime.fromtimestamp, tz=zone)
    return [
        {"hour": f"{local(at):%Y-%m-%d %H:%M}", "start": at, **dict(zip(SUM_NAMES, buckets.get(at, nothing)))}
        for at in starts
    ]


def _breakdowns(usage: Usage, filters: Filters, told: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of models, accounts and keys, most tokens first."""

    def account_columns(account: Account) -> dict[str, Any]:
        columns = {name: getattr(account, name) or None for name in ("source", "auth_index", "plan", "provider")}
        return {"account": account.name, "name": owner_name(filters.names, account), **columns}

    def key_columns(key: str | None) -> dict[str, Any]:
        columns = {"key": key or None, "name": filters.names.get(tag_of_mask(key or ""))}
        return columns if key is not None else {**columns, "unknown": True}  # of requests that 3.0 had deleted

    def rows(part: str, columns_of: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
        found = [{**columns_of(value), **told(cells)} for value, cells in usage.by(part).items()]
        return sorted(found, key=operator.itemgetter("total_tokens", "requests"), reverse=True)

    return {
        "models": rows("model", lambda model: {"model": model}),
        "accounts": rows("account", account_columns),
        "keys": rows("key", key_columns),
    }


def _choices(app: App, window: Window, filters: Filters, usage: Usage) -> dict[str, Any]:
    """Return what each filter can be set to under the other three, most requests first."""

    def counts(name: str) -> Mapping[Any, int]:
        if name == "status" or getattr(filters, name) is not None:
            found = app.store.sums_by(name, window, filters._replace(**{name: None}))
            return {value: add_sums(parts)[0] for value, parts in by_key(found).items()}
        return {value: sum(usage.cells[cell][0] for cell in cells) for value, cells in usage.by(name).items()}

    def options(found: Mapping[Any, int], columns_of: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
        rows = [{**columns_of(value), "requests": n} for value, n in found.items() if value is not None]
        return sorted(rows, key=operator.itemgetter("requests"), reverse=True)

    statuses, named = counts("status"), filters.names.get
    failed = sum(n for status, n in statuses.items() if status != "ok")
    taken = {status: n for status, n in statuses.items() if re.fullmatch("ok|[45]..", str(status))}
    return {
        "account": options(counts("account"), lambda one: {"value": one.name, "name": owner_name(filters.names, one)}),
        "model": options(counts("model"), lambda model: {"value": model}),
        "key": options(counts("key"), lambda key: {"value": key or "none", "name": named(tag_of_mask(key))}),
        "status": [*options(taken, lambda code: {"value": str(code)}), {"value": "failed", "requests": failed}],
    }


def api_requests(app: App, query: Query) -> dict[str, Any]:
    """Answer ``/api/requests``: single events, newest first or as asked, with their number and a cursor to the next."""
    limit, filters = query.whole("limit", 1, 500, 100), query.filters(app.names)
    order = Order(query.choice("sort", list(SORTS)) or "time", query.choice("order", ("desc", "asc")) or "desc")
    in_window = any(name in query for name in ("range", "start", "end"))
    window = _window(app, query, app.clock())[1] if in_window else EVER
    rows = app.store.requests(limit + 1, window, filters, query.cursor(order), order)
    shown, cursor = rows[:limit], None
    if len(rows) > limit:
        cursor = f"{'_'.join(order)}_{json.dumps(shown[-1][SORTS[order.sort]])}_{shown[-1]['id']}"
    _price_rows(app, shown)
    with_rows = window._replace(start=max(window.start, (app.store.get_meta("events_floor") or 0) * BUCKET_S))
    total = None if filters.text else add_sums(sums for _, sums in app.store.sums_by("model", with_rows, filters))[0]
    return {"requests": shown, "next": cursor, "total": total}


def _price_rows(app: App, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        cost = _cost(app, row["model"], [*map(row.get, PRICED_TOKENS)])
        row["cost_usd"] = cost and round(cost, 9)


class Download(NamedTuple):
    """A file that is made while it is sent; ``pieces`` are its bytes."""

    name: str
    content_type: str
    pieces: Iterator[bytes]


EXPORT_COLUMNS = (
    "id timestamp ts_epoch account source auth_index model input_tokens output_tokens reasoning_tokens cached_tokens "
    "total_tokens latency_ms ttft_ms failed status_code error request_id cache_write_tokens provider endpoint "
    "auth_type alias reasoning_effort service_tier api_key local_time cost_usd account_name key_name"
).split()
_FORMULA_SIGNS = tuple("=+-@\t\r\n＝＋－＠")
EXPORT_FORMATS = {"csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson"}


def api_export(app: App, query: Query) -> Download:
    """Answer ``/api/export``: every request of a window, oldest first, as CSV or as JSON objects, one a line."""
    told = next((name for name in ("limit", "before", "sort", "order") if name in query), None)
    if told:
        raise ApiError(400, "bad_export", f"an export has every request of its window, oldest first; leave out {told}")
    kind, window = query.choice("format", list(EXPORT_FORMATS)) or "csv", _window(app, query, app.clock())[1]
    zone, filters = query.zone(), query.filters(app.names)
    day = datetime.fromtimestamp(app.clock(), zone).strftime("%Y-%m-%d")
    return Download(f"requests-{day}.{kind}", EXPORT_FORMATS[kind], _export_pieces(app, kind, filters, window, zone))


def _export_pieces(app: App, kind: str, filters: Filters, window: Window, zone: Any) -> Iterator[bytes]:
    """Yield JSON lines, or CSV (RFC 4180) in which a text that a spreadsheet would run gets an apostrophe.

    Each piece is of a transaction of its own, so that a slow reader holds up nothing.
    """
    last: Any = None
    table: list[Any] = [EXPORT_COLUMNS]
    while True:
        rows, stream = app.store.requests(500, window, filters, last, Order("time", "asc")), io.StringIO()
        _price_rows(app, rows)
        for row in rows:
            row["local_time"] = datetime.fromtimestamp(row["ts_epoch"], zone).strftime("%Y-%m-%d %H:%M:%S")
        lines = [[row[name] for name in EXPORT_COLUMNS] for row in rows]
        if kind == "jsonl":
            stream.writelines(json.dumps(dict(zip(EXPORT_COLUMNS, line)), ensure_ascii=False) + "\n" for line in lines)
        else:
            csv.writer(stream).writerows(
                [f"'{cell}" if isinstance(cell, str) and cell[:1] in _FORMULA_SIGNS else cell for cell in line]
                for line in [*table, *lines]
            )
        yield stream.getvalue().encode("utf-8", "replace")
        if len(rows) < 500:
            return
        last, table = (rows[-1]["ts_epoch"], rows[-1]["id"]), []


def api_quota(app: App, query: Query) -> dict[str, Any]:
    """Answer ``/api/quota`` from the database: each account's last good reading, its state and its age."""
    now = app.clock()
    quotas = quotas_at(app.store, now, app.names.by_target)
    add_worths(app.store, quotas, now)
    return {"quotas": quotas, "pool": pool_of(quotas, now), **app.refresher.state()}


def api_health(app: App, query: Query) -> dict[str, Any]:
    """Answer ``/api/health``: whether recording works, and why not."""
    collector, now = app.collector_status(), app.clock()
    alerts = alert_state(app.store, now)
    return {
        "ok": collector["state"] in ("recording", "waiting"),
        "version": __version__,
        "uptime_seconds": round(time.monotonic() - app.started_at, 1),
        "demo": app.demo,
        "now": now,
        "rival": collector.pop("rival", None),
        "collector": collector,
        "alerts": {"sent_today": alerts["sent"], "last_failed_at": alerts["last_failed_at"]},
        "database": {
            "events": app.store.event_count,
            "bytes": app.store.byte_count,
            "retention_days": app.config.retention_days or None,
        },
        "account_files": {"found": app.refresher.known_files},
    }


# What /metrics tells of one account and model, by the label's value: a sum without another, so that they add up.
_COUNTED = {
    ("requests_total", "Requests by account, model and outcome.", "status"): {
        "ok": ("requests", "failed"),
        "failed": ("failed", "rate_limited"),
        "rate_limited": ("rate_limited",),
    },
    ("tokens_total", "Tokens; input without cached ones, output without reasoning.", "kind"): {
        "input": ("input_tokens", "cached_tokens"),
        "cached": ("cached_tokens",),
        "output": ("output_tokens", "reasoning_tokens"),
        "reasoning": ("reasoning_tokens",),
    },
}
_MOST_PAIRS, _MOST_WINDOWS = 200, 290  # of 7 and of 2 series each: below 2,000 in all


def api_metrics(app: App, query: Query) -> Answer:
    """Answer ``/metrics`` in the text format 0.0.4 of Prometheus; the counters never fall."""
    collector, counts = app.collector_status(), app.store.counts
    by_pair = [(labels, dict(zip(SUM_NAMES, sums))) for labels, sums in app.store.series(_MOST_PAIRS).items()]
    text = ""
    for (metric, about, kind), parts in _COUNTED.items():
        samples = {
            (("account", account), ("model", model), (kind, part)): max(0, sums[name] - sum(map(sums.get, without)))
            for (account, model), sums in by_pair
            for part, (name, *without) in parts.items()
        }
        text += _metric(metric, "counter", about, samples)
    left, resets = {}, {}
    for row in quotas_at(app.store, app.clock()):
        account = row["account"] or f"{row['email']} {row['account_id_tag']}"
        for window in row["windows"]:
            labels = (("account", account), ("window", window["label"]))  # of two that share them, its own comes first
            if window["remaining_percent"] is not None and labels not in left and len(left) < _MOST_WINDOWS:
                left[labels], resets[labels] = window["remaining_percent"], _epoch(window["reset_at"])
    is_up, last_at = int(collector.get("state") in ("recording", "waiting")), collector.get("last_event")
    text += _metric("quota_remaining_percent", "gauge", "What is left of a quota window.", left)
    text += _metric("quota_reset_timestamp_seconds", "gauge", "When a quota window resets.", resets)
    text += _metric("collector_up", "gauge", "Whether requests are being recorded.", {(): is_up})
    text += _metric("collector_last_event_timestamp_seconds", "gauge", "The newest request's time.", {(): last_at})
    text += _metric("events_rejected_total", "counter", "Records that could not be read.", {(): counts["rejected"]})
    return Answer(text.encode("utf-8", "replace"), content_type="text/plain; version=0.0.4; charset=utf-8")


def _metric(name: str, kind: str, about: str, samples: Mapping[Any, Any]) -> str:
    lines = [f"# HELP cliproxy_{name} {about}", f"# TYPE cliproxy_{name} {kind}"]
    for labels, value in samples.items():
        told = ",".join(f"{label}={json.dumps(_printable(text), ensure_ascii=False)}" for label, text in labels)
        if value is not None:
            lines.append(f"cliproxy_{name}{f'{{{told}}}' if told else ''} {value!r}")
    return "\n".join(lines) + "\n"


def _data_version(app: App) -> tuple[Any, ...]:
    return app.store.changes, app.names.version, int(app.clock() // 60)


# Each with what its answer depends on besides the query; None is never a 304.
ROUTES: dict[str, tuple[Callable[[App, Query], Any], Any]] = {
    "/api/summary": (api_summary, _data_version),
    "/api/quota": (api_quota, lambda app: (*_data_version(app), app.refresher.state())),
    "/api/requests": (api_requests, _data_version),
    "/api/export": (api_export, None),
    "/api/health": (api_health, None),
    "/metrics": (api_metrics, None),
}


class Answer(NamedTuple):
    """A body as it is sent; ``gzipped`` where it was compressed beforehand."""

    body: bytes
    etag: str = ""
    content_type: str = "application/json; charset=utf-8"
    policy: str = "default-src 'none'; frame-ancestors 'none'"
    gzipped: bytes | None = None


def load_page(path: Path) -> Answer:
    """Return the page, with a policy that lets only its own script and style run. Raises DashboardError."""
    try:
        body = path.read_bytes()
    except OSError as error:
        raise DashboardError(f"{path} is missing: {os_reason(error)}; copy it beside the script") from error

    def hashes(element: bytes) -> str:
        digests = (hashlib.sha256(part).digest() for part in re.findall(element, body, re.S))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    scripts = hashes(rb"<script(?![^>]*(?:application/json|text/plain))[^>]*>(.*?)</script>")
    styles = hashes(rb"<style[^>]*>(.*?)</style>")
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
    return Answer(body, etag, "text/html; charset=utf-8", policy, gzip.compress(body, 9))


def is_loopback(host: str) -> bool:
    """Return whether this name or address is one of this machine alone."""
    return host in ("localhost", "::1") or host.endswith(".localhost") or bool(re.match(r"127(\.\d{1,3}){3}\Z", host))


class Server(ThreadingMixIn, TCPServer):
    """The HTTP server, a thread for each connection. No HTTPServer, which looks its own name up in the DNS.

    A thread that serves a client reads and writes without a time limit of its own, since a socket's timeout never
    fires at a byte a second. Here it is ended from outside: its next read finds the end of the stream.
    """

    allow_reuse_address = daemon_threads = True
    request_queue_size = 128
    most, most_bytes = 128, 8 << 20  # connections, and what all their clients have to take
    app: App
    page: Answer

    def __init__(self, host: str, port: int, head_s: float):
        self.head_s, self._lock = head_s, threading.RLock()
        # Of each connection until when its client is waited for, and for how many bytes; the longest waited for first.
        self._open: dict[Any, tuple[float, int]] = {}
        self.turns = threading.Lock(), threading.Lock()  # to make an answer, and one that searches
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.server_port = self.server_address[1]

    def serve(self, app: App, page: Answer, poll_interval_s: float = 0.5) -> None:
        """Answer requests until shutdown(), which is noticed within the poll interval, as are late clients."""
        self.app, self.page = app, page
        self.serve_forever(poll_interval_s)

    def service_actions(self) -> None:
        """End the connections of late clients; called at least once a poll interval."""
        with self._lock:
            now = time.monotonic()
            for connection in [one for one, (until, _) in self._open.items() if until <= now]:
                self._end(connection)

    def get_request(self) -> Any:
        """Accept a connection; where there is no descriptor left, one that waits is ended and a moment passes."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno != errno.ECONNABORTED:
                self._end_longest()
                time.sleep(0.03)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether a new connection has a place: beyond the limit the longest idle one goes."""
        with self._lock:
            has_place = len(self._open) < self.most or self._end_longest()
            if has_place:
                self._open[request] = time.monotonic() + Handler.idle_s, 0
            return has_place

    def wait(self, connection: Any, seconds: float, size: int = 0) -> bool:
        """Record how many seconds a client has, to take how many bytes; return whether it is open."""
        with self._lock:
            is_open = self._open.pop(connection, None) is not None
            while size and size + sum(left for _, left in self._open.values()) > self.most_bytes:
                if not self._end_longest(1):
                    break
            if is_open:
                self._open[connection] = time.monotonic() + seconds, size
            return is_open

    def _end_longest(self, least: int = 0) -> bool:
        """End the longest idle connection, of those with so many bytes to take; return whether there was one."""
        with self._lock:
            idle = (one for one, (until, left) in self._open.items() if until < math.inf and left >= least)
            longest = next(idle, None)
            if longest is not None:
                self._end(longest)
            return longest is not None

    def _end(self, connection: Any) -> None:
        del self._open[connection]
        with suppress(OSError):  # the client was quicker
            connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: what arrives here is a client that went away."""


class Handler(BaseHTTPRequestHandler):
    """Answer the requests of one connection; the only place that knows HTTP."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    largest_head = 16 * 1024
    idle_s, turn_s, send_s, drain_s = 75.0, 60.0, 20.0, 2.0
    server: Server
    common_headers = {
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    parser_faults = {
        400: ("bad_request", "this is not an HTTP request"),
        431: ("head_too_large", f"the request's head is over {largest_head} bytes or 100 lines"),
        505: ("bad_version", "speak HTTP/1.0 or HTTP/1.1"),
    }

    def handle_one_request(self) -> None:
        """Answer the next request, or find that the client has left or was ended."""
        self.close_connection, self.command, self.headers = True, None, HTTPMessage()
        self.server.wait(self.connection, self.idle_s)
        if not self.rfile.peek(1):
            return
        self.server.wait(self.connection, self.server.head_s)
        head = line = self.rfile.readline(self.largest_head)
        while line.endswith(b"\n") and line not in (b"\r\n", b"\n"):
            line = self.rfile.readline(self.largest_head - len(head))
            head += line
        if line.endswith(b"\n"):  # to the standard parser, a head that was cut short would be a whole one
            self._parse(head)
        elif len(head) == self.largest_head:
            self.send_error(431)

    def _parse(self, head: bytes) -> None:
        stream, self.rfile = self.rfile, io.BytesIO(head)
        self.raw_requestline = self.rfile.readline()
        understood = self.parse_request()
        self.rfile = stream
        if understood and self.request_version == "HTTP/0.9":
            self.send_error(400)
        elif understood:
            self.server.wait(self.connection, math.inf)
            self._answer()

    def _answer(self) -> None:
        # A body is of no use here.
        may_have_body = self.command not in ("GET", "HEAD") or "Transfer-Encoding" in self.headers
        may_have_body = may_have_body or set(self.headers.get_all("Content-Length", ["0"])) != {"0"}
        self.close_connection = self.close_connection or may_have_body
        try:
            self._check_access()
            self._route()
        except DashboardError as error:
            self._send_fault(error)
        except Exception as error:  # the HTTP boundary: the client gets words, the log the kind of fault
            self.server.app.log.event("http", fault=where_raised(error))
            self._send_fault(ApiError(500, "internal_error", "the dashboard has a fault; its log says which"))
        if may_have_body:
            self._drain()

    def _check_access(self) -> None:
        config = self.server.app.config
        host = re.sub(r":\d+\Z", "", self.headers.get("Host", "localhost").strip().lower())  # any port is fine (ssh -L)
        if is_loopback(config.dashboard_host) and not is_loopback(host.strip("[]").rstrip(".")):
            raise ApiError(403, "foreign_host", "this dashboard answers to localhost only")
        if config.dashboard_password and not self._knows(config.dashboard_password):
            wanted = {"WWW-Authenticate": 'Basic realm="CLIProxyAPI Usage Dashboard", charset="UTF-8"'}
            raise ApiError(401, "password_needed", "give the dashboard_password; any user name will do", wanted)
        if self.command not in ("GET", "HEAD"):
            raise ApiError(405, "method_not_allowed", "use GET or HEAD", {"Allow": "GET, HEAD"})

    def _knows(self, password: str) -> bool:
        """Compare in constant time the password of a Basic header; the user name is anything."""
        kind, _, coded = self.headers.get("Authorization", "").partition(" ")
        sent = b""
        with suppress(ValueError):
            sent = base64.b64decode(coded.strip(), validate=True) if kind.lower() == "basic" else b""
        return hmac.compare_digest(sent.partition(b":")[2], password.encode("utf-8"))

    def _route(self) -> None:
        app, page = self.server.app, self.server.page
        try:
            parts = urlsplit(self.path)
            query = Query(parse_qsl(parts.query, max_num_fields=50, errors="replace"))
        except ValueError as error:
            raise ApiError(400, "bad_request", "this address has too many parameters or is none") from error
        if parts.path == "/":
            self._send_unless_known(page.etag, lambda: page, nullcontext())
            return
        if parts.path not in ROUTES:
            raise ApiError(404, "not_found", f"there is no such route; there are / {' '.join(ROUTES)}")
        answer, version = ROUTES[parts.path]
        app.flush()
        app.names.look()
        forced = query.pop("force", None) == "1" and self.command == "GET" and answer is api_quota
        if forced:
            self._refuse_other_sites()
            app.refresher.start().join(25.0)  # a browser's patience; the page asks on where a round takes longer
        if forced or version is None:
            content = answer(app, query)
            if isinstance(content, Download):
                self._send_download(content)
                return
            self._send_head(200, *self._packed(content))
            return
        state = json.dumps([app.run_id, parts.path, sorted(query.items()), version(app)])
        etag = f'"{hashlib.sha256(state.encode()).hexdigest()[:20]}"'
        self._send_unless_known(etag, lambda: answer(app, query), self.server.turns["q" in query])

    def _refuse_other_sites(self) -> None:
        """Keep other sites from pressing the button; plain HTTP pages send no Sec-Fetch-Site."""
        own_hosts = (self.headers.get("Host"), self.headers.get("X-Forwarded-Host"))
        sent = list(filter(None, map(self.headers.get, ("Origin", "Referer"))))
        foreign = any(re.sub(r"\A\w+://|/.*", "", url) not in own_hosts for url in sent)
        if not sent and self.headers.get("User-Agent", "").startswith("Mozilla/"):
            # An image on another site's page can be asked for without a referrer, but with no header of ours.
            foreign = self.headers.get("X-Requested-With") != "usage-dashboard"
        if self.headers.get("Sec-Fetch-Site", "cross-site" if foreign else "none") not in ("same-origin", "none"):
            raise ApiError(403, "foreign_site", "a refresh can be asked for by the dashboard's own page only")

    def _send_unless_known(self, etag: str, make: Callable[[], Any], turn: ContextManager[Any]) -> None:
        known = re.findall(r'"[^"]*"|\*', self.headers.get("If-None-Match", ""))
        if etag in known or "*" in known:
            self._send_head(304, {"ETag": etag}, b"")
            return
        self.server.wait(self.connection, self.turn_s)
        with turn:  # one at a time: an answer takes up to 20 MB while it is made
            if not self.server.wait(self.connection, math.inf):
                self.close_connection = True
                return
            headers, body = self._packed(make())
        self._send_head(200, {**headers, "ETag": etag}, body)

    def _packed(self, answer: Any) -> tuple[dict[str, str], bytes]:
        """Return the headers that tell of an Answer, or of what becomes JSON, and its body as this client takes it."""
        if not isinstance(answer, Answer):
            text = json.dumps(answer, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            answer = Answer(text.encode("utf-8", "replace"))
        headers, body = {"Content-Type": answer.content_type, "Content-Security-Policy": answer.policy}, answer.body
        if len(body) > 1000:
            headers["Vary"] = "Accept-Encoding"
            if re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", self.headers.get("Accept-Encoding", ""), re.I):
                headers["Content-Encoding"] = "gzip"
                body = answer.gzipped or gzip.compress(body, 1)
        headers["Content-Length"] = str(len(body))
        return headers, b"" if self.command == "HEAD" else body

    def _send_fault(self, error: DashboardError) -> None:
        message = str(error)
        if isinstance(error, StoreError):  # whose sentence names a path, and others than the owner may read this
            message = "the database cannot be read just now; the dashboard's log and its check command say why"
        headers, body = self._packed({"error": message, "code": error.code})
        self._send_head(error.http_status, {**headers, **getattr(error, "headers", {})}, body)

    def _send_head(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        lines = [f"HTTP/1.1 {status} {self.responses[status][0]}", f"Date: {self.date_time_string()}"]
        lines += [f"{name}: {value}" for name, value in {**self.common_headers, **headers}.items()]
        lines.append("Connection: close" if self.close_connection else "Connection: keep-alive")
        self.server.wait(self.connection, self.send_s, len(body))
        try:
            self.connection.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")
            self.connection.sendall(body)
        except OSError:
            self.close_connection = True

    def _send_download(self, content: Download) -> None:
        """Send what is made on the way, in chunks; one that breaks off ends the connection, so that it shows."""
        first = next(content.pieces)  # what cannot even begin is answered with its fault
        is_chunked = self.request_version != "HTTP/1.0"
        self.close_connection = self.close_connection or not is_chunked
        headers = {"Content-Disposition": f'attachment; filename="{content.name}"'}
        headers.update({"Transfer-Encoding": "chunked"} if is_chunked else {})
        self._send_head(200, {"Content-Type": content.content_type, **headers}, b"")
        if self.command == "HEAD":
            return
        try:
            for piece in itertools.chain([first], content.pieces):
                if piece:
                    self.server.wait(self.connection, self.turn_s)
                    self.connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
            self.connection.sendall(b"0\r\n\r\n" if is_chunked else b"")
        except (OSError, StoreError):
            self.close_connection = True

    def _drain(self) -> None:
        """Take in the rest of a refused request: closing on unread bytes would reset the answer away."""
        self.server.wait(self.connection, self.drain_s)
        with suppress(OSError):  # the client was quicker
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(65536):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the standard parser refuses, in the API's own form."""
        self.close_connection = True
        self._send_fault(ApiError(int(code), *self.parser_faults.get(int(code), self.parser_faults[400])))
        self._drain()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep no access log: it would hold the clients' addresses."""


def make_server(host: str, port: int, head_s: float = 10.0) -> Server:
    """Return a server that is bound to the port and listens. Raises DashboardError that names the port."""
    try:
        return Server(host, port, head_s)
    except OverflowError as error:  # of the demo, which reads no config
        raise DashboardError(f"port {port} is no port; set dashboard_port from 1 to 65535") from error
    except (OSError, TypeError, UnicodeError) as error:
        message = f'{host} cannot be bound: {os_reason(error)}; set "dashboard_host" to an address of this machine'
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            message = (
                f"port {port} is in use, perhaps by a dashboard that runs already (its check command tells); stop "
                f'that one, or set another port, such as "dashboard_port": {port + 1 if port < 65535 else 8321}'
            )
        elif isinstance(error, PermissionError):
            message = f'port {port} is reserved for root; set "dashboard_port" to one above 1023'
        raise DashboardError(message) from error


# -------------------- demo: made-up traffic for a look at the page


# Share of all requests and of its own that fail, percent used of its longest window, and what is told beside windows.
_DemoSender = namedtuple("_DemoSender", "source provider plan share failing models used told", defaults=(0, {}))


class DemoWorld:
    """A made-up week of traffic and quotas of nine accounts, in a folder of its own; touches no network."""

    _CODEX = ("gpt-5.4", "gpt-5.4", "gpt-5.3-codex", "gpt-5.5", "gpt-5.4-mini")
    _METER = {"primary_window": {"used_percent": 31, "limit_window_seconds": _WEEK_S, "reset_after_seconds": 3e5}}
    _SPARK = {"additional_rate_limits": [{"limit_name": "GPT-5.3-Codex-Spark", "rate_limit": _METER}]}
    _BUDGET = {"spend_control": {"individual_limit": {"used": 3870, "limit": 15000, "reset_after_seconds": 1.4e6}}}
    _SENDERS = (
        _DemoSender("an.nguyen@example.com", "codex", "plus", 0.30, 0.012, _CODEX, 29),
        _DemoSender("minh.tran@example.com", "codex", "plus", 0.22, 0.012, _CODEX, 76),
        _DemoSender("linh.pham@example.com", "codex", "pro", 0.17, 0.012, (*_CODEX, "gpt-5.3-codex-spark"), 12, _SPARK),
        _DemoSender("team@example.org", "codex", "team", 0.11, 0.012, _CODEX, 17, _BUDGET),
        _DemoSender("dev.one@example.net", "codex", "plus", 0.08, 0.07, _CODEX, 100),
        _DemoSender("huy.le@example.com", "codex", "free", 0.03, 0.012, ("gpt-5.4-mini",), 23),
        _DemoSender("dev.two@example.net", "codex", "plus", 0.06, 0.012, ("gpt-5.4", "gpt-5.4-mini"), 94),
        _DemoSender("old.mail@example.com", "codex", "plus", 0.03, 0.07, ("gpt-5.3-codex",), 34),
        _DemoSender("mai.vo@example.com", "claude", "", 0.09, 0.012, ("claude-sonnet-4-6", "claude-haiku-4-5"), 46),
        _DemoSender("AIza-made-up-key-of-the-demo-0001", "gemini", "", 0.02, 0.012, ("gemini-3.1-pro-preview",)),
    )
    _ENDPOINTS = {"codex": "/v1/responses", "claude": "/v1/messages", "gemini": "/v1beta/models/*action"}
    _KEYS = tuple(f"sk-made-up-for-the-demo-{end}" for end in (2901, 5718, 3346, 8127, 6054, 4480))
    _FAILURES = (
        (429, '{"error": {"type": "usage_limit_reached", "message": "The usage limit has been reached"}}'),
        (401, '{"error": {"code": "token_expired", "message": "Provided authentication token is expired."}}'),
        (503, ""),
        (499, ""),
    )
    _PER_HOUR = (8, 5, 4, 4, 5, 11, 22, 43, 87, 119, 130, 114, 70, 98, 125, 130, 119, 92, 60, 49, 54, 49, 33, 16)

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time, seed: int = 8320):
        self._rng, self._clock, self._born_at = random.Random(seed), clock, clock()
        self._outage = Window(self._born_at - 152 * 3600, self._born_at - 151.2 * 3600)
        self._spent: list[list[tuple[float, int]]] = [[] for _ in self._SENDERS]
        self.names = {tag_of_mask(mask_key(key)): name for key, name in zip(self._KEYS, ("An's laptop", "CI"))}
        self.store, self.auth_dir = Store(folder / "usage.db"), folder / "accounts"
        self.auth_dir.mkdir()
        for number, sender in enumerate(self._SENDERS[:-1]):
            login = {"email": sender.source, "account_id": f"demo-{number}", "access_token": str(number)}
            (self.auth_dir / f"{number}.json").write_text(json.dumps({"type": sender.provider, **login}))
        self._files = AccountFiles([self.auth_dir])
        self._files.look()
        self.store.begin_outage(self._outage.start, "unreachable")
        self.store.end_outage(self._outage.end)
        payloads = list(map(self._payload, self._arrive(self._born_at - 7 * 86400)))
        for sequence, first in enumerate(range(0, len(payloads), 2000), 1):
            parsed = parse_events(payloads[first : first + 2000], self._files.contexts)
            self.store.store_batch(parsed, sequence, self._born_at)
        self._write_readings()

    def _write_readings(self) -> None:
        """Save the last readings of windows that have ended, and of the last hour, which forecasts need."""
        for file in self._files.by_tag.values():
            number, last_at = int(file.access_token), self._born_at - 3 * 3600 * file.email.startswith("old")
            began_at = self._window(number, _FIVE_HOURS_S, last_at)[0]
            ends = (began_at - 60 - n * _FIVE_HOURS_S for n in range(30, -1, -1))
            used = [at for at in ends if self._reply(number, at)["rate_limit"]["primary_window"]["used_percent"] > 11]
            for at in (*used[-5:], last_at - 3000, last_at - 1800, last_at - 600):
                reading, account = parse_quota(self._reply(number, at), at), (file.email, file.tag)
                self.store.save_reading(reading_row(reading, account, "", at, provider=file.provider))

    def _arrive(self, at: float) -> Iterator[float]:
        """Yield the times of requests from ``at`` until now: busy on workdays, none during the outage."""
        while at < self._born_at:
            if not self._outage.start <= at < self._outage.end:
                yield at
            local = time.localtime(at)
            per_hour = self._PER_HOUR[local.tm_hour] * (0.35 if local.tm_wday >= 5 else 1.0)
            at += self._rng.expovariate(per_hour / 3600)

    def _payload(self, at: float) -> bytes:
        """Return a request as the proxy hands it over."""
        rng = self._rng
        number, sender = rng.choices([*enumerate(self._SENDERS)], [sender.share for sender in self._SENDERS])[0]
        model, failed = rng.choice(sender.models), rng.random() < sender.failing
        status, body = rng.choice(self._FAILURES) if failed else (200, "")
        into, out = int(rng.lognormvariate(11.0, 0.9)), int(rng.lognormvariate(6.4, 0.8))
        usual_ms = (450, 5) if model.endswith(("mini", "spark", "haiku-4-5")) else (1500, 16)
        first_ms, token_ms = (ms * rng.lognormvariate(0, 0.3) for ms in usual_ms)
        request = {
            "timestamp": utc_text(at),
            "source": sender.source,
            "auth_index": hashlib.sha256(sender.source.encode()).hexdigest()[:16],
            "provider": sender.provider,
            "model": model,
            "endpoint": f"POST {self._ENDPOINTS[sender.provider]}",
            "auth_type": "apikey" if sender.provider == "gemini" else "oauth",
            "api_key": rng.choices(self._KEYS, (30, 23, 19, 13, 9, 6))[0],
            "request_id": f"{rng.getrandbits(32):08x}",
            "reasoning_effort": rng.choice(("low", "medium", "medium", "high", "xhigh")),
            "failed": failed,
            "fail": {"status_code": status, "body": body},
            "latency_ms": rng.randrange(200, 1500) if failed else int(first_ms + out * token_ms),
            "response_headers": {"X-Codex-Plan-Type": [sender.plan]},
        }
        if not failed:
            cached = int(into * rng.triangular(0.3, 0.99, 0.93)) if rng.random() < 0.9 else 0
            self._spent[number].append((at, into + out))
            request["ttft_ms"] = int(first_ms)
            request["tokens"] = {
                "input_tokens": into - cached if sender.provider == "claude" else into,
                "output_tokens": out,
                "reasoning_tokens": int(out * rng.triangular(0.1, 0.85, 0.5)),
                "cached_tokens": cached,
            }
        return json.dumps(request).encode()

    def _window(self, number: int, seconds: int, at: float) -> tuple[float, int]:
        """Return when an account's window of that length began, and the tokens since then."""
        began_at = at - (at - self._born_at - (3 * number % 8 + 1) / 9 * seconds) % seconds
        return began_at, sum(tokens for then, tokens in self._spent[number] if began_at <= then <= at)

    def _reply(self, number: int, at: float) -> dict[str, Any]:
        """Return what is told of an account's quota at a time; five hours are worth less from day to day."""
        sender, limits = self._SENDERS[number], {}
        lengths = (30 * 86400,) if sender.plan == "free" else (_FIVE_HOURS_S, _WEEK_S)
        most = self._window(number, lengths[-1], self._born_at)[1] / sender.used
        for slot, seconds in zip(("primary", "secondary"), lengths):
            began_at, tokens = self._window(number, seconds, at)
            per_percent = most / 12 * (1 + 0.08 * (self._born_at - at) / 86400) if seconds == _FIVE_HOURS_S else most
            limits[f"{slot}_window"] = {
                "used_percent": min(100, int(tokens / per_percent + 0.5)),
                "limit_window_seconds": seconds,
                "reset_at": int(began_at + seconds),
            }
        return {"plan_type": sender.plan, "rate_limit": limits, **sender.told}

    def fetch(self, file: AccountFile) -> dict[str, Any]:
        """Answer in ChatGPT's place: made-up windows, one account limited, one to be signed in again."""
        if file.email.startswith("old"):
            raise QuotaFault("relogin")
        return self._reply(int(file.access_token), self._clock())

    def status(self) -> dict[str, Any]:
        """Return a collector's status as it would be with a proxy."""
        since, message = self._born_at - 7 * 86400, "These data are made up."
        status = CollectorStatus("recording", since, message, "demo", last_event=self.store.span()[1], publishing=True)
        return status.as_json(self.store.counts)


# -------------------- check: everything that can be wrong, each finding with its remedy


class Finding(NamedTuple):
    """What check found: ``level`` is ok, warning or fault, ``remedy`` the line to change."""

    level: str
    found: str
    remedy: str = ""


def check_everything(config: Config, config_path: Path) -> list[Finding]:
    """Return what one pass over files, database, accounts and queue finds. Nothing is popped."""
    about_database, quotas = _check_database(config.database_path)
    return [
        *_check_modes(config, config_path),
        *about_database,
        *_check_accounts(config, quotas),
        *_check_dashboard(config, config_path),
        *_check_logins(config),
    ]


def _check_logins(config: Config) -> list[Finding]:
    """Tell how many logins without a success there were lately, while there are any."""
    path, used, wait_s = config.database_path, 0, 0.0
    with suppress(StoreError):  # told by the database's own line
        if path.exists() and not events_to_adopt(path):
            with closing(Store(path)) as store:
                logins = ((config.cliproxy_host, port, config.management_password) for port in _ports_of(config))
                used, wait_s, _ = max(map(RefusedLogins(store).used, logins))
    found = f"{used} of {RefusedLogins.MOST} logins within 30 minutes are used, without a success"
    when = f"the next goes out after {local_minute(time.time() + wait_s)}" if wait_s else "the next may go out now"
    return [Finding("warning", found, f"{when}; five lock this machine out for 30 minutes")] if used else []


def _ports_of(config: Config) -> list[int]:
    return [config.cliproxy_port, *([PROXY_PORT] if config.has_default_queue else [])]


def _check_modes(config: Config, config_path: Path) -> list[Finding]:
    """Look for files with secrets or usage in them that others on the machine can read."""
    import shlex

    folder, files, _ = find_account_files(config.auth_dirs())
    findings = []
    for path in (config_path, config.database_path, *(folder / file.name for file in files)):
        if os.access(path, os.F_OK) and path.stat().st_mode & 0o077:
            remedy = f"chmod 600 {shlex.quote(str(path))}"
            findings.append(Finding("warning", f"{path} can be read by other users", remedy))
    return findings or [Finding("ok", "file modes")]


def _check_database(path: Path) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Check the file's sums and losses, and also return its accounts' quotas; an earlier version's stays as it is."""
    if not os.access(str(path.parent), os.W_OK):
        remedy = f'chown it to this user, or set "database" ({path})'
        return [Finding("fault", f"{path.parent} cannot be written", remedy)], []
    if not path.exists():
        return [Finding("ok", "database: none yet, it is made at the first start")], []
    try:
        count = events_to_adopt(path)
        if count:
            return [Finding("ok", f"database: {count:,} events of an earlier version will be taken in")], []
        with closing(Store(path)) as store:
            remedy = "move the file away; a new one is made"
            faults = [Finding("fault", f"{path}: {fault}", remedy) for fault in store.find_faults()]
            well = Finding("ok", f"database: {store.event_count} events, roll-ups agree with them")
            return [*(faults or [well]), *_check_losses(store)], quotas_at(store, time.time())
    except StoreError as error:
        return [Finding("fault", str(error), "see the sentence above")], []


def _check_losses(store: Store) -> list[Finding]:
    """Name what cost records in the last 24 hours: outages longer than the queue remembers, and a file that went."""
    now, changed_at = time.time(), store.get_meta("file_changed_at") or 0
    losses = [outage for outage in store.outages(Window(now - 86400, now), now) if outage["lost"]]
    findings = []
    if now - changed_at < 86400:
        found = f"{store.path.name} was deleted or replaced under the running dashboard, {local_minute(changed_at)}"
        findings.append(Finding("warning", found, "keep other programs away from it; what it held may be in a backup"))
    for outage in losses[-5:]:
        remedy = f"{RETENTION_LINE} lets it remember for an hour"
        if outage["reason"] == "proxy_restarted":
            remedy = 'what it still held is gone with each restart; with "collect_mode": "subscribe" that is less'
        elif outage["to"] is None:
            remedy = STATE_REMEDIES.get(outage["reason"], remedy)
        findings.append(Finding("warning", f"requests were lost, {outage_text(outage)}", remedy))
    return findings or [Finding("ok", "no losses are known of in the last 24 hours")]


def outage_text(outage: Mapping[str, Any]) -> str:
    """Return an outage in words, in this machine's zone: ``2026-11-01 02:10 to 2026-11-01 03:40 (unreachable)``."""
    start, end = (at and local_minute(at) for at in (outage["from"], outage["to"]))
    return f"{start} to {end or 'now'} ({outage['reason'].replace('_', ' ')})"


def _check_accounts(config: Config, quotas: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Name the account files that cannot be used, by what they hold and by the state that was stored last."""
    folder, files, problems = find_account_files(config.auth_dirs())
    findings = [Finding("warning", problem, "sign in again in the proxy if it stays so") for problem in problems]
    if not files:
        remedy = 'set "auth_dir" to the proxy\'s auth-dir (version 8: oauth.auth-dir), and let this user read it'
        return [*findings, Finding("warning", f"no Codex account files in {folder}", remedy)]
    stored = {(row["email"], row["account_id_tag"]): row for row in quotas}
    for file in files:
        row = stored.get((file.email, file.tag), {})
        state = row.get("state") if file.access_token else "no_token"
        if state in ("relogin", "deactivated", "blocked", "region_blocked", "no_token") and not file.disabled:
            name = row.get("account") or (f"{file.email} ({file.plan})" if file.plan else file.email)
            findings.append(Finding("warning", f"{name}: {state.replace('_', ' ')}", QUOTA_MESSAGES[state]))
    return [*findings, Finding("ok", f"account files: {len(files)} in {folder}")]


def _where_it_runs(config: Config) -> Config:
    """Return the configuration with the port of the dashboard that has the database, as its flags may have set it."""
    return replace(config, dashboard_port=lock_holder(config.database_path).get("port", config.dashboard_port))


def _check_dashboard(config: Config, config_path: Path) -> list[Finding]:
    """Ask the running dashboard how its collector is; where none runs, log in once without popping."""
    config = _where_it_runs(config)
    try:
        health = ask_dashboard(config, "/api/health", 5.0)
    except DashboardError as error:
        wrong_password = error.code == "password_needed"
        remedy = "correct dashboard_password" if wrong_password else "its log says more; restart it if it stays so"
        return [Finding("fault", f"port {config.dashboard_port} answers: {error}", remedy)]
    if health is not None and "collector" in health:
        running = Finding("ok", f"dashboard {health.get('version')} runs on port {config.dashboard_port}")
        return [running, *_findings_of_status({**health["collector"], "rival": health.get("rival")}, config)]
    try:
        make_server(config.dashboard_host, config.dashboard_port).server_close()
    except DashboardError as error:
        return [Finding("fault", str(error), f'"dashboard_port": {config.dashboard_port + 1}')]
    return [Finding("ok", f"port {config.dashboard_port} is free"), *_check_queue(config, config_path)]


def ask_dashboard(config: Config, path: str, timeout_s: float) -> dict[str, Any] | None:
    """Return what the dashboard that runs on this machine answers, None where none does. Raises DashboardError."""
    host, port = config.dashboard_host, config.dashboard_port
    own_address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    login = base64.b64encode(f":{config.dashboard_password}".encode()).decode()
    try:
        with closing(HTTPConnection(own_address, port, timeout=timeout_s)) as connection:
            connection.request("GET", path, headers={"Authorization": f"Basic {login}"})
            reply = connection.getresponse()
            content = json.loads(reply.read())
    except socket.timeout as error:
        raise DashboardError(f"the dashboard on port {port} does not answer in time") from error
    except (OSError, HTTPException, ValueError):
        return None
    if not isinstance(content, dict):
        return None  # another program
    if reply.status != 200:
        message = content.get("error", f"the dashboard answered with status {reply.status}")
        raise ApiError(reply.status, str(content.get("code")), str(message))
    return content


def _findings_of_status(status: Mapping[str, Any], config: Config) -> list[Finding]:
    """Judge the queue and, where it can be had, the proxy."""
    state = status["state"]
    version = f", proxy {status['proxy_version']}" if status.get("proxy_version") else ""
    found = f"queue at {status['endpoint']}: {'connected' if state == 'publishing_off' else state}{version}"
    if state in _CONNECTED:
        return [Finding("ok", found), *_check_proxy(status, config.poll_interval_seconds)]
    return [Finding("ok", found) if state == "starting" else Finding("fault", found, status["message"])]


def _check_proxy(status: Mapping[str, Any], poll_interval_s: float) -> Iterator[Finding]:
    """Judge whether the proxy publishes, to whom, how long it remembers, and its clock; the unknown is left out."""
    retention_s, ahead_s = status["retention_seconds"], status["clock_ahead_seconds"]
    if status["publishing"]:
        yield Finding("ok", "the proxy publishes its usage")
    elif status["publishing"] is False:
        yield Finding("fault", "the proxy publishes no usage", STATE_REMEDIES["publishing_off"])
    if retention_s is not None and retention_s < 2 * poll_interval_s:
        found, _, remedy = retention_warning(retention_s, poll_interval_s).partition("; ")
        yield Finding("warning", found, remedy)
    elif retention_s is not None:
        yield Finding("ok", f"the proxy remembers for {retention_s:g} s and is asked every {poll_interval_s:g} s")
    if ahead_s is not None and abs(ahead_s) < 60:
        yield Finding("ok", "the proxy's clock and this machine's agree")
    elif ahead_s is not None:
        found = f"the proxy's clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's"
        yield Finding("warning", found, "let both machines set their clocks by NTP")
    rival = status["rival"]
    if rival is not None:
        counted = f"the proxy counted {rival['expected']} attempts since {local_minute(rival['since'])}"
        found = f"{counted} of which {rival['received']} came here: another program takes records, or they expired"
        yield Finding("warning", found, 'stop it, or set "collect_mode": "subscribe" if it subscribes')


def _check_queue(config: Config, config_path: Path) -> list[Finding]:
    """Log in as the collector would, remember a refusal as it would, and pop nothing."""
    if not config.management_password:
        return _check_without_key(config)
    try:
        # Made here if need be: a refused key must be remembered.
        store = Store(config.database_path, announce=Log(sys.stderr).line)
    except StoreError:
        return []  # the database's own line says why
    with closing(store):
        collector = Collector(config, store, Log(io.StringIO()), threading.Event(), config_path=config_path)
        return _findings_of_status(collector.probe(), config)


def _check_without_key(config: Config) -> list[Finding]:
    """Distinguish a proxy, which needs a key, from a Redis, which passes over an empty command."""
    for port in _ports_of(config):
        host, tls = config.cliproxy_host, config.cliproxy_tls
        fault = _empty_command(partial(connect_tcp, host, port, tls, timeout_s=2.0))
        if fault is None:
            fault = QueueFault("no management key is set, and the proxy needs one", "no_password")
        elif isinstance(fault.__cause__, socket.timeout):
            return [Finding("ok", f"{host}:{port} is a Redis server, used without a password")]
        elif isinstance(fault, NotResp) and ProxyApi(host, port, tls, "").has_example_keys():
            fault = QueueFault(f"{host}:{port} shows nothing but a warning page", "example_keys")
        if fault.state in ("no_password", "example_keys") or isinstance(fault, ConnectionClosed):
            break
    remedy = "see the sentence above" if isinstance(fault, Misconfigured) else STATE_REMEDIES[fault.state]
    return [Finding("fault", str(fault), remedy)]


# -------------------- cli: commands, signals, exit codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a fault, 2 a wrong command line or configuration."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may take ASCII only
    try:
        options = _parse_arguments(arguments)
        exit_code = options.run(options)
        if options.run in (run_start, run_demo):
            os._exit(exit_code)  # while the interpreter ends, a second signal could change the exit code
        return exit_code
    except DashboardError as error:
        print(f"usage_dashboard: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, BrokenPipeError):  # nobody reads on, as with "report | head -1"
        return 0
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # what is left is dropped: Python would end with exit code 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse_arguments(arguments: Sequence[str] | None) -> Any:
    import argparse

    parser = argparse.ArgumentParser(
        prog="usage_dashboard.py", description="Collect, keep and show the usage of a CLIProxyAPI account pool."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(run: Callable[[Any], int]) -> Any:
        name = run.__name__.replace("run_", "").replace("_", "-")
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        return command

    runs = (run_start, run_demo, run_report, run_quota, run_check, run_export, run_backup, run_alert_test)
    start, demo, report, quota, check, export, backup, alert_test = map(add, runs)
    for command in (start, report, quota, check, export, backup, alert_test):
        command.add_argument("--config", type=Path, metavar="PATH", help="the configuration file (config.json)")
        command.add_argument("--db", metavar="PATH", help="the database file (usage.db)")
    for command in (start, demo):
        command.add_argument("--host", metavar="H", help="the address to bind (0.0.0.0)")
        command.add_argument("--port", type=int, metavar="P", help="the port to bind (8320)")
        command.add_argument("--no-browser", action="store_true", help="do not open a browser")
    allowed = f"{', '.join(RANGE_NAMES)}; or one or two dates as 2026-11-01, the earlier first: whole local days"
    for command in (report, export):
        command.add_argument("range", nargs="*", metavar="RANGE", help=f"today unless told: {allowed}")
    export.add_argument("--format", choices=list(EXPORT_FORMATS), default="csv", help="csv, or one JSON object a line")
    for name in ("account", "model", "key", "status"):
        export.add_argument(f"--{name}", help=f"only the requests of this {name}")
    report.add_argument("--by", choices=("key", "model", "account", "failure"), help="print this breakdown alone")
    report.set_defaults(refuse=lambda fault: report.error(f"{fault}; the range can be {allowed}"))
    export.set_defaults(refuse=lambda fault: export.error(f"{fault}; the range can be {allowed}"))
    backup.add_argument("file", type=Path, metavar="FILE", help="the copy; it must not exist")
    quota.add_argument("--force", action="store_true", help="ask ChatGPT now, within the cool-down")
    for command in (report, quota):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def _load(options: Any) -> tuple[Config, list[str]]:
    flags = {f"dashboard_{name}": getattr(options, name, None) for name in ("host", "port")}
    flags["database"] = os.path.abspath(options.db) if options.db else None
    return load_config(options.config, flags=flags)


def run_start(options: Any) -> int:
    """Collect, and serve the page."""
    stop = _stop_on_signal()
    # What is loaded by now stays. Events make no cycles, so that looking for garbage can be rare.
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)
    config, warnings = _load(options)
    log = Log()
    for warning in warnings:
        log.line(f"warning: {warning}")
    page = load_page(BASE_DIR / "usage-dashboard.html")
    fault = lock_database(config.database_path)
    if fault:
        log.line(f"warning: {fault}")
    server = make_server(config.dashboard_host, config.dashboard_port)  # before the first event is popped
    name_holder(config.database_path, server.server_port)
    store = Store(config.database_path, announce=log.line)
    config_path = options.config or BASE_DIR / "config.json"
    collector = Collector(config, store, log, stop, lambda: _load(options)[0], config_path)
    refresher = QuotaRefresher(config, store, log, stop)
    app = App(config, store, refresher, collector.status, log, flush=collector.journal.flush_for_reader)
    app.names = Names(config.names, config_path, log)
    closes = 'set in config.json "dashboard_password": "…", or "dashboard_host": "127.0.0.1" for this machine alone.'
    _announce(log, f"CLIProxyAPI Usage Dashboard {__version__}: %s", config, server.server_port, closes, options)
    jobs = [collector.run, lambda: keep_house(store, refresher, config.retention_days, log, stop)]
    if config.alert_urls:
        alerter = Alerter(config, store, collector.status, log, stop)
        jobs.append(lambda: alerter.run(lambda: refresher.refreshing or refresher.state()["last_refresh"]))
    exit_code = _run_until_stopped(server, app, page, stop, *jobs, interrupt=collector.interrupt)
    log.line("stopped, since a part of it had ended by itself" if exit_code else "stopped")
    return exit_code


def run_demo(options: Any) -> int:
    """Show the page with made-up data; touches no network and no file of yours."""
    import tempfile

    flags = {"dashboard_host": options.host, "dashboard_port": options.port}
    config = replace(Config(), **{key: value for key, value in flags.items() if value is not None})
    page = load_page(BASE_DIR / "usage-dashboard.html")
    server = make_server(config.dashboard_host, config.dashboard_port)
    log, stop = Log(), _stop_on_signal()
    with tempfile.TemporaryDirectory(prefix="usage-dashboard-demo-") as folder:
        world = DemoWorld(Path(folder))
        config = replace(config, auth_dir=str(world.auth_dir), quota_refresh_seconds=30)
        refresher = QuotaRefresher(config, world.store, log, stop, fetch=world.fetch, gap_s=(0.0, 0.0))
        refresher.start().join()
        app = App(config, world.store, refresher, world.status, log, demo=True, names=Names(world.names))
        closes = "start it with --host 127.0.0.1."
        _announce(log, "Demo with made-up data: %s  (Ctrl+C ends it)", config, server.server_port, closes, options)
        return _run_until_stopped(server, app, page, stop)


def _stop_on_signal() -> threading.Event:
    """Return an event that SIGTERM, Ctrl+C and a closed terminal (SIGHUP) set from now on."""
    stop, numbers = threading.Event(), [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
        numbers.append(signal.SIGHUP)

    def end(*_: Any) -> None:
        for number in numbers:
            signal.signal(number, lambda *_: None)  # one is enough, and a hail of them would nest
        # Not in the handler: the signal may come while this very thread holds the event's lock.
        threading.Thread(target=stop.set, daemon=True).start()

    for number in numbers:
        signal.signal(number, end)
    return stop


def _announce(log: Log, text: str, config: Config, port: int, closes: str, options: Any) -> None:
    """Log where the page is and how to close it to others, and open it where there is a display to open it on."""
    host = config.dashboard_host
    named = "localhost" if host in ("0.0.0.0", "::", "127.0.0.1", "::1") else f"[{host}]" if ":" in host else host
    url = f"http://{named}:{port}"
    log.line(text % url)
    if not is_loopback(host) and not config.dashboard_password:
        log.line(f"Everyone who reaches this machine can open it. To close it, {closes}")
    has_display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if has_display and not options.no_browser:
        import webbrowser

        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def _run_until_stopped(
    server: Server, app: App, page: Answer, stop: threading.Event, *jobs: Callable[[], None], interrupt: Any = None
) -> int:
    """Run server and jobs until a signal, end within three seconds, and return 1 where one had ended by itself."""
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    working = [*threads, threading.Thread(target=server.serve, args=(app, page), daemon=True)]
    for thread in working:
        thread.start()
    # On some systems a wait without an end is deaf to signals.
    while not stop.wait(1.0) and all(thread.is_alive() for thread in working):
        pass
    exit_code = 0 if stop.is_set() else 1
    stop.set()
    patience_s = time.monotonic() + 0.8
    server.shutdown()
    server.server_close()
    for thread in threads:
        thread.join(max(0.0, patience_s - time.monotonic()))
    if interrupt and any(thread.is_alive() for thread in threads):
        interrupt()
        for thread in threads:
            thread.join(0.3)
    if not any(thread.is_alive() for thread in threads):
        app.store.close()
    return exit_code


@contextmanager
def _reading_app(config: Config, must_exist: bool = True) -> Iterator[App]:
    """Open the database as the routes need it, without a collector."""
    path, log = config.database_path, Log(sys.stderr)
    if must_exist and not path.exists():
        raise DashboardError(f"{path} does not exist yet; start the dashboard once, or name it with --db")
    _have_committed(config)
    with closing(Store(path, announce=log.line)) as store:
        refresher = QuotaRefresher(config, store, log, threading.Event())
        yield App(config, store, refresher, dict, log, names=Names(config.names))


def _have_committed(config: Config) -> None:
    """Let a running dashboard commit what it has popped."""
    with suppress(DashboardError):  # what is committed is readable all the same
        ask_dashboard(_where_it_runs(config), "/api/health", 2.0)


def run_export(options: Any) -> int:
    """Print every request of a range, oldest first."""
    with _reading_app(_load(options)[0]) as app:
        query = _report_query(options, app)
        asked = {name: getattr(options, name) for name in ("format", "account", "model", "key", "status")}
        query.update({name: value for name, value in asked.items() if value is not None})
        for piece in api_export(app, query).pieces:
            sys.stdout.buffer.write(piece)
    return 0


def run_backup(options: Any) -> int:
    """Copy the database to a new file, also while the dashboard runs."""
    config, target = _load(options)[0], options.file.absolute()
    _have_committed(config)
    requests, tokens = back_up(config.database_path, target)
    print(f"{target}: {requests:,} requests with {tokens:,} tokens, checked, {target.stat().st_size:,} bytes")
    return 0


def run_report(options: Any) -> int:
    """Print the usage of a range as a table."""
    with _reading_app(_load(options)[0]) as app:
        summary = api_summary(app, _report_query(options, app))
    if options.json:
        print(json.dumps(summary, ensure_ascii=False, indent=2))
        return 0
    start, end = map(local_minute, (summary["start"], summary["end"]))
    print(f"Usage, {' to '.join(options.range) or 'today'}: {start} to {end}\n")
    for by in [options.by] if options.by else ("model", "account"):
        print(_breakdown(summary, by) + "\n")
    losses = [outage_text(outage) for outage in summary["outages"] if outage["lost"]]
    if losses:
        print("Not in these numbers, requests were lost:", *losses, sep="\n  ")
    return 0


def _report_query(options: Any, app: App) -> Query:
    """Return what a report asks for: a range by its name, or the whole local days from one date to another."""
    words, days = options.range, []
    if len(words) < 2 and set(words) <= set(RANGE_NAMES):
        return Query(range="".join(words) or "today")
    last_year = datetime.fromtimestamp(max(app.clock(), (app.store.span() or [0.0])[-1])).year + 1
    for word in words:
        try:
            days.append(datetime.strptime(word, "%Y-%m-%d"))
        except ValueError:
            options.refuse(f"{word} is no day of the calendar")
        if not 2020 <= days[-1].year <= last_year:
            options.refuse(f"{word} is not from 2020 to {last_year}")
    if len(words) > 2 or days[-1] < days[0]:
        options.refuse(f"{words[2]} is a third date" if len(words) > 2 else f"{words[1]} is before {words[0]}")
    start, end = days[0].timestamp(), (days[-1] + timedelta(days=1)).timestamp()
    return Query(start=f"{start:.0f}", end=f"{end:.0f}", bucket="auto")


def _breakdown(summary: Mapping[str, Any], by: str) -> str:
    """Lay out one breakdown of a summary as a table."""
    rows = summary[f"{by}s"]
    if by == "failure":
        lines = [
            [row["error"] or "unknown", str(row["status_code"] or "—"), f"{row['requests']:,}"]
            + [local_minute(row["last_at"]), ", ".join(row["accounts"])]
            for row in rows
        ]
        return _table([by, "status", "requests", "last", "accounts"], lines)
    rows = [*rows, {by: "total", **summary["summary"]}]
    names = [row.get("name") or row[by] or ("unknown" if row.get("unknown") else "no key") for row in rows]
    lines = [[name, *(f"{row[column]:,}" for column in SUM_NAMES), _list_price(row)] for name, row in zip(names, rows)]
    return _table([by, *(column.replace("_tokens", "") for column in SUM_NAMES), "at list price"], lines)


def _list_price(row: Mapping[str, Any]) -> str:
    usd = row["cost_usd"]
    least = "at least " if row["unpriced_tokens"] else ""
    return "-" if usd is None else f"{least}${usd:,.{2 if usd >= 1 or not usd else 4}f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = [heads, ["-" * width for width in widths], *rows]
    cells = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def run_quota(options: Any) -> int:
    """Print what is left of each account's quota."""
    config, _ = _load(options)
    answer, refusal = None, None
    if options.force:
        try:
            answer = _refresh_at_dashboard(config) or _quota_of_database(config, refresh=True)
        except DashboardError as error:
            refusal = str(error)
    answer = answer or _quota_of_database(config)
    if options.json:
        print(json.dumps(answer, ensure_ascii=False, indent=2))
    elif answer["quotas"]:
        heads = ["account", "plan", "5h remaining", "resets", "7d remaining", "resets", "status", "read"]
        print(_table(heads, [_quota_line(row) for row in answer["quotas"]]))
    elif refusal is None:
        print("No account has been asked yet; see: usage_dashboard.py quota --force")
    if refusal is not None:
        raise DashboardError(refusal)
    return 0


def _refresh_at_dashboard(config: Config) -> dict[str, Any] | None:
    """Have the running dashboard refresh all accounts and wait for the end of the round; None where none runs."""
    config = _where_it_runs(config)
    answer = ask_dashboard(config, "/api/quota?force=1", 40.0)
    while answer is not None and answer["refreshing"]:
        time.sleep(1.0)
        answer = ask_dashboard(config, "/api/quota", 10.0)
    return answer


def _quota_of_database(config: Config, refresh: bool = False) -> dict[str, Any]:
    """Return the quota table from the database, after a round of its own with ``refresh``. Raises ApiError."""
    with _reading_app(config, must_exist=not refresh) as app:
        if refresh:
            app.refresher.start().join()
        return api_quota(app, Query())


def _quota_line(row: Mapping[str, Any]) -> list[str]:
    cells = [row.get("name") or row["account"] or row["email"], row["plan"] or "—"]
    for place, label, _ in _PLACES:
        left, at = row[f"{place}_remaining_percent"], _epoch(row[f"{place}_reset_at"])
        tokens = next((window["tokens_left"] for window in row["windows"] if window["label"] == label), None)
        worth = f" ≈ {tokens / 1e6:,.1f}M left" if tokens and tokens >= 50_000 else ""
        cells.append("—" if left is None else f"{left} %{worth}")
        resets = "reset due" if at is None or at <= time.time() else time.strftime("%a %H:%M", time.localtime(at))
        cells.append("—" if at is None else resets)
    cells.append({"ok": "Active", "limited": "Limited"}.get(row["state"], row["state"].replace("_", " ")))
    age, origin = row["age_seconds"], ", from a request" if row["source"] == "traffic" else ""
    cells.append("never" if age is None else f"{age // 60} min ago{origin}")
    return cells


def run_alert_test(options: Any) -> int:
    """Send a test message to each address of "alert_urls"."""
    urls = _load(options)[0].alert_urls
    if not urls:
        raise DashboardError('no addresses to send to; set in config.json "alert_urls": ["https://…"]')
    alert, faults = Alert("test", "This is a test of the CLIProxyAPI Usage Dashboard."), []
    for number, url in enumerate(urls, 1):
        faults.append(send_alert(url, alert, time.time()))
        print(f"{number} of {len(urls)} ({receiver_of(url)}): {faults[-1] or 'sent'}")
    return 1 if any(faults) else 0


def run_check(options: Any) -> int:
    """Go through everything that can be wrong, with the line that mends it."""
    config_path = options.config or BASE_DIR / "config.json"
    try:
        config, warnings = _load(options)
        findings = [Finding("warning", warning, "remove or rename the key") for warning in warnings]
        findings = [*(findings or [Finding("ok", "configuration")]), *check_everything(config, config_path)]
    except ConfigError as error:
        findings = [Finding("fault", fault, "correct this line of the configuration") for fault in error.faults]
    for finding in findings:
        print(f"{finding.level:8}{_printable(finding.found)}")
        if finding.remedy:
            print(f"        → {_printable(finding.remedy)}")
    return 0 if all(finding.level == "ok" for finding in findings) else 1


def start_from_compiled() -> None:
    """Start again from the compiled module, where it can be kept: what compiling takes, 15 MB, stays for good."""
    from importlib.machinery import SourceFileLoader
    from importlib.util import cache_from_source

    script = BASE_DIR / Path(__file__).name
    if os.name != "posix" or sys.dont_write_bytecode or not sys.executable or not script.stem.isidentifier():
        return
    compiled = Path(cache_from_source(str(script)))
    loader = SourceFileLoader(script.stem, str(script))
    with suppress(OSError):
        try:
            loader.get_code(script.stem)  # compiles and keeps it, unless that was done
        except (EOFError, ImportError, TypeError, ValueError):  # a power cut has left a part of it
            compiled.unlink()
            loader.get_code(script.stem)
    if not compiled.exists():  # the folder cannot be written
        return
    # glibc gives every thread that serves a client a heap of its own otherwise, 10 MB in all.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "262144")  # large answers go back to the system, without holes
    code = (
        f"import sys; sys.path[:] = [{str(BASE_DIR)!r}, *filter(None, sys.path)]; "
        f"import {script.stem} as dashboard; sys.exit(dashboard.main(sys.argv[2:]))"
    )
    os.execv(sys.executable, [sys.executable, "-c", code, __file__, *sys.argv[1:]])


if __name__ == "__main__":
    if sys.argv[1:2] == ["start"]:
        start_from_compiled()
    sys.exit(main())
