# SPDX-License-Identifier: MIT
"""Servers that misbehave: raw sockets on loopback, each connection driven by a script.

    with Hostile(reset(), close(), answer(b"{}")) as server:
        ...  # the first connection is reset, the second closed, all others are answered

A script is a function of a `Connection`. A server counts what it was asked; a test reads
`server.requests` and `server.connections` when the client has ended. Nothing here knows the client.
"""

from __future__ import annotations

import errno
import fcntl
import hmac
import json
import re
import secrets
import select
import shlex
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import termios
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from support import DOCUMENTS, LIMIT

# --- connections and scripts ------------------------------------------------------------------


class Connection:
    """One accepted connection: the verbs of which scripts are made."""

    def __init__(self, server: Hostile, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self._seen = b""

    def read_head(self) -> bytes:
        """Read to the blank line that ends the request's head."""
        while b"\r\n\r\n" not in self._seen:
            self._read_more()
        return self._seen[: self._seen.index(b"\r\n\r\n") + 4]

    def read_request(self) -> bytes:
        """Read one request, head and body, and count it."""
        head = self.read_head()
        length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)\r\n", head)
        end = len(head) + (int(length[1]) if length else 0)
        while len(self._seen) < end:
            self._read_more()
        request, self._seen = self._seen[:end], self._seen[end:]
        self.server.requests.append(request)
        return request

    def _read_more(self) -> None:
        more = self.sock.recv(65536)
        if not more:
            raise ConnectionError("the client left amid its request")
        self._seen += more

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def drip(self, data: bytes, every: float = 0.2) -> None:
        """Send a byte, wait, send a byte, until the client leaves or the test ends."""
        self.server.reached.set()
        for byte in data:
            self.sock.sendall(bytes([byte]))
            if self.server.ending.wait(every):
                return

    def hold(self) -> None:
        """Say no more, and notice when the client goes away."""
        self.server.reached.set()
        while self.sock.recv(65536):
            pass
        self.server.left.set()

    def stall(self) -> None:
        """Say no more, and read no more either, once the first of the request is there."""
        self.await_data()
        self.server.reached.set()
        self.server.ending.wait(LIMIT)

    def await_data(self) -> None:
        """Wait until something can be read, and leave it there."""
        select.select([self.sock], [], [], LIMIT)

    def await_sent(self) -> None:
        """Wait until the client has what was sent, or is gone: a reset takes the rest away."""
        end = time.monotonic() + LIMIT
        broken = select.poll()
        broken.register(self.sock, 0)
        while fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, b"1234") != bytes(4):
            assert time.monotonic() < end
            if broken.poll(1):
                return

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Speak TLS from here on, as a server; `sock` is replaced."""
        self.sock = context.wrap_socket(self.sock, server_side=True)

    def reset(self) -> None:
        """Break the connection so that the client sees ECONNRESET."""
        linger = struct.pack("ii", 1, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.sock.close()


Script = Callable[[Connection], object]


def message(
    body: bytes = b"", status: str = "200 OK", *headers: str, length: int | None = None
) -> bytes:
    """One HTTP answer as bytes; `length` is what its Content-Length claims."""
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", "Connection: close"]
    if not re.search(r"(?im)^(content-length|transfer-encoding):", "\n".join(headers)):
        lines.append(f"Content-Length: {size}")
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def steps(*steps: Script) -> Script:
    """These scripts one after the other, on the same connection."""

    def script(connection: Connection) -> None:
        for step in steps:
            step(connection)

    return script


def sends(data: bytes) -> Script:
    return lambda connection: connection.send(data)


def answer(body: bytes = b"", status: str = "200 OK", *headers: str) -> Script:
    """Read the request and answer it properly."""
    return raw(message(body, status, *headers))


def raw(data: bytes) -> Script:
    """Read the request, send these bytes, close."""
    return steps(Connection.read_request, sends(data))


def html(status: str, title: str) -> Script:
    """An answer in markup, as the nginx in front of a platform gives it."""
    page = (
        f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1>"
        "</center>\r\n<hr><center>nginx</center>\r\n<script>alert(1)</script></body>\r\n</html>\r\n"
    )
    return raw(message(page.encode(), status).replace(b"application/json", b"text/html"))


def close() -> Script:
    """Read the request and close without a byte."""
    return Connection.read_request


def reset(after: bytes = b"") -> Script:
    """Read the request, send these bytes, and reset."""
    return steps(raw(after), Connection.reset)


def silent() -> Script:
    """Read the request and never answer."""
    return then_hold(b"")


def held(release: threading.Event, data: bytes) -> Script:
    """Read the request, let the test look around, and send these bytes when it says so."""

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.server.reached.set()
        if release.wait(LIMIT):
            connection.send(data)

    return script


def answer_unread(data: bytes, linger: bool) -> Script:
    """Answer when the head is there. Then read the rest, as nginx does, or close on top of it."""

    def script(connection: Connection) -> None:
        connection.server.requests.append(connection.read_head())
        connection.send(data)
        if linger:
            connection.sock.shutdown(socket.SHUT_WR)
            connection.hold()
        connection.await_sent()

    return script


def end_unread(data: bytes) -> Script:
    """Answer when the head is there, then end, then reset: what is sent after that is EPIPE."""

    def script(connection: Connection) -> None:
        connection.read_head()
        connection.send(data)
        connection.sock.shutdown(socket.SHUT_WR)
        connection.await_sent()

    return script


def then_hold(data: bytes) -> Script:
    """Read the request, send these bytes, never go on."""
    return steps(raw(data), Connection.hold)


def hold_at_once() -> Script:
    """Accept, and say nothing whatever comes."""
    return steps(Connection.await_data, Connection.hold)


def drip(data: bytes, first: bytes = b"", every: float = 0.2) -> Script:
    """Read the request, send `first` at once and `data` a byte at a time."""
    return steps(raw(first), lambda connection: connection.drip(data, every))


def drip_at_once(data: bytes) -> Script:
    """Once the client has begun, send a byte at a time without reading anything."""
    return steps(Connection.await_data, lambda connection: connection.drip(data))


def never_read() -> Script:
    """Accept, and let the request pile up in the sockets' buffers."""
    return Connection.stall


