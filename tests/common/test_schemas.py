"""The schemas of the records, and the page that is generated from them."""

import runpy
from pathlib import Path

from sae.common import cache_schemas, evaluation_schemas, schemas
from sae.common.records import RecordKind

ROOT = Path(__file__).parents[2]


def test_the_page_about_records_is_current() -> None:
    page = runpy.run_path(str(ROOT / "benchmarks" / "records_page.py"))["page"]
    current = "\n".join(page()) + "\n"
    command = "python benchmarks/records_page.py > docs/reference/records.md"
    assert (ROOT / "docs" / "reference" / "records.md").read_text() == current, command
    named = vars(cache_schemas) | vars(schemas) | vars(evaluation_schemas)
    kinds = [kind for kind in named.values() if isinstance(kind, RecordKind)]
    assert current.count("\n## ") == len(kinds) >= 13
    for kind in kinds:
        file = (kind.schema.__doc__ or "").split("\n")[0].split(",")[0]
        assert file.endswith(".json"), f"the docstring of {kind.schema.__name__} does not begin with the file's path"
