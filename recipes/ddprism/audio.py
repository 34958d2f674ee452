"""Experiment 2: a voice in the noise of machines, learned from recordings in which the voice is never alone.

    python recipes/ddprism/audio.py --manifest data/open16k.csv -o runs/ddprism-audio

View "alone" has machines (helicopter, drill, chainsaw, engine, train), view "both" has other recordings of them with
voices on top, both sources at the same level, at 8 kHz, cut into blocks of 16 ms. Nothing else is used in training.
Held-out mixtures of the test split, two seconds each, are then separated with

    mixture of Gaussians   the start, and the priors after the laps (`joint`)
    clean                  the same two, learned from each source alone: what knowing clean voices would give
    Gaussian EM            a power spectrum per source, from the same views: the Wiener filter
    NMF                    spectra of each source with KL divergence: the machines' from "alone", then the voices' from
                           "both"; in three sizes, since no view says which is best

Blocks start at four offsets, and what they say is averaged. OUT/rows.jsonl has the SI-SDR of the voice for every
mixture and method, OUT/table.md their means and the paired differences with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from audiosep import audio
from audiosep.backbones.mlp import MLP
from audiosep.data import read_manifest
from audiosep.metrics import si_sdr
from audiosep.multiview import Plan, draw, learn
from audiosep.multiview_start import Mixture, Source, Stage, View, fit_gaussians, fit_mixtures, posterior_of_mixtures
from audiosep.operators import Mixing
from audiosep.prior import Denoiser, Prior
from audiosep.schedules import ve
from audiosep.stft import istft, stft

RATE, SECONDS, BLOCK, NOISE = 8000, 2, 128, 0.02
MACHINES = ("Helicopter", "Drill", "Chainsaw", "Engine", "Train")
NAMES = ("machine", "voice")
OFFSETS = (0, 32, 64, 96)
N_FFT, HOP = 512, 128
SIZES = (4, 16, 32)  # of NMF


def segments(items: list, count: int, rng: np.random.Generator) -> Tensor:
    """Pieces (count, T) of recordings, of RMS 1; short recordings are repeated to fill one."""
    found = []
    for index in rng.permutation(len(items)).tolist() * 50:
        wave, rate = audio.read(items[index].path)
        low = audio.resample(wave, rate, RATE)[0]
        low = np.tile(low, -(-RATE * SECONDS // max(1, low.size)))
        first = rng.integers(low.size - RATE * SECONDS + 1)
        piece = torch.from_numpy(low[first : first + RATE * SECONDS].copy())
        level = piece.square().mean().sqrt()
        if level > 1e-3:
            found.append(piece / level)
        if len(found) == count:
            return torch.stack(found)
    raise SystemExit("too few recordings")


def blocks(waves: Tensor, offset: int = 0) -> Tensor:
    """Blocks (R, 1, BLOCK) of waves (S, T), the first `offset` samples apart."""
    padded = torch.nn.functional.pad(waves, (BLOCK - offset if offset else 0, offset))
    return padded.unfold(1, BLOCK, BLOCK).reshape(-1, 1, BLOCK)


def joined(rows: Tensor, like: Tensor, offset: int = 0) -> Tensor:
    """Waves (S, T) of blocks (R, BLOCK)."""
    first = BLOCK - offset if offset else 0
    return rows.reshape(len(like), -1)[:, first : first + like.shape[1]]


def view(name: str, sources: tuple[str, ...], waves: Tensor, offset: int = 0) -> View:
    mixing = Mixing(torch.ones(1, len(sources), dtype=torch.float64))
    return View(name, sources, blocks(waves, offset), mixing, NOISE)


def by_mixtures(found: dict[str, Mixture], waves: Tensor) -> Tensor:
    """Voices (S, T): the mean of four exact samples at every offset."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros_like(waves)
    for offset in OFFSETS:
        mixed = view("test", NAMES, waves, offset)
        for _ in range(4):
            total += joined(posterior_of_mixtures(mixed, found, generator)[:, 1].float(), waves, offset)
    return total / (4 * len(OFFSETS))


