# SPDX-License-Identifier: MIT
"""What the README shows, as a newcomer types it: the program under the stand-in platform.

The README's transcripts are read from it and run. What differs each time (ids, ports, times) is
made alike on both sides, and nothing else.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bus_containers
from hostile import Hostile, reset
from local_platform import Platform
from support import LIMIT, NOWHERE, ROOT, Env, InProcess, Program, as_json

README = (ROOT / "README.md").read_text("utf-8")


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


def fails(shown: Shown) -> bool:
    return any(word in shown.output for word in TROUBLE)


def test_transcripts_of_success(program: Program, platform: Platform, folder: Path) -> None:
    """One shell for each block, in which `bus-containers` is the program, and no other run."""
    good = [block for block in BLOCKS if not any(map(fails, block))]
    commands = "\n".join(shown.command for block in good for shown in block)
    for name in ("status", "run", "runs", "delete"):
        assert re.search(rf"bus-containers (\S+ )*?{name}\b", commands), name
    assert "-- make test" not in README  # nothing of this machine reaches a container
    start = f'bus_containers() {{ {shlex.join(program.command)} "$@"; }}\nid=run_1\n'
    for block in good:
        platform.reset()
        lines = [start]
        for at, shown in enumerate(block):
            command = re.sub(r"run_[0-9a-f]{32}", '"$id"', shown.command)
            command = command.replace("bus-containers", "bus_containers")
            lines.append(f"{{ {command}\n}} >out.{at} 2>&1\n")
            lines.append(f"grep -o 'run_[0-9a-f]*' out.{at} >found && read -r id <found\n")
        env = program.env(BUS_AI_API_URL=platform.url, BUS_CONFIG_DIR=str(platform.config_dir))
        subprocess.run(["sh", "-c", "".join(lines)], env=env, cwd=folder, timeout=60)
        for at, shown in enumerate(block):
            output = (folder / f"out.{at}").read_text("utf-8")
            assert alike(output) == alike(shown.output), shown.command


def test_transcripts_of_failures(cli: InProcess, platform: Platform) -> None:
    for word in TROUBLE:
        [shown] = [shown for block in BLOCKS for shown in block if word in shown.output]
        at: Any = platform
        token = platform.token()
        env: Env = {"BUS_AI_API_URL": NOWHERE} if word == "not ready" else {}
        if word == "HTTP 401":
            token = platform.token(scope="container:read billing:read", expires_in=-10_801.0)
        platform.billing = "quota" if word == "HTTP 402" else None
        with Hostile(reset()) as server:
            if word == "connection was lost":
                at = server
            words = shlex.split(shown.command.partition(" >")[0])[1:]
            result = cli(*words, at=at, env={"BUS_AI_TOKEN": token, **env})
        assert alike(result.message) == alike(shown.output), shown.command
        assert "HTTP" not in word or result.code == 125


def test_the_first_command_of_the_readme(program: Program) -> None:
    [line] = re.findall(r"(?m)^    python3 (tests/local_platform\.py .*)$", README)[:1]
    words = shlex.split(line)
    assert words[1:3] == ["python3", "bus_containers.py"]
    own, program.command = program.command, [sys.executable, str(ROOT / words[0])]
    result = program(*own, *words[3:])
    assert (result.code, result.err) == (0, b"")
    assert result.out == as_json(result.document)
    assert (result.document["exit_code"], result.document["stdout"]) == (0, "OK")


def test_the_library_example_of_the_readme(platform: Platform, program: Program) -> None:
    [block] = re.findall(r"(?m)^    import bus_containers\n(?:(?:    .*)?\n)+", README)
    program.command = [sys.executable, "-W", "error", "-c", inspect.cleandoc(block)]
    program.environ["PYTHONPATH"] = str(Path(inspect.getfile(bus_containers)).parent)
    for url, out in ((platform.url, b"0 "), ("not a URL", b"BUS_AI_API_URL")):
        result = program(at=platform, env={"BUS_AI_API_URL": url})
        assert (result.code, result.err) == (0, b""), url
        assert out in result.out


# Words, exit code and streams of a run in text, which is as docker gives it.
RUNS: list[tuple[list[str], int, bytes, bytes]] = [
    (["sh", "-c", r"printf 'a\r\nb'; echo c >&2; exit 37"], 37, b"a\r\nb", b"c\n"),
    (["sh", "-c", "kill -9 $$"], 137, b"", b""),
    (["no-such-command"], 127, b"", b"no-such-command: command not found\n"),
]


def test_a_run_in_text(cli: InProcess, platform: Platform) -> None:
    for words, code, out, err in RUNS:
        result = cli("run", "-f", "text", "--", *words, at=platform)
        assert (result.code, result.out) == (code, out), words
        line = rb"bus-containers: run run_[0-9a-f]{32} ended with exit code %d after [0-9.]+ m?s\n"
        assert re.fullmatch(rb"(.*\n)?%s" % err + line % code, result.err), result.err


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
    assert mapped.keys() == cited.keys() >= {*re.findall(r"\btest_\w+\.py\b", README)}
    for name, row in mapped.items():
        assert promises(row) <= cited[name], name


def test_a_target_that_is_not_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", f"--target={tmp_path / 'none.pyz'}", "--co", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    said = (done.stdout + done.stderr).strip().splitlines()
    assert (done.returncode, len(said)) == (4, 1)
    assert said[0].endswith("does not exist: build it first with `python3 zipapp/build.py`")
