"""The evaluation's rows and summary, with separators whose scores are known."""

import csv
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console

from audiosep import evaluate, hub, results
from audiosep.backbones.triple_path_unet import TriplePathUNet
from audiosep.data import MixtureDataset, read_manifest
from audiosep.errors import AudiosepError, UsageError
from audiosep.lowrank import LAST
from audiosep.prior import Prior
from audiosep.refiner import BOUND, Refiner
from audiosep.schedules import vp_linear
from audiosep.separator import AGAIN, LABEL_NOISE, LAST_REFINE, REST_RANK
from audiosep.tagger import Ensemble, Tagger

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


def tables(manifest, task="1speech+1sound", count=4, published=None, **options):
    asked = {"manifest": str(manifest), "tasks": [task], "count": count, **options}
    return {"evaluate": asked, "separators": {}, "published": published or {}}


def run(manifest, fake, task="1speech+1sound", count=4, out=None, progress=None, **options):
    (summary,) = evaluate.run(tables(manifest, task, count, **options), out, progress, {"fake": fake})
    return summary


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
    assert summary["success"] == summary["si_sdr"]
    assert summary["evaluations"] == 60
    assert summary["real_time_factor"] == pytest.approx(summary["seconds"] / 4)
    assert set(summary["si_sdr_by_kind"]) == {"speech", "sound"}
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert all(asked[0] == "speech" and asked[1] in ("Bark", "Door") for asked in fake.asked)
    json.dumps(summary)


def test_swapped_sources_fail_with_labels_fixed_only(manifest):
    summary = run(manifest, Fake(manifest, "2speech", order=[1, 0]), task="2speech", metrics=["sdr"])
    assert summary["failure_rate"] == 1
    assert summary["success"] is None
    assert summary["failure_rate_permuted"] == 0
    assert summary["si_sdr"]["mean"] < -10
    assert summary["si_sdr_permuted"]["mean"] == pytest.approx(20, abs=0.2)
    assert summary["sdr"]["mean"] == pytest.approx(20, abs=0.2)  # the other scores follow the best order


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
    whole = run(manifest, Fake(manifest, "1speech+1sound"), out=tmp_path)
    out = tmp_path / "rows.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    row = json.loads(lines[0])
    assert (row["index"], row["separator"], row["task"]) == (0, "fake", "1speech+1sound")
    assert len(row["si_sdr"]) == len(row["ids"]) == 2
    out.write_bytes("".join(lines[:2]).encode() + '{"ids": ["ä'.encode()[:-1])  # as a killed run leaves it
    fake = Fake(manifest, "1speech+1sound")
    resumed = run(manifest, fake, out=tmp_path)
    assert len(fake.asked) == 2
    assert resumed["si_sdr"] == whole["si_sdr"]
    assert len(out.read_bytes().splitlines()) == 5  # the half line is kept, and counts for none
    fake = Fake(manifest, "1speech+1sound")
    more = run(manifest, fake, count=6, out=tmp_path)
    assert len(fake.asked) == 2
    assert more["count"] == 6


def test_rows_of_another_run_are_not_mixed_in(manifest, tmp_path):
    run(manifest, Fake(manifest, "1speech+1sound"), out=tmp_path, count=1)
    retrained = Fake(manifest, "1speech+1sound")
    retrained.priors["sound"].origin = {"sha256": "retrained"}
    for fake in (Fake(manifest, "1speech+1sound", classes=("rain",)), retrained):
        assert run(manifest, fake, out=tmp_path, count=2)["count"] == 2
        assert len(fake.asked) == 2
    again = Fake(manifest, "1speech+1sound")
    run(manifest, again, out=tmp_path, count=1)
    assert not again.asked  # its row is still there
    (tmp_path / "rows.jsonl").write_text("hello\n")
    with pytest.raises(UsageError, match="not a file of rows"):
        run(manifest, Fake(manifest, "1speech+1sound"), out=tmp_path)


