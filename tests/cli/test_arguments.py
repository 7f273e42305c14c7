from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable
from typing import Any

import pytest

from edgemoe import Engine
from edgemoe.cli import arguments as options
from edgemoe.cli.arguments import model_settings, read_command_line, sampling_from
from edgemoe.cli.exits import UsageError
from edgemoe.cli.main import build_parser
from edgemoe.cli.wording import in_options
from edgemoe.cluster.engines import RayEngines
from edgemoe.config import EngineConfig, choices_of, settings_of
from edgemoe.draft.settings import draft_settings
from edgemoe.experts.draft_routing import RULES as DRAFT_RULES
from edgemoe.prefetch.budget import RULES as BUDGET_RULES
from edgemoe.sampling import Sampling
from tests.support import ROOT


def parse(*argv: str, **environment: str) -> argparse.Namespace:
    return read_command_line(build_parser(), argv, environment)


def test_what_is_not_given_is_left_to_the_library() -> None:
    arguments = parse("run", "-")
    assert sampling_from(arguments) == Sampling()
    assert model_settings(arguments) == {}


def test_a_chat_is_one_sequence() -> None:
    assert model_settings(parse("chat", EDGEMOE_BATCH="4")) == {"batch": 1}


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("AUTO", "auto"), ("16", 16)])
def test_sizes_of_the_batch(text: str, value: str | int) -> None:
    assert model_settings(parse("plan", "--batch", text)) == {"batch": value}


def typed(line: str) -> argparse.Namespace:
    """A command line as it is typed, without quotes."""
    return parse(*line.split())


def test_every_sampling_option_reaches_its_field() -> None:
    arguments = typed(
        "run - -n 5 --temp 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --repeat-penalty 1.1 --seed 7 "
        "--stop END --stop ### --ignore-eos --logprobs 2"
    )
    assert sampling_from(arguments) == Sampling(
        max_tokens=5, temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=7,
        stop=("END", "###"), ignore_eos=True, logprobs=2,
    )  # fmt: skip


def test_every_model_option_reaches_its_keyword() -> None:
    arguments = typed(
        "run - -m some/model -c 4096 -t 3 --device cuda:1 --dtype float16 --expert-cache 6GiB --offline "
        "--link-gbps 12.5 --batch 8 --state-folder /some/where --speculate ngram+model --draft-model small/model "
        "--draft-nodes 12 --draft-depth 4 --draft-shape chain --draft-rule fewer --prefetch off "
        "--budget 64MiB --budget-rule path --budget-dropped truncate"
    )
    assert model_settings(arguments) == {
        "model": "some/model", "context": 4096, "threads": 3, "device": "cuda:1", "dtype": "float16",
        "expert_cache": "6GiB", "offline": True, "link_gbps": 12.5, "batch": 8, "state_folder": "/some/where",
        "speculate": "ngram+model", "draft_model": "small/model", "draft_nodes": 12, "draft_depth": 4,
        "draft_shape": "chain", "draft_rule": "fewer", "prefetch": "off",
        "budget": "64MiB", "budget_rule": "path", "budget_dropped": "truncate",
    }  # fmt: skip


@pytest.mark.parametrize("takes", [Engine.load, Engine.plan_for, RayEngines.load])
def test_what_takes_the_settings_of_an_engine_refuses_an_unknown_one(takes: Callable[..., Any]) -> None:
    address = ["127.0.0.1:1"] if takes == RayEngines.load else []
    with pytest.raises(TypeError, match="'expert_cach' is no setting of an engine"):
        takes(*address, expert_cach="40%")


def test_every_setting_of_the_engine_is_an_option_and_told_as_the_library_tells_it() -> None:
    parser = build_parser().parse_args(["run", "-"]).parser
    helps = {action.dest: action.help for action in parser._actions}
    for name, info in settings_of().items():
        told = helps[options.option_of(name)]
        assert told.startswith(info.help.replace("%", "%%"))
        assert all(choice in told for choice in info.choices)


def test_a_setting_that_is_not_given_is_left_to_the_library() -> None:
    assert model_settings(parse("run", "-")) == {}


