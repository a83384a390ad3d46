"""What a log shows, where, and of which rank; text from data cannot steer a terminal or forge a line of it."""

import logging
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import ConfigError, DataError, printable
from hstu.observe.logging import (
    Progress,
    format_seconds,
    format_train,
    progress_bar,
    set_up_logging,
    tear_down_logging,
)
from hstu.observe.records import TrainRecord


def record(iteration: int = 200, **values: Any) -> TrainRecord:
    given = dict(
        epoch=1.5, loss=4.1234, lr=1e-3, samples_per_s=1234.0, tokens_per_s=131_000.0, tflops=0.123, mfu=0.345,
        data_wait=0.01, memory_bytes=1.5 * 2**30, time_s=10.0,
    )  # fmt: skip
    return TrainRecord(iteration=iteration, **{**given, **values})


def test_progress_is_logged_every_ten_seconds_with_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, logger="hstu.progress")
    progress = Progress("eval test: batches", 3000)
    for done in range(100):
        progress.update(done)
        now[0] += 1.0
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 9 and lines[0] == "eval test: batches: 10 of 3,000, ETA 49 min 50 s"


def test_the_main_rank_tells_the_terminal_and_the_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, tmp_path / "log.txt")
    logging.getLogger("hstu.train.trainer").info("begins")
    logging.getLogger("hstu.train.trainer").warning("slow disk")
    shown = capsys.readouterr()
    assert re.fullmatch(r"\d\d:\d\d:\d\d begins\n\d\d:\d\d:\d\d WARNING: slow disk\n", shown.out)
    assert shown.err == ""
    written = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \S+ INFO begins\n\d{4}-\d\d-\d\d \S+ WARNING slow disk\n", written)


def test_other_ranks_tell_warnings_only_with_their_rank(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(3)
    logging.getLogger("hstu.data").info("not shown")
    logging.getLogger("hstu.data").warning("shown")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "[rank 3] WARNING shown\n"


def test_log_lines_of_training_are_aligned() -> None:
    early = format_train(record(9, loss=12.5, tokens_per_s=87.0, epoch=0.01, lr=5e-5, step_s=7500 / 11991), 12000)
    late = format_train(record(12000, tokens_per_s=1.31e6, mfu=math.nan, step_s=0.5), 12000)
    assert (
        early
        == "iter     9/12000  epoch  0.01  loss 12.5000  lr 5.0e-05   87.0 tok/s  MFU  34%   1.5 GiB  ETA 2 h 05 min"
    )
    assert "1.31M tok/s  MFU  n/a" in late and late.endswith("  above peak")
    assert early.index("ETA") == late.index("ETA")


def test_waiting_for_data_and_skipped_steps_are_shown_where_they_matter() -> None:
    assert "wait" not in format_train(record(data_wait=0.04), 1000)
    assert format_train(record(data_wait=0.34), 1000).endswith("  wait 34%")
    assert format_train(record(skipped_steps=2), 1000).endswith("  2 skipped")
    assert "  lr 1.0e-03  grad 12   131k tok/s" in format_train(record(grad_norm=12.3), 1000)
    slow = record(ranks={"slowest_excess": 0.45})
    assert format_train(slow, 1000, straggler="rank 3 (host-b)").endswith(" rank 3 (host-b) +45%")
    assert slow.as_json()["slowest_excess"] == 0.45 == slow.scalars()["train/slowest_excess"]


def test_the_parts_of_a_loss_follow_in_further_lines() -> None:
    losses = {f"task{task}": 0.25 for task in range(9)}
    first, *others = format_train(record(task_losses=losses), 1000).split("\n")
    assert first == format_train(record(), 1000)
    assert len(others) == 2 and all(line.startswith("     loss/task") and len(line) <= 111 for line in others)
    assert " ".join(others).split() == [word for task in losses for word in (f"loss/{task}", "0.2500")]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (math.inf, "?"), (math.nan, "?")],
)
def test_durations_read_like_speech(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_log_line_does_not_break_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0)
    with progress_bar(10, "on", initial=4) as bar:
        bar.update()
        bar.set_postfix(loss="4.25", refresh=False)
        logging.getLogger("hstu").info("beside")
    shown = capsys.readouterr()
    assert re.fullmatch(r"\d\d:\d\d:\d\d beside\n", shown.out)
    assert "5/10" in shown.err


@pytest.mark.parametrize(("mode", "visible"), [("off", True), ("auto", True), ("on", False)])
def test_no_bar_where_it_is_off_or_not_a_terminal_or_another_rank(
    mode: str, visible: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar(10, mode, visible=visible) as bar:
        bar.update()
        bar.set_postfix(loss="1", refresh=False)
    assert capsys.readouterr().err == ""


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
