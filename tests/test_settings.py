# SPDX-License-Identifier: MIT
"""The settings: CONTRACT section 2, as pure functions and as the program resolves them.

Tables of what is accepted and refused, and seeded random cases against small models of their own.
"""

from __future__ import annotations

import io
import ipaddress
import math
import os
import random
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import bus_containers
from conftest import Program
from hostile import LIMIT, Hostile, answer, spoken

CASES = 10_000
DEFAULT_URL = "https://ai.hg.fi"
NEW_TOKEN = 'bus auth token --scope "container:read container:run container:delete billing:read"'

# --- the API's URL ----------------------------------------------------------------------------

FLAG, FIRST, SECOND = "http://flag.test", "http://first.test", "http://second.test"
BOTH = {"BUS_AI_API_URL": FIRST, "BUS_API_BASE_URL": SECOND}


@pytest.mark.parametrize(
    ("flag", "environ", "url", "source"),
    [
        pytest.param(FLAG, BOTH, FLAG, "--api-url", id="flag"),
        pytest.param(None, BOTH, FIRST, "BUS_AI_API_URL", id="first-variable"),
        pytest.param(
            None, {"BUS_API_BASE_URL": SECOND}, SECOND, "BUS_API_BASE_URL", id="second-variable"
        ),
        pytest.param(
            None, {**BOTH, "BUS_AI_API_URL": ""}, SECOND, "BUS_API_BASE_URL", id="empty-is-unset"
        ),
        pytest.param(None, dict.fromkeys(BOTH, ""), DEFAULT_URL, None, id="both-empty"),
        pytest.param(None, {}, DEFAULT_URL, None, id="default"),
        pytest.param(None, {"API_URL": FIRST}, DEFAULT_URL, None, id="unknown-variable"),
        pytest.param(
            FLAG, dict.fromkeys(BOTH, "no url"), FLAG, "--api-url", id="only-the-first-is-looked-at"
        ),
    ],
)
def test_order_of_the_api_url(
    flag: str | None, environ: dict[str, str], url: str, source: str | None
) -> None:
    got, where = bus_containers.resolve_api_url(flag, environ)
    assert got == url
    assert where and where == (source or where)


def test_the_process_environment_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUS_AI_API_URL", FIRST)
    monkeypatch.setenv("BUS_AI_TOKEN", "t0ken")
    assert bus_containers.resolve_api_url(None, {})[0] == DEFAULT_URL
    with pytest.raises(bus_containers.ConfigError):
        bus_containers.resolve_token(None, {})


GOOD_URLS = {
    "http://127.0.0.1:8080": "http://127.0.0.1:8080",
    "http://127.0.0.1:8080/": "http://127.0.0.1:8080",
    "http://127.0.0.1:8080///": "http://127.0.0.1:8080",
    "http://127.0.0.1:8080/CAP/v1": "http://127.0.0.1:8080/CAP/v1",
    "http://127.0.0.1:8080/CAP/v1//": "http://127.0.0.1:8080/CAP/v1",
    "http://[::1]:8080": "http://[::1]:8080",
    "http://[::1]:8080/": "http://[::1]:8080",
    "http://[2001:db8::1]/a/b/": "http://[2001:db8::1]/a/b",
    "https://ai.hg.fi": "https://ai.hg.fi",
    "https://platform": "https://platform",
    "HTTPS://ai.hg.fi/": "https://ai.hg.fi",
    "http://host:1": "http://host:1",
    "http://host:65535": "http://host:65535",
    "http://host/api/v1": "http://host/api/v1",
    "http://host/api/v1/containersx": "http://host/api/v1/containersx",
    "http://host/with%20blank": "http://host/with%20blank",
    "http://host/a-b_c.d~e": "http://host/a-b_c.d~e",
}


@pytest.mark.parametrize(("url", "base"), GOOD_URLS.items(), ids=GOOD_URLS.keys())
def test_an_api_url_that_can_be_used(url: str, base: str) -> None:
    assert bus_containers.resolve_api_url(url, {})[0] == base
    assert bus_containers.resolve_api_url(None, {"BUS_AI_API_URL": url})[0] == base
    assert bus_containers.Client(url, "t0ken").api_url == base


