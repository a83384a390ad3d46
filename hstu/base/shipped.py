"""Files and commands that come with the package: those of a checkout, or what pip has installed of them."""

from pathlib import Path

_ROOT = Path(__file__).parents[2]
_IS_CHECKOUT = (_ROOT / "pretrain_gr_ranking.py").exists()
_CONFIGS = _ROOT / ("configs" if _IS_CHECKOUT else "hstu_configs")


def shipped_configs() -> dict[str, str]:
    """The gin files of the trainer: name, such as "ml_1m_retrieval" or "examples/shop_ranking_ple", to path."""
    return {str(path.relative_to(_CONFIGS).with_suffix("")): str(path) for path in sorted(_CONFIGS.rglob("*.gin"))}


def command(script: str) -> str:
    """How to run a script of the repository: "python scripts/export.py", or "hstu-export" where pip installed it."""
    if _IS_CHECKOUT:
        return f"python {script}"
    stem = Path(script).stem.removesuffix("_dataset").replace("pretrain_gr", "train")
    return f"hstu-{stem.replace('_', '-')}"
