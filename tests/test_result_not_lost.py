# SPDX-License-Identifier: MIT
"""A finished run's result is never lost to a fault of the user's machine: promises 6.11 to 6.14.

Disks are really full, streams really closed, readers really gone.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import select
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hostile import (
    Api,
    Connection,
    Hostile,
    Script,
    answer,
    message,
    namespace_command,
    silent,
    void,
    why_no_namespace,
    with_files,
)
from support import (
    BODIES,
    DOCUMENTS,
    LIMIT,
    Env,
    InProcess,
    Program,
    Terminal,
    api_commands,
    as_json,
    check_failure,
    failure_code,
    second_tier,
    skip_if,
    spoken,
    tiers,
    words,
)

RESULT = DOCUMENTS["run"]
PRINTED = as_json(RESULT)
OLD = b"the old content, which is longer than the result is\n" * 20
RUN = ("run", "--", "true")
Serve = Callable[..., Hostile]


def big(size: int, letter: str = "x") -> dict[str, Any]:
    return {**RESULT, "stdout": letter * size}


def old_or_new(old: object) -> str:
    return "old" if old else "new"


def tree(folder: Path) -> dict[str, object]:
    """The names in a folder, and what each is."""

    def what(path: Path) -> object:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else stat.S_IFMT(path.stat().st_mode)

    return {path.name: what(path) for path in folder.iterdir()}


def meanwhile(act: Callable[[], object], data: bytes = message(BODIES["run"])) -> Script:
    """Read the request, do something while the run is in progress, and answer."""

    def script(connection: Connection) -> None:
        connection.read_request()
        act()
        connection.send(data)

    return script


@contextmanager
def started(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive a test that fails."""
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def wrapped(program: Program, script: str) -> Program:
    """The program as started by a shell, in whose script it is "$@"."""
    return Program(["sh", "-c", script, "sh", *program.command], program.home, program.folder)


def await_that(found: Callable[[], object], limit: float = LIMIT) -> None:
    end = time.monotonic() + limit
    while not found():
        assert time.monotonic() < end
        time.sleep(0.001)


def read_all(source: Path | int, most: int = -1) -> bytes:
    """Read a FIFO, or a pipe's end, to its end, or so much and leave."""
    data = b""
    with open(source, "rb", buffering=0) as file:
        while len(data) != most:
            assert select.select([file], [], [], LIMIT)[0], "nobody writes, and nobody left"
            more = file.read(most if most > 0 else 1 << 20)
            if not more:
                break
            data += more
    return data


