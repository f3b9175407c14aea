# SPDX-License-Identifier: MIT
"""The command line: CONTRACT section 3, and every row of what is refused before anything is sent.

Most run in process against a server of canned answers that counts; bytes, locales, signals,
terminals and streams are tried with real processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bus_containers
from conftest import Program
from hostile import LIMIT, Connection, Hostile, answer, message, refused_port, silent, spoken

RUN = ("run", "--", "true")
COMMANDS: dict[str, tuple[str, ...]] = {
    "status": ("status",),
    "run": RUN,
    "runs": ("runs",),
    "delete": ("delete", "run-1"),
}
EACH = pytest.mark.parametrize("name", COMMANDS)
FAILURE = {"status": 1, "run": 125, "runs": 1, "delete": 1}

DOCUMENTS: dict[str, dict[str, Any]] = {
    "status": {"items": [{"id": "runner", "state": "ready"}]},
    "run": {"run_id": "run-1", "exit_code": 0, "stdout": "OK", "stderr": "", "duration_ms": 7},
    "runs": {"items": [{"run_id": "run-1", "state": "exited", "exit_code": 0}]},
    "delete": {"deleted": True, "run_id": "run-1"},
}


def api(connection: Connection) -> None:
    """Answer each of the four calls as if all were well."""
    request = connection.read_request()
    names = {b"POST": "run", b"DELETE": "delete"}
    path = request.split(b" ", 2)[1]
    name = names.get(request.split(b" ", 1)[0], path.rpartition(b"/")[2].decode())
    connection.send(message(json.dumps(DOCUMENTS[name]).encode()))


class Call(NamedTuple):
    """What a call of `main` gave, and the requests that reached the server."""

    code: int
    out: bytes
    err: bytes
    requests: list[bytes]

    @property
    def text(self) -> str:
        return spoken(self.err).text

    @property
    def body(self) -> Any:
        """The JSON that the only request brought."""
        (request,) = self.requests
        return json.loads(request.partition(b"\r\n\r\n")[2])


Main = Callable[..., Call]


@pytest.fixture(scope="module")
def server() -> Iterator[Hostile]:
    with Hostile(api) as running:
        yield running


@pytest.fixture
def main(
    server: Hostile,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    tmp_path: Path,
    canary: str,
) -> Main:
    """`main` in an empty folder, with a token and the URL of the server."""

    def call(*args: str, at: Hostile = server) -> Call:
        monkeypatch.setenv("BUS_AI_API_URL", at.url)
        before = len(at.requests)
        code = bus_containers.main([*args])
        out, err = capfdbinary.readouterr()
        assert canary.encode() not in out + err
        return Call(code, out, err, at.requests[before:])

    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BUS_AI_TOKEN", canary)
    return call


@pytest.fixture
def cli(program: Program, server: Hostile, canary: str) -> Program:
    """The same as a process of its own."""
    program.environ.update(BUS_AI_TOKEN=canary, BUS_AI_API_URL=server.url)
    return program


def as_json(document: object) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


# --- where options may stand ------------------------------------------------------------------

OPTIONS: list[tuple[str, ...]] = [
    ("--api-url", "URL"),
    ("--token-file", "FILE"),
    ("--timeout", "20s"),
    ("-C", "."),
    ("--chdir", "."),
    ("-o", "out"),
    ("--output", "out"),
    ("-f", "tsv"),
    ("--format", "json"),
    ("--format", "text"),
    ("--format", "tsv"),
    ("-q",),
    ("--quiet",),
    ("-v",),
    ("--verbose",),
    ("--trace",),
    ("--color", "always"),
    ("--color", "auto"),
    ("--color", "never"),
    ("--no-color",),
]


@EACH
@pytest.mark.parametrize("option", OPTIONS, ids=["=".join(option) for option in OPTIONS])
def test_an_option_may_stand_before_and_after_the_command(
    option: tuple[str, ...], name: str, main: Main, server: Hostile, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("t0ken-of-the-file")
    known = {"URL": f"{server.url}/prefix", "FILE": str(token)}
    words = [known.get(word, word) for word in option]
    command, *others = COMMANDS[name]
    ways = [[*words, command, *others], [command, *words, *others]]
    if len(words) == 2:
        joint = words[0] + ("=" if words[0].startswith("--") else "") + words[1]
        ways += [[joint, command, *others], [command, joint, *others]]
    if name == "delete":
        ways += [[command, *others, *words]]
    seen = set()
    for way in ways:
        call = main(*way)
        written = Path("out").read_bytes() if Path("out").exists() else None
        Path("out").unlink(missing_ok=True)
        (request,) = call.requests
        said = re.sub(rb"[0-9.]+ m?s", b"", call.err)
        seen.add((call.code, call.out, said, written, request))
    assert len(seen) == 1
    code, out, said, written, request = seen.pop()
    assert code == 0
    assert bool(out) == (option[0] not in ("-q", "--quiet", "-o", "--output"))
    assert (written is not None) == (option[0] in ("-o", "--output"))
    assert bool(said) == (
        option[0] in ("-v", "--verbose", "--trace") or (name, option[-1]) == ("run", "text")
    )
    assert (b"/prefix/api/v1/containers/" in request) == (option[0] == "--api-url")
    assert (b"Bearer t0ken-of-the-file\r\n" in request) == (option[0] == "--token-file")


@pytest.mark.parametrize(
    ("args", "like"),
    [
        (["-qo", "out", "status"], ["--quiet", "--output", "out", "status"]),
        (["-qoout", "status"], ["--quiet", "--output=out", "status"]),
        (["status", "-qftsv"], ["status", "--quiet", "--format=tsv"]),
        (["-vv", "status"], ["--trace", "status"]),
        (["-v", "-v", "status"], ["--trace", "status"]),
        (["-v", "status", "-v"], ["--trace", "status"]),
        (["-vftext", "status"], ["--verbose", "--format", "text", "status"]),
        (["-vC", ".", "status"], ["--verbose", "--chdir=.", "status"]),
        (["-f", "json", "-f", "tsv", "status"], ["--format", "tsv", "status"]),
        (["--format", "tsv", "status", "--format", "json"], ["--format", "json", "status"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_cluster_is_like_its_options(args: list[str], like: list[str], main: Main) -> None:
    calls = [main(*args), main(*like)]
    first, second = (
        (call.code, call.out, re.sub(rb"[0-9.]+ m?s", b"", call.err), call.requests)
        for call in calls
    )
    assert first == second
    assert first[0] == 0
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("args", "out"),
    [
        (["--format", "json", *RUN], as_json(DOCUMENTS["run"])),
        (["-v", "-v", *RUN], as_json(DOCUMENTS["run"])),
        (["--trace", *RUN], as_json(DOCUMENTS["run"])),
        (["--color", "never", "--format", "text", *RUN], b"OK"),
        (["--chdir", ".", "--format", "json", "--color", "auto", *RUN], as_json(DOCUMENTS["run"])),
        (["--quiet", *RUN], b""),
        (["--output", "out", "--quiet", *RUN], b""),
        (["--output", "out", *RUN], b""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_dispatcher_puts_in_front(args: list[str], out: bytes, main: Main) -> None:
    call = main(*args)
    assert (call.code, call.out) == (0, out)
    assert call.body == {"profile": "codex", "args": ["true"]}
    if "--output" in args and "--quiet" not in args:
        assert Path("out").read_bytes() == as_json(DOCUMENTS["run"])
    else:
        assert not Path("out").exists()


# --- where the container's command begins -----------------------------------------------------

CUTS: list[tuple[list[str], list[str]]] = [
    (["--", "true"], ["true"]),
    (["true"], ["true"]),
    (["--", "sh", "-c", "a -- b", "--", "--help"], ["sh", "-c", "a -- b", "--", "--help"]),
    (["sh", "-c", "a -- b", "--", "--help"], ["sh", "-c", "a -- b", "--", "--help"]),
    (["--", "codex", "--version"], ["codex", "--version"]),
    (["codex", "--version"], ["codex", "--version"]),
    (["ls", "-h"], ["ls", "-h"]),
    (["--", "--help"], ["--help"]),
    (["--", "-V"], ["-V"]),
    (["--", "--"], ["--"]),
    (["--", "--", "--"], ["--", "--"]),
    (["a", "--", "b"], ["a", "--", "b"]),
    (["a", "--profile", "b"], ["a", "--profile", "b"]),
    (["a", "--format", "yaml", "-q", "-v"], ["a", "--format", "yaml", "-q", "-v"]),
    (["--", "--image", "x"], ["--image", "x"]),
    (["--format", "tsv", "--", "-f", "text"], ["-f", "text"]),
    (["--format", "tsv", "a", "-f", "text"], ["a", "-f", "text"]),
    (["-"], ["-"]),
    (["-", "--"], ["-", "--"]),
    (["", "x"], ["", "x"]),
    (["--", ""], [""]),
    (["--", "run"], ["run"]),
    (["help"], ["help"]),
]
ODD_WORDS = [
    ["a b", "c\td", "e\nf", "g\\h", "'", '"', "$X", "*", "`", "=", "a=b", " "],
    ["\u00e4\u20ac\U0001f600", "\u0301", "\u202e", "\x1b[31m", "\x7f", "\x85", "\ufeff"],
    ["x" * 100_000],
]
CUTS += [(["--", *words], words) for words in ODD_WORDS]


@pytest.mark.parametrize(
    ("given", "words"), CUTS, ids=[ascii(" ".join(given))[1:41] for given, _ in CUTS]
)
def test_the_command_arrives_byte_for_byte(given: list[str], words: list[str], main: Main) -> None:
    call = main("run", *given)
    assert call.code == 0
    assert call.body == {"profile": "codex", "args": words}
    with_limit = main("--timeout-seconds", "9", "--image", "busybox", "run", *given)
    assert with_limit.body == {"image": "busybox", "command": words, "timeout_seconds": 9}


@pytest.mark.parametrize("at", [2, 3, -3, -2])
def test_the_command_of_a_process_arrives_byte_for_byte(
    at: int, cli: Program, server: Hostile
) -> None:
    given, words = CUTS[at]
    assert cli("run", *given).code == 0
    assert json.loads(server.requests[-1].partition(b"\r\n\r\n")[2])["args"] == words


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ([], {"profile": "codex", "args": ["true"]}),
        (["--profile", "testing-agent"], {"profile": "testing-agent", "args": ["true"]}),
        (["--profile=a=b"], {"profile": "a=b", "args": ["true"]}),
        (["--profile", "--help"], {"profile": "--help", "args": ["true"]}),
        (["--image", "alpine:3"], {"image": "alpine:3", "command": ["true"]}),
        (["--timeout-seconds", "0"], {"profile": "codex", "args": ["true"], "timeout_seconds": 0}),
        (
            ["--timeout-seconds=600"],
            {"profile": "codex", "args": ["true"], "timeout_seconds": 600},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_run_sends(options: list[str], body: dict[str, Any], main: Main) -> None:
    for call in (main(*options, *RUN), main("run", *options, "--", "true")):
        assert call.body == body
        (request,) = call.requests
        assert request.startswith(b"POST /api/v1/containers/runs HTTP/1.1\r\n")
        assert re.search(rb"(?i)\r\ncontent-type: application/json\r\n", request)


@pytest.mark.parametrize(
    ("args", "ids"),
    [
        (["a", "b"], ["a", "b"]),
        (["--", "-x"], ["-x"]),
        (["a", "--", "--format"], ["a", "--format"]),
        (["--", "--help", "--"], ["--help", "--"]),
        (["-"], ["-"]),
        (["a", "-f", "tsv", "b"], ["a", "b"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_the_ids_of_delete(args: list[str], ids: list[str], main: Main) -> None:
    call = main("delete", *args)
    assert call.code == 0
    lines = [request.split(b"\r\n", 1)[0].decode() for request in call.requests]
    assert lines == [f"DELETE /api/v1/containers/runs/{run_id} HTTP/1.1" for run_id in ids]


# --- usage errors -----------------------------------------------------------------------------


class Wrong(NamedTuple):
    """A wrong command line, and what the message has to name."""

    args: list[str]
    says: list[str] = []

    @property
    def id(self) -> str:
        return ascii(" ".join(self.args))[1:-1] or "nothing"


def own(option: str, *values: str) -> list[Wrong]:
    """Values that an option of `run` does not take."""
    return [Wrong(["run", option, value, "--", "true"], [option, value]) for value in values]


def of_all(option: str, *values: str) -> list[Wrong]:
    """Values that an option of every command does not take, before and after it."""
    before = [Wrong([option, value, "status"], [option, value]) for value in values]
    return before + [Wrong(["run", option, value, "x"], [option, value]) for value in values]


WRONG = [
    Wrong([], ["command"]),
    Wrong(["--format", "json"], ["command"]),
    Wrong(["-q"], ["command"]),
    Wrong(["frobnicate"], ["frobnicate"]),
    Wrong(["Run", "--", "true"], ["Run"]),
    Wrong(["stat"], ["stat"]),
    Wrong([""], []),
    Wrong(["-"], ["-"]),
    Wrong(["--frobnicate", "status"], ["--frobnicate"]),
    Wrong(["status", "--frobnicate"], ["--frobnicate"]),
    Wrong(["run", "--frobnicate", "--", "true"], ["--frobnicate"]),
    Wrong(["--frobnicate=S3CR3T", "status"], ["--frobnicate"]),
    Wrong(["-x", "status"], ["-x"]),
    Wrong(["run", "-e", "A=B", "true"], ["-e"]),
    Wrong(["-qx", "status"], ["-x"]),
    Wrong(["--token", "S3CR3T", "status"], ["--token"]),
    Wrong(["--token=S3CR3T", "status"], ["--token"]),
    Wrong(["--insecure", "status"], ["--insecure"]),
    # no abbreviations
    *(
        Wrong([option, "x", "status"], [option])
        for option in ("--tok", "--tim", "--api", "--ch", "--out", "--form", "--col")
    ),
    *(Wrong([option, *RUN], [option]) for option in ("--verb", "--qui", "--tra", "--no-col")),
    *(Wrong(["run", option, "x", "y"], [option]) for option in ("--prof", "--im", "--timeout-s")),
    # values
    *of_all("--format", "yaml", "JSON", "json,tsv", "opencli", "-v"),
    *of_all("--color", "sometimes", "ALWAYS"),
    *of_all("--timeout", "30", "-1s", "x", "1d", "-0.5s"),
    Wrong(["--timeout", "30", "status"], ["30s"]),
    Wrong(["--format", "", "status"], ["--format"]),
    Wrong(["--color=", "status"], ["--color"]),
    Wrong(["--timeout=", "status"], ["--timeout"]),
    *own("--timeout-seconds", "-1", "1.5", "x", "+5", " 5", "1e3", "0x10", "1_0", "5s"),
    *own("--timeout-seconds", "\u0663", "\u00b2"),
    Wrong(["run", "--timeout-seconds=", "true"], ["--timeout-seconds"]),
    Wrong(["status", "--wait", "5"], ["--wait", "5s"]),
    Wrong(["status", "--wait", "-1s"], ["--wait", "-1s"]),
    # a value that is not there
    *(
        Wrong(["status", option], [option])
        for option in ("--api-url", "--token-file", "--timeout", "--chdir", "--output", "--format")
    ),
    *(Wrong(["status", option], [option]) for option in ("--color", "-C", "-o", "-f", "--wait")),
    *(Wrong(["run", option], [option]) for option in ("--profile", "--image", "--timeout-seconds")),
    # a value too many
    *(
        Wrong([f"{option}=yes", "status"], [option])
        for option in ("--quiet", "--verbose", "--trace", "--no-color", "--help", "--version")
    ),
    # options that exclude each other
    Wrong(["--quiet", "--verbose", "status"], ["--quiet", "--verbose"]),
    Wrong(["-qv", "status"], ["--quiet", "--verbose"]),
    Wrong(["-v", "status", "-q"], ["--quiet", "--verbose"]),
    Wrong(["--quiet", "run", "--trace", "--", "true"], ["--quiet", "--trace"]),
    Wrong(["run", "--profile", "a", "--image", "b", "--", "true"], ["--profile", "--image"]),
    Wrong(["--image", "b", "run", "--profile", "a", "true"], ["--profile", "--image"]),
    Wrong(["run", "--profile", "codex", "--image", "b", "true"], ["--profile", "--image"]),
    # words
    Wrong(["run"], ["COMMAND"]),
    Wrong(["run", "--"], ["COMMAND"]),
    Wrong(["run", "--profile", "codex"], ["COMMAND"]),
    Wrong(["run", "--profile", "codex", "--"], ["COMMAND"]),
    Wrong(["delete"], ["RUN_ID"]),
    Wrong(["delete", "--"], ["RUN_ID"]),
    Wrong(["delete", "--format", "tsv"], ["RUN_ID"]),
    Wrong(["status", "extra"], ["extra"]),
    Wrong(["status", "--", "extra"], ["extra"]),
    Wrong(["runs", "run-1"], ["run-1"]),
    Wrong(["help", "frobnicate"], ["frobnicate"]),
    Wrong(["help", "run", "status"], ["status"]),
    # options of another command
    *(
        Wrong([name, option, "1s"], [option])
        for name in ("status", "runs", "delete")
        for option in ("--profile", "--image", "--timeout-seconds")
    ),
    Wrong(["run", "--wait", "1s", "true"], ["--wait"]),
    Wrong(["--wait", "1s", "runs"], ["--wait"]),
    # ids
    *(Wrong(["delete", run_id], ["''", "RUN_ID"]) for run_id in [""]),
    *(Wrong(["delete", run_id], [f"'{run_id}'"]) for run_id in (".", "..")),
    *(Wrong(["delete", f"run{c}1"], ["run"]) for c in "\0\t\n\r\x1b\x7f\x80\x9b"),
    Wrong(["delete", "run-1", ".."], ["'..'"]),
    Wrong(["delete", "--", "run-1", ""], ["''"]),
    Wrong(["run", "--", "\ud800"], ["3"]),
]


@pytest.mark.parametrize("case", WRONG, ids=[case.id for case in WRONG])
def test_a_usage_error_is_told_before_anything_is_sent(case: Wrong, main: Main) -> None:
    call = main(*case.args)
    told = spoken(call.err)
    assert call.code == 2
    assert call.out == b""
    assert call.requests == []
    assert len(told.errors) == 1
    assert told.text.startswith("bus-containers: ")
    assert "--help" in told.text
    for word in case.says:
        assert word in told.text
    assert "S3CR3T" not in told.text


def test_a_cluster_of_any_length(program: Program) -> None:
    assert program("-" + "v" * 5000, "--version").out.startswith(b"bus-containers ")


def test_a_usage_error_is_told_before_the_token_is_looked_for(program: Program) -> None:
    for args in ((), ("--format", "yaml", "status"), ("run",), ("delete", "..")):
        result = program(*args)
        assert result.code == 2
        assert result.out == b""
        assert "token" not in result.message
        assert "--help" in result.message


@pytest.mark.parametrize(
    ("args", "number"),
    [
        ([b"run", b"--", b"caf\xe9"], 3),
        ([b"run", b"caf\xe9"], 2),
        ([b"delete", b"a\xff"], 2),
        ([b"\xff\xfe"], 1),
        ([b"--format", b"js\xf0\x9f", b"status"], 2),
        ([b"--output=\xff", b"status"], 1),
        ([b"run", b"--", b"true", b"\xed\xa0\x80"], 4),
        ([b"run", b"--", b"true", b"\xc0\x80"], 4),
    ],
    ids=lambda value: ascii(b" ".join(value)) if isinstance(value, list) else "",
)
def test_an_argument_that_is_not_utf_8(
    args: list[bytes], number: int, cli: Program, server: Hostile
) -> None:
    before = server.connections
    result = cli(*args)
    told = spoken(result.err)
    assert result.code == 2
    assert result.out == b""
    assert re.search(rf"argument {number}\b", told.text)
    assert "UTF-8" in told.text
    assert "--help" in told.text
    assert server.connections == before


# --- locales ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["C", "C.UTF-8", "latin-1"])
def locale(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Variables that make Python decode arguments as ASCII, UTF-8 or latin-1."""
    off = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": None}
    if request.param != "latin-1":
        return {**off, "LC_ALL": request.param}
    folder = tmp_path_factory.mktemp("locales")
    if not shutil.which("localedef"):
        pytest.skip("no localedef to make a latin-1 locale with")
    words = ["localedef", "-c", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    subprocess.run(words, capture_output=True, timeout=LIMIT)
    environ = {**off, "LC_ALL": "en_US.ISO-8859-1", "LOCPATH": str(folder)}
    probe = [sys.executable, "-c", "import sys; print(ascii(sys.argv[1]))", "\u00e4"]
    full = {**os.environ, **{name: value for name, value in environ.items() if value}}
    seen = subprocess.run(probe, env=full, capture_output=True, timeout=LIMIT).stdout
    if seen.strip() != rb"'\xc3\xa4'":
        pytest.skip("no latin-1 locale to be had")
    return environ


def test_any_locale(locale: dict[str, str | None], cli: Program, tmp_path: Path) -> None:
    folder = tmp_path / "f\u00f6lder-\u20ac-\U0001f600"
    folder.mkdir()
    (folder / "t\u00f6ken").write_text("t0ken-of-the-file")
    document = {**DOCUMENTS["run"], "stdout": "\u00e4\u20ac\U0001f600"}
    words = ["\u00e4", "\u20ac", "\U0001f600"]
    with Hostile(answer(json.dumps(document).encode())) as server:
        options = ["--chdir", str(folder), "--token-file", "t\u00f6ken", "-o", "r\u00e9sult"]
        url = ("--api-url", server.url)
        result = cli(*(word.encode() for word in (*url, *options, "run", *words)), env=locale)
        assert (result.code, result.out, result.err) == (0, b"", b"")
        assert (folder / "r\u00e9sult").read_bytes() == as_json(document)
        (request,) = server.requests
        assert json.loads(request.partition(b"\r\n\r\n")[2])["args"] == words
        assert b"Bearer t0ken-of-the-file\r\n" in request
        result = cli(*url, "run", "--", "true", env=locale)
        assert (result.code, result.out, result.err) == (0, as_json(document), b"")
    result = cli(b"--api-url", b"http://\xc3\xa4 b", b"status", env=locale)
    assert result.code == 2
    assert "--api-url" in spoken(result.err).text
    result = cli(b"--chdir", "n\u00f6where".encode(), b"status", env=locale)
    assert result.code == 1
    assert "--chdir" in spoken(result.err).text


# --- help and version -------------------------------------------------------------------------

SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "COMMANDS", "OPTIONS", "ENVIRONMENT", "EXIT STATUS"]
SECTIONS += ["EXAMPLES", "SEE ALSO"]
LONG = "--help --version --api-url --token-file --timeout --chdir --output --format --quiet"
LONG += " --verbose --trace --color --no-color"
VARIABLES = "BUS_AI_API_URL BUS_API_BASE_URL BUS_AI_TOKEN BUS_API_TOKEN BUS_CONFIG_DIR"
VARIABLES += " XDG_CONFIG_HOME HTTPS_PROXY HTTP_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR NO_COLOR"


