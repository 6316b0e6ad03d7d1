import json
from dataclasses import replace

import pytest

from benchmarks.cost.work import sizes_of
from benchmarks.shapes import SHAPES
from fermisvd.compress import ASIDE_WINDOWS
from fermisvd.errors import OptionError
from fermisvd.refit import TRIAL_WINDOWS
from fermisvd_convert import memory
from fermisvd_convert.convert import convert
from fermisvd_convert.heal_room import heal_needs
from fermisvd_convert.memory import (
    Passes,
    calibration_bytes,
    gated_bytes,
    limits,
    memory_of,
    missing,
    needs,
    passes_that_fit,
)
from fermisvd_convert.options import ConvertOptions, parse_bytes

GIB, LENGTH = 2**30, 2048
PASSES = Passes(8, LENGTH, 1, 8)
TOKENS = 8 * LENGTH


LLAMA_8B, IN_FLOAT32 = (sizes_of(SHAPES["llama-3.1-8b"], *of) for of in ((2, "cuda"), (4, "cpu")))
LLAMA_70B = sizes_of(SHAPES["llama-3.1-70b"])


@pytest.fixture
def machine(monkeypatch):
    """Pretends so many GiB of host memory and on each GPU."""

    def pretend(host, device):
        known = {"cpu": host * GIB, "cuda": device * GIB}
        monkeypatch.setattr(memory, "memory_of", lambda where, most: most or known[where])

    return pretend


@pytest.mark.parametrize(("text", "value"), [("24GiB", 24 * GIB), ("900 MB", 9 * 10**8), ("1000", 1000)])
def test_sizes_are_read(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "3 apples"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="24GiB or 900MB"):
        parse_bytes(text)


def test_sizes_are_those_of_the_shapes():
    assert (LLAMA_8B.depth, LLAMA_8B.blocks, LLAMA_8B.outside) == (32, 32 * 218_103_808, 2 * 128256 * 4096)
    assert LLAMA_8B.dense == LLAMA_8B.blocks and LLAMA_8B.block == 218_103_808
    assert LLAMA_8B.gram == 14336**2 and LLAMA_8B.layer == 14336 * 4096
    assert LLAMA_8B.grams == 3 * 4096**2 + 14336**2 + 5 * 4096**2 + 2 * 1024**2


def test_by_default_the_limits_do_not_know_the_number_of_blocks():
    deeper = replace(LLAMA_8B, blocks=10 * LLAMA_8B.blocks, depth=320)
    assert limits(LLAMA_8B, TOKENS, None) == limits(deeper, TOKENS, None)


def test_hidden_states_take_half_of_what_there_is(machine):
    """Of the host's memory, and of what calibration leaves of a GPU's. All matrices of a block are gathered."""
    machine(host=200, device=80)
    on_cpu, on_gpu = limits(LLAMA_8B, TOKENS, None), limits(LLAMA_8B, TOKENS, None, "cuda")
    assert on_cpu.hidden_bytes == on_gpu.hidden_bytes == 100 * GIB
    assert on_cpu.device_hidden_bytes == 0 and on_gpu.gram_bytes == on_cpu.gram_bytes == 8 * LLAMA_8B.grams
    left = 80 * GIB - calibration_bytes(LLAMA_8B, TOKENS, 4 * on_gpu.gram_bytes)
    assert 0 < on_gpu.device_hidden_bytes == left // 2
    assert limits(LLAMA_8B, TOKENS, 24 * GIB, "cuda").device_hidden_bytes == 0
    machine(host=1, device=1)
    assert limits(LLAMA_8B, TOKENS, None, "cuda").device_hidden_bytes == 0


