# SPDX-License-Identifier: MIT
"""No false success: exit codes, usable answers, `delete`, redirects: promises 3.11, 6.15-6.17."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

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
    close,
    message,
    raw,
    reset,
)
from support import (
    BODIES,
    CANARY,
    DOCUMENTS,
    InProcess,
    Program,
    api_commands,
    check_each,
    check_failure,
    failure_code,
    spoken,
    words,
)

Serve = Callable[..., Hostile]

# --- the exit code of a run -------------------------------------------------------------------

# An `exit_code` as JSON, and the program's own.
CODES = {
    **{str(number): number for number in (0, 1, 2, 37, 125, 254, 255)},
    **{str(number): 128 - number for number in (-1, -9, -127)},
    **dict.fromkeys(("-128", "-300", "256", "512", "1" + "0" * 30, "-1" + "0" * 30), 255),
}
NO_CODES = ("", "null", '"0"', '""', "true", "false", "37.0", "0.0", "0e0", "-0.0", "[0]", "{}")


@pytest.mark.parametrize("value", [*CODES, *NO_CODES], ids=lambda value: value[:9] or "missing")
def test_the_exit_code_is_the_containers(value: str, cli: InProcess, api: Api) -> None:
    """Promise 3.11: never a false 0, and the result is printed all the same.

    One that is missing, as in a 202, does not say that the run has ended.
    """
    rest = '"run_id":"run-1","stdout":"OK","stderr":"","duration_ms":7}'
    body = f'{{"exit_code":{value},{rest}' if value else "{" + rest
    for format_ in ("json", "text", "tsv"):
        result = cli("-f", format_, *words("run"), at=api.answers(body.encode()))
        assert result.code == CODES.get(value, 125)
        assert b"OK" in result.out
        if format_ == "json":
            assert result.document == json.loads(body)
        has_ended = value not in ("", "null")
        ends = f"ended with exit code {json.dumps(json.loads(value))}" if has_ended else "has no"
        told = [line for line in spoken(result.err).errors if "not an integer" in line]
        assert len(told) == (value in NO_CODES)
        assert all(f": the exit code is not an integer; run run-1 {ends}" in line for line in told)
        assert spoken(result.err).advises is not has_ended
    assert api.methods() == ["POST"] * 3


def test_the_exit_code_of_a_process(program: Program, api: Api) -> None:
    body = BODIES["run"].replace(b'"exit_code": 0', b'"exit_code": -9')
    result = program(*words("run"), at=api.answers(body))
    assert (result.code, result.err) == (137, b"")


# --- usable answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", api_commands())
def test_a_usable_answer(name: str, cli: InProcess, api: Api) -> None:
    """Promise 6.15."""
    body = BODIES[name]
    no_error = {**DOCUMENTS[name], "error": None}  # as Go writes an error that is nil
    api.sends(
        *(message(body, f"{status} Fine") for status in (200, 201, 202)),
        message(json.dumps(no_error).encode()),
        message(b"\xef\xbb\xbf" + body),
        message(body, "200 OK", "Content-Encoding: br"),  # which it is not
    )
    for document in [DOCUMENTS[name]] * 3 + [no_error] + [DOCUMENTS[name]] * 2:
        result = cli(*words(name), at=api)
        assert (result.code, result.err, result.document) == (0, b"", document)


ERROR = {"error": {"type": "busy", "message": "come back later"}}
UNUSABLE: list[tuple[int, object, str]] = [  # a status, a document, and what is said
    *(
        (status, None, "the API answers with 200, 201, 202 or 204")
        for status in (203, 206, 226, 299)
    ),
    *((200, value, "the answer is of an unexpected type, ") for value in ("ready", 1.5, True)),
    (200, b"null", "the answer is of an unexpected type, NoneType"),
    (200, ERROR, "the answer is an error: come back later"),
    (200, {**ERROR, "items": []}, "the answer is an error: come back later"),
    (200, {"error": "asleep"}, "the answer is an error: asleep"),
    (200, {"error": {"type": "busy"}}, "the answer is an error: busy"),
    (200, {"error": {"a": 1}, "exit_code": 0, "deleted": True}, "the answer is an error: it does"),
]


@pytest.mark.parametrize("name", api_commands())
def test_an_unusable_answer(name: str, cli: InProcess, api: Api) -> None:
    for status, document, says in UNUSABLE:
        given = DOCUMENTS[name] if document is None else document
        result = cli(*words(name), at=api.answers(given, status=f"{status} Odd"))
        check_failure(result, failure_code(name), f": HTTP {status}, but {says}")
        assert result.spoken.advises == (name == "run")
    assert len(api.requests) == len(UNUSABLE)


def test_what_lists_nothing(cli: InProcess, api: Api) -> None:
    nothing: list[dict[str, object]] = [{}, {"error": {}}, {"error": None}]
    for document in nothing:
        check_failure(cli("status", at=api.answers(document)), 1, "the answer says nothing")
    for body in ("{}", '{"items":7}', '{"runs":{"a":1}}', '{"others":[]}'):
        check_failure(cli("runs", at=api.answers(body.encode())), 1, "the answer lists no runs")
    for body in ('{"items":null}', '{"runs":null}', '{"runs":[]}', "[]"):
        result = cli("runs", at=api.answers(body.encode()))
        assert (result.code, result.err, result.document) == (0, b"", {"items": []})


@pytest.mark.parametrize("brackets", ["[]", '{"":}'], ids=["lists", "objects"])
def test_the_depth_of_a_document(brackets: str, cli: InProcess, api: Api) -> None:
    """Promise 6.15: every Python can read it, and write it again."""
    opening, closing = brackets[:-1], brackets[-1:]
    inmost = "" if brackets == "[]" else "1"
    for depth in (200, 201, 200_000):
        deep = opening * (depth - 1) + inmost + closing * (depth - 1)
        result = cli("status", at=api.answers(f'{{"items":{deep}}}'.encode()))
        if depth == 200:
            assert (result.code, result.document) == (0, {"items": json.loads(deep)})
        else:
            says = "it is nested more than 200 deep" if depth == 201 else ""
            check_failure(result, 1, f"is not usable JSON: {says}")


GOOD_NUMBERS = ("7" * 4300, "-" + "7" * 4299, "1e308", "1e-999")
BAD_NUMBERS = {
    **dict.fromkeys(("7" * 4301, "7" * 100_000), "it has a number of more than 4,300 digits"),
    **{
        number: f"{number} is not a number in JSON"
        for number in ("1e309", "-1e400", "NaN", "-Infinity")
    },
    **dict.fromkeys(("01", "+1", "0x1"), "Expecting "),
}


@pytest.mark.parametrize("limit", [4300, 0], ids=["as-usual", "unlimited"])
def test_the_numbers_of_a_document(limit: int, cli: InProcess, api: Api) -> None:
    """Refused on every Python alike, whatever a host program allows for its own numbers."""
    has_limit = hasattr(sys, "set_int_max_str_digits")
    if has_limit:  # an older Python has none
        sys.set_int_max_str_digits(limit)
    try:
        check_numbers(cli, api)
    finally:
        if has_limit:
            sys.set_int_max_str_digits(4300)


def check_numbers(cli: InProcess, api: Api) -> None:
    for number in (*GOOD_NUMBERS, *BAD_NUMBERS):
        result = cli("status", at=api.answers(b'{"items":[{"id":%s}]}' % number.encode()))
        if number in BAD_NUMBERS:
            check_failure(result, 1, f"is not usable JSON: {BAD_NUMBERS[number]}")
        else:
            [item] = result.document["items"]
            assert (result.code, item["id"]) == (0, json.loads(number))


REPLACED = {
    b"caf\xe9": "caf\ufffd",
    b"\xf0\x9f\x98": "\ufffd",  # a cut letter
    b"\xc0\xaf": "\ufffd\ufffd",  # overlong
    b"\xed\xa0\x80": "\ufffd\ufffd\ufffd",  # a surrogate
    b"\xef\xbf\xbd": "\ufffd",  # as it was sent
}


def test_bytes_that_are_not_utf_8(cli: InProcess, api: Api) -> None:
    """Promise 3.17: it is a success, but not without a word."""
    for data, replaced in REPLACED.items():
        api.answers(BODIES["run"].replace(b"OK", b"<" + data + b">"))
        for format_ in ("json", "text", "tsv"):
            result = cli("-f", format_, *words("run"), at=api)
            assert (result.code, f"<{replaced}>" in result.out.decode()) == (0, True)
            assert len(result.spoken.warnings) == (data != replaced.encode())


# --- delete -----------------------------------------------------------------------------------


class Deletion(NamedTuple):
    """What the server does to each request, and what is said; nothing where it is deleted."""

    id: str
    scripts: tuple[Script, ...]
    says: str = ""


GONE = answer(b'{"error":{"type":"not_found","message":"no such run"}}', "404 Not Found")
NO_ROUTE = answer(b'{"error":{"type":"invalid_route"}}', "404 Not Found")
UNAVAILABLE = answer(b'{"error":{"type":"unavailable","message":"m"}}', "503 Unavailable")


CHUNKED_204 = b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED_200 = CHUNKED_204.replace(b"204 No Content", b"200 OK")


def says_of(document: object) -> Script:
    return answer(json.dumps(document).encode())


DELETIONS = [
    Deletion("true", (says_of({"deleted": True, "run_id": "run-1"}),)),
    Deletion("true-without-an-id", (says_of({"deleted": True}),)),
    Deletion("an-empty-object", (answer(b"{}"),)),
    Deletion("204", (answer(b"", "204 No Content"),)),
    # What does not belong there counts all the same, and what is cut does not.
    Deletion("204-that-denies-it", (raw(CHUNKED_204 + b"11\r\n{\"deleted\":false}\r\n0\r\n\r\n"),),
             "the answer does not say that the run run-1 is deleted"),
    Deletion("204-that-is-cut", (raw(CHUNKED_204[:14]),) * 3, "the answer was cut short"),
    Deletion("204-that-is-cut-later", (raw(CHUNKED_204[:-2]),) * 3, "the answer was cut short"),
    *(
        Deletion(
            name, (says_of(document),), ": the answer does not say that the run run-1 is deleted"
        )
        for name, document in {
            "false": {"deleted": False, "run_id": "run-1"},
            "not-a-boolean": {"deleted": "true", "run_id": "run-1"},
            "null": {"deleted": None},
            "only-its-id": {"run_id": "run-1"},
            "another-run": {"deleted": True, "run_id": "run-2"},
            "no-run": {"deleted": True, "run_id": None},
            "a-state": {"run_id": "run-1", "state": "running"},
        }.items()
    ),
    Deletion("200-without-a-body", (answer(b""),), "the answer is empty"),
    Deletion("not-found", (GONE,), "HTTP 404 not_found: no such run"),
    # Only where a connection was lost may an earlier try have done it.
    Deletion("lost-then-404", (reset(), GONE)),
    Deletion("cut-then-404", (reset(message(b"{", length=9)), GONE)),
    Deletion("chunk-cut-then-404", (raw(CHUNKED_200 + b"9\r\n{"), GONE)),
    Deletion("bad-chunk", (raw(CHUNKED_200 + b"zz\r\n"),), "a chunk has no length"),
    Deletion("lost-then-503-then-404", (reset(), UNAVAILABLE, GONE)),
    Deletion("503-then-lost-then-404", (UNAVAILABLE, close(), GONE)),
    Deletion("503-then-404", (UNAVAILABLE, GONE), "HTTP 404 not_found"),
    *(
        Deletion(f"{status}-cut-then-404", (raw(f"HTTP/1.1 {status} X\r\nVi".encode()), GONE),
                 "HTTP 404 not_found")
        for status in (300, 403, 404, 502)
    ),
    *(
        Deletion(f"{status}-reset-then-404", (reset(f"HTTP/1.1 {status} X\r\nVi".encode()), GONE),
                 "HTTP 404 not_found")
        for status in (404, 503)
    ),
    Deletion("206-cut-then-404", (raw(message(b"{", "206 Partial", length=9)), GONE), "HTTP 404"),
    Deletion("lost-then-404-cut-then-404", (reset(), raw(b"HTTP/1.1 404 X\r\nVi"), GONE)),
    Deletion("502-504-404", (answer(b"", "502 X"), answer(b"", "504 X"), GONE), "HTTP 404"),
    # Not about the run: a gateway has no such route, or a page for what it does not know.
    Deletion("lost-then-no-route", (reset(), NO_ROUTE), "HTTP 404 invalid_route"),
    Deletion("lost-then-a-page", (reset(), answer(b"<html>", "404 X")), "HTTP 404 X"),
    Deletion("lost-then-no-type", (reset(), answer(b"{}", "404 X")), "HTTP 404 X"),
    Deletion("lost-then-410", (reset(), answer(b"{}", "410 Gone")), "HTTP 410 Gone"),
]


def check_deletion(case: Deletion) -> None:
    with Hostile(*case.scripts) as server:
        client = bus_containers.Client(server.url, CANARY)
        if case.says:
            with pytest.raises(bus_containers.BusContainersError) as caught:
                client.delete("run-1")
            assert case.says in str(caught.value)
        else:
            assert client.delete("run-1") == {"deleted": True, "run_id": "run-1"}
    assert server.methods() == ["DELETE"] * len(case.scripts)


@pytest.mark.usefixtures("hasty")
def test_delete() -> None:
    """Promise 6.16."""
    check_each(check_deletion, DELETIONS, workers=len(DELETIONS))


def test_a_failure_of_tls_is_no_lost_connection(
    serve: Serve, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 6.16: nothing is known of the first request, so a 404 does not mean deleted."""

    def fail(connection: Connection) -> None:
        tls = AlertingTls(connection, certificates)
        tls.read_request(b"\r\n\r\n")
        tls.alert(20)
        connection.hold()

    def deny(connection: Connection) -> None:
        tls = AlertingTls(connection, certificates)
        tls.read_request(b"\r\n\r\n")
        tls.send(message(b'{"error":{"type":"not_found"}}', "404 Not Found"))
        connection.hold()

    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    server = serve(fail, deny, scheme="https")
    with pytest.raises(bus_containers.ApiError, match="HTTP 404 not_found"):
        bus_containers.Client(server.url, CANARY).delete("run-1")
    assert server.methods() == ["DELETE"] * 2


