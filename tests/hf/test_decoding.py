"""Decoders of ours on models of transformers write what transformers' own greedy search writes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from corelib import hf  # noqa: E402
from corelib.decoding.aggressive_decoding import input_guided_decode  # noqa: E402
from corelib.decoding.triforce import triforce_generate  # noqa: E402
from corelib.models.cache import DenseCache  # noqa: E402


def prompt(length, seed=0):
    return torch.randint(1, 60, (1, length), generator=torch.Generator().manual_seed(seed))


def written_by(model, ids, new):
    options = dict(do_sample=False, attention_mask=torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=new, **options)[0, ids.shape[1] :].tolist()


@pytest.mark.method("aggressive_decoding")
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_input_guided_decoding_writes_what_transformers_does(random_model, family):
    model, ids = random_model(family), prompt(6)
    written = written_by(model, ids, 16)
    assert len(set(written)) > 6
    model, source = hf.LanguageModel(model), [*written[:9], 3, *written[10:]]
    for cache in (None, DenseCache()):
        report = input_guided_decode(model, ids, source, 16, cache=cache)
        assert report.tokens == written and report.target_calls < 16


@pytest.mark.method("triforce")
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_triforce_writes_what_transformers_does(random_model, family):
    """Both levels of the target run on one model of transformers, with two caches of ours."""
    model, ids = random_model(family), prompt(40)
    written = written_by(model, ids, 12)
    target, tiny = hf.LanguageModel(model), hf.LanguageModel(random_model("Llama", seed=1))
    report = triforce_generate(target, tiny, ids, 12, gamma=3, budget=16, sinks=2, recent=6)
    assert report.tokens == written and 0 < report.outer.acceptance
