# SPDX-License-Identifier: MIT
"""API URL, token, config directory, durations: promises 2.1 to 2.3, 2.8, 2.9, 3.24, 4.3, 4.5.

Tables of what is accepted and refused, and seeded random cases against small models of their own.
"""

from __future__ import annotations

import io
import math
import os
import random
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import bus_containers
from hostile import Api, Hostile, Script, answer, html, message, raw, refused_port
from support import (
    CANARY,
    NOWHERE,
    URL_VARIABLES,
    InProcess,
    Program,
    Result,
    chain,
    check_failure,
    failure_code,
    jwt,
    leaks,
    second_tier,
    spoken,
    tiers,
    words,
)

CASES = 10_000
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


def test_the_process_environment_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUS_AI_API_URL", FIRST)
    monkeypatch.setenv("BUS_AI_TOKEN", "t0ken")
    assert bus_containers.resolve_api_url(None, {})[0] == DEFAULT_URL
    with pytest.raises(bus_containers.ConfigError):
        bus_containers.resolve_token(None, {})


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


# What is refused, and what the message has to say about it, if more than the form.
BAD_URLS = {
    "no-scheme": ("ai.hg.fi", "https://ai.hg.fi"),
    "no-scheme-port": ("localhost:8080", "http://localhost:8080"),
    "no-scheme-path": ("/api", "https://"),
    "endpoint": ("https://ai.hg.fi/api/v1/containers", "origin"),
    "endpoint-slash": ("https://ai.hg.fi/api/v1/containers/", "origin"),
    "endpoint-prefix": ("https://ai.hg.fi/CAP/api/v1/containers/runs", "origin"),
    **{
        name: (url, "http[s]://HOST")
        for name, url in {
            "one-slash": "http:/host", "ftp": "ftp://host", "file": "file:///etc/passwd",
            "unix": "unix:///var/run/docker.sock", "httpss": "httpss://host",
            "user": "http://me@host", "user-and-password": "http://me:p4ssw0rd@host",
            "empty-user": "http://@host", "query": "http://host/?x=p4ssw0rd",
            "empty-query": "http://host/?", "fragment": "http://host/#p4ssw0rd",
            "empty-fragment": "http://host#", "blank-inside": "http://ho st",
            "blank-at-the-start": " http://host", "blank-at-the-end": "http://host ",
            "line-break": "http://host\nx", "line-break-at-the-end": "http://host\n",
            "tab": "http://ho\tst", "header": "http://host/\r\nX-Injected: 1",
            "nul": "http://host/\0", "escape": "http://host/\x1b[2J", "delete": "http://host/\x7f",
            "port-0": "http://host:0", "port-too-large": "http://host:65536",
            "port-much-too-large": "http://host:99999999999999999999",
            "port-negative": "http://host:-1", "port-a-word": "http://host:http",
            "port-twice": "http://host:80:80", "bracket": "http://[::1",
            "brackets-without-an-address": "http://[host]", "ipv4-in-brackets": "http://[1.2.3.4]",
            "colon-in-brackets": "http://[:]", "empty-label": "http://a..b",
            "long-label": f"http://{64 * 'a'}.test", "backslash": "http://host\\x",
            "not-ascii": "http://h\u00f6st", "no-host": "http://",
            "no-host-but-a-port": "http://:8080", "no-host-but-a-path": "http:///path",
        }.items()
    },
    "only-blanks": ("  ", ""),
}  # fmt: skip
bad_urls = pytest.mark.parametrize(("url", "says"), BAD_URLS.values(), ids=BAD_URLS.keys())


@bad_urls
def test_an_api_url_that_cannot_be_used(url: str, says: str, cli: InProcess) -> None:
    for source in SOURCES:
        flag, environ = (url, {}) if source == "--api-url" else (None, {source: url})
        with pytest.raises(bus_containers.ConfigError) as caught:
            bus_containers.resolve_api_url(flag, environ)
        assert caught.value.run_state == "not_sent"
        told = str(caught.value)
        assert source in told
        assert says in told
        assert "p4ssw0rd" not in told
        assert told.isprintable()
    line = check_failure(cli("--api-url", url, *words("run")), 2, "--api-url", says, "--help")
    assert "p4ssw0rd" not in line
    if "\0" not in url:  # which no variable can hold
        check_failure(cli("status", env={"BUS_API_BASE_URL": url}), 2, "BUS_API_BASE_URL", says)


