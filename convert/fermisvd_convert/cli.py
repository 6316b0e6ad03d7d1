"""The command line: `fermisvd convert`, `heal`, `evaluate`, `inspect`, `report`, `push`."""

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Compress a language model by SVD and serve it with vLLM.",
)
console = Console(stderr=True)

LARGEST = 2**31 - 1  # of any count
FERMIGRAD_OPTIONS = ("gradient_samples", "constraint", "temperature", "steps", "penalty_growth", "plateau", "count")


class Form(StrEnum):
    pivga = "pivga"
    svd = "svd"


class Groups(StrEnum):
    auto = "auto"
    joint = "joint"
    separate = "separate"


class Whitening(StrEnum):
    kfac = "kfac"
    input = "input"


class Constraint(StrEnum):
    projection = "projection"
    penalty = "penalty"


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Figures(StrEnum):
    svg = "svg"
    png = "png"


Bos = Annotated[bool, typer.Option("--bos/--no-bos", help="Begin windows with the BOS token that the tokenizer adds.")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Go on without rows of the text that are refused.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fermisvd {version('fermisvd')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path or a text that the terminal cannot show ends no command
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Bad input is one line, not a traceback."""
    from fermisvd.errors import FermiSVDError, reason

    try:
        yield
    except BrokenPipeError:  # of `| head`: click ends quietly
        raise
    except (FermiSVDError, OSError) as error:
        line = reason(error).encode("utf-8", "backslashreplace").decode()
        console.print(f"fermisvd: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _given(value: object) -> str:
    """A path, text or hub id as it was meant: `~` is the home folder also behind `=`, where a shell leaves it; an empty
    one is a variable that was not set."""
    text = str(value)
    if not text.strip():
        raise typer.BadParameter("is empty")
    return os.path.expanduser(text)


def _place(value: object) -> Path:
    return Path(_given(value))


def _ranks(value: str) -> str:
    if value not in ("fermigrad", "uniform") and not Path(value).is_file():
        raise typer.BadParameter(f"{value!r} is neither fermigrad, nor uniform, nor a file")
    return value


def _align(value: str) -> str:
    if value != "auto" and not (value.isascii() and value.isdigit() and 0 < int(value) <= LARGEST):
        raise typer.BadParameter(f"{value!r} is neither auto nor a positive number")
    return value


def _check_use(context: typer.Context, owner: str, value: str, options: tuple[str, ...]) -> None:
    """Options that only `owner` of this value reads are refused beside another, not ignored."""
    for option in options:
        source = context.get_parameter_source(option)
        if context.params[owner] != value and source is not None and source.name == "COMMANDLINE":
            name, given = option.replace("_", "-"), context.params[owner]
            raise typer.BadParameter(f"--{name} goes with --{owner} {value}, not with --{owner} {given}")


@app.command()
def convert(
    context: typer.Context,
    model: Annotated[str, typer.Argument(parser=_given, help="Folder or hub id of a dense model in safetensors.")],
    out: Annotated[Path, typer.Argument(parser=_place, help="New folder for the compressed checkpoint.")],
    more_calibration: Annotated[list[str] | None, typer.Argument(parser=_given, hidden=True)] = None,
    remove: Annotated[float, typer.Option(help="Fraction of the decoder blocks' linear parameters to remove.")] = ...,
    form: Annotated[Form, typer.Option(help="Stored form of the factors.")] = Form.pivga,
    ranks: Annotated[
        str, typer.Option(help="fermigrad, uniform, or a JSON file of ranks to fit to the budget.", callback=_ranks)
    ] = "fermigrad",
    groups: Annotated[
        Groups, typer.Option(help="Layers that read the same input: decomposed jointly, one by one, or as measured.")
    ] = Groups.auto,
    whitening: Annotated[
        Whitening, typer.Option(help="What weighs an error: the layer's inputs, or also the loss gradient.")
    ] = Whitening.kfac,
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit",
            help="Fit each group to what compressed layers send it.",
            show_default="where not healed",
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            parser=_given,
            help="Files (.txt, .jsonl, .json, .csv, .parquet, also .gz, .zst) or data sets (NAME:CONFIG), each with "
            "@WEIGHT if need be; several may follow.",
            show_default="WikiText-2",
        ),
    ] = None,
    bos: Bos = True,
    skip_bad_rows: SkipBadRows = False,
    samples: Annotated[int, typer.Option(min=1, max=LARGEST, help="Calibration windows.")] = 256,
    gradient_samples: Annotated[int, typer.Option(min=1, max=LARGEST, help="Windows FermiGrad trains on.")] = 256,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=2, max=LARGEST, help="Tokens a window.", show_default="the model's context, at most 2048"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=LARGEST, help="Windows a forward pass.")] = 8,
    constraint: Annotated[Constraint, typer.Option(help="How FermiGrad holds the budget.")] = Constraint.projection,
    temperature: Annotated[float, typer.Option(min=1e-6, max=1.0, help="T of the Fermi gate.")] = 0.01,
    steps: Annotated[int, typer.Option(min=1, max=LARGEST, help="FermiGrad steps.")] = 64,
    minimum_rank: Annotated[int, typer.Option(min=1, max=LARGEST, help="Lowest rank of any group.")] = 1,
    penalty_growth: Annotated[float, typer.Option(min=1.0, help="Growth of the penalty a step.")] = 1.03,
    plateau: Annotated[
        float,
        typer.Option(
            min=0.0, help="End FermiGrad once twelve steps lower the loss by less than this fraction; 0: never."
        ),
    ] = 0.0,
    count: Annotated[
        Form | None, typer.Option(help="Form whose parameters FermiGrad counts.", show_default="as --form")
    ] = None,
    heal_steps: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST, help="Steps of distillation on the calibration windows at the end; 0 for none."
        ),
    ] = 128,
    align: Annotated[
        str, typer.Option(help="Step of the ranks; auto: a power of two near k/64.", callback=_align)
    ] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Storage type; auto keeps the model's.")] = Dtype.auto,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="The same seed, the same checkpoint.")] = 0,
    work: Annotated[
        Path | None,
        typer.Option(
            parser=_place,
            help="Stages are kept here and found again.",
            show_default=".fermisvd/stages/MODEL beside OUT",
        ),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Most memory a step may take, as 24GiB; what would take more is refused.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    push_to: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload OUT to this model repository of the hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository of --push-to a private one.")] = False,
) -> None:
    """Compress MODEL into OUT, a checkpoint that `vllm serve OUT` serves."""
    if more_calibration and not calibration:
        raise typer.BadParameter(f"unexpected argument {more_calibration[0]!r}")
    if private and push_to is None:
        raise typer.BadParameter("--private is about the repository of --push-to, which is not given")
    _check_use(context, "ranks", "fermigrad", FERMIGRAD_OPTIONS)
    _check_use(context, "constraint", Constraint.penalty, ("penalty_growth",))
    with _clear_errors():
        from fermisvd.distributed import launched

        first = not launched("RANK")
    if not first:  # of torchrun's processes the first shows how far they are
        os.environ["TQDM_DISABLE"] = "1"
        logging.getLogger("fermisvd").setLevel(logging.ERROR)
    with _clear_errors():
        from fermisvd_convert import hub

        if push_to is not None and first:
            hub.check_repository(push_to, private)
        from fermisvd_convert.convert import convert as run
        from fermisvd_convert.memory import parse_bytes
        from fermisvd_convert.report import print_report
        from fermisvd_convert.rows import DEFAULT_DATASET

        report = run(
            model,
            out,
            remove,
            form=form.value,
            ranks=ranks,
            groups=groups.value,
            whitening=whitening.value,
            refit=refit,
            calibration=[*(calibration or [DEFAULT_DATASET]), *(more_calibration or [])],
            bos=bos,
            skip_bad_rows=skip_bad_rows,
            samples=samples,
            gradient_samples=gradient_samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            constraint=constraint.value,
            temperature=temperature,
            steps=steps,
            minimum_rank=minimum_rank,
            penalty_growth=penalty_growth,
            plateau=plateau,
            count=None if count is None else count.value,
            heal_steps=heal_steps,
            align=None if align == "auto" else int(align),
            dtype=dtype.value,
            device=device.value,
            seed=seed,
            work=work,
            revision=revision,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            max_memory=None if max_memory is None else parse_bytes(max_memory),
        )
        if first:
            try:
                print_report(report, Console())
            except OSError as error:  # a full disk, a reader that is gone: OUT is there all the same
                console.print(f"{out} is complete; its table cannot be printed ({error})", markup=False)
            if push_to is not None:
                print(f"pushed to {hub.push(out, push_to, private)}")


@app.command()
def heal(
    out: Annotated[Path, typer.Argument(parser=_place, help="Folder of a compressed checkpoint.")],
    healed: Annotated[Path, typer.Argument(parser=_place, help="New folder for the healed checkpoint.")],
    more_text: Annotated[list[str] | None, typer.Argument(parser=_given, hidden=True)] = None,
    text: Annotated[
        list[str], typer.Option(parser=_given, help="Text to train on, as --calibration of convert.")
    ] = ...,
    teacher: Annotated[
        str | None,
        typer.Option(parser=_given, help="The dense model.", show_default="the hub id that the checkpoint names"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of distillation.")] = 200,
    bos: Bos = True,
    skip_bad_rows: SkipBadRows = False,
    samples: Annotated[int, typer.Option(min=2, help="Windows to train on, over and over.")] = 1024,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a window.", show_default="the model's context, at most 2048")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Relative to each factor's size and width.")] = 0.1,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="The same seed, the same checkpoint.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train OUT's factors towards its dense model's predictions; ranks and structure stay."""
    with _clear_errors():
        from fermisvd_convert.heal import heal_checkpoint

        record = heal_checkpoint(
            out,
            healed,
            [*text, *(more_text or [])],
            teacher=teacher,
            steps=steps,
            bos=bos,
            skip_bad_rows=skip_bad_rows,
            samples=samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            learning_rate=learning_rate,
            device=device.value,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
    for when in ("before", "after"):
        result = record[when]
        print(f"{when}: held-back perplexity {result['perplexity']:.4f}, KL(teacher || model) {result['kl']:.6f} nats")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(parser=_given, help="Folder or hub id, dense or compressed.")],
    text: Annotated[str, typer.Option(parser=_given, help="Text to measure on.")] = ...,
    reference: Annotated[
        str | None, typer.Option(parser=_given, help="Model to compare with: adds KL and top-1 agreement.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a window.", show_default="the model's context, at most 2048")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="First so many windows only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
    trust_remote_code: TrustRemoteCode = False,
    bos: Bos = True,
    skip_bad_rows: SkipBadRows = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of MODEL over non-overlapping windows of the text, in float32."""
    with _clear_errors():
        from fermisvd_convert.evaluate import evaluate_files

        result = evaluate_files(
            model,
            text,
            reference,
            sequence_length,
            windows,
            batch_size,
            device.value,
            trust_remote_code,
            bos,
            skip_bad_rows,
        )
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    print(f"perplexity {result.perplexity:.4f} over {result.tokens:,} tokens")
    if result.kl is not None:
        print(f"KL(reference || model) {result.kl:.6f} nats, top-1 agreement {result.top1_agreement:.4%}")


@app.command()
def inspect(
    out: Annotated[Path, typer.Argument(parser=_place, help="Folder of a compressed checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Groups, ranks and sizes of a compressed checkpoint, after checking all of it."""
    with _clear_errors():
        from fermisvd_convert.inspect import inspect_checkpoint
        from fermisvd_convert.report import print_groups

        summary = inspect_checkpoint(out)
    if as_json:
        print(json.dumps(summary))
        return
    print_groups(summary["groups"], Console())
    print(f"{summary['tensors']} tensors, {summary['bytes'] / 1e6:,.2f} MB")


@app.command()
def report(
    outs: Annotated[
        list[Path], typer.Argument(parser=_place, metavar="OUT...", help="Folders of compressed checkpoints.")
    ],
    to: Annotated[
        Path, typer.Option(parser=_place, metavar="FOLDER", help="Where the figures go; made if need be.")
    ] = Path("report"),
    figures: Annotated[Figures, typer.Option("--format", help="Kind of file.")] = Figures.svg,
) -> None:
    """Draw ranks, kept energy, FermiGrad's trace and spectra; with several OUTs, also quality against size."""
    with _clear_errors():
        from fermisvd_convert.figures import draw_figures

        for path in draw_figures(outs, to, figures.value):
            print(path)


@app.command()
def push(
    out: Annotated[Path, typer.Argument(parser=_place, help="Folder of a compressed checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Model repository of the hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made: a private one.")] = False,
) -> None:
    """Upload OUT to the hub, also where the upload of --push-to failed."""
    with _clear_errors():
        from fermisvd_convert import hub

        print(f"pushed to {hub.push(out, repository, private)}")


if __name__ == "__main__":
    sys.exit(app())