@contextmanager
def reading(source: Path | int, most: int = -1) -> Iterator[Future[bytes]]:
    """Read in the background."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(read_all, source, most)


def closing(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def without_privileges(program: Program) -> Program:
    """The program where the modes of files count."""
    if os.geteuid() != 0:
        return program
    skip_if("" if shutil.which("setpriv") else "root may write everywhere; there is no setpriv")
    lowly = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *program.command]
    return Program(lowly, program.home, program.folder)


# --- --output is proved writable before the request: 6.11 -------------------------------------


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has a small limit
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


# A path, and what is made at its first part.
UNWRITABLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing folder": ("missing/out", void),
    "folder": ("here", Path.mkdir),
    "below a file": ("file/out", Path.touch),
    "dangling link": ("link", lambda path: path.symlink_to("missing/out")),
    "link to itself": ("loop", lambda path: path.symlink_to("loop")),
    "long name": ("n" * 300, void),
    "slash at the end": ("new/", void),
    "in proc": ("/proc/self/out", void),  # where nobody makes a file, root neither
    "socket": ("socket", a_socket),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_an_output_that_cannot_be_written_is_told_before_the_request(
    case: str, cli: InProcess, api: Api, folder: Path
) -> None:
    path, make = UNWRITABLE[case]
    make(folder / path.partition("/")[0])
    before = tree(folder)
    for name in ("run", "status"):
        result = cli("--output", path, *words(name), at=api)
        check_failure(result, failure_code(name), f"bus-containers: cannot write to {path}: ")
    assert (api.requests, tree(folder)) == ([], before)


@pytest.mark.parametrize("place", ["new file", "file in the way", "file"])
def test_modes_count(place: str, program: Program, api: Api, folder: Path) -> None:
    """Before the request; also where a new file could be put in the place of a protected one."""
    if place != "new file":
        (folder / "out").write_bytes(OLD)
    if place == "file in the way":
        (folder / "out").chmod(0o400)
    else:
        folder.chmod(0o500)
    before = tree(folder)
    result = without_privileges(program)("-o", "out", *RUN, at=api)
    if place == "file":
        assert (result[:3], tree(folder)) == ((0, b"", b""), {"out": PRINTED})
    else:
        check_failure(result, 125, "cannot write to out: Permission denied")
        assert (api.requests, tree(folder)) == ([], before)


# --- the old content or one whole result: 6.12 ------------------------------------------------


@pytest.mark.parametrize("old", [OLD, None], ids=old_or_new)
def test_the_path_is_as_before_while_a_run_is_in_progress(
    old: bytes | None, cli: InProcess, serve: Serve, folder: Path
) -> None:
    path = folder / "out"
    seen = []
    if old is not None:
        path.write_bytes(old)
    look = meanwhile(lambda: seen.append(path.read_bytes() if path.exists() else None))
    assert cli("-o", "out", *RUN, at=serve(look))[:3] == (0, b"", b"")
    assert seen == [old]
    assert tree(folder) == {"out": PRINTED}


FAILURES: dict[str, tuple[Script, int, tuple[str, ...]]] = {
    "400": (answer(b'{"error":{"type":"bad_request"}}', "400 Bad Request"), 125, ()),
    "500": (answer(b'{"error":{"type":"internal"}}', "500 Internal Server Error"), 125, ()),
    "no json": (answer(b"<html><title>Login</title></html>"), 125, ()),
    "deadline": (silent(), 125, ("--timeout", "300ms")),
    "usage": (silent(), 2, ("--timeout-seconds", "x")),
    "ctrl-c": (silent(), -signal.SIGINT, ()),
    "sigterm": (silent(), -signal.SIGTERM, ()),
}
STATES = [
    *itertools.product(FAILURES, ("new", "old")),
    *itertools.product(("500", "ctrl-c"), ("link", "dangling")),
]
SLOW = [*itertools.product(("ctrl-c", "sigterm", "deadline"), ("new", "link", "dangling"))][1:]


@pytest.mark.parametrize(
    ("failure", "state"),
    [
        pytest.param(*row, marks=second_tier if row in SLOW else (), id="-".join(row))
        for row in STATES
    ],
)
def test_nothing_changes_without_a_result(
    failure: str, state: str, cli: InProcess, program: Program, serve: Serve, folder: Path
) -> None:
    script, code, options = FAILURES[failure]
    if state in ("link", "dangling"):
        (folder / "out").symlink_to("target")
    if state in ("old", "link"):
        (folder / ("out" if state == "old" else "target")).write_bytes(OLD)
    before = tree(folder)
    server = serve(script)
    arguments = ("-o", "out", "run", *options, "--", "true")
    if code < 0:
        with started(program.start(*arguments, at=server)) as process:
            assert server.reached.wait(LIMIT)
            process.send_signal(-code)
            out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (code, b"")
    else:
        result = cli(*arguments, at=server)
        assert result[:2] == (code, b"")
        err = result.err
    assert spoken(err).errors
    assert tree(folder) == before


def instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


# What is done to the file, and why the result then cannot be where it was wanted.
TAKEN: dict[str, tuple[Callable[[Path], object], int]] = {
    "removed": (lambda path: path.unlink(), 0),
    "moved": (lambda path: path.rename(path.with_name("new")), 0),
    "replaced": (lambda path: path.with_name("new").rename(path), 0),
    "folder gone": (lambda path: shutil.rmtree(path.parent), errno.ENOENT),
    "folder instead": (instead, errno.EISDIR),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_a_file_that_is_taken_away_during_the_run(
    taken: str, cli: InProcess, serve: Serve, tmp_path: Path
) -> None:
    """The result is where it was wanted, or on standard output with the code of a failure."""
    take, reason = TAKEN[taken]
    folder = tmp_path / "where"
    path = folder / "out"
    denial = b'{"error":{"message":"sorry"}}'
    for data in (message(BODIES["run"]), message(denial, "500 No")):
        folder.mkdir()
        path.write_bytes(OLD)
        (folder / "new").write_bytes(b"new")
        result = cli("-o", str(path), *RUN, at=serve(meanwhile(lambda: take(path), data)))
        if b"sorry" in data:
            check_failure(result, 125, "sorry", "bus-containers delete")
        elif reason:
            check_saved(result[:3], RESULT, str(path), reason, 125)
        else:
            assert result[:3] == (0, b"", b"")
            assert path.read_bytes() == PRINTED
        if folder.exists():
            assert set(tree(folder)) <= {"out", "new"}
            shutil.rmtree(folder)


# Two runs with one output: their answers in the order of their ends, or both at once.
PAIRS = {"second refused": "a!b", "first refused": "!ab", "one after the other": "ab", "both": "ab"}


def run_pair(
    program: Program, serve: Serve, path: Path, order: str, act: Callable[..., None] | None = None
) -> list[int]:
    """Run `a` and `b` at once; "!" comes before one that is refused; check what is true always.

    With `act`, it is called when both runs are in progress, and both are answered then.
    """
    refused = order[order.index("!") + 1] if "!" in order else ""
    letters = order.replace("!", "")
    releases = {letter: threading.Event() for letter in letters}
    whole = {letter: as_json(big(1_000_000, letter)) for letter in letters}
    old = path.read_bytes() if path.exists() else None

    def script(connection: Connection) -> None:
        letter = json.loads(connection.read_request().partition(b"\r\n\r\n")[2])["args"][0]
        assert releases[letter].wait(LIMIT)
        denial = message(b'{"error":{"type":"bad_request"}}', "400 Bad Request")
        connection.send(denial if letter == refused else message(whole[letter]))

    server = serve(script)
    processes = [
        program.start("-o", str(path), "run", "--", letter, at=server) for letter in letters
    ]
    await_that(lambda: len(server.requests) == 2)
    if act:
        for release in releases.values():
            release.set()
        act(processes)
    outcomes = []
    for letter, process in zip(letters, processes):
        releases[letter].set()
        with started(process):
            out, err = process.communicate(timeout=LIMIT)
        assert (out, err == b"" or process.returncode != 0) == (b"", True)
        outcomes.append(process.returncode)
    kept = [content for letter, content in whole.items() if letter != refused]
    assert path.exists() or (old is None and 0 not in outcomes)
    if path.exists():
        assert path.read_bytes() in (kept if 0 in outcomes else [*kept, old])
    assert set(tree(path.parent)) <= {path.name}
    return outcomes


@pytest.mark.parametrize("case", tiers(PAIRS, "second refused", "both"))
def test_two_runs_with_one_output(case: str, program: Program, serve: Serve, folder: Path) -> None:
    act = (lambda _: None) if case == "both" else None
    order = PAIRS[case]
    outcomes = run_pair(program, serve, folder / "out", order, act)
    assert outcomes == [125 if f"!{one}" in order else 0 for one in order.replace("!", "")]


@second_tier
def test_many_pairs_of_runs_with_one_output(program: Program, serve: Serve, folder: Path) -> None:
    """Old and new files, refusals, files taken away, signals; PAIRS_OF_RUNS says how many pairs."""
    for number in range(int(os.environ.get("PAIRS_OF_RUNS", "20"))):
        dice = random.Random(number)
        path = folder / str(number) / "out"
        path.parent.mkdir()
        if dice.random() < 0.5:
            path.write_bytes(OLD)
        order, event = dice.choice(["ab", "ab", "a!b"]), dice.choice(["", "remove", "signal"])

        def act(processes: list[subprocess.Popen[bytes]], event: str = event) -> None:
            time.sleep(dice.random() * 0.05)  # noqa: B023 - anywhere in the writing
            if event == "signal":
                processes[0].send_signal(signal.SIGTERM)

        if event == "remove" and path.exists():
            path.unlink()
        outcomes = run_pair(program, serve, path, order, act)
        allowed = ({0, -signal.SIGTERM} if event == "signal" else {0}, {0, 125})
        assert all(code in codes for code, codes in zip(outcomes, allowed)), (number, outcomes)


@pytest.mark.parametrize(
    "number", tiers([signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP], signal.SIGTERM)
)
def test_a_signal_amid_the_writing(
    number: signal.Signals, program: Program, serve: Serve, folder: Path
) -> None:
    path = folder / "out"
    path.write_bytes(OLD)
    result = big(10_000_000)
    server = serve(answer(json.dumps(result).encode()))
    with started(program.start("-o", "out", *RUN, at=server)) as process:
        await_that(
            lambda: (
                len(os.listdir(folder)) > 1
                or path.stat().st_size != len(OLD)
                or process.poll() is not None
            )
        )
        process.send_signal(number)
        out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) in [(0, b""), (-number, b"")]
    found = path.read_bytes()
    assert found in (OLD, as_json(result))
    if number not in (signal.SIGKILL, signal.SIGHUP):  # which are not caught
        assert set(tree(folder)) == {"out"}


def test_a_signal_while_the_result_waits_for_its_reader(program: Program, api: Api) -> None:
    """Promise 6.3: the run has ended, and nothing else can tell how."""
    reader, writer = os.pipe()
    api.answers({**big(1_000_000), "exit_code": 37})
    with started(program.start(*RUN, at=api, stdout=writer)) as process:
        os.close(writer)
        await_that(lambda: bool(select.select([reader], [], [], 0)[0]))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT)
    os.close(reader)
    assert process.returncode == -signal.SIGTERM
    assert err == b"bus-containers: terminated; the run run-1 ended with exit code 37\n"


# --- as with a shell's >: 6.12 ----------------------------------------------------------------


@pytest.mark.parametrize("path", ["out", "n" * 255, "-C there out", "-"])
def test_a_new_output(path: str, cli: InProcess, api: Api, folder: Path) -> None:
    """By the umask, with the longest name, relative to --chdir; a dash is standard output."""
    (folder / "there").mkdir()
    *options, name = path.split()
    document = {**RESULT, "exit_code": 37}
    before = os.umask(0o027)
    try:
        result = cli(*options, "-o", name, *RUN, at=api.answers(document))
    finally:
        os.umask(before)
    assert result[:3] == (37, as_json(document) if path == "-" else b"", b"")
    made = [path for path in folder.rglob("*") if path.is_file()]
    assert [path.name for path in made] == [name] * (path != "-")
    for one in made:
        assert (one.read_bytes(), one.stat().st_mode & 0o777) == (as_json(document), 0o640)
        assert one.parent.name == ("there" if options else "folder")


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o751])
def test_an_output_keeps_modes_owner_and_hard_links(
    mode: int, cli: InProcess, api: Api, folder: Path
) -> None:
    for name in ("linked", "single"):
        path = folder / name
        path.write_bytes(OLD)
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, 54321, 54322)
        before = path.stat()
        if name == "linked":
            os.link(path, folder / "other")
        assert cli("-o", name, *RUN, at=api)[:3] == (0, b"", b"")
        after = path.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (
            before.st_mode, before.st_uid, before.st_gid
        )  # fmt: skip
    assert tree(folder) == dict.fromkeys(("linked", "other", "single"), PRINTED)


@pytest.mark.parametrize("old", [OLD, None], ids=old_or_new)
def test_an_output_follows_links(old: bytes | None, cli: InProcess, api: Api, folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "one").symlink_to("deep/two")
    (folder / "deep" / "two").symlink_to("../target")
    if old:
        (folder / "target").write_bytes(old)
    assert cli("-o", "one", *RUN, at=api)[:3] == (0, b"", b"")
    assert tree(folder) == {"one": "deep/two", "deep": stat.S_IFDIR, "target": PRINTED}
    assert tree(folder / "deep") == {"two": "../target"}


def test_an_output_that_is_a_device(cli: InProcess, api: Api) -> None:
    def device() -> list[int]:
        return [*os.stat(os.devnull)[:3]]

    before = device()
    assert cli("-o", os.devnull, *RUN, at=api)[:3] == (0, b"", b"")
    assert device() == before


def test_an_output_that_is_a_terminal(cli: InProcess, api: Api) -> None:
    with Terminal() as terminal:
        assert cli("-o", os.ttyname(terminal.end), *RUN, at=api)[:3] == (0, b"", b"")
        assert terminal.read_until(lambda shown: len(shown) >= len(PRINTED)) == PRINTED


@pytest.mark.parametrize(
    "path", tiers(["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"], "/dev/fd/1")
)
def test_standard_output_by_a_path(path: str, program: Program, api: Api, folder: Path) -> None:
    assert program("-o", path, *RUN, at=api)[:3] == (0, PRINTED, b"")
    with open(folder / "out", "w+b") as file:
        (folder / "out").unlink()
        assert program("-o", path, *RUN, at=api, stdout=file)[:3] == (0, b"", b"")
        assert (os.pread(file.fileno(), 9999, 0), tree(folder)) == (PRINTED, {})


@pytest.mark.parametrize(("number", "redirection"), [(1, ">>"), (1, "1<>"), (3, "3>>")])
def test_a_redirected_descriptor_by_a_path(
    number: int, redirection: str, program: Program, api: Api, folder: Path
) -> None:
    """As with `> /dev/stdout`: what was there is gone, and what the shell adds is not lost."""
    (folder / "out").write_bytes(OLD)
    script = f'{{ "$@" && printf more >&{number}; }} {redirection} out'
    path = f"/dev/fd/{number}"
    assert wrapped(program, script)("-o", path, *RUN, at=api)[:3] == (0, b"", b"")
    expected = PRINTED + b"more" if ">>" in redirection else b"more" + PRINTED[4:]
    assert tree(folder) == {"out": expected}
    (folder / "link").symlink_to(path)
    for path in ("link", f"//dev/fd/{number}", "out"):
        (folder / "out").write_bytes(OLD)
        assert wrapped(program, script)("-o", path, *RUN, at=api)[:3] == (0, b"", b"")
        assert (folder / "out").read_bytes() == expected


@pytest.mark.parametrize("denied", [False, True], ids=["result", "failure"])
def test_an_output_that_is_a_fifo(denied: bool, cli: InProcess, api: Api, folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    if denied:
        api.answers({}, status="403 Forbidden")
    with reading(folder / "fifo") as read:
        result = cli("-o", "fifo", *RUN, at=api)
    assert result[:2] == (125 if denied else 0, b"")
    assert read.result() == (b"" if denied else PRINTED)
    assert tree(folder) == {"fifo": stat.S_IFIFO}


def test_a_fifo_whose_reader_left(cli: InProcess, serve: Serve, folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(open, folder / "fifo", "rb")
        leave = meanwhile(lambda: opened.result(LIMIT).close())
        result = cli("-o", "fifo", *RUN, at=serve(leave))
    check_saved(result[:3], RESULT, "fifo", errno.EPIPE, 125)


def test_a_file_that_is_mounted(program: Program, api: Api, folder: Path, tmp_path: Path) -> None:
    """As files are in containers: nothing can be renamed onto it."""
    skip_if(why_no_namespace())
    path, source = folder / "out", tmp_path / "source"
    path.write_bytes(OLD)
    source.write_bytes(OLD)
    mounted = Program(with_files(program.command, {str(path): source}), program.home, folder)
    assert mounted("-o", "out", *RUN, at=api)[:3] == (0, b"", b"")
    assert (source.read_bytes(), tree(folder)) == (PRINTED, {"out": OLD})


def test_quiet_wins_over_output(cli: InProcess, api: Api, folder: Path) -> None:
    """Promise 3.6."""
    (folder / "old").write_bytes(OLD)
    for path in ("old", "new", "missing/out"):
        for arguments in (RUN, ("status",), ("help",)):
            assert cli("-q", "-o", path, *arguments, at=api)[:3] == (0, b"", b"")
    assert tree(folder) == {"old": OLD}
    assert len(api.requests) == 6


# --- what cannot be written goes to standard output: 6.13 -------------------------------------


def check_saved(
    result: tuple[int, bytes, bytes], document: dict[str, Any], path: str, reason: int, code: int
) -> None:
    """The result is whole on standard output, all is told in a line, the code is a failure's."""
    assert (result[0], result[1]) == (code, as_json(document))
    told = f"cannot write to {path}: {os.strerror(reason)}; the result is on standard output"
    if code == 125:
        told += f"; the run run-1 ended with exit code {document['exit_code']}"
    assert result[2].decode() == f"bus-containers: {told}\n"


