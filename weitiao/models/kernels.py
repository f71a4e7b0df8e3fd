"""The elementwise parts of a training block: compiled once from ``kernels.c``, and in plain torch where that cannot be.

    out, inverse, total = norm(x, weight, epsilon, delta)

Every function does in one pass over memory what takes torch several. The library is built with the machine's own C
compiler (``CC``, or cc, gcc, clang) the first time it is wanted, and kept in the cache folder for this source, compiler
and processor. Without a compiler that is said once, and blocks are left to transformers; every function has a twin in
torch, for tests and for what else calls it. Tensors are contiguous unless said otherwise; E is the dtype of matrix
products, R that of the residual stream: bfloat16 and bfloat16, bfloat16 and float32, or float32 and float32.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from weitiao.errors import say, t
from weitiao.machine.speed import cache_folder

SOURCE = Path(__file__).with_name("kernels.c")
FILES = ("adapted", "attention", "bytes", "codes", "decode", "products", "vectors")
INCLUDED = tuple(SOURCE.with_name(f"{name}.c") for name in FILES)
FLAGS = "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -shared -fPIC".split()
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ["-mprefer-vector-width=512"]  # compilers shy away from what older processors slowed down for
SECONDS = 900  # after which a compiler is given up: it takes some ten of a free core, and the machine may be busy
NAMES = {torch.bfloat16: "bf16", torch.float32: "float"}
KINDS = {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_float}  # what else is passed is a pointer
LEVELS, LOWEST = 1 << 16, -(1 << 63)  # of the sixteen bits that decide a place; of the 64 that are drawn at once
SILU = 1.0, 0.0  # x to x · sigmoid(slope x + cubic x³): what a gate lets through
GELU_TANH = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715
PARTS = 16  # of the rows, each of which sums up a gradient of its own: as many whatever the number of threads


@functools.cache
def compiled() -> Any:
    """The compiled functions; None where there are none."""
    if os.environ.get("WEITIAO_KERNELS") == "torch":
        return None
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "")
    try:
        if not compiler:
            raise OSError("no C compiler")
        return ctypes.CDLL(str(_built(compiler.split())))
    except (OSError, subprocess.SubprocessError) as error:
        slow = isinstance(error, subprocess.TimeoutExpired)
        said = t("the compiler took more than {seconds} s, and is tried again next time", seconds=SECONDS)
        said = said if slow else getattr(error, "stderr", "")
        lines = (said or str(error)).strip().splitlines()
        message = "no compiled kernels ({reason}); training goes on with transformers' own modules, which are slower"
        say(message, reason=lines[-1] if lines else type(error).__name__)
        return None


def _built(compiler: list[str]) -> Path:
    """The library's path; compiles it if it is not there yet."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    flags = [*FLAGS, *_threads()]
    facts = [source(), *compiler, *flags, version, platform.machine(), processor()]
    name = f"{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:24]}.so"
    path = cache_folder() / "kernels" / name
    if path.is_file():
        return path
    say("compiling kernels for this processor, once; on a busy machine it may take minutes")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / name
        command = [*compiler, str(SOURCE), *flags, "-lm", "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        os.replace(made, path)
    return path


def source() -> str:
    """The text of all kernels."""
    return "".join(path.read_text("utf-8") for path in (SOURCE, *INCLUDED))


def _threads() -> list[str]:
    """Torch's own OpenMP library, by its path: a second one would bring threads of its own that fight for the cores."""
    if sys.platform != "linux":
        return []
    folder = Path(torch.__file__).parent
    found = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    return [str(found[0]), "-Wl,--as-needed"] if found else []


def processor() -> str:
    """What tells this processor from others that may share the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))


def _typed(name: str, first: Tensor, stream: Tensor, *arguments: Any) -> None:
    """The compiled function for the dtypes of ``first`` (E) and ``stream`` (R); tensors go as pointers."""
    run(f"{name}_{NAMES[first.dtype]}_{NAMES[stream.dtype]}", *arguments)


def run(name: str, *arguments: Any) -> int:
    """Call the compiled function of that name; tensors, and None in the place of one, go as pointers."""
    if traced():
        return 0
    function = getattr(compiled(), name)
    if function.argtypes is None:
        function.argtypes = [KINDS.get(type(argument), ctypes.c_void_p) for argument in arguments]
    return function(*[argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments])


def traced() -> bool:
    """Whether a pass is only gone through (``plan.trace``), with tensors that have no numbers."""
    return getattr(_get_current_dispatch_mode(), "hollow", False)


def serves(products: torch.dtype, stream: torch.dtype) -> bool:
    """Whether there are functions for this pair of dtypes."""
    return products in NAMES and stream in (products, torch.float32)


def norm(
    x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype, delta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of ``x`` + ``delta``: its output in ``dtype``, 1 / rms of every
    row in float32, and the sum.

    ``x`` [..., H] of R, ``weight`` [H] of float32, ``delta`` [..., H] of E.
    """
    out, inverse = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape[:-1], dtype=torch.float32)
    total = x if delta is None else torch.empty_like(x)
    if compiled() is None:
        if delta is not None:
            torch.add(x, delta, out=total)
        inverse = torch.rsqrt(total.float().square().mean(-1) + epsilon)
        return normed(total, weight, inverse, dtype), inverse, total
    _typed("norm", out, x, x, delta, weight, epsilon, total, out, inverse, inverse.numel(), x.shape[-1])
    return out, inverse, total


