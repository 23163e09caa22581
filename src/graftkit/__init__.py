"""graftkit: merge language models, vision-language models and LoRA adapters by their weights."""

__version__ = "0.1.0"
