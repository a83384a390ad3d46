#!/usr/bin/env bash
# Writes requirements/: the newest versions that pyproject.toml allows, for Python 3.11 and newer, each file by its
# hash; and the oldest versions (oldest.txt). Versions that still fit stay as they are: remove a file to renew all of
# its versions. Needs uv. Run .ci/run afterwards, which tests both ends.
#
#   scripts/lock.sh --extra-index-url https://download.pytorch.org/whl/cpu   # where PyTorch's own CPU builds lie
#
#   torch_cpu.txt, torch_cuda.txt   torch and what it needs: PyTorch's own CPU build, and PyPI's build, for CUDA
#   cpu.txt, cuda.txt               everything else
#   docs.txt                        what builds the documentation as a site
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=2.13.0

lock() {
    uv pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
        --index-strategy unsafe-best-match "$@"
}
newest() { # kind, torch's version, options
    local file=requirements/$1.txt versions
    versions=$(sed '/--hash/d; s/ *\\$//' "$file") # uv keeps versions, and would keep hashes of fewer files
    echo "$versions" >"$file"
    lock pyproject.toml --universal --fork-strategy fewest --generate-hashes --extra dev --extra "$1" \
        --no-emit-package torch --constraint <(echo "torch==$2") --output-file "$file" "${@:3}" >/dev/null
    lock <(echo "torch==$2") --universal --generate-hashes --constraint <(grep -o '^[^ ]*==[^ ]*' "$file") "${@:3}" \
        >"requirements/torch_$1.txt"
}
oldest() { lock pyproject.toml --no-emit-package torch --resolution lowest-direct --constraint <(echo "$torch") --extra dev "$@"; }

newest cuda "$torch"
newest cpu "$torch+cpu" "$@"
# pip cannot resolve TorchRec beside the CPU build of FBGEMM, because it asks for the CUDA build.
sed -n '/^torchrec==/,/[^\\]$/p' requirements/cuda.txt >>requirements/cpu.txt
lock <(sed -n 's/^docs = \["\(.*\)"\].*/\1/p' pyproject.toml) --universal --generate-hashes \
    --constraint <(grep -o '^[^ ]*==[^ ]*' requirements/cpu.txt) >requirements/docs.txt
torch=$(sed -n 's/^    "torch>=\([0-9.]*\),.*/torch==\1.0/p' pyproject.toml)
oldest --extra cpu "$@" | grep -vP '^(nvidia-(?!cutlass)|cuda-toolkit)' >requirements/oldest.txt # torch brings these
oldest --extra cuda "$@" | grep '^torchrec==' >>requirements/oldest.txt
echo "$torch" >>requirements/oldest.txt
