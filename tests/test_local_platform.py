# SPDX-License-Identifier: MIT
"""The stand-in platform: what it accepts, refuses, runs and leaves: promises 1.3, 1.4 and 1.6.

Who relies on the tests relies on this: it checks requests as strictly as the real provider does.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import local_platform
from local_platform import API_PATH, AUDIENCE, SCOPE, Platform
from support import LIMIT, Env, Program, tiers

OK_RUN = {"profile": "codex", "args": ["printf", "OK"]}
IMAGE_RUN = {"image": "alpine:3", "command": ["printf", "OK"]}
RUN_JSON = json.dumps(OK_RUN).encode()
Background = Callable[..., "Future[Any]"]


class Reply(NamedTuple):
    status: int
    document: Any

    @property
    def error(self) -> tuple[int, str]:
        return self.status, self.document["error"]["type"]


def address(platform: Platform) -> tuple[str, int]:
    url = urllib.parse.urlsplit(platform.url)
    return str(url.hostname), url.port or 0


def call(
    platform: Platform,
    line: str,
    body: object = None,
    authorization: str | None = "",
    content_type: str | None = "application/json",
) -> Reply:
    """One request of a method and a path; `body` is bytes as they are, or a value as JSON."""
    method, path = line.split(" ")
    headers = {"Authorization": authorization or f"Bearer {platform.token()}"}
    if authorization is None:
        headers.clear()
    if content_type:
        headers["Content-Type"] = content_type
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(*address(platform), timeout=LIMIT)
    with contextlib.closing(connection):
        path = urllib.parse.urlsplit(platform.url).path + API_PATH + path
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        text = response.read()
    assert response.getheader("Content-Type") == "application/json"
    assert response.getheader("Content-Length") == str(len(text)) or method == "HEAD"
    return Reply(response.status, json.loads(text) if text else None)


def run(platform: Platform, *args: str) -> Any:
    """The document of a run of the `codex` profile."""
    reply = call(platform, "POST /runs", {"profile": "codex", "args": list(args)})
    assert reply.status == 200, reply
    return reply.document


def items(platform: Platform, authorization: str = "") -> list[Any]:
    listed = call(platform, "GET /runs", authorization=authorization).document["items"]
    assert isinstance(listed, list)
    return listed


def other(platform: Platform) -> str:
    return f"Bearer {platform.token(account=platform.other_account)}"


@pytest.fixture
def background() -> Iterator[Background]:
    """Make runs in threads of their own."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda *args: pool.submit(run, *args)


