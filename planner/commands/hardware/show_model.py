"""`plan show model`: parameters, layer classes, FLOPs and activation bytes of one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.commands.shared.text import pairs, wrapped_table

if TYPE_CHECKING:
    from planner.model.feed_forward import FeedForward
    from planner.model.mixers import Mixer
    from planner.model.spec import Layer, ModelSpec

DEFAULT_SEQ = 4096
"""Sequence length of the FLOPs, unless the model is shorter or --seq says otherwise."""

BACKWARD = 2
"""FLOPs of the backward pass for one of the forward: gradients of inputs and of weights."""


def show_model(model: ModelSpec, seq: int | None) -> tuple[dict[str, Any], str]:
    """The document and the text of one model."""
    document = _document(model, seq or min(DEFAULT_SEQ, model.max_positions or DEFAULT_SEQ))
    return document, _text(document)


def _document(model: ModelSpec, seq: int) -> dict[str, Any]:
    attention = model.attention
    forward = model.flops_per_token_forward(seq)
    mixing = sum(s.count * s.block.attention_flops_forward(1, seq) for s in model.segments)
    return {
        "name": model.name,
        "model_type": model.model_type,
        "params_total": model.params_total,
        "params_active": model.params_active,
        "params_embedding": model.params_embedding,
        "params_head": model.params_head,
        "layers": model.layers,
        "encoder_layers": model.encoder_layers,
        "hidden": model.hidden,
        "heads": attention.heads if attention else None,
        "kv_heads": attention.kv_heads if attention else None,
        "head_dim": attention.head_dim if attention else None,
        "vocab": model.vocab,
        "max_positions": model.max_positions,
        "tied_embeddings": model.tied_embeddings,
        "flops_seq": seq,
        "flops_per_token_forward": forward,
        "flops_per_token_backward": BACKWARD * forward,
        "flops_per_token_attention_forward": mixing,
        "classes": [_class(model, key, layer, seq) for key, layer in model.classes().items()],
        "sources": list(model.sources),
    }


def _class(model: ModelSpec, key: str, layer: Layer, seq: int) -> dict[str, Any]:
    """One layer class: which layers, what it is made of, and what a token costs in it."""
    from planner.model.spec import Block

    indices = [index for index, block in enumerate(model.blocks()) if block.shape_key == key]
    return {
        "key": key,
        "layers": len(indices),
        "first_layer": indices[0],
        "description": describe(layer),
        "params": layer.params,
        "params_active": layer.params_active,
        "flops_per_token_forward": layer.matmul_flops_forward(1) + layer.attention_flops_forward(1, seq),
        "activation_bytes_per_token": _activations(layer, seq) if isinstance(layer, Block) else None,
    }


def _activations(block: Any, seq: int) -> dict[str, dict[str, float]]:
    """16-bit activation bytes a token, by attention kernel and recomputation, without parallelism."""
    from planner.model.sublayer import AttentionKernel, Recompute

    return {
        str(kernel): {
            str(option): block.saved_bytes(1, seq, recompute=option, kernel=kernel) for option in Recompute
        }
        for kernel in AttentionKernel
    }


def describe(layer: Layer) -> str:
    """What a layer is made of, in words."""
    from planner.model.spec import Block

    if not isinstance(layer, Block):
        return f"traced: {len(layer.products)} kinds of matrix products, {layer.tensors} tensors"
    parts = [_mixer(layer.mixer)] if layer.mixer else []
    parts += ["attention to the encoder"] if layer.cross else []
    parts += [_feed_forward(layer.mlp)] if layer.mlp else []
    joined = " beside " if layer.parallel else ", "
    norms = f"{layer.norms} {str(layer.norm).replace('_', ' ')}{'s' if layer.norms != 1 else ''}"
    return f"{joined.join(parts)}; {norms}"


def _mixer(mixer: Mixer) -> str:
    from planner.model.attention import Attention, LatentAttention
    from planner.model.mixers import DeltaNet, LightningAttention, StateSpace

    match mixer:
        case Attention():
            shared = f", {mixer.kv_heads} key-value" if mixer.kv_heads != mixer.heads else ""
            return f"attention {mixer.heads} x {mixer.head_dim}{shared}{_reach(mixer)}"
        case LatentAttention():
            ranks = f"query rank {mixer.query_rank or 'none'}, key-value rank {mixer.kv_rank}"
            return f"latent attention {mixer.heads} x {mixer.head_dim}, {ranks}{_reach(mixer)}"
        case StateSpace():
            return f"state space {mixer.state_heads} x {mixer.head_dim}, state {mixer.state}"
        case DeltaNet():
            return f"delta rule {mixer.value_heads} x {mixer.value_head_dim}, keys {mixer.key_dim}"
        case LightningAttention():
            return f"lightning attention {mixer.lightning_heads} x {mixer.head_dim}"


def _reach(mixer: Any) -> str:
    return f" in a {mixer.span.reach} of {mixer.span.size}" if mixer.span.size else ""


def _feed_forward(mlp: FeedForward) -> str:
    from planner.model.feed_forward import Mlp

    if isinstance(mlp, Mlp):
        return f"{'gated ' if mlp.gated else ''}MLP {mlp.width} ({mlp.activation})"
    shared = f" + shared {mlp.shared.width}" if mlp.shared else ""
    return f"{mlp.topk} of {mlp.count} experts of {mlp.expert.width}{shared} ({mlp.expert.activation})"


def _text(document: dict[str, Any]) -> str:
    from planner.foundation.units import format_count

    seq = document["flops_seq"]
    forward, mixing = document["flops_per_token_forward"], document["flops_per_token_attention_forward"]
    counts = {
        name: f"{format_count(document[f'params_{key}'])} ({document[f'params_{key}']:,})"
        for name, key in (
            ("parameters", "total"),
            ("active a token", "active"),
            ("in embeddings", "embedding"),
            ("in the head", "head"),
        )
    }
    layers = f"{document['layers']}"
    if document["encoder_layers"]:
        layers += f", of which {document['encoder_layers']} encode"
    tied = "tied to the embedding" if document["tied_embeddings"] else "its own weight"
    shown = [
        ("model", f"{document['name']} ({document['model_type']})"),
        *counts.items(),
        ("layers", layers),
        ("hidden size", document["hidden"]),
        ("vocabulary", f"{document['vocab']:,}; output projection {tied}"),
        ("longest sequence", f"{document['max_positions']:,}" if document["max_positions"] else None),
        (
            "FLOPs a token",
            f"forward {forward:.4g} at sequence length {seq} (between tokens {mixing / forward:.1%}), "
            f"backward {document['flops_per_token_backward']:.4g}",
        ),
    ]
    sources = wrapped_table(("sources",), [[source] for source in document["sources"]])
    return f"{pairs(shown)}\n\n{_class_table(document)}\n\n{sources}"


def _class_table(document: dict[str, Any]) -> str:
    from planner.foundation.units import format_bytes, format_count

    rows = []
    for entry in document["classes"]:
        kept = entry["activation_bytes_per_token"]
        options = ("none", "selective", "full")
        flash = [format_bytes(kept["flash"][option]) for option in options] if kept else ["-"] * 3
        eager = format_bytes(kept["eager"]["none"]) if kept else "-"
        rows.append([entry["layers"], format_count(entry["params"]), *flash, eager, entry["description"]])
    header = ["layers", "params each", "kept a token", "selective", "full", "eager", "made of"]
    note = (
        "kept a token: 16-bit activations of one layer from forward to backward with a flash kernel; "
        "selective and full\nrecomputation; eager: nothing recomputed, attention's probabilities kept, "
        f"at sequence length {document['flops_seq']}."
    )
    return f"{wrapped_table(header, rows)}\n{note}"
