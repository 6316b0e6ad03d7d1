"""The commands: `fermisvd convert`, `heal`, `evaluate`, `import`, `dequantize`, `inspect`, `check`, `report`, `push`.

cli.py says what each is for."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from fermisvd.errors import FermiSVDError, reason
from fermisvd.running.distributed import launched
from fermisvd_convert import hub
from fermisvd_convert.command import given, place, takes
from fermisvd_convert.convert import convert as run_conversion
from fermisvd_convert.dequantizing import dequantize_checkpoint
from fermisvd_convert.evaluate import evaluate_files
from fermisvd_convert.figures import draw_figures
from fermisvd_convert.heal import heal_checkpoint
from fermisvd_convert.importing import import_checkpoint
from fermisvd_convert.inspect import inspect_checkpoint
from fermisvd_convert.options import ConvertOptions, EvaluateOptions, HealOptions, ImportOptions
from fermisvd_convert.serving import ask, lines, why_not
from fermisvd_convert.tables import print_groups, print_record

app = typer.Typer()
console = Console(stderr=True)

Compressed = Annotated[Path, typer.Argument(parser=place, help="Folder of a compressed checkpoint.")]
More = Annotated[list[str] | None, typer.Argument(parser=given, hidden=True)]  # further texts
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
# Options that only one value of another option reads: refused beside another value, not ignored.
READ_BY = {
    ("ranks", "fermigrad"): (*ConvertOptions.model_fields["fermigrad"].default.options(), "gradient_samples"),
    ("whitening", "kfac"): ("rescale",),
    ("constraint", "penalty"): ("penalty", "penalty_growth"),
    ("constraint", "projection"): ("anneal",),
}


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Bad input is one line, not a traceback."""
    try:
        yield
    except BrokenPipeError:  # of `| head`: click ends quietly
        raise
    except (FermiSVDError, OSError) as error:
        _print_error(reason(error))
        raise typer.Exit(2) from None


def _print_error(message: str) -> None:
    line = message.encode("utf-8", "backslashreplace").decode()
    console.print(f"fermisvd: {line}", style="red", markup=False, highlight=False, soft_wrap=True)


def _check_use(context: typer.Context) -> None:
    """Refuses options that go with another value of the option that owns them."""
    for (owner, value), options in READ_BY.items():
        for option in options:
            source = context.get_parameter_source(option)
            asked = context.params[option] is not False and source is not None and source.name == "COMMANDLINE"
            if context.params[owner] != value and asked:
                name, chosen = option.replace("_", "-"), context.params[owner]
                raise typer.BadParameter(f"--{name} goes with --{owner} {value}, not with --{owner} {chosen}")


@contextmanager
def _first_process_speaks() -> Iterator[bool]:
    """Whether this is the first of torchrun's processes; the others say only what is an error."""
    with _clear_errors():
        first = not launched("RANK")
    if not first:
        logging.getLogger("fermisvd").setLevel(logging.ERROR)
    with _clear_errors():
        yield first


