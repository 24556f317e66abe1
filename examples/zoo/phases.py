"""Prints Markdown tables of `longctx eval`'s results by the phase in which tokens are compressed.

    python phases.py TASK DENSE_FOLDER NAME=FOLDER ...

DENSE_FOLDER has the results of `dense-f16`. Only samples that dense-f16 answers without an error
are used. Intervals contain 95 % of 2,000 bootstrap resamples of the samples. Differences are to
the first folder, paired by sample.
"""

import json
import random
import sys
from pathlib import Path

RESAMPLES = 2000


def records(folder, task):
    """Returns records by setting and sample."""
    found = {}
    for path in Path(folder).glob("results-*.jsonl"):
        for line in open(path):
            record = json.loads(line)
            if record["task"] == task:
                found.setdefault(record["setting"], {})[record["sample"]] = record
    return found


def interval(values):
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def percent(values, form=".0f"):
    low, high = interval(values)
    shown = lambda x: f"{100 * x:{form}}"
    return f"{shown(sum(values) / len(values))} [{shown(low)}, {shown(high)}]"


def main(task, dense, *named):
    dense = records(dense, task)["dense-f16"]
    solved = [sample for sample, record in dense.items() if record["score"]["value"] == 1.0]
    print(f"{task}: dense-f16 answers {len(solved)} of {len(dense)} samples without an error.\n")
    folders = {name: records(folder, task) for name, folder in (part.split("=") for part in named)}
    first = next(iter(folders))
    print("| setting | compressed | samples | bytes to dense | score, % | by quarter of the answer | to " + first + ", points |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for setting in dict.fromkeys(setting for found in folders.values() for setting in found if setting != "dense-f16"):
        for name, found in folders.items():
            answered = [sample for sample in solved if sample in found.get(setting, {})]
            if not answered:
                continue
            got = [found[setting][sample] for sample in answered]
            values = [record["score"]["value"] for record in got]
            quarters = [
                f"{100 * sum(record['score']['quarters'][i] for record in got) / len(got):.0f}" for i in range(4)
            ] if all("quarters" in record["score"] for record in got) else ["-"]
            size = sum(record["kv_bytes"] / record["dense_bytes"] for record in got) / len(got)
            both = [sample for sample in answered if sample in folders[first].get(setting, {})]
            change = [
                found[setting][sample]["score"]["value"] - folders[first][setting][sample]["score"]["value"] for sample in both
            ]
            shown = "" if name == first or not both else percent(change, "+.1f")
            print(f"| {setting} | {name} | {len(got)} | {size:.2f} | {percent(values)} | {' / '.join(quarters)} | {shown} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
