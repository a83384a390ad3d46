"""Train on a stream of parts: score the model of yesterday on each part, train on it, export what has changed.

python scripts/stream.py --source parts --run_dir runs/stream --task retrieval --gin-config-file stream.gin \\
    --dataset_name films --user user_id --item movie_id --action rating --time timestamp

Each entry of --source is a part: a file or a directory of files, which must appear at once, by a rename. All options
that are not listed below name the columns of the data, as for preprocess_dataset.py. Start the same command again after
Ctrl-C, a kill or a failure: it goes on from there (docs/tutorials/every_day.md).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from hstu.base.errors import EXIT_DONE, ConfigError
from hstu.config.cli import tool
from hstu.observe.environment import missing_packages
from hstu.stream.loop import Stream
from hstu.stream.parts import Directory, Source, Topic
from hstu.stream.report import summary

_SET_HERE = ("--interactions", "--output", "--append", "--force", "--forget", "--quick")


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="directory of parts, here or at a URL that fsspec knows; kafka://host:port/topic",
    )
    add("--run_dir", type=Path, required=True, help="directory of the stream")
    add("--task", choices=("ranking", "retrieval"), required=True)
    add(
        "--gin-config-file", nargs="+", action="extend", required=True, metavar="FILE", help="of the model and training"
    )
    add("--gin-bindings", nargs="+", action="extend", default=[], metavar="BINDING", help="they win over the files")
    add(
        "--train_on",
        choices=("new_events", "all"),
        default="new_events",
        help="what each part trains on: its events, or all so far (%(default)s)",
    )
    add("--epochs", type=float, default=1.0, help="passes over them (%(default)s); the first part: as the files say")
    add("--frozen_after", type=int, default=1, help="part whose model the page compares with (%(default)s; 0: none)")
    add("--most_scored", type=int, help="events of a part that are evaluated at most, drawn at random; default: all")
    add("--nproc_per_node", type=int, default=1, help="processes that train (%(default)s)")
    add("--no_export", action="store_true", help="write no exports")
    add("--part_events", type=int, default=100_000, help="Kafka: messages in a part at most (%(default)s)")
    add("--max_bad", type=int, default=1000, help="Kafka: messages of a part that are set aside at most (%(default)s)")
    add("--metrics_port", type=int, help="port of Prometheus metrics")
    add("--once", action="store_true", help="end when no part is left, in place of waiting for more")
    add(
        "--every_s", type=float, default=0.0, help="from the begin of a part to that of the next at least (%(default)s)"
    )
    add("--poll_s", type=float, default=10.0, help="between two looks for a part (%(default)s)")
    options, columns = parser.parse_known_args(arguments)
    if set_here := [word for word in columns if word in _SET_HERE]:
        raise ConfigError(f"{', '.join(set_here)}: the stream sets this itself; leave it out")
    for name, least in (("nproc_per_node", 1), ("frozen_after", 0), ("most_scored", 1)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise ConfigError(f"--{name} {getattr(options, name)}: give {least} or more")
    if options.train_on == "new_events" and options.epochs < 1:
        raise ConfigError(f"--epochs {options.epochs} would leave out events: give 1 or more, or --train_on all")
    if options.source.startswith("kafka://"):
        source: Source = Topic(options.source, options.part_events, options.max_bad)
    else:
        source = Directory(options.source)
    stream = Stream(
        source=source, run_dir=options.run_dir.absolute(), task=options.task, gin_files=options.gin_config_file,
        gin_bindings=options.gin_bindings, preprocess=columns, scripts=Path(__file__).resolve().parent,
        train_on=options.train_on, epochs=options.epochs, frozen_after=options.frozen_after,
        ranks=options.nproc_per_node, exports=not options.no_export, most_scored=options.most_scored,
    )  # fmt: skip
    watch = _metrics(options.metrics_port) if options.metrics_port else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    while True:
        begun = time.monotonic()
        if watch:
            watch(stream)
        if stream.advance():
            print(summary(stream.results[-1]), flush=True)
            time.sleep(max(0.0, begun + options.every_s - time.monotonic()))
        elif options.once:
            print(f"{options.source}: no part is left; {stream.run_dir / 'stream.md'} has the results")
            return EXIT_DONE
        else:
            time.sleep(options.poll_s)


def _metrics(port: int) -> Callable[[Stream], None]:
    """Serve metrics at the port. Returns what sets them."""
    if missing := missing_packages(("prometheus_client",)):
        raise ConfigError(f"--metrics_port: missing packages: {', '.join(missing)}: pip install 'hstu-trainer[serve]'")
    from prometheus_client import Gauge, start_http_server

    waiting = Gauge("hstu_stream_waiting_parts", "parts that are complete and not trained on")
    events = Gauge("hstu_stream_events", "events that the model was trained on")
    newest = Gauge("hstu_stream_newest_event_time_seconds", "time of the newest event that the model was trained on")
    rate = Gauge("hstu_stream_events_per_second", "events of the last part by the seconds of its steps")
    start_http_server(port)

    def set_all(stream: Stream) -> None:
        waiting.set(len(stream.source.waiting(stream.taken)))
        if stream.results:
            last = stream.results[-1]
            events.set(last["events"])
            newest.set(last["newest"] or 0)
            rate.set(last["new"]["events"] / max(1e-9, sum(last["seconds"].values())))

    return set_all


if __name__ == "__main__":
    sys.exit(main())
