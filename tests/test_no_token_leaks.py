# SPDX-License-Identifier: MIT
"""The token, and a proxy's login, stay secret: promises 2.8 and 6.18.

A canary goes through every failure, at every verbosity, in every format. It may turn up in no
output, no file, no text, argument or repr of an exception or of what hangs behind it, even where a
server or a proxy sends it back. Every `Result` was searched for it before a test sees the result.
"""

from __future__ import annotations

import base64
import inspect
import itertools
import json
import pydoc
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import bus_containers
from hostile import (
    Api,
    Connection,
    Hostile,
    Script,
    answer,
    close,
    html,
    message,
    raw,
    refused_port,
    reset,
    silent,
)
from local_platform import Platform
from support import (
    CANARY,
    NOWHERE,
    InProcess,
    Program,
    chain,
    check_failure,
    failure_code,
    files_of,
    jwt,
    leaks,
    second_tier,
    words,
)

RUN = words("run")

# --- servers that send the token back ---------------------------------------------------------


def echo(data: bytes) -> Script:
    """Send these bytes, in which TOKEN stands for the token that came with the request."""

    def script(connection: Connection) -> None:
        request = connection.read_request()
        token = request.partition(b"Authorization: Bearer ")[2].partition(b"\r\n")[0]
        assert token, request
        connection.send(data.replace(b"TOKEN", token))

    return script


def error(body: bytes, status: str = "401 No") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\n\r\n%s" % (status.encode(), body)


FIELDS = (
    b'{"error":{"type":"TOKEN","message":"bad token TOKEN","action":"TOKEN",'
    b'"command":"curl -H \'Authorization: Bearer TOKEN\'","recommended_plan":"TOKEN",'
    b'"usage":{"feature":"TOKEN","window":"TOKEN","used":1,"limit":1},"TOKEN":"TOKEN"}}'
)
HTML = b"<html><head><title>Bearer TOKEN</title></head><body>TOKEN</body></html>"
PADDED = {
    "message": error(b'{"error":{"message":"PADTOKEN"}}'),
    "location": b"HTTP/1.1 302 Go\r\nLocation: http://x/PADTOKEN\r\n\r\n",
    "reason": b"HTTP/1.1 500 PADTOKEN\r\nContent-Length: 0\r\n\r\n",
    "no-http": b"PADTOKEN\r\n\r\n",
    "coding": b"HTTP/1.1 200 OK\r\nContent-Encoding: PADTOKEN\r\n\r\n\x1f",
}
ECHOES = {
    **{
        f"fields-{status}": error(FIELDS, f"{status} No")
        for status in (400, 401, 402, 403, 404, 500, 503)
    },
    # a text that is cut short amid a token no longer holds the whole of it to look for
    **{
        f"{name}-at-{size}": data.replace(b"PAD", b"x" * size)
        for name, data in PADDED.items()
        for size in (270, 290, 3960, 3980, 3999)
    },
    "error-string": error(b'{"error":"TOKEN"}'),
    "error-list": error(b'{"error":["TOKEN"]}'),
    "error-key": error(b'{"error":{"TOKEN":{"TOKEN":1}}}'),
    "error-in-200": error(b'{"error":{"type":"TOKEN","message":"TOKEN"}}', "200 OK"),
    "bare-string": error(b'"TOKEN"'),
    "plain-text": error(b"token TOKEN is not known"),
    "json-cut": error(b'{"error":{"message":"TOKEN'),
    "twice": error(b'{"error":{"message":"TOKENTOKEN TOKEN,TOKEN"}}'),
    "reason-401": b"HTTP/1.1 401 TOKEN\r\nContent-Length: 0\r\n\r\n",
    "headers": b"HTTP/1.1 403 No\r\nX-Your: TOKEN\r\nTOKEN: x\r\nWWW-Authenticate: Bearer TOKEN\r\n"
    b"Set-Cookie: t=TOKEN\r\nServer: TOKEN\r\nRetry-After: TOKEN\r\n\r\n{}",
    "location-query": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/?token=TOKEN\r\n\r\n",
    "location-host": b"HTTP/1.1 307 Go\r\nLocation: https://TOKEN.example/\r\n\r\n",
    "location-userinfo": b"HTTP/1.1 308 Go\r\nLocation: http://x:TOKEN@example/\r\n\r\n",
    "location-no-url": b"HTTP/1.1 301 Go\r\nLocation: TOKEN\r\n\r\n",
    "html-401": error(HTML),
    "html-502": error(HTML, "502 No"),
    "html-200": error(HTML, "200 OK"),
    "content-type": b"HTTP/1.1 200 OK\r\nContent-Type: TOKEN\r\n\r\nnothing",
    "content-length": b"HTTP/1.1 200 OK\r\nContent-Length: TOKEN\r\n\r\n{}",
    "chunk-size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nTOKEN\r\n{}",
    "no-http": b"TOKEN\r\n\r\n",
    "no-status": b"HTTP/1.1 TOKEN\r\n\r\n",
    "version": b"HTTP/TOKEN 200 OK\r\n\r\n{}",
    "header-without-colon": b"HTTP/1.1 401 No\r\nTOKEN\r\n\r\n{}",
    "interim": b"HTTP/1.1 103 TOKEN\r\nLink: TOKEN\r\n\r\nHTTP/1.1 401 No\r\n\r\n{}",
    "200-bad-json": error(b'{"stdout":"TOKEN"', "200 OK"),
    "200-string": error(b'"TOKEN"', "200 OK"),
    "200-number": error(b'{"a":1e999,"TOKEN":NaN}', "200 OK"),
    "200-list": error(b'["TOKEN"]', "200 OK"),
    "200-cut": b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"stdout":"TOKEN',
}


