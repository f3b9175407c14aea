# SPDX-License-Identifier: MIT
"""The three formats of a result, byte for byte where bytes are promised: promises 3.13 to 3.17."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest

import bus_containers
from hostile import Api
from support import InProcess, Program, as_json, words

Show = Callable[..., "tuple[bytes, bytes]"]


@pytest.fixture
def show(cli: InProcess, api: Api) -> Show:
    """What a command prints of an answer, on standard output and on standard error."""

    def call(name: str, format_: str, *answers: object, code: int = 0) -> tuple[bytes, bytes]:
        more = [f"run-{number + 2}" for number in range(len(answers) - 1)]
        result = cli("--format", format_, *words(name), *more, at=api.answers(*answers))
        assert result.code == code, result
        return result.out, result.err

    return call


STATUS = b'{"items":[{"state":"ready","id":"runner","details":{"b":2,"a":[1,"\xc3\xa4"]}}]}'
RUN = (
    b'{"stdout":"OK","run_id":"run-1","owner_identity_id":"me","runner_name":"runner",'
    b'"image":"codex","args":["sh","-c","printf OK"],"exit_code":0,"stderr":"","duration_ms":7,'
    b'"runtime":"docker","more":{"empty":{},"none":[],"null":null}}'
)
RUNS = (
    b'{"items":[{"run_id":"run-1","state":"exited","exit_code":37,"duration_ms":1200,'
    b'"image":"codex","args":["sh","-c","printf OK"],"x":1.5},'
    b'{"run_id":"run-22","state":"running","exit_code":null}]}'
)
DELETED = (b'{"run_id":"run-1","deleted":true}', b'{"deleted":true,"run_id":"run-2"}')
ANSWERS = {"status": [STATUS], "run": [RUN], "runs": [RUNS], "delete": DELETED}

# What is printed of them. A table is aligned: `runs` leaves out a column that no item has.
JSON_OF_DELETIONS = (
    '[\n  {\n    "run_id": "run-1",\n    "deleted": true\n  },\n'
    '  {\n    "deleted": true,\n    "run_id": "run-2"\n  }\n]\n'
)
TSV = {
    "status": 'id\tstate\towner\tdetails\nrunner\tready\t\t{"b":2,"a":[1,"\u00e4"]}\n',
    "run": (
        "run_id\texit_code\tduration_ms\timage\trunner_name\tstdout\tstderr\n"
        "run-1\t0\t7\tcodex\trunner\tOK\t\n"
    ),
    "runs": (
        "run_id\tstate\texit_code\tduration_ms\timage\tstarted_at\tcommand\n"
        "run-1\texited\t37\t1200\tcodex\t\tsh -c 'printf OK'\nrun-22\trunning\t\t\t\t\t\n"
    ),
    "delete": "run_id\tdeleted\nrun-1\ttrue\nrun-2\ttrue\n",
}
TEXT = {
    "status": 'ID      STATE  OWNER  DETAILS\nrunner  ready         {"b":2,"a":[1,"\u00e4"]}\n',
    "run": "OK",
    "runs": (
        "RUN ID  STATE    EXIT CODE  DURATION MS  IMAGE  COMMAND\n"
        "run-1   exited   37         1200         codex  sh -c 'printf OK'\n"
        "run-22  running\n"
    ),
    "delete": "deleted run-1\ndeleted run-2\n",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_each_format(name: str, show: Show, cli: InProcess, api: Api) -> None:
    document = json.loads(ANSWERS[name][0])
    given = ANSWERS[name][:1]
    assert show(name, "json", *given) == (as_json(document), b"")
    assert cli(*words(name), at=api).out == as_json(document)  # it is the default
    assert show(name, "tsv", *ANSWERS[name]) == (TSV[name].encode(), b"")
    out, err = show(name, "text", *ANSWERS[name])
    assert out == TEXT[name].encode()
    assert err.count(b"\n") == (name == "run")
    if name == "delete":
        assert show(name, "json", *DELETED) == (JSON_OF_DELETIONS.encode(), b"")


def test_an_answer_with_little_in_it(show: Show) -> None:
    for name, nothing in (("status", {"items": []}), ("runs", [])):
        assert show(name, "tsv", nothing)[0].decode() == TSV[name].partition("\n")[0] + "\n"
        assert show(name, "text", nothing)[0].count(b"\n") == 1
    assert show("delete", "tsv", {})[0] == b"run_id\tdeleted\nrun-1\ttrue\n"
    assert show("delete", "text", {"deleted": True}) == (b"deleted run-1\n", b"")
    run = {"exit_code": 0, "stdout": None, "duration_ms": None}
    assert show("run", "json", run) == (as_json(run), b"")
    assert show("run", "tsv", run)[0].splitlines()[1] == b"\t0\t\t\t\t\t"
    assert show("run", "text", run) == (b"", b"bus-containers: the run ended with exit code 0\n")


# --- values -----------------------------------------------------------------------------------

# A string as JSON, and how it is printed as JSON; both without their quotes.
STRINGS = {
    "escaped-umlaut": (b"\\u00e4", b"\xc3\xa4"),
    "beyond-the-bmp": (b"\\ud83d\\ude00", "\U0001f600".encode()),
    "line-separator": (b"\\u2028", "\u2028".encode()),
    "solidus": (b"a\\/b", b"a/b"),
    "escapes": (b'\\"\\\\\\t\\r\\n\\u0000\\u001b[31m', b'\\"\\\\\\t\\r\\n\\u0000\\u001b[31m'),
    "surrogates-the-wrong-way-round": (b"\\ude00\\ud83d", b"\\ude00\\ud83d"),
    "surrogate-beside-an-emoji": (b"\\ud83d\\ud83d\\ude00", b"\\ud83d\xf0\x9f\x98\x80"),
}


@pytest.mark.parametrize(("given", "printed"), STRINGS.values(), ids=STRINGS.keys())
def test_a_string_in_json(given: bytes, printed: bytes, show: Show) -> None:
    """Promises 3.14 and 3.17."""
    body = b'{"run_id":"run-1","exit_code":0,"%s":1,"stdout":"%s","stderr":""}'
    out, err = show("run", "json", body % (given, given))
    assert err == b""
    assert b'  "%s": 1,\n  "stdout": "%s",\n' % (printed, printed) in out
    assert json.loads(out) == json.loads(body % (given, given))


CELLS: list[tuple[object, str]] = [  # a value, and how it stands in a cell of tsv
    ("a\tb\nc\rd\\e\\tf", "a\\tb\\nc\\rd\\\\e\\\\tf"),
    ("\x1b[31m\0", "\x1b[31m\0"),
    ("\ud800", "\\ud800"),
    ("\u00e4\U0001f600", "\u00e4\U0001f600"),
    ("", ""),
    (None, ""),
    (True, "true"),
    (False, "false"),
    (0, "0"),
    (-1.5, "-1.5"),
    (12345678901234567890123, "12345678901234567890123"),
    ([], "[]"),
    ({"b": [1, None], "a": "x y"}, '{"b":[1,null],"a":"x y"}'),
    ({"a": "\t\\"}, '{"a":"\\\\t\\\\\\\\"}'),
    (["\u00e4"], '["\u00e4"]'),
]


def test_a_value_in_tsv(show: Show) -> None:
    """Promise 3.16."""
    items = [{"id": "x", "state": value, "details": value} for value, _ in CELLS]
    out, err = show("status", "tsv", {"items": items})
    rows = [f"x\t{cell}\t\t{cell}" for _, cell in CELLS]
    assert out.decode() == "\n".join(["id\tstate\towner\tdetails", *rows, ""])
    assert err == b""


def random_text(dice: random.Random) -> str:
    letters = (
        'ab \t\n\r\\"/,:\0\x0b\x1c\x1b\x7f\x85\u00e4\u20ac\u2028\ufeff\U0001f600\ud800ntru{}[]'
    )
    return "".join(dice.choices(letters, k=dice.randrange(12)))


def random_value(dice: random.Random, depth: int = 0) -> Any:
    several = range(dice.randrange(4) if depth < 3 else 0)
    kinds: list[Callable[[], Any]] = [
        lambda: dice.choice([None, True, False]),
        lambda: dice.getrandbits(dice.choice([1, 8, 64, 200])) * dice.choice([1, -1]),
        lambda: dice.uniform(-1e9, 1e9),
        lambda: random_text(dice),
        lambda: [random_value(dice, depth + 1) for _ in several],
        lambda: {random_text(dice): random_value(dice, depth + 1) for _ in several},
    ]
    return dice.choice(kinds)()


ESCAPES = {"\\t": "\t", "\\n": "\n", "\\r": "\r", "\\\\": "\\"}


def test_random_documents(show: Show) -> None:
    """As `json` they are what json.dumps writes; out of tsv, text comes back as it was."""
    dice = random.Random(6)
    items = [
        {"run_id": str(number), "state": random_text(dice), random_text(dice): random_value(dice)}
        for number in range(2_000)
    ]
    document = {"items": items}
    assert show("runs", "json", document) == (as_json(document), b"")
    lines = show("runs", "tsv", document)[0].decode().split("\n")
    assert lines.pop() == ""
    for line, item in zip(lines[1:], items):
        cells = line.split("\t")
        state = re.sub(r"\\[tnr\\]", lambda found: ESCAPES[found[0]], cells[1])
        assert (len(cells), cells[0]) == (7, item["run_id"])
        assert state == item["state"].replace("\ud800", "\\ud800")
    assert len(lines) == 2_001


def test_a_large_result_is_whole(show: Show) -> None:
    stdout = "\U0001f600\n\ud83d\u00e4\t" * 300_000
    document = {"run_id": "run-1", "exit_code": 0, "stdout": stdout, "stderr": ""}
    assert show("run", "text", document)[0] == stdout.encode("utf-8", "backslashreplace")
    assert show("run", "json", document)[0] == as_json(document)


def test_a_large_result_of_blanks_is_not_held_twice() -> None:
    document = {"run_id": "run-1", "stdout": " " * 2_000_000}
    pieces = [*bus_containers._format_json("run", document)]
    assert len(pieces) > 1
    assert "".join(pieces).encode() == as_json(document)


def test_a_result_in_json_leaves_in_one_write(cli: InProcess, api: Api) -> None:
    """So that those of parallel runs do not mix in one pipe. Here each write is a packet."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        document = {"run_id": "run-1", "exit_code": 0, "stdout": "x" * 3000, "args": ["sh", "-c"]}
        result = cli(*words("run"), at=api.answers(document), stdout=left.fileno())
        left.send(b"the end")
        packets = [*iter(lambda: right.recv(65536), b"the end")]
    assert result.code == 0
    assert [packet for packet in packets if packet] == [as_json(document)]


