"""Prints a Markdown table of bytes and decode times from `longctx eval`'s results.

    python cost.py RESULTS.jsonl ...
"""

import json
import statistics
import sys
from collections import defaultdict


def main(paths):
    bytes_of, times = {}, defaultdict(list)
    for path in paths:
        for line in open(path):
            record = json.loads(line)
            key = record["setting"], record["prompt_tokens"]
            bytes_of[key] = record["kv_bytes"]
            times[key].append(1000 / record["timings"]["decode_tokens_per_second"])
    lengths = sorted({length for _, length in times})
    print("| model |", " | ".join(f"MB, {length:,} tokens | ms per token" for length in lengths), "|")
    print("|---|" + "---:|---:|" * len(lengths))
    for model in dict.fromkeys(model for model, _ in times):
        cells = []
        for length in lengths:
            some = times[model, length]
            spread = f"{statistics.median(some):.2f} ({min(some):.2f} to {max(some):.2f})"
            cells.append(f"{bytes_of[model, length] / 1e6:.2f} | {spread}")
        print(f"| {model} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
