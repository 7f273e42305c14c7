"""llama.cpp's library in a process of its own: `quantize LIBRARY IN OUT TYPE` and `logits LIBRARY FILE OUT TOKENS`.

Parameters are what the library says itself, in a buffer longer than any version's structure, so that none is described
here. The fields that are set are the first ones, which have been the same for two years, and one by its place in the
library of llama-cpp-python 0.3.36; another place is noticed.
"""

from __future__ import annotations

import ctypes
import json
import sys
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
        "llama_model_default_params": (Parameters, ()),
        "llama_context_default_params": (Parameters, ()),
        "llama_model_quantize_default_params": (Parameters, ()),
        "llama_model_load_from_file": (pointer, (ctypes.c_char_p, Parameters)),
        "llama_init_from_model": (pointer, (pointer, Parameters)),
        "llama_model_get_vocab": (pointer, (pointer,)),
        "llama_vocab_n_tokens": (ctypes.c_int32, (pointer,)),
        "llama_decode": (ctypes.c_int32, (pointer, Batch)),
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


def logits(library: ctypes.CDLL, file: str, out: str, tokens: list[int]) -> str:
    """Writes the logits after every token to `out`, float32 [tokens, vocabulary]; what went wrong, or an empty text."""
    chosen = library.llama_model_default_params()
    flags = (ctypes.c_uint8 * (4 * WORDS)).from_buffer(chosen)
    if flags[USE_EXTRA_BUFTS - 2 : USE_EXTRA_BUFTS + 1] != [0, 0, 1]:
        return "its llama_model_params are not those of llama-cpp-python 0.3.36: install that version"
    flags[USE_EXTRA_BUFTS] = 0
    model = library.llama_model_load_from_file(file.encode(), chosen)
    if not model:
        return "llama_model_load_from_file returned nothing"
    count = len(tokens)
    parameters = library.llama_context_default_params()
    # n_ctx, n_batch, n_ubatch
    parameters.words[0] = parameters.words[1] = parameters.words[2] = count
    context = library.llama_init_from_model(model, parameters)
    if not context:
        return "llama_init_from_model returned nothing"
    sequence = ctypes.pointer(ctypes.c_int32(0))
    sequences = (ctypes.POINTER(ctypes.c_int32) * count)(*[sequence] * count)
    batch = Batch(
        count,
        (ctypes.c_int32 * count)(*tokens),
        None,
        (ctypes.c_int32 * count)(*range(count)),
        (ctypes.c_int32 * count)(*[1] * count),
        sequences,
        (ctypes.c_int8 * count)(*[1] * count),
    )
    status = library.llama_decode(context, batch)
    if status:
        return f"llama_decode returned {status}"
    width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(library.llama_get_logits_ith(context, at), (width,)).copy() for at in range(count)]
    np.save(Path(out), np.stack(rows))
    return ""


def main(arguments: list[str]) -> int:
    """Runs one of the two; the exit status is 1 where the library refuses."""
    action, path, *rest = arguments
    library = opened(path)
    file, out, last = rest
    wrong = quantize(library, file, out, last) if action == "quantize" else logits(library, file, out, json.loads(last))
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
