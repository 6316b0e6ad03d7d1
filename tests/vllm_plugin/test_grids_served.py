"""Checkpoints on grids in real engines, against Hugging Face's forward of the same folder.

int8 and fp8 round the activations too, a token at a time. Hugging Face's forward is given that rounding here, in plain
torch; without it the distributions are compared more loosely.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import kl_div

from fermisvd import modules
from fermisvd.files import read_headers
from fermisvd.format import validate_checkpoint
from fermisvd.hf import load_model
from tests.support.families import probed_twin
from tests.support.reference import assert_agrees, greedy
from tests.vllm_plugin.test_engine_modes import save_adapter

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
# KL(Hugging Face || vLLM), nats a token, of activations in 8 bits, in e4m3's 3 bits behind the first, in bfloat16's 7
ROUNDED = {"int8": 6e-3, "fp8": 6e-2, "int4": 3e-3, "mixed": 6e-3}
# With the same rounding. Where a value falls the other way, as sums in another order make it, the layers behind round
# another way too: what is left is a part of what rounding changes.
SAME = 0.4
FOLDERS = [("pivga", "int8"), ("svd", "int8"), ("pivga", "fp8"), ("pivga", "int4"), ("pivga", "mixed")]
BY_TWO = FOLDERS[:3]  # 192 inputs share int4's scales by 64, which two processes cannot split (test_grids.py)
BFLOAT16 = ("int4", "mixed")  # a CPU has no kernel for int4 in float32


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
            dtype="bfloat16" if weights in BFLOAT16 else "float32",
            bytes=0.32 if weights == "mixed" else None,
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


def rounding_linear(weights):
    """torch's linear, of inputs that are rounded as vLLM's kernels round them."""

    def linear(x, weight, bias=None):
        most = x.abs().amax(-1, keepdim=True).clamp(min=1e-10)
        scale = most / (127 if weights == "int8" else 448)
        rounded = (x / scale).round() if weights == "int8" else (x / scale).to(torch.float8_e4m3fn).to(x)
        return torch.nn.functional.linear(rounded * scale, weight, bias)

    return linear


def distributions(folder, prompts) -> list[torch.Tensor]:
    """Of a folder's model."""
    return of_model(load_model(folder), prompts)


def last_of_model(model, prompts) -> list[torch.Tensor]:
    """Log-probabilities behind each prompt."""
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]


def of_model(model, prompts) -> list[torch.Tensor]:
    """Log-probabilities behind each token of each prompt."""
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, :-1] for ids in prompts]
    return [each.float().log_softmax(-1) for each in logits]


@pytest.fixture(scope="module")
def expected(folders, prompts):
    """By Hugging Face, with exact activations; of each scheme but int4 also with rounded ones, under "rounded"."""
    found = {}
    for key, folder in folders.items():
        found[key] = distributions(folder, prompts)
        if key[1] not in BFLOAT16:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(modules, "functional", SimpleNamespace(linear=rounding_linear(key[1])))
                found[*key, "rounded"] = distributions(folder, prompts)
    return found


ENGINES = {
    "int8": ("pivga", "int8", {"enforce_eager": True}),
    "int8 compiled": ("pivga", "int8", {}),
    "int8 strict": ("pivga", "int8", {"enforce_eager": True, "load_format": "fermisvd"}),
    "int8 svd": ("svd", "int8", {"enforce_eager": True}),
    "int8 lora": ("pivga", "int8", {"enforce_eager": True, "enable_lora": True, "max_lora_rank": 8}),
    "int8 dummy": ("pivga", "int8", {"enforce_eager": True, "load_format": "dummy"}),
    "int4 dummy": ("pivga", "mixed", {"enforce_eager": True, "load_format": "dummy", "dtype": "bfloat16"}),
    "int8 bfloat16": ("pivga", "int8", {"enforce_eager": True, "dtype": "bfloat16"}),
    "fp8": ("pivga", "fp8", {"enforce_eager": True}),
    "int4 bfloat16": ("pivga", "int4", {"enforce_eager": True, "dtype": "bfloat16"}),
    "mixed": ("pivga", "mixed", {"enforce_eager": True, "dtype": "bfloat16"}),
    "mixed compiled": ("pivga", "mixed", {"dtype": "bfloat16"}),
    "int4 float32": ("pivga", "int4", {"enforce_eager": True}),
}


@pytest.fixture(scope="module")
def lora(folders, demo_model, prompts, tmp_path_factory):
    """An adapter's folder, and log-probabilities behind each prompt of what the int8 checkpoint stands for, with the
    adapter merged and without."""
    dense = probed_twin(demo_model, folders["pivga", "int8"])
    plain = last_of_model(dense, prompts)
    folder = save_adapter(dense, tmp_path_factory.mktemp("lora") / "adapter", alpha=1.6)
    return folder, last_of_model(dense, prompts), plain


OTHERS = ("int8 lora", "int8 dummy", "int4 dummy", "int4 float32")  # whose distributions are not the folder's


