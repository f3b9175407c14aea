# SPDX-License-Identifier: MIT
"""What the README shows, as a newcomer types it: the program under the stand-in platform.

The README's transcripts are read from it and run. What differs each time (ids, ports, times) is
made alike on both sides, and nothing else.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bus_containers
import local_platform
from hostile import Hostile, reset
from local_platform import Platform
from support import (
    LIMIT,
    NOWHERE,
    ROOT,
    Env,
    InProcess,
    Program,
    Result,
    as_json,
    check_failure,
    second_tier,
    tiers,
)

README = (ROOT / "README.md").read_text("utf-8")
PLATFORM = str(Path(local_platform.__file__).resolve())


@pytest.fixture
def newcomer(program: Program) -> Program:
    """`python3 tests/local_platform.py`, with whatever comes after it, in a folder of its own."""
    program.environ["CLI"] = shlex.join(program.command)
    program.command = [sys.executable, PLATFORM]
    return program


def shell(newcomer: Program, script: str, *options: str) -> Result:
    """Run a shell script under the platform; `bus-containers` in it is the program."""
    start = f'bus_containers() {{ {newcomer.environ["CLI"]} "$@"; }}\n'
    script = start + script.replace("bus-containers", "bus_containers")
    return newcomer(*options, "sh", "-c", script)


# --- the README's own commands and transcripts ----------------------------------------------------


class Shown(NamedTuple):
    """A command of the README, and the output that stands below it."""

    command: str
    output: str


def transcripts() -> Iterator[list[Shown]]:
    """Each block of `$` lines with what follows them, without comments."""
    text = README.replace("\n\n    $ ", "\n-\n    $ ")  # a blank line before a command ends a block
    for block in re.findall(r"(?m)(?:^    .*\n|^\n(?=    ))+", text):
        lines = [line[4:] for line in block.splitlines()]
        starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
        commands = [lines[start][2:].partition(" # ")[0].strip() for start in starts]
        outputs = ("\n".join(lines[a + 1 : b]) for a, b in zip(starts, [*starts[1:], len(lines)]))
        if starts:
            yield [Shown(*both) for both in zip(commands, outputs)]


BLOCKS = list(transcripts())
TRANSCRIPTS = [shown for block in BLOCKS for shown in block]
TROUBLE = ("not ready", "connection was lost", "HTTP 401", "HTTP 402", "--timeout-seconds 9")
DIFFERS = [  # what is another one each time, and what stands for it
    (r"run_[0-9a-f]{32}", "run_ID"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ACCOUNT"),
    (r"http://127\.0\.0\.1:\d+", "URL"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "WHEN"),
    (r"/[\w./-]*/auth/api-token", "TOKEN-FILE"),
    (r"(?<![\d,])\d+(\.\d+)? (ms|s)\b", "TIME"),
    (r'"duration_ms": \d+', '"duration_ms": N'),
    (r"\d+(?=\s+localhost/)", "N"),
    (r"[\d,]+ bytes", "N bytes"),
    (r"-{2,}| +", " "),
]


def alike(text: str) -> str:
    for pattern, name in DIFFERS:
        text = re.sub(pattern, name, text)
    return text.replace("bus_containers", "bus-containers").strip()


def showing(*words: str) -> list[Shown]:
    return [shown for shown in TRANSCRIPTS if any(word in shown.output for word in words)]


def test_the_readme_shows_each_command() -> None:
    shown = "\n".join(shown.command for shown in TRANSCRIPTS)
    for name in ("status", "run", "runs", "delete"):
        assert re.search(rf"bus-containers (\S+ )*?{name}\b", shown), name
    assert "-- make test" not in README  # nothing of this machine reaches a container
    assert showing("not ready")
    assert showing("connection was lost")


def test_transcripts_of_success(newcomer: Program) -> None:
    """One shell and one platform for each block, so that ids fit; all blocks in one process."""
    good = [block for block in BLOCKS if not {*block} & {*showing(*TROUBLE)}]
    assert len(good) >= 3
    folder = newcomer.folder or Path()
    for number, block in enumerate(good):
        lines = ["id=run_1\n"]
        for at, shown in enumerate(block):
            command = re.sub(r"run_[0-9a-f]{32}", '"$id"', shown.command)
            lines.append(f"{{ {command}\n}} >out.{at} 2>&1\n")
            lines.append(f"grep -o 'run_[0-9a-f]*' out.{at} >found && read -r id <found\n")
        shell(newcomer, "".join(lines))
        for at, shown in enumerate(block):
            output = (folder / f"out.{at}").read_text("utf-8")
            assert alike(output) == alike(shown.output), f"block {number}: {shown.command}"


def test_transcripts_of_denials(cli: InProcess, platform: Platform) -> None:
    for shown in showing("HTTP 401", "HTTP 402"):
        token = platform.token(scope="container:read billing:read", expires_in=-10_801.0)
        if "HTTP 402" in shown.output:
            platform.billing, token = "quota", platform.token()
        words = shlex.split(shown.command.partition(" >")[0])[1:]
        result = cli(*words, at=platform, env={"BUS_AI_TOKEN": token})
        assert alike(result.message) == alike(shown.output), shown.command
        assert result.code == 125
        platform.reset()
    assert showing("HTTP 401")
    assert showing("HTTP 402")


def test_transcripts_of_trouble(cli: InProcess, platform: Platform) -> None:
    with Hostile(reset()) as server:
        for shown in showing("not ready", "connection was lost", "--timeout-seconds 9"):
            words = shlex.split(shown.command.partition(" >")[0])[1:]
            at: Any = server if "lost" in shown.output else platform
            env: Env = {"BUS_AI_API_URL": NOWHERE} if "not ready" in shown.output else {}
            result = cli(*words, at=at, env=env)
            assert alike(result.message) == alike(shown.output), shown.command


def test_the_first_command_of_the_readme(newcomer: Program) -> None:
    [line] = re.findall(r"(?m)^    python3 (tests/local_platform\.py .*)$", README)[:1]
    words = shlex.split(line)
    assert words[1:3] == ["python3", "bus_containers.py"]
    own = shlex.split(newcomer.environ["CLI"])
    result = newcomer(*own, *words[3:])
    assert (result.code, result.err) == (0, b"")
    document = result.document
    assert result.out == as_json(document)
    assert re.fullmatch("run_[0-9a-f]{32}", document.pop("run_id"))
    assert re.fullmatch("[0-9a-f-]{36}", document.pop("owner_identity_id"))
    assert 0 <= document.pop("duration_ms") < 60_000
    assert list(document.items()) == [
        ("runner_name", "local-runner"),
        ("image", "localhost/codex"),
        ("args", ["sh", "-c", "printf OK"]),
        ("exit_code", 0),
        ("stdout", "OK"),
        ("stderr", ""),
        ("runtime", "process"),
    ]


def test_the_library_example_of_the_readme(platform: Platform, program: Program) -> None:
    [block] = re.findall(r"(?m)^    import bus_containers\n(?:(?:    .*)?\n)+", README)
    source = inspect.cleandoc(block)
    ast.parse(source)
    for url, out in ((platform.url, b"0 "), ("not a URL", b"BUS_AI_API_URL")):
        environ = program.env(
            BUS_AI_API_URL=url,
            BUS_AI_TOKEN=platform.token(),
            PYTHONPATH=str(Path(inspect.getfile(bus_containers)).parent),
        )
        words = [sys.executable, "-W", "error", "-c", source]
        result = subprocess.run(words, env=environ, capture_output=True, timeout=LIMIT)
        assert (result.returncode, result.stderr) == (0, b""), url
        assert out in result.stdout


def test_the_map_of_the_tests_is_true() -> None:
    """Files that are named exist, each file is named, and so does each promise that is cited."""
    folder = ROOT / "tests"
    files = {path.name for path in folder.glob("test_*.py")}
    own_map = (folder / "README.md").read_text("utf-8")
    named = {*re.findall(r"\btest_\w+\.py\b", own_map)}
    assert sorted(named ^ files) == []
    assert {*re.findall(r"\btest_\w+\.py\b", README)} <= files
    contract = (folder / "CONTRACT.md").read_text("utf-8")
    promises = {*re.findall(r"(?m)^ *- (\d\.\d+) ", contract)}
    for name in sorted(files):
        text = (folder / name).read_text("utf-8")
        cited = re.findall(r"[Pp]romises? ((?:\d\.\d+(?:, | and | to |,?))+)", text)
        unknown = {*re.findall(r"\d\.\d+", " ".join(cited))} - promises
        assert sorted(unknown) == [], name


# --- a day's work ---------------------------------------------------------------------------------


@second_tier  # the transcripts are most of it
def test_the_documented_commands(newcomer: Program) -> None:
    result = shell(
        newcomer,
        """
        set -eu
        bus-containers status >status
        bus-containers run --profile codex -- sh -c 'printf OK' >run
        bus-containers runs >runs
        id=$(sed -n 's/.*"run_id": "\\(.*\\)".*/\\1/p' run)
        bus-containers delete "$id" >deleted
        ! bus-containers delete "$id" >again 2>error
        bus-containers runs >none
        cat error >&2
        for file in status run runs deleted again none; do cat $file; printf '\\0'; done
        """,
    )
    assert result.code == 0
    status, run, runs, deleted, again, none, rest = result.out.split(b"\0")
    for text in (status, run, runs, deleted):
        assert as_json(json.loads(text)) == text
    assert json.loads(status)["items"][0]["state"] == "ready"
    assert json.loads(run)["stdout"] == "OK"
    (item,) = json.loads(runs)["items"]
    run_id, owner = item["run_id"], item["owner_identity_id"]
    assert run_id == json.loads(run)["run_id"]
    assert (item["state"], item["exit_code"]) == ("exited", 0)
    assert json.loads(deleted) == {"deleted": True, "run_id": run_id, "owner_identity_id": owner}
    assert (again, none, rest) == (b"", as_json({"items": []}), b"")
    for word in ("404", "not_found", "no such run", run_id, "DELETE"):
        assert word in result.error


GREP = {
    "stdout": ("printf OK", '"stdout": "OK"', 0),
    "exit-code": ("printf OK", '"exit_code": 0', 0),
    "37": ("printf no >&2; exit 37", '"exit_code": 37', 37),
    "stderr": ("printf no >&2; exit 37", '"stderr": "no"', 37),
}


@pytest.mark.parametrize("name", tiers(GREP, "37"))
def test_grep_finds_it(name: str, newcomer: Program) -> None:
    words, pattern, code = GREP[name]
    script = f"""
        bus-containers run -- sh -c {shlex.quote(words)} >out && code=0 || code=$?
        grep -c {shlex.quote(pattern)} out
        exit $code
    """
    assert shell(newcomer, script)[:3] == (code, b"1\n", b"")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["sh", "-c", "exit 37"], 37), (["sh", "-c", "exit 255"], 255),
        (["sh", "-c", "kill -9 $$"], 137), (["true"], 0), (["false"], 1),
        (["no-such-command-anywhere"], 127),
    ],
)  # fmt: skip
def test_the_exit_code_is_the_commands(
    words: list[str], code: int, cli: InProcess, platform: Platform
) -> None:
    for format_ in ("json", "text", "tsv"):
        assert cli("--format", format_, "run", "--", *words, at=platform).code == code


def test_a_run_over_its_limit(cli: InProcess, platform: Platform) -> None:
    result = cli("run", "--timeout-seconds", "1", "--", "sleep", "60", at=platform)
    assert (result.code, result.document["exit_code"]) == (124, 124)
    assert result.seconds < 20


def test_text_is_as_docker_gives_it(cli: InProcess, platform: Platform) -> None:
    script = "printf 'a\\r\\nb'; echo c >&2; exit 3"
    result = cli("run", "-f", "text", "--", "sh", "-c", script, at=platform)
    assert (result.code, result.out) == (3, b"a\r\nb")
    first, line, rest = result.err.split(b"\n")
    assert (first, rest) == (b"c", b"")
    assert re.search(rb"run_[0-9a-f]{32}.*\b3\b", line)


@pytest.mark.parametrize(
    ("args", "code"),
    [(["status"], 1), (["run", "--", "true"], 125), (["runs"], 1), (["delete", "run-1"], 1)],
    ids=["status", "run", "runs", "delete"],
)
def test_a_stopped_platform(args: list[str], code: int, cli: InProcess) -> None:
    with Platform() as platform:
        env: Env = {"BUS_AI_API_URL": platform.url, "BUS_AI_TOKEN": platform.token()}
    result = cli("--timeout", "250ms", *args, env=env)
    assert (result.code, result.out) == (code, b"")
    assert str(env["BUS_AI_API_URL"]) in result.error
    assert not result.spoken.advises


def test_another_account_sees_and_deletes_nothing(cli: InProcess, platform: Platform) -> None:
    run_id = cli("run", "--", "true", at=platform).document["run_id"]
    other = ("--token-file", str(platform.config_dir / "auth" / "other-token"))
    assert cli(*other, "runs", at=platform).document == {"items": []}
    result = cli(*other, "delete", run_id, at=platform)
    check_failure(result, 1, "403", "forbidden", "belongs to another account", "DELETE")
    assert cli("delete", run_id, at=platform).code == 0


def test_a_provider_without_a_list_of_runs(cli: InProcess) -> None:
    with Platform(prefix="CAP/v1", runs_in_status=True) as platform:
        assert cli("-q", "run", "--", "true", at=platform)[:3] == (0, b"", b"")
        items = cli("runs", at=platform).document["items"]
        assert [item["state"] for item in items] == ["exited"]
        header = cli("runs", "-f", "tsv", at=platform).out.splitlines()[0]
    assert header == b"run_id\tstate\texit_code\tduration_ms\timage\tstarted_at\tcommand"


# --- CONTRACT.md and the map of tests/README.md ---------------------------------------------------


def promises(text: str) -> set[str]:
    """The numbers in a text, "6.5 to 6.7" and "6.5-6.7" written out."""
    found = set()
    for section, first, last in re.findall(r"\b([1-6])\.(\d+)\b(?:(?: to |-)\d\.(\d+))?", text):
        found |= {f"{section}.{number}" for number in range(int(first), int(last or first) + 1)}
    return found


def test_each_promise_is_cited_and_found_where_the_map_says() -> None:
    tests = ROOT / "tests"
    contract = (tests / "CONTRACT.md").read_text("utf-8")
    made = set(re.findall(r"^- ([1-6]\.\d+) ", contract, re.MULTILINE))
    cited = {}
    for path in tests.glob("test_*.py"):
        text = " ".join(path.read_text("utf-8").split())
        head = ast.get_docstring(ast.parse(path.read_bytes())) or ""
        after = re.findall(r"romises? ((?:(?:, | and | to |-)?[1-6]\.\d+)+)", text)
        cited[path.name] = promises(" ".join([head, *after]))
    assert set().union(*cited.values()) == made
    readme = (tests / "README.md").read_text("utf-8")
    mapped = dict(re.findall(r"^\| `(test_\w+\.py)` \|(.*)\|$", readme, re.MULTILINE))
    assert mapped.keys() == cited.keys()
    for name, row in mapped.items():
        assert promises(row) <= cited[name], name
