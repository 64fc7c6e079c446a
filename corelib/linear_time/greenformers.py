"""Greenformers: low rank in the weights, or low rank along the sequence (arXiv 2108.10808).

Idea: a transformer's cost has a part that the weights make (``12 D^2`` multiplications a token)
and a part that the length makes (``2 n D``). Thin factors of the weights (the Low-Rank
Transformer) cut the first, Linformer cuts the second: short texts want one, long texts the other.

    y = W x + b                ->   y = U (V x) + b          W (m, n) ~= U (m, r) V (r, n): `LED`
    softmax(Q K^T) V           ->   softmax(Q (E K)^T) (F V)      E, F (k, length): Linformer

    a token and layer:   full 12 D^2 + 2 n D      LRT 18 D r + 2 n D      Linformer 12 D^2 + 4 k D
    LRT and Linformer cost the same at   n* = 6 D + 2 k - 9 r             (feed-forward 4 D wide)

Factors pay when ``r (m + n) < m n``: the *limit rank* of a layer is ``m n / (m + n)``, half of the
width for a square one. A rank below 1 is a share of that limit.

| here          | paper                      | what                                          |
|:--------------|:---------------------------|:----------------------------------------------|
| LED           | linear encoder-decoder     | ``first`` to r channels, ``second`` to m      |
| CED           | convolutional the same     | the window in ``first``, ``second`` is 1 wide |
| auto_fact     | Greenformer (the library)  | swaps all layers of a model that pay for it   |
| svd_factor    | SVD initialisation         | U s and V^T: the nearest of rank r            |
| snmf_factor   | semi-NMF initialisation    | a right factor without negative numbers       |
| random_factor | by design                  | for training from scratch                     |

The two units are in `factored_layers`, the layers to compare in `linformer`, the formulas and the
counting in `low_rank_bill`; all of them are here too.

Exact: at full rank the model computes what it did; below, a layer is off by the tail of its
spectrum and by no less. What the *model* loses by that, fine-tuning has to win back. Linformer
with ``E = F = I`` is attention; it mixes all positions, so it is no causal layer. Left out: the
thesis's training runs. The constants of the cost are ours (feed-forward 4 D wide); the thesis
draws its line near 512 tokens by measured time, these formulas at BERT-base's width draw it later.
Unlike the released library, the given model is left as it is, a weight that two modules share is
not split, and the SVD is not randomised.
Cost: r (m + n) parameters and multiplications a token for m n. Oracles: ``torch.linalg.svd``;
scikit-learn's NMF; `corelib.primitives.attention`; operations counted on the running model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives.svd import svd_factors

from .factored_layers import CED, LED
from .linformer import (
    LinformerAttention,
    SelfAttention,
    TransformerLayer,
    linformer_attention,
)
from .low_rank_bill import (
    Cost,
    EnergyEstimate,
    crossover,
    energy_estimate,
    flops_params_memory,
    layer_macs,
    measured_crossover,
)

__all__ = [
    "CED",
    "LED",
    "Cost",
    "EnergyEstimate",
    "LinformerAttention",
    "SelfAttention",
    "TransformerLayer",
    "auto_fact",
    "crossover",
    "energy_estimate",
    "example",
    "flops_params_memory",
    "layer_macs",
    "limit_rank",
    "linformer_attention",
    "measured_crossover",
    "random_factor",
    "snmf_factor",
    "svd_factor",
]

Weight = Float[Tensor, "m n"]
Factors = tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]
Solver = Callable[[Tensor, int], tuple[Tensor, Tensor]]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# --- two thin matrices for one --------------------------------------------------------------------


def svd_factor(W: Weight, rank: int) -> Factors:
    """``U diag(s)`` and ``V^T``: nothing of this rank is nearer to ``W``."""
    return svd_factors(W, rank)


def snmf_factor(W: Weight, rank: int, *, steps: int = 50) -> Factors:
    """Semi-NMF: ``W ~= U V`` with no negative number in ``V``, which adds up parts.

    ``U`` by least squares, ``V`` by the multiplicative step under which the error never grows
    (Ding, Li & Jordan, "Convex and semi-nonnegative matrix factorizations", 2010), starting from
    the sizes of the singular vectors.
    """
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    _, right = svd_factors(wide, rank)
    V = right.abs() + 0.2 * right.abs().mean()
    for _ in range(steps):
        U = torch.linalg.lstsq(V.mT, wide.mT).solution.mT
        pull, gram = U.mT @ wide, U.mT @ U
        up = pull.clamp_min(0) + (-gram).clamp_min(0) @ V
        down = (-pull).clamp_min(0) + gram.clamp_min(0) @ V
        V = V * (up / down.clamp_min(torch.finfo(wide.dtype).tiny)).sqrt()
    U = torch.linalg.lstsq(V.mT, wide.mT).solution.mT
    return U.to(W.dtype), V.to(W.dtype)


def random_factor(W: Weight, rank: int) -> Factors:
    """Factors to train from scratch; their product is as large as a linear layer's usual weight."""
    m, n = W.shape
    U, V = W.new_empty(m, rank), W.new_empty(rank, n)
    bound = (3 / rank) ** 0.5
    return U.uniform_(-bound, bound), V.uniform_(-(n**-0.5), n**-0.5)


