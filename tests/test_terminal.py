# SPDX-License-Identifier: MIT
"""What a terminal shows, on a real pseudo-terminal: promises 3.8, 3.13, 3.15, 3.18, 3.22 and 6.9.

A small emulator knows `\\r`, `\\n` and "erase to the end of the line"; all else that could drive a
terminal is a failure.
"""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bus_containers
from hostile import Api, Connection, Hostile, Script, answer, held, message, raw, silent
from support import (
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
    headers: Words = (), **popen: object,
) -> Iterator[tuple[Terminal, subprocess.Popen[bytes], threading.Event]]:  # fmt: skip
    """A call whose line is on the terminal, and which is answered after the event."""
    release = threading.Event()

    def status(connection: Connection) -> None:
        connection.read_request()
        state = b"ready" if release.is_set() else b"starting"
        connection.send(message(b'{"items":[{"id":"runner","state":"%s"}]}' % state))

    script = status if "status" in args else held(release, message(body, "200 OK", *headers))
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
    "no-limit": Shown(("--color", "always", "--timeout", "0", *RUN), "1 s  codex: sleep 60"),
    "narrow": Shown(IMAGE, "1 s of 30 min  registry.example/image:t", 40),
    "unknown-size": Shown(IMAGE, f"1 s of 30 min  registry.example/image:tag: sh -c {'x' * 30}", 0),
    "odd": Shown(("run", "\u4f60\u200ba\x1b[2J\x07\x9b\r\n\tb\x7f"),
                 "1 s of 30 min  codex: \\u4f60\\u200ba\\x1b[2J\\x07\\x9b\\r\\n\\tb\\x7f"),
    "wait": Shown(("status", "--wait", "50s"), "1 s of 50 s  waiting for the platform"),
}  # fmt: skip


@scene
def what_is_in_progress_is_shown_in_place(program: Program) -> None:
    """Promise 3.22: until there is a result, the line is there; then nothing is left of it."""

    def check(name: str) -> None:
        case = SHOWN[name]
        screen = watched(program, *case.args, line=case.line, columns=case.columns)
        assert screen.rows == [""]
        assert {at_first(line) for line in screen.drawn} == {case.line}
        assert all(len(line) < (case.columns or 80) for line in screen.drawn)

    check_each(check, [*SHOWN], workers=len(SHOWN))


class HostScreen(io.StringIO):
    """A terminal of a host program's, of which nobody knows how wide it is."""

    def __init__(self) -> None:
        super().__init__()
        self.has_line = threading.Event()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise NotImplementedError

    def write(self, text: str) -> int:
        if "codex" in text:
            self.has_line.set()
        return super().write(text)


@second_tier
def test_a_terminal_of_unknown_width_has_eighty_columns(cli: InProcess) -> None:
    screen = HostScreen()
    with Hostile(held(screen.has_line, message(DOCUMENT))) as server:
        result = cli("run", "x" * 200, at=server, env=XTERM, stderr=screen)
    first, _, _ = screen.getvalue().partition("\r")
    assert (result.code, at_first(first)) == (0, f"1 s of 30 min  codex: {'x' * 57}"[:79])


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
STILL = rb"(bus-containers: still waiting after ([0-9]+) min  codex: sleep 60\n)"
# Options, the kind of terminal, if it is one, and what is shown after more than five minutes.
LONG: dict[str, tuple[Words, str, bytes]] = {
    "quiet": (("--quiet",), "", b""),
    "quiet-on-a-terminal": (("--quiet",), "xterm", b""),
    "errors-as-json": (("--error-format", "json"), "", b""),
    "errors-as-json-on-a-terminal": (("--error-format", "json"), "xterm", b""),
    "pipe": (("--color", "always"), "", STILL + b"{2,}"),
    "dumb": (("--color", "always"), "dumb", STILL + b"{2,}"),
    "terminal": ((), "xterm", rb"(?:(?:\r\x1b\[K)?[0-9]+ (?:s|min)  codex: sleep 60){2,}\r\x1b\[K"),
}


