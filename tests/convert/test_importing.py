"""`fermisvd import`: tiny checkpoints as other methods lay them out, made here. Reference: the dense model whose
weights are the factors' products, in float32."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import qr
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from fermisvd import load_model, validate_checkpoint
from fermisvd.errors import FermiSVDError
from fermisvd_convert.cli import app
from fermisvd_convert.importing import import_checkpoint

TOKENS = torch.arange(3 * 20).view(3, 20)
RANKS = {"q_proj": 40, "k_proj": 12, "v_proj": 16, "o_proj": 41, "gate_proj": 33, "up_proj": 48, "down_proj": 37}
ENDS = {  # what stands behind a layer's name, A's and B's, by layout
    "ASVD": (".ALinear", ".BLinear"),
    "Dobi-SVD": (".BLinear", ".ALinear"),
    "LEMS": (".mod_b", ".mod_a"),
    "AA-SVD": (".U", ".V"),
    "Zero-Sum-SVD": (".u_proj", ".v_proj"),
    "nn.Sequential": (".1", ".0"),
}
SAID = {"Dobi-SVD": "ASVD"}  # a layout that another has, too


@pytest.fixture(scope="module")
def factorised(tiny_llama):
    """Layer -> A and B; the tensors of the model that have none; the logits of the products."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    factors, state = {}, model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and ".layers." in name:
            u, s, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
            rank = RANKS[name.rpartition(".")[2]]
            a, b = (u[:, :rank] * s[:rank].sqrt()).float(), (s[:rank, None].sqrt() * v[:rank]).float()
            factors[name] = a.contiguous(), b.contiguous()
            layer.weight.data = (a.double() @ b.double()).float()
            del state[f"{name}.weight"]
    with torch.no_grad():
        return factors, state, model(TOKENS).logits


def write(folder, source, tensors, **config):
    """A folder of these tensors, and the source's other files."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def named(factorised, ends, stem=lambda name: name) -> dict[str, torch.Tensor]:
    """The tensors of a layout, biases with A's layer."""
    factors, state, _ = factorised
    tensors = dict(state)
    for name, (a, b) in factors.items():
        tensors |= {f"{stem(name)}{ends[0]}.weight": a, f"{stem(name)}{ends[1]}.weight": b}
        if f"{name}.bias" in tensors:
            tensors[f"{stem(name)}{ends[0]}.bias"] = tensors.pop(f"{name}.bias")
    return tensors


def svd_llm(factorised):
    return named(factorised, ("_u_proj", "_v_proj"), lambda name: name.removesuffix("_proj"))


def check(out, factorised, layers=14):
    """Every layer is in factors, and the logits are those of the products."""
    assert len(validate_checkpoint(out).groups) == layers
    with torch.no_grad():
        logits = load_model(out)(TOKENS).logits
    assert (logits - factorised[2]).abs().max() < 1e-4 * factorised[2].abs().max()


@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_svd_llm(tiny_llama, factorised, tmp_path, form):
    source = write(tmp_path / "in", tiny_llama, svd_llm(factorised))
    found = import_checkpoint(source, tmp_path / "out", form=form)
    assert found["layouts"] == ["SVD-LLM"] and found["layers"] == 14
    assert found["difference"] < 1e-5
    check(tmp_path / "out", factorised)
    saved = sum(4 * rank**2 for rank in RANKS.values()) * 2
    permutations = 4 * 2 * (96 * 5 + 96 * 2)  # of inputs, and of the outputs of o and down
    before, after = found["bytes"].values()
    assert before - after == (0 if form == "svd" else saved - permutations)