# --- a whole model --------------------------------------------------------------------------------


def limit_rank(m: int, n: int) -> int:
    """From this rank on two factors of an ``(m, n)`` matrix hold as many numbers as it, or more."""
    return -(-m * n // (m + n))


def auto_fact(
    module: nn.Module,
    rank: int | float,
    solver: Solver = svd_factor,
    submodules: Sequence[nn.Module | str] | None = None,
    *,
    even_if_larger: bool = False,
) -> nn.Module:
    """A copy of ``module`` with its linear layers and convolutions as `LED` and `CED` units.

    Takes any module: ``nn.Linear``, Hugging Face's ``Conv1D``, and convolutions without groups are
    swapped where two factors are smaller than the matrix; the others stay, as do subclasses of
    ``nn.Linear`` (whose owners read the weight) and weights that several modules share.

    Args:
        rank: a whole number, or a share between 0 and 1 of each layer's `limit_rank`.
        solver: ``(weight (m, n), rank) -> U (m, rank), V (rank, n)``.
        submodules: only inside of these, given as modules or by their dotted names.
        even_if_larger: swap also where it does not pay, at most at full rank.

    Raises ValueError or TypeError for a rank or a submodule that does not fit.
    """
    _check_rank(rank)
    chosen = _inside(module, submodules)
    old = copy.deepcopy(module)
    eligible = {layer for name, layer in old.named_modules() if chosen(name)}
    owners: dict[int, int] = {}
    for layer in old.modules():
        for parameter in layer.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    swapped: dict[nn.Module, nn.Module] = {}

    def swap(layer: nn.Module) -> nn.Module:
        if layer not in swapped:
            alone = layer in eligible and owners.get(id(getattr(layer, "weight", None))) == 1
            swapped[layer] = _unit(layer, rank, solver, even_if_larger) if alone else layer
            if swapped[layer] is layer and not isinstance(layer, LED | CED):
                for name, child in layer._modules.items():
                    layer._modules[name] = None if child is None else swap(child)
        return swapped[layer]

    return swap(old)


def _unit(layer: nn.Module, rank: int | float, solver: Solver, even_if_larger: bool) -> nn.Module:
    """The unit that stands for ``layer``, or ``layer`` where there is none or it does not pay."""
    transposed = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")  # Hugging Face's
    convolves = type(layer) in CONVOLUTIONS and layer.groups == 1
    if not (type(layer) is nn.Linear or transposed or convolves):
        return layer
    W = layer.weight.detach()
    W = W.mT.contiguous() if transposed else W.flatten(1)
    (m, n), limit = W.shape, limit_rank(*W.shape)
    kept = min(m, n, int(rank * limit) if rank < 1 else rank)
    if kept < 1 or (kept >= limit and not even_if_larger):
        return layer
    bias = None if layer.bias is None else layer.bias.detach().clone()
    unit = CED(layer, *solver(W, kept), bias) if convolves else LED(*solver(W, kept), bias)
    return unit.train(layer.training).requires_grad_(layer.weight.requires_grad)


def _check_rank(rank: int | float) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not whole and not isinstance(rank, float):
        raise TypeError(f"rank: expected a number, got {rank!r}")
    if not (rank >= 1 if whole else 0 < rank < 1):
        raise ValueError(f"rank: expected a whole number of at least 1 or a share < 1, got {rank}")


def _inside(module: nn.Module, submodules) -> Callable[[str], bool]:
    """Whether a dotted name lies in one of ``submodules``."""
    if submodules is None:
        return lambda name: True
    names = {layer: name for name, layer in module.named_modules()}
    roots = [names.get(s) if isinstance(s, nn.Module) else s for s in submodules]
    for given, root in zip(submodules, roots, strict=True):
        if root is None or root not in names.values():
            raise ValueError(f"submodules: expected parts of the module, got {given!r}")
    return lambda name: any(not r or name == r or name.startswith(f"{r}.") for r in roots)


def example() -> dict:
    """A matrix whose spectrum halves from one to the next.

    >>> [tuple(part.shape) for part in svd_factor(**example())]
    [(6, 2), (2, 4)]
    """
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 4, generator=generator)).Q for n in (6, 4))
    return dict(W=u * 0.5 ** torch.arange(4.0) @ v.mT, rank=2)
