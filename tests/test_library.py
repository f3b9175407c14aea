# SPDX-License-Identifier: MIT
"""The library: promises 3.3, 4.1 to 4.8, and the `run_state` of 6.3 and 6.4."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import json
import os
import pickle
import re
import signal
import socket
import ssl
import sys
import threading
import typing
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

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
from hostile import (
    Api,
    Certificates,
    Connection,
    Hostile,
    Script,
    answer,
    html,
    message,
    raw,
    refused_port,
    reset,
    silent,
    steps,
)
from local_platform import PROFILE_IMAGES, Platform
from support import BODIES, CANARY, DOCUMENTS, LIMIT, InProcess, Program, Result, fill, second_tier

Serve = Callable[..., Hostile]
OPTION = re.compile("--(?!scope)")  # which is an option of `bus auth token`


@pytest.fixture
def client(api: Api) -> Client:
    return Client(api.url, CANARY)


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


def test_everything_public_has_help_hints_and_plain_defaults() -> None:
    """Promise 4.7: pydantic and typer resolve hints; help() prints default values."""
    for name, thing in public():
        if not name.endswith("__init__"):
            own = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
            assert own and own.strip(), name
        try:
            typing.get_type_hints(thing)
        except TypeError:  # `str | None` is nothing to Python 3.9
            assert sys.version_info < (3, 10), name
        if inspect.isclass(thing) and issubclass(thing, Exception):
            continue
        for parameter in inspect.signature(thing).parameters.values():
            is_plain = isinstance(parameter.default, (bool, int, float, str))
            assert is_plain or parameter.default in (None, parameter.empty), (name, parameter.name)


def test_one_tree_of_errors_with_their_kinds() -> None:
    """Promise 4.4."""
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
        assert (kind.__bases__, kind.kind) == ((parent,), name)
        assert kind("text").run_state == ("not_sent" if kind is ConfigError else None)
        assert kind("text").retryable is False


# --- the four calls -----------------------------------------------------------------------------


@pytest.mark.parametrize("runs_in_status", [False, True])
def test_the_four_calls(runs_in_status: bool, platform: Platform) -> None:
    """Promise 4.2."""
    platform.runs_in_status = runs_in_status
    client = Client(platform.url, platform.token(account="four"))
    assert client.status()["items"][0]["state"] == "ready"
    run = client.run(["sh", "-c", "printf OK; printf no >&2; exit 37"])
    keys = "run_id owner_identity_id runner_name image args exit_code stdout stderr duration_ms"
    assert list(run) == [*keys.split(), "runtime"]
    assert (run["exit_code"], run["stdout"], run["stderr"]) == (37, "OK", "no")
    assert run["image"] == PROFILE_IMAGES["codex"]
    assert [item["run_id"] for item in client.runs()["items"]] == [run["run_id"]]
    deleted = {"deleted": True, "run_id": run["run_id"], "owner_identity_id": "four"}
    assert client.delete(run["run_id"]) == deleted
    if not runs_in_status:
        assert client.runs() == {"items": []}


SENT: list[tuple[Any, dict[str, Any], object]] = [
    (["a b", ""], {}, {"profile": "codex", "args": ["a b", ""]}),
    (["\u00e4"], {"profile": "x"}, {"profile": "x", "args": ["\u00e4"]}),
    (("a", "b"), {"image": "alpine:3"}, {"image": "alpine:3", "command": ["a", "b"]}),
    (["a"], {"timeout_seconds": 5, "timeout": 9},
     {"profile": "codex", "args": ["a"], "timeout_seconds": 5}),
    (["a"], {"timeout_seconds": 0, "timeout": 0},
     {"profile": "codex", "args": ["a"], "timeout_seconds": 0}),
    (["--"], dict.fromkeys(["profile", "image", "timeout_seconds", "timeout"]),
     {"profile": "codex", "args": ["--"]}),
]  # fmt: skip
LISTED: list[tuple[bytes, object]] = [
    (b'{"items":[1],"x":2}', {"items": [1], "x": 2}),
    (b'{"runs":[1],"x":2}', {"items": [1], "x": 2}),
    (b'{"items":[],"runs":[1]}', {"items": [], "runs": [1]}),
    (b'{"items":null}', {"items": []}),
    (b"[1]", {"items": [1]}),
]


def test_what_is_sent_and_what_comes_back(client: Client, api: Api) -> None:
    for words, keywords, body in SENT:
        assert client.run(words, **keywords)["exit_code"] == 0
        assert json.loads(api.requests[-1].partition(b"\r\n\r\n")[2]) == body
    for answered, document in LISTED:
        api.answers(answered)
        assert client.runs() == document
    sent = b'{"status":{"state":"ready"},"z":1,"a":{"new":[null,true,1.5,"\\ud800"]}}'
    api.answers(sent)
    assert json.dumps(client.status()) == json.dumps(json.loads(sent))


def test_from_env(platform: Platform, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it comes from there, the proxy too."""
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
    proxy, other = serve(answer(BODIES["status"])), serve(answer(BODIES["status"]))
    monkeypatch.setenv("HTTP_PROXY", other.url)
    environ = {"BUS_AI_API_URL": "http://platform.test", "BUS_AI_TOKEN": "t0ken"}
    Client.from_env({**environ, "HTTP_PROXY": proxy.url}).status()
    assert proxy.requests[0].startswith(b"GET http://platform.test/api/v1/containers/status HTTP")
    assert other.requests == []


