# SPDX-License-Identifier: MIT
"""What became of a run is told: promises 4.6, 6.3, 6.4, and 6.1 for the same faults of a GET.

A table of all the ways in which HTTP breaks, first; then how TLS breaks, and a machine without
memory or `_ssl`. Deadlines are in `test_nothing_hangs.py`, signals in `test_signals.py`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import bus_containers
from hostile import (
    AlertingTls,
    Api,
    Certificates,
    Connection,
    Hostile,
    Script,
    answer,
    answer_unread,
    close,
    html,
    message,
    raw,
    refused_port,
    reset,
    then_hold,
    why_no_ipv6,
)
from support import (
    BODIES,
    CANARY,
    DOCUMENTS,
    LIMIT,
    Env,
    InProcess,
    Program,
    as_json,
    check_each,
    check_failure,
    skip_if,
    tiers,
    words,
)

Serve = Callable[..., Hostile]

ADVICE = (
    "the run may still be executing and counting against the quota: look with "
    "`bus-containers runs`, end it with `bus-containers delete RUN_ID`"
)
# More words than the buffers of two sockets take when the reader does not read.
LARGE = ("run", "--", *("x" * 100_000 for _ in range(19)))

# --- every way in which HTTP breaks -----------------------------------------------------------


class Broken(NamedTuple):
    """An answer, and what the client makes of it."""

    id: str
    script: Script
    kind: type[bus_containers.BusContainersError]
    says: str = ""  # a pattern in its text
    state: str = "unknown"
    tries: int = 1  # of a GET


OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LONG = b"a" * 70_000
STATUS = BODIES["status"]
MANY = b"".join(b"X-%d: y\r\n" % n for n in range(150))


def framed(header: str, body: bytes = b"{}") -> Script:
    return answer(body, "200 OK", header)


def broken(kind: type[bus_containers.BusContainersError], *rows: tuple[Any, ...]) -> list[Broken]:
    return [Broken(row[0], row[1], kind, *row[2:]) for row in rows]


def reset_amid_the_request(connection: Connection) -> None:
    connection.server.requests.append(connection.sock.recv(5))  # the method
    connection.reset()


CUT = "the connection was lost: the answer was cut short(; the run .*)?$"
NO_LENGTH = "the answer is not valid HTTP: a chunk has no length(; the run .*)?$"
NEGATIVE = ("chunk-size-negative", raw(CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n"))
HTTPS = r"; is this port for https\?"  # asked only where nothing came that was HTTP
BROKEN = [
    *(row._replace(tries=3) for row in broken(
        bus_containers.TransportError,
        ("reset-before-the-answer", reset(), f"the connection was lost: .*reset.*{HTTPS}"),
        ("reset-amid-headers", reset(OK_HEAD[:30]), "the connection was lost: .*reset"),
        ("reset-amid-body", reset(message(b'{"it', length=99)), "the connection was lost: .*reset"),
        ("reset-while-it-is-sent", reset_amid_the_request, "the connection was lost: "),
        ("closed-without-a-byte", close(), f"the connection was lost: .*without.*{HTTPS}"),
        ("closed-amid-headers", raw(OK_HEAD), CUT),
        ("closed-amid-headers-of-403", raw(OK_HEAD.replace(b"200 OK", b"403 No")), CUT),
        ("body-cut", raw(message(STATUS, length=999)), CUT),
        ("chunk-cut", raw(CHUNKED + b"40\r\n{"), CUT),
        ("chunk-size-cut", raw(CHUNKED + b"4"), CUT),
        # Before Python 3.10, http.client reads on to the connection's end.
        *([(*NEGATIVE, CUT)] if sys.version_info < (3, 10) else []),
    )),
    *broken(
        bus_containers.ProtocolError,
        ("closed-amid-status-line", raw(b"HTTP/1."), f"is not valid HTTP: HTTP/1.*{HTTPS}"),
        ("html-alone", raw(b"<html><h1>Welcome</h1></html>\r\n"), "valid HTTP: it starts with a "),
        ("status-of-two-digits", raw(b"HTTP/1.1 20 OK\r\n\r\n{}"), "is not valid HTTP"),
        ("header-too-long", raw(OK_HEAD + b"X: " + LONG + b"\r\n\r\n{}"), "line"),
        ("too-many-headers", raw(OK_HEAD + MANY + b"\r\n{}"), "100 headers"),
        ("chunk-size-not-a-number", raw(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n"), NO_LENGTH),
        *([(*NEGATIVE, NO_LENGTH)] if sys.version_info >= (3, 10) else []),
        ("length-not-a-number", framed("Content-Length: abc"), "has a bad Content-Length"),
        ("two-lengths", framed("Content-Length: 2\r\nContent-Length: 3"), "bad Content-Length"),
        ("bare-200", raw(b"HTTP/1.1 200 OK\r\n\r\n"), "HTTP 200, but the answer is empty"),
        ("blank-200", answer(b" \r\n"), "HTTP 200, but the answer is empty"),
        ("captive-portal", html("200 OK", "Sign in"), "an HTML page: a captive portal, or not the"),
        ("two-documents", answer(b"{}{}"), "is not usable JSON: Extra data"),
        ("no-content", raw(b"HTTP/1.1 204 No\r\n\r\n"), "HTTP 204, but the answer is empty"),
    ),
    *broken(
        bus_containers.ApiError,
        ("switching-protocols", raw(b"HTTP/1.1 101 Switching\r\n\r\n"), "HTTP 101 Switching"),
        ("html-500", html("500 Oops", "Oops"), "HTTP 500 Oops"),
        ("300", answer(b"{}", "300 Multiple Choices"), "HTTP 300", "refused"),
        # An error's status counts, even where the rest of it is lost.
        ("407-and-closed", raw(message(b"<", "407 Who", length=9)), "HTTP 407 Who", "refused"),
        ("402-and-gzip", answer(b"\x1f", "402 Pay", "Content-Encoding: gzip"), "402", "refused"),
        ("402-and-bad-length", answer(b"", "402 Pay", "Content-Length: z"), "402", "refused"),
        ("402-negative-chunk", raw(CHUNKED.replace(b"200 OK", b"402 No") + b"-5\r\nhello\r\n"),
         "HTTP 402 No", "refused"),
        ("300-negative-chunk", raw(CHUNKED.replace(b"200 OK", b"300 So") + b"-5\r\nhello\r\n"),
         "HTTP 300 So", "refused"),
        ("503-and-reset", reset(message(b"<", "503 X", length=9)), "HTTP 503 X", "unknown", 3),
        ("502-and-bad-length", answer(b"", "502 X", "Content-Length: z"), "502 X", "unknown", 3),
        ("504", html("504 Gateway Time-out", "504"), "HTTP 504 Gateway Time-out", "unknown", 3),
    ),
]  # fmt: skip


def check_broken(case: Broken) -> None:
    for method, name, args in (("POST", "runs", [["true"]]), ("GET", "status", [])):
        with Hostile(case.script) as server, pytest.raises(case.kind) as caught:
            client = bus_containers.Client(server.url, CANARY)
            getattr(client, "run" if args else name)(*args)
        text = str(caught.value)
        assert type(caught.value) is case.kind
        assert text.startswith(f"{method} {server.url}/api/v1/containers/{name}: ")
        assert re.search(case.says, text), text
        assert "<" not in text
        assert caught.value.run_state == (case.state if args else None)
        assert text.endswith(f"; {ADVICE}") == (case.state == "unknown" and bool(args))
        assert server.methods() == [method] * (1 if args else case.tries)


@pytest.mark.usefixtures("hasty")
def test_a_broken_answer() -> None:
    """To a run, which is never sent again, and to a status."""
    check_each(check_broken, BROKEN, workers=20)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (raw(message(b"x" * 3_000_000)), "the answer is larger than 1 GiB"),
        (raw(message(b"x" * 3_000_000, "402 Pay")), "HTTP 402 Pay"),
        (then_hold(CHUNKED + b"-1\r\n" + b"x" * 3_000_000), "runs"),
    ],
    ids=["length", "402", "chunk of -1"],
)
def test_an_answer_that_is_too_large(
    script: Script, told: str, cli: InProcess, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_containers, "_MAX_ANSWER_BYTES", 1_000_000)  # more than a buffer
    result = cli("run", "true", at=serve(script))
    check_failure(result, 125, told)
    assert result.spoken.advises == ("402" not in told)
    assert result.seconds < LIMIT


@pytest.mark.parametrize(
    "kind",
    [
        "Multipart/mixed; boundary*=idna''x",
        'Multipart/mixed; x="' + (";" * 60_000 + "\r\n ") * 4,
        "message/rfc822\r\rContent-Type: " * 2000,
        "message/delivery-status\r\r" + ("\r\r" * 31_000 + "\r\n ") * 4 + "x",
        ("x\r\nX-Y: " + "\ra:b" * 16_000) * 90,
    ],
    ids=["multipart", "long multipart", "message", "status", "lines"],
)
def test_an_answer_that_says_it_has_many_parts(kind: str, cli: InProcess, serve: Serve) -> None:
    """email would look for them when it parses the header, for minutes, or raise what it likes.

    A bare CR ends a line for email, but not for http.client, which limits the lines.
    """
    data = message(BODIES["run"]).replace(b"application/json", kind.encode())
    result = cli("run", "true", at=serve(raw(data)))
    assert (result.code, result.err) == (0, b"")
    assert result.seconds < LIMIT / 4
    if len(kind) < 100:
        told = cli("-vv", "run", "true", at=serve(raw(data))).message
        assert f"< Content-Type: {kind}\n" in told


def test_what_only_looks_like_many_parts(cli: InProcess, serve: Serve) -> None:
    """It is told as it came."""
    data = message(b"", "302 message/moved", "Location: /multipart/1")
    told = cli("-vv", "run", "true", at=serve(raw(data))).message
    assert "< 302 message/moved\n" in told
    assert "< Location: /multipart/1\n" in told
    assert "HTTP 302 message/moved; redirected to /multipart/1, not followed" in told


@pytest.mark.parametrize("size", tiers([1_000_000, 4_000_000], 4_000_000))
def test_an_error_of_megabytes(size: int, serve: Serve) -> None:
    """An error that is larger than any of the API is not read to its end."""
    body = json.dumps({"error": {"message": "no", "texts": ["abcdefgh%"] * (size // 13)}}).encode()
    client = bus_containers.Client(serve(raw(message(body, "403 Forbidden"))).url, "abcdefg+/")
    with pytest.raises(bus_containers.ApiError) as caught:
        client.run(["true"])
    assert caught.value.run_state == "refused"
    assert caught.value.message == ("no" if size == 1_000_000 else None)


def test_a_connection_that_cannot_be_closed(
    cli: InProcess, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has arrived by then is as good as ever."""
    close = socket.socket.close

    def fail(self: socket.socket) -> None:
        was_open = self.fileno() != -1  # what is closed already is never refused
        close(self)
        is_ours = threading.current_thread() is threading.main_thread()
        if was_open and is_ours:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(socket.socket, "close", fail)
    result = cli("run", "true", at=api)
    assert (result.code, result.err) == (0, b"")