@pytest.mark.parametrize("content", ["max\n", "1073741824\n"])
def test_a_containers_limit_is_the_memory(tmp_path, monkeypatch, content):
    whole = memory_of("cpu", None)
    monkeypatch.setattr(memory, "CONTAINER", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text(content)
    assert memory_of("cpu", None) == (GIB if content[0] == "1" else whole) and whole > GIB


def test_less_memory_gathers_fewer_matrices_but_one_at_least():
    found = [limits(IN_FLOAT32, LENGTH, gib * GIB) for gib in (8, 9, 10, 100)]
    assert [each.gram_bytes for each in found] == sorted(each.gram_bytes for each in found)
    assert found[0].gram_bytes == 8 * IN_FLOAT32.gram
    assert found[-1].gram_bytes == 8 * IN_FLOAT32.grams


def test_a_block_is_run_once_where_its_matrices_fit(machine):
    for host, grams in ((24, 8 * IN_FLOAT32.grams), (9, 4 * IN_FLOAT32.block + 8 * IN_FLOAT32.gram)):
        machine(host, device=0)
        assert limits(IN_FLOAT32, LENGTH, None).gram_bytes == grams


def test_command_of_the_docs_converts_an_8b_model_in_24_gib():
    """docs/scale.md, float32 on a CPU; with less a pass takes fewer windows than the batch has."""
    small = dict(ranks="uniform", groups="joint", refit=False, heal_steps=0)
    for gib, windows in ((24, [8]), (12, [1, 2, 4])):
        options = ConvertOptions.named(remove=0.2, max_memory=gib * GIB, **small)
        passes, limit = passes_that_fit(IN_FLOAT32, options, LENGTH, "cpu", processes=1)
        assert passes.calibrated in windows and limit.bounded
    too_much = missing(needs(IN_FLOAT32, options, PASSES, limits(IN_FLOAT32, TOKENS, 12 * GIB)), 12 * GIB, None)
    assert too_much.startswith("calibration takes")


@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_an_80_gb_gpu_takes_an_8b_model_by_the_default_command(machine, form):
    machine(host=120, device=78)  # an H100 as torch counts it
    options = ConvertOptions.named(remove=0.2, form=form)
    passes, limit = passes_that_fit(LLAMA_8B, options, LENGTH, "cuda", processes=1)
    assert passes == PASSES
    required = needs(LLAMA_8B, options, passes, limit)
    assert {"calibration", "FermiGrad", "--groups auto", "healing", "writing"} < required.keys()
    assert max(each.host for each in required.values()) <= 64 * 10**9


@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_eight_of_them_take_a_70b_model_by_the_default_command(machine, form):
    """Its models are divided among them."""
    machine(host=1000, device=78)
    options = ConvertOptions.named(remove=0.2, form=form)
    passes, _ = passes_that_fit(LLAMA_70B, options, LENGTH, "cuda", processes=8)
    assert passes.parts == 8
    with pytest.raises(OptionError, match="more processes"):
        passes_that_fit(LLAMA_70B, options, LENGTH, "cuda", processes=1)


def test_devices_share_fermigrad():
    whole = gated_bytes(LLAMA_8B, PASSES)
    assert whole > 2 * LLAMA_8B.factors
    assert gated_bytes(LLAMA_8B, Passes(8, LENGTH, 8)) < gated_bytes(LLAMA_8B, Passes(8, LENGTH, 4)) < whole


def test_a_device_that_is_too_small_gets_smaller_passes(machine):
    machine(host=120, device=24)
    options = ConvertOptions.named(remove=0.2, heal_steps=0, refit=False)
    passes, _ = passes_that_fit(LLAMA_8B, options, LENGTH, "cuda", processes=1)
    assert 1 <= passes.windows < 8 and passes.parts == 1


def test_what_no_setting_makes_fit_is_refused_by_name():
    def check(gib, **changes):
        options = ConvertOptions.named(**{"remove": 0.3, "refit": False, "max_memory": int(gib * GIB)} | changes)
        passes_that_fit(IN_FLOAT32, options, LENGTH, "cpu", processes=1)

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


def test_what_is_found_again_does_not_depend_on_what_follows(machine):
    """Windows of a pass of calibration are in its key: other steps must not change them."""
    machine(host=120, device=24)
    short: dict = {"heal_steps": 0, "refit": False}
    found = [
        passes_that_fit(LLAMA_8B, ConvertOptions.named(remove=0.3, **short, **rest), LENGTH, "cuda", 1)[0]
        for rest in ({}, {"ranks": "uniform", "groups": "joint"})
    ]
    assert found[0].windows < found[1].windows and found[0].calibrated == found[1].calibrated


def test_a_gradient_that_waits_for_further_passes_is_counted():
    options = ConvertOptions.named(remove=0.2, heal_step_tokens=8 * LENGTH)
    whole, several = (
        needs(LLAMA_8B, options, Passes(windows, LENGTH, 1, 8), limits(LLAMA_8B, TOKENS, None))["healing"].device
        for windows in (8, 4)
    )
    assert several > whole - 2 * 4 * LENGTH * LLAMA_8B.row * 2 - 4 * LENGTH * LLAMA_8B.width * 64 + LLAMA_8B.dense


def test_a_cpu_without_a_bound_takes_what_a_bound_takes(monkeypatch):
    """Hidden states go to files where there is no room."""
    small: dict = dict(remove=0.2, ranks="uniform", groups="joint", refit=False, heal_steps=0)
    for gib in (12, 16, 24):
        monkeypatch.setattr(memory, "memory_of", lambda _, most, gib=gib: most or gib * GIB)
        for most in (None, gib * GIB):
            options = ConvertOptions.named(**small, max_memory=most)
            assert passes_that_fit(IN_FLOAT32, options, LENGTH, "cpu", 1)[0].windows == 8


def test_states_before_a_tried_block_are_counted():
    options = ConvertOptions.named(remove=0.2, refit=True)
    short, long = (
        needs(LLAMA_8B, options, Passes(1, length, 1, 1), limits(LLAMA_8B, TOKENS, None)) for length in (1024, 2048)
    )
    for step, windows in (("--groups auto", ASIDE_WINDOWS), ("--refit", TRIAL_WINDOWS)):
        states = windows * 1024 * LLAMA_8B.width * LLAMA_8B.item
        assert long[step].device - short[step].device >= states
    assert short["--refit"].device >= 4 * 0.8 * LLAMA_8B.dense  # factors that were refitted


def test_heal_needs_the_host_too_beside_a_gpu():
    """Models are made there first."""
    factors, passes = int(0.8 * LLAMA_8B.dense), Passes(8, LENGTH)
    alone, beside = (heal_needs(LLAMA_8B, factors, passes, 8, on_gpu) for on_gpu in (False, True))
    weights = LLAMA_8B.item * (LLAMA_8B.blocks + LLAMA_8B.outside)
    assert [alone["the dense model"].host, beside["the dense model"].host] == [0, weights]
    assert alone["the dense model"].device > weights and beside["healing"].host > alone["healing"].host
    states = beside["what the dense model makes of the text"]
    assert states.host == LLAMA_8B.item * LLAMA_8B.text * LLAMA_8B.width and "fewer --samples" in states.instead
