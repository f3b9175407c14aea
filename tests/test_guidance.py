# SPDX-License-Identifier: MIT
"""What a denial, a platform that is coming up, and an error tell their reader (CONTRACT section 3).

A 401 is explained from the token's own claims, a 402 as a person says it, a wait by its last
reason. For programs every line of standard error is one JSON object.
"""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import Program, Result
from hostile import (
    LIMIT,
    Hostile,
    NameServer,
    Script,
    answer,
    html,
    message,
    raw,
    refused_port,
    reset,
    silent,
    spoken,
    why_no_name_server,
    with_files,
)
from local_platform import SCOPE, Platform

Env = dict[str, "str | None"]
Words = tuple[str, ...]

RUN = ("run", "--", "true")
STATUS = b'{"items":[{"id":"runner","state":"ready"}]}'
STARTING = b'{"items":[{"id":"runner","state":"starting"}]}'
DOCUMENT = b'{"run_id":"run-1","exit_code":0,"stdout":"OK","stderr":""}'
BUSY = answer(b'{"error":{"type":"unavailable","message":"warming up"}}', "503 Unavailable")
NEW_TOKEN = f'bus auth token --scope "{SCOPE}"'


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


def to(server: Hostile | Platform, token: str, **more: str | None) -> Env:
    return {"BUS_AI_API_URL": server.url, "BUS_AI_TOKEN": token, **more}


def the_error(result: Result) -> str:
    """The one line of an error."""
    [line] = spoken(result.err).errors
    return line


# --- 401, explained ---------------------------------------------------------------------------


class Denied(NamedTuple):
    """The claims of a token that is not good for a command, and what has to be said of it."""

    id: str
    claims: dict[str, Any]
    said: Words
    words: Words = ("status",)


DENIED = [
    Denied("expired", {"expires_in": -3 * 3600.0 - 5}, ("expired", "3 h ago")),
    Denied("expired-days", {"expires_in": -5 * 86400.0 - 5}, ("expired", "5 d ago")),
    Denied("expired-now", {"expires_in": -4.0}, ("expired", " s ago")),
    Denied("not-yet", {"not_before": 5 * 3600.0 + 5}, ("not valid", "5 h")),
    Denied("no-run", {"scope": "container:read billing:read"},
           ("lacks", "container:run", "container:read billing:read"), RUN),
    Denied("no-read", {"scope": "container:run"}, ("lacks", "container:read", "container:run")),
    Denied("no-delete", {"scope": "container:read"},
           ("lacks", "container:delete"), ("delete", "run-1")),
    Denied("no-scope", {"scope": None}, ("lacks", "container:read", "none")),
    Denied("scope-is-no-prefix", {"scope": "container:reader"}, ("lacks", "container:reader")),
    Denied("audience", {"audience": "other.example/api"}, ("other.example/api", "ai.hg.fi/api")),
    Denied("audiences", {"audience": ["a.example", "b.example"]},
           ("a.example", "b.example", "ai.hg.fi/api")),
    Denied("no-audience", {"audience": None}, ("audience", "ai.hg.fi/api")),
    Denied("all-at-once", {"audience": "x.example", "scope": "y", "expires_in": -7205.0},
           ("x.example", "lacks", "expired", "2 h ago")),
]  # fmt: skip
PRIVATE = {"email": "someone@private.example", "name": "Private Person", "jti": "private-id"}


@pytest.mark.parametrize("case", DENIED, ids=lambda case: case.id)
def test_401_says_what_is_wrong_with_the_token(
    program: Program, platform: Platform, case: Denied
) -> None:
    token = platform.token(account="private-subject", **{**PRIVATE, **case.claims})
    asked = len(platform.requests)
    result = program(*case.words, env=to(platform, token))
    assert (result.code, result.out) == (125 if case.words == RUN else 1, b"")
    assert len(platform.requests) == asked + 1  # the server decides, not the claims
    error = the_error(result)
    assert "401 invalid_auth" in error
    for fragment in case.said:
        assert fragment in error
    assert error.count("bus auth token") == error.count(NEW_TOKEN) == 1
    assert "private" not in error.lower()
    assert "executing" not in error


def test_401_of_a_good_token_blames_nothing(program: Program, platform: Platform) -> None:
    with Hostile(answer(b'{"error":{"type":"invalid_auth"}}', "401 Unauthorized")) as server:
        error = the_error(program("status", env=to(server, platform.token())))
    assert error.count(NEW_TOKEN) == 1
    for blame in ("lacks", "expired", "not valid", "is for", "no JWT"):
        assert blame not in error


