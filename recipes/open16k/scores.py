"""Fill in the numbers of the main README, of this recipe's and of ../unasdiff's, from the files that commands wrote.

What stands between `<!-- NAME -->` and `<!-- /NAME -->` is replaced by the table of that name:

- scores: the shipped default on each task (`results/TASK/summary.json`), also where the sound isn't named
  (`results/unnamed/TASK`), its rivals on 1 speech + 1 sound
  (`../unasdiff/results/rivals/summary.json`), and both outside the corpus (`../outside/results/summary.json`).
- differences: what it has over earlier defaults and rivals, paired (`results/earlier/differences.jsonl`, by
  `compare.py`).
- example: the recording of the first minute (`../example/result.json`).
- published: the default beside the paper's sampler.
- posterior and cost: a known posterior, and what the command takes (`../benchmark`).
- loading, in README.md here: windows a second (`../benchmark/loading.jsonl`).
- refined, there, too: what moving regions of held-out stems wins (`results/refined.jsonl`, by `refined.py`).
- told, there, too: how well the listeners tell held-out stems apart (`results/told*.jsonl`, by `told.py`).
- methods, samplers and standing, in ../unasdiff/README.md: Table 2 with the shipped priors
  (`../unasdiff/results/table2`) and what is shipped beside them (`../unasdiff/results/rivals`); precision: the
  published loop in float32 (`../unasdiff/results/float32`).
- shipped, in ../unasdiff/rivals.md: those alone, on 1 speech + 1 sound.

`chart.py` draws Table 2.

Run: python recipes/open16k/scores.py
"""

from __future__ import annotations

import functools
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audiosep import hub, recipe, results
from audiosep.data import parse_task
from audiosep.evaluate import guidance_facts, low_rank_facts, refinement_facts
from audiosep.metrics import paired_interval
from audiosep.separator import (
    AGAIN,
    CLASSIFIER,
    GUIDANCE,
    LEAD,
    LEAST_NOISE,
    LIKENESS,
    LOW_RANK,
    REFINE,
    REFINER,
    TAGGER,
)

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
TASKS = {
    "1speech+1sound": "1 speech + 1 sound",
    "1speech+2sound": "1 speech + 2 sounds",
    "2sound": "2 sounds",
    "3sound": "3 sounds",
    "2speech": "2 speech",
}
RIVALS = {
    "": HERE.parent / "unasdiff/results/rivals/summary.json",
    "outside the corpus: ": HERE.parent / "outside/results/summary.json",
}
EARLIER = {
    "earlier-refiner": "refined by an earlier network, the whole way each time",
    "refined-once": "refined once, by one earlier still",
    "unrefined": "no refinement",
    "unnamed-unrefined": "no refinement where no class is named",
    "unnamed": "no low-rank guidance and no refinement where no class is named, in the best order",
    "labels": "the sound prior told the classes",
    "even-leaks": "a classifier that was trained without faulty masks",
    "even-guidance": "class guidance with equal steps at all noise, no last step by low rank beside a voice",
    "sampled": "sampling to the end, in 24 steps",
    "class-guidance": "class guidance alone",
    "unguided": "no class guidance, the tagger's names",
    "tagger": "class guidance and names by the tagger alone",
    "classifier": "by the classifier alone",
    "deterministic": "the deterministic sampler of before, in the best order",
    "Conv-TasNet": "Conv-TasNet, trained for this task alone",
    "NMF": "NMF, in the best order",
}
BEST_ORDER = ("unnamed", "deterministic", "NMF")  # what these give to which name says little


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summaries(path: Path) -> list[dict[str, Any]]:
    """Those of an evaluation."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["summaries"]
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file with one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@functools.cache
def listeners() -> dict[str, str]:
    """Hashes of today's tagger, classifier and refiner."""
    return {name: hub.load_model(name).origin["sha256"] for name in (TAGGER, CLASSIFIER, REFINER)}


def current(found: dict[str, Any]) -> dict[str, Any]:
    """The summary, if it is of the classifiers and constants of today; SystemExit otherwise."""
    _, sounds = parse_task(found["task"])
    refinement = refinement_facts(REFINE, None, AGAIN, found["task"], found["labels"])
    asked = {TAGGER} if sounds == 1 else {TAGGER, CLASSIFIER}
    today = {
        "classifiers": {name: listeners()[name] for name in sorted(asked)},
        "exchange": {"likeness": LIKENESS, "lead": LEAD},
        "guidance": guidance_facts(GUIDANCE),
        "low rank": low_rank_facts(LOW_RANK, sounds, found["labels"]),
        "refiner": {REFINER: listeners()[REFINER]} if refinement else None,
        "refinement": refinement or None,
    }
    if sounds > 1 and not found["labels"]:  # listeners can't tell them apart
        today = {"low rank": today["low rank"]}
    ended = math.isclose(found["options"]["noise levels"][-1], LEAST_NOISE)
    if not ended or (sounds and any(found.get(key) != value for key, value in today.items())):
        raise SystemExit(f"{found['separator']}, {found['task']}: measured with other classifiers or constants")
    return found


