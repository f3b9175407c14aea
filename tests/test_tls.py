# SPDX-License-Identifier: MIT
"""Certificates and the settings of TLS: promises 2.6, 2.7 and 6.4."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bus_containers
from bus_containers import Client, TransportError
from hostile import (
    Certificates,
    Connection,
    Hostile,
    Script,
    answer,
    message,
    why_no_namespace,
    with_files,
)
from support import (
    BODIES,
    CANARY,
    LIMIT,
    Env,
    InProcess,
    Program,
    check_each,
    check_failure,
    fill,
    pythons,
    second_tier,
    skip_if,
    words,
)

RUN = words("run")
PATH = "/api/v1/containers"
REFUSED = "TLS: the certificate is refused: "


@pytest.fixture
def server(serve: Callable[..., Hostile], certificates: Certificates) -> Hostile:
    """A platform on 127.0.0.1 that answers a run, by TLS."""
    return serve(answer(BODIES["run"]), tls=certificates.context(certificates.good))


@pytest.fixture
def ca(certificates: Certificates) -> Env:
    return {"SSL_CERT_FILE": str(certificates.ca)}


# --- a certificate that is trusted ------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> dict[str, str]:
    """What a case names: files, and a folder in which OpenSSL finds the CA by its hash.

    ODD is issued by a CA that strict X.509 refuses: its constraints are not critical.
    """
    folder = tmp_path_factory.mktemp("places")

    def openssl(arguments: str) -> str:
        command = ["openssl", *arguments.split()]
        return subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True)

    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    (folder / "cnf").write_text(
        "[req]\ndistinguished_name=n\nx509_extensions=e\n[n]\n[e]\nbasicConstraints=CA:true\n"
    )
    request = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config cnf"
    openssl(f"{request} -x509 -days 2 -subj /CN=ca -keyout ca.key -out ca.pem")
    openssl(f"{request} -subj /CN=odd -keyout odd.key -out odd.csr")
    issue = "x509 -req -in odd.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
    openssl(f"{issue} -extfile ext -out odd.pem")
    name = openssl(f"x509 -hash -noout -in {certificates.ca}").strip()
    (folder / "hashed").mkdir()
    shutil.copy(certificates.ca, folder / "hashed" / f"{name}.0")
    found = {"GOOD": certificates.good, "CA": certificates.ca, "TMP": folder}
    found |= {"ODD": folder / "odd.pem", "ITS": folder / "ca.pem", "FOLDER": folder / "hashed"}
    return {name: str(path) for name, path in found.items()}


class Trusted(NamedTuple):
    """A server's certificate and host, and the environment in which it is trusted."""

    environ: dict[str, str]
    certificate: str = "GOOD"
    host: str = "127.0.0.1"

    def serve(self, places: dict[str, str], certificates: Certificates) -> Hostile:
        context = certificates.context(Path(places[self.certificate]))
        return Hostile(answer(BODIES["run"]), tls=context)

    def env(self, places: dict[str, str]) -> Env:
        env: Env = {"BUS_AI_TOKEN": CANARY}
        for variable, value in self.environ.items():
            env[variable] = re.sub("[A-Z]+", lambda match: places[match[0]], value)
        return env


TRUSTED = {
    "address": Trusted({"SSL_CERT_FILE": "CA"}),
    "name": Trusted({"SSL_CERT_FILE": "CA", "SSL_CERT_DIR": ""}, host="localhost"),
    "folder": Trusted({"SSL_CERT_FILE": "", "SSL_CERT_DIR": "FOLDER"}),
    "folders": Trusted({"SSL_CERT_FILE": "TMP/none", "SSL_CERT_DIR": "/nowhere:FOLDER"}),
    "odd": Trusted({"SSL_CERT_FILE": "ITS"}, "ODD"),
    "the-server-itself": Trusted({"SSL_CERT_FILE": "GOOD"}),  # without its CA
    # What cannot be opened is ignored, as in curl.
    "no-key-log": Trusted({"SSL_CERT_FILE": "CA", "SSLKEYLOGFILE": "TMP/missing/keys"}),
    "bad-key-log": Trusted({"SSL_CERT_FILE": "CA", "SSLKEYLOGFILE": "TMP"}),
}


