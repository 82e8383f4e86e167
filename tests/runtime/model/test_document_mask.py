"""Attention within documents: a packed document is as one that stands alone, in every layout."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from planner.foundation.errors import InputError
from planner.model.arithmetic import Arithmetic
from planner.model.attention import CAUSAL, AttentionSpan, CpExchange, Reach
from planner.model.sublayer import Recompute
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, OffloadCounts, RecomputeCounts, Schedule, Stage, Zero
from runtime.model.attention import Core
from runtime.model.block_attention import Slice, document_bounds, meetings
from runtime.model.transformer import Borders, Transformer, build_transformer, materialize
from runtime.parallel.context import held_positions, make_core
from runtime.train.data.order import BatchReader
from runtime.train.data.prepare import DataOptions, data_summary, open_data, prepare_data
from runtime.train.executor import Executor
from runtime.train.metrics import TrainSummary
from runtime.train.options import TrainOptions
from runtime.train.train import run_training
from tests.plans import batch8, make_plan, split, tiny_deepseek_experts, tiny_gpt2, tiny_llama, tiny_mla
from tests.runtime.matrix import TOLERANCE
from tests.runtime.parallel.test_families_in_parallel import DEEPSEEK, GEMMA, OLMO, PHI
from tests.runtime.ranks import (
    OPTIONS,
    SEED,
    make_executor,
    on_ranks,
    single_process,
    train,
)

LLAMA, GPT2, MLA, EXPERTS = tiny_llama(), tiny_gpt2(), tiny_mla(), tiny_deepseek_experts()
_, GATHER, ALL_TO_ALL = CpExchange
WINDOW = AttentionSpan(reach=Reach.WINDOW, size=5)
BEGINS = torch.tensor([[0] * 5 + [5] + [6] * 12 + [18] * 14, [0] * 32, [*range(4)] * 1 + [4] * 28])
"""Of three sequences: four documents, of which one of one token; a single one; four of one token and one."""


def alone(begins: Tensor) -> list[tuple[int, int, int]]:
    """Row, begin and end of every document, found token by token."""
    found: list[tuple[int, int, int]] = []
    for row, places in enumerate(begins.tolist()):
        for place, begin in enumerate(places):
            if begin == place:
                found.append((row, place, place))
            found[-1] = (row, found[-1][1], place + 1)
    return found


# ------------------------------------------------------------------------------- a document alone


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("span", [CAUSAL, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("widths", [(8, 8), (8, 6)], ids=str)
def test_attention_is_that_of_each_document_alone(
    span: AttentionSpan, cap: float | None, widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and gradients, with chunks of queries that documents go over."""
    monkeypatch.setattr("runtime.model.attention.LEAST_CHUNK", 7)
    core, generator = Core(span, 0.3, cap), torch.Generator().manual_seed(1)
    shapes = ((4, widths[0]), (2, widths[0]), (2, widths[1]), (4, widths[1]))
    q, k, v, grad = (torch.randn(3, 32, *shape, generator=generator) for shape in shapes)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    found = core(q, k, v, BEGINS)
    expected = torch.empty_like(found)
    for row, first, end in alone(BEGINS):
        rows, places = slice(row, row + 1), slice(first, end)
        expected[rows, places] = core(*(t[rows, places] for t in inputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(out, inputs, grad) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def token_losses(model: Transformer, tokens: Tensor, borders: Borders | None = None) -> Tensor:
    """The loss of every position [B, S] of tokens [B, S + 1]."""
    logits = model(tokens[:, :-1], borders=borders)
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


MODELS = {"llama": LLAMA, "gpt2": GPT2, "mla": MLA, "experts": EXPERTS, "gemma": GEMMA, "deepseek": DEEPSEEK}
MODELS |= {"olmo": OLMO, "phi": PHI}


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_packed_tokens_are_those_of_each_document_alone(name: str) -> None:
    spec = MODELS[name]
    model = build_transformer(spec, 0, spec.layers, True, True, seq=32)
    materialize(model, spec, prefix="", seed=SEED, device="cpu")
    model.tie()
    tokens = torch.randint(spec.vocab, (3, 33), generator=torch.Generator().manual_seed(3))
    packed = token_losses(model, tokens, Borders(BEGINS))
    for row, first, end in alone(BEGINS):
        own = token_losses(model, tokens[row : row + 1, first : end + 1])
        torch.testing.assert_close(packed[row, first:end], own[0], rtol=1e-5, atol=1e-5)
    open_borders = token_losses(model, tokens)
    assert (packed[0, 6:] - open_borders[0, 6:]).abs().min() > 0, "borders do matter"
    torch.testing.assert_close(packed[1], open_borders[1], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ blocks of it


def test_meetings_cover_each_pair_of_a_document_once_and_no_other() -> None:
    """Random documents, and the slices of every pair of ranks of a ring."""
    draw = random.Random(0)
    for _ in range(200):
        cp, length = draw.randint(1, 4), draw.randint(1, 6)
        seq = 2 * cp * length
        begins: list[int] = []
        while len(begins) < seq:
            begins += [len(begins)] * draw.randint(1, draw.choice((2, 9, 40)))
        bounds = document_bounds(torch.tensor([begins[:seq]]))
        met: list[tuple[int, int]] = []
        held = [[r, 2 * cp - 1 - r] for r in range(cp)]
        for mine in held:
            for theirs in held:
                slices = [
                    [Slice(n * length, (n + 1) * length, place * length) for place, n in enumerate(numbers)]
                    for numbers in (mine, theirs)
                ]
                globals_ = [
                    [p for n in numbers for p in range(n * length, (n + 1) * length)]
                    for numbers in (mine, theirs)
                ]
                for meeting in meetings(bounds, *slices):
                    queries, keys = globals_[0][meeting.queries], globals_[1][meeting.keys]
                    pairs = [(q, k) for q in queries for k in keys if not meeting.causal or k <= q]
                    assert pairs, "no meeting is empty"
                    met += pairs
        assert sorted(met) == [(q, k) for q in range(seq) for k in range(begins[q], q + 1)]


@pytest.mark.parametrize(("exchange", "precision"), [(e, p) for e in CpExchange for p in ("fp32", "bf16")])
def test_attention_over_ranks_is_that_of_whole_sequences(exchange: CpExchange, precision: str) -> None:
    """Results and gradients on 4 ranks; documents within a slice, over some and over all."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    rtol, atol = (1e-5, 1e-6) if precision == "fp32" else (2e-2, 2e-2)
    degrees, plain = Degrees(cp=4, cp_exchange=exchange), Core(CAUSAL, None, None)
    generator = torch.Generator().manual_seed(5)
    whole = [torch.randn(3, 32, heads, 8, generator=generator) for heads in (4, 2, 2, 4)]

    def body(rank: int) -> bool:
        held = held_positions(32, degrees, rank)
        *inputs, grad = (t[:, held].to(dtype) for t in whole)
        inputs = [t.requires_grad_() for t in inputs]
        core = make_core(plain, exchange, dist.group.WORLD)  # type: ignore[arg-type]
        out = core(*inputs, BEGINS)
        found = (out.detach(), *torch.autograd.grad(out, inputs, grad))
        exact_inputs = [t.to(dtype).float().requires_grad_() for t in whole[:3]]
        exact = plain(*exact_inputs, BEGINS)
        right = (exact.detach(), *torch.autograd.grad(exact, exact_inputs, whole[3].to(dtype).float()))
        for mine, all_tokens in zip(found, right, strict=True):
            assert mine.dtype is dtype
            torch.testing.assert_close(mine.float(), all_tokens[:, held], rtol=rtol, atol=atol)
        return True

    assert all(on_ranks(body, 4))


# ------------------------------------------------------------------------------------- every layout

MIXED = (Stage(first=0, end=4, recompute=RecomputeCounts(none=1, selective=1, full=2)),)
SP = {"sequence_parallel": True}
OFFLOADED = (Stage(first=0, end=4, recompute=RecomputeCounts(none=4), offload=OffloadCounts(activations=2)),)
SELECTIVE = split(3, 1, recompute=Recompute.SELECTIVE)

PLANS: dict[str, Plan] = {
    "tp2-sp-mixed": make_plan(LLAMA, batch8(tp=2, micro_batch=2, **SP), MIXED),
    "gpt2-ring-pp2-selective": make_plan(
        GPT2, batch8(cp=2, pp=2, zero=Zero.OPTIMIZER, micro_batch=2), SELECTIVE
    ),
    "gather-zero3-mixed": make_plan(
        LLAMA, batch8(cp=2, cp_exchange=GATHER, zero=Zero.PARAMETERS, micro_batch=4), MIXED
    ),
    "all-to-all-gpt2-interleaved": make_plan(
        GPT2,
        batch8(cp=2, pp=2, chunks=2, schedule=Schedule.INTERLEAVED, cp_exchange=ALL_TO_ALL, micro_batch=2),
    ),
    "all-to-all-gemma": make_plan(GEMMA, batch8(cp=2, micro_batch=4, cp_exchange=ALL_TO_ALL)),
    "mla-ring": make_plan(DEEPSEEK, batch8(cp=2, micro_batch=4)),
    "phi-tp2-sp": make_plan(PHI, batch8(tp=2, micro_batch=2, **SP)),
    "zero-bubble": make_plan(LLAMA, batch8(pp=2, micro_batch=2, schedule=Schedule.ZB_H1)),
    "experts-ep2": make_plan(EXPERTS, batch8(ep=2, dp_shard=2, zero=Zero.PARAMETERS, micro_batch=4)),
    "offloaded": make_plan(LLAMA, batch8(micro_batch=4), OFFLOADED),
}


@pytest.mark.parametrize("name", PLANS)
def test_training_is_that_of_one_process_and_read_back_as_planned(name: str) -> None:
    plan = PLANS[name]
    expected = [value for pair in single_process(plan, 2, documents=True) for value in pair]

    def body(rank: int) -> dict[str, Any]:
        executor = make_executor(plan)
        seen = train(executor, 0, 2, documents=True)
        return {"seen": seen, "differences": executor.executed().differences(plan)}

    for answer in on_ranks(body, plan.strategy.degrees.world):
        seen = [value for pair in answer["seen"] for value in pair]
        assert seen == pytest.approx(expected, rel=TOLERANCE)
        assert answer["differences"] == []


def test_compiled_blocks_are_compiled_once_for_all_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two kinds, by documents and by chunks with a mask; one of them recomputes."""
    usual = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: usual(*a, **(k | {"backend": "aot_eager"})))
    plain = replace(GEMMA, arithmetic=Arithmetic())
    stage = Stage(first=0, end=2, recompute=RecomputeCounts(none=1, selective=1))
    plan = make_plan(plain, batch8(micro_batch=4), (stage,))

    def body(rank: int) -> Any:
        from torch._dynamo.utils import counters

        executor = Executor(plan, device="cpu", seed=SEED, optimizer_options=OPTIONS, compiled=True)
        seen, graphs = [], []
        for step in range(2):
            seen += train(executor, step, 1, documents=True)
            graphs.append(counters["stats"]["unique_graphs"])
        return seen, graphs

    ((seen, graphs),) = on_ranks(body, 1)
    expected = single_process(plan, 2, documents=True)
    assert [v for pair in seen for v in pair] == pytest.approx(
        [v for pair in expected for v in pair], rel=1e-5
    )
    assert 0 < graphs[0] == graphs[1], "other documents do not compile anew"


# --------------------------------------------------------------------------------------- from data


WORDS = [["a b c d e"], ["f"], ["g h i j k l m n o p q r s t"], ["u v"], ["w x y z"] * 9]
DOCUMENTS = [" ".join(text) for text in WORDS]


def write_documents(path: Path, *, copies: int = 1) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS * copies))
    return path


