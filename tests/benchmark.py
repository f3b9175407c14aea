#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Measure start, CPU and memory of the program, as ratios: `python3 tests/benchmark.py`.

Prints a table with a row for each figure that the project promises. Processes run in turn, round
by round (A B A B ...), under the same interpreter, venv and environment, and each round gives a
ratio: of user and system CPU of whole processes, or of their peak of memory, as the operating
system accounts for them. As both sides of a ratio ran within the same seconds, the machine was as
fast for one as for the other; the minima of all rounds would not do, as one of them may have met a
moment in which the clock was higher. The figure is the lower quartile of the ratios: a row misses
its bound only if three rounds of four are above it, which a program that needs too much is in all
of them. Then as many rounds run again, up to PASSES times, and all of them count. One row is a
number of seconds on the clock. No start is subtracted, except where a row says so. The program is
installed into a new venv, the archive built by the same interpreter. Standard library only, on
POSIX.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
FORMATS = ("json", "tsv", "text")
STATUS = '{"items": [{"id": "runner-1", "state": "ready", "owner_identity_id": "acct_1"}]}'
OFTEN = 6  # small cases cost little above a start: so often they come in a round of large ones
PASSES = 5


class Sizes(NamedTuple):
    """How much is measured: `rounds` of what takes milliseconds, `few` of what takes seconds."""

    rounds: int
    few: int
    answer_mib: int
    linear_mib: tuple[int, int]
    linear_runs: tuple[int, int]


FULL = Sizes(30, 8, 64, (4, 256), (1_000, 100_000))
QUICK = Sizes(12, 4, 16, (4, 64), (1_000, 50_000))


# ---- The other sides: what a ratio is taken of ------------------------------------------------

# The smallest script that does what `status` does, and how a library gets the document.
STATUS_SCRIPT = """\
import argparse, json, os, {library}
parser = argparse.ArgumentParser()
parser.add_argument("--api-url", required=True)
parser.add_argument("command", choices=["status"])
args = parser.parse_args()
url = args.api_url + "/api/v1/containers/status"
headers = {{"Authorization": "Bearer " + os.environ["BUS_AI_TOKEN"]}}
{get}
print(json.dumps(document, indent=2, ensure_ascii=False))
"""
URLLIB = """\
request = urllib.request.Request(url, headers=headers)
with urllib.request.urlopen(request, timeout=30) as response:
    document = json.load(response)
"""
LIKE_REQUESTS = "document = {library}.get(url, headers=headers, timeout=30).json()\n"

# The text of `-f json`, but it goes nowhere. Both sides call dumps with an indent, which is C from
# Python 3.13 on and several times slower before; without an indent it would be another text.
LOADS_DUMPS = """\
import json, sys
document = json.loads(open(sys.argv[1], encoding="utf-8").read())
json.dumps(document, indent=2, ensure_ascii=False)
"""
# The text of `-f tsv`, in C on every Python; `-f text` has these columns, too.
LOADS_CSV = """\
import csv, json, shlex, sys
items = json.loads(open(sys.argv[1], encoding="utf-8").read())["items"]
columns = ("run_id", "state", "exit_code", "duration_ms", "image", "started_at")
writer = csv.writer(sys.stdout, delimiter="\\t", lineterminator="\\n")
writer.writerow([*columns, "command"])
for item in items:
    writer.writerow([*map(item.get, columns), shlex.join(item["args"])])
"""


# ---- A loopback server with canned documents --------------------------------------------------


def serve(host: str) -> None:
    """Answer each request with the file of its path; print the origin first."""
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Files(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        extensions_map = {"": "application/json"}

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), Files)
    print(f"http://{host}:{server.server_port}", flush=True)
    server.serve_forever()


@contextmanager
def serving(folder: str, host: str = "127.0.0.1") -> Iterator[str]:
    """A server of the files in a folder, in a process of its own; its origin."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", host]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def a_run(mib: int) -> Iterator[str]:
    """A run's answer, in pieces. Its standard output is lines as a test suite prints them."""
    yield '{"run_id": "run_7f3a", "owner_identity_id": "acct_1", "runner_name": "runner-1", '
    yield '"image": "codex", "args": ["make", "test"], "exit_code": 0, "stdout": "'
    left = mib * MIB
    while left > 0:
        line = f'tests/test_{left % 97}.py::test_{left} "case" PASSED in 0.01 s\n'
        left -= len(line)
        yield json.dumps(line)[1:-1]
    yield '", "stderr": "", "duration_ms": 81234, "runtime": "podman"}'


