"""Hugging Face config.json to ModelSpec: tables of keys and class defaults by family, and their reader."""

from planner.hf.reader import (
    MAX_CONFIG_BYTES,
    read_config,
    read_config_file,
    read_model_toml,
)
from planner.hf.registry import FAMILIES, WRAPPERS

__all__ = ["FAMILIES", "MAX_CONFIG_BYTES", "WRAPPERS", "read_config", "read_config_file", "read_model_toml"]
