"""Every kind of mistake in a gin file, and what the user is told: where, what, what is allowed, what was meant.

``HERE`` in a line of a case marks the line that the problem must name.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hstu.config.cli import parse_command_line
from tests.config.gin_files import ALL_RULES, BASES, changed, table, task_of, write

HERE = "  # HERE"


@dataclasses.dataclass(frozen=True)
class Bad:
    name: str
    base: str
    lines: tuple[str, ...]
    """Changes of the base, see ``changed``."""
    told: tuple[str, ...]
    """Fragments of one line of what is printed."""
    world_size: int = 1
    alone: bool = True
    """Whether this is the only problem; False where one mistake has consequences of its own."""
    is_warning: bool = False
    """Whether the file is accepted with a warning."""


def bad(name: str, base: str, *lines: str, **expected: Any) -> Bad:
    return Bad(name, base, lines, **expected)


def idle(name: str, base: str, *lines: str, **expected: Any) -> Bad:
    """An option that has no effect."""
    return Bad(name, base, lines, is_warning=True, **expected)


NAMES = [
    bad("misspelt class", "ranking", "NetworkArg.num_layers = 2" + HERE, "-NetworkArgs.num_layers",
        told=("NetworkArg.num_layers = 2", "did you mean 'NetworkArgs'")),
    bad("unknown class", "ranking", "Quux.width = 2" + HERE, told=("no class Quux", "TrainerArgs, EmbeddingArgs")),
    bad("misspelt parameter", "ranking", "NetworkArgs.hiden_size = 32" + HERE, "-NetworkArgs.hidden_size",
        told=("NetworkArgs.hiden_size = 32", "did you mean 'hidden_size'", "--explain NetworkArgs")),
    bad("parameter of another class", "ranking", "TrainerArgs.learning_rate = 1.0" + HERE,
        told=("TrainerArgs has no parameter learning_rate", "did you mean OptimizerArgs.learning_rate")),
    bad("unknown parameter", "ranking", "RankingArgs.qqq = 1" + HERE,
        told=("no parameter qqq", "prediction_head_arch")),
    bad("class instead of parameter", "ranking", "NetworkArgs = 3" + HERE, told=("bind one of its parameters",)),
    bad("bound twice", "ranking", "NetworkArgs.num_layers = 3", "TrainerArgs.seed = 1",
        "TrainerArgs:\n  seed = 2" + HERE, told=("TrainerArgs.seed = 2: bound twice: already 1 at", "keep one")),
    bad("macro bound twice", "ranking", "w = 32", "NetworkArgs.hidden_size = %w", "#\nw = 64" + HERE,
        told=("w = 64: bound twice: already 32 at",)),
    bad("alias and parameter", "ranking", "DatasetArgs.max_history_seqlen = 9" + HERE,
        told=("DatasetArgs.max_history_seqlen = 9", "already 20 as max_sequence_length at")),
    bad("history without a number", "ranking", "-DatasetArgs.max_sequence_length",
        'DatasetArgs.max_history_seqlen = "9"' + HERE, "DatasetArgs.max_num_candidates = 5",
        told=("DatasetArgs.max_history_seqlen = '9': expected int, at least 1", "write 9 without quotes")),
    bad("missing parameter", "ranking", "-NetworkArgs.kv_channels", "NetworkArgs.num_layers = 2" + HERE,
        told=("NetworkArgs.kv_channels is required and not bound", "int, at least 1")),
    bad("missing class", "ranking", "-OptimizerArgs", told=("OptimizerArgs.learning_rate is required",), alone=False),
    bad("no dataset", "ranking", "-DatasetArgs", told=("no dataset: bind DatasetArgs.dataset_name",)),
    bad("two datasets", "benchmark", 'DatasetArgs.dataset_name = "ml-1m"' + HERE,
        told=("DatasetArgs and BenchmarkDatasetArgs are both bound",)),
    bad("other task's class", "retrieval", "RankingArgs.num_tasks = 1" + HERE,
        told=("RankingArgs.num_tasks = 1: never used", "retrieval run", "RetrievalArgs")),
    bad("unused macro", "ranking", "wide = 3" + HERE, told=("wide = 3: never used", "nothing refers to %wide")),
    bad("scope on a class without", "ranking", "fast/TrainerArgs.seed = 1" + HERE,
        told=("fast/TrainerArgs.seed = 1: never used", "drop fast/")),
    bad("feature args without benchmark", "ranking", "FeatureArgs.max_sequence_length = 1" + HERE,
        told=("never used", "nothing refers to @FeatureArgs()")),
    bad("misspelt scope of a table", "own", "itme/EmbeddingArgs.init_std = 0.1" + HERE,
        told=("itme/EmbeddingArgs.feature_names is required and not bound",), alone=False),
]  # fmt: skip

REFERENCES = [
    bad("reference to a misspelt scope", "benchmark", "BenchmarkDatasetArgs.feature_args = "
        "[@seqq/FeatureArgs(), @ctx/FeatureArgs()]" + HERE, told=("nothing is bound to seqq/FeatureArgs",
        "did you mean '@seq/FeatureArgs()'")),
    bad("scope that is not referred to", "benchmark", "usr/EmbeddingArgs.init_std = 0.1" + HERE,
        told=("usr/EmbeddingArgs.init_std = 0.1: never used", "did you mean 'user/EmbeddingArgs'")),
    bad("reference without parentheses", "benchmark", "seq/FeatureArgs.seqlen_dist = @RandomDistribution" + HERE,
        told=("a reference needs parentheses: @RandomDistribution()",)),
    bad("reference to what it is part of", "benchmark", "seq/FeatureArgs.seqlen_dist = @seq/FeatureArgs()" + HERE,
        told=("seq/FeatureArgs.seqlen_dist", "@seq/FeatureArgs() is part of itself")),
    bad("reference of the wrong class", "benchmark", "seq/FeatureArgs.seqlen_dist = @item/EmbeddingArgs()" + HERE,
        told=("seq/FeatureArgs.seqlen_dist", "a reference @scope/RandomDistribution()")),
    bad("one reference for a list", "benchmark", "BenchmarkDatasetArgs.feature_args = @seq/FeatureArgs()" + HERE,
        told=("expected list of references @scope/FeatureArgs()",)),
    bad("text for references", "benchmark", 'BenchmarkDatasetArgs.embedding_args = ["item"]' + HERE,
        told=("expected list of references @scope/EmbeddingArgs()", "'item' is not")),
    bad("bad value behind a reference", "benchmark", "item/EmbeddingArgs.init_std = -1" + HERE,
        told=("item/EmbeddingArgs.init_std = -1: expected float, above 0",)),
    bad("unknown macro", "ranking", "NetworkArgs.hidden_size = %widht" + HERE, "width = 32",
        told=("NetworkArgs.hidden_size = %widht", "no macro %widht", "did you mean 'width'"), alone=False),
    bad("macro of itself", "ranking", "a = %b" + HERE, "b = %a", "NetworkArgs.hidden_size = %b", told=("by itself",)),
]  # fmt: skip

VALUES = [
    bad("float for int", "ranking", "NetworkArgs.num_layers = 1.5" + HERE,
        told=("NetworkArgs.num_layers = 1.5: expected int, at least 1",)),
    bad("quoted number", "ranking", 'NetworkArgs.num_layers = "2"' + HERE, told=("write 2 without quotes",)),
    bad("int for bool", "ranking", "TrainerArgs.profile = 1" + HERE, told=("profile = 1: expected bool",)),
    bad("infinite", "ranking", "OptimizerArgs.learning_rate = 1e999" + HERE, told=("cannot represent this number",)),
    bad("number for text", "ranking", "DatasetArgs.dataset_name = 1" + HERE, told=("= 1: expected str",)),
    bad("None where required", "ranking", "NetworkArgs.num_layers = None" + HERE, told=("= None: expected int",)),
    bad("scalar for list", "ranking", "RankingArgs.prediction_head_arch = 5" + HERE, told=("expected list of int",)),
    bad("empty list", "ranking", "RankingArgs.prediction_head_arch = []" + HERE, told=("must not be empty",)),
    bad("bare text for a list", "own", 'item/EmbeddingArgs.feature_names = "item"' + HERE,
        told=("expected list of str", "write ['item']")),
    bad("below minimum", "ranking", "TrainerArgs.train_batch_size = 0" + HERE, told=("= 0: expected int, at least 1",)),
    bad("above range", "ranking", "NetworkArgs.hidden_dropout = 1.0" + HERE, told=("at least 0, below 1",)),
    bad("zero excluded", "ranking", "OptimizerArgs.learning_rate = 0" + HERE, told=("expected float, above 0",)),
    bad("no such choice", "ranking", 'TrainerArgs.pipeline_type = "nativ"' + HERE,
        told=("one of 'none', 'native', 'prefetch'", "did you mean 'native'")),
    bad("ratio above 1", "own", "-item/EmbeddingArgs", 'item/DynamicEmbeddingArgs.feature_names = ["item"]',
        'item/DynamicEmbeddingArgs.table_name = "i"', "item/DynamicEmbeddingArgs.item_vocab_size_or_capacity = 9",
        "item/DynamicEmbeddingArgs.item_vocab_gpu_capacity_ratio = 1.5" + HERE, told=("at least 0, at most 1",)),
    bad("sharding not given", "own", "-item/EmbeddingArgs.sharding_type",
        'item/EmbeddingArgs.feature_names = ["item"]' + HERE,
        told=("item/EmbeddingArgs.sharding_type must be given", "'data_parallel', 'model_parallel'", "deliberately")),
    bad("scale of zero", "ranking", "PrecisionArgs.loss_scale = 0" + HERE, 'NetworkArgs.dtype_str = "float16"',
        told=("expected None or float, above 0, at most 1000000000.0, or 'dynamic'",)),
    bad("unknown metric", "ranking", 'RankingArgs.eval_metrics = ("AUC", "ACCURACY")' + HERE,
        told=("one or more of AUC, AUC>=K", "'ACCURACY' is not")),
    bad("metric without @", "retrieval", 'RetrievalArgs.eval_metrics = "HR10"' + HERE,
        told=("HR@K, NDCG@K", "did you mean 'HR@K'")),
]  # fmt: skip

SYNTAX = [
    bad("text without quotes", "ranking", "NetworkArgs.dtype_str = float32" + HERE,
        told=("a string needs quotes: 'float32'",)),
    bad("lower-case true", "ranking", "NetworkArgs.is_causal = true" + HERE, told=("write True",)),
    bad("no equals sign", "ranking", "NetworkArgs.compile 3" + HERE, told=("expected Class.parameter = value",)),
    bad("import", "ranking", "import my_module" + HERE, told=("import my_module: a gin file is data",)),
    bad("open bracket", "ranking", "RankingArgs.prediction_head_arch = [16," + HERE,
        told=("a bracket or a quote is not closed",)),
    bad("arithmetic", "ranking", "NetworkArgs.hidden_size = 4 * 8" + HERE, told=("gin does not compute",)),
    bad("scope in the wrong place", "own", "EmbeddingArgs.x/init_std = 1" + HERE, told=("cannot be read as gin",)),
    bad("missing include", "ranking", 'include "nowhere.gin"' + HERE, told=("include 'nowhere.gin': no such file",)),
    bad("include of itself", "ranking", 'include "run.gin"' + HERE, told=("the file includes itself",)),
]  # fmt: skip

TOGETHER = [
    bad("heads and tensor parallelism", "ranking", "NetworkArgs.num_attention_heads = 3" + HERE,
        "TensorModelParallelArgs.tensor_model_parallel_size = 2",
        told=("num_attention_heads = 3: must be a multiple of", "tensor_model_parallel_size = 2"), world_size=2),
    bad("a truncation after the last layer", "ranking", "NetworkArgs.truncate_after_layer = 2" + HERE,
        "NetworkArgs.truncate_to_items = 10", "NetworkArgs.num_layers = 2",
        told=("must be below NetworkArgs.num_layers = 2",)),
    bad("factors of no classes", "ranking", "NetworkArgs.num_factors = 2" + HERE,
        "RankingArgs.prediction_head_arch = [1]", told=("of the classes of an action, and this model predicts none",)),
    bad("ranks and context parallelism", "ranking", "ContextParallelArgs.context_parallel_size = 2" + HERE,
        told=("must divide the number of ranks, which is 3",), world_size=3),
    idle("tokens of no group", "ranking", "NetworkArgs.sequence_parallel = True" + HERE,
        told=("no effect with TensorModelParallelArgs.tensor_model_parallel_size = 1",)),
    bad("ranks and tensor parallelism", "ranking", "TensorModelParallelArgs.tensor_model_parallel_size = 2" + HERE,
        told=("must divide the number of ranks, which is 3",), world_size=3),
    bad("iterations and epochs", "ranking", "TrainerArgs.max_train_iters = 5",
        "TrainerArgs.num_train_epochs = 2" + HERE,
        told=("cannot be combined with TrainerArgs.max_train_iters = 5",)),
    bad("profile window", "ranking", "TrainerArgs.profile = True", "TrainerArgs.profile_step_start = 300" + HERE,
        told=("must be below TrainerArgs.profile_step_end = 200",)),
    bad("epochs in the plural", "ranking", 'TrainerArgs.eval_interval = "2 epochs"' + HERE,
        told=("expected int, at least 0, or '1 epoch'", "did you mean '2 epoch'?")),
    bad("minutes", "ranking", 'TrainerArgs.log_interval = "30 min"' + HERE,
        told=("'30 min': expected int, at least 1, or '1 epoch'",)),
    bad("every no epoch", "ranking", 'TrainerArgs.eval_interval = "0.0 epoch"' + HERE,
        told=("'0.0 epoch': expected int, at least 0, or '1 epoch'",)),
    bad("save every 0", "ranking", "TrainerArgs.ckpt_save_interval = 0" + HERE,
        told=("expected int, at least 1, or -1 to save no checkpoint",)),
    bad("names in its own checkpoint", "ranking", 'TrainerArgs.ckpt_param_map = "map.txt"' + HERE,
        'TrainerArgs.ckpt_load_dir = "auto"',
        told=("no effect with TrainerArgs.ckpt_load_dir = 'auto'", "a value other than 'auto'")),
    bad("best of what is not measured", "ranking", 'TrainerArgs.best_metric = "GAUK"' + HERE,
        "TrainerArgs.ckpt_save_interval = 10", told=("not measured", "one of AUC")),
    bad("best that is the worst", "ranking", 'TrainerArgs.best_metric = "LOGLOSS"',
        'TrainerArgs.best_metric_mode = "max"' + HERE, "TrainerArgs.ckpt_save_interval = 10",
        'RankingArgs.eval_metrics = ("LOGLOSS",)', told=("would keep the worst", "better when lower")),
    bad("patience without evaluations", "ranking", "TrainerArgs.early_stop_patience = 3" + HERE,
        'TrainerArgs.best_metric = "AUC"', "TrainerArgs.eval_interval = 0",
        told=("no effect with TrainerArgs.eval_interval = 0", "it counts evaluations")),
    bad("parts of what is counted by tokens", "ranking", "TrainerArgs.gradient_accumulation_steps = 2" + HERE,
        "TrainerArgs.tokens_per_rank = 400", told=("equal counts of sequences", "tokens_per_rank = 400")),
    bad("tokens below a sequence", "ranking", "TrainerArgs.tokens_per_rank = 39" + HERE,
        told=("less than the longest possible sequence, which has 40 tokens", "max_sequence_length = 20")),
    bad("windows apart", "ranking", "DatasetArgs.window_stride = 21" + HERE,
        told=("leaves out items between the windows", "max_sequence_length = 20")),
    bad("scale of bfloat16", "ranking", 'PrecisionArgs.loss_scale = "dynamic"' + HERE,
        told=("set dtype_str to 'float16'", "NetworkArgs.dtype_str = 'bfloat16'")),
    bad("no regular expression", "ranking", 'head/PartOptimizerArgs.regex = "(head"' + HERE,
        "OptimizerArgs.part_optimizers = [@head/PartOptimizerArgs()]",
        told=("a Python regular expression: missing )",)),
    bad("part with an optimizer of tables", "ranking", 'head/PartOptimizerArgs.regex = "head"',
        'head/PartOptimizerArgs.optimizer_str = "partial_rowwise_adam"' + HERE,
        "OptimizerArgs.part_optimizers = [@head/PartOptimizerArgs()]",
        told=("one of 'adam', 'adamw', 'sgd', 'adagrad', 'muon'",)),
    bad("muon on slices of matrices", "ranking", 'OptimizerArgs.optimizer_str = "muon"' + HERE,
        'DataParallelArgs.sharding = "weights"', told=("needs whole matrices", "sharding = 'weights'")),
    bad("muon of a part on slices of matrices", "ranking", 'head/PartOptimizerArgs.regex = "head"',
        'head/PartOptimizerArgs.optimizer_str = "muon"' + HERE,
        "TensorModelParallelArgs.tensor_model_parallel_size = 2",
        "OptimizerArgs.part_optimizers = [@head/PartOptimizerArgs()]", told=("tensor_model_parallel_size = 2",),
        world_size=2),
    bad("muon of a table", "ranking", 'OptimizerArgs.sparse_optimizer_str = "muon"' + HERE, told=("one of 'adam'",)),
    bad("part of a misspelt scope", "ranking", 'head/PartOptimizerArgs.regex = "head"',
        "OptimizerArgs.part_optimizers = [@haed/PartOptimizerArgs()]" + HERE,
        told=("nothing is bound to haed/PartOptimizerArgs", "did you mean '@head/PartOptimizerArgs()'")),
    bad("two warm-ups", "ranking", "LRScheduleArgs.warmup_iters = 5", "LRScheduleArgs.warmup_ratio = 0.1" + HERE,
        told=("cannot be combined with LRScheduleArgs.warmup_iters = 5",)),
    bad("too long", "ranking", 'LRScheduleArgs.schedule = "linear"', "LRScheduleArgs.warmup_ratio = 0.5",
        "LRScheduleArgs.decay_ratio = 0.6" + HERE,
        told=("together exceed 1, the whole run",)),
    bad("step without milestones", "ranking", 'LRScheduleArgs.schedule = "step"' + HERE, told=("needs", "milestones")),
    bad("stable without a decay", "ranking", 'tables/LRScheduleArgs.schedule = "warmup_stable_decay"' + HERE,
        told=("needs the length of the decay",)),
    bad("schedule in another scope", "ranking", 'table/LRScheduleArgs.schedule = "linear"' + HERE,
        told=("without a scope or as tables/LRScheduleArgs; drop table/",)),
    bad("milestones not in order", "ranking", 'LRScheduleArgs.schedule = "step"',
        "LRScheduleArgs.milestones = [5, 5]" + HERE, told=("must increase",)),
    bad("table twice", "own", 'action/EmbeddingArgs.table_name = "item"' + HERE,
        told=("'item' is given twice", "item/EmbeddingArgs.table_name")),
    bad("moments of cut rows", "own", 'item/EmbeddingArgs.sharding = "column_wise"' + HERE,
        'OptimizerArgs.optimizer_str = "partial_rowwise_adam"',
        told=("'column_wise'", "OptimizerArgs.optimizer_str = 'partial_rowwise_adam' (", "use 'row_wise'", "'adam'")),
    bad("a moment a row of replicas", "own", 'action/EmbeddingArgs.optimizer_str = "rowwise_adagrad"' + HERE,
        told=("is for model_parallel tables", "use 'adagrad'")),
    bad("dense kernel without Adam", "own", 'item/EmbeddingArgs.compute_kernel = "dense"' + HERE,
        'OptimizerArgs.sparse_optimizer_str = "sgd"',
        told=("is for adam, adamw and partial_rowwise_adam, but OptimizerArgs.sparse_optimizer_str = 'sgd' (",)),
    bad("kernel of a dynamic table", "own", "-item/", 'item/DynamicEmbeddingArgs.feature_names = ["item"]',
        'item/DynamicEmbeddingArgs.table_name = "item"', "item/DynamicEmbeddingArgs.item_vocab_size_or_capacity = 9",
        'item/DynamicEmbeddingArgs.compute_kernel = "fused_uvm"' + HERE,
        told=("is not for dynamic tables, whose kernel follows from",)),
    bad("feature in two tables", "own", 'action/EmbeddingArgs.feature_names = ["action", "item"]' + HERE,
        told=("'item' is given twice", "item/EmbeddingArgs.feature_names")),
    bad("unknown dataset", "ranking", 'DatasetArgs.dataset_name = "ml-2m"' + HERE,
        told=("did you mean 'ml-", "kuairand-27k", "preprocess_dataset.py", "EmbeddingArgs")),
    bad("item without table", "own", 'DatasetArgs.item_feature_name = "itm"' + HERE,
        told=("no EmbeddingArgs has the feature 'itm'", "did you mean 'item'")),
    bad("item as context", "own", 'DatasetArgs.contextual_feature_names = ["item"]' + HERE,
        'DatasetArgs.item_feature_name = "item"', told=("'item' has a role in DatasetArgs.item_feature_name",)),
    bad("known after alone", "ranking", 'DatasetArgs.side_feature_names = ["watched"]',
        'DatasetArgs.known_after = ["watchd"]' + HERE, told=("'watchd' is not one of", "did you mean 'watched'")),
    bad("number that is no side feature", "ranking", 'DatasetArgs.side_feature_names = ["price"]',
        'n/NumericFeatureArgs.feature_names = ["prise"]' + HERE,
        told=("'prise' is not one of", "did you mean 'price'")),
    bad("unknown transform", "ranking", 'DatasetArgs.side_feature_names = ["price"]',
        'n/NumericFeatureArgs.feature_names = ["price"]', 'n/NumericFeatureArgs.transform = "log"' + HERE,
        told=("did you mean 'log1p'",)),
    bad("tower without features", "retrieval", "RetrievalArgs.item_tower = True" + HERE,
        told=("from their features", "DatasetArgs.side_feature_names")),
    bad("no history left", "ranking", "DatasetArgs.max_num_candidates = 20" + HERE,
        told=("leaves no room for history", "max_sequence_length = 20")),
    bad("ranking split", "ranking", 'DatasetArgs.split = "leave_one_out"' + HERE,
        told=("is not for ranking; use 'auto' or 'user_holdout'",)),
    bad("retrieval split", "retrieval", 'DatasetArgs.split = "user_holdout"' + HERE,
        told=("is not for retrieval; use 'auto' or 'leave_one_out' or 'time'",)),
    bad("no users for the test", "ranking", "DatasetArgs.valid_fraction = 0.3" + HERE, told=("no users for the test",)),
    bad("retrieval eval data", "retrieval", 'DatasetArgs.eval_dataset_path = "x"' + HERE, told=("is for ranking",)),
    bad("retrieval of one item", "retrieval", "DatasetArgs.max_sequence_length = 1" + HERE, told=("at least 2",)),
    bad("uniform without number", "retrieval", 'RetrievalArgs.negatives = "uniform"',
        "RetrievalArgs.num_negatives = 0" + HERE, told=("'uniform'", "above 0")),
    bad("full with number", "retrieval", 'RetrievalArgs.negatives = "full"',
        "RetrievalArgs.num_negatives = 9" + HERE, told=("whole corpus",)),
    bad("no positions and a bias", "retrieval", 'NetworkArgs.position_encoding = ("none", "relative_bias")' + HERE,
        told=("contradictory", '("absolute", "relative_bias")')),
    bad("head and tasks", "ranking", "RankingArgs.num_tasks = 3", "RankingArgs.prediction_head_arch = [16, 5]" + HERE,
        told=("must end in RankingArgs.num_tasks = 3",)),
    bad("threshold of a sigmoid", "ranking", "RankingArgs.prediction_head_arch = [16, 1]",
        'RankingArgs.eval_metrics = ("AUC>=4")' + HERE, told=("AUC>=4 needs one task of several classes",)),
    bad("label as input", "ranking", "NetworkArgs.interleave_actions = False" + HERE,
        told=("its own label", "max_num_candidates")),
    bad("labels ahead", "ranking", "NetworkArgs.is_causal = False" + HERE,
        told=("every item sees its own action", "max_num_candidates above 0")),
    bad("later items", "retrieval", "NetworkArgs.is_causal = False" + HERE, told=("the next item", "set it to True")),
    bad("items through the context", "retrieval", 'DatasetArgs.contextual_feature_names = ["sex"]',
        "NetworkArgs.disable_contextual_mask = False" + HERE, told=("from the second layer on", "would look better")),
    bad("labels through the context", "ranking", 'DatasetArgs.contextual_feature_names = ["sex"]',
        "NetworkArgs.disable_contextual_mask = False" + HERE,
        told=("from the second layer on", "remove this", "max_num_candidates")),
    bad("spans of other layers", "ranking", "NetworkArgs.num_layers = 2",
        "NetworkArgs.max_attention_span = (8, None, 8)" + HERE,
        told=("has 3 spans", "one per layer: NetworkArgs.num_layers = 2")),
    bad("ranking without actions", "ranking", 'DatasetArgs.action_feature_name = ""' + HERE, told=("learns from",)),
    bad("benchmark without actions", "benchmark", "BenchmarkDatasetArgs.action_feature_name = None" + HERE,
        told=("ranking learns from actions",), alone=False),
    bad("benchmark item unknown", "benchmark", 'BenchmarkDatasetArgs.item_feature_name = "itme"' + HERE,
        told=("'itme' is in no FeatureArgs", "did you mean 'item'")),
    bad("benchmark feature without table", "benchmark", "BenchmarkDatasetArgs.embedding_args = "
        "[@item/EmbeddingArgs(), @action/EmbeddingArgs()]", "-user/EmbeddingArgs",
        'ctx/FeatureArgs.feature_names = ["user"]' + HERE, told=("'user' has no table",)),
    bad("benchmark unequal lengths", "benchmark", 'seq/FeatureArgs.feature_names = ["item"]',
        'act/FeatureArgs.feature_names = ["action"]', "act/FeatureArgs.max_sequence_length = 30",
        "BenchmarkDatasetArgs.feature_args = [@seq/FeatureArgs(), @act/FeatureArgs(), @ctx/FeatureArgs()]",
        'BenchmarkDatasetArgs.action_feature_name = "action"' + HERE, told=("put both into one FeatureArgs",)),
    bad("benchmark long context", "benchmark", "ctx/FeatureArgs.max_sequence_length = 2" + HERE,
        told=("contextual_feature_names has one id",)),
    bad("benchmark no history", "benchmark", "BenchmarkDatasetArgs.max_num_candidates = 30" + HERE,
        told=("leaves no room for history", "seq/FeatureArgs.max_sequence_length = 30")),
    bad("benchmark distributions", "benchmark", "seq/FeatureArgs.value_dists = [@RandomDistribution()]" + HERE,
        told=("one distribution per feature of",)),
    bad("benchmark distribution of no feature", "benchmark", "seq/FeatureArgs.value_dists = "
        "{'itme': @RandomDistribution()}" + HERE,
        told=("'itme' is not one of seq/FeatureArgs.feature_names", "did you mean 'item'")),
    idle("benchmark lengths not jagged", "benchmark", "seq/FeatureArgs.is_jagged = False",
        "seq/FeatureArgs.seqlen_dist = @RandomDistribution()" + HERE,
        told=("all sequences are equally long", "set is_jagged to True")),
    bad("benchmark lengths above the longest", "benchmark", "seq/FeatureArgs.seqlen_dist = @l/RandomDistribution()",
        "l/RandomDistribution.low = 31" + HERE,
        told=("low = 31: must be below seq/FeatureArgs.max_sequence_length = 30",)),
    bad("benchmark ids above the rows", "benchmark", "ctx/FeatureArgs.value_dists = [@l/RandomDistribution()]",
        "l/RandomDistribution.low = 50" + HERE,
        told=("low = 50: must be below user/EmbeddingArgs.item_vocab_size_or_capacity = 50", "lower it")),
    bad("benchmark mean of no lognormal", "benchmark", "seq/FeatureArgs.seqlen_dist = @l/RandomDistribution()",
        'l/RandomDistribution.dist_type = "lognormal"', "l/RandomDistribution.mean = 0" + HERE,
        told=("mean = 0.0: must be above 0 with l/RandomDistribution.dist_type = 'lognormal'",)),
    bad("benchmark empty range", "benchmark", "seq/FeatureArgs.seqlen_dist = @l/RandomDistribution()",
        "l/RandomDistribution.low = 5" + HERE, "l/RandomDistribution.high = 5", told=("must be below", "high = 5")),
]  # fmt: skip

USER_TASKS = [
    bad("task without a label", "tasks", "-click/RankingTaskArgs", "click/RankingTaskArgs.weight = 2.0" + HERE,
        told=("click/RankingTaskArgs.label is required and not bound",)),
    bad("no classes", "tasks", "-stars/RankingTaskArgs", 'stars/RankingTaskArgs.label = "action"',
        'stars/RankingTaskArgs.kind = "class"' + HERE, told=("needs RankingTaskArgs.num_classes",)),
    bad("loss of another kind", "tasks", 'click/RankingTaskArgs.loss = "mse"' + HERE,
        told=("is not for", "RankingTaskArgs.kind = 'binary'", "use 'bce' or 'focal'")),
    bad("metric of another kind", "tasks", 'click/RankingTaskArgs.metrics = ("AUC", "RMSE")' + HERE,
        told=("RMSE is not for", "RankingTaskArgs.kind = 'binary'")),
    bad("threshold and bits", "tasks", 'click/RankingTaskArgs.positive_values = [">= 2", "& 4"]' + HERE,
        told=("a condition stands alone",)),
    bad("bits of a fraction", "tasks", 'click/RankingTaskArgs.positive_values = ["& 0.5"]' + HERE,
        told=("a condition stands alone",)),
    bad("NDCG without candidates", "tasks", 'click/RankingTaskArgs.metrics = ("NDCG",)' + HERE,
        told=("NDCG compares the candidates of a request", "set it above 1, or DatasetArgs.candidates")),
    bad("label that is shown", "tasks", 'click/RankingTaskArgs.label = "clicked"' + HERE,
        'DatasetArgs.side_feature_names = ["clicked"]', *table("clicked", 2, sharding_type="data_parallel"),
        told=("the prediction would see its own label", "add it to DatasetArgs.known_after")),
    bad("two tasks of one name", "tasks", 'stars/RankingTaskArgs.name = "clicked"' + HERE,
        told=("another task is called 'clicked', too",)),
    bad("best metric of no task", "tasks", 'TrainerArgs.best_metric = "AUC/clickd"' + HERE,
        'click/RankingTaskArgs.metrics = ("AUC",)',
        told=("is not measured; choose one of AUC/clicked", "did you mean 'AUC/clicked'")),
    bad("tasks of random data", "benchmark", "RankingArgs.tasks = [@click/RankingTaskArgs()]" + HERE,
        'click/RankingTaskArgs.label = "action"', told=("no effect on the random data of BenchmarkDatasetArgs",)),
]  # fmt: skip

EVERY = [*NAMES, *REFERENCES, *VALUES, *SYNTAX, *TOGETHER, *USER_TASKS]


def told_about(argv: list[str], task: str, capsys: pytest.CaptureFixture[str], is_warning: bool = False) -> str:
    """What the command line prints; it must refuse with exit code 2, or only warn."""
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(task, [*argv, "--validate-only", "--quick"], ALL_RULES)  # type: ignore[arg-type]
    assert exit_.value.code == (0 if is_warning else 2)
    captured = capsys.readouterr()
    assert captured.out.startswith("OK: ") == is_warning
    return captured.err


def is_told(case: Bad, printed: str, place: str = "") -> bool:
    return any(place in line and all(part in line for part in case.told) for line in printed.splitlines())


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_a_mistake_is_told_once_with_its_place_and_remedy(
    case: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(case.world_size))
    text = changed(BASES[case.base], *case.lines)
    file = write(tmp_path, text)
    numbers = [number for number, line in enumerate(text.splitlines(), 1) if line.endswith(HERE)]
    place = f"{file}:{numbers[0]}: " if numbers else f"{file}: "
    printed = told_about(["--gin-config-file", file], task_of(case.base), capsys, case.is_warning)
    assert is_told(case, printed, place), f"expected {place!r} with {case.told} in:\n{printed}"
    assert len(printed.splitlines()) == 1 or not case.alone, printed


@pytest.mark.parametrize(
    ("by", "hidden"),
    [
        ("reference to a misspelt scope", ["scope that is not referred to", "benchmark long context"]),
        ("two datasets", ["scope that is not referred to", "benchmark distributions"]),
        ("misspelt scope of a table", ["kernel of a dynamic table"]),
        ("missing include", ["two warm-ups"]),
        ("text without quotes", ["no equals sign"]),
    ],
)
def test_one_mistake_hides_no_other(
    by: str, hidden: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [case for case in EVERY if case.name in (by, *hidden)]
    file = write(tmp_path, changed(BASES[cases[0].base], *(line for case in cases for line in case.lines)))
    printed = told_about(["--gin-config-file", file], task_of(cases[0].base), capsys)
    assert [case.name for case in cases if not is_told(case, printed)] == [], printed


@pytest.mark.parametrize(
    ("base", "lines", "told"),
    [
        ("ranking", ['NetworkArg.num_layers = "two"', "-NetworkArgs.num_layers"], ["no class NetworkArg", "'two': ex"]),
        ("ranking", ["NetworkArgs.hiden_size = 1.5", "-NetworkArgs.hidden_size"], ["no parameter hiden", "= 1.5: exp"]),
        ("ranking", ['RankingArgs.eval_metrics = "AUC>=4"', "RankingArgs.prediction_head_arch = (1,)",
         "RankingArgs.prediction_head_bias = 1"], ["AUC>=4 needs one task of several classes", "expected bool"]),
        ("own", ["item/EmbeddingArgs.init_std = 0", 'action/EmbeddingArgs.compute_kernel = "fused"',
         'x/EmbeddingArgs.table_name = "action"'],
         ["init_std = 0: expected", "set sharding_type to 'model_parallel'", "'action' is"]),
    ],
)  # fmt: skip
def test_what_a_mistake_means_is_checked_too(
    base: str, lines: list[str], told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = told_about(["--gin-config-file", write(tmp_path, changed(BASES[base], *lines))], task_of(base), capsys)
    assert all(part in printed for part in told), printed


@pytest.mark.parametrize("base", BASES)
def test_the_files_that_the_cases_change_are_good(base: str, tmp_path: Path) -> None:
    parse_command_line(task_of(base), ["--gin-config-file", write(tmp_path, BASES[base])], ALL_RULES)  # type: ignore[arg-type]


def test_all_mistakes_are_told_at_once_from_top_to_bottom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = changed(
        BASES["ranking"],
        "TrainerArgs.train_batch_size = 0",
        "NetworkArgs.num_layers = two",
        "NetworkArgs.num_attention_heads = 3",
        "TensorModelParallelArgs.tensor_model_parallel_size = 2",
        "OptimizerArgs.optimiser_str = 'adam'",
    )
    printed = told_about(["--gin-config-file", write(tmp_path, text)], "ranking", capsys)
    header, *problems = printed.splitlines()
    assert header == "bad configuration, 5 problems:"
    parts = ("train_batch_size", "two", "must be a multiple", "must divide", "optimiser_str")
    for problem, part in zip(problems, parts, strict=True):
        assert part in problem


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        (b"\x89PNG\xff\xfe\x00", "ml_1m.gin", "ml_1m.gin: not UTF-8 text"),
        (b"a = 1\n\x00\x00", "ml_1m.gin", "ml_1m.gin: holds NUL bytes"),
        (b"", "ml1m.gin", "no such file; did you mean 'ml_1m.gin'?"),
        (b"", ".", "Is a directory; give a .gin file"),
    ],
)
def test_file_that_cannot_be_read(
    content: bytes, name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, content, "ml_1m.gin")
    printed = told_about(["--gin-config-file", str(tmp_path / name)], "ranking", capsys)
    assert told in printed and len(printed.splitlines()) == 1


def test_empty_file_lists_everything_that_is_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = told_about(["--gin-config-file", write(tmp_path, "")], "ranking", capsys)
    required = ("train_batch_size", "num_layers", "optimizer_str", "prediction_head_arch", "no dataset")
    assert all(name in printed for name in required)


def test_mistake_on_the_command_line_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--gin-config-file", write(tmp_path, BASES["ranking"]), "--gin-bindings", "NetworkArgs.num_layers = 0"]
    assert "--gin-bindings: NetworkArgs.num_layers = 0: expected int" in told_about(argv, "ranking", capsys)