class BadUrl(NamedTuple):
    id: str
    url: str
    says: str = ""


BAD_URLS = [
    BadUrl("no-scheme", "ai.hg.fi", "https://ai.hg.fi"),
    BadUrl("no-scheme-port", "localhost:8080", "http://localhost:8080"),
    BadUrl("no-scheme-path", "/api", "https://"),
    BadUrl("one-slash", "http:/host"),
    BadUrl("ftp", "ftp://host"),
    BadUrl("file", "file:///etc/passwd"),
    BadUrl("unix", "unix:///var/run/docker.sock"),
    BadUrl("httpss", "httpss://host"),
    BadUrl("user", "http://me@host"),
    BadUrl("user-and-password", "http://me:p4ssw0rd@host"),
    BadUrl("empty-user", "http://@host"),
    BadUrl("query", "http://host/?x=1"),
    BadUrl("empty-query", "http://host/?"),
    BadUrl("fragment", "http://host/#top"),
    BadUrl("empty-fragment", "http://host#"),
    BadUrl("blank-inside", "http://ho st"),
    BadUrl("blank-at-the-start", " http://host"),
    BadUrl("blank-at-the-end", "http://host "),
    BadUrl("only-blanks", "  "),
    BadUrl("line-break", "http://host\nx"),
    BadUrl("line-break-at-the-end", "http://host\n"),
    BadUrl("tab", "http://ho\tst"),
    BadUrl("header", "http://host/\r\nX-Injected: 1"),
    BadUrl("nul", "http://host/\0"),
    BadUrl("escape", "http://host/\x1b[2J"),
    BadUrl("delete", "http://host/\x7f"),
    BadUrl("endpoint", "https://ai.hg.fi/api/v1/containers", "origin"),
    BadUrl("endpoint-slash", "https://ai.hg.fi/api/v1/containers/", "origin"),
    BadUrl("endpoint-prefix", "https://ai.hg.fi/CAP/api/v1/containers", "origin"),
    BadUrl("port-too-large", "http://host:65536"),
    BadUrl("port-much-too-large", "http://host:99999999999999999999"),
    BadUrl("port-negative", "http://host:-1"),
    BadUrl("port-a-word", "http://host:http"),
    BadUrl("port-twice", "http://host:80:80"),
    BadUrl("bracket", "http://[::1"),
    BadUrl("brackets-without-an-address", "http://[host]"),
    BadUrl("ipv4-in-brackets", "http://[1.2.3.4]"),
    BadUrl("colon-in-brackets", "http://[:]"),
    BadUrl("empty-label", "http://a..b"),
    BadUrl("long-label", f"http://{64 * 'a'}.test"),
    BadUrl("backslash", "http://host\\x"),
    BadUrl("no-host", "http://"),
    BadUrl("no-host-but-a-port", "http://:8080"),
    BadUrl("no-host-but-a-path", "http:///path"),
]


@pytest.mark.parametrize("case", BAD_URLS, ids=[case.id for case in BAD_URLS])
@pytest.mark.parametrize("source", ["--api-url", "BUS_AI_API_URL", "BUS_API_BASE_URL"])
def test_an_api_url_that_cannot_be_used(case: BadUrl, source: str) -> None:
    flag, environ = (case.url, {}) if source[0] == "-" else (None, {source: case.url})
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.resolve_api_url(flag, environ)
    told = str(caught.value)
    assert source in told
    assert case.says in told
    assert "p4ssw0rd" not in told
    assert told.isprintable()


def test_an_empty_flag_is_not_unset() -> None:
    with pytest.raises(bus_containers.ConfigError, match="--api-url"):
        bus_containers.resolve_api_url("", BOTH)


