# SPDX-License-Identifier: MIT
"""What a terminal shows, on a real pseudo-terminal: promises 3.8, 3.13, 3.15, 3.18, 3.22 and 6.9.

A small emulator knows `\\r`, `\\n` and "erase to the end of the line"; all else that could drive a
terminal is a failure.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest

from hostile import Api, Connection, Hostile, Script, answer, held, message, silent
from support import (
    BODIES,
    LIMIT,
    Env,
    InProcess,
    Program,
    Terminal,
    api_commands,
    as_json,
    check_each,
    fill,
    second_tier,
    spoken,
    words,
)

Words = tuple[str, ...]
Scene = Callable[[Program], None]
RESULT = {"run_id": "run-1", "exit_code": 0, "stdout": "OK\n", "stderr": "", "duration_ms": 7}
DOCUMENT = json.dumps(RESULT).encode()
CLOSING = "bus-containers: run run-1 ended with exit code 0 after 7 ms"
RUN = ("run", "--", "sleep", "60")
LINE = "1 s of 30 min  codex: sleep 60"
XTERM: Env = {"TERM": "xterm"}


class Screen:
    """What is on a terminal after these bytes, and all it showed on the way."""

    def __init__(self, shown: bytes) -> None:
        self.rows = [""]
        self.drawn: list[str] = []
        column = 0
        for part in re.split(r"(\r|\n|\x1b\[K)", shown.decode("utf-8")):
            row = self.rows[-1]
            if part == "\r":
                column = 0
            elif part == "\n":
                self.rows.append("")
                column = 0
            elif part == "\x1b[K":
                self.rows[-1] = row[:column]
            elif part:
                assert part.replace("\t", "").isprintable(), repr(part)
                self.rows[-1] = row[:column] + part + row[column + len(part) :]
                column += len(part)
                self.drawn.append(self.rows[-1])


SCENES: dict[str, Scene] = {}


def scene(check: Scene) -> Scene:
    """Let this be done side by side with all that mostly waits for a clock."""
    SCENES[check.__name__] = check
    return check


def test_scenes(program: Program) -> None:
    """All the scenes below: the first second of something in progress takes a second."""
    check_each(lambda name: SCENES[name](program), [*SCENES], workers=len(SCENES))


def at_first(line: str) -> str:
    """A line in place as it is in its first second, which a busy machine may miss."""
    return re.sub("^[2-9] s", "1 s", line)


@contextmanager
def in_progress(
    program: Program, *args: str, line: str = LINE, columns: int = 80, body: bytes = DOCUMENT,
    **popen: object,
) -> Iterator[tuple[Terminal, subprocess.Popen[bytes], threading.Event]]:  # fmt: skip
    """A call whose line is on the terminal, and which is answered after the event."""
    release = threading.Event()

    def status(connection: Connection) -> None:
        connection.read_request()
        state = b"ready" if release.is_set() else b"starting"
        connection.send(message(b'{"items":[{"id":"runner","state":"%s"}]}' % state))

    script = status if "status" in args else held(release, message(body))
    with Terminal(columns) as terminal, Hostile(script) as server:
        if "stdout" in popen:
            popen["stdout"] = terminal.end
        with program.start(*args, at=server, env=XTERM, stderr=terminal.end, **popen) as process:
            try:
                terminal.release()
                terminal.read_until(lambda shown: line[1:].encode() in shown)
                yield terminal, process, release
            finally:
                process.kill()  # or a failure would wait for its end
                release.set()


def watched(program: Program, *args: str, **options: Any) -> Screen:
    """All that the terminal shows of a call that ends well."""
    with in_progress(program, *args, **options) as (terminal, process, release):
        release.set()
        shown = terminal.read_all()
        out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert out or "stdout" in options
    return Screen(shown)


# --- what is in progress ----------------------------------------------------------------------


class Shown(NamedTuple):
    """A command line, and the line about it after a second."""

    args: Words
    line: str
    columns: int = 80


IMAGE = ("run", "--image", "registry.example/image:tag", "--", "sh", "-c", "x" * 200)
SHOWN = {
    "limits": Shown(("run", "--profile", "agent", "--timeout-seconds", "90", "make", "test"),
                    "1 s of 90 s  agent: make test"),
    "timeout": Shown(("--timeout", "45s", *RUN), "1 s of 45 s  codex: sleep 60"),
    "no-limit": Shown(("--timeout", "0", *RUN), "1 s  codex: sleep 60"),
    "narrow": Shown(IMAGE, "1 s of 30 min  registry.example/image:t", 40),
    "unknown-size": Shown(IMAGE, f"1 s of 30 min  registry.example/image:tag: sh -c {'x' * 30}", 0),
    "odd": Shown(("run", "\u4f60\u200ba\x1b[2J\x07\x9b\r\n\tb\x7f"),
                 "1 s of 30 min  codex: \\u4f60\\u200ba\\x1b[2J\\x07\\x9b\\r\\n\\tb\\x7f"),
    "color": Shown(("--color", "always", "-f", "tsv", *RUN), LINE),
    "wait": Shown(("status", "--wait", "50s"), "1 s of 50 s  waiting for the platform"),
}  # fmt: skip


def check_shown(name: str, program: Program) -> None:
    """Until there is a result, the line is there; then nothing is left of it."""
    case = SHOWN[name]
    screen = watched(program, *case.args, line=case.line, columns=case.columns)
    assert screen.rows == [""]
    assert {at_first(line) for line in screen.drawn} == {case.line}
    assert all(len(line) < (case.columns or 80) for line in screen.drawn)


@scene
def what_is_in_progress_is_shown_in_place(program: Program) -> None:
    """Promise 3.22: a run, and a wait."""
    check_each(lambda name: check_shown(name, program), ["narrow", "wait"])


@second_tier
def test_more_of_what_is_in_progress(program: Program) -> None:
    check_each(lambda name: check_shown(name, program), [*SHOWN], workers=8)


HIDDEN: dict[str, tuple[Words, Env]] = {
    "pipe": (("--color", "always", *RUN), {}),
    "quiet": (("--quiet", *RUN), XTERM),
    "errors-as-json": (("--error-format", "json", *RUN), XTERM),
    "dumb": (("--color", "always", *RUN), {"TERM": "dumb"}),
}


def await_requests(server: Hostile, count: int) -> None:
    end = time.monotonic() + LIMIT
    while len(server.requests) < count and time.monotonic() < end:
        server.ending.wait(0.01)
    assert len(server.requests) == count


@scene
def where_nothing_is_shown_and_how_often_something_is(program: Program) -> None:
    """Promise 3.22: those that show nothing began before one that has shown its second second."""
    release = threading.Event()
    with ExitStack() as stack:
        server = stack.enter_context(Hostile(held(release, message(DOCUMENT))))

        def start(args: Words, env: Env) -> tuple[Terminal, subprocess.Popen[bytes]]:
            terminal = stack.enter_context(Terminal())
            err = terminal.end if env else subprocess.PIPE
            process = stack.enter_context(program.start(*args, at=server, env=env, stderr=err))
            stack.callback(process.kill)
            terminal.release()
            return terminal, process

        hidden = {name: start(*case) for name, case in HIDDEN.items()}
        await_requests(server, len(HIDDEN))
        witness, process = start(RUN, XTERM)
        witness.read_until(lambda shown: shown.count(b"sleep 60") > 1)
        release.set()
        witness.read_all()
        drawn = Screen(witness.shown).drawn
        assert len({*drawn}) == len(drawn) > 1
        assert {at_first(line) for line in drawn} == {LINE}
        assert process.wait(LIMIT) == 0
        for name, (terminal, process) in hidden.items():
            shown = terminal.read_all()
            out, err = process.communicate(timeout=LIMIT)
            printed = b"" if name == "quiet" else as_json(RESULT)
            assert (process.returncode, out, shown, err or b"") == (0, printed, b"", b""), name


# A process for which five minutes pass in less than a second, once it has been told. Connecting
# takes its usual time, as that is limited.
FAST = """
import runpy, signal, sys, time
clock, told = time.monotonic, []
signal.signal(signal.SIGUSR1, lambda *_: told.append(clock()))
time.monotonic = lambda: clock() + (500 * (clock() - told[0]) if told else 0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@scene
def a_line_every_five_minutes_where_there_is_no_terminal(program: Program) -> None:
    """Promise 3.22, so that CI does not end the job; those that are silent were told before."""
    fast = Program([sys.executable, "-c", FAST, program.command[-1]], program.home)
    release = threading.Event()
    with ExitStack() as stack:
        server = stack.enter_context(Hostile(held(release, message(DOCUMENT))))

        def start(*options: str) -> subprocess.Popen[bytes]:
            process = fast.start("--timeout", "0", *options, *RUN, at=server)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        quiet = [start("--quiet"), start("--error-format", "json")]
        loud = start()
        await_requests(server, 3)
        for process in (*quiet, loud):
            process.send_signal(signal.SIGUSR1)
        assert loud.stderr is not None
        patience = threading.Timer(LIMIT, loud.kill)
        patience.start()
        stack.callback(patience.cancel)
        lines = "".join(loud.stderr.readline().decode() for _ in range(2))
        said = re.fullmatch(
            r"(?:bus-containers: still waiting after ([0-9]+) min  codex: sleep 60\n){2}", lines
        )
        assert said, lines
        assert int(said[1]) >= 10
        release.set()
        assert loud.communicate(timeout=LIMIT)[0] == as_json(RESULT)
        for process, printed in zip(quiet, (b"", as_json(RESULT))):
            assert process.communicate(timeout=LIMIT) == (printed, b"")


@scene
def progress_and_result_on_one_terminal(program: Program) -> None:
    """Promise 3.15: as a person sees it, nothing of the line in place is left beside the result."""
    body = json.dumps({**RESULT, "stdout": "OK"}).encode()
    screen = watched(program, "-f", "text", *RUN, body=body, stdout=None)
    assert screen.rows == ["OK", CLOSING, ""]


@scene
def notes_amid_a_run_stand_on_lines_of_their_own(program: Program) -> None:
    body = DOCUMENT.replace(b"OK", b"\xff")
    rows = watched(program, "-v", *RUN, columns=200, body=body).rows
    assert rows.pop() == ""
    assert [row for row in rows if not row.startswith("bus-containers: ")] == []
    assert [row for row in rows if "sleep 60" in row] == []
    assert sum("U+FFFD" in row for row in rows) == 1
    assert sum("bytes" in row for row in rows) == 1


@pytest.mark.parametrize(
    ("stdout", "stderr", "shown"),
    [
        ("OK", "", f"OK\n{CLOSING}\n"),
        ("OK\n", "", f"OK\n{CLOSING}\n"),
        ("", "", f"{CLOSING}\n"),
        ("OK\n", "bad", f"OK\nbad\n{CLOSING}\n"),
        ("OK", "bad\n", f"OKbad\n{CLOSING}\n"),
    ],
)
def test_the_closing_line_has_a_line_of_its_own(
    stdout: str, stderr: str, shown: str, cli: InProcess, api: Api
) -> None:
    """Promise 3.15, on a terminal; into a file the output goes as it is."""
    api.answers({**RESULT, "stdout": stdout, "stderr": stderr})
    with Terminal() as terminal:
        cli("-f", "text", *RUN, at=api, stdout=terminal.end, stderr=terminal.end)
        assert terminal.read_all().decode() == shown
    with Terminal() as terminal:
        assert cli("-f", "text", *RUN, at=api, stderr=terminal.end).out == stdout.encode()
        assert terminal.read_all().decode().startswith(stderr + "\n" * (stderr == "bad") + CLOSING)


@scene
def an_interrupt_takes_the_line_away(program: Program) -> None:
    with in_progress(program, "--no-color", *RUN, columns=300) as (terminal, process, _):
        process.send_signal(signal.SIGINT)
        terminal.read_all()
    [line, end] = Screen(terminal.shown).rows
    assert end == ""
    assert line.startswith("bus-containers: interrupted; the run may still be executing")


# --- terminals and pipes that take nothing ----------------------------------------------------


@scene
def a_terminal_that_hangs_up_ends_no_run(program: Program) -> None:
    with in_progress(program, *RUN, start_new_session=True) as (terminal, process, release):
        os.close(terminal.controller)
        terminal.controller = os.open(os.devnull, os.O_RDONLY)
        assert not release.wait(1.1)  # until the next line would be drawn
        release.set()
        out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (0, as_json(RESULT))


def late(seconds: float, data: bytes) -> Script:
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.server.ending.wait(seconds)
        connection.send(data)

    return script


HEADERS = [f"X-{number}: {'y' * 60_000}" for number in range(80)]
# Whether standard error is a terminal, what is asked and answered, and the exit code. Answers and
# signals come when a terminal has been tried with a first line.
STUCK: dict[str, tuple[bool, Words, Script, int]] = {
    "result": (True, RUN, late(1.4, message(DOCUMENT)), 0),
    "signal": (True, RUN, silent(), -signal.SIGTERM),
    "headers": (False, ("--trace", *RUN), answer(DOCUMENT, "200 OK", *HEADERS), 0),
    "deadline": (False, ("--trace", "--timeout", "1s", *RUN), silent(), 125),
}


@scene
def nothing_waits_for_a_standard_error_that_nobody_reads(program: Program) -> None:
    """Promise 6.9: neither a result, nor the deadline, nor a signal."""

    def check(name: str) -> None:
        is_terminal, args, script, code = STUCK[name]
        with ExitStack() as stack:
            server = stack.enter_context(Hostile(script))
            if is_terminal:
                err = stack.enter_context(Terminal()).end
            else:
                reader, err = os.pipe()
                stack.callback(os.close, reader)
                stack.callback(os.close, err)
            fill(err)
            process = stack.enter_context(program.start(*args, at=server, env=XTERM, stderr=err))
            stack.callback(process.kill)
            if code == -signal.SIGTERM:
                assert server.reached.wait(LIMIT)
                server.ending.wait(1.3)
                process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (code, as_json(RESULT) if code == 0 else b"")

    check_each(check, [*STUCK], workers=len(STUCK))


# --- the same bytes with and without a terminal -----------------------------------------------


@pytest.mark.parametrize("form", ["json", "text", "tsv", "help"])
def test_a_result_on_a_terminal(form: str, cli: InProcess, api: Api) -> None:
    """Promise 3.13: the same bytes on a narrow terminal as in a file, without colour."""
    env: Env = {"TERM": "xterm-256color", "FORCE_COLOR": "1", "COLORTERM": "truecolor"}
    lines = [("-f", form, *words(name)) for name in api_commands()]
    if form == "help":
        lines = [("help",), ("run", "--help"), ("--version",)]
    for line in lines:
        args = ("--color", "always", *line)
        piped = cli(*args, at=api)
        with Terminal(20) as terminal:
            result = cli(*args, at=api, env=env, stdout=terminal.end)
            shown = terminal.read_all()
        assert (result.code, shown, result.err) == (0, piped.out, piped.err)
        assert shown
        assert b"\x1b" not in shown


# --- colour -----------------------------------------------------------------------------------

# Options and variables, whether an error is coloured on a terminal, and whether in a pipe.
COLOURS: dict[str, tuple[str, Env, bool, bool]] = {
    "auto": ("--color auto", {}, True, False),
    "always": ("--color always", {}, True, True),
    "never": ("--color never", {}, False, False),
    "no-color": ("--no-color", {}, False, False),
    "NO_COLOR": ("", {"NO_COLOR": "0"}, False, False),
    "NO_COLOR-empty": ("--quiet", {"NO_COLOR": ""}, True, False),
    "NO_COLOR-always": ("--color always", {"NO_COLOR": "1"}, True, True),
    "dumb": ("", {"TERM": "dumb"}, False, False),
    "dumb-always": ("--color always", {"TERM": "dumb"}, True, True),
}


@pytest.mark.parametrize("name", COLOURS)
def test_the_colour_of_an_error(name: str, cli: InProcess, api: Api) -> None:
    """Promise 3.8."""
    api.answers({"error": {"type": "forbidden", "message": "not yours"}}, status="403 Forbidden")
    options, more, is_on_terminal, is_in_pipe = COLOURS[name]
    args, env = (*options.split(), "status"), {**XTERM, **more}
    piped = cli(*args, at=api, env=env).err
    with Terminal() as terminal:
        assert cli(*args, at=api, env=env, stderr=terminal.end)[:2] == (1, b"")
        shown = terminal.read_all()
    plain = cli("--color", "never", "status", at=api).err
    assert b"\x1b" not in plain
    coloured = plain.replace(b": ", b": \x1b[31m", 1).replace(b"\n", b"\x1b[0m\n")
    assert shown == (coloured if is_on_terminal else plain)
    assert piped == (coloured if is_in_pipe else plain)


def test_warnings_and_notes_have_no_colour(cli: InProcess, api: Api) -> None:
    api.answers(DOCUMENT.replace(b"OK", b"\xff"))
    result = cli("--color", "always", "-vv", "-f", "text", *RUN, at=api)
    assert result.spoken.warnings
    assert b"> POST" in result.err
    assert CLOSING in result.message
    assert b"\x1b" not in result.err


# --- text of a server cannot drive the terminal -----------------------------------------------

CONTROLS = "\x1b]0;owned\x07\x1b[2J\x9b2J\x90q\x9c\x7f\x08\x0b\x0e\x85\x00\r\nspoofed: all is well"
FORMATS = "\u202e\u2066\u200b\u200d\u2028\u2029\ufeff\u061c\U000e0041"
EVIL = CONTROLS + FORMATS
VISIBLE = ("\\x1b", "\\x9b", "\\x7f", "\\x07", "\\x08", "\\x85", "\\u202e", "\\u2066", "\\u200b")
HEADER = "\x1b[2J\x9b\x07"
USAGE = {"used": 1, "limit": 1, "window": EVIL, "meter_event_name": EVIL}


def denial(status: str = "400 No", **fields: object) -> bytes:
    return message(json.dumps({"error": fields}).encode(), status)


# What is called, and the answer that would drive a terminal.
DRIVEN: dict[str, tuple[Words, bytes]] = {
    **{
        name: (("status",), denial(**{name: EVIL}))
        for name in ("message", "type", "action", "command")
    },
    "string": (("status",), message(json.dumps({"error": EVIL}).encode(), "500 No")),
    "quota": (RUN, denial("402 No", usage=USAGE, recommended_plan=EVIL)),
    "title": (("status",), message(f"<html><title>{EVIL}</title>".encode(), "500 No")),
    "location": (("status",), message(b"", "302 No", f"Location: http://x/{HEADER}")),
    "header": (("--trace", "status"), message(BODIES["status"], "200 OK", f"X: {HEADER}")),
    "reason": (("--trace", "status"), message(b"", f"400 O{HEADER}K")),
    "exit-code": (RUN, message(json.dumps({**RESULT, "exit_code": EVIL}).encode())),
}


@pytest.mark.parametrize("name", DRIVEN)
def test_text_of_a_server_is_made_visible(name: str, cli: InProcess, api: Api) -> None:
    """Promise 3.18: control and format characters, line separators; tables: test_formats.py."""
    args, data = DRIVEN[name]
    shown = spoken(cli("--color", "never", *args, at=api.sends(data), env=XTERM).err).text
    assert shown.replace("\n", "").isprintable()
    assert not re.search("(?m)^spoofed", shown)
    if name != "title":  # which need not be shown at all
        assert "\\x1b" in shown or "\\u001b" in shown
    if name in ("message", "type", "action", "command", "string"):
        for text in VISIBLE:
            assert text in shown
