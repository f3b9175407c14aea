# SPDX-License-Identifier: MIT
"""Proxies, with the rules of Go's golang.org/x/net/http/httpproxy (CONTRACT section 2).

`resolve_proxy` against a table; then the program through a real forward proxy, tinyproxy, which
finds the made-up host `platform.test` in an /etc/hosts of its own; then through proxies that
misbehave. Whatever a proxy does before there is a tunnel, no run was started.
"""

from __future__ import annotations

import base64
import gc
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import Program, Result
from hostile import (
    LIMIT,
    Certificates,
    Connection,
    Herd,
    Hostile,
    Script,
    answer,
    message,
    refused_port,
    spoken,
    together,
    why_no_namespace,
    why_no_openssl,
    with_files,
)

RUN = ("run", "--", "true")
RESULT = b'{"run_id":"run-1","exit_code":0,"stdout":"OK","stderr":""}'
USER, PASSWORD = "proxy-user", "pr0xy-pa55word"
Env = dict[str, "str | None"]

# --- which proxy, if any ----------------------------------------------------------------------

PROXY = "http://proxy.example:3128"


class Rule(NamedTuple):
    """A URL, the variables, and the proxy expected: PROXY, or None for a direct connection."""

    id: str
    url: str
    environ: dict[str, str]
    proxy: str | None = PROXY


