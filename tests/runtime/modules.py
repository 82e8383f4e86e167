"""Small modules of the kinds that are traced: written plainly, as a user would."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SelfAttention(nn.Module):
    """Multi-head attention by the fused operator; to another sequence where one is given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self._project(x, source))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(source), self.v(source)


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block; `feed_forward` may be experts."""

    def __init__(self, width: int, heads: int, feed_forward: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = SelfAttention(width, heads), feed_forward or mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Patches by a convolution, a class token, learned positions, blocks, a head (arXiv 2010.11929)."""

    def __init__(
        self, *, layers: int = 12, width: int = 64, heads: int = 4, patch: int = 8, size: int = 32
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


class Experts(nn.Module):
    """Top-k experts by dense one-hot weights: every shape is known without the data."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.zeros(experts, width, 2 * width))
        self.down = nn.Parameter(torch.zeros(experts, 2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        chosen, index = scores.topk(self.top_k)
        weights = torch.zeros_like(scores).scatter(-1, index, chosen)
        inner = functional.silu(torch.einsum("bsh,ehf->besf", x, self.up))
        return torch.einsum("besf,efh,bse->bsh", inner, self.down, weights)


class DataDependentExperts(Experts):
    """Experts that gather their tokens, as many as the data says."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, index = self.router(flat).softmax(-1).topk(self.top_k)
        out = torch.zeros_like(flat)
        for expert in range(len(self.up)):
            token, place = torch.where(index == expert)
            inner = functional.silu(flat[token] @ self.up[expert]) @ self.down[expert]
            out.index_add_(0, token, inner * chosen[token, place, None])
        return out.view_as(x)


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head; `tied` shares the embedding's weight with the head."""

    def __init__(
        self, blocks: list[EncoderBlock], *, width: int = 32, vocab: int = 128, tied: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def mixture(layers: int = 4, *, width: int = 32, data_dependent: bool = False) -> LanguageModel:
    kind = DataDependentExperts if data_dependent else Experts
    blocks = [EncoderBlock(width, 4, kind(width, 4, 2)) for _ in range(layers)]
    return LanguageModel(blocks, width=width)


class DecoderBlock(nn.Module):
    """Self-attention, attention to the encoder's result, MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention, self.cross = SelfAttention(width, heads), SelfAttention(width, heads)
        self.mlp = mlp(width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.cross(self.norm2(x), memory)
        out: Tensor = x + self.mlp(self.norm3(x))
        return out


class EncoderDecoder(nn.Module):
    """Every decoder block reads the encoder's result: the graph branches."""

    def __init__(self, *, layers: int = 4, width: int = 32, vocab: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.encoder = nn.ModuleList(EncoderBlock(width, 4) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderBlock(width, 4) for _ in range(layers))
        self.encoder_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.embedding(source)
        for block in self.encoder:
            memory = block(memory)
        memory = self.encoder_norm(memory)
        x = self.embedding(target)
        for block in self.decoder:
            x = block(x, memory)
        logits: Tensor = self.head(self.norm(x))
        return logits


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, which is projected where the shape changes (arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """A stem, three stages of `depth` blocks, a head."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        blocks = [
            ResidualBlock(a if first else b, b, stride if first else 1)
            for a, b, stride in widths
            for first in [True, *[False] * (depth - 1)]
        ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.stem(images)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
