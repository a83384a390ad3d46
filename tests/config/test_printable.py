"""Text from data cannot steer a terminal or forge a line of a log."""

import logging
from pathlib import Path

import pytest

from hstu.base.errors import ConfigError, DataError, printable
from hstu.observe.logging import set_up_logging, tear_down_logging


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä𝄞 日本", "plain ä𝄞 日本"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\0c\x7f\x9b", r"a\rb\x00c\x7f\x9b"),
        ("left\u202eright", r"left\u202eright"),
        ("next\u2028line", r"next\u2028line"),
        ("lone \ud800", r"lone \ud800"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
    ],
)
def test_control_characters_are_shown_as_codes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_an_id_can_be_kept_on_its_line() -> None:
    assert printable("id\n12:00:00 error", keep="") == r"id\n12:00:00 error"


def test_errors_show_no_control_characters() -> None:
    assert str(DataError("column '\x1b[31mred' is missing")) == r"column '\x1b[31mred' is missing"
    assert str(ConfigError(["first\x07", "second"])) == "first\\x07\nsecond"


def test_logs_show_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(log_file=tmp_path / "log.txt")
    try:
        logging.getLogger("hstu.test").warning("user %s", "\x1b[2J")
    finally:
        tear_down_logging()
    assert r"user \x1b[2J" in (tmp_path / "log.txt").read_text()
    assert "\x1b[2J" not in capsys.readouterr().out
