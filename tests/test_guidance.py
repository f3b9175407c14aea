# SPDX-License-Identifier: MIT
"""What an error, a denial and -v say: promises 1.5, 2.9, 3.7, 3.19, 3.20, 3.23, 3.24, 4.5, 6.8.

LINES holds whole lines, one for each kind of error and each example of the README. A text that is
changed on purpose is changed there.
"""

from __future__ import annotations

import base64
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hostile import (
    Api,
    Hostile,
    Script,
    answer,
    close,
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
    LIMIT,
    URL_VARIABLES,
    Env,
    InProcess,
    Program,
    Result,
    api_commands,
    check_failure,
    failure_code,
    jwt,
    tiers,
    words,
)

Serve = Callable[..., Hostile]
Words = tuple[str, ...]

RUN = ("run", "--", "true")
NEW_TOKEN = f'bus auth token --scope "{SCOPE}"'
STATUS = b'{"items":[{"id":"runner","state":"ready"}]}'
STARTING = STATUS.replace(b"ready", b"starting")
DOCUMENT = b'{"run_id":"run-1","exit_code":0,"stdout":"OK","stderr":""}'
QUOTA = {
    "error": {
        "type": "quota_exceeded", "message": "used up", "action": "upgrade_plan",
        "command": "bus billing setup", "recommended_plan": "large",
        "usage": {"used": 1, "limit": 1},
    },
    "request_id": "\u00e9",
}  # fmt: skip
SAID = {name: QUOTA["error"][name] for name in ("type", "message", "action", "command")}  # type: ignore[index]


def failure(status: int, **error: object) -> bytes:
    """An answer of the API that says no."""
    body = {"error": {"type": "a_type", "message": "a sentence", **error}}
    return message(json.dumps(body).encode(), f"{status} Reason")


# --- 401 and 403, explained ---------------------------------------------------------------------


DENIED: dict[str, tuple[dict[str, Any], str]] = {  # claims of a token, and what is said of it
    "expired": ({"expires_in": -3 * 3600.0 - 5}, "the token expired 3 h ago"),
    "expired-days": ({"expires_in": -5 * 86400.0 - 5}, "the token expired 5 d ago"),
    "not-yet": ({"not_before": 5 * 3600.0 + 5}, "the token is valid only in 5 h"),
    "no-run": ({"scope": "container:read billing:read"},
               "the token lacks the scope container:run (it has: container:read billing:read)"),
    "no-scope": ({"scope": None}, "the token lacks the scope container:run (it has: none)"),
    "not-a-prefix": ({"scope": "container:runs"}, "lacks the scope container:run (it has: "),
    "audience": ({"audience": "x.example"}, "the token is for x.example, not ai.hg.fi/api"),
    "audiences": ({"audience": ["a.b", "c.d"]}, "the token is for a.b c.d, not ai.hg.fi/api"),
    "no-audience": ({"audience": None}, "the token is for no audience, not ai.hg.fi/api"),
}  # fmt: skip
PRIVATE = {"email": "someone@private.example", "name": "Private Person", "jti": "private-id"}


@pytest.mark.parametrize("name", DENIED)
def test_401_says_what_is_wrong_with_the_token(
    name: str, cli: InProcess, platform: Platform
) -> None:
    claims, said = DENIED[name]
    token = platform.token(account="private-subject", **{**PRIVATE, **claims})
    result = cli(*RUN, at=platform, env={"BUS_AI_TOKEN": token})
    error = check_failure(result, 125, "401 invalid_auth", NEW_TOKEN, said)
    assert len(platform.requests) == 1  # the server decides, not the claims
    assert error.count("bus auth token") == 1
    assert "private" not in error.lower()
    assert not result.spoken.advises


def test_401_names_the_scope_of_each_command(cli: InProcess, platform: Platform) -> None:
    """And all that is wrong with a token at once."""
    token = platform.token(audience="x.example", scope="y", expires_in=-7205.0)
    for name in api_commands():
        scope = {"run": "container:run", "delete": "container:delete"}.get(name, "container:read")
        result = cli(*words(name), at=platform, env={"BUS_AI_TOKEN": token})
        check_failure(result, failure_code(name), f"lacks the scope {scope}", "2 h", "x.example")


SCOPE_403 = [
    ("insufficient scope", "container:read", RUN, True),
    ("the token lacks a SCOPE", "container:run", ("status",), True),
    ("insufficient_scope", SCOPE, ("status",), False),
    ("belongs to another account", "container:read", ("delete", "run-1"), False),
]


@pytest.mark.parametrize(("says", "scope", "line", "lacks"), SCOPE_403)
def test_403_for_want_of_a_scope(
    says: str, scope: str, line: Words, lacks: bool, cli: InProcess, api: Api, platform: Platform
) -> None:
    """Promise 3.24: explained as a 401 is, where the server speaks of a scope."""
    token = platform.token(scope=scope)
    api.sends(failure(403, type="forbidden", message=says))
    result = cli(*line, at=api, env={"BUS_AI_TOKEN": token})
    error = check_failure(result, failure_code(line[0]), "403 forbidden", says)
    assert ("lacks the scope" in error) is lacks
    assert "another account" in says or NEW_TOKEN in error


def test_401_of_a_good_token_blames_nothing(
    cli: InProcess, api: Api, platform: Platform
) -> None:
    api.sends(failure(401, type="invalid_auth"))
    result = cli("status", at=api, env={"BUS_AI_TOKEN": platform.token()})
    error = check_failure(result, 1, NEW_TOKEN)
    assert re.search("lacks|expired|not valid|is for|JWT", error) is None