def test_help(main: Main) -> None:
    call = main("--help")
    page = call.out.decode("ascii")
    assert (call.code, call.err, call.requests) == (0, b"", [])
    titles = [line for line in page.splitlines() if line and line[0] != " "]
    assert titles == SECTIONS
    for word in (*LONG.split(), *VARIABLES.split(), *COMMANDS, "125", "130", "143"):
        assert re.search(rf"(?<![\w-]){word}(?![\w-])", page), word
    assert max(map(len, page.splitlines())) <= 80
    assert page.endswith("\n")
    assert page.isascii() and "\x1b" not in page
    for args in (["-h"], ["help"], ["--frobnicate", "--help"], ["-h", "--frobnicate=x"], ["-vh"]):
        assert main(*args)[:3] == call[:3]


@pytest.mark.parametrize("name", [*COMMANDS, "help"])
def test_help_of_a_command(name: str, main: Main) -> None:
    call = main(name, "--help")
    page = call.out.decode("ascii")
    assert (call.code, call.err, call.requests) == (0, b"", [])
    titles = [line for line in page.splitlines() if line and line[0] != " "]
    assert titles == [title for title in SECTIONS if title in titles]
    assert {"NAME", "SYNOPSIS", "EXIT STATUS", "EXAMPLES"} <= set(titles)
    assert f"bus-containers {name} - " in page
    others = {"run": ["--profile", "--image", "--timeout-seconds"], "status": ["--wait"]}
    for word in others.get(name, []):
        assert word in page
    ways = [[name, "-h"], ["help", name], [name, "--frobnicate", "--help"], ["-q", name, "-vh"]]
    ways += [[name, "--format", "yaml", "--help"]]
    for args in ways:
        assert main(*args)[:3] == call[:3]