def a_list(count: int) -> Iterator[str]:
    """A list of runs, in pieces."""
    same = '"owner_identity_id": "acct_1", "state": "exited", "image": "registry.example/codex:1"'
    same += ', "args": ["make", "test"], "exit_code": 0, "started_at": "2030-01-01T00:00:00Z"'
    yield '{"items": ['
    for number in range(count):
        yield ", " if number else ""
        yield f'{{"run_id": "run_{number:08x}", {same}, "duration_ms": {number}}}'
    yield "]}"


# ---- Measuring --------------------------------------------------------------------------------


class Case(NamedTuple):
    """A command line, and the exit code without which it did something else."""

    argv: tuple[str, ...]
    code: int = 0


class Usage(NamedTuple):
    """What one process took."""

    cpu_seconds: float
    peak_bytes: float
    seconds: float


class Figure(NamedTuple):
    """A ratio, or another number, and what it is of; no number if it was left out."""

    number: float
    of: str


LEFT_OUT = Figure(math.nan, "")


Round = Mapping[Case, Usage]  # of a case that ran several times, the median


def median(values: Iterable[float]) -> float:
    """The module statistics would double the memory of this process."""
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


def lower_quartile(figures: Iterable[Figure]) -> Figure:
    ordered = sorted(figures)
    return ordered[len(ordered) // 4]


def cpu_ratio(rounds: Iterable[Round], ours: Case, other: Case) -> Figure:
    pairs = ((each[ours].cpu_seconds, each[other].cpu_seconds) for each in rounds)
    return lower_quartile(
        Figure(cpu / other_cpu, f"{cpu * 1000:,.1f} : {other_cpu * 1000:,.1f} ms")
        for cpu, other_cpu in pairs
    )


def linearity(rounds: Iterable[Round], cases: Mapping[int, Case], *units: int) -> Figure:
    """What a unit costs in a large document and in a small one, above a start without any."""
    figures = []
    for each in rounds:
        above = [each[cases[n]].cpu_seconds - each[cases[0]].cpu_seconds for n in units]
        small, large = (max(1e6 * cpu / n, 0.01) for cpu, n in zip(above, units))
        figures.append(Figure(large / small, f"{large:,.1f} : {small:,.1f} us for each"))
    return lower_quartile(figures)


class Bench:
    """The programs to be measured, and the place and environment in which they run."""

    def __init__(self, folder: Path, origin: str, sizes: Sizes) -> None:
        self.folder, self.origin, self.sizes = folder, origin, sizes
        self._rounds: dict[tuple[Case, ...], list[Round]] = {}
        # Neither what keeps byte code from being written nor who measures may make a difference.
        kept = {n: value for n, value in os.environ.items() if not n.startswith(("PYTHON", "BUS_"))}
        self._preparing = kept
        self.environ = {n: value for n, value in kept.items() if not n.lower().endswith("_proxy")}
        self.environ.update(HOME=str(folder), LC_ALL="C.UTF-8", BUS_AI_TOKEN="not.a.secret")
        self.python = str(folder / "venv" / "bin" / "python")
        self.installed = self.venv("venv")
        self.archive = self.build(ROOT)
        self.status = ("--api-url", self.document("status", 1, [STATUS])[0], "status")

    def call(self, *command: str) -> str:
        """Run a command of the preparations; return its output."""
        done = subprocess.run(command, env=self._preparing, capture_output=True, text=True)
        if done.returncode:
            reasons = [n for n in done.stderr.splitlines() if n.lower().startswith("error")]
            raise RuntimeError(f"exit code {done.returncode}: {(reasons or [done.stderr])[-1]}")
        return done.stdout

    def venv(self, name: str, *options: str) -> str:
        """Make a venv with the project in it; return the path of the program."""
        self.call(sys.executable, "-m", "venv", *options, str(self.folder / name))
        python, script = (self.folder / name / "bin" / n for n in ("python", "bus-containers"))
        self.pip(str(python), str(ROOT))
        return str(script)

    def pip(self, python: str, package: str) -> None:
        """Install into the venv of `python`, with the pip of the first venv."""
        install = ("install", "--quiet", "--compile", package)
        self.call(self.python, "-m", "pip", "--python", python, *install)

    def script(self, python: str, library: str, get: str) -> Case:
        """The smallest script that does what `status` does, with a library."""
        path = self.folder / f"status_with_{library.replace('.', '_')}.py"
        path.write_text(STATUS_SCRIPT.format(library=library, get=get.format(library=library)))
        return Case((python, str(path), *self.status))

    def build(self, root: Path) -> str:
        """Build the archive of a checkout; return its path."""
        path = str(self.folder / f"{root.name}.pyz")
        self.call(sys.executable, "-B", str(root / "zipapp" / "build.py"), "-o", path)
        return path

    def document(self, endpoint: str, count: int, pieces: Iterable[str]) -> tuple[str, Path]:
        """Make a document what the endpoint answers; return the API's URL and the file."""
        prefix = f"{endpoint}-{count}"
        path = self.folder / prefix / "api/v1/containers" / endpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(pieces)  # never whole in this process, which has to stay small
        return f"{self.origin}/{prefix}", path

    def run(self, case: Case) -> Usage:
        """Run one process to its end. Not by fork, the time of which would be counted too."""
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
        start = time.monotonic()
        pid = os.posix_spawn(case.argv[0], case.argv, self.environ, file_actions=null)
        _, status, usage = os.wait4(pid, 0)
        seconds = time.monotonic() - start
        code = os.waitstatus_to_exitcode(status)
        if code != case.code:
            raise SystemExit(f"exit code {code}, not {case.code}: {shlex.join(case.argv)}")
        return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * RSS_UNIT, seconds)

    def in_turn(self, order: Sequence[Case], rounds: int) -> list[Round]:
        """Run the cases one after the other, round by round; return all rounds of them so far."""
        done = self._rounds.setdefault(tuple(order), [])
        for _ in range(rounds):
            taken: dict[Case, list[Usage]] = {}
            for case in order:
                taken.setdefault(case, []).append(self.run(case))
            done.append({case: Usage(*map(median, zip(*n))) for case, n in taken.items()})
        return done