def by_priors(priors: list[Denoiser], plan: Plan, waves: Tensor) -> Tensor:
    """Voices (S, T): the mean of a joint sample at every offset."""
    total, anew = torch.zeros_like(waves), replace(plan, again=None)  # nothing was drawn of held-out mixtures before
    for i, offset in enumerate(OFFSETS):
        mixed = view("test", NAMES, waves, offset)
        x, _ = draw(mixed, priors, anew, i, torch.ones(len(mixed.y), 2, BLOCK))
        total += joined(x[:, 1].nan_to_num(0.0), waves, offset)
    return total / len(OFFSETS)


def masked(waves: Tensor, voice: Tensor, machine: Tensor) -> Tensor:
    """Waves through the mask voice / (voice + machine) of two power spectrograms."""
    return istft(stft(waves, N_FFT, HOP) * voice / (voice + machine + 1e-12), N_FFT, HOP, waves.shape[-1])


def wiener(alone: Tensor, both: Tensor) -> Callable[[Tensor], Tensor]:
    """Stationary Gaussians of blocks as long as the masks' windows."""
    views = []
    for name, sources, waves in (("alone", NAMES[:1], alone), ("both", NAMES, both)):
        long = waves.unfold(1, N_FFT, N_FFT).reshape(-1, 1, N_FFT)
        mixing = Mixing(torch.ones(1, len(sources), dtype=torch.float64))
        views.append(View(name, sources, long, mixing, NOISE))
    sources = [Source(name, covariance="stationary", centred=True) for name in NAMES]
    spectra, _ = fit_gaussians(views, sources, 200)
    machine, voice = (spectra[name].covariance.float()[:, None] for name in NAMES)
    return lambda waves: masked(waves, voice, machine)


