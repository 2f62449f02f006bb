from __future__ import annotations

import io
import random
import socket
import threading

import pytest

import usage_dashboard as app


class Trickle(io.RawIOBase):
    """Give a byte string in pieces of the sizes that a random generator chooses."""

    def __init__(self, data: bytes, seed: int):
        self._data, self._random = data, random.Random(seed)

    def readable(self):
        return True

    def readinto(self, buffer):
        size = min(len(buffer), len(self._data), self._random.choice([1, 1, 2, 3, 7, 50]))
        buffer[:size], self._data = self._data[:size], self._data[size:]
        return size


def reader(data: bytes, **limits) -> app.RespReader:
    return app.RespReader(io.BytesIO(data), **limits)


@pytest.mark.parametrize(
    ("wire", "value"),
    [
        (b"+OK\r\n", "OK"),
        (b"-ERR no\r\n", "ERR no"),
        (b":42\r\n", 42),
        (b":-7\r\n", -7),
        (b"$5\r\nhello\r\n", b"hello"),
        (b"$0\r\n\r\n", b""),
        (b"$4\r\n\r\n\r\n\r\n", b"\r\n\r\n"),
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"*0\r\n", []),
        (b"*3\r\n$7\r\nmessage\r\n:1\r\n*1\r\n+x\r\n", [b"message", 1, ["x"]]),
    ],
)
def test_every_reply_type_is_read(wire, value):
    assert reader(wire).read_reply() == value


def test_error_reply_is_told_from_text():
    assert isinstance(reader(b"-ERR no\r\n").read_reply(), app.ErrorReply)
    assert not isinstance(reader(b"+ERR no\r\n").read_reply(), app.ErrorReply)


@pytest.mark.parametrize("seed", range(40))
def test_random_splits_give_the_same_replies(seed):
    dice = random.Random(seed)
    sent = [bytes(dice.randrange(256) for _ in range(dice.choice([0, 1, 2, 90, 700]))) for _ in range(30)]
    wire = b"".join(b"$%d\r\n%s\r\n" % (len(item), item) for item in sent)
    replies = app.RespReader(io.BufferedReader(Trickle(wire, seed), 16))
    assert [replies.read_reply() for _ in sent] == sent


def test_stream_cut_at_any_byte_is_never_data():
    wire = b"$5\r\nhello\r\n*2\r\n:1\r\n$2\r\nab\r\n"
    first_ends_at = wire.index(b"*2")
    for cut in range(len(wire)):
        replies, got = reader(wire[:cut]), []
        with pytest.raises(app.ConnectionClosed) as raised:
            while True:
                got.append(replies.read_reply())
        assert got == ([b"hello"] if cut >= first_ends_at else [])
        assert raised.value.clean == (cut in (0, first_ends_at))


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"hello\r\n",
        b"\r\n",
        b"+OK\n",
        b"$x\r\n",
        b"$-2\r\n",
        b"$ 1\r\na\r\n",
        b"$1_0\r\n",
        b"$3\r\nabcd\r\n",
        b"*-2\r\n",
        b"*1000001\r\n",
        b":\r\n",
        b"$99999999999999999999\r\n",
        b"*1\r\n" * 9,
        b"+" + b"x" * 70000 + b"\r\n",
    ],
)
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


def serve_once(reply: bytes):
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(reply)

    thread = threading.Thread(target=answer)
    thread.start()
    return listener, thread


def test_client_sends_a_command_and_reads_its_reply():
    listener, thread = serve_once(b"+OK\r\n")
    with listener, app.RespClient(app.tcp_connector("127.0.0.1", listener.getsockname()[1])) as client:
        assert client.call("AUTH", "secret") == "OK"
        with pytest.raises(app.QueueFault):
            client.receive()
    thread.join()


def test_connector_to_a_closed_port_says_where():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(app.QueueFault, match=f"127.0.0.1:{port} cannot be reached"):
        app.tcp_connector("127.0.0.1", port)()


def test_silent_server_times_out_in_words():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connect = app.tcp_connector("127.0.0.1", listener.getsockname()[1], timeout_s=0.05)
        with app.RespClient(connect) as client, pytest.raises(app.QueueFault, match="does not answer in time"):
            client.call("AUTH", "x")
