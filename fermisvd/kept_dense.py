"""Which linear layers stay dense though every token passes them once, and why: routers, and layers whose factors vLLM
could not load or use.

Matrices that not every token passes exactly once, such as experts, are found by running the model (fermisvd.groups).
"""

from collections.abc import Iterable

from torch import nn

from fermisvd.linear import Linear, linear_layer, weight_of

# Projections beside a recurrence that vLLM splits by rows or by columns like those of any layer: the output, Mamba 2's
# and the gated delta rule's, and Qwen3.5's q/k/v and output gate, which are whole heads.
SPLIT_PLAINLY = ("out_proj", "in_proj_qkv", "in_proj_z")

ROUTER = "a router"
ABSORBED = "vLLM multiplies pieces of its weight into q and the output"
RECURRENT = "beside a recurrence, where vLLM splits or reads the weight in its own way"


def why_dense(model: nn.Module, name: str) -> str | None:
    """Why a linear layer of the decoder blocks is not compressed; None for one that may be.

    MLA's kv_b_proj: vllm/model_executor/layers/attention/mla_attention.py (`split_kv_b_proj`) cuts its weight by heads.
    A recurrence is what holds decays of its own (`A_log`). Its projections, but for those of SPLIT_PLAINLY, are laid
    out otherwise under tensor parallelism (in_proj, layers/mamba/mamba_mixer2.py, whose loader is put on `weight`
    alone) or give a number or two a head, such as decays.
    """
    parent, _, last = name.rpartition(".")
    if is_router(model, name):
        return ROUTER
    if last == "kv_b_proj":
        return ABSORBED
    if hasattr(model.get_submodule(parent), "A_log") and last not in SPLIT_PLAINLY:
        return RECURRENT
    return None


def reasons(model: nn.Module, tensors: Iterable[str]) -> dict[str, str]:
    """Of these tensors the weights of linear layers that stay dense by `why_dense`, and why."""
    weights = {name: name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    found = {
        name: why_dense(model, layer)
        for name, layer in weights.items()
        if isinstance(model.get_submodule(layer), Linear)
    }
    return {name: why for name, why in found.items() if why is not None}


def is_router(model: nn.Module, name: str) -> bool:
    """Whether a linear layer chooses among experts: its output is as wide as there are experts beside it.

    Experts are one module with 3-D weights (experts x out x in) or a list of modules. A router is small, and an error
    in it sends tokens elsewhere.
    """
    for child in model.get_submodule(name.rpartition(".")[0]).children():
        if isinstance(child, nn.Conv1d):  # channels x 1 x width: as many channels as what it is applied to
            continue
        counts = {p.shape[0] for p in child.parameters(recurse=False) if p.dim() == 3}
        if isinstance(child, nn.ModuleList):
            counts.add(len(child))
        if len(weight_of(linear_layer(model, name))) in counts:
            return True
    return False
