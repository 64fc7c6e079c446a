"""Recurrent language models: transformers' logits with the same weights, whole and step by step."""

from __future__ import annotations

import pytest
import torch

from corelib.contracts import LanguageModel
from corelib.models.decoder import generate
from corelib.models.kinds import find_kind
from corelib.models.optim import make_optimizers
from corelib.models.recipes import Stage
from corelib.models.recurrent import (
    RecurrentConfig,
    RecurrentLM,
    StateCache,
    from_transformers_weights,
)

SIZES = dict(vocab=50, width=16, layers=2, state=5)
MIXERS = ["mamba", "mamba2"]
IDS = torch.randint(0, 50, (2, 21), generator=torch.Generator().manual_seed(0))


def config(mixer: str) -> RecurrentConfig:
    return RecurrentConfig(mixer, **SIZES, head_width=8, groups=2 if mixer == "mamba2" else 1)


def twins(mixer: str, dtype: torch.dtype):
    """transformers' model with random weights, and ours with the same."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=5)
    if mixer == "mamba":
        theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**shared))
    else:
        theirs = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                **shared, num_heads=4, head_dim=8, n_groups=2, chunk_size=8, rms_norm=True,
                pad_token_id=0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
            )
        )  # fmt: skip
    with torch.no_grad():  # larger than they start, so that a slip shows
        for name, p in theirs.named_parameters():
            if "proj" in name or "embeddings" in name:
                p.mul_(8)
    ours = RecurrentLM(config(mixer), seed=None)
    ours.load_state_dict(from_transformers_weights(theirs.state_dict()))
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_transformers_logits_whole_and_step_by_step(mixer, dtype):
    theirs, ours = twins(mixer, dtype)
    wanted = theirs(IDS, use_cache=False).logits.to(dtype)
    close = dict(atol=2e-5 * float(wanted.abs().max()), rtol=1e-5)  # parts of theirs are float32
    torch.testing.assert_close(ours(IDS), wanted, **close)
    cache = StateCache()
    pieces = [ours(piece, cache) for piece in (IDS[:, :9], *IDS[:, 9:].split(1, 1))]
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, **close)
    exact = dict(atol=1e-12, rtol=1e-10) if dtype == torch.float64 else close
    torch.testing.assert_close(torch.cat(pieces, 1), ours(IDS), **exact)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_state_does_not_grow(mixer):
    model, cache = RecurrentLM(config(mixer)), StateCache()
    assert isinstance(model, LanguageModel)
    out = generate(model, IDS[:, :3], 4, cache=cache)
    first = cache.bytes()
    generate(model, out, 30, cache=cache)
    assert cache.bytes() == first > 0 and len(cache) == 3 + 3 + 7 + 29
    assert cache.bytes("host") == 0


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_rows_can_be_gathered(mixer):
    model, cache = RecurrentLM(config(mixer)).double(), StateCache()
    model(IDS[:, :10], cache)
    cache.gather_rows(torch.tensor([1, 1, 0]))
    got = model(IDS[[1, 1, 0], 10:], cache)
    torch.testing.assert_close(got, model(IDS)[[1, 1, 0], 10:], atol=1e-12, rtol=1e-10)


def test_seeds_name_the_weights():
    a, b, c = (RecurrentLM(config("mamba"), seed=s) for s in (1, 1, 2))
    state = torch.get_rng_state()
    RecurrentLM(config("mamba2"), seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed_tokens.weight, c.embed_tokens.weight)
    assert a.n_parameters == sum(p.numel() for p in a.parameters())


@pytest.mark.no_shape_checks
def test_wrong_arguments():
    with pytest.raises(ValueError, match="mixer: expected 'mamba' or 'mamba2', got 'rnn'"):
        RecurrentConfig("rnn")
    model, cache = RecurrentLM(config("mamba")), StateCache()
    with pytest.raises(ValueError, match=r"ids: expected \(B, L\)"):
        model(IDS[0])
    model(IDS, cache)
    cache.crop(21)
    with pytest.raises(ValueError, match="cannot go back; expected 21, got 20"):
        cache.crop(20)
    with pytest.raises(ValueError, match="tier: expected 'device' or 'host'"):
        cache.bytes("disk")


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_kind_learns_with_narrow_projections(mixer):
    """Under autocast projections are bfloat16, the scan is not; decays are not orthogonalised."""
    torch.manual_seed(0)
    kind, model = find_kind("recurrent"), RecurrentLM(config(mixer))
    muon, adam = make_optimizers(model, 1e-2)
    of_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    decays = {id(p) for name, p in model.named_parameters() if name.endswith("A_log")}
    assert decays and not decays & of_muon
    batch = (IDS[:, :-1], IDS[:, 1:], torch.ones(2, 20))
    losses = []
    for _ in range(12):
        loss = kind.loss(model, batch, Stage(20, 2, 1))
        for optimizer in (muon, adam):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (muon, adam):
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    exact = model(IDS).detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = model(IDS).detach().float()
        states = StateCache()
        model(IDS, states)
    assert 0 < float((narrow - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert all(part.dtype == torch.float32 for state in states.layers.values() for part in state)


def test_the_card_names_the_sizes():
    shape = find_kind("recurrent").shape(config("mamba2"))
    assert shape.startswith("Mamba-2: 2 layers, width 16, inner width 32 in 4 heads of 8")
    assert "heads" not in find_kind("recurrent").shape(config("mamba"))
