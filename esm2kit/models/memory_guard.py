"""The error of one line about exhausted memory in inference, for every stage that computes representations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from esm2kit.core.hardware import explain_out_of_memory
from esm2kit.models.config import ESM2Config
from esm2kit.models.memory import InferenceSettings, describe_inference, list_inference_remedies

OPTIONS = ("batch_tokens", "workers", "precision", "device")


@contextmanager
def explain_inference_memory(
    shape: ESM2Config,
    settings: InferenceSettings,
    options: Sequence[str] = OPTIONS,
    note: Callable[[], str] = str,
    names: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Raise an error that names the settings that help, with their memory, if the memory is exhausted inside.

    Args:
        shape: Architecture of the model.
        settings: Settings of the run.
        options: Names of the options that the stage has.
        note: Returns further options that a smaller batch requires, such as " --restart".
        names: How the stage calls an option, if otherwise.

    Yields:
        None.

    Raises:
        InputError: The memory is exhausted.
    """

    def remedies() -> list[str]:
        return list_inference_remedies(shape, settings, options, note(), names)

    with explain_out_of_memory(describe_inference(shape, settings), remedies):
        yield
