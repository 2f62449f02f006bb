#!/usr/bin/env python3
"""CLIProxyAPI Usage Dashboard: collect, keep and show the usage of a CLIProxyAPI account pool.

One process takes usage records off the proxy's Redis-compatible queue, keeps them in SQLite and serves one
page with its JSON API. Only Python's standard library is needed. Sections stand from low to high, and each
uses only those above it: base, config, resp, events, store, quota, collector, web, demo, cli.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import random
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

__version__ = "3.0.0"

BASE_DIR = Path(__file__).resolve().parent

# ------------------------------------------------------------------ base


class DashboardError(Exception):
    """Report a fault in words for people; the sentence says what is wrong and what to do."""

    exit_code = 1
    http_status = 500
    code = "internal_error"


class Log:
    """Write one flushed line per event to a stream; values must be free of keys, tokens and mails."""

    def __init__(self, stream=None):
        self._stream = stream if stream is not None else sys.stdout
        self._lock = threading.Lock()

    def line(self, text: str) -> None:
        """Write a line as it is; a broken or full stream is not a reason to stop collecting."""
        with self._lock:
            try:
                print(text, file=self._stream, flush=True)
            except (OSError, ValueError):
                pass

    def event(self, name: str, **values: Any) -> None:
        """Write ``name key=value …``, with values that hold spaces in quotes."""
        parts = [name]
        for key, value in values.items():
            text = str(value)
            needs_quotes = re.search(r'[\s"]', text)
            parts.append(f"{key}={json.dumps(text, ensure_ascii=False) if needs_quotes else text}")
        self.line(" ".join(parts))


_RFC3339 = re.compile(
    r"(\d{4}-\d{2}-\d{2})[Tt ](\d{2}:\d{2}):(\d{2})(?:\.(\d{1,9}))?(?:([Zz])|([+-])(\d{2}):(\d{2}))\Z", re.ASCII
)
_EARLIEST_AT = 1577836800.0  # 2020-01-01, before which no proxy of this kind existed
_LATEST_AT = 4102444800.0  # 2100-01-01
_minute_cache: Dict[Tuple[str, str], int] = {}


def parse_time(text: str) -> Tuple[float, str]:
    """Turn RFC 3339 text into (epoch seconds UTC, the same instant as UTC text to the microsecond).

    Takes 0 to 9 fraction digits and any offset, as Go's RFC3339Nano writes them. Raises ValueError for
    anything else and for instants outside 2020 to 2100.
    """
    match = _RFC3339.match(text)
    if match is None:
        raise ValueError("not an RFC 3339 time")
    day, clock, seconds, fraction, zulu, sign, offset_hours, offset_minutes = match.groups()
    minute = _minute_epoch(day, clock)
    if not zulu:
        if int(offset_hours) > 23 or int(offset_minutes) > 59:
            raise ValueError("the offset is not a time of day")
        offset = int(offset_hours) * 3600 + int(offset_minutes) * 60
        minute += -offset if sign == "+" else offset
    whole = minute + int(seconds)
    if int(seconds) > 59:
        raise ValueError("the seconds are over 59")
    if not _EARLIEST_AT <= whole < _LATEST_AT:
        raise ValueError("outside 2020 to 2100")
    digits = ((fraction or "") + "000000")[:6]
    return whole + float("0." + (fraction or "0")), f"{_utc_second(whole)}.{digits}Z"


def _minute_epoch(day: str, clock: str) -> int:
    """Give the epoch second of a UTC minute; events of one minute share one computation."""
    key = (day, clock)
    known = _minute_cache.get(key)
    if known is None:
        from calendar import timegm

        known = timegm(time.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M"))
        if len(_minute_cache) > 4096:
            _minute_cache.clear()
        _minute_cache[key] = known
    return known


def _utc_second(epoch_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_s))


def utc_text(epoch_s: Optional[float]) -> Optional[str]:
    """Write epoch seconds as ISO UTC text to the second; None stays None."""
    return None if epoch_s is None else _utc_second(epoch_s) + "Z"


class Backoff:
    """Give waiting times that double from ``first_s`` to ``limit_s``, each shortened by up to a quarter at random."""

    def __init__(self, first_s: float = 1.0, limit_s: float = 60.0, chance: Callable[[], float] = random.random):
        self.first_s, self.limit_s, self._chance = first_s, limit_s, chance
        self._next_s = first_s

    def next(self) -> float:
        """Return the seconds to wait now and double the following one."""
        wait_s, self._next_s = self._next_s, min(self._next_s * 2, self.limit_s)
        return wait_s * (1 - 0.25 * self._chance())

    def reset(self) -> None:
        """Start again from the first wait."""
        self._next_s = self.first_s


def make_private(path: Path) -> None:
    """Create the file if it is missing, readable by its owner only (0600)."""
    os.close(os.open(str(path), os.O_RDWR | os.O_CREAT, 0o600))
    os.chmod(str(path), 0o600)


def short_tag(*parts: str) -> str:
    """Give six hex digits that stay the same for the same text and do not reveal it."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:6]


