# SPDX-License-Identifier: MIT
"""The command line: what is accepted, what is refused before anything is sent, what is reported.

Promises 1.1, 1.2, 3.1, 3.4 to 3.6, 3.9, 3.10, 3.14 (the shapes of `runs` and `delete`), 3.15 (the
closing line of a run) and 6.8 (which states wait). The options come from the program itself.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hostile import Api, message
from support import (
    DOCUMENTS,
    LIMIT,
    Env,
    InProcess,
    Option,
    Program,
    all_commands,
    api_commands,
    as_json,
    check_failure,
    failure_code,
    options_of,
    skip_if,
    spoken,
    tiers,
    words,
)

RUN = ("run", "--", "true")
TOKEN_OF_A_FILE = "t0ken-of-the-file"


class Seen(NamedTuple):
    """What a call did, without what differs from call to call."""

    code: int
    out: bytes
    err: bytes
    files: dict[str, bytes]
    requests: list[bytes]

    @property
    def body(self) -> Any:
        """The JSON that the only request brought."""
        [request] = self.requests
        return json.loads(request.partition(b"\r\n\r\n")[2])

    @property
    def targets(self) -> list[str]:
        """Method and path of each request, the path from the API's part on."""
        lines = [request.split(b"\r\n", 1)[0].decode() for request in self.requests]
        return [re.sub(r"(\S+) /t[0-9]+(/\S+) HTTP/1.1", r"\1 \2", line) for line in lines]


Watch = Callable[..., Seen]


@pytest.fixture
def watch(cli: InProcess, api: Api, folder: Path) -> Watch:
    """Call the program at `api`, and take away the file `out` that it wrote."""

    def call(*args: str, **options: Any) -> Seen:
        before, files, out = len(api.requests), {}, folder / "out"
        result = cli(*args, **{"at": api, **options})
        if out.exists():
            files[out.name] = out.read_bytes()
            out.unlink()
        err = re.sub(rb"[0-9.]+ m?s\b", b"TIME", result.err)
        return Seen(result.code, result.out, err, files, api.requests[before:])

    return call


# --- options, as the program lists them -------------------------------------------------------

VALUES = {
    "PATH": "token", "DURATION": "1ns", "DIR": "missing", "FILE": "out", "NAME": "other",
    "REF": "alpine:3", "N": "9",
}  # fmt: skip
OPTIONS = {option.name: option for name in api_commands() for option in options_of(name)}
EACH_OPTION = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)


def spellings(option: Option, value: str) -> list[list[str]]:
    """All ways to write an option with this value, by its names, in one word and in two."""
    names = [option.name, *option.aliases]
    if not value:
        return [[name] for name in names]
    joint = [name + ("=" if name.startswith("--") else "") + value for name in names]
    return [[name, value] for name in names] + [[word] for word in joint]


@EACH_OPTION
def test_an_option_may_stand_before_and_after_the_command(
    option: Option, watch: Watch, api: Api, folder: Path
) -> None:
    """Promise 3.1, for every option in every spelling."""
    (folder / "token").write_text(TOKEN_OF_A_FILE)
    command, *others = words(option.command)
    for choice in option.value.split("|"):
        value = f"{api.url}/prefix" if choice == "URL" else VALUES.get(choice, choice)
        calls = []
        for spelled in spellings(option, value):
            calls += [watch(*spelled, command, *others), watch(command, *spelled, *others)]
            if command == "delete":
                calls.append(watch(command, *others, *spelled))
        assert all(call == calls[0] for call in calls), calls


def test_the_last_of_an_option_counts(watch: Watch) -> None:
    for args, like in {
        "-f json -f tsv status": "-f tsv status",
        "--format tsv status --format json": "-f json status",
        "-qo out status": "--quiet --output out status",
        "-qoout status": "--quiet --output=out status",
        "-vv status": "--trace status",
        "-v status -v": "--trace status",
        "-vftext status": "--verbose --format text status",
        "-vC . status": "--verbose --chdir=. status",
        "-" + "v" * 5000 + " status": "--trace status",
    }.items():
        call = watch(*args.split())
        assert call == watch(*like.split()), args
        assert call.code == 0


