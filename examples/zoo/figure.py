"""Draws the figures of the results as SVG.

    python figure.py layers OUT.svg KNEE_LOG RETRIEVAL_LOG
    python figure.py phases OUT.svg TASK DENSE_FOLDER NAME=FOLDER ...
"""

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
    """`series`: a name, and for each category a per cent value with its interval, or None."""
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
            middle, low, high = value
            x = LEFT + step * (i + 0.5) + shift
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" stroke="{color}" stroke-width="2"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y(middle):.1f}" r="4" fill="{color}"/>')
        at = TOP + 20 * n + 8
        parts.append(f'<circle cx="{LEFT + plot_width + 16}" cy="{at}" r="4" fill="{color}"/>')
        text(LEFT + plot_width + 26, at + 4, name, "start")
    open(path, "w").write("\n".join([*parts, "</svg>", ""]))


def layers(path, knee, retrieval):
    def points(log, data, kind, length):
        by_model = {}
        for (model, _, of), run in table.read([log]).items():
            if of == data and (kind, length) in run.tests:
                by_model.setdefault(model, []).append(run.tests[kind, length])
        return [by_model.get(model) for model in LAYERS]

    def documents(entries):
        if not entries:
            return None
        whole, samples = sum(e["whole"] for e in entries), sum(e["samples"] for e in entries)
        low, high = table.wilson(whole, samples)
        return 100 * whole / samples, 100 * low, 100 * high

    def answers(entries):
        shares = [100 * e["tokens_right"] for e in entries or []]
        return (sum(shares) / len(shares), min(shares), max(shares)) if shares else None

    draw(path, list(LAYERS.values()), [
        ("needles, 2,048 tokens (tasks)", [documents(e) for e in points(knee, "tasks", "needle", 2048)]),
        ("swaps, 16 inputs (retrieval)", [answers(e) for e in points(retrieval, "retrieval", "swaps 16", 512)]),
        ("ring, 64 inputs (retrieval)", [answers(e) for e in points(retrieval, "retrieval", "ring 64", 512)]),
    ], "attention layers of 12, the others Mamba-2")


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
    {"layers": layers, "phases": by_phase}[sys.argv[1]](*sys.argv[2:])