# ------------------------------------------------------------------ config


class ConfigError(DashboardError):
    """Report every fault of the configuration at once."""

    exit_code = 2
    code = "bad_config"

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("The configuration has faults:\n" + "\n".join(f"  - {fault}" for fault in self.faults))


COLLECT_MODES = ("auto", "pop", "http", "subscribe")


@dataclass(frozen=True)
class Config:
    """Hold the effective settings; the README's table says what each key means."""

    cliproxy_host: str = "127.0.0.1"
    cliproxy_port: int = 6379
    cliproxy_tls: bool = False
    management_password: str = field(default="", repr=False)
    queue_key: str = "usage"
    collect_mode: str = "auto"
    poll_interval_seconds: float = 2
    quota_refresh_seconds: int = 300
    auth_dir: str = "~/.cliproxyapi"
    database: str = "usage.db"
    retention_days: int = 0
    dashboard_host: str = "0.0.0.0"
    dashboard_port: int = 8320
    dashboard_password: str = field(default="", repr=False)

    @property
    def has_default_queue(self) -> bool:
        """Tell whether host and port were left alone, so that the proxy's own port may be tried too."""
        return (self.cliproxy_host, self.cliproxy_port) == (Config.cliproxy_host, Config.cliproxy_port)

    @property
    def database_path(self) -> Path:
        """Give the database file; a relative name counts from the script's folder."""
        return BASE_DIR / os.path.expanduser(self.database)

    def auth_dirs(self) -> List[Path]:
        """Name the folders to look for account files in, the first that has any being the one to use."""
        named = Path(os.path.expanduser(self.auth_dir))
        if self.auth_dir != Config.auth_dir:
            return [named]
        return [named, Path(os.path.expanduser("~/.cli-proxy-api"))]


def _check_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text in double quotes")
    return value


def _check_secret(value: Any) -> str:
    text = _check_text(value)
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ValueError("must not hold line breaks or other control characters")
    return text


def _check_name(value: Any) -> str:
    if not _check_text(value).strip():
        raise ValueError("must not be empty")
    return value


def _check_host(value: Any) -> str:
    host = _check_name(value).strip()
    if "/" in host:
        raise ValueError('must be a host name or address alone, such as "127.0.0.1", without http:// or a path')
    if re.match(r"[^:\s]+:\d+\Z", host):
        raise ValueError("must be a host name or address alone; the port has a key of its own")
    if re.search(r"\s", host):
        raise ValueError("must not hold spaces")
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _check_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false, without quotes")
    return value


def _check_number(low: float, high: float, whole: bool = True) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        kind = "whole number" if whole else "number"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
            raise ValueError(f"must be a {kind} from {low} to {high}, without quotes")
        return value

    return check


def _check_mode(value: Any) -> str:
    if value not in COLLECT_MODES:
        raise ValueError("must be one of " + ", ".join(f'"{mode}"' for mode in COLLECT_MODES))
    return value


_CHECKS: Dict[str, Callable[[Any], Any]] = {
    "cliproxy_host": _check_host,
    "cliproxy_port": _check_number(1, 65535),
    "cliproxy_tls": _check_flag,
    "management_password": _check_secret,
    "queue_key": _check_name,
    "collect_mode": _check_mode,
    "poll_interval_seconds": _check_number(0.1, 3600, whole=False),
    "quota_refresh_seconds": _check_number(0, 86400),
    "auth_dir": _check_name,
    "database": _check_name,
    "retention_days": _check_number(0, 36500),
    "dashboard_host": _check_host,
    "dashboard_port": _check_number(0, 65535),
    "dashboard_password": _check_secret,
}
_OTHER_NAMES = {"management_key": "management_password"}
_ENVIRONMENT = ("CLIPROXY_MANAGEMENT_PASSWORD", "MANAGEMENT_PASSWORD")


def load_config(
    path: Optional[Path] = None, env: Optional[Mapping[str, str]] = None, flags: Optional[Mapping[str, Any]] = None
) -> Tuple[Config, List[str]]:
    """Read defaults, file, environment and flags, in this order, and return the result with its warnings.

    ``path`` None means ``config.json`` beside the script, which may be missing; a named file must exist.
    Raises ConfigError with all faults in one message. Secrets are never repeated in a message.
    """
    faults: List[str] = []
    warnings: List[str] = []
    values: Dict[str, Any] = {}
    shown = path if path is not None else BASE_DIR / "config.json"
    for key, value in _read_config_file(shown, path is not None, faults).items():
        _take_key(key, value, str(shown), values, faults, warnings)
    for name in _ENVIRONMENT:
        secret = (env if env is not None else os.environ).get(name, "")
        if secret:
            _take_key("management_password", secret, f"the environment variable {name}", values, faults, warnings)
            break
    for key, value in (flags or {}).items():
        if value is not None:
            _take_key(key, value, "the command line", values, faults, warnings)
    if faults:
        raise ConfigError(faults)
    return Config(**values), warnings


