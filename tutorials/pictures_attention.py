"""The pictures of tutorial 4, which has the explanations.

`tiles`, `memory`, `roofline` and `times` are figures; the last two are drawn from the measurements
in `benchmarks/gpu` and print what they show. `running_softmax` is a small animated SVG.
"""

import builtins
import math
from pathlib import Path

from figure import FAINT, FOLDER, OTHER, PREFIX, TEXT, new, show
from matplotlib.patches import Rectangle

from benchmarks.kernels.attention import Shape, work
from benchmarks.machine import read_rows

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
TIMED = [r for r in read_rows(GPU / "attention-h200.csv") if r["us"]]
WIDTH, BASE, TALL, BAR, LEFT = 660, 205, 150, 17, 60  # pixels
SECONDS = 2.5  # how long one tile is shown


def tiles(visited: list[tuple[slice, slice, str]], T: int, P: int) -> None:
    """Which tiles of queries and columns are visited; the kind is prefix, whole or diagonal."""
    figure, axes = new(width=6.6)
    looks = {"prefix": PREFIX, "whole": TEXT, "diagonal": OTHER}
    for queries, columns, kind in visited:
        left = columns.start - (P + 1 if kind == "prefix" else 0)
        size = columns.stop - columns.start, queries.stop - queries.start
        box = Rectangle((left, queries.start), *size, fc=looks[kind], ec="white", lw=1.2)
        axes.add_patch(box)
    labels = "prefix: no mask", "seen by all queries: no mask", "on the diagonal: masked"
    for label, colour in zip(labels, looks.values(), strict=True):
        axes.plot([], [], "s", color=colour, label=label)
    axes.plot([0, T], [0, T], color="black", lw=0.8)
    axes.set(
        xlim=(-P - 2, T), ylim=(T, 0), ylabel="query i",
        xlabel="column: prefix (below 0), token j (from 0)",
        title=f"Tiles of one head: T {T}, P {P}",
    )  # fmt: skip
    axes.legend(
        frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="white: not visited"
    )
    show(figure, "04_tiles")


def memory(B: int, H: int, T: int, P: int, D: int) -> float:
    """What lies in GPU memory during a forward pass in bf16, and on the chip, to scale.

    Returns the share of the copies, scores and weights in what is written down.
    """
    one = 2 * B * H * T * D / 1e6  # MB
    joined, scores = one * (P + T) / T, 2 * B * H * T * (P + T) / 1e6
    inputs = [("q", one, TEXT), ("k", one, TEXT), ("v", one, TEXT)]
    copies = [("[prefix; k]", joined, FAINT), ("[prefix; v]", joined, FAINT)]
    made = [("scores s", scores, OTHER), ("weights p", scores, OTHER)]
    output, prefix = ("o", one, TEXT), ("prefix", 4 * H * P * D / 1e6, PREFIX)
    # KiB on the chip: q, k and v have 16 bits, the rest 32
    tile = [("q", 8, TEXT), ("k", 8, TEXT), ("v", 8, TEXT), ("s", 16, OTHER),
            ("u", 16, TEXT), ("m, z", 0.5, FAINT)]  # fmt: skip
    figure, (top, bottom) = new(rows=2, width=8.0, height=1.9)
    for axes, bars in ((top, ([*inputs, *copies, *made, output], [*inputs, prefix, output])),
                       (bottom, (tile,))):  # fmt: skip
        for y, bar in enumerate(bars):
            x = 0.0
            for name, size, colour in bar:
                thin = size < 1
                edge = colour if thin else "white"
                axes.barh(y, size, left=x, color=colour, ec=edge, lw=1, height=0.7)
                ink = "black" if thin or colour == FAINT else "white"
                axes.text(x + size / 2, y - 0.48 * thin, name, ha="center", va="center",
                          fontsize=9, color=ink)  # fmt: skip
                x += size
        axes.invert_yaxis()
    top.set_yticks([0, 1], ["written down", "fused"])
    bottom.set_yticks([0], ["one program"])
    top.set_xlabel(f"GPU memory: one layer, B {B}, H {H}, T {T}, P {P}, D {D}, bf16 (MB)")
    bottom.set_xlabel("on the chip: a tile of 64 queries and 64 columns (KiB)")
    show(figure, "04_memory")
    extra = sum(size for _, size, _ in [*copies, *made])
    return extra / (extra + sum(size for _, size, _ in [*inputs, output]))


