# SPDX-License-Identifier: MIT
"""No false success: exit codes, usable answers, `delete`, redirects: promises 3.11, 6.15-6.17."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import pytest

import bus_containers
from hostile import Api, Connection, Hostile, Script, answer, close, message, reset
from support import (
    BODIES,
    CANARY,
    DOCUMENTS,
    InProcess,
    Program,
    api_commands,
    check_failure,
    failure_code,
    spoken,
    tiers,
    words,
)

Serve = Callable[..., Hostile]

# --- the exit code of a run -------------------------------------------------------------------


class Code(NamedTuple):
    """An `exit_code` as JSON, "" for none, and the program's own."""

    value: str
    code: int
    is_told: bool = False


CODES = [
    *(Code(str(number), number) for number in (0, 1, 2, 37, 125, 126, 127, 130, 254, 255)),
    *(Code(str(number), 128 - number) for number in (-1, -9, -15, -126, -127)),
    *(Code(number, 255) for number in ("-128", "-300", "256", "512", "1000")),
    Code("1" + "0" * 30, 255),
    Code("-1" + "0" * 30, 255),
    *(
        Code(value, 125, is_told=True)
        for value in (
            "",
            "null",
            '"0"',
            '"37"',
            '""',
            "true",
            "false",
            "37.0",
            "0.0",
            "0e0",
            "-0.0",
        )
    ),
    Code("[0]", 125, is_told=True),
    Code('{"code":0}', 125, is_told=True),
]


@pytest.mark.parametrize("case", CODES, ids=lambda case: case.value[:9] or "missing")
@pytest.mark.parametrize("format_", tiers(["json", "text", "tsv"], "json"))
def test_the_exit_code_is_the_containers(
    case: Code, format_: str, cli: InProcess, api: Api
) -> None:
    """Promise 3.11: never a false 0, and the result is printed all the same."""
    rest = '"run_id":"run-1","stdout":"OK","stderr":"","duration_ms":7}'
    body = f'{{"exit_code":{case.value},{rest}' if case.value else "{" + rest
    result = cli("-f", format_, *words("run"), at=api.answers(body.encode()))
    assert result.code == case.code
    assert b"OK" in result.out
    if format_ == "json":
        assert result.document == json.loads(body)
    told = [line for line in spoken(result.err).errors if " run run-1 ended " not in line]
    assert [line for line in told if "run-1" in line] == told
    assert ("exit_code" in "".join(told)) == case.is_told
    assert len(told) == case.is_told
    assert not spoken(result.err).advises
    assert api.methods() == ["POST"]


@pytest.mark.parametrize(("value", "code"), [("0", 0), ("37", 37), ("256", 255), ("-9", 137)])
def test_the_exit_code_of_a_process(value: str, code: int, program: Program, api: Api) -> None:
    body = BODIES["run"].replace(b'"exit_code": 0', f'"exit_code": {value}'.encode())
    result = program(*words("run"), at=api.answers(body))
    assert (result.code, result.err) == (code, b"")


# --- usable answers ---------------------------------------------------------------------------

ERROR = {"error": {"type": "busy", "message": "come back later"}}
NOT_DOCUMENTS = {
    "string": (b'"ready"', "str"),
    "number": (b"1.5", "float"),
    "null": (b"null", "NoneType"),
    "true": (b"true", "bool"),
    "list": (b"[]", "list"),
}


@pytest.mark.parametrize("status", [200, 201, 202])
@pytest.mark.parametrize("name", api_commands())
def test_a_usable_answer(name: str, status: int, cli: InProcess, api: Api) -> None:
    result = cli(*words(name), at=api.answers(DOCUMENTS[name], status=f"{status} Fine"))
    assert (result.code, result.err) == (0, b"")
    assert result.document == DOCUMENTS[name]


@pytest.mark.parametrize("status", [203, 205, 206, 207, 226, 299])
@pytest.mark.parametrize("name", api_commands())
def test_a_status_that_is_not_one_of_a_whole_answer(
    name: str, status: int, cli: InProcess, api: Api
) -> None:
    result = cli(*words(name), at=api.answers(DOCUMENTS[name], status=f"{status} Odd"))
    check_failure(result, failure_code(name), f"HTTP {status}")
    assert result.spoken.advises == (name == "run")
    assert len(api.requests) == 1