def _read_config_file(path: Path, required: bool, faults: List[str]) -> Dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        if required:
            faults.append(f"{path} does not exist; copy config.example.json there or leave out --config")
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        faults.append(f"{path} cannot be read: {reason}")
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        where = f", line {error.lineno} column {error.colno}: {error.msg}" if hasattr(error, "lineno") else ""
        faults.append(f"{path} is not valid JSON{where}; compare it with config.example.json")
        return {}
    if not isinstance(content, dict):
        faults.append(f"{path} must hold one JSON object, {{ … }}")
        return {}
    return content


def _take_key(
    key: str, value: Any, where: str, values: Dict[str, Any], faults: List[str], warnings: List[str]
) -> None:
    name = _OTHER_NAMES.get(key, key)
    if name not in _CHECKS:
        warnings.append(f'{where}: the key "{key}" is unknown and ignored{_nearest(key)}')
        return
    if name != key and name in values and values[name] != value:
        warnings.append(f'{where}: "{key}" and "{name}" are two names of one key; the latter in the file counts')
    try:
        values[name] = _CHECKS[name](value)
    except ValueError as error:
        faults.append(f'{where}: "{key}" {error}')


def _nearest(key: str) -> str:
    import difflib

    close = difflib.get_close_matches(key, [*_CHECKS, *_OTHER_NAMES], n=1)
    return f'; did you mean "{close[0]}"?' if close else ""

# ------------------------------------------------------------------ resp


class QueueFault(DashboardError):
    """Report why the queue cannot be read; ``state`` is the collector state that tells it to people."""

    http_status = 502
    code = "queue_fault"
    state = "unreachable"

    def __init__(self, message: str, state: Optional[str] = None):
        super().__init__(message)
        if state is not None:
            self.state = state


class ConnectionClosed(QueueFault):
    """Report the end of the stream; ``clean`` when it came between two replies."""

    state = "closed"

    def __init__(self, clean: bool):
        super().__init__("the queue closed the connection" + ("" if clean else " in the middle of a reply"))
        self.clean = clean


class NotResp(QueueFault):
    """Report bytes that are no RESP reply; an HTTP answer means a reverse proxy stands in front of the queue."""

    state = "not_resp"


class ErrorReply(str):
    """Hold the text of a ``-…`` reply; it is a value, since one of many pipelined replies may be an error."""


class Oversized(int):
    """Stand for a bulk string over the cap: its length in bytes, its content read over and forgotten."""


