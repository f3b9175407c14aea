# SPDX-License-Identifier: MIT
"""What an error, a denial and -v say: promises 1.5, 2.9, 3.7, 3.19, 3.20, 3.23, 3.24, 4.5, 6.8.

WHOLE holds whole lines, one for each kind of error. A text that is changed on purpose is changed
there; usage errors are in `test_command_line.py`, bad URLs and tokens in `test_settings.py`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hostile import (
    Api,
    Hostile,
    Script,
    answer,
    html,
    message,
    raw,
    refused_port,
    reset,
    silent,
)
from local_platform import SCOPE, Platform
from support import (
    CANARY,
    Env,
    InProcess,
    api_commands,
    check_failure,
    failure_code,
    jwt,
    words,
)

Serve = Callable[..., Hostile]

RUN = ("run", "--", "true")
NEW_TOKEN = f'bus auth token --scope "{SCOPE}"'
STATUS = b'{"items":[{"id":"runner","state":"ready"}]}'
STARTING = STATUS.replace(b"ready", b"starting")
DOCUMENT = b'{"run_id":"run-1","exit_code":0,"stdout":"OK","stderr":""}'


def failure(status: int, **error: object) -> bytes:
    """An answer of the API that says no."""
    body = {"error": {"type": "a_type", "message": "a sentence", **error}}
    return message(json.dumps(body).encode(), f"{status} Reason")


# --- 401 and 403, explained ---------------------------------------------------------------------


def claims(**changes: object) -> str:
    """A token whose claims allow a run, with changes; what is None is left out."""
    whole = {"exp": NOW + 5 * 3600, "scope": SCOPE, "aud": "ai.hg.fi/api", **PRIVATE, **changes}
    return jwt({name: value for name, value in whole.items() if value is not None})


NOW = int(time.time())
PRIVATE = {"sub": "private-subject", "email": "someone@private.example", "jti": "private-id"}
TOKENS = {  # a token, and what is said of it
    "good": (claims(), "a sentence; the token expires in 5 h; make one with: "),
    "expired": (claims(exp=NOW - 3 * 3600), "the token expired 3 h ago"),
    "expired-days": (claims(exp=NOW - 5 * 86400), "the token expired 5 d ago"),
    "no-run": (claims(scope="container:read billing:read"),
               "the token lacks the scope container:run (it has: container:read billing:read)"),
    "no-scope": (claims(scope=None), "the token lacks the scope container:run (it has: none)"),
    "not-a-prefix": (claims(scope="container:runs"), "the token lacks the scope container:run"),
    "audiences": (claims(aud=["a.b", "c.d"]), "the token is for a.b c.d, not ai.hg.fi/api"),
    "no-audience": (claims(aud=None), "the token is for no audience, not ai.hg.fi/api"),
    "opaque-key": ("sk-0123456789abcdef", "the token is not a JWT"),
    "three-dots": ("a.b.c.d", "the token is not a JWT"),
    "no-base64": ("e30.@@@@.c2ln", "the token is not a JWT"),
    "no-utf-8": (jwt(b"\xff\xfe\x00"), "the token is not a JWT"),
    "cut-json": (jwt(b'{"exp": 1'), "the token is not a JWT"),
    "list": (jwt([1, 2]), "the token is not a JWT"),
    # `docker --env-file` keeps them: promise 2.9.
    "in-quotes": (f"'{claims()}'", "the token is in quotes, as `docker --env-file` keeps them"),
    # Odd claims are as good as none.
    "strings": (jwt({"exp": "1", "nbf": "1", "scope": "", "aud": ""}), "is for no audience, "),
    "lists": (jwt({"exp": [1], "nbf": [], "scope": ["a"], "aud": [["x"], {}]}), "(it has: a)"),
    "objects": (jwt({"exp": {}, "nbf": {"a": 1}, "scope": {"a": 1}, "aud": {}}), "no audience"),
    "booleans": (jwt({"exp": True, "nbf": True, "scope": True, "aud": True}), "no audience"),
    "huge": (claims(exp=10**300, nbf=10**300), ""),
    "huger": (jwt(b'{"exp":1%s}' % (b"0" * 6000)), "the token "),
    "not-a-number": (jwt(b'{"exp":NaN,"nbf":1e999,"iat":Infinity}'), "no audience"),
    "nested": (jwt(b'{"aud":' + b"[" * 20_000), "the token "),
    "long": (jwt({"aud": "a" * 5_000, "scope": "b " * 2_500}), "is for aaa"),
    "escapes": (claims(aud="\x1b]0;x\x07\x9b2J\u202e"), "is for \\x1b]0;x\\x07\\x9b2J\\u202e, not"),
    "surrogates": (claims(aud="\ud800"), "the token is for \\ud800, not"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
def test_a_401_is_explained_from_the_token(name: str, cli: InProcess, api: Api) -> None:
    """Promise 3.24: the server decides, and what the claims say is advice at most."""
    token, said = TOKENS[name]
    api.sends(failure(401, type="invalid_auth"), message(DOCUMENT))
    env: Env = {"BUS_AI_TOKEN": token}
    error = check_failure(cli(*RUN, at=api, env=env), 125, "401 invalid_auth", said, NEW_TOKEN)
    assert bool(said) == ("; the token " in error)
    assert error.count("bus auth token") == 1
    assert len(error) < 9_000
    assert "private" not in error.lower()
    allowed = cli("-v", *RUN, at=api, env=env)
    assert (allowed.code, allowed.document) == (0, json.loads(DOCUMENT))
    assert name != "in-quotes" or "is in quotes" in allowed.message
    assert "bus auth token" not in allowed.message
    assert len(api.requests) == 2


LENGTHS = {
    1: "1 s", 119: "119 s", 120: "2 min", 7199: "120 min", 7200: "2 h", 172799: "48 h",
    172800: "2 d",
}  # fmt: skip


def test_a_length_of_time_is_readable(
    cli: InProcess, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    for seconds, text in LENGTHS.items():
        token = claims(exp=NOW + seconds, scope="container:read")
        result = cli("-v", "status", at=api, env={"BUS_AI_TOKEN": token})
        assert f"token from BUS_AI_TOKEN: expires in {text}\n" in result.message


def test_401_names_the_scope_of_each_command(cli: InProcess, platform: Platform) -> None:
    """And all that is wrong with a token at once."""
    token = platform.token(audience="x.example", scope="y", expires_in=-7205.0)
    for name in api_commands():
        scope = {"run": "container:run", "delete": "container:delete"}.get(name, "container:read")
        result = cli(*words(name), at=platform, env={"BUS_AI_TOKEN": token})
        check_failure(result, failure_code(name), f"lacks the scope {scope}", "2 h", "x.example")
        assert not result.spoken.advises


WANTS = [  # what a 403 says, the token's scope; is a new token advised, and for want of one
    ("insufficient scope", "container:read", True, True),
    ("the token lacks a SCOPE", SCOPE, True, False),
    ("belongs to another account", "container:read", False, False),
]


def test_a_403_for_want_of_a_scope_is_explained(cli: InProcess, api: Api) -> None:
    for says, scope, *told in WANTS:
        api.sends(failure(403, type="denied", message=says))
        result = cli(*RUN, at=api, env={"BUS_AI_TOKEN": claims(scope=scope)})
        error = check_failure(result, 125, f"403 denied: {says}")
        assert [NEW_TOKEN in error, "; the token lacks the scope" in error] == told


# --- 402, explained -----------------------------------------------------------------------------


def usage(**changes: object) -> dict[str, object]:
    """The stand-in's usage, with changes; what is None is left out."""
    whole: dict[str, object] = {
        "feature": "container:run", "meter_event_name": "bus_container_runtime_seconds",
        "window": "month", "used": 3600, "limit": 3600, "upgrade_plan_id": "plan-x", **changes,
    }  # fmt: skip
    return {name: value for name, value in whole.items() if value is not None}


