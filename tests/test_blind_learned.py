"""The learned separators: exact densities, known mixings, the promises of scikit-learn."""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from audiosep.blind import GPVAE, SKRVAE, ARFlowVAE, StrADiff, compiled
from audiosep.blind.flows import ARFlowPrior
from audiosep.blind.gp_vae import GPPrior
from audiosep.blind.matching import match, mean_correlation
from audiosep.blind.one_cycle import OneCycle
from audiosep.blind.skr_vae import KernelRegressionPrior
from audiosep.blind.stradiff import Diffusion, NoiseNetworks
from audiosep.blind.vae import Turn
from audiosep.errors import UsageError

MIXING = np.array([[1.0, 0.4], [0.2, -0.9], [-0.5, 0.3]])[:2]
ALL = [ARFlowVAE(), GPVAE(), SKRVAE(), StrADiff()]
QUICK = {"ARFlowVAE": 100, "GPVAE": 60, "SKRVAE": 100, "StrADiff": 40}


def quick(estimator, **options):
    options = {"n_sources": 2, "max_iter": QUICK[type(estimator).__name__], "random_state": 0, "tol": 1.0} | options
    return clone(estimator).set_params(**options)


def waves(samples=400):
    t = np.arange(samples)
    S = np.stack([np.sin(0.05 * t), np.sign(np.sin(0.31 * t + 1)) + 0.2 * np.sin(0.9 * t)], axis=1)
    return (S - S.mean(0)) / S.std(0)


@pytest.fixture
def flow():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    prior = ARFlowPrior(2, hidden=3, kappa=0.6)
    for parameter in prior.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    yield prior
    torch.set_default_dtype(torch.float32)


def flow_by_hand(prior, s):
    """Eqs. 12-28, one step at a time, in plain torch."""
    total = -0.5 * ((s[:, 0] / prior.log_first.exp()) ** 2 + math.log(2 * math.pi)) - prior.log_first
    h = torch.zeros_like(prior.w_b)
    for r in range(1, s.shape[1]):
        u = (s[:, r] - prior.ar_coef * s[:, r - 1]) / prior.log_innovation.exp()
        b = (prior.w_b * h).sum(1) + prior.c_b
        alpha = prior.kappa * torch.tanh((prior.w_alpha * h).sum(1) + prior.c_alpha)
        eps = (u - b) * torch.exp(-alpha)
        h = torch.tanh((prior.w_h @ h[..., None])[..., 0] + prior.w_eps * eps[:, None] + prior.c_h)
        total = total - 0.5 * (eps**2 + math.log(2 * math.pi)) - alpha - prior.log_innovation
    return total


@pytest.mark.parametrize("numba", [True, False])
def test_flow_density_and_gradients_are_those_of_the_equations(flow, monkeypatch, numba):
    if not numba:
        monkeypatch.setattr(compiled, "compiled", lambda name: None)
    s = torch.randn(2, 40).requires_grad_()
    inputs = [s, *(p for name, p in flow.named_parameters() if name != "log_df")]
    weights = torch.tensor([1.0, -2.0])
    fast, slow = flow.log_prob(s), flow_by_hand(flow, s)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    by_fast = torch.autograd.grad((fast * weights).sum(), inputs)
    by_slow = torch.autograd.grad((slow * weights).sum(), inputs)
    for mine, theirs in zip(by_fast, by_slow):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("base", ["normal", "student_t"])
def test_flow_density_integrates_to_one(flow, base):
    """Over the second sample, given the first."""
    flow.base = base
    first = torch.distributions.Normal(0.0, flow.log_first.exp()).log_prob(torch.tensor(0.3))
    grid = torch.linspace(-80, 80, 4001)
    along = torch.stack([flow.log_prob(torch.tensor([[0.3, x], [0.3, x]])) for x in grid.tolist()])
    mass = torch.trapezoid((along - first).exp(), dx=0.04, dim=0)
    torch.testing.assert_close(mass, torch.ones(2), atol=2e-3, rtol=0)