def encode_command(*words: Any) -> bytes:
    """Write one command as a RESP array of bulk strings; words are bytes, text (sent as UTF-8) or numbers."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode("utf-8")
        parts.append(b"$%d\r\n%s\r\n" % (len(data), data))
    return b"".join(parts)


class RespReader:
    """Take RESP2 replies from a buffered binary stream, one at a time.

    A reply is returned only when it is whole: bytes, str (simple), int, list, None, ErrorReply or Oversized.
    Raises ConnectionClosed at the end of the stream and NotResp for bytes of another protocol. Limits, all in
    bytes but for ``max_items``: a line of a reply, a bulk string that is kept, one that is read over.
    """

    def __init__(
        self,
        stream,
        max_line: int = 64 * 1024,
        max_bulk: int = 8 * 1024 * 1024,
        max_skipped: int = 512 * 1024 * 1024,
        max_items: int = 100_000,
    ):
        self._stream = stream
        self._max_line, self._max_bulk, self._max_skipped, self._max_items = max_line, max_bulk, max_skipped, max_items

    def read_reply(self, depth: int = 0) -> Any:
        """Read one whole reply; the commonest kind, a bulk string, is looked at first."""
        line = self._read_line(clean=depth == 0)
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
            return self._read_array(_reply_number(rest), depth)
        what = "an HTTP answer" if line.startswith(b"HTTP/") else "bytes of another protocol"
        raise NotResp(f"the queue sent {what} instead of a RESP reply")

    def _read_line(self, clean: bool) -> bytes:
        line = self._stream.readline(self._max_line)
        if not line.endswith(b"\r\n"):
            if len(line) >= self._max_line:
                raise NotResp("the queue sent a line that is too long for a RESP reply")
            if line.endswith(b"\n"):
                raise NotResp("the queue sent a line that does not end like a RESP reply")
            raise ConnectionClosed(clean=clean and not line)
        return line[:-2]

    def _read_bulk(self, length: int) -> Any:
        if length == -1:
            return None
        if not 0 <= length <= self._max_skipped:
            raise NotResp(f"the queue announced a value of {length} bytes")
        if length > self._max_bulk:
            self._skip(length)
            value: Any = Oversized(length)
        else:
            value = self._stream.read(length)
            if len(value) < length:
                raise ConnectionClosed(clean=False)
        end = self._stream.read(2)
        if len(end) < 2:
            raise ConnectionClosed(clean=False)
        if end != b"\r\n":
            raise NotResp("the queue sent a value whose length does not fit")
        return value

    def _skip(self, length: int) -> None:
        while length:
            piece = self._stream.read(min(length, 64 * 1024))
            if not piece:
                raise ConnectionClosed(clean=False)
            length -= len(piece)

    def _read_array(self, count: int, depth: int) -> Optional[List[Any]]:
        if count == -1:
            return None
        if not 0 <= count <= self._max_items or depth >= 4:
            raise NotResp(f"the queue announced a list of {count} items at depth {depth}")
        return [self.read_reply(depth + 1) for _ in range(count)]


def _reply_number(text: bytes) -> int:
    if not re.match(rb"[+-]?\d{1,19}\Z", text):
        raise NotResp("the queue sent a length or number that is none")
    return int(text)


def tcp_connector(host: str, port: int, tls: bool = False, timeout_s: float = 10.0) -> Callable[[], socket.socket]:
    """Make a function that opens a connection; ``timeout_s`` bounds each wait for the other side.

    TLS trusts the system's authorities and SSL_CERT_FILE, and offers no ALPN: the proxy sends every
    connection that negotiated ``http/1.1`` to its HTTP side. Raises QueueFault with the remedy.
    """

    def connect() -> socket.socket:
        try:
            plain = socket.create_connection((host, port), timeout=timeout_s)
        except (OSError, UnicodeError) as error:
            raise QueueFault(f"{host}:{port} cannot be reached: {os_reason(error)}") from error
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return _wrap_tls(plain, host, port) if tls else plain

    return connect


def _wrap_tls(plain: socket.socket, host: str, port: int) -> socket.socket:
    import ssl

    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        plain.close()
        raise QueueFault(
            f"{host}:{port} shows a certificate that this system does not trust ({error.verify_message}); for a "
            "self-signed one, start the dashboard with SSL_CERT_FILE=/path/to/that-certificate.pem",
            state="closed",
        ) from error
    except (OSError, ValueError) as error:
        plain.close()
        raise QueueFault(f'{host}:{port} does not speak TLS; set "cliproxy_tls": false', state="closed") from error


def os_reason(error: BaseException) -> str:
    """Put an operating system's error in its own short words, without addresses or paths."""
    if isinstance(error, socket.timeout):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return "the name is unknown"
    return getattr(error, "strerror", None) or type(error).__name__


class RespClient:
    """Speak RESP over one connection: commands out in one write, whole replies in."""

    def __init__(self, connect: Callable[[], socket.socket]):
        self._socket = connect()
        self._stream = self._socket.makefile("rb", 256 * 1024)
        self._reader = RespReader(self._stream)

    def send(self, *commands: bytes) -> None:
        """Send encoded commands in one write."""
        try:
            self._socket.sendall(b"".join(commands))
        except OSError as error:
            raise QueueFault(f"the connection to the queue broke: {os_reason(error)}") from error

    def receive(self) -> Any:
        """Read the next whole reply."""
        try:
            return self._reader.read_reply()
        except socket.timeout as error:
            raise QueueFault("the queue does not answer in time") from error
        except ConnectionResetError as error:
            raise ConnectionClosed(clean=False) from error
        except (OSError, ValueError) as error:
            raise QueueFault(f"the connection to the queue broke: {os_reason(error)}") from error

    def call(self, *words: Any) -> Any:
        """Send one command and read its reply."""
        self.send(encode_command(*words))
        return self.receive()

    def close(self) -> None:
        """Close the connection; what was not read of it is gone."""
        for thing in (self._stream, self._socket):
            try:
                thing.close()
            except OSError:
                pass

    def __enter__(self) -> RespClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

# ------------------------------------------------------------------ events


class Rejected(ValueError):
    """Report why an event cannot be stored; the sentence holds no value of the event."""