def test_the_choices_are_those_of_what_they_choose_among() -> None:
    assert choices_of("budget_rule") == BUDGET_RULES
    assert choices_of("draft_rule") == ("auto", *DRAFT_RULES)
    for words in choices_of("speculate"):
        drafters = draft_settings(
            EngineConfig(speculate=words, draft_model="small/model" if "model" in words else None), head="mtp" in words
        )
        assert words in ("auto", "auto+self", "off") or drafters.drafters == set(words.split("+"))


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("lower context=", "lower --ctx-size"),
        ("give it as model=, or not", "give it with -m, or not"),
        ("use device='cpu'", "use --device cpu"),
        ("give expert_cache=12 or less", "give --expert-cache 12 or less"),
        ("budget='much' is no size", "--budget much is no size"),
        ("budget=0.5b is not possible", "--budget 0.5b is not possible"),
        ("draft_depth=-3 is not possible", "--draft-depth -3 is not possible"),
        ("speculate='ngram+' is none", "--speculate ngram+ is none"),
        ("(link_gbps=)", "(--link-gbps)"),
        ("expert_cache='much more' is none", "--expert-cache 'much more' is none"),
        ("a file with model=x in its name.safetensors", "a file with -m x in its name.safetensors"),
        ("the_model=4 and x.batch=3 stay", "the_model=4 and x.batch=3 stay"),
    ],
)
def test_the_terminal_names_its_options_for_arguments_of_the_library(message: str, shown: str) -> None:
    assert in_options(message) == shown


def test_no_message_of_the_library_names_an_option() -> None:
    """Docstrings and commands in parentheses (edgemoe run --resume) may."""
    wrong = []
    for file in (ROOT / "edgemoe").rglob("*.py"):
        if file.name in ("train.py", "train_head.py"):
            continue
        tree = ast.parse(file.read_text("utf-8"))
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                text = re.sub(r"edgemoe run --resume|ray start --head", "", node.value)
                if re.search(r"(?<![\w-])(--[a-z]|-m\b)", text):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.value!r}")
    assert wrong == []


@pytest.mark.parametrize("command", ["run -", "chat", "plan"])
def test_drafts_are_settings_of_every_command_that_plans(command: str) -> None:
    environment = {
        "EDGEMOE_SPECULATE": "self", "EDGEMOE_DRAFT_MODEL": "small", "EDGEMOE_DRAFT_NODES": "3",
        "EDGEMOE_DRAFT_DEPTH": "2", "EDGEMOE_DRAFT_SHAPE": "tree", "EDGEMOE_DRAFT_RULE": "affinity",
        "EDGEMOE_PREFETCH": "auto", "EDGEMOE_BUDGET": "95%", "EDGEMOE_BUDGET_RULE": "sum",
        "EDGEMOE_BUDGET_DROPPED": "substitute",
    }  # fmt: skip
    settings = model_settings(parse(*command.split(), "--speculate", "off", **environment))
    settings.pop("batch", None)
    assert settings == {
        "speculate": "off", "draft_model": "small", "draft_nodes": 3, "draft_depth": 2, "draft_shape": "tree",
        "draft_rule": "affinity", "prefetch": "auto", "budget": "95%", "budget_rule": "sum",
        "budget_dropped": "substitute",
    }  # fmt: skip


def test_long_and_short_names_are_the_same() -> None:
    short = typed("chat -m a -p b -f c -sys d -n 1 -c 2 -t 3 -v")
    long = typed(
        "chat --model a --prompt b --file c --system-prompt d --max-tokens 1 --ctx-size 2 --threads 3 --verbose"
    )
    assert {**vars(short), "parser": None} == {**vars(long), "parser": None}


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("6GiB", "6GiB"), ("1.5 GB", "1.5 GB"), ("40%", "40%"), ("12.5%", "12.5%"), ("96", 96)],
)
def test_sizes_of_the_expert_cache(text: str, value: str | int) -> None:
    assert model_settings(parse("plan", "--expert-cache", text)) == {"expert_cache": value}


@pytest.mark.parametrize("text", ["much", "6 apples", "-3", "40 %%", "", "GiB"])
def test_what_is_no_size_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(UsageError, match=r"--expert-cache.*is not a size; give auto, bytes such as 6GiB"):
        parse("plan", f"--expert-cache={text}")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--dtype=int8", "'int8' is not known; give one of auto, bfloat16, float16, float32"),
        ("--device=tpu", "'tpu' is not known; give one of auto, cpu, cuda, cuda:N"),
        ("--threads=0", "0 is below 1"),
        ("--ctx-size=many", "'many' is not a whole number"),
        ("--temp=warm", "'warm' is not a number"),
        ("--link-gbps=0", "0 is not above 0"),
        ("--batch=0", "0 is below 1"),
        ("--batch=some", "'some' is no size of a batch; give auto, or a number such as 16"),
        ("--order=any", "'any' is not known; give one of finish, input"),
        ("--link-gbps=nan", "nan is not above 0"),
        (
            "--speculate=all",
            "'all' is not known; give one of auto, auto+self, off, ngram, mtp, self, model, ngram+mtp, ngram+self, "
            "ngram+model",
        ),
        ("--draft-nodes=0", "0 is below 1"),
        ("--draft-depth=deep", "'deep' is not a whole number"),
        ("--draft-shape=bush", "'bush' is not known; give one of tree, chain"),
        ("--draft-rule=none", "'none' is not known; give one of auto, reselect, affinity, fewer"),
        ("--prefetch=on", "'on' is not known; give one of auto, off"),
    ],
)
def test_bad_values_are_the_same_error_from_flag_and_environment(option: str, said: str) -> None:
    flag, _, value = option.partition("=")
    variable = "EDGEMOE_" + flag[2:].replace("-", "_").upper()
    with pytest.raises(UsageError) as from_flag:
        parse("run", "-", option)
    with pytest.raises(UsageError) as from_environment:
        parse("run", "-", **{variable: value})
    assert said in str(from_flag.value)
    assert str(from_environment.value) == f"environment variable {variable}: " + str(from_flag.value).partition(": ")[2]


