"""The shipped checkpoints: small models that learnt something.

>>> from corelib.models import zoo
>>> model = zoo.load("text_lm")           # a Decoder, in evaluation mode, float32
>>> print(zoo.card("text_lm"))            # data, tokens seen, figures, command

A released checkpoint is frozen: retraining makes a new name. Making one:

    python -m corelib.models.train NAME
    python -m corelib.models.zoo release NAME     # measures, writes the files of NAME
    python -m corelib.models.zoo sample text_lm   # text in its manner
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .decoder import generate, sampler
from .kinds import find_kind
from .tokenizer import load_tokenizer

FOLDER = pathlib.Path(__file__).parent / "checkpoints"


def names(folder: pathlib.Path = FOLDER) -> list[str]:
    """The checkpoints that are there."""
    return sorted(path.stem for path in pathlib.Path(folder).glob("*.safetensors"))


def _file(name: str, suffix: str, folder: pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(folder) / f"{name}{suffix}"
    if not path.exists():
        raise FileNotFoundError(
            f"name: no checkpoint {name!r} (there are: {', '.join(names(folder)) or 'none'}); "
            f"train one with: python -m corelib.models.train {name}"
        )
    return path


def load(
    name: str, *, dtype: torch.dtype = torch.float32, folder: pathlib.Path = FOLDER
) -> nn.Module:
    """The model ``name`` in evaluation mode, its parameters frozen, in ``dtype``.

    Raises ``FileNotFoundError`` naming the command that trains it.
    """
    with safe_open(_file(name, ".safetensors", folder), "pt") as file:
        about = json.loads(file.metadata()["model"])
        weights = {key: file.get_tensor(key).to(dtype) for key in file.keys()}
    kind = find_kind(about["kind"])
    model = kind.build(kind.config(**about["config"]), seed=None)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def card(name: str, folder: pathlib.Path = FOLDER) -> str:
    """The model card, in Markdown."""
    return _file(name, ".md", folder).read_text()


def figures(name: str, folder: pathlib.Path = FOLDER) -> dict:
    """What was measured when the checkpoint was released, and its learning curve."""
    return json.loads(_file(name, ".json", folder).read_text())


def store(
    model: nn.Module, name: str, kind: str, folder: pathlib.Path, dtype: torch.dtype = torch.float16
) -> pathlib.Path:
    """Write ``model``'s weights in ``dtype`` with what is needed to build it again."""
    path = pathlib.Path(folder) / f"{name}.safetensors"
    if path.exists():
        raise FileExistsError(f"name: {path} is released and frozen; train under a new name")
    path.parent.mkdir(parents=True, exist_ok=True)
    about = json.dumps({"kind": kind, "config": dataclasses.asdict(model.config)})
    weights = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    save_file(weights, path, metadata={"model": about})
    return path


def sample(
    name: str,
    prompt: str,
    tokens: int = 200,
    *,
    temperature: float = 0.8,
    seed: int = 0,
    folder: pathlib.Path = FOLDER,
) -> str:
    """``prompt`` and what the decoder ``name`` makes of it; a prompt begins a document."""
    tokenizer = load_tokenizer()
    ids = torch.tensor([[tokenizer.doc, *tokenizer.encode(prompt)]])
    model = load(name, folder=folder)
    out = generate(model, ids, tokens, chooser=sampler(seed), temperature=temperature)
    return tokenizer.decode(out[0].tolist())


def main(argv: list[str] | None = None) -> None:
    from . import release

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["list", "card", "sample", "release"])
    parser.add_argument("name", nargs="?")
    parser.add_argument("--prompt", default="ACT I.\n\nSCENE I.")
    args = parser.parse_args(argv)
    if args.action == "list":
        print("\n".join(names()))
    elif args.name is None:
        parser.error("name: which model?")
    elif args.action == "card":
        print(card(args.name))
    elif args.action == "sample":
        print(sample(args.name, args.prompt))
    else:
        release.release(args.name)


if __name__ == "__main__":
    main()
