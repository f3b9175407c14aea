# SPDX-License-Identifier: MIT
"""The library: promises 4.1 to 4.8, and the `run_state` of 6.3 and 6.4."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import pydoc
import re
import subprocess
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bus_containers
from bus_containers import (
    ApiError,
    BusContainersError,
    Client,
    ConfigError,
    DeadlineError,
    ProtocolError,
    TransportError,
)
from hostile import Api, Hostile, Script, answer, close, html, message, refused_port, reset, silent
from local_platform import PROFILE_IMAGES, Platform
from support import BODIES, CANARY, LIMIT, Program, second_tier

Serve = Callable[..., Hostile]
Use = Callable[[Client], object]
OPTION = re.compile("--(?!scope)")  # which is an option of `bus auth token`
CODEX = PROFILE_IMAGES["codex"]
CALLS: dict[str, Use] = {
    "status": lambda client: client.status(),
    "run": lambda client: client.run(["true"]),
    "runs": lambda client: client.runs(),
    "delete": lambda client: client.delete("run-1"),
}


@pytest.fixture
def client(api: Api) -> Client:
    return Client(api.url, CANARY)


def failure(status: int, **error: object) -> bytes:
    body = {"error": {"type": "a_type", "message": "a sentence", **error}}
    return message(json.dumps(body).encode(), f"{status} Reason")


# --- what is public; `snapshot.txt` has the names and signatures --------------------------------


def public() -> Iterator[tuple[str, Any]]:
    """Everything that is public: functions, classes, and their methods."""
    for name in bus_containers.__all__:
        thing = getattr(bus_containers, name)
        yield name, thing
        if inspect.isclass(thing):
            yield f"{name}.__init__", thing.__init__
            for method in vars(thing):
                if not method.startswith("_") and callable(getattr(thing, method)):
                    yield f"{name}.{method}", getattr(thing, method)


def test_everything_public_has_help_of_its_own() -> None:
    for name, thing in public():
        if not name.endswith("__init__"):
            own = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
            assert own and own.strip(), name


def test_type_hints_resolve() -> None:
    """Promise 4.7: pydantic, typer and the like call this."""
    problems = []
    for name, thing in public():
        try:
            typing.get_type_hints(thing)
        except NameError as error:
            problems.append(f"{name}: {error}")
        except TypeError:  # `str | None` is nothing to Python 3.9
            assert sys.version_info < (3, 10), name
    assert not problems, problems


def test_no_signature_holds_a_live_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 4.7: help() and documentation tools print default values."""
    for name, thing in public():
        if inspect.isclass(thing) and issubclass(thing, Exception):
            continue
        for parameter in inspect.signature(thing).parameters.values():
            default = parameter.default
            assert default is parameter.empty or default is None or isinstance(
                default, (bool, int, float, str)
            ), f"{name}: the default of {parameter.name} is {type(default)}"
    monkeypatch.setenv("BUS_AI_TOKEN", CANARY)
    for thing in (bus_containers, Client, Client.from_env):
        text = pydoc.plain(pydoc.render_doc(thing))
        assert "from_env" in text
        assert CANARY not in text


def test_one_tree_of_errors_with_their_kinds() -> None:
    parents: dict[type[BusContainersError], tuple[type, str]] = {
        BusContainersError: (Exception, "error"),
        ConfigError: (BusContainersError, "config"),
        TransportError: (BusContainersError, "transport"),
        DeadlineError: (TransportError, "deadline"),
        ProtocolError: (BusContainersError, "protocol"),
        ApiError: (BusContainersError, "api"),
    }
    assert {kind for name, kind in public() if inspect.isclass(kind)} == {*parents, Client}
    for kind, (parent, name) in parents.items():
        assert kind.__bases__ == (parent,)
        assert kind.kind == name
        assert kind("text").run_state == ("not_sent" if kind is ConfigError else None)
        assert kind("text").retryable is False


# --- the four calls -----------------------------------------------------------------------------