def ears(**digests):
    """Tagger and classifier of these hashes."""
    pair = {name: Tagger(["Bark"], width=2, mels=8) for name in ("tagger", "classifier")}
    for name, listener in pair.items():
        listener.origin = {"sha256": digests.get(name, "0")}
    return Ensemble(**pair)


@pytest.mark.parametrize(
    ("task", "labels", "again"),
    [("1speech+1sound", True, 0), ("2sound", True, 2), ("1speech+2sound", False, 0), ("2speech", True, 0)],
)
def test_rows_are_the_classifiers_too_where_it_tells_the_sources_apart(manifest, tmp_path, task, labels, again):
    asked = []
    for digest in ("first", "second"):
        fake = Fake(manifest, task)
        fake.classifier = ears(classifier=digest)
        run(manifest, fake, task=task, out=tmp_path, count=2, labels=labels)
        asked.append(len(fake.asked))
    assert asked == [2, again]


def test_rows_are_the_taggers_wherever_a_sound_is(manifest, tmp_path):
    asked = []
    for digest in ("first", "second"):
        fake = Fake(manifest, "1speech+1sound")
        fake.classifier = ears(tagger=digest)
        summary = run(manifest, fake, out=tmp_path, count=2)
        asked.append(len(fake.asked))
    assert asked == [2, 2]
    assert summary["classifiers"] == {"tagger": "second"}


def test_rows_are_the_guidances_too_where_there_is_any(manifest, tmp_path):
    asked = []
    for task in ("1speech+1sound", "2speech"):
        for guidance in (0.3, 0.0):
            fake = Fake(manifest, task)
            fake.classifier, fake.guidance = ears(), guidance
            run(manifest, fake, task=task, out=tmp_path / task, count=2)
            asked.append(len(fake.asked))
    assert asked == [2, 2, 2, 0]


def test_rows_are_the_low_ranks_too_where_a_sound_is(manifest, tmp_path):
    asked = []
    cases = [("2sound", True), ("2sound", False), ("2speech", True)]
    cases += [("1speech+1sound", True), ("1speech+1sound", False), ("1speech+2sound", True)]
    for task, labels in cases:
        for share in (0.0, 0.2):
            fake = Fake(manifest, task)
            fake.low_rank = share
            summary = run(manifest, fake, task=task, out=tmp_path / f"{task}{labels}", count=2, labels=labels)
            asked.append(len(fake.asked))
            facts = summary.get("low rank", {})
            assert facts.get("last") == (LAST if share and "2sound" in task else None)
            assert facts.get("rest") == (REST_RANK if share and (task, labels) == ("1speech+1sound", False) else None)
    assert asked == [2, 2, 2, 2, 2, 0, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("task", "restarts", "labels", "found"),
    [
        ("3sound", None, True, 2),
        ("1speech+2sound", 0, True, 0),
        ("4sound", None, True, None),
        ("1speech+1sound", None, False, 1),
        ("2sound", None, False, None),
        ("1sound", None, True, None),
    ],
)
def test_refinement_is_told_where_it_is_asked(task, restarts, labels, found):
    facts = evaluate.refinement_facts(1.0, restarts, 1, task, labels)
    assert (facts.get("restarts"), facts.get("steps")) == (found, 1 if found else None)
    shares = [1.0] * (found or 0) + [LAST_REFINE if labels and found else 1.0]
    assert facts.get("shares") == (shares if facts else None)
    assert not evaluate.refinement_facts(0.0, restarts, 1, task, labels)


