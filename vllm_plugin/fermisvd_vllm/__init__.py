"""The serving program: a vLLM plugin that serves FermiSVD checkpoints with no flag."""

import logging


def register() -> None:
    """Entry point of vllm.general_plugins: registers the quantization method and the strict loader.

    vLLM calls it in every process and for every model on the host, so it does nothing else, a second call is harmless,
    and where it fails only FermiSVD checkpoints are refused (by vLLM, as of an unknown quantization method).
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.model_loader import register_model_loader

        from fermisvd_vllm.config import FermiSVDConfig
        from fermisvd_vllm.loader import FermiSVDModelLoader
    except ImportError:
        logging.getLogger("vllm.fermisvd").exception("FermiSVD does not fit the installed vllm or transformers")
        return
    register_quantization_config("fermisvd")(FermiSVDConfig)
    register_model_loader("fermisvd")(FermiSVDModelLoader)