def again_and_again(data: bytes) -> Script:
    """Read the request and send the same bytes for ever, ten times a second."""

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.server.reached.set()
        while not connection.server.ending.wait(0.1):
            connection.send(data)

    return script


def void(_: object) -> None:
    """Let a lambda with a value be a script."""


# --- the server -------------------------------------------------------------------------------


HostileT = TypeVar("HostileT", bound="Hostile")


class Hostile:
    """A server on 127.0.0.1; the n-th connection is given to the n-th script, the last stays.

    With `tls` each connection is wrapped first. `listening=False` binds the port without
    listening, so that connections are refused until `listen()`.
    """

    def __init__(
        self,
        *scripts: Script,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        scheme: str = "",
        listening: bool = True,
        receive_buffer: int = 0,
    ) -> None:
        self.scripts = scripts or (answer(b"{}"),)
        self.requests: list[bytes] = []
        self.connections = 0
        self.reached = threading.Event()  # a script is where it was meant to bring the client
        self.left = threading.Event()  # the client went away while a script held it
        self.ending = threading.Event()
        self._tls = tls
        self._bugs: list[Exception] = []
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._receive_buffer = receive_buffer
        self.host = host
        with self._bound(0) as free:
            self.port: int = free.getsockname()[1]
            # Bound by its number, so that the port stays ours while it refuses.
            self._socket = self._bound(self.port)
        self.url = f"{scheme or ('https' if tls else 'http')}://{host}:{self.port}"
        self._listening = False
        if listening:
            self.listen()

    def _bound(self, port: int) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        sock.bind((self.host, port))
        return sock

    def listen(self) -> None:
        if not self._listening:
            self._listening = True
            self._socket.listen(64)
            self._accepting = self._start(self._accept)

    def refuse(self) -> None:
        """Refuse connections from now on, until `listen()`."""
        if self._listening:
            self._listening = False
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept()
            self._accepting.join(LIMIT)

    def methods(self) -> list[str]:
        """The methods of the requests that came, in order."""
        return [request.split(b" ", 1)[0].decode("ascii") for request in self.requests]

    def __enter__(self: HostileT) -> HostileT:
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        if self._listening:  # wakes accept()
            with socket.socket() as knock:
                knock.connect((self.host, self.port))
            self._accepting.join(LIMIT)
        for sock in self._open:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(LIMIT)
            assert not thread.is_alive(), "a script of the hostile server hangs"
        self._socket.close()
        assert not self._bugs, self._bugs

    def _start(self, work: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, daemon=True, name="hostile")
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                if self._listening and not self.ending.wait(0.01):
                    continue  # a test has left no descriptor for a moment
                return  # `refuse`
            if self.ending.is_set():
                sock.close()
                return
            script = self.scripts[min(self.connections, len(self.scripts) - 1)]
            self.connections += 1
            self._open.append(sock)
            self._start(self._converse, sock, script)

    def _converse(self, sock: socket.socket, script: Script) -> None:
        connection = Connection(self, sock)
        try:
            if self._tls:
                sock.settimeout(LIMIT)
                connection.start_tls(self._tls)
                self._open.append(connection.sock)
            script(connection)
        except OSError:  # the client left, or refused the certificate
            self.left.set()
        except Exception as error:  # a mistake in a test
            self._bugs.append(error)
        finally:
            connection.sock.close()
            sock.close()