def test_a_name_whose_error_is_in_another_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As getaddrinfo of Python tells it where a host has called setlocale, with Latin-1, say."""

    def fail(*_: object) -> None:
        b"Nimi\xe4 ei tunneta".decode()

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    client = bus_containers.Client("http://platform.test", CANARY)
    with pytest.raises(bus_containers.TransportError, match="cannot resolve the name") as caught:
        client.run(["true"])
    assert (caught.value.run_state, caught.value.retryable) == ("not_sent", True)


class SelfConnecting(socket.socket):
    """Gets the port that it connects to, as may happen where nobody listens at one of many."""

    def connect(self, address: Any) -> None:
        self.bind(address)
        super().connect(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::1]"])
def test_a_port_that_is_connected_to_itself(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 6.4: nobody is there, so it is as if the port refused."""
    skip_if(why_no_ipv6() if ":" in host else "")
    with refused_port() as port:
        pass
    monkeypatch.setattr(socket, "socket", SelfConnecting)
    with pytest.raises(bus_containers.TransportError, match="connected to itself") as caught:
        bus_containers.Client(f"http://{host}:{port}", CANARY).run(["true"], timeout=0.2)
    assert (caught.value.run_state, caught.value.retryable) == ("not_sent", True)


# The body of an error, and a part of what is said of it.
ODD: dict[str, tuple[bytes, str]] = {
    "string": (b'{"error":"the backend is asleep"}', ": the backend is asleep"),
    "list": (b'{"error":["a","b"]}', ""),
    "error-beside": (b'{"message":"asleep","error_description":"x"}', ": asleep"),
    "empty": (b"", ""),
    "nan": (b'{"error":{"type":NaN,"message":"m"}}', ""),
    "deep": (b'{"error":' + b"[" * 200_000, ""),
    "all-null": (b'{"error":{"type":null,"message":null,"action":null,"command":null}}', ""),
    "all-blank": (b'{"error":{"type":" ","message":"","action":"\\t","command":" "}}', ""),
    "message-list": (b'{"error":{"type":"odd","message":["one","two"]}}', " odd"),
    "numbers": (b'{"error":{"message":"a reason","type":5,"action":6,"command":7}}', ": a reason"),
    "usage-string": (b'{"error":{"message":"a reason","usage":"all"}}', ": a reason"),
    "lone-surrogate": (b'{"error":{"message":"a \\ud800 reason"}}', ": a \\ud800 reason"),
    "not-utf-8": (b'{"error":{"message":"a \xff reason"}}', ": a \ufffd reason"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_error_of_an_odd_shape(name: str, cli: InProcess, api: Api) -> None:
    """Its status says enough, and what of it is text is shown."""
    body, says = ODD[name]
    result = cli(*words("run"), at=api.answers(body, status="400 Odd"))
    said = check_failure(result, 125).partition(": HTTP 400")[2]
    assert said == (says if says.startswith(" ") else f" Odd{says}")


@pytest.mark.parametrize("blank", [" ", "\t \t"])
def test_a_blank_after_a_header(blank: str, cli: InProcess, serve: Serve) -> None:
    """It is no part of the value, so the chunks are known, and nobody waits for an end."""
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODIES["run"]), BODIES["run"])
    head = CHUNKED.replace(b"chunked", b"chunked" + blank.encode())
    result = cli("--timeout", "9s", *words("run"), at=serve(then_hold(head + body)))
    assert result[:3] == (0, as_json(DOCUMENTS["run"]), b"")