# What comes before `run`, and what it changes in the request.
SENT: dict[str, dict[str, Any]] = {
    "--format json -v -v --trace": {},
    "--color never --chdir . --output -": {},
    "--profile testing-agent": {"profile": "testing-agent"},
    "--profile=a=b": {"profile": "a=b"},
    "--profile --help": {"profile": "--help"},
    "--timeout-seconds 0": {"timeout_seconds": 0},
    "--timeout-seconds=6": {"timeout_seconds": 6},
}


@pytest.mark.parametrize("line", SENT)
def test_what_a_run_sends(line: str, watch: Watch) -> None:
    """Promises 1.2 and 3.9: the dispatcher puts its own options in front."""
    for call in (watch(*line.split(), *RUN), watch("run", *line.split(), "--", "true")):
        assert (call.code, call.out) == (0, as_json(DOCUMENTS["run"]))
        assert call.body == {"profile": "codex", "args": ["true"], **SENT[line]}
        assert call.targets == ["POST /api/v1/containers/runs"]
        assert re.search(rb"(?i)\r\ncontent-type: application/json\r\n", call.requests[0])


def test_output_gets_what_standard_output_would(watch: Watch, folder: Path) -> None:
    """Promise 3.5; `-` is standard output, and no file is made of that name."""
    for name, form in zip(api_commands(), ("json", "text", "tsv", "json")):
        plain = watch("-f", form, *words(name))
        assert plain.out
        for old in (None, b"", b"old content, and longer than the new one " * 100):
            if old is not None:
                (folder / "out").write_bytes(old)
            call = watch("-f", form, "-o", "out", *words(name))
            assert call == plain._replace(out=b"", files={"out": plain.out})
        for spelled in (["-o-"], ["--output=-"], ["-o", "out", "-o", "-"]):
            assert watch("-f", form, *spelled, *words(name)) == plain
    assert os.listdir(folder) == []


@pytest.mark.parametrize("name", api_commands())
def test_quiet(name: str, watch: Watch, api: Api) -> None:
    """Promise 3.6: no result, no file, and errors all the same."""
    call = watch("--quiet", "--output", "out", *words(name))
    assert (call[:4], len(call.requests)) == ((0, b"", b"", {}), 1)
    api.answers({"error": {"type": "x", "message": "no"}}, status="400 Bad Request")
    call = watch("--quiet", *words(name))
    assert (call.code, call.out, len(spoken(call.err).errors)) == (failure_code(name), b"", 1)
    api.answers({"run_id": "r", "exit_code": 37, "stdout": "a", "stderr": "b"})
    assert watch("-q", "--format", "text", *RUN)[:3] == (37, b"", b"")


def test_chdir(cli: InProcess, api: Api, folder: Path) -> None:
    """Promise 3.4: every relative path is relative to it; to nowhere before anything is sent."""
    there = folder / "there"
    (there / "config" / "auth").mkdir(parents=True)
    (there / "config" / "auth" / "api-token").write_text("t0ken-of-the-config")
    (there / "token").write_text(TOKEN_OF_A_FILE)
    for name, place in (("status", "missing"), ("run", "there/token")):
        result = cli("--chdir", place, *words(name), at=api)
        check_failure(result, failure_code(name), "--chdir", place)
    assert api.requests == []
    result = cli("--token-file=token", "-C", "there", "-o", "out", "status", at=api)
    assert result[:3] == (0, b"", b"")
    assert (there / "out").read_bytes() == as_json(DOCUMENTS["status"])
    assert f"Bearer {TOKEN_OF_A_FILE}\r\n".encode() in api.requests[-1]
    env = {"BUS_AI_TOKEN": None, "BUS_CONFIG_DIR": "config"}
    assert cli("status", "--chdir=there", at=api, env=env).code == 0
    assert b"Bearer t0ken-of-the-config\r\n" in api.requests[-1]


# --- where the container's command begins -----------------------------------------------------

