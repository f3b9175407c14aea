# SPDX-License-Identifier: MIT
"""Certificates and the settings of TLS: promises 2.6, 2.7, 6.4 and 6.17."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    InProcess,
    Program,
    check_each,
    check_failure,
    pythons,
    second_tier,
    skip_if,
    tiers,
    words,
)

STATUS = words("status")
RUN = words("run")
PATH = "/api/v1/containers"
REFUSED = "TLS: the certificate is refused: "


@pytest.fixture
def server(serve: Callable[..., Hostile], certificates: Certificates) -> Hostile:
    """A platform on 127.0.0.1 that answers a run, by TLS."""
    return serve(answer(BODIES["run"]), tls=certificates.context(certificates.good))


@pytest.fixture
def ca(certificates: Certificates) -> dict[str, str | None]:
    return {"SSL_CERT_FILE": str(certificates.ca)}


# --- a certificate that is trusted ------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_right_ca(
    host: str, cli: InProcess, server: Hostile, ca: dict[str, str | None]
) -> None:
    url = f"https://{host}:{server.port}"
    result = cli("--api-url", url, *RUN, env={"BUS_AI_TOKEN": CANARY, **ca})
    assert (result.code, result.err) == (0, b"")
    assert f"Host: {host}:{server.port}\r\n".encode() in server.requests[0]
    assert f"Authorization: Bearer {CANARY}\r\n".encode() in server.requests[0]


def hashed(certificate: Path, folder: Path) -> Path:
    """A folder in which OpenSSL finds a CA's certificate: by the hash of its subject."""
    command = ["openssl", "x509", "-hash", "-noout", "-in", str(certificate)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    folder.mkdir()
    shutil.copy(certificate, folder / f"{name}.0")
    return folder


def test_an_empty_variable_is_unset(
    cli: InProcess, server: Hostile, certificates: Certificates, tmp_path: Path
) -> None:
    folder = hashed(certificates.ca, tmp_path / "certs")
    for file, places in ((certificates.ca, ""), ("", folder), ("", f"/nowhere:{folder}")):
        env = {"SSL_CERT_FILE": str(file), "SSL_CERT_DIR": str(places)}
        result = cli(*RUN, at=server, env={**env})
        assert (result.code, result.err) == (0, b""), env


class Odd:
    """Certificates that strict X.509 refuses, and what is to be trusted for each."""

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        self.folder = folder
        for name, extension in (("plain", "basicConstraints=CA:true"), ("v1", "")):
            (folder / f"{name}.cnf").write_text(
                f"[req]\ndistinguished_name=name\nx509_extensions=ca\n[name]\n[ca]\n{extension}\n"
            )
        (folder / "leaf.ext").write_text("subjectAltName=IP:127.0.0.1\n")
        self.trusted = {
            "constraints-not-critical": (self._issue("plain"), folder / "plain.pem"),
            "the-server-itself": (certificates.good, certificates.good),
        }

    def _issue(self, ca: str) -> Path:
        request = f"req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config {ca}.cnf"
        self._openssl(f"{request} -x509 -days 2 -subj /CN={ca} -keyout {ca}.key -out {ca}.pem")
        self._openssl(f"{request} -subj /CN=x -keyout {ca}-x.key -out {ca}-x.csr")
        self._openssl(
            f"x509 -req -in {ca}-x.csr -CA {ca}.pem -CAkey {ca}.key -CAcreateserial -days 2"
            f" -extfile leaf.ext -out {ca}-x.pem"
        )
        return self.folder / f"{ca}-x.pem"

    def _openssl(self, arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments.split()], cwd=self.folder, check=True, capture_output=True
        )


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Odd:
    return Odd(tmp_path_factory.mktemp("odd"), certificates)


ODD = ["constraints-not-critical", "the-server-itself"]


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_certificate_that_is_trusted(
    kind: str, cli: InProcess, odd: Odd, certificates: Certificates
) -> None:
    """Promise 2.7, of the Python that runs the tests."""
    certificate, trusted = odd.trusted[kind]
    with Hostile(answer(BODIES["run"]), tls=certificates.context(certificate)) as server:
        result = cli(*RUN, at=server, env={"SSL_CERT_FILE": str(trusted)})
    assert (result.code, result.err) == (0, b"")


@second_tier
@pytest.mark.parametrize("kind", ODD)
def test_the_same_certificates_pass_on_every_python(
    kind: str, program: Program, odd: Odd, certificates: Certificates
) -> None:
    if len(program.command) < 2:
        pytest.skip("the program under test has a Python of its own")
    certificate, trusted = odd.trusted[kind]

    def check(version: str) -> None:
        of_it = Program([pythons()[version], *program.command[1:]], program.home)
        result = of_it(*RUN, at=trusting, env={"SSL_CERT_FILE": str(trusted)})
        assert (result.code, result.err) == (0, b"")

    versions = [name for name in pythons() if tuple(map(int, name.split("."))) >= (3, 9)]
    with Hostile(answer(BODIES["run"]), tls=certificates.context(certificate)) as trusting:
        check_each(check, versions)


