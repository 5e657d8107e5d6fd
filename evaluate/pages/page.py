"""One self-contained HTML file: style, script and data inside, and a policy that lets nothing else in.

What comes from texts and tokenizers is hostile: it is escaped where it enters HTML, as JSON where it enters a script,
and `visible` shows what would otherwise hide or reorder the text around it.
"""

import base64
import hashlib
import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...common.files import atomic_write

HERE = Path(__file__).parent
REPLACEMENTS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def make_visible(text: str) -> str:
    """The text with nothing hidden in it: controls, bidi marks, lone surrogates and unassigned code points as ⟨202E⟩.

    A line break is ↵, a tab ⇥. Letters, combining marks and emoji stay.
    """
    return "".join(
        REPLACEMENTS.get(c) or (f"⟨{ord(c):04X}⟩" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp") else c)
        for c in text
    )  # fmt: skip


def as_json(value: Any) -> Markup:
    """JSON that can stand inside <script type="application/json">: no `<`, so no end of the script, is in it."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


@cache
def templates() -> Environment:
    found = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    found.filters.update(visible=make_visible, json=as_json)
    return found


def render_page(template: str, script: str | None = None, **values: Any) -> str:
    """A template of this folder, filled; `script` names the file of the one script that may run in it."""
    code = (HERE / script).read_text() if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; script-src "
        + (f"'sha256-{digest}'" if script else "'none'")
    )
    style = Markup((HERE / "page.css").read_text())
    return templates().get_template(template).render(policy=policy, style=style, script=Markup(code), **values)


def write_page(path: Path, html: str) -> None:
    """Write it whole or not at all."""
    atomic_write(path, html.encode("utf-8", "backslashreplace"))
