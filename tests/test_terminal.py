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
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

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

    @property
    def text(self) -> str:
        return "\n".join(self.rows)


SCENES: dict[str, Scene] = {}


def scene(check: Scene) -> Scene:
    """Let this be done side by side with all that mostly waits for a clock."""
    SCENES[check.__name__] = check
    return check


def test_scenes(program: Program) -> None:
    """All the scenes below: the first second of something in progress takes a second."""
    check_each(lambda name: SCENES[name](program), [*SCENES], workers=len(SCENES))


def shows(line: str) -> Callable[[bytes], bool]:
    """A condition for `Terminal.read_until`: a line in place, whatever its second."""
    return lambda shown: line[1:].encode() in shown


def at_first(line: str) -> str:
    """A line in place as it is in its first second, which a busy machine may miss."""
    return re.sub("^[2-9] s", "1 s", line)


# --- what is in progress ----------------------------------------------------------------------


class Shown(NamedTuple):
    """A command line, and the line about it after a second."""

    args: Words
    line: str
    columns: int = 80


IMAGE = ("run", "--image", "registry.example/image:tag", "--", "sh", "-c", "x" * 200)
SHOWN = {
    "default": Shown(RUN, LINE),
    "profile": Shown(("run", "--profile", "agent", "--timeout-seconds", "90", "make", "test"),
                     "1 s of 90 s  agent: make test"),
    "image": Shown(("run", "--image", "alpine:3", "ls", "/"), "1 s of 30 min  alpine:3: ls /"),
    "timeout": Shown(("--timeout", "45s", *RUN), "1 s of 45 s  codex: sleep 60"),
    "no-limit": Shown(("--timeout", "0", *RUN), "1 s  codex: sleep 60"),
    "40-columns": Shown(IMAGE, "1 s of 30 min  registry.example/image:t", 40),
    "10-columns": Shown(IMAGE, "1 s of 30", 10),
    "unknown-size": Shown(IMAGE, f"1 s of 30 min  registry.example/image:tag: sh -c {'x' * 30}", 0),
    "wide": Shown(("run", "\u4f60" * 40), "1 s of 30 min  codex: \\u4f60\\u4f60\\u4f6", 40),
    "combining": Shown(("run", "e\u0301\u200b"), "1 s of 30 min  codex: e\\u0301\\u200b"),
    "control": Shown(("run", "a\x1b[2J\x07\x9b\r\n\tb\x7f"),
                     "1 s of 30 min  codex: a\\x1b[2J\\x07\\x9b\\r\\n\\tb\\x7f"),
    "color": Shown(("--color", "always", *RUN), LINE),
    "no-color": Shown(("--no-color", *RUN), LINE),
    "verbose-to-come": Shown(("-f", "tsv", *RUN), LINE),
    "wait": Shown(("status", "--wait", "50s"), "1 s of 50 s  waiting for the platform"),
}  # fmt: skip
assert len(SHOWN["unknown-size"].line) == 79


def check_shown(name: str, program: Program) -> None:
    """Until there is a result, the line is there; then nothing is left of it."""
    case = SHOWN[name]
    release = threading.Event()

    def status(connection: Connection) -> None:
        connection.read_request()
        state = "ready" if release.is_set() else "starting"
        connection.send(message(b'{"items":[{"id":"runner","state":"%s"}]}' % state.encode()))

    script = status if name == "wait" else held(release, message(DOCUMENT))
    with (
        Terminal(case.columns) as terminal,
        Hostile(script) as server,
        program.start(*case.args, at=server, env=XTERM, stderr=terminal.end) as process,
    ):
        terminal.release()
        terminal.read_until(shows(case.line))
        release.set()
        terminal.read_all()
        out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert out
    screen = Screen(terminal.shown)
    assert screen.text == ""
    assert {at_first(line) for line in screen.drawn} == {case.line}
    assert all(len(line) < (case.columns or 80) for line in screen.drawn)


@scene
def what_is_in_progress_is_shown_in_place(program: Program) -> None:
    """Promise 3.22: a run, and a wait."""
    check_each(lambda name: check_shown(name, program), ["default", "40-columns", "wait"])


@second_tier
def test_more_of_what_is_in_progress(program: Program) -> None:
    check_each(lambda name: check_shown(name, program), [*SHOWN], workers=8)


