"""The evaluation's rows and summary, with separators whose scores are known."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console

from audiosep import evaluate
from audiosep.backbones.triple_path_unet import TriplePathUNet
from audiosep.data import MixtureDataset, read_manifest
from audiosep.errors import UsageError
from audiosep.prior import Prior
from audiosep.schedules import vp_linear
from audiosep.separator import Separator

RATE = 16000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    rows = [["path", "split", "kind", "speaker_or_class", "duration_s", "group"]]
    labels = [("speech", "ann"), ("speech", "bob"), ("sound", "Bark"), ("sound", "Door")]
    for i, (kind, label) in enumerate([*labels, ("sound", "Rain")]):
        wave = np.random.default_rng(i).normal(0, 0.1, RATE)
        soundfile.write(root / f"{label}.wav", wave, RATE)
        rows.append([f"{label}.wav", "test", kind, label, 1.0, label])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root / "manifest.csv"


class Fake:
    """Returns the true sources, looked up by mixture, in a chosen order, with 20 dB of noise."""

    sample_rate = RATE

    def __init__(self, manifest, task, order=None, classes=("bark", "door"), seed=0):
        self.priors = {"sound": SimpleNamespace(classes=classes)}
        items = read_manifest(manifest)
        self.items = list(MixtureDataset(items, task, 30, seed, classes=classes or None))
        self.order = order
        self.asked = []

    def __call__(self, wave, sample_rate, sources=None):
        assert wave.shape == (1, 4 * RATE)
        assert sample_rate == RATE
        self.asked.append(sources)
        (item,) = (item for item in self.items if torch.equal(item["mixture"], wave[0]))
        truth = item["sources"]
        noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
        noise *= 0.1 * truth.square().mean(-1, keepdim=True).sqrt()
        estimates = (truth + noise)[self.order or slice(None)]
        stems = {f"{name}_{k}": e[None] for k, (name, e) in enumerate(zip(sources, estimates))}
        return SimpleNamespace(sources=stems, sample_rate=RATE, report={"network_evaluations": 60})


def run(manifest, fake, task="1speech+1sound", count=4, **kwargs):
    return evaluate.run(manifest, task, count, 0, separator=fake, **kwargs)


def test_summary_of_a_separator_that_keeps_the_order(manifest):
    fake = Fake(manifest, "1speech+1sound")
    steps = []
    summary = run(manifest, fake, progress=lambda *step: steps.append(step[:2]))
    assert summary["count"] == 4
    assert summary["si_sdr"]["mean"] == pytest.approx(20, abs=0.2)
    assert summary["si_sdr"] == summary["si_sdr_permuted"]
    low, high = summary["si_sdr"]["interval"]
    assert low <= summary["si_sdr"]["mean"] <= high
    assert summary["si_sdri"]["mean"] == pytest.approx(20, abs=1.5)
    assert summary["failure_rate"] == 0
    assert summary["evaluations"] == 60
    assert set(summary["si_sdr_by_kind"]) == {"speech", "sound"}
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(asked[0] == "speech" and asked[1] in ("Bark", "Door") for asked in fake.asked)
    json.dumps(summary)


def test_swapped_sources_fail_with_labels_fixed_only(manifest):
    summary = run(manifest, Fake(manifest, "2speech", order=[1, 0]), task="2speech")
    assert summary["failure_rate"] == 1
    assert summary["failure_rate_permuted"] == 0
    assert summary["si_sdr"]["mean"] < -10
    assert summary["si_sdr_permuted"]["mean"] == pytest.approx(20, abs=0.2)


def test_the_same_mixtures_without_labels(manifest):
    fake = Fake(manifest, "1speech+1sound")
    summary = run(manifest, fake, labels=False)
    assert all(asked == ["speech", "sound"] for asked in fake.asked)
    assert summary["si_sdr"]["mean"] == pytest.approx(20, abs=0.2)
    bare = Fake(manifest, "1speech+1sound", classes=())
    run(manifest, bare)
    assert all(asked == ["speech", "sound"] for asked in bare.asked)


def test_score_in_numbers():
    n = torch.arange(800, dtype=torch.float64)
    a, b = torch.sin(2 * torch.pi * n / 800), torch.sin(4 * torch.pi * n / 800)
    scores = evaluate.score(torch.stack([b + 0.1 * a, a + 0.01 * b]), torch.stack([a, b]), a + b)
    assert scores["si_sdr"] == pytest.approx([-20, -40])
    assert scores["si_sdr_permuted"] == pytest.approx([40, 20])
    assert scores["permutation"] == [1, 0]
    assert scores["mixture_si_sdr"] == pytest.approx([0, 0], abs=1e-9)


def test_an_exact_or_silent_estimate_stays_within_json():
    truth = torch.randn(2, 100)
    scores = evaluate.score(torch.stack([truth[0], 0 * truth[1]]), truth, truth.sum(0))
    assert scores["si_sdr"] == [100, -100]


def test_a_stopped_run_goes_on_where_it_was(manifest, tmp_path):
    out = tmp_path / "runs/rows.jsonl"
    whole = run(manifest, Fake(manifest, "1speech+1sound"), out=out)
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    row = json.loads(lines[1])
    assert row["index"] == 0
    assert len(row["si_sdr"]) == len(row["ids"]) == 2
    out.write_text("".join(lines[:3]) + lines[3][:20])
    fake = Fake(manifest, "1speech+1sound")
    resumed = run(manifest, fake, out=out)
    assert len(fake.asked) == 2
    assert resumed["si_sdr"] == whole["si_sdr"]
    assert len(out.read_text().splitlines()) == 5
    fake = Fake(manifest, "1speech+1sound")
    more = run(manifest, fake, count=6, out=out)
    assert len(fake.asked) == 2
    assert more["count"] == 6


def test_rows_of_another_run_are_not_mixed_in(manifest, tmp_path):
    out = tmp_path / "rows.jsonl"
    run(manifest, Fake(manifest, "1speech+1sound"), out=out, count=1)
    with pytest.raises(UsageError, match="task '1speech\\+1sound', here '2sound'"):
        run(manifest, Fake(manifest, "2sound"), task="2sound", out=out)
    with pytest.raises(UsageError, match="items"):
        run(manifest, Fake(manifest, "1speech+1sound", classes=("rain",)), out=out)
    fake = Fake(manifest, "1speech+1sound")
    fake.priors["sound"].origin = {"sha256": "retrained"}
    with pytest.raises(UsageError, match="weights"):
        run(manifest, fake, out=out)
    out.write_text("hello\n")
    with pytest.raises(UsageError, match="not a file of rows"):
        run(manifest, Fake(manifest, "1speech+1sound"), out=out)
    out.write_text("")
    assert run(manifest, Fake(manifest, "1speech+1sound"), out=out, count=1)["count"] == 1


def test_an_error_names_the_mixture(manifest):
    class Short(Fake):
        def __call__(self, wave, sample_rate, sources=None):
            result = super().__call__(wave, sample_rate, sources)
            result.sources = {name: stem[:, :-1] for name, stem in result.sources.items()}
            return result

    with pytest.raises(UsageError, match=r"mixture 0 \(.*wav.*\): estimate and reference differ"):
        run(manifest, Short(manifest, "1speech+1sound"))


def test_the_real_separator(manifest):
    torch.manual_seed(0)
    small = {"width": 8, "depth": (1, 1, 1, 1, 1), "heads": 2, "condition_dim": 8, "squeeze": 2, "patch": (4, 4)}
    make = {"speech": (), "sound": ("Bark", "Door")}
    priors = {
        name: Prior(TriplePathUNet(num_classes=len(classes), **small), vp_linear(), classes=classes, kind=name)
        for name, classes in make.items()
    }
    separator = Separator(priors, steps=2, samples=1)
    summary = run(manifest, separator, count=1, task="1speech+2sound")
    assert summary["count"] == 1
    assert summary["evaluations"] == 6
    assert np.isfinite(summary["si_sdr"]["mean"])


def test_tables(manifest):
    summary = run(manifest, Fake(manifest, "1speech+1sound"), models="mine")
    text = evaluate.markdown([summary, summary])
    assert len(text.splitlines()) == 4
    assert "| 1speech+1sound | mine | 4 |" in text
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(evaluate.table([summary]))
    assert "1speech+1sound" in console.export_text()
