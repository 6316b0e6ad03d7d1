"""Is the answer about a folder what a server's start would be? vLLM's models without engines."""

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from fermisvd.format import Group, checkpoint_config
from fermisvd_convert.convert import convert
from fermisvd_convert.stages import serving
from fermisvd_vllm import check
from fermisvd_vllm.answer import Answer
from tests.support.families import FAMILIES
from tests.support.faults import FAULTS, WEIGHTS, edit_config, edit_groups, edit_tensors

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
CASES = [(family, form) for family in FAMILIES for form in ("pivga", "svd")]
ATTENTION, MLP = "model.layers.*.self_attn", "model.layers.*.mlp"


def answer(folder: Path, tensor_parallel_size: int, trust_remote_code: bool) -> Answer:
    """In a child of its own: what vLLM leaves behind in its process (groups, classes of transformers) would reach other
    tests. It is forked, so that vLLM is imported once."""
    import fermisvd_vllm.built  # noqa: F401

    one = torch.set_num_threads, (1,)  # threads do not outlive a fork
    with ProcessPoolExecutor(1, get_context("fork"), *one) as child:
        return child.submit(check.answer, folder, tensor_parallel_size, trust_remote_code).result(timeout=300)


@pytest.fixture
def llama(family_checkpoints, tmp_path):
    """form -> a copy of the tiny Llama's checkpoint that a test may spoil."""
    return lambda form: shutil.copytree(family_checkpoints("llama", form)[1], tmp_path / form)


@pytest.mark.parametrize(("family", "form"), CASES)
def test_every_family_is_served(family, form, family_checkpoints):
    found = answer(family_checkpoints(family, form)[1], 1, False)
    assert (found.refusal, found.failure) == (None, None)
    assert found.compressed and found.loaded and found.held["factors"] < found.held["dense"]


def test_convert_asks_vllm_itself(tiny_llama, demo_text, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "installed", lambda: version("vllm"))
    given: dict = dict(ranks="uniform", heal_steps=0, refit=False, samples=4, sequence_length=32, weights="int8")
    convert(str(tiny_llama), tmp_path / "out", 0.3, calibration=[str(demo_text["calibration"])], work=tmp_path, **given)
    (kept,) = tmp_path.glob("serving-*.json")
    found = json.loads(kept.read_text())
    assert (found["refusal"], found["failure"], found["loaded"]) == (None, None, None)
    assert found["model"] == "LlamaForCausalLM" and sum(found["compressed"].values()) == 8


def test_what_is_compressed_dense_and_held(llama):
    found = answer(llama("pivga"), 1, False)
    layers = [f"{ATTENTION}.qkv_proj", f"{ATTENTION}.o_proj", f"{MLP}.gate_up_proj", f"{MLP}.down_proj"]
    assert found.model == "LlamaForCausalLM" and found.compressed == dict.fromkeys(layers, 2)
    assert found.dense == {"model.embed_tokens": 1, "lm_head": 1}
    assert found.held["dense"] == 152064


def test_tensor_parallel_2_is_asked_in_one_process(llama):
    """The numbers are those that each of two real processes logs (docs/serving.md)."""
    assert answer(llama("pivga"), 2, False).held == {"factors": 62162, "replicated": 17938, "dense": 76032}


def test_a_size_that_does_not_divide_the_model_is_refused(llama):
    refusal = answer(llama("pivga"), 3, False).refusal
    assert refusal and refusal.startswith("--tensor-parallel-size 3: ") and "attention heads" in refusal


def test_a_skeleton_on_the_split_side_is_refused_for_several_processes(llama):
    folder = llama("pivga")
    name = "model.layers.0.self_attn.o_proj"
    edit_groups(folder, lambda groups: next(g for g in groups if g["members"] == [name]).update(side="columns", rank=1))
    shapes = {"skeleton": (96, 1), "interpolation": (1, 127), "permutation": (128,)}

    def change(tensors):
        for last, shape in shapes.items():
            tensors[f"{name}.{last}"] = tensors["model.norm.weight"].new_ones(shape)
        tensors[f"{name}.permutation"] = tensors["model.layers.0.mlp.gate_proj.permutation"].new_tensor(range(128))

    edit_tensors(folder, change)
    assert answer(folder, 1, False).refusal is None
    refusal = answer(folder, 2, False).refusal
    assert refusal and name in refusal and "tensor-parallel-size 1" in refusal


def test_a_group_of_two_layers_is_refused(llama):
    folder = llama("svd")
    spread_over(folder, "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj")
    refusal = answer(folder, 1, False).refusal
    assert refusal and refusal.startswith(
        "group model.layers.0.self_attn.q_proj: model.layers.0.mlp.gate_proj is no part of "
        "model.layers.0.self_attn.qkv_proj"
    )


