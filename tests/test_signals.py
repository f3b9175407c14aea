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
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import bus_containers
from hostile import (
    Connection,
    FullPort,
    Hostile,
    NameServer,
    Script,
    answer,
    held,
    message,
    refused_port,
    silent,
    then_hold,
    why_no_name_server,
    with_files,
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
    api_commands,
    as_json,
    check_failure,
    python,
    skip_if,
    tiers,
    words,
)

RUN = ("run", "--", "true")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
BOTH = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)

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
@pytest.mark.parametrize("name", tiers(api_commands(), "run", "delete"))
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


OWN_PID = "import os, sys; print(os.getpid(), flush=True); os.execvp(sys.argv[1], sys.argv[1:])"


@BOTH
def test_a_shell_sees_the_usual_number(number: signal.Signals, program: Program) -> None:
    shell = wrapped(program, "sh", "-c", '"$@"; echo $?', "sh", sys.executable, "-c", OWN_PID)
    with Hostile(silent()) as server, shell.start("runs", at=server) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert server.reached.wait(LIMIT)
        os.kill(child, number)
        out, _ = process.communicate(timeout=LIMIT)
    assert out == b"%d\n" % SIGNALS[number]


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


def child_of(parent: int) -> int:
    [child] = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(child)


@BOTH
@pytest.mark.parametrize("place", tiers(["no-answer", "resolver"], "no-answer"))
def test_the_first_process_of_a_container_exits_with_the_number(
    place: str, number: signal.Signals, program: Program, tmp_path: Path
) -> None:
    """Promise 3.12: PID 1 cannot die of a signal, so it exits with 130 or 143."""
    skip_if("" if pid_namespace() else "no process namespace (unshare --pid) to be had")
    first = wrapped(program, *pid_namespace(), sys.executable, "-c", UNBLOCK)
    env: Env = {}
    with ExitStack() as stack:
        server = stack.enter_context(Hostile(silent()))
        reached = server.reached
        if place == "resolver":
            skip_if(why_no_name_server())
            names = stack.enter_context(NameServer(lambda _: None))
            reached, env = names.reached, {"BUS_AI_API_URL": "http://platform.test"}
            first.command = with_files(first.command, names.files(tmp_path))
        process = stack.enter_context(first.start(*RUN, at=server, env=env))
        assert reached.wait(LIMIT)
        os.kill(child_of(process.pid), number)
        result = stopped(process)
    check_failure(result, SIGNALS[number])
    advice = ADVICE if place == "no-answer" else ""
    assert result.message == f"bus-containers: {SAYS[number]}{advice}\n"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
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