@pytest.mark.parametrize("kind", NOT_DOCUMENTS)
@pytest.mark.parametrize("name", api_commands())
def test_a_document_that_is_not_an_object(name: str, kind: str, cli: InProcess, api: Api) -> None:
    body, its_type = NOT_DOCUMENTS[kind]
    result = cli(*words(name), at=api.answers(body))
    if (name, kind) == ("runs", "list"):
        assert (result.code, result.document) == (0, {"items": []})
    else:
        says = f"HTTP 200, but the answer is of an unexpected type, {its_type}"
        check_failure(result, failure_code(name), says)


@pytest.mark.parametrize("name", api_commands())
@pytest.mark.parametrize(
    ("document", "says"),
    [
        (ERROR, "come back later"),
        ({**ERROR, "items": []}, "come back later"),
        ({"error": "asleep"}, "asleep"),
        ({"error": {"type": "busy"}}, "busy"),
        ({"error": {"a": 1}, "exit_code": 0, "deleted": True}, "an error"),
    ],
    ids=["error", "beside-items", "text", "type", "unknown"],
)
def test_a_200_that_holds_an_error(
    document: object, says: str, name: str, cli: InProcess, api: Api
) -> None:
    check_failure(cli(*words(name), at=api.answers(document)), failure_code(name), "HTTP 200", says)


@pytest.mark.parametrize("name", api_commands())
def test_an_empty_error_is_none(name: str, cli: InProcess, api: Api) -> None:
    """What Go's encoder writes of an error that is nil."""
    document = {**DOCUMENTS[name], "error": None}
    assert cli(*words(name), at=api.answers(document)).code == 0


def test_an_empty_status(cli: InProcess, api: Api) -> None:
    check_failure(cli("status", at=api.answers({})), 1, "the answer says nothing")


@pytest.mark.parametrize("items", ["7", '"x"', "true", '{"a":1}'])
def test_runs_that_are_not_a_list(items: str, cli: InProcess, api: Api) -> None:
    for body in (f'{{"items":{items}}}', f'{{"runs":{items}}}', f'{{"others":{items}}}', "{}"):
        check_failure(cli("runs", at=api.answers(body.encode())), 1, "the answer lists no runs")


@pytest.mark.parametrize("body", [b'{"items":null}', b'{"runs":null}', b'{"runs":[]}', b"[]"])
def test_an_empty_list_of_runs(body: bytes, cli: InProcess, api: Api) -> None:
    result = cli("runs", at=api.answers(body))
    assert (result.code, result.err, result.document) == (0, b"", {"items": []})


@pytest.mark.parametrize("brackets", [b"[]", b'{"":}'], ids=["lists", "objects"])
@pytest.mark.parametrize(("depth", "code"), [(199, 0), (200, 0), (201, 1), (990, 1), (200_000, 1)])
def test_the_depth_of_a_document(
    depth: int, code: int, brackets: bytes, cli: InProcess, api: Api
) -> None:
    """Promise 6.15: every Python can read it, and write it again."""
    opening, closing = brackets[:-1], brackets[-1:]
    body = b'{"items":' + opening * (depth - 1) + b"1" * (brackets != b"[]")
    body += closing * (depth - 1) + b"}"
    result = cli("status", "-f", "json", at=api.answers(body))
    assert (result.code, bool(result.out)) == (code, code == 0)
    if code == 0:
        assert result.out.count(closing) == body.count(closing)
    else:
        check_failure(result, 1, "is not usable JSON: ")
    if depth == 201:
        assert "it is nested more than 200 deep" in result.error


