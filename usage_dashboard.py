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
