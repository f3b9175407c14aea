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
import socket
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pytest

import bus_containers
from hostile import (
    AlertingTls,
    Api,
    Certificates,
    Connection,
    FullPort,
    Hostile,
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
    fill,
    second_tier,
    skip_if,
    tiers,
    words,
)

RUN = ("run", "--", "true")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}

# What is said, each beginning with the name of the program.
ADVICE = (
    "; the run may still be executing and counting against the quota: look with "
    "`bus-containers runs`, end it with `bus-containers delete RUN_ID`"
)
SAYS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def wrapped(program: Program, *before: str) -> Program:
    """The program, started by other words."""
    return Program([*before, *program.command], program.home, program.folder)


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


@pytest.mark.parametrize(
    ("name", "number", "says"),
    [
        ("run", signal.SIGINT, f"interrupted{ADVICE}"),
        ("run", signal.SIGTERM, f"terminated{ADVICE}"),
        ("delete", signal.SIGTERM, "terminated"),
    ],
)
def test_a_signal_is_told_and_then_died_of(
    name: str, number: signal.Signals, says: str, program: Program
) -> None:
    """Promises 3.12 and 6.3: a shell sees 130 or 143, and that it was a signal."""
    with Hostile(silent()) as server, program.start(*words(name), at=server) as process:
        assert server.reached.wait(LIMIT)
        result = stopped(process, number)
    check_failure(result, -number)
    assert result.message == f"bus-containers: {says}\n"


# unshare of Debian 11 leaves its child with signals blocked or ignored.
UNBLOCK = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("number", tiers(SIGNALS, signal.SIGTERM))
def test_the_first_process_of_a_container_exits_with_the_number(
    number: signal.Signals, program: Program
) -> None:
    """Promise 3.12: PID 1 cannot die of a signal, so it exits with 130 or 143."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if os.geteuid() != 0:
        unshare.append("--map-root-user")
    probe = subprocess.run(["sh", "-c", '"$@" true', "sh", *unshare], capture_output=True)
    skip_if(f"no process namespace to be had: {probe.stderr!r}" if probe.returncode else "")
    first = wrapped(program, *unshare, sys.executable, "-c", UNBLOCK)
    with Hostile(silent()) as server, first.start(*RUN, at=server) as process:
        assert server.reached.wait(LIMIT)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), number)
        result = stopped(process)
    check_failure(result, SIGNALS[number])
    assert result.message == f"bus-containers: {SAYS[number]}{ADVICE}\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_stays_ignored(number: signal.Signals, program: Program) -> None:
    """Promise 3.12, as in the background of a script and under nohup."""
    release = threading.Event()
    script = f'trap "" {number.name[3:]}; exec "$@"'
    ignoring = wrapped(program, "sh", "-c", script, "sh")
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


LOOP = 'for i in 1 2 3; do "$@"; done; echo on'
SHELLS = ["sh -c", "bash -c", "bash --norc -i -c"]


@pytest.mark.parametrize("shell", tiers(SHELLS, "bash -c"))
def test_ctrl_c_typed_twice_ends_the_shells_loop_too(shell: str, program: Program) -> None:
    """Promise 3.12: no further run is started, and paid for; the whole message is there, once."""
    before = [*shell.split(), LOOP, "shell"]
    skip_if("" if shutil.which(before[0]) else f"no {shell} here")
    loop = wrapped(program, sys.executable, "-c", CONTROLLED, *before)
    with Hostile(silent(), answer(BODIES["run"])) as server, Terminal(300) as terminal:
        end = terminal.end
        modes = termios.tcgetattr(end)
        modes[3] |= termios.ISIG
        termios.tcsetattr(end, termios.TCSANOW, modes)
        streams: dict[str, Any] = {"stdin": end, "stdout": end, "stderr": end}
        with loop.start(*RUN, at=server, start_new_session=True, **streams) as process:
            try:
                terminal.release()
                assert server.reached.wait(LIMIT)
                os.write(terminal.controller, b"\x03" * 2)
                shown = terminal.read_all().decode()
                process.wait(LIMIT)
            finally:
                process.kill()
        assert server.methods() == ["POST"]
    assert shown.count(f"interrupted{ADVICE}") == 1
    assert "Traceback" not in shown
    assert "\non" not in shown


# --- two signals ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["connecting", "pause", "half-an-answer"])
def test_two_signals_at_once(place: str, program: Program) -> None:
    """Promises 6.2 and 6.3: what is reported is the final state, with its advice."""
    half = then_hold(b"HTTP/1.1 200 OK\r\n")
    with Hostile(half) as server, FullPort() as full, refused_port() as port:
        urls = {"connecting": full.url, "pause": f"http://127.0.0.1:{port}"}
        env: Env = {"BUS_AI_API_URL": urls.get(place, server.url)}
        options = ("-v", "--error-format", "json", "--timeout", "60s")
        with program.start(*options, *RUN, at=server, env=env) as process:
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
    assert -result.code in SIGNALS
    assert error["text"].startswith(SAYS[signal.Signals(-result.code)])
    assert error["run_state"] == ("unknown" if sent else "not_sent")
    assert (ADVICE in error["text"]) == sent
    assert server.methods() == (["POST"] if sent else [])


# Each try is a forked process, which takes milliseconds. At the n-th step of its work it hits
# itself by two signals at once: the second is there while the handler of the first runs. Or it does
# so inside a weakref's callback, from where no exception gets anywhere, and in a constructor there:
# what is half made has a destructor that fails, as http.client.HTTPResponse's does. The number of
# the try is in the path of its requests. A line on standard error that is no JSON fails the test.
FORKING = """
import argparse, http.client, json, os, random, signal, ssl, sys, weakref
sys.path.insert(0, sys.argv[1])
import bus_containers
url, mode, tries, dice = sys.argv[2], sys.argv[3], int(sys.argv[4]), random.Random("seed")