class Event(NamedTuple):
    """Hold one upstream attempt as it will be stored; None is unknown, zero is measured.

    ``input_tokens`` includes cached input and ``output_tokens`` includes reasoning, for every provider.
    """

    timestamp: str
    ts_epoch: float
    auth_index: Optional[str]
    source: str
    model: str
    input_tokens: Optional[int]
    output_tokens: Optional[int]
    reasoning_tokens: Optional[int]
    total_tokens: Optional[int]
    latency_ms: Optional[int]
    failed: int
    cached_tokens: Optional[int]
    cache_write_tokens: Optional[int]
    ttft_ms: Optional[int]
    status_code: Optional[int]
    error: Optional[str]
    request_id: Optional[str]
    provider: str
    endpoint: str
    auth_type: str
    alias: str
    reasoning_effort: str
    service_tier: str
    api_key: str
    plan: str


class Reject(NamedTuple):
    """Hold an event that cannot be stored: why, how long it was, and what of it may be kept (masked JSON)."""

    reason: str
    length: int
    event: Optional[str]


class Parsed(NamedTuple):
    """Hold what a batch became; the three counts add up to the number of values handed over."""

    events: List[Event]
    rejects: List[Reject]
    ignored: int


_MAIL = re.compile(r"[^@\s]{1,64}@[^@\s]+\.[^@\s]+\Z")
# Exact up to here in every browser; no request of any model comes near.
_LARGEST_NUMBER = 2**53 - 1
_CLAUDE = frozenset(["claude"])
_THOUGHTS_APART = frozenset(["gemini", "gemini-cli", "vertex", "aistudio", "antigravity", "interactions"])
_CONTROL_KEYS = ({"refresh"}, {"support_refresh"})


def looks_like_mail(text: str) -> bool:
    """Tell whether a source is an e-mail address, the only kind that may be stored as sent."""
    return len(text) <= 254 and _MAIL.match(text) is not None


def mask_key(text: str) -> str:
    """Mask what may be a key: its ends and a stable tag, or the tag alone where the ends would tell too much."""
    if not text:
        return ""
    tag = short_tag(text)
    return f"{text[:3]}…{text[-4:]} #{tag}" if len(text) >= 16 else f"… #{tag}"


def mask_mail(mail: str) -> str:
    """Shorten an address for the console: ``an.nguyen@x.com`` becomes ``a***@x.com``."""
    name, at, domain = mail.partition("@")
    return f"{name[:1]}***@{domain}" if at else "***"


_masks: Dict[str, str] = {}


def _mask_source(text: str) -> str:
    """Mask a source once; the same few come with every event."""
    masked = _masks.get(text)
    if masked is None:
        if len(_masks) > 4096:
            _masks.clear()
        masked = _masks[text] = text if looks_like_mail(text) else mask_key(text)
    return masked


def parse_events(raws: Sequence[Any]) -> Parsed:
    """Parse what the queue handed over: JSON as bytes, objects that were JSON already, or Oversized.

    One bad event never costs its neighbours: it becomes a Reject, with what may be kept of it.
    """
    parsed = Parsed([], [], 0)
    ignored = 0
    for raw, content in zip(raws, _decode_all(raws)):
        try:
            if isinstance(content, Rejected):
                raise content
            event = parse_event(content)
        except Rejected as reason:
            parsed.rejects.append(Reject(str(reason), _length_of(raw), masked_json(content)))
            continue
        if event is None:
            ignored += 1
        else:
            parsed.events.append(event)
    return parsed._replace(ignored=ignored)


def _decode_all(raws: Sequence[Any]) -> List[Any]:
    """Decode a batch in one call, as one array with a zero between every two events.

    The zeros prove that each event was one JSON value by itself; otherwise each is decoded alone.
    """
    try:
        joined = _decode(b"[" + b",0,".join(raws) + b"]")
        if len(joined) == 2 * len(raws) - 1 and not any(joined[1::2]):
            return joined[::2]
    except (TypeError, ValueError, RecursionError):
        pass
    return [_decode_one(raw) for raw in raws]


def _decode_one(raw: Any) -> Any:
    if isinstance(raw, Oversized):
        return Rejected("it is larger than an event can be")
    if not isinstance(raw, bytes):
        return raw
    try:
        return _decode(raw)
    except UnicodeDecodeError:
        return Rejected("it is not UTF-8 text")
    except RecursionError:
        return Rejected("it is nested too deeply")
    except ValueError:
        return Rejected("it is not JSON")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_json_decoder = json.JSONDecoder(parse_constant=_no_constant)


def _decode(raw: bytes) -> Any:
    return _json_decoder.decode(raw.decode("utf-8"))


def _length_of(raw: Any) -> int:
    if isinstance(raw, Oversized):
        return int(raw)
    return len(raw if isinstance(raw, bytes) else json.dumps(raw))


