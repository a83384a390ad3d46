"""What gin files may look like: the ways in which users write them, and what comes out."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import ConfigError
from hstu.config.args import (
    BenchmarkDatasetArgs,
    DatasetArgs,
    DynamicEmbeddingArgs,
    EmbeddingArgs,
    PartOptimizerArgs,
    RandomDistribution,
    RetrievalArgs,
    TrainerArgs,
)
from hstu.config.gin_io import load, read_and_check
from hstu.config.rules import validate
from hstu.config.run_config import RunConfig, Task
from tests.config.gin_files import ALL_RULES, BENCHMARK, OWN_DATA, RANKING, RETRIEVAL, changed, write

DYNAMIC = changed(OWN_DATA.replace("item/Emb", "item/DynamicEmb"), "-item/DynamicEmbeddingArgs.sharding_type")


LoadText = Callable[..., RunConfig]


@pytest.fixture
def load_text(tmp_path: Path) -> LoadText:
    def load_text(text: str, task: Task = "ranking", *bindings: str) -> RunConfig:
        config = load([write(tmp_path, text)], bindings, task)
        validate(config, world_size=1, rules=ALL_RULES)
        return config

    return load_text


def test_retrieval_needs_no_class_of_its_own(load_text: LoadText) -> None:
    assert load_text(changed(RETRIEVAL, "-RetrievalArgs"), "retrieval").task_args == RetrievalArgs()


def test_one_metric_in_parentheses_is_a_tuple_of_one(load_text: LoadText) -> None:
    for value in ('("AUC")', '["AUC"]'):
        assert load_text(changed(RANKING, f"RankingArgs.eval_metrics = {value}")).task_args.eval_metrics == ("AUC",)


HISTORY = changed(RANKING, "-DatasetArgs.max_sequence_length", "DatasetArgs.max_history_seqlen = 7")


@pytest.mark.parametrize(("candidates", "total"), [(0, 7), (3, 10)])
def test_max_history_seqlen_counts_the_history_without_candidates(
    load_text: LoadText, candidates: int, total: int
) -> None:
    text = changed(HISTORY, f"DatasetArgs.max_num_candidates = {candidates}")
    for each in (text, changed(text, "DatasetArgs.max_history_seqlen = %n") + "n = 7\n"):
        dataset = load_text(each).dataset
        assert isinstance(dataset, DatasetArgs) and dataset.max_sequence_length == total


def test_command_line_may_override_the_history_by_the_whole_length(load_text: LoadText) -> None:
    text = changed(HISTORY, "DatasetArgs.max_num_candidates = 3")
    dataset = load_text(text, "ranking", "DatasetArgs.max_sequence_length = 9").dataset
    assert isinstance(dataset, DatasetArgs) and dataset.max_sequence_length == 9


def test_a_problem_of_the_whole_length_cites_the_history_as_written(load_text: LoadText) -> None:
    text = changed(HISTORY, "DatasetArgs.max_num_candidates = 3", "DatasetArgs.window_stride = 11")
    with pytest.raises(ConfigError, match=r"max_history_seqlen = 7 \(so max_sequence_length = 10\) \(.*run.gin:"):
        load_text(text)


def test_each_scope_is_a_table_in_file_order(load_text: LoadText) -> None:
    tables = load_text(OWN_DATA).embeddings
    assert [table.table_name for table in tables] == ["item", "action"]
    assert tables[1] == EmbeddingArgs(
        feature_names=["action"], table_name="action", item_vocab_size_or_capacity=6, sharding_type="data_parallel"
    )


def test_unscoped_bindings_are_defaults_of_scoped_tables(load_text: LoadText) -> None:
    text = changed(OWN_DATA, "-action/EmbeddingArgs.sharding_type", 'EmbeddingArgs.sharding_type = "data_parallel"')
    assert [table.sharding_type for table in load_text(text).embeddings] == ["model_parallel", "data_parallel"]


def test_nested_scopes_inherit(load_text: LoadText) -> None:
    text = OWN_DATA + 'action/b/EmbeddingArgs.feature_names = ["x"]\naction/b/EmbeddingArgs.table_name = "x"\n'
    nested = load_text(text).embeddings[2]
    assert (nested.table_name, nested.item_vocab_size_or_capacity) == ("x", 6)


def test_benchmark_takes_features_and_tables_by_reference(load_text: LoadText) -> None:
    config = load_text(BENCHMARK)
    assert isinstance(config.dataset, BenchmarkDatasetArgs)
    assert [group.feature_names for group in config.dataset.feature_args] == [["item", "action"], ["user"]]
    assert config.embeddings == tuple(config.dataset.embedding_args)
    assert config.embeddings[0].sharding_type == "data_parallel"


def test_benchmark_takes_distributions_by_feature(load_text: LoadText) -> None:
    given = "seq/FeatureArgs.value_dists = {'action': @few/RandomDistribution()}"
    config = load_text(changed(BENCHMARK, given, "few/RandomDistribution.high = 3"))
    assert isinstance(config.dataset, BenchmarkDatasetArgs)
    assert config.dataset.feature_args[0].distributions() == {"action": RandomDistribution(high=3)}
    again = load_text(config.operative_gin())
    assert again == config
    with pytest.raises(ConfigError, match=r"few/RandomDistribution.low = 3: must be below few/RandomDistribution.high"):
        load_text(changed(BENCHMARK, given, "few/RandomDistribution.high = 3", "few/RandomDistribution.low = 3"))


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('NetworkArgs.kernel_backend = "PyTorch"', "pytorch"),
        ('NetworkArgs.position_encoding = ("Absolute", "RELATIVE_BIAS")', ("absolute", "relative_bias")),
        ('RankingArgs.eval_metrics = ("auc>=4", "LogLoss")', ("AUC>=4", "LOGLOSS")),
        ('TrainerArgs.best_metric = "auc"', "AUC"),
        ('PrecisionArgs.loss_scale = "Dynamic"', "dynamic"),
    ],
)
def test_letter_case_of_enumerated_values_does_not_matter(load_text: LoadText, line: str, value: Any) -> None:
    more = ['NetworkArgs.dtype_str = "float16"'] if "loss_scale" in line else []
    config = load_text(changed(RANKING, line, "TrainerArgs.ckpt_save_interval = 5", *more))
    owner, _, parameter = line.partition(" ")[0].partition(".")
    (part,) = (part for part in config.all_args() if type(part).__name__ == owner)
    assert getattr(part, parameter) == value


def test_letter_case_of_retrieval_metrics_and_eviction_does_not_matter(load_text: LoadText) -> None:
    config = load_text(changed(RETRIEVAL, 'RetrievalArgs.eval_metrics = ("hr@10", "Ndcg@5", "mrr")'), "retrieval")
    assert config.task_args.eval_metrics == ("HR@10", "NDCG@5", "MRR")
    table = load_text(changed(DYNAMIC, 'item/DynamicEmbeddingArgs.evict_strategy = "LRU"')).embeddings[0]
    assert isinstance(table, DynamicEmbeddingArgs) and table.evict_strategy == "lru"
    assert TrainerArgs(train_batch_size=1, eval_batch_size=1, best_metric="auc/TASK1").best_metric == "AUC/task1"


def test_no_row_in_gpu_memory_and_no_evaluation_in_training_are_allowed(load_text: LoadText) -> None:
    lines = ["item/DynamicEmbeddingArgs.item_vocab_gpu_capacity_ratio = 0", "TrainerArgs.eval_interval = 0"]
    config = load_text(changed(DYNAMIC, *lines))
    table = config.embeddings[0]
    assert isinstance(table, DynamicEmbeddingArgs)
    assert (table.item_vocab_gpu_capacity_ratio, config.trainer.eval_interval) == (0.0, 0)


def test_macros_and_blocks(load_text: LoadText) -> None:
    text = changed(RANKING, "-NetworkArgs") + (
        "width = 32\nhalf = 16\n"
        "NetworkArgs:\n  num_layers = 1\n  hidden_size = %width\n  num_attention_heads = 2\n  kv_channels = %half\n"
    )
    network = load_text(text).network
    assert (network.hidden_size, network.kv_channels) == (32, 16)


def test_later_files_and_then_bindings_win(tmp_path: Path) -> None:
    first = write(tmp_path, RANKING)
    second = write(tmp_path, "NetworkArgs.num_layers = 5\nTrainerArgs.seed = 5\n", "second.gin")
    config = load([first, second], ["TrainerArgs.seed = 6", "TrainerArgs.seed = 7"], "ranking")
    assert (config.network.num_layers, config.trainer.seed) == (5, 7)
    assert config.source_files == (first, second)


def test_what_only_an_overridden_value_refers_to_counts_as_used(tmp_path: Path) -> None:
    lines = ["n = %m", "m = 3", "NetworkArgs.num_layers = %n", "seq/FeatureArgs.seqlen_dist = @l/RandomDistribution()"]
    file = write(tmp_path, changed(BENCHMARK, *lines, "l/RandomDistribution.low = 2"))
    overrides = ["NetworkArgs.num_layers = 5", "seq/FeatureArgs.seqlen_dist = None"]
    assert load([file], overrides, "ranking").network.num_layers == 5


def test_include_beside_the_file_and_override_below_it(tmp_path: Path) -> None:
    write(tmp_path, RANKING, "base.gin")
    config = load([write(tmp_path, 'include "base.gin"\nNetworkArgs.num_layers = 7\n')], [], "ranking")
    assert config.network.num_layers == 7


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    config = load([write(tmp_path, b"\xef\xbb\xbf" + RANKING.replace("\n", "\r\n").encode())], [], "ranking")
    assert config.network.num_layers == 2


def test_config_can_be_sent_to_another_process(load_text: LoadText) -> None:
    config = load_text(BENCHMARK)
    assert pickle.loads(pickle.dumps(config)) == config


def test_config_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"DatasetArgs\.max_sequence_length = 0: expected int, at least 1"):
        DatasetArgs(dataset_name="ml-1m", max_sequence_length=0)


@pytest.mark.parametrize(
    ("base", "lines", "warned"),
    [
        (RANKING, ["TrainerArgs.profile_step_start = 5"], "no effect with TrainerArgs.profile = False"),
        (
            RANKING,
            ["NetworkArgs.recompute_layer = True", "NetworkArgs.recompute_input_silu = True"],
            "that recomputes the whole layer",
        ),
        (OWN_DATA, ['action/EmbeddingArgs.sharding = "row_wise"'], "no effect with action/EmbeddingArgs.sharding_type"),
        (OWN_DATA, ['EmbeddingArgs.sharding = "row_wise"'], None),
        (RANKING, ["TrainerArgs:\n  eval_interval = 7", "TrainerArgs.eval_interval = 7"], "bound twice: already 7 at"),
        (RANKING, ["NetworkArgs.num_layers = %n", "n = 3", "# \nn = 3"], "n = 3: bound twice: already 3 at"),
        (RANKING, ["b = 'cpu'", "NetworkArgs.embedding_backend = %b"], "here the class of a table decides"),
    ],
)
def test_what_does_no_harm_is_warned_of(base: str, lines: list[str], warned: str | None, tmp_path: Path) -> None:
    file = write(tmp_path, changed(base, *lines))
    _, warnings = read_and_check([file], [], "ranking", world_size=1, rules=ALL_RULES)
    assert len(warnings) == (0 if warned is None else 1), warnings
    assert warned is None or warned in warnings[0]


def test_options_without_effect_have_their_defaults(tmp_path: Path) -> None:
    half = ["NetworkArgs.dtype_str = 'float32'", "PrecisionArgs.fp32_master_grads = False"]
    readers = ["TrainerArgs.data_workers = 2", "TrainerArgs.data_prefetch = 5"]
    lengths = ["seq/FeatureArgs.is_jagged = False", "seq/FeatureArgs.seqlen_dist = @RandomDistribution()"]
    file = write(tmp_path, changed(BENCHMARK, "LRScheduleArgs.decay_iters = 8", *half, *readers, *lengths))
    config, warnings = read_and_check([file], [], "ranking", world_size=1, rules=ALL_RULES)
    assert len(warnings) == 4
    assert config.precision.fp32_master_grads and config.schedule.decay_iters is None
    assert (config.trainer.data_workers, config.trainer.data_prefetch) == (0, 2)
    assert isinstance(config.dataset, BenchmarkDatasetArgs) and config.dataset.feature_args[0].seqlen_dist is None


def test_random_data_with_candidates_also_measures_retrieval(tmp_path: Path) -> None:
    file = write(tmp_path, changed(BENCHMARK, "-RankingArgs", "BenchmarkDatasetArgs.max_num_candidates = 5"))
    config, (warning,) = read_and_check([file], [], "retrieval", world_size=1, rules=ALL_RULES)
    assert "is for ranking and has no effect here" in warning
    assert not config.dataset.has_candidates and config.network.disable_contextual_mask


@pytest.mark.parametrize(
    "lines",
    [
        ['OptimizerArgs.sparse_optimizer_str = "adagrad"'],  # what trains the tables, and it keeps a moment an element
        ['item/EmbeddingArgs.sharding_type = "data_parallel"', 'item/EmbeddingArgs.sharding = "auto"'],
        ['item/EmbeddingArgs.sharding = "table_wise"'],
        ['item/EmbeddingArgs.optimizer_str = "adagrad"'],  # its own
    ],
)
def test_rowwise_adagrad_is_accepted_where_no_row_is_cut(lines: list[str], tmp_path: Path) -> None:
    wide = ['OptimizerArgs.optimizer_str = "rowwise_adagrad"', 'item/EmbeddingArgs.sharding = "column_wise"']
    text = changed(OWN_DATA, *wide, *lines)
    assert validate(load([write(tmp_path, text)], [], "ranking"), world_size=2, rules=ALL_RULES) == []


def test_parts_of_the_dense_weights_are_listed_by_reference_and_share_what_has_no_scope(load_text: LoadText) -> None:
    text = changed(
        RANKING,
        "PartOptimizerArgs.learning_rate = 0.5",
        'head/PartOptimizerArgs.regex = "head"',
        'norms/PartOptimizerArgs.regex = "norm"',
        'norms/PartOptimizerArgs.optimizer_str = "sgd"',
        "OptimizerArgs.part_optimizers = [@head/PartOptimizerArgs(), @norms/PartOptimizerArgs()]",
        "OptimizerArgs.momentum = 0.9",  # of the part that has sgd
    )
    assert load_text(text).optimizer.part_optimizers == [
        PartOptimizerArgs(regex="head", learning_rate=0.5),
        PartOptimizerArgs(regex="norm", learning_rate=0.5, optimizer_str="sgd"),
    ]