def jwt(payload: bytes | object) -> str:
    """A token of three parts whose middle says this."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return f"e30.{base64.urlsafe_b64encode(data).decode().rstrip('=')}.c2ln"


GARBAGE = {
    "opaque-key": "sk-0123456789abcdef",
    "two-dots": "a.b.c",
    "three-dots": "a.b.c.d",
    "only-dots": "..",
    "no-base64": "e30.@@@@.c2ln",
    "no-utf-8": jwt(b"\xff\xfe\x00"),
    "cut-json": jwt(b'{"exp": 1'),
    "list": jwt([1, 2]),
    "string": jwt("claims"),
    "null": jwt(None),
    "number": jwt(7),
    "empty": jwt({}),
    "strings": jwt({"exp": "1", "nbf": "1", "iat": "x", "scope": "", "aud": ""}),
    "lists": jwt({"exp": [1], "nbf": [], "scope": ["container:read"], "aud": [["x"], {}, None]}),
    "objects": jwt({"exp": {}, "nbf": {"a": 1}, "scope": {"a": 1}, "aud": {"a": 1}}),
    "numbers": jwt({"scope": 7, "aud": 7, "sub": 7}),
    "booleans": jwt({"exp": True, "nbf": False, "scope": True, "aud": True}),
    "huge-integers": jwt({"exp": 10**300, "nbf": 10**300, "iat": -(10**300)}),
    "huger-integers": jwt(b'{"exp":1%s}' % (b"0" * 6000)),
    "infinite": jwt(b'{"exp":1e999,"nbf":-1e999}'),
    "not-a-number": jwt(b'{"exp":NaN,"nbf":NaN,"iat":Infinity}'),
    "negative": jwt({"exp": -1, "nbf": -5}),
    "milliseconds": jwt({"exp": 1.7e12, "nbf": 1.7e12}),
    "nested": jwt(b'{"aud":' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    "long": jwt({"aud": "a" * 20_000, "scope": "b " * 10_000}),
    "escapes": jwt({"aud": "\x1b]0;x\x07\x9b2J", "scope": "a\x1b[2J\x7f\u2028"}),
    "surrogates": jwt({"aud": "\ud800", "scope": "\udfff"}),
}


@pytest.mark.parametrize("token", GARBAGE.values(), ids=GARBAGE)
def test_odd_claims_are_advice_at_most(program: Program, token: str) -> None:
    denial = answer(b'{"error":{"type":"invalid_auth"}}', "401 Unauthorized")
    with Hostile(denial, answer(STATUS)) as server:
        denied = program("status", env=to(server, token))
        assert (denied.code, denied.out, len(server.requests)) == (1, b"", 1)
        error = the_error(denied)
        assert error.count("bus auth token") == error.count(NEW_TOKEN) == 1
        assert len(error) < 2000
        allowed = program("-v", "status", env=to(server, token))
    assert (allowed.code, json.loads(allowed.out), len(server.requests)) == (
        0, json.loads(STATUS), 2
    )  # fmt: skip
    assert "bus auth token" not in spoken(allowed.err).text


@pytest.mark.parametrize("name", ["opaque-key", "two-dots", "no-base64", "list"])
def test_opaque_key_is_told_to_be_no_jwt(program: Program, name: str) -> None:
    with Hostile(answer(b"{}", "401 Unauthorized")) as server:
        assert "JWT" in the_error(program("status", env=to(server, GARBAGE[name])))


# --- -v and --trace -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["--api-url", "BUS_AI_API_URL", "BUS_API_BASE_URL"])
def test_verbose_names_the_source_of_the_url(
    program: Program, platform: Platform, source: str
) -> None:
    env: Env = {"BUS_AI_TOKEN": platform.token()}
    options: Words = ()
    if source == "--api-url":
        options = (source, platform.url)
    else:
        env[source] = platform.url
    result = program("-v", *options, "status", env=env)
    assert result.code == 0
    [line] = [line for line in result.message.splitlines() if source in line]
    assert platform.url in line


@pytest.mark.parametrize("source", ["file", "stdin", "BUS_AI_TOKEN", "BUS_API_TOKEN", "config"])
def test_verbose_names_the_source_of_the_token_and_its_life(
    program: Program, platform: Platform, tmp_path: Path, source: str
) -> None:
    token = platform.token(expires_in=5 * 3600.0 + 9)
    path = tmp_path / "config" / "auth" / "api-token"
    path.parent.mkdir(parents=True)
    path.write_text(token)
    env: Env = {"BUS_AI_API_URL": platform.url, "BUS_CONFIG_DIR": None}
    options: Words = {"file": ("--token-file", str(path)), "stdin": ("--token-file", "-")}.get(
        source, ()
    )
    if source == "config":
        env["BUS_CONFIG_DIR"] = str(tmp_path / "config")
    elif not options:
        env[source] = token
    result = program("-v", *options, "status", env=env, input=token.encode())
    assert result.code == 0
    name = {"file": str(path), "config": str(path), "stdin": "standard input"}.get(source, source)
    [line] = [line for line in result.message.splitlines() if name in line]
    assert re.search(r"expires in 5(\.00)? h", line)
    assert token not in result.message


def test_verbose_warns_of_a_token_before_the_request(program: Program, platform: Platform) -> None:
    token = platform.token(expires_in=-7205.0, scope="container:read")
    result = program("-v", *RUN, env=to(platform, token))
    lines = result.message.splitlines()
    [told] = [n for n, line in enumerate(lines) if "token" in line and "2 h ago" in line][:1]
    [request] = [n for n, line in enumerate(lines) if "POST" in line and "bytes" in line]
    assert told < request


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_verbose_names_the_proxy_without_its_login(
    program: Program, canary: str, variable: str
) -> None:
    with Hostile(answer(STATUS)) as proxy:
        env: Env = {
            "BUS_AI_API_URL": "http://platform.test",
            "BUS_AI_TOKEN": canary,
            variable: f"http://someone:pa55word@127.0.0.1:{proxy.port}",
        }
        result = program("-vv", "status", env=env)
    assert (result.code, proxy.methods()) == (0, ["GET"])
    [line] = [line for line in result.message.splitlines() if variable in line]
    assert f"127.0.0.1:{proxy.port}" in line
    secret = base64.b64encode(b"someone:pa55word").decode()
    assert secret.encode() in proxy.requests[0]
    for word in ("pa55word", secret, canary):
        assert word not in result.message


def request_lines(result: Result) -> list[str]:
    """The lines of -v about an answer: a method, a path and a number of bytes."""
    lines = result.message.splitlines()
    return [line for line in lines if re.search(r"(GET|POST|DELETE) .* bytes", line)]


def test_verbose_has_a_line_a_request(program: Program, platform: Platform) -> None:
    body = STATUS + b" " * 1234
    with Hostile(answer(b"{}", "404 Not Found"), answer(body)) as server:
        result = program("-v", "runs", env=to(server, platform.token()))
    first, second = request_lines(result)
    for fragment in ("GET", "/api/v1/containers/runs", "404", "2 bytes"):
        assert fragment in first
    for fragment in ("GET", "/api/v1/containers/status", "200", f"{len(body):,} bytes"):
        assert fragment in second
    assert re.search(r"\b[0-9.]+ m?s\b", first)
    assert re.search(r"\b[0-9.]+ m?s\b", second)


def test_verbose_tells_retries(program: Program, platform: Platform) -> None:
    with Hostile(BUSY, reset(), answer(STATUS)) as server:
        result = program("-v", "status", env=to(server, platform.token()))
    assert (result.code, len(server.requests)) == (0, 3)
    again = [line for line in result.message.splitlines() if "again" in line or "retr" in line]
    assert len(again) >= 2
    assert "503" in again[0]
    assert "200" in request_lines(result)[-1]


@pytest.mark.parametrize(
    "options", [("-vv",), ("-v", "-v"), ("--trace",), ("--trace", "-v")], ids=" ".join
)
def test_trace_shows_the_headers_of_both_sides(
    program: Program, canary: str, options: Words
) -> None:
    script = answer(DOCUMENT, "200 OK", "X-Deployment: seven", f"X-Echo: {canary}")
    with Hostile(script) as server:
        traced = program(*options, *RUN, env=to(server, canary))
        plain = program("-v", *RUN, env=to(server, canary))
    text = traced.message
    for pattern in (
        r"(?i)user-agent: bus-containers/[0-9.]+",
        r"(?i)content-type: application/json",
        r"(?i)authorization: .*redacted",
        r"(?i)x-deployment: seven",
        r"(?i)x-echo: .*redacted",
        r"POST .*/api/v1/containers/runs",
        r"200 OK",
    ):
        assert re.search(pattern, text), pattern
    assert canary not in text
    assert (plain.code, traced.out) == (0, plain.out)
    assert "X-Deployment" not in plain.message
    assert "user-agent" not in plain.message.lower()


def test_trace_shows_what_was_really_sent(program: Program, canary: str) -> None:
    with Hostile(answer(b'{"run_id":"r","exit_code":0}')) as server:
        result = program("--trace", *RUN, env=to(server, canary))
    head = server.requests[0].partition(b"\r\n\r\n")[0].decode().splitlines()
    shown = [line[2:] for line in re.findall("(?m)^bus-containers: (> .*)$", result.message)]
    assert shown == [re.sub("(?i)^(authorization): .*", r"\1: [redacted]", line) for line in head]
    assert any(line.startswith("Host: ") for line in shown)


def test_verbose_tells_the_url_where_there_is_no_token(program: Program) -> None:
    result = program("-v", "--api-url", "http://127.0.0.1:9", "status")
    assert result.code == 1
    assert "API URL http://127.0.0.1:9 from --api-url" in result.message


def test_wait_gives_no_advice_about_other_limits(program: Program, canary: str) -> None:
    with Hostile(silent()) as server:
        result = program("status", "--wait", "700ms", env=to(server, canary))
    assert result.code == 1
    assert "the platform is not ready after 0.7 s" in result.message
    assert "--timeout" not in result.message


def test_without_verbose_there_is_nothing_to_read(program: Program, platform: Platform) -> None:
    assert program("status", env=to(platform, platform.token())).err == b""


# --- 402, explained ---------------------------------------------------------------------------


def test_402_as_a_person_says_it(program: Program) -> None:
    with Platform(billing="quota") as platform:
        result = program(*RUN, env=to(platform, platform.token()))
    assert (result.code, result.out) == (125, b"")
    error = the_error(result)
    for fragment in (
        "POST", "/api/v1/containers/runs", "402 quota_exceeded",
        "the container runtime of this month is used up",
        "3,600 of 3,600 s of container runtime used this month",
        "local-large", "upgrade_plan", "bus billing setup",
    ):  # fmt: skip
        assert fragment in error
    assert "executing" not in error


def test_402_without_billing(program: Program) -> None:
    with Platform(billing="required") as platform:
        error = the_error(program(*RUN, env=to(platform, platform.token())))
    for fragment in ("402 billing_required", "not set up", "setup_billing", "bus billing setup"):
        assert fragment in error


def usage(**changes: object) -> dict[str, object]:
    """The stand-in's usage, with changes; what is None is left out."""
    whole: dict[str, object] = {
        "feature": "container:run",
        "meter_event_name": "bus_container_runtime_seconds",
        "window": "month",
        "used": 3600,
        "limit": 3600,
        "upgrade_plan_id": "plan-x",
        **changes,
    }
    return {name: value for name, value in whole.items() if value is not None}