HIDDEN: dict[str, tuple[Words, Env]] = {
    "pipe": (RUN, {}),
    "pipe-color-always": (("--color", "always", *RUN), {}),
    "quiet": (("--quiet", *RUN), XTERM),
    "errors-as-json": (("--error-format", "json", *RUN), XTERM),
    "dumb": (RUN, {"TERM": "dumb"}),
    "dumb-color-always": (("--color", "always", *RUN), {"TERM": "dumb"}),
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


# A process for which five minutes pass in less than a second.
FAST = """
import runpy, sys, time
clock, start = time.monotonic, time.monotonic()
time.monotonic = lambda: start + (clock() - start) * 500
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@scene
def a_line_every_five_minutes_where_there_is_no_terminal(program: Program) -> None:
    """Promise 3.22, so that CI does not end the job; those that are silent began before."""
    fast = Program([sys.executable, "-c", FAST, program.command[-1]], program.home)
    release = threading.Event()
    with ExitStack() as stack:
        server = stack.enter_context(Hostile(held(release, message(DOCUMENT))))

        def start(*options: str) -> subprocess.Popen[bytes]:
            process = fast.start("--timeout", "0", *options, *RUN, at=server)
            return stack.enter_context(process)

        quiet = [start("--quiet"), start("--error-format", "json")]
        await_requests(server, len(quiet))
        loud = start()
        assert loud.stderr is not None
        for least in (5, 10):
            line = loud.stderr.readline().decode()
            said = re.fullmatch(
                r"bus-containers: still waiting after ([0-9]+) min  codex: sleep 60\n", line
            )
            assert said, line
            assert least <= int(said[1]) < 60
        release.set()
        assert loud.communicate(timeout=LIMIT)[0] == as_json(RESULT)
        for process, printed in zip(quiet, (b"", as_json(RESULT))):
            assert process.communicate(timeout=LIMIT) == (printed, b"")


@scene
def progress_and_result_on_one_terminal(program: Program) -> None:
    check_one_terminal("text-without-newline", program)


@second_tier
@pytest.mark.parametrize("form", ["json", "text"])
def test_progress_and_result_on_one_terminal(form: str, program: Program) -> None:
    check_one_terminal(form, program)


def check_one_terminal(form: str, program: Program) -> None:
    """Promise 3.15: as a person sees it, nothing of the line in place is left beside the result."""
    document = {**RESULT, "stdout": "OK"} if form == "text-without-newline" else RESULT
    expected = f"OK\n{CLOSING}\n" if "text" in form else as_json(RESULT).decode()
    release = threading.Event()
    script = held(release, message(json.dumps(document).encode()))
    with Terminal() as terminal, Hostile(script) as server:
        end = terminal.end
        args = ("-f", form.partition("-")[0], *RUN)
        with program.start(*args, at=server, env=XTERM, stdout=end, stderr=end):
            terminal.release()
            terminal.read_until(shows(LINE))
            release.set()
            terminal.read_all()
    assert Screen(terminal.shown).text == expected


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
    result = cli("-f", "text", *RUN, at=api)
    assert result.out == stdout.encode()


@scene
def notes_amid_a_run_stand_on_lines_of_their_own(program: Program) -> None:
    release = threading.Event()
    script = held(release, message(DOCUMENT.replace(b"OK", b"\xff")))
    with (
        Terminal(200) as terminal,
        Hostile(script) as server,
        program.start("-v", *RUN, at=server, env=XTERM, stderr=terminal.end) as process,
    ):
        terminal.release()
        terminal.read_until(shows(LINE))
        release.set()
        terminal.read_all()
        process.communicate(timeout=LIMIT)
    rows = Screen(terminal.shown).rows
    assert rows.pop() == ""
    assert [row for row in rows if not row.startswith("bus-containers: ")] == []
    assert [row for row in rows if "sleep 60" in row] == []
    assert sum("U+FFFD" in row for row in rows) == 1
    assert sum("bytes" in row for row in rows) == 1


@scene
def an_interrupt_takes_the_line_away(program: Program) -> None:
    with Terminal(300) as terminal, Hostile(silent()) as server:
        env: Env = {**XTERM, "NO_COLOR": "1"}
        with program.start(*RUN, at=server, env=env, stderr=terminal.end) as process:
            terminal.release()
            terminal.read_until(shows(LINE))
            process.send_signal(signal.SIGINT)
            terminal.read_all()
    [line, end] = Screen(terminal.shown).rows
    assert end == ""
    assert line.startswith("bus-containers: interrupted; the run may still be executing")


# --- terminals and pipes that take nothing ----------------------------------------------------


@scene
def a_terminal_that_hangs_up_ends_no_run(program: Program) -> None:
    release = threading.Event()
    with (
        Terminal() as terminal,
        Hostile(held(release, message(DOCUMENT))) as server,
        program.start(
            *RUN, at=server, env=XTERM, stderr=terminal.end, start_new_session=True
        ) as process,
    ):
        terminal.release()
        terminal.read_until(shows(LINE))
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
    "deadline": (True, ("--timeout", "1500ms", *RUN), silent(), 125),
    "signal": (True, RUN, silent(), -signal.SIGTERM),
    "headers": (False, ("--trace", *RUN), answer(DOCUMENT, "200 OK", *HEADERS), 0),
    "traced-deadline": (False, ("--trace", "--timeout", "1s", *RUN), silent(), 125),
    "traced-signal": (False, ("--trace", *RUN), silent(), -signal.SIGTERM),
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
                server.ending.wait(1.3 if is_terminal else 0)
                process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (code, as_json(RESULT) if code == 0 else b"")

    check_each(check, [*STUCK], workers=len(STUCK))


# --- the same bytes with and without a terminal -----------------------------------------------


@pytest.mark.parametrize("form", ["json", "text", "tsv"])
@pytest.mark.parametrize("name", api_commands())
def test_a_result_on_a_terminal(name: str, form: str, cli: InProcess, api: Api) -> None:
    """Promise 3.13: the same bytes on a narrow terminal as in a file, without colour."""
    for color in ("auto", "always"):
        args = ("--color", color, "-f", form, *words(name))
        piped = cli(*args, at=api, env=XTERM)
        with Terminal(20) as terminal:
            result = cli(*args, at=api, env=XTERM, stdout=terminal.end)
            shown = terminal.read_all()
        assert (result.code, shown, result.err) == (0, piped.out, piped.err)
        assert shown
        assert b"\x1b" not in shown


@pytest.mark.parametrize("args", [("help",), ("run", "--help"), ("--version",)], ids=" ".join)
def test_help_has_no_colour(args: Words, cli: InProcess) -> None:
    env: Env = {"TERM": "xterm-256color", "FORCE_COLOR": "1", "COLORTERM": "truecolor"}
    with Terminal() as terminal:
        end = terminal.end
        result = cli("--color", "always", *args, env=env, stdout=end, stderr=end)
        shown = terminal.read_all()
    assert (result.code, shown) == (0, cli(*args).out)
    assert b"\x1b" not in shown


# --- colour -----------------------------------------------------------------------------------


class Colour(NamedTuple):
    """Options and variables, whether an error is coloured on a terminal, and whether in a pipe."""

    options: Words
    env: Env
    terminal: bool
    pipe: bool = False


COLOURS = {
    "default": Colour((), {}, True),
    "auto": Colour(("--color", "auto"), {}, True),
    "always": Colour(("--color", "always"), {}, True, True),
    "never": Colour(("--color", "never"), {}, False),
    "no-color": Colour(("--no-color",), {}, False),
    "NO_COLOR": Colour((), {"NO_COLOR": "1"}, False),
    "NO_COLOR-auto": Colour(("--color", "auto"), {"NO_COLOR": "0"}, False),
    "NO_COLOR-empty": Colour((), {"NO_COLOR": ""}, True),
    "NO_COLOR-always": Colour(("--color", "always"), {"NO_COLOR": "1"}, True, True),
    "NO_COLOR-never": Colour(("--color", "never"), {"NO_COLOR": "1"}, False),
    "dumb": Colour((), {"TERM": "dumb"}, False),
    "dumb-always": Colour(("--color", "always"), {"TERM": "dumb"}, True, True),
    "quiet": Colour(("--quiet",), {}, True),
}


@pytest.mark.parametrize("case", COLOURS.values(), ids=COLOURS)
def test_the_colour_of_an_error(case: Colour, cli: InProcess, api: Api) -> None:
    """Promise 3.8."""
    api.answers({"error": {"type": "forbidden", "message": "not yours"}}, status="403 Forbidden")
    args, env = (*case.options, "status"), {**XTERM, **case.env}
    piped = cli(*args, at=api, env=env)
    with Terminal() as terminal:
        result = cli(*args, at=api, env=env, stderr=terminal.end)
        shown = terminal.read_all()
    assert (result.code, piped.code, result.out, piped.out) == (1, 1, b"", b"")
    assert (b"\x1b" in shown, b"\x1b" in piped.err) == (case.terminal, case.pipe)
    plain = shown.replace(b"\x1b[31m", b"").replace(b"\x1b[0m", b"")
    assert plain == piped.err.replace(b"\x1b[31m", b"").replace(b"\x1b[0m", b"")
    assert plain.startswith(b"bus-containers: ")
    assert b"\x1b" not in plain
    if case.terminal:  # nothing after it is coloured
        assert shown.startswith(b"bus-containers: \x1b[31m")
        assert shown.endswith(b"\x1b[0m\n")


def test_warnings_and_notes_have_no_colour(cli: InProcess, api: Api) -> None:
    result = cli("--color", "always", "-v", *RUN, at=api.answers(DOCUMENT.replace(b"OK", b"\xff")))
    assert result.spoken.warnings
    assert b"\x1b" not in result.err


# --- text of a server cannot drive the terminal -----------------------------------------------

CONTROLS = "\x1b]0;owned\x07\x1b[2J\x9b2J\x90q\x9c\x7f\x08\x0b\x0e\x85\x00\r\nspoofed: all is well"
FORMATS = "\u202e\u2066\u200b\u200d\u2028\u2029\ufeff\u061c\U000e0041"
EVIL = CONTROLS + FORMATS
VISIBLE = ("\\x1b", "\\x9b", "\\x7f", "\\x07", "\\x08", "\\x85", "\\u202e", "\\u2066", "\\u200b")
HEADER = "\x1b[2J\x9b\x07"
USAGE = {"used": 1, "limit": 1, "window": EVIL, "meter_event_name": EVIL}
ITEM = {"id": EVIL, "run_id": EVIL, "state": EVIL, "image": EVIL, "owner_identity_id": EVIL,
        "exit_code": EVIL, "details": {EVIL: EVIL}, "args": [EVIL]}  # fmt: skip


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
    "reason": (("status",), message(b"", f"400 O{HEADER}K")),
    "traced-reason": (("--trace", "status"), message(b"{}", f"200 O{HEADER}K")),
    "encoding": (("status",), message(b"{}", "200 OK", f"Content-Encoding: {HEADER}")),
    "exit-code": (RUN, message(json.dumps({**RESULT, "exit_code": EVIL}).encode())),
    "status-text": (("-f", "text", "status"), message(json.dumps({"items": [ITEM]}).encode())),
    "runs-text": (("-f", "text", "runs"), message(json.dumps({"items": [ITEM]}).encode())),
    "delete-text": (
        ("-f", "text", "delete", EVIL.partition("\x1b")[0] + "a"),
        message(json.dumps({"deleted": True, "run_id": "a", "note": EVIL}).encode()),
    ),
    "run-text": (
        ("-f", "text", *RUN),
        message(json.dumps({**RESULT, "run_id": EVIL, "duration_ms": EVIL, "stdout": ""}).encode()),
    ),
}


@pytest.mark.parametrize("name", DRIVEN)
def test_text_of_a_server_is_made_visible(name: str, cli: InProcess, api: Api) -> None:
    """Promise 3.18: control and format characters, line separators."""
    args, data = DRIVEN[name]
    result = cli("--color", "never", *args, at=api.sends(data), env=XTERM)
    shown = spoken(result.err).text + (result.out.decode() if "text" in args else "")
    assert shown.replace("\n", "").isprintable()
    assert not re.search("(?m)^spoofed", shown)
    if name not in ("title", "delete-text"):  # which need not be shown at all
        assert "\\x1b" in shown or "\\u001b" in shown
    if name in ("message", "type", "action", "command", "string", "run-text"):
        for text in VISIBLE:
            assert text in shown


@pytest.mark.parametrize("form", ["json", "tsv"])
def test_formats_for_programs_keep_the_text(form: str, cli: InProcess, api: Api) -> None:
    document = {**RESULT, "run_id": EVIL, "exit_code": 7}
    result = cli("-f", form, *RUN, at=api.answers(document))
    assert (result.code, result.err) == (7, b"")
    if form == "json":
        assert result.document == document
    else:
        row = result.out.decode().split("\n")[1]
        assert row.split("\t")[0] == EVIL.replace("\r", "\\r").replace("\n", "\\n")
