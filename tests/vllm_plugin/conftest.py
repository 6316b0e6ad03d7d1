"""Compressed checkpoints of the demo model, and the environment of real vLLM processes."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.support import ROOT


@pytest.fixture(scope="session")
def vllm_environment() -> dict[str, str]:
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def compressed(demo_model, demo_text, tmp_path_factory):
    """form -> a folder with 30 % removed, float32, odd ranks; pivga joint, svd separate (partly dense layers)."""
    from fermisvd_convert.convert import convert

    folder = tmp_path_factory.mktemp("compressed")
    for form, groups in (("pivga", "joint"), ("svd", "separate")):
        convert(
            str(demo_model),
            folder / form,
            0.3,
            form=form,
            groups=groups,
            steps=20,
            heal_steps=8,
            align=1,
            dtype="float32",
            calibration=[str(demo_text["calibration"])],
            samples=32,
            sequence_length=128,
            work=folder / "work",
        )
    return {form: folder / form for form in ("pivga", "svd")}


@pytest.fixture(scope="session")
def run_engines(vllm_environment, tmp_path_factory):
    """Results of tests.support.engines for a list of tasks. An engine that died with its process is an error."""

    def run(tasks: list[dict], **environment: str) -> list[dict]:
        out = tmp_path_factory.mktemp("engines") / "results.json"
        process = subprocess.run(
            [sys.executable, "-m", "tests.support.engines", str(out)],
            cwd=ROOT,
            input=json.dumps(tasks),
            text=True,
            capture_output=True,
            env=vllm_environment | environment,
            timeout=90 + 120 * len(tasks),
        )
        results = json.loads(out.read_text()) if out.exists() else []
        lost = {"error": (process.stdout + process.stderr)[-4000:]}
        return results + [lost] * (len(tasks) - len(results))

    return run


@pytest.fixture(scope="session")
def torchvision() -> dict[str, str]:
    """The environment of a process that has torchvision."""
    images = Path(sys.prefix) / "images"
    if importlib.util.find_spec("torchvision"):
        return {}
    if not (images / "torchvision").is_dir():
        pytest.skip("no torchvision here, and `make` has not fetched it")
    shim = ROOT / "tests" / "support" / "for_torchvision"
    return {"PYTHONPATH": os.pathsep.join([str(shim), str(images), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="session")
def multimodal_checkpoints(torchvision, tmp_path_factory, demo_text):
    """(family, form) -> the dense product's folder, and the compressed checkpoint's."""
    from tests.support import families, multimodal

    folder = tmp_path_factory.mktemp("multimodal")

    @cache
    def make(family: str, form: str) -> tuple[Path, Path]:
        if not (source := folder / family).exists():
            run = [sys.executable, "-m", "tests.support.multimodal", family, str(source)]
            subprocess.run(run, cwd=ROOT, env=os.environ | torchvision, check=True, capture_output=True)
        out = families.compress(source, form, demo_text["calibration"], folder / "work" / family)
        return multimodal.dense_twin(source, out, folder / f"{family}-{form}-twin"), out

    return make


@pytest.fixture(scope="session")
def _decorated_kernels():
    """A kernel is interpreted if the variable is set both when it is decorated and when it runs."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module("fermisvd_vllm.kernels")


@pytest.fixture
def kernels(_decorated_kernels, monkeypatch):
    """fermisvd_vllm.kernels, interpreted where there is no GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return _decorated_kernels