def test_the_four_calls(platform: Platform) -> None:
    client = Client(platform.url, platform.token(account="four"))
    assert client.status()["items"][0]["state"] == "ready"
    run = client.run(["sh", "-c", "printf OK; printf no >&2; exit 37"])
    keys = "run_id owner_identity_id runner_name image args exit_code stdout stderr duration_ms"
    assert list(run) == [*keys.split(), "runtime"]
    assert (run["exit_code"], run["stdout"], run["stderr"], run["image"]) == (37, "OK", "no", CODEX)
    assert [item["run_id"] for item in client.runs()["items"]] == [run["run_id"]]
    deleted = {"deleted": True, "run_id": run["run_id"], "owner_identity_id": "four"}
    assert client.delete(run["run_id"]) == deleted
    assert client.runs() == {"items": []}


@pytest.mark.parametrize(
    ("keywords", "words", "body"),
    [
        ({}, ["a b", ""], {"profile": "codex", "args": ["a b", ""]}),
        ({"profile": "x"}, ["\u00e4\U0001f600"], {"profile": "x", "args": ["\u00e4\U0001f600"]}),
        ({"image": "alpine:3"}, ("a", "b"), {"image": "alpine:3", "command": ["a", "b"]}),
        ({"timeout_seconds": 5, "timeout": 9}, ["a"],
         {"profile": "codex", "args": ["a"], "timeout_seconds": 5}),
        ({"timeout_seconds": 0, "timeout": 0}, ["a"],
         {"profile": "codex", "args": ["a"], "timeout_seconds": 0}),
        ({"profile": None, "image": None, "timeout_seconds": None, "timeout": None}, ["--"],
         {"profile": "codex", "args": ["--"]}),
    ],
    ids=["plain", "profile", "image", "limits", "no-limits", "none"],
)  # fmt: skip
def test_what_a_run_sends(
    keywords: dict[str, Any], words: list[str], body: object, client: Client, api: Api
) -> None:
    assert client.run(words, **keywords)["exit_code"] == 0
    assert json.loads(api.requests[0].partition(b"\r\n\r\n")[2]) == body


@pytest.mark.parametrize(
    ("body", "document"),
    [
        ('{"items":[1],"x":2}', {"items": [1], "x": 2}),
        ('{"runs":[1],"x":2}', {"items": [1], "x": 2}),
        ('{"items":null}', {"items": []}),
        ("[1]", {"items": [1]}),
        ("[]", {"items": []}),
    ],
)
def test_runs_is_always_the_items_form(
    body: str, document: object, client: Client, api: Api
) -> None:
    api.answers(body.encode())
    assert client.runs() == document


def test_runs_of_the_published_provider(platform: Platform) -> None:
    platform.runs_in_status = True
    client = Client(platform.url, platform.token())
    run = client.run(["true"])
    assert [item["run_id"] for item in client.runs()["items"]] == [run["run_id"]]


def test_the_document_is_what_the_api_sent(client: Client, api: Api) -> None:
    body = b'{"status":{"state":"ready"},"z":1,"a":{"new":[null,true,1.5,"\\ud800"]}}'
    api.answers(body)
    assert json.dumps(client.status()) == json.dumps(json.loads(body))


def test_from_env(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"BUS_AI_API_URL": f"{platform.url}//", "BUS_CONFIG_DIR": str(platform.config_dir)}
    client = Client.from_env(environ)
    assert client.api_url == platform.url
    assert client.status()["items"]
    monkeypatch.setenv("BUS_AI_API_URL", platform.url)
    monkeypatch.setenv("BUS_API_TOKEN", platform.token(account="by-variable"))
    assert Client.from_env().run(["true"])["owner_identity_id"] == "by-variable"
    with pytest.raises(ConfigError, match="BUS_API_BASE_URL"):
        Client.from_env({"BUS_API_BASE_URL": "no url", "BUS_AI_TOKEN": "t0ken"})
    with pytest.raises(ConfigError, match="token"):
        Client.from_env({})