def test_help_needs_nothing(program: Program) -> None:
    bad = {"BUS_AI_API_URL": "no url", "BUS_AI_TOKEN": "a b", "HOME": None, "NO_COLOR": None}
    for args in (["--help"], ["run", "--help"], ["--version"], ["help", "delete"]):
        result = program("--color=always", *args, env=bad)
        assert result.code == 0
        assert result.err == b""
        assert b"\x1b" not in result.out


def test_version(main: Main) -> None:
    for args in (["--version"], ["-V"], ["status", "--version"], ["run", "-V", "--", "true"]):
        call = main(*args)
        assert (call.code, call.err, call.requests) == (0, b"", [])
        assert call.out == f"bus-containers {bus_containers.__version__}\n".encode()
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", bus_containers.__version__)


# --- --chdir, --output, --quiet ---------------------------------------------------------------


def test_every_relative_path_is_relative_to_chdir(cli: Program, server: Hostile) -> None:
    folder = cli.home / "there"
    (folder / "config" / "auth").mkdir(parents=True)
    (folder / "config" / "auth" / "api-token").write_text("t0ken-of-the-config")
    (folder / "token").write_text("t0ken-of-the-file")
    result = cli("--token-file=token", "-C", "there", "-o", "out", "status", cwd=cli.home)
    assert (result.code, result.out, result.err) == (0, b"", b"")
    assert (folder / "out").read_bytes() == as_json(DOCUMENTS["status"])
    assert b"Bearer t0ken-of-the-file\r\n" in server.requests[-1]
    env = {"BUS_AI_TOKEN": None, "BUS_CONFIG_DIR": "config"}
    assert cli("status", "--chdir=there", env=env, cwd=cli.home).code == 0
    assert b"Bearer t0ken-of-the-config\r\n" in server.requests[-1]


