#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A local AI Platform: the container-run API, served on this machine for one command.

    python3 tests/local_platform.py [options] [--] COMMAND [ARG...]

serves the API on a free loopback port, makes a token for a fresh account, points BUS_CONFIG_DIR
and BUS_AI_API_URL at the two, runs COMMAND, ends with its exit code and leaves nothing behind.
Without COMMAND it serves until interrupted and prints the two exports, for another shell.

It checks what the real provider checks: the token's signature, times, audience and scope, the
request's body and content type, whose run it is, billing. A run really runs: as a process in a
fresh, empty folder with its own process group and a small environment, or in a container with
--engine "docker run --rm --network none". What a run started in its group ends with it; only a
container also ends what has left the group.

A run over its `timeout_seconds` (0 is no limit) is killed and has exit code 124, as timeout(1)
gives; a deleted one 137; one killed by signal N 128+N; one that cannot be started 127 or 126, as
in a shell. A run whose client went away goes on to its end; none outlives the platform.

A second account, to see what it may not do, has its token in `auth/other-token` under
BUS_CONFIG_DIR, for --token-file. POSIX only. Tests use `Platform` in process.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hmac
import json
import math
import os
import re
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

Document = dict[str, Any]
Billing = Literal["required", "quota"]

API_PATH = "/api/v1/containers"
AUDIENCE = "ai.hg.fi/api"
SCOPE = "container:read container:run container:delete billing:read"

# `localhost/` keeps an engine from looking for them in a public registry.
PROFILE_IMAGES = {"codex": "localhost/codex", "testing-agent": "localhost/testing-agent"}

SCOPES = {
    "/status": {"GET": "container:read"},
    "/runs": {"GET": "container:read", "POST": "container:run"},
    "/runs/ID": {"DELETE": "container:delete"},
}

RUNNER_NAME = "local-runner"
TIMED_OUT = 124  # as timeout(1) says it
KILLED = 128 + signal.SIGKILL

MAX_BODY_BYTES = 8 << 20
MAX_TIMEOUT_SECONDS = (1 << 63) - 1  # the provider's integers have 64 bits
TOKEN_SECONDS = 7 * 24 * 3600.0  # of the token files; a terminal may stay open for days

# --- Errors, as the API tells them ------------------------------------------------------------


class ApiError(Exception):
    """An answer that is an error: its HTTP status, and what stands under "error"."""

    def __init__(self, status: int, kind: str, message: str, **more: object) -> None:
        super().__init__(message)
        self.status = status
        self.document: Document = {"error": {"type": kind, "message": message, **more}}


def bad_request(message: str) -> ApiError:
    return ApiError(400, "bad_request", message)


def billing_error(billing: Billing) -> ApiError:
    """What an account hears that has no billing, or has used up its quota."""
    command = "bus billing setup"
    if billing == "required":
        message = "billing is not set up for this account"
        return ApiError(402, "billing_required", message, action="setup_billing", command=command)
    quota: Document = {
        "plan_id": "local-small", "recommended_plan": "local-large",
        "usage": {
            "feature": "container:run", "meter_event_name": "bus_container_runtime_seconds",
            "window": "month", "used": 3600, "limit": 3600, "remaining": 0, "exceeded": True,
            "upgrade_plan_id": "local-large",
        },
    }  # fmt: skip
    message = "the container runtime of this month is used up"
    return ApiError(402, "quota_exceeded", message, action="upgrade_plan", command=command, **quota)


# --- Tokens: JWT (RFC 7519) with HS256 --------------------------------------------------------


def mint(claims: Mapping[str, object], key: bytes, algorithm: str = "HS256") -> str:
    """A token that says `claims`; a claim that is None is left out."""
    header = {"alg": algorithm, "typ": "JWT"}
    said = {name: value for name, value in claims.items() if value is not None}
    signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, said))
    return f"{signed}.{_signature(signed, key)}"


