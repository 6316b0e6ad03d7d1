import json
import subprocess
import sys

import pytest

from fermisvd.format import validate_checkpoint


def convert(processes: int, model, out, text, work) -> dict:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    numbers = {"remove": 0.3, "samples": 12, "gradient-samples": 12, "sequence-length": 32, "steps": 6}
    numbers |= {"heal-steps": 2, "batch-size": 4, "align": 1}
    options = [part for name, value in numbers.items() for part in (f"--{name}", value)]
    options += ["--calibration", text, "--work", work]
    run = [*launch, "-m", "fermisvd_convert", "convert", model, out, *options]
    done = subprocess.run([str(part) for part in run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    validate_checkpoint(out)
    return json.loads((out / "fermisvd.json").read_text())


@pytest.mark.long
def test_two_processes_convert_as_one(tiny_llama, tmp_path):
    """The same groups and ranks; perplexity to 1e-4, as sums are taken in another order."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(600)))
    one, two = (convert(n, tiny_llama, tmp_path / f"out{n}", text, tmp_path / f"work{n}") for n in (1, 2))
    assert [(g["members"], g["rank"]) for g in two["groups"]] == [(g["members"], g["rank"]) for g in one["groups"]]
    for when in ("before", "after"):
        assert two["perplexity"][when] == pytest.approx(one["perplexity"][when], rel=1e-4)
    assert two["perplexity"]["tokens"] == one["perplexity"]["tokens"]
    artefacts = [
        sorted(path.relative_to(tmp_path / f"work{n}").name for path in (tmp_path / f"work{n}").rglob("*.safetensors"))
        for n in (1, 2)
    ]
    assert artefacts[0] == artefacts[1]
