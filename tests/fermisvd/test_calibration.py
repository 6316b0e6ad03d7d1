from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fermisvd.calibration import (
    GramSums,
    _mirror,
    add_gram,
    calibration_grams,
    drawn_gradient,
    gram_matrices,
    grams_by_blocks,
    passes_by_blocks,
)
from fermisvd.decomposition import OutputGram, group_output_gram
from fermisvd.errors import NumericalError
from fermisvd.groups import find_groups
from fermisvd.running.blocks import DecoderBlocks, HiddenStates
from fermisvd.running.streaming import stream_model

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def test_gram_matrix_is_the_sum_over_all_tokens(model):
    """Reference: the inputs themselves, recorded and multiplied in float64."""
    name = "model.layers.1.mlp.down_proj"
    inputs = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, -2).double()))
    windows = torch.randint(2048, (6, 16))
    with torch.no_grad():
        model(input_ids=windows)
    hook.remove()
    x = torch.cat(inputs)
    assert len(x) == 6 * 16
    gram = gram_matrices(model, [name], windows.split(2))[name]
    torch.testing.assert_close(gram, x.T @ x, rtol=1e-4, atol=1e-4)
    assert gram.dtype == torch.float64


def outlying(tokens: int, channels: int) -> torch.Tensor:
    """Numbers of one sign mostly, whose sums round more, and a channel of a million times the others' energy."""
    x = torch.randn(tokens, channels, dtype=torch.float64) + 1
    x[:, channels // 3] *= 1e3
    return x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [40, 700])  # one panel, and several of which the last is narrower
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-5)]
)
def test_gram_matrix_is_exact_to_float32(device, channels, dtype, tolerance):
    """Reference: float64 of the numbers as they are; sums in bfloat16 would be off by 3e-3. An H200's tensor
    cores are off by 3.4e-6."""
    x = outlying(10_000, channels).to(dtype)
    total = torch.zeros(channels, channels, dtype=torch.float64, device=device)
    for part in x.to(device).split(6000):
        add_gram(total, part)
    expected = x.double().T @ x.double()
    scale = expected.diagonal().sqrt()
    error = (_mirror(total).cpu() - expected).abs() / (scale[:, None] * scale)
    assert error.max() < tolerance


def test_gram_products_are_never_tf32():
    x = outlying(3000, 40).float()
    total, before = torch.zeros(40, 40, dtype=torch.float64), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        add_gram(total, x)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(_mirror(total), x.double().T @ x.double(), rtol=1e-13, atol=0)


class Alone(PreTrainedModel):
    """A linear layer as a model."""

    def __init__(self, rows: int, columns: int):
        super().__init__(PretrainedConfig())
        self.layer = nn.Linear(columns, rows, bias=False)

    def get_input_embeddings(self):
        return self.layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(30, 50), (300, 50)])  # wide; tall, whose gradients are brought to the input side
def test_gradients_are_summed_to_float32(dtype, shape):
    """Reference: float64 of the same gradients and weights."""
    model = Alone(*shape).to(dtype)
    gradient, x = outlying(9000, shape[0]).to(dtype)[None], torch.randn(1, 9000, shape[1], dtype=dtype)
    sums = GramSums(model, [], ["layer"])
    with sums.watching():
        model.layer(x).backward(gradient)
    output = sums.result()[1]["layer"]
    g, w = gradient[0].double(), model.layer.weight.detach().double()
    covariance = g.T @ g
    expected = covariance if shape[0] <= shape[1] else w.T @ covariance @ w
    scale = expected.diagonal().sqrt()
    assert ((output.matrix - expected).abs() / (scale[:, None] * scale)).max() < 2e-6
    assert output.mean == pytest.approx(covariance.diagonal().mean().item(), rel=1e-12)


def test_batching_does_not_matter(model):
    windows = torch.randint(2048, (6, 16))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
    one = gram_matrices(model, names, windows.split(1))
    six = gram_matrices(model, names, windows.split(6))
    for name in names:
        torch.testing.assert_close(one[name], six[name], rtol=1e-4, atol=1e-3)


