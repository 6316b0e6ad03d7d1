"""FermiSVD: SVD compression of language models with globally optimal ranks (arXiv 2512.03062).

Importing the package registers the checkpoint format with transformers.
"""

from fermisvd import hf as hf
from fermisvd.compress import CompressOptions, compress
from fermisvd.errors import FermiSVDError, FormatError
from fermisvd.fermigrad import FermiGradSettings
from fermisvd.format import CheckpointConfig, validate_checkpoint
from fermisvd.healing import HealingSettings
from fermisvd.hf import load_model

__version__ = "0.1.0"
__all__ = [
    "CheckpointConfig",
    "CompressOptions",
    "FermiGradSettings",
    "FermiSVDError",
    "FormatError",
    "HealingSettings",
    "__version__",
    "compress",
    "load_model",
    "validate_checkpoint",
]
