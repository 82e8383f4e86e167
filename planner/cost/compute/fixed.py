"""Fixed constants of operators."""

from __future__ import annotations

GEMM_EFFICIENCY = 0.80
"""Share of the dense peak that large matrix products reach. Measured maxima: A100 0.87, H100 0.80, B200
0.78 (maximum achievable matmul, Stas Bekman's ML Engineering, 2026-08)."""

GEMM_HALF_DIM = 96.0
"""A dimension d of a product costs like d + 96: tiles and fill. On H100 at M = 4096 the median rate is 697
TFLOP/s for min(N, K) in 513..1024 and 788 in 4097..8192 (aiconfigurator-core 0.12.0 GEMM tables)."""

MEMORY_EFFICIENCY = 0.80
"""Share of the datasheet memory bandwidth that element-wise kernels reach (aiconfigurator-core 0.12.0)."""

GROUPED_PRODUCTS = 4
"""Products of experts that a device runs at once: streams of Transformer Engine's grouped product."""

UNFUSED_ACTIVATION = 8
"""Bytes that the activation of experts with biases moves over those of a fused one, where no kernel of its
own fuses it: bias, halves, two clamps, sigmoid, two products and an offset, ten kernels that read and write
fp32, 80 bytes a value against 10 (GPT-OSS's clamped SwiGLU as Megatron-Core writes it in tensor operations).
"""

BLOCK_LAUNCHES = 45
"""Operators of a block's forward that HOST_BLOCK_FORWARD_S stands for; a traced layer counts its own."""

FLASH_BLOCK = 128
"""Keys of a flash kernel's block (FlashAttention-2, arXiv 2307.08691: 64 or 128)."""

AMPERE_FLASH_KEEPS = 0.35 / 0.73
"""Share of the peak that FlashAttention-2 reaches at best on H100, over that on A100, for which it was
written (arXiv 2407.08608, 2307.08691)."""

AFTER_AMPERE = ("Hopper", "Blackwell")
"""Architectures whose matrix units it does not use to the full."""

BLOCK_OPERATORS = 24
"""Operators of a Llama block's forward with flash attention, written in PyTorch: seven products, two norms,
two additions, activation and gate, attention, and ROTARY_OPERATORS. What HOST_BLOCK_FORWARD_S launches."""

ROTARY_OPERATORS = 10
"""Operators that turn queries and keys: casts, two products each, halves exchanged, sums, casts back."""

ROUTING_OPERATORS = 12
"""Operators of a mixture of experts besides its products: scores, top-k, sort, gather, scatter, weights."""

SHARDED_MODULES = 9
"""Products and norms of a Llama block: modules whose inputs and outputs DTensor's hooks handle."""

EAGER_LAUNCHES = 4
"""Operators of a softmax that is not fused, over those of one that is: cast, scale, mask, softmax and cast
for one kernel (Megatron-LM, forward_torch_softmax)."""

EAGER_PASSES = 2.0
"""Times that those read and write every probability, over those of a fused kernel."""

RECOMPUTE_HOST = 2.0
"""Host time of a block's forward when it runs again in the backward pass, over its first run: every saved
tensor goes through the hooks of checkpointing. A 20-layer stage of a 70B model at tp 8 on an H100 took 9 ms a
layer for it, its first forward 4 ms."""

ALIGNED_VALUES = 8
"""Values of 2 bytes that tensor cores load at once: a matrix whose rows are no multiple of it is read in
smaller pieces (NVIDIA, Matrix Multiplication Background User's Guide)."""

ALIGNED_BYTES = 16
"""Bytes whose multiple the rows of batched products have to be for tensor cores: others run at the rate of
fp32 without them (the same guide)."""