ODD_USAGE: dict[str, tuple[object, str]] = {
    "day": (usage(window="day"), "3,600 of 3,600 s of container runtime used today"),
    "over": (usage(used=3_700_000), "3,700,000 of 3,600 s of container runtime"),
    "fraction": (usage(used=1.5), "1.5 of 3,600 s of container runtime used this month"),
    "count": (usage(meter_event_name="bus_container_runs", used=5, limit=5), "5 of 5 "),
    "no-meter": (usage(meter_event_name=None), "3,600 of 3,600 "),
    "no-names": (usage(meter_event_name=None, feature=None), "3,600 of 3,600 "),
    "no-window": (usage(window=None), "3,600 of 3,600 s of container runtime used"),
    "plan-of-usage": (usage(), "plan-x"),
    "no-plan": (usage(upgrade_plan_id=None), "3,600 of 3,600 s"),
    "no-numbers": (usage(used=None, limit=None), ""),
    "string-numbers": (usage(used="3600", limit="x"), ""),
    "null-numbers": ({"used": None, "limit": None}, ""),
    "booleans": (usage(used=True, limit=False), ""),
    "negative": (usage(used=-5, limit=-1), ""),
    "huge": (usage(used=10**300, limit=1e300), ""),
    "nested": (usage(used=[1], limit={"a": 1}, window=[], meter_event_name={}), ""),
    "meter-is-seconds": (usage(meter_event_name="seconds"), "3,600 of 3,600 s"),
    "meter-is-odd": (usage(meter_event_name="__", window="__"), "3,600 of 3,600 "),
    "meter-is-blank": (usage(meter_event_name=" ", feature="\t"), "3,600 of 3,600 "),
    "control-characters": (usage(meter_event_name="a\x1b[2J", window="\x9b\x07"), "3,600 of"),
    "surrogates": (usage(meter_event_name="\ud800", window="\udfff"), "3,600 of"),
    "null": (None, ""),
    "list": ([usage()], ""),
    "string": ("3600", ""),
    "number": (3600, ""),
    "empty": ({}, ""),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "said"), ODD_USAGE.values(), ids=ODD_USAGE)
