# SPDX-License-Identifier: MIT
"""The network misbehaves: CONTRACT section 5 against servers made of raw sockets.

Every failure is one line that starts with `bus-containers: `, has the right exit code and leaves
standard output empty; for a run it says whether the run may be going on. Deadlines, signals and
retries are measured and counted. Tables are worked off side by side (`Herd`), as they mostly wait.
"""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import Program, Result
from hostile import (
    LIMIT,
    Certificates,
    Connection,
    Herd,
    Hostile,
    NameServer,
    Script,
    again_and_again,
    answer,
    answer_unread,
    close,
    drip,
    drip_at_once,
    full_port,
    hold_at_once,
    html,
    message,
    never_read,
    raw,
    refused_port,
    reset,
    silent,
    spoken,
    then_hold,
    together,
    why_no_name_server,
    why_no_namespace,
    why_no_openssl,
    with_files,
)

RUN = ("run", "--", "true")
# 19 words of 100 KB: more than the buffers of two sockets take when the reader does not read.
LARGE = ("run", "--", *("x" * 100_000 for _ in range(19)))
STATUS = ("status",)
STATUS_DOCUMENT = b'{"items":[{"id":"runner","state":"ready"}]}'
DELETED = b'{"deleted":true,"run_id":"run-1","owner_identity_id":"me"}'


def run_document(exit_code: str = "0", stdout: bytes = b"OK") -> bytes:
    """A run's answer; `exit_code` is JSON, `stdout` the inside of a JSON string."""
    return (
        b'{"run_id":"run-1","owner_identity_id":"me","runner_name":"runner","image":"codex",'
        b'"args":["true"],"exit_code":%s,"stdout":"%s","stderr":"","duration_ms":7,'
        b'"runtime":"docker"}' % (exit_code.encode(), stdout)
    )


def by_id(table: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table, ids=[case.id for case in table])


@pytest.fixture(scope="module")
def cli(command: list[str], tmp_path_factory: pytest.TempPathFactory, canary: str) -> Program:
    """The program with the canary as its token."""
    program = Program(command, tmp_path_factory.mktemp("home"))
    program.environ["BUS_AI_TOKEN"] = canary
    return program


Main = Callable[..., Result]


@pytest.fixture
def main(
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    tmp_path: Path,
    canary: str,
) -> Main:
    """The same in this process, where a process of its own would prove no more."""
    import bus_containers

    def call(*args: str, **env: str) -> Result:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        start = time.monotonic()
        code = bus_containers.main([*args])
        return Result(code, *capfdbinary.readouterr(), time.monotonic() - start)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BUS_AI_TOKEN", canary)
    return call


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if why_no_openssl():
        pytest.skip(why_no_openssl())
    return Certificates(tmp_path_factory.mktemp("certificates"))


class Outcome(NamedTuple):
    """What the program did, and what reached the server."""

    result: Result
    connections: int
    methods: list[str]


def attempt(cli: Program, script: Script, *args: str) -> Outcome:
    with Hostile(script) as server:
        result = cli("--api-url", server.url, *args)
    return Outcome(result, server.connections, server.methods())


def failed(result: Result, code: int, canary: str, *says: str, advice: bool = False) -> str:
    """Check what holds for every failure; `says` are patterns that the message must match."""
    told = spoken(result.err)
    assert result.code == code, told.text
    assert result.out == b""
    assert len(told.errors) == 1, told.text
    assert told.text.startswith("bus-containers: ")
    for pattern in says:
        assert re.search(pattern, told.text, re.I), (pattern, told.text)
    assert told.advises == advice, told.text
    assert canary not in told.text
    return told.text


# --- every way in which HTTP breaks -----------------------------------------------------------


class Broken(NamedTuple):
    """A server's answer, and what the client makes of it."""

    id: str
    script: Script
    says: str  # a pattern in the message
    kind: str  # the library's exception
    run_state: str = "unknown"
    tries: int = 1  # how often a GET is sent


OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LONG = b"a" * 70_000
TRANSPORT, PROTOCOL, API = "TransportError", "ProtocolError", "ApiError"


def page(status: str, title: str, **more: Any) -> Broken:
    number = status[:3]
    state = "refused" if number[0] in "34" else "unknown"
    return Broken(f"html-{number}", html(status, title), number, API, state, **more)


def document(name: str, body: bytes, says: str = "json") -> Broken:
    return Broken(f"json-{name}", answer(body), says, PROTOCOL)


