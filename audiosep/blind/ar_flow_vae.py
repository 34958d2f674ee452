"""AR-Flow VAE: a variational autoencoder whose latent sources have autoregressive flows as priors."""

from __future__ import annotations

from typing import Any

from audiosep.blind.base import choose, positive
from audiosep.blind.flows import BASES, ARFlowPrior
from audiosep.blind.vae import SourcePrior, VariationalSeparator


class ARFlowVAE(VariationalSeparator):
    """Separation by a variational autoencoder with an autoregressive flow prior per source.

    Wei, Deng, Cui, Sun: "AR-Flow VAE: a structured autoregressive flow prior variational autoencoder for unsupervised
    blind source separation" (2026), arXiv:2603.14441.

    Parameters
    ----------
    n_sources: int or None
        Number of sources; None estimates it.
    mixing: "linear" or "mlp"
        Encoder and decoder; "mlp" bends the linear maps with tanh networks, and wants some 1000 iterations.
    base: "normal" or "student_t"
        Distribution of the flow's noise. "normal" is the paper's, and cannot separate white heavy-tailed sources.
    init: "auto", "sobi", "fastica" or "random"
        Where the unmixing starts. "auto" is SOBI's; with base="student_t" it is SOBI's or FastICA's, whichever the
        prior finds likelier.
    n_init: int
        Fits to make, the first from `init`'s start and the others from random rotations; that of the highest elbo_ is
        kept. (With mixing="mlp" that may be a wrong one: a network can bend wrong sources into likely ones.)
    posterior: "gp" or "native"
        What sources_ and sources_std_ are: the posterior under Gaussian processes fitted to the sources, or the
        encoder's mean and its learned deviation (which is no measure of the error). "gp" also refines the mixing: a
        linear one under noise, a bent one where there are as many channels as sources (see `bent`).
    hidden: int
        Size H of the flow's state.
    kappa: float
        Largest |log-scale| of the flow's noise, eq. 17; the paper's is 0.8.
    beta, warm: float or None
        Weight of the divergence term (twice the variance of the observation noise), and how many times it starts at.
        None is 0.1 and 10, for mixing="mlp" 0.02 and 30.
    mlp_units: int
        Width of the networks of mixing="mlp".
    block: int or None
        Samples seen in one iteration, a stretch anywhere in a longer recording; None sees all.
    learning_rate: float
        Peak of Adam's one-cycle schedule; 0.3 of it for "mlp".
    max_iter, tol: int, float
        Iterations; how far a source may still turn in the second half of them without a warning, as a share of what
        the learning rate allows.
    random_state, device: the seed; "auto", "cpu" or "cuda".

    Attributes
    ----------
    sources_, sources_std_ (n_samples, n_sources); mixing_ (n_channels, n_sources; the best linear one for "mlp"); mean_
    ar_coef_, innovation_std_ (n_sources,), df_ too for "student_t"; traces_: their course over the iterations
    loss_curve_, elbo_ (nats), n_iter_; init_: the start chosen
    noise_: noise variance per channel and processes_: the fitted processes, with posterior="gp".
    bands_hold_: whether sources_std_ is the size of the error. It is FAR TOO SMALL, and this False and told by a
        warning, where no noise was found that can be told from the sources (all the error is then the unmixing's, which
        is not in it), with mixing="mlp", and with posterior="native".
    """

    fits_random_starts = False

    def __init__(
        self,
        n_sources: int | None = None,
        *,
        mixing: str = "linear",
        base: str = "normal",
        init: str = "auto",
        n_init: int = 1,
        posterior: str = "gp",
        hidden: int = 8,
        kappa: float = 0.8,
        beta: float | None = None,
        warm: float | None = None,
        mlp_units: int = 32,
        block: int | None = 20000,
        learning_rate: float = 1e-2,
        max_iter: int = 400,
        tol: float = 0.1,
        random_state: Any = None,
        device: str = "auto",
    ) -> None:
        self.n_sources = n_sources
        self.mixing = mixing
        self.base = base
        self.init = init
        self.n_init = n_init
        self.posterior = posterior
        self.hidden = hidden
        self.kappa = kappa
        self.beta = beta
        self.warm = warm
        self.mlp_units = mlp_units
        self.block = block
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.device = device

    def _starts(self) -> tuple[str, ...]:
        return ("sobi",) if self.base == "normal" else ("sobi", "fastica")

    def _check_options(self) -> None:
        super()._check_options()
        positive("hidden", self.hidden, whole=True)
        positive("kappa", self.kappa)

    def _levels(self) -> tuple[Any, Any]:
        usual = (0.1, 10.0) if self.mixing == "linear" else (0.02, 30.0)
        return (usual[0] if self.beta is None else self.beta), (usual[1] if self.warm is None else self.warm)

    def _prior(self, sources: int) -> SourcePrior:
        return ARFlowPrior(sources, self.hidden, choose("base", self.base, BASES), self.kappa)
