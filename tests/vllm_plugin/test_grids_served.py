"""Checkpoints on grids in real engines, against Hugging Face's dequantised forward of the same folder.

int8 and fp8 round the activations too, which Hugging Face does not, so distributions are compared, not tokens.
"""

import pytest
import torch
from torch.nn.functional import kl_div

from fermisvd.files import read_headers
from fermisvd.format import validate_checkpoint
from fermisvd.hf import load_model

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
# KL(Hugging Face || vLLM), nats a token: of activations in 8 bits, in e4m3's 3 bits behind the first, in bfloat16
TOLERANCE = {"int8": 2e-3, "fp8": 3e-2, "int4": 2e-3}
FOLDERS = [("pivga", "int8"), ("svd", "int8"), ("pivga", "fp8"), ("pivga", "int4")]


@pytest.fixture(scope="module")
def folders(demo_model, demo_text, tmp_path_factory):
    """(form, weights) -> a checkpoint with odd ranks, healed for a few steps; separate groups, some of them dense."""
    from fermisvd_convert.convert import convert

    place = tmp_path_factory.mktemp("grids")
    for form, weights in FOLDERS:
        convert(
            str(demo_model),
            place / f"{form}-{weights}",
            0.1,
            form=form,
            weights=weights,
            groups="separate",
            ranks="uniform",
            heal_steps=4,
            align=1,
            dtype="bfloat16" if weights == "int4" else "float32",
            calibration=[str(demo_text["calibration"])],
            samples=32,
            sequence_length=128,
            work=place / "work",
        )
    return {(form, weights): place / f"{form}-{weights}" for form, weights in FOLDERS}


@pytest.fixture(scope="module")
def prompts(demo_text, demo_model):
    from fermisvd_convert.loading import load_tokenizer
    from fermisvd_convert.text import windows_of

    windows = windows_of(load_tokenizer(demo_model), str(demo_text["validation"]), 128, 6)
    return [window[: 24 + 7 * i].tolist() for i, window in enumerate(windows)]


@pytest.fixture(scope="module")
def expected(folders, prompts):
    """Log-probabilities behind each token of each prompt."""
    found = {}
    for key, folder in folders.items():
        model = load_model(folder)
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0, :-1] for ids in prompts]
        found[key] = [each.float().log_softmax(-1) for each in logits]
    return found


ENGINES = {
    "int8": ("pivga", "int8", {"enforce_eager": True}),
    "int8 compiled": ("pivga", "int8", {}),
    "int8 strict": ("pivga", "int8", {"enforce_eager": True, "load_format": "fermisvd"}),
    "int8 svd": ("svd", "int8", {"enforce_eager": True}),
    "int8 bfloat16": ("pivga", "int8", {"enforce_eager": True, "dtype": "bfloat16"}),
    "fp8": ("pivga", "fp8", {"enforce_eager": True}),
    "int4 bfloat16": ("pivga", "int4", {"enforce_eager": True, "dtype": "bfloat16"}),
    "int4 float32": ("pivga", "int4", {"enforce_eager": True}),
}


@pytest.fixture(scope="module")
def served(folders, prompts, run_engines):
    tasks = []
    for form, weights, options in ENGINES.values():
        engine = {"model": str(folders[form, weights]), "max_logprobs": -1, **options}
        tasks.append({"engine": engine, "prompts": prompts, "max_tokens": 2, "distributions": True})
    reload = str(folders["pivga", "int8"])
    tasks[0]["reload"] = reload
    return dict(zip(ENGINES, run_engines(tasks), strict=True))


@pytest.fixture(scope="module")
def served_by_two(folders, prompts, run_engines):
    """Tensor parallel."""
    tasks = []
    for key in (("pivga", "int8"), ("svd", "int8")):
        engine = {"model": str(folders[key]), "max_logprobs": -1, "tensor_parallel_size": 2, "enforce_eager": True}
        tasks.append({"engine": engine, "prompts": prompts, "max_tokens": 2, "distributions": True})
    return dict(zip(("pivga", "svd"), run_engines(tasks, VLLM_CPU_OMP_THREADS_BIND="0|1"), strict=True))


def divergence(result: dict, expected: list[torch.Tensor]) -> float:
    """KL(expected || served), mean over all tokens of all prompts."""
    assert "error" not in result, result["error"]
    ours = torch.cat([torch.tensor(each) for each in result["distributions"]])
    return kl_div(ours, torch.cat(expected), log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "int4 float32"])
def test_distributions_are_hugging_faces(served, expected, name):
    form, weights, _ = ENGINES[name]
    tolerance = TOLERANCE[weights] + (2e-3 if "bfloat16" in name else 0)
    assert divergence(served[name], expected[form, weights]) < tolerance


def test_reload(served, expected):
    assert divergence(served["int8"]["reloaded"], expected["pivga", "int8"]) < TOLERANCE["int8"]


@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_two_processes(served_by_two, expected, form):
    assert divergence(served_by_two[form], expected[form, "int8"]) < TOLERANCE["int8"]


def test_no_kernel_says_what_to_do(served):
    """A CPU's int4 kernel takes no float32."""
    assert "vLLM has no kernel for int4" in served["int4 float32"]["error"]
    assert "--weights int8" in served["int4 float32"]["error"]


def test_folders(folders):
    """Every group is on a grid, dense ones too; a folder of half the bytes or a quarter, and the scales."""
    for (_, weights), folder in folders.items():
        config = validate_checkpoint(folder)
        assert config.format_version == 2
        assert all(group.schemes for group in config.groups)
        stored = [info for info in read_headers(folder).values() if ".layers." in info.name and "proj" in info.name]
        numbers = sum(
            info.bytes for info in stored if info.dtype in ("I8", "F8_E4M3", "I32") and "perm" not in info.name
        )
        scales = sum(info.bytes for info in stored if info.name.endswith("_scale"))
        assert scales < (0.2 if weights == "int4" else 0.06) * numbers