def number(value: float, sign: str = "") -> str:
    """One decimal, no -0.0; "+" for a sign wherever there is something."""
    rounded = round(value, 1) + 0.0
    return f"{rounded:{sign if rounded else ''}.1f}"


def with_interval(score: dict[str, Any]) -> str:
    """Mean (low to high)."""
    return "{} ({} to {})".format(*map(number, (score["mean"], *score["interval"])))


def score_row(name: str, found: dict[str, Any]) -> list[str]:
    """One evaluation's; several sounds without a name have no order but the best."""
    named = found["labels"] or parse_task(found["task"])[1] < 2
    return [
        name,
        str(found["count"]),
        number(found["mixture_si_sdr"]["mean"]),
        *([with_interval(found["si_sdr"]), number(found["si_sdr"]["median"])] if named else ["", ""]),
        with_interval(found["si_sdr_permuted"]),
        f"{100 * found['failure_rate_permuted']:.0f} %",
        f"{found['evaluations']:.0f}" if found.get("evaluations") else "",
        f"{found['seconds']:.1f}" if found.get("seconds") else "",
    ]


def scores() -> str:
    """The table `scores`."""
    head = ["task", "mixtures", "before", "labels fixed", "median", "best order", "below 0 dB, best order"]
    files = {task: HERE / f"results/{task}/summary.json" for task in TASKS}
    rows = [score_row(name, current(summaries(files[task])[0])) for task, name in TASKS.items()]
    for path in sorted(HERE.glob("results/unnamed/*/summary.json")):
        (found,) = summaries(path)
        rows.append(score_row(f"{TASKS[found['task']]}, no class named", current(found)))
    for place, path in RIVALS.items():
        for found in summaries(path):
            if found["separator"] == "default":
                current(found)
            if found["task"] == "1speech+1sound" and found["separator"] in ("default", "Conv-TasNet", "NMF"):
                rows.append(score_row(f"{TASKS[found['task']]}, {place}{found['separator']}", found))
    return table([*head, "evaluations", "s"], rows)


def differences() -> str:
    """The table `differences`."""
    lines = read(HERE / "results/earlier/differences.jsonl")
    found = {(row["earlier"], row["task"], row["score"]): row for row in lines}
    rows = []
    for earlier, name in EARLIER.items():
        score = "si_sdr_permuted" if earlier in BEST_ORDER else "si_sdr"
        cells = [found.get((earlier, task, score)) for task in TASKS]
        rows.append([name, *("" if cell is None else _difference(cell) for cell in cells)])
    return table(["default against", *TASKS.values()], rows)


def _difference(row: dict[str, Any]) -> str:
    return f"{number(row['difference'], '+')} ({number(row['low'])} to {number(row['high'])}), {row['mixtures']}"


def example() -> str:
    """The table `example`."""
    found = json.loads((HERE.parent / "example/result.json").read_text(encoding="utf-8"))
    stems = {name: row for name, row in found.items() if isinstance(row, dict)}
    kinds = ("before_db", "after_db", "unrefined_db")
    rows = [[name, *(f"{row[kind]:.1f}" for kind in kinds)] for name, row in stems.items()]
    return table(["stem of the example", "SI-SDR before, dB", "after", "not refined"], rows)


@functools.cache
def measured(task: str) -> dict[str, dict[str, Any]]:
    """Summaries of Table 2's methods on a task, best first, over the mixtures that all samplers have; none is {}.

    Samplers are in `results/table2/TASK`, and some have done more; what is shipped beside them is in `results/rivals`.
    """
    folder = HERE.parent / f"unasdiff/results/table2/{task}"
    if not folder.exists():
        return {}
    both = [*summaries(folder / "summary.json"), *summaries(RIVALS[""])]
    headers = {row["separator"]: row for row in both if row["task"] == task}
    rows = [*read(folder / "rows.jsonl"), *read(RIVALS[""].with_name("rows.jsonl"))]
    tables: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row and row["task"] == task:
            tables.setdefault(row["separator"], {})[row["index"]] = row
    common = sorted(set.intersection(*map(set, tables.values())))
    chosen = {name: {index: own[index] for index in common} for name, own in tables.items()}
    found = results.summarise([(headers[name], list(own.values())) for name, own in chosen.items()])
    for summary in found:
        summary["rows"] = chosen[summary["separator"]]
    return {row["separator"]: row for row in sorted(found, key=lambda row: -row["si_sdr_permuted"]["mean"])}


