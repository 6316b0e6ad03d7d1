"""`fermisvd check`, and what `convert` asks before long work, where there is no vLLM."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fermisvd.errors import FermiSVDError
from fermisvd.fused import by_fused_layer, fused_with
from fermisvd_convert import serving
from fermisvd_convert.cli import app
from fermisvd_convert.convert import convert
from fermisvd_convert.stages import serving as stage
from fermisvd_vllm.answer import Answer
from fermisvd_vllm.unbuilt import ask_arithmetic
from tests.support.faults import FAULTS, edit_groups, edit_tensors

Q, K, GATE = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))


@pytest.fixture(scope="module")
def checkpoints(tiny_llama, tmp_path_factory):
    """form -> the tiny Llama's checkpoint; pivga joint, svd separate."""
    folder = tmp_path_factory.mktemp("checked")
    text = folder / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i}\n\n" for i in range(300)))
    for form, groups in (("pivga", "joint"), ("svd", "separate")):
        options = dict(ranks="uniform", heal_steps=0, refit=False, align=1, samples=4, sequence_length=32)
        work = folder / "work"
        convert(tiny_llama, folder / form, 0.3, form=form, groups=groups, calibration=[str(text)], work=work, **options)
    return {form: folder / form for form in ("pivga", "svd")}


@pytest.fixture
def copied(checkpoints, tmp_path):
    return lambda form: shutil.copytree(checkpoints[form], tmp_path / form)


def asked(folder, processes=1) -> Answer:
    found = Answer()
    ask_arithmetic(found, folder, processes)
    return found


def join(folder, first, second, rank=3):
    """The separate svd groups of two layers become one."""

    def groups(entries):
        one, other = (next(g for g in entries if g["members"] == [name]) for name in (first, second))
        one["members"].append(second)
        one["rank"] = rank
        entries.remove(other)

    def tensors(stored):
        for name in (first, second):
            stored[f"{name}.lowrank_a"] = stored[f"{name}.lowrank_a"][:, :rank]
        stored[f"{first}.lowrank_b"] = stored[f"{first}.lowrank_b"][:rank]
        del stored[f"{second}.lowrank_b"]

    edit_groups(folder, groups)
    edit_tensors(folder, tensors)
    return folder


@pytest.mark.parametrize("form", ["pivga", "svd"])
def test_a_whole_checkpoint(form, checkpoints):
    found = asked(checkpoints[form])
    attention, mlp = "model.layers.*.self_attn", "model.layers.*.mlp"
    kinds = [f"{attention}.q_proj + k_proj + v_proj", f"{attention}.o_proj", f"{mlp}.gate_proj + up_proj"]
    assert set(found.compressed) <= {*kinds, f"{mlp}.down_proj"} and set(found.compressed.values()) == {2}
    tensors = load_file(checkpoints[form] / "model.safetensors")
    groups = json.loads((checkpoints[form] / "config.json").read_text())["quantization_config"]["groups"]
    members = {name for group in groups for name in group["members"]}
    factors = ("lowrank_a", "lowrank_b", "skeleton", "interpolation")
    own = sum(t.numel() for name, t in tensors.items() if name.endswith(factors) and name.rpartition(".")[0] in members)
    fused = {other for name in members for other in fused_with(name)} - members
    assert found.held["factors"] == own + sum(tensors[f"{name}.weight"].numel() for name in fused)
    assert found.loaded == len(tensors)


def test_a_joint_group_inside_a_fused_layer_is_served(copied):
    assert asked(join(copied("svd"), Q, K)).compressed


def test_a_group_of_two_layers_is_refused(copied):
    with pytest.raises(FermiSVDError, match=rf"^group {Q}: {GATE} is no part of {Q} \+ {K}.*the layer vLLM fuses"):
        asked(join(copied("svd"), Q, GATE))


def test_a_joint_group_of_unknown_layers_is_left_to_vllm(copied):
    o, down = "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"
    with pytest.raises(FermiSVDError, match=rf"^group {o}: whether vLLM fuses {o} and {down} is vLLM's to say"):
        asked(join(copied("svd"), o, down))


