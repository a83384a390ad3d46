#!/usr/bin/env bash
# Gathers in one directory, as wheels, what a GPU machine without a package index lacks: gpu_wheels.sh DIRECTORY
#
# For machines with Python 3.12, PyTorch 2.11 for CUDA and what comes with that. There:
#   python3.12 -m pip install --no-index --no-deps DIRECTORY/*.whl
# Versions are those of requirements/cuda.txt, but for the TorchRec and FBGEMM of that PyTorch. FBGEMM is 440 MB;
# LEAVE_OUT='fbgemm-gpu|duckdb' leaves packages out. PYTHON is whose pip fetches (python3).
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: ${0##*/} DIRECTORY" >&2
    exit 2
fi
mkdir -p "$1"
wheels=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

wanted=("torchrec==1.6.1" "fbgemm-gpu==1.6.0" $(grep -o '^nvidia-cutlass-dsl==[0-9.]*' requirements/cuda.txt |
    sed 's/dsl/dsl-libs-cu13/'))
for package in $(grep -o '^[a-z0-9-]*==[^ ]*' requirements/cuda.txt); do
    case $package in
        torchrec==* | fbgemm-gpu==* | ruff==* | mypy==* | *stubs==* | types-*) ;;
        filelock==* | fsspec==* | jinja2==* | mpmath==* | networkx==* | setuptools==* | sympy==*) ;; # PyTorch's
        *) wanted+=("$package") ;;
    esac
done

target=(--python-version 3.12 --implementation cp --only-binary :all:)
for glibc in 2_28 2_27 2_24 2_17; do target+=(--platform "manylinux_${glibc}_x86_64"); done
target+=(--platform manylinux2014_x86_64 --platform any)
for package in "${wanted[@]}"; do
    if [[ -n ${LEAVE_OUT:-} && $package =~ ^($LEAVE_OUT)(==|$) ]]; then continue; fi
    case $package in
        iopath==*) "$python" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$package" ;; # has no wheel; pure Python
        *) "$python" -m pip download --quiet --no-deps --dest "$wheels" --find-links "$wheels" "${target[@]}" "$package" ;;
    esac
done
du -ch "$wheels"/*.whl | sort -h
