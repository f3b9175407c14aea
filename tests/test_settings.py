# SPDX-License-Identifier: MIT
"""API URL, token, config directory, durations: promises 2.1 to 2.3, 2.8, 2.9, 3.24, 4.3, 4.5.

Tables of what is accepted and what is refused.
"""

from __future__ import annotations

import io
import os
import re
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import bus_containers
from hostile import Api, Hostile, Script, html, message, raw
from support import (
    CANARY,
    LIMIT,
    NOWHERE,
    URL_VARIABLES,
    Env,
    InProcess,
    Program,
    chain,
    check_failure,
    failure_code,
    jwt,
    leaks,
    words,
)

DEFAULT_URL = "https://ai.hg.fi"
NEW_TOKEN = 'bus auth token --scope "container:read container:run container:delete billing:read"'

# --- the API's URL ----------------------------------------------------------------------------

FLAG, FIRST, SECOND = "http://flag.test", "http://first.test", "http://second.test"
BOTH = {"BUS_AI_API_URL": FIRST, "BUS_API_BASE_URL": SECOND}
SOURCES = ("--api-url", *URL_VARIABLES)
# The value of --api-url, the variables, and what is resolved.
ORDER: list[tuple[str | None, dict[str, str], tuple[str, str]]] = [
    (FLAG, BOTH, (FLAG, "--api-url")),
    (FLAG, dict.fromkeys(BOTH, "no url"), (FLAG, "--api-url")),  # the others are not looked at
    (None, BOTH, (FIRST, "BUS_AI_API_URL")),
    (None, {**BOTH, "BUS_AI_API_URL": ""}, (SECOND, "BUS_API_BASE_URL")),
    (None, dict.fromkeys(BOTH, ""), (DEFAULT_URL, "default")),
    (None, {"API_URL": FIRST}, (DEFAULT_URL, "default")),
]


@pytest.mark.parametrize(("flag", "environ", "resolved"), ORDER)
def test_order_of_the_api_url(
    flag: str | None, environ: dict[str, str], resolved: tuple[str, str]
) -> None:
    assert bus_containers.resolve_api_url(flag, environ) == resolved


# What is left as it is, and what is not.
GOOD_URLS = {
    **{url: url for url in [
        "http://127.0.0.1:8080", "https://platform", "https://api.example.com.", "http://host:1",
        "http://host:65535", "http://host/api/v1", "http://host/api/v1/containersx",
        "http://host/with%20blank", "http://host/a-b_c.d~e!$&'()*+,;=:@", "http://[::ffff:1.2.3.4]",
        f"http://{63 * 'a'}.test",
    ]},
    "http://127.0.0.1:8080///": "http://127.0.0.1:8080",
    "http://127.0.0.1:8080/CAP/v1//": "http://127.0.0.1:8080/CAP/v1",
    "http://[2001:db8::1]:8080/a/b/": "http://[2001:db8::1]:8080/a/b",
    "HTTPS://ai.hg.fi/": "https://ai.hg.fi",
}  # fmt: skip


@pytest.mark.parametrize(("url", "base"), GOOD_URLS.items(), ids=GOOD_URLS.keys())
def test_an_api_url_that_can_be_used(url: str, base: str) -> None:
    assert bus_containers.resolve_api_url(url, {})[0] == base
    assert bus_containers.resolve_api_url(None, {"BUS_AI_API_URL": url})[0] == base
    assert bus_containers.Client(url, "t0ken").api_url == base


