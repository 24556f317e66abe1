"""Prints a Markdown table of runs' logs.

    python table.py LOG ... [--data retrieval] [--models MODEL ...] [--units KIND:LENGTH ...]
                            [--tokens | --learned | --against MODEL]

A cell is the mean over seeds, its 95 % interval, and the seeds' values: the per cent of documents
whose answers are all right, or the loss of `held_out`. `--tokens` prints the per cent of right
tokens, `--learned` the million training tokens until half of the shortest documents are right, and
`--against` the differences to another model.
"""

import argparse
import json
import random
from collections import defaultdict

# Kinds with one-word answers, for which the share of right answers is shown.
BY_TOKEN = ("swaps", "ring")
LEARNED = 0.5
RESAMPLES = 4000


def draws(values, rng):
    """Returns bootstrapped means over seeds. `values`: of each seed, right and all documents, or a number.

    Seeds are resampled. A seed's share of documents is drawn from its Jeffreys posterior, so a share
    of 0 or 1 has an interval too. With one seed the interval is that of the documents. With two or
    three it contains the values of all seeds.
    """
    def draw(value):
        if isinstance(value, tuple):
            right, count = value
            return rng.betavariate(right + 0.5, count - right + 0.5)
        return value

    return [sum(map(draw, rng.choices(values, k=len(values)))) / len(values) for _ in range(RESAMPLES)]


def interval(means):
    means = sorted(means)
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def number(value):
    return value[0] / value[1] if isinstance(value, tuple) else value


def mean(values):
    return sum(map(number, values)) / len(values)


class Run:
    def __init__(self):
        self.tokens, self.done, self.tests, self.probes = 0, False, {}, []

    def add(self, entry):
        if "step" in entry:
            self.tokens = entry["tokens_per_second"] * entry["seconds"]
        if "trained_tokens" in entry:
            self.tokens = entry["trained_tokens"]
        if "probe" in entry:
            self.probes.append((entry["trained_tokens"], entry["probe"]))
        elif "test" in entry:
            self.tests[entry["test"], entry["length"]] = entry
        elif "done" in entry:
            self.done = True

    def learned(self, kind):
        """Returns the training tokens after which half of the kind's shortest documents are
        right."""
        for tokens, found in self.probes:
            whole, share = found[kind]
            if (share if kind.split()[0] in BY_TOKEN else whole / 64) >= LEARNED:
                return tokens
        return None


def read(paths):
    """Returns runs by model, seed and data. Of repeated runs the last one counts."""
    runs = {}
    for path in paths:
        for line in open(path):
            name, _, rest = line.partition(" ")
            if not rest.startswith("{"):
                continue
            entry = json.loads(rest)
            model, _, after = name.partition("@")
            seed, _, data = after.partition("-")
            if "model" in entry:
                runs[model, int(seed), data] = Run()
            runs[model, int(seed), data].add(entry)
    return runs


def value(run, unit, tokens=False):
    """Returns a loss, a share of right tokens, or right and all documents; None if it was not tested."""
    entry = run.tests.get(unit)
    if entry is None:
        return None
    if unit[0] == "held_out":
        return entry["loss"]
    if tokens or unit[0].split()[0] in BY_TOKEN:
        return entry["tokens_right"]
    return entry["whole"], entry["samples"]


def values(runs, unit, tokens=False):
    return [x for run in runs if (x := value(run, unit, tokens)) is not None]


def cell(found, unit, other=None):
    """Returns a mean with its interval, and the seeds' values; or the difference to `other`."""
    if not found or other is not None and not other:
        return ""
    rng, loss = random.Random(0), unit[0] == "held_out"
    means, middle = draws(found, rng), mean(found)
    if other is not None:
        means = [a - b for a, b in zip(means, draws(other, rng))]
        middle -= mean(other)
    sign = "+" if other is not None else ""
    show = lambda x, sign="": f"{x:{sign}.3f}" if loss else f"{100 * x:{sign}.0f}"
    low, high = interval(means)
    shown = show(middle, sign) if low == high else f"{show(middle, sign)} [{show(low, sign)}, {show(high, sign)}]"
    return shown if other is not None or len(found) == 1 else f"{shown} ({' / '.join(show(number(x)) for x in found)})"


def learned(runs, unit):
    times = [run.learned(unit[0]) for run in runs]
    return " / ".join("-" if time is None else f"{time / 1e6:.0f}" for time in times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("logs", nargs="+")
    parser.add_argument("--data", default="retrieval")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--units", nargs="*")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tokens", action="store_true")
    what.add_argument("--learned", action="store_true")
    what.add_argument("--against")
    a = parser.parse_args()
    by_model = defaultdict(list)
    for (model, _, data), run in sorted(read(a.logs).items()):
        if data == a.data and run.tests:
            by_model[model].append(run)
    units = dict.fromkeys(unit for runs in by_model.values() for run in runs for unit in run.tests)
    if a.units:
        units = [(kind, int(length)) for kind, _, length in (unit.rpartition(":") for unit in a.units)]
    row = lambda *cells: print(f"| {' | '.join(cells)} |")
    row("model", "million tokens", *(f"{kind}, {length:,}" for kind, length in units))
    print("|---|" + "---:|" * (1 + len(units)))
    for model in a.models or by_model:
        runs = by_model[model]
        if a.learned:
            cells = [learned(runs, unit) for unit in units]
        elif a.against:
            cells = [cell(values(runs, unit), unit, values(by_model[a.against], unit)) for unit in units]
        else:
            cells = [cell(values(runs, unit, a.tokens), unit) for unit in units]
        row(model, " / ".join(f"{run.tokens / 1e6:.0f}" for run in runs), *cells)


if __name__ == "__main__":
    main()