@EACH
@pytest.mark.parametrize("place", ["missing", "a-file"])
def test_chdir_to_nowhere(place: str, name: str, main: Main) -> None:
    Path("a-file").touch()
    call = main("--chdir", place, *COMMANDS[name])
    assert call.code == FAILURE[name]
    assert call.out == b""
    assert call.requests == []
    assert "--chdir" in call.text
    assert place in call.text


@EACH
@pytest.mark.parametrize(
    "place", ["missing/out", "folder", "a-file/out", "/proc/out", "", "x" * 300, "nul\0"]
)
def test_an_output_that_cannot_be_written(place: str, name: str, main: Main) -> None:
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc, where nobody can make a file")
    Path("folder").mkdir()
    Path("a-file").touch()
    call = main("--output", place, *COMMANDS[name])
    assert call.code in (FAILURE[name], 2)
    assert call.code == FAILURE[name] or place == ""
    assert call.out == b""
    assert call.requests == []
    assert place.rstrip("\0") in call.text
    assert sorted(os.listdir()) == ["a-file", "folder"]


@EACH
def test_output_gets_what_standard_output_would(name: str, main: Main) -> None:
    for format_ in ("json", "text", "tsv"):
        plain = main("-f", format_, *COMMANDS[name])
        Path("old").write_bytes(b"old content, and longer than the new one " * 100)
        for place in ("new", "old"):
            call = main("-f", format_, "-o", place, *COMMANDS[name])
            assert (call.code, call.out, call.err) == (plain.code, b"", plain.err)
            assert Path(place).read_bytes() == plain.out


