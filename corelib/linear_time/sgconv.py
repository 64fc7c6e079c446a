"""SGConv: what makes convolutional models great on long sequences (arXiv 2210.09298).

Idea: a convolution kernel as long as the sequence needs two things only. Its parameters grow with
the *logarithm* of its length, and its taps get smaller with the distance.

    kernel = [piece_0 | piece_1 | stretch(piece_2, 2) | stretch(piece_3, 4) | ...] / norm
    piece_i is scaled by decay^(count - 1 - i)                          count = 1 + log2(L / k0)

Every piece has ``k0`` taps of its own. All but the first are stretched (linear interpolation) so
that each is as long as everything before it: fine detail nearby, broad strokes far away.

| here    | paper, its code   | what                                              | shape          |
|:--------|:------------------|:--------------------------------------------------|:---------------|
| pieces  | w_i, kernel_list  | learned, normal at first                          | (count, C, k0) |
| decay   | alpha, multiplier | how much a piece outweighs the next, 2            | () or (C,)     |
| norm    | Z, kernel_norm    | L2 norm of the kernel at the start, never changed | (C, 1)         |
| taps    | k0 2^(count - 1)  | length of the whole kernel, at least ``l_max``    |                |
| skip    | D                 | the input itself                                  | (C,)           |

Exact: kernel, convolution, pieces with a carried state, both directions. The released layer takes
``norm`` in its first forward pass, here it is taken when the layer is made: the same numbers, over
all ``taps``, and the forward pass writes nothing. Its kernels go on through padding and cropping
exactly as here. Left out: several kernels a channel, dropout, cosine starts, a learned decay. The
paper's separate learning rate for ``pieces`` (0.001) is the optimiser's business.
Cost: ``C k0 count`` parameters; ``O(L log L)`` time a channel, of which the kernel takes ``O(L)``.
Oracles: ``numpy.interp`` for the kernel, ``scipy.signal.fftconvolve`` for the layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .shared import LongConvolution, check_count

Pieces = Float[Tensor, "count C k0"]
Kernel = Float[Tensor, "C L"]

# --- the reference --------------------------------------------------------------------------------


def sgconv_kernel_reference(
    pieces: Pieces, L: int, decay: float | Float[Tensor, " C"] = 2.0
) -> Kernel:
    """The kernel, tap by tap: find its piece, its place in the piece, and mix two neighbours."""
    scaled, k0 = _scaled(pieces, L, decay), pieces.shape[2]
    taps = []
    for lag in range(L):
        i = (lag // k0).bit_length()  # the piece that holds this lag
        if i >= len(pieces):
            taps.append(torch.zeros_like(pieces[0, :, 0]))
            continue
        start, stretch = (k0 << i) >> 1 if i else 0, max(1, (1 << i) >> 1)
        place = max(0.0, (lag - start + 0.5) / stretch - 0.5)  # centres of taps stay centres
        left = int(place)
        right, share = min(left + 1, k0 - 1), place - left
        taps.append((1 - share) * scaled[i, :, left] + share * scaled[i, :, right])
    return torch.stack(taps, -1)


# --- the fast forms -------------------------------------------------------------------------------


def sgconv_kernel(pieces: Pieces, L: int, decay: float | Float[Tensor, " C"] = 2.0) -> Kernel:
    """The first ``L`` taps of the kernel; zeros beyond the last piece.

    Args:
        pieces: the nearest first.
        decay: each piece outweighs the next by this factor; one number, or one for each channel.

    Raises ValueError or TypeError for shapes or numbers that do not fit.
    """
    scaled, stretched, length = _scaled(pieces, L, decay), [], 0
    for i, piece in enumerate(scaled):
        if length >= L:
            break
        stretched.append(_stretch(piece, 1 << max(0, i - 1), L - length))
        length += stretched[-1].shape[1]
    return F.pad(torch.cat(stretched, 1), (0, L - length))


def sgconv_kernel_sum(pieces: Pieces, L: int, decay: float | Float[Tensor, " C"] = 2.0) -> Kernel:
    """The paper's other form: all pieces start at lag 0, each twice as long as the one before.

    They are added, so near taps are made of every piece and far ones of the last only.
    """
    kernel = pieces.new_zeros(pieces.shape[1], L)
    for i, piece in enumerate(_scaled(pieces, L, decay)):
        stretched = _stretch(piece, 1 << i, L)
        kernel = kernel + F.pad(stretched, (0, L - stretched.shape[1]))
    return kernel


def piece_count(L: int, k0: int = 64) -> int:
    """How many pieces of ``k0`` taps reach over ``L``: ``1 + ceil(log2(L / k0))``, at least 1."""
    check_count("L", L)
    check_count("k0", k0)
    return 1 + (-(-L // k0) - 1).bit_length()


# --- the layer ------------------------------------------------------------------------------------


class SGConv(LongConvolution):
    """The paper's layer, a sequence mixer on ``(B, L, C)``: convolution, GELU, a map of channels.

    Args:
        channels: width of the input and of the output.
        l_max: the kernel reaches at least so far; ``taps`` says how far exactly.
        k0: taps of a piece.
        decay: how much a piece outweighs the next at the start; one number, or ``(C,)``.
    """

    def __init__(
        self,
        channels: int,
        l_max: int,
        *,
        k0: int = 64,
        decay: float | Float[Tensor, " C"] = 2.0,
    ):
        count = piece_count(l_max, k0)
        super().__init__(channels, k0 << (count - 1))
        self.pieces = nn.Parameter(torch.randn(count, channels, k0))
        decay = torch.as_tensor(decay, dtype=self.skip.dtype)
        self.register_buffer("decay", decay.expand(channels).clone())
        whole = sgconv_kernel(self.pieces.detach(), self.taps, self.decay)
        self.register_buffer("norm", whole.norm(dim=1, keepdim=True))
        self.out = nn.Linear(channels, channels)

    def kernel(self, L: int) -> Float[Tensor, "C K"]:
        """The first ``min(L, taps)`` taps of each channel, without the skip connection."""
        return sgconv_kernel(self.pieces, min(L, self.taps), self.decay) / self.norm

    def mix(self, y: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """GELU, then a linear map of the channels."""
        return self.out(F.gelu(y))


def _scaled(pieces: Tensor, L: int, decay: float | Tensor) -> Tensor:
    """The pieces times ``decay^(count - 1 - i)``; checks what the kernels take."""
    if pieces.dim() != 3 or not pieces.numel():
        raise ValueError(f"pieces: expected (count, C, k0), got shape {tuple(pieces.shape)}")
    check_count("L", L)
    decay = torch.as_tensor(decay, dtype=pieces.dtype, device=pieces.device)
    if decay.shape not in ((), pieces.shape[1:2]):
        got = tuple(decay.shape)
        raise ValueError(f"decay: expected a number or shape ({pieces.shape[1]},), got {got}")
    if not bool((decay > 0).all()):
        raise ValueError(f"decay: expected numbers above 0, got {decay.tolist()}")
    power = torch.arange(len(pieces) - 1, -1, -1, dtype=pieces.dtype, device=pieces.device)
    return pieces * (decay.reshape(-1, 1) ** power[:, None, None])


def _stretch(piece: Float[Tensor, "C k0"], factor: int, room: int) -> Float[Tensor, "C K"]:
    """``factor`` times as long by linear interpolation, at most ``room`` taps of it."""
    needed = piece[None, :, : -(-room // factor) + 1]
    if factor > 1:
        needed = F.interpolate(needed, scale_factor=factor, mode="linear")
    return needed[0, :, : min(room, factor * piece.shape[1])]


def example() -> dict:
    """Three pieces of two taps on two channels: a kernel of 2 + 2 + 4 taps.

    >>> sgconv_kernel(**example())[0]
    tensor([ 4.0000, -4.0000,  2.0000,  6.0000,  1.0000,  0.5000, -0.5000, -1.0000])
    """
    pieces = torch.tensor([[[1.0, -1], [0, 2]], [[1, 3], [1, 0]], [[1, -1], [0.5, 0.5]]])
    return dict(pieces=pieces, L=8, decay=2.0)
