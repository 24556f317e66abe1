"""Prints tables of runs' logs in Markdown: test results by seed, and tokens until they were
learned.

    python table.py LOG ... [--data retrieval] [--models MODEL ...]
"""

import argparse
import json
import math
from collections import defaultdict

# Kinds with one-word answers, for which the share of right answers is shown.
BY_TOKEN = ("swaps", "ring")
LEARNED = 0.5


def wilson(right, count, z=1.96):
    """Returns Wilson's 95 % interval of a share."""
    share, square = right / count, z * z / count
    middle, half = share + square / 2, z * math.sqrt((share * (1 - share) + square / 4) / count)
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


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


def row(title, cells):
    print(f"| {title} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("logs", nargs="+")
    parser.add_argument("--data", default="retrieval")
    parser.add_argument("--models", nargs="*")
    a = parser.parse_args()
    by_model = defaultdict(list)
    for (model, seed, data), run in sorted(read(a.logs).items()):
        if data == a.data and run.tests:
            by_model[model].append((seed, run))
    models = [model for model in a.models or by_model if model in by_model]
    of = lambda model, value: " / ".join("-" if (x := value(run)) is None else x for _, run in by_model[model])
    row("", models)
    print("|---|" + "---:|" * len(models))
    row("seeds", [", ".join(str(seed) for seed, _ in by_model[model]) for model in models])
    row("million training tokens", [of(model, lambda run: f"{run.tokens / 1e6:.0f}") for model in models])
    units = {}
    for model in models:
        for _, run in by_model[model]:
            units.update(dict.fromkeys(run.tests))
    for kind, length in units:
        def cell(run):
            entry = run.tests.get((kind, length))
            if entry is None:
                return None
            if kind == "held_out":
                return f"{entry['loss']:.3f}"
            if kind.split()[0] in BY_TOKEN:
                return f"{100 * entry['tokens_right']:.0f}"
            return f"{100 * entry['whole'] / entry['samples']:.0f} ({100 * entry['tokens_right']:.0f})"

        def pooled(model):
            entries = [run.tests[kind, length] for _, run in by_model[model] if (kind, length) in run.tests]
            if not entries or kind == "held_out" or kind.split()[0] in BY_TOKEN:
                return ""
            low, high = wilson(sum(e["whole"] for e in entries), sum(e["samples"] for e in entries))
            return f" [{100 * low:.0f}, {100 * high:.0f}]"

        unit = {"held_out": "loss, nats a token"}.get(kind, "% of answers" if kind.split()[0] in BY_TOKEN else "% of documents (of tokens)")
        row(f"{kind}, {length}: {unit}", [of(model, cell) + pooled(model) for model in models])
    kinds = {kind for runs in by_model.values() for _, run in runs for _, found in run.probes for kind in found}
    for kind in sorted(kinds):
        if not any(run.learned(kind) for runs in by_model.values() for _, run in runs):
            continue
        learned = lambda run: "-" if (tokens := run.learned(kind)) is None else f"{tokens / 1e6:.0f}"
        row(f"{kind}: million tokens until {LEARNED:.0%}", [of(model, learned) for model in models])


if __name__ == "__main__":
    main()
