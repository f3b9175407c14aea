# SPDX-License-Identifier: MIT
"""What a terminal shows, on a real pseudo-terminal: a run in progress, colour, hostile text.

A small emulator knows `\\r`, `\\n` and "erase to the end of the line"; all else that could drive a
terminal is a failure. The same call prints the same bytes with and without a terminal.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
import tty
import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from conftest import Program
from hostile import LIMIT, Connection, Herd, Hostile, Script, answer, held, message, silent

Env = dict[str, "str | None"]
Words = tuple[str, ...]

RESULT = {"run_id": "run-1", "exit_code": 0, "stdout": "OK\n", "stderr": ""}
DOCUMENT = json.dumps(RESULT).encode()
DENIAL = answer(b'{"error":{"type":"forbidden","message":"not yours"}}', "403 Forbidden")
RUN = ("run", "--", "sleep", "60")


class Screen:
    """What is on a terminal after these bytes, and all it showed on the way."""

    def __init__(self) -> None:
        self.rows = [""]
        self.drawn: list[str] = []
        self.widest = 0
        self._column = 0

    def feed(self, data: str) -> None:
        for part in re.split(r"(\r|\n|\x1b\[K)", data):
            row = self.rows[-1]
            if part == "\r":
                self._column = 0
            elif part == "\n":
                self.rows.append("")
                self._column = 0
            elif part == "\x1b[K":
                self.rows[-1] = row[: self._column]
            elif part:
                assert part.replace("\t", "").isprintable(), repr(part)
                self.rows[-1] = row[: self._column] + part + row[self._column + len(part) :]
                self._column += len(part)
                self.drawn.append(self.rows[-1])
                self.widest = max(self.widest, width(self.rows[-1]))

    @property
    def text(self) -> str:
        return "\n".join(self.rows)


def width(text: str) -> int:
    """The columns that a terminal needs for a text."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


class Terminal:
    """A pseudo-terminal in raw mode, so that what is written to it arrives as it is."""

    def __init__(self, columns: int = 80) -> None:
        self.controller, self.end = pty.openpty()
        tty.setraw(self.end)
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.shown = b""
        self.first_byte_at = 0.0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.controller)
        self.release()

    def release(self) -> None:
        """Let the program be the only one that holds the other end."""
        if self.end >= 0:
            os.close(self.end)
            self.end = -1

    def read_until(self, found: Callable[[bytes], bool]) -> None:
        """Read until it has shown this, or nobody can write to it any more."""
        limit = time.monotonic() + LIMIT
        while not found(self.shown):
            left = limit - time.monotonic()
            assert left > 0, self.shown
            if not select.select([self.controller], [], [], left)[0]:
                continue
            try:
                data = os.read(self.controller, 65536)
            except OSError:  # EIO: all who could write are gone
                return
            if not data:
                return
            self.first_byte_at = self.first_byte_at or time.monotonic()
            self.shown += data

    def read_all(self) -> bytes:
        self.read_until(lambda _: False)
        return self.shown

    def screen(self) -> Screen:
        screen = Screen()
        screen.feed(self.shown.decode("utf-8"))
        return screen


def after(seconds: float, body: bytes = DOCUMENT) -> Script:
    """Read the request, and answer so much later."""

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.server.ending.wait(seconds)
        connection.send(message(body))

    return script


def on_a_terminal(server: Hostile, token: str, **more: str | None) -> Env:
    return {"BUS_AI_API_URL": server.url, "BUS_AI_TOKEN": token, "TERM": "xterm", **more}


# --- a run in progress ------------------------------------------------------------------------


class Shown(NamedTuple):
    """A command line, the width of its terminal, and what the line about it has to show."""

    id: str
    words: Words
    fragments: Words
    columns: int = 80
    until: str = "1 s"