@pytest.mark.parametrize("layout", ENDS)
def test_ends(tiny_llama, factorised, tmp_path, layout):
    tensors, config = named(factorised, ENDS[layout]), {}
    if layout == "LEMS":
        tensors = {f"wrapped_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["wrapped_model.model.layers.0.self_attn.q_proj.weight"] = torch.zeros(1)
        base = json.loads((tiny_llama / "config.json").read_text())
        config = {"model_type": "low_rank_compressed", "base_config": base, "auto_map": {"AutoConfig": "x.Y"}}
    if layout == "ASVD":
        config = {"model_type": "asvd_llama", "architectures": ["ASVDLlamaForCausalLM"], "auto_map": {"AutoModel": "x"}}
    source = write(tmp_path / "in", tiny_llama, tensors, **config)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nIts own.\n")
    (source / "modeling_x.py").write_text("raise SystemExit('code of a checkpoint was run')")
    found = import_checkpoint(source, tmp_path / "out")
    assert found["layouts"] == [SAID.get(layout, layout)]
    check(tmp_path / "out", factorised)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in written
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "# in, imported" in card and "Its own." not in card
    assert not list((tmp_path / "out").glob("*.py")) and (tmp_path / "out" / "tokenizer.json").is_file()


def test_pifa(tiny_llama, factorised, tmp_path):
    """Pivot rows and what the others are made of them by; ranks of pivots, found by a QR of their own."""
    factors, state, _ = factorised
    tensors = dict(state)
    for name, (a, b) in factors.items():
        product = a.double() @ b.double()
        *_, found = qr(product.T.numpy(), pivoting=True, mode="r")
        order = torch.from_numpy(found.copy())
        pivots, others = order[: a.shape[1]].sort().values, order[a.shape[1] :].sort().values
        tensors[f"{name}.BLinear.weight"] = product[pivots].float()
        tensors[f"{name}.ALinear.weight"] = (product[others] @ torch.linalg.pinv(product[pivots])).float()
        tensors |= {f"{name}.false_idx": pivots.long(), f"{name}.true_idx": others.long()}
    source = write(tmp_path / "in", tiny_llama, tensors)
    assert import_checkpoint(source, tmp_path / "out")["layouts"] == ["PIFA"]
    check(tmp_path / "out", factorised)
    name = "model.layers.0.self_attn.q_proj"
    for index, wrong in (("false_idx", tensors[f"{name}.false_idx"] * 0), ("true_idx", torch.arange(3))):
        source = write(tmp_path / index, tiny_llama, tensors | {f"{name}.{index}": wrong})
        with pytest.raises(FermiSVDError, match="q_proj"):
            import_checkpoint(source, tmp_path / "none")


def test_some_layers_dense_and_the_head_factorised(tiny_llama, factorised, tmp_path, caplog):
    """What stayed dense does so; a head in factors is multiplied out, and so is a layer of full rank."""
    tensors = svd_llm(factorised)
    a, b = factorised[0]["model.layers.0.self_attn.q_proj"]
    for end in ("q_u_proj.weight", "q_v_proj.weight"):
        tensors.pop(f"model.layers.0.self_attn.{end}")
    tensors["model.layers.0.self_attn.q_proj.weight"] = a @ b
    tensors["model.layers.0.self_attn.q_proj.bias"] = tensors.pop("model.layers.0.self_attn.q_u_proj.bias")
    a, b = factorised[0]["model.layers.1.mlp.up_proj"]
    wide = torch.zeros(136, 60)
    tensors["model.layers.1.mlp.up_u_proj.weight"] = torch.cat([a, wide], dim=1)
    tensors["model.layers.1.mlp.up_v_proj.weight"] = torch.cat([b, torch.randn(60, 96)])
    head = tensors.pop("lm_head.weight")
    tensors["lm_head.ALinear.weight"], tensors["lm_head.BLinear.weight"] = head, torch.eye(96)
    source = write(tmp_path / "in", tiny_llama, tensors)
    found = import_checkpoint(source, tmp_path / "out")
    assert found["layouts"] == ["ASVD", "SVD-LLM"]
    assert "lm_head is no layer that is kept in factors" in caplog.text
    check(tmp_path / "out", factorised, layers=12)


def whole_model(factorised, tiny_llama, folder, monkeypatch):
    """As SVD-LLM saves one: a pickled model of classes of its own, and a tokenizer."""
    (folder / "component_svd.py").write_text("from torch import nn\nclass SVD_Attention(nn.Module):\n    pass\n")
    monkeypatch.syspath_prepend(str(folder))
    from component_svd import SVD_Attention  # pyright: ignore[reportMissingImports]

    model = SVD_Attention()
    for name, tensor in svd_llm(factorised).items():
        module = model
        *parents, last = name.split(".")
        for part in parents:
            if not hasattr(module, part):
                module.add_module(part, SVD_Attention())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    model.model.register_buffer("cos_cached", torch.ones(7), persistent=False)
    model.model.layers.__dict__["config"] = Path("a") / "b"  # something that is no tensor
    torch.save({"model": model, "tokenizer": SVD_Attention()}, folder / "model.pt")
    (folder / "component_svd.py").unlink()
    sys.modules.pop("component_svd")
    return folder / "model.pt"


def test_a_whole_model_pickled(tiny_llama, factorised, tmp_path, monkeypatch):
    """Without its classes, which are never looked for; only where it is asked for."""
    file = whole_model(factorised, tiny_llama, tmp_path, monkeypatch)
    with pytest.raises(FermiSVDError, match=r"model\.pt: pickled weights; --allow-pickle"):
        import_checkpoint(file, tmp_path / "out", base=str(tiny_llama))
    assert not (tmp_path / "out").exists()
    found = import_checkpoint(file, tmp_path / "out", base=str(tiny_llama), allow_pickle=True)
    assert found["layouts"] == ["SVD-LLM"]
    check(tmp_path / "out", factorised)


def test_a_pickled_state_dict(tiny_llama, factorised, tmp_path):
    source = write(tmp_path / "in", tiny_llama, svd_llm(factorised))
    torch.save({"state_dict": load_file(source / "model.safetensors")}, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    import_checkpoint(source, tmp_path / "out", allow_pickle=True)
    check(tmp_path / "out", factorised)


class Evil:
    """Unpickled in the ordinary way it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CALLS = {  # what would make a file or folder
    "exec": lambda path: (exec, f"open({str(path)!r}, 'w')"),
    "partial": lambda path: (functools.partial, os.mkdir, str(path)),
    "torch.save": lambda path: (torch.save, {}, str(path)),
    "pathlib": lambda path: (Path.touch, path),
}


STAND_INS = ("exec", "torch.save")  # what torch itself does not refuse by name


@pytest.mark.parametrize("call", CALLS)
def test_nothing_of_a_pickle_is_run(tiny_llama, factorised, tmp_path, call):
    """Beside tensors, which are imported unless torch refuses the whole, and alone, which is refused."""
    evil = Evil(*CALLS[call](tmp_path / "run"))
    torch.save({"model": svd_llm(factorised), "more": evil}, tmp_path / "a.pt")
    torch.save(evil, tmp_path / "b.pt")
    if call in STAND_INS:
        import_checkpoint(tmp_path / "a.pt", tmp_path / "a", base=str(tiny_llama), allow_pickle=True)
        check(tmp_path / "a", factorised)
    else:
        with pytest.raises(FermiSVDError, match=r"a\.pt: no model"):
            import_checkpoint(tmp_path / "a.pt", tmp_path / "a", base=str(tiny_llama), allow_pickle=True)
    with pytest.raises(FermiSVDError, match=r"b\.pt: no model"):
        import_checkpoint(tmp_path / "b.pt", tmp_path / "b", base=str(tiny_llama), allow_pickle=True)
    assert not (tmp_path / "run").exists() and not (tmp_path / "b").exists()


def test_no_code_of_the_working_directory_is_run(tiny_llama, factorised, tmp_path, monkeypatch):
    source = write(tmp_path / "in", tiny_llama, svd_llm(factorised))
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    for name in ("numpy", "safetensors", "sympy"):
        (source / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    monkeypatch.chdir(source)
    import_checkpoint(".", tmp_path / "out", allow_pickle=True)
    check(tmp_path / "out", factorised)
    assert not (tmp_path / "run").exists()


def test_refused_places_and_files(tiny_llama, factorised, tmp_path):
    source = write(tmp_path / "in", tiny_llama, svd_llm(factorised))
    with pytest.raises(FermiSVDError, match="lies inside"):
        import_checkpoint(source, source / "out")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    for name in ("a.pt", "b.pt"):
        torch.save(tensors, source / name)
    with pytest.raises(FermiSVDError, match=r"b\.pt: .* in another of the folder's pickles"):
        import_checkpoint(source, tmp_path / "out", allow_pickle=True)


def test_weights_that_are_kept_transposed_are_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "in")
    with pytest.raises(FermiSVDError, match="GPT2LMHeadModel keeps its weights transposed"):
        import_checkpoint(tmp_path / "in", tmp_path / "out")


def test_narrower_factors_are_said(tiny_llama, factorised, tmp_path, caplog):
    """In bfloat16 the products are off by its rounding, which is printed."""
    source = write(tmp_path / "in", tiny_llama, svd_llm(factorised))
    found = import_checkpoint(source, tmp_path / "out", dtype="bfloat16")
    assert "factors of type F32 are stored as torch.bfloat16" in caplog.text
    assert 1e-4 < found["difference"] < 1e-2


def without(tensors, *names):
    for name in names:
        del tensors[name]
    return tensors


LAYER = "model.layers.0.self_attn"
FAULTS = {  # what is wrong with the tensors, words of the message
    "one factor alone": (lambda t: without(t, f"{LAYER}.q_u_proj.weight"), ["q_v_proj.weight", "q_u_proj.weight"]),
    "no factors": (lambda t: {"model.norm.weight": t["model.norm.weight"]}, ["no layer has factors"]),
    "another rank": (lambda t: t | {f"{LAYER}.q_u_proj.weight": torch.randn(96, 7)}, ["q_proj", "(96, 7)", "0 ways"]),
    "another width": (lambda t: t | {f"{LAYER}.k_v_proj.weight": torch.randn(12, 95)}, ["k_proj", "(12, 95)"]),
    "twice": (
        lambda t: t | {f"{LAYER}.q_proj.{end}.weight": t[f"{LAYER}.q_{end[0].lower()}_proj.weight"] for end in "UV"},
        ["q_proj", "SVD-LLM", "AA-SVD"],
    ),
    "a tensor of nothing": (lambda t: t | {f"{LAYER}.mask": torch.ones(3)}, ["self_attn.mask", "neither"]),
    "a bias of B": (lambda t: t | {f"{LAYER}.q_v_proj.bias": torch.ones(40)}, ["q_v_proj.bias", "neither"]),
    "a bias that the model has not": (
        lambda t: t | {"model.layers.0.mlp.up_u_proj.bias": torch.ones(136)},
        ["up_u_proj.bias", "neither"],
    ),
    "a norm missing": (lambda t: without(t, "model.norm.weight"), ["model.norm.weight"]),
    "a bias twice": (lambda t: t | {f"{LAYER}.q_proj.bias": torch.ones(96)}, ["q_proj.bias", "beside"]),
    "a vector for a factor": (lambda t: t | {f"{LAYER}.q_u_proj.weight": torch.ones(96)}, ["q_proj", "matrices"]),
    "integers": (
        lambda t: t | {f"{LAYER}.q_u_proj.weight": torch.ones(96, 40, dtype=torch.int8)},
        ["q_u_proj", "I8"],
    ),
    "NaN": (lambda t: t | {f"{LAYER}.q_u_proj.weight": torch.full((96, 40), float("nan"))}, ["NaN"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refused(tiny_llama, factorised, tmp_path, fault):
    """In one line, and nothing is left."""
    spoil, words = FAULTS[fault]
    source = write(tmp_path / "in", tiny_llama, spoil(svd_llm(factorised)))
    result = CliRunner().invoke(app, ["import", str(source), str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_a_bias_of_zeros_that_the_model_has_not(tiny_llama, factorised, tmp_path):
    """Bolaco saves such."""
    tensors = svd_llm(factorised) | {"model.layers.0.mlp.up_u_proj.bias": torch.zeros(136)}
    source = write(tmp_path / "in", tiny_llama, tensors)
    result = CliRunner().invoke(app, ["import", str(source), str(tmp_path / "out"), "--form", "svd"])
    assert result.exit_code == 0 and "14 layers of SVD-LLM" in result.output
    check(tmp_path / "out", factorised)


@pytest.mark.parametrize("kind", ["unheard", None])
def test_a_model_type_of_its_own(tiny_llama, factorised, tmp_path, kind):
    source = write(tmp_path / "in", tiny_llama, svd_llm(factorised), model_type=kind)
    with pytest.raises(FermiSVDError, match="give the dense model by --base"):
        import_checkpoint(source, tmp_path / "out")
    import_checkpoint(source, tmp_path / "out", base=str(tiny_llama))
    check(tmp_path / "out", factorised)
