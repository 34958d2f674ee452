"""The separator around a tiny random prior: what must hold whatever the network says."""

import contextlib

import numpy as np
import pytest
import soundfile as sf
import torch

from audiosep import audio
from audiosep.errors import AudioError, AudiosepError, ModelError, UsageError
from audiosep.lowrank import LAST, LowRank
from audiosep.mixing import combine, project
from audiosep.prior import Prior
from audiosep.refiner import Refiner
from audiosep.samplers import SAMPLERS, Noise
from audiosep.schedules import ve
from audiosep.separator import (
    AGAIN,
    GUIDANCE,
    LABEL_NOISE,
    LAST_REFINE,
    LEAST_NOISE,
    LOW_RANK,
    RANKS,
    REFINE,
    REST_RANK,
    Job,
    Separator,
    audible,
    choose_device,
)
from audiosep.tagger import Tagger


@pytest.fixture
def make(tiny_prior):
    def separator(**options):
        priors = {
            "speech": tiny_prior(kind="speech", seed=1),
            "sound": tiny_prior(num_classes=3, classes=["Bark", "Bell", "Rain"], seed=2),
        }
        return Separator(priors, **{"steps": 2, "segment": 1.0, "samples": 1, **options})

    return separator


class Bands(torch.nn.Module):
    """The exact denoiser of noise below 1 kHz (class 0), above 3 kHz (class 1), or either (the null class)."""

    num_classes = 2

    def forward(self, x, noise, label=None):
        label = torch.full((len(x),), 2) if label is None else label
        f = torch.fft.rfftfreq(x.shape[-1], 1 / 16000)
        spectra = torch.stack(((f < 1000) * 8.0, (f > 3000) * 1.6, (f < 1000) * 4.0 + (f > 3000) * 0.8))
        gain = spectra[label] / (spectra[label] + noise[:, None] ** 2)
        return torch.fft.irfft(gain * torch.fft.rfft(x), n=x.shape[-1])


def banded(**options):
    prior = Prior(Bands(), ve(), classes=["Low", "High"], parameterization="direct")
    return Separator({"sound": prior}, device="cpu", dtype="float32", **options)


def test_estimates_go_to_the_class_that_they_fit(monkeypatch):
    monkeypatch.setattr("audiosep.separator.CLASSIFIER", "none-such")
    noise = torch.fft.rfft(torch.randn(2, 3, 16000, generator=torch.Generator().manual_seed(0)))
    f = torch.fft.rfftfreq(16000, 1 / 16000)
    low, high = (torch.fft.irfft(noise[0] * (f < 1000) * 0.2), torch.fft.irfft(noise[1] * (f > 3000) * 0.1))
    separator = banded()
    job = Job(separator, separator.resolve(["Low", "High"]), 16000, 16000, None, True)
    right = torch.stack((low, high), 1)  # (3, 2, N)
    mixed_up = torch.stack((right[0], right[1].flip(0), right[2].flip(0)))
    assert torch.equal(job._by_class(right[None])[0], right)
    assert torch.equal(job._by_class(mixed_up[None])[0], right)
    assert job.evaluations == 2 * 3 * 4 * len(LABEL_NOISE)
    # All samples of a mixture get one order.
    several = torch.stack((mixed_up, right, mixed_up.flip(1)))
    assert all(torch.equal(told, right) for told in job._by_class(several))
    # The published loop leaves the sources as they come, and two sources of one class can't be told apart.
    published = banded(preset="published")
    job = Job(published, published.resolve(["Low", "High"]), 16000, 16000, None, True)
    assert torch.equal(job._by_class(mixed_up[None])[0], mixed_up)
    job = Job(separator, separator.resolve(["Low", "Low"]), 16000, 16000, None, True)
    assert torch.equal(job._by_class(mixed_up[None])[0], mixed_up)


class Ears(Tagger):
    """Hears tones of 400 Hz as "Low" and of 3500 Hz as "High", the surer the louder they are beside one of 2 kHz."""

    def log_odds(self, mixture):
        power = torch.fft.rfft(mixture).abs().square()
        low, unsure, high = (power[:, int(f * mixture.shape[1] / 16000)] for f in (400, 2000, 3500))
        odds = torch.stack([(low - high) / (low + high + unsure)] * 7, 1)
        return torch.tensor([4.0, 0, 0, 0, 0, 4.0, -4.0]) * odds


def tone(frequency, level=0.1):
    return level * torch.sin(2 * np.pi * frequency * torch.arange(16000) / 16000)


@pytest.fixture
def ears(monkeypatch):
    pair = {name: Ears(["LOW", "High"]) for name in ("tagger", "classifier")}
    for name, listener in pair.items():
        listener.origin = {"folder": name, "sha256": name.upper()}

    def load(name, _):
        if name not in pair:
            raise ModelError(f"no {name}")
        return pair[name]

    monkeypatch.setattr("audiosep.hub.load_model", load)


def told(samples, names=("High", "Low"), channels=1):
    """Samples (R, S * C, K, N) in the order in which a classifier tells them apart; no network is asked."""
    separator = banded()
    job = Job(separator, separator.resolve(list(names)), 16000, 16000, None, True)
    found = torch.stack(job._by_class(list(samples), channels))
    assert job.evaluations == 0
    return found


