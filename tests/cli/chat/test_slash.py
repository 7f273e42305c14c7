from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgemoe.cli.chat.conversation import Conversation
from edgemoe.cli.chat.session import Session
from edgemoe.cli.chat.slash import COMMANDS, CommandResult, Next, SlashError, execute
from edgemoe.errors import EdgeMoEError
from edgemoe.sampling import Sampling
from tests.support.fake_engine import FakeEngine, FakeStats, timings

MOVED = FakeStats(
    hits=600, misses=200, bytes_demanded=30 << 20, bytes_prefetched_used=10 << 20, bytes_prefetched_late=500 << 10,
    bytes_filled=1 << 20, requests=3, tokens_prompt=41, tokens_generated=96, steps=100, seconds=12.34,
)  # fmt: skip
NAMES = "/help /? /exit /quit /bye /clear /regen /retry /undo /save /load /system /set /show /stats /read"


@pytest.fixture
def session() -> Session:
    conversation = Conversation()
    conversation.say("Hi")
    conversation.reply("Hello")
    return Session(FakeEngine(), conversation, Sampling())


def test_help_lists_every_command_under_each_of_its_names(session: Session) -> None:
    text = execute("/help", session).text
    for name in NAMES.split():
        assert name in text
        assert any(name in command.names for command in COMMANDS)
    assert '"""' in text
    assert execute("/?", session).text == text


@pytest.mark.parametrize("name", ["/exit", "/quit", "/bye", "  /bye  "])
def test_leaving(session: Session, name: str) -> None:
    assert execute(name, session) == CommandResult("", Next.LEAVE)


