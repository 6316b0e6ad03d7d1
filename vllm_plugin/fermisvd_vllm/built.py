"""vLLM's own model of a folder, built without memory and without an engine, and every tensor given to it: what a server
does when it starts, as far as it can refuse a checkpoint.

The model is on the meta device: its weights have shapes and no values. The checkpoint's tensors are read, and the
layers' own loaders check and place them. The process stands for the first of tensor parallelism's.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import ValidationError
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform

from fermisvd.errors import FermiSVDError, FormatError, OptionError, reason
from fermisvd.files import holds_weights
from fermisvd.schemes import SCHEMES
from fermisvd_vllm.answer import Answer, kind_of
from fermisvd_vllm.config import FermiSVDConfig
from fermisvd_vllm.linear import FermiSVDLinearMethod
from fermisvd_vllm.loader import load_all


class NotServed(Exception):
    """vLLM does not serve such a model, compressed or not."""


def ask_vllm(found: Answer, folder: Path, tensor_parallel_size: int, trust_remote_code: bool) -> None:
    """Fills in the answer. Of a folder without weights, that of a conversion to be, only the layers are asked.

    Raises FermiSVDError naming group, tensor or option where vLLM, or the plugin, refuses the folder.
    """
    found.vllm = version("vllm")
    try:
        config = engine_config(folder, tensor_parallel_size, trust_remote_code)
        ours = config.quant_config
        if not isinstance(ours, FermiSVDConfig):
            raise FormatError(f"{folder / 'config.json'}: no quantization_config of FermiSVD's; convert a dense model")
        with one_process(config, tensor_parallel_size):
            if holds_weights(folder):  # what is yet to be made may be served elsewhere
                check_kernels(ours, config.model_config.dtype)
            model = build(config, ours)
            found.model = type(model).__name__
            found.compressed, found.dense = kinds_of_layers(model)
            sharded, replicated, dense = ours.numbers_held()
            found.held = {"factors": sharded + replicated, "replicated": replicated, "dense": dense}
            if holds_weights(folder):
                found.loaded = place(model, config, ours)
    except NotServed as error:
        found.failure = str(error)


def engine_config(folder: Path, tensor_parallel_size: int, trust_remote_code: bool) -> VllmConfig:
    """What a server makes of the folder before it starts a process; the plugin checks the folder in it.

    It is made for one process, since vLLM asks for as many devices as processes; the size is put in afterwards.
    Raises NotServed, or FermiSVDError naming what the plugin or the size does not fit.
    """
    try:
        config = EngineArgs(
            model=str(folder), skip_tokenizer_init=True, enforce_eager=True, trust_remote_code=trust_remote_code
        ).create_engine_config()
    except Exception as error:  # whatever vLLM says of a model
        if (own := own_error(error)) is not None:
            raise own from None
        raise NotServed(import_error(folder) or said(error)) from error
    config.parallel_config.tensor_parallel_size = tensor_parallel_size
    try:
        config.model_config.verify_with_parallel_config(config.parallel_config)
    except ValueError as error:
        raise OptionError(f"--tensor-parallel-size {tensor_parallel_size}: {reason(error)}") from None
    return config


def own_error(error: BaseException) -> FermiSVDError | None:
    """The plugin's error that vLLM or pydantic put another around."""
    if isinstance(error, FermiSVDError):
        return error
    if isinstance(error, ValidationError):
        inner = [details.get("ctx", {}).get("error") for details in error.errors()]
        return next((each for each in inner if isinstance(each, FermiSVDError)), None)
    return own_error(error.__cause__) if error.__cause__ else None


def said(error: BaseException) -> str:
    """What it says in one line, without pydantic's frame."""
    if isinstance(error, ValidationError):
        return "; ".join(reason(details["msg"]) for details in error.errors())
    return reason(error)


def import_error(folder: Path) -> str | None:
    """Why vLLM's module of the model cannot be imported, such as a package that it wants; vLLM only logs that."""
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    for name in named:
        try:
            ModelRegistry.models[name].load_model_cls()
        except ImportError as error:
            return f"{name}: {reason(error)}"
        except Exception:  # another reason, which vLLM has given, or a class that it does not know
            return None
    return None


def check_kernels(ours: FermiSVDConfig, dtype: torch.dtype) -> None:
    """Raises FormatError for a grid that vLLM has no kernel for here: each is asked for one small factor."""
    from fermisvd_vllm.grid_gemm import grid_factor  # here: vLLM's kernels take a while to import

    for scheme in (SCHEMES[name] for name in ours.checkpoint.schemes or {}):
        width = scheme.group_size or 64
        shapes = scheme.shapes("factor", 64, width)
        (numbers,) = (name for name in shapes if scheme.type_of(name) in (scheme.code, torch.int32))
        device = torch.device(current_platform.device_type)
        codes = torch.zeros(shapes[numbers], dtype=scheme.type_of(numbers), device=device)
        grid_factor(scheme, codes, torch.ones(64, 1, dtype=dtype, device=device), width)


@contextmanager
def one_process(config: VllmConfig, tensor_parallel_size: int) -> Iterator[None]:
    """Torch's and vLLM's groups of one process, which says of itself that it is the first of so many."""
    with TemporaryDirectory() as folder, set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        parallel_state.get_tp_group().world_size = tensor_parallel_size
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def build(config: VllmConfig, ours: FermiSVDConfig) -> nn.Module:
    """vLLM's model, on the meta device, whose layers have their groups.

    Raises NotServed where vLLM does not build the dense model either, FermiSVDError where it does.
    """
    try:
        model = built(config)
        ours.check_claimed()
        return model
    except FermiSVDError:
        raise
    except Exception as error:
        last = next(reversed(ours.layers), None)
        ours.serve_dense()
        try:
            built(config)
        except Exception:
            size = config.parallel_config.tensor_parallel_size
            why = import_error(Path(config.model_config.model)) or reason(error)
            raise NotServed(f"{f'--tensor-parallel-size {size}: ' * (size > 1)}{why}") from error
        raise FormatError(
            f"{last}: vLLM's {config.model_config.architecture} does not take this layer compressed: {reason(error)}; "
            "convert again without it"
        ) from error


def built(config: VllmConfig) -> nn.Module:
    config.compilation_config.static_forward_context.clear()  # of a build before
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.model_config.dtype)
    try:
        with torch.device("meta"):
            return initialize_model(config)
    finally:
        torch.set_default_dtype(before)


def place(model: nn.Module, config: VllmConfig, ours: FermiSVDConfig) -> int:
    """Gives the model every tensor of the checkpoint, as a server does; how many there were.

    Raises FormatError for a tensor that finds no place, or a parameter that none filled.
    """
    config.load_config.use_tqdm_on_load = False
    folder, given = config.model_config.model, [""]

    def noted(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            given.append(name)
            yield name, tensor

    try:
        load_all(
            model, noted(DefaultModelLoader(config.load_config).get_all_weights(config.model_config, model)), folder
        )
    except FermiSVDError:
        raise
    except Exception as error:
        raise FormatError(f"{folder}: {given[-1]}: vLLM does not take it: {reason(error)}; convert again") from error
    for method in ours.layers.values():
        method.check_filled()
    return len(given) - 1


def kinds_of_layers(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Kinds of the layers with weights in matrices, compressed and dense: name with * for numbers -> how many."""
    compressed, dense = Counter(), Counter()
    for name, module in model.named_modules():
        if getattr(module, "quant_method", None) is not None:
            ours = isinstance(module.quant_method, FermiSVDLinearMethod)
            (compressed if ours else dense)[kind_of(name)] += 1
    return dict(compressed), dict(dense)
