# SPDX-License-Identifier: MIT
"""Command line and library for the container runs of the AI Platform.

Three ways to run it, one behaviour:

    bus-containers run -- codex --version                   installed by pip
    python bus_containers.pyz run -- codex --version        the zipapp, nothing installed
    python bus_containers.py run -- codex --version         this file, vendored anywhere

As a library it never prints, exits, reads `sys.argv` or touches a signal handler:

    client = bus_containers.Client.from_env()
    document = client.run(["codex", "--version"])           # the API's document, a dict

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

import os
import sys
import time

TYPE_CHECKING = False  # what typing calls so, without the cost of importing typing
if TYPE_CHECKING:
    # ruff: noqa: E401, I001
    import argparse, base64, functools, ipaddress, json, re, socket, ssl, threading
    import http.client as http_client
    import urllib.error as urllib_error
    import urllib.parse as urllib_parse
    import urllib.request as urllib_request
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn, TextIO

    Document = dict[str, Any]
else:

    class _Late:
        """A module that is imported when it is first used; most starts need few of them."""

        def __init__(self, name):
            self._name = name

        def __getattr__(self, attribute):
            value = getattr(__import__(self._name, fromlist=[attribute]), attribute)
            return self.__dict__.setdefault(attribute, value)

    late = "argparse base64 functools http.client ipaddress json re socket ssl threading"
    for name in f"{late} urllib.error urllib.parse urllib.request".split():
        globals()[name.replace(".", "_")] = _Late(name)

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
# The first that is set leads to the config directory.
_CONFIG_PLACES = {"BUS_CONFIG_DIR": "", "XDG_CONFIG_HOME": "bus", "HOME": ".config/bus"}

_TIMEOUT_SECONDS = 30.0
_RUN_TIMEOUT_SECONDS = 1800.0  # runs of half an hour are normal
_RUN_MARGIN_SECONDS = 30.0  # on top of --timeout-seconds: a cold start, and the answer's way back
_ENDLESS_SECONDS = 2_000_000.0  # poll(2) counts milliseconds in an int: 24.8 days
_RETRY_PAUSES_SECONDS = (0.3, 0.7)  # about a second in all
_RETRY_STATUSES = (502, 503, 504)  # a gateway's word for a backend that is not up
_TICK_SECONDS = 0.2  # a signal that comes just before a wait is seen at its end
_WAIT_PAUSE_SECONDS = 2.0  # the longest between two looks of `status --wait`
# Before NAT forgets an idle connection; the second is the first as macOS calls it.
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
_BARE_HOST = r"http://([^.:/[]+|127\.0\.0\.1|\[::1\])(:[0-9]+)?(/|$)"

_VISIBLE_ASCII = "[!-~]+"
_BASE_URL = r"https?://(\[[0-9a-f:.]+\]|[^/?#@:\[\]]+)(:[0-9]+)?(/[^?#]*)?"
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROLS.update({9: "\\t", 10: "\\n", 13: "\\r"})

_LOGIN = "; give it a login, http://USER:PASSWORD@HOST:PORT"
_RUN_ADVICE = "the run may still be executing and counting against the quota: look with"
_RUN_ADVICE += f" `{_PROGRAM} runs`, end it with `{_PROGRAM} delete RUN_ID`"


def _visible(text: str) -> str:
    """Text from outside for a message or a table, where it must not drive the terminal."""
    return text if text.isprintable() else text.translate(_CONTROLS)


def _quoted(text: str) -> str:
    """`_visible`, and no longer than a message can bear."""
    text = _visible(text)
    return text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "..."


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
        self.message = error if isinstance(error, str) else _text_field(error, "message")
        names = ("type", "action", "command")
        self.type, self.action, self.command = (_text_field(error, name) for name in names)


class _OutputError(BusContainersError):
    """A result that cannot be written. Without a text: its reader went away."""


def _text_field(fields: Any, name: str) -> str | None:
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if isinstance(value, str) and value.strip() else None


def _reason(error: object) -> str:
    return _quoted(str(getattr(error, "strerror", None) or error)) or type(error).__name__


# ---- Settings: functions of their arguments alone ---------------------------------------------


def resolve_api_url(flag: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the API's base URL, without a slash at its end, and the name of its source.

    The first that is set wins: `flag`, `BUS_AI_API_URL`, `BUS_API_BASE_URL`, the default.
    Raises ConfigError, which names the source, for all but an origin and a path prefix.
    """
    candidates = [("--api-url", flag)] if flag is not None else []
    candidates += [(name, environ[name]) for name in _URL_VARIABLES if environ.get(name)]
    source, url = (candidates or [("default", _DEFAULT_API_URL)])[0]
    _check_url(url, source)
    scheme, _, rest = url.partition("://")
    return f"{scheme.lower()}://{rest.rstrip('/')}", source


