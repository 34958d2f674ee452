"""The exact moment-matching sampler against posteriors of Gaussian sources, and the linear maps' adjoints."""

import pytest
import torch

from audiosep.errors import UsageError
from audiosep.operators import (
    Chain,
    Convolution,
    Decimation,
    Delay,
    Linear,
    Mask,
    Matrix,
    Mixing,
    Operator,
    dense,
)
from audiosep.prior import JointPrior, NormalPrior
from audiosep.samplers import Noise, OneNoise
from audiosep.samplers.mmps_exact import ExactMomentMatching, conjugate_gradients, solve
from audiosep.schedules import ve

B, K, N = 3, 2, 12


def operators():
    torch.manual_seed(0)
    keep = (torch.rand(B, 4, N) < 0.7).double()
    kernel = torch.randn(N, N, dtype=torch.float64)
    return {
        "sum": Operator(K),
        "mixing": Mixing(torch.randn(4, K, dtype=torch.float64)),
        "mixing per item": Mixing(torch.randn(B, 4, K, dtype=torch.float64)),
        "matrix": Matrix(torch.randn(K, 5, N, dtype=torch.float64)),
        "matrix per item": Matrix(torch.randn(B, K, 5, N, dtype=torch.float64)),
        "delay": Delay(torch.tensor([[0.0, 1.0], [2.5, -0.3]])),
        "convolution": Convolution(torch.randn(3, K, 5, dtype=torch.float64)),
        "linear": Linear(K, lambda x: x[:, 0] @ kernel.T, lambda w: torch.stack((w @ kernel, 0 * w), 1)),
        "mask": Chain(Mixing(torch.randn(4, K, dtype=torch.float64)), Mask(keep[0])),
        "mask per item": Chain(Mixing(torch.randn(4, K, dtype=torch.float64)), Mask(keep, per_item=True)),
        "decimation": Chain(Convolution(torch.randn(2, K, 3, dtype=torch.float64)), Decimation(3, N)),
    }


@pytest.mark.parametrize("name", operators())
def test_adjoints_are_adjoint_and_rows_are_rows(name):
    operator = operators()[name]
    x = torch.randn(B, K, N, dtype=torch.float64)
    y = operator(x)
    w = torch.randn_like(y)
    left, right = (y * w).flatten(1).sum(1), (x * operator.adjoint(w)).flatten(1).sum(1)
    assert torch.allclose(left, right, rtol=1e-10, atol=1e-10)
    assert torch.allclose(operator.rows(slice(1, 3))(x[1:]), y[1:])
    matrix = dense(operator, N)
    assert torch.allclose((matrix @ x[..., None])[..., 0].sum(1), y.flatten(1), atol=1e-10)


def test_delay_and_convolution_do_what_they_say():
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    assert torch.allclose(Delay(torch.tensor([[3.0]]))(x)[0, 0], x[0, 0].roll(3))
    h = torch.zeros(1, 1, 4, dtype=torch.float64)
    h[..., 2] = 1
    assert torch.allclose(Convolution(h)(x)[0, 0, 2:], x[0, 0, :-2])


# Gaussian sources: the oracle


class Oracle:
    """K Gaussian sources in `n` numbers, seen through a matrix each, with everything that is exact about them."""

    def __init__(self, n=5, m=3, noise=0.1, rows=4, seed=0):
        make = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        self.n, self.noise = n, noise
        self.means = normal(K, n)
        shapes = normal(K, n, n) / n**0.5
        self.covariances = shapes @ shapes.mT + 0.1 * torch.eye(n)
        roots = torch.linalg.cholesky(self.covariances)
        self.a = normal(K, m, n)
        x = self.means + (roots @ normal(rows, K, n, 1))[..., 0]
        self.operator = Matrix(self.a)
        self.y = self.operator(x) + noise * normal(rows, m)

    def sampler(self, levels=(1e-3, 10.0), steps=4, **options):
        schedule = ve(steps, *levels)
        priors = [(NormalPrior(m, c, schedule), None) for m, c in zip(self.means, self.covariances)]
        return ExactMomentMatching(
            JointPrior(priors), operator=self.operator, noise=self.noise, schedule=schedule, t_init=None,
            init="noise", shared_noise=False, length=self.n, **options,
        )  # fmt: skip

    def posterior(self, y, state=None, sigma=None):
        """Mean (B, K, n) and covariance (K n, K n) given y and, where there is one, a state in noise sigma."""
        precision = torch.block_diag(*torch.linalg.inv(self.covariances))
        shift = precision @ self.means.flatten()
        if state is not None:
            precision = precision + torch.eye(K * self.n, dtype=torch.float64) / sigma**2
            shift = shift + state.flatten(1) / sigma**2
        a = torch.cat(tuple(self.a), 1)
        covariance = torch.linalg.inv(precision + a.T @ a / self.noise**2)
        mean = (shift + y @ a / self.noise**2) @ covariance
        return mean.unflatten(-1, (K, self.n)), covariance


