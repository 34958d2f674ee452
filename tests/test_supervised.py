"""Supervised networks: their sizes, their loss, and what a separator makes of them."""

from typing import ClassVar

import pytest
import torch

from audiosep.errors import UsageError
from audiosep.metrics import si_sdr
from audiosep.supervised.conv_tasnet import ConvTasNet
from audiosep.supervised.expert import Expert, fit_gains, si_sdr_table
from audiosep.supervised.tf_locoformer import ConvFeedForward, RMSGroupNorm, TFLocoformer

pytest.importorskip("torchaudio")


def count(network):
    return sum(p.numel() for p in network.parameters())


class Fixed(torch.nn.Module):
    """Answers with given outputs (B, K, N)."""

    config: ClassVar = {}

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.n_sources = outputs, outputs.shape[1]

    def forward(self, mixture):
        return self.outputs


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({"n_sources": 2}, 4_984_881),
        ({"n_sources": 3}, 5_050_929),
        ({"n_sources": 2, "kernel": 32}, 5_001_265),
        ({"n_sources": 3, "kernel": 32}, 5_067_313),
    ],
)
def test_conv_tasnet_has_the_published_sizes(arguments, parameters):
    assert count(ConvTasNet(**arguments)) == parameters


S = {"blocks": 4, "width": 96, "hidden": 256}
M = {}


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        (S | {"n_sources": 2}, 5_129_316),
        (S | {"n_sources": 3}, 5_131_046),
        (S | {"n_sources": 2, "attention": 96}, 5_031_012),
        (S | {"n_sources": 2, "hidden": 128, "kernel": 8}, 5_125_220),
        (M | {"n_sources": 2}, 14_975_620),
        (M | {"n_sources": 3}, 14_977_926),
        (M | {"n_sources": 2, "hidden": 192, "kernel": 8}, 14_966_404),
        (M | {"n_sources": 2, "blocks": 9}, 22_459_780),
    ],
)
def test_tf_locoformer_has_the_published_sizes(arguments, parameters):
    with torch.device("meta"):
        assert count(TFLocoformer(**arguments)) == parameters


@pytest.mark.parametrize(
    ("network", "setting", "least"),
    [
        *((ConvTasNet, name, 1) for name in ("n_sources", "filters", "bottleneck", "hidden", "layers", "stacks")),
        (ConvTasNet, "kernel", 2),
        *((TFLocoformer, name, 1) for name in TFLocoformer(blocks=1, width=8, attention=8, hidden=8).config),
    ],
)
def test_sizes_have_a_least_value(network, setting, least):
    with pytest.raises(UsageError, match=f"^{setting} is at least {least}, got {least - 1}$"):
        network(**{setting: least - 1})


def test_the_normalisation_knows_one_bin_and_one_group():
    norm = RMSGroupNorm(6, 2)
    x = torch.randn(2, 3, 6)
    y = norm(x)
    expected = x[1, 2, 3:] / (x[1, 2, 3:].square().mean().sqrt() + 1e-5)
    assert torch.allclose(y[1, 2, 3:], expected)


