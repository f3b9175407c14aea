# SPDX-License-Identifier: MIT
"""Help for people and machines, and the rows that it is made of: promises 3.2, 4.2, 5.1 to 5.4.

`snapshot.txt` beside this file holds the help pages, the OpenCLI document and the public
signatures as they are meant to be. After a change that is meant, look at the difference that the
test shows, and renew it:

    .venv/bin/python tests/test_help.py
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
SAFE = dict.fromkeys(("printable", "storeInDotenv", "redactInLogs"), bool)
DOCUMENT: Document = {
    "opencli": str,
    "info": dict.fromkeys(("title", "version", "summary", "description"), str),
    "commands": [{
        "name": str, "summary": str, "description": str, "usage": str,
        "arguments": [{"name": str, "description": str, "required": bool, "repeatable": bool}],
        "options": [{
            "name": str, "aliases": [str], "description": str, "valueName": str, "required": bool,
            "repeatable": bool, "default": str,
        }],
        "exitCodes": [{"code": int, "description": str}],
        "examples": [{"summary": str, "command": str}],
    }],
    "metadata": {
        "io.busdk.profile": {"version": str, "module": str},
        "io.busdk.environment": {
            "version": str, "precedence": [str],
            "variables": [{
                "name": str, "description": str, "required": bool, "secret": bool, "default": str,
                "schema": {"type": str}, "safeHandling": SAFE, "affects": [str],
            }],
        },
    },
}  # fmt: skip


def no_name_twice(pairs: list[tuple[str, Any]]) -> Document:
    assert len(dict(pairs)) == len(pairs), [name for name, _ in pairs]
    return dict(pairs)


def undecodable(value: Any, kind: Any, path: str = "") -> Iterator[str]:
    """What Go would refuse: each value that is not of the type of its field, with its path."""
    expected: Any = kind if isinstance(kind, type) else type(kind)
    if type(value) is not expected:
        yield f"{path}: {value!r}"
    elif isinstance(kind, list):
        for number, one in enumerate(value):
            yield from undecodable(one, kind[0], f"{path}.{number}")
    elif isinstance(kind, dict):
        yield from (f"{path}: {name}" for name in value.keys() ^ kind.keys())
        for name in value.keys() & kind.keys():
            yield from undecodable(value[name], kind[name], f"{path}.{name}")


def test_go_programs_can_decode_the_document(cli: InProcess) -> None:
    text = cli("help", "--format", "opencli").out.decode("utf-8")
    document = json.loads(text, object_pairs_hook=no_name_twice)
    check_none(list(undecodable(document, DOCUMENT)))
    for change, told in {'"0"': "'0'", "true": "True", "[]": "[]"}.items():
        wrong = json.loads(text.replace('"code": 0', f'"code": {change}', 1))
        assert list(undecodable(wrong, DOCUMENT)) == [f".commands.0.exitCodes.0.code: {told}"]
    wrong = json.loads(text.replace('"code": 0', '"more": 0', 1))
    assert len(list(undecodable(wrong, DOCUMENT))) == 2


# --- the rows of the tables ---------------------------------------------------------------------


def check_none(problems: Sequence[str], about: str = "") -> None:
    """Every problem is shown whole."""
    assert not problems, "\n".join([about, *problems])


def test_no_row_has_a_mistake(cli: InProcess) -> None:
    pages = [page(cli), *(page(cli, name) for name in all_commands())]
    text = " ".join(" ".join(pages).split())
    lines = [line for one in pages for line in one.splitlines()]
    found = [f"too wide by {len(line) - 80}: {line!r}" for line in lines if len(line) > 80]
    tables = {"variables": variables(), "commands": opencli()["commands"]}
    for command in opencli()["commands"]:
        for key in ("arguments", "options", "exitCodes", "examples"):
            tables[f"{key} of {command['name']}"] = command[key]
    for table, rows in tables.items():
        names = [row.get("name", row.get("code", row.get("command"))) for row in rows]
        names += [alias for row in rows for alias in row.get("aliases", ())]
        found += [f"{table}: {name} is there twice" for name in {*names} if names.count(name) > 1]
        for row in rows:
            told = [row[key].strip() for key in ("description", "summary") if key in row]
            if "" in told:
                found.append(f"{table}: a text is empty: {row}")
            if table.startswith(("options", "variables")) and told[0] not in text:
                found.append(f"{table}: the help is on no page: {row}")
            if row.get("default", "") > row.get("valueName", "any") == "":
                found.append(f"{table}: a default, and no value: {row}")
        spelled = "--[a-z]+(-[a-z]+)*|-[A-Za-z]" if "options" in table else "[A-Z_][A-Z0-9_]*"
        if table.startswith(("options", "variables")):
            wrong = [name for name in names if not re.fullmatch(spelled, name)]
            found += [f"{table}: {name!r} is no such name" for name in wrong]
    check_none(found)


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


def test_the_document_says_what_was_promised(cli: InProcess) -> None:
    """The snapshot holds all of it; this is what may not change with it."""
    document = opencli()
    version = bus_containers.__version__
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", version)
    assert document["info"]["version"] == version
    assert cli("--version").out == f"bus-containers {version}\n".encode()
    assert document["metadata"]["io.busdk.profile"] == {"version": "0.1", "module": "containers"}
    assert all_commands() == ["status", "run", "runs", "delete", "help"]
    for command in document["commands"]:
        name = command["name"]
        codes = {row["code"]: row["description"] for row in command["exitCodes"]}
        assert set(codes) == {0, 2, 130, 143, 125 if name == "run" else 1}
        if name == "run":  # the container's own code has no number
            assert "own exit code" in codes[0]
            assert "command" in codes[125]
        for example in command["examples"]:
            assert example["command"].startswith(f"bus-containers {name}")


# --- what is documented works, what works is documented ------------------------------------------


FAILS = ("404 Not Found", "{}")
STARTING = ("200 OK", '{"items": [{"id": "a", "state": "starting"}]}')
# A command line without and with an option, which do not do the same; {} is the option's place.
EFFECTS = {
    "--help": ("runs {}", "--help"),
    "--version": ("runs {}", "--version"),
    "--api-url": ("runs {}", "--api-url=URL/more"),
    "--token-file": ("runs {}", "--token-file=token"),
    "--timeout": ("runs {}", "--timeout=1ns"),
    "--chdir": ("runs -o out {}", "--chdir=sub"),
    "--output": ("runs {}", "--output=out"),
    "--format": ("runs {}", "--format=tsv"),
    "--quiet": ("runs {}", "--quiet"),
    "--verbose": ("runs {}", "--verbose"),
    "--trace": ("runs -v {}", "--trace"),
    "--color": ("delete run-1 {}", "--color=always"),
    "--no-color": ("--color=always delete run-1 {}", "--no-color"),
    "--error-format": ("delete run-1 {}", "--error-format=json"),
    "--wait": ("status {}", "--wait=1ms"),
    "--profile": ("{} run true", "--profile=other"),
    "--image": ("{} run true", "--image=alpine"),
    "--timeout-seconds": ("{} run true", "--timeout-seconds=9"),
}


def observe(cli: InProcess, api: Api, folder: Path, line: str) -> object:
    """All that a command line does, as far as it can be seen from outside."""
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "token").write_text("another-token")
    api.requests.clear()
    api.sends()
    if "run-1" in line or "status" in line:
        status, body = FAILS if "run-1" in line else STARTING
        api.answers(body.encode(), status=status)
    result = cli(*line.split(), at=api)
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in {*files} - {str(folder / "token")}:
        os.remove(path)
    err = re.sub(rb"[0-9.]+ m?s\b", b"TIME", result.err)
    return result.code, result.out, err, list(api.requests), files


def test_every_option_has_code_behind_it(cli: InProcess, api: Api, folder: Path) -> None:
    """Promise 5.4: each row does something; and what is not in a row is not an option."""
    rows = {option.name: option for name in all_commands() for option in options_of(name)}
    check_none(sorted({*rows} - {*EFFECTS}), "say in EFFECTS what these options do:")
    check_none(sorted({*EFFECTS} - {*rows}), "in EFFECTS, but documented no more:")
    problems = []
    for name, (line, added) in EFFECTS.items():
        plain = observe(cli, api, folder, line.format(""))
        by_name = observe(cli, api, folder, line.format(added.replace("URL", api.url)))
        if plain == by_name:
            problems.append(f"{name} changes nothing: `{line.format(added)}`")
        for alias in rows[name].aliases:
            spelled = " ".join([alias, *added.partition("=")[2:]])
            changed = observe(cli, api, folder, line.format(spelled))
            if changed != by_name:
                problems.append(f"{alias} is not {name}")
    check_none(problems)


def test_document_and_program_agree_which_command_takes_an_option(cli: InProcess) -> None:
    values = {"URL": "http://127.0.0.1:9", "DURATION": "1ms", "N": "1", "DIR": ".", "FILE": "x"}
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


OTHERS_READ = {"HOME", "TERM", "REQUEST_METHOD"}  # told in the text of a documented row


def test_what_is_read_and_what_is_documented_are_the_same_variables(
    cli: InProcess, api: Api, serve: Callable[..., Hostile], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, recorder = serve(speaks_no_tls, scheme="https"), Reads()
    with monkeypatch.context() as patch, Terminal() as terminal:
        patch.setattr(os, "environ", recorder)
        for name in all_commands():
            cli("-v", *words(name), at=api)
        cli("status", env={"BUS_AI_API_URL": server.url})
        cli("--timeout=1s", "status", at=server)
        cli("bogus", stderr=terminal.end)
        proxied: Env = {"BUS_AI_API_URL": "http://127.0.0.2:1", "HTTP_PROXY": server.url[8:]}
        cli("--timeout=1ms", "status", env={**proxied, "BUS_AI_TOKEN": "x", "NO_PROXY": "*"})
        cli("status", env={"BUS_AI_API_URL": None, "BUS_API_BASE_URL": server.url})
    documented = {row["name"] for row in variables()}
    own = {name for module, name in recorder.names if module in ("bus_containers", "__main__")}
    assert own, "nothing was seen"
    unknown = sorted(own - documented - OTHERS_READ - {name.lower() for name in documented})
    check_none(unknown, "read, and in no row of the variables:")
    unread = sorted(documented - {name for _, name in recorder.names})
    check_none(unread, "documented, and nobody reads it:")
    text = section(page(cli), "ENVIRONMENT")
    assert [name for name in sorted(OTHERS_READ & own - {"HOME"}) if name not in text] == []


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
    "help run": ["run --help", "--help run", "run --bogus -h", "run --image x -h -- true"],
    "help status": ["status --help"],
    "help runs": ["runs -h"],
    "help delete": ["delete run-1 --help"],
    "help help": ["help --help"],
    "--version": ["-V", "run -V", "-V --bogus"],
    "help --format opencli": [
        "--format opencli help", "help -f json", "--color always help -f json -vv",
    ],
}  # fmt: skip


@pytest.mark.parametrize("line", SAME)
def test_help_by_other_words(line: str, cli: InProcess, folder: Path) -> None:
    expected = cli(*line.split())
    assert (expected.code, expected.err) == (0, b"")
    for other in SAME[line]:
        assert cli(*other.split())[:3] == expected[:3], other
    if line != "--version":
        assert cli(*line.split(), "--output", "out")[:3] == (0, b"", b"")
        assert (folder / "out").read_bytes() == expected.out


def test_help_for_the_containers_command_is_its_own(cli: InProcess, api: Api) -> None:
    for line in ("run -- x --help", "run x --help", "run x -h", "run x -V"):
        assert cli(*line.split(), at=api).code == 0
        args = json.loads(api.requests[-1].partition(b"\r\n\r\n")[2])["args"]
        assert args[-1] == line.split()[-1]


@pytest.mark.parametrize(
    "line",
    [
        "help --bogus", "help --wait 1s", "help --format text", "help --format=", "help --format",
        "help --format opencli extra", "--format opencli status", "--format opencli run -- true",
    ],
)  # fmt: skip
def test_help_that_there_is_not(line: str, cli: InProcess) -> None:
    result = cli(*line.split())
    assert (result.code, result.out) == (2, b"")
    assert "--help" in result.error


# --- it touches nothing, and is quick -----------------------------------------------------------

SURROUNDINGS: list[Env] = [
    {"BUS_AI_API_URL": "not a URL", "BUS_AI_TOKEN": "two words", "HTTP_PROXY": "::"},
    {"BUS_API_BASE_URL": "ftp://x\n", "BUS_API_TOKEN": "\t", "HTTPS_PROXY": "socks://x"},
    {"HOME": None, "XDG_CONFIG_HOME": "/no/such", "SSL_CERT_FILE": "/no/such", "COLUMNS": "300"},
    {
        "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "xterm-256color", "COLUMNS": "20",
        "FORCE_COLOR": "1", "PYTHON_COLORS": "1",
    },
]  # fmt: skip


def test_help_touches_neither_token_nor_network_nor_environment(
    cli: InProcess, program: Program, api: Api, tmp_path: Path
) -> None:
    """A process shows what is Python's: the locale, and the colours of its argparse."""
    fifo = tmp_path / "config" / "auth" / "api-token"
    fifo.parent.mkdir(parents=True)
    os.mkfifo(fifo)  # who opens it waits for ever
    config: Env = {"BUS_CONFIG_DIR": str(tmp_path / "config"), "BUS_AI_TOKEN": None}
    for line in ("help --format opencli", "help", "help run"):
        plain = cli(*line.split())
        for env in (config, *SURROUNDINGS):
            assert cli(*line.split(), at=api, env=env)[:3] == plain[:3]
        assert program(*line.split(), env=SURROUNDINGS[-1])[:3] == plain[:3]
    assert api.requests == []


