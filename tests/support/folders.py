"""What a dense model's folder can look like: one model, stored in every way that people's folders store it, and folders
that two readers would read as two models.

`SAME`: name -> function that rewrites a folder of one model.safetensors, all of them still models.
`TWO_MODELS`: name -> (function, words of the refusal).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.faults import INDEX, WEIGHTS, edit_config, edit_tensors, split_in_two

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
SECOND = "model-00002-of-00002.safetensors"
Tensors = dict[str, torch.Tensor]


def spoilt(folder: Path) -> Tensors:
    """Other weights under the same names."""
    return {
        name: torch.randn_like(t, dtype=torch.float32).to(t.dtype) for name, t in load_file(folder / WEIGHTS).items()
    }


def write(tensors: Tensors, path: Path) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def in_hub_cache(cache: Path, model: str, folder: Path, commit: str) -> Path:
    """The model's snapshot of that commit, a copy of the folder, as the hub's client keeps its branch main."""
    repository = cache / f"models--{model.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


def unlisted(folder: Path) -> None:
    """The index forgets a tensor that a shard holds."""
    weight_map = split_in_two(folder)
    write_index(folder, {name: file for name, file in weight_map.items() if name != NORM})


def beside(name: str) -> Callable[[Path], None]:
    """A file of other weights at which transformers does not look (vLLM may; it is not copied, and named)."""
    return lambda folder: write(spoilt(folder), folder / name)


def left_shard(folder: Path) -> None:
    """A shard of an earlier save, which the index does not name."""
    stale = spoilt(folder)
    split_in_two(folder)
    write(stale, folder / "model-00001-of-00001.safetensors")


def index_of_one(folder: Path) -> None:
    write_index(folder, dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS))


def pickle_beside(folder: Path) -> None:
    torch.save(spoilt(folder), folder / "pytorch_model.bin")


def without_prefix(folder: Path) -> None:
    """As the model without its head was saved, the head added."""
    edit_tensors(folder, lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)])


def tie(folder: Path, head: Callable[[Tensors], object]) -> None:
    edit_config(folder, lambda config: config.update(tie_word_embeddings=True))
    edit_tensors(folder, head)


def only_the_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def more_layers(tensors: Tensors) -> None:
    """A block that config.json does not count, as a prediction of several tokens is stored."""
    tensors.update({n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n})
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(4, 4)


def old_buffers(tensors: Tensors) -> None:
    tensors.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)})


def named_twice(factor: float) -> Callable[[Tensors], object]:
    """With and without the prefix of the model below the head: one parameter."""
    return lambda tensors: tensors.update({"norm.weight": tensors[NORM] * factor})


SAME: dict[str, Callable[[Path], object]] = {
    "one file": lambda folder: None,
    "shards": split_in_two,
    "an index of the one file": index_of_one,
    "shards, a tensor not listed": unlisted,
    "shards, one of an earlier save beside": left_shard,
    "Mistral's own file beside": beside("consolidated.safetensors"),
    "a variant beside": beside("model.fp16.safetensors"),
    "a pickle beside": pickle_beside,
    "names without their prefix": without_prefix,
    "a tensor under two names": lambda folder: edit_tensors(folder, named_twice(1.0)),
    "bfloat16": lambda folder: edit_tensors(folder, lambda t: t.update({n: v.bfloat16() for n, v in t.items()})),
    "tied, no head": lambda folder: tie(folder, lambda t: t.pop(HEAD)),
    "tied, the head a copy": lambda folder: tie(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone()})),
    "tied, only the head": lambda folder: tie(folder, only_the_head),
    "more layers": lambda folder: edit_tensors(folder, more_layers),
    "buffers of an old version": lambda folder: edit_tensors(folder, old_buffers),
}


def two_sets(folder: Path) -> None:
    single = spoilt(folder)
    split_in_two(folder)
    write(single, folder / WEIGHTS)


def two_sets_swapped(folder: Path) -> None:
    right, other = load_file(folder / WEIGHTS), spoilt(folder)
    write(other, folder / WEIGHTS)
    split_in_two(folder)
    write(right, folder / WEIGHTS)


def one_file_and_more(folder: Path) -> None:
    """The index names model.safetensors and another: transformers reads the first alone."""
    weight_map = split_in_two(folder)
    shutil.move(folder / "model-00001-of-00002.safetensors", folder / WEIGHTS)
    write_index(folder, {name: SECOND if file == SECOND else WEIGHTS for name, file in weight_map.items()})


def without_index(folder: Path) -> None:
    split_in_two(folder)
    (folder / INDEX).unlink()


def named_elsewhere(folder: Path) -> None:
    write(spoilt(folder), folder / "other.safetensors")
    edit_config(folder, lambda config: config.update(transformers_weights="other.safetensors"))


def twice(folder: Path) -> None:
    split_in_two(folder)
    second = load_file(folder / SECOND)
    first = load_file(folder / "model-00001-of-00002.safetensors")
    name = min(first)
    write(second | {name: torch.zeros_like(first[name])}, folder / SECOND)


TWO_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "one file and shards of others": (two_sets, (f"{WEIGHTS} and", INDEX, "move away")),
    "shards and one file of others": (two_sets_swapped, (f"{WEIGHTS} and", INDEX, "move away")),
    "an index of the one file and another": (one_file_and_more, (f"{WEIGHTS} and", INDEX)),
    "shards without an index": (without_index, (SECOND, "index is missing")),
    "an adapter's config": (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "lab/base"}'),
        ("adapter_config.json", "merge"),
    ),
    "other weights named by the config": (named_elsewhere, ("transformers_weights", "other.safetensors")),
    "two tensors of one parameter": (
        lambda folder: edit_tensors(folder, named_twice(2.0)),
        ("norm.weight is not", NORM, "stale"),
    ),
    "a tensor in two shards": (twice, (SECOND, "is also in")),
    "tied, a head of its own": (lambda folder: tie(folder, lambda t: None), (HEAD, EMBEDDING, "tie_word_embeddings")),
}