@EACH
def test_output_keeps_its_old_content_until_there_is_a_result(name: str, main: Main) -> None:
    Path("old").write_bytes(b"old content")
    error = b'{"error":{"type":"forbidden","message":"not yours"}}'
    with Hostile(answer(error, "403 Forbidden")) as refusing:
        for place in ("old", "new"):
            call = main("-o", place, *COMMANDS[name], at=refusing)
            assert call.code == FAILURE[name]
            assert call.out == b""
            assert "not yours" in call.text
    assert Path("old").read_bytes() == b"old content"
    assert not Path("new").exists()


@EACH
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_result_that_output_does_not_take_goes_to_standard_output(name: str, main: Main) -> None:
    call = main("--output", "/dev/full", *COMMANDS[name])
    assert call.code == FAILURE[name]
    assert json.loads(call.out) == DOCUMENTS[name]
    assert "/dev/full" in call.text
    assert not spoken(call.err).advises


@EACH
def test_quiet(name: str, main: Main) -> None:
    call = main("--quiet", "--output", "out", *COMMANDS[name])
    assert (call.code, call.out, call.err) == (0, b"", b"")
    assert len(call.requests) == 1
    assert not Path("out").exists()
    with Hostile(answer(b'{"error":{"type":"x","message":"no"}}', "400 Bad Request")) as refusing:
        call = main("--quiet", *COMMANDS[name], at=refusing)
    assert call.code == FAILURE[name]
    assert call.out == b""
    assert len(spoken(call.err).errors) == 1


