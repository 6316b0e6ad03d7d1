import json
import shutil
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from fermisvd.decomposition import DAMPING, OUTPUT_DAMPING, OutputGram, kfac_svd
from fermisvd.errors import FermiSVDError, OptionError, OutputError
from fermisvd.format import validate_checkpoint
from fermisvd.groups import find_groups
from fermisvd.hf import load_model
from fermisvd.teacher import teach
from fermisvd_convert import workspace, writer
from fermisvd_convert.convert import convert
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.inspect import inspect_checkpoint
from fermisvd_convert.loading import SourceError
from fermisvd_convert.output import place_of
from fermisvd_convert.source import open_source
from fermisvd_convert.stages import healing
from fermisvd_convert.stages.calibration import Statistics
from fermisvd_convert.stages.decomposition import KeptDecomposition
from fermisvd_convert.workspace import Stage, Workspace
from tests.support.artefacts import made


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(600)))
    return str(path)


@pytest.fixture
def settings(text, tmp_path):
    return dict(
        calibration=[text],
        samples=12,
        sequence_length=32,
        steps=6,
        heal_steps=2,
        batch_size=4,
        align=1,
        work=tmp_path / "work",
    )


@pytest.mark.parametrize("form", ["svd", "pivga"])
@pytest.mark.parametrize("groups", ["joint", "separate", "auto"])
@pytest.mark.parametrize("ranks", ["uniform", "fermigrad"])
def test_every_way_writes_a_valid_checkpoint_on_the_budget(tiny_llama, tmp_path, settings, form, groups, ranks):
    out = tmp_path / "out"
    record = convert(str(tiny_llama), out, 0.3, form=form, groups=groups, ranks=ranks, **settings)
    config = validate_checkpoint(out)
    assert {g.form for g in config.groups} == {form}
    source, small = load_file(tiny_llama / "model.safetensors"), load_file(out / "model.safetensors")
    compressible = {n for n in source if n.startswith("model.layers.") and n.endswith("_proj.weight")}
    before = sum(source[n].numel() for n in compressible)
    others = source.keys() - compressible
    assert all(torch.equal(source[n], small[n]) for n in others)
    after = sum(t.numel() for n, t in small.items() if n not in others and not n.endswith("permutation"))
    assert record.totals.parameters_before == before
    assert record.totals.parameters_after == after
    assert after <= 0.7 * before < after + 400  # one step of one group is at most m + n <= 368 numbers
    assert json.loads((out / "fermisvd.json").read_text())["totals"] == record.totals.model_dump()
    summary = inspect_checkpoint(out)
    assert sum(row.parameters_after for row in summary.groups) <= after


def test_more_removed_is_worse_and_little_removed_is_close(tiny_llama, tmp_path, settings):
    windows, kl = torch.randint(2048, (16, 32)), []
    taught = teach(load_model(tiny_llama), windows, 8)
    settings |= {"heal_steps": 0, "refit": False}
    for remove in (0.02, 0.6):
        convert(str(tiny_llama), tmp_path / f"out{remove}", remove, ranks="uniform", **settings)
        kl.append(evaluate(load_model(tmp_path / f"out{remove}"), windows, taught).kl)
    assert 0 < kl[0] < 0.2 * kl[1]  # on random tokens, which the calibration text has few of


def test_second_removal_reuses_calibration_and_decomposition(tiny_llama, tmp_path, settings):
    settings["groups"] = "separate"  # joining decomposes for the ranks that it is given
    convert(str(tiny_llama), tmp_path / "a", 0.2, ranks="fermigrad", **settings)
    first = made(tmp_path / "work")
    assert first.keys() == {"structure", "gram", "outputs", "dense", "factors", "teacher", "ranks", "healed"}
    convert(str(tiny_llama), tmp_path / "b", 0.4, ranks="fermigrad", **settings)
    second = made(tmp_path / "work")
    assert (second - first).keys() == {"ranks", "healed"}
    convert(str(tiny_llama), tmp_path / "c", 0.4, ranks="fermigrad", **settings)
    assert made(tmp_path / "work") == second
    convert(str(tiny_llama), tmp_path / "d", 0.4, ranks="fermigrad", **settings | {"align": 4})
    assert (made(tmp_path / "work") - second).keys() == {"healed"}  # real ranks know nothing of alignment
    same = ("model.safetensors", "config.json")
    assert all((tmp_path / "b" / n).read_bytes() == (tmp_path / "c" / n).read_bytes() for n in same)


