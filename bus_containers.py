#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Command line and library for the container runs of the AI Platform.

Three ways to run it, one behaviour:

    bus-containers run -- codex --version                   installed by pip
    python bus_containers.pyz run -- codex --version        the zipapp, nothing installed
    python bus_containers.py run -- codex --version         this file, vendored anywhere

As a library it never prints, exits, reads `sys.argv` or touches a signal handler: only the command
line does, `console`, or `main`, which neither exits nor touches one. It offers the class `Client`,
the functions that `__all__` lists, and these errors:

    BusContainersError          every error raised on purpose: `reason`, `advice`, `run_state`
    +-- ConfigError             a URL, token or value that cannot be used; nothing was sent
    +-- TransportError          no answer, or not a whole one
    |   +-- DeadlineError       not within the time allowed
    +-- ProtocolError           an answer that cannot be used
    +-- ApiError                the API, or what stands in front of it, refused

Data goes one way: argv -> options -> settings -> client -> exchange -> attempt -> answer ->
document -> format -> result. First come errors and client, then what serves them, then commands.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import time

# collections.abc would import all of collections; this is the part that is always loaded. json, re,
# http and the like are imported by the functions that need them: `--version` needs none of them.
from _collections_abc import Callable, Iterable, Iterator, Mapping, Sequence

TYPE_CHECKING = False  # type checkers know this name; importing typing would slow each start
if TYPE_CHECKING:
    import argparse
    import http.client
    import urllib.request
    from typing import Any, NoReturn
    Document = dict[str, Any]
else:
    # With these typing.get_type_hints resolves the public signatures, from Python 3.10 on.
    Any = NoReturn = object
    Document = dict
# Pairs of an option's long name and its value, None for an option that is written without one.
_Options = Sequence["tuple[str, str | None]"]
# Makes the pieces of a result, of any size. It is called again if they have to go elsewhere.
_MakePieces = Callable[[], Iterable[str]]

__all__ = [
    "ApiError", "BusContainersError", "Client", "ConfigError", "DeadlineError", "ProtocolError",
    "TransportError", "console", "main", "parse_duration", "resolve_api_url", "resolve_proxy",
    "resolve_token",
]
__version__ = "1.1.0"

_PROGRAM = "bus-containers"
_API_PATH = "/api/v1/containers"
_DEFAULT_API_URL = "https://ai.hg.fi"
_DEFAULT_PROFILE = "codex"
_AUDIENCE = "ai.hg.fi/api"
_SCOPES = {"GET": "container:read", "POST": "container:run", "DELETE": "container:delete"}
_ALL_SCOPES = f"{' '.join(_SCOPES.values())} billing:read"
_TOKEN_ADVICE = f'make one with: bus auth token --scope "{_ALL_SCOPES}"'
_RUN_ADVICE = (
    "the run may still be executing and counting against the quota: "
    f"look with `{_PROGRAM} runs`, end it with `{_PROGRAM} delete RUN_ID`"
)
_TIMEOUT_SECONDS = 30.0
_RUN_TIMEOUT_SECONDS = 1800.0  # runs of half an hour are normal
_RUN_MARGIN_SECONDS = 30.0  # on top of the run's own limit: for a cold start, and the way back
_MAX_SECONDS = 10.0**15  # longer than Go's longest duration, and still exact to a second as a float
_WHOLE_NUMBER = "a whole number >= 0 of at most 15 digits"
_CONNECT_SECONDS = 10.0  # so a firewall that drops packets is noticed in seconds
_NEXT_ADDRESS_SECONDS = 0.25  # before the next address is tried, as in RFC 8305, section 5
_RETRIES = 2  # about a second in all: what takes longer is for `status --wait`
_RETRY_PAUSE_SECONDS = 0.3  # before the first one; each further one is twice as long
_TICK_SECONDS = 0.2  # the longest wait between two looks at deadline, signals and progress
_WAIT_PAUSE_SECONDS = 2.0  # the longest pause between two looks of `status --wait`
_MAX_RETRY_AFTER_SECONDS = 10  # the longest one that it obeys, as more would use up most waits
_STILL_RUNNING_SECONDS = 300  # CI services end a job that is silent for ten minutes
_PATIENCE_SECONDS = 1.0  # how long a message waits for a standard error that nobody reads
_USABLE = (200, 201, 202, 204)  # the HTTP status of an answer that the API gives
_MAX_ANSWER_BYTES = 1 << 30  # a server must not fill the memory
_MAX_ERROR_BYTES = 1 << 20  # what is longer does not come from the API, and takes long to redact
_MAX_JSON_DEPTH = 200  # every Python can write JSON that is nested this deep
_MAX_JSON_DIGITS = 4300  # Python's own limit since 3.9.14; older ones have none
_MAX_QUOTED = 4000  # characters of one text of a server in a message
_MAX_CELL = 40  # a longer cell does not widen its column
_NOT_OF_EMAIL = "\x7f"  # in a header, so that email's parser does not know what it says
_LAST_WORDS = f"{_PROGRAM}: out of memory, or worse; if this was `run`, {_RUN_ADVICE}\n".encode()
_TLS_BYTES = 64 * 1024  # OpenSSL gets no more at a time, as it looks at no deadline meanwhile
_IO_BYTES = 1024 * 1024  # large bodies and results are moved in pieces of this size
_PIPE_BYTES = 4096 if sys.platform == "linux" else 512  # a writable pipe takes them at once
_O_PATH = getattr(os, "O_PATH", os.O_RDONLY)  # Linux's, which needs no permission to read
_NO_ROOM_SECONDS = 0.001  # until another look at a terminal that has room, but not enough
# How a folder or a file system refuses a new file, its mode or its new name, but for want of room.
_REFUSALS = "EACCES EBUSY EINVAL ENAMETOOLONG ENOSYS ENOTSUP EOPNOTSUPP EOVERFLOW EPERM EROFS EXDEV"


def _visible(text: str) -> str:
    """Escape what is not printable, so that text from outside cannot drive the terminal."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def _shown(text: str, secrets: Iterable[str]) -> str:
    """Return text of a server for a message: without secrets, cut and escaped."""
    # A part of what is longer would take long as well, and might end within a secret.
    text = _redacted(text, secrets) if len(text) <= _MAX_ERROR_BYTES else "..."
    if len(text) > _MAX_QUOTED:
        text = f"{text[:_MAX_QUOTED]}..."
    return _visible(text)


def _rounded(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86_400:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86_400:.0f} d"


def _let_through(error: BaseException) -> None:
    """Raise an error again that a signal's handler raised: that of a host may be a TimeoutError."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
        code, variables = trace.tb_frame.f_code, trace.tb_frame.f_locals
        # A handler's second argument is a frame, maybe one that tracebacks lack. Some delete it.
        if not {*code.co_varnames[: code.co_argcount]} <= {*variables}:
            raise error
        for value in variables.values():
            if type(trace.tb_frame) in map(type, value if isinstance(value, tuple) else [value]):
                raise error


# ---- Errors ---------------------------------------------------------------------------------