@scene
def what_is_shown_of_a_long_run(program: Program) -> None:
    """Promise 3.22: without a terminal, a line every five minutes, so that CI does not end it."""
    fast = Program([sys.executable, "-c", FAST, program.command[-1]], program.home)
    release = threading.Event()
    with ExitStack() as stack:
        server = stack.enter_context(Hostile(held(release, message(DOCUMENT))))
        calls = {}
        for name, (options, term, _) in LONG.items():
            terminal = stack.enter_context(Terminal())
            err, env = (terminal.end, {**XTERM, "TERM": term}) if term else (subprocess.PIPE, None)
            args = ("--timeout", "0", *options, *RUN)
            process = stack.enter_context(fast.start(*args, at=server, env=env, stderr=err))
            stack.callback(process.kill)
            terminal.release()
            calls[name] = terminal, process
        end = time.monotonic() + LIMIT
        while len(server.requests) < len(LONG) and time.monotonic() < end:
            server.ending.wait(0.01)
        for _, process in calls.values():
            process.send_signal(signal.SIGUSR1)
        for name in ("terminal", "dumb"):
            calls[name][0].read_until(lambda shown: shown.count(b"sleep 60") > 1)
        loud = calls["pipe"][1]
        patience = threading.Timer(LIMIT, loud.kill)
        patience.start()
        stack.callback(patience.cancel)
        assert loud.stderr is not None
        first = loud.stderr.readline() + loud.stderr.readline()
        release.set()
        for name, (terminal, process) in calls.items():
            out, said = process.communicate(timeout=LIMIT)
            shown = terminal.read_all() + (first if name == "pipe" else b"") + (said or b"")
            printed = b"" if "quiet" in name else as_json(RESULT)
            assert (process.returncode, out) == (0, printed), name
            found = re.fullmatch(LONG[name][2], shown)
            assert found, (name, shown)
            assert name not in ("pipe", "dumb") or int(found[2]) >= 10


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


def test_the_closing_line_has_a_line_of_its_own(cli: InProcess, api: Api) -> None:
    """Promise 3.15, on a terminal; into a file the output goes as it is."""
    for stdout, stderr, shown in (
        ("OK", "", "OK\n"),
        ("OK\n", "", "OK\n"),
        ("", "", ""),
        ("OK\n", "bad", "OK\nbad\n"),
        ("OK", "bad\n", "OKbad\n"),
    ):
        api.answers({**RESULT, "stdout": stdout, "stderr": stderr})
        with Terminal() as terminal:
            cli("-f", "text", *RUN, at=api, stdout=terminal.end, stderr=terminal.end)
            assert terminal.read_all().decode() == f"{shown}{CLOSING}\n"
        with Terminal() as terminal:
            assert cli("-f", "text", *RUN, at=api, stderr=terminal.end).out == stdout.encode()
            assert terminal.read_all().decode().split(CLOSING) in ([stderr, "\n"], ["bad\n", "\n"])


@scene
def an_interrupt_takes_the_line_away(program: Program) -> None:
    """Promise 3.22, too: until then the line was drawn when it changed, and not more often."""
    with in_progress(program, "--no-color", *RUN, columns=300) as (terminal, process, _):
        terminal.read_until(lambda shown: shown.count(b"sleep 60") > 1)
        process.send_signal(signal.SIGINT)
        terminal.read_all()
    screen = Screen(terminal.shown)
    [line, end] = screen.rows
    assert end == ""
    assert line.startswith("bus-containers: interrupted; the run may still be executing")
    assert len({*screen.drawn}) == len(screen.drawn)