def test_402_of_any_shape(program: Program, canary: str, shape: object, said: str) -> None:
    error = {"type": "quota_exceeded", "message": "used up", "usage": shape}
    with Hostile(answer(json.dumps({"error": error}).encode(), "402 Payment Required")) as server:
        result = program(*RUN, env=to(server, canary))
    assert (result.code, result.out, len(server.requests)) == (125, b"", 1)
    line = the_error(result)
    assert "402 quota_exceeded" in line
    assert "used up" in line
    assert said in line
    assert "None" not in line
    assert len(line) < 2000


# --- status --wait ------------------------------------------------------------------------------

UNAVAILABLE = answer(b"{}", "503 Service Unavailable")


class Rising(NamedTuple):
    """What a platform answers until, at last, it is up."""

    id: str
    scripts: list[Script]


RISING = [
    Rising("503", [UNAVAILABLE] * 5),
    Rising("502-504-html", [html("502 Bad Gateway", "502"), html("504 Gateway", "504")] * 2),
    Rising("starting", [answer(STARTING)] * 3),
    Rising("starting-other-shape", [answer(b'{"status":{"state":"starting"}}')] * 2),
    Rising("one-of-two-starting", [answer(
        b'{"items":[{"id":"a","state":"ready"},{"id":"b","state":"starting"}]}')] * 2),
    Rising("both", [UNAVAILABLE, answer(STARTING), UNAVAILABLE, UNAVAILABLE]),
    Rising("ready-at-once", []),
]  # fmt: skip