def test_rows_are_the_refiners_too_where_names_differ(manifest, tmp_path):
    asked = []
    cases = [("2sound", True), ("2sound", False), ("2speech", True), ("1speech+1sound", False)]
    facts = {"shares": [0.5, 0.5 * LAST_REFINE], "restarts": 1, "steps": AGAIN}
    for task, labels in cases:
        for digest in (None, "first", "second"):
            fake = Fake(manifest, task)
            fake.refine, fake.restarts, fake.refiner = 0.5, None, None
            if digest:
                fake.refiner = Refiner(["Bark"], width=2, mels=8)
                fake.refiner.origin = {"sha256": digest}
            summary = run(manifest, fake, task=task, out=tmp_path / f"{task}{labels}", count=2, labels=labels)
            asked.append(len(fake.asked))
            told = [summary.get(key) for key in ("refiner", "refinement")]
            expected = facts if labels else facts | {"shares": [0.5, 0.5], "bound": BOUND}
            assert told == ([{"refiner": digest}, expected] if digest and asked[-1] else [None, None])
    assert asked == [2, 2, 2, 2, 0, 0, 2, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("world", [1, 2])
def test_processes_share_the_mixtures(manifest, tmp_path, monkeypatch, world):
    asked = []
    for rank in reversed(range(world)):  # the first process waits for the others' rows
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        fake = Fake(manifest, "1speech+1sound")
        summaries = evaluate.run(tables(manifest, count=5), tmp_path, separators={"fake": fake})
        assert len(summaries) == (rank == 0)  # the first tells what all have done
        asked.append(len(fake.asked))
        if world > 1:
            with pytest.raises(UsageError, match="name one with -o"):
                run(manifest, fake)
    assert sum(asked) == 5
    (summary,) = summaries
    assert summary["count"] == 5
    rows = sorted(json.loads(line)["index"] for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert rows == [0, 1, 2, 3, 4]
    assert summary["si_sdr"]["mean"] == pytest.approx(20, abs=0.2)


class Broken(Fake):
    """Gives the mixtures of some numbers stems that can't be scored."""

    def __init__(self, *args, broken=(0, 1, 2, 3), **kwargs):
        super().__init__(*args, **kwargs)
        self.broken = broken

    def __call__(self, wave, sample_rate, sources=None):
        result = super().__call__(wave, sample_rate, sources)
        if any(torch.equal(self.items[i]["mixture"], wave[0]) for i in self.broken):
            name, stem = next(iter(result.sources.items()))
            result.sources[name] = stem[:, :-1]
        return result


def test_a_mixture_that_fails_is_named_counted_and_tried_again(manifest, tmp_path, caplog):
    summary = run(manifest, Broken(manifest, "1speech+1sound", broken=(2,)), out=tmp_path)
    assert (summary["count"], summary["errors"]) == (3, 1)
    assert "fake, mixture 2 (" in caplog.text
    assert "stems differ in length: [63999, 64000]" in caplog.text
    assert "1 mixtures could not be separated" in (tmp_path / "summary.md").read_text()
    mended = Fake(manifest, "1speech+1sound")
    assert run(manifest, mended, out=tmp_path)["errors"] == 0
    assert len(mended.asked) == 1
    broken = Broken(manifest, "1speech+1sound")
    with pytest.raises(AudiosepError, match=r"^fake, 1speech\+1sound: failed on every mixture: .*64000\] samples$"):
        run(manifest, broken, out=tmp_path / "none")
    assert [file.name for file in (tmp_path / "none").iterdir()] == ["rows.jsonl"]
    with pytest.raises(AudiosepError, match=r"^broken, .*64000\] samples; what others did is in .*other$"):
        evaluate.run(tables(manifest), tmp_path / "other", separators={"broken": broken, "fake": mended})
    assert "| fake |" in (tmp_path / "other/summary.md").read_text()  # what others did isn't lost


def test_processes_agree_on_what_failed(manifest, tmp_path, monkeypatch):
    """With two processes: what failed before is mended, and one that fails at all of its own share is no failure."""

    def two(kind, *ranks, **how):
        for rank in ranks:
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "2")
            separators = {"fake": kind(manifest, "1speech+1sound", **how)}
            found = evaluate.run(tables(manifest), tmp_path, separators=separators)
        return found

    (summary,) = two(Broken, 1, 0, broken=(1, 3))  # all that the second process has
    assert (summary["count"], summary["errors"]) == (2, 2)
    (summary,) = two(Fake, 0)  # need not wait for the other, whatever that does
    assert (summary["count"], summary["errors"]) == (4, 0)


def test_an_oracle_is_given_the_references_and_marked(manifest):
    class Oracle(Fake):
        oracle = True

        def __call__(self, wave, sample_rate, sources=None, references=None):
            stems = {name: reference[None] for name, reference in zip(sources, references)}
            return SimpleNamespace(sources=stems, sample_rate=RATE, report={})

    summary = run(manifest, Oracle(manifest, "1speech+1sound"))
    assert summary["si_sdr"]["mean"] == 100
    other = run(manifest, Fake(manifest, "1speech+1sound"))
    both = [other, {**summary, "difference": {**dict.fromkeys(("si_sdr", "si_sdr_permuted"), summary["si_sdr"])}}]
    both[1]["difference"] |= {"to": "fake", "count": 4}
    assert results.markdown(both).count("| fake (oracle) |") == 2  # among the paired differences, too


def test_an_ideal_mask_is_an_oracle(manifest):
    recipe = tables(manifest, count=2)
    recipe["separators"]["ideal"] = {"type": "oracle"}
    (summary,) = evaluate.run(recipe)
    assert summary["oracle"]
    assert 2 < summary["si_sdri"]["mean"] < 8  # of two noises, which overlap everywhere
    assert summary["si_sdr"]["mean"] == summary["si_sdr_permuted"]["mean"]
    recipe["separators"]["ideal"]["mask"] = "magic"
    with pytest.raises(UsageError, match="mask is one of oracle-ratio-mask"):
        evaluate.run(recipe)


def test_several_separators_on_the_same_mixtures(manifest, tmp_path):
    recipe = tables(manifest)
    recipe["separators"] = {"a": {"type": "unprocessed", "tasks": ["1speech+1sound", "2speech"]}}
    assert [summary["task"] for summary in evaluate.run(recipe)] == ["1speech+1sound"]
    recipe = tables(manifest, published={"paper": {"1speech+1sound": {"si_sdr_permuted": 14.31}}})
    recipe["separators"]["mixture"] = {"type": "unprocessed"}
    recipe["separators"]["few"] = {"type": "unprocessed", "count": 2}
    better = Fake(manifest, "1speech+1sound")
    summaries = evaluate.run(recipe, tmp_path, None, {"fake": better})
    assert [(s["separator"], s["count"]) for s in summaries] == [("mixture", 4), ("few", 2), ("fake", 4)]
    mixture, few, fake = summaries
    assert mixture["si_sdri"]["mean"] == few["difference"]["si_sdr"]["mean"] == 0
    assert few["difference"]["count"] == 2
    assert fake["difference"]["si_sdr"]["mean"] == pytest.approx(fake["si_sdri"]["mean"])
    text = (tmp_path / "summary.md").read_text()
    assert "paper (published) | - | - | - | - | - | - | 14.31" in text
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["separator"] for row in rows] == ["paper (published)", "mixture", "few", "fake"]
    assert float(rows[3]["si_sdr"]) == fake["si_sdr"]["mean"]
    assert json.loads((tmp_path / "summary.json").read_text())["summaries"] == summaries
    page = (tmp_path / "report.html").read_text()
    assert page.count("<audio ") == 3 * 5  # mixture, two references, two estimates of three items
    assert "mixture, 1speech+1sound, worst" in page
    assert "share of mixtures at or below" in page


