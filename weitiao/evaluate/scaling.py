"""Scaling: L(N, D) = E + A / N^α + B / D^β from the losses of several runs, and what it says of a larger one.

    points = [point(Run.open(folder)) for folder in folders]    # parameters, tokens read, validation loss
    law = fit(points)
    law(2 * points[-1].parameters, points[-1].tokens)           # the loss with twice the parameters

The law and its fit are Hoffmann et al.'s (arXiv 2203.15556, approach 3): the Huber loss of log L, from many starts.
Bands are bootstrapped: the law is fitted again to its own values with residuals drawn anew (the runs of a ladder are
chosen, not drawn, so they are not resampled). The descent is Levenberg's and Marquardt's, all starts at once.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weitiao.errors import InputError, t
from weitiao.evaluate.bootstrap import PERCENTILES
from weitiao.evaluate.compare import markdown
from weitiao.runs import Run, write_atomic

UNKNOWNS = 5
DELTA = 1e-3  # where the Huber loss turns from square to straight, in log loss
ROUNDS = 200
STARTS = {"e": (-1.0, 0.0, 1.0), "a": (0.0, 5.0, 10.0, 20.0), "b": (0.0, 5.0, 10.0, 20.0), "power": (0.2, 0.5, 1.0)}
DRAWS = 200
FLOPS = 6  # of training, per parameter and token


@dataclass(frozen=True)
class Point:
    """One run: its parameters, the tokens it had read, its validation loss (nats per token) there, and how much that
    loss fell over the last stretch between two validations (below 0: it rose), as a share."""

    name: str
    parameters: int
    tokens: int
    loss: float
    falling: float | None = None


@dataclass(frozen=True)
class Law:
    """E + A / N^α + B / D^β."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float

    def __call__(self, parameters: float, tokens: float) -> float:
        """The loss of a run with so many parameters that has read so many tokens."""
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def best(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens that make the most of ``flops`` (6 per parameter and token)."""
        balance = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        budget = flops / FLOPS
        parameters = balance * budget ** (self.beta / (self.alpha + self.beta))
        return parameters, budget / parameters


@dataclass(frozen=True)
class Fit:
    """The law, the laws that other draws of the residuals give, and the residuals in log loss."""

    law: Law
    drawn: list[Law]
    residuals: list[float]
    points: list[Point]

    def predict(self, parameters: float, tokens: float, seed: int = 0) -> dict[str, float]:
        """The loss of a run, and where nineteen in twenty such runs would lie."""
        noise = np.random.default_rng(seed).choice(self.residuals, len(self.drawn))
        spread = math.sqrt(len(self.points) / max(len(self.points) - UNKNOWNS, 1))
        values = [law(parameters, tokens) * math.exp(-spread * r) for law, r in zip(self.drawn, noise, strict=True)]
        low, high = np.percentile(values, PERCENTILES) if values else (math.nan, math.nan)
        return {"value": self.law(parameters, tokens), "low": float(low), "high": float(high)}


# ---- runs ------------------------------------------------------------------------------------------------------------


def point(run: Run) -> Point:
    """What a run adds to the fit: its best validation loss and what it had read by then. InputError without one."""
    run = run.stages[-1] if run.stages else run
    plan, lines = run.path / "plan.json", run.metrics()
    losses = [(line["step"], line["validation"]["loss"]) for line in lines if "loss" in (line.get("validation") or {})]
    losses = [(step, loss) for step, loss in losses if isinstance(loss, float) and math.isfinite(loss) and loss > 0]
    if not losses or not plan.is_file():
        raise InputError(t("{path}: has no validation loss; a run for scaling needs data.validation", path=run.path))
    step, loss = min(losses, key=lambda pair: pair[1])
    tokens = sum(line.get("tokens", 0) for line in lines if "loss" in line and line["step"] <= step)
    falling = None if len(losses) < 2 else (losses[-2][1] - losses[-1][1]) / losses[-2][1]
    return Point(run.path.name, json.loads(plan.read_text(encoding="utf-8"))["parameters"], tokens, loss, falling)


# ---- the fit ---------------------------------------------------------------------------------------------------------


def fit(points: Sequence[Point], draws: int = DRAWS, seed: int = 0) -> Fit:
    """The law of ``points`` with its band. InputError where they cannot tell five unknowns: fewer than six runs, or
    fewer than three sizes or amounts of data."""
    problems = []
    if len(points) < UNKNOWNS + 1:
        problems.append(
            t("{count} runs cannot tell the five unknowns of the law; take at least six", count=len(points))
        )
    for name, values in (
        ("parameters", [one.parameters for one in points]),
        ("tokens", [one.tokens for one in points]),
    ):
        if len({round(math.log(value), 1) for value in values if value > 0}) < 3:
            problems.append(t("the runs have fewer than three different {name}; the law needs three", name=name))
    if problems:
        raise InputError(problems)
    places = np.log([[one.parameters, one.tokens] for one in points])
    losses = np.log([one.loss for one in points])
    grid = itertools.product(STARTS["a"], STARTS["b"], STARTS["e"], STARTS["power"], STARTS["power"])
    starts = np.array([[a, b, e, math.log(alpha), math.log(beta)] for a, b, e, alpha, beta in grid])
    found, costs = _descend(starts, places, np.tile(losses, (len(starts), 1)))
    best = found[np.argmin(costs)]
    values = _values(best[None], places)[0]
    residuals = values - losses
    return Fit(_law(best), _drawn(best, values, residuals, places, draws, seed), residuals.tolist(), list(points))


def _drawn(
    best: np.ndarray, values: np.ndarray, residuals: np.ndarray, places: np.ndarray, draws: int, seed: int
) -> list[Law]:
    """Laws fitted to the law's own values with residuals drawn anew, scaled up for the unknowns of the fit."""
    random = np.random.default_rng(seed)
    spread = math.sqrt(len(values) / (len(values) - UNKNOWNS))
    targets = values - spread * random.choice(residuals - residuals.mean(), (draws, len(values)))
    tries = 8
    starts = best + random.normal(0, 0.1, (tries, 1, UNKNOWNS)) * np.abs(best) * (np.arange(tries) > 0)[:, None, None]
    starts = np.broadcast_to(starts, (tries, draws, UNKNOWNS)).reshape(-1, UNKNOWNS)
    found, costs = _descend(starts, places, np.tile(targets, (tries, 1)))
    least = costs.reshape(tries, draws).argmin(0)
    return [_law(found[row * draws + draw]) for draw, row in enumerate(least)]


def _law(theta: np.ndarray) -> Law:
    a, b, e, alpha, beta = theta.tolist()
    return Law(math.exp(e), math.exp(a), math.exp(alpha), math.exp(b), math.exp(beta))


def _terms(theta: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logs of the law's three terms [S, P, 3], and of their sum [S, P]. theta [S, 5]: log A, log B, log E, log α,
    log β; places [P, 2]: log N, log D."""
    powers = np.exp(theta[:, 3:])
    falling = theta[:, None, :2] - powers[:, None, :] * places[None]
    terms = np.concatenate([falling, np.broadcast_to(theta[:, None, 2:3], (*falling.shape[:2], 1))], axis=2)
    top = terms.max(2)
    return terms, top + np.log(np.exp(terms - top[..., None]).sum(2))


def _values(theta: np.ndarray, places: np.ndarray) -> np.ndarray:
    return _terms(theta, places)[1]


def _cost(residuals: np.ndarray) -> np.ndarray:
    """The Huber loss of each start [S]."""
    size = np.abs(residuals)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)).sum(1)


def _descend(theta: np.ndarray, places: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every start's minimum and its cost: damped, reweighted Gauss-Newton steps, kept where they lower the cost."""
    theta, damping = theta.copy(), np.full(len(theta), 1e-2)
    terms, values = _terms(theta, places)
    costs = _cost(values - losses)
    for _ in range(ROUNDS):
        residuals = values - losses
        parts = np.exp(terms - values[..., None])  # [S, P, 3], summing to 1
        slopes = -parts[..., :2] * np.exp(theta[:, None, 3:]) * places[None]
        jacobian = np.concatenate([parts, slopes], axis=2)
        weights = 1 / np.maximum(1, np.abs(residuals) / DELTA)
        normal = np.einsum("spi,sp,spj->sij", jacobian, weights, jacobian)
        gradient = np.einsum("spi,sp,sp->si", jacobian, weights, residuals)
        diagonal = np.einsum("sii->si", normal) * damping[:, None] + 1e-9
        step = np.linalg.solve(normal + diagonal[:, :, None] * np.eye(UNKNOWNS), gradient[..., None])[..., 0]
        tried = theta - np.clip(step, -2, 2)
        tried[:, 3:] = np.clip(tried[:, 3:], math.log(0.01), math.log(4))  # powers beyond these are no power laws
        new_terms, new_values = _terms(tried, places)
        new_costs = _cost(new_values - losses)
        better = new_costs < costs
        theta[better], costs[better] = tried[better], new_costs[better]
        terms[better], values[better] = new_terms[better], new_values[better]
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e6)
    return theta, costs


# ---- what it says ----------------------------------------------------------------------------------------------------


def as_dict(found: Fit, larger: Sequence[tuple[float, float]] = (), held_out: Sequence[Point] = ()) -> dict[str, Any]:
    """The law, its band, predictions, and what more of anything would bring, as JSON."""
    names = list(Law.__dataclass_fields__)
    bands = {name: np.percentile([getattr(law, name) for law in found.drawn], PERCENTILES).tolist() for name in names}
    largest = max(found.points, key=lambda one: one.parameters * one.tokens)
    parameters, tokens = found.law.best(FLOPS * largest.parameters * largest.tokens)
    return {
        "law": asdict(found.law),
        "bands": bands,
        "runs": [asdict(one) | {"fitted": found.law(one.parameters, one.tokens)} for one in found.points],
        "held_out": [_checked(found, one) for one in held_out],
        "predictions": [{"parameters": n, "tokens": d, **found.predict(n, d)} for n, d in larger],
        "largest": largest.name,
        "twice": {
            "parameters": found.predict(2 * largest.parameters, largest.tokens),
            "tokens": found.predict(largest.parameters, 2 * largest.tokens),
        },
        "best_for_same_compute": {"parameters": parameters, "tokens": tokens, "loss": found.law(parameters, tokens)},
    }


def _checked(found: Fit, one: Point) -> dict[str, Any]:
    """A run that the fit has not seen: what was predicted, and by how much it was wrong."""
    predicted = found.predict(one.parameters, one.tokens)
    return asdict(one) | {"predicted": predicted, "error": predicted["value"] / one.loss - 1}


def advice(found: Fit) -> list[str]:
    """Where more pays, in sentences."""
    largest = max(found.points, key=lambda one: one.parameters * one.tokens)
    law, now = found.law, found.law(largest.parameters, largest.tokens)
    gains = {
        "parameters": now - law(2 * largest.parameters, largest.tokens),
        "tokens": now - law(largest.parameters, 2 * largest.tokens),
    }
    message = (
        "From {run} on, twice the parameters bring the loss down by {parameters}, twice the tokens by {tokens}: {more} "
        "pays more."
    )
    more = t("more data") if gains["tokens"] >= gains["parameters"] else t("a larger model")
    said = [t(message, run=largest.name, more=more, **{name: f"{gain:.3f}" for name, gain in gains.items()})]
    parameters, tokens = law.best(FLOPS * largest.parameters * largest.tokens)
    message = "Its compute is best spent on {parameters} parameters and {tokens} tokens: loss {loss}, not {now}."
    values = {"loss": f"{law(parameters, tokens):.3f}", "now": f"{now:.3f}"}
    said.append(t(message, parameters=f"{parameters:,.0f}", tokens=f"{tokens:,.0f}", **values))
    if largest.falling is not None and largest.falling <= 0:
        message = "Its validation loss rose at the end: more steps on the same rows do not pay, fresh rows do."
        said.append(t(message))
    elif largest.falling is not None:
        message = "Its validation loss still fell by {share} % at the end: more steps pay while rows are fresh."
        said.append(t(message, share=f"{100 * largest.falling:.1f}"))
    said.append(t("No data brings the loss below {floor} (E).", floor=f"{law.e:.3f}"))
    return said


def far(found: Fit, parameters: float, tokens: float) -> bool:
    """Whether a prediction reaches over four times beyond the runs in either direction."""
    sizes, amounts = ([getattr(one, name) for one in found.points] for name in ("parameters", "tokens"))
    return parameters > 4 * max(sizes) or tokens > 4 * max(amounts)


def report(found: Fit, told: Mapping[str, Any]) -> str:
    """What the runs say, as Markdown."""
    law, bands = told["law"], told["bands"]
    parts = [f"# {t('Scaling')}\n", "\n".join(f"- {sentence}" for sentence in told["advice"]) + "\n"]
    parts.append(
        f"L(N, D) = {law['e']:.3f} + {law['a']:.4g} / N^{law['alpha']:.3f} + {law['b']:.4g} / D^{law['beta']:.3f}\n"
    )
    rows = [[name, f"{law[name]:.4g}", f"[{bands[name][0]:.4g}, {bands[name][1]:.4g}]"] for name in law]
    parts.append(markdown([t("value"), t("fitted"), "95 %"], rows))
    head = [t("run"), t("parameters"), t("tokens"), t("loss"), t("by the law")]
    parts += [f"## {t('Runs')}\n", markdown(head, [_row(one, f"{one['fitted']:.4f}") for one in told["runs"]])]
    if told["held_out"]:
        rows = [[*_row(one, _band(one["predicted"])), f"{100 * one['error']:+.1f} %"] for one in told["held_out"]]
        parts += [
            f"## {t('Runs that the law has not seen')}\n",
            markdown([*head[:4], t("predicted"), t("error")], rows),
        ]
    if told["predictions"]:
        rows = [[f"{one['parameters']:,.0f}", f"{one['tokens']:,.0f}", _band(one)] for one in told["predictions"]]
        parts += [f"## {t('Predicted')}\n", markdown([t("parameters"), t("tokens"), t("loss")], rows)]
        if any(far(found, one["parameters"], one["tokens"]) for one in told["predictions"]):
            message = "More than four times beyond the runs: the band holds only if the law does, so far away."
            parts.append(f"**{t(message)}**\n")
    told_band = t("Bands: 95 %, from residuals drawn anew; the fit is Hoffmann et al.'s (arXiv 2203.15556).")
    return "\n".join([*parts, told_band + "\n"])


def _row(one: Mapping[str, Any], last: str) -> list[str]:
    return [one["name"], f"{one['parameters']:,}", f"{one['tokens']:,}", f"{one['loss']:.4f}", last]


def _band(one: Mapping[str, float]) -> str:
    return f"{one['value']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"


def write(folder: Path, found: Fit, told: Mapping[str, Any], text: str) -> None:
    """scaling.md, .json, .html and .png in ``folder``."""
    from weitiao.evaluate.page import write_page
    from weitiao.evaluate.plot import scaling

    curves: dict[str, list[tuple[float, float, float]]] = {}
    for size in sorted({one.parameters for one in found.points}):
        own = [one for one in found.points if one.parameters == size]
        curves[f"{size:,}"] = [(one.tokens, one.loss, found.law(size, one.tokens)) for one in own]
    for one in told["held_out"]:
        curves[f"{one['parameters']:,} *"] = [(one["tokens"], one["loss"], one["predicted"]["value"])]
    folder.mkdir(parents=True, exist_ok=True)
    scaling(curves, folder / "scaling.png")
    write_atomic(folder / "scaling.json", json.dumps(told, ensure_ascii=False, indent=1) + "\n")
    write_atomic(folder / "scaling.md", text + "\n![scaling](scaling.png)\n")
    write_page(folder / "scaling.md")
