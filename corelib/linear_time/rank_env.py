"""Which rank for queries and keys, segment by segment: the decisions of `dr_rl`, their price, and
what needs no learning.

An *episode* is one layer reading one text. At each segment of 128 tokens a rank is picked for the
segment's queries and for all keys so far, of all heads. Queries, keys and values are given, so
that every outcome can be computed beforehand, once for each rank:

    reward = fidelity - 0.05 work - 0.1 change
    fidelity   mean cosine of the segment's outputs with those of exact attention
    work       operations over those of exact attention, the SVD among them
    change     |A_r - A_previous|_F over |A|_F, for best approximations of the scores A

What moves from one segment to the next is the previous rank alone: it sets the change, and by it
which ranks are allowed. The best sequence is therefore found exactly, from the end (`oracle`).

The SVD is done by Gram matrices: those of keys grow by a segment's rows, and each is decomposed in
``9 D^3``. It is due at *every* rank, the full one included, because the mask reads the spectrum.
The paper's released trainer charges ``L r D`` for an SVD and nothing else; that is not used here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corelib.primitives.svd import energy_rank, from_gram

from .low_rank_scores import (
    factored_scores,
    factors_from_bases,
    rank_change_norm,
    score_spectrum,
)

RANKS = tuple(range(16, 65, 8))
Actions = Int[Tensor, "E T"]


def svd_work(L: int, D: int, *, shared: int = 1) -> float:
    """Operations of a head's two spectra for ``L`` new tokens; ``shared`` heads have one key head.

    Two Gram matrices grow by ``L`` rows; each is decomposed with its vectors in about ``9 D^3``
    (Golub & Van Loan, "Matrix Computations", section 8.3), and so is the product of the two, for
    the spectrum of the scores.
    """
    one = 2 * L * D * D + 9 * D**3
    return one + one / shared + 4 * D**3 + 9 * D**3


def score_work(L: int, S: int, D: int, rank: int, *, shared: int = 1) -> float:
    """Operations of a head's scores at this rank; at full rank the plain product, ``2 L S D``."""
    if rank >= D:
        return 2 * L * S * D
    project = 2 * L * D * rank + 2 * S * D * rank / shared
    return project + 2 * D * rank**2 + 2 * L * rank**2 + 2 * L * S * rank


class Outcome(NamedTuple):
    """Means over all decisions. ``unsafe``: the share that the mask would not have allowed.

    ``work`` is with the SVD; a policy that looks at no spectrum does not owe `RankEnv.svd`.
    """

    reward: float
    fidelity: float
    work: float
    change: float
    rank: float
    unsafe: float


