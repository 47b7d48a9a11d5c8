"""Finds the elements of an array in a large JSON file, and where they are: a block of the file at a time is in memory.

Parsers of streams, such as ijson, don't say where an element is. By its place it can be read again alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

BLOCK, DEEPEST = 2**22, 10_000
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|(?P<open>\\?\Z))|[{}\[\]]', re.DOTALL)
"""A text, which may go on in the next block, or a bracket."""


def items(stream: IO[bytes], name: str, block: int = BLOCK) -> Iterator[tuple[int, bytes]]:
    """Yields (first byte in the file, JSON) of each object in the array `name` of the object that the file is.

    Raises ValueError for a file that ends early or is nested without end. What lies between the objects is not checked.
    """
    wanted = b'"' + name.encode() + b'"'
    depth, key, inside = 0, b"", False
    start = -1  # first byte of the object that has begun
    data, base, place = b"", 0, 0  # what is in memory, where it lies in the file, and where the next token may begin
    while more := stream.read(block):
        data += more
        for token in TOKEN.finditer(data, place):
            letter = data[token.start()]
            if letter == 0x22:  # a text
                if token["open"] is not None:
                    place = token.start()
                    break
                if depth == 1:
                    key = token[0]
            elif letter in b"{[":
                depth += 1
                if depth > DEEPEST:
                    raise ValueError("brackets nested too deeply")
                inside = inside or (depth == 2 and letter == 0x5B and key == wanted)
                if inside and depth == 3 and start < 0:
                    start = base + token.start()
            else:
                depth -= 1
                if inside and depth == 2 and start >= 0:
                    yield start, data[start - base : token.end()]
                    start = -1
                elif inside and depth < 2:
                    return
            place = token.end()
        kept = start - base if start >= 0 else place
        data, base, place = data[kept:], base + kept, place - kept
    if depth or place < len(data.rstrip()):
        raise ValueError("the file ends early")