def verify(token: str, key: bytes) -> Document | None:
    """The token's claims, or None if it was not signed with this key."""
    signed, _, signature = token.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(signed, key).encode()):
        return None
    header, claims = (json.loads(_unbase64url(part)) for part in signed.split("."))
    return claims if header["alg"] == "HS256" else None


def permits(claims: Document, scope: str, now: float) -> bool:
    """Whether a token with these claims is good for `scope` now."""
    audience, expires, begins = claims.get("aud"), claims.get("exp"), claims.get("nbf", now)
    return (
        bool(claims.get("sub"))
        and AUDIENCE in (audience if isinstance(audience, list) else [audience])
        and scope in str(claims.get("scope")).split()
        and isinstance(expires, (int, float))
        and now < expires
        and isinstance(begins, (int, float))
        and begins <= now
    )


def _signature(signed: str, key: bytes) -> str:
    return _base64url(hmac.new(key, signed.encode(), "sha256").digest())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _unbase64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


# --- Run requests -----------------------------------------------------------------------------

_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")  # above all no option of the engine
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_run(kind: str, body: bytes, images: Mapping[str, str]) -> tuple[str, list[str], int]:
    """The image, the words and the limit in seconds (0: none) of a request of this content type."""
    if kind != "application/json":
        raise bad_request("the content type is not application/json")
    try:
        request = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise bad_request("the body is not one JSON document") from None
    if not isinstance(request, dict):
        raise bad_request("the body is not a JSON object")
    if ("profile" in request) == ("image" in request):
        raise bad_request("profile or image is required, and they exclude each other")
    what, words = ("profile", "args") if "profile" in request else ("image", "command")
    if not request.keys() <= {what, words, "timeout_seconds"}:
        raise bad_request(f"beside {what} only {words} and timeout_seconds are known")
    limit = request.get("timeout_seconds", 0)
    if type(limit) is not int or not 0 <= limit <= MAX_TIMEOUT_SECONDS:
        raise bad_request("timeout_seconds is not a whole number >= 0")
    return _image(what, request[what], images), _words(words, request.get(words)), limit


def _image(kind: str, name: object, images: Mapping[str, str]) -> str:
    if not isinstance(name, str):
        raise bad_request(f"{kind} is not a string")
    if kind == "profile" and name not in images:
        raise bad_request("no such profile; known are " + ", ".join(images))
    if kind == "image" and not _IMAGE.fullmatch(name):
        raise bad_request("image is not the name of an image")
    return images[name] if kind == "profile" else name


def _words(key: str, words: object) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise bad_request(f"{key} is not a list of strings")
    if not words or any("\0" in word for word in words):
        raise bad_request(f"{key} is empty, or holds a NUL, which no argument can")
    return [_LONE_SURROGATE.sub("\ufffd", word) for word in words]  # as Go's decoder does


# --- Runs -------------------------------------------------------------------------------------

# Seconds between two looks at whether a process has ended that closed its output, or left it to
# others, and whether its time is over. Output, and the usual end that closes it, wake at once.
_MIN_TICK, _MAX_TICK = 0.001, 0.05


