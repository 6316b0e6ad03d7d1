"""The demo model in real engines: the tokens of Hugging Face's forward, every load format and dtype, every refusal."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fermisvd.hf import load_model
from tests.support.faults import FAULTS
from tests.support.reference import assert_agrees, greedy

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
LENGTH = 24
FORMS = ["pivga", "svd"]


@pytest.fixture(scope="module")
def prompts(demo_text, demo_model):
    """64 prompts of 4 to 67 tokens of held-back modules."""
    from fermisvd_convert.loading import load_tokenizer
    from fermisvd_convert.text import windows_of

    windows = windows_of(load_tokenizer(demo_model), str(demo_text["validation"]), 128, 64)
    return [window[: 4 + i].tolist() for i, window in enumerate(windows)]


@pytest.fixture(scope="module")
def expected(compressed, prompts):
    return {form: [greedy(load_model(compressed[form]), ids, LENGTH) for ids in prompts] for form in FORMS}


@pytest.fixture(scope="module")
def served(compressed, prompts, run_engines, tmp_path_factory):
    """Name of an engine -> what it answered; all of them in one process."""
    shapes = tmp_path_factory.mktemp("dummy") / "shapes"
    shutil.copytree(compressed["pivga"], shapes, ignore=shutil.ignore_patterns("*.safetensors"))
    pivga, svd = str(compressed["pivga"]), str(compressed["svd"])
    engines = {
        "pivga eager": {"model": pivga, "enforce_eager": True},
        "svd eager": {"model": svd, "enforce_eager": True},
        "pivga compiled": {"model": pivga},
        "svd compiled": {"model": svd},
        "strict": {"model": pivga, "enforce_eager": True, "load_format": "fermisvd"},
        "dummy": {"model": str(shapes), "enforce_eager": True, "load_format": "dummy"},
        "bfloat16": {"model": pivga, "enforce_eager": True, "dtype": "bfloat16"},
        "float16": {"model": pivga, "enforce_eager": True, "dtype": "float16"},
    }
    tasks = [{"engine": engine, "prompts": prompts, "max_tokens": LENGTH} for engine in engines.values()]
    for name, task in zip(engines, tasks, strict=True):
        if name.startswith(("bfloat", "float")):
            task["sampling"] = {"prompt_logprobs": 0}
    return dict(zip(engines, run_engines(tasks), strict=True))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_equal_hugging_face(served, expected, form, mode):
    assert_agrees(served[f"{form} {mode}"], expected[form])


def test_strict_loader(served, expected):
    assert_agrees(served["strict"], expected["pivga"])


def test_dummy_weights_of_a_folder_without_weights(served):
    assert "error" not in served["dummy"], served["dummy"]["error"]
    assert all(len(tokens) == LENGTH for tokens in served["dummy"]["tokens"])


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision(served, expected, dtype, tolerance):
    """Median error of a prompt token's log-probability against float32: bfloat16 keeps 8 bits, float16 11."""
    assert "error" not in served[dtype], served[dtype]["error"]
    gaps = [
        abs(a - b)
        for ours, reference in zip(served[dtype]["prompt_logprobs"], expected["pivga"], strict=True)
        for a, b in zip(ours, reference["prompt_logprobs"], strict=True)
    ]
    assert sorted(gaps)[len(gaps) // 2] < tolerance


@pytest.fixture(scope="module")
def refusals(family_checkpoints, run_engines, tmp_path_factory):
    """Fault -> what an engine said of a checkpoint with it, with and without the strict loader."""
    folder, tasks = tmp_path_factory.mktemp("faults"), {}
    for number, (fault, (spoil, _)) in enumerate(FAULTS.items()):
        broken = shutil.copytree(family_checkpoints("llama", "pivga")[1], folder / str(number))
        spoil(broken)
        for load_format in ("auto", "fermisvd"):
            engine = {"model": str(broken), "enforce_eager": True, "load_format": load_format}
            tasks[fault, load_format] = {"engine": engine, "prompts": [[1, 2, 3]], "max_tokens": 1}
    return dict(zip(tasks, run_engines(list(tasks.values())), strict=True))


@pytest.mark.parametrize("load_format", ["auto", "fermisvd"])
@pytest.mark.parametrize("fault", FAULTS)
def test_engine_refuses(refusals, fault, load_format):
    """No engine starts; one line names file or tensor and the remedy; vLLM's config may wrap our error in its own."""
    result = refusals[fault, load_format]
    assert "error" in result, f"served {fault}"
    lines = [line for line in result["error"].splitlines() if "FormatError" in line or "Value error" in line]
    assert any(all(word in line for word in FAULTS[fault][1]) for line in lines), lines or result["error"][-2000:]


@pytest.mark.parametrize("fault", ["missing factor", "NaN in a factor"])
def test_server_refuses(family_checkpoints, vllm_environment, tmp_path, fault):
    """`vllm serve` with no flag ends by itself: before it starts its engine, and while that loads."""
    folder = shutil.copytree(family_checkpoints("llama", "pivga")[1], tmp_path / "broken")
    spoil, words = FAULTS[fault]
    spoil(folder)
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--port", "0"]
    options = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "128"]
    result = subprocess.run(command + options, capture_output=True, text=True, env=vllm_environment, timeout=300)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert all(word in output for word in words), output[-4000:]
    assert "startup complete" not in output
