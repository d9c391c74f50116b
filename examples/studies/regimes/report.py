"""What the rows say: admission, curves, tables of arms, and what chance wins in a search."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import mtl_optax as mtl
from examples.studies.harness.choices import SINGLE, SUM
from examples.studies.harness.command import write_atomically
from examples.studies.harness.report import MARKED, csv_of, mark, markdown, mean_cell, picture, say
from examples.studies.harness.statistics import compare, standard_error
from examples.studies.regimes.regimes import REGIMES
from examples.studies.regimes.training import dense

ROWS = Iterable[Mapping[str, Any]]
ADMITTED = 0.8  # of item-kNN over all behaviours
PROTOCOLS = ("all", "new")
SEARCHES = (1, 4, 16)
LEAST = 0.001  # stands for weight 0 on a logarithmic axis
EFFECT = 0.03  # what counts as an effect in words: above the noise of a mean over a few seeds
TRIALS = 27  # MetaBalance's grid, appendix A.2
PAPER_GAIN = 0.0834
PARTS = ("tuning", "curve", "arm", "pool")


def where(rows: ROWS, **wanted: Any) -> list[dict[str, Any]]:
    """The rows with these fields."""
    return [dict(r) for r in rows if all(r[name] == value for name, value in wanted.items())]


def by_setting(rows: ROWS) -> dict[tuple[float, float], float]:
    """The mean validation value of every rate and decay."""
    found: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        found.setdefault((row["rate"], row["decay"]), []).append(row["validation"])
    return {setting: float(np.mean(values)) for setting, values in found.items()}


# --- the curves ---------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A regime's curve over the common weight of the auxiliaries.

    Attributes:
      weights: `[W]`.
      validation, test: `[W, seeds]`; the target's NDCG@10.
      norms, cosines: `[T - 1]`, each auxiliary's gradient norm over the target's, and its cosine with it,
        at weight 1.
    """

    weights: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    norms: np.ndarray
    cosines: np.ndarray

    @property
    def best(self) -> int:
        """The place of the weight with the best mean validation value."""
        return int(self.validation.mean(axis=1).argmax())

    @property
    def one(self) -> int:
        """The place of weight 1, the plain sum."""
        return int(np.flatnonzero(self.weights == 1)[0])

    @property
    def bend(self) -> float:
        """What the best weight wins over the sum, by validation."""
        means = self.validation.mean(axis=1)
        return float(means[self.best] / means[self.one] - 1)

    @property
    def equal(self) -> float:
        """The weight that makes the auxiliaries' gradient norms the target's, in geometric mean."""
        return float(np.exp(-np.log(self.norms).mean()))

    def gain(self, weight: float) -> float:
        """What a weight wins over the sum in the test, interpolated over its logarithm."""
        place, mean = np.log(np.maximum(self.weights, LEAST)), self.test.mean(axis=1)
        return float(np.interp(np.log(weight), place, mean) / mean[self.one] - 1)


def curve_of(rows: ROWS, regime: str) -> Curve | None:
    """The curve of a regime, by the seeds that every weight has; None if a weight has no run."""
    found = where(rows, part="curve", regime=regime)
    weights = sorted({row["weights"][1] for row in found})
    by_weight = [{r["seed"]: r for r in found if r["weights"][1] == w} for w in weights]
    seeds = sorted(set.intersection(*map(set, by_weight))) if by_weight else []
    if not seeds or 1.0 not in weights:
        return None
    pick = lambda of: np.array([[of(runs[s]) for s in seeds] for runs in by_weight])  # noqa: E731
    of_sum = [by_weight[weights.index(1.0)][s] for s in seeds]
    return Curve(
        np.array(weights),
        pick(lambda row: row["validation"]),
        pick(lambda row: row["ndcg"][0]),
        np.exp(np.log([row["relative_norms"] for row in of_sum]).mean(axis=0)),
        np.mean([row["cosines"] for row in of_sum], axis=0),
    )


