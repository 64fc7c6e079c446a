"""FreeDave: lossless parallel decoding by free drafts (arXiv 2510.00294).

Idea: the call that serves one step of masked-diffusion decoding has an opinion on all later steps
as well. So take it at its word for ``D`` steps, and let the next call, over all these drafts at
once, say step by step whether the decoder would really have gone that way.

A *static step* asks the net about ``x`` and commits what its policy takes: ``step(x, law(x))``.
With the law of the last call already at hand,

    draft_1 = step(x, law(x))              what the static decoder does next: certain
    draft_k = step(draft_k-1, law(x))      what it would do if its mind did not change
    law_k = law(draft_k)                   all k in one call
    target_k = step(draft_k, law_k)        what it really does next
    m = the most leading k with target_k = draft_k+1
    x = draft_m+1, its law is law_m+1      m + 1 steps for one call

| here        | paper          | what                                           |
|:------------|:---------------|:-----------------------------------------------|
| draft_steps | d, draft steps | D: drafts per call                             |
| drafts      | candidates     | ``(D, L)``, one text with more and more filled |
| step_map    |                | the static step that commits each slot         |
| call_map    |                | the call that decided it                       |
| nfe         | NFE            | calls, whatever they hold                      |
| fed         |                | positions read in all calls                    |

Exact: tokens and ``step_map`` are those of `shared.MaskedDiffusion.decode` with the same policy,
for any net that gives a row the same law alone and in a batch (float64 does; bfloat16 on a GPU may
not: a near tie can then fall the other way). Every call takes at least one step, so ``nfe`` is
never above the static decoder's; with ``D = 1`` it is equal.
Different: any policy without chance can be the static one. The paper's own variant for threshold
decoding accepts a draft that is a *subset* of its target, which is faster and no longer exact; here
threshold decoding is verified like the rest. Drafts end with their block; without a cache the call
that fills a block already answers for the next one. One text at a time.
Layouts: ``"batch"`` makes the drafts rows of a batch behind a repeated cache, ``"tree"`` puts them
into one row in which each sees the cached prefix and itself, an interval each: two dense
attentions merged by their log-sum-exps, so that `flash_attention` is its kernel.
Cost: up to ``D`` times the positions of a static call; it pays where a call costs less than it
holds, as on a GPU that waits for its weights, and less so on one CPU core.
Oracle: the static decoder. Compare ``generation/core.py`` of cychomatica/FreeDave.
No `nn.Module`: the net stays as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from . import tabular
from .policies import Policy, View, max_prob
from .reader import Net, Reader
from .shared import Decode, blocks_of, commit, greedy

LAYOUTS = ("batch", "tree")


def static_step(
    ids: Int[Tensor, "1 L"],
    law: Float[Tensor, "1 n vocab"],
    lo: int,
    quota: int,
    *,
    mask_id: int,
    policy: Policy = max_prob,
) -> Int[Tensor, "1 L"]:
    """``ids`` after one step of the static decoder in the block that begins at ``lo``."""
    hi = lo + law.shape[1]
    open_, drawn, ids = ids[:, lo:hi] == mask_id, greedy(law), ids.clone()
    take = commit(policy, View(open_, law, drawn, quota))
    ids[:, lo:hi] = torch.where(take, drawn, ids[:, lo:hi])
    return ids


def make_drafts(
    ids: Int[Tensor, "1 L"],
    law: Float[Tensor, "1 n vocab"],
    lo: int,
    plan: list[int],
    *,
    mask_id: int,
    policy: Policy = max_prob,
) -> Int[Tensor, "D L"]:
    """The texts after 1, 2, … steps that all trust ``law``: one per quota, until all is filled."""
    drafts: list[Tensor] = []
    hi = lo + law.shape[1]
    for quota in plan:
        ids = static_step(ids, law, lo, quota, mask_id=mask_id, policy=policy)
        drafts.append(ids)
        if not bool((ids[:, lo:hi] == mask_id).any()):
            break
    return torch.cat(drafts)


def verify_drafts(drafts: Int[Tensor, "D L"], targets: Int[Tensor, "K L"]) -> int:
    """How many leading targets are the next draft: ``targets[k]`` follows ``drafts[k]``."""
    number = min(len(targets), len(drafts) - 1)
    same = (targets[:number] == drafts[1 : number + 1]).all(1)
    return int(same.long().cumprod(0).sum())


@torch.no_grad()
def freedave_decode(
    net: Net,
    prompt: Int[Tensor, "1 P"],
    gen_len: int,
    *,
    mask_id: int,
    draft_steps: int = 4,
    steps: int | None = None,
    block_len: int | None = None,
    policy: Policy = max_prob,
    cache: str = "none",
    layout: str = "batch",
) -> Decode:
    """Fill in ``gen_len`` slots behind ``prompt`` as the static decoder does, in fewer calls.

    Args:
        draft_steps: steps to draft for each call, at least 1.
        steps, block_len, policy, cache: as in `shared.MaskedDiffusion.decode`.
        layout: ``"batch"`` or ``"tree"``; the tree needs a net with ``tree(drafts, cache)``.

    Raises ValueError or TypeError for more than one prompt, or options that do not fit.
    """
    _check(net, prompt, draft_steps, layout)
    P, reader = prompt.shape[1], Reader(net, mask_id, cache)
    ids = F.pad(prompt, (0, max(gen_len, 0)), value=mask_id)
    step_map, call_map = torch.full_like(ids, -1), torch.full_like(ids, -1)
    blocks = blocks_of(prompt, gen_len, steps, block_len)
    step, law = 0, None
    for n, (lo, hi, plan) in enumerate(blocks):
        law = reader.laws(ids, lo, hi) if law is None else law
        # Where nothing is cached by block, the call that fills this one answers for the next.
        end = blocks[n + 1][1] if cache == "none" and n + 1 < len(blocks) else hi
        used = 0
        while bool((ids[:, lo:hi] == mask_id).any()):
            ahead = plan[used : used + draft_steps] or [1]
            drafts = make_drafts(ids, law, lo, ahead, mask_id=mask_id, policy=policy)
            asked = drafts if end > hi else drafts[(drafts[:, lo:hi] == mask_id).any(1)]
            laws, before = None, reader.calls - 1
            if len(asked):
                laws = reader.draft_laws(asked, lo, end, layout)
            taken = 1 + _agreed(drafts, laws, lo, hi, plan[used + 1 :], mask_id, policy)
            for k in range(taken):
                new = (ids == mask_id) & (drafts[k : k + 1] != mask_id)
                step_map[new], call_map[new] = step, before if k == 0 else reader.calls - 1
                ids, step = drafts[k : k + 1], step + 1
            used += taken
            law = None if taken > len(asked) else laws[taken - 1 : taken, : hi - lo]
        if end > hi:
            law = laws[taken - 1 : taken, hi - lo :]
    return Decode(ids, step_map[:, P:], reader.calls, call_map[:, P:], reader.fed)


def _agreed(drafts, laws, lo, hi, plan, mask_id, policy) -> int:
    """How many drafts after the first the static decoder makes as well."""
    targets = []
    for k in range(len(drafts) - 1):
        quota = plan[k] if k < len(plan) else 1
        one = laws[k : k + 1, : hi - lo]
        target = static_step(drafts[k : k + 1], one, lo, quota, mask_id=mask_id, policy=policy)
        targets.append(target)
        if not target.equal(drafts[k + 1 : k + 2]):
            break
    return verify_drafts(drafts, torch.cat(targets)) if targets else 0


def _check(net: Net, prompt: Tensor, draft_steps: int, layout: str) -> None:
    if prompt.dim() != 2 or prompt.shape[0] != 1:
        raise ValueError(f"prompt: expected one row (1, P), got {tuple(prompt.shape)}")
    if draft_steps < 1:
        raise ValueError(f"draft_steps: expected at least 1, got {draft_steps}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    if layout == "tree" and not hasattr(net, "tree"):
        raise TypeError("net: expected a net with tree(drafts, cache) for layout='tree', got none")


def example() -> dict:
    """Six slots in a language of two words, in which neighbours agree three times in four."""
    net = tabular.example(6)
    prompt = torch.zeros(1, 0, dtype=torch.long)
    return dict(net=net, prompt=prompt, gen_len=6, mask_id=net.mask_id)