class Thing:
    pass

class HalfMade:
    def __init__(self, hit):
        hit()
        self.made = True
    def __del__(self):
        self.made

def attempt(number, step=0):
    signals = dice.choices([signal.SIGINT, signal.SIGTERM], k=2)
    steps = 0
    def hit():
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:  # a thread that looks up a name may get the first before the second is sent
            for each in signals:
                os.kill(os.getpid(), each)
        finally:
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            finally:  # again, as the handler of the first may come amid the first time
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    held = [Thing()]
    reference = weakref.ref(held[0], lambda _: HalfMade(hit))
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
        sys.argv[1:] = ["--error-format", "json", "--api-url", url + "/%d" % number,
                        "run", "--", "true"]
        sys.setprofile(count)
        bus_containers.console()
    reference = None  # its callback is the child's alone
    os.close(out[1]), os.close(err[1])
    said = [json.loads(line) for line in open(err[0])]
    printed = open(out[0]).read()
    return [number, step, os.waitpid(child, 0)[1], printed, *said]

total = int(attempt(0)[-1]["text"])
first = 30 if mode == "steps" else 400  # before that the signals are Python's
edges = [first + (total - first) * n // tries for n in range(tries + 1)]
steps = [dice.randint(edges[n], edges[n + 1] - 1) for n in range(tries)]
print(json.dumps([attempt(n + 1, step) for n, step in enumerate(steps)]))
"""


def check_told(posts: int, status: int, out: str, *told: dict[str, Any]) -> None:
    """A run that was hit by two signals: the requests it sent, how it ended, what it said."""
    assert os.WIFSIGNALED(status)
    number = signal.Signals(os.WTERMSIG(status))
    assert number in SIGNALS
    assert posts <= 1
    if not told:  # the signals came when all was done, or before anything was
        assert posts == 0 or out == as_json(DOCUMENTS["run"]).decode()
        return
    [one] = told
    assert one["kind"] == "interrupted"
    assert one["text"].startswith(SAYS[number])
    assert one["run_state"] != "not_sent" or posts == 0
    assert (one["run_state"] == "unknown") == ("bus-containers delete" in one["text"])


@pytest.mark.parametrize("tries", tiers([10, 100], 10))
@pytest.mark.parametrize("mode", ["steps", "callback"])
def test_two_signals_at_any_moment(mode: str, tries: int, cli: InProcess) -> None:
    """Promises 6.2, 6.3 and 6.10: nothing is sent after "not sent"; no advice or signal is lost."""
    seen: list[bytes] = []  # what came first on each connection, be it whole or not

    def script(connection: Connection) -> None:
        seen.append(connection.sock.recv(65536))
        last = seen[-1]
        while last and not last.endswith(b"}"):
            last = connection.sock.recv(65536)
        connection.send(message(BODIES["run"]))

    path = str(Path(bus_containers.__file__ or "").parent)
    with Hostile(script) as server:
        done = subprocess.run(
            [sys.executable, "-c", FORKING, path, server.url, mode, str(tries)],
            env=cli.env(BUS_AI_TOKEN=CANARY),
            capture_output=True,
            timeout=LIMIT * 15,
        )
    assert done.stderr == b""
    outcomes = json.loads(done.stdout)
    hits = [row for row in outcomes if "not hit" not in [one["kind"] for one in row[4:]]]
    assert len(hits) >= tries * 0.75
    for number, step, status, out, *told in hits:
        posts = sum(data.startswith(b"POST /%d/" % number) for data in seen)
        try:
            check_told(posts, status, out, *told)
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"at step {step}: {posts} {status} {out} {told}") from error


# Where the program's handler is not there yet, Ctrl-C raises this, and Python drops it, too.
DROPPED = """
import http.client, os, sys
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import bus_containers
class Dropped:
    def __del__(self):
        raise KeyboardInterrupt
def begin(response, begin=http.client.HTTPResponse.begin):
    Dropped()
    begin(response)
http.client.HTTPResponse.begin = begin
bus_containers.console()
"""


def test_an_interrupt_that_python_drops(program: Program, api: Api) -> None:
    """Promise 6.10."""
    command = [sys.executable, "-c", DROPPED, str(bus_containers.__file__)]
    result = Program(command, program.home)(*RUN, at=api)
    assert check_failure(result, -signal.SIGINT) == f"bus-containers: interrupted{ADVICE}"


REPLACED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    raise TypeError("expected a message argument") from None
"""


@pytest.mark.parametrize("name", ["ipaddress", "http"])
def test_an_interrupt_that_python_replaces(
    name: str, program: Program, api: Api, tmp_path: Path
) -> None:
    """As 3.12 may do while it imports. Promise 6.10."""
    (tmp_path / f"{name}.py").write_text(REPLACED)
    result = program(*RUN, at=api, env={"PYTHONPATH": str(tmp_path)})
    assert check_failure(result, -signal.SIGINT) == "bus-containers: interrupted"
    assert api.requests == []


# The signal comes when a function of this name, with such a variable, is called or returns.
HIT = """
import os, runpy, signal, sys
def hit(frame, event, argument):
    code = frame.f_code
    if (code.co_name, event) == (name, when) and variable in code.co_varnames:
        sys.setprofile(None)
        signal.raise_signal(signal.SIGTERM)
_, when, name, variable, *sys.argv = sys.argv
sys.path.insert(0, os.path.dirname(sys.argv[0]))
sys.setprofile(hit)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def hit_at(program: Program, when: str, name: str, variable: str = "self") -> Program:
    command = [sys.executable, "-c", HIT, when, name, variable, program.command[-1]]
    return Program(command, program.home)


MOMENTS = {
    "receive_run": "self", "_is_writable": "descriptor",  # the latter amid a warning
    "fetch": "self", "_run": "args",
}  # fmt: skip


@pytest.mark.parametrize("name", tiers(MOMENTS, "receive_run", "_is_writable"))
def test_a_signal_between_an_answer_and_its_writing(
    name: str, program: Program, api: Api
) -> None:
    """Promise 6.3: what came of the run is told, and no advice that it may be going on."""
    api.answers({**DOCUMENTS["run"], "run_id": "run-1", "exit_code": 127})
    result = hit_at(program, "return", name, MOMENTS[name])(*RUN, at=api)
    assert (result.code, result.out) == (-signal.SIGTERM, b"")
    assert result.message.endswith("terminated; run run-1 ended with exit code 127\n")


def test_a_signal_between_an_error_and_its_message(program: Program) -> None:
    """Promise 6.3."""
    before = hit_at(program, "call", "error", "command")
    with Hostile(steps(Connection.read_request)) as server:
        result = before(*RUN, at=server)
    assert check_failure(result, -signal.SIGTERM) == f"bus-containers: terminated{ADVICE}"


def test_a_signal_after_the_last_deletion(program: Program, api: Api) -> None:
    """Promise 6.14: what was deleted is printed."""
    result = hit_at(program, "return", "_delete", "args")("delete", "a", at=api)
    assert result.code == -signal.SIGTERM
    assert json.loads(result.out)["run_id"] == "a"


def test_a_signal_amid_the_list_of_deletions(program: Program, api: Api) -> None:
    """Promise 6.14: it is cut, so the message has it."""
    amid = hit_at(program, "call", "_write_all", "pieces")
    result = amid("delete", "a", "b", at=api)
    assert (result.code, result.out) == (-signal.SIGTERM, b"")
    assert result.message == "bus-containers: terminated; deleted: a b\n"


def test_a_signal_amid_deletions_whose_list_nobody_reads(program: Program) -> None:
    """Promise 6.14: the message comes before the list, which may have to wait."""
    reader, writer = os.pipe()
    fill(writer)
    with Hostile(answer(b"{}"), silent()) as server:
        process = program.start("delete", "a", "b", at=server, stdout=writer)
        assert server.reached.wait(LIMIT)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert process.stderr.readline() == b"bus-containers: terminated; deleted: a\n"
        process.kill()
        process.communicate()
    os.close(reader)
    os.close(writer)


# The signal comes amid a message, written somewhere within the first function. If the second one,
# of C or of Python, is called after it, the process ends with 99.
NO_MORE = """
import os, runpy, signal, sys
_, within, never, *sys.argv = sys.argv
def watch(frame, event, called):
    global is_over
    name = called.__name__ if event == "c_call" else frame.f_code.co_name
    if is_over and name == never and event in ("call", "c_call"):
        os._exit(99)
    if is_over or (event, name) != ("call", "_write_in_time"):
        return
    while frame is not None and frame.f_code.co_name != within:
        frame = frame.f_back
    if frame is not None:
        is_over = True
        signal.raise_signal(signal.SIGTERM)
is_over = False
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import bus_containers
if within == "_wait_for":
    bus_containers._STILL_RUNNING_SECONDS = 0
sys.setprofile(watch)
bus_containers.console()
"""
# That function, the one that is not called, and the command.
AMID: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "progress": ("_wait_for", "send", RUN),
    "explanation": ("_converse", "_parse_json", ("-v", *RUN)),
    "warning": ("_parse_body", "_parse_json", RUN),
    "error": ("_delete", "start_new_thread", ("delete", "a", "b")),  # of a look-up's thread
    "limit": ("_run", "start_new_thread", ("--timeout=5s", "--timeout-seconds=9", *RUN)),
    "end": ("run_ended", "_write_stream", ("-f", "text", *RUN)),
}


def amid_a_message(program: Program, within: str, never: str) -> Program:
    command = [sys.executable, "-c", NO_MORE, within, never, program.command[-1]]
    return Program(command, program.home)


@pytest.mark.parametrize("name", tiers(AMID, "progress", "limit"))
def test_a_signal_amid_a_message_is_seen_right_after_it(
    name: str, program: Program, api: Api
) -> None:
    """Promises 6.2, 6.10: before a send, a look-up or the parsing of a large answer."""
    within, never, line = AMID[name]
    api.answers(b'{"exit_code": 0, "stderr": "\xff%s"}' % (b"x" * (1 << 20)))
    result = amid_a_message(program, within, never)(*line, at=api)
    assert result.code == -signal.SIGTERM
    assert len(api.requests) == (name not in ("progress", "limit"))


@pytest.mark.parametrize("within", tiers(["_converse", "_parse_body"], "_converse"))
def test_a_signal_amid_a_message_about_an_answer(within: str, program: Program, api: Api) -> None:
    """Promises 6.3, 6.14: the answer is there, and small, so it is told first what it says."""
    amid = amid_a_message(program, within, "none")
    api.answers(b'{"run_id": "r", "exit_code": 0, "stderr": "\xff"}')
    result = amid("-v", *RUN, at=api)
    assert result.code == -signal.SIGTERM
    assert result.message.endswith("terminated; run r ended with exit code 0\n")
    api.answers(b'{"deleted": true, "run_id": "a", "note": "\xff"}')
    result = amid("-v", "delete", "a", "b", at=api)
    assert result.code == -signal.SIGTERM
    assert result.message.endswith("terminated; deleted: a\n")
    assert [document["run_id"] for document in json.loads(result.out)] == ["a"]


def test_a_signal_amid_a_line_of_many(program: Program, api: Api) -> None:
    """Promise 6.10: the others do not hold it up, should their reader be slow."""
    amid = amid_a_message(program, "_end_head", "none")
    result = amid("--trace", *RUN, at=api)
    assert result.code == -signal.SIGTERM
    assert [line for line in result.message.splitlines() if " < " in line] == [
        "bus-containers: < 200 OK"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_CORK, for two records in one packet")
def test_a_signal_amid_a_message_before_tls_fails(
    program: Program, certificates: Certificates
) -> None:
    """Promise 6.2: no alert is sent after it."""

    def script(connection: Connection) -> None:
        tls = AlertingTls(connection, certificates)
        tls.read_request()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        tls.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        tls.alert(20)
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        connection.hold()

    amid = amid_a_message(program, "_end_head", "send")
    with Hostile(script, scheme="https") as server:
        env: Env = {"SSL_CERT_FILE": str(certificates.ca)}
        result = amid("--trace", *RUN, at=server, env=env)
    assert result.code == -signal.SIGTERM
    assert result.message.endswith(f"terminated{ADVICE}\n")


def test_a_signal_amid_a_message_before_the_token_is_read(program: Program) -> None:
    """Promise 6.10: from a standard input that has none yet."""
    token, is_open = os.pipe()
    amid = hit_at(program, "call", "_is_writable", "descriptor")
    result = amid("-v", "--token-file", "-", *RUN, stdin=token)
    assert result.code == -signal.SIGTERM
    os.close(token)
    os.close(is_open)


@second_tier
def test_a_signal_amid_the_reason_why_a_result_is_elsewhere(program: Program, api: Api) -> None:
    """Promise 6.9: it is not lost behind what the container said, which nobody reads."""
    api.answers({**DOCUMENTS["run"], "stderr": "its words"})
    unread, stderr = os.pipe()
    fill(stderr)
    amid = hit_at(program, "call", "_is_writable", "descriptor")
    result = amid("-o", "/dev/full", "-f", "text", *RUN, at=api, stderr=stderr)
    assert result.code == -signal.SIGTERM
    os.close(unread)
    os.close(stderr)


def test_a_signal_amid_an_error_takes_no_message_away(program: Program) -> None:
    """Promise 6.10."""
    amid = hit_at(program, "return", "as_document")
    with Hostile(steps(Connection.read_request)) as server:
        result = amid(*RUN, at=server)
    check_failure(result, -signal.SIGTERM, "the connection was lost")
    assert result.spoken.advises
