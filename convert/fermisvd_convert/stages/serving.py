"""Whether vLLM, where it is installed, can serve what is to be made: asked once the groups are known, for a checkpoint
of these groups that has no weights yet."""

import logging
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from fermisvd.budget import RankedGroup
from fermisvd.errors import FormatError
from fermisvd.groups import LinearGroup
from fermisvd_convert.conversion import Conversion, timed
from fermisvd_convert.record import versions
from fermisvd_convert.serving import NoAnswer, ask, why_not
from fermisvd_convert.writer import copied_files, write_config

logger = logging.getLogger("fermisvd")


def installed() -> str | None:
    """The version of vLLM, None where there is none."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


@timed("ask vLLM")
def check_served(conversion: Conversion, groups: Sequence[LinearGroup]) -> None:
    """Raises FormatError if vLLM would refuse these groups of a model that it serves; a model that it does not serve
    is converted all the same, for transformers, and that is said, as where vLLM gives no answer. What vLLM takes is
    kept as an artefact."""
    options, source = conversion.options, conversion.source
    vllm = installed() if options.ask_vllm else None
    if vllm is None:
        return
    form, weights = conversion.budget.form, conversion.budget.weights
    ranked = [RankedGroup(group, 1, form, weights) for group in groups]

    def make() -> dict:
        with TemporaryDirectory() as place:
            folder = Path(place)
            for name in (path for path in copied_files(source.folder)[0] if path.suffix in (".json", ".py")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source.folder / name, folder / name)
            write_config(source, folder, ranked, conversion.storage, {})
            found = ask(folder, trust_remote_code=options.trust_remote_code)
            if found["refusal"]:
                raise FormatError(
                    f"{source.folder}: vLLM {found['vllm']} would not serve OUT: {found['refusal']}; or pass "
                    "--no-ask-vllm, for transformers alone"
                )
            return found

    asked = [group.members for group in groups], form, weights, str(conversion.storage)
    stage = conversion.workspace.stage("serving", conversion.key, versions()["fermisvd"], vllm, *asked)
    try:
        # a failure may be this environment's, and is asked about again
        why = why_not(stage.json(make, lambda found: found["failure"] is None))
    except NoAnswer as error:
        why = str(error)
    if why:
        logger.warning("%s: %s", source.folder, why)
