"""Facts about entities for RAVEL: question templates with a placeholder for the entity, and each entity's attributes.

The files have the schema of adamkarvonen/ravel_prompts on the Hub. Two files are read for each type of entity:

    ravel_<type>_attribute_to_prompts.json    {attribute: [template, ...]}; a template has one %s for the entity
    ravel_<type>_entity_attributes.json       {entity: {attribute: value}}

The files are read from <data>/adamkarvonen/ravel_prompts/ if they exist there, else from the Hub. This package also
contains a small set of its own, FACTS, written from common knowledge.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import SaeError, UnavailableError, UsageError, did_you_mean, first_line
from ...common.files import parse_json, read_file
from . import hub

RAVEL, FACTS = "adamkarvonen/ravel_prompts", "facts"
PARTS = ("attribute_to_prompts", "entity_attributes")
PLACEHOLDER = "%s"


@dataclass(frozen=True)
class EntityFacts:
    """The questions about the entities of one type, in the order of the files."""

    type: str
    templates: dict[str, tuple[str, ...]]  # attribute -> texts with one %s
    values: dict[str, dict[str, str]]  # entity -> attribute -> value

    def questions(self, attributes: tuple[str, ...]) -> Iterator[tuple[str, str, str, str]]:
        """(entity, attribute, template, value) of every question about these attributes.

        An entity that has no value for an attribute gets no questions about it.
        """
        for entity, values in self.values.items():
            for attribute, templates in self.templates.items():
                if attribute in attributes and values.get(attribute):
                    yield from ((entity, attribute, template, values[attribute]) for template in templates)


def load_facts(dataset: str, entity_type: str, attributes: tuple[str, ...], data: Path | None) -> EntityFacts:
    """The facts about one type of entity.

    Raises:
        UsageError: a file has a different schema, or an attribute has no templates.
        UnavailableError: the files are neither in the folder `data` nor on a Hub that can be reached.
    """
    paths = {part: fact_file(dataset, entity_type, part, data) for part in PARTS}
    content = {part: parse_json(read_file(path), path, "Restore it.") for part, path in paths.items()}
    templates = check_templates(content["attribute_to_prompts"], paths["attribute_to_prompts"])
    values = check_values(content["entity_attributes"], paths["entity_attributes"])
    for attribute in attributes:
        if attribute not in templates:
            raise UsageError(
                f"{dataset} has no questions about {entity_type}.{attribute}{did_you_mean(attribute, templates)}"
            )
    return EntityFacts(entity_type, templates, values)


def facts_version(dataset: str, entity_types: tuple[str, ...], data: Path | None) -> str:
    """The version of the files, as recorded in a result's settings: digests of local files, or the commit on the
    Hub."""
    versions: dict[str, None] = {}
    for entity_type in entity_types:
        for part in PARTS:
            if (path := local_file(dataset, entity_type, part, data)) is not None:
                versions[f"sha256 {hashlib.sha256(read_file(path)).hexdigest()[:16]}"] = None
                continue
            with reading_from_hub(dataset, file_name(entity_type, part)):
                versions[f"the Hub {hub.pinned_commit(dataset)}"] = None
    return ", ".join(versions)


def file_name(entity_type: str, part: str) -> str:
    return f"ravel_{entity_type}_{part}.json"


def local_file(dataset: str, entity_type: str, part: str, data: Path | None) -> Path | None:
    """The file on this machine, or None. Raises UsageError for an entity type that FACTS does not have."""
    name = file_name(entity_type, part)
    if dataset == FACTS:
        path = Path(__file__).with_name("facts") / name
        if not path.is_file():
            known = [
                p.name.removeprefix("ravel_").removesuffix(f"_{part}.json") for p in path.parent.glob(f"*{part}.json")
            ]
            raise UsageError(
                f"There are no facts about the entity type {entity_type}{did_you_mean(entity_type, known)}"
            )
        return path
    local = data / dataset / name if data else None
    return local if local and local.is_file() else None


def fact_file(dataset: str, entity_type: str, part: str, data: Path | None) -> Path:
    """The file on this machine, downloaded if it is not there. Raises UnavailableError if the download fails."""
    if (path := local_file(dataset, entity_type, part, data)) is not None:
        return path
    from huggingface_hub import hf_hub_download

    name = file_name(entity_type, part)
    with reading_from_hub(dataset, name):
        commit = hub.pinned_commit(dataset)
        return Path(hf_hub_download(dataset, name, repo_type="dataset", revision=commit))


@contextlib.contextmanager
def reading_from_hub(dataset: str, name: str) -> Iterator[None]:
    """Raise UnavailableError if the Hub cannot be read. The message says where to put the file instead."""
    try:
        yield
    except SaeError:
        raise
    except Exception as error:  # huggingface_hub and its dependencies raise many types of errors
        raise UnavailableError(
            f"{name} of {dataset} could not be read: {first_line(error).rstrip('.')}. Check the network, or "
            f"use --data with a folder that contains {dataset}/{name}."
        ) from error


def check_templates(content: Any, path: Path) -> dict[str, tuple[str, ...]]:
    """Attribute -> templates. Raises UsageError if the schema is different."""
    if not isinstance(content, dict) or not all(isinstance(texts, list) for texts in content.values()):
        raise UsageError(f"{path} does not have RAVEL's schema: expected {{attribute: [template, ...]}}.")
    for attribute, texts in content.items():
        for text in texts:
            if not isinstance(text, str) or text.count(PLACEHOLDER) != 1:
                raise UsageError(
                    f"{path}: {text!r:.60} is a template of {attribute}. Expected exactly one {PLACEHOLDER} "
                    "in it, for the entity."
                )
    return {attribute: tuple(texts) for attribute, texts in content.items()}


def check_values(content: Any, path: Path) -> dict[str, dict[str, str]]:
    """Entity -> attribute -> value. Raises UsageError if the schema is different."""
    if not isinstance(content, dict) or not all(isinstance(values, dict) for values in content.values()):
        raise UsageError(f"{path} does not have RAVEL's schema: expected {{entity: {{attribute: value}}}}.")
    for entity, values in content.items():
        for attribute, value in values.items():
            if not isinstance(value, str | None):
                raise UsageError(
                    f"{path}: the {attribute} of {entity} is {value!r:.40}. Expected a text, or null if "
                    "there is no value."
                )
    return content
