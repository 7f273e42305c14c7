"""llama.cpp's library in a process of its own: `quantize LIBRARY IN OUT TYPE`, `logits LIBRARY FILE OUT TOKENS`,
`features LIBRARY`, which prints what it was built for, and `serve LIBRARY FILE THREADS LENGTH [mapped]`, which reads
lines and answers each with the seconds that it took.

Parameters are what the library says itself, in a buffer longer than any version's structure, so that none is described
here. The fields that are set are the first ones, which have been the same for two years, and one by its place in the
library of llama-cpp-python 0.3.36; another place is noticed.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import numpy as np

TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11,
    "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25,
    "IQ3_S": 26, "IQ3_M": 27, "IQ4_XS": 30, "MXFP4_MOE": 38,
}  # fmt: skip
"""llama.cpp's numbers of the types of a file that need no importance matrix (`enum llama_ftype`)."""
WORDS = 512
"""Of 4 bytes: more than any version's parameters take."""
THREADS = 2
MAPPED = "mapped"
"""Weights stay in the file's memory map, where arranging them would copy them to memory."""
USE_EXTRA_BUFTS = 74
"""The byte of `llama_model_params` that lets the library arrange weights for AMX: 1 by itself, after two bytes of 0.

Some machines say that they have AMX and do not let a process use it, which dies of it."""


class Parameters(ctypes.Structure):
    """`llama_model_params`, `llama_context_params` or `llama_model_quantize_params`: nothing is said of the fields."""

    _fields_ = (("words", ctypes.c_uint32 * WORDS),)


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def opened(path: str) -> ctypes.CDLL:
    """The library, with the types of what is called."""
    library = ctypes.CDLL(path)
    pointer = ctypes.c_void_p
    signatures = {
        "llama_backend_init": (None, ()),
        "llama_print_system_info": (ctypes.c_char_p, ()),
        "llama_model_default_params": (Parameters, ()),
        "llama_context_default_params": (Parameters, ()),
        "llama_model_quantize_default_params": (Parameters, ()),
        "llama_model_load_from_file": (pointer, (ctypes.c_char_p, Parameters)),
        "llama_init_from_model": (pointer, (pointer, Parameters)),
        "llama_model_get_vocab": (pointer, (pointer,)),
        "llama_vocab_n_tokens": (ctypes.c_int32, (pointer,)),
        "llama_decode": (ctypes.c_int32, (pointer, Batch)),
        "llama_set_n_threads": (None, (pointer, ctypes.c_int32, ctypes.c_int32)),
        "llama_get_memory": (pointer, (pointer,)),
        "llama_memory_clear": (None, (pointer, ctypes.c_bool)),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (pointer, ctypes.c_int32)),
        "llama_model_quantize": (
            ctypes.c_uint32,
            (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)),
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    return library


def quantize(library: ctypes.CDLL, source: str, out: str, kind: str) -> str:
    """Writes `source` to `out` in the type `kind`; what went wrong, or an empty text."""
    parameters = library.llama_model_quantize_default_params()
    # nthread, ftype, and the first byte after the types of two tensors: allow_requantize
    parameters.words[0], parameters.words[1] = THREADS, TYPES[kind]
    parameters.words[4] |= 1
    status = library.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters))
    return f"llama_model_quantize returned {status}" if status else ""


class Model:
    """A model in memory, with room for one sequence."""

    def __init__(self, library: ctypes.CDLL, file: str, length: int, *, extra: bool) -> None:
        """`length` is that of the sequence, and of the longest pass; `extra` is `USE_EXTRA_BUFTS`.

        Raises RuntimeError where the library refuses.
        """
        self._library = library
        chosen = library.llama_model_default_params()
        flags = (ctypes.c_uint8 * (4 * WORDS)).from_buffer(chosen)
        if flags[USE_EXTRA_BUFTS - 2 : USE_EXTRA_BUFTS + 1] != [0, 0, 1]:
            raise RuntimeError("its llama_model_params are not those of llama-cpp-python 0.3.36: install that version")
        flags[USE_EXTRA_BUFTS] = extra
        self._model = library.llama_model_load_from_file(file.encode(), chosen)
        if not self._model:
            raise RuntimeError("llama_model_load_from_file returned nothing")
        parameters = library.llama_context_default_params()
        # n_ctx, n_batch, n_ubatch
        parameters.words[0] = parameters.words[1] = parameters.words[2] = length
        self._context = library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama_init_from_model returned nothing")
        self.length = 0

    def use_threads(self, count: int) -> None:
        """For passes of one token and of many."""
        self._library.llama_set_n_threads(self._context, count, count)

    def clear(self) -> None:
        """Forgets the sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self.length = 0

    def append(self, tokens: list[int], *, outputs: bool) -> None:
        """Adds `tokens` to the sequence, with logits for all of them or the last one. Raises RuntimeError."""
        count, first = len(tokens), self.length
        sequence = ctypes.pointer(ctypes.c_int32(0))
        wanted = [1] * count if outputs else [0] * (count - 1) + [1]
        batch = Batch(
            count,
            (ctypes.c_int32 * count)(*tokens),
            None,
            (ctypes.c_int32 * count)(*range(first, first + count)),
            (ctypes.c_int32 * count)(*[1] * count),
            (ctypes.POINTER(ctypes.c_int32) * count)(*[sequence] * count),
            (ctypes.c_int8 * count)(*wanted),
        )
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self.length += count

    def logits(self, at: int) -> np.ndarray:
        """Those after token number `at` of the last pass, float32 [vocabulary]; waits for them."""
        width = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
        found = np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, at), (width,))
        return np.array(found, np.float32)


def logits(library: ctypes.CDLL, file: str, out: str, tokens: list[int]) -> None:
    """Writes the logits after every token to `out`, float32 [tokens, vocabulary]."""
    model = Model(library, file, len(tokens), extra=False)
    model.append(tokens, outputs=True)
    np.save(Path(out), np.stack([model.logits(at) for at in range(len(tokens))]))


def serve(library: ctypes.CDLL, file: str, threads: int, length: int, *, extra: bool) -> None:
    """Answers lines of JSON: a list of tokens is appended, and null forgets all of them. One line of seconds each."""
    model = Model(library, file, length, extra=extra)
    model.use_threads(threads)
    print("0", flush=True)
    for line in sys.stdin:
        tokens = json.loads(line)
        started = time.perf_counter()
        if tokens is None:
            model.clear()
        else:
            model.append(tokens, outputs=False)
            model.logits(-1)
        print(time.perf_counter() - started, flush=True)


def main(arguments: list[str]) -> int:
    """Runs one of the four; the exit status is 1 where the library refuses."""
    action, path, *rest = arguments
    library = opened(path)
    wrong = ""
    try:
        if action == "quantize":
            wrong = quantize(library, *rest)
        elif action == "logits":
            logits(library, rest[0], rest[1], json.loads(rest[2]))
        elif action == "features":
            print(library.llama_print_system_info().decode())
        else:
            serve(library, rest[0], int(rest[1]), int(rest[2]), extra=MAPPED not in rest)
    except RuntimeError as error:
        wrong = str(error)
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
