# SPDX-License-Identifier: MIT
"""Random answers, command lines and environments: promises 3.11, 6.1, 6.3, 6.15 and 6.18.

FUZZ_CASES says how many of each, FUZZ_SEED which: a failure names the seed of its case, and
`FUZZ_CASES=1 FUZZ_SEED=that pytest --all tests/test_fuzz.py` makes it again.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hostile import Api, ApiServer
from support import (
    BODIES,
    CANARY,
    DOCUMENTS,
    InProcess,
    Result,
    all_commands,
    api_commands,
    failure_code,
    options_of,
    second_tier,
    spoken,
    variables,
    words,
)

pytestmark = second_tier

CASES = int(os.environ.get("FUZZ_CASES", "1000"))
SEED = int(os.environ.get("FUZZ_SEED", "12"))
SOON = 5.0
"""Seconds within which every case ends."""


def each_case(check: Callable[[random.Random, Api], bool], server: ApiServer) -> None:
    """Check this many cases, each with dice of its own; if few are a success, it says little.

    Each has a URL of its own, too: what was sent just before a deadline may arrive in the next.
    """
    successes = 0
    for seed in range(SEED, SEED + CASES):
        try:
            with server.open() as api:
                successes += check(random.Random(seed), api)
        except BaseException as error:
            raise AssertionError(f"FUZZ_SEED={seed}: {type(error).__name__}: {error}") from error
    assert CASES < 100 or CASES // 10 < successes < CASES


def checked(result: Result) -> Result:
    """What holds for every result, whatever was asked and answered; the token is looked for too."""
    assert result.seconds < SOON, result
    assert b"Traceback" not in result.err + result.out, result
    assert b"internal error" not in result.err, result  # that is any exception but our own
    if result.err.startswith(b"{"):
        for line in result.message.splitlines():
            assert isinstance(json.loads(line)["kind"], str), line
    return result


def container_code(document: Any) -> int:
    """The exit code that a run's document gives; 125 where it gives none."""
    code = document.get("exit_code") if isinstance(document, dict) else None
    if type(code) is not int:
        return 125
    return min(128 - code if code < 0 else code, 255)


# --- answers ----------------------------------------------------------------------------------

STATUSES = [
    *["200 OK"] * 12, "201 Created", "202 Accepted", "204 No Content", "206 Partial", "100 X",
    "199 X", "302 Found", "400 Bad", "401 No", "402 Pay", "404 No", "499 X", "500 Oops", "502 Bad",
    "600 X", "-1 X", "200", "2000 OK", "", f"403 {CANARY}", "200 \xff", "200 " + "O" * 70_000,
]  # fmt: skip
HEADERS = [
    "x", ": y", " folded", "X: \xff\x00\x1b[2J", "Content-Encoding: gzip",
    "Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "Content-Length: 0",
    "Content-Length: -1", "Content-Length: " + "9" * 30,
    "Content-Type: text/html; charset=utf-16", f"Location: http://127.0.0.1/{CANARY}",
    f"X-Echo: Bearer {CANARY}", f"{CANARY}: x", "X: " + "y" * 70_000, "HTTP/1.1 200 OK",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 37, 256, 10**30, 1.5, "", "0", "\ud800", "\x1b[2J\u202e", "a\tb\r\nc",
    [], {}, [0], {"code": 0}, "x" * 5000,
]  # fmt: skip
NOT_JSON = [
    b"", b"null", b"[]", b"{", b"{}{}", b"<html>", b"NaN", b"\xff\xfe{\0}\0", b'{"a":1e999}',
    b'{"a":' + b"[" * 5000, b'{"a":' + b"7" * 9000 + b"}", b'{"":"\0"}',
]  # fmt: skip


def random_document(dice: random.Random, name: str) -> Any:
    """A proper document, of which some fields have a value of another kind, or are missing."""
    document = json.loads(BODIES[name])
    if name == "run":
        document["exit_code"] = dice.choice([0, 0, 37, 1])
    for _ in range(dice.choice([0, 0, 1, 2])):
        field = dice.choice([*document, "error", "message", "x"])
        document[field] = dice.choice(VALUES)
        if dice.random() < 0.2:
            del document[field]
    if dice.random() < 0.1:
        error = {"type": dice.choice(VALUES), "message": dice.choice([*VALUES, CANARY])}
        document = {"error": error}
    return document


