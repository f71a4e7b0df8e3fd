"""An adapter into its base: a plain model folder whose outputs are those of the tuned model, checked before it counts.

    weitiao merge runs/hotel-lora merged/
    weitiao merge runs/hotel-lora runs/chat-lora merged/ --weights 0.7,0.3

The sum is formed in float32 and then rounded to the base's own dtype; both differences are told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weitiao.errors import InputError, RunError, say, t

if TYPE_CHECKING:
    import torch

    from weitiao.methods.io import Tuned

TOLERANCE = 1e-3  # of the largest logit: far above float32's rounding, far below what a wrong merge does
PROBE_TOKENS = 64


def merge(
    sources: str | Path | Sequence[str | Path],
    folder: str | Path,
    dtype: str | None = None,
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Merge the tuned model at ``sources`` (a run or an adapter folder) into ``folder``; of several LoRA adapters on
    one base the sum, each times its weight (1 where none are given).

    Returns ``merged_difference`` (largest difference of a logit before rounding, float32), ``saved_difference`` (of
    the folder as written, in ``dtype``: the base's own unless given) and ``largest_logit``. RunError, and no folder,
    if the merged model's outputs are not the tuned model's.
    """
    import torch

    from weitiao.methods.base import save_plain
    from weitiao.models.load import ModelOptions, load
    from weitiao.models.quantized import dequantize
    from weitiao.weights.folders import whole

    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise InputError(t("{path}: exists already; name a new folder", path=folder))
    paths = [sources] if isinstance(sources, str | Path) else list(sources)
    source, tuned = paths[0], _opened(paths, weights)
    if tuned.method is None:
        raise InputError(t("{path}: is a plain model, there is nothing to merge", path=source))
    ids = probe(tuned.model)
    wanted = logits(tuned.model, ids)
    model: Any = tuned.method.merge(dequantize(tuned.model))
    merged = difference(wanted, logits(model, ids))
    largest = wanted.abs().max().item()
    if not merged <= TOLERANCE * max(largest, 1.0):
        message = "{path}: the merged model's logits differ by {difference} from the tuned model's; nothing was written"
        raise RunError(t(message, path=source, difference=merged))
    model.config.dtype = getattr(torch, dtype or stored_dtype(source))
    size = sum(parameter.numel() for parameter in model.parameters()) * model.config.dtype.itemsize
    with whole(Path(folder), size) as temporary:
        save_plain(model, temporary)
        tuned.tokenizer.save_pretrained(str(temporary))
        tuned.renderer.save(temporary)
        written = load(ModelOptions.model_validate({"path": str(temporary), "dtype": "float32"}))
        saved = difference(wanted, logits(written, ids))
    name = str(model.config.dtype).removeprefix("torch.")
    return {"dtype": name, "merged_difference": merged, "saved_difference": saved, "largest_logit": largest}


def merged(folder: Path) -> Path:
    """The plain model of a run's result: an adapter is merged into its base, beside itself, unless it has been."""
    if folder.name != "adapter":
        return folder
    beside = folder.with_name("merged")
    if not beside.is_dir():
        merge(folder, beside)
    return beside


def _opened(paths: Sequence[str | Path], weights: Sequence[float] | None) -> Tuned:
    """What is merged, in float32: one tuned model, or several adapters in use together."""
    from weitiao.methods import adapters
    from weitiao.methods.io import open_model, open_several

    if weights is not None and len(weights) != len(paths):
        message = "--weights: {found} weights for {count} adapters; give each one"
        raise InputError(t(message, found=len(weights), count=len(paths)))
    if len(paths) == 1 and weights is None:
        return open_model(paths[0], dtype="float32")
    names = {f"adapter{number}": path for number, path in enumerate(paths, 1)}
    tuned = open_several(names, dtype="float32")
    adapters.use(tuned.model, dict(zip(names, weights or [1.0] * len(paths), strict=True)))
    return tuned


def probe(model: Any) -> torch.Tensor:
    """Tokens from all over the vocabulary [1, T], the same every time."""
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Float32 logits [T, V] of ``ids`` [1, T]."""
    import torch

    with torch.inference_mode():
        return model(input_ids=ids).logits[0].float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest absolute difference."""
    return (one - other).abs().max().item()


def stored_dtype(source: str | Path) -> str:
    """The dtype of most of the weights that were tuned (an adapter's base, else the model's own), as stored."""
    from weitiao.methods.adapters import CONFIG
    from weitiao.methods.io import base_of
    from weitiao.runs import Run, is_run
    from weitiao.weights import fetch, inspect

    folder = fetch.resolve(Run.open(source).final if is_run(source) else source)
    folder = base_of(folder)[1] if (folder / CONFIG).is_file() else folder
    if not any(folder.glob("*.safetensors")):  # a .bin file has no header that could be read
        config = inspect.read_json(folder / "config.json")
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")
    counts: dict[str, int] = {}
    for tensor in inspect.headers(folder):
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.bytes
    largest = max(counts, key=lambda name: counts[name])
    return {"BF16": "bfloat16", "F16": "float16"}.get(largest, "float32")


def verb(
    sources: Annotated[list[Path], typer.Argument(metavar="RUN|ADAPTER…", help="runs or adapter folders of one base")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="the new model folder")],
    weights: Annotated[str | None, typer.Option(help="of several adapters, how much of each: 0.7,0.3")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Merge adapters into their base and save a plain model folder; its logits are compared with the tuned model's."""
    try:
        shares = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise InputError(t('--weights: "{text}" is not a list of numbers', text=weights)) from None
    found = merge(sources, folder, weights=shares)
    if as_json:
        print(json.dumps({"folder": str(folder), **found}))
        return
    say(
        "{folder}: largest difference of a logit: {merged} before rounding, {saved} as written in {dtype} "
        "(largest logit {largest})",
        folder=folder,
        merged=f"{found['merged_difference']:.2g}",
        saved=f"{found['saved_difference']:.2g}",
        dtype=found["dtype"],
        largest=f"{found['largest_logit']:.3g}",
    )
