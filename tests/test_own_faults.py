# SPDX-License-Identifier: MIT
"""The program's own faults, and its Python's, are said as such: promise 3.21.

One line of kind `internal` that says what it was; 125 for `run`, else 1, never the container's
code; never told as the server's fault.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bus_containers
from hostile import Api, Hostile, message, namespace_command, raw, why_no_namespace
from support import (
    BODIES,
    CANARY,
    DOCUMENTS,
    Env,
    InProcess,
    Program,
    Result,
    as_json,
    check_each,
    check_failure,
    failure_code,
    second_tier,
    skip_if,
    tiers,
    words,
)

Serve = Callable[..., Hostile]
RUN = ("run", "--", "true")
PRINTED = as_json(DOCUMENTS["run"])
REPORT = "; this is a bug of the program or of its Python; please report this line"


def check_fault(result: Result, code: int, *says: str) -> dict[str, Any]:
    """One line of text, or one object, that says all of this; return the object."""
    assert (result.code, result.out, result.err.count(b"\n")) == (code, b"", 1), result
    if result.err.startswith(b"{"):
        [error] = result.objects
        assert error["kind"] == "internal"
    else:
        error = {"text": result.error}
    for word in (*says, REPORT):
        assert word in error["text"]
    assert "HTTP" not in error["text"]
    return error


def shadow(folder: Path, name: str) -> Env:
    """A script of the user's own with the name of a module, in a folder on PYTHONPATH."""
    (folder / name).mkdir()
    (folder / name / f"{name}.py").touch()
    return {"PYTHONPATH": str(folder / name)}


def as_started(program: Program, script: str, *before: str) -> Program:
    """The program as started by a shell, in whose script it is "$@"."""
    command = [*before, "sh", "-c", script, "sh", *program.command]
    return Program(command, program.home, program.folder)


# --- a Python, or a machine, with parts missing -----------------------------------------------


@pytest.mark.parametrize("name", tiers(["json", "http", "selectors"], "json"))
def test_a_file_in_the_way_of_a_module(
    name: str, program: Program, api: Api, tmp_path: Path
) -> None:
    env = shadow(tmp_path, name)
    check_fault(program(*RUN, at=api, env=env), 125, name, "Error: ")
    check_fault(program("status", at=api, env=env), 1, name, "Error: ")
    assert "POST" not in api.methods()


@second_tier
def test_a_file_in_the_way_of_any_module(program: Program, api: Api, tmp_path: Path) -> None:
    """Of those that are loaded; the program works if it needs nothing of it."""

    def loaded(caller: Program, *args: str) -> set[str]:
        err = caller(*args, at=api, env={"PYTHONPROFILEIMPORTTIME": "1"}).message
        names = (line.rpartition("|")[2].strip() for line in err.splitlines())
        return {name.partition(".")[0] for name in names if not name.startswith("_")}

    nothing = Program([sys.executable, "-c", "pass"], program.home, program.folder)
    names = loaded(program, *RUN) - loaded(nothing) - {*sys.builtin_module_names, "bus_containers"}
    assert {"json", "http", "socket", "selectors", "urllib"} < names

    def check(name: str) -> None:
        env = shadow(tmp_path, name)
        for options in ((), ("--error-format", "json")):
            result = program(*options, *RUN, at=api, env=env)
            if result[:3] != (0, PRINTED, b""):
                check_fault(result, 125)

    check_each(check, sorted(names))