class Watched:
    """Runs whose processes hold a FIFO open: it tells when they have begun, and when all ended."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "fifo"
        os.mkfifo(self.path)
        self._end = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def words(self, script: str = "sleep 60 & echo begun >&9; wait") -> list[str]:
        """A shell script with the FIFO as its descriptor 9; it would sleep for a minute."""
        return ["sh", "-c", f"exec 9>'{self.path}'; {script}"]

    def begun(self, runs: int = 1) -> None:
        said = b""
        while said != b"begun\n" * runs:
            more = self._read()
            assert more, said
            said += more

    def ended(self) -> None:
        assert self._read() == b""

    def _read(self) -> bytes:
        assert select.select([self._end], [], [], LIMIT)[0], "the runs go on"
        return os.read(self._end, 65536)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


# --- tokens -----------------------------------------------------------------------------------


REFUSED_CLAIMS: list[dict[str, Any]] = [
    {"expires_in": -1}, {"expires_in": None}, {"exp": "2999-01-01"}, {"not_before": 60},
    {"audience": f"{AUDIENCE}/2"}, {"audience": ["ai.hg.fi", "api"]}, {"audience": None},
    {"scope": None}, {"scope": "container:run container:readx"}, {"sub": None},
]  # fmt: skip
ACCEPTED_CLAIMS: list[dict[str, Any]] = [
    {}, {"audience": ["x", AUDIENCE]}, {"not_before": -1}, {"iss": "local"}, {"account": "other"},
]  # fmt: skip


def test_which_tokens_are_good(platform: Platform) -> None:
    """Promise 1.6."""
    good, another = platform.token(), platform.token(account="another")
    head, claims, signature = good.split(".")
    said = json.loads(base64.urlsafe_b64decode(claims + "=="))
    refused = [
        None, f"Basic {good}", "Bearer", "Bearer opaque", "Bearer \xe9.\xe9.\xe9",
        f"Bearer {head}.{claims}.", f"Bearer {good[:-1]}", f"Bearer {good}!",
        f"Bearer {head}.{another.split('.')[1]}.{signature}",
        f"Bearer {Platform().token(account=platform.account)}",
        f"Bearer {local_platform.mint(said, platform._key, 'none')}",
        *(f"Bearer {platform.token(**changes)}" for changes in REFUSED_CLAIMS),
    ]  # fmt: skip
    told = {"type": "invalid_auth", "message": "missing or invalid bearer token"}
    for token in refused:
        reply = call(platform, "GET /status", authorization=token)
        assert reply == (401, {"error": told}), token
    for changes in ACCEPTED_CLAIMS:
        token = f"bearer {platform.token(**changes)}"
        assert call(platform, "GET /status", authorization=token).status == 200, changes
    for file, account in (("api-token", platform.account), ("other-token", platform.other_account)):
        token = (platform.config_dir / "auth" / file).read_text().strip()
        reply = call(platform, "POST /runs", OK_RUN, f"Bearer {token}")
        assert reply.document["owner_identity_id"] == account
    words = "read GET /status", "read GET /runs", "run POST /runs", "delete DELETE /runs/x"
    for word, line in (row.split(" ", 1) for row in words):
        allowed = 404 if word == "delete" else 200
        scope = f"container:{word}"
        for scopes, status in ((scope, allowed), (SCOPE.replace(scope, ""), 401)):
            token = f"Bearer {platform.token(scope=scopes)}"
            assert call(platform, line, OK_RUN, token).status == status, (line, scopes)


# --- bodies -----------------------------------------------------------------------------------

REFUSED_BODIES: dict[str, list[object]] = {
    "one JSON document": [
        b"", RUN_JSON.replace(b"OK", b"\xff"), b"\xef\xbb\xbf" + RUN_JSON, RUN_JSON + RUN_JSON,
        b"[" * 200_000,
    ],
    "not a JSON object": [[OK_RUN]],
    "profile or image is required": [{"args": ["true"]}, {**OK_RUN, "image": "alpine"}],
    "only args": [{"profile": "codex", "command": ["x"]}, {**OK_RUN, "env": {}}],
    "only command": [{"image": "alpine", "args": ["x"]}],
    "no such profile": [{**OK_RUN, "profile": "none"}],
    "profile is not a string": [{**OK_RUN, "profile": None}],
    "name of an image": [{**IMAGE_RUN, "image": ""}, {**IMAGE_RUN, "image": "-v/:/x"}],
    "image is not a string": [{**IMAGE_RUN, "image": 3}],
    "args is not a list": [
        {"profile": "codex"}, {**OK_RUN, "args": "true"}, {**OK_RUN, "args": ["sleep", 1]},
    ],
    "command is not a list": [{"image": "alpine"}],
    "args is empty": [{**OK_RUN, "args": []}],
    "NUL": [{**OK_RUN, "args": ["a\0b"]}],
    "timeout_seconds is not a whole number >= 0": [
        {**OK_RUN, "timeout_seconds": value} for value in (-1, 1.0, "1", True, None, 2**63)
    ],
}  # fmt: skip
ACCEPTED_BODIES: list[object] = [
    {**OK_RUN, "profile": "testing-agent", "timeout_seconds": 0},
    {**IMAGE_RUN, "timeout_seconds": 2**63 - 1}, b" \n" + RUN_JSON + b"\n",
]  # fmt: skip


def test_which_bodies_are_good(platform: Platform) -> None:
    """Promise 1.3."""
    for told, bodies in REFUSED_BODIES.items():
        for body in bodies:
            reply = call(platform, "POST /runs", body)
            assert reply.error == (400, "bad_request"), body
            assert told in reply.document["error"]["message"], body
    for kind in ("text/json", None):
        reply = call(platform, "POST /runs", OK_RUN, content_type=kind)
        assert reply.error == (400, "bad_request"), kind
        assert "content type" in reply.document["error"]["message"]
    assert items(platform) == []
    for body in ACCEPTED_BODIES:
        kind = "Application/JSON; charset=utf-8"
        reply = call(platform, "POST /runs", body, content_type=kind)
        assert (reply.status, reply.document["stdout"]) == (200, "OK"), body


def test_a_body_without_its_end_runs_nothing(platform: Platform) -> None:
    head = f"POST {API_PATH}/runs HTTP/1.1\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {platform.token()}\r\n"
    cut = f"Content-Length: {len(RUN_JSON) + 1}"
    for field in ("Transfer-Encoding: chunked", "Content-Length: x", "Content-Length: 99999999999"):
        assert re.match(rb"HTTP/1.1 400 (.*\r\n)+Connection: close", raw(platform, head, field))
    assert raw(platform, head, cut) == b""
    assert items(platform) == []


def raw(platform: Platform, head: str, field: str) -> bytes:
    """What comes back for a run, until the end."""
    with socket.create_connection(address(platform), LIMIT) as connection:
        connection.sendall(f"{head}{field}\r\n\r\n".encode() + RUN_JSON)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# --- routes, prefixes, lists ------------------------------------------------------------------

ROUTES = {
    (404, "not_found"): [
        "GET ", "GET /", "GET /none", "GET /status/", "GET /status/x", "DELETE /runs/",
        "DELETE /runs/a/b", "DELETE /runs/unknown", "DELETE /runs/a%2Fb",
    ],
    (405, "method_not_allowed"): [
        "POST /status", "PUT /runs", "PATCH /runs", "OPTIONS /runs", "DELETE /runs", "GET /runs/x",
    ],
}  # fmt: skip


def test_routes(platform: Platform) -> None:
    for error, lines in ROUTES.items():
        for line in lines:
            assert call(platform, line).error == error, line
    assert call(platform, "HEAD /runs") == (405, None)
    item = {"id": "local-runner", "state": "ready", "details": {"runtime": "process"}}
    assert call(platform, "GET /status?x=1") == (200, {"items": [item]})
    host, port = address(platform)
    assert host == "127.0.0.1"
    if sys.platform == "linux":  # elsewhere this address has to be set up
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), LIMIT)


@pytest.mark.parametrize("prefix", ["/CAP/v1", "CAP/v1/"])
def test_prefix_and_runs_in_status(prefix: str) -> None:
    with Platform(prefix=prefix, runs_in_status=True) as platform:
        assert platform.url.endswith("/CAP/v1")
        run_id = run(platform, "true")["run_id"]
        assert call(platform, "GET /runs").status == 404
        assert call(platform, "PUT /runs").status == 405
        runner, listed = call(platform, "GET /status").document["items"]
        assert runner["id"] == "local-runner"
        assert (listed["id"], listed["run_id"], listed["state"]) == (run_id, run_id, "exited")
        theirs = call(platform, "GET /status", authorization=other(platform))
        assert theirs.document["items"] == [runner]
        assert call(platform, f"DELETE /runs/{run_id}").status == 200
        platform.url = platform.url[: -len("/CAP/v1")]
        assert call(platform, "GET /status").status == 404


def test_list_shows_own_runs_in_order(platform: Platform) -> None:
    """Promise 1.4."""
    mine = [run(platform, "sh", "-c", f"exit {code}")["run_id"] for code in (3, 0)]
    call(platform, "POST /runs", IMAGE_RUN, authorization=other(platform))
    first, second = items(platform)
    assert [first["run_id"], second["run_id"]] == mine
    assert [item["image"] for item in items(platform, other(platform))] == ["alpine:3"]
    assert isinstance(first.pop("duration_ms"), int)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first.pop("started_at"))
    assert first == {
        "run_id": mine[0],
        "owner_identity_id": platform.account,
        "state": "exited",
        "image": "localhost/codex",
        "args": ["sh", "-c", "exit 3"],
        "exit_code": 3,
    }


def test_billing(platform: Platform) -> None:
    """In the shape of CONTRACT.md; what the client makes of it is in `test_guidance.py`."""
    usage = "feature meter_event_name window used limit remaining exceeded upgrade_plan_id"
    for platform.billing, more in (("required", ""), ("quota", "plan_id recommended_plan usage")):
        status, document = call(platform, "POST /runs", OK_RUN)
        keys = f"type message action command {more}".split()
        assert (status, list(document["error"])) == (402, keys)
    assert list(document["error"]["usage"]) == usage.split()
    assert call(platform, "POST /runs", {}).status == 400
    assert items(platform) == []


# --- runs -------------------------------------------------------------------------------------

RUNS: dict[str, tuple[list[str], int, str, str]] = {
    "both streams": (["sh", "-c", "printf o; printf e >&2; exit 37"], 37, "o", "e"),
    "killed": (["sh", "-c", "printf x; kill -9 $$"], 137, "x", ""),
    "no such command": (["no-such-command"], 127, "", "no-such-command: command not found\n"),
    "no such file": (["./none"], 127, "", "./none: command not found\n"),
    "no program": (["/etc/passwd"], 126, "", "/etc/passwd: Permission denied\n"),
    "words": (["printf", "<%s>", "a b", "", "--", "-x", "é\n"], 0, "<a b><><--><-x><é\n>", ""),
    "lone surrogate": (["printf", "a\ud800b"], 0, "a\ufffdb", ""),
    "no UTF-8": (["printf", "a\\377b"], 0, "a\ufffdb", ""),
    "no input": (["cat"], 0, "", ""),
    "empty folder": (["ls", "-A"], 0, "", ""),
    "named streams": (["sh", "-c", "echo a; echo b > /dev/stdout; echo c"], 0, "a\nb\nc\n", ""),
    "much output": (["sh", "-c", "yes | head -c 300000"], 0, "y\n" * 150_000, ""),
    "output closed": (["sh", "-c", "exec >&- 2>&-; sleep 0.05; exit 3"], 3, "", ""),
}


def test_runs(platform: Platform) -> None:
    for name, (args, *expected) in RUNS.items():
        document = run(platform, *args)
        found = [document["exit_code"], document["stdout"], document["stderr"]]
        assert found == expected, name
        assert document["duration_ms"] < LIMIT * 1000, name


ALONE = """
import os, time
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.setsid()
    os.write(write, b"x")
    time.sleep(60)
    os._exit(0)
