# SPDX-License-Identifier: MIT
"""Command line and library for the container runs of the AI Platform.

Three ways to run it, one behaviour:

    bus-containers run -- codex --version                   installed by pip
    python bus_containers.pyz run -- codex --version        the zipapp, nothing installed
    python bus_containers.py run -- codex --version         this file, vendored anywhere

As a library it never prints, exits, reads `sys.argv` or touches a signal handler.
Public names: `Client`, `main`, the pure functions `resolve_api_url`, `resolve_token`,
`resolve_proxy` and `parse_duration`, and the errors:

    BusContainersError          everything that is raised on purpose; carries `run_state`
    +-- ConfigError             a URL, token or value that cannot be used; nothing was sent
    +-- TransportError          no answer, or not a whole one
    |   +-- DeadlineError       not within the time given
    +-- ProtocolError           an answer that cannot be used
    +-- ApiError                the API, or what stands before it, said no

Exit codes: 0 success; 2 usage error, nothing sent; 1 any other failure of `status`, `runs` and
`delete`; 125 any other failure of `run`, else the container's own exit code; 130 interrupted;
143 terminated.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
import time

TYPE_CHECKING = False  # what typing calls so, without the cost of importing typing
if TYPE_CHECKING:
    # ruff: noqa: E401, I001
    import argparse, base64, functools, ipaddress, json, re, socket, ssl, threading
    import http.client as http_client, urllib.error as urllib_error
    import urllib.parse as urllib_parse, urllib.request as urllib_request
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn, TextIO

    Document = dict[str, Any]
    _Kind = type["BusContainersError"]
else:

    class _Late:
        """Stands for a module until it is used: `--version` needs none of these, each costs."""

        def __init__(self, name):
            self._name = name

        def __getattr__(self, attribute):
            __import__(self._name)
            module = globals()[self._name.replace(".", "_")] = sys.modules[self._name]
            return getattr(module, attribute)

    globals().update({name.replace(".", "_"): _Late(name) for name in [
        "argparse", "base64", "functools", "http.client", "ipaddress", "json", "re", "socket",
        "ssl", "threading", "urllib.error", "urllib.parse", "urllib.request"]})

__all__ = [
    "ApiError", "BusContainersError", "Client", "ConfigError", "DeadlineError", "ProtocolError",
    "TransportError", "main", "parse_duration", "resolve_api_url", "resolve_proxy", "resolve_token",
]
__version__ = "1.0.0"

# ---- Constants ------------------------------------------------------------------------------

_PROGRAM = "bus-containers"
_API_PATH = "/api/v1/containers"
_DEFAULT_API_URL = "https://ai.hg.fi"
_DEFAULT_PROFILE = "codex"
_AUDIENCE = "ai.hg.fi/api"
_SCOPES = {"GET": "container:read", "POST": "container:run", "DELETE": "container:delete"}
_NEW_TOKEN = f'make one with: bus auth token --scope "{" ".join(_SCOPES.values())} billing:read"'

_URL_VARIABLES = ("BUS_AI_API_URL", "BUS_API_BASE_URL")
_TOKEN_VARIABLES = ("BUS_AI_TOKEN", "BUS_API_TOKEN")
# Where the config directory is, below what the variable says; the first that is set counts.
_CONFIG_PLACES = {"BUS_CONFIG_DIR": "", "XDG_CONFIG_HOME": "bus", "HOME": ".config/bus"}

_TIMEOUT_SECONDS = 30.0
_RUN_TIMEOUT_SECONDS = 1800.0  # runs of half an hour are normal
_RUN_MARGIN_SECONDS = 30.0  # on top of --timeout-seconds: a cold start, and the answer's way back
_MAX_SECONDS = 10**15  # more than Go's longest duration, and few enough for a float
_ENDLESS_SECONDS = 2_000_000.0  # poll(2) counts milliseconds in an int: 24.8 days
_RETRY_PAUSES_SECONDS = (0.3, 0.7)  # about a second in all
_RETRY_STATUSES = (502, 503, 504)  # a gateway's word for a backend that is not up
_TICK_SECONDS = 0.2  # a signal that comes just before a wait is seen at its end
_WAIT_PAUSE_SECONDS = 2.0  # the longest between two looks of `status --wait`
# Before NAT forgets an idle connection; TCP_KEEPALIVE is what macOS calls TCP_KEEPIDLE.
_KEEPALIVE_SECONDS = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 15}

_MAX_TOKEN_BYTES = 64 * 1024
_MAX_BODY_BYTES = 1 << 30  # more than a container may print
_MAX_DEPTH = 200  # of a document; every Python can write again what is no deeper
_MAX_QUOTED = 300  # characters of a server's text in one message
_IO_BYTES = 1024 * 1024  # large bodies and results go in pieces of this size

# As in NO_PROXY: the hosts that need no proxy, and those to which plain http is no great risk.
_LOOPBACK = "localhost,127.0.0.0/8,::1"
_PRIVATE = _LOOPBACK + ",.local,.internal,.test,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16"
_PRIVATE += ",169.254.0.0/16,fc00::/7,fe80::/10"
# Plain http to one label, as in a compose file, or to loopback, told without the cost of ipaddress.
_NEAR_URL = r"http://([A-Za-z_][^.:/]*|127\.0\.0\.1|\[::1\])(:[0-9]+)?(/|$)"

_LABEL = "[0-9A-Za-z_-]{1,63}"
_BASE_URL = rf"(?i:https?)://({_LABEL}(\.{_LABEL})*\.?|\[(?P<v6>[0-9A-Fa-f:.]+)\])"
_BASE_URL += r"(:(?P<port>[0-9]{1,9}))?(/[!-\"$->@-~]*)?"
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROLS.update({9: "\\t", 10: "\\n", 13: "\\r"})

_PROXY_URL = "http://[USER:PASSWORD@]HOST[:PORT]"
_RUN_ADVICE = "the run may still be executing and counting against the quota: look with"
_RUN_ADVICE += f" `{_PROGRAM} runs`, end it with `{_PROGRAM} delete RUN_ID`"


def _visible(text: str) -> str:
    """Text from outside for a message or a table, where it must not drive the terminal."""
    return text if text.isprintable() else text.translate(_CONTROLS)


def _quoted(text: str) -> str:
    """`_visible`, and no longer than a message can bear."""
    return _visible(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")


def _about(seconds: float) -> str:
    """A length of time as a person says it: `1.5 s`, `45 min`, `3 h`, `2 d`."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"

# ---- Errors ---------------------------------------------------------------------------------

class BusContainersError(Exception):
    """Base of every error raised on purpose. Its text says what failed, where, and what next.

    `retryable` is whether the same call may succeed later, and starts no second run; `run_state`,
    for the error of a run, `not_sent`, `refused` (3xx, 4xx), `unknown` or `finished`.
    """

    run_state: str | None = None

    def __init__(self, text: str, retryable: bool = False) -> None:
        super().__init__(text)
        self.retryable = retryable

    def __str__(self) -> str:
        return super().__str__() + (f"; {_RUN_ADVICE}" if self.run_state == "unknown" else "")


class ConfigError(BusContainersError):
    """A URL, token or value that cannot be used. Nothing was sent."""

    run_state = "not_sent"


class _UsageError(ConfigError):
    """The caller wrote something wrong, on the command line or in a variable: exit code 2."""


class TransportError(BusContainersError):
    """The request could not be sent, or its answer did not arrive whole."""


class DeadlineError(TransportError):
    """The whole exchange did not end within its time."""


class ProtocolError(BusContainersError):
    """An answer that cannot be used: no HTTP, no JSON, or not of the expected shape."""


class ApiError(BusContainersError):
    """An HTTP status other than 2xx. `status` is the number, `document` the answer if it is JSON.

    From the document, each a string or None: `type`, the server's word for the error; `message`,
    its sentence about it; `action`, what it advises; `command`, the command that does so.
    """

    def __init__(self, text: str, status: int, document: Any = None) -> None:
        super().__init__(text, status in _RETRY_STATUSES)
        self.status, self.document = status, document
        error = document.get("error", document) if isinstance(document, dict) else None
        self.message = error if isinstance(error, str) else _field(error, "message")
        names = ("type", "action", "command")
        self.type, self.action, self.command = (_field(error, name) for name in names)