def test_a_python_without_tls(program: Program, serve: Serve, tmp_path: Path) -> None:
    """It does for plain http, also when an answer over it is cut, after which there is no doubt."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['_ssl'] = None\n")
    env: Env = {"PYTHONPATH": str(tmp_path)}
    cut = raw(message(BODIES["run"])[:-20])
    result = program("--error-format", "json", *RUN, at=serve(cut), env=env)
    [error] = result.objects
    assert (result.code, error["kind"], error["run_state"]) == (125, "transport", "unknown")
    assert "bus-containers delete" in error["text"]
    with_tls = {**env, "BUS_AI_API_URL": "https://127.0.0.1:1", "BUS_AI_TOKEN": CANARY}
    check_fault(program(*RUN, env=with_tls), 125, "_ssl")


@pytest.mark.parametrize("words_", tiers([RUN, ("status",)], RUN, ids=lambda words: words[0]))
def test_no_dev_null(words_: tuple[str, ...], program: Program, api: Api, tmp_path: Path) -> None:
    """It is needed only in the place of a stream that is closed."""
    skip_if(why_no_namespace())
    (tmp_path / "dev").mkdir()
    script = (
        f"mount -t tmpfs -o nodev none {tmp_path}/dev && mknod {tmp_path}/dev/null c 1 3 && "
        f"mount --bind {tmp_path}/dev/null /dev/null && ! true < /dev/null || exit 99; "
        'if [ "$CLOSED" ]; then exec "$@" <&-; else exec "$@"; fi'
    )
    bare = as_started(program, script, *namespace_command())
    opened = bare(*words_, at=api)
    skip_if("a device cannot be made here" if opened.code == 99 else "")
    assert opened[:2] == (0, as_json(DOCUMENTS[words_[0]]))
    closed = bare(*words_, at=api, env={"CLOSED": "1"})
    [line] = [line for line in closed.message.splitlines() if REPORT in line]
    assert (closed.code, closed.out) == (failure_code(words_[0]), b"")
    assert "/dev/null" in line


@pytest.mark.parametrize("name", tiers(["run", "status", "runs", "delete"], "status"))
@pytest.mark.parametrize(
    "fault",
    tiers(["raise OSError(22, 'Invalid')", "del os.set_blocking"], "raise OSError(22, 'Invalid')"),
)
def test_streams_that_cannot_be_made_to_block(
    fault: str, name: str, program: Program, api: Api, tmp_path: Path
) -> None:
    """On Windows, from Python 3.12 on, all but pipes refuse it; before, there was no such call."""
    refusing = f"def refuse(*_):\n    {fault}\nos.set_blocking = refuse"
    script = f"import os\n{fault if 'del' in fault else refusing}\n"
    (tmp_path / "sitecustomize.py").write_text(script)
    result = program(*words(name), at=api, env={"PYTHONPATH": str(tmp_path)})
    assert result[:3] == (0, as_json(DOCUMENTS[name]), b"")


def test_a_folder_that_is_gone(program: Program, api: Api, folder: Path) -> None:
    lost = as_started(program, 'rmdir "$PWD" && exec "$@"')
    assert lost(*RUN, at=api)[:3] == (0, PRINTED, b"")
    folder.mkdir()
    check_failure(lost("-o", "out", *RUN, at=api), 125, "cannot write to out: No such file")
    assert len(api.requests) == 1


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


@second_tier
def test_a_read_only_file_system_without_tmp(program: Program, api: Api, tmp_path: Path) -> None:
    """As in a container with --read-only, made `FROM scratch`."""
    skip_if(why_no_namespace())
    command = [os.path.realpath(word) if os.path.exists(word) else word for word in program.command]
    inside = any(word.startswith("/tmp/") for word in (*command, sys.prefix))
    skip_if("the program or its Python is in /tmp" if inside else "")
    (tmp_path / "root").mkdir()
    prefix = [*namespace_command(), "sh", "-c", _READ_ONLY_ROOT, "sh", str(tmp_path / "root")]
    lean = Program([*prefix, *command], Path("/nowhere"))
    result = lean(*RUN, at=api, env={"TMPDIR": None})
    skip_if(f"no read-only file system to be had: {result.message}" if result.code == 99 else "")
    assert result[:3] == (0, PRINTED, b"")
    check_failure(lean("-o", "/out", *RUN, at=api), 125, "/out: Read-only file system")
    assert len(api.requests) == 1


# --- a user whom no passwd file knows ---------------------------------------------------------


@pytest.mark.parametrize("home", ["/nowhere", None], ids=["home", "no home"])
def test_an_unknown_user(home: str | None, cli: InProcess, program: Program, api: Api) -> None:
    """As in a container that was told a number; the token comes from a variable."""
    if os.geteuid() == 0:  # who may read the tests whoever the user is
        before = os.getresuid()
        os.setresuid(54321, 0, 0)
        try:
            result = cli(*RUN, at=api, env={"HOME": home})
        finally:
            os.setresuid(*before)
    else:
        stranger = ["unshare", "--map-user=54321", *program.command]
        caller = Program(stranger, program.home, program.folder)
        result = caller(*RUN, at=api, env={"HOME": home})
        skip_if("no user namespace to be had" if b"unshare" in result.err else "")
    assert result[:3] == (0, PRINTED, b"")


# --- no descriptors, no memory ----------------------------------------------------------------


@pytest.mark.parametrize("most", tiers([4, 8], 4))
def test_few_descriptors(most: int, program: Program, api: Api) -> None:
    """Promise 3.11: with one for a file, but none beside it for a socket, 125 and a line."""
    skip_if("" if len(program.command) == 2 else "the program is not started by a Python here")
    bare = Program([sys.executable, "-S", program.command[1]], program.home, program.folder)
    result = as_started(bare, f'ulimit -n {most} && exec "$@"')(*RUN, at=api)
    if most == 8:
        assert result[:3] == (0, PRINTED, b"")
    else:
        check_failure(result, 125, os.strerror(errno.EMFILE))
        assert api.requests == []


ALL_DESCRIPTORS = """
import os, resource
from bus_containers import BusContainersError, Client
client_of = lambda: Client(os.environ["BUS_AI_API_URL"], "t")
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
for call in (lambda: client_of().status(), lambda: client_of().run(["true"])):
    try:
        call()
    except BusContainersError as error:
        print(type(error).__name__, error.run_state, flush=True)
