#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Build the zipapp: `python3 zipapp/build.py [-o PATH]`, standard library only, offline.

The archive holds each source and, beside it, the byte code that the building Python makes of it.
That Python starts from the byte code; any other one finds a foreign magic number in it and takes
the source. The same tree and the same Python give the same bytes, wherever and whenever.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["zipapp/__main__.py", "bus_containers.py"]
SHEBANG = b"#!/usr/bin/env python3\n"

# The first and the last date that a zip entry can have, in seconds since 1970, UTC.
FIRST_DATE, LAST_DATE = 315532800, 4354819198

# What marshal writes depends on the process as well as on the code: a constant set goes out in hash
# order (3.9 and 3.10), and an object is marked according to whether anything else holds it too. So
# the code is compiled in a new interpreter that is the same each time: nothing imported, nothing
# set, a fixed hash seed. The file name that goes into the code says nothing about this machine.
# Columns, which a traceback would underline (3.11 and later), would make the archive 15 KB larger.
COMPILE = """
import marshal, sys
source = sys.stdin.buffer.read()
code = compile(source, sys.argv[1], "exec", dont_inherit=True, optimize=0)
sys.stdout.buffer.write(marshal.dumps(code))
"""


def byte_code(source: bytes, name: str) -> bytes:
    """Return the .pyc of a source, of the kind that is used without a look at the source (PEP 552).

    Its header: the magic number, flags (1: hash, unchecked) and the hash of the source.
    """
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    if "PYTHONHOME" in os.environ:  # where its standard library is
        environ["PYTHONHOME"] = os.environ["PYTHONHOME"]
    environ["PYTHONHASHSEED"] = "0"
    compiler = [sys.executable, "-S", "-X", "utf8", "-X", "no_debug_ranges"]
    compiler += ["-c", COMPILE, name]
    done = subprocess.run(compiler, input=source, env=environ, stdout=subprocess.PIPE)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"build.py: {name} does not compile")
    flags = (0b01).to_bytes(4, "little")
    return importlib.util.MAGIC_NUMBER + flags + importlib.util.source_hash(source) + done.stdout


def entry_date(environ: Mapping[str, str]) -> tuple[int, int, int, int, int, int]:
    """Return the date of all entries: SOURCE_DATE_EPOCH where it is set, else zip's first."""
    epoch = environ.get("SOURCE_DATE_EPOCH") or str(FIRST_DATE)
    try:
        seconds = min(max(int(epoch), FIRST_DATE), LAST_DATE)
    except ValueError:
        raise SystemExit(f"build.py: SOURCE_DATE_EPOCH={epoch!r} is no whole number") from None
    return time.gmtime(seconds)[:6]


def archive(date: tuple[int, int, int, int, int, int]) -> bytes:
    """Return the archive: each source and its byte code, always in the same order."""
    entries: dict[str, bytes] = {}
    for path in SOURCES:
        source = (ROOT / path).read_bytes()
        entries[Path(path).name] = source
        entries[Path(path).name + "c"] = byte_code(source, Path(path).name)
    whole = io.BytesIO()
    whole.write(SHEBANG)
    with zipfile.ZipFile(whole, "w") as zipped:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name, date)
            entry.create_system = 3  # Unix, whatever this is
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            # Stored, the module would start a millisecond earlier and be three times as large.
            # What starts it has to be read by a Python without zlib, to say so.
            is_start = name.startswith("__main__.")
            method = zipfile.ZIP_STORED if is_start else zipfile.ZIP_DEFLATED
            zipped.writestr(entry, content, method, compresslevel=9)
    return whole.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write an executable file in one step, so that nobody ever runs half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        temporary.chmod(0o755)
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise


def main() -> int:
    """Build the archive and print its SHA-256 as sha256sum does."""
    parser = argparse.ArgumentParser(description="Build bus-containers as one executable file.")
    default = ROOT / "dist" / "bus_containers.pyz"
    told = "where to write it (default: dist/bus_containers.pyz in this checkout)"
    parser.add_argument("-o", "--output", metavar="PATH", type=Path, default=default, help=told)
    path: Path = parser.parse_args().output
    try:
        content = archive(entry_date(os.environ))
        write(path.resolve(), content)
    except OSError as error:
        raise SystemExit(f"build.py: {error}") from None
    print(f"{hashlib.sha256(content).hexdigest()}  {path}")
    print(f"{len(content):,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
