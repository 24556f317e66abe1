"""Writes models with random weights in the `hybrid` layout, to measure bytes and times.

    python untrained.py CORPUS FOLDER MODEL ...

Writes FOLDER/MODEL, and FOLDER/settings.toml for `longctx eval`.
"""

import sys
from pathlib import Path

import torch

import export
import recipes
from model import Model


def main(corpus, folder, names):
    settings = ""
    for name in names:
        torch.manual_seed(0)
        config = recipes.named(name)
        export.hybrid(Model(config).state_dict(), config, folder / name, corpus / "tokenizer.json", torch.float16)
        settings += f'[[setting]]\nname = "{name}"\nmethod = "recurrent"\nmodel = "{folder / name}"\ncontext = 100000\n\n'
    (folder / "settings.toml").write_text(settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
