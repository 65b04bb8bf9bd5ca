"""Pickles read as data: plain values, and what a caller allows by name.

`pickle` builds whatever a file names, and even where that is restricted, a few bytes
can claim all memory (a memo of 2^31 places, a `bytearray` of 2^40). Here a pickle is
walked through by `pickletools`, which only parses; nothing in it is imported or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from io import BytesIO
from typing import Any, BinaryIO

# A checkpoint takes some 40 steps a tensor: 200,000 for 5,000 tensors.
MOST_STEPS = 1_000_000

# What a key of a dict may be: hashing a tuple in a tuple, and so on, can end a process.
KEYS = (str, bytes, int, float, bool, type(None))

# What a call may copy.
COPIED = (dict, list)


class NeedsCodeError(ValueError):
    """The file can't be read without running code in it."""


class Allowed:
    """Something that a pickle may name.

    Args:
        name: for messages.
        call: what stands for calling it; without, it may only be named.
        new: what stands for an empty instance of it.
    """

    def __init__(
        self,
        name: str,
        call: Callable[..., Any] | None = None,
        new: Callable[[], Any] | None = None,
    ) -> None:
        self.name = name
        self.call = call
        self.new = new


class Holder:
    """An object of a class that isn't here: its attributes, and nothing else."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name
        self.attributes: dict[str, Any] = {}


def dict_of(pairs: Any = ()) -> dict[Any, Any]:
    """What stands for calling `dict`, with the keys that any dict here may have.

    Raises:
        ValueError: if it is called with anything but a dict or a list of pairs.
    """
    if pairs != () and not isinstance(pairs, COPIED):
        raise ValueError('its pickle makes a dict of what is no list')
    made: dict[Any, Any] = {}
    for pair in pairs.items() if isinstance(pairs, dict) else pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError('its pickle makes a dict of what are no pairs')
        _set_item(made, *pair)
    return made


def _set_item(target: dict[Any, Any], key: Any, value: Any) -> None:
    if not isinstance(key, KEYS):
        raise ValueError(f'its pickle has a {type(key).__name__} as a key')
    if key in target:
        raise ValueError(f'its pickle has {key!r} twice')
    target[key] = value


# Gives what stands for `module` and `name`, or raises `NeedsCodeError`.
Find = Callable[[str, str], Allowed]


class PlainUnpickler:
    """Reads one pickle.

    Args:
        file: stands behind the pickle afterwards.
        find: decides about names.
        persistent: makes what a persistent id stands for.
    """

    def __init__(
        self,
        file: BinaryIO | bytes,
        find: Find,
        persistent: Callable[[Any], Any],
    ) -> None:
        self.file = BytesIO(file) if isinstance(file, bytes) else file
        self.find = find
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def load(self) -> Any:
        """What the pickle holds.

        Raises:
            NeedsCodeError: if it names or does what isn't allowed.
            Exception: of many kinds, if it is damaged.
        """
        for opcode, argument, _ in pickletools.genops(self.file):
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise ValueError(f'its pickle takes more than {MOST_STEPS} steps')
            if opcode.name in PUSHED:
                self.stack.append(argument)
            elif step := STEPS.get(opcode.name):
                step(self, argument)
            elif opcode.name not in SKIPPED:
                raise NeedsCodeError(f'it uses {opcode.name}')
        return self.stack.pop()

    # --- steps ------------------------------------------------------------------------

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def tuple_of(self, count: int) -> None:
        values = tuple(self.stack[len(self.stack) - count :])
        if len(values) != count:
            raise ValueError('its pickle is damaged')
        del self.stack[len(self.stack) - count :]
        self.stack.append(values)

    def put(self, place: Any) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError('its pickle sets items of what is no dict')
        for key, value in zip(values[::2], values[1::2], strict=True):
            _set_item(target, key, value)

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError('its pickle appends to what is no list')
        self.stack[-1].extend(values)

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(' ')
        self.stack.append(self.find(module, name))

    def name_on_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError('its pickle has a name that is no text')
        self.stack.append(self.find(module, name))

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Allowed) or function.call is None:
            raise NeedsCodeError('it calls what is no function')
        if not isinstance(arguments, tuple):
            raise ValueError('its pickle has arguments that are no tuple')
        # Each call may copy them, and they may be the same ones every time.
        self.steps += sum(len(part) for part in arguments if isinstance(part, COPIED))
        if self.steps > MOST_STEPS:
            raise ValueError(f'its pickle copies more than {MOST_STEPS} values')
        self.stack.append(function.call(*arguments))

    def new(self, _: Any) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Allowed) or kind.new is None or arguments != ():
            raise NeedsCodeError('it makes an object of what is no class')
        self.stack.append(kind.new())

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Holder):
            if not isinstance(state, dict):
                raise NeedsCodeError(
                    f'{target.module}.{target.name} unpacks its own state'
                )
            target.attributes = state
        elif not isinstance(target, dict):  # of an OrderedDict: notes of its owner
            raise ValueError('its pickle gives a state to what has none')

    def persist(self, _: Any) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


PUSHED = {
    *('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4'),
    *('STRING', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES'),
    *('UNICODE', 'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8', 'FLOAT', 'BINFLOAT'),
}
SKIPPED = {'PROTO', 'FRAME', 'STOP'}

Step = Callable[[PlainUnpickler, Any], Any]

STEPS: dict[str, Step] = {
    'NONE': lambda self, _: self.stack.append(None),
    'NEWTRUE': lambda self, _: self.stack.append(True),
    'NEWFALSE': lambda self, _: self.stack.append(False),
    'EMPTY_TUPLE': lambda self, _: self.stack.append(()),
    'EMPTY_LIST': lambda self, _: self.stack.append([]),
    'EMPTY_DICT': lambda self, _: self.stack.append({}),
    'TUPLE': lambda self, _: self.stack.append(tuple(self.since_mark())),
    'TUPLE1': lambda self, _: self.tuple_of(1),
    'TUPLE2': lambda self, _: self.tuple_of(2),
    'TUPLE3': lambda self, _: self.tuple_of(3),
    'LIST': lambda self, _: self.stack.append(self.since_mark()),
    'MARK': lambda self, _: self.marks.append(len(self.stack)),
    'POP': lambda self, _: self.stack.pop(),
    'POP_MARK': lambda self, _: self.since_mark(),
    'DUP': lambda self, _: self.stack.append(self.stack[-1]),
    'MEMOIZE': PlainUnpickler.put,
    'PUT': PlainUnpickler.put,
    'BINPUT': PlainUnpickler.put,
    'LONG_BINPUT': PlainUnpickler.put,
    'GET': lambda self, place: self.stack.append(self.memo[place]),
    'BINGET': lambda self, place: self.stack.append(self.memo[place]),
    'LONG_BINGET': lambda self, place: self.stack.append(self.memo[place]),
    'SETITEM': lambda self, _: self.set_items([self.stack.pop(-2), self.stack.pop()]),
    'SETITEMS': lambda self, _: self.set_items(self.since_mark()),
    'APPEND': lambda self, _: self.append([self.stack.pop()]),
    'APPENDS': lambda self, _: self.append(self.since_mark()),
    'GLOBAL': PlainUnpickler.name,
    'STACK_GLOBAL': PlainUnpickler.name_on_stack,
    'REDUCE': PlainUnpickler.reduce,
    'NEWOBJ': PlainUnpickler.new,
    'BUILD': PlainUnpickler.build,
    'BINPERSID': PlainUnpickler.persist,
}