def test_quiet_passes_the_exit_code_on(main: Main) -> None:
    for format_ in ("json", "text", "tsv"):
        with Hostile(answer(b'{"run_id":"r","exit_code":37,"stdout":"a","stderr":"b"}')) as failing:
            call = main("-q", "--format", format_, *RUN, at=failing)
        assert (call.code, call.out, call.err) == (37, b"", b"")


# --- standard output that is closed, full or has no reader ------------------------------------


@EACH
def test_a_closed_standard_output_is_told_before_the_request(
    name: str, cli: Program, server: Hostile
) -> None:
    before = server.connections
    closed = Program(["sh", "-c", 'exec "$@" >&-', "sh", *cli.command], cli.home)
    closed.environ.update(cli.environ)
    result = closed(*COMMANDS[name])
    assert result.code == FAILURE[name]
    assert "standard output" in spoken(result.err).text
    assert server.connections == before


@pytest.mark.parametrize("name", ["status", "run"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_standard_output(name: str, cli: Program) -> None:
    with open("/dev/full", "wb") as full:
        result = cli(*COMMANDS[name], stdout=full)
    assert result.code == FAILURE[name]
    told = spoken(result.err)
    assert len(told.errors) == 1
    assert not told.advises


@EACH
def test_a_reader_that_went_away(name: str, cli: Program) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = cli(*COMMANDS[name], stdout=writer)
    finally:
        os.close(writer)
    assert (result.code, result.err) == (FAILURE[name], b"")


# --- exit codes -------------------------------------------------------------------------------

CODES = {"0": 0, "1": 1, "2": 2, "37": 37, "125": 125, "130": 130, "255": 255}
CODES.update({"-1": 129, "-2": 130, "-9": 137, "-15": 143, "-127": 255, "-128": 255, "-1000": 255})
CODES.update({"256": 255, "257": 255, "512": 255, "65536": 255, "99999999999999999999": 255})
NO_CODES = ["null", "", '"0"', '"37"', "true", "false", "37.0", "0.0", "-0.0", "1e2", "[]", "{}"]
FORMATS = pytest.mark.parametrize("format_", ["json", "text", "tsv"])


def run_answer(code: str) -> bytes:
    exit_code = f'"exit_code":{code},' if code else ""
    return b'{"run_id":"run-1",%s"stdout":"OK","stderr":""}' % exit_code.encode()


@FORMATS
@pytest.mark.parametrize(("value", "code"), CODES.items(), ids=CODES)
def test_the_exit_code_of_a_run(value: str, code: int, format_: str, main: Main) -> None:
    with Hostile(answer(run_answer(value))) as running:
        call = main("-f", format_, *RUN, at=running)
    assert call.code == code
    assert b"OK" in call.out
    assert len(spoken(call.err).errors) == (format_ == "text")
    assert format_ == "tsv" or value.encode() in call.out + call.err


@FORMATS
@pytest.mark.parametrize("value", NO_CODES, ids=[value or "missing" for value in NO_CODES])
def test_a_run_without_an_exit_code_is_no_success(value: str, format_: str, main: Main) -> None:
    with Hostile(answer(run_answer(value))) as running:
        call = main("-f", format_, *RUN, at=running)
    assert call.code == 125
    assert b"OK" in call.out
    assert "exit_code" in call.text
    assert not spoken(call.err).advises
    assert len(call.requests) == 1


@pytest.mark.parametrize(("value", "code"), [("256", 255), ("-9", 137), ("null", 125), ("7", 7)])
def test_the_exit_status_of_the_process(value: str, code: int, cli: Program) -> None:
    with Hostile(answer(run_answer(value))) as running:
        assert cli("--api-url", running.url, *RUN).code == code


@EACH
def test_a_stopped_platform(name: str, cli: Program) -> None:
    with refused_port() as port:
        url = f"http://127.0.0.1:{port}"
        result = cli("--api-url", url, "--timeout", "250ms", *COMMANDS[name])
    told = spoken(result.err)
    assert result.code == FAILURE[name]
    assert result.out == b""
    assert len(told.errors) == 1
    assert url in told.text
    assert not told.advises


@EACH
@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "402 Payment Required"])
def test_an_api_error_says_all_that_the_server_said(status: str, name: str, main: Main) -> None:
    error = {
        "type": "quota_exceeded",
        "message": "the container runtime of this month is used up",
        "action": "upgrade_plan",
        "command": "bus billing setup",
        "plan_id": "small",
        "recommended_plan": "large",
        "usage": {
            "feature": "container:run",
            "meter_event_name": "bus_container_runtime_seconds",
            "window": "month",
            "used": 3600,
            "limit": 3601,
        },
    }
    with Hostile(answer(json.dumps({"error": error}).encode(), status)) as refusing:
        call = main(*COMMANDS[name], at=refusing)
    assert call.code == FAILURE[name]
    assert call.out == b""
    text = call.text.replace(",", "")
    for word in (status[:3], "/api/v1/containers/", "3600", "3601", "month", "large"):
        assert word in text
    for word in ("type", "message", "action", "command"):
        assert str(error[word]) in call.text
    assert {"status": "GET", "runs": "GET", "run": "POST", "delete": "DELETE"}[name] in call.text
    assert len(spoken(call.err).errors) == 1


