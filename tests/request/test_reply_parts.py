"""What the user is told and the reasoning before it, by special tokens, by texts, and in harmony."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from edgemoe.checkpoint.chat_template import ChatPrompt, ChatTemplate
from edgemoe.errors import RequestError
from edgemoe.request.reply_parts import HARMONY, OnePart, Piece, ReplyFormat, ReplyParts
from edgemoe.request.reply_text import ReplyText, ReplyTexts
from edgemoe.request.token_texts import TokenTexts
from edgemoe.sampling import Sampling, resolve

WORDS = [
    "<pad>", "hmm", " so", "\n", "\n\n", "Hello", "!", " Hi", "<", "th", "ink", ">", "</", "analysis", "final",
    "commentary", "assistant", " to=functions.f", "{}", "user", " ", "system",
]  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML + "{% if add_generation_prompt %}{{'<think>\n'}}{% endif %}"
SWITCHED = CHATML + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}"
)


def tokenizer(special: list[str], added: list[str] = [], template: str = CHATML) -> Any:  # noqa: B006
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    made.add_tokens([AddedToken(token, special=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, pad_token="<pad>")


class Said:
    """What a model says, token by token, and what becomes of it."""

    def __init__(self, tokenizer: Any, opening: list[str] = []) -> None:  # noqa: B006
        self.tokenizer = tokenizer
        self.texts = TokenTexts(tokenizer)
        self.format = ReplyFormat.of(self.texts, tokenizer.chat_template or "")
        self.opening = self.ids(opening)

    def ids(self, words: list[str]) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        return [vocabulary[word] for word in words]

    def parts(self) -> ReplyParts:
        return self.format.parts(self.texts, self.opening, self.opening)

    def __call__(self, *words: str) -> tuple[str, str]:
        """The content and the reasoning."""
        parts = self.parts()
        whole = Piece()
        for token in self.ids(list(words)):
            whole = whole.joined(parts.push(token))
        content, reasoning, _ = whole.joined(parts.finish())
        return content, reasoning

    def reasons(self, *words: str) -> list[str]:
        """Those that are said to be the reasoning's."""
        parts = self.parts()
        return [word for word, token in zip(words, self.ids(list(words)), strict=True) if parts.push(token).reasons]