# What is refused, and the hint at the end of the message.
FORM = "http[s]://HOST[:PORT][/PREFIX], in ASCII, without user, query or fragment"
ORIGIN = ": give the API's origin, without /api/v1/containers"
BAD_URLS = {
    "ai.hg.fi": ": write https://ai.hg.fi, or http://ai.hg.fi for plain HTTP",
    "me:p4ssw0rd@h:80": ": write https://***@h:80, or http://***@h:80 for plain HTTP",
    "/api": ": write https:///api, or http:///api for plain HTTP",
    "http:/host": " for plain HTTP", "  ": " for plain HTTP", "": " for plain HTTP",
    **dict.fromkeys([
        "https://ai.hg.fi/api/v1/containers", "https://ai.hg.fi/api/v1/containers/",
        "https://ai.hg.fi/CAP/api/v1/containers/runs",
    ], ORIGIN),
    **dict.fromkeys([
        # another scheme; user, query, fragment
        "ftp://host", "file:///etc/passwd", "httpss://host", "http://me@host", "http://@host",
        "http://me:p4ssw0rd@host", "http://host/?x=p4ssw0rd", "http://host/?",
        "http://host/#p4ssw0rd", "http://host#",
        # blanks, line breaks and other characters
        "http://ho st", " http://host", "http://host ", "http://host\nx", "http://host\n",
        "http://ho\tst", "http://host/\r\nX-Injected: 1", "http://host/\0", "http://host/\x1b[2J",
        "http://host/\x7f", "http://host\\x", "http://h\u00f6st",
        # ports
        "http://host:0", "http://host:65536", "http://host:99999999999999999999", "http://host:-1",
        "http://host:http", "http://host:80:80",
        # hosts
        "http://[::1", "http://[host]", "http://[1.2.3.4]", "http://[:]", "http://a..b",
        f"http://{64 * 'a'}.test", "http://", "http://:8080", "http:///path",
    ], ""),
}  # fmt: skip


@pytest.mark.parametrize(("url", "hint"), BAD_URLS.items(), ids=map(ascii, BAD_URLS))
def test_an_api_url_that_cannot_be_used(url: str, hint: str, cli: InProcess) -> None:
    for source in SOURCES if url else SOURCES[:1]:  # an empty option is not unset
        flag, environ = (url, {}) if source == "--api-url" else (None, {source: url})
        with pytest.raises(bus_containers.ConfigError) as caught:
            bus_containers.resolve_api_url(flag, environ)
        told = str(caught.value)
        assert told.startswith(f"{source}: '")
        assert told.endswith(hint or f"' is not {FORM}")
        assert FORM in told
        assert "p4ssw0rd" not in told
        assert (told.isprintable(), caught.value.run_state) == (True, "not_sent")
    line = check_failure(cli("--api-url", url, *words("run")), 2, "--api-url", FORM, "run --help")
    assert "p4ssw0rd" not in line


def test_a_run_id_is_one_segment_below_the_prefix(api: Api) -> None:
    every = "aZ09-._~/\\?#%&=+;:@!$'()*,[]{}|^`\"<> %2F..\u00e4\u20ac"
    ids = ["run_1", "a/b", "../status", "..%2f", "%2e%2e", "a?b", "a#b", "a b", "*", every]
    for run_id in ids:
        for prefix in ("", "/a-b_c.d~e!$&'()*+,;=:@%41"):
            client = bus_containers.Client(f"{api.url}{prefix}/", "t0ken")
            assert client.delete(run_id)["run_id"] == run_id
            path = api.requests.pop().split(b" ", 2)[1].decode("ascii")
            base, _, segment = path.rpartition("/")
            assert base == f"{urlsplit(api.url).path}{prefix}/api/v1/containers/runs"
            assert unquote(segment, errors="strict") == run_id
            assert not set(segment) & set('/?#\\ "<>')


# What a wrong URL leads to, and what the advice says of it. Only a redirect and a URL that holds a
# part of the API's path name the source of the URL for sure.
ALREADY = "ends in a part of the API's path: give its origin alone"
WRONG: dict[str, tuple[Script, str, str]] = {
    "redirect": (raw(message(b"", "301 M", "Location: https://x.test/")), "", "https://x.test/"),
    "path": (html("404 Not Found", "404 Not Found"), "/CAP/api/v1/", ALREADY),
    "404": (html("404 Not Found", "404 Not Found"), "", ""),
    "page": (html("200 OK", "Sign in"), "", ""),
    "tls-port": (raw(b"\x15\x03\x01\x00\x02\x02\x46"), "", ""),
}