def http(name: str, url: str, no_proxy: str, proxy: str | None = PROXY) -> Rule:
    return Rule(name, url, {"HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY, "NO_PROXY": no_proxy}, proxy)


def direct(name: str, url: str, no_proxy: str = "") -> Rule:
    return http(name, url, no_proxy, None)


OTHER = "http://other.example:8080"
RULES = [
    # the variables
    Rule("none-set", "http://a.example", {}, None),
    Rule("http", "http://a.example", {"HTTP_PROXY": PROXY}),
    Rule("http-not-for-https", "https://a.example", {"HTTP_PROXY": PROXY}, None),
    Rule("https", "https://a.example", {"HTTPS_PROXY": PROXY}),
    Rule("https-not-for-http", "http://a.example", {"HTTPS_PROXY": PROXY}, None),
    Rule("lower-case-http", "http://a.example", {"http_proxy": PROXY}),
    Rule("lower-case-https", "https://a.example", {"https_proxy": PROXY}),
    Rule("upper-first", "http://a.example", {"http_proxy": OTHER, "HTTP_PROXY": PROXY}),
    Rule("empty-is-unset", "http://a.example", {"HTTP_PROXY": "", "http_proxy": PROXY}),
    Rule("both-empty", "http://a.example", {"HTTP_PROXY": "", "http_proxy": ""}, None),
    Rule("all-proxy-is-unknown", "http://a.example", {"ALL_PROXY": PROXY}, None),
    Rule(
        "no-proxy-upper-first",
        "http://a.example",
        {"HTTP_PROXY": PROXY, "NO_PROXY": "b.example", "no_proxy": "a.example"},
    ),
    Rule(
        "no-proxy-empty-is-unset",
        "http://a.example",
        {"HTTP_PROXY": PROXY, "NO_PROXY": "", "no_proxy": "a.example"},
        None,
    ),
    # a server that runs this as a CGI script must not let its client choose the proxy
    Rule("cgi-http", "http://a.example", {"HTTP_PROXY": PROXY, "REQUEST_METHOD": "GET"}, None),
    Rule("cgi-lower", "http://a.example", {"http_proxy": PROXY, "REQUEST_METHOD": "GET"}, None),
    Rule("cgi-https", "https://a.example", {"HTTPS_PROXY": PROXY, "REQUEST_METHOD": "GET"}),
    Rule("cgi-empty", "http://a.example", {"HTTP_PROXY": PROXY, "REQUEST_METHOD": ""}),
    # the proxy's own spelling
    Rule("no-scheme", "http://a.example", {"HTTP_PROXY": "proxy.example:3128"}),
    Rule("no-scheme-address", "http://a.example", {"HTTP_PROXY": "127.0.0.1:8080"},
         "http://127.0.0.1:8080"),
    Rule("no-scheme-bare-name", "http://a.example", {"HTTP_PROXY": "proxy"}, "http://proxy"),
    Rule("no-scheme-localhost", "http://a.example", {"HTTP_PROXY": "localhost:3128"},
         "http://localhost:3128"),
    Rule("userinfo", "http://a.example", {"HTTP_PROXY": "http://u:p@proxy.example:3128"},
         "http://u:p@proxy.example:3128"),
    Rule("userinfo-no-scheme", "http://a.example", {"HTTP_PROXY": "u:p@proxy.example:3128"},
         "http://u:p@proxy.example:3128"),
    Rule("ipv6-proxy", "http://a.example", {"HTTP_PROXY": "http://[::1]:3128"},
         "http://[::1]:3128"),
    # loopback is always direct
    direct("localhost", "http://localhost:8080"),
    direct("localhost-https", "https://localhost"),
    direct("localhost-capitals", "http://LocalHost:8080"),
    direct("127.0.0.1", "http://127.0.0.1:8080"),
    direct("127.8.9.10", "http://127.8.9.10"),
    direct("ipv6-loopback", "http://[::1]:8080"),
    direct("ipv6-loopback-long", "http://[0:0:0:0:0:0:0:1]:8080"),
    direct("ipv6-mapped-loopback", "http://[::ffff:127.0.0.1]"),
    direct("127.1", "http://127.1:8080"),
    http("ipv6-not-loopback", "http://[::2]", ""),
    http("localhost-as-prefix", "http://localhost.example", ""),
    http("private-is-not-loopback", "http://10.0.0.1", ""),
    # names
    direct("name", "http://example.com", "example.com"),
    direct("name-covers-subdomains", "http://a.b.example.com", "example.com"),
    http("name-is-no-suffix-of-a-label", "http://notexample.com", "example.com"),
    http("part-of-a-name", "http://example.com", "ample.com"),
    http("name-covers-no-parent", "http://example.com", "sub.example.com"),
    direct("suffix", "http://sub.example.com", ".example.com"),
    http("suffix-is-not-the-name", "http://example.com", ".example.com"),
    direct("wildcard", "http://sub.example.com", "*.example.com"),
    direct("wildcard-deep", "http://a.b.example.com", "*.example.com"),
    http("wildcard-is-not-the-name", "http://example.com", "*.example.com"),
    http("wildcard-is-no-glob", "http://sub.example.com", "s*.example.com"),
    direct("case-of-entry", "http://example.com", "EXAMPLE.Com"),
    direct("case-of-host", "http://Sub.Example.COM", "example.com"),
    direct("bare-name", "http://platform:8080", "platform"),
    direct("all", "http://example.com", "*"),
    direct("all-in-a-list", "http://example.com", "a.example, *"),
    direct("all-and-addresses", "https://[2001:db8::1]", "*"),
    http("all-only-alone", "http://example.com", "**"),
    # lists
    direct("list", "http://example.com", "a.example,example.com,b.example"),
    direct("blanks", "http://example.com", "  a.example ,\texample.com  , "),
    http("blanks-do-not-separate", "http://example.com", "a.example example.com b.example"),
    http("empty-entries", "http://example.com", ",,  ,"),
    http("no-host", "http://example.com", ":80,:1"),
    # ports
    direct("port", "http://example.com:8080", "example.com:8080"),
    http("other-port", "http://example.com:8081", "example.com:8080"),
    direct("default-port-of-http", "http://example.com", "example.com:80"),
    direct("default-port-of-https", "https://example.com", "example.com:443"),
    http("port-80-is-not-https", "https://example.com", "example.com:80"),
    direct("no-port-is-any-port", "http://example.com:9", "example.com"),
    direct("suffix-with-port", "http://a.example.com:8080", ".example.com:8080"),
    http("suffix-with-other-port", "http://a.example.com", ".example.com:8080"),
    direct("wildcard-with-port", "http://a.example.com:8080", "*.example.com:8080"),
    # addresses
    direct("ipv4", "http://192.168.1.1", "192.168.1.1"),
    http("other-ipv4", "http://192.168.1.10", "192.168.1.1"),
    direct("ipv4-with-port", "http://192.168.1.1:81", "192.168.1.1:81"),
    http("ipv4-with-other-port", "http://192.168.1.1:80", "192.168.1.1:81"),
    direct("ipv6", "http://[2001:db8::52:0:1]", "2001:db8::52:0:1"),
    direct("ipv6-another-spelling", "http://[2001:DB8:0:0:0:52:0:1]", "2001:db8::52:0:1"),
    http("other-ipv6", "http://[2001:db8::52:0:2]", "2001:db8::52:0:1"),
    direct("ipv6-with-port", "https://[2001:db8::1]:8443", "[2001:db8::1]:8443"),
    direct("ipv6-with-default-port", "https://[2001:db8::1]", "[2001:db8::1]:443"),
    http("ipv6-with-other-port", "https://[2001:db8::1]", "[2001:db8::1]:80"),
    # blocks
    direct("cidr", "http://10.200.3.4", "10.0.0.0/8"),
    http("outside-cidr", "http://11.0.0.1", "10.0.0.0/8"),
    direct("cidr-with-host-bits", "http://10.0.0.2", "10.0.0.1/30"),
    http("outside-small-cidr", "http://10.0.0.4", "10.0.0.0/30"),
    direct("cidr-any-port", "http://10.0.0.2:8080", "10.0.0.0/30"),
    direct("cidr-of-one", "http://10.0.0.2", "10.0.0.2/32"),
    direct("cidr-of-all-ipv4", "http://203.0.113.5", "0.0.0.0/0"),
    http("cidr-of-all-ipv4-is-not-ipv6", "http://[2001:db8::1]", "0.0.0.0/0"),
    direct("cidr-ipv6", "http://[2002:db8:a::123]", "2002:db8:a::45/64"),
    http("outside-cidr-ipv6", "http://[2002:db8:b::123]", "2002:db8:a::45/64"),
    http("cidr-never-resolves-names", "http://ten.example", "10.0.0.0/8"),
    http("cidr-cut-short", "http://10.0.0.1", "10.0.0.0/33"),
    direct("mapped-address-in-cidr", "http://[::ffff:10.0.0.1]", "10.0.0.0/8"),
    direct("prefix-in-the-url", "http://example.com/CAP/v1", "example.com"),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=[rule.id for rule in RULES])
def test_resolve_proxy(rule: Rule) -> None:
    import bus_containers

    assert bus_containers.resolve_proxy(rule.url, rule.environ) == rule.proxy


def test_resolve_proxy_does_not_look_at_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import bus_containers

    monkeypatch.setenv("HTTP_PROXY", PROXY)
    assert bus_containers.resolve_proxy("http://a.example", {}) is None


@pytest.mark.parametrize(
    "value",
    [
        "socks5://proxy.example:1080",
        "ftp://proxy.example",
        "http://",
        "http://proxy.example:port",
        "http://proxy.example:99999",
        "http://[::1",
        "http://proxy example:80",
    ],
)
def test_a_proxy_that_cannot_be_used_is_told(value: str) -> None:
    import bus_containers

    with pytest.raises(bus_containers.ConfigError, match="HTTP_PROXY"):
        bus_containers.resolve_proxy("http://a.example", {"HTTP_PROXY": value})


# --- the program, and what holds for everything it says ---------------------------------------


class Proxied(Program):
    """The program; nothing it prints may hold the token or a proxy's user and password."""

    def __call__(self, *args: Any, **options: Any) -> Result:
        result = super().__call__(*args, **options)
        both = f"{USER}:{PASSWORD}".encode()
        secrets = (USER.encode(), PASSWORD.encode(), base64.b64encode(both)[:-4])
        for secret in (*secrets, self.environ["BUS_AI_TOKEN"].encode()):
            assert secret not in result.out + result.err
        return result


@pytest.fixture(scope="module")
def cli(command: list[str], tmp_path_factory: pytest.TempPathFactory, canary: str) -> Proxied:
    program = Proxied(command, tmp_path_factory.mktemp("home"))
    program.environ["BUS_AI_TOKEN"] = canary
    return program


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if why_no_openssl():
        pytest.skip(why_no_openssl())
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An /etc/hosts that knows `platform.test`."""
    path = tmp_path_factory.mktemp("etc") / "hosts"
    path.write_text("127.0.0.1 localhost platform.test\n")
    return path


def refused(result: Result, code: int, *says: str, verbose: bool = False) -> str:
    """Check a failure before any run; `says` are patterns in the message."""
    told = spoken(result.err)
    assert result.code == code, told.text
    assert result.out == b""
    assert len(told.errors) == 1 or verbose, told.text
    for pattern in says:
        assert re.search(pattern, told.errors[-1], re.I), (pattern, told.text)
    assert not told.advises, told.text
    return told.text


VERBOSE = pytest.mark.parametrize(
    "verbosity", [(), ("-vv",), ("--trace",)], ids=["", "vv", "trace"]
)


# --- a real forward proxy ---------------------------------------------------------------------


def why_no_tinyproxy() -> str:
    where = shutil.which("tinyproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
    return why_no_namespace() if where else "no tinyproxy (Debian: apt-get install tinyproxy)"


needs_tinyproxy = pytest.mark.skipif(bool(why_no_tinyproxy()), reason=why_no_tinyproxy())


class TinyProxy:
    """A tinyproxy on loopback that has its own idea of /etc/hosts."""

    def __init__(self, folder: Path, hosts: Path, *settings: str) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port: int = sock.getsockname()[1]
        self.log = folder / "log"
        conf = folder / "conf"
        lines = [
            f"Port {self.port}",
            "Listen 127.0.0.1",
            "Timeout 30",
            "MaxClients 20",
            f'LogFile "{self.log}"',
            "LogLevel Connect",
            *settings,
        ]
        conf.write_text("".join(f"{line}\n" for line in lines))
        command = ["tinyproxy", "-d", "-c", str(conf)]
        self._process = subprocess.Popen(
            with_files(command, {"/etc/hosts": hosts}), stdout=subprocess.DEVNULL
        )

    def url(self, user: str = "", password: str = "") -> str:
        userinfo = f"{user}:{password}@" if user else ""
        return f"http://{userinfo}127.0.0.1:{self.port}"

    def __enter__(self) -> TinyProxy:
        end = time.monotonic() + LIMIT
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), LIMIT).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(LIMIT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, hosts: Path) -> Iterator[TinyProxy]:
    with TinyProxy(tmp_path_factory.mktemp("tinyproxy"), hosts) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, hosts: Path) -> Iterator[TinyProxy]:
    folder = tmp_path_factory.mktemp("guarded")
    with TinyProxy(folder, hosts, f"BasicAuth {USER} {PASSWORD}") as proxy:
        yield proxy


@pytest.fixture(params=["http", "https"])
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def platform(scheme: str, certificates: Certificates) -> Iterator[Hostile]:
    """A platform that answers each run; by TLS it is `platform.test`."""
    context = certificates.context(certificates.good) if scheme == "https" else None
    with Hostile(answer(RESULT), tls=context) as server:
        yield server


def through(proxy: str, certificates: Certificates) -> Env:
    ca = str(certificates.ca)
    return {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "SSL_CERT_FILE": ca}


@needs_tinyproxy
@pytest.mark.parametrize("prefix", ["", "/CAP/v1"], ids=["origin", "prefix"])
def test_a_run_through_a_proxy(
    cli: Proxied,
    tiny: TinyProxy,
    platform: Hostile,
    certificates: Certificates,
    scheme: str,
    prefix: str,
    canary: str,
) -> None:
    url = f"{scheme}://platform.test:{platform.port}{prefix}"
    result = cli("--api-url", url, *RUN, env=through(tiny.url(), certificates))
    assert (result.code, result.err) == (0, b"")
    assert b'"stdout": "OK"' in result.out
    (request,) = platform.requests
    assert request.startswith(f"POST {prefix}/api/v1/containers/runs HTTP/1.1\r\n".encode())
    assert f"\r\nHost: platform.test:{platform.port}\r\n".encode() in request
    assert f"\r\nAuthorization: Bearer {canary}\r\n".encode() in request
    assert (b"\r\nVia: " in request) == (scheme == "http")
    if scheme == "https":
        assert f"CONNECT platform.test:{platform.port} " in tiny.log.read_text()
    assert canary not in tiny.log.read_text()


@needs_tinyproxy
@VERBOSE
def test_a_run_through_a_proxy_that_wants_a_password(
    cli: Proxied,
    guarded: TinyProxy,
    platform: Hostile,
    certificates: Certificates,
    scheme: str,
    verbosity: tuple[str, ...],
) -> None:
    url = f"{scheme}://platform.test:{platform.port}"
    env = through(guarded.url(USER, PASSWORD), certificates)
    result = cli(*verbosity, "--api-url", url, *RUN, env=env)
    assert result.code == 0, result.message
    (request,) = platform.requests
    assert b"proxy-authorization" not in request.lower()


@needs_tinyproxy
@VERBOSE
@pytest.mark.parametrize("userinfo", [("", ""), (USER, "wrong"), ("nobody", PASSWORD)])
def test_a_proxy_that_refuses_the_password(
    cli: Proxied,
    guarded: TinyProxy,
    platform: Hostile,
    certificates: Certificates,
    scheme: str,
    userinfo: tuple[str, str],
    verbosity: tuple[str, ...],
) -> None:
    url = f"{scheme}://platform.test:{platform.port}"
    env = through(guarded.url(*userinfo), certificates)
    result = cli(*verbosity, "--api-url", url, *RUN, env=env)
    # To a wrong password tinyproxy says 407, up to 1.11.1 it says 401: no reason for a new token.
    says = ("proxy", "40[17]" if userinfo[0] else "407")
    text = refused(result, 125, *says, verbose=bool(verbosity))
    assert "wrong" not in text and "nobody" not in text
    if not verbosity:
        refused(cli("--api-url", url, "status", env=env), 1, *says)
    assert platform.connections == 0


@needs_tinyproxy
def test_a_proxy_that_cannot_reach_the_platform(
    cli: Proxied, tiny: TinyProxy, certificates: Certificates, scheme: str
) -> None:
    env = through(tiny.url(), certificates)
    with refused_port() as port:
        result = cli("-v", "--api-url", f"{scheme}://platform.test:{port}", *RUN, env=env)
    told = spoken(result.err)
    assert result.code == 125
    assert result.out == b""
    assert re.search(r"proxy http://127\.0\.0\.1", told.errors[-1]), told.text
    assert re.search(r"\b50[0-4]\b", told.errors[-1]), told.text
    if scheme == "https":  # by http, a 5xx may be the platform's just as well
        assert not told.advises


@needs_tinyproxy
def test_a_certificate_is_checked_through_the_tunnel(
    cli: Proxied, tiny: TinyProxy, certificates: Certificates
) -> None:
    env = through(tiny.url(), certificates)
    context = certificates.context(certificates.wrong_host)
    with Hostile(answer(RESULT), tls=context) as server:
        url = f"https://platform.test:{server.port}"
        refused(cli("--api-url", url, *RUN, env=env), 125, "certificate", r"platform\.test")
    assert server.requests == []


class Bypass(NamedTuple):
    """Variables with which `platform.test` is reached without the proxy; PROXY is a dead one."""

    id: str
    env: Env


BYPASS = [
    Bypass("name", {"HTTP_PROXY": "PROXY", "NO_PROXY": "platform.test"}),
    Bypass("suffix-and-port", {"HTTP_PROXY": "PROXY", "NO_PROXY": "x.y, .test:PORT"}),
    Bypass("lower-case", {"http_proxy": "PROXY", "no_proxy": "*"}),
    Bypass("cgi", {"HTTP_PROXY": "PROXY", "REQUEST_METHOD": "POST"}),
    Bypass("https-only", {"HTTPS_PROXY": "PROXY"}),
]


@pytest.mark.skipif(bool(why_no_namespace()), reason=why_no_namespace())
@pytest.mark.parametrize("case", BYPASS, ids=[case.id for case in BYPASS])
def test_a_proxy_that_is_bypassed(case: Bypass, cli: Proxied, hosts: Path) -> None:
    program = Proxied(with_files(cli.command, {"/etc/hosts": hosts}), cli.home)
    program.environ.update(cli.environ)
    with Hostile(answer(RESULT)) as server, refused_port() as dead:
        words = {"PROXY": f"http://127.0.0.1:{dead}", "PORT": str(server.port)}
        env: Env = {
            name: re.sub("PROXY|PORT", lambda word: words[word[0]], value or "")
            for name, value in case.env.items()
        }
        result = program("--api-url", f"http://platform.test:{server.port}", *RUN, env=env)
    assert result.code == 0, result.message
    assert len(server.requests) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "LOCALHOST"])
def test_loopback_is_direct(cli: Proxied, host: str) -> None:
    with Hostile(answer(RESULT)) as server, refused_port() as dead:
        env: Env = {"HTTP_PROXY": f"http://127.0.0.1:{dead}"}
        result = cli("--api-url", f"http://{host}:{server.port}", *RUN, env=env)
    assert result.code == 0, result.message
    assert server.requests[0].startswith(b"POST /api/v1/")


def test_a_proxy_that_is_down(cli: Proxied, scheme: str) -> None:
    import bus_containers

    def library() -> Any:
        environ = {"BUS_AI_API_URL": url, "BUS_AI_TOKEN": "x" * 20, **env}
        with pytest.raises(bus_containers.TransportError) as caught:
            bus_containers.Client.from_env(environ).run(["true"])
        return caught.value

    with refused_port() as dead:
        proxy = f"http://{USER}:{PASSWORD}@127.0.0.1:{dead}"
        env = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy}
        url = f"{scheme}://platform.test"
        result, error = together(lambda: cli("-vv", "--api-url", url, *RUN, env={**env}), library)
    refused(result, 125, "proxy", "refused", str(dead), verbose=True)
    assert error.run_state == "not_sent"
    assert USER not in str(error) + repr(error)


# --- proxies that misbehave -------------------------------------------------------------------


def after_head(data: bytes) -> Script:
    def script(connection: Connection) -> None:
        connection.server.requests.append(connection.read_head())
        connection.send(data)

    return script


def reset_connect(connection: Connection) -> None:
    connection.read_head()
    connection.reset()


class Refusal(NamedTuple):
    """What a proxy makes of a CONNECT."""

    id: str
    script: Script
    says: str = "proxy|HTTP|TLS"


HTML = b"<html><head><title>Blocked by policy</title></head><body><h1>No</h1></body></html>"
REFUSALS = [
    *(
        Refusal(status[:3], after_head(message(HTML, status)), f"proxy .*{status[:3]}")
        for status in (
            "301 Moved Permanently", "400 Bad Request", "401 Unauthorized", "403 Forbidden",
            "404 Not Found", "407 Proxy Authentication Required", "429 Too Many Requests",
            "500 Internal Error", "502 Bad Gateway", "503 Unavailable", "504 Gateway Timeout",
        )
    ),
    Refusal("drives-a-terminal", after_head(b"HTTP/1.1 403 \x1b[2J\x9b31mNo\r\n\r\n"), "403"),
    Refusal("closed", after_head(b"")),
    Refusal("reset", reset_connect),
    Refusal("ssh", after_head(b"SSH-2.0-OpenSSH_9.2p1\r\n")),
    Refusal("nul-bytes", after_head(b"\0" * 100)),
    Refusal("head-cut", after_head(b"HTTP/1.1 200 OK\r\nVia:")),
    Refusal("line-too-long", after_head(b"HTTP/1.1 200 OK\r\nVia: " + b"x" * 70_000)),
    Refusal("no-tls-behind-it", after_head(b"HTTP/1.1 200 OK\r\n\r\nhello\r\n"), "TLS"),
    Refusal("closed-behind-it", after_head(b"HTTP/1.1 200 OK\r\n\r\n"), ""),
]  # fmt: skip


@pytest.fixture(scope="module")
def refusals(
    cli: Proxied, canary: str
) -> Iterator[Herd[Refusal, tuple[Result, str, str, Hostile]]]:
    """What the command line and the library make of each."""
    import bus_containers

    def work(case: Refusal) -> tuple[Result, str, str, Hostile]:
        with Hostile(case.script) as server:
            env = {"HTTPS_PROXY": server.url.replace("//", f"//{USER}:{PASSWORD}@")}
            environ = {"BUS_AI_API_URL": "https://platform.test", "BUS_AI_TOKEN": canary, **env}
            result = cli("-vv", "--api-url", "https://platform.test", *RUN, env={**env})
            try:
                bus_containers.Client.from_env(environ).run(["true"])
            except bus_containers.BusContainersError as error:
                said, run_state = f"{error} {error!r} {error.args!r}", str(error.run_state)
        return result, said, run_state, server

    with Herd(work, REFUSALS) as herd:
        yield herd


@pytest.mark.parametrize("case", REFUSALS, ids=[case.id for case in REFUSALS])
def test_no_run_was_started_where_the_proxy_gave_no_tunnel(
    case: Refusal, refusals: Herd[Refusal, tuple[Result, str, str, Hostile]], canary: str
) -> None:
    result, said, run_state, server = refusals.outcome(case)
    refused(result, 125, case.says, verbose=True)
    assert server.connections <= 6  # three of each
    assert run_state in ("not_sent", "refused")
    for word in (USER, PASSWORD, canary):
        assert word not in said
    for request in server.requests:
        assert request.startswith(b"CONNECT platform.test:443 HTTP/1.")
        assert canary.encode() not in request


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("https://platform.test", b"CONNECT platform.test:443 "),
        ("https://platform.test:8443/CAP/v1", b"CONNECT platform.test:8443 "),
        ("https://203.0.113.5", b"CONNECT 203.0.113.5:443 "),
        ("https://[2001:db8::1]", b"CONNECT [2001:db8::1]:443 "),
        ("https://[2001:db8::1]:8443", b"CONNECT [2001:db8::1]:8443 "),
        ("http://platform.test", b"POST http://platform.test/api/v1/containers/runs "),
        ("http://platform.test:81/x", b"POST http://platform.test:81/x/api/v1/containers/runs "),
        ("http://[fd00::1]:81", b"POST http://[fd00::1]:81/api/v1/containers/runs "),
    ],
)
def test_what_a_proxy_is_asked_for(cli: Proxied, url: str, line: bytes, canary: str) -> None:
    def script(connection: Connection) -> None:
        head = connection.read_head()
        connection.server.requests.append(head)
        if not head.startswith(b"CONNECT"):
            connection.read_request()
        connection.send(message(b"", "403 Forbidden"))

    with Hostile(script) as server:
        proxy = server.url.replace("//", "//us%40er:p%3Aw%20d@")
        result = cli("--api-url", url, *RUN, env={"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy})
    refused(result, 125, "403")
    head = server.requests[0]
    assert head.startswith(line)
    credentials = base64.b64encode(b"us@er:p:w d")
    assert b"\r\nproxy-authorization: basic " + credentials.lower() in head.lower()
    assert credentials in head
    assert (canary.encode() in head) == url.startswith("http:")
    if url.startswith("http:"):
        host = url.split("/")[2].encode()
        assert b"\r\nHost: " + host + b"\r\n" in head


def test_a_connection_lost_behind_the_tunnel_leaves_the_run_unknown(
    cli: Proxied, certificates: Certificates
) -> None:
    def script(connection: Connection) -> None:
        connection.read_head()
        connection.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        connection.start_tls(certificates.context(certificates.good))
        connection.read_request()

    with Hostile(script) as server:
        env: Env = {"HTTPS_PROXY": server.url, "SSL_CERT_FILE": str(certificates.ca)}
        result = cli("--api-url", "https://platform.test", *RUN, env=env)
    told = spoken(result.err)
    assert result.code == 125
    assert told.advises, told.text
    assert len(server.requests) == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc to count files in")
def test_a_refused_tunnel_leaves_no_socket_behind(canary: str) -> None:
    """Not even until the garbage collector comes: a process may refuse to wait for it."""
    import bus_containers

    def call(proxy: str) -> None:
        environ = {"BUS_AI_API_URL": "https://platform.test", "BUS_AI_TOKEN": canary}
        try:
            bus_containers.Client.from_env({**environ, "HTTPS_PROXY": proxy}).run(["true"])
        except bus_containers.BusContainersError:
            return
        pytest.fail("there was no tunnel")

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    scripts = [case.script for case in REFUSALS if case.id in ("403", "407", "502")]
    gc.collect()
    gc.disable()
    try:
        before = files()
        for script in scripts:
            with Hostile(script) as server:
                call(server.url)
        assert files() == before
    finally:
        gc.enable()
