"""Train one of the shipped models; killed, it goes on where it was.

    python -m corelib.models.train text_lm            # hours on one core; --out, --restart
    python -m corelib.models.train text_lm --status   # how far it is

Everything is kept in ``build/zoo/NAME/``: ``state.safetensors`` (weights, optimiser, step) and
``curve.json`` (step, tokens, seconds, training loss, held-out figure of its kind).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import time

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import zoo
from .kinds import find_kind
from .optim import make_optimizers
from .recipes import RECIPES, Recipe, from_dict

BUILD = pathlib.Path("build/zoo")


class Trainer:
    """The run of one recipe in one folder: ``step()`` by ``step()``, ``save`` and ``load``."""

    def __init__(self, recipe: Recipe, folder: pathlib.Path):
        self.recipe, self.folder = recipe, pathlib.Path(folder)
        self.kind = find_kind(recipe.kind)
        self.model = self.kind.build(recipe.config, recipe.seed)
        if recipe.start is not None:
            self.model.load_state_dict(zoo.load(recipe.start).state_dict())
        self.optimizers = make_optimizers(self.model, recipe.lr)
        self.done, self.tokens, self.seconds = 0, 0, 0.0
        self.curve: list[dict] = []
        self.state_file = self.folder / "state.safetensors"

    def step(self) -> float:
        """One update; returns the loss."""
        start = time.perf_counter()
        stage = self.recipe.stage_at(self.done)
        batch = self.kind.batch(self.recipe, self.done)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr_at(self.done)
            optimizer.zero_grad(set_to_none=True)
        loss = self.kind.loss(self.model, batch, stage)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.done += 1
        self.tokens += stage.rows * stage.length
        self.seconds += time.perf_counter() - start
        return float(loss.detach())

    def save(self) -> None:
        """Write weights, optimiser state, progress; the old file stays until the new is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for n, optimizer in enumerate(self.optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{n}.{i}.{k}": v for k, v in state.items()}
        progress = {"done": self.done, "tokens": self.tokens, "seconds": self.seconds}
        stored = {"progress": progress, "recipe": dataclasses.asdict(self.recipe)}
        stored["curve"] = self.curve
        partial = self.state_file.with_suffix(".partial")
        save_file(tensors, partial, metadata={"run": json.dumps(stored)})
        os.replace(partial, self.state_file)
        (self.folder / "curve.json").write_text(json.dumps(self.curve, indent=1) + "\n")

    def load(self) -> None:
        """Go on from the state file. Steps ahead may have been changed, steps done may not."""
        with safe_open(self.state_file, "pt") as file:
            stored = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        before, now = from_dict(stored["recipe"]), self.recipe
        done = stored["progress"]["done"]
        if before.config != now.config or before.seed != now.seed:
            raise ValueError(f"recipe: {self.state_file} was started with other sizes or seed")
        if before.past(done) != now.past(done):
            raise ValueError(f"recipe: its first {done} steps differ from those already done")
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k[:6] == "model."})
        for n, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{n}."):
                    _, _, i, key = name.split(".")
                    state.setdefault(int(i), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        progress = stored["progress"]
        self.done, self.tokens, self.seconds = done, progress["tokens"], progress["seconds"]
        self.curve = stored["curve"]


def run(
    recipe: Recipe,
    folder: pathlib.Path,
    *,
    restart: bool = False,
    save_seconds: float = 180.0,
    log=print,
) -> Trainer:
    """Train to the end of ``recipe``, from the state in ``folder`` if there is one."""
    trainer = Trainer(recipe, folder)
    if trainer.state_file.exists() and not restart:
        trainer.load()
        log(f"going on at step {trainer.done} of {recipe.steps}")
    else:
        sizes = f"{trainer.model.n_parameters:,} parameters, {recipe.steps:,} steps"
        log(f"{recipe.name}: {sizes}, {recipe.tokens:,} tokens")
    last_save, losses = time.monotonic(), []
    while trainer.done < recipe.steps:
        losses.append(trainer.step())
        if trainer.done % 20 == 0:
            log(_progress(trainer, sum(losses[-20:]) / len(losses[-20:])))
        if trainer.done % recipe.eval_every == 0 or trainer.done == recipe.steps:
            length = recipe.stage_at(trainer.done - 1).length
            point = {"step": trainer.done, "tokens": trainer.tokens, "length": length}
            point |= {"seconds": round(trainer.seconds)}
            point |= {"loss": round(sum(losses) / len(losses), 4)}
            point |= {"valid": round(trainer.kind.held_out(trainer.model), 4)}
            trainer.curve.append(point)
            losses.clear()
            log(json.dumps(point))
        if time.monotonic() - last_save > save_seconds or trainer.done == recipe.steps:
            trainer.save()
            last_save = time.monotonic()
    return trainer


def _progress(trainer: Trainer, loss: float) -> str:
    rate = trainer.tokens / max(trainer.seconds, 1e-9)
    left = (trainer.recipe.tokens - trainer.tokens) / rate / 60
    part = f"step {trainer.done}/{trainer.recipe.steps}  loss {loss:.3f}"
    return f"{part}  {rate:,.0f} tokens/s  about {left:.0f} min left"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=pathlib.Path, default=BUILD, help="default: build/zoo")
    parser.add_argument("--restart", action="store_true", help="forget an earlier run")
    parser.add_argument("--status", action="store_true", help="show how far the run is")
    args = parser.parse_args(argv)
    folder = args.out / args.name
    if args.status:
        trainer = Trainer(RECIPES[args.name], folder)
        trainer.load()
        print(_progress(trainer, trainer.curve[-1]["loss"] if trainer.curve else float("nan")))
        return
    run(RECIPES[args.name], folder, restart=args.restart, log=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
