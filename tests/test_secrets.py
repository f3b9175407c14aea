# SPDX-License-Identifier: MIT
"""The token stays secret: a canary goes through every failure, at every verbosity, in every format.

It may turn up in no output, no file, no text, argument or repr of an exception or of what hangs
behind it, even where a server sends it back. What a token file holds is never printed at all.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import Program, Result
from hostile import (
    Connection,
    Hostile,
    Script,
    answer,
    chain,
    message,
    raw,
    refused_port,
    silent,
    spoken,
)
from test_network_faults import BROKEN, ODD

RUN = ("run", "--", "true")
WINDOW = 8
"""So many characters of a secret in a row are a leak; a piece of it is as bad as the whole."""


def leaks(secret: str, *texts: bytes) -> list[bytes]:
    """The pieces of the secret, plain or in base64, that turn up in the texts."""
    forms = [secret, *(base64.b64encode(f"{pad}{secret}".encode()).decode() for pad in ("", ":"))]
    pieces = {form[i : i + WINDOW] for form in forms for i in range(len(form) - WINDOW + 1)}
    text = b"\n".join(texts)
    return sorted(piece.encode() for piece in pieces if piece.encode() in text)


def files_of(*folders: Path) -> list[bytes]:
    return [path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()]


# --- servers that send the token back ---------------------------------------------------------


class Echo(NamedTuple):
    """Bytes of an answer in which TOKEN stands for the token that came with the request."""

    id: str
    data: bytes


def json_error(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\n\r\n%s" % (status.encode(), body)


FIELDS = (
    b'{"error":{"type":"TOKEN","message":"bad token TOKEN","action":"TOKEN",'
    b'"command":"curl -H \'Authorization: Bearer TOKEN\'","recommended_plan":"TOKEN",'
    b'"usage":{"feature":"TOKEN","window":"TOKEN","used":1,"limit":1},"TOKEN":"TOKEN"}}'
)
HTML = b"<html><head><title>Bearer TOKEN</title></head><body>TOKEN</body></html>"
ECHOES = [
    *(
        Echo(f"fields-{status}", json_error(f"{status} No", FIELDS))
        for status in (400, 401, 402, 403, 404, 500, 503)
    ),
    Echo("error-string", json_error("401 No", b'{"error":"TOKEN"}')),
    Echo("error-list", json_error("401 No", b'{"error":["TOKEN"]}')),
    Echo("error-key", json_error("401 No", b'{"error":{"TOKEN":{"TOKEN":1}}}')),
    Echo("bare-string", json_error("401 No", b'"TOKEN"')),
    Echo("plain-text", json_error("401 No", b"token TOKEN is not known")),
    Echo("json-cut", json_error("401 No", b'{"error":{"message":"TOKEN')),
    *(
        # a message that is cut short amid a token no longer holds the whole of it to look for
        Echo(f"at-{size}", json_error("401 No", b'{"error":{"message":"%sTOKEN"}}' % (b"x" * size)))
        for size in range(180, 320, 10)
    ),
    *(
        Echo(f"{name}-at-{size}", data.replace(b"PAD", b"x" * size))
        for size in range(230, 310, 20)
        for name, data in {
            "location": b"HTTP/1.1 302 Go\r\nLocation: http://x/PADTOKEN\r\n\r\n",
            "reason": b"HTTP/1.1 500 PADTOKEN\r\nContent-Length: 0\r\n\r\n",
            "no-http": b"PADTOKEN\r\n\r\n",
            "coding": b"HTTP/1.1 200 OK\r\nContent-Encoding: PADTOKEN\r\n\r\n{}",
        }.items()
    ),
    Echo("twice", json_error("401 No", b'{"error":{"message":"TOKENTOKEN TOKEN,TOKEN"}}')),
    Echo("reason", b"HTTP/1.1 401 TOKEN\r\nContent-Length: 0\r\n\r\n"),
    Echo("reason-500", b"HTTP/1.1 500 Bearer TOKEN\r\nContent-Length: 0\r\n\r\n"),
    Echo(
        "headers",
        b"HTTP/1.1 403 No\r\nX-Your: TOKEN\r\nTOKEN: x\r\nWWW-Authenticate: Bearer TOKEN\r\n"
        b"Set-Cookie: t=TOKEN\r\nServer: TOKEN\r\n\r\n{}",
    ),
    Echo("location", b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/?token=TOKEN\r\n\r\n"),
    Echo("location-host", b"HTTP/1.1 307 Go\r\nLocation: https://TOKEN.example/\r\n\r\n"),
    Echo("location-userinfo", b"HTTP/1.1 308 Go\r\nLocation: http://x:TOKEN@example/\r\n\r\n"),
    Echo("location-no-url", b"HTTP/1.1 301 Go\r\nLocation: TOKEN\r\n\r\n"),
    Echo("html-401", json_error("401 No", HTML).replace(b"application/json", b"text/html")),
    Echo("html-502", json_error("502 No", HTML).replace(b"application/json", b"text/html")),
    Echo("html-200", json_error("200 OK", HTML).replace(b"application/json", b"text/html")),
    Echo("content-type", b"HTTP/1.1 200 OK\r\nContent-Type: TOKEN\r\n\r\nnothing"),
    Echo("content-encoding", b"HTTP/1.1 200 OK\r\nContent-Encoding: TOKEN\r\n\r\n{}"),
    Echo("content-length", b"HTTP/1.1 200 OK\r\nContent-Length: TOKEN\r\n\r\n{}"),
    Echo("chunk-size", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nTOKEN\r\n{}"),
    Echo("transfer-encoding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: TOKEN\r\n\r\n{}"),
    Echo("no-http", b"TOKEN\r\n\r\n"),
    Echo("no-status", b"HTTP/1.1 TOKEN\r\n\r\n"),
    Echo("version", b"HTTP/TOKEN 200 OK\r\n\r\n{}"),
    Echo("header-without-colon", b"HTTP/1.1 401 No\r\nTOKEN\r\n\r\n{}"),
    Echo("interim", b"HTTP/1.1 103 TOKEN\r\nLink: TOKEN\r\n\r\nHTTP/1.1 401 No\r\n\r\n{}"),
    Echo("200-bad-json", json_error("200 OK", b'{"stdout":"TOKEN"')),
    Echo("200-string", json_error("200 OK", b'"TOKEN"')),
    Echo("200-number", json_error("200 OK", b'{"a":1e999,"TOKEN":NaN}')),
    Echo("200-list", json_error("200 OK", b'["TOKEN"]')),
    Echo("200-cut", b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"stdout":"TOKEN'),
]  # fmt: skip


def echo(data: bytes) -> Script:
    def script(connection: Connection) -> None:
        request = connection.read_request()
        token = request.partition(b"Authorization: Bearer ")[2].partition(b"\r\n")[0]
        assert token, request
        connection.send(data.replace(b"TOKEN", token))

    return script


# --- every failure ----------------------------------------------------------------------------


class Failure(NamedTuple):
    """A server and what is asked of it."""

    id: str
    script: Script
    args: tuple[str, ...] = RUN


FAILURES = [
    *(Failure(case.id, case.script) for case in BROKEN),
    *(Failure(f"odd-{case.id}", answer(case.body, "401 No")) for case in ODD),
    *(Failure(f"echo-{case.id}", echo(case.data)) for case in ECHOES),
    Failure("redirect", answer(b"", "302 Found", "Location: file:///etc/passwd")),
    Failure("delete-404", answer(b"{}", "404 Not Found"), ("delete", "run-1")),
    Failure("status-401", answer(b"{}", "401 No"), ("status",)),
    Failure("runs-402", answer(b"{}", "402 Pay"), ("runs",)),
    Failure("deadline", silent(), ("--timeout", "60ms", *RUN)),
    Failure("exit-code", answer(b'{"run_id":"r","exit_code":null,"stdout":"","stderr":""}')),
    Failure("success", answer(b'{"run_id":"r","exit_code":0,"stdout":"OK","stderr":""}')),
]
by_id = pytest.mark.parametrize("case", FAILURES, ids=[case.id for case in FAILURES])

# What the library takes for an answer: it leaves the exit code and unknown codings to others.
NO_ERROR = ("success", "exit-code", "echo-transfer-encoding")
VERBOSITIES: list[tuple[str, ...]] = [(), ("-q",), ("-v",), ("-vv",), ("--trace",)]
FORMATS = ["json", "text", "tsv"]
ERROR_FORMATS = ["text", "json"]


class Files(NamedTuple):
    """A config directory with the token in it, and a place for results."""

    config: Path
    results: Path


@pytest.fixture
def files(tmp_path: Path, canary: str) -> Files:
    config, results = tmp_path / "config", tmp_path / "results"
    (config / "auth").mkdir(parents=True)
    results.mkdir()
    (config / "auth" / "api-token").write_text(canary + "\n")
    return Files(config, results)


@by_id
def test_the_token_is_in_no_output_of_main(
    case: Failure,
    files: Files,
    canary: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import bus_containers

    monkeypatch.setenv("BUS_CONFIG_DIR", str(files.config))
    monkeypatch.chdir(files.results)
    formats = itertools.cycle(FORMATS)
    with Hostile(case.script) as server:
        for verbosity, error_format in itertools.product(VERBOSITIES, ERROR_FORMATS):
            args = [*verbosity, "--error-format", error_format, "--format", next(formats)]
            outputs = [[], ["--output", "result"]] if verbosity == ("-vv",) else [[]]
            for output in outputs:
                code = bus_containers.main(["--api-url", server.url, *args, *output, *case.args])
                out, err = capfd.readouterr()
                assert (code == 0) == (case.id == "success"), err
                assert "Traceback" not in err
                assert not leaks(canary, out.encode(), err.encode()), (args, out, err)
    assert all(canary.encode() in request for request in server.requests)
    assert not leaks(canary, *files_of(files.results))


@pytest.fixture(scope="module")
def cli(command: list[str], tmp_path_factory: pytest.TempPathFactory, canary: str) -> Program:
    program = Program(command, tmp_path_factory.mktemp("home"))
    program.environ["BUS_AI_TOKEN"] = canary
    return program


@pytest.mark.parametrize("error_format", ERROR_FORMATS)
@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("verbosity", VERBOSITIES, ids=lambda words: "".join(words) or "plain")
def test_the_token_is_in_no_output_of_a_process(
    verbosity: tuple[str, ...], output_format: str, error_format: str, cli: Program, canary: str
) -> None:
    data = json_error("401 TOKEN", FIELDS).replace(b"\r\n\r\n", b"\r\nX-Your: TOKEN\r\n\r\n")
    with Hostile(echo(data)) as server:
        args = [*verbosity, "--format", output_format, "--error-format", error_format]
        result = cli("--api-url", server.url, *args, *RUN)
    assert result.code == 125
    assert result.out == b""
    assert not leaks(canary, result.err), result.message
    if error_format == "json":
        for line in result.message.splitlines():
            assert isinstance(json.loads(line), dict)


def test_a_trace_shows_the_header_without_the_token(cli: Program, canary: str) -> None:
    with Hostile(answer(b'{"items":[]}')) as server:
        result = cli("--api-url", server.url, "--trace", "status")
    assert result.code == 0
    assert "authorization" in result.message.lower()
    assert not leaks(canary, result.out, result.err), result.message


# --- exceptions -------------------------------------------------------------------------------


def everything_said_by(error: BaseException) -> Iterator[str]:
    """All that an exception and those behind it tell whoever logs them."""
    for one in chain(error):
        yield str(one)
        yield repr(one)
        yield repr(one.args)
        yield repr(vars(one))
    yield "".join(traceback.format_exception(type(error), error, error.__traceback__))


def call(url: str, token: str, args: Sequence[str]) -> None:
    """What the command line does with these words, as a call of the library."""
    import bus_containers

    client = bus_containers.Client(url, token, timeout=0.5)
    methods: dict[str, Callable[[], object]] = {
        "run": lambda: client.run(["true"], timeout=0.06 if "--timeout" in args else 5),
        "status": client.status,
        "runs": client.runs,
        "delete": lambda: client.delete("run-1"),
    }
    methods[next(word for word in args if word in methods)]()


@pytest.mark.parametrize(
    "case",
    [case for case in FAILURES if case.id not in NO_ERROR],
    ids=lambda case: str(case.id),
)
def test_the_token_is_in_no_exception(case: Failure, canary: str) -> None:
    import bus_containers

    with Hostile(case.script) as server, pytest.raises(bus_containers.BusContainersError) as caught:
        call(server.url, canary, case.args)
    text = "\n".join(everything_said_by(caught.value))
    assert not leaks(canary, text.encode("utf-8", "backslashreplace")), text


def test_the_token_is_in_no_exception_of_a_refused_connection(canary: str) -> None:
    import bus_containers

    with refused_port() as port, pytest.raises(bus_containers.TransportError) as caught:
        call(f"http://127.0.0.1:{port}", canary, RUN)
    assert not leaks(canary, "\n".join(everything_said_by(caught.value)).encode())


def test_the_token_is_in_no_repr_of_a_client(canary: str) -> None:
    import bus_containers

    client = bus_containers.Client("http://127.0.0.1:1", canary)
    environ = {"BUS_AI_TOKEN": canary, "BUS_AI_API_URL": "http://127.0.0.1:1"}
    for one in (client, bus_containers.Client.from_env(environ)):
        assert not leaks(canary, f"{one} {one!r} {[one]} {one.run!r}".encode())


# --- tokens that cannot be used ---------------------------------------------------------------

SECRET = "s3cr3t-C0NTENT-0f-the-file"
BAD_TOKENS = {
    "line-break": f"{SECRET}\n{SECRET}",
    "carriage-return": f"{SECRET}\r\nX-Injected: {SECRET}",
    "blank-inside": f"Bearer {SECRET}",
    "tab": f"{SECRET}\t{SECRET}",
    "escape": f"{SECRET}\x1b[2J",
    "delete": f"{SECRET}\x7f",
    "latin-1": f"{SECRET}\xe9",
    "beyond-latin-1": f"{SECRET}\u20ac{SECRET}",
    "line-separator": f"{SECRET}\u2028{SECRET}",
}
BAD_FILES = {
    **{name: token.encode() for name, token in BAD_TOKENS.items()},
    "nul": f"{SECRET}\0{SECRET}".encode(),
    "not-utf-8": SECRET.encode() + b"\xff\xfe",
    "utf-16": SECRET.encode("utf-16"),
    "byte-order-mark": b"\xef\xbb\xbf" + SECRET.encode(),
    "too-large": SECRET.encode() * 4000,
    "json": json.dumps({"token": SECRET}, indent=1).encode(),
    "empty": b"",
    "blanks": b" \r\n\t\n",
}
STATUS_AND_RUN = pytest.mark.parametrize(
    ("args", "code"), [(("status",), 1), (RUN, 125)], ids=["status", "run"]
)


def refuses(result: Result, code: int, *names: str) -> None:
    """A clear line that names the source and not a byte of what it holds."""
    told = spoken(result.err)
    assert result.code == code, told.text
    assert result.out == b""
    assert told.errors
    for name in names:
        assert name in told.errors[-1]
    wide = result.err.replace(b"\\x00", b"").replace(b"\0", b"")
    assert not leaks(SECRET, result.err, wide), told.text


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_token_file_that_cannot_be_used(data: bytes, program: Program, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(data)
    with Hostile(answer(b"{}")) as server:
        url = ("--api-url", server.url, "-vv")
        refuses(program(*url, "--token-file", str(path), *RUN), 125, str(path))
        refuses(program(*url, "--token-file", "-", "status", input=data), 1, "standard input")
    assert server.connections == 0


VARIABLES = [
    (token, ("BUS_AI_TOKEN", "BUS_API_TOKEN")[number % 2])
    for number, token in enumerate(BAD_TOKENS.values())
]


@pytest.mark.parametrize(("token", "name"), VARIABLES, ids=BAD_TOKENS.keys())
def test_a_variable_that_cannot_be_used(token: str, name: str, program: Program) -> None:
    with Hostile(answer(b"{}")) as server:
        result = program("--api-url", server.url, "-vv", "status", env={name: token})
    refuses(result, 1, name)
    assert server.connections == 0


@pytest.mark.parametrize("token", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_a_token_that_the_library_refuses(token: str) -> None:
    import bus_containers

    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.Client("http://127.0.0.1:1", token)
    said = "\n".join(list(everything_said_by(caught.value))[:-1])
    assert not leaks(SECRET, said.encode()), said
    for one in chain(caught.value):
        assert SECRET not in repr(one.args)


@STATUS_AND_RUN
@pytest.mark.parametrize("place", ["missing", "directory", "loop", "below-a-file"])
def test_a_token_file_that_cannot_be_read(
    place: str, args: tuple[str, ...], code: int, program: Program, tmp_path: Path
) -> None:
    path = tmp_path / place
    if place == "directory":
        path.mkdir()
    elif place == "loop":
        path.symlink_to(path)
    elif place == "below-a-file":
        path.write_text(SECRET)
        path = path / "token"
    refuses(program("--token-file", str(path), *args), code, str(path))


def test_a_token_file_that_fails_amid_reading(program: Program) -> None:
    path = Path("/proc/self/mem")  # opens, and cannot be read at 0
    if not path.exists():
        pytest.skip("no /proc/self/mem")
    refuses(program("--token-file", str(path), "status"), 1, str(path))


def test_a_token_file_of_somebody_else(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(SECRET)
    path.chmod(0)
    command = program.command
    if os.access(path, os.R_OK):  # root: do without what lets it read everything
        if not shutil.which("setpriv"):
            pytest.skip("runs as root, and there is no setpriv")
        bounds = "--bounding-set=-dac_override,-dac_read_search"
        command = ["setpriv", bounds, *program.command]
    refuses(Program(command, program.home)("--token-file", str(path), "status"), 1, str(path))


# --- secrets in URLs --------------------------------------------------------------------------

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
}


@pytest.mark.parametrize("scheme", ["http://", ""], ids=["scheme", "bare"])
@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS.keys())
def test_the_password_of_a_proxy_is_in_no_output(
    password: str,
    scheme: str,
    canary: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import bus_containers

    monkeypatch.setenv("BUS_AI_TOKEN", canary)
    with Hostile(answer(b"", "403 Forbidden")) as proxy:
        value = f"{scheme}us3rn4me-xy:{password}@127.0.0.1:{proxy.port}"
        monkeypatch.setenv("HTTP_PROXY", value)
        assert bus_containers.main(["-vv", "--api-url", "http://platform.test", *RUN]) in (2, 125)
    said = capfd.readouterr().err
    try:
        bus_containers.resolve_proxy("http://platform.test", {"HTTP_PROXY": value})
    except bus_containers.ConfigError as error:
        said += "\n".join(list(everything_said_by(error))[:-1])
    assert "bus-containers: " in said
    for secret in ("s3cr3t-C", "NTENT", "us3rn4me-xy"):
        assert secret not in said


@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS.keys())
def test_the_password_of_an_api_url_is_in_no_output(
    password: str, capfd: pytest.CaptureFixture[str]
) -> None:
    import bus_containers

    url = f"http://us3rn4me-xy:{password}@127.0.0.1:1"
    assert bus_containers.main(["--api-url", url, *RUN]) == 2
    said = capfd.readouterr().err
    assert "bus-containers: " in said
    for secret in ("s3cr3t-C", "NTENT", "us3rn4me-xy"):
        assert secret not in said


NUMBER = "12345678901"
TRAILING = "abcdefghij\\"


@pytest.mark.parametrize("token", [NUMBER, TRAILING])
def test_a_token_that_is_a_part_of_the_json_of_an_error(program: Program, token: str) -> None:
    """What is redacted are texts. The JSON around them stays what it is."""
    document = {"error": {"type": "forbidden", "message": f"no {token}", "account": int(NUMBER)}}
    with Hostile(answer(json.dumps(document).encode(), "403 Forbidden")) as server:
        env: dict[str, str | None] = {"BUS_AI_TOKEN": token, "BUS_AI_API_URL": server.url}
        result = program(*RUN, env=env)
    assert result.code == 125
    assert "HTTP 403 forbidden: no [redacted]" in result.message
    assert token not in result.message


@pytest.mark.parametrize(
    "proxy",
    ["http://user:" + 40 * "pass-word-" + "@127.0.0.1:9", "http://us\u2100er:pass-word@127.0.0.1:9",
     "http://user:[pass-word@127.0.0.1:9", "http://user:pass-word@[127.0.0.1:9"],
    ids=["long", "nfkc", "bracket", "bad-host"],
)  # fmt: skip
def test_the_login_of_an_odd_proxy_is_in_no_output(
    program: Program, proxy: str, canary: str
) -> None:
    env: dict[str, str | None] = {"BUS_AI_TOKEN": canary, "HTTP_PROXY": proxy}
    result = program("-vv", "--api-url", "http://platform.test", *RUN, env=env)
    assert result.code in (2, 125)
    assert spoken(result.err).errors
    assert "pass-word" not in result.message


def test_the_token_is_not_sent_in_a_url(cli: Program, canary: str) -> None:
    with Hostile(raw(message(b'{"items":[]}'))) as server:
        assert cli("--api-url", server.url, "status").code == 0
    line, _, rest = server.requests[0].partition(b"\r\n")
    assert canary.encode() not in line
    assert rest.count(canary.encode()) == 1
