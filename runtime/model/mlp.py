"""The feed-forward layer. Shapes: B micro-batch, S sequence, H hidden."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from planner.model import feed_forward
from planner.model.feed_forward import Activation


class Mlp(nn.Module):
    """The feed-forward layer: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, hidden: int, spec: feed_forward.Mlp) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate = nn.Linear(hidden, spec.width, bias=spec.bias) if spec.gated else None
        self.up = nn.Linear(hidden, spec.width, bias=spec.bias)
        self.down = nn.Linear(spec.width, hidden, bias=spec.bias)

    def forward(self, x_bsh: Tensor) -> Tensor:
        if self.gate is None:
            inner = activate(self.up(x_bsh), self.activation)
        else:
            inner = activate(self.gate(x_bsh), self.activation) * self.up(x_bsh)
        out: Tensor = self.down(inner)
        return out


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The non-linearity of an MLP."""
    match activation:
        case Activation.SILU:
            return functional.silu(x)
        case Activation.GELU:
            return functional.gelu(x)
        case Activation.GELU_TANH:
            return functional.gelu(x, approximate="tanh")
        case Activation.RELU:
            return functional.relu(x)
        case Activation.RELU2:
            return functional.relu(x).square()
