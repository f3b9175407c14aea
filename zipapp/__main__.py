# SPDX-License-Identifier: MIT
"""Start the archive. Every Python back to 2.7 has to parse this file, to say that it is too old."""

import sys


def refuse(reason):
    """End with one line on standard error and the exit code of a usage error."""
    sys.stderr.write("bus-containers: " + reason + " (" + str(sys.executable) + ")\n")
    sys.exit(2)


def main():
    """Check what the module needs, then hand over to it."""
    if sys.version_info < (3, 9):  # noqa: UP036 - whatever Python is there runs this
        version = ".".join(map(str, sys.version_info[:2]))
        refuse("needs Python 3.9 or newer; this is " + version)

    from importlib.util import find_spec  # costs nothing: what runs an archive has it loaded

    if find_spec("http") is None:
        refuse("this Python has no `http`: install `python3`, python3-minimal is not enough")
    if find_spec("zlib") is None:
        refuse("this Python has no `zlib`, to unpack this: take the file bus_containers.py")

    try:
        from bus_containers import console
    except (ImportError, MemoryError) as error:
        refuse("cannot start: " + (str(error) or "there is not enough memory"))

    console()


main()
