"""Prints tables of a run's log in Markdown.

    python table.py LOG
"""

import json
import sys
from collections import defaultdict


def main(path):
    seen, tests, samples = {}, defaultdict(dict), {}
    for line in open(path):
        name, _, rest = line.partition(" ")
        if not rest.startswith("{"):
            continue
        entry = json.loads(rest)
        if "step" in entry:
            seen[name] = entry
        elif "test" in entry:
            value = entry["loss"] if entry["test"] == "held_out" else (entry["whole"], entry["tokens_right"])
            tests[entry["test"], entry["length"]][name] = value
            samples[entry["test"]] = entry.get("samples")
    names = list(seen)
    print("| |", " | ".join(name.split("@")[0] for name in names), "|")
    print("|---|" + "---:|" * len(names))
    print("| steps |", " | ".join(str(seen[name]["step"]) for name in names), "|")
    for (kind, length), values in tests.items():
        def cell(name):
            value = values.get(name)
            if value is None:
                return "-"
            return f"{value:.3f}" if isinstance(value, float) else f"{value[0]} ({100 * value[1]:.0f} %)"

        of = f" of {samples[kind]}" if samples[kind] else ""
        print(f"| {kind}{of}, {length} tokens |", " | ".join(map(cell, names)), "|")


if __name__ == "__main__":
    main(sys.argv[1])