class BusContainersError(Exception):
    """Base of every error that is raised on purpose. Its text is `reason`, then `advice`."""
    # A parameter in backquotes, as `timeout`, is an option's name where the command line prints it.
    kind = "error"  # the error's name in `--error-format json`
    # What is known of a run: `not_sent`, `refused` (3xx, 4xx), `unknown` or `finished`.
    run_state: str | None = None
    # Only `reason` has no default, in subclasses too, as pickle and copy pass nothing else.
    def __init__(self, reason: str, advice: str = "", *, retryable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason  # what failed, and where
        self.advice = advice  # what to do next
        self.retryable = retryable  # the same call may succeed later, and starts no second run

    def __str__(self) -> str:
        text = self.reason
        if self.advice:
            text += f"; {self.advice}"
        if self.run_state == "unknown":
            text += f"; {_RUN_ADVICE}"
        return text

    def as_document(self) -> Document:
        """Return the fields of `--error-format json`, to which `run` adds `run_state`."""
        document: Document = {"kind": self.kind, "text": str(self)}
        for name in ("status", "type", "message", "action", "command", "document"):
            document[name] = getattr(self, name, None)
        document["message"] = document["message"] or str(self)
        document["retryable"] = self.retryable
        return document


class ConfigError(BusContainersError):
    """A URL, token or value that cannot be used. Nothing was sent."""
    kind = "config"
    run_state = "not_sent"  # what is wrong with a value is found before a request is made of it


class _UsageError(ConfigError):
    """The user wrote something wrong: exit 2. Nothing was sent."""
    kind = "usage"


class _MissingTokenError(ConfigError):
    """A file holds no token yet. `status --wait` waits for it, as it may still be written."""


class TransportError(BusContainersError):
    """The request could not be sent, or its answer did not arrive whole."""
    kind = "transport"


class DeadlineError(TransportError):
    """An exchange did not end within its time, or a platform is not ready within `--wait`."""
    kind = "deadline"


class ProtocolError(BusContainersError):
    """An answer that cannot be used: not HTTP, not JSON, or not of the expected shape."""
    kind = "protocol"


class ApiError(BusContainersError):
    """An answer with an HTTP status other than 2xx, from the API or from what is in front of it.

    `status` is the number, `document` the answer if it is JSON. Out of the document, each a string
    or None: `type`, the server's word for the error; `message`, its sentence about it; `action`,
    what it advises; `command`, a command line for that.
    """
    kind = "api"
    def __init__(self, reason: str, status: int = 0, document: Any = None) -> None:
        super().__init__(reason, retryable=_is_retryable(status))
        self.status = status
        self.document = document
        self.retry_after_seconds = 0  # the server's Retry-After, where that is a number
        error = _error_object(document)
        self.type = _text(error, "type")
        self.message = _text(error, "message")
        self.action = _text(error, "action")
        self.command = _text(error, "command")


class _OutputError(BusContainersError):
    kind = "output"


class _ReaderLeftError(_OutputError):
    """The reader of standard output went away, as `| head` does. That needs no message."""


class _Interrupted(KeyboardInterrupt):
    """A signal ended a call. It carries the shell's exit code."""
    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


def _internal_error(fault: BaseException) -> BusContainersError:
    text = f"internal error: {type(fault).__name__}: {_visible(str(fault))}"
    advice = "this is a bug of the program or of its Python; please report this line"
    error = BusContainersError(text, advice)
    error.kind = "internal"
    return error


def _reason_of(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _error_object(document: Any) -> Any:
    """Return where a document tells of an error: {"error": {...}}, {"error": "message"}, itself."""
    if not isinstance(document, dict):
        return None
    error = document.get("error") or document
    if isinstance(error, str):
        error = {"message": error}
    return error


def _field(fields: Any, name: str, wanted: Any) -> Any:
    value = fields.get(name) if isinstance(fields, dict) else None
    if isinstance(value, bool) or not isinstance(value, wanted):  # a bool is an int, too
        return None
    return value


def _text(fields: Any, name: str) -> str | None:
    value: str | None = _field(fields, name, str)
    if value is None or not value.strip():
        return None
    return value


def _is_retryable(status: int) -> bool:
    is_server_fault = 500 <= status < 600 and status not in (501, 505)
    return is_server_fault or status in (408, 425, 429)


# ---- Client ---------------------------------------------------------------------------------

class Client:
    """The four calls of the container-run API, for the account in a bearer token.

    `timeout` is the limit of a whole exchange in seconds, 0 for none; `run` has a limit of its own.
    A Client may be used from many threads. Each call returns the API's document or raises
    BusContainersError.
    """
    def __init__(self, api_url: str, token: str, *, timeout: float = _TIMEOUT_SECONDS) -> None:
        # Before the checks, which use some of them; str(), as api_url is not checked yet.
        self._modules = _load_modules(str(api_url))  # for a call when sys.modules is emptied
        self.api_url = _checked_api_url(api_url, "`api_url`")
        self.timeout = timeout  # checked by each exchange, as it may be set later
        self._token = _checked_token(token, "`token`")
        self._environ: Mapping[str, str] | None = None  # None is the process's, at each request
        self._observer = _Observer()  # the command line puts its reporter here
        self._retries = _RETRIES

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Client:
        """Return a client with the URL, token and proxy that the command line would resolve.

        `environ` is the process's environment unless given. Raises ConfigError.
        """
        _load_modules("")  # so that a module that is missing is an internal error here, too
        # help() and pydoc would print os.environ, token included, if it were a default value.
        variables = os.environ if environ is None else environ
        api_url, _ = resolve_api_url(None, variables)
        token, _ = resolve_token(None, variables)
        client = cls(api_url, token)
        client._environ = environ
        return client

    def status(self) -> Document:
        """Return `{"items": [{"id", "state", ...}]}`, or `{"status": {"state", ...}}`."""
        exchange = _Exchange(self, "GET", "status")
        document = exchange.fetch()
        if {*document} - {"error"}:  # one that is not empty has been refused
            return document
        raise exchange.error(ProtocolError, "the answer says nothing")

    def run(
        self, command: Sequence[str], *,
        profile: str | None = None, image: str | None = None,
        timeout_seconds: int | None = None, timeout: float | None = None,
    ) -> Document:
        """Run a command in a fresh container; return `run_id`, `exit_code` and more, unchecked.

        Without `profile` and `image` the profile is `codex`. `timeout_seconds` limits the run,
        `timeout` the exchange: by default 30 s more than the run's limit, or 30 minutes. The
        `run_state` of an error, or of a KeyboardInterrupt once the request has begun, tells whether
        the run may be going on.
        """
        request = _run_request(command, profile, image, timeout_seconds)
        if timeout is None:
            timeout = _run_timeout(timeout_seconds)
        exchange = _Exchange(self, "POST", "runs", request=request, timeout=timeout)
        try:
            try:
                return exchange.fetch()
            except BusContainersError as error:
                error.run_state = exchange.run_state
                # Whoever retries what may be going on pays for two runs.
                error.retryable = error.retryable and error.run_state != "unknown"
                raise
        except KeyboardInterrupt as interrupt:
            vars(interrupt)["run_state"] = exchange.run_state
            raise

    def runs(self) -> Document:
        """Return `{"items": [...]}`, the account's runs, from `/status` if there is no `/runs`."""
        exchange = _Exchange(self, "GET", "runs")
        try:
            document: Any = exchange.fetch((dict, list))
        except ApiError as error:
            if error.status not in (404, 405):
                raise
            first, exchange = exchange, _Exchange(self, "GET", "status")
            exchange.deadline = first.deadline  # it is one call
            document = exchange.fetch()
            # The published provider shows runs among its runners; without marks all may be runs.
            items = _items("status", document)
            marks = ("run_id", "owner_identity_id", "owner_account_id")
            runs = [item for item in items if any(map(item.get, marks))]
            if runs:
                document["items"] = runs
        if isinstance(document, list):
            document = {"items": document}
        if "items" not in document and "runs" in document:  # as other providers name the list
            document = {"items": document.pop("runs"), **document}
        if "items" in document and document["items"] is None:  # Go's empty list
            document["items"] = []
        if not isinstance(document.get("items"), list):
            raise exchange.error(ProtocolError, "the answer lists no runs")
        return dict(document)

    def delete(self, run_id: str) -> Document:
        """Delete a run, stopping it first; return `{"deleted": true, "run_id", ...}`."""
        exchange = _Exchange(self, "DELETE", "runs", run_id)
        try:
            document = exchange.fetch()
        except ApiError as error:
            # A 404 of another type, or without one, is not the API's, or not about the run.
            is_gone = error.status == 404 and error.type == "not_found"
            if not is_gone or not exchange.was_lost:
                raise
            text = "the connection of a first request was lost, and now there is no such run"
            self._observer.warn(f"run {run_id}: {text}, so it counts as deleted")
            document = {}
        if not document:  # 204, {} or the 404 above: all of them mean that it is gone
            return {"deleted": True, "run_id": run_id}
        if document.get("deleted") is not True or document.get("run_id", run_id) != run_id:
            text = f"the answer does not say that the run {run_id} is deleted"
            raise exchange.error(ProtocolError, text)
        return {**document, "run_id": run_id}


def _load_modules(api_url: str) -> dict[str, Any]:
    # What is missing, in the way of a module or out of descriptors shows before anything is sent.
    try:
        names = ["ipaddress", "json.decoder", "re", "selectors", "urllib.request"]
        if api_url.lower().startswith("https:"):
            names += ["encodings.idna", "ssl"]  # the former for the name in a certificate
        for name in names:
            __import__(name)
    except (Exception, SystemExit) as error:  # of a script, any
        _let_through(error)
        fault = _internal_error(error)
        fault.run_state = "not_sent"
        raise fault from error
    return dict(sys.modules)


def _run_request(
    command: Sequence[str], profile: str | None, image: str | None, timeout_seconds: int | None
) -> Document:
    # The command line calls this as well, to report what is wrong before it looks for a token.
    name, value = "profile", _DEFAULT_PROFILE if profile is None else profile
    key = "args"  # the API's name for the words; with an image it is another one
    if image is not None:
        if profile is not None:
            raise ConfigError("`profile` and `image` exclude each other")
        name, value, key = "image", image, "command"
    if not _text({name: value}, name):
        raise ConfigError(f"`{name}` {value!r} is not a name")
    # A text would be a sequence of words of one letter each; an iterator could be read only once.
    is_list = isinstance(command, Sequence) and not isinstance(command, (str, bytes))
    if not is_list or len(command) == 0 or not all(isinstance(word, str) for word in command):
        raise ConfigError("`command` is not a list of words")
    request: Document = {name: value, key: list(command)}
    if timeout_seconds is not None:
        if type(timeout_seconds) is not int or not 0 <= timeout_seconds < _MAX_SECONDS:
            raise ConfigError(f"`timeout_seconds` {timeout_seconds!r} is not {_WHOLE_NUMBER}")
        request["timeout_seconds"] = timeout_seconds
    return request


def _run_timeout(timeout_seconds: int | None) -> float:
    if timeout_seconds:
        return timeout_seconds + _RUN_MARGIN_SECONDS
    return _RUN_TIMEOUT_SECONDS


def _path_of(*segments: str) -> str:
    """Return the API's path of these segments; a run's id among them reaches no other."""
    import urllib.parse
    path = _API_PATH
    for segment in segments:
        is_plain = isinstance(segment, str) and segment.isprintable() and "\ufffd" not in segment
        if not is_plain or segment in ("", ".", ".."):
            raise ConfigError(f"{segment!r} is not a run's id", f"`{_PROGRAM} runs` lists them")
        path += f"/{urllib.parse.quote(segment, safe='')}"
    return path


# ---- Settings: from arguments, given variables and files, not from os.environ or the network ---

_URL_VARIABLES = ("BUS_AI_API_URL", "BUS_API_BASE_URL")
_TOKEN_VARIABLES = ("BUS_AI_TOKEN", "BUS_API_TOKEN")
# The config directory below the value of each variable; the first variable that is set counts.
_CONFIG_DIRECTORIES = {"BUS_CONFIG_DIR": "", "XDG_CONFIG_HOME": "bus", "HOME": ".config/bus"}
_BLANKS = " \t\r\n\v\f"  # around a token, of which they are no part
_QUOTES = "\"'"  # around it they are a mistake, and an answer may quote it without
_JWT_START = "eyJ"  # the base64 of `{"`, with which the header of every JWT begins
# A long word, or a base64 with all kinds of letters; both also after `Bearer`.
_LONG_WORD = r"[^/\\ ]{20,}|(?!/)(?=.*[0-9])(?=.*[a-z])(?=.*[A-Z])[0-9A-Za-z+/=]{20,}"
_PASTED_TOKEN = rf"(?s)([^/\\]* )?({_LONG_WORD})|.*{_JWT_START}.*"
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PROXY_URL = "http://[USER:PASSWORD@]HOST[:PORT]"
# Written as in NO_PROXY. _LOOPBACK never has a proxy; to _PRIVATE a token may go unencrypted.
_LOOPBACK = "localhost,127.0.0.0/8,::1"
_PRIVATE = (
    f"{_LOOPBACK},.local,.internal,.test,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,169.254.0.0/16,"
    "fc00::/7,fe80::/10"
)
# Nothing but ASCII (a name in another script is written as xn--), and no user, ? or # in it.
_LABEL = "[0-9A-Za-z_-]{1,63}"
_ORIGIN = rf"(?i:https?)://({_LABEL}(\.{_LABEL})*\.?|\[(?P<ipv6>[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\])"
_BASE_URL = rf"{_ORIGIN}(:(?P<port>[0-9]{{1,9}}))?(/[!-\"$->@-~]*)?"


def resolve_api_url(flag: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the API's base URL, without a slash at its end, and the name of its source.

    The first that is set wins: `flag`, `BUS_AI_API_URL`, `BUS_API_BASE_URL`, the default.
    Raises ConfigError, which names the source, for all but an origin and a path prefix.
    """
    if flag is not None:
        return _checked_api_url(flag, "--api-url"), "--api-url"
    for name in _URL_VARIABLES:
        if environ.get(name):
            return _checked_api_url(environ[name], name), name
    return _DEFAULT_API_URL, "default"


def _checked_api_url(url: str, source: str) -> str:
    if not isinstance(url, str):
        raise ConfigError(f"{source} is not text")
    shown = _redacted_url(url)
    hint = ""
    if "://" not in url:
        hint = f": write https://{shown}, or http://{shown} for plain HTTP"
    elif f"{_API_PATH}/" in f"{url}/":
        hint = f": give the API's origin, without {_API_PATH}"
    if hint or not _is_base_url(url):
        form = "http[s]://HOST[:PORT][/PREFIX], in ASCII, without user, query or fragment"
        raise ConfigError(f"{source}: {shown!r} is not {form}{hint}")
    scheme, _, rest = url.partition("://")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


def _is_base_url(url: str) -> bool:
    import re
    match = re.fullmatch(_BASE_URL, url)
    if match is None or not 0 < int(match["port"] or 80) < 65536:
        return False
    address = match["ipv6"]
    return not address or _parse_address(address) is not None


def _redacted_url(url: str) -> str:
    """Return a URL for a message: without what is before an @, in a query or in a fragment."""
    import re
    url = re.sub("(?is)^([a-z]+://)?.*@", r"\1***@", url)
    return _visible(re.sub("(?s)([?#]).+", r"\1***", url))


def resolve_token(path: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the bearer token and the name of its source.

    The first that is set wins: the file `path` (`-` is standard input), `BUS_AI_TOKEN`,
    `BUS_API_TOKEN`, the file `auth/api-token` in the config directory (`BUS_CONFIG_DIR`,
    `$XDG_CONFIG_HOME/bus`, `~/.config/bus`). Raises ConfigError, which holds nothing of the token.
    """
    if path is not None:
        if not isinstance(path, str):
            raise ConfigError("`path` is not text")
        import re
        # Before the file is opened: an error of that would print the path, which may be the token.
        if re.fullmatch(_PASTED_TOKEN, path) and not os.path.exists(path):
            text = "no token: the value of `path` looks like a token, not a path"
            # Without that start it may be a long name of a file that is yet to be written.
            error_class = ConfigError if _JWT_START in path else _MissingTokenError
            raise error_class(text, _TOKEN_ADVICE)
        return _read_token(path)
    for name in _TOKEN_VARIABLES:
        if environ.get(name):
            return _checked_token(environ[name], name), name
    tried = f"`path`, {', '.join(_TOKEN_VARIABLES)}"
    for name, directory in _CONFIG_DIRECTORIES.items():
        if environ.get(name):
            path = os.path.join(environ[name], directory, "auth", "api-token")
            return _read_token(path, f"looked at {tried}, {path}")
    raise ConfigError(f"no token: looked at {tried}; HOME is not set", _TOKEN_ADVICE)


def _read_token(path: str, missing: str = "") -> tuple[str, str]:
    name = path or "a file without a name"
    source: str | int = path
    if path == "-":
        name, source = "standard input", 0
    try:
        data = b""
        with open(source, "rb", buffering=0, closefd=path != "-") as file:
            while len(data) <= 65536 and (piece := file.read(65537)) != b"":
                data += piece or b""
                if piece is None:  # a standard input that is non-blocking
                    time.sleep(_TICK_SECONDS)
    except FileNotFoundError as error:
        _let_through(error)
        text = f"no token: {missing or f'{name} does not exist'}"
        raise _MissingTokenError(text, _TOKEN_ADVICE) from None
    except (OSError, ValueError) as error:
        _let_through(error)
        raise ConfigError(f"cannot read a token from {name}: {_reason_of(error)}") from None
    if len(data) > 65536:
        raise ConfigError(f"the token in {name} is larger than 64 KiB")
    if path != "-" and not data.strip():
        raise _MissingTokenError(f"no token: {name} is empty", _TOKEN_ADVICE)
    return _checked_token(data.decode("latin-1"), name), name  # latin-1 decodes anything


def _checked_token(text: str, source: str) -> str:
    # Checked here, as http.client's error for a header that it cannot send would quote it.
    import re
    if not isinstance(text, str):
        raise ConfigError(f"{source} is not text")
    token = text.strip(_BLANKS)
    if not token:
        raise ConfigError(f"no token: {source} is empty", _TOKEN_ADVICE)
    if re.fullmatch("[!-~]+", token):
        return token
    problem = "holds a character that is not visible ASCII"
    if "\0" in token or token.startswith(("\xff\xfe", "\xfe\xff")):
        problem = "is UTF-16: save it as plain ASCII"
    elif token.startswith(("\xef\xbb\xbf", "\ufeff")):
        problem = "starts with a byte-order mark: save it without"
    elif re.match(r"(?i)(authorization:\s*)?bearer\s", token):
        problem = "starts with `Bearer`: leave that word out"
    elif "\n" in token or "\r" in token:
        problem = "has more than one line"
    raise ConfigError(f"the token in {source} {problem}")


def resolve_proxy(url: str, environ: Mapping[str, str]) -> str | None:
    """Return the URL of the proxy for `url`, None for a direct connection.

    `HTTPS_PROXY` or `HTTP_PROXY`, less what `NO_PROXY` names, each also in lower case, by the rules
    of golang.org/x/net/http/httpproxy, as the other Bus tools are Go. Raises ConfigError.
    """
    import re
    if not _is_base_url(re.sub("(?s)[?#].*", "", str(url))):
        raise ConfigError(f"{_redacted_url(str(url))!r} is not a URL that can have a proxy")
    return _proxy_and_source(str(url), environ)[0]


def _proxy_and_source(url: str, environ: Mapping[str, str]) -> tuple[str | None, str]:
    source = "HTTP_PROXY"
    if url.lower().startswith("https:"):
        source = "HTTPS_PROXY"
    elif environ.get("REQUEST_METHOD"):
        return None, ""  # in a CGI script HTTP_PROXY may be what a client sent as a header `Proxy`
    if not environ.get(source):
        source = source.lower()
    proxy = environ.get(source)
    excluded = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
    if not proxy or _is_listed(url, f"{_LOOPBACK},{excluded}"):
        return None, ""
    return _checked_proxy(proxy, source), source


def _checked_proxy(proxy: str, source: str) -> str:
    import re
    scheme, separator, rest = proxy.partition("://")
    if not separator:
        scheme, rest = "http", proxy
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    login, at, address = authority.rpartition("@")
    # A path after the port is ignored, as in Go and curl. But an @ in it means that a / ? or # of
    # the login has ended the authority. For a [ or ] urlsplit may raise an error that quotes it.
    hint = ""
    if "@" in rest[len(authority) :] or "[" in login or "]" in login:
        hint = ": percent-encode / ? # [ ] as %2F %3F %23 %5B %5D in USER and PASSWORD"
    is_usable = scheme.lower() == "http" and re.fullmatch("[!-~]*", login) and not hint
    if is_usable and _is_base_url(f"http://{address}"):
        return f"http://{login}{at}{address}"
    # A password may stand anywhere in what is not such a URL, so none of it is shown.
    raise ConfigError(f"{source}: its value is not {_PROXY_URL}{hint}")


def _is_listed(url: str, entries: str) -> bool:
    import re
    import urllib.parse
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    url_port = parts.port or _DEFAULT_PORTS[parts.scheme]
    address = _parse_address(host)
    for entry in entries.lower().split(","):
        entry = entry.strip()
        # An IPv6 address without brackets has no port behind its last colon.
        match = re.fullmatch(r"(\[.*\]|[^:]*):([0-9]{0,5})", entry)
        name, port = match.groups() if match else (entry, "")
        if port and int(port) != url_port:
            continue
        if _is_match(name, host, address):
            return True
    return False


def _is_match(name: str, host: str, address: Any) -> bool:
    import ipaddress
    if name == "*":
        return True
    if address is None:
        name = name.rstrip(".")  # as the host's
        if name.startswith("*."):
            name = name[1:]
        return name != "" and (host == name or host.endswith(f".{name.lstrip('.')}"))
    try:
        network: Any = ipaddress.ip_network(name.strip("[]"), strict=False)
    except ValueError as error:
        _let_through(error)
        return False  # the name of a host matches no address
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped and network.prefixlen >= 96:  # ::ffff:10.0.0.0/104 is 10.0.0.0/8
        network = ipaddress.ip_network((mapped, network.prefixlen - 96), strict=False)
    return address in network


def _parse_address(host: str) -> Any:
    """Return the IP address that a host is, in any spelling that getaddrinfo takes, or None."""
    import ipaddress
    import socket
    try:
        address: Any = ipaddress.ip_address(host)
    except ValueError as error:
        _let_through(error)
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1, 0x7f000001
        except (OSError, ValueError) as failure:
            _let_through(failure)
            return None
    return getattr(address, "ipv4_mapped", None) or address  # ::ffff:10.0.0.1 is 10.0.0.1


_DURATION_PART = "([0-9]+(?:\\.[0-9]*)?|\\.[0-9]+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)"
_UNIT_NANOSECONDS = {
    "ns": 1, "us": 10**3, "ms": 10**6,
    "\u00b5s": 10**3, "\u03bcs": 10**3,  # with the micro sign, and with the Greek letter mu
    "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9,
}


def parse_duration(text: str) -> float:
    """Return the seconds of a Go duration, such as `1h30m`, `1.5s`, `300ms`, `-2m` or `0`.

    Raises ConfigError for what https://pkg.go.dev/time#ParseDuration does not take.
    """
    import re
    if not isinstance(text, str):
        raise ConfigError(f"{text!r} is not text")
    # A part of it might be a part of a token, which nobody would recognise.
    shown = repr(text if len(text) <= _MAX_QUOTED else "...")
    digits = re.sub("^[-+]", "", text)
    if digits == "0":
        return 0.0
    if not re.fullmatch(f"({_DURATION_PART})+", digits):
        hint = "is not a duration: try `30s` or `1h30m`"
        if re.fullmatch(f"({_DURATION_PART})+", f"{digits}s"):
            hint = f"has no unit: try `{text}s`"
        raise ConfigError(f"{shown} {hint}")
    nanoseconds = 0
    for number, unit in re.findall(_DURATION_PART, digits):
        whole, _, fraction = number.partition(".")
        # The longest duration has 19 digits, and Python may refuse an int of thousands.
        whole, fraction = whole.lstrip("0")[:20], fraction[:19]
        nanoseconds += int(whole or "0") * _UNIT_NANOSECONDS[unit]
        scale = _UNIT_NANOSECONDS[unit] / 10 ** len(fraction)  # a float, as in Go
        nanoseconds += int(int(fraction or "0") * scale)
    if text.startswith("-"):
        nanoseconds = -nanoseconds
    if not -(2**63) <= nanoseconds < 2**63:  # an int64, which a Go duration is
        raise ConfigError(f"{shown} is longer than the 292 years of a duration")
    return nanoseconds / 10**9


def _token_facts(token: str, scope: str) -> list[str]:
    """Return what limits a token, by its quotes and claims. Nothing is verified: a hint only."""
    facts = []
    if token[0] in _QUOTES and token[0] == token[-1]:
        facts.append("is in quotes, as `docker --env-file` keeps them: leave them out")
    claims = _token_claims(token)
    if claims is None:
        return [*facts, "is not a JWT, so what it allows cannot be seen here"]
    now = time.time()
    ends = _field(claims, "exp", (int, float)) or 0
    if not abs(ends) <= _MAX_SECONDS:  # NaN, too, is refused so
        ends = 0
    scopes = _claimed_words(claims, "scope")
    audiences = _claimed_words(claims, "aud")
    if now < ends:
        facts.append(f"expires in {_rounded(ends - now)}")
    elif ends:
        facts.append(f"expired {_rounded(now - ends)} ago")
    if scope not in scopes:
        facts.append(f"lacks the scope {scope} (it has: {' '.join(scopes) or 'none'})")
    if _AUDIENCE not in audiences:
        facts.append(f"is for {' '.join(audiences) or 'no audience'}, not {_AUDIENCE}")
    return [_shown(fact, ()) for fact in facts]


def _token_claims(token: str) -> Document | None:
    import base64
    import json
    try:
        _, payload, _ = token.split(".")
        payload += "=" * (-len(payload) % 4)  # which a JWT leaves out
        claims = json.loads(base64.urlsafe_b64decode(payload))
    except (ValueError, RecursionError) as error:
        _let_through(error)
        return None
    return claims if isinstance(claims, dict) else None


def _claimed_words(claims: Document, name: str) -> list[str]:
    value = _field(claims, name, (str, list)) or ""
    if isinstance(value, str):
        value = value.split()
    return list(map(str, value))


# ---- Transport: the one place that talks to the network ----------------------------------------

class _Observer:
    """What an exchange calls on its way, always in the caller's thread. This one does nothing."""
    def tick(self) -> None:
        """A wait of a moment is about to begin. What this raises ends the exchange."""

    def enter_state(self, run_state: str) -> None:
        """What is known of a run has changed."""

    def receive_run(self, document: Document, secrets: list[str]) -> None:
        """The answer for a run has arrived. It may hold the secrets, which are those to hide."""

    def warn(self, text: str) -> None:
        """Something is wrong that does not end the exchange."""

    def explain(self, text: str) -> None:
        """Something has happened that `--verbose` prints, such as the end of an answer."""

    def show_headers(self, mark: str, lines: Iterable[str]) -> None:
        """The head of a request (`>`) or of an answer (`<`) has passed."""


class _Exchange:
    """One request to the API and its answer: what is asked, by when, and how often."""
    def __init__(
        self, client: Client, method: str, *path: str,
        request: Document | None = None, timeout: float | None = None,
    ) -> None:
        if sys.is_finalizing():  # in a `__del__`, where imports fail, as sys.modules is emptied
            sys.modules.update(client._modules)
        import base64
        import json
        import urllib.parse
        self.method = method
        self.body = None if request is None else json.dumps(request).encode()
        self.token = client._token
        self.observer = client._observer
        self.environ = os.environ if client._environ is None else client._environ
        self.url = urllib.parse.urlsplit(client.api_url + _path_of(*path))
        self.where = f"{method} {self.url.geturl()}"
        self.timeout = client.timeout if timeout is None else timeout
        # Up to twice _MAX_SECONDS: a run's default limit is its `timeout_seconds` and a margin.
        is_number = isinstance(self.timeout, (int, float))
        if not is_number or not 0 <= self.timeout < 2 * _MAX_SECONDS:
            raise ConfigError(f"`timeout` {self.timeout!r} is not a number of seconds >= 0")
        # One deadline for all: the limit of a socket would start anew with each byte.
        self.deadline = time.monotonic() + self.timeout
        self.retries = client._retries
        self.was_lost = False  # whether a connection was lost when the API may have done its part
        self.secrets = [self.token, self.token.strip(_QUOTES)]
        self.peer, self.proxy_name, self.proxy_login = self.url, "", ""
        proxy = resolve_proxy(client.api_url, self.environ)
        if proxy:
            self.peer = urllib.parse.urlsplit(proxy)
            self.proxy_name = f"the proxy {_redacted_url(proxy)}"
            login, at, _ = self.peer.netloc.rpartition("@")
            if at:
                octets = urllib.parse.unquote_to_bytes(login if ":" in login else f"{login}:")
                self.proxy_login = base64.b64encode(octets).decode()
                self.secrets.append(self.proxy_login)
            unquote = urllib.parse.unquote
            for secret in (login, *login.split(":", 1)):
                self.secrets += [secret, unquote(secret)]
                self.secrets += [unquote(secret, "latin-1")]  # as http.client decodes a head
        self.run_state = "not_sent"  # that of the latest attempt

    def fetch(self, shape: Any = dict) -> Document:
        """Send the request, again where that is safe; return the document of a usable answer."""
        retries = 0
        while True:
            start = time.monotonic()
            pause_seconds = _RETRY_PAUSE_SECONDS * 2**retries
            try:
                document: Document = _Attempt(self).perform(shape)  # each with a state of its own
                if self.method == "POST":
                    self.observer.receive_run(document, self.secrets)
                    if document.get("exit_code") is not None:  # else it may still be going on
                        self.run_state = "finished"
                return document
            except BusContainersError as error:
                is_late = self.timeout and time.monotonic() + pause_seconds >= self.deadline
                if retries == self.retries or is_late or not self._may_retry(error, start):
                    raise
                self.observer.explain(f"{error.reason}; trying again in {pause_seconds} s")
            _pause(pause_seconds, self.next_wait_seconds)
            retries += 1

    def _may_retry(self, error: BusContainersError, start: float) -> bool:
        if self.run_state == "not_sent":
            # A try that took all of the ten seconds met a firewall that drops packets.
            return error.retryable and time.monotonic() - start < _CONNECT_SECONDS
        if isinstance(error, ApiError) and error.status not in (502, 503, 504):
            return False  # those are what a gateway says where its backend is not up
        return error.retryable and self.method != "POST"  # there must be no second run

    def next_wait_seconds(self) -> float:
        """Return how long the next wait may take. Raises DeadlineError, and what a tick raises."""
        self.observer.tick()
        if not self.timeout:
            return _TICK_SECONDS
        left = self.deadline - time.monotonic()
        if left > 0:
            return min(left, _TICK_SECONDS)
        text = f"no whole answer within {_rounded(self.timeout)}"
        raise self.error(DeadlineError, text, "`timeout` sets the limit", retryable=True)

    def error(
        self, error_class: type[TransportError | ProtocolError],
        reason: str, advice: str = "", *, retryable: bool = False,
    ) -> BusContainersError:
        return error_class(f"{self.where}: {reason}", advice, retryable=retryable)

    def quote(self, text: str) -> str:
        return _shown(text.replace(f"{_NOT_OF_EMAIL}/", "/"), self.secrets)


def _pause(seconds: float, check: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while seconds > 0:
        check()
        time.sleep(min(seconds, _TICK_SECONDS))
        seconds = end - time.monotonic()


def _redacted(text: str, secrets: Iterable[str]) -> str:
    """Return a text without secrets, in whatever form a URL, JSON or HTML gives them."""
    for secret in sorted(set(secrets), key=len, reverse=True):  # one may be a part of another
        # A short one would be found in ordinary words, and no form of one is shorter than itself.
        if not 8 <= len(secret) <= len(text):
            continue
        text = text.replace(secret, "[redacted]")
        if any(mark in text for mark in "\\%&"):  # with one of which all other forms begin
            import re
            pattern = "".join(map(_any_form, secret))
            text = re.sub(pattern, "[redacted]", text, flags=re.IGNORECASE)
    return text


def _any_form(character: str) -> str:
    if character.isascii() and character.isalnum():  # never escaped
        return f"[{character}]"
    code = ord(character)
    return rf"(\\{{0,3}}\{character}|%{code:02x}|\\{{1,3}}u{code:04x}|&#?\w+;)"  # JSON in JSON, too


def _redacted_document(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        return _redacted(value, secrets)
    if isinstance(value, list):
        return [_redacted_document(each, secrets) for each in value]
    if isinstance(value, dict):
        names = [_redacted(name, secrets) for name in value]
        return dict(zip(names, _redacted_document(list(value.values()), secrets)))
    return value


# Without keep-alive a NAT forgets the idle connection of a run. macOS says TCP_KEEPALIVE.
_SOCKET_OPTIONS = [
    ("IPPROTO_TCP", "TCP_NODELAY", 1), ("SOL_SOCKET", "SO_KEEPALIVE", 1),
    ("IPPROTO_TCP", "TCP_KEEPIDLE", 30), ("IPPROTO_TCP", "TCP_KEEPALIVE", 30),
    ("IPPROTO_TCP", "TCP_KEEPINTVL", 15),
]


class _Attempt(io.RawIOBase):
    # One connection, also http.client's socket and raw stream: it calls all from `sendall` on.
    # All but a look-up is done by the caller's thread: once that gives up, nobody sends anything.
    def __init__(self, exchange: _Exchange) -> None:
        self.exchange = exchange
        self.sock: Any = None
        self.tls: Any = None  # ssl's object
        self.tls_version = ""
        self.received_bytes = 0  # of an answer
        self.has_ended = False  # by the peer
        self.max_bytes = _MAX_ANSWER_BYTES
        self.is_tunnelled = False  # by a proxy, which has done its work then
        self.may_be_done = False  # what the request asks for
        self.enter_state("not_sent")

    def enter_state(self, run_state: str) -> None:
        self.run_state = self.exchange.run_state = run_state
        self.exchange.observer.enter_state(run_state)

    def perform(self, shape: Any) -> Any:
        """Connect, send the request; return the answer's document. Raises BusContainersError."""
        import contextlib
        import http.client
        import socket
        import urllib.error
        try:
            # Twice, so that it is closed even if a signal comes amid the first time.
            with contextlib.closing(self._connect()) as self.sock, self.sock:
                if self.exchange.url.scheme == "https":
                    if self.exchange.proxy_name:
                        self._open_tunnel()
                    self._start_tls()
                document = _usable_document(self.exchange, shape, *self._converse())
                with contextlib.suppress(OSError):  # the answer is as good
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\0\0\0\0\0\0\0\0")
                    self.sock.close()
            return document
        except (BusContainersError, KeyboardInterrupt) as error:
            raise error.with_traceback(None) from None  # http.client's frames hold the token
        except urllib.error.URLError as error:  # which wraps what fails while it sends
            _let_through(error)
            failure: Any = error.reason
        except (OSError, http.client.HTTPException, MemoryError) as error:
            failure = error
        # Not in the handler: http.client's error, which may quote the token, would be context.
        _let_through(failure)
        # Their frames hold it: a cycle, which the command line does not collect.
        failure.__context__ = failure.__cause__ = None
        raise _error_of_failure(self, failure.with_traceback(None))

    def _connect(self) -> Any:
        import socket
        peer = self.exchange.peer
        addresses = self._look_up(peer.hostname or "", peer.port or _DEFAULT_PORTS[peer.scheme])
        sock = self._connect_to_first(addresses)
        self.flags = getattr(socket, "MSG_NOSIGNAL", 0)  # SIGPIPE might end a host program
        for level, name, value in _SOCKET_OPTIONS:
            try:
                sock.setsockopt(getattr(socket, level), getattr(socket, name), value)
            except (AttributeError, OSError) as error:
                _let_through(error)  # else the system lacks or refuses it, and all works without
        return sock

    # A look-up cannot be interrupted, so it gets a thread that may be left behind. Where there can
    # be none (at the interpreter's end, in a subinterpreter, under a limit), no deadline ends it.
    def _look_up(self, host: str, port: int) -> Any:
        import _thread
        import functools
        import socket
        import weakref
        self.exchange.next_wait_seconds()  # for a signal that came amid a message
        outcomes: Any = []
        going_on = _thread.allocate_lock()
        going_on.acquire()
        def look_up() -> None:
            try:
                # As a str the name would cost the import of the tables of IDNA.
                outcomes.append(socket.getaddrinfo(host.encode(), port, 0, socket.SOCK_STREAM))
            except UnicodeError:  # where a host has set another locale
                outcomes.append(socket.gaierror("the system's reason is not in UTF-8"))
            except Exception as error:  # noqa: BLE001 - the caller's thread raises it
                outcomes.append(error)
            going_on.release()
        # Not threading.Thread: that waits for ever where memory lacks, and may drop an interrupt.
        may_start = getattr(_thread, "daemon_threads_allowed", lambda: True)  # it is new in 3.12
        # With gevent's sockets, but not its threads, each thread would leave a hub of its own.
        is_patched = socket.socket.__module__ != "socket"
        is_mixed = is_patched and _thread.start_new_thread.__module__ == "_thread"
        if may_start() and not is_mixed and not sys.is_finalizing():
            run = functools.partial(look_up)
            get_run = weakref.ref(run)
            try:
                _thread.start_new_thread(run, ())
            except RuntimeError as error:
                _let_through(error)
            del run  # from now on only the thread keeps it, to its end
            while get_run() and not going_on.acquire(timeout=self.exchange.next_wait_seconds()):
                pass
        if not outcomes:  # there is no thread, or it could not begin
            look_up()
        outcome = outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _connect_to_first(self, addresses: list[Any]) -> Any:
        import selectors
        import socket
        connecting: Any = []
        end = time.monotonic() + _CONNECT_SECONDS
        next_start = 0.0
        failure = OSError("the name has no address")  # unless one of them fails
        selector = selectors.DefaultSelector()
        try:
            while addresses or connecting:
                now = time.monotonic()
                if now > end:
                    raise TimeoutError(f"no answer within {_rounded(_CONNECT_SECONDS)}")
                seconds = self.exchange.next_wait_seconds()
                if addresses and (now >= next_start or not connecting):
                    next_start = now + _NEXT_ADDRESS_SECONDS
                    try:
                        connecting.append(_start_connecting(addresses.pop(0)))
                        selector.register(connecting[-1], selectors.EVENT_WRITE)
                    except OSError as error:  # the kernel may lack the address's family
                        _let_through(error)
                        failure = error
                    continue
                if addresses:
                    seconds = min(seconds, next_start - now)
                for key, _ in selector.select(seconds):
                    sock: Any = key.fileobj
                    selector.unregister(sock)
                    connecting.remove(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if code == 0:
                        return sock
                    failure = OSError(code, os.strerror(code))
                    sock.close()
            raise failure
        finally:
            selector.close()
            for sock in connecting:
                sock.close()

    def _open_tunnel(self) -> None:
        """Have the proxy connect us to the API; from then on all bytes are the API's."""
        import http.client
        exchange = self.exchange
        authority = exchange.url.netloc
        if not exchange.url.port:
            authority += ":443"
        head = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n"
        if exchange.proxy_login:
            head += f"Proxy-Authorization: Basic {exchange.proxy_login}\r\n"
        self.sendall(f"{head}\r\n".encode())
        # http.client's own tunnel has no limit but one for each byte, and tells a refusal as text.
        # The reply is closed here, as Python would drop an interrupt amid an object's own end.
        with http.client.HTTPResponse(self, method="CONNECT") as reply:  # type: ignore[arg-type]
            reply.begin()
            self._end_head(reply)
        status = reply.status
        if not 200 <= status < 300:
            text = f"{exchange.proxy_name} refused with HTTP {status} {reply.reason}".rstrip()
            advice = _proxy_login_advice(exchange) if status == 407 else ""
            retryable = _is_retryable(status)
            raise exchange.error(TransportError, exchange.quote(text), advice, retryable=retryable)
        self.is_tunnelled = True
        self.received_bytes = 0  # those were the proxy's

    def _start_tls(self) -> None:
        """Start TLS by the same rules on every Python: those of create_default_context differ."""
        import ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # the default since Python 3.10
        # X509_V_FLAG_PARTIAL_CHAIN, as in curl and Python 3.13; it has a name since 3.10.
        context.verify_flags |= ssl.VerifyFlags(0x80000)
        context.set_alpn_protocols(["http/1.1"])  # or a server might choose HTTP/2
        if sys.platform == "win32":
            context.load_default_certs()  # they are in a store, not in a file or a folder
        # An empty variable counts as unset; to OpenSSL it would be the name of a file.
        environ, paths = self.exchange.environ, ssl.get_default_verify_paths()
        cafile = environ.get("SSL_CERT_FILE") or paths.openssl_cafile
        capath = environ.get("SSL_CERT_DIR") or paths.openssl_capath
        for places in ((cafile, None), (None, capath)):
            try:
                context.load_verify_locations(*places)
            except (OSError, ValueError) as error:
                _let_through(error)  # else the handshake may fail; _certificate_advice says why
        host = (self.exchange.url.hostname or "").rstrip(".")  # no certificate has that dot
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=host)
        self._through_tls(self.tls.do_handshake)
        self.tls_version = self.tls.version() or ""  # which it forgets when it fails

    def _through_tls(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Repeat an operation of TLS until it ends. Send what it makes, and feed it what comes."""
        # OpenSSL does not get the socket. It would read on, deaf to the deadline and to signals,
        # for as long as a server sends messages that it skips, such as HelloRequest or tickets.
        import ssl
        while True:
            try:
                result, is_done = operation(*arguments), True
            except ssl.SSLWantReadError:
                is_done = False
            except ssl.SSLError:
                self.exchange.observer.tick()  # for a signal that came amid a message
                try:
                    self.sock.settimeout(0)
                    self.sock.send(self.outgoing.read(), self.flags)  # an alert, not waited for
                except OSError:
                    pass  # the failure says more
                raise
            left = memoryview(self.outgoing.read())
            try:
                while left:
                    left = left[self._wait_for(self.sock.send, left, self.flags) :]
            except ConnectionError as error:
                _let_through(error)
                if operation != self.tls.read:  # else an answer may be there all the same
                    raise
            if is_done:
                return result
            data = self._wait_for(self.sock.recv, _TLS_BYTES)
            self.incoming.write(data)
            if not data:
                self.incoming.write_eof()

    def _request(self) -> urllib.request.Request:
        import urllib.request
        exchange = self.exchange
        headers = {"Accept": "application/json", "User-Agent": f"{_PROGRAM}/{__version__}"}
        headers["Authorization"] = f"Bearer {exchange.token}"
        if exchange.body is not None:
            headers["Content-Type"] = "application/json"
        is_proxied = exchange.proxy_name and exchange.url.scheme == "http"
        if is_proxied and exchange.proxy_login:
            headers["Proxy-Authorization"] = f"Basic {exchange.proxy_login}"
        url = exchange.url.geturl()
        request = urllib.request.Request(url, exchange.body, headers, method=exchange.method)
        request.timeout = None  # an opener sets it; here the exchange's deadline is the limit
        if is_proxied:
            request.set_proxy(exchange.peer.netloc.rpartition("@")[2], "http")
        return request

    def _converse(self) -> tuple[http.client.HTTPResponse, bytearray]:
        import http.client
        import socket
        import urllib.request
        exchange = self.exchange
        def reuse_connection(_host: str, **_: object) -> http.client.HTTPConnection:
            host = exchange.url.hostname or ""
            port = _DEFAULT_PORTS[exchange.url.scheme]
            connection = http.client.HTTPConnection(host, exchange.url.port or port)
            connection.default_port = port  # which the header Host leaves out
            connection.sock = self
            return connection
        start = time.monotonic()
        # From now on all but a good end resets the connection: else the kernel would send on, and
        # a run begin that had been given up. A TLS alert, which comes before that, has to arrive.
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.enter_state("unknown")  # from now on a byte of the request may have left
        # No opener, which would follow redirects. The debug level, a host's, prints the token.
        handler = urllib.request.HTTPHandler(debuglevel=0)
        with handler.do_open(reuse_connection, self._request()) as response:
            self._end_head(response)
            if response.status >= 300:
                self.max_bytes = self.received_bytes + _MAX_ERROR_BYTES
            if 300 <= response.status < 500:
                self.enter_state("refused")
            body = self._read_body(response)
        took = f"{len(body):,} bytes, {time.monotonic() - start:.3f} s"
        exchange.observer.explain(f"{exchange.where}: {response.status}, {took}")
        return response, body

    def _end_head(self, response: Any) -> None:
        import http.client
        # Of the interim answers http.client skips only 100. A 101 is not one: it ends HTTP.
        while 102 <= response.status < 200:
            response.headers = None  # or begin() would not read the next head
            response.begin()
        if response.fp.last_line.strip(b"\r") != b"\n":  # http.client takes an end for that, too
            raise http.client.IncompleteRead(b"")
        self.may_be_done = response.status in _USABLE and self.run_state == "unknown"
        lines = [f"{response.status} {response.reason}"]
        lines += [f"{name}: {text}" for name, text in response.getheaders()]
        self.exchange.observer.show_headers("<", map(self.exchange.quote, lines))

    def _read_body(self, response: Any) -> bytearray:
        """Read the body in pieces: for a piece http.client raises nothing where the body is cut."""
        import http.client
        import re
        body = bytearray()
        try:
            lengths = set(response.headers.get_all("Content-Length", []))
            if not re.fullmatch("[0-9]{0,18}", ",".join(lengths).strip()):  # or with a comma: two
                raise self.exchange.error(ProtocolError, "the answer has a bad Content-Length")
            while piece := response.read(_IO_BYTES):
                body += piece
            # http.client counts it down to 0. Without one the connection's end is the body's end.
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        except (OSError, http.client.HTTPException, BusContainersError, ValueError) as error:
            _let_through(error)
            # An error's status says enough, even with its body cut.
            if response.status < 300:
                if isinstance(error, ValueError):  # of a chunk's length, if it is negative
                    raise http.client.IncompleteRead(b"") from None
                raise
        return body

    def _wait_for(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            self.sock.settimeout(self.exchange.next_wait_seconds())
            try:
                return operation(*arguments)
            except OSError as error:
                _let_through(error)
                if error.args != ("timed out",):  # the kernel's
                    raise

    def sendall(self, data: bytes) -> None:
        # http.client sends a head by itself, and no JSON body ends in an empty line.
        if data.endswith(b"\r\n\r\n"):
            lines = data.decode("latin-1").splitlines()
            self.exchange.observer.show_headers(">", lines[:-1])
        # Not the socket's sendall, which does not tell how much had left when a wait ended.
        left = memoryview(data)
        try:
            while left:
                if not self.tls:
                    count = self._wait_for(self.sock.send, left, self.flags)
                else:
                    count = self._through_tls(self.tls.write, left[:_TLS_BYTES])
                left = left[count:]
            self.may_be_done = self.run_state == "unknown"
        except ConnectionError as error:
            _let_through(error)  # else an answer, such as a 413, may have come all the same

    def makefile(self, _mode: str) -> io.BufferedReader:
        return _AnswerReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = 0
        if not self.tls:
            count = self._wait_for(self.sock.recv_into, buffer)
        else:
            import ssl
            try:
                count = self._through_tls(self.tls.read, len(buffer), buffer)
            except (ssl.SSLEOFError, ssl.SSLSyscallError) as error:  # the latter from OpenSSL 1.1
                # Else some servers end without a word; the answer's length shows what is cut.
                _let_through(error)
            except ssl.SSLError:
                self.may_be_done = False  # this is no loss of the connection
                raise
        self.has_ended = not count
        if count and not self.received_bytes:
            self.may_be_done = False  # until a head says so
        # Counted here, as http.client takes a chunk of length -1 for all up to the end.
        self.received_bytes += count
        if self.received_bytes > self.max_bytes:
            raise self.exchange.error(ProtocolError, "the answer is larger than 1 GiB")
        return count

    # In C: at an object's end, such as a reader's, Python drops what a signal's handler raises.
    close = io.RawIOBase.flush  # for http.client, which closes it before it has read the body


class _AnswerReader(io.BufferedReader):
    # http.client has email parse the headers, which would look for parts or a message in the body,
    # for minutes and with any exception, end a line at a lone CR, and keep a blank after `chunked`.
    def readline(self, limit: int | None = -1) -> bytes:
        import re
        line = re.sub(rb"\r(?!\n)", b" ", super().readline(limit))
        line = re.sub(rb"(?<=\S)[ \t]+(?=\r?\n)", b"", line)
        kind = b"(?i)^((content-type:|[ \t]).*?(multipart|message))/"
        self.last_line = re.sub(kind, rf"\1{_NOT_OF_EMAIL}/".encode(), line)
        return self.last_line


def _start_connecting(found: Any) -> Any:
    import socket
    *kind, _, address = found
    sock = socket.socket(*kind)
    sock.setblocking(False)
    try:
        try:
            sock.connect(address)
        except BlockingIOError as error:
            _let_through(error)  # else it is on its way
        if sock.getsockname()[1] == address[1]:  # TCP may choose that port for us
            raise OSError("nobody listens there, so the port was connected to itself")
    except OSError:
        sock.close()
        raise
    return sock


# ---- Answers: an answer to a document, a failure to an error -----------------------------------

def _usable_document(exchange: _Exchange, shape: Any, answer: Any, body: bytearray) -> Any:
    if (exchange.method, answer.status) == ("DELETE", 204) and not body:
        return {}
    document, problem = _parse_body(exchange, body)
    if not 200 <= answer.status < 300:
        raise _error_of_status(exchange, answer, document)
    if answer.status not in _USABLE:
        problem = "the API answers with 200, 201, 202 or 204"
    elif not problem and not isinstance(document, shape):
        problem = f"the answer is of an unexpected type, {type(document).__name__}"
    elif not problem and isinstance(document, dict) and document.get("error"):
        error = _error_object(document)
        said = _text(error, "message") or _text(error, "type") or "it does not say which"
        problem = f"the answer is an error: {exchange.quote(said)}"
    if problem:
        raise exchange.error(ProtocolError, f"HTTP {answer.status}, but {problem}")
    return document


def _parse_body(exchange: _Exchange, body: bytearray) -> tuple[Any, str]:
    """Return the document of an answer, or None and what is wrong with it. Empties the body."""
    text = ""
    try:
        text = body.decode(errors="replace")
        if "\ufffd" in text and text.encode() != body:  # the server may have sent one
            exchange.observer.warn("the answer is not all UTF-8: what is not became U+FFFD")
        if len(body) > _IO_BYTES:  # parsing takes long
            exchange.observer.tick()  # for a signal that came amid a message
        body.clear()  # it may be large, and the text is as large again
        return _parse_json(text[1:] if text.startswith("\ufeff") else text), ""
    except MemoryError as error:
        _let_through(error)
        return None, "the answer is too large for this machine's memory"
    except (ValueError, RecursionError) as error:
        _let_through(error)
        problem = f"the answer is not usable JSON: {exchange.quote(_reason_of(error))}"
    if not text.strip():
        problem = "the answer is empty"
    elif text.lstrip().startswith("<"):
        problem = "the answer is an HTML page: a captive portal, or not the API's URL?"
    return None, problem


def _parse_json(text: str) -> Any:
    """Parse JSON proper: no NaN, no number too large, nothing deeper than can be written again."""
    import itertools
    import json
    def parse_float(digits: str) -> float:
        value = float(digits)
        if not abs(value) <= sys.float_info.max:  # NaN, too, is refused so
            raise ValueError(f"{digits[:20]} is not a number in JSON")
        return value
    def parse_int(digits: str) -> int:
        if len(digits) > _MAX_JSON_DIGITS:
            raise ValueError(f"it has a number of more than {_MAX_JSON_DIGITS:,} digits")
        return int(digits)
    document = json.loads(
        text, parse_float=parse_float, parse_constant=parse_float, parse_int=parse_int
    )
    # Level by level, as Python limits recursion. A set is three times as fast as isinstance.
    containers = {dict, list}
    level: Any = [[document]]
    for _ in range(_MAX_JSON_DEPTH + 1):
        groups = (node.values() if isinstance(node, dict) else node for node in level)
        children = itertools.chain.from_iterable(groups)
        level = [child for child in children if child.__class__ in containers]
        if not level:
            return document
    raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} deep")


def _error_of_status(exchange: _Exchange, answer: Any, document: Any) -> ApiError:
    document = _redacted_document(document, exchange.secrets)
    fields = _error_object(document)
    said = exchange.quote(_text(fields, "type") or answer.reason)
    reason = f"{exchange.where}: HTTP {answer.status} {said}".rstrip()
    message = _text(fields, "message")
    if message:
        reason += f": {exchange.quote(message.strip())}"
    error = ApiError(reason, answer.status, document)
    retry_after = answer.headers.get("retry-after", "")
    if retry_after.isascii() and retry_after.isdigit():
        error.retry_after_seconds = int(retry_after[:9])
    advice = [*_advice_of_headers(exchange, answer, error), *_billing_facts(exchange, document)]
    if error.action:
        advice.append(f"action: {exchange.quote(error.action)}")
    if error.command:
        advice.append(f"run: {exchange.quote(error.command)}")
    # The server does not say which of its reasons it has, but the token's claims may.
    wants_scope = answer.status == 403 and "scope" in f"{error.type} {error.message}".lower()
    if answer.status == 401 or wants_scope:
        facts = _token_facts(exchange.token, _SCOPES[exchange.method])
        advice += [*(f"the token {fact}" for fact in facts), _TOKEN_ADVICE]
    error.advice = "; ".join(advice)
    return error


def _advice_of_headers(exchange: _Exchange, answer: Any, error: ApiError) -> Iterator[str]:
    status = answer.status
    if 300 <= status < 400:
        target = exchange.quote(answer.headers.get("location", "nowhere"))
        yield f"redirected to {target}, not followed; check `api_url`"
    if status == 404 and f"/api/v1{_API_PATH}" in exchange.where:
        yield "`api_url` ends in a part of the API's path: give its origin alone"
    if exchange.proxy_name and exchange.url.scheme == "http" and not error.type:
        text = f"this may be the answer of {exchange.proxy_name}, not of the API"
        if status == 407:
            text = f"by {exchange.proxy_name}; {_proxy_login_advice(exchange)}"
        yield text
    retry_after = answer.headers.get("retry-after")
    if retry_after:
        yield f"Retry-After: {exchange.quote(retry_after)}"


def _proxy_login_advice(exchange: _Exchange) -> str:
    if exchange.proxy_login:
        return "it refused the login in its URL"
    return f"give it a login, {_PROXY_URL}"


def _billing_facts(exchange: _Exchange, document: Any) -> Iterator[str]:
    error = _error_object(document)
    usage = _field(error, "usage", dict)
    used = _field(usage, "used", (int, float))
    limit = _field(usage, "limit", (int, float))
    if used is not None and limit is not None:
        meter = _text(usage, "meter_event_name") or _text(usage, "feature") or "quota"
        what = meter.removeprefix("bus_").replace("_", " ")
        window = _text(usage, "window") or "period"
        when = {"day": "today", "total": "in total"}.get(window, f"this {window}")
        yield exchange.quote(f"{used:,} of {limit:,} {what} used {when}")
    plan = _text(error, "recommended_plan") or _text(usage, "upgrade_plan_id")
    if plan:
        yield f"recommended plan: {exchange.quote(plan)}"


def _error_of_failure(attempt: _Attempt, failure: Exception) -> BusContainersError:
    import http.client  # loaded before; for `ssl` there may be no memory, or it is missing
    exchange = attempt.exchange
    if _is_late_refusal(attempt, failure):
        attempt.enter_state("not_sent")  # on which the branches below depend
    reason = exchange.quote(_reason_of(failure))
    if isinstance(failure, MemoryError):
        return exchange.error(ProtocolError, "there is not enough memory for it and its answer")
    if exchange.url.scheme == "https":
        error = _error_of_tls(attempt, failure, reason)
        if error:
            return error
    if isinstance(failure, OSError) and attempt.run_state == "not_sent":
        return _error_of_connecting(attempt, failure, reason)
    is_lost = isinstance(failure, OSError)
    if isinstance(failure, http.client.IncompleteRead):
        is_lost = attempt.has_ended
        reason = "the answer was cut short" if is_lost else "a chunk has no length"
    is_http = attempt.received_bytes > 0 and type(failure) is not http.client.BadStatusLine
    advice = _https_hint(exchange, is_http)
    if is_lost:
        exchange.was_lost |= attempt.may_be_done
        text = f"the connection was lost: {reason}"
        return exchange.error(TransportError, text, advice, retryable=True)
    if reason.lstrip().startswith("<"):
        reason = "it starts with a page of HTML"
    source = f" of {exchange.proxy_name}" if attempt.run_state == "not_sent" else ""  # to CONNECT
    return exchange.error(ProtocolError, f"the answer{source} is not valid HTTP: {reason}", advice)


def _https_hint(exchange: _Exchange, is_http: bool) -> str:
    if exchange.url.scheme == "http" and not exchange.proxy_name and not is_http:
        return "is this port for https?"
    return ""


def _error_of_connecting(attempt: _Attempt, failure: OSError, reason: str) -> BusContainersError:
    import socket
    exchange = attempt.exchange
    peer = "the API"
    advice = f"check `api_url`; `{_PROGRAM} status --wait 60s` waits for a platform"
    if exchange.proxy_name and not attempt.is_tunnelled:
        peer, advice = exchange.proxy_name, "check HTTPS_PROXY and HTTP_PROXY"
    text = f"cannot connect to {peer}: {reason}"
    if isinstance(failure, socket.gaierror):
        text = f"cannot resolve the name of {peer}: {reason}"
    return exchange.error(TransportError, text, advice, retryable=True)


def _error_of_tls(attempt: _Attempt, failure: Any, reason: str) -> BusContainersError | None:
    import ssl
    exchange = attempt.exchange
    if not isinstance(failure, ssl.SSLError) or attempt.run_state != "not_sent":
        return None
    text = f"TLS: {reason}"
    if failure.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED":
        advice = "the server asks for a client certificate, and none can be given"
        return exchange.error(TransportError, text, advice)
    if isinstance(failure, ssl.SSLCertVerificationError):
        text = f"TLS: the certificate is refused: {exchange.quote(failure.verify_message)}"
        return exchange.error(TransportError, text, _certificate_advice(exchange.environ))
    # A gateway whose backend is not up may take the connection and end it.
    is_end = isinstance(failure, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError))
    return exchange.error(TransportError, text, "is this port for https?", retryable=is_end)


def _is_late_refusal(attempt: _Attempt, failure: Any) -> bool:
    """Return whether a server refused a missing client certificate, and so read no request."""
    # A server of TLS 1.3 does so when the request is already on its way. A byte of an answer or a
    # session ticket would show that it had accepted the handshake.
    is_refusal = getattr(failure, "reason", "") == "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    if not is_refusal or attempt.tls_version != "TLSv1.3" or attempt.received_bytes:
        return False
    return not getattr(attempt.tls.session, "has_ticket", False)


def _certificate_advice(environ: Mapping[str, str]) -> str:
    import ssl
    names = list(filter(environ.get, ("SSL_CERT_FILE", "SSL_CERT_DIR")))
    for name in names:
        problem = _problem_of_ca(environ[name], is_file=name == "SSL_CERT_FILE")
        if problem:
            return f"{name} names {environ[name]}, which {problem}"
    paths = ssl.get_default_verify_paths()
    has_files = any(names for _, _, names in os.walk(paths.openssl_capath))
    if not names and not has_files and not os.path.isfile(paths.openssl_cafile):
        return "no CA certificates here: install the package ca-certificates, or set SSL_CERT_FILE"
    return "check `api_url` and the clock, or set SSL_CERT_FILE to a PEM file with the server's CA"


def _problem_of_ca(path: str, is_file: bool) -> str:
    import ssl
    try:
        if is_file:
            open(path, "rb").close()  # its reason is a better one
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        elif os.pathsep not in path and not os.listdir(path):
            return "is empty"
    except ssl.SSLError:
        return "holds no certificate in PEM that can be used"
    except (OSError, ValueError) as error:
        _let_through(error)
        return f"cannot be read: {_reason_of(error)}"
    return ""


# ---- Formats: a document in, pieces of text out ------------------------------------------------

# Columns that the API names otherwise, or in more than one way: the keys to look at, in this order.
_ALIASES = {
    "id": ("id", "provider"),
    "run_id": ("run_id", "id"),
    "owner": ("owner_identity_id", "owner_account_id"),
    "command": ("args", "command"),
}


def _items(command: str, document: Any) -> list[Document]:
    items = document
    if command in ("status", "runs"):
        items = document.get("items", [document.get("status")])
    if not isinstance(items, list):
        items = [items]
    return [item for item in items if isinstance(item, dict)]


def _cell(item: Document, column: str) -> str:
    """Return the value of a column as text: an object as compact JSON, what is absent as empty."""
    for name in _ALIASES.get(column, (column,)):
        value = item.get(name)
        if value is not None:
            break
    if isinstance(value, str):
        return value
    if type(value) is int:  # json.dumps would take thirty times as long
        return str(value)
    if value is None:
        return ""
    if column == "command" and isinstance(value, list):
        import shlex
        return " ".join(shlex.quote(str(word)) for word in value)
    import json
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _format_json(_command: str, document: Any) -> Iterator[str]:
    """Give JSON with an indent of two, key by key where a text in it is too large to hold twice."""
    import json
    # Else in one write, as the results of runs that share a pipe would mix.
    if not any(len(_field(document, name, str) or "") > _IO_BYTES for name in document):
        yield f"{json.dumps(document, ensure_ascii=False, indent=2)}\n"
        return
    before = "{"
    for name, value in document.items():
        yield f"{before}\n  {json.dumps(name, ensure_ascii=False)}: "
        # A value stands two deeper than it is written here; no string holds a line break.
        yield json.dumps(value, ensure_ascii=False, indent=2).replace("\n", "\n  ")
        before = ","
    yield "\n}\n"


def _format_text(command: str, document: Any) -> Iterator[str]:
    if command == "help":
        yield document
    elif command == "run":
        yield _cell(document, "stdout")
    elif command == "delete":
        for item in _items(command, document):
            yield f"deleted {_visible(_cell(item, 'run_id'))}\n"
    else:
        yield from _text_table(_COMMANDS[command].columns, _items(command, document))


def _text_table(columns: Sequence[str], items: Sequence[Document]) -> Iterator[str]:
    table = []
    for column in columns:
        cells = [_cell(item, column) for item in items]
        if not "".join(cells).isprintable():
            cells = list(map(_visible, cells))
        if column == "command":
            cells = [cell[:_MAX_CELL] for cell in cells]
        if any(cells) or column not in ("started_at", "command"):  # which providers may lack
            table.append([column.upper().replace("_", " "), *cells])
    widths = [min(max(map(len, cells)), _MAX_CELL) for cells in table]
    line = "  ".join(f"{{:{width}}}" for width in widths)
    for row in zip(*table):
        yield f"{line.format(*row).rstrip()}\n"


def _format_tsv(command: str, document: Any) -> Iterator[str]:
    columns = _COMMANDS[command].columns
    yield "\t".join(columns) + "\n"
    for item in _items(command, document):
        cells = [  # str.translate would take twice as long
            _cell(item, column).replace("\\", "\\\\").replace("\t", "\\t")
            .replace("\n", "\\n").replace("\r", "\\r") for column in columns
        ]
        yield "\t".join(cells) + "\n"


# To add a format, add a function above, a row here and a word to `--format`.
_FORMATS: dict[str | None, Callable[[str, Any], Iterator[str]]] = {
    "json": _format_json,
    "text": _format_text,
    "tsv": _format_tsv,
    "opencli": _format_json,
    None: _format_text,  # help for people
}


# ---- The command line as tables: help, parser and OpenCLI document are made of them -------------

class _Command:
    def __init__(
        self, method: str, failure_code: int, columns: str,
        summary: str, description: str,
        arguments: Sequence[tuple[str, bool, bool, str]],
        examples: Sequence[tuple[str, str]],
    ) -> None:
        self.method = method  # of its request; it decides which scope the token needs
        self.failure_code = failure_code  # for failures that have no exit code of their own
        self.columns = columns.split()  # of the formats that are tables
        self.summary = summary
        self.description = description
        self.arguments = arguments  # name, required, repeatable, description
        self.examples = examples  # command line, what it does


# To add a command, add a row here, a function and its name in `_execute`, and a method of `Client`.
_COMMANDS = {
    "status": _Command(
        "GET", 1, "id state owner details",
        "show whether the platform is ready",
        "Prints the state of the account's container runner. With --wait it asks\n"
        "again while there is no token file, name, port or answer, and while the\n"
        "runner is starting, pending or provisioning.",
        [],
        [("bus-containers status --wait 2m", "wait for the platform")],
    ),
    "run": _Command(
        "POST", 125, "run_id exit_code duration_ms image runner_name stdout stderr",
        "run a command in a fresh container and print the result",
        "Prints the result when the command has ended, and exits with its exit code.\n"
        "With --format text its output is passed on as it is. All that follows -- or\n"
        "the first word that is not an option belongs to the command. The exchange\n"
        "may take 30 s more than --timeout-seconds, or 30 min if that is not given.\n"
        "Nothing of this machine reaches the container: no file, variable, working\n"
        "directory or standard input. Put what it needs into `sh -c`, or use an image\n"
        "that holds it.",
        [
            ("command", True, False, "the program to run in the container"),
            ("arg", False, True, "an argument of that program"),
        ],
        [
            ("bus-containers run -- codex --version", "run in the profile codex"),
            ("bus-containers run --image alpine -- ls", "run in an image"),
        ],
    ),
    "runs": _Command(
        "GET", 1, "run_id state exit_code duration_ms image started_at command",
        "list the account's runs",
        "Prints the runs of the token's account, those in progress too.",
        [],
        [("bus-containers runs -f tsv", "a header row, then one row per run")],
    ),
    "delete": _Command(
        "DELETE", 1, "run_id deleted",
        "delete runs, stopping those in progress",
        "Continues after a run that cannot be deleted, and then exits with 1.",
        [("run_id", True, True, "the id of a run")],
        [("bus-containers delete run_123", "delete a run")],
    ),
    "help": _Command(
        "", 1, "",
        "print help for the program or a command",
        "With --format, prints the whole command line as an OpenCLI document.",
        [("command", False, False, "a command of this program")],
        [("bus-containers help --format opencli", "describe all this to a program")],
    ),
}

# To add an option, add a row here and use its value where the command runs. It takes a value in
# each command or in none. A default is text for the help, and for a choice (`a|b`) the value, too.
_OPTIONS = [  # command ("" is every one), short name, long name, value, description, default
    ("", "-h", "--help", "", "print help; after a command, help for it", ""),
    ("", "-V", "--version", "", "print the version", ""),
    ("", "", "--api-url", "URL", "the API's origin, with a path prefix if any", ""),
    ("", "", "--token-file", "PATH", "read the token from a file, - is standard input", ""),
    ("", "", "--timeout", "DURATION", "limit of the HTTP exchange, 0 is none", "30s"),
    ("", "-C", "--chdir", "DIR", "work in DIR: relative paths are relative to it", ""),
    ("", "-o", "--output", "FILE", "write the result to FILE, - is standard output", ""),
    ("", "-f", "--format", "json|text|tsv", "format of the result", "json"),
    ("", "-q", "--quiet", "", "discard the result, print nothing but errors", ""),
    ("", "-v", "--verbose", "", "report what was resolved, and each request", ""),
    ("", "", "--trace", "", "report HTTP headers, without the token; as -vv", ""),
    ("", "", "--color", "auto|always|never", "colour, on standard error only", "auto"),
    ("", "", "--no-color", "", "no colour", ""),
    ("", "", "--error-format", "text|json", "json: errors as objects, one per line", "text"),
    ("status", "", "--wait", "DURATION", "wait for a platform that is coming up", ""),
    ("run", "", "--profile", "NAME", "the container's profile", _DEFAULT_PROFILE),
    ("run", "", "--image", "REF", "an image instead of a profile", ""),
    ("run", "", "--timeout-seconds", "N", "stop the command after N seconds", ""),
    ("run", "", "--timeout", "DURATION", "limit of the HTTP exchange, 0 is none", "30m"),
    ("help", "-f", "--format", "opencli|json", "print an OpenCLI document; both are the same", ""),
]
# Which commands have it (125 or 1: those that fail with that code, 0: all); exit code; description.
_EXIT_CODES = [
    (0, "0", "success (for run: of the command, else the command's own exit code)"),
    (1, "1", "any other failure, except of run"),
    (0, "2", "usage error, nothing was sent"),
    (125, "125", "run: the client or platform failed; other codes are the command's"),
    (125, "N", "run: the command's exit code, 128+S for signal S, 255 if none fits"),
    (0, "130", "interrupted"),
    (0, "143", "terminated"),
]
_VARIABLES = [  # name, may hold a secret, description, default
    ("BUS_AI_API_URL", False, "the API's URL, after --api-url", _DEFAULT_API_URL),
    ("BUS_API_BASE_URL", False, "the API's URL, after BUS_AI_API_URL", ""),
    ("BUS_AI_TOKEN", True, "the bearer token, after --token-file", ""),
    ("BUS_API_TOKEN", True, "the bearer token, after BUS_AI_TOKEN", ""),
    ("BUS_CONFIG_DIR", False, "holds auth/api-token, the last place for a token", ""),
    ("XDG_CONFIG_HOME", False, "its bus/ comes after BUS_CONFIG_DIR", "~/.config"),
    ("HTTPS_PROXY", True, f"proxy for https, {_PROXY_URL}", ""),
    ("HTTP_PROXY", True, "proxy for http, unless REQUEST_METHOD is set", ""),
    ("NO_PROXY", False, "hosts without proxy: names, .suffixes, addresses, CIDR, *", ""),
    ("SSL_CERT_FILE", False, "file of CA certificates, instead of the system's file", ""),
    ("SSL_CERT_DIR", False, "folder of CA certificates, instead of the system's folder", ""),
    ("NO_COLOR", False, "no colour with --color auto, as with TERM=dumb", ""),
]
_SUMMARY = "run commands in containers of the AI Platform"
_DESCRIPTION = (
    "Runs a command in a short-lived container of the account in a bearer token,\n"
    "and gives back its output and its exit code. The result goes to standard\n"
    "output, all else to standard error. Options may follow the command, too."
)


def _exit_codes_of(command: str | None) -> list[tuple[str, str]]:
    failure_codes = {row.failure_code for name, row in _COMMANDS.items() if command in (None, name)}
    return [(code, text) for wanted, code, text in _EXIT_CODES if wanted in (0, *failure_codes)]


def _options_of(command: str | None) -> dict[str, Any]:
    return {row[2]: row for row in _OPTIONS if row[0] in ("", command)}


def _usage(command: str) -> str:
    words = f"{_PROGRAM} [OPTION...] {command}"
    if command == "run":
        words += " [--]"
    for name, is_required, is_repeatable, _ in _COMMANDS[command].arguments:
        word = name.upper()
        if is_repeatable:
            word += "..."
        words += f" {word}" if is_required else f" [{word}]"
    return words


def _section(rows: Sequence[Sequence[str]], width: int = 0) -> str:
    width = width or max(len(row[0]) for row in rows) + 2
    lines = []
    for term, text, *default in rows:
        line = f"    {term:{width}}{text}"
        if any(default):
            line += f" [{default[0]}]"
        lines.append(line)
    return "\n".join(lines)


def _options_section(owner: str) -> str:
    rows = []
    width = 0
    for command, short, long, value, *rest in _OPTIONS:
        term = f"{short}, {long} {value}".strip(", ")
        width = max(width, len(term) + 2)
        if command == owner:
            rows.append((term, *rest))
    return _section(rows, width)


def _page(command: str | None) -> str:
    names = [command] if command else list(_COMMANDS)
    if command:
        row = _COMMANDS[command]
        title, description = f"{_PROGRAM} {command} - {row.summary}", row.description
        see = f"{_PROGRAM} help, for the options of every command and the environment"
        tables = {"OPTIONS": _options_section(command)}
    else:
        title, description = f"{_PROGRAM} - {_SUMMARY}", _DESCRIPTION
        see = f"{_PROGRAM} help COMMAND, bus auth, bus billing"
        options = _options_section("")
        for name in names:
            if _options_section(name):
                options += f"\n  of {name}\n{_options_section(name)}"
        tables = {
            "COMMANDS": _section([(name, _COMMANDS[name].summary) for name in names]),
            "OPTIONS": options,
            "ENVIRONMENT": _section([(name, *rest) for name, _, *rest in _VARIABLES]),
        }
    indented = description.replace("\n", "\n    ")
    sections = {
        "NAME": f"    {title}",
        "SYNOPSIS": "\n".join(f"    {_usage(name)}" for name in names),
        "DESCRIPTION": f"    {indented}",
        **tables,
        "EXIT STATUS": _section(_exit_codes_of(command)),
        "EXAMPLES": _section([row for name in names for row in _COMMANDS[name].examples]),
        "SEE ALSO": f"    {see}",
    }
    return "\n".join(f"{name}\n{text}\n" for name, text in sections.items() if text)


def _objects(names: str, rows: Iterable[Sequence[Any]]) -> list[Document]:
    return [dict(zip(names.split(), row)) for row in rows]


def _opencli_document() -> Document:
    variables = _objects("name secret description default", _VARIABLES)
    for variable in variables:
        is_secret = variable["secret"]
        variable.update(required=False, schema={"type": "string"})
        variable["affects"] = [name for name, row in _COMMANDS.items() if row.method]
        variable["safeHandling"] = {
            "printable": not is_secret, "storeInDotenv": not is_secret, "redactInLogs": is_secret,
        }
    return {
        "opencli": "0.1.0",
        "info": {
            "title": _PROGRAM, "version": __version__, "summary": _SUMMARY,
            "description": " ".join(_DESCRIPTION.split()),
        },
        "commands": [_opencli_command(name, row) for name, row in _COMMANDS.items()],
        "metadata": {
            "io.busdk.profile": {"version": "0.1", "module": "containers"},
            "io.busdk.environment": {
                "version": "0.1", "precedence": ["option", "environment", "file", "default"],
                "variables": variables,
            },
        },
    }


def _opencli_command(command: str, row: _Command) -> Document:
    options = []
    for _, short, name, value, text, default in _options_of(command).values():
        options.append({
            "name": name, "aliases": short.split(), "description": text, "valueName": value,
            "required": False, "repeatable": name == "--verbose", "default": default,
        })
    # Go programs read a code as an integer. The container's own has no number.
    codes = [(int(code), text) for code, text in _exit_codes_of(command) if code.isdigit()]
    return {
        "name": command, "summary": row.summary,
        "description": " ".join(row.description.split()),
        "usage": _usage(command), "options": options,
        "arguments": _objects("name required repeatable description", row.arguments),
        "exitCodes": _objects("code description", codes),
        "examples": _objects("command summary", row.examples),
    }


# ---- Scanner and parser: argv to a command, its options and its words ---------------------------

def _scan(argv: Sequence[str]) -> tuple[str | None, _Options, list[str]]:
    # argparse does not see argv, only the options that are spelled out here: it has its own way
    # with `--` and with values that start with a dash, and another one in each version.
    command = None
    options: list[tuple[str, str | None]] = []
    words: list[str] = []
    ahead = iter(argv)
    for word in ahead:
        if word == "--":
            words += ahead
        elif word.startswith("-") and word != "-":
            options += _scan_options(word, ahead)
        elif command is None:
            command = word
        else:
            words.append(word)
            if command == "run":  # the rest is the container's
                words += ahead
    return command, options, words


def _scan_options(word: str, ahead: Iterator[str]) -> _Options:
    """Return the options in a word: `-qo F` holds `--quiet`, and `--output` with its value."""
    known = {}
    for _, short, long, value_name, *_ in _OPTIONS:
        known[short] = known[long] = (long, value_name)
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        if equals:
            return [(name, value)]
        has_value = name in known and known[name][1]
        return [(name, next(ahead, None) if has_value else None)]
    options: list[tuple[str, str | None]] = []
    for end, letter in enumerate(word[1:], 2):
        name, value_name = known.get(f"-{letter}", (f"-{letter}", ""))
        if value_name:
            return [*options, (name, word[end:] or next(ahead, None))]
        options += [(name, None)]
    return options


def _parse(command: str | None, options: _Options, words: list[str]) -> argparse.Namespace:
    rows = _options_of(command)
    arguments = []
    for name, value in options:
        if name not in rows:
            raise _UsageError(_unknown_option(name))
        value_name = rows[name][3]
        # argparse drops a value of `--` before Python 3.12.2, so it counts as none.
        if value in (None, "--") and value_name:
            raise _UsageError(f"{name} needs a value: {name} {value_name}")
        if value is not None and not value_name:
            raise _UsageError(f"{name} does not take a value")
        arguments.append(name if value is None else f"{name}={value}")
    if command not in _COMMANDS:
        problem = f"unknown command {command!r}" if command else "no command"
        raise _UsageError(f"{problem}: use one of {', '.join(_COMMANDS)}")
    args = _build_parser(rows).parse_args(arguments)
    args.command, args.words = command, words
    _check_combination(args)
    return args


def _build_parser(rows: Mapping[str, Any]) -> argparse.ArgumentParser:
    import argparse
    import functools
    # add_argument makes a formatter, which would ask the terminal for its width, and for colours.
    plain: dict[str, Any] = {}
    if sys.version_info >= (3, 14):
        plain = {"color": False}
    formatter: Any = functools.partial(argparse.HelpFormatter, width=80, **plain)
    options = {"add_help": False, "allow_abbrev": False, "formatter_class": formatter, **plain}
    parser = argparse.ArgumentParser(_PROGRAM, **options)
    for _, _, name, value_name, _, default in rows.values():
        if not value_name:
            parser.add_argument(name, action="count", default=0)
            continue
        # The other defaults (30s, 30m, codex) depend on more: the code that uses them has them.
        chosen = default if "|" in value_name and default else None
        # Not a ValueError, which argparse would print in its own way.
        convert = functools.partial(_as_usage_error, _convert, value_name, what=f"{name}: ")
        parser.add_argument(name, type=convert, default=chosen)
    return parser


def _unknown_option(name: str) -> str:
    if name.startswith("--token"):
        return "no option takes a token: use --token-file PATH, BUS_AI_TOKEN or BUS_API_TOKEN"
    owners = [command for command, _, long, *_ in _OPTIONS if name == long]
    if owners:
        return f"{name} is an option of {' and '.join(owners)}"
    return f"no such option: {name}"


def _convert(value_name: str, text: str) -> Any:
    if not text and value_name != "URL":  # what is wrong with a URL is said where it is resolved
        raise ConfigError("the value is empty")
    if "|" in value_name:
        if text not in value_name.split("|"):
            raise ConfigError(f"{text!r} is not {value_name.replace('|', ' or ')}")
    elif value_name == "DURATION":
        seconds = parse_duration(text)
        if seconds < 0:
            raise ConfigError(f"{text!r} is not a duration >= 0")
        return seconds
    elif value_name == "N":
        import re
        if not re.fullmatch("[0-9]{1,15}", text):
            raise ConfigError(f"{text!r} is not {_WHOLE_NUMBER}")
        return int(text)
    elif value_name in ("DIR", "FILE", "PATH"):
        # As the locale spells it, in place of the UTF-8 that _decode_argument made of it.
        return os.fsdecode(text.encode())
    return text


def _check_combination(args: argparse.Namespace) -> None:
    if args.quiet and (args.verbose or args.trace):
        raise _UsageError("--quiet and --verbose or --trace exclude each other")
    arguments = _COMMANDS[args.command].arguments
    most = len(arguments)
    for _, is_required, is_repeatable, _ in arguments:
        if is_required and not args.words:
            raise _UsageError(f"missing argument: {_usage(args.command)}")
        if is_repeatable:
            most = len(args.words)
    if len(args.words) > most:
        raise _UsageError(f"{args.command} does not take the argument {args.words[-1]!r}")
    if args.command == "run":
        _as_usage_error(_run_request, args.words, args.profile, args.image, args.timeout_seconds)
    if args.command == "delete":
        _as_usage_error(_path_of, *args.words)


def _as_usage_error(function: Callable[..., Any], *values: Any, what: str = "") -> Any:
    try:
        return function(*values)
    except ConfigError as error:
        raise _UsageError(f"{what}{error.reason}", error.advice) from None


# ---- Output: what goes to standard error, and the way of a result -------------------------------

def _descriptor(stream: Any) -> int:
    # -1 stands for none. A host's own object, as that of gzip, may have one that only it may use.
    if type(stream) is not io.TextIOWrapper:
        return -1
    try:
        file = getattr(stream.buffer, "raw", stream.buffer)
        return stream.fileno() if isinstance(file, io.FileIO) else -1
    except (OSError, ValueError) as error:  # it is closed
        _let_through(error)
        return -1


def _is_writable(descriptor: int, seconds: float) -> bool:
    try:
        import selectors
        # That for `select` takes no descriptor over 1023; for `poll` there is none under eventlet.
        selector = getattr(selectors, "PollSelector", selectors.SelectSelector)()
        selector.register(descriptor, selectors.EVENT_WRITE)
        return bool(selector.select(seconds))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a script, or no memory
        _let_through(error)
        return True  # nobody knows, as on Windows


def _write_all(descriptor: int, pieces: Iterable[str]) -> None:
    for piece in pieces:
        for start in range(0, len(piece), _IO_BYTES):
            part = piece[start : start + _IO_BYTES]
            left = memoryview(part.encode("utf-8", "backslashreplace"))  # of a lone surrogate
            while left:  # a pipe may take a part only
                try:
                    left = left[os.write(descriptor, left) :]
                except BlockingIOError as error:  # another process has made it non-blocking
                    _let_through(error)
                    _is_writable(descriptor, _TICK_SECONDS)
                    time.sleep(_NO_ROOM_SECONDS)
    if stat.S_IFMT(os.fstat(descriptor).st_mode) in (stat.S_IFREG, stat.S_IFBLK, stat.S_IFDIR):
        import errno
        copy: Any = None
        for call in (os.fsync, os.dup):
            try:
                copy = call(descriptor)
            except OSError as error:  # some files cannot be synced; or no descriptor is left
                _let_through(error)
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EMFILE):
                    raise
        if copy is not None:  # a share or a thin disk may tell only at a close that it is full
            os.close(copy)


def _write_in_time(stream: Any, data: bytes, seconds: float) -> bytes:
    """Write a message, and return what is left of it where its reader takes no part in time."""
    descriptor = _descriptor(stream)
    if descriptor < 0:
        _write_stream(stream, [data.decode()])
        return b""
    # Opened anew, not to wait. Else write(2) would, for a terminal that is almost full, and a pipe
    # that another process has just filled. The flag of this descriptor is that of all who have it.
    own = descriptor
    try:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            os.lseek(descriptor, 0, os.SEEK_END)  # `--output` may have written to it
        elif stat.S_ISFIFO(status.st_mode) or os.isatty(descriptor):
            place = f"/dev/fd/{descriptor}"
            if sys.platform != "linux":  # there it is no new one
                place = os.ttyname(descriptor)
            if status.st_rdev != 0x502:  # 5:2 is Linux's /dev/ptmx, which makes another one
                own = os.open(place, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (AttributeError, OSError) as error:
        _let_through(error)  # else it is Windows, there is no /dev/fd, or it is another user's
    with open(own, "wb", buffering=0, closefd=own != descriptor) as file:
        left = memoryview(data)
        end = time.monotonic() + seconds
        while left and _is_writable(own, seconds):
            stream.flush()  # of what others wrote
            count = file.write(left[:_PIPE_BYTES])  # None where it would wait
            if count:
                left = left[count:]
                end = time.monotonic() + seconds
            elif time.monotonic() < end:
                time.sleep(_NO_ROOM_SECONDS)
            else:
                break
    return bytes(left)


def _write_stream(stream: Any, pieces: Iterable[str]) -> None:
    stream.flush()  # of what others wrote, which comes first
    descriptor = _descriptor(stream)
    if descriptor >= 0:
        _write_all(descriptor, pieces)
        return
    for piece in pieces:
        piece = piece.encode("utf-8", "backslashreplace").decode()
        try:
            stream.write(piece)
        except UnicodeEncodeError:  # rather than lose what its encoding lacks
            import json
            import re
            stream.write(re.sub("[^\0-\x7f]+", lambda match: json.dumps(match[0])[1:-1], piece))
    stream.flush()


class _Process:
    def __init__(self) -> None:
        self.failure_code = 1  # the command's, once that is known
        self.signal_number = 0
        self.signal_time = 0.0
        self.is_writing = False  # a message
        self.is_mute = False  # as there was no memory for one
        self.reserve = b""  # of memory, to tell with that there is no more

    def prepare(self) -> None:
        import gc
        import signal
        # A script's background job inherits an ignored SIGINT, which stays so.
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        # Else the line of progress would stay, and PID 1 not even end: it has no default action.
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._interrupt)
        self.reserve = bytes(2 * _IO_BYTES)
        gc.disable()  # what it makes lives to its end, and collecting slows large answers down
        if hasattr(signal, "SIGTTOU"):  # on some terminals a message would stop a background job
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        # The folder / takes a closed one's place: it takes no words, as a socket there would.
        for descriptor in (0, 1, 2):
            try:
                os.fstat(descriptor)
            except OSError:  # it is closed
                os.open(os.sep, _O_PATH)

    def _interrupt(self, number: int, _frame: object) -> None:
        if not self.signal_number:
            # In this order: the handler of a second signal may come between the two.
            self.signal_time = time.monotonic()
            self.signal_number = number
            if not self.is_writing:
                raise _Interrupted(128 + number)
        # A second signal ends the process, unless the first one's message is still on its way.
        elif time.monotonic() - self.signal_time > _PATIENCE_SECONDS:
            self.signal_number = number
            self.end(128 + number)

    def report_unraisable(self, unraisable: Any) -> None:
        """Print an exception that Python drops, unless a signal caused it: a tick sees that."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            self.signal_number = self.signal_number or 2  # SIGINT, before the handler is there
        elif not self.signal_number:
            sys.__unraisablehook__(unraisable)

    def end(self, code: int) -> NoReturn:
        """End the process; after a signal by that signal, or a shell would go on with its loop."""
        if self.signal_number:
            code = 128 + self.signal_number
            if os.name == "posix":
                import signal
                signal.signal(self.signal_number, signal.SIG_DFL)
                os.kill(os.getpid(), self.signal_number)  # for PID 1 this does nothing
        os._exit(code)  # all is flushed, and a thread that is stuck in a look-up is left behind


class _Reporter(_Observer):
    """All that goes to standard error, as text or JSON, and a line about what is in progress."""
    def __init__(self, options: _Options, process: _Process) -> None:
        # Not checked yet: an error in one is printed as the others ask. The last of a name counts.
        given = dict(options)
        self.is_quiet = "--quiet" in given
        self.is_json = given.get("--error-format") == "json"
        self.is_tracing = "--trace" in given or options.count(("--verbose", None)) > 1
        self.is_verbose = self.is_tracing or "--verbose" in given
        try:
            self.is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        except (AttributeError, OSError, ValueError) as error:  # there is none, or it is closed
            _let_through(error)
            self.is_terminal = False
        colour = "never" if "--no-color" in given else given.get("--color", "auto")
        is_wanted = self.is_terminal and not os.environ.get("NO_COLOR")
        self.is_coloured = colour == "always" or (colour == "auto" and is_wanted)
        self.process = process
        self.url_source = "--api-url"
        # An error may quote a token from a wrong place. A variable may hold `Bearer "TOKEN"`.
        words = " ".join(os.environ.get(name, "") for name in _TOKEN_VARIABLES).split()
        self.secrets = [word.strip(_QUOTES) for word in words]
        # What is known of a run, and what came of it, which whatever fails after it has to tell.
        self.fate = ("not_sent", "")  # one value, as a signal may come between two
        self.has_failed = False
        # The documents of `delete`, kept here so that they are printed after an interrupt, too.
        self.deleted: list[Document] = []
        self.patience_seconds = _PATIENCE_SECONDS
        self.explained = ""
        self.unsent = b""  # the rest of a message that was written in part
        self.drawn = ""
        self.show_progress("")

    def tick(self) -> None:
        self._draw_progress()
        if self.process.signal_number:  # which came amid a message, or in a destructor, say
            raise _Interrupted(128 + self.process.signal_number)

    def _draw_progress(self) -> None:
        seconds = int(time.monotonic() - self.progress_start)
        if not self.progress or seconds < self.next_seconds:
            return
        line = f"{_rounded(seconds)}{self.progress}"
        if not self.is_terminal:
            self.next_seconds += _STILL_RUNNING_SECONDS
            self._write(f"{_PROGRAM}: still waiting after {line}\n", 0)
            return
        try:
            columns = os.get_terminal_size(_descriptor(sys.stderr)).columns or 80
        except OSError:
            columns = 80
        # A character of two columns would wrap the line, which then could not be erased.
        line = line.encode("ascii", "backslashreplace").decode()[: columns - 1]
        if line == self.drawn:
            return
        # Noted before it is drawn: erasing a line that is not there does no harm.
        text, self.drawn = f"{self._erasure()}{line}", line
        self._write(text, 0)

    def enter_state(self, run_state: str) -> None:
        self.fate = (run_state, "")

    def receive_run(self, document: Document, secrets: list[str]) -> None:
        import json
        self.secrets += secrets  # which are also those of a proxy
        run_id = _shown(_cell(document, "run_id"), self.secrets)
        code = _shown(json.dumps(document.get("exit_code")), self.secrets)
        run = f"run {run_id}" if run_id else "the run"
        if code == "null":
            self.fate = ("unknown", f"{run} has no exit code")
        else:
            self.fate = ("finished", f"{run} ended with exit code {code}")

    def warn(self, text: str) -> None:
        if not self.is_quiet:
            self._print("warning", text)

    def explain(self, text: str) -> None:
        if self.is_verbose and text != self.explained:  # each look of --wait would repeat it
            self.explained = text
            self._print("verbose", text)

    def show_headers(self, mark: str, lines: Iterable[str]) -> None:
        if not self.is_tracing:
            return
        end = time.monotonic() + _PATIENCE_SECONDS
        for line in lines:
            if self.process.signal_number or time.monotonic() > end:
                break  # for a signal that came amid a line, or a slow reader
            name, _, _ = line.partition(":")
            if name.lower().endswith("authorization"):
                line = f"{name}: [redacted]"
            self._print("trace", f"{mark} {line}")

    def show_progress(self, text: str) -> None:
        """After a second, show the time that something takes, then this text; "" stops that."""
        if self.drawn:
            self._write(self._erasure(), 0)
        self.drawn = ""
        # Once, as a command may be long, and a tick comes with each piece of an answer.
        self.progress = "" if self.is_quiet or self.is_json else _shown(text, self.secrets)
        self.progress_start = time.monotonic()
        self.next_seconds = 1 if self.is_terminal else _STILL_RUNNING_SECONDS

    def error(self, error: BusContainersError, command: str | None) -> None:
        """Print an error, in the command line's words, with what is known of a run."""
        if error.kind == "internal":
            self.tick()  # for a signal: some C code turns what its handler raises into this
        self.has_failed = True
        if isinstance(error, _ReaderLeftError):
            return
        self.process.is_writing = True  # until _write ends, so that no signal takes it away
        if isinstance(error, _UsageError):
            topic = f"{command} " if command in _COMMANDS else ""
            hint = f"see `{_PROGRAM} {topic}--help`"
            error.advice = f"{error.advice}; {hint}" if error.advice else hint
        self.speak_of_options(error, command)
        run_state, outcome = self.fate
        if self.deleted and error.kind in ("interrupted", "output", "internal"):
            ids = [document["run_id"] for document in self.deleted]
            outcome = f"deleted: {' '.join(ids)}"
        if outcome:
            error.reason += f"; {outcome}"
        if command == "run":
            error.run_state = error.run_state or run_state  # on which its text depends
        document = error.as_document()
        if command == "run":
            document["run_state"] = error.run_state
        self._print(error.kind, str(error), document)

    def speak_of_options(self, error: BusContainersError, command: str | None) -> None:
        """Put the names of options in place of the library's parameters in an error."""
        names = {"`api_url`": self.url_source, "`path`": "--token-file"}
        for name in _options_of(command):
            names.setdefault(f"`{name[2:].replace('-', '_')}`", name)
        for parameter, name in names.items():
            # An ApiError may quote a server; of our parameters, its advice names only `api_url`.
            if parameter == "`api_url`" or not isinstance(error, ApiError):
                error.advice = error.advice.replace(parameter, name)
            if isinstance(error, ConfigError):
                error.reason = error.reason.replace(parameter, name)

    def interrupt(self, interrupt: KeyboardInterrupt, command: str | None) -> int:
        code: int = getattr(interrupt, "exit_code", 130)
        error = BusContainersError("terminated" if code == 143 else "interrupted")
        error.reason += getattr(interrupt, "reason", "")  # why a result went elsewhere
        error.kind = "interrupted"
        self.process.signal_number = code - 128  # Ctrl-C may come before the handler is there
        self.error(error, command)
        return code

    def fault(self, fault: BaseException, command: str | None) -> int:
        """Print an unexpected exception; --verbose adds the places, without values."""
        self.show_progress("")
        self.tick()  # for a signal: amid an exception Python 3.9 turns a second one into this
        _let_through(fault)  # a host program's sys.exit, say
        trace = fault.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            self.explain(f"{code.co_filename}, line {trace.tb_lineno}, in {code.co_name}")
            trace = trace.tb_next
        self.error(_internal_error(fault), command)
        return self.process.failure_code

    def run_ended(self, document: Document, is_on_terminal: bool) -> None:
        """Print what `run --format text` has for standard error: the container's, and a line."""
        errors = _cell(document, "stderr")
        output = errors or _cell(document, "stdout")
        # Our line starts a new one: after the container's stderr, or its stdout on the same screen.
        if output and output[-1] != "\n" and (errors or (self.is_terminal and is_on_terminal)):
            errors += "\n"
        if errors:
            self._write("", 0)  # so that they come behind all that is there
            self.tick()  # they may have to wait
            try:
                _write_stream(sys.stderr, [self.unsent.decode(errors="replace"), errors])
                self.unsent = b""
            except Exception as error:  # noqa: BLE001 - a host's stream may raise any
                _let_through(error)
                text = f"cannot write to standard error: {_reason_of(error)}"
                raise _OutputError(text) from None
        fields = {name: document.get(name) for name in ("run_id", "exit_code", "duration_ms")}
        _, text = self.fate
        duration = _shown(_cell(document, "duration_ms"), self.secrets)
        if duration:
            text += f" after {duration} ms"
        self._print("run", text, fields)

    def _print(self, kind: str, text: str, fields: Document | None = None) -> None:
        line = _visible(_redacted(text, self.secrets))
        if kind == "warning":
            line = f"warning: {line}"
        if self.is_coloured and kind not in ("warning", "verbose", "trace", "run"):
            line = f"\033[31m{line}\033[0m"
        line = f"{_PROGRAM}: {line}"
        if self.is_json:
            try:
                import json
                document = {"kind": kind, "text": text, **(fields or {})}
                document.setdefault("message", text)
                line = json.dumps(_redacted_document(document, self.secrets))
            except Exception as error:  # noqa: BLE001 - a json.py in the way hides no error
                _let_through(error)
        self._write(f"{self._erasure()}{line}\n", self.patience_seconds)
        self.drawn = ""

    def _erasure(self) -> str:
        return "\r\033[K" if self.drawn else ""

    def _write(self, text: str, wait_seconds: float) -> None:
        """Write to standard error, or give up: a result must not wait for one that nobody reads."""
        self.process.is_writing = True
        try:
            data = self.unsent + text.encode("utf-8", "backslashreplace")
            left = _write_in_time(sys.stderr, data, wait_seconds)
            if len(left) < len(data):
                self.unsent = left
            if not left:
                self.patience_seconds = _PATIENCE_SECONDS
            elif wait_seconds:
                self.patience_seconds = 0  # of the next messages
        except Exception as error:  # noqa: BLE001 - there is none, it is closed, or a host's own
            _let_through(error)
            self.process.is_mute |= self.has_failed and isinstance(error, MemoryError)
        finally:
            self.process.is_writing = False


class _Result:
    """Where the result goes, standard output or a file; proved to be open before the request."""
    # For a file, the result is written to a new one beside it, which is then renamed: so the path
    # holds its old content or one whole result at any moment. Where that is impossible (a device, a
    # hard link, another's file, a folder without write permission), it is overwritten, as with `>`.
    def __init__(self, path: str | None) -> None:
        self._path = None if path == "-" else path
        # What is overwritten in place, held from the check on: a FIFO's reader may not come twice.
        self._held: int | None = None
        self._is_file = self._path is not None  # else its reader may leave, as `| head` does
        try:
            if not self._path:
                if getattr(sys.stdout, "closed", sys.stdout is None):
                    raise OSError("it is closed")
                descriptor = _descriptor(sys.stdout)
                if descriptor >= 0:
                    os.write(descriptor, b"")  # this fails for /dev/full, too
                    self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            else:
                self._prove_file(self._path)
        except (OSError, ValueError) as error:
            _let_through(error)
            raise self._error(error) from None

    def _prove_file(self, path: str) -> None:
        try:
            self._held = os.open(path, os.O_WRONLY)
        except FileNotFoundError as error:
            _let_through(error)
            _, temporary, status = _target(path)
            if status and not stat.S_ISREG(status.st_mode):  # a link that is not followed, say
                raise
            try:
                open(temporary, "xb").close()
            finally:
                _remove(temporary)
            return
        if stat.S_ISREG(os.fstat(self._held).st_mode):
            self.close()

    def close(self) -> None:
        held, self._held = self._held, None  # closed once, even where that fails
        if held is not None:
            os.close(held)

    def _error(self, error: Exception) -> _OutputError:
        place = self._path or "standard output"
        return _OutputError(f"cannot write to {place}: {_reason_of(error)}")

    def is_on_terminal(self) -> bool:
        return not self._path and os.isatty(_descriptor(sys.stdout))

    def write(self, make_pieces: _MakePieces) -> None:
        """Write the result; one that the file does not take goes to standard output."""
        try:
            if not self._path:
                _write_stream(sys.stdout, make_pieces())
            elif self._held is not None:
                _write_all(self._held, make_pieces())
            elif not _replace(self._path, make_pieces):
                # No O_CREAT: it fails for another's file in /tmp. O_NONBLOCK: it may be a FIFO now.
                flags = os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NONBLOCK", 0)
                self._held = os.open(self._path, flags)
                _write_all(self._held, make_pieces())
            self.close()  # this may fail as well as a write
            return
        except (OSError, ValueError, MemoryError) as error:
            _let_through(error)
            if isinstance(error, BrokenPipeError) and not self._is_file:
                raise _ReaderLeftError("the reader of standard output left") from None
            failure = self._error(error)
        # A result was paid for and cannot be fetched again, so it goes where it still can.
        if self._path:
            try:
                _Result(None).write(make_pieces)
                failure.reason += "; the result is on standard output"
            except _OutputError as second:
                failure.reason += f"; {second.reason}"
            except KeyboardInterrupt as interrupt:
                vars(interrupt)["reason"] = f"; {failure.reason}"
                raise
        raise failure


def _target(path: str) -> tuple[str, str, os.stat_result | None]:
    """Follow a path's links; return the last name, a new one beside it, and its status if any."""
    # Not realpath, which reads each folder above, and takes `name/` for `name`.
    status = None
    for _ in range(41):  # Linux follows 40
        try:
            status = os.lstat(path)
            above = os.path.dirname(path)
            folder = os.stat(above or ".")
            is_public = folder.st_mode & 0o1002 == 0o1002  # sticky and writable to all, as /tmp
            if is_public and status.st_uid not in (os.geteuid(), folder.st_uid):
                break  # another user's link there may be a trap: as with protected_symlinks
            # A descriptor's link in /proc, which others may not read, may name another file.
            if not stat.S_ISLNK(status.st_mode) or not status.st_mode & stat.S_IROTH:
                break
            path = os.path.join(above, os.readlink(path))
        except FileNotFoundError as error:
            _let_through(error)
            status = None
            break
    # In containers that share a folder all may have one pid, and some clocks are coarse.
    name = f".{_PROGRAM}.{os.getpid()}.{time.perf_counter_ns()}.{id(path)}.tmp"
    return path, os.path.join(os.path.dirname(path), name), status


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # it never was there, or has its final name by now


def _is_shared(status: os.stat_result) -> bool:
    """Return whether a rename would leave a file's old content for others who have the file."""
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return True
    # A shell or a host program has it open, as with `> out` or `/dev/fd/3`.
    for descriptor in range(1024):  # the usual limit of a process
        try:
            if os.path.samestat(status, os.fstat(descriptor)):
                return True
        except OSError as error:
            _let_through(error)  # else there is no such descriptor
    return False


def _is_mounted(path: str) -> bool:
    """Return whether a file is mounted from elsewhere, so that its own disk may have room."""
    mounts = []
    try:
        for place in (path, os.path.dirname(path) or "."):
            descriptor = os.open(place, _O_PATH)
            try:
                with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
                    mounts.append(file.readlines()[2:3])  # mnt_id; st_dev may differ in an overlay
            finally:
                os.close(descriptor)
        return mounts[0] != mounts[1]
    except OSError as error:  # this is not Linux, say
        _let_through(error)
        return False


def _replace(path: str, make_pieces: _MakePieces) -> bool:
    """Write a new file and rename it to a path; return False where only overwriting will do."""
    import errno
    mode = 0o600  # nobody else may open it before it has that of the old file
    target, temporary, old = _target(path)
    if not old:
        mode = 0o666  # less what the umask takes
    elif _is_shared(old):
        return False
    refusals = f"{_REFUSALS} ENOENT"  # as in /proc
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb", buffering=0):  # which closes it
            new = os.fstat(descriptor)
            wanted = old or new
            # A rename would give the file to us, or to another group; and chown may be pretended.
            if (wanted.st_uid, wanted.st_gid) != (new.st_uid, new.st_gid):
                return False
            if wanted.st_mode != new.st_mode:  # some file systems refuse any change
                os.chmod(descriptor, stat.S_IMODE(wanted.st_mode))
            refusals = ""  # what fails now leaves the old file as it is
            _write_all(descriptor, make_pieces())
        refusals = _REFUSALS
        os.replace(temporary, target)
        refusals = ""
        try:
            folder = os.open(os.path.dirname(target) or ".", os.O_RDONLY)
        except OSError as failure:  # it may be written to, but not read; or this is Windows
            _let_through(failure)
            return True
        try:
            _write_all(folder, [])  # nothing, but the new name is stored
        finally:
            os.close(folder)
        return True
    except OSError as error:
        _let_through(error)
        if not old:
            raise
        if errno.errorcode.get(error.errno or 0) in refusals.split() or _is_mounted(target):
            return False
        raise
    finally:
        try:
            _remove(temporary)
        finally:
            _remove(temporary)  # again, as a signal may come amid the first


# ---- Commands: each from its options to a document ----------------------------------------------

def _client(args: argparse.Namespace, report: _Reporter) -> Client:
    import urllib.parse
    # The URL comes first, so that --verbose shows it where there is no token.
    url, source = _as_usage_error(resolve_api_url, args.api_url, os.environ)
    if source != "default":
        report.url_source = source
    proxy, proxy_source = _as_usage_error(_proxy_and_source, url, os.environ)
    via = f"{_redacted_url(proxy)} from {proxy_source}" if proxy else "none"
    report.explain(f"API URL {url} from {source}; proxy {via}")
    report.tick()  # for a signal that came amid a message: standard input may have to wait
    token, token_source = resolve_token(args.token_file, os.environ)
    report.secrets.append(token.strip(_QUOTES))
    if report.is_verbose:
        facts = _token_facts(token, _SCOPES[_COMMANDS[args.command].method])
        report.explain(f"token from {token_source}: {'; '.join(facts) or 'it does not expire'}")
    host = urllib.parse.urlsplit(url).hostname or ""
    # A name without a dot is of this machine or of a compose file.
    is_near = "." not in host and _parse_address(host) is None
    if url.startswith("http:") and not is_near and not _is_listed(url, _PRIVATE):
        report.warn(f"the token goes to {url} unencrypted: use https")
    client = Client(url, token)
    if args.timeout is not None:
        client.timeout = args.timeout
    client._observer = report
    return client


def _status(args: argparse.Namespace, report: _Reporter) -> Document:
    if args.wait is not None:
        return _wait_for_platform(args, report)
    return _client(args, report).status()


def _wait_for_platform(args: argparse.Namespace, report: _Reporter) -> Document:
    report.show_progress(f" of {_rounded(args.wait)}  waiting for the platform")
    end = time.monotonic() + args.wait
    pause_seconds = 0.1
    client = None
    while True:
        left = end - time.monotonic()
        try:
            client = client or _client(args, report)
            client._retries = 0  # this loop is what tries again
            # Whatever --timeout says, a look ends with the wait, but has a second in any case.
            client.timeout = min(args.timeout or _TIMEOUT_SECONDS, max(left, 1))
            document = client.status()
            states = [_cell(item, "state") for item in _items("status", document)]
            waiting = [s for s in states if s.lower() in ("starting", "pending", "provisioning")]
            if not waiting:  # where there is no runner, the first run makes one
                return document
            reason = f"the runner is {_shown(waiting[0], report.secrets)}"
        except BusContainersError as error:
            if not error.retryable and not isinstance(error, _MissingTokenError):
                raise
            report.speak_of_options(error, args.command)
            reason = str(error)
            if isinstance(error, TransportError):  # its advice is for who does not wait
                reason = error.reason
            asked_seconds = getattr(error, "retry_after_seconds", 0)
            if asked_seconds <= _MAX_RETRY_AFTER_SECONDS:
                pause_seconds = max(pause_seconds, asked_seconds)
        if left <= 0:  # that was the last look
            text = f"the platform is not ready after {_rounded(args.wait)}: {reason}"
            raise DeadlineError(text, retryable=True)
        _pause(min(pause_seconds, end - time.monotonic()), report.tick)
        pause_seconds = min(2 * pause_seconds, _WAIT_PAUSE_SECONDS)


def _run(args: argparse.Namespace, report: _Reporter) -> Document:
    client = _client(args, report)
    limit, timeout = args.timeout_seconds, args.timeout
    if timeout is None:
        timeout = _run_timeout(limit)
    elif limit and 0 < timeout <= limit:
        text = f"--timeout {timeout:.15g}s is not longer than --timeout-seconds {limit}"
        report.warn(f"{text}: the answer may come too late")
    within = ""
    if limit or timeout:
        within = f" of {_rounded(limit or timeout)}"
    target = args.image or args.profile or _DEFAULT_PROFILE
    report.show_progress(f"{within}  {target}: {' '.join(args.words)}")
    document = client.run(
        args.words, profile=args.profile, image=args.image, timeout_seconds=limit, timeout=timeout
    )
    code = document.get("exit_code")
    if code in (126, 127):
        text = f"exit code {code} may mean that {args.words[0]!r} could not be started"
        hint = f"an image is named by --image, a profile by --profile; this was {target}"
        if len(args.words) == 1 and " " in args.words[0]:
            hint = "leave out the quotes around the command, or use sh -c"
        report.warn(f"{text}; {hint}")
    return document


def _runs(args: argparse.Namespace, report: _Reporter) -> Document:
    return _client(args, report).runs()


def _delete(args: argparse.Namespace, report: _Reporter) -> Any:
    client = _client(args, report)
    for run_id in args.words:
        try:
            report.deleted.append(client.delete(run_id))
        except (TransportError, ProtocolError, ApiError) as error:
            report.error(error, args.command)
    return report.deleted


def _help(args: argparse.Namespace, _report: _Reporter) -> Any:
    topic = "".join(args.words)  # there is one at most
    if topic and args.format:
        raise _UsageError(f"there is one document of all commands: leave out {topic!r}")
    if topic and topic not in _COMMANDS:
        raise _UsageError(f"no help about {topic!r}: there is {', '.join(_COMMANDS)}")
    if args.format:
        return _opencli_document()
    return _page(topic or None)


# ---- From arguments to the exit code ------------------------------------------------------------

def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return its exit code."""
    return _main(argv, _Process(), is_own=False)


def _main(argv: Sequence[str] | None, process: _Process, *, is_own: bool) -> int:
    """Run a command line and return its exit code; the one place where errors become one."""
    if argv is None:
        argv = [_decode_argument(word) for word in sys.argv[1:]]
    command, options, words = _scan(argv)
    report = _Reporter(options, process)
    if command in _COMMANDS:
        process.failure_code = _COMMANDS[command].failure_code
    try:
        try:
            if {("--help", None), ("--version", None)}.intersection(options):
                return _print_about(command, options)
            if is_own:  # not a host program's
                process.prepare()
            for number, word in enumerate(argv, 1):
                if word != word.encode(errors="replace").decode():
                    raise _UsageError(f"argument {number} is not valid UTF-8")
            return _execute(_parse(command, options, words), report)
        except BusContainersError as error:
            if error.__cause__:  # what is in the way of a module
                return report.fault(error.__cause__, command)
            report.error(error, command)
            return 2 if isinstance(error, _UsageError) else process.failure_code
        except (Exception, SystemExit) as fault:  # noqa: BLE001 - or a script in the way exits
            return report.fault(fault, command)
    except KeyboardInterrupt as interrupt:  # which may come just before an error is told
        return report.interrupt(interrupt, command)


def _print_about(command: str | None, options: _Options) -> int:
    text = f"{_PROGRAM} {__version__}\n"
    if ("--help", None) in options:
        text = _page(command if command in _COMMANDS else None)
    _Result(None).write(lambda: [text])
    return 0


def _decode_argument(word: str) -> str:
    try:
        return os.fsencode(word).decode(errors="surrogateescape")  # whatever the locale
    except UnicodeError:  # some locales decode what they cannot encode again
        return f"{word}\udcff"  # which _main refuses


def _execute(args: argparse.Namespace, report: _Reporter) -> int:
    if args.chdir is not None:
        try:
            os.chdir(args.chdir)
        except (OSError, ValueError) as error:
            _let_through(error)
            raise ConfigError(f"--chdir {args.chdir}: {_reason_of(error)}") from None
    result = None if args.quiet else _Result(args.output)
    functions = {"status": _status, "run": _run, "runs": _runs, "delete": _delete, "help": _help}
    try:
        try:
            document = functions[args.command](args, report)
            report.show_progress("")
            report.tick()  # for a signal that came amid a message
        except KeyboardInterrupt as interrupt:
            if not report.deleted:
                raise
            code = report.interrupt(interrupt, args.command)  # first: the list may have to wait
            _write_result(args, result, report.deleted)
            return code
        try:
            _write_result(args, result, document)
        except _OutputError as error:
            # Before what the container said, which may wait for its reader, or fill the disk.
            report.error(error, args.command)
            report.tick()  # as above
        code = 0
        if args.command == "run":
            code = _finish_run(args, result, document, report)
        return report.process.failure_code if report.has_failed else code
    finally:
        try:
            if result:
                result.close()
        except OSError:
            pass  # nothing was written to it, or that has failed and is told


def _write_result(args: argparse.Namespace, result: _Result | None, document: Any) -> None:
    if args.command == "delete" and len(args.words) == 1:
        document = document[0] if document else None  # an object for one id, a list for several
    if result and document is not None:
        result.write(lambda: _FORMATS[args.format](args.command, document))


def _finish_run(
    args: argparse.Namespace, result: _Result | None, document: Document, report: _Reporter
) -> int:
    if args.format == "text" and result is not None:
        report.run_ended(document, result.is_on_terminal())
    code = document.get("exit_code")
    # True is 1, too, and 37.0 is 37: what is not an integer in JSON must not become an exit code.
    if type(code) is not int:
        raise ProtocolError("the exit code is not an integer")
    if code < 0:  # as a shell tells of a signal
        code = 128 - code
    return min(code, 255)


def console() -> NoReturn:
    """Run the process's command line, and end the process with its exit code."""
    process = _Process()
    sys.unraisablehook = process.report_unraisable
    code: int | None = None
    # After an interrupt between the end of _main and of the process, only the end is left to do.
    while True:
        try:
            if code is None:
                code = _main(None, process, is_own=True)
                if process.is_mute and (process.signal_number or code == process.failure_code):
                    raise MemoryError
            process.end(code)
        except KeyboardInterrupt as interrupt:
            code = getattr(interrupt, "exit_code", 130)
            process.signal_number = process.signal_number or code - 128
        except BaseException:  # noqa: BLE001 - memory, say, that ran out again amid a message
            process.reserve = b""
            try:
                if _is_writable(2, _PATIENCE_SECONDS):
                    os.write(2, _LAST_WORDS)
            finally:
                os._exit(process.failure_code)


if __name__ == "__main__":
    console()