def test_an_empty_flag_is_not_unset() -> None:
    with pytest.raises(bus_containers.ConfigError, match="--api-url"):
        bus_containers.resolve_api_url("", BOTH)


IDS = ["run_1", "a/b", "../status", "..%2f", "%2e%2e", "a?b", "a#b", "a b", "a+b", "*", "\u20ac"]


@pytest.mark.parametrize("count", [40, pytest.param(2_000, marks=second_tier)])
def test_a_run_id_is_one_segment_below_the_prefix(count: int, api: Api) -> None:
    dice = random.Random(3)
    letters = [*"aZ09-._~/\\?#%&=+;:@!$'()*,[]{}|^`\"<> ", "%2F", "..", "\u00e4", "\u20ac"]
    ids = ["".join(dice.choices(letters, k=dice.randint(1, 12))) for _ in range(count)]
    for run_id in IDS + [each for each in ids if each not in (".", "..")]:
        prefix = dice.choice(["", "/CAP/v1", "/a-b_c.d~e!$&'()*+,;=:@%41"])
        client = bus_containers.Client(api.url + prefix + "/" * dice.randint(0, 2), "t0ken")
        assert client.delete(run_id)["run_id"] == run_id
        path = api.requests.pop().split(b" ", 2)[1].decode("ascii")
        base, _, segment = path.rpartition("/")
        assert base == f"{urlsplit(api.url).path}{prefix}/api/v1/containers/runs"
        assert unquote(segment, errors="strict") == run_id
        assert not set(segment) & set('/?#\\ "<>')


# --- advice names what the value came from ----------------------------------------------------


def call_with(cli: InProcess, source: str, url: str, *args: str) -> Result:
    """Call the program with its URL from this source alone, and with the canary as its token."""
    if source == "--api-url":
        return cli("--api-url", url, *args, env={"BUS_AI_TOKEN": CANARY})
    return cli(*args, env={"BUS_AI_TOKEN": CANARY, source: url})


def check_advice(error: str, source: str) -> None:
    """An error names the source of the URL and no other one."""
    assert [name for name in SOURCES if name in error] == [source], error


@pytest.mark.parametrize("source", tiers(SOURCES, "BUS_API_BASE_URL"))
def test_advice_names_the_source_of_the_url(source: str, cli: InProcess, api: Api) -> None:
    with refused_port() as port:
        result = call_with(cli, source, f"http://127.0.0.1:{port}", "status")
        check_advice(check_failure(result, 1, "refused"), source)
    for status in ("301 Moved Permanently", "307 Temporary Redirect"):
        api.sends(message(b"", status, "Location: https://elsewhere.test/"))
        result = call_with(cli, source, api.url, *words("run"))
        check_advice(check_failure(result, 125, status[:3], "https://elsewhere.test/"), source)


