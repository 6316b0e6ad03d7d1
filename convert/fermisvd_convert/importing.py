"""`fermisvd import`: a low-rank checkpoint of another method becomes one of ours, the same function in either form.

Nothing is calibrated or decomposed: what stands for a layer there, A and B, is written as the svd form has it, or by
PivGa, which takes r^2 numbers less. Code that a checkpoint brings is never run.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from fermisvd.bits import layers_of
from fermisvd.budget import RankedGroup, compressed
from fermisvd.errors import OutputError, explained, reason
from fermisvd.files import TensorInfo, is_pickle, read_headers, tensors_of
from fermisvd.format import check_finite, validate_checkpoint
from fermisvd.groups import LinearGroup, find_groups
from fermisvd.hf import empty_model, vocabulary_of
from fermisvd.losses import Pair
from fermisvd.tensors import model_tensors
from fermisvd_convert.card import write_imported_card
from fermisvd_convert.checks import check_place
from fermisvd_convert.layouts import Found, find_layers
from fermisvd_convert.loading import SourceError
from fermisvd_convert.options import ImportOptions
from fermisvd_convert.output import check_free, claimed, complete, move_into_place, unfinished
from fermisvd_convert.pickles import to_safetensors
from fermisvd_convert.places import make_own, real_path, remove_own
from fermisvd_convert.progress import bar
from fermisvd_convert.record import versions
from fermisvd_convert.source import TORCH_TYPES, WRAPPERS, Source, check_tensors, find_folder, folder_name
from fermisvd_convert.writer import copied_files, storage_type, weight_bytes, write_checkpoint, write_config

logger = logging.getLogger("fermisvd")

PROBES = 4  # random inputs that both are compared on
COMPUTED = ".rotary_emb.inv_freq"  # ends tensors that models make themselves
Headers = dict[str, TensorInfo]


@dataclass(frozen=True)
class Imported(Source):
    """A source some of whose weights are products of factors. layers: those, by the layer's name; stored: the files'
    own headers."""

    layers: Mapping[str, Found]
    stored: Mapping[str, TensorInfo]

    def factors(self, layer: str) -> Pair:
        """A (m x r) and B (r x n), float64."""
        found = self.layers[layer]
        tensors = {name: self.stored[name].read() for name in found.names}
        for name, tensor in tensors.items():
            check_finite(f"{self.stored[name].file}: {name}", tensor)
        return found.factors(tensors)

    def factors_of(self, group: LinearGroup) -> Pair:
        return self.factors(group.name)

    def tensor(self, name: str) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        if layer not in self.layers:
            return super().tensor(name)
        a, b = self.factors(layer)
        return (a @ b).to(self.weight_type())

    @property
    def title(self) -> str:
        """The last name of a file or folder, or a hub model's id."""
        return folder_name(self.name) if Path(self.name).exists() else self.name


def import_checkpoint(source: str | Path, out: str | Path, **given: Any) -> dict[str, Any]:
    """Write `source`, a checkpoint of another method, as the new folder `out`; returns what was found and how near the
    products are.

    source: a folder, a hub id, or a file of a state dict; given: options of ImportOptions by name. `out` appears whole
    or not at all. Raises FermiSVDError for what cannot be imported, naming it.
    """
    options, out = ImportOptions.named(**given), real_path(out)
    check_place(out, "choose another OUT")
    check_free(out, "choose another OUT")
    for given_folder in (str(source), options.base or ""):
        if Path(given_folder).is_dir() and real_path(given_folder) in out.parents:
            raise OutputError(f"{out}: lies inside {given_folder}; choose another OUT")
    with claimed(out) as place:
        check_free(out, "choose another OUT")
        with scratch(place.ours / f"{out.name}.import") as folder:
            model = open_imported(str(source), options, folder)
            ranked = ranked_layers(model, options)
            dtype = storage_type(options.dtype, model)
            say_what_is_narrowed(model, dtype)
            if not (kept := compressed(ranked)):
                raise SourceError(f"{model.name}: in {options.form} form no layer's factors are smaller")
            with unfinished(place) as partial:
                write_checkpoint(model, partial, kept, model.factors_of, None, dtype, options.dtype != "auto")
                found = sorted({layer.method for layer in model.layers.values()})
                base = folder_name(options.base) if options.base and Path(options.base).is_dir() else options.base
                provenance = {"model": base or model.title, "imported": found, "versions": versions()}
                write_config(model, partial, kept, dtype, provenance)
                write_imported_card(model.title, found, partial, model.folder)
                validate_checkpoint(partial)
                off = largest_difference(partial, kept, model.factors_of)
                with complete(place):
                    move_into_place(place, overwrite=False)
            before = weight_bytes(model.stored)
    after = weight_bytes(read_headers(out))
    return {"layouts": found, "layers": len(kept), "bytes": {"before": before, "after": after}, "difference": off}


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    make_own(folder)
    try:
        yield folder
    finally:
        remove_own(folder)