@pytest.mark.parametrize("linger", [True, False], ids=["reads-on", "resets"])
def test_an_answer_that_comes_before_the_request_was_read(
    linger: bool, cli: InProcess, serve: Serve
) -> None:
    early = message(b"<html><title>413 Too Large</title></html>", "413 Too Large")
    server = serve(answer_unread(early, linger))
    check_failure(cli(*LARGE, at=server), 125, "HTTP 413 Too Large")
    assert server.connections == 1


@pytest.mark.parametrize("linger", [True, False], ids=["reads-on", "resets"])
def test_an_answer_by_tls_that_comes_before_the_request_was_read(
    linger: bool, cli: InProcess, serve: Serve, certificates: Certificates
) -> None:
    early = answer_unread(message(b"", "413 Too Large"), linger)
    server = serve(early, tls=certificates.context(certificates.good))
    result = cli(*LARGE, at=server, env={"SSL_CERT_FILE": str(certificates.ca)})
    check_failure(result, 125, "HTTP 413 Too Large")


def test_an_interim_answer_is_not_the_answer(cli: InProcess, serve: Serve) -> None:
    head = b"HTTP/1.1 %s\r\nLink: </style.css>; rel=preload\r\n\r\n"
    heads = b"".join(head % one for one in (b"100 Continue", b"102 Processing", b"103 Early Hints"))
    body = BODIES["run"].replace(b'"exit_code": 0', b'"exit_code": 37')
    result = cli(*words("run"), at=serve(raw(heads * 2 + message(body))))
    assert (result.code, result.err) == (37, b"")
    assert result.document == json.loads(body)


