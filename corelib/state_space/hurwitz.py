"""S4 whose rank-one part is not tied: what SaShiMi (arXiv 2202.09729, section 4.1) does away with.

S4 was published with two vectors, and SaShiMi gives it one:

    A = diag(poles) - p q*     untied: `untied_matrix`, `UntiedS4`
    A = diag(poles) - p p*     tied:   `corelib.state_space.dplr.dense_form`, `S4`

The Hermitian part of the tied matrix is ``diag(Re poles) - p p*``. With ``Re poles < 0`` it is
negative definite, so that every eigenvalue of ``A`` lies left of the axis (``A`` is *Hurwitz*),
whatever training makes of ``p``. The untied matrix has no such guarantee, and convolutions do not
tell: the kernel's formula holds for unstable systems too. Only the recurrence explodes.

| here  | paper  | what                                    | shape             |
|:------|:-------|:----------------------------------------|:------------------|
| p, q  | p, q   | rank-one part, one of each pair         | (..., N/2)        |
| poles | Lambda | diagonal part, one of each pair         | (..., N/2)        |

Oracle: ``torch.linalg.eigvals`` of matrices with every pole and its conjugate written out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives.discretise import bilinear

from .dplr import StepForm, dense_form, krylov, output_row, step_form, to_pairs, to_real
from .dplr_kernel import s4_kernel_untied
from .s4 import S4
from .shared import Dplr, Pairs


def spectral_abscissa(A: Float[Tensor, "*batch N N"]) -> Float[Tensor, "*batch"]:
    """The largest real part of an eigenvalue: below 0, every motion dies out."""
    return torch.linalg.eigvals(A).real.amax(-1)


def untied_matrix(system: Dplr, q: Pairs) -> Float[Tensor, "*channels N N"]:
    """``diag(poles) - p q*``, dense and real, on states as `to_real` has them."""
    A, _ = dense_form(system)
    p = to_real(system.p)
    return A - 2 * p[..., :, None] * (to_real(q) - p)[..., None, :]


class UntiedS4(S4):
    """`S4` with a second vector ``q``, which starts where ``p`` does: the same system at first."""

    SYSTEM = (*S4.SYSTEM, "q")

    def __init__(self, channels: int, state_size: int = 64, length: int = 1024, **options: float):
        super().__init__(channels, state_size, length, **options)
        self.q = nn.Parameter(self.p.detach().clone())

    @classmethod
    def from_tied(cls, layer: S4) -> UntiedS4:
        """The same numbers in the untied form."""
        untied = cls(layer.channels, 2 * layer.frequency.shape[-1], layer.length)
        untied.to(layer.p).load_state_dict(layer.state_dict() | {"q": layer.p.detach()})
        return untied

    def matrix(self) -> Float[Tensor, "C N N"]:
        """The continuous system's matrix, dense and real."""
        return untied_matrix(self.system(), torch.view_as_complex(self.q))

    def discrete(self) -> tuple[Float[Tensor, "C N N"], Float[Tensor, "C N"]]:
        A, B = self.matrix(), to_real(self.system().B)
        A_bar, B_bar = bilinear(A, B[..., None], self.log_step.exp())
        return A_bar, B_bar[..., 0]

    def step_form(self) -> StepForm:
        """`S4.step_form`, in which ``q`` is what the state is multiplied by."""
        system, step = self.system(), self.log_step.exp()[:, None]
        q, p = torch.view_as_complex(self.q), system.p
        form = step_form(system, self._true_row(), step[:, 0])
        loop = 1 + step * (q.conj() * p / (1 - step / 2 * system.poles)).real.sum(-1, keepdim=True)
        return form._replace(second=form.first / loop, p=q)

    def _true_row(self) -> Pairs:
        """``C`` out of ``C_tilde``, in float64; of an unstable system its entries are tiny."""
        A_bar, _ = self.discrete()
        power = torch.linalg.matrix_power(A_bar.double(), self.length)
        row = output_row(torch.view_as_complex(self.C_tilde)).double()
        eye = torch.eye(row.shape[-1], dtype=row.dtype, device=row.device)
        row = torch.linalg.solve((eye - power).mT, row)
        return to_pairs(row / 2).conj().to(self.system().p.dtype)

    def kernel(self, L: int) -> Float[Tensor, "C L"]:
        """As `S4.kernel` up to ``length``; beyond, by the powers of the matrix."""
        if L <= self.length:
            C_tilde, q = torch.view_as_complex(self.C_tilde), torch.view_as_complex(self.q)
            step = self.log_step.exp()
            return s4_kernel_untied(self.system(), q, C_tilde, step, self.length)[:, :L]
        columns = krylov(*self.discrete(), L)
        return torch.einsum("cn,cnt->ct", output_row(self._true_row()), columns)


def untie(model: nn.Module) -> nn.Module:
    """Replace every `S4` inside ``model`` by an `UntiedS4` with its numbers, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is S4:
                setattr(module, name, UntiedS4.from_tied(child))
    return model


def abscissas(model: nn.Module) -> Float[Tensor, " systems"]:
    """`spectral_abscissa` of every channel of every `S4` inside ``model``, tied or not."""
    with torch.no_grad():
        matrices = [
            x.matrix() if isinstance(x, UntiedS4) else dense_form(x.system())[0]
            for x in model.modules()
            if isinstance(x, S4)
        ]
        return torch.cat([spectral_abscissa(A.double()) for A in matrices])