def open_imported(name: str, options: ImportOptions, folder: Path) -> Imported:
    """The checkpoint, its files but for weights and code copied to `folder`. Raises SourceError or FormatError."""
    given, commit = Path(name), None
    if given.is_file():
        origin, headers = given.parent, pickled([given], options, folder)
    else:
        origin, commit = find_folder(name, pickles=options.allow_pickle)
        pickles = sorted(origin.glob("pytorch_model*.bin")) or [
            path for path in sorted(origin.iterdir()) if is_pickle(path)
        ]
        if any(origin.glob("*.safetensors")) or not pickles:
            headers = read_headers(origin)
        else:
            headers = pickled(pickles, options, folder)
    base = find_folder(options.base)[0] if options.base else origin
    model = folder / "model"
    model.mkdir()
    config = plain_config(base)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in copied_files(base)[0]:
        if path.suffix != ".py":  # code of its own
            (model / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / path, model / path)
    if (base / "README.md").is_file():
        shutil.copyfile(base / "README.md", model / "README.md")  # for its license
    with explained(SourceError, f"{base / 'config.json'}: transformers makes no causal language model of it"):
        empty = empty_model(model)
    config["architectures"] = [type(empty).__name__]
    if any(isinstance(module, Conv1D) for module in empty.modules()):
        raise SourceError(f"{base}: {type(empty).__name__} keeps its weights transposed, which is not imported yet")
    headers = unwrapped(headers)
    shapes = {parameter: tuple(tensor.shape) for parameter, tensor in empty.state_dict().items()}
    layers = find_layers({name: info.shape for name, info in headers.items()}, shapes)
    if not layers:
        raise SourceError(f"{name}: no layer has factors as docs/importing.md knows them")
    tensors = model_tensors(empty, whole := multiplied(layers, headers, shapes))
    check_tensors(origin, empty, tensors)
    if strangers := [each for each in tensors.left_out if not each.endswith(COMPUTED)]:
        raise SourceError(
            f"{whole[strangers[0]].file}: {strangers[0]}: neither {type(empty).__name__} nor a known layout has it"
        )
    vocabulary = vocabulary_of(empty)
    names = tensors.stored_names
    return Imported(
        name, model, commit, False, config, empty.config, tensors.own, (), vocabulary, names, layers, headers
    )


def unwrapped(headers: Headers) -> Headers:
    """The tensors by their names without a wrapper's in front; without the placeholders of one number for weights."""
    prefix = next((w for w in WRAPPERS if all(name.startswith(w) for name in headers)), "")
    return {
        name.removeprefix(prefix): info
        for name, info in headers.items()
        if not (name.endswith(".weight") and info.shape == (1,))
    }


def multiplied(layers: Mapping[str, Found], headers: Headers, parameters: Mapping[str, tuple[int, ...]]) -> Headers:
    """The tensors, a weight of the dense model's shape in the place of each layer's factors; a bias of zeros that the
    model does not have is left out. Raises SourceError for another."""
    whole = dict(headers)
    for layer, found in layers.items():
        for name in found.names:
            whole.pop(name)
            if name not in (found.pivots, found.others) and headers[name].dtype not in TORCH_TYPES:
                raise SourceError(f"{headers[name].file}: {name}: of type {headers[name].dtype}, no floating-point one")
        for end in ("weight", "bias"):
            if f"{layer}.{end}" in whole and (end == "weight" or found.bias):
                raise SourceError(f"{whole[f'{layer}.{end}'].file}: {layer}.{end} is there beside {found.a}")
        whole[f"{layer}.weight"] = replace(headers[found.b], shape=parameters[f"{layer}.weight"])
        if found.bias and f"{layer}.bias" in parameters:
            whole[f"{layer}.bias"] = whole.pop(found.bias)
        elif found.bias and not headers[found.bias].read().any():
            whole.pop(found.bias)
    return whole


