from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fermisvd import load_model
from fermisvd.running.blocks import (
    BlocksError,
    DecoderBlocks,
    HiddenStates,
    places_back,
    run_again,
    segments,
    states_by_blocks,
    sweep,
)
from fermisvd.running.streaming import StreamingError, stream_model
from tests.support.families import FAMILIES, save


@pytest.mark.parametrize("family", FAMILIES)
def test_model_run_by_blocks_is_the_model(family, tmp_path_factory):
    """Reference: transformers' own forward pass, logits and the hidden states behind every block; two batch shapes."""
    model = load_model(save(family, tmp_path_factory.mktemp("model")))
    batches = torch.randint(100, (5, 12)).split(2)
    blocks = DecoderBlocks(model)
    with torch.no_grad():
        for batch in batches:
            expected = []

            def see(_, x, y, kept=expected):
                kept.append(y[0] if isinstance(y, tuple) else y)

            hooks = [block.register_forward_hook(see) for block in blocks.blocks]
            logits = model(input_ids=batch, use_cache=False).logits
            for hook in hooks:
                hook.remove()
            hidden = blocks.first(batch)
            for index, reference in enumerate(expected):
                hidden = blocks.run(index, hidden)
                torch.testing.assert_close(hidden, reference)
            torch.testing.assert_close(blocks.head(batch, hidden), logits)
    assert not any("forward" in vars(block) for block in blocks.blocks)


def test_block_that_is_told_of_the_tokens_is_refused(tiny_llama):
    model = load_model(tiny_llama)
    block, body = model.model.layers[1], model.model
    told = {}
    body.register_forward_pre_hook(lambda _, args, kwargs: told.update(ids=kwargs["input_ids"]), with_kwargs=True)
    plain = block.forward

    def forward(hidden, *args, tokens=None, **kwargs):
        return plain(hidden, *args, **kwargs) + (told["ids"] if tokens is None else tokens)[..., None]

    block.forward = forward
    block.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"tokens": kwargs.get("tokens", told["ids"])}), with_kwargs=True
    )
    with pytest.raises(BlocksError, match="told more of the tokens"):
        DecoderBlocks(model).first(torch.randint(100, (2, 8)))


@pytest.mark.parametrize("room", [0, 20_000, 2**30])
@torch.no_grad()
def test_states_in_files_and_in_memory_give_the_same(tiny_llama, tmp_path, room):
    model = load_model(tiny_llama)
    batches = list(enumerate(torch.randint(100, (5, 12)).split(2)))
    blocks, hidden, done = DecoderBlocks(model), HiddenStates(tmp_path / "hidden", room), []
    found = states_by_blocks(blocks, batches, hidden, lambda: done.append(None))
    for (expected, batch), (number, states) in zip(batches, found, strict=True):
        assert number == expected and len(done) == 2 * len(batches)  # through both blocks
        logits = model(input_ids=batch, use_cache=False).logits
        torch.testing.assert_close(blocks.head(batch, states), logits)
        torch.testing.assert_close(blocks.head(batch[:1, 3:7], states[:1, 3:7]), logits[:1, 3:7])
    assert hidden.room == room and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_beyond_the_devices_room_are_in_the_hosts_memory_and_then_in_files(tmp_path):
    device, states = torch.device("cuda"), torch.randn(3, 2, 5, 8)
    hidden = HiddenStates(tmp_path, states[0].nbytes, states[0].nbytes)
    for number in range(3):
        hidden.put("last", number, states[number].to(device))
    assert [tensor.device.type for tensor in hidden._memory.values()] == ["cuda", "cpu"]
    assert len(list(tmp_path.iterdir())) == 1
    for number in range(3):
        found = hidden.get("last", number, device)
        assert found.is_cuda and torch.equal(found.cpu(), states[number])
    hidden.drop("last", list(enumerate(states)))
    assert hidden.room == hidden.device_room == states[0].nbytes and not list(tmp_path.iterdir())


@pytest.fixture
def deep(tiny_llama):
    config = AutoConfig.from_pretrained(tiny_llama, num_hidden_layers=7)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_states_before_every_block_are_there_on_the_way_back(deep, tmp_path, dtype):
    """Reference: every block run in a row; and no more places than are said are taken at once."""
    blocks, device = DecoderBlocks(deep.to(dtype)), torch.device("cpu")
    batches = list(enumerate(torch.randint(100, (4, 12)).split(2)))
    expected = {}
    for number, batch in batches:
        states = blocks.first(batch)
        for index in range(len(blocks.blocks)):
            expected[index, number] = states
            states = blocks.run(index, states)
        expected["last", number] = states
    hidden, back, most = HiddenStates(tmp_path, 0), segments(range(7)), 0
    sweep(blocks, batches, hidden, [segment.start for segment in back])
    for number, _ in batches:
        states = hidden.get("last", number, device)
        assert torch.equal(states, expected["last", number]) and states.dtype == dtype
    hidden.drop("last", batches)
    for segment in reversed(back):
        run_again(blocks, segment, batches, hidden)
        most = max(most, len(list(tmp_path.iterdir())))
        for index in reversed(segment):
            for number, _ in batches:
                assert torch.equal(hidden.get(f"before {index}", number, device), expected[index, number])
            hidden.drop(f"before {index}", batches)
    assert most == len(batches) * places_back(7) == len(batches) * 4 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 6, 7, 30, 32, 80])
def test_segments_take_the_fewest_places(blocks):
    """Reference: the least over all rows of segments, by trying every length of the last one."""

    @cache
    def least(count: int, kept: int) -> int:
        """Places at once for `count` blocks behind `kept` states that stay."""
        return min(
            max(kept + length, least(count - length, kept + 1) if count > length else 0)
            for length in range(1, count + 1)
        )

    found = segments(range(3, 3 + blocks))
    assert [index for segment in found for index in segment] == list(range(3, 3 + blocks))
    places = max(kept + len(segment) for kept, segment in enumerate(found))
    assert places == places_back(blocks) == least(blocks, 0)


def held(model: PreTrainedModel) -> list[int]:
    """Decoder blocks that have weights."""
    return [i for i, block in enumerate(DecoderBlocks(model).blocks) if not any(p.is_meta for p in block.parameters())]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_model_is_the_model(family, tmp_path_factory):
    """Logits equal to transformers' own loading, whole passes and by blocks, and no block stays in memory."""
    folder = save(family, tmp_path_factory.mktemp("model"))
    if family in ("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3"):  # transformers stacks their experts
        with pytest.raises(StreamingError, match="experts"):
            stream_model(folder, "cpu")
        return
    streamed, whole = stream_model(folder, "cpu"), load_model(folder)
    batch = torch.randint(100, (2, 12))
    with torch.no_grad():
        expected = whole(input_ids=batch, use_cache=False).logits
        assert torch.equal(streamed(input_ids=batch, use_cache=False).logits, expected)
        assert held(streamed) == []
        blocks = DecoderBlocks(streamed)
        hidden = blocks.first(batch)
        for index in range(len(blocks.blocks)):
            with blocks.present(index):
                assert held(streamed) == [index]
                hidden = blocks.run(index, hidden)
        assert held(streamed) == []
        torch.testing.assert_close(blocks.head(batch, hidden), expected)


def test_error_in_a_block_leaves_none_in_memory(tiny_llama):
    streamed = stream_model(tiny_llama, "cpu")
    hook = streamed.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        streamed(input_ids=torch.arange(4)[None])
    assert held(streamed) == []
    hook.remove()
