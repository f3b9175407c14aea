# SPDX-License-Identifier: MIT
"""A finished run's result is never lost to a fault of the user's machine: promises 6.11 to 6.14.

Disks are really full, streams really closed, readers really gone.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bus_containers
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
)
from support import (
    BODIES,
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
    failure_code,
    fill,
    second_tier,
    skip_if,
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


def tree(folder: Path) -> dict[str, object]:
    """The names below a folder, and what each is."""

    def what(path: Path) -> object:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else stat.S_IFMT(path.stat().st_mode)

    return {str(path.relative_to(folder)): what(path) for path in folder.rglob("*")}


def meanwhile(act: Callable[[], object], data: bytes = message(BODIES["run"])) -> Script:
    """Read the request, do something while the run is in progress, and answer."""

    def script(connection: Connection) -> None:
        connection.read_request()
        act()
        connection.send(data)

    return script


def ended(process: subprocess.Popen[bytes], act: Callable[[], object]) -> Result:
    """Do something, and wait for the process; it does not outlive a test that fails."""
    with process:
        try:
            act()
            out, err = process.communicate(timeout=LIMIT)
        except BaseException:
            process.kill()
            raise
    return Result(process.returncode, out, err or b"", 0)


def interrupted(process: subprocess.Popen[bytes], server: Hostile, number: int) -> Result:
    """Send a signal when the server holds the process."""

    def act() -> None:
        assert server.reached.wait(LIMIT)
        process.send_signal(number)

    return ended(process, act)


def wrapped(program: Program, script: str, *before: str) -> Program:
    """The program as started by a shell, in whose script it is "$@"."""
    command = [*before, "sh", "-c", script, "sh", *program.command]
    return Program(command, program.home, program.folder)


def await_that(found: Callable[[], object], limit: float = LIMIT) -> None:
    end = time.monotonic() + limit
    while not found():
        assert time.monotonic() < end
        time.sleep(0.001)


def read_all(source: Path | int) -> bytes:
    """Read a FIFO, or a pipe, to its end."""
    data = b""
    with open(source, "rb", buffering=0) as file:
        while select.select([file], [], [], LIMIT)[0]:
            more = file.read(1 << 20)
            if not more:
                return data
            data += more
    raise AssertionError("nobody writes, and nobody left")


def check_saved(
    result: Result, document: dict[str, Any], path: str, reason: int, code: int = 125
) -> None:
    """The result is whole on standard output, all is told in a line, the code is a failure's."""
    assert result[:2] == (code, as_json(document))
    told = f"cannot write to {path}: {os.strerror(reason)}; the result is on standard output"
    if code == 125:
        told += f"; run run-1 ended with exit code {document['exit_code']}"
    if "deleted" in document:
        told += "; deleted: run-1"
    assert result.message == f"bus-containers: {told}\n"


def make_output(state: str, folder: Path) -> Path:
    """Make `out`, if there is one already, and return where a result will be."""
    path = folder / "out"
    if state in ("link", "dangling"):
        (folder / "deep").mkdir()
        path.symlink_to("deep/two")
        (folder / "deep" / "two").symlink_to("../target")
        path = folder / "target"
    if state in ("old", "link"):
        path.write_bytes(OLD)
    return path


# --- --output is proved writable before the request: 6.11 -------------------------------------

# A path, and what is made at its first part.
UNWRITABLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing folder": ("missing/out", void),
    "folder": ("here", Path.mkdir),
    "below a file": ("file/out", Path.touch),
    "dangling link": ("link", lambda path: path.symlink_to("missing/out")),
    "slash at the end": ("new/", void),
    "in proc": ("/proc/self/out", void),  # where nobody makes a file, root neither
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


@pytest.mark.parametrize("protected", ["out", "."], ids=["file", "folder"])
def test_modes_count(protected: str, program: Program, api: Api, folder: Path) -> None:
    """Though a new file could be put in the place of a protected one."""
    if os.geteuid() == 0:
        skip_if("" if shutil.which("setpriv") else "root may write everywhere; there is no setpriv")
        program = wrapped(program, 'exec setpriv --bounding-set=-all --inh-caps=-all "$@"')
    make_output("old", folder)
    (folder / protected).chmod(0o500)
    result = program("-o", "out", *RUN, at=api)
    if protected == ".":
        assert (result[:3], tree(folder)) == ((0, b"", b""), {"out": PRINTED})
    else:
        check_failure(result, 125, "cannot write to out: Permission denied")
        assert (api.requests, tree(folder)) == ([], {"out": OLD})


# --- the old content or one whole result: 6.12 ------------------------------------------------


@pytest.mark.parametrize("state", ["new", "old", "link", "dangling"])
def test_the_path_is_as_before_while_a_run_is_in_progress(
    state: str, cli: InProcess, serve: Serve, folder: Path
) -> None:
    """Afterwards the result is there, and links are as they were."""
    path = make_output(state, folder)
    before = tree(folder)
    seen = []
    look = meanwhile(lambda: seen.append(tree(folder)))
    assert cli("-o", "out", *RUN, at=serve(look))[:3] == (0, b"", b"")
    assert seen == [before]
    assert tree(folder) == {**before, path.name: PRINTED}


NO_RESULT: dict[str, tuple[Script, int, tuple[str, ...]]] = {
    "500-link": (answer(b'{"error":{"type":"internal"}}', "500 No"), 125, ()),
    "no json-new": (answer(b"<html><title>Login</title></html>"), 125, ()),
    "usage-old": (silent(), 2, ("--timeout-seconds", "x")),
    "deadline-dangling": (silent(), 125, ("--timeout", "300ms")),
    "ctrl-c-new": (silent(), -signal.SIGINT, ()),
    "sigterm-old": (silent(), -signal.SIGTERM, ()),
}