def pickled(files: list[Path], options: ImportOptions, folder: Path) -> Headers:
    """Headers of the tensors in pickled state dicts, which are written anew into `folder`."""
    if not options.allow_pickle:
        raise SourceError(
            f"{files[0]}: pickled weights; --allow-pickle has torch read tensors from it, and nothing else, in a "
            "process of its own"
        )
    headers: Headers = {}
    for number, file in enumerate(files):
        to_safetensors(file, out := folder / f"weights-{number}.safetensors")
        for info in tensors_of(out):
            if info.name in headers:
                raise SourceError(f"{file}: {info.name} is in another of the folder's pickles, too; give one file")
            headers[info.name] = info
    return headers


def plain_config(folder: Path) -> dict[str, Any]:
    """config.json without code of its own, and in a model_type of transformers': that of a model inside (LEMS), or the
    last word of a name that was made of one (lowrank_llama). Whether it is the model's, its tensors will tell."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("base_config") or config
        kind = str(config.get("model_type"))
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise SourceError(f"{path}: {reason(error)}; give the dense model by --base") from None
    if kind not in CONFIG_MAPPING:
        kind = re.split("[-_]", kind)[-1]
    if kind not in CONFIG_MAPPING:
        raise SourceError(
            f"{path}: model_type {config.get('model_type')!r} is none of transformers'; give the dense model by --base"
        )
    if config.get("quantization_config"):
        raise SourceError(f"{path}: the model is quantised; only floating-point factors are imported")
    return {key: value for key, value in config.items() if key not in ("auto_map", "architectures")} | {
        "model_type": kind
    }


def ranked_layers(model: Imported, options: ImportOptions) -> list[RankedGroup]:
    """The layers that have factors, as groups. One that not every token passes, such as the head, is multiplied out."""
    groups = {group.name: group for group in find_groups(with_zeros(empty_model(model.folder)), "separate")}
    for layer in sorted(model.layers.keys() - groups.keys()):
        logger.warning("%s: %s is no layer that is kept in factors; it is multiplied out", model.name, layer)
    return [
        RankedGroup(groups[layer], model.stored[found.b].shape[0], options.form)
        for layer, found in model.layers.items()
        if layer in groups
    ]


def say_what_is_narrowed(model: Imported, dtype: torch.dtype) -> None:
    """A line where factors of a wider type are stored in this one."""
    kinds = {model.stored[name].dtype for found in model.layers.values() for name in (found.a, found.b)}
    for kind in sorted(kinds):
        if torch.promote_types(TORCH_TYPES[kind], dtype) != dtype:
            logger.warning("%s: factors of type %s are stored as %s; see --dtype", model.name, kind, dtype)


def with_zeros(model: PreTrainedModel) -> PreTrainedModel:
    """A model without weights, with one zero for each of its tensors, which takes no memory."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(zeros_like(parameter), requires_grad=False))
        for name, tensor in module.named_buffers(recurse=False):
            setattr(module, name, zeros_like(tensor))
    return model


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


def largest_difference(folder: Path, ranked: list[RankedGroup], factors_of: Callable[[LinearGroup], Pair]) -> float:
    """Of what a stored layer and A B make of random inputs, over the size of the latter: the largest of all layers."""
    headers, worst = read_headers(folder), 0.0
    generator = torch.Generator().manual_seed(0)
    with bar("compare", len(ranked), "layer") as shown:
        for each in ranked:
            name = each.group.name
            own = {key: info.read() for key, info in headers.items() if key.rpartition(".")[0] == name}
            own.pop(f"{name}.bias", None)
            x = torch.randn(PROBES, each.group.columns, generator=generator)
            a, b = factors_of(each.group)
            expected = (x.double() @ b.T) @ a.T
            [layer] = layers_of(each, own)
            off = (layer(x).double() - expected).norm() / expected.norm().clamp(min=1e-30)
            worst = max(worst, off.item())
            shown.advance()
    return worst
