"""Tensors out of torch's zip files (TorchScript archives and `torch.save` files) with nothing executed.

Such a zip holds the raw bytes of every tensor (`<name>/data/0` ...), a pickle that says how they are arranged
(`<name>/data.pkl`) and, in TorchScript, code. The code is never opened. The pickle is not unpickled either: a
pickle is a small program for a stack machine, and what makes it dangerous is that this machine can import
anything and call it. The machine below cannot: a global is only ever its name, an inert `Global`, and no
Python object is looked up by it; "call" (REDUCE) is a table of the seven names that torch writes, each
standing for a function of this file that rearranges plain data; "new object" makes a `Node`, a bare holder of
attributes. Anything else is an error that names what was asked for. Opcodes are decoded by the standard
library's `pickletools`, which only reads.

What tensors claim (offset, size, stride) is checked against the bytes that are there before a tensor is made.
"""

from __future__ import annotations

import pickletools
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ...errors import BadWeights

MAX_PICKLE = 64 << 20  # bytes of data.pkl; the largest CLIP has less than one million
MAX_MEMBERS = 100_000
MAX_VISITS = 1_000_000  # nodes walked; shared nodes could otherwise be nested into an endless tree
MAX_DEPTH = 64
STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Global:
    """The name of a global in a pickle. Only a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Node:
    """What stands for an object of a TorchScript class: its class name and its attributes."""

    kind: str
    state: Any = field(default_factory=dict)


_MARK = object()


class Archive:
    """A checked zip file of torch.

    Parameters
    ----------
    path : the file

    Raises
    ------
    BadWeights
        For member names that leave the archive, links, encrypted, doubled or too many members, more than one
        root, or a zip without `data.pkl`.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
            self._members = {i.filename: i for i in self._zip.infolist()}
        except Exception as error:  # a damaged zip makes zipfile raise nearly anything
            raise BadWeights(f"{path}: not a readable zip file ({error}; cut short?).") from error
        infos = self._zip.infolist()
        if len(infos) > MAX_MEMBERS or len(infos) != len(self._members):
            raise BadWeights(f"{path}: {len(infos)} members, {len(self._members)} different names; refused.")
        for info in infos:
            self._check(info)
        pickles = [n for n in self._members if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise BadWeights(f"{path}: a torch zip file has one data.pkl. Found {sorted(self._members)[:8]}.")
        self.root = pickles[0].split("/")[0]
        self.is_torchscript = any(n.startswith(f"{self.root}/code/") for n in self._members)
        self._storages: dict[str, torch.Tensor] = {}

    def _check(self, info: zipfile.ZipInfo) -> None:
        name = PurePosixPath(info.filename)
        if (
            name.is_absolute()
            or ".." in name.parts
            or "\\" in info.filename
            or ":" in info.filename
            or "\0" in info.filename
        ):
            raise BadWeights(f"{self.path}: member {info.filename!r} leaves the archive; refused.")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise BadWeights(f"{self.path}: member {info.filename!r} is a link; refused.")
        if info.flag_bits & 1:
            raise BadWeights(f"{self.path}: member {info.filename!r} is encrypted; refused.")

    def _read(self, name: str, limit: int | None = None) -> bytes:
        info = self._members.get(f"{self.root}/{name}")
        if info is None:
            raise BadWeights(f"{self.path}: the archive names {name!r} but does not hold it.")
        if info.compress_type != zipfile.ZIP_STORED:
            raise BadWeights(f"{self.path}: {name!r} is compressed; torch stores its members as they are.")
        if limit is not None and info.file_size > limit:
            raise BadWeights(f"{self.path}: {name!r} has {info.file_size} bytes, at most {limit} are read.")
        try:
            return self._zip.read(info)
        except Exception as error:
            raise BadWeights(f"{self.path}: {name!r} cannot be read ({error}).") from error

    def root_object(self) -> Any:
        """What data.pkl describes, as dictionaries, lists, tuples, tensors and `Node`s."""
        if f"{self.root}/byteorder" in self._members and self._read("byteorder", 16) != b"little":
            raise BadWeights(f"{self.path}: byte order is not little endian.")
        data = self._read("data.pkl", MAX_PICKLE)
        try:
            return _run(data, self._storage)
        except BadWeights as error:
            raise BadWeights(f"{self.path}: {error}") from error
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            OverflowError,
        ) as error:
            raise BadWeights(f"{self.path}: data.pkl is damaged ({type(error).__name__}: {error}).") from error

    def _storage(self, claim: Any) -> torch.Tensor:
        tag, kind, key, _device, count = claim
        dtype = STORAGES.get(kind.name) if isinstance(kind, Global) and kind.module == "torch" else None
        if tag != "storage" or dtype is None or not isinstance(key, str) or "/" in key:
            raise BadWeights(f"unknown storage {claim!r:.120}")
        if key not in self._storages:
            raw = bytearray(self._read(f"data/{key}"))
            self._storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        if self._storages[key].numel() < count or self._storages[key].dtype != dtype:
            raise BadWeights(f"storage {key!r} should hold {count} numbers, it holds {self._storages[key].numel()}")
        return self._storages[key]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Flat dictionary of every tensor, named by its path through modules and dictionaries
        ("a.b.weight")."""
        found: dict[str, torch.Tensor] = {}
        visits = 0
        stack: list[tuple[str, Any, int]] = [("", self.root_object(), 0)]
        while stack:
            prefix, value, depth = stack.pop()
            visits += 1
            if visits > MAX_VISITS or depth > MAX_DEPTH:
                raise BadWeights(f"{self.path}: the objects in data.pkl are nested without end; refused.")
            if isinstance(value, torch.Tensor):
                found[prefix] = value
            elif isinstance(value, (Node, dict)):
                state = value.state if isinstance(value, Node) else value
                children = state.items() if isinstance(state, dict) else ()
                named = [(f"{prefix}.{k}" if prefix else k, v, depth + 1) for k, v in children if isinstance(k, str)]
                stack.extend(reversed(named))
        return found


def _tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 8 or not all(type(n) is int and n >= 0 for n in numbers):
        raise BadWeights(f"impossible tensor: offset {offset!r}, size {size!r:.80}, stride {stride!r:.80}")
    count = 1
    for n in size:
        count *= n
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else offset
    if (count and last >= storage.numel()) or count > storage.numel():
        raise BadWeights(f"tensor of size {size} at {offset} reaches beyond its {storage.numel()} stored numbers")
    return torch.as_strided(storage, size, stride, offset)


def _ordered(items: Any = ()) -> dict:
    return dict(items)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": _ordered,
    "torch.jit._pickle.restore_type_tag": lambda value, _: value,
    "torch.jit._pickle.build_intlist": lambda value: value,
    "torch.jit._pickle.build_doublelist": lambda value: value,
    "torch.jit._pickle.build_tensorlist": lambda value: value,
}
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "SHORT_BINSTRING", "BINSTRING",
}  # fmt: skip


def _run(data: bytes, storage: Callable[[Any], torch.Tensor]) -> Any:
    """Run the pickle program on the restricted machine described at the top of this file."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:  # an IndexError past the bottom is reported as damage
            at -= 1
            if at < 0:
                raise ValueError("no mark on the stack")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    argument: Any
    for opcode, argument, _position in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _VALUES:
            stack.append(argument)
        elif name in _LITERALS:
            stack.append(_LITERALS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "GLOBAL":
            stack.append(Global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Global(str(module), str(attribute)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = stack[-count:]
            del stack[-count:]
            stack.append(tuple(items))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "APPENDS":
            items = since_mark()
            stack[-1].extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name == "SETITEMS":
            items = since_mark()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "BINPERSID":
            stack.append(storage(stack.pop()))
        elif name == "NEWOBJ":
            arguments, kind = stack.pop(), stack.pop()
            if not isinstance(kind, Global) or not kind.module.startswith("__torch__") or arguments != ():
                raise BadWeights(f"the file asks to make an object of {kind}; refused, nothing was run")
            stack.append(Node(str(kind)))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Node):
                stack[-1].state = state
            elif not isinstance(stack[-1], dict):  # a state dictionary carries notes for torch (_metadata): dropped
                raise BadWeights(f"the file asks to change a {type(stack[-1]).__name__}; refused, nothing was run")
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            call = _CALLS.get(str(function)) if isinstance(function, Global) else None
            if call is None:
                raise BadWeights(f"the file asks to call {function}; refused, nothing was run")
            stack.append(call(*arguments))
        else:
            raise BadWeights(f"the file uses the pickle instruction {name}; refused, nothing was run")
    raise ValueError("the pickle has no end")
