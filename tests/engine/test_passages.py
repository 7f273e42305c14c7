from __future__ import annotations

import itertools

import pytest

from edgemoe.demo.tasks import TASKS
from edgemoe.passages import LENGTH, PROMPT, Passage, built_in_texts, conversations, cut, limited


def predicted(passages: list[Passage]) -> list[int]:
    """The tokens that are predicted, in order; in these tests a token is its place."""
    return [token for passage in passages for token in passage.tokens[passage.prompt + 1 :]]


def test_a_short_text_is_one_passage_whose_first_quarter_is_the_prompt() -> None:
    assert cut([list(range(8))], 4096) == [Passage(list(range(8)), 2)]
    assert cut([[1, 2, 3]], 4096) == [Passage([1, 2, 3], 1)]
    assert cut([list(range(300))], 4096) == [Passage(list(range(300)), PROMPT)]


def test_texts_with_nothing_to_predict_give_nothing() -> None:
    assert cut([[], [1], [1, 2]], 4096) == []
    assert cut([list(range(50))], context=2) == []


@pytest.mark.parametrize("context", [3, 7, 64, 300, 100_000])
@pytest.mark.parametrize("tokens", [3, 64, 513, 1500])
@pytest.mark.parametrize("first", [None, 0])
def test_a_long_text_is_cut_so_that_nearly_all_of_it_is_predicted_once(
    context: int, tokens: int, first: int | None
) -> None:
    passages = cut([list(range(tokens))], context, first)
    assert all(len(passage.tokens) <= min(LENGTH, context) for passage in passages)
    assert all(passage.predicted >= 1 and passage.prompt >= 1 for passage in passages)
    if first is not None and passages:
        assert {passage.tokens[0] for passage in passages} == {first}
    found = predicted(passages)
    assert found == sorted(set(found))
    # The first after each prompt is left out, and so is a rest that is too short; with nothing in front of a text
    # or a token that its model wants there.
    if context > 3 + (first is not None):
        assert len(found) >= tokens - PROMPT - 3 * len(passages)


def test_each_passage_begins_with_the_tokens_before_what_it_predicts() -> None:
    first, second, *_ = cut([list(range(1200))], 4096)
    assert second.tokens[: second.prompt] == first.tokens[-second.prompt :]


def test_only_a_text_that_has_the_first_token_has_it_in_all_passages() -> None:
    with_it, without = list(range(7, 1200)), list(range(8, 1200))
    assert [passage.tokens[0] for passage in cut([with_it], 512, first=7)] == [7, 7, 7]
    assert 7 not in [passage.tokens[0] for passage in cut([without], 512, first=7)]


def test_texts_take_turns_up_to_the_limit() -> None:
    one, two = list(range(1000)), list(range(1000, 1100))
    passages = cut([one, two], 4096)
    assert [passage.tokens[0] // 1000 for passage in passages] == [0, 1, 0, 0][: len(passages)]
    kept = limited(passages, 460)
    assert sum(passage.predicted for passage in kept) == 460
    assert kept[0] == passages[0]
    assert kept[1].tokens == passages[1].tokens[: len(kept[1].tokens)]
    assert limited(passages, 10**9) == passages
    assert limited(passages, 0) == []


def test_the_built_in_texts_are_of_several_kinds_and_about_as_long() -> None:
    texts = built_in_texts()
    code, dialogue, numbers, prose = texts
    assert "def parse(" in code
    assert '"I said' in dialogue
    assert "| March |" in numbers
    assert "lighthouse" in prose
    assert all(1500 < len(text.encode()) < 2500 for text in texts)


def test_conversations_take_the_tasks_in_turn_and_repeat_no_question() -> None:
    passages = conversations(lambda text: text.encode(), lambda text: [*text.encode(), 0], 4000)
    assert sum(passage.predicted for passage in passages) == 4000
    asked = [bytes(passage.tokens[: passage.prompt]).decode() for passage in passages]
    assert len(set(asked)) == len(asked)
    held_out = {
        task.name: {item.user: item.reply for item in itertools.islice(task.items(1, held_out=True), 400)}
        for task in TASKS
    }
    for passage, question, task in zip(passages[:-1], asked[:9], TASKS, strict=False):
        reply = bytes(passage.tokens[passage.prompt : -1]).decode()
        assert held_out[task.name][question] == reply
        assert passage.tokens[-1] == 0
