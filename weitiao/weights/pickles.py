"""Pickles without pickle: an interpreter of the opcodes that builds tensors' descriptions and plain values only.

    tree = read(data)                               # dicts, lists, numbers, texts, Tensor(...)

pickle.load calls whatever a file names; torch's own restricted reader has been got around more than once
(CVE-2025-32434, CVE-2026-24747). Here nothing is imported and nothing of the file is called: a name is looked up in the
table BUILDERS, whose values are functions of this module, and any other name ends the reading. There is no fallback.
The opcodes are those of Python's pickletools, which describes them and runs none.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from weitiao.weights.archive import Refused

PICKLE_BYTES = 64 << 20
TEXT_BYTES = 1 << 20  # of one text or byte string: names, and numpy's random state
VIEW_ELEMENTS = 1 << 20  # a tensor may repeat its storage (expand) up to this size
DTYPES = {  # torch's names of types, and of the storages of old
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "complex128": "C128",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128", "LongStorage": "I64", "IntStorage": "I32",
    "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Name:
    """A class or function that the file names and this module knows; it is never imported."""

    full: str


@dataclass(frozen=True)
class Storage:
    """A block of bytes outside the pickle: its key, the type of its elements and how many there are."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Held(dict):
    """What a known class held, as a table of its own; ``kind`` is the name of the class."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind


# ---- what may be built ---------------------------------------------------------------------------------------------


def _whole(values: Any, count: int | None = None) -> tuple[int, ...]:
    """A tuple of natural numbers."""
    right = isinstance(values, tuple | list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
    if not right or len(values) > 64 or count not in (None, len(values)):
        raise Refused("a tensor's shape or strides are no sizes")
    return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: a view, which must lie inside of its storage."""
    return _view(storage, storage.dtype if isinstance(storage, Storage) else "", offset, shape, strides)


def _typed(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor:
    """torch._utils._rebuild_tensor_v3: the type is named apart from the storage, which counts bytes."""
    if not isinstance(dtype, Name) or dtype.full.removeprefix("torch.") not in DTYPES:
        raise Refused("a tensor's type is not known")
    return _view(storage, DTYPES[dtype.full.removeprefix("torch.")], offset, shape, strides)


def _view(storage: Any, dtype: str, offset: Any, shape: Any, strides: Any) -> Tensor:
    from weitiao.weights.header import BITS

    if not isinstance(storage, Storage):
        raise Refused("a tensor without a storage")
    shape = _whole(shape)
    strides = _whole(strides, len(shape))
    (offset,) = _whole((offset,))
    elements = math.prod(shape)
    held = storage.elements * BITS[storage.dtype] // BITS[dtype]
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) + 1
    if elements and last > held:
        raise Refused(
            "a tensor of shape {shape} reaches beyond its storage of {held} elements", shape=list(shape[:8]), held=held
        )
    if elements > max(held, VIEW_ELEMENTS):
        raise Refused("a tensor of shape {shape} repeats {held} elements", shape=list(shape[:8]), held=held)
    return Tensor(storage, dtype, offset, shape, strides)


def _first(value: Any, *rest: Any) -> Any:
    """A parameter is its tensor."""
    if not isinstance(value, Tensor):
        raise Refused("a parameter without a tensor")
    return value


def _from_type(function: Any, kind: Any, values: Any, *rest: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a parameter with attributes of its own, which are left out."""
    if not isinstance(function, Name) or not function.full.startswith("torch._utils._rebuild_"):
        raise Refused("a tensor is rebuilt by something unknown")
    return BUILDERS[function.full](*values)


def _table(values: Any = ()) -> dict[Any, Any]:
    if isinstance(values, Mapping):
        return dict(values)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in values):
        raise Refused("a table is built from no pairs")
    return dict(values)


def _text(value: Any = "", *rest: Any) -> str:
    return str(value)[:TEXT_BYTES]


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """_codecs.encode: bytes as protocol 2 writes them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("bytes in an unknown encoding")
    return text.encode("latin-1")


def _sequence(values: Any = ()) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise Refused("a sequence is built from something else")
    return list(values)


def _keeps(kind: str) -> Callable[..., Any]:
    """A class whose content is kept as a table and which is not built."""
    return lambda *_: Held(kind)


ATTRIBUTES = [  # lightning's tables of hyper-parameters, by its names over the years
    f"{package}.AttributeDict"
    for package in ("pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing",
                    "lightning_fabric.utilities.data", "lightning.fabric.utilities.data")
]  # fmt: skip
NUMPY = [
    *(
        f"{package}.multiarray.{name}"
        for package in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar")
    ),
    "numpy.dtype",
]
BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _table,
    "collections.Counter": _table,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": lambda values=(): _whole(values),
    "torch.device": _text,
    "_codecs.encode": _bytes,
    **{
        f"{module}.{name}": _sequence for module in ("builtins", "__builtin__") for name in ("set", "list", "frozenset")
    },
    **{name: _keeps(name.rpartition(".")[2]) for name in ("argparse.Namespace", *ATTRIBUTES, *NUMPY)},
}
KNOWN = {  # names that stand for themselves and are not called
    *(f"torch.{name}" for name in (*DTYPES, *STORAGES)),
    *("torch.storage.UntypedStorage", "torch.nn.parameter.Parameter", "numpy.ndarray"),
}


def _name(module: Any, name: Any) -> Name:
    """The name, if it is known; Refused otherwise, whatever it is."""
    full = f"{module}.{name}"
    callbacks = full.startswith(("pytorch_lightning.callbacks.", "lightning.pytorch.callbacks."))  # keys of their state
    if not isinstance(name, str) or not (full in BUILDERS or full in KNOWN or (callbacks and full.isascii())):
        raise Refused("it names {name}, which could run code", name=full[:120])
    return Name(full)


