"""Lossless Acceleration for Seq2seq Generation with Aggressive Decoding (arXiv 2205.10350).

Idea: guess many tokens at once, wherever the guess may come from, let the autoregressive model
read them all in one call, and keep them up to the first that it would not have written itself.

*Input-guided* (IAD), for outputs that are mostly a copy: the input is the guess. With source ``x``,
output ``y`` so far, and the model's greedy choice ``best(·)``:

    guess = x[a:]                          a = 0 while y is empty
    keep guess[:n] while guess[i] == best(y + guess[:i]), then best(y + guess[:n])   (bifurcation)
    a = the place behind the shortest end of y that stands in x exactly once; none: one plain step

*Generalised* (GAD), for all else: a non-autoregressive model fills ``k`` masks behind ``y`` in one
pass. A drafted token passes if it is among the model's ``beta`` best and its log-probability at
most ``tau`` below the best one's; ``beta=1, tau=0`` is greedy decoding, more is GAD++, which is
*not* lossless.

| here           | paper     | what                                              |
|:---------------|:----------|:--------------------------------------------------|
| ids            | –         | ``(1, L)``, the prompt that the model reads first |
| source, output | x, y      | lists of ids                                      |
| block          | k         | masks filled in one pass                          |
| beta, tau      | beta, tau | tokens and log-probability tolerated              |

Exact: IAD, and GAD with ``beta=1, tau=0``, give the tokens of greedy decoding, for any source and
any drafter (in exact arithmetic; a batched and a single-token call may round a near tie apart).
Different: the paper's models are encoder-decoders; ours read the input as a prompt, so the first
call reads the input as well, and the drafter (`BlockNAT`) reads input, output and masks in one
bidirectional stack instead of an encoder and a decoder. ``longest`` caps a guess; the paper has no
cap. Left out: beam search, glancing training and distillation of the drafter.
Cost: one call, one more for each id left out and two for each id replaced or put in (the
bifurcation, and a plain step until the ends meet again), as long as the ids around it stand in the
source once; plain decoding takes ``|y|``. A call reads up to ``|x|`` ids in place of one.
Oracle: plain greedy decoding, and the loop below; compare ``decoding/GAD/inference.py`` of
microsoft/unilm and transformers' ``prompt_lookup_num_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..contracts import KVCache, LanguageModel
from .shared import DecodeReport, Draft, Drafter, Verifier, speculative_decode

# --- input-guided ---------------------------------------------------------------------------------


def realign(source: Sequence[int], output: Sequence[int]) -> int | None:
    """Where ``source`` goes on behind the shortest end of ``output`` that it holds exactly once.

    0 for an empty output; None when no end stands in the source once.
    """
    source, output = list(source), list(output)
    if not output:
        return 0
    for n in range(1, min(len(output), len(source)) + 1):
        places = [i for i in range(len(source) - n + 1) if source[i : i + n] == output[-n:]]
        if len(places) == 1:
            return places[0] + n
        if not places:
            return None
    return None


@torch.no_grad()
def input_guided_reference(
    model: LanguageModel,
    ids: Int[Tensor, "1 L"],
    source: Sequence[int],
    new: int,
    *,
    eos: int | None = None,
) -> tuple[list[int], int]:
    """The paper's loop, without a cache: the new ids, and how often the model was called."""
    source, output, calls = list(source), [], 0
    while len(output) < new and output[-1:] != [eos]:
        a = realign(source, output)
        guess = [] if a is None else source[a:]
        context = [*ids[0].tolist(), *output]
        feed = torch.tensor([context + guess], device=ids.device)
        best = model(feed)[0, len(context) - 1 :].argmax(-1).tolist()
        calls += 1
        for place, choice in enumerate(best):
            output.append(choice)
            ended = choice == eos or len(output) == new
            if ended or place == len(guess) or guess[place] != choice:
                break
    return output, calls


def input_guided(source: Sequence[int], longest: int | None = None) -> Drafter:
    """The drafter: the rest of ``source`` behind where the output stands, ``longest`` ids at most.

    The loop asks for at most ``most`` ids, as it wants no more.
    """
    source = [int(token) for token in source]
    if longest is not None and longest < 1:
        raise ValueError(f"longest: expected at least 1 or None, got {longest}")

    def draft(tokens: list[int], start: int, most: int) -> Draft:
        a = realign(source, tokens[start:])
        limit = most if longest is None else min(most, longest)
        return Draft([] if a is None else source[a : a + limit])

    return draft


def input_guided_decode(
    model: LanguageModel,
    ids: Int[Tensor, "1 L"],
    source: Sequence[int],
    new: int,
    *,
    eos: int | None = None,
    longest: int | None = None,
    cache: KVCache | None = None,
) -> DecodeReport:
    """Greedy decoding of up to ``new`` ids behind ``ids``, with ``source`` as the guess.

    Args:
        model: ``(ids, cache) -> logits``.
        source: the ids that the output probably repeats; any list is allowed.
        eos: stop behind this id (it is kept).
        longest: ids in one guess; None: all that is left of the source, as in the paper.
        cache: an empty key/value cache; None reads everything again in each call.
    """
    drafter = input_guided(source, longest)
    return speculative_decode(model, ids, new, drafter, eos=eos, cache=cache)