# What else a wrong URL leads to: a page, another protocol, an endpoint that is not there.
WRONG_PORTS: dict[str, Script] = {
    "page": html("200 OK", "Sign in"),
    "ssh": raw(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    "404-page": html("404 Not Found", "404 Not Found"),
    "404": answer(b"{}", "404 Not Found"),
    "tls-port": raw(b"\x15\x03\x01\x00\x02\x02\x46"),
}


@pytest.mark.parametrize("script", WRONG_PORTS.values(), ids=WRONG_PORTS.keys())
def test_no_advice_names_an_option_that_was_not_given(script: Script, cli: InProcess) -> None:
    with Hostile(script) as server:
        for name in URL_VARIABLES:
            result = call_with(cli, name, server.url, *words("run"))
            assert result.code == 125
            others = [each for each in SOURCES if each != name and each in result.error]
            assert not others, result.error


ALREADY = "ends in a part of the API's path: give its origin alone"


@pytest.mark.parametrize("command", tiers(["status", "run", "runs"], "status", "runs"))
@pytest.mark.parametrize("prefix", ["/api/v1", "/CAP/api/v1/"])
def test_an_api_url_with_the_path_of_the_api(
    prefix: str, command: str, cli: InProcess, api: Api
) -> None:
    """Promise 3.24: a 404 at /api/v1/api/v1/... is told as what it is."""
    for source in SOURCES[:2]:
        page = html("404 Not Found", "404 Not Found")
        with Hostile(page) as server:
            result = call_with(cli, source, server.url + prefix, *words(command))
            assert b"/api/v1/api/v1/containers/" in server.requests[-1]
        error = check_failure(result, failure_code(command), "404", ALREADY)
        check_advice(error, source)
    api.answers({}, status="404 Not Found")
    error = call_with(cli, "BUS_AI_API_URL", api.url, *words(command)).error
    assert ALREADY not in error


# --- the token --------------------------------------------------------------------------------


def token_file(folder: Path, text: str = "from-file") -> Path:
    path = folder / "auth" / "api-token"
    path.parent.mkdir(parents=True)
    path.write_text(f"{text}\n")
    return path


BELOW = {"BUS_CONFIG_DIR": "", "XDG_CONFIG_HOME": "/bus", "HOME": "/.config/bus"}


class Places(NamedTuple):
    """Every place that a token can come from, each with its own."""

    option: str
    bus: Path
    environ: dict[str, str]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    option = tmp_path / "option"
    option.write_text("from-option\n")
    environ = {"BUS_AI_TOKEN": "from-BUS_AI_TOKEN", "BUS_API_TOKEN": "from-BUS_API_TOKEN"}
    for name, below in BELOW.items():
        environ[name] = str(tmp_path / name)
        token_file(Path(f"{tmp_path / name}{below}"), f"from-{name}")
    return Places(str(option), tmp_path / "BUS_CONFIG_DIR/auth/api-token", environ)


@pytest.mark.parametrize("off", ["unset", "empty"])
def test_order_of_the_token(off: str, places: Places) -> None:
    environ = dict(places.environ)
    got = bus_containers.resolve_token(places.option, environ)
    assert got == ("from-option", places.option)
    for name in places.environ:
        token, source = bus_containers.resolve_token(None, environ)
        assert token == f"from-{name}"
        assert source == name or source.endswith(f"/{name}{BELOW.get(name)}/auth/api-token")
        environ[name] = ""
        if off == "unset":
            del environ[name]
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.resolve_token(None, environ)
    assert NEW_TOKEN in str(caught.value)


def test_a_config_directory_without_a_token_hides_the_next(places: Places) -> None:
    environ = {name: places.environ[name] for name in BELOW}
    places.bus.unlink()
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.resolve_token(None, environ)
    assert str(places.bus) in str(caught.value)
    assert "from-" not in str(caught.value)


@pytest.mark.parametrize("command", ["status", "run"])
def test_no_token_anywhere(command: str, cli: InProcess, api: Api) -> None:
    """Promises 2.2 and 4.5: every place is named, in order; a later call finds no token either."""
    env = {"BUS_AI_API_URL": api.url}
    error = check_failure(cli(*words(command), env={**env}), failure_code(command))
    looked = ["--token-file", "BUS_AI_TOKEN", "BUS_API_TOKEN"]
    looked += [str(cli.home / ".config/bus/auth/api-token"), NEW_TOKEN]
    at = [error.index(place) for place in looked]
    assert at == sorted(at)
    [told] = cli("--error-format", "json", *words(command), env={**env}).objects
    assert (told["kind"], told["retryable"]) == ("config", False)
    check_failure(cli(*words(command), env={**env, "HOME": None}), failure_code(command), "HOME")
    assert api.requests == []


TOKEN_FILES = ("missing", "directory", "below-a-file", "dangling", "loop", "empty", "blank")


def unusable(folder: Path, kind: str) -> Path:
    """A path in this folder from which no token can be read."""
    path = folder / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "below-a-file":
        path.write_text(CANARY)
        path /= "token"
    elif kind in ("dangling", "loop"):
        path.symlink_to("nowhere" if kind == "dangling" else path)
    elif kind in ("empty", "blank"):
        path.write_text("" if kind == "empty" else " \t\r\n")
    return path


@pytest.mark.parametrize("kind", TOKEN_FILES)
def test_a_token_file_that_cannot_be_used(kind: str, cli: InProcess, tmp_path: Path) -> None:
    path = unusable(tmp_path, kind)
    config = token_file(tmp_path / "config")
    config.unlink()
    config.symlink_to(path)
    for given, environ in ((str(path), {}), (None, {"BUS_CONFIG_DIR": str(tmp_path / "config")})):
        with pytest.raises(bus_containers.ConfigError) as caught:
            bus_containers.resolve_token(given, environ)
        assert (given or str(config)) in str(caught.value)
        assert caught.value.retryable is False
        assert CANARY not in "".join(repr(each.args) for each in chain(caught.value))
    check_failure(cli("--token-file", str(path), *words("run")), 125, str(path))


def test_other_token_files_that_cannot_be_read(cli: InProcess) -> None:
    check_failure(cli("--token-file", "", "status"), 2, "--token-file")
    for path in ("nul\0", "/proc/self/mem"):  # the latter opens, and cannot be read at 0
        check_failure(cli("--token-file", path, "status"), 1, path.rstrip("\0"), "token")


@second_tier
def test_a_token_file_of_somebody_else(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(CANARY)
    path.chmod(0)
    command = program.command
    if os.access(path, os.R_OK):  # root: do without what lets it read everything
        if not shutil.which("setpriv"):
            pytest.skip("runs as root, and there is no setpriv")
        bounds = "--bounding-set=-dac_override,-dac_read_search"
        command = ["setpriv", bounds, *program.command]
    result = Program(command, program.home)("--token-file", str(path), "status")
    check_failure(result, 1, str(path), "Permission denied")


VISIBLE = "".join(map(chr, range(0x21, 0x7F)))
GOOD_TOKENS = {
    "blanks-around": (b" \r\n\tt0ken \r\n\r\n", "t0ken"),
    "all-visible-ascii": (VISIBLE.encode(), VISIBLE),
    "64-kib": (b"x" * 65_536, "x" * 65_536),
}


@pytest.mark.parametrize(("content", "token"), GOOD_TOKENS.values(), ids=GOOD_TOKENS.keys())
def test_a_token_that_can_be_used(content: bytes, token: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    assert bus_containers.resolve_token(str(path), {}) == (token, str(path))
    environ = {"BUS_API_TOKEN": content.decode()}
    assert bus_containers.resolve_token(None, environ) == (token, "BUS_API_TOKEN")


# Promise 2.9. What is not a token, and a pattern of what has to be said about it.
BAD_TOKENS = {
    "bearer": (f"Bearer {CANARY}".encode(), "`?Bearer`?"),
    "bearer-small": (f"bearer {CANARY}\n".encode(), "Bearer"),
    "header": (f"Authorization: Bearer {CANARY}".encode(), "Bearer"),
    "two-lines": (f"{CANARY}\n{CANARY}".encode(), "more than one line"),
    "crlf": (f"{CANARY}\r\nX-Injected: {CANARY}".encode(), "more than one line"),
    "carriage-return": (f"{CANARY}\r{CANARY}".encode(), "more than one line"),
    "utf-16": (CANARY.encode("utf-16"), "UTF-16"),
    "utf-16-be": (b"\xfe\xff" + CANARY.encode("utf-16-be"), "UTF-16"),
    "byte-order-mark": (b"\xef\xbb\xbf" + CANARY.encode(), "byte.order mark"),
    **{
        name: (content, "ASCII")
        for name, content in {
            "blank-inside": f"{CANARY} {CANARY}".encode(),
            "tab-inside": f"{CANARY}\t{CANARY}".encode(),
            "escape": f"{CANARY}\x1b[2J".encode(),
            "nul": f"{CANARY}\0".encode(),
            "delete": f"{CANARY}\x7f".encode(),
            "c1": CANARY.encode() + b"\x85",
            "no-break-space": CANARY.encode() + b"\xa0",
            "utf-8": f"{CANARY}\u00e4".encode(),
            "latin-1": CANARY.encode() + b"\xe4",
            "line-separator": f"{CANARY}\u2028{CANARY}".encode(),
            "beyond-latin-1": f"{CANARY}\u20ac".encode(),
        }.items()
    },
    "65537-bytes": ((CANARY * 2_000).encode()[:65_537], "64 KiB"),
    "large": (b"x" * (1 << 20), "64 KiB"),
}


@pytest.mark.parametrize(("content", "says"), BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_a_token_that_is_not_one(content: bytes, says: str, cli: InProcess, tmp_path: Path) -> None:
    """It is told as what it is, wherever it comes from, without a piece of it."""
    path = token_file(tmp_path)
    path.write_bytes(content)

    def check(name: str, text: str, error: BaseException | None = None) -> None:
        assert name in text
        assert re.search(says, text), text
        held = "".join(repr(each.args) for each in chain(error)) if error else ""
        assert not leaks(CANARY, f"{text}{held}".replace("\\x00", "").encode())

    folder = str(tmp_path)
    cases: list[tuple[str, str | None, dict[str, str]]] = [
        (str(path), str(path), {}),
        (str(path), None, {"BUS_CONFIG_DIR": folder}),
    ]
    if len(content) <= 65_536:
        text = content.decode("utf-8", "surrogateescape")  # as the environment holds it
        cases += [(name, None, {name: text}) for name in ("BUS_AI_TOKEN", "BUS_API_TOKEN")]
        with pytest.raises(bus_containers.ConfigError) as caught:
            bus_containers.Client(NOWHERE, text)
        check("", str(caught.value), caught.value)
    for name, given, environ in cases if b"\0" not in content else cases[:2]:
        with pytest.raises(bus_containers.ConfigError) as caught:
            bus_containers.resolve_token(given, environ)
        check(name, str(caught.value), caught.value)
    for result in (
        cli("-vv", "--token-file", str(path), *words("run")),
        cli("-vv", "--token-file", "-", *words("run"), input=content),
    ):
        assert (result.code, result.out) == (125, b"")
        check("", result.message)
    assert "standard input" in spoken(result.err).errors[-1]


def test_a_token_from_standard_input(cli: InProcess, api: Api) -> None:
    env: dict[str, str | None] = {"BUS_AI_TOKEN": None}
    assert cli("--token-file", "-", "status", at=api, env=env, input=b" t0ken\n").code == 0
    assert b"\r\nAuthorization: Bearer t0ken\r\n" in api.requests[0]
    check_failure(cli("--token-file", "-", "status", input=b""), 1, "standard input", NEW_TOKEN)


@pytest.mark.parametrize("error", [{"type": "insufficient_scope"}, "insufficient scope"])
def test_403_for_want_of_a_scope(error: object, cli: InProcess, api: Api) -> None:
    """Promise 3.24: however the server says it, it is explained as a 401 is."""
    api.answers({"error": error}, status="403 Forbidden")
    env: dict[str, str | None] = {"BUS_AI_TOKEN": jwt({"scope": "container:read"})}
    line = check_failure(cli(*words("run"), at=api, env=env), 125, "403", NEW_TOKEN)
    assert "lacks the scope container:run (it has: container:read)" in line


# --- durations --------------------------------------------------------------------------------

MICRO, MU = "\u00b5s", "\u03bcs"
US, MS, S, M, H = 10**3, 10**6, 10**9, 60 * 10**9, 3600 * 10**9
NS = {"ns": 1, "us": US, MICRO: US, MU: US, "ms": MS, "s": S, "m": M, "h": H}
GO_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
MOST = 2**63 - 1

# Those of Go's own tests, and more, with their nanoseconds.
DURATIONS = {
    "0": 0, "+0": 0, "-0": 0, "0s": 0, "0m": 0, "5s": 5 * S, "30s": 30 * S, "1478s": 1478 * S,
    "-5s": -5 * S, "+5s": 5 * S, "5.0s": 5 * S, "5.6s": 5600 * MS, "5.s": 5 * S, ".5s": 500 * MS,
    "1.0s": S, "1.00s": S, "1.004s": 1004 * MS, "1.0040s": 1004 * MS, "100.00100s": 100_001 * MS,
    "10ns": 10, "11us": 11_000, f"12{MICRO}": 12_000, f"12{MU}": 12_000, "13ms": 13 * MS,
    "14s": 14 * S, "15m": 15 * M, "16h": 16 * H, "1h30m": 90 * M, "1.5h": 90 * M, "3h30m": 210 * M,
    "10.5s4m": 250_500 * MS, "-2m3.4s": -123_400 * MS, "1h2m3s4ms5us6ns": 3_723_004_005_006,
    "39h9m14.425s": 140_954_425 * MS, "52763797000ns": 52_763_797_000,
    "0.3333333333333333333h": 20 * M, "0.100000000000000000000h": 6 * M,
    "0.830103483285477580700h": 2_988_372_539_827, "1s1s1s": 3 * S, "1ns1h": H + 1, "007s": 7 * S,
    "00000000000000000000001s": S, "0.000000000000000000001s": 0,
    "9007199254740993ns": 9_007_199_254_740_993, "9223372036854775807ns": MOST,
    "9223372036854775.807us": MOST, "9223372036.854775807s": MOST,
    "9223372036s854ms775us807ns": MOST, "-9223372036854775807ns": -MOST,
    "-9223372036854775808ns": -MOST - 1, "-9223372036854775.808us": -MOST - 1,
    "-9223372036s854ms775us808ns": -MOST - 1,
}  # fmt: skip
NO_DURATIONS = [
    "", " ", "3", "30", "00", "0.0", "-", "+", "s", ".", "-.", ".s", "+.s", "-s", "1d", "1w", "1S",
    "1 s", " 1s", "1s ", "1s\n", "1h 30m", "--1s", "+-1s", "1-s", "1s-1s", "1h30", "1..5s",
    "1.5.5s", "1,5s", "1e3s", "0x1s", "1_000s", "1sec", "1min", "1mss", "inf", "nan", "infs",
    "\u0661s", "\uff11s", "1\u00b5", "\x00", "1s\x00", "\x85\x85", "hello", "9223372036854775808ns",
    "9223372036854775810ns", "-9223372036854775809ns", "9223372036854776us",
    "9223372036854775.808us", "9223372036854ms775us808ns", "3000000h", "-3000000h",
    "1" + "0" * 400 + "s", "9" * 5_000 + "ns",
]  # fmt: skip


def is_close(seconds: float, ns: int) -> bool:
    return math.isclose(seconds, ns / 10**9, rel_tol=1e-15, abs_tol=1.5e-9)


def short(text: str) -> str:
    return ascii(text)[:40]


@pytest.mark.parametrize(("text", "ns"), DURATIONS.items(), ids=map(short, DURATIONS))
def test_a_duration(text: str, ns: int) -> None:
    modelled = go_duration(text)
    assert modelled is not None
    assert abs(modelled - ns) <= 1, "the model of the test itself, which does not round as Go does"
    seconds = bus_containers.parse_duration(text)
    assert type(seconds) is float
    assert is_close(seconds, ns)


@pytest.mark.parametrize("text", NO_DURATIONS, ids=short)
def test_what_is_not_a_duration(text: str) -> None:
    assert go_duration(text) is None, "the model of the test itself"
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.parse_duration(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 5_000


def go_duration(text: str) -> int | None:
    """The nanoseconds of what Go's time.ParseDuration takes, None for what it does not."""
    if text in ("0", "+0", "-0"):
        return 0
    parts = re.split("([0-9.]+)", text.lstrip("-+") if text[1:2] not in ("-", "+") else text)
    numbers, units = parts[1::2], parts[2::2]
    if parts[0] or not numbers or not all(map(GO_NUMBER.fullmatch, numbers)):
        return None
    if not all(unit in NS for unit in units) or max(map(len, numbers)) > 60:
        return None
    total = sum(int(Fraction(number) * NS[unit]) for number, unit in zip(numbers, units))
    if text.startswith("-"):
        return -total if total <= 2**63 else None
    return total if total < 2**63 else None


def random_duration(dice: random.Random) -> str:
    numbers = ["0", "1", "30", "007", "59.5", "1.", ".25", "0.000001", ".", "", "1.2.3", "2562047"]
    numbers += [str(dice.getrandbits(dice.randint(1, 70))), f"{dice.random() * 100:.9f}"]
    numbers += [f"{dice.random():.25f}", f"{2**63 // dice.choice(list(NS.values()))}"]
    units = [*NS] * 4 + ["", "d", "S", " s", "sec", "\u00b5", "\u0661s", "ss"]
    parts = dice.randint(1, 4)
    text = "".join(dice.choice(numbers) + dice.choice(units) for _ in range(parts))
    text = dice.choice(["", "", "", "-", "+", " ", "--"]) + text
    if dice.random() < 0.1:
        at = dice.randint(0, len(text))
        text = text[:at] + dice.choice("0s.-+ \n\u0664") + text[at:]
    return text


def test_random_durations() -> None:
    dice = random.Random(4)
    accepted = 0
    for _ in range(CASES):
        text = random_duration(dice)
        ns = go_duration(text)
        try:
            seconds = bus_containers.parse_duration(text)
        except bus_containers.ConfigError:
            assert ns is None, text
            continue
        accepted += 1
        assert ns is not None, text
        assert is_close(seconds, ns), text
    assert CASES // 10 < accepted < CASES * 9 // 10, "the cases are not worth their time"


# --- what is said, whole ----------------------------------------------------------------------

FORM = "http[s]://HOST[:PORT][/PREFIX], in ASCII, without user, query or fragment"
URL_LINES = {
    "http://u:p@host/?x": f"--api-url: 'http://***@host/?***' is not {FORM}",
    "ai.hg.fi": f"--api-url: 'ai.hg.fi' is not {FORM}: write https://ai.hg.fi, or http://ai.hg.fi"
    " for plain HTTP",
    "http://h/api/v1/containers": f"--api-url: 'http://h/api/v1/containers' is not {FORM}:"
    " give the API's origin, without /api/v1/containers",
}
TOKEN_LINES = {
    "": f"no token: standard input is empty; make one with: {NEW_TOKEN}",
    "Bearer x": "the token in standard input starts with `Bearer`: leave that word out",
    "x\ny": "the token in standard input has more than one line",
    "\ufeffx": "the token in standard input starts with a byte-order mark: save it without",
    "x\0y\0": "the token in standard input is UTF-16: save it as plain ASCII",
    "x y": "the token in standard input holds a character that is not visible ASCII",
    "x" * 65_537: "the token in standard input is larger than 64 KiB",
}
DURATION_LINES = {
    "30": "'30' has no unit: try `30s`",
    "soon": "'soon' is not a duration: try `30s` or `1h30m`",
    "3000000h": "'3000000h' is longer than the 292 years of a duration",
}


def test_what_is_said_of_settings(cli: InProcess, api: Api, tmp_path: Path) -> None:
    for url, line in URL_LINES.items():
        told = cli("--api-url", url, "status").message
        assert told == f"bus-containers: {line}; see `bus-containers status --help`\n"
    for token, line in TOKEN_LINES.items():
        told = cli("--token-file", "-", "status", input=token.encode()).message
        assert told == f"bus-containers: {line}\n"
    for text, line in DURATION_LINES.items():
        with pytest.raises(bus_containers.ConfigError) as caught:
            bus_containers.parse_duration(text)
        assert str(caught.value) == line
    path = str(tmp_path / "none")
    for args, env, line in (
        (("--token-file", path), {},
         f"no token: {path} does not exist; make one with: {NEW_TOKEN}"),
        ((), {"HOME": None}, "no token: looked at --token-file, BUS_AI_TOKEN, BUS_API_TOKEN;"
         f" HOME is not set; make one with: {NEW_TOKEN}"),
        (("--token-file", "/"), {}, "cannot read a token from /: Is a directory"),
    ):  # fmt: skip
        told = cli(*args, "status", env={"BUS_AI_API_URL": api.url, **env}).message
        assert told == f"bus-containers: {line}\n"
    assert api.requests == []


# --- functions of their arguments alone -------------------------------------------------------


def test_the_settings_touch_nothing(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    before, folder = dict(os.environ), os.getcwd()
    monkeypatch.setattr(sys, "stdin", io.StringIO("not to be read"))
    environ = {"BUS_AI_TOKEN": "t0ken", "BUS_AI_API_URL": FIRST, "HTTP_PROXY": "http://p:1"}
    kept = dict(environ)
    bus_containers.resolve_api_url(None, environ)
    bus_containers.resolve_token(None, environ)
    bus_containers.resolve_proxy(FIRST, environ)
    bus_containers.parse_duration("1h")
    assert (dict(os.environ), os.getcwd(), environ) == (before, folder, kept)
    assert sys.stdin.read() == "not to be read"
    assert capfdbinary.readouterr() == (b"", b"")
