"""A stand-in for chatgpt.com, reached as in production: TLS to chatgpt.com:443, here through a CONNECT proxy.

with FakeChatGPT() as chatgpt:
    chatgpt.answer("token-of-an-account", body={"plan_type": "plus", ...})
    ...                                     # run the program with chatgpt.environment
    assert [request["token"] for request in chatgpt.requests] == ["token-of-an-account"]
"""

from __future__ import annotations

import json
import ssl
import threading
from typing import Any

from sockets import SocketServer, Stream, bearer_token, http_reply, read_http_head
from support import DATA

TARGET = "chatgpt.com:443"
UNKNOWN_TOKEN = {"detail": "Unauthorized"}


class Answer:
    """What one token is told; for `options` see FakeChatGPT.answer()."""

    def __init__(self, status: int = 200, headers: Any = None, body: Any = b"", **options: Any) -> None:
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        raw = (content if isinstance(content, bytes) else content.encode()).ljust(options.pop("size", 0))
        self.reply = http_reply(status, raw, "application/json", headers)
        head_length = len(self.reply) - len(raw)
        self.endless = options.pop("endless", False)
        if self.endless:
            self.reply = f"HTTP/1.1 {status} As told\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        if "cut_after" in options:
            self.reply = self.reply[: head_length + options.pop("cut_after")]
        self.drip = options.pop("drip", 0.0)
        self.may_go = threading.Event()
        if not options.pop("hold", False):
            self.may_go.set()
        assert not options, f"no such options: {options}"


class FakeChatGPT(SocketServer):
    """The CONNECT proxy with chatgpt.com behind it; a context manager.

    `requests` holds a dict for each, in order of arrival: token, method, path, headers (names in lower case)
    and proxy_headers, which came with the CONNECT. `foreign_targets` is every other place that was asked for,
    `most_at_once` the highest number of requests that were in the server together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ca_file = str(DATA / "ca.pem")
        self.requests: list[dict[str, Any]] = []
        self.foreign_targets: list[str] = []
        self.most_at_once = 0
        self._at_once = 0
        self._answers: dict[str, Answer] = {}
        self._default = Answer(401, body=UNKNOWN_TOKEN)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(str(DATA / "server.pem"))

    def __exit__(self, *args: object) -> None:
        self.closing.set()
        self.release()
        super().__exit__(*args)

    @property
    def proxy_url(self) -> str:
        """The value for HTTPS_PROXY."""
        return f"http://{self.host}:{self.port}"

    @property
    def environment(self) -> dict[str, str | None]:
        """The variables that lead a program here."""
        return {"HTTPS_PROXY": self.proxy_url, "SSL_CERT_FILE": self.ca_file}

    def describe(self) -> str:
        asked = [(request["token"], request["path"]) for request in self.requests]
        return f"chatgpt was asked {asked}, foreign targets {self.foreign_targets}"

    def answer(self, token: str | None, status: int = 200, **options: Any) -> None:
        """Set the answer for a bearer token, or with None the one for all others (401 at first).

        Options: headers, body (JSON value, str or bytes), size (the body is padded to it with spaces), drip (seconds
        after each byte), endless (chunks of a space without end), cut_after (the connection is closed after so many
        bytes of the body), hold (nothing is answered before release()).
        """
        with self.change():
            if token is None:
                self._default = Answer(status, **options)
            else:
                self._answers[token] = Answer(status, **options)

    def release(self) -> None:
        """Let the held answers go."""
        with self.change():
            for answer in [self._default, *self._answers.values()]:
                answer.may_go.set()

    def serve(self, stream: Stream) -> None:
        method, target, proxy_headers = read_http_head(stream)
        if method != "CONNECT" or target != TARGET:
            with self.change():
                self.foreign_targets.append(target)
            stream.send(http_reply(403, b"only chatgpt.com:443", "text/plain"))
            return
        stream.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        stream.start_tls(self._tls)
        method, path, headers = read_http_head(stream)
        request = {"token": bearer_token(headers), "method": method, "path": path,
                   "headers": headers, "proxy_headers": proxy_headers}  # fmt: skip
        with self.change():
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            answer = self._answers.get(request["token"], self._default)
        try:
            self._send(stream, answer)
        finally:
            with self.change():
                self._at_once -= 1

    def _send(self, stream: Stream, answer: Answer) -> None:
        answer.may_go.wait()
        if not answer.drip:
            stream.send(answer.reply)
        while answer.endless and not self.closing.wait(0.01):
            stream.send(b"1\r\n \r\n")
        if answer.drip:
            for position in range(len(answer.reply)):
                stream.send(answer.reply[position : position + 1])
                if self.closing.wait(answer.drip):
                    return