def test_a_classifier_that_knows_the_classes_tells_them_apart(ears):
    low, high = tone(400), tone(3500)
    right, wrong = torch.stack((high, low)), torch.stack((low, high))
    assert torch.equal(told(wrong[None, None]), right[None, None])
    assert torch.equal(told(torch.stack((wrong, right))[None]), torch.stack((right, right))[None])
    # Of three, two of one class: they stay as they come.
    three = torch.stack((low, 0.5 * low, high))
    assert torch.equal(told(three[None, None], ("Low", "High", "Low")), three[[0, 2, 1]][None, None])
    # Any sound is a sound, the other class says it all.
    assert torch.equal(told(wrong[None, None], ("sound", "Low")), right[None, None])


def job_of(priors, names, **options):
    """Of several priors: key -> (kind, classes)."""
    made = {
        key: Prior(Bands(), ve(), classes=classes, kind=kind, parameterization="direct")
        for key, (kind, classes) in priors.items()
    }
    separator = Separator(made, device="cpu", dtype="float32", **options)
    return Job(separator, separator.resolve(names), 16000, 16000, None, True)


VOICE_AND_SOUND = {"speech": ("speech", ()), "sound": ("sound", ("Low", "High"))}


def test_a_voice_is_told_from_a_sound_of_another_prior(ears):
    """Ears take the tone of 400 Hz for speech, too."""
    voice, other = tone(400), tone(3500)
    right, wrong = torch.stack((voice, other)), torch.stack((other, voice))

    def told(names, priors=VOICE_AND_SOUND, **options):
        return job_of(priors, names, **options)._by_class([wrong[None]])[0][0]

    assert torch.equal(told(["speech", "High"]), right)
    assert torch.equal(told(["speech", "sound"]), right)
    assert torch.equal(told(["speech", "speech"]), wrong)
    assert torch.equal(told(["speech", "High"], preset="published"), wrong)
    # A prior of sounds that has no classes may be of a sound that the classifier takes for a voice.
    own = VOICE_AND_SOUND | {"engine": ("sound", ())}
    assert torch.equal(told(["speech", "engine"], own), wrong)


def test_what_the_classifier_can_not_tell_stays_with_its_prior(ears):
    priors = {"male": ("speech", ()), "sound": ("sound", ("Low", "High")), "female": ("speech", ())}
    low, lower, high = tone(400), tone(400, 0.05), tone(3500)
    job = job_of(priors, ["male", "High", "female"])
    right = torch.stack((low, high, lower))
    for found in job._by_class([right[None] + 1e-3 * torch.randn(1, 3, 16000), right[None]]):
        assert found[0, 0].square().mean() > 2 * found[0, 2].square().mean()
    job = job_of(priors, ["male", "female", "High"])
    mixed_up = torch.stack((high, lower, low))
    assert torch.equal(job._by_class([mixed_up[None]])[0][0], torch.stack((low, lower, high)))


def test_what_is_faint_has_less_say_and_what_is_next_to_silent_none():
    stems = torch.stack([tone(400, 10 ** (-level / 20)) for level in (0, 10, 25, 35, 60)])[None]
    torch.testing.assert_close(audible(stems)[0], torch.tensor([1.0, 1.0, 0.75, 0.25, 0.0]), atol=1e-3, rtol=0)
    assert audible(0 * stems).isfinite().all()


def test_what_is_next_to_silent_has_no_say(ears):
    """A sound pauses: what is left in its stem is like a voice, and what is in the voice's like nothing."""
    job = job_of(VOICE_AND_SOUND, ["speech", "High"])
    for level, quiet in ((0.05, False), (1e-4, True)):
        stems = torch.stack((tone(2000), tone(400, level)))[None]
        assert torch.equal(job._by_class([stems])[0], stems if quiet else stems.flip(1))


def test_samples_and_channels_tell_each_other(ears):
    sure = torch.stack((tone(400) + tone(1000), tone(3500) + tone(5000)))  # 1 and 5 kHz say nothing of the class
    unsure = tone(2000, 0.03)
    misheard = torch.stack((tone(1000) + tone(3500, 0.006), tone(5000) + tone(400, 0.006))) + unsure
    assert torch.equal(told(misheard[None, None])[0, 0], misheard)
    # Beside a sure sample that sounds alike, it is turned as well, whichever comes first; and so is another channel.
    for samples in ((sure, misheard), (misheard, sure)):
        turned = torch.stack([x.flip(0) for x in samples])
        assert torch.equal(told(torch.stack(samples)[:, None]), turned[:, None])
        assert torch.equal(told(torch.stack(samples)[None], channels=2), turned[None])
    # Of two segments each is told by itself.
    both = torch.stack((sure, misheard))
    assert torch.equal(told(both[None])[0], torch.stack((sure.flip(0), misheard)))


def test_a_sample_follows_the_first_to_another_prior(ears):
    """Its estimates fit better elsewhere, by less than what keeps them with their priors."""
    job = job_of(VOICE_AND_SOUND, ["speech", "High"])
    sure = torch.stack((tone(3500), tone(400)))
    doubtful = torch.stack((tone(3500, 0.02) + tone(2000), tone(400, 0.02) + tone(2000)))
    alone = job._by_class([doubtful[None]])[0][0]
    assert torch.equal(alone, doubtful)
    assert torch.equal(job._by_class([sure[None], doubtful[None]])[1][0], doubtful.flip(0))
    # Where the first has only exchanged two sounds of one prior, it is kept as before.
    job = job_of(VOICE_AND_SOUND, ["speech", "Low", "High"])
    first = torch.stack((tone(400), tone(3500), tone(1000) + tone(400, 0.01)))
    second = torch.stack((tone(3500, 0.02) + tone(2000), tone(400, 0.02) + tone(2000), tone(3500)))
    told = job._by_class([first[None], second[None]])
    assert torch.equal(told[0][0], first[[0, 2, 1]])
    assert torch.equal(told[1][0], second)


