"""An adapter into its base: a plain model folder whose outputs are those of the tuned model, checked before it counts.

    weitiao merge runs/hotel-lora merged/

The sum is formed in float32 and then rounded to the base's own dtype; both differences are told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weitiao.errors import InputError, RunError, say, t

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3  # of the largest logit: far above float32's rounding, far below what a wrong merge does
PROBE_TOKENS = 64


def merge(source: str | Path, folder: str | Path, dtype: str | None = None) -> dict[str, Any]:
    """Merge the tuned model at ``source`` (a run or an adapter folder) into ``folder``.

    Returns ``merged_difference`` (largest difference of a logit before rounding, float32), ``saved_difference`` (of
    the folder as written, in ``dtype``: the base's own unless given) and ``largest_logit``. RunError, and no folder,
    if the merged model's outputs are not the tuned model's.
    """
    import torch

    from weitiao.methods.base import save_plain
    from weitiao.methods.io import open_model
    from weitiao.models.load import ModelOptions, load
    from weitiao.weights.folders import whole

    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise InputError(t("{path}: exists already; name a new folder", path=folder))
    tuned = open_model(source, dtype="float32")
    if tuned.method is None:
        raise InputError(t("{path}: is a plain model, there is nothing to merge", path=source))
    ids = probe(tuned.model)
    wanted = logits(tuned.model, ids)
    model: Any = tuned.method.merge(tuned.model)
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
    from weitiao.methods.io import base_of
    from weitiao.methods.lora import CONFIG
    from weitiao.runs import Run, is_run
    from weitiao.weights import fetch, inspect

    folder = fetch.resolve(Run.open(source).final if is_run(source) else source)
    counts: dict[str, int] = {}
    for tensor in inspect.headers(base_of(folder)[1] if (folder / CONFIG).is_file() else folder):
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.bytes
    largest = max(counts, key=lambda name: counts[name])
    return {"BF16": "bfloat16", "F16": "float16"}.get(largest, "float32")


def verb(
    source: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="a run or an adapter folder")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="the new model folder")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Merge an adapter into its base and save a plain model folder; its logits are compared with the tuned model's."""
    found = merge(source, folder)
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