def test_kernel_regression_leaves_the_sample_out():
    prior = KernelRegressionPrior(2).double()
    prior.log_bandwidth.data = torch.tensor([1.0, 4.0], dtype=torch.float64).log()
    s = torch.randn(2, 30, dtype=torch.float64)
    lag = torch.arange(30)[:, None] - torch.arange(30)
    for j, scale in enumerate((1.0, 4.0)):
        kernel = torch.exp(-0.5 * (lag / scale).double() ** 2).fill_diagonal_(0)
        torch.testing.assert_close(prior.regression(s)[j], kernel @ s[j] / kernel.sum(1))


def test_gp_prior_starts_from_the_likeliest_scale():
    rng = np.random.default_rng(0)
    t = np.arange(500)
    K = np.exp(-((t[:, None] - t) ** 2) / 2 / 8.0**2) + 1e-2 * np.eye(500)
    s = torch.from_numpy(np.linalg.cholesky(K) @ rng.standard_normal(500))[None]
    prior = GPPrior(1).double()
    prior.start_from(s)
    assert float(prior.learned()["length_scales_"].detach()) == pytest.approx(8, rel=0.25)


def test_reverse_diffusion_with_the_true_noise_ends_at_the_source():
    """Had the networks learned the noise of one known source, every step would point at it."""
    source = torch.sin(torch.arange(50) / 5)[None]

    class Oracle(NoiseNetworks):
        def forward(self, x, time):
            abar = diffusion.abar[(time * 20).round().long()]
            return (x - abar.sqrt() * source) / (1 - abar).sqrt()

    diffusion = Diffusion(source, 20, Oracle(1, 4))
    path = diffusion.path(torch.randn(1, 50))
    torch.testing.assert_close(path[-1], source, atol=1e-4, rtol=0)
    assert len(path) == 21


def test_the_diffusion_starts_at_the_given_sources():
    source = torch.randn(2, 30)
    diffusion = Diffusion(source, 20, NoiseNetworks(2, 8))
    torch.testing.assert_close(diffusion.path(diffusion.mean)[-1], source)
    diffusion.log_std.data.zero_()
    torch.testing.assert_close(diffusion.divergence(), 0.5 * diffusion.mean.square().sum())


@pytest.mark.parametrize("posterior", ["gp", "native"])
@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_a_known_mixing_comes_back(estimator, posterior):
    S = waves()
    found = quick(estimator, posterior=posterior).fit(S @ MIXING.T + 3.0)
    pairing = match(found.sources_, S)
    assert pairing.correlations.min() > 0.995
    np.testing.assert_allclose(found.mixing_[:, pairing.order] * pairing.signs, MIXING, atol=0.1)
    assert found.sources_std_.shape == found.sources_.shape
    assert len(found.loss_curve_) == found.n_iter_
    assert np.isfinite(found.elbo_)
    assert all(len(trace) == found.n_iter_ for trace in found.traces_.values())


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_bent_mixings_run_and_invert(estimator):
    S = waves()
    X = np.tanh(0.5 * S @ MIXING.T)
    found = quick(estimator, mixing="mlp", posterior="native").fit(X)
    assert mean_correlation(found.sources_, S) > 0.95
    assert np.corrcoef(found.inverse_transform(found.sources_)[:, 0], X[:, 0])[0, 1] > 0.98
    assert mean_correlation(found.transform(X), S) > 0.95


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_the_same_seed_gives_the_same_sources(estimator):
    X = waves() @ MIXING.T
    state = torch.random.get_rng_state()
    first, second = (quick(estimator, max_iter=10).fit(X) for _ in range(2))
    np.testing.assert_array_equal(first.sources_, second.sources_)
    assert torch.equal(state, torch.random.get_rng_state())
    again = pickle.loads(pickle.dumps(first))
    np.testing.assert_allclose(again.transform(X), first.transform(X))


def test_new_recordings_are_separated_alike():
    S = waves(800)
    X = S @ MIXING.T
    for estimator in ALL:
        found = quick(estimator).fit(X[:400])
        assert mean_correlation(found.transform(X[400:]), S[400:]) > 0.99
    native = quick(StrADiff(), posterior="native").fit(X[:400])
    assert mean_correlation(native.transform(X[400:]), S[400:]) > 0.99


def test_new_recordings_are_refitted_under_the_noise_of_the_fit():
    X = waves() @ MIXING.T
    X += 0.4 * np.random.default_rng(0).standard_normal(X.shape)
    found = quick(StrADiff(), posterior="native").fit(X)
    assert mean_correlation(found.transform(X), found.sources_) > 0.99