class Run:
    """One run: a process, or an engine's client with its container, and what became of it."""

    def __init__(
        self, owner: str, image: str, words: list[str], limit: int, engine: Sequence[str]
    ) -> None:
        self.run_id = f"run_{uuid.uuid4().hex}"
        self.owner = owner
        self.image = image
        self.words = words
        self.runtime = Path(engine[0]).name if engine else "process"
        self.exit_code: int | None = None
        self.ended = threading.Event()
        self._engine = list(engine)
        self._limit = limit or math.inf
        self._started_at = time.time()
        self._start = time.monotonic()
        self._duration_ms = 0
        self._lock = threading.Lock()  # held while the process starts, is killed, is reaped
        self._process: subprocess.Popen[bytes] | None = None
        self._killed_as: int | None = None

    def execute(self, parent: Path) -> Document:
        """Run it in a fresh folder under `parent`, to its end; the document of the API."""
        folder = tempfile.TemporaryDirectory(dir=parent)  # its cleanup opens what a run has locked
        output: tuple[bytes, bytes] = (b"", b"")
        try:
            process = self._spawn(folder.name)
            output = self._collect(process) if process else output
        except OSError as error:
            self.exit_code = 127 if isinstance(error, FileNotFoundError) else 126
            reason = "command not found" if self.exit_code == 127 else str(error.strerror)
            output = (b"", f"{self.words[0]}: {reason}\n".encode())
        finally:
            self._duration_ms = self._elapsed_ms()
            with contextlib.suppress(OSError):  # what has left the process group may still write
                folder.cleanup()
            self.ended.set()
        return {
            "run_id": self.run_id,
            "owner_identity_id": self.owner,
            "runner_name": RUNNER_NAME,
            "image": self.image,
            "args": self.words,
            "exit_code": self.exit_code,
            "stdout": output[0].decode("utf-8", "replace"),
            "stderr": output[1].decode("utf-8", "replace"),
            "duration_ms": self._duration_ms,
            "runtime": self.runtime,
        }

    def item(self) -> Document:
        """The run in a list of runs."""
        ended = self.ended.is_set()
        return {
            "run_id": self.run_id,
            "owner_identity_id": self.owner,
            "state": "exited" if ended else "running",
            "image": self.image,
            "args": self.words,
            "exit_code": self.exit_code if ended else None,
            "duration_ms": self._duration_ms if ended else self._elapsed_ms(),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started_at)),
        }

    def kill(self, exit_code: int) -> None:
        """End it, with its whole group or container, as a run of this exit code."""
        with self._lock:
            if self.exit_code is not None or self._killed_as is not None:
                return
            self._killed_as = exit_code
            if self._process:
                kill_group(self._process)
        if "run" in self._engine:  # without its client a container would go on
            tool = self._engine[: self._engine.index("run")]
            for words in (["kill", self.run_id], ["rm", "--force", self.run_id]):
                subprocess.run([*tool, *words], stdin=subprocess.DEVNULL, capture_output=True)

    def _spawn(self, folder: str) -> subprocess.Popen[bytes] | None:
        words, environ = self.words, dict(os.environ)
        if self._engine:
            words = [*self._engine, self.image, *words]
            if "run" in self._engine:  # the name is what `kill` finds the container by
                at = self._engine.index("run") + 1
                words[at:at] = ["--name", self.run_id]
        else:
            path = os.environ.get("PATH", os.defpath)
            environ = {"PATH": path, "HOME": folder, "LANG": "C.UTF-8"}
        with self._lock:
            if self._killed_as is not None:  # deleted before it began
                self.exit_code = self._killed_as
                return None
            self._process = subprocess.Popen(
                [word.encode() for word in words], cwd=folder, env=environ, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            return self._process

    def _collect(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        """What it writes until it ends; kills it when its time is over."""
        assert process.stdout and process.stderr
        out, err = bytearray(), bytearray()
        with process.stdout, process.stderr, selectors.PollSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, out)
            selector.register(process.stderr, selectors.EVENT_READ, err)
            ended, tick = False, _MIN_TICK
            while selector.get_map() or not ended:
                ended = self._reap(process)
                if not ended and time.monotonic() >= self._start + self._limit:
                    self.kill(TIMED_OUT)
                ready = selector.select(0 if ended else tick)
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    key.data.extend(chunk)
                    if not chunk:
                        selector.unregister(key.fileobj)
                if ended and not ready:
                    break  # what has left the group may hold the pipes open for ever
                tick = _MIN_TICK if ready else min(2 * tick, _MAX_TICK)
        return bytes(out), bytes(err)

    def _reap(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether it has ended; if so, the rest of its group ends too."""
        with self._lock:
            if self.exit_code is None and process.poll() is not None:
                kill_group(process)
                own = shell_code(process.returncode)
                self.exit_code = own if self._killed_as is None else self._killed_as
            return self.exit_code is not None

    def _elapsed_ms(self) -> int:
        return round(1000 * (time.monotonic() - self._start))


def kill_group(process: subprocess.Popen[bytes]) -> None:
    # If nobody is left in it, Linux says the one, macOS the other.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def shell_code(returncode: int) -> int:
    """The exit code of a process as a shell gives it: 128+N if signal N killed it."""
    return returncode if returncode >= 0 else 128 - returncode


# --- The platform -----------------------------------------------------------------------------


class Platform:
    """The platform as a context manager: it serves from `__enter__` to `__exit__`.

    Inside it `url` is the API's origin with the prefix, `config_dir` the BUS_CONFIG_DIR with the
    tokens of `account` and `other_account`, `requests` the (method, path) of every request in
    the order of arrival.
    """

    url: str
    config_dir: Path

    def __init__(
        self,
        *,
        billing: Billing | None = None,
        engine: Sequence[str] = (),
        profile_images: Mapping[str, str] | None = None,
        runs_in_status: bool = False,
        prefix: str = "",
        verbose: bool = False,
    ) -> None:
        self.billing = billing
        self.engine = engine
        self.images = {**PROFILE_IMAGES, **(profile_images or {})}
        self.runs_in_status = runs_in_status
        self.prefix = "/" + prefix.strip("/") if prefix.strip("/") else ""
        self.verbose = verbose
        self.account = str(uuid.uuid4())
        self.other_account = str(uuid.uuid4())
        self.requests: list[tuple[str, str]] = []
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        self._closed = False
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Platform:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bus-local-")))
            self._runs_dir = folder / "runs"
            self._runs_dir.mkdir()
            self.config_dir = folder / "config"
            self._write_tokens()
            server = _Server(self)
            self.url = f"http://127.0.0.1:{server.server_address[1]}{self.prefix}"
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            stack.callback(self._close, server, thread)
            thread.start()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def reset(self) -> None:
        """As good as new: other accounts, no run, no request, no billing error; the same URL."""
        with self._lock:
            runs = list(self._runs.values())
            self._runs = {}
        for run in runs:
            run.kill(KILLED)
            run.ended.wait()
        self.billing, self.runs_in_status, self.images = None, False, dict(PROFILE_IMAGES)
        self.account, self.other_account = str(uuid.uuid4()), str(uuid.uuid4())
        self.requests = []
        self._write_tokens()

    def token(
        self,
        *,
        account: str | None = None,
        scope: str | None = SCOPE,
        audience: str | list[str] | None = AUDIENCE,
        expires_in: float | None = 3600.0,
        not_before: float | None = None,
        **more_claims: object,
    ) -> str:
        """A token, by default a good one of `account`. Times are in seconds from now.

        None leaves the claim out; `more_claims` are added, or replace those of the same name.
        """
        now = time.time()
        claims = {
            "sub": account or self.account,
            "aud": audience,
            "scope": scope,
            "iat": int(now),
            "nbf": None if not_before is None else now + not_before,
            "exp": None if expires_in is None else now + expires_in,
        }
        return mint({**claims, **more_claims}, self._key)

    # What the handler asks for, each with the account that the token names.

    def authenticate(self, authorization: str, scope: str) -> str:
        """The account of an Authorization header that is good for `scope`."""
        scheme, _, token = authorization.partition(" ")
        claims = verify(token.strip(), self._key) if scheme.lower() == "bearer" else None
        if claims is None or not permits(claims, scope, time.time()):
            # The same words for every reason, as from the real provider.
            raise ApiError(401, "invalid_auth", "missing or invalid bearer token")
        return str(claims["sub"])

    def status(self, account: str) -> Document:
        """GET /status: the runner; from the published provider, the account's runs as well."""
        details = {"runtime": Path(self.engine[0]).name if self.engine else "process"}
        items: list[Document] = [{"id": RUNNER_NAME, "state": "ready", "details": details}]
        if self.runs_in_status:
            items += ({"id": item["run_id"], **item} for item in self.runs(account)["items"])
        return {"items": items}

    def runs(self, account: str) -> Document:
        """GET /runs."""
        with self._lock:
            runs = [run for run in self._runs.values() if run.owner == account]
        return {"items": [run.item() for run in runs]}

    def create(self, account: str, content_type: str, body: bytes) -> Document:
        """POST /runs: returns when the run has ended."""
        image, words, limit = parse_run(content_type, body, self.images)
        if self.billing:
            raise billing_error(self.billing)
        run = Run(account, image, words, limit, self.engine)
        with self._lock:
            if self._closed:
                raise ApiError(503, "unavailable", "the platform is stopping")
            self._runs[run.run_id] = run
        return run.execute(self._runs_dir)

    def delete(self, account: str, run_id: str) -> Document:
        """DELETE /runs/{run_id}: stops the run if need be, and forgets it."""
        with self._lock:
            run = self._runs.get(run_id)
            if run is None:
                raise ApiError(404, "not_found", "no such run")
            if run.owner != account:
                raise ApiError(403, "forbidden", "the run belongs to another account")
            del self._runs[run_id]
        run.kill(KILLED)
        run.ended.wait()
        return {"deleted": True, "run_id": run_id, "owner_identity_id": account}

    def _write_tokens(self) -> None:
        auth = self.config_dir / "auth"
        self.config_dir.mkdir(mode=0o700, exist_ok=True)
        auth.mkdir(mode=0o700, exist_ok=True)
        owners = {"api-token": self.account, "other-token": self.other_account}
        for name, account in owners.items():
            (auth / name).touch(mode=0o600)
            (auth / name).write_text(self.token(account=account, expires_in=TOKEN_SECONDS) + "\n")

    def _close(self, server: _Server, thread: threading.Thread) -> None:
        server.shutdown()
        thread.join()
        server.cut_connections()
        with self._lock:
            self._closed = True
            runs = list(self._runs.values())
        for run in runs:
            run.kill(KILLED)
        server.server_close()  # waits for the threads of all requests


# --- HTTP -------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = False  # they are waited for: a platform that is gone has no thread left

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self._connections: set[Any] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the resolver for the host's name, which may take seconds.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave in one piece

    def do_GET(self) -> None:
        self.server.platform.requests.append((self.command, self.path))
        try:
            status, document = 200, self._answer(self._read_body())
        except ApiError as error:
            status, document = error.status, error.document
        payload = json.dumps(document, ensure_ascii=False).encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else payload)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET  # noqa: N815

    def _read_body(self) -> bytes:
        """The body; it is read before any answer, or the connection ends with the answer."""
        length = self.headers.get("Content-Length", "0")
        chunked = "Transfer-Encoding" in self.headers
        if chunked or not re.fullmatch("[0-9]{1,18}", length) or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise bad_request("the body has no length, or too great a one")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionResetError  # the client went away in the middle
        return body

    def _answer(self, body: bytes) -> Document:
        platform, method = self.server.platform, self.command
        base = re.escape(platform.prefix + API_PATH)
        match = re.fullmatch(f"{base}(/[a-z]+)(?:/([^/]+))?", self.path.partition("?")[0])
        route, run_id = match.groups() if match else ("", "")
        route += "/ID" if run_id else ""
        if route not in SCOPES or (platform.runs_in_status and (method, route) == ("GET", "/runs")):
            raise ApiError(404, "not_found", "no such route")
        if method not in SCOPES[route]:
            raise ApiError(405, "method_not_allowed", f"{method} is not for this route")
        authorization = self.headers.get("Authorization", "")
        account = platform.authenticate(authorization, SCOPES[route][method])
        if method == "POST":
            return platform.create(account, self.headers.get_content_type(), body)
        if method == "DELETE":
            return platform.delete(account, unquote(run_id or ""))
        return platform.runs(account) if route == "/runs" else platform.status(account)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        if self.server.platform.verbose:
            super().log_message(format, *args)


# --- Command line -----------------------------------------------------------------------------

_TAKE_A_VALUE = ("--billing", "--engine", "--prefix", "--profile-image")


def split_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and COMMAND with its arguments, which begins where they end."""
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "--":
        at += 2 if argv[at] in _TAKE_A_VALUE else 1
    return argv[:at], argv[at + 1 :] if argv[at : at + 1] == ["--"] else argv[at:]


def _profile_image(text: str) -> tuple[str, str]:
    name, _, image = text.partition("=")
    if not name or not _IMAGE.fullmatch(image):
        raise argparse.ArgumentTypeError("write NAME=IMAGE")
    return name, image


def platform_of(argv: list[str]) -> Platform:
    """The platform that our own options describe; leaves with exit code 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="local_platform.py",
        usage="%(prog)s [options] [--] [COMMAND [ARG...]]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--billing", choices=["required", "quota"], help="refuse every run with 402")
    add("--engine", type=shlex.split, default=[], help="the words before image and command")
    add("--prefix", default="", help="serve below this path")
    image: dict[str, Any] = {"type": _profile_image, "action": "append", "metavar": "NAME=IMAGE"}
    add("--profile-image", help="the image of a profile, a known one or a new one", **image)
    add("--runs-in-status", action="store_true", help="list runs in /status; no GET /runs")
    add("--verbose", action="store_true", help="log each request on standard error")
    options = parser.parse_args(argv)
    if options.engine and not shutil.which(options.engine[0]):
        parser.error(f"--engine: {options.engine[0]}: command not found")
    options.profile_images = dict(options.__dict__.pop("profile_image") or ())
    return Platform(**vars(options))


