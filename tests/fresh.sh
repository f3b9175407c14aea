#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
#     tests/fresh.sh [SUITE[:USER]...]      (default: bullseye bookworm trixie sid)
#
# Proves the two commands of the README on fresh machines. For each suite of Debian it makes a
# minimal root with python3, python3-venv and git. There root (in /root, mode 700) and then the ordinary
# user `person`, or only the one that is named, type the two commands in a clone of what is committed
# here.
#
# Needs root and Debian's mmdebstrap, and git and a Python with venv. The roots are made anew each
# time, in one temporary folder, and go with it.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

skip() {
    echo "SKIP: tests/fresh.sh needs $1"
    exit 0
}
[ "$(id -u)" = 0 ] || skip root
for tool in git mmdebstrap python3 unshare; do
    command -v "$tool" >/dev/null || skip "$tool"
done

suites=("$@")
[ $# -gt 0 ] || suites=(bullseye bookworm trixie sid)
limit=900 # seconds for a command

work=$(mktemp -d -t bus-containers-fresh.XXXXXX)
chmod 711 "$work" # apt is another user
: >"$work/results"

set -m # each job is a process group, so that it can be ended as a whole
cleanup() {
    trap - EXIT
    set +e
    local job
    for job in $(jobs -p); do kill -KILL -- "-$job"; done 2>/dev/null
    wait
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# tell LINE [FILE]: prints LINE for later counting; the end of FILE says why.
tell() {
    echo "$1" >>"$work/results"
    echo "$1${2:+
$(tail -n 2000 -- "$2" | sed 's/^/    /')}"
}

# ---- What the roots are given ------------------------------------------------------------------

mapfile -t commands < <(grep -E '^    python3 ' README.md | head -n 2 | sed 's/^    //')
[ "${#commands[@]}" = 2 ] || { tell "not ok - the README has two commands" README.md; exit 1; }

# A clone has objects of its own: chown must not reach this checkout's.
git clone -q --no-hardlinks . "$work/clone"

# The roots ask the same package index as this machine: what pip is told here of an index, a proxy
# and certificates, by files or by the environment, is /etc/pip.conf there, and the files and folders
# that it names are lent.
python3 -m venv "$work/venv"
"$work/venv/bin/pip" config list >"$work/pip.list"
python3 - "$work" <<'END'
import ast, os, pathlib, re, sys

work = pathlib.Path(sys.argv[1])
about_the_index = (
    "cert client-cert default-timeout extra-index-url find-links index-url no-index proxy retries "
    "timeout trusted-host"
).split()
found = {}
for line in (work / "pip.list").read_text().splitlines():
    name, _, value = line.partition("=")
    section, _, option = name.rpartition(".")
    if option in about_the_index and section in ("global", "install", ":env:"):
        found[option] = ast.literal_eval(value)
for option, names in {
    "cert": "REQUESTS_CA_BUNDLE CURL_CA_BUNDLE SSL_CERT_FILE",
    "proxy": "https_proxy HTTPS_PROXY all_proxy ALL_PROXY",
}.items():
    for value in filter(None, map(os.environ.get, names.split())):
        found.setdefault(option, value)
lines = [f"{option} = {' '.join(value.split())}\n" for option, value in found.items()]
(work / "pip.conf").write_text("".join(["[global]\n", *lines]))
# The packages of an index in files lie beside its folder "simple".
paths = re.findall(r"(?<!\S)(?:file://)?(/\S*?)(?:/simple/?)?(?!\S)", " ".join(found.values()))
(work / "lent").write_text("".join(f"{path}\n" for path in paths if os.path.exists(path)))
END

# ---- A machine ---------------------------------------------------------------------------------

# make SUITE: makes its root.
make() {
    unshare --mount --pid --mount-proc --fork --kill-child \
        mmdebstrap --mode=root --variant=minbase --include=python3,python3-venv,git \
        --aptopt='Acquire::Check-Valid-Until "false"' "$1" "$work/$1" >"$work/$1.log" 2>&1 &&
        cp "$work/pip.conf" "$work/$1/etc/pip.conf" &&
        { [ -s "$work/$1/etc/hosts" ] || echo '127.0.0.1 localhost' >"$work/$1/etc/hosts"; } &&
        chroot "$work/$1" useradd --create-home --shell /bin/bash person >>"$work/$1.log" 2>&1
}

# Enters a root in namespaces of its own. Process 1 there is a shell, which reaps orphans as a machine's
# init does; and it is no chroot, in which the kernel refuses some calls.
cat >"$work/enter" <<'END'
root=$1 lent=$2 user=$3 command=$4
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts "$root/dev/pts"
mount --bind "$root/dev/pts/ptmx" "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
while read -r path; do
    if [ -d "$path" ]; then
        mkdir -p "$root$path"
    else
        mkdir -p "$root${path%/*}"
        touch "$root$path"
    fi
    mount --bind -o ro "$path" "$root$path"
done <"$lent"
cd "$root"
pivot_root . .
umount -l .
cd /
su --login "$user" --command "cd bus-containers && $command" && exit 0 || exit $?
END

# type_in ROOT USER COMMAND: USER logs in and types COMMAND in the clone.
type_in() {
    timeout --foreground --signal KILL "$limit" \
        unshare --mount --pid --fork --kill-child \
        bash -eu "$work/enter" "$1" "$work/lent" "$2" "$3" </dev/null
}

# try_as USER SUITE VERSION: USER types the two commands in the suite's root.
try_as() {
    local who="$2 (Python $3), $1" root="$work/$2" log="$work/$2.log" home number began code said
    find "$root/tmp" "$root/var/tmp" -mindepth 1 -delete # as after a restart
    home=$(awk -F : -v name="$1" '$1 == name { print $6 }' "$root/etc/passwd")
    cp -a "$work/clone" "$root$home/bus-containers"
    chroot "$root" chown -R "$1:" "$home/bus-containers"
    chmod 700 "$root$home"
    for number in 0 1; do
        began=$SECONDS code=0
        type_in "$root" "$1" "${commands[number]}" >"$log" 2>&1 || code=$?
        case $number in
        0) said=$(grep -m 1 -o '"stdout": "OK"' "$log") || said='' ;;
        1) said=$(grep -o '\b[1-9][0-9]* passed.*' "$log" | tail -n 1) || said='' ;;
        esac
        if [ "$code" = 0 ] && [ -n "$said" ]; then
            tell "ok - $who: ${commands[number]} # $((SECONDS - began)) s: $said"
        else
            tell "not ok - $who: ${commands[number]} # $((SECONDS - began)) s: exit code $code" "$log"
        fi
    done
}