def test_student_t_separates_white_heavy_tails():
    S = np.random.default_rng(0).laplace(size=(1500, 2))
    X = S @ MIXING.T
    found = quick(ARFlowVAE(base="student_t"), posterior="native").fit(X)
    assert found.init_ == "fastica"
    assert mean_correlation(found.sources_, S) > 0.995
    assert found.df_.shape == (2,)


def test_pipelines_and_options():
    X = waves() @ MIXING.T
    pipeline = make_pipeline(StandardScaler(), quick(SKRVAE()))
    assert mean_correlation(pipeline.fit_transform(X), waves()) > 0.99
    with pytest.raises(UsageError, match="mixing is linear or mlp, got 'bent'"):
        SKRVAE(mixing="bent").fit(X)
    with pytest.raises(UsageError, match="base is normal or student_t"):
        ARFlowVAE(base="cauchy").fit(X)
    with pytest.warns(ConvergenceWarning, match="did not converge in 40 iterations: a source changed by"):
        quick(ARFlowVAE(), max_iter=40, tol=0.0).fit(X)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (ARFlowVAE(beta=0), "beta is a number above 0, got 0"),
        (GPVAE(beta=None), "beta is a number above 0, got None"),
        (ARFlowVAE(max_iter="abc"), "max_iter is a whole number above 0, got 'abc'"),
        (SKRVAE(max_iter=2.5), "max_iter is a whole number above 0, got 2.5"),
        (SKRVAE(tol="x"), "tol is a number of at least 0, got 'x'"),
        (GPVAE(block="x"), "block is a number of samples or None"),
        (GPVAE(kernel="sine"), "kernel is rbf, .*, periodic or periodic12, got 'sine'"),
        (StrADiff(kernel="sine"), "kernel is rbf, .*, periodic or periodic12, got 'sine'"),
        (StrADiff(block=1), "block is a number of samples or None, got 1"),
        (ARFlowVAE(kappa=0), "kappa is a number above 0, got 0"),
        (StrADiff(steps=0), "steps is a whole number above 0, got 0"),
        (StrADiff(noise=0), "noise is a number above 0, got 0"),
        (StrADiff(draws=0, posterior="native"), "draws is a whole number above 0, got 0"),
        (ARFlowVAE(learning_rate=float("nan")), "learning_rate is a number above 0, got nan"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_wrong_options_are_named(estimator, message):
    with pytest.raises(UsageError, match=message):
        estimator.fit(waves() @ MIXING.T)


@pytest.mark.parametrize("max_iter", [2, 10, 40])
@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_too_few_iterations_are_told(estimator, max_iter):
    X = waves() @ MIXING.T
    with pytest.warns(ConvergenceWarning, match=f"did not converge in {max_iter} iterations.* raise max_iter"):
        clone(estimator).set_params(max_iter=max_iter, posterior="native", init="random", random_state=0).fit(X)


def test_a_turn_is_what_scale_sign_and_offset_do_not_change():
    first = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = torch.linalg.qr(first - first.mean(0))[0]
    cos, sin = math.cos(0.03), math.sin(0.03)
    turned = torch.stack([cos * first[:, 0] + sin * first[:, 1], first[:, 1]], 1)
    turn = Turn(4)
    for step, rate in enumerate((9.0, 9.0, 0.2, 0.1)):
        turn.watch(step, rate, lambda: first)
    turn.end(turned * torch.tensor([2.0, -3.0]) + 5.0)
    assert turn.angle == pytest.approx(0.03)
    assert turn.share == pytest.approx(0.1)


def test_deviations_without_noise_are_told_to_be_lower_bounds():
    third = np.r_[MIXING, [[0.5, 0.5]]]
    noise = 0.1 * np.random.default_rng(0).standard_normal((400, 3))
    with pytest.warns(UserWarning, match="sources_std_ is far too small to be the error"):
        quick(SKRVAE()).fit(waves() @ MIXING.T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quick(SKRVAE()).fit(waves() @ third.T + noise).noise_ == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_the_usual_iterations_suffice(estimator):
    X = waves() @ MIXING.T
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        clone(estimator).set_params(posterior="native", random_state=0).fit(X)


@pytest.mark.parametrize("mixing", ["linear", "mlp"])
def test_fits_that_diverge_and_wrong_sources_say_so(mixing):
    X = waves() @ MIXING.T
    with pytest.raises(UsageError, match="the fit diverged: lower learning_rate"):
        StrADiff(2, mixing=mixing, max_iter=5, learning_rate=1e10, posterior="native").fit(X)
    found = quick(SKRVAE(), mixing=mixing, max_iter=5, posterior="native").fit(X)
    with pytest.raises(UsageError, match=r"sources have shape \(n_samples, 2\), got \(4, 3\)"):
        found.inverse_transform(np.zeros((4, 3)))


@pytest.mark.parametrize("init", ["random", "auto"])
def test_of_several_starts_the_fit_of_the_highest_bound_is_kept(monkeypatch, init):
    fits, steps = [], []
    once = ARFlowVAE._fit_from
    monkeypatch.setattr(ARFlowVAE, "_fit_from", lambda *a: fits.append(once(*a)) or fits[-1])
    estimator = quick(ARFlowVAE(), init=init, n_init=3, max_iter=12, posterior="native")
    estimator.progress = lambda done, total, message: steps.append((done, total))
    found = estimator.fit(waves() @ MIXING.T)
    assert [fit.init for fit in fits] == [{"auto": "sobi"}.get(init, init), "random", "random"]
    assert found.elbo_ == max(fit.elbo for fit in fits) > min(fit.elbo for fit in fits)
    assert steps[-1] == (36, 36)
    with pytest.raises(UsageError, match="n_init is a whole number above 0, got 0"):
        quick(GPVAE(), n_init=0).fit(waves())
    assert "n_init" not in SKRVAE().get_params()  # its pseudo-likelihood compares nothing


@pytest.mark.gpu
@pytest.mark.parametrize("mixing", ["linear", "mlp"])
@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_cuda_equals_the_cpu(estimator, mixing):
    """But for the draws, which differ between the devices."""
    S = waves()
    X = S @ MIXING.T
    cpu, cuda = (quick(estimator, mixing=mixing, device=device).fit(X) for device in ("cpu", "cuda"))
    assert mean_correlation(cuda.sources_, cpu.sources_) > 0.99
    assert mean_correlation(cuda.transform(X), S) > 0.98
    pickle.loads(pickle.dumps(cuda)).transform(X)


@pytest.mark.gpu
@pytest.mark.parametrize("mixing", ["linear", "mlp"])
def test_latents_are_refitted_on_the_device_of_the_fit(mixing):
    S = waves(800)
    X = S @ MIXING.T
    found = quick(StrADiff(), mixing=mixing, posterior="native", device="cuda").fit(X[:400])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    assert mean_correlation(found.transform(X[400:]), S[400:]) > 0.98
    assert torch.cuda.max_memory_allocated() > before


@pytest.mark.gpu
def test_heavy_tails_and_matern_kernels_run_on_cuda():
    X = waves() @ MIXING.T
    for estimator in (ARFlowVAE(base="student_t"), GPVAE(kernel="matern32"), StrADiff(kernel="matern52")):
        cpu, cuda = (quick(estimator, device=device).fit(X) for device in ("cpu", "cuda"))
        assert mean_correlation(cuda.sources_, cpu.sources_) > 0.99


# Why a check of scikit-learn's can't hold with posterior="gp".
IN_TIME = "a sample's posterior depends on the samples around it: X is a stretch of time"
EXCEPTIONS = {"check_methods_subset_invariance": IN_TIME, "check_methods_sample_order_invariance": IN_TIME}


@pytest.mark.parametrize("estimator", [ARFlowVAE(), GPVAE()], ids=lambda e: type(e).__name__)
def test_scikit_learns_own_checks(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(clone(estimator).set_params(max_iter=2, posterior="native"))


@pytest.mark.parametrize("estimator", [SKRVAE(), StrADiff(steps=2)], ids=lambda e: type(e).__name__)
def test_scikit_learns_own_checks_of_what_is_smoothed(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(clone(estimator).set_params(max_iter=2), expected_failed_checks=EXCEPTIONS)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_the_schedule_is_torchs_one_cycle(steps):
    mine, theirs = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimiser = OneCycle([([mine], 0.1)], steps)
    adam = torch.optim.Adam([theirs])
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=0.1, total_steps=steps + 1)
    for _ in range(steps):
        assert optimiser.rate == pytest.approx(schedule.get_last_lr()[0])
        optimiser.step((mine - torch.arange(3)).square().sum())
        adam.zero_grad()
        (theirs - torch.arange(3)).square().sum().backward()
        adam.step()
        schedule.step()
    torch.testing.assert_close(mine, theirs)


def repeating(samples=400):
    t = np.arange(samples)
    S = np.stack([np.sin(0.2 * t) ** 3, np.cos(0.31 * t) + 0.5 * np.cos(0.62 * t + 1)], axis=1)
    return (S - S.mean(0)) / S.std(0)


@pytest.mark.parametrize("estimator", [GPVAE(), StrADiff()], ids=lambda e: type(e).__name__)
def test_periodic_kernels_find_the_periods(estimator):
    S = repeating()
    found = quick(estimator, kernel="periodic", posterior="native", max_iter=30).fit(S @ MIXING.T)
    pairing = match(found.sources_, S)
    assert pairing.correlations.min() > 0.99
    np.testing.assert_allclose(found.periods_[pairing.order], 2 * np.pi / np.array([0.2, 0.31]), rtol=0.02)
    assert found.traces_["periods_"].shape == (30, 2)
    assert mean_correlation(found.transform(S @ MIXING.T), S) > 0.99


def test_stradiff_learns_from_stretches_of_a_long_recording(monkeypatch):
    S = waves(900)
    lengths = []
    once = Diffusion.path
    monkeypatch.setattr(Diffusion, "path", lambda self, z: lengths.append(z.shape[1]) or once(self, z))
    found = quick(StrADiff(), block=300, posterior="native").fit(S @ MIXING.T)
    assert lengths.count(300) == found.n_iter_
    assert found.sources_.shape == (900, 2)
    assert mean_correlation(found.sources_, S) > 0.99


def test_wrong_sources_of_a_pseudo_likelihood_give_way_to_the_likelier_start(monkeypatch):
    """As SKR-VAE goes wrong under noise; the order and signs of its sources stay."""
    S = waves()
    X = S @ MIXING.T + 0.05 * np.random.default_rng(0).standard_normal(S.shape)
    wrong = np.array([[math.cos(0.6), math.sin(0.6)], [-math.sin(0.6), math.cos(0.6)]])

    def turn(self, z, fit, start):
        with torch.no_grad():
            fit.encoder.weight.copy_(torch.from_numpy(wrong @ fit.begun))
            fit.decoder.weight.copy_(fit.encoder.weight.T)
        fit.turn._allowed = 1.0

    monkeypatch.setattr(SKRVAE, "_optimise", turn)
    native = quick(SKRVAE(), posterior="native").fit(X)
    assert not native.start_kept_
    assert mean_correlation(native.sources_, S) < 0.95
    found = quick(SKRVAE()).fit(X)
    assert found.start_kept_
    assert mean_correlation(found.sources_, S) > 0.99
    assert (np.diag(found.sources_.T @ native.sources_) / len(S) > 0.5).all()


@pytest.mark.parametrize(
    "prior",
    [ARFlowPrior(2, 3), ARFlowPrior(2, 3, "student_t"), KernelRegressionPrior(2), GPPrior(2), GPPrior(2, "matern32")],
    ids=lambda p: f"{type(p).__name__}-{getattr(p, 'base', getattr(p, 'kernel', ''))}",
)
def test_draws_together_are_as_likely_as_apart(prior):
    prior = prior.double()
    for parameter in prior.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    s = torch.randn(3, 2, 50, dtype=torch.float64).requires_grad_()
    weights = torch.randn(3, 2, dtype=torch.float64)
    inputs = [s, *(p for name, p in prior.named_parameters() if name != "log_df" or prior.base == "student_t")]
    together, apart = prior.log_prob(s), torch.stack([prior.log_prob(draw) for draw in s])
    torch.testing.assert_close(together, apart)
    gradients = [torch.autograd.grad((values * weights).sum(), inputs) for values in (together, apart)]
    torch.testing.assert_close(*gradients)
