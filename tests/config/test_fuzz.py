"""Whatever a file holds, the user gets a configuration or a ConfigError, never a traceback."""

import contextlib
import tempfile
from dataclasses import fields
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.errors import ConfigError
from hstu.config.args import REGISTRY
from hstu.config.gin_io import read_and_check
from tests.config.gin_files import ALL_RULES, BASES, changed, task_of, write

CLASSES = [cls.__name__ for cls in REGISTRY]
NAMES = sorted({f.name for cls in REGISTRY for f in fields(cls)})
SCOPES = ["", "item/", "seq/", "a/b/", "x/"]
LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["item", "action", "user", "adam", "AUC", 0, 1, 2, 5]),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
).map(repr)
REFERENCES = st.builds("@{}{}{}".format, st.sampled_from(SCOPES), st.sampled_from(CLASSES), st.sampled_from(["()", ""]))
MACROS = st.sampled_from(["%m", "%n", "%gin.REQUIRED", "%a/m"])
VALUES = LITERALS | REFERENCES | MACROS | st.lists(REFERENCES, max_size=3).map(lambda refs: f"[{', '.join(refs)}]")


@st.composite
def bindings(draw: st.DrawFn) -> str:
    """A line that is nearly right: real classes with their own or any parameters, values of any kind."""
    cls = draw(st.sampled_from(list(REGISTRY)))
    name = draw(st.sampled_from([f.name for f in fields(cls)]) | st.sampled_from(NAMES))
    return f"{draw(st.sampled_from(SCOPES))}{cls.__name__}.{name} = {draw(VALUES)}"


LINES = bindings() | st.builds("{} = {}".format, st.sampled_from(["m", "n", "a/m"]), VALUES) | st.text(max_size=20)


def read_anything(text: str | bytes, base: str, extra: tuple[str, ...] = ()) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ConfigError):
        config, _ = read_and_check([write(Path(folder), text)], extra, task_of(base), world_size=2, rules=ALL_RULES)  # type: ignore[arg-type]
        assert config.operative_gin()


@settings(max_examples=75, deadline=None)
@given(st.sampled_from(sorted(BASES)), st.lists(LINES, max_size=6))
def test_random_lines_in_a_good_file(base: str, lines: list[str]) -> None:
    good = changed(BASES[base], *(line for line in lines if not line.startswith("-")))
    read_anything(good.encode("utf-8", "surrogatepass"), base)


@settings(max_examples=40, deadline=None)
@given(st.lists(LINES, max_size=4))
def test_random_command_line(lines: list[str]) -> None:
    read_anything(BASES["own"], "own", tuple(lines))


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_random_bytes(content: bytes) -> None:
    read_anything(content, "ranking")


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(BASES)), st.data())
def test_a_good_file_cut_anywhere(base: str, data: st.DataObject) -> None:
    text = BASES[base]
    start = data.draw(st.integers(0, len(text)))
    read_anything(text[:start] + text[start + data.draw(st.integers(0, 30)) :], base)


def test_very_deep_and_very_long_values() -> None:
    read_anything(BASES["ranking"] + f"NetworkArgs.scaling_seqlen = {'[' * 5000}{']' * 5000}\n", "ranking")
    read_anything(BASES["ranking"] + f"NetworkArgs.scaling_seqlen = {'9' * 10_000}\n", "ranking")
    read_anything(BASES["ranking"] + f"NetworkArgs.scaling_seqlen = 0x{'f' * 10_000}\n", "ranking")