def normed(x: Tensor, weight: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`norm` gave for ``x``, again."""
    if compiled() is None:
        return (x.float() * inverse[..., None] * weight).to(dtype)
    out = torch.empty(x.shape, dtype=dtype)
    _typed("normed", out, x, x, weight, inverse, out, inverse.numel(), x.shape[-1])
    return out


def norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, residual: Tensor | None, slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`norm`, given the one at its output: at ``x`` with ``residual`` added to it (R), the same in
    the dtype of ``gradient``, and at the weight (float32 [H]) where ``slope`` asks for it."""
    if compiled() is None:
        g, unit = gradient.float() * weight, x.float() * inverse[..., None]
        total = inverse[..., None] * (g - unit * (g * unit).mean(-1, keepdim=True))
        at_weight = (gradient.float() * unit).flatten(0, -2).sum(0) if slope else None
        total = (total if residual is None else total + residual).to(x.dtype)
        return total, total.to(gradient.dtype), at_weight
    out, width = torch.empty_like(x), x.shape[-1]
    narrow = out if x.dtype == gradient.dtype else torch.empty_like(gradient)
    slopes = torch.zeros(PARTS, width) if slope else None
    sizes = (PARTS, inverse.numel(), width)
    written = None if narrow is out else narrow
    _typed("norm_backward", gradient, x, gradient, x, weight, inverse, residual, out, written, slopes, *sizes)
    return out, narrow, None if slopes is None else slopes.sum(0)


def add(x: Tensor, delta: Tensor) -> Tensor:
    """``x`` + ``delta`` in the dtype of ``x``."""
    out = torch.empty_like(x)
    if compiled() is None:
        return torch.add(x, delta, out=out)
    _typed("add", delta, x, x, delta, out, x.numel())
    return out


def gated(gate: Tensor, up: Tensor, curve: tuple[float, float] = SILU) -> Tensor:
    """silu(``gate``) · ``up`` (SwiGLU, arXiv 2002.05202), or with another ``curve`` what that makes of the gate. Rows
    of both [N, K] may lie apart, as far in one as in the other."""
    if compiled() is None:
        x = gate.float()
        return (x * _share(x, curve) * up).to(gate.dtype)
    assert gate.stride() == up.stride() and gate.stride(1) == 1
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _typed("gated", gate, gate, gate, up, out, *curve, gate.stride(0), *gate.shape)
    return out


def gated_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, again: bool, curve: tuple[float, float] = SILU
) -> tuple[Tensor, Tensor | None]:
    """Gradients at ``gate`` and ``up``, side by side [N, 2 K], and the product itself where it is wanted ``again``."""
    if compiled() is None:
        x, (slope, cubic) = gate.float(), curve
        share, bend = _share(x, curve), cubic * x.square()
        at_gate = gradient * up.float() * share * (1 + x * (1 - share) * (slope + 3 * bend))
        both = torch.cat([at_gate, gradient * (x * share)], 1).to(gate.dtype)
        return both, gated(gate, up, curve) if again else None
    assert gate.stride() == up.stride() and gate.stride(1) == 1 and gradient.is_contiguous()
    both = torch.empty(len(gate), 2 * gate.shape[1], dtype=gate.dtype)
    product = torch.empty(gate.shape, dtype=gate.dtype) if again else None
    _typed("gated_backward", gate, gate, gradient, gate, up, both, product, *curve, gate.stride(0), *gate.shape)
    return both, product


