# SPDX-License-Identifier: MIT
"""Help for people and for machines (CONTRACT section 3): complete, short, the same everywhere.

The OpenCLI document is what `bus help` and `bus configure` read. Its shape is checked to the last
key, and what it says of options is tried on the program.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import Program, Result
from hostile import LIMIT, Herd, Hostile

Env = dict[str, "str | None"]
Words = tuple[str, ...]

COMMANDS = ("status", "run", "runs", "delete", "help")
SECTIONS = [
    "NAME", "SYNOPSIS", "DESCRIPTION", "COMMANDS", "OPTIONS", "ENVIRONMENT", "EXIT STATUS",
    "EXAMPLES", "SEE ALSO",
]  # fmt: skip
GLOBAL_OPTIONS = {
    "--help", "--version", "--api-url", "--token-file", "--timeout", "--chdir", "--output",
    "--format", "--quiet", "--verbose", "--trace", "--color", "--no-color", "--error-format",
}  # fmt: skip
OWN_OPTIONS = {"status": {"--wait"}, "run": {"--profile", "--image", "--timeout-seconds"}}
SHORT = {
    "--help": "-h", "--version": "-V", "--chdir": "-C", "--output": "-o", "--format": "-f",
    "--quiet": "-q", "--verbose": "-v",
}  # fmt: skip
VARIABLES = [
    "BUS_AI_API_URL", "BUS_API_BASE_URL", "BUS_AI_TOKEN", "BUS_API_TOKEN", "BUS_CONFIG_DIR",
    "XDG_CONFIG_HOME", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "NO_COLOR",
]  # fmt: skip
CODES = {
    "status": ["0", "1", "2", "130", "143"],
    "run": ["0", "2", "125", "N", "130", "143"],
    "runs": ["0", "1", "2", "130", "143"],
    "delete": ["0", "1", "2", "130", "143"],
}
PAGES = [("help",), *(("help", command) for command in COMMANDS)]


Pages = dict[Words, str]


@pytest.fixture(scope="module")
def pages(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Pages:
    program = Program(command, tmp_path_factory.mktemp("home"))
    results = {words: program(*words) for words in PAGES}
    assert {(result.code, result.err) for result in results.values()} == {(0, b"")}
    return {words: result.out.decode("ascii") for words, result in results.items()}


def headings(page: str) -> list[str]:
    return re.findall(r"(?m)^[A-Z].*$", page)


def section(page: str, heading: str) -> str:
    """The text of a section, without its heading."""
    found = re.search(rf"(?ms)^{heading}$(.*?)(?=^[A-Z]|\Z)", page)
    assert found, heading
    return found[1]


# --- for people -------------------------------------------------------------------------------


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_page_is_plain_and_fits(pages: Pages, words: Words) -> None:
    page = pages[words]
    assert re.search(r"[^ -~\n]", page) is None
    assert page.endswith("\n")
    assert not page.endswith("\n\n")
    lines = page.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line != line.rstrip()] == []
    if len(words) > 1:
        assert len(lines) <= 40


def test_page_of_the_program_has_all_sections_in_order(pages: Pages) -> None:
    page = pages["help",]
    assert headings(page) == SECTIONS
    assert re.match(r"\s+bus-containers - \S", section(page, "NAME"))
    for name in COMMANDS:
        assert re.search(rf"(?m)^    {name} +\S", section(page, "COMMANDS"))
        assert re.search(rf"(?m)^    bus-containers .*\b{name}\b", section(page, "SYNOPSIS"))


@pytest.mark.parametrize("name", COMMANDS)
def test_page_of_a_command_has_its_sections_in_order(
    pages: Pages, name: str
) -> None:
    page = pages["help", name]
    found = headings(page)
    assert found == [heading for heading in SECTIONS if heading in found]
    assert {"NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "EXAMPLES"} <= set(found)
    assert f"bus-containers {name} - " in section(page, "NAME")
    assert f"bus-containers {name}" in section(page, "EXAMPLES")
    for option in OWN_OPTIONS.get(name, ()):
        assert re.search(rf"(?m)^ +{option}\b", section(page, "OPTIONS"))
    for code in CODES.get(name, ["0", "2"]):
        assert re.search(rf"(?m)^ +{code} ", section(page, "EXIT STATUS"))


@pytest.mark.parametrize("option", sorted(GLOBAL_OPTIONS))
def test_every_option_is_explained(pages: Pages, option: str) -> None:
    text = section(pages["help",], "OPTIONS")
    name = f"{SHORT[option]}, {option}" if option in SHORT else option
    assert re.search(rf"(?m)^    {name}(?![\w-]).*  \S", text)


@pytest.mark.parametrize("variable", [*VARIABLES, "TERM", "REQUEST_METHOD"])
def test_every_variable_is_named(pages: Pages, variable: str) -> None:
    text = section(pages["help",], "ENVIRONMENT")
    assert re.search(rf"\b{variable}\b", text)


@pytest.mark.parametrize("code", ["0", "1", "2", "125", "N", "130", "143"])
def test_every_exit_code_is_explained(pages: Pages, code: str) -> None:
    text = section(pages["help",], "EXIT STATUS")
    assert re.search(rf"(?m)^    {code} +\S", text)


SAME = [
    (("--help",), ("help",)),
    (("-h",), ("help",)),
    (("--help", "--bogus"), ("help",)),
    (("--bogus", "--help"), ("help",)),
    (("-q", "-h"), ("help",)),
    *(((name, "--help"), ("help", name)) for name in COMMANDS),
    *(((name, "-h"), ("help", name)) for name in COMMANDS),
    (("--help", "run"), ("help", "run")),
    (("run", "--bogus", "--help"), ("help", "run")),
    (("run", "--image", "x", "-h", "--", "true"), ("help", "run")),
    (("delete", "run-1", "--help"), ("help", "delete")),
]


@pytest.mark.parametrize(("words", "page"), SAME, ids=lambda words: " ".join(words))
def test_help_by_other_words(
    program: Program, pages: Pages, words: Words, page: Words
) -> None:
    result = program(*words)
    assert (result.code, result.err) == (0, b"")
    assert result.out.decode() == pages[page]


@pytest.mark.parametrize("words", [("--version",), ("-V",), ("run", "-V"), ("-V", "--bogus")])
def test_version(program: Program, words: Words) -> None:
    result = program(*words)
    assert (result.code, result.err) == (0, b"")
    assert re.fullmatch(rb"bus-containers [0-9]+\.[0-9]+\.[0-9]+\n", result.out)


@pytest.mark.parametrize(
    "words",
    [("run", "--", "x", "--help"), ("run", "x", "--help"), ("run", "x", "-h"), ("run", "x", "-V")],
    ids=" ".join,
)
def test_help_for_the_containers_command_is_its_own(program: Program, words: Words) -> None:
    result = program(*words)
    assert (result.code, result.out) == (125, b"")
    assert "no token" in result.message


@pytest.mark.parametrize(
    "words",
    [
        ("help", "bogus"),
        ("help", "run", "status"),
        ("help", "--bogus"),
        ("help", "--wait", "1s"),
        ("help", "--format", "yaml"),
        ("help", "--format", "text"),
        ("help", "--format", "tsv"),
        ("help", "--format", ""),
        ("help", "--format"),
        ("help", "run", "--format", "opencli"),
        ("help", "run", "--format", "json"),
        ("help", "--format", "opencli", "extra"),
        ("--format", "opencli", "status"),
        ("--format", "opencli", "run", "--", "true"),
    ],
    ids=" ".join,
)
def test_help_that_there_is_not(program: Program, words: Words) -> None:
    result = program(*words)
    assert (result.code, result.out) == (2, b"")
    assert result.message.startswith("bus-containers: ")
    assert "--help" in result.message


# --- for machines -----------------------------------------------------------------------------

_NAME = re.compile(r"[a-z]+")
_LONG = re.compile(r"--[a-z]+(-[a-z]+)*")


def has(value: object, **shape: type) -> dict[str, Any]:
    """The value, an object with exactly these keys and types; no text is empty but a default."""
    assert isinstance(value, dict)
    assert value.keys() == shape.keys()
    for key, kind in shape.items():
        assert type(value[key]) is kind, key
        if kind is str and key not in ("default", "valueName"):
            assert value[key].strip() == value[key] != "", key
    return value


def check_argument(value: object) -> None:
    one = has(value, name=str, description=str, required=bool, repeatable=bool)
    assert re.fullmatch(r"[A-Za-z][A-Za-z_-]*", one["name"])


def check_option(value: object) -> None:
    one = has(
        value, name=str, aliases=list, description=str, valueName=str, required=bool,
        repeatable=bool, default=str,
    )  # fmt: skip
    assert _LONG.fullmatch(one["name"])
    assert all(re.fullmatch(r"-[A-Za-z]", alias) for alias in one["aliases"])
    assert one["required"] is False
    assert one["valueName"] or not one["default"]


def check_command(value: object) -> None:
    one = has(
        value, name=str, summary=str, description=str, usage=str, arguments=list, options=list,
        exitCodes=list, examples=list,
    )  # fmt: skip
    assert _NAME.fullmatch(one["name"])
    assert one["usage"].startswith("bus-containers ")
    assert f" {one['name']}" in one["usage"]
    for argument in one["arguments"]:
        check_argument(argument)
    for option in one["options"]:
        check_option(option)
    names = [name for option in one["options"] for name in (option["name"], *option["aliases"])]
    assert len(set(names)) == len(names)
    for code in one["exitCodes"]:
        has(code, code=str, description=str)
    assert one["examples"]
    for example in one["examples"]:
        has(example, summary=str, command=str)
        assert example["command"].startswith(f"bus-containers {one['name']}")


def check_variable(value: object, commands: list[str]) -> None:
    one = has(
        value, name=str, description=str, required=bool, secret=bool, default=str, schema=dict,
        safeHandling=dict, affects=list,
    )  # fmt: skip
    assert re.fullmatch(r"[A-Z_][A-Z0-9_]*", one["name"])
    assert one["schema"] == {"type": "string"}
    safe = has(one["safeHandling"], printable=bool, storeInDotenv=bool, redactInLogs=bool)
    assert safe["redactInLogs"] is one["secret"]
    assert not (one["secret"] and safe["printable"])
    assert one["affects"]
    assert all(type(name) is str for name in one["affects"])
    assert set(one["affects"]) <= set(commands)


def no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.fixture(scope="module")
def opencli(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = Program(command, tmp_path_factory.mktemp("home"))("help", "--format", "opencli")
    assert (result.code, result.err) == (0, b"")
    document = json.loads(result.out.decode("utf-8"), object_pairs_hook=no_twice)
    assert isinstance(document, dict)
    return document


def test_document_has_the_shape_of_an_opencli_document(opencli: dict[str, Any]) -> None:
    has(opencli, opencli=str, info=dict, commands=list, metadata=dict)
    assert opencli["opencli"] == "0.1.0"
    has(opencli["info"], title=str, version=str, summary=str, description=str)
    for command in opencli["commands"]:
        check_command(command)
    names = [command["name"] for command in opencli["commands"]]
    assert tuple(names) == COMMANDS
    assert list(opencli["metadata"]) == ["io.busdk.profile", "io.busdk.environment"]
    assert opencli["metadata"]["io.busdk.profile"] == {"version": "0.1", "module": "containers"}
    environment = opencli["metadata"]["io.busdk.environment"]
    has(environment, version=str, precedence=list, variables=list)
    assert environment["version"] == "0.1"
    assert environment["precedence"]
    assert all(type(step) is str for step in environment["precedence"])
    for variable in environment["variables"]:
        check_variable(variable, names)
    names = [variable["name"] for variable in environment["variables"]]
    assert len(set(names)) == len(names)


def test_document_says_what_the_contract_says(program: Program, opencli: dict[str, Any]) -> None:
    version = program("--version").out.decode().split()
    assert [opencli["info"]["title"], opencli["info"]["version"]] == version
    variables = opencli["metadata"]["io.busdk.environment"]["variables"]
    assert [variable["name"] for variable in variables] == VARIABLES
    secret = {variable["name"] for variable in variables if variable["secret"]}
    assert {"BUS_AI_TOKEN", "BUS_API_TOKEN"} <= secret
    assert not secret & {"BUS_AI_API_URL", "BUS_API_BASE_URL", "BUS_CONFIG_DIR"}
    [url] = [variable for variable in variables if variable["name"] == "BUS_AI_API_URL"]
    assert url["default"] == "https://ai.hg.fi"
    for one in opencli["commands"]:
        if one["name"] in CODES:
            assert [code["code"] for code in one["exitCodes"]] == CODES[one["name"]]
    arguments = {
        one["name"]: [(a["name"], a["required"], a["repeatable"]) for a in one["arguments"]]
        for one in opencli["commands"]
    }
    assert arguments == {
        "status": [],
        "run": [("command", True, False), ("arg", False, True)],
        "runs": [],
        "delete": [("run_id", True, True)],
        "help": [("command", False, False)],
    }
    options = {
        (one["name"], option["name"]): option
        for one in opencli["commands"]
        for option in one["options"]
    }
    assert options["run", "--profile"]["default"] == "codex"
    assert options["run", "--timeout"]["default"] == "30m"
    assert options["status", "--timeout"]["default"] == "30s"
    assert options["status", "--format"]["default"] == "json"
    assert options["run", "--verbose"]["repeatable"] is True


@pytest.mark.parametrize(
    "words",
    [
        ("--format", "opencli", "help"),
        ("help", "--format", "json"),
        ("help", "-f", "opencli"),
        ("help", "--format=opencli"),
        ("-f", "json", "help"),
        ("--color", "always", "help", "--format", "opencli"),
        ("-vv", "help", "--format", "opencli"),
    ],
    ids=" ".join,
)
def test_one_document_whatever_it_is_called(
    program: Program, opencli: dict[str, Any], words: Words
) -> None:
    result = program(*words)
    assert (result.code, result.err) == (0, b"")
    assert json.loads(result.out) == opencli


def test_document_goes_where_output_says(
    program: Program, opencli: dict[str, Any], tmp_path: Path
) -> None:
    result = program("help", "--format", "opencli", "--output", str(tmp_path / "out"))
    assert (result.code, result.out, result.err) == (0, b"", b"")
    assert json.loads((tmp_path / "out").read_bytes()) == opencli


VALUES = {
    "URL": "http://127.0.0.1:9", "PATH": "/no/such/file", "DURATION": "1s", "DIR": ".",
    "FILE": os.devnull, "NAME": "codex", "REF": "alpine", "N": "1",
}  # fmt: skip
ALL_OPTIONS = sorted({*GLOBAL_OPTIONS, *OWN_OPTIONS["status"], *OWN_OPTIONS["run"]})
ANY_VALUE = {
    "--api-url": "URL", "--token-file": "PATH", "--timeout": "DURATION", "--chdir": "DIR",
    "--output": "FILE", "--format": "json", "--color": "never", "--error-format": "text",
    "--wait": "DURATION", "--profile": "NAME", "--image": "REF", "--timeout-seconds": "N",
}  # fmt: skip
ARGUMENTS = {"run": ("--", "true"), "delete": ("run-1",)}


class Try(NamedTuple):
    """A command with one option; the document and the program must agree whether there is one."""

    command: str
    option: str


TRIES = [Try(command, option) for command in COMMANDS for option in ALL_OPTIONS]


@pytest.fixture(scope="module")
def tries(
    command: list[str], opencli: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Herd[Try, list[Result]]]:
    program = Program(command, tmp_path_factory.mktemp("home"))
    known = {one["name"]: {o["name"]: o for o in one["options"]} for one in opencli["commands"]}

    def run(case: Try) -> list[Result]:
        """With every value that the document names; without one, and with one too many."""
        option = known[case.command].get(case.option)
        name = option["valueName"] if option else ANY_VALUE.get(case.option, "")
        values = [VALUES.get(value, value) for value in name.split("|")] if name else []
        wrong = case.option if values else f"{case.option}=x"
        attached = [f"{case.option}={value}" for value in values] or [case.option]
        rest = ARGUMENTS.get(case.command, ())
        results = [program(case.command, words, *rest) for words in attached]
        return [*results, program(case.command, wrong)]

    with Herd(run, TRIES, workers=2) as herd:
        yield herd


@pytest.mark.parametrize("case", TRIES, ids=" ".join)
def test_document_and_program_agree_on_every_option(
    tries: Herd[Try, list[Result]], opencli: dict[str, Any], case: Try
) -> None:
    [one] = [one for one in opencli["commands"] if one["name"] == case.command]
    found = [option for option in one["options"] if option["name"] == case.option]
    expected = case.option in GLOBAL_OPTIONS | OWN_OPTIONS.get(case.command, set())
    assert bool(found) is expected
    *rights, wrong = tries.outcome(case)
    for right in rights:
        if not expected:
            assert right.code == 2
            assert case.option in right.message
        elif case.command == "help" or case.option in ("--help", "--version"):
            assert right.code == 0
        else:  # there is no token, and that is all that is wrong
            assert right.code == (125 if case.command == "run" else 1)
            assert "token" in right.message
    assert wrong.code == 2
    assert case.option in wrong.message
    for option in found:
        assert option["aliases"] == ([SHORT[case.option]] if case.option in SHORT else [])


@pytest.mark.parametrize("option", sorted(SHORT))
def test_alias_is_the_option(program: Program, option: str) -> None:
    value = ANY_VALUE.get(option)
    values = () if value is None else (VALUES.get(value, value),)
    by_alias = program(SHORT[option], *values, "runs")
    by_name = program(option, *values, "runs")
    assert by_alias[:3] == by_name[:3]
    assert by_alias.code in (0, 1)


# --- it touches nothing -----------------------------------------------------------------------


@pytest.mark.parametrize("words", [("help", "--format", "opencli"), ("help",), ("help", "run")])
def test_help_touches_neither_token_nor_network_nor_environment(
    program: Program, words: Words, tmp_path: Path
) -> None:
    plain = program(*words)
    fifo = tmp_path / "config" / "auth" / "api-token"
    fifo.parent.mkdir(parents=True)
    os.mkfifo(fifo)  # who opens it waits for ever
    with Hostile() as server:
        for env in (
            {"BUS_CONFIG_DIR": str(tmp_path / "config"), "BUS_AI_API_URL": server.url},
            {"BUS_AI_API_URL": "not a URL", "BUS_AI_TOKEN": "two words", "HTTP_PROXY": "::bad::"},
            {"BUS_API_BASE_URL": "ftp://x\n", "BUS_API_TOKEN": "\t", "HTTPS_PROXY": "socks://x"},
            {"HOME": None, "XDG_CONFIG_HOME": "/no/such", "SSL_CERT_FILE": "/no/such"},
            {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "dumb", "COLUMNS": "20"},
            {"FORCE_COLOR": "1", "PYTHON_COLORS": "1", "COLUMNS": "300", "LANG": "fi_FI.UTF-8"},
        ):
            changes: Env = {**env}
            assert program(*words, env=changes, limit=LIMIT)[:3] == plain[:3]
        assert server.connections == 0


def test_document_comes_before_the_caller_loses_patience(program: Program) -> None:
    """`bus help` waits 750 ms for a module; the best of some tries, as others use this machine."""
    words = ("help", "--format", "opencli")
    assert min(program(*words).seconds for _ in range(5)) < 0.75


# --- the same on every Python -----------------------------------------------------------------


def interpreters() -> list[str]:
    """Other Pythons on this machine that the program supports, one of each version."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(map(str, root.glob("versions/3.*/bin/python")))
    found += filter(None, (shutil.which(f"python3.{minor}") for minor in range(9, 16)))
    versions: dict[str, str] = {}
    for path in found:
        probe = [path, "-c", "import sys; print('%d.%02d' % sys.version_info[:2])"]
        try:
            ran = subprocess.run(probe, capture_output=True, timeout=LIMIT, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        versions.setdefault(ran.stdout.decode().strip(), path)
    own = f"{sys.version_info[0]}.{sys.version_info[1]:02}"
    return [path for version, path in sorted(versions.items()) if "3.09" <= version != own]


def test_same_help_on_every_python(program: Program, pages: Pages) -> None:
    if len(program.command) != 2:
        pytest.skip("the program under test brings its own Python")
    others = interpreters()
    if not others:
        pytest.skip("no other Python from 3.9 on is here")
    expected = dict(pages)
    document = ("help", "--format", "opencli")
    expected[document] = program(*document).out.decode()
    env: Env = {"FORCE_COLOR": "1", "PYTHON_COLORS": "1", "TERM": "xterm-256color"}
    for python in others:
        other = Program([python, program.command[1]], program.home)
        for words in (("help",), ("help", "run"), document):
            result = other(*words, env=env)
            assert (result.code, result.out.decode(), result.err) == (0, expected[words], b"")
        bad = other("--bogus", "status", env=env)
        assert (bad.code, bad.out) == (2, b"")
