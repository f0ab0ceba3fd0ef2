"""The report as Markdown tables and a picture."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

WAYS = ["tf32", "bf16", "bf16, frozen too", "compiled"]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def number(value: Any, form: str = ".3g") -> str:
    return "" if value is None else format(value, form) if isinstance(value, (int, float)) else str(value)


def markdown(report: dict[str, Any]) -> str:
    parts = [f"# {report['machine']['device']}, torch {report['machine']['torch']}\n"]
    if cases := report.get("numerics", {}).get("cases"):
        columns = list(next(iter(cases.values())))
        rows = [
            [name, *(" / ".join(number(row[p].get(what)) for what in ("outputs", "loss", "gradient", "error") if what in row[p]) for p in columns)]
            for name, row in cases.items()
        ]
        parts += ["## Against the CPU in float32: relative error of outputs / loss / gradient\n", table(["method, network", *columns], rows)]
    if presets := report.get("presets", {}).get("presets"):
        rows, memory = [], []
        for name, row in presets.items():
            ways = row["ways"]
            best = max((way["rate"] for way in ways.values()), default=None)
            ratio = best / row["plain"] if best and "plain" in row else None
            share = max((way["share"] for way in ways.values() if "share" in way), default=None)
            rates = [number(ways.get(way, {}).get("rate"), ".4g") for way in WAYS]
            rows.append([name, number(row["batch"]), number(row.get("plain"), ".4g"), *rates, number(ratio, ".2f"), number(share, ".1%")])
            both = [f"{number(ways[way]['computed'])} / {number(ways[way].get('measured'))}" if way in ways else "" for way in WAYS]
            memory.append([name, number(row["batch"]), *both])
        peak = report["presets"].get("matrix_rate_bf16")
        title = "## Images a second" + (f"; bf16 matrix products: {peak / 1e12:.0f} TFLOP/s" if peak else "") + "\n"
        parts += [title, table(["preset", "images a pass", "plain, tf32", *WAYS, "best to plain", "share of the matrix rate"], rows)]
        parts += ["## Memory of a step, GiB: computed / measured\n", table(["preset", "images a pass", *WAYS], memory)]
    if top := report.get("profile", {}).get("top"):
        rows = [[row["name"], f"{row['share']:.1%}", str(row["count"])] for row in top[:12]]
        kernels = f", {count} kernels" if (count := report["profile"]["kernels"]) is not None else ""  # counted on a GPU
        title = f"## A step of cifar10-imm: {report['profile']['milliseconds']:.1f} ms{kernels}\n"
        parts += [title, table(["kernel", "share", "count"], rows)]
    if "curve" in report.get("training", {}):
        found = report["training"]
        rows = [[f"{line['images']:,}", *(f"{k}: {v:.4g}" for k, v in line["values"].items())] for line in found["curve"]]
        title = f"## Training on {found['data']}: {found['images']:,} images, {number(found['images_per_second'])} a second\n"
        parts += [title] + ([table(["images", *(["steps: score"] * (len(rows[0]) - 1))], rows)] if rows else [])
    simple = [(name, {k: v for k, v in report[name].items() if k != "failed"}) for name in ("golden", "resume", "compile")
              if name in report]  # fmt: skip
    parts += [f"{name}: {', '.join(f'{key} {number(value)}' for key, value in found.items())}\n" for name, found in simple]
    failed = [f"* {name}: {text}" for name in report for text in (report[name].get("failed") or [])]
    return "\n".join([*parts, "## Failed\n", *(failed or ["nothing"])]) + "\n"


def speed_picture(report: dict[str, Any]) -> Image.Image | None:
    """Bars of images a second, each preset against its fastest way."""
    presets = report.get("presets", {}).get("presets")
    if not presets:
        return None
    colours = {"plain, tf32": "#999999", "tf32": "#88b0d8", "bf16": "#3f7fbf", "bf16, frozen too": "#1f5f9f",
               "compiled": "#0b3c6f"}
    shown = [
        (name, [("plain, tf32", row["plain"]) for _ in ["plain"] if "plain" in row] + [(way, found["rate"]) for way, found in row["ways"].items()])
        for name, row in presets.items()
    ]
    height = 30 + sum(24 + 18 * len(ways) for _, ways in shown)
    image = Image.new("RGB", (760, height), "white")
    draw, y = ImageDraw.Draw(image), 12
    for name, ways in shown:
        draw.text((12, y), f"{name}, images a second", fill="black")
        y += 18
        fastest = max((value for _, value in ways), default=1)
        for way, value in ways:
            draw.rectangle((140, y + 2, 140 + int(480 * value / fastest), y + 14), fill=colours[way])
            draw.text((12, y + 1), way, fill="black")
            draw.text((628, y + 1), f"{value:,.4g}", fill="black")
            y += 18
        y += 6
    return image
