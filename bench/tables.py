#!/usr/bin/env python3
"""Writes the tables of README.md, docs/performance.md and docs/adaptive.md from bench/results.

usage: tables.py [--check]   --check: changes nothing, and fails where a table is not what the results say

A table stands between <!-- table: NAME --> and <!-- end -->. Columns that no bench measures (the losses of the policies,
from `generate loss`) are kept as they are.
"""
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs/performance.md", ROOT / "docs/adaptive.md"]


def rows_of(name):
    return json.loads((ROOT / "bench/results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def fields(name):
    """dtype, head_dim, mask, batch, heads of q and of keys, keys, queries (0: as many as keys) and the rest."""
    found = re.fullmatch(r"(?:fwd|decode)/(\w+)/d(\d+)/(\w+)/b(\d+)h(\d+)kv(\d+)/s(\d+)(?:q(\d+))?(/.*)?", name)
    if not found:
        return None
    dtype, dim, mask, batch, heads_q, heads_kv, keys, queries, rest = found.groups()
    return (dtype, int(dim), mask, int(batch), int(heads_q), int(heads_kv), int(keys), int(queries or 0), rest or "")


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
                     + ["| " + " | ".join(row) + " |" for row in rows])


def ratio(row):
    return f"{row['ratio']:.2f}" if row and "ratio" in row else ""


def by_peer(results, suite):
    """name -> peer -> row, in the order of the results."""
    found = {}
    for row in rows_of(results):
        if row["name"].startswith(suite):
            found.setdefault(row["name"], {})[re.split("[-0-9]", row["peer"])[0]] = row
    return found


def prefill(results):
    shapes = {}
    for name, peers in by_peer(results, "fwd/bf16/").items():
        shape = fields(name)
        if shape is None or shape[-1] or shape[-2]:  # pages, queries in chunks
            continue
        _, dim, mask, batch, heads_q, heads_kv, keys, _, _ = shape
        shapes.setdefault((dim, heads_q, heads_kv, batch, keys), {})[mask] = peers
    rows = []
    for (dim, heads_q, heads_kv, batch, keys), masks in sorted(shapes.items()):
        cells = [f"{dim}", f"{heads_q}/{heads_kv}", f"{batch}", f"{keys}"]
        for mask in "full", "causal":
            peers = masks.get(mask, {})
            cells += [f"{next(iter(peers.values()))['rate']:.0f}" if peers else "", ratio(peers.get("cudnn")),
                      ratio(peers.get("flash"))]
        rows.append(cells)
    return table(["head_dim", "heads q/kv", "batch", "seqlen", "full, TFLOP/s", "× cuDNN", "× FA2", "causal, TFLOP/s",
                  "× cuDNN", "× FA2"], rows)


def highlights():
    """Prefill with head_dim 128 and 16 heads: against cuDNN and, in parentheses, FlashAttention 2."""
    cells = {}
    for name, peers in by_peer("h200_hopper", "fwd/bf16/d128/").items():
        _, _, mask, _, heads_q, heads_kv, keys, queries, rest = fields(name)
        if (heads_q, heads_kv, queries, rest) == (16, 16, 0, ""):
            cells.setdefault(keys, {})[mask] = f"{ratio(peers.get('cudnn'))} ({ratio(peers.get('flash'))})"
    lengths = sorted(cells)
    return table(["seqlen", *map(str, lengths)],
                 [[mask, *(cells[length].get(mask, "") for length in lengths)] for mask in ("full", "causal")])


def decode():
    rows = []
    for name, peers in by_peer("h200_hopper", "decode/").items():
        shape = fields(name)
        if shape is None or shape[-1] == "/cold":
            continue
        dtype, _, _, batch, heads_q, heads_kv, keys, queries, rest = shape
        row = next(iter(peers.values()))
        pages, window = (re.fullmatch(f"/{word}([0-9]+)", rest) for word in ("page", "window"))
        rows.append((queries, window is not None, int(pages[1]) if pages else 0, batch, keys, dtype, [
            "E4M3" if dtype == "e4m3kv" else "BF16", f"{queries}", pages[1] if pages else "none", f"{batch}",
            f"{heads_q}/{heads_kv}", f"{window[1]} of {keys}" if window else f"{keys}", f"{row['ours_us']:.1f}",
            f"{row['rate']:.0f}", ratio(peers.get("cudnn")), ratio(peers.get("flash"))]))
    return table(["k and v", "queries", "pages", "batch", "heads q/kv", "keys", "µs", "GB/s", "× cuDNN", "× FA2"],
                 [cells for *_, cells in sorted(rows, key=lambda row: row[:6])])


def cache_prefill():
    rows = []
    for suite in "fwd/bf16/", "fwd/e4m3kv/":
        for name, peers in by_peer("h200_hopper", suite).items():
            dtype, dim, _, batch, heads_q, heads_kv, keys, queries, rest = fields(name)
            if dtype == "bf16" and not rest:
                continue
            row = next(iter(peers.values()))
            rows.append(["E4M3" if dtype == "e4m3kv" else "BF16", rest[5:] or "none", f"{dim}", f"{heads_q}/{heads_kv}",
                         f"{batch}", f"{queries or keys}", f"{keys}", f"{row['rate']:.0f}", ratio(peers.get("flash"))])
    return table(["k and v", "pages", "head_dim", "heads q/kv", "batch", "queries", "keys", "TFLOP/s", "× FA2"], rows)


def eight_bits():
    fa3 = {row["name"]: f"{row['rate']:.0f}" for row in rows_of("h200_fa3_e4m3")}
    shapes = {}
    for row in rows_of("h200_int8"):
        shape = fields(row["name"])
        if shape is None:
            continue
        dtype, dim, mask, batch, heads_q, heads_kv, keys, _, rest = shape
        kind = "e4m3" if dtype == "e4m3" else rest
        shapes.setdefault((dim, mask, heads_q, heads_kv, batch, keys), {})[kind] = row
    rows = [[f"{dim}", f"{heads_q}/{heads_kv}", f"{batch}", f"{keys}", mask]
            + [ratio(kinds.get(kind)) for kind in ("/int8", "/int8/attend", "e4m3")]
            + ([f"{kinds['e4m3']['rate']:.0f}", fa3.get(kinds["e4m3"]["name"], "")] if "e4m3" in kinds else ["", ""])
            + [f"{kinds[kind]['error']:.3f}" if kind in kinds else "" for kind in ("/int8", "e4m3")]
            for (dim, mask, heads_q, heads_kv, batch, keys), kinds in sorted(shapes.items())]
    return table(["head_dim", "heads q/kv", "batch", "seqlen", "mask", "int8, × BF16", "int8 without its pass over k and v",
                  "E4M3, × BF16", "E4M3, TFLOP/s", "FA3, TFLOP/s", "error of int8", "error of E4M3"], rows)


AGAINST = {"own-f32": "× f32", "own-full": "× full", "fma-f32-peak": "of the FMA peak", "memory-read": "of the read rate"}


def cpu(results):
    calls = {}
    for row in rows_of(results):
        name, threads = row["name"].rsplit("/t", 1)
        calls.setdefault(name, {})[threads] = row
    rows = []
    for name, threads in calls.items():
        dtype, dim, mask, batch, heads_q, heads_kv, keys, queries, _ = fields(name)
        measured = [threads.get(count) for count in ("1", "2")]
        some = next(row for row in measured if row)
        rows.append([f"decode, batch {batch}" if queries else mask, dtype, f"{dim}", f"{heads_q}/{heads_kv}", f"{keys}"]
                    + [f"{row['rate']:.0f}" if row else "" for row in measured] + [some["unit"]]
                    + [ratio(row) for row in measured] + [AGAINST.get(some["peer"], some["peer"])])
    return table(["call", "dtype", "head_dim", "heads q/kv", "keys", "1 thread", "2 threads", "", "1 thread", "2 threads",
                  ""], rows)


def tools():
    rows = [[row["name"].split("/", 1)[0], row["name"].split("/", 1)[1], f"{row['ours_us']:.0f}",
             ratio(row), row["peer"]] for row in rows_of("h200_tools") if not row["name"].endswith("own-kernels")]
    return table(["tool", "problem", "µs", "×", "of"], rows)


def policies(results, prefix, columns, old):
    """Rows of the named policies; columns: functions of a result. What follows them in the old table stays."""
    head, rule, *lines = [line for line in old.strip().splitlines() if line.startswith("|")]
    out = [head, rule]
    measured = {row["name"]: row for row in rows_of(results)}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        policy = re.search(r"ADAATTN_POLICY_(\w+)", cells[0])[1].lower()
        row = measured[prefix.format(policy)]
        for i, column in enumerate(columns):
            cells[1 + i] = column(row)
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def speedup(row):
    return f"1/{row['ratio']:.2f}"


def of_cudnn(row):
    return f"1/{1 / row['details']['of_cudnn']:.2f}"


def tiles(row):
    return f"{100 * row['details']['tiles_kept']:.0f} %"


def rank(row):
    return f"{row['details']['mean_rank_v']:.0f}"


def error(row):
    return f"{row['details']['measured_error']:.3f}"


TABLES = {
    "highlights": lambda old: highlights(),
    "prefill on an H200": lambda old: prefill("h200_hopper"),
    "prefill on an H200 with the portable kernels": lambda old: prefill("h200_portable"),
    "prefill over a cache on an H200": lambda old: cache_prefill(),
    "decode on an H200": lambda old: decode(),
    "8 bits on an H200": lambda old: eight_bits(),
    "Zen 4": lambda old: cpu("zen4_cpu_exact"),
    "Emerald Rapids": lambda old: cpu("emr_cpu_exact"),
    "tools on an H200": lambda old: tools(),
    "policies on two threads of Zen 4": lambda old: policies(
        "zen4_cpu_adaptive_f32", "model/f32/s8192/{}/t2", [speedup, tiles, rank, error], old),
    "policies on two threads of Emerald Rapids": lambda old: policies(
        "emr_cpu_adaptive", "model/bf16/s8192/{}/t2", [speedup, tiles, error], old),
    "policies on an H200": lambda old: policies(
        "h200_policies", "model/bf16/d128/causal/b4h6kv2/s16384/{}", [speedup, of_cudnn, tiles, error], old),
}


def rewritten(text):
    return re.sub(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)",
                  lambda m: m[1] + TABLES[m[2]](m[3]) + "\n" + m[4], text, flags=re.DOTALL)


def main():
    stale = []
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = rewritten(old)
        if new == old:
            continue
        stale.append(page.relative_to(ROOT))
        if "--check" in sys.argv[1:]:
            for was, is_now in zip(old.splitlines(), new.splitlines()):
                if was != is_now:
                    print(f"{stale[-1]} says\n  {was}\nand the results say\n  {is_now}")
        else:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {stale[-1]}")
    if "--check" in sys.argv[1:] and stale:
        sys.exit("run bench/tables.py")


if __name__ == "__main__":
    main()
