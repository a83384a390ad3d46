"""Phases of a run: what it trains on between two changes of its data, and the phase that a checkpoint leads to."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from hstu.base.errors import EXIT_DONE, DataError, UserError
from hstu.checkpoint.tensors import read_metadata
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore

_REMEDIES = (
    '"all" starts a new pass over all of it; TrainerArgs.ckpt_load_optimizer = False would start from the weights at '
    "iteration 0"
)


class NothingNew(UserError):
    """A phase of new events has none to train on. The run ends well, and its checkpoint stays the last one."""

    exit_code = EXIT_DONE


@dataclass(frozen=True)
class Phase:
    """A part of a run that trains on the same samples. The first phase starts at iteration 0."""

    first_iteration: int = 0
    first_epoch: int = 0
    """Epochs count on from phase to phase, so that each has its own order and negatives."""
    first_segment: int = 0
    """The labels are the events of the store's segments from this one on. 0: those of the whole training split."""

    @classmethod
    def of(cls, progress: Mapping[str, Any]) -> Self:
        """Return the phase in which a checkpoint with this progress.json was saved."""
        stored = progress.get("phase", {})
        return cls(*(stored.get(field.name, 0) for field in fields(cls)))

    @property
    def start(self) -> SamplerPosition:
        """Position before the first sample."""
        return SamplerPosition(self.first_epoch)


def choose_phase(checkpoint: Path, own: Mapping[str, Any], store: SequenceStore, continue_on: str | None) -> Phase:
    """Return the phase of a run that continues a checkpoint on ``store``: that of the checkpoint, or a new one.

    ``own``: BatchSource.trained_on. ``continue_on``: TrainerArgs.continue_on. Raises DataError, with the choices, if
    the data has changed and ``continue_on`` does not fit.
    """
    progress = read_metadata(checkpoint)
    stored, position = progress.get("trained_on", {}), progress.get("position")
    changed = difference(stored, own)
    if not changed or position is None:  # an export has no position: ``load`` refuses it
        return Phase.of(progress)
    has_grown = "segments" in stored and stored.get("state") in store.lineage[:-1]
    if continue_on == "all" or (continue_on == "new_events" and has_grown):
        seen = 0 if continue_on == "all" else stored["segments"]
        left = stored.get("samples", 0) - position["consumed"]
        if seen and left > 0 and position["epoch"] == Phase.of(progress).first_epoch:  # later epochs repeat labels
            raise DataError(
                f"{checkpoint} was saved {left} samples before the end of the first pass of its phase, whose labels "
                f"would be left out. Finish the pass on a copy of the data as it was, or set TrainerArgs.continue_on: "
                f"{_REMEDIES}."
            )
        return Phase(progress["iteration"], position["epoch"] + (position["consumed"] > 0), seen)
    if has_grown:
        segments = store.segments()
        new = 0 if segments is None else int((segments >= stored["segments"]).sum())
        raise DataError(
            f"{store} has grown since {checkpoint} was trained on it: {new:,} new events. Set "
            f'TrainerArgs.continue_on: "new_events" trains on each of them once, {_REMEDIES}.'
        )
    wanted = '"new_events" needs data that has grown by appending; ' if continue_on == "new_events" else ""
    raise DataError(
        f"{checkpoint} was trained on other data: {changed}. Its position in an epoch means other samples here. Name "
        f"the data that it was trained on, or set TrainerArgs.continue_on: {wanted}{_REMEDIES}."
    )


def difference(stored: Mapping[str, Any] | None, own: Mapping[str, Any]) -> str:
    """Return how two BatchSource.trained_on differ; "" if their positions mean the same, or if one is unknown."""
    if not stored or not own:
        return ""
    is_same = stored.get("state") == own["state"] or all(
        stored.get(name) == own[name] for name in ("users", "events", "checksums")
    )
    is_same &= stored.get("windows") == own.get("windows")
    # Checkpoints of earlier versions may have another order of many samples.
    if is_same and ("samples" not in own or stored.get("order") == own.get("order")):
        return ""
    there, here = (
        f"{data['events']:,} events of {data['users']:,} users"
        + (f", shuffled in windows of {data['windows']} shards" if data.get("windows") else "")
        for data in (stored, own)
    )
    return f"{there}; this data has {here if here != there else 'as many, but others or in another order'}"
