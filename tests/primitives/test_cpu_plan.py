"""The plan covers every visible key of every row exactly once, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.primitives import visible_keys
from corelib.primitives._cpu_plan import plan


def rendered(groups, L, S):
    count = torch.zeros(L, S, dtype=torch.int)
    for group in groups:
        rows = group.stop - group.start
        i = torch.arange(rows)[:, None]
        for part in group.parts:
            j = torch.arange(part.stop - part.start)[None, :]
            reach = part.stop - part.start - rows
            seen = {
                "full": (j == j) & (i == i),
                "causal": j <= i,
                "anticausal": j >= i,
                "band": (i <= j) & (j <= i + reach),
                "shifted": j <= i + reach,
            }[part.pattern]
            if part.pattern in ("causal", "anticausal"):
                assert reach == 0, "a triangle is square"
            count[group.start : group.stop, part.start : part.stop] += seen.int()
    return count


@pytest.mark.parametrize("small", [0, 100])
@settings(max_examples=150, deadline=None)
@given(
    L=st.integers(0, 24),
    S=st.integers(0, 24),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 30),
    sinks=st.integers(0, 30),
)
def test_parts_make_up_the_mask(small, L, S, causal, window, sinks):
    """``small`` decides whether a short stretch of rows is one masked part or two merged ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corelib.primitives._cpu_plan.SMALL_MASK", small)
        groups = plan.__wrapped__(L, S, causal=causal, window=window, sinks=sinks)
    count = rendered(groups, L, S)
    visible = visible_keys(L, S, causal=causal, window=window, sinks=sinks)
    assert torch.equal(count, visible.int())


def test_plain_attention_is_one_part():
    """One kernel call and no copying where PyTorch's own function would need none."""
    for causal, pattern in ((True, "causal"), (False, "full")):
        ((start, stop, parts),) = plan(9, 9, causal=causal, window=None, sinks=0)
        assert (start, stop) == (0, 9) and parts == ((pattern, 0, 9),)
    ((_, _, parts),) = plan(1, 9, causal=True, window=None, sinks=0)
    assert parts == (("full", 0, 9),)
