# SPDX-License-Identifier: MIT
"""The program's own faults, and its Python's, are said as such: promise 3.21.

One line of kind `internal` that says what it was; 125 for `run`, else 1, never the container's
code; never told as the server's fault. Little memory: test_run_fate.py.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bus_containers
from hostile import Api, Hostile, answer, namespace_command, why_no_namespace, with_files
from support import (
    CANARY,
    DOCUMENTS,
    Env,
    InProcess,
    Program,
    Result,
    as_json,
    check_each,
    check_failure,
    fill,
    second_tier,
    skip_if,
    tiers,
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


def shadow(folder: Path, name: str, script: str = "") -> Env:
    """A script of the user's own with the name of a module, in a folder on PYTHONPATH."""
    (folder / name).mkdir(parents=True)
    (folder / name / f"{name}.py").write_text(script)
    return {"PYTHONPATH": str(folder / name)}


def as_started(program: Program, script: str, *before: str) -> Program:
    """The program as started by a shell, in whose script it is "$@"."""
    command = [*before, "sh", "-c", script, "sh", *program.command]
    return Program(command, program.home, program.folder)


# --- a Python, or a machine, with parts missing -----------------------------------------------


def test_a_file_in_the_way_of_a_module(program: Program, api: Api, tmp_path: Path) -> None:
    env = shadow(tmp_path, "json")
    check_fault(program(*RUN, at=api, env=env), 125, "json", "Error: ")
    check_fault(program("status", at=api, env=env), 1, "json", "Error: ")
    check_fault(program("delete", "a", "b", at=api, env=env), 1, "json", "Error: ")
    env = shadow(tmp_path / "run", "json", "def __getattr__(name): raise ValueError(name)")
    check_fault(program("delete", "a", "b", at=api, env=env), 1, "ValueError: ")
    assert api.requests == []


FAILING = ["raise SystemExit(0)", "import json; json.surprise", "1 / 0"]
CLIENT = """
import bus_containers
try:
    bus_containers.Client("http://127.0.0.1:1", "t0ken")
except bus_containers.BusContainersError as error:
    print(error.kind, error.run_state)
"""


@pytest.mark.parametrize("script", tiers(FAILING, FAILING[0]))
# Messages need select, too, which some Pythons have built in.
@pytest.mark.parametrize("name", sorted({"json", "select"} - {*sys.builtin_module_names}))
def test_a_script_in_the_way_that_ends_or_fails(
    name: str, script: str, program: Program, api: Api, tmp_path: Path
) -> None:
    """No exit 0 from it, and no exception of another kind out of the library."""
    env = shadow(tmp_path, name, script)
    check_fault(program(*RUN, at=api, env=env), 125)
    check_fault(program("status", at=api, env=env), 1)
    assert api.requests == []
    places = (env["PYTHONPATH"], os.path.dirname(str(bus_containers.__file__)))
    host = Program([sys.executable, "-c", CLIENT], program.home)
    assert host(env={"PYTHONPATH": os.pathsep.join(map(str, places))}).out == b"internal not_sent\n"


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