def test_hooks_are_gone_afterwards(model):
    gram_matrices(model, ["model.layers.0.self_attn.q_proj"], [torch.randint(2048, (1, 8))])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_infinite_activations_name_the_layer(model):
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("inf")
    with pytest.raises(NumericalError, match=r"layers\.1\.self_attn\.q_proj"):
        gram_matrices(model, ["model.layers.1.self_attn.q_proj"], [torch.randint(2048, (1, 8))])


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"])  # wide, tall
def test_output_gram_is_the_covariance_of_the_gradients(model, name):
    """Reference: -log p(y) differentiated by autograd for the same drawn tokens, gradients recorded in float64."""
    windows = torch.randint(2048, (4, 16))
    layer = model.get_submodule(name)
    _, found = calibration_grams(model, [], [name], windows.split(2), seed=3)
    gradients = []
    for number, batch in enumerate(windows.split(2)):
        draw, outputs = torch.Generator().manual_seed(3 * 2**20 + number), []
        hook = layer.register_forward_hook(lambda _, x, y, kept=outputs: kept.append(y))
        logits = model(input_ids=batch).logits
        hook.remove()
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, generator=draw)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), drawn[:, 0], reduction="sum")
        gradients.append(torch.autograd.grad(loss, outputs[0])[0].flatten(0, -2).double())
    g = torch.cat(gradients)
    covariance, w = g.T @ g, layer.weight.detach().double()
    expected = covariance if w.shape[0] <= w.shape[1] else w.T @ covariance @ w
    torch.testing.assert_close(found[name].matrix, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert found[name].mean == pytest.approx(covariance.diagonal().mean().item(), rel=1e-3)


def test_no_parameter_is_left_with_a_gradient(model):
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    calibration_grams(model, [], ["model.layers.0.mlp.up_proj"], [torch.randint(2048, (2, 8))])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_both_sides_in_one_pass_equal_each_alone(model):
    source, member = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    batches = torch.randint(2048, (4, 16)).split(2)
    grams, outputs = calibration_grams(model, [source], [member], batches)
    torch.testing.assert_close(grams[source], gram_matrices(model, [source], batches)[source])
    torch.testing.assert_close(
        outputs[member].matrix, calibration_grams(model, [], [member], batches)[1][member].matrix
    )


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("columns", [40, 10])  # the group is wide, or tall with one member itself tall
def test_group_of_members_has_one_output_space_each(columns, damping):
    """Each damped by its own mean, but one without gradients by a little of the group's."""
    sizes = (12, 8, 5)
    weights = [torch.randn(m, columns, dtype=torch.float64) for m in sizes]
    scales = (1.0, 10.0, 0.0)
    covariances = [s * (g := torch.randn(m, 50, dtype=torch.float64)) @ g.T for m, s in zip(sizes, scales, strict=True)]
    means = [c.diagonal().mean().item() for c in covariances]
    members = [
        OutputGram(c if len(w) <= columns else w.T @ c @ w, mean)
        for c, w, mean in zip(covariances, weights, means, strict=True)
    ]
    group, stacked = group_output_gram(members, weights, damping), torch.cat(weights)
    whole = torch.block_diag(*covariances)
    mean = whole.diagonal().mean().item()
    ridges = [torch.full((m,), damping * max(own, 1e-4 * mean)) for m, own in zip(sizes, means, strict=True)]
    damped = whole + torch.cat(ridges).double().diag()
    expected = damped if len(stacked) <= columns else stacked.T @ damped @ stacked
    torch.testing.assert_close(group.matrix, expected, rtol=1e-6, atol=1e-6)
    assert group.mean == pytest.approx(mean)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 200_000])  # bytes: all at once, one matrix at a time, a few
def test_block_by_block_is_the_pass_of_the_whole_model(model, tiny_llama, tmp_path, gradients, limit):
    groups = find_groups(model, "separate")
    sources = list(dict.fromkeys(group.source for group in groups))
    members = [group.name for group in groups] if gradients else []
    batches = torch.randint(2048, (5, 16)).split(2)
    done: list[int] = []
    hook = model.model.layers[-1].register_forward_hook(lambda *_: done.append(0))
    expected, expected_outputs = calibration_grams(model, sources, members, batches, 1, lambda: done.append(1))
    hook.remove()
    assert done == [0, 1] * len(batches)  # called when a batch has been run, not before
    streamed, hidden = stream_model(tiny_llama, "cpu"), HiddenStates(tmp_path, 4000)
    grams, outputs, calls = {}, {}, []
    blocks, on_batch = DecoderBlocks(streamed), lambda: calls.append(1)
    for part in grams_by_blocks(blocks, sources, members, batches, hidden, 1, limit, on_batch):
        assert limit != 1 or len(part[0]) + len(part[1]) == 1
        grams |= part[0]
        outputs |= part[1]
    assert grams.keys() == expected.keys() and outputs.keys() == expected_outputs.keys()
    for name, gram in grams.items():
        torch.testing.assert_close(gram, expected[name], rtol=1e-5, atol=1e-5 * expected[name].abs().max().item())
    for name, output in outputs.items():
        reference = expected_outputs[name]
        scale = reference.matrix.abs().max().item()
        torch.testing.assert_close(output.matrix, reference.matrix, rtol=1e-4, atol=1e-5 * scale)
        assert output.mean == pytest.approx(reference.mean, rel=1e-5)
    assert hidden.room == 4000 and not list(tmp_path.iterdir())
    assert len(calls) == passes_by_blocks(blocks, sources, members, batches, limit)
    runs = {None: 2, 1: len(grams) + len(outputs)}  # of the two blocks, or one a matrix
    if limit in runs:  # with gradients also through both blocks and the head on the way there, and again through one
        assert len(calls) == (runs[limit] + 4 * gradients) * len(batches)


