"""The real step, traced: every tensor that a step of training allocates and frees, without any of their numbers.

    step(shape, method, task, options, [rows], "bfloat16").peak_bytes

The code that trains runs as it is, under a mode in which tensors of floating point are never written to or read, so
that they take no memory, while whole numbers, which decide where tokens go, are real. What only a number could tell is
taken to be the usual: a loss that is finite, a gradient that is equal for all rows, experts that are chosen evenly.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from weitiao import machine
from weitiao.data.batch import Example
from weitiao.errors import say
from weitiao.methods.base import Method
from weitiao.methods.expand import Expand, lengthen
from weitiao.methods.freeze import Freeze
from weitiao.models import quantized
from weitiao.models import shape as shapes
from weitiao.models.load import attention
from weitiao.models.shape import Shape
from weitiao.plan.activations import Tape
from weitiao.runs import Run
from weitiao.train import checkpoint, modes
from weitiao.train.course import Course
from weitiao.train.loop import Trainer
from weitiao.train.many import ALONE
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import Task

aten = torch.ops.aten
BY_SIZE = (aten._unsafe_view.default, aten.lift_fresh.default, aten._fused_sdp_choice.default, aten.detach_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default)
CHOICES = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.argmax.default)
NUMBERS = 2, 4  # of blocks that are gone through
FAULTS = (aten.isnan.default, aten.isinf.default)


class Recorder(TorchDispatchMode):
    """Notes in ``sizes`` the bytes of every storage that comes (> 0) and goes (< 0).

    A tensor that would hold numbers of floating point is there and never written to or read, so that its memory is
    never taken; so are whole numbers that come of such.
    """

    hollow = True  # ``models.kernels`` asks

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.alive: dict[int, Any] = {}  # storages, by their addresses
        self.unknown: set[int] = set()  # those of whole numbers that come of others
        self.marks: list[int] = []  # how many there were at certain times

    def mark(self) -> None:
        """Note the present time."""
        self.marks.append(len(self.sizes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._result(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._note(tensor)
        return out

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        elsewhere = any(one.device.type != "cpu" for one in given) or (device is not None and device.type != "cpu")
        if func in BY_SIZE or func.is_view or elsewhere or func.namespace == "profiler":
            return func(*args, **kwargs)
        known = not any(map(self.is_hollow, given))
        if given and known:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return True if given[0].dtype == torch.bool else 1.0 if given[0].is_floating_point() else 1
        written = _written(func, args, kwargs)
        if written or not func._schema.returns:
            return None if not func._schema.returns else written[0] if len(written) == 1 else tuple(written)
        if func in INDEXING:
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        like = _without_numbers(func, args, kwargs, device is not None or not given)
        if known and not any(one.is_floating_point() for one in tree_leaves(like) if isinstance(one, Tensor)):
            return func(*args, **kwargs)
        return tree_map(lambda one: self._hollow(func, args, one) if isinstance(one, Tensor) else one, like)

    def _hollow(self, func: Any, args: Any, like: Tensor) -> Tensor:
        """A tensor of these sizes."""
        if func in FAULTS:
            return torch.zeros(like.shape, dtype=like.dtype)
        if func in CHOICES and like.dtype == torch.int64:  # such as the experts of a token: in turn
            return torch.arange(like.numel()).remainder_(args[0].shape[-1]).view(like.shape)
        out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        if not like.is_floating_point():
            self.unknown.add(out.untyped_storage()._cdata)
        return out

    def is_hollow(self, tensor: Tensor) -> bool:
        """Whether it has no numbers."""
        return tensor.is_floating_point() or tensor.untyped_storage()._cdata in self.unknown

    def _places(self, index: Tensor | None) -> list[Any]:
        """Places in the stead of a mask, whose count could not be told from its size."""
        if index is None or index.dtype != torch.bool or self.is_hollow(index):
            return [index]
        return list(index.nonzero(as_tuple=True))

    def _note(self, tensor: Tensor) -> None:
        """The storage of ``tensor``, if it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive or not size:
            return

        def gone(_: Any) -> None:
            del self.alive[key]
            self.unknown.discard(key)
            self.sizes.append(-size)

        self.alive[key] = weakref.ref(storage, gone)
        self.sizes.append(size)