def _share(x: Tensor, curve: tuple[float, float]) -> Tensor:
    """What a gate lets through of itself."""
    slope, cubic = curve
    return torch.sigmoid(x * (slope + cubic * x.square()))


def turned(
    source: Tensor,
    target: Tensor,
    cosine: Tensor,
    sine: Tensor,
    scale: float = 1.0,
    back: bool = False,
    woven: bool = False,
) -> Tensor:
    """Write ``source`` [B, T, heads, groups, D], turned by rotary angles (arXiv 2104.09864) and scaled, into
    ``target``.

    Both may be views with any strides but the last; ``cosine`` and ``sine`` [B or 1, T, rotated / 2] of float32, of
    width 0 to turn nothing; ``back`` turns the other way; ``woven``: a number turns with its neighbour, not with the
    one that is rotated / 2 behind. Returns ``target``.
    """
    batch, length, heads, groups, width = source.shape
    half, direction = cosine.shape[-1], -1.0 if back else 1.0
    if compiled() is None:
        turns, rest = source.float().split([2 * half, width - 2 * half], -1)
        x, y = (turns[..., ::2], turns[..., 1::2]) if woven else turns.chunk(2, -1)
        c, s = cosine[:, :, None, None], sine[:, :, None, None] * direction
        turned = x * c - y * s, y * c + x * s
        there = torch.stack(turned, -1).flatten(-2) if woven else torch.cat(turned, -1)
        return target.copy_(torch.cat([there, rest], -1) * scale)
    apart = cosine.shape[1] * half if cosine.shape[0] > 1 else 0
    sizes = (apart, scale, direction, batch, length, heads, groups, width, half, woven)
    steps = (*source.stride()[:4], *target.stride()[:4])
    _typed("turned", source, source, source, target, cosine, sine, *sizes, *steps)
    return target


