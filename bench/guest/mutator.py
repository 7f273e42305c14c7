"""Changes valid inputs: bytes, numbers in texts, and values of JSON documents."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 127, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1, (1 << 63) - 1,
    1 << 63, -(1 << 63), 10**30, -(10**30), 0.0, -0.5, 0.5, 1.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"),
    float("-inf"), "", "x", "nosuch", ".", "..", "../x", "/etc/passwd", "\ud800", "\0", "a" * 5000, [], [[]], [1],
    [None], ["x"], [[1]], {}, {"a": 1}, {"type": "nosuch"}, {"rope_type": "yarn", "factor": -1},
    "bytes:x", "set:ab", "half:a",
)  # fmt: skip
"""What stands in the place of any value. The last ones are what JSON has no way to say, to the parsers of requests."""
TOKENS = (
    b"-1", b"0", b"1e999", b"NaN", b"Infinity", b"-Infinity", b"null", b'"x"', b"[]", b"{}", b"[[1]]", b"9" * 30,
    b"9" * 400, b"9" * 5000, b"2147483648", b"18446744073709551615", b"9223372036854775808", b"0.5", b"1e-320",
    b"\xff\xfe", b"\x00", b'"', b"}", b",",
)  # fmt: skip
"""What stands in the place of a number in a text."""
DEEP = (b"[", b'{"a":', b"(")


class Mutator:
    """Draws changed inputs, the same ones for the same seed."""

    def __init__(self, samples: list[bytes], seed: int, *, text: bool) -> None:
        """Of `samples`; `text` for those whose values are changed, too."""
        self._samples = samples
        self._random = random.Random(seed)
        self._text = text
        self._documents = [sample for sample in samples if _is_document(sample)] if text else []

    def draw(self) -> bytes:
        """The next input."""
        if self._documents and self._random.random() < 0.6:
            return self._changed_document()
        data = bytearray(self._random.choice(self._samples))
        for _ in range(self._random.choice((1, 1, 1, 2, 4, 16))):
            data = self._changed_bytes(data)
        return bytes(data)

    def _changed_document(self) -> bytes:
        document = json.loads(self._random.choice(self._documents))
        for _ in range(self._random.choice((1, 1, 1, 2, 3))):
            document = self._changed_value(document)
        return json.dumps(document).encode("utf-8", "surrogatepass")

    def _changed_value(self, document: Any) -> Any:
        """Changes a random value of the document, in place where it is an object or a list."""
        draw, place = self._random, document
        while isinstance(place, (dict, list)) and place:
            key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and draw.random() < 0.8:
                place = inner
                continue
            kind = draw.random()
            if kind < 0.15:
                del place[key]
            elif kind < 0.25 and isinstance(place, dict):
                place[str(draw.choice(VALUES))[:50]] = inner
            elif kind < 0.3:
                place[key] = [inner] * draw.choice((1, 2, 100))
            else:
                place[key] = copy.deepcopy(draw.choice(VALUES))
            return document
        return copy.deepcopy(draw.choice(VALUES))

    def _changed_bytes(self, data: bytearray) -> bytearray:
        draw = self._random
        kind = draw.randrange(9)
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice((1, 2, 4, 8, 64, 1024)))
        if kind == 0 and data:
            data[start % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[start:stop] = draw.randbytes(draw.choice((1, 2, 4, 8, 64)))
        elif kind == 2:
            del data[start:stop]
        elif kind == 3:
            data[start:start] = data[start:stop] * draw.choice((1, 2, 16))
        elif kind == 4:
            del data[start:]
        elif kind == 5:
            data[start:stop] = draw.choice(self._samples)[start:stop][::-1]
        elif kind == 6:
            data[start:stop] = draw.choice((1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1)).to_bytes(8, "little")
        elif kind == 7 and draw.random() < 0.02:
            data[start:start] = draw.choice(DEEP) * draw.choice((100, 2000, 100_000))
        else:
            found = list(NUMBER.finditer(bytes(data[start : start + 4096])))
            if found:
                match = draw.choice(found)
                data[start + match.start() : start + match.end()] = draw.choice(TOKENS)
        return data


def _is_document(sample: bytes) -> bool:
    try:
        json.loads(sample)
    except ValueError:
        return False
    return True
