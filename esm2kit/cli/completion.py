"""`esm2kit completion`: a script that completes stages, options and their choices in a shell."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from esm2kit.core.errors import InputError, check_choices
from esm2kit.core.options import OptionGroups
from esm2kit.models.config import MODEL_NAMES

# fields that take the name of an official model
MODEL_FIELDS = ("model", "init_from", "base", "what")


@dataclass(frozen=True)
class CompletionConfig:
    """Print a script that completes commands of esm2kit in a shell.

    Args:
        shell: Shell that reads the script.
    """

    shell: Literal["bash", "zsh"] = "bash"

    option_groups = OptionGroups(usual="shell")

    def __post_init__(self) -> None:
        check_choices(self)


def print_completion(config: CompletionConfig) -> str:
    """Write the completion script of a shell.

    Args:
        config: The shell.

    Returns:
        The script, for `eval` or a file that the shell reads.

    Raises:
        InputError: The package shtab is missing.
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise InputError(
            "completion requires the package shtab: pip install shtab", code="package.missing", name="shtab"
        ) from None
    return shtab.complete(_build_parser(shtab), config.shell).rstrip("\n")


def _build_parser(shtab: Any) -> argparse.ArgumentParser:
    """Build a parser with all stages and options. It is not used for parsing."""
    from esm2kit.cli.arguments import COMMON_OPTIONS, describe_type, find_short_forms, list_choices, list_fields
    from esm2kit.cli.commands import STAGES, import_object

    root = argparse.ArgumentParser(prog="esm2kit", add_help=False)
    root.add_argument("-h", "--help", action="store_true", help="Show the stages and exit.")
    root.add_argument("-V", "--version", action="store_true", help="Show the version and exit.")
    stages = root.add_subparsers()
    stages.add_parser("help", help="Show the help of a stage.", add_help=False).add_argument("stage", choices=[*STAGES])
    for name, stage in STAGES.items():
        parser = stages.add_parser(name, help=stage.help, add_help=False)
        for names, text in COMMON_OPTIONS.items():
            options = [option.split()[0] for option in names.split(", ")]
            takes_file = names.endswith("FILE")
            action = parser.add_argument(*options, help=text, action="store" if takes_file else "store_true")
            if takes_file:
                action.complete = shtab.FILE
        fields = list_fields(import_object(stage.config))
        short_of = {field: short for short, field in find_short_forms(fields).items()}
        for field, hint in fields.items():
            options = [*([short_of[field]] if field in short_of else []), f"--{field}"]
            text = describe_type(hint)
            if "true or false" in text:
                parser.add_argument(*options, help=text, action="store_true")
                parser.add_argument(f"--no-{field}", dest=f"no_{field}", action="store_true")
                continue
            choices = [str(choice) for choice in list_choices(hint)]
            if field in MODEL_FIELDS and Path not in (hint, *getattr(hint, "__args__", ())):
                choices = list(MODEL_NAMES)  # a shell completes paths where no name matches
            action = parser.add_argument(*options, help=text, choices=choices or None)
            if not choices and "path" in text:
                action.complete = shtab.DIRECTORY if field.endswith("_dir") else shtab.FILE
        takes_path = Path in (hint := fields[stage.positional], *getattr(hint, "__args__", ()))
        action = parser.add_argument(f"{stage.positional}_", nargs="*", choices=list_choices(hint) or None)
        if takes_path:
            action.complete = shtab.FILE
    return root
