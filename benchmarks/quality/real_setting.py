"""The real model that tables are of, its texts, and what is measured of it once."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.quality.depth_pruning import block_influence
from benchmarks.quality.pruning import linear_parameters
from benchmarks.quality.table import defaults
from benchmarks.quality.width_pruning import Importance, importance
from fermisvd import load_model
from fermisvd.settings import BATCH_SIZE
from fermisvd.teacher import Taught, teach
from fermisvd_convert.evaluate import evaluate
from fermisvd_convert.loading import load_tokenizer, resolve_device
from fermisvd_convert.options import ConvertOptions
from fermisvd_convert.text import calibration_text, windows_of
from tests.support import SHARED
from tests.support.smollm2 import FOLDER

TEXT = SHARED / "text"
CALIBRATION = (TEXT / "wikitext2.train.txt",)
MORE_TEXT, MORE_SAMPLES = (*CALIBRATION, TEXT / "wikipedia.txt"), 1024  # of the longer healing
EVALUATION = {"wikitext2": (TEXT / "wikitext2.valid.txt", 128), "c4": (TEXT / "c4.txt", 64)}  # windows of each

Size = dict[str, float]  # parameters of the decoder blocks' linear layers, the fraction removed, bytes of all weights


@dataclass(frozen=True)
class Setting:
    """The dense model, and what is measured of it once. samples, length: calibration windows and their tokens; windows:
    most of an evaluation text."""

    folder: Path
    scratch: Path
    samples: int
    length: int
    windows: int | None

    def protocol(self, **more: Any) -> dict:
        """JSON-able: what cells of a record have in common, and more of it."""
        known = {
            "model": self.folder.name,
            "samples": self.samples,
            "sequence_length": self.length,
            "bos": False,
            "calibration": [path.name for path in CALIBRATION],
            "evaluation": {name: (path.name, self.count(n)) for name, (path, n) in EVALUATION.items()},
            "defaults": defaults(),
        }
        return json.loads(json.dumps(known | more))

    def count(self, windows: int) -> int:
        return min(windows, self.windows or windows)

    def load(self, folder: Path | None = None) -> LlamaForCausalLM:
        """A model of a folder, the dense one by default, in float32 on the machine's device."""
        model = load_model(folder or self.folder).to(resolve_device("auto"))  # pyright: ignore[reportArgumentType]
        assert isinstance(model, LlamaForCausalLM)
        return model

    @cached_property
    def dense(self) -> LlamaForCausalLM:
        return self.load()

    @cached_property
    def stored(self) -> torch.dtype:
        """The type that the model's weights are kept in."""
        dtype = AutoConfig.from_pretrained(self.folder).dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @cached_property
    def evaluation(self) -> dict[str, Taught]:
        """By text: windows, and what the dense model makes of them."""
        tokenizer, found = load_tokenizer(self.folder), {}
        for name, (path, windows) in EVALUATION.items():
            ids = windows_of(tokenizer, str(path), self.length, self.count(windows), bos=False)
            found[name] = teach(self.dense, ids, BATCH_SIZE)
        return found

    @cached_property
    def taught(self) -> Taught:
        """Of the calibration windows, which are those of `convert`."""
        return self._taught(CALIBRATION, self.samples)

    @cached_property
    def taught_to_heal(self) -> Taught:
        """Of the windows that `convert` heals on."""
        options = ConvertOptions.named(remove=0.5, samples=self.samples)
        return self._taught(CALIBRATION, options.windows_to_heal_on(self.length))

    @cached_property
    def taught_more(self) -> Taught:
        """Of the windows of the longer healing, which are those of `heal_checkpoint`."""
        return self._taught(MORE_TEXT, MORE_SAMPLES)

    def _taught(self, texts: tuple[Path, ...], samples: int) -> Taught:
        names = [str(path) for path in texts]
        text = calibration_text(load_tokenizer(self.folder), names, samples, self.length, bos=False)
        return teach(self.dense, text.windows, BATCH_SIZE)

    @cached_property
    def influence(self) -> torch.Tensor:
        return block_influence(self.dense, self.taught.windows)

    @cached_property
    def importance(self) -> Importance:
        return importance(self.dense, self.taught.windows)

    def size(self, parameters: int, all_bytes: int) -> Size:
        return {
            "parameters": parameters,
            "removed": 1 - parameters / linear_parameters(self.dense),
            "bytes": all_bytes,
        }

    def dense_bytes(self, model: PreTrainedModel) -> int:
        """Of a model without compressed layers, as it is stored; tied weights once."""
        return sum(parameter.numel() for parameter in model.parameters()) * self.stored.itemsize

    def quality(self, model: PreTrainedModel) -> dict[str, dict]:
        """Perplexity and KL to the dense model, by text."""
        return {name: evaluate(model, taught.windows, taught).as_dict() for name, taught in self.evaluation.items()}


def said(quality: dict[str, dict]) -> str:
    return ", ".join(f"{text} {row['perplexity']:.3f} (KL {row['kl']:.4f})" for text, row in quality.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that a setting is made of."""
    parser.add_argument("model", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--samples", type=int, default=512, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of every window")
    parser.add_argument("--windows", type=int, help="at most so many of an evaluation text")
    parser.add_argument("--scratch", type=Path, help="folder to keep")


@contextmanager
def setting_of(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Raises SystemExit where the model is not there."""
    if not arguments.model.is_dir():
        raise SystemExit(f"{arguments.model}: not there; `make smollm2` makes SmolLM2")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        folder = arguments.model.resolve()
        yield Setting(folder, scratch, arguments.samples, arguments.sequence_length, arguments.windows)