def test_from_env_takes_the_proxy_from_there_too(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, other = serve(answer(BODIES["status"])), serve(answer(BODIES["status"]))
    environ = {"BUS_AI_API_URL": "http://platform.test", "BUS_AI_TOKEN": "t0ken"}
    monkeypatch.setenv("HTTP_PROXY", other.url)
    Client.from_env({**environ, "HTTP_PROXY": proxy.url}).status()
    start = b"GET http://platform.test/api/v1/containers/status HTTP/1.1\r\n"
    assert [request[: len(start)] for request in proxy.requests] == [start]
    assert other.requests == []


# --- a caller's bad value, and a server's -------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "token"),
    [
        *((url, "t0ken") for url in (
            "", "platform.test", "ftp://platform.test", "http://platform.test/api/v1/containers",
            "http://me:pass@platform.test", "http://platform.test?x", "http://a b",
        )),
        *(("http://platform.test", token) for token in (
            "", "  ", "a b", "a\r\nX-Injected: b", "t\u00f6ken", "t\u20acken", "t\ud800ken",
        )),
    ],
)  # fmt: skip
def test_a_client_that_cannot_be(url: str, token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Client(url, token)
    assert not token.strip() or token == "t0ken" or token not in str(caught.value)
    assert "pass" not in str(caught.value)
    assert not OPTION.search(str(caught.value))


BYTES: Any = b"true"
HALF: Any = 1.5
TEXT: Any = "5"
NUMBER: Any = 1
RUN_MISUSES: dict[str, Use] = {
    "no-words": lambda client: client.run([]),
    "a-string": lambda client: client.run("codex --version"),
    "bytes": lambda client: client.run(BYTES),
    "a-word-of-bytes": lambda client: client.run(["a", BYTES]),
    "a-number": lambda client: client.run(["sleep", NUMBER]),
    "profile-and-image": lambda client: client.run(["true"], profile="a", image="b"),
    "no-profile": lambda client: client.run(["true"], profile=""),
    "no-image": lambda client: client.run(["true"], image=""),
    "negative-limit": lambda client: client.run(["true"], timeout_seconds=-1),
    "half-a-second": lambda client: client.run(["true"], timeout_seconds=HALF),
    "true-is-not-a-number": lambda client: client.run(["true"], timeout_seconds=True),
    "limit-as-text": lambda client: client.run(["true"], timeout_seconds=TEXT),
    "negative-timeout": lambda client: client.run(["true"], timeout=-1),
    "timeout-as-text": lambda client: client.run(["true"], timeout=TEXT),
    "timeout-not-a-number": lambda client: client.run(["true"], timeout=float("nan")),
}
MISUSES: dict[str, Use] = {
    **RUN_MISUSES,
    **{
        f"id-{run_id!a}": lambda client, run_id=run_id: client.delete(run_id)  # type: ignore[misc]
        for run_id in ("", ".", "..", "a\nb", "a\0b", "a\x9bb", "a\u202eb", None, 7)
    },
    "timeout-of-a-client": lambda c: Client(c.api_url, "t0ken", timeout=-1).status(),
}


@pytest.mark.parametrize("name", MISUSES)
def test_a_wrong_value_is_refused_before_anything_is_sent(
    name: str, client: Client, api: Api
) -> None:
    """Promise 4.8; in the library's words, which has no options."""
    with pytest.raises(ConfigError) as caught:
        MISUSES[name](client)
    assert str(caught.value)
    assert not OPTION.search(str(caught.value))
    assert caught.value.run_state == "not_sent"
    assert api.requests == []


def test_a_servers_bad_value_is_not_the_callers(client: Client, api: Api) -> None:
    api.answers({"deleted": True, "run_id": ".."})
    with pytest.raises(ProtocolError):
        client.delete("run-1")
    assert api.methods() == ["DELETE"]


# --- errors -------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """An answer, and the error that a run makes of it."""

    id: str
    script: Script
    kind: type[BusContainersError]
    run_state: str
    retryable: bool = False
    timeout: float | None = None


def error(status: str) -> Script:
    return answer(b'{"error":{"type":"kind","message":"a sentence"}}', status)


FAILURES = [
    Failure("300", error("300 Many"), ApiError, "refused"),
    Failure("301", error("301 Moved\r\nLocation: http://127.0.0.1:1/"), ApiError, "refused"),
    Failure("304", answer(b"", "304 Not Modified"), ApiError, "refused"),
    Failure("400", error("400 Bad Request"), ApiError, "refused"),
    Failure("401", error("401 Unauthorized"), ApiError, "refused"),
    Failure("402", error("402 Payment Required"), ApiError, "refused"),
    Failure("413", html("413 Content Too Large", "413"), ApiError, "refused"),
    Failure("429", error("429 Too Many Requests"), ApiError, "refused", True),
    Failure("500", error("500 Internal Server Error"), ApiError, "unknown"),
    Failure("502", html("502 Bad Gateway", "502 Bad Gateway"), ApiError, "unknown"),
    Failure("504", html("504 Gateway Time-out", "504"), ApiError, "unknown"),
    Failure("not-json", answer(b"nonsense"), ProtocolError, "unknown"),
    Failure("empty", answer(b""), ProtocolError, "unknown"),
    Failure("list", answer(b"[]"), ProtocolError, "unknown"),
    Failure("page", html("200 OK", "Welcome"), ProtocolError, "unknown"),
    Failure("closed", close(), TransportError, "unknown"),
    Failure("reset", reset(), TransportError, "unknown"),
    Failure("silent", silent(), DeadlineError, "unknown", timeout=0.2),
]


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case.id)
def test_the_error_of_a_run_and_its_copies(case: Failure, serve: Serve) -> None:
    """Promises 4.4 and 4.6: the right error, and nothing of it is lost in a copy."""
    server = serve(case.script)
    with pytest.raises(case.kind) as caught:
        Client(server.url, CANARY).run(["true"], timeout=case.timeout)
    raised = caught.value
    assert type(raised) is case.kind
    assert (raised.run_state, raised.retryable) == (case.run_state, case.retryable)
    assert ("still be executing" in str(raised)) == (case.run_state == "unknown")
    assert "/api/v1/containers/runs" in raised.reason
    assert str(raised).startswith(raised.reason)
    assert raised.advice in str(raised)
    assert CANARY not in repr(raised) + str(raised) + repr(vars(raised))
    assert server.methods() == ["POST"]
    protocols = range(2, pickle.HIGHEST_PROTOCOL + 1)
    copies = [pickle.loads(pickle.dumps(raised, protocol)) for protocol in protocols]
    for other in (*copies, copy.copy(raised), copy.deepcopy(raised)):
        assert type(other) is type(raised)
        assert (str(other), other.args, vars(other)) == (str(raised), raised.args, vars(raised))
        assert other.run_state == raised.run_state


