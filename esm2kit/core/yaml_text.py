"""Parse YAML, with an error for a key that occurs twice: PyYAML silently takes the last one."""

from typing import Any

import yaml


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that refuses repeated keys of a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and key.value in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice; remove one", key.start_mark
                )
        return super().construct_mapping(node, deep)


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
