"""Make an export of this trainer from a checkpoint of another one, without running code in it.

``PEERS`` is the whole mapping. What public documentation, issues or arXiv 2402.17152 do not state is an assumption, and
a comment says so. Correct it there, or for one import by --layout and --ids.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Size, Tensor

from hstu.base.errors import ConfigError, DataError
from hstu.base.files import written_aside
from hstu.base.ids import codes_of
from hstu.checkpoint.directory import describe_files, write_manifest
from hstu.checkpoint.find import GIN
from hstu.checkpoint.tensors import CONSOLIDATED, DYNAMIC, TABLES, WEIGHTS
from hstu.config.run_config import RunConfig
from hstu.model.embedding import TableSpec, initial_row_blocks, table_specs
from hstu.model.stack import DTYPES
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.train.builder import raw_ids, task_module
from hstu.train.inference import describe_features
from hstu.train.sources import open_source

Ids = Mapping[str, Sequence[str] | None]
"""Feature → raw id of each foreign row; None: as here. Without an entry, keys or row numbers are raw ids."""
COMPUTES: dict[str, dict[str, float]] = {"meta-research": {"attention_scale": 1.0, "norm_epsilon": 1e-6}}
"""Source → NetworkArgs that it always computes with."""
_OURS = "model.task.encoder.stack.layers."
_POSITIONS = "model.task.encoder.inputs.position_table"
_LAYER = r".*layers\.(\d+)\._*"


class Rule(NamedTuple):
    """A foreign name as a regular expression, our name (of a table or of a feature in it), and the foreign layout.

    layout: axes from outside to inside, which are hidden (not of a bias), head, channel and uvqk, with its letters as
    stored. Or "rows": more than ours, "distances": of keys minus queries, farther than ours. Empty: as ours.
    """

    foreign: str
    ours: str
    layout: str = ""


PEERS: dict[str, tuple[Rule, ...]] = {
    # Assumed, because its documentation names modules only: the names; uvqk [D, 4 I] with u, v, q and k of one head
    # together, as tensor-parallel ranks need it; a projection [out, in] like torch's; heads outside of channels.
    "nvidia": (
        Rule(_LAYER + r"linear_uvqk[._](weight|bias)", _OURS + r"\1.uvqk.\2", "hidden head uvqk channel"),
        Rule(_LAYER + r"linear_proj[._]weight", _OURS + r"\1.out.weight", "hidden head channel"),
        Rule(_LAYER + r"linear_proj[._]bias", _OURS + r"\1.out.bias"),
        Rule(_LAYER + r"input_(?:layer)?norm[._](weight|bias)", _OURS + r"\1.input_norm.\2"),
        Rule(_LAYER + r"output_(?:layer)?norm[._](weight|bias)", _OURS + r"\1.output_norm.\2", "head channel"),
        Rule(r".*position_embeddings?[._]weight", _POSITIONS, "rows"),
        Rule(r".*mlp\.(\d+)\.(weight|bias)", r"model.task.head.\1.\2"),
        Rule(r".*embeddings\.([^.]+)\.weight", TABLES + r"\1"),
    ),
    # Names of a layer: github.com/bytedance/HLLM/issues/34. Order of u, v, q, k: equation 1 of the paper. Assumed: the
    # names of the tables, heads outside of channels in each of u, v, q and k, and the sign of distances.
    "meta-research": (
        Rule(_LAYER + r"uvqk", _OURS + r"\1.uvqk.weight", "hidden uvqk head channel"),
        Rule(_LAYER + r"o\.weight", _OURS + r"\1.out.weight", "hidden head channel"),
        Rule(_LAYER + r"o\.bias", _OURS + r"\1.out.bias"),
        Rule(_LAYER + r"rel_attn_bias\._ts_w", _OURS + r"\1.bias.time_weight", "rows"),
        Rule(_LAYER + r"rel_attn_bias\._pos_w", _OURS + r"\1.bias.position_weight", "distances"),
        Rule(r".*pos_emb\.weight", _POSITIONS, "rows"),
        Rule(r".*item_emb\.weight", TABLES + "@item"),
    ),
}  # fmt: skip
"""Name after --from → its mapping."""


def import_checkpoint(
    source: str, path: Path, config: RunConfig, output: Path, layouts: Mapping[str, str], ids: Ids, partial: bool
) -> list[str]:
    """Write the weights in ``path`` as a new export ``output``. Returns the map, one line per tensor.

    ``layouts``: "uvqk", "out" or "output_norm" → layout to use. ``partial``: leave out what does not fit. Raises
    ConfigError if the network computes other things than the source, and DataError, with the map, or for a bad file.
    """
    (found, lines), network, problems = read(source, path, layouts), config.network, list[str]()
    wrong = {name: value for name, value in COMPUTES.get(source, {}).items() if getattr(network, name) != value}
    ConfigError.raise_if([f"set NetworkArgs.{name} = {value}: {source} computes so" for name, value in wrong.items()])
    data = open_source(config)
    with torch.device("meta"):
        task = task_module(config, data.roles, REFERENCE_KERNELS)
    own = {f"{WEIGHTS}task.{name}": tensor.size() for name, tensor in task.state_dict().items()}
    sizes = {"uvqk": 4, "channel": network.kv_channels, "hidden": network.hidden_size}
    sizes["head"] = network.num_attention_heads
    specs, vocabularies = table_specs(data.tables, network, data.roles), raw_ids(data)
    tables = {f"{TABLES}{key}": spec for spec in specs for key in (*spec.features, spec.name)}
    tables[f"{TABLES}@item"] = tables[f"{TABLES}{data.roles.item}"]
    facts = {spec.name: {"rows": spec.rows, "dim": spec.dim, "features": [*spec.features]} for spec in specs}
    tensors, missing = vocabularies.tensors(), {*own, *(f"{TABLES}{spec.name}" for spec in specs)}
    for rule, parts, keys in found:
        name, ours, shown = rule.foreign, rule.ours, " + ".join(str(list(part.shape)) for part in parts)
        try:
            if spec := tables.get(ours):
                ours = f"{TABLES}{spec.name}"
                codes, rows = _codes_and_rows(spec, parts, keys, vocabularies.decoded(spec.features[0]), ids)
                how = f"[{spec.rows}, {spec.dim}]: {len(codes)} rows found, others as initialised"
                if spec.dynamic:
                    tensors[f"{DYNAMIC}{spec.name}.ids"], order = torch.sort(codes)
                    tensors[f"{DYNAMIC}{spec.name}.weight"] = rows[order]
                    facts[spec.name] |= {"rows": len(rows), "dynamic": True}
                else:
                    blocks = initial_row_blocks(spec, config.trainer.seed, 0, spec.rows)
                    tensors[ours] = torch.cat([block for _, block in blocks]).index_copy(0, codes, rows)
            elif ours in own:
                tensors[ours], how = fit(parts, rule, own[ours], sizes), f"{list(own[ours])}"
            else:
                raise ValueError("the model of this gin file has no such weight")
        except (ValueError, RuntimeError) as problem:
            problems.append(f"{name} {shown} → {ours}: {problem}")
        else:
            lines.append(f"{name} {shown} → {ours} {how}" + (f", from ({rule.layout})" if rule.layout else ""))
            missing.discard(ours)
    problems += [f"nothing fills {name}" for name in sorted(missing)]
    if problems and not partial:
        hint = "Correct the gin file, give --layout or --ids, or leave these out by --partial (docs/migration.md)"
        raise DataError("\n  ".join([f"cannot import {path}:", *lines, "These do not fit:", *problems]) + f"\n{hint}")
    described = {"iteration": 0, "tables": facts, "features": describe_features(data), "trained_on": data.trained_on}
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(output) as aside:
        aside.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / CONSOLIDATED)
        (aside / GIN).write_text(config.operative_gin(), encoding="utf-8")
        (aside / "config.json").write_text(json.dumps(described, indent=1, ensure_ascii=False), encoding="utf-8")
        write_manifest(aside, describe_files(aside, [*aside.iterdir()]))
    return [*lines, *(f"left out: {problem}" for problem in problems)]


def _codes_and_rows(
    spec: TableSpec, parts: Sequence[Tensor], keys: np.ndarray | None, known: np.ndarray | None, ids: Ids
) -> tuple[Tensor, Tensor]:
    """Return the codes here, int64 [n], of the foreign rows that the data has, and these rows, [n, dim]."""
    feature = spec.features[0]
    rows = parts[0] if all(torch.equal(part, parts[0]) for part in parts) else torch.cat([*parts])
    given = ids.get(feature, np.arange(len(rows)) if keys is None else keys)
    if given is None:
        given, known = np.arange(len(rows)), None
    if rows.shape[1:] != (spec.dim,) or len(given) != len(rows):
        raise ValueError(f"expected rows {spec.dim} wide, and a line for each in --ids {feature} FILE")
    if known is not None and known.dtype == object and feature not in ids:
        raise ValueError(f"ids of {feature} are text: give --ids {feature} FILE, or --ids {feature} rows if as here")
    codes = np.asarray(given, dtype=object).astype(np.int64 if known is None else known.dtype)
    codes = codes if known is None else codes_of(codes, known)
    if not (codes >= 0).any():
        raise ValueError(f"none of its ids is one of {feature} in the data; see --ids")
    kept = torch.from_numpy((codes >= 0) & (spec.dynamic is not None or codes < spec.rows))
    return torch.from_numpy(codes)[kept], rows[kept]


def fit(parts: Sequence[Tensor], rule: Rule, own: Size, sizes: Mapping[str, int]) -> Tensor:
    """Bring the parts of a tensor, one per rank, into our layout. ``sizes``: of the axes here.

    Ranks have successive heads, or the same as another rank. A matrix with "hidden" on its other side is transposed.
    Raises ValueError or RuntimeError if the tensor does not fit.
    """
    if "channel" in rule.layout:
        words = [word for word in rule.layout.split() if word != "hidden" or parts[0].ndim > 1]
        return _by_axes(parts, words, sizes).reshape(own)
    whole = _join(parts, 1)
    if rule.layout == "distances":
        whole = whole.flip(0)[(len(whole) - own[0]) // 2 :]
    whole = whole[: own[0]] if rule.layout else whole
    if whole.size() != own:
        raise ValueError(f"here it is {list(own)}")
    return whole


def _by_axes(parts: Sequence[Tensor], words: Sequence[str], sizes: Mapping[str, int]) -> Tensor:
    """Return the whole tensor with one dimension per axis, in our order."""
    stored = next((word for word in words if sorted(word) == sorted("uvqk")), "")
    plain = ["uvqk" if word == stored else word for word in words]
    order = ("head", "uvqk", "channel", "hidden") if stored else ("hidden", "head", "channel")
    target = [axis for axis in order if axis in plain]
    if len(target) < len(plain) or "head" not in plain:
        raise ValueError(f"the layout is no order of {', '.join(order)}")
    divided = [-1 if axis == "head" else sizes[axis] for axis in plain if axis != "hidden"]
    side, dim = int(plain[0] != "hidden"), target.index("head")
    shards = [part.T if part.ndim == 2 and part.shape[side] != sizes["hidden"] else part for part in parts]
    shards = [part.unflatten((1 - side) * (part.ndim - 1), divided) for part in shards]
    shards = [part.permute([plain.index(axis) for axis in target]) for part in shards]
    whole = _join(shards, max(1, sizes["head"] // shards[0].shape[dim]), dim)
    return whole[:, [stored.index(letter) for letter in "uvqk"]] if stored else whole


def _join(parts: Sequence[Tensor], count: int, dim: int = 0) -> Tensor:
    """Concatenate the first ``count`` parts, which the others repeat."""
    if any(not torch.equal(part, parts[rank % count]) for rank, part in enumerate(parts)):
        raise ValueError(f"the files of {len(parts)} ranks differ, where {count} hold it together")
    return torch.cat([*parts[:count]], dim)


def read(source: str, path: Path, layouts: Mapping[str, str]) -> tuple[list[Any], list[str]]:
    """Return (rule with names in full, tensor of each rank, keys or None) of each weight, and a line for all else."""
    of_ranks = sorted(path.glob("torch_module/model.[0-9]*.pth"), key=lambda file: int(file.name.split(".")[1]))
    if not (files := [path] if path.is_file() else of_ranks):
        raise DataError(f"{path} is no file of torch.save, and no directory with torch_module/model.<rank>.pth")
    unused, weights = dict[str, str](), dict[str, list[Tensor]]()
    for content in map(_load, files):
        for key in ("model_state_dict", "state_dict", "model"):
            if isinstance(content.get(key), Mapping):
                unused |= dict.fromkeys(content.keys() - {key}, "a run here starts with states of its own")
                content = content[key]
        for name, value in content.items():
            if isinstance(value, Tensor):
                weights.setdefault(re.sub(r"^(module\.)+", "", name), []).append(value.detach().float())
            else:
                unused[name] = "no tensor"
    keyed = _read_keyed(path)
    found: list[Any] = [(Rule(name, f"{TABLES}{name}"), [rows], keys) for name, (keys, rows) in keyed.items()]
    for name, parts in weights.items():
        if (rule := next((rule for rule in PEERS[source] if re.fullmatch(rule.foreign, name)), None)) is None:
            unused[name] = "no rule has its name"
        else:
            ours = re.sub(rule.foreign, rule.ours, name)
            layout = next((new for part, new in layouts.items() if rule.layout and f".{part}." in ours), rule.layout)
            found.append((Rule(name, ours, layout), parts, None))
    return found, [f"{name}: not used: {why}" for name, why in sorted(unused.items())]


def _load(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that are refused
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:  # of many types
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise DataError(
                f"{path} is refused: it holds more than tensors ({named[1]}), which runs code of its maker. If you "
                "trust it, save only torch.save({name: each.cpu() for name, each in model.state_dict().items()}, path)"
            ) from None
        reason = re.split(r"[.\n]", str(error).strip())[0]
        text = "Copy it again; what pickle wrote, such as a model of RecTools, is refused (docs/migration.md)"
        raise DataError(f"{path} is truncated, or no dict of torch.save ({reason}). {text}.") from None


def _read_keyed(path: Path) -> dict[str, tuple[np.ndarray, Tensor]]:
    """Read tables of dynamicemb: per rank a file of int64 keys, and one of values whose type a JSON file may state."""
    tables: dict[str, tuple[np.ndarray, Tensor]] = {}
    for file in sorted(file for file in path.rglob("*_keys*") if "_opt_" not in file.name):
        table, values = re.split(r"_(?:emb_)?keys", file.name)[0], file.with_name(file.name.replace("keys", "values"))
        facts = [json.loads(meta.read_text(encoding="utf-8")) for meta in file.parent.glob(f"{table}_*meta*.json")]
        dtype = DTYPES[str((facts or [{}])[0].get("embedding_dtype", "float32")).removeprefix("torch.")]
        keys, content = np.fromfile(file, np.int64), torch.from_numpy(np.fromfile(values, np.uint8))
        if file.stat().st_size % 8 or len(content) % max(1, len(keys) * dtype.itemsize):
            raise DataError(f"{file} or {values.name} is truncated: {len(keys)} keys, {len(content)} bytes")
        if not len(keys):
            continue
        rows = content.view(dtype).float().view(len(keys), -1)
        if table in tables:
            keys, rows = np.concatenate([tables[table][0], keys]), torch.cat([tables[table][1], rows])
        if len(np.unique(keys)) < len(keys):
            raise DataError(f"{file} has keys of another file of table {table}: remove the files of other saves")
        tables[table] = keys, rows
    return tables