@pytest.mark.parametrize("name", CALLS)
def test_nobody_listens(name: str) -> None:
    with refused_port() as port, pytest.raises(TransportError) as caught:
        CALLS[name](Client(f"http://127.0.0.1:{port}", "t0ken", timeout=0.2))
    assert caught.value.run_state == ("not_sent" if name == "run" else None)
    assert caught.value.retryable is True
    assert "still be executing" not in str(caught.value)


ERRORS: list[tuple[bytes, dict[str, object]]] = [
    (b'{"error":{"type":"quota_exceeded","message":"used up","action":"upgrade_plan",'
     b'"command":"bus billing setup","usage":{"used":1}}}',
     {"type": "quota_exceeded", "message": "used up", "action": "upgrade_plan",
      "command": "bus billing setup"}),
    (b'{"error":{"type":"t","message":"m"},"more":1}', {"type": "t", "message": "m"}),
    (b'{"error":"m"}', {"message": "m"}),
    (b'{"error":{}}', {}),
    (b'{"error":{"type":1,"message":null,"action":[],"command":{}}}', {}),
    (b"[]", {}),
    (b"nonsense", {}),
    (b"", {}),
]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_fields_of_an_api_error(name: str, client: Client, api: Api) -> None:
    for body, fields in ERRORS:
        api.answers(body, status="402 Payment Required")
        with pytest.raises(ApiError) as caught:
            CALLS[name](client)
        failed = caught.value
        for field in ("type", "message", "action", "command"):
            assert getattr(failed, field) == fields.get(field)
            assert str(fields.get(field, "")) in str(failed)
        try:
            document = json.loads(body)
        except ValueError:
            document = None
        assert (failed.status, failed.document) == (402, document)
        assert failed.run_state == ("refused" if name == "run" else None)
        assert "402" in str(failed)


