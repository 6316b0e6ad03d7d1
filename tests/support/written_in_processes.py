"""A conversion whose weights are many small files, alone or as one of torchrun's processes.

torchrun --nproc-per-node 2 -m tests.support.written_in_processes MODEL TEXT OUT WORK WRITTEN [FAILING]

WRITTEN: folder where each process leaves, as files named by its number, the files of weights that it wrote; FAILING:
number of the process whose disk is full at its second file.
"""

import sys
from pathlib import Path

from fermisvd.errors import FermiSVDError
from fermisvd.running import distributed
from fermisvd_convert import writer
from fermisvd_convert.convert import convert


def main(model: str, text: str, out: str, work: str, written: str, failing: str = "") -> None:
    save, names = writer.save_file, []

    def recorded(tensors, file: Path, metadata) -> None:
        if names and failing == str(distributed.this_process()):
            raise OSError("No space left on device")
        names.append(file.name)
        save(tensors, file, metadata=metadata)
        Path(written, str(distributed.this_process())).write_text("\n".join(names))

    writer.SHARD_BYTES, writer.save_file = 100_000, recorded
    options = dict(ranks="uniform", groups="joint", heal_steps=0, refit=False, samples=8, sequence_length=32)
    try:
        convert(model, out, 0.3, calibration=[text], work=work, **options)
    except FermiSVDError as error:
        sys.exit(f"process {distributed.launched('RANK')}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
