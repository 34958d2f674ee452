"""The guidance diagnosis on Gaussian priors, where it is known in closed form, and its command's files."""

import json

import numpy as np
import pytest
import soundfile
import torch

from audiosep import diagnose
from audiosep.backbones.triple_path_unet import TriplePathUNet
from audiosep.errors import UsageError
from audiosep.prior import Prior
from audiosep.samplers import build
from audiosep.schedules import vp_linear
from audiosep.separator import Separator


def test_dps_on_gaussian_priors_in_closed_form(gaussian):
    """With L = ||y - sum_j D_j||: g = -G alpha-free residual / L, taken through the linear denoisers."""
    sampler = build(gaussian.joint, "dps", "published", steps=4, step_size=0.7, clamp=False)
    sampler.loss = lambda estimate, y: (y - estimate).square().sum(-1) / 2
    references = torch.randn(2, gaussian.mixture.shape[-1], generator=torch.Generator().manual_seed(1))
    found = diagnose.trace(sampler, gaussian.mixture[0], references)
    assert np.allclose(found.gamma, 0.7, rtol=1e-4)
    assert found.strength == [0.7] * 4
    assert found.steps == [199, 133, 66, 0]
    assert [step for step, _ in found.states] == found.steps
    # The first state again, by hand.
    from audiosep.samplers import Noise

    x_t = sampler.start(gaussian.mixture[:1], Noise([0]))
    denoised = sampler.denoise(x_t, gaussian.mixture[:1], 0)
    left = gaussian.mixture[0] - denoised[0].sum(0)
    ratio, alpha = sampler.ratios[0], sampler.alphas[0]
    for k, (prior, _) in enumerate(gaussian.joint.sources):
        gain = prior.spectrum / (prior.spectrum + ratio**2)
        gradient = -torch.fft.irfft(gain / alpha * torch.fft.rfft(left), n=len(left))
        step = sampler.mean(x_t, denoised, 0)[0, k] - x_t[0, k]
        bound = (step * gradient).sum() / gradient.square().sum()
        assert found.bound[0][k] == pytest.approx(bound.item(), rel=1e-3)


def test_scores_of_sources_that_ended_in_the_other_order(gaussian):
    sampler = build(gaussian.joint, "dps", "published", steps=4)
    references = torch.randn(2, gaussian.mixture.shape[-1], generator=torch.Generator().manual_seed(1))
    one, other = (diagnose.trace(sampler, gaussian.mixture[0], waves) for waves in (references, references.flip(0)))
    assert np.array_equal(one.si_sdr_permuted, np.flip(other.si_sdr_permuted, 1))
    kept, swapped = (one, other) if np.mean(one.si_sdr[-1]) > np.mean(other.si_sdr[-1]) else (other, one)
    assert kept.si_sdr_permuted == kept.si_sdr
    assert not np.allclose(swapped.si_sdr_permuted, swapped.si_sdr)


def test_a_sampler_without_gradients_is_refused(gaussian):
    with pytest.raises(UsageError, match="MomentMatching takes no gradient"):
        diagnose.trace(build(gaussian.joint), gaussian.mixture[0], gaussian.mixture[:1].expand(2, -1))


@pytest.fixture
def separators():
    torch.manual_seed(0)
    small = {"width": 8, "depth": (1, 1, 1, 1, 1), "heads": 2, "condition_dim": 8, "squeeze": 2, "patch": (4, 4)}
    priors = {
        name: Prior(TriplePathUNet(num_classes=0, **small), vp_linear(), kind=name) for name in ("speech", "sound")
    }
    return {name: Separator(priors, preset="published", sampler=name, steps=3) for name in ("dps", "dsg", "hybrid")}


def test_the_files(separators, tmp_path, caplog):
    rng = np.random.default_rng(0)
    waves = rng.normal(0, 0.05, (2, 8000))
    for name, wave in (("mix", waves.sum(0)), ("a", waves[0]), ("b", waves[1])):
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000, "FLOAT")
    paths = [tmp_path / "mix.wav", [tmp_path / "a.wav", tmp_path / "b.wav"]]
    seen = []
    page = diagnose.run(separators, *paths, tmp_path / "out", progress=lambda *step: seen.append(step)).read_text()
    assert page.count("<audio ") == 1 + 2 + 3 * 3 * 2
    assert page.count("guidance strength gamma and its bound") >= 3
    assert seen[-1] == (3, 3, "hybrid, step 3/3")
    data = json.loads((tmp_path / "out/diagnosis.json").read_text())
    assert data["sources"] == ["speech", "sound"]
    dps, dsg, hybrid = (data["samplers"][name] for name in ("dps", "dsg", "hybrid"))
    assert np.shape(dps["bound"]) == np.shape(dps["si_sdr"]) == (3, 2)
    assert np.allclose(dps["gamma"], 1.5)
    assert dsg["strength"][-1] == 0  # the last step of DSG has no noise and no guidance
    assert hybrid["strength"][-1] == pytest.approx(0.002, rel=0.2)
    assert all(a >= b for a, b in zip(hybrid["strength"], dsg["strength"]))
    soundfile.write(tmp_path / "quiet.wav", np.zeros(8000), 16000)
    with pytest.raises(UsageError, match=r"quiet.wav is silent in its first 0.500 s"):
        diagnose.run(separators, paths[0], [tmp_path / "a.wav", tmp_path / "quiet.wav"], tmp_path)
    assert "leave" not in caplog.text
    diagnose.run({"dps": separators["dps"]}, paths[0], [tmp_path / "a.wav"] * 2, tmp_path / "other")
    assert "the references leave 1" in caplog.text  # sqrt(2) times each: a + a instead of a + b
    with pytest.raises(UsageError, match="need as many references, got 1"):
        diagnose.run(separators, paths[0], paths[1][:1], tmp_path)
    soundfile.write(tmp_path / "a.wav", waves[0][:4000], 16000)
    with pytest.raises(UsageError, match=r"a.wav holds 0.250 s, the mixture 0.500 s"):
        diagnose.run(separators, *paths, tmp_path / "out")
