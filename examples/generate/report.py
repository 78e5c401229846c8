"""Turns the loss reports of `generate loss --report` into one HTML page with its figures inside.

usage: report.py FOLDER OUT.html

FOLDER holds exact.json, one file for each policy, and tolerance-*.json: the balanced policy over a sweep.
"""

import base64
import html
import io
import json
import os
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

POLICIES = {"quality": "#2a6f97", "balanced": "#3a7d44", "speed": "#c05621"}
PRECISIONS = {1: "i8", 2: "bf16", 3: "f16", 4: "f32"}  # ADAATTN_PRECISION_*
SHOWN = "balanced"  # the policy that the figures by layer and head are about
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2.5em auto; padding: 0 1.5em }
h1 { font-size: 1.7em; margin-bottom: .2em } h2 { font-size: 1.2em; margin: 2.2em 0 .3em }
p { max-width: 48em; margin: .4em 0 } .about { color: #555 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .35em .9em; text-align: right; border-bottom: 1px solid #ddd } td { white-space: nowrap } th { font-weight: 600 }
th:first-child, td:first-child { text-align: left; padding-left: 0 } img { max-width: 100%; display: block }
"""


def figure(fig, name, alt):
    """The figure as an <img>; REPORT_FIGURES names a folder that gets a copy of it."""
    data = io.BytesIO()
    fig.savefig(data, format="png", dpi=150, bbox_inches="tight")
    plt.close(fig)
    if os.environ.get("REPORT_FIGURES"):
        pathlib.Path(os.environ["REPORT_FIGURES"], name + ".png").write_bytes(data.getvalue())
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def newest_window(report):
    """Heads of the last window, by layer and head."""
    last = max(head["batch"] for head in report["heads"])
    return sorted((h for h in report["heads"] if h["batch"] == last), key=lambda h: (h["layer"], h["head"]))


def grid(heads, value):
    rows = [[float("nan")] * (1 + max(h["head"] for h in heads)) for _ in range(1 + max(h["layer"] for h in heads))]
    for head in heads:
        number = value(head)
        rows[head["layer"]][head["head"]] = float("nan") if number is None else number
    return rows


def heat_tables(heads):
    precisions = {(h["layer"], h["head"]): PRECISIONS.get(h["precision"], str(h["precision"])) for h in heads}
    panels = [
        ("entropy", lambda h: h["entropy"], "{:.2f}", "Purples", 1),
        ("tiles kept", lambda h: h["kept_tiles"], "{:.0%}", "Blues", 1),
        ("rank of V, precision", lambda h: h["rank_v"], "{:.0f}\n{precision}", "Greens", None),
        ("predicted error", lambda h: h["predicted_error"], "{:.3f}", "Oranges", "error"),
        ("measured error", lambda h: h["measured_error"], "{:.3f}", "Oranges", "error"),
    ]
    errors = [e for h in heads for e in (h["predicted_error"], h["measured_error"]) if e is not None]
    fig, axes = plt.subplots(2, 3, figsize=(12, 7), constrained_layout=True)
    for axis, (title, value, text, colors, top) in zip(axes.flat, panels):
        rows = grid(heads, value)
        top = max(errors) if top == "error" else top or max(max(row) for row in rows)
        axis.imshow(rows, cmap=colors, vmin=0, vmax=1.15 * top or 1, aspect="auto")
        for y, row in enumerate(rows):
            for x, number in enumerate(row):
                label = "exact" if number != number else text.format(number, precision=precisions[y, x])
                color = "white" if number > 0.65 * top else "#222"
                axis.text(x, y, label, ha="center", va="center", fontsize=9, color=color)
        axis.set(title=title, xlabel="head", ylabel="layer", xticks=range(len(rows[0])), yticks=range(len(rows)))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    predicted_and_measured(axes.flat[5], heads)
    return figure(fig, "heads", "Entropy, kept tiles, rank and errors by layer and head")


def predicted_and_measured(axis, heads):
    points = [(h["predicted_error"], h["measured_error"], h["layer"]) for h in heads if h["measured_error"] is not None]
    if points:
        predicted, measured, layers = zip(*points)
        top = 1.1 * max(predicted + measured)
        axis.plot([0, top], [0, top], color="#999", linewidth=1, linestyle="--")
        dots = axis.scatter(predicted, measured, c=layers, cmap="viridis", s=28, edgecolor="white", linewidth=0.5)
        axis.figure.colorbar(dots, ax=axis, label="layer", ticks=sorted(set(layers)))
        axis.set(xlim=(0, top), ylim=(0, top))
    axis.set(title="predicted against measured", xlabel="predicted error", ylabel="measured error")
    axis.spines[["top", "right"]].set_visible(False)


def tile_maps(heads):
    layers, columns = 1 + max(h["layer"] for h in heads), 1 + max(h["head"] for h in heads)
    fig, axes = plt.subplots(layers, columns, figsize=(1.75 * columns, 1.95 * layers), squeeze=False)
    colors = ListedColormap(["#f4f4f2", "#c9d9e6", "#174a6e"])
    for axis in axes.flat:
        axis.axis("off")
    for head in heads:
        axis = axes[head["layer"]][head["head"]]
        axis.set_title(f"{head['layer']}.{head['head']}   {head['kept_tiles']:.0%}", fontsize=9, color="#444", pad=3)
        if "tiles" in head:
            cells = [[int(state) for state in row] for row in head["tiles"]]
            axis.imshow(cells, cmap=colors, vmin=0, vmax=2, interpolation="nearest")
    fig.subplots_adjust(wspace=0.08, hspace=0.2)
    return figure(fig, "tiles", "Which tiles of each head were computed exactly")


def error_and_time(exact, runs, sweep):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    for axis, key, label, factor in (
        (left, lambda r: r["measured_error"], "mean measured error of a head", 1),
        (right, lambda r: loss(r) / loss(exact) - 1, "change of the loss, %", 100),
    ):
        x = [factor * key(r) for r in sweep]
        y = [r["attention_seconds"] for r in sweep]
        axis.axhline(exact["attention_seconds"], color="#999", linewidth=1, linestyle="--", label="exact")
        # The loss need not follow the error: no line there.
        line = "-" if axis is left else ""
        axis.plot(x, y, color="#aaa", linewidth=1.5, linestyle=line, marker="o", markersize=5,
                  label="balanced, tolerances as marked")
        for i, (at, seconds, report) in enumerate(zip(x, y, sweep)):
            # Above and below in turn: neighbours may lie close together.
            axis.annotate(f"{report['tolerance']:g}", (at, seconds), (4, -12 if i % 2 else 5),
                          textcoords="offset points", fontsize=8, color="#666")
        for name, report in runs.items():
            axis.plot(factor * key(report), report["attention_seconds"], marker="D", linestyle="", markersize=8,
                      color=POLICIES[name], label=name)
        axis.set(xlabel=label, ylabel="seconds in attention")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    fig.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=5, loc="outside upper center")
    return figure(fig, "sweep", "Time of attention against its error")


def loss(report):
    return report.get("bits_per_byte", report.get("bits_per_token"))


def policy_table(exact, runs):
    unit = "bits per byte" if "bits_per_byte" in exact else "bits per token"
    rows = [f"<tr><td>exact</td><td>{loss(exact):.4f}</td><td></td><td>{exact['attention_seconds']:.2f} s</td>"
            "<td></td><td></td><td></td><td></td><td></td></tr>"]
    for name, r in runs.items():
        used = ", ".join(PRECISIONS.get(p, str(p)) for p in sorted({h["precision"] for h in r["heads"]}))
        rows.append(
            f"<tr><td>{name}</td><td>{loss(r):.4f}</td><td>{100 * (loss(r) / loss(exact) - 1):+.3f} %</td>"
            f"<td>{r['attention_seconds']:.2f} s</td><td>{exact['attention_seconds'] / r['attention_seconds']:.2f} ×</td>"
            f"<td>{r['kept_tiles']:.0%}</td><td>{r['mean_rank_v']:.0f}</td>"
            f"<td>{r['predicted_error']:.3f} / {r['measured_error']:.3f}</td><td>{used}</td></tr>")
    return (f"<table><tr><th>policy</th><th>{unit}</th><th>change</th><th>attention</th><th>speed-up</th>"
            "<th>tiles kept</th><th>mean rank of V</th><th>error predicted / measured</th><th>precision</th></tr>"
            + "".join(rows) + "</table>")


def page(exact, runs, sweep):
    heads = newest_window(runs[SHOWN])
    say = {key: html.escape(str(exact[key])) for key in ("model", "text", "device", "isa", "library", "dtype")}
    threads = "" if exact["isa"].startswith("sm_") else f", {exact['threads']} threads"
    size = f"{exact['windows']} windows of {exact['context']} tokens"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Adaptive attention: {say['model']}</title><style>{STYLE}</style>
<h1>Adaptive attention, head by head</h1>
<p class="about">{say['model']} on the first {size} of {say['text']}<br>
{say['device']}, {say['isa']}{threads}, {say['dtype']} · {say['library']}</p>
{policy_table(exact, runs)}
<p class="about">Errors are relative to the spread of V: 0 is exact, 1 is as wrong as the mean of V everywhere.</p>
<h2>Error and time</h2>
<p>The same text at several tolerances. The dashed line is exact attention; tolerances stand beside their points.
Times are those of single runs.</p>
{error_and_time(exact, runs, sweep)}
<h2>Each head of the newest window, policy {SHOWN}</h2>
<p>What the library saw (entropy), what it decided (tiles, rank), and how far off it was.
Points under the diagonal did better than predicted.</p>
{heat_tables(heads)}
<h2>Tiles computed exactly, policy {SHOWN}</h2>
<p>Queries run down, keys to the right; a cell is 128 × 128 scores. Dark: computed exactly. Light: not.
Pale grey: masked. Over each map: layer, head and the share computed exactly.</p>
{tile_maps(heads)}
</html>
"""


def main():
    folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    read = lambda path: json.loads(path.read_text())
    sweep = sorted((read(path) for path in folder.glob("tolerance-*.json")), key=lambda r: r["tolerance"])
    runs = {name: read(folder / f"{name}.json") for name in POLICIES}
    out.write_text(page(read(folder / "exact.json"), runs, sweep))


if __name__ == "__main__":
    main()