@pytest.mark.parametrize("case", TRUSTED.values(), ids=TRUSTED.keys())
def test_a_certificate_that_is_trusted(
    case: Trusted, cli: InProcess, places: dict[str, str], certificates: Certificates
) -> None:
    with case.serve(places, certificates) as server:
        url = f"https://{case.host}:{server.port}"
        result = cli("--api-url", url, *RUN, env=case.env(places))
    assert (result.code, result.err, server.connections) == (0, b"", 1)
    assert f"Host: {case.host}:{server.port}\r\n".encode() in server.requests[0]
    assert f"Authorization: Bearer {CANARY}\r\n".encode() in server.requests[0]


@second_tier
@pytest.mark.parametrize("case", [TRUSTED["odd"], TRUSTED["the-server-itself"]], ids=str)
def test_the_same_certificates_pass_on_every_python(
    case: Trusted, program: Program, places: dict[str, str], certificates: Certificates
) -> None:
    """Promise 2.7."""
    skip_if("" if program.command[1:] else "the program under test has a Python of its own")

    def check(version: str) -> None:
        of_it = Program([pythons()[version], *program.command[1:]], program.home)
        result = of_it(*RUN, at=trusting, env=case.env(places))
        assert (result.code, result.err) == (0, b"")

    with case.serve(places, certificates) as trusting:
        check_each(check, [name for name in pythons() if len(name) == 4 or name == "3.9"])


# --- a certificate that is not trusted --------------------------------------------------------

ADVICE = (
    "check BUS_AI_API_URL and the clock, or set SSL_CERT_FILE to a PEM file with the server's CA"
)
# The server's certificate, the one that is trusted, and the whole reason.
UNTRUSTED = [
    ("good", "other_ca", "unable to get local issuer certificate"),
    ("expired", "ca", "certificate has expired"),
    ("wrong_host", "ca", "IP address mismatch, certificate is not valid for '127.0.0.1'."),
]


