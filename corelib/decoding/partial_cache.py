"""Key/value caches that hold fewer positions than they count: for models that draft.

A drafter may see less than the target: its mistakes cost time and never correctness. All three
caches here keep the contract (`corelib.contracts.KVCache`); ``len`` is the number of positions that
went by, so that a model numbers its next token rightly, and ``held`` how many of them are there.

* `PartialCache`: holds everything it is given; ``queries`` has the last query of each layer.
* `SinkCache` (StreamingLLM, arXiv 2309.17453): the first ``sinks`` and the last ``recent``.
* `RetrievalKVCache` (TriForce, arXiv 2404.11912): the chunks of a prompt that its last query likes
  best, and all that came behind the prompt.

``read`` adds up the bytes of keys and values that `attend` has read. Keys are stored as they are
handed in, rotated for their true positions; the released TriForce rotates those of its sink cache
by their slot instead.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..primitives import attention
from ..primitives.block_scores import grouped_block_scores
from ..primitives.gather_decode import take_rows


class PartialCache:
    """Keys and values ``(B, G, held, D)`` of every layer; ``skipped`` positions went by unheld."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.queries: dict[int, Tensor] = {}  # (B, H, 1, D): the last one of each layer
        self.skipped = 0
        self.read = 0

    def append(self, layer: int, k: Float[Tensor, "B G n D"], v: Float[Tensor, "B G n V"]) -> None:
        """Add ``k, v`` behind what ``layer`` holds; a new layer starts empty."""
        if layer in self.layers:
            held = self.layers[layer]
            if held[0].shape[:2] != k.shape[:2] or held[0].shape[3] != k.shape[3]:
                raise ValueError(
                    f"k: layer {layer} holds (B, G, ·, D) = {tuple(held[0].shape)}, "
                    f"got {tuple(k.shape)}"
                )
            k, v = torch.cat([held[0], k], 2), torch.cat([held[1], v], 2)
        self.layers[layer] = (k, v)

    def attend(
        self, layer: int, q: Float[Tensor, "B H n D"], *, scale: float | None = None
    ) -> Float[Tensor, "B H n V"]:
        """Causal attention of ``q``, aligned with the last keys, over what ``layer`` holds."""
        if layer not in self.layers:
            raise ValueError(f"layer: nothing held for layer {layer}, only {sorted(self.layers)}")
        k, v = self.layers[layer]
        self.queries[layer] = q[:, :, -1:]
        self.read += k.nbytes + v.nbytes
        return attention(q, k, v, causal=True, scale=scale)

    def crop(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        if not self._whole_from() <= length <= len(self):
            raise ValueError(
                f"length: expected {self._whole_from()} to {len(self)} (before that, not every "
                f"position is held), got {length}"
            )
        self._map(lambda x: x[:, :, : length - self.skipped])

    def _whole_from(self) -> int:
        """The position from which on all are held, in their order."""
        return 0

    def gather_rows(self, rows: Int[Tensor, " R"]) -> None:
        """Keep these batch rows, in this order (rows may repeat)."""
        self._map(lambda x: x[rows])
        self.queries = {n: q[rows] for n, q in self.queries.items()}

    def realign(self, lengths: Int[Tensor, " B"]) -> None:
        """Rows of one length only: what is skipped is the same for all."""
        if len(set(lengths.tolist())) != 1:
            raise ValueError(f"lengths: expected equal ones, got {lengths.tolist()}")
        self.crop(int(lengths[0]))

    def bytes(self, tier: str = "device") -> int:
        """Bytes of keys and values held; nothing is ever on the host."""
        if tier not in ("device", "host"):
            raise ValueError(f"tier: expected 'device' or 'host', got {tier!r}")
        held = sum(x.nbytes for pair in self.layers.values() for x in pair)
        return held if tier == "device" else 0

    @property
    def held(self) -> int:
        """Positions whose keys and values are there."""
        return max((k.shape[2] for k, _ in self.layers.values()), default=0)

    def __len__(self) -> int:
        return self.held + self.skipped

    def _map(self, change) -> None:
        self.layers = {n: (change(k), change(v)) for n, (k, v) in self.layers.items()}


class SinkCache(PartialCache):
    """The first ``sinks`` and the last ``recent`` positions, once `trim` was called.

    Between two trims nothing is dropped, so that drafted positions can be taken back.
    """

    def __init__(self, sinks: int = 16, recent: int = 240):
        super().__init__()
        for name, value, least in (("sinks", sinks, 0), ("recent", recent, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.sinks, self.recent = sinks, recent

    def trim(self) -> None:
        """Drop what is neither among the first nor among the last."""
        drop = self.held - self.sinks - self.recent
        if drop > 0:
            first, last = self.sinks, self.sinks + drop
            self._map(lambda x: torch.cat([x[:, :, :first], x[:, :, last:]], 2))
            self.skipped += drop

    def _whole_from(self) -> int:
        return self.sinks + self.skipped if self.skipped else 0


def choose_chunks(
    q: Float[Tensor, "B H 1 D"], k: Float[Tensor, "B G S D"], chunk: int, count: int
) -> Int[Tensor, "B G m"]:
    """Chunk 0, then the ``count - 1`` others whose mean key has the largest product with ``q``.

    In falling order. ``S`` fills whole chunks. Query heads that share a key head add up their
    products (the paper's models share none). Chunk means and products are one operation, on a GPU
    the Triton kernel of `corelib.kernels.block_scores`.
    """
    if k.shape[2] % chunk:
        raise ValueError(f"k: expected whole chunks of {chunk}, got {k.shape[2]} tokens")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if k.shape[2] == 0:
        return torch.zeros(*k.shape[:2], 0, dtype=torch.long, device=k.device)
    scores = grouped_block_scores(q, k, chunk, causal=False)[:, :, 0]
    scores[:, :, 0] = torch.inf
    return scores.topk(min(count, scores.shape[2]), -1).indices


class RetrievalKVCache(PartialCache):
    """At most ``budget`` positions of another cache: chosen chunks, then the newest.

    `build` chooses once, by the last query of the prompt; `refresh` takes over what the other cache
    has come to hold. Newer positions take the place of the chunks that scored lowest; chunk 0 stays
    (so the cache outgrows its budget when more than ``budget - chunk`` positions are new). A prompt
    that does not fill its last chunk has the rest of it treated as new.
    """

    def __init__(self, budget: int = 4096, chunk: int = 8):
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1, got {chunk}")
        if budget < chunk or budget % chunk:
            raise ValueError(
                f"budget: expected a positive multiple of chunk, {chunk}, got {budget}"
            )
        self.budget, self.chunk = budget, chunk
        self.chunks: dict[int, Tensor] = {}  # (B, G, m): what each layer chose, best first
        self.prompt = 0  # positions in whole chunks
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def built(self) -> bool:
        return bool(self.chunks)

    def build(self, full: PartialCache) -> None:
        """Choose chunks of the prompt that ``full`` holds, and copy them."""
        if full.skipped or not full.queries:
            raise ValueError("full: expected a cache that holds a whole prompt and has attended")
        self.prompt = len(full) // self.chunk * self.chunk
        steps = torch.arange(self.chunk)
        for layer, (k, v) in full.layers.items():
            q, k = full.queries[layer], k[:, :, : self.prompt]
            ids = choose_chunks(q, k, self.chunk, self.budget // self.chunk)
            places = (ids[..., None] * self.chunk + steps.to(ids.device)).flatten(2)
            self.chunks[layer] = ids
            self._chosen[layer] = take_rows(k, places), take_rows(v[:, :, : self.prompt], places)
        self.refresh(full)

    def refresh(self, full: PartialCache) -> None:
        """Hold what was chosen, as far as there is room, and all of ``full`` behind the prompt."""
        if not self.built or len(full) < self.prompt:
            raise ValueError(f"full: expected a prompt of {self.prompt} that was built, first")
        room = max(self.budget - (len(full) - self.prompt), self.chunk)
        for layer, (k, v) in full.layers.items():
            pairs = zip(self._chosen[layer], (k, v), strict=True)
            k, v = (torch.cat([c[:, :, :room], x[:, :, self.prompt :]], 2) for c, x in pairs)
            self.layers[layer] = (k, v)
        self.skipped = len(full) - self.held

    def _whole_from(self) -> int:
        return self.prompt
