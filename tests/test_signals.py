# SPDX-License-Identifier: MIT
"""Ctrl-C and SIGTERM, as a shell, a supervisor and a container see them: promises 3.12, 6.2, 6.10.

Also what is reported of a run that was given up: 6.3, 6.4. The places where a call may be when a
signal comes are tried in test_nothing_hangs.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import bus_containers
from hostile import (
    Connection,
    FullPort,
    Hostile,
    Script,
    answer,
    held,
    message,
    refused_port,
    silent,
    steps,
    then_hold,
)
from support import (
    BODIES,
    CANARY,
    DOCUMENTS,
    LIMIT,
    Env,
    InProcess,
    Program,
    Result,
    Terminal,
    as_json,
    check_failure,
    skip_if,
    tiers,
    words,
)

RUN = ("run", "--", "true")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
NAMES = {number.name: number for number in SIGNALS}
BOTH = pytest.mark.parametrize("number", NAMES.values(), ids=NAMES)

# What is said, each beginning with the name of the program.
ADVICE = (
    "; the run may still be executing and counting against the quota: look with "
    "`bus-containers runs`, end it with `bus-containers delete RUN_ID`"
)
SAYS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def wrapped(program: Program, *before: str) -> Program:
    """The program, started by other words."""
    other = Program([*before, *program.command], program.home, program.folder)
    other.environ = program.environ
    return other


def stopped(process: subprocess.Popen[bytes], *numbers: int) -> Result:
    """Send signals to a process, one right after the other, and wait for its end."""
    try:
        for number in numbers:
            process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
    except BaseException:
        process.kill()
        raise
    return Result(process.returncode, out, err, 0)


# --- one signal -------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", ["run", "delete"])
def test_a_signal_is_told_and_then_died_of(
    name: str, number: signal.Signals, program: Program
) -> None:
    """Promises 3.12 and 6.3: a shell sees 130 or 143, and that it was a signal."""
    with Hostile(silent()) as server, program.start(*words(name), at=server) as process:
        assert server.reached.wait(LIMIT)
        result = stopped(process, number)
    check_failure(result, -number)
    advice = ADVICE if name == "run" else ""
    assert result.message == f"bus-containers: {SAYS[number]}{advice}\n"


@cache
def pid_namespace() -> tuple[str, ...]:
    """What to put before a command that is to be the first process; empty where that cannot be."""
    for before in (["unshare"], ["unshare", "-r"]):
        command = (*before, "--pid", "--fork", "--kill-child")
        try:
            probe = subprocess.run([*command, "true"], capture_output=True, timeout=LIMIT)
        except (OSError, subprocess.SubprocessError):
            continue
        if probe.returncode == 0:
            return command
    return ()


# unshare of Debian 11 leaves its child with signals blocked or ignored.
UNBLOCK = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execv(sys.argv[1], sys.argv[1:])
"""


@BOTH
def test_the_first_process_of_a_container_exits_with_the_number(
    number: signal.Signals, program: Program
) -> None:
    """Promise 3.12: PID 1 cannot die of a signal, so it exits with 130 or 143."""
    skip_if("" if pid_namespace() else "no process namespace (unshare --pid) to be had")
    first = wrapped(program, *pid_namespace(), sys.executable, "-c", UNBLOCK)
    with Hostile(silent()) as server, first.start(*RUN, at=server) as process:
        assert server.reached.wait(LIMIT)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), number)
        result = stopped(process)
    check_failure(result, SIGNALS[number])
    assert result.message == f"bus-containers: {SAYS[number]}{ADVICE}\n"


@BOTH
def test_a_signal_that_was_ignored_stays_ignored(number: signal.Signals, program: Program) -> None:
    """Promise 3.12, as in the background of a script and under nohup."""
    release = threading.Event()
    name = number.name[3:]
    ignoring = wrapped(program, "sh", "-c", f'trap "" {name}; exec "$@"', "sh")
    with (
        Hostile(held(release, message(BODIES["run"]))) as server,
        ignoring.start(*RUN, at=server) as process,
    ):
        assert server.reached.wait(LIMIT)
        process.send_signal(number)
        release.set()
        result = stopped(process)
    assert result[:3] == (0, as_json(DOCUMENTS["run"]), b"")


