from __future__ import annotations

import itertools

import pytest

from edgemoe.demo.tasks import TASKS
from edgemoe.measure.eval_texts import MAX_LENGTH, PROMPT, EvalText, built_in_texts, conversations, limited, split_texts


def predicted(eval_texts: list[EvalText]) -> list[int]:
    """The predicted tokens in order; in these tests, each token is its own position."""
    return [token for eval_text in eval_texts for token in eval_text.tokens[eval_text.prompt + 1 :]]


def test_a_short_text_is_one_eval_text_whose_first_quarter_is_the_prompt() -> None:
    assert split_texts([list(range(8))], 4096) == [EvalText(list(range(8)), 2)]
    assert split_texts([[1, 2, 3]], 4096) == [EvalText([1, 2, 3], 1)]
    assert split_texts([list(range(300))], 4096) == [EvalText(list(range(300)), PROMPT)]


def test_texts_with_nothing_to_predict_give_nothing() -> None:
    assert split_texts([[], [1], [1, 2]], 4096) == []
    assert split_texts([list(range(50))], context=2) == []


@pytest.mark.parametrize("context", [3, 7, 64, 300, 100_000])
@pytest.mark.parametrize("tokens", [3, 64, 513, 1500])
@pytest.mark.parametrize("first", [None, 0])
def test_a_long_text_is_split_so_that_nearly_all_of_it_is_predicted_once(
    context: int, tokens: int, first: int | None
) -> None:
    eval_texts = split_texts([list(range(tokens))], context, first)
    assert all(len(eval_text.tokens) <= min(MAX_LENGTH, context) for eval_text in eval_texts)
    assert all(eval_text.predicted >= 1 and eval_text.prompt >= 1 for eval_text in eval_texts)
    if first is not None and eval_texts:
        assert {eval_text.tokens[0] for eval_text in eval_texts} == {first}
    found = predicted(eval_texts)
    assert found == sorted(set(found))
    # Neither the first token after each prompt is predicted nor a rest that is too short.
    if context > 3 + (first is not None):
        assert len(found) >= tokens - PROMPT - 3 * len(eval_texts)


def test_each_eval_text_begins_with_the_tokens_before_what_it_predicts() -> None:
    first, second, *_ = split_texts([list(range(1200))], 4096)
    assert second.tokens[: second.prompt] == first.tokens[-second.prompt :]


def test_only_the_parts_of_a_text_with_bos_begin_with_it() -> None:
    with_it, without = list(range(7, 1200)), list(range(8, 1200))
    assert [eval_text.tokens[0] for eval_text in split_texts([with_it], 512, bos=7)] == [7, 7, 7]
    assert 7 not in [eval_text.tokens[0] for eval_text in split_texts([without], 512, bos=7)]


def test_texts_take_turns_up_to_the_limit() -> None:
    one, two = list(range(1000)), list(range(1000, 1100))
    eval_texts = split_texts([one, two], 4096)
    assert [eval_text.tokens[0] // 1000 for eval_text in eval_texts] == [0, 1, 0, 0][: len(eval_texts)]
    kept = limited(eval_texts, 460)
    assert sum(eval_text.predicted for eval_text in kept) == 460
    assert kept[0] == eval_texts[0]
    assert kept[1].tokens == eval_texts[1].tokens[: len(kept[1].tokens)]
    assert limited(eval_texts, 10**9) == eval_texts
    assert limited(eval_texts, 0) == []


def test_the_built_in_texts_are_of_several_kinds_and_about_as_long() -> None:
    texts = built_in_texts()
    code, dialogue, numbers, prose = texts
    assert "def parse(" in code
    assert '"I said' in dialogue
    assert "| March |" in numbers
    assert "lighthouse" in prose
    assert all(1500 < len(text.encode()) < 2500 for text in texts)


def test_conversations_take_the_tasks_in_turn_and_repeat_no_question() -> None:
    eval_texts = conversations(lambda text: text.encode(), lambda text: [*text.encode(), 0], 4000)
    assert sum(eval_text.predicted for eval_text in eval_texts) == 4000
    asked = [bytes(eval_text.tokens[: eval_text.prompt]).decode() for eval_text in eval_texts]
    assert len(set(asked)) == len(asked)
    held_out = {
        task.name: {item.user: item.reply for item in itertools.islice(task.items(1, held_out=True), 400)}
        for task in TASKS
    }
    for eval_text, question, task in zip(eval_texts[:-1], asked[:9], TASKS, strict=False):
        reply = bytes(eval_text.tokens[eval_text.prompt : -1]).decode()
        assert held_out[task.name][question] == reply
        assert eval_text.tokens[-1] == 0