@pytest.mark.parametrize("case", RISING, ids=lambda case: case.id)
def test_wait_ends_with_the_first_usable_answer(
    program: Program, canary: str, case: Rising
) -> None:
    with Hostile(*case.scripts, answer(STATUS)) as server:
        result = program("status", "--wait", "20s", env=to(server, canary))
    assert (result.code, result.err) == (0, b"")
    assert json.loads(result.out) == json.loads(STATUS)
    assert len(server.requests) == len(case.scripts) + 1


def test_wait_for_a_port_that_opens(program: Program, canary: str) -> None:
    with Hostile(answer(STATUS), listening=False) as server, program.start(
        "-v", "status", "--wait", "20s", env=to(server, canary)
    ) as process:
        assert process.stderr
        for line in process.stderr:
            if b"refused" in line:
                break
        server.listen()
        out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, json.loads(out)) == (0, json.loads(STATUS))


def test_wait_for_a_token_file(program: Program, platform: Platform, tmp_path: Path) -> None:
    path = tmp_path / "config" / "auth" / "api-token"
    env: Env = {"BUS_AI_API_URL": platform.url, "BUS_CONFIG_DIR": str(tmp_path / "config")}
    with program.start("status", "--wait", "20s", env=env) as process:
        # Three times what a start takes: it looked, and did not give up.
        quick = program("status", env=env)
        assert quick.code == 1
        assert "no token" in quick.message
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3 * quick.seconds)
        path.parent.mkdir(parents=True)
        fresh = path.with_name("fresh")
        fresh.write_text(platform.token())
        fresh.rename(path)
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out)["items"][0]["state"] == "ready"


def test_wait_for_a_name(program: Program, canary: str, tmp_path: Path) -> None:
    if why_no_name_server():
        pytest.skip(why_no_name_server())
    with Hostile(answer(STATUS)) as server, NameServer(
        lambda count: "127.0.0.1" if count >= 4 else ""
    ) as names:
        files = names.files(tmp_path)
        resolving = Program(with_files(program.command, files), program.home)
        env = to(server, canary, BUS_AI_API_URL=f"http://platform.test:{server.port}")
        result = resolving("status", "--wait", "20s", env=env)
    assert (result.code, result.err) == (0, b"")
    assert json.loads(result.out) == json.loads(STATUS)
    assert names.queries >= 5


class Never(NamedTuple):
    """A platform that does not come up, and the reason that has to be told."""

    id: str
    script: Script | None
    reason: str
    token: bool = True


NEVER = [
    Never("starting", answer(STARTING), "starting"),
    Never("503", BUSY, "503"),
    Never("its-message", BUSY, "warming up"),
    Never("refused", None, "refused"),
    Never("no-token", answer(STATUS), "no token", token=False),
    Never("silent", silent(), "not ready"),
]


