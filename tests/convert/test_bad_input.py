"""Every row of docs/refusals.md: the input is built, and the command line says what the row says, before long work."""

import gzip
import json
import re
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fermisvd_convert.cli import app
from fermisvd_convert.places import disk_of
from tests.support.folders import in_hub_cache

REFUSALS = Path(__file__).parents[2] / "docs" / "refusals.md"
ROWS = dict(re.findall(r"^\| (.+?) \| `(.+)` \|$", REFUSALS.read_text(encoding="utf-8"), re.MULTILINE))
CASES = {}
WEIGHTS = "model.safetensors"
MEMORY_DISK = Path("/dev/shm")
MLP = "model.layers.0.mlp.up_proj.weight"
# a user of another name for the same model: two layers, or a layer and the head, share one weight
TIED = """
from transformers import LlamaForCausalLM

class Tied(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        {tie}
"""


@dataclass
class Case:
    """A conversion that would succeed; a case spoils it."""

    folder: Path
    patch: pytest.MonkeyPatch
    closing: ExitStack
    options: dict = field(default_factory=dict)
    flags: list = field(default_factory=list)

    def __post_init__(self):
        self.model, self.out, self.work = (self.folder / name for name in ("model", "out", "work"))
        self.text = self.folder / "text.txt"
        self.given_model = self.given_out = None  # where these are not the paths that messages are to show
        self.options = {
            "--remove": 0.3,
            "--calibration": self.text,
            "--samples": 8,
            "--gradient-samples": 8,
            "--sequence-length": 32,
            "--steps": 2,
            "--heal-steps": 0,
            "--device": "cpu",
            "--work": self.work,
        }

    def set(self, **options):
        """Options by their names; None leaves one out."""
        self.options |= {f"--{name.replace('_', '-')}": value for name, value in options.items()}

    def uniform(self):
        self.set(ranks="uniform", steps=None, gradient_samples=None)

    def config(self, **entries):
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    def tensors(self, change):
        tensors = load_file(self.model / WEIGHTS)
        change(tensors)
        save_file(tensors, self.model / WEIGHTS, metadata={"format": "pt"})

    def arguments(self):
        given = [str(part) for pair in self.options.items() if pair[1] is not None for part in pair]
        return ["convert", str(self.given_model or self.model), str(self.given_out or self.out), *given, *self.flags]


def refused(row):
    """Registers what builds the input of that row."""

    def register(build):
        CASES[row] = build
        return build

    return register


@pytest.fixture
def case(tiny_llama, tmp_path, monkeypatch):
    with ExitStack() as closing:
        made = Case(tmp_path, monkeypatch, closing)
        shutil.copytree(tiny_llama, made.model)
        made.text.write_text("".join(f"def f{i}(x):\n    return x * {i}\n\n" for i in range(300)))
        yield made


def run(case) -> tuple[int, str]:
    """Exit code, and the message with the case's paths by their names."""
    result = CliRunner().invoke(app, case.arguments(), env={"COLUMNS": "10000", "TERM": "dumb"})
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    message = result.output.replace("│", " ")
    for name in ("model", "out", "work", "text"):
        message = re.sub(rf"{re.escape(str(getattr(case, name)))}(?![\w-])", name.upper(), message)
    return result.exit_code, message.replace(str(case.folder), "FOLDER")


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_row_has_a_case():
    assert ROWS.keys() == CASES.keys()


def test_the_case_that_is_not_spoilt_converts(case):
    code, output = run(case)
    assert code == 0, output
    assert (case.out / WEIGHTS).is_file()


@pytest.mark.parametrize("row", ROWS)
def test_refused(case, row):
    CASES[row](case)
    before = files(case.folder)
    code, output = run(case)
    assert code == 2, output
    expected = ".*".join(re.escape(part) for part in ROWS[row].split("…"))
    lines = [line for line in output.splitlines() if re.search(expected, line)]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    left = files(case.folder)
    assert before.items() <= left.items(), "a file was changed"
    new = {path.relative_to(case.folder).parts for path in left.keys() - before.keys()}
    new = {parts for parts in new if parts[-2:] != (".fermisvd", "out.lock")}
    assert all(parts[0] == "work" and not parts[-1].endswith(".safetensors") for parts in new), f"long work: {new}"


# MODEL


@refused("a folder that is not there")
def _(case):
    shutil.rmtree(case.model)