def data_options(path: Path, **given: Any) -> DataOptions:
    return DataOptions(data=(str(path),), tokenizer="byte", **given)


def test_borders_of_samples_are_those_of_the_documents_in_them(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a.jsonl", copies=3)
    (tmp_path / "b.jsonl").write_text(path.read_text() * 2)
    options = DataOptions(data=(f"{path}:0.5", f"{tmp_path}/b.jsonl:0.5"), tokenizer="byte")
    index = prepare_data(options, vocab=300, cache=tmp_path / "cache", borders=True)
    data = open_data(index)
    assert data.index.documents == 45 and data.documents is not None
    assert "attention within documents (45)" in data_summary(data.index, document_mask=True)
    reader = BatchReader(data=data, seed=1, seq=7, batch=4, weights=(0.5, 0.5))
    places_met = set()
    for step in range(60):
        rows = reader.rows(step, data_rank=1, data_size=2)
        begins = reader.begins(step, data_rank=1, data_size=2)
        assert begins.shape == (2, 7)
        for row, places in zip(rows, begins, strict=True):
            begin = 0
            for place, token in enumerate(row[:-1]):
                assert places[place] == begin
                if token == 0:  # the end-of-text token of plain bytes
                    begin = place + 1
                    places_met.add(begin)
    assert places_met == set(range(1, 8)), "at the first and behind the last token, too"


def test_borders_that_an_older_cache_lacks_are_made_and_damage_is_found(tmp_path: Path) -> None:
    options = data_options(write_documents(tmp_path / "a.jsonl"))

    def prepare(borders: bool) -> Path:
        return prepare_data(options, vocab=300, cache=tmp_path / "cache", borders=borders)

    index = prepare(False)
    old = json.loads(index.read_text())
    del old["documents"], old["documents_sha256"]
    index.write_text(json.dumps(old))
    assert prepare(False) == index and open_data(index).documents is None, "it goes on being used"
    assert prepare(True) == index
    ends = open_data(index).documents
    assert ends is not None and np.diff(ends, prepend=0).tolist() == [len(text) + 1 for text in DOCUMENTS]
    index.with_suffix(".documents").write_bytes(b"\0" * 40)
    with pytest.raises(InputError, match=r"\.documents: does not match its checksum"):
        open_data(index)


def test_a_run_within_documents_says_so_and_goes_on_as_such_only(tmp_path: Path) -> None:
    plan = make_plan(tiny_llama(vocab=258, layers=2), Degrees(pp=2, micro_batch=1, num_micro_batches=2))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:2] * 40))
    data = data_options(path)

    def run(folder: str, steps: int, **given: Any) -> TrainSummary:
        options = TrainOptions(steps=steps, run_dir=str(tmp_path / folder), data=data, lr=1e-2, **given)
        summary = run_training(plan, options, shown=False)
        assert summary is not None
        return summary

    within, over = run("within", 1, document_mask=True), run("over", 1)
    assert "attention within documents (80)" in within.data and "attention" not in over.data
    assert within.first_loss != over.first_loss and not within.executed_differences
    assert run("within", 2, document_mask=True, resume=True).last_step == 2
    with pytest.raises(InputError, match="document_mask: is True in the checkpoint, 'absent' now"):
        run("within", 3, resume=True)
    with pytest.raises(InputError, match="--document-mask: is given with --backend transformers"):
        run("other", 1, document_mask=True, hf_config=str(tmp_path))