@pytest.mark.parametrize("sigma", [1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("direct", [0, 16])
def test_denoiser_is_exact_on_gaussian_sources(sigma, direct):
    oracle = Oracle()
    sampler = oracle.sampler((sigma, 20.0), steps=2, direct=direct, iterations=12, tolerance=1e-14)
    last = len(sampler.times) - 1
    x_t = (sigma * torch.randn(4, K, oracle.n, dtype=torch.float64) + oracle.means).requires_grad_()
    with torch.enable_grad():
        found = sampler.denoise(x_t, oracle.y, last)
    exact, _ = oracle.posterior(oracle.y, x_t.detach(), sigma)
    assert (found - exact).abs().max() < 1e-10


@pytest.mark.parametrize("sigma", [1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("direct", [0, 99])
@pytest.mark.parametrize("name", operators())
def test_denoiser_is_exact_through_every_operator(name, direct, sigma):
    operator, noise = operators()[name], 0.2
    root = torch.randn(K, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    covariances = root @ root.mT / N + 0.1 * torch.eye(N)
    schedule = ve(2, sigma, 20.0)
    priors = [(NormalPrior(torch.zeros(N, dtype=torch.float64), c, schedule), None) for c in covariances]
    sampler = ExactMomentMatching(
        JointPrior(priors), operator=operator, noise=noise, schedule=schedule, t_init=None, init="noise", direct=direct,
        shared_noise=False, length=N, iterations=60, tolerance=1e-14,
    )  # fmt: skip
    x_t = torch.randn(B, K, N, dtype=torch.float64).requires_grad_()
    y = operator(torch.randn(B, K, N, dtype=torch.float64))
    with torch.enable_grad():
        found = sampler.denoise(x_t, y, 1)
    a = dense(operator, N).transpose(1, 2).flatten(2)  # (B or 1, M, K N)
    precision = (
        torch.linalg.inv(torch.block_diag(*covariances)) + torch.eye(K * N).double() / sigma**2 + a.mT @ a / noise**2
    )
    right = x_t.detach().flatten(1) / sigma**2 + (a.mT @ y.flatten(1)[..., None])[..., 0] / noise**2
    assert (found.flatten(1) - torch.linalg.solve(precision, right[..., None])[..., 0]).abs().max() < 1e-10


def test_gains_may_be_given_as_they_are():
    oracle, gains = Oracle(), torch.tensor([[1.0, 0.5], [0.2, -1.0]], dtype=torch.float64)
    oracle.operator = gains
    assert torch.equal(oracle.sampler().operator(torch.ones(1, K, 3).double()), gains @ torch.ones(1, K, 3).double())


def test_few_iterations_are_not_exact():
    """So the test above would notice a solver that stops early."""
    oracle = Oracle()
    sampler = oracle.sampler((1.0, 20.0), steps=2, direct=0, iterations=1)
    x_t = torch.randn(4, K, oracle.n, dtype=torch.float64).requires_grad_()
    with torch.enable_grad():
        found = sampler.denoise(x_t, oracle.y, 1)
    assert (found - oracle.posterior(oracle.y, x_t.detach(), 1.0)[0]).abs().max() > 1e-2


def moments(oracle, samples, steps, **options):
    """Error of the mean in posterior standard deviations, and of the covariance (Frobenius)."""
    sampler = oracle.sampler((1e-2, 10.0), steps=steps, **options)
    y = oracle.y[:1].expand(samples, -1).float()
    for state in sampler(y, OneNoise(0)):
        x = state.x
    mean, covariance = oracle.posterior(oracle.y[:1])
    found = x.flatten(1).double()
    off = (found.mean(0) - mean.flatten()) / covariance.diagonal().sqrt()
    error = (torch.cov(found.T) - covariance).norm() / covariance.norm()
    return off.norm().item() / off.numel() ** 0.5, error.item()


@pytest.mark.slow
def test_predictor_corrector_samples_the_posterior():
    mean, covariance = moments(Oracle(), 20_000, 256, corrections=1)
    assert mean < 0.03
    assert covariance < 0.04


def test_predictor_alone_keeps_its_start():
    """What the corrections are for: without them the mean is off by a tenth of a deviation."""
    mean, _ = moments(Oracle(), 2_000, 64, eta=0.0)
    assert mean > 0.05


def test_nothing_observed_is_the_prior_and_everything_observed_is_the_observation():
    oracle = Oracle()
    x_t = torch.randn(4, K, oracle.n, dtype=torch.float64).requires_grad_()
    oracle.operator = Matrix(torch.zeros_like(oracle.a))
    sampler = oracle.sampler((1.0, 20.0), steps=2)
    with torch.enable_grad():
        found = sampler.denoise(x_t, oracle.y, 1)
        prior = sampler.prior.denoise(x_t, sampler.times[1], sampler.schedule)
    assert torch.equal(found, prior.detach())
    eye = torch.stack((torch.eye(oracle.n, dtype=torch.float64), torch.zeros(oracle.n, oracle.n)))
    oracle.operator, oracle.noise = Matrix(eye), 1e-6
    y = torch.randn(4, oracle.n, dtype=torch.float64)
    with torch.enable_grad():
        found = oracle.sampler((1.0, 20.0), steps=2).denoise(x_t, y, 1)
    assert torch.allclose(found[:, 0], y, atol=1e-8)


def test_rows_of_conjugate_gradients_stop_on_their_own():
    torch.manual_seed(0)
    root = torch.randn(3, 6, 6, dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(6)
    matrix[1] = torch.eye(6)  # done after one step
    matrix[2] = -matrix[2]  # not positive: left at 0
    right = torch.randn(3, 6, dtype=torch.float64)
    found = conjugate_gradients(lambda w: (matrix @ w[..., None])[..., 0], right, 20, 1e-12)
    exact = torch.linalg.solve(matrix, right)
    assert torch.allclose(found[:2], exact[:2], atol=1e-9)
    assert torch.equal(found[2], torch.zeros(6, dtype=torch.float64))
    alone = conjugate_gradients(lambda w: (matrix[:1] @ w[..., None])[..., 0], right[:1], 20, 1e-12)
    assert torch.equal(found[:1], alone)


def test_solve_leaves_out_what_is_no_covariance():
    right = torch.tensor([[1.0, 2.0]])
    found = solve(torch.diag(torch.tensor([3.0, -5.0]))[None], torch.tensor([[0.5, 0.25]]), right)
    assert torch.allclose(found, torch.tensor([[1 / 3.5, 0.0]]))


def test_no_noise_is_refused():
    oracle = Oracle()
    oracle.noise = 0.0
    with pytest.raises(UsageError, match="noise"):
        oracle.sampler()


def test_sum_of_audio_sources_is_shared_out_exactly(gaussian):
    """Stationary sources, one channel: the sampler's mean is the Wiener filter's."""
    sampler = ExactMomentMatching(
        gaussian.joint, schedule=ve(12, 2e-3, 1.5), t_init=None, shared_noise=False, eta=0.0, order=2, iterations=20
    )
    y = gaussian.mixture.expand(8, -1)
    for state in sampler(y, Noise(range(8))):
        x = state.x
    mean, variance = gaussian.posterior()
    scatter = (variance.sum() * 2 * 2 / 8).sqrt() / mean.norm()
    assert (x.double().mean(0) - mean).norm() / mean.norm() < 1.15 * scatter


def test_a_mixing_of_the_wrong_shape_is_refused():
    with pytest.raises(UsageError, match=r"\(C, K\).*got \(3,\)"):
        Mixing(torch.ones(3))
    with pytest.raises(UsageError, match=r"\(K, M, N\).*got \(3, 5\)"):
        Matrix(torch.ones(3, 5))
    two = JointPrior([(NormalPrior(torch.zeros(5), torch.eye(5), ve(4, 1e-3, 10.0)), None)] * 2)
    with pytest.raises(UsageError, match="for 3 sources, there are 2 priors"):
        ExactMomentMatching(two, operator=torch.ones(2, 3))
    with pytest.raises(UsageError, match="above 0"):
        ExactMomentMatching(two, operator=torch.ones(2, 2), noise=-0.1)
