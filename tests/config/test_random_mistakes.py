"""Files with two to four mistakes, drawn at random from all kinds: every mistake is told in one run."""

import random
import re
from itertools import combinations
from pathlib import Path

import pytest

from tests.config.gin_files import BASES, changed, task_of, write
from tests.config.test_bad_files import EVERY, TOGETHER, Bad, is_told, told_about

FILES = 40
TAKES_AWAY = ("no dataset", "missing include", "task of a misspelt scope")
"""Kinds that take away what most other mistakes are about."""
KINDS = [case for case in EVERY if case.name not in TAKES_AWAY]


def parameters(case: Bad) -> set[str]:
    """The parameters that a case binds or removes."""
    return {line.lstrip("-").partition("=")[0].strip().rpartition(".")[2] for line in case.lines}


def names(case: Bad) -> set[str]:
    """The parameters that the mistake of a case depends on, as far as its message names them."""
    told = " ".join(case.told).replace("has the feature", "feature_names")  # which depends on those of all tables
    return parameters(case) | set(re.findall(r"[a-z]+(?:_[a-z]+)+", told))


def classes(case: Bad) -> set[str]:
    return set(re.findall(r"\w+Args\b", " ".join(case.lines)))


def interact(one: Bad, other: Bad) -> bool:
    """Whether one mistake may be the remedy of the other, or change what is told about it."""
    both_are_rules = one in TOGETHER and other in TOGETHER
    return bool(
        parameters(one) & names(other)
        or parameters(other) & names(one)
        or (both_are_rules and classes(one) & classes(other))
        or any(line.startswith("-") and line[1:] in "\n".join(other.lines) for line in one.lines)
        or any(line.startswith("-") and line[1:] in "\n".join(one.lines) for line in other.lines)
    )


def draw(rng: random.Random) -> list[Bad]:
    """Two to four mistakes in one file."""
    count, chosen = rng.randint(2, 4), [rng.choice(KINDS)]
    for another in rng.sample(KINDS, len(KINDS)):
        first = chosen[0]
        fits = (another.base, another.world_size) == (first.base, first.world_size)
        if fits and len(chosen) < count and not any(case is another or interact(another, case) for case in chosen):
            chosen.append(another)
    return chosen if len(chosen) == count else draw(rng)


@pytest.mark.parametrize("seed", range(FILES))
def test_every_mistake_of_a_file_is_told_in_one_run(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = draw(random.Random(seed))
    monkeypatch.setenv("WORLD_SIZE", str(cases[0].world_size))
    text = changed(BASES[cases[0].base], *(line for case in cases for line in case.lines))
    only_warns = all(case.is_warning for case in cases)
    printed = told_about(["--gin-config-file", write(tmp_path, text)], task_of(cases[0].base), capsys, only_warns)
    hidden = [case.name for case in cases if not is_told(case, printed)]
    assert hidden == [], f"of {[case.name for case in cases]}:\n{text}\n{printed}"


def test_the_files_have_many_kinds_of_mistakes() -> None:
    drawn = [draw(random.Random(seed)) for seed in range(FILES)]
    assert {len(cases) for cases in drawn} == {2, 3, 4}
    assert len({case.name for cases in drawn for case in cases}) > 60
    assert len({pair for cases in drawn for pair in combinations([case.name for case in cases], 2)}) > 100