LONG = ("run", "--image", "registry.example/team/image:tag", "--", "sh", "-c", "x" * 200)
SHOWN = [
    Shown("profile", ("run", "--profile", "testing-agent", "--timeout-seconds", "90", "--", "make",
                      "test"), ("testing-agent", "make test", "90 s")),
    Shown("default-profile", RUN, ("codex", "sleep 60", "30 min")),
    Shown("image", ("run", "--image", "alpine:3", "--", "ls", "/"), ("alpine:3", "ls /")),
    Shown("timeout", ("--timeout", "45s", *RUN), ("45 s", "codex", "sleep 60")),
    Shown("no-limit", ("--timeout", "0", *RUN), ("codex", "sleep 60")),
    Shown("two-seconds", RUN, ("codex", "sleep 60"), until="2 s"),
    Shown("40-columns", RUN, ("codex",), 40),
    Shown("40-columns-long", LONG, (), 40),
    Shown("80-columns-long", LONG, ("registry.example/team/image:tag",), 80),
    Shown("10-columns", LONG, (), 10),
    Shown("1-column", RUN, (), 1, ""),
    Shown("unknown-size", LONG, ("registry.example",), 0),
    Shown("wide", ("run", "--", "\u4f60\u597d" * 40), (), 40),
    Shown("combining", ("run", "--", "e\u0301\u200b\U0001f468\u200d\U0001f469" * 20), (), 40),
    Shown("control", ("run", "--", "a\x1b[2J\x07\x9b2J\r\n\tb\x7f"), ("codex",), 80),
    Shown("surrogate", ("run", "--", "\U0001f600"), ("codex",), 80),
    Shown("text", ("-f", "text", *RUN), ("sleep 60",)),
    Shown("color", ("--color", "always", *RUN), ("sleep 60",)),
    Shown("no-color", ("--no-color", *RUN), ("sleep 60",)),
]  # fmt: skip


class Seen(NamedTuple):
    """What a terminal showed of a run, and the run's result."""

    seconds_to_first: float
    screen: Screen
    code: int
    out: bytes


@pytest.fixture(scope="module")
def progress(
    command: list[str], canary: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Herd[Shown, Seen]]:
    program = Program(command, tmp_path_factory.mktemp("home"))

    def watch(case: Shown) -> Seen:
        release = threading.Event()
        script = held(release, message(DOCUMENT))
        with Terminal(case.columns) as terminal, Hostile(script) as server:
            start = time.monotonic()
            env = on_a_terminal(server, canary)
            with program.start(*case.words, env=env, stderr=terminal.end) as process:
                terminal.release()
                terminal.read_until(lambda shown: shown != b"" and case.until.encode() in shown)
                release.set()
                terminal.read_all()
                out, _ = process.communicate(timeout=LIMIT)
            first = terminal.first_byte_at - start
            return Seen(first, terminal.screen(), process.returncode, out)

    with Herd(watch, SHOWN, workers=len(SHOWN)) as herd:
        yield herd


@pytest.mark.parametrize("case", SHOWN, ids=lambda case: case.id)
def test_run_in_progress_is_shown_in_place(progress: Herd[Shown, Seen], case: Shown) -> None:
    seen = progress.outcome(case)
    assert seen.code == 0
    assert seen.seconds_to_first >= 1
    if "-f" in case.words:  # then one line about the run stays
        [line, end] = seen.screen.rows
        assert (seen.out, end) == (b"OK\n", "")
        assert "run-1" in line
        assert "sleep" not in line
    else:
        assert json.loads(seen.out) == RESULT
        assert seen.screen.text == ""
        assert seen.screen.widest <= (case.columns or 80)
    drawn = [line for line in seen.screen.drawn if case.until in line]
    assert drawn or case.columns == 1  # where there is room for none
    for fragment in case.fragments:
        assert fragment in drawn[-1]


class Hidden(NamedTuple):
    """Circumstances under which nothing at all is shown of a run in progress."""

    id: str
    options: Words = ()
    env: Env = {}
    pipe: bool = False
    seconds: float = 1.7


HIDDEN = [
    Hidden("pipe", pipe=True),
    Hidden("pipe-color-always", ("--color", "always"), pipe=True),
    Hidden("quiet", ("--quiet",)),
    Hidden("errors-as-json", ("--error-format", "json")),
    Hidden("dumb", env={"TERM": "dumb"}),
    Hidden("dumb-color-always", ("--color", "always"), {"TERM": "dumb"}),
    Hidden("short", seconds=0),
]


