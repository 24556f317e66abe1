"""Creates training rows of tokens and weights, once for all models, with a process per core.

    python data.py CORPUS OUT --recipe tasks|retrieval|text --rows N [--length 2048] [--seed 0]

Writes `OUT.tokens.npy` and `OUT.weights.npy`, `[rows, length + 1]`, u16 and u8, in the order of
training. Documents become longer with the rows, so a model first learns to look back a short way.
The recipe `tasks` trained the embedded model. The recipe `retrieval` starts with documents in which
every second to fourth token is an answer.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import tasks

# Weights in tenths: unpredictable tokens, generated text, answers; and natural text.
WEIGHTS = np.array([0, 2, 20], np.uint8)
NATURAL = 10
# The probability of each kind of document.
SHARES = {
    "needle": 20, "multi_needle": 20, "pairs": 15, "copy": 10, "recall": 12, "listing": 4, "table_edit": 12, "state_machine": 7
}
EARLY_SHARES = {
    "associations": 40, "repetition": 15, "pairs": 10, "needle": 10, "multi_needle": 8, "recall": 5, "swaps": 6, "ring": 6
}
LATE_SHARES = {
    "associations": 14, "repetition": 4, "pairs": 14, "needle": 18, "multi_needle": 15, "recall": 14, "copy": 5, "swaps": 8,
    "ring": 8,
}
# The share of rows that use the early weights.
EARLY = 0.25
BLOCK = 64
# Rows are made by forked processes.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


# The tokenizer's pre-tokenizer, for ASCII.
SPLIT = re.compile(
    r"<\|[a-z]+\|>|'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9<]+| ?<(?!\|)[^\sA-Za-z0-9<]*"
    r"|\s+(?![^\s0-9])|\s+"
)


class Encoder:
    """The tokenizer with a cache of words, several times as fast on repetitive text."""

    def __init__(self, path):
        self.tokenizer, self.known = Tokenizer.from_file(str(path)), {}

    def words(self, text):
        words = SPLIT.findall(text)
        for word in set(words).difference(self.known):
            self.known[word] = self.tokenizer.encode(word, add_special_tokens=False).ids
        return words, [self.known[word] for word in words]


def natural(corpus):
    """Returns the tokens of `natural.txt`. Tokenizes it and `held_out.txt` if that was not done
    before."""
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    for name in ("natural", "held_out"):
        if not (corpus / f"{name}.npy").exists():
            parts = (corpus / f"{name}.txt").read_text().split("\n\n\n")
            ids = [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(parts)]
            np.save(corpus / f"{name}.npy", np.concatenate(ids))
    return np.load(corpus / "natural.npy")


class Rows:
    def __init__(self, corpus, recipe, length):
        self.encoder = Encoder(corpus / "tokenizer.json")
        text = (corpus / "natural.txt").read_text()
        self.haystacks = ((corpus / "prose.txt").read_text().split(" "), text.split(" "))
        self.vocabulary = sorted(
            word.replace("\u0120", " ") for word in self.encoder.tokenizer.get_vocab() if re.fullmatch("\u0120[a-z]{4,}", word)
        )
        self.natural = natural(corpus)
        self.recipe, self.length = recipe, length

    def maker(self, rng):
        return tasks.Maker(rng, *self.haystacks, self.vocabulary)

    def encode(self, document):
        """Returns tokens and weights, with the first token of a document, whose weight is 0."""
        words, ids = self.encoder.words(document.text)
        classes = np.repeat(
            np.array([kind for _, kind in document.pieces], np.uint8), [len(text) for text, _ in document.pieces]
        )
        starts = np.cumsum([0, *map(len, words[:-1])])
        weights = np.repeat(WEIGHTS[classes[starts]], [len(i) for i in ids])
        tokens = np.fromiter(itertools.chain.from_iterable(ids), np.uint16, len(weights))
        return np.insert(tokens, 0, 0), np.insert(weights, 0, 0)

    def natural_piece(self, rng, count):
        start = rng.randrange(len(self.natural) - count)
        weights = np.full(count, NATURAL, np.uint8)
        tokens = self.natural[start : start + count].copy()
        tokens[0], weights[0] = 0, 0
        return tokens, weights

    def mix(self, progress):
        """Returns the share of natural text, the weight of each kind, and the tokens of the
        shortest document."""
        if self.recipe == "tasks":
            return 0.25, SHARES, 80
        return (0.1, EARLY_SHARES, 40) if progress < EARLY else (0.25, LATE_SHARES, 80)

    def row(self, seed, progress):
        """`progress`: 0 for the first row, 1 for the last."""
        rng = random.Random(seed)
        size = self.length + 1
        natural, shares, shortest = self.mix(progress)
        if self.recipe == "text" or rng.random() < natural:
            return self.natural_piece(rng, size)
        maker = self.maker(rng)
        # Half of the last rows are one document each.
        longest = size if progress > 0.6 else max(200, int(size * progress / 0.6))
        whole = progress > 0.6 and rng.random() < 0.5
        parts, used, asked_once = [], 0, False
        while size - used > 100:
            kind = rng.choices(list(shares), shares.values())[0]
            if kind in ("needle", "multi_needle") and asked_once:
                continue  # Two keys of one name in a row would be ambiguous.
            room = size - used
            target = room if whole else min(room, int(np.exp(rng.uniform(np.log(shortest), np.log(longest)))))
            tokens, weights = self.encode(maker.document(kind, int(target * 0.97)))
            if len(tokens) > room:
                if whole:
                    continue
                break
            asked_once |= kind in ("needle", "multi_needle")
            parts.append((tokens, weights))
            used += len(tokens)
        if used < size:
            parts.append(self.natural_piece(rng, size - used))
        return tuple(np.concatenate(x) for x in zip(*parts))


def work(rows, job):
    block, seed, total, out = job
    tokens = np.lib.format.open_memmap(f"{out}.tokens.npy", "r+")
    weights = np.lib.format.open_memmap(f"{out}.weights.npy", "r+")
    for i in range(block * BLOCK, min((block + 1) * BLOCK, total)):
        tokens[i], weights[i] = rows.row(seed * 10_000_019 + i, i / total)


def make(corpus, out, recipe, count, length, seed):
    for kind, dtype in (("tokens", np.uint16), ("weights", np.uint8)):
        np.lib.format.open_memmap(f"{out}.{kind}.npy", "w+", dtype, (count, length + 1))
    jobs = [(block, seed, count, out) for block in range(-(-count // BLOCK))]
    context = multiprocessing.get_context("fork")
    rows = Rows(corpus, recipe, length)
    processes = []
    cores = os.cpu_count()
    for core in range(cores):
        mine = jobs[core::cores]
        process = context.Process(target=lambda: [work(rows, job) for job in mine])
        process.start()
        processes.append(process)
    for process in processes:
        process.join()
        assert process.exitcode == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out")
    parser.add_argument("--recipe", choices=["tasks", "retrieval", "text"], default="tasks")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    make(a.corpus, a.out, a.recipe, a.rows, a.length, a.seed)