def stems_in(folder):
    """Of the only mixture there: file names, and waves (K, T)."""
    paths = sorted((folder / "stems").rglob("*.flac"))
    return [path.name for path in paths], torch.stack([torch.from_numpy(soundfile.read(path)[0]) for path in paths])


def test_stems_are_kept_in_the_best_order(manifest, tmp_path):
    fake = Fake(manifest, "3sound", order=[1, 2, 0], classes=("bark", "door", "rain"))
    run(manifest, fake, task="3sound", count=1, out=tmp_path)
    names, estimates = stems_in(tmp_path)
    item = fake.items[0]
    assert names == [f"{k}_{name}.flac" for k, name in enumerate(item["names"])]
    assert evaluate.score(estimates, item["sources"], item["mixture"])["permutation"] == [0, 1, 2]


def test_stems_asked_for_later_are_made_for_what_the_page_plays(manifest, tmp_path):
    fake = Fake(manifest, "2speech")
    run(manifest, fake, task="2speech", count=5, out=tmp_path, stems=False)
    assert not (tmp_path / "stems").exists()
    run(manifest, fake, task="2speech", count=5, out=tmp_path)
    assert len(fake.asked) == 5 + 3
    assert (tmp_path / "report.html").read_text().count("<audio") == 3 * (1 + 2 * 2)