def _check_url(url: str, source: str) -> None:
    """Raise ConfigError for a URL that is no origin with a path prefix, and say what to write."""
    well_formed = re.fullmatch(_VISIBLE_ASCII, url) and re.fullmatch(_BASE_URL, url, re.IGNORECASE)
    try:  # urlsplit knows which address and which port there cannot be
        usable = bool(well_formed and urllib_parse.urlsplit(url).port != 0)
    except ValueError:
        usable = False
    shown, hint = _redacted_url(url), ""
    if "://" not in url:
        hint = f": write https://{shown}, or http://{shown} for plain HTTP"
    elif f"{_API_PATH}/" in f"{url}/":
        hint = f": give the API's origin, without {_API_PATH}"
    if hint or not usable:
        form = "http[s]://HOST[:PORT][/PREFIX], in ASCII, without user, query or fragment"
        raise _UsageError(f"{source}: {shown!r} is not {form}{hint}")


def _redacted_url(url: str) -> str:
    """A URL for a message: without query and fragment, and without all before an @."""
    return re.split("[?#]", re.sub("^([a-z]+://)?.*@", r"\1***@", _quoted(url), flags=re.I))[0]


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
    if not re.fullmatch(_VISIBLE_ASCII, token):
        raise ConfigError(f"the token in {name} holds a character that is not visible ASCII")
    return token


def resolve_proxy(url: str, environ: Mapping[str, str]) -> str | None:
    """Return the URL of the proxy for `url`, None for a direct connection.

    `HTTPS_PROXY` or `HTTP_PROXY`, less what `NO_PROXY` names, each also in lower case, by the rules
    of golang.org/x/net/http/httpproxy, as the other Bus tools are Go. Raises ConfigError.
    """
    source, proxy = _proxy_variable(url, environ)
    direct = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
    if not proxy or _is_listed(url, f"{_LOOPBACK},{direct}"):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not proxy.lower().startswith("http:"):
        raise _UsageError(f"{source}: {_redacted_url(proxy)!r} is not http://HOST:PORT")
    _check_url(re.sub("://[^/?#]*@", "://", proxy), source)
    return proxy.rstrip("/")


def _proxy_variable(url: str, environ: Mapping[str, str]) -> tuple[str, str | None]:
    """The name of the variable with the proxy for the scheme of `url`, and its value."""
    name = "HTTPS_PROXY" if url.lower().startswith("https:") else "HTTP_PROXY"
    for spelling in (name, name.lower()):
        # In a CGI script HTTP_PROXY may be what a client sent as the header `Proxy`.
        if environ.get(spelling) and not (name == "HTTP_PROXY" and environ.get("REQUEST_METHOD")):
            return spelling, environ[spelling]
    return name, None


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
        if not (colon and port.isdigit() and (name.endswith("]") or ":" not in name)):
            name = entry
        elif int(port) != (parts.port or (443 if parts.scheme == "https" else 80)):
            continue
        suffix = name[1:] if name.startswith("*.") else name
        named = host == suffix or host.endswith("." + suffix.lstrip("."))
        try:
            if address is not None:
                named = address in ipaddress.ip_network(name.strip("[]"), strict=False)
        except ValueError:
            named = False  # no name matches an address
        if name == "*" or (name and named):
            return True
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
    if not re.fullmatch(f"(?:{_DURATION_PART})+", digits):
        bare = re.fullmatch(r"[0-9]*\.?[0-9]+", digits)
        hint = f"has no unit: try `{text}s`" if bare else "is no duration: try `30s` or `1h30m`"
        raise _UsageError(f"{_quoted(text)!r} {hint}")
    total = 0
    for number, unit in re.findall(_DURATION_PART, digits):
        whole, _, fraction = number.partition(".")
        total += int(whole.lstrip("0")[:20] or "0") * _NANOSECONDS[unit]  # 2**63 has 19 digits
        total += int(fraction[:18] or "0") * _NANOSECONDS[unit] // 10 ** len(fraction[:18])
    if total > 2**63 - (not text.startswith("-")):
        raise _UsageError(f"{_quoted(text)!r} is longer than the 292 years of a duration")
    return (-total if text.startswith("-") else total) / 10**9


