#!/usr/bin/env bash
# Makes .venv with everything the trainer and its tests need: the CUDA set where nvidia-smi lists a GPU, else the
# CPU set, in the versions of requirements/, each file checked by its hash (the oldest set: versions only). Safe to run
# again (does nothing when up to date), to interrupt, and to run twice at once.
#
#   scripts/install.sh          # the newest versions
#   scripts/install.sh oldest   # the oldest (requirements/oldest.txt: torch 2.11), in .venv-oldest
#
# On a CPU machine PyPI's torch brings gigabytes of CUDA libraries that are never used. To spare them:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu scripts/install.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
set=${1:-newest}
case $set in
    newest) venv=$root/.venv ;;
    oldest) venv=$root/.venv-oldest ;;
    *) echo "usage: scripts/install.sh [oldest]" >&2 && exit 2 ;;
esac
python=$venv/bin/python
stamp=$venv/.installed
ours=$venv/.made_by_install_sh # only such a directory is ever emptied
log=$venv/install.log

say() { echo "[set-up] $*"; }
fail() {
    echo "[set-up] $1" >&2
    shift
    for line in "$@"; do echo "         $line" >&2; done
    exit 1
}
trap 'echo; say "interrupted; run the same command again to go on" >&2; exit 130' INT TERM

# The first interpreter that runs (version managers leave commands that only say what to install) and is new enough.
find_python() {
    local candidate
    for candidate in python3.12 python3.11 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

# What the installed set depends on (console scripts hold the path); a change of any of it installs again.
wanted_stamp() { printf "%s %s %s\n" "$kind" "$(cat pyproject.toml setup.py scripts/install.sh requirements/*.txt | sha256sum | cut -d" " -f1)" "$root"; }

up_to_date() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted_stamp)" ] && "$python" -c '' >/dev/null 2>&1
}

check_disk() {
    local free_gb
    free_gb=$(($(df -Pk "$root" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
    if [ "$free_gb" -lt "$needed_gb" ]; then
        fail "not enough disk: $free_gb GB free at $root, the $kind set needs $needed_gb GB." \
            "Free some space, or move the repository to a larger disk, and run this again."
    fi
}

make_venv() {
    local base message
    if [ -L "$venv" ] || { [ -e "$venv" ] && [ ! -e "$ours" ]; }; then
        fail "$venv has no working pip or packages that do not import, and this script did not make it: nothing is removed." \
            "Move it away or remove it yourself (rm -rf $venv), and run this again."
    fi
    base=$(find_python) || fail "no Python 3.11 or newer found (tried python3.12, python3.11, python3.13, python3)." \
        "Install one, for example: apt-get install python3.11 python3.11-venv"
    say "creating ${venv##*/} with $("$base" --version 2>&1) ($base)"
    rm -rf "$venv"
    mkdir "$venv"
    touch "$ours"
    if ! message=$("$base" -m venv "$venv" 2>&1); then
        fail "could not create ${venv##*/}:" "$(tail -n 5 <<<"$message")" \
            "On Debian and Ubuntu, install the package python3-venv of that Python and run this again."
    fi
}

explain_pip_failure() {
    echo "[set-up] pip failed. The last 20 lines of $log:" >&2
    tail -n 20 "$log" | sed 's/^/         /' >&2
    if grep -qiE 'no space left' "$log"; then
        fail "What to do: the disk is full. Free some space and run this again."
    elif grep -qiE 'from versions: none|name resolution|NewConnectionError|connection (refused|reset|aborted|broken)|timed out|unreachable|ProxyError|SSLError' "$log"; then
        fail "What to do: the package index cannot be reached, or has not this package. Check the network, or name a mirror:" \
            "PIP_INDEX_URL=https://your.mirror/simple scripts/install.sh"
    fi
    fail "What to do: read the lines above and run this again. If it stays, remove ${venv##*/} first: rm -rf $venv"
}

try_pip() { "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" >>"$log" 2>&1; }
run_pip() { try_pip "$@" || explain_pip_failure; }

# Without build isolation, which would bring an unchecked setuptools: the one that comes with torch builds.
checked=(--no-deps --require-hashes --no-build-isolation -r)

install_packages() {
    local versions=$venv/versions.txt
    : >"$log"
    say "installing the $kind set (some minutes; details in ${venv##*/}/install.log)"
    if [ "$set" = oldest ]; then
        cp requirements/oldest.txt "$versions"
        if [ "$kind" = cuda ]; then sed -i 's/^fbgemm-gpu-cpu/fbgemm-gpu/; s/-libs-cu12/-libs-cu13/' "$versions"; fi
        run_pip --no-deps -r "$versions"
        run_pip "$(grep '^torch==' "$versions")" # and the libraries that it needs
    else
        # PyPI has not PyTorch's own build for CPU.
        if [ "$kind" = cuda ] || ! try_pip "${checked[@]}" requirements/torch_cpu.txt; then
            run_pip "${checked[@]}" requirements/torch_cuda.txt
        fi
        run_pip "${checked[@]}" "requirements/$kind.txt"
    fi
    "$python" -m pip uninstall --yes hstu >>"$log" 2>&1 || true # the name of this package up to 0.3.0
    run_pip --no-deps --no-build-isolation -e .
}

# An interrupted pip can leave a package half in place that it then takes for installed: importing tells.
packages_work() {
    "$python" -c 'import torch, fbgemm_gpu, torchrec, megatron.core, gin, duckdb, pandas, pyarrow, matplotlib' \
        >>"$log" 2>&1
}

if has_gpu; then kind=cuda needed_gb=20; else kind=cpu needed_gb=6; fi
if up_to_date; then exit 0; fi

# One set-up at a time. The lock is on the repository's directory itself, so that nothing is left behind.
command -v flock >/dev/null || fail "the command flock is missing; install the package util-linux."
exec 9<"$root"
if ! flock -n 9; then
    say "another set-up is running; waiting for it"
    flock 9
    if up_to_date; then exit 0; fi
fi

check_disk
rm -f "$stamp"
if ! "$python" -m pip --version >/dev/null 2>&1; then make_venv; fi
install_packages
if ! packages_work; then
    say "the packages do not import (an earlier set-up was cut off?): once more from nothing"
    make_venv
    install_packages
    packages_work || explain_import_failure=1
fi
if [ -n "${explain_import_failure:-}" ]; then
    tail -n 20 "$log" | sed 's/^/         /' >&2
    fail "the packages are installed but do not import (see above)." "The full log is $log."
fi
if [ "$kind" = cpu ]; then
    say "$("$python" -m hstu.ops.cpu.build 2>&1 | tail -n 1)" # without a compiler PyTorch serves: no reason to fail
fi
wanted_stamp >"$stamp.new"
mv "$stamp.new" "$stamp"
say "ready in $((SECONDS / 60)) min $((SECONDS % 60)) s"
