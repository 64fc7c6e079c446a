"""The zoo: what is stored comes back, fast, and nothing released is overwritten."""

import pytest
import torch

from corelib.models import zoo
from corelib.models.decoder import Decoder, DecoderConfig
from corelib.models.encoder import Encoder
from corelib.models.kinds import find_kind

CONFIG = DecoderConfig(vocab=64, width=16, layers=2, heads=2, kv_heads=1, head_width=8, hidden=24)
IDS = torch.arange(10).view(1, 10)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_what_is_stored_comes_back(tmp_path, kind):
    model = find_kind(kind).build(CONFIG, 0).half().float()  # as float16 keeps it
    zoo.store(model, "small", kind, tmp_path)
    again = zoo.load("small", folder=tmp_path)
    assert type(again) is {"decoder": Decoder, "encoder": Encoder}[kind]
    assert again.config == CONFIG and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    torch.testing.assert_close(again(IDS), model(IDS), rtol=0, atol=0)
    assert zoo.load("small", folder=tmp_path, dtype=torch.float64).dtype == torch.float64
    assert zoo.names(tmp_path) == ["small"]


@pytest.mark.no_shape_checks
def test_a_released_checkpoint_is_frozen(tmp_path):
    zoo.store(Decoder(CONFIG), "small", "decoder", tmp_path)
    with pytest.raises(FileExistsError, match="frozen"):
        zoo.store(Decoder(CONFIG), "small", "decoder", tmp_path)


@pytest.mark.no_shape_checks
def test_a_missing_checkpoint_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m corelib.models.train text_lm"):
        zoo.load("text_lm", folder=tmp_path)


@pytest.mark.no_shape_checks
def test_an_unknown_kind_names_those_there_are():
    with pytest.raises(ValueError, match="kind: expected one of .*decoder, encoder.*got 'rnn'"):
        find_kind("rnn")