@scene
def a_long_command_does_not_hold_up_its_answer(program: Program) -> None:
    """Its line is made once, not with each of the thousand pieces in which the answer comes."""
    args = ("run", "--timeout", "30s", "sh", "-c", *["\n" * 120_000] * 7)
    pieces = [DOCUMENT, *[b" " * 8000] * 1000, b""]
    body = b"".join([b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces])
    line = ("1 s of 30 s  codex: sh -c " + r"\n" * 40)[:79]
    screen = watched(program, *args, line=line, body=body, headers=("Transfer-Encoding: chunked",))
    assert screen.rows == [""]


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
LONG_ERROR = {"error": {"type": "y" * 4000, "message": "y" * 4000}}
# What standard error is, what is asked and answered, and the exit code. Answers and signals come
# when a terminal has been tried with a first line.
STUCK: dict[str, tuple[str, Words, Script, int]] = {
    "result": ("terminal", RUN, late(1.4, message(DOCUMENT)), 0),
    "signal": ("terminal", RUN, silent(), -signal.SIGTERM),
    "headers": ("pipe", ("--trace", *RUN), answer(DOCUMENT, "200 OK", *HEADERS), 0),
    "deadline": ("pipe", ("--trace", "--timeout", "1s", *RUN), silent(), 125),
    "long-message": ("pipe", RUN, answer(json.dumps(LONG_ERROR).encode(), "403 Forbidden"), 125),
    "little-room": ("almost full", ("-v", *RUN), answer(DOCUMENT), 0),
    "little-room-and-deadline": ("almost full", ("--timeout", "1s", *RUN), silent(), 125),
    "little-room-by-another-name": ("/dev/tty", ("-v", *RUN), answer(DOCUMENT), 0),
}
# Runs a command whose standard error is /dev/tty, which is the terminal that it is here.
CONTROLLED = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
os.dup2(os.open("/dev/tty", os.O_WRONLY), 2)
os.execv(sys.argv[1], sys.argv[1:])
"""


def almost_full(stack: ExitStack) -> tuple[int, int]:
    """A terminal in its usual mode with room for a part of a message: select calls it writable."""
    room = 0
    for is_measured in (False, True):
        controller, end = os.openpty()
        stack.callback(os.close, controller)
        stack.callback(os.close, end)
        os.set_blocking(end, False)
        with suppress(BlockingIOError):
            while not is_measured or room > 20:
                os.write(end, b"x")  # one by one, as its buffers are of some bytes each
                room += -1 if is_measured else 1
    os.set_blocking(end, True)
    assert select.select([], [end], [], 0)[1]
    return controller, end


@scene
def nothing_waits_for_a_standard_error_that_nobody_reads(program: Program) -> None:
    """Promise 6.9: neither a result, nor the deadline, nor a signal."""

    def check(name: str) -> None:
        kind, args, script, code = STUCK[name]
        with ExitStack() as stack:
            server = stack.enter_context(Hostile(script))
            if name.startswith("little-room"):
                _, err = almost_full(stack)
            elif kind == "terminal":
                err = stack.enter_context(Terminal()).end
            else:
                reader, err = os.pipe()
                stack.callback(os.close, reader)
                stack.callback(os.close, err)
            if kind in ("pipe", "terminal"):
                fill(err)
            if kind == "pipe":
                os.read(reader, 4096)  # room for some more, and not for much
            tried = program
            if kind == "/dev/tty":
                command = [sys.executable, "-c", CONTROLLED, *program.command]
                tried = Program(command, program.home, program.folder)
            process = stack.enter_context(tried.start(*args, at=server, env=XTERM, stderr=err))
            stack.callback(process.kill)
            if code == -signal.SIGTERM:
                assert server.reached.wait(LIMIT)
                server.ending.wait(1.3)
                process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (code, as_json(RESULT) if code == 0 else b"")

    check_each(check, [*STUCK], workers=len(STUCK))


@second_tier
def test_a_result_does_not_wait_for_a_slow_reader_of_headers(program: Program, api: Api) -> None:
    """Promise 6.9: each line was taken just in time, and in all they took two minutes."""
    api.sends(message(DOCUMENT, "200 OK", *HEADERS))
    reader, err = os.pipe()
    fill(err)
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        process = stack.enter_context(program.start("--trace", *RUN, at=api, stderr=err))
        stack.callback(process.kill)
        os.close(err)
        end = time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < end:
            os.read(reader, 4096)
            time.sleep(0.4)
        assert process.poll() == 0
        assert process.stdout is not None
        assert process.stdout.read() == as_json(RESULT)


def test_a_message_waits_for_the_reader_of_an_almost_full_terminal(
    cli: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 6.9: for a moment, so that it is whole."""
    monkeypatch.setattr(bus_containers, "_PATIENCE_SECONDS", LIMIT)  # on a busy machine, too
    with ExitStack() as stack:
        controller, end = almost_full(stack)
        shown = bytearray()

        def read() -> None:
            while b"\n" not in shown:
                shown.extend(os.read(controller, 65536))

        late_reader = threading.Timer(0.2, read)
        late_reader.start()
        cli("--no-color", "no-command", stderr=end)
        late_reader.join(LIMIT)
        assert shown.lstrip(b"x") == cli("no-command").err.replace(b"\n", b"\r\n")