@refused("a hub id that is not there, or no hub")
def _(case):
    case.model = Path("nobody/nothing")


@refused("no hub id at all")
def _(case):
    case.model = Path("not a hub id")


@refused("a hub model of which the cache has no weights, offline")
def _(case):
    commit = in_hub_cache(case.folder / "hub", "lab/base", case.model, commit="0123abc")
    (commit / WEIGHTS).unlink()  # config and tokenizer, as vLLM's or transformers' first look leaves
    case.model = Path("lab/base")
    case.patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(case.folder / "hub"))


@refused("a file")
def _(case):
    case.given_model = case.model / "config.json"


@refused("a folder whose name is not UTF-8")
def _(case):
    case.given_model = case.folder / "caf\udce9"
    shutil.copytree(case.model, case.given_model)


@refused("a folder without config.json")
def _(case):
    (case.model / "config.json").unlink()


@refused("config.json cut off")
def _(case):
    path = case.model / "config.json"
    path.write_text(path.read_text()[:50])


@refused("config.json is no object")
def _(case):
    (case.model / "config.json").write_text("[1, 2]")


@refused("config.json with a value of the wrong type")
def _(case):
    case.config(hidden_size="wide")


@refused("a model_type that transformers does not know")
def _(case):
    case.config(model_type="unheard_of")


@refused("an encoder")
def _(case):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(case.model)


@refused("an encoder-decoder")
def _(case):
    case.config(model_type="t5", architectures=["T5ForConditionalGeneration"])


@refused("a classifier")
def _(case):
    case.config(architectures=["LlamaForSequenceClassification"])


@refused("no decoder blocks")
def _(case):
    case.config(num_hidden_layers=0)
    case.tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name])


@refused("pickled weights only")
def _(case):
    (case.model / WEIGHTS).rename(case.model / "pytorch_model.bin")


@refused("quantised by others")
def _(case):
    case.config(quantization_config={"quant_method": "awq", "bits": 4})


@refused("in block fp8")
def _(case):
    case.config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


@refused("in MXFP4")
def _(case):
    case.config(quantization_config={"quant_method": "mxfp4"})


@refused("quantised weights without a word in config.json")
def _(case):
    case.tensors(lambda t: t.update({name: t[name].to(torch.float8_e4m3fn) for name in t if "proj.weight" in name}))


@refused("compressed already")
def _(case):
    case.config(quantization_config={"quant_method": "fermisvd", "format_version": 1, "groups": []})


def tie(case, statement, dropped):
    (case.model / "modeling_tied.py").write_text(TIED.format(tie=statement))
    case.config(architectures=["Tied"], auto_map={"AutoModelForCausalLM": "modeling_tied.Tied"})
    case.tensors(lambda tensors: tensors.pop(dropped))
    case.flags.append("--trust-remote-code")


@refused("two compressed layers with one weight")
def _(case):
    tie(
        case, "self.model.layers[1].mlp.up_proj.weight = self.model.layers[0].mlp.up_proj.weight", MLP.replace("0", "1")
    )


@refused("the head tied to a compressed layer")
def _(case):
    case.config(vocab_size=136)
    case.tensors(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:136].clone()}))
    tie(case, "self.lm_head.weight = self.model.layers[1].mlp.up_proj.weight", "lm_head.weight")


@refused("code of its own, without the flag")
def _(case):
    tie(case, "pass", "model.norm.weight")
    case.flags.clear()


@refused("code of its own that fails")
def _(case):
    tie(case, "raise RuntimeError('out of order')", "model.norm.weight")


@refused("a safetensors file cut off")
def _(case):
    path = case.model / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


@refused("a safetensors file that is none")
def _(case):
    (case.model / WEIGHTS).write_bytes(b"<html>404 not found</html>" * 100)


def shards(case):
    """The weights in two files and their index."""
    tensors = load_file(case.model / WEIGHTS)
    (case.model / WEIGHTS).unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, case.model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    return weight_map