@pytest.mark.parametrize("change", ["samples", "sequence_length", "text", "model"])
def test_changed_inputs_are_calibrated_again(tiny_llama, tmp_path, settings, change):
    first = convert(str(tiny_llama), tmp_path / "a", 0.2, ranks="uniform", **settings)
    assert first.seconds["calibrate"] > 0
    stages_before = set((tmp_path / "work").glob("gram-*"))
    model = tiny_llama
    if change == "samples":
        settings["samples"] = 10
    elif change == "sequence_length":
        settings["sequence_length"] = 24
    elif change == "text":
        other = tmp_path / "other.txt"
        other.write_text("while True:\n    break\n" * 2000)
        settings["calibration"] = [str(other)]
    else:
        model = shutil.copytree(tiny_llama, tmp_path / "model")
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"] *= 2
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    convert(str(model), tmp_path / "b", 0.2, ranks="uniform", **settings)
    assert set((tmp_path / "work").glob("gram-*")) > stages_before


@pytest.mark.parametrize("groups", ["auto", "joint"])
def test_ranks_of_an_earlier_conversion(tiny_llama, tmp_path, settings, groups):
    settings["groups"] = groups
    first = convert(str(tiny_llama), tmp_path / "a", 0.3, ranks="fermigrad", **settings)
    again = convert(str(tiny_llama), tmp_path / "b", 0.3, ranks=str(tmp_path / "a" / "fermisvd.json"), **settings)
    assert [(row.members, row.rank) for row in again.groups] == [(row.members, row.rank) for row in first.groups]
    tensors = [load_file(tmp_path / out / "model.safetensors") for out in "ab"]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_second_run_after_joining_and_refitting_is_the_same(tiny_llama, tmp_path, settings):
    settings["refit"] = True
    convert(str(tiny_llama), tmp_path / "a", 0.4, **settings)
    first = made(tmp_path / "work")
    assert {"gram", "outputs", "factors", "ranks", "groups", "refit", "healed"} < first.keys()
    convert(str(tiny_llama), tmp_path / "b", 0.4, **settings)
    assert made(tmp_path / "work") == first
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_an_interrupted_healing_goes_on(tiny_llama, tmp_path, settings, monkeypatch):
    """To the output of an undisturbed conversion, and without the steps that were done."""
    settings |= dict(ranks="uniform", groups="joint", heal_steps=5, heal_learning_rate=1.2)
    convert(str(tiny_llama), tmp_path / "expected", 0.3, **settings | {"work": tmp_path / "other"})
    monkeypatch.setattr(workspace, "STATE_SECONDS", 0)
    monkeypatch.setattr(workspace, "STATE_PAUSE", 0)
    steps, heal = [], healing.heal

    def interrupted(*given, on_step, on_progress, **named):
        def kept(state):
            on_progress(state)
            if len(steps) == 3:
                raise KeyboardInterrupt

        return heal(*given, on_step=lambda record: steps.append(record["step"]), on_progress=kept, **named)

    monkeypatch.setattr(healing, "heal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(tiny_llama), tmp_path / "out", 0.3, **settings)
    convert(str(tiny_llama), tmp_path / "out", 0.3, **settings)
    assert steps == [0, 1, 2, 3, 4]
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected"))
    assert found == expected
    assert not list(settings["work"].glob("*.progress*"))


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_lost_tensors_of_a_stage_are_made_again(tiny_llama, tmp_path, settings, damage):
    """Its JSON is there, its tensors are not."""
    settings["refit"] = True
    convert(str(tiny_llama), tmp_path / "a", 0.5, **settings)
    lost = [path for stage in ("healed-*", "refit-*") for path in (tmp_path / "work").glob(f"{stage}/*")]
    assert lost
    for path in lost:
        path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:50])
    convert(str(tiny_llama), tmp_path / "b", 0.5, **settings)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_minimum_rank_is_held(tiny_llama, tmp_path, settings):
    record = convert(str(tiny_llama), tmp_path / "out", 0.5, minimum_rank=9, **settings)
    assert min(row.rank for row in record.groups) >= 9