@pytest.mark.parametrize("case", BAD_URLS, ids=[case.id for case in BAD_URLS])
def test_a_bad_api_url_is_a_usage_error(
    case: BadUrl, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setenv("BUS_AI_TOKEN", "t0ken")
    said = []
    assert bus_containers.main(["--api-url", case.url, "run", "--", "true"]) == 2
    said.append(capfdbinary.readouterr())
    if "\0" not in case.url:  # which no variable can hold
        monkeypatch.setenv("BUS_API_BASE_URL", case.url)
        assert bus_containers.main(["status"]) == 2
        said.append(capfdbinary.readouterr())
    for (out, err), source in zip(said, ("--api-url", "BUS_API_BASE_URL")):
        told = spoken(err)
        assert out == b""
        assert len(told.errors) == 1
        assert source in told.text
        assert case.says in told.text
        assert "--help" in told.text


def random_base(dice: random.Random) -> tuple[str, str, str, str]:
    """A good URL with slashes at its end, and what must be left of it: base, netloc, prefix."""
    name = ".".join(dice.choice(["a", "bus", "x-1", "ai", "hg"]) for _ in range(dice.randint(1, 4)))
    address = str(ipaddress.ip_address(dice.getrandbits(32)))
    address6 = str(ipaddress.IPv6Address(dice.getrandbits(128)))
    host = dice.choice([name, address, f"[{address6}]"])
    netloc = host + dice.choice(["", f":{dice.randint(1, 65535)}"])
    scheme = dice.choice(["http", "https"])
    letters = "abcXYZ0189-._~!$&'()*+,;=:@%41"
    segments = ["".join(dice.choices(letters, k=dice.randint(1, 8))) for _ in range(3)]
    prefix = "".join(f"/{segment}" for segment in segments[: dice.randint(0, 3)])
    spelled = dice.choice([scheme, scheme.upper(), scheme.title()])
    slashes = "/" * dice.randint(0, 3)
    return f"{spelled}://{netloc}{prefix}{slashes}", f"{scheme}://{netloc}{prefix}", netloc, prefix


def test_random_api_urls() -> None:
    dice = random.Random(2)
    for _ in range(CASES):
        url, base, netloc, prefix = random_base(dice)
        environ = {dice.choice(["BUS_AI_API_URL", "BUS_API_BASE_URL"]): url}
        got = bus_containers.resolve_api_url(None, environ)
        assert got == (base, next(iter(environ))), url
        assert urlsplit(got[0])[:3] == (base.partition(":")[0], netloc, prefix)


class Echo:
    """A server that deletes everything, fast, and notes the path of each request."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.serve)

    def serve(self) -> None:
        while True:
            client, _ = self.socket.accept()
            with client:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    piece = client.recv(65536)
                    if not piece:
                        return
                    head += piece
                self.paths.append(head.split(b" ", 2)[1].decode("ascii"))
                client.sendall(b"HTTP/1.1 204 Gone\r\nConnection: close\r\n\r\n")

    def __enter__(self) -> Echo:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        socket.create_connection(("127.0.0.1", self.port)).close()
        self.thread.join(LIMIT)
        self.socket.close()
        assert not self.thread.is_alive()


IDS = ["run_1", "a/b", "../status", "..%2f", "%2e%2e", "a?b", "a#b", "a b", "a+b", "*", "ä€😀"]


def random_ids(dice: random.Random) -> Iterator[str]:
    yield from IDS
    letters = [*"aZ09-._~/\\?#%&=+;:@!$'()*,[]{}|^`\"<> ", "%2F", "..", "\u00e4", "\u20ac", "😀"]
    for _ in range(2_000):
        run_id = "".join(dice.choices(letters, k=dice.randint(1, 12)))
        if run_id not in (".", ".."):
            yield run_id


def test_random_run_ids_are_one_segment_below_the_prefix() -> None:
    dice = random.Random(3)
    with Echo() as server:
        for run_id in random_ids(dice):
            prefix = random_base(dice)[3]
            slashes = "/" * dice.randint(0, 2)
            url = f"http://127.0.0.1:{server.port}{prefix}{slashes}"
            document = bus_containers.Client(url, "t0ken").delete(run_id)
            assert document == {"deleted": True, "run_id": run_id}
            path = urlsplit(server.paths[-1]).path
            assert path == server.paths[-1]
            base, _, segment = path.rpartition("/")
            assert base == f"{prefix}/api/v1/containers/runs"
            assert unquote(segment, errors="strict") == run_id
            assert segment.isascii() and not set(segment) & set('/?#\\ "<>')


# --- the token --------------------------------------------------------------------------------


def token_file(folder: Path, text: str = "from-file") -> Path:
    path = folder / "auth" / "api-token"
    path.parent.mkdir(parents=True)
    path.write_text(f"{text}\n")
    return path


class Places(NamedTuple):
    """Every place that a token can come from, each with its own."""

    option: Path
    bus: Path
    xdg: Path
    home: Path
    environ: dict[str, str]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    option = tmp_path / "option"
    option.write_text("from-option\n")
    bus, xdg, home = (tmp_path / name for name in ("bus", "xdg", "owner"))
    environ = {
        "BUS_AI_TOKEN": "from-first",
        "BUS_API_TOKEN": "from-second",
        "BUS_CONFIG_DIR": str(bus),
        "XDG_CONFIG_HOME": str(xdg),
        "HOME": str(home),
    }
    return Places(
        option,
        token_file(bus, "from-bus"),
        token_file(xdg / "bus", "from-xdg"),
        token_file(home / ".config" / "bus", "from-home"),
        environ,
    )


@pytest.mark.parametrize("off", ["unset", "empty"])
def test_order_of_the_token(off: str, places: Places) -> None:
    environ = dict(places.environ)
    assert bus_containers.resolve_token(str(places.option), environ) == (
        "from-option",
        str(places.option),
    )
    for name, token, source in (
        ("BUS_AI_TOKEN", "from-first", "BUS_AI_TOKEN"),
        ("BUS_API_TOKEN", "from-second", "BUS_API_TOKEN"),
        ("BUS_CONFIG_DIR", "from-bus", str(places.bus)),
        ("XDG_CONFIG_HOME", "from-xdg", str(places.xdg)),
        ("HOME", "from-home", str(places.home)),
    ):
        assert bus_containers.resolve_token(None, environ) == (token, source)
        environ[name] = ""
        if off == "unset":
            del environ[name]
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.resolve_token(None, environ)
    assert NEW_TOKEN in str(caught.value)


def test_a_config_directory_without_a_token_hides_the_next(places: Places) -> None:
    environ = {name: places.environ[name] for name in ("BUS_CONFIG_DIR", "XDG_CONFIG_HOME", "HOME")}
    places.bus.unlink()
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.resolve_token(None, environ)
    assert str(places.bus) in str(caught.value)
    assert "from-" not in str(caught.value)


@pytest.mark.parametrize("args", [("status",), ("run", "--", "true")], ids=["status", "run"])
def test_no_token_anywhere(args: tuple[str, ...], program: Program) -> None:
    with Hostile(answer(b"{}")) as server:
        result = program("--api-url", server.url, *args)
    told = spoken(result.err)
    assert result.code == (125 if args[0] == "run" else 1)
    assert result.out == b""
    places = ["--token-file", "BUS_AI_TOKEN", "BUS_API_TOKEN"]
    places += [str(program.home / ".config/bus/auth/api-token"), NEW_TOKEN]
    at = [told.text.index(place) for place in places]
    assert at == sorted(at)
    assert len(told.errors) == 1
    assert server.connections == 0


def test_no_token_and_no_home(program: Program) -> None:
    told = spoken(program("status", env={"HOME": None}).err)
    assert "HOME" in told.text
    assert NEW_TOKEN in told.text


def test_a_token_may_stand_between_blanks(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(b" \r\n\tt0ken \r\n\r\n")
    assert bus_containers.resolve_token(str(path), {})[0] == "t0ken"
    assert bus_containers.resolve_token(None, {"BUS_AI_TOKEN": " t0ken\n"})[0] == "t0ken"


def test_a_token_of_all_visible_ascii(tmp_path: Path) -> None:
    token = "".join(map(chr, range(0x21, 0x7F)))
    path = tmp_path / "token"
    path.write_text(token)
    assert bus_containers.resolve_token(str(path), {})[0] == token
    assert bus_containers.resolve_token(None, {"BUS_API_TOKEN": token})[0] == token


@pytest.mark.parametrize(("size", "good"), [(65_536, True), (65_537, False), (1 << 20, False)])
def test_the_limit_of_a_token_file_is_64_kib(size: int, good: bool, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"x" * size)
    if good:
        assert bus_containers.resolve_token(str(path), {})[0] == "x" * size
        return
    with pytest.raises(bus_containers.ConfigError, match="64 KiB") as caught:
        bus_containers.resolve_token(str(path), {})
    assert str(path) in str(caught.value)
    assert "xxxx" not in str(caught.value)


SECRET = "S3CR3T"
BAD_TOKENS = {
    "empty": b"",
    "blanks": b" \t\r\n",
    "two-lines": b"S3CR3T\nS3CR3T",
    "header": b"S3CR3T\r\nX: S3CR3T",
    "blank-inside": b"Bearer S3CR3T",
    "tab-inside": b"S3CR3T\tS3CR3T",
    "escape": b"S3CR3T\x1b[2J",
    "nul": b"S3CR3T\0",
    "delete": b"S3CR3T\x7f",
    "c1": b"S3CR3T\x85",
    "no-break-space-at-the-end": b"S3CR3T\xa0",
    "utf-8": "S3CR3Tä".encode(),
    "latin-1": b"S3CR3T\xe4",
    "byte-order-mark": b"\xef\xbb\xbfS3CR3T",
    "utf-16": SECRET.encode("utf-16"),
}


@pytest.mark.parametrize("content", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
@pytest.mark.parametrize("source", ["file", "config", "BUS_AI_TOKEN", "BUS_API_TOKEN"])
def test_a_token_that_cannot_be_used(source: str, content: bytes, tmp_path: Path) -> None:
    path: str | None = None
    environ: dict[str, str] = {}
    name = source
    if source == "file":
        (tmp_path / "token").write_bytes(content)
        name = path = str(tmp_path / "token")
    elif source == "config":
        file = token_file(tmp_path)
        file.write_bytes(content)
        name, environ = str(file), {"BUS_CONFIG_DIR": str(tmp_path)}
    else:
        environ = {source: content.decode("latin-1")}
        name = source if content else NEW_TOKEN  # an empty variable is unset
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.resolve_token(path, environ)
    assert name in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert SECRET not in repr(caught.value.__cause__) + repr(caught.value.__context__)


@pytest.mark.parametrize("place", ["missing", "directory", "below-a-file", "nul\0"])
def test_a_token_file_that_cannot_be_read(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    if place == "directory":
        path.mkdir()
    elif place == "below-a-file":
        path.write_text(SECRET)
        path /= "token"
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.resolve_token(str(path), {})
    assert str(path).rstrip("\0") in str(caught.value)


@pytest.mark.parametrize("place", ["missing", "directory", "below-a-file", "dangling"])
def test_the_token_file_of_the_config_directory_that_cannot_be_read(
    place: str, tmp_path: Path
) -> None:
    path = tmp_path / "auth" / "api-token"
    if place == "directory":
        path.mkdir(parents=True)
    elif place == "below-a-file":
        path.parent.write_text(SECRET)
    elif place == "dangling":
        path.parent.mkdir()
        path.symlink_to("nowhere")
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.resolve_token(None, {"BUS_CONFIG_DIR": str(tmp_path)})
    assert str(path) in str(caught.value)


def test_a_token_from_standard_input(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    with Hostile(answer(b'{"items":[]}')) as server:
        result = program("--api-url", server.url, "--token-file", "-", "status", input=b" t0ken\n")
    assert result.code == 0
    assert b"\r\nAuthorization: Bearer t0ken\r\n" in server.requests[0]
    result = program("--token-file", "-", "status", input=b"")
    assert result.code == 1
    assert b"standard input" in result.err


def test_the_program_says_where_a_setting_came_from(places: Places, program: Program) -> None:
    folder = places.environ["BUS_CONFIG_DIR"]
    with Hostile(answer(b'{"items":[]}')) as server:
        by_variable = {"BUS_AI_API_URL": server.url, "BUS_AI_TOKEN": "from-first"}
        by_file = {"BUS_API_BASE_URL": server.url, "BUS_CONFIG_DIR": folder}
        for environ, sources in (
            (by_variable, ["BUS_AI_API_URL", "BUS_AI_TOKEN"]),
            (by_file, ["BUS_API_BASE_URL", str(places.bus)]),
        ):
            result = program("-v", "status", env={**environ})
            assert result.code == 0
            for source in (server.url, *sources):
                assert source in result.message
            assert "from-first" not in result.message
            assert "from-bus" not in result.message


# --- durations --------------------------------------------------------------------------------

MICRO, MU = "\u00b5s", "\u03bcs"
NS = {"ns": 1, "us": 10**3, MICRO: 10**3, MU: 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9}
NS["h"] = 3600 * 10**9
MOST = 2**63 - 1

# Those of Go's own tests, and more: the text, and its nanoseconds or None if it is refused.
DURATIONS: dict[str, int | None] = {
    "0": 0,
    "+0": 0,
    "-0": 0,
    "0s": 0,
    "5s": 5 * NS["s"],
    "30s": 30 * NS["s"],
    "1478s": 1478 * NS["s"],
    "-5s": -5 * NS["s"],
    "+5s": 5 * NS["s"],
    "5.0s": 5 * NS["s"],
    "5.6s": 5600 * NS["ms"],
    "5.s": 5 * NS["s"],
    ".5s": 500 * NS["ms"],
    "1.0s": NS["s"],
    "1.00s": NS["s"],
    "1.004s": 1004 * NS["ms"],
    "1.0040s": 1004 * NS["ms"],
    "100.00100s": 100_001 * NS["ms"],
    "10ns": 10,
    "11us": 11_000,
    f"12{MICRO}": 12_000,
    f"12{MU}": 12_000,
    "13ms": 13 * NS["ms"],
    "300ms": 300 * NS["ms"],
    "14s": 14 * NS["s"],
    "15m": 15 * NS["m"],
    "16h": 16 * NS["h"],
    "2m": 2 * NS["m"],
    "1h30m": 90 * NS["m"],
    "1.5h": 90 * NS["m"],
    "3h30m": 210 * NS["m"],
    "10.5s4m": 250_500 * NS["ms"],
    "-2m3.4s": -123_400 * NS["ms"],
    "1h2m3s4ms5us6ns": 3_723_004_005_006,
    "39h9m14.425s": 140_954_425 * NS["ms"],
    "52763797000ns": 52_763_797_000,
    "0.3333333333333333333h": 20 * NS["m"],
    "0.100000000000000000000h": 6 * NS["m"],
    "0.830103483285477580700h": 2_988_372_539_827,
    "1s1s1s": 3 * NS["s"],
    "1ns1h": NS["h"] + 1,
    "007s": 7 * NS["s"],
    "00000000000000000000001s": NS["s"],
    "0.000000000000000000001s": 0,
    "9007199254740993ns": 9_007_199_254_740_993,
    "9223372036854775807ns": MOST,
    "9223372036854775.807us": MOST,
    "9223372036.854775807s": MOST,
    "9223372036s854ms775us807ns": MOST,
    "-9223372036854775807ns": -MOST,
    "-9223372036854775808ns": -MOST - 1,
    "-9223372036854775.808us": -MOST - 1,
    "-9223372036s854ms775us808ns": -MOST - 1,
    "": None,
    " ": None,
    "3": None,
    "30": None,
    "00": None,
    "0.0": None,
    "-": None,
    "+": None,
    "s": None,
    ".": None,
    "-.": None,
    ".s": None,
    "+.s": None,
    "-s": None,
    "1d": None,
    "1w": None,
    "1S": None,
    "1 s": None,
    " 1s": None,
    "1s ": None,
    "1s\n": None,
    "1h 30m": None,
    "--1s": None,
    "+-1s": None,
    "1-s": None,
    "1s-1s": None,
    "1h30": None,
    "1..5s": None,
    "1.5.5s": None,
    "1,5s": None,
    "1e3s": None,
    "0x1s": None,
    "1_000s": None,
    "1sec": None,
    "1min": None,
    "1mss": None,
    "inf": None,
    "nan": None,
    "infs": None,
    "\u0661s": None,
    "\uff11s": None,
    "1\u00b5": None,
    "\x00": None,
    "1s\x00": None,
    "\x85\x85": None,
    "hello": None,
    "9223372036854775808ns": None,
    "9223372036854775810ns": None,
    "-9223372036854775809ns": None,
    "9223372036854776us": None,
    "9223372036854775.808us": None,
    "9223372036854ms775us808ns": None,
    "3000000h": None,
    "-3000000h": None,
    "1" + "0" * 400 + "s": None,
    "9" * 5_000 + "ns": None,
}


def is_close(seconds: float, ns: int) -> bool:
    return math.isclose(seconds, ns / 10**9, rel_tol=1e-15, abs_tol=1.5e-9)


@pytest.mark.parametrize(
    ("text", "ns"), DURATIONS.items(), ids=[ascii(text)[:40] for text in DURATIONS]
)
def test_duration(text: str, ns: int | None) -> None:
    assert go_duration(text) == ns, "the model of the test itself"
    if ns is not None:
        seconds = bus_containers.parse_duration(text)
        assert type(seconds) is float
        assert is_close(seconds, ns)
        return
    with pytest.raises(bus_containers.ConfigError) as caught:
        bus_containers.parse_duration(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1_000


def test_a_duration_without_a_unit_is_told_what_to_write() -> None:
    with pytest.raises(bus_containers.ConfigError, match="30s"):
        bus_containers.parse_duration("30")


def go_duration(text: str) -> int | None:
    """Go's time.ParseDuration, step by step as in its source, with its 64-bit arithmetic."""
    sign, rest = (text[0], text[1:]) if text[:1] in ("-", "+") else ("", text)
    if rest == "0":
        return 0
    if not rest:
        return None
    total = 0
    while rest:
        whole, rest, some = digits_of(rest)
        fraction, scale = 0, 1.0
        if whole > 2**63:
            return None
        if rest.startswith("."):
            after = rest[1:].lstrip("0123456789")
            digits = rest[1 : len(rest) - len(after)]
            rest, some = after, some or bool(digits)
            for digit in digits:
                if fraction > MOST // 10 or fraction * 10 + int(digit) > 2**63:
                    break
                fraction, scale = fraction * 10 + int(digit), scale * 10
        if not some:
            return None
        end = next((at for at, char in enumerate(rest) if char in ".0123456789"), len(rest))
        unit, rest = NS.get(rest[:end]), rest[end:]
        if unit is None or whole > 2**63 // unit:
            return None
        total += whole * unit + int(float(fraction) * (float(unit) / scale))
        if total > 2**63:
            return None
    if sign == "-":
        return -total
    return total if total <= MOST else None


def digits_of(text: str) -> tuple[int, str, bool]:
    rest = text.lstrip("0123456789")
    digits = text[: len(text) - len(rest)].lstrip("0")
    return (int(digits[:30]) if digits else 0), rest, len(rest) < len(text)


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


# --- no_proxy ---------------------------------------------------------------------------------

PROXY = "http://proxy.test:3128"
LABELS = ["a", "b", "api", "example", "test", "com", "internal", "1"]


def random_host(dice: random.Random) -> str:
    """A name, mostly, or an address, from a world so small that entries often hit."""
    kind = dice.random()
    if kind < 0.05:
        return dice.choice(["localhost", "127.0.0.1", "127.3.2.1", "::1"])
    if kind < 0.3:
        return f"10.{dice.randint(0, 1)}.{dice.randint(0, 1)}.{dice.randint(0, 3)}"
    if kind < 0.45:
        return f"2001:db8::{dice.randint(0, 2)}:{dice.randint(0, 3)}"
    return ".".join(dice.choices(LABELS[:-1], k=dice.randint(1, 4)))


def random_entry(dice: random.Random) -> str:
    host = random_host(dice)
    port = dice.choice(["", "", ":80", ":443", ":8080"])
    kind = dice.random()
    if kind < 0.01:
        return "*"
    if kind < 0.05:
        return dice.choice(["", ".1", "0.1", "1", "com.", "**", "a*"])
    if ":" in host:
        if kind < 0.4:
            return f"{host}/{dice.randint(60, 128)}"
        return f"[{host}]{port}" if port else host
    if host.replace(".", "").isdigit():
        return f"{host}/{dice.randint(0, 32)}" if kind < 0.4 else host + port
    entry = dice.choice(["", ".", "*."]) + host + port
    return entry.upper() if kind > 0.9 else entry


def go_goes_direct(host: str, port: int, no_proxy: str) -> bool:
    """Go's rules: golang.org/x/net/http/httpproxy, config.init and config.useProxy."""
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    for entry in no_proxy.split(","):
        name = entry.strip().lower()
        if name == "*":
            return True
        if "/" in name:
            if address is not None and address in ipaddress.ip_network(name, strict=False):
                return True
            continue
        if name.count(":") == 1 or name.startswith("["):
            name, _, only = name.rpartition(":")
            name = name.strip("[]")
            if only != str(port):
                continue
        try:
            if ipaddress.ip_address(name) == address:
                return True
        except ValueError:  # a name, which no address is matched with
            suffix = name[1:] if name.startswith("*.") else name
            both = suffix if suffix.startswith(".") else f".{suffix}"
            if suffix and address is None and (host.endswith(both) or host == suffix):
                return True
    return False


def test_random_no_proxy() -> None:
    dice = random.Random(5)
    direct = 0
    for _ in range(CASES):
        host = random_host(dice)
        scheme = dice.choice(["http", "https"])
        port = dice.choice([80, 443, 8080, None])
        netloc = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
        entries = [random_entry(dice) for _ in range(dice.randint(0, 4))]
        no_proxy = dice.choice([",", ", ", " ,"]).join(entries)
        name = dice.choice(["NO_PROXY", "no_proxy"])
        environ = {"HTTP_PROXY": PROXY, "https_proxy": PROXY, name: no_proxy}
        got = bus_containers.resolve_proxy(f"{scheme}://{netloc}/prefix", environ)
        effective = port or (443 if scheme == "https" else 80)
        expected = None if go_goes_direct(host, effective, no_proxy) else PROXY
        assert got == expected, (scheme, netloc, no_proxy)
        direct += got is None
    assert CASES // 10 < direct < CASES * 9 // 10, "the cases are not worth their time"


@pytest.mark.parametrize(
    ("url", "entry", "proxy"),
    [
        pytest.param("http://10.0.0.2:8080", "10.0.0.0/8:8080", None, id="block-with-port"),
        pytest.param("http://10.0.0.2:8081", "10.0.0.0/8:8080", PROXY, id="block-with-other-port"),
        pytest.param("http://10.0.0.2", "10.0.0.0/8:80", None, id="block-with-default-port"),
        pytest.param("http://a.test", "a.test:", None, id="empty-port"),
        pytest.param("http://a.test", "a.test:\u00b2", PROXY, id="superscript"),
        pytest.param("http://a.test", f"a.test:{5000 * '8'}", PROXY, id="endless-port"),
    ],
)
def test_a_block_may_have_a_port(url: str, entry: str, proxy: str | None) -> None:
    assert bus_containers.resolve_proxy(url, {"HTTP_PROXY": PROXY, "NO_PROXY": entry}) == proxy


# --- functions of their arguments alone -------------------------------------------------------


def test_the_settings_touch_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    before, folder = dict(os.environ), os.getcwd()
    monkeypatch.setattr(sys, "stdin", io.StringIO("not to be read"))
    environ = {"BUS_AI_TOKEN": "t0ken", "BUS_AI_API_URL": FIRST, "HTTP_PROXY": PROXY}
    kept = dict(environ)
    bus_containers.resolve_api_url(None, environ)
    bus_containers.resolve_token(None, environ)
    bus_containers.resolve_proxy(FIRST, environ)
    bus_containers.parse_duration("1h")
    assert (dict(os.environ), os.getcwd(), environ) == (before, folder, kept)
    assert sys.stdin.read() == "not to be read"
    assert capfdbinary.readouterr() == (b"", b"")