@pytest.mark.parametrize("case", NO_RESULT)
def test_nothing_changes_without_a_result(
    case: str, cli: InProcess, program: Program, serve: Serve, folder: Path
) -> None:
    script, code, options = NO_RESULT[case]
    make_output(case.split("-")[-1], folder)
    before = tree(folder)
    server = serve(script)
    arguments = ("-o", "out", "run", *options, "--", "true")
    if code < 0:
        result = interrupted(program.start(*arguments, at=server), server, -code)
    else:
        result = cli(*arguments, at=server)
    check_failure(result, code)
    assert tree(folder) == before


def instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


# What is done to the file, and why the result then cannot be where it was wanted.
TAKEN: dict[str, tuple[Callable[[Path], object], int]] = {
    "removed": (lambda path: path.unlink(), 0),
    "replaced": (lambda path: path.with_name("new").rename(path), 0),
    "folder gone": (lambda path: shutil.rmtree(path.parent), errno.ENOENT),
    "folder instead": (instead, errno.EISDIR),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_a_file_that_is_taken_away_during_the_run(
    taken: str, cli: InProcess, serve: Serve, folder: Path
) -> None:
    """The result is where it was wanted, or on standard output with the code of a failure."""
    take, reason = TAKEN[taken]
    path = folder / "where" / "out"
    path.parent.mkdir()
    path.write_bytes(OLD)
    path.with_name("new").write_bytes(b"new")
    result = cli("-o", str(path), *RUN, at=serve(meanwhile(lambda: take(path))))
    if reason:
        check_saved(result, RESULT, str(path), reason)
    else:
        assert result[:3] == (0, b"", b"")
        assert path.read_bytes() == PRINTED
    assert {*tree(folder)} <= {"where", "where/out", "where/new"}


def test_two_runs_with_one_output(program: Program, serve: Serve, folder: Path) -> None:
    contents = {letter: as_json(big(1_000_000, letter)) for letter in "ab"}
    release = threading.Event()

    def script(connection: Connection) -> None:
        request = connection.read_request()
        assert release.wait(LIMIT)
        letter = json.loads(request.partition(b"\r\n\r\n")[2])["args"][0]
        connection.send(message(contents[letter]))

    server = serve(script)
    processes = [program.start("-o", "out", "run", "--", letter, at=server) for letter in "ab"]
    await_that(lambda: len(server.requests) == 2)
    release.set()
    assert [ended(process, bool)[:3] for process in processes] == [(0, b"", b"")] * 2
    assert tree(folder) in [{"out": content} for content in contents.values()]


def test_a_run_that_fails_leaves_the_result_of_another(
    program: Program, serve: Serve, folder: Path
) -> None:
    """Both have one new output, and the one that fails was the first to look at it."""
    answers = {"good": message(BODIES["run"]), "bad": message(b"{}", "402 Payment Required")}
    releases = {name: threading.Event() for name in answers}

    def script(connection: Connection) -> None:
        request = connection.read_request()
        name = json.loads(request.partition(b"\r\n\r\n")[2])["args"][0]
        assert releases[name].wait(LIMIT)
        connection.send(answers[name])

    server = serve(script)
    bad = program.start("-o", "out", "run", "--", "bad", at=server)
    await_that(lambda: len(server.requests) == 1)
    good = program.start("-o", "out", "run", "--", "good", at=server)
    await_that(lambda: len(server.requests) == 2)
    assert ended(good, releases["good"].set)[:3] == (0, b"", b"")
    assert ended(bad, releases["bad"].set).code == 125
    assert tree(folder) == {"out": as_json(RESULT)}


@pytest.mark.parametrize("number", tiers([signal.SIGTERM, signal.SIGKILL], signal.SIGTERM))
def test_a_signal_amid_the_writing(
    number: signal.Signals, program: Program, serve: Serve, folder: Path
) -> None:
    path = make_output("old", folder)
    result = big(10_000_000)
    server = serve(answer(json.dumps(result).encode()))
    process = program.start("-o", "out", *RUN, at=server)

    def is_writing() -> bool:
        return len(os.listdir(folder)) > 1 or path.stat().st_size != len(OLD)

    def act() -> None:
        await_that(lambda: is_writing() or process.poll() is not None)
        process.send_signal(number)

    assert ended(process, act)[:2] in [(0, b""), (-number, b"")]
    assert path.read_bytes() in (OLD, as_json(result))
    if number != signal.SIGKILL:  # which cannot be caught
        assert [*tree(folder)] == ["out"]


def test_a_signal_just_before_a_hidden_file_is_removed(folder: Path) -> None:
    """It is removed all the same, where the writing has failed."""
    make_output("old", folder)

    def pieces() -> Iterator[str]:
        yield "new"
        assert len(tree(folder)) == 2
        raise OSError

    def interrupt(frame: Any, event: str, _called: Any) -> None:
        if (event, frame.f_code.co_name) == ("call", "_remove"):
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            bus_containers._replace(str(folder / "out"), pieces)
    finally:
        sys.setprofile(None)
    assert tree(folder) == {"out": OLD}


def test_an_output_that_becomes_a_fifo_without_a_reader(
    program: Program, serve: Serve, folder: Path
) -> None:
    path = make_output("old", folder)

    def replace() -> None:
        path.unlink()
        os.mkfifo(path)

    result = program("-o", "out", *RUN, at=serve(meanwhile(replace)))
    check_saved(result, DOCUMENTS["run"], "out", errno.ENXIO)


@pytest.mark.parametrize("output", ["-", "/dev/full"])
@pytest.mark.parametrize("form", ["json", "text"])
def test_a_signal_while_the_result_waits_for_its_reader(
    form: str, output: str, program: Program, api: Api
) -> None:
    """Promise 6.3: the run has ended, and nothing else can tell how, and why the file lacks it.

    The container's standard error would wait for a reader, too.
    """
    reader, writer = os.pipe()
    api.answers({**big(1_000_000), "exit_code": 37, "stderr": "x" * 100_000})
    process = program.start("-f", form, "-o", output, *RUN, at=api, stdout=writer)

    def act() -> None:
        await_that(lambda: bool(select.select([reader], [], [], 0)[0]))
        process.send_signal(signal.SIGTERM)

    result = ended(process, act)
    os.close(reader)
    os.close(writer)
    assert result.code == -signal.SIGTERM
    why = "" if output == "-" else f"; cannot write to {output}: No space left on device"
    line = f"bus-containers: terminated{why}; run run-1 ended with exit code 37\n"
    assert result.err == line.encode()


# --- as with a shell's >: 6.12 ----------------------------------------------------------------


def test_a_new_output_is_made_by_the_umask(cli: InProcess, api: Api, folder: Path) -> None:
    """With the longest name that there can be."""
    path = folder / ("n" * 255)
    document = {**RESULT, "exit_code": 37}
    before = os.umask(0o027)
    try:
        result = cli("-o", path.name, *RUN, at=api.answers(document))
    finally:
        os.umask(before)
    assert result[:3] == (37, b"", b"")
    assert tree(folder) == {path.name: as_json(document)}
    assert path.stat().st_mode & 0o777 == 0o640


def test_an_output_keeps_modes_owner_and_hard_links(cli: InProcess, api: Api, folder: Path) -> None:
    for name in ("linked", "single"):
        path = folder / name
        path.write_bytes(OLD)
        path.chmod(0o751)
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


def test_an_output_that_is_a_device_or_a_terminal(cli: InProcess, api: Api) -> None:
    before = os.stat(os.devnull)[:3]
    assert cli("-o", os.devnull, *RUN, at=api)[:3] == (0, b"", b"")
    assert os.stat(os.devnull)[:3] == before
    with Terminal() as terminal:
        assert cli("-o", os.ttyname(terminal.end), *RUN, at=api)[:3] == (0, b"", b"")
        assert terminal.read_until(lambda shown: len(shown) >= len(PRINTED)) == PRINTED


def test_an_output_that_is_a_fifo(cli: InProcess, api: Api, serve: Serve, folder: Path) -> None:
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(read_all, fifo)
        assert cli("-o", "fifo", *RUN, at=api)[:3] == (0, b"", b"")
        assert read.result() == PRINTED
        read = pool.submit(read_all, fifo)
        result = cli("-o", "fifo", *RUN, at=api.answers({}, status="403 Forbidden"))
        check_failure(result, 125, "403")
        assert read.result() == b""
        opened = pool.submit(open, fifo, "rb")
        leave = meanwhile(lambda: opened.result(LIMIT).close())
        result = cli("-o", "fifo", *RUN, at=serve(leave))
    check_saved(result, RESULT, "fifo", errno.EPIPE)
    assert tree(folder) == {"fifo": stat.S_IFIFO}


# How a shell opens the file, and the path that leads to it.
REDIRECTED = [
    ">> /dev/fd/1", "3>> /proc/self/fd/3", ">> link", ">> out",
    "1<> /dev/fd/1", ">> //dev/stdout", "3>> //dev/fd/3",
]  # fmt: skip


@pytest.mark.parametrize("redirected", tiers(REDIRECTED, *REDIRECTED[:4]))
def test_a_redirected_descriptor_by_a_path(
    redirected: str, program: Program, api: Api, folder: Path
) -> None:
    """As with `> /dev/stdout`: what was there is gone, and what the shell adds is not lost."""
    redirection, path = redirected.split()
    make_output("old", folder)
    if path == "link":
        (folder / "link").symlink_to("/dev/fd/1")
    number = redirection[0] if redirection[0].isdigit() else "1"
    script = f'{{ "$@" && printf more >&{number}; }} {redirection} out'
    assert wrapped(program, script)("-o", path, *RUN, at=api)[:3] == (0, b"", b"")
    expected = PRINTED + b"more" if ">>" in redirection else b"more" + PRINTED[4:]
    assert (folder / "out").read_bytes() == expected
    assert {*tree(folder)} <= {"out", "link"}


@pytest.mark.parametrize("redirected", ["-o /dev/stdout >out 2>&1", "-o out 2>out"])
def test_a_file_that_takes_the_messages_too(
    redirected: str, program: Program, api: Api, folder: Path
) -> None:
    """Promise 6.12: they come behind the result, and not over it."""
    option, path, *redirections = redirected.split()
    api.answers({**RESULT, "stdout": "its result\n" * 9, "stderr": "its words"})
    written = wrapped(program, f'"$@" {" ".join(redirections)}')
    assert written(option, path, "-f", "text", *RUN, at=api)[:3] == (0, b"", b"")
    last = "its words\nbus-containers: run run-1 ended with exit code 0 after 7 ms\n"
    assert (folder / "out").read_text() == "its result\n" * 9 + last


# What its folder is before: another disk, which is too small for the result, or has no inode left.
MOUNTED = {
    "": "true",
    "disk full": 'mount -t tmpfs -o size=64k none "$PWD" && cd "$PWD"',
    "no inode": 'mount -t tmpfs -o size=9M,nr_inodes=2 none "$PWD" && cd "$PWD"',
}


@pytest.mark.parametrize("case", MOUNTED)
def test_a_file_that_is_mounted(
    case: str, program: Program, api: Api, folder: Path, tmp_path: Path
) -> None:
    """As files are in containers: nothing can be renamed onto it, and its own disk has room."""
    skip_if(why_no_namespace())
    source = tmp_path / "source"
    source.write_bytes(OLD)
    mount = f'touch out && mount --bind {shlex.quote(str(source))} out && "$@"; code=$?'
    script = f"{MOUNTED[case]} && {mount}; ls -A >&2; exit $code"
    document = big(300_000)
    mounted = wrapped(program, script, *namespace_command())
    result = mounted("-o", "out", *RUN, at=api.answers(document))
    assert result[:3] == (0, b"", b"out\n")
    assert source.read_bytes() == as_json(document)


# Of inodes there is one for each of the folders, for each of the files, and none for another. That
# folder is written otherwise where the kernel lists what is mounted.
SAME_DISK = """
mount -t tmpfs -o size=9M,nr_inodes=4 none "$PWD" && cd "$PWD" && mkdir 'a\\b' && cd a* || exit 98
touch out "a source" && mount --bind "a source" out && "$@"
code=$?; cat "a source" >&2; exit $code"""


def test_a_file_that_is_mounted_from_its_own_disk(program: Program, api: Api) -> None:
    """Where that has no inode left, it may still have room."""
    skip_if(why_no_namespace())
    mounted = wrapped(program, SAME_DISK, *namespace_command())
    result = mounted("-o", "out", *RUN, at=api.answers(RESULT))
    assert result[:3] == (0, b"", PRINTED)


# What is mounted on the file is hidden by a disk on its folder, which is too small for the result.
COVERED = """
mkdir a && touch a/out source && mount --bind source a/out || exit 98
mount -t tmpfs -o size=64k none a && cd a && printf old >out && "$@"
code=$?; cat out >&2; exit $code"""


def test_a_file_that_was_mounted_on(program: Program, api: Api) -> None:
    skip_if(why_no_namespace())
    document = big(300_000)
    covered = wrapped(program, COVERED, *namespace_command())
    result = covered("-o", "out", *RUN, at=api.answers(document))
    assert result.err.endswith(b"\nold")
    check_saved(result._replace(err=result.err[:-3]), document, "out", errno.ENOSPC, 125)


# Nothing tells here whether the file is mounted, which is asked as its disk is too small.
WITHOUT_PROC = """
mount -t tmpfs -o size=64k none "$PWD" && cd "$PWD" && mount -t tmpfs none /proc || exit 98
printf old >out && "$@"
code=$?; cat out >&2; exit $code"""
TWICE = """
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import bus_containers
bus_containers.main()
sys.exit(bus_containers.main())
"""


def test_a_host_whose_disk_is_full_twice(program: Program, api: Api) -> None:
    """What is open in the process, and be it by us, is taken for a file of the host's."""
    skip_if(why_no_namespace())
    host = Program([sys.executable, "-c", TWICE, program.command[-1]], program.home, program.folder)
    twice = wrapped(host, WITHOUT_PROC, *namespace_command())
    result = twice("-o", "out", *RUN, at=api.answers(big(300_000)))
    assert result.code == 125
    assert result.err.count(b"No space left on device; the result is on standard output") == 2
    assert result.err.endswith(b"\nold")


def test_quiet_wins_over_output(cli: InProcess, api: Api, folder: Path) -> None:
    """Promise 3.6: nothing is proved, nothing is touched; a new file: test_command_line.py."""
    make_output("old", folder)
    for path in ("out", "missing/out"):
        assert cli("-q", "-o", path, *RUN, at=api)[:3] == (0, b"", b"")
    assert tree(folder) == {"out": OLD}


# --- what cannot be written goes to standard output: 6.13 -------------------------------------


LOOKS = [("old", os.lstat), ("old", os.fstat), ("link", os.lstat), ("link", os.readlink)]


@pytest.mark.parametrize(("state", "step"), LOOKS)
def test_a_file_that_is_replaced_amid_a_look(
    state: str, step: object, cli: InProcess, api: Api, folder: Path
) -> None:
    """By another writer: that one's file is renamed over, too, not overwritten in place."""
    path, other = make_output(state, folder), folder / "other"
    other.write_bytes(OLD)
    inode = other.stat().st_ino

    def replace(frame: Any, event: str, called: Any) -> None:
        name = frame.f_code.co_name
        if event == "c_return" and called is step and name in ("_target", "_is_shared"):
            sys.setprofile(None)
            other.replace(path)

    sys.setprofile(replace)
    try:
        assert cli("-o", "out", *RUN, at=api)[:3] == (0, b"", b"")
    finally:
        sys.setprofile(None)
    assert path.read_bytes() == PRINTED
    assert path.stat().st_ino != inode
    assert not other.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's link")
def test_a_link_of_another_user_in_a_folder_such_as_tmp(
    cli: InProcess, serve: Serve, folder: Path
) -> None:
    """It may be a trap: nothing is made where it says, nor replaced there."""
    folder.chmod(0o1777)

    def lay() -> None:
        (folder / "out").symlink_to("trap")
        os.lchown(folder / "out", 1, 1)

    result = cli("-o", "out", *RUN, at=serve(meanwhile(lay)))
    assert (result.code, result.out) == (125, PRINTED)
    server = serve(silent())
    assert cli("-o", "out", *RUN, at=server)[:2] == (125, b"")
    assert server.methods() == []
    assert tree(folder) == {"out": "trap"}
    (folder / "trap").write_bytes(OLD)
    inode = (folder / "trap").stat().st_ino
    assert cli("-o", "out", *RUN, at=serve(answer(BODIES["run"]))).code == 0
    assert tree(folder) == {"out": "trap", "trap": PRINTED}
    assert (folder / "trap").stat().st_ino == inode
    (folder / "trap").unlink()
    for owner, mode in ((1, 0o1777), (0, 0o1755)):  # that user's own folder, or ours alone
        os.chown(folder, owner, owner)
        folder.chmod(mode)
        assert cli("-o", "out", *RUN, at=serve(answer(BODIES["run"]))).code == 0
        assert tree(folder) == {"out": "trap", "trap": PRINTED}
        (folder / "trap").unlink()


def test_a_chain_of_links(cli: InProcess, api: Api, folder: Path) -> None:
    """As many as Linux follows, to what is not there yet, and one more."""
    for number in range(1, 42):
        (folder / str(number)).symlink_to(str(number - 1))
    assert cli("-o", "40", *RUN, at=api).code == 0
    assert (folder / "0").read_bytes() == PRINTED
    told = check_failure(cli("-o", "41", *RUN, at=api), 125)
    assert told == f"bus-containers: cannot write to 41: {os.strerror(errno.ELOOP)}"
    assert len(api.requests) == 1


def test_a_result_that_is_taken_away_at_once(cli: InProcess, api: Api, folder: Path) -> None:
    """By whoever waits for it, where the path is a link to it."""
    target = make_output("link", folder)

    def take(_frame: Any, event: str, called: Any) -> None:
        if event == "c_return" and called is os.replace:
            sys.setprofile(None)
            target.replace(folder / "taken")

    sys.setprofile(take)
    assert cli("-o", "out", *RUN, at=api)[:3] == (0, b"", b"")
    assert (folder / "taken").read_bytes() == as_json(DOCUMENTS["run"])


def test_a_link_in_a_folder_that_is_known_by_no_path(
    program: Program, api: Api, folder: Path
) -> None:
    """As where the one that the program works in was removed."""
    path = make_output("link", folder)
    inode = path.stat().st_ino
    script = 'mkdir gone; cd gone; rmdir ../gone; "$@"'
    result = wrapped(program, script)("-o", "../out", *RUN, at=api)
    assert result[:3] == (0, b"", b"")
    assert path.read_bytes() == as_json(DOCUMENTS["run"])
    assert path.stat().st_ino != inode


@pytest.mark.parametrize("state", ["old", "link"])
@pytest.mark.parametrize("moment", ["_write_all", "_is_shared"])
def test_a_path_that_becomes_another_link_amid_the_writing(
    moment: str, state: str, cli: InProcess, api: Api, folder: Path
) -> None:
    """What that one names was not looked at: it may be a device, or another's file."""
    path = make_output(state, folder)
    (folder / "other").write_bytes(OLD)
    (folder / "new").symlink_to("other")

    def move(frame: Any, event: str, _called: Any) -> None:
        if (event, frame.f_code.co_name) == ("call", moment):
            sys.setprofile(None)
            (folder / "new").replace(folder / "out")

    sys.setprofile(move)
    assert cli("-o", "out", *RUN, at=api)[:3] == (0, b"", b"")
    after = tree(folder)
    assert after.pop("other") == OLD
    assert after.pop(path.name) == PRINTED
    assert after.get("out", "other") == "other"
    assert not [name for name in after if name.startswith(".")]


def test_a_file_of_the_kernel(program: Program, api: Api) -> None:
    """There can be no other beside it."""
    path = "/proc/self/comm"
    skip_if("" if os.path.exists(path) else path)
    assert program("-o", path, *RUN, at=api)[:3] == (0, b"", b"")


def test_a_descriptor_of_a_high_number(cli: InProcess, api: Api, folder: Path) -> None:
    """Of a host that reads from it afterwards."""
    number = 300
    low = os.open(make_output("old", folder), os.O_RDWR)
    os.dup2(low, number)
    os.close(low)
    with open(number, "r+b") as file:
        assert cli("-o", f"/dev/fd/{number}", *RUN, at=api).code == 0
        assert file.read() == PRINTED


@pytest.mark.parametrize("text", ["target/", "missing/../target"])
def test_a_link_to_what_no_file_can_be(
    text: str, cli: InProcess, api: Api, folder: Path
) -> None:
    """The kernel finds nothing there, whatever the name comes to: told before the request."""
    (folder / "out").symlink_to(text)
    told = check_failure(cli("-o", "out", *RUN, at=api), 125)
    assert told == f"bus-containers: cannot write to out: {os.strerror(errno.ENOENT)}"
    assert (api.requests, tree(folder)) == ([], {"out": text})


def test_a_hidden_file_that_somebody_removes(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The old file is not overwritten for that, where readers would see parts of the new one."""
    make_output("old", folder)

    def pieces() -> Iterator[str]:
        yield "new"
        for hidden in folder.glob(".*"):
            hidden.unlink()

    with pytest.raises(bus_containers._OutputError, match="the result is on standard output"):
        bus_containers._Result(str(folder / "out")).write(pieces)
    assert capfd.readouterr().out == "new"
    assert tree(folder) == {"out": OLD}


@pytest.mark.skipif(sys.platform != "linux", reason="links that are no paths are those of /proc")
@pytest.mark.parametrize("is_named", [False, True])
def test_a_file_that_another_process_has_open(
    is_named: bool, cli: InProcess, api: Api, folder: Path
) -> None:
    """Its link in /proc says how it was called. A name that it still has is renamed over."""
    with open(folder / "out", "wb") as file:
        holder = subprocess.Popen(["sleep", "60"], stdout=file)
    if not is_named:
        (folder / "out").unlink()
    path = Path(f"/proc/{holder.pid}/fd/1")
    try:
        assert cli("-o", str(path), *RUN, at=api).code == 0
        found = folder / "out" if is_named else path
        assert found.read_bytes() == as_json(DOCUMENTS["run"])
    finally:
        holder.kill()
        holder.wait()
    assert os.listdir(folder) == (["out"] if is_named else [])


DEEP = """
import os, sys
for _ in range(20):
    os.mkdir("d" * 250)
    os.chdir("d" * 250)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_folder_whose_name_is_too_long(program: Program, api: Api, tmp_path: Path) -> None:
    """It can be worked in; the same holds below a folder of others that may not be searched."""
    deep = Program([sys.executable, "-c", DEEP, *program.command[1:]], program.home, tmp_path)
    result = deep("-o", "out", *RUN, at=api)
    assert (result.code, result.err) == (0, b"")
    assert result.out == b""


def test_a_full_device(cli: InProcess, api: Api) -> None:
    for name, code in [*((name, 0) for name in api_commands()), ("run", 37)]:
        document = {**DOCUMENTS[name], "exit_code": code}
        result = cli("-o", "/dev/full", *words(name), at=api.answers(document))
        check_saved(result, document, "/dev/full", errno.ENOSPC, failure_code(name))
    assert len(api.requests) == 5


# What is done before, in a folder where all that is mounted is gone afterwards. Of inodes, the
# folder has one and the file another. A file of an overlay is of another device than its folder, as
# one that is mounted there.
OVERLAY = """
mount -t tmpfs none "$PWD" && cd "$PWD" && mkdir lower disk all || exit 98
mount -t tmpfs -o size=64k none disk && mkdir disk/upper disk/work || exit 98
mount -t overlay -o lowerdir=lower,upperdir=disk/upper,workdir=disk/work none all || exit 99
cd all"""
FILLING = {
    "overlay": (OVERLAY, errno.ENOSPC),
    "disk": ('mount -t tmpfs -o size=64k none "$PWD" && cd "$PWD"', errno.ENOSPC),
    "inodes": ('mount -t tmpfs -o size=9M,nr_inodes=2 none "$PWD" && cd "$PWD"', errno.ENOSPC),
    "ulimit": ("ulimit -f 16", errno.EFBIG),
}


@pytest.mark.parametrize("case", FILLING)
def test_a_file_system_that_fills_up(case: str, program: Program, api: Api, folder: Path) -> None:
    before, reason = FILLING[case]
    namespace: tuple[str, ...] = ()
    if case != "ulimit":
        skip_if(why_no_namespace())
        namespace = namespace_command()
    script = f'{before} && printf old > out && "$@"; code=$?; ls -A >&2; cat out >&2; exit $code'
    document = big(300_000)
    api.answers(document)
    result = wrapped(program, script, *namespace)("-o", "out", *RUN, at=api)
    skip_if("no overlay can be mounted here" if result.code == 99 else "")
    told, end, left = result.err.partition(b"\n")
    check_saved(result._replace(err=told + end), document, "out", reason, 125)
    assert left == b"out\nold"


# Two signals at once while a new file, that of the result, is looked at. Python before 3.11 calls
# the handler of the second one amid the exception of the first.
SIGNALS = r"""
#define _GNU_SOURCE
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
int fstat64(int fd, struct stat64 *file) {
    int result = syscall(SYS_fstat, fd, file);
    int is_new = !result && S_ISREG(file->st_mode) && !file->st_size && file->st_nlink == 1;
    if (is_new && (file->st_mode & 0777) == 0600) raise(SIGINT), raise(SIGTERM);
    return result;
}
int fstat(int fd, struct stat *file) { return fstat64(fd, (struct stat64 *)file); }
int __fxstat64(int version, int fd, struct stat64 *file) { return fstat64(fd, file); }
int __fxstat(int version, int fd, struct stat *file) { return fstat(fd, file); }
"""


def test_two_signals_amid_a_system_call(
    program: Program, api: Api, folder: Path, tmp_path: Path
) -> None:
    env = preloaded(tmp_path, SIGNALS)
    make_output("old", folder)
    result = program("-o", "out", *RUN, at=api.answers(RESULT), env=env)
    assert (result.code, result.out) == (-signal.SIGINT, b"")
    assert result.message == "bus-containers: interrupted; run run-1 ended with exit code 0\n"
    assert tree(folder) == {"out": OLD}


# What NFS says where a quota is exceeded, and others where they fail: at the close of a FIFO or of
# a file with a result in it, when that is to be stored, and at its rename. Or no file gets a new
# name, as where a folder may only be added to. Or the mode of a file cannot be changed.
QUOTA = r"""
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
static int fail(int number) { errno = number; return -1; }
int close(int fd) {
    struct stat file;
    int is_known = !fstat(fd, &file);
    int is_result = is_known && S_ISREG(file.st_mode) && file.st_size == SIZE && CLOSE;
    int result = syscall(SYS_close, fd);
    if (is_result) return fail(CLOSE);
    return is_known && S_ISFIFO(file.st_mode) ? fail(EDQUOT) : result;
}
int fchmod(int fd, mode_t mode) {
    return mode == 0611 ? fail(EPERM) : (int)syscall(SYS_fchmod, fd, mode);
}
int fsync(int fd) { return FSYNC ? fail(FSYNC) : (int)syscall(SYS_fsync, fd); }
int rename(const char *from, const char *to) {
    int is_result = RENAME && strstr(from, ".bus-containers");
    if (!is_result) return syscall(SYS_renameat2, -100, from, -100, to, 0);
    return fail(strstr(to, "new") ? EPERM : RENAME);
}
"""


def preloaded(folder: Path, source: str, *options: str) -> Env:
    """What lets a program use these functions of C in place of the system's."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    skip_if("" if compiler and sys.platform == "linux" else "no C compiler")
    assert compiler
    library = str(folder / "library.so")
    made = [compiler, "-shared", "-fPIC", *options, "-o", library, "-x", "c", "-"]
    subprocess.run(made, check=True, timeout=LIMIT, input=source.encode())
    return {"LD_PRELOAD": library}


QUOTAS = {  # the errors of close, fsync and rename, 0 for none
    "close": (errno.EDQUOT, 0, 0),
    "fsync": (0, errno.EDQUOT, 0),
    "rename": (0, 0, errno.EDQUOT),
    "close, and there is no fsync": (errno.EINVAL, errno.EOPNOTSUPP, 0),
    "fsync, as where a pipe's reader left": (0, errno.EPIPE, 0),
    "fsync, by a number that Python may not know": (0, 133, 0),
}


@pytest.mark.parametrize("fails_at", tiers(list(QUOTAS), "close"))
def test_a_quota_that_is_exceeded(
    fails_at: str, program: Program, api: Api, serve: Serve, folder: Path, tmp_path: Path
) -> None:
    document = big(100_000)
    numbers = dict(zip(("CLOSE", "FSYNC", "RENAME"), QUOTAS[fails_at]))
    values = [f"-D{name}={number}" for name, number in numbers.items()]
    full = preloaded(tmp_path, QUOTA, *values, f"-DSIZE={len(as_json(document))}")
    make_output("old", folder)
    result = program("-o", "out", *RUN, at=api.answers(document), env=full)
    reason = next(number for number in QUOTAS[fails_at] if number)
    check_saved(result, document, "out", reason)
    if fails_at != "rename":
        with open(folder / "all", "wb") as stdout:
            result = program(*RUN, at=api, env=full, stdout=stdout)
        said = f"cannot write to standard output: {os.strerror(reason)}; run run-1 ended"
        assert said in check_failure(result, 125)
        (folder / "all").unlink()
    if fails_at == "close":
        path = folder / "out"
        path.chmod(0o611)
        inode = path.stat().st_ino
        assert program("-o", "out", *RUN, at=api.answers(RESULT), env=full)[:3] == (0, b"", b"")
        assert (path.stat().st_ino, path.read_bytes()) == (inode, PRINTED)
        path.write_bytes(OLD)
    if fails_at == "rename":
        result = program("-o", "new", *RUN, at=api, env=full)
        check_saved(result, document, "new", errno.EPERM)
    assert tree(folder) == {"out": OLD}
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(open, fifo, "rb")
        result = program("-o", "fifo", *RUN, at=api.answers({}, status="403 Forbidden"), env=full)
        check_failure(result, 125, "HTTP 403")
        opened.result(LIMIT).close()
        opened = pool.submit(open, fifo, "rb")
        leave = meanwhile(lambda: opened.result(LIMIT).close())
        result = program("-o", "fifo", *RUN, at=serve(leave), env=full)
    check_saved(result, RESULT, "fifo", errno.EPIPE)


@pytest.mark.parametrize("number", [errno.EIO, errno.EOVERFLOW], ids=["fails", "refuses"])
def test_a_disk_that_makes_no_file(
    number: int, cli: InProcess, api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overwriting might fail as well, amid the result. An idmapped mount refuses new files only."""
    open_as_usual = os.open

    def fail(path: Any, flags: int, mode: int = 0o777) -> int:
        if ".bus-containers" in str(path):
            raise OSError(number, os.strerror(number))
        return open_as_usual(path, flags, mode)

    make_output("old", folder)
    monkeypatch.setattr(os, "open", fail)
    result = cli("-o", "out", *RUN, at=api.answers(RESULT))
    if number == errno.EIO:
        check_saved(result, RESULT, "out", errno.EIO)
        assert tree(folder) == {"out": OLD}
    else:
        assert result[:3] == (0, b"", b"")
        assert tree(folder) == {"out": PRINTED}


def test_a_machine_without_randomness(
    cli: InProcess, api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a root folder without /dev, under a filter of system calls from before getrandom."""

    def fail(size: int) -> bytes:
        raise NotImplementedError("/dev/urandom (or equivalent) not found")

    make_output("old", folder)
    monkeypatch.setattr(os, "urandom", fail)
    assert cli("-o", "out", *RUN, at=api.answers(RESULT))[:3] == (0, b"", b"")
    assert tree(folder) == {"out": PRINTED}


# What a disk says that fills up when a new name is to be stored, as the last step.
LATE = r"""
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>
static int is_renamed;
int rename(const char *from, const char *to) {
    is_renamed = 1;
    return syscall(SYS_renameat2, -100, from, -100, to, 0);
}
int fsync(int fd) {
    errno = EIO;
    return is_renamed ? -1 : (int)syscall(SYS_fsync, fd);
}
"""


def test_a_name_that_cannot_be_stored(
    program: Program, api: Api, folder: Path, tmp_path: Path
) -> None:
    """Else a power cut would bring the old file back, or none, after an exit code of 0."""
    env = preloaded(tmp_path, LATE)
    for state in ("old", "new"):
        make_output(state, folder)
        result = program("-o", "out", *RUN, at=api.answers(RESULT), env=env)
        check_saved(result, RESULT, "out", errno.EIO)
        assert tree(folder) == {"out": PRINTED}
        (folder / "out").unlink()


def test_a_folder_in_the_place_of_a_result_that_was_taken_away(
    cli: InProcess, api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a folder that somebody watches. It was there, so nothing has failed."""
    replace = os.replace

    def take(source: str, target: str) -> None:
        replace(source, target)
        os.unlink(target)
        os.mkdir(target)

    monkeypatch.setattr(os, "replace", take)
    assert cli("-o", "out", *RUN, at=api.answers(RESULT))[:3] == (0, b"", b"")
    assert os.listdir(folder) == ["out"]


# An open file looks like a block device, whose end is not where a message goes, and which cannot be
# synced. The last two are what older C libraries call.
DEVICE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
int fstat64(int fd, struct stat64 *file) {
    int result = syscall(SYS_fstat, fd, file);
    if (!result && S_ISREG(file->st_mode)) file->st_mode ^= S_IFREG ^ S_IFBLK;
    return result;
}
int fstat(int fd, struct stat *file) { return fstat64(fd, (struct stat64 *)file); }
int __fxstat64(int version, int fd, struct stat64 *file) { return fstat64(fd, file); }
int __fxstat(int version, int fd, struct stat *file) { return fstat(fd, file); }
int fsync(int fd) { errno = EOPNOTSUPP; return -1; }
"""


def test_a_device_that_takes_the_messages_too(
    program: Program, api: Api, folder: Path, tmp_path: Path
) -> None:
    """They come before the result, in the place where a shell's `>` begins."""
    size = 65_536
    (folder / "device").write_bytes(b"-" * size)
    env = preloaded(tmp_path, DEVICE)
    result = wrapped(program, '"$@" 1<>device 2>&1')("-v", *RUN, at=api, env=env)
    written = (folder / "device").read_bytes()
    assert (result.code, len(written)) == (0, size)
    messages, found, rest = written.partition(PRINTED)
    assert (messages[:16], found) == (b"bus-containers: ", PRINTED)
    assert not rest.strip(b"-")


def test_no_descriptor_left_to_be_closed(cli: InProcess, api: Api, folder: Path) -> None:
    """As in a host program with many files. The result is stored all the same."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def exhaust(_frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called is os.fsync:
            sys.setprofile(None)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))

    with open(folder / "all", "wb") as stdout:
        sys.setprofile(exhaust)
        try:
            result = cli(*RUN, at=api, stdout=stdout.fileno())
        finally:
            sys.setprofile(None)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert result[:3] == (0, b"", b"")
    assert tree(folder) == {"all": as_json(DOCUMENTS["run"])}


@pytest.fixture
def streams() -> Iterator[dict[str, int | None]]:
    """Standard outputs that take nothing."""
    reader, writer = os.pipe()
    os.close(reader)
    full, read_only = os.open("/dev/full", os.O_WRONLY), os.open(os.devnull, os.O_RDONLY)
    yield {"reader left": writer, "full": full, "read-only": read_only, "closed": None}
    for descriptor in (writer, full, read_only):
        os.close(descriptor)


def test_no_place_for_the_result_of_a_finished_run(
    cli: InProcess, api: Api, streams: dict[str, int | None]
) -> None:
    """Nobody is told that nothing was sent, for then the run would be sent once more."""
    api.answers({**RESULT, "exit_code": 37})
    for gone in ("full", "closed", "reader left"):
        arguments = ("--error-format", "json", "-o", "/dev/full", *RUN)
        result = cli(*arguments, at=api, stdout=streams[gone])
        [error] = result.objects
        assert (result.code, result.out, error["run_state"]) == (125, b"", "finished")
        first, second, third = error["text"].split("; ")
        assert first == "cannot write to /dev/full: No space left on device"
        assert "standard output" in second
        assert third == "run run-1 ended with exit code 37"


def test_why_a_result_is_lost_comes_before_what_the_container_said(
    cli: InProcess, api: Api, streams: dict[str, int | None]
) -> None:
    """Which may wait for its reader, or fill the disk."""
    api.answers({**RESULT, "stderr": "its words\n"})
    result = cli("-o", "/dev/full", "-f", "text", *RUN, at=api, stdout=streams["full"])
    reasons, *rest = result.err.decode().splitlines()
    assert result.code == 125
    for part in ("to /dev/full: ", "; cannot write to standard output: ", "; run run-1 ended with"):
        assert part in reasons
    assert rest == ["its words", "bus-containers: run run-1 ended with exit code 0 after 7 ms"]


# --- standard output: 6.11, 6.13, 6.14 --------------------------------------------------------


def test_a_standard_output_that_takes_nothing(
    cli: InProcess, api: Api, streams: dict[str, int | None]
) -> None:
    """A reader that left gives a code; all else is told before the request."""
    lines = {words(name): failure_code(name) for name in api_commands()}
    lines.update({("--version",): 1, ("help",): 1, ("run", "--help"): 125})
    for line, code in lines.items():
        result = cli(*line, at=api, stdout=streams["reader left"])
        assert (result.code, result.err) == (code, b""), line
        api.requests.clear()
        for stdout, says in (("closed", "closed"), ("full", "No space"), ("read-only", "Bad file")):
            result = cli(*line, at=api, stdout=streams[stdout])
            check_failure(result, code, "cannot write to standard output", says)
        assert api.requests == []


def test_head_in_a_shell(program: Program, api: Api, folder: Path) -> None:
    """Nor does the interpreter say anything at its end, also with streams that have no buffer."""
    piped = wrapped(program, '{ "$@"; echo $? > code; } | head -c 1')
    result = piped(*RUN, at=api.answers(big(500_000)), env={"PYTHONUNBUFFERED": "1"})
    assert result[:3] == (0, b"{", b"")
    assert tree(folder) == {"code": b"125\n"}


def test_streams_made_non_blocking_during_the_run(cli: InProcess, serve: Serve) -> None:
    """The pipes are another process's, too; waiting for a reader takes no processor time."""
    (out, stdout), (err, stderr) = os.pipe(), os.pipe()
    document = {**big(3_000_000), "stderr": "y" * 300_000}

    def unblock() -> None:
        for writer in (stdout, stderr):
            os.set_blocking(writer, False)

    server = serve(meanwhile(unblock, message(json.dumps(document).encode())))

    def read_late() -> bytes:
        assert server.ending.wait(0.5) is False
        return read_all(out)

    with ThreadPoolExecutor(2) as pool:
        printed, told = pool.submit(read_late), pool.submit(read_all, err)
        before = time.thread_time()
        result = cli("-f", "text", *RUN, at=server, stdout=stdout, stderr=stderr)
        used = time.thread_time() - before
        for writer in (stdout, stderr):
            os.close(writer)
        assert printed.result(LIMIT) == b"x" * 3_000_000
        assert told.result(LIMIT).startswith(b"y" * 300_000 + b"\nbus-containers: run run-1 ended")
    assert result.code == 0
    assert used < 0.4


@second_tier
def test_the_result_does_not_wait_for_a_standard_error_that_nobody_reads(
    program: Program, api: Api, folder: Path
) -> None:
    """Promise 6.9, with a container that said something, too; terminals: test_terminal.py."""
    api.answers({**RESULT, "stdout": "x" * 9_000, "stderr": "y" * 9_000})
    path = folder / "out"
    reader, writer = os.pipe()
    fill(writer)
    process = program.start("-vv", "-f", "text", "-o", "out", *RUN, at=api, stderr=writer)
    os.close(writer)
    told: list[bytes] = []

    def act() -> None:
        await_that(lambda: path.exists() and path.read_bytes() == b"x" * 9_000)
        assert process.poll() is None
        told.append(read_all(reader))

    assert ended(process, act)[0] == 0
    assert b"y" * 9_000 in told[0]


def test_what_was_deleted_before_an_interrupt_is_printed(program: Program, serve: Serve) -> None:
    """Promise 6.14."""
    server = serve(answer(b'{"deleted":true,"run_id":"a"}'), silent())
    process = program.start("-f", "tsv", "delete", "a", "b", at=server)
    result = interrupted(process, server, signal.SIGINT)
    assert result[:2] == (-signal.SIGINT, b"run_id\tdeleted\na\ttrue\n")
    assert "interrupted" in result.error