@pytest.fixture(scope="module")
def silence(
    command: list[str], canary: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Herd[Hidden, tuple[int, bytes]]]:
    program = Program(command, tmp_path_factory.mktemp("home"))

    def watch(case: Hidden) -> tuple[int, bytes]:
        with Terminal() as terminal, Hostile(after(case.seconds)) as server:
            env = {**on_a_terminal(server, canary), **case.env}
            stderr = subprocess.PIPE if case.pipe else terminal.end
            with program.start(*case.options, *RUN, env=env, stderr=stderr) as process:
                terminal.release()
                shown = terminal.read_all()
                _, err = process.communicate(timeout=LIMIT)
            return process.returncode, shown + (err or b"")

    with Herd(watch, HIDDEN, workers=len(HIDDEN)) as herd:
        yield herd


@pytest.mark.parametrize("case", HIDDEN, ids=lambda case: case.id)
def test_run_in_progress_is_not_shown(
    silence: Herd[Hidden, tuple[int, bytes]], case: Hidden
) -> None:
    assert silence.outcome(case) == (0, b"")


@pytest.mark.parametrize("form", ["json", "text"])
def test_progress_and_result_on_one_terminal(program: Program, canary: str, form: str) -> None:
    """As a person sees it: of the line about the run nothing is left beside the result."""
    with Hostile(answer(DOCUMENT)) as server:
        expected = program("-f", form, *RUN, env=on_a_terminal(server, canary))
    with Terminal() as terminal, Hostile(after(1.4)) as server:
        with program.start(
            "-f", form, *RUN, env=on_a_terminal(server, canary), stdout=terminal.end,
            stderr=terminal.end,
        ) as process:  # fmt: skip
            terminal.release()
            terminal.read_all()
        screen = terminal.screen()
    assert process.returncode == 0
    assert any("sleep 60" in line for line in screen.drawn)
    assert screen.text == (expected.out + expected.err).decode()


def test_notes_amid_a_run_stand_on_lines_of_their_own(program: Program, canary: str) -> None:
    body = DOCUMENT.replace(b"OK", b"\xff")
    release = threading.Event()
    with Terminal(200) as terminal, Hostile(held(release, message(body))) as server:
        env = on_a_terminal(server, canary)
        with program.start("-v", *RUN, env=env, stderr=terminal.end) as process:
            terminal.release()
            terminal.read_until(lambda shown: b"1 s" in shown and b"sleep 60" in shown)
            release.set()
            terminal.read_all()
            process.communicate(timeout=LIMIT)
        rows = terminal.screen().rows
    assert process.returncode == 0
    assert rows.pop() == ""
    assert [row for row in rows if not row.startswith("bus-containers: ")] == []
    assert [row for row in rows if "sleep 60" in row] == []
    assert sum("U+FFFD" in row for row in rows) == 1
    assert sum("bytes" in row for row in rows) == 1


def test_a_terminal_that_hangs_up_ends_no_run(program: Program, canary: str) -> None:
    release = threading.Event()
    with Terminal() as terminal, Hostile(held(release, message(DOCUMENT))) as server:
        env = on_a_terminal(server, canary)
        with program.start(*RUN, env=env, stderr=terminal.end, start_new_session=True) as process:
            terminal.release()
            terminal.read_until(lambda shown: b"1 s" in shown)
            os.close(terminal.controller)
            terminal.controller = os.open(os.devnull, os.O_RDONLY)
            assert not release.wait(1.1)  # until the next line would be drawn
            release.set()
            out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert json.loads(out) == RESULT


_WITH_A_CONTROLLING_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_ctrl_c_typed_at_the_terminal(program: Program, canary: str) -> None:
    typing = Program(
        [sys.executable, "-c", _WITH_A_CONTROLLING_TERMINAL, *program.command], program.home
    )
    with Terminal(300) as terminal, Hostile(silent()) as server:
        modes = termios.tcgetattr(terminal.end)
        modes[3] |= termios.ISIG
        termios.tcsetattr(terminal.end, termios.TCSANOW, modes)
        with typing.start(
            *RUN, env=on_a_terminal(server, canary), stderr=terminal.end, start_new_session=True
        ) as process:
            terminal.release()
            terminal.read_until(lambda shown: b"1 s" in shown)
            os.write(terminal.controller, b"\x03")
            terminal.read_all()
            out, _ = process.communicate(timeout=LIMIT)
        text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.shown.decode())
    assert (process.returncode, out) == (130, b"")
    screen = Screen()
    screen.feed(text)
    [line, end] = screen.rows
    assert end == ""
    assert line.startswith("bus-containers: interrupted")
    assert "sleep 60" not in line