@pytest.mark.parametrize("name", api_commands())
def test_a_full_device(name: str, cli: InProcess, api: Api) -> None:
    for code in (0, 37):
        document = {**DOCUMENTS[name], "exit_code": code}
        result = cli("-o", "/dev/full", *words(name), at=api.answers(document))
        check_saved(result[:3], document, "/dev/full", errno.ENOSPC, failure_code(name))
    assert len(api.requests) == 2


@pytest.mark.parametrize(
    ("old", "limit"), [("", "size=64k"), ("old", "size=64k"), ("old", "size=512k,nr_inodes=2")]
)
def test_a_file_system_that_fills_up(
    old: str, limit: str, program: Program, api: Api, folder: Path
) -> None:
    """Of inodes, the folder has one and the file another."""
    skip_if(why_no_namespace())
    script = (
        f'mount -t tmpfs -o {limit} none "$PWD" && cd "$PWD" && {"printf old > out; " * bool(old)}'
        '"$@"; echo $? >&2; for file in *; do [ ! -e "$file" ] || cat "$file" >&2; done'
    )
    command = [*namespace_command(), "sh", "-c", script, "sh", *program.command]
    document = big(300_000)
    small = Program(command, program.home, folder)
    result = small("-o", "out", *RUN, at=api.answers(document))
    error, code, *files = result.err.decode().splitlines()
    check_saved((int(code), result.out, error.encode() + b"\n"), document, "out", errno.ENOSPC, 125)
    assert files == ([old] if old else [])


