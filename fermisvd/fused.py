"""Which linear layers vLLM fuses into one: a group that reached out of a fused layer could not be served.

The sets are those that vLLM's models with such layers fuse (`packed_modules_mapping` in vllm/model_executor/models),
all but a few of them. What only some models fuse, as MLA's q_a_proj and kv_a_proj_with_mqa, is not here: separate
groups serve either way, a joint one only where the layers are one.
"""

from collections.abc import Iterable

FUSED = (  # last parts of names, in vLLM's order
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
)


def fused_with(name: str) -> tuple[str, ...]:
    """Names of the layers that vLLM fuses with this one, itself among them; it alone where the set is unknown."""
    parent, dot, last = name.rpartition(".")
    members = next((names for names in FUSED if last in names), (last,))
    return tuple(f"{parent}{dot}{member}" for member in members)


def by_fused_layer(names: Iterable[str]) -> list[list[str]]:
    """The names, in their order, those of one fused layer together."""
    layers: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        layers.setdefault(fused_with(name), []).append(name)
    return list(layers.values())