def test_who_told_the_classes_is_reported(ears):
    separator = banded(steps=2)
    wave = (tone(400) + tone(3500))[None]
    report = separator(wave, 16000, ["High", "Low"]).report
    hashes = {name: facts["sha256"] for name, facts in report["classifiers"].items()}
    assert hashes == {"tagger": "TAGGER", "classifier": "CLASSIFIER"}
    assert report["network_evaluations"] == 2 * 2 * 2
    assert "classifiers" not in separator(wave, 16000, ["Low", "Low"]).report
    voiced = job_of(VOICE_AND_SOUND, ["speech", "High"]).report()
    assert set(voiced["classifiers"]) == {"tagger"}  # of one sound the classifier has nothing to tell
    assert banded(preset="published").classifier is None


def test_a_separator_guides_where_the_classifier_knows_the_classes(ears):
    wave = (tone(400) + tone(3500)).numpy()[None]
    guided, plain = banded(steps=4), banded(steps=4, guidance=0)
    assert (guided.guidance, plain.guidance) == (GUIDANCE, 0)
    a, b = (separator(wave, 16000, ["Low", "High"]) for separator in (guided, plain))
    assert not np.array_equal(a.sources["low"], b.sources["low"])
    assert [x.report["sampler"]["guidance"] for x in (a, b)] == [GUIDANCE, 0]
    assert guided(wave, 16000, ["Low", "Low"]).report["sampler"]["guidance"] == 0
    with torch.inference_mode():
        again = banded(steps=4)(torch.from_numpy(wave), 16000, ["Low", "High"])
    np.testing.assert_allclose(again.sources["low"], a.sources["low"], atol=1e-6)
    # Of three sources the two that the classifier knows are guided, in a sum of their own.
    known = {"sound": ("sound", ("Low", "High")), "engine": ("sound", ())}
    steer = job_of(known, ["engine", "Low", "High"], low_rank=0).sampler.steer
    half = 0.5 * (tone(400) + tone(3500))
    x = torch.stack((tone(2000), half, half))[None]
    moved = steer(x, 0.3)
    assert torch.equal(moved[:, 0], x[:, 0])
    assert not torch.allclose(moved[:, 1], x[:, 1], atol=1e-3)
    assert torch.equal(steer(x, 0.05), x)  # parted already
    torch.testing.assert_close(moved.sum(1), x.sum(1), atol=1e-5, rtol=0)
    for names in (["Low", "Low"], ["engine", "Low"]):
        assert job_of(known, names, low_rank=0).sampler.steer is None


@pytest.mark.parametrize(
    ("names", "options", "labels"),
    [
        (["speech", "Low"], {}, [None, None]),  # guided: the prior isn't told which sound it is
        (["Low", "High"], {}, [None, None]),
        (["Low", "High"], {"guidance": 0}, [0, 1]),  # nothing else tells them apart
        (["Low", "High"], {"preset": "published"}, [0, 1]),
        (["Low", "Low"], {}, [0, 0]),  # not guided, being alike
    ],
)
def test_a_prior_is_told_the_class_where_nothing_guides(ears, names, options, labels):
    job = job_of(VOICE_AND_SOUND, names, **options)
    assert [label for _, label in job.sampler.prior.sources] == labels
    own = [source.label for source in job.sources]
    assert own == [None if name == "speech" else name == "High" for name in names]
    rows = job.report()["sources"].values()
    assert [row["class_told"] for row in rows] == [label is not None for label in labels]
    for prior in job.separator.priors.values():
        prior.label_dropout = 0.0  # its null class was never trained
    assert [label for _, label in job.separator.sampler_for(job.sources).prior.sources] == own


