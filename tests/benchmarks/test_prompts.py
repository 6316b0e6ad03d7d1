"""Prompts, and what is asked of served tokens."""

import pytest
import torch

from benchmarks import cells, records
from benchmarks.records import new_record
from benchmarks.speed import load_test, prompts
from benchmarks.speed.parity import gaps_of
from fermisvd import compress, load_model
from tests.support import DEMO_MODEL


class Words:
    """A tokenizer of words, whose template puts one before them."""

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt and not return_dict
        return [0, *(len(word) for message in messages for word in message["content"].split())]


def test_first_prompts_that_are_short_enough_are_taken(monkeypatch):
    questions = ["a bb", "word " * prompts.LONGEST, "ccc", "dddd"]
    monkeypatch.setitem(prompts.KINDS, "made", lambda: iter(questions))
    assert prompts.prompts_of("made", Words(), 2) == [[0, 1, 2], [0, 3]]
    assert prompts.prompts_of("made", Words(), 0) == []
    with pytest.raises(SystemExit, match="made: 3 prompts of at most 160 tokens, 4 are asked for"):
        prompts.prompts_of("made", Words(), 4)


def test_gaps_are_of_tokens_that_are_not_the_likeliest():
    """Reference: the demo model's own greedy tokens, and one that was changed."""
    model, prompt, answer = load_model(DEMO_MODEL), list(range(5, 13)), []
    for _ in range(6):
        answer.append(int(model(torch.tensor([prompt + answer])).logits[0, -1].argmax()))
    changed = [*answer[:-1], (answer[-1] + 1) % model.config.vocab_size]
    right, wrong = gaps_of(DEMO_MODEL, [prompt, prompt], [answer, changed])
    assert right == [0] * 6 and wrong[:-1] == [0] * 5 and wrong[-1] > 0


@pytest.mark.parametrize(("amx", "avx512", "expected"), [(True, False, "bfloat16"), (False, True, "bfloat16")])
def test_a_cpu_with_instructions_for_bfloat16_serves_it(monkeypatch, amx, avx512, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert load_test.fast_type() == expected
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert load_test.fast_type() == "float32"


def test_numbers_that_a_token_is_multiplied_by(tmp_path):
    """Reference: those of the model's parameters, of a dense one and of a compressed one."""
    small = compress(load_model(DEMO_MODEL), torch.arange(512).view(4, 128), 0.3, ranks="uniform", heal_steps=0)
    small.save_pretrained(tmp_path)
    for model, folder in (load_model(DEMO_MODEL), DEMO_MODEL), (small, tmp_path):
        blocks = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.dim() == 2)
        head = next(model.get_input_embeddings().parameters()).numel()
        assert load_test.numbers_of(folder) == {"layers": blocks, "head": head}


def test_a_record_of_another_protocol_is_refused_and_cells_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    fresh = new_record("a command", {"samples": 1}) | {"cells": {}}
    cells.begin("made", fresh)
    for key in ("one", "two"):
        cells.put("made", fresh, key, {"figure": 1})
    cells.begin("made", fresh, ["one"])
    assert list((cells.kept("made") or {})["cells"]) == ["two"]
    with pytest.raises(SystemExit, match=r"made\.json is of another protocol"):
        cells.begin("made", fresh | {"protocol": {"samples": 2}})
