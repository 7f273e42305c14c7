"""The command `edgemoe`: its parser, and the way from an error to one sentence and an exit code.

Exit codes: 0 all is well; 1 some requests failed, or doctor found a problem; 2 wrong usage; 3 the checkpoint cannot
be used; 4 it does not fit or was refused; 5 an input or output file is in trouble; 70 a fault in edgemoe itself;
130 interrupted. With the environment variable EDGEMOE_TRACEBACK=1 an error also shows its traceback.

Nothing heavy is imported here: a command's own modules are imported when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

from edgemoe import __version__
from edgemoe.cli import arguments as options
from edgemoe.cli.exits import DESCRIPTION, Exit, UsageError, exit_for
from edgemoe.cli.output import settle
from edgemoe.cli.render import harmless_line
from edgemoe.cli.streams import standard_streams
from edgemoe.cli.surface import EngineFactory
from edgemoe.cli.wording import in_options
from edgemoe.errors import EdgeMoEError

_Commands: TypeAlias = "argparse._SubParsersAction[options.Parser]"

_DESCRIPTION = """Run Mixture-of-Experts language models that are larger than the memory of the device.

  edgemoe chat                      talk with the small model that comes along
  edgemoe chat -m MODEL "QUESTION"  ask a model once
  edgemoe run -m MODEL FILE         answer a file of prompts
  edgemoe plan -m MODEL             see what would go where"""
_EPILOG = f"""'edgemoe COMMAND -h' shows a command's most used options, 'edgemoe COMMAND --help' all of them.

{DESCRIPTION}

Every option can be given as an environment variable, named beside it by --help; the command line wins.
Answers go to standard output, everything else to standard error. EDGEMOE_TRACEBACK=1 shows an error's traceback."""


def main(argv: Sequence[str] | None = None, *, engine: EngineFactory | None = None) -> int:
    """Run one command and return its exit code. `engine` stands in for the class `edgemoe.Engine`."""
    # Before anything imports PyTorch: its threads would spin while they wait, on cores that kernels or others run on.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with standard_streams():
        return _run(argv, engine)


def _run(argv: Sequence[str] | None, engine: EngineFactory | None) -> int:
    try:
        return int(_dispatch(argv, engine))
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else Exit.OK
    except KeyboardInterrupt:
        _show_traceback()
        _complain("interrupted")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        return Exit.FILE
    except EdgeMoEError as error:
        _show_traceback()
        _complain(in_options(str(error)))
        return exit_for(error)
    except Exception as error:  # the last line of defence: a person gets a sentence, whatever broke
        _show_traceback()
        _complain(f"unexpected {type(error).__name__}: {error} (set EDGEMOE_TRACEBACK=1 to see where)")
        return Exit.INTERNAL
    finally:
        settle()


