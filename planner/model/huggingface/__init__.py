"""Reads a Hugging Face `config.json` into a ModelSpec without importing transformers or running any code.

In goes a config of one of 68 architectures; out comes the ModelSpec, or an InputError that names the key
at fault. Tables of keys and class defaults say what each architecture computes. Open `reader.py` first.
"""

from planner.model.huggingface.reader import (
    FAMILIES,
    MAX_CONFIG_BYTES,
    WRAPPERS,
    read_config,
    read_config_file,
    read_model_toml,
)

__all__ = ["FAMILIES", "MAX_CONFIG_BYTES", "WRAPPERS", "read_config", "read_config_file", "read_model_toml"]
