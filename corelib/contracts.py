"""The small protocols that every part of the lab keeps.

Sizes, everywhere: ``B`` batch, ``H`` query heads, ``G`` key/value heads (grouped-query
attention: ``G`` divides ``H`` and query head ``h`` reads key head ``h // (H // G)``), ``L`` query
length, ``S`` key length, ``D`` head width, ``C`` model width, ``N`` state size, ``K``/``V`` key and
value width, ``vocab`` vocabulary.

These are structural types (`typing.Protocol`): nothing has to inherit from them.
`corelib.testing.conformance` checks the behaviour that a type cannot express.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class AttentionFn(Protocol):
    """``f(q, k, v, *, causal, scale=None) -> out``; ``(out, lse)`` with ``return_lse=True``.

    ``q (B, H, L, D)``, ``k (B, G, S, D)``, ``v (B, G, S, V)``, ``out (B, H, L, V)``,
    ``lse (B, H, L)``: the natural logarithm of the sum of exponentials of the scaled scores.

    * ``scale=None`` means ``D ** -0.5``.
    * Queries align with the last keys: with ``L != S``, query ``i`` has position ``i + S - L``.
    * ``window=w``: causal, a query sees itself and the ``w - 1`` keys before it; not causal, the
      keys with ``|i - j| < w``.
    * A row that may see no key returns zeros with ``lse = -inf``, never NaN.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **kwargs: Any): ...


@runtime_checkable
class SequenceMixer(Protocol):
    """A layer on ``(B, L, C)`` that can also run one position at a time.

    ``forward(x, state)`` over a whole stretch, over its pieces with the state carried along, and
    ``step`` by ``step`` all give the same outputs.
    """

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]: ...

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """``x_t (B, C)`` -> ``y_t (B, C)`` and the next state."""
        ...

    def init_state(self, batch: int) -> Any: ...


@runtime_checkable
class KVCache(Protocol):
    """What a decoder needs of a key/value cache. Layers may be absent."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Add ``k, v (B, G, n, D)`` behind what ``layer`` holds."""
        ...

    def attend(self, layer: int, q: Tensor, *, scale: float | None = None) -> Tensor:
        """Attention of ``q (B, H, n, D)``, aligned with the last keys, over what is held."""
        ...

    def crop(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        ...

    def gather_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order (rows may repeat)."""
        ...

    def realign(self, lengths: Tensor) -> None:
        """Keep the first ``lengths[b]`` positions of row ``b`` and align rows to the right."""
        ...

    def bytes(self, tier: str = "device") -> int:
        """Bytes held in ``tier`` (``"device"`` or ``"host"``)."""
        ...

    def __len__(self) -> int: ...


@runtime_checkable
class LanguageModel(Protocol):
    """``ids (B, L) -> logits (B, L, vocab)``; with a cache, ``ids`` continue what it holds."""

    def __call__(self, ids: Tensor, cache: KVCache | None = None) -> Tensor: ...


@runtime_checkable
class Chooser(Protocol):
    """Every random choice of a decoder: ``probs (..., vocab) -> index (...)``.

    Sampling, taking the maximum and enumerating all outcomes are three choosers.
    """

    def __call__(self, probs: Tensor) -> Tensor: ...
