"""Every family in real engines, against the dense product of the factors in Hugging Face's forward.

TP 1 runs in `make test`; all of it, with tensor parallel 2 and compilation, in `make families`.
"""

from functools import cache
from importlib.util import find_spec

import pytest

from tests.support.families import FAMILIES, dense_twin
from tests.support.reference import assert_agrees, greedy

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
FORMS = ["pivga", "svd"]
CASES = [(family, form) for family in FAMILIES for form in FORMS]
PROMPTS = [list(range(start, start + length)) for start, length in ((5, 30), (700, 3), (1500, 57))]
LENGTH = 10
TENSOR_PARALLEL = {"tensor_parallel_size": 2, "enforce_eager": True}
MODES = {
    "eager": {"enforce_eager": True},
    "compiled": {},
    "tp2": TENSOR_PARALLEL,
    "tp2-compiled": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2, "enforce_eager": True},
}


@pytest.fixture(scope="module")
def expected(family_checkpoints):
    @cache
    def reference(family: str, form: str) -> list[dict]:
        model = dense_twin(*family_checkpoints(family, form))
        return [greedy(model, ids, LENGTH) for ids in PROMPTS]

    return reference


@pytest.fixture(scope="module")
def served(family_checkpoints, run_engines):
    """(mode, cases) -> {case: result}, engines of one mode in one process."""

    @cache
    def run(mode: str, cases: tuple[tuple[str, str], ...]) -> dict:
        tasks = []
        for family, form in cases:
            engine = {"model": str(family_checkpoints(family, form)[1]), **MODES[mode]}
            tasks.append(
                {"engine": engine, "prompts": PROMPTS, "max_tokens": LENGTH, "sampling": {"prompt_logprobs": 0}}
            )
        binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "p2" in mode else {}
        return dict(zip(cases, run_engines(tasks, **binding), strict=True))

    return run


@pytest.mark.parametrize(("family", "form"), CASES)
def test_tensor_parallel_1(family, form, served, expected):
    if family == "gpt_neox" and find_spec("vllm.model_executor.models.gpt_neox"):  # until 0.31
        assert "serve it with vLLM 0.32 or later" in served("eager", tuple(CASES))[family, form]["error"]
        return
    assert_agrees(served("eager", tuple(CASES))[family, form], expected(family, form))


TP_CASES = (("llama", "pivga"), ("phi3", "svd"))  # every kind of shard: fused while loading and fused on disk


@pytest.mark.parametrize(("family", "form"), TP_CASES)
def test_tensor_parallel_2(family, form, served, expected):
    assert_agrees(served("tp2", TP_CASES)[family, form], expected(family, form))


def test_pipeline_parallel_2(served, expected):
    """Half of the layers on each rank. vLLM's CPU worker needs a repair for it, which engines.py makes."""
    assert_agrees(served("pp2", (("llama", "pivga"),))["llama", "pivga"], expected("llama", "pivga"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compiled", "tp2"])
@pytest.mark.parametrize(("family", "form"), CASES)
def test_all(mode, family, form, served, expected):
    assert_agrees(served(mode, tuple(CASES))[family, form], expected(family, form))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), TP_CASES)
def test_tensor_parallel_2_compiled(family, form, served, expected):
    assert_agrees(served("tp2-compiled", TP_CASES)[family, form], expected(family, form))
