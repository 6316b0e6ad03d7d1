"""Folders of a shape, to be served with dummy weights. References: the checkpoint format's own reader, and the library
that vLLM reads the dense one by."""

import json

import pytest
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from benchmarks.shapes import SHAPES, groups_of, write_folder
from fermisvd.format import parse_config


@pytest.mark.parametrize("weights", ["auto", "int8", "fp8", "int4"])
@pytest.mark.parametrize("form", ["svd", "pivga"])
def test_ours(tmp_path, form, weights):
    counted = write_folder(tmp_path / "out", "wide", form, 0.4, weights)
    config = parse_config(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    groups = groups_of(SHAPES["wide"])
    assert [group.members for group in config.groups] == [group.members for group in groups]
    kinds = {scheme.partition("_")[0] for group in config.groups for scheme in (group.schemes or {}).values()}
    assert kinds == (set() if weights == "auto" else {weights})
    left = counted["layers"] / sum(group.dense_parameters for group in groups)
    assert left == pytest.approx(0.6 if form == "svd" else 0.55, abs=0.02)


@pytest.mark.parametrize(("weights", "bits", "kind"), [("int8", 8, "int"), ("fp8", 8, "float"), ("int4", 4, "int")])
def test_dense(tmp_path, weights, bits, kind):
    write_folder(tmp_path / "out", "llama-3.1-8b", "dense", 0.2, weights)
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(entry)
    scheme = QuantizationScheme.model_validate(entry["config_groups"]["group_0"])
    assert scheme.weights
    assert (scheme.weights.num_bits, scheme.weights.type) == (bits, kind)
    assert scheme.weights.group_size == (128 if weights == "int4" else None)
    assert (scheme.input_activations is None) == (weights == "int4")
    assert config.ignore == ["lm_head"]
