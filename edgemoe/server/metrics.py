"""The figures of a server for Prometheus, in its text format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from edgemoe.plan.plan import Plan
from edgemoe.results import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metric(NamedTuple):
    """A figure: its name without "edgemoe_", its kind ("counter" or "gauge"), its meaning, its values by labels."""

    name: str
    kind: str
    help: str
    values: Mapping[str, float]
    """By the text between the braces, such as `drafter="ngram"`; the empty text is no label."""


def engine_metrics(stats: Stats, plan: Plan) -> list[Metric]:
    """The figures of a loaded engine; counters begin at 0 with each loading."""
    return [
        _counter("requests", "Replies that the engine was asked for.", stats.requests),
        _counter("prompt_tokens", "Tokens of prompts.", stats.tokens_prompt),
        _counter("prefix_tokens", "Prompt tokens reused from another request's KV cache.", stats.prefix_tokens),
        _counter("generated_tokens", "Tokens of replies.", stats.tokens_generated),
        _counter("steps", "Passes over the model, each for all running sequences.", stats.steps),
        _counter("step_seconds", "Time in steps.", stats.seconds),
        _counter("preemptions", "Requests whose KV cache was dropped and computed again.", stats.preemptions),
        _counter("expert_hits", "Requested experts that were resident.", stats.hits),
        _counter("expert_misses", "Requested experts that were not resident.", stats.misses),
        _counter("expert_misses_by_cpu", "Misses that the CPU computed.", stats.computed_by_cpu),
        _labelled(
            "expert_bytes", "Expert bytes, by what became of them.", "kind",
            {
                "hit": stats.bytes_hit, "demanded": stats.bytes_demanded, "filled": stats.bytes_filled,
                "prefetched_used": stats.bytes_prefetched_used, "prefetched_late": stats.bytes_prefetched_late,
                "prefetched_wasted": stats.bytes_prefetched_wasted,
            },
        ),
        _counter("link_wait_seconds", "Time for which computation waited for the link.", stats.link_wait_seconds),
        _counter("draft_cycles", "Verifications of at least one drafted token.", stats.cycles),
        _labelled("drafted_tokens", "Drafted tokens.", "drafter", stats.drafted_by),
        _labelled("accepted_tokens", "Drafted tokens that are in replies.", "drafter", stats.accepted_by),
        _counter("draft_seconds", "Time spent drafting.", stats.draft_seconds),
        _counter("verify_seconds", "Time of steps with a verification.", stats.verify_seconds),
        gauge("batch", "Most sequences that are decoded together.", stats.batch),
        gauge("draft_utility", "Tokens per cycle over its time in plain steps.", stats.utility),
        gauge("expert_slots", "Slots of the expert cache.", stats.slots),
        gauge("experts", "Experts of the model.", stats.experts),
        gauge("expert_cache_bytes", "Memory of the expert cache.", plan.cache_nbytes),
        gauge("kv_cache_bytes", "Memory planned for KV caches.", plan.kv_nbytes),
        gauge("dense_bytes", "Memory of the weights that are no experts.", plan.dense_nbytes),
        gauge("context_tokens", "Longest sequence.", plan.context),
    ]  # fmt: skip


def gauge(name: str, help: str, value: float) -> Metric:
    """A figure that goes up and down."""
    return Metric(name, "gauge", help, {"": value})


def responses(by_status: Mapping[int, int]) -> Metric:
    """The answers of the server by their HTTP status."""
    return _labelled("http_responses", "HTTP answers.", "code", {str(code): count for code, count in by_status.items()})


def _counter(name: str, help: str, value: float) -> Metric:
    return Metric(f"{name}_total", "counter", help, {"": value})


def _labelled(name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
    return Metric(f"{name}_total", "counter", help, {f'{label}="{key}"': value for key, value in values.items()})


def exposition(metrics: Iterable[Metric]) -> str:
    """`metrics` in the text format."""
    lines = []
    for metric in metrics:
        name = f"edgemoe_{metric.name}"
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
        for labels, value in metric.values.items():
            lines.append(f"{name}{{{labels}}} {value}" if labels else f"{name} {value}")
    return "\n".join(lines) + "\n"
