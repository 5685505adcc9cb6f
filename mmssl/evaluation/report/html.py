"""Pieces of a page that holds all it needs: plots, pictures and sounds are written into it."""

import base64
import io
import json
import wave
from html import escape
from typing import Any

import numpy as np
from PIL import Image

GRID = "rgba(128,128,128,0.22)"
AXIS = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True}
COLORS = "Viridis"


def as_json(value: Any) -> str:
    """JSON that can stand in a script element: no text in it ends the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def layout(height: int, **own: Any) -> dict[str, Any]:
    """What plots have in common; the page sets the colour of their text."""
    return {
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 34, "b": 36},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12},
        "xaxis": AXIS,
        "yaxis": AXIS,
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top"},
        **own,
    }


def plot(data: list[dict[str, Any]], layout: dict[str, Any], kind: str = "") -> str:
    """A plot that is drawn when it comes into sight; ``kind`` is a class of its element, for scripts.

    Texts in ``data`` and ``layout`` are shown as they are, once they have gone through ``escape``.
    """
    import plotly.graph_objects as go

    figure = go.Figure(data, layout | {"template": "none"})
    text = as_json(json.loads(figure.to_json()))
    style = f"height:{layout['height']}px"
    return (
        f'<div class="plot {kind}"><script type="application/json">{text}</script>'
        f'<div class="canvas" style="{style}"></div></div>'
    )


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(pixels: np.ndarray, least: int = 0) -> str:
    """(height, width, 3) between 0 and 1 as a URI; where a value is NaN it is clear. ``least`` is a side in pixels."""
    clear = np.isnan(pixels).any(axis=-1)
    shades = np.concatenate([np.nan_to_num(pixels).clip(0, 1), ~clear[..., None]], axis=-1)
    image = Image.fromarray((shades * 255).round().astype(np.uint8), "RGBA")
    if not clear.any():
        image = image.convert("RGB")
    factor = -(-least // max(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return data_uri(file.getvalue(), "image/png")


def thumbnail(pixels: np.ndarray, side: int = 72) -> str:
    """A small picture of (height, width, 3) between 0 and 1, as a URI; NaN is grey."""
    image = Image.fromarray((np.nan_to_num(pixels, nan=0.75).clip(0, 1) * 255).round().astype(np.uint8))
    # What is long and thin becomes wider, so that one sees it.
    width, height = image.size
    scale = side / max(width, height)
    size = (max(round(width * scale), side // 3), max(round(height * scale), side // 3))
    enlarged = width <= side and height <= side
    image = image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return data_uri(file.getvalue(), "image/png")


def audio(sound: tuple[np.ndarray, int]) -> str:
    """A player of (steps,) between -1 and 1 and steps in a second."""
    samples, rate = sound
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate, len(samples), "NONE", ""))
        writer.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return f'<audio controls preload="metadata" src="{data_uri(file.getvalue(), "audio/wav")}"></audio>'


def captioned(title: str, content: str, kind: str = "") -> str:
    return f'<figure class="{kind}"><figcaption>{escape(title)}</figcaption>{content}</figure>'


def table(head: list[str], rows: list[list[str]]) -> str:
    """Of texts that are escaped here."""
    first = "".join(f"<th>{escape(name)}</th>" for name in head)
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'