def curves_of(rows: ROWS) -> dict[str, Curve]:
    """The curves of all regimes that have one."""
    found = {regime.name: curve_of(rows, regime.name) for regime in REGIMES}
    return {name: curve for name, curve in found.items() if curve is not None}


def chosen_regimes(rows: ROWS) -> list[str]:
    """The two regimes whose curves bend most, by validation, and the one whose curve bends least."""
    bends = {name: curve.bend for name, curve in curves_of(rows).items()}
    order = sorted(bends, key=lambda name: -bends[name])
    return list(dict.fromkeys((*order[:2], *order[-1:])))


def admission(rows: ROWS, references: Mapping[str, list[float]]) -> str:
    """Whether the network is worth a test: the plain sum, in the regime that validation prefers."""
    curves = curves_of(rows)
    if not curves:
        return "No curve is complete, so nothing can be said of the network."
    best = max(curves, key=lambda name: curves[name].validation[curves[name].one].mean())
    ndcg = np.mean(
        [r["ndcg"] for r in where(rows, part="curve", regime=best) if r["weights"][1] == 1], axis=0
    )
    shares = ndcg / references["all"]
    passed = bool((shares >= ADMITTED).all() and (ndcg > references["target"]).all())
    numbers = "; ".join(
        f"{protocol} items {ours:.4f}, item-kNN over all behaviours {known:.4f} ({share:.0%}), over "
        f"the target's {own:.4f}"
        for protocol, ours, known, share, own in zip(
            PROTOCOLS, ndcg, references["all"], shares, references["target"], strict=True
        )
    )
    verdict = "admitted" if passed else f"not admitted: {ADMITTED - shares.min():.0%} short"
    return f"Network ({verdict}), plain sum in regime {best}, test NDCG@10: {numbers}."