def test_somebody_elses_run(platform: Platform) -> None:
    mine, other = (Client(platform.url, platform.token(account=name)) for name in ("me", "other"))
    run_id = mine.run(["true"])["run_id"]
    for client, status, error_type in ((other, 403, "forbidden"), (mine, 404, "not_found")):
        with pytest.raises(ApiError) as caught:
            client.delete(run_id)
        assert (caught.value.status, caught.value.type) == (status, error_type)
        if client is other:
            assert mine.delete(run_id)["deleted"] is True


POOL = """
import multiprocessing, os, sys
sys.path.insert(0, os.environ["PLACE"])
import bus_containers

def call(timeout):
    return bus_containers.Client.from_env().run(["true"], timeout=timeout)

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        for timeout in (9, -1):
            try:
                pool.apply(call, (timeout,))
            except bus_containers.BusContainersError as error:
                print(type(error).__name__, error.run_state, getattr(error, "status", None))
"""


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=second_tier)])
def test_errors_come_back_from_a_process_pool(
    method: str, api: Api, place: str, program: Program, tmp_path: Path
) -> None:
    """Promise 4.4: one that cannot be unpickled makes the parent wait for ever."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    api.sends(failure(402))
    environ = program.env(PLACE=place, BUS_AI_API_URL=api.url, BUS_AI_TOKEN=CANARY)
    words = [sys.executable, str(script), method]
    result = subprocess.run(words, env=environ, capture_output=True, timeout=LIMIT)
    assert result.stdout.split(b"\n")[:2] == [
        b"ApiError refused 402", b"ConfigError not_sent None",
    ], result.stderr  # fmt: skip


# --- timeouts -----------------------------------------------------------------------------------


def test_a_timeout_is_in_seconds_and_zero_is_none(serve: Serve, client: Client) -> None:
    server = serve(silent())
    for call in (CALLS["status"], CALLS["delete"]):
        with pytest.raises(DeadlineError, match=r"within 0\.1 s"):
            call(Client(server.url, "t0ken", timeout=0.1))
    with pytest.raises(DeadlineError, match=r"within 0\.1 s"):
        Client(server.url, "t0ken", timeout=30).run(["true"], timeout=0.1)
    for timeout in (0, 0.0):
        assert Client(client.api_url, "t0ken", timeout=timeout).status()
        assert client.run(["true"], timeout=timeout)


def test_the_timeout_of_a_run(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 3.3: 30 s more than the run's own limit, or 30 minutes, whatever the client's is."""
    limits = (bus_containers._RUN_MARGIN_SECONDS, bus_containers._RUN_TIMEOUT_SECONDS)
    assert limits == (30, 1800)
    monkeypatch.setattr(bus_containers, "_RUN_MARGIN_SECONDS", -1.8)
    monkeypatch.setattr(bus_containers, "_RUN_TIMEOUT_SECONDS", 0.3)
    client = Client(serve(silent()).url, "t0ken", timeout=0.001)
    for timeout_seconds, limit in ((2, r"0\.2 s"), (0, r"0\.3 s"), (None, r"0\.3 s")):
        with pytest.raises(DeadlineError, match=limit):
            client.run(["true"], timeout_seconds=timeout_seconds)