def test_the_document_comes_before_the_caller_loses_patience(program: Program) -> None:
    """`bus help` waits 750 ms for a module; counted as processor time, as others use this one."""

    def spent_seconds() -> float:
        before = os.times()
        assert program("help", "--format", "opencli").code == 0
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])  # of children

    assert min(spent_seconds() for _ in range(3)) < 0.75


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


@pytest.mark.parametrize("line", ["--version", "run --help"])
def test_a_start_loads_no_more_than_it_needs(line: str, command: list[str]) -> None:
    if not command[-1].endswith(".py"):
        pytest.skip("the archive and the script load more to start the module")
    extra = loaded(command[-1], *line.split()) - loaded("-c", "import os, io, sys, time")
    check_none(sorted(extra - MAY_LOAD), "loaded at every start; import it where it is used:")


# --- the source -----------------------------------------------------------------------------------

SOURCE = ROOT / "bus_containers.py"


def test_the_module_is_short_enough_and_can_be_made_executable() -> None:
    lines = SOURCE.read_text("utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env python3"
    assert len(lines) <= MOST_LINES, f"{len(lines)} lines; people audit {MOST_LINES}"


# Errors that are mostly our own mistakes: where each may be caught, and why it is right there.
HIDES_OURS = {
    "Exception", "BaseException", "AttributeError", "TypeError", "NameError", "RuntimeError",
    "AssertionError", "LookupError", "KeyError", "IndexError", "ArithmeticError",
}  # fmt: skip
MAY_CATCH: set[tuple[str, str]] = {
    ("_load_modules", "Exception"),  # a file in the way of a module may raise anything
    ("_main", "Exception"),  # the last resort, which reports it as the program's own fault
    ("console", "BaseException"),  # what fails while that is told, such as memory once more
    ("_Attempt._look_up.look_up", "Exception"),  # in a thread; raised again in the caller's
    ("_Attempt._look_up", "RuntimeError"),  # no thread can be started
    ("_Attempt._connect", "AttributeError"),  # a socket option that a system does not have
    ("_is_writable", "Exception"),  # a select.py in the way must not hide an error
    ("_write_in_time", "AttributeError"),  # flags that Windows does not have
    ("_Reporter.__init__", "AttributeError"),
    ("_Reporter.run_ended", "Exception"),  # a host's stream may raise anything
    ("_Reporter._print", "Exception"),  # a json.py in the way must not hide an error
    ("_Reporter._write", "Exception"),
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
