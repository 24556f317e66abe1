"""Draws the figures of the results as SVG.

    python figure.py layers OUT.svg TASKS_LOG RETRIEVAL_LOG
    python figure.py lengths OUT.svg TASKS_LOG
    python figure.py phases OUT.svg TASK DENSE_FOLDER NAME=FOLDER ...
"""

import random
import sys

import phases
import table

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 720, 320, 52, 16, 60, 210
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]
LAYERS = {
    "mamba2": "0", "mamba2+1-middle": "1", "mamba2+2-spread": "2", "mamba2+3-spread": "3", "mamba2+4-spread": "4",
    "mamba2+6-spread": "6", "attention": "12",
}


def draw(path, categories, series, x_title):
    """`series`: a name, and for each category a per cent value, its interval and the seeds' values, or None."""
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    y = lambda value: TOP + plot_height * (1 - value / 100)
    step = plot_width / len(categories)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    text = lambda x, y, words, anchor="middle": parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>')
    for tick in range(0, 101, 25):
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + plot_width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>')
        text(LEFT - 6, y(tick) + 4, f"{tick} %", "end")
    for i, category in enumerate(categories):
        text(LEFT + step * (i + 0.5), HEIGHT - BOTTOM + 18 + 14 * (i % 2 if len(category) > 6 else 0), category)
    text(LEFT + plot_width / 2, HEIGHT - 10, x_title)
    for n, (name, values) in enumerate(series):
        color = COLORS[n]
        shift = (n - (len(series) - 1) / 2) * min(12, step / (len(series) + 1))
        for i, value in enumerate(values):
            if value is None:
                continue
            middle, low, high, *seeds = value
            x = LEFT + step * (i + 0.5) + shift
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" stroke="{color}" stroke-width="2"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y(middle):.1f}" r="4" fill="{color}"/>')
            for seed in seeds:
                parts.append(f'<circle cx="{x + 5:.1f}" cy="{y(seed):.1f}" r="2" fill="none" stroke="{color}"/>')
        at = TOP + 20 * n + 8
        parts.append(f'<circle cx="{LEFT + plot_width + 16}" cy="{at}" r="4" fill="{color}"/>')
        text(LEFT + plot_width + 26, at + 4, name, "start")
    open(path, "w").write("\n".join([*parts, "</svg>", ""]))


def point(runs, kind, length):
    """Returns the mean over seeds, its interval and the seeds' values."""
    found = table.values(runs, (kind, length))
    if not found:
        return None
    shares = [table.mean(found), *table.interval(table.draws(found, random.Random(0))), *map(table.number, found)]
    return [100 * share for share in shares]


def runs(log, data):
    by_model = {}
    for (model, _, of), run in table.read([log]).items():
        if of == data:
            by_model.setdefault(model, []).append(run)
    return by_model


def layers(path, tasks, retrieval):
    series = [
        ("needle, 2,048 tokens", tasks, "tasks", "needle", 2048),
        ("needle, 8,192 tokens", tasks, "tasks", "needle", 8192),
        ("recall in 8 turns, 2,048 tokens", tasks, "tasks", "recall", 2048),
        ("swaps, 16 inputs (retrieval)", retrieval, "retrieval", "swaps 16", 512),
    ]
    points = [
        (name, [point(runs(log, data).get(model, []), kind, length) for model in LAYERS])
        for name, log, data, kind, length in series
    ]
    draw(path, list(LAYERS.values()), points, "attention layers of 12, the others Mamba-2")


def lengths(path, tasks):
    of = runs(tasks, "tasks")
    tested = [512, 2048, 4096, 8192]
    points = [
        (f"{LAYERS[model]} attention layers", [point(of[model], "needle", length) for length in tested])
        for model in ("mamba2", "mamba2+3-spread", "mamba2+6-spread", "attention")
    ]
    draw(path, [f"{length:,}" for length in tested], points, "needle: tokens of the document; training had 2,048")


def by_phase(path, task, dense, *named):
    dense = phases.records(dense, task)["dense-f16"]
    right = [sample for sample, record in dense.items() if record["score"]["value"] == 1.0]
    of = {name: phases.records(folder, task) for name, folder in (part.split("=") for part in named)}
    settings = list(dict.fromkeys(setting for found in of.values() for setting in found if setting != "dense-f16"))

    def point(found, setting):
        values = [found[setting][sample]["score"]["value"] for sample in right if sample in found.get(setting, {})]
        if not values:
            return None
        return tuple(100 * x for x in (sum(values) / len(values), *phases.interval(values)))

    labels = [setting.removesuffix("-2x") for setting in settings]
    draw(path, labels, [(name, [point(found, setting) for setting in settings]) for name, found in of.items()], f"{task}: score")


if __name__ == "__main__":
    {"layers": layers, "lengths": lengths, "phases": by_phase}[sys.argv[1]](*sys.argv[2:])