def _without_numbers(func: Any, args: Any, kwargs: Any, placed: bool) -> Any:
    """What ``func`` gives, on the meta device, which it is told where it asks to be ``placed``."""
    sizes: Any = tree_map(_without_memory, (args, kwargs))
    if func is aten._grouped_mm.default:  # there it knows one dtype alone
        narrow = [one.to(torch.bfloat16) if one is not None and one.is_floating_point() else one for one in sizes[0]]
        return func(*narrow, **sizes[1]).to(args[0].dtype)
    return func(*sizes[0], **sizes[1] | ({"device": "meta"} if placed else {}))


def _without_memory(value: Any) -> Any:
    """A tensor of the same sizes on the meta device; anything else as it is."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that ``func`` writes to."""
    given = [*zip(func._schema.arguments, args, strict=False)]
    given += [(part, kwargs[part.name]) for part in func._schema.arguments if part.name in kwargs]
    return [value for part, value in given if part.alias_info is not None and part.alias_info.is_write]


@dataclass(frozen=True)
class Traced:
    """The most that lives at once in each part of a step, over weights and what the optimiser keeps; and that itself.
    Parts: of each micro-batch the forward pass and either half of the backward pass; the optimiser's step."""

    parts: tuple[float, ...]
    state_bytes: float

    @property
    def peak_bytes(self) -> int:
        """The most of all."""
        return int(max(self.parts))

    def towards(self, other: Traced, far: float) -> Traced:
        """``far`` 0 is this, 1 the other: what lives grows evenly with each block."""
        pairs = zip(self.parts, other.parts, strict=True)
        parts = tuple(one + (two - one) * far for one, two in pairs)
        return Traced(parts, self.state_bytes + (other.state_bytes - self.state_bytes) * far)


def step(
    shape: Shape,
    method: Method,
    task: Task,
    options: TrainOptions,
    batches: Sequence[Sequence[Example]],
    dtype: str,
    quantize: str = "none",
    recomputed: bool = False,
) -> Traced:
    """What lives in a step over these micro-batches, by a model of this shape; ``recomputed``: all blocks compute
    their activations twice. Blocks are all alike where there are more than a few: two and four of them are gone
    through."""
    course = Course([row for batch in batches for row in batch], task, options)
    few, more = NUMBERS if not isinstance(method, Expand) else (max(4, method.blocks), 2 * max(4, method.blocks))
    found = partial(_step, task=task, options=options, course=course, batches=batches, dtype=dtype,
                    quantize=quantize, recomputed=recomputed)  # fmt: skip
    frozen = shape.layers - method.blocks if isinstance(method, Freeze) else 0
    kept, apart = shape.layers - frozen, min(frozen, 1)
    if kept <= more:
        return found(*cut(shape, method, kept, apart))
    return found(*cut(shape, method, few, apart)).towards(
        found(*cut(shape, method, more, apart)), (kept - few) / (more - few)
    )


def cut(shape: Shape, method: Method, blocks: int, frozen: int) -> tuple[Shape, Method]:
    """The shape and the method where so many blocks keep something, above so many that do not."""
    method = method.model_copy(update={"blocks": blocks}) if isinstance(method, Freeze) else method
    if blocks + frozen == shape.layers:
        return shape, method
    config = shapes.read_config(json.loads(shape.configuration))
    lengthen(config, range(blocks + frozen))
    return shapes.read(config), method


