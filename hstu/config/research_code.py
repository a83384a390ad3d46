"""Gin files of Meta's research code (github.com/meta-recsys/generative-recommenders): what their lines are here."""

from collections.abc import Mapping, Sequence
from typing import Any

from hstu.base.errors import ConfigError
from hstu.base.shipped import shipped_configs
from hstu.config.gin_scan import Broken, scan
from hstu.config.problems import Binding, literal, show

SELECTORS = "train_fn", "hstu_encoder", "sasrec_encoder", "create_data_loader", "HSTU"
"""What they bind."""
_BASES = {"ml-1m": "ml_1m_retrieval", "ml-20m": "ml_20m_retrieval", "amzn-books": "amazon_books_retrieval"}
"""Name of a dataset there → the shipped file with its data and model."""
_OPTIONS: Mapping[str, str] = {
    "max_sequence_length": "DatasetArgs.max_sequence_length NetworkArgs.num_position_buckets",
    "local_batch_size": "TrainerArgs.train_batch_size", "eval_batch_size": "TrainerArgs.eval_batch_size",
    "num_epochs": "TrainerArgs.num_train_epochs", "eval_interval": "TrainerArgs.eval_interval",
    "num_workers": "TrainerArgs.data_workers", "num_warmup_steps": "LRScheduleArgs.warmup_iters",
    "item_embedding_dim": "NetworkArgs.hidden_size", "num_blocks": "NetworkArgs.num_layers",
    "num_heads": "NetworkArgs.num_attention_heads", "dqk": "NetworkArgs.kv_channels", "dv": "NetworkArgs.kv_channels",
    "dropout_rate": "NetworkArgs.input_dropout", "linear_dropout_rate": "NetworkArgs.hidden_dropout",
    "learning_rate": "OptimizerArgs.learning_rate", "weight_decay": "OptimizerArgs.weight_decay",
    "num_negatives": "RetrievalArgs.num_negatives", "temperature": "RetrievalArgs.temperature",
    "l2_norm_eps": "RetrievalArgs.l2_norm_eps", "enable_tf32": "PrecisionArgs.allow_tf32",
}  # fmt: skip
"""Parameter → the same here."""
_REASONS: Mapping[str, str] = {
    "main_module": "the model here is HSTU", "attn_impl": "NetworkArgs.kernel_backend chooses kernels",
    "user_embedding_norm": "queries have length 1 here", "item_l2_norm": "vectors of items have length 1 here",
    "interaction_module_type": "scores are dot products here", "loss_module": "the loss here is a softmax",
    "sampling_strategy": "'local' is RetrievalArgs.negatives = 'uniform', as in the shipped files",
    "top_k_method": "an evaluation ranks the whole corpus", "prefetch_factor": "2 batches per worker suffice here",
    "full_eval_every_n": "each evaluation is a full one", "partial_eval_num_iters": "each evaluation is a full one",
}  # fmt: skip
"""Parameter without a counterpart → why."""
_LAYER = [f"NetworkArgs.{each}" for each in ("norm_affine = False", "uvqk_bias = False", "output_bias = True")]


def advice(binding: Binding) -> str:
    """What to write instead of a binding: the end of the message that refuses it."""
    if binding.parameter == "dataset_name":
        base = _BASES.get(str(binding.value), _BASES["ml-1m"])
        text = f"a file of Meta's research code: configs/{base}.gin is its model here (docs/migration.md)"
        return f"{text}, and --convert prints what differs"
    if ours := _OPTIONS.get(binding.parameter):
        return "write " + " and ".join(f"{name} = {show(binding.value)}" for name in ours.split())
    reason = f" ({_REASONS[binding.parameter]})" if binding.parameter in _REASONS else ""
    return f"has no counterpart here{reason}: remove it"


def convert(files: Sequence[str], bindings: Sequence[str]) -> str:
    """The text of a gin file that trains what these files of the research code train: a shipped file, and what differs.
    Comments have what has no counterpart. Raises ConfigError if no file is of the research code."""
    found = scan(files, bindings)
    lines = {each.name: each for each in found.bindings if not isinstance(each.value, Broken)}
    if (data := lines.pop("train_fn.dataset_name", None)) is None:
        text = "--convert is for gin files of Meta's research code, which bind train_fn.dataset_name"
        raise ConfigError([*map(str, found.problems), text])
    base, comments = _BASES.get(str(data.value), _BASES["ml-1m"]), [str(problem) for problem in found.problems]
    in_base = {each.name: each.value for each in scan([shipped_configs()[base]], []).bindings}
    written: dict[str, Any] = {} if str(data.value) in _BASES else {"DatasetArgs.dataset_name": data.value}
    for each in lines.values():
        ours = _OPTIONS.get(each.parameter, "") if each.selector in SELECTORS else each.name
        if not ours:
            comments.append(f"{each}: {advice(each).removesuffix(': remove it')}")
        for name in ours.split():
            if written.setdefault(name, each.value) != each.value:
                comments.append(f"{each}: {name} is one number, {show(written[name])}")
    differing = [f"{name} = {literal(value)}" for name, value in written.items() if in_base.get(name) != value]
    header = f"# {', '.join(files)} of Meta's research code: configs/{base}.gin, and what differs from it."
    left_out = [f"# {comment}" for comment in comments]
    return "\n".join([header, f"include '{base}.gin'", "", *differing, *_LAYER, "", *left_out])
