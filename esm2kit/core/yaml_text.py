"""Parse YAML, with an error for a key that occurs twice: PyYAML silently takes the last one."""

from typing import Any

import yaml


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that refuses repeated keys of a mapping."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Check the keys as they are written: later, PyYAML adds those of `<<` to a node that has the same keys."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice; remove one", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> Any:
    """Parse a YAML document.

    Args:
        text: The document.

    Returns:
        Its value.

    Raises:
        yaml.YAMLError: The text is not valid YAML, or a mapping has a key twice.
    """
    return yaml.load(text, _UniqueKeyLoader)