# A leading `--` is taken away, and nothing else.
COMMANDS = [
    "-- true", "true", "-- sh -c 'a -- b' -- --help", "sh -c 'a -- b' -- --help", "ls -h",
    "-- --help", "-- -V", "-- --", "-- -- --", "a --profile b", "a --format yaml -q -v",
    "-- --image x", "-- -f text", "-", "- --", "'' x", "-- ''", "help",
]  # fmt: skip
ODD_WORDS = [
    "a b", "c\td", "e\nf", "g\\h", "'", '"', "$X", "*", "`", "=", "a=b", " ", "\u00e4\u20ac",
    "\U0001f600", "\u0301", "\u202e", "\x1b[31m", "\x7f", "\x85", "\ufeff", "x" * 100_000,
]  # fmt: skip


def test_the_command_arrives_byte_for_byte(watch: Watch) -> None:
    """Promises 3.1 and 1.2."""
    for given in [*map(shlex.split, COMMANDS), ["--", *ODD_WORDS], ODD_WORDS]:
        arrives = given[1:] if given[0] == "--" else given
        assert watch("run", "-f", "tsv", *given).body == {"profile": "codex", "args": arrives}
        call = watch("--timeout-seconds", "9", "--image", "busybox", "run", *given)
        assert call.body == {"image": "busybox", "command": arrives, "timeout_seconds": 9}


def test_the_arguments_of_a_process(program: Program, api: Api) -> None:
    assert program("run", "--", *ODD_WORDS, at=api).code == 0
    assert json.loads(api.requests[-1].partition(b"\r\n\r\n")[2])["args"] == ODD_WORDS
    result = program("run", "--", b"caf\xe9", at=api)
    check_failure(result, 2, "argument 3 is not valid UTF-8;", "--help")
    assert len(api.requests) == 1


def test_the_ids_of_delete(watch: Watch) -> None:
    for args, ids in {
        "a b": "a b", "-- -x": "-x", "a -- --format": "a --format", "-": "-",
        "-- --help --": "--help --", "a -f tsv b": "a b",
    }.items():  # fmt: skip
        call = watch("delete", *args.split())
        assert call.code == 0
        assert call.targets == [f"DELETE /api/v1/containers/runs/{one}" for one in ids.split()]


# --- usage errors -----------------------------------------------------------------------------


@pytest.fixture
def refused(cli: InProcess, api: Api, folder: Path) -> Callable[..., str]:
    """The one line about a wrong command line, for which no token was sought, nothing sent."""

    def call(*args: str, says: tuple[str, ...] = ()) -> str:
        result = cli(*args, at=api, env={"BUS_AI_TOKEN": None})
        line = check_failure(result, 2, *says)
        assert spoken(result.err).text == f"{line}\n"
        assert "--help" in line, line
        assert (api.requests, os.listdir(folder)) == ([], []), args
        return line

    return call


Refused = Callable[..., str]

NO_COMMAND = "no command: use one of status, run, runs, delete, help"
TOKEN = "no option takes a token: use --token-file PATH, BUS_AI_TOKEN or BUS_API_TOKEN"
EXCLUDE = "--quiet and --verbose or --trace exclude each other"
RUN_USAGE = "missing argument: bus-containers [OPTION...] run [--] COMMAND [ARG...]"
DELETE_USAGE = "missing argument: bus-containers [OPTION...] delete RUN_ID..."
NO_ID = "is not a run's id; `bus-containers runs` lists them"

