import torch

from audiosep.prior import GaussianPrior, JointPrior, Prior
from audiosep.schedules import ve, vp_linear


class Linear(torch.nn.Module):
    """The exact network for white Gaussian data of standard deviation d under each parameterisation."""

    def __init__(self, form, d, schedule):
        super().__init__()
        self.form, self.d, self.schedule = form, d, schedule
        self.config = {}

    def forward(self, x, t, label=None):
        if self.form == "edm":
            return 0 * x  # c_skip alone is the exact denoiser
        s = self.schedule.ratio_at(t).to(x)[:, None]
        alpha = self.schedule.alpha_of(s)
        clean = self.d**2 / (self.d**2 + s**2) * x / alpha
        return (x / alpha - clean) / s


def white(form, d=0.075):
    schedule = vp_linear() if form == "eps" else ve()
    return Prior(Linear(form, d, schedule), schedule, level=20 * torch.tensor(d).log10().item(), parameterization=form)


def test_every_parameterisation_is_the_same_denoiser_on_every_schedule():
    d, n = 0.075, 64
    exact = GaussianPrior(torch.full((n // 2 + 1,), d**2, dtype=torch.float64), vp_linear())
    x, t = torch.randn(4, n), torch.tensor([3.0, 40.0, 120.5, 150.0])
    for schedule in (vp_linear(), ve(200, 0.01, 1.4)):
        truth = exact.denoise(x, t, schedule=schedule)
        for form in ("eps", "edm"):
            answer = white(form).denoise(x, t, schedule=schedule)
            assert torch.allclose(answer, truth, rtol=1e-3, atol=1e-5), form


def test_edm_loss_of_the_best_linear_denoiser_is_one():
    prior = white("edm")
    generator = torch.Generator().manual_seed(0)
    wave = 0.075 * torch.randn(64, 4000, generator=generator)
    for t in (0.0, 100.0, 199.0):
        loss = prior.loss_at({"wave": wave}, torch.full((64,), t), generator=generator)
        assert abs(loss.mean().item() - 1) < 0.02


def test_loss_has_the_value_of_the_network_s_error_and_a_gradient(tiny_prior):
    prior = tiny_prior(num_classes=2).requires_grad_(True)
    batch = {"wave": 0.075 * torch.randn(3, 2000), "label": torch.tensor([0, 1, 0])}
    loss = prior.loss(batch, torch.Generator().manual_seed(1))
    assert loss.shape == (3,)
    again = prior.loss(batch, torch.Generator().manual_seed(1))
    assert torch.equal(loss, again)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())


def test_joint_prior_asks_each_prior_once_and_keeps_the_order(tiny_prior):
    speech, sound = tiny_prior(kind="speech", seed=1), tiny_prior(num_classes=3, seed=2)
    calls = []
    for prior in (speech, sound):
        prior.backbone.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    joint = JointPrior([(sound, 2), (speech, None), (sound, None)])
    x = torch.randn(2, 3, 1500)
    together = joint.denoise(x, 100.0, ve())
    assert sorted(calls) == [2, 4]
    t = torch.full((2,), 100.0)
    assert torch.allclose(together[:, 0], sound.denoise(x[:, 0], t, torch.tensor([2, 2])), atol=1e-5)
    assert torch.allclose(together[:, 1], speech.denoise(x[:, 1], t), atol=1e-5)
    assert torch.allclose(together[:, 2], sound.denoise(x[:, 2], t), atol=1e-5)


def test_the_loss_of_an_item_is_its_own_in_any_batch(tiny_prior):
    prior = tiny_prior(num_classes=3)
    torch.nn.init.normal_(prior.backbone.head_out.weight, std=0.1)
    batch = {"wave": 0.07 * torch.randn(4, 900), "label": torch.arange(4), "index": [3, 4, 5, 6], "seed": [9, 8, 7, 6]}
    together = prior.loss(batch)
    for i in range(4):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        torch.testing.assert_close(prior.loss(alone)[0], together[i])
    other = prior.loss({**batch, "seed": [9, 8, 7, 5]})
    assert torch.equal(other[:3], together[:3])
    assert other[3] != together[3]


def test_levels_of_items_are_spread_evenly():
    edm, eps = white("edm"), white("eps")
    t = edm.steps_of(range(10**6, 10**6 + 200)).sort().values
    assert (t - torch.linspace(0, 199, 200)).abs().max() < 3
    t = eps.steps_of(range(2000))
    assert torch.equal(t, t.round())
    assert (t.min(), t.max()) == (0, 199)
