"""Experiment 2: a voice in the noise of machines, learned from recordings in which the voice is never alone.

    python recipes/ddprism/audio.py --manifest data/open16k.csv -o runs/ddprism-audio

View "alone" has machines (helicopter, drill, chainsaw, engine, train), view "both" has other recordings of them with
voices on top, both sources at the same level, at 8 kHz, in pieces of a second. Nothing else is used in training.
Held-out mixtures of the test split, two seconds each, are then separated with

    spectra        the start: a frame of 16 ms of a source has one of a few spectra
    Joint          the priors after the laps, small networks (`backbones.wiener`): the Wiener filter of a few samples
    clean          the same two, learned from each source alone: what knowing clean voices would give
    Gaussian EM    a power spectrum per source, from the same views: the Wiener filter
    NMF            spectra of each source with KL divergence: the machines' from "alone", then the voices' from "both";
                   in several sizes, with masks of amplitudes (1) and of powers (2), since no view says which is best

OUT/rows.jsonl has the SI-SDR of the voice for every mixture and method, OUT/machines.json the machine's recording
in every mixture and the file that it was cut from, OUT/table.md means and paired differences with 95 % intervals.
Settings are chosen with --held-out, which tests on a quarter of training's recordings and learns from the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiosep import audio
from audiosep.backbones.wiener import Wiener
from audiosep.data import Item, read_manifest
from audiosep.metrics import si_sdr
from audiosep.multiview import Plan, draw, learn
from audiosep.multiview_frames import Frames, fit_frames, posterior_of_frames
from audiosep.multiview_start import Source, Stage, View, fit_gaussians
from audiosep.operators import Mixing
from audiosep.prior import Denoiser, Prior
from audiosep.schedules import ve
from audiosep.stft import istft, stft

RATE, FRAME, NOISE = 8000, 128, 0.02
PIECE = 126 * FRAME  # samples of a mixture; priors learn from halves
MACHINES = ("Helicopter", "Drill", "Chainsaw", "Engine", "Train")
NAMES = ("machine", "voice")
N_FFT, HOP = 512, 128
SIZES = (2, 4, 8, 16, 32)  # of NMF
DRAWS = (2, 2, 2, 4)  # samples of every mixture, round by round


def segments(items: list[Item], count: int, rng: np.random.Generator) -> tuple[Tensor, list[Item]]:
    """Pieces (count, PIECE) of RMS 1, and the recordings that they are from; short ones are repeated."""
    found, used = [], []
    for index in rng.permutation(len(items)).tolist() * 50:
        wave, rate = audio.read(items[index].path)
        low = audio.resample(wave, rate, RATE)[0]
        low = np.tile(low, -(-PIECE // max(1, low.size)))
        first = rng.integers(low.size - PIECE + 1)
        piece = torch.from_numpy(low[first : first + PIECE].copy())
        level = piece.square().mean().sqrt()
        if level > 1e-3:
            found.append(piece / level)
            used.append(items[index])
        if len(found) == count:
            return torch.stack(found), used
    raise SystemExit("too few recordings")


def left_out(items: list[Item], rng: np.random.Generator) -> tuple[list[Item], list[Item]]:
    """Recordings, and a quarter of them that shares no file or speaker with the others."""
    groups = sorted({item.group for item in items})
    held = set(rng.permutation(groups)[: len(groups) // 4].tolist())
    return [item for item in items if item.group not in held], [item for item in items if item.group in held]


def view(name: str, sources: tuple[str, ...], waves: Tensor) -> View:
    return View(name, sources, waves[:, None], Mixing(torch.ones(1, len(sources), dtype=torch.float64)), NOISE)


def halves(waves: Tensor) -> Tensor:
    return waves.reshape(2 * len(waves), -1)


def by_priors(start: dict[str, Frames], priors: list[Denoiser], plan: Plan, waves: Tensor) -> Tensor:
    """Voices (S, T): Wiener's filter of the sources' mean powers in joint samples.

    The first samples go on from what the start makes of the mixtures, later ones from the mean of those before: one
    passage through the noise levels does not forget where it began. Only the last ones count, and their own mean would
    take many more of them.
    """
    mixed = view("test", NAMES, waves)
    mean = posterior_of_frames(mixed, start).float()
    for number, count in enumerate(DRAWS):
        drawn = []
        for i in range(count):
            x, _ = draw(mixed, priors, plan, 1000 * number + i, mean)
            drawn.append(torch.where(x.isfinite(), x, mean))
        mean = torch.stack(drawn).mean(0)
    machine, voice = torch.stack([stft(x, N_FFT, HOP).abs().square() for x in drawn]).mean(0).unbind(1)
    return masked(waves, voice, machine)


def masked(waves: Tensor, voice: Tensor, machine: Tensor) -> Tensor:
    """Waves through the mask voice / (voice + machine) of two spectrograms."""
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


def nmf(alone: Tensor, both: Tensor, size: int) -> Callable[[Tensor, int], Tensor]:
    def spectrogram(waves: Tensor) -> Tensor:
        return stft(waves, N_FFT, HOP).abs().movedim(1, 0).flatten(1)

    start = torch.rand(2, N_FFT // 2 + 1, size, generator=torch.Generator().manual_seed(1))
    machine, _ = divide(spectrogram(alone), start[0, :, :0], start[0], 100)
    voice, _ = divide(spectrogram(both), machine, start[1], 100)

    def separate(waves: Tensor, power: int) -> Tensor:
        found = []
        for wave in waves:
            _, gains = divide(spectrogram(wave[None]), torch.cat((machine, voice), 1), voice[:, :0], 100)
            parts = voice @ gains[size:], machine @ gains[:size]
            found.append(masked(wave[None], *(part.pow(power)[None] for part in parts))[0])
        return torch.stack(found)

    return separate


class Data(NamedTuple):
    """Waves (count, PIECE): machines alone, others with voices, those voices, and what is separated.

    `recordings` are those of the machines in `test`.
    """

    alone: Tensor
    both: Tensor
    voices: Tensor
    test: Tensor
    test_voices: Tensor
    recordings: list[Item]


def gather(options: argparse.Namespace) -> Data:
    rng = np.random.default_rng(0)

    def items(split: str) -> tuple[list[Item], list[Item]]:
        rows = read_manifest(options.manifest, options.root, split)
        return [row for row in rows if row.label in MACHINES], [row for row in rows if row.kind == "speech"]

    machines, speech = items("train")
    if options.held_out:
        (machines, test_machines), (speech, test_speech) = left_out(machines, rng), left_out(speech, rng)
    else:
        test_machines, test_speech = items("test")
    machines = [machines[i] for i in rng.permutation(len(machines))]
    alone, _ = segments(machines[::2], options.segments, rng)
    voices, _ = segments(speech, options.segments, rng)
    both = segments(machines[1::2], options.segments, rng)[0] + voices
    test_voices, _ = segments(test_speech, options.mixtures, rng)
    noise, recordings = segments(test_machines, options.mixtures, rng)
    return Data(alone, both, voices, test_voices + noise, test_voices, recordings)


def views_of(data: Data, clean: bool) -> list[View]:
    """Pieces of a second: machines alone, and the voices with other machines, or alone as well."""
    second = view(NAMES[1], NAMES[1:], halves(data.voices)) if clean else view(NAMES[1], NAMES, halves(data.both))
    return [view(NAMES[0], NAMES[:1], halves(data.alone)), second]


def stages_of(options: argparse.Namespace) -> list[Stage]:
    """The machines are seen alone, so that one lap is enough: what is drawn of them hardly changes."""
    return [Stage(NAMES[:1], NAMES[:1], 1), Stage(NAMES[1:], NAMES[1:], options.laps)]


def plan_of(options: argparse.Namespace) -> Plan:
    return Plan(
        steps=10, corrections=0, sigma_min=2e-2, sigma_max=3.0, again=3.0, iterations=3, rows=20,
        max_steps=options.steps, batch_size=16, start_laps=options.start_laps,
    )  # fmt: skip


def sources_of(options: argparse.Namespace) -> list[Source]:
    made = []
    for name in NAMES:
        torch.manual_seed(0)
        prior = Prior(
            Wiener(N_FFT, options.width, depth=5), ve(200, 2e-2, 6.0), sample_rate=RATE, level=0.0,
            parameterization="direct",
        )  # fmt: skip
        made.append(Source(name, prior, covariance="frames", frame=FRAME, centred=True, components=options.components))
    return made


def methods_of(data: Data, options: argparse.Namespace) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Name -> what learns, and returns what separates waves (S, T) into voices."""

    def start(clean: bool) -> dict[str, Frames]:
        return fit_frames(views_of(data, clean), sources_of(options), stages_of(options), options.start_laps)[0]

    def of_start(clean: bool) -> Callable[[Tensor], Tensor]:
        found = start(clean)
        return lambda waves: posterior_of_frames(view("test", NAMES, waves), found)[:, 1].float()

    def of_laps(clean: bool) -> Callable[[Tensor], Tensor]:
        plan, folder = plan_of(options), options.out / ("joint-clean" if clean else "joint")
        *_, last = learn(views_of(data, clean), sources_of(options), stages_of(options), plan, folder)
        return lambda waves: by_priors(start(clean), [last.priors[name] for name in NAMES], plan, waves)

    @cache
    def of_nmf(size: int) -> Callable[[Tensor, int], Tensor]:
        return nmf(data.alone, data.both, size)

    methods: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {"nothing": lambda: lambda waves: waves}
    for size, power in itertools.product(SIZES, (1, 2)):
        methods[f"NMF, {size} spectra, power {power}"] = lambda size=size, power=power: partial(
            of_nmf(size), power=power
        )
    methods["Gaussian EM"] = lambda: wiener(data.alone, data.both)
    for clean in (False,) if options.held_out else (False, True):
        suffix = ", clean" if clean else ""
        methods[f"spectra{suffix}"] = lambda clean=clean: of_start(clean)
        methods[f"Joint{suffix}"] = lambda clean=clean: of_laps(clean)
    return methods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, default=Path("data/open16k.csv"))
    parser.add_argument("--root", type=Path, help="of the manifest's paths")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--held-out", action="store_true", help="test on a quarter of training: to choose settings")
    parser.add_argument("--segments", type=int, default=100, help="of two seconds, per view")
    parser.add_argument("--mixtures", type=int, default=200)
    parser.add_argument("--components", type=int, default=16, help="spectra of a source")
    parser.add_argument("--start-laps", type=int, default=10)
    parser.add_argument("--laps", type=int, default=2, help="of the voice's prior")
    parser.add_argument("--steps", type=int, default=1500, help="of training per lap")
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = gather(options)
    path = options.out / "rows.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for name, make in methods_of(data, options).items():
        if any(row["method"] == name for row in done):
            continue
        began = time.monotonic()
        separate = make()
        trained = time.monotonic() - began
        scores = si_sdr(separate(data.test), data.test_voices).tolist()
        row = {"method": name, "si_sdr": [round(score, 3) for score in scores]}
        row |= {"training_s": round(trained, 1), "separation_s": round(time.monotonic() - began - trained, 1)}
        done.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, round(float(np.mean(scores)), 2), flush=True)
    machines = {"recordings": [item.id for item in data.recordings], "files": [item.group for item in data.recordings]}
    (options.out / "machines.json").write_text(json.dumps(machines) + "\n")
    if any(row["method"] == "Joint" for row in done):
        (options.out / "table.md").write_text(table(done, machines))