WHEN = "2026-01-02T03:04:05Z"
RUN_AT = {"run_id": "r", "started_at": WHEN}
ROWS: list[
    tuple[str, dict[str, object], str]
] = [  # a command, an item of its answer, its row in tsv
    ("status", {"provider": "docker", "state": "ready"}, "docker\tready\t\t"),
    ("status", {"id": "x", "owner_identity_id": None, "owner_account_id": "old"}, "x\t\told\t"),
    ("status", {"id": "x", "owner_account_id": "old", "owner_identity_id": "new"}, "x\t\tnew\t"),
    ("runs", {**RUN_AT, "args": ["echo", "a b"]}, f"r\t\t\t\t\t{WHEN}\techo 'a b'"),
    ("runs", {**RUN_AT, "command": ["a'b", ""]}, f"""r\t\t\t\t\t{WHEN}\t'a'"'"'b' ''"""),
    ("runs", {**RUN_AT, "args": ["\u00e4", "*"]}, f"r\t\t\t\t\t{WHEN}\t'\u00e4' '*'"),
    ("runs", {**RUN_AT, "args": ["x" * 100]}, f"r\t\t\t\t\t{WHEN}\t{'x' * 100}"),
    ("runs", {**RUN_AT, "args": []}, f"r\t\t\t\t\t{WHEN}\t"),
    ("runs", {"id": "a", "state": "exited"}, "a\texited\t\t\t\t\t"),
]