def test_more_sources_than_a_file_has_channels_are_kept(tmp_path):
    stems = 0.1 * torch.randn(9, 1600, generator=torch.Generator().manual_seed(0))
    evaluate._keep(tmp_path / "stems/7", stems, ["speech", "a/b", *"cdefghi"], RATE)
    names, kept = stems_in(tmp_path)
    assert names == ["0_speech.flac", "1_a_b.flac", *(f"{k}_{name}.flac" for k, name in enumerate("cdefghi", 2))]
    assert torch.allclose(kept.float(), stems, atol=2**-15)


def test_processes_append_to_one_file_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from audiosep.evaluate import _append\n"
        "for i in range(300): _append(Path(sys.argv[1]), {'who': sys.argv[2], 'i': i, 'long': 'x' * 3000})"
    )
    path = tmp_path / "rows.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", code, path, who]) for who in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert sorted((row["who"], row["i"]) for row in rows) == [(who, i) for who in "abc" for i in range(300)]


def test_what_a_recipe_gets_wrong(manifest):
    def refused(match, **changes):
        recipe = tables(manifest)
        recipe["separators"] = changes.pop("separators", {"a": {"type": "unprocessed"}})
        recipe["evaluate"].update(changes)
        with pytest.raises(AudiosepError, match=match):
            evaluate.run(recipe)

    refused("no separator", separators={})
    refused("nowhere", separators={"a": {"models": "./nowhere"}})
    refused("no separator", separators={"a": {"models": "./nowhere", "optional": True}})
    refused("type is one of .*, got 'magic'", separators={"a": {"type": "magic"}})
    refused("separators.a.stepz: no such setting .*steps", separators={"a": {"stepz": 3}})
    refused("share a sample rate", separators={k: {"type": "unprocessed", "sample_rate": int(k)} for k in ("1", "2")})
    refused("tasks is a list", tasks="2speech")
    refused("a task is like", tasks=["2cats"])
    refused("metrics beside SI-SDR are sdr, pesq, estoi; got stoi", metrics=["stoi"])
    refused("count is at least 1", count=0)
    refused("needs 3 speakers", tasks=["3speech"])
    refused("a.tasks is a list such as", separators={"a": {"type": "unprocessed", "tasks": "1speech+1sound"}})
    refused("for these tasks", separators={"a": {"type": "unprocessed", "tasks": ["2speech"]}})
    refused("a task is like .* got 3", tasks=[3])
    refused("a.count is a whole number", separators={"a": {"type": "unprocessed", "count": "two"}})
    refused(r"\[separators.a\] is a table", separators={"a": 3})
    refused("2dogs", separators={"a": {"type": "unprocessed", "tasks": ["1speech+1sound", "2dogs"]}})
    refused("page names separators that the recipe hasn't: b", page=["b"])
    recipe = tables(manifest)
    recipe["separators"] = {"a": {"type": "unprocessed", "tasks": ["1speech+1sound", "2speech"]}}
    assert [summary["task"] for summary in evaluate.run(recipe)] == ["1speech+1sound"]
    for published, match in (
        ({"paper": {"1speech+1sound": {"sisdr": 3.0}}}, r"paper\.1speech\+1sound: no column sisdr"),
        ({"paper": 3}, r"\[published.paper\] is a table, got 3"),
        ({"paper": {"2speech": 3}}, r"paper.2speech is a table of columns, got 3"),
    ):
        with pytest.raises(UsageError, match=match):
            evaluate.run(tables(manifest, published=published))


