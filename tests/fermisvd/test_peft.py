"""LoRA beside compressed layers. Reference: dense layers with the same products, plus B A from the adapter's files."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fermisvd import compress, load_model
from fermisvd.linear import linear_layer
from tests.support.families import probed_twin

peft = pytest.importorskip("peft")
WINDOWS = torch.arange(4 * 24).view(4, 24)
RANK, ALPHA = 4, 8
CASES = {  # form, groups, weights, removed, the classes that the adapters lie beside
    "pivga": ("pivga", "joint", "auto", 0.1, {"PivGaColumnsLinear", "PivGaRowsLinear"}),
    "svd": ("svd", "joint", "auto", 0.1, {"LowRankLinear"}),
    "svd, partly dense": ("svd", "separate", "auto", 0.005, {"LowRankLinear", "Linear"}),
    "pivga int8": ("pivga", "joint", "int8", 0.1, {"PivGaColumnsLinear", "PivGaRowsLinear"}),
    "svd int4, partly dense": ("svd", "separate", "int4", 0.02, {"LowRankLinear", "DenseGridLinear"}),
}


def with_lora(model, targets: str | list[str] = "all-linear"):
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=targets)
    )


def loss_of(model) -> torch.Tensor:
    return model(input_ids=WINDOWS, labels=WINDOWS).loss


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=WINDOWS).logits


def beside(model) -> dict[str, nn.Module]:
    """Name in the base model -> the layer that an adapter lies beside."""
    lora = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    return {name: m.base_layer for name, m in lora.items()}


@pytest.fixture(scope="module", params=CASES)
def trained(request, tiny_llama, tmp_path_factory):
    """A checkpoint, and an adapter that 20 steps of a plain loop gave it."""
    form, groups, weights, removed, classes = CASES[request.param]
    out = tmp_path_factory.mktemp("peft") / "out"
    options = dict(form=form, groups=groups, weights=weights, ranks="uniform", heal_steps=0, refit=False, batch_size=4)
    compress(AutoModelForCausalLM.from_pretrained(tiny_llama), WINDOWS, removed, **options).save_pretrained(out)
    torch.manual_seed(0)
    model = with_lora(load_model(out))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapter = out.with_name("adapter")
    model.save_pretrained(adapter)
    return SimpleNamespace(out=out, adapter=adapter, model=model, losses=losses, classes=classes)


def test_all_linear_is_every_linear_layer(trained, tiny_llama):
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    linear = {n for n, m in dense.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert beside(trained.model).keys() == linear
    assert {type(layer).__name__ for layer in beside(trained.model).values()} == trained.classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_has_shape_type_and_device_of_the_dense_one(trained, tiny_llama, dtype):
    """peft gives them to the adapter."""
    dense, ours = (load_model(each, dtype) for each in (tiny_llama, trained.out))
    for name in beside(trained.model):
        weights = linear_layer(dense, name).weight, linear_layer(ours, name).weight
        expected, found = ((w.shape, w.dtype, w.device) for w in weights)
        assert found == expected, name


def test_training_lowers_the_loss_and_leaves_the_factors(trained):
    plain = load_model(trained.out)
    assert trained.losses[0] == pytest.approx(loss_of(plain).item(), rel=1e-5)
    assert loss_of(trained.model).item() < 0.7 * trained.losses[0]
    names = {n.replace(".base_layer", ""): t for n, t in trained.model.get_base_model().state_dict().items()}
    assert all(torch.equal(names[n].float(), t.float()) for n, t in plain.state_dict().items())


def test_equals_the_dense_product_plus_the_adapter(trained, tiny_llama):
    """The adapter as it was saved, in peft's format; loaded again in three ways."""
    config = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, ALPHA)
    tensors = load_file(trained.adapter / "adapter_model.safetensors")
    twin = probed_twin(tiny_llama, trained.out)
    for name in beside(trained.model):
        a, b = (tensors.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        linear_layer(twin, name).weight.data += ALPHA / RANK * b @ a
    assert not tensors
    expected = logits(twin)
    transformers_own = load_model(trained.out)
    transformers_own.load_adapter(str(trained.adapter))
    for model in (
        trained.model,
        peft.PeftModel.from_pretrained(load_model(trained.out), trained.adapter),
        peft.AutoPeftModelForCausalLM.from_pretrained(trained.adapter, dtype=torch.float32),
        transformers_own,
    ):
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(load_model(trained.out)), expected, rtol=0.1, atol=0.1)


def test_gradients_are_those_through_dense_layers(trained, tiny_llama):
    gradients = []
    for base in (load_model(trained.out), probed_twin(tiny_llama, trained.out)):
        model = peft.PeftModel.from_pretrained(base, trained.adapter, is_trainable=True)
        loss_of(model).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    ours, reference = gradients
    assert ours.keys() == reference.keys() and all(".lora_" in name for name in ours)
    for name, gradient in reference.items():
        assert (ours[name] - gradient).norm() < 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("trained", ["pivga", "svd, partly dense"], indirect=True)
def test_merging_is_refused_and_unloading_works(trained):
    model = peft.PeftModel.from_pretrained(load_model(trained.out), trained.adapter)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(AttributeError, match="not merged into factors, but kept beside them: PeftModel"):
            merge()
        torch.testing.assert_close(logits(model), expected)
    model = peft.PeftModel.from_pretrained(load_model(trained.out), trained.adapter)
    assert torch.equal(logits(model.unload()), logits(load_model(trained.out)))


@pytest.mark.parametrize("trained", ["pivga"], indirect=True)
def test_the_trainer(trained, tmp_path):
    """It trains adapters, and still refuses a model without."""
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no"
    )
    rows: Any = [{"input_ids": row, "labels": row} for row in WINDOWS]
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(load_model(trained.out), arguments, train_dataset=rows)
    model = with_lora(load_model(trained.out), ["q_proj", "o_proj", "down_proj"])
    Trainer(model, arguments, train_dataset=rows).train()
    assert loss_of(model.eval()).item() < 0.8 * trained.losses[0]


@pytest.mark.parametrize("trained", ["pivga"], indirect=True)
@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_need_a_dense_weight_are_refused(trained, options):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options)
    with pytest.raises((AttributeError, TypeError), match=r"no weight to read or change|weight should be of type"):
        peft.get_peft_model(load_model(trained.out), config)


@pytest.mark.long
def test_fermisvd_does_not_import_peft():
    code = "import fermisvd, sys; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
