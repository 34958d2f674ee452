"""The tagger: what it is trained on, what it chooses, and a recording of known tones heard through `auto`."""

import csv

import numpy as np
import pytest
import soundfile
import torch

from audiosep import fit, hub
from audiosep.backbones.triple_path_unet import TriplePathUNet
from audiosep.data import MixtureDataset, read_manifest
from audiosep.errors import UsageError
from audiosep.prior import Prior
from audiosep.schedules import ve
from audiosep.separator import Separator
from audiosep.tagger import Ensemble, TaggedMixtures, Tagger, leaked, masked

RATE = 16000
TONES = {"Low": 300.0, "High": 3000.0}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Two voices (noise in syllables) and two classes of tones, the same clips for training and validation."""
    root = tmp_path_factory.mktemp("corpus")
    rng, time = np.random.default_rng(0), np.arange(RATE) / RATE
    rows = [["path", "split", "kind", "speaker_or_class", "duration_s", "group"]]
    for split in ("train", "valid"):
        for label, tone in TONES.items():
            name = f"{split}-{label}.wav"
            soundfile.write(root / name, 0.1 * np.sin(2 * np.pi * tone * time), RATE)
            rows.append([name, split, "sound", label, 1.0, name])
        for voice in ("ann", "bob"):
            name = f"{split}-{voice}.wav"
            soundfile.write(root / name, rng.normal(0, 0.1, RATE) * (np.sin(2 * np.pi * 4 * time) > 0), RATE)
            rows.append([name, split, "speech", voice, 1.0, name])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root / "manifest.csv"


def test_tags_of_mixtures(manifest):
    tagger = Tagger(["High", "Low"])
    items = read_manifest(manifest, split="train")
    tasks = ("2speech", "1speech+1sound", "1sound")
    datasets = [MixtureDataset(items, task, 4, 0, 1.0, classes=tagger.classes) for task in tasks]
    mixtures = TaggedMixtures(datasets, tagger.labels)
    counts = ("speech", "second speech", "sound", "second sound", "third sound")
    assert tagger.labels == (*counts, "High", "Low")
    assert len(mixtures) == 12
    for index in range(12):
        known = datasets[index % 3][index // 3]
        item = mixtures[index]
        assert torch.equal(item["mixture"], known["mixture"])
        heard = [label for label, tag in zip(tagger.labels, item["tags"]) if tag]
        expected = {"2speech": ["speech", "second speech"], "1sound": ["sound", *known["names"]]}
        assert heard == expected.get(tasks[index % 3], ["speech", "sound", *known["names"][1:]])
    with pytest.raises(IndexError):
        mixtures[12]


def test_faint_sources_count_for_nothing(manifest):
    tagger = Tagger(["High", "Low"])
    dataset = MixtureDataset(read_manifest(manifest, split="train"), "2sound", 30, 0, 1.0, classes=tagger.classes)
    mixtures = TaggedMixtures([dataset], tagger.labels, alone=0.5)
    kept = []
    for index in range(30):
        item, known = mixtures[index], dataset[index]
        heard = [label for label, tag in zip(tagger.labels, item["tags"]) if tag]
        if torch.equal(item["mixture"], known["mixture"]):
            assert set(heard) == {"sound", "second sound", *known["names"]}
            continue
        (name,) = set(heard) - {"sound"}
        loud = known["sources"][known["names"].index(name)]
        left = (item["mixture"] - loud).square().mean() / (known["mixture"] - loud).square().mean()
        assert -25.01 <= 10 * left.log10() <= -4.99
        kept.append(known["names"].index(name))
    assert 8 < len(kept) < 22
    assert set(kept) == {0, 1}
    with pytest.raises(UsageError, match=r"alone is a share, 0\.\.1, got 2"):
        TaggedMixtures([dataset], tagger.labels, alone=2)


def test_what_faulty_masks_leave_counts_for_its_loudest(manifest):
    labels = Tagger(["Low", "High"]).labels
    items = read_manifest(manifest, split="train")
    dataset = MixtureDataset(items, "2sound", count=20, seed=1, segment=1.0)
    mixtures = TaggedMixtures([dataset], labels, alone=1.0, masked=0.5)
    faint = 0
    for i, plain in enumerate(dataset):
        stem, sources = mixtures[i]["mixture"], plain["sources"]
        assert torch.equal(stem, mixtures[i]["mixture"])
        (kept,) = (k for k, name in enumerate(plain["names"]) if mixtures[i]["tags"][labels.index(name)])
        assert mixtures[i]["tags"].tolist() == mixtures.tags([plain["names"][kept]]).tolist()
        shares = (sources @ sources.T).inverse() @ (sources @ stem)
        assert shares[kept] > shares[1 - kept]
        faint += (stem - shares @ sources).square().mean().sqrt() < 1e-6
    assert 4 <= faint <= 16  # half of them are as without masks
    with pytest.raises(UsageError, match=r"masked is a share, 0\.\.1, got -1"):
        TaggedMixtures([dataset], labels, masked=-1)


def test_masks_are_faulty_in_parts():
    sources = 0.1 * torch.randn(2, RATE, generator=torch.Generator().manual_seed(0))
    stems = torch.stack([masked(sources, 1, RATE, np.random.default_rng(seed)) for seed in range(40)])
    assert torch.equal(masked(sources, 1, RATE, np.random.default_rng(3)), stems[3])
    other, own = (stems @ sources.T / sources.square().sum(1)).T
    assert (own > other).all()
    assert (own < 0.6).any()  # much of its own is lost
    assert (own > 0.75).any()
    # What is left changes with time.
    halves = stems.unflatten(-1, (2, -1)) * sources[1].unflatten(-1, (2, -1))
    first, second = halves.sum(-1).T / sources[1].square().sum() * 2
    assert ((first - second).abs() > 0.2).any()


def test_how_well_stems_fit_classes():
    torch.manual_seed(0)
    tagger = Tagger(["Bell", "Dog"]).eval()
    stems = torch.randn(2, 3, RATE)
    odds = tagger(stems.flatten(0, 1)).logit().view(2, 3, -1)
    speech, sound, bell, dog = (odds[..., tagger.labels.index(label)] for label in ("speech", "sound", "Bell", "Dog"))
    fits = tagger.fits(stems, ["dog", "sound", "Speech", "BELL"])
    assert torch.allclose(fits, torch.stack((sound + dog, sound, speech, sound + bell), -1), atol=1e-5)
    short = tagger.fits(stems, ["dog"], sure=0.01)
    ended = sum(x.clamp(-0.01, 0.01) for x in (sound, dog))[..., None]
    torch.testing.assert_close(short, ended, atol=1e-6, rtol=0)  # through the probability, so not to the last bit
    assert not torch.allclose(short, fits[..., :1], atol=1e-3)
    assert tagger.knows(["bell", "Speech"])
    assert not tagger.knows(["bell", "second sound"])


def test_together_the_tagger_tells_voices_from_sounds_and_both_which_sound():
    tagger, classifier = Tagger(["Bell", "Dog"]).eval(), Tagger(["Dog", "Bell", "Rain"]).eval()
    both, stems = Ensemble(tagger, classifier), torch.randn(2, 3, RATE)
    names = ["dog", "Speech", "BELL"]
    dog, _, bell = classifier.fits(stems, names).unbind(-1)
    expected = tagger.fits(stems, names) + torch.stack((dog - bell, 0 * dog, bell - dog), -1) / 2
    torch.testing.assert_close(both.fits(stems, names), expected, atol=1e-5, rtol=0)
    assert both.asked(names) == {"tagger": tagger, "classifier": classifier}
    for alone in (["Speech", "Bell"], ["speech", "dog", "Dog"]):  # one class of sound: nothing to tell
        assert torch.equal(both.fits(stems, alone), tagger.fits(stems, alone))
        assert both.asked(alone) == {"tagger": tagger}
    assert both.knows(["Dog", "speech"])
    assert not both.knows(["rain"])
    assert both.members == {"tagger": tagger, "classifier": classifier}
    with pytest.raises(UsageError, match="share a sample rate, got 16000 and 8000"):
        Ensemble(tagger, Tagger(["Dog"], sample_rate=8000))


def test_choice():
    tagger = Tagger(["Bell", "Dog", "Rain"], threshold=0.4)
    everything = ["speech", "sound", "bell", "dog", "rain"]

    def choose(counts, classes, allowed=everything):
        return tagger.choose([*counts, *classes], allowed)

    assert choose([0.9, 0.2, 0.8, 0.3, 0.1], [0.1, 0.8, 0.6]) == ["speech", "Dog"]
    assert choose([0.9, 0.2, 0.8, 0.7, 0.1], [0.1, 0.8, 0.3]) == ["speech", "Dog", "sound"]
    assert choose([0.9, 0.7, 0.2, 0.1, 0.1], [0.1, 0.8, 0.3]) == ["speech", "speech"]
    assert choose([0.1, 0.9, 0.9, 0.3, 0.1], [0.1, 0.8, 0.3]) == ["Dog", "sound"]  # no second voice without a first
    assert choose([0.9, 0.0, 0.2, 0.1, 0.1], [0.1, 0.2, 0.3]) == ["speech", "sound"]  # two at least
    assert choose([0.9, 0.9, 0.9, 0.9, 0.9], [0.5, 0.8, 0.1]) == ["speech", "speech", "Dog", "Bell", "sound"]
    assert choose([0.9, 0.9, 0.9, 0.9, 0.1], [0.5, 0.8, 0.1], ["sound", "dog"]) == ["Dog", "sound"]
    assert choose([0.9, 0.9, 0.9, 0.9, 0.1], [0.1, 0.2, 0.1], ["bell", "dog"]) == ["Dog", "Bell"]
    with pytest.raises(UsageError, match="name the sources"):
        choose([0.9] * 5, [0.9] * 3, ["cat"])


def test_a_floor_hides_what_is_faint():
    torch.manual_seed(0)
    loud, faint = torch.randn(2, RATE), 0.003 * torch.randn(1, RATE)
    alone, other = (torch.cat((torch.zeros(1, RATE), wave[None]), 1) for wave in loud)
    moved = {}
    for floor in (1e-6, 0.5):
        torch.manual_seed(1)
        tagger = Tagger(["Bell"], floor=floor).eval()
        more = alone + torch.cat((faint, torch.zeros(1, RATE)), 1)
        scores = torch.cat([tagger(wave) for wave in (alone, more, other)])
        moved[floor] = (scores[1:] - scores[0]).abs().amax(-1)
    assert moved[0.5][0] < 0.01 * moved[1e-6][0]
    assert moved[0.5][1] > 0.1 * moved[1e-6][1]


def test_the_loss_tells_one_class_from_the_others():
    plain, told = Tagger(["Bell", "Dog"]).eval(), Tagger(["Bell", "Dog"], among=0.5).eval()
    told.load_state_dict(plain.state_dict())
    tags = torch.tensor([[0.0, 0, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]])
    batch = {"mixture": torch.randn(3, RATE), "tags": tags}
    bell, dog = plain(batch["mixture"])[0, -2:].detach().logit()
    # Only the first has exactly one class.
    more = torch.stack((0.5 * torch.nn.functional.softplus(bell - dog), torch.tensor(0.0), torch.tensor(0.0)))
    torch.testing.assert_close(told.loss(batch) - plain.loss(batch), more, atol=1e-5, rtol=1e-4)


def test_log_odds_are_exact_where_the_score_rounds_to_one():
    torch.manual_seed(0)
    tagger, wave = Tagger(["Bell"]).eval(), torch.randn(2, RATE)
    plain = tagger(wave).logit()
    torch.testing.assert_close(tagger.log_odds(wave), plain, atol=1e-5, rtol=0)
    # Scores that are all alike, e^25 times as likely as not.
    with torch.no_grad():
        tagger.scores.weight.zero_()
        tagger.scores.bias.fill_(25.0)
    assert (tagger(wave) == 1).all()
    torch.testing.assert_close(tagger.log_odds(wave), torch.full((2, len(tagger.labels)), 25.0), atol=1e-4, rtol=0)
    # Those of two halves of a recording, 20 and 30: 1 - p is the mean of e^-20 and e^-30.
    tagger.attention.weight.data.zero_()
    tagger.attention.bias.data.zero_()
    tagger.scores.forward = lambda frames: 20 + 10 * (torch.arange(frames.shape[-1]) % 2).expand(2, 6, -1)
    frames = tagger.stack(torch.zeros(1, 1, 64, 50)).shape[-1]
    odd = frames // 2 / frames
    expected = -np.log((1 - odd) * np.exp(-20) + odd * np.exp(-30))
    torch.testing.assert_close(
        tagger.log_odds(wave), torch.full((2, 6), expected, dtype=torch.float32), atol=1e-3, rtol=0
    )


def test_a_stem_holds_what_leaked():
    sources = torch.eye(3)[:, :2]
    item = {"sources": sources, "mixture": sources.sum(0)}
    assert torch.allclose(leaked(item, 20.0), torch.tensor([[1, 0.1], [0.1, 1], [0.1, 0.1]]))


def test_a_tagger_without_classes_and_settings_that_can_not_be():
    batch = {"mixture": torch.randn(1, RATE), "tags": torch.tensor([[0.0, 0, 1, 0, 0]])}
    plain, told = Tagger([]).eval(), Tagger([], among=0.5).eval()
    told.load_state_dict(plain.state_dict())
    assert torch.equal(told.loss(batch), plain.loss(batch))
    for settings in ({"floor": 0.0}, {"among": -1.0}):
        with pytest.raises(UsageError, match="floor is above 0 and among at least 0"):
            Tagger(["Bell"], **settings)
    for name in ("width", "mels", "sample_rate"):
        with pytest.raises(UsageError, match=f"^{name} is at least 1, got 0$"):
            Tagger(["Bell"], **{name: 0})


def test_loudness_does_not_matter():
    torch.manual_seed(0)
    tagger = Tagger(["Bell"]).eval()
    wave = torch.randn(2, RATE)
    assert torch.allclose(tagger(wave), tagger(0.01 * wave), atol=1e-5)
    assert tagger(0 * wave).isfinite().all()


@pytest.fixture(scope="module")
def trained(manifest, tmp_path_factory):
    """A sound prior (untrained), and the tagger of a recipe, trained for a few seconds."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = {"width": 8, "depth": (1, 1, 1, 1, 1), "heads": 2, "condition_dim": 8, "squeeze": 2, "patch": (4, 4)}
    for kind, classes in (("speech", ()), ("sound", ("High", "Low"))):
        prior = Prior(TriplePathUNet(num_classes=len(classes), **small), ve(), classes=classes, kind=kind)
        hub.save_prior(prior, root / kind, {})
    tables = {
        "tagger": {
            "of": str(root / "sound"),
            "width": 8,
            "tasks": ["1speech", "1speech+1sound", "2sound", "1sound", "2sound"],
            "alone": 0.3,
            "among": 0.1,
        },
        "data": {"manifest": str(manifest), "segment": 1.0},
        "train": {"max_steps": 60, "batch_size": 8, "learning_rate": 1e-2, "warmup": 5, "ema": 0.9, "probe_every": 60},
        "probe": {"mixtures": 10},
    }
    fit.fit(tables, root / "tagger", device="cpu")
    return root