def build_parser() -> options.Parser:
    """The parser of the whole command line."""
    parser = options.Parser(
        prog="edgemoe",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.version(f"edgemoe {__version__}")
    parser.set_defaults(parser=parser, command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog="edgemoe")
    _add_run(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_plan(commands)
    _add_models(commands)
    _add_pack(commands)
    _add_eval(commands)
    _add_profile(commands)
    _add_affinity(commands)
    _add_doctor(commands)
    return parser


def _add_run(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "run",
        help="answer a file of prompts",
        description="Answer every request of a file; each result is written as soon as it is there.",
        epilog='FILE is OpenAI batch JSONL, JSONL with {"prompt"} or {"messages"}, or plain text, one prompt a line.',
    )
    parser.add_argument("requests", metavar="FILE", help="the requests; - is standard input")
    parser.option(
        "-o",
        "--output",
        convert=options.text,
        metavar="OUT",
        help="write the results here, not to stdout",
        section="results",
    )
    parser.switch("--overwrite", help="replace what OUT holds", section="results")
    parser.switch("--resume", help="go on with OUT: answer only what it has no result for", section="results")
    parser.option(
        "--order",
        convert=options.one_of("finish", "input"),
        metavar="ORDER",
        help="write results as they finish (finish), or in the order of the requests (input) (default: finish)",
        section="results",
        rare=True,
    )
    parser.switch(
        "--raw", help="complete plain-text lines as they are, without the chat template", section="request", rare=True
    )
    options.add_generation_options(parser)
    options.add_settings(parser, "batch")
    parser.option(
        "--logprobs",
        convert=options.whole,
        metavar="N",
        help="report log-probabilities, with N alternatives a token",
        section="results",
        rare=True,
    )
    parser.option(
        "--ray",
        convert=options.text,
        metavar="ADDRESS",
        help="share the requests out over the Ray cluster at this address (needs edgemoe[ray])",
        section="memory and speed",
        rare=True,
    )


def _add_chat(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "chat",
        help="talk with a model",
        description="Talk with a model on a terminal. With a QUESTION, or with standard input piped, answer once and "
        'leave: what is piped in goes before the question, as in\n  edgemoe chat "Summarise this." < notes.txt',
    )
    # A conversation is one sequence.
    parser.set_defaults(batch=1)
    parser.add_argument(
        "question", metavar="QUESTION", nargs="*", type=options.words, help="answer this and leave; words are joined"
    )
    parser.option(
        "-p",
        "--prompt",
        convert=options.words,
        metavar="TEXT",
        help="start with this message; on a terminal, the conversation goes on after it",
        section="request",
    )
    parser.option(
        "-f",
        "--file",
        convert=options.text,
        metavar="FILE",
        help="start with the text of a file",
        section="request",
    )
    parser.switch(
        "--context-shift",
        help="when the conversation fills the context, leave its oldest messages out, and say so",
        section="request",
    )
    options.add_generation_options(parser)


def _add_serve(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP, in the protocols of OpenAI and Anthropic, and as a web page "
        "(needs edgemoe[server]).",
    )
    option = partial(parser.option, section="server")
    option("--host", convert=options.text, metavar="ADDRESS", help="listen here (default: 127.0.0.1)")
    option("--port", convert=options.port, metavar="N", help="listen at this port; 0 takes a free one (default: 8080)")
    option(
        "--api-key", convert=options.text, metavar="KEY", repeated=True,
        help="serve only requests with this key; repeatable; any address but 127.0.0.1 needs one",
    )  # fmt: skip
    option("--api-key-file", convert=options.text, metavar="FILE", help="the same keys, one on each line")
    option(
        "--keep-alive",
        convert=options.decimal,
        metavar="SECONDS",
        help="load at the first request, and unload after so many seconds without one; without it, the model is "
        "loaded at once and stays",
    )
    option("--alias", convert=options.text, metavar="NAME", help="another name of the model; repeatable", repeated=True)
    option(
        "--allow-origin", convert=options.text, metavar="ORIGIN", repeated=True,
        help="let web pages of this origin use the server; repeatable",
    )  # fmt: skip
    option("--max-running", convert=options.counted, metavar="N", help="work at N replies at most (default: 64)")
    option(
        "--max-queue",
        convert=options.counted,
        metavar="N",
        help="refuse requests when N are open already (default: 512)",
    )
    option("--max-body", convert=options.counted, metavar="BYTES", help="refuse larger requests (default: 8388608)")
    options.add_model_options(parser)
    options.add_settings(parser, "batch", "state")
    parser.switch("-v", "--verbose", help="show the plan on standard error")


def _add_plan(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "plan",
        help="show where everything would go, without loading",
        description="Show the memory plan of a model on this machine, without loading it.",
    )
    parser.switch("--json", help="print the plan as JSON")
    options.add_model_options(parser)
    options.add_settings(parser, "batch")
    options.add_settings(parser, "state")


def _add_models(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "models",
        help="list the models on this machine",
        description="List the models in the Hugging Face cache and in folders, and whether each would run here. "
        "Reads no weights and never uses the network.",
    )
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="*", help="a checkpoint, or a folder of checkpoints and GGUF files"
    )
    parser.switch("--json", help="print the list as JSON")


def _add_pack(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "pack",
        help="write a checkpoint with quantised weights",
        description="Write a checkpoint with quantised experts, which takes less disk, link and memory. The result is "
        "lossy. What is interrupted goes on with the same command.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a checkpoint with float weights")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    options.add_setting(parser, "experts")
    options.add_setting(parser, "dense")
    parser.switch("--verify", help="read the result again, and compare it with its checksums")
    options.add_offline_option(parser)


def _add_eval(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "eval",
        help="measure what lossy settings cost in quality",
        description="Measure what lossy settings, such as --budget, cost: perplexity, divergence from the exact model, "
        "and how often both find the same token likeliest.",
    )
    # Texts are read one at a time.
    parser.set_defaults(batch=1)
    parser.option(
        "--text",
        convert=options.text,
        metavar="FILE",
        help="measure on this text, not on the built-in ones; - is standard input; repeatable",
        repeated=True,
    )
    parser.option(
        "--against",
        convert=options.text,
        metavar="MODEL",
        help="compare with this checkpoint of the same vocabulary; exact is the same one with nothing lossy",
    )
    parser.option("--tokens", convert=options.counted, metavar="N", help="most tokens of text to predict")
    parser.option(
        "--questions",
        convert=options.whole,
        metavar="N",
        help="ask N held-out questions of each task of the demo model; 0 asks none",
    )
    parser.switch("--json", help="print the result as JSON")
    options.add_model_options(parser)
    options.add_settings(parser, "state")
    parser.switch("-v", "--verbose", help="show the plan on standard error")


def _add_profile(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "profile",
        help="measure when speculation pays on this machine",
        description="Measure how long passes of a model take on this machine, keep it, and say when speculation pays.",
    )
    parser.switch("--json", help="print the profile as JSON")
    parser.option(
        "--plot",
        convert=options.text,
        metavar="FILE",
        help="draw measured against predicted, as FILE.png or FILE.svg (needs edgemoe[plot])",
    )
    options.add_model_option(parser)
    options.add_settings(parser, "machine")
    options.add_settings(parser, "state")


def _add_affinity(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "affinity",
        help="find out which experts resemble one another",
        description="Compare the experts of a model, and keep for each which others resemble it most.",
    )
    options.add_model_option(parser)
    options.add_offline_option(parser)
    options.add_settings(parser, "state")


def _add_doctor(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "doctor",
        help="check this machine",
        description="Check this machine and its installation, and say what to do about what is wrong.",
    )
    parser.switch("--json", help="print the checks as JSON")
    options.add_model_option(parser)


def _add_command(
    commands: _Commands, name: str, *, help: str, description: str, epilog: str | None = None
) -> options.Parser:
    parser = commands.add_parser(name, help=help, description=description, epilog=epilog)
    parser.set_defaults(parser=parser, command=name)
    return parser


def _dispatch(argv: Sequence[str] | None, engine: EngineFactory | None) -> int:
    parser = build_parser()
    arguments = options.read_command_line(parser, argv)
    if arguments.command is None:
        raise UsageError("no command given; try 'edgemoe chat', or see 'edgemoe --help'")
    for sentence in parser.unknown_variables(os.environ):
        sys.stderr.write(f"edgemoe: {harmless_line(sentence)}\n")
    from edgemoe.cli.temporary import ensure_temporary_folder

    ensure_temporary_folder()
    if arguments.command == "run":
        from edgemoe.cli.run.run import run as command
    elif arguments.command == "chat":
        from edgemoe.cli.chat.chat import chat as command
    elif arguments.command == "serve":
        from edgemoe.cli.serve import serve as command
    elif arguments.command == "plan":
        from edgemoe.cli.plan import plan as command
    elif arguments.command == "pack":
        from edgemoe.cli.checkpoints.pack import pack as command
    elif arguments.command == "models":
        from edgemoe.cli.checkpoints.models import models as command
    elif arguments.command == "eval":
        from edgemoe.cli.eval import evaluate as command
    elif arguments.command == "profile":
        from edgemoe.cli.profile import profile as command
    elif arguments.command == "affinity":
        from edgemoe.cli.affinity import affinity as command
    else:
        from edgemoe.cli.doctor.doctor import doctor as command
    return command(arguments, engine)


def _complain(sentence: str) -> None:
    sys.stderr.write(f"edgemoe: error: {harmless_line(sentence)}\n")


def _show_traceback() -> None:
    if os.environ.get("EDGEMOE_TRACEBACK") == "1":
        import traceback

        traceback.print_exc()
