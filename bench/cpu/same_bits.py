"""`same-bits`: logits of tokens in one pass, a chain, a tree or a batch, against those of steps of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from bench.measurement import BaseSize, Measurement
from bench.support.engine_parts import runner_of
from bench.support.gguf_files import GgufMaker
from bench.support.packing import PACKINGS, mxfp4_checkpoint, packed_checkpoint
from bench.support.zoo import TESTED, make
from edgemoe import Engine
from edgemoe.formats.gguf_format import BLOCKS
from edgemoe.kernels.cpu import threads as kernel_threads
from edgemoe.model.draft_tree import DraftTree
from edgemoe.model.kv_cache import SequenceCache
from edgemoe.model.model_runner import ModelRunner, tree_input
from edgemoe.model.sequential_runner import PassInput
from edgemoe.quiet import quiet_transformers

NAME = "same-bits"
BAR = (
    "every logit has the bits of a step of its own, and a prompt of many tokens those of a pass of its own, "
    "in every format and family that shares a pass, on 1 and 2 threads"
)
WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "head_dim": 64, "mlp_only_layers": [],
    "decoder_sparse_step": 1, "norm_topk_prob": True,
}  # fmt: skip
"""Rows of whole blocks of every format."""
WIDER: dict[str, dict[str, Any]] = {
    "gpt_oss": {"hidden_size": 1024, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {"hidden_size": 2048, "num_hidden_layers": 2},
}
"""Wide enough for a router's kernel, and for norms of a long prompt that PyTorch's threads would share."""
CONTEXT = 256
BEGUN = 4
"""Tokens before the tree."""
Make = Callable[[Path], dict[str, Any]]
"""Makes a checkpoint in a folder; how an engine is loaded with it."""


@dataclass(frozen=True, kw_only=True)
class Size(BaseSize):
    """What is compared: formats by parts of their names (all where there are none), families, and passes."""

    formats: tuple[str, ...] = ()
    families: tuple[str, ...] = TESTED
    threads: tuple[int, ...] = (1, 2)
    chains: tuple[int, ...] = (2, 3, 4, 5, 8, 9, 16, 33, 64)
    batches: tuple[int, ...] = (2, 3, 8, 32, 96)
    crowds: tuple[tuple[int, ...], ...] = ((1, 40, 1, 64, 3), (1, 100, 1), (70, 1, 130, 9, 200, 1))
    """Tokens of sequences that share a pass: steps, short prompts and long ones."""
    tree: int = 8
    """Depth of the tree, each of whose tokens has a sibling before it."""


FULL = Size()
SMALL = Size(
    small=True,
    formats=("Q4_K", "bf16"),
    families=("mixtral",),
    threads=(1,),
    chains=(3,),
    batches=(2,),
    crowds=((1, 70),),
    tree=2,
)


def run(size: Size = FULL) -> Measurement:
    """Qwen3-MoE in every format, and every family in bf16 and float32. Tiny checkpoints."""
    wrong: dict[str, Any] = {}
    alone: list[str] = []
    limited: list[str] = []
    passes = 0
    for name, make_it in _cases(size):
        with tempfile.TemporaryDirectory(prefix="edgemoe-bits-") as folder, quiet_transformers():
            found = _compared(make_it(Path(folder)), size)
        passes += len(found)
        if not found:
            alone.append(name)
        elif not any(each.startswith("crowd") for each in found):
            limited.append(name)
        different = sorted(each for each, same in found.items() if not same)
        if different:
            wrong[name] = different
            print(f"{name}: {different}", flush=True)
    value = {"passes": passes, "wrong": sorted(wrong), "share no pass": alone, "share short passes": limited}
    return Measurement(NAME, value, BAR, not wrong, wrong)


def _cases(size: Size) -> Iterator[tuple[str, Make]]:
    """By what they are called."""
    for name, make_it in _formats():
        if not size.formats or any(part in name for part in size.formats):
            yield name, make_it
    for family in size.families:
        for dtype in ("bfloat16", "float32"):
            yield f"{family} {dtype}", _floats(family, dtype)
            if family in WIDER:
                yield (
                    f"{family} of {WIDER[family]['hidden_size']} columns {dtype}",
                    _floats(family, dtype, WIDER[family]),
                )


def _formats() -> Iterator[tuple[str, Make]]:
    for dtype in ("bfloat16", "float16", "float32"):
        yield f"floats {dtype}", _floats("qwen3_moe", dtype, WIDE)
    for kind in (*BLOCKS, "F16", "BF16", "F32"):
        yield f"GGUF {kind}", _gguf(kind)
    for packing in PACKINGS:
        yield packing, _packed(packing)
    yield "mxfp4", lambda folder: {"model": mxfp4_checkpoint(make("gpt_oss", folder))}
    for experts in ("int8", "nf4", "fp4", "int4"):
        yield f"made here {experts}", _made_here(experts)


def _floats(family: str, dtype: str, config: Mapping[str, Any] | None = None) -> Make:
    return lambda folder: {"model": make(family, folder, **config or {}), "dtype": dtype}


def _gguf(kind: str) -> Make:
    def make_it(folder: Path) -> dict[str, Any]:
        maker, number = GgufMaker(make("qwen3_moe", folder / "hf", **WIDE)), GGMLQuantizationType[kind]
        return {"model": maker.write(folder / "model.gguf", number, number)}

    return make_it


def _packed(packing: str) -> Make:
    return lambda folder: {"model": packed_checkpoint(make("qwen3_moe", folder, **WIDE), PACKINGS[packing])}


def _made_here(experts: str) -> Make:
    def make_it(folder: Path) -> dict[str, Any]:
        dense = experts if experts in ("int8", "nf4") else "native"
        return {"model": make("qwen3_moe", folder, **WIDE), "experts": experts, "dense": dense}

    return make_it


def _compared(settings: Mapping[str, Any], size: Size) -> dict[str, bool]:
    """By pass that is said to be so, whether its logits have the bits of single steps; nothing where none is shared.

    The single steps are those of the first number of threads.
    """
    options: dict[str, Any] = {"device": "cpu", "context": CONTEXT, "state_folder": "none"}
    expected: _SingleSteps | None = None
    found = {}
    for threads in size.threads:
        with _every_product_split(), Engine.load(threads=threads, **options, **settings) as engine:
            runner = runner_of(engine)
            if not runner.packs:
                return {}
            expected = expected or _SingleSteps(runner, size)
            for name, same in _passes(runner, expected, size):
                found[f"{name}, {threads} threads"] = same
    return found


@contextmanager
def _every_product_split() -> Iterator[None]:
    """In the block kernels use all threads for products of any size."""
    least, kernel_threads.MIN_SPLIT_NBYTES = kernel_threads.MIN_SPLIT_NBYTES, 0
    try:
        yield
    finally:
        kernel_threads.MIN_SPLIT_NBYTES = least


def _passes(runner: ModelRunner, expected: _SingleSteps, size: Size) -> Iterator[tuple[str, bool]]:
    """Whether each pass agrees."""
    single, logits = expected.sequence, expected.logits
    for length in size.chains:
        # As drafts are verified: a prompt enters recurrent states in another way than single steps.
        own = PassInput(runner.start(CONTEXT), single.tokens[:length], every=True, verifies=True)
        yield f"chain of {length}", torch.equal(runner.run([own])[0], torch.stack(logits[:length]))
    if runner.verifies == "tree":
        yield f"tree of depth {size.tree}", _tree_agrees(runner, single.tokens, logits, size.tree)
    for batch in size.batches:
        inputs = _crowd(runner, [1] * batch)
        if runner.sequential.batch_invariant(inputs):
            yield f"batch of {batch}", all(map(torch.equal, expected.of_batch[:batch], runner.run(inputs)))
    for crowd, alone in zip(size.crowds, expected.of_crowds, strict=True):
        inputs = _crowd(runner, crowd)
        if runner.sequential.batch_invariant(inputs):
            yield f"crowd of {crowd}", all(map(torch.equal, alone, runner.run(inputs)))


class _Sequence:
    """A sequence of tokens of its own, run one by one."""

    def __init__(self, runner: ModelRunner, seed: int) -> None:
        self._runner = runner
        self.cache: SequenceCache = runner.start(CONTEXT)
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(3, runner.vocabulary, (CONTEXT,), generator=generator).tolist()

    def step(self) -> torch.Tensor:
        """Appends the next token; the logits after it."""
        return self._runner.step(self.cache, [self.next])

    @property
    def next(self) -> int:
        """The token that follows."""
        return int(self.tokens[self.cache.tokens])


def _begun(runner: ModelRunner, number: int) -> _Sequence:
    """A sequence of a few tokens: how many depends on its number."""
    sequence = _Sequence(runner, number)
    for _ in range(1 + number % 7):
        sequence.step()
    return sequence


def _crowd(runner: ModelRunner, crowd: Sequence[int]) -> list[PassInput]:
    """Sequences that are given so many tokens; those with one token have some already."""
    made = []
    for number, count in enumerate(crowd):
        sequence = _begun(runner, number) if count == 1 else _Sequence(runner, number)
        done = sequence.cache.tokens
        made.append(PassInput(sequence.cache, sequence.tokens[done : done + count]))
    return made


def _alone(runner: ModelRunner, crowd: Sequence[int]) -> list[torch.Tensor]:
    """The last logits of each sequence of a crowd, after a pass of its own."""
    return [runner.run([each])[0] for each in _crowd(runner, crowd)]


class _SingleSteps:
    """Logits of tokens that are computed one by one."""

    def __init__(self, runner: ModelRunner, size: Size) -> None:
        self.sequence = _Sequence(runner, 0)
        self.logits = [self.sequence.step() for _ in range(max(*size.chains, BEGUN + size.tree))]
        self.of_batch = _alone(runner, [1] * max(size.batches))
        """After one more token of each sequence of the largest batch."""
        self.of_crowds = [_alone(runner, crowd) for crowd in size.crowds]


def _tree_agrees(runner: ModelRunner, tokens: list[int], logits: list[torch.Tensor], depth: int) -> bool:
    """The tree's path through the right tokens, after the first ones in a pass of their own."""
    cache = runner.start(CONTEXT)
    runner.run([PassInput(cache, tokens[:BEGUN], verifies=True)])
    cache.mark()
    tree, path = DraftTree(tokens[BEGUN]), [0]
    for token in tokens[BEGUN + 1 : BEGUN + depth]:
        tree.add(path[-1], (token + 1) % runner.vocabulary, 0.5)
        path.append(tree.add(path[-1], token, 0.5))
    found = runner.run([tree_input(cache, tree, range(len(tree)), ())])[0]
    return torch.equal(found[path], torch.stack(logits[BEGUN : BEGUN + depth]))
