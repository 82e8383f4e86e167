"""The output projection with the loss over it. Shapes: B micro-batch, S sequence, H hidden, V vocabulary."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from runtime.model.loss import IGNORED, Passes, capped, cross_entropy


class Head(nn.Linear):
    """Hidden states [B, S, H] to logits [B, S, V], or with targets [B, S] to their mean loss, a scalar.

    Over a tensor-parallel mesh each rank holds rows of the weight, so a shard of the vocabulary; hidden
    states come whole, or as this rank's slice of the sequence. Logits are then not to be had. With a `cap`
    c logits are c tanh(logits / c) (Gemma 2, arXiv 2408.00118).
    `gradient_scale` multiplies the loss's gradients (runtime.model.precision).
    """

    def __init__(self, hidden: int, vocab: int, *, bias: bool = False, cap: float | None = None) -> None:
        super().__init__(hidden, vocab, bias=bias)
        self.cap = cap
        self.mesh: DeviceMesh | None = None
        self.between: Shard | Replicate = Replicate()
        self.passes: Passes | None = None
        self.gradient_scale = 1.0
        self.counted: float | None = None
        """What the sum of losses is divided by; None: the number of targets that count."""

    def shard(self, mesh: DeviceMesh, between: Shard | Replicate) -> None:
        """Leaves this rank its rows; hidden states are then laid out as `between` says.

        A bias whose rows do not divide stays whole: data ranks could not share out its parts.
        """
        self.mesh, self.between = mesh, between
        # Every rank drew the same whole weight, so each takes its shard from its own copy.
        for name, parameter in list(self.named_parameters()):
            if name == "weight" or self.out_features % mesh.size() == 0:
                rows = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                self.register_parameter(name, nn.Parameter(rows))

    def whole_biases(self) -> list[nn.Parameter]:
        """The bias, where it is whole on ranks that hold rows of the weight: each has the gradient of its own
        rows."""
        uneven = self.mesh is not None and self.out_features % self.mesh.size() > 0
        return [self.bias] if uneven and self.bias is not None else []

    def forward(self, x_bsh: Tensor, targets_bs: Tensor | None = None) -> Tensor:
        if targets_bs is None:
            assert self.mesh is None, "over tensor-parallel ranks the head gives the loss only"
            logits = super().forward(x_bsh)
            return logits if self.cap is None else capped(logits, self.cap)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        group = None
        if self.mesh is not None:
            assert isinstance(weight, DTensor)
            weight, group = weight.to_local(), self.mesh.get_group()
            bias = self._own_rows(bias, len(weight))
            # Each rank's gradient of the hidden states is a part of a sum.
            sliced = DTensor.from_local(x_bsh, self.mesh, [self.between], run_check=False)
            x_bsh = sliced.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        loss = cross_entropy(
            x_bsh.flatten(0, 1),
            weight,
            targets_bs.flatten(),
            bias_v=bias,
            cap=self.cap,
            group=group,
            vocab=self.out_features,
            passes=self.passes,
            scale=self.gradient_scale,
        )
        return loss if self.counted is None else loss * ((targets_bs != IGNORED).sum() / self.counted)

    def _own_rows(self, bias: Tensor | None, rows: int) -> Tensor | None:
        """This rank's rows of the bias: as many as others have, rounded up; the last has what is left."""
        if isinstance(bias, DTensor):
            return bias.to_local()
        if bias is None or self.mesh is None:
            return None
        first = self.mesh.get_local_rank() * math.ceil(self.out_features / self.mesh.size())
        return bias[first : first + rows]
