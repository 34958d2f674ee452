"""Several channels with known gains, separated together."""

import numpy as np
import pytest
import torch
from torch import nn

from audiosep.errors import UsageError
from audiosep.mixing import read_mixing
from audiosep.prior import Prior
from audiosep.schedules import ve
from audiosep.separator import Separator

GAINS = np.array([[1.0, 0.4], [-0.3, 0.8], [0.5, 0.5]])


class Zero(nn.Module):
    """With it a prior is exactly that of white Gaussian noise."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, label=None):
        return 0 * x_t


def separator(mixing, **options):
    priors = {name: Prior(Zero(), ve(), kind=name, parameterization="edm") for name in ("speech", "sound")}
    return Separator(priors, mixing=mixing, samples=2, segment=0.5, **options)


@pytest.mark.parametrize("sampler", [None, "mmps-exact"])
@pytest.mark.parametrize("channels", [2, 3])
def test_sources_come_out_as_each_channel_has_them(channels, sampler):
    rng = np.random.default_rng(0)
    x = 0.1 * rng.standard_normal((2, 12000)) * np.array([[1.0], [0.3]])
    gains = GAINS[:channels]
    result = separator(gains, sampler=sampler)(gains @ x, 16000)
    for k, stem in enumerate(result.sources.values()):
        truth = gains[:, k, None] * x[k]
        assert np.square(stem - truth).sum() < 2e-3 * np.square(truth).sum()
    assert np.allclose(sum(result.sources.values()), gains @ x)
    assert result.report["sampler"]["name"] == (sampler or "mmps")


def test_the_exact_sampler_says_what_it_costs(caplog):
    x = 0.1 * np.random.default_rng(1).standard_normal((2, 8000))
    with caplog.at_level("WARNING", "audiosep"):
        dear = separator(GAINS[:2], sampler="mmps-exact")(x, 16000)
        said = caplog.text
        cheap = separator(GAINS[:2])(x, 16000)
    assert "up to 9 network evaluations per step" in said
    assert caplog.text == said
    steps = dear.report["sampler"]["steps"] * 2 * 2  # sources and samples
    # White sources are solved in an iteration or two, and one pass lifts the answer.
    more = dear.report["network_evaluations"] - cheap.report["network_evaluations"]
    assert steps <= more <= 8 * steps


@pytest.mark.parametrize("sampler", [None, "mmps-exact"])
def test_one_channel_of_two_white_sources_is_shared_out_by_their_gains(sampler):
    x = 0.1 * np.random.default_rng(1).standard_normal((1, 8000))
    result = separator([[2.0, 1.0]], sampler=sampler)(x, 16000)
    mean = [np.vdot(stem, x) / np.vdot(x, x) for stem in result.sources.values()]
    assert mean == pytest.approx([0.8, 0.2], abs=0.05)


def test_matrices_that_do_not_fit_are_refused(tmp_path):
    x = np.zeros((2, 8000))
    with pytest.raises(UsageError, match="3 rows, the recording 2 channels"):
        separator(GAINS)(x, 16000)
    with pytest.raises(UsageError, match=r"2 columns, for 3 sources"):
        separator(GAINS[:2])(x, 16000, ["speech", "speech", "sound"])
    with pytest.raises(UsageError, match="not 'hybrid'"):
        separator(GAINS, sampler="hybrid")
    with pytest.raises(UsageError, match="not 'published'"):
        separator(GAINS, preset="published")
    with pytest.raises(UsageError, match="finite"):
        separator([[np.nan, 1.0]])
    file = tmp_path / "A.csv"
    with pytest.raises(UsageError, match="no such mixing matrix"):
        read_mixing(file)
    file.write_text("1,2\n3,x\n")
    with pytest.raises(UsageError, match="rows of numbers"):
        read_mixing(file)
    file.write_text("1, 0.5\n-2, 3e-1\n")
    assert np.array_equal(read_mixing(file), [[1, 0.5], [-2, 0.3]])