# --- a caller's bad value, and a server's -------------------------------------------------------

BAD_URLS = ["", "http://platform.test/api/v1/containers", "http://me:pass@platform.test"]
BAD_TOKENS = ["", "  ", "a b", "a\r\nX-Injected: b", "t\u00f6ken", "t\u20acken", "t\ud800ken"]
BAD_WORDS: list[Any] = [[], "codex --version", b"true", ["a", b"true"], ["sleep", 1]]
BAD_KEYWORDS: list[dict[str, Any]] = [
    {"profile": "a", "image": "b"}, {"profile": ""}, {"image": ""},
    {"timeout_seconds": -1}, {"timeout_seconds": 1.5}, {"timeout_seconds": True},
    {"timeout_seconds": "5"}, {"timeout_seconds": 10**15},
    {"timeout": -1}, {"timeout": "5"}, {"timeout": float("nan")},
]  # fmt: skip
BAD_IDS: list[Any] = ["", ".", "..", "a\nb", "a\0b", "a\x9bb", "a\u202eb", None, 7]


def refused(use: Callable[..., object], *args: Any, **keywords: Any) -> str:
    """What is said of a value, in the words of the library, which has no options."""
    with pytest.raises(ConfigError) as caught:
        use(*args, **keywords)
    said = str(caught.value)
    assert said and not OPTION.search(said), said
    assert caught.value.run_state == "not_sent"
    return said


def test_a_wrong_value_is_refused_before_anything_is_sent(client: Client, api: Api) -> None:
    """Promise 4.8."""
    for url in BAD_URLS:
        assert "pass" not in refused(Client, url, "t0ken")
    for token in BAD_TOKENS:
        said = refused(Client, "http://platform.test", token)
        assert not token.strip() or token not in said
    for words in BAD_WORDS:
        refused(client.run, words)
    for keywords in BAD_KEYWORDS:
        refused(client.run, ["true"], **keywords)
    for run_id in BAD_IDS:
        refused(client.delete, run_id)
    refused(Client(api.url, "t0ken", timeout=-1).status)
    assert client.run(["true"], timeout_seconds=10**15 - 1)
    assert api.methods() == ["POST"]
    api.answers({"deleted": True, "run_id": ".."})
    with pytest.raises(ProtocolError):  # the server's bad value is not the caller's
        client.delete("run-1")


# --- errors -------------------------------------------------------------------------------------

