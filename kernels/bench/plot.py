"""The picture of a run: the head's time against its memory, and the other operations' share of what is possible."""

from pathlib import Path


def draw(rows: list[dict], path: Path) -> str:
    """'' where the plot was written, else why not."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed: pip install -e '.[bench]'"
    matplotlib.use("svg")
    from matplotlib import pyplot

    measured = [row for row in rows if row["status"] == "ok"]
    heads = [row for row in measured if row["operation"] == "linear_cross_entropy" and row["extra_bytes"]]
    others = [row for row in measured if row["operation"] != "linear_cross_entropy" and row["share_of_ceiling"]]
    if not heads and not others:
        return "nothing that it shows was measured"
    matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same figures give the same file
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5 + len(others) / 12), layout="constrained")

    kinds = list(dict.fromkeys(kind(row) for row in heads))
    for i, row in enumerate(heads):
        marker = "os^Dv<>pP*"[kinds.index(kind(row)) % 10]
        colour = "tab:red" if row["provider"].startswith("ours") else "tab:blue"
        x, y = row["extra_bytes"] / 1e9, row["p50_ms"]
        spread = [[y - row["p20_ms"]], [row["p80_ms"] - y]]
        label = kind(row) if kind(row) not in [kind(earlier) for earlier in heads[:i]] else None
        left.errorbar(x, y, spread, marker=marker, color=colour, linestyle="none", capsize=2)
        left.plot([], [], marker=marker, color="grey", linestyle="none", label=label)
        left.annotate(row["provider"], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    left.set(xscale="log", yscale="log", xlabel="extra memory, GB", ylabel="forward and backward, ms")
    left.set_title("linear_cross_entropy")
    if heads:
        left.legend(fontsize=8)

    labels = [f"{row['operation']} {row['pass']} {kind(row)}: {row['provider']}" for row in others]
    colours = ["tab:red" if row["provider"] == "ours" else "tab:blue" for row in others]
    right.barh(range(len(others)), [row["share_of_ceiling"] for row in others], color=colours)
    right.set_yticks(range(len(others)), labels, fontsize=7)
    right.invert_yaxis()
    right.axvline(1, color="grey", linewidth=0.8)
    right.set(xlabel="share of the copy bandwidth measured in this run", title="cross_entropy, rms_norm")

    about = rows[0]
    figure.suptitle(f"{about['device']}, torch {about['torch']}, {about['commit']}, {about['date']}", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return ""


def kind(row: dict) -> str:
    parts = [str(row["tokens"]), row["dtype"], row["logits"]]
    return " ".join([*parts, *([f"{row['supervised']:.0%} supervised"] if row["supervised"] < 1 else [])]).strip()
