import json
from dataclasses import replace
from pathlib import Path

import pytest

from fermisvd.errors import OptionError
from fermisvd.files import TensorInfo
from fermisvd.groups import LinearGroup
from fermisvd_convert import memory
from fermisvd_convert.convert import convert
from fermisvd_convert.memory import (
    HIDDEN_BYTES,
    Sizes,
    check_memory,
    gated_bytes,
    limits,
    memory_of,
    model_sizes,
    needs,
)
from fermisvd_convert.options import ConvertOptions, parse_bytes

GIB = 2**30
LLAMA_8B = Sizes(
    blocks=26 * GIB, block=26 * GIB // 32, outside=4 * GIB, gram=8 * 14336**2, layer=GIB, factors=38 * GIB,
    activations=GIB, logits=GIB,
)  # fmt: skip


@pytest.mark.parametrize(("text", "value"), [("24GiB", 24 * GIB), ("900 MB", 9 * 10**8), ("1000", 1000)])
def test_sizes_are_read(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "3 apples"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="24GiB or 900MB"):
        parse_bytes(text)


def test_by_default_the_limits_do_not_know_the_number_of_blocks():
    deeper = replace(LLAMA_8B, blocks=10 * LLAMA_8B.blocks)
    assert limits(LLAMA_8B, None) == limits(deeper, None)


def test_hidden_states_take_half_of_what_there_is(monkeypatch):
    """Of the host's memory, or of a container's, and of what calibration leaves of a GPU's."""
    monkeypatch.setattr(memory, "memory_of", lambda device, _: {"cpu": 200 * GIB, "cuda:1": 80 * GIB}[device])
    assert limits(LLAMA_8B, None).hidden_bytes == limits(LLAMA_8B, None, "cuda:1").hidden_bytes == 100 * GIB
    assert limits(LLAMA_8B, None).device_hidden_bytes == 0
    left = 80 * GIB - needs(LLAMA_8B, ConvertOptions.named(remove=0.3))["calibration"][0]
    assert 0 < limits(LLAMA_8B, None, "cuda:1").device_hidden_bytes == left // 2
    assert limits(LLAMA_8B, 24 * GIB, "cuda:1").device_hidden_bytes == 0
    monkeypatch.setattr(memory, "memory_of", lambda device, _: GIB)
    assert limits(LLAMA_8B, None, "cuda:1").device_hidden_bytes == 0


@pytest.mark.parametrize("content", ["max\n", "1073741824\n"])
def test_a_containers_limit_is_the_memory(tmp_path, monkeypatch, content):
    whole = memory_of("cpu", None)
    monkeypatch.setattr(memory, "CONTAINER", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text(content)
    assert memory_of("cpu", None) == (GIB if content[0] == "1" else whole) and whole > GIB


def test_less_memory_gathers_fewer_matrices_but_one_at_least():
    sizes = [limits(LLAMA_8B, gib * GIB) for gib in (8, 9, 10, 100)]
    assert [s.gram_bytes for s in sizes] == sorted(s.gram_bytes for s in sizes)
    assert sizes[0].gram_bytes == LLAMA_8B.gram and sizes[-1].gram_bytes == limits(LLAMA_8B, None).gram_bytes
    assert all(s.bounded for s in sizes) and sizes[-1].hidden_bytes == max(HIDDEN_BYTES, LLAMA_8B.block)


def test_command_of_the_docs_converts_an_8b_model_in_24_gib():
    """docs/scale.md; Llama-3.1-8B's shapes: a batch of 8 windows would not do, its logits alone are 7.8 GiB."""
    hidden, wide, head, vocabulary = 4096, 14336, 1024, 128256
    shapes = {"q_proj": hidden, "k_proj": head, "v_proj": head, "o_proj": hidden, "gate_proj": wide, "up_proj": wide}
    headers, groups = {}, []
    for block in range(32):
        for name, rows in [*shapes.items(), ("down_proj", hidden)]:
            columns, full = wide if name == "down_proj" else hidden, f"model.layers.{block}.{name}"
            headers[f"{full}.weight"] = TensorInfo(Path("model.safetensors"), "", "BF16", (rows, columns))
            groups.append(LinearGroup((full,), (rows,), columns, "columns", full))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        headers[name] = TensorInfo(Path("model.safetensors"), "", "BF16", (vocabulary, hidden))
    options = ConvertOptions.named(remove=0.2, ranks="uniform", groups="joint", refit=False, heal_steps=0)
    one, eight = (model_sizes(headers, groups, vocabulary, windows, 2048) for windows in (1, 8))
    assert one.blocks == 4 * 32 * 218_103_808 and one.outside == 4 * 2 * vocabulary * hidden
    check_memory(needs(one, options), 24 * GIB)
    with pytest.raises(OptionError, match="calibration"):
        check_memory(needs(eight, options), 24 * GIB)


def test_devices_share_fermigrad():
    assert gated_bytes(LLAMA_8B) > LLAMA_8B.factors
    assert gated_bytes(LLAMA_8B, 8) < gated_bytes(LLAMA_8B, 4) < gated_bytes(LLAMA_8B) < 60 * GIB
    options = ConvertOptions.named(remove=0.3, groups="joint", refit=False, heal_steps=0)
    check_memory(needs(LLAMA_8B, options, parts=4), 24 * GIB)
    with pytest.raises(OptionError, match="FermiGrad"):
        check_memory(needs(LLAMA_8B, options), 24 * GIB)


def test_steps_that_hold_whole_models_are_refused_by_name():
    def check(gib, **changes):
        options = ConvertOptions.named(**{"remove": 0.3, "refit": False} | changes)
        check_memory(needs(LLAMA_8B, options), gib * GIB)

    check(200)
    with pytest.raises(OptionError, match=r"FermiGrad takes about 4.*--ranks uniform"):
        check(24)
    with pytest.raises(OptionError, match="--groups auto takes about"):
        check(24, ranks="uniform")
    with pytest.raises(OptionError, match=r"healing takes about .*--heal-steps 0"):
        check(24, ranks="uniform", groups="joint")
    check(24, ranks="uniform", groups="joint", heal_steps=0)
    with pytest.raises(OptionError, match=r"--refit takes about .*--no-refit"):
        check(24, ranks="uniform", groups="joint", heal_steps=0, refit=True)
    with pytest.raises(OptionError, match="calibration takes"):
        check(6, ranks="uniform", groups="joint", heal_steps=0)


def test_bounded_conversion_gives_the_same_and_too_little_is_refused_first(tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(600)))
    settings = dict(ranks="uniform", groups="joint", heal_steps=0, refit=False, calibration=[str(text)], samples=12)
    settings |= dict(sequence_length=32, batch_size=2)
    convert(str(tiny_llama), tmp_path / "a", 0.3, work=tmp_path / "work a", **settings)
    convert(str(tiny_llama), tmp_path / "b", 0.3, work=tmp_path / "work b", max_memory=8 * 2**20, **settings)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    with pytest.raises(OptionError, match="calibration takes about"):
        convert(str(tiny_llama), tmp_path / "c", 0.3, work=tmp_path / "work c", max_memory=2**20, **settings)
    assert not (tmp_path / "c").exists() and not list((tmp_path / "work c").glob("gram-*"))
    groups = json.loads((tmp_path / "b/fermisvd.json").read_text())["groups"]
    assert groups and "hidden" not in "".join(path.name for path in (tmp_path / "work b").iterdir())