@app.command()
@takes(ConvertOptions)
def convert(
    context: typer.Context,
    model: Annotated[str, typer.Argument(parser=given, help="Folder or hub id of a dense model in safetensors.")],
    out: Annotated[Path, typer.Argument(parser=place, help="New folder for the compressed checkpoint.")],
    more_calibration: More = None,
    push_to: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload OUT to this model repository of the hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository of --push-to a private one.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Compress MODEL into OUT, a checkpoint that `vllm serve OUT` serves."""
    if more_calibration and "calibration" not in options:
        raise typer.BadParameter(f"unexpected argument {more_calibration[0]!r}")
    if private and push_to is None:
        raise typer.BadParameter("--private is about the repository of --push-to, which is not given")
    _check_use(context)
    if more_calibration:
        options["calibration"] = [*options["calibration"], *more_calibration]
    with _first_process_speaks() as first:
        if push_to is not None and first:
            hub.check_repository(push_to, private)
        record = run_conversion(model, out, **options)
        if first:
            try:
                print_record(record, Console())
            except OSError as error:  # a full disk, a reader that is gone: OUT is there all the same
                console.print(f"{out} is complete; its table cannot be printed ({error})", markup=False)
            if push_to is not None:
                print(f"pushed to {hub.push(out, push_to, private)}")


@app.command()
@takes(HealOptions)
def heal(
    out: Compressed,
    healed: Annotated[Path, typer.Argument(parser=place, help="New folder for the healed checkpoint.")],
    more_text: More = None,
    *,
    options: dict[str, Any],
) -> None:
    """Train OUT's factors towards its dense model's predictions; ranks and structure stay."""
    options["text"] = [*options["text"], *(more_text or [])]
    with _clear_errors():
        record = heal_checkpoint(out, healed, **options)
    for when in ("before", "after"):
        result = record[when]
        print(f"{when}: held-back perplexity {result['perplexity']:.4f}, KL(teacher || model) {result['kl']:.6f} nats")


@app.command()
@takes(EvaluateOptions)
def evaluate(
    model: Annotated[str, typer.Argument(parser=given, help="Folder or hub id, dense or compressed.")],
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Perplexity of MODEL over non-overlapping windows of the text, in float32."""
    with _clear_errors():
        result = evaluate_files(model, **options)
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    print(f"perplexity {result.perplexity:.4f} over {result.tokens:,} tokens")
    if result.kl is not None:
        print(f"KL(reference || model) {result.kl:.6f} nats, top-1 agreement {result.top1_agreement:.4%}")


@app.command("import")
@takes(ImportOptions)
def import_(
    source: Annotated[str, typer.Argument(parser=given, help="Folder, hub id, or file of a low-rank checkpoint.")],
    out: Annotated[Path, typer.Argument(parser=place, help="New folder for the checkpoint.")],
    *,
    options: dict[str, Any],
) -> None:
    """Write a low-rank checkpoint of another method as one of ours, the same function."""
    with _clear_errors():
        found = import_checkpoint(source, out, **options)
    size = found["bytes"]
    print(f"{found['layers']} layers of {', '.join(found['layouts'])}, products within {found['difference']:.1e}")
    print(f"weights: {size['before'] / 1e6:,.2f} MB before, {size['after'] / 1e6:,.2f} MB after")


@app.command()
def dequantize(
    model: Annotated[str, typer.Argument(parser=given, help="Folder or hub id of a model in block fp8 or MXFP4.")],
    dense: Annotated[Path, typer.Argument(parser=place, help="New folder for the dense model.")],
) -> None:
    """Write a dense bfloat16 copy of a model in block fp8 or MXFP4, which `convert` reads."""
    with _clear_errors():
        found = dequantize_checkpoint(model, dense)
    print(
        f"{found['made']} tensors made dense: {found['before'] / 1e6:,.2f} MB before, {found['after'] / 1e6:,.2f} after"
    )


@app.command()
def inspect(out: Compressed, as_json: AsJson = False) -> None:
    """Groups, ranks and sizes of a compressed checkpoint, after checking all of it."""
    with _clear_errors():
        summary = inspect_checkpoint(out)
    if as_json:
        print(json.dumps(summary.as_dict()))
        return
    print_groups(summary.groups, Console())
    print(f"{summary.tensors} tensors, {summary.bytes / 1e6:,.2f} MB")


@app.command()
def check(
    out: Compressed,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Processes that share each layer.")] = 1,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")
    ] = False,
) -> None:
    """Whether vLLM can serve OUT; without vLLM, what can be said of that."""
    with _clear_errors():
        answer = ask(out, tensor_parallel_size, trust_remote_code)
    if why := why_not(answer):
        _print_error(why)
        raise typer.Exit(1)
    for line in lines(answer, tensor_parallel_size):
        print(line)


@app.command()
def report(
    outs: Annotated[
        list[Path], typer.Argument(parser=place, metavar="OUT...", help="Folders of compressed checkpoints.")
    ],
    to: Annotated[
        Path, typer.Option(parser=place, metavar="FOLDER", help="Where the figures go; made if need be.")
    ] = Path("report"),
    figures: Annotated[Literal["svg", "png"], typer.Option("--format", help="Kind of file.")] = "svg",
) -> None:
    """Draw ranks, kept energy, FermiGrad's trace and spectra; with several OUTs, also quality against size."""
    with _clear_errors():
        for path in draw_figures(outs, to, figures):
            print(path)


@app.command()
def push(
    out: Compressed,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Model repository of the hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made: a private one.")] = False,
) -> None:
    """Upload OUT to the hub, also where the upload of --push-to failed."""
    with _clear_errors():
        print(f"pushed to {hub.push(out, repository, private)}")