class Answer:
    """An answer: its bytes, whether it is whole and proper HTTP, and its document."""

    def __init__(self, dice: random.Random, name: str) -> None:
        self.document = random_document(dice, name)
        self.status = dice.choice(STATUSES)
        if self.status.startswith("20") and "error" in self.document:
            del self.document["error"]  # its text would be printed, the token and all
        self.is_proper = self.status in ("200 OK", "201 Created", "202 Accepted")
        body = json.dumps(self.document).encode()
        if dice.random() < 0.15:
            body, self.is_proper = dice.choice(NOT_JSON), False
        lines = [f"HTTP/1.{dice.choice('0111')} {self.status}"]
        framing = dice.choice(["length", "length", "length", "chunked", "end"])
        if framing == "length":
            lines.append(f"Content-Length: {len(body)}")
        elif framing == "chunked":
            lines.append("Transfer-Encoding: chunked")
            at = dice.randrange(len(body) + 1)
            pieces = [piece for piece in (body[:at], body[at:]) if piece]
            body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
            body += b"0\r\n\r\n"
        if dice.random() < 0.3:
            lines.insert(dice.randrange(1, len(lines) + 1), dice.choice(HEADERS))
            self.is_proper = False  # as far as one can say without being a client
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if dice.random() < 0.1:
            head = b"HTTP/1.1 103 Hints\r\n\r\n" * dice.randrange(1, 4) + head
        self.data = head + body
        self.fault = dice.choice([""] * 6 + ["cut", "damaged"])
        if self.fault:  # half a token is nothing that one could know again
            self.data = self.data.replace(CANARY.encode(), b"x" * len(CANARY))
            self.is_proper = False
        if self.fault == "cut":  # by more than the last chunk, which is empty
            self.data = self.data[: dice.randrange(len(self.data) - 5)]
        elif self.fault:
            at = dice.randrange(len(self.data))
            self.data = self.data[:at] + dice.randbytes(1) + self.data[at + dice.choice([0, 1]) :]


def test_answers(cli: InProcess, api_server: ApiServer) -> None:
    def check(dice: random.Random, api: Api) -> bool:
        name = dice.choice(["run", "run", *api_commands()])
        answer = Answer(dice, name)
        format_ = dice.choice(["json", "json", "text", "tsv"])
        # Where there is no time for a pause, a GET is not sent again either.
        options = dice.choice([[], ["-v"], ["-vv"], ["--error-format", "json"], ["-q"]])
        limit = [] if name == "run" else ["--timeout", "250ms"]
        api.sends(answer.data)
        result = checked(cli(*options, *limit, "-f", format_, *words(name), at=api))
        methods = api.methods()
        assert methods.count("POST") == (name == "run")
        assert len(methods) <= 2
        if "json" not in options and (format_, name) != ("text", "run"):
            spoken(result.err)
        where, failed = (answer.data, result), failure_code(name)
        is_good = answer.is_proper and name == "run" and not answer.document.get("error")
        expected = container_code(answer.document) if is_good else failed
        if is_good:
            assert result.code == expected, where
        # An answer of 204 is whole without a body.
        if answer.fault == "cut" and not answer.status.startswith("204"):
            assert result.code == failed, where
        if result.code == failed:
            assert result.err or expected != failed, where
        else:
            assert b"HTTP/1" in answer.data, where
            shows = "-q" not in options and format_ == "json"
            if shows and name == "run":
                assert result.code == container_code(result.document), where
            if shows and name == "delete":
                assert result.document["deleted"] is True, where
        return result.code == 0

    each_case(check, api_server)


# --- command lines and environments -----------------------------------------------------------

