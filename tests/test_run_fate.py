# SPDX-License-Identifier: MIT
"""What became of a run is told: promises 4.6, 6.3, 6.4, and 6.1 for the same faults of a GET.

A table of all the ways in which HTTP breaks, first; then how TLS breaks, and a machine without
memory or `_ssl`. Deadlines are in `test_nothing_hangs.py`, signals in `test_signals.py`.
"""

from __future__ import annotations

import json
import re
import sys
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
)
from support import (
    BODIES,
    CANARY,
    InProcess,
    Program,
    check_each,
    check_failure,
    second_tier,
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
    kind: str  # of the error
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


def broken(kind: str, *rows: tuple[Any, ...]) -> list[Broken]:
    return [Broken(row[0], row[1], kind, *row[2:]) for row in rows]


LOST = broken(
    "transport",
    ("reset-before-the-answer", reset(), "the connection was lost: .*reset"),
    ("reset-amid-headers", reset(OK_HEAD[:30]), "the connection was lost: .*reset"),
    ("reset-amid-body", reset(message(b'{"it', length=99)), "the connection was lost: .*reset"),
    ("closed-without-a-byte", close(), "the connection was lost: .*without"),
    ("closed-amid-headers", raw(OK_HEAD), "the connection was lost: the answer was cut short"),
    ("body-cut", raw(message(STATUS, length=999)), "the answer was cut short"),
    ("chunk-cut", raw(CHUNKED + b"40\r\n{"), "the answer was cut short"),
    ("chunks-without-an-end", raw(CHUNKED + b"2\r\n{}\r\n"), "the answer was cut short"),
    ("chunk-size-negative", raw(CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n"), "cut short"),
    ("chunk-size-not-a-number", raw(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n"), "cut short"),
)
BROKEN = [
    *(row._replace(tries=3) for row in LOST),
    *broken(
        "protocol",
        ("closed-amid-status-line", raw(b"HTTP/1."), "is not valid HTTP: HTTP/1"),
        ("ssh", raw(b"SSH-2.0-OpenSSH_9.2p1\r\n"), "is not valid HTTP: SSH-2.0-OpenSSH_9.2p1"),
        ("random-bytes", raw(bytes(range(128, 256)) * 9 + b"\r\n\r\n"), "is not valid HTTP"),
        ("html-alone", raw(b"<html><h1>Welcome</h1></html>\r\n"), "is not valid HTTP"),
        ("nul-bytes", raw(b"\0" * 500), "is not valid HTTP"),
        ("alert-of-a-tls-port", raw(b"\x15\3\1\0\2\2\x46"), "is this port for https\\?"),
        ("status-not-a-number", raw(b"HTTP/1.1 abc OK\r\n\r\n"), "is not valid HTTP"),
        ("status-of-two-digits", raw(b"HTTP/1.1 20 OK\r\n\r\n{}"), "is not valid HTTP"),
        ("status-line-too-long", raw(b"HTTP/1.1 200 " + LONG + b"\r\n\r\n"), "line"),
        ("header-too-long", raw(OK_HEAD + b"X: " + LONG + b"\r\n\r\n{}"), "line"),
        ("too-many-headers", raw(OK_HEAD + MANY + b"\r\n{}"), "100 headers"),
        ("length-not-a-number", framed("Content-Length: abc"), "has a bad Content-Length"),
        ("length-negative", framed("Content-Length: -5"), "has a bad Content-Length"),
        ("two-lengths", framed("Content-Length: 2\r\nContent-Length: 3"), "bad Content-Length"),
        ("coding-unknown", framed("Content-Encoding: br"), "unknown Content-Encoding br"),
        ("coding-not-asked-for", framed("Content-Encoding: gzip"), "Content-Encoding gzip"),
        ("empty-200", answer(b""), "HTTP 200, but the answer is empty"),
        ("blank-200", answer(b" \r\n"), "HTTP 200, but the answer is empty"),
        ("captive-portal", html("200 OK", "Sign in"), "an HTML page: a captive portal, or not the"),
        ("json-cut", answer(STATUS[:-9]), "HTTP 200, but the answer is not usable JSON: "),
        ("two-documents", answer(b"{}{}"), "is not usable JSON: Extra data"),
        ("a-string", answer(b'"ready"'), "the answer is of an unexpected type, str"),
        ("a-number", answer(b"42"), "the answer is of an unexpected type, int"),
        ("null", answer(b"null"), "the answer is of an unexpected type, NoneType"),
        ("true", answer(b"true"), "the answer is of an unexpected type, bool"),
        ("a-list", answer(b"[]"), "the answer is of an unexpected type, list"),
        ("nan", answer(b'{"items":[NaN]}'), "NaN"),
        ("infinity", answer(b'{"items":[-Infinity]}'), "-Infinity"),
        ("number-too-large", answer(b'{"items":[1e400]}'), "1e400"),
        ("digits", answer(b'{"a":' + b"7" * 10_000 + b"}"), "a number of more than 4,300 digits"),
        ("deep", answer(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "usable JSON"),
        ("utf-16", answer('{"items":[]}'.encode("utf-16")), "is not usable JSON"),
        ("no-content", raw(b"HTTP/1.1 204 No\r\n\r\n"), "HTTP 204, but the answer is empty"),
    ),
    *broken(
        "api",
        ("switching-protocols", raw(b"HTTP/1.1 101 Switching\r\n\r\n"), "HTTP 101 Switching"),
        ("html-500", html("500 Oops", "Oops"), "HTTP 500 Oops"),
        ("500-and-reset", reset(message(b"<", "500 Oops", length=9)), "HTTP 500 Oops"),
        ("300", answer(b"{}", "300 Multiple Choices"), "HTTP 300", "refused"),
        ("html-413", html("413 Too Large", "Too Large"), "HTTP 413 Too Large", "refused"),
        # An error's status counts, even where the rest of it is lost.
        ("413-and-reset", reset(message(b"<", "413 Big", length=9)), "HTTP 413 Big", "refused"),
        ("407-and-closed", raw(message(b"<", "407 Who", length=9)), "HTTP 407 Who", "refused"),
        ("402-and-gzip", answer(b"\x1f", "402 Pay", "Content-Encoding: gzip"), "402", "refused"),
        ("402-and-bad-length", answer(b"", "402 Pay", "Content-Length: z"), "402", "refused"),
        ("499", answer(b"{}", "499 Client Closed"), "HTTP 499", "refused"),
        ("302-without-a-target", answer(b"", "302 Found"), "HTTP 302 Found", "refused"),
        ("599", answer(b"{}", "599 Network"), "HTTP 599"),
        ("502", html("502 Bad Gateway", "502"), "HTTP 502 Bad Gateway", "unknown", 3),
        ("504", html("504 Gateway Time-out", "504"), "HTTP 504 Gateway Time-out", "unknown", 3),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.id)
def test_a_broken_answer_to_a_run(case: Broken, cli: InProcess, serve: Serve) -> None:
    server = serve(case.script)
    result = cli("--error-format", "json", *words("run"), at=server)
    [error] = [one for one in result.objects if one["kind"] != "warning"]
    assert (result.code, result.out) == (125, b"")
    assert (error["kind"], error["run_state"]) == (case.kind, case.state)
    assert error["text"].startswith(f"POST {server.url}/api/v1/containers/runs: ")
    assert re.search(case.says, error["text"]), error["text"]
    assert "<" not in error["text"]
    assert error["text"].endswith(f"; {ADVICE}") == (case.state == "unknown")
    assert server.methods() == ["POST"]


ERRORS: dict[str, type[bus_containers.BusContainersError]] = {
    "transport": bus_containers.TransportError,
    "protocol": bus_containers.ProtocolError,
    "api": bus_containers.ApiError,
}


def check_status(case: Broken) -> None:
    with Hostile(case.script) as server, pytest.raises(ERRORS[case.kind]) as caught:
        bus_containers.Client(server.url, CANARY).status()
    assert re.search(case.says, str(caught.value)), caught.value
    assert ADVICE not in str(caught.value)
    assert caught.value.run_state is None
    assert server.methods() == ["GET"] * case.tries


def test_a_broken_answer_to_a_status() -> None:
    """The same faults, for a call that can be made again."""
    check_each(check_status, BROKEN, workers=16)


# The body of an error, and a part of what is said of it.
ODD: dict[str, tuple[bytes, str]] = {
    "string": (b'{"error":"the backend is asleep"}', "the backend is asleep"),
    "list": (b'{"error":["a","b"]}', ""),
    "null": (b'{"error":null}', ""),
    "number": (b'{"error":7}', ""),
    "true": (b'{"error":true}', ""),
    "empty-object": (b'{"error":{}}', ""),
    "no-error": (b"{}", ""),
    "error-beside": (b'{"message":"asleep","error_description":"x"}', "asleep"),
    "bare-list": (b"[]", ""),
    "bare-string": (b'"no"', ""),
    "bare-null": (b"null", ""),
    "empty": (b"", ""),
    "plain-text": (b"no healthy upstream", ""),
    "json-cut": (b'{"error":{"type":"bad', ""),
    "nan": (b'{"error":{"type":NaN,"message":"m"}}', ""),
    "deep": (b'{"error":' + b"[" * 200_000, ""),
    "message-list": (b'{"error":{"type":"odd","message":["one","two"]}}', " odd"),
    "message-null": (b'{"error":{"type":"odd","message":null}}', " odd"),
    "message-number": (b'{"error":{"type":"odd","message":404}}', " odd"),
    "type-number": (b'{"error":{"type":5,"message":"a reason"}}', ": a reason"),
    "type-object": (b'{"error":{"type":{"a":1},"message":"a reason"}}', ": a reason"),
    "action-list": (b'{"error":{"type":"t","message":"a reason","action":[1]}}', " t: a reason"),
    "command-object": (b'{"error":{"message":"a reason","command":{}}}', ": a reason"),
    "usage-string": (b'{"error":{"message":"a reason","usage":"all"}}', ": a reason"),
    "odd-usage": (
        b'{"error":{"message":"a reason","recommended_plan":[],"usage":'
        b'{"window":3,"used":"many","limit":null,"remaining":-1e99,"upgrade_plan_id":{}}}}',
        ": a reason",
    ),
    "lone-surrogate": (b'{"error":{"message":"a \\ud800 reason"}}', ": a \\ud800 reason"),
    "not-utf-8": (b'{"error":{"message":"a \xff reason"}}', ": a \ufffd reason"),
    "drives-a-terminal": (
        b'{"error":{"type":"t\\u001b[2J","message":"a\\u0007\\u009b31m\\r\\nb","action":"\\u007f"}}',
        " t\\x1b[2J: a\\x07\\x9b31m\\r\\nb; action: \\x7f",
    ),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("status", tiers([400, 500], 400))
def test_an_error_of_an_odd_shape(name: str, status: int, cli: InProcess, api: Api) -> None:
    """Its status says enough, and what of it is text is shown."""
    body, says = ODD[name]
    result = cli(*words("run"), at=api.answers(body, status=f"{status} Odd"))
    check_failure(result, 125, f"HTTP {status}", says)
    assert result.spoken.advises == (status == 500)
    assert api.methods() == ["POST"]


@pytest.mark.parametrize("case", [LOST[2], *LOST[5:]], ids=lambda case: case.id)
def test_whoever_speaks_http_is_not_a_port_for_https(
    case: Broken, cli: InProcess, serve: Serve
) -> None:
    """The question helps only where nothing came that was HTTP."""
    result = cli(*words("run"), at=serve(case.script))
    assert "https" not in check_failure(result, 125, ADVICE)


class Line(NamedTuple):
    """A whole line after its `POST URL: `, for each kind of error."""

    id: str
    script: Script | None
    text: str


LINES = [
    Line("transport", reset(),
         "the connection was lost: Connection reset by peer; is this port for https?; ADVICE",),
    Line("refused-connection", None,
         "cannot connect to the API: Connection refused; check BUS_AI_API_URL; "
         "`bus-containers status --wait 60s` waits for a platform"),
    Line("protocol", answer(b"{"),
         "HTTP 200, but the answer is not usable JSON: Expecting property name enclosed in double "
         "quotes: line 1 column 2 (char 1); ADVICE"),
    Line("api-unknown", answer(BODIES["run"], "500 Oops"), "HTTP 500 Oops; ADVICE"),
    Line("api-refused", answer(b'{"error":{"type":"forbidden","message":"not yours"}}', "403 No"),
         "HTTP 403 forbidden: not yours"),
]  # fmt: skip


@pytest.mark.parametrize("case", LINES, ids=lambda case: case.id)
def test_the_whole_line(case: Line, cli: InProcess, serve: Serve) -> None:
    with refused_port() as port:
        url = serve(case.script).url if case.script else f"http://127.0.0.1:{port}"
        env = {"BUS_AI_API_URL": url, "BUS_AI_TOKEN": CANARY}
        result = cli(*words("run"), env={**env})
    where = f"POST {url}/api/v1/containers/runs"
    line = f"bus-containers: {where}: {case.text.replace('ADVICE', ADVICE)}\n"
    assert (result.code, result.message) == (125, line)


@pytest.mark.parametrize(
    ("status", "retryable"),
    [
        (status, status in (408, 425, 429))
        for status in (300, 400, 403, 404, 408, 425, 429, 500, 503)
    ],
)
def test_a_run_may_be_started_again_only_where_there_is_none(
    status: int, retryable: bool, api: Api
) -> None:
    """Promise 4.5: an answer of 429 has refused the run, one of 503 may have started it."""
    with pytest.raises(bus_containers.ApiError) as caught:
        bus_containers.Client(api.answers({}, status=f"{status} X").url, CANARY).run(["true"])
    assert caught.value.retryable is retryable
    assert caught.value.run_state == ("refused" if status < 500 else "unknown")


@pytest.mark.parametrize("linger", [True, False], ids=["reads-on", "resets"])
def test_an_answer_that_comes_before_the_request_was_read(
    linger: bool, cli: InProcess, serve: Serve
) -> None:
    early = message(b"<html><title>413 Too Large</title></html>", "413 Too Large")
    server = serve(answer_unread(early, linger))
    check_failure(cli(*LARGE, at=server), 125, "HTTP 413 Too Large")
    assert server.connections == 1


@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_an_interim_answer_is_not_the_answer(interim: str, cli: InProcess, serve: Serve) -> None:
    head = f"HTTP/1.1 {interim}\r\nLink: </style.css>; rel=preload\r\n\r\n".encode()
    body = BODIES["run"].replace(b'"exit_code": 0', b'"exit_code": 37')
    result = cli(*words("run"), at=serve(raw(head * 5 + message(body))))
    assert (result.code, result.err) == (37, b"")
    assert result.document == json.loads(body)


# --- TLS --------------------------------------------------------------------------------------

TLS_12_ALERTS = {
    "bad-record": 20,
    "revoked": 44,
    "expired": 45,
    "unknown": 46,
    "certificate-required": 116,
}
HEADERS = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n"


@pytest.mark.parametrize(
    "sent", [b"", b"H", HEADERS, HEADERS + b"\r\n{"], ids=lambda sent: len(sent)
)
@pytest.mark.parametrize("number", TLS_12_ALERTS.values(), ids=TLS_12_ALERTS.keys())
def test_an_alert_after_the_request_was_read(
    number: int, sent: bytes, cli: InProcess, serve: Serve, certificates: Certificates
) -> None:
    """Promise 6.4: a server that has read the whole request may have started the run."""

    def script(connection: Connection) -> None:
        tls = AlertingTls(connection, certificates)
        tls.read_request()
        if sent:
            tls.send(sent)
        tls.alert(number)
        connection.hold()

    server = serve(script, scheme="https")
    env = {"SSL_CERT_FILE": str(certificates.ca)}
    result = cli("--error-format", "json", *words("run"), at=server, env={**env})
    assert (result.code, result.out) == (125, b"")
    assert [one["run_state"] for one in result.objects] == ["unknown"]
    assert ADVICE in result.objects[0]["text"]
    assert server.methods() == ["POST"]


def test_the_peer_that_sends_alerts_speaks_tls(
    cli: InProcess, serve: Serve, certificates: Certificates
) -> None:
    """Without an alert its answer is a good one."""

    def script(connection: Connection) -> None:
        tls = AlertingTls(connection, certificates)
        tls.read_request()
        tls.send(message(BODIES["run"]))

    env = {"SSL_CERT_FILE": str(certificates.ca)}
    result = cli(*words("run"), at=serve(script, scheme="https"), env={**env})
    assert (result.code, result.err) == (0, b"")


# --- a poor machine ---------------------------------------------------------------------------


def on_a_python_without_ssl(program: Program) -> Program:
    script = "import runpy, sys; sys.modules['_ssl'] = None; del sys.argv[0]; "
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    poor = Program([sys.executable, "-c", script, *program.command[1:]], program.home)
    if len(program.command) == 1:
        poor.command.append(program.command[0])
    return poor


@pytest.mark.parametrize(
    "script", [row.script for row in LOST[:6]], ids=[row.id for row in LOST[:6]]
)
def test_a_python_without_ssl(script: Script, program: Program, serve: Serve) -> None:
    """An answer over plain http that is cut short is told as such, on any Python."""
    result = on_a_python_without_ssl(program)(*words("run"), at=serve(script))
    check_failure(result, 125, "the connection was lost", ADVICE)


def test_a_good_answer_on_a_python_without_ssl(program: Program, serve: Serve) -> None:
    result = on_a_python_without_ssl(program)(*words("run"), at=serve(answer(BODIES["run"])))
    assert (result.code, result.err) == (0, b"")


def with_memory(kilobytes: int, program: Program) -> Program:
    script = f'ulimit -v {kilobytes} && exec "$@"'
    return Program(["sh", "-c", script, "sh", *program.command], program.home)


NOT_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
PRINTED = b'{"run_id":"r","exit_code":0,"stdout":"' + 60_000_000 * b"x" + b'"}'


@NOT_LINUX
def test_an_answer_too_large_for_the_memory(program: Program, serve: Serve) -> None:
    result = with_memory(100_000, program)(*words("run"), at=serve(answer(PRINTED)))
    check_failure(result, 125, "the answer is too large for this machine's memory", ADVICE)


@NOT_LINUX
@second_tier
@pytest.mark.parametrize("kilobytes", range(150_000, 450_000, 25_000))
def test_any_little_memory(kilobytes: int, program: Program, serve: Serve) -> None:
    """Whatever there is too little memory for is told, and then what became of the run."""
    result = with_memory(kilobytes, program)(*words("run"), at=serve(answer(PRINTED)))
    if result.code == 0:  # there was enough
        assert (result.document, result.err) == (json.loads(PRINTED), b"")
    else:
        line = check_failure(result, 125, "memory")
        assert (ADVICE in line) == ("memory to write" not in line)


@NOT_LINUX
@second_tier
@pytest.mark.parametrize("kilobytes", [60_000, 100_000, 150_000, 200_000])
def test_a_cut_answer_where_there_is_little_memory(
    kilobytes: int, program: Program, serve: Serve
) -> None:
    """Promise 6.3: explaining an error needs no import that may fail."""
    cut = raw(message(PRINTED[:20_000_000], length=20_000_001))
    check_failure(with_memory(kilobytes, program)(*words("run"), at=serve(cut)), 125, ADVICE)