@pytest.mark.parametrize(("kernel", "stride", "length"), [(4, 1, 9), (8, 1, 20), (4, 2, 9), (3, 3, 10)])
def test_a_convolutional_feed_forward_layer_sees_its_neighbours(kernel, stride, length):
    torch.manual_seed(0)
    layer = ConvFeedForward(3, 5, kernel, stride)
    x = torch.randn(1, length, 3, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    middle = length // 2
    (gradient,) = torch.autograd.grad(y[0, middle].sum(), x)
    seen = gradient[0].abs().sum(1).nonzero().flatten().tolist()
    if stride == 1:
        assert seen == list(range(max(0, middle - kernel + 1), min(length, middle + kernel)))
    assert middle in seen
    assert len(seen) <= 2 * kernel - 1


@pytest.mark.parametrize("length", [1000, 1024, 50])
def test_tf_locoformer_treats_items_alone_and_keeps_their_length(length):
    torch.manual_seed(0)
    network = TFLocoformer(3, blocks=1, width=8, attention=16, heads=2, groups=2, hidden=8, n_fft=64, hop_length=32)
    mixture = torch.randn(2, length)
    with torch.no_grad():
        both = network(mixture)
        assert both.shape == (2, 3, length)
        assert torch.allclose(both[1:], network(mixture[1:]), atol=1e-5)
    with pytest.raises(UsageError, match="multiple of the 4 groups"):
        TFLocoformer(width=90)


def test_untrained_filters_can_give_back_what_they_were_given():
    network = ConvTasNet(kernel=32, filters=40, bottleneck=8, hidden=8, layers=1, stacks=1, start="stft")
    network.network.mask_generator.forward = lambda features: torch.ones(1, 2, *features.shape[1:])
    mixture = torch.randn(1, 1001)
    with torch.no_grad():
        assert torch.allclose(network(mixture), mixture[:, None].expand(1, 2, -1), atol=1e-5)
    with pytest.raises(UsageError, match="at least the kernel's 32, got 30"):
        ConvTasNet(kernel=32, filters=30, start="stft")


def test_the_loss_is_the_metric():
    torch.manual_seed(0)
    references = torch.randn(3, 2, 4000) + 0.3
    estimates = references + torch.tensor([0.01, 0.5])[:, None] * torch.randn(3, 2, 4000)
    table = si_sdr_table(estimates, references)
    expected = si_sdr(estimates[:, :, None], references[:, None])
    assert torch.allclose(table.double(), expected, atol=0.05)  # float32 cancels at 40 dB
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(si_sdr_table(estimates, references), table)
    silent = si_sdr_table(torch.zeros(1, 2, 100, requires_grad=True), references[:1, :, :100])
    assert silent.isfinite().all()


def test_only_sources_of_one_kind_are_exchanged():
    torch.manual_seed(1)
    sources = torch.randn(1, 3, 2000)
    batch = {"mixture": sources.sum(1), "sources": sources}

    def loss(order, task):
        return Expert(Fixed(sources[:, order]), task).loss(batch).item()

    for order in ([0, 1, 2], [0, 2, 1]):
        assert loss(order, "1speech+2sound") == pytest.approx(-80, abs=1)
    assert loss([1, 0, 2], "1speech+2sound") > -60
    assert loss([1, 0, 2], "3sound") == pytest.approx(-80, abs=1)
    assert loss([1, 0, 2], "2speech+1sound") == pytest.approx(-80, abs=1)


def test_gains_undo_scale_and_sign():
    torch.manual_seed(2)
    sources = torch.randn(2, 3, 8000)
    outputs = sources * torch.tensor([-3.0, 0.01, 20.0])[:, None]
    assert torch.allclose(fit_gains(outputs, sources.sum(1)), sources, atol=2e-3)


def test_sources_come_in_the_order_asked_for():
    torch.manual_seed(3)
    sources = torch.randn(1, 3, 4000)
    expert = Expert(Fixed(sources), "1speech+2sound")
    assert expert.resolve(None) == ["speech", "sound", "sound"]
    kinds = expert.resolve([" Sound", "speech", "sound"])
    assert torch.allclose(expert.separate(sources.sum(1), kinds), sources[:, [1, 0, 2]], atol=1e-2)
    for wrong in (["speech", "sound"], ["speech", "Bark", "sound"]):
        with pytest.raises(UsageError, match="trained on 1speech\\+2sound"):
            expert.resolve(wrong)
    with pytest.raises(UsageError, match="2sound has 2 sources, the network 3"):
        Expert(Fixed(sources), "2sound")


NETWORKS = {
    "conv_tasnet": lambda: ConvTasNet(kernel=32, filters=32, bottleneck=16, hidden=16, layers=2, stacks=1, mask="relu"),
    "tf_locoformer": lambda: TFLocoformer(blocks=1, width=16, attention=16, hidden=16, n_fft=64, hop_length=32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_learns_two_tones(name):
    torch.manual_seed(4)
    n = torch.arange(1000) / 16000

    def batch(size=4):
        frequency = torch.stack((300 + 100 * torch.rand(size), 3000 + 500 * torch.rand(size)), 1)
        phase = 6.28 * torch.rand(size, 2)
        sources = torch.sin(6.2832 * frequency[..., None] * n + phase[..., None])
        return {"mixture": sources.sum(1), "sources": sources}

    expert = Expert(NETWORKS[name](), "2sound")
    adam = torch.optim.Adam(expert.parameters(), 1e-2)
    for _ in range(40):
        adam.zero_grad()
        loss = expert.loss(batch()).mean()
        loss.backward()
        adam.step()
    assert loss < -8
