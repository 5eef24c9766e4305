# What `make lab` lets every kernel run as it starts: a cell run out of order is told which cell comes first.
# Terminals' own Pythons read this file too, and kernels without esm2kit: there it only hands on to the user's own file.
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
