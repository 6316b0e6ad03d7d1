"""The text of the demo model: the Python standard library of the interpreter that runs this.

Every machine with Python has it, so the demo needs no download. Whole modules are held back for
validation; their own unit tests are left out of training too.
"""

import random
import sysconfig
from pathlib import Path

VALIDATION_MODULES = (
    "heapq.py",
    "textwrap.py",
    "queue.py",
    "shlex.py",
    "statistics.py",
    "csv.py",
    "json/decoder.py",
    "asyncio/queues.py",
    "email/message.py",
    "http/client.py",
    "logging/handlers.py",
    "urllib/parse.py",
    "configparser.py",
    "difflib.py",
)
# Tables and generated text rather than programs; site-packages is not the standard library.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "bad_coding"}
VALIDATION_STEMS = {Path(name).stem for name in VALIDATION_MODULES}


def stdlib_folder() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _is_training_module(module: Path) -> bool:
    held_back = module.as_posix() in VALIDATION_MODULES
    tests_held_back = module.stem.removeprefix("test_") in VALIDATION_STEMS and "test" in module.parts
    return not (held_back or tests_held_back or EXCLUDED_FOLDERS.intersection(module.parts))


def validation_text() -> str:
    """The held-back modules, joined. Raises FileNotFoundError if this Python has lost one of them."""
    return "\n\n".join((stdlib_folder() / name).read_text(encoding="utf-8") for name in VALIDATION_MODULES)


def training_documents(with_tests: bool = True) -> list[str]:
    """One string per training module, in sorted order; `with_tests` adds the library's own test suite,
    which some distributions of Python leave out."""
    folder = stdlib_folder()
    documents = []
    for path in sorted(folder.rglob("*.py")):
        module = path.relative_to(folder)
        if not _is_training_module(module) or (not with_tests and "test" in module.parts):
            continue
        try:
            documents.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # the test suite holds files in other encodings on purpose
            continue
    return documents


def write_texts(folder: Path) -> dict[str, Path]:
    """calibration.txt (training modules without tests, shuffled) and validation.txt in `folder`, by those stems."""
    documents = training_documents(with_tests=False)
    random.Random(0).shuffle(documents)
    texts = {"calibration": "\n\n".join(documents), "validation": validation_text()}
    paths = {}
    for stem, text in texts.items():
        paths[stem] = folder / f"{stem}.txt"
        paths[stem].write_text(text, encoding="utf-8")
    return paths
