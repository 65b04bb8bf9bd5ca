"""What is in an ONNX file, found without onnx and before onnxruntime opens it.

Only the parts that say what a graph may reach are looked at, by their numbers in
onnx.proto; the rest is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pyiqa_clipkd.description import EXTERNAL, KEY, Description, is_plain_name

# Bytes: what protocol buffers can hold.
LARGEST_GRAPH = (1 << 31) - 1

# A graph of 1,000 nodes has some 20,000; a hostile one would take minutes.
MOST_FIELDS = 5_000_000
DEEPEST = 8

# Kinds of fields: a number, eight bytes, a length and so many bytes, four bytes.
VARINT, LONG, BYTES, SHORT = 0, 1, 2, 5

# Message -> field -> what is in it. In capitals: a text that is looked at.
MESSAGES: dict[str, dict[int, str]] = {
    'model': {7: 'graph', 14: 'property', 25: 'function'},
    'graph': {1: 'node', 5: 'tensor', 15: 'sparse'},
    'function': {7: 'node', 11: 'attribute'},
    'node': {4: 'OPERATOR', 5: 'attribute', 7: 'DOMAIN'},
    'attribute': {5: 'tensor', 10: 'tensor', 6: 'graph', 11: 'graph', 22: 'sparse',
                  23: 'sparse'},
    'sparse': {1: 'tensor', 2: 'tensor'},
    'tensor': {13: 'place'},
    'place': {1: 'KEY', 2: 'VALUE'},
    'property': {1: 'KEY', 2: 'VALUE'},
}  # fmt: skip

# Operators that run a graph of their own, any number of times. None of ours has one.
CONTROL_FLOW = {'If', 'Loop', 'Scan', 'SequenceMap'}


@dataclass
class OnnxFile:
    """What a graph says of itself, and what it would reach.

    Attributes:
        properties: name -> text, of the whole model.
        operators: `domain.name`, or the name alone of ONNX's own.
        locations: files with its tensors, as it names them.
    """

    properties: dict[str, str] = field(default_factory=dict)
    operators: set[str] = field(default_factory=set)
    locations: set[str] = field(default_factory=set)
    fields: int = 0

    def take(self, kind: str, texts: dict[str, str]) -> None:
        """Remember the texts of one message."""
        if kind == 'property':
            self.properties[texts.get('KEY', '')] = texts.get('VALUE', '')
        elif kind == 'place' and texts.get('KEY') == 'location':
            self.locations.add(texts.get('VALUE', ''))
        elif kind == 'node':
            domain, name = texts.get('DOMAIN', ''), texts.get('OPERATOR', '')
            own = domain in ('', 'ai.onnx')
            self.operators.add(name if own else f'{domain}.{name}')


def read_onnx(path: Path) -> OnnxFile:
    """Look through an ONNX file.

    Raises:
        OSError: if it can't be read.
        ValueError: if it is damaged or too large.
    """
    size = path.stat().st_size
    if size > LARGEST_GRAPH:
        raise ValueError(f'it has {size} bytes')
    found = OnnxFile()
    _walk(memoryview(path.read_bytes()), 'model', found, 0)
    return found


def _walk(data: memoryview, kind: str, found: OnnxFile, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError('its graphs lie too deep in each other')
    texts: dict[str, str] = {}
    for number, part in _fields(data, found):
        inside = MESSAGES[kind].get(number)
        if inside is None or part is None:
            continue
        if inside.isupper():
            texts[inside] = bytes(part).decode()
        else:
            _walk(part, inside, found, depth + 1)
    found.take(kind, texts)


def _fields(
    data: memoryview, found: OnnxFile
) -> Iterator[tuple[int, memoryview | None]]:
    """Number and bytes of each field; `None` for numbers."""
    place = 0
    while place < len(data):
        found.fields += 1
        if found.fields > MOST_FIELDS:
            raise ValueError(f'it has more than {MOST_FIELDS} parts')
        tag, place = _varint(data, place)
        part = None
        if tag & 7 == VARINT:
            _, place = _varint(data, place)
        elif tag & 7 in (LONG, SHORT):
            place += 8 if tag & 7 == LONG else 4
        elif tag & 7 == BYTES:
            length, place = _varint(data, place)
            part = data[place : place + length]
            place += length
        else:
            raise ValueError('it is cut off or no ONNX model')
        if place > len(data):
            raise ValueError('it is cut off or no ONNX model')
        yield tag >> 3, part


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70 and place < len(data):
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise ValueError('it is cut off or no ONNX model')


def describe_onnx(path: Path) -> Description:
    """What an exported model says of itself, if it reaches nothing but its own files.

    Raises:
        OSError: if it can't be read.
        ValueError: says what is wrong.
    """
    try:
        found = read_onnx(path)
    except ValueError as error:
        raise ValueError(f'{path} is damaged, is no ONNX model ({error}).') from error
    if KEY not in found.properties:
        raise ValueError(
            f'{path} was not written by `pyiqa-clipkd export`: it does not say what it '
            'takes and gives.'
        )
    try:
        description = Description.decode(found.properties[KEY])
    except ValueError as error:
        raise ValueError(f'{path} has {error}.') from error
    foreign = sorted(
        name for name in found.operators if '.' in name or name in CONTROL_FLOW
    )
    if foreign:
        raise ValueError(
            f'{path} is refused: no export of ours has {", ".join(foreign)[:80]}.'
        )
    allowed = {description.weights, _heads(description.weights)}
    if description.precision != EXTERNAL:
        allowed = set()
    if strange := sorted(found.locations - allowed):
        raise ValueError(
            f'{path} is refused: it would read {strange[0][:80]!r}, which is not the '
            'weight file that it names.'
        )
    return description


def _heads(weights: str) -> str:
    from pyiqa_clipkd.locations import attributes_file

    return attributes_file(Path(weights)).name if is_plain_name(weights) else ''
