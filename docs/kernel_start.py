# Startup file of every kernel of `make lab`: if a cell is run too early, the error names the cell to run first.
# Python terminals and kernels without esm2kit read this file too; there it only runs the user's own startup file.
def start() -> None:
    import contextlib
    import os
    import sys

    if "ipykernel" in sys.modules:
        with contextlib.suppress(ImportError):
            from esm2kit.notebook import name_errors

            name_errors.install()
    own = os.environ.get("ESM2KIT_OWN_PYTHONSTARTUP", "")
    if os.path.isfile(own):
        with open(own, encoding="utf-8") as file:
            exec(compile(file.read(), own, "exec"), globals())


try:
    start()
finally:
    del start