class Api:
    """What one test sees of an `ApiServer`: a URL of its own, its answers, its requests.

    It answers each command properly until a test says otherwise. The last answer is given again.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[bytes] = []
        self._messages: list[bytes] = []
        self._lock = threading.Lock()

    def answers(self, *bodies: object, status: str = "200 OK") -> Api:
        """Answer with these bodies, one after the other; what is not bytes is made JSON."""
        as_bytes = (b if isinstance(b, bytes) else json.dumps(b).encode() for b in bodies)
        return self.sends(*(message(body, status) for body in as_bytes))

    def sends(self, *messages: bytes) -> Api:
        """Send these whole messages, one after the other; `message()` makes them."""
        self._messages = [*messages]
        return self

    def methods(self) -> list[str]:
        return [request.split(b" ", 1)[0].decode("ascii") for request in self.requests]

    def take(self, request: bytes) -> bytes:
        """Keep a request, and return what to send."""
        with self._lock:
            self.requests.append(request)
            if len(self._messages) > 1:
                return self._messages.pop(0)
            return self._messages[0] if self._messages else self._proper(request)

    def _proper(self, request: bytes) -> bytes:
        method, target, _ = request.split(b" ", 2)
        name = {b"POST": "run", b"DELETE": "delete"}.get(method) or target.decode().split("/")[-1]
        document = DOCUMENTS[name]
        if name == "delete":
            document = {**document, "run_id": unquote(target.decode().split("/")[-1])}
        return message(json.dumps(document).encode())


class ApiServer(Hostile):
    """A server for a whole session: the first part of the path says whose test a request is.

    A request that comes late, when its test has ended, is nobody's.
    """

    def __init__(self) -> None:
        super().__init__(self._serve)
        self._tests: dict[str, Api] = {}
        self._count = 0

    @contextmanager
    def open(self) -> Iterator[Api]:
        self._count += 1
        name = f"t{self._count}"
        self._tests[name] = Api(f"{self.url}/{name}")
        try:
            yield self._tests[name]
        finally:
            del self._tests[name]

    def _serve(self, connection: Connection) -> None:
        request = connection.read_request()
        self.requests.clear()
        api = self._tests.get(request.split(b"/", 2)[1].decode("ascii", "replace"))
        if api is not None:
            connection.send(api.take(request))


@contextmanager
def refused_port() -> Iterator[int]:
    """A port that refuses every connection and that nobody else can take meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


class FullPort:
    """A port, on each of the hosts, whose queue is full: a connection is neither made nor refused.

    Any port that is free, unless one is given. Linux only; elsewhere a full queue may refuse.
    """

    def __init__(self, *hosts: str, port: int = 0) -> None:
        self._hosts = hosts or ("127.0.0.1",)
        self._sockets: list[socket.socket] = []
        self._fillers: set[int] = set()  # their own ports
        self.port = port
        self.url = ""

    def __enter__(self) -> FullPort:
        for host in self._hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.socket(family)
            self._sockets.append(listener)
            listener.bind((host, self.port))
            self.port = listener.getsockname()[1]
            listener.listen(0)
            for _ in range(4):
                filler = socket.socket(family)
                self._sockets.append(filler)
                filler.setblocking(False)
                filler.connect_ex((host, self.port))
                self._fillers.add(filler.getsockname()[1])
        self.url = f"http://{self._hosts[0]}:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            sock.close()

    def clients(self) -> int:
        """How many sockets are waiting to be connected to the port, the fillers apart."""
        found: set[str] = set()
        for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
            table = path.read_text() if path.exists() else ""
            found.update(re.findall(rf":([0-9A-F]{{4}}) [0-9A-F]+:{self.port:04X} 02 ", table))
        return len({int(port, 16) for port in found} - self._fillers)

    def await_client(self, limit: float = LIMIT) -> bool:
        """Wait until a client is connecting."""
        end = time.monotonic() + limit
        while not self.clients() and time.monotonic() < end:
            time.sleep(0.01)
        return self.clients() > 0


# --- certificates -----------------------------------------------------------------------------