# ---- The rows ---------------------------------------------------------------------------------

# A function yields the figures of its rows in ROWS, and those after one more pass each time that it
# is asked for more.
Passes = Iterator[Sequence[Figure]]


def starts(bench: Bench) -> Passes:
    bare = Case((bench.python, "-c", "pass"))
    calls = {("--version",): 0, ("--help",): 0, ("status", "--no-such-option"): 2}
    cases = [Case((bench.installed, *call), code) for call, code in calls.items()]
    told = ""
    for case in cases:
        command = [bench.python, "-X", "importtime", *case.argv]
        told += subprocess.run(command, env=bench.environ, capture_output=True, text=True).stderr
    names = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    network = ("socket.", "ssl.", "http.", "urllib.request.")
    found = sorted(name for name in names if f"{name}.".startswith(network))
    modules = Figure(len(found), ", ".join(found) or f"of {len(names)} modules")
    while True:
        rounds = bench.in_turn([bare, *cases], bench.sizes.rounds)
        yield [*(cpu_ratio(rounds, case, bare) for case in cases), modules]


def archive_start(bench: Bench) -> Passes:
    other = bench.folder / "does-nothing"
    shutil.copytree(ROOT / "zipapp", other / "zipapp")
    (other / "zipapp" / "__main__.py").write_text("pass\n")
    (other / "bus_containers.py").write_text("pass\n")
    empty = Case((bench.python, bench.build(other)))
    ours = Case((bench.python, bench.archive, "--version"))
    while True:
        yield [cpu_ratio(bench.in_turn([empty, ours], bench.sizes.rounds), ours, empty)]


def status(bench: Bench) -> Passes:
    script = bench.script(bench.python, "urllib.request", URLLIB)
    ours = [Case((bench.installed, *bench.status))]
    ours += [Case((bench.python, bench.archive, *bench.status))]
    while True:
        rounds = bench.in_turn([script, *ours], bench.sizes.rounds)
        yield [cpu_ratio(rounds, case, script) for case in ours]


def rivals(bench: Bench) -> Passes:
    installed = bench.venv("venv-of-rivals", "--without-pip")
    python = str(Path(installed).with_name("python"))
    ours = Case((installed, *bench.status))
    scripts: dict[str, Case | None] = {}
    for library in ("requests", "httpx"):
        scripts[library] = bench.script(python, library, LIKE_REQUESTS)
        try:
            bench.pip(python, library)
        except RuntimeError as error:
            scripts[library] = None
            print(f"{library} is left out: {error}")
    measured = [ours, *filter(None, scripts.values())]
    while True:
        rounds = bench.in_turn(measured, bench.sizes.rounds)
        yield [cpu_ratio(rounds, ours, n) if n else LEFT_OUT for n in scripts.values()]


