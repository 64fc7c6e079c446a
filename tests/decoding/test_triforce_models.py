"""TriForce on the shipped models: greedy tokens, and what retrieval is for."""

from __future__ import annotations

import pytest
import torch

from corelib.decoding.triforce import triforce_generate
from corelib.measure.races.triforce import held_out_prompt, one_level, plain, retrieval_only
from corelib.models import zoo

pytestmark = [
    pytest.mark.method("triforce"),
    pytest.mark.skipif(not {"text_lm", "draft_lm"} <= {*zoo.names()}, reason="not in the zoo"),
]


def test_text_lm_writes_the_same():
    target, tiny = (zoo.load(name, dtype=torch.float64) for name in ("text_lm", "draft_lm"))
    ids, new = held_out_prompt(200), 12
    expected = plain(target, ids, new)
    assert expected.calls == {"tiny": 0, "middle": 0, "outer": new - 1}
    options = dict(gamma=4, budget=64, recent=32)
    report = triforce_generate(target, tiny, ids, new, **options)
    assert report.tokens == expected.tokens
    assert report.outer.target_calls < new / 2
    assert sum(report.kv_bytes.values()) < sum(expected.kv_bytes.values())
    for made in (one_level(target, tiny, ids, new), retrieval_only(target, ids, new)):
        assert made.tokens == expected.tokens and made.calls["outer"] < new - 1