class RankEnv:
    """Episodes ``E`` of ``T`` segments with ``A`` ranks to pick from, computed beforehand.

    Args:
        x: ``(E, L, C)``, what the layer reads; ``q (E, H, L, D)``, ``k (E, G, L, D)``,
            ``v (E, G, L, V)``: what it makes of it, rotated. ``L`` is a multiple of ``segment``.
        stats: ``(E, 9)`` of the layer's weights, see `weight_stats`.
        tolerance: the largest change that the mask allows, over ``|A|_F``.
        weights: of fidelity, work and change in the reward.
        probe: fidelity is measured at every ``probe``-th query, from a segment's last backwards. It
            saves time here, and changes nothing of what is decided about.

    Attributes: ``inputs (E, T, segment, C)``, ``fidelity (E, T, A)``, ``work (T, A)``, ``svd (T,)``
    of it, ``change (E, T, A, A)`` from the previous to the next rank, ``energy (E, T, 2, D)`` the
    squared singular values of queries and keys, each head's over its sum.
    """

    def __init__(
        self, x: Float[Tensor, "E L C"], q: Float[Tensor, "E H L D"], k: Float[Tensor, "E G L D"],
        v: Float[Tensor, "E G L V"], stats: Float[Tensor, "E 9"], *, segment: int = 128,
        ranks: tuple[int, ...] = RANKS, tolerance: float = 0.1,
        weights: tuple[float, float, float] = (1.0, 0.05, 0.1), probe: int = 1,
    ):  # fmt: skip
        (_, H, L, D), G = q.shape, k.shape[1]
        if segment < 1 or L % segment:
            raise ValueError(f"segment: expected a divisor of the length {L}, got {segment}")
        if list(ranks) != sorted(set(ranks)) or not ranks or ranks[0] < 1 or ranks[-1] != D:
            raise ValueError(f"ranks: expected rising numbers up to the width {D}, got {ranks}")
        if not 1 <= probe <= segment:
            raise ValueError(f"probe: expected 1 to {segment}, got {probe}")
        if not tolerance >= 0:
            raise ValueError(f"tolerance: expected a number of at least 0, got {tolerance}")
        self.ranks, self.tolerance, self.weights, self.stats = ranks, tolerance, weights, stats
        self.inputs = x.unflatten(1, (-1, segment))
        ends = range(segment, L + 1, segment)
        parts = [
            _segment(q[:, :, n - segment : n], k[:, :, :n], v[:, :, :n], ranks, probe) for n in ends
        ]
        self.fidelity, self.change, self.energy = (torch.stack(p, 1) for p in zip(*parts))
        exact = [2 * segment * n * (D + v.shape[3]) for n in ends]
        options = dict(shared=H // G)
        svd = [svd_work(segment, D, **options) / full for full in exact]
        self.svd = torch.tensor(svd, device=q.device)
        scores = [[score_work(segment, n, D, r, **options) for r in ranks] for n in ends]
        values = torch.tensor([2.0 * segment * n * v.shape[3] for n in ends])
        work = (torch.tensor(scores) + values[:, None]) / torch.tensor(exact)[:, None]
        self.work = work.to(q.device) + self.svd[:, None]

    @property
    def start(self) -> int:
        """The action before the first: full rank."""
        return len(self.ranks) - 1

    @property
    def allowed(self) -> Bool[Tensor, "E T A A"]:
        """Whether the last axis may follow the one before it. Staying always may."""
        return self.change <= self.tolerance

    @property
    def rewards(self) -> Float[Tensor, "E T A A"]:
        """Of the last axis after the one before it."""
        good, costly, jumpy = self.weights
        gain = good * self.fidelity - costly * self.work
        return gain[:, :, None] - jumpy * self.change

    def follow(self, table: Tensor, actions: Actions) -> Tensor:
        """The entries of a table ``(E, T, A, A)`` that these actions meet, ``(E, T)``."""
        first = torch.full_like(actions[:, :1], self.start)
        before = torch.cat([first, actions[:, :-1]], 1)
        rows = table.gather(2, before[..., None, None].expand(*before.shape, 1, table.shape[3]))
        return rows[:, :, 0].gather(2, actions[..., None])[..., 0]

    def outcome(self, actions: Actions) -> Outcome:
        """What these actions come to."""
        mean = [
            self.follow(self.rewards, actions),
            self.fidelity.gather(2, actions[..., None]),
            self.work.expand_as(self.fidelity).gather(2, actions[..., None]),
            self.follow(self.change, actions),
            torch.tensor(self.ranks, device=actions.device)[actions],
            ~self.follow(self.allowed, actions),
        ]
        return Outcome(*(part.double().mean().item() for part in mean))


def _segment(q: Tensor, k: Tensor, v: Tensor, ranks, probe: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fidelity ``(E, A)``, change ``(E, A, A)`` and energy ``(E, 2, D)`` of one segment."""
    spectra = [from_gram(x.mT @ x) for x in (q, k)]
    L, S, scale = q.shape[2], k.shape[2], q.shape[3] ** -0.5
    asked = torch.arange(L - 1, -1, -probe, device=q.device)
    hidden = torch.arange(S, device=q.device) > (asked + S - L)[:, None]
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    outs = []
    for rank in (*ranks, q.shape[3]):
        factors = factors_from_bases(q[:, :, asked], k, *spectra, rank)
        scores = (factored_scores(factors) * scale).masked_fill(hidden, -torch.inf)
        outs.append(scores.softmax(-1) @ values)
    fidelity = [F.cosine_similarity(out, outs[-1], dim=-1).mean((1, 2)) for out in outs[:-1]]
    sigma = score_spectrum(*spectra)
    pairs = [[rank_change_norm(sigma, a, b).square().sum(1) for b in ranks] for a in ranks]
    change = torch.stack([torch.stack(row, -1) for row in pairs], -2)
    change = (change / sigma.square().sum((1, 2))[:, None, None]).sqrt()
    energy = [(s.square() / s.square().sum(-1, keepdim=True)).mean(1) for s, _ in spectra]
    return torch.stack(fidelity, -1), change, torch.stack(energy, 1)


def weight_stats(*weights: Tensor) -> Float[Tensor, " n"]:
    """Mean, variance and Frobenius norm of each: nine numbers of ``W_q, W_k, W_v``."""
    return torch.stack([f for w in weights for f in (w.mean(), w.var(), torch.linalg.norm(w))])


# --- what needs no learning -----------------------------------------------------------------------


def fixed_ranks(env: RankEnv, rank: int) -> Actions:
    """One rank for all."""
    if rank not in env.ranks:
        raise ValueError(f"rank: expected one of {env.ranks}, got {rank}")
    fidelity = env.fidelity
    return torch.full(fidelity.shape[:2], env.ranks.index(rank), device=fidelity.device)


def energy_ranks(env: RankEnv, share: float = 0.9) -> Actions:
    """The smallest rank that keeps ``share`` of the energy of queries, and of keys."""
    needed = energy_rank(env.energy.sqrt(), share).amax(-1)
    return torch.searchsorted(torch.tensor(env.ranks, device=needed.device), needed)


def random_ranks(env: RankEnv, seed: int = 0) -> Actions:
    """Any of those that the mask allows."""
    generator = torch.Generator().manual_seed(seed)
    E, T, _ = env.fidelity.shape
    allowed = env.allowed.cpu()  # where the generator is
    previous, rows, out = torch.full((E,), env.start), torch.arange(E), []
    for t in range(T):
        odds = allowed[rows, t, previous].float()
        previous = torch.multinomial(odds, 1, generator=generator)[:, 0]
        out.append(previous)
    return torch.stack(out, 1).to(env.fidelity.device)


def oracle(env: RankEnv) -> Actions:
    """The allowed sequence with the largest sum of rewards: no policy under the mask gets more."""
    E, T, A = env.fidelity.shape
    ahead, best = env.fidelity.new_zeros(E, A), []
    rewards = env.rewards.masked_fill(~env.allowed, -torch.inf)
    for t in reversed(range(T)):
        ahead, action = (rewards[:, t] + ahead[:, None]).max(-1)
        best.append(action)
    options = dict(device=ahead.device)
    previous, rows, out = torch.full((E,), env.start, **options), torch.arange(E, **options), []
    for action in reversed(best):
        previous = action[rows, previous]
        out.append(previous)
    return torch.stack(out, 1)
