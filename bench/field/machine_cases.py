"""Machines that lack something: streams, a home, a locale, permissions, cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.field.case import CHATML, Case, edgemoe, holds, same, sound, speaking, tiny, words_tokenizer

LINES = "".join(json.dumps({"prompt": "a", "max_tokens": 2, "temperature": 0}) + "\n" for _ in range(3))
NOBODY = (
    "setpriv --reuid 4242 --regid 4242 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search "
    "env -u USER -u LOGNAME -u HOME "
)
"""A user without a name or a home, who may read an interpreter that is root's."""


def _results(folder: Path, streams: str) -> str:
    done = edgemoe(["run", "-", "-o", folder / "out", "--overwrite"], stdin=LINES, shell=streams)
    return sound(done) or same(len((folder / "out").read_text().splitlines()), 3)


def _streams(folder: Path) -> str:
    return next(
        (said for each in ("2>&-", "-v 2>&1 | head -1", ">&-", ">&- 2>&-") if (said := _results(folder, each))), ""
    )


def _pipe_that_closes(folder: Path) -> str:
    done = edgemoe(["plan"], shell="| head -1", PYTHONUNBUFFERED="1")
    return sound(done)


def _ascii_terminal(folder: Path) -> str:
    said = ["assistant\n", "\N{GRINNING FACE}", "<|im_end|>"]
    tokenizer = words_tokenizer([*said, "a"], ["<|im_start|>", "<|im_end|>"], template=CHATML, eos="<|im_end|>")
    speaking(folder / "model", tokenizer, said)
    done = edgemoe(["chat", "-m", folder / "model", "-p", "a", "--temp", "0"], PYTHONIOENCODING="ascii:strict")
    return sound(done)


def _ascii_locale(folder: Path) -> str:
    """A chat template that is no ASCII, where Python takes files for ASCII."""
    said = ["assistant\n", "ok", "<|im_end|>"]
    tokenizer = words_tokenizer(
        [*said, "a", "中"], ["<|im_start|>", "<|im_end|>"], template="中" + CHATML, eos="<|im_end|>"
    )
    speaking(folder / "model", tokenizer, said)
    (folder / "model" / "chat_template.jinja").write_text("中" + CHATML, encoding="utf-8")
    done = edgemoe(
        ["chat", "-m", folder / "model", "-p", "a", "-n", "3"],
        LC_ALL="C",
        LANG="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )
    return sound(done)


def _user_without_a_name(folder: Path) -> str:
    folder.chmod(0o755)
    shown = edgemoe(["chat", "-p", "What is 48 + 31?"], before=NOBODY, stdin="")
    wrong = edgemoe(["plan", "-m", "~nouser/x"])
    return sound(shown) or same(shown.stdout, "48 + 31 = 79\n") or sound(wrong, 3)


def _weights_of_another_user(folder: Path) -> str:
    """The process becomes that user once its modules are loaded: an interpreter may be root's alone."""
    folder.chmod(0o755)
    tiny(folder / "model")
    (folder / "model" / "model.safetensors").chmod(0o600)
    code = (
        "import os, sys\nfrom edgemoe.cli.main import main\n"
        "main(['plan', '--json', '--device', 'cpu'])\nos.setuid(4242)\nsys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "-m", str(folder / "model"), "--device", "cpu"],
        capture_output=True,
        text=True,
    )
    return sound(done, 3) or holds(done.stderr.lower(), "model.safetensors", "permission denied")


def _links_to_nowhere(folder: Path) -> str:
    tiny(folder / "model", max_shard_size="200KB")
    (folder / "model" / "notes.txt").symlink_to(folder / "nowhere")
    extra = sound(edgemoe(["plan", "-m", folder / "model"]))
    shard = sorted((folder / "model").glob("model-*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to(folder / "nowhere")
    done = edgemoe(["plan", "-m", folder / "model"])
    return extra or sound(done, 3) or holds(done.stderr, shard.name)


def _one_core(folder: Path) -> str:
    code = "from edgemoe import Engine; e = Engine.load(device='cpu'); print(e.plan.threads); e.close()"
    done = subprocess.run(["taskset", "-c", "0", sys.executable, "-c", code], capture_output=True, text=True)
    return same(done.stdout.strip(), "1") and f"{done.stdout} {done.stderr[-300:]}"


def _fork(folder: Path) -> str:
    code = (
        "import os, sys\nfrom edgemoe import Engine, Sampling\n"
        "e = Engine.load(device='cpu', expert_cache='20%', state_folder='none')\n"
        "e.generate('a', Sampling(max_tokens=2))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n        e.generate('a', Sampling(max_tokens=2))\n        os._exit(0)\n"
        "    except Exception as error:\n"
        "        os._exit(0 if type(error).__name__ == 'EdgeMoEError' else 9)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return same(done.stdout.strip(), "0") and f"{done.stdout} {done.stderr[-300:]}"


def _nothing_can_be_written(folder: Path) -> str:
    """Neither the installation, nor a home, nor a folder for temporary files."""
    package = Path(__file__).parents[2]
    lock = " && ".join(
        f"mount --bind {path} {path} && mount -o remount,ro,bind {path}" for path in (package, "/tmp", "/var/tmp")
    )
    variables = {"HOME": "/dev/null/home", "XDG_CACHE_HOME": "/dev/null/home", "NUMBA_CACHE_DIR": "/dev/null/numba"}
    done = edgemoe(["chat", "-p", "What is 48 + 31?"], before=f"cd / && {lock} && ", **variables)
    told = edgemoe(["doctor"], before=f"cd / && {lock} && ", **variables)
    return sound(done) or same(done.stdout, "48 + 31 = 79\n") or holds(told.stdout, "compiled")


CASES = [
    Case("localllm/localllm#20, tqdm/tqdm#1523", "closed and broken streams", _streams),
    Case("Sherin-SEF-AI/CanLab#24", "a pipe that closes", _pipe_that_closes),
    Case("doronz88/pymobiledevice3#1943", "a terminal of ASCII", _ascii_terminal),
    Case("huggingface/transformers#38553, ml-explore/mlx-examples#1340", "a locale of ASCII", _ascii_locale),
    Case("pytorch/pytorch#140765, yaml-runtimes#1", "a user without a name", _user_without_a_name),
    Case("safetensors/safetensors#805", "weights of another user", _weights_of_another_user),
    Case("containers/ramalama#784", "links to nowhere", _links_to_nowhere),
    Case("ollama/ollama#17916", "one core of several", _one_core),
    Case("gunicorn#1891, pytorch/pytorch#49555", "a process that forks", _fork),
    Case(
        "LMCache/LMCache#4597, numba/numba#5566, huggingface/open-r1#488",
        "nothing can be written",
        _nothing_can_be_written,
    ),
]
