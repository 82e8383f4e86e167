"""The chunked loss is torch's cross-entropy: value and gradients, over any cut of tokens and vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional

from planner.strategy.engines import native as chunked_loss
from runtime.model.loss import IGNORED, Head, cross_entropy
from tests.runtime.ranks import on_ranks

TOKENS, HIDDEN, VOCAB = 50, 16, 96
CUTS = {"whole": 2**30, "even": TOKENS * VOCAB * 4 // 5, "ragged": 7 * VOCAB * 4, "one token": 1}


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets; logits reach about 20, two targets do not count."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).mul_(2).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[[3, 31]] = IGNORED
    return x, weight, targets


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss / 3, of))


def cut(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", limit)


@pytest.mark.parametrize("name", CUTS)
def test_value_and_gradients_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cut(monkeypatch, CUTS[name])
    assert (chunked_loss.chunk_count(TOKENS, VOCAB) > 1) == (name != "whole")
    x, weight, targets = case()
    expected = functional.cross_entropy(x @ weight.T, targets, ignore_index=IGNORED)
    found = cross_entropy(x, weight, targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for mine, theirs in zip(gradients(found, x, weight), gradients(expected, x, weight), strict=True):
        assert (mine - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("name", ["whole", "ragged"])
def test_bf16_is_as_near_to_fp64_as_torch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Gradients at least as near as those of torch's loss on fp32 logits of the same bf16 product.

    Chunks add their parts to the weight's gradient in bf16, which rounds once a chunk.
    """
    cut(monkeypatch, CUTS[name])
    x, weight, targets = case(torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = functional.cross_entropy(exact[0] @ exact[1].T, targets, ignore_index=IGNORED)
    plain = functional.cross_entropy((x @ weight.T).float(), targets, ignore_index=IGNORED)
    found = cross_entropy(x, weight, targets)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)

    true_gradients = gradients(truth, *exact)

    def errors(loss: Tensor) -> list[float]:
        pairs = zip(gradients(loss, x, weight), true_gradients, strict=True)
        return [float((mine.double() - theirs).norm() / theirs.norm()) for mine, theirs in pairs]

    chunks = chunked_loss.chunk_count(TOKENS, VOCAB)
    for mine, theirs, rounds in zip(errors(found), errors(plain), (1, chunks), strict=True):
        assert mine < theirs * 1.1 * rounds**0.5


def test_a_frozen_head_gets_no_gradient_and_no_grad_mode_forms_none() -> None:
    x, weight, targets = case()
    expected = gradients(cross_entropy(x, weight, targets), x)[0]
    found = cross_entropy(x, weight.detach(), targets)
    assert torch.equal(gradients(found, x)[0], expected)
    with torch.no_grad():
        assert not cross_entropy(x, weight, targets).requires_grad


def test_no_target_counts() -> None:
    x, weight, targets = case()
    found = cross_entropy(x, weight, torch.full_like(targets, IGNORED))
    assert found.item() == 0.0
    assert all(gradient.eq(0).all() for gradient in gradients(found, x, weight))


def test_a_backward_pass_split_into_inputs_and_weights_runs_each_part_once() -> None:
    x, weight, targets = case()
    expected = gradients(cross_entropy(x, weight, targets), x, weight)
    loss = cross_entropy(x, weight, targets) / 3
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], expected[0])
    assert torch.equal(torch.autograd.grad(loss, weight)[0], expected[1])


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.check.memory import trace_phases

    x, weight, targets = (
        torch.randn(512, 8).requires_grad_(),
        torch.randn(4096, 8).requires_grad_(),
        torch.randint(4096, (512,)),
    )
    logits_bytes = 4 * 512 * 4096
    held: list[Tensor] = []

    def peak_bytes() -> int:
        phases = [
            lambda: held.append(cross_entropy(x, weight, targets)),
            lambda: held.pop().backward(),
        ]
        return max(phase.peak_bytes for phase in trace_phases(phases, torch.device("cpu")))

    assert peak_bytes() > logits_bytes
    cut(monkeypatch, logits_bytes // 16)
    assert peak_bytes() < logits_bytes / 4


@pytest.mark.parametrize("vocab", [VOCAB, VOCAB - 3])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_with_shards_of_the_vocabulary_agree_with_one(
    monkeypatch: pytest.MonkeyPatch, sequence_parallel: bool, vocab: int
) -> None:
    """Of 93 columns the second rank has 46, one fewer than the first."""
    cut(monkeypatch, 13 * VOCAB // 2 * 4)
    shape = (5, TOKENS // 5)

    def head() -> Head:
        made = Head(HIDDEN, vocab)
        made.weight = nn.Parameter(case()[1].detach()[:vocab].clone())
        return made

    def body(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        sharded = head()
        sharded.shard(mesh, Shard(1) if sequence_parallel else Replicate())
        x, _, targets = case()
        targets = targets.clamp(max=vocab - 1)
        x = x.detach().view(*shape, HIDDEN)
        x = (x.chunk(2, 1)[rank] if sequence_parallel else x).clone().requires_grad_()
        loss = sharded(x, targets.view(shape))
        loss.backward()
        assert sharded.weight.grad is not None and x.grad is not None
        return [loss.item(), x.grad.tolist(), sharded.weight.grad.to_local().tolist()]  # type: ignore[operator]

    first, second = on_ranks(body, 2)
    x, _, targets = case()
    targets = targets.clamp(max=vocab - 1)
    whole = x.detach().view(*shape, HIDDEN).requires_grad_()
    expected = head()
    loss = expected(whole, targets.view(shape))
    loss.backward()
    assert first[0] == second[0] == pytest.approx(loss.item(), rel=1e-6)
    assert whole.grad is not None and expected.weight.grad is not None
    parts = whole.grad.chunk(2, 1) if sequence_parallel else (whole.grad, whole.grad)
    rows = expected.weight.grad.chunk(2)
    for rank, (_, of_x, of_rows) in enumerate((first, second)):
        torch.testing.assert_close(torch.tensor(of_x), parts[rank], rtol=1e-5, atol=5e-7)
        torch.testing.assert_close(torch.tensor(of_rows), rows[rank], rtol=1e-5, atol=5e-7)