@pytest.mark.parametrize("case", NEVER, ids=lambda case: case.id)
def test_wait_ends_at_its_deadline_with_the_last_reason(
    program: Program, canary: str, case: Never
) -> None:
    with Hostile(case.script or silent()) as server, refused_port() as port:
        env = to(server, canary)
        if case.script is None:
            env["BUS_AI_API_URL"] = f"http://127.0.0.1:{port}"
        if not case.token:
            env["BUS_AI_TOKEN"] = None
        result = program("status", "--wait", "900ms", env=env)
    assert (result.code, result.out) == (1, b"")
    error = the_error(result)
    # The end may also come amid a try, which then is the last reason.
    assert case.reason in error or "no whole answer" in error
    assert result.seconds < 6
    assert case.token or not server.requests


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, "invalid_auth"), (402, "billing_required"), (403, "forbidden")],
    ids=["401", "402", "403"],
)
def test_wait_does_not_wait_where_it_is_in_vain(
    program: Program, canary: str, status: int, kind: str
) -> None:
    denial = answer(b'{"error":{"type":"%s"}}' % kind.encode(), f"{status} No")
    with Hostile(UNAVAILABLE, denial) as server:
        result = program("status", "--wait", "60s", env=to(server, canary))
    assert (result.code, result.out, len(server.requests)) == (1, b"", 2)
    assert f"{status} {kind}" in the_error(result)
    assert result.seconds < 20


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_wait_ends_with_a_signal(
    program: Program, canary: str, number: signal.Signals, code: int
) -> None:
    with refused_port() as port:
        env: Env = {"BUS_AI_API_URL": f"http://127.0.0.1:{port}", "BUS_AI_TOKEN": canary}
        with program.start("-v", "status", "--wait", "60s", env=env) as process:
            assert process.stderr
            for line in process.stderr:
                if b"refused" in line:
                    break
            process.send_signal(number)
            out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (code, b"")


@pytest.mark.parametrize(
    "words",
    [
        ("status", "--wait"),
        ("status", "--wait", "30"),
        ("status", "--wait", "-1s"),
        ("status", "--wait", "soon"),
        ("run", "--wait", "1s", "--", "true"),
        ("runs", "--wait", "1s"),
        ("delete", "--wait", "1s", "run-1"),
    ],
    ids=" ".join,
)
def test_wait_wants_a_duration_and_status(
    program: Program, platform: Platform, words: Words
) -> None:
    asked = len(platform.requests)
    result = program(*words, env=to(platform, platform.token()))
    assert (result.code, result.out, len(platform.requests)) == (2, b"", asked)
    assert "--wait" in result.message


# --- --error-format json ------------------------------------------------------------------------

FIELDS = {"status", "type", "message", "action", "command", "document", "retryable"}


def objects(result: Result | bytes) -> list[dict[str, Any]]:
    """The objects on standard error, one a line, each checked for its shape."""
    err = result if isinstance(result, bytes) else result.err
    found = []
    assert err == b"" or err.endswith(b"\n")
    for line in err.decode("utf-8").splitlines():
        one = json.loads(line)
        assert isinstance(one, dict), line
        assert isinstance(one["kind"], str)
        assert one["message"]
        assert isinstance(one["message"], str)
        found.append(one)
    return found


def check_error(one: dict[str, Any], **expected: object) -> None:
    assert one.keys() >= FIELDS
    assert isinstance(one["retryable"], bool)
    for name, value in expected.items():
        assert one[name] == value, name


class Told(NamedTuple):
    """A failure, the exit code, and what its object has to say; a run's has a run_state."""

    id: str
    words: Words
    script: Script | None
    code: int
    expected: dict[str, Any]
    env: Env = {}


API = {"kind": "api", "action": None, "command": None}
QUOTA = {
    "error": {
        "type": "quota_exceeded",
        "message": "used up",
        "action": "upgrade_plan",
        "command": "bus billing setup",
        "recommended_plan": "large",
        "usage": {"used": 1, "limit": 1},
    },
    "request_id": "\u00e9",
}
SAID = {name: QUOTA["error"][name] for name in ("type", "message", "action", "command")}  # type: ignore[index]
REFUSED = {"kind": "transport", "status": None, "type": None, "document": None}
HTML = raw(message(b"<html><title>Login</title></html>"))

