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
    InProcess,
    Option,
    Program,
    all_commands,
    api_commands,
    as_json,
    check_failure,
    common_options,
    failure_code,
    opencli,
    options_of,
    second_tier,
    skip_if,
    spoken,
    tiers,
    words,
)

EACH = pytest.mark.parametrize("name", api_commands())
RUN = ("run", "--", "true")


def id_of(value: object) -> str:
    """The words of a command line as a test's id; nothing for what is expected of it."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
        return ""
    return ascii(" ".join(value))[1:41] or "nothing"


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
    """Call the program at `api`, and take away the files that it wrote."""

    def call(*args: str, **options: Any) -> Seen:
        before, files = len(api.requests), {}
        result = cli(*args, **{"at": api, **options})
        for path in folder.iterdir():
            if path.name == "out":
                files[path.name] = path.read_bytes()
                path.unlink()
        err = re.sub(rb"[0-9.]+ m?s\b", b"TIME", result.err)
        return Seen(result.code, result.out, err, files, api.requests[before:])

    return call


# --- options, as the program lists them -------------------------------------------------------

TOKEN_OF_A_FILE = "t0ken-of-the-file"
VALUES = {
    "URL": ["http://127.0.0.1:1"], "PATH": ["token"], "DURATION": ["1ns"],
    "DIR": ["missing"], "FILE": ["out"], "NAME": ["other"], "REF": ["alpine:3"], "N": ["9"],
}  # fmt: skip
BAD_VALUES = {
    "URL": ["x", "ftp://127.0.0.1", "http://a b"],
    "DURATION": ["30", "-1s", "x", "1d", "-0.5s", " 1s", "\u0663s"],
    "N": ["-1", "1.5", "x", "+5", " 5", "1e3", "0x10", "1_0", "5s", "\u0663", "\u00b2"],
}


def values(option: Option) -> list[str]:
    """Values that an option takes; one empty one for a flag."""
    if not option.value:
        return [""]
    return option.value.split("|") if "|" in option.value else VALUES[option.value]


def spellings(option: Option, value: str) -> list[list[str]]:
    """All ways to write an option with this value, by its names, in one word and in two."""
    names = [option.name, *option.aliases]
    if not value:
        return [[name] for name in names]
    joint = [name + ("=" if name.startswith("--") else "") + value for name in names]
    return [[name, value] for name in names] + [[word] for word in joint]


OPTIONS = [option for name in api_commands() for option in options_of(name)]
TAKING_A_VALUE = [option for option in OPTIONS if option.value]


@pytest.mark.parametrize(
    "option",
    tiers(OPTIONS, *{one.name: one for one in OPTIONS}.values(), ids=lambda one: one.id),
)
def test_an_option_may_stand_before_and_after_the_command(
    option: Option, watch: Watch, api: Api, folder: Path
) -> None:
    """Promise 3.1, for every option in every spelling."""
    (folder / "token").write_text(TOKEN_OF_A_FILE)
    command, *others = words(option.command)
    for value in [f"{api.url}/prefix"] if option.value == "URL" else values(option):
        calls = []
        for spelled in spellings(option, value):
            calls += [watch(*spelled, command, *others), watch(command, *spelled, *others)]
            if command == "delete":
                calls.append(watch(command, *others, *spelled))
        assert all(call == calls[0] for call in calls), calls


def test_the_last_of_an_option_counts(watch: Watch) -> None:
    for args, like in {
        ("-f", "json", "-f", "tsv", "status"): ("-f", "tsv", "status"),
        ("--format", "tsv", "status", "--format", "json"): ("-f", "json", "status"),
        ("-qo", "out", "status"): ("--quiet", "--output", "out", "status"),
        ("-qoout", "status"): ("--quiet", "--output=out", "status"),
        ("status", "-qftsv"): ("status", "--quiet", "--format=tsv"),
        ("-vv", "status"): ("--trace", "status"),
        ("-v", "-v", "status"): ("--trace", "status"),
        ("-v", "status", "-v"): ("--trace", "status"),
        ("-vftext", "status"): ("--verbose", "--format", "text", "status"),
        ("-vC", ".", "status"): ("--verbose", "--chdir=.", "status"),
    }.items():
        call = watch(*args)
        assert call == watch(*like), args
        assert call.code == 0


@pytest.mark.parametrize(
    ("args", "out"),
    [
        (["--format", "json"], as_json(DOCUMENTS["run"])),
        (["-v", "-v"], as_json(DOCUMENTS["run"])),
        (["--trace"], as_json(DOCUMENTS["run"])),
        (["--color", "never", "--format", "text"], b"OK"),
        (["--chdir", ".", "--format", "json", "--color", "auto"], as_json(DOCUMENTS["run"])),
        (["--quiet"], b""),
        (["--output", "out", "--quiet"], b""),
        (["--output", "out"], b""),
        (["--output", "-"], as_json(DOCUMENTS["run"])),
    ],
    ids=id_of,
)
def test_what_the_dispatcher_puts_in_front(args: list[str], out: bytes, watch: Watch) -> None:
    """Promise 3.9, and promises 3.5 and 3.6 for `--output` and `--quiet`."""
    call = watch(*args, *RUN)
    assert (call.code, call.out) == (0, out)
    assert call.body == {"profile": "codex", "args": ["true"]}
    written = {"out": as_json(DOCUMENTS["run"])} if args == ["--output", "out"] else {}
    assert call.files == written


@EACH
def test_output_gets_what_standard_output_would(name: str, watch: Watch, folder: Path) -> None:
    """Promise 3.5; `-` is standard output, and no file is made of that name."""
    for format_ in ("json", "text", "tsv"):
        plain = watch("-f", format_, *words(name))
        assert plain.out
        for old in (None, b"", b"old content, and longer than the new one " * 100):
            if old is not None:
                (folder / "out").write_bytes(old)
            call = watch("-f", format_, "-o", "out", *words(name))
            assert call == plain._replace(out=b"", files={"out": plain.out})
        for spelled in (["-o", "-"], ["-o-"], ["--output=-"], ["-o", "out", "-o", "-"]):
            assert watch("-f", format_, *spelled, *words(name)) == plain
    assert os.listdir(folder) == []


@EACH
def test_quiet(name: str, watch: Watch, api: Api) -> None:
    """Promise 3.6: no result, no file, and errors all the same."""
    call = watch("--quiet", "--output", "out", *words(name))
    assert (call.code, call.out, call.err, call.files, len(call.requests)) == (0, b"", b"", {}, 1)
    api.answers({"error": {"type": "x", "message": "no"}}, status="400 Bad Request")
    call = watch("--quiet", *words(name))
    assert (call.code, call.out, len(spoken(call.err).errors)) == (failure_code(name), b"", 1)
    api.answers({"run_id": "r", "exit_code": 37, "stdout": "a", "stderr": "b"})
    for format_ in ("json", "text", "tsv"):
        assert watch("-q", "--format", format_, *RUN)[:3] == (37, b"", b"")


@EACH
@pytest.mark.parametrize("place", ["missing", "a-file"])
def test_chdir_to_nowhere(place: str, name: str, cli: InProcess, api: Api, folder: Path) -> None:
    """Promise 3.4: before anything is sent."""
    (folder / "a-file").touch()
    result = cli("--chdir", place, *words(name), at=api)
    check_failure(result, failure_code(name), "--chdir", place)
    assert api.requests == []


def test_every_relative_path_is_relative_to_chdir(cli: InProcess, api: Api, folder: Path) -> None:
    there = folder / "there"
    (there / "config" / "auth").mkdir(parents=True)
    (there / "config" / "auth" / "api-token").write_text("t0ken-of-the-config")
    (there / "token").write_text(TOKEN_OF_A_FILE)
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
    "-- codex --version", "-- --help", "-- -V", "-- --", "-- -- --", "a -- b", "a --profile b",
    "a --format yaml -q -v", "-- --image x", "-- -f text", "a -f text", "-", "- --", "'' x",
    "-- ''", "-- run", "help",
]  # fmt: skip
ODD_WORDS = [
    ["a b", "c\td", "e\nf", "g\\h", "'", '"', "$X", "*", "`", "=", "a=b", " "],
    ["\u00e4\u20ac\U0001f600", "\u0301", "\u202e", "\x1b[31m", "\x7f", "\x85", "\ufeff"],
    ["x" * 100_000],
]
GIVEN = [*map(shlex.split, COMMANDS), *(["--", *given] for given in ODD_WORDS)]


@pytest.mark.parametrize("given", GIVEN, ids=id_of)
def test_the_command_arrives_byte_for_byte(given: list[str], watch: Watch) -> None:
    """Promises 3.1 and 1.2."""
    arrives = given[1:] if given[0] == "--" else given
    assert watch("run", *given).body == {"profile": "codex", "args": arrives}
    assert watch("run", "--format", "tsv", *given).body == {"profile": "codex", "args": arrives}
    call = watch("--timeout-seconds", "9", "--image", "busybox", "run", *given)
    assert call.body == {"image": "busybox", "command": arrives, "timeout_seconds": 9}


def test_the_command_of_a_process_arrives_byte_for_byte(program: Program, api: Api) -> None:
    every = [word for given in ODD_WORDS for word in given]
    assert program("run", "--", *every, at=api).code == 0
    assert json.loads(api.requests[-1].partition(b"\r\n\r\n")[2])["args"] == every


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ([], {"profile": "codex"}),
        (["--profile", "testing-agent"], {"profile": "testing-agent"}),
        (["--profile=a=b"], {"profile": "a=b"}),
        (["--profile", "--help"], {"profile": "--help"}),
        (["--timeout-seconds", "0"], {"profile": "codex", "timeout_seconds": 0}),
        (["--timeout-seconds=6"], {"profile": "codex", "timeout_seconds": 6}),
    ],
    ids=id_of,
)
def test_what_a_run_sends(options: list[str], more: dict[str, Any], watch: Watch) -> None:
    for call in (watch(*options, *RUN), watch("run", *options, "--", "true")):
        assert call.body == {"args": ["true"], **more}
        assert call.targets == ["POST /api/v1/containers/runs"]
        assert re.search(rb"(?i)\r\ncontent-type: application/json\r\n", call.requests[0])


@pytest.mark.parametrize(
    ("args", "ids"),
    [
        ("a b", "a b"), ("-- -x", "-x"), ("a -- --format", "a --format"), ("-", "-"),
        ("-- --help --", "--help --"), ("a -f tsv b", "a b"),
    ],
)  # fmt: skip
def test_the_ids_of_delete(args: str, ids: str, watch: Watch) -> None:
    call = watch("delete", *args.split())
    assert call.code == 0
    assert call.targets == [f"DELETE /api/v1/containers/runs/{run_id}" for run_id in ids.split()]


# --- usage errors -----------------------------------------------------------------------------


@pytest.fixture
def refused(cli: InProcess, api: Api, folder: Path) -> Callable[..., str]:
    """The one line about a wrong command line, of which nothing was sent or written."""

    def call(*args: str, says: tuple[str, ...] = ()) -> str:
        result = cli(*args, at=api)
        line = check_failure(result, 2, *says)
        assert spoken(result.err).text == f"{line}\n"
        assert "--help" in line, line
        assert (api.requests, os.listdir(folder)) == ([], []), args
        return line

    return call


Refused = Callable[..., str]

# Whole lines, without their beginning and the hint at their end.
TOLD = {
    (): "no command: use one of status, run, runs, delete, help",
    ("-q",): "no command: use one of status, run, runs, delete, help",
    ("",): "no command: use one of status, run, runs, delete, help",
    ("-",): "unknown command '-': use one of status, run, runs, delete, help",
    ("frobnicate",): "unknown command 'frobnicate': use one of status, run, runs, delete, help",
    ("Run", "true"): "unknown command 'Run': use one of status, run, runs, delete, help",
    ("--wait", "1s", "stat"): "--wait is an option of status",
    ("--frobnicate", "status"): "no such option: --frobnicate",
    ("status", "--frobnicate=S3CR3T"): "no such option: --frobnicate",
    ("-qx", "status"): "no such option: -x",
    ("run", "-e", "A=B", "true"): "no such option: -e",
    ("--insecure", "status"): "no such option: --insecure",
    ("--token", "S3CR3T"): (
        "no option takes a token: use --token-file PATH, BUS_AI_TOKEN or BUS_API_TOKEN"
    ),
    ("runs", "--wait", "1s"): "--wait is an option of status",
    ("status", "--profile=a"): "--profile is an option of run",
    ("--verbose=2", "status"): "--verbose does not take a value",
    ("status", "--wait"): "--wait needs a value: --wait DURATION",
    ("status", "--wait", "5"): "--wait: '5' has no unit: try `5s`",
    ("status", "--timeout", "-1s"): "--timeout: '-1s' is not a duration >= 0",
    ("--timeout", "x", "status"): "--timeout: 'x' is not a duration: try `30s` or `1h30m`",
    ("run", "--timeout-seconds", "x", "true"): "--timeout-seconds: 'x' is not a whole number >= 0",
    ("--format", "yaml", "status"): "--format: 'yaml' is not json or text or tsv",
    ("--color", "", "status"): "--color: the value is empty",
    ("-o", "", "status"): "--output: the value is empty",
    ("run", "--profile", "", "true"): "--profile: the value is empty",
    ("-q", "-v", "status"): "--quiet and --verbose or --trace exclude each other",
    ("run", "--profile", "a", "--image", "b", "true"): "--profile and --image exclude each other",
    ("run", "--", "\udce9"): "argument 3 is not valid UTF-8: '\\udce9'",
    ("run",): "missing argument: bus-containers [OPTION...] run [--] COMMAND [ARG...]",
    ("status", "a", "b"): "status does not take the argument 'b'",
    ("help", "nosuch"): "no help about 'nosuch': there is status, run, runs, delete, help",
    ("help", "-f", "json", "run"): "there is one document of all commands: leave out 'run'",
    ("delete", ".."): "'..' is not a run's id; `bus-containers runs` lists them",
}


@pytest.mark.parametrize("args", TOLD, ids=id_of)
def test_a_usage_error_word_by_word(args: tuple[str, ...], refused: Refused) -> None:
    """Promises 3.10, 3.11 and 3.24."""
    name = next((word for word in args if word in all_commands()), "")
    topic = f"bus-containers {name}".rstrip()
    assert refused(*args) == f"bus-containers: {TOLD[args]}; see `{topic} --help`"


WRONG: list[tuple[str, ...]] = [
    ("--token=S3CR3T", "status"),
    ("-v", "status", "-q"),
    ("--quiet", "run", "--trace", "--", "true"),
    ("-q", "status", "-vv"),
    ("--image", "b", "run", "--profile", "a", "true"),
    ("run", "--profile", "codex", "--image", "b", "true"),
    ("run", "--profile", "codex", "--"),
    ("delete", "--"),
    ("delete", "--format", "tsv"),
    ("status", "--", "extra"),
    ("help", "--format", "tsv"),
    ("delete", "run-1", ".."),
    ("delete", "."),
    ("delete", "--", "run-1", ""),
    ("run", "--", "\ud800"),
    *(("delete", f"run{control}1") for control in "\0\t\n\r\x1b\x7f\x80\x9b"),
]


@pytest.mark.parametrize("args", WRONG, ids=id_of)
def test_a_usage_error_is_reported_before_anything_is_sent(
    args: tuple[str, ...], refused: Refused
) -> None:
    assert "S3CR3T" not in refused(*args)


@pytest.mark.parametrize("option", TAKING_A_VALUE, ids=lambda option: option.id)
def test_a_value_that_an_option_does_not_take(option: Option, refused: Refused) -> None:
    """Promise 3.10, an empty value of any option included."""
    command, *others = words(option.command)
    choices = option.value.split("|") if "|" in option.value else []
    bad = [choices[0].upper(), ",".join(choices), "frobnicate", "-v"] if choices else []
    for value in bad or BAD_VALUES.get(option.value, []):
        shown = value if value.isascii() else ""
        refused(option.name, value, command, *others, says=(option.name, shown))
    for spelled in ([f"{option.name}="], [option.name, ""]):
        refused(*spelled, command, *others, says=(option.name,))
        refused(command, *spelled, *others, says=(option.name,))
    for name in (option.name, *option.aliases):
        line = refused(command, name, says=(option.name, "value"))
        assert "expected one argument" not in line


@pytest.mark.parametrize("name", ["status", "help"])
def test_a_flag_takes_no_value(name: str, refused: Refused) -> None:
    flags = [option for option in options_of(name) if not option.value]
    assert flags
    for flag in flags:
        line = refused(name, f"{flag.name}=2", says=(flag.name,))
        assert "explicit argument" not in line


def test_no_abbreviations(refused: Refused) -> None:
    names = {name for option in OPTIONS for name in (option.name, *option.aliases)}
    for name in sorted(name for name in names if name.startswith("--")):
        for end in range(3, len(name)):
            if name[:end] not in names:
                refused(name[:end], "x", *RUN, says=(name[:end],))


@pytest.mark.parametrize("option", [one for one in OPTIONS if one.name not in common_options()],
                         ids=lambda option: option.id)  # fmt: skip
def test_an_option_of_another_command(option: Option, refused: Refused) -> None:
    """Promise 3.24: the message says which command has it."""
    for name in api_commands():
        if option.name not in [one.name for one in options_of(name)]:
            value = [values(option)[0]] if option.value else []
            line = refused(name, option.name, *value, *words(name)[1:], says=(option.name,))
            assert re.search(rf"\b{option.command}\b", line.partition("; see")[0]), line
            refused(option.name, *value, *words(name), says=(option.name,))


@pytest.mark.parametrize("name", all_commands())
def test_too_few_and_too_many_arguments(name: str, refused: Refused) -> None:
    [row] = [one for one in opencli()["commands"] if one["name"] == name]
    if any(one["required"] for one in row["arguments"]):
        refused(name, says=(row["usage"],))
        refused(name, "--", says=(row["usage"],))
    if not any(one["repeatable"] for one in row["arguments"]):
        refused(name, *["run"] * len(row["arguments"]), "extra", says=("extra",))


def test_a_usage_error_is_reported_before_the_token_is_looked_for(cli: InProcess) -> None:
    for args in ((), ("--format", "yaml", "status"), ("run",), ("delete", "..")):
        assert "token" not in check_failure(cli(*args), 2, "--help")


def test_a_cluster_of_any_length(cli: InProcess) -> None:
    assert cli("-" + "v" * 5000, "--version").out.startswith(b"bus-containers ")


NOT_UTF_8 = [
    (b"run -- caf\xe9", 3), (b"run caf\xe9", 2), (b"delete a\xff", 2), (b"\xff\xfe", 1),
    (b"--format js\xf0\x9f status", 2), (b"--output=\xff status", 1),
    (b"run -- true \xed\xa0\x80", 4), (b"run -- true \xc0\x80", 4),
]  # fmt: skip


@pytest.mark.parametrize(("line", "number"), NOT_UTF_8, ids=ascii)
def test_an_argument_that_is_not_utf_8(line: bytes, number: int, refused: Refused) -> None:
    given = line.decode("utf-8", "surrogateescape").split()
    assert re.search(rf"argument {number}\b.* UTF-8", refused(*given))


@pytest.mark.parametrize(("line", "number"), NOT_UTF_8[:1], ids=ascii)
def test_an_argument_of_a_process_that_is_not_utf_8(
    line: bytes, number: int, program: Program, api: Api
) -> None:
    check_failure(program(*line.split(), at=api), 2, f"argument {number} ", "UTF-8", "--help")
    assert api.requests == []


# --- locales ----------------------------------------------------------------------------------

CHARSETS = {"latin-1": ("en_US", "ISO-8859-1"), "euc-jp": ("ja_JP", "EUC-JP")}


def locale_environment(name: str, folder: Path) -> dict[str, str | None]:
    """Variables that make Python decode arguments as ASCII, as UTF-8, or as neither."""
    off = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": None}
    if name not in CHARSETS:
        return {**off, "LC_ALL": name}
    skip_if("" if shutil.which("localedef") else "no localedef to make a locale with")
    language, charset = CHARSETS[name]
    made = f"{language}.{charset}"
    make = ["localedef", "-c", "-i", language, "-f", charset, str(folder / made)]
    subprocess.run(make, capture_output=True, timeout=LIMIT)
    environ = {**off, "LC_ALL": made, "LOCPATH": str(folder)}
    probe = [sys.executable, "-c", "import locale; print(locale.getpreferredencoding())"]
    full = {**os.environ, **{name: value for name, value in environ.items() if value}}
    seen = subprocess.run(probe, env=full, capture_output=True, timeout=LIMIT, text=True).stdout
    skip_if("" if seen.strip() in (charset, "EUC-JP") else f"no {made} locale to be had")
    return environ


@pytest.mark.parametrize("locale", tiers(["C", "C.UTF-8", "latin-1"], "C"))
def test_any_locale(locale: str, program: Program, api: Api, tmp_path: Path) -> None:
    """What is typed is UTF-8, whatever the locale makes of it."""
    env = locale_environment(locale, tmp_path)
    folder = tmp_path / "f\u00f6lder-\u20ac-\U0001f600"
    folder.mkdir()
    (folder / "t\u00f6ken").write_text(TOKEN_OF_A_FILE)
    document = {**DOCUMENTS["run"], "stdout": "\u00e4\u20ac\U0001f600"}
    given = ["\u00e4", "\u00e9", "\u20ac", "\U0001f600"]
    options = ["--chdir", str(folder), "--token-file", "t\u00f6ken", "-o", "r\u00e9sult"]
    api.answers(document)
    result = program(*(word.encode() for word in (*options, "run", *given)), at=api, env=env)
    assert result[:3] == (0, b"", b"")
    assert (folder / "r\u00e9sult").read_bytes() == as_json(document)
    [request] = api.requests
    assert json.loads(request.partition(b"\r\n\r\n")[2])["args"] == given
    assert f"Bearer {TOKEN_OF_A_FILE}\r\n".encode() in request
    assert program(*RUN, at=api, env=env)[:3] == (0, as_json(document), b"")
    result = program(b"--chdir", "n\u00f6where".encode(), b"run", b"x", at=api, env=env)
    check_failure(result, 125, "--chdir")


@second_tier
def test_a_locale_that_reads_what_it_cannot_write(
    program: Program, api: Api, tmp_path: Path
) -> None:
    """In ja_JP.EUC-JP some UTF-8 arrives garbled beyond repair, and is refused."""
    env = locale_environment("euc-jp", tmp_path)
    assert program("run", "\u00e9".encode(), at=api, env=env).code == 0
    [request] = api.requests
    assert json.loads(request.partition(b"\r\n\r\n")[2])["args"] == ["\u00e9"]
    check_failure(program("run", "\u20ac".encode(), at=api, env=env), 2, "argument 2", "--help")
    assert len(api.requests) == 1


# --- the closing line of a run ----------------------------------------------------------------

CLOSING: dict[str, dict[str, Any]] = {
    "bad\nbus-containers: run run-1 ended with exit code 0 after 7 ms\n": {
        "run_id": "run-1", "exit_code": 0, "duration_ms": 7, "stderr": "bad\n",
    },
    "bad\nbus-containers: run run-1 ended with exit code 3 after 0 ms\n": {
        "run_id": "run-1", "exit_code": 3, "duration_ms": 0, "stderr": "bad",
    },
    "bus-containers: run run-1 ended with exit code 3\n": {"run_id": "run-1", "exit_code": 3},
    "bus-containers: the run ended with exit code 3 after 7 ms\n": {
        "exit_code": 3, "duration_ms": 7,
    },
    "bus-containers: the run ended with exit code 3\n": {
        "run_id": None, "exit_code": 3, "duration_ms": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("text", CLOSING)
def test_the_closing_line_of_a_run(text: str, cli: InProcess, api: Api) -> None:
    """Promises 3.15 and 3.20: only what is known, and an object of kind `run` for programs."""
    document = CLOSING[text]
    result = cli("-f", "text", *RUN, at=api.answers(document))
    assert (result.code, result.out, result.message) == (document["exit_code"], b"", text)
    quiet = {**document, "stderr": ""}
    result = cli("-f", "text", "--error-format", "json", *RUN, at=api.answers(quiet))
    [closing] = result.objects
    assert closing["kind"] == "run"
    for name in ("run_id", "exit_code", "duration_ms"):
        assert closing.get(name) == document.get(name)
    assert text.endswith(f"bus-containers: {closing['text']}\n")


# --- delete, runs, status ---------------------------------------------------------------------


def deletion(run_id: str) -> dict[str, Any]:
    return {"deleted": True, "run_id": run_id, "owner_identity_id": "me", "new": 1}


FAILED = {
    "forbidden": message(b'{"error":{"type":"forbidden","message":"no"}}', "403 Forbidden"),
    "not_found": message(b'{"error":{"type":"not_found","message":"no"}}', "404 Not Found"),
    "kept": message(b'{"deleted":false,"run_id":"kept"}'),
    "nonsense": message(b"nonsense"),
}


EMPTY = {"deleted": True, "run_id": "empty"}


@pytest.mark.parametrize(
    ("ids", "document"),
    [
        (["a"], deletion("a")),
        (["a", "b"], [deletion("a"), deletion("b")]),
        (["empty"], EMPTY),
        (["a", "empty"], [deletion("a"), EMPTY]),
        *(([name], None) for name in FAILED),
        (["not_found", "a"], [deletion("a")]),
        (["a", "kept", "b", "not_found", "nonsense", "c"], [*map(deletion, "abc")]),
        (["forbidden", "not_found"], []),
    ],
    ids=id_of,
)
def test_delete(ids: list[str], document: Any, cli: InProcess, api: Api) -> None:
    """Promise 3.14: it goes on after a failure, and prints what was deleted."""
    known = {"empty": message(b"", "204 No Content"), **FAILED}
    api.sends(*(known.get(run_id) or message(as_json(deletion(run_id))) for run_id in ids))
    result = cli("delete", *ids, at=api)
    failed = [run_id for run_id in ids if run_id in FAILED]
    assert result.code == int(bool(failed))
    assert result.out == (b"" if document is None else as_json(document))
    errors = result.spoken.errors
    assert len(errors) == len(failed)
    assert all(run_id in line for line, run_id in zip(errors, failed))
    sent = [request.split(b" ", 2)[1].rpartition(b"/")[2].decode() for request in api.requests]
    assert sent == ids


ITEM = {"run_id": "run-1", "state": "exited", "new": {"a": [1]}}
SHAPES: dict[str, tuple[Any, Any]] = {
    "items": ({"items": [ITEM]}, {"items": [ITEM]}),
    "no-items": ({"items": []}, {"items": []}),
    "runs": ({"runs": [ITEM]}, {"items": [ITEM]}),
    "no-runs": ({"runs": []}, {"items": []}),
    "list": ([ITEM], {"items": [ITEM]}),
    "empty-list": ([], {"items": []}),
    "more-fields": ({"items": [ITEM], "next": "x"}, {"items": [ITEM], "next": "x"}),
}


@pytest.mark.parametrize(("document", "printed"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "405 Method Not Allowed"])
def test_runs(status: str, document: Any, printed: Any, watch: Watch, api: Api) -> None:
    """Promises 1.1 and 3.14."""
    refusal = message(b'{"error":{"type":"x","message":"no such route"}}', status)
    if status != "200 OK" and isinstance(document, list):
        document = {"items": document}  # as `/status` has it
    good = message(json.dumps(document).encode())
    api.sends(*([good] if status == "200 OK" else [refusal, good]))
    call = watch("runs")
    assert (call.code, call.out, call.err) == (0, as_json(printed), b"")
    expected = ["GET /api/v1/containers/runs", "GET /api/v1/containers/status"]
    assert call.targets == expected[: 1 if status == "200 OK" else 2]


@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "403 Forbidden"])
def test_no_other_error_of_runs_makes_it_read_status(status: str, watch: Watch, api: Api) -> None:
    api.answers({}, status=status)
    call = watch("runs")
    assert (call.code, call.targets) == (1, ["GET /api/v1/containers/runs"])


@pytest.mark.parametrize("body", ["{}", '{"items":{}}', '{"runs":7}', '"x"', "7"])
def test_runs_of_an_unknown_shape(body: str, cli: InProcess, api: Api) -> None:
    check_failure(cli("runs", at=api.answers(body.encode())), 1, "GET", "/api/v1/containers/runs")


WAITING = ["starting", "Starting", "STARTING", "pending", "Pending", "provisioning", "PROVISIONING"]


@pytest.mark.parametrize("state", WAITING)
def test_a_state_that_wait_waits_for(state: str, watch: Watch, api: Api) -> None:
    """Promise 6.8; without `--wait` the state is a result like any other."""
    at_last = {"items": [{"id": "runner", "state": "ready"}]}
    api.answers({"items": [{"id": "runner", "state": state}]}, at_last)
    call = watch("status", "--wait", "20s")
    assert (call.code, call.out, len(call.requests)) == (0, as_json(at_last), 2)
    api.answers({"status": {"state": state, "provider": "docker"}})
    assert watch("status").code == 0
    assert watch("status", "--wait", "1ms").code == 1


READY = ["ready", "running", "stopped", "failed", "restarting", "", None, 7]


@pytest.mark.parametrize("state", READY)
def test_a_state_that_wait_does_not_wait_for(state: object, watch: Watch, api: Api) -> None:
    api.answers({"items": [{"id": "runner", "state": state}]})
    call = watch("status", "--wait", "20s")
    assert (call.code, len(call.requests)) == (0, 1)
