#!/usr/bin/env bash
# Sets .venv up like the quickstart and runs the tests, in two processes with a thread each (tests/conftest.py).
# Arguments go to pytest: scripts/test.sh -m slow. In one process: scripts/test.sh -n 0
# With the oldest versions, in .venv-oldest: scripts/test.sh oldest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv set=newest
if [ "${1:-}" = oldest ]; then venv=.venv-oldest set=oldest && shift; fi
scripts/install.sh "$set"
exec env OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n 2 --no-loadscope-reorder "$@"