GARBAGE = {
    "opaque-key": "sk-0123456789abcdef", "two-dots": "a.b.c", "three-dots": "a.b.c.d",
    "only-dots": "..", "no-base64": "e30.@@@@.c2ln", "no-utf-8": jwt(b"\xff\xfe\x00"),
    "cut-json": jwt(b'{"exp": 1'), "list": jwt([1, 2]), "string": jwt("claims"),
    "null": jwt(None), "number": jwt(7), "empty": jwt({}),
    "strings": jwt({"exp": "1", "nbf": "1", "iat": "x", "scope": "", "aud": ""}),
    "lists": jwt({"exp": [1], "nbf": [], "scope": ["container:read"], "aud": [["x"], {}, None]}),
    "objects": jwt({"exp": {}, "nbf": {"a": 1}, "scope": {"a": 1}, "aud": {"a": 1}}),
    "numbers": jwt({"scope": 7, "aud": 7, "sub": 7}),
    "booleans": jwt({"exp": True, "nbf": False, "scope": True, "aud": True}),
    "huge": jwt({"exp": 10**300, "nbf": 10**300, "iat": -(10**300)}),
    "huger": jwt(b'{"exp":1%s}' % (b"0" * 6000)), "infinite": jwt(b'{"exp":1e999,"nbf":-1e999}'),
    "not-a-number": jwt(b'{"exp":NaN,"nbf":NaN,"iat":Infinity}'),
    "negative": jwt({"exp": -1, "nbf": -5}), "milliseconds": jwt({"exp": 1.7e12, "nbf": 1.7e12}),
    "nested": jwt(b'{"aud":' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    "long": jwt({"aud": "a" * 20_000, "scope": "b " * 10_000}),
    "escapes": jwt({"aud": "\x1b]0;x\x07\x9b2J", "scope": "a\x1b[2J\x7f\u2028\u202e"}),
    "surrogates": jwt({"aud": "\ud800", "scope": "\udfff"}),
}  # fmt: skip
NOT_A_JWT = ("opaque-key", "two-dots", "no-base64", "list")


@pytest.mark.parametrize("name", GARBAGE)
def test_odd_claims_are_advice_at_most(name: str, cli: InProcess, api: Api) -> None:
    api.sends(failure(401, type="invalid_auth"), message(STATUS))
    env: Env = {"BUS_AI_TOKEN": GARBAGE[name]}
    error = check_failure(cli("status", at=api, env=env), 1, NEW_TOKEN)
    assert error.count("bus auth token") == 1
    assert len(error) < 9_000
    assert "JWT" in error or name not in NOT_A_JWT
    allowed = cli("-v", "status", at=api, env=env)
    assert (allowed.code, allowed.document) == (0, json.loads(STATUS))
    assert "bus auth token" not in allowed.spoken.text
    assert len(api.requests) == 2


@pytest.mark.parametrize("quotes", ["'", '"'])
def test_a_token_in_quotes(quotes: str, cli: InProcess, api: Api, platform: Platform) -> None:
    """Promise 2.9: `docker --env-file` keeps them, and an opaque token might hold them."""
    env: Env = {"BUS_AI_TOKEN": f"{quotes}{platform.token()}{quotes}"}
    api.sends(failure(401, type="invalid_auth"), message(STATUS))
    check_failure(cli("status", at=api, env=env), 1, "in quotes", NEW_TOKEN)
    allowed = cli("-v", "status", at=api, env=env)
    assert allowed.code == 0
    assert "quote" in allowed.message


# --- 402, explained -----------------------------------------------------------------------------


def usage(**changes: object) -> dict[str, object]:
    """The stand-in's usage, with changes; what is None is left out."""
    whole: dict[str, object] = {
        "feature": "container:run", "meter_event_name": "bus_container_runtime_seconds",
        "window": "month", "used": 3600, "limit": 3600, "upgrade_plan_id": "plan-x", **changes,
    }  # fmt: skip
    return {name: value for name, value in whole.items() if value is not None}


USAGES: dict[str, tuple[object, str]] = {  # what stands under `usage`, and what is said of it
    "day": (usage(window="day"), "3,600 of 3,600 container runtime seconds used today"),
    "over": (usage(used=3_700_000), "3,700,000 of 3,600 container runtime seconds"),
    "fraction": (usage(used=1.5), "1.5 of 3,600 container runtime seconds used this month"),
    "count": (usage(meter_event_name="bus_container_runs", used=5, limit=5), "5 of 5 "),
    "no-meter": (usage(meter_event_name=None), "3,600 of 3,600 "),
    "no-names": (usage(meter_event_name=None, feature=None), "3,600 of 3,600 "),
    "no-window": (usage(window=None), "3,600 of 3,600 container runtime seconds used"),
    "plan-of-usage": (usage(), "plan-x"),
    "no-plan": (usage(upgrade_plan_id=None), "3,600 of 3,600 "),
    "meter-is-seconds": (usage(meter_event_name="seconds"), "3,600 of 3,600 "),
    "meter-is-odd": (usage(meter_event_name="__", window="__"), "3,600 of 3,600 "),
    "meter-is-blank": (usage(meter_event_name=" ", feature="\t"), "3,600 of 3,600 "),
    "controls": (usage(meter_event_name="a\x1b[2J", window="\x9b\x07"), "3,600 of"),
    "surrogates": (usage(meter_event_name="\ud800", window="\udfff"), "3,600 of"),
    "negative": (usage(used=-5, limit=-1), "used up"),
    "huge": (usage(used=10**300, limit=1e300), "used up"),
}
NO_USAGE: list[object] = [
    usage(used=None, limit=None), usage(used="3600", limit="x"), {"used": None, "limit": None},
    usage(used=True, limit=False), usage(used=[1], limit={"a": 1}, meter_event_name={}),
    None, [usage()], "3600", 3600, {},
]  # fmt: skip


def test_402_of_any_shape(cli: InProcess, api: Api) -> None:
    for name, (shape, said) in [*USAGES.items(), *(("none", (one, "")) for one in NO_USAGE)]:
        api.sends(failure(402, type="quota_exceeded", message="used up", usage=shape))
        line = check_failure(cli(*RUN, at=api), 125, "402 quota_exceeded", "used up", said)
        assert "None" not in line, name
        assert len(line) < 2_000, name
        assert name != "none" or " of " not in line, shape


def test_402_without_billing(cli: InProcess, platform: Platform) -> None:
    platform.billing = "required"
    result = cli(*RUN, at=platform)
    check_failure(
        result, 125, "402 billing_required", "not set up", "setup_billing", "bus billing setup"
    )
    assert not result.spoken.advises


# --- the server's own words, hints ------------------------------------------------------------


@pytest.mark.parametrize("field", ["message", "action", "command"])
@pytest.mark.parametrize("length", [301, 3_999, 4_000, 4_001, 400_000])
def test_guidance_is_whole_up_to_4000_characters(
    field: str, length: int, cli: InProcess, api: Api
) -> None:
    """Promise 3.19."""
    text = ("guidance " * (length // 9 + 1))[: length - 1] + "!"
    api.sends(failure(402, **{field: text}))
    line = check_failure(cli(*RUN, at=api), 125, text[:3_990])
    assert (text in line) is (length <= 4_000)
    assert len(line) < 4_500


def test_the_form_of_an_error_is_not_always_the_apis(cli: InProcess, api: Api) -> None:
    nothings: list[object] = [None, 7, [], {}, "", " ", True]
    for value in nothings:
        api.sends(failure(402, type=value, message=value, action=value, command=value))
        line = check_failure(cli(*RUN, at=api), 125, "402")
        assert re.search(r"None|\[\]|\{\}|True|: *;|; *;|[:;] *$", line) is None
    for body in (b"{}", b"[]", b"", b'{"error":"a sentence"}', b'{"message":"a sentence"}', b"x"):
        line = check_failure(cli("runs", at=api.answers(body, status="400 Bad Request")), 1, "400")
        assert ("a sentence" in line) is (b"sentence" in body)


@pytest.mark.parametrize("value", ["3", "120", "Wed, 21 Oct 2099 07:28:00 GMT"])
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_shown(value: str, status: int, cli: InProcess, api: Api) -> None:
    body = b'{"error":{"message":"slow down"}}'
    api.sends(message(body, f"{status} Reason", f"Retry-After: {value}"))
    line = check_failure(cli(*RUN, at=api), 125, "slow down", str(status))
    assert value in line or ("2 min" in line and value == "120")


def test_an_odd_retry_after_does_no_harm(cli: InProcess, api: Api) -> None:
    for value in ("", "soon", "-1", "\xff", "1e999", "x" * 9_000):
        api.sends(message(b"{}", "429 Too Many Requests", f"Retry-After: {value}"))
        assert len(check_failure(cli("runs", at=api), 1, "429")) < 4_500


@pytest.mark.parametrize("path", ["/api/v1", "/api/v1/", "/prefix/api/v1"])
@pytest.mark.parametrize("source", ["BUS_AI_API_URL", "BUS_API_BASE_URL", "--api-url"])
def test_a_url_with_the_path_of_the_api(
    path: str, source: str, cli: InProcess, api: Api
) -> None:
    """Promise 3.24: the likely mistake is named, and advice names what the value came from."""
    api.sends(failure(404, type="not_found", message="no such route"))
    env: Env = {"BUS_AI_API_URL": None, "BUS_AI_TOKEN": CANARY}
    line = ["status"]
    if source == "--api-url":
        line = ["--api-url", f"{api.url}{path}", *line]
    else:
        env[source] = f"{api.url}{path}"
    error = check_failure(cli(*line, env=env), 1, "404", source, "/api")
    others = {"BUS_AI_API_URL", "BUS_API_BASE_URL", "--api-url"} - {source}
    assert [name for name in others if name in error] == []


def test_a_bad_url_out_of_a_variable(cli: InProcess) -> None:
    for variable in URL_VARIABLES:
        for url in ("platform.test", "ftp://platform.test", "http://a b"):
            env: Env = {"BUS_AI_API_URL": None, variable: url, "BUS_AI_TOKEN": CANARY}
            assert "--api-url" not in check_failure(cli("status", env=env), 2, variable)


HINTS: dict[str, tuple[str, Words]] = {
    "option-of-another-command": ("runs --wait 1s", ("--wait", "status")),
    "options-of-run": ("status --image alpine", ("--image", "run")),
    "after-delete": ("delete --profile x run-1", ("--profile", "run")),
    "token": ("--token x runs", ("--token-file", "BUS_AI_TOKEN", "BUS_API_TOKEN")),
    "token-attached": ("--token=x runs", ("--token-file", "BUS_AI_TOKEN", "BUS_API_TOKEN")),
    "help-topic": ("help nosuch", ("nosuch", "status", "run", "runs", "delete")),
    "command": ("list", ("list", "status", "run", "runs", "delete", "help")),
    "value-of-a-flag": ("--verbose=2 runs", ("--verbose", "value")),
    "no-value": ("runs --format", ("--format", "value")),
}


@pytest.mark.parametrize(("line", "said"), HINTS.values(), ids=HINTS)
def test_a_hint_names_the_likely_mistake(
    line: str, said: Words, cli: InProcess, api: Api
) -> None:
    error = check_failure(cli(*line.split(), at=api), 2, *said)
    assert re.search("ignored explicit|unrecognized|invalid choice|expected one", error) is None
    assert api.requests == []


COMMANDS_OF_PEERS = {
    "one-word": (["run", "echo hi"], 127, True),
    "an-image-first": (["run", "alpine", "ls"], 127, True),
    "not-executable": (["run", "./data"], 126, True),
    "a-shell": (["run", "--", "sh", "-c", "nosuch"], 127, True),
    "the-command-failed": (["run", "--", "false"], 1, False),
    "success": (["run", "--", "true"], 0, False),
}


@pytest.mark.parametrize(
    ("line", "code", "hint"), COMMANDS_OF_PEERS.values(), ids=COMMANDS_OF_PEERS
)
def test_a_hint_where_the_command_was_not_found(
    line: list[str], code: int, hint: bool, cli: InProcess, api: Api
) -> None:
    """Habits of other tools cost a run; 126 and 127 get one hint, and the result as it is."""
    document = {"run_id": "run-1", "exit_code": code, "stdout": "", "stderr": ""}
    result = cli(*line, at=api.answers(document))
    assert (result.code, result.document) == (code, document)
    assert len(result.message.splitlines()) == hint
    assert cli("-q", *line, at=api).err == b""
    told = cli("--error-format", "json", *line, at=api)
    assert len(told.objects) == hint


# --- runs of a provider that lists them in /status -----------------------------------------------

RUNNER = {"id": "runner", "state": "ready", "details": {"runtime": "docker"}}
LISTED: dict[str, tuple[list[Any], list[str]]] = {
    "run-id": ([RUNNER, {"id": "a", "run_id": "a", "state": "exited"}], ["a"]),
    "owner": ([RUNNER, {"id": "b", "state": "exited", "owner_identity_id": "me"}], ["b"]),
    "older-owner": ([RUNNER, {"id": "c", "state": "exited", "owner_account_id": "me"}], ["c"]),
    "both": ([{"run_id": "a"}, RUNNER, {"id": "b", "owner_identity_id": "me"}], ["a", "b"]),
    "null-is-not-an-owner": (
        [{**RUNNER, "owner_identity_id": None}, {"id": "a", "run_id": "a"}], ["a"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("items", "runs"), LISTED.values(), ids=LISTED)
def test_a_runner_is_not_a_run(
    items: list[Any], runs: list[str], cli: InProcess, api: Api
) -> None:
    """Promise 3.23: a pipe into `delete` must not try to delete the runner."""
    gone = message(b'{"error":{"type":"not_found"}}', "404 Not Found")
    api.sends(gone, message(json.dumps({"items": items}).encode()))
    result = cli("runs", at=api)
    assert result.code == 0
    assert [item.get("run_id", item.get("id")) for item in result.document["items"]] == runs
    for format_ in ("tsv", "text"):
        api.sends(gone, message(json.dumps({"items": items}).encode()))
        result = cli("runs", "-f", format_, at=api)
        assert [row.split()[0].decode() for row in result.out.splitlines()[1:]] == runs


def test_runs_then_delete_on_the_published_provider(cli: InProcess, platform: Platform) -> None:
    platform.runs_in_status = True
    cli("-q", *RUN, at=platform)
    header, row = cli("runs", "-f", "tsv", at=platform).out.decode().splitlines()
    found = dict(zip(header.split("\t"), row.split("\t")))
    assert (found["command"], found["state"], found["exit_code"]) == ("true", "exited", "0")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["started_at"])
    assert cli("delete", found["run_id"], at=platform).code == 0
    assert "local-runner" not in cli("runs", "-f", "text", at=platform).message


# --- -v and --trace ---------------------------------------------------------------------------


def test_verbose_names_the_source_of_the_url(cli: InProcess, api: Api) -> None:
    for source in ("--api-url", *URL_VARIABLES):
        env: Env = {"BUS_AI_API_URL": None, "BUS_AI_TOKEN": CANARY}
        options = ["--api-url", api.url] if source == "--api-url" else []
        result = cli("-v", *options, "status", env=env if options else {**env, source: api.url})
        assert f"API URL {api.url} from {source}" in result.message
        result = cli("-v", *options, "status", env={**env, source: api.url, "BUS_AI_TOKEN": None})
        assert (result.code, f"API URL {api.url} from {source}" in result.message) == (1, True)


@pytest.mark.parametrize("source", ["file", "stdin", "BUS_AI_TOKEN", "BUS_API_TOKEN", "config"])
def test_verbose_names_the_source_of_the_token_and_its_life(
    source: str, cli: InProcess, platform: Platform, tmp_path: Path
) -> None:
    token = platform.token(expires_in=5 * 3600.0 + 9)
    path = tmp_path / "config" / "auth" / "api-token"
    path.parent.mkdir(parents=True)
    path.write_text(token)
    env: Env = {"BUS_AI_API_URL": platform.url, "BUS_CONFIG_DIR": None}
    options = {"file": ("--token-file", str(path)), "stdin": ("--token-file", "-")}.get(source, ())
    if source == "config":
        env["BUS_CONFIG_DIR"] = str(tmp_path / "config")
    elif not options:
        env[source] = token
    result = cli("-v", *options, "status", env=env, input=token.encode())
    assert result.code == 0
    name = {"file": str(path), "config": str(path), "stdin": "standard input"}.get(source, source)
    [line] = [line for line in result.message.splitlines() if name in line]
    assert re.search(r"expires in 5(\.00)? h", line)
    assert token not in result.message


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_verbose_names_the_proxy_without_its_login(
    variable: str, cli: InProcess, serve: Serve
) -> None:
    proxy = serve(answer(STATUS))
    env: Env = {
        "BUS_AI_API_URL": "http://platform.test",
        "BUS_AI_TOKEN": CANARY,
        variable: f"http://someone:pa55word@127.0.0.1:{proxy.port}",
    }
    result = cli("-vv", "status", env=env)
    assert (result.code, proxy.methods()) == (0, ["GET"])
    [line] = [line for line in result.message.splitlines() if variable in line]
    assert f"127.0.0.1:{proxy.port}" in line
    secret = base64.b64encode(b"someone:pa55word").decode()
    assert secret.encode() in proxy.requests[0]
    assert [word for word in ("pa55word", secret) if word in result.message] == []


def test_verbose_has_a_line_for_each_request_and_retry(cli: InProcess, serve: Serve) -> None:
    body = STATUS + b" " * 1234
    server = serve(answer(b"{}", "404 Not Found"), raw(failure(503)), reset(), answer(body))
    result = cli("-v", "runs", at=server)
    assert (result.code, len(server.requests)) == (0, 4)
    told = [re.sub(r"[0-9.]+ m?s\b", "TIME", line) for line in result.message.splitlines()]
    start = f"bus-containers: GET {server.url}/api/v1/containers"
    assert f"{start}/runs: 404, 2 bytes, TIME" in told
    assert f"{start}/status: 200, {len(body):,} bytes, TIME" in told
    again = [line for line in told if re.search("again|retr", line)]
    assert len(again) >= 2
    assert "503" in again[0]


def test_trace_shows_the_headers_of_both_sides(cli: InProcess, api: Api) -> None:
    api.sends(message(DOCUMENT, "200 OK", "X-Deployment: seven", f"X-Echo: {CANARY}"))
    plain = cli("-v", *RUN, at=api)
    assert re.search("(?i)x-deployment|user-agent", plain.message) is None
    for options in (["-vv"], ["-v", "-v"], ["--trace"], ["--trace", "-v"]):
        api.requests.clear()
        traced = cli(*options, *RUN, at=api)
        head = api.requests[0].partition(b"\r\n\r\n")[0].decode().splitlines()
        head = [re.sub("(?i)^(authorization): .*", r"\1: [redacted]", line) for line in head]
        sent = re.findall("(?m)^bus-containers: > (.*)$", traced.message)
        assert sent == head
        assert any(line.startswith("User-Agent: bus-containers/1.") for line in sent)
        came = "\n".join(re.findall("(?m)^bus-containers: < (.*)$", traced.message))
        for said in ("200 OK", "X-Deployment: seven", "X-Echo: [redacted]"):
            assert said in came
        assert (traced.code, traced.out) == (plain.code, plain.out)


# --- status --wait ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", tiers([401, 402, 403, 404], 402))
def test_wait_does_not_wait_where_it_is_in_vain(status: int, cli: InProcess, api: Api) -> None:
    api.sends(failure(429), failure(status))
    result = cli("status", "--wait", "60s", at=api)
    check_failure(result, 1, f"{status} a_type")
    assert len(api.requests) == 2
    assert result.seconds < 20


# --- --error-format json ------------------------------------------------------------------------

FIELDS = {"status", "type", "message", "action", "command", "document", "retryable"}


def check_object(one: dict[str, Any], **expected: object) -> None:
    assert one.keys() >= FIELDS
    assert isinstance(one["retryable"], bool)
    assert {name: one.get(name) for name in expected} == expected


def test_an_answer_of_the_api_as_an_object(cli: InProcess, api: Api) -> None:
    api.sends(message(json.dumps(QUOTA).encode(), "402 Payment Required"))
    [one] = cli("--error-format", "json", *RUN, at=api).objects
    check_object(one, kind="api", status=402, document=QUOTA, **SAID)
    api.sends(message(b"<html>Gateway</html>", "400 Bad Request"))
    [one] = cli("--error-format", "json", *RUN, at=api).objects
    nothing = dict.fromkeys(("type", "action", "command", "document"))
    check_object(one, kind="api", status=400, message=one["text"], **nothing)


# Promise 4.5. For a run, only what did not start one.
RETRYABLE = {400: False, 401: False, 402: False, 403: False, 404: False, 408: True, 409: False,
             413: False, 425: True, 429: True, 500: True, 501: False, 502: True, 503: True,
             504: True, 520: True, 522: True, 524: True, 300: False, 301: False}  # fmt: skip


GATEWAYS = (502, 503, 504)  # of which a DELETE is sent again, after a second or so


@pytest.mark.parametrize("status", tiers(RETRYABLE, *({*RETRYABLE} - {*GATEWAYS}), 503))
def test_which_answers_are_retryable(status: int, cli: InProcess, api: Api) -> None:
    api.sends(failure(status))
    [one] = cli("--error-format", "json", "delete", "run-1", at=api).objects
    assert (one["status"], one["retryable"]) == (status, RETRYABLE[status])
    [one] = cli("--error-format", "json", *RUN, at=api).objects
    assert one["run_state"] == ("unknown" if status >= 500 else "refused")
    assert one["retryable"] is (RETRYABLE[status] and status < 500)


def test_an_object_of_kind_run(cli: InProcess, api: Api) -> None:
    """Promise 3.20: the closing line of the format text is an object, too."""
    document = {**json.loads(DOCUMENT), "exit_code": 37, "duration_ms": 7, "stderr": ""}
    line = ("--error-format", "json", "-f", "text", *RUN)
    result = cli(*line, at=api.answers(document))
    [one] = result.objects
    assert (result.code, result.out, one["kind"]) == (37, b"OK", "run")
    assert {name: one[name] for name in ("run_id", "exit_code", "duration_ms")} == {
        "run_id": "run-1", "exit_code": 37, "duration_ms": 7,
    }  # fmt: skip
    result = cli(*line, at=api.answers({"run_id": "run-1", "stdout": "OK"}))
    assert (result.code, result.out) == (125, b"OK")
    assert [one["kind"] for one in result.objects][-1] == "protocol"


def test_the_closing_line_says_only_what_is_known(cli: InProcess, api: Api) -> None:
    for document in ({}, {"run_id": "run-1"}, {"exit_code": None}, {"duration_ms": 7}):
        result = cli("-f", "text", *RUN, at=api.answers({"stdout": "x", **document}))
        assert (result.code, result.out) == (125, b"x")
        assert re.search(r"None|null ms|code *after|after *ms|  ", result.message) is None


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_interruption_as_an_object(
    number: signal.Signals, code: int, program: Program, serve: Serve
) -> None:
    server = serve(silent())
    with program.start("--error-format", "json", *RUN, at=server) as process:
        assert server.reached.wait(LIMIT)
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode in (code, -number), out) == (True, b"")
    [one] = Result(code, out, err, 0).objects
    check_object(one, kind="interrupted", run_state="unknown", retryable=False)


@pytest.mark.parametrize(
    "line",
    [
        "--error-format json --bogus status", "--error-format=json status --bogus",
        "status --bogus --error-format json", "status --bogus --error-format=json",
        "--error-format json", "--error-format json run --image",
        "--error-format text --error-format json nonsense",
    ],
)  # fmt: skip
def test_usage_error_as_an_object_wherever_the_option_stands(line: str, cli: InProcess) -> None:
    result = cli(*line.split())
    assert (result.code, result.out) == (2, b"")
    [one] = result.objects
    check_object(one, kind="usage", retryable=False)


@pytest.mark.parametrize(
    "line",
    [
        "--error-format text --bogus status", "--error-format xml status", "--error-format",
        "run echo --error-format json", "run -- --error-format=json",
        "--error-format json --error-format text nonsense",
    ],
)  # fmt: skip
def test_error_as_text(line: str, cli: InProcess) -> None:
    assert check_failure(cli(*line.split()), 125 if line.startswith("run") else 2)


@pytest.mark.parametrize("argument", [b"\xff", "\u00e4\ud800".encode("utf-8", "surrogatepass")])
def test_an_argument_that_is_not_utf_8_as_an_object(argument: bytes, program: Program) -> None:
    result = program("--error-format", "json", "run", "--", argument)
    [error] = result.objects
    assert (result.code, error["kind"], error["run_state"]) == (2, "usage", "not_sent")
    assert "argument 5" in error["text"]


def test_warnings_as_objects(cli: InProcess, serve: Serve) -> None:
    proxy = serve(answer(DOCUMENT.replace(b"OK", b"\xff")))
    env: Env = {
        "BUS_AI_API_URL": "http://platform.example",
        "BUS_AI_TOKEN": CANARY,
        "HTTP_PROXY": proxy.url,
    }
    line = "--error-format json --timeout 9s run --timeout-seconds 9 -- true"
    result = cli(*line.split(), env=env)
    assert result.code == 0
    assert [one["kind"] for one in result.objects] == ["warning"] * 3
    text = "\n".join(one["message"] for one in result.objects)
    for fragment in ("http://platform.example", "--timeout-seconds", "U+FFFD"):
        assert fragment in text


def test_verbose_and_trace_as_objects(cli: InProcess, serve: Serve) -> None:
    result = cli("--error-format", "json", "-vv", "status", at=serve(reset(), answer(STATUS)))
    assert result.code == 0
    assert {one["kind"] for one in result.objects} == {"verbose", "trace"}
    kinds = {one["message"][:2]: one["kind"] for one in result.objects}
    assert (kinds["> "], kinds["AP"], kinds["GE"]) == ("trace", "verbose", "verbose")


def test_one_object_for_each_failed_delete(cli: InProcess, api: Api) -> None:
    api.sends(
        failure(404, type="not_found", message="no a"),
        message(b'{"deleted":true,"run_id":"b"}'),
        failure(403, type="forbidden", message="no c"),
    )
    result = cli("--error-format", "json", "delete", "a", "b", "c", at=api)
    assert (result.code, len(api.requests)) == (1, 3)
    assert result.document == [{"deleted": True, "run_id": "b"}]
    first, second = result.objects
    check_object(first, kind="api", status=404, type="not_found", message="no a")
    check_object(second, kind="api", status=403, type="forbidden", message="no c")


# --- timeouts that disagree -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeout", "seconds", "warned"),
    [
        ("10s", "10", True), ("9s", "10", True), ("1m30s", "90", True), ("9.999s", "10", True),
        ("10.5s", "10", False), ("11s", "10", False), ("1h", "10", False), ("0", "10", False),
        ("10s", "0", False), ("10s", None, False), (None, "10", False), (None, "3600", False),
    ],
)  # fmt: skip
def test_timeouts_that_disagree(
    timeout: str | None, seconds: str | None, warned: bool, cli: InProcess, api: Api
) -> None:
    options = ["--timeout", timeout] if timeout else []
    options += ["--timeout-seconds", seconds] if seconds else []
    result = cli("run", *options, "--", "true", at=api)
    assert (result.code, len(api.requests)) == (0, 1)
    told = result.spoken
    assert told.errors == []
    assert len(result.err.splitlines()) == len(told.warnings) == int(warned)
    for warning in told.warnings:
        assert re.search(r"--timeout(?!-)", warning)
        assert f"--timeout-seconds {seconds}" in warning
    assert cli("-q", "run", *options, "--", "true", at=api).err == b""


# --- whole lines ----------------------------------------------------------------------------------


class Line(NamedTuple):
    """A command line, what it meets, its exit code, and standard error to the letter.

    AT stands for the URL and path of the API, ADVICE and NEW for the two sentences below. As an
    object an error says the same, its kind, its run_state (of a run) and whether it is retryable.
    """

    words: str
    script: Script | None  # None: nobody listens
    code: int
    told: str
    text: str
    env: Env = {}


ADVICE = (
    "the run may still be executing and counting against the quota: look with"
    " `bus-containers runs`, end it with `bus-containers delete RUN_ID`"
)
USED_UP = failure(
    402, type="quota_exceeded", message="the container runtime of this month is used up",
    action="upgrade_plan", command="bus billing setup", recommended_plan="large", usage=usage(),
)  # fmt: skip
CLOSING = b'{"run_id":"run-1","exit_code":37,"duration_ms":13}'
WHOLE: list[Line] = [
    Line("--bogus runs", None, 2, "usage", "no such option: --bogus; SEE"),
    Line("bogus", None, 2, "usage",
         "unknown command 'bogus': use one of status, run, runs, delete, help; SEE"),
    Line("", None, 2, "usage", "no command: use one of status, run, runs, delete, help; SEE"),
    Line("delete", None, 2, "usage",
         "missing argument: bus-containers [OPTION...] delete RUN_ID...; SEE"),
    Line("run", None, 2, "usage not_sent",
         "missing argument: bus-containers [OPTION...] run [--] COMMAND [ARG...]; SEE"),
    Line("status x", None, 2, "usage", "status does not take the argument 'x'; SEE"),
    Line("run --profile a --image b true", None, 2, "usage not_sent",
         "--profile and --image exclude each other; SEE"),
    Line("-q -v runs", None, 2, "usage",
         "--quiet and --verbose or --trace exclude each other; SEE"),
    Line("runs --format xml", None, 2, "usage", "--format: 'xml' is not json or text or tsv; SEE"),
    Line("run --timeout-seconds 1.5 true", None, 2, "usage not_sent",
         "--timeout-seconds: '1.5' is not a whole number >= 0; SEE"),
    Line("--timeout 30 runs", None, 2, "usage", "--timeout: '30' has no unit: try `30s`; SEE"),
    Line("--timeout soon runs", None, 2, "usage",
         "--timeout: 'soon' is not a duration: try `30s` or `1h30m`; SEE"),
    Line("runs", None, 2, "usage",
         "BUS_AI_API_URL: 'platform.test' is not "
         "http[s]://HOST[:PORT][/PREFIX], in ASCII, without "
         "user, query or fragment: write "
         "https://platform.test, or http://platform.test "
         "for plain HTTP; SEE", {"BUS_AI_API_URL": "platform.test"}),
    Line("--api-url http://a@b runs", None, 2, "usage",
         "--api-url: 'http://***@b' is not http[s]://HOST[:PORT][/PREFIX], in ASCII, without "
         "user, query or fragment; SEE"),
    Line("runs --output=", None, 2, "usage", "--output: the value is empty; SEE"),
    Line("run --image= true", None, 2, "usage not_sent", "--image: the value is empty; SEE"),
    Line("delete ..", None, 2, "usage",
         "'..' is not a run's id; `bus-containers runs` lists them; SEE"),
    Line("runs", None, 1, "config",
         "no token: looked at --token-file, BUS_AI_TOKEN, BUS_API_TOKEN, "
         "HOME/.config/bus/auth/api-token; NEW", {"BUS_AI_TOKEN": None}),
    Line("runs", None, 1, "config",
         "the token in BUS_AI_TOKEN holds a character that is not "
         "visible ASCII", {"BUS_AI_TOKEN": "two words"}),
    Line("run true", None, 125, "config not_sent",
         "the token in BUS_AI_TOKEN starts with `Bearer`: leave "
         "that word out", {"BUS_AI_TOKEN": "Bearer x"}),
    Line("--token-file /no/such runs", None, 1, "config", "no token: /no/such does not exist; NEW"),
    Line("-C /no/such run true", None, 125, "config not_sent",
         "--chdir /no/such: No such file or directory"),
    Line("-o /no/such/file runs", None, 1, "output",
         "cannot write to /no/such/file: No such file or directory"),
    Line("-o /dev/full runs", answer(STATUS), 1, "output",
         "cannot write to /dev/full: No space left on device; the result is on standard output"),
    Line("delete run-1", None, 1, "transport retryable",
         "DELETE AT/runs/run-1: cannot connect to the API: Connection refused; check "
         "BUS_AI_API_URL; `bus-containers status --wait 60s` waits for a platform"),
    Line("run true", None, 125, "transport not_sent retryable",
         "POST AT/runs: cannot connect to the API: Connection refused; check BUS_AI_API_URL; "
         "`bus-containers status --wait 60s` waits for a platform"),
    Line("run true", reset(), 125, "transport unknown",
         "POST AT/runs: the connection was lost: Connection reset by peer; is this port for "
         "https?; ADVICE"),
    Line("run true", close(), 125, "transport unknown",
         "POST AT/runs: the connection was lost: Remote end closed connection without response; "
         "is this port for https?; ADVICE"),
    Line("run true", raw(message(DOCUMENT, length=999)), 125, "transport unknown",
         "POST AT/runs: the connection was lost: the answer was cut short; ADVICE"),
    Line("runs", raw(b"SSH-2.0-x\r\n"), 1, "protocol",
         "GET AT/runs: the answer is not valid HTTP: SSH-2.0-x\\r\\n; is this port for https?"),
    Line("--timeout 100ms runs", silent(), 1, "deadline retryable",
         "GET AT/runs: no whole answer within 0.1 s; --timeout sets the limit"),
    Line("--timeout 100ms run true", silent(), 125, "deadline unknown",
         "POST AT/runs: no whole answer within 0.1 s; --timeout sets the limit; ADVICE"),
    Line("status --wait 100ms", answer(STARTING), 1, "deadline",
         "the platform is not ready after 0.1 s: the runner is starting"),
    Line("status --wait 100ms", raw(failure(503, message="warming up")), 1, "deadline",
         "the platform is not ready after 0.1 s: GET AT/status: HTTP 503 a_type: warming up"),
    Line("status --wait 100ms", None, 1, "deadline",
         "the platform is not ready after 0.1 s: GET AT/status: cannot connect to the API: "
         "Connection refused"),
    Line("status --wait 100ms", None, 1, "deadline",
         "the platform is not ready after 0.1 s: no token: looked at "
         "--token-file, BUS_AI_TOKEN, BUS_API_TOKEN, "
         "HOME/.config/bus/auth/api-token; NEW", {"BUS_AI_TOKEN": None}),
    Line("runs", answer(b"nonsense"), 1, "protocol",
         "GET AT/runs: HTTP 200, but the answer is not usable JSON: Expecting value: line 1 "
         "column 1 (char 0)"),
    Line("run true", answer(b"<html><title>Login</title></html>"), 125, "protocol unknown",
         "POST AT/runs: HTTP 200, but the answer is an HTML page: a captive portal, or not the "
         "API's URL?; ADVICE"),
    Line("run true", answer(), 125, "protocol unknown",
         "POST AT/runs: HTTP 200, but the answer is empty; ADVICE"),
    Line("run true", answer(b"[]"), 125, "protocol unknown",
         "POST AT/runs: HTTP 200, but the answer is of an unexpected type, list; ADVICE"),
    Line("runs", answer(b'{"items":7}'), 1, "protocol",
         "GET AT/runs: the answer lists no runs"),
    Line("status", answer(b"{}"), 1, "protocol",
         "GET AT/status: the answer says nothing"),
    Line("status", answer(b'{"error":{"message":"x"}}'), 1, "protocol",
         "GET AT/status: HTTP 200, but the answer is an error: x"),
    Line("runs", answer(b"{}", "206 Partial Content"), 1, "protocol",
         "GET AT/runs: HTTP 206, but that is not the status of a whole answer"),
    Line("runs", answer(b'{"a":' * 200 + b"1" + b"}" * 200), 1, "protocol",
         "GET AT/runs: the answer lists no runs"),
    Line("runs", answer(b'{"a":' * 201 + b"1" + b"}" * 201), 1, "protocol",
         "GET AT/runs: HTTP 200, but the answer is not usable JSON: it is nested more than 200 "
         "deep"),
    Line("runs", answer(b'{"a":' + b"1" * 4301 + b"}"), 1, "protocol",
         "GET AT/runs: HTTP 200, but the answer is not usable JSON: it has a number of more "
         "than 4,300 digits"),
    Line("runs", answer(b'{"a":NaN}'), 1, "protocol",
         "GET AT/runs: HTTP 200, but the answer is not usable JSON: NaN is not a number in JSON"),
    Line("delete run-1", answer(b'{"deleted":false}'), 1, "protocol",
         "DELETE AT/runs/run-1: the answer does not say that the run run-1 is deleted"),
    Line("run true", answer(b'{"run_id":"r","exit_code":null}'), 125, "protocol finished",
         "the exit_code of the run r is not an integer: null"),
    Line("run true", raw(message(b"", "300 Multiple Choices")), 125, "api refused",
         "POST AT/runs: HTTP 300 Multiple Choices; redirected to nowhere, not followed; check "
         "BUS_AI_API_URL"),
    Line("run true", raw(message(b"", "307 No", "Location: http://x.test/")), 125, "api refused",
         "POST AT/runs: HTTP 307 No; redirected to http://x.test/, not followed; check "
         "BUS_AI_API_URL"),
    Line("run true", raw(failure(400)), 125, "api refused",
         "POST AT/runs: HTTP 400 a_type: a sentence"),
    Line("run true", raw(failure(401, type="invalid_auth")), 125, "api refused",
         "POST AT/runs: HTTP 401 invalid_auth: a sentence; the token is not a JWT, so what it "
         "allows cannot be seen here; NEW"),
    Line("run true", raw(USED_UP), 125, "api refused",
         "POST AT/runs: HTTP 402 quota_exceeded: the container runtime of this month is used up; "
         "3,600 of 3,600 container runtime seconds used this month; recommended plan: large; "
         "action: upgrade_plan; run: bus billing setup"),
    Line("--api-url URL/api/v1 status", raw(failure(404)), 1, "api",
         "GET URL/api/v1/api/v1/containers/status: HTTP 404 a_type: a sentence; --api-url ends "
         "in a part of the API's path: give its origin alone"),
    Line("run true", raw(message(b"{}", "429 Slow Down", "Retry-After: 120")), 125,
         "api refused retryable",
         "POST AT/runs: HTTP 429 Slow Down; Retry-After: 120"),
    Line("delete run-1", raw(failure(500)), 1, "api retryable",
         "DELETE AT/runs/run-1: HTTP 500 a_type: a sentence"),
    Line("run true", raw(failure(503)), 125, "api unknown",
         "POST AT/runs: HTTP 503 a_type: a sentence; ADVICE"),
    Line("run true", html("502 Bad Gateway", "x"), 125, "api unknown",
         "POST AT/runs: HTTP 502 Bad Gateway; ADVICE"),
    Line("run true", html("413 Too Large", "x"), 125, "api refused",
         "POST AT/runs: HTTP 413 Too Large"),
    Line("run --timeout 5s --timeout-seconds 9 true", answer(DOCUMENT), 0, "warning",
         "warning: --timeout 5s is not longer than --timeout-seconds 9: the answer may come too "
         "late"),
    Line("run true", answer(DOCUMENT.replace(b"OK", b"\xff")), 0, "warning",
         "warning: the answer is not all UTF-8: what is not became U+FFFD"),
    Line("run -f text true", answer(CLOSING), 37, "run",
         "run run-1 ended with exit code 37 after 13 ms"),
    Line("run ls", answer(b'{"run_id":"r","exit_code":127}'), 127, "warning",
         "warning: the container could not start 'ls'; an image is named by --image, a profile "
         "by --profile"),
    Line("run ./x", answer(b'{"run_id":"r","exit_code":126}'), 126, "warning",
         "warning: the container could not start './x'; an image is named by --image, a profile "
         "by --profile"),
]  # fmt: skip


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case.told.split()[0]}-{case.words}")
def test_the_whole_line(case: Line, cli: InProcess, serve: Serve) -> None:
    server = serve(case.script or silent())
    with refused_port() as port:
        url = server.url if case.script else f"http://127.0.0.1:{port}"
        env: Env = {"BUS_AI_API_URL": url, "BUS_AI_TOKEN": "opaque", **case.env}
        words = case.words.replace("URL", url).split()
        result = cli(*words, env=env)
        [one] = cli("--error-format", "json", *words, env=env).objects
    text = result.message.replace(url, "URL").replace(str(cli.home), "HOME")
    text = text.replace("URL/api/v1/containers/", "AT/").replace(ADVICE, "ADVICE")
    text = text.replace(f"make one with: {NEW_TOKEN}", "NEW")
    text = re.sub("; see `bus-containers [a-z ]*--help`$", "; SEE", text)
    assert text == f"bus-containers: {case.text}\n"
    assert result.code == case.code
    kind, *state = case.told.split()
    assert one["kind"] == kind
    assert one["text"] in result.message
    if kind not in ("warning", "run"):
        check_object(one, retryable="retryable" in state)
        assert one.get("run_state") == next((word for word in state if word != "retryable"), None)
        assert ("run_state" in one) is ("run" in words)