class Watched(HiddenStates):
    """kinds: types of what was kept."""

    def __init__(self, folder: Path, room: int):
        super().__init__(folder, room)
        self.kinds: set[torch.dtype] = set()

    def put(self, place: str, batch: int, hidden: torch.Tensor) -> None:
        self.kinds.add(hidden.dtype)
        super().put(place, batch, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_deeper_model_in_its_own_type(tiny_llama, tmp_path, gradients, dtype):
    """Reference: the whole model's pass, and transformers' own states behind the last block."""
    config = AutoConfig.from_pretrained(tiny_llama, num_hidden_layers=7)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    groups = find_groups(model, "separate")
    sources, members = [g.source for g in groups], [g.name for g in groups] if gradients else []
    batches = torch.randint(2048, (5, 16)).split(2)
    expected, expected_outputs = calibration_grams(model, sources, members, batches, 1)
    behind: list[torch.Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda _, x, y: behind.append(y))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    hook.remove()
    hidden, last = Watched(tmp_path, 20_000), {}
    grams, outputs = {}, {}
    for part in grams_by_blocks(
        DecoderBlocks(model), sources, members, batches, hidden, 1, on_last=lambda n, x: last.update({n: x})
    ):
        grams |= part[0]
        outputs |= part[1]
    assert hidden.kinds == {dtype}
    for name, gram in expected.items():
        assert torch.equal(grams[name], gram)
    for name, output in expected_outputs.items():
        torch.testing.assert_close(outputs[name].matrix, output.matrix)
        assert outputs[name].mean == pytest.approx(output.mean)
    assert last.keys() == set(range(len(batches)))
    for number, states in last.items():
        assert torch.equal(states, behind[number]) and not states.requires_grad


@pytest.mark.parametrize("gradients", [False, True])
def test_missing_matrices_alone_are_gathered(model, tmp_path, gradients):
    source, member = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
    batches, members = torch.randint(2048, (4, 16)).split(2), [member] if gradients else []
    expected, outputs = calibration_grams(model, [source], members, batches)
    blocks, calls = DecoderBlocks(model), []
    hidden, on_batch = HiddenStates(tmp_path, 0), lambda: calls.append(1)
    found = list(grams_by_blocks(blocks, [source], members, batches, hidden, on_batch=on_batch))
    assert len(calls) == passes_by_blocks(blocks, [source], members, batches) == (4 if gradients else 2) * len(batches)
    found = [part for part in found if any(part)]
    assert len(found) == 1 and found[0][0].keys() == {source} and found[0][1].keys() == set(members)
    torch.testing.assert_close(found[0][0][source], expected[source], rtol=1e-5, atol=1e-3)
    for name in members:
        torch.testing.assert_close(found[0][1][name].matrix, outputs[name].matrix, rtol=1e-4, atol=1e-8)


def test_infinite_activations_on_the_way_back_name_the_block(model, tmp_path):
    """Tokens decide: the probe that finds the groups may not meet them."""
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("inf")
    blocks, member = DecoderBlocks(model), "model.layers.1.self_attn.o_proj"
    blocks.first(torch.zeros(1, 8, dtype=torch.long))
    batches = [torch.full((1, 8), 7)]
    with pytest.raises(NumericalError, match=r"output of model\.layers\.0 holds NaN"):
        list(grams_by_blocks(blocks, [], [member], batches, HiddenStates(tmp_path, 0)))
    with pytest.raises(NumericalError, match="logits hold NaN"):
        calibration_grams(model, [], [member], batches)


def test_drawn_gradient_is_softmax_less_a_drawn_token_a_few_tokens_at_a_time():
    """Through a head that doubles: the gradient at the states is twice that at the logits."""
    states, asked = torch.randn(3, 500, 11), []

    def head(ids, few):
        asked.append(ids.numel())
        return 2 * few

    found = drawn_gradient(torch.zeros(3, 500, dtype=torch.int64), states, head, seed=0, number=1) / 2
    drawn = (2 * states).softmax(-1) - found
    assert asked == [1000, 500]
    torch.testing.assert_close(drawn.sort(-1).values, torch.eye(11)[-1].expand_as(drawn), rtol=0, atol=1e-6)
    frequency = drawn.flatten(0, 1).argmax(-1).bincount(minlength=11) / 1500
    torch.testing.assert_close(frequency, (2 * states).softmax(-1).mean((0, 1)), rtol=0, atol=0.05)
