"""The page about our JSON records, generated from their schemas.

python benchmarks/records_page.py > docs/reference/records.md
"""

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from msgspec import Meta

from sae.common import cache_schemas, evaluation_schemas, schemas
from sae.common.records import DIGEST, RecordKind

HEAD = f"""# Records

This page lists the JSON files that the package writes, with the type and meaning of every field.
It is generated from `cache_schemas.py`, `schemas.py` and `evaluation_schemas.py` in `common/` by
`python benchmarks/records_page.py > docs/reference/records.md`. Paths that begin with `activations/` or `data/` are
relative to `SAE_HOME`. All other paths are relative to the folder of a cache (`activations/<name>/`) in the sections
from `zarr.json` to `drafts/`, and to the folder of a run (`runs/<name>/`) in the sections from `sae.json` on.

Each record also has the field `{DIGEST}`: the sha256 of the other fields as JSON with sorted keys and no
whitespace. Reformatting a file does not change the digest. In a `zarr.json` the digest is an attribute and covers only
the fields marked with * (in codecs, only the settings that decide how bytes are read), so other Zarr programs can write
the other fields differently. Readers check the digest. If the digest does not match, the command ends with exit code 3,
unless the record can be written again without loss, as a draft can. Records of earlier versions have no digest: they
are read with one warning. `sae cache repair` adds digests to the records of a cache, and so does a `sae harvest` that
adds to the cache.

To edit a record on purpose, or to write one with another program, leave `{DIGEST}` out. The types below are
still checked. Other fields are allowed.

"""
COVERED = {
    "CACHE_RECORD": {"attributes"},
    "ARRAY_RECORD": {"shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "attributes"},
}
SIMPLE = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
NAMED = {schemas.Sha256: "sha256 (64 digits)", cache_schemas.Crc32c: "CRC-32C (8 digits)"}


def main() -> None:
    print("\n".join(page()))


def page() -> Iterator[str]:
    """The lines of the page."""
    yield HEAD.rstrip()
    for name, kind in (vars(cache_schemas) | vars(schemas) | vars(evaluation_schemas)).items():
        if isinstance(kind, RecordKind):
            file, _, about = (kind.schema.__doc__ or "").partition("\n")
            title = re.sub(r"\S*\.json", r"`\g<0>`", file.strip())
            yield f"\n## {title}\n"
            if about.strip():
                yield " ".join(about.split()) + "\n"
            yield f"**If it is damaged.** {kind.remedy}\n"
            yield "| field | type | required | what |\n|---|---|---|---|"
            for field, kind_of_value, required, what in rows(kind.schema):
                mark = " *" if re.split(r"\W", field)[0] in COVERED.get(name, ()) else ""
                yield f"| `{field}`{mark} | {kind_of_value} | {'yes' if required else ''} | {what} |"


def rows(schema: Any, before: str = "", above: tuple[Any, ...] = ()) -> Iterator[tuple[str, str, bool, str]]:
    """For every field of a record, including nested fields: path, type, whether it is required, and description."""
    for name, hint in get_type_hints(schema, include_extras=True).items():
        required = name in schema.__required_keys__
        value = get_args(hint)[0] if get_origin(hint) is NotRequired else hint
        inner, path = object_in(value), f"{before}{name}"
        about = description(value) or (first_line(inner) if inner else "")
        yield path, describe_type(value), required, about
        if inner is not None and inner not in above:
            yield from rows(inner, path + brackets(value) + ".", (*above, inner))


def parts(value: Any) -> tuple[Any, tuple[Any, ...]]:
    """The origin and the arguments of a type, without annotations."""
    while get_origin(value) is Annotated:
        value = get_args(value)[0]
    return get_origin(value), get_args(value)


def object_in(value: Any) -> Any:
    """The TypedDict in a type (the type itself, a member of a union, or the items of a list or dictionary), or None."""
    origin, arguments = parts(value)
    if origin in (Union, types.UnionType):
        return next(filter(None, map(object_in, arguments)), None)
    plain = get_args(value)[0] if get_origin(value) is Annotated else value
    if is_typeddict(plain):
        return plain
    return object_in(arguments[-1]) if origin in (list, dict) else None


def brackets(value: Any) -> str:
    """What a field's path is given before the names of nested fields: `.*` for a dictionary, `[]` for a list."""
    origin, arguments = parts(value)
    if origin is dict:
        return ".*" + brackets(arguments[1])
    return "[]" + brackets(arguments[0]) if origin is list else ""


def description(value: Any) -> str:
    """The description in the annotations of a type; the outermost one if there are several."""
    found = [meta.description for meta in getattr(value, "__metadata__", ()) if isinstance(meta, Meta)]
    return next((one for one in reversed(found) if one), "")


def first_line(schema: Any) -> str:
    """The first line of a docstring, in the form of the table's descriptions: lower case, without a full stop."""
    line = (schema.__doc__ or "").strip().split("\n")[0].rstrip(".")
    return line[:1].lower() + line[1:]


def describe_type(value: Any) -> str:
    """A type in words."""
    metas = [meta for meta in getattr(value, "__metadata__", ()) if isinstance(meta, Meta)]
    for named, words in NAMED.items():
        if named.__metadata__[0] in metas:
            return words
    limits = [meta.ge for meta in metas if meta.ge is not None]
    origin, arguments = parts(value)
    if limits:
        return f"integer from {limits[0]}"
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe_type, arguments))
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(describe_type, arguments))}]"
    if origin is dict:
        return f"object of {describe_type(arguments[1])}"
    plain = get_args(value)[0] if get_origin(value) is Annotated else value
    return "object" if is_typeddict(plain) else SIMPLE.get(plain, "object")  # a codec inside of a codec


if __name__ == "__main__":
    main()
