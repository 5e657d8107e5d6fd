"""Self-contained HTML pages: style, script and data are in one file, and a content security policy blocks everything
else.

Names, and text from datasets and tokenizers, are untrusted. Templates escape every value in HTML, and encode values in
scripts as JSON. Characters that would hide or reorder other text are made visible by `make_visible`.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...common.escaping import make_visible, quote
from ...common.files import atomic_write

HERE = Path(__file__).parent


def as_json(value: Any) -> Markup:
    """JSON for <script type="application/json">: it contains no `<`, so it cannot end the script."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def show(value: Any) -> Any:
    """A value in the form that templates show: text without invisible characters. Our own markup is not changed."""
    return value if isinstance(value, Markup) else make_visible(str(value))


@cache
def templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=show
    )
    environment.filters.update(json=as_json, quote=quote)
    return environment


def render_page(template: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """Render a template from this folder. `scripts` are files that are joined into the only script that may run in the
    page."""
    code = "".join((HERE / name).read_text() for name in scripts)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; script-src "
        + (f"'sha256-{digest}'" if scripts else "'none'")
    )
    style = Markup((HERE / "page.css").read_text())
    return templates().get_template(template).render(policy=policy, style=style, script=Markup(code), **values)


def write_page(path: Path, html: str) -> None:
    """Write a page atomically."""
    atomic_write(path, html.encode("utf-8", "backslashreplace"))