# --- shells and terminals ---------------------------------------------------------------------

CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def type_ctrl_c(times: int, program: Program, server: Hostile, *before: str) -> tuple[int, str]:
    """Run a command as the session of a terminal, type Ctrl-C there: exit code, what it showed."""
    other = wrapped(program, sys.executable, "-c", CONTROLLED, *before)
    with Terminal(300) as terminal:
        end = terminal.end
        modes = termios.tcgetattr(end)
        modes[3] |= termios.ISIG
        termios.tcsetattr(end, termios.TCSANOW, modes)
        with other.start(
            *RUN, at=server, stdin=end, stdout=end, stderr=end, start_new_session=True
        ) as process:
            try:
                terminal.release()
                assert server.reached.wait(LIMIT)
                os.write(terminal.controller, b"\x03" * times)
                shown = terminal.read_all().decode()
                return process.wait(LIMIT), shown
            finally:
                process.kill()


LOOP = 'for i in 1 2 3; do "$@"; done; echo on'
SHELLS = ["sh -c", "bash -c", "bash --norc -i -c"]


@pytest.mark.parametrize("shell", tiers(SHELLS, "bash -c"))
def test_ctrl_c_ends_the_shells_loop_too(shell: str, program: Program) -> None:
    """Promise 3.12: no further run is started, and paid for."""
    skip_if("" if shutil.which(shell.split()[0]) else f"no {shell} here")
    with Hostile(silent(), answer(BODIES["run"])) as server:
        _, shown = type_ctrl_c(1, program, server, *shell.split(), LOOP, "shell")
        assert server.methods() == ["POST"]
    assert "interrupted" in shown
    assert "bus-containers delete" in shown
    assert "\non" not in shown


def test_ctrl_c_typed_twice_at_the_terminal(program: Program) -> None:
    """However often it is typed, the whole message is there, once."""
    with Hostile(silent()) as server:
        code, shown = type_ctrl_c(2, program, server)
    assert code == -signal.SIGINT
    assert shown.count(f"interrupted{ADVICE}") == 1
    assert "Traceback" not in shown


# --- two signals ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["answer", "connecting", "pause", "half-an-answer"])
def test_two_signals_at_once(place: str, program: Program) -> None:
    """Promises 6.2 and 6.3: what is reported is the final state, with its advice."""
    options = ("--error-format", "json", "--timeout", "60s")
    script = then_hold(b"HTTP/1.1 200 OK\r\n") if place == "half-an-answer" else silent()
    with Hostile(script) as server, FullPort() as full, refused_port() as port:
        urls = {"connecting": full.url, "pause": f"http://127.0.0.1:{port}"}
        env: Env = {"BUS_AI_API_URL": urls.get(place, server.url)}
        note = ("-v",) if place == "pause" else ()
        with program.start(*options, *note, *RUN, at=server, env=env) as process:
            if place == "connecting":
                assert full.await_client()
            elif place == "pause":
                assert process.stderr is not None
                while b"trying again" not in process.stderr.readline():
                    assert process.poll() is None
            else:
                assert server.reached.wait(LIMIT)
            # Both are there when it goes on: a busy machine may take long between two kills.
            result = stopped(process, signal.SIGSTOP, *SIGNALS, signal.SIGCONT)
    [error] = [one for one in result.objects if one["kind"] == "interrupted"]
    sent = place not in urls
    assert -result.code in [*SIGNALS]
    assert error["text"].startswith(SAYS[signal.Signals(-result.code)])
    assert error["run_state"] == ("unknown" if sent else "not_sent")
    assert (ADVICE in error["text"]) == sent
    assert server.methods() == (["POST"] if sent else [])