# --- TLS --------------------------------------------------------------------------------------

HEADERS = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n"
ALERTS = {  # the number of an alert of TLS 1.2, and what was sent before it
    "bad-record": (20, b"H"),
    "revoked": (44, HEADERS),
    "expired": (45, HEADERS + b"\r\n{"),
    "certificate-required": (116, b""),
    "certificate-required-late": (116, HEADERS),
    "none": (0, message(BODIES["run"])),  # the peer speaks TLS: its answer is a good one
}


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_after_the_request_was_read(
    name: str, cli: InProcess, serve: Serve, certificates: Certificates
) -> None:
    """Promise 6.4: a server that has read the whole request may have started the run."""
    number, sent = ALERTS[name]

    def script(connection: Connection) -> None:
        tls = AlertingTls(connection, certificates)
        tls.read_request()
        if sent:
            tls.send(sent)
        if number:
            tls.alert(number)
        connection.hold()

    server = serve(script, scheme="https")
    env = {"SSL_CERT_FILE": str(certificates.ca)}
    result = cli("--error-format", "json", *words("run"), at=server, env={**env})
    if number:
        [one] = result.objects
        assert (result.code, result.out, one["run_state"]) == (125, b"", "unknown")
        assert ADVICE in one["text"]
    else:
        assert (result.code, result.err, result.document) == (0, b"", DOCUMENTS["run"])
    assert server.methods() == ["POST"]


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_CORK, for all of it in one packet")
def test_an_answer_behind_a_question_of_tls(
    cli: InProcess, serve: Serve, certificates: Certificates
) -> None:
    """The server has left, so ours cannot be sent, but its own answer is whole."""

    def script(connection: Connection) -> None:
        tls = AlertingTls(connection, certificates)
        tls.read_request()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        tls.ask_for_another_handshake()
        tls.send(message(BODIES["run"]))
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        connection.sock.close()

    env: Env = {"SSL_CERT_FILE": str(certificates.ca)}
    result = cli(*words("run"), at=serve(script, scheme="https"), env=env)
    assert (result.code, result.err, result.document) == (0, b"", DOCUMENTS["run"])


