"""Mixers: the sublayers in which tokens meet each other, attention and what takes its place.

Each has the same members, so that a block adds them up without asking what they are:

    matrices(hidden)        its weights
    module_names            what their modules are called, for adapters beside them
    vector_params, vectors  parameters, and tensors, that are not matrices: norms, sinks, convolutions
    core_flops(seq)         FLOPs a token, forward, between the projections: scores and values, state
    kept(seq, kernel)       values a token kept for the backward pass
    heads_split             counts of heads that tensor parallelism shares out
    key                     a text that is equal where the costs are
"""

from __future__ import annotations

from planner.model.attention import Attention, LatentAttention
from planner.model.recurrent import DeltaNet, LightningAttention, StateSpace

Mixer = Attention | LatentAttention | StateSpace | DeltaNet | LightningAttention