def dead_address(bench: Bench) -> Passes:
    """A name with a dead address before the good one, in an /etc/hosts that only we see."""
    hosts = bench.folder / "hosts"
    hosts.write_text("127.0.0.3 good.test\n127.0.0.2 dead.test\n127.0.0.3 dead.test\n")
    own_user = ["-r"] if os.geteuid() else []
    mount = f'mount --bind {shlex.quote(str(hosts))} /etc/hosts && exec "$@"'
    inside = (shutil.which("unshare") or "unshare", "-m", *own_user, "sh", "-c", mount, "sh")
    look_up = "import socket; print(socket.getaddrinfo('dead.test', 80)[0][4][0])"
    try:
        assert bench.call(*inside, bench.python, "-c", look_up) == "127.0.0.2\n"
    except (OSError, RuntimeError) as error:
        print(f"a dead address is left out: {error}")
        yield [LEFT_OUT]
        return
    with serving(str(bench.folder), "127.0.0.3") as origin, ExitStack() as stack:
        # A connection to a full queue is neither made nor refused.
        port = int(origin.rpartition(":")[2])
        full, *fillers = (stack.enter_context(socket.socket()) for _ in range(5))
        full.bind(("127.0.0.2", port))
        full.listen(0)
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        words = (*inside, bench.installed, "status", "--api-url")
        urls = (f"http://{name}.test:{port}/status-1" for name in ("dead", "good"))
        dead, good = (Case((*words, url)) for url in urls)
        while True:
            rounds = bench.in_turn([good, dead], bench.sizes.rounds)
            pairs = ((each[dead].seconds, each[good].seconds) for each in rounds)
            yield [
                lower_quartile(
                    Figure(slow - fast, f"{slow:.3f} - {fast:.3f} s on the clock")
                    for slow, fast in pairs
                )
            ]


def large_answer(bench: Bench) -> Passes:
    mib, units = bench.sizes.answer_mib, bench.sizes.linear_mib
    documents = {n: bench.document("runs", n, a_run(n)) for n in (0, mib, *units)}
    answer = documents[mib][1].stat().st_size
    cases: dict[str, dict[int, Case]] = {}
    for form in ("json", "text"):
        words = (bench.installed, "-f", form, "run", "--api-url")
        runs = {n: Case((*words, url, "--", "make", "test")) for n, (url, _) in documents.items()}
        cases[form] = runs
    small = [runs[n] for runs in cases.values() for n in (0, units[0])] * OFTEN
    large = [runs[n] for runs in cases.values() for n in (mib, units[1])]
    while True:
        rounds = bench.in_turn([*small, *large], bench.sizes.few)
        yield [
            *(peak_ratio(rounds, runs[mib], runs[0], answer) for runs in cases.values()),
            *(linearity(rounds, runs, *units) for runs in cases.values()),
        ]


def peak_ratio(rounds: Iterable[Round], ours: Case, start: Case, answer: int) -> Figure:
    # Linux starts a process's peak at that of the process from which it was spawned.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
    assert all(each[start].peak_bytes > own for each in rounds)
    peaks = (each[ours].peak_bytes - each[start].peak_bytes for each in rounds)
    return lower_quartile(
        Figure(above / answer, f"{above / MIB:.1f} : {answer / MIB:.1f} MiB") for above in peaks
    )


def many_runs(bench: Bench) -> Passes:
    few, many = bench.sizes.linear_runs
    documents = {n: bench.document("runs", n, a_list(n)) for n in (0, few, many)}
    scripts = {"json": LOADS_DUMPS, "tsv": LOADS_CSV, "text": LOADS_CSV}
    others = {n: Case((bench.python, "-c", n, str(documents[many][1]))) for n in scripts.values()}
    cases: dict[str, dict[int, Case]] = {}
    for form in FORMATS:
        words = (bench.installed, "-f", form, "runs", "--api-url")
        cases[form] = {n: Case((*words, url)) for n, (url, _) in documents.items()}
    small = [cases[form][n] for form in FORMATS for n in (0, few)] * OFTEN
    large = [cases[form][many] for form in FORMATS]
    while True:
        rounds = bench.in_turn([*small, *others.values(), *large], bench.sizes.few)
        ratios = [cpu_ratio(rounds, cases[n][many], others[scripts[n]]) for n in FORMATS]
        yield [*ratios, *(linearity(rounds, cases[form], few, many) for form in FORMATS)]