# --- many threads -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "rounds"), [(8, 3), pytest.param(64, 12, marks=second_tier)], ids=["few", "many"]
)
def test_a_client_of_many_threads(threads: int, rounds: int, platform: Platform) -> None:
    client = Client(platform.url, platform.token())
    ready = threading.Barrier(threads)

    def work(thread: int) -> list[str]:
        ids = []
        ready.wait(30)
        for number in range(rounds):
            word = f"word-{thread}-{number}"
            run = client.run(["printf", word])
            assert (run["exit_code"], run["stdout"], run["args"][1]) == (0, word, word)
            ids.append(run["run_id"])
            listed = [item for item in client.runs()["items"] if item["run_id"] == ids[-1]]
            assert [item["args"] for item in listed] == [["printf", word]]
            assert client.status()["items"][0]["state"] == "ready"
            assert client.delete(ids[-1])["run_id"] == ids[-1]
        return ids

    with ThreadPoolExecutor(threads) as pool:
        ids = [run_id for each in pool.map(work, range(threads)) for run_id in each]
    assert client.runs() == {"items": []}
    assert len(platform.requests) == threads * rounds * 4 + 1
    assert len(set(ids)) == len(ids) == threads * rounds
    deleted = [path.rpartition("/")[2] for method, path in platform.requests if method == "DELETE"]
    assert sorted(deleted) == sorted(ids)


# --- a library touches nothing of its program's -----------------------------------------------

GUEST = """
import json, os, signal, sys

class Argv(list):
    def __getattribute__(self, name):
        raise AssertionError("sys.argv was read")
    def __getitem__(self, at):
        raise AssertionError("sys.argv was read")
    def __iter__(self):
        raise AssertionError("sys.argv was read")

def surroundings():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
    handlers = [signal.getsignal(number) for number in numbers]
    return dict(os.environ), os.getcwd(), handlers, sys.stdout, sys.stderr, sys.excepthook

sys.argv = Argv()
before = surroundings()
sys.path.insert(0, os.environ["PLACE"])
import bus_containers

def exits(*args):
    raise AssertionError("the library wants to exit")

os._exit, leave = exits, os._exit
client = bus_containers.Client.from_env()
done = [
    client.status()["items"][0]["state"],
    client.run(["printf", "OK"])["stdout"],
    len(client.runs()["items"]),
]
for call in (
    lambda: client.delete("run_none"),
    lambda: client.run(["true"], profile="none"),
    lambda: client.run([]),
    lambda: bus_containers.Client(client.api_url, "bad").status(),
    lambda: bus_containers.Client("http://127.0.0.1:1", "t").run(["true"], timeout=0.1),
    lambda: bus_containers.parse_duration("30"),
):
    try:
        call()
    except bus_containers.BusContainersError as error:
        names = [kind.__name__ for kind in type(error).__mro__]
        done.append(next(name for name in names if name in bus_containers.__all__))
assert before == surroundings()
with open(os.environ["DONE"], "w") as file:
    json.dump(done, file)
"""


@pytest.fixture
def place(program: Program) -> str:
    """What to put on sys.path to import the library under test."""
    target = program.command[-1]
    return target if target.endswith(".pyz") else str(Path(inspect.getfile(bus_containers)).parent)


def test_the_library_is_a_guest(
    platform: Platform, program: Program, place: str, tmp_path: Path
) -> None:
    """Promise 4.1."""
    environ = program.env(
        PLACE=place,
        DONE=str(tmp_path / "done"),
        BUS_AI_API_URL=platform.url,
        BUS_AI_TOKEN=platform.token(account="guest"),
    )
    words = [sys.executable, "-W", "error", "-c", GUEST]
    result = subprocess.run(words, env=environ, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    kinds = "ApiError ApiError ConfigError ApiError TransportError ConfigError"
    assert json.loads((tmp_path / "done").read_text()) == ["ready", "OK", 1, *kinds.split()]


def test_no_repr_holds_the_token(client: Client) -> None:
    assert CANARY not in repr(client) + str(client)
    assert client.api_url in repr(client)