def spread_over(folder, first, second):
    """The separate svd groups of two layers with as many inputs become one."""

    def join(groups):
        one, other = (next(g for g in groups if g["members"] == [name]) for name in (first, second))
        one["members"].append(second)
        one["rank"] = 5
        groups.remove(other)

    def change(tensors):
        for name in (first, second):
            tensors[f"{name}.lowrank_a"] = tensors[f"{name}.lowrank_a"][:, :5]
        tensors[f"{first}.lowrank_b"] = tensors[f"{first}.lowrank_b"][:5]
        del tensors[f"{second}.lowrank_b"]

    edit_groups(folder, join)
    edit_tensors(folder, change)


def bare(folder, *groups):
    """The folder of a conversion that is to be: without weights, with these groups."""
    (folder / WEIGHTS).unlink()
    entry = checkpoint_config(groups, {}).model_dump(mode="json", exclude_none=True)
    edit_config(folder, lambda config: config.update(quantization_config=entry))
    return folder


def svd(*members):
    return Group(members=members, form="svd", rank=1)


def test_a_folder_without_weights_is_asked_about_its_layers(llama):
    folder = bare(llama("svd"), svd("model.layers.1.mlp.down_proj"))
    found = answer(folder, 1, False)
    assert found.refusal is None and found.loaded is None
    assert found.compressed == {f"{MLP}.down_proj": 1} and found.dense[f"{MLP}.down_proj"] == 1


def test_a_group_of_a_layer_that_vllm_has_not_is_refused(llama):
    folder = bare(llama("svd"), svd("model.layers.9.mlp.down_proj"))
    refusal = answer(folder, 1, False).refusal
    assert refusal and "group model.layers.9.mlp.down_proj: the model that vLLM built has no layer" in refusal


def test_a_layer_that_asks_for_no_groups_is_refused(llama):
    """vLLM's head is there, but no linear layer to it."""
    refusal = answer(bare(llama("svd"), svd("lm_head")), 1, False).refusal
    assert refusal and "group lm_head: the model that vLLM built has no layer for it" in refusal


def test_a_layer_whose_weight_vllm_touches_is_refused(llama, monkeypatch):
    """As Mamba's mixers do, which put a loader of their own on `weight`: vLLM's class fails, and the dense one not."""
    from vllm.model_executor.models.llama import LlamaMLP

    init = LlamaMLP.__init__

    def touching(self, *arguments, **more):
        init(self, *arguments, **more)
        _ = self.down_proj.weight.shape

    monkeypatch.setattr(LlamaMLP, "__init__", touching)
    found = answer(llama("svd"), 1, False)
    assert found.failure is None
    assert found.refusal and found.refusal.startswith("model.layers.0.mlp.down_proj: ") and "weight" in found.refusal


def test_a_model_that_vllm_does_not_build_is_no_fault_of_its_groups(llama, monkeypatch):
    from vllm.model_executor.models.llama import LlamaMLP

    def broken(self, *_, **__):
        raise RuntimeError("out of order")

    monkeypatch.setattr(LlamaMLP, "__init__", broken)
    found = answer(llama("svd"), 1, False)
    assert (found.refusal, found.failure) == (None, "out of order")


def test_an_architecture_that_vllm_does_not_know(llama):
    folder = llama("svd")
    edit_config(folder, lambda config: config.update(model_type="unheard_of", architectures=["UnheardForCausalLM"]))
    found = answer(folder, 1, False)
    assert found.refusal is None and found.failure and "unheard_of" in found.failure and "pydantic" not in found.failure


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_refused(fault, llama):
    folder, (spoil, words) = llama("pivga"), FAULTS[fault]
    spoil(folder)
    refusal = answer(folder, 1, False).refusal
    assert refusal and all(word in refusal for word in words), refusal


def test_a_grid_without_a_kernel_here_is_no_refusal_of_what_is_yet_to_be_made(llama, monkeypatch):
    """It may be served on another machine; test_grids.py has the refusal of a layer that is loaded."""

    def none(config):
        raise ValueError("none of them")

    monkeypatch.setattr("fermisvd_vllm.grid_gemm.choose_mp_linear_kernel", none)
    schemes = {"lowrank_a": "int4_group32", "lowrank_b": "int4_group32"}
    name = "model.layers.0.mlp.down_proj"
    folder = bare(llama("svd"), Group(members=(name,), form="svd", rank=8, schemes=schemes))
    assert answer(folder, 1, False).refusal is None


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4_group32"])
def test_grids_with_kernels_are_served(scheme, llama):
    schemes = {"lowrank_a": scheme, "lowrank_b": scheme}
    name = "model.layers.0.mlp.down_proj"
    folder = bare(llama("svd"), Group(members=(name,), form="svd", rank=8, schemes=schemes))
    assert answer(folder, 1, False).refusal is None