# Whole lines, without their beginning and the hint at their end.
TOLD: dict[tuple[str, ...], str] = {
    (): NO_COMMAND,
    ("",): NO_COMMAND,
    ("-",): "unknown command '-': use one of status, run, runs, delete, help",
    ("--wait", "1s", "stat"): "--wait is an option of status",
    ("status", "--frobnicate=S3CR3T"): "no such option: --frobnicate",
    ("-qx", "status"): "no such option: -x",
    ("--token", "S3CR3T"): TOKEN,
    ("--token=S3CR3T", "status"): TOKEN,
    ("status", "--profile=a"): "--profile is an option of run",
    ("--verbose=2", "status"): "--verbose does not take a value",
    ("help", "--quiet="): "--quiet does not take a value",
    ("status", "--wait"): "--wait needs a value: --wait DURATION",
    ("status", "--wait", "5"): "--wait: '5' has no unit: try `5s`",
    ("status", "--timeout", "-1s"): "--timeout: '-1s' is not a duration >= 0",
    ("--timeout", "x", "status"): "--timeout: 'x' is not a duration: try `30s` or `1h30m`",
    ("run", "--timeout-seconds", "x", "true"): (
        "--timeout-seconds: 'x' is not a whole number >= 0 of at most 15 digits"
    ),
    ("-q", "-v", "status"): EXCLUDE,
    ("status", "--trace", "-q"): EXCLUDE,
    ("--image", "b", "run", "--profile", "codex", "a"): "--profile and --image exclude each other",
    ("run", "--", "\udce9"): "argument 3 is not valid UTF-8",
    ("delete", "\ud800"): "argument 2 is not valid UTF-8",
    ("run", "--profile", "codex", "--"): RUN_USAGE,
    ("delete", "--format", "tsv"): DELETE_USAGE,
    ("status", "a", "b"): "status does not take the argument 'b'",
    ("runs", "--", "a"): "runs does not take the argument 'a'",
    ("help", "run", "status"): "help does not take the argument 'status'",
    ("help", "nosuch"): "no help about 'nosuch': there is status, run, runs, delete, help",
    ("help", "--format", "tsv"): "--format: 'tsv' is not opencli or json",
    ("help", "-f", "json", "run"): "there is one document of all commands: leave out 'run'",
    ("delete", "run-1", ".."): f"'..' {NO_ID}",
    ("delete", "--", "run-1", ""): f"'' {NO_ID}",
    **{
        ("delete", f"run{control}1"): f"{f'run{control}1'!r} {NO_ID}"
        for control in "\0\n\x1b\x7f\x80\x9b\ufffd"  # the last stands for what is not UTF-8
    },
}


@pytest.mark.parametrize("args", TOLD, ids=lambda args: ascii(" ".join(args)))
def test_a_usage_error_word_by_word(args: tuple[str, ...], refused: Refused) -> None:
    """Promises 3.10, 3.11 and 3.24."""
    name = next((word for word in args if word in all_commands()), "")
    topic = f"bus-containers {name}".rstrip()
    assert refused(*args) == f"bus-containers: {TOLD[args]}; see `{topic} --help`"


BAD_VALUES = {
    "URL": ["x", "ftp://127.0.0.1", "http://a b"],
    "DURATION": ["30", "1d", "-0.5s", " 1s", "\u0663s"],
    "N": ["-1", "1.5", "+5", " 5", "1e3", "0x10", "1_0", "5s", "\u0663", "\u00b2", "1" * 16],
}


@EACH_OPTION
def test_a_value_that_an_option_does_not_take(option: Option, refused: Refused) -> None:
    """Promise 3.10, an empty value of any option included."""
    command, *others = words(option.command)
    if not option.value:
        assert "explicit" not in refused(command, f"{option.name}=2", says=(option.name,))
        return
    choices = option.value.split("|") if "|" in option.value else []
    bad = [choices[0].upper(), ",".join(choices), "-v"] if choices else []
    for value in bad or BAD_VALUES.get(option.value, []):
        shown = value if value.isascii() else ""
        refused(option.name, value, command, *others, says=(option.name, shown))
    for spelled in ([f"{option.name}="], [option.name, ""], [f"{option.name}=--"]):
        refused(command, *spelled, *others, says=(option.name,))
    refused(command, option.name, "--", *others, says=(f"{option.name} needs a value",))
    for name in (option.name, *option.aliases):
        refused(command, name, says=(f"{option.name} needs a value",))


def test_no_abbreviations(refused: Refused) -> None:
    for name in OPTIONS:
        for end in range(3, len(name)):
            if name[:end] not in OPTIONS:
                refused(name[:end], "x", *RUN, says=(name[:end],))