def test_a_run_that_was_gone_at_the_second_try_is_told(cli: InProcess, serve: Serve) -> None:
    """And what is known of one deletion is not known of the next."""
    server = serve(reset(), GONE, GONE, answer(b"{}"))
    result = cli("delete", "-f", "tsv", "run-1", "run-2", "run-3", at=server)
    assert (result.code, result.out) == (1, b"run_id\tdeleted\nrun-1\ttrue\nrun-3\ttrue\n")
    assert result.spoken.warnings == [
        "bus-containers: warning: run run-1: the connection of a first request was lost, and now "
        "there is no such run, so it counts as deleted"
    ]
    assert "/runs/run-2: HTTP 404" in result.error


# --- redirects --------------------------------------------------------------------------------

REDIRECTS = {
    301: "OTHER/api/v1/containers/status",
    302: "SAME/api/v1/containers/status/",
    303: "/login?next=containers",
    307: "OTHER/api/v1/containers/runs",
    308: "file:///etc/passwd",
}


@pytest.mark.parametrize("status", REDIRECTS)
def test_a_redirect_is_not_followed(status: int, cli: InProcess, api: Api, serve: Serve) -> None:
    """Promise 6.17."""
    other = serve()
    target = REDIRECTS[status].replace("OTHER", other.url).replace("SAME", api.url)
    api.sends(message(b"{}", f"{status} Moved", f"Location: {target}"))
    for name in api_commands():
        result = cli(*words(name), at=api)
        says = f"HTTP {status} Moved; redirected to {target}, not followed; "
        check_failure(result, failure_code(name), says)
        assert not result.spoken.advises
    assert (len(api.requests), other.connections) == (len(api_commands()), 0)