def write_index(case, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (case.model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@refused("a shard that the index names is missing")
def _(case):
    write_index(case, shards(case))
    (case.model / "model-00002-of-00002.safetensors").unlink()


@refused("a shard that the index does not name")
def _(case):
    weight_map = shards(case)
    write_index(case, {name: file for name, file in weight_map.items() if file.startswith("model-00001")})


@refused("shards without their index")
def _(case):
    shards(case)


@refused("shards beside another model.safetensors")
def _(case):
    single = (case.model / WEIGHTS).read_bytes()
    write_index(case, shards(case))
    (case.model / WEIGHTS).write_bytes(single)


@refused("a tensor in two shards")
def _(case):
    write_index(case, shards(case))
    one, two = (case.model / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    both = load_file(one) | load_file(two)
    save_file({name: both[name] for name in {*load_file(one), MLP}}, one, metadata={"format": "pt"})
    save_file({name: both[name] for name in {*load_file(two), MLP}}, two, metadata={"format": "pt"})


@refused("a git-lfs pointer in a weight file's place")
def _(case):
    (case.model / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@refused("a git-lfs pointer in a tokenizer file's place")
def _(case):
    (case.model / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@refused("a link to nowhere in a weight file's place")
def _(case):
    (case.model / WEIGHTS).unlink()
    (case.model / WEIGHTS).symlink_to("../../blobs/0123")


@refused("a wrapper's names of tensors")
def _(case):
    case.tensors(lambda tensors: [tensors.update({f"module.{name}": tensors.pop(name)}) for name in list(tensors)])


@refused("a linear layer of whole numbers")
def _(case):
    case.tensors(lambda tensors: tensors.update({MLP: tensors[MLP].to(torch.int8)}))


@refused("two tensors for one parameter")
def _(case):
    case.tensors(lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"] * 2}))


def adapter(case):
    (case.model / "adapter_config.json").write_text('{"base_model_name_or_path": "lab/base", "peft_type": "LORA"}')


CASES["an adapter beside the weights"] = adapter


@refused("an adapter alone")
def _(case):
    adapter(case)
    (case.model / WEIGHTS).rename(case.model / "adapter_model.safetensors")


@refused("a config.json that names other weights")
def _(case):
    shutil.copy(case.model / WEIGHTS, case.model / "other.safetensors")
    case.config(transformers_weights="other.safetensors")


@refused("a head of its own that config.json ties to the embedding")
def _(case):
    case.config(tie_word_embeddings=True)


@refused("a tensor that the index puts into the wrong shard")
def _(case):
    write_index(case, shards(case) | {MLP: "model-00001-of-00002.safetensors"})


@refused("an index cut off")
def _(case):
    shards(case)
    (case.model / f"{WEIGHTS}.index.json").write_text('{"metadata": {}, "weight_map": {')


@refused("a tensor missing")
def _(case):
    case.tensors(lambda tensors: tensors.pop(MLP))


@refused("a tensor of another shape")
def _(case):
    case.tensors(lambda tensors: tensors.update({MLP: tensors[MLP][:100].clone()}))


def spoil(case, value):
    case.tensors(lambda tensors: tensors[MLP][3].fill_(value))


CASES["NaN in a weight"] = partial(spoil, value=float("nan"))
CASES["infinity in a weight"] = partial(spoil, value=float("-inf"))


@refused("a weight too large for --dtype")
def _(case):
    spoil(case, 1e6)
    case.set(dtype="float16")


@refused("no tokenizer")
def _(case):
    for path in case.model.glob("tokenizer*"):
        path.unlink()


@refused("a broken tokenizer")
def _(case):
    (case.model / "tokenizer.json").write_text('{"version": "1.0", "model":')


def tokenizer(case, change):
    path = case.model / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@refused("a tokenizer of a kind that the library does not know")
def _(case):
    tokenizer(case, lambda t: t | {"model": t["model"] | {"type": "NotAModel"}})


@refused("a tokenizer without a vocabulary")
def _(case):
    tokenizer(case, lambda t: t | {"added_tokens": [], "model": t["model"] | {"vocab": {}, "merges": []}})


@refused("a tokenizer with code of its own, without the flag")
def _(case):
    (case.model / "tokenizer.json").unlink()  # with it transformers does without the code
    path = case.model / "tokenizer_config.json"
    settings = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok.Tok", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@refused("the tokenizer of another model")
def _(case):
    case.config(vocab_size=100)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    case.tensors(lambda tensors: tensors.update({name: tensors[name][:100].clone() for name in names}))


# calibration text


@refused("no such text")
def _(case):
    case.text.unlink()


@refused("a data set that is not there, or no hub")
def _(case):
    no_hub(case)
    case.set(calibration="nobody/nothing")


@refused("the default text, and no hub")
def _(case):
    no_hub(case)
    case.set(calibration=None)


def no_hub(case):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):  # the client itself tries for half a minute, see test_text.py
        raise ConnectionError("no hub")

    case.patch.setattr(datasets, "load_dataset", fail)
    case.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@refused("an empty text")
def _(case):
    case.text.write_text("")


@refused("a text shorter than one window")
def _(case):
    case.text.write_text("def f(x):\n    return x\n")


@refused("a text of one window")
def _(case):
    case.text.write_text("def f(x):\n    return x + 1\n" * 5)


@refused("one window to calibrate on, and healing or refit asked for")
def _(case):
    case.set(samples=1, gradient_samples=1, heal_steps=2)


@refused("a text that is not UTF-8")
def _(case):
    case.text.write_bytes("# só texto\n".encode() * 2000 + "# só texto\n".encode("latin-1") * 2000)


@refused("a .jsonl file that is not UTF-8")
def _(case):
    case.text = case.text.with_suffix(".jsonl")
    case.text.write_bytes((b'{"text": "so"' + b" " * 100 + b"}\n") * 100 + b'{"text": "s\xf3"}\n')
    case.set(calibration=case.text)


def data(case, suffix, content):
    case.text = case.folder / f"text{suffix}"
    case.text.write_bytes(content)
    case.set(calibration=case.text)


JSON_LINES = b'{"text": "def f(x): return x"}\n' * 3
CASES["gzip called .jsonl"] = partial(data, suffix=".jsonl", content=gzip.compress(JSON_LINES))
CASES["an archive"] = partial(data, suffix=".docx", content=b"PK\x03\x04\x14")
CASES["UTF-16"] = partial(data, suffix=".txt", content="def f(x): return x".encode("utf-16"))
CASES["binary data"] = partial(data, suffix=".txt", content=b"\x7fE\0LF")
CASES["a .parquet file that is none"] = partial(data, suffix=".parquet", content=JSON_LINES)
CASES["a .gz file cut off"] = partial(data, suffix=".jsonl.gz", content=gzip.compress(JSON_LINES)[:-9])
CASES["a .json file cut off"] = partial(data, suffix=".json", content=b'[{"text": "a"}, {"text": "b"}')
CASES["a .csv file with an open quote"] = partial(data, suffix=".csv", content=b'text\n"def f(x):\n')
CASES["a .csv file with two columns of one name"] = partial(data, suffix=".csv", content=b"text,text\na,b\n")
CASES["a .csv row of another length"] = partial(data, suffix=".csv", content=b"text\na\nb,c\n")
CASES["a .jsonl file of empty rows"] = partial(data, suffix=".jsonl", content=b'{"text": ""}\n' * 9)


@refused("Parquet called .txt")
def _(case):
    pa, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(pa.table({"text": ["def f(x): return x"]}), case.text)


@refused("a .zst file cut off")
def _(case):
    pa = pytest.importorskip("pyarrow")
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(JSON_LINES)
    data(case, ".jsonl.zst", sink.getvalue().to_pybytes()[:-5])


@refused("a library that a format needs is missing")
def _(case):
    case.patch.setitem(sys.modules, "pyarrow", None)
    data(case, ".jsonl.zst", b"")


@refused("nothing but bad rows, with --skip-bad-rows")
def _(case):
    data(case, ".jsonl", b'{"id": 1}\n' * 9)
    case.flags.append("--skip-bad-rows")


def rows(case, line, template=None):
    """Three good rows and this one."""
    data(case, ".jsonl", JSON_LINES + line.encode() + b"\n")
    if template is not None:
        (case.model / "chat_template.jinja").write_text(template)


def message(content, **more):
    return json.dumps({"messages": [{"role": "user", "content": content} | more]})


HELLO, SHOW = message("hello"), "{% for m in messages %}{{ m.content }}{% endfor %}"
CASES["a .jsonl row that is no JSON"] = partial(rows, line='{"text": "def')
CASES["a row of unknown fields"] = partial(rows, line='{"id": "row-4", "question": "1+1?"}')
CASES["a row whose text is null"] = partial(rows, line='{"id": "row-4", "text": null}')
CASES["a row whose text is none"] = partial(rows, line='{"text": 4}')
CASES["a row without names of fields"] = partial(rows, line='["def f(x): return x"]')
CASES["half a surrogate pair in a .jsonl row"] = partial(rows, line='{"text": "\\ud83d"}')
CASES["messages, but no chat template"] = partial(rows, line=HELLO)
CASES["conversations, but no chat template"] = partial(
    rows, line='{"conversations": [{"from": "human", "value": "hello"}]}'
)
CASES["messages that the chat template refuses"] = partial(
    rows, line=HELLO, template="{{ raise_exception('roles must alternate') }}"
)
CASES["a chat template that is broken"] = partial(rows, line=HELLO, template="{{ 1 / 0 }}")
CASES["messages that are no list"] = partial(rows, line='{"messages": {"role": "user"}}', template=SHOW)
CASES["messages in a string that is no JSON"] = partial(rows, line='{"messages": "hello"}', template=SHOW)
CASES["messages that are strings"] = partial(rows, line='{"messages": ["hello"]}', template=SHOW)
CASES["a message without a role"] = partial(rows, line='{"messages": [{"content": "hello"}]}', template=SHOW)
CASES["a message whose content is none"] = partial(rows, line=message(4), template=SHOW)
CASES["a message with an image"] = partial(
    rows, line=message([{"type": "image_url", "image_url": {"url": "x"}}]), template=SHOW
)
CASES["tool calls that are none of functions"] = partial(
    rows, line=message("", role="assistant", tool_calls=[{"type": "custom"}]), template=SHOW
)
CASES["tool calls that are no list"] = partial(rows, line=message("", role="assistant", tool_calls=3), template=SHOW)
CASES["tools that are no functions"] = partial(
    rows, line='{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "x"}]}', template=SHOW
)


@refused("a text given twice")
def _(case):
    case.flags += ["--calibration", str(case.text)]


@refused("a pipe")
def _(case):
    import os

    os.mkfifo(case.folder / "pipe")
    case.set(calibration=case.folder / "pipe")


@refused("a weight of a text that is not positive")
def _(case):
    case.set(calibration=f"{case.text}@0")


@refused("layers that vLLM, where it is installed, would not serve compressed")
def _(case):
    from fermisvd_convert.stages import serving

    refusal = "model.layers.0.mlp.up_proj: vLLM's LlamaForCausalLM does not take it; convert again without it"
    case.patch.setattr(serving, "installed", lambda: "1.2.3")
    case.patch.setattr(serving, "ask", lambda *_, **__: {"vllm": "1.2.3", "refusal": refusal})


# options

CASES["--remove 0"] = partial(Case.set, remove=0)
CASES["--remove 1"] = partial(Case.set, remove=1)
CASES["--remove nan"] = partial(Case.set, remove="nan")
CASES["--remove of less than one parameter"] = partial(Case.set, remove=1e-12)
CASES["--remove of more than --align allows"] = partial(Case.set, remove=0.9, align=32)
CASES["--remove of more than --minimum-rank allows"] = partial(Case.set, remove=0.5, minimum_rank=80)
CASES["--bytes 1"] = partial(Case.set, remove=None, bytes=1)
CASES["--bytes beside --remove"] = partial(Case.set, bytes=0.5)
CASES["--weights mixed without --bytes"] = partial(Case.set, weights="mixed")
CASES["--bytes 0 beside --remove"] = partial(Case.set, weights="mixed", bytes=0)
CASES["--weights mixed of too few --bytes for what --remove leaves"] = partial(Case.set, weights="mixed", bytes=0.1)
CASES["neither --remove nor --bytes"] = partial(Case.set, remove=None)
CASES["--bytes with --count of another form"] = partial(Case.set, remove=None, bytes=0.5, count="svd")
CASES["--bytes of more than --align allows"] = partial(Case.set, remove=None, bytes=0.05, align=32)
CASES["--sequence-length beyond the context"] = partial(Case.set, sequence_length=129)
CASES["--sequence-length 1"] = partial(Case.set, sequence_length=1)
CASES["--samples 0"] = partial(Case.set, samples=0)
CASES["--temperature nan"] = partial(Case.set, temperature="nan")
CASES["--plateau inf"] = partial(Case.set, plateau="inf")
CASES["--penalty-growth beyond numbers"] = partial(Case.set, constraint="penalty", penalty_growth=10, steps=1000)
CASES["--penalty-growth without the penalty"] = partial(Case.set, penalty_growth=1.1)
CASES["--max-memory that is no size"] = partial(Case.set, max_memory="much")
CASES["--align 0"] = partial(Case.set, align=0)
CASES["--work of a variable that was not set"] = partial(Case.set, work="")
CASES["--form of another name"] = partial(Case.set, form="qr")
CASES["--revision of a folder"] = partial(Case.set, revision="main")


@refused("an option of FermiGrad with --ranks uniform")
def _(case):
    case.uniform()
    case.set(steps=2)


@refused("an option of FermiGrad with a file of ranks")
def _(case):
    case.uniform()
    (case.folder / "ranks.json").write_text("{}")
    case.set(ranks=case.folder / "ranks.json", count="svd")


@refused("--ranks that are neither a rule nor a file")
def _(case):
    case.uniform()
    case.set(ranks="greedy")


def ranks(case, content):
    case.uniform()
    path = case.folder / "ranks.json"
    path.write_text(content)
    case.set(ranks=path)


CASES["a file of ranks that is none"] = partial(ranks, content="{")
CASES["ranks of another model"] = partial(ranks, content='{"x": 3}')
FIRST = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
CASES["a file of ranks with a group of two of vLLM's layers"] = partial(
    ranks, content=json.dumps({"groups": [{"members": FIRST, "rank": 3}]})
)
CASES["a rank that is no number"] = partial(ranks, content='{"model.layers.0.self_attn.q_proj": NaN}')


@refused("no GPU for --device cuda")
def _(case):
    case.patch.setattr(torch.cuda, "is_available", lambda: False)
    case.set(device="cuda")


# OUT and the work directory


@refused("OUT exists, and is not empty")
def _(case):
    case.out.mkdir()
    (case.out / "thesis.txt").write_text("mine")


@refused("OUT with a name that leaves no room for what is made beside it")
def _(case):
    case.out = case.folder / ("o" * 251)


@refused("OUT with a name that is not UTF-8")
def _(case):
    case.given_out = case.folder / "caf\udce9"


def users_folder(place):
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("mine")


@refused("something of the user's where OUT is to be made")
def _(case):
    users_folder(case.folder / ".fermisvd" / "out.new")


@refused("something of the user's in the work directory, under the one name that is emptied")
def _(case):
    users_folder(case.work / ".fermisvd-scratch")


@refused("OUT holds something of the user's, with --overwrite")
def _(case):
    case.out.mkdir()
    entry = {"quant_method": "fermisvd", "format_version": 1, "groups": []}
    (case.out / "config.json").write_text(json.dumps({"quantization_config": entry}))
    (case.out / "fermisvd.json").write_text('{"files": ["config.json", "fermisvd.json"]}')
    (case.out / "thesis.txt").write_text("mine")
    case.flags.append("--overwrite")


@refused("OUT is a checkpoint of others, with --overwrite")
def _(case):
    shutil.copytree(case.model, case.out)
    case.flags.append("--overwrite")


@refused("OUT inside MODEL")
def _(case):
    case.out = case.model / "small"


@refused("MODEL inside OUT")
def _(case):
    case.out = case.folder
    case.flags.append("--overwrite")


@refused("the work directory inside OUT")
def _(case):
    case.set(work=case.out / "work")


@refused("the work directory inside MODEL")
def _(case):
    case.set(work=case.model / "work")


@refused("OUT below a file")
def _(case):
    case.out = case.text / "out"


@refused("the work directory is a file")
def _(case):
    case.work.write_text("")


def small_disk(case, free):
    """A folder on another disk than the case's, with so many bytes free; plenty elsewhere."""
    if not MEMORY_DISK.is_dir() or disk_of(MEMORY_DISK) == disk_of(case.folder):
        pytest.skip("no second disk here")
    folder = Path(case.closing.enter_context(TemporaryDirectory(dir=MEMORY_DISK)))
    usage = shutil.disk_usage(folder)
    space = {disk_of(folder): usage._replace(free=free)}
    enough = usage._replace(free=10**15)
    case.patch.setattr(shutil, "disk_usage", lambda path: space.get(disk_of(Path(path)), enough))
    return folder


@refused("no space for OUT")
def _(case):
    case.out = small_disk(case, 1_000_000) / "out"


@refused("no space for the work directory")
def _(case):
    case.work = small_disk(case, 2_000_000) / "work"
    case.set(work=case.work)


@refused("no space for both")
def _(case):
    usage = shutil.disk_usage(case.folder)
    case.patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000_000))


# found while calibrating


@refused("activations beyond all numbers")
def _(case):
    """Every weight is finite, but not the product of gate and up."""
    case.tensors(lambda t: [t[f"model.layers.1.mlp.{name}_proj.weight"].mul_(1e25) for name in ("gate", "up")])