# Runs a command as a shell's job in the background of a terminal that stops whoever writes there.
BACKGROUND = """
import os, pty, sys, termios
child, terminal = pty.fork()
if not child:
    modes = termios.tcgetattr(0)
    modes[3] |= termios.TOSTOP
    termios.tcsetattr(0, termios.TCSANOW, modes)
    job = os.fork()
    if not job:
        os.setpgid(0, 0)
        os.execv(sys.argv[1], sys.argv[1:])
    _, status = os.waitpid(job, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(job, 9)
    os._exit(99 if os.WIFSTOPPED(status) else os.WEXITSTATUS(status))
try:
    while os.read(terminal, 65536):
        pass
except OSError:
    pass
_, status = os.waitpid(child, 0)
sys.exit(os.WEXITSTATUS(status))
"""


def test_a_message_does_not_stop_a_job_in_the_background(
    program: Program, api: Api, tmp_path: Path
) -> None:
    """Its result was paid for, and would be lost where it is stopped past the deadline."""
    command = [sys.executable, "-c", BACKGROUND, *program.command]
    job = Program(command, program.home, tmp_path)
    assert job("-v", "-o", "out", *RUN, at=api.answers(RESULT)).code == 0
    assert (tmp_path / "out").read_bytes() == as_json(RESULT)


def test_a_message_to_the_other_end_of_a_terminal(cli: InProcess) -> None:
    """It is a terminal, too, but to open it once more would make another one."""
    with Terminal() as terminal:
        cli("--no-color", "no-command", stderr=terminal.controller)
        assert os.read(terminal.end, 65536) == cli("no-command").err


