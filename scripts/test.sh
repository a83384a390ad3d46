#!/usr/bin/env bash
# Sets .venv up like the quickstart and runs the tests, in two processes with a thread each (tests/conftest.py).
# Arguments go to pytest: scripts/test.sh -m slow. In one process: scripts/test.sh -n 0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/install.sh
exec env OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --no-loadscope-reorder "$@"
