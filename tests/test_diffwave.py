"""DiffWave as a prior's backbone: sizes, context, and tracks that don't hear each other."""

import pytest
import torch

from audiosep import hub
from audiosep.backbones.diffwave import DiffWave, SqueezeExcitation, StepEmbedding
from audiosep.errors import UsageError
from audiosep.prior import Prior
from audiosep.schedules import ve, vp_linear


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({}, 32_307_201),
        ({"reduction": 8}, 32_700_417),
        ({"reduction": 4}, 33_486_849),
        ({"reduction": 2}, 35_059_713),
        ({"layers": 49}, 32_972_033),
        ({"reduction": None}, 31_913_985),
        ({"layers": 36, "reduction": None}, 24_034_305),
        ({"channels": 128, "layers": 42}, 8_716_033),  # the size of the shipped priors
    ],
)
def test_the_published_sizes(arguments, parameters):
    with torch.device("meta"):
        assert count(DiffWave(**arguments)) == parameters


@pytest.mark.parametrize("setting", ["channels", "layers", "cycle"])
def test_sizes_have_a_least_value(setting):
    with pytest.raises(UsageError, match=f"^{setting} is at least 1, got 0$"):
        DiffWave(**{setting: 0})


def trained(**arguments):
    """A small network whose last layer isn't zero."""
    torch.manual_seed(0)
    network = DiffWave(**{"channels": 4, "layers": 4, "cycle": 3, "reduction": 2} | arguments)
    torch.nn.init.normal_(network.out.weight)
    return network


@pytest.mark.parametrize(
    ("layers", "cycle", "context"),
    [(4, 3, 2 * (1 + 2 + 4 + 1) + 1), (48, 12, 32_761)],
)
def test_the_receptive_field(layers, cycle, context):
    network = trained(layers=layers, cycle=cycle, reduction=None).double()
    # Both rectifiers let something through everywhere.
    network.stem.weight.data[:, 0, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.nn.init.zeros_(network.stem.bias)
    torch.nn.init.constant_(network.head.bias, 100.0)
    x = torch.randn(1, context + 10, dtype=torch.float64, requires_grad=True)
    middle = x.shape[1] // 2
    (gradient,) = torch.autograd.grad(network(x, torch.tensor([3.0]))[0, middle], x)
    seen = gradient[0].nonzero().flatten()
    half = context // 2
    assert (seen.min().item(), seen.max().item()) == (middle - half, middle + half)


def test_squeeze_and_excitation_scales_whole_channels():
    torch.manual_seed(0)
    module = SqueezeExcitation(4, 2)
    x = torch.randn(2, 4, 50)
    gate = torch.sigmoid(torch.relu(x.mean(-1) @ module.squeeze.weight.T) @ module.excite.weight.T)
    assert torch.allclose(module(x), x * gate[..., None], atol=1e-6)


def test_tracks_do_not_hear_each_other():
    network = trained(num_classes=3)
    x, t, label = torch.randn(3, 200), torch.tensor([0.0, 57.5, 199.0]), torch.tensor([0, 3, 1])
    with torch.no_grad():
        both = network(x, t, label)
        for k in range(3):
            assert torch.allclose(both[k : k + 1], network(x[k : k + 1], t[k : k + 1], label[k : k + 1]), atol=1e-5)
        assert torch.allclose(network(x, t)[1], both[1], atol=1e-5)  # no label is the null class
        assert not torch.allclose(network(x, t)[0], both[0], atol=1e-3)


def test_recomputed_activations_give_the_same_gradient():
    network = trained()
    gradients = []
    for network.checkpointing in (False, True):
        x = torch.ones(1, 100, requires_grad=True)
        network(x, torch.tensor([5.0])).square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-5)


def test_the_embedding_turns_fastest_ten_thousand_times_as_fast():
    embedding = StepEmbedding()
    torch.nn.init.eye_(embedding.first.weight)
    seen = {}
    embedding.first.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    embedding(torch.tensor([2.0]))
    expected = [2.0, 2 * 10 ** (4 / 63), 2e4]
    assert seen["x"][0, [0, 1, 63]] == pytest.approx(torch.tensor(expected, dtype=torch.float64).sin(), abs=1e-6)


def test_a_prior_with_it_goes_through_a_checkpoint(tmp_path):
    prior = Prior(trained(num_classes=2), vp_linear(), classes=["Bark", "Meow"], kind="sound")
    loaded = hub.load_prior(hub.save_prior(prior, tmp_path / "p", {}, torch.float32))
    x, t, label = torch.randn(2, 300), torch.tensor([10.0, 150.0]), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(loaded.denoise(x, t, label), prior.denoise(x, t, label))


def test_it_learns_to_denoise_a_tone():
    """Of a known sine at unit level in noise of the same power the linear denoiser leaves a loss of 1."""
    torch.manual_seed(0)
    prior = Prior(DiffWave(channels=16, layers=4, cycle=4, reduction=4), ve(), level=-20.0, parameterization="edm")
    n = torch.arange(400) / 16000
    adam = torch.optim.Adam(prior.parameters(), 5e-3)
    for _ in range(60):
        wave = 0.1414 * torch.sin(6.2832 * (800 * n + torch.rand(8, 1)))
        loss = prior.loss_at({"wave": wave}, torch.full((8,), 126.0)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert 0.09 < prior.schedule.ratio_at(torch.tensor(126.0)) < 0.11
    assert loss < 0.3
