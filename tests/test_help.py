# SPDX-License-Identifier: MIT
"""Help for people and machines, and the rows that it is made of: promises 3.2, 4.2, 5.1 to 5.4.

`snapshot.txt` beside this file holds the help pages, the OpenCLI document and the public
signatures as they are meant to be. After a change that is meant, look at the difference that the
test shows, and renew it:

    .venv/bin/python tests/test_help.py
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bus_containers
from hostile import Api, Connection, Hostile
from support import (
    CANARY,
    LIMIT,
    ROOT,
    Env,
    InProcess,
    Program,
    Terminal,
    all_commands,
    failure_code,
    opencli,
    options_of,
    python,
    second_tier,
    tiers,
    variables,
    words,
)

SNAPSHOT = Path(__file__).with_name("snapshot.txt")
RENEW = "; if this is meant: .venv/bin/python tests/test_help.py"
SECTIONS = [
    "NAME", "SYNOPSIS", "DESCRIPTION", "COMMANDS", "OPTIONS", "ENVIRONMENT", "EXIT STATUS",
    "EXAMPLES", "SEE ALSO",
]  # fmt: skip
MOST_LINES = 2_950
Document = dict[str, Any]

# --- the snapshot -----------------------------------------------------------------------------


def page(cli: InProcess, *topic: str) -> str:
    result = cli("help", *topic)
    assert (result.code, result.err) == (0, b""), result
    return result.out.decode("ascii")


def document_lines(document: Document) -> Iterator[str]:
    """The document, a row per line; a row that several commands have is written once."""
    rows: dict[str, list[str]] = {}
    for command in document["commands"]:
        for key, value in command.items():
            for row in value if isinstance(value, list) else [value]:
                rows.setdefault(f"{key} {json.dumps(row)}", []).append(command["name"])
    yield json.dumps([document["opencli"], document["info"]])
    yield from (f"{' '.join(names)}: {row}" for row, names in rows.items())
    for name, value in document["metadata"].items():
        for key, part in value.items():
            for row in part if key == "variables" else [part]:
                yield f"{name}: {key} {json.dumps(row)}"


def signature(name: str, function: Callable[..., object]) -> str:
    """A signature that every Python writes alike; annotations stand as they do in the source."""
    words, star = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            star = True
            words.append("*")
        hint = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        value = parameter.default
        plain = value is None or isinstance(value, (str, int, float, tuple))
        shown = repr(value) if plain else f"a live {type(value).__name__}"  # may hold a secret
        default = "" if value is parameter.empty else f" = {shown}"
        words.append(f"{parameter.name}{hint}{default}")
    returned = inspect.signature(function).return_annotation
    shown = "" if returned is inspect.Signature.empty else f" -> {returned}"
    return f"{name}({', '.join(words)}){shown}"


def public_lines() -> Iterator[str]:
    for name in sorted(bus_containers.__all__):
        thing = getattr(bus_containers, name)
        if not inspect.isclass(thing):
            yield signature(name, thing)
            continue
        yield f"class {name}({', '.join(base.__name__ for base in thing.__bases__)})"
        for method in sorted(vars(thing)):
            value = getattr(thing, method)
            if method == "__init__" or (not method.startswith("_") and callable(value)):
                yield f"    {signature(method, value)}"


def whole_contract(cli: InProcess) -> list[str]:
    lines = []
    for topic in ((), *((name,) for name in all_commands())):
        lines += [f"==== {' '.join(('help', *topic))}", *page(cli, *topic).splitlines()]
    lines += ["==== help --format opencli", *document_lines(opencli())]
    return [*lines, "==== public names", *public_lines()]


def test_snapshot(cli: InProcess) -> None:
    expected, found = SNAPSHOT.read_text("utf-8").splitlines(), whole_contract(cli)
    section = ""
    for number, (old, new) in enumerate(zip([*expected, ""], [*found, ""]), 1):
        section = new if new.startswith("====") else section
        assert new == old, f"snapshot.txt:{number}: {section.strip('= ')} has changed{RENEW}"
    assert len(found) == len(expected), RENEW


# --- a decoder as strict as Go's encoding/json with typed structs ------------------------------

# What bus-help and bus-configure decode into. Each object has exactly these fields.
GO: dict[str, dict[str, Any]] = {
    "Document": {"opencli": str, "info": "Info", "commands": ["Command"], "metadata": "Metadata"},
    "Info": dict.fromkeys(("title", "version", "summary", "description"), str),
    "Command": {
        "name": str, "summary": str, "description": str, "usage": str, "arguments": ["Argument"],
        "options": ["Option"], "exitCodes": ["ExitCode"], "examples": ["Example"],
    },
    "Argument": {"name": str, "description": str, "required": bool, "repeatable": bool},
    "Option": {
        "name": str, "aliases": [str], "description": str, "valueName": str, "required": bool,
        "repeatable": bool, "default": str,
    },
    "ExitCode": {"code": int, "description": str},
    "Example": {"summary": str, "command": str},
    "Metadata": {"io.busdk.profile": "Profile", "io.busdk.environment": "Environment"},
    "Profile": {"version": str, "module": str},
    "Environment": {"version": str, "precedence": [str], "variables": ["Variable"]},
    "Variable": {
        "name": str, "description": str, "required": bool, "secret": bool, "default": str,
        "schema": "Schema", "safeHandling": "SafeHandling", "affects": [str],
    },
    "Schema": {"type": str},
    "SafeHandling": dict.fromkeys(("printable", "storeInDotenv", "redactInLogs"), bool),
}  # fmt: skip


def no_name_twice(pairs: list[tuple[str, Any]]) -> Document:
    assert len(dict(pairs)) == len(pairs), [name for name, _ in pairs]
    return dict(pairs)


def undecodable(value: Any, kind: Any, path: str = "") -> Iterator[str]:
    """What Go would refuse: each value that is not of the type of its field, with its path."""
    if isinstance(kind, list):
        if type(value) is not list:
            yield f"{path} is not a list"
            return
        for number, one in enumerate(value):
            yield from undecodable(one, kind[0], f"{path}.{number}")
    elif isinstance(kind, str):
        if type(value) is not dict or value.keys() != GO[kind].keys():
            yield f"{path} is not a {kind}"
            return
        for name, one in value.items():
            yield from undecodable(one, GO[kind][name], f"{path}.{name}")
    elif type(value) is not kind or (kind is int and abs(value) >= 1 << 63):
        yield f"{path} is not {kind.__name__}"


def leaves(value: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Where each string, number and boolean of a document stands: container, key, path."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(one, (dict, list)):
            yield from leaves(one, f"{path}.{key}")
        else:
            yield value, key, f"{path}.{key}"


def test_go_programs_can_decode_the_document(cli: InProcess) -> None:
    text = cli("help", "--format", "opencli").out.decode("utf-8")
    document = json.loads(text, object_pairs_hook=no_name_twice)
    check_none(list(undecodable(document, "Document")))


@pytest.mark.parametrize("wrong", ["0", 0, 1.0, True, None, [], {}], ids=repr)
def test_the_decoder_is_strict(wrong: Any) -> None:
    document = copy.deepcopy(opencli())
    one_of_each = {re.sub(r"\.\d+", ".N", row[2]): row for row in leaves(document)}
    assert ".commands.N.exitCodes.N.code" in one_of_each
    for container, key, path in one_of_each.values():
        right = container[key]
        container[key] = wrong
        complaints = [line for line in undecodable(document, "Document") if line.startswith(path)]
        assert bool(complaints) is (type(right) is not type(wrong)), path
        container[key] = right


# --- the rows of the tables ---------------------------------------------------------------------


def check_none(problems: Sequence[str], about: str = "") -> None:
    """Every problem is shown whole."""
    assert not problems, "\n".join([about, *problems])


def rows_of(document: Document) -> Iterator[tuple[str, Document]]:
    """Every row that the document is made from, with the name of its table."""
    for command in document["commands"]:
        yield "commands", command
        for key in ("arguments", "options", "exitCodes", "examples"):
            yield from ((f"{key} of {command['name']}", row) for row in command[key])
    for row in document["metadata"]["io.busdk.environment"]["variables"]:
        yield "variables", row


def mistakes(document: Document, pages: Sequence[str]) -> list[str]:
    """What is wrong with a row, and which row it is."""
    lines = [line for text in pages for line in text.splitlines()]
    found = [f"too wide by {len(line) - 80}: {line!r}" for line in lines if len(line) > 80]
    text = " ".join(" ".join(pages).split())
    names: set[tuple[str, object]] = set()
    for table, row in rows_of(document):
        own = [row.get("name", row.get("code", row.get("command"))), *row.get("aliases", ())]
        found += [f"{table}: {name} is there twice" for name in own if (table, name) in names]
        names.update((table, name) for name in own)
        for key in {"description", "summary"} & row.keys():
            if not row[key].strip():
                found.append(f"{table}: {own[0]} has no {key}")
            elif table == "variables" or table.startswith("options"):
                found += [f"{table}: the help of {own[0]} is on no page"] * (row[key] not in text)
        if table.startswith("options"):
            wrong = [one for one in own if not re.fullmatch("--[a-z]+(-[a-z]+)*|-[A-Za-z]", one)]
            found += [f"{table}: {one!r} is not the name of an option" for one in wrong]
            found += [f"{table}: {own[0]} has a default, and no value"] * (
                row["default"] > row["valueName"] == ""
            )
        if table == "variables":
            wrong = [one for one in own if not re.fullmatch("[A-Z_][A-Z0-9_]*", one)]
            found += [f"{table}: {one!r} is not the name of a variable" for one in wrong]
            found += [f"{table}: {own[0]} affects nothing"] * (not row["affects"])
    return found


def all_pages(cli: InProcess) -> list[str]:
    return [page(cli), *(page(cli, name) for name in all_commands())]


def test_no_row_has_a_mistake(cli: InProcess) -> None:
    check_none(mistakes(opencli(), all_pages(cli)))


PLANTED: dict[str, tuple[str, Document, str]] = {
    "no-help": ("options of run", {"description": " "}, "NAME has no description"),
    "no-summary": ("commands", {"summary": ""}, "commands: NAME has no summary"),
    "help-on-no-page": ("options of run", {"description": "x y"}, "the help of NAME is on no page"),
    "name-twice": ("options of runs", {"name": "--help"}, "options of runs: --help is there twice"),
    "alias-twice": ("options of runs", {"aliases": ["-v"]}, "options of runs: -v is there twice"),
    "code-twice": ("exitCodes of run", {"code": 2}, "exitCodes of run: 2 is there twice"),
    "variable-twice": ("variables", {"name": "NO_PROXY"}, "variables: NO_PROXY is there twice"),
    "not-an-option": ("options of runs", {"name": "-wait"}, "'-wait' is not the name of an option"),
    "not-a-variable": ("variables", {"name": "no_color"}, "'no_color' is not the name of a var"),
    "a-flag": ("options of run", {"default": "1", "valueName": ""}, "NAME has a default, and no"),
    "affects-nothing": ("variables", {"affects": []}, "variables: NAME affects nothing"),
}


@pytest.mark.parametrize(("table", "changes", "told"), PLANTED.values(), ids=PLANTED)
def test_a_mistake_in_a_row_is_named(
    table: str, changes: Document, told: str, cli: InProcess
) -> None:
    document, pages = copy.deepcopy(opencli()), all_pages(cli)
    row = [row for title, row in rows_of(document) if title == table][-1]
    told = told.replace("NAME", str(row.get("name")))
    row.update(changes)
    assert told in "\n".join(mistakes(document, pages))
    assert "too wide by 3: ' " in mistakes(opencli(), [" " + "x" * 82])[0]


def section(text: str, heading: str) -> str:
    """A section of a page, without its heading."""
    found = re.search(rf"(?ms)^{heading}$(.*?)(?=^[A-Z]|\Z)", text)
    assert found, heading
    return found[1]


def test_pages_are_plain_and_have_their_sections_in_order(cli: InProcess) -> None:
    for topic in ((), *((name,) for name in all_commands())):
        text = page(cli, *topic)
        assert re.search(r"[^ -~\n]| \n|\n\n\n|\n\n\Z", text) is None
        found = re.findall(r"(?m)^[A-Z].*$", text)
        assert found == [heading for heading in SECTIONS if heading in found], topic
        assert {"NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "EXAMPLES"} <= {*found}
        assert topic or found == SECTIONS
        assert not topic or len(text.splitlines()) <= 45
    whole = page(cli)
    for option in (option for name in all_commands() for option in options_of(name)):
        names = ", ".join([*option.aliases, option.name])
        value = f" {re.escape(option.value)}" if option.value else ""
        assert re.search(rf"(?m)^ +{names}{value}(  +\S|$)", section(whole, "OPTIONS")), option
    for row in variables():
        assert re.search(rf"(?m)^ +{row['name']} +\S", section(whole, "ENVIRONMENT")), row["name"]
    for name in all_commands():
        assert re.search(rf"(?m)^ +{name} +\S", section(whole, "COMMANDS")), name
        assert re.search(rf"(?m)^ +bus-containers .*\b{name}\b", section(whole, "SYNOPSIS")), name
        own = page(cli, name)
        assert f"bus-containers {name} - " in section(own, "NAME")
        assert f"bus-containers {name}" in section(own, "EXAMPLES")


def test_the_document_says_what_was_promised() -> None:
    """The snapshot holds all of it; this is what may not change with it."""
    document = opencli()
    assert document["info"]["version"] == bus_containers.__version__
    assert document["metadata"]["io.busdk.profile"] == {"version": "0.1", "module": "containers"}
    assert all_commands() == ["status", "run", "runs", "delete", "help"]
    for command in document["commands"]:
        name = command["name"]
        codes = {row["code"]: row["description"] for row in command["exitCodes"]}
        assert set(codes) >= ({0, 2, 125, 130, 143} if name == "run" else {0, 1, 2}), name
        assert (1 in codes) is (name != "run")
        if name == "run":  # the container's own code has no number
            assert "own exit code" in codes[0]
            assert "command" in codes[125]
        commands = [example["command"] for example in command["examples"]]
        assert commands, name
        assert [one for one in commands if not one.startswith(f"bus-containers {name}")] == []
        assert not any(option["required"] for option in command["options"]), name


# What nothing in the API can do, and what to do instead; and what would surprise.
SAID_ON_A_PAGE = {
    "run": ["file", "environment", "standard input", "sh -c", "image"],
    "": ["quiet"],
}


@pytest.mark.parametrize("topic", SAID_ON_A_PAGE)
def test_what_it_cannot_do_is_said(topic: str, cli: InProcess) -> None:
    text = " ".join(page(cli, *filter(None, [topic])).split())
    assert [words for words in SAID_ON_A_PAGE[topic] if words not in text] == []
    [quiet] = [row for row in opencli()["commands"][1]["options"] if row["name"] == "--quiet"]
    assert "result" in quiet["description"]


# --- what is documented works, what works is documented ------------------------------------------


class Effect(NamedTuple):
    """A command line without and with an option, which do not do the same."""

    without: str
    added: str
    first: bool = False  # the option's place is before the other words
    answer: tuple[str, str] = ("200 OK", "")  # status and body; a proper one without a body
    alias: str = ""


FAILS = ("404 Not Found", "{}")
STARTING = ("200 OK", '{"items": [{"id": "a", "state": "starting"}]}')
EFFECTS = {
    "--help": Effect("runs", "--help"),
    "--version": Effect("runs", "--version"),
    "--api-url": Effect("runs", "--api-url=URL/more"),
    "--token-file": Effect("runs", "--token-file=token"),
    "--timeout": Effect("runs", "--timeout=1ns"),
    "--chdir": Effect("runs -o out", "--chdir=sub"),
    "--output": Effect("runs", "--output=out"),
    "--format": Effect("runs", "--format=tsv"),
    "--quiet": Effect("runs", "--quiet"),
    "--verbose": Effect("runs", "--verbose"),
    "--trace": Effect("runs -v", "--trace"),
    "--color": Effect("delete run-1", "--color=always", answer=FAILS),
    "--no-color": Effect("--color=always delete run-1", "--no-color", answer=FAILS),
    "--error-format": Effect("delete run-1", "--error-format=json", answer=FAILS),
    "--wait": Effect("status", "--wait=1ms", answer=STARTING),
    "--profile": Effect("run true", "--profile=other", first=True),
    "--image": Effect("run true", "--image=alpine", first=True),
    "--timeout-seconds": Effect("run true", "--timeout-seconds=9", first=True),
}


def observe(cli: InProcess, api: Api, folder: Path, line: list[str], effect: Effect) -> object:
    """All that a command line does, as far as it can be seen from outside."""
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "token").write_text("another-token")
    status, body = effect.answer
    api.requests.clear()
    api.sends()
    if body:
        api.answers(body.encode(), status=status)
    result = cli(*line, at=api)
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in {*files} - {str(folder / "token")}:
        os.remove(path)
    return result[:3], list(api.requests), files


def test_every_option_has_code_behind_it(cli: InProcess, api: Api, folder: Path) -> None:
    """Promise 5.4: each row does something; and what is not in a row is not an option."""
    rows = {option.name: option for name in all_commands() for option in options_of(name)}
    check_none(sorted({*rows} - {*EFFECTS}), "say in EFFECTS what these options do:")
    check_none(sorted({*EFFECTS} - {*rows}), "in EFFECTS, but documented no more:")
    problems = []
    for name, effect in EFFECTS.items():
        before = effect.without.split()
        for spelling in (name, *rows[name].aliases):
            added = [effect.added.replace("URL", api.url)]
            if spelling != name:
                added = [spelling, *added[0].partition("=")[2:]] if "=" in added[0] else [spelling]
            after = [*added, *before] if effect.first else [*before, *added]
            plain, changed = (observe(cli, api, folder, line, effect) for line in (before, after))
            if plain == changed:
                problems.append(f"{spelling} changes nothing: `{' '.join(after)}`")
            if spelling == name:
                by_name = changed
            elif changed != by_name and name not in ("--verbose", "--trace"):
                problems.append(f"{spelling} is not {name}")
    check_none(problems)


def test_document_and_program_agree_which_command_takes_an_option(cli: InProcess) -> None:
    values = {"URL": "http://127.0.0.1:9", "DURATION": "1s", "N": "1", "DIR": ".", "FILE": "x"}
    problems = []
    rows = {name: {option.name: option for option in options_of(name)} for name in all_commands()}
    every = {option.name: option for own in rows.values() for option in own.values()}
    for name, own in rows.items():
        for option in every.values():
            value = own.get(option.name, option).value
            given = [values.get(one, one) for one in value.split("|")] if value else []
            rest = words(name)[1:]
            for line in ([f"{option.name}={one}" for one in given] if given else [option.name]):
                result = cli(line, name, *rest)
                if option.name in ("--help", "--version") or name == "help":
                    expected = 0
                else:
                    expected = failure_code(name)
                expected = expected if option.name in own else 2
                if result.code != expected:
                    problems.append(f"{line} {name}: exit {result.code}, not {expected}")
                if result.code == 2 and option.name not in result.message:
                    problems.append(f"{line} {name}: the message does not name the option")
            wrong = cli(name, f"{option.name}=x" if not value else option.name)
            if wrong.code != 2 or option.name not in wrong.message:
                problems.append(f"{name} {option.name}: a value more or less is not an error")
    check_none(problems)


class Reads(type(os.environ)):  # type: ignore[misc]
    """The environment, which keeps who read which variable."""

    def __init__(self) -> None:
        real = os.environ
        super().__init__(
            real._data, real.encodekey, real.decodekey, real.encodevalue, real.decodevalue  # type: ignore[attr-defined]
        )
        self.names: set[tuple[str, str]] = set()

    def __getitem__(self, name: str) -> str:
        frame = inspect.currentframe()
        while frame and frame.f_globals["__name__"] in ("os", "collections.abc", __name__):
            frame = frame.f_back
        self.names.add((str(frame and frame.f_globals.get("__name__")), name))
        return str(super().__getitem__(name))


def speaks_no_tls(connection: Connection) -> None:
    connection.await_data()
    connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.fixture
def reads(
    cli: InProcess, api: Api, serve: Callable[..., Hostile], monkeypatch: pytest.MonkeyPatch
) -> set[tuple[str, str]]:
    """The variables that are read by commands of every kind, and by whom."""
    server, recorder = serve(speaks_no_tls, scheme="https"), Reads()
    monkeypatch.setattr(os, "environ", recorder)
    for name in all_commands():
        cli("-v", *words(name), at=api)
        cli(*words(name), env={"BUS_AI_API_URL": server.url})
        cli("--timeout=1s", *words(name), at=server)
    with Terminal() as terminal:
        cli("bogus", stderr=terminal.end)
    proxied: Env = {"BUS_AI_API_URL": "http://127.0.0.2:1", "HTTP_PROXY": server.url[8:]}
    cli("--timeout=1ms", "status", env={**proxied, "BUS_AI_TOKEN": "x", "NO_PROXY": "*"})
    cli("status", env={"BUS_AI_API_URL": None, "BUS_API_BASE_URL": server.url})
    return recorder.names


OTHERS_READ = {"HOME", "TERM", "REQUEST_METHOD"}  # told in the text of a documented row


def test_every_variable_that_is_read_is_documented(
    reads: set[tuple[str, str]], cli: InProcess
) -> None:
    documented = {row["name"] for row in variables()}
    own = {name for module, name in reads if module in ("bus_containers", "__main__")}
    assert own, "nothing was seen"
    unknown = sorted(own - documented - OTHERS_READ - {name.lower() for name in documented})
    check_none(unknown, "read, and in no row of the variables:")
    text = section(page(cli), "ENVIRONMENT")
    assert [name for name in sorted(OTHERS_READ & own - {"HOME"}) if name not in text] == []


def test_every_documented_variable_is_read(reads: set[tuple[str, str]]) -> None:
    names = {name for _, name in reads}
    unread = [row["name"] for row in variables() if row["name"] not in names]
    check_none(unread, "documented, and nobody reads it:")


def test_a_variable_that_may_hold_a_secret_says_so() -> None:
    """Promise 5.3: found by what the program takes from it, not by its name."""
    problems = []
    for row in variables():
        name, found = row["name"], ""
        for value in (CANARY, f"http://user:{CANARY}@127.0.0.1:9"):
            try:
                found += bus_containers.resolve_token(None, {name: value})[0]
            except bus_containers.ConfigError:
                pass
            for scheme in ("http", "https"):
                try:
                    url = f"{scheme}://platform.test"
                    found += bus_containers.resolve_proxy(url, {name: value}) or ""
                except bus_containers.ConfigError:
                    pass
        secret = CANARY in found
        safe = row["safeHandling"]
        shown = {safe["printable"], safe["storeInDotenv"]}
        if {row["secret"], safe["redactInLogs"]} != {secret} or shown != {not secret}:
            problems.append(f"{name} is published as secret: {row['secret']}, {safe}")
    check_none(problems)
    assert sum(row["secret"] for row in variables()) >= 4


# --- one document, one page, whatever it is called ----------------------------------------------

SAME = {
    "help": ["--help", "-h", "--help --bogus", "--bogus --help", "-q -h", "--token x -h"],
    "help run": ["run --help", "run -h", "--help run", "run --bogus --help",
                 "run --image x -h -- true"],
    "help status": ["status --help", "status -h"],
    "help runs": ["runs --help", "runs -h"],
    "help delete": ["delete --help", "delete -h", "delete run-1 --help"],
    "help help": ["help --help", "help -h"],
    "--version": ["-V", "run -V", "-V --bogus"],
    "help --format opencli": [
        "--format opencli help", "help --format json", "help -f opencli", "help --format=opencli",
        "-f json help", "--color always help -f opencli", "-vv help --format opencli",
    ],
}  # fmt: skip


@pytest.mark.parametrize("line", SAME)
def test_help_by_other_words(line: str, cli: InProcess) -> None:
    expected = cli(*line.split())
    assert (expected.code, expected.err) == (0, b"")
    for other in SAME[line]:
        assert cli(*other.split())[:3] == expected[:3], other


def test_version(cli: InProcess) -> None:
    assert cli("--version").out == f"bus-containers {bus_containers.__version__}\n".encode()
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", bus_containers.__version__)


@pytest.mark.parametrize("line", ["run -- x --help", "run x --help", "run x -h", "run x -V"])
def test_help_for_the_containers_command_is_its_own(line: str, cli: InProcess, api: Api) -> None:
    result = cli(*line.split(), at=api)
    assert (result.code, api.methods()) == (0, ["POST"])
    assert json.loads(api.requests[0].partition(b"\r\n\r\n")[2])["args"][-1] == line.split()[-1]


@pytest.mark.parametrize(
    "line",
    [
        "help bogus", "help run status", "help --bogus", "help --wait 1s", "help --format yaml",
        "help --format text", "help --format tsv", "help --format=", "help --format",
        "help run --format opencli", "help run --format json", "help --format opencli extra",
        "--format opencli status", "--format opencli run -- true",
    ],
)  # fmt: skip
def test_help_that_there_is_not(line: str, cli: InProcess) -> None:
    result = cli(*line.split())
    assert (result.code, result.out) == (2, b"")
    assert "--help" in result.error


def test_help_goes_where_output_says(cli: InProcess, folder: Path) -> None:
    for line in ("help --format opencli", "help", "help run"):
        result = cli(*line.split(), "--output", "out")
        assert (result.code, result.out, result.err) == (0, b"", b"")
        assert (folder / "out").read_bytes() == cli(*line.split()).out


# --- it touches nothing, and is quick -----------------------------------------------------------

SURROUNDINGS: dict[str, Env] = {
    "bad-values": {"BUS_AI_API_URL": "not a URL", "BUS_AI_TOKEN": "two words", "HTTP_PROXY": "::"},
    "worse": {"BUS_API_BASE_URL": "ftp://x\n", "BUS_API_TOKEN": "\t", "HTTPS_PROXY": "socks://x"},
    "no-home": {"HOME": None, "XDG_CONFIG_HOME": "/no/such", "SSL_CERT_FILE": "/no/such"},
    "locale": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "dumb", "COLUMNS": "20"},
    "colour": {"FORCE_COLOR": "1", "PYTHON_COLORS": "1", "COLUMNS": "300", "LANG": "fi_FI.UTF-8"},
}


@pytest.mark.parametrize("line", ["help --format opencli", "help", "help run"])
def test_help_touches_neither_token_nor_network_nor_environment(
    line: str, cli: InProcess, api: Api, tmp_path: Path
) -> None:
    plain = cli(*line.split())
    fifo = tmp_path / "config" / "auth" / "api-token"
    fifo.parent.mkdir(parents=True)
    os.mkfifo(fifo)  # who opens it waits for ever
    config: Env = {"BUS_CONFIG_DIR": str(tmp_path / "config"), "BUS_AI_TOKEN": None}
    for env in (config, *SURROUNDINGS.values()):
        assert cli(*line.split(), at=api, env=env)[:3] == plain[:3]
    assert api.requests == []


@pytest.mark.parametrize("name", tiers(SURROUNDINGS, "locale"))
def test_a_process_prints_the_same_help(name: str, cli: InProcess, program: Program) -> None:
    for line in ("help", "help --format opencli"):
        result = program(*line.split(), env=SURROUNDINGS[name])
        assert result[:3] == cli(*line.split())[:3]


def test_the_document_comes_before_the_caller_loses_patience(program: Program) -> None:
    """`bus help` waits 750 ms for a module; the best of some tries, as others use this machine."""
    tries = (program("help", "--format", "opencli").seconds for _ in range(20))
    assert any(seconds < 0.75 for seconds in tries)


# The modules that a start may load, beside those of an empty script; each one more makes every
# `bus-containers` slower, and belongs into the function that needs it.
MAY_LOAD = {"__future__", "itertools", "gc", "signal", "enum", "types", "operator", "functools"}
MAY_LOAD |= {"_operator", "_functools", "_collections", "collections", "keyword", "reprlib"}
MAY_LOAD |= {"_types", "heapq", "_heapq"}  # of Python 3.14 and 3.9.2


def loaded(*line: str) -> set[str]:
    start = [sys.executable, "-I", "-S", "-X", "importtime"]
    done = subprocess.run([*start, *line], capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = (row for row in done.stderr.splitlines() if row.startswith("import time:"))
    return {row.rpartition("|")[2].strip() for row in rows} - {"imported package"}


@pytest.mark.parametrize("line", ["--version", "--help", "run --help"])
def test_a_start_loads_no_more_than_it_needs(line: str, command: list[str]) -> None:
    if not command[-1].endswith(".py"):
        pytest.skip("the archive and the script load more to start the module")
    extra = loaded(command[-1], *line.split()) - loaded("-c", "import os, io, sys, time")
    check_none(sorted(extra - MAY_LOAD), "loaded at every start; import it where it is used:")


@second_tier
@pytest.mark.parametrize("version", ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"])
def test_same_help_on_every_python(version: str, program: Program, cli: InProcess) -> None:
    if len(program.command) != 2:
        pytest.skip("the program under test brings its own Python")
    other = Program([python(version), program.command[1]], program.home)
    env: Env = {"FORCE_COLOR": "1", "PYTHON_COLORS": "1", "TERM": "xterm-256color"}
    for line in ("help", "help run", "help --format opencli", "--version"):
        assert other(*line.split(), env=env)[:3] == cli(*line.split())[:3]
    bad = other("--bogus", "status", env=env)
    assert (bad.code, bad.out) == (2, b"")


# --- the source -----------------------------------------------------------------------------------

SOURCE = ROOT / "bus_containers.py"


def test_the_module_is_short_enough() -> None:
    lines = len(SOURCE.read_text("utf-8").splitlines())
    assert lines <= MOST_LINES, f"{SOURCE.name} has {lines} lines; people audit {MOST_LINES}"


def test_the_module_can_be_made_executable() -> None:
    assert SOURCE.read_bytes().startswith(b"#!/usr/bin/env python3\n")


# Errors that are mostly our own mistakes: where each may be caught, and why it is right there.
HIDES_OURS = {
    "Exception", "BaseException", "AttributeError", "TypeError", "NameError", "RuntimeError",
    "AssertionError", "LookupError", "KeyError", "IndexError", "ArithmeticError",
}  # fmt: skip
MAY_CATCH: set[tuple[str, str]] = {
    ("_main", "Exception"),  # the last resort, which reports it as the program's own fault
    ("_Attempt._look_up.look_up", "Exception"),  # in a thread; raised again in the caller's
    ("_Attempt._look_up", "RuntimeError"),  # no thread can be started
    ("_Attempt._connect", "AttributeError"),  # a socket option that a system does not have
    ("_is_writable", "AttributeError"),  # streams may be any objects with a `write`
    ("_Reporter.__init__", "AttributeError"),
    ("_Reporter.tick", "AttributeError"),
    ("_Reporter.run_ended", "AttributeError"),
    ("_Reporter._print", "Exception"),  # a json.py in the way must not hide an error
    ("_Reporter._write", "AttributeError"),
}


def wide_excepts() -> Iterator[tuple[str, str, int]]:
    """Where an `except` catches what is mostly our own mistake: function, name, line."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str, int]]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".strip(".")
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for one in caught:
                name = ast.unparse(one).rpartition(".")[2] if one else "everything"
                if name in HIDES_OURS or not one:
                    yield function, name, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    return walk(ast.parse(SOURCE.read_text("utf-8")), "")


def test_no_except_is_wider_than_it_has_to_be() -> None:
    """Promise 3.21: a fault of our own is never reported as the server's."""
    found = list(wide_excepts())
    new = [f"{SOURCE.name}:{line}: {function} catches {name}" for function, name, line in found
           if (function, name) not in MAY_CATCH]  # fmt: skip
    check_none(new, "catch what is expected there, and let the rest through to main():")
    gone = MAY_CATCH - {(function, name) for function, name, _ in found}
    check_none([f"{function}: {name}" for function, name in gone], "in MAY_CATCH, but no more:")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        SNAPSHOT.write_text("\n".join(whole_contract(InProcess(Path(folder)))) + "\n", "utf-8")
