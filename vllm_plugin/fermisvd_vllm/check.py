"""Can vLLM serve a folder? The answer as JSON, from a process of its own: python -m fermisvd_vllm.check --help.

`fermisvd check` and `fermisvd convert` start it (fermisvd_convert.serving). Where vLLM is installed it is asked
(fermisvd_vllm.built), else the plugin's arithmetic alone (fermisvd_vllm.unbuilt).
"""

import argparse
import json
import logging
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from fermisvd.errors import FermiSVDError
from fermisvd_vllm.answer import Answer


def answer(folder: Path, tensor_parallel_size: int, trust_remote_code: bool) -> Answer:
    """What vLLM says of the folder at that tensor parallel size; or, without it, what can be said. Bad input is the
    answer's refusal."""
    found = Answer()
    try:
        if find_spec("vllm"):
            from fermisvd_vllm.built import ask_vllm

            ask_vllm(found, folder, tensor_parallel_size, trust_remote_code)
        else:
            from fermisvd_vllm.unbuilt import ask_arithmetic

            ask_arithmetic(found, folder, tensor_parallel_size)
    except FermiSVDError as error:
        found.refusal = str(error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("to", type=Path, help="file that the answer is written to")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--trust-remote-code", action="store_true")
    given = parser.parse_args()
    logging.getLogger("fermisvd").setLevel(logging.ERROR)
    found = answer(given.folder, given.tensor_parallel_size, given.trust_remote_code)
    given.to.write_text(json.dumps(asdict(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
