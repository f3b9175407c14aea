# SPDX-License-Identifier: MIT
"""What the README promises, as a newcomer types it: the program under the stand-in platform."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bus_containers
import local_platform
from conftest import Program, Result
from hostile import spoken

PLATFORM = str(Path(local_platform.__file__).resolve())
RUN_KEYS = ["run_id", "owner_identity_id", "runner_name", "image", "args", "exit_code"]
RUN_KEYS += ["stdout", "stderr", "duration_ms", "runtime"]


@pytest.fixture
def newcomer(program: Program, monkeypatch: pytest.MonkeyPatch) -> Program:
    """`python3 tests/local_platform.py`, with whatever comes after it, in a folder of its own."""
    monkeypatch.chdir(program.home)
    own = program.command
    program.command = [sys.executable, PLATFORM]
    program.environ["CLI"] = shlex.join(own)
    return program


@pytest.fixture(scope="module")
def platform() -> Iterator[local_platform.Platform]:
    with local_platform.Platform() as running:
        yield running


def shell(newcomer: Program, script: str, *options: str) -> Result:
    """Run a shell script under the platform; `bus-containers` in it is the program."""
    start = f'set -eu; bus_containers() {{ {newcomer.environ["CLI"]} "$@"; }}\n'
    return newcomer(
        *options, "sh", "-c", start + script.replace("bus-containers", "bus_containers")
    )


def as_printed(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def test_the_first_command_of_the_readme(newcomer: Program, command: list[str]) -> None:
    result = newcomer(*command, "run", "--", "sh", "-c", "printf OK")
    assert (result.code, result.err) == (0, b"")
    document = json.loads(result.out)
    assert result.out == as_printed(document)
    assert list(document) == RUN_KEYS
    assert re.fullmatch("run_[0-9a-f]{32}", document.pop("run_id"))
    assert re.fullmatch("[0-9a-f-]{36}", document.pop("owner_identity_id"))
    assert 0 <= document.pop("duration_ms") < 60_000
    assert document == {
        "runner_name": "local-runner",
        "image": "localhost/codex",
        "args": ["sh", "-c", "printf OK"],
        "exit_code": 0,
        "stdout": "OK",
        "stderr": "",
        "runtime": "process",
    }


def test_the_documented_commands(newcomer: Program) -> None:
    result = shell(
        newcomer,
        """
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
    *texts, rest = result.out.split(b"\0")
    assert rest == b""
    status, run, runs, deleted, again, none = texts
    assert as_printed(json.loads(status)) == status
    assert json.loads(status)["items"][0]["state"] == "ready"
    assert json.loads(run)["stdout"] == "OK"
    (item,) = json.loads(runs)["items"]
    assert item["run_id"] == json.loads(run)["run_id"]
    assert (item["state"], item["exit_code"]) == ("exited", 0)
    assert deleted == as_printed(
        {
            "deleted": True,
            "run_id": item["run_id"],
            "owner_identity_id": item["owner_identity_id"],
        }
    )
    assert again == b""
    assert none == as_printed({"items": []})
    told = spoken(result.err)
    assert len(told.errors) == 1
    for word in ("404", "not_found", "no such run", item["run_id"], "DELETE"):
        assert word in told.text


@pytest.mark.parametrize(
    ("words", "pattern", "code"),
    [
        ("printf OK", '"stdout": "OK"', 0),
        ("printf OK", '"exit_code": 0', 0),
        ("printf no >&2; exit 37", '"exit_code": 37', 37),
        ("printf no >&2; exit 37", '"stderr": "no"', 37),
    ],
)
def test_grep_finds_it(words: str, pattern: str, code: int, newcomer: Program) -> None:
    script = f"""
        bus-containers run -- sh -c {shlex.quote(words)} >"$BUS_CONFIG_DIR/out" && code=0 || code=$?
        grep -c {shlex.quote(pattern)} "$BUS_CONFIG_DIR/out"
        exit $code
    """
    result = shell(newcomer, script)
    assert (result.code, result.out, result.err) == (code, b"1\n", b"")


def test_a_pipe_into_grep(newcomer: Program) -> None:
    script = """bus-containers run -- sh -c 'printf OK' | grep '"stdout": "OK"'"""
    result = shell(newcomer, script)
    assert (result.code, result.out, result.err) == (0, b'  "stdout": "OK",\n', b"")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["sh", "-c", "exit 37"], 37),
        (["sh", "-c", "exit 255"], 255),
        (["sh", "-c", "kill -9 $$"], 137),
        (["true"], 0),
        (["false"], 1),
        (["no-such-command-anywhere"], 127),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("format_", ["json", "text"])
