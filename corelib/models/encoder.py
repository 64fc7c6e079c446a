"""The masked language model: the decoder's blocks, reading in both directions."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from .decoder import Decoder


class Encoder(Decoder):
    """``ids (B, L) -> logits (B, L, vocab)``: position ``t`` says which token stands *at* ``t``.

    Hidden tokens are given as ``<|mask|>``. Every position sees every other one.
    """

    causal = False

    def forward(self, ids: Int[Tensor, "B L"], cache=None) -> Float[Tensor, "B L vocab"]:
        if cache is not None:
            raise ValueError("cache: an encoder reads in both directions and takes None")
        return super().forward(ids)