for descriptor in taken:
    os.close(descriptor)
print(client_of().run(["true"])["stdout"])
"""


def test_all_descriptors_used_at_the_first_call_of_the_library(program: Program, api: Api) -> None:
    """Promise 4.4: an error of its own, and when there are some again all is well."""
    place = os.path.dirname(str(bus_containers.__file__))
    host = Program([sys.executable, "-c", ALL_DESCRIPTORS], program.home, program.folder)
    result = host(at=api, env={"PYTHONPATH": place})
    assert (result.code, result.err) == (0, b"")
    status, run, after = result.out.decode().splitlines()
    assert (run.split()[1], after) == ("not_sent", "OK")
    assert status
    assert api.methods() == ["POST"]


def test_an_answer_larger_than_the_memory(program: Program, api: Api) -> None:
    """What came of a run is not known then, and that is said, too."""
    api.answers({**DOCUMENTS["run"], "stdout": "x" * 60_000_000})
    limited = as_started(program, 'ulimit -v 100000 && exec "$@"')
    result = limited("--error-format", "json", *RUN, at=api)
    [error] = result.objects
    assert (result.code, error["run_state"], error["retryable"]) == (125, "unknown", False)
    for words_ in ("memory", "bus-containers delete"):
        assert words_ in error["text"]
    assert api.methods() == ["POST"]


# --- an exception that nobody foresaw ---------------------------------------------------------

UNFORESEEN = [AttributeError, TypeError, KeyError, ZeroDivisionError, AssertionError]


def failing(kind: type[Exception]) -> Callable[..., Any]:
    """A function with a fault that has the token in its words, and a value behind it."""

    def fail(*_: object, **__: object) -> Any:
        try:
            raise ValueError("the value behind it")
        except ValueError as error:
            raise kind(f"surprise {CANARY}") from error

    return fail


@pytest.mark.parametrize("place", [(http.client.HTTPResponse, "begin"), (json, "loads")])
def test_no_memory_while_an_answer_is_read(
    place: tuple[object, str], cli: InProcess, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*place, failing(MemoryError))
    check_failure(cli("status", at=api), 1, "memory")
    check_failure(cli(*RUN, at=api), 125, "memory", "bus-containers delete")


@pytest.mark.parametrize("place", [(http.client.HTTPResponse, "begin"), (json, "loads")])
@pytest.mark.parametrize("kind", tiers(UNFORESEEN, AttributeError))
def test_a_fault_while_an_answer_is_read(
    kind: type[Exception],
    place: tuple[object, str],
    cli: InProcess,
    api: Api,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(*place, failing(kind))
    check_fault(cli("status", at=api), 1, kind.__name__, "surprise")
    check_fault(cli(*RUN, at=api), 125, kind.__name__, "surprise", "bus-containers delete")
    if place[0] is not json:
        result = cli("--error-format", "json", *RUN, at=api)
        assert check_fault(result, 125, kind.__name__)["run_state"] == "unknown"
    loud = cli("-v", *RUN, at=api)
    assert loud.code == 125
    assert f", in {place[1]}" not in loud.message.splitlines()[-1]
    assert ", in fail" in loud.message
    assert "value behind" not in loud.message
    client = bus_containers.Client(api.url, CANARY)
    with pytest.raises(kind):
        client.run(["true"])


@pytest.mark.parametrize("kind", tiers([*UNFORESEEN, MemoryError], AttributeError, MemoryError))
def test_a_fault_while_the_result_is_written(
    kind: type[Exception], cli: InProcess, api: Api
) -> None:
    class Stream:
        write = failing(kind)

        def flush(self) -> None:
            pass

    result = cli("--error-format", "json", *RUN, at=api, stdout=Stream())
    [error] = result.objects
    assert (result.code, error["run_state"]) == (125, "finished")
    assert error["kind"] in ("internal", "output")
    assert "memory" in error["text"] or "surprise" in error["text"]
    assert cli("status", at=api, stdout=Stream()).code == 1


def test_an_exception_of_a_hook_of_the_hosts(cli: InProcess, api: Api) -> None:
    """KeyboardInterrupt apart, nothing passes `main`."""

    class Stream:
        def write(self, _: str) -> None:
            raise KeyboardInterrupt("of the host's own, with a text")

        def flush(self) -> None:
            pass

    result = cli(*RUN, at=api, stdout=Stream())
    assert result.code == 130
    assert "interrupted" in result.error