# --- the same bytes with and without a terminal -----------------------------------------------

ITEMS = {"items": [{**RESULT, "id": "run-1", "state": "exited", "image": "\u4f60", "details": {}}]}


@pytest.mark.parametrize("form", ["json", "text", "tsv"])
@pytest.mark.parametrize("color", ["auto", "always"])
@pytest.mark.parametrize(
    ("words", "document"),
    [
        pytest.param(("run", "--", "true"), RESULT, id="run"),
        pytest.param(("status",), ITEMS, id="status"),
        pytest.param(("runs",), ITEMS, id="runs"),
        pytest.param(("delete", "run-1"), {"deleted": True, "run_id": "run-1"}, id="delete"),
    ],
)
def test_result_on_a_terminal(
    program: Program, canary: str, words: Words, document: object, color: str, form: str
) -> None:
    words = ("--color", color, "-f", form, *words)
    with Terminal(20) as terminal, Hostile(answer(json.dumps(document).encode())) as server:
        env = on_a_terminal(server, canary)
        piped = program(*words, env=env)
        with program.start(*words, env=env, stdout=terminal.end) as process:
            terminal.release()
            shown = terminal.read_all()
            _, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, shown, err) == (piped.code, piped.out, piped.err)
    assert piped.code == 0
    assert b"\x1b" not in shown


# --- colour -------------------------------------------------------------------------------------


class Colour(NamedTuple):
    """Options and variables, whether an error is coloured on a terminal, and whether in a pipe."""

    id: str
    options: Words
    env: Env
    terminal: bool
    pipe: bool = False


COLOURS = [
    Colour("default", (), {}, True),
    Colour("auto", ("--color", "auto"), {}, True),
    Colour("always", ("--color", "always"), {}, True, True),
    Colour("never", ("--color", "never"), {}, False),
    Colour("no-color", ("--no-color",), {}, False),
    Colour("NO_COLOR", (), {"NO_COLOR": "1"}, False),
    Colour("NO_COLOR-auto", ("--color", "auto"), {"NO_COLOR": "0"}, False),
    Colour("NO_COLOR-empty", (), {"NO_COLOR": ""}, True),
    Colour("NO_COLOR-always", ("--color", "always"), {"NO_COLOR": "1"}, True, True),
    Colour("NO_COLOR-never", ("--color", "never"), {"NO_COLOR": "1"}, False),
    Colour("dumb", (), {"TERM": "dumb"}, False),
    Colour("dumb-always", ("--color", "always"), {"TERM": "dumb"}, True, True),
    Colour("quiet", ("--quiet",), {}, True),
]
_SGR = re.compile(rb"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("case", COLOURS, ids=lambda case: case.id)
def test_colour_of_an_error(program: Program, canary: str, case: Colour) -> None:
    words = (*case.options, "status")
    with Hostile(DENIAL) as server, Terminal() as terminal:
        env = {**on_a_terminal(server, canary), **case.env}
        piped = program(*words, env=env)
        with program.start(*words, env=env, stderr=terminal.end) as process:
            terminal.release()
            shown = terminal.read_all()
            out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, piped.code, out, piped.out) == (1, 1, b"", b"")
    assert (b"\x1b" in shown, b"\x1b" in piped.err) == (case.terminal, case.pipe)
    plain = _SGR.sub(b"", shown)
    assert b"\x1b" not in plain
    assert plain == _SGR.sub(b"", piped.err)
    assert plain.startswith(b"bus-containers: ")
    if case.terminal:
        assert shown.rstrip().endswith(b"\x1b[0m")  # nothing after it is coloured


@pytest.mark.parametrize("words", [("help",), ("run", "--help"), ("--version",)], ids=" ".join)
def test_help_has_no_colour(program: Program, words: Words) -> None:
    with Terminal() as terminal:
        env: Env = {"TERM": "xterm-256color", "FORCE_COLOR": "1", "COLORTERM": "truecolor"}
        with program.start(
            "--color", "always", *words, env=env, stdout=terminal.end, stderr=terminal.end
        ) as process:
            terminal.release()
            shown = terminal.read_all()
    assert process.returncode == 0
    assert shown == program(*words).out
    assert b"\x1b" not in shown