def parse_event(content: Any) -> Optional[Event]:
    """Turn one decoded record into an Event; None for control messages and warm-ups, which are no usage.

    Raises Rejected. Key and client address are masked or dropped here, at the edge.
    """
    if not isinstance(content, dict):
        raise Rejected("it is not a JSON object")
    if len(content) == 1 and set(content) in _CONTROL_KEYS:
        return None
    get = content.get
    if get("generate") is False:
        return None
    try:
        ts_epoch, timestamp = parse_time(get("timestamp"))
    except TypeError:
        raise Rejected("timestamp is missing or not a text") from None
    except ValueError as error:
        raise Rejected(f"timestamp is {error}") from None
    provider = _text(get("provider"), "provider").lower()
    status, reason = _failure(get("fail"))
    failed = _failed_flag(get("failed"), status)
    usage = _usage(content, provider)
    return Event(
        timestamp,
        ts_epoch,
        _auth_index(get("auth_index")),
        _mask_source(_text(get("source"), "source", 512)),
        _text(get("model"), "model") or "unknown",
        *usage[:4],
        _number(get("latency_ms"), "latency_ms"),
        failed,
        *usage[4:],
        _number(get("ttft_ms"), "ttft_ms") or None,  # the proxy writes 0 where no first token was seen
        status,
        reason if failed else None,
        _text(get("request_id"), "request_id", 64) or None,
        provider,
        _text(get("endpoint"), "endpoint"),
        _text(get("auth_type"), "auth_type", 32),
        _text(get("alias"), "alias"),
        _text(get("reasoning_effort"), "reasoning_effort", 32),
        _text(get("service_tier"), "service_tier", 32),
        mask_key(_text(get("api_key"), "api_key", 512)),
        "" if failed else _plan_of(get("response_headers")),
    )


def _text(value: Any, name: str, limit: int = 200) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Rejected(f"{name} is not a text")
    return _printable(value[:limit])


def _printable(text: str) -> str:
    """Replace what neither SQLite's shell nor a terminal takes: control characters and lone surrogates."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def _number(value: Any, name: str) -> Optional[int]:
    """Take a count; a negative one, which senders use for "not known", is unknown."""
    if value is None or type(value) is int and 0 <= value <= _LARGEST_NUMBER:
        return value
    if isinstance(value, float) and value.is_integer():
        return _number(int(value), name)
    if type(value) is not int:
        raise Rejected(f"{name} is not a whole number")
    if value > _LARGEST_NUMBER:
        raise Rejected(f"{name} is larger than 2^53")
    return None


def _auth_index(value: Any) -> Optional[str]:
    if value is None or isinstance(value, str):
        return None if value is None else _printable(value[:128])
    if type(value) is int and abs(value) <= _LARGEST_NUMBER:
        return str(value)
    raise Rejected("auth_index is neither a text nor a whole number")


def _failed_flag(value: Any, status: Optional[int]) -> int:
    if value is None:
        return int(status is not None and status >= 400)
    if value in (True, False):
        return int(value)
    raise Rejected("failed is neither true nor false")


def _plan_of(headers: Any) -> str:
    """Read the plan from the reply headers of a Codex call; a failed call may carry another account's."""
    values = headers.get("X-Codex-Plan-Type") if isinstance(headers, dict) else None
    first = values[0] if isinstance(values, list) and values else None
    return _printable(first[:32].strip().lower()) if isinstance(first, str) else ""


_Usage = Tuple[Optional[int], ...]  # input, output, reasoning, total, cached, cache write


def _usage(content: Dict[str, Any], provider: str) -> _Usage:
    """Bring the token counts to one meaning: input with cache, output with reasoning."""
    breakdown = content.get("token_breakdown")
    if isinstance(breakdown, dict) and breakdown.get("schema_version") == 2 and breakdown.get("quality") == "complete":
        try:
            return _breakdown_usage(breakdown)
        except (Rejected, KeyError, TypeError):
            pass  # an incomplete breakdown is no reason to lose the plain counts
    tokens = content.get("tokens")
    if tokens is None:
        return (None,) * 6
    if not isinstance(tokens, dict):
        raise Rejected("tokens is not an object")
    counts = {name: _number(tokens.get(name), f"tokens.{name}") for name in _TOKEN_NAMES}
    if provider in _CLAUDE or content.get("executor_type") == "ClaudeExecutor":
        return _claude_usage(counts)
    return _inclusive_usage(counts, thoughts_apart=provider in _THOUGHTS_APART)


_TOKEN_NAMES = (
    "input_tokens",
    "output_tokens",
    "reasoning_tokens",
    "cached_tokens",
    "total_tokens",
    "cache_read_tokens",
    "cache_creation_tokens",
)


def _breakdown_usage(breakdown: Dict[str, Any]) -> _Usage:
    into, out = breakdown["input"], breakdown["output"]
    return tuple(
        _number(part[name], name)
        for part, name in (
            (into, "total_tokens"),
            (out, "total_tokens"),
            (out, "reasoning_tokens"),
            (breakdown, "total_tokens"),
            (into, "cache_read_tokens"),
            (into, "cache_write_tokens"),
        )
    )


