"""Evaluate a checkpoint on the test split, once, and write the metrics as JSON.

python scripts/quality/evaluate.py --checkpoint runs/a/checkpoints/best --output test.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hstu import api
from hstu.config.errors import EXIT_DONE
from hstu.config.tool import tool
from hstu.observe.logging import quiet_libraries


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, whose configuration is used")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    quiet_libraries()
    metrics = api.load(options.checkpoint).evaluate("test")
    options.output.write_text(json.dumps({"metrics": metrics}) + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