@pytest.mark.parametrize("certificate", ["good", "wrong_host"])
def test_a_name_with_a_dot_at_its_end(
    certificate: str, cli: InProcess, certificates: Certificates, ca: dict[str, str | None]
) -> None:
    """Promise 6.17: asked for with the dot, and verified without it. A proxy finds the name."""
    names: list[str | None] = []
    context = certificates.context(getattr(certificates, certificate))
    context.sni_callback = lambda _socket, name, _context: names.append(name)

    def tunnel(connection: Connection) -> None:
        connection.read_request()
        connection.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        connection.start_tls(context)
        answer(BODIES["run"])(connection)

    with Hostile(tunnel) as proxy:
        env = {"BUS_AI_TOKEN": CANARY, "HTTPS_PROXY": proxy.url, **ca}
        result = cli("--api-url", "https://platform.test.:8443", *RUN, env=env)
    assert proxy.requests[0].startswith(b"CONNECT platform.test.:8443 ")
    assert names == ["platform.test"]
    if certificate == "wrong_host":
        check_failure(result, 125, "certificate", "'platform.test'")
        return
    assert (result.code, result.err) == (0, b"")
    assert b"\r\nHost: platform.test.:8443\r\n" in proxy.requests[1]


@pytest.mark.parametrize("place", ["missing/keys", ""], ids=["missing", "folder"])
def test_sslkeylogfile_that_cannot_be_opened(
    place: str, cli: InProcess, server: Hostile, ca: dict[str, str | None], tmp_path: Path
) -> None:
    """Promise 2.7: it is ignored, as in curl."""
    result = cli(*RUN, at=server, env={"SSLKEYLOGFILE": str(tmp_path / place), **ca})
    assert (result.code, result.err) == (0, b"")
    assert server.connections == 1


# --- a certificate that is not trusted --------------------------------------------------------

ADVICE = (
    "check BUS_AI_API_URL and the clock, or set SSL_CERT_FILE to a PEM file with the server's CA"
)
# The server's certificate, the one that is trusted, and the whole reason.
UNTRUSTED = {
    "unknown-ca": ("good", "other_ca", "unable to get local issuer certificate"),
    "expired": ("expired", "ca", "certificate has expired"),
    "wrong-host": (
        "wrong_host",
        "ca",
        "IP address mismatch, certificate is not valid for '127.0.0.1'.",
    ),
}


