"""Sizes: a bare count of parameters with a llama-like shape near it, or a model by its architecture."""

from __future__ import annotations

import math

from planner.foundation.frozen import frozen
from planner.foundation.units import format_count
from planner.model.huggingface import read_config
from planner.model.spec import ModelSpec

HEAD_DIM = 128
ASPECT = 128
FFN_MULTIPLE = 256
MOST_FREE_LAYERS = 48
TP_HEADS = 8
REFERENCE_VOCAB = 32_000
"""A llama-like shape: heads of 128, hidden about 128 x layers, gated MLP of 8/3 hidden rounded up to 256,
32,000 tokens of vocabulary. LLaMA 7B and 13B are exactly this (Touvron et al., arXiv 2302.13971, Table 2)."""

REFERENCE_SOURCE = "LLaMA, arXiv 2302.13971, Table 2"


@frozen
class Size:
    """The model as the arithmetic sees it.

    `params` is what memory holds, `params_active` what a token meets, `params_flops` that without the input
    embedding, whose look-up is no product. A bare size uses one N for all. `shape` is what activations and
    the cost model are taken from; `shape_note` says which.
    """

    name: str
    bare: bool
    params: int
    params_active: int
    params_flops: int
    shape: ModelSpec
    shape_note: str

    @property
    def sparse(self) -> bool:
        return self.params_active != self.params


def reference_shape(params: int, seq: int) -> ModelSpec:
    """The llama-like model whose size is nearest to `params`."""
    layers, hidden = _layers_and_hidden(params)
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM,
        "intermediate_size": _ffn(hidden),
        "vocab_size": REFERENCE_VOCAB,
        "max_position_embeddings": seq,
        "tie_word_embeddings": False,
    }
    name = f"llama-like-{format_count(params)}"
    return read_config(config, source=name, name=name, sources=(REFERENCE_SOURCE,))


def _layers_and_hidden(params: int) -> tuple[int, int]:
    """Layers and width: hidden = 128 x layers; above 48 layers a multiple of 1024, for tp = 8."""
    about = max(1, round((params / (12 * ASPECT**2)) ** (1 / 3)))
    shapes = [(layers, ASPECT * layers) for layers in range(max(1, about - 8), about + 3)]
    if about > MOST_FREE_LAYERS:
        hidden = HEAD_DIM * TP_HEADS * round(ASPECT * about / (HEAD_DIM * TP_HEADS))
        shapes = [(layers, hidden) for layers in range(about - about // 8, about + about // 8 + 2)]
    return min(shapes, key=lambda shape: abs(_shape_params(*shape) - params))


def _ffn(hidden: int) -> int:
    return math.ceil(8 * hidden / 3 / FFN_MULTIPLE) * FFN_MULTIPLE


def _shape_params(layers: int, hidden: int) -> int:
    block = 4 * hidden**2 + 3 * hidden * _ffn(hidden) + 2 * hidden
    return 2 * REFERENCE_VOCAB * hidden + layers * block + hidden


def bare_size(params: int, seq: int) -> Size:
    """A size alone, such as 7B; activations come from a llama-like shape near it."""
    shape = reference_shape(params, seq)
    note = (
        f"a llama-like shape: {shape.layers} layers of {shape.hidden}, vocabulary {shape.vocab:,}, "
        f"{format_count(shape.params_total)} parameters ({shape.params_total / params - 1:+.1%}); "
        f"hidden about {ASPECT} x layers as in {REFERENCE_SOURCE}"
    )
    return Size(
        name=format_count(params),
        bare=True,
        params=params,
        params_active=params,
        params_flops=params,
        shape=shape,
        shape_note=note,
    )


def model_size(model: ModelSpec) -> Size:
    """A model by its architecture.

    Tables of tokens and positions are looked up and take no FLOPs; a tied table is the output projection too.
    """
    product = model.vocab * model.token_width if model.tied_embeddings else 0
    return Size(
        name=model.name,
        bare=False,
        params=model.params_total,
        params_active=model.params_active,
        params_flops=model.params_active - model.params_embedding + product,
        shape=model,
        shape_note=f"{model.name}: {model.layers} layers of {model.hidden}, vocabulary {model.vocab:,}",
    )
