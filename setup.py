"""Add the walkthrough (notebooks, data, tiers) to the wheel; everything else is in pyproject.toml."""

import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithWalkthrough(build_py):
    """Copies the files of the checkout into the package; an editable install reads them where they are."""

    def run(self) -> None:
        """Build the package, then add the files."""
        super().run()
        if self.editable_mode:
            return
        patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["esm2kit"][
            "walkthrough"
        ]
        for source in sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}):
            target = Path(self.build_lib, "esm2kit", "walkthrough", source.relative_to(ROOT))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithWalkthrough})
