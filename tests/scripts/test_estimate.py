"""scripts/estimate.py as a user calls it."""

import json

import pytest

from scripts import estimate as script

BENCHMARK = ["--gin-config-file", "configs/benchmark_ranking.gin"]


@pytest.mark.parametrize("device", ["h100", "a10"])
def test_a_gpu_has_an_estimate(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*BENCHMARK, "--world-size", "16", "--tp", "2", "--device", device, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world_size"] == 16 and found["tensor_parallel"] == 2
    assert 0 < found["mfu"] < 1 and found["step_s"] > 0
    assert found["memory"]["sharded tables"] == 2 * 1_000_000 * 1024 * 4 // 16


def test_the_report_is_readable_and_names_what_was_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*BENCHMARK, "--world-size", "4", "--device", "a10"]) == 0
    text = capsys.readouterr().out
    for part in (
        "ranking",
        "4 ranks on 1 host",
        "memory per rank",
        "expected step",
        "tokens/s",
        "note: ",
        "(a roofline, checked on one H100)",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no configuration: give --gin-config-file"),
        ([*BENCHMARK, "--world-size", "3", "--tp", "2"], "must divide the number of ranks, which is 3"),
        ([*BENCHMARK, "--world-size", "0"], "--world-size 0: expected at least 1"),
        ([*BENCHMARK, "--world-size", "12", "--device", "h100"], "no multiple of 8 ranks per host"),
        ([*BENCHMARK, "--device", "tpu"], "command line: argument --device: invalid choice"),
        ([*BENCHMARK, "--device", "h100", "--set", "speed=9"], "--set speed: no number of a machine"),
        (["--gin-config-file", "missing.gin"], "missing.gin"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(arguments) == 2
    assert message in capsys.readouterr().err