def test_a_recipe_becomes_a_tagger_that_is_right(trained):
    config = hub.read_config(trained / "tagger")
    assert [row["task"] for row in config["metrics"]] == ["1speech+1sound", "2sound"]
    assert all(row["numbers of voices and sounds right"] >= 0.8 for row in config["metrics"])
    assert config["metrics"][1]["all stems told apart"] == 1.0
    assert all(row["sounds called by a class"] >= 0.8 and row["rightly"] >= 0.8 for row in config["metrics"])
    tagger = hub.load_model(trained / "tagger")
    assert 0 < tagger.threshold < 1
    assert tagger.labels[-2:] == ("High", "Low")


def test_a_tagger_may_start_from_another(trained, manifest, tmp_path):
    tables = {
        "tagger": {"of": str(trained / "sound"), "width": 8, "start": str(trained / "tagger"), "tasks": ["2sound"]},
        "data": {"manifest": str(manifest), "segment": 1.0},
        "train": {"max_steps": 1, "batch_size": 2, "learning_rate": 0.0, "ema": 0.0, "probe_every": 0},
    }
    fit.fit(tables, tmp_path / "tagger", device="cpu")
    facts = hub.read_config(tmp_path / "tagger")["training"]
    assert facts["started from"].startswith("tagger (")
    assert facts["steps before"] == 60
    before, after = (hub.load_model(root / "tagger").scores.weight for root in (trained, tmp_path))
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    tables["tagger"]["width"] = 16
    with pytest.raises(UsageError, match="the recipe's classes and settings"):
        fit.fit(tables, tmp_path / "other", device="cpu")
    tables["tagger"] |= {"width": 8, "floor": 0.1}
    with pytest.raises(UsageError, match="the recipe's classes and settings"):
        fit.fit(tables, tmp_path / "other", device="cpu")
    wrong = {"of": 5, "start": 5, "tasks": "2sound", "alone": "many"}
    said = ("text, got 5", "text or left out, got 5", "a list of texts, got '2sound'", "a number, got 'many'")
    for (name, value), words in zip(wrong.items(), said):
        with pytest.raises(UsageError, match=rf"^tagger\.{name} is {words}$"):
            fit.fit(tables | {"tagger": tables["tagger"] | {name: value}}, tmp_path / "other", device="cpu")


