"""The reference is complete, and docs/configuration.md is up to date."""

from dataclasses import Field
from pathlib import Path
from typing import Any

import pytest

from hstu.config.args import CLASSES, REGISTRY, Args, DynamicEmbeddingArgs, LRScheduleArgs
from hstu.config.option import default_of, field_problems, options_of
from hstu.config.reference import MARKER, explain, main, markdown, parameters_of

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.mark.parametrize("cls", REGISTRY, ids=lambda cls: cls.__name__)
def test_every_class_and_parameter_says_what_it_means(cls: type) -> None:
    assert cls.__doc__
    undocumented = [parameter.name for parameter in parameters_of(cls) if not parameter.meaning]
    assert undocumented == []


def test_inherited_parameters_are_listed() -> None:
    meanings = {parameter.name: parameter.meaning for parameter in parameters_of(DynamicEmbeddingArgs)}
    assert meanings["table_name"] == "Name of the table, unique in a run."
    assert meanings["sharding_type"] == "Always model_parallel."


def test_what_an_option_changes_and_needs_is_shown() -> None:
    shown = {parameter.name: parameter for parameter in parameters_of(LRScheduleArgs)}["decay_ratio"]
    assert shown.changes == "training"
    expected = "Needs schedule = 'linear' or 'cosine' or 'cosine_restarts' or 'exponential' or "
    expected += "'warmup_stable_decay'. Excludes decay_iters."
    assert shown.meaning.endswith(f". {expected}")
    assert f"{expected} Changes training." in explain(["LRScheduleArgs"]).replace("\n      ", " ")


@pytest.mark.parametrize("cls", REGISTRY, ids=lambda cls: cls.__name__)
def test_what_an_option_refers_to_exists(cls: type) -> None:
    for option in options_of(cls):
        for need in option.metadata["needs"]:
            if need.option not in ("task", "data"):
                owner, field = referred(cls, need.option)
                assert all(
                    value == default_of(field) or not field_problems(owner, field, value) for value in need.values
                )
        for other in option.metadata["excludes"]:
            referred(cls, other)


def referred(cls: type[Args], option: str) -> tuple[type[Args], Field[Any]]:
    """The class and the field of an option that an option of ``cls`` names."""
    owner, _, name = option.rpartition(".")
    kind = CLASSES[owner] if owner else cls
    return kind, next(field for field in options_of(kind) if field.name == name)


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == markdown(text), "python -m hstu.config.reference --write docs/configuration.md"


def test_writing_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# By hand\n\n{MARKER}\nold tables\n", encoding="utf-8")
    main(["--write", str(page)])
    written = page.read_text(encoding="utf-8")
    assert written.startswith("# By hand\n\n")
    assert "old tables" not in written
    assert written == markdown(written)
