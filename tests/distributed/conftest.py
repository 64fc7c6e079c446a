"""Four ranks, started once for the folder; smaller groups are made of the first of them."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives import attention_reference
from corelib.runtime import Ranks


class Groups:
    """``run(P, fn, *args)``: ``fn(rank, group, *args)`` on the first ``P`` of four ranks."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def run(self, P: int, fn, *args) -> list:
        def on_rank(rank, P, fn, args):  # nested functions travel by value
            import torch.distributed as dist

            groups = vars(dist).setdefault("_groups_of_these_tests", {})
            if P not in groups:
                groups[P] = dist.new_group(list(range(P)))
            return fn(rank, groups[P], *args) if rank < P else None

        return self.ranks.run(on_rank, P, fn, args)[:P]

    def train(self, P: int, core, tensors: list, order=None, **options) -> list:
        """Each rank's ``(out, lse, dq, dk, dv)``, and the bytes it sent forward and backward."""

        def on_rank(rank, group, stretches):
            from corelib.runtime import count_traffic

            q, k, v, d_out, d_lse = stretches[rank]
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            with count_traffic() as there:
                out, lse = core(*leaves, group=group, return_lse=True, **options)
            with count_traffic() as back:
                ((out * d_out).sum() + (lse * d_lse).sum()).backward()
            return (out, lse, *[x.grad for x in leaves]), there.total, back.total

        if order is not None:
            tensors = [x[:, :, order] for x in tensors]
        return self.run(P, on_rank, list(zip(*(x.chunk(P, 2) for x in tensors))))


class Kit:
    """What the tests of several methods share."""

    @staticmethod
    def inputs(L, B=2, H=4, G=2, D=4, V=6, seed=0):
        """``q, k, v, d_out, d_lse`` of the whole sequence."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (B, H, L, D), (B, G, L, D), (B, G, L, V), (B, H, L, V), (B, H, L)
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    @staticmethod
    def assert_equal_one_process(results, tensors, causal, scale=None, order=None):
        """Outputs and gradients of all stretches, joined, are those of dense attention."""
        *qkv, d_out, d_lse = tensors
        leaves = [x.clone().requires_grad_() for x in qkv]
        out, lse = attention_reference(*leaves, causal=causal, scale=scale, return_lse=True)
        ((out * d_out).sum() + (lse * d_lse).sum()).backward()
        wanted = out.detach(), lse.detach(), *[x.grad for x in leaves]
        for got, want in zip(zip(*[r[0] for r in results], strict=True), wanted, strict=True):
            want = want if order is None else want[:, :, order]
            torch.testing.assert_close(torch.cat(got, 2), want, atol=1e-10, rtol=1e-10)

    @staticmethod
    def assert_layer_equals_one_process(groups, P, core, causal, L, C=12, heads=6, kv=2):
        """A `SequenceParallelAttention`: outputs, and the gradients of input and weights."""
        from corelib.distributed.shared import SequenceParallelAttention

        torch.manual_seed(0)
        layer = SequenceParallelAttention(core, C, heads, kv, causal=causal, dtype=torch.float64)
        x = torch.randn(2, L, C, dtype=torch.float64)

        def on_rank(rank, group, layer, pieces):
            x = pieces[rank].clone().requires_grad_()
            y = layer(x, group=group)
            y.square().sum().backward()
            layer.sum_gradients(group)
            return y, x.grad, [p.grad for p in layer.parameters()]

        results = groups.run(P, on_rank, layer, x.chunk(P, 1))
        whole = x.clone().requires_grad_()
        y = layer.whole(whole)
        y.square().sum().backward()
        close = dict(atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(torch.cat([r[0] for r in results], 1), y.detach(), **close)
        torch.testing.assert_close(torch.cat([r[1] for r in results], 1), whole.grad, **close)
        for _, _, grads in results:
            torch.testing.assert_close(grads, [p.grad for p in layer.parameters()], **close)


@pytest.fixture(scope="session")
def groups():
    with Ranks(4, timeout=240) as ranks:
        yield Groups(ranks)


@pytest.fixture(scope="session")
def kit():
    return Kit