TOLD = [
    Told("usage-option", ("--bogus", *RUN), answer(), 2,
         {"kind": "usage", "run_state": "not_sent", "retryable": False, "status": None}),
    Told("usage-no-command", (), answer(), 2, {"kind": "usage", "retryable": False}),
    Told("usage-command", ("bogus",), answer(), 2, {"kind": "usage", "retryable": False}),
    Told("usage-run", ("run",), answer(), 2, {"kind": "usage", "run_state": "not_sent"}),
    Told("usage-value", ("--timeout", "30", "status"), answer(), 2, {"kind": "usage"}),
    Told("usage-url", ("--api-url", "ftp://x", "status"), answer(), 2, {"kind": "usage"}),
    Told("config", ("status",), answer(), 1,
         {"kind": "config", "status": None, "document": None}, {"BUS_AI_TOKEN": None}),
    Told("config-run", RUN, answer(), 125,
         {"kind": "config", "run_state": "not_sent"}, {"BUS_AI_TOKEN": None}),
    Told("config-bad-token", RUN, answer(), 125,
         {"kind": "config", "run_state": "not_sent", "retryable": False},
         {"BUS_AI_TOKEN": "two words"}),
    Told("config-chdir", ("-C", "/no/such", *RUN), answer(), 125,
         {"kind": "config", "run_state": "not_sent", "retryable": False}),
    Told("transport", ("status",), None, 1, {**REFUSED, "retryable": True}),
    Told("transport-run", RUN, None, 125,
         {**REFUSED, "run_state": "not_sent", "retryable": True}),
    Told("transport-lost", RUN, reset(), 125,
         {**REFUSED, "run_state": "unknown", "retryable": False}),
    Told("deadline", ("--timeout", "300ms", "status"), silent(), 1,
         {"kind": "deadline", "retryable": True}),
    Told("deadline-run", ("--timeout", "300ms", *RUN), silent(), 125,
         {"kind": "deadline", "run_state": "unknown", "retryable": False}),
    Told("deadline-wait", ("status", "--wait", "300ms"), answer(STARTING), 1,
         {"kind": "deadline"}),
    Told("protocol", ("status",), HTML, 1, {"kind": "protocol", "retryable": False}),
    Told("protocol-run", RUN, HTML, 125,
         {"kind": "protocol", "run_state": "unknown", "retryable": False}),
    Told("protocol-no-code", RUN, answer(b'{"exit_code":null}'), 125,
         {"kind": "protocol", "run_state": "finished", "retryable": False}),
    Told("api-402", RUN, answer(json.dumps(QUOTA).encode(), "402 Payment Required"), 125,
         {"kind": "api", "status": 402, **SAID, "document": QUOTA, "run_state": "refused",
          "retryable": False}),
    Told("api-401", ("status",), answer(b'{"error":{"type":"invalid_auth"}}', "401 No"), 1,
         {**API, "status": 401, "type": "invalid_auth", "retryable": False}),
    Told("api-503", ("status",), BUSY, 1,
         {**API, "status": 503, "type": "unavailable", "message": "warming up",
          "retryable": True}),
    Told("api-503-run", RUN, BUSY, 125,
         {**API, "status": 503, "run_state": "unknown", "retryable": False}),
    Told("api-html", RUN, html("502 Bad Gateway", "502 Bad Gateway"), 125,
         {**API, "status": 502, "type": None, "document": None, "run_state": "unknown"}),
    Told("api-redirect", RUN, raw(message(b"", "302 Found", "Location: http://x.test/")), 125,
         {**API, "status": 302, "run_state": "refused", "retryable": False}),
    Told("output", ("-o", "/no/such/file", *RUN), answer(), 125,
         {"kind": "output", "run_state": "not_sent", "retryable": False}),
    Told("output-full", ("-o", "/dev/full", *RUN), answer(DOCUMENT), 125,
         {"kind": "output", "run_state": "finished", "retryable": False}),
    Told("output-runs", ("-o", "/dev/full", "runs"), answer(STATUS), 1,
         {"kind": "output", "retryable": False}),
]  # fmt: skip


@pytest.mark.parametrize("case", TOLD, ids=lambda case: case.id)
def test_error_as_an_object(program: Program, canary: str, case: Told) -> None:
    with Hostile(case.script or silent()) as server, refused_port() as port:
        env = to(server, canary, **case.env)
        if case.script is None:
            env["BUS_AI_API_URL"] = f"http://127.0.0.1:{port}"
        result = program("--error-format", "json", *case.words, env=env)
    assert result.code == case.code
    [one] = objects(result)
    check_error(one, **case.expected)
    run = RUN[0] in case.words
    assert ("run_state" in one) is run
    assert canary not in result.message


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_interruption_as_an_object(
    program: Program, canary: str, number: signal.Signals, code: int
) -> None:
    with Hostile(silent()) as server, program.start(
        "--error-format", "json", *RUN, env=to(server, canary)
    ) as process:
        assert server.reached.wait(LIMIT)
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (code, b"")
    [one] = objects(err)
    check_error(one, kind="interrupted", run_state="unknown", retryable=False)


@pytest.mark.parametrize(
    "words",
    [
        ("--error-format", "json", "--bogus", "status"),
        ("--error-format=json", "status", "--bogus"),
        ("status", "--bogus", "--error-format", "json"),
        ("status", "--bogus", "--error-format=json"),
        ("--error-format", "json"),
        ("--error-format", "json", "run", "--image"),
    ],
    ids=" ".join,
)
def test_usage_error_as_an_object_wherever_the_option_stands(
    program: Program, words: Words
) -> None:
    result = program(*words)
    assert (result.code, result.out) == (2, b"")
    [one] = objects(result)
    check_error(one, kind="usage", retryable=False)