def _sum(*numbers: Optional[int]) -> Optional[int]:
    """Add what is known; unknown where nothing is."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _claude_usage(counts: Dict[str, Optional[int]]) -> _Usage:
    """Add the cache to Claude's input, which leaves it out; so does its total before v7.1.26."""
    sent_input, output, total = counts["input_tokens"], counts["output_tokens"], counts["total_tokens"]
    written = counts["cache_creation_tokens"]
    # Before v7.0.3 there is only cached_tokens; since then that repeats the writes where nothing was read.
    read = counts["cached_tokens"] if counts["cache_read_tokens"] is None else counts["cache_read_tokens"]
    whole_input = None if sent_input is None else _sum(sent_input, read, written)
    if not total or total == _sum(sent_input, output):
        total = _sum(whole_input, output)
    return whole_input, output, counts["reasoning_tokens"], total, read, written


def _inclusive_usage(counts: Dict[str, Optional[int]], thoughts_apart: bool) -> _Usage:
    """Take OpenAI's meaning as it is; Gemini's output leaves the thoughts out, so they are added."""
    output, reasoning = counts["output_tokens"], counts["reasoning_tokens"]
    if thoughts_apart and output is not None:
        output = _sum(output, reasoning)
    total = counts["total_tokens"] or _sum(counts["input_tokens"], output)
    # From v7.0.3 to v7.2.66 cache_read_tokens stays 0 here although cached_tokens is filled.
    cached = counts["cache_read_tokens"] or counts["cached_tokens"]
    return counts["input_tokens"], output, reasoning, total, cached, counts["cache_creation_tokens"]


_SECRETS = re.compile(
    r"[^\s@<>\"']+@[^\s@<>\"']+\.[A-Za-z]{2,}"  # mails
    r"|\b(?:(?:sk|pk|rk|key|org|proj|user|acct|ghp|xai)[-_]|AIza|ya29|eyJ)[-_.A-Za-z0-9]{5,}"  # keys by their beginning
    r"|(?<![A-Za-z0-9])(?=[A-Za-z0-9_\-+/=.]*\d)[A-Za-z0-9_\-+/=.]{20,}"  # long runs with a digit
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b|(?<![\w:])(?:[0-9a-fA-F]{0,4}:){3,7}[0-9a-fA-F]{0,4}(?![\w:])"  # addresses
)
_OWN_PHRASES = {200: "stream broken off", 499: "Client Closed Request", 529: "Overloaded"}


def without_secrets(text: str, limit: int = 160) -> str:
    """Take mails, keys, long ids and addresses out of a sentence and shorten it."""
    short = " ".join(_SECRETS.sub("…", text[:4096]).split())
    return _printable(short if len(short) <= limit else short[: limit - 1] + "…")


def _failure(fail: Any) -> Tuple[Optional[int], Optional[str]]:
    """Give (HTTP status, short reason) of ``fail``; never its free body, which can echo a prompt."""
    if fail is None:
        return None, None
    if not isinstance(fail, dict):
        raise Rejected("fail is not an object")
    status = _number(fail.get("status_code"), "fail.status_code") or None
    return status, failure_reason(status, fail.get("body"))


def failure_reason(status: Optional[int], body: Any) -> Optional[str]:
    """Say shortly why a call failed: ``429 usage_limit_reached: The usage limit has been reached``.

    Only the code, type and message of a JSON error are used, at most 160 characters without keys and mails.
    """
    code, message = _json_error(body)
    if code or message:
        said = ": ".join(part for part in (code, message) if part)
        return without_secrets(said if status is None else f"{status} {said}")
    return None if status is None else f"{status} {_status_phrase(status)}".strip()


def _status_phrase(status: int) -> str:
    from http import HTTPStatus

    try:
        return _OWN_PHRASES.get(status) or HTTPStatus(status).phrase
    except ValueError:
        return ""


def _json_error(body: Any) -> Tuple[str, str]:
    """Find (code, message) in the error shapes of OpenAI, Claude and Gemini; empty where there is none."""
    if not isinstance(body, str) or not body.lstrip().startswith(("{", "[")) or len(body) > 256 * 1024:
        return "", ""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
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


_KEPT_OF_REJECT = (
    "timestamp latency_ms ttft_ms source auth_index failed generate accounting_version provider executor_type model "
    "alias endpoint auth_type api_key request_id reasoning_effort service_tier response_service_tier"
).split()