@pytest.mark.parametrize("name", ["/regen", "/retry"])
def test_another_reply_is_the_chats_work(session: Session, name: str) -> None:
    assert execute(name, session) == CommandResult("", Next.REPLY_AGAIN)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/frob", 'unknown command /frob; /help lists them, and """/frob""" sends it as a message'),
        ("/HELP", "unknown command /HELP"),
        ("/etc/passwd is a file", 'and """/etc/passwd is a file""" sends it'),
        ("/clear everything", "/clear takes nothing, but was given 'everything'"),
        ("/save", "/save needs something: /save FILE"),
        ("/set", "/set needs something: /set KEY VALUE"),
        ("/set colour red", "there is no setting colour; there are temperature, top_k,"),
        ("/set logprobs 3", "there is no setting logprobs"),
        ("/set top_k", "give a value: /set top_k VALUE, or /set top_k default"),
        ("/set top_k 1.5", "top_k is a whole number, not '1.5'"),
        ("/set seed 99999999999999999999", "seed=99999999999999999999 is too large; give 9223372036854775807 at most"),
        ("/set temperature warm", "temperature is a number, not 'warm'"),
        ("/set temperature -1", "temperature"),
        ("/set ignore_eos maybe", "ignore_eos is true or false, not 'maybe'"),
        ('/set stop ["a"', "stop is a text, or JSON"),
        ("/set stop [1]", "stop is a text, or a list of texts"),
        ("/load /no/such/file", "cannot read /no/such/file: no such file or directory"),
        ("/read /no/such/file", "cannot read /no/such/file: no such file or directory"),
    ],
)
def test_errors_are_sentences_and_change_nothing(session: Session, line: str, said: str) -> None:
    before = session.conversation.messages
    with pytest.raises(EdgeMoEError) as caught:
        execute(line, session)
    assert said in str(caught.value)
    assert (session.conversation.messages, session.sampling, session.attached) == (before, Sampling(), [])


@pytest.mark.parametrize(
    ("line", "sampling", "said"),
    [
        ("/set temperature 0.5", Sampling(temperature=0.5), "temperature = 0.5"),
        ("/set temp 0", Sampling(temperature=0), "temperature = 0.0"),
        ("/set top-p 0.9", Sampling(top_p=0.9), "top_p = 0.9"),
        ("/set repeat-penalty 1.1", Sampling(repetition_penalty=1.1), "repetition_penalty = 1.1"),
        ("/set max_tokens  7", Sampling(max_tokens=7), "max_tokens = 7"),
        ("/set seed 3", Sampling(seed=3), "seed = 3"),
        ("/set ignore_eos true", Sampling(ignore_eos=True), "ignore_eos = true"),
        ("/set stop The End", Sampling(stop=("The End",)), 'stop = ["The End"]'),
        ('/set stop "\\n"', Sampling(stop=("\n",)), 'stop = ["\\n"]'),
        ('/set stop ["a", "b"]', Sampling(stop=("a", "b")), 'stop = ["a", "b"]'),
    ],
)
def test_settings(session: Session, line: str, sampling: Sampling, said: str) -> None:
    assert execute(line, session).text == said
    assert session.sampling == sampling
    key = line.split()[1]
    execute(f"/set {key} default", session)
    assert session.sampling == Sampling()


def test_undo_and_clear(session: Session) -> None:
    assert execute("/undo", session).text == "Took back: Hi"
    assert session.conversation.messages == []
    session.attached.append("text")
    assert execute("/clear", session).text == "The conversation is empty."
    assert session.attached == []
    with pytest.raises(EdgeMoEError, match="no message to take back"):
        execute("/undo", session)


def test_the_system_prompt(session: Session) -> None:
    assert execute("/system Be  brief.", session).text == "The system prompt is set."
    assert session.conversation.system == "Be  brief."
    assert execute("/system", session).text == "There is no system prompt now."
    assert session.conversation.system is None


def test_save_load_and_read(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "my talk.json"
    assert execute(f"/save {path}", session).text == f"Saved to {path}."
    execute("/clear", session)
    assert execute(f"/load {path}", session).text == f"Loaded 2 messages from {path}."
    assert [message["content"] for message in session.conversation.messages] == ["Hi", "Hello"]
    (tmp_path / "poem.txt").write_text("Roses\nare red\n")
    said = execute(f"/read {tmp_path / 'poem.txt'}", session).text
    assert said == f"Read 13 characters from {tmp_path / 'poem.txt'}; they go before your next message."
    assert session.attached == ["Roses\nare red"]


def test_show(session: Session) -> None:
    execute("/set top_k 4", session)
    execute("/system Be brief.", session)
    assert execute("/show", session).text.splitlines() == [
        "model               fake",
        "device              cpu",
        "dtype               float32",
        "context             41 of 512 tokens",
        "messages            3",
        "system              Be brief.",
        "temperature         default",
        "top_k               4",
        "top_p               default",
        "min_p               default",
        "repetition_penalty  default",
        "presence_penalty    default",
        "frequency_penalty   default",
        "seed                default",
        "stop                none",
        "max_tokens          default",
        "ignore_eos          false",
    ]


def test_stats(session: Session) -> None:
    session.engine = FakeEngine(stats=MOVED)
    assert execute("/stats", session).text.splitlines() == [
        "requests            3",
        "prompt tokens       41",
        "generated tokens    96",
        "batch               2          as asked for",
        "steps               100        in 12.3 s",
        "expert cache        4 slots    for 16 experts",
        "hit rate            75.0%      600 of 800 experts asked for",
        "demanded            30.0 MiB   307.2 KiB a step",
        "prefetched in time  10.0 MiB   102.4 KiB a step",
        "prefetched late     500.0 KiB  5.0 KiB a step",
        "prefetched in vain  0 B        0 B a step",
        "filled              1.0 MiB    brought at the start, and asked for or evicted since",
        "link wait           0.25 s     2.50 ms a step",
        "speculation         off        asked for",
        "context: 24 of 512 tokens",
    ]
    session.timings = timings(10, 4)
    assert execute("/stats", session).text.splitlines()[-2:] == [
        "last reply: prompt 10 tokens at 10.0/s, generated 4 tokens at 4.0/s, hit rate 75.0%, 1.0 KiB a token",
        "first token after 0.500 s",
    ]


def test_stats_of_what_was_drafted_and_foretold(session: Session) -> None:
    drafted = replace(
        MOVED, preemptions=1, prefix_tokens=7, speculation="ngram and self, while it pays, trees of at most 8 tokens",
        cycles=40, drafted=150, accepted=50, drafted_by={"ngram": 100, "self": 50}, accepted_by={"self": 50},
        draft_seconds=0.1, verify_seconds=1.0, forecast_recall=0.5,
        forecast_precision=0.25, lookahead_recall=0.8, lookahead_precision=0.6, speculation_setting="trees of depth 4",
        speculation_changes=3, utility=1.256, budget_choices=400, budget_dropped=50, lookahead_bytes_useful=2 << 20,
        lookahead_bytes_late=1 << 20, lookahead_bytes_wasted=512 << 10, forecast_bytes_useful=3 << 20,
    )  # fmt: skip
    session.engine = FakeEngine(stats=drafted)
    lines = execute("/stats", session).text.splitlines()
    assert lines[:2] == [
        "requests             3               1 computed again",
        "prompt tokens        41              7 shared with another request",
    ]
    assert lines[13:] == [
        "lookahead            80.0%           of the missing experts foretold, 60.0% of the foretold asked for",
        "brought for it       3.5 MiB         2.0 MiB in time, 1.0 MiB late, 512.0 KiB in vain",
        "speculation          ngram and self  while it pays, trees of at most 8 tokens",
        "utility              1.26            trees of depth 4, after 3 changes",
        "cycles               40",
        "drafted              150 tokens      3.75 a cycle",
        "accepted             50 tokens       1.25 a cycle",
        "from ngram           100 tokens      0% accepted",
        "from self            50 tokens       100% accepted",
        "generated by cycles  90 tokens       2.25 a cycle",
        "draft                0.10 s          2.50 ms a cycle",
        "verify               1.00 s          25.0 ms a cycle",
        "budget               12.5%           of the experts chosen in verifications of drafts were left out: lossy",
        "forecast             50.0%           of the missing experts foretold, 25.0% of the foretold asked for",
        "brought for it       3.0 MiB         3.0 MiB in time, 0 B late, 0 B in vain",
        "context: 24 of 512 tokens",
    ]
    session.engine = FakeEngine(stats=replace(drafted, utility=0.0))
    assert not any(line.startswith("utility") for line in execute("/stats", session).text.splitlines())


def test_every_command_says_what_it_takes() -> None:
    for command in COMMANDS:
        assert command.help
        assert all(name.startswith("/") for name in command.names)
    assert issubclass(SlashError, EdgeMoEError)