def interval(gap: np.ndarray, labels: list[str] | None = None) -> str:
    """The mean of paired differences with its 95 % interval: over them, or over the labels that they share."""
    if labels is None:
        half = 1.96 * gap.std(ddof=1) / len(gap) ** 0.5
        low, high = gap.mean() - half, gap.mean() + half
    else:
        _, which = np.unique(labels, return_inverse=True)
        sums, counts = np.bincount(which, gap), np.bincount(which)
        drawn = np.random.default_rng(0).integers(len(sums), size=(10_000, len(sums)))
        low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    return f"{gap.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def table(rows: list[dict], machines: dict[str, list[str]]) -> str:
    """Means, and what Joint has over each, with intervals over the mixtures and over what their machines are from."""
    best = next(row for row in rows if row["method"] == "Joint")
    over = [f"over {len(set(labels))} {name}" for name, labels in machines.items()]
    heads = ["method", "SI-SDR, dB", f"Joint over it, over {len(best['si_sdr'])} mixtures", *over, "s to learn", "s"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        gap = np.subtract(best["si_sdr"], row["si_sdr"])
        gaps = [interval(gap), *(interval(gap, labels) for labels in machines.values())]
        if row is best:
            gaps = [""] * len(gaps)
        times = f"{row['training_s']}", f"{row['separation_s']}"
        lines.append([row["method"], f"{np.mean(row['si_sdr']):.2f}", *gaps, *times])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