@pytest.mark.parametrize(
    "words",
    [
        ("--error-format", "text", "--bogus", "status"),
        ("--error-format", "xml", "status"),
        ("--error-format",),
        ("run", "echo", "--error-format", "json"),
        ("run", "--", "--error-format=json"),
    ],
    ids=" ".join,
)
def test_error_as_text(program: Program, words: Words) -> None:
    result = program(*words)
    assert result.code in (2, 125)
    assert result.message.startswith("bus-containers: ")


def test_the_last_error_format_counts(program: Program) -> None:
    text = program("--error-format", "json", "--error-format", "text", "nonsense")
    assert text.message.startswith("bus-containers: ")
    [error] = objects(program("--error-format", "text", "--error-format", "json", "nonsense"))
    assert error["kind"] == "usage"


def test_an_argument_that_is_not_utf_8_as_an_object(program: Program) -> None:
    result = program("--error-format", "json", "run", "--", b"\xff")
    [error] = objects(result)
    assert (result.code, error["kind"], error["run_state"]) == (2, "usage", "not_sent")
    assert "argument 5" in error["text"]


def test_warnings_as_objects(program: Program, canary: str) -> None:
    document = DOCUMENT.replace(b"OK", b"\xff")
    with Hostile(answer(document)) as proxy:
        env: Env = {
            "BUS_AI_API_URL": "http://platform.example",
            "BUS_AI_TOKEN": canary,
            "HTTP_PROXY": proxy.url,
        }
        words = ("--timeout", "9s", "run", "--timeout-seconds", "9", "--", "true")
        result = program("--error-format", "json", *words, env=env)
    assert result.code == 0
    told = objects(result)
    assert [one["kind"] for one in told] == ["warning"] * 3
    text = "\n".join(one["message"] for one in told)
    for fragment in ("http://platform.example", "--timeout-seconds", "U+FFFD"):
        assert fragment in text


def test_verbose_and_trace_as_objects(program: Program, canary: str) -> None:
    with Hostile(BUSY, answer(STATUS)) as server:
        result = program("--error-format", "json", "-vv", "status", env=to(server, canary))
    assert result.code == 0
    told = objects(result)
    assert len(told) > 5
    assert not {one["kind"] for one in told} & {"warning", "api", "transport"}


def test_one_object_a_failed_delete(program: Program, canary: str) -> None:
    scripts = [
        answer(b'{"error":{"type":"not_found","message":"no a"}}', "404 Not Found"),
        answer(b'{"deleted":true,"run_id":"b"}'),
        answer(b'{"error":{"type":"forbidden","message":"no c"}}', "403 Forbidden"),
    ]
    with Hostile(*scripts) as server:
        words = ("--error-format", "json", "delete", "a", "b", "c")
        result = program(*words, env=to(server, canary))
    assert (result.code, len(server.requests)) == (1, 3)
    assert json.loads(result.out) == [{"deleted": True, "run_id": "b"}]
    first, second = objects(result)
    check_error(first, kind="api", status=404, type="not_found", message="no a")
    check_error(second, kind="api", status=403, type="forbidden", message="no c")


# --- timeouts that agree ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeout", "seconds", "warned"),
    [
        ("10s", "10", True),
        ("9s", "10", True),
        ("1m30s", "90", True),
        ("9.999s", "10", True),
        ("10.5s", "10", False),
        ("11s", "10", False),
        ("1h", "10", False),
        ("0", "10", False),
        ("10s", "0", False),
        ("10s", None, False),
        (None, "10", False),
        (None, "3600", False),
    ],
)
def test_timeouts_that_disagree(
    program: Program, canary: str, timeout: str | None, seconds: str | None, warned: bool
) -> None:
    options = ["--timeout", timeout] if timeout else []
    options += ["--timeout-seconds", seconds] if seconds else []
    with Hostile(answer(DOCUMENT)) as server:
        result = program("run", *options, "--", "true", env=to(server, canary))
    assert (result.code, len(server.requests)) == (0, 1)
    told = spoken(result.err)
    assert told.errors == []
    assert len(result.err.splitlines()) == len(told.warnings) == int(warned)
    for warning in told.warnings:
        assert re.search(r"--timeout(?!-)", warning)
        assert f"--timeout-seconds {seconds}" in warning


def test_quiet_says_nothing_of_timeouts(program: Program, canary: str) -> None:
    with Hostile(answer(DOCUMENT)) as server:
        words = ("-q", "--timeout", "5s", "run", "--timeout-seconds", "9", "--", "true")
        result = program(*words, env=to(server, canary))
    assert (result.code, result.err) == (0, b"")
