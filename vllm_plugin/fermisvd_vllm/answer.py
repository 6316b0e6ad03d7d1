"""What is found when vLLM, or the plugin's arithmetic, is asked about a folder."""

import re
from dataclasses import dataclass, field


@dataclass
class Answer:
    """vllm: its version, None where it is not installed; model: the class that was built; loaded: so many tensors found
    their place, None where the folder has none yet.

    compressed, dense: kind of layer, its name with * for numbers, -> how many; held: numbers in the compressed layers
    of one process, `factors`, of which `replicated`, and `dense`, what they would be.
    refusal: why the folder is not served; failure: why vLLM does not serve such a model, compressed or not.
    """

    vllm: str | None = None
    model: str | None = None
    loaded: int | None = None
    compressed: dict[str, int] = field(default_factory=dict)
    dense: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    refusal: str | None = None
    failure: str | None = None


def kind_of(layer: str) -> str:
    """A layer's name with * for numbers, model.layers.*.mlp.down_proj: that of its kind."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer)