@pytest.mark.parametrize("option", ["--temp=-1", "--temp=nan", "--top-p=2", "--max-tokens=0", "--stop=", "--min-p=7"])
def test_a_value_outside_its_limits_is_wrong_usage_and_names_its_option(option: str) -> None:
    flag = option.partition("=")[0]
    with pytest.raises(UsageError, match=f"argument {flag}: .* must be "):
        sampling_from(parse("chat", "--seed", "1", option))


def test_the_limits_hold_for_the_environment_too() -> None:
    with pytest.raises(UsageError, match="temperature must be"):
        sampling_from(parse("chat", EDGEMOE_TEMP="-1"))


def test_the_environment_fills_in_and_the_command_line_wins() -> None:
    environment = {"EDGEMOE_MODEL": "there", "EDGEMOE_CTX_SIZE": "256", "EDGEMOE_STOP": "END", "EDGEMOE_OFFLINE": "yes"}
    arguments = parse("run", "-", "-m", "here", **environment)
    assert model_settings(arguments) == {"model": "here", "context": 256, "offline": True}
    assert sampling_from(arguments).stop == ("END",)
    assert sampling_from(parse("run", "-", "--stop", "FIN", **environment)).stop == ("FIN",)


def test_an_empty_variable_and_another_commands_variable_say_nothing() -> None:
    arguments = parse("plan", EDGEMOE_MODEL="", EDGEMOE_TEMP="warm")
    assert model_settings(arguments) == {}


@pytest.mark.parametrize(("text", "value"), [("1", True), ("ON", True), ("0", False), ("no", False)])
def test_a_switch_in_the_environment(text: str, value: bool) -> None:
    assert parse("chat", EDGEMOE_VERBOSE=text).verbose is value


def test_a_switch_in_the_environment_that_is_neither_yes_nor_no() -> None:
    with pytest.raises(UsageError, match=r"EDGEMOE_VERBOSE: 'maybe' is neither yes nor no; give one of 1, true"):
        parse("chat", EDGEMOE_VERBOSE="maybe")


def help_of(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse(command, option)
    return capsys.readouterr().out


def names_in(page: str) -> list[str]:
    """The long names of the options that a page of help lists."""
    return re.findall(r"^  (?:-\w+, )?(--[\w-]+)", page, re.MULTILINE)


@pytest.mark.parametrize("command", ["run", "chat", "plan", "profile", "affinity", "doctor"])
def test_the_complete_help_names_every_option_with_its_variable(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, "--help", capsys)
    parser = build_parser().commands()[command]
    assert sorted(names_in(text)) == sorted(parser._long_names())
    for name in set(names_in(text)) - {"--help"}:
        assert f"[EDGEMOE_{name[2:].replace('-', '_').upper()}]" in text


@pytest.mark.parametrize("command", ["run", "chat"])
def test_the_short_help_has_the_most_used_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    short, full = help_of(command, "-h", capsys), help_of(command, "--help", capsys)
    assert {"--model", "--ctx-size", "--temp", "--max-tokens"} <= set(names_in(short)) < set(names_in(full))
    assert "EDGEMOE_" not in short
    left_out = len(names_in(full)) - len(names_in(short))
    assert f"'edgemoe {command} --help' lists {left_out} more options" in short


def test_the_help_is_in_sections_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of("chat", "--help", capsys).split())
    sections = ["arguments:", "request:", "model:", "memory and speed:", "sampling:", "drafts:", "lossy:", "options:"]
    places = [text.index(f" {section} ") for section in sections]
    assert places == sorted(places)
    assert "[EDGEMOE_FILE]" in text[places[1] : places[2]]
    assert "--budget-rule" in text[places[6] : places[7]]
    for name in settings_of():
        default = getattr(EngineConfig, name)
        if default is not None and not isinstance(default, bool):
            assert f"(default: {default}) [{variable_of(name)}]" in text or name == "batch"
    assert f"the model's limit, {EngineConfig.default_context} at most" in text
    assert f"(default: {EngineConfig.default_max_tokens}) [EDGEMOE_MAX_TOKENS]" in text