def roofline() -> None:
    """Our kernels between their FLOPs per byte and the FLOP/s they reached, under the roof.

    Prints the roof and what share of it was reached.
    """
    matmul, copy = TIMED[:2]  # the first two lines of the file
    assert (matmul["method"], copy["method"]) == ("matmul", "copy")
    F, W = 1e12 * float(matmul["tflops"]), 1e9 * float(copy["gbs"])
    print(f"{copy['gpu']}, Triton {copy['triton']}, {copy['assembler']}")
    print(
        f"{W / 1e12:.2f} TB/s, {F / 1e12:.0f} TFLOP/s in bf16; "
        f"memory is the limit below {F / W:.0f} FLOPs per byte"
    )
    points = {"forward": [], "forward+backward": [], "decoding": []}
    for r in TIMED:
        if r["method"] == "ours_qkv" and r["N"] == "0" and r["B"] != "4":  # 4: the warm-up
            flops, n_bytes = work(Shape(*(int(r[x]) for x in "BTHP")), r["pass"])
            points[r["pass"]].append((flops / n_bytes, 1e6 * flops / float(r["us"])))
    for r in read_rows(GPU / "decode-h200.csv"):
        if (r["method"], r["B"], r["N"]) == ("ours_only", "64", "0"):
            B, H, S, P, D = (int(r[x]) for x in "BHSPD")
            n_bytes = 2 * H * D * (B * 2 * (S + 1) + 2 * P)  # k, v, q, o; the prefix once
            flops = 4 * D * B * H * (S + P)
            points["decoding"].append((flops / n_bytes, 1e6 * flops / float(r["us"])))
    shares = {name: [y / min(F, W * x) for x, y in found] for name, found in points.items()}
    for name, found in shares.items():
        print(f"{name:17} {min(found):.0%} to {max(found):.0%} of the roof")
    assert max(shares["decoding"]) < 1
    assert min(shares["decoding"]) > max(shares["forward"] + shares["forward+backward"])

    figure, axes = new(width=6.4, height=4.0)
    ends = [0.5, F / W, 1000]
    axes.plot(ends, [min(F, W * x) / 1e12 for x in ends], color="black", label="roof, measured")
    looks = {"forward": ("o", PREFIX), "forward+backward": ("s", "none"), "decoding": ("D", TEXT)}
    for name, found in points.items():
        marker, fill = looks[name]
        edge = PREFIX if fill == "none" else fill
        x, y = zip(*found, strict=True)
        axes.plot(x, [one / 1e12 for one in y], marker, color=edge, mfc=fill, label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="arithmetic intensity (FLOPs per byte)",
        ylabel="reached (TFLOP/s)", title=f"Our kernels under the roof: {copy['gpu']}",
    )  # fmt: skip
    axes.legend(frameon=False)
    show(figure, "04_roofline")


def times() -> None:
    """Forward + backward beside cuDNN, over T. Prints ours / cuDNN for equal work."""
    names = {
        "ours_qkv": "this repository", "bare_cudnn_leaves": "cuDNN, no prefix at all",
        "cudnn": "cuDNN, after concatenation",
    }  # fmt: skip
    us = {method: {} for method in names}  # {method: {T: us}}
    for r in TIMED:
        same_shape = (r["B"], r["H"], r["P"], r["N"]) == ("16", "16", "10", "0")
        if same_shape and r["pass"] == "forward+backward" and r["method"] in names:
            us[r["method"]][int(r["T"])] = float(r["us"])
    ours, bare, concatenated = us.values()
    adjusted = {t: ours[t] / bare[t] / (1 + 2 * 10 / (t + 1)) for t in sorted(ours)}
    print("ours / cuDNN, equal work: ", ", ".join(f"T {t} {x:.2f}" for t, x in adjusted.items()))
    ratios = ", ".join(f"T {t} {x / ours[t]:.1f}" for t, x in concatenated.items())
    print("cuDNN concatenated / ours:", ratios)
    assert adjusted[128] < 1 < adjusted[1000]
    assert all(x > ours[t] for t, x in concatenated.items())

    figure, axes = new(width=6.0)
    for method, colour in zip(us, (PREFIX, FAINT, TEXT), strict=True):
        points = sorted(us[method].items())
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=names[method])
    axes.set(
        xscale="log", yscale="log", xlabel="sequence length T (tokens)",
        ylabel="forward + backward (µs)", title=f"{TIMED[0]['gpu']}, bf16, B 16, H 16, P 10",
    )  # fmt: skip
    axes.legend(frameon=False)
    show(figure, "04_times")