@pytest.mark.parametrize("old", tiers([OLD, None], OLD, ids=old_or_new))
def test_a_limit_on_the_size_of_files(
    old: bytes | None, program: Program, api: Api, folder: Path
) -> None:
    """`ulimit -f` counts blocks; the pipe of standard output has no such limit."""
    if old:
        (folder / "out").write_bytes(old)
    document = big(100_000)
    limited = wrapped(program, 'ulimit -f 16 && exec "$@"')
    result = limited("-o", "out", *RUN, at=api.answers(document))
    check_saved(result[:3], document, "out", errno.EFBIG, 125)
    assert tree(folder) == ({"out": old} if old else {})


# Says of a file with a result in it what NFS says where a quota is exceeded.
CLOSE_THAT_FAILS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
int close(int fd) {
    static int (*real)(int);
    struct stat file;
    int written = !fstat(fd, &file) && S_ISREG(file.st_mode) && file.st_size == SIZE;
    if (!real) real = (int (*)(int)) dlsym(RTLD_NEXT, "close");
    int result = real(fd);
    if (!written) return result;
    errno = EDQUOT;
    return -1;
}
"""


@pytest.mark.parametrize("old", tiers([OLD, None], OLD, ids=old_or_new))
def test_a_close_that_fails(
    old: bytes | None, program: Program, api: Api, folder: Path, tmp_path: Path
) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    skip_if("" if compiler and sys.platform == "linux" else "no C compiler")
    assert compiler
    document = big(100_000)
    source = tmp_path / "close.c"
    source.write_text(CLOSE_THAT_FAILS.replace("SIZE", str(len(as_json(document)))))
    library = str(tmp_path / "close.so")
    made = [compiler, "-shared", "-fPIC", "-o", library, str(source), "-ldl"]
    subprocess.run(made, check=True, timeout=LIMIT)
    if old:
        (folder / "out").write_bytes(old)
    result = program("-o", "out", *RUN, at=api.answers(document), env={"LD_PRELOAD": library})
    check_saved(result[:3], document, "out", errno.EDQUOT, 125)
    assert tree(folder) == ({"out": old} if old else {})


@pytest.mark.parametrize("gone", ["full", "closed", "reader left"])
def test_no_place_for_the_result_of_a_finished_run(gone: str, cli: InProcess, api: Api) -> None:
    """Nobody is told that nothing was sent, for then the run would be sent once more."""
    api.answers({**RESULT, "exit_code": 37})
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    stdout = {"full": full, "closed": None, "reader left": writer}[gone]
    try:
        for form in ("text", "json"):
            arguments = ("--error-format", form, "-o", "/dev/full", *RUN)
            result = cli(*arguments, at=api, stdout=stdout)
            assert result[:2] == (125, b"")
            if form == "json":
                [error] = result.objects
                assert error["run_state"] == "finished"
                told = error["text"]
            else:
                told = result.error
            assert "cannot write to /dev/full: No space left on device" in told
            assert "standard output" in told.replace("/dev/full", "")
            assert "run-1" in told
            assert "exit code 37" in told
            assert "sent" not in told
    finally:
        closing(writer, full)
    assert len(api.requests) == 2


# --- standard output: 6.11, 6.13, 6.14 --------------------------------------------------------

CALLS = [*((name, ()) for name in api_commands()), ("run", ("-f", "tsv")), ("runs", ("-f", "text"))]
HELPS = {("--version",): 1, ("help",): 1, ("status", "--help"): 1, ("run", "--help"): 125}
ALL = [*((words(name), failure_code(name)) for name in api_commands()), *HELPS.items()]


@pytest.mark.parametrize(("name", "options"), CALLS)
def test_head_takes_its_byte_and_leaves(
    name: str, options: tuple[str, ...], cli: InProcess, api: Api
) -> None:
    items = [
        {"run_id": "run-1", "image": "y" * 30, "state": str(number)} for number in range(9_000)
    ]
    api.answers({**big(500_000), "items": items, "deleted": True})
    reader, writer = os.pipe()
    with reading(reader, most=1) as read:
        result = cli(*options, *words(name), at=api, stdout=writer)
    os.close(writer)
    assert (result.code, result.err, len(read.result())) == (failure_code(name), b"", 1)


def test_head_in_a_shell(program: Program, api: Api, folder: Path) -> None:
    """Nor does the interpreter say anything at its end."""
    piped = wrapped(program, '{ "$@"; echo $? > code; } | head -c 1')
    assert piped(*RUN, at=api.answers(big(500_000)))[:3] == (0, b"{", b"")
    assert tree(folder) == {"code": b"125\n"}


@pytest.mark.parametrize(("arguments", "code"), ALL)
def test_a_standard_output_that_takes_nothing(
    arguments: tuple[str, ...], code: int, cli: InProcess, api: Api
) -> None:
    """A reader that left gives a code; all else is told before the request."""
    reader, gone = os.pipe()
    full, null = os.open("/dev/full", os.O_WRONLY), os.open(os.devnull, os.O_RDONLY)
    closing(reader)
    try:
        result = cli(*arguments, at=api, stdout=gone)
        assert (result.code, result.err) == (code, b"")
        api.requests.clear()
        for stdout, reason in ((None, "closed"), (full, "No space left"), (null, "Bad file")):
            result = cli(*arguments, at=api, stdout=stdout)
            check_failure(result, code, "cannot write to standard output", reason)
    finally:
        closing(gone, full, null)
    assert api.requests == []


@pytest.mark.skipif(sys.platform != "linux", reason="a pipe's size is known on Linux only")
@pytest.mark.parametrize("unbuffered", tiers(["1", ""], "1", ids=lambda on: f"unbuffered={on}"))
def test_a_reader_that_leaves_amid_a_write(unbuffered: str, program: Program, api: Api) -> None:
    """What was written until then is no error to the system, and not the whole result."""
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, 1032)  # F_GETPIPE_SZ
    env: Env = {"PYTHONUNBUFFERED": unbuffered}
    api.answers(big(1_000_000))

    def waiting() -> int:
        return int(struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"    "))[0])

    arguments = ("-f", "text", *RUN)
    with started(program.start(*arguments, at=api, env=env, stdout=writer)) as process:
        os.close(writer)
        await_that(lambda: waiting() == size)
        os.close(reader)
        _, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, b"cannot write" in err) == (125, False)


@pytest.mark.parametrize(
    "blocking", tiers([True, False], False, ids=lambda on: "blocking" if on else "not blocking")
)
@pytest.mark.parametrize("unbuffered", tiers(["1", ""], "1", ids=lambda on: f"unbuffered={on}"))
def test_a_pipe_gets_the_whole_result(
    unbuffered: str, blocking: bool, program: Program, api: Api
) -> None:
    """A write to a pipe that is full may be cut short, and is an error if it does not block."""
    api.answers({**big(3_000_000), "stderr": "y" * 300_000})
    (out, stdout), (err, stderr) = os.pipe(), os.pipe()
    for writer in (stdout, stderr):
        os.set_blocking(writer, blocking)
    env: Env = {"PYTHONUNBUFFERED": unbuffered}
    process = program.start("-f", "text", *RUN, at=api, env=env, stdout=stdout, stderr=stderr)
    with (
        started(process),
        reading(out) as printed,
        reading(err) as told,
    ):
        closing(stdout, stderr)
    assert process.returncode == 0
    assert printed.result() == b"x" * 3_000_000
    assert told.result().startswith(b"y" * 300_000 + b"\nbus-containers: run run-1 ended")


def test_a_standard_output_made_non_blocking_during_the_run(cli: InProcess, serve: Serve) -> None:
    """The pipe is another process's, too; waiting for its reader takes no processor time."""
    reader, writer = os.pipe()
    data = message(json.dumps(big(3_000_000)).encode())
    server = serve(meanwhile(lambda: os.set_blocking(writer, False), data))

    def read_late() -> bytes:
        assert server.ending.wait(1) is False
        with open(reader, "rb") as file:
            return file.read()

    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(read_late)
        before = time.thread_time()
        result = cli("-f", "text", *RUN, at=server, stdout=writer)
        used = time.thread_time() - before
        os.close(writer)
        assert read.result(LIMIT) == b"x" * 3_000_000
    assert result.code == 0
    assert used < 0.6