class Certificates:
    """A certification authority for the length of a test run, made with the `openssl` command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = self._authority("ca")
        self.other_ca = self._authority("other-ca")
        self.good = self._issue("good", "IP:127.0.0.1,DNS:localhost,DNS:platform.test")
        self.wrong_host = self._issue("wrong-host", "DNS:elsewhere.test")
        self.expired = self._issue("expired", "IP:127.0.0.1,DNS:localhost", days=0)

    def context(self, certificate: Path) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        return context

    def old_protocol(self) -> ssl.SSLContext | None:
        """A server of nothing newer than TLS 1.1; None where this OpenSSL cannot be one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            server = self.context(self.good)
            client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            client.load_verify_locations(self.ca)
            try:
                for context in (server, client):
                    context.set_ciphers("ALL:@SECLEVEL=0")
                    context.minimum_version = ssl.TLSVersion.TLSv1
                    context.maximum_version = ssl.TLSVersion.TLSv1_1
                with Hostile(hold_at_once(), tls=server) as probe:
                    sock = socket.create_connection(("127.0.0.1", probe.port), LIMIT)
                    with sock, client.wrap_socket(sock, server_hostname="127.0.0.1"):
                        pass
            except (OSError, ValueError):
                return None
        return server

    def _authority(self, name: str) -> Path:
        extension = "-addext keyUsage=critical,keyCertSign,cRLSign"
        self._openssl(f"req -x509 -days 2 {self._new(name)} {extension} -out {name}.pem")
        return self.folder / f"{name}.pem"

    def _issue(self, name: str, names: str, days: int = 2) -> Path:
        extensions = f"subjectAltName={names}\nauthorityKeyIdentifier=keyid\n"
        (self.folder / f"{name}.ext").write_text(extensions)
        self._openssl(f"req {self._new(name)} -out {name}.csr")
        self._openssl(
            f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days {days}"
            f" -extfile {name}.ext -out {name}.pem"
        )
        return self.folder / f"{name}.pem"

    def _new(self, name: str) -> str:
        key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        return f"{key} -subj /CN=hostile-{name} -keyout {name}.key"

    def _openssl(self, arguments: str) -> None:
        command = ["openssl", *arguments.split()]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, timeout=LIMIT)


def why_no_openssl() -> str:
    """The reason to skip the tests of TLS; empty where they can run."""
    return "" if shutil.which("openssl") else "no openssl command to make certificates with"


class AlertingTls:
    """TLS 1.2 as a server, over a `Connection`: it sends any alert at any moment.

    Python's ssl makes the handshake and reads. It sends no alerts but its own, so what is sent
    after the handshake is sealed here, with the keys that RFC 5246 derives, as RFC 7366 has it.
    """

    def __init__(self, connection: Connection, certificates: Certificates) -> None:
        self._connection = connection
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = certificates.context(certificates.good)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE-ECDSA-AES128-SHA256")
        with tempfile.NamedTemporaryFile() as log:
            context.keylog_filename = log.name
            self._tls = context.wrap_bio(self._in, self._out, server_side=True)
            hello = self._shake_hands()
            client_random, master = map(bytes.fromhex, Path(log.name).read_text().split()[-2:])
        seed = b"key expansion" + hello[11:43] + client_random
        block, chained = b"", seed
        while len(block) < 96:
            chained = hmac.digest(master, chained, "sha256")
            block += hmac.digest(master, chained + seed, "sha256")
        self._mac_key, self._key = block[32:64], block[80:96].hex()
        self._records = 1  # sent under the keys; the first ended the handshake

    def _shake_hands(self) -> bytes:
        """Return the first that was sent, which begins with the server's hello."""
        first = b""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            sent = self._out.read()
            first = first or sent
            self._connection.send(sent)
            if self._tls.cipher():
                return first
            self._receive()

    def _receive(self) -> None:
        data = self._connection.sock.recv(65536)
        if not data:
            raise ConnectionError("the client left")
        self._in.write(data)

    def read_request(self, end: bytes = b"}") -> None:
        """Read a request, by default one whose body is JSON, and count it."""
        request = b""
        while not request.endswith(end):
            try:
                request += self._tls.read(65536)
            except ssl.SSLWantReadError:
                self._receive()
        self._connection.server.requests.append(request)

    def send(self, data: bytes) -> None:
        self._seal(23, data)

    def alert(self, number: int) -> None:
        """Send a fatal alert."""
        self._seal(21, bytes([2, number]))

    def ask_for_another_handshake(self) -> None:
        self._seal(22, bytes(4))  # HelloRequest

    def _seal(self, kind: int, data: bytes) -> None:
        pad = 15 - len(data) % 16
        command = f"openssl enc -aes-128-cbc -nopad -K {self._key} -iv {bytes(16).hex()}"
        padded = data + bytes([pad]) * (pad + 1)
        made = subprocess.run(command.split(), input=padded, stdout=subprocess.PIPE, check=True)
        sealed = bytes(16) + made.stdout
        header = struct.pack(">QBHH", self._records, kind, 0x303, len(sealed))
        sealed += hmac.digest(self._mac_key, header + sealed, "sha256")
        self._records += 1
        self._connection.send(struct.pack(">BHH", kind, 0x303, len(sealed)) + sealed)