# Each try is a forked process, which takes milliseconds. Either it is hit from outside, a moment
# after it says that it is about to connect, by two signals some microseconds apart; or it hits
# itself at the n-th step of its work, by two at once: the second is there while the handler of the
# first runs. Or it does so inside a weakref's callback, from where no exception gets anywhere. The
# number of the try is in the path of its requests.
FORKING = """
import argparse, http.client, json, os, random, signal, ssl, sys, time, weakref
sys.path.insert(0, sys.argv[1])
import bus_containers
url, mode, tries, dice = sys.argv[2], sys.argv[3], int(sys.argv[4]), random.Random("seed")

class Thing:
    pass

def attempt(number, step=0):
    signals = dice.choices([signal.SIGINT, signal.SIGTERM], k=2)
    steps = 0
    def hit(*_):
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:  # a thread that looks up a name may get the first before the second is sent
            for each in signals:
                os.kill(os.getpid(), each)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    held = [Thing()]
    reference = weakref.ref(held[0], hit)
    def count(frame, event, argument):
        nonlocal steps
        steps += 1
        if steps == step:
            sys.setprofile(None)
            hit() if mode == "steps" else held.clear()
        elif argument is os._exit:  # there may be fewer steps than were counted
            os.write(2, b'{"kind": "not hit", "text": "%d"}\\n' % steps)
    out, err = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(out[1], 1), os.dup2(err[1], 2)
        sys.argv[1:] = ["-v", "--error-format", "json", "--api-url", url + "/%d" % number,
                        "run", "--", "true"]
        if mode != "outside":
            sys.setprofile(count)
        bus_containers.console()
    reference = None  # its callback is the child's alone
    os.close(out[1]), os.close(err[1])
    said = b""
    if mode == "outside":
        said = os.read(err[0], 65536)
        time.sleep(dice.uniform(0, 0.004))
        for each in signals:
            os.kill(child, each)
            time.sleep(dice.choice([0, 0, 0.00005, 0.0005]))
    said += open(err[0], "rb").read()
    printed = open(out[0], "rb").read()
    _, status = os.waitpid(child, 0)
    return [number, step, [int(each) for each in signals], status, printed.decode(), said.decode()]

steps = [0] * tries
if mode != "outside":
    total = int(json.loads(attempt(0)[-1].splitlines()[-1])["text"])
    first = 30 if mode == "steps" else 400  # before that the signals are Python's
    edges = [first + (total - first) * n // tries for n in range(tries + 1)]
    steps = [dice.randint(edges[n], edges[n + 1] - 1) for n in range(tries)]
print(json.dumps([attempt(n + 1, step) for n, step in enumerate(steps)]))
"""


