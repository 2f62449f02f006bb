from __future__ import annotations

import io
import itertools
import random
import socket
import threading
from contextlib import closing
from functools import partial

import pytest

import usage_dashboard as app


def reader(data: bytes, **limits) -> app.RespReader:
    return app.RespReader(io.BytesIO(data), **limits)


def with_types(value):
    """Return a value with its types, so that an error differs from a text, and 1 from True."""
    return [with_types(item) for item in value] if isinstance(value, list) else (type(value), value)


def random_reply(dice: random.Random, depth: int = 0):
    """Make a reply of any type: its bytes, and what is to be read of them."""
    kind = dice.choice(["bulk"] * 4 + ["text", "error", "number", "null", "no list"] + ["list"] * (depth < 4))
    if kind == "bulk":
        data = bytes(dice.choices(b"\r\n$*-+:0a\xff\x00", k=dice.choice([0, 1, 2, 3, 40, 700])))
        return b"$%d\r\n%s\r\n" % (len(data), data), data
    if kind in ("text", "error"):
        text = "".join(dice.choices("aZ $*:-+đ…", k=dice.randrange(12)))
        sign, value = (b"+", text) if kind == "text" else (b"-", app.ErrorReply(text))
        return sign + text.encode() + b"\r\n", value
    if kind == "number":
        number = dice.choice([0, 7, -1, 2**63 - 1, -(2**63)])
        return b":%d\r\n" % number, number
    if kind == "list":
        items = [random_reply(dice, depth + 1) for _ in range(dice.randrange(4))]
        return b"*%d\r\n" % len(items) + b"".join(wire for wire, _ in items), [value for _, value in items]
    return (b"$-1\r\n" if kind == "null" else b"*-1\r\n"), None


class Pieces:
    """Deliver bytes over a real socket in pieces that a random generator cuts, then close it."""

    def __init__(self, wire: bytes, dice: random.Random):
        here, self._there = socket.socketpair()
        self.client = app.RespClient(lambda: here)
        self._pieces = []
        while wire:
            size = dice.choice([1, 1, 2, 3, 7, 50, 4000])
            self._pieces.append(wire[:size])
            wire = wire[size:]
        self._thread = threading.Thread(target=self._send)

    def __enter__(self):
        self._thread.start()
        return self.client

    def __exit__(self, *_):
        self._thread.join()
        self.client.close()

    def _send(self):
        with self._there:
            for piece in self._pieces:
                self._there.sendall(piece)


@pytest.mark.parametrize("seed", range(50))
def test_replies_in_random_pieces_are_read_as_they_were_written_up_to_a_cut_and_never_a_part(seed):
    dice = random.Random(seed)
    replies = [random_reply(dice) for _ in range(dice.choice([12, 40]))]
    wire = b"".join(wire for wire, _ in replies)
    ends = list(itertools.accumulate(len(wire) for wire, _ in replies))
    cut = len(wire) if seed % 2 else dice.randrange(len(wire))
    got = []
    with Pieces(wire[:cut], dice) as client, pytest.raises(app.ConnectionClosed):
        while True:
            got.append(with_types(client.receive()))
    whole = sum(end <= cut for end in ends)
    assert got == [with_types(value) for _, value in replies[:whole]]


FOREIGN = [
    b"HTTP/1.1 400 Bad Request\r\n", b"hello\r\n", b"\r\n", b"+OK\n", b"$x\r\n", b"$-2\r\n", b"$ 1\r\na\r\n",
    b"$1_0\r\n", b"$3\r\nabcd\r\n", b"*-2\r\n", b"*1000001\r\n", b":\r\n", b"$99999999999999999999\r\n",
    b"+" + b"x" * 70000 + b"\r\n",
]  # fmt: skip


@pytest.mark.parametrize("wire", FOREIGN)
def test_bytes_of_another_protocol_are_refused(wire):
    with pytest.raises(app.NotResp):
        reader(wire).read_reply()


def test_value_over_the_cap_is_read_over_and_the_next_one_kept():
    replies = reader(b"$11\r\n" + b"x" * 11 + b"\r\n$2\r\nok\r\n", max_bulk=10)
    skipped = replies.read_reply()
    assert isinstance(skipped, app.Oversized) and skipped == 11
    assert replies.read_reply() == b"ok"


def test_encode_command_counts_bytes_not_letters():
    assert app.encode_command("RPOP", "khoá", 10) == b"*3\r\n$4\r\nRPOP\r\n$5\r\nkho\xc3\xa1\r\n$2\r\n10\r\n"


def test_connector_to_a_closed_port_says_where():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(app.QueueFault, match=f"127.0.0.1:{port} cannot be reached"):
        app.connect_tcp("127.0.0.1", port)


def test_silent_server_times_out_in_words():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connect = partial(app.connect_tcp, "127.0.0.1", listener.getsockname()[1], timeout_s=0.05)
        with closing(app.RespClient(connect)) as client, pytest.raises(app.QueueFault, match="no answer in time"):
            client.call("AUTH", "x")


def test_list_that_is_nested_too_deeply_is_no_reply():
    with pytest.raises(app.NotResp, match="at depth 100"):
        reader(b"*1\r\n" * 500 + b":7\r\n").read_reply()
