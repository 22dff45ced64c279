"""A preview as HTML: one page that needs no network, or a fragment for a notebook. It is light where all around it is."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from vlmtune.preview.pieces import Piece, in_line
from vlmtune.preview.shown import ShownPack, ShownRow

if TYPE_CHECKING:
    from PIL import Image

    from vlmtune.preview.seen import Seen

LEGEND = {  # class of a token → what it says
    "trained": "the loss is taken on it",
    "masked": "read, not learned",
    "special": "a special token",
    "image": "all tokens of a picture",
}
PACKED = "No row sees another, and the first token of each is not trained."
SHOWN = 360  # pixels to which smaller pictures are enlarged
STYLE = """
.pv{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:auto;text-align:left}
.pv h2{font-size:1.3em;margin:.2em 0} .pv h3{font-size:1.05em;margin:0} .pv p{margin:.3em 0}
.pv .note{opacity:.75;font-size:.93em} .pv .legend{display:flex;flex-wrap:wrap;gap:.3em 1.6em;font-size:.93em}
.pv article{border:1px solid #8886;border-radius:10px;padding:1em 1.2em;margin:1.2em 0}
.pv dl{display:flex;flex-wrap:wrap;gap:.2em 1.4em;margin:.3em 0 1em;font-variant-numeric:tabular-nums;font-size:.93em}
.pv dl div{display:flex;gap:.35em} .pv dt{order:2;opacity:.75} .pv dd{margin:0;font-weight:600}
.pv .body{display:flex;flex-wrap:wrap;gap:1.4em;align-items:flex-start}
.pv .pictures{display:flex;flex-direction:column;gap:1em;flex:0 1 auto;max-width:min(100%,30em)} .pv figure{margin:0}
.pv figcaption{font-size:.86em;opacity:.75;margin-top:.3em}
.pv svg{display:block;max-width:100%;height:auto;outline:1px solid #8886}
.pv .tokens{flex:1 1 22em;min-width:0;font:13.5px/2 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;
 white-space:pre-wrap;overflow-wrap:anywhere}
.pv .t{padding:.16em 1px;border-radius:3px;box-decoration-break:clone;-webkit-box-decoration-break:clone;
 background:#8882;box-shadow:inset 1px 0 #8886}
.pv .masked{color:color-mix(in srgb,currentColor 62%,transparent)}
.pv .trained{background:#2ea04340;box-shadow:inset 1px 0 #2ea043aa,inset 0 -2px #2ea043}
.pv .special{border:1px solid;border-radius:4px;padding:.08em .3em;margin:0 .1em;font-size:.88em;
 box-shadow:none;background:none}
.pv .special.trained{border-color:#2ea043;background:#2ea04340}
.pv .image{background:#4b8fe040;border-radius:4px;padding:.16em .4em;margin:0 .1em;box-shadow:none;
 color:inherit;white-space:nowrap}
.pv .bar{display:flex;gap:2px;height:1.1em;margin:.8em 0;border-radius:4px;overflow:hidden}
.pv .bar i{background:#2ea04366} .pv .bar b{background:#8883}
.pv .row{border-left:3px solid #2ea043;padding:.1em 0 .1em .8em;margin:1em 0}
.pv .row h4{font-size:.93em;margin:0;font-weight:600} .pv .row h4 span{font-weight:400;opacity:.75}
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>:root{color-scheme:light dark} body{margin:1em}</style>"""


def whole_page(model: str, rows: Sequence[ShownRow], pack: ShownPack | None) -> str:
    """A whole page, light or dark as the browser is."""
    return f"{HEAD}<title>{escape(model)}</title></head>\n<body>{fragment(model, rows, pack)}</body></html>\n"


def fragment(model: str, rows: Sequence[ShownRow], pack: ShownPack | None) -> str:
    """The preview for a place in another page; colours and size of the letters are the place's."""
    legend = "".join(f'<span><span class="t {name}">{name}</span> {what}</span>' for name, what in LEGEND.items())
    parts = [f"<h2>What {escape(model)} sees</h2>", f'<p class="legend">{legend}</p>', *map(_row, rows)]
    return f'<div class="pv"><style>{STYLE}</style>{"".join(parts)}{_pack(pack) if pack is not None else ""}</div>'


def _row(row: ShownRow) -> str:
    counts = "".join(f"<div><dt>{word}</dt><dd>{count:,}</dd></div>" for word, count in row.counts.items())
    pictures = f'<div class="pictures">{"".join(map(_picture, row.pictures))}</div>' if row.pictures else ""
    body = f'<div class="body">{pictures}{_tokens(row.pieces)}</div>'
    return f"<article><h3>{escape(row.name)}</h3><dl>{counts}</dl>{body}</article>"


def _pack(pack: ShownPack) -> str:
    """The rows one after the other, each behind a border."""
    room = pack.room - sum(row.tokens for row in pack.rows)
    shares = "".join(
        f'<i style="flex:{row.tokens}" title="{escape(row.name)}: {row.tokens:,} tokens"></i>' for row in pack.rows
    )
    rows = "".join(map(_packed, pack.rows, pack.starts))
    heading = f'<h3>The first micro-batch, packed where the model allows it</h3><p class="note">{pack.summary}. {PACKED}</p>'
    return f'<article>{heading}<div class="bar">{shares}<b style="flex:{room}"></b></div>{rows}</article>'


def _packed(row: ShownRow, start: int) -> str:
    heading = f"{escape(row.name)} <span>{row.tokens:,} tokens, from place {start:,}</span>"
    return f'<div class="row" data-start="{start}"><h4>{heading}</h4>{_tokens(in_line(row.pieces), start)}</div>'


def _tokens(pieces: Sequence[Piece], first: int = 0) -> str:
    return f'<div class="tokens">{"".join(_token(piece, first + piece.start) for piece in pieces)}</div>'


def _token(piece: Piece, place: int) -> str:
    kind = f"{piece.kind if piece.kind != 'text' else ''} {'trained' if piece.trained else 'masked'}".strip()
    named = dict.fromkeys(piece.ids) if piece.kind == "image" else piece.ids  # a picture's: each once
    ids, last = " ".join(map(str, named)), place + len(piece.ids) - 1
    title = f"token {ids}, place {place}" if last == place else f"tokens {ids}, places {place}–{last}"
    return f'<span class="t {kind}" title="{title}">{escape(piece.text)}</span>'


def _picture(seen: Seen) -> str:
    """The picture with its cells drawn on it."""
    width, height = seen.picture.size
    scale = max(1, SHOWN // max(width, height))
    across = "".join(f"M{width * x / seen.across:g} 0V{height}" for x in range(1, seen.across))
    down = "".join(f"M0 {height * y / seen.down:g}H{width}" for y in range(1, seen.down))
    lines = "".join(
        f'<path d="{across}{down}" fill="none" stroke="{colour}" stroke-width="{thick}" vector-effect="non-scaling-stroke"/>'
        for colour, thick in (("#0005", 2), ("#fffc", 0.8))
    )
    enlarged = 'image-rendering="pixelated"' if scale > 1 else ""
    image = f'<image href="{_data_url(seen.picture)}" width="{width}" height="{height}" {enlarged}/>'
    size = f'width="{width * scale}" height="{height * scale}" viewBox="0 0 {width} {height}"'
    caption = escape(seen.caption)
    return (
        f'<figure><svg {size} role="img" aria-label="{caption}">{image}{lines}</svg><figcaption>{caption}</figcaption></figure>'
    )


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