def variable_of(setting: str) -> str:
    return f"EDGEMOE_{options.option_of(setting).upper()}"


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_the_help_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in build_parser().commands():
        text = help_of(command, "--help", capsys)
        assert max(map(len, text.splitlines())) <= min(columns, 100)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("chat --temperature 1", "did you mean --temp?"),
        ("chat --tempp 1", "did you mean --temp?"),
        ("chat --top_k 4", "did you mean --top-k?"),
        ("chat --TOP-K=4", "did you mean --top-k?"),
        ("run - --max-new-tokens 4", "did you mean --max-tokens?"),
        ("run - --context-length 4", "did you mean --ctx-size?"),
        ("chat --spec off", "did you mean --speculate?"),
        ("chat --seeed 1", "did you mean --seed?"),
        ("plan --temp 1", "an option of run, chat"),
        ("run - --prompt hello", "an option of chat"),
        ("run a b", "put a text of several words in quotes"),
        ("chat --dtype bfloat", "did you mean bfloat16?"),
        ("chatt", "did you mean chat?"),
        ("rnu -", "did you mean run?"),
    ],
)
def test_a_misspelt_name_is_told_with_what_was_meant(line: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        typed(line)
    assert f"({meant})" in str(caught.value)
    assert "--help'" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "example"),
    [
        ("--offline chat hi", "edgemoe chat --offline"),
        ("-m org/name plan", "edgemoe plan -m"),
        ("--temp=0 frob", "edgemoe run --temp"),
        ("--json", "edgemoe plan --json"),
    ],
)
def test_an_option_before_its_command_is_told_where_it_stands(line: str, example: str) -> None:
    with pytest.raises(UsageError, match="is an option of a command and stands after it") as caught:
        typed(line)
    assert f": {example}; see" in str(caught.value)


def test_the_help_names_the_version() -> None:
    assert re.search(r"--version +show the version", build_parser().format_help())


def test_what_is_like_nothing_gets_no_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        typed("chat --xyzzy 1")
    assert str(caught.value) == "unrecognized arguments: --xyzzy; see 'edgemoe chat --help'"


def test_a_question_without_a_command_is_told_how_to_ask() -> None:
    with pytest.raises(UsageError, match=r"to ask a model: edgemoe chat 'What is 1 \+ 1\?'"):
        parse("What is 1 + 1?")


def test_an_unknown_variable_is_told_of_and_changes_nothing() -> None:
    parser = build_parser()
    environment = {
        "EDGEMOE_TEMPERATURE": "1", "EDGEMOE_CTX_SIZ": "5", "EDGEMOE_XYZZY": "", "EDGEMOE_TEMP": "1",
        "EDGEMOE_TRACEBACK": "1", "HOME": "/", "NOT_EDGEMOE_TEMPP": "1",
    }  # fmt: skip
    assert parser.unknown_variables(environment) == [
        "the variable EDGEMOE_CTX_SIZ is not known and does nothing (did you mean EDGEMOE_CTX_SIZE?)",
        "the variable EDGEMOE_TEMPERATURE is not known and does nothing (did you mean EDGEMOE_TEMP?)",
        "the variable EDGEMOE_XYZZY is not known and does nothing",
    ]


NUMBERS = ["--ctx-size", "--threads", "--max-tokens", "--top-k", "--seed", "--draft-nodes", "--draft-depth",
           "--batch", "--expert-cache", "--temp", "--top-p", "--min-p", "--repeat-penalty", "--presence-penalty",
           "--link-gbps", "--cpu-share", "--budget"]  # fmt: skip


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize("value", ["1" + "0" * 400, "9" * 5000, "-" + "9" * 5000, "nan", "inf", "-inf", "1e999"])
def test_a_number_beyond_all_limits_is_one_short_sentence(option: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        sampling_from(parse("run", "-", f"{option}={value}"))
    assert len(str(caught.value)) < 300
    assert option in str(caught.value)


@pytest.mark.parametrize("line", ["chat --tempp 1", "chat --repeat-penal 1", "plan --temp 1", "chat --logprobs 1"])
def test_options_that_are_misspelt_shortened_or_of_another_command_are_refused(line: str) -> None:
    with pytest.raises(UsageError, match="unrecognized arguments"):
        typed(line)