def test_an_argument_that_is_not_utf_8(refused: Refused) -> None:
    for line, number in {
        b"run caf\xe9": 2, b"delete a\xff": 2, b"\xff\xfe": 1, b"--output=\xff status": 1,
        b"--format js\xf0\x9f status": 2, b"run -- true \xed\xa0\x80": 4,
    }.items():  # fmt: skip
        given = line.decode("utf-8", "surrogateescape").split()
        assert f": argument {number} is not valid UTF-8; " in refused(*given)


# --- locales ----------------------------------------------------------------------------------


def euc_jp(folder: Path) -> Env:
    """Variables that make Python decode arguments neither as ASCII nor as UTF-8."""
    skip_if("" if shutil.which("localedef") else "no localedef to make a locale with")
    made = "ja_JP.EUC-JP"
    make = ["localedef", "-c", "-i", "ja_JP", "-f", "EUC-JP", str(folder / made)]
    subprocess.run(make, capture_output=True, timeout=LIMIT)
    probe = [sys.executable, "-c", "import locale; print(locale.getpreferredencoding())"]
    env = {"PYTHONUTF8": "0", "LC_ALL": made, "LOCPATH": str(folder)}
    seen = subprocess.run(probe, env={**os.environ, **env}, capture_output=True, timeout=LIMIT)
    skip_if("" if seen.stdout.strip() == b"EUC-JP" else f"no {made} locale to be had")
    return {**env}