def draw_curves(rows: ROWS, references: Mapping[str, list[float]], path: Path | None) -> None:
    """Every regime's curve, with each method as a point at its effective weight."""
    curves = curves_of(rows)
    columns = min(max(len(curves), 1), 4)
    lines = -(-max(len(curves), 1) // columns)
    size = (3.75 * columns, 3.5 * lines)
    with picture(path, lines, columns, figsize=size, sharey=True) as (figure, grid):
        for axes, (name, curve) in zip(grid.ravel(), curves.items(), strict=False):
            place = np.maximum(curve.weights, LEAST)
            mean, error = curve.test.mean(axis=1), standard_error(curve.test)
            axes.errorbar(place, mean, error, color="black", marker=".", capsize=2)
            axes.axhline(references["all"][0], color="grey", linestyle=":", linewidth=1)
            for number, (label, runs) in enumerate(arms_of(rows, name).items()):
                weight = np.mean([effective_weight(row) for row in runs.values()])
                if label in (SUM, SINGLE) or not 0.003 < weight < 1000:
                    continue
                axes.plot(weight, np.mean([row["ndcg"][0] for row in runs.values()]),
                          "osD^vP*X"[number % 8], color=f"C{number}", label=label)  # fmt: skip
            norms = " and ".join(f"{norm:.2g}" for norm in curve.norms)
            text = next(regime.text for regime in REGIMES if regime.name == name)
            axes.set_title(f"({name}) {text}\nnorms over the target's: {norms}", fontsize=8)
            axes.set(xscale="log")
        for axes in grid.ravel():
            axes.set_visible(bool(axes.lines))
            axes.set_xlabel("weight of the auxiliaries (leftmost: 0)", fontsize=8)
        grid[0, 0].set_ylabel("test NDCG@10 of the target")
        shown = {
            k: v for a in grid.ravel() for v, k in zip(*a.get_legend_handles_labels(), strict=True)
        }
        if shown:
            figure.legend(shown.values(), shown, loc="outside lower center", ncols=8)


def curve_lines(rows: ROWS) -> list[tuple[str, ...]]:
    """The curves as a table."""
    curves = curves_of(rows)
    weights = sorted({float(w) for curve in curves.values() for w in curve.weights})
    lines = [("regime", "norms", *(f"{w:g}" for w in weights), "best", "equal norms")]
    for name, curve in curves.items():
        cells = dict(zip(curve.weights.tolist(), map(mean_cell, curve.test), strict=True))
        norms = ", ".join(f"{norm:.2g}" for norm in curve.norms)
        shown = (
            f"{curve.gain(weight):+.1%} at {weight:.2g}"
            for weight in (max(curve.weights[curve.best], LEAST), curve.equal)
        )
        lines.append((name, norms, *(cells.get(weight, "") for weight in weights), *shown))
    return lines


def advice_lines(rows: ROWS) -> list[tuple[str, ...]]:
    """What `mtl_optax.advise` says of the measured norms and cosines, beside what the curve says."""
    lines = [("regime", "norms", "cosines", "advice", "weight 0", "equal norms")]
    for name, curve in curves_of(rows).items():
        measured = np.eye(len(curve.cosines) + 1)
        measured[0, 1:] = measured[1:, 0] = curve.cosines
        # Of the auxiliaries' cosines with each other nothing is known, and the advice does not read them.
        found = {"norms": [1.0, *curve.norms], "cosines": measured}
        norms, cosines = (
            ", ".join(f"{x:.2g}" for x in values) for values in (curve.norms, curve.cosines)
        )
        gains = (f"{curve.gain(weight):+.1%}" for weight in (LEAST, curve.equal))
        lines.append((name, norms, cosines, mtl.advise(found, target=0).action, *gains))
    return lines


def law(rows: ROWS) -> str:
    """In which regimes equal norms would pay, in words."""
    curves = curves_of(rows)
    gains = {name: curve.gain(curve.equal) for name, curve in curves.items()}
    best = {
        name: curve.gain(max(curve.weights[curve.best], LEAST)) for name, curve in curves.items()
    }

    def named(chosen: Mapping[str, float]) -> str:
        return ", ".join(f"{name} ({gain:+.0%})" for name, gain in chosen.items()) or "none"

    wins = {name: gain for name, gain in gains.items() if gain > EFFECT}
    loses = {name: gain for name, gain in gains.items() if gain < -EFFECT}
    worth = {name: gain for name, gain in best.items() if gain > EFFECT}
    return (
        f"Regimes in which some common weight wins more than {EFFECT:.0%} over the sum: {named(worth)}. "
        f"Equal gradient norms win more than {EFFECT:.0%} in: {named(wins)}; they lose as much in: "
        f"{named(loses)}; elsewhere they change little."
    )


# --- the arms ------------------------------------------------------------------------------------------


def effective_weight(row: Mapping[str, Any]) -> float:
    """The geometric mean of the auxiliaries' weights over the target's."""
    return float(np.exp(np.mean(np.log(np.maximum(row["relative_weights"], 1e-12)))))


def arms_of(rows: ROWS, regime: str) -> dict[str, dict[int, dict[str, Any]]]:
    """The measured runs of a regime by arm and seed, with those that a search would keep."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in where(rows, part="arm", regime=regime):
        found.setdefault(row["arm"], {})[row["seed"]] = row
    pool = where(rows, part="pool", regime=regime)
    for runs in SEARCHES[1:]:
        if kept := searched(pool, runs):
            found[_search(runs)] = kept
    return found


def _search(runs: int) -> str:
    return f"search, {runs} runs"


def searched(pool: ROWS, runs: int) -> dict[int, dict[str, Any]]:
    """By seed, the run with the best validation value among the sum and random weightings.

    A search of a few runs draws them anew from the pool for every seed.
    """
    found = {}
    for seed in sorted({row["seed"] for row in pool}):
        of_seed = sorted(where(pool, seed=seed), key=lambda row: set(row["weights"]) != {1.0})
        if len(of_seed) < max(runs, 2) or set(of_seed[0]["weights"]) != {1.0}:
            continue
        others = np.random.default_rng(seed).permutation(len(of_seed) - 1)[: runs - 1] + 1
        tried = [of_seed[0], *(of_seed[place] for place in others)]
        found[seed] = max(tried, key=lambda row: row["validation"])
    return found


def measured_regimes(rows: ROWS) -> list[str]:
    """The regimes whose arms were measured."""
    return [r.name for r in REGIMES if {SUM, SINGLE} <= arms_of(rows, r.name).keys()]


class Compared(NamedTuple):
    """A regime's arms: runs by label and seed, and gains over two rows with their p-values."""

    runs: dict[str, dict[int, dict[str, Any]]]
    over_sum: dict[str, tuple[float, float]]
    over_search: dict[str, tuple[float, float]]


def compared(rows: ROWS, regime: str) -> Compared:
    """The arms of a regime, and the sums of losses of one kind, on the seeds that all have."""
    arms = arms_of(rows, regime)
    most = max(map(len, arms.values()))
    for other, text in (("s", "softmax"), ("a", "cross-entropy")):
        if other != regime and (runs := arms_of(rows, other).get(SUM)):
            arms[f"sum, all losses {text}"] = runs
    arms = {label: runs for label, runs in arms.items() if len(runs) >= most}
    seeds = sorted(set.intersection(*map(set, arms.values())))
    users = {
        label: np.stack([dense(runs[s]["users"], runs[s]["num_users"]) for s in seeds])[None]
        for label, runs in arms.items()
    }
    gains = []
    for baseline in (SUM, _search(SEARCHES[-1])):
        if baseline not in users:
            gains.append({})
            continue
        level = users[baseline].mean()
        found = compare(users, baseline)
        gains.append({label: (d[0].mean / level, d[0].p_value) for label, d in found.items()})
    return Compared(arms, *gains)


def arm_lines(found: Compared) -> list[tuple[str, ...]]:
    """The table of a regime."""
    header = ("arm", "runs", *(f"NDCG@10, {p} items" for p in PROTOCOLS))
    lines = [(*header, "over sum", "over search", "weight", "rate, decay")]

    for label, runs in found.runs.items():
        ndcg = np.array([row["ndcg"] for row in runs.values()])
        trained = label.split()[1] if label.startswith("search") else "1"
        weight = np.exp(np.mean([np.log(effective_weight(row)) for row in runs.values()]))
        first = next(iter(runs.values()))
        setting = f"{first['rate']:g}, {first['decay']:g}"
        shown = "0" if label == SINGLE else f"{weight:.2g}"
        cells = [mean_cell(ndcg[:, place]) for place in range(len(PROTOCOLS))]
        lines.append((label, trained, *cells, _gain(found.over_sum, label),
                      _gain(found.over_search, label), shown, setting))  # fmt: skip
    return lines


def _gain(of: Mapping[str, tuple[float, float]], label: str) -> str:
    return f"{of[label][0]:+.1%}{mark(of[label][1])}" if label in of else "-"


def gain_lines(found: Mapping[str, Compared], curves: Mapping[str, Curve]) -> list[tuple[str, ...]]:
    """What every arm wins over the sum, with a column for each regime."""
    labels = dict.fromkeys(label for regime in found.values() for label in regime.runs)
    norms = (", ".join(f"{norm:.2g}" for norm in curves[name].norms) for name in found)
    gains = (
        (label, *(_gain(regime.over_sum, label) for regime in found.values()))
        for label in labels
        if label != SUM
    )
    return [("arm", *found), ("norms over the target's", *norms), *gains]


def chance(rows: ROWS, draws: int = 20_000) -> str:
    """What the best of 27 by validation wins with no effect at all, by the noise of seeds seen here."""
    residuals = []
    for name in measured_regimes(rows):
        for arm in (SUM, SINGLE):
            runs = arms_of(rows, name)[arm].values()
            if len(runs) < 3:
                continue
            pairs = np.array([[row["validation"], row["ndcg"][0]] for row in runs])
            bias = (len(runs) / (len(runs) - 1)) ** 0.5  # the mean was fitted
            residuals.append(bias * (pairs / pairs.mean(axis=0) - 1))
    if not residuals:
        return ""
    covariance = np.cov(np.concatenate(residuals).T, bias=True)
    drawn = np.random.default_rng(0).multivariate_normal([0, 0], covariance, (draws, TRIALS + 1))
    tried, other = drawn[:, :TRIALS], drawn[:, TRIALS, 1]
    best = tried[..., 0].argmax(axis=1)[:, None]
    kept = np.take_along_axis(tried[..., 1], best, axis=1)[:, 0]
    by_test = tried[..., 1].max(axis=1)
    noise = np.sqrt(np.diag(covariance))
    return (
        f"With no effect at all, by the noise of seeds seen here ({noise[0]:.1%} of the validation's and "
        f"{noise[1]:.1%} of the test's NDCG@10 of a run, correlation "
        f"{covariance[0, 1] / noise.prod():.2f}): the best of {TRIALS} runs by validation is "
        f"{tried[..., 0].max(axis=1).mean():+.1%} above the mean on the validation set and "
        f"{(kept - other).mean():+.1%} above one other run on the test set; chosen by the test itself "
        f"{(by_test - other).mean():+.1%}. MetaBalance's paper reports {PAPER_GAIN:+.2%}, the best of "
        f"{TRIALS} settings."
    )


# --- everything ----------------------------------------------------------------------------------------


def show(rows: ROWS, references: Mapping[str, list[float]], out: Path | None) -> None:
    """Print the tables, and write them with the pictures and one line a run."""
    rows = list(rows)
    texts = {regime.name: regime.text for regime in REGIMES}
    pages = [admission(rows, references)]
    note = (
        "Test NDCG@10 of the target, mean ± standard error over seeds, at one common weight of the "
        "auxiliaries. norms: gradient norm of each auxiliary over the target's, at weight 1. best: what "
        "the best weight by validation wins over weight 1. equal norms: the same of the weight that makes "
        "the norms equal, read off the curve."
    )
    named = "; ".join(f"{name}: {text}" for name, text in texts.items())
    pages.append(markdown(curve_lines(rows), "Curves", f"{note} {named}."))
    pages.append(law(rows))
    note = (
        "Gradient norms over the target's and cosines with it, at weight 1; the action of "
        "`mtl_optax.advise(..., target=...)` for them; what the target wins over weight 1 without "
        "auxiliaries, and at equal norms, both read off the curve."
    )
    pages.append(markdown(advice_lines(rows), "What advise says", note))
    found = {name: compared(rows, name) for name in measured_regimes(rows)}
    if found:
        note = f"Of the target's test NDCG@10, all items. {MARKED}: as in the tables that follow."
        title = "What one run and a search win over the plain sum"
        pages.append(markdown(gain_lines(found, curves_of(rows)), title, note))
    for name, arms in found.items():
        seeds = len(arms.runs[SUM])
        note = (
            f"{seeds} fresh seeds; every arm at the best of its settings by validation, the weightings of "
            f"a search at the sum's. {MARKED}: two-sided test over seeds and users, Holm-corrected over "
            f"the arms. over search: over that of {SEARCHES[-1]} runs. weight: geometric mean of the "
            "auxiliaries' weights over the target's in training."
        )
        title = f"Regime {name}: {texts[name]}"
        pages.append(markdown(arm_lines(arms), title, note))
    pages.append(chance(rows))
    for page in pages:
        print(page) if page.startswith("**") else say(page)
    if out is not None:
        text = "\n\n".join(page.strip() for page in pages if page)
        write_atomically(out / "table.md", f"{text}\n".encode())
        draw_curves(rows, references, out / "curves.png")
        header = ("part", "regime", "arm", "weights", "rate", "decay", "seed")
        numbers = ("validation", "all", "new", "epoch", "seconds")
        lines = (
            (*(row["part"], row["regime"], row["arm"], " ".join(f"{w:g}" for w in row["weights"])),
             row["rate"], row["decay"], row["seed"], row["validation"], *row["ndcg"], row["epoch"],
             row["seconds"])
            for row in sorted(rows, key=lambda row: PARTS.index(row["part"]))
        )  # fmt: skip
        write_atomically(out / "runs.csv", csv_of((*header, *numbers), lines).encode())
