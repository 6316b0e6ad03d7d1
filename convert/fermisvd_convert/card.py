"""The model card: README.md of a checkpoint, and the ranks figure in it."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from fermisvd.errors import reason
from fermisvd_convert.figures import draw_ranks, save, style
from fermisvd_convert.record import Record
from fermisvd_convert.tables import left_dense_lines
from fermisvd_convert.text import weighted_source

logger = logging.getLogger("fermisvd")

FIGURE = "ranks.png"  # the hub shows a png everywhere, an svg not
CAUSAL = "AutoModelForCausalLM"
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
COMMON = {  # metadata of every card
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["fermisvd", "low-rank", "compression"],
}
SERVE = ["## Serve", "", "```", 'pip install "fermisvd[vllm]"', "vllm serve .", "```", ""]
PAPER = "[arXiv 2512.03062](https://arxiv.org/abs/2512.03062)"


def write_card(record: Record, folder: Path, base: Path, loader: str = CAUSAL) -> None:
    """Write README.md of the checkpoint in `folder`, and its ranks figure where matplotlib is installed.

    base: the dense model's folder, whose card says under which license it is; loader: transformers' class for it.
    """
    try:
        with style():
            save(draw_ranks(record), folder / FIGURE)
        figure = [f"![rank and kept energy of every group]({FIGURE})", ""]
    except Exception as error:  # matplotlib missing, or whatever it makes of a name
        logger.warning("the model card has no ranks figure: %s", reason(error))
        figure = []
    front = metadata(record, base).to_yaml()
    body = "\n".join(body_lines(record, figure, loader))
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n{body}", encoding="utf-8")


def write_imported_card(title: str, methods: Sequence[str], folder: Path, base: Path) -> None:
    """README.md of a checkpoint in `folder` that was written from one of other methods. base: as of `write_card`."""
    front = ModelCardData(**COMMON | carried_over(base / "README.md")).to_yaml()
    origin = f"A low-rank checkpoint ({', '.join(methods)}), written anew for FermiSVD; the function is the same."
    body = "\n".join([f"# {title}, imported", "", origin, "", *SERVE])
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n{body}", encoding="utf-8")


def metadata(record: Record, base: Path) -> ModelCardData:
    """What the hub reads of a card. What a slash is in was of the hub: folders and files are named without theirs."""
    sources = [weighted_source(name)[0].partition(":")[0] for name in record.settings["calibration"]]
    return ModelCardData(
        base_model=record.model if "/" in record.model else None,
        datasets=[name for name in sources if "/" in name] or None,
        **COMMON | carried_over(base / "README.md"),
    )


def carried_over(card: Path) -> dict:
    """What holds for a compressed model as well, of the base model's card: license, language, what it is for."""
    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        logger.warning("%s: metadata not readable, so the new card names no license: %s", card, reason)
        return {}
    return {key: data[key] for key in CARRIED if data.get(key)}


def body_lines(record: Record, figure: list[str], loader: str) -> list[str]:
    """The card below its metadata."""
    name, settings, total = record.model, record.settings, record.totals
    perplexity, size = record.perplexity, record.bytes
    link = f"[{name}](https://huggingface.co/{name})" if "/" in name else name
    revision = record.revision
    grids = {name.partition("_")[0] for group in record.groups for name in (group.schemes or {}).values()}
    numbers = f" in {' and '.join(sorted(grids))}" if grids else ""
    ranks = {"fermigrad": "FermiGrad"}.get(settings["ranks"], settings["ranks"])
    how = (
        f"data-aware SVD of its linear layers with {ranks} ranks ({PAPER}), {settings['form']} form{numbers}, "
        f"{settings['groups']} groups, {settings['whitening']} whitening"
    )
    title = f"{total.removed:.1%} of its linear parameters removed"
    if all(group.form == "dense" for group in record.groups):
        how, title = f"its linear layers rounded{numbers} with error feedback", f"its linear layers{numbers}"
    reader = "AutoTokenizer" if loader == CAUSAL else "AutoProcessor"
    return [
        f"# {Path(name).name}, {title}",
        "",
        f"{link}{f' (revision `{revision}`)' if revision else ''}, compressed by FermiSVD "
        f"{record.versions['fermisvd']}: {how}, {settings['heal_steps']} steps of distillation.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| parameters of the compressible layers | {total.parameters_before:,} | {total.parameters_after:,} |",
        f"| weights | {size.before / 1e6:,.2f} MB | {size.after / 1e6:,.2f} MB |",
        f"| perplexity on {perplexity.tokens:,} held-back tokens of the calibration text "
        f"| {perplexity.before:.4f} | {perplexity.after:.4f} |",
        "",
        *figure,
        *SERVE,
        "## Load",
        "",
        "```python",
        "import fermisvd  # pip install fermisvd; without it transformers fills the layers with random numbers",
        f"from transformers import {loader}, {reader}",
        "",
        f'model = {loader}.from_pretrained(".")',
        f'{"tokenizer" if loader == CAUSAL else "processor"} = {reader}.from_pretrained(".")',
        "```",
        "",
        "Every group's rank and all settings are in `fermisvd.json`.",
        *[f"\n{line[0].upper()}{line[1:]}." for line in left_dense_lines(record)],
        "",
    ]


def name_repository(folder: Path, repository: str) -> None:
    """Make the commands in a checkpoint's card name a repository of the hub; until then they name the folder itself."""
    card = folder / "README.md"
    text = re.sub(r"(?m)^vllm serve \S+", f"vllm serve {repository}", card.read_text(encoding="utf-8"))
    card.write_text(re.sub(r'from_pretrained\("[^"]*"\)', f'from_pretrained("{repository}")', text), encoding="utf-8")
