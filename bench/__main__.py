"""`python -m bench` lists the measurements; `python -m bench NAME` runs one and ends with a line of JSON."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import replace
from types import ModuleType

from bench.measurement import Measurement
from bench.support.isa import CAPS, run_again_capped

MEASUREMENTS = {
    "exactness": {
        "exact": "token ids and logits of every tested family against transformers",
        "bad-input": "one clear sentence for every kind of bad input",
        "demo-score": "the shipped model on held-out items of its documented tasks",
        "generate-parity": "replies under random generation settings against transformers' generate",
        "text-parity": "streamed text against the text of all ids, for every decoder and tokenizer class",
        "logprobs": "log-probabilities against the log-softmax of transformers' logits",
        "formats": "what every packed format reads back, against its definition",
        "native-exact": "packed checkpoints against transformers on the same values in float32",
        "gguf-peer": "GGUF files made by llama.cpp against llama.cpp's own logits of them",
        "batch-exact": "32 mixed requests together against one by one, every tested family",
        "spec-exact": "greedy replies with every way of drafting against plain decoding, every tested family",
        "rewind-exact": "verifications of families with states or indexers against single steps, bit for bit",
        "spec-sampled": "the distribution of the first tokens with drafts against the exact one",
        "mtp-exact": "replies with a checkpoint's own draft head against plain decoding, and its drafts",
        "inflated-demo": "the widened shipped model says what the shipped one says",
    },
    "field": {
        "field": "situations from public reports about other engines, each with its right result",
        "newcomer": "the README's commands in a fresh environment, and where something is missing",
    },
    "cache": {
        "memory": "peak memory with an 8 GB checkpoint and a 1 GiB expert cache",
        "larger-than-memory": "decoding an 8 GB checkpoint in 4 GB of memory against transformers + accelerate",
        "resident": "decode and prefill with all experts in memory against transformers and the floor",
        "before-after": "this checkout against another version, named in EDGEMOE_BENCH_OTHER, alternating",
        "start": "time to the first token, and of --help",
        "perfect-drafts": "the loads a token at batch 1 if all drafts are right, on recorded routing",
        "cache-policy": "the default eviction policy on recorded traces against Belady's optimum, LRU, LFU and mixes",
        "warm-start": "expert bytes that the first 64 tokens wait for, after an earlier run and without one",
    },
    "packed": {
        "quality": "what quantised experts of the shipped model cost, against bf16",
        "pack": "an 8 GB checkpoint to nf4: peak memory, size, and killed ten times",
        "bits-pay": "16, 8 and 4 bits an expert weight with one cache size, over the disk and a 4 GB/s link",
        "load": "bytes a second from a cold disk into slots, packed, against the disk's own",
    },
    "cpu": {
        "llamacpp-resident": "decode and prefill of GGUF files in memory against llama.cpp and the floor",
        "same-bits": "logits of chains, trees and batches against single steps, bit for bit, every format and family",
        "llamacpp-capped": "GGUF files larger than memory, cold, against llama.cpp's memory map and the floor",
        "floor": "spec-floor's cells in bf16 and 4 bit, with the share of every part",
        "busy-neighbour": "a long prompt beside another busy process, against the same prompt alone",
        "sampler": "the time of one sample of 152,000 logits, with every usual setting and with less",
        "cpu-kernels": "bytes and weights a second of every format's kernels, by tokens, against the memory's own",
    },
    "batch": {
        "batch-sharing": "tokens/s and bytes moved per token at batch 1 to 256, a quarter of the experts cached",
        "batch-on-demand": "batch 64 against loading every needed expert for every sequence",
        "batch-fair": "how long requests wait in an adversarial mix of long and short ones",
        "batch-peer": "16 sequences at once, all experts in memory, against transformers' generate",
        "batch-resume": "a run that is killed twenty times and resumed, against one that is left alone",
        "batch-memory": "peak memory of a run on 100,000 lines against one on 100",
    },
    "speculation": {
        "spec-forecast": "what a self-draft's routing says of the verification, and of the bytes moved for it",
        "spec-tree": "draws a real draft tree of the shipped model with its experts",
        "spec-floor": "a cycle's time against its floor, over caches and links",
        "spec-batch1": "prefetching and drafts at batch 1, over caches and links, against demanded loads alone",
        "spec-batch32": "batches of 32 and 128 with drafts against loading on demand without a cache",
        "specmoe": "batches of 32 to 256 with long replies against loading on demand",
        "mtp-gain": "the shipped model's draft head against no drafts, and the default without it, at batch 1",
        "never-slower": "the default speculation against none: every task, cache, link and temperature",
        "adapts": "the default speculation on a mixed workload against the best fixed setting",
        "switches": "cycles until the setting changes when a stream turns from copying to arithmetic",
        "budget": "speed and loss of an expert budget against exact speculation",
        "budget-curve": "the same from a tight budget to one that holds everything, drawn",
        "speedup-model": "predicted speed-ups against cycles that were not fitted, over batches, depths and caches",
        "rewind-cost": "a verification of a hybrid family, all experts resident, against single steps",
        "inverted-u": "speed-up over batch, all experts resident, for sparse and dense routing",
    },
    "guest": {
        "serve-clients": "the server's clients, 64 at once, slow ones and leavers, against the library's replies",
        "fuzz": "a million mutated and broken inputs of every reader of foreign files: errors, hangs, memory",
        "give-back": "another process takes memory in steps, and gives it back: the cache and the replies meanwhile",
        "cancel": "how long replies and engines take to end at random moments, against one layer's time",
        "interrupt": "KeyboardInterrupt at random moments of library calls and chats: what hangs, is lost or wrong",
        "faults": "faults of disks, links, memory and files in every phase: a clear error or the right reply",
        "soak": "an hour of everything at once, with the laws of slots, pins, bytes and replies",
        "close": "memory, threads and files after twenty engines that were closed or dropped",
    },
    "no_card": {
        "device-census": "what a step queues on a card and what the host waits for, counted without one",
        "device-kernels": "every format's kernels for cards against the plain form, in Triton's interpreter",
        "device-order": "table patches, copies, evictions and launches over random schedules of a stand-in device",
        "device-plan": "bytes that loading and decoding take of a card, counted without one, against the plan",
    },
    "device": {
        "device": "what the CUDA path does on a card: whether it is right, and the figures that decide its design",
    },
}
"""Names and what they measure, by the folder that they are in."""
NAMES = {name: description for group in MEASUREMENTS.values() for name, description in group.items()}


def load(name: str) -> ModuleType:
    """The module of the measurement called `name`."""
    folder = next(folder for folder, names in MEASUREMENTS.items() if name in names)
    return importlib.import_module(f"bench.{folder}.{name.replace('-', '_')}")


def measure(name: str, *, small: bool = False) -> Measurement:
    """Runs the measurement called `name`; where it is `small`, the same code in seconds, held against no bar."""
    module = load(name)
    if not small:
        measured: Measurement = module.run()
        return measured
    measured = module.run(module.SMALL)
    return replace(measured, bar=f"not judged, since the run is small: {measured.bar}", ok=None)


def main() -> int:
    """Runs the named measurement; exit status 0 unless it misses its bar."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="?", choices=list(NAMES))
    parser.add_argument("--small", action="store_true", help="the same in seconds on a tiny model, without a verdict")
    parser.add_argument("--isa", choices=list(CAPS), help="with these instructions and no newer ones")
    arguments = parser.parse_args()
    if arguments.isa:
        run_again_capped(arguments.isa)
    if arguments.name is None:
        for each, description in NAMES.items():
            print(f"{each:20} {description}")
        return 0
    measurement = measure(arguments.name, small=arguments.small)
    print(measurement.to_json())
    return 1 if measurement.ok is False else 0


if __name__ == "__main__":
    sys.exit(main())
