#!/usr/bin/env bash
# Sets .venv up like the quickstart and runs the tests. Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/install.sh
exec .venv/bin/python -m pytest "$@"