@pytest.mark.parametrize(
    ("number", "code"),
    [
        ("7" * 4300, 0), ("-" + "7" * 4299, 0), ("7" * 4301, 1), ("7" * 100_000, 1),
        ("1e308", 0), ("1e309", 1), ("-1e400", 1), ("NaN", 1), ("Infinity", 1), ("-Infinity", 1),
        ("1e-999", 0), ("01", 1), ("+1", 1), ("1.", 1), ("0x1", 1),
    ],
    ids=lambda value: str(value)[:9] + f"-{len(str(value))}",
)  # fmt: skip
def test_the_numbers_of_a_document(number: str, code: int, cli: InProcess, api: Api) -> None:
    """Refused on every Python alike."""
    result = cli("status", at=api.answers(b'{"items":[{"id":%s}]}' % number.encode()))
    assert result.code == code
    if code:
        check_failure(result, 1, "is not usable JSON: ")
    else:
        assert number[:9].rstrip("e308") in result.out.decode() or number == "1e-999"


@pytest.mark.parametrize(
    ("data", "replaced"),
    [
        pytest.param(b"caf\xe9", "caf\ufffd", id="latin-1"),
        pytest.param(b"\xff\xfe", "\ufffd\ufffd", id="not-a-lead-byte"),
        pytest.param(b"\xf0\x9f\x98", "\ufffd", id="a-cut-letter"),
        pytest.param(b"\xc0\xaf", "\ufffd\ufffd", id="overlong"),
        pytest.param(b"\xed\xa0\x80", "\ufffd\ufffd\ufffd", id="a-surrogate"),
    ],
)
def test_bytes_that_are_not_utf_8(data: bytes, replaced: str, cli: InProcess, api: Api) -> None:
    """Promise 3.17: it is a success, but not without a word."""
    body = BODIES["run"].replace(b"OK", b"<" + data + b">")
    result = cli(*words("run"), at=api.answers(body))
    assert (result.code, result.document["stdout"]) == (0, f"<{replaced}>")
    [warning] = result.spoken.warnings
    assert warning.endswith(": the answer is not all UTF-8: what is not became U+FFFD")


def test_a_byte_order_mark_is_accepted(cli: InProcess, api: Api) -> None:
    result = cli(*words("run"), at=api.answers(b"\xef\xbb\xbf" + BODIES["run"]))
    assert (result.code, result.err, result.document) == (0, b"", DOCUMENTS["run"])


def test_an_empty_content_encoding_is_none(cli: InProcess, api: Api) -> None:
    api.sends(message(BODIES["run"], "200 OK", "Content-Encoding: "))
    assert cli(*words("run"), at=api).code == 0


# --- delete -----------------------------------------------------------------------------------


class Deletion(NamedTuple):
    """What the server does to each request, and the outcome."""

    id: str
    scripts: tuple[Script, ...]
    code: int
    says: str = ""
    warns: bool = False

    @property
    def requests(self) -> int:
        return len(self.scripts)


GONE = answer(b'{"error":{"type":"not_found","message":"no such run"}}', "404 Not Found")
UNAVAILABLE = answer(b'{"error":{"type":"unavailable","message":"m"}}', "503 Unavailable")


def says_of(document: object) -> Script:
    return answer(json.dumps(document).encode())


NOT_DELETED = "the answer does not say that the run run-1 is deleted"
DELETIONS = [
    Deletion("true", (says_of({"deleted": True, "run_id": "run-1"}),), 0),
    Deletion("true-without-an-id", (says_of({"deleted": True}),), 0),
    Deletion("an-empty-object", (answer(b"{}"),), 0),
    Deletion("204", (answer(b"", "204 No Content"),), 0),
    Deletion("204-with-an-old-header", (answer(b"", "204 No Content", "X: y"),), 0),
    *(
        Deletion(name, (says_of(document),), 1, NOT_DELETED)
        for name, document in {
            "false": {"deleted": False, "run_id": "run-1"},
            "not-a-boolean": {"deleted": "true", "run_id": "run-1"},
            "a-number": {"deleted": 1},
            "null": {"deleted": None},
            "not-ok": {"ok": False},
            "only-its-id": {"run_id": "run-1"},
            "another-run": {"deleted": True, "run_id": "run-2"},
            "no-run": {"deleted": True, "run_id": None},
            "a-state": {"run_id": "run-1", "state": "running"},
        }.items()
    ),
    Deletion("200-without-a-body", (answer(b""),), 1, "the answer is empty"),
    Deletion("not-found", (GONE,), 1, "HTTP 404 not_found: no such run"),
    # Only where a connection was lost may an earlier try have done it.
    Deletion("lost-then-404", (reset(), GONE), 0, warns=True),
    Deletion("closed-then-404", (close(), GONE), 0, warns=True),
    Deletion("cut-then-404", (reset(message(b"{", length=9)), GONE), 0, warns=True),
    Deletion("lost-then-503-then-404", (reset(), UNAVAILABLE, GONE), 0, warns=True),
    Deletion("503-then-lost-then-404", (UNAVAILABLE, close(), GONE), 0, warns=True),
    Deletion("503-then-404", (UNAVAILABLE, GONE), 1, "HTTP 404 not_found"),
    Deletion("502-504-404", (answer(b"", "502 X"), answer(b"", "504 X"), GONE), 1, "HTTP 404"),
    Deletion("lost-then-403", (reset(), answer(b"{}", "403 Forbidden")), 1, "HTTP 403 Forbidden"),
    Deletion("lost-then-410", (reset(), answer(b"{}", "410 Gone")), 1, "HTTP 410 Gone"),
]


