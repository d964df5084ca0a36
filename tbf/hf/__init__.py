"""tbf's models for Hugging Face transformers (extra `hf`): importing this module makes the Auto classes know them.

    import tbf.hf
    from transformers import AutoModel, AutoTokenizer
    model = AutoModel.from_pretrained("exported")       # made with convert_ckpt.py --format hf

No code comes from the export, so `trust_remote_code` is never needed.
"""

from __future__ import annotations

from tbf.errors import ConfigError

try:
    import transformers
except ImportError:
    raise ConfigError(
        "tbf.hf needs Hugging Face transformers, which is not installed: pip install 'transformers>=5.0'"
    ) from None

from tbf.hf.config import TbfConfig
from tbf.hf.modeling import TbfForMaskedLM, TbfForSequenceClassification, TbfForTokenClassification, TbfModel
from tbf.hf.tokenizer import TbfTokenizer

__all__ = [
    "TbfConfig",
    "TbfForMaskedLM",
    "TbfForSequenceClassification",
    "TbfForTokenClassification",
    "TbfModel",
    "TbfTokenizer",
]

transformers.AutoConfig.register(TbfConfig.model_type, TbfConfig)
transformers.AutoTokenizer.register(TbfConfig, TbfTokenizer)
transformers.AutoModel.register(TbfConfig, TbfModel)
transformers.AutoModelForMaskedLM.register(TbfConfig, TbfForMaskedLM)
transformers.AutoModelForSequenceClassification.register(TbfConfig, TbfForSequenceClassification)
transformers.AutoModelForTokenClassification.register(TbfConfig, TbfForTokenClassification)
