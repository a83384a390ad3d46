"""Import a checkpoint of another trainer as an export of this one (docs/migration.md), and print the map of tensors."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not
from hstu.base.errors import DataError
from hstu.config.cli import check_new, read_ids, tool
from hstu.config.gin_io import load
from hstu.train.importing import PEERS, import_checkpoint


def _stay_alone() -> None:
    """Let Python code open no socket and start no program in this process, until it ends."""

    def refuse(event: str, _: tuple[Any, ...]) -> None:  # https://docs.python.org/3/library/audit_events.html
        if event.startswith(("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system")):
            raise DataError(f"an import opens no connection and starts no program, but something called {event}")

    sys.addaudithook(refuse)


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    add = (parser := argparse.ArgumentParser(description=__doc__)).add_argument
    add("--from", dest="source", choices=(*PEERS,), required=True)
    add("path", type=Path, help="the checkpoint: its directory, or a file of torch.save")
    add("--gin-config-file", dest="files", metavar="FILE", nargs="+", required=True, help="describes the same model")
    add("--gin-bindings", dest="bindings", metavar="BINDING", nargs="+", default=[])
    add("--output", type=Path, required=True, help="directory to create")
    add("--layout", nargs=2, action="append", default=[], metavar=("NAME", "AXES"), help="of uvqk, out or output_norm")
    add("--ids", nargs=2, action="append", default=[], metavar=("FEATURE", "FILE"), help="raw id of each row there")
    add("--partial", action="store_true", help="leave out what does not fit")
    options = parser.parse_args(arguments)
    check_new(options.output)
    ids = {name: None if file == "rows" else read_ids(file) for name, file in options.ids}
    config = load(options.files, options.bindings, task=None)
    if arguments is None:  # as a command; an audit hook stays as long as its process
        _stay_alone()
    where = options.source, options.path, config, options.output
    print("\n".join(import_checkpoint(*where, dict(options.layout), ids, options.partial)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