os.read(read, 1)
open("left", "w").close()
os.mkdir("locked", 0)
os.environ.pop("LC_CTYPE", None)  # which Python sets itself
print(child, os.getcwd(), os.environ["HOME"], os.getpgrp(), os.getpid(), *sorted(os.environ))
"""


def test_a_run_is_alone_and_leaves_nothing(
    platform: Platform, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end does not wait for what has left its process group, and ends all else of it."""
    monkeypatch.setenv("BUS_API_TOKEN", "canary")
    document = run(platform, sys.executable, "-c", ALONE)
    child, folder, home, group, pid, *names = document["stdout"].split()
    os.kill(int(child), signal.SIGKILL)  # it goes on
    assert (folder, group, names) == (home, pid, ["HOME", "LANG", "PATH"])
    assert not Path(folder).exists()
    assert document["duration_ms"] < LIMIT * 1000
    assert run(platform, *watched.words("sleep 60 &"))["exit_code"] == 0
    watched.ended()


def test_run_over_its_limit_is_killed(platform: Platform, watched: Watched) -> None:
    body = {"profile": "codex", "args": watched.words()}
    reply = call(platform, "POST /runs", {**body, "timeout_seconds": 1})
    assert reply.document["exit_code"] == items(platform)[-1]["exit_code"] == 124
    assert reply.document["duration_ms"] < LIMIT * 1000
    watched.begun()
    watched.ended()