def _token_facts(token: str, scope: str, now: float) -> list[str]:
    """What a JWT says of its own use, unverified, so advice only: times, scope and audience."""
    payload = token.split(".")[1] if token.count(".") == 2 else ""
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, RecursionError):
        claims = None
    if not isinstance(claims, dict):
        return ["is no JWT, so what it allows cannot be seen here"]
    facts = []
    starts, ends = (claims.get(name) for name in ("nbf", "exp"))
    if isinstance(starts, (int, float)) and now < starts < 1e12:
        facts.append(f"is not valid for another {_about(starts - now)}, by this machine's clock")
    if isinstance(ends, (int, float)) and 0 < ends < 1e12:
        left = ends - now
        facts.append(f"expires in {_about(left)}" if left > 0 else f"expired {_about(-left)} ago")
    scopes = str(claims.get("scope") or "").split()
    if scope not in scopes:
        facts.append(f"lacks the scope {scope} (it has: {_quoted(' '.join(scopes)) or 'none'})")
    audience = claims.get("aud")
    audiences = [str(a) for a in (audience if isinstance(audience, list) else [audience]) if a]
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
        self._url = f"{client.api_url}{_API_PATH}{path}"
        self._where = f"{method} {self._url}"
        self._proxy = resolve_proxy(self._url, client._environ)
        self._via = f"the proxy {_redacted_url(self._proxy)}" if self._proxy else ""
        self._limit = client.timeout if limit is None else limit
        if not (isinstance(self._limit, (int, float)) and self._limit >= 0):
            raise _UsageError(f"the timeout {self._limit!r} is no number of seconds >= 0")
        self._end = time.monotonic() + (self._limit or float("inf"))
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()  # so that nothing is sent once the caller has given up

    def document(self, shape: Any = dict) -> Any:
        """Send the request, again where that is safe, and return the JSON of a 2xx answer."""
        pauses = iter(_RETRY_PAUSES_SECONDS)
        while True:
            try:
                return self._document(*self._attempt(), shape)
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

    def _attempt(self) -> tuple[http_client.HTTPResponse, bytearray]:
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
        finally:
            late = not outcome  # what comes now is made of the connection's end
            if late:
                self._abandon()
        if late or isinstance(outcome[0], Exception):
            raise self._translated(TimeoutError() if late else outcome[0])
        response, body = outcome.pop()
        return response, body

    def _abandon(self) -> None:
        """Make the thread end: from now on it sends nothing, and nothing arrives."""
        with self._lock:
            self._end = float("-inf")
            try:  # not the shutdown of an SSLSocket, which another thread must not call
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # type: ignore[arg-type]
            except (OSError, TypeError):
                pass  # closed, or not there yet

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
            share = self._left() / len(addresses)
            family, kind, protocol, _name, address = addresses.pop(0)
            sock = socket.socket(family, kind, protocol)
            try:
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
                sock.close()
                if not addresses:
                    raise

    def _request(self) -> urllib_request.Request:
        headers = {"Accept": "application/json", "User-Agent": f"{_PROGRAM}/{__version__}"}
        headers["Authorization"] = f"Bearer {self._client._token}"
        if self._body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib_request.Request(self._url, self._body, headers, method=self._method)
        request.timeout = None  # an opener would set it; here the deadline is the limit
        if self._proxy:
            proxy = urllib_parse.urlsplit(self._proxy)
            user, at, place = proxy.netloc.rpartition("@")
            request.set_proxy(place if proxy.port else f"{place}:80", request.type)
            if at:
                login = base64.b64encode(urllib_parse.unquote(user).encode()).decode()
                request.add_header("Proxy-Authorization", f"Basic {login}")
        return request

    def _converse(self) -> tuple[http_client.HTTPResponse, bytearray]:
        """Send the request; return the answer and its body."""
        start, exchange = time.monotonic(), self
        base: Any = http_client.HTTPConnection
        tls: dict[str, Any] = {}
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

            def _tunnel(self) -> None:  # up to Python 3.12 without the brackets of an address
                host = self._tunnel_host
                if ":" in host and not hasattr(base, "_wrap_ipv6"):
                    self._tunnel_host = f"[{host}]"
                super()._tunnel()
                self._tunnel_host = host  # as TLS wants it

            def send(self, data: bytes) -> None:
                try:
                    super().send(data)
                except ConnectionError:  # the answer, a 413 say, may be there all the same
                    if exchange.run_state == "not_sent":
                        raise

        request = self._request()
        self._trace(">", f"{self._method} {request.selector}", request.header_items())
        # The handler alone, without an opener: it follows no redirect and knows no other scheme.
        response: http_client.HTTPResponse
        response = urllib_request.HTTPHandler().do_open(Connection, request, **tls)
        with response:
            while 102 <= response.status < 200:  # http.client skips no interim answer but 100
                response.headers = None  # type: ignore[assignment]
                response.begin()
            self._trace("<", f"{response.status} {response.reason}", response.getheaders())
            if 300 <= response.status < 500:
                self.run_state = "refused"
            body = self._read(response)
        took = f"{response.status}, {len(body):,} bytes, {time.monotonic() - start:.3f} s"
        self._note(_VERBOSE, f"{self._where}: {took}")
        return response, body

    def _read(self, response: http_client.HTTPResponse) -> bytearray:
        """Read the body whole; http.client is silent about a short one, or about a bad length."""
        lengths = set(response.headers.get_all("Content-Length", []))
        if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", n.strip()) for n in lengths):
            raise self._error(ProtocolError, "the answer has a bad Content-Length")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding != "identity":
            raise self._error(ProtocolError, f"unknown Content-Encoding {_quoted(encoding)!r}")
        body = bytearray()
        try:
            while piece := response.read(_IO_BYTES):
                body += piece
                if len(body) > _MAX_BODY_BYTES:
                    raise self._error(ProtocolError, "the answer has no end")
            if response.length:
                raise http_client.IncompleteRead(b"", response.length)
        except (OSError, http_client.HTTPException):
            if response.status < 300:
                raise  # an error's status says enough, and whether there is a run
        return body

    def _document(self, response: http_client.HTTPResponse, body: bytearray, shape: Any) -> Any:
        """Return the document of a 2xx answer, or raise the error of another."""
        try:
            text = body.decode()
        except UnicodeDecodeError:
            text = body.decode(errors="replace")
            self._note(_WARNING, "the answer is not all UTF-8; what is not became U+FFFD")
        body.clear()  # it may be large, and the text is as large again
        status, document, problem = response.status, None, ""
        try:
            document = _parsed_json(text[1:] if text.startswith("\ufeff") else text)
        except (ValueError, RecursionError) as error:
            is_page = text.lstrip().startswith("<")
            page = "an HTML page: a captive portal, or not the API's URL?"
            problem = page if is_page else f"no usable JSON: {_quoted(str(error))}"
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
        error = ApiError("", status, json.loads(self._redacted(json.dumps(document))))
        parts = [f"HTTP {status} {error.type or response.reason}"]
        parts[0] += f": {error.message.strip()}" if error.message else ""
        if 300 <= status < 400:
            target = response.headers.get("Location", "nowhere")
            parts.append(f"redirected to {target}, not followed; check --api-url")
        if self._via and self._url.startswith("http:") and not error.type:
            parts.append(f"by {self._via}{_LOGIN if status == 407 else ', or by the API'}")
        parts += _billing_facts(error.document)
        steps = {"action": error.action, "run": error.command}
        parts += [f"{word}: {step}" for word, step in steps.items() if step]
        if status == 401:
            facts = _token_facts(self._client._token, _SCOPES[self._method], time.time())
            parts += [*(f"the token {fact}" for fact in facts), _NEW_TOKEN]
        error.args = (self._redacted(f"{self._where}: {'; '.join(map(_quoted, parts))}"),)
        return error

    def _translated(self, failure: Exception) -> Any:
        """Make one of our errors of what urllib, http.client or the socket raised."""
        if isinstance(failure, BusContainersError):
            return failure
        if self._left() <= 0:
            text = f"no whole answer within {_about(self._limit)}; --timeout sets the limit"
            return self._error(DeadlineError, text, True)
        error = failure.reason if isinstance(failure, urllib_error.URLError) else failure
        reason = _reason(error)
        sent = self.run_state != "not_sent"
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = f"{_quoted(error.verify_message)}; {_certificate_advice()}"
            return self._error(TransportError, f"TLS: the certificate is refused: {reason}")
        if isinstance(error, ssl.SSLError) and not sent:
            return self._error(TransportError, f"TLS: {reason}: is this a port for https?")
        if reason.startswith("Tunnel connection failed: "):  # http.client's words
            refusal = f"{self._via} refused with HTTP {reason.partition(': ')[2]}"
            return self._error(TransportError, refusal + (_LOGIN if " 407 " in refusal else ""))
        if isinstance(error, OSError) and not sent:
            peer, advice = "the API", "check --api-url; `status --wait 60s` waits for a platform"
            if self._via:
                peer, advice = self._via, "check HTTPS_PROXY and HTTP_PROXY"
            verb = "resolve the name of" if isinstance(error, socket.gaierror) else "connect to"
            return self._error(TransportError, f"cannot {verb} {peer}: {reason}; {advice}", True)
        if isinstance(error, http_client.IncompleteRead):
            reason = "the answer was cut short"
        elif not isinstance(error, OSError):  # http.client.RemoteDisconnected is one
            return self._error(ProtocolError, f"the answer is not valid HTTP: {reason}")
        return self._error(TransportError, f"the connection was lost: {reason}", True)

    def _error(self, kind: Any, text: str, retryable: bool = False) -> Any:
        return kind(self._redacted(f"{self._where}: {text}"), retryable)

    def _redacted(self, text: str) -> str:
        """Text without the token, should a server have sent it back; a short one is no secret."""
        token = self._client._token
        for form in (token, json.dumps(token)[1:-1]):
            text = text.replace(form, "[redacted]") if len(form) >= 8 else text
        return text

    def _note(self, level: int, text: str) -> None:
        self._client._notify(level, self._redacted(text))

    def _trace(self, mark: str, first: str, headers: Iterable[tuple[str, str]]) -> None:
        for name, value in (("", first), *headers):
            secret = name.lower().endswith("authorization")
            text = "[redacted]" if secret else _visible(value)
            self._note(_TRACE, f"{mark} {name and name + ': '}{text}")