class _OutputError(BusContainersError):
    """A result that cannot be written. Without a text: its reader went away."""


def _field(fields: Any, name: str, kind: Any = str) -> Any:
    """A field of an object, or None unless it is of this kind and no blank text."""
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if isinstance(value, kind) and str(value).strip() else None


def _reason(error: object) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__

# ---- Settings: functions of their arguments alone ---------------------------------------------

def resolve_api_url(flag: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the API's base URL, without a slash at its end, and the name of its source.

    The first that is set wins: `flag`, `BUS_AI_API_URL`, `BUS_API_BASE_URL`, the default.
    Raises ConfigError, which names the source, for all but an origin and a path prefix.
    """
    candidates = [("--api-url", flag)] if flag is not None else []
    candidates += [(name, environ[name]) for name in _URL_VARIABLES if environ.get(name)]
    source, url = (candidates or [("default", _DEFAULT_API_URL)])[0]
    shown, hint = _redacted_url(url), ""
    if "://" not in url:
        hint = f": write https://{shown}, or http://{shown} for plain HTTP"
    elif f"{_API_PATH}/" in f"{url}/":
        hint = f": give the API's origin, without {_API_PATH}"
    if hint or not _is_base_url(url):
        form = "http[s]://HOST[:PORT][/PREFIX], in ASCII, without user, query or fragment"
        raise _UsageError(f"{source}: {shown!r} is not {form}{hint}")
    scheme, _, rest = url.partition("://")
    return f"{scheme.lower()}://{rest.rstrip('/')}", source


def _is_base_url(url: str) -> bool:
    """Whether a URL is an origin with a path prefix, of an address and a port that there can be."""
    match = re.fullmatch(_BASE_URL, url)
    try:
        if match and match["v6"]:
            ipaddress.IPv6Address(match["v6"])
        return match is not None and 0 < int(match["port"] or 80) < 65536
    except ValueError:
        return False


def _redacted_url(url: str) -> str:
    """A URL for a message: without all before an @, and without what a query or fragment says."""
    url = re.sub("^([a-z]+://)?.*@", r"\1***@", url, flags=re.IGNORECASE | re.DOTALL)
    return _quoted(re.sub("([?#]).+", r"\1***", url, flags=re.DOTALL))


def resolve_token(path: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the bearer token and the name of its source.

    The first that is set wins: the file `path` (`-` is standard input), `BUS_AI_TOKEN`,
    `BUS_API_TOKEN`, the file `auth/api-token` in the config directory (`BUS_CONFIG_DIR`,
    `$XDG_CONFIG_HOME/bus`, `~/.config/bus`). Raises ConfigError, which never holds any of it.
    """
    if path is not None:
        return _read_token(path)
    for name in _TOKEN_VARIABLES:
        if environ.get(name):
            return _checked_token(environ[name], name), name
    home = next((name for name in _CONFIG_PLACES if environ.get(name)), None)
    places = ", ".join(("--token-file", *_TOKEN_VARIABLES))
    if home is None:
        raise ConfigError(f"no token: looked at {places}; HOME is not set; {_NEW_TOKEN}", True)
    path = os.path.join(environ[home], _CONFIG_PLACES[home], "auth", "api-token")
    return _read_token(path, f"looked at {places}, {path}")


def _read_token(path: str, missing: str = "") -> tuple[str, str]:
    name = "standard input" if path == "-" else path or "a file without a name"
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            data = file.read(_MAX_TOKEN_BYTES + 1)
    except FileNotFoundError:
        text = f"no token: {missing or f'{name} does not exist'}; {_NEW_TOKEN}"
        raise ConfigError(text, retryable=True) from None  # it may be on its way
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read a token from {name}: {_reason(error)}") from None
    if len(data) > _MAX_TOKEN_BYTES:
        raise ConfigError(f"the token in {name} is larger than {_MAX_TOKEN_BYTES // 1024} KiB")
    return _checked_token(data.decode("latin-1"), name), name


def _checked_token(text: str, name: str) -> str:
    """The token without the blanks around it. http.client prints a header it cannot send."""
    token = text.strip(" \t\r\n\v\f")
    if not token:
        raise ConfigError(f"no token: {name} is empty; {_NEW_TOKEN}", retryable=True)
    if not re.fullmatch("[!-~]+", token):
        raise ConfigError(f"the token in {name} holds a character that is not visible ASCII")
    return token


def resolve_proxy(url: str, environ: Mapping[str, str]) -> str | None:
    """Return the URL of the proxy for `url`, None for a direct connection.

    `HTTPS_PROXY` or `HTTP_PROXY`, less what `NO_PROXY` names, each also in lower case, by the rules
    of golang.org/x/net/http/httpproxy, as the other Bus tools are Go. Raises ConfigError.
    """
    return _proxy(url, environ)[0]


def _proxy(url: str, environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The proxy for a URL, and the name of the variable that it is from."""
    name = "HTTPS_PROXY" if url.lower().startswith("https:") else "HTTP_PROXY"
    source = name if environ.get(name) else name.lower()
    value = environ.get(source, "")
    direct = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
    # In a CGI script HTTP_PROXY may be what a client sent as the header `Proxy`.
    from_client = name == "HTTP_PROXY" and environ.get("REQUEST_METHOD")
    if not value or from_client or _is_listed(url, f"{_LOOPBACK},{direct}"):
        return None, ""
    scheme, _, rest = (value if "://" in value else f"http://{value}").partition("://")
    login, at, place = rest.rpartition("@")
    usable = scheme.lower() == "http" and re.fullmatch('[!-"$-.0->@-~]*', login)
    if not (usable and _is_base_url(f"http://{place}")):
        raise _UsageError(f"{source}: {_redacted_url(value)!r} is not {_PROXY_URL}")
    return f"http://{login}{at}{place.rstrip('/')}", source


def _is_listed(url: str, entries: str) -> bool:
    """Whether a list as in NO_PROXY names the host of a URL."""
    parts = urllib_parse.urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    try:
        address: Any = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:  # getaddrinfo takes 127.1 and 0x7f000001 for addresses, too
            address = ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            address = None
    address = getattr(address, "ipv4_mapped", None) or address
    for entry in map(str.strip, entries.lower().split(",")):
        name, colon, port = entry.rpartition(":")
        is_port = colon and re.fullmatch("[0-9]{0,5}", port)
        if not (is_port and (name.endswith("]") or ":" not in name)):
            name, port = entry, ""
        if port and int(port) != (parts.port or (443 if parts.scheme == "https" else 80)):
            continue
        if name == "*":
            return True
        if address is None:
            suffix = name[1:] if name.startswith("*.") else name
            if suffix and (host == suffix or host.endswith("." + suffix.lstrip("."))):
                return True
            continue
        try:
            if address in ipaddress.ip_network(name.strip("[]"), strict=False):
                return True
        except ValueError:
            pass  # no name matches an address
    return False


_DURATION_PART = "([0-9]+(?:\\.[0-9]*)?|\\.[0-9]+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)"
_NANOSECONDS = {"ns": 1, "us": 10**3, "\u00b5s": 10**3, "\u03bcs": 10**3, "ms": 10**6, "s": 10**9}
_NANOSECONDS.update(m=60 * 10**9, h=3600 * 10**9)


def parse_duration(text: str) -> float:
    """Return the seconds of a Go duration, such as `1h30m`, `1.5s`, `300ms`, `-2m` or `0`.

    Raises ConfigError for what https://pkg.go.dev/time#ParseDuration does not take.
    """
    digits = text[1:] if text.startswith(("-", "+")) else text
    if digits == "0":
        return 0.0
    form = f"(?:{_DURATION_PART})+"
    if not re.fullmatch(form, digits):
        bare = re.fullmatch(form, f"{digits}s")
        hint = f"has no unit: try `{text}s`" if bare else "is no duration: try `30s` or `1h30m`"
        raise _UsageError(f"{_quoted(text)!r} {hint}")
    total = 0
    for number, unit in re.findall(_DURATION_PART, digits):
        whole, _, fraction = number.partition(".")
        total += int(whole.lstrip("0")[:20] or "0") * _NANOSECONDS[unit]  # 2**63 has 19 digits
        fraction = fraction[:18]  # a nanosecond is in the 13th digit of an hour
        total += int(int(fraction or "0") * (_NANOSECONDS[unit] / 10 ** len(fraction)))  # as Go
    if total > 2**63 - (not text.startswith("-")):
        raise _UsageError(f"{_quoted(text)!r} is longer than the 292 years of a duration")
    return (-total if text.startswith("-") else total) / 10**9


def _token_facts(token: str, scope: str, now: float) -> list[str]:
    """What a JWT says of its own use, unverified, so advice only: times, scope and audience."""
    try:
        _, payload, _ = token.split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        starts, ends = (float(claims.get(name) or 0) for name in ("nbf", "exp"))
        scopes = str(claims.get("scope") or "").split()
        audience = claims.get("aud") or []
        audiences = audience.split() if isinstance(audience, str) else [*map(str, audience)]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return ["is no JWT, so what it allows cannot be seen here"]
    facts, left = [], ends - now
    if now < starts:
        facts.append(f"is not valid for another {_about(starts - now)}, by this machine's clock")
    if ends:
        facts.append(f"expires in {_about(left)}" if left > 0 else f"expired {_about(-left)} ago")
    if scope not in scopes:
        facts.append(f"lacks the scope {scope} (it has: {_quoted(' '.join(scopes)) or 'none'})")
    if _AUDIENCE not in audiences:
        facts.append(f"is for {_quoted(' '.join(audiences)) or 'no audience'}, not {_AUDIENCE}")
    return facts

# ---- Transport: the one place that touches the network ----------------------------------------

# What an exchange tells on its way, as a level and a text. A tick is a moment without an answer.
_TICK, _WARNING, _VERBOSE, _TRACE = range(-1, 3)


class _Exchange:
    """One request to the API and its answer, under one deadline, tries included."""

    def __init__(
        self, client: Client, method: str, path: str, body: bytes | None = None, limit: Any = None
    ) -> None:
        self.run_state = "not_sent"  # what is known of a run at this moment
        self.repeated = False  # whether it was sent again after a try whose outcome is unknown
        self._client, self._method, self._body = client, method, body
        self._note = client._notify
        self._url = f"{client.api_url}{_API_PATH}{path}"
        self._where = f"{method} {self._url}"
        self._proxy = resolve_proxy(self._url, client._environ)
        self._via = f"the proxy {_redacted_url(self._proxy)}" if self._proxy else ""
        self._limit = client.timeout if limit is None else limit
        if not (isinstance(self._limit, (int, float)) and 0 <= self._limit < _MAX_SECONDS + 60):
            raise _UsageError(f"the timeout {self._limit!r} is no number of seconds >= 0")
        self._end = time.monotonic() + (self._limit or float("inf"))
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()  # so that nothing is sent once the caller has given up

    def document(self, shape: Any = dict) -> Any:
        """Send the request, again where that is safe, and return the JSON of a 2xx answer."""
        pauses = iter(_RETRY_PAUSES_SECONDS)
        while True:
            try:
                return self._usable(shape, *self._attempt())
            except BusContainersError as error:
                pause = next(pauses, float("inf"))
                sent = self.run_state != "not_sent"
                safe = error.retryable and not (sent and self._method == "POST")
                if not safe or pause >= self._left():
                    raise
                self.repeated = sent
                self._note(_VERBOSE, f"{error}; trying again in {pause} s")
            time.sleep(pause)

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _attempt(self) -> Any:
        """Try once, in a thread: only so can a deadline or a signal end it in each of its steps."""
        # Nothing interrupts name resolution, and a socket's timeout starts anew with each byte.
        outcome: list[Any] = []

        def work() -> None:
            try:
                outcome.append(self._converse())
            except Exception as error:  # noqa: BLE001 - for the caller's thread
                outcome.append(error)

        thread = threading.Thread(target=work, daemon=True)
        try:
            thread.start()
            while thread.is_alive() and self._left() > 0:
                thread.join(min(self._left(), _TICK_SECONDS))
                self._note(_TICK, "")
        except RuntimeError as error:
            outcome.append(OSError(str(error)))  # no thread is to be had
        finally:
            result = outcome.pop() if outcome else self._abandon()
        if isinstance(result, Exception):
            raise self._translated(result)
        return result

    def _abandon(self) -> TimeoutError:
        """Make the thread end: from now on it sends nothing, and nothing arrives."""
        with self._lock:
            self._end = float("-inf")
            try:  # not the shutdown of an SSLSocket, which another thread must not call
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # type: ignore[arg-type]
            except (OSError, TypeError):
                pass  # closed, or not there yet
        return TimeoutError()

    def _hold(self, sock: socket.socket, run_state: str) -> None:
        """Note a socket, and what may have been sent on it from now on, unless it is too late."""
        with self._lock:
            if self._left() <= 0:
                raise OSError("too late")
            self._sock, self.run_state = sock, run_state

    def _dial(self, place: tuple[str, int], *_: object) -> socket.socket:
        """Connect to the first address that answers, each given its share of the time left."""
        # The name as bytes: as a str it costs the import of the tables of IDNA.
        addresses = socket.getaddrinfo(place[0].encode(), place[1], type=socket.SOCK_STREAM)
        while True:
            share = self._left() / len(addresses)  # among those that are yet to be tried
            family, kind, protocol, _name, address = addresses.pop(0)
            sock = None
            try:
                sock = socket.socket(family, kind, protocol)
                sock.settimeout(min(max(share, 0.001), _ENDLESS_SECONDS))
                sock.connect(address)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, seconds in _KEEPALIVE_SECONDS.items():
                    if hasattr(socket, name):
                        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
                sock.settimeout(min(max(self._left(), 0.001), _ENDLESS_SECONDS))
                self._hold(sock, self.run_state)
                return sock
            except OSError:
                if sock:
                    sock.close()
                if not addresses:
                    raise

    def _request(self) -> urllib_request.Request:
        headers = {"Accept": "application/json", "User-Agent": f"{_PROGRAM}/{__version__}"}
        headers["Authorization"] = f"Bearer {self._client._token}"
        headers.update({"Content-Type": "application/json"} if self._body else {})
        request = urllib_request.Request(self._url, self._body, headers, method=self._method)
        request.timeout = None  # an opener would set it; here the deadline is the limit
        if self._proxy:
            user, at, place = self._proxy.partition("://")[2].rpartition("@")
            proxy = urllib_parse.urlsplit(f"//{place}")
            request.set_proxy(place if proxy.port else f"{proxy.netloc}:80", request.type)
            if at:
                login = urllib_parse.unquote(user if ":" in user else f"{user}:").encode()
                basic = f"Basic {base64.b64encode(login).decode()}"
                request.add_header("Proxy-Authorization", basic)
        return request

    def _converse(self) -> tuple[http_client.HTTPResponse, bytearray]:
        start, exchange = time.monotonic(), self
        base: Any = http_client.HTTPConnection
        tls: Any = {}
        if self._url.startswith("https:"):
            context = ssl.create_default_context()  # of SSL_CERT_FILE, SSL_CERT_DIR, the system's
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_alpn_protocols(["http/1.1"])
            base, tls = http_client.HTTPSConnection, {"context": context}

        class Connection(base):  # type: ignore[misc]
            def connect(self) -> None:
                self._create_connection = exchange._dial
                super().connect()  # with the tunnel of a proxy, and TLS
                exchange._hold(self.sock, "unknown")

            def send(self, data: bytes) -> None:
                # An IPv6 address, which Python 3.12 and older send without its brackets.
                data = re.sub(rb"\A(CONNECT )([^ .\[]*:[^ \[]*)(:[0-9]+ )", rb"\1[\2]\3", data)
                if data.endswith(b"\r\n\r\n"):
                    exchange._trace(">", data.decode("latin-1").splitlines()[:-1])
                try:
                    super().send(data)
                except ConnectionError:  # the answer, a 413 say, may be there all the same
                    if exchange.run_state == "not_sent":
                        raise

        # The handler alone, without an opener: it follows no redirect and knows no other scheme.
        response: http_client.HTTPResponse
        response = urllib_request.HTTPHandler().do_open(Connection, self._request(), **tls)
        with response:
            while 102 <= response.status < 200:  # http.client skips no interim answer but 100
                response.headers = None  # type: ignore[assignment]
                response.begin()
            headers = [f"{name}: {value}" for name, value in response.getheaders()]
            self._trace("<", [f"{response.status} {response.reason}", *headers])
            if 300 <= response.status < 500:
                self.run_state = "refused"
            body = self._read(response)
        took = f"{response.status}, {len(body):,} bytes, {time.monotonic() - start:.3f} s"
        self._note(_VERBOSE, f"{self._where}: {took}")
        return response, body

    def _read(self, response: http_client.HTTPResponse) -> bytearray:
        """Read the body whole; http.client is silent about a short one, or about a bad length."""
        lengths = set(response.headers.get_all("Content-Length", []))
        encoding = response.headers.get("Content-Encoding") or "identity"
        body = bytearray()
        try:
            if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", n.strip()) for n in lengths):
                raise self._error(ProtocolError, "the answer has a bad Content-Length")
            if encoding.strip().lower() != "identity":
                raise self._error(ProtocolError, f"unknown Content-Encoding {self._said(encoding)}")
            while piece := response.read(_IO_BYTES):
                body += piece
                if len(body) > _MAX_BODY_BYTES:
                    raise self._error(ProtocolError, "the answer has no end")
            # Where the connection's end is that of the body, it may be the headers that were cut.
            if response.length or not (body or response.length == 0):
                raise http_client.IncompleteRead(b"", response.length)
        except (OSError, http_client.HTTPException, ProtocolError):
            if response.status < 300:
                raise  # an error's status says enough, and whether there is a run
        return body

    def _usable(self, shape: Any, response: http_client.HTTPResponse, body: bytearray) -> Any:
        """Return the document of a 2xx answer, or raise the error of another."""
        status, document, problem, text = response.status, None, "", "not read"
        try:
            text = body.decode(errors="replace")
            if "\ufffd" in text and text.encode() != body:
                self._note(_WARNING, "the answer is not all UTF-8; what is not became U+FFFD")
            body.clear()  # it may be large, and the text is as large again
            document = _parsed_json(text[1:] if text.startswith("\ufeff") else text)
        except (ValueError, RecursionError, MemoryError) as error:
            problem = f"no usable JSON: {self._said(_reason(error))}"
            if text.lstrip().startswith("<"):
                problem = "an HTML page: a captive portal, or not the API's URL?"
        if not 200 <= status < 300:
            raise self._api_error(response, document)
        if status == 204 and self._method == "DELETE":
            document, problem = {}, ""
        elif problem and not text.strip():
            problem = "an empty answer"
        elif not problem and not isinstance(document, shape):
            problem = f"a document of an unexpected type, {type(document).__name__}"
        if problem:
            raise self._error(ProtocolError, f"HTTP {status}, but with {problem}")
        self.run_state = "finished"
        return document

    def _api_error(self, response: http_client.HTTPResponse, document: Any) -> ApiError:
        status = response.status
        error = ApiError("", status, self._redacted(document))
        parts = [f"HTTP {status} {error.type or response.reason}"]
        parts[0] += f": {error.message.strip()}" if error.message else ""
        if 300 <= status < 400:
            target = response.headers.get("Location", "nowhere")
            parts.append(f"redirected to {target}, not followed; check --api-url")
        if self._via and self._url.startswith("http:") and not error.type:
            advice = f"; give it a login, {_PROXY_URL}" if status == 407 else ", or by the API"
            parts.append(f"by {self._via}{advice}")
        parts += _billing_facts(error.document)
        parts += [f"{w}: {s}" for w, s in (("action", error.action), ("run", error.command)) if s]
        if status == 401:
            facts = _token_facts(self._client._token, _SCOPES[self._method], time.time())
            parts += [*(f"the token {fact}" for fact in facts), _NEW_TOKEN]
        error.args = (f"{self._where}: {'; '.join(map(self._said, parts))}",)
        return error

    def _translated(self, failure: Exception) -> BusContainersError:
        """Make one of our errors of what urllib, http.client or the socket raised."""
        if isinstance(failure, BusContainersError):
            return failure
        if self._left() <= 0:
            text = f"no whole answer within {_about(self._limit)}; --timeout sets the limit"
            return self._error(DeadlineError, text, True)
        error = failure.reason if isinstance(failure, urllib_error.URLError) else failure
        reason, sent = self._said(_reason(error)), self.run_state != "not_sent"
        kind: _Kind = TransportError
        retryable = False
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = f"{self._said(error.verify_message)}; {_certificate_advice()}"
            text = f"TLS: the certificate is refused: {reason}"
        elif isinstance(error, ssl.SSLError) and (not sent or "ALERT_CERT" in reason):
            self.run_state = "not_sent"  # TLS 1.3 asks for ours when the request is on its way
            advice = "the server wants a certificate of ours" if sent else "is this port for https?"
            text = f"TLS: {reason}: {advice}"
        elif not sent and reason.startswith("Tunnel connection failed: "):  # http.client's words
            text = f"{self._via} refused with HTTP {reason.partition(': ')[2]}"
            text += f"; give it a login, {_PROXY_URL}" if " 407 " in text else ""
        elif isinstance(error, OSError) and not sent:
            peer, advice = "the API", "check --api-url; `status --wait 60s` waits for a platform"
            if self._via:
                peer, advice = self._via, "check HTTPS_PROXY and HTTP_PROXY"
            verb = "resolve the name of" if isinstance(error, socket.gaierror) else "connect to"
            text, retryable = f"cannot {verb} {peer}: {reason}; {advice}", True
        elif isinstance(error, (OSError, http_client.IncompleteRead)):
            reason = reason if isinstance(error, OSError) else "the answer was cut short"
            text, retryable = f"the connection was lost: {reason}", True
        else:
            whose = f" of {self._via}" if self._via and not sent else ""
            kind, text = ProtocolError, f"the answer{whose} is not valid HTTP: {reason}"
        return self._error(kind, text, retryable)

    def _error(self, kind: _Kind, text: str, retryable: bool = False) -> BusContainersError:
        return kind(f"{self._where}: {text}", retryable)

    def _said(self, text: str) -> str:
        return _quoted(self._redacted(text))

    def _redacted(self, value: Any) -> Any:
        """A text or a document without the token, should a server have sent it back."""
        if isinstance(value, dict):
            return {self._redacted(name): self._redacted(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._redacted(each) for each in value]
        token = self._client._token
        if isinstance(value, str) and len(token) >= 8:  # less is no secret, and a part of any word
            for form in (token, json.dumps(token)[1:-1], urllib_parse.quote(token, safe="")):
                value = value.replace(form, "[redacted]")
        return value

    def _trace(self, mark: str, head: Iterable[str]) -> None:
        for line in map(self._redacted, head):
            name = line.partition(":")[0]
            hidden = name.lower().endswith("authorization")
            self._note(_TRACE, f"{mark} {f'{name}: [redacted]' if hidden else line}")


def _certificate_advice() -> str:
    paths = ssl.get_default_verify_paths()
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if os.environ.get(name) and not os.path.exists(os.environ[name]):
            return f"{name} names {os.environ[name]}, which does not exist"
    if not paths.cafile and not any(names for _, _, names in os.walk(paths.capath or "")):
        return "no CA certificates here: install the package ca-certificates, or set SSL_CERT_FILE"
    return "check --api-url and the clock, or set SSL_CERT_FILE to a PEM file with the server's CA"


def _parsed_json(text: str) -> Any:
    """Parse JSON proper: no NaN, no number too large, nothing deeper than can be written again."""

    def number(text: str) -> float:
        if abs(value := float(text)) < float("inf"):
            return value
        raise ValueError(f"{text[:20]} is no number of JSON's")

    document = json.loads(text, parse_constant=number, parse_float=number)
    level: Any = [document] if isinstance(document, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        parts = [node.values() if isinstance(node, dict) else node for node in level]
        level = [value for part in parts for value in part if isinstance(value, (dict, list))]
        if not level:
            return document
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


def _billing_facts(document: Any) -> list[str]:
    """The quota and the plan of a denial, as a person says them."""
    error = _field(document, "error", dict)
    usage = _field(error, "usage", dict)
    used, limit = (_field(usage, name, (int, float)) for name in ("used", "limit"))
    facts = []
    if used is not None and limit is not None:
        meter = _field(usage, "meter_event_name") or _field(usage, "feature") or "quota"
        what, _, unit = meter.replace("bus_", "", 1).replace("_", " ").rpartition(" ")
        amount = f"{used:,} of {limit:,} {'s ' if unit == 'seconds' else ''}of"
        what = (what or "quota") if unit == "seconds" else f"{what} {unit}".strip()
        window = _field(usage, "window") or "period"
        when = {"day": "today", "total": "in total"}.get(window, f"this {window}")
        facts.append(f"{amount} {what} used {when}")
    plan = _field(error, "recommended_plan") or _field(usage, "upgrade_plan_id")
    return [*facts, f"recommended plan: {plan}"] if plan else facts

# ---- Client ---------------------------------------------------------------------------------

class Client:
    """The four calls of the container-run API, for the account in a bearer token.

    `timeout` is the limit in seconds of a whole exchange, 0 for none. A Client may be used from
    many threads. Each method returns the API's document and raises BusContainersError.
    """

    def __init__(self, api_url: str, token: str, *, timeout: float = _TIMEOUT_SECONDS) -> None:
        self.api_url = resolve_api_url(api_url, {})[0]
        self.timeout = timeout
        self._token = _checked_token(token, "the argument")
        self._environ: Mapping[str, str] = os.environ  # for the proxy, at each request
        self._notify: Callable[[int, str], None] = lambda _level, _text: None

    def __repr__(self) -> str:
        return f"Client({self.api_url!r})"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Client:
        """Return a client with the URL, token and proxy that the command line would resolve."""
        client = cls(resolve_api_url(None, environ)[0], resolve_token(None, environ)[0])
        client._environ = environ
        return client

    def status(self) -> Document:
        """Return `{"items": [{"id", "state", ...}]}`, or `{"status": {"state", ...}}`."""
        return dict(_Exchange(self, "GET", "/status").document())

    def run(
        self, command: Sequence[str], *, profile: str | None = None, image: str | None = None,
        timeout_seconds: int | None = None, timeout: float | None = None,
    ) -> Document:
        """Run a command in a fresh container; return `run_id`, `exit_code`, `stdout` and more.

        Without `profile` and `image` the profile is `codex`. `timeout_seconds` limits the run,
        `timeout` the exchange, by default 30 s more than that, or 30 minutes. An error, and a
        KeyboardInterrupt, tell by `run_state` whether the run may be going on.
        """
        body, limit = _run_request(command, profile, image, timeout_seconds)
        limit = limit if timeout is None else timeout
        exchange = _Exchange(self, "POST", "/runs", json.dumps(body).encode(), limit)
        try:
            return dict(exchange.document())
        except (BusContainersError, KeyboardInterrupt) as error:
            error.run_state = exchange.run_state  # type: ignore[union-attr]
            if exchange.run_state == "unknown":
                error.retryable = False  # type: ignore[union-attr]
            raise

    def runs(self) -> Document:
        """Return `{"items": [...]}`, the account's runs; from `/status` where there is no list."""
        try:
            document = _Exchange(self, "GET", "/runs").document((dict, list))
        except ApiError as error:
            if error.status not in (404, 405):
                raise
            document = _Exchange(self, "GET", "/status").document()
        document = {"items": document} if isinstance(document, list) else document
        if "items" not in document and "runs" in document:
            document = {"items": document.pop("runs"), **document}
        if not isinstance(document.get("items", ""), (list, type(None))):
            raise ProtocolError(f"GET {self.api_url}{_API_PATH}/runs: the answer lists no runs")
        return {**document, "items": document["items"] or []}  # a nil slice of Go's is null

    def delete(self, run_id: str) -> Document:
        """Delete a run, stopping it first; return `{"deleted": true, "run_id", ...}`."""
        exchange = _Exchange(self, "DELETE", f"/runs/{_path_segment(run_id)}")
        try:
            document = exchange.document()
        except ApiError as error:
            if error.status != 404 or not exchange.repeated:
                raise
            document = {}  # an earlier try did it, but its answer was lost
        if document.get("deleted", True) is not True:
            raise exchange._error(ProtocolError, "HTTP 200, but the run is not deleted")
        return document or {"deleted": True, "run_id": run_id}


def _run_request(
    command: Sequence[str], profile: str | None, image: str | None, timeout_seconds: int | None
) -> tuple[Document, float]:
    """The body of a run's request, and the limit of its exchange in seconds."""
    words = [] if isinstance(command, (str, bytes)) else list(command)
    if not words or not all(isinstance(each, str) for each in (profile or "", image or "", *words)):
        raise _UsageError("run needs a COMMAND, a list of words")
    if profile is not None and image is not None:
        raise _UsageError("--profile and --image exclude each other")
    body: Document = {"image": image, "command": words}
    if image is None:
        body = {"profile": _DEFAULT_PROFILE if profile is None else profile, "args": words}
    if timeout_seconds is not None:
        if type(timeout_seconds) is not int or not 0 <= timeout_seconds < _MAX_SECONDS:
            raise _UsageError(f"--timeout-seconds {timeout_seconds!r} is no whole number >= 0")
        body["timeout_seconds"] = timeout_seconds
    return body, timeout_seconds + _RUN_MARGIN_SECONDS if timeout_seconds else _RUN_TIMEOUT_SECONDS


def _path_segment(run_id: str) -> str:
    """A run's id as one segment of a path, so that it can name no other endpoint."""
    if not isinstance(run_id, str) or run_id in ("", ".", "..") or _visible(run_id) != run_id:
        raise _UsageError(f"{run_id!r} is no RUN_ID: `{_PROGRAM} runs` lists them")
    return urllib_parse.quote(run_id, safe="", errors="surrogatepass")

# ---- Formatters: a document in, pieces of text out --------------------------------------------

_COLUMNS = {
    "status": ("id", "state", "owner", "details"),
    "runs": ("run_id", "state", "exit_code", "duration_ms", "image"),
    "run": ("run_id", "exit_code", "duration_ms", "image", "runner_name", "stdout", "stderr"),
    "delete": ("run_id", "deleted"),
}
# What a column is called in documents, where that is not its own name; the first that is there.
_FIELDS = {
    "id": ("id", "provider"), "run_id": ("run_id", "id"),
    "owner": ("owner_identity_id", "owner_account_id"),
}


def _items(command: str, document: Any) -> list[Document]:
    if command in ("status", "runs"):
        document = document.get("items", [document.get("status", {})])
    items = document if isinstance(document, list) else [document]
    return [item for item in items if isinstance(item, dict)]


def _cell(item: Document, column: str) -> str:
    value = next((item[n] for n in _FIELDS.get(column, (column,)) if item.get(n) is not None), "")
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _as_text(command: str, document: Any) -> Iterator[str]:
    items = _items(command, document)
    if command == "run":
        yield _cell(document, "stdout")
    elif command == "delete":
        yield from (f"deleted {_visible(_cell(item, 'run_id'))}\n" for item in items)
    else:
        columns = _COLUMNS[command]
        rows = [[column.upper().replace("_", " ") for column in columns]]
        rows += [[_visible(_cell(item, column)) for column in columns] for item in items]
        widths = [max(map(len, cells)) for cells in zip(*rows)]
        line = "  ".join(f"{{:{width}}}" for width in widths)
        yield from (line.format(*row).rstrip() + "\n" for row in rows)


def _as_tsv(command: str, document: Any) -> Iterator[str]:
    columns = _COLUMNS[command]
    yield "\t".join(columns) + "\n"
    for item in _items(command, document):
        cells = [_cell(item, column).replace("\\", "\\\\") for column in columns]
        for plain, escaped in (("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
            cells = [cell.replace(plain, escaped) for cell in cells]
        yield "\t".join(cells) + "\n"


_FORMATS: dict[str | None, Callable[[str, Any], Iterator[str]]] = {
    "json": lambda _, document: iter([json.dumps(document, ensure_ascii=False, indent=2), "\n"]),
    "text": _as_text,
    "tsv": _as_tsv,
    None: lambda _, text: iter([text]),  # help for people
}
_FORMATS["opencli"] = _FORMATS["json"]

# ---- Command line: its help, from which the parser and the machine's help are made -------------

_HELP = """\
NAME
    bus-containers - run commands in containers of the AI Platform

SYNOPSIS
    bus-containers [OPTION...] status
    bus-containers [OPTION...] run [--] COMMAND [ARG...]
    bus-containers [OPTION...] runs
    bus-containers [OPTION...] delete RUN_ID...
    bus-containers [OPTION...] help [COMMAND]

DESCRIPTION
    Runs a command in a short-lived container of the account in a bearer token,
    and gives back its output and its exit code. The result goes to standard
    output, all else to standard error. Options may follow the command, too.

COMMANDS
    status  show whether the platform is ready
    run     run a command in a fresh container and print the result
    runs    list the account's runs
    delete  delete runs, stopping those in progress
    help    print help for the program or a command

OPTIONS
    -h, --help                  print help; after a command, the command's
    -V, --version               print the version
    --api-url URL               the API's origin, with a path prefix if any
    --token-file PATH           read the token from a file, - is standard input
    --timeout DURATION          limit of the HTTP exchange, 0 is none [30s]
    -C, --chdir DIR             work in DIR: relative paths are relative to it
    -o, --output FILE           write the result to FILE once there is one
    -f, --format json|text|tsv  format of the result [json]
    -q, --quiet                 nothing but errors, and no --output
    -v, --verbose               tell what was resolved, and each request
    --trace                     as -vv: tell the HTTP headers, without the token
    --color auto|always|never   colour, on standard error only [auto]
    --no-color                  no colour
    --error-format text|json    json: errors as objects, one a line [text]
  of status
    --wait DURATION             wait for a platform that is coming up
  of run
    --profile NAME              the container's profile [codex]
    --image REF                 an image instead of a profile
    --timeout-seconds N         stop the command after N seconds
    --timeout DURATION          limit of the HTTP exchange, 0 is none [30m]
  of help
    -f, --format opencli|json   print an OpenCLI document, by either name

ENVIRONMENT
    BUS_AI_API_URL     the API's URL, after --api-url [https://ai.hg.fi]
    BUS_API_BASE_URL   the API's URL, after BUS_AI_API_URL
    BUS_AI_TOKEN       the bearer token, after --token-file
    BUS_API_TOKEN      the bearer token, after BUS_AI_TOKEN
    BUS_CONFIG_DIR     holds auth/api-token, the last place for a token
    XDG_CONFIG_HOME    its bus/ comes after BUS_CONFIG_DIR [~/.config]
    HTTPS_PROXY        proxy for https, http://[USER:PASSWORD@]HOST:PORT
    HTTP_PROXY         proxy for http, unless REQUEST_METHOD is set
    NO_PROXY           hosts without proxy: names, .suffixes, addresses, CIDR, *
    SSL_CERT_FILE      file of CA certificates, instead of the system's
    SSL_CERT_DIR       directory of CA certificates, instead of the system's
    NO_COLOR           no colour with --color auto, as with TERM=dumb

EXIT STATUS
    0    success
    1    any other failure, but of run
    2    usage error, nothing was sent
    125  failure of run: of the client or the platform, not of the command
    N    run: the command's exit code, 128+N for signal N, 255 where none fits
    130  interrupted
    143  terminated

EXAMPLES
    bus-containers status --wait 2m           wait for the platform
    bus-containers run -- codex --version     run in the profile codex
    bus-containers run --image alpine -- ls   run in an image
    bus-containers runs -f tsv                a header row, then a row a run
    bus-containers delete run_123             delete a run
    bus-containers help --format opencli      describe all this to a program

SEE ALSO
    bus-containers help COMMAND, bus auth, bus billing
"""

_DESCRIPTIONS = {
    "status": """\
    Prints the state of the account's container runner. With --wait it asks on
    while there is no token, name, port or answer, or the runner is starting.""",
    "run": """\
    Prints the result when the command has ended, and exits with its exit code.
    With --format text its output is passed on as it is. All that follows -- or
    the first word that is no option belongs to the command. The exchange may
    take 30 s more than --timeout-seconds, or 30 min where that is 0 or missing.""",
    "runs": "    Prints the runs of the token's account, those in progress too.",
    "delete": "    Goes on after a run that cannot be deleted, and then exits with 1.",
    "help": "    With --format, prints the whole command line as an OpenCLI document.",
}
_ARGUMENTS = {"COMMAND": "a command", "ARG": "an argument of it", "RUN_ID": "the id of a run"}
_SECRET_VARIABLES = (*_TOKEN_VARIABLES, "HTTPS_PROXY", "HTTP_PROXY")  # a proxy's URL may hold one


def _lines(title: str, page: str = _HELP) -> list[str]:
    """The lines of a section of a page; `  of run` are the options of that command alone."""
    lines = f"\n{page}".partition(f"\n{title}\n")[2].splitlines()
    return list(itertools.takewhile(lambda line: line.startswith("    "), lines))


def _rows(title: str, page: str = _HELP) -> Iterator[tuple[str, str, str]]:
    """The rows of a section: a term, its description, and the default in brackets after it."""
    for line in _lines(title, page):
        term, _, rest = line.strip().partition("  ")
        description, _, default = rest.strip().rstrip("]").partition(" [")
        yield term, description, default


def _options(command: str | None) -> Iterator[tuple[list[str], str, str, str]]:
    """The options of a command: the names of each, the word for its value, help and default."""
    options = {}
    for syntax, text, default in [*_rows("OPTIONS"), *_rows(f"  of {command}")]:
        *names, value = syntax.replace(",", "").split()
        names, value = ([*names, value], "") if value.startswith("-") else (names, value)
        options[names[-1]] = names, value, text, default  # one of its own replaces the global one
    yield from options.values()


def _converted(kind: str, text: str) -> Any:
    """What the text of an option's value stands for, by the word for the value in the help."""
    choices = kind.split("|") if "|" in kind else []
    try:
        if kind == "DURATION" and (seconds := parse_duration(text)) >= 0:
            return seconds
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if kind == "N" and re.fullmatch("[0-9]{1,15}", text):
        return int(text)
    if kind in ("DIR", "FILE", "PATH"):
        return os.fsdecode(text.encode())  # as the system spells it, in any locale
    if kind in ("URL", "NAME", "REF") or text in choices:
        return text
    wanted = " or ".join(choices) or ("a whole number" if kind == "N" else "a duration") + " >= 0"
    raise argparse.ArgumentTypeError(f"{_quoted(text)!r} is not {wanted}")


def _page(command: str | None) -> str:
    """The page of help of the program or of a command, in sections as git's manual pages."""
    if command not in _DESCRIPTIONS:
        return _HELP

    def about(title: str, *words: str) -> str:
        terms = [(line, line.strip().partition("  ")[0].split()) for line in _lines(title)]
        return "\n".join(line for line, term in terms if {*words} & {*term})

    codes = {"run": "0 2 125 N 130 143"}.get(command, "0 1 2 130 143")
    sections = {
        "NAME": f"    {_PROGRAM} {command} - " + about("COMMANDS", command).split(maxsplit=1)[1],
        "SYNOPSIS": about("SYNOPSIS", command),
        "DESCRIPTION": _DESCRIPTIONS[command],
        "OPTIONS": "\n".join(_lines(f"  of {command}")),
        "EXIT STATUS": about("EXIT STATUS", *codes.split()),
        "EXAMPLES": about("EXAMPLES", command),
        "SEE ALSO": f"    {_PROGRAM} help, for the options of every command and the environment",
    }
    return "\n\n".join(f"{title}\n{text}" for title, text in sections.items() if text) + "\n"


def _opencli() -> Document:
    """The command line as the OpenCLI document that `bus help` and `bus configure` ask for."""
    commands, variables = [], []
    for name, summary, _ in _rows("COMMANDS"):
        page = _page(name)
        usage = _lines("SYNOPSIS", page)[0].strip()
        words = usage.partition(f" {name}")[2].replace("[--]", "").split()
        commands.append({
            "name": name, "summary": summary, "description": " ".join(_DESCRIPTIONS[name].split()),
            "usage": usage,
            "arguments": [
                {"name": word.strip("[].").lower(), "description": _ARGUMENTS[word.strip("[].")],
                 "required": word[0] != "[", "repeatable": "..." in word} for word in words],
            "options": [
                {"name": names[-1], "aliases": names[:-1], "description": text, "valueName": value,
                 "required": False, "repeatable": "-v" in names, "default": default}
                for names, value, text, default in _options(name)],
            "exitCodes": [{"code": code, "description": text}
                          for code, text, _ in _rows("EXIT STATUS", page)],
            "examples": [{"summary": text, "command": example}
                         for example, text, _ in _rows("EXAMPLES", page)],
        })
    for name, text, default in _rows("ENVIRONMENT"):
        secret = name in _SECRET_VARIABLES
        variables.append({
            "name": name, "description": text, "required": False, "secret": secret,
            "default": default, "schema": {"type": "string"}, "affects": [*_DESCRIPTIONS][:-1],
            "safeHandling": {
                "printable": not secret, "storeInDotenv": not secret, "redactInLogs": secret},
        })
    environment = {"version": "0.1", "precedence": ["option", "environment", "file", "default"]}
    return {
        "opencli": "0.1.0",
        "info": {
            "title": _PROGRAM, "version": __version__,
            "summary": _lines("NAME")[0].partition(" - ")[2],
            "description": " ".join(" ".join(_lines("DESCRIPTION")).split()),
        },
        "commands": commands,
        "metadata": {
            "io.busdk.profile": {"version": "0.1", "module": "containers"},
            "io.busdk.environment": {**environment, "variables": variables},
        },
    }


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command's options, the global ones among them."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise _UsageError(message.replace("argument ", "", 1))

    parser = Parser(_PROGRAM, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    for names, kind, _, default in _options(command):
        if kind:
            start = default if "|" in kind and default else None  # of others it depends
            parser.add_argument(*names, type=functools.partial(_converted, kind), default=start)
        else:
            parser.add_argument(*names, action="count", default=0)
    return parser


def _split(words: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """Sort a command line into the command, its options in their long form, and other words."""
    # Before argparse, which has its own way with `--` and with a value that starts with a dash.
    rows = [row for command in (None, *_DESCRIPTIONS) for row in _options(command)]
    known = {name: (names[-1], value) for names, value, _, _ in rows for name in names}
    command: str | None = None
    options: list[str] = []
    others: list[str] = []
    ahead = iter(words)
    for word in ahead:
        if word == "--":
            others += ahead
        elif word.startswith("-") and word != "-":
            options += _spelled_out(word, ahead, known)
        elif command is None:
            command = word
        else:
            others += [word, *ahead] if command == "run" else [word]
    return command, options, others


def _spelled_out(word: str, ahead: Iterator[str], known: Mapping[str, Any]) -> Iterator[str]:
    """The options in a word by their long names: `-qo F` holds `--quiet` and `--output=F`."""
    names = iter([word] if word.startswith("--") else [f"-{letter}" for letter in word[1:]])
    for name in names:
        name, kind = known.get(name, (name, ""))
        value = ("".join(each[1] for each in names) or next(ahead, None)) if kind else None
        yield name if value is None else f"{name}={value}"


def _parsed(command: str | None, options: list[str], words: list[str]) -> argparse.Namespace:
    """The checked options of a command, with its name and words among them."""
    args, unknown = build_parser(command).parse_known_args(options)
    if unknown:
        raise _UsageError(f"no such option: {_quoted(unknown[0].partition('=')[0])}")
    if command not in _DESCRIPTIONS:
        problem = f"unknown command {_quoted(command)!r}" if command else "no command"
        raise _UsageError(f"{problem}: use one of {', '.join(_DESCRIPTIONS)}")
    args.command, args.words = command, words
    if args.quiet and (args.verbose or args.trace):
        raise _UsageError("--quiet and --verbose or --trace exclude each other")
    if command in ("run", "delete") and not words:
        raise _UsageError(f"missing argument: {_lines('SYNOPSIS', _page(command))[0].strip()}")
    if len(words) > {"status": 0, "runs": 0, "help": 1}.get(command, len(words)):
        raise _UsageError(f"{command} does not take the argument {_quoted(words[-1])!r}")
    if command == "run":
        _, limit = _run_request(words, args.profile, args.image, args.timeout_seconds)
        args.run_limit = limit if args.timeout is None else args.timeout
    return args

# ---- Command line: what goes out --------------------------------------------------------------

def _write(stream: TextIO, pieces: Iterable[str]) -> None:
    """Write text as UTF-8 whatever the locale; a lone surrogate, which has none, as \\uXXXX."""
    stream.flush()  # of what others wrote
    binary = getattr(stream, "buffer", None)  # an io.StringIO has none
    for piece in pieces:
        for start in range(0, len(piece), _IO_BYTES):
            part = piece[start : start + _IO_BYTES].encode("utf-8", "backslashreplace")
            while binary and part:  # with PYTHONUNBUFFERED a pipe may take less than all of it
                part = part[binary.write(part) :]
            stream.write(part.decode())
    stream.flush()


class _Reporter:
    """All that goes to standard error, as text or JSON, and a line about a run in progress."""

    def __init__(self, options: Sequence[str]) -> None:
        said = dict(option.partition("=")[::2] for option in options)  # the last one counts
        try:
            terminal = sys.stderr.isatty()
        except (AttributeError, ValueError):  # there is none, or it is closed
            terminal = False
        self._smart = terminal and os.environ.get("TERM") != "dumb"
        colour = said.get("--color", "auto") if "--no-color" not in said else "never"
        auto = self._smart and colour == "auto" and not os.environ.get("NO_COLOR")
        self._colour = auto or colour == "always"
        loud = _TRACE if "--trace" in said else options.count("--verbose")
        self._level = _TICK - 1 if "--quiet" in said else loud
        self._run, self._start, self._drawn = "", 0.0, False
        self._as_json = said.get("--error-format") == "json"
        self.failed, self.run_state = False, "not_sent"

    def note(self, level: int, text: str) -> None:
        """Take what an exchange tells: a tick, a warning, what --verbose or --trace ask for."""
        seconds = int(time.monotonic() - self._start)
        if _WARNING <= level <= self._level:
            self._tell(("warning", "verbose", "trace")[level], text)
        elif level == _TICK <= self._level and self._run and seconds and self._smart:
            line = _visible(f"{_about(seconds)}{self._run}").encode("ascii", "backslashreplace")
            self.write(line.decode(), in_place=True)

    def show_run(self, run: str) -> None:
        """Show from its first second on how long a run has been going on; "" takes that away."""
        self.write("")
        self._run, self._start = "" if self._as_json else run, time.monotonic()

    def error(self, error: BusContainersError, command: str | None, kind: str = "") -> None:
        """Tell an error; for programs its kind is the name of its class."""
        self.failed = True
        names = ("status", "type", "message", "action", "command", "document", "retryable")
        fields = {name: getattr(error, name, None) for name in names}
        if command == "run":
            fields["run_state"] = error.run_state or self.run_state
        if str(error):
            kind = kind or type(error).__name__.lower().strip("_").replace("error", "")
            self._tell(kind, str(error), **fields)

    def _tell(self, kind: str, text: str, **fields: Any) -> None:
        line = f"{'warning: ' if kind == 'warning' else ''}{_visible(text)}"
        line = f"{_PROGRAM}: " + (f"\033[31m{line}\033[0m" if self._colour and fields else line)
        if self._as_json:
            fields["message"] = fields.get("message") or text
            line = json.dumps({"kind": kind, "text": text, **fields})
        self.write(f"{line}\n")

    def write(self, text: str, in_place: bool = False) -> None:
        """Write to standard error, if there is one that takes it, over what was to be in place."""
        erase, self._drawn = "\r\033[K" if self._drawn else "", in_place
        try:
            if in_place:
                text = text[: (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1]
            if sys.stderr is not None:
                _write(sys.stderr, [erase, text])
        except (OSError, ValueError):
            pass


class _Result:
    """The way out of a result, proved open before the request: standard output, or a file.

    A file keeps what it holds until there is a result; one that was not there goes if none comes.
    """

    def __init__(self, path: str | None) -> None:
        self._path, self._new = path, path is not None and not os.path.exists(path)
        self._name = "standard output" if path is None else path
        try:
            if path is None and sys.stdout is None:
                raise OSError("it is closed")
            self._file: TextIO = sys.stdout if path is None else open(path, "a", newline="")  # noqa: SIM115
            if path is None:
                os.write(self._file.fileno(), b"")  # tells of /dev/full, too
        except io.UnsupportedOperation:
            pass  # a stream in memory
        except (OSError, ValueError) as error:
            raise _OutputError(f"cannot write to {self._name}: {_reason(error)}") from None

    def write(self, pieces: Sequence[str]) -> None:
        """Write the result; one that the file does not take goes to standard output."""
        try:
            if self._path is not None and os.path.isfile(self._path):
                self._file.truncate(0)
            _write(self._file, pieces)
            self._new = False
            return
        except (OSError, ValueError) as error:
            if self._path is None and isinstance(error, BrokenPipeError):
                raise _OutputError("") from None
            problem = f"cannot write to {self._name}: {_reason(error)}"
        if self._path is not None:
            _Result(None).write(pieces)
            problem += "; the result is on standard output"
        raise _OutputError(problem)

    def close(self) -> None:
        if self._path is not None:
            try:
                try:
                    self._file.close()
                finally:
                    if self._new:
                        os.remove(os.path.realpath(self._path))
            except OSError:
                pass  # told by write, or somebody else took it away

# ---- Command line: the commands, each from options to the document -----------------------------

def _client(args: argparse.Namespace, report: _Reporter, method: str = "GET") -> Client:
    """The client that options and environment ask for, and -v's account of where from."""
    url, source = resolve_api_url(args.api_url, os.environ)
    proxy, proxy_source = _proxy(url, os.environ)
    via = f"{_redacted_url(proxy)} from {proxy_source}" if proxy else "none"
    report.note(_VERBOSE, f"API URL {url} from {source}; proxy {via}")
    token, source = resolve_token(args.token_file, os.environ)
    facts = "; ".join(_token_facts(token, _SCOPES[method], time.time()))
    report.note(_VERBOSE, f"token from {source}: {facts}")
    if url.startswith("http:") and not (re.match(_NEAR_URL, url) or _is_listed(url, _PRIVATE)):
        report.note(_WARNING, f"the token goes to {url} unencrypted: use https")
    client = Client(url, token, timeout=_TIMEOUT_SECONDS if args.timeout is None else args.timeout)
    client._notify = report.note
    return client


def _status(args: argparse.Namespace, report: _Reporter) -> Document:
    end = time.monotonic() + (args.wait or 0)
    pause_seconds = 0.1
    client = None
    while True:
        try:
            client = client or _client(args, report)  # there may be no token yet
            left = max(end - time.monotonic(), 0.001) if args.wait else float("inf")
            client.timeout = min(client.timeout or left, left)
            document = client.status()
            states = [item.get("state") for item in _items("status", document)]
            if not args.wait or "starting" not in states:
                return document
            reason = "the runner is starting"
        except BusContainersError as error:
            if not (args.wait and error.retryable):
                raise
            # But for the advice of a lost exchange, which is about --timeout and --wait.
            reason = str(error).partition("; " if isinstance(error, TransportError) else "\0")[0]
        if time.monotonic() + pause_seconds >= end:
            raise DeadlineError(f"the platform is not ready after {_about(args.wait)}: {reason}")
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _WAIT_PAUSE_SECONDS)


def _run(args: argparse.Namespace, report: _Reporter) -> Document:
    client = _client(args, report, "POST")
    limit = args.timeout_seconds
    if limit and args.timeout and args.timeout <= limit:
        text = f"--timeout {args.timeout:g}s is not longer than --timeout-seconds {limit}"
        report.note(_WARNING, f"{text}: the answer may come too late")
    within = f" of {_about(limit or args.run_limit)}" if limit or args.run_limit else ""
    name = f"{args.image or args.profile or _DEFAULT_PROFILE}: {' '.join(args.words)}"
    options = {name: getattr(args, name) for name in ("profile", "image", "timeout_seconds")}
    report.show_run(f"{within}  {name}")
    report.run_state = "unknown"  # if a signal comes between the two
    try:
        document = client.run(args.words, timeout=args.run_limit, **options)
        report.run_state = "finished"
    finally:
        report.show_run("")
    return document


def _delete(args: argparse.Namespace, report: _Reporter) -> Any:
    for run_id in args.words:
        _path_segment(run_id)  # a bad one is told before anything is sent
    client = _client(args, report, "DELETE")
    deleted = []
    for run_id in args.words:
        try:
            deleted.append(client.delete(run_id))
        except (TransportError, ProtocolError, ApiError) as error:
            report.error(error, args.command)
    return deleted if len(args.words) > 1 else next(iter(deleted), None)


def _show_help(args: argparse.Namespace, _report: _Reporter) -> Any:
    topic = args.words[0] if args.words else None
    if topic and (args.format or topic not in _DESCRIPTIONS):
        raise _UsageError(f"no {'document' if args.format else 'help'} about {_quoted(topic)!r}")
    return _opencli() if args.format else _page(topic)

# ---- Command line: from arguments to the exit code ----------------------------------------------

def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return its exit code."""
    if argv is None:  # what was typed is UTF-8, whatever the locale made of it
        argv = [os.fsencode(word).decode(errors="surrogateescape") for word in sys.argv[1:]]
    command, options, words = _split(argv)
    report = _Reporter(options)
    try:
        if "--help" in options or "--version" in options:
            text = _page(command) if "--help" in options else f"{_PROGRAM} {__version__}\n"
            _Result(None).write([text])
            return 0
        for number, word in enumerate(argv, 1):
            if word != word.encode(errors="replace").decode():
                raise _UsageError(f"argument {number} is not valid UTF-8: {word[:60]!a}")
        return _executed(_parsed(command, options, words), report)
    except _UsageError as error:
        topic = f" {command}" if command in _DESCRIPTIONS else ""
        error.args = (f"{error}; see `{_PROGRAM}{topic} --help`",)
        report.error(error, command)
        return 2
    except BusContainersError as error:
        report.error(error, command)
        return 125 if command == "run" else 1
    except KeyboardInterrupt as signal:  # or SIGTERM, with its exit code
        code = next(iter(signal.args), 130)
        stop = BusContainersError("terminated" if code == 143 else "interrupted")
        stop.run_state = getattr(signal, "run_state", report.run_state)
        report.error(stop, command, "interrupted")
        return int(code)


def _executed(args: argparse.Namespace, report: _Reporter) -> int:
    """Run a parsed command line; return its exit code, if it is not that of an error."""
    try:
        if args.chdir is not None:
            os.chdir(args.chdir)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chdir {args.chdir}: {_reason(error)}") from None
    commands: dict[str, Callable[[argparse.Namespace, _Reporter], Any]] = {
        "status": _status, "run": _run, "runs": lambda *each: _client(*each).runs(),
        "delete": _delete, "help": _show_help,
    }
    result = _Result(os.devnull if args.quiet else args.output)
    try:
        document = commands[args.command](args, report)
        try:
            if document is not None:
                result.write(list(_FORMATS[args.format](args.command, document)))
        except MemoryError:
            raise _OutputError("not enough memory to write the result") from None
        finally:
            if args.command == "run" and args.format == "text" and not args.quiet:
                report.write(_text_about_run(document))
    finally:
        result.close()
    if args.command != "run":
        return int(report.failed)
    code = document.get("exit_code")
    if type(code) is not int:
        run, code = (_quoted(_cell(document, name)) for name in ("run_id", "exit_code"))
        raise ProtocolError(f"the exit_code of the run {run} is no integer: {code or 'null'}")
    return min(128 - code if code < 0 else code, 255)


def _text_about_run(document: Document) -> str:
    """What the text format of a run says on standard error: the container's, and a line."""
    names = ("stderr", "run_id", "exit_code", "duration_ms")
    errors, *facts = (_cell(document, name) for name in names)
    line = "{}: run {} ended with exit code {} after {} ms\n".format(_PROGRAM, *map(_quoted, facts))
    return (errors if errors.endswith("\n") else errors and errors + "\n") + line


def console() -> NoReturn:
    """Run the process's command line, and end the process with its exit code."""
    import gc, signal

    def terminate(*_: object) -> NoReturn:
        raise KeyboardInterrupt(143)

    gc.disable()  # a process this short has nothing to collect
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)  # PID 1 has no default
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # or a socket would take the number of a standard stream that is closed
    for fd in (1, 2) if hasattr(os, "set_blocking") else ():
        os.set_blocking(fd, True)  # or a pipe that is full would cut what is written
    for name in {"SSL_CERT_FILE", "SSL_CERT_DIR"} - {n for n, value in os.environ.items() if value}:
        os.environ.pop(name, None)  # OpenSSL takes an empty one for set
    try:
        code = main()
    except KeyboardInterrupt as second:
        code = next(iter(second.args), 130)
    os._exit(code)  # all is flushed, and a thread stuck in the resolver is not waited for


if __name__ == "__main__":
    console()