def show_svg(svg: str, name: str) -> None:
    """Show it in a notebook; elsewhere write runs/tutorials/NAME.svg and say so."""
    if hasattr(builtins, "__IPYTHON__"):
        from IPython.display import SVG, display

        display(SVG(svg))
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.svg"
    path.write_text(svg, encoding="utf-8")
    print(f"animation: {path.relative_to(FOLDER.parents[1])}")


def weights_svg(tiles: list[tuple[str, list[float]]]) -> str:
    """An animation of the weights exp(score - m) of one query, and of m, z and alpha.

    A tile's bars appear when the tile is read. When a later tile raises the maximum m, all earlier
    bars shrink by the same factor alpha. Readers who ask their system for less motion see the last
    step alone.
    """
    maxima, sums, shrinks = [], [], []  # m, z and alpha after each tile
    m, z = -math.inf, 0.0
    for _, scores in tiles:
        m_new = max(m, *scores)
        shrinks.append(math.exp(m - m_new))
        z = z * shrinks[-1] + sum(math.exp(s - m_new) for s in scores)
        m = m_new
        maxima.append(m)
        sums.append(z)
    n = len(tiles)
    style, bars, words, x = [], [], [], LEFT
    for t, (name, scores) in enumerate(tiles):
        sizes = [0.0 if f < t else math.exp(maxima[t] - maxima[f]) for f in range(n)]
        steps = []
        for f, size in enumerate(sizes):
            begins, rests, ends = (100 * (f + part) / n for part in (0, 0.25, 0.99))
            before = sizes[f - 1] if f else 0.0
            steps.append(f"{begins:.1f}%{{transform:scaleY({before:.3f})}}")
            steps.append(f"{rests:.1f}%,{ends:.1f}%{{transform:scaleY({size:.3f})}}")
        steps.append("100%{transform:scaleY(0)}")
        style.append(f"@keyframes b{t}{{{''.join(steps)}}}")
        style.append(f".b{t}{{transform:scaleY({sizes[-1]:.3f});animation-name:b{t}}}")
        colour = PREFIX if name.startswith("prefix") else TEXT
        rects = ""
        for score in scores:
            tall = TALL * math.exp(score - maxima[t])
            rects += f'<rect x="{x}" y="{-tall:.1f}" width="{BAR - 3}" height="{tall:.1f}"/>'
            x += BAR
        bars.append(f'<g class="b b{t}" fill="{colour}">{rects}</g>')
        middle = x - BAR * len(scores) / 2
        words.append(f'<text x="{middle}" y="222" text-anchor="middle">{name}</text>')
        x += 8
        told = f"tile {t + 1} of {n}: alpha = {shrinks[t]:.3f}, m = {maxima[t]:.3f}, "
        told += f"z = {sums[t]:.3f}"
        last = " last" if t == n - 1 else ""
        delay = t * SECONDS - n * SECONDS
        words.append(f'<text class="w{last}" x="{LEFT}" y="26" font-size="15" '
                     f'style="animation-delay:{delay}s">{told}</text>')  # fmt: skip
    style.append(f"@keyframes w{{0%{{opacity:1}}{100 / n:.2f}%,100%{{opacity:0}}}}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 250" width="{WIDTH}" '
        f'role="img" font-family="sans-serif" font-size="12"><title>Weights of one query, tile by '
        f"tile</title><style>.b{{animation:b0 {n * SECONDS}s infinite}}.w{{opacity:0;animation:w "
        f"{n * SECONDS}s step-end infinite}}{''.join(style)}@media(prefers-reduced-motion:reduce)"
        f"{{.b,.w{{animation:none}}.last{{opacity:1}}}}</style>"
        f'<rect width="{WIDTH}" height="250" fill="#fff"/>'
        f'<g transform="translate(0 {BASE})">{"".join(bars)}'
        f'<path d="M{LEFT - 6} -{TALL}V0H{x}" fill="none" stroke="#444"/></g>'
        f'<text x="{LEFT - 12}" y="{BASE - TALL + 4}" text-anchor="end">1</text>'
        f'<text x="{LEFT - 12}" y="{BASE + 4}" text-anchor="end">0</text>{"".join(words)}'
        f'<text x="{LEFT}" y="242">height: exp(score - m), the weight of a column '
        "under the maximum so far</text></svg>"
    )


def running_softmax(tiles: list[tuple[str, list[float]]]) -> None:
    """Show the weights of one query, tile by tile; `tiles` are (name, scores)."""
    show_svg(weights_svg(tiles), "04_running_softmax")
