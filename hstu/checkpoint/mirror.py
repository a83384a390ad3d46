"""Checkpoints at a URL: what a run saves is uploaded in the background, and what is there is brought here."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from filelock import FileLock

from hstu.base import remote
from hstu.base.errors import DataError
from hstu.base.files import replace_text
from hstu.checkpoint.directory import BEST, LATEST, MANIFEST, CheckpointFailure, iteration_of, link_target, set_link

log = logging.getLogger(__name__)


def local_checkpoint(path: str | Path, which: str = "last", cache: remote.Cache | None = None) -> Path:
    """Bring a checkpoint, an export, or of a directory of checkpoints the one that is named, and the best. Returns its
    local path. Local paths stay as they are. Raises DataError."""
    if (url := remote.url_of(path)) is None or remote.read(f"{url}/{MANIFEST}"):
        return remote.stage(path, cache)
    place = (cache := cache or remote.Cache.of()).place(url)
    if not fetch(url, place, which, cache):
        raise DataError(f"no complete checkpoint in {url}: nothing in it has a {MANIFEST}")
    return place


def fetch(url: str, directory: Path, which: str = "last", cache: remote.Cache | None = None) -> list[str]:
    """Bring the newest complete checkpoint of a URL, or an iteration, and the best one. Returns their names.

    ``cache``: where room is made for them. A damaged checkpoint is left out with a warning. Raises DataError.
    """
    names, brought = _names(url), list[str]()
    latest, best = ((remote.read(f"{url}/{link}") or b"").decode() for link in (LATEST, BEST))
    wanted = [name for name in names if which.isdecimal() and iteration_of(Path(name)) == int(which)]
    with FileLock(directory.with_name(f"{directory.name}.lock")):
        for link, candidates in ((LATEST, wanted or [*(n for n in names if n == latest), *names]), (BEST, [best])):
            for name in filter(None, candidates):
                try:
                    if content := remote.read(f"{url}/{name}/{MANIFEST}"):
                        files = remote.listed(url, content)
                        remote.copy_files(f"{url}/{name}", directory / name, files, cache)
                        replace_text(directory / name / MANIFEST, content.decode())
                        set_link(directory, link, directory / name)
                        brought.append(name)
                        break
                except DataError as error:
                    log.warning("%s Trying the previous one.", error)
    return brought


def _names(url: str) -> list[str]:
    """Names of the checkpoints in a directory, highest iteration first."""
    return sorted((name for name in remote.names_in(url) if name.startswith("iteration_")), reverse=True)


class Mirror:
    """Uploads what a run saves in ``directory``, in a thread. Failures are retried, and never end training.

    ``keep``: number of newest checkpoints to keep there besides the latest and the best; None: all.
    """

    def __init__(self, url: str, directory: Path, keep: int | None) -> None:
        self.url, self._directory, self._keep = url, directory, keep
        self._thread = ThreadPoolExecutor(1, "upload")
        self._running: list[Future[None]] = []
        self._failed: tuple[Path, Exception] | None = None
        """The last checkpoint, if it could not be uploaded, and why."""

    def fetch(self) -> None:
        """Bring the newest checkpoint of the URL, unless a newer one is here, which is uploaded."""
        here = link_target(self._directory, LATEST)
        names = _names(self.url)
        if here is None or (names and names[0] > here.name):
            fetch(self.url, self._directory)
        else:
            self.upload(here)

    def upload(self, path: Path) -> None:
        """Upload a checkpoint, or only what ``latest`` and ``best`` are, after all earlier ones."""
        self._running = [each for each in self._running if not each.done()]
        self._running.append(self._thread.submit(self._upload, path))

    def is_done(self, timeout_s: float) -> bool:
        """Wait for the uploads for some time. Returns whether all have ended."""
        return not wait(self._running, timeout_s).not_done

    def close(self) -> None:
        """Wait for the uploads. Raises CheckpointFailure if the last checkpoint could not be uploaded."""
        if self._failed:
            self.upload(self._failed[0])
        self._thread.shutdown()
        if self._failed:
            path, error = self._failed
            raise CheckpointFailure(
                f"{path} could not be uploaded to {self.url}: {error}. It is whole where it is: the same command with "
                'TrainerArgs.ckpt_load_dir = "auto" uploads it from here'
            ) from error

    def _upload(self, path: Path) -> None:
        try:
            remote.upload(path, f"{self.url}/{path.name}", MANIFEST)
            links = {name: target.name for name in (LATEST, BEST) if (target := link_target(self._directory, name))}
            for name, target_name in links.items():
                remote.write(f"{self.url}/{name}", target_name.encode())
            if self._keep is not None:
                for old in [name for name in _names(self.url) if name <= path.name][self._keep :]:
                    if old not in links.values():
                        remote.delete(f"{self.url}/{old}/{MANIFEST}")
                        remote.delete(f"{self.url}/{old}")
            self._failed = None
        except (DataError, OSError) as error:
            if path.exists():  # otherwise it was deleted for newer ones
                self._failed = (path, error)
                log.error("not uploaded: %s. Training goes on; the next save is uploaded again", error)