SECONDS = "3,600 of 3,600 container runtime seconds used"
USAGES: list[tuple[object, str]] = [  # what stands under `usage`, and what is said of it
    (usage(window="day"), f"{SECONDS} today; recommended plan: plan-x"),
    (usage(window="total", upgrade_plan_id=None), f"{SECONDS} in total"),
    (usage(window=None), f"{SECONDS} this period; "),
    (usage(used=3_700_000.5), "3,700,000.5 of 3,600 container runtime seconds used this month; "),
    (usage(meter_event_name="bus_runs", used=5, limit=5), "5 of 5 runs used"),
    (usage(meter_event_name=None), "3,600 of 3,600 container:run used"),
    (usage(meter_event_name=" ", feature="\t"), "3,600 of 3,600 quota used"),
    (usage(meter_event_name="a\x1b[2J", window="\ud800"), "of 3,600 a\\x1b[2J used this \\ud800"),
    (usage(used=10**300, limit=-1e300), " of -1e+300 container runtime seconds used"),
    (usage(limit=None), ""),
    (usage(used="3600", limit=1), ""),
    (usage(used=True, limit=1), ""),
    (usage(used=1, limit={"a": 1}, meter_event_name={}), ""),
    ([usage()], ""),
]


def test_402_of_any_shape(cli: InProcess, api: Api) -> None:
    for shape, said in USAGES:
        api.sends(failure(402, type="quota_exceeded", message="used up", usage=shape))
        line = check_failure(cli(*RUN, at=api), 125, "402 quota_exceeded: used up", said)
        assert "None" not in line
        assert len(line) < 2_000
        assert (" of " in line) == bool(said), shape