def shares(scores: Tensor, groups: int, start: int) -> Tensor:
    """Softmax in place of ``scores`` [n, queries · groups, keys], over the keys up to ``start`` + query; the ones
    behind get nothing."""
    n, rows, keys = scores.shape
    if compiled() is None:
        return torch.softmax(scores.masked_fill_(_unseen(rows, groups, keys, start), float("-inf")), -1, out=scores)
    _typed("shares", scores, scores, scores, n, rows // groups, groups, keys, start)
    return scores


def shares_backward(shares: Tensor, gradient: Tensor, groups: int, start: int) -> Tensor:
    """The gradient at the scores, in place of the one at the shares."""
    n, rows, keys = shares.shape
    if compiled() is None:
        gradient.masked_fill_(_unseen(rows, groups, keys, start), 0.0)  # a share of nothing has none, be it infinite
        return torch.ops.aten._softmax_backward_data.out(gradient, shares, -1, shares.dtype, grad_input=gradient)
    _typed("shares_backward", shares, shares, shares, gradient, n, rows // groups, groups, keys, start)
    return gradient


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    starts: Tensor,
    fronts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> bool:
    """Causal attention whole, where the processor multiplies bfloat16 by itself; False, and nothing done, elsewhere.

    ``query`` [heads, N · groups, D], scaled, ``key`` and ``value`` [heads, N, D], ``out`` [N, heads, groups, D]; of
    these N tokens row s is those from ``starts`` [s] (int64) up to the next start, and sees those of ``fronts`` too
    (``prefixes.Fronts.table``). With ``lengths`` (int64 [rows]) it is the last of that many, whose keys and values are
    [rows, heads, capacity, D].
    """
    if not _attends(query):
        return False
    capacity = 0 if lengths is None else key.shape[2]
    _attended("attend", (query, key, value, out, starts, fronts, lengths, capacity), starts, out.shape[1:])
    return True


def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    at_query: Tensor,
    at_key: Tensor,
    at_value: Tensor,
    starts: Tensor,
    fronts: Tensor | None = None,
) -> bool:
    """Its gradients, written into ``at_query``, ``at_key`` and ``at_value``, given the one at ``out``."""
    if not _attends(query):
        return False
    shape = (len(key), query.shape[1] // key.shape[1], key.shape[2])
    sums = None if fronts is None else torch.empty(len(key) * int(fronts[-1]), 2, key.shape[2])
    tensors = (gradient, query, key, value, at_query, at_key, at_value, starts, fronts, sums)
    _attended("attend_backward", tensors, starts, shape)
    return True


def _attends(query: Tensor) -> bool:
    whole = query.dtype == torch.bfloat16 and query.shape[-1] % 16 == 0 and compiled() is not None
    return whole and hasattr(compiled(), "attend")


def _attended(name: str, arguments: Sequence[Any], starts: Tensor, shape: Sequence[int]) -> None:
    """``shape``: key heads, queries to each, width."""
    assert all(one.is_contiguous() for one in arguments if isinstance(one, Tensor))
    if run(name, *arguments, len(starts) - 1, *shape):
        raise MemoryError(f"{name}: {list(shape)}")


def _unseen(rows: int, groups: int, keys: int, start: int) -> Tensor:
    """[rows, keys]: which keys lie behind a row's query."""
    return torch.arange(keys) > start + torch.arange(rows)[:, None] // groups


def target_logps(logits: Tensor, targets: Tensor, steep: bool) -> Tensor:
    """Log-probabilities, float32 [N], of ``targets`` [N] under ``logits`` [N, V]. These are used up: where ``steep`` is
    set they become the gradient of the log-probability, one at the target less the probabilities."""
    if logits.device.type != "cpu" or logits.dtype not in NAMES or compiled() is None:
        wide = torch.log_softmax(logits, -1, dtype=torch.float32)
        logps = wide.gather(1, targets[:, None])[:, 0]
        if steep:
            torch.neg(wide.exp_(), out=wide).scatter_add_(1, targets[:, None], torch.ones_like(wide[:, :1]))
            logits.copy_(wide)
        return logps
    logps = torch.empty(len(targets), dtype=torch.float32)
    _typed("target_logps", logits, logits, logits, targets.contiguous(), logps, int(steep), *logits.shape)
    return logps


def spreads() -> bool:
    """Whether :func:`spread` is there."""
    return hasattr(compiled(), "spread")


def spread(codes: Tensor, scales: Tensor) -> Tensor:
    """The bfloat16 weights [n] that nf4 ``codes`` [n / 2] and their float32 ``scales`` [n / 64] stand for; the twin of
    ``QuantizedLinear.spread``."""
    weights = torch.empty(2 * len(codes), dtype=torch.bfloat16)
    run("spread", codes, scales, len(scales), weights)
    return weights


def drawn_seed() -> int:
    """A seed for :func:`dropped`, from torch's own generator."""
    return int(torch.empty((), dtype=torch.int64).random_(0, -1 - LOWEST))


def dropped(x: Tensor, probability: float, seed: int, onto: Tensor | None = None) -> Tensor:
    """Inverted dropout of ``x`` [..., H], its places decided by ``seed`` (63 bits) alone; added in place to ``onto``,
    where that is given. The probability is rounded to 1/65536, and the scale to match."""
    count = round(probability * LEVELS)
    scale = LEVELS / (LEVELS - count) if count < LEVELS else 0.0
    if compiled() is None:
        quads = torch.empty(-(-x.numel() // 4), dtype=torch.int64)  # four places are drawn at once
        drawn = quads.random_(LOWEST, None, generator=torch.Generator().manual_seed(seed)).view(torch.int16)
        keep = drawn[: x.numel()].view(x.shape) >= count - LEVELS // 2
        # as bytes, which are turned into numbers ten times as fast as bools are
        kept = x * keep.view(torch.uint8).to(x.dtype).mul_(scale) if scale else torch.zeros_like(x)
        return kept if onto is None else onto.add_(kept)
    out, added = (torch.empty_like(x), 0) if onto is None else (onto, 1)
    rows = x.numel() // x.shape[-1]
    _typed("dropped", x, x, x, out, seed & 0xFFFFFFFF, seed >> 32, count, scale, added, rows, x.shape[-1])
    return out
