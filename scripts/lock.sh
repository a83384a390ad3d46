#!/usr/bin/env bash
# Writes requirements/cpu.txt and requirements/cuda.txt: the newest versions that setup.py allows, each file by its hash.
# The oldest Python decides, so that all get the same versions. Needs uv. Run the tests afterwards, and those of the oldest versions (requirements/oldest.txt).
#
#   scripts/lock.sh --extra-index-url https://download.pytorch.org/whl/cpu   # options go to uv
#
# torch is named in requirements/torch.txt instead: its hash, and whether CUDA's libraries come with it, depend on the
# index that the user has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock() {
    uv pip compile setup.py --python-version 3.11 --no-emit-package torch --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links --index-strategy unsafe-best-match \
        --constraint requirements/torch.txt "$@"
}

lock --generate-hashes --extra cuda --extra dev --output-file requirements/cuda.txt "$@" >/dev/null
lock --generate-hashes --extra cpu --extra dev --output-file requirements/cpu.txt "$@" >/dev/null
# pip cannot resolve TorchRec beside the CPU build of FBGEMM, because it asks for the CUDA build.
sed -n '/^torchrec==/,/[^\\]$/p' requirements/cuda.txt >>requirements/cpu.txt
lock --resolution lowest-direct --extra cpu --extra dev --output-file requirements/oldest.txt "$@" >/dev/null
grep '^torchrec==' requirements/cuda.txt | tr -d ' \\' >>requirements/oldest.txt