def test_where_a_cell_is_taken_from(show: Show) -> None:
    """Promises 1.4, 3.15 and 3.16: a command is whole in tsv, and cut in text."""
    for name, item, row in ROWS:
        document: dict[str, object] = {"items": [item]}
        assert show(name, "tsv", document)[0].decode().splitlines()[1:] == [row]
        line = show(name, "text", document)[0].decode().splitlines()[1]
        assert line.split() == [word for cell in row.split("\t") for word in cell[:40].split()]
    # A status has another shape, too.
    document = {"status": ROWS[0][1]}
    assert show("status", "json", document)[0] == as_json(document)
    assert show("status", "tsv", document)[0].splitlines()[1:] == [ROWS[0][2].encode()]


# --- tables and output, as text ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["status", "runs"])
def test_a_long_cell_does_not_widen_its_column(name: str, show: Show) -> None:
    """Promise 3.15: one state of 20,000 characters, in one of 500 rows."""
    last = {"image": "i", "details": {"a": 1}}
    items = [{"id": str(n), "run_id": str(n), "state": "ready", **last} for n in range(500)]
    items[250]["state"] = "y" * 20_000
    out, err = show(name, "text", {"items": items})
    assert (err, out.count(b"\n"), out.count(b"y" * 20_000)) == (b"", 501, 1)
    assert len(out) < 80_000