def masked_json(content: Any) -> Optional[str]:
    """Write what may be kept of a rejected event, by the masks of a good one; None where it was no object."""
    if not isinstance(content, dict):
        return None
    kept: Dict[str, Any] = {name: _harmless(content[name]) for name in _KEPT_OF_REJECT if name in content}
    for name in ("source", "api_key"):
        if isinstance(content.get(name), str):
            kept[name] = mask_key(content[name]) if name == "api_key" else _mask_source(content[name][:512])
    for name in ("tokens", "token_breakdown"):
        if name in content:
            kept[name] = _numbers_only(content[name])
    if isinstance(content.get("fail"), dict):
        kept["fail"] = {"status_code": _numbers_only(content["fail"].get("status_code"))}
    return json.dumps(kept, ensure_ascii=True)


def _harmless(value: Any) -> Any:
    """Keep a number or a short text without secrets; of anything else only its kind."""
    if value is None or isinstance(value, (bool, int, float)):
        return value if not isinstance(value, int) or abs(value) < 2**63 else "number"
    return without_secrets(value, 200) if isinstance(value, str) else type(value).__name__


def _numbers_only(value: Any, depth: int = 0) -> Any:
    if isinstance(value, dict) and depth < 3:
        return {str(key)[:40]: _numbers_only(item, depth + 1) for key, item in list(value.items())[:20]}
    if isinstance(value, str):
        return value if value in ("complete", "inconsistent", "unclassified") else "str"
    return _harmless(value)


class Identity(NamedTuple):
    """Hold one (auth_index, source) pair that events came with; times are epoch seconds."""

    id: int
    auth_index: str
    source: str
    provider: str
    plan: str
    first_at: float
    last_at: float


@dataclass
class Account:
    """Hold one row of the accounts table: who it is, and which identities are counted for it."""

    name: str
    mail: str
    source: str
    auth_index: str
    provider: str
    plan: str
    first_at: float
    last_at: float
    identity_ids: List[int]


# A new login's first request may start before the old one's last stream ends.
_LOGIN_OVERLAP_S = 900.0


def resolve_accounts(identities: Iterable[Identity]) -> List[Account]:
    """Group identities into accounts, named so that no two share a name.

    An account is the last e-mail seen with an auth_index, else the source, else the index. An index that took
    over from another of the same mail, provider and plan joins it; two that live at once are two accounts.
    """
    by_index: Dict[Tuple[str, str], List[Identity]] = {}
    for identity in sorted(identities, key=lambda one: (one.first_at, one.id)):
        key = (identity.auth_index, "" if identity.auth_index else identity.source)
        by_index.setdefault(key, []).append(identity)
    accounts: List[Account] = []
    for group in by_index.values():
        account = _account_of_index(group)
        earlier = next((known for known in accounts if _takes_over(account, known)), None)
        if earlier is None:
            accounts.append(account)
        else:
            _join(earlier, account)
    _name_apart(accounts)
    return accounts


def _account_of_index(group: Sequence[Identity]) -> Account:
    newest_first = sorted(group, key=lambda one: one.last_at, reverse=True)
    mail = next((one.source for one in newest_first if looks_like_mail(one.source)), "")
    newest = newest_first[0]
    name = mail or newest.source or (f"index {newest.auth_index}" if newest.auth_index else "unknown")
    return Account(
        name,
        mail,
        mail or newest.source,
        newest.auth_index,
        newest.provider,
        next((one.plan for one in newest_first if one.plan), ""),
        min(one.first_at for one in group),
        newest.last_at,
        [one.id for one in group],
    )


def _takes_over(new: Account, old: Account) -> bool:
    if not new.mail or new.mail != old.mail:
        return False
    if new.provider and old.provider and new.provider != old.provider:
        return False
    if not new.auth_index or not old.auth_index:
        return True  # without an index there is nothing to tell them apart by
    same_plan = new.plan == old.plan or not new.plan or not old.plan
    return same_plan and old.last_at <= new.first_at + _LOGIN_OVERLAP_S


def _join(old: Account, new: Account) -> None:
    if new.last_at >= old.last_at:
        old.auth_index, old.source = new.auth_index or old.auth_index, new.source
        old.plan, old.provider = new.plan or old.plan, new.provider or old.provider
    old.first_at, old.last_at = min(old.first_at, new.first_at), max(old.last_at, new.last_at)
    old.identity_ids = old.identity_ids + new.identity_ids


def _name_apart(accounts: Sequence[Account]) -> None:
    """Tell accounts of one name apart by plan, else provider, else a short tag of the index."""
    for mark in (lambda one: one.plan, lambda one: one.provider, lambda one: "#" + short_tag(one.auth_index)):
        by_name: Dict[str, List[Account]] = {}
        for account in accounts:
            by_name.setdefault(account.name, []).append(account)
        for twins in by_name.values():
            marks = [mark(one) for one in twins]
            if len(twins) > 1 and all(marks) and len(set(marks)) > 1:
                for one, text in zip(twins, marks):
                    one.name = f"{one.name} ({text})"
