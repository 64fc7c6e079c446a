"""A report on any sequence layer, from outside: what the surveys of this family compare by.

`examine` runs the probes of `corelib.measure.probes` over a mixer on ``(B, L, C)``:

    conforms     one pass == pieces == step after step; no output sees a later input
    variation    how much the response to an impulse depends on place and content; 0 if LTI
    coupled      the most numbers of state that act on each other in one step
    ring         the magnitudes of the eigenvalues of one step
    halflife     lags after which the response to an impulse stays under half of its largest
    state        bytes carried, by length             exponent    of counted work over the length

Everything in float64 and counted, not timed: the same on every machine. A layer is reported on as
it is given: half-lives and rings of an untrained one are those of its initialisation.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.measure import fit_exponent, probes
from corelib.measure.work import count_work
from corelib.testing import conformance


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    Attributes:
        conforms: empty if parallel == pieces == steps, causal; else the rule that does not hold.
        future: the largest influence of a later input, over the largest of all.
        variation: relative change of the response to an impulse, by place and content.
        coupled: the largest set of state numbers that act on each other; None if the state grows.
        ring: the least and the largest ``|eigenvalue|`` of the state's recurrence, without zeros.
        halflife: lags, of the response without the present input.
        field: how many of the latest inputs make 90 % of what reaches the last output.
        state: length -> bytes of one sequence in float64.
        work: length -> counted operations. exponent: fitted to them.
    """

    conforms: str
    future: float
    variation: float
    coupled: int | None
    ring: tuple[float, float] | None
    halflife: float
    field: int
    state: dict[int, int]
    work: dict[int, int]
    exponent: float

    @property
    def lti(self) -> bool:
        """Linear and time-invariant, up to rounding: one kernel says it all."""
        return self.variation < 1e-9

    @property
    def state_grows(self) -> bool:
        return len(set(self.state.values())) > 1


def examine(
    mixer: nn.Module,
    width: int,
    *,
    length: int = 48,
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512),
    seed: int = 0,
) -> Report:
    """Run the whole harness over a sequence mixer on ``(B, L, width)``, in float64.

    Args:
        length: of the random background in which impulses are placed.
        lengths: at which state and work are counted; five or more.
    """
    mixer = copy.deepcopy(mixer).double().eval()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, width, generator=generator, dtype=torch.float64)

    def layer(x: Tensor) -> Tensor:
        return mixer(x)[0]

    influences = probes.influence(layer, x[:, :16])
    state, work = _by_length(mixer, width, lengths)
    with torch.no_grad():
        here = mixer(x)[1]
    jacobian = probes.state_jacobian(mixer, x[:, 0], here)
    return Report(
        conforms=_conforms(mixer, x.expand(2, -1, -1)[:, :9]),
        future=probes.future_share(influences),
        variation=probes.variation(layer, x, length // 3),
        coupled=None if jacobian is None else coupled_states(jacobian),
        ring=None if jacobian is None else eigenvalue_ring(jacobian),
        halflife=probes.memory_halflife(probes.impulse_response(layer, x)[1:]),
        field=probes.effective_receptive_field(influences),
        state=state,
        work=work,
        exponent=fit_exponent(work, work.values()).value,
    )


def _conforms(mixer: nn.Module, x: Tensor) -> str:
    try:
        conformance(mixer, x, leak=1e-12)
    except AssertionError as broken:
        return str(broken)
    return ""


def _by_length(mixer: nn.Module, width: int, lengths: tuple[int, ...]) -> tuple[dict, dict]:
    """Bytes of state after, and operations for, so many positions."""
    state, work = {}, {}
    for n in lengths:
        x, results = torch.zeros(1, n, width, dtype=torch.float64), []
        with torch.no_grad():
            work[n] = count_work(lambda x=x, results=results: results.append(mixer(x)))
            state[n] = probes.state_bytes(results[0][1])
    return state, work


def coupled_states(jacobian: Float[Tensor, "n n"]) -> int:
    """The largest set of states that all act on each other, directly or through one another.

    Of a diagonal recurrence 1 (2 where a complex number is two real ones), of a dense one its size.
    """
    reach = jacobian.abs() > 1e-12 * jacobian.abs().max()
    reach = (reach | torch.eye(len(reach), dtype=torch.bool, device=reach.device)).double()
    for _ in range(max(1, (len(reach) - 1).bit_length())):
        reach = (reach @ reach).clamp(max=1)
    return int((reach * reach.T).sum(1).max())


def eigenvalue_ring(jacobian: Float[Tensor, "n n"]) -> tuple[float, float] | None:
    """The least and the largest magnitude of its eigenvalues; those of shift registers, 0, apart.

    None if all are 0. A register of ``W`` steps shows up as eigenvalues of ``eps ** (1 / W)``, so
    that what is below 0.01 counts as 0.
    """
    size = torch.linalg.eigvals(jacobian).abs()
    size = size[size > 1e-2]
    return (size.min().item(), size.max().item()) if len(size) else None