def _certificate_advice() -> str:
    """What to install or set when a certificate is refused."""
    paths = ssl.get_default_verify_paths()
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if os.environ.get(name) and not os.path.exists(os.environ[name]):
            return f"{name} names {os.environ[name]}, which does not exist"
    if not paths.cafile and not (paths.capath and os.listdir(paths.capath)):
        return "no CA certificates here: install the package ca-certificates, or set SSL_CERT_FILE"
    return "check --api-url and the clock, or set SSL_CERT_FILE to a PEM file with the server's CA"


def _parsed_json(text: str) -> Any:
    """Parse JSON proper: no NaN, no number too large, nothing deeper than can be written again."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant[:20]} is no number of JSON's")

    def finite(digits: str) -> float:
        return refuse(digits) if "inf" in str(number := float(digits)) else number

    document = json.loads(text, parse_constant=refuse, parse_float=finite)
    level: Any = [document] if isinstance(document, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        parts = [node.values() if isinstance(node, dict) else node for node in level]
        level = [value for part in parts for value in part if isinstance(value, (dict, list))]
        if not level:
            return document
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


def _billing_facts(document: Any) -> list[str]:
    """The quota and the plan of a denial, as a person says them."""
    error = document.get("error") if isinstance(document, dict) else None
    usage = error.get("usage") if isinstance(error, dict) else None
    used, limit = map(usage.get, ("used", "limit")) if isinstance(usage, dict) else (None, None)
    facts = []
    if type(used) in (int, float) and type(limit) in (int, float):
        meter = _text_field(usage, "meter_event_name") or _text_field(usage, "feature") or "quota"
        words = re.split(r"[\W_]+", meter.replace("bus_", "", 1))
        unit = "s " if words[-1] == "seconds" else ""
        window = _text_field(usage, "window") or "period"
        when = {"day": "today", "total": "in total"}.get(window, f"this {window}")
        what = " ".join(words[:-1] if unit else words)
        facts.append(f"{used:,} of {limit:,} {unit}of {what} used {when}")
    plan = _text_field(error, "recommended_plan") or _text_field(usage, "upgrade_plan_id")
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
        if isinstance(document, list):
            document = {"items": document}
        elif "items" not in document and "runs" in document:
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
            raise ProtocolError(f"the API answered that the run {run_id} is not deleted")
        return document or {"deleted": True, "run_id": run_id}


def _run_request(
    command: Sequence[str], profile: str | None, image: str | None, timeout_seconds: int | None
) -> tuple[Document, float]:
    """The body of a run's request, and the limit of its exchange in seconds."""
    words = [] if isinstance(command, (str, bytes)) else list(command)
    if not words or not all(isinstance(word, str) for word in words):
        raise _UsageError("run needs a COMMAND, a list of words")
    if profile is not None and image is not None:
        raise _UsageError("--profile and --image exclude each other")
    body: Document = {"image": image, "command": words}
    if image is None:
        body = {"profile": _DEFAULT_PROFILE if profile is None else profile, "args": words}
    if timeout_seconds is not None:
        if type(timeout_seconds) is not int or timeout_seconds < 0:
            raise _UsageError(f"--timeout-seconds {timeout_seconds!r} is no whole number >= 0")
        body["timeout_seconds"] = timeout_seconds
    return body, timeout_seconds + _RUN_MARGIN_SECONDS if timeout_seconds else _RUN_TIMEOUT_SECONDS