# What measures a row, its text and its bound. Linear is 1.5, for a large document meets colder
# caches and newer pages than a small one; what is quadratic would be at 64 and 100.
ROWS = [
    (starts, "installed --version : python -c pass", 2.2),
    (starts, "installed --help : python -c pass", 2.2),
    (starts, "installed usage error : python -c pass", 2.3),
    (starts, "network modules that these three import", 0),
    (archive_start, "archive --version : an archive that does nothing", 1.3),
    (status, "installed status : script with urllib.request", 1.00),
    (status, "archive status : script with urllib.request", 1.10),
    (rivals, "installed status : script with requests", 0.55),
    (rivals, "installed status : script with httpx", 0.50),
    (dead_address, "seconds that a dead first address adds to a status", 0.5),
    (large_answer, "run of {answer} MiB, json, peak above a small run's : answer", 2.3),
    (large_answer, "run of {answer} MiB, text, peak above a small run's : answer", 2.3),
    (large_answer, "run, json, per MiB above a start, {MIB} MiB : {mib} MiB", 1.5),
    (large_answer, "run, text, per MiB above a start, {MIB} MiB : {mib} MiB", 1.5),
    (many_runs, "{RUNS:,} runs, json : json.loads + json.dumps", 1.3),
    (many_runs, "{RUNS:,} runs, tsv : json.loads + csv.writer", 2.0),
    (many_runs, "{RUNS:,} runs, text : json.loads + csv.writer", 2.0),
    (many_runs, "runs, json, per run above a start, {RUNS:,} : {runs:,}", 1.5),
    (many_runs, "runs, tsv, per run above a start, {RUNS:,} : {runs:,}", 1.5),
    (many_runs, "runs, text, per run above a start, {RUNS:,} : {runs:,}", 1.5),
]


def table(bench: Bench, only: str) -> int:
    """Measure and print the rows with `only` in their text; return how many miss their bound."""
    sizes, missed = bench.sizes, 0
    ends = dict(zip(("mib", "MIB", "runs", "RUNS"), (*sizes.linear_mib, *sizes.linear_runs)))
    layout = "{:60}  {:>5}  {:>5}  {:8}  {}"
    print(layout.format("what", "is", "bound", "verdict", "of the round"))
    for measure, group in itertools.groupby(ROWS, key=lambda row: row[0]):
        rows = [(text.format(answer=sizes.answer_mib, **ends), bound) for _, text, bound in group]
        wanted = [number for number, (what, _) in enumerate(rows) if only in what]
        if not wanted:
            continue
        for figures in itertools.islice(measure(bench), PASSES):
            verdicts = [verdict(figure, bound) for figure, (_, bound) in zip(figures, rows)]
            if "MISSED" not in [verdicts[number] for number in wanted]:
                break
        for number in wanted:
            (what, bound), (figure, of) = rows[number], figures[number]
            shown = "-" if math.isnan(figure) else f"{figure:.2f}"
            missed += verdicts[number] == "MISSED"
            print(layout.format(what, shown, f"{bound:.2f}", verdicts[number], of), flush=True)
    return missed


def verdict(figure: Figure, bound: float) -> str:
    if math.isnan(figure.number):
        return "left out"
    return "ok" if figure.number <= bound else "MISSED"


def main() -> int:
    """Measure and print; return 1 if --check was given and a bound is missed."""
    parser = argparse.ArgumentParser(description="Measure what the project promises of its speed.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller sizes")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    parser.add_argument("--only", metavar="SUBSTRING", default="", help="the rows with it")
    parser.add_argument("--serve", metavar="HOST", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name, serving(name) as origin:
        print(f"Python {sys.version.split()[0]}, CPU and memory of whole processes, in turn")
        bench = Bench(Path(name), origin, QUICK if args.quick else FULL)
        missed = table(bench, args.only)
        print(f"load {os.getloadavg()[1]:.1f} on {os.cpu_count()} CPUs")
    return int(args.check and missed > 0)


if __name__ == "__main__":
    sys.exit(main())