def parsed(line: str) -> dict[str, Any]:
    """An object on standard error; what is not one is of a kind that no test expects."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {"kind": line, "text": ""}


def recorder(seen: dict[str, bytes], data: bytes) -> Script:
    """Keep whatever comes, by the first part of its path; send this once a request is whole."""

    def script(connection: Connection) -> None:
        got = b""
        while piece := connection.sock.recv(65536):
            got += piece
            name = got.split(b"/", 2)[1].decode() if got.count(b"/") > 1 else ""
            seen[name] = got
            if data and got.endswith(b"}"):
                connection.send(data)
                return

    return script


@pytest.mark.parametrize("tries", tiers([15, 100], 15))
@pytest.mark.parametrize("mode", ["outside", "steps", "callback"])
def test_two_signals_at_any_moment(mode: str, tries: int, cli: InProcess) -> None:
    """Promises 6.2, 6.3 and 6.10: nothing is sent after "not sent"; no advice or signal is lost."""
    path = str(Path(bus_containers.__file__ or "").parent)
    command = [sys.executable, "-c", FORKING, path]
    seen: dict[str, bytes] = {}
    with Hostile(recorder(seen, b"" if mode == "outside" else message(BODIES["run"]))) as server:
        done = subprocess.run(
            [*command, server.url, mode, str(tries)],
            env=cli.env(BUS_AI_TOKEN=CANARY),
            capture_output=True,
            timeout=LIMIT * 15,
        )
    assert done.stderr == b""
    lies, missed = [], 0
    for number, step, signals, status, out, err in json.loads(done.stdout):
        posts = seen.get(str(number), b"").count(b"POST ")
        objects = [parsed(line) for line in err.splitlines()]
        told = [one for one in objects if one["kind"] != "verbose"]
        state = told[0].get("run_state") if told else None
        if [one["kind"] for one in told] == ["not hit"]:
            missed += 1
            continue
        fine = (
            os.WIFSIGNALED(status)
            and os.WTERMSIG(status) in signals
            and (not told or told[0]["text"].startswith(SAYS[signal.Signals(os.WTERMSIG(status))]))
            and [one["kind"] for one in told] in (["interrupted"], [])
            and (state != "not_sent" or posts == 0)
            and (state == "unknown") == (bool(told) and "bus-containers delete" in told[0]["text"])
            and (bool(told) or mode != "outside")
            and (bool(told) or posts == 0 or out == as_json(DOCUMENTS["run"]).decode())
            and posts <= 1
        )
        if not fine:
            lies.append((step, signals, status, posts, out, err))
    assert lies == []
    assert missed <= tries / 4


# --- where Python runs a handler --------------------------------------------------------------

# SIGUSR1 makes the main thread drop an object, wherever it is, and what that calls is what gets the
# signal: an exception from there is printed as "Exception ignored in", and goes no further. What is
# half made when the signal comes has a destructor that fails, as http.client.HTTPResponse's does.
INSIDE = """
import os, runpy, signal, sys, weakref
class Thing:
    pass
class Destroyed:
    def __del__(self):
        hit()
class HalfMade:
    def __init__(self):
        hit()
        self.made = True
    def __del__(self):
        self.made
def hit(*_):
    signal.raise_signal(number)
def drop(*_):
    del held[:]
    if kind == "half made":
        HalfMade()
number, kind, *sys.argv = int(sys.argv[1]), *sys.argv[2:]
held = [Destroyed() if kind == "destructor" else Thing()]
reference = weakref.ref(held[0], hit) if kind == "weakref" else None
signal.signal(signal.SIGUSR1, drop)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# The signal comes while an error is put into words.
AMID_AN_ERROR = """
import os, runpy, signal, sys
def hit(frame, event, argument):
    if frame.f_code.co_name == "as_document":
        sys.setprofile(None)
        signal.raise_signal(signal.SIGTERM)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
sys.setprofile(hit)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_signal_amid_an_error_takes_no_message_away(program: Program) -> None:
    """Promise 6.10."""
    amid = Program([sys.executable, "-c", AMID_AN_ERROR, program.command[-1]], program.home)
    with Hostile(steps(Connection.read_request)) as server:
        result = amid(*RUN, at=server)
    check_failure(result, -signal.SIGTERM, "the connection was lost")
    assert result.spoken.advises


@pytest.mark.parametrize(
    ("kind", "number", "args"),
    [
        ("weakref", signal.SIGINT, RUN),
        ("destructor", signal.SIGTERM, RUN),
        ("half made", signal.SIGINT, RUN),
        ("weakref", signal.SIGTERM, ("status", "--wait", "60s")),
    ],
)
def test_a_signal_whose_handler_runs_inside_a_callback(
    kind: str, number: signal.Signals, args: tuple[str, ...], program: Program
) -> None:
    """Promise 6.10: no signal is lost."""
    command = program.command[-1]
    inside = Program([sys.executable, "-c", INSIDE, str(int(number)), kind, command], program.home)
    starting = answer(b'{"items":[{"id":"runner","state":"starting"}]}')
    scripts = [starting, starting, silent()] if "--wait" in args else [silent()]
    with Hostile(*scripts) as server, inside.start(*args, at=server) as process:
        assert server.reached.wait(LIMIT)
        result = stopped(process, signal.SIGUSR1)
    check_failure(result, -number, SAYS[number])
    assert result.spoken.advises == (args == RUN)
