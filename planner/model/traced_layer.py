"""TracedLayer: a layer class of an arbitrary module, known by what tracing counted."""

from __future__ import annotations

from planner.foundation.frozen import frozen


@frozen
class MatrixProduct:
    """`count` matrix products (m, k) x (k, n) in the forward pass of one sample."""

    m: float
    n: float
    k: float
    count: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.count


@frozen
class TracedLayer:
    """One layer between two cuts of a traced graph; every figure is of one sample.

    A sample is one row of the batch and stands for `tokens` tokens of the workload's sequence, so that a
    workload of `seq` = `tokens` counts samples. Widths are values a token. `products` are the forward
    pass's, `moved_values` what its element-wise operators read and write, `saved_values` what autograd
    keeps, `message_values` what leaves for the next layer. `shared_params` are tied parameters that this
    layer uses and an earlier one counts. `operators` are the kernels that the forward pass launches.
    """

    key: str
    tokens: int
    params: int
    tensors: int
    products: tuple[MatrixProduct, ...]
    core_flops: float
    moved_values: float
    saved_values: float
    input_values: float
    message_values: float
    shared_params: int = 0
    operators: int = 0

    @property
    def shape_key(self) -> str:
        return self.key

    @property
    def params_active(self) -> int:
        return self.params

    @property
    def stream_width(self) -> int:
        """Values a token of the message to the next layer, rounded up."""
        return -(-round(self.message_values) // self.tokens)

    def params_shard(self, tp: int) -> float:
        """Traced layers are not split: a shard is the whole, with what it shares with another layer."""
        return float(self.params + self.shared_params)

    def matmul_flops_forward(self, tokens: float) -> float:
        """FLOPs of all matrix products."""
        return sum(product.flops for product in self.products) * tokens / self.tokens

    def attention_flops_forward(self, tokens: float, seq: int) -> float:
        """FLOPs of fused attention operators, as traced."""
        return self.core_flops * tokens / self.tokens
