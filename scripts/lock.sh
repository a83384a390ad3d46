#!/usr/bin/env bash
# Writes requirements/cpu.txt and requirements/cuda.txt: the newest versions that pyproject.toml allows, each file by its hash;
# and requirements/oldest.txt: the oldest. The oldest Python decides, so that all get the same versions. Needs uv. Run
# .ci/run afterwards, which tests both ends.
#
#   scripts/lock.sh --extra-index-url https://download.pytorch.org/whl/cpu   # options go to uv
#
# torch's hash, and whether CUDA's libraries come with it, depend on the index that the user has: the newest is named in
# requirements/torch.txt, and the last line of requirements/oldest.txt is the oldest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock() {
    uv pip compile pyproject.toml --python-version 3.11 --no-emit-package torch --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links --index-strategy unsafe-best-match "$@"
}
newest() { lock --generate-hashes --constraint requirements/torch.txt --extra dev "$@" >/dev/null; }
oldest() { lock --resolution lowest-direct --constraint <(echo "$torch") --extra dev "$@"; }

newest --extra cuda --output-file requirements/cuda.txt "$@"
newest --extra cpu --output-file requirements/cpu.txt "$@"
# pip cannot resolve TorchRec beside the CPU build of FBGEMM, because it asks for the CUDA build.
sed -n '/^torchrec==/,/[^\\]$/p' requirements/cuda.txt >>requirements/cpu.txt
torch=$(sed -n 's/^    "torch>=\([0-9.]*\),.*/torch==\1.0/p' pyproject.toml)
oldest --extra cpu "$@" | grep -vP '^(nvidia-(?!cutlass)|cuda-toolkit)' >requirements/oldest.txt # torch brings these
oldest --extra cuda "$@" | grep '^torchrec==' >>requirements/oldest.txt
echo "$torch" >>requirements/oldest.txt