@contextlib.contextmanager
def signals_as_bytes() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A pair of sockets: whatever would end this process is read from the first as its number.

    By a socket, since a signal that comes just before a wait for a lock, a queue or a process
    begins is noticed only when that wait ends. What was ignored stays ignored.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        try:
            yield reader, writer
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)


def run_command(
    command: list[str], environ: Mapping[str, str], reader: socket.socket, writer: socket.socket
) -> int:
    """Run it to its end, passing signals on; its exit code, or what a shell says in its place."""
    with contextlib.suppress(BlockingIOError):
        return 128 + reader.recv(1, socket.MSG_DONTWAIT)[0]  # it came before COMMAND could
    try:
        process = subprocess.Popen(command, env=environ, close_fds=False)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "command not found" if missing else error.strerror
        print(f"local_platform.py: {command[0]}: {reason}", file=sys.stderr)
        return 127 if missing else 126

    def wait() -> None:
        process.wait()
        writer.send(b"\0")

    waiter = threading.Thread(target=wait)
    waiter.start()
    while number := reader.recv(1)[0]:
        if number != signal.SIGINT:  # that one it has had from the terminal
            process.send_signal(number)
    waiter.join()
    return shell_code(process.returncode)


def main(argv: list[str] | None = None) -> int:
    """Serve for one command, or until interrupted; the exit code."""
    own, command = split_argv(sys.argv[1:] if argv is None else argv)
    platform = platform_of(own)
    with signals_as_bytes() as (reader, writer), platform:
        ours = {"BUS_CONFIG_DIR": str(platform.config_dir), "BUS_AI_API_URL": platform.url}
        if command:
            # Each of these would win over what we set.
            others = ("BUS_AI_TOKEN", "BUS_API_TOKEN", "BUS_API_BASE_URL")
            kept = {name: value for name, value in os.environ.items() if name not in others}
            return run_command(command, {**kept, **ours}, reader, writer)
        for name, value in ours.items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        told = "serves the container API until Ctrl-C; set the two variables in another shell"
        print(f"local_platform.py: {told}", file=sys.stderr, flush=True)
        reader.recv(1)
        return 0


if __name__ == "__main__":
    sys.exit(main())