def test_tensor_parallelism_is_left_to_vllm(checkpoints):
    with pytest.raises(FermiSVDError, match=r"^--tensor-parallel-size: .* not installed here"):
        asked(checkpoints["pivga"], 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_refused(fault, copied):
    folder, (spoil, words) = copied("pivga"), FAULTS[fault]
    spoil(folder)
    with pytest.raises(FermiSVDError) as refusal:
        asked(folder)
    assert all(word in str(refusal.value) for word in words)


def test_the_fused_layers():
    assert fused_with("a.b.k_proj") == ("a.b.q_proj", "a.b.k_proj", "a.b.v_proj")
    assert fused_with("h.0.fc1") == ("h.0.fc1",)
    mla = ["x.q_proj", "x.kv_a_proj_with_mqa"]
    assert by_fused_layer(mla) == [mla[:1], mla[1:]]
    assert by_fused_layer(["x.v_proj", "y.up_proj", "x.q_proj", "x.g_proj"]) == [
        ["x.v_proj", "x.q_proj"],
        ["y.up_proj"],
        ["x.g_proj"],
    ]


WITHOUT_VLLM = """
import sys
from importlib import util
found, util.find_spec = util.find_spec, lambda name, package=None: None if name == "vllm" else found(name, package)
sys.modules["vllm"] = None  # an import of it fails
from fermisvd_vllm.check import main
main()
"""


@pytest.fixture
def no_vllm(monkeypatch):
    """The process that is asked has none."""
    run = subprocess.run

    def without(command, **more):
        assert command[1:4] == ["-P", "-m", "fermisvd_vllm.check"]
        return run([sys.executable, "-P", "-c", WITHOUT_VLLM, *command[4:]], **more)

    monkeypatch.setattr(serving.subprocess, "run", without)


def check(folder: Path, *more: str):
    return CliRunner().invoke(app, ["check", str(folder), *more], env={"COLUMNS": "10000", "TERM": "dumb"})


def test_the_command_says_that_vllm_was_not_asked(checkpoints, no_vllm):
    done = check(checkpoints["pivga"])
    assert done.exit_code == 0, done.output
    first, compressed, held = done.stdout.splitlines()
    assert first.startswith("vLLM is not installed here and was not asked; by the plugin's arithmetic all ")
    assert compressed.startswith("compressed: 2 x model.layers.*.self_attn.q_proj + k_proj + v_proj, 2 x ")
    assert held.startswith("a process of 1 holds ")


def test_the_command_refuses_in_one_line(copied, no_vllm):
    folder = join(copied("svd"), Q, GATE)
    for done, words in ((check(folder), f"group {Q}: "), (check(folder, "--tensor-parallel-size", "2"), "installed")):
        assert done.exit_code == 1 and not done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith("fermisvd: ") and words in line


def test_a_process_that_ends_without_an_answer_is_an_error(checkpoints, monkeypatch):
    ended = subprocess.CompletedProcess([], -9, "", "loading\nKilled\n")
    monkeypatch.setattr(serving.subprocess, "run", lambda *_, **__: ended)
    done = check(checkpoints["pivga"])
    assert done.exit_code == 2 and "the process that asks vLLM ended without an answer: Killed" in done.stderr


# what convert asks


@pytest.fixture
def conversion(smallest_llama, tmp_path, monkeypatch):
    """() -> a conversion's record, vLLM being asked; what was asked about is in .seen, .says is the answer."""
    monkeypatch.setattr(stage, "installed", lambda: "1.2.3")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i}\n\n" for i in range(300)))

    def ask(folder, **_):
        run.seen.append({path.name for path in folder.iterdir()})
        run.groups = json.loads((folder / "config.json").read_text())["quantization_config"]["groups"]
        return {"vllm": "1.2.3", "refusal": None, "failure": None, **run.says}

    def run(**more):
        options = dict(ranks="uniform", heal_steps=0, refit=False, samples=4, sequence_length=32, overwrite=True)
        work = tmp_path / "work"
        return convert(smallest_llama, tmp_path / "out", 0.3, calibration=[str(text)], work=work, **options | more)

    run.seen, run.says, run.out, run.work = [], {}, tmp_path / "out", tmp_path / "work"
    monkeypatch.setattr(stage, "ask", ask)
    return run


def test_convert_asks_once_about_the_groups_without_weights(conversion):
    conversion()
    conversion(samples=5)
    (names,) = conversion.seen
    assert "config.json" in names and not any(name.endswith(".safetensors") for name in names)
    assert len(conversion.groups) == 14 and {group["rank"] for group in conversion.groups} == {1}
    conversion(form="svd")
    assert len(conversion.seen) == 2


def test_a_vllm_that_gives_no_answer_ends_no_conversion_and_is_asked_again(conversion, monkeypatch, caplog):
    asked = []

    def ends(*_, **__):
        asked.append(1)
        return subprocess.CompletedProcess([], 1, "", "ImportError: libcudart.so\n")

    monkeypatch.setattr(stage, "ask", serving.ask)
    monkeypatch.setattr(serving.subprocess, "run", ends)
    for _ in range(2):
        conversion()
    assert len(asked) == 2 and (conversion.out / "config.json").exists()
    assert "the process that asks vLLM ended without an answer: ImportError: libcudart.so" in caplog.text


def test_a_failure_is_asked_about_again(conversion):
    conversion.says = {"failure": "no module of that name"}
    for _ in range(2):
        conversion()
    assert len(conversion.seen) == 2


def test_what_vllm_refuses_ends_a_conversion_before_long_work(conversion):
    conversion.says = {"refusal": "group a: b is no part of c"}
    for _ in range(2):  # a refusal is not kept: another version of ours may serve it
        with pytest.raises(FermiSVDError, match=r"vLLM 1\.2\.3 would not serve OUT: group a: b is no part of c"):
            conversion()
    assert len(conversion.seen) == 2
    assert not conversion.out.exists() and not list(conversion.work.rglob("*.safetensors"))


def test_a_model_that_vllm_does_not_serve_is_converted_and_that_is_said(conversion, caplog):
    conversion.says = {"failure": "no such class"}
    conversion()
    assert "vLLM 1.2.3 does not serve such a model, compressed or not: no such class" in caplog.text
    assert conversion.out.exists()


def test_no_ask_vllm(conversion):
    conversion(ask_vllm=False)
    assert not conversion.seen


def test_layers_of_two_fused_layers_are_no_joint_group(tiny_llama):
    """As MLA's q_proj and kv_a_proj_with_mqa, which read one input: vLLM has them as two layers."""
    from torch import nn
    from transformers import AutoModelForCausalLM

    from fermisvd.groups import find_groups
    from fermisvd.joining import fused_layers

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.kv_a_proj_with_mqa = nn.Linear(96, 7)
        dense = attention.forward

        def forward(hidden_states, *arguments, attention=attention, dense=dense, **more):
            attention.kv_a_proj_with_mqa(hidden_states)
            return dense(hidden_states, *arguments, **more)

        attention.forward = forward
    last = [" ".join(n.rpartition(".")[2] for n in g.members) for g in find_groups(model)]
    assert last == ["kv_a_proj_with_mqa", "q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"] * 2
    separate = [[g.name.rpartition(".")[2] for g in parts] for parts in fused_layers(find_groups(model, "separate"))]
    assert separate[:2] == [["kv_a_proj_with_mqa"], ["q_proj", "k_proj", "v_proj"]]
