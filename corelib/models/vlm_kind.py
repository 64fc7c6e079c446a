"""How the tiny vision-language model is trained and measured: questions about canvases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import digit_canvas as canvas
from .recipes import Recipe, Stage
from .text_kinds import step_generator
from .vlm import TinyVLM, VLMConfig
from .vlm_training import answer_loss, read_answers, text_room


class VLMKind:
    """Answers to questions of six kinds, a dozen about each canvas."""

    config = VLMConfig
    data = (
        "canvases of scikit-learn's handwritten digits and questions about them\n"
        "  (`corelib/data/digit_canvas.py`), digits of the train split, slightly turned and moved"
    )
    limits = (
        "it answers questions of five words about canvases like these, and nothing else.\n"
        "  Of an answer to *where* it learnt the first word, the row, and not the second. In\n"
        "  training it was guided to look at the cells that an answer rests on."
    )
    unit = "nats per word of an answer"

    def build(self, config: VLMConfig, seed: int | None) -> nn.Module:
        return TinyVLM(config, seed=seed)

    def batch(self, recipe: Recipe, step: int) -> tuple:
        """A stage's ``rows`` are canvases; as many questions as its ``length`` has room for."""
        stage, generator = recipe.stage_at(step), step_generator(recipe, step)
        c = recipe.config
        options = dict(rows=c.rows, columns=c.columns, augment=True)
        canvases = canvas.digit_canvas(stage.rows, generator, **options)
        room = stage.length - 1 - c.vision_tokens
        return canvases, canvas.ask(canvases.labels, room // text_room(), generator)

    def loss(self, model, batch, stage: Stage) -> Tensor:
        return answer_loss(model, *batch, guidance=stage.guidance)

    @torch.no_grad()
    def held_out(self, model) -> float:
        return float(answer_loss(model, *questions_of("valid", model, 48)))

    @torch.no_grad()
    def figures(self, model) -> dict[str, float]:
        """Right answers by kind, and patches recognised, for digits never seen."""
        right: dict[str, list[bool]] = {kind: [] for kind in canvas.KINDS}
        rows: list[bool] = []
        seen, held = 0, 0
        for seed in range(8):
            canvases, asked = questions_of("test", model, 48, seed)
            found = read_answers(model, canvases.images, asked)
            said = found.logits.argmax(-1)
            hit = ((said == asked.answers) | (asked.answers == canvas.FILL)).all(-1)
            for kinds, row in zip(asked.kinds, hit.tolist(), strict=True):
                for kind, ok in zip(kinds, row, strict=True):
                    right[kind].append(ok)
            first = (said == asked.answers)[..., 0].flatten().tolist()
            kinds = [kind for row in asked.kinds for kind in row]
            rows += [ok for ok, kind in zip(first, kinds, strict=True) if kind == "where"]
            labels = canvases.labels.flatten(1)
            known = model.vision.patch_head(found.features.patches).argmax(-1) == labels
            seen, held = seen + int(known[labels >= 0].sum()), held + int((labels >= 0).sum())
        every = [ok for row in right.values() for ok in row]
        shares = {f"right, {kind}": sum(row) / len(row) for kind, row in right.items()}
        shares["first word right, where"] = sum(rows) / len(rows)
        return {"right answers": sum(every) / len(every), **shares, "patches known": seen / held}

    def shape(self, config: VLMConfig) -> str:
        c = config
        return (
            f"{c.rows} by {c.columns} patches of {c.patch} by {c.patch} pixels; encoder of "
            f"{c.vision_layers} layers, width {c.vision_width};\ndecoder of {c.layers} layers, "
            f"width {c.width}, {c.heads} query and {c.kv_heads} key/value heads of "
            f"{c.head_width};\nRoPE, RMSNorm, SwiGLU, tied embeddings; vocabulary {c.vocab}"
        )


def questions_of(
    split: str, model: TinyVLM, canvases: int, seed: int = 0, each: int = 12
) -> tuple[canvas.Canvases, canvas.Questions]:
    """Canvases of ``split`` for ``model`` and ``each`` questions about every one."""
    generator = torch.Generator().manual_seed(seed)
    c = model.config
    drawn = canvas.digit_canvas(canvases, generator, split=split, rows=c.rows, columns=c.columns)
    return drawn, canvas.ask(drawn.labels, each, generator)
