"""Self-contained HTML pages: style, script and data are in one file, and a content policy blocks everything else.

Text from datasets and tokenizers is untrusted. It is escaped in HTML, encoded as JSON in scripts, and `make_visible`
shows characters that would hide or reorder the text around them.
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
HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")  # of Unicode


def make_visible(text: str) -> str:
    """Replace invisible characters: controls, bidi marks, lone surrogates, unassigned code points become ⟨202E⟩.

    A line break becomes ↵ and a tab ⇥. Letters, combining marks and emoji are kept.
    """
    return "".join(
        REPLACEMENTS.get(c) or (f"⟨{ord(c):04X}⟩" if unicodedata.category(c) in HIDDEN_CATEGORIES else c) for c in text
    )


def as_json(value: Any) -> Markup:
    """JSON for <script type="application/json">: it contains no `<`, so it cannot end the script."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


@cache
def templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(visible=make_visible, json=as_json)
    return environment


def render_page(template: str, script: str | None = None, **values: Any) -> str:
    """Render a template of this folder; `script` names the file of the only script that may run in the page."""
    code = (HERE / script).read_text() if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; script-src "
        + (f"'sha256-{digest}'" if script else "'none'")
    )
    style = Markup((HERE / "page.css").read_text())
    return templates().get_template(template).render(policy=policy, style=style, script=Markup(code), **values)


def write_page(path: Path, html: str) -> None:
    """Write a page atomically."""
    atomic_write(path, html.encode("utf-8", "backslashreplace"))