# --- the server's own words, hints ------------------------------------------------------------


@pytest.mark.parametrize("field", ["message", "action", "command"])
def test_guidance_is_whole_up_to_4000_characters(field: str, cli: InProcess, api: Api) -> None:
    """Promise 3.19."""
    for length in (4_000, 4_001, 400_000):
        text = ("guidance " * (length // 9 + 1))[: length - 1] + "!"
        api.sends(failure(402, **{field: text}))
        line = check_failure(cli(*RUN, at=api), 125, text[:4_000])
        assert (text in line) is (length <= 4_000)
        assert len(line) < 4_500


def test_a_retry_after_of_any_form(cli: InProcess, api: Api) -> None:
    for value in ("120", "Wed, 21 Oct 2099 07:28:00 GMT", "-1", "\xff", "1e999", "x" * 9_000):
        api.sends(message(b"{}", "429 Too Many Requests", f"Retry-After: {value}"))
        line = check_failure(cli("runs", at=api), 1, f"; Retry-After: {value[:4000]}")
        assert len(line) < 4_500


WHAT_IS_RUN = [  # the words, the code, and the hint: habits of other tools cost a run
    (["echo hi"], 127, "leave out the quotes around the command, or use sh -c"),
    (["alpine", "ls"], 127, "by --image, a profile by --profile; this was codex"),
    (["sh", "-c", "nosuch"], 126, "by --image, a profile by --profile; this was codex"),
    (["echo hi", "x"], 127, "by --image, a profile by --profile; this was codex"),
    (["false"], 1, ""),
]


def test_a_hint_where_the_command_was_not_found(cli: InProcess, api: Api) -> None:
    """The result is as it is, and --quiet has no hint."""
    for line, code, hint in WHAT_IS_RUN:
        document = {"run_id": "run-1", "exit_code": code, "stdout": "", "stderr": ""}
        result = cli("run", *line, at=api.answers(document))
        assert (result.code, result.document) == (code, document)
        assert (hint in result.message, len(result.message.splitlines())) == (True, bool(hint))
        assert not hint or f"exit code {code} may mean that {line[0]!r} could" in result.message
        assert cli("-q", "run", *line, at=api).err == b""


# --- runs of a provider that lists them in /status -----------------------------------------------

RUNNER = {"id": "runner", "state": "ready", "details": {"runtime": "docker"}}
LISTED: dict[str, tuple[list[Any], list[str]]] = {
    "older-owner": ([RUNNER, {"id": "c", "state": "exited", "owner_account_id": "me"}], ["c"]),
    "both": ([{"run_id": "a"}, RUNNER, {"id": "b", "owner_identity_id": "me"}], ["a", "b"]),
    "null-is-not-an-owner": (
        [{**RUNNER, "owner_identity_id": None}, {"id": "a", "run_id": "a"}], ["a"],
    ),
    "neither": ([RUNNER], ["runner"]),
}  # fmt: skip


@pytest.mark.parametrize(("items", "runs"), LISTED.values(), ids=LISTED)
def test_a_runner_is_not_a_run(items: list[Any], runs: list[str], cli: InProcess, api: Api) -> None:
    """Promise 3.23: a pipe into `delete` must not try to delete the runner."""
    for status, format_ in ((404, "json"), (405, "tsv"), (404, "text")):
        api.sends(failure(status), message(json.dumps({"items": items}).encode()))
        result = cli("runs", "-f", format_, at=api)
        assert result.code == 0
        if format_ == "json":
            assert [item.get("run_id", item.get("id")) for item in result.document["items"]] == runs
        else:
            assert [row.split()[0].decode() for row in result.out.splitlines()[1:]] == runs


# --- -v and --trace ---------------------------------------------------------------------------


AT: Env = {"BUS_AI_API_URL": "{url}"}
PROXIED: Env = {"BUS_AI_API_URL": "http://platform.test", "BUS_AI_TOKEN": "{token}"}
SOURCES: list[tuple[str, Env, int, str]] = [  # options, variables, the exit code, what -v says
    ("--api-url {url}", {}, 1, "API URL {url} from --api-url; proxy none"),
    ("", AT, 1, "API URL {url} from BUS_AI_API_URL; proxy none"),
    ("", {"BUS_API_BASE_URL": "{url}"}, 1, "API URL {url} from BUS_API_BASE_URL; proxy none"),
    ("--token-file {file}", AT, 0, "token from {file}: expires in 5 h"),
    ("--token-file -", AT, 0, "token from standard input: expires in 5 h"),
    ("", {**AT, "BUS_AI_TOKEN": "{token}"}, 0, "token from BUS_AI_TOKEN: expires in 5 h"),
    ("", {**AT, "BUS_API_TOKEN": "{token}"}, 0, "token from BUS_API_TOKEN: expires in 5 h"),
    ("", {**AT, "BUS_CONFIG_DIR": "{folder}"}, 0, "token from {file}: expires in 5 h"),
    ("", {**PROXIED, "HTTP_PROXY": "me:pa55word@{proxy}"}, 0, "http://***@{proxy} from HTTP_PROXY"),
    ("", {**PROXIED, "http_proxy": "{proxy}"}, 0, "; proxy http://{proxy} from http_proxy"),
]


@pytest.mark.parametrize(("options", "variables", "code", "said"), SOURCES)
def test_verbose_names_the_source(
    options: str, variables: Env, code: int, said: str, cli: InProcess, api: Api, serve: Serve,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Of the URL, also where there is no token, of the proxy, and of the token with its life."""
    proxy, token = serve(answer(STATUS)), claims()
    path = tmp_path / "auth" / "api-token"
    path.parent.mkdir()
    path.write_text(token)
    names = {"url": api.url, "token": token, "folder": tmp_path, "file": path}
    names["proxy"] = f"127.0.0.1:{proxy.port}"
    env: Env = {name: (value or "").format(**names) for name, value in variables.items()}
    line = options.format(**names).split()
    result = cli("-vv", *line, "status", env=env, input=token.encode())
    assert (result.code, said.format(**names) in result.message) == (code, True)
    secrets = (token, "pa55word", "bWU6cGE1NXdvcmQ=")
    assert [secret for secret in secrets if secret in result.message] == []
    assert proxy.connections == ("{proxy}" in said)


@pytest.mark.usefixtures("hasty")
def test_verbose_has_a_line_for_each_request_and_retry(cli: InProcess, serve: Serve) -> None:
    """And without it nothing is said of them; as objects they have a kind of their own."""
    body = STATUS + b" " * 1234
    scripts = (answer(b"{}", "404 Not Found"), raw(failure(503)), reset(), answer(body))
    server = serve(*scripts, reset(), answer(STATUS))
    result = cli("-v", "runs", at=server)
    assert (result.code, len(server.requests)) == (0, 4)
    told = [re.sub(r"[0-9.]+ m?s$", "TIME", line) for line in result.message.splitlines()[2:]]
    start = f"bus-containers: GET {server.url}/api/v1/containers"
    assert told[:3] == [
        f"{start}/runs: 404, 2 bytes, TIME",
        f"{start}/status: 503, 54 bytes, TIME",
        f"{start}/status: HTTP 503 a_type: a sentence; trying again in TIME",
    ]
    assert re.fullmatch(f"{start}/status: .*reset.*; trying again in TIME", told[3])
    assert told[4:] == [f"{start}/status: 200, {len(body):,} bytes, TIME"]
    assert cli("status", at=server).err == b""
    objects = cli("--error-format", "json", "-vv", "status", at=server).objects
    kinds = {one["message"].split()[0]: one["kind"] for one in objects}
    assert kinds == {
        "API": "verbose", "token": "verbose", "GET": "verbose", ">": "trace", "<": "trace",
    }  # fmt: skip


def test_trace_shows_the_headers_of_both_sides(cli: InProcess, api: Api) -> None:
    api.sends(message(DOCUMENT, "200 OK", "X-Deployment: seven", f"X-Echo: {CANARY}"))
    assert re.search("(?i)x-deployment|user-agent", cli("-v", *RUN, at=api).message) is None
    for options in (["-vv"], ["-v", "-v"], ["--trace"]):
        api.requests.clear()
        result = cli(*options, *RUN, at=api)
        sent = api.requests[0].partition(b"\r\n\r\n")[0].decode()
        sent = sent.replace(f"Bearer {CANARY}", "[redacted]")
        assert re.findall("(?m)^bus-containers: > (.*)$", result.message) == sent.splitlines()
        assert "User-Agent: bus-containers/1." in sent
        came = re.findall("(?m)^bus-containers: < (.*)$", result.message)
        assert {"200 OK", "X-Deployment: seven", "X-Echo: [redacted]"} <= {*came}
        assert (result.code, result.document) == (0, json.loads(DOCUMENT))


def test_wait_does_not_wait_where_it_is_in_vain(cli: InProcess, api: Api) -> None:
    """Promise 6.8."""
    api.sends(failure(429), failure(402))
    check_failure(cli("status", "--wait", "60s", at=api), 1, "402 a_type")
    assert len(api.requests) == 2


# --- --error-format json ------------------------------------------------------------------------

FIELDS = {"status", "type", "message", "action", "command", "document", "retryable"}


def check_object(one: dict[str, Any], **expected: object) -> None:
    assert one.keys() >= FIELDS
    assert isinstance(one["retryable"], bool)
    assert {name: one.get(name) for name in expected} == expected


def test_an_answer_of_the_api_as_an_object(cli: InProcess, api: Api) -> None:
    """Promise 3.20."""
    said = {
        "type": "quota_exceeded", "message": "used up", "action": "upgrade_plan",
        "command": "bus billing setup",
    }  # fmt: skip
    document = {"error": {**said, "usage": {"used": 1, "limit": 1}}, "request_id": "\u00e9"}
    [one] = cli("--error-format", "json", *RUN, at=api.answers(document, status="402 No")).objects
    check_object(one, kind="api", status=402, document=document, **said)
    api.sends(message(b"<html>Gateway</html>", "400 Bad Request"))
    [one] = cli("--error-format", "json", *RUN, at=api).objects
    nothing = dict.fromkeys(("type", "action", "command", "document"))
    check_object(one, kind="api", status=400, message=one["text"], **nothing)


# Promise 4.5. For a run, only what did not start one.
REFUSALS = {300: False, 400: False, 403: False, 408: True, 409: False, 425: True, 429: True}
FAULTS = {500: True, 501: False, 502: True, 503: True, 504: True, 505: False, 520: True, 599: True}


@pytest.mark.parametrize("status", [*REFUSALS, *FAULTS])
def test_which_answers_are_retryable(status: int, cli: InProcess, api: Api) -> None:
    api.sends(failure(status))
    # With this limit there is no time for a second try, after 0.3 s.
    limit = ("--timeout", "290ms" if status in (502, 503, 504) else "30s")
    [one] = cli("--error-format", "json", *limit, "delete", "run-1", at=api).objects
    assert (one["status"], one["retryable"]) == (status, {**REFUSALS, **FAULTS}[status])
    [one] = cli("--error-format", "json", *RUN, at=api).objects
    assert one["run_state"] == ("refused" if status in REFUSALS else "unknown")
    assert one["retryable"] is REFUSALS.get(status, False)


WHERE = {  # where the option stands, the code, and whether the error is an object
    "--error-format json --bogus status": (2, True),
    "status --bogus --error-format=json": (2, True),
    "--error-format text --error-format json": (2, True),
    "--error-format json run \udcff": (2, True),
    "--error-format xml status": (2, False),
    "--error-format": (2, False),
    "--error-format json --error-format text nonsense": (2, False),
    "--api-url x run --error-format json": (2, True),
    "--token-file /no/such run -- --error-format=json": (125, False),
}


def test_where_error_format_stands(cli: InProcess) -> None:
    """Before or after the mistake, but not behind the container's command."""
    for line, (code, is_object) in WHERE.items():
        result = cli(*line.split())
        assert (result.code, result.out) == (code, b"")
        if is_object:
            check_object(*result.objects, kind="usage", retryable=False)
        else:
            check_failure(result, code, "bus-containers: ")


# --- timeouts that disagree -------------------------------------------------------------------


DISAGREEING = {  # --timeout and --timeout-seconds, and whether there is a warning
    ("10s", "10"): True,
    ("9.999s", "10"): True,
    ("10.5s", "10"): False,
    ("0", "10"): False,
    ("10s", "0"): False,
}


def test_timeouts_that_disagree(cli: InProcess, api: Api) -> None:
    for (timeout, seconds), warned in DISAGREEING.items():
        line = ("run", "--timeout", timeout, "--timeout-seconds", seconds, "--", "true")
        result = cli(*line, at=api)
        assert (result.code, len(result.spoken.warnings)) == (0, warned)
        assert len(result.message.splitlines()) == warned
        assert cli("-q", *line, at=api).err == b""


# --- whole lines ----------------------------------------------------------------------------------


class Line(NamedTuple):
    """A command line, what it meets, its exit code, and standard error to the letter.

    AT stands for the URL and path of the API, SOON for a --timeout without time for a second try,
    ADVICE, NEW and WAIT for the sentences below. As an object an error says the same, its kind,
    its run_state (of a run) and whether it is retryable.
    """

    words: str
    script: Script | None  # None: nobody listens
    code: int
    told: str
    text: str
    env: Env = {}


SENTENCES = {
    "ADVICE": "the run may still be executing and counting against the quota: look with"
    " `bus-containers runs`, end it with `bus-containers delete RUN_ID`",
    "NEW": f"make one with: {NEW_TOKEN}",
    "WAIT": "cannot connect to the API: Connection refused; check BUS_AI_API_URL;"
    " `bus-containers status --wait 60s` waits for a platform",
}
USED_UP = failure(
    402, type="quota_exceeded", message="the container runtime of this month is used up",
    action="upgrade_plan", command="bus billing setup", recommended_plan="large", usage=usage(),
)  # fmt: skip
CLOSING = b'{"run_id":"run-1","exit_code":37,"duration_ms":13}'
NO_TOKEN: Env = {"BUS_AI_TOKEN": None}
BY_PROXY: Env = {"BUS_AI_API_URL": "http://a.test", "HTTP_PROXY": "URL"}
PROXIED_AT = "POST http://a.test/api/v1/containers/runs"
WHOLE: list[Line] = [
    Line("", None, 2, "usage", "no command: use one of status, run, runs, delete, help; SEE"),
    Line("runs", None, 1, "config",
         "no token: looked at --token-file, BUS_AI_TOKEN, BUS_API_TOKEN, "
         "HOME/.config/bus/auth/api-token; NEW", NO_TOKEN),
    Line("run true", None, 125, "config not_sent",
         "the token in BUS_AI_TOKEN starts with `Bearer`: leave that word out",
         {"BUS_AI_TOKEN": "Bearer x"}),
    Line("-C /no/such run true", None, 125, "config not_sent",
         "--chdir /no/such: No such file or directory"),
    Line("-o /dev/full runs", answer(STATUS), 1, "output",
         "cannot write to /dev/full: No space left on device; the result is on standard output"),
    Line("SOON delete run-1", None, 1, "transport retryable", "DELETE AT/runs/run-1: WAIT"),
    Line("SOON run true", None, 125, "transport not_sent retryable", "POST AT/runs: WAIT"),
    Line("run true", reset(), 125, "transport unknown",
         "POST AT/runs: the connection was lost: Connection reset by peer; is this port for "
         "https?; ADVICE"),
    Line("run true", reset(), 125, "transport unknown",
         f"{PROXIED_AT}: the connection was lost: Connection reset by peer; ADVICE", BY_PROXY),
    Line("--timeout 100ms runs", silent(), 1, "deadline retryable",
         "GET AT/runs: no whole answer within 0.1 s; --timeout sets the limit"),
    Line("--timeout 100ms run true", silent(), 125, "deadline unknown",
         "POST AT/runs: no whole answer within 0.1 s; --timeout sets the limit; ADVICE"),
    Line("status --wait 1ms", answer(STARTING), 1, "deadline retryable",
         "the platform is not ready after 0.001 s: the runner is starting"),
    Line("SOON status --wait 1ms", raw(failure(503, message="warming up")), 1,
         "deadline retryable",
         "the platform is not ready after 0.001 s: GET AT/status: HTTP 503 a_type: warming up"),
    Line("SOON status --wait 1ms", None, 1, "deadline retryable",
         "the platform is not ready after 0.001 s: GET AT/status: cannot connect to the API: "
         "Connection refused"),
    Line("runs", answer(b"nonsense"), 1, "protocol",
         "GET AT/runs: HTTP 200, but the answer is not usable JSON: Expecting value: line 1 "
         "column 1 (char 0)"),
    Line("run true", answer(b'{"run_id":"r","exit_code":null}'), 125, "protocol unknown",
         "the exit code is not an integer; run r has no exit code; ADVICE"),
    Line("run true", raw(message(b"", "300 Multiple Choices")), 125, "api refused",
         "POST AT/runs: HTTP 300 Multiple Choices; redirected to nowhere, not followed; check "
         "BUS_AI_API_URL"),
    Line("run true", raw(failure(401, type="invalid_auth")), 125, "api refused",
         "POST AT/runs: HTTP 401 invalid_auth: a sentence; the token is not a JWT, so what it "
         "allows cannot be seen here; NEW"),
    Line("run true", raw(USED_UP), 125, "api refused",
         "POST AT/runs: HTTP 402 quota_exceeded: the container runtime of this month is used up; "
         "3,600 of 3,600 container runtime seconds used this month; recommended plan: large; "
         "action: upgrade_plan; run: bus billing setup"),
    Line("delete x", raw(failure(404, action="raise `timeout`")), 1, "api",
         "DELETE AT/runs/x: HTTP 404 a_type: a sentence; action: raise `timeout`"),
    Line("--api-url URL/api/v1 status", raw(failure(404)), 1, "api",
         "GET URL/api/v1/api/v1/containers/status: HTTP 404 a_type: a sentence; --api-url ends "
         "in a part of the API's path: give its origin alone"),
    Line("run true", raw(message(b"{}", "429 Slow Down", "Retry-After: 120")), 125,
         "api refused retryable", "POST AT/runs: HTTP 429 Slow Down; Retry-After: 120"),
    Line("run true", html("502 Bad Gateway", "x"), 125, "api unknown",
         "POST AT/runs: HTTP 502 Bad Gateway; ADVICE"),
    Line("run true", html("413 Too Large", "x"), 125, "api refused",
         f"{PROXIED_AT}: HTTP 413 Too Large; this may be the answer of the proxy URL, "
         "not of the API", BY_PROXY),
    Line("run true", answer(DOCUMENT.replace(b"OK", b"\xff")), 0, "warning",
         "warning: the answer is not all UTF-8: what is not became U+FFFD"),
    Line("run -f text true", answer(CLOSING), 37, "run",
         "run run-1 ended with exit code 37 after 13 ms"),
]  # fmt: skip


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case.told.split()[0]}-{case.words}")
def test_the_whole_line(case: Line, cli: InProcess, serve: Serve) -> None:
    server = serve(case.script or silent())
    with refused_port() as port:
        url = server.url if case.script else f"http://127.0.0.1:{port}"
        env: Env = {"BUS_AI_API_URL": url, "BUS_AI_TOKEN": "opaque", **case.env}
        env = {name: value and value.replace("URL", url) for name, value in env.items()}
        line = case.words.replace("URL", url).replace("SOON", "--timeout 290ms").split()
        result = cli(*line, env=env)
        [one] = cli("--error-format", "json", *line, env=env).objects
    text = result.message.replace(url, "URL").replace(str(cli.home), "HOME")
    text = text.replace("URL/api/v1/containers/", "AT/")
    for name, sentence in SENTENCES.items():
        text = text.replace(sentence, name)
    text = re.sub("; see `bus-containers [a-z ]*--help`$", "; SEE", text)
    assert (result.code, text) == (case.code, f"bus-containers: {case.text}\n")
    kind, *state = case.told.split()
    assert one["kind"] == kind
    assert one["text"] in result.message
    if kind not in ("warning", "run"):
        check_object(one, retryable="retryable" in state)
        assert one.get("run_state") == next((word for word in state if word != "retryable"), None)
        assert ("run_state" in one) is ("run" in line)