def _called(function: Any, values: Any) -> Any:
    """What a builder of this module makes of ``values``."""
    builder = BUILDERS.get(function.full) if isinstance(function, Name) else None
    if builder is None:
        raise Refused(
            "it calls {name}, which could run code", name=getattr(function, "full", type(function).__name__)[:120]
        )
    if not isinstance(values, tuple):
        raise Refused("a call without arguments")
    return builder(*values)


def _stored(values: Any) -> Storage:
    """A persistent id: ("storage", its class, its key, where it was, how many elements)."""
    if (
        not isinstance(values, tuple)
        or len(values) not in (5, 6)
        or values[0] != "storage"
        or values[5:] not in ((), (None,))
    ):
        raise Refused("a reference to something that is no storage")
    kind, key, elements = values[1], values[2], values[4]
    name = kind.full.removeprefix("torch.") if isinstance(kind, Name) else ""
    dtype = "U8" if name == "storage.UntypedStorage" else STORAGES.get(name)
    if dtype is None or not isinstance(key, str) or len(key) > 64:
        raise Refused("a storage of an unknown type")
    return Storage(key, dtype, _whole((elements,))[0])


# ---- the machine ---------------------------------------------------------------------------------------------------


class _Machine:
    """The stack, its marks and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def since_mark(self) -> list[Any]:
        place = self.marks.pop()
        values = self.stack[place:]
        del self.stack[place:]
        return values

    def last(self, count: int) -> tuple[Any, ...]:
        if count > len(self.stack) - (self.marks[-1] if self.marks else 0):
            raise IndexError
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return values

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise Refused("items are set in what is no table")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[key] = value

    def table(self, values: list[Any]) -> None:
        self.stack.append({})
        self.set_items(values)

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise Refused("items are added to what is no list")
        self.stack[-1].extend(values)

    def build(self, state: Any) -> None:
        """State of an object: kept where its class is a table, left out of an OrderedDict, a parameter, a number."""
        target = self.stack[-1]
        if isinstance(target, Held):
            target.update(state if isinstance(state, Mapping) else {})
        elif not isinstance(target, dict | Tensor):
            raise Refused("state is put into {name}", name=type(target).__name__)


CONSTANTS = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (),
}  # fmt: skip
LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE "
    "BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
PUTS, GETS = frozenset("PUT BINPUT LONG_BINPUT".split()), frozenset("GET BINGET LONG_BINGET".split())
STEPS: dict[str, Callable[[_Machine], Any]] = {
    "MARK": lambda m: m.marks.append(len(m.stack)),
    "POP": lambda m: m.stack.pop(),
    "POP_MARK": lambda m: m.since_mark(),
    "EMPTY_DICT": lambda m: m.stack.append({}),
    "EMPTY_LIST": lambda m: m.stack.append([]),
    "EMPTY_SET": lambda m: m.stack.append([]),
    "TUPLE": lambda m: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m: m.stack.append(m.last(1)),
    "TUPLE2": lambda m: m.stack.append(m.last(2)),
    "TUPLE3": lambda m: m.stack.append(m.last(3)),
    "LIST": lambda m: m.stack.append(m.since_mark()),
    "DICT": lambda m: m.table(m.since_mark()),
    "FROZENSET": lambda m: m.stack.append(m.since_mark()),
    "APPEND": lambda m: m.append(list(m.last(1))),
    "APPENDS": lambda m: m.append(m.since_mark()),
    "ADDITEMS": lambda m: m.append(m.since_mark()),
    "SETITEM": lambda m: m.set_items(list(m.last(2))),
    "SETITEMS": lambda m: m.set_items(m.since_mark()),
    "STACK_GLOBAL": lambda m: m.stack.append(_name(*m.last(2))),
    "REDUCE": lambda m: m.stack.append(_called(*m.last(2))),
    "NEWOBJ": lambda m: m.stack.append(_called(*m.last(2))),
    "BINPERSID": lambda m: m.stack.append(_stored(*m.last(1))),
    "MEMOIZE": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "BUILD": lambda m: m.build(*m.last(1)),
}


def read(data: bytes | BinaryIO) -> Any:
    """The value of one pickle, from its bytes or from a file that stands where it begins and is left behind it.

    Refused for anything that is not needed to describe tensors and plain values.
    """
    machine = _Machine()
    try:
        for opcode, argument, place in pickletools.genops(data):
            if (place or 0) > PICKLE_BYTES:
                raise Refused("its pickle is longer than {limit} bytes", limit=PICKLE_BYTES)
            if opcode.name == "STOP":
                (value,) = machine.last(1)
                return value
            _step(machine, opcode.name, argument)
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Refused("its pickle is broken ({name})", name=type(error).__name__) from error
    raise Refused("its pickle has no end")


def _step(machine: _Machine, name: str, argument: Any) -> None:
    """One opcode."""
    if name in LITERALS:
        if isinstance(argument, str | bytes) and len(argument) > TEXT_BYTES:
            raise Refused("a text of {size} bytes", size=len(argument))
        machine.stack.append(argument)
    elif name in PUTS:
        machine.memo[argument] = machine.stack[-1]
    elif name in GETS:
        machine.stack.append(machine.memo[argument])
    elif name in CONSTANTS:
        machine.stack.append(CONSTANTS[name])
    elif name == "GLOBAL":
        module, _, attribute = argument.partition(" ")
        machine.stack.append(_name(module, attribute))
    elif step := STEPS.get(name):
        step(machine)
    elif name not in ("PROTO", "FRAME"):
        raise Refused("it uses {name}, which no tensor needs", name=name)