# --- text of a server cannot drive the terminal -----------------------------------------------

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b2J\x90q\x9c\x7f\x08\x0b\x0e\x85\x00\r\nspoofed: all is well"
VISIBLE = ("\\x1b", "\\x9b", "\\x7f", "\\x07", "\\x08", "\\x85")


def told(**fields: object) -> bytes:
    return json.dumps({"error": fields}).encode()


class Driven(NamedTuple):
    """An answer that would drive a terminal, and where its text is shown."""

    id: str
    words: Words
    data: bytes


USAGE = {"used": 1, "limit": 1, "window": EVIL, "meter_event_name": EVIL}
ITEM = {"id": EVIL, "run_id": EVIL, "state": EVIL, "image": EVIL, "owner_identity_id": EVIL,
        "exit_code": EVIL, "duration_ms": EVIL, "details": {EVIL: EVIL}}  # fmt: skip
DRIVEN = [
    *(
        Driven(f"error-{name}", ("status",), message(told(**{name: EVIL}), "400 No"))
        for name in ("message", "type", "action", "command")
    ),
    Driven("error-string", ("status",), message(json.dumps({"error": EVIL}).encode(), "500 No")),
    Driven("quota", RUN, message(told(usage=USAGE, recommended_plan=EVIL), "402 No")),
    Driven("title", ("status",), message(
        f"<!doctype html><html><head><title>{EVIL}</title></head>".encode(), "500 No")),
    Driven("location", ("status",), message(b"", "302 No", "Location: http://x/\x1b[2J\x9b\x07")),
    Driven("header", ("--trace", "status"), message(b'{"items":[]}', "200 OK", "X: \x1b[2J\x9b")),
    Driven("reason", ("status",), message(b"", "400 O\x1b[2J\x9bK")),
    Driven("reason-traced", ("--trace", "status"), message(b"{}", "200 O\x1b[2J\x9bK")),
    Driven("encoding", ("status",), message(b"{}", "200 OK", "Content-Encoding: \x1b[2J\x9b")),
    Driven("exit-code", RUN, message(json.dumps({**RESULT, "exit_code": EVIL}).encode())),
    *(
        Driven(f"{words[0]}-text", ("-f", "text", *words), message(json.dumps(document).encode()))
        for words, document in (
            (("status",), {"items": [ITEM]}),
            (("runs",), {"items": [ITEM]}),
            (("delete", "a"), {"deleted": True, "run_id": EVIL}),
            (RUN, {**RESULT, "run_id": EVIL, "duration_ms": EVIL}),
        )
    ),
]


@pytest.mark.parametrize("case", DRIVEN, ids=lambda case: case.id)
def test_text_of_a_server_is_made_visible(program: Program, canary: str, case: Driven) -> None:
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(case.data)

    with Hostile(script) as server:
        result = program("--color", "never", *case.words, env=on_a_terminal(server, canary))
    shown = ((result.out if "text" in case.words else b"") + result.err).decode("utf-8")
    assert "Traceback" not in shown
    if case.id != "title":  # that one need not be shown at all
        assert "\\x1b" in shown or "\\u001b" in shown
    assert [char for char in shown if char != "\n" and unicodedata.category(char) == "Cc"] == []
    assert not re.search("(?m)^spoofed", shown)
    if b"\\u0085" in case.data and case.id != "exit-code":  # that one is shown as JSON
        for text in VISIBLE:
            assert text in shown


@pytest.mark.parametrize("form", ["json", "tsv"])
def test_formats_for_programs_keep_the_text(program: Program, canary: str, form: str) -> None:
    document = {**RESULT, "run_id": EVIL, "exit_code": 7}
    with Hostile(answer(json.dumps(document).encode())) as server:
        result = program("-f", form, *RUN, env=on_a_terminal(server, canary))
    assert (result.code, result.err) == (7, b"")
    if form == "json":
        assert json.loads(result.out) == document
    else:
        [_, row] = result.out.decode().split("\n")[:2]
        assert row.split("\t")[0] == EVIL.replace("\r", "\\r").replace("\n", "\\n")
