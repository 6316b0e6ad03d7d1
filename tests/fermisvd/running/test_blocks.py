import pytest
import torch
from transformers import PreTrainedModel

from fermisvd import load_model
from fermisvd.running.blocks import BlocksError, DecoderBlocks, HiddenStates, states_by_blocks, sweep
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


@torch.no_grad()
def test_sweep_keeps_the_states_before_every_block(tiny_llama, tmp_path):
    blocks = DecoderBlocks(load_model(tiny_llama))
    batches = list(enumerate(torch.randint(100, (4, 12)).split(2)))
    hidden = HiddenStates(tmp_path, 0)
    sweep(blocks, batches, hidden, keep=True)
    for number, batch in batches:
        states = blocks.first(batch)
        for index in range(len(blocks.blocks)):
            assert torch.equal(hidden.get(f"before {index}", number, torch.device("cpu")), states)
            states = blocks.run(index, states)
        assert torch.equal(hidden.get("last", number, torch.device("cpu")), states)


def held(model: PreTrainedModel) -> list[int]:
    """Decoder blocks that have weights."""
    return [i for i, block in enumerate(DecoderBlocks(model).blocks) if not any(p.is_meta for p in block.parameters())]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_model_is_the_model(family, tmp_path_factory):
    """Logits equal to transformers' own loading, whole passes and by blocks, and no block stays in memory."""
    folder = save(family, tmp_path_factory.mktemp("model"))
    if family == "qwen3_moe":  # transformers stacks its experts
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