@pytest.mark.parametrize("case", UNTRUSTED, ids=lambda case: case[0])
def test_a_certificate_that_is_not_trusted(
    case: tuple[str, str, str],
    cli: InProcess,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Promise 2.7: nothing switches the checks off, and no try is made again."""
    certificate, trusted, reason = case
    unverified = ssl._create_unverified_context  # as a host program may have done
    monkeypatch.setattr(ssl, "_create_default_https_context", unverified)
    env: Env = {"SSL_CERT_FILE": str(getattr(certificates, trusted)), "PYTHONHTTPSVERIFY": "0"}
    context = certificates.context(getattr(certificates, certificate))
    with Hostile(answer(BODIES["run"]), tls=context) as server:
        result = cli("status", at=server, env=env)
        [told] = cli("--error-format", "json", *RUN, at=server, env=env).objects
    where = f"GET {server.url}{PATH}/status"
    assert result.message == f"bus-containers: {where}: {REFUSED}{reason}; {ADVICE}\n"
    assert (result.code, told["run_state"], told["retryable"]) == (1, "not_sent", False)
    assert (server.requests, server.connections) == ([], 2)


UNUSABLE = "holds no certificate in PEM that can be used"
LOOP = "cannot be read: Too many levels of symbolic links"
# Why a CA's file, or folder, cannot be used, and how its path is made of the text of a good one.
BAD_CAS: dict[str, tuple[str, Callable[[Path, str], object]]] = {
    "missing": ("cannot be read: No such file or directory", lambda path, pem: None),
    "directory": ("cannot be read: Is a directory", lambda path, pem: path.mkdir()),
    "loop": (LOOP, lambda path, pem: path.symlink_to(path)),
    "empty": (UNUSABLE, lambda path, pem: path.touch()),
    "der": (UNUSABLE, lambda path, pem: path.write_bytes(ssl.PEM_cert_to_DER_cert(pem))),
    "utf-16": (UNUSABLE, lambda path, pem: path.write_text(pem, "utf-16")),
    "text": (UNUSABLE, lambda path, pem: path.write_text("# the CA goes here\n")),
    "another": (UNUSABLE, lambda path, pem: path.write_text(pem.replace("CERTIFICATE", "X"))),
    "cut": (UNUSABLE, lambda path, pem: path.write_text(pem[:300])),
    "damaged": (UNUSABLE, lambda path, pem: path.write_text(pem.replace(pem[40:60], 20 * "x"))),
    "folder-missing": ("cannot be read: No such file or directory", lambda path, pem: None),
    "folder-file": ("cannot be read: Not a directory", lambda path, pem: path.touch()),
    "folder-empty": ("is empty", lambda path, pem: path.mkdir()),
}


@pytest.mark.parametrize("kind", BAD_CAS)
def test_a_ca_that_cannot_be_used(
    kind: str, cli: InProcess, server: Hostile, certificates: Certificates, tmp_path: Path
) -> None:
    """Promise 2.6: it is named with the reason."""
    path, (reason, make) = tmp_path / kind, BAD_CAS[kind]
    make(path, certificates.ca.read_text())
    variable = "SSL_CERT_DIR" if kind.startswith("folder") else "SSL_CERT_FILE"
    result = cli(*RUN, at=server, env={variable: str(path)})
    error = check_failure(result, 125, REFUSED)
    assert error.endswith(f"; {variable} names {path}, which {reason}")
    assert not result.spoken.advises
    assert server.requests == []


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_a_ca_that_no_file_can_be_named(variable: str, server: Hostile) -> None:
    """A mapping of a host program's may hold what the environment cannot."""
    environ = {"BUS_AI_API_URL": server.url, "BUS_AI_TOKEN": CANARY, variable: "a\0b"}
    with pytest.raises(TransportError, match=f"; {variable} names .* cannot be read: "):
        Client.from_env(environ).status()


@second_tier
def test_a_machine_without_any_ca_certificate(
    program: Program, server: Hostile, certificates: Certificates, tmp_path: Path
) -> None:
    skip_if(why_no_namespace())
    paths = ssl.get_default_verify_paths()
    file, folder = Path(paths.openssl_cafile).resolve(), Path(paths.openssl_capath).resolve()
    if not folder.is_dir() or (file.exists() and folder not in file.parents):
        pytest.skip("this Python does not have its CA certificates in a folder")
    (tmp_path / "empty").mkdir()
    program.command = with_files(program.command, {str(folder): tmp_path / "empty"})
    advice = "no CA certificates here: install the package ca-certificates, or set SSL_CERT_FILE"
    check_failure(program(*RUN, at=server), 125, REFUSED, f"; {advice}")
    env: Env = {"SSL_CERT_FILE": str(certificates.other_ca)}
    advice = "check BUS_AI_API_URL and the clock, or set SSL_CERT_FILE"
    check_failure(program(*RUN, at=server, env=env), 125, REFUSED, f"; {advice}")


# --- another protocol -------------------------------------------------------------------------

HTTPS = "; is this port for https?"


def test_an_old_protocol_is_refused(cli: InProcess, certificates: Certificates, ca: Env) -> None:
    context = certificates.old_protocol()
    if context is None:
        pytest.skip("this OpenSSL cannot serve TLS 1.1")
    with Hostile(answer(BODIES["run"]), tls=context) as server:
        check_failure(cli(*RUN, at=server, env=ca), 125, "TLS: ", HTTPS)
    assert server.requests == []


def speak_plainly(connection: Connection) -> None:
    connection.sock.recv(65536)
    connection.send(message(b"", "400 Bad Request"))


def close_amid_handshake(connection: Connection) -> None:
    connection.sock.recv(65536)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("script", [speak_plainly, close_amid_handshake])
def test_a_broken_handshake_never_sent_the_run(script: Script, cli: InProcess) -> None:
    """Promise 6.4. A gateway whose backend is not up may end a connection: retryable."""
    is_end = script is close_amid_handshake
    with Hostile(script, scheme="https") as server:
        result = cli("--error-format", "json", *RUN, at=server)
    [told] = result.objects
    assert (result.code, told["run_state"], told["retryable"]) == (125, "not_sent", is_end)
    assert told["text"].endswith(HTTPS)
    assert 1 <= server.connections <= (3 if is_end else 1)


def test_the_server_hears_why_its_certificate_is_refused(
    cli: InProcess, certificates: Certificates
) -> None:
    heard: list[str] = []

    def script(connection: Connection) -> None:
        context = certificates.context(certificates.good)
        tls: Any = context.wrap_socket(connection.sock, True, do_handshake_on_connect=False)
        connection.sock = tls
        try:
            tls.do_handshake()
        except ssl.SSLError as error:
            heard.append(error.reason)

    with Hostile(script, scheme="https") as server:
        check_failure(cli(*RUN, at=server), 125, REFUSED)
    assert heard == ["TLSV1_ALERT_UNKNOWN_CA"]


def test_a_refused_certificate_is_told_though_the_server_is_gone(
    cli: InProcess, certificates: Certificates
) -> None:
    """Our alert cannot be sent, which is not what is to be mended."""

    def script(connection: Connection) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        incoming.write(connection.sock.recv(65536))
        tls = certificates.context(certificates.good).wrap_bio(incoming, outgoing, server_side=True)
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        connection.send(outgoing.read())
        connection.reset()

    with Hostile(script, scheme="https") as server:
        result = cli(*RUN, at=server, env={"SSL_CERT_FILE": str(certificates.other_ca)})
    assert "TLS: the certificate is refused" in check_failure(result, 125)
    assert server.connections == 1


def test_nobody_waits_for_room_for_an_alert() -> None:
    """The failure that it tells of is known, and the server may read no more."""
    client = bus_containers.Client("https://127.0.0.1:1", CANARY, timeout=LIMIT)
    attempt = bus_containers._Attempt(bus_containers._Exchange(client, "GET", "status"))
    attempt.sock, server = socket.socketpair()
    attempt.flags = socket.MSG_NOSIGNAL
    server.settimeout(LIMIT)

    def serve() -> None:
        server.recv(65536)
        fill(attempt.sock.fileno())
        server.sendall(b"\x16\x03\x03\0\x40" + b"g" * 64)

    with attempt.sock, server, ThreadPoolExecutor(1) as pool:
        pool.submit(serve)
        with pytest.raises(ssl.SSLError):
            attempt._start_tls()


def test_plain_http_to_a_port_for_https(cli: InProcess, server: Hostile) -> None:
    url = server.url.replace("https:", "http:")
    result = cli("--api-url", url, *RUN, env={"BUS_AI_TOKEN": CANARY})
    assert (result.code, HTTPS in result.error, server.requests) == (125, True, [])


@pytest.mark.parametrize("proxied", [False, True], ids=["direct", "tunnel"])
def test_a_server_that_wants_a_certificate_of_ours(
    proxied: bool, cli: InProcess, certificates: Certificates, ca: Env
) -> None:
    """TLS 1.3 asks for it when the request is on its way already, and no run is started."""
    context = certificates.context(certificates.good)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates.ca)

    def script(connection: Connection) -> None:
        if proxied:
            connection.read_request()
            connection.send(b"HTTP/1.1 200 OK\r\n\r\n")
        tls: Any = context.wrap_socket(connection.sock, True, do_handshake_on_connect=False)
        connection.sock = tls
        with pytest.raises(ssl.SSLError):
            tls.do_handshake()

    with Hostile(script, scheme="https") as server:
        proxy: Env = {"HTTPS_PROXY": server.url.replace("https:", "http:")}
        proxy["BUS_AI_API_URL"] = "https://platform.test"
        result = cli(*RUN, at=server, env={**ca, **(proxy if proxied else {})})
    wanted = "the server asks for a client certificate, and none can be given"
    check_failure(result, 125, "TLS: ", f"; {wanted}")
    assert not result.spoken.advises
    assert server.connections == 1
