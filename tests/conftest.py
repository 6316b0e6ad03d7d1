"""Shared models and texts. Checkpoints for engines and servers are in tests/vllm_plugin/conftest.py."""

import os
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub; read when huggingface_hub is imported

# Without a GPU Triton's kernels are interpreted, and so is its own library if the variable is set when that is first
# imported, which transformers does. The variable itself must not reach other processes.
if find_spec("triton") and not shutil.which("nvidia-smi"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.support import DEMO_MODEL, SHARED


@pytest.fixture(scope="session", autouse=True)
def _no_vllm_beside_the_converter():
    """A conversion of the tests asks no vLLM, which takes seconds to import: tests of that put it back."""
    from fermisvd_convert.stages import serving

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "installed", lambda: None)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO_MODEL


@pytest.fixture(scope="session")
def demo_text(tmp_path_factory) -> dict[str, Path]:
    """The demo model's texts as files: calibration (shuffled training modules) and validation."""
    from tests.support.stdlib_text import write_texts

    return write_texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real checkpoint of others; only where shared data lies beside the repository."""
    folder = SHARED / "checkpoints" / "stories260K"
    if not folder.is_dir():
        pytest.skip("no shared data here")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random Llama with grouped-query attention, biased q/k/v and odd widths, float32, with the demo's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=96,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        attention_bias=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smallest_llama(tmp_path_factory) -> Path:
    """Two blocks of width 16, converted in well under a second: for tests that convert again and again."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("smallest")
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family_checkpoints(tmp_path_factory, demo_text):
    """(family, form) -> (dense source, compressed checkpoint) of tests.support.families."""
    from tests.support import families

    folder = tmp_path_factory.mktemp("families")

    @cache
    def make(family: str, form: str) -> tuple[Path, Path]:
        source = folder / family
        if not source.exists():
            families.save(family, source)
        return source, families.compress(source, form, demo_text["calibration"], folder / "work" / family)

    return make
