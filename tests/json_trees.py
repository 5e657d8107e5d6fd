"""Trees of dictionaries and lists, as read from JSON: the paths of their leaves, and copies with one change."""

import json
from collections.abc import Callable, Iterator
from typing import Any


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all leaves. An empty dictionary or list is a leaf."""
    if isinstance(tree, (dict, list)) and tree:
        for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(branch, (*path, key))
    else:
        yield path


def with_leaf(tree: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """A copy of the tree in which `change` has replaced the value at the path."""
    tree = json.loads(json.dumps(tree))
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = change(node[path[-1]])
    return tree