@pytest.mark.parametrize(("script", "prefix", "says"), WRONG.values(), ids=WRONG.keys())
def test_advice_names_the_source_of_the_url(
    script: Script, prefix: str, says: str, cli: InProcess
) -> None:
    """Promise 3.24: and no option or variable that was not given."""
    with Hostile(script) as server:
        for source in SOURCES:
            for command in ("run", "runs"):
                url = f"{server.url}{prefix}"
                options = ["--api-url", url] if source == "--api-url" else []
                env: Env = {"BUS_AI_TOKEN": CANARY}
                env.update({} if options else {source: url})
                result = cli(*options, *words(command), env=env)
                error = check_failure(result, failure_code(command), says)
                named = [name for name in SOURCES if name in error]
                assert named == [source] if says else set(named) <= {source}
                assert (ALREADY in error) == bool(prefix)


# --- the token --------------------------------------------------------------------------------


def token_file(folder: Path, text: str = "from-file") -> Path:
    path = folder / "auth" / "api-token"
    path.parent.mkdir(parents=True)
    path.write_text(f"{text}\n")
    return path


BELOW = {"BUS_CONFIG_DIR": "", "XDG_CONFIG_HOME": "/bus", "HOME": "/.config/bus"}


@pytest.mark.parametrize("off", ["unset", "empty"])
def test_order_of_the_token(off: str, tmp_path: Path) -> None:
    option = tmp_path / "option"
    option.write_text("from-option\n")
    environ = {"BUS_AI_TOKEN": "from-BUS_AI_TOKEN", "BUS_API_TOKEN": "from-BUS_API_TOKEN"}
    for name, below in BELOW.items():
        environ[name] = str(tmp_path / name)
        token_file(Path(f"{tmp_path / name}{below}"), f"from-{name}")
    got = bus_containers.resolve_token(str(option), environ)
    assert got == ("from-option", str(option))
    configured = {name: environ[name] for name in BELOW}
    for name in list(environ):
        token, source = bus_containers.resolve_token(None, environ)
        assert token == f"from-{name}"
        assert source == name or source.endswith(f"/{name}{BELOW.get(name)}/auth/api-token")
        environ[name] = ""
        if off == "unset":
            del environ[name]
    with pytest.raises(bus_containers.ConfigError, match=re.escape(NEW_TOKEN)):
        bus_containers.resolve_token(None, environ)
    # A config directory without a token hides the next.
    (tmp_path / "BUS_CONFIG_DIR/auth/api-token").unlink()
    with pytest.raises(bus_containers.ConfigError, match="/BUS_CONFIG_DIR/auth/api-token"):
        bus_containers.resolve_token(None, configured)


@pytest.mark.parametrize("command", ["status", "run"])
def test_no_token_anywhere(command: str, cli: InProcess, api: Api) -> None:
    """Promises 2.2 and 4.5: every place is named, in order; a later call finds no token either."""
    looked = "looked at --token-file, BUS_AI_TOKEN, BUS_API_TOKEN"
    path = str(cli.home / ".config/bus/auth/api-token")
    for home, more in ((str(cli.home), f", {path}"), (None, "; HOME is not set")):
        env = {"BUS_AI_API_URL": api.url, "HOME": home}
        [told] = cli("--error-format", "json", *words(command), env=env).objects
        assert (told["kind"], told["retryable"]) == ("config", False)
        assert told["text"] == f"no token: {looked}{more}; make one with: {NEW_TOKEN}"
        assert cli(*words(command), env=env).code == failure_code(command)
    assert api.requests == []