# --- a poor machine ---------------------------------------------------------------------------


def test_a_python_without_ssl(program: Program, serve: Serve) -> None:
    """An answer over plain http is good there, and one that is cut short is told as such."""
    script = "import runpy, sys; sys.modules['_ssl'] = None; del sys.argv[0]; "
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    place = program.command[-1]
    poor = Program([sys.executable, "-c", script, place], program.home)
    server = serve(raw(CHUNKED + b"40\r\n{"), answer(BODIES["run"]))
    check_failure(poor(*words("run"), at=server), 125, "the connection was lost", ADVICE)
    assert poor(*words("run"), at=server)[:3] == (0, as_json(DOCUMENTS["run"]), b"")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("memory", tiers([60_000, 100_000, 120_000, 145_000, 175_000], 100_000))
def test_little_memory(memory: int, program: Program, serve: Serve) -> None:
    """Promise 6.3: explaining an error needs no import that may fail, nor much memory."""
    limited = ["sh", "-c", f'ulimit -v {memory} && exec "$@"', "sh", *program.command]
    body = b'{"run_id":"r","exit_code":0,"stdout":"' + 60_000_000 * b"x" + b'"}'
    data = message(body)
    if memory == 60_000:
        data = message(body[:20_000_000], length=20_000_001)
    result = Program(limited, program.home)(*words("run"), at=serve(raw(data)))
    if memory > 170_000 and result.code == 0:  # which Pythons differ in
        assert (result.document, result.err) == (json.loads(body), b"")
    else:
        line = check_failure(result, 125, "" if memory == 60_000 else "memory")
        assert (ADVICE in line) == ("memory to write" not in line)


LITTLE_MEMORY = """
import json, resource, bus_containers
def load(text, **options):
    document = loads(text, **options)
    if len(text) > 1_000_000:
        with open("/proc/self/status") as file:
            [used] = [int(line.split()[1]) << 10 for line in file if line.startswith("VmData:")]
        most = used + (8 << 20)  # enough to check how deep it is, but not for another one
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return document
loads, json.loads = json.loads, load
bus_containers.console()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_little_memory_for_a_failure_among_deletions(program: Program, serve: Serve) -> None:
    """The document of an error is parsed, and then there is no room for one without secrets."""
    place = os.path.dirname(str(bus_containers.__file__))
    error = b'{"error":{"type":"x"},"d":[%s]}' % b",".join([b"[]"] * 340_000)
    done = [answer(b'{"deleted":true,"run_id":"%c"}' % letter) for letter in b"ac"]
    server = serve(done[0], answer(error, "500 No"), done[1])
    host = Program([sys.executable, "-c", LITTLE_MEMORY], program.home)
    result = host("-f", "tsv", "delete", "a", "b", "c", at=server, env={"PYTHONPATH": place})
    assert (result.code, result.out) == (1, b"run_id\tdeleted\na\ttrue\nc\ttrue\n")
    assert "runs/b: there is not enough memory for it and its answer" in result.error
