"""FermiSVD: SVD compression of language models with globally optimal ranks (arXiv 2512.03062).

Importing the package registers the checkpoint format with transformers.
"""

from fermisvd import hf as hf
from fermisvd.format import FermiSVDConfig, FormatError, validate_checkpoint
from fermisvd.hf import load_model

__version__ = "0.1.0"
__all__ = ["FermiSVDConfig", "FormatError", "__version__", "load_model", "validate_checkpoint"]
