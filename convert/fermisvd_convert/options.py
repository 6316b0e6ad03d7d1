"""Every option of every command, once: the command line and the Python functions' keywords are made from these."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError, field_validator

from fermisvd.budget import Form
from fermisvd.compress import ASIDE_WINDOWS, RANK_RULES, CompressOptions
from fermisvd.healing import HealingSettings
from fermisvd.settings import LARGEST, Batched, Count, Seeded, Settings, nested, option
from fermisvd_convert.rows import DEFAULT_DATASET
from fermisvd_convert.text import BOS, SKIP_BAD_ROWS

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[Sequence[Text], Field(min_length=1)]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def parse_bytes(text: str) -> int:
    """'24GiB', '900 MB' or a number of bytes. Raises ValueError for anything else."""
    try:
        value = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        value = 0
    if value <= 0:
        raise ValueError(f"{text!r} is no size; give it as 24GiB or 900MB")
    return int(value)


class TextOptions(Settings):
    """How a text is cut into windows."""

    panel = "Text"

    sequence_length: Annotated[
        Annotated[int, Field(ge=2, le=LARGEST)] | None,
        option("Tokens a window.", shown="the model's context, at most 2048"),
    ] = None
    bos: Annotated[bool, option("Begin windows with the BOS token that the tokenizer adds.")] = BOS
    skip_bad_rows: Annotated[bool, option("Go on without rows of the text that are refused.", recorded=False)] = (
        SKIP_BAD_ROWS
    )


class CalibrationOptions(TextOptions):
    """What is calibrated and trained on."""

    calibration: Annotated[
        Texts,
        option(
            "Files (.txt, .jsonl, .json, .csv, .parquet, also .gz, .zst) or data sets (NAME:CONFIG), each with @WEIGHT "
            "if need be; several may follow.",
            shown="WikiText-2",
        ),
    ] = (DEFAULT_DATASET,)
    samples: Annotated[Count, option("Calibration windows.")] = 256
    gradient_samples: Annotated[Count, option("Windows FermiGrad trains on.")] = 256
    heal_samples: Annotated[
        Annotated[int, Field(ge=2, le=LARGEST)] | None,
        option("Windows healing trains on.", shown="as many as its steps take, if the text has them"),
    ] = None


class RunOptions(Settings):
    """Where a model runs, and whose code."""

    panel = "Run"

    device: Annotated[Literal["auto", "cpu", "cuda"], option("auto: a GPU if there is one.", recorded=False)] = "auto"
    trust_remote_code: Annotated[bool, option("Run code that the model brings.", recorded=False)] = False


class ConvertOptions(RunOptions, CalibrationOptions, CompressOptions):
    """Options of `fermisvd convert`: the method's (fermisvd.compress), the text's, and where things are."""

    ranks: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]: a file, too, and no field is written to
        str, BeforeValidator(str), option("fermigrad, uniform, or a JSON file of ranks to fit to the budget.")
    ] = CompressOptions.model_fields["ranks"].default
    dtype: Annotated[Dtype, option("Storage type; auto keeps the model's.")] = "auto"
    work: Annotated[
        Path | None,
        option("Stages are kept here and found again.", shown=".fermisvd/stages/MODEL beside OUT", recorded=False),
    ] = None
    max_memory: Annotated[
        Annotated[int, Field(ge=1)] | None,
        BeforeValidator(lambda value: parse_bytes(value) if isinstance(value, str) else value),
        option("Most memory a step may take, as 24GiB; what would take more is refused.", recorded=False),
    ] = None
    ask_vllm: Annotated[
        bool, option("Ask vLLM, where it is installed, whether it can serve OUT, before long work.", recorded=False)
    ] = True
    revision: Annotated[str | None, option("Branch, tag or commit of a hub model.", recorded=False)] = None
    overwrite: Annotated[bool, option("Replace OUT if it exists.", recorded=False)] = False

    @field_validator("ranks")
    @classmethod
    def _rule_or_file(cls, value: str) -> str:
        if value not in RANK_RULES and not Path(value).is_file():
            raise ValueError(f"{value!r} is neither fermigrad, nor uniform, nor a file")
        return value

    @property
    def asks_teacher(self) -> bool:
        """Whether any step compares a student with the dense model."""
        return self.ranks == "fermigrad" or self.joins or self.refits or self.rescales or self.healing.steps > 0

    def windows_to_heal_on(self, length: int) -> int:
        """Windows of `length` tokens that healing asks of the text, those included that only decide; by default so many
        that one process trains on none twice."""
        if not self.healing.steps:
            return 0
        taken = self.healing.steps * self.healing.step_windows(self.batch_size, length)
        return self.heal_samples or max(self.samples, taken + min(ASIDE_WINDOWS, -(-taken // 7)))

    @property
    def joins(self) -> bool:
        """Whether layers may be joined after ranks are chosen; ranks of a file have their groups."""
        return self.groups == "auto" and self.ranks in RANK_RULES


class ImportOptions(Settings):
    """Options of `fermisvd import`."""

    form: Annotated[Form, option("Stored form; pivga takes r^2 numbers a layer less.")] = "pivga"
    dtype: Annotated[Dtype, option("Storage type; auto keeps the checkpoint's.")] = "auto"
    base: Annotated[
        str | None, option("The dense model, for config and tokenizer.", shown="those beside the weights")
    ] = None
    allow_pickle: Annotated[
        bool, option("Read a pickled model or state dict, by torch's loader of tensors, in a process of its own.")
    ] = False


class HealSettings(HealingSettings):
    """Options of the distillation where it is all that is asked for."""

    steps: Annotated[Count, option("Steps of distillation on the text.")] = 1024


class HealOptions(RunOptions, TextOptions, Batched, Seeded):
    """Options of `fermisvd heal`."""

    text: Annotated[Texts, option("Text to train on, as --calibration of convert; several may follow.")]
    teacher: Annotated[str | None, option("The dense model.", shown="the hub id that the checkpoint names")] = None
    samples: Annotated[Count, Field(ge=2), option("Windows to train on, an eighth of which only decides.")] = 1024
    healing: Annotated[HealSettings, nested("Healing")] = HealSettings()


class EvaluateOptions(RunOptions, TextOptions, Batched):
    """Options of `fermisvd evaluate`."""

    text: Annotated[Text, option("Text to measure on.")]
    reference: Annotated[str | None, option("Model to compare with: adds KL and top-1 agreement.")] = None
    windows: Annotated[Count | None, option("First so many windows only.", shown="all")] = None