def _path_segment(run_id: str) -> str:
    """A run's id as one segment of a path, so that it can name no other endpoint."""
    if run_id in ("", ".", "..") or _visible(run_id) != run_id:
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
    """The objects that a document is about."""
    if command in ("status", "runs"):
        document = document.get("items", [document.get("status", {})])
    items = document if isinstance(document, list) else [document]
    return [item for item in items if isinstance(item, dict)]


def _cell(item: Document, column: str) -> str:
    names = _FIELDS.get(column, (column,))
    value = next((item[name] for name in names if item.get(name) is not None), "")
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
        yield "\t".join(cells)
        yield "\n"


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
    1    failure of status, runs or delete
    2    usage error, nothing was sent
    125  failure of run: of the client or the platform, not of the command
    N    run: the command's exit code, 128+N for signal N, 255 where none fits
    130  interrupted
    143  terminated

EXAMPLES
    bus-containers status --wait 2m           wait for the platform
    bus-containers run -- codex --version     run in the profile codex
    bus-containers run --image alpine -- ls   run in an image
    bus-containers run -f text -- date        pass its output on, as docker does
    bus-containers runs -f tsv                a header row, then a row a run
    bus-containers delete run_123             delete a run
    bus-containers help --format opencli      describe all this to a program

SEE ALSO
    bus-containers help COMMAND, bus auth, bus billing
"""

# The description and the options of each command; the rest of its page comes from the one above.
_COMMAND_HELP = {
    "status": """\
    Prints the state of the account's container runner. With --wait it goes on
    asking while there is no token file, name, open port or answer yet, and
    while the runner is starting.

    --wait DURATION             wait for a platform that is coming up
""",
    "run": """\
    Prints the result when the command has ended, and exits with its exit code.
    With --format text its output is passed on as it is. All that follows -- or
    the first word that is no option belongs to the command. The exchange may
    take 30 s more than --timeout-seconds, or 30 min where that is 0 or missing.

    --profile NAME              the container's profile [codex]
    --image REF                 an image instead of a profile
    --timeout-seconds N         stop the command after N seconds
    --timeout DURATION          limit of the HTTP exchange, 0 is none [30m]
""",
    "runs": "    Prints the runs of the token's account, those in progress too.\n",
    "delete": "    Goes on after a run that cannot be deleted, and then exits with 1.\n",
    "help": """\
    With --format, prints the whole command line as an OpenCLI document.

    -f, --format opencli|json   an OpenCLI document, by either name