@pytest.mark.parametrize(
    ("form", "place", "stuck"),
    [
        ("json", "out", "pipe"),
        ("text", "-", "terminal"),
        pytest.param("text", "-", "pipe", marks=second_tier),
        pytest.param("json", "out", "terminal", marks=second_tier),
    ],
)
def test_the_result_does_not_wait_for_a_standard_error_that_nobody_reads(
    form: str, place: str, stuck: str, program: Program, api: Api, folder: Path
) -> None:
    """Promise 6.9, with more to say than fits, and a container that said something, too."""
    document = {**RESULT, "stdout": "x" * 9_000, "stderr": "y" * 9_000}
    expected = as_json(document) if form == "json" else b"x" * 9_000
    api.answers(document)
    with Terminal() as terminal:
        reader, writer = os.pipe()
        if stuck == "terminal":
            termios.tcflow(terminal.end, termios.TCOOFF)
        else:
            os.set_blocking(writer, False)
            with pytest.raises(BlockingIOError):
                while True:
                    os.write(writer, b"-" * 512)
            os.set_blocking(writer, True)
        stderr = terminal.end if stuck == "terminal" else writer
        arguments = ("-vv", "-f", form, "-o", place, *RUN)
        path = folder / ("out" if place == "out" else "printed")
        with (
            open(folder / "printed", "wb") as stdout,
            started(program.start(*arguments, at=api, stdout=stdout, stderr=stderr)) as process,
        ):
            await_that(lambda: path.exists() and path.read_bytes() == expected)
            os.close(writer)
            if stuck == "terminal":
                termios.tcflow(terminal.end, termios.TCOON)
                told = terminal.read_all()
                os.close(reader)
            else:
                told = read_all(reader)
    assert process.returncode == 0
    assert (b"y" * 9_000 in told) is (form == "text")


def test_what_was_deleted_before_an_interrupt_is_printed(program: Program, serve: Serve) -> None:
    """Promise 6.14."""
    server = serve(answer(b'{"deleted":true,"run_id":"a"}'), silent())
    with started(program.start("-f", "tsv", "delete", "a", "b", at=server)) as process:
        assert server.reached.wait(LIMIT)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (-signal.SIGINT, b"run_id\tdeleted\na\ttrue\n")
    assert "interrupted" in spoken(err).errors[0]