def test_refit_of_a_tall_group_is_the_kfac_svd_of_the_changed_weight(tiny_llama, tmp_path, settings):
    """Reference: kfac_svd of W M with its own W^T G W, from G on the output side, damped by each member's mean."""
    convert(str(tiny_llama), tmp_path / "a", 0.3, ranks="uniform", **settings)
    workspace, source = Workspace(tmp_path / "work"), open_source(str(tiny_llama))
    gram, outputs, factors = (
        Stage(workspace, next((tmp_path / "work").glob(f"{kind}-*")).name) for kind in ("gram", "outputs", "factors")
    )
    decomposition = KeptDecomposition(factors, source, Statistics(gram, outputs), "cpu")
    group = next(g for g in find_groups(source.load("cpu", torch.float32), "joint") if "q_proj" in g.name)
    assert group.rows > group.columns
    change = torch.eye(group.columns, dtype=torch.float64) + 0.1 * torch.randn(96, 96, dtype=torch.float64)
    inputs = decomposition.gram(group.source)
    found = decomposition.fit(group, change, inputs)
    members = [decomposition.statistics.output(name, torch.device("cpu")) for name in group.members]
    damped = [each.matrix + OUTPUT_DAMPING * each.mean * torch.eye(len(each.matrix)) for each in members]
    covariance = torch.block_diag(*damped)
    weight = decomposition.weights(group).double() @ change
    output = OutputGram(weight.T @ covariance @ weight, covariance.diagonal().mean().item())
    expected = kfac_svd(weight, inputs, output, DAMPING, output_damping=0.0)
    torch.testing.assert_close(found.sigma, expected.sigma)
    for rank in (4, 20):
        (a, b), (c, d) = found.truncated(rank), expected.truncated(rank)
        torch.testing.assert_close(a @ b, c @ d)


def test_dense_groups_of_the_svd_form_are_measured_and_the_trace_names_its_groups(tiny_llama, tmp_path, settings):
    options = {**settings, "heal_steps": 0, "refit": False, "groups": "separate", "form": "svd"}
    record = convert(str(tiny_llama), tmp_path / "out", 0.2, **options)
    tried = {choice["group"] for choice in record.choices["dense"]}
    assert tried == set(record.trace.groups) == {row.members[0] for row in record.groups}
    assert all(len(step.share) == len(tried) for step in record.trace.steps)
    assert [step.step for step in record.trace.steps] == list(range(6))
    again = convert(str(tiny_llama), tmp_path / "again", 0.2, **options)
    assert again.choices == record.choices and again.groups == record.groups


def test_choices_are_recorded(tiny_llama, tmp_path, settings):
    record = convert(str(tiny_llama), tmp_path / "out", 0.5, refit=True, **settings)
    joined, refitted = record.choices["groups"], record.choices["refit"]
    assert {choice["layer"].rpartition(".")[2] for choice in joined} == {"q_proj", "gate_proj"}
    assert all(choice["joined_kl"] <= choice["kl"] for choice in joined)
    for earlier, later in pairwise(refitted):
        assert later["kl"] == min(earlier["kl"], earlier["refitted_kl"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a file of ranks"),
        ('{"x": 3}', "x is no group"),
        ('{"model.layers.0.self_attn.q_proj": 3}', "has no rank"),
    ],
)
def test_bad_rank_files_are_named(tiny_llama, tmp_path, settings, content, message):
    path = tmp_path / "ranks.json"
    path.write_text(content)
    with pytest.raises(FermiSVDError, match=rf"ranks\.json.*{message}"):
        convert(str(tiny_llama), tmp_path / "out", 0.3, ranks=str(path), **settings)