SPANS = [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>")]
SPANS += [
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<reasoning>", "</reasoning>"),
]


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize("span", SPANS, ids=lambda span: span[0])
def test_a_span_between_tokens_is_reasoning(span: tuple[str, str], special: bool) -> None:
    said = Said(tokenizer(list(span) if special else ["<|im_end|>"], [] if special else list(span)))
    assert said(span[0], "\n", "hmm", " so", "\n", span[1], "\n\n", "Hello", "!") == ("Hello!", "hmm so")
    assert said("Hello", "!") == ("Hello!", "")
    assert said(span[0], "hmm", " so") == ("", "hmm so"), "cut off"
    assert said(span[0], "\n", span[1], "Hello") == ("Hello", "")
    assert said("Hello", span[0], "hmm", span[1], " Hi") == ("HelloHi", "hmm")


def test_tokens_after_a_span_are_not_the_reasonings_before_there_is_text() -> None:
    """As before a call of a tool, whose text is held back."""
    said = Said(tokenizer(list(SPANS[0])))
    words = ["<think>", "\n", "hmm", " so", "\n", "</think>", "\n\n", "\n", "Hello"]
    assert said.reasons(*words) == words[:6]


def test_a_span_may_be_marked_by_plain_text() -> None:
    """A checkpoint whose tokenizer has no token for the marks that its template has."""
    said = Said(tokenizer(["<|im_end|>"], template=THINKING + "{# </think> #}"))
    assert said("<", "th", "ink", ">", "hmm", "</", "th", "ink", ">", "\n", "Hello") == ("Hello", "hmm")
    assert said("<", "th", "Hello") == ("<thHello", "")
    assert said("Hello", "<", "th") == ("Hello<th", ""), "the reply ends with half of a mark"


def test_a_template_that_opens_a_span_need_not_name_its_end() -> None:
    """InternLM/lmdeploy#4754: the tokenizer has neither mark as a token."""
    said = Said(tokenizer(["<|im_end|>"], template=THINKING), ["<", "th", "ink", ">"])
    assert said("hmm", "</", "th", "ink", ">", "\n", "Hello") == ("Hello", "hmm")


def test_white_space_inside_of_parts_stays() -> None:
    said = Said(tokenizer(["<think>", "</think>"]))
    assert said("<think>", "hmm", "\n\n", " so", "</think>", "Hello", "\n", " ") == ("Hello\n ", "hmm\n\n so")
    assert said("\n", "Hello") == ("\nHello", ""), "no span before it"


def test_nothing_is_given_before_it_is_sure() -> None:
    said = Said(tokenizer(["<|im_end|>"], template=THINKING + "{# </think> #}"))
    parts = said.parts()
    given = [parts.push(token)[:2] for token in said.ids(["Hello", "<", "th", "ink", "!", "<"])]
    assert given == [("Hello", ""), ("", ""), ("", ""), ("", ""), ("<think!", ""), ("", "")]


@pytest.mark.parametrize("seed", range(20))
def test_no_text_is_lost_or_doubled(seed: int) -> None:
    draw = random.Random(seed)
    said = Said(tokenizer(["<think>", "</think>"]))
    words = [draw.choice(["hmm", "Hello", "!", "<think>", "</think>", "<", "th"]) for _ in range(40)]
    content, reasoning = said(*words)
    assert sorted(content + reasoning) == sorted("".join(words).replace("<think>", "").replace("</think>", "")) or (
        "</think>" in content or "<think>" in reasoning
    ), "a mark that opens nothing is text"


def test_the_template_may_begin_the_reasoning() -> None:
    """DeepSeek-R1 and QwQ: the reply begins inside of a span."""
    made = tokenizer(["<|im_start|>", "<|im_end|>", "<think>", "</think>"], template=THINKING)
    opening = ChatTemplate(made, "it").opening(ChatPrompt([{"role": "user", "content": "Hello"}]))
    assert made.decode(opening).strip().endswith("<think>")
    said = Said(made)
    said.opening = opening
    assert said("hmm", "</think>", "\n", "Hello") == ("Hello", "hmm")


@pytest.mark.parametrize(("thinks", "expected"), [(True, ("", "hmm")), (False, ("hmm", ""))])
def test_a_variable_of_the_template_may_switch_it_off(thinks: bool, expected: tuple[str, str]) -> None:
    made = tokenizer(["<|im_start|>", "<|im_end|>", "<think>", "</think>"], template=SWITCHED)
    chat = ChatPrompt([{"role": "user", "content": "Hello"}], {"enable_thinking": thinks})
    said = Said(made)
    said.opening = ChatTemplate(made, "it").opening(chat)
    assert said(*(["<think>"] if thinks else []), "hmm") == expected


def test_what_a_user_says_opens_no_span() -> None:
    made = tokenizer(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    said = Said(made)
    said.opening = ChatTemplate(made, "it").opening(ChatPrompt([{"role": "user", "content": "<think>"}]))
    assert said("Hello") == ("Hello", "")


@pytest.fixture
def harmony() -> Said:
    made = tokenizer([*HARMONY, "<|return|>", "<|call|>", "<|constrain|>"])
    return Said(made, ["<|start|>", "assistant"])


def message(channel: str, *words: str) -> list[str]:
    return ["<|channel|>", channel, "<|message|>", *words]


BEGIN = ["<|start|>", "assistant"]


def test_channels_of_harmony(harmony: Said) -> None:
    analysis, final = message("analysis", "hmm", " so"), message("final", "Hello", "!")
    assert harmony(*analysis, "<|end|>", *BEGIN, *final) == ("Hello!", "hmm so")
    assert harmony(*final) == ("Hello!", "")
    assert harmony(*analysis) == ("", "hmm so")
    assert harmony(*analysis, "<|end|>", *BEGIN, *message("commentary", "hmm"), "<|end|>", *BEGIN, *final) == (
        "Hello!",
        "hmm sohmm",
    )


def test_headers_and_calls_of_harmony_are_not_the_reasonings(harmony: Said) -> None:
    words = [*message("analysis", "hmm", " so"), "<|end|>", *BEGIN, *message("final", "Hello")]
    assert harmony.reasons(*words) == ["hmm", " so", "<|end|>"]


def test_a_message_without_a_channel_is_for_the_user(harmony: Said) -> None:
    assert harmony("<|message|>", "Hello") == ("Hello", "")


def test_what_is_addressed_to_a_tool_is_not(harmony: Said) -> None:
    call = ["<|channel|>", "commentary", " to=functions.f", " ", "<|constrain|>", "<|message|>", "{}"]
    assert harmony(*call) == ("", "{}")


def test_a_model_that_leaves_the_marks_out(harmony: Said) -> None:
    """run-llama/llamafarm#753."""
    assert harmony(*message("analysis", "hmm"), "<|end|>", "final", "Hello", "!") == ("Hello!", "hmm")


def test_a_reply_that_never_comes_to_its_message_is_not_lost(harmony: Said) -> None:
    assert harmony("Hello", "!") == ("Hello!", "")


def test_the_template_may_choose_the_channel(harmony: Said) -> None:
    harmony.opening = harmony.ids(["<|start|>", "assistant", *message("final")])
    assert harmony("Hello") == ("Hello", "")


def test_special_tokens_can_be_kept(harmony: Said) -> None:
    words = [*message("final"), "Hello", "<|return|>"]
    parts = OnePart(harmony.texts, [], special=True)
    text = "".join(parts.push(token).content for token in harmony.ids(words)) + parts.finish().content
    assert text == "".join(words)


def test_stop_texts_are_looked_for_in_what_the_user_is_told() -> None:
    said = Said(tokenizer(["<think>", "</think>"]))
    text = ReplyText(said.texts, said.parts(), ["Hello"])
    words = ["<think>", "Hello", "</think>", " Hi", "Hello", "!"]
    pieces = [text.push(token) for token in said.ids(words)]
    assert text.stopped
    assert "".join(piece.content for piece in pieces) == "Hi"
    assert "".join(piece.reasoning for piece in pieces) == "Hello"


def test_a_stop_text_that_is_a_special_token_ends_by_its_id() -> None:
    said = Said(tokenizer(["<|im_end|>"], ["<tool>"]))
    text = ReplyText(said.texts, said.parts(), ["<|im_end|>", "<tool>", "Hello"])
    assert text.ends == set(said.ids(["<|im_end|>"])), "others have a text"


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["<|im_end|>"]),
        ("{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}", []),
        ("{% for m in messages %}{{m.content}}{{ ' <|im_end|>' }}{% endfor %}", ["<|im_end|>"]),
        ("{{ raise_exception('no') }}", []),
        ("", []),
    ],
)
def test_what_closes_a_turn(template: str, ends: list[str]) -> None:
    made = tokenizer(["<|im_start|>", "<|im_end|>"], template=template)
    texts = ReplyTexts(made, ChatTemplate(made, "it"))
    settings = resolve(Sampling(), GenerationConfig(), 10, 10)
    chat = ChatPrompt([{"role": "user", "content": "a"}])
    assert texts.new([5], settings, chat).ends == {made.get_vocab()[end] for end in ends}
    assert texts.new([5], settings, None).ends == frozenset(), "no conversation"
    unending = resolve(Sampling(ignore_eos=True), GenerationConfig(), 10, 10)
    assert texts.new([5], unending, chat).ends == frozenset()


def test_a_conversation_goes_back_as_the_template_wants_it() -> None:
    made = tokenizer(["<|im_end|>"], template="{% for m in messages %}{{ m.thinking }}|{{ m.content }}{% endfor %}")
    message = {"role": "assistant", "content": "Hello", "reasoning_content": "hmm"}
    rendered = ChatTemplate(made, "it")._apply(ChatPrompt([message]), tokenize=False)
    assert rendered == "hmm|Hello"


def test_arguments_of_transformers_are_no_variables() -> None:
    template = ChatTemplate(tokenizer(["<|im_end|>"]), "it")
    with pytest.raises(RequestError, match="^add_generation_prompt is no variable of a chat template"):
        template.render(ChatPrompt([{"role": "user", "content": "a"}], {"add_generation_prompt": False}))