def test_the_exit_code_is_the_commands(
    words: list[str], code: int, format_: str, program: Program, platform: local_platform.Platform
) -> None:
    program.environ.update(BUS_AI_API_URL=platform.url, BUS_AI_TOKEN=platform.token())
    assert program("--format", format_, "run", "--", *words).code == code


def test_a_run_over_its_limit(newcomer: Program, command: list[str]) -> None:
    result = newcomer(*command, "run", "--timeout-seconds", "1", "--", "sleep", "60")
    assert result.code == 124
    assert json.loads(result.out)["exit_code"] == 124
    assert result.seconds < 20


def test_text_is_as_docker_gives_it(newcomer: Program, command: list[str]) -> None:
    result = newcomer(
        *command, "run", "-f", "text", "--", "sh", "-c", "printf 'a\\r\\nb'; echo c >&2; exit 3"
    )
    assert (result.code, result.out) == (3, b"a\r\nb")
    first, line, rest = result.err.split(b"\n")
    assert (first, rest) == (b"c", b"")
    assert re.search(rb"run_[0-9a-f]{32}.*\b3\b", line)


@pytest.mark.parametrize(
    ("args", "code"),
    [(["status"], 1), (["run", "--", "true"], 125), (["runs"], 1), (["delete", "run-1"], 1)],
    ids=["status", "run", "runs", "delete"],
)
def test_a_stopped_platform(args: list[str], code: int, program: Program) -> None:
    with local_platform.Platform() as platform:
        url, token = platform.url, platform.token()
    program.environ.update(BUS_AI_API_URL=url, BUS_AI_TOKEN=token)
    result = program("--timeout", "250ms", *args)
    told = spoken(result.err)
    assert (result.code, result.out) == (code, b"")
    assert len(told.errors) == 1
    assert url in told.text
    assert not told.advises


def test_another_account_sees_and_deletes_nothing(newcomer: Program) -> None:
    result = shell(
        newcomer,
        """
        id=$(bus-containers -f tsv run -- true | sed -n '2s/\\t.*//p')
        other="$BUS_CONFIG_DIR/auth/other-token"
        bus-containers --token-file "$other" runs
        bus-containers --token-file "$other" delete "$id" && code=0 || code=$?
        bus-containers delete "$id" >"$BUS_CONFIG_DIR/deleted"
        exit $code
        """,
    )
    assert result.code == 1
    assert json.loads(result.out) == {"items": []}
    told = spoken(result.err)
    assert len(told.errors) == 1
    for word in ("403", "forbidden", "belongs to another account", "DELETE"):
        assert word in told.text


@pytest.mark.parametrize("billing", ["required", "quota"])
def test_billing(billing: str, newcomer: Program, command: list[str]) -> None:
    result = newcomer("--billing", billing, *command, "run", "--", "true")
    told = spoken(result.err)
    assert (result.code, result.out) == (125, b"")
    assert "402" in told.text
    assert "bus billing setup" in told.text
    assert not told.advises


def test_a_provider_without_a_list_of_runs(newcomer: Program) -> None:
    script = "bus-containers -q run -- true; bus-containers runs; bus-containers runs -f tsv"
    result = shell(newcomer, script, "--runs-in-status", "--prefix", "CAP/v1")
    assert (result.code, result.err) == (0, b"")
    document, end = json.JSONDecoder().raw_decode(result.out.decode())
    states = [item["state"] for item in document["items"]]
    assert states == ["ready", "exited"]
    assert result.out.decode()[end:].startswith("\nrun_id\tstate\texit_code\tduration_ms\timage\n")


VENDORED = """
import os
from othername._vendor.bus_containers import BusContainersError, Client
client = Client(os.environ["BUS_AI_API_URL"], os.environ["TOKEN"])
print(client.run(["sh", "-c", "printf OK"])["stdout"], Client.__module__)
try:
    client.delete("run_none")
except BusContainersError as error:
    print(type(error).__name__, error.status)
"""


def test_a_vendored_copy(
    tmp_path: Path, program: Program, platform: local_platform.Platform
) -> None:
    copy = tmp_path / "othername" / "_vendor" / "bus_containers.py"
    copy.parent.mkdir(parents=True)
    copy.write_text(inspect.getsource(bus_containers), "utf-8")
    environ = program.env(BUS_AI_API_URL=platform.url, TOKEN=platform.token())
    words = [sys.executable, "-W", "error", "-c", VENDORED]
    result = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, timeout=60)
    assert result.stderr == b""
    assert result.stdout.decode().splitlines() == [
        "OK othername._vendor.bus_containers",
        "ApiError 404",
    ]
    assert not [path for path in os.listdir(tmp_path) if path not in ("home", "othername")]
