# SPDX-License-Identifier: MIT
"""The three formats of a result, byte for byte where bytes are promised: promises 3.13 to 3.17."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from hostile import Api
from support import InProcess, Program, spoken, tiers, words

CASES = 10_000
Show = Callable[..., "tuple[bytes, bytes]"]


@pytest.fixture
def show(cli: InProcess, api: Api) -> Show:
    """What a command prints of an answer, on standard output and on standard error."""

    def call(name: str, format_: str | None, *answers: bytes, code: int = 0) -> tuple[bytes, bytes]:
        options = ["--format", format_] if format_ else []
        more = [f"run-{number + 2}" for number in range(len(answers) - 1)]
        result = cli(*options, *words(name), *more, at=api.answers(*answers))
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
DELETED = b'{"run_id":"run-1","deleted":true,"owner_identity_id":"me"}'

# --- json -------------------------------------------------------------------------------------

JSON = {
    "status": """\
{
  "items": [
    {
      "state": "ready",
      "id": "runner",
      "details": {
        "b": 2,
        "a": [
          1,
          "\u00e4"
        ]
      }
    }
  ]
}
""",
    "run": """\
{
  "stdout": "OK",
  "run_id": "run-1",
  "owner_identity_id": "me",
  "runner_name": "runner",
  "image": "codex",
  "args": [
    "sh",
    "-c",
    "printf OK"
  ],
  "exit_code": 0,
  "stderr": "",
  "duration_ms": 7,
  "runtime": "docker",
  "more": {
    "empty": {},
    "none": [],
    "null": null
  }
}
""",
    "runs": """\
{
  "items": [
    {
      "run_id": "run-1",
      "state": "exited",
      "exit_code": 37,
      "duration_ms": 1200,
      "image": "codex",
      "args": [
        "sh",
        "-c",
        "printf OK"
      ],
      "x": 1.5
    },
    {
      "run_id": "run-22",
      "state": "running",
      "exit_code": null
    }
  ]
}
""",
    "delete": """\
{
  "run_id": "run-1",
  "deleted": true,
  "owner_identity_id": "me"
}
""",
}
ANSWERS = {"status": STATUS, "run": RUN, "runs": RUNS, "delete": DELETED}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("format_", ["json", None], ids=["json", "default"])
def test_json(name: str, format_: str | None, show: Show) -> None:
    assert show(name, format_, ANSWERS[name]) == (JSON[name].encode(), b"")


def test_json_of_several_deletions(show: Show) -> None:
    out, err = show("delete", "json", DELETED, b'{"deleted":true,"run_id":"run-2"}')
    assert err == b""
    assert out.decode() == (
        "[\n  {\n"
        '    "run_id": "run-1",\n    "deleted": true,\n    "owner_identity_id": "me"\n  },\n  {\n'
        '    "deleted": true,\n    "run_id": "run-2"\n  }\n]\n'
    )


# A string as JSON, and how it is printed; both without their quotes.
STRINGS = {
    "umlaut": (b"\xc3\xa4", b"\xc3\xa4"),
    "escaped-umlaut": (b"\\u00e4", b"\xc3\xa4"),
    "beyond-the-bmp": (b"\\ud83d\\ude00", "\U0001f600".encode()),
    "line-separator": (b"\\u2028", "\u2028".encode()),
    "solidus": (b"a\\/b", b"a/b"),
    "quotes": (b'\\"\\\\', b'\\"\\\\'),
    "blanks": (b"\\t\\r\\n", b"\\t\\r\\n"),
    "nul": (b"\\u0000", b"\\u0000"),
    "escape": (b"\\u001b[31m", b"\\u001b[31m"),
    "lone-high-surrogate": (b"\\ud800", b"\\ud800"),
    "lone-low-surrogate": (b"\\udfff", b"\\udfff"),
    "surrogates-the-wrong-way-round": (b"\\ude00\\ud83d", b"\\ude00\\ud83d"),
    "surrogate-beside-an-emoji": (b"\\ud83d\\ud83d\\ude00", b"\\ud83d\xf0\x9f\x98\x80"),
    "html": (b"<b>&'", b"<b>&'"),
}


@pytest.mark.parametrize(("given", "printed"), STRINGS.values(), ids=STRINGS.keys())
def test_a_string_in_json(given: bytes, printed: bytes, show: Show) -> None:
    body = b'{"run_id":"run-1","exit_code":0,"%s":1,"stdout":"%s","stderr":""}'
    out, err = show("run", "json", body % (given, given))
    assert err == b""
    assert b'  "stdout": "%s",\n' % printed in out
    assert b'  "%s": 1,\n' % printed in out
    assert json.loads(out) == json.loads(body % (given, given))


def random_value(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(9 if depth < 3 else 7)
    if kind == 0:
        return dice.choice([None, True, False])
    if kind == 1:
        return dice.getrandbits(dice.choice([1, 8, 64, 200])) * dice.choice([1, -1])
    if kind == 2:
        return dice.uniform(-1e9, 1e9)
    if kind < 7:
        return random_text(dice)
    if kind == 7:
        return [random_value(dice, depth + 1) for _ in range(dice.randrange(4))]
    return {random_text(dice): random_value(dice, depth + 1) for _ in range(dice.randrange(4))}


def random_text(dice: random.Random) -> str:
    letters = 'ab \t\n\r\\"/,:\0\x1b\x7f\x85\u00e4\u20ac\u2028\ufeff\U0001f600\ud800\udfffntru{}[]'
    text = "".join(dice.choices(letters, k=dice.randrange(8)))
    return re.sub("\ud800\udfff", "", text)  # which would be a pair once it is JSON


def test_random_documents_in_json(show: Show) -> None:
    dice = random.Random(6)
    items = [{"run_id": str(n), random_text(dice): random_value(dice)} for n in range(2_000)]
    out, err = show("runs", "json", json.dumps({"items": items}).encode())
    assert err == b""

    def pairs(text: bytes) -> Any:
        return json.loads(text, object_pairs_hook=lambda pairs: pairs)

    assert pairs(out) == pairs(json.dumps({"items": items}).encode())
    expected = json.dumps({"items": items}, ensure_ascii=False, indent=2) + "\n"
    assert out == expected.encode("utf-8", "backslashreplace")


@pytest.mark.parametrize("format_", ["json", "text", "tsv"])
def test_bytes_that_are_not_utf_8(format_: str, show: Show) -> None:
    out, err = show("run", format_, b'{"run_id":"r","exit_code":0,"stdout":"a\xffb","stderr":""}')
    assert "a\ufffdb" in out.decode("utf-8")
    assert len(spoken(err).warnings) == 1
    assert "UTF-8" in spoken(err).warnings[0]


def test_a_large_result_is_whole(show: Show) -> None:
    stdout = "\U0001f600\n\ud83d\u00e4\t" * 700_000
    body = json.dumps({"run_id": "run-1", "exit_code": 0, "stdout": stdout, "stderr": ""}).encode()
    plain = stdout.encode("utf-8", "backslashreplace")
    assert show("run", "text", body)[0] == plain
    assert json.loads(show("run", "json", body)[0])["stdout"] == stdout


# --- tsv --------------------------------------------------------------------------------------

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
    "delete": "run_id\tdeleted\nrun-1\ttrue\n",
}
NOTHING = {"status": b'{"items":[]}', "runs": b"[]", "run": b'{"exit_code":0}', "delete": b"{}"}


@pytest.mark.parametrize("name", ANSWERS)
def test_tsv(name: str, show: Show) -> None:
    assert show(name, "tsv", ANSWERS[name]) == (TSV[name].encode(), b"")


@pytest.mark.parametrize("name", ["status", "runs"])
def test_tsv_of_nothing_is_its_header(name: str, show: Show) -> None:
    assert show(name, "tsv", NOTHING[name])[0].decode() == TSV[name].partition("\n")[0] + "\n"


def test_tsv_of_an_answer_with_little_in_it(show: Show) -> None:
    header = TSV["run"].partition("\n")[0]
    assert show("run", "tsv", NOTHING["run"])[0].decode() == f"{header}\n\t0\t\t\t\t\t\n"
    assert show("delete", "tsv", NOTHING["delete"])[0] == b"run_id\tdeleted\nrun-1\ttrue\n"


def test_tsv_of_several_deletions(show: Show) -> None:
    out, _ = show("delete", "tsv", DELETED, b'{"deleted":true,"run_id":"run-2"}')
    assert out == b"run_id\tdeleted\nrun-1\ttrue\nrun-2\ttrue\n"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ('"a\\tb"', "a\\tb"),
        ('"a\\nb"', "a\\nb"),
        ('"a\\rb"', "a\\rb"),
        ('"a\\\\b"', "a\\\\b"),
        ('"a\\\\tb"', "a\\\\tb"),
        ('"\\\\\\t\\\\"', "\\\\\\t\\\\"),
        ('"\\u001b[31m\\u0000"', "\x1b[31m\0"),
        ('"\\ud800"', "\\ud800"),
        ('"\u00e4\U0001f600"', "\u00e4\U0001f600"),
        ('""', ""),
        ("null", ""),
        ("true", "true"),
        ("false", "false"),
        ("0", "0"),
        ("-1.5", "-1.5"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("[]", "[]"),
        ("{}", "{}"),
        ('{"b": [1, null], "a": "x y"}', '{"b":[1,null],"a":"x y"}'),
        ('{"a": "\\t\\\\"}', '{"a":"\\\\t\\\\\\\\"}'),
        ('["\u00e4"]', '["\u00e4"]'),
    ],
)
def test_a_value_in_tsv(value: str, cell: str, show: Show) -> None:
    body = f'{{"items":[{{"id":"x","state":{value},"details":{value}}}]}}'.encode()
    out, err = show("status", "tsv", body)
    assert out.decode() == f"id\tstate\towner\tdetails\nx\t{cell}\t\t{cell}\n"
    assert err == b""


ESCAPES = {"\\t": "\t", "\\n": "\n", "\\r": "\r", "\\\\": "\\"}


def unescaped(cell: str) -> str:
    return re.sub(r"\\[tnr\\]", lambda found: ESCAPES[found[0]], cell)


def test_random_values_come_back_from_tsv(show: Show) -> None:
    dice = random.Random(7)
    letters = "ab\t\n\r\\\\\\tnr \0\x0b\x0c\x1c\x1b\x7f\x85\u2028\u00e4\U0001f600"
    texts = ["".join(dice.choices(letters, k=dice.randrange(12))) for _ in range(CASES)]
    rows = [texts[at : at + 2] for at in range(0, CASES, 2)]
    items = [{"run_id": "x", "state": state, "image": image} for state, image in rows]
    out, err = show("runs", "tsv", json.dumps({"items": items}).encode())
    assert err == b""
    lines = out.decode("utf-8").split("\n")
    assert lines.pop() == ""
    cells = [line.split("\t") for line in lines[1:]]
    assert {len(row) for row in cells} == {7}
    assert [[unescaped(row[1]), unescaped(row[4])] for row in cells] == rows


@pytest.mark.parametrize(
    ("owner", "cell"),
    [
        ('"owner_identity_id":"new"', "new"),
        ('"owner_account_id":"old"', "old"),
        ('"owner_account_id":"old","owner_identity_id":"new"', "new"),
        ('"owner_identity_id":null,"owner_account_id":"old"', "old"),
        ('"other":1', ""),
    ],
)
def test_the_owner_of_older_deployments(owner: str, cell: str, show: Show) -> None:
    body = f'{{"items":[{{"id":"x","state":"ready",{owner}}}]}}'.encode()
    assert show("status", "tsv", body)[0].decode().splitlines()[1] == f"x\tready\t{cell}\t"
    assert cell in show("status", "text", body)[0].decode()


def test_the_other_shape_of_a_status(show: Show) -> None:
    body = b'{"status":{"state":"ready","provider":"docker","details":{"a":1}}}'
    assert json.loads(show("status", "json", body)[0]) == json.loads(body)
    header, row = show("status", "tsv", body)[0].decode().splitlines()
    assert header == "id\tstate\towner\tdetails"
    assert row.split("\t")[1:] == ["ready", "", '{"a":1}']
    text = show("status", "text", body)[0].decode()
    assert "ready" in text
    assert '{"a":1}' in text


# --- text -------------------------------------------------------------------------------------


def table(out: bytes) -> list[list[str]]:
    """The cells of an aligned table; every column begins below its title."""
    lines = out.decode("utf-8").split("\n")
    assert lines.pop() == ""
    starts = [found.start() for found in re.finditer(r"(?<!\S)\S+(?: \S+)*", lines[0])]
    cells = []
    for line in lines:
        for start in starts[1:]:
            assert line[start - 2 : start].isspace() or len(line) <= start - 2, line
        ends = [*starts[1:], None]
        cells.append([line[start:end].rstrip() for start, end in zip(starts, ends)])
        assert line == line.rstrip()
    return cells


def test_text_of_status(show: Show) -> None:
    out, err = show("status", "text", STATUS)
    assert err == b""
    titles, row = table(out)
    assert [title.lower() for title in titles] == ["id", "state", "owner", "details"]
    assert row == ["runner", "ready", "", '{"b":2,"a":[1,"\u00e4"]}']


def test_text_of_runs(show: Show) -> None:
    out, err = show("runs", "text", RUNS)
    assert err == b""
    titles, *rows = table(out)
    assert [title.lower().replace(" ", "_") for title in titles] == [
        "run_id",
        "state",
        "exit_code",
        "duration_ms",
        "image",
        "command",
    ]
    assert rows == [
        ["run-1", "exited", "37", "1200", "codex", "sh -c 'printf OK'"],
        ["run-22", "running", "", "", "", ""],
    ]


@pytest.mark.parametrize(
    ("item", "command"),
    [
        ({"args": ["echo", "a b"]}, "echo 'a b'"),
        ({"command": ["echo", "a'b", ""]}, """echo 'a'"'"'b' ''"""),
        ({"args": ["x" * 100]}, "x" * 100),
        ({"args": ["\u00e4", "*"]}, "'\u00e4' '*'"),
        ({"args": []}, ""),
        ({}, ""),
    ],
    ids=["args", "command", "long", "letters", "empty", "none"],
)
def test_which_run_it_was(item: dict[str, Any], command: str, show: Show) -> None:
    """Promise 3.16: a last column with the command, whole in tsv and cut in text."""
    started_at = "2026-01-02T03:04:05Z"
    body = json.dumps([{"run_id": "r", "started_at": started_at, **item}]).encode()
    header, row = (line.split("\t") for line in show("runs", "tsv", body)[0].decode().splitlines())
    assert dict(zip(header, row)) == {
        "run_id": "r",
        "state": "",
        "exit_code": "",
        "duration_ms": "",
        "image": "",
        "started_at": started_at,
        "command": command,
    }
    line = show("runs", "text", body)[0].decode().splitlines()[1]
    assert started_at in line
    shown = line.partition(started_at)[2].strip()
    assert len(shown) <= 43  # 40, and what says that it goes on
    assert shown[:37] == command[:37]


@pytest.mark.parametrize("name", ["status", "runs"])
def test_a_long_cell_does_not_widen_its_column(name: str, show: Show) -> None:
    """Promise 3.15: one state of 20,000 characters, in one of 500 rows."""
    last = {"image": "i", "details": {"a": 1}}
    items = [{"id": str(n), "run_id": str(n), "state": "ready", **last} for n in range(500)]
    items[250]["state"] = "y" * 20_000
    out, err = show(name, "text", json.dumps({"items": items}).encode())
    assert err == b""
    assert len(out) < 80_000
    assert out.count(b"\n") == 501


def test_text_of_no_runs_is_a_table_too(show: Show) -> None:
    assert len(table(show("runs", "text", b'{"items":[]}')[0])) == 1


@pytest.mark.parametrize("name", ["status", "runs"])
def test_a_table_cannot_drive_the_terminal(name: str, show: Show) -> None:
    controls = "".join(map(chr, [*range(32), *range(127, 160)]))
    controls += "\u200b\u202e\u2066\u2028\u2029\u061c\ufeff\U000e0041"
    wild = f"\x1b]0;title\x07\x1b[2J{controls}\n\r\tend"
    items = [{"id": wild, "state": wild, "details": {"a": wild}}, {"id": "x", "state": "y"}]
    out, _ = show(name, "text", json.dumps({"items": items}).encode())
    text = out.decode("utf-8")
    assert text.replace("\n", "").isprintable()
    assert text.count("\n") == 3
    assert text.count("]0;title") == text.count("end") == (3 if name == "status" else 2)


def test_a_lone_surrogate_in_a_table(show: Show) -> None:
    out, _ = show("runs", "text", b'{"items":[{"run_id":"a\\ud800b","state":"exited"}]}')
    assert b"a\\ud800b" in out


def test_text_of_deletions(show: Show) -> None:
    out, err = show("delete", "text", DELETED, b'{"deleted":true,"run_id":"run-2"}')
    first, second = out.decode().splitlines()
    assert "run-1" in first
    assert "run-2" in second
    assert err == b""


OUTPUTS = {
    "plain": "OK",
    "empty": "",
    "newline": "OK\n",
    "only-newlines": "\n\n\n",
    "nul": "a\0b",
    "escape": "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "crlf": "a\r\nb\rc\r\n",
    "controls": "".join(map(chr, [*range(32), *range(127, 160)])),
    "four-bytes": "\U0001f600\u20ac\u00e4",
    "no-final-newline": "a\nb",
    "blanks": "  a \t \n ",
    "surrogate": "\ud800",
    "byte-order-mark": "\ufeffx",
}


@pytest.mark.parametrize("stderr", OUTPUTS.values(), ids=OUTPUTS.keys())
@pytest.mark.parametrize("stdout", ["OK", OUTPUTS["controls"]], ids=["plain", "controls"])
def test_text_of_a_run_is_the_containers_output(stdout: str, stderr: str, show: Show) -> None:
    for streams in ((stdout, stderr), (stderr, stdout)):
        document = {"run_id": "run-of-this", "exit_code": 37, "duration_ms": 4711}
        document.update(zip(("stdout", "stderr"), streams))
        out, err = show("run", "text", json.dumps(document).encode(), code=37)
        wrote_out, wrote_err = (text.encode("utf-8", "backslashreplace") for text in streams)
        assert out == wrote_out
        assert err.startswith(wrote_err)
        line = err[len(wrote_err) :].decode("ascii")
        if wrote_err and not wrote_err.endswith(b"\n"):
            line = line[1:] if line.startswith("\n") else line
        assert line.count("\n") == 1
        assert line.endswith("\n")
        for word in ("run-of-this", "37", "4711"):
            assert word in line


def test_the_line_about_a_run_cannot_drive_the_terminal(show: Show) -> None:
    body = b'{"run_id":"\\u001b[2J\\r\\nx","exit_code":0,"duration_ms":"\\u009b","stdout":""}'
    out, err = show("run", "text", body)
    assert out == b""
    assert len(spoken(err).errors) == 1


@pytest.mark.parametrize("format_", ["json", "text", "tsv"])
def test_a_run_without_its_output(format_: str, show: Show) -> None:
    body = b'{"run_id":"run-1","exit_code":0,"stdout":null,"duration_ms":null}'
    out, err = show("run", format_, body)
    if format_ == "text":
        assert out == b""
        assert err.count(b"\n") == 1
        assert b"None" not in err
    elif format_ == "tsv":
        assert out.splitlines()[1] == b"run-1\t0\t\t\t\t\t"
    else:
        assert json.loads(out) == json.loads(body)


# --- the same bytes from a process ------------------------------------------------------------


@pytest.mark.parametrize("format_", tiers(["json", "text", "tsv"], "text"))
def test_a_process_prints_the_same_bytes(
    format_: str, cli: InProcess, program: Program, api: Api
) -> None:
    stdout = OUTPUTS["controls"] + OUTPUTS["four-bytes"] + OUTPUTS["surrogate"] + "\r\n\n"
    api.answers({"run_id": "run-1", "exit_code": 0, "stdout": stdout, "stderr": stdout})
    args = ("--format", format_, *words("run"))
    expected = cli(*args, at=api)
    assert expected.out
    for environ in ({}, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONUTF8": "0", "LC_ALL": "C"}):
        result = program(*args, at=api, env={**environ})
        assert result[:3] == expected[:3]
