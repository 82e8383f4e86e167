"""A model as arguments of Megatron-LM: its sizes and what it computes, or what of it has no argument.

Flags as megatron/training/arguments.py of Megatron Core 0.15 has them; what they mean is in
megatron/core/transformer/transformer_config.py.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from planner.model.arithmetic import Arithmetic, RopeKind
from planner.model.attention import CAUSAL, Attention, LatentAttention, QkNorm, Reach
from planner.model.feed_forward import Activation, Experts, Mlp, Score
from planner.model.spec import VOCAB_UNIT, Block, ModelSpec, Norm
from planner.model.workload import Precision, Workload

Flags = dict[str, Any]
LLAMA3_ROPE = (1.0, 4.0, 8192)
"""Low and high frequency factors and the first length that --use-rope-scaling has built in."""


@lru_cache(maxsize=64)
def model_faults(model: ModelSpec, workload: Workload) -> tuple[str, ...]:
    """What of a model no argument says, in words; empty where all is said."""
    return tuple(ModelArguments(model, workload).faults)


class ModelArguments:
    """The arguments of a model, and in words what of it none of them says, whatever `tp` is."""

    def __init__(self, model: ModelSpec, workload: Workload, tp: int = 1) -> None:
        self.model, self.workload = model, workload
        self.flags: Flags = {}
        self.faults: list[str] = []
        blocks = [block for block in model.blocks() if isinstance(block, Block)]
        if len(blocks) < model.layers:
            self.faults.append("its layers were traced from a module")
            return
        self._ends(tp)
        self._blocks(blocks)
        self._attention(blocks)
        self._mlps(blocks)
        self._biases(blocks)
        self._arithmetic(model.arithmetic)

    def _fault(self, faults: dict[str, bool]) -> None:
        self.faults += [fault for fault, found in faults.items() if found]

    def _ends(self, tp: int) -> None:
        model = self.model
        self._fault(
            {
                "an encoder precedes its decoder": model.encoder_layers > 0,
                "the embedding is projected to the hidden size": model.embedding_width is not None,
                "the embedding is normed": model.embedding_norm,
                "it has a table of token types": model.token_types > 0,
                "it has a pooler": model.pooler,
                f"it has {model.final_norms} final norms": model.final_norms != 1,
                "its head has a bias": model.head_bias,
                "it has no vocabulary": model.vocab == 0,
                f"its norm is {model.norm}": model.norm not in (Norm.RMSNORM, Norm.LAYERNORM),
            }
        )
        positions = model.learned_positions or max(model.max_positions, self.workload.seq)
        kind = "learned_absolute" if model.learned_positions else "rope" if model.rotary else "none"
        padded = model.vocab % (VOCAB_UNIT * tp) == 0 or model.vocab % tp != 0
        self.flags |= {
            "--num-layers": model.layers,
            "--hidden-size": model.hidden,
            "--max-position-embeddings": positions,
            "--position-embedding-type": kind,
            "--normalization": "RMSNorm" if model.norm is Norm.RMSNORM else "LayerNorm",
            "--norm-epsilon": model.norm_eps,
            "--init-method-std": model.initializer_range,
            "--make-vocab-size-divisible-by": VOCAB_UNIT if padded else 1,
        }
        if kind == "rope":
            self.flags["--rotary-base"] = round(model.rope_theta)
            self._fault(
                {f"its rotary base is {model.rope_theta}": model.rope_theta != round(model.rope_theta)}
            )
        if not model.tied_embeddings:
            self.flags["--untie-embeddings-and-output-weights"] = True

    def _blocks(self, blocks: list[Block]) -> None:
        self._fault(
            {
                "a block attends to an encoder": any(block.cross for block in blocks),
                "attention and MLP are side by side": any(block.parallel for block in blocks),
                "a block has other than two norms": any(block.norms != 2 for block in blocks),
                "a block has no attention": any(block.mixer is None for block in blocks),
                "a block has no MLP": any(block.mlp is None for block in blocks),
            }
        )

    def _attention(self, blocks: list[Block]) -> None:
        mixers = list(dict.fromkeys(block.mixer for block in blocks if block.mixer))
        if len(mixers) != 1 or not isinstance(mixers[0], Attention | LatentAttention):
            kinds = ", ".join(dict.fromkeys(type(mixer).__name__ for mixer in mixers))
            self.faults.append(f"its layers mix tokens in {len(mixers)} ways ({kinds})")
            return
        mixer = mixers[0]
        self.flags["--num-attention-heads"] = mixer.heads
        if isinstance(mixer, LatentAttention):
            self._latent(mixer)
            return
        self.flags["--kv-channels"] = mixer.head_dim
        if mixer.kv_heads != mixer.heads:
            self.flags |= {"--group-query-attention": True, "--num-query-groups": mixer.kv_heads}
        if mixer.qk_norm in (QkNorm.HEAD, QkNorm.HEAD_LAYERNORM):
            self.flags["--qk-layernorm"] = True
        layernorm = self.model.norm is Norm.LAYERNORM
        normed_otherwise = mixer.qk_norm is (QkNorm.HEAD if layernorm else QkNorm.HEAD_LAYERNORM)
        self._span(mixer)
        self._fault(
            {
                f"queries and keys are normed by {mixer.qk_norm}": normed_otherwise
                or mixer.qk_norm in (QkNorm.WIDTH, QkNorm.WEIGHTLESS),
                "attention is gated": mixer.gated,
                "attention has sinks": mixer.sinks,
                "attention has a table of relative positions": mixer.position_buckets > 0,
                "values are of another width than keys": mixer.value_dim is not None,
            }
        )

    def _span(self, mixer: Attention) -> None:
        span = mixer.span
        if span == CAUSAL or (span.reach is Reach.WINDOW and self.workload.seq <= span.size):
            return
        if span.reach is Reach.WINDOW:
            self.flags["--window-size"] = f"({span.size - 1}, 0)"
        else:
            self.faults.append(f"attention reaches {span.reach} keys")

    def _latent(self, mixer: LatentAttention) -> None:
        self.flags |= {
            "--multi-latent-attention": True,
            "--kv-lora-rank": mixer.kv_rank,
            "--qk-head-dim": mixer.nope_dim,
            "--qk-pos-emb-head-dim": mixer.rope_dim,
            "--v-head-dim": mixer.value_dim,
        }
        if mixer.query_rank is not None:
            self.flags["--q-lora-rank"] = mixer.query_rank
        faults = {"latents have biases": mixer.bias, "attention is sparse": mixer.indexer is not None}
        self._fault(faults | {"attention is not plain causal": mixer.span != CAUSAL})

    def _mlps(self, blocks: list[Block]) -> None:
        dense = list(dict.fromkeys(block.mlp for block in blocks if isinstance(block.mlp, Mlp)))
        routed = list(dict.fromkeys(block.mlp for block in blocks if isinstance(block.mlp, Experts)))
        if len(dense) > 1 or len(routed) > 1:
            self.faults.append(f"it has {len(dense)} kinds of MLP and {len(routed)} of experts")
            return
        if dense:
            self.flags["--ffn-hidden-size"] = dense[0].width
        if routed:
            self._experts(routed[0], [isinstance(block.mlp, Experts) for block in blocks])
            if not dense:
                self.flags["--ffn-hidden-size"] = routed[0].expert.width
        self._activation([*dense, *(each.expert for each in routed)])

    def _activation(self, mlps: list[Mlp]) -> None:
        kinds = {(mlp.gated, mlp.activation) for mlp in mlps}
        if len(kinds) != 1:
            self.faults.append("its MLPs have several activations")
            return
        gated, activation = kinds.pop()
        if gated and activation is Activation.SILU:
            self.flags["--swiglu"] = True
        elif not gated and activation is Activation.RELU2:
            self.flags["--squared-relu"] = True
        elif gated or activation not in (Activation.GELU, Activation.GELU_TANH):
            self.faults.append(f"its MLP is {'gated by ' if gated else ''}{activation}")

    def _experts(self, experts: Experts, where: list[bool]) -> None:
        routing, first = experts.routing, where.index(True)
        self.flags |= {
            "--num-experts": experts.count,
            "--moe-router-topk": experts.topk,
            "--moe-ffn-hidden-size": experts.expert.width,
            "--moe-router-score-function": str(routing.score),
            "--moe-token-dispatcher-type": "alltoall",
            "--moe-router-load-balancing-type": "seq_aux_loss" if routing.aux_loss else "none",
            "--moe-aux-loss-coeff": routing.aux_loss,
        }
        if first:
            self.flags["--moe-layer-freq"] = f"([0]*{first}+[1]*{len(where) - first})"
        if experts.shared:
            self.flags["--moe-shared-expert-intermediate-size"] = experts.shared.width
        if self.workload.precision in (Precision.BF16, Precision.FP8):
            self.flags["--moe-grouped-gemm"] = True
        self._routing(experts)
        softmax = routing.score is Score.SOFTMAX
        self._fault(
            {
                "layers of experts alternate with dense ones": not all(where[first:]),
                "its router has a bias": experts.router_bias,
                "its experts read a latent of the tokens": experts.latent is not None,
                "shared experts are gated": experts.shared_gate,
                "weights of sigmoid routing do not sum to 1": not softmax and not routing.normalised,
            }
        )

    def _routing(self, experts: Experts) -> None:
        routing = experts.routing
        optional: dict[str, Any] = {
            "--moe-router-pre-softmax": routing.score is Score.SOFTMAX and not routing.normalised,
            "--moe-router-topk-scaling-factor": routing.scale if routing.scale != 1 else None,
            "--moe-router-num-groups": routing.groups if routing.groups > 1 else None,
            "--moe-router-group-topk": routing.chosen_groups if routing.groups > 1 else None,
            "--moe-router-enable-expert-bias": routing.corrected,
            "--moe-router-bias-update-rate": routing.bias_speed if routing.corrected else None,
            "--moe-z-loss-coeff": routing.z_loss or None,
            "--moe-expert-capacity-factor": routing.capacity,
        }
        self.flags |= {name: value for name, value in optional.items() if value not in (None, False)}

    def _biases(self, blocks: list[Block]) -> None:
        """All linear layers have biases, none has, or queries, keys and values alone."""
        inner, outer = set(), set()
        for block in blocks:
            if isinstance(block.mixer, Attention):
                inner.add(block.mixer.qkv_bias)
                outer.add(block.mixer.out_bias)
            mlp = block.mlp.expert if isinstance(block.mlp, Experts) else block.mlp
            outer |= {mlp.bias} if mlp is not None else set()
        if outer == {True} and inner in ({True}, set()):
            return
        if outer != {False} or len(inner) > 1:
            self.faults.append("some linear layers have biases, and others none")
            return
        self.flags["--disable-bias-linear"] = True
        if inner == {True}:
            self.flags["--add-qkv-bias"] = True

    def _arithmetic(self, arithmetic: Arithmetic) -> None:
        latent = "--multi-latent-attention" in self.flags
        if arithmetic.unit_offset:
            self.flags["--apply-layernorm-1p"] = True
        if arithmetic.rope_interleaved and not latent:
            self.flags["--rotary-interleaved"] = True
        if arithmetic.rope_dims is not None and not latent and "--kv-channels" in self.flags:
            self.flags["--rotary-percent"] = arithmetic.rope_dims / self.flags["--kv-channels"]
        self._rope(arithmetic, latent=latent)
        self._fault(
            dict.fromkeys(arithmetic.unexpressed, True)
            | {
                "some layers turn by another base": arithmetic.window_rope_theta is not None,
                "some layers are not turned": bool(arithmetic.unrotated_layers),
                "positions begin further on": arithmetic.position_offset != 0,
                "embeddings are scaled": arithmetic.embedding_scale != 1,
                "results are scaled": arithmetic.residual_scale != 1,
                "scores are scaled": arithmetic.attention_scale is not None and not latent,
                "scores are capped": arithmetic.attention_cap is not None,
                "logits are scaled": arithmetic.logit_scale != 1,
                "logits are capped": arithmetic.logit_cap is not None,
                "norms are behind the sublayers": arithmetic.post_norm,
            }
        )

    def _yarn_scales(self, factor: float, amplitude: float, scale: float | None) -> Flags:
        """--mscale and --mscale-all-dim, whose g(m) = 0.1 m ln(factor) + 1 makes amplitude and scale.

        amplitude = g(mscale) / g(mscale_all_dim), scale = g(mscale_all_dim)^2 / sqrt(head_dim): YarnRotary-
        Embedding and MultiLatentAttention of megatron/core.
        """
        mixer = self.model.attention
        if factor <= 1 or mixer is None:
            return {}
        slope = 0.1 * math.log(factor)
        all_dims = 1.0 if scale is None else math.sqrt(scale * math.sqrt(mixer.head_dim))
        return {
            "--mscale": round((amplitude * all_dims - 1) / slope, 6),
            "--mscale-all-dim": round((all_dims - 1) / slope, 6),
        }

    def _rope(self, arithmetic: Arithmetic, *, latent: bool) -> None:
        scaling = arithmetic.rope_scaling
        if scaling is None:
            if latent:
                self.flags["--rope-type"] = "rope"
            return
        built_in = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_positions)
        if latent and scaling.kind is RopeKind.YARN:
            self.flags |= {
                "--rope-type": "yarn",
                "--rotary-scaling-factor": scaling.factor,
                "--original-max-position-embeddings": scaling.original_positions,
                "--beta-fast": scaling.beta_fast,
                "--beta-slow": scaling.beta_slow,
                **self._yarn_scales(scaling.factor, scaling.amplitude, arithmetic.attention_scale),
            }
        elif not latent and scaling.kind is RopeKind.LLAMA3 and built_in == LLAMA3_ROPE:
            self.flags |= {"--use-rope-scaling": True, "--rope-scaling-factor": scaling.factor}
        elif not latent and scaling.kind is RopeKind.LINEAR and scaling.factor == int(scaling.factor):
            self.flags["--rotary-seq-len-interpolation-factor"] = int(scaling.factor)
        else:
            self.faults.append(f"its rotary frequencies are stretched by {scaling.kind}")