def _step(
    shape: Shape,
    method: Method,
    *,
    task: Task,
    options: TrainOptions,
    course: Course,
    batches: Sequence[Sequence[Example]],
    dtype: str,
    quantize: str,
    recomputed: bool,
) -> Traced:
    """One step, gone through."""
    recorder = Recorder()
    with going_through(recorder):
        model = built(shape, method, dtype, quantize)
        method.begin(model, course.total_steps)
        options = options.model_copy(update={"paged_optimizer": False})
        state = Trainer(model, method, task, options, Run("nowhere"), course, 0, None, ALONE)
        recorder.mark()
        with modes.engine(model, options, course, recomputed=len(shape.blocks) if recomputed else 0):
            model.train()
            with method.training(model):
                for rows in batches:
                    loss = state.loss(rows)
                    recorder.mark()
                    loss.backward()
                    recorder.mark()
                    del loss
            if isinstance(penalty := method.penalty(model), Tensor):
                penalty.backward()
            torch.nn.utils.clip_grad_norm_(state.parts.parameters.values(), options.max_grad_norm or math.inf)
            state.optimizer.step()
            state.parts.norm()
            recorder.mark()
            state.optimizer.zero_grad(set_to_none=True)
            recorder.mark()
        return traced(recorder)


def traced(recorder: Recorder) -> Traced:
    """Of the stretches between marks the most that lives in them; each backward pass is two."""
    start, *rest = recorder.marks
    *bounds, end = [start, *rest]
    live = [0]
    for size in recorder.sizes[start:end]:
        live.append(live[-1] + size)
    parts, state = [], live[end - start]
    for number, (first, last) in enumerate(pairwise(bounds)):
        halves = [first, (first + last) // 2, last] if number % 2 and last != bounds[-1] else [first, last]
        for one, two in pairwise(halves):
            parts.append(max(live[one - start : two - start + 1], default=0))
    *passes, step = parts
    return Traced((*passes, step - state), state)


def built(shape: Shape, method: Method, dtype: str, quantize: str) -> Any:
    """The model with the method attached."""
    config = shapes.read_config(json.loads(shape.configuration))
    config.dtype = dtype
    with shapes.quiet():
        kind: Any = shapes.auto_class(config)
        model = kind.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention(config))
    if quantize != "none":
        quantized.quantize(model, quantize, training=method.base_names(shape))  # type: ignore[arg-type]
    return method.attach(model.eval())


@contextmanager
def going_through(recorder: Recorder) -> Iterator[None]:
    """Inside, nothing is computed. What is kept for good once it is made is made before; random numbers stay."""
    machine.best_dtype()
    for table in (quantized.levels, quantized.byte_pairs, quantized.dynamic_map):
        table()
    state = checkpoint.random_state()
    try:
        with recorder:
            yield
    finally:
        checkpoint.set_random_state(state)


@dataclass
class Worst:
    """What the steps of a plan need that need most, gone through."""

    shape: Shape
    method: Method
    task: Task
    options: TrainOptions
    course: Course
    dtype: str
    quantize: str
    tape: Tape
    found: dict[tuple[int, bool], Traced | None] = field(default_factory=dict)

    def peak_bytes(self, number: int, again: int) -> int | None:
        """Of the step of this number, over weights and the optimiser's state, where ``again`` blocks compute their
        activations twice. None where it cannot be gone through: an operation whose sizes depend on numbers, say, or no
        room for so much that is never used."""
        blocks = self.tape.blocks
        wanted = (False,) if not again else (True,) if again >= blocks else (False, True)
        ends = [found for end in wanted if (found := self._step(number, end)) is not None]
        if len(ends) < len(wanted):
            return None
        # one block alone that computes its activations twice saves nothing
        lives = ends[0].towards(ends[1], (again - 1) / (blocks - 1)) if len(ends) > 1 else ends[0]
        return int(lives.peak_bytes * (1 + self.tape.heap_share))

    def _step(self, number: int, recomputed: bool) -> Traced | None:
        key = number, recomputed
        if key not in self.found:
            batches = sorted(self.course.micro_batches(number), key=self.course.computed_tokens, reverse=True)[:2]
            given = self.shape, self.method, self.task, self.options, batches, self.dtype, self.quantize
            try:
                self.found[key] = step(*given, recomputed)
            except Exception as error:  # whatever a family's own code does with a tensor without numbers
                message = "the worst step could not be gone through ({reason}); its memory is estimated from the shape"
                say(message, reason=type(error).__name__)
                self.found[key] = None
        return self.found[key]