# --- generalised ----------------------------------------------------------------------------------


class BlockNAT(nn.Module):
    """A drafter that fills ``block`` masks behind the output in one pass.

    ``encoder``: any module ``ids (B, L) -> logits (B, L, vocab)`` that reads in both directions,
    such as `corelib.models.encoder.Encoder`; ``mask``: the id that stands for "to be filled".
    """

    def __init__(self, encoder: nn.Module, block: int, mask: int):
        super().__init__()
        if block < 1:
            raise ValueError(f"block: expected at least 1, got {block}")
        self.encoder, self.block, self.mask = encoder, block, mask

    def forward(self, ids: Int[Tensor, "B L"], block: int | None = None) -> Float[Tensor, "B k v"]:
        """Logits of the ``block`` tokens behind ``ids`` (prompt and output), side by side."""
        masks = ids.new_full((ids.shape[0], self.block if block is None else block), self.mask)
        return self.encoder(torch.cat([ids, masks], 1))[:, ids.shape[1] :]

    def loss(
        self, prompt: Int[Tensor, "B L"], target: Int[Tensor, "B T"], start: int
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the block behind ``target[:, :start]``; targets below 0 do not count."""
        gold = target[:, start : start + self.block]
        logits = self(torch.cat([prompt, target[:, :start]], 1))[:, : gold.shape[1]]
        return F.cross_entropy(logits.flatten(0, 1), gold.flatten(), ignore_index=-1)


def block_draft(
    nat: BlockNAT, block: int | None = None, *, device: torch.device | str | None = None
) -> Drafter:
    """The drafter: the most likely token at each of the masks, each without knowing the others.

    ``device``: where ``nat`` takes its ids.
    """

    @torch.no_grad()
    def draft(tokens: list[int], start: int, most: int) -> Draft:
        filled = nat(torch.tensor([tokens], device=device), block)[0].argmax(-1)
        return Draft(filled[:most].tolist())

    return draft


def tolerant(beta: int = 1, tau: float = 0.0) -> Verifier:
    """The verifier of GAD++: a token passes among the ``beta`` best, at most ``tau`` nats below."""
    if beta < 1:
        raise ValueError(f"beta: expected at least 1, got {beta}")
    if tau < 0:
        raise ValueError(f"tau: expected at least 0, got {tau}")

    def verify(draft: Draft, logits: Tensor) -> tuple[int, int]:
        best = logits.argmax(-1).tolist()
        for i, token in enumerate(draft.tokens):
            rank = int((logits[i] > logits[i, token]).sum())
            gap = float(logits[i, best[i]] - logits[i, token])
            if token != best[i] and not (rank < beta and gap <= tau and beta > 1):
                return i, best[i]
        return len(draft.tokens), best[-1]

    return verify


def gad_decode(
    target: LanguageModel,
    nat: BlockNAT,
    ids: Int[Tensor, "1 L"],
    new: int,
    *,
    block: int | None = None,
    beta: int = 1,
    tau: float = 0.0,
    eos: int | None = None,
    cache: KVCache | None = None,
) -> DecodeReport:
    """Up to ``new`` ids behind ``ids``: ``nat`` fills a block, ``target`` verifies it in one call.

    ``block``: masks in a pass, by default as many as ``nat`` was trained with. ``beta=1, tau=0``
    is greedy decoding; other values trade likeness for longer blocks. The rest as above.
    """
    drafter, verifier = block_draft(nat, block, device=ids.device), tolerant(beta, tau)
    return speculative_decode(target, ids, new, drafter, verifier=verifier, eos=eos, cache=cache)


# --- an example -----------------------------------------------------------------------------------


class ScriptedModel:
    """A stand-in for a trained model: behind ``prompt`` it writes ``output``, its last id the end.

    A language model by the contract, that ignores a cache: its logits are 1 for what it means to
    write and 0 for the rest. Where the text before is not its own, it means to stop.
    """

    def __init__(self, prompt: Sequence[int], output: Sequence[int], vocab: int):
        self.prompt, self.output, self.vocab = list(prompt), list(output), vocab

    def __call__(self, ids: Int[Tensor, "B L"], cache=None) -> Float[Tensor, "B L vocab"]:
        wants = [[self._next(row[: i + 1]) for i in range(len(row))] for row in ids.tolist()]
        return F.one_hot(torch.tensor(wants, device=ids.device), self.vocab).double()

    def _next(self, seen: list[int]) -> int:
        written = seen[len(self.prompt) :]
        fits = written == self.output[: len(written)] and len(written) < len(self.output)
        return self.output[len(written) if fits else -1]


def example() -> dict:
    """Ten ids; the model replaces the fourth and leaves the eighth out, then stops.

    >>> report = input_guided_decode(**example())
    >>> len(report.tokens), report.target_calls
    (10, 4)
    """
    source = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    model = ScriptedModel(source, [11, 12, 13, 24, 15, 16, 17, 19, 20, 0], vocab=32)
    return dict(model=model, ids=torch.tensor([source]), source=source, new=20, eos=0)