# --- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize("name", ["runs", "delete"])
def test_a_signal(name: str, number: int, code: int, cli: Program) -> None:
    with Hostile(silent()) as holding:
        args = ("--api-url", holding.url, *COMMANDS[name])
        with cli.start(*args) as process:
            assert holding.reached.wait(LIMIT)
            process.send_signal(number)
            out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == code
    assert out == b""
    assert len(spoken(err).errors) == 1


def test_an_ignored_interrupt_stays_ignored(cli: Program) -> None:
    release = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.server.reached.set()
        release.wait(LIMIT)
        connection.send(message(b'{"items":[]}'))

    with Hostile(script) as holding:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process = cli.start("--api-url", holding.url, "runs")
        finally:
            signal.signal(signal.SIGINT, before)
        with process:
            assert holding.reached.wait(LIMIT)
            process.send_signal(signal.SIGINT)
            release.set()
            out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out, err) == (0, as_json({"items": []}), b"")


# --- delete -----------------------------------------------------------------------------------


def deleting(connection: Connection) -> None:
    """Answer a DELETE by the run's id."""
    run_id = connection.read_request().split(b" ", 2)[1].rpartition(b"/")[2].decode()
    error = json.dumps({"error": {"type": run_id, "message": f"about {run_id}"}}).encode()
    answers = {
        "forbidden": message(error, "403 Forbidden"),
        "not_found": message(error, "404 Not Found"),
        "empty": message(b"", "204 No Content"),
        "kept": message(b'{"deleted":false,"run_id":"kept"}'),
        "nonsense": message(b"nonsense"),
    }
    fine = {"deleted": True, "run_id": run_id, "owner_identity_id": "me", "new": 1}
    connection.send(answers.get(run_id, message(json.dumps(fine).encode())))


def deleted(run_id: str) -> dict[str, Any]:
    return {"deleted": True, "run_id": run_id, "owner_identity_id": "me", "new": 1}


@pytest.mark.parametrize(
    ("ids", "code", "document", "failed"),
    [
        (["a"], 0, deleted("a"), []),
        (["a", "b"], 0, [deleted("a"), deleted("b")], []),
        (["empty"], 0, {"deleted": True, "run_id": "empty"}, []),
        (["a", "empty"], 0, [deleted("a"), {"deleted": True, "run_id": "empty"}], []),
        (["forbidden"], 1, None, ["forbidden"]),
        (["not_found"], 1, None, ["not_found"]),
        (["kept"], 1, None, ["kept"]),
        (["nonsense"], 1, None, ["nonsense"]),
        (["not_found", "a"], 1, [deleted("a")], ["not_found"]),
        (
            ["a", "forbidden", "b", "not_found", "nonsense", "c"],
            1,
            [deleted("a"), deleted("b"), deleted("c")],
            ["forbidden", "not_found", "nonsense"],
        ),
        (["forbidden", "not_found"], 1, [], ["forbidden", "not_found"]),
    ],
    ids=[
        "one",
        "two",
        "204",
        "one-and-204",
        "403",
        "404",
        "not-deleted",
        "no-json",
        "404-first",
        "some",
        "none-of-two",
    ],
)
def test_delete(ids: list[str], code: int, document: Any, failed: list[str], main: Main) -> None:
    with Hostile(deleting) as running:
        call = main("delete", *ids, at=running)
    assert call.code == code
    assert call.out == (b"" if document is None else as_json(document))
    errors = spoken(call.err).errors
    assert len(errors) == len(failed)
    for line, run_id in zip(errors, failed):
        assert run_id in line
    sent = [request.split(b" ", 2)[1].rpartition(b"/")[2].decode() for request in call.requests]
    assert sent == ids