@pytest.mark.parametrize("is_read", [False, True], ids=["by nobody", "soon"])
def test_a_pipe_that_another_process_has_filled(
    is_read: bool, cli: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 6.9. It was writable a moment ago: here nobody knows, without `selectors`."""
    monkeypatch.setitem(sys.modules, "selectors", None)
    reader, writer = os.pipe()
    fill(writer)
    shown = bytearray()
    late_reader = threading.Timer(0.3, lambda: shown.extend(os.read(reader, 1 << 20)))
    # With a reader that comes late on a busy machine, too.
    monkeypatch.setattr(bus_containers, "_PATIENCE_SECONDS", LIMIT if is_read else 0.2)
    if is_read:
        late_reader.start()
    result = cli("no-command", stderr=writer)
    assert result.code == 2
    assert result.seconds < LIMIT / 2
    if is_read:
        late_reader.join(LIMIT)
    os.close(writer)
    with open(reader, "rb") as file:
        shown += file.read()
    assert shown.lstrip(b"x") == (cli("no-command").err if is_read else b"")


@second_tier
def test_a_message_that_was_cut_does_not_run_into_the_next_one(cli: InProcess) -> None:
    """Promise 3.9: each is a line of its own."""
    no = message(json.dumps(LONG_ERROR).encode(), "403 Forbidden")
    reader, writer = os.pipe()
    fill(writer)
    shown = bytearray(os.read(reader, 4096))
    release = threading.Event()

    def read() -> None:
        shown.extend(os.read(reader, 65536))
        release.set()  # now there is room for all of the second message
        while shown.count(b"\n") < 2:
            shown.extend(os.read(reader, 65536))

    late_reader = threading.Timer(1.5, read)
    late_reader.start()

    with Hostile(raw(no), held(release, no)) as server:
        cli("--error-format", "json", "delete", "a", "b", at=server, stderr=writer)
    late_reader.join(LIMIT)
    os.close(reader)
    os.close(writer)
    lines = shown.lstrip(b"x").splitlines()
    assert [json.loads(line)["status"] for line in lines] == [403, 403]


@second_tier
def test_the_container_s_words_come_after_a_message_that_was_cut(cli: InProcess) -> None:
    reader, writer = os.pipe()
    fill(writer)
    shown = bytearray(os.read(reader, 4096))
    late_reader = threading.Timer(1.5, lambda: shown.extend(read_to_end(reader)))
    late_reader.start()
    document = {**RESULT, "exit_code": 127, "stderr": "boom\n"}
    with Hostile(answer(json.dumps(document).encode())) as server:
        result = cli("-f", "text", "run", "y" * 5000, at=server, stderr=writer)
    assert result.code == 127
    os.close(writer)
    late_reader.join(LIMIT)
    lines = shown.lstrip(b"x").splitlines()
    assert lines[0].startswith(b"bus-containers: warning: ")
    assert lines[1] == b"boom"


def read_to_end(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def test_a_message_on_a_terminal_without_a_free_descriptor(
    cli: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be opened once more, and is written to as it is."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Terminal() as terminal, open(terminal.end, "w", closefd=False) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        try:
            code = bus_containers.main(["--no-color", "no-command"])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert code == 2
        assert terminal.read_all() == cli("no-command").err


# --- the same bytes with and without a terminal -----------------------------------------------


def test_a_result_on_a_terminal(cli: InProcess, api: Api) -> None:
    """Promise 3.13: the same bytes on a narrow terminal as in a file, without colour."""
    env: Env = {"TERM": "xterm-256color", "FORCE_COLOR": "1", "COLORTERM": "truecolor"}
    lines = [("-f", form, *words(name)) for name in api_commands() for form in ("text", "tsv")]
    for line in [*lines, ("status",), ("help",), ("run", "--help"), ("--version",)]:
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

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b2J\x90q\x9c\x7f\x08\x0b\x0e\x85\x00\r\nspoofed: all is well"
EVIL += "\u202e\u2066\u200b\u200d\u2028\u2029\ufeff\u061c\U000e0041"
VISIBLE = ("\\x1b", "\\x9b", "\\x7f", "\\x07", "\\x08", "\\x85", "\\u202e", "\\u2066", "\\u200b")
HEADER = "\x1b[2J\x9b\x07"
TOLD = dict.fromkeys(("message", "type", "action", "command", "recommended_plan"), EVIL)
USAGE = {"used": 1, "limit": 1, "window": EVIL, "meter_event_name": EVIL}
# The answer that would drive a terminal, and how often what would do so is to be seen.
DRIVEN: dict[str, tuple[bytes, int]] = {
    "denial": (message(json.dumps({"error": {**TOLD, "usage": USAGE}}).encode(), "402 No"), 6),
    "string": (message(json.dumps({"error": EVIL}).encode(), "500 No"), 1),
    "title": (message(f"<html><title>{EVIL}</title>".encode(), "500 No"), 0),
    "exit-code": (message(json.dumps({**RESULT, "exit_code": EVIL}).encode()), 1),
    "location": (message(b"", "302 No", f"Location: http://x/{HEADER}"), 1),
    "header": (message(b"{}", "400 No", f"X: {HEADER}"), 1),
    "reason": (message(b"", f"400 O{HEADER}K"), 1),
    "encoding": (message(b"{}", "200 OK", f"Content-Encoding: {HEADER}"), 1),
}


@pytest.mark.parametrize("name", DRIVEN)
def test_text_of_a_server_is_made_visible(name: str, cli: InProcess, api: Api) -> None:
    """Promise 3.18: control and format characters, line separators; tables: test_formats.py."""
    data, count = DRIVEN[name]
    shown = spoken(cli("--trace", *RUN, at=api.sends(data), env=XTERM).err).text
    assert not re.search("(?m)^spoofed", shown)
    for text in VISIBLE if name in ("denial", "string") else VISIBLE[:1]:
        assert shown.replace("\\u001b", "\\x1b").count(text) >= count, text
