"""Serve an exported model over HTTP.

python scripts/export.py --run_dir runs/quickstart --output exports/first --program
python scripts/serve.py --export exports

--export is what export.py has written, or a folder with several, of which the newest is served (docs/serve.md). Open
http://127.0.0.1:8000 in a browser to try the model. /openapi.json describes the interface.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu.base.errors import EXIT_DONE, ConfigError
from hstu.config.cli import tool
from hstu.observe.environment import let_idle_threads_sleep, missing_packages


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, _between(int, 1, 1 << 30)
    add("--export", type=Path, required=True, help="an export with a program, or a folder with several")
    add("--users", help="where events of users are kept: a file, or redis://HOST:PORT/DATABASE (nowhere)")
    add("--follow", help="where further events come from: a file of JSON lines, or kafka://HOST:PORT/TOPIC (nowhere)")
    add("--items", type=Path, help=".csv or .parquet file of items in stock and their categories, read when it changes")
    add("--cache_mb", type=_between(int, 0, 1 << 20), default=256, help="for users between requests (%(default)s)")
    add("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine alone)")
    add("--port", type=_between(int, 0, 65_535), default=8000, help="0 takes a free one (%(default)s)")
    add("--max_batch", type=count, default=32, help="requests that are computed together at most (%(default)s)")
    add("--threads", type=count, default=1, help="cores that compute a batch; answering takes one more (%(default)s)")
    add("--max_waiting", type=count, default=256, help="requests that wait at most; more get 429 (%(default)s)")
    add("--max_body_kb", type=count, default=1024, help="largest request (%(default)s)")
    add("--poll_s", type=_between(float, 0.1, 86_400), default=5.0, help="between looks for an export (%(default)s)")
    add("--api_keys", type=Path, help="file with a line NAME:SHA256 per key, read when it changes (anybody may ask)")
    add("--max_waiting_per_client", type=count, default=64, help="of a name of --api_keys (%(default)s)")
    add(
        "--shown_log", type=Path, help="folder for files of what was shown, for preprocess_dataset.py --requests (none)"
    )
    add("--second_model", type=Path, help="a second export, or a folder with several, for a share of the users (none)")
    add("--second_share", type=_between(float, 0, 1), help="of the users whom the second model answers")
    add("--shadow", action="store_true", help="the second model answers nobody, but computes beside the first for them")
    add("--map_exports", action="store_true", help="share their memory with other servers: files must never be changed")
    add("--drain_s", type=_between(float, 0, 3600), default=0, help="taking requests after SIGTERM (%(default)s)")
    add("--log_format", choices=("text", "json"), default="text", help="of the lines on standard error (%(default)s)")
    options = parser.parse_args(arguments)
    has_use = options.shadow or options.second_share is not None
    if options.second_model is None and has_use:
        parser.error("--second_share and --shadow need --second_model")
    if options.second_model is not None and not has_use:
        parser.error("--second_model needs --second_share, of the users whom it answers, or --shadow")
    if missing := missing_packages(("fastapi", "uvicorn", "prometheus_client")):
        raise ConfigError(f"missing packages: {', '.join(missing)}. To install them: pip install 'hstu-trainer[serve]'")
    let_idle_threads_sleep()
    from hstu.serve.server.app import serve  # after what torch reads once, and after mistakes in the options
    from hstu.serve.server.batching import Settings

    given = {name: value for name, value in vars(options).items() if value is not None}  # the others keep the defaults
    sizes = {"max_body_bytes": given.pop("max_body_kb") << 10, "cache_bytes": given.pop("cache_mb") << 20}
    serve(given.pop("export"), given.pop("host"), given.pop("port"), Settings(**sizes, **given))
    return EXIT_DONE


def _between(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
