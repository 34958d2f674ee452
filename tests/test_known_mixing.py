"""Several channels with known gains, separated together."""

import json

import numpy as np
import pytest
import soundfile as sf
import torch
from torch import nn
from typer.testing import CliRunner

from audiosep import hub
from audiosep.backbones.wiener import Wiener
from audiosep.cli import app
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


def test_the_command_takes_a_matrix_and_the_exact_sampler(tmp_path):
    """Two channels of two sources, and one of them: checkpoints on the disk, a matrix in a file, stems in files."""
    for name in ("a", "b"):
        torch.manual_seed(0)
        prior = Prior(Wiener(64, 8, 1), ve(), kind=name, parameterization="direct")
        card = {"title": name, "description": "", "licence": "", "data": ""}
        hub.save_prior(prior, tmp_path / name, card, torch.float32)
    x = 0.1 * np.random.default_rng(0).standard_normal((2, 8000))
    gains = GAINS[:2]
    np.savetxt(tmp_path / "A.csv", gains, delimiter=",")
    np.savetxt(tmp_path / "one.csv", gains[:1], delimiter=",")
    sf.write(tmp_path / "two.wav", (gains @ x).T, 16000, subtype="FLOAT")
    sf.write(tmp_path / "one.wav", gains[0] @ x, 16000, subtype="FLOAT")

    def run(file, matrix):
        given = [str(tmp_path / file), "-n", f"{tmp_path / 'a'},{tmp_path / 'b'}", "--mixing", str(tmp_path / matrix)]
        more = [
            "--sampler",
            "mmps-exact",
            "--steps",
            "6",
            "--samples",
            "1",
            "-o",
            str(tmp_path / "out"),
            "--overwrite",
            "--json",
        ]
        return CliRunner().invoke(app, ["separate", *given, *more])

    result = run("two.wav", "A.csv")
    assert result.exit_code == 0, result.output
    for k, path in enumerate(json.loads(result.stdout.splitlines()[-1])["stems"].values()):
        truth = gains[:, k, None] * x[k]
        assert np.square(sf.read(path)[0].T - truth).sum() < 0.01 * np.square(truth).sum()
    assert "network evaluations per step" in result.stderr
    assert run("one.wav", "one.csv").exit_code == 0
    wrong = run("two.wav", "one.csv")
    assert wrong.exit_code != 0
    assert "1 rows, the recording 2 channels" in wrong.stderr


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
