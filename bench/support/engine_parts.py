"""The parts of a loaded engine that measurements look into: the only place that knows where an engine keeps them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig

from edgemoe import Engine
from edgemoe.cache import ExpertCache, Link
from edgemoe.draft.speculation import Speculation
from edgemoe.model.model_runner import ModelRunner


def runner_of(engine: Engine) -> ModelRunner:
    """What runs the passes of `engine`."""
    return engine._loop.runner.model


def cache_of(engine: Engine) -> ExpertCache:
    """The experts that `engine` holds."""
    return engine._loaded().cache


def link_of(engine: Engine) -> Link:
    """What brings experts to `engine`."""
    return engine._loaded().link


def speculation_of(engine: Engine) -> Speculation:
    """What proposes the drafts of `engine` and learns from them."""
    return engine._loop.speculation


class TimedKernels:
    """Used as a context manager: in the block the time in which an engine's kernels run is summed."""

    def __init__(self, engine: Engine) -> None:
        self.seconds = 0.0
        self._threads = engine._loaded().kernel_threads

    def __enter__(self) -> TimedKernels:
        run = self._threads.run

        def timed(*arguments: Any, **named: Any) -> None:
            started = time.perf_counter()
            run(*arguments, **named)
            self.seconds += time.perf_counter() - started

        self._threads.run = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *unused: object) -> None:
        del self._threads.run


def weights_nbytes_per_token(engine: Engine) -> int:
    """Bytes of the weights that one token must read: every matrix but the embedding's, and top-k experts a layer."""
    plan = engine.plan
    return plan.dense_nbytes - _embedding_nbytes(engine) + plan.layers * plan.top_k * plan.record_nbytes


def _embedding_nbytes(engine: Engine) -> int:
    """Bytes of the input embeddings of `engine`, of which a token reads one row; 0 where they are the head as well."""
    model = runner_of(engine).sequential.model
    embedding, head = (_weight(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    return 0 if embedding is head else int(embedding.nbytes)


def _weight(layer: Any) -> Any:
    """What has the bytes of `layer`'s weight."""
    return layer.packed if hasattr(layer, "packed") else layer.weight


@contextmanager
def generation_defaults(engine: Engine, defaults: GenerationConfig) -> Iterator[None]:
    """In the block requests are submitted as if the checkpoint of `engine` had `defaults`."""
    before, engine._texts = engine._texts, replace(engine._texts, defaults=defaults)
    try:
        yield
    finally:
        engine._texts = before


def token_texts(engine: Engine, tokens: Sequence[int]) -> list[str]:
    """What each of `tokens` is as text, with signs for white space."""
    signs = str.maketrans(" \n", "\N{OPEN BOX}\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    return [str(engine._texts.tokenizer.decode([token])).translate(signs) for token in tokens]