def test_a_separator_guides_by_low_rank_where_a_sound_is():
    wave = (tone(400) + tone(3500)).numpy()[None]
    guided, plain = banded(steps=4, guidance=0), banded(steps=4, guidance=0, low_rank=0)
    a, b = (separator(wave, 16000, ["Low", "High"]) for separator in (guided, plain))
    assert not np.array_equal(a.sources["low"], b.sources["low"])
    assert [x.report["sampler"]["low_rank"] for x in (a, b)] == [LOW_RANK, 0]
    steer = job_of(VOICE_AND_SOUND, ["speech", "Low"], guidance=0).sampler.steer
    x = torch.randn(1, 2, 16000, generator=torch.Generator().manual_seed(0))
    for noise in (0.49, 0.06):
        assert torch.equal(steer(x, noise), LowRank([RANKS["speech"], 1], LOW_RANK)(x))
    for noise in (0.5, 0.05):  # too vague yet; parted already
        assert torch.equal(steer(x, noise), x)
    steer = job_of(VOICE_AND_SOUND, ["Low", "High"], guidance=0).sampler.steer
    assert torch.equal(steer(x, 0.08), LowRank([1, 1], LOW_RANK)(x))
    x = torch.randn(1, 3, 16000, generator=torch.Generator().manual_seed(0))
    sampler = job_of(VOICE_AND_SOUND, ["Low", "speech", "High"], guidance=0).sampler
    assert torch.equal(sampler.steer(x, 0.08), LowRank([1, RANKS["speech"], 1], LOW_RANK)(x))
    moved = sampler.steer(x, sampler.ratios[-2])  # the sounds among themselves
    assert torch.equal(moved[:, 1], x[:, 1])
    assert torch.equal(moved[:, ::2], LowRank([1, 1], LOW_RANK)(x[:, ::2], LAST))
    x = x[:, :2]
    for options in ({}, {"least_noise": 0.002}, {"sampling": {"times": [11, 8, 5]}}):
        sampler = job_of(VOICE_AND_SOUND, ["Low", "High"], guidance=0, **options).sampler
        assert torch.equal(sampler.steer(x, sampler.ratios[-2]), LowRank([1, 1], LOW_RANK)(x, LAST))
    on = job_of(VOICE_AND_SOUND, ["Low", "High"], guidance=0, least_noise=0.002).sampler
    assert torch.equal(on.steer(x, 0.01), x)  # sources have parted, but for the last step
    # One sound without a class may be all the rest, two are one each.
    steer = job_of(VOICE_AND_SOUND, ["speech", "sound"], guidance=0).sampler.steer
    assert torch.equal(steer(x, 0.08), LowRank([RANKS["speech"], REST_RANK], LOW_RANK)(x))
    sampler = job_of(VOICE_AND_SOUND, ["Low", "sound"], guidance=0).sampler
    assert torch.equal(sampler.steer(x, 0.08), LowRank([1, REST_RANK], LOW_RANK)(x))
    assert torch.equal(sampler.steer(x, sampler.ratios[-2]), LowRank([1, REST_RANK], LOW_RANK)(x))
    sampler = job_of(VOICE_AND_SOUND, ["sound", "sound"], guidance=0).sampler
    assert torch.equal(sampler.steer(x, sampler.ratios[-2]), LowRank([1, 1], LOW_RANK)(x, LAST))
    # Two voices share their spectra.
    for names in (["speech", "speech"], ["speech", "speech", "Low"]):
        assert job_of(VOICE_AND_SOUND, names, guidance=0).sampler.steer is None


