"""What does the conversion of a real model take: seconds and peak memory by stage, and its perplexity?

    python -m benchmarks.cost.stages MODEL --remove 0.3 --options '{"calibration": ["text.txt"], "samples": 128}'

Memory is the anonymous resident set: files that are mapped, as weights that need no change are, are not in it. Options
are those of `fermisvd convert`, by name; OUT and the work directory are kept under --scratch where that is
given, so that a run that was stopped goes on. Results: benchmarks/results/stages-LABEL.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks.records import command_line, new_record, write_record
from benchmarks.watching import watch_stages
from fermisvd_convert import convert as program


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--remove", type=float, default=0.2)
    parser.add_argument("--options", type=json.loads, default={}, help="further options of convert, as JSON")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--label", default="real")
    arguments = parser.parse_args()
    measured = watch_stages()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.scratch or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        options = {"work": folder / "work"} | arguments.options
        begin = time.perf_counter()
        record = program.convert(arguments.model, folder / "out", arguments.remove, ask_vllm=False, **options)
        whole = time.perf_counter() - begin
    assert record.perplexity
    print("| stage | seconds | peak of the anonymous resident set, GB |\n|---|---|---|")
    for name, row in measured.items():
        print(f"| {name} | {row['seconds']:.1f} | {row['resident_bytes'] / 1e9:.2f} |")
    print(f"all: {whole:.0f} s, perplexity {record.perplexity.before:.3f} before, {record.perplexity.after:.3f} after")
    results = new_record(command_line(), {"model": Path(arguments.model).name, "remove": arguments.remove})
    results |= {"stages": measured, "seconds": whole, "perplexity": record.perplexity.model_dump()}
    write_record(f"stages-{arguments.label}", results)


if __name__ == "__main__":
    main()