# try SUITE USER...: makes its root and lets the users in.
try() {
    local began=$SECONDS version user
    if ! make "$1"; then
        if grep -q "does not have a Release file" "$work/$1.log"; then
            tell "SKIP: $1: the mirror does not have it: $(grep -m 1 '^E: ' "$work/$1.log")"
        else
            tell "not ok - $1: a root is made" "$work/$1.log"
        fi
        return
    fi
    version=$(chroot "$work/$1" python3 -c 'print("%d.%d.%d" % __import__("sys").version_info[:3])')
    tell "ok - $1 (Python $version): a root is made # $((SECONDS - began)) s"
    for user in "${@:2}"; do try_as "$user" "$1" "$version"; done
    rm -rf --one-file-system "${work:?}/$1"
}

# ---- All of them, as many at a time as there are cores -----------------------------------------

for suite in "${suites[@]}"; do
    while [ "$(jobs -pr | wc -l)" -ge "$(nproc)" ]; do wait -n || true; done
    {
        case $suite in
        *:*) try "${suite%%:*}" "${suite#*:}" ;;
        *) try "$suite" root person ;;
        esac
        : >"$work/$suite.done"
    } &
done
wait
for suite in "${suites[@]}"; do
    [ -e "$work/$suite.done" ] || tell "not ok - $suite: was tried to the end"
done

count() { grep -c "^$1" "$work/results" || true; }
echo "$(count 'ok - ') passed, $(count 'not ok - ') failed, $(count 'SKIP: ') skipped"
[ "$(count 'not ok - ')" = 0 ]