def divide(power: Tensor, known: Tensor, fresh: Tensor, laps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Fit power (F, M) by (known, fresh) @ gains with KL divergence; `known` stays. Returns fresh and gains.

    Daniel Lee and Sebastian Seung, "Algorithms for Non-negative Matrix Factorization", 2000.
    """
    gains = torch.rand(known.shape[1] + fresh.shape[1], power.shape[1], generator=torch.Generator().manual_seed(seed))
    for _ in range(laps):
        spectra = torch.cat((known, fresh), 1)
        ratio = power / (spectra @ gains + 1e-9)
        gains = gains * (spectra.T @ ratio) / (spectra.sum(0)[:, None] + 1e-9)
        if fresh.shape[1]:
            own = gains[known.shape[1] :]
            ratio = power / (spectra @ gains + 1e-9)
            fresh = fresh * (ratio @ own.T) / (own.sum(1) + 1e-9)
            fresh = fresh / fresh.sum(0)
    return fresh, gains


def nmf(alone: Tensor, both: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    def spectrogram(waves: Tensor) -> Tensor:
        return stft(waves, N_FFT, HOP).abs().movedim(1, 0).flatten(1)

    start = torch.rand(2, N_FFT // 2 + 1, size, generator=torch.Generator().manual_seed(1))
    machine, _ = divide(spectrogram(alone), start[0, :, :0], start[0], 100)
    voice, _ = divide(spectrogram(both), machine, start[1], 100)

    def separate(waves: Tensor) -> Tensor:
        found = []
        for wave in waves:
            _, gains = divide(spectrogram(wave[None]), torch.cat((machine, voice), 1), voice[:, :0], 100)
            parts = voice @ gains[size:], machine @ gains[:size]
            found.append(masked(wave[None], *(part.square()[None] for part in parts))[0])
        return torch.stack(found)

    return separate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, default=Path("data/open16k.csv"))
    parser.add_argument("--root", type=Path, help="of the manifest's paths")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--segments", type=int, default=60, help="of two seconds, per view")
    parser.add_argument("--mixtures", type=int, default=40)
    parser.add_argument("--components", type=int, default=8)
    parser.add_argument("--start-laps", type=int, default=12)
    parser.add_argument("--laps", type=int, default=0, help="with diffusion priors, per source")
    parser.add_argument("--steps", type=int, default=1500, help="of training per lap")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def items(split: str, kind: str) -> list:
        rows = read_manifest(options.manifest, options.root, split, kind)
        return [row for row in rows if kind == "speech" or row.label in MACHINES]

    machines = segments(items("train", "sound"), 2 * options.segments, rng)
    voices = segments(items("train", "speech"), options.segments, rng)
    alone, both = machines[::2], machines[1::2] + voices
    test_voice = segments(items("test", "speech"), options.mixtures, rng)
    test = test_voice + segments(items("test", "sound"), options.mixtures, rng)
    plan = Plan(
        steps=24, corrections=0, sigma_min=2e-2, sigma_max=20.0, iterations=4, rows=2048, max_steps=options.steps,
        batch_size=256, start_laps=options.start_laps, again=0.3,
    )  # fmt: skip
    stages = [Stage((NAMES[0],), (NAMES[0],), options.laps), Stage((NAMES[1],), (NAMES[1],), options.laps)]
    views = {
        "mixtures alone": [view(NAMES[0], NAMES[:1], alone), view(NAMES[1], NAMES, both)],
        "clean": [view(NAMES[0], NAMES[:1], alone), view(NAMES[1], NAMES[1:], voices)],
    }

    def sources() -> list[Source]:
        made = []
        for name in NAMES:
            torch.manual_seed(0)
            prior = Prior(MLP(BLOCK, 384), ve(200, 2e-2, 20.0), sample_rate=RATE, level=0.0, parameterization="edm")
            made.append(Source(name, prior, centred=True, components=options.components))
        return made

    def of_starts(training: list[View]) -> Callable[[Tensor], Tensor]:
        found = fit_mixtures(training, sources(), stages, options.start_laps)
        return lambda waves: by_mixtures(found, waves)

    def of_laps(training: list[View], folder: Path) -> Callable[[Tensor], Tensor]:
        *_, last = learn(training, sources(), stages, plan, folder)
        return lambda waves: by_priors([last.priors[name] for name in NAMES], plan, waves)

    methods: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "nothing": lambda: lambda waves: waves,
        **{f"NMF, {size} spectra": lambda size=size: nmf(alone, both, size) for size in SIZES},
        "Gaussian EM": lambda: wiener(alone, both),
    }
    for name, training in views.items():
        methods[f"mixture of Gaussians, {name}"] = lambda training=training: of_starts(training)
        if options.laps:
            folder = options.out / name.replace(" ", "-")
            methods[f"joint, {name}"] = lambda training=training, folder=folder: of_laps(training, folder)
    path = options.out / "rows.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for name, make in methods.items():
        if any(row["method"] == name for row in done):
            continue
        began = time.monotonic()
        separate = make()
        trained = time.monotonic() - began
        scores = si_sdr(separate(test), test_voice).tolist()
        row = {"method": name, "si_sdr": [round(score, 3) for score in scores]}
        row |= {"training_s": round(trained, 1), "separation_s": round(time.monotonic() - began - trained, 1)}
        done.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, round(float(np.mean(scores)), 2), flush=True)
    (options.out / "table.md").write_text(table(done))


def table(rows: list[dict]) -> str:
    """Means, and what the best of mixtures alone has over each, with 95 % intervals over the mixtures."""
    ours = [row for row in rows if row["method"].endswith("mixtures alone")]
    best = max(ours, key=lambda row: np.mean(row["si_sdr"]))
    lines = [
        "| method | SI-SDR, dB | the best from mixtures alone over it | training, s | separation, s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gap = np.subtract(best["si_sdr"], row["si_sdr"])
        half = 1.96 * gap.std(ddof=1) / len(gap) ** 0.5
        over = "" if row is best else f"{gap.mean():+.2f} ({gap.mean() - half:+.2f} to {gap.mean() + half:+.2f})"
        cells = row["method"], f"{np.mean(row['si_sdr']):.2f}", over, row["training_s"], row["separation_s"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join([*lines, "", f"{len(best['si_sdr'])} mixtures.", ""])


if __name__ == "__main__":
    main()
