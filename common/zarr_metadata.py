"""The parts of an array's zarr.json that affect how its bytes are read, whichever Zarr program wrote it."""

from typing import Any

CODEC_SETTINGS = ("endian", "chunk_shape", "index_location")
CODEC_DEFAULTS = {"bytes": {"endian": "little"}, "sharding_indexed": {"index_location": "end"}}


def codec_essentials(codec: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide how a codec reads bytes, with defaults filled in."""
    settings = CODEC_DEFAULTS.get(codec["name"], {}) | codec.get("configuration", {})
    inner = {key: list(map(codec_essentials, settings[key])) for key in ("codecs", "index_codecs") if key in settings}
    return {"name": codec["name"], **{key: settings[key] for key in CODEC_SETTINGS if key in settings}, **inner}


def array_essentials(metadata: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide how the bytes of an array are read. Other Zarr writers may change the rest."""
    return {
        "shape": metadata["shape"],
        "data_type": metadata["data_type"],
        "chunk_shape": metadata["chunk_grid"]["configuration"]["chunk_shape"],
        "separator": metadata["chunk_key_encoding"]["configuration"]["separator"],
        "codecs": list(map(codec_essentials, metadata["codecs"])),
        "logical_dtype": metadata["attributes"].get("logical_dtype"),
    }