def test_a_separator_of_other_tasks_is_left_out(manifest, caplog):
    recipe = tables(manifest)
    recipe["separators"] = {
        "a": {"type": "unprocessed"},
        "b": {"models": "./nowhere", "tasks": ["2speech"]},  # nor is it loaded
    }
    assert [summary["separator"] for summary in evaluate.run(recipe)] == ["a"]
    assert "left out, being for other tasks: b" in caplog.text


def test_pesq_and_estoi_are_of_speech(manifest, monkeypatch):
    asked = []

    def pesq(estimate, reference, rate):
        asked.append(rate)
        if len(asked) == 1:
            raise UsageError("no utterance")
        return torch.tensor(2.5)

    monkeypatch.setitem(evaluate.metrics.METRICS, "pesq", pesq)
    summary = run(manifest, Fake(manifest, "1speech+1sound"), count=3, metrics=["pesq"])
    assert len(asked) == 3  # once a mixture: not of the sound
    assert summary["pesq"]["mean"] == 2.5
    assert summary["unscored"]["pesq"] == 1
    assert "1 mixtures have no PESQ-WB" in results.markdown([summary])
    assert run(manifest, Fake(manifest, "2sound"), task="2sound", metrics=["pesq"])["pesq"] is None


def test_the_best_order_of_three(manifest):
    """A cycle is not its own inverse: estimates, metrics and stems must follow the same one."""
    fake = Fake(manifest, "3sound", order=[1, 2, 0], classes=("bark", "door", "rain"))
    summary = run(manifest, fake, task="3sound", count=1, metrics=["sdr"])
    assert summary["si_sdr_permuted"]["mean"] == pytest.approx(20, abs=0.2)
    assert summary["sdr"]["mean"] == pytest.approx(20, abs=0.2)
    assert summary["si_sdr"]["mean"] < 0


def test_the_real_separator(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("audiosep.separator.CLASSIFIER", "none-such")
    torch.manual_seed(0)
    small = {"width": 8, "depth": (1, 1, 1, 1, 1), "heads": 2, "condition_dim": 8, "squeeze": 2, "patch": (4, 4)}
    make = {"speech": (), "sound": ("Bark", "Door")}
    for name, classes in make.items():
        backbone = TriplePathUNet(num_classes=len(classes), **small)
        hub.save_prior(Prior(backbone, vp_linear(), classes=classes, kind=name), tmp_path / name, {})
    recipe = tables(manifest, "1speech+2sound", count=1)
    models = [str(tmp_path / name) for name in make]
    recipe["separators"] = {
        "default": {"models": models, "steps": 2, "samples": 1, "restarts": 1},
        "late": {
            "models": models,
            "preset": "published",
            "steps": 3,
            "sampling": {"t_init": 99, "loss": {"stft": 0.0}},
        },
    }
    default, late = evaluate.run(recipe)
    assert default["count"] == 1
    # Each of the two sounds is tried under both classes, at every level of `LABEL_NOISE`; the restart is of one step.
    assert (default["evaluations"], late["evaluations"]) == (6 + 4 * len(LABEL_NOISE) + 3, 9)
    assert default["weights"]["speech"]
    assert np.isfinite(default["si_sdr"]["mean"])
    again = evaluate.run(recipe, tmp_path / "seeds")
    assert again[0]["si_sdr"] == default["si_sdr"]  # the noise follows from the seed
    recipe["separators"]["default"]["seed"] = 1
    assert evaluate.run(recipe, tmp_path / "seeds")[0]["si_sdr"] != default["si_sdr"]  # and from the separator's own
    del recipe["separators"]["default"]["seed"]
    recipe["evaluate"]["seed"] = 1
    assert evaluate.run(recipe)[0]["si_sdr"] != default["si_sdr"]
    recipe["separators"]["late"]["sampling"] = {"flor": 0.1}
    with pytest.raises(UsageError, match="flor"):
        evaluate.run(recipe)


def test_tables(manifest):
    summary = run(manifest, Fake(manifest, "1speech+1sound"))
    assert "| 1speech+1sound | fake | 4 |" in results.markdown([summary, summary])
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results.table([summary]))
    assert "1speech+1sound" in console.export_text()
