"""`edgemoe serve`: the model over HTTP, for programs and for a browser."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any, cast

from edgemoe.cli.arguments import model_settings
from edgemoe.cli.exits import Exit, FileTrouble, UsageError, why
from edgemoe.cli.loading import factory, say_lossy, say_not_served, say_simulation, say_which_model
from edgemoe.cli.output import say
from edgemoe.cli.render import columns
from edgemoe.cli.surface import EngineFactory
from edgemoe.cli.wording import in_options
from edgemoe.errors import EdgeMoEError

_SETTINGS = {
    "host": "host", "port": "port", "max_running": "max_running", "max_queue": "max_queue", "max_body": "max_body",
}  # fmt: skip
"""Options that are settings of the server, by the names of these."""

_ANY_LENGTH = (1 << 63) - 1
"""Tokens of a reply where a request gives no limit: clients that give none expect that the context is the only one."""


def serve(arguments: argparse.Namespace, engine: EngineFactory | None = None) -> int:
    """Serve until a signal. Raises UsageError for settings that are refused, and what planning raises."""
    try:
        from edgemoe.server.lifecycle import Server
        from edgemoe.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise UsageError(f"serve needs {error.name}, which is not installed: pip install 'edgemoe[server]'") from error
    from edgemoe.model_host import ModelHost

    given = _settings(arguments)
    try:
        settings = ServerSettings(**given)
    except EdgeMoEError as error:
        raise UsageError(in_options(str(error))) from error
    say_which_model(arguments)
    asked, source = model_settings(arguments) | {"default_max_tokens": _ANY_LENGTH}, factory(engine)
    with ModelHost(keep_alive=arguments.keep_alive, loader=cast("Any", source.load), **asked) as host:
        plan = source.plan_for(**asked)
        say_simulation(plan)
        say_not_served(plan)
        say_lossy(plan)
        if arguments.verbose:
            sys.stderr.write(columns(plan.lines()) + "\n")
        server = Server(host, plan.model, settings)
        if arguments.keep_alive is None:
            # It stays in memory, so that the first request need not wait.
            host.load().add_done_callback(_tell_loaded)
        _quiet_uvicorn()
        say(f"{plan.model} at {server.url} (OpenAI's clients: {server.url}/v1, Anthropic's: {server.url}); Ctrl-C ends")
        server.run()
    return Exit.OK


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, option) for option, name in _SETTINGS.items()}
    keys = [*(arguments.api_key or []), *_keys_of(arguments.api_key_file)]
    lists = {
        "api_keys": frozenset(keys),
        "allow_origins": tuple(arguments.allow_origin or ()),
        "aliases": frozenset(arguments.alias or ()),
    }
    return {name: value for name, value in given.items() if value is not None} | lists


def _keys_of(path: str | None) -> list[str]:
    """The keys in a file, one a line. Raises FileTrouble and UsageError."""
    if path is None:
        return []
    try:
        keys = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = why(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise FileTrouble(f"cannot read {path}: {reason}") from error
    found = [key for key in keys if key]
    if not found:
        # The server would otherwise serve everybody.
        raise UsageError(f"argument --api-key-file: {path} has no key; write one on each line")
    return found


def _quiet_uvicorn() -> None:
    """What clients do wrong, and what a second signal tears, is no matter for whoever looks at the terminal."""
    if os.environ.get("EDGEMOE_TRACEBACK") != "1":
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)


def _tell_loaded(loading: Any) -> None:
    error = loading.exception()
    if error is None:
        say("the model is loaded")
    else:
        say(f"the model is not loaded: {in_options(str(error))}; the next request tries again")