""",
}
_ARGUMENTS = {"COMMAND": "a command", "ARG": "an argument of it", "RUN_ID": "the id of a run"}
_SECRET_VARIABLES = (*_TOKEN_VARIABLES, "HTTPS_PROXY", "HTTP_PROXY")  # a proxy's URL may hold one


def _section(title: str, command: str = "") -> list[str]:
    """The lines of a section of the main page, of those for a command only what it begins."""
    lines = _HELP.partition(f"{title}\n")[2].partition("\n\n")[0].splitlines()
    return [line.strip() for line in lines if not command or f" {command} " in f"{line[:41]} "]


def _rows(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """The rows of a section: a term, its description, and the default in brackets after it."""
    for line in lines:
        term, _, rest = line.strip().partition("  ")
        description, _, default = rest.strip().rstrip("]").partition(" [")
        yield term, description, default


def _options_of(command: str | None) -> Iterator[tuple[list[str], str, str, str]]:
    """The options of a command: the names of each, the word for its value, help and default."""
    own = _COMMAND_HELP.get(command or "", "").partition("\n\n")[2].splitlines()
    options = {}
    for syntax, text, default in _rows([*_section("OPTIONS"), *own]):
        *names, value = syntax.replace(",", "").split()
        names, value = ([*names, value], "") if value.startswith("-") else (names, value)
        options[names[-1]] = names, value, text, default  # one of its own replaces the global one
    yield from options.values()


def _converted(text: str, kind: str) -> Any:
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


def _exit_codes(command: str) -> list[tuple[str, str, str]]:
    alien = {"run": ("1",), "help": ("1", "125", "N")}.get(command, ("125", "N"))
    return [row for row in _rows(_section("EXIT STATUS")) if row[0] not in alien]


def _page(command: str | None) -> str:
    """The page of help of the program or of a command, in sections as git's manual pages."""
    if command is None:
        return _HELP
    summary = dict(row[:2] for row in _rows(_section("COMMANDS")))[command]
    description, _, options = _COMMAND_HELP[command].rstrip().partition("\n\n")
    sections = {
        "NAME": f"    {_PROGRAM} {command} - {summary}",
        "SYNOPSIS": f"    {_section('SYNOPSIS', command)[0]}",
        "DESCRIPTION": description,
        "OPTIONS": options,
        "EXIT STATUS": "\n".join(f"    {code:3}  {text}" for code, text, _ in _exit_codes(command)),
        "EXAMPLES": "\n".join(f"    {line}" for line in _section("EXAMPLES", command)),
        "SEE ALSO": f"    {_PROGRAM} help, for the options of every command and the environment",
    }
    return "\n\n".join(f"{title}\n{text}" for title, text in sections.items() if text) + "\n"


def _opencli() -> Document:
    """The command line as the OpenCLI document that `bus help` and `bus configure` ask for."""
    commands, variables = [], []
    for name, summary, _ in _rows(_section("COMMANDS")):
        usage = _section("SYNOPSIS", name)[0]
        words = usage.partition(f" {name}")[2].replace("[--]", "").split()
        description = _COMMAND_HELP[name].partition("\n\n")[0]
        commands.append({
            "name": name, "summary": summary, "description": " ".join(description.split()),
            "usage": usage,
            "arguments": [
                {"name": word.strip("[].").lower(), "description": _ARGUMENTS[word.strip("[].")],
                 "required": word[0] != "[", "repeatable": "..." in word} for word in words
            ],
            "options": [
                {"name": names[-1], "aliases": names[:-1], "description": text, "valueName": value,
                 "required": False, "repeatable": "-v" in names, "default": default}
                for names, value, text, default in _options_of(name)
            ],
            "exitCodes": [{"code": code, "description": t} for code, t, _ in _exit_codes(name)],
            "examples": [{"summary": text, "command": example}
                         for example, text, _ in _rows(_section("EXAMPLES", name))],
        })
    for name, text, default in _rows(_section("ENVIRONMENT")):
        secret = name in _SECRET_VARIABLES
        safe = {"printable": not secret, "storeInDotenv": not secret, "redactInLogs": secret}
        variables.append({
            "name": name, "description": text, "required": False, "secret": secret,
            "default": default, "schema": {"type": "string"}, "safeHandling": safe,
            "affects": ["status", "run", "runs", "delete"],
        })
    environment = {"version": "0.1", "precedence": ["option", "environment", "file", "default"]}
    return {
        "opencli": "0.1.0",
        "info": {"title": _PROGRAM, "version": __version__, "description": " ".join(
            _section("DESCRIPTION")), "summary": _section("NAME")[0].partition(" - ")[2]},
        "commands": commands,
        "metadata": {
            "io.busdk.profile": {"version": "0.1", "module": "containers"},
            "io.busdk.environment": {**environment, "variables": variables},
        },
    }