# Paths from which no token can be read: how the message starts and goes on, and how they are made.
NONE_THERE, NONE_IN = " does not exist; make one with: ", " is empty; make one with: "
UNUSABLE: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "missing": ("no token: ", NONE_THERE, lambda path: None),
    "dangling": ("no token: ", NONE_THERE, lambda path: path.symlink_to("nowhere")),
    "empty": ("no token: ", NONE_IN, lambda path: path.touch()),
    "blank": ("no token: ", NONE_IN, lambda path: path.write_text(" \t\r\n")),
    "directory": ("cannot read a token from ", ": Is a directory", lambda path: path.mkdir()),
    "loop": ("cannot read a token from ", ": Too many levels", lambda path: path.symlink_to(path)),
    "secret/below-a-file":
        ("cannot read a token from ", ": Not a dir", lambda path: path.parent.write_text(CANARY)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_token_file_that_cannot_be_used(name: str, cli: InProcess, tmp_path: Path) -> None:
    path, (start, more, make) = tmp_path / name, UNUSABLE[name]
    make(path)
    check_failure(cli("--token-file", str(path), *words("run")), 125, f"{start}{path}{more}")
    config = token_file(tmp_path / "config")
    config.unlink()
    config.symlink_to(path)
    for given, environ in ((str(path), {}), (None, {"BUS_CONFIG_DIR": str(tmp_path / "config")})):
        with pytest.raises(bus_containers.ConfigError) as caught:
            bus_containers.resolve_token(given, environ)
        assert (given or str(config)) in str(caught.value)
        assert caught.value.retryable is False
        assert CANARY not in "".join(repr(each.args) for each in chain(caught.value))


def test_other_token_files_that_cannot_be_read(cli: InProcess) -> None:
    check_failure(cli("--token-file", "", "status"), 2, "--token-file")
    for path in ("nul\0", "/proc/self/mem"):  # the latter opens, and cannot be read at 0
        check_failure(cli("--token-file", path, "status"), 1, path.rstrip("\0"), "token")


VISIBLE = "".join(map(chr, range(0x21, 0x7F)))


def test_a_token_that_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "token"
    for content in (VISIBLE, "x" * 65_536, " \r\n\tt0ken \r\n\r\n\v\f"):
        path.write_bytes(content.encode())
        token = content.strip()
        assert bus_containers.resolve_token(str(path), {}) == (token, str(path))
        environ = {"BUS_API_TOKEN": content}
        assert bus_containers.resolve_token(None, environ) == (token, "BUS_API_TOKEN")


# What is not a token, and what is said about it.
SECRET = CANARY.encode()
BAD_TOKENS = {
    "starts with `Bearer`: leave that word out":
        [b"Bearer " + SECRET, b"bearer %s\n" % SECRET, b"Authorization: Bearer " + SECRET],
    "has more than one line": [
        SECRET + b"\n" + SECRET, SECRET + b"\r" + SECRET, SECRET + b"\r\nX-Injected: " + SECRET,
    ],
    "is UTF-16: save it as plain ASCII": [
        CANARY.encode("utf-16"), b"\xfe\xff" + CANARY.encode("utf-16-be"), SECRET + b"\0",
    ],
    "starts with a byte-order mark: save it without": [b"\xef\xbb\xbf" + SECRET],
    "holds a character that is not visible ASCII": [
        SECRET + more for more in (
            b" " + SECRET, b"\t" + SECRET, b"\x1b[2J", b"\x7f", b"\x85", b"\xa0", b"\xe4",
            "\u2028x".encode(), "\u20ac".encode(),
        )
    ],
    "is larger than 64 KiB": [(SECRET * 2_000)[:65_537]],
}  # fmt: skip


@pytest.mark.parametrize("says", BAD_TOKENS)
def test_a_token_that_is_not_one(says: str, cli: InProcess, tmp_path: Path) -> None:
    """Promise 2.9: it is told as what it is, wherever it comes from, without a piece of it."""
    path = token_file(tmp_path)
    for content in BAD_TOKENS[says]:
        path.write_bytes(content)
        text = content.decode("utf-8", "surrogateescape")  # as the environment holds it
        cases = [(str(path), "BUS_CONFIG_DIR", str(tmp_path))]
        if "larger" not in says:  # there is no limit to a variable
            cases += [(name, name, text) for name in ("BUS_AI_TOKEN", "BUS_API_TOKEN")]
        for source, variable, value in cases:
            with pytest.raises(bus_containers.ConfigError) as caught:
                bus_containers.resolve_token(None, {variable: value})
            assert str(caught.value) == f"the token in {source} {says}"
            held = "".join(repr(each.args) for each in chain(caught.value))
            assert not leaks(CANARY, held.replace("\\x00", "").encode())
        for name, source in ((str(path), str(path)), ("-", "standard input")):
            result = cli("-vv", "--token-file", name, *words("run"), input=content)
            assert (result.code, result.out) == (125, b"")
            assert result.spoken.errors[-1].endswith(f": the token in {source} {says}")
            assert not leaks(CANARY, result.err.replace(b"\\x00", b""))


def test_a_token_from_standard_input(cli: InProcess, api: Api) -> None:
    env: Env = {"BUS_AI_TOKEN": None}
    assert cli("--token-file", "-", "status", at=api, env=env, input=b" t0ken\n").code == 0
    assert b"\r\nAuthorization: Bearer t0ken\r\n" in api.requests[0]
    error = check_failure(cli("--token-file", "-", "status", input=b""), 1)
    assert error.endswith(f": no token: standard input is empty; make one with: {NEW_TOKEN}")


def test_a_token_from_a_standard_input_that_does_not_wait(program: Program, api: Api) -> None:
    """Another process has made it non-blocking. Half a token would be sent as a whole one."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.write(writer, b"t0")
    env: Env = {"BUS_AI_TOKEN": None}
    process = program.start("--token-file", "-", "status", at=api, env=env, stdin=reader)
    end = time.monotonic() + LIMIT
    while select.select([reader], [], [], 0)[0]:
        assert time.monotonic() < end
        time.sleep(0.001)
    os.write(writer, b"ken")
    os.close(writer)
    os.close(reader)
    _, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (0, b"")
    assert b"\r\nAuthorization: Bearer t0ken\r\n" in api.requests[0]


def test_403_for_want_of_a_scope(cli: InProcess, api: Api) -> None:
    """Promise 3.24: however the server says it, it is explained as a 401 is."""
    env: Env = {"BUS_AI_TOKEN": jwt({"scope": "container:read"})}
    for error in ({"type": "insufficient_scope"}, "insufficient scope"):
        api.answers({"error": error}, status="403 Forbidden")
        lacks = "lacks the scope container:run (it has: container:read)"
        check_failure(cli(*words("run"), at=api, env=env), 125, "403", NEW_TOKEN, lacks)


# --- durations --------------------------------------------------------------------------------

MICRO, MU = "\u00b5s", "\u03bcs"
US, MS, S, M, H = 10**3, 10**6, 10**9, 60 * 10**9, 3600 * 10**9
NS = {"ns": 1, "us": US, MICRO: US, MU: US, "ms": MS, "s": S, "m": M, "h": H}
MOST = 2**63 - 1

# Those of Go's own tests, and more, with their nanoseconds.
DURATIONS = {
    "0": 0, "+0": 0, "-0": 0, "0s": 0, "0m": 0, "5s": 5 * S, "1478s": 1478 * S, "-5s": -5 * S,
    "+5s": 5 * S, "5.6s": 5600 * MS, "5.s": 5 * S, ".5s": 500 * MS, "1.0s": S, "1.004s": 1004 * MS,
    "1.0040s": 1004 * MS, "100.00100s": 100_001 * MS, "10ns": 10, "11us": 11_000,
    f"12{MICRO}": 12_000, f"12{MU}": 12_000, "13ms": 13 * MS, "14s": 14 * S, "15m": 15 * M,
    "16h": 16 * H, "3h30m": 210 * M, "1.5h": 90 * M, "10.5s4m": 250_500 * MS,
    "-2m3.4s": -123_400 * MS, "1h2m3s4ms5us6ns": 3_723_004_005_006,
    "39h9m14.425s": 140_954_425 * MS, "52763797000ns": 52_763_797_000,
    "0.3333333333333333333h": 20 * M,
    "0.100000000000000000000h": 6 * M, "0.830103483285477580700h": 2_988_372_539_827,
    "1s1s1s": 3 * S, "1ns1h": H + 1, "007s": 7 * S, "00000000000000000000001s": S,
    "0.000000000000000000001s": 0, "9007199254740993ns": 9_007_199_254_740_993,
    "9223372036854775807ns": MOST, "9223372036854775.807us": MOST,
    "0.9999999999ns": 0, "2562047h47m16.854775807s": MOST, "9223372036s854ms775us807ns": MOST,
    "-9223372036854775807ns": -MOST,
    "-9223372036854775808ns": -MOST - 1, "-9223372036854775.808us": -MOST - 1,
}  # fmt: skip
# What is not one, by how the message about it goes on.
NO_UNIT, NONE, LONG = (
    "has no unit: try `",
    "is not a duration: try `30s` or `1h30m`",
    "is longer than the 292 years of a duration",
)
NO_DURATIONS = {
    **dict.fromkeys(["3", "30", "00", "0.0", "-7", "1h30", "1\u00b5"], NO_UNIT),
    **dict.fromkeys([
        "", " ", "-", "+", "s", ".", "-.", ".s", "+.s", "-s", "1d", "1S", "1 s", " 1s", "1s ",
        "1s\n", "1h 30m", "--1s", "+-1s", "1-s", "1s-1s", "1..5s", "1.5.5s", "1,5s", "1e3s", "0x1s",
        "1_000s", "1sec", "1mss", "inf", "nan", "\u0661s", "\uff11s", "\x00", "1s\x00",
        "\x85\x85", "hello",
    ], NONE),
    **dict.fromkeys([
        "9223372036854775808ns", "-9223372036854775809ns", "9223372036854775.808us",
        "2562047h47m16.854775808s", "9223372036854ms775us808ns", "3000000h", "-3000000h",
        "1" + "0" * 400 + "s", "9" * 5_000 + "ns",
    ], LONG),
}  # fmt: skip


def short(text: str) -> str:
    return ascii(text)[:40]


@pytest.mark.parametrize(("text", "ns"), DURATIONS.items(), ids=map(short, DURATIONS))
def test_a_duration(text: str, ns: int) -> None:
    seconds = bus_containers.parse_duration(text)
    assert type(seconds) is float
    assert seconds == ns / 10**9


@pytest.mark.parametrize(("text", "says"), NO_DURATIONS.items(), ids=map(short, NO_DURATIONS))
def test_what_is_not_a_duration(text: str, says: str) -> None:
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.parse_duration(text)
    told = str(caught.value)
    assert told.endswith(f"' {says}{text}s`" if says == NO_UNIT else f"' {says}")
    assert (told.isprintable(), len(told) < 5_000) == (True, True)


# --- functions of their arguments alone -------------------------------------------------------


def test_the_settings_touch_nothing(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setenv("BUS_AI_API_URL", SECOND)
    monkeypatch.setenv("BUS_AI_TOKEN", "0ther")
    monkeypatch.setattr(sys, "stdin", io.StringIO("not to be read"))
    before, environ = dict(os.environ), {"HTTP_PROXY": "http://p:1"}
    assert bus_containers.resolve_api_url(None, environ)[0] == DEFAULT_URL
    with pytest.raises(bus_containers.ConfigError):
        bus_containers.resolve_token(None, environ)
    assert bus_containers.resolve_proxy(FIRST, environ) == "http://p:1"
    assert (dict(os.environ), environ) == (before, {"HTTP_PROXY": "http://p:1"})
    assert sys.stdin.read() == "not to be read"
    assert capfdbinary.readouterr() == (b"", b"")


def test_what_is_not_text() -> None:
    anything: Any = 7
    for call, line in (
        (lambda: bus_containers.Client(anything, "t0ken"), "`api_url` is not text"),
        (lambda: bus_containers.Client(NOWHERE, anything), "`token` is not text"),
        (lambda: bus_containers.parse_duration(anything), "7 is not text"),
        (lambda: bus_containers.resolve_proxy(anything, {}), "'7' is not a URL that .* a proxy"),
        (lambda: bus_containers.resolve_token(anything, {}), "`path` is not text"),
    ):
        with pytest.raises(bus_containers.ConfigError, match=f"^{line}$"):
            call()