class Partial(Refiner):
    """Is sure that all is "Low"."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.shares = []

    def refine(self, stems, labels, share):
        self.shares.append(share)
        return super().refine(stems, labels, share)

    def forward(self, bins, labels):
        self.asked = labels
        return 99.0 * (labels == 2)[..., None, None].expand(bins.shape)


@pytest.fixture
def partial(monkeypatch):
    refiner = Partial(["Low", "High"], width=2, mels=8)
    refiner.origin = {"sha256": "PARTIAL"}
    monkeypatch.setattr(Separator, "_listener", lambda self, name: refiner if name == "refiner" else missing(name))
    return refiner


def missing(name):
    raise ModelError(f"no {name}")


def test_a_separator_refines_where_the_names_differ(partial):
    wave = (tone(400) + tone(3500, 0.05)).numpy()[None]
    whole, half, plain = (banded(steps=2, refine=share, restarts=0) for share in (1, None, 0))
    assert (half.refine, plain.refine, plain.refiner) == (REFINE, 0, None)
    moved, _, as_found = (separator(wave, 16000, ["High", "Low"]) for separator in (whole, half, plain))
    assert partial.asked.tolist() == [[3, 2]]
    left, before = (x.sources["high"].std() for x in (moved, as_found))
    assert left < 0.2 * before  # where the two are not in phase, something is left
    np.testing.assert_allclose(moved.sources["low"] + moved.sources["high"], wave, atol=1e-6)
    assert [x.report["sampler"]["refine"] for x in (moved, as_found)] == [1, 0]
    assert moved.report["refiner"] == {"name": "refiner", "sha256": "PARTIAL"}
    assert "refiner" not in as_found.report
    for names in (["Low", "Low"], ["sound", "sound"]):
        alike = whole(wave, 16000, names).report
        assert alike["sampler"]["refine"] == 0
        assert "refiner" not in alike
    silent = whole(0 * wave, 16000, ["High", "Low"])
    assert not silent.sources["low"].any()


@pytest.mark.parametrize(
    ("options", "restarts", "steps", "shares"),
    [
        ({"restarts": 0}, 0, 5, [1.0]),
        ({}, 1, 5 + AGAIN, [1.0, LAST_REFINE]),  # one less than sources
        ({"restarts": 3, "refine": 0.8}, 3, 5 + 3 * AGAIN, [0.8, 0.8, 0.8, 0.8 * LAST_REFINE]),
        ({"restarts": 3, "refine": 0}, 0, 5, []),
        ({"least_noise": 0.002}, 0, 5, [1.0]),  # not chosen for where this ends
        ({"steps": 2}, 1, 2 + 1, [1.0, LAST_REFINE]),  # never more than half of the steps again
        ({"steps": 1}, 0, 1, [1.0]),  # no step to take again
    ],
)
def test_the_last_steps_follow_again_after_refinement(partial, options, restarts, steps, shares):
    wave, done = (tone(400) + tone(3500, 0.05)).numpy()[None], []
    separator = banded(**{"steps": 5, "samples": 1} | options)
    found = separator(wave, 16000, ["High", "Low"], lambda *args: done.append(args))
    np.testing.assert_allclose(sum(found.sources.values()), wave, atol=1e-6)
    assert (len(done), done[-1][:2], partial.shares) == (steps, (steps, steps), shares)
    assert sum(text.startswith("restart, step") for *_, text in done) == steps - options.get("steps", 5)
    assert found.report["sampler"]["restarts"] == restarts
    assert found.report["sampler"]["refinements"] == shares


def test_where_a_sound_has_no_class_its_bounded_field_is_followed_to_the_end(partial):
    wave = (tone(400) + tone(3500, 0.05)).numpy()[None]
    assert banded(steps=5, samples=1)(wave, 16000, ["Low", "sound"]).report["sampler"]["restarts"] == 1
    assert partial.shares == [1.0, 1.0]


def test_restarts_begin_with_the_refined_stems(partial, monkeypatch):
    begun, refined = [], []
    run, refine = Job._run_sampler, Job._refined
    monkeypatch.setattr(Job, "_run_sampler", lambda *args: begun.append(args[4:]) or run(*args))
    monkeypatch.setattr(Job, "_refined", lambda *args: refined.append(refine(*args)) or refined[-1])
    wave = np.stack([tone(400).numpy(), tone(3500, 0.05).numpy()])
    found = banded(steps=5, samples=2, restarts=2)(wave, 16000, ["High", "Low"])
    assert begun[:2] == [(), ()]
    starts = [start for ((start, at),) in begun[2:] if at == 5 - AGAIN]
    assert len(starts) == 4
    assert all(torch.equal(*pair) for pair in zip(starts, refined[0] + refined[1]))
    np.testing.assert_allclose(sum(found.sources.values()), wave, atol=1e-6)


def test_restarts_are_the_same_alone_and_in_batches(partial):
    wave = recording(1, 3.3)
    options = {"steps": 5, "samples": 2, "segment": 1.0, "restarts": 2}
    alone, batched = (banded(batch=b, **options)(wave, 16000, ["High", "Low"]).sources["low"] for b in (1, 3))
    np.testing.assert_allclose(alone, batched, atol=1e-5)


def test_one_sound_without_a_class_is_refined_where_its_prior_has_classes(make, tiny_prior):
    separator = make()
    for names, refined in ((["speech", "sound"], True), (["Bark", "sound"], True), (["sound", "sound"], False)):
        assert (separator.refiner_of(separator.resolve(names)) is not None) == refined
    own = Separator({"speech": tiny_prior(kind="speech"), "engine": tiny_prior(kind="engine")}, samples=1)
    assert own.refiner_of(own.resolve(["speech", "engine"])) is None
    assert own.refiner is None


def test_a_separator_without_a_refiner_says_so(monkeypatch, caplog):
    monkeypatch.setattr("audiosep.separator.REFINER", "none-such")
    assert banded(steps=2).refiner is None
    assert "stems are left as the sampler found them" in caplog.text
    other = Refiner(["Low", "High"], sample_rate=8000, width=2, mels=8)
    monkeypatch.setattr(Separator, "_listener", lambda *_: other)
    assert banded(steps=2).refiner is None
    assert "the refiner hears at 8000 Hz" in caplog.text


def test_where_the_sampler_ends():
    first, last = banded().settings["noise levels"]
    assert (first, last, banded().settings["steps"]) == (1.5, pytest.approx(LEAST_NOISE), 12)
    on = banded(least_noise=0.002).settings
    assert (on["noise levels"][1], on["steps"]) == (pytest.approx(0.002), 24)
    assert banded(sampler="hybrid").settings["steps"] == 24
    assert banded(mixing=[[1.0, 1.0]]).settings["steps"] == 24
    assert banded(sampler="hybrid", least_noise=LEAST_NOISE).settings["steps"] == 12
    with pytest.raises(UsageError, match="least_noise is for the default preset"):
        banded(preset="paper", least_noise=0.1)


@pytest.mark.parametrize("share", [-0.1, 1.1])
@pytest.mark.parametrize("name", ["low_rank", "refine"])
def test_shares_are_shares(name, share):
    with pytest.raises(UsageError, match=rf"{name} lies in 0\.\.1, got"):
        banded(**{name: share})


@pytest.mark.parametrize("options", [{"preset": "published"}, {"sampler": "hybrid"}, {"mixing": [[1.0, 1.0]]}])
def test_guidance_is_refused_where_it_can_not_be(options):
    assert banded(**options).guidance == 0
    assert banded(**options).low_rank == 0
    with pytest.raises(UsageError, match="guidance by the classifier"):
        banded(guidance=0.2, **options)
    with pytest.raises(UsageError, match="low-rank guidance is for"):
        banded(low_rank=0.2, **options)
    assert banded(**options).refiner is None
    with pytest.raises(UsageError, match="refinement is for the default preset"):
        banded(refine=0.2, **options)
    assert banded(**options).restarts == 0
    with pytest.raises(UsageError, match="restarts are for the default preset"):
        banded(restarts=1, **options)


def test_restarts_are_a_number():
    with pytest.raises(UsageError, match="restarts must be at least 0, got -1"):
        banded(restarts=-1)
    with pytest.raises(UsageError, match="restarts need a sampler of at least 2 steps, got 1"):
        banded(restarts=2, steps=1)


def test_guidance_is_not_negative():
    with pytest.raises(UsageError, match="guidance must be at least 0, got -1"):
        banded(guidance=-1)


@pytest.mark.parametrize("name", ["tagger", "classifier"])
def test_without_one_of_both_listeners_the_priors_tell(monkeypatch, caplog, ears, name):
    pair = {other: Ears(["Low", "High"], 8000 if other == name else 16000) for other in ("tagger", "classifier")}
    monkeypatch.setattr("audiosep.hub.load_model", lambda wanted, _: pair[wanted])
    assert banded().classifier is None
    assert f"{name} hears at 8000 Hz, the priors are of 16000 Hz" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(f"audiosep.separator.{name.upper()}", "none-such")
    separator = banded(steps=2)
    report = separator((tone(400) + tone(3500))[None], 16000, ["High", "Low"]).report
    assert (
        "no class guidance, and sounds are told apart by their priors alone: no checkpoint 'none-such'" in caplog.text
    )
    assert report["network_evaluations"] == 2 * 2 * 2 + 2 * 4 * len(LABEL_NOISE)
    assert "classifiers" not in report


def adds_up(parts, wave):
    """Whether float32 stems add up to the recording: to the last bit of the loudest of them."""
    parts = [np.asarray(part, np.float64) for part in parts]
    return np.abs(sum(parts) - wave).max() <= 2**-23 * max(np.abs(part).max() for part in parts)


def recording(channels=1, seconds=1.0, rate=16000, seed=0):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal((channels, round(seconds * rate)))).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.1, 1.0, 2.7])
def test_stems_have_the_recording_s_shape_and_add_up_to_it(make, rate, seconds):
    wave = recording(2, seconds, rate)
    result = make()(wave, rate)
    assert list(result.sources) == ["speech", "sound"]
    assert result.sample_rate == rate
    assert all(stem.shape == wave.shape and stem.dtype == wave.dtype for stem in result.sources.values())
    assert adds_up(result.sources.values(), wave)
    assert np.abs(result.residual).max() < 1e-6
    assert result.report["residual_db"] < -100


def test_torch_comes_back_as_torch_and_one_channel_as_one(make):
    wave = torch.from_numpy(recording())
    result = make()(wave[0].double(), 16000)
    stem = result.sources["speech"]
    assert isinstance(stem, torch.Tensor)
    assert stem.dtype == torch.float64
    assert stem.shape == wave[0].shape


def test_identical_channels_give_identical_stems(make):
    wave = recording(1, 1.5)
    result = make()(np.concatenate((wave, wave)), 16000, sources=["speech", "speech", "sound"])
    for stem in result.sources.values():  # to the rounding of convolutions of a batch
        assert np.allclose(stem[0], stem[1], atol=1e-6)


def test_stems_follow_the_recording_s_level(make):
    wave = recording()
    separator = make(dtype="float32")
    loud, quiet = separator(wave, 16000), separator(1e-3 * wave, 16000)
    for name, stem in loud.sources.items():
        assert np.allclose(quiet.sources[name], 1e-3 * stem, atol=1e-6 * np.abs(wave).max())


def test_same_seed_same_stems_and_another_seed_others(make):
    wave = recording()
    first, again, other = (make(seed=seed)(wave, 16000).sources["speech"] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-4)


def test_segments_separate_the_same_alone_and_in_batches(make):
    wave = recording(1, 3.3)
    alone, batched = (make(batch=b)(wave, 16000).sources["speech"] for b in (1, 3))
    assert np.allclose(alone, batched, atol=1e-5)


def test_silence_stays_silent_and_is_said_to_be(make):
    result = make()(np.zeros((1, 16000), np.float32), 16000)
    assert all((stem == 0).all() for stem in result.sources.values())
    assert any("silent" in note for note in result.report["notes"])
    assert not any(row["active"] for row in result.report["sources"].values())


def test_a_silent_channel_beside_a_loud_one_is_left_silent(make):
    wave = recording(2)
    wave[1] = 0
    result = make()(wave, 16000)
    assert all((stem[1] == 0).all() for stem in result.sources.values())
    assert adds_up(result.sources.values(), wave)


def test_names_are_classes_priors_and_numbers(make):
    separator = make()
    assert separator.source_names() == ["speech", "sound"]
    assert separator.source_names(["SPEECH", "bark"]) == ["speech", "bark"]
    assert separator.source_names(["speech", "rain", "Speech"]) == ["speech_1", "rain", "speech_2"]
    assert separator.source_names(["sound:bell"]) == ["bell"]
    with pytest.raises(UsageError, match=r"unknown source 'cat'.*Bark, Bell, Rain"):
        separator.source_names(["cat"])


def test_a_name_of_two_priors_is_ambiguous(tiny_prior):
    priors = {key: tiny_prior(num_classes=1, classes=["Bark"], kind="animal") for key in ("dogs", "pets")}
    separator = Separator(priors, steps=1)
    assert separator.source_names() == ["dogs", "pets"]
    for name in ("bark", "animal"):
        with pytest.raises(UsageError, match=rf"ambiguous.*dogs:{name}, pets:{name}"):
            separator.source_names([name])
        assert separator.resolve([f"pets:{name}"])[0].prior == "pets"
    assert separator.resolve(["pets:bark"])[0].label == 0
    assert separator.resolve(["pets"])[0].label is None


def test_stems_carry_the_names_asked_for(tiny_prior):
    priors = {"speech_source": tiny_prior(kind="speech"), "bark": tiny_prior(num_classes=1, classes=["Bark"])}
    separator = Separator(priors, steps=1)
    assert separator.source_names(["speech", "BARK"]) == ["speech", "bark"]


def test_one_source_alone_is_refused(make):
    with pytest.raises(UsageError, match="whole recording"):
        make()(recording(), 16000, sources=["speech"])


def test_models_of_one_name_are_refused(tmp_path):
    with pytest.raises(UsageError, match="one name"):
        Separator.from_pretrained([tmp_path / "a" / "speech", tmp_path / "b" / "speech"])


def test_a_network_that_breaks_down_is_an_error_of_that_recording(make):
    separator = make()
    separator.priors["speech"].backbone.head_out.weight.fill_(torch.nan)
    with pytest.raises(AudiosepError, match="--dtype float32"):
        separator(recording(), 16000, sources=["speech", "speech"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 0.6}, r"0\.\.0\.5.*0\.6"),
        ({"segment": 0.01}, r"at least 0\.1 s"),
        ({"samples": 0}, "at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"preset": "best"}, "unknown preset 'best'"),
        ({"sampler": "magic"}, "unknown sampler 'magic'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_impossible_options_are_refused_before_any_work(make, options, message):
    with pytest.raises(UsageError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "wave",
    [
        np.zeros((1, 0)),
        np.zeros((2, 3, 4)),
        np.full((1, 100), np.nan),
        np.zeros((100, 2)),
        np.zeros((1, 100), np.int16),
    ],
)
def test_arrays_that_are_no_recording_are_refused(make, wave):
    with pytest.raises(UsageError, match="wave"):
        make()(wave, 16000)


def test_several_samples_give_mean_best_and_spread(make):
    result = make(samples=3)(recording(1, 1.5), 16000)
    assert result.sources.keys() == result.best.keys() == result.spread.keys()
    assert all((spread >= 0).all() and spread.max() > 0 for spread in result.spread.values())
    for sources in (result.sources, result.best):
        assert adds_up(sources.values(), recording(1, 1.5))
    assert all(row["spread_db"] < 40 for row in result.report["sources"].values())


def test_the_default_preset_averages_samples_without_ranking_them(make):
    result = make(samples=None)(recording(), 16000)
    assert result.report["sampler"]["samples"] > 1
    assert result.spread
    assert not result.best
    # Two sources, two steps, and one of them again from the refined stems.
    assert result.report["sampler"]["restarts"] == 1
    assert result.report["network_evaluations"] == 2 * (2 + 1) * result.report["sampler"]["samples"]


def test_progress_counts_every_step_of_every_segment(make):
    seen = []
    separator = make(samples=2)
    separator(recording(1, 2.6), 16000, progress=lambda done, total, text: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


@pytest.mark.parametrize("preset", ["default", "published", "paper"])
@pytest.mark.parametrize("sampler", ["hybrid", "dsg", "dps", "analytical", "mmps"])
def test_every_sampler_runs_in_every_preset(make, sampler, preset):
    wave = recording()
    result = make(sampler=sampler, preset=preset)(wave, 16000)
    assert adds_up(result.sources.values(), wave)
    assert result.report["sampler"]["name"] == sampler


def test_unprojected_stems_and_residual_add_up(make):
    wave = recording(1, 1.3, 44100)
    result = make(sampler="hybrid", consistent=False)(wave, 44100)
    assert np.abs(result.residual).max() > 1e-3
    assert adds_up([*result.sources.values(), result.residual], wave)


@pytest.mark.parametrize(
    ("subtype", "tolerance"),
    [("FLOAT", 1e-7), ("PCM_16", 1.01 / 2**15), ("PCM_24", 1.01 / 2**23), ("PCM_32", 1.01 / 2**31), ("DOUBLE", 1e-16)],
)
def test_files_add_up_to_the_last_bit_of_their_format(make, tmp_path, subtype, tolerance):
    path = tmp_path / "録音.wav"
    sf.write(path, 0.05 * recording(2, 2.2, 22050).T, 22050, subtype=subtype)
    report = make().separate_file(path, tmp_path / "out")
    stems = [sf.read(file)[0] for file in report["files"].values()]
    original, rate = sf.read(path)
    assert np.abs(sum(stems) - original).max() <= tolerance
    info = sf.info(report["files"]["speech"])
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (rate, 2, len(original), subtype)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["sound.wav", "speech.wav"]


def test_a_file_separates_as_its_array_does(make, tmp_path):
    wave = recording(1, 3.1)
    audio.write(tmp_path / "mix.wav", wave, 16000, "FLOAT")
    report = make().separate_file(tmp_path / "mix.wav", tmp_path)
    expected = make()(wave, 16000).sources["sound"]
    assert np.allclose(audio.read(report["files"]["sound"])[0], expected, atol=1e-6)


def test_with_residual_the_files_still_complete_the_sum(make, tmp_path):
    wave = recording(1, 1.2, 24000)
    audio.write(tmp_path / "mix.wav", wave, 24000, "FLOAT")
    report = make(sampler="dsg").separate_file(tmp_path / "mix.wav", tmp_path / "o", residual=True)
    assert list(report["files"]) == ["speech", "sound", "residual"]
    assert adds_up([audio.read(file)[0] for file in report["files"].values()], wave)


def test_a_file_that_breaks_half_way_leaves_nothing_behind(make, tmp_path):
    sf.write(tmp_path / "mix.flac", recording(1, 4).T, 16000)
    content = (tmp_path / "mix.flac").read_bytes()
    (tmp_path / "mix.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match=r"mix\.flac"):
        make().separate_file(tmp_path / "mix.flac", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_out_of_memory_halves_the_batch_and_goes_on(make, monkeypatch):
    wave = recording(1, 4.0)
    expected = make(batch=4)(wave, 16000).sources["speech"]
    attempts, attempt = [], Job._attempt

    def small_memory(job, waves):
        attempts.append(len(waves))
        if len(waves) > 1:
            raise torch.OutOfMemoryError
        return attempt(job, waves)

    monkeypatch.setattr(Job, "_attempt", small_memory)
    assert np.allclose(make(batch=4)(wave, 16000).sources["speech"], expected, atol=1e-5)
    assert attempts[:3] == [4, 2, 1]

    def no_memory(job, waves):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Job, "_attempt", no_memory)
    with pytest.raises(AudiosepError, match="shorter --segment"):
        make()(wave, 16000)


def test_out_of_memory_with_one_segment_turns_checkpointing_on(make, monkeypatch):
    separator, attempt = make(sampler="hybrid"), Job._attempt

    def small_memory(job, waves):
        if not all(prior.backbone.checkpointing for prior in separator.priors.values()):
            raise torch.OutOfMemoryError
        return attempt(job, waves)

    expected = make(sampler="hybrid")(recording(), 16000).sources["speech"]
    monkeypatch.setattr(Job, "_attempt", small_memory)
    assert np.allclose(separator(recording(), 16000).sources["speech"], expected, atol=1e-5)


def test_priors_of_different_rates_are_refused(tiny_prior):
    slow = tiny_prior()
    slow.sample_rate = 8000
    with pytest.raises(UsageError, match="8000"):
        Separator({"a": tiny_prior(), "b": slow})


def test_devices_that_are_not_there_are_refused():
    assert choose_device("cpu").type == "cpu"
    for name in ("warp9", "meta"):
        with pytest.raises(UsageError, match=f"'{name}'"):
            choose_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="doctor"):
            choose_device("cuda")


@pytest.fixture
def compiles(monkeypatch):
    """Shapes (B, N) that torch.compile was asked for; code is not generated, which takes minutes."""
    shapes, compile_really = [], torch.compile

    def watched(function, **options):
        def backend(graph, inputs):
            shapes.extend(tuple(value.shape) for value in inputs if value.dim() == 2 and len(value[0]) > 4000)
            return graph

        return compile_really(function, backend=backend, **options)

    monkeypatch.setattr("torch.compile", watched)
    torch._dynamo.reset()
    yield shapes
    torch._dynamo.reset()


@pytest.mark.parametrize("sampler", ["mmps", "hybrid"])
def test_compiled_networks_give_the_same_stems(make, compiles, sampler):
    waves = [recording(seconds=seconds) for seconds in (1.0, 1.6, 0.7)]  # of two of them, some segments are full
    plain, compiled = (make(sampler=sampler, dtype="float32", compile=on) for on in (False, True))
    for wave in waves:
        expected, found = (separator(wave, 16000, ["speech", "Bark"]).sources for separator in (plain, compiled))
        for name, stem in expected.items():
            np.testing.assert_allclose(found[name], stem, atol=1e-4, rtol=1e-3)
    assert set(compiles) == {(1, 16000)}
    assert compiled(waves[0], 16000, ["speech", "Bark"]).report["sampler"]["compiled"]


def test_what_cannot_be_compiled_is_said_at_once(make, monkeypatch):
    def broken(function, **options):
        raise RuntimeError("no working C++ compiler\nmore of it")

    monkeypatch.setattr("torch.compile", broken)
    with pytest.raises(UsageError, match=r"torch can't compile for cpu here, go without: no working C\+\+ compiler$"):
        make(compile=True)


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"mmps-exact"}))  # that one watches its residuals
def test_nothing_in_the_loop_asks_for_a_value_or_mixes_devices(monkeypatch, make, sampler):
    """Tensors on "meta" have a device and a shape, but no values."""
    monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    monkeypatch.setattr("audiosep.hub.load_model", lambda *_: Tagger(["Bark", "Bell"], width=2).to("meta").eval())
    separator = make(device="meta", dtype="float32", sampler=sampler, steps=4)
    loop = separator.sampler_for(separator.resolve(["speech", "Bark", "Bell"]))
    y = torch.zeros(2, 16000, device="meta")
    (*_, last) = loop(y, Noise([1, 2]))
    assert (last.x.device, last.x.shape) == (y.device, (2, 3, 16000))
    assert (sampler == "mmps") == (getattr(loop, "steer", None) is not None)
    assert combine(y, torch.stack((last.x, last.x))).device == project(y, last.x).device == y.device


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["mmps", "hybrid"])
def test_cuda_equals_the_cpu(tiny_prior, sampler):
    from audiosep.metrics import si_sdr

    wave = torch.from_numpy(recording(1, 2.0))
    outputs = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        priors = {"speech": tiny_prior(kind="speech", seed=1), "sound": tiny_prior(num_classes=2, seed=2)}
        separator = Separator(priors, steps=3, device=device, dtype=dtype, sampler=sampler)
        outputs[device, dtype] = torch.cat(list(separator(wave, 16000).sources.values()))
    truth = outputs["cpu", "float32"]
    exact, rough = outputs["cuda", "float32"], outputs["cuda", "bfloat16"]
    assert (exact - truth).abs().max() <= 1e-4 * truth.abs().max()
    assert si_sdr(rough, truth).min() > 25


@pytest.mark.gpu
def test_nothing_in_the_loop_waits_for_the_device(tiny_prior):
    separator = Separator({"speech": tiny_prior(kind="speech")}, steps=3, device="cuda")
    sampler = separator.sampler_for(separator.resolve(["speech", "speech"]))
    y = torch.randn(2, 16000, device="cuda")
    list(sampler(y, Noise([1, 2])))  # first calls set up cuFFT plans and caches
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            list(sampler(y, Noise([1, 2])))
        finally:
            torch.cuda.set_sync_debug_mode("default")
