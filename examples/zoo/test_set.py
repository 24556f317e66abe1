"""Creates the documents that all models are tested on. Training data does not contain them.

    python test_set.py CORPUS OUT.npz [--set whole|compared]

The file has for each kind and length `tokens`, `[samples, length]` u16, padded with 0, and
`answers`, one bit per token, set for tokens of answers. The set `whole` has the kinds of the recipe
`tasks`, up to 4,096 tokens. The set `compared` has retrieval up to 8,192 tokens and state tracking;
"swaps 16" asks for the state after every 16 inputs.
"""

import argparse
import multiprocessing
import random
from pathlib import Path

import numpy as np

import tasks
from data import Rows

ANSWER = 20


def units(name):
    """Returns the kinds, lengths and numbers of samples of a set."""
    if name == "whole":
        return [(kind, length, 128) for length in (512, 1024, 2048, 4096) for kind in tasks.KINDS]
    looked_up = ["needle", "multi_needle", "recall", "associations"]
    return (
        [(kind, length, 256) for length in (512, 2048) for kind in [*looked_up, "pairs", "copy"]]
        + [(f"{kind} {gap}", 512, 64) for kind in ("swaps", "ring") for gap in (1, 4, 16, 64)]
        + [(kind, length, samples) for length, samples in ((4096, 128), (8192, 64)) for kind in looked_up]
    )


def documents(rows, kind, length, samples):
    name, _, gap = kind.partition(" ")
    maker = rows.maker(random.Random(f"test {kind} {length}"))
    tokens, answers = np.zeros((samples, length), np.uint16), np.zeros((samples, length), bool)
    aim, made = length * 0.97, 0
    while made < samples:
        ids, weights = rows.encode(maker.document(name, int(aim), **({"gap": int(gap)} if gap else {})))
        if len(ids) > length:
            aim *= 0.99
            continue
        tokens[made, : len(ids)], answers[made, : len(ids)] = ids, weights == ANSWER
        made += 1
    return tokens, answers


def make(corpus, out, name):
    global rows
    rows = Rows(corpus, "tasks", 0)
    jobs = units(name)
    with multiprocessing.get_context("fork").Pool() as pool:
        made = pool.starmap(job, jobs, chunksize=1)
    arrays = {}
    for (kind, length, _), (tokens, answers) in zip(jobs, made):
        arrays[f"{kind}:{length}:tokens"], arrays[f"{kind}:{length}:answers"] = tokens, np.packbits(answers, 1)
    np.savez(out, **arrays)


def job(*unit):
    return documents(rows, *unit)


def load(path):
    """Yields kind, length, tokens and answers."""
    with np.load(path) as arrays:
        for key in arrays.files:
            kind, length, part = key.split(":")
            if part == "tokens":
                bits = arrays[f"{kind}:{length}:answers"]
                yield kind, int(length), arrays[key], np.unpackbits(bits, 1, count=int(length)).astype(bool)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", choices=["whole", "compared"], default="whole")
    a = parser.parse_args()
    make(a.corpus, a.out, a.set)