BROKEN = [
    # the connection
    Broken("reset-before-the-answer", reset(), "reset", TRANSPORT, tries=3),
    Broken("reset-amid-headers", reset(OK_HEAD[:30]), "reset|closed|lost", TRANSPORT, tries=3),
    Broken(
        "reset-amid-body", reset(message(b'{"it', length=99)), "reset|cut|lost", TRANSPORT, tries=3
    ),
    Broken("closed-without-a-byte", close(), "closed|without|lost", TRANSPORT, tries=3),
    Broken("closed-amid-status-line", raw(b"HTTP/1."), "http|closed", ""),
    Broken("closed-amid-headers", raw(OK_HEAD), "cut short", TRANSPORT, tries=3),
    # not HTTP
    Broken("ssh", raw(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"), "http", PROTOCOL),
    Broken("random-bytes", raw(bytes(range(128, 256)) * 9 + b"\r\n\r\n"), "http", PROTOCOL),
    Broken("nul-bytes", raw(b"\0" * 500), "http", PROTOCOL),
    Broken("status-not-a-number", raw(b"HTTP/1.1 abc OK\r\n\r\n"), "", PROTOCOL),
    Broken("status-of-two-digits", raw(b"HTTP/1.1 20 OK\r\n\r\n{}"), "", PROTOCOL),
    Broken("status-line-too-long", raw(b"HTTP/1.1 200 " + LONG + b"\r\n\r\n"), "line", PROTOCOL),
    Broken("header-too-long", raw(OK_HEAD + b"X: " + LONG + b"\r\n\r\n{}"), "line", PROTOCOL),
    Broken(
        "too-many-headers",
        raw(OK_HEAD + b"".join(b"X-%d: y\r\n" % n for n in range(150)) + b"\r\n{}"),
        "headers",
        PROTOCOL,
    ),
    Broken("switching-protocols", raw(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), "", ""),
    # the body's length and coding
    Broken(
        "body-cut", raw(message(STATUS_DOCUMENT, length=99)), "cut|short|43|incomp", "", tries=3
    ),
    Broken("chunk-cut", raw(CHUNKED + b"40\r\n{"), "", "", tries=3),
    Broken("chunks-without-an-end", raw(CHUNKED + b"2\r\n{}\r\n"), "", "", tries=3),
    Broken("chunk-size-no-number", raw(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n"), "", "", tries=3),
    Broken("length-no-number", answer(b"{}", "200 OK", "Content-Length: abc"), "length", PROTOCOL),
    Broken("length-negative", answer(b"{}", "200 OK", "Content-Length: -5"), "length", PROTOCOL),
    Broken(
        "coding-unknown",
        answer(b"\x0b\x02\x80{}\x03", "200 OK", "Content-Encoding: br"),
        "br",
        PROTOCOL,
    ),
    Broken(
        "coding-not-asked-for",
        answer(b"\x1f\x8b\x08", "200 OK", "Content-Encoding: gzip"),
        "gzip",
        PROTOCOL,
    ),
    Broken("empty-200", answer(b""), "empty|no document|no body", PROTOCOL),
    # no API
    Broken("captive-portal", html("200 OK", "Sign in to Free WiFi"), "html|json", PROTOCOL),
    page("502 Bad Gateway", "502 Bad Gateway", tries=3),
    page("504 Gateway Time-out", "504 Gateway Time-out", tries=3),
    page("413 Request Entity Too Large", "413 Request Entity Too Large"),
    # an error's status counts even where the rest of it is lost
    Broken("413-and-reset", reset(message(b"<", "413 Too Large", length=9)), "413", API, "refused"),
    Broken("407-and-closed", raw(message(b"<", "407 Who", length=9)), "407", API, "refused"),
    Broken("500-and-reset", reset(message(b"<", "500 Oops", length=9)), "500", API),
    Broken("redirect-without-a-target", answer(b"", "302 Found"), "302", API, "refused"),
    # JSON
    document("cut", STATUS_DOCUMENT[:-9]),
    document("of-two", b"{}{}"),
    document("string", b'"ready"', "type|object"),
    document("number", b"42", "type|object"),
    document("null", b"null", "type|object"),
    document("true", b"true", "type|object"),
    document("nan", b'{"items":[NaN]}', "nan|json"),
    document("infinity", b'{"items":[-Infinity]}', "infinity|json"),
    document("number-too-large", b'{"items":[1e400]}', "1e400|large|range|number|json"),
    document("nested-200000", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    document("digits-10000", b'{"a":' + b"7" * 10_000 + b"}", "digit|number|long"),
    document("utf-16", '{"items":[]}'.encode("utf-16")),
]


@pytest.fixture(scope="module")
def broken_runs(cli: Program) -> Iterator[Herd[Broken, Outcome]]:
    with Herd(lambda case: attempt(cli, case.script, *RUN), BROKEN) as herd:
        yield herd


@pytest.fixture(scope="module")
def broken_statuses(cli: Program) -> Iterator[Herd[Broken, Outcome]]:
    args = ("--error-format", "json", *STATUS)
    with Herd(lambda case: attempt(cli, case.script, *args), BROKEN, workers=8) as herd:
        yield herd


@by_id(BROKEN)
def test_a_broken_answer_to_a_run(
    case: Broken, broken_runs: Herd[Broken, Outcome], canary: str
) -> None:
    outcome = broken_runs.outcome(case)
    failed(outcome.result, 125, canary, case.says, advice=case.run_state == "unknown")
    assert outcome.methods == ["POST"]
    assert outcome.connections == 1


@by_id(BROKEN)
def test_a_broken_answer_to_a_status(
    case: Broken, broken_statuses: Herd[Broken, Outcome], canary: str
) -> None:
    outcome = broken_statuses.outcome(case)
    told = spoken(outcome.result.err)
    assert outcome.result.code == 1, told.text
    assert outcome.result.out == b""
    *warnings, error = map(json.loads, told.text.splitlines())
    assert all(warning["kind"] == "warning" for warning in warnings)
    for name in ("kind", "status", "type", "message", "action", "command", "document", "retryable"):
        assert name in error
    assert re.search(case.says, error["message"], re.I)
    assert canary not in told.text
    assert outcome.methods == ["GET"] * case.tries
    assert outcome.result.seconds < 10


@by_id(BROKEN)
def test_a_broken_answer_in_the_library(case: Broken, canary: str) -> None:
    import bus_containers

    with Hostile(case.script) as server:
        client = bus_containers.Client(server.url, canary)
        with pytest.raises(bus_containers.BusContainersError) as caught:
            client.run(["true"])
    error: Any = caught.value
    assert error.run_state == case.run_state
    assert not case.kind or isinstance(error, getattr(bus_containers, case.kind))
    assert not isinstance(error, bus_containers.DeadlineError)
    assert server.methods() == ["POST"]


@pytest.mark.parametrize("args", [RUN, STATUS], ids=["run", "status"])
@pytest.mark.parametrize("levels", [900, 980, 1200])
def test_an_answer_too_deep_to_be_written_is_told_or_written_whole(
    cli: Program, args: tuple[str, ...], levels: int
) -> None:
    body = b'{"exit_code":0,"items":' + b"[" * levels + b"]" * levels + b"}"
    with Hostile(answer(body)) as server:
        result = cli("--api-url", server.url, *args)
    told = spoken(result.err)
    if result.code == 0:
        assert not told.text
        assert result.out
    else:
        assert result.code == (125 if args is RUN else 1), told.text
        assert len(told.errors) == 1, told.text
    if result.out:
        assert result.out.count(b"[") == result.out.count(b"]") == levels
        assert result.out.endswith(b"}\n")


@pytest.mark.parametrize("linger", [True, False], ids=["reads-on", "resets"])
def test_an_answer_that_comes_before_the_request_was_read(
    cli: Program, linger: bool, canary: str
) -> None:
    early = message(b"<html><title>413 Too Large</title></html>", "413 Too Large")
    with Hostile(answer_unread(early, linger)) as server:
        failed(cli("--api-url", server.url, *LARGE), 125, canary, "413")
    assert server.connections == 1


def test_a_refused_connection_never_sent_the_run(cli: Program, canary: str) -> None:
    with refused_port() as port:
        url = f"http://127.0.0.1:{port}"
        run, status = together(
            lambda: cli("--api-url", url, *RUN), lambda: cli("--api-url", url, *STATUS)
        )
    text = failed(run, 125, canary, "refused", str(port))
    assert "bus-containers delete" not in text
    failed(status, 1, canary, "refused", str(port))


@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_an_interim_answer_is_not_taken_for_the_answer(cli: Program, interim: str) -> None:
    head = f"HTTP/1.1 {interim}\r\nLink: </style.css>; rel=preload\r\n\r\n".encode()
    with Hostile(raw(head * 5 + message(run_document("37")))) as server:
        result = cli("--api-url", server.url, *RUN)
    assert result.code == 37
    assert json.loads(result.out)["run_id"] == "run-1"
    assert result.err == b""


# --- errors of odd shapes ---------------------------------------------------------------------


class Odd(NamedTuple):
    """The body of an error answer; `says` is what of it must reach the user."""

    id: str
    body: bytes
    says: str = ""


ODD = [
    Odd("string", b'{"error":"the backend is asleep"}', "the backend is asleep"),
    Odd("list", b'{"error":["a","b"]}'),
    Odd("null", b'{"error":null}'),
    Odd("number", b'{"error":7}'),
    Odd("true", b'{"error":true}'),
    Odd("empty-object", b'{"error":{}}'),
    Odd("no-error", b"{}"),
    Odd("error-beside", b'{"message":"asleep","error_description":"x"}'),
    Odd("bare-list", b"[]"),
    Odd("bare-string", b'"no"'),
    Odd("bare-null", b"null"),
    Odd("empty", b""),
    Odd("plain-text", b"no healthy upstream"),
    Odd("json-cut", b'{"error":{"type":"bad'),
    Odd("nan", b'{"error":{"type":NaN,"message":"m"}}'),
    Odd("nested-200000", b'{"error":' + b"[" * 200_000),
    Odd("message-list", b'{"error":{"type":"t","message":["one","two"]}}', r"\bt\b"),
    Odd("message-null", b'{"error":{"type":"odd_type","message":null}}', "odd_type"),
    Odd("message-number", b'{"error":{"type":"odd_type","message":404}}', "odd_type"),
    Odd("type-number", b'{"error":{"type":5,"message":"a reason"}}', "a reason"),
    Odd("type-object", b'{"error":{"type":{"a":1},"message":"a reason"}}', "a reason"),
    Odd("action-list", b'{"error":{"type":"t","message":"a reason","action":[1]}}', "a reason"),
    Odd("command-object", b'{"error":{"type":"t","message":"a reason","command":{}}}', "a reason"),
    Odd("usage-string", b'{"error":{"type":"t","message":"a reason","usage":"all"}}', "a reason"),
    Odd(
        "usage-of-odd-numbers",
        b'{"error":{"type":"quota_exceeded","message":"a reason","recommended_plan":[],"usage":'
        b'{"window":3,"used":"many","limit":null,"remaining":-1e99,"upgrade_plan_id":{}}}}',
        "a reason",
    ),
    Odd("lone-surrogate", b'{"error":{"type":"t","message":"a \\ud800 reason"}}', "reason"),
    Odd("not-utf-8", b'{"error":{"type":"t","message":"a \xff reason"}}', "a \ufffd reason"),
    Odd(
        "drives-a-terminal",
        b'{"error":{"type":"t\\u001b[2J","message":"a\\u0007\\u009b31m\\r\\nb","action":"\\u007f"}}',
        "31m",
    ),
]


ODD_ANSWERS = [(odd, "400 Bad Request") for odd in ODD] + [(odd, "500 Oops") for odd in ODD[:8]]


@pytest.mark.parametrize(
    ("odd", "status"), ODD_ANSWERS, ids=[f"{status[:3]}-{odd.id}" for odd, status in ODD_ANSWERS]
)
def test_an_error_of_an_odd_shape(odd: Odd, status: str, main: Main, canary: str) -> None:
    with Hostile(answer(odd.body, status)) as server:
        result = main("--api-url", server.url, *RUN)
    advice = status.startswith("500")
    failed(result, 125, canary, status[:3], odd.says, advice=advice)
    assert server.methods() == ["POST"]


# --- bytes that are not UTF-8 -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"caf\xe9", "caf\ufffd"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"\xf0\x9f\x98", "\ufffd"),
        (b"\xc0\xaf", "\ufffd\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
    ],
    ids=["latin-1", "no-lead-byte", "cut-character", "overlong", "encoded-surrogate"],
)
def test_bytes_that_are_not_utf_8_are_replaced_and_told(
    cli: Program, data: bytes, expected: str
) -> None:
    with Hostile(answer(run_document("0", b"<" + data + b">"))) as server:
        result = cli("--api-url", server.url, *RUN)
    assert result.code == 0
    assert json.loads(result.out.decode("utf-8"))["stdout"] == f"<{expected}>"
    told = spoken(result.err)
    assert len(told.warnings) == 1
    assert "UTF-8" in told.text
    assert not told.errors


def test_bytes_that_are_not_utf_8_in_a_status(cli: Program) -> None:
    with Hostile(answer(b'{"items":[{"id":"caf\xe9","state":"ready"}]}')) as server:
        result = cli("--api-url", server.url, "--format", "tsv", *STATUS)
    assert result.code == 0
    assert "caf\ufffd\tready" in result.out.decode("utf-8")
    assert len(spoken(result.err).warnings) == 1


def test_a_byte_order_mark_is_accepted(cli: Program) -> None:
    with Hostile(answer(b"\xef\xbb\xbf" + run_document("0", "é".encode()))) as server:
        result = cli("--api-url", server.url, *RUN)
    assert result.code == 0
    assert json.loads(result.out.decode("utf-8"))["stdout"] == "é"
    assert result.err == b""


# --- the exit code of a run -------------------------------------------------------------------


class Code(NamedTuple):
    """An `exit_code` as JSON, and the program's own."""

    value: str
    code: int
    told: bool = False
    format: str = "json"

    @property
    def id(self) -> str:
        return f"{self.format}-{self.value or 'missing'}"


CODES = [
    Code("0", 0),
    Code("1", 1),
    Code("37", 37),
    Code("125", 125),
    Code("255", 255),
    Code("-1", 129),
    Code("-9", 137),
    Code("-15", 143),
    Code("-127", 255),
    Code("-128", 255),
    Code("-300", 255),
    Code("256", 255),
    Code("512", 255),
    Code("1000", 255),
    Code("1" + "0" * 30, 255),
    Code("-1" + "0" * 30, 255),
    Code("", 125, told=True),
    Code("null", 125, told=True),
    Code('"0"', 125, told=True),
    Code('"37"', 125, told=True),
    Code("true", 125, told=True),
    Code("false", 125, told=True),
    Code("37.0", 125, told=True),
    Code("0.0", 125, told=True),
    Code("0e0", 125, told=True),
    Code("[0]", 125, told=True),
    Code('{"code":0}', 125, told=True),
]


CODES += [case._replace(format=name) for name in ("text", "tsv") for case in CODES[2::4]]


@pytest.fixture(scope="module")
def exit_codes(cli: Program) -> Iterator[Herd[Code, Outcome]]:
    def work(case: Code) -> Outcome:
        body = run_document(case.value) if case.value else b'{"run_id":"run-1","stdout":"OK"}'
        return attempt(cli, answer(body), "--format", case.format, *RUN)

    with Herd(work, CODES) as herd:
        yield herd


@by_id(CODES)
def test_the_exit_code_is_the_containers_and_never_a_false_0(
    case: Code, exit_codes: Herd[Code, Outcome]
) -> None:
    outcome = exit_codes.outcome(case)
    assert outcome.result.code == case.code
    told = spoken(outcome.result.err)
    assert b"OK" in outcome.result.out
    if case.format == "json":
        assert json.loads(outcome.result.out)["stdout"] == "OK"
    assert ("exit_code" in told.text and bool(told.errors)) == case.told, told.text
    assert not told.advises
    assert outcome.methods == ["POST"]


# --- retries ----------------------------------------------------------------------------------


class Retry(NamedTuple):
    """Answers in order, the last of them for ever, and the requests that may be seen."""

    id: str
    args: tuple[str, ...]
    scripts: tuple[Script, ...]
    code: int
    methods: list[str]
    says: str = ""


DELETE = ("delete", "run-1")
NO_RUN = answer(b'{"error":{"type":"not_found","message":"no such run"}}', "404 Not Found")
FORBIDDEN = answer(b'{"error":{"type":"forbidden","message":"not yours"}}', "403 Forbidden")
BROKE = {
    "reset": reset(),
    "reset-amid-headers": reset(OK_HEAD),
    "reset-amid-body": reset(message(b"{", length=99)),
    "closed": close(),
    "body-cut": raw(message(b"{", length=99)),
    "502": answer(b"", "502 Bad Gateway"),
    "503": answer(b'{"error":{"type":"unavailable","message":"m"}}', "503 Unavailable"),
    "504": html("504 Gateway Time-out", "504 Gateway Time-out"),
}
FINAL = {
    "400": answer(b"{}", "400 Bad Request"),
    "401": answer(b"{}", "401 Unauthorized"),
    "429": answer(b"{}", "429 Too Many Requests"),
    "500": answer(b"{}", "500 Internal Server Error"),
    "501": answer(b"{}", "501 Not Implemented"),
    "nonsense": raw(b"SSH-2.0\r\n"),
    "bad-json": answer(b"{"),
}
RETRIES = [
    *(
        Retry(f"get-after-two-{name}", STATUS, (fault, fault, answer(STATUS_DOCUMENT)), 0,
              ["GET"] * 3)
        for name, fault in BROKE.items()
    ),
    *(
        Retry(f"delete-after-two-{name}", DELETE, (fault, fault, answer(DELETED)), 0,
              ["DELETE"] * 3)
        for name, fault in BROKE.items()
    ),
    *(
        Retry(f"delete-unknown-{name}-then-404", DELETE, (fault, NO_RUN), 0, ["DELETE"] * 2)
        for name, fault in BROKE.items()
    ),
    *(
        Retry(f"post-never-after-{name}", RUN, (fault, answer(run_document())), 125, ["POST"])
        for name, fault in {**BROKE, **FINAL}.items()
    ),
    *(
        Retry(f"get-never-after-{name}", STATUS, (fault, answer(STATUS_DOCUMENT)), 1, ["GET"])
        for name, fault in FINAL.items()
    ),
    Retry("get-at-most-three", STATUS, (reset(),), 1, ["GET"] * 3, "reset"),
    Retry("get-last-reason", STATUS, (reset(), close(), BROKE["503"]), 1, ["GET"] * 3, "503"),
    Retry("runs-too", ("runs",), (reset(), close(), answer(b'{"items":[]}')), 0, ["GET"] * 3),
    Retry("delete-at-most-three", DELETE, (BROKE["503"],), 1, ["DELETE"] * 3, "503"),
    Retry("delete-404-at-once", DELETE, (NO_RUN,), 1, ["DELETE"], "no such run"),
    Retry("delete-unknown-then-403", DELETE, (reset(), FORBIDDEN), 1, ["DELETE"] * 2, "not yours"),
    Retry(
        "delete-two-and-only-the-first-was-unknown", (*DELETE, "run-2"),
        (reset(), NO_RUN, NO_RUN), 1, ["DELETE"] * 3, "run-2",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def retried(cli: Program) -> Iterator[Herd[Retry, Outcome]]:
    def work(case: Retry) -> Outcome:
        with Hostile(*case.scripts) as server:
            result = cli("--api-url", server.url, *case.args)
        return Outcome(result, server.connections, server.methods())

    with Herd(work, RETRIES, workers=10) as herd:
        yield herd


@by_id(RETRIES)
def test_retries(case: Retry, retried: Herd[Retry, Outcome], canary: str) -> None:
    outcome = retried.outcome(case)
    told = spoken(outcome.result.err)
    assert outcome.result.code == case.code, told.text
    assert outcome.methods == case.methods
    assert outcome.connections == len(case.methods)
    assert len(told.errors) == (case.code != 0), told.text
    assert re.search(case.says, told.text)
    assert canary not in told.text
    assert outcome.result.seconds < 10
    if case.args[0] == "delete" and case.code == 0:
        deleted = json.loads(outcome.result.out)
        assert deleted["deleted"] is True
        assert deleted["run_id"] == "run-1"


def test_a_reset_while_the_run_is_being_sent_is_no_reason_to_send_it_again(
    cli: Program, canary: str
) -> None:
    def script(connection: Connection) -> None:
        connection.sock.recv(1)
        connection.reset()

    with Hostile(script) as server:
        failed(cli("--api-url", server.url, *RUN), 125, canary, advice=True)
    assert server.connections == 1


def test_retries_stay_within_the_deadline(cli: Program, canary: str) -> None:
    with Hostile(BROKE["503"]) as server:
        result = cli("--api-url", server.url, "--timeout", "300ms", *STATUS)
        seconds = time.monotonic() - server.accepted_at
    failed(result, 1, canary)
    assert seconds < 1
    assert 1 <= server.connections <= 3


class Connects:
    """Tells, before each connect of this process to a port, how many there were before."""

    _watching: dict[int, Connects] = {}

    def __init__(self, port: int, before: Callable[[int], object]) -> None:
        self.count = 0
        self.before = before
        self.port = port

    def __enter__(self) -> Connects:
        if not hasattr(Connects, "installed"):
            setattr(Connects, "installed", True)  # noqa: B010 (there is no way to remove a hook)
            sys.addaudithook(Connects._hook)
        self._watching[self.port] = self
        return self

    def __exit__(self, *_: object) -> None:
        del self._watching[self.port]

    @staticmethod
    def _hook(event: str, args: Any) -> None:
        if event == "socket.connect" and args[1][1] in Connects._watching:
            watcher = Connects._watching[args[1][1]]
            watcher.count += 1
            watcher.before(watcher.count - 1)


class Refused(NamedTuple):
    """A call of the library to a port that refuses so many connections."""

    call: str
    refusals: int
    answer: bytes

    @property
    def id(self) -> str:
        return f"{self.call}-{self.refusals}"


REFUSED = [
    Refused(call, refusals, body)
    for call, body in (
        ("run", run_document()),
        ("status", STATUS_DOCUMENT),
        ("delete", DELETED),
    )
    for refusals in range(4)
]


@pytest.fixture(scope="module")
def refused_calls(canary: str) -> Iterator[Herd[Refused, tuple[Any, int, list[str]]]]:
    import bus_containers

    def work(case: Refused) -> tuple[Any, int, list[str]]:
        args: Any = {"run": [["true"]], "status": [], "delete": ["run-1"]}[case.call]
        with Hostile(answer(case.answer), listening=False) as server:

            def before(count: int) -> None:
                if count == case.refusals:
                    server.listen()

            method = getattr(bus_containers.Client(server.url, canary), case.call)
            with Connects(server.port, before) as connects:
                try:
                    outcome: object = method(*args)
                except bus_containers.TransportError as error:
                    outcome = error
        return outcome, connects.count, server.methods()

    with Herd(work, REFUSED, workers=len(REFUSED)) as herd:
        yield herd


@by_id(REFUSED)
def test_a_refused_connection_is_tried_at_most_twice_more(
    case: Refused, refused_calls: Herd[Refused, tuple[Any, int, list[str]]]
) -> None:
    outcome, connects, methods = refused_calls.outcome(case)
    if case.refusals < 3:
        assert outcome == json.loads(case.answer)
        assert connects == case.refusals + 1
        assert len(methods) == 1
    else:
        assert isinstance(outcome, Exception)
        assert connects == 3
        assert getattr(outcome, "run_state", None) == ("not_sent" if case.call == "run" else None)


def test_a_404_after_refusals_is_no_deletion(canary: str) -> None:
    import bus_containers

    with Hostile(NO_RUN, listening=False) as server:
        client = bus_containers.Client(server.url, canary)
        raises = pytest.raises(bus_containers.ApiError)
        with Connects(server.port, lambda count: server.listen() if count else None), raises as e:
            client.delete("run-1")
    error: Any = e.value
    assert error.status == 404


@pytest.mark.skipif(bool(why_no_namespace()), reason=why_no_namespace())
def test_every_address_of_a_name_is_tried(cli: Program, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"127.0.0.{n} platform.test\n" for n in (2, 3, 4)))
    program = Program(with_files(cli.command, {"/etc/hosts": hosts}), cli.home)
    program.environ.update(cli.environ)
    with Hostile(answer(run_document()), host="127.0.0.3") as server:
        result = program("-v", "--api-url", f"http://platform.test:{server.port}", *RUN)
    assert result.code == 0, result.message
    assert server.methods() == ["POST"]
    assert "again" not in result.message


@pytest.mark.skipif(bool(why_no_name_server()), reason=why_no_name_server())
@pytest.mark.parametrize("failures", [2, 3], ids=["found-at-last", "never-found"])
def test_a_name_that_is_not_resolved_is_tried_again(
    cli: Program, tmp_path: Path, failures: int, canary: str
) -> None:
    def reply(count: int) -> str:
        return "" if count < failures else "127.0.0.1"

    with NameServer(reply) as names, Hostile(answer(run_document())) as server:
        program = Program(with_files(cli.command, names.files(tmp_path)), cli.home)
        program.environ["BUS_AI_TOKEN"] = canary
        result = program("--api-url", f"http://platform.test:{server.port}", *RUN)
    assert names.queries == 3
    if failures == 2:
        assert result.code == 0
        assert server.methods() == ["POST"]
    else:
        failed(result, 125, canary, r"platform\.test", "resolve|name|known")
        assert server.connections == 0


# --- the deadline, and signals ----------------------------------------------------------------


class Trap(NamedTuple):
    """Where a program gets stuck."""

    url: str
    wait: Callable[[], bool]  # until it is
    env: dict[str, str | None] = {}
    files: dict[str, Path] = {}  # of /etc, for that program alone


class Tools(NamedTuple):
    """What traps are built with."""

    folder: Path
    certificates: Callable[[], Certificates]


SetUp = Callable[[Tools], "AbstractContextManager[Trap]"]


def serve(script: Script, tls: bool = False, **options: Any) -> SetUp:
    @contextmanager
    def set_up(tools: Tools) -> Iterator[Trap]:
        context = env = None
        if tls:
            certificates = tools.certificates()
            context = certificates.context(certificates.good)
            env = {"SSL_CERT_FILE": str(certificates.ca)}
        with Hostile(script, tls=context, **options) as server:
            yield Trap(server.url, lambda: server.reached.wait(LIMIT), {**(env or {})})

    return set_up


@contextmanager
def hanging_resolver(tools: Tools) -> Iterator[Trap]:
    if why_no_name_server():
        pytest.skip(why_no_name_server())
    with NameServer(lambda _: None) as names:
        files = names.files(tools.folder)
        yield Trap("http://platform.test", lambda: names.reached.wait(LIMIT), files=files)


@contextmanager
def no_connection(tools: Tools) -> Iterator[Trap]:
    with full_port() as port:
        yield Trap(f"http://127.0.0.1:{port}", connecting(port))


@contextmanager
def no_connection_to_any_of_three(tools: Tools) -> Iterator[Trap]:
    if why_no_namespace():
        pytest.skip(why_no_namespace())
    addresses = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    hosts = tools.folder / "hosts"
    hosts.write_text("".join(f"{address} platform.test\n" for address in addresses))
    with full_port(*addresses) as port:
        url = f"http://platform.test:{port}"
        yield Trap(url, connecting(port), files={"/etc/hosts": hosts})


def connecting(port: int) -> Callable[[], bool]:
    """Wait until a socket in SYN_SENT is bound for the port, besides those that are now."""
    path = Path("/proc/net/tcp")
    if not path.exists():
        pytest.skip("no /proc/net/tcp to see a connection being made")

    def waiting() -> int:
        return len(re.findall(rf":{port:04X} 02 ", path.read_text()))

    def wait() -> bool:
        end = time.monotonic() + LIMIT
        while waiting() == before and time.monotonic() < end:
            time.sleep(0.01)
        return waiting() > before

    before = waiting()
    return wait


def proxied(script: Script) -> SetUp:
    @contextmanager
    def set_up(tools: Tools) -> Iterator[Trap]:
        with Hostile(script) as server:
            env: dict[str, str | None] = {"HTTPS_PROXY": server.url}
            yield Trap("https://platform.test", lambda: server.reached.wait(LIMIT), env)

    return set_up


def drip_tunnel(connection: Connection) -> None:
    connection.read_head()
    connection.drip(b"HTTP/1.1 200 Connection established\r\nVia: " + b"x" * 1000)


class Stuck(NamedTuple):
    """A place to get stuck at, and whether a byte of the request may have left by then."""

    id: str
    set_up: SetUp
    sent: bool
    args: tuple[str, ...] = RUN


SLOW_HEAD = drip(b"X-Slow: " + b"y" * 1000, first=OK_HEAD)
SLOW_BODY = drip(b" " * 1000, first=message(b"", length=1000))
SLOW_CHUNKS = drip(b"1\r\n \r\n" * 200, first=CHUNKED)
SLOW_TLS = drip_at_once(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + b"\0" * 1000)
STUCK = [
    Stuck("resolver", hanging_resolver, sent=False),
    Stuck("connect", no_connection, sent=False),
    Stuck("connect-to-three-addresses", no_connection_to_any_of_three, sent=False),
    Stuck("silent-port", serve(hold_at_once()), sent=True),
    Stuck("silent-after-head", serve(then_hold(OK_HEAD + b"\r\n")), sent=True),
    Stuck("status-line-dripped", serve(drip(b"HTTP/1.1 200 " + b"O" * 1000)), sent=True),
    Stuck("headers-dripped", serve(SLOW_HEAD), sent=True),
    Stuck("body-dripped", serve(SLOW_BODY), sent=True),
    Stuck("chunks-dripped", serve(SLOW_CHUNKS), sent=True),
    Stuck("interim-for-ever", serve(again_and_again(b"HTTP/1.1 102 P\r\n\r\n")), sent=True),
    Stuck("request-not-read", serve(never_read(), receive_buffer=4096), sent=True, args=LARGE),
    Stuck("tls-silent-port", serve(hold_at_once(), scheme="https"), sent=False),
    Stuck("tls-handshake-dripped", serve(SLOW_TLS, scheme="https"), sent=False),
    Stuck("tls-silent", serve(silent(), tls=True), sent=True),
    Stuck("tls-headers-dripped", serve(SLOW_HEAD, tls=True), sent=True),
    Stuck("tls-body-dripped", serve(SLOW_BODY, tls=True), sent=True),
    Stuck(
        "tls-request-not-read",
        serve(never_read(), tls=True, receive_buffer=4096),
        sent=True,
        args=LARGE,
    ),
    Stuck("proxy-silent", proxied(hold_at_once()), sent=False),
    Stuck("proxy-dripping", proxied(drip_tunnel), sent=False),
]


def in_trap(cli: Program, trap: Trap) -> Program:
    command = with_files(cli.command, trap.files) if trap.files else cli.command
    program = Program(command, cli.home)
    program.environ.update(cli.environ)
    return program


@pytest.fixture(scope="module")
def tools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tools:
    def certificates() -> Certificates:
        made: Certificates = request.getfixturevalue("certificates")
        return made

    if not why_no_openssl():
        certificates()  # in this thread, once
    return Tools(tmp_path_factory.mktemp("etc"), certificates)


def deadlines(cli: Program, tools: Tools, *command: str) -> Iterator[Herd[Stuck, Result]]:
    """All of them side by side; each is measured from the moment when it is stuck."""
    starting = threading.Lock()

    def work(case: Stuck) -> Result:
        args = command or case.args
        with case.set_up(tools) as trap:
            with starting:
                process = in_trap(cli, trap).start(
                    "--api-url", trap.url, "--timeout", "1s", *args, env=trap.env
                )
                if not trap.wait():
                    process.kill()
                start = time.monotonic()
            with process:
                out, err = process.communicate(timeout=LIMIT)
                return Result(process.returncode, out, err, time.monotonic() - start)

    with Herd(work, STUCK, workers=len(STUCK)) as herd:
        yield herd


@pytest.fixture(scope="module")
def stuck_runs(cli: Program, tools: Tools) -> Iterator[Herd[Stuck, Result]]:
    yield from deadlines(cli, tools)


@pytest.fixture(scope="module")
def stuck_deletes(cli: Program, tools: Tools) -> Iterator[Herd[Stuck, Result]]:
    yield from deadlines(cli, tools, *DELETE)


@by_id(STUCK)
def test_the_deadline_of_a_run(case: Stuck, stuck_runs: Herd[Stuck, Result], canary: str) -> None:
    result = stuck_runs.outcome(case)
    failed(result, 125, canary, "1s|1 s|deadline|timed? ?out", advice=case.sent)
    assert 0.5 < result.seconds < 1.5


@by_id([case for case in STUCK if case.args is RUN])
def test_the_deadline_of_a_delete(
    case: Stuck, stuck_deletes: Herd[Stuck, Result], canary: str
) -> None:
    result = stuck_deletes.outcome(case)
    failed(result, 1, canary, "1s|1 s|deadline|timed? ?out")
    assert 0.5 < result.seconds < 1.5


SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)


@SIGNALS
@by_id(STUCK)
def test_a_signal_ends_a_run(
    case: Stuck, number: int, code: int, cli: Program, tools: Tools, canary: str
) -> None:
    with ExitStack() as stack:
        trap = stack.enter_context(case.set_up(tools))
        program = in_trap(cli, trap)
        process = program.start("--api-url", trap.url, *case.args, env=trap.env)
        stack.enter_context(process)
        stack.callback(process.kill)
        assert trap.wait()
        start = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
        seconds = time.monotonic() - start
    failed(Result(process.returncode, out, err, seconds), code, canary, advice=case.sent)
    assert seconds < 1.0


@SIGNALS
def test_a_signal_ends_a_status_without_advice(
    number: int, code: int, cli: Program, canary: str
) -> None:
    with Hostile(silent()) as server, cli.start("--api-url", server.url, *STATUS) as process:
        assert server.reached.wait(LIMIT)
        start = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
        seconds = time.monotonic() - start
    failed(Result(process.returncode, out, err, seconds), code, canary)
    assert seconds < 1.0


@SIGNALS
@pytest.mark.skipif(bool(why_no_name_server()), reason=why_no_name_server())
@pytest.mark.parametrize("place", ["silent-port", "resolver"])
def test_a_signal_ends_the_first_process_of_a_container(
    place: str, number: int, code: int, cli: Program, tools: Tools, canary: str
) -> None:
    case = next(case for case in STUCK if case.id == place)
    with ExitStack() as stack:
        trap = stack.enter_context(case.set_up(tools))
        container = Program(["unshare", "-p", "-f", "--kill-child", *cli.command], cli.home)
        container.environ.update(cli.environ)
        process = in_trap(container, trap).start("--api-url", trap.url, *RUN)
        stack.enter_context(process)
        stack.callback(process.kill)
        if not trap.wait():
            process.kill()
            pytest.skip(f"no process namespace: {process.communicate()[1]!r}")
        start = time.monotonic()
        signal_child(process.pid, number)
        out, err = process.communicate(timeout=LIMIT)
        seconds = time.monotonic() - start
    failed(Result(process.returncode, out, err, seconds), code, canary, advice=case.sent)
    assert seconds < 1.0


def signal_child(parent: int, number: int) -> None:
    """Send a signal to the only child of a process."""
    children = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if int(path.read_text().rpartition(")")[2].split()[1]) == parent
    ]
    (child,) = children
    os.kill(child, number)


def test_an_interrupt_that_was_ignored_at_the_start_stays_ignored(cli: Program) -> None:
    release = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.server.reached.set()
        release.wait(LIMIT)
        connection.send(message(run_document()))

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Hostile(script) as server:
        try:
            process = cli.start("--api-url", server.url, *RUN)
        finally:
            signal.signal(signal.SIGINT, before)
        with process:
            assert server.reached.wait(LIMIT)
            process.send_signal(signal.SIGINT)
            release.set()
            out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert json.loads(out)["run_id"] == "run-1"


LIBRARY_STUCK = [
    case
    for case in STUCK
    if case.id
    in ("silent-port", "headers-dripped", "body-dripped", "interim-for-ever", "tls-silent-port")
]


@by_id(LIBRARY_STUCK)
def test_nothing_keeps_running_after_a_deadline_in_the_library(
    case: Stuck, tools: Tools, canary: str
) -> None:
    import bus_containers

    before = set(threading.enumerate())
    with case.set_up(tools) as trap:
        client = bus_containers.Client(trap.url, canary)
        start = time.monotonic()
        with pytest.raises(bus_containers.DeadlineError) as caught:
            client.run(["true"], timeout=0.4)
        assert 0.3 < time.monotonic() - start < 0.9
        error: Any = caught.value
        assert error.run_state == ("unknown" if case.sent else "not_sent")
        end = time.monotonic() + 2
        while strangers(before) and time.monotonic() < end:
            time.sleep(0.01)
        assert not strangers(before)


def strangers(known: set[threading.Thread]) -> list[str]:
    """The threads that are neither known nor a server's own, which come and go."""
    names = [thread.name for thread in set(threading.enumerate()) - known]
    return [name for name in names if not name.startswith("hostile")]


def test_the_library_lets_go_of_a_connection_at_the_deadline(canary: str) -> None:
    import bus_containers

    with Hostile(silent()) as server:
        with pytest.raises(bus_containers.DeadlineError):
            bus_containers.Client(server.url, canary, timeout=0.3).status()
        assert server.left.wait(2)


def test_a_large_request_that_is_not_read_ends_at_the_deadline_in_the_library(canary: str) -> None:
    import bus_containers

    with Hostile(never_read(), receive_buffer=4096) as server:
        start = time.monotonic()
        client = bus_containers.Client(server.url, canary)
        with pytest.raises(bus_containers.DeadlineError) as caught:
            client.run(["x" * 16_000_000], timeout=0.4)
        assert time.monotonic() - start < 1.4
    error: Any = caught.value
    assert error.run_state == "unknown"


def test_the_connection_of_a_run_is_kept_alive(cli: Program) -> None:
    path = Path("/proc/net/tcp")
    if not path.exists():
        pytest.skip("no /proc/net/tcp to see the timers of a socket in")
    with Hostile(silent()) as server, cli.start("--api-url", server.url, *RUN) as process:
        try:
            assert server.reached.wait(LIMIT)
            line = re.search(rf":{server.port:04X} 01 \S+ 02:(\S+) ", path.read_text())
        finally:
            process.kill()
    assert line, "no keep-alive timer runs"
    assert int(line[1], 16) <= 3000  # hundredths of a second


# --- redirects --------------------------------------------------------------------------------


class Redirect(NamedTuple):
    """`target` is what Location says; OTHER stands for the address of a second server."""

    code: int
    name: str
    target: str
    args: tuple[str, ...] = RUN

    @property
    def id(self) -> str:
        return f"{self.code}-{self.name}-{self.args[0]}"


REDIRECTS = [
    Redirect(code, name, target, args)
    for code in (301, 302, 303, 307, 308)
    for name, target in (
        ("other-host", "OTHER/api/v1/containers/status"),
        ("same-host", "SAME/api/v1/containers/status/"),
        ("relative", "/login?next=containers"),
        ("file", "file:///etc/passwd"),
    )
    for args in (RUN, STATUS)
    if args is RUN or code in (302, 308)
]


@by_id(REDIRECTS)
def test_a_redirect_is_not_followed(case: Redirect, main: Main, canary: str) -> None:
    with Hostile(answer(b"{}")) as other:
        to = case.target.replace("OTHER", other.url)

        def script(connection: Connection) -> None:
            connection.read_request()
            location = f"Location: {to.replace('SAME', connection.server.url)}"
            connection.send(message(b"{}", f"{case.code} Moved", location))

        with Hostile(script) as server:
            result = main("--api-url", server.url, *case.args)
    target = to.replace("SAME", server.url)
    failed(result, 125 if case.args is RUN else 1, canary, str(case.code), re.escape(target))
    assert "root:" not in result.message
    assert server.connections == 1
    assert other.connections == 0


# --- TLS --------------------------------------------------------------------------------------


class Tls(NamedTuple):
    """A server's certificate, the client's CA variables, and what it must say."""

    id: str
    certificate: str
    env: dict[str, str]  # CA, OTHER, EMPTY, FOLDER and MISSING stand for paths
    says: tuple[str, ...]


TLS = [
    Tls("unknown-ca", "good", {"SSL_CERT_FILE": "OTHER"}, ("certificate", "SSL_CERT_FILE")),
    Tls("expired", "expired", {"SSL_CERT_FILE": "CA"}, ("expired",)),
    Tls("wrong-host", "wrong_host", {"SSL_CERT_FILE": "CA"}, ("127.0.0.1", "certificate")),
    Tls(
        "no-ca-at-all",
        "good",
        {"SSL_CERT_FILE": "EMPTY", "SSL_CERT_DIR": "FOLDER"},
        ("certificate", "SSL_CERT_FILE"),
    ),
    Tls("missing-file", "good", {"SSL_CERT_FILE": "MISSING"}, ("SSL_CERT_FILE", "no-such.pem")),
]


@by_id(TLS)
def test_a_certificate_that_cannot_be_trusted(
    case: Tls, cli: Program, certificates: Certificates, tmp_path: Path, canary: str
) -> None:
    (tmp_path / "empty.pem").touch()
    (tmp_path / "empty").mkdir()
    places = {
        "CA": certificates.ca,
        "OTHER": certificates.other_ca,
        "EMPTY": tmp_path / "empty.pem",
        "FOLDER": tmp_path / "empty",
        "MISSING": tmp_path / "no-such.pem",
    }
    env: dict[str, str | None] = {name: str(places[word]) for name, word in case.env.items()}
    context = certificates.context(getattr(certificates, case.certificate))
    with Hostile(answer(run_document()), tls=context) as server:
        failed(cli("--api-url", server.url, *RUN, env=env), 125, canary, *case.says)
        failed(cli("--api-url", server.url, *STATUS, env=env), 1, canary, *case.says)
    assert server.requests == []
    assert server.connections <= 2  # none is tried again


def test_a_server_that_wants_a_certificate_of_ours(
    cli: Program, certificates: Certificates, canary: str
) -> None:
    """TLS 1.3 asks for it when the request is on its way already, and no run is started."""
    context = certificates.context(certificates.good)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates.ca)
    def script(connection: Connection) -> None:
        tls = context.wrap_socket(connection.sock, True, do_handshake_on_connect=False)
        connection.sock = tls
        with pytest.raises(ssl.SSLError):
            tls.do_handshake()
        while os.read(tls.fileno(), 65536):
            pass  # or a reset would overtake the alert

    env: dict[str, str | None] = {"SSL_CERT_FILE": str(certificates.ca)}
    with Hostile(script, scheme="https") as server:
        result = cli("--api-url", server.url, *RUN, env=env)
    failed(result, 125, canary, "TLS", "certificate of ours", advice=False)
    assert server.connections == 1


def test_an_empty_variable_for_ca_certificates_is_unset(
    cli: Program, certificates: Certificates, tmp_path: Path
) -> None:
    env: dict[str, str | None] = {"SSL_CERT_FILE": str(certificates.ca), "SSL_CERT_DIR": ""}
    with Hostile(answer(run_document()), tls=certificates.context(certificates.good)) as server:
        assert cli("--api-url", server.url, *RUN, env=env).code == 0
        script = "import os, bus_containers, sys; sys.argv[1:] = ['--version']; os._exit = print;"
        script += "bus_containers.console(); print('SSL_CERT_DIR' in os.environ)"
        python = Program([sys.executable, "-c", script], cli.home)
        python.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        assert python(env={"SSL_CERT_DIR": ""}).out.endswith(b"\n0\nFalse\n")


FRAMES = {
    "gzip": "Content-Encoding: gzip",
    "length-no-number": "Content-Length: zz",
    "length-twice": "Content-Length: 5\r\nContent-Length: 6",
}


@pytest.mark.parametrize("frame", list(FRAMES))
def test_the_status_of_an_error_outlives_an_odd_body(
    cli: Program, frame: str, canary: str
) -> None:
    with Hostile(answer(b"\x1f\x8b", "402 Payment Required", FRAMES[frame])) as server:
        failed(cli("--api-url", server.url, *RUN), 125, canary, "HTTP 402")
        assert server.connections == 1
    with Hostile(answer(b"\x1f\x8b", "503 No", FRAMES[frame]), answer(b'{"items":[]}')) as server:
        assert cli("--api-url", server.url, *STATUS).code == 0
        assert server.connections == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is limited on Linux")
@pytest.mark.parametrize("kilobytes", range(200_000, 480_000, 40_000))
def test_an_answer_that_is_too_large_for_the_memory_here(
    cli: Program, kilobytes: int, canary: str
) -> None:
    script = f'ulimit -v {kilobytes} && exec "$@"'
    small = Program(["sh", "-c", script, "sh", *cli.command], cli.home)
    small.environ.update(cli.environ)
    body = b'{"run_id":"r","exit_code":0,"stdout":"' + 60_000_000 * b"x" + b'"}'
    with Hostile(answer(body)) as server:
        result = small("--api-url", server.url, *RUN)
    if result.code == 0:  # there was enough
        assert json.loads(result.out) == json.loads(body)
    else:
        finished = "not enough memory to write" in result.message
        failed(result, 125, canary, "memory", advice=not finished)


def test_an_empty_content_encoding_is_none(cli: Program) -> None:
    with Hostile(answer(run_document(), "200 OK", "Content-Encoding: ")) as server:
        assert cli("--api-url", server.url, *RUN).code == 0


@pytest.mark.skipif(bool(why_no_namespace()), reason=why_no_namespace())
def test_a_machine_without_any_ca_certificate(
    cli: Program, certificates: Certificates, tmp_path: Path, canary: str
) -> None:
    paths = ssl.get_default_verify_paths()
    file, folder = Path(paths.openssl_cafile).resolve(), Path(paths.openssl_capath).resolve()
    if not folder.is_dir() or (file.exists() and folder not in file.parents):
        pytest.skip("this Python does not have its CA certificates in a folder")
    program = Program(with_files(cli.command, {str(folder): tmp_path}), cli.home)
    program.environ.update(cli.environ)
    with Hostile(answer(run_document()), tls=certificates.context(certificates.good)) as server:
        result = program("--api-url", server.url, *RUN)
    failed(result, 125, canary, "certificate", "install", "ca-certificates", "SSL_CERT_FILE")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_right_ca_works(
    cli: Program, certificates: Certificates, host: str, canary: str
) -> None:
    context = certificates.context(certificates.good)
    env: dict[str, str | None] = {"SSL_CERT_FILE": str(certificates.ca)}
    with Hostile(answer(run_document()), tls=context) as server:
        result = cli("--api-url", f"https://{host}:{server.port}", *RUN, env=env)
    assert result.code == 0, result.message
    assert result.err == b""
    assert f"Authorization: Bearer {canary}\r\n".encode() in server.requests[0]


def test_a_server_of_an_old_protocol_is_refused(
    cli: Program, certificates: Certificates, canary: str
) -> None:
    context = certificates.old_protocol()
    if context is None:
        pytest.skip("this OpenSSL cannot serve TLS 1.1")
    env: dict[str, str | None] = {"SSL_CERT_FILE": str(certificates.ca)}
    with Hostile(answer(run_document()), tls=context) as server:
        failed(cli("--api-url", server.url, *RUN, env=env), 125, canary, "TLS")
    assert server.requests == []


def speak_plainly(connection: Connection) -> None:
    connection.sock.recv(65536)
    connection.send(message(b"", "400 Bad Request"))


def close_amid_handshake(connection: Connection) -> None:
    connection.sock.recv(65536)


def reset_amid_handshake(connection: Connection) -> None:
    connection.sock.recv(65536)
    connection.reset()


@pytest.mark.parametrize(
    "script",
    [reset_amid_handshake, close_amid_handshake, speak_plainly],
    ids=["reset", "closed", "plain-http"],
)
def test_a_broken_handshake_never_sent_the_run(cli: Program, script: Script, canary: str) -> None:
    import bus_containers

    def library() -> Any:
        with pytest.raises(bus_containers.TransportError) as caught:
            bus_containers.Client(server.url, canary).run(["true"])
        return caught.value

    with Hostile(script, scheme="https") as server:
        result, error = together(lambda: cli("--api-url", server.url, *RUN), library)
    failed(result, 125, canary)
    assert error.run_state == "not_sent"


# --- a token over plain http ------------------------------------------------------------------

PUBLIC = [
    "203.0.113.5",
    "8.8.8.8",
    "172.15.0.1",
    "172.32.0.1",
    "192.169.0.1",
    "11.0.0.1",
    "169.253.0.1",
    "100.64.0.1",
    "[2001:db8::1]",
    "[2600::1]",
    "[fec0::1]",
    "platform.example.com",
    "internal.example.com",
    "local.example.com",
    "10.1.2.3.example.com",
    "mylocal.example",
]
PRIVATE = [
    "platform",
    "10.1.2.3",
    "172.16.0.1",
    "172.31.255.254",
    "192.168.1.1",
    "169.254.1.1",
    "[fd00::1]",
    "[fc00::1]",
    "[fe80::1]",
    "platform.local",
    "platform.internal",
    "a.platform.test",
    "PLATFORM.TEST",
]
HOSTS = [(host, True) for host in PUBLIC] + [(host, False) for host in PRIVATE]


@pytest.mark.parametrize(("host", "warned"), HOSTS, ids=[host for host, _ in HOSTS])
def test_a_token_over_plain_http_is_warned_of(
    host: str, warned: bool, main: Main, canary: str
) -> None:
    """Everything goes to a proxy on loopback, whatever the host is called."""
    with Hostile(answer(STATUS_DOCUMENT)) as proxy:
        result = main("--api-url", f"http://{host}", *STATUS, HTTP_PROXY=proxy.url)
    told = spoken(result.err)
    assert result.code == 0, told.text
    assert len(told.warnings) == len(told.text.splitlines()) == warned, told.text
    assert "http" in told.text or not warned
    assert canary not in told.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_no_warning_on_loopback(cli: Program, host: str) -> None:
    with Hostile(
        answer(STATUS_DOCUMENT), host="127.0.0.2" if host[-1] == "2" else "127.0.0.1"
    ) as s:
        result = cli("--api-url", f"http://{host}:{s.port}", *STATUS)
    assert (result.code, result.err) == (0, b"")


def test_no_warning_when_quiet_and_none_for_https(cli: Program, canary: str) -> None:
    with Hostile(answer(STATUS_DOCUMENT)) as proxy:
        env: dict[str, str | None] = {"HTTP_PROXY": proxy.url}
        result = cli("--quiet", "--api-url", "http://203.0.113.5", *STATUS, env=env)
    assert (result.code, result.out, result.err) == (0, b"", b"")
    with Hostile(answer(b"", "403 Forbidden")) as proxy:
        env = {"HTTPS_PROXY": proxy.url}
        result = cli("--api-url", "https://203.0.113.5", *STATUS, env=env)
    assert not spoken(result.err).warnings


def test_one_warning_however_often_it_is_tried(cli: Program) -> None:
    with Hostile(BROKE["503"], BROKE["503"], answer(STATUS_DOCUMENT)) as proxy:
        env: dict[str, str | None] = {"HTTP_PROXY": proxy.url}
        result = cli("--api-url", "http://203.0.113.5", *STATUS, env=env)
    assert result.code == 0
    assert len(spoken(result.err).warnings) == 1
    assert len(proxy.requests) == 3