class Failure(NamedTuple):
    """A server and what is asked of it."""

    id: str
    script: Script
    command: str = "run"
    timeout: float = 5.0


FAILURES = [
    *(Failure(f"echo-{name}", echo(data)) for name, data in ECHOES.items()),
    Failure("reset", reset()),
    Failure("closed", close()),
    Failure("ssh", raw(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")),
    Failure("html", html("200 OK", "Sign in")),
    Failure("status-401", answer(b"{}", "401 No"), "status"),
    Failure("runs-402", answer(b"{}", "402 Pay"), "runs"),
    Failure("delete-404", answer(b"{}", "404 Not Found"), "delete"),
    Failure("deadline", silent(), timeout=0.06),
]
every_failure = pytest.mark.parametrize("case", FAILURES, ids=[case.id for case in FAILURES])
VERBOSITIES: list[tuple[str, ...]] = [(), ("-q",), ("-v",), ("-vv",), ("--trace",)]


def config_directory(folder: Path) -> str:
    """A config directory with the token in it."""
    (folder / "auth").mkdir(parents=True)
    (folder / "auth" / "api-token").write_text(CANARY + "\n")
    return str(folder)


@every_failure
@pytest.mark.parametrize("thoroughly", [False, pytest.param(True, marks=second_tier)], ids=str)
def test_the_token_is_in_no_output(
    thoroughly: bool, case: Failure, cli: InProcess, folder: Path, tmp_path: Path
) -> None:
    environ = {"BUS_CONFIG_DIR": config_directory(tmp_path / "config")}
    options: list[tuple[str, ...]] = [("-vv", "--error-format", "text", "-f", "text")]
    options += [("-vv", "--error-format", "json", "-f", "json", "-o", "result")]
    if thoroughly:
        formats = itertools.cycle(["json", "text", "tsv"])
        options = [
            (*verbosity, "--error-format", error_format, "--format", next(formats))
            for verbosity, error_format in itertools.product(VERBOSITIES, ["text", "json"])
        ]
    with Hostile(case.script) as server:
        env = {**environ, "BUS_AI_API_URL": server.url}
        for each in options:
            result = cli(*each, "--timeout", f"{case.timeout}s", *words(case.command), env={**env})
            assert (result.code, result.out) == (failure_code(case.command), b"")
            assert "Traceback" not in result.message
            assert b"bus-containers: " in result.err or b'"kind"' in result.err
    assert server.requests
    assert all(CANARY.encode() in request for request in server.requests)
    assert not leaks(CANARY, *files_of(folder))


@second_tier
@pytest.mark.parametrize("error_format", ["text", "json"])
@pytest.mark.parametrize("verbosity", VERBOSITIES, ids=lambda each: "".join(each) or "plain")
def test_the_token_is_in_no_output_of_a_process(
    verbosity: tuple[str, ...], error_format: str, program: Program
) -> None:
    data = error(FIELDS, "401 TOKEN").replace(b"\r\n\r\n", b"\r\nX-Your: TOKEN\r\n\r\n")
    with Hostile(echo(data)) as server:
        result = program(*verbosity, "--error-format", error_format, *RUN, at=server)
    assert (result.code, result.out) == (125, b"")
    assert b"401 [redacted]" in result.err


def test_a_trace_shows_the_header_without_the_token(cli: InProcess, api: Api) -> None:
    result = cli("--trace", "status", at=api)
    assert result.code == 0
    assert "> Authorization: [redacted]" in result.message
    [head, _] = api.requests[0].split(b"\r\n\r\n")
    assert head.count(CANARY.encode()) == 1
    assert CANARY.encode() not in head.partition(b"\r\n")[0]


def test_a_message_is_told_around_what_is_redacted(cli: InProcess, api: Api) -> None:
    api.answers({"error": {"type": "t", "message": f"no {CANARY}, sorry"}}, status="403 Forbidden")
    where = f"POST {api.url}/api/v1/containers/runs"
    result = cli(*RUN, at=api)
    assert result.message == f"bus-containers: {where}: HTTP 403 t: no [redacted], sorry\n"


# --- exceptions -------------------------------------------------------------------------------


def everything_said_by(caught: BaseException) -> bytes:
    """All that an exception and those behind it tell whoever logs them."""
    said = [traceback.format_exception(type(caught), caught, caught.__traceback__)]
    said += [[str(one), repr(one), repr(one.args), repr(vars(one))] for one in chain(caught)]
    return "\n".join(itertools.chain(*said)).encode("utf-8", "backslashreplace")


def call(url: str, case: Failure) -> None:
    """What the command line does, as a call of the library."""
    client = bus_containers.Client(url, CANARY, timeout=case.timeout)
    calls: dict[str, Callable[[], object]] = {
        "run": lambda: client.run(["true"], timeout=case.timeout),
        "status": client.status,
        "runs": client.runs,
        "delete": lambda: client.delete("run-1"),
    }
    calls[case.command]()


@every_failure
def test_the_token_is_in_no_exception(case: Failure) -> None:
    with Hostile(case.script) as server, pytest.raises(bus_containers.BusContainersError) as caught:
        call(server.url, case)
    assert not leaks(CANARY, everything_said_by(caught.value))


def test_the_token_is_in_no_exception_of_a_refused_connection() -> None:
    with refused_port() as port, pytest.raises(bus_containers.TransportError) as caught:
        bus_containers.Client(f"http://127.0.0.1:{port}", CANARY).run(["true"])
    assert not leaks(CANARY, everything_said_by(caught.value))


def test_the_token_is_in_no_repr_of_a_client() -> None:
    environ = {"BUS_AI_TOKEN": CANARY, "BUS_AI_API_URL": NOWHERE}
    for one in (bus_containers.Client(NOWHERE, CANARY), bus_containers.Client.from_env(environ)):
        assert not leaks(CANARY, f"{one} {one!r} {[one]} {one.run!r}".encode())


def public_callables() -> Iterator[object]:
    for name in bus_containers.__all__:
        public = getattr(bus_containers, name)
        yield public
        if inspect.isclass(public):
            yield from (each for _, each in inspect.getmembers(public, inspect.isroutine))


def test_the_environment_is_in_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default of `os.environ` is printed whole by help(), pydoc and documentation tools."""
    monkeypatch.setenv("BUS_AI_TOKEN", CANARY)
    page = pydoc.render_doc(bus_containers, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
    assert "from_env" in page
    signatures = []
    for public in public_callables():
        try:
            signatures.append(f"{public} {inspect.signature(public)}")  # type: ignore[arg-type]
        except ValueError:  # a slot of C
            continue
    assert len(signatures) > 20
    for text in (page, *signatures):
        assert "environ(" not in text
        assert not leaks(CANARY, text.encode())


# --- what is the token itself -----------------------------------------------------------------

# An answer of a run, and how the line about it ends.
TOKEN_AS = {
    "run_id": ({"run_id": CANARY, "exit_code": 0}, "run [redacted]", 0),
    "exit_code": ({"run_id": "r", "exit_code": CANARY}, "[redacted]", 125),
    "both": ({"run_id": CANARY, "exit_code": f"x{CANARY}"}, "[redacted]", 125),
    "duration_ms": ({"run_id": "r", "exit_code": 0, "duration_ms": CANARY}, "[redacted]", 0),
    "list": ({"run_id": [CANARY], "exit_code": {CANARY: CANARY}}, "[redacted]", 125),
}


@pytest.mark.parametrize(("document", "says", "code"), TOKEN_AS.values(), ids=TOKEN_AS.keys())
@pytest.mark.parametrize("error_format", ["text", "json"])
def test_a_run_that_is_called_as_the_token(
    error_format: str, document: object, says: str, code: int, cli: InProcess, api: Api
) -> None:
    options = ("-f", "text", "--error-format", error_format)
    result = cli(*options, *RUN, at=api.answers(document))
    assert (result.code, result.out) == (code, b"")
    assert says in result.message


def test_the_token_as_a_word_of_the_command_line(cli: InProcess, api: Api) -> None:
    """No option takes a token; what a hurried user types may not come back in a log."""
    for args in (("--token", CANARY, "status"), (f"--token={CANARY}", "status")):
        check_failure(cli(*args, at=api), 2, "--token-file")
    assert api.requests == []
    api.answers({"error": {"type": "not_found"}}, status="404 Not Found")
    for options in ((), ("-vv",), ("--error-format", "json")):
        result = cli(*options, "delete", CANARY, at=api)
        assert (result.code, result.out) == (1, b"")
        assert "[redacted]" in result.message


def test_the_token_as_the_path_of_a_token_file(
    cli: InProcess, platform: Platform, tmp_path: Path
) -> None:
    """Promise 2.9."""
    tokens = [
        platform.token(),
        jwt({"sub": "me"}),
        CANARY,
        "Q29udGFpbmVyLWtleS1vZi1tYW55LWxldHRlcnM",
    ]
    tokens += [f"Bearer {CANARY}", f"{CANARY}\n", "a" * 20, "a" * 300]
    for token in tokens:
        for options in ((), ("-v",), ("--error-format", "json")):
            result = cli(*options, "--token-file", token, *RUN, cwd=tmp_path)
            assert (result.code, result.out) == (125, b"")
            assert "--token-file" in result.message
            assert "looks like a token, not a path" in result.message
            assert not leaks(token.strip(), result.err)
        with pytest.raises(bus_containers.ConfigError) as caught:
            bus_containers.resolve_token(token, {})
        said = b"\n".join(f"{one} {one.args}".encode() for one in chain(caught.value))
        assert not leaks(token.strip(), said)
    (tmp_path / CANARY).write_text(platform.token())  # a path, after all
    assert cli("--token-file", CANARY, "status", at=platform, cwd=tmp_path).code == 0
    for path in (
        "a" * 19,
        "auth/api-token",
        str(tmp_path / "a-name-of-many-letters-without-a-dot"),
    ):
        error = check_failure(cli("--token-file", path, *RUN, cwd=tmp_path), 125, path)
        assert "looks like a token" not in error


NUMBER = "12345678901"
TRAILING = "abcdefghij\\"


@pytest.mark.parametrize("token", [NUMBER, TRAILING])
def test_a_token_that_is_a_part_of_the_json_of_an_error(
    token: str, cli: InProcess, api: Api
) -> None:
    """What is redacted are texts. The JSON around them stays what it is."""
    api.answers(
        {"error": {"type": "forbidden", "message": f"no {token}", "account": int(NUMBER)}},
        status="403 Forbidden",
    )
    env = {"BUS_AI_TOKEN": token}
    assert "HTTP 403 forbidden: no [redacted]" in check_failure(cli(*RUN, at=api, env={**env}), 125)
    [told] = cli("--error-format", "json", *RUN, at=api, env={**env}).objects
    assert token not in told["text"]
    assert told["message"] == "no [redacted]"


@pytest.mark.parametrize(("token", "told"), [("t0ken-7", "t0ken-7"), ("t0ken-08", "[redacted]")])
def test_a_token_shorter_than_eight_is_a_part_of_any_word(
    token: str, told: str, cli: InProcess, api: Api
) -> None:
    api.answers({"error": {"message": f"no such {token}"}}, status="403 Forbidden")
    assert cli(*RUN, at=api, env={"BUS_AI_TOKEN": token}).error.endswith(f": no such {told}")


# --- a proxy's login --------------------------------------------------------------------------

USER = "us3rn4me-xy"
PASSWORDS = {
    "plain": "s3cr3t-C0NTENT",
    "at": "s3cr3t-C0@NTENT-of",
    "hash": "s3cr3t-C0#NTENT-of",
    "query": "s3cr3t-C0?NTENT-of",
    "slash": "s3cr3t-C0/NTENT-of",
    "backslash": "s3cr3t-C0\\NTENT-of",
    "colon": "s3cr3t-C0:NTENT-of",
    "percent": "s3cr3t-C0%zzNTENT",
    "bracket": "s3cr3t-C0[NTENT-of",
    "blank": "s3cr3t-C0 NTENT-of",
    "non-ascii": "s3cr3t-C0\u00e9NTENT",
    "nfkc": "s3cr3t-C0\u2100NTENT",
    "long": "s3cr3t-C0NTENT" * 400,
}
every_password = pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS.keys())


def check_no_login(said: bytes) -> None:
    for secret in (b"s3cr3t-C", b"NTENT", USER.encode()):
        assert secret not in said
    assert not leaks(f"{USER}:{PASSWORDS['plain']}", said)


@every_password
def test_the_login_of_a_proxy_is_in_no_output(password: str, cli: InProcess) -> None:
    with Hostile(answer(b"", "403 Forbidden")) as proxy:
        for place in (f"127.0.0.1:{proxy.port}", "127.0.0.1:no", "[127.0.0.1:9"):
            for scheme in ("http://", ""):
                value = f"{scheme}{USER}:{password}@{place}"
                env = {"BUS_AI_TOKEN": CANARY, "HTTP_PROXY": value}
                result = cli("-vv", "--api-url", "http://platform.test", *RUN, env={**env})
                assert result.code in (2, 125)
                assert result.spoken.errors
                check_no_login(result.err)
                try:
                    bus_containers.resolve_proxy("http://platform.test", env)
                except bus_containers.ConfigError as caught:
                    check_no_login("".join(str(one.args) for one in chain(caught)).encode())


@every_password
def test_the_password_of_an_api_url_is_in_no_output(password: str, cli: InProcess) -> None:
    result = cli("--api-url", f"http://{USER}:{password}@127.0.0.1:1", *RUN)
    check_no_login(check_failure(result, 2, "--api-url").encode())


def check_no_password(said: bytes) -> None:
    """The name of the user is no secret, but all of the rest is."""
    basic = base64.b64encode(f"{USER}:{PASSWORDS['plain']}".encode())
    for secret in (b"s3cr3t-C", b"NTENT", basic[16:24], basic[-12:-4]):
        assert secret not in said


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("form", ["header", "base64", "login", "password"])
def test_a_proxy_that_sends_its_login_back(form: str, scheme: str, cli: InProcess) -> None:
    """In the status line, in headers and in the message of an error, however it is written."""

    def script(connection: Connection) -> None:
        request = connection.read_request()
        value = re.search(rb"(?i)\r\nproxy-authorization: (\S+ (\S+))\r\n", request)
        assert value
        plain = base64.b64decode(value[2])
        forms = {"header": value[1], "base64": value[2], "login": plain, "password": plain[12:]}
        text = forms[form].decode()
        headers = (f"X-Echo: {text}", f'Proxy-Authenticate: Basic realm="{text}"')
        body = json.dumps({"error": {"type": text, "message": f"bad login {text}"}}).encode()
        connection.send(message(body, f"407 No {text}", *headers))

    with Hostile(script) as proxy:
        url = proxy.url.replace("//", f"//{USER}:{PASSWORDS['plain']}@")
        env = {"BUS_AI_TOKEN": CANARY, "HTTP_PROXY": url, "HTTPS_PROXY": url}
        for options in (("-vv",), ("-vv", "--error-format", "json")):
            result = cli(*options, "--api-url", f"{scheme}://platform.test", *RUN, env={**env})
            assert result.code == 125
            assert "[redacted]" in result.message
            check_no_password(result.err)
        environ = {**env, "BUS_AI_API_URL": f"{scheme}://platform.test"}
        with pytest.raises(bus_containers.BusContainersError) as caught:
            bus_containers.Client.from_env(environ).run(["true"])
    check_no_password(everything_said_by(caught.value))


# --- where others can read the token on its way -----------------------------------------------

PUBLIC = [
    "203.0.113.5", "8.8.8.8", "172.15.0.1", "172.32.0.1", "192.169.0.1", "11.0.0.1", "169.253.0.1",
    "100.64.0.1", "[2001:db8::1]", "[2600::1]", "[fec0::1]", "platform.example.com",
    "internal.example.com", "local.example.com", "10.1.2.3.example.com", "mylocal.example",
]  # fmt: skip
PRIVATE = [
    "platform", "10.1.2.3", "172.16.0.1", "172.31.255.254", "192.168.1.1", "169.254.1.1",
    "[fd00::1]", "[fc00::1]", "[fe80::1]", "platform.local", "platform.internal",
    "a.platform.test", "PLATFORM.TEST",
]  # fmt: skip


def test_a_token_over_plain_http_is_warned_of(cli: InProcess) -> None:
    """Once a call. Everything goes to a proxy on loopback, whatever the host is called."""
    env = {"BUS_AI_TOKEN": CANARY}
    with Hostile(answer(b'{"items":[]}')) as proxy:
        env["HTTP_PROXY"] = proxy.url
        for host in PUBLIC + PRIVATE:
            url = f"http://{host}"
            told = f"bus-containers: warning: the token goes to {url} unencrypted: use https\n"
            result = cli("--api-url", url, "status", env={**env})
            assert (result.code, result.message) == (0, told if host in PUBLIC else "")
        result = cli("-q", "--api-url", "http://203.0.113.5", "status", env={**env})
        assert (result.code, result.err) == (0, b"")
    unavailable = answer(b"{}", "503 Service Unavailable")
    with Hostile(unavailable, answer(b'{"items":[]}')) as proxy:
        env["HTTP_PROXY"] = proxy.url
        result = cli("--api-url", "http://203.0.113.5", "status", env={**env})
        assert (len(result.spoken.warnings), len(proxy.requests)) == (1, 2)
    with Hostile(answer(b"", "403 Forbidden")) as proxy:
        env["HTTPS_PROXY"] = proxy.url
        result = cli("--api-url", "https://203.0.113.5", "status", env={**env})
        assert result.spoken.warnings == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_no_warning_on_loopback(host: str, cli: InProcess, serve: Callable[..., Hostile]) -> None:
    server = serve(answer(b'{"items":[]}'), host="127.0.0.2" if host[-1] == "2" else "127.0.0.1")
    url = f"http://{host}:{server.port}"
    result = cli("--api-url", url, "status", env={"BUS_AI_TOKEN": CANARY})
    assert (result.code, result.err) == (0, b"")