# ---- Command line: arguments ----------------------------------------------------------------


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command's options, the global ones among them."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise _UsageError(message.replace("argument ", "", 1))

    parser = Parser(_PROGRAM, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    for names, kind, _, default in _options_of(command):
        if kind:
            start = default if "|" in kind and default else None  # of others it depends
            convert = functools.partial(_converted, kind=kind)
            parser.add_argument(*names, type=convert, default=start)
        else:
            parser.add_argument(*names, action="count", default=0)
    return parser


def _split(argv: Sequence[str] | None) -> tuple[str | None, list[str], list[str]]:
    """Sort a command line into the command, its options in their long form, and other words."""
    # Before argparse, which has its own way with `--` and with a value that starts with a dash.
    words = []
    for number, word in enumerate(sys.argv[1:] if argv is None else argv, 1):
        try:  # what was typed is UTF-8, whatever the locale made of it
            words.append((os.fsencode(word) if argv is None else word.encode()).decode())
        except UnicodeError:
            raise _UsageError(f"argument {number} is not valid UTF-8: {word[:60]!a}") from None
    rows = [row for command in (None, *_COMMAND_HELP) for row in _options_of(command)]
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


def _spelled_out(word: str, ahead: Iterator[str], known: Mapping[str, Any]) -> list[str]:
    """An option in its long form, its value attached: `-qo F` is `--quiet`, `--output=F`."""
    short, rest = ("", "") if word.startswith("--") else (word[:2], word[2:])
    name, value_name = known.get(short or word, (word, ""))
    if not value_name:
        again = short in known and rest
        return [name, *(_spelled_out(f"-{rest}", ahead, known) if again else [])]
    value = rest or next(ahead, None)
    return [name if value is None else f"{name}={value}"]


def _parsed(command: str | None, options: list[str], words: list[str]) -> argparse.Namespace:
    """The checked options of a command, with its name and words among them."""
    args, unknown = build_parser(command).parse_known_args(options)
    if unknown:
        raise _UsageError(f"no such option: {_quoted(unknown[0].partition('=')[0])}")
    if command not in _COMMAND_HELP:
        problem = f"unknown command {_quoted(command)!r}" if command else "no command"
        raise _UsageError(f"{problem}: use one of {', '.join(_COMMAND_HELP)}")
    args.command, args.words = command, words
    args.verbose = 2 if args.trace else args.verbose
    if args.quiet and args.verbose:
        raise _UsageError("--quiet and --verbose or --trace exclude each other")
    if command in ("run", "delete") and not words:
        raise _UsageError(f"{command} needs an argument: {_section('SYNOPSIS', command)[0]}")
    if len(words) > {"status": 0, "runs": 0, "help": 1}.get(command, len(words)):
        raise _UsageError(f"{command} does not take the argument {_quoted(words[-1])!r}")
    if command == "run":
        _, limit = _run_request(words, args.profile, args.image, args.timeout_seconds)
        args.run_limit = limit if args.timeout is None else args.timeout
    return args


# ---- Command line: what goes out --------------------------------------------------------------


def _write(stream: TextIO, pieces: Iterable[str]) -> None:
    """Write text as UTF-8 whatever the locale; a lone surrogate, which has none, as \\uXXXX."""
    binary = getattr(stream, "buffer", None)  # an io.StringIO has none
    for piece in pieces:
        for start in range(0, len(piece), _IO_BYTES):
            part = piece[start : start + _IO_BYTES].encode("utf-8", "backslashreplace")
            binary.write(part) if binary else stream.write(part.decode())
    stream.flush()


class _Reporter:
    """All that goes to standard error, as text or JSON, and a line about a run in progress."""

    def __init__(self) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._smart = terminal and os.environ.get("TERM") != "dumb"
        self._level, self._colour = _WARNING, False
        self._run, self._start, self._drawn = "", 0.0, False
        self.as_json, self.failed, self.run_state = False, False, "not_sent"

    def configure(self, args: argparse.Namespace) -> None:
        """Take over what the options say; before, it is good for a usage error."""
        self._level = _TICK - 1 if args.quiet else args.verbose
        auto = self._smart and args.color == "auto" and not os.environ.get("NO_COLOR")
        self._colour = not args.no_color and (auto or args.color == "always")

    def note(self, level: int, text: str) -> None:
        """Take what an exchange tells: a tick, a warning, what --verbose or --trace ask for."""
        if _WARNING <= level <= self._level:
            self._tell(("warning", "verbose", "trace")[level], text)
        seconds = int(time.monotonic() - self._start)
        if level == _TICK <= self._level and self._run and seconds and self._smart:
            line = _visible(f"{_about(seconds)}{self._run}").encode("ascii", "backslashreplace")
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            self.write(line.decode()[: columns - 1])
            self._drawn = True

    def show_run(self, run: str) -> None:
        """Show from its first second on how long a run has been going on; "" takes that away."""
        self.write("")
        self._run, self._start = "" if self.as_json else run, time.monotonic()

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
        if self.as_json:
            fields["message"] = fields.get("message") or text
            line = json.dumps({"kind": kind, "text": text, **fields})
        self.write(f"{line}\n")

    def write(self, text: str) -> None:
        """Write to standard error, if there is one that takes it, in place of the line drawn."""
        text, self._drawn = f"\r\033[K{text}" if self._drawn else text, False
        try:
            if sys.stderr is not None:
                _write(sys.stderr, [text])
        except (OSError, ValueError):
            pass


class _Result:
    """The way out of a result: standard output, or a file. Proved open before the request."""

    def __init__(self, path: str | None) -> None:
        self._path, self._new = path, path is not None and not os.path.exists(path)
        try:  # appending, so that the old content stays until there is a result
            file = sys.stdout if path is None else open(path, "a", newline="")  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise _OutputError(f"cannot write to {path}: {_reason(error)}") from None
        if file is None:
            raise _OutputError("standard output is closed, so nothing was sent")
        self._file: TextIO = file

    def write(self, render: Callable[[], Iterable[str]]) -> None:
        """Write the result; one that the file does not take goes to standard output."""
        try:
            if self._path is not None and os.path.isfile(self._path):
                self._file.truncate(0)
            _write(self._file, render())
            self._new = False
            return
        except (OSError, ValueError) as error:
            if self._path is None and isinstance(error, BrokenPipeError):
                raise _OutputError("") from None
            problem = f"cannot write to {self._path or 'standard output'}: {_reason(error)}"
        if self._path is not None:
            _Result(None).write(render)
            problem += "; the result is on standard output"
        raise _OutputError(problem)

    def close(self) -> None:
        """Close the file; where there was none and no result came, leave none."""
        if self._path is not None:
            try:
                self._file.close()
            except OSError:
                pass  # told by write
            if self._new:
                os.remove(os.path.realpath(self._path))


# ---- Command line: the commands, each from options to the document -----------------------------


def _client(args: argparse.Namespace, report: _Reporter, method: str = "GET") -> Client:
    """The client that options and environment ask for, and -v's account of where from."""
    url, url_source = resolve_api_url(args.api_url, os.environ)
    token, token_source = resolve_token(args.token_file, os.environ)
    client = Client(url, token, timeout=_TIMEOUT_SECONDS if args.timeout is None else args.timeout)
    client._notify = report.note
    proxy = resolve_proxy(url, os.environ)
    via = f"{_redacted_url(proxy)} from {_proxy_variable(url, os.environ)[0]}" if proxy else "none"
    facts = "; ".join(_token_facts(token, _SCOPES[method], time.time()))
    report.note(_VERBOSE, f"API URL {url} from {url_source}; proxy {via}")
    report.note(_VERBOSE, f"token from {token_source}: {facts}")
    if url.startswith("http:") and not (re.match(_BARE_HOST, url) or _is_listed(url, _PRIVATE)):
        report.note(_WARNING, f"the token goes to {url} unencrypted: use https")
    return client


def _status(args: argparse.Namespace, report: _Reporter) -> Document:
    end = time.monotonic() + (args.wait or 0)
    pause_seconds = 0.1
    client = None
    while True:
        try:
            client = client or _client(args, report)
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
            reason = str(error)
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
    place = {"profile": args.profile, "image": args.image}
    report.show_run(f"{within}  {name}")
    try:
        return client.run(args.words, timeout_seconds=limit, timeout=args.run_limit, **place)
    finally:
        report.show_run("")


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
    if topic not in (None, *_COMMAND_HELP) or (topic and args.format):
        raise _UsageError(f"help for {_quoted(topic or '')!r} there is none, or not as a document")
    return _opencli() if args.format else _page(topic)


# ---- Command line: from arguments to the exit code ----------------------------------------------


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised where SIGINT would be."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return its exit code."""
    command = None
    report = _Reporter()
    try:
        command, options, words = _split(argv)
        report.as_json = "--error-format=json" in options
        if "--help" in options or "--version" in options:
            topic = command if command in _COMMAND_HELP else None
            text = _page(topic) if "--help" in options else f"{_PROGRAM} {__version__}\n"
            _Result(None).write(lambda: [text])
            return 0
        return _executed(_parsed(command, options, words), report)
    except _UsageError as error:
        topic = f" {command}" if command in _COMMAND_HELP else ""
        error.args = (f"{error}; see `{_PROGRAM}{topic} --help`",)
        report.error(error, command)
        return 2
    except BusContainersError as error:
        report.error(error, command)
        return 125 if command == "run" else 1
    except KeyboardInterrupt as signal:
        terminated = isinstance(signal, _Terminated)
        stop = BusContainersError("terminated" if terminated else "interrupted")
        stop.run_state = getattr(signal, "run_state", None)
        report.error(stop, command, "interrupted")
        return 143 if terminated else 130


def _executed(args: argparse.Namespace, report: _Reporter) -> int:
    """Run a parsed command line; return its exit code, if it is not that of an error."""
    report.configure(args)
    try:
        if args.chdir is not None:
            os.chdir(args.chdir)
    except OSError as error:
        raise ConfigError(f"--chdir {args.chdir}: {_reason(error)}") from None
    commands: dict[str, Callable[[argparse.Namespace, _Reporter], Any]] = {
        "status": _status, "run": _run, "runs": lambda *each: _client(*each).runs(),
        "delete": _delete, "help": _show_help,
    }
    result = None if args.quiet else _Result(args.output)
    try:
        document = commands[args.command](args, report)
        report.run_state = "finished"
        try:
            if result and document is not None:
                result.write(lambda: _FORMATS[args.format](args.command, document))
        finally:
            if result and args.command == "run" and args.format == "text":
                report.write(_text_about_run(document))
    finally:
        if result:
            result.close()
    if args.command != "run":
        return int(report.failed)
    code = document.get("exit_code")
    if type(code) is not int:
        raise ProtocolError(f"the run's exit_code is no integer: {_quoted(json.dumps(code))}")
    return min(128 - code if code < 0 else code, 255)


def _text_about_run(document: Document) -> str:
    """What the text format of a run says on standard error: the container's, and a line more."""
    names = ("stderr", "run_id", "exit_code", "duration_ms")
    errors, *facts = (_cell(document, name) for name in names)
    line = "{}: run {} ended with exit code {} after {} ms".format(_PROGRAM, *map(_quoted, facts))
    return errors + ("\n" if errors and not errors.endswith("\n") else "") + line + "\n"


def console() -> NoReturn:
    """Run the process's command line, and end the process with its exit code."""
    import gc
    import signal

    def terminate(*_: object) -> NoReturn:
        raise _Terminated

    gc.disable()  # a process this short has nothing to collect
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)  # PID 1 has no default
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # or a socket would take the number of a standard stream that is closed
    try:
        code = main()
    except KeyboardInterrupt:  # a second one
        code = 130
    os._exit(code)  # all is flushed, and a thread stuck in the resolver is not waited for


if __name__ == "__main__":
    console()