# --- runs -------------------------------------------------------------------------------------

ITEM = {"run_id": "run-1", "state": "exited", "new": {"a": [1]}}


@pytest.mark.parametrize(
    ("document", "printed"),
    [
        ({"items": [ITEM]}, {"items": [ITEM]}),
        ({"items": []}, {"items": []}),
        ({"runs": [ITEM]}, {"items": [ITEM]}),
        ({"runs": []}, {"items": []}),
        ([ITEM], {"items": [ITEM]}),
        ([], {"items": []}),
        ({"items": [ITEM], "next": "x"}, {"items": [ITEM], "next": "x"}),
    ],
    ids=["items", "no-items", "runs", "no-runs", "list", "empty-list", "more-fields"],
)
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "405 Method Not Allowed"])
def test_runs(status: str, document: Any, printed: Any, main: Main) -> None:
    good = answer(json.dumps(document).encode())
    refusal = b'{"error":{"type":"x","message":"no such route"}}'
    scripts = [good] if status == "200 OK" else [answer(refusal, status), good]
    if status != "200 OK" and isinstance(document, list):
        scripts[1] = answer(json.dumps({"items": document}).encode())  # as `/status` has it
    with Hostile(*scripts) as running:
        call = main("runs", at=running)
    assert (call.code, call.out, call.err) == (0, as_json(printed), b"")
    paths = [request.split(b" ", 2)[1] for request in call.requests]
    expected = [b"/api/v1/containers/runs", b"/api/v1/containers/status"]
    assert paths == expected[: len(scripts)]


@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "403 Forbidden"])
def test_no_other_error_of_runs_makes_it_ask_status(status: str, main: Main) -> None:
    with Hostile(answer(b"{}", status)) as running:
        call = main("runs", at=running)
    assert call.code == 1
    assert len(call.requests) == 1


@pytest.mark.parametrize("body", ["{}", '{"items":{}}', '{"runs":7}', '"x"', "7"])
def test_runs_of_an_unknown_shape(body: str, main: Main) -> None:
    with Hostile(answer(body.encode())) as running:
        call = main("runs", at=running)
    assert call.code == 1
    assert call.out == b""
    assert len(spoken(call.err).errors) == 1


# --- what is told -----------------------------------------------------------------------------


def test_verbose_and_trace(main: Main, server: Hostile) -> None:
    silent_, verbose, trace = main("status"), main("-v", "status"), main("--trace", "status")
    assert silent_.err == b""
    assert verbose.out == trace.out == silent_.out
    for word in (server.url, "BUS_AI_API_URL", "BUS_AI_TOKEN", "GET", "200", " s"):
        assert word in verbose.text
    size = len(json.dumps(DOCUMENTS["status"]))
    assert re.search(rf"\b{size}\b", verbose.text)
    assert "authorization" not in verbose.text.lower()
    assert re.search(r"(?im)authorization:? .*redacted", trace.text)
    assert re.search(r"(?im)content-type: application/json", trace.text)
    assert len(trace.err) > len(verbose.err)


class Terminal:
    """A pseudo-terminal that changes nothing on its way."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        tty.setraw(self.slave, termios.TCSANOW)

    def read(self) -> bytes:
        """All that was written, once the writers are gone."""
        os.close(self.slave)
        read = bytearray()
        try:
            while piece := os.read(self.master, 65536):
                read += piece
        except OSError:  # Linux's way to say that it was all
            pass
        os.close(self.master)
        return bytes(read)


def on_terminal(cli: Program, args: Sequence[str], stream: str, **env: str | None) -> bytes:
    terminal = Terminal()
    streams: dict[str, Any] = {stream: terminal.slave}
    cli(*args, env={"TERM": "xterm", **env}, **streams)
    return terminal.read()


@EACH
def test_a_terminal_makes_no_difference_to_the_result(name: str, cli: Program) -> None:
    for args in (COMMANDS[name], ("--color", "always", "--format", "text", *COMMANDS[name])):
        assert on_terminal(cli, args, "stdout") == cli(*args).out


@pytest.mark.parametrize(
    ("args", "env", "terminal", "coloured"),
    [
        ([], {}, True, True),
        ([], {}, False, False),
        (["--color", "auto"], {}, True, True),
        ([], {"NO_COLOR": "1"}, True, False),
        ([], {"NO_COLOR": ""}, True, True),
        ([], {"TERM": "dumb"}, True, False),
        (["--color", "never"], {}, True, False),
        (["--no-color"], {}, True, False),
        (["--color", "always"], {}, False, True),
        (["--color", "always"], {"NO_COLOR": "1"}, False, True),
        (["--color", "always"], {"TERM": "dumb"}, False, True),
    ],
)
def test_colour_of_an_error(
    args: list[str], env: dict[str, str | None], terminal: bool, coloured: bool, cli: Program
) -> None:
    words = [*args, "--chdir", "nowhere", "status"]
    err = on_terminal(cli, words, "stderr", **env) if terminal else cli(*words, env=env).err
    assert (b"\x1b[" in err) == coloured
    plain = re.sub(rb"\x1b\[[0-9;]*[A-Za-z]", b"", err)
    assert plain.startswith(b"bus-containers: ")
    assert b"nowhere" in plain
    assert plain.endswith(b"\n")