def test_delete_of_a_run_in_progress(
    platform: Platform, watched: Watched, background: Background
) -> None:
    post = background(platform, *watched.words())
    watched.begun()
    (item,) = items(platform)
    assert (item["state"], item["exit_code"]) == ("running", None)
    line = f"DELETE /runs/{item['run_id']}"
    assert call(platform, line, authorization=other(platform)).error == (403, "forbidden")
    assert items(platform)[0]["state"] == "running"
    deleted = {"deleted": True, "run_id": item["run_id"], "owner_identity_id": platform.account}
    assert call(platform, line) == (200, deleted)
    assert items(platform) == []
    document = post.result(LIMIT)
    assert (document["run_id"], document["exit_code"]) == (item["run_id"], 137)
    assert call(platform, line).status == 404
    watched.ended()


def test_run_goes_on_without_its_client(
    platform: Platform, watched: Watched, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    words = watched.words(f"echo begun >&9; read line <'{go}'; echo begun >&9; exit 3")
    headers = {"Authorization": f"Bearer {platform.token()}", "Content-Type": "application/json"}
    client = http.client.HTTPConnection(*address(platform), timeout=LIMIT)
    body = json.dumps({"profile": "codex", "args": words})
    client.request("POST", f"{API_PATH}/runs", body, headers)
    watched.begun()
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    go.write_text("\n")
    watched.begun()
    watched.ended()
    end = time.monotonic() + LIMIT
    while items(platform)[0]["state"] == "running" and time.monotonic() < end:
        time.sleep(0.005)
    assert items(platform)[0]["exit_code"] == 3


# Its containers are processes of a session of their own, as an engine's are no children of its
# client; only `kill` with the container's name ends them. It is known before its program begins.
ENGINE = """#!/bin/sh
cd '{folder}'
echo "$@" >> log
case $1 in
run)
    name=$3
    shift 5
    exec {python} -c 'import subprocess, sys
words = ["sh", "-c", "echo $$ > $0; exec \\"$@\\"", *sys.argv[1:]]
sys.exit(subprocess.call(words, start_new_session=True))' "$name" "$@" ;;
kill) kill -9 "$(cat "$2")" ;;
esac
"""


def test_an_engine(tmp_path: Path, watched: Watched, background: Background) -> None:
    tool = tmp_path / "engine"
    tool.write_text(ENGINE.format(folder=tmp_path, python=sys.executable))
    tool.chmod(0o755)
    with Platform(engine=[str(tool), "run", "--rm"]) as platform:
        one = run(platform, "sh", "-c", "printf OK; exit 5")
        found = [one[key] for key in ("stdout", "exit_code", "image", "runtime")]
        assert found == ["OK", 5, "localhost/codex", "engine"]
        runner = call(platform, "GET /status").document["items"][0]
        assert runner["details"] == {"runtime": "engine"}
        post = background(platform, *watched.words("echo begun >&9; exec sleep 60"))
        watched.begun()
        run_id = items(platform)[1]["run_id"]
        assert call(platform, f"DELETE /runs/{run_id}").status == 200
        assert post.result(LIMIT)["exit_code"] == 137
        watched.ended()
    log = (tmp_path / "log").read_text().splitlines()
    assert log[0] == f"run --name {one['run_id']} --rm localhost/codex sh -c printf OK; exit 5"
    assert log[2:] == [f"kill {run_id}", f"rm --force {run_id}"]


# --- the command line -------------------------------------------------------------------------


@pytest.fixture
def script(program: Program, tmp_path: Path) -> Iterator[Program]:
    """The platform as a process, with its temporary folders in a folder of the test.

    `$CLI` is the program under test.
    """
    folder = tmp_path / "tmp"
    folder.mkdir()
    program.environ.update(CLI=shlex.join(program.command), TMPDIR=str(folder))
    program.command = [sys.executable, str(Path(local_platform.__file__))]
    yield program
    assert list(folder.iterdir()) == []


COMMANDS: dict[str, tuple[list[str], tuple[int, str, str]]] = {
    "exit-code": (["sh", "-c", "echo out; echo err >&2; exit 3"], (3, "out\n", "err\n")),
    "killed": (["sh", "-c", "kill -9 $$"], (137, "", "")),
    "not-found": (["none"], (127, "", "local_platform.py: none: command not found\n")),
    "no-program": (["/"], (126, "", "local_platform.py: /: Permission denied\n")),
    "words": (["printf", "<%s>", "--billing", "-h", "--", "a b", ""],
              (0, "<--billing><-h><--><a b><>", "")),
    "options": (["--billing", "quota", "--prefix=/p", "--runs-in-status", "printf", "%s", "-v"],
                (0, "-v", "")),
    "two-dashes": (["--prefix", "p", "--", "printf", "%s", "--"], (0, "--", "")),
    "prefix": (["--prefix", "/p", "sh", "-c", "echo ${BUS_AI_API_URL##*/}"], (0, "p\n", "")),
}  # fmt: skip
USAGE_ERRORS = {
    "--none true": "--none",
    "--bill quota true": "--bill",
    "--billing free true": "--billing free",
    "--engine": "--engine",
    "--engine no-such-engine true": "--engine no-such-engine",
    "--engine ' true": "--engine",
    "--profile-image codex true": "--profile-image NAME=IMAGE",
}


def test_command_lines(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    threads = {*threading.enumerate()}
    for name, (args, result) in COMMANDS.items():
        assert (local_platform.main(args), *capfd.readouterr()) == result, name
        assert list(tmp_path.iterdir()) == []
        assert {*threading.enumerate()} <= threads, name
    for line, told in {**USAGE_ERRORS, "--help true": ""}.items():
        with pytest.raises(SystemExit) as leaving:
            local_platform.main(line.split())
        out, err = capfd.readouterr()
        if told:
            assert (leaving.value.code, out) == (2, ""), line
            assert all(word in err.splitlines()[-1] for word in told.split()), line
    assert (leaving.value.code, "--runs-in-status" in out, err) == (0, True, "")


def test_what_a_command_finds_and_what_is_logged(script: Program) -> None:
    report = """
        cd "$BUS_CONFIG_DIR" && ls -laR | grep -o "^[d-]r\\S*"
        echo "$BUS_AI_TOKEN$BUS_API_TOKEN$BUS_API_BASE_URL$KEPT $BUS_AI_API_URL"
        $CLI -f text run printf OK
    """
    others: Env = {"BUS_AI_TOKEN": "a", "BUS_API_TOKEN": "b", "BUS_API_BASE_URL": "c", "KEPT": "d"}
    result = script("--verbose", "sh", "-c", report, env=others)
    modes, _, output = result.out.decode().rpartition("\n")
    assert re.fullmatch(r"(drwx------\S?\n){5}(-rw-------\S?\n){2}d http://127\.0\.0\.1:\d+", modes)
    assert output == "OK"
    assert f'"POST {API_PATH}/runs HTTP/1.1" 200' in result.message
    assert "Bearer" not in result.message and "eyJ" not in result.message


def end_of(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    with process:
        try:
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("number", tiers([signal.SIGINT, signal.SIGHUP], signal.SIGINT))
def test_serve_until_a_signal(script: Program, number: signal.Signals, watched: Watched) -> None:
    """Without COMMAND: the two exports work in a shell, and runs end with the platform.

    Standard error says what this is and how it ends; standard output is for `eval`.
    """
    process = script.start(start_new_session=True)
    assert process.stdout
    exports = (process.stdout.readline() + process.stdout.readline()).decode()
    told = re.fullmatch("export BUS_CONFIG_DIR=.*\nexport BUS_AI_API_URL=.*:(.*)\n", exports)
    assert told
    line = f"{exports} exec $CLI run -- {shlex.join(watched.words())} 2>/dev/null"
    clients = [subprocess.Popen(["sh", "-c", line], env=script.env()) for _ in range(2)]
    with socket.create_connection(("127.0.0.1", int(told[1])), LIMIT) as idle:
        watched.begun(len(clients))
        process.send_signal(number)
        code, out, err = end_of(process)
        assert idle.recv(1) == b""
    assert (code, out, b"until Ctrl-C" in err) == (0, b"", True)
    watched.ended()
    assert [client.wait(LIMIT) for client in clients] == [125, 125]


@pytest.mark.parametrize("code", [143, 5], ids=["SIGTERM", "Ctrl-C"])
def test_signal_while_a_command_runs(script: Program, watched: Watched, code: int) -> None:
    """COMMAND gets it, and its end is the end, also of the run that it waits for."""
    line = f"$CLI run -- {shlex.join(watched.words())} >/dev/null 2>&1"
    trap = f"trap 'exit {code}' INT TERM; {line} & wait"
    process = script.start("sh", "-c", trap, start_new_session=True)
    watched.begun()
    if code == 143:
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT)
    assert end_of(process) == (code, b"", b"")
    watched.ended()
