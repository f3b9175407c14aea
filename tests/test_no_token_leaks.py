# SPDX-License-Identifier: MIT
"""The token, and a proxy's login, stay secret: promises 2.8, 2.9 and 6.18.

A canary goes through every failure, in both formats of an error. It may turn up in no output, no
file, no text, argument or repr of an exception or of what hangs behind it, even where a server or a
proxy sends it back. Every `Result` was searched for it before a test sees the result.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import signal
import threading
import traceback
import urllib.parse
from contextlib import suppress
from pathlib import Path

import pytest

import bus_containers
from bus_containers import Client, DeadlineError
from hostile import (
    Api,
    Connection,
    Hostile,
    Script,
    answer,
    close,
    message,
    raw,
    reset,
    silent,
    steps,
    void,
)
from local_platform import Platform
from support import (
    CANARY,
    NOWHERE,
    Env,
    InProcess,
    chain,
    check_failure,
    files_of,
    jwt,
    leaks,
    words,
)

RUN = words("run")


def everything_said_by(caught: BaseException) -> bytes:
    """All that an exception and those behind it tell whoever logs them."""
    said = [traceback.format_exception(type(caught), caught, caught.__traceback__)]
    said += [[str(one), repr(one), repr(one.args), repr(vars(one))] for one in chain(caught)]
    return "\n".join(itertools.chain(*said)).encode("utf-8", "backslashreplace")


@pytest.mark.parametrize("is_interrupt", [False, True])
def test_a_traceback_with_the_values_of_variables(*, is_interrupt: bool) -> None:
    """As some tools log it: http.client has the head of a request in variables."""

    def interrupt(_: Connection) -> None:
        if is_interrupt:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    seconds = 30 if is_interrupt else 0.2
    script = steps(Connection.read_request, interrupt, Connection.hold)
    with Hostile(script) as server, pytest.raises((DeadlineError, KeyboardInterrupt)) as caught:
        Client(server.url, CANARY, timeout=seconds).status()
    trace = traceback.walk_tb(caught.value.__traceback__)
    frames = traceback.StackSummary.extract(trace, capture_locals=True)
    said = [frame.locals for frame in frames if frame.filename != __file__]
    assert said and CANARY not in repr(said)


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
    **{f"fields-{status}": error(FIELDS, f"{status} No") for status in (400, 401, 402, 500)},
    # a text that is cut short amid a token no longer holds the whole of it to look for
    **{
        f"{name}-at-{size}": data.replace(b"PAD", b"x" * size)
        for name, data in PADDED.items()
        for size in (290, 3960, 3980)
    },
    "error-string": error(b'{"error":"TOKEN"}'),
    "error-key": error(b'{"error":{"TOKEN":{"TOKEN":1}}}'),
    "error-in-200": error(b'{"error":{"type":"TOKEN","message":"TOKEN"}}', "200 OK"),
    "json-cut": error(b'{"error":{"message":"TOKEN'),
    "headers": b"HTTP/1.1 403 No\r\nX-Your: TOKEN\r\nTOKEN: x\r\nWWW-Authenticate: Bearer TOKEN\r\n"
    b"Set-Cookie: t=TOKEN\r\nServer: TOKEN\r\nRetry-After: TOKEN\r\n\r\n{}",
    "location-host": b"HTTP/1.1 307 Go\r\nLocation: https://TOKEN.example/\r\n\r\n",
    "html-200": error(HTML, "200 OK"),
    "content-type": b"HTTP/1.1 200 OK\r\nContent-Type: TOKEN\r\n\r\nnothing",
    "content-length": b"HTTP/1.1 200 OK\r\nContent-Length: TOKEN\r\n\r\n{}",
    "chunk-size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nTOKEN\r\n{}",
    "version": b"HTTP/TOKEN 200 OK\r\n\r\n{}",
    "header-without-colon": b"HTTP/1.1 401 No\r\nTOKEN\r\n\r\n{}",
    "interim": b"HTTP/1.1 103 TOKEN\r\nLink: TOKEN\r\n\r\nHTTP/1.1 401 No\r\n\r\n{}",
    "200-bad-json": error(b'{"stdout":"TOKEN"', "200 OK"),
    "200-string": error(b'"TOKEN"', "200 OK"),
    "200-number": error(b'{"a":1e999,"TOKEN":NaN}', "200 OK"),
    "200-cut": b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"stdout":"TOKEN',
}
FAILURES: dict[str, tuple[Script, float]] = {
    **{name: (echo(data), 5.0) for name, data in ECHOES.items()},
    "reset": (reset(), 5.0),
    "closed": (close(), 5.0),
    "deadline": (silent(), 0.06),
    "refused": (void, 0.06),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_token_is_in_no_output_and_no_exception(
    name: str, cli: InProcess, folder: Path, tmp_path: Path
) -> None:
    script, timeout = FAILURES[name]
    config = tmp_path / "config"
    (config / "auth").mkdir(parents=True)
    (config / "auth" / "api-token").write_text(f"{CANARY}\n")
    with Hostile(script, listening=name != "refused") as server:
        env: Env = {"BUS_CONFIG_DIR": str(config), "BUS_AI_API_URL": server.url}
        for form in (("text", "-f", "text"), ("json", "-f", "json", "-o", "result")):
            options = ("-vv", "--timeout", f"{timeout}s", "--error-format", *form)
            result = cli(*options, *RUN, env=env)
            assert (result.code, result.out) == (125, b"")
            assert b"bus-containers: " in result.err or b'"kind"' in result.err
        with pytest.raises(bus_containers.BusContainersError) as caught:
            bus_containers.Client(server.url, CANARY).run(["true"], timeout=timeout)
    assert not leaks(CANARY, everything_said_by(caught.value), *files_of(folder))
    assert all(CANARY.encode() in request for request in server.requests)
    assert len(server.requests) == 3 or name in ("deadline", "refused")


@pytest.mark.parametrize(
    "token", [CANARY, "12345678901", "abcdefghij\\", '"quoted-token"', "t0ken-08", "t0ken-7"]
)
def test_a_message_is_told_around_what_is_redacted(token: str, cli: InProcess, api: Api) -> None:
    """What is redacted are texts; the JSON around them stays what it is.

    A token shorter than eight characters is a part of any word.
    """
    told = "[redacted]" if len(token) >= 8 else token
    error = {"type": "t", "message": f"no {token}, sorry", "account": 12345678901}
    api.answers({"error": error}, status="403 Forbidden")
    where = f"POST {api.url}/api/v1/containers/runs"
    env: Env = {"BUS_AI_TOKEN": token}
    result = cli(*RUN, at=api, env=env)
    assert result.message == f"bus-containers: {where}: HTTP 403 t: no {told}, sorry\n"
    [found] = cli("--error-format", "json", *RUN, at=api, env=env).objects
    assert found["message"] == f"no {told}, sorry"
    assert (told == token) == (token in found["text"])


MARKED = "0paque/t0ken+with&marks=of<all>k1nds~-._"
FORMS = {
    "URL": urllib.parse.quote(MARKED, safe=""),
    "URL in lower case": urllib.parse.quote(MARKED, safe="").lower(),
    "path of a URL": urllib.parse.quote(MARKED),
    "JSON": MARKED.replace("/", "\\/"),
    "Go's JSON": re.sub("[&<>]", lambda mark: f"\\u{ord(mark[0]):04x}", MARKED),
    "HTML": html.escape(MARKED),
    "form": urllib.parse.quote(MARKED, safe="").replace("~", "%7E"),
    "HTML by numbers": re.sub(r"[\W_]", lambda mark: f"&#{ord(mark[0])};", MARKED),
    "JSON by numbers": re.sub(r"[\W_]", lambda mark: f"\\u{ord(mark[0]):04X}", MARKED),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_token_with_marks_that_is_sent_back_in_another_form(
    form: str, cli: InProcess, api: Api
) -> None:
    api.answers({"error": f"no {form}, sorry"}, status="403 Forbidden")
    result = cli("status", at=api, env={"BUS_AI_TOKEN": MARKED})
    assert "HTTP 403 Forbidden: no [redacted], sorry" in check_failure(result, 1)


def test_the_token_is_in_no_repr_of_a_client() -> None:
    environ = {"BUS_AI_TOKEN": CANARY, "BUS_AI_API_URL": NOWHERE}
    for one in (bus_containers.Client(NOWHERE, CANARY), bus_containers.Client.from_env(environ)):
        assert not leaks(CANARY, f"{one} {one!r} {[one]} {one.run!r}".encode())


# --- what is the token itself -----------------------------------------------------------------

# An answer of a run, and how the line about it ends.
TOKEN_AS = {
    "run_id": ({"run_id": CANARY, "exit_code": 0}, "run [redacted]", 0),
    "exit_code": ({"run_id": "r", "exit_code": CANARY}, "[redacted]", 125),
    "duration_ms": ({"run_id": "r", "exit_code": 0, "duration_ms": CANARY}, "[redacted]", 0),
    "list": ({"run_id": [CANARY], "exit_code": {CANARY: CANARY}}, "[redacted]", 125),
}


@pytest.mark.parametrize(("document", "says", "code"), TOKEN_AS.values(), ids=TOKEN_AS.keys())
def test_a_run_that_is_called_as_the_token(
    document: object, says: str, code: int, cli: InProcess, api: Api
) -> None:
    for error_format in ("text", "json"):
        options = ("-f", "text", "--error-format", error_format)
        result = cli(*options, *RUN, at=api.answers(document))
        assert (result.code, result.out) == (code, b"")
        assert says in result.message


def test_a_token_where_a_long_text_is_cut(cli: InProcess, api: Api) -> None:
    run_id = "x" * (bus_containers._MAX_QUOTED - 5) + CANARY
    result = cli("-f", "text", *RUN, at=api.answers({"run_id": run_id, "exit_code": 0}))
    assert "x[reda..." in result.message
    assert CANARY[:10] not in result.message


def test_tokens_in_more_text_than_is_looked_through(cli: InProcess, api: Api) -> None:
    """Where it is cut, a token would be; and what is redacted before that shortens it."""
    token = "t0ken" * 800
    api.answers({"error": f"{'x' * 99}{token * 300}"})
    result = cli("status", at=api, env={"BUS_AI_TOKEN": token})
    assert "the answer is an error: ..." in check_failure(result, 1)


def test_a_token_in_a_long_word_of_the_command_line(cli: InProcess) -> None:
    end = bus_containers._MAX_QUOTED
    for length in (0, 8, *range(end - len(CANARY) - 8, end + 8)):
        value = "x" * length + CANARY
        told = cli("--timeout", value, "status", env={"BUS_AI_TOKEN": CANARY}).error
        assert CANARY[:8] not in told


def test_what_is_large_where_a_number_belongs(cli: InProcess, api: Api) -> None:
    """It is not searched for secrets, which would take long, so none of it is shown."""
    api.answers({"run_id": "r", "exit_code": ["x" * 1_100_000]})
    assert cli(*RUN, at=api).error.endswith("ended with exit code ...")


def test_a_token_that_is_escaped_where_a_number_belongs(cli: InProcess, api: Api) -> None:
    api.answers({"run_id": "r", "exit_code": "s3cr3t\\/0fAnAccount"})
    told = cli(*RUN, at=api, env={"BUS_AI_TOKEN": "s3cr3t/0fAnAccount"}).error
    assert told.endswith('ended with exit code "[redacted]"')


@pytest.mark.parametrize("token", [f"{CANARY}+message/1", f"multipart/{CANARY}"])
def test_a_token_that_email_might_take_for_a_type(token: str, cli: InProcess) -> None:
    """It is redacted as it came, also in a header of several lines."""
    data = message(b"", "302 Found", f"Location:\r\n {token}", f"Retry-After:\r\n {token}")
    with Hostile(raw(data)) as server:
        result = cli(*RUN, at=server, env={"BUS_AI_TOKEN": token})
    told = check_failure(result, 125, "redirected to", "Retry-After: ")
    assert told.count("[redacted]") == 2
    assert "\\x7f" not in told


def test_a_token_that_begins_as_another_one_does(cli: InProcess) -> None:
    env: Env = {"BUS_AI_TOKEN": CANARY[:10], "BUS_API_TOKEN": CANARY}
    assert "'[redacted]'" in cli("--timeout", CANARY, "status", env=env).error


def test_a_token_in_quotes_that_is_sent_back_without(
    cli: InProcess, api: Api, folder: Path
) -> None:
    api.answers({"error": f"no {CANARY}, sorry"}, status="403 Forbidden")
    (folder / "token").write_text(f"'{CANARY}'")
    result = cli("--token-file", "token", "status", at=api)
    assert "403 Forbidden: no [redacted], sorry" in check_failure(result, 1)
    with pytest.raises(bus_containers.ApiError, match=r"no \[redacted\], sorry"):
        bus_containers.Client(api.url, f"'{CANARY}'").status()


def test_the_token_as_a_word_of_the_command_line(cli: InProcess, api: Api) -> None:
    """No option takes a token; what a hurried user types may not come back in a log."""
    for args in (("--token", CANARY, "status"), (f"--token={CANARY}", "status")):
        check_failure(cli(*args, at=api), 2, "--token-file")
    assert api.requests == []
    for args in (("status", CANARY), ("--api-url", CANARY, "runs"), ("-f", CANARY, "runs")):
        for value in (CANARY, f'"{CANARY}"', f"Bearer {CANARY}", f"{CANARY}\r", f"\t{CANARY}\f\n"):
            told = check_failure(cli(*args, env={"BUS_API_TOKEN": value}), 2)
            assert "[redacted]" in told
    api.answers({"error": {"type": "not_found"}}, status="404 Not Found")
    for options in (("-vv",), ("--error-format", "json")):
        result = cli(*options, "delete", CANARY, at=api)
        assert (result.code, result.out) == (1, b"")
        assert "[redacted]" in result.message


def test_the_token_as_the_path_of_a_token_file(
    cli: InProcess, platform: Platform, tmp_path: Path
) -> None:
    """Promise 2.9."""
    tokens = [platform.token(), jwt({"sub": "me"}), CANARY, f"Bearer {CANARY}", f"{CANARY}\n"]
    base64 = "K7gNU3sdo/OL0wNhqoVWhr3g6s1xYv72ol/pe+Unols="
    for token in [*tokens, base64, f"Bearer {base64}", "a" * 20, "a" * 300]:
        for options in (("-v",), ("--error-format", "json")):
            result = cli(*options, "--token-file", token, *RUN, cwd=tmp_path)
            assert (result.code, result.out) == (125, b"")
            assert "the value of --token-file looks like a token, not a path" in result.message
            assert not leaks(token.strip(), result.err)
        with pytest.raises(bus_containers.ConfigError) as caught:
            bus_containers.resolve_token(token, {})
        said = b"\n".join(f"{one} {one.args}".encode() for one in chain(caught.value))
        assert not leaks(token.strip(), said)
    (tmp_path / CANARY).write_text(platform.token())  # a path, after all
    assert cli("--token-file", CANARY, "status", at=platform, cwd=tmp_path).code == 0
    folder = str(tmp_path / "a-name-of-many-letters-without-a-dot")
    absolute = "/Secrets/Project7/ApiToken"
    for path in ("a" * 19, "auth/api-token", folder, "secrets/api-token-of-Project7", absolute):
        told = check_failure(cli("--token-file", path, *RUN, cwd=tmp_path), 125, path)
        assert "looks like a token" not in told


# --- a proxy's login --------------------------------------------------------------------------

USER = "us3rn4me-xy"
PLAIN = "s3cr3t-C0NTENT"
PASSWORDS = [
    PLAIN, PLAIN * 400, "s3cr3t-C0%zzNTENT", "s3cr3t-C0\u00e9NTENT", "s3cr3t-C0\u2100NTENT",
    *(f"s3cr3t-C0{character}NTENT-of" for character in "@#?/\\:[ "),
]  # fmt: skip


def check_no_login(said: bytes) -> None:
    for secret in (b"s3cr3t-C", b"NTENT", USER.encode()):
        assert secret not in said
    assert not leaks(f"{USER}:{PLAIN}", said)


@pytest.mark.parametrize("password", PASSWORDS, ids=lambda text: ascii(text)[:24])
def test_the_login_in_a_url_is_in_no_output(password: str, cli: InProcess) -> None:
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
    result = cli("--api-url", f"http://{USER}:{password}@127.0.0.1:1", *RUN)
    check_no_login(check_failure(result, 2, "--api-url").encode())


LOGINS = [f"{USER}:{PLAIN}", f"{USER}:s3cr3t-C0%C3%A9NTENT", f"{USER}:s3cr3t-C0%E9NTENT", PLAIN]


def check_no_password(said: bytes) -> None:
    """The name of the user may be a key, so it is a secret, too."""
    basic = base64.b64encode(f"{USER}:{PLAIN}".encode())
    assert base64.b64encode(PLAIN.encode())[:12] not in said
    for secret in (b"s3cr3t-C", b"NTENT", USER.encode(), basic[16:24], basic[-12:-4]):
        assert secret not in said


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("login", LOGINS)
def test_a_proxy_that_sends_its_login_back(scheme: str, login: str, cli: InProcess) -> None:
    """In the status line, in headers and in the message of an error, in every form."""

    def script(connection: Connection) -> None:
        request = connection.read_request()
        value = re.search(rb"(?i)\r\nproxy-authorization: (\S+ (\S+))\r\n", request)
        assert value
        plain = base64.b64decode(value[2])
        text = b" ".join((value[1], value[2], plain, plain.replace(b":", b" "))).decode("latin-1")
        headers = (f"X-Echo: {text}", f'Proxy-Authenticate: Basic realm="{text}"')
        told = f"bad login {text} {html.escape(text)} {text.encode('ascii', 'xmlcharrefreplace')!r}"
        body = json.dumps({"error": {"type": text, "message": told}}).encode()
        with suppress(UnicodeDecodeError):
            body = body.replace(b"bad login", f"bad login {plain.decode()}".encode())
        connection.send(message(body, f"407 No {text}", *headers))

    with Hostile(script) as proxy:
        url = proxy.url.replace("//", f"//{login}@")
        environ = {"BUS_AI_TOKEN": CANARY, "HTTP_PROXY": url, "HTTPS_PROXY": url}
        environ["BUS_AI_API_URL"] = f"{scheme}://platform.test"
        for options in (("-vv",), ("-vv", "--error-format", "json")):
            result = cli(*options, *RUN, env={**environ})
            assert result.code == 125
            assert "[redacted]" in result.message
            check_no_password(result.err)
        with pytest.raises(bus_containers.BusContainersError) as caught:
            bus_containers.Client.from_env(environ).run(["true"])
    check_no_password(everything_said_by(caught.value))


@pytest.mark.parametrize("field", ["run_id", "exit_code", "duration_ms"])
def test_a_proxy_that_answers_with_its_login(field: str, cli: InProcess) -> None:
    """In place of the API, as a fact of a run. The result is passed on as it came."""

    def script(connection: Connection) -> None:
        request = connection.read_request()
        value = re.search(rb"(?i)\r\nproxy-authorization: \S+ (\S+)\r\n", request)
        assert value
        document = {"run_id": "r", "exit_code": 0, "duration_ms": 1}
        text = f"{value[1].decode()} {base64.b64decode(value[1]).decode()}"
        connection.send(message(json.dumps({**document, field: text}).encode()))

    with Hostile(script) as proxy:
        url = proxy.url.replace("//", f"//{LOGINS[0]}@")
        env: Env = {"BUS_AI_TOKEN": CANARY, "HTTP_PROXY": url}
        for options in (("-ftext",), ("-ftext", "--error-format", "json")):
            result = cli("--api-url", "http://platform.test", *options, *RUN, env=env)
            assert "[redacted]" in result.message
            check_no_password(result.err)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_login_with_a_short_password_that_is_sent_back(scheme: str, cli: InProcess) -> None:
    """Such a password alone may be a part of any word, but the login as a whole is not."""
    with Hostile(answer(b"{}", "407 no agent:pw~12 here")) as proxy:
        url = proxy.url.replace("//", "//agent:pw%7E12@")
        env: Env = {"BUS_AI_TOKEN": CANARY, "HTTP_PROXY": url, "HTTPS_PROXY": url}
        result = cli("--api-url", f"{scheme}://platform.test", *RUN, env=env)
    assert "407 no [redacted] here" in result.message


# --- where others can read the token on its way -----------------------------------------------

PUBLIC = [
    "203.0.113.5", "8.8.8.8", "172.15.0.1", "172.32.0.1", "192.169.0.1", "11.0.0.1", "169.253.0.1",
    "100.64.0.1", "[2001:db8::1]", "[fec0::1]", "internal.example.com", "10.1.2.3.example.com",
    "mylocal.example",
]  # fmt: skip
PRIVATE = [
    "platform", "10.1.2.3", "172.16.0.1", "172.31.255.254", "192.168.1.1", "169.254.1.1",
    "[fd00::1]", "[fc00::1]", "[fe80::1]", "platform.local", "platform.internal",
    "a.platform.test", "PLATFORM.TEST",
]  # fmt: skip


def test_a_token_over_plain_http_is_warned_of(cli: InProcess) -> None:
    """Once a call. Everything goes to a proxy on loopback, whatever the host is called."""

    def warnings(url: str, *options: str) -> list[str]:
        env: Env = {"BUS_AI_TOKEN": CANARY, "HTTP_PROXY": proxy.url, "HTTPS_PROXY": proxy.url}
        return cli(*options, "--api-url", url, "status", env=env).message.splitlines()

    with Hostile(answer(b'{"items":[]}')) as proxy:
        for host in PUBLIC + PRIVATE:
            url = f"http://{host}"
            told = f"bus-containers: warning: the token goes to {url} unencrypted: use https"
            assert warnings(url) == ([told] if host in PUBLIC else [])
        assert warnings("http://203.0.113.5", "-q") == []
        assert len(proxy.requests) == len(PUBLIC + PRIVATE) + 1
    with Hostile(answer(b"{}", "503 No"), answer(b'{"items":[]}')) as proxy:
        assert (len(warnings("http://203.0.113.5")), len(proxy.requests)) == (1, 2)
    with Hostile(answer(b"", "403 Forbidden")) as proxy:
        assert "warning" not in "".join(warnings("https://203.0.113.5"))
    for host, listens_at in (("127.1", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")):
        with Hostile(answer(b'{"items":[]}'), host=listens_at) as proxy:  # which is none here
            assert warnings(f"http://{host}:{proxy.port}") == []
            assert proxy.requests[0].startswith(b"GET /api/")