JUNK = [
    "", "-", "--", "--=", "-vqx", "--nosuch=1", "--verbose=2", "--tok", "a b", "a\nb", "\u202e",
    "\udcff", "\ud800", "x" * 5000, "run-1", "..", "a/b", f"--token={CANARY}", "status", "help",
    "run", "--help", "--version",
]  # fmt: skip
TEXTS = [
    "", "0", "-1", "1s", "5ms", "1h", "1e3", "9" * 400, "json", "text", "tsv", "opencli", "always",
    ".", "nosuch/dir", "out", "/dev/null", "-", "\udcff", "\0", "a=b", "\u202e", "x" * 5000,
]  # fmt: skip
SOON_OVER = [text for text in TEXTS if text != "1h"]
# Nothing that would be looked up by name, or that leaves this machine.
URLS = [
    "http://", "127.0.0.1", "ftp://127.0.0.1", "http://127.0.0.1:99999", "http://[::1", "//",
    "http://127.0.0.1/?q", "http://u:p@127.0.0.1", "http://127.0.0.1/a b", "HTTP://127.0.0.1:1/",
    "http://127.0.0.1\n", "http://127.0.0.1/\u00e4",
]  # fmt: skip


@contextmanager
def nothing_leaves() -> Iterator[None]:
    """Refuse every connection and every look-up that is not of a loopback address."""
    active = [True]

    def hook(event: str, args: Any) -> None:
        if not active or event not in ("socket.connect", "socket.getaddrinfo"):
            return
        host = args[1][0] if event == "socket.connect" else args[0]
        host = host.decode() if isinstance(host, bytes) else host
        if not re.fullmatch(r"127\.[0-9.]+|::1", host):
            raise RuntimeError(f"{event}: {host}")

    sys.addaudithook(hook)  # which nothing can remove
    try:
        yield
    finally:
        active.clear()


def random_option(dice: random.Random, command: str, url: str) -> list[str]:
    if dice.random() < 0.2:
        return [dice.choice(JUNK)]
    option = dice.choice(options_of(command))
    name = dice.choice([option.name, *option.aliases])
    if not option.value:
        return [name]
    usual = {
        "--api-url": [url, f"{url}/", *URLS],
        "--token-file": ["token", "token", "nosuch", CANARY, *TEXTS],
        "--timeout": ["5s", "0", "300ms", *SOON_OVER],
        "--wait": ["5s", "0", "300ms", *SOON_OVER],
    }
    value = dice.choice(usual.get(option.name, [*option.value.split("|"), *TEXTS]))
    if dice.random() < 0.7:
        return [name, value]
    return [f"{name}={value}" if name.startswith("--") else f"{name}{value}"]


def random_environment(dice: random.Random, url: str) -> dict[str, str | None]:
    environ: dict[str, str | None] = {"BUS_AI_TOKEN": CANARY}
    names = [one["name"] for one in variables()]
    for name in dice.sample([*names, "TERM", "LC_ALL", "COLUMNS"], dice.choice([0, 0, 1, 3])):
        value = dice.choice(["", CANARY, *TEXTS, *URLS]).replace("\0", "")
        environ[name] = None if dice.random() < 0.1 else value
    if environ.get("BUS_AI_API_URL", "") not in URLS:
        environ["BUS_AI_API_URL"] = url
    environ["BUS_API_BASE_URL"] = url  # so that the default is never asked
    return environ


def test_command_lines(cli: InProcess, api_server: ApiServer) -> None:
    folder = cli.folder
    assert folder is not None

    def check(dice: random.Random, api: Api) -> bool:
        command = dice.choice(["run", "run", *all_commands()])
        code = dice.choice([0, 0, 37]) if command == "run" else 0
        if code:
            api.answers({**DOCUMENTS["run"], "exit_code": code})
        for path in folder.parent.glob("**/out"):
            path.unlink()
        (folder / "token").write_text(CANARY)
        line = [command, *words(command)[1:]]
        for _ in range(dice.choice([0, 1, 1, 2, 4])):
            at = dice.choice([0, line.index(command) + 1])
            line[at:at] = random_option(dice, command, api.url)
        if dice.random() < 0.1:
            dice.shuffle(line)
        environ = random_environment(dice, api.url)
        given = dice.choice([b"", CANARY.encode(), b"\xff\xfe", b"two\nlines"])
        result = checked(cli(*line, env=environ, input=given))
        methods = api.methods()
        where = (line, environ, result)
        assert methods.count("POST") <= 1, where
        assert result.code in (0, 1, 2, 37, 125), where
        assert result.code != 2 or methods == [], where
        assert result.code in (0, 37) or result.err, where
        if methods == ["POST"] or result.code == 37:
            assert methods == ["POST"] and result.code in (code, 125), where
        return result.code == 0

    with nothing_leaves():
        each_case(check, api_server)