def test_a_python_without_tls(program: Program, tmp_path: Path) -> None:
    """It does for plain http: test_run_fate.py."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['_ssl'] = None\n")
    env: Env = {"BUS_AI_API_URL": "https://127.0.0.1:1", "BUS_AI_TOKEN": CANARY}
    env["PYTHONPATH"] = str(tmp_path)
    check_fault(program(*RUN, env=env), 125, "_ssl")
    *places, fault = program("-v", *RUN, env=env).message.splitlines()
    assert "internal error: " in fault
    assert re.search(r"ssl\.py, line \d+, in <module>$", places[-1])


def test_no_dev_null(program: Program, api: Api, tmp_path: Path) -> None:
    """It is not needed, in the place of a stream that is closed either."""
    skip_if(why_no_namespace())
    null = tmp_path / "dev" / "null"
    null.parent.mkdir()
    script = (
        f"mount -t tmpfs -o nodev none {null.parent} && mknod {null} c 1 3 && "
        f"mount --bind {null} /dev/null && ! true < /dev/null || exit 99; "
        'if [ "$CLOSED" ]; then exec "$@" <&-; else exec "$@"; fi'
    )
    bare = as_started(program, script, *namespace_command())
    opened = bare(*RUN, at=api)
    skip_if("a device cannot be made here" if opened.code == 99 else "")
    assert opened[:2] == (0, PRINTED)
    assert bare(*RUN, at=api, env={"CLOSED": "1"})[:2] == (0, PRINTED)


# Root's capabilities, to read any folder, are taken away.
UNREADABLE = """
mount -t tmpfs -o mode=0111 none "$0" || exit 99
for path in /*; do
    if [ -L "$path" ]; then ln -s "$(readlink "$path")" "$0$path"
    elif [ -d "$path" ]; then mkdir "$0$path" && mount --rbind "$path" "$0$path"; fi
done
exec chroot "$0" setpriv --bounding-set=-all --inh-caps=-all "$@" <&- 2>&1
"""


def test_a_root_folder_that_cannot_be_read(program: Program, api: Api, tmp_path: Path) -> None:
    """It takes the place of a stream that is closed."""
    skip_if(why_no_namespace())
    skip_if("" if os.geteuid() == 0 and shutil.which("setpriv") else "no root, or no setpriv")
    root = tmp_path / "root"
    root.mkdir()
    command = [*namespace_command(), "sh", "-c", UNREADABLE, str(root), *program.command]
    result = Program(command, program.home)(*RUN, at=api)
    skip_if("no root folder can be made here" if result.code == 99 else "")
    assert result[:3] == (0, PRINTED, b"")


def test_a_folder_that_is_gone(program: Program, api: Api, folder: Path) -> None:
    lost = as_started(program, 'rmdir "$PWD" && exec "$@"')
    assert lost(*RUN, at=api)[:3] == (0, PRINTED, b"")
    folder.mkdir()
    check_failure(lost("-o", "out", *RUN, at=api), 125, "cannot write to out: No such file")
    assert len(api.requests) == 1


def test_an_unknown_user(program: Program, api: Api, tmp_path: Path) -> None:
    """As in a container that was told a number; the token comes from a variable."""
    skip_if(why_no_namespace())
    (tmp_path / "passwd").touch()
    command = with_files(program.command, {"/etc/passwd": tmp_path / "passwd"})
    result = Program(command, program.home)(*RUN, at=api, env={"HOME": None})
    assert result[:3] == (0, PRINTED, b"")


# --- no descriptors ---------------------------------------------------------------------------


def test_few_descriptors(program: Program, api: Api) -> None:
    """Promise 3.11: with one for a file, but none beside it for a socket, 125 and a line."""
    skip_if("" if len(program.command) == 2 else "the program is not started by a Python here")
    bare = Program([sys.executable, "-S", program.command[1]], program.home, program.folder)
    options = ("--timeout", "800ms")  # one retry, not two
    env: Env = {}
    if "2.17" <= platform.libc_ver()[1] < "2.34":  # where the end of a thread opens this library
        env = {"LD_PRELOAD": "libgcc_s.so.1"}
    result = as_started(bare, 'ulimit -n 4 && exec "$@"')(*options, *RUN, at=api, env=env)
    check_failure(result, 125, os.strerror(errno.EMFILE))
    assert api.requests == []


def test_a_python_without_the_names_of_https(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing shows before anything is sent, as one of our own errors."""
    monkeypatch.setitem(sys.modules, "encodings.idna", None)
    with pytest.raises(bus_containers.BusContainersError, match="idna") as caught:
        bus_containers.Client("https://127.0.0.1:9", CANARY)
    assert (caught.value.kind, caught.value.run_state) == ("internal", "not_sent")


def test_a_standard_error_of_a_high_number(
    cli: InProcess, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`select` takes descriptors below 1024 only. Promise 6.9: nobody waits for its reader."""
    monkeypatch.setattr(bus_containers, "_PATIENCE_SECONDS", 0.2)
    number = 1500
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    skip_if("" if before[1] > number else "more descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1, before[1]))
    reader, writer = os.pipe()
    os.dup2(writer, number)
    os.close(writer)
    try:
        with open(reader, "rb") as file:
            with open(number, "w", encoding="utf-8") as stream:
                assert cli("run", "-v", "true", at=api, stderr=stream).code == 0
                assert b": 200, " in os.read(reader, 65536)
                fill(number)
                assert cli("run", "-v", "true", at=api, stderr=stream).code == 0
            assert file.read().strip(b"x") == b""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


ALL_DESCRIPTORS = """
import os, resource
from bus_containers import BusContainersError, Client
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
run = lambda: print(Client(os.environ["BUS_AI_API_URL"], "t").run(["true"])["stdout"])
try:
    run()
except BusContainersError as error:
    print(error.run_state)
for descriptor in taken:
    os.close(descriptor)
run()
"""


def test_all_descriptors_used_at_the_first_call_of_the_library(program: Program, api: Api) -> None:
    """Promise 4.4: an error of its own, and when there are some again all is well."""
    place = os.path.dirname(str(bus_containers.__file__))
    host = Program([sys.executable, "-c", ALL_DESCRIPTORS], program.home)
    assert host(at=api, env={"PYTHONPATH": place})[:3] == (0, b"not_sent\nOK\n", b"")


# --- an exception that nobody foresaw ---------------------------------------------------------


class Failing:
    """A function, or a stream, with a fault that has the token in its words, and one behind it."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def write(self, *_: object, **__: object) -> Any:
        try:
            raise ValueError("the value behind it")
        except ValueError as error:
            raise self.kind(f"surprise {CANARY}") from error

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("place", [(http.client.HTTPResponse, "begin"), (json, "loads")])
def test_a_fault_while_an_answer_is_read(
    place: tuple[object, str], cli: InProcess, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*place, Failing(MemoryError).write)
    check_failure(cli("status", at=api), 1, "memory")
    check_failure(cli(*RUN, at=api), 125, "memory", "bus-containers delete")
    monkeypatch.setattr(*place, Failing(AttributeError).write)
    says = ("AttributeError", "surprise")
    check_fault(cli("status", at=api), 1, *says)
    check_fault(cli(*RUN, at=api), 125, *says, "bus-containers delete")
    if place[0] is not json:
        result = cli("--error-format", "json", *RUN, at=api)
        assert check_fault(result, 125, *says)["run_state"] == "unknown"
    *places, last = cli("-v", *RUN, at=api).message.splitlines()
    assert f", in {place[1]}" not in last
    assert places[-1].endswith(", in write")
    assert "value behind" not in "".join(places)
    with pytest.raises(AttributeError):
        bus_containers.Client(api.url, CANARY).run(["true"])


def test_a_fault_amid_deletions(
    cli: InProcess, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 6.14: what was deleted before it is told."""

    def begin(response: http.client.HTTPResponse) -> None:
        original(response)
        if response.status == 404:
            raise AttributeError("surprise")

    original = http.client.HTTPResponse.begin
    monkeypatch.setattr(http.client.HTTPResponse, "begin", begin)
    server = serve(answer(b'{"deleted":true,"run_id":"a"}'), answer(b"{}", "404 Not Found"))
    check_fault(cli("delete", "a", "b", at=server), 1, "surprise; deleted: a; ")


@pytest.mark.parametrize(
    ("kind", "told", "says", "code"),
    [
        (AttributeError, "internal", "surprise", 125),
        (MemoryError, "output", "cannot write to standard output: ", 125),
        (KeyboardInterrupt, "interrupted", "interrupted", 130),
    ],
)
def test_a_fault_while_the_result_is_written(
    kind: type[BaseException], told: str, says: str, code: int, cli: InProcess, api: Api
) -> None:
    """Nothing passes `main`, whatever a stream of the host's raises."""
    result = cli("--error-format", "json", *RUN, at=api, stdout=Failing(kind))
    [error] = result.objects
    assert (result.code, error["kind"], error["run_state"]) == (code, told, "finished")
    assert says in error["text"]
    if code == 125:
        assert cli("status", at=api, stdout=Failing(kind)).code == 1


LAST_WORDS = """
import http.client, bus_containers
kept = None
def use_up_memory():
    global kept
    import resource
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for length in (1 << 20, 1 << 12, *range(512, 0, -8)):
        try:
            while True:
                kept = (kept, bytes(length))
        except MemoryError:
            pass
class Fault(Exception):
    def __str__(self):
        if USES_UP_MEMORY:
            use_up_memory()
        raise MemoryError
def begin(response):
    response.fp.peek(1)  # the request has arrived
    raise Fault
http.client.HTTPResponse.begin = begin
bus_containers.console()
"""


LITTLE_MEMORY = """
import http.client, os, resource, signal, threading, urllib.request
from bus_containers import BusContainersError, Client
client = Client.from_env()
stack = 64 << 20
threading.stack_size(stack)
with open("/proc/self/status") as file:
    [used] = [int(line.split()[1]) << 10 for line in file if line.startswith("VmData:")]
for free in range(stack, stack + 100_000, 4096):
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_DATA, (used + free, used + free))
        signal.alarm(20)  # which ends the child
        try:
            client.status()
        except BusContainersError:
            pass
        os._exit(0)
    assert os.waitpid(child, 0)[1] != signal.SIGALRM  # Python's own end is not our fault
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of memory as on Linux")
def test_memory_for_the_stack_of_a_thread_and_little_more(program: Program, api: Api) -> None:
    """Promise 6.5: there is no wait without end for a thread that cannot begin."""
    host = Program([sys.executable, "-c", LITTLE_MEMORY], program.home)
    place = os.path.dirname(str(bus_containers.__file__))
    assert host(at=api, env={"PYTHONPATH": place}).code == 0
    assert api.requests


@pytest.mark.parametrize("uses_up_memory", [False, sys.platform == "linux"])
@pytest.mark.parametrize(("command", "code"), [(("status",), 1), (RUN, 125)])
def test_a_fault_while_a_fault_is_told(
    command: tuple[str, ...], code: int, uses_up_memory: bool, program: Program, api: Api
) -> None:
    """Words that were there before tell of it, even where there is no memory left."""
    place = os.path.dirname(str(bus_containers.__file__))
    script = LAST_WORDS.replace("USES_UP_MEMORY", str(uses_up_memory))
    host = Program([sys.executable, "-c", script], program.home)
    result = host(*command, at=api, env={"PYTHONPATH": place})
    check_failure(result, code, "out of memory", "if this was `run`", "bus-containers delete")
    assert len(api.requests) == 1
