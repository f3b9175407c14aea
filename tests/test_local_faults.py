# SPDX-License-Identifier: MIT
"""Faults of the user's own machine (CONTRACT sections 3 and 5): nothing of a finished run is lost.

A result is written where `--output` says, as a shell's `>` would, but no earlier than there is
one. What cannot be written is told before the request, while telling it is still cheap. Disks are
really full, streams really closed, readers really gone.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import Program
from hostile import (
    LIMIT,
    Hostile,
    Script,
    answer,
    held,
    message,
    namespace_command,
    refused_port,
    silent,
    spoken,
    together,
    why_no_namespace,
)
from local_platform import Platform

Env = dict[str, "str | None"]
Words = tuple[str, ...]

RESULT = {"run_id": "run-1", "exit_code": 0, "stdout": "OK", "stderr": ""}
DOCUMENT = json.dumps(RESULT).encode()
PRINTED = (json.dumps(RESULT, indent=2) + "\n").encode()
OLD = b"the old content, which is longer than the result is\n" * 20

RUN = ("run", "--", "true")
COMMANDS = [
    pytest.param(RUN, 125, id="run"),
    pytest.param(("status",), 1, id="status"),
    pytest.param(("runs",), 1, id="runs"),
    pytest.param(("delete", "run-1"), 1, id="delete"),
]
HELPS = [
    pytest.param(("--version",), 1, id="version"),
    pytest.param(("help",), 1, id="help"),
    pytest.param(("status", "--help"), 1, id="status-help"),
    pytest.param(("run", "--help"), 125, id="run-help"),
]


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


def at(platform: Platform, **more: str | None) -> Env:
    return {"BUS_AI_API_URL": platform.url, "BUS_CONFIG_DIR": str(platform.config_dir), **more}


def to(server: Hostile, token: str, **more: str | None) -> Env:
    return {"BUS_AI_API_URL": server.url, "BUS_AI_TOKEN": token, **more}


def wrapped(program: Program, script: str) -> Program:
    """The program as started by a shell, in whose script it is "$@"."""
    return Program(["sh", "-c", script, "sh", *program.command], program.home)


def big(size: int) -> dict[str, object]:
    return {**RESULT, "stdout": "x" * size}


# --- --output is proved writable before the request -------------------------------------------


def missing_folder(folder: Path) -> Path:
    return folder / "missing" / "out"


def a_directory(folder: Path) -> Path:
    return folder


def below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "out"


def dangling_into_nowhere(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "missing" / "out")
    return folder / "link"


def link_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


def name_too_long(folder: Path) -> Path:
    return folder / ("n" * 300)


def a_socket(folder: Path) -> Path:
    here = Path.cwd()
    os.chdir(folder)  # the path of a socket has a small limit
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("socket")
    finally:
        os.chdir(here)
    return folder / "socket"


UNWRITABLE = [
    missing_folder,
    a_directory,
    below_a_file,
    dangling_into_nowhere,
    link_loop,
    name_too_long,
    a_socket,
]


@pytest.mark.parametrize(("words", "code"), COMMANDS[:2])
@pytest.mark.parametrize("make", UNWRITABLE, ids=lambda make: make.__name__)
def test_output_that_cannot_be_written_is_told_before_the_request(
    program: Program, platform: Platform, tmp_path: Path, make: object, words: Words, code: int
) -> None:
    assert callable(make)
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = program("--output", str(path), *words, env=at(platform))
    assert (result.code, result.out, platform.requests) == (code, b"", [])
    [error] = spoken(result.err).errors
    assert "cannot write" in error
    assert path.name in error
    assert sorted(tmp_path.rglob("*")) == before


@cache
def _without_root() -> tuple[str, ...]:
    """What to put before a command so that file modes count for it; empty where nothing is."""
    if os.geteuid() != 0:
        return ("env",)
    words = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    return words if shutil.which("setpriv") else ()


@pytest.mark.parametrize(("words", "code"), COMMANDS[:2])
@pytest.mark.parametrize("exists", [True, False], ids=["file", "folder"])
def test_output_in_a_read_only_place(
    program: Program, platform: Platform, tmp_path: Path, exists: bool, words: Words, code: int
) -> None:
    if not _without_root():
        pytest.skip("root may write everywhere, and there is no setpriv")
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "out"
    if exists:
        path.write_bytes(OLD)
        path.chmod(0o400)
    folder.chmod(0o500)
    unprivileged = Program([*_without_root(), *program.command], program.home)
    result = unprivileged("-o", str(path), *words, env=at(platform))
    assert (result.code, result.out, platform.requests) == (code, b"", [])
    assert "Permission denied" in result.message
    assert path.exists() is exists


# --- a file keeps its content until there is a result -----------------------------------------


def test_file_keeps_its_content_while_a_run_is_in_progress(
    program: Program, canary: str, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    path.write_bytes(OLD)
    release = threading.Event()
    with Hostile(held(release, message(DOCUMENT))) as server, program.start(
        "-o", str(path), *RUN, env=to(server, canary)
    ) as process:
        assert server.reached.wait(LIMIT)
        during = path.read_bytes()
        release.set()
        out, err = process.communicate(timeout=LIMIT)
    assert during == OLD
    assert (process.returncode, out, err) == (0, b"", b"")
    assert path.read_bytes() == PRINTED


class Failure(NamedTuple):
    """How a request ends without a result, and the exit code of a run that it gives."""

    id: str
    script: Script | None
    code: int = 125
    number: int = 0
    options: Words = ()


FAILURES = [
    Failure("refused", None),
    Failure("400", answer(b'{"error":{"type":"bad_request"}}', "400 Bad Request")),
    Failure("500", answer(b'{"error":{"type":"internal"}}', "500 Internal Server Error")),
    Failure("no-json", answer(b"<html><title>Login</title></html>")),
    Failure("deadline", silent(), options=("--timeout", "300ms")),
    Failure("ctrl-c", silent(), 130, signal.SIGINT),
    Failure("sigterm", silent(), 143, signal.SIGTERM),
    Failure("usage", silent(), 2, options=("--timeout-seconds", "x")),
]
WITHOUT_RESULT = [
    pytest.param(failure, state, id=f"{failure.id}-{state}")
    for failure in FAILURES
    for state in ("new", "old", "link", "dangling")
    if state in ("new", "old") or failure.id in ("500", "ctrl-c")
]


@pytest.mark.parametrize(("failure", "state"), WITHOUT_RESULT)
def test_nothing_changes_without_a_result(
    program: Program, canary: str, tmp_path: Path, failure: Failure, state: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / ("out" if state in ("new", "old") else "link")
    if path.name == "link":
        path.symlink_to("out")
    if state in ("old", "link"):
        (folder / "out").write_bytes(OLD)
    before = sorted(folder.iterdir())
    with refused_port() as port, Hostile(failure.script or silent()) as server:
        env = to(server, canary)
        if failure.script is None:
            env["BUS_AI_API_URL"] = f"http://127.0.0.1:{port}"
        words = ("-o", str(path), "run", *failure.options, "--", "true")
        with program.start(*words, env=env) as process:
            if failure.number:
                assert server.reached.wait(LIMIT)
                process.send_signal(failure.number)
            out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (failure.code, b"")
    assert spoken(err).errors
    assert sorted(folder.iterdir()) == before
    assert path.is_symlink() is (path.name == "link")
    if state in ("old", "link"):
        assert path.read_bytes() == OLD


# --- as with a shell's > ------------------------------------------------------------------------


def result_into(
    program: Program, token: str, path: Path | str, *options: str, stdout: object = subprocess.PIPE
) -> None:
    """Run with --output PATH; nothing is told, and unless it leads there nothing printed."""
    with Hostile(answer(DOCUMENT)) as server:
        result = program(*options, "-o", str(path), *RUN, env=to(server, token), stdout=stdout)
    assert (result.code, result.out, result.err) == (0, b"", b"")


def test_output_writes_a_new_file_with_the_modes_of_the_umask(
    program: Program, canary: str, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    result_into(wrapped(program, 'umask 027; exec "$@"'), canary, path)
    assert path.read_bytes() == PRINTED
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o751])
def test_output_keeps_modes_and_hard_links(
    program: Program, canary: str, tmp_path: Path, mode: int
) -> None:
    path = tmp_path / "out"
    path.write_bytes(OLD)
    path.chmod(mode)
    (tmp_path / "other-name").hardlink_to(path) if sys.version_info >= (3, 10) else os.link(
        path, tmp_path / "other-name"
    )
    result_into(program, canary, path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert (tmp_path / "other-name").read_bytes() == PRINTED


@pytest.mark.parametrize("target_exists", [True, False], ids=["there", "dangling"])
def test_output_follows_links(
    program: Program, canary: str, tmp_path: Path, target_exists: bool
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "one").symlink_to("deep/two")
    (tmp_path / "deep" / "two").symlink_to("../target")
    if target_exists:
        (tmp_path / "target").write_bytes(OLD)
    result_into(program, canary, tmp_path / "one")
    assert (tmp_path / "one").is_symlink()
    assert (tmp_path / "deep" / "two").is_symlink()
    assert not (tmp_path / "target").is_symlink()
    assert (tmp_path / "target").read_bytes() == PRINTED


def test_output_is_relative_to_chdir(program: Program, canary: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    result_into(program, canary, "out", "-C", str(tmp_path / "there"))
    assert (tmp_path / "there" / "out").read_bytes() == PRINTED


def test_output_to_dev_null(program: Program, canary: str) -> None:
    before = os.stat(os.devnull)
    result_into(program, canary, os.devnull)
    after = os.stat(os.devnull)
    assert (after.st_mode, after.st_rdev, after.st_ino) == (
        before.st_mode, before.st_rdev, before.st_ino
    )


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_output_to_standard_output_by_a_path(
    program: Program, canary: str, tmp_path: Path, path: str
) -> None:
    if not os.path.exists(path):
        pytest.skip(f"no {path}")
    with Hostile(answer(DOCUMENT)) as server:
        piped = program("-o", path, *RUN, env=to(server, canary))
    assert (piped.code, piped.out, piped.err) == (0, PRINTED, b"")
    file = tmp_path / "file"
    file.write_bytes(OLD)
    with file.open("r+b") as stdout:  # as with `> /dev/stdout`, what was there is gone
        result_into(program, canary, path, stdout=stdout)
    assert file.read_bytes() == PRINTED


def test_output_to_a_fifo(program: Program, canary: str, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as reader:
        result_into(program, canary, path)
        assert reader.communicate(timeout=LIMIT)[0] == PRINTED
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_output_to_a_fifo_survives_a_failure(
    program: Program, canary: str, tmp_path: Path
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as reader:
        with Hostile(answer(b"{}", "403 Forbidden")) as server:
            result = program("-o", str(path), *RUN, env=to(server, canary))
        assert reader.communicate(timeout=LIMIT)[0] == b""
    assert (result.code, result.out) == (125, b"")
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_result_survives_a_fifo_whose_reader_left(
    program: Program, canary: str, tmp_path: Path
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    release = threading.Event()
    with Hostile(held(release, message(DOCUMENT))) as server, program.start(
        "-o", str(path), *RUN, env=to(server, canary)
    ) as process:
        with path.open("rb"):
            assert server.reached.wait(LIMIT)
        release.set()
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (125, PRINTED)
    assert err == b"" or b"cannot write" in err


@pytest.mark.parametrize("code", [0, 37])
def test_exit_code_of_the_container_with_an_output(
    program: Program, canary: str, tmp_path: Path, code: int
) -> None:
    document = json.dumps({**RESULT, "exit_code": code}).encode()
    with Hostile(answer(document)) as server:
        env = to(server, canary)
        assert program("-o", str(tmp_path / "out"), *RUN, env=env).code == code
    assert json.loads((tmp_path / "out").read_bytes())["exit_code"] == code


def test_quiet_wins_over_output(program: Program, platform: Platform, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(OLD)
    for path in (old, tmp_path / "new"):
        for words in (RUN, ("status",), ("help",)):
            result = program("-q", "-o", str(path), *words, env=at(platform))
            assert (result.code, result.out, result.err) == (0, b"", b"")
    assert old.read_bytes() == OLD
    assert not (tmp_path / "new").exists()
    assert len(platform.requests) == 4


# --- a disk that fills up after the run -------------------------------------------------------


def check_saved(result: tuple[int, bytes, bytes], document: object, path: str, code: int) -> None:
    """The result is whole on standard output, the file named, the exit code a failure."""
    assert result[0] == code
    assert json.loads(result[1]) == document
    [error] = spoken(result[2]).errors
    assert "cannot write" in error
    assert path in error
    assert "standard output" in error


@pytest.mark.parametrize(
    ("words", "document", "code"),
    [
        pytest.param(RUN, RESULT, 125, id="run"),
        pytest.param(RUN, {**RESULT, "exit_code": 37}, 125, id="run-37"),
        pytest.param(("status",), {"items": []}, 1, id="status"),
        pytest.param(("runs",), {"items": []}, 1, id="runs"),
        pytest.param(("delete", "run-1"), {"deleted": True, "run_id": "run-1"}, 1, id="delete"),
    ],
)
def test_dev_full_sends_the_result_to_standard_output(
    program: Program, canary: str, words: Words, document: object, code: int
) -> None:
    with Hostile(answer(json.dumps(document).encode())) as server:
        result = program("-o", "/dev/full", *words, env=to(server, canary))
    assert len(server.requests) == 1
    check_saved((result.code, result.out, result.err), document, "/dev/full", code)


@pytest.mark.parametrize("exists", [True, False], ids=["old", "new"])
def test_file_system_that_fills_up(
    program: Program, canary: str, tmp_path: Path, exists: bool
) -> None:
    if why_no_namespace():
        pytest.skip(why_no_namespace())
    folder = tmp_path / "small"
    folder.mkdir()
    path = folder / "out"
    make = f'printf "old" > {shlex.quote(str(path))}; ' if exists else ""
    place = shlex.quote(str(folder))
    script = f'mount -t tmpfs -o size=64k none {place} && {make}"$@"; echo $? >&2; ls {place} >&2'
    small = Program(
        [*namespace_command(), "sh", "-c", script, "sh", *program.command], program.home
    )
    document = big(300_000)
    with Hostile(answer(json.dumps(document).encode())) as server:
        result = small("-o", str(path), *RUN, env=to(server, canary))
    error, code, *files = result.err.splitlines()
    check_saved((int(code), result.out, error), document, str(path), 125)
    assert files == ([b"out"] if exists else [])


@pytest.mark.parametrize(("words", "code"), [COMMANDS[0], COMMANDS[2]])
def test_limit_on_the_size_of_files(
    program: Program, canary: str, tmp_path: Path, words: Words, code: int
) -> None:
    """`ulimit -f` counts blocks; the pipe of standard output has no such limit."""
    limited = wrapped(program, 'ulimit -f 16 && exec "$@"')
    document = {**big(100_000), "items": []}
    path = tmp_path / "out"
    with Hostile(answer(json.dumps(document).encode())) as server:
        result = limited("-o", str(path), *words, env=to(server, canary))
    check_saved((result.code, result.out, result.err), document, str(path), code)
    assert not path.exists()


def test_both_places_are_full(program: Program, canary: str) -> None:
    with Hostile(answer(DOCUMENT)) as server, open("/dev/full", "wb") as full:
        result = program("-o", "/dev/full", *RUN, env=to(server, canary), stdout=full)
    assert result.code == 125
    assert "standard output" in "".join(spoken(result.err).errors)


# --- standard output --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        *COMMANDS,
        pytest.param(("-f", "tsv", *RUN), 125, id="run-tsv"),
        pytest.param(("-f", "text", "runs"), 1, id="runs-text"),
        pytest.param(("-f", "tsv", "runs"), 1, id="runs-tsv"),
    ],
)
def test_head_takes_its_byte_and_leaves(
    program: Program, canary: str, tmp_path: Path, words: Words, code: int
) -> None:
    run = big(1_000_000)
    document = {**run, "items": [{**run, "image": "y" * 1_000_000}], "deleted": True}
    piped = wrapped(program, f'{{ "$@"; echo $? > {tmp_path}/code; }} | head -c 1')
    with Hostile(answer(json.dumps(document).encode())) as server:
        result = piped(*words, env=to(server, canary))
    assert len(result.out) == 1
    assert result.err == b""
    assert (tmp_path / "code").read_text() == f"{code}\n"


@pytest.mark.parametrize(("words", "code"), [*COMMANDS, *HELPS])
def test_reader_that_was_never_there(
    program: Program, canary: str, words: Words, code: int
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with Hostile(answer(b'{"items":[],"exit_code":0,"deleted":true}')) as server:
            result = program(*words, env=to(server, canary), stdout=writer)
    finally:
        os.close(writer)
    assert (result.code, result.err) == (code, b"")


@pytest.mark.parametrize(("words", "code"), [*COMMANDS, *HELPS])
def test_closed_standard_output_is_told_before_the_request(
    program: Program, platform: Platform, words: Words, code: int
) -> None:
    result = wrapped(program, 'exec "$@" >&-')(*words, env=at(platform))
    assert (result.code, result.out, platform.requests) == (code, b"", [])
    [error] = spoken(result.err).errors
    assert "standard output" in error


@pytest.mark.parametrize(("words", "code"), [*COMMANDS, *HELPS])
def test_full_standard_output_is_told_before_the_request(
    program: Program, platform: Platform, words: Words, code: int
) -> None:
    with open("/dev/full", "wb") as full:
        result = program(*words, env=at(platform), stdout=full)
    assert (result.code, platform.requests) == (code, [])
    [error] = spoken(result.err).errors
    assert "standard output" in error
    assert "No space left" in error


def test_standard_output_opened_for_reading_is_told_before_the_request(
    program: Program, platform: Platform
) -> None:
    with open(os.devnull, "rb") as null:
        result = program(*RUN, env=at(platform), stdout=null)
    assert (result.code, platform.requests) == (125, [])
    assert "cannot write to standard output" in result.message


def test_no_place_for_the_result_of_a_finished_run(program: Program, canary: str) -> None:
    """Nobody is told that nothing was sent, for then the run would be sent once more."""
    closed = wrapped(program, 'exec "$@" >&-')
    with Hostile(answer(DOCUMENT)) as server:
        words = ("--error-format", "json", "-o", "/dev/full", *RUN)
        result = closed(*words, env=to(server, canary))
    [error] = map(json.loads, result.message.splitlines())
    assert (result.code, len(server.requests)) == (125, 1)
    assert error["run_state"] == "finished"
    assert "cannot write" in error["text"]
    assert "sent" not in error["text"]


@pytest.mark.skipif(sys.platform != "linux", reason="a pipe's size is known on Linux only")
@pytest.mark.parametrize("unbuffered", ["1", ""], ids=["unbuffered", "buffered"])
def test_a_reader_that_leaves_amid_a_write(program: Program, canary: str, unbuffered: str) -> None:
    """What was written until then is no error to the system, and not the whole result."""
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, 1032)  # F_GETPIPE_SZ
    with Hostile(answer(json.dumps(big(1_000_000)).encode())) as server, program.start(
        "-f", "text", *RUN, env=to(server, canary, PYTHONUNBUFFERED=unbuffered), stdout=writer
    ) as process:
        os.close(writer)
        limit = time.monotonic() + LIMIT
        waiting = 0
        while waiting < size and time.monotonic() < limit:
            waiting = struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"    "))[0]
        os.close(reader)
        _, err = process.communicate(timeout=LIMIT)
    assert waiting == size
    assert process.returncode == 125
    assert b"cannot write" not in err


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "not-blocking"])
@pytest.mark.parametrize("unbuffered", ["1", ""], ids=["unbuffered", "buffered"])
def test_a_pipe_gets_the_whole_result(
    program: Program, canary: str, unbuffered: str, blocking: bool
) -> None:
    """A write to a pipe that is full may be cut short, and is an error if it does not block."""
    document = {**big(3_000_000), "stderr": "y" * 300_000}
    pipes = [os.pipe(), os.pipe()]
    for _, writer in pipes:
        os.set_blocking(writer, blocking)
    env = {"PYTHONUNBUFFERED": unbuffered}
    with Hostile(answer(json.dumps(document).encode())) as server, program.start(
        "-f", "text", *RUN, env=to(server, canary, **env), stdout=pipes[0][1], stderr=pipes[1][1]
    ) as process:

        def read(pipe: tuple[int, int]) -> bytes:
            os.close(pipe[1])
            with open(pipe[0], "rb") as file:
                return file.read()

        out, err = together(*(functools.partial(read, pipe) for pipe in pipes))
    assert process.returncode == 0
    assert out == b"x" * 3_000_000
    assert err.startswith(b"y" * 300_000 + b"\n" + b"bus-containers: run run-1 ended")


@pytest.mark.parametrize("away", ["removed", "locked"])
def test_a_file_that_is_taken_away_amid_a_run_changes_no_message(
    program: Program, canary: str, tmp_path: Path, away: str
) -> None:
    if away == "locked" and os.geteuid() == 0:
        pytest.skip("root may do anything")
    folder = tmp_path / "folder"
    folder.mkdir()
    release = threading.Event()

    refusal = message(b'{"error":{"message":"sorry"}}', "500 No")
    with Hostile(held(release, refusal)) as server, program.start(
        "-o", str(folder / "out"), *RUN, env=to(server, canary)
    ) as process:
        assert server.reached.wait(LIMIT)
        if away == "removed":
            (folder / "out").unlink()
        else:
            folder.chmod(0o500)
        release.set()
        _, err = process.communicate(timeout=LIMIT)
    folder.chmod(0o700)
    [error] = spoken(err).errors
    assert process.returncode == 125
    assert "sorry" in error
    assert "bus-containers delete" in error



# --- locales ------------------------------------------------------------------------------------

UNICODE = {
    "run_id": "run-\u00e9",
    "exit_code": 3,
    "stdout": "\u00e4\u20ac\U0001d11e\0\x1b[1m\r\n\ud800 \ufeff",
    "stderr": "\u00fc\U0001f600\udfff\n",
    "image": "\u4f60\u597d",
}
SPOKEN = {"error": {"type": "quota_\u00e9", "message": "\u20ac 10 \U0001f600", "action": "\u00e4"}}


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A folder with a compiled latin-1 locale, for LOCPATH; None where there is none to be had."""
    folder = tmp_path_factory.mktemp("locales")
    words = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    try:
        made = subprocess.run(words, capture_output=True, timeout=LIMIT).returncode == 0
    except OSError:
        made = False
    return folder if made else None


PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LOCALES: list[dict[str, str]] = [
    {"LC_ALL": "C"},
    {"LC_ALL": "POSIX"},
    {"LC_ALL": "", "LANG": "", "LC_CTYPE": "C"},
    {"LC_ALL": "no_SUCH.locale"},
    PLAIN_C,
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1:strict"},
    {"PYTHONIOENCODING": "utf-16"},
    {"PYTHONUTF8": "0"},
    {"PYTHONUTF8": "1", "LC_ALL": "C"},
    {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"},
]


def name_of(locale: dict[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in locale.items())


def spoken_in(
    program: Program, token: str, folder: Path, env: dict[str, str]
) -> list[tuple[int, bytes, bytes]]:
    """All that a locale could change: results, messages, what is sent, the name of a file."""
    said = []
    path = folder / "\u00e9\u4f60"
    with Hostile(answer(json.dumps(UNICODE).encode())) as server:
        environ = to(server, token, **env)
        for form in ("json", "text"):
            result = program("-f", form, "run", "--", "echo", "\u00e4\U0001f600", env=environ)
            said.append((result.code, result.out, result.err))
        words = ("-f", "tsv", "-o", str(path), "run", "--image", "\u4f60", "--", "\u00e9")
        result = program(*words, env=environ)
        said.append((result.code, path.read_bytes(), result.err))
        path.unlink()
        bodies = [request.partition(b"\r\n\r\n")[2] for request in server.requests]
        said.append((0, b"\n".join(bodies), b""))
    with Hostile(answer(json.dumps(SPOKEN).encode(), "402 Payment Required")) as server:
        result = program("-v", *RUN, env=to(server, token, **env))
        denial = result.err.splitlines()[-1].replace(server.url.encode(), b"URL")
        said.append((result.code, result.out, denial))
    return said


@pytest.fixture(scope="module")
def in_utf_8(
    command: list[str], canary: str, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[int, bytes, bytes]]:
    folder = tmp_path_factory.mktemp("utf-8")
    return spoken_in(Program(command, folder), canary, folder, {})


def test_bytes_in_utf_8(in_utf_8: list[tuple[int, bytes, bytes]]) -> None:
    as_json, as_text, as_tsv, bodies, denial = in_utf_8
    assert json.loads(as_json[1]) == UNICODE
    assert "\u4f60\u597d".encode() in as_json[1]
    assert as_text[1] == str(UNICODE["stdout"]).encode("utf-8", "backslashreplace")
    assert as_text[2].startswith(str(UNICODE["stderr"]).encode("utf-8", "backslashreplace"))
    assert "\u00e4\u20ac\U0001d11e".encode() in as_tsv[1]
    assert [json.loads(body) for body in bodies[1].splitlines()] == [
        *2 * [{"profile": "codex", "args": ["echo", "\u00e4\U0001f600"]}],
        {"image": "\u4f60", "command": ["\u00e9"]},
    ]
    assert "\u20ac 10 \U0001f600".encode() in denial[2]
    assert [said[0] for said in in_utf_8] == [3, 3, 3, 0, 125]


@pytest.mark.parametrize("locale", LOCALES, ids=name_of)
def test_same_bytes_in_every_locale(
    program: Program,
    canary: str,
    tmp_path: Path,
    latin_1: Path | None,
    in_utf_8: list[tuple[int, bytes, bytes]],
    locale: dict[str, str],
) -> None:
    if "ISO" in locale.get("LC_ALL", ""):
        if latin_1 is None:
            pytest.skip("no latin-1 locale, and no localedef to make one")
        locale = {**locale, "LOCPATH": str(latin_1)}
    assert spoken_in(program, canary, tmp_path, locale) == in_utf_8


# --- a machine with parts missing -------------------------------------------------------------


def test_no_home_and_a_token_in_a_variable(program: Program, platform: Platform) -> None:
    env: Env = {
        "HOME": None, "BUS_AI_API_URL": platform.url, "BUS_AI_TOKEN": platform.token()
    }
    result = program("status", env=env)
    assert (result.code, result.err) == (0, b"")


@pytest.mark.parametrize(("words", "code"), COMMANDS[:2])
def test_no_home_and_no_token(
    program: Program, platform: Platform, words: Words, code: int
) -> None:
    result = program(*words, env={"HOME": None, "BUS_AI_API_URL": platform.url})
    assert (result.code, result.out, platform.requests) == (code, b"", [])
    assert "HOME" in result.message
    assert "bus auth token" in result.message


@cache
def _as_unknown_user() -> tuple[str, ...]:
    """What to put before a command so that it runs with a uid that no passwd file knows."""
    for words in (("unshare", "--map-user=54321"), ("setpriv", "--reuid=54321")):
        probe = [*words, sys.executable, "-c", "import os; os._exit(os.getuid() != 54321)"]
        try:
            if subprocess.run(probe, capture_output=True, timeout=LIMIT).returncode == 0:
                return words
        except OSError:
            pass
    return ()


@pytest.mark.parametrize("home", [True, False], ids=["home", "no-home"])
def test_unknown_user(program: Program, platform: Platform, home: bool) -> None:
    if not _as_unknown_user():
        pytest.skip("cannot run as another user")
    env: Env = {"BUS_AI_API_URL": platform.url, "BUS_AI_TOKEN": platform.token()}
    if not home:
        env["HOME"] = None
    stranger = Program([*_as_unknown_user(), *program.command], program.home)
    result = stranger("run", "-f", "text", "--", "printf", "OK", env=env)
    assert (result.code, result.out) == (0, b"OK")


_READ_ONLY_ROOT = r"""
root=$1; shift
mount -t tmpfs none "$root" || exit 99
for d in /*; do
    case $d in /tmp) continue ;; esac
    if [ -L "$d" ]; then cp -P "$d" "$root"
    elif [ -d "$d" ]; then
        mkdir "$root$d" && mount --rbind "$d" "$root$d" || exit 99
        case $d in
        /dev | /proc | /sys) ;;
        *) mount -o remount,bind,ro "$root$d" || exit 99 ;;
        esac
    fi
done
mount -o remount,ro "$root" || exit 99
exec chroot "$root" sh -c 'cd /
if [ -e /tmp ] || touch /probe /usr/probe 2>/dev/null; then exit 99; fi
exec "$@"' sh "$@"
"""


def test_read_only_file_system_without_tmp(
    program: Program, platform: Platform, tmp_path: Path
) -> None:
    """As in a container with --read-only, made `FROM scratch`."""
    if why_no_namespace():
        pytest.skip(why_no_namespace())
    words = [os.path.realpath(word) if os.path.exists(word) else word for word in program.command]
    if any(word.startswith("/tmp/") for word in words):
        pytest.skip("the program itself is in /tmp")
    (tmp_path / "root").mkdir()
    inside = [*namespace_command(), "sh", "-c", _READ_ONLY_ROOT, "sh", str(tmp_path / "root")]
    lean = Program([*inside, *words], Path("/nowhere"))
    env: Env = {"BUS_AI_API_URL": platform.url, "BUS_AI_TOKEN": platform.token(), "TMPDIR": None}
    result = lean("run", "-f", "text", "--", "printf", "OK", env=env)
    if result.code == 99:
        pytest.skip(f"no file system can be made read-only here: {result.message}")
    assert (result.code, result.out) == (0, b"OK")
    refused = lean("-o", "/out", *RUN, env=env)
    assert (refused.code, refused.out) == (125, b"")
    assert "Read-only file system" in refused.message
    assert len(platform.requests) == 1


# --- descriptors that are closed at the start -------------------------------------------------

CLOSED = ["", "0", "1", "2", "01", "02", "12", "012"]


@pytest.mark.parametrize("closed", CLOSED, ids=lambda closed: f"closed-{closed or 'none'}")
def test_closed_at_the_start(
    program: Program, platform: Platform, tmp_path: Path, closed: str
) -> None:
    """A socket or file that took the number of a closed stream would get what is meant for it."""
    script = 'exec "$@" ' + " ".join(f"{number}>&-" for number in closed)
    bare = wrapped(program, script)
    env = at(platform)
    path = tmp_path / "out"
    into_file = bare("-v", "-o", str(path), "run", "--", "printf", "OK", env=env)
    assert (into_file.code, into_file.out) == (0, b"")
    assert json.loads(path.read_bytes())["stdout"] == "OK"
    assert bool(into_file.err) is ("2" not in closed)

    asked = len(platform.requests)
    printed = bare("-v", "run", "--", "printf", "OK", env=env)
    assert b"Traceback" not in printed.err
    if "1" in closed:
        assert (printed.code, len(platform.requests)) == (125, asked)
    else:
        assert printed.code == 0
        assert json.loads(printed.out)["stdout"] == "OK"
    assert bool(printed.err) is ("2" not in closed)

    failed = bare("-o", str(path), "delete", "no-such-run", env=env)
    assert (failed.code, failed.out) == (1, b"")
    assert bool(failed.err) is ("2" not in closed)
    assert json.loads(path.read_bytes())["stdout"] == "OK"


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full"], ids=["closed", "full"])
def test_standard_error_that_takes_nothing(
    program: Program, platform: Platform, stream: str
) -> None:
    mute = wrapped(program, f'exec "$@" {stream}')
    env = at(platform)
    told = mute("-vv", "run", "--", "sh", "-c", "printf OK; printf bad >&2; exit 3", env=env)
    assert (told.code, json.loads(told.out)["stdout"]) == (3, "OK")
    text = mute("run", "-f", "text", "--", "sh", "-c", "printf OK; printf bad >&2", env=env)
    assert (text.code, text.out) == (0, b"OK")
    assert mute("--bogus", env=env).code == 2
    assert mute("delete", "no-such-run", env=env).code == 1
    assert mute("run", "--profile", "no-such-profile", "--", "true", env=env).code == 125


# --- standard input -----------------------------------------------------------------------------


def test_token_from_standard_input(program: Program, platform: Platform) -> None:
    env: Env = {"BUS_AI_API_URL": platform.url, "BUS_AI_TOKEN": "not this one"}
    result = program("--token-file", "-", "status", env=env, input=f"{platform.token()}\n".encode())
    assert (result.code, result.err) == (0, b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b" \n\t ", "empty", id="blank"),
        pytest.param(b"SECRET-\xff\xfe-SECRET", "visible ASCII", id="binary"),
        pytest.param(b"SECRET one SECRET two", "visible ASCII", id="two-words"),
        pytest.param(b"SECRET" * 20_000, "64 KiB", id="large"),
    ],
)
@pytest.mark.parametrize(("words", "code"), COMMANDS[:2])
def test_unusable_token_on_standard_input(
    program: Program, platform: Platform, data: bytes, reason: str, words: Words, code: int
) -> None:
    env: Env = {"BUS_AI_API_URL": platform.url}
    result = program("--token-file", "-", *words, env=env, input=data)
    assert (result.code, result.out, platform.requests) == (code, b"", [])
    assert "standard input" in result.message
    assert reason in result.message
    assert "SECRET" not in result.message


def test_token_from_a_closed_standard_input(program: Program, platform: Platform) -> None:
    blind = wrapped(program, 'exec "$@" <&-')
    result = blind("--token-file", "-", *RUN, env={"BUS_AI_API_URL": platform.url})
    assert (result.code, result.out, platform.requests) == (125, b"", [])
    assert "standard input" in result.message


@pytest.mark.parametrize("words", [RUN, ("status",)], ids=["run", "status"])
def test_standard_input_is_left_to_the_next_reader(
    program: Program, platform: Platform, words: Words
) -> None:
    piped = wrapped(program, '"$@" > /dev/null; cat')
    result = piped(*words, env=at(platform), input=b"for the next\n")
    assert (result.out, result.err) == (b"for the next\n", b"")