def test_shards_and_index(tiny_llama, tmp_path, settings, monkeypatch):
    whole = convert(str(tiny_llama), tmp_path / "whole", 0.3, ranks="uniform", **settings)
    monkeypatch.setattr(writer, "SHARD_BYTES", 200_000)
    convert(str(tiny_llama), tmp_path / "out", 0.3, ranks="uniform", **settings)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    reference = load_file(tmp_path / "whole" / "model.safetensors")
    together = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert together.keys() == reference.keys()
    assert all(torch.equal(together[n], reference[n]) for n in reference)
    assert inspect_checkpoint(tmp_path / "out").totals.parameters_after == whole.totals.parameters_after


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_storage_type(tiny_llama, tmp_path, settings, dtype):
    convert(str(tiny_llama), tmp_path / "out", 0.3, ranks="uniform", dtype=dtype, **settings)
    types = {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert types == {getattr(torch, dtype), torch.int32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_every_other_file_comes_along(tiny_llama, tmp_path, settings):
    source = shutil.copytree(tiny_llama, tmp_path / "model")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    convert(str(source), tmp_path / "out", 0.3, ranks="uniform", **settings)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "tokenizer.json", "generation_config.json", "README.md", "fermisvd.json"} <= names
    assert "pytorch_model.bin" not in names


def test_failure_leaves_no_output(tiny_llama, tmp_path, settings):
    """The checkpoint is written; healing's result cannot be kept, as a folder lies in its place."""
    convert(str(tiny_llama), tmp_path / "first", 0.3, ranks="uniform", **settings)
    (healed,) = (tmp_path / "work").glob("healed-*.json")
    healed.unlink()
    healed.mkdir()
    with pytest.raises(OutputError, match=r"healed-.*a folder where an artefact goes"):
        convert(str(tiny_llama), tmp_path / "out", 0.3, ranks="uniform", **settings)
    assert {p.name for p in tmp_path.iterdir()} == {"work", "first", ".fermisvd"}
    assert not place_of(tmp_path / "out").new.exists()


def test_out_is_not_overwritten_unless_asked(tiny_llama, tmp_path, settings):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    for overwrite in (False, True):  # what is not ours is never replaced
        with pytest.raises(OutputError, match="--overwrite"):
            convert(str(tiny_llama), out, 0.3, ranks="uniform", overwrite=overwrite, **settings)
        assert (out / "mine").read_text() == "keep"
    shutil.rmtree(out)
    for remove in (0.3, 0.4):
        convert(str(tiny_llama), out, remove, ranks="uniform", overwrite=True, **settings)
    assert json.loads((out / "fermisvd.json").read_text())["settings"]["remove"] == 0.4
    assert {p.name for p in tmp_path.iterdir()} == {"work", "out", ".fermisvd"}


def test_overwrite_spares_the_source_and_the_work_directory(tiny_llama, tmp_path, settings):
    model = shutil.copytree(tiny_llama, tmp_path / "out" / "model")
    with pytest.raises(OutputError, match="MODEL inside it"):
        convert(str(model), tmp_path / "out", 0.3, overwrite=True, **settings)
    with pytest.raises(OutputError, match="work directory lies inside OUT"):
        convert(str(tiny_llama), tmp_path / "o", 0.3, **{**settings, "work": tmp_path / "o" / "work"})
    assert (model / "model.safetensors").exists()


def test_fewer_windows_than_asked_for_is_said(tiny_llama, tmp_path, settings, caplog):
    convert(str(tiny_llama), tmp_path / "out", 0.3, ranks="uniform", **{**settings, "samples": 100_000})
    assert "more were asked for" in caplog.text


def test_weight_named_unlike_its_module_is_refused_early(tiny_llama):
    source = open_source(str(tiny_llama))
    groups = find_groups(source.load("cpu", torch.float32))
    source.headers["renamed"] = source.headers.pop(f"{groups[2].members[1]}.weight")
    with pytest.raises(SourceError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        source.check_linear_layers(groups)


def test_unknown_architecture_is_named(tiny_llama, tmp_path, settings):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard_of"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="unheard_of"):
        convert(str(folder), tmp_path / "out", 0.3, **settings)


def test_bad_models_are_named(tiny_llama, tmp_path, settings):
    def refused(model, match, **kwargs):
        with pytest.raises(FermiSVDError, match=match):
            convert(str(model), tmp_path / "out", 0.3, **{**settings, "ranks": "uniform", **kwargs})

    refused(tmp_path / "nowhere", "no such folder")
    refused("not a hub id", "neither a folder nor a model on the hub")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"no config\.json")
    for name, change, message in [
        ("quantized", {"quantization_config": {"quant_method": "awq"}}, "already awq"),
        ("remote", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "--trust-remote-code"),
    ]:
        folder = shutil.copytree(tiny_llama, tmp_path / name)
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        refused(folder, message)
    pickled = shutil.copytree(tiny_llama, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, "no safetensors file")
    inside = tiny_llama / "out"
    with pytest.raises(OutputError, match="inside MODEL"):
        convert(str(tiny_llama), inside, 0.3, **settings)
    refused(tiny_llama, "--sequence-length 4096", sequence_length=4096)


def test_compressed_model_is_not_compressed_again(tiny_llama, tmp_path, settings):
    convert(str(tiny_llama), tmp_path / "out", 0.3, ranks="uniform", **settings)
    with pytest.raises(SourceError, match="already fermisvd"):
        convert(str(tmp_path / "out"), tmp_path / "again", 0.3, ranks="uniform", **settings)


@pytest.mark.parametrize("remove", [0.0, 1.0, -1.0])
def test_remove_out_of_range(tiny_llama, tmp_path, settings, remove):
    with pytest.raises(OptionError, match="--remove"):
        convert(str(tiny_llama), tmp_path / "out", remove, **settings)
