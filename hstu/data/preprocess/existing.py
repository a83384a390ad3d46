"""Whether a store that exists already is what a command would make; a store that differs is never kept in silence."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hstu.base.errors import DataError
from hstu.data.preprocess.state import BuildOptions, source_names
from hstu.data.store.files import sha256
from hstu.data.store.sequence_store import SequenceStore
from hstu.data.store.writer import check_replaceable, is_taken

_log = logging.getLogger(__name__)
_PLACES = {"--raw_path", "--interactions", "--requests", "--context", "--titles", "--items", "--output"}
"""Options that say where files are. The files are compared by their content."""
_SLOW_BYTES = 1 << 30


def is_kept(options: BuildOptions, files: Sequence[Path] | None, optional: Sequence[Path] = ()) -> bool:
    """Whether the store at options.output exists and stays. It must fit the options and the raw ``files``.

    ``files`` is None where there are no raw files, so that only the options are compared. A store that was made without
    some of the ``optional`` ones fits, and the log says so: earlier versions did not read them.
    Raises DataError where the store is damaged or does not fit, or something else than a store is there.
    """
    check_replaceable(options.output)
    if not is_taken(options.output) or options.force:
        return False
    store = SequenceStore.open(options.output)
    other_options = [*options_that_differ(store, options)]
    names = source_names(files or ())
    unread = [file for name, file in names.items() if file in optional and name not in store.sources]
    read = [file for file in files or () if file not in unread]
    other_files = [*files_that_differ(store, read)] if files is not None else []
    if other_options or other_files:
        is_own = "--interactions" in options_of(options.command)
        append = "to add the events of further files to it, --append; " if is_own and not other_options else ""
        raise DataError(
            f"{options.output} exists and does not fit this command: {'; '.join(other_options + other_files)}. To make "
            f"it again, add --force; {append}to make another store, give another --output"
        )
    fits = "fits its raw files" if files is not None else "could not be compared with raw files, as there are none,"
    _log.warning("%s exists, %s and is kept; --force replaces it", options.output, fits)
    if unread:
        without = ", ".join(map(str, unread))
        _log.warning("%s was made without %s, which is there now; --force makes it with it", options.output, without)
    return True


def options_that_differ(store: SequenceStore, options: BuildOptions) -> Iterator[str]:
    """Option by option, what a command would do otherwise than the one that made the store."""
    if store.name != options.name:
        yield f"--dataset_name was {store.name}, it is now {options.name}"
        return
    if store.command is None:
        return
    before, now = options_of(store.command), options_of(options.command)
    for option in sorted((before.keys() | now.keys()) - _PLACES - {"--dataset_name"}):
        yield from option_that_differs(option, before, now)


def option_that_differs(
    option: str, before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """The two values of an option of two commands, unless they are equal."""
    if before.get(option) != now.get(option):
        was, is_now = (" ".join(given.get(option, ["not given"])) or "given" for given in (before, now))
        yield f"{option} was {was}, it is now {is_now}"


def options_of(command: str | None) -> dict[str, list[str]]:
    """Option of a command → its values."""
    found: dict[str, list[str]] = {}
    option = ""
    try:
        words = shlex.split(command or "")
    except ValueError:  # of another program
        return {"the command": [command or ""]}
    for word in words:
        if word.startswith("--"):
            option = word
        found.setdefault(option, []).extend([word] if word != option else [])
    return {option: values for option, values in found.items() if option}


def files_that_differ(store: SequenceStore, files: Sequence[Path]) -> Iterator[str]:
    """File by file, in what raw files are not those of which the store was made."""
    if sum(file.stat().st_size for file in files) > _SLOW_BYTES:
        _log.info("comparing %s with its raw files", store.path)
    now = source_names(files)
    if now.keys() == store.sources.keys() and list(now) != list(store.sources):
        yield f"the raw files were in another order: {', '.join(store.sources)}"
    for name in sorted(store.sources.keys() | now.keys()):
        if name not in now:
            yield f"it was made from {name}, which is not given now"
        elif name not in store.sources:
            yield f"it was made without {now[name]}"
        elif sha256(now[name]) != store.sources[name]:
            yield f"{now[name]} has changed since"