@pytest.mark.parametrize(
    ("certificate", "trusted", "reason"), UNTRUSTED.values(), ids=UNTRUSTED.keys()
)
def test_a_certificate_that_is_not_trusted(
    certificate: str,
    trusted: str,
    reason: str,
    cli: InProcess,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Promise 2.7: nothing switches the checks off, and no try is made again."""
    unverified = ssl._create_unverified_context  # as a host program may have done
    monkeypatch.setattr(ssl, "_create_default_https_context", unverified)
    env = {"SSL_CERT_FILE": str(getattr(certificates, trusted)), "PYTHONHTTPSVERIFY": "0"}
    context = certificates.context(getattr(certificates, certificate))
    with Hostile(answer(BODIES["run"]), tls=context) as server:
        for name, code, where in (
            ("status", 1, f"GET {server.url}{PATH}/status"),
            ("run", 125, f"POST {server.url}{PATH}/runs"),
        ):
            result = cli(*words(name), at=server, env={**env})
            assert result.message == f"bus-containers: {where}: {REFUSED}{reason}; {ADVICE}\n"
            assert (result.code, result.out) == (code, b"")
        [told] = cli("--error-format", "json", *RUN, at=server, env={**env}).objects
        assert (told["run_state"], told["retryable"]) == ("not_sent", False)
    assert server.requests == []
    assert server.connections == 3


def bad_bundle(kind: str, folder: Path, certificates: Certificates) -> Path:
    """A path of this kind that no CA certificate can be read from."""
    path = folder / f"{kind}.pem"
    pem = certificates.ca.read_bytes()
    contents = {
        "empty": b"",
        "der": ssl.PEM_cert_to_DER_cert(pem.decode()),
        "utf-16": pem.decode().encode("utf-16"),
        "text": b"# the CA goes here\n",
        "only-a-key": certificates.ca.with_suffix(".key").read_bytes(),
        "cut": pem[: len(pem) // 2],
        "damaged": pem.replace(pem[40:60], b"x" * 20),
        "unreadable": pem,
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    return path


BUNDLES = {
    "missing": "does not exist",
    "directory": "cannot be read: Is a directory",
    "loop": "cannot be read: Too many levels of symbolic links",
    "empty": "is empty",
    **dict.fromkeys(["der", "utf-16", "text"], "is not PEM"),
    **dict.fromkeys(["only-a-key", "cut", "damaged"], "holds no certificate that can be used"),
}
FOLDERS = {
    "missing": "does not exist",
    "file": "cannot be read: Not a directory",
    "empty": "is empty",
}


@pytest.mark.parametrize(("kind", "reason"), BUNDLES.items(), ids=BUNDLES.keys())
def test_a_ca_file_that_cannot_be_used(
    kind: str,
    reason: str,
    cli: InProcess,
    server: Hostile,
    certificates: Certificates,
    tmp_path: Path,
) -> None:
    """Promise 2.6: it is named with the reason."""
    path = bad_bundle(kind, tmp_path, certificates)
    result = cli(*RUN, at=server, env={"SSL_CERT_FILE": str(path)})
    check_failure(result, 125, REFUSED, f"; SSL_CERT_FILE names {path}, which {reason}")
    assert not result.spoken.advises
    assert server.requests == []


@second_tier
def test_a_ca_file_of_somebody_else(
    program: Program, server: Hostile, certificates: Certificates, tmp_path: Path
) -> None:
    path = bad_bundle("unreadable", tmp_path, certificates)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root: do without what lets it read everything
        if not shutil.which("setpriv"):
            pytest.skip("runs as root, and there is no setpriv")
        bounds = "--bounding-set=-dac_override,-dac_read_search"
        program.command = ["setpriv", bounds, *program.command]
    result = program(*RUN, at=server, env={"SSL_CERT_FILE": str(path)})
    check_failure(result, 125, f"SSL_CERT_FILE names {path}, which cannot be read: Permission")


@pytest.mark.parametrize(("kind", "reason"), FOLDERS.items(), ids=FOLDERS.keys())
def test_a_ca_folder_that_cannot_be_used(
    kind: str, reason: str, cli: InProcess, server: Hostile, tmp_path: Path
) -> None:
    path = tmp_path / kind
    if kind == "file":
        path.touch()
    elif kind == "empty":
        path.mkdir()
    result = cli(*RUN, at=server, env={"SSL_CERT_DIR": str(path)})
    check_failure(result, 125, REFUSED, f"; SSL_CERT_DIR names {path}, which {reason}")


@second_tier
def test_a_machine_without_any_ca_certificate(
    program: Program, server: Hostile, tmp_path: Path
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


# --- another protocol -------------------------------------------------------------------------


def test_an_old_protocol_is_refused(
    cli: InProcess, certificates: Certificates, ca: dict[str, str | None]
) -> None:
    context = certificates.old_protocol()
    if context is None:
        pytest.skip("this OpenSSL cannot serve TLS 1.1")
    with Hostile(answer(BODIES["run"]), tls=context) as server:
        check_failure(cli(*RUN, at=server, env=ca), 125, "TLS: ", "; is this port for https?")
    assert server.requests == []


def speak_plainly(connection: Connection) -> None:
    connection.sock.recv(65536)
    connection.send(message(b"", "400 Bad Request"))


def close_amid_handshake(connection: Connection) -> None:
    connection.sock.recv(65536)


def reset_amid_handshake(connection: Connection) -> None:
    connection.sock.recv(65536)
    connection.reset()


BROKEN: dict[str, tuple[Script, str]] = {
    "plain-http": (speak_plainly, "; is this port for https?"),
    "closed": (close_amid_handshake, ""),
    "reset": (reset_amid_handshake, "reset"),
}


@pytest.mark.parametrize("name", tiers(BROKEN, "plain-http", "closed"))
def test_a_broken_handshake_never_sent_the_run(name: str, cli: InProcess) -> None:
    """Promise 6.4."""
    script, says = BROKEN[name]
    with Hostile(script, scheme="https") as server:
        result = cli("--error-format", "json", *RUN, at=server)
    [told] = result.objects
    assert (result.code, told["run_state"]) == (125, "not_sent")
    assert says in told["text"]
    assert "bus-containers delete" not in told["text"]


def test_plain_http_to_a_port_for_https(cli: InProcess, server: Hostile) -> None:
    url = server.url.replace("https:", "http:")
    result = cli("--api-url", url, *RUN, env={"BUS_AI_TOKEN": CANARY})
    assert result.code == 125
    assert "; is this port for https?" in result.error
    assert server.requests == []


def test_a_server_that_wants_a_certificate_of_ours(
    cli: InProcess, certificates: Certificates, ca: dict[str, str | None]
) -> None:
    """TLS 1.3 asks for it when the request is on its way already, and no run is started."""
    context = certificates.context(certificates.good)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates.ca)

    def script(connection: Connection) -> None:
        tls: Any = context.wrap_socket(connection.sock, True, do_handshake_on_connect=False)
        connection.sock = tls
        with pytest.raises(ssl.SSLError):
            tls.do_handshake()
        while os.read(tls.fileno(), 65536):
            pass  # or a reset would overtake the alert

    with Hostile(script, scheme="https") as server:
        result = cli(*RUN, at=server, env=ca)
    wanted = "the server asks for a client certificate, and none can be given"
    check_failure(result, 125, "TLS: ", f"; {wanted}")
    assert not result.spoken.advises
    assert server.connections == 1