def methods() -> str:
    """The table `methods`: Table 2 as the paper has it, in the best order, and the paper's own figures."""
    tasks = {task: measured(task) for task in TASKS if measured(task)}
    head = ["best order", *(f"{TASKS[task]}, {next(iter(found.values()))['count']}" for task, found in tasks.items())]
    names = dict.fromkeys(name for found in tasks.values() for name in found)
    rows = []
    for name in names:
        own = [found.get(name) for found in tasks.values()]
        oracle = " (oracle)" if any(row and row["oracle"] for row in own) else ""
        rows.append([name + oracle, *("" if row is None else with_interval(row["si_sdr_permuted"]) for row in own)])
    published = recipe.load(HERE.parent / "unasdiff/table2.toml")["published"]
    for name, own in published.items():
        cells = (own.get(task, {}).get("si_sdr_permuted") for task in tasks)
        rows.append([f"{name} (published)", *("" if cell is None else number(cell) for cell in cells)])
    return table(head, rows)


def samplers() -> str:
    """The tables `samplers`: those of Table 2 task by task."""
    return "\n\n".join(_samplers(task) for task in TASKS if measured(task))


def _samplers(task: str) -> str:
    found = {name: row for name, row in measured(task).items() if row["evaluations"] and row["evaluations"] > 1}
    score, what = ("si_sdr_permuted", "best order") if task == "2speech" else ("si_sdr", "labels fixed")
    head = [TASKS[task], "mixtures", what, "default has more", "more than hybrid, published", "below 0 dB, best order"]
    voice = "speech" in task
    rows = []
    for name, row in found.items():
        paired = [_more(found["default"], row, score), _more(row, found["hybrid, published"], score)]
        cost = [f"{100 * row['failure_rate_permuted']:.0f} %"]
        cost += [f"{row['pesq']['mean']:.2f}"] if voice else []
        cost += [f"{row['evaluations']:.0f}", f"{_seconds(row):.0f}"]
        rows.append([name, str(row["count"]), with_interval(row[score]), *paired, *cost])
    return table([*head, *(["PESQ-WB"] if voice else []), "evaluations", "s, median"], rows)


def standing() -> str:
    """The table `standing`: what the default has over the other samplers, task by task."""
    others = (
        "default, priors alone",
        "default, priors alone, one run",
        "hybrid, default levels",
        "hybrid, published",
        "DSG",
        "DPS",
        "analytical",
    )
    head = ["default has more than", *others, "time of hybrid, published"]
    rows = []
    for task, name in TASKS.items():
        if found := measured(task):
            own = found["default"]
            more = [_more(own, found[other], "si_sdr_permuted") if other in found else "" for other in others]
            share = _seconds(own) / _seconds(found["hybrid, published"])
            rows.append([f"{name}, {own['count']}", *more, f"{100 * share:.0f} %"])
    return table(head, rows)


def precision() -> str:
    """The sentence `precision`: the published loop in float32 against all these, which ran in bfloat16."""
    rows = {row["index"]: row for row in read(HERE.parent / "unasdiff/results/float32/rows.jsonl")}
    (task,) = {row["task"] for row in rows.values()}
    half = {
        row["index"]: row
        for row in read(HERE.parent / f"unasdiff/results/table2/{task}/rows.jsonl")
        if row["separator"] == "hybrid, published" and row["index"] in rows
    }
    more = _more({"rows": rows}, {"rows": half}, "si_sdr_permuted")
    return wrapped(
        "All ran in bfloat16, as the default does where processors have it. In float32 the published loop differed by "
        f"{more} dB on the first {len(rows)} mixtures of {TASKS[task]}, in the best order.",
        "",
    )


def published() -> str:
    """The sentence `published`: the default beside the paper's sampler, both with the shipped priors."""
    found = measured("1speech+1sound")
    default, alone, paper = (found[name] for name in ("default", "default, priors alone", "hybrid, published"))
    score = "si_sdr_permuted"
    text = (
        f"- With the same priors, on the first {default['count']} mixtures of 1 speech + 1 sound, in the best order, "
        f"default has {_more(default, paper, score)} dB more than the paper's sampler (`--preset published`), "
        f"{_more(alone, paper, score)} dB of that without any guidance, and takes {_seconds(default):.0f} s a "
        f"mixture in place of {_seconds(paper):.0f} ([all samplers](recipes/unasdiff/README.md#measured-so-far))."
    )
    return wrapped(text)