# --- name resolution, really ------------------------------------------------------------------


def why_no_ipv6() -> str:
    """The reason to skip what needs an IPv6 loopback; empty where there is one."""
    try:
        with FullPort("::1"):
            return ""
    except OSError as error:
        return f"no IPv6 loopback here: {error}"


@cache
def namespace_command() -> tuple[str, ...]:
    """What to put before `sh -c ...` for a private set of mounts; empty where there is none."""
    for words in (("unshare", "-m"), ("unshare", "-r", "-m")):
        try:
            script = "mount --bind /etc/hosts /etc/hosts"
            probe = subprocess.run([*words, "sh", "-c", script], capture_output=True, timeout=LIMIT)
        except (OSError, subprocess.SubprocessError):
            continue
        if probe.returncode == 0:
            return words
    return ()


def why_no_namespace() -> str:
    """The reason to skip what needs its own /etc/hosts; empty where it can run."""
    return "" if namespace_command() else "no private mount namespace (unshare -m) to be had"


def with_files(command: Sequence[str], files: dict[str, Path]) -> list[str]:
    """The command with some files of /etc replaced, for it alone; exec'ed, so signals arrive."""
    mounts = [f"mount --bind {shlex.quote(str(files[name]))} {name}" for name in files]
    return [*namespace_command(), "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh", *command]


class NameServer:
    """A DNS server at `address`, port 53: each query is answered by `reply(how many came before)`.

    The address is a loopback one that no other server has, in whatever process.

    `reply` gives an IPv4 address, "" for "no such name", or None for no reply at all. Only queries
    for IPv4 addresses are counted; the others of the pair get `ipv6`, or no address.
    """

    def __init__(self, reply: Callable[[int], str | None], ipv6: str = "") -> None:
        self.queries = 0
        self.reached = threading.Event()
        self._reply = reply
        self._ipv6 = ipv6
        self._seen: set[bytes] = set()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.address = ""

    def __enter__(self) -> NameServer:
        self.address = bind_name_server(self._socket)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stop:
            stop.sendto(b"", (self.address, 53))
        self._thread.join(LIMIT)
        self._socket.close()

    def files(self, folder: Path) -> dict[str, Path]:
        """What `with_files` needs for a program to ask this server."""
        resolv, nsswitch = folder / "resolv.conf", folder / "nsswitch.conf"
        resolv.write_text(f"nameserver {self.address}\n")
        nsswitch.write_text("hosts: files dns\n")
        files = {"/etc/resolv.conf": resolv, "/etc/nsswitch.conf": nsswitch}
        return {name: path for name, path in files.items() if Path(name).exists()}

    def _serve(self) -> None:
        while True:
            query, sender = self._socket.recvfrom(2048)
            if not query:
                return
            end = query.index(b"\0", 12) + 5
            is_a = query[end - 4 : end - 2] == b"\0\1"
            address = self._reply(self.queries)
            self.reached.set()
            self.queries += is_a
            if address is None:
                continue
            data = socket.inet_aton(address) if is_a and address else b""
            if query[end - 4 : end - 2] == b"\0\x1c" and self._ipv6:
                data = socket.inet_pton(socket.AF_INET6, self._ipv6)
            flags = 0x8180 if address else 0x8183  # NXDOMAIN
            reply = query[:2] + struct.pack(">5H", flags, 1, bool(data), 0, 0) + query[12:end]
            if data:
                kind = 1 if is_a else 28
                reply += struct.pack(">3HIH", 0xC00C, kind, 1, 0, len(data)) + data
            self._socket.sendto(reply, sender)


def bind_name_server(sock: socket.socket) -> str:
    """Bind the port of DNS on a loopback address of its own, and return that address."""
    for attempt in range(100):
        address = f"127.53.{secrets.randbelow(256)}.{1 + secrets.randbelow(254)}"
        try:
            sock.bind((address, 53))
            return address
        except OSError as error:
            if error.errno != errno.EADDRINUSE or attempt == 99:
                raise
    raise AssertionError


def why_no_name_server() -> str:
    """The reason to skip what needs its own DNS server; empty where it can run."""
    if why_no_namespace():
        return why_no_namespace()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            bind_name_server(sock)
        except OSError as error:
            return f"port 53 of a loopback address cannot be bound: {error}"
    return ""