@pytest.mark.parametrize("name", ["status", "runs"])
def test_a_table_cannot_drive_the_terminal(name: str, show: Show) -> None:
    """Promises 3.17 and 3.18."""
    controls = "".join(map(chr, [*range(32), *range(127, 160)]))
    controls += "\u200b\u202e\u2066\u2028\u2029\u061c\ufeff\U000e0041"
    wild = f"\x1b]0;title\x07\x1b[2J{controls}\n\r\ta\ud800bend"
    items = [{"id": wild, "state": wild, "details": {"a": wild}}, {"id": "x", "state": "y"}]
    text = show(name, "text", {"items": items})[0].decode()
    assert text.replace("\n", "").isprintable()
    assert text.count("\n") == 3
    columns = 3 if name == "status" else 2
    assert text.count("]0;title") == text.count("a\\ud800bend") == columns


OUTPUTS = {
    "plain": "OK",
    "empty": "",
    "only-newlines": "\n\n\n",
    "controls": "".join(map(chr, [*range(32), *range(127, 160)])),
    "crlf": "a\r\nb\rc\r\n",
    "letters": "\ufeff\U0001f600\u20ac\u00e4",
    "no-final-newline": "a\nb",
    "surrogate": "\ud800",
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_text_of_a_run_is_the_containers_output(output: str, show: Show) -> None:
    """Promise 3.15, and one line on standard error."""
    closing = b"bus-containers: run run-1 ended with exit code 37 after 7 ms\n"
    for stdout, stderr in (("OK", output), (output, "OK\n")):
        document = {"run_id": "run-1", "exit_code": 37, "duration_ms": 7}
        document.update(stdout=stdout, stderr=stderr)
        out, err = show("run", "text", document, code=37)
        wrote_out, wrote_err = (
            text.encode("utf-8", "backslashreplace") for text in (stdout, stderr)
        )
        assert out == wrote_out
        assert err.replace(wrote_err, b"", 1).lstrip(b"\n") == closing
        assert err.startswith(wrote_err)


def test_a_process_prints_the_same_bytes(cli: InProcess, program: Program, api: Api) -> None:
    """Promise 3.13, whatever Python makes of the streams."""
    stdout = "".join(OUTPUTS.values())
    api.answers({"run_id": "run-1", "exit_code": 0, "stdout": stdout, "stderr": stdout})
    args = ("--format", "text", *words("run"))
    result = program(*args, at=api, env={"PYTHONIOENCODING": "latin-1", "LC_ALL": "C"})
    assert result[:3] == cli(*args, at=api)[:3]
