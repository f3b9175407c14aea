# SPDX-License-Identifier: MIT
"""The library: CONTRACT section 4, and the `run_state` of section 5."""

from __future__ import annotations

import inspect
import json
import pydoc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bus_containers
import local_platform
from bus_containers import (
    ApiError,
    BusContainersError,
    Client,
    ConfigError,
    DeadlineError,
    ProtocolError,
    TransportError,
)
from conftest import Program
from hostile import Hostile, Script, answer, close, html, refused_port, reset, silent

PUBLIC = {
    "ApiError",
    "BusContainersError",
    "Client",
    "ConfigError",
    "DeadlineError",
    "ProtocolError",
    "TransportError",
    "main",
    "parse_duration",
    "resolve_api_url",
    "resolve_proxy",
    "resolve_token",
}
METHODS = ["status", "run", "runs", "delete"]


@pytest.fixture(scope="module")
def platform() -> Iterator[local_platform.Platform]:
    with local_platform.Platform(prefix="CAP/v1") as running:
        yield running


@pytest.fixture(scope="module")
def client(platform: local_platform.Platform) -> Client:
    return Client(platform.url, platform.token())


# --- what is public ---------------------------------------------------------------------------


def test_public_names() -> None:
    assert sorted(bus_containers.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert hasattr(bus_containers, name)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_has_help(name: str) -> None:
    thing = getattr(bus_containers, name)
    own = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert own and own.strip()
    assert pydoc.render_doc(thing)


@pytest.mark.parametrize("name", [*METHODS, "from_env"])
def test_a_method_has_help(name: str) -> None:
    assert (getattr(Client, name).__doc__ or "").strip()
    assert f" {name}(" in pydoc.plain(pydoc.render_doc(Client))


def parameters(function: Callable[..., object]) -> list[tuple[str, object, str]]:
    return [
        (name, parameter.default, parameter.kind.name)
        for name, parameter in inspect.signature(function).parameters.items()
    ]


def test_signatures() -> None:
    empty, some, only = inspect.Parameter.empty, "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"
    assert parameters(Client) == [
        ("api_url", empty, some),
        ("token", empty, some),
        ("timeout", 30.0, only),
    ]
    assert parameters(Client.run)[1:] == [
        ("command", empty, some),
        ("profile", None, only),
        ("image", None, only),
        ("timeout_seconds", None, only),
        ("timeout", None, only),
    ]
    assert parameters(Client.status)[1:] == parameters(Client.runs)[1:] == []
    assert parameters(Client.delete)[1:] == [("run_id", empty, some)]
    assert [name for name, *_ in parameters(bus_containers.resolve_api_url)] == ["flag", "environ"]
    assert [name for name, *_ in parameters(bus_containers.resolve_token)] == ["path", "environ"]
    assert [name for name, *_ in parameters(bus_containers.resolve_proxy)] == ["url", "environ"]
    assert [name for name, *_ in parameters(bus_containers.parse_duration)] == ["text"]


def test_one_tree_of_exceptions() -> None:
    assert BusContainersError.__bases__ == (Exception,)
    assert issubclass(DeadlineError, TransportError)
    kinds: list[type[BusContainersError]] = [ConfigError, TransportError, ProtocolError, ApiError]
    for kind in kinds:
        assert [other for other in kinds if issubclass(kind, other)] == [kind]


# --- the four calls ---------------------------------------------------------------------------


def test_the_four_calls(platform: local_platform.Platform) -> None:
    client = Client(platform.url, platform.token(account="four"))
    status = client.status()
    assert status["items"][0]["state"] == "ready"
    run = client.run(["sh", "-c", "printf OK; printf no >&2; exit 37"])
    assert list(run) == [
        "run_id",
        "owner_identity_id",
        "runner_name",
        "image",
        "args",
        "exit_code",
        "stdout",
        "stderr",
        "duration_ms",
        "runtime",
    ]
    assert (run["exit_code"], run["stdout"], run["stderr"]) == (37, "OK", "no")
    assert run["image"] == local_platform.PROFILE_IMAGES["codex"]
    runs = client.runs()
    assert [item["run_id"] for item in runs["items"]] == [run["run_id"]]
    assert client.delete(run["run_id"]) == {
        "deleted": True,
        "run_id": run["run_id"],
        "owner_identity_id": "four",
    }
    assert client.runs() == {"items": []}
    assert all(path.startswith("/CAP/v1/api/v1/containers/") for _, path in platform.requests)


@pytest.mark.parametrize(
    ("keywords", "image", "words"),
    [
        ({}, local_platform.PROFILE_IMAGES["codex"], ["printf", "%s", "a b"]),
        (
            {"profile": "testing-agent"},
            local_platform.PROFILE_IMAGES["testing-agent"],
            ["printf", "%s", "\u00e4\U0001f600"],
        ),
        ({"image": "alpine:3"}, "alpine:3", ("printf", "%s", "tuple")),
        ({"timeout_seconds": 5, "timeout": 9}, local_platform.PROFILE_IMAGES["codex"], ["true"]),
        ({"timeout_seconds": 0, "timeout": 0}, local_platform.PROFILE_IMAGES["codex"], ["true"]),
    ],
)
def test_run(keywords: dict[str, Any], image: str, words: list[str], client: Client) -> None:
    run = client.run(words, **keywords)
    assert run["image"] == image
    assert run["args"] == list(words)
    assert run["stdout"] == "".join(words[2:])
    assert run["exit_code"] == 0


@pytest.mark.parametrize("body", ['{"items":[1],"x":2}', '{"runs":[1],"x":2}'])
def test_runs_is_always_the_items_form(body: str) -> None:
    with Hostile(answer(body.encode())) as server:
        assert Client(server.url, "t0ken").runs() == {"items": [1], "x": 2}
    with Hostile(answer(b"[1]")) as server:
        assert Client(server.url, "t0ken").runs() == {"items": [1]}


def test_runs_of_the_published_provider() -> None:
    with local_platform.Platform(runs_in_status=True) as platform:
        client = Client(platform.url, platform.token())
        run = client.run(["true"])
        items = client.runs()["items"]
    assert run["run_id"] in [item["id"] for item in items]


def test_the_document_is_what_the_api_sent() -> None:
    body = b'{"status":{"state":"ready"},"z":1,"a":{"new":[null,true,1.5,"\\ud800"]}}'
    with Hostile(answer(body)) as server:
        document = Client(server.url, "t0ken").status()
    assert document == json.loads(body)
    assert list(document) == ["status", "z", "a"]


def test_from_env(platform: local_platform.Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"BUS_AI_API_URL": f"{platform.url}//", "BUS_CONFIG_DIR": str(platform.config_dir)}
    client = Client.from_env(environ)
    assert client.api_url == platform.url
    assert client.status()["items"]
    monkeypatch.setenv("BUS_AI_API_URL", platform.url)
    monkeypatch.setenv("BUS_API_TOKEN", platform.token(account="by-variable"))
    run = Client.from_env().run(["true"])
    assert run["owner_identity_id"] == "by-variable"
    with pytest.raises(ConfigError, match="BUS_API_BASE_URL"):
        Client.from_env({"BUS_API_BASE_URL": "no url", "BUS_AI_TOKEN": "t0ken"})
    with pytest.raises(ConfigError, match="token"):
        Client.from_env({})


def test_from_env_takes_the_proxy_from_there_too() -> None:
    with Hostile(answer(b'{"items":[]}')) as proxy:
        environ = {"BUS_AI_API_URL": "http://platform.test", "BUS_AI_TOKEN": "t0ken"}
        client = Client.from_env({**environ, "HTTP_PROXY": proxy.url})
        assert client.status() == {"items": []}
    start = b"GET http://platform.test/api/v1/containers/status HTTP/1.1\r\n"
    assert proxy.requests[0].startswith(start)


# --- wrong values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("", "t0ken"),
        ("platform.test", "t0ken"),
        ("ftp://platform.test", "t0ken"),
        ("http://platform.test/api/v1/containers", "t0ken"),
        ("http://me:pass@platform.test", "t0ken"),
        ("http://platform.test?x", "t0ken"),
        ("http://platform.test", ""),
        ("http://platform.test", "  "),
        ("http://platform.test", "a b"),
        ("http://platform.test", "a\r\nX-Injected: b"),
        ("http://platform.test", "t\u00f6ken"),
        ("http://platform.test", "t\u20acken"),
        ("http://platform.test", "t\ud800ken"),
    ],
)
def test_a_client_that_cannot_be(url: str, token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Client(url, token)
    assert not token.strip() or token == "t0ken" or token not in str(caught.value)
    assert "pass" not in str(caught.value)


Use = Callable[[Client], object]
BYTES: Any = b"true"
HALF: Any = 1.5
TEXT: Any = "5"
NUMBER: Any = 1
RUN_MISUSES: dict[str, Use] = {
    "no-words": lambda client: client.run([]),
    "a-string": lambda client: client.run("codex --version"),
    "bytes": lambda client: client.run(BYTES),
    "words-that-are-none": lambda client: client.run(["a", BYTES]),
    "a-number": lambda client: client.run(["sleep", NUMBER]),
    "profile-and-image": lambda client: client.run(["true"], profile="a", image="b"),
    "negative-limit": lambda client: client.run(["true"], timeout_seconds=-1),
    "half-a-second": lambda client: client.run(["true"], timeout_seconds=HALF),
    "true-is-no-number": lambda client: client.run(["true"], timeout_seconds=True),
    "limit-as-text": lambda client: client.run(["true"], timeout_seconds=TEXT),
    "negative-timeout": lambda client: client.run(["true"], timeout=-1),
    "timeout-as-text": lambda client: client.run(["true"], timeout=TEXT),
    "timeout-not-a-number": lambda client: client.run(["true"], timeout=float("nan")),
}
MISUSES: dict[str, Use] = {
    **RUN_MISUSES,
    "no-id": lambda client: client.delete(""),
    "dot": lambda client: client.delete("."),
    "dots": lambda client: client.delete(".."),
    "id-with-a-line-break": lambda client: client.delete("a\nb"),
    "id-with-a-nul": lambda client: client.delete("a\0b"),
    "id-with-a-c1": lambda client: client.delete("a\x9bb"),
    "negative-timeout-of-a-client": lambda c: Client(c.api_url, "t0ken", timeout=-1).status(),
}


@pytest.mark.parametrize("use", MISUSES.values(), ids=MISUSES.keys())
def test_a_wrong_value_is_refused_before_anything_is_sent(use: Use) -> None:
    with Hostile(answer(b'{"exit_code":0}')) as server:
        with pytest.raises(ConfigError) as caught:
            use(Client(server.url, "t0ken"))
        assert str(caught.value)
    assert server.connections == 0


@pytest.mark.parametrize("use", RUN_MISUSES.values(), ids=RUN_MISUSES.keys())
def test_a_wrong_value_of_a_run_says_that_it_was_not_sent(use: Use) -> None:
    with pytest.raises(ConfigError) as caught:
        use(Client("http://127.0.0.1:1", "t0ken"))
    assert caught.value.run_state == "not_sent"


# --- errors -----------------------------------------------------------------------------------


class Failure(NamedTuple):
    """An answer, and the error that a run makes of it."""

    id: str
    script: Script
    kind: type[BusContainersError]
    run_state: str
    timeout: float | None = None


def error(status: str) -> Script:
    return answer(b'{"error":{"type":"kind","message":"a sentence"}}', status)


FAILURES = [
    Failure("301", error("301 Moved\r\nLocation: http://127.0.0.1:1/"), ApiError, "refused"),
    Failure("304", answer(b"", "304 Not Modified"), ApiError, "refused"),
    Failure("400", error("400 Bad Request"), ApiError, "refused"),
    Failure("401", error("401 Unauthorized"), ApiError, "refused"),
    Failure("402", error("402 Payment Required"), ApiError, "refused"),
    Failure("413", html("413 Content Too Large", "413"), ApiError, "refused"),
    Failure("429", error("429 Too Many Requests"), ApiError, "refused"),
    Failure("500", error("500 Internal Server Error"), ApiError, "unknown"),
    Failure("502", html("502 Bad Gateway", "502 Bad Gateway"), ApiError, "unknown"),
    Failure("503", error("503 Service Unavailable"), ApiError, "unknown"),
    Failure("504", html("504 Gateway Time-out", "504"), ApiError, "unknown"),
    Failure("no-json", answer(b"nonsense"), ProtocolError, "unknown"),
    Failure("empty", answer(b""), ProtocolError, "unknown"),
    Failure("list", answer(b"[]"), ProtocolError, "unknown"),
    Failure("page", html("200 OK", "Welcome"), ProtocolError, "unknown"),
    Failure("closed", close(), TransportError, "unknown"),
    Failure("reset", reset(), TransportError, "unknown"),
    Failure("silent", silent(), DeadlineError, "unknown", timeout=0.2),
]


@pytest.mark.parametrize("case", FAILURES, ids=[case.id for case in FAILURES])
def test_the_error_of_a_run(case: Failure) -> None:
    with Hostile(case.script) as server:
        client = Client(server.url, "t0ken-of-this-test")
        with pytest.raises(case.kind) as caught:
            client.run(["true"], timeout=case.timeout)
    assert type(caught.value) is case.kind
    assert caught.value.run_state == case.run_state
    assert ("still be executing" in str(caught.value)) == (case.run_state == "unknown")
    assert "/api/v1/containers/runs" in str(caught.value)
    assert "t0ken-of-this-test" not in repr(caught.value) + str(caught.value)
    assert server.methods() == ["POST"]


def test_a_run_that_was_not_sent() -> None:
    with refused_port() as port, pytest.raises(TransportError) as caught:
        Client(f"http://127.0.0.1:{port}", "t0ken").run(["true"], timeout=0.2)
    assert caught.value.run_state == "not_sent"
    assert "still be executing" not in str(caught.value)


def test_a_timeout_is_in_seconds() -> None:
    with Hostile(silent()) as server:
        with pytest.raises(DeadlineError):
            Client(server.url, "t0ken", timeout=0.1).status()
        with pytest.raises(DeadlineError):
            Client(server.url, "t0ken", timeout=0.1).delete("run-1")
        with pytest.raises(DeadlineError):
            Client(server.url, "t0ken", timeout=30).run(["true"], timeout=0.1)


def test_the_timeout_of_a_client_is_not_that_of_a_run(platform: local_platform.Platform) -> None:
    client = Client(platform.url, platform.token(), timeout=0.001)
    assert client.run(["sleep", "0.05"])["exit_code"] == 0
    assert client.run(["sleep", "0.05"], timeout_seconds=9)["exit_code"] == 0


@pytest.mark.parametrize(
    ("timeout_seconds", "seconds"), [(None, 1800), (0, 1800), (1, 31), (600, 630), (7200, 7230)]
)
def test_the_default_timeout_of_a_run(timeout_seconds: int | None, seconds: float) -> None:
    # The private function, since from outside it shows only after more than 30 s.
    limit = bus_containers._run_request(["true"], None, None, timeout_seconds)[1]
    assert limit == seconds


ERRORS: list[tuple[bytes, dict[str, object]]] = [
    (
        b'{"error":{"type":"quota_exceeded","message":"used up","action":"upgrade_plan",'
        b'"command":"bus billing setup","usage":{"used":1}}}',
        {
            "type": "quota_exceeded",
            "message": "used up",
            "action": "upgrade_plan",
            "command": "bus billing setup",
        },
    ),
    (b'{"error":{"type":"t","message":"m"},"more":1}', {"type": "t", "message": "m"}),
    (b'{"error":{}}', {}),
    (b'{"error":{"type":1,"message":null,"action":[],"command":{}}}', {}),
    (b"[]", {}),
    (b"nonsense", {}),
    (b"", {}),
]


@pytest.mark.parametrize(("body", "fields"), ERRORS)
@pytest.mark.parametrize("name", METHODS)
def test_the_fields_of_an_api_error(name: str, body: bytes, fields: dict[str, object]) -> None:
    arguments: dict[str, list[Any]] = {"run": [["true"]], "delete": ["run-1"]}
    with Hostile(answer(body, "402 Payment Required")) as server:
        call = getattr(Client(server.url, "t0ken"), name)
        with pytest.raises(ApiError) as caught:
            call(*arguments.get(name, []))
    failure = caught.value
    assert failure.status == 402
    for field in ("type", "message", "action", "command"):
        assert getattr(failure, field) == fields.get(field)
        assert str(fields.get(field, "")) in str(failure)
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    assert failure.document == document
    assert failure.run_state == ("refused" if name == "run" else None)
    assert "402" in str(failure)


def test_somebody_elses_run(platform: local_platform.Platform) -> None:
    mine, other = (Client(platform.url, platform.token(account=name)) for name in ("me", "other"))
    run_id = mine.run(["true"])["run_id"]
    with pytest.raises(ApiError) as caught:
        other.delete(run_id)
    assert (caught.value.status, caught.value.type) == (403, "forbidden")
    assert mine.delete(run_id)["deleted"] is True
    with pytest.raises(ApiError) as caught:
        mine.delete(run_id)
    assert (caught.value.status, caught.value.type) == (404, "not_found")


@pytest.mark.parametrize("billing", ["required", "quota"])
def test_billing(billing: Any) -> None:
    with local_platform.Platform(billing=billing) as platform:
        client = Client(platform.url, platform.token())
        with pytest.raises(ApiError) as caught:
            client.run(["true"])
    assert caught.value.status == 402
    assert caught.value.command == "bus billing setup"
    assert "bus billing setup" in str(caught.value)
    assert caught.value.run_state == "refused"


def test_no_repr_holds_the_token(platform: local_platform.Platform) -> None:
    token = platform.token()
    client = Client(platform.url, token)
    assert token not in repr(client) + str(client)
    assert platform.url in repr(client)


# --- many threads -----------------------------------------------------------------------------

THREADS, ROUNDS = 64, 12  # of four calls each, and two more: 3,200 calls


def test_a_client_of_many_threads() -> None:
    with local_platform.Platform() as platform:
        client = Client(platform.url, platform.token())
        ready = threading.Barrier(THREADS)

        def work(thread: int) -> tuple[list[str], int]:
            ids, calls = [], 0
            ready.wait(30)
            for number in range(ROUNDS):
                word = f"word-{thread}-{number}"
                run = client.run(["printf", word])
                assert (run["exit_code"], run["stdout"], run["args"][1]) == (0, word, word)
                ids.append(run["run_id"])
                listed = [item for item in client.runs()["items"] if item["run_id"] == ids[-1]]
                assert [item["args"] for item in listed] == [["printf", word]]
                assert client.status()["items"][0]["state"] == "ready"
                assert client.delete(ids[-1])["run_id"] == ids[-1]
                calls += 4
            for call in (client.status, client.runs):
                assert call()["items"] is not None
                calls += 1
            return ids, calls

        with ThreadPoolExecutor(THREADS) as pool:
            results = list(pool.map(work, range(THREADS)))
        assert client.runs() == {"items": []}
        requests = platform.requests[:-1]
    assert sum(calls for _, calls in results) == 3_200 == len(requests)
    ids = [run_id for ids, _ in results for run_id in ids]
    assert len(set(ids)) == len(ids) == THREADS * ROUNDS
    deleted = [path.rpartition("/")[2] for method, path in requests if method == "DELETE"]
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

sys.argv = Argv()
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
before = dict(os.environ), os.getcwd(), [*handlers], sys.stdout, sys.stderr, sys.excepthook

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
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
after = dict(os.environ), os.getcwd(), [*handlers], sys.stdout, sys.stderr, sys.excepthook
assert before == after
with open(os.environ["DONE"], "w") as file:
    json.dump(done, file)
"""


def test_the_library_is_a_guest(
    platform: local_platform.Platform, program: Program, tmp_path: Path
) -> None:
    target = program.command[-1]
    place = target if target.endswith(".pyz") else str(Path(inspect.getfile(bus_containers)).parent)
    environ = program.env(
        PLACE=place,
        DONE=str(tmp_path / "done"),
        BUS_AI_API_URL=platform.url,
        BUS_AI_TOKEN=platform.token(account="guest"),
    )
    words = [sys.executable, "-W", "error", "-c", GUEST]
    result = subprocess.run(words, env=environ, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert json.loads((tmp_path / "done").read_text()) == [
        "ready",
        "OK",
        1,
        "ApiError",
        "ApiError",
        "ConfigError",
        "ApiError",
        "TransportError",
        "ConfigError",
    ]
