#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Builds the image and proves it where no registry and no engine is at hand: its bases are made of
# Debian packages, the stand-in platform answers it, and in the end a run is a container, too.
#
# Needs root, Debian's podman, buildah, runc and mmdebstrap, and a Python with pip. All that it
# makes is in one temporary folder, the engine's storage included, and goes with it.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

skip() {
    echo "SKIP: tests/image.sh needs $1"
    exit 0
}
[ "$(id -u)" = 0 ] || skip root
for tool in podman buildah runc mmdebstrap unshare python3; do
    command -v "$tool" >/dev/null || skip "$tool"
done
python3 -m pip --version >/dev/null 2>&1 || skip "pip"

# Every mount that an engine makes ends with this process and its children.
[ "${1-}" = unshared ] || exec unshare --mount bash tests/image.sh unshared

work=$(mktemp -d -t bus-containers-image.XXXXXX)
chmod 711 "$work" # apt and the program in its container are other users
export TMPDIR=$work
passed=0 failed=0 platform=''
declare -A job=()

cleanup() {
    trap - EXIT ERR
    set +e
    exec >/dev/null 2>&1
    kill "$platform"
    [ ! -x "$work/podman" ] || "$work/podman" rm --all --force --time 0
    kill -KILL "${job[@]}"
    wait
    findmnt --raw --noheadings --output TARGET | grep "^$work/" | sort -r | xargs -r umount
    rmdir /sys/fs/cgroup/{,*/}libpod_parent{/conmon,} # unless in use
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'echo "not ok - line $LINENO: $BASH_COMMAND"' ERR

# ---- Checks ------------------------------------------------------------------------------------

ok() {
    passed=$((passed + 1))
    echo "ok - $1"
}

# not_ok WHAT FILE...: the files tell why.
not_ok() {
    failed=$((failed + 1))
    echo "not ok - $1"
    shift
    tail -n 2000 -- "$@" | sed 's/^/    /'
}

# expect WHAT CODE out|err TEXT COMMAND...: COMMAND ends with CODE, and says TEXT but not the token.
expect() {
    local what=$1 code=$2 stream=$3 text=$4 got=0
    shift 4
    "$@" >"$work/out" 2>"$work/err" </dev/null || got=$?
    if [ "$got" = "$code" ] && { [ -z "$text" ] || grep -qF -e "$text" "$work/$stream"; } &&
        ! grep -qF -e "${BUS_AI_TOKEN:-no token yet}" "$work/out" "$work/err"; then
        ok "$what"
    else
        not_ok "$what: exit code $got, not $code with '$text' in std$stream" "$work"/{out,err}
    fi
}

# start JOB COMMAND...: runs COMMAND in the background.
start() {
    local name=$1
    shift
    "$@" >"$work/$name.log" 2>&1 &
    job[$name]=$!
}

# finish JOB: waits for it, says what it said and ends as it ended.
finish() {
    local code=0
    wait "${job[$1]}" || code=$?
    unset "job[$1]"
    cat "$work/$1.log"
    return "$code"
}

# eventually SECONDS COMMAND...: tries COMMAND until it succeeds.
eventually() {
    local end=$((SECONDS + $1))
    shift
    until "$@" 2>"$work/err"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}

# ---- Engine and bases --------------------------------------------------------------------------

# Limits under the engine's own, which a container in a container may not raise; locks beside the
# storage, since those in shared memory are common to all of the machine's containers.
cat >"$work/containers.conf" <<END
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=512:512"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
runtime = "runc"
[network]
network_config_dir = "$work/network"
END
cat >"$work/registries.conf" <<END
unqualified-search-registries = ["docker.io"]
short-name-mode = "disabled"
END
storage=(--root "$work/storage" --runroot "$work/run" --storage-driver overlay)
export CONTAINERS_CONF=$work/containers.conf CONTAINERS_REGISTRIES_CONF=$work/registries.conf
cat >"$work/podman" <<END
#!/bin/sh
export CONTAINERS_CONF=$CONTAINERS_CONF CONTAINERS_REGISTRIES_CONF=$CONTAINERS_REGISTRIES_CONF
exec podman ${storage[*]} --tmpdir $work/tmp "\$@"
END
chmod 755 "$work/podman"

podman() { "$work/podman" "$@"; }

# build IMAGE OPTION...: builds from the Dockerfile, and pulls nothing.
build() {
    buildah "${storage[@]}" bud --isolation chroot --pull-never --tag "$1" "${@:2}" .
}

# base NAME OPTION... SUITE: makes the base in the background, in namespaces that end with it.
base() {
    start "$1" unshare --mount --pid --mount-proc --fork --kill-child \
        mmdebstrap --mode=root --variant=minbase "${@:2}" "$work/$1.tar"
}

# import NAME IMAGE: waits for the base and imports it.
import() {
    finish "$1" >"$work/out" || { not_ok "base $1" "$work/out" && exit 1; }
    podman import --quiet "$work/$1.tar" "$2" >"$work/out"
    rm "$work/$1.tar"
}

python=docker.io/library/python:3.14-slim # what the Dockerfile asks for
base trixie --include=python3,ca-certificates trixie
base minimal --include=python3-minimal trixie
base sid --include=python3,python3-venv,python3-pytest,openssl,tinyproxy,locales \
    --aptopt='Acquire::Check-Valid-Until "false"' sid

# ---- The image ---------------------------------------------------------------------------------

import trixie "$python"
expect "the Dockerfile builds as it stands" 0 out "COMMIT bus-containers" build bus-containers
podman image diff bus-containers "$python" | grep -v '^C' >"$work/added" || true
expect "the image adds one file to its base" 0 out "A /usr/local/bin/bus-containers" \
    sh -c "cat $work/added && [ \$(wc -l <$work/added) = 1 ]"
expect "its user is a number, and not root's" 0 out "65532" \
    podman image inspect --format '{{.Config.User}}' bus-containers

# The program as an operator starts it who trusts nobody.
tight=(--read-only --cap-drop all --security-opt no-new-privileges --user 12345:12345)
ours=(--network host --env BUS_AI_API_URL)
client() { podman run --rm "${tight[@]}" "${ours[@]}" --env BUS_AI_TOKEN bus-containers "$@"; }

expect "it starts" 0 out "bus-containers " client --version
expect "its byte code is its own Python's" 0 out "True" \
    podman run --rm "${tight[@]}" --network none --entrypoint python3 bus-containers -c "
import importlib.util, zipfile
archive = zipfile.ZipFile('/usr/local/bin/bus-containers')
print(archive.read('bus_containers.pyc')[:4] == importlib.util.MAGIC_NUMBER)"

# ---- Against the stand-in ----------------------------------------------------------------------

# start_platform OPTION...: starts the stand-in and takes on what it says to export.
start_platform() {
    local line
    exec {lines}< <(exec python3 tests/local_platform.py "$@" 2>"$work/platform.log")
    platform=$!
    for _ in directory URL; do
        if ! read -r -t 30 line <&"$lines"; then
            not_ok "the stand-in starts" "$work/platform.log" && exit 1
        fi
        eval "$line"
    done
    BUS_AI_TOKEN=$(cat "$BUS_CONFIG_DIR/auth/api-token")
    export BUS_AI_TOKEN
}

stop_platform() {
    kill "$platform"
    wait "$platform" || true
    platform=''
    exec {lines}<&-
}

column() { client --format tsv runs | awk -F '\t' -v state="$1" '$2 == state { print $1 }'; }
running() { [ -n "$(column running)" ]; }
no_container() { [ -z "$(podman ps --quiet)" ]; }

start_platform
expect "status" 0 out '"items"' client status
expect "a run's output arrives" 0 out '"stdout": "OK"' client run -- sh -c 'printf OK'
expect "a run's exit code arrives" 37 out '"exit_code": 37' client run -- sh -c 'exit 37'
id=$(column exited | head -n 1) || true
expect "runs lists a run" 0 out "\"run_id\": \"$id\"" client runs
expect "delete deletes it" 0 out '"deleted": true' client delete "$id"
expect "and not twice" 1 err "$id" client delete "$id"
expect "a token on standard input" 0 out '"items"' \
    sh -c "'$work/podman' run --rm --interactive ${tight[*]} ${ours[*]} bus-containers \
        status --token-file - <'$BUS_CONFIG_DIR/auth/api-token'"

start interrupted podman run --name interrupted "${tight[@]}" "${ours[@]}" --env BUS_AI_TOKEN \
    bus-containers run -- sleep 60
eventually 20 running || not_ok "runs lists a run in progress" "$work/interrupted.log"
now=$(date +%s%3N)
podman kill --signal TERM interrupted >/dev/null || true
expect "SIGTERM ends the program as PID 1, and it tells of the run" \
    143 out "bus-containers delete" finish interrupted
took=$(($(podman inspect --format '{{.State.FinishedAt.UnixMilli}}' interrupted) - now))
podman rm interrupted >/dev/null
expect "within a second ($took ms)" 0 out '' test "$took" -lt 1000
stop_platform

# ---- A run that is a container -----------------------------------------------------------------

start_platform --engine "$work/podman run --rm --network none" --profile-image "codex=$python"
expect "a run is a container without a network" 37 out '"stdout": "lo\n"' \
    client run -- sh -c 'test -e /run/.containerenv && ls /sys/class/net; exit 37'
expect "its time limit ends it" 124 out '"exit_code": 124' \
    client run --image "$python" --timeout-seconds 1 -- sleep 60
start deleted client run --image "$python" -- sleep 60
eventually 20 running || not_ok "runs lists it in progress" "$work/deleted.log"
expect "delete ends it" 0 out '"deleted": true' client delete "$(column running)"
expect "and its client says so" 137 out '"exit_code": 137' finish deleted
expect "no container outlives its run" 0 out '' eventually 5 no_container
stop_platform

# ---- Other Pythons -----------------------------------------------------------------------------

import minimal localhost/minimal
podman create --network none --name archive bus-containers >/dev/null
podman cp archive:/usr/local/bin/bus-containers "$work/bus-containers"
podman rm archive >/dev/null
tight+=(--network none --volume "$work/bus-containers:/bus-containers.pyz:ro")
expect "python3-minimal: the archive says what to install" 2 err "install" \
    podman run --rm "${tight[@]}" localhost/minimal /bus-containers.pyz status

import sid localhost/sid
expect "sid: Python is 3.14" 0 out "Python 3.14." \
    podman run --rm "${tight[@]}" localhost/sid python3 --version

# The tests' packages are fetched here, so that the build needs no network and no certificates.
python3 -m pip download --dest "$work/wheels" flit_core '.[test]' >"$work/pip.log" 2>&1 ||
    not_ok "pip fetches what the tests need" "$work/pip.log"
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$work/pip.conf"
grep '^    python3 -m venv ' README.md | sed 's/^    /RUN /' >"$work/command"
expect "the Dockerfile's target \"test\" runs the README's second command" 0 out "RUN python3" \
    grep -xF -f "$work/command" Dockerfile
# SYS_ADMIN is for the tests that lay a file of their own over one in /etc, for themselves alone.
start module build localhost/test --target test --build-arg PYTHON_IMAGE=localhost/sid \
    --cap-add CAP_SYS_ADMIN --volume "$work/wheels:/wheels:ro" \
    --volume "$work/pip.conf:/etc/pip.conf:ro"
start archive podman run --rm "${tight[@]}" --tmpfs /tmp --volume "$PWD:/src:ro" --workdir /src \
    --sysctl net.ipv4.ip_unprivileged_port_start=0 localhost/sid \
    python3 -m pytest -p no:cacheprovider --target=/bus-containers.pyz \
    tests/test_{distribution,end_to_end,library,help}.py
expect "3.14: the tests pass in the Dockerfile's target of that name" 0 out " passed" finish module
expect "3.14: those of an archive pass with it, read-only, without root" 0 out " passed" \
    finish archive

echo "$passed passed, $failed failed"
[ "$failed" = 0 ] || exit 1
