"""Use edgemoe from Python: load a model, ask, stream, and look at what it took.

    python examples/library.py [MODEL]

Without MODEL, the small demo model that ships with edgemoe answers.
"""

from __future__ import annotations

import sys

from edgemoe import Engine, Sampling


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    with Engine.load(model) as engine:
        for what, how_much, where in engine.plan.lines():
            print(f"{what}: {how_much} ({where})")

        question = [{"role": "user", "content": "What is the capital of Norway?"}]
        answer = engine.chat(question, Sampling(temperature=0, max_tokens=40))
        print("\n" + answer["choices"][0]["message"]["content"])

        story = engine.chat_prompt([{"role": "user", "content": "Tell me a story about an owl named Hugo and a lamp."}])
        timings = None
        for chunk in engine.stream(story, Sampling(temperature=0.8, seed=7, max_tokens=120)):
            print(chunk.text, end="", flush=True)
            timings = chunk.timings
        print()
        if timings is not None:
            print(f"\n{timings.generated_per_second:.1f} tokens/s, expert hit rate {timings.hit_rate:.0%}")


if __name__ == "__main__":
    main()