def test_auto_finds_what_is_there(trained, monkeypatch, tmp_path):
    monkeypatch.setattr("audiosep.separator.TAGGER", str(trained / "tagger"))
    models = [str(trained / kind) for kind in ("speech", "sound")]
    separator = Separator.from_pretrained(models, "cpu", steps=1, samples=1, segment=1.0)
    time = np.arange(3 * 44100) / 44100
    wave = 0.1 * sum(np.sin(2 * np.pi * tone * time) for tone in TONES.values())
    result = separator(np.stack([wave, wave]), 44100, "auto")
    assert set(result.sources) == {"high", "low"}
    heard = result.report["auto"]
    assert set(heard["chosen"]) == {"High", "Low"}
    assert heard["scores"]["Low"] > heard["threshold"] > heard["scores"]["speech"]
    soundfile.write(tmp_path / "tones.wav", wave, 44100)
    report = separator.separate_file(tmp_path / "tones.wav", tmp_path / "out", ["auto"])
    assert set(report["auto"]["chosen"]) == set(heard["chosen"])
    assert report["auto"]["scores"]["Low"] == pytest.approx(heard["scores"]["Low"], abs=1e-2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["high.wav", "low.wav"]
    assert separator.source_names(["auto"]) == []
    voices = Separator.from_pretrained(models[:1], "cpu", steps=1, samples=1)
    assert voices.listen([wave[None]], 44100)[0] == ["speech", "speech"]