@pytest.fixture(scope="module")
def served(folders, prompts, run_engines, lora, demo_model):
    tasks = []
    for form, weights, options in ENGINES.values():
        engine = {"model": str(folders[form, weights]), "max_logprobs": -1, **options}
        tasks.append({"engine": engine, "prompts": prompts, "max_tokens": 2, "distributions": True})
    tasks[0]["reload"] = str(folders["pivga", "int8"])
    with_lora = tasks[list(ENGINES).index("int8 lora")]
    with_lora["lora"] = str(lora[0])
    del with_lora["distributions"]  # with LoRA vLLM's CPU build gives no log-probabilities of a prompt
    parent = {"model": str(demo_model), "enforce_eager": True, "disable_log_stats": False}
    draft = {"method": "draft_model", "model": str(folders["pivga", "int8"]), "num_speculative_tokens": 3}
    tasks.append({"engine": parent | {"speculative_config": draft}, "prompts": prompts, "max_tokens": 24})
    tasks[-1]["metrics"] = True
    return dict(zip([*ENGINES, "draft"], run_engines(tasks), strict=True))


@pytest.fixture(scope="module")
def served_by_two(folders, prompts, run_engines):
    """Tensor parallel."""
    tasks = []
    for key in BY_TWO:
        engine = {"model": str(folders[key]), "max_logprobs": -1, "tensor_parallel_size": 2, "enforce_eager": True}
        tasks.append({"engine": engine, "prompts": prompts, "max_tokens": 2, "distributions": True})
    stages = {"model": str(folders["pivga", "int8"]), "pipeline_parallel_size": 2, "enforce_eager": True}
    tasks.append({"engine": stages | {"max_logprobs": -1}, "prompts": prompts, "max_tokens": 2, "distributions": True})
    return dict(zip([*BY_TWO, "stages"], run_engines(tasks, VLLM_CPU_OMP_THREADS_BIND="0|1"), strict=True))


def divergence(result: dict, expected: list[torch.Tensor]) -> float:
    """KL(expected || served), mean over all tokens of all prompts."""
    assert "error" not in result, result["error"]
    ours = torch.cat([torch.tensor(each) for each in result["distributions"]])
    return kl_div(ours, torch.cat(expected), log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("name", [name for name in ENGINES if name not in OTHERS])
def test_distributions_are_hugging_faces(served, expected, name):
    form, weights, _ = ENGINES[name]
    assert divergence(served[name], expected[form, weights]) < ROUNDED[weights]


def check_rounded(result, expected, form, weights):
    """Much nearer to a forward that rounds activations in the same way than to one that does not."""
    exact, rounded = expected[form, weights], expected[form, weights, "rounded"]
    assert divergence(result, rounded) < SAME * divergence(result, exact)


@pytest.mark.parametrize("name", ["int8", "int8 compiled", "int8 strict", "int8 svd", "fp8"])
def test_activations_are_rounded_a_token_at_a_time(served, expected, name):
    check_rounded(served[name], expected, *ENGINES[name][:2])


def test_reload(served, expected):
    check_rounded(served["int8"]["reloaded"], expected, "pivga", "int8")


@pytest.mark.parametrize("key", BY_TWO, ids="-".join)
def test_two_processes(served_by_two, expected, key):
    """Each rounds its own inputs of a row-parallel layer by a scale of its own, so the rounding is another one."""
    assert divergence(served_by_two[key], expected[key]) < ROUNDED[key[1]]


def test_two_stages(served_by_two, expected):
    check_rounded(served_by_two["stages"], expected, "pivga", "int8")


def test_lora(served, lora):
    """An adapter that changes the model much more than the rounding does."""
    assert "error" not in served["int8 lora"], served["int8 lora"]["error"]
    tokens, ours = ([each[0] for each in served["int8 lora"][name]] for name in ("tokens", "logprobs"))
    merged, plain = (torch.stack(each)[range(len(tokens)), tokens] for each in lora[1:])
    off, without = ((torch.tensor(ours) - each).abs().mean().item() for each in (merged, plain))
    assert off < 0.15 and off < 0.2 * without


@pytest.mark.parametrize("name", ["int8 dummy", "int4 dummy"])
def test_dummy_weights(served, name):
    assert "error" not in served[name], served[name]["error"]
    assert all(len(tokens) == 2 for tokens in served[name]["tokens"])


def test_draft(served, demo_model, prompts):
    """A draft in int8 of its dense parent, whose own greedy tokens are served."""
    parent = load_model(demo_model)
    assert_agrees(served["draft"], [greedy(parent, ids, 24) for ids in prompts])
    drafts, accepted = (served["draft"]["metrics"][f"vllm:spec_decode_num_{x}"] for x in ("drafts", "accepted_tokens"))
    assert accepted > 2 * drafts, "a draft with 10 % removed is right more often than twice in three tokens"


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
        assert scales < (0.2 if weights in BFLOAT16 else 0.06) * numbers
        kinds = {scheme.partition("_")[0] for group in config.groups for scheme in (group.schemes or {}).values()}
        assert kinds == ({"int4", "int8"} if weights == "mixed" else {weights})