@pytest.mark.parametrize("locale", tiers(["C", "EUC-JP"], "C"))
def test_any_locale(locale: str, program: Program, api: Api, tmp_path: Path) -> None:
    """What is typed is UTF-8, whatever the locale makes of it; one garbles some beyond repair."""
    env: Env = {"LC_ALL": "C"} if locale == "C" else euc_jp(tmp_path)
    env.update(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    more = "" if locale == "EUC-JP" else "-\u20ac-\U0001f600"
    folder = tmp_path / f"f\u00e9lder{more}"
    folder.mkdir()
    (folder / "t\u00e9ken").write_text(TOKEN_OF_A_FILE)
    document = {**DOCUMENTS["run"], "stdout": "\u00e4\u20ac\U0001f600"}
    options = ["--chdir", str(folder), "--token-file", "t\u00e9ken", "-o", "r\u00e9sult"]
    given = [word.encode() for word in (*options, "run", f"\u00e9{more}")]
    api.answers(document)
    assert program(*given, at=api, env=env)[:3] == (0, b"", b"")
    assert (folder / "r\u00e9sult").read_bytes() == as_json(document)
    [request] = api.requests
    assert json.loads(request.partition(b"\r\n\r\n")[2])["args"] == [f"\u00e9{more}"]
    assert f"Bearer {TOKEN_OF_A_FILE}\r\n".encode() in request
    result = program("run", "\u20ac".encode(), at=api, env=env)
    if more:
        assert result[:3] == (0, as_json(document), b"")
    else:
        check_failure(result, 2, "argument 2 is not valid UTF-8;", "--help")
        assert len(api.requests) == 1
    result = program(b"--chdir", "n\u00e9where".encode(), b"run", b"x", at=api, env=env)
    check_failure(result, 125, "--chdir")


# --- the closing line of a run ----------------------------------------------------------------


def test_the_closing_line_of_a_run(cli: InProcess, api: Api) -> None:
    """Promises 3.15 and 3.20: only what is known, and an object of kind `run` for programs."""
    for text, *values in [
        ("run run-1 ended with exit code 3 after 0 ms", "run-1", 3, 0),
        ("the run ended with exit code 0", None, 0, None),
    ]:
        document = dict(zip(("run_id", "exit_code", "duration_ms"), values))
        result = cli("-f", "text", *RUN, at=api.answers(document))
        assert result[:3] == (values[1], b"", f"bus-containers: {text}\n".encode())
        result = cli("-f", "text", "--error-format", "json", *RUN, at=api)
        assert result.objects == [{"kind": "run", "text": text, "message": text, **document}]


# --- delete, runs, status ---------------------------------------------------------------------


FAILED = {
    "forbidden": message(b'{"error":{"type":"forbidden","message":"no"}}', "403 Forbidden"),
    "kept": message(b'{"deleted":false,"run_id":"kept"}'),
    "nonsense": message(b"nonsense"),
}


def test_delete(cli: InProcess, api: Api) -> None:
    """Promise 3.14: it goes on after a failure, and prints what was deleted."""
    documents = {name: {"deleted": True, "run_id": name, "new": 1} for name in "abc"}
    documents["empty"] = {"deleted": True, "run_id": "empty"}
    known = {name: message(as_json(document)) for name, document in documents.items()}
    known.update(FAILED, empty=message(b"", "204 No Content"))
    for line in ("a", "a b", "empty", "a empty", "kept", "a kept b nonsense forbidden c",
                 "forbidden kept"):  # fmt: skip
        ids, sent = line.split(), len(api.requests)
        api.sends(*(known[run_id] for run_id in ids))
        result = cli("delete", *ids, at=api)
        failed = [run_id for run_id in ids if run_id in FAILED]
        deleted = [documents[run_id] for run_id in ids if run_id not in FAILED]
        printed = as_json(deleted) if len(ids) > 1 else b"".join(map(as_json, deleted))
        assert (result.code, result.out) == (int(bool(failed)), printed)
        errors = result.spoken.errors
        assert len(errors) == len(failed)
        assert all(run_id in line for line, run_id in zip(errors, failed))
        paths = [request.split(b" ", 2)[1] for request in api.requests[sent:]]
        assert [path.rpartition(b"/")[2].decode() for path in paths] == ids


def test_runs(watch: Watch, api: Api) -> None:
    """Promises 1.1 and 3.14."""
    items = [{"run_id": "run-1", "state": "exited", "new": {"a": [1]}}]
    for document in ({"items": items}, {"items": items, "next": "x"}, {"runs": items}, items):
        printed = document if "items" in document else {"items": items}
        call = watch("runs", at=api.answers(document))
        assert call[:3] == (0, as_json(printed), b"")
        assert call.targets == ["GET /api/v1/containers/runs"]
    for nothing in (b'{"items": []}', b'{"runs": []}', b"[]"):
        assert watch("runs", at=api.answers(nothing)).out == as_json({"items": []})


@pytest.mark.parametrize("status", ["404 Not Found", "405 No", "400 No", "401 No", "403 No"])
def test_where_runs_reads_the_status(status: str, watch: Watch, api: Api) -> None:
    refusal = message(b'{"error":{"type":"x","message":"no such route"}}', status)
    api.sends(refusal, message(as_json(DOCUMENTS["runs"])))
    call = watch("runs")
    if status < "404":
        assert (call.code, call.targets) == (1, ["GET /api/v1/containers/runs"])
    else:
        assert call[:3] == (0, as_json(DOCUMENTS["runs"]), b"")
        assert call.targets == ["GET /api/v1/containers/runs", "GET /api/v1/containers/status"]


def test_which_states_wait_waits_for(watch: Watch, api: Api) -> None:
    """Promise 6.8; without `--wait` the state is a result like any other."""
    at_last = {"items": [{"id": "runner", "state": "ready"}]}
    for state in ("starting", "Pending", "PROVISIONING"):
        api.answers({"items": [{"id": "runner", "state": state}]}, at_last)
        call = watch("status", "--wait", "20s")
        assert (call.code, call.out, len(call.requests)) == (0, as_json(at_last), 2)
        api.answers({"status": {"state": state, "provider": "docker"}})
        assert watch("status").code == 0
        assert watch("status", "--wait", "1ms").code == 1
    for other in ("ready", "running", "stopped", "failed", "restarting", "", None, 7):
        api.answers({"items": [{"id": "runner", "state": other}]})
        call = watch("status", "--wait", "20s")
        assert (call.code, len(call.requests)) == (0, 1)