# Three tries take a second.
@pytest.mark.parametrize(
    "case", tiers(DELETIONS, *(c for c in DELETIONS if c.requests < 3), ids=lambda case: case.id)
)
def test_delete(case: Deletion, cli: InProcess, serve: Serve) -> None:
    """Promise 6.16."""
    server = serve(*case.scripts)
    result = cli("delete", "run-1", at=server)
    if case.code:
        check_failure(result, case.code, "/runs/run-1: ", case.says)
    else:
        assert (result.code, result.spoken.errors) == (0, [])
        assert result.document["deleted"] is True
        assert result.document.get("run_id", "run-1") == "run-1"
    warned = (
        "bus-containers: warning: run run-1: the connection of a first request was lost, and now "
        "there is no such run, so it counts as deleted"
    )
    assert result.spoken.warnings == [warned] * case.warns
    assert server.methods() == ["DELETE"] * case.requests


def test_what_is_known_of_one_deletion_is_not_known_of_the_next(
    cli: InProcess, serve: Serve
) -> None:
    server = serve(reset(), GONE, GONE)
    result = cli("delete", "run-1", "run-2", at=server)
    assert result.code == 1
    assert [item["run_id"] for item in result.document] == ["run-1"]
    assert "/runs/run-2: HTTP 404" in result.error


def test_the_library_says_the_same(serve: Serve) -> None:
    server = serve(reset(), GONE, says_of({"ok": False}))
    client = bus_containers.Client(server.url, CANARY)
    assert client.delete("run-1") == {"deleted": True, "run_id": "run-1"}
    with pytest.raises(bus_containers.ProtocolError, match=r"the run run-2 is deleted$"):
        client.delete("run-2")


# --- redirects --------------------------------------------------------------------------------

TARGETS = {
    "other-host": "OTHER/api/v1/containers/status",
    "same-host": "SAME/api/v1/containers/status/",
    "relative": "/login?next=containers",
    "file": "file:///etc/passwd",
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("name", tiers(api_commands(), "run", "status"))
def test_a_redirect_is_not_followed(
    name: str, status: int, target: str, cli: InProcess, serve: Serve
) -> None:
    """Promise 6.17."""
    other = serve(answer(BODIES[name]))

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(message(b"{}", f"{status} Moved", f"Location: {to}"))

    server = serve(script)
    to = target.replace("OTHER", other.url).replace("SAME", server.url)
    result = cli(*words(name), at=server)
    says = f"HTTP {status} Moved; redirected to {to}, not followed; "
    check_failure(result, failure_code(name), says)
    assert not result.spoken.advises
    assert (server.connections, other.connections) == (1, 0)


def test_a_deletion_has_its_id(cli: InProcess, api: Api) -> None:
    """Promise 3.14: whoever deletes several sees which."""
    result = cli("delete", "run-1", "-f", "text", at=api.answers({"deleted": True}))
    assert (result.code, result.out, result.err) == (0, b"deleted run-1\n", b"")
