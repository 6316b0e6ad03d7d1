"""The command line, `fermisvd`. The commands are in commands.py, which is read when one of them is called: their
options come from the library, and `fermisvd --help` need not wait for torch."""

import io
import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperGroup

COMMANDS = {
    "convert": "Compress MODEL into OUT, a checkpoint that `vllm serve OUT` serves.",
    "heal": "Train OUT's factors towards its dense model's predictions; ranks and structure stay.",
    "evaluate": "Perplexity of MODEL over non-overlapping windows of the text, in float32.",
    "import": "Write a low-rank checkpoint of another method as one of ours, the same function.",
    "dequantize": "Write a dense bfloat16 copy of a model in block fp8 or MXFP4, which `convert` reads.",
    "inspect": "Groups, ranks and sizes of a compressed checkpoint, after checking all of it.",
    "check": "Whether vLLM can serve OUT; without vLLM, what can be said of that.",
    "report": "Draw ranks, kept energy, FermiGrad's trace and spectra; with several OUTs, also quality against size.",
    "push": "Upload OUT to the hub, also where the upload of --push-to failed.",
}


class ReadWhenCalled(TyperGroup):
    """A group that lists names and purposes, and puts the commands themselves in their place when one is called."""

    def resolve_command(self, ctx, args):
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1") and os.environ.get("RANK", "0") not in ("", "0"):
            os.environ["TQDM_DISABLE"] = "1"  # of torchrun's processes the first has bars; tqdm looks when imported
        from fermisvd_convert import commands

        group = typer.main.get_command(commands.app)
        assert isinstance(group, TyperGroup)
        self.commands = group.commands
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=ReadWhenCalled,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Compress a language model by SVD and serve it with vLLM.",
)
for name, purpose in COMMANDS.items():
    app.command(name, help=purpose)(lambda: None)


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
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fermisvd").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(app())
