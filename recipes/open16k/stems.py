"""Stems to train a refiner on, and to choose its weights by: of mixtures whose sources are known.

Of `train` they are estimates that the sampler had on its way, at any noise, in short runs with and without class
guidance; with `--refiner` also those after each restart from what that refiner had left, as the default separator will
ask about them; of `valid` what the default separator answers in the end, without a refiner. A share of the files of one
voice (`--unnamed`) is of it and of all the rest, asked for as one `sound`.

    python recipes/open16k/stems.py --split train --seed 6000 --minutes 60 -o data/stems
    python recipes/open16k/stems.py --split train --seed 9200 --minutes 60 --refiner refiner -o data/stems
    python recipes/open16k/stems.py --split valid --seed 5 --count 10 --unnamed 0 -o data/stems-valid
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiosep import Separator
from audiosep.data import MixtureDataset, read_manifest
from audiosep.fit import REFINED_TASKS
from audiosep.hub import load_model
from audiosep.refiner import SUFFIX, Refiner, write_stems
from audiosep.samplers import Noise
from audiosep.separator import REFINE, restarts_for

SHORT = ({"steps": 7}, {"steps": 8, "guidance": 0}, {"steps": 10})  # runs along which estimates are taken
EACH = 4  # mixtures a file


def along(
    separator: Separator, mixture: Tensor, names: Sequence[str], rng: np.random.Generator, refiner: Refiner | None
) -> Iterator[Tensor]:
    """Two estimates (K, N) of one run at random noise, its last, and those of its restarts; the mixture (1, N) is at
    the priors' level.
    """
    sources = separator.resolve(names)
    sampler: Any = separator.sampler_for(sources)
    steer, seen = sampler.steer, []

    def kept(x: Tensor, noise: float) -> Tensor:
        seen.append(x.clone())
        return x if steer is None else steer(x, noise)

    sampler.steer = kept
    noise = Noise([int(rng.integers(2**60))])
    *_, last = sampler(mixture, noise)
    for k in rng.choice(np.arange(1, len(seen)), 2, replace=False):
        yield seen[k][0].cpu()
    yield last.x[0].cpu()
    if refiner is None:
        return
    labels = refiner.numbers(separator.classes_of(sources))[None].to(separator.device)
    for _ in range(restarts_for(len(sources), None)):
        refined = refiner.refine([last.x.float()], labels, REFINE)[0]
        *_, last = sampler(mixture, noise, (refined, len(sampler.times) - separator.again))
        yield last.x[0].cpu()


def one_sound(names: list[str], sources: Tensor) -> dict[str, Any]:
    """Names and sources of a voice and of all other sources (K, N) together, which have no class."""
    voice = names.index("speech")
    rest = sources.sum(0) - sources[voice]
    return {"names": ["speech", "sound"], "sources": torch.stack((sources[voice], rest))}


@torch.no_grad()
def main() -> None:
    """Write file after file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default="data/open16k.csv")
    parser.add_argument("--split", choices=("train", "valid"), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--count", type=int, help="files in all")
    parser.add_argument("--unnamed", type=float, default=0.25, help="share of files, see above")
    parser.add_argument("--tasks", default=",".join(REFINED_TASKS), help="of the files, in turn")
    parser.add_argument("--refiner", help="checkpoint from whose stems the sampler goes on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.minutes is None and options.count is None:
        parser.error("say --minutes or --count")
    if options.refiner and options.split != "train":
        parser.error("--refiner is for stems to train on")
    short: Sequence[dict[str, Any]] = SHORT if options.split == "train" else ({},)
    separators = [
        Separator.from_pretrained("speech,sound", device=options.device, **{"refine": 0, **more}) for more in short
    ]
    items = read_manifest(options.manifest, split=options.split)
    classes = separators[0].priors["sound"].classes
    refiner = load_model(options.refiner).to(separators[0].device) if options.refiner else None
    tasks = list(enumerate(options.tasks.split(",")))
    mixtures = [MixtureDataset(items, task, 10**6, options.seed + k, classes=classes) for k, task in tasks]
    rng, began = np.random.default_rng(options.seed), time.monotonic()
    for n in itertools.count():
        if n == options.count or (options.minutes and time.monotonic() - began > 60 * options.minutes):
            return
        dataset, rows = mixtures[n % len(tasks)], []
        joined = dataset.n_speech == 1 and rng.random() < options.unnamed
        for k in range(EACH):
            item = dataset[n // len(tasks) * EACH + k]
            if joined:
                item |= one_sound(item["names"], item["sources"])
            separator = separators[rng.integers(len(separators))]
            if options.split == "train":
                level = separator.gain(item["mixture"][None], separator.resolve(item["names"])).cpu()
                mixture = (level * item["mixture"]).to(separator.device)
                found = along(separator, mixture, item["names"], rng, refiner)
                rows += [(x, level * item["sources"], item["names"]) for x in found]
            else:
                answer = separator(item["mixture"], separator.sample_rate, item["names"])
                rows.append((torch.stack(list(answer.sources.values())), item["sources"], item["names"]))
        path = options.output / f"{dataset.task}.{options.seed}.{n:05d}{SUFFIX}"
        write_stems(path, rows, dataset.sample_rate)
        print(n, dataset.task, f"{(time.monotonic() - began) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
