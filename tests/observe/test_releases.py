"""Other releases of torch, TorchRec and FBGEMM than the tested ones: a warning, or an error if they lack something."""

from pathlib import Path

import pytest

from hstu.config.errors import ConfigError
from hstu.observe.releases import RELEASES, installed_releases, pipeline_unsupported_reason, release_warning
from hstu.train import main
from tests.estimate.runs import run_config

SETUP = Path(__file__).resolve().parents[2] / "setup.py"
LENT = {"torch": "2.11.0+cu130", "torchrec": "1.6.1", "fbgemm-gpu": "1.6.0"}


def test_other_releases_are_told_in_one_line() -> None:
    assert release_warning(LENT) == (
        "torch 2.11.0+cu130, torchrec 1.6.1 and fbgemm-gpu 1.6.0 are installed; this trainer is tested with torch "
        "2.13, torchrec 1.8 and fbgemm-gpu 1.8, which scripts/install.sh installs"
    )
    assert release_warning({"torch": "2.14.0"}) is not None
    assert release_warning({"torch": "2.13.1+cpu", "torchrec": "1.8.0.post1", "fbgemm-gpu": "1.8.0"}) is None


def test_the_installed_releases_are_those_that_setup_names() -> None:
    assert installed_releases().keys() == RELEASES.keys()
    assert release_warning(installed_releases()) is None
    setup = SETUP.read_text()
    for package, release in RELEASES.items():
        assert f'"{package}>={release},<' in setup


def test_prefetch_beside_an_older_torchrec_is_refused() -> None:
    reason = pipeline_unsupported_reason("prefetch", LENT)
    assert reason == 'needs torchrec 1.8 or newer, and torchrec 1.6.1 is installed; use "native", or scripts/install.sh'
    assert pipeline_unsupported_reason("native", LENT) is None
    assert pipeline_unsupported_reason("prefetch", {"torchrec": "1.10.0"}) is None


def test_a_run_warns_of_other_releases_and_refuses_what_they_lack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "installed_releases", lambda: LENT)
    main.check_releases(run_config())
    assert capsys.readouterr().err.startswith("warning: torch 2.11.0+cu130, torchrec 1.6.1 and")
    prefetch = run_config(bindings=["TrainerArgs.pipeline_type = 'prefetch'"])
    with pytest.raises(ConfigError, match=r"pipeline_type = .prefetch.: needs torchrec 1\.8 or newer"):
        main.check_releases(prefetch)