@pytest.mark.parametrize("text", [(), ("by hand",), ("130",), (7,), ((),)], ids=repr)
def test_an_interrupt_of_the_hosts_own(text: tuple[Any, ...], cli: InProcess) -> None:
    """`main()` returns 130 for any KeyboardInterrupt, whatever it holds."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt(*text)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Hostile(silent()) as server:

            def ring() -> None:
                if server.reached.wait(LIMIT):
                    os.kill(os.getpid(), signal.SIGUSR1)

            ringing = threading.Thread(target=ring)
            ringing.start()
            result = cli(*RUN, at=server)
            ringing.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    check_failure(result, 130)
    assert result.message == f"bus-containers: interrupted{ADVICE}\n"


# --- shells and terminals ---------------------------------------------------------------------

CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def on_terminal(
    terminal: Terminal, program: Program, server: Hostile, *before: str, args: tuple[str, ...] = RUN
) -> subprocess.Popen[bytes]:
    """Start a command as the session of a terminal at which Ctrl-C can be typed."""
    modes = termios.tcgetattr(terminal.end)
    modes[3] |= termios.ISIG
    termios.tcsetattr(terminal.end, termios.TCSANOW, modes)
    other = wrapped(program, sys.executable, "-c", CONTROLLED, *before)
    end = terminal.end
    process = other.start(
        *args, at=server, env={"TERM": "xterm"}, stdin=end, stdout=end, stderr=end,
        start_new_session=True,
    )  # fmt: skip
    terminal.release()
    return process


LOOPS = {
    "bash-for": (["bash", "-c"], 'for i in 1 2 3; do "$@"; done; echo on'),
    "bash-while": (["bash", "-c"], 'n=0; while [ $n -lt 3 ]; do n=$((n+1)); "$@"; done; echo on'),
    "bash-list": (["bash", "-c"], '"$@"; "$@"; "$@"; echo on'),
    "bash-function": (["bash", "-c"], 'again() { "$@"; "$@"; }; again "$@"; echo on'),
    "sh-for": (["sh", "-c"], 'for i in 1 2 3; do "$@"; done; echo on'),
    "interactive": (["bash", "--norc", "-i", "-c"], 'for i in 1 2 3; do "$@"; done; echo on'),
}


@pytest.mark.parametrize("loop", tiers(LOOPS, "bash-for"))
def test_ctrl_c_ends_the_shells_loop_too(loop: str, program: Program) -> None:
    """Promise 3.12: no further run is started, and paid for."""
    shell, script = LOOPS[loop]
    skip_if("" if shutil.which(shell[0]) else f"no {shell[0]} here")
    with (
        Terminal(200) as terminal,
        Hostile(silent(), answer(BODIES["run"])) as server,
        on_terminal(terminal, program, server, *shell, script, "shell") as process,
    ):
        assert server.reached.wait(LIMIT)
        os.write(terminal.controller, b"\x03")
        shown = terminal.read_all()
        process.wait(LIMIT)
    assert server.methods() == ["POST"]
    assert b"interrupted" in shown
    assert b"bus-containers delete" in shown
    assert b"\non" not in shown


@pytest.mark.parametrize("times", tiers([1, 2, 5], 2))
def test_ctrl_c_typed_at_the_terminal(times: int, program: Program) -> None:
    """However often it is typed, the whole message is there, once."""
    with (
        Terminal(300) as terminal,
        Hostile(silent()) as server,
        on_terminal(terminal, program, server) as process,
    ):
        assert server.reached.wait(LIMIT)
        os.write(terminal.controller, b"\x03" * times)
        terminal.read_all()
        process.wait(LIMIT)
    assert process.returncode == -signal.SIGINT
    text = terminal.shown.decode()
    assert text.count(f"interrupted{ADVICE}") == 1
    assert "Traceback" not in text


# --- two signals ------------------------------------------------------------------------------

PAIRS = [(first, second) for first in SIGNALS for second in SIGNALS]


@pytest.mark.parametrize(
    "pair", tiers(PAIRS, PAIRS[1], ids=lambda pair: "-".join(number.name for number in pair))
)
@pytest.mark.parametrize("place", ["answer", "connecting", "pause", "half-an-answer"])
def test_two_signals_at_once(
    place: str, pair: tuple[signal.Signals, signal.Signals], program: Program
) -> None:
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
            result = stopped(process, *pair)
    [error] = [one for one in result.objects if one["kind"] == "interrupted"]
    sent = place not in urls
    assert -result.code in pair
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
url, mode, tries, dice = sys.argv[2], sys.argv[3], int(sys.argv[4]), random.Random(sys.argv[5])

class Thing:
    pass

def attempt(number, step=0):
    signals = dice.choices([signal.SIGINT, signal.SIGTERM], k=2)
    steps = 0
    def hit(*_):
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        for each in signals:
            os.kill(os.getpid(), each)
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

if mode != "outside":
    total = int(json.loads(attempt(0)[-1].splitlines()[-1])["text"])
    first = 30 if mode == "steps" else 400  # before that the signals are Python's
    edges = [first + (total - first) * n // tries for n in range(tries + 1)]
    steps = [dice.randint(edges[n], edges[n + 1] - 1) for n in range(tries)]
    print(json.dumps([attempt(n + 1, step) for n, step in enumerate(steps)]))
else:
    print(json.dumps([attempt(n + 1) for n in range(tries)]))
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


@pytest.mark.parametrize("version", tiers(["this", "3.9", "3.13"], "this"))
@pytest.mark.parametrize("mode", ["outside", "steps", "callback"])
def test_two_signals_at_any_moment(mode: str, version: str, cli: InProcess) -> None:
    """Promises 6.2, 6.3 and 6.10: nothing is sent after "not sent"; no advice or signal is lost."""
    path = str(Path(bus_containers.__file__ or "").parent)
    this = version == "this"
    tries = 40 if this else 500 if mode == "outside" else 150
    command = [sys.executable if this else python(version), "-c", FORKING, path]
    seen: dict[str, bytes] = {}
    with Hostile(recorder(seen, b"" if mode == "outside" else message(BODIES["run"]))) as server:
        done = subprocess.run(
            [*command, server.url, mode, str(tries), "seed"],
            env=cli.env(BUS_AI_TOKEN=CANARY),
            capture_output=True,
            timeout=LIMIT * 5,
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
    assert missed <= tries / 20


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


@BOTH
@pytest.mark.parametrize("kind", ["weakref", "destructor", "half made"])
@pytest.mark.parametrize(
    "args", tiers([RUN, ("status", "--wait", "60s"), ("runs",)], RUN, ids=lambda args: args[0])
)
def test_a_signal_whose_handler_runs_inside_a_callback(
    args: tuple[str, ...], kind: str, number: signal.Signals, program: Program
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