def posterior() -> str:
    """The sentence `posterior`: two samplers on two sources whose posterior is known."""
    found = json.loads((HERE.parent / "benchmark/posterior.json").read_text(encoding="utf-8"))
    default, paper = found["default"], found["published"]
    ratio = " and ".join(dict.fromkeys(f"{value:.2f}" for value in default["variance_ratio"]))
    error, paper_error = (f"{100 * row['relative_error_of_mean']:.2g} %" for row in (default, paper))
    text = (
        "- On two Gaussian sources, whose posterior is known exactly (`recipes/benchmark/posterior.json`), a "
        "run of the default's sampler that goes on to the end (`--least-noise 0.002`) takes "
        f"{default['network_evaluations']} network evaluations and its mean is {error} off; its samples have {ratio} "
        "times the variance, the price of renewing the noise in so few steps. The published loop takes "
        f"{paper['network_evaluations']}, is {paper_error} off, and has "
        f"{' and '.join(map(number, paper['variance_ratio']))} times the variance."
    )
    return wrapped(text)


def cost() -> str:
    """The lines `cost`, as they were measured."""
    return "```\n" + (HERE.parent / "benchmark/separate.txt").read_text(encoding="utf-8") + "```"


def told() -> str:
    """The table `told`: shares of stems that fit their class best, and of mixtures of which all do, with leaks."""
    names = {"tagger": "tagger", "classifier": "classifier", "together": "both"}
    rows = []
    for file, kept in (("told", names), ("told-without-masks", {"together": "both, the classifier without masks"})):
        found = {(row["network"], row["task"]): row for row in read(HERE / f"results/{file}.jsonl") if row["faint_db"]}
        tasks = [task for task in TASKS if ("together", task) in found]
        cells = {key: f"{row['pairs']:.2f}, {row['all']:.2f}" for key, row in found.items()}
        rows += [[name, *(cells[network, task] for task in tasks)] for network, name in kept.items()]
    return table(["", *(TASKS[task] for task in tasks)], rows)


def refined() -> str:
    """The table `refined`: SI-SDR of held-out stems in dB, by how far they are moved."""
    rows = {row.pop("task"): row for row in read(HERE / "results/refined.jsonl")}
    if {row.pop("refiner") for row in rows.values()} != {listeners()[REFINER]}:
        raise SystemExit("results/refined.jsonl: measured with another refiner")
    counts = {task: row.pop("mixtures") for task, row in rows.items()}
    parts = [(*task.partition(", "), count) for task, count in counts.items()]
    head = ["held-out stems", *(f"{TASKS[task]}{comma}{rest}, {count}" for task, comma, rest, count in parts)]
    return table(head, [[name, *(number(row[name]) for row in rows.values())] for name in next(iter(rows.values()))])


def loading() -> str:
    """The table `loading`: how fast windows are made."""
    head = ["windows of 4 s a second", "decoded each time", "from the cache", "the cache, GB", "made in, s of a core"]
    names = ("kind", "decoded_each_time", "from_the_cache", "cache_gb", "cache_made_in_s")
    rows = read(HERE.parent / "benchmark/loading.jsonl")
    return table(head, [[str(row[name]) for name in names] for row in rows])


def shipped() -> str:
    """The table `shipped`: the rivals of 1 speech + 1 sound that need no training, and the oracles."""
    found = [row for row in summaries(RIVALS[""]) if row["task"] == "1speech+1sound"]
    rows = [
        [
            row["separator"] + (" (oracle)" if row["oracle"] else ""),
            with_interval(row["si_sdr"]),
            with_interval(row["si_sdr_permuted"]),
        ]
        for row in found
    ]
    return table(["", "labels fixed", "best order"], rows)


def wrapped(text: str, indent: str = "  ") -> str:
    """An item of a list, or a paragraph, in lines."""
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _seconds(found: dict[str, Any]) -> float:
    """Of a mixture, the median: other work on the machine made some slow."""
    return float(np.median([row["seconds"] for row in found["rows"].values()]))


def _more(one: dict[str, Any], other: dict[str, Any], score: str) -> str:
    """The mean of paired differences and its interval."""
    if one is other:
        return ""
    both = [np.array([np.mean(row[score]) for _, row in sorted(found["rows"].items())]) for found in (one, other)]
    low, high = paired_interval(*both)
    return with_interval({"mean": float((both[0] - both[1]).mean()), "interval": (low, high)})


TABLES = {
    README: {
        "scores": scores,
        "differences": differences,
        "published": published,
        "posterior": posterior,
        "cost": cost,
        "example": example,
    },
    HERE / "README.md": {"loading": loading, "refined": refined, "told": told},
    HERE.parent / "unasdiff/README.md": {
        "methods": methods,
        "samplers": samplers,
        "standing": standing,
        "precision": precision,
    },
    HERE.parent / "unasdiff/rivals.md": {"shipped": shipped},
}


def filled(path: Path, text: str) -> str:
    """The text of this README with the tables of today."""
    for name, make in TABLES[path].items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{path} has no place for {name}")
        text = f"{before}{start}\n\n{make()}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    for path in TABLES:
        path.write_text(filled(path, path.read_text(encoding="utf-8")), encoding="utf-8")