# What a run is answered, the error that it makes of it, its state, and whether to try again.
FAILURES: dict[str, tuple[Script, type[BusContainersError], str, bool]] = {
    "301": (answer(b"{}", "301 Moved", "Location: /"), ApiError, "refused", False),
    "402": (answer(b'{"error":{"type":"a","message":"b"}}', "402 No"), ApiError, "refused", False),
    "429": (answer(b"", "429 Slow"), ApiError, "refused", True),
    "502": (html("502 Bad Gateway", "502 Bad Gateway"), ApiError, "unknown", False),
    "page": (html("200 OK", "Welcome"), ProtocolError, "unknown", False),
    "list": (answer(b"[]"), ProtocolError, "unknown", False),
    "reset": (reset(), TransportError, "unknown", False),
    "silent": (silent(), DeadlineError, "unknown", False),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_error_of_a_run_and_its_copies(name: str, serve: Serve) -> None:
    """Promises 4.4, 4.5 and 4.6: the right error, and nothing of it is lost in a copy."""
    script, kind, run_state, retryable = FAILURES[name]
    server = serve(script)
    with pytest.raises(kind) as caught:
        Client(server.url, CANARY).run(["true"], timeout=0.3 if name == "silent" else LIMIT)
    raised = caught.value
    assert type(raised) is kind
    assert (raised.run_state, raised.retryable) == (run_state, retryable)
    assert ("still be executing" in str(raised)) == (run_state == "unknown")
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


ERRORS: list[tuple[bytes, dict[str, object]]] = [
    (b'{"error":{"type":"quota_exceeded","message":"used up","action":"upgrade_plan",'
     b'"command":"bus billing setup","usage":{"used":1}}}',
     {"type": "quota_exceeded", "message": "used up", "action": "upgrade_plan",
      "command": "bus billing setup"}),
    (b'{"type":"t","message":"m"}', {"type": "t", "message": "m"}),
    (b'{"error":"m"}', {"message": "m"}),
    (b'{"error":{"type":1,"message":null,"action":[],"command":" "}}', {}),
    (b"[]", {}),
    (b"nonsense", {}),
]  # fmt: skip


@pytest.mark.usefixtures("hasty")
def test_the_errors_of_each_call(client: Client, api: Api) -> None:
    calls: dict[str, Callable[[Client], object]] = {
        "status": lambda client: client.status(),
        "run": lambda client: client.run(["true"]),
        "runs": lambda client: client.runs(),
        "delete": lambda client: client.delete("run-1"),
    }
    for name, call in calls.items():
        for body, fields in ERRORS:
            api.answers(body, status="402 Payment Required")
            with pytest.raises(ApiError) as caught:
                call(client)
            failed = caught.value
            for field in ("type", "message", "action", "command"):
                assert getattr(failed, field) == fields.get(field)
                assert str(fields.get(field, "")) in str(failed)
            document = None if body == b"nonsense" else json.loads(body)
            assert (failed.status, failed.document) == (402, document)
            assert failed.run_state == ("refused" if name == "run" else None)
            assert "402" in str(failed)
        with refused_port() as port, pytest.raises(TransportError) as lost:
            call(Client(f"http://127.0.0.1:{port}", "t0ken"))
        assert lost.value.run_state == ("not_sent" if name == "run" else None)
        assert lost.value.retryable is True
        assert "still be executing" not in str(lost.value)


# --- timeouts and threads -----------------------------------------------------------------------


def test_timeouts(serve: Serve, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds, 0 for none. Promise 3.3: a run's is 30 s more than its own limit, or 30 min."""
    server = serve(silent())
    for call in (Client.status, lambda client: client.delete("run-1")):
        with pytest.raises(DeadlineError, match=r"within 0\.01 s"):
            call(Client(server.url, "t0ken", timeout=0.01))
    for timeout in (0, 0.0):
        assert Client(client.api_url, "t0ken", timeout=timeout).status()
        assert client.run(["true"], timeout=timeout)
    limits = (bus_containers._RUN_MARGIN_SECONDS, bus_containers._RUN_TIMEOUT_SECONDS)
    assert limits == (30, 1800)
    monkeypatch.setattr(bus_containers, "_RUN_MARGIN_SECONDS", -1.98)
    monkeypatch.setattr(bus_containers, "_RUN_TIMEOUT_SECONDS", 0.03)
    slow = Client(server.url, "t0ken", timeout=0.001)
    limited: list[tuple[str, dict[str, Any]]] = [
        (r"0\.01 s", {"timeout": 0.01}), (r"0\.02 s", {"timeout_seconds": 2}),
        (r"0\.03 s", {"timeout_seconds": 0}), (r"0\.03 s", {}),
    ]  # fmt: skip
    for told, keywords in limited:
        with pytest.raises(DeadlineError, match=f"within {told}"):
            slow.run(["true"], **keywords)


@contextmanager
def handler(error: BaseException, name: str = "late") -> Iterator[None]:
    """A signal's handler of a host program raises this, which has to come out as it is.

    As many do, it takes itself away first; or it says that it does not use its arguments.
    """

    def expire(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        raise error

    def late(_a: int, _b: int, _c: int, _number: int, _frame: object) -> None:
        expire(_number, _frame)

    def wrapped(*arguments: Any) -> None:
        expire(*arguments)

    def unused(number: int, frame: object) -> None:
        del number, frame
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        raise error

    forms: dict[str, Any] = {"wrapped": wrapped, "unused": unused}
    forms["late"] = functools.partial(late, 1, 2, 3)
    before = signal.signal(signal.SIGALRM, forms[name])
    try:
        with pytest.raises(type(error)) as caught:
            yield
    finally:
        signal.signal(signal.SIGALRM, before)
    assert caught.value is error


def alarm(_: Connection) -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)


def alarm_at_the_end_of(name: str) -> None:
    """Let the signal come when a function of Python's own, of this name, ends."""

    def hit(frame: Any, event: str, called: Any) -> None:
        is_c = event in ("c_return", "c_exception")
        if name == (called.__name__ if is_c else event == "return" and frame.f_code.co_name):
            sys.setprofile(None)
            signal.raise_signal(signal.SIGALRM)

    sys.setprofile(hit)


@pytest.mark.parametrize(
    ("name", "text"), [("wrapped", "enough"), ("late", "timed out"), ("unused", "timed out")]
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_a_host_s_handler_raises_ends_a_call(
    scheme: str, name: str, text: str, serve: Serve
) -> None:
    """Promise 4.9: before a request is sent (amid TLS) or after. The usual idiom for a limit."""
    arrival = {"http": Connection.read_request, "https": Connection.await_data}[scheme]
    server = serve(steps(arrival, alarm, Connection.hold), answer(BODIES["run"]))
    client = Client(server.url.replace("http", scheme, 1), CANARY)
    with handler(TimeoutError(text), name):
        client.run(["true"], timeout=LIMIT)
    assert server.methods() == ["POST"] * (scheme == "http")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("__import__", TimeoutError()), ("acquire", RuntimeError()), ("register", OSError()),
        ("load_verify_locations", TimeoutError()), ("do_handshake", TimeoutError()),
        ("send", ConnectionAbortedError()), ("send", TimeoutError()), ("recv", TimeoutError()),
        ("ip_address", ValueError()), ("ip_network", ValueError()),
        ("connect", TimeoutError()), ("connect", BlockingIOError()), ("decode", MemoryError()),
        ("raw_decode", ValueError()), ("raw_decode", MemoryError()), ("quote", StopIteration()),
    ],
    ids=str,
)  # fmt: skip
def test_a_host_s_handler_at_any_step(
    name: str,
    error: Exception,
    serve: Serve,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Promise 4.9."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # which is not asked for loopback
    is_plain = isinstance(error, ConnectionAbortedError)
    tls = None if is_plain else certificates.context(certificates.good)
    server = serve(answer(BODIES["run"]), tls=tls)
    with handler(error):
        alarm_at_the_end_of(name)
        Client(server.url, CANARY).run(["true"], timeout=LIMIT)


# A response of http.client's that is not made whole fails at its end, and nobody closes a socket.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@second_tier
@pytest.mark.parametrize("way", ["http", "https", "tunnel"])
def test_an_interrupt_at_every_line_that_a_run_executes(
    way: str, serve: Serve, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 4.9: also in the code of Python's own that it calls. None is dropped on the way."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    context = certificates.context(certificates.good)

    def tunnel(connection: Connection) -> None:
        connection.read_request()
        connection.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        connection.start_tls(context)
        answer(BODIES["run"])(connection)

    if way == "tunnel":
        monkeypatch.setenv("HTTPS_PROXY", serve(tunnel).url)
        client = Client("https://platform.test", CANARY)
    else:
        server = serve(answer(BODIES["run"]), tls=context if way == "https" else None)
        client = Client(server.url.replace("127.0.0.1", "localhost"), CANARY)
    places: dict[tuple[str, int, str], None] = {}
    hits: list[object] = []

    def run(wanted: object) -> None:
        def trace(frame: Any, event: str, _argument: object) -> Any:
            place = (frame.f_code.co_filename, frame.f_lineno, event)
            if place == wanted:
                sys.settrace(None)
                hits.append(place)
                signal.raise_signal(signal.SIGINT)
            elif wanted is None and event != "exception":  # what is raised at one is dropped
                places[place] = None
            return trace

        sys.settrace(trace)
        try:
            client.run(["true"], timeout=LIMIT)
        finally:
            sys.settrace(None)

    gc.disable()  # it may call code of others, here the server's, at any of these lines
    try:
        run(None)
        dropped = []
        for place in places:
            with suppress(KeyboardInterrupt):
                count = len(hits)
                run(place)
                if len(hits) > count:
                    dropped.append(place)
    finally:
        gc.enable()
    gc.collect()  # what was broken off ends here, not amid another test
    assert dropped == []
    assert len(hits) > 1000


FAILING: dict[str, Script] = {
    "silent": silent(), "reset": reset(), "cut": raw(message(b"{", length=9)), "no HTTP": raw(b"x"),
    "refused": answer(b"{}", "404 Not Found"), "bad status": raw(b"HTTP/1.1 x OK\r\n\r\n"),
    "bad chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize(("scheme", "is_tls"), [("http", False), ("https", True), ("https", False)])
def test_nothing_is_left_of_a_call_that_fails(
    name: str, scheme: str, serve: Serve, certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch, *, is_tls: bool,
) -> None:  # fmt: skip
    """A cycle would stay in the command line, which does not collect, with all its certificates."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    tls = certificates.context(certificates.good) if is_tls else None
    host = serve(FAILING[name], tls=tls).url.partition(":")[2]
    client = Client(f"{scheme}:{host}", CANARY, timeout=0.2)

    def count_attempts() -> int:
        return sum(type(each) is bus_containers._Attempt for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = count_attempts()  # what other tests keep
        with suppress(BusContainersError):
            client.status()
        assert count_attempts() == before
    finally:
        gc.enable()


class Odd:
    """As an array of numpy: to compare it says nothing."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value is ambiguous")


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """As what instruments a program does: all that it wraps has one code."""

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    return wrapper


def test_a_host_that_wraps_its_handler_and_the_network(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 4.9: no signal came, so a connection under way is just that."""
    monkeypatch.setattr(socket, "socket", type("Socket", (socket.socket,), {}))
    monkeypatch.setattr(socket.socket, "connect", traced(socket.socket.connect))
    before = signal.signal(signal.SIGALRM, traced(lambda *_: None))
    try:
        assert Client(api.url, CANARY).run(["true"]) == DOCUMENTS["run"]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_odd_values_of_a_host_s_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 4.9: what it raises is the network's, whatever it has in its variables."""

    def look_up(*_: object, values: object = (Odd(), mock.ANY), **__: object) -> None:
        raise socket.gaierror(f"no such name, says one of {type(values)}")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(TransportError, match="no such name") as caught:
        Client("http://127.0.0.1", CANARY).run(["true"], timeout=0.2)  # too short to try again
    assert caught.value.run_state == "not_sent"


@pytest.mark.parametrize("error", [TimeoutError(), FileNotFoundError()], ids=["time", "file"])
def test_a_host_s_handler_amid_the_advice_for_a_certificate(
    error: Exception,
    serve: Serve,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Promise 4.9."""
    monkeypatch.setenv("SSL_CERT_DIR", str(certificates.folder))
    server = serve(silent(), tls=certificates.context(certificates.good))
    with handler(error):
        alarm_at_the_end_of("listdir")
        Client(server.url, CANARY).status()


def test_a_host_s_handler_amid_the_claims_of_a_token(serve: Serve) -> None:
    """Promise 4.9."""
    server = serve(answer(b"{}", "401 No"))
    with handler(ValueError()):
        alarm_at_the_end_of("urlsafe_b64decode")
        Client(server.url, CANARY).status()


def test_a_host_s_handler_amid_an_object_of_main(cli: InProcess) -> None:
    """Promise 4.9."""
    with handler(TimeoutError()):
        alarm_at_the_end_of("dumps")
        cli("--error-format", "json", "no-command")


@pytest.mark.parametrize("error", [TimeoutError(), ValueError()], ids=["time", "value"])
@pytest.mark.parametrize("status", ["200 OK", "503 Unavailable"])
def test_a_host_s_handler_amid_an_answer(status: str, error: Exception, serve: Serve) -> None:
    """Promise 4.9."""
    head = message(b"{", status, length=9)

    def amid_it(connection: Connection) -> None:
        raw(head)(connection)
        connection.server.ending.wait(0.1)  # until its head is read
        alarm(connection)
        connection.hold()

    server = serve(amid_it, answer(BODIES["status"]))
    with handler(error):
        Client(server.url, CANARY).status()
    assert server.methods() == ["GET"]


class Stop(KeyboardInterrupt):
    """A host's own."""


@pytest.mark.parametrize("moment", ["register", "send", "fetch"])
def test_an_interrupt_that_a_host_s_handler_raises(moment: str, serve: Serve) -> None:
    """Promise 4.6: it tells what is known of the run."""
    server = serve(answer(BODIES["run"]))
    error = Stop()
    with handler(error):
        alarm_at_the_end_of(moment)
        Client(server.url, CANARY).run(["true"], timeout=LIMIT)
    known = {"register": "not_sent", "send": "unknown", "fetch": "finished"}
    assert vars(error)["run_state"] == known[moment]


@pytest.mark.parametrize("number", [2, 3, 4])
def test_an_interrupt_just_before_an_error_comes_out(number: int, api: Api) -> None:
    """Promise 4.6: at each line where what is known of the run is put on the error."""
    api.answers(b"{}", status="404 No")
    lines = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code is not Client.run.__code__:
            return None
        lines += 1 if lines or event == "exception" else 0
        if lines == number and event == "line":
            raise Stop
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(Stop) as caught:
            Client(api.url, CANARY).run(["true"])
    finally:
        sys.settrace(before)
    assert vars(caught.value)["run_state"] == "refused"


def test_a_host_s_handler_whose_own_tls_ends(
    serve: Serve, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 4.9: it is not the end of our answer."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    waiting = steps(Connection.read_request, alarm, Connection.hold)
    server = serve(waiting, tls=certificates.context(certificates.good))
    with handler(ssl.SSLEOFError()):
        Client(server.url, CANARY).delete("a")


@pytest.mark.parametrize("name", ["readlink", "lstat", "samestat"])
def test_a_host_s_handler_amid_a_look_at_an_output(
    name: str, cli: InProcess, api: Api, folder: Path
) -> None:
    """Promise 4.9."""
    (folder / "target").touch()
    (folder / "out").symlink_to("target")
    with handler(FileNotFoundError()):
        alarm_at_the_end_of(name)
        cli("-o", "out", "run", "true", at=api)


@pytest.mark.parametrize("name", ["isatty", "lseek"])
def test_a_host_s_handler_amid_a_message_of_main(name: str, cli: InProcess, api: Api) -> None:
    """Promise 4.9: nothing is sent after it."""
    with handler(TimeoutError()):
        alarm_at_the_end_of(name)
        cli("-v", "run", "true", at=api)
    assert api.requests == []


@pytest.mark.parametrize("error", [urllib.error.URLError("boom"), urllib.error.URLError(OSError())])
def test_a_host_s_handler_whose_own_request_fails(error: Exception, serve: Serve) -> None:
    """Promises 4.9, 6.16: no connection of ours was lost, so a 404 would not be a deletion."""
    gone = answer(b'{"error": {"type": "not_found"}}', "404 Not Found")
    server = serve(steps(Connection.read_request, alarm, Connection.hold), gone)
    with handler(error):
        Client(server.url, CANARY).delete("a")
    assert server.methods() == ["DELETE"]


WAITS = {
    "token": FileNotFoundError(), "output": FileNotFoundError(), "stdout": BlockingIOError(),
    "stderr": BlockingIOError(),
}  # fmt: skip


@pytest.mark.parametrize("is_usual", [True, False])
@pytest.mark.parametrize("name", WAITS)
def test_a_host_s_handler_amid_a_long_wait_of_main(
    name: str, cli: InProcess, api: Api, folder: Path, *, is_usual: bool
) -> None:
    """Promise 4.9, also for the error that the waiting itself may raise."""
    os.mkfifo(folder / "fifo")
    reader, writer = os.pipe()
    fill(writer)
    api.answers({"run_id": "r", "exit_code": 0, "stdout": "", "stderr": "bad"})
    options = {"token": ["--token-file", "fifo"], "output": ["-o", "fifo"], "stderr": ["-ftext"]}
    streams: dict[str, Any] = {name: writer} if name.startswith("std") else {}
    try:
        with handler(TimeoutError() if is_usual else WAITS[name]):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            cli(*options.get(name, []), "run", "true", at=api, **streams)
        assert len(api.requests) == (name in ("stdout", "stderr"))
    finally:
        os.close(reader)
        os.close(writer)


def test_an_exit_by_a_host_s_handler_ends_main(cli: InProcess, serve: Serve) -> None:
    """Promise 4.9: it is not told as a fault of this program."""
    server = serve(steps(Connection.read_request, alarm, Connection.hold))
    with handler(SystemExit(3)):
        cli("run", "true", at=server)


@pytest.mark.parametrize("error", [SystemExit(3), TimeoutError()], ids=["exit", "time"])
def test_a_host_s_handler_amid_a_message_that_nobody_reads(
    error: BaseException, cli: InProcess
) -> None:
    """Promise 4.9."""
    reader, writer = os.pipe()
    fill(writer)
    try:
        with handler(error):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            cli("no-command", stderr=writer)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("threads", [8, pytest.param(32, marks=second_tier)])
def test_a_client_of_many_threads(threads: int, platform: Platform) -> None:
    """Promise 4.1."""
    client = Client(platform.url, platform.token())
    ready = threading.Barrier(threads)

    def work(thread: int) -> str:
        ready.wait(LIMIT)
        run = client.run(["printf", f"word-{thread}"])
        assert (run["exit_code"], run["stdout"]) == (0, f"word-{thread}")
        [listed] = [item for item in client.runs()["items"] if item["run_id"] == run["run_id"]]
        assert listed["args"] == run["args"]
        assert client.status()["items"][0]["state"] == "ready"
        assert client.delete(run["run_id"])["run_id"] == run["run_id"]
        return str(run["run_id"])

    with ThreadPoolExecutor(threads) as pool:
        assert len(set(pool.map(work, range(threads)))) == threads
    assert client.runs() == {"items": []}
    assert len(platform.requests) == threads * 4 + 1


# --- in another program -------------------------------------------------------------------------

HOST = """
import json, os, signal, sys
sys.path.insert(0, os.environ["PLACE"])
"""
POOL = """
import multiprocessing, bus_containers

def call(timeout):
    return bus_containers.Client.from_env().run(["true"], timeout=timeout)

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for timeout in (9, -1):
            try:
                pool.apply(call, (timeout,))
            except bus_containers.BusContainersError as error:
                print(type(error).__name__, error.run_state, getattr(error, "status", None))
"""
GUEST = """
class Argv(list):
    def __getattribute__(self, name):
        raise AssertionError("sys.argv was read")
    __getitem__ = __iter__ = __getattribute__

def surroundings():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
    handlers = [signal.getsignal(number) for number in numbers]
    return dict(os.environ), os.getcwd(), handlers, sys.stdout, sys.stderr, sys.excepthook

sys.argv = Argv()
before = surroundings()
import bus_containers

def exits(*args):
    raise AssertionError("the library wants to exit")

os._exit = exits
client = bus_containers.Client.from_env()
done = [client.status()["items"][0]["state"], client.run(["printf", "OK"])["stdout"]]
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
print(json.dumps(done))
"""


@pytest.fixture
def host(program: Program, tmp_path: Path) -> Callable[..., Result]:
    """Run a script that can import the library under test."""
    target, script = program.command[-1], tmp_path / "host.py"
    place = str(Path(inspect.getfile(bus_containers)).parent)
    program.environ["PLACE"] = target if target.endswith(".pyz") else place
    program.command = [sys.executable, "-W", "error", str(script)]

    def run(source: str, **options: Any) -> Result:
        script.write_text(HOST + source)
        return program(**options)

    return run


def test_errors_come_back_from_a_process_pool(api: Api, host: Callable[..., Result]) -> None:
    """Promise 4.4: one that cannot be unpickled makes the parent wait for ever."""
    api.sends(message(b'{"error":{"type":"a","message":"b"}}', "402 Payment Required"))
    result = host(POOL, at=api)
    assert (result.out, result.err) == (b"ApiError refused 402\nConfigError not_sent None\n", b"")


def test_the_library_is_a_guest(platform: Platform, host: Callable[..., Result]) -> None:
    """Promise 4.1; the line is its program's."""
    result = host(GUEST, at=platform)
    assert (result.code, result.err) == (0, b"")
    kinds = "ApiError ApiError ConfigError ApiError TransportError ConfigError"
    assert json.loads(result.out) == ["ready", "OK", *kinds.split()]
