"""Small trained models that ship with the package, the configurations of their architectures, and their cards.

Their files can be named in configurations as ``model_zoo://FILE``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager

FOLDER = Path(__file__).resolve().parent
PREFIX = "model_zoo://"


class ModelZooHandler(PathHandler):
    """``model_zoo://FILE`` -> the file in this package."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        """
        Raises:
            FileNotFoundError: there is no such file.
        """
        file = FOLDER / path.removeprefix(PREFIX)
        if not file.is_file():
            known = ", ".join(sorted(other.name for other in FOLDER.glob("*.safetensors")))
            raise FileNotFoundError(f"{path}: not in the package's model zoo; there are {known or 'no weights'}")
        return str(file)

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode, **kwargs)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return (FOLDER / path.removeprefix(PREFIX)).is_file()

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return self._exists(path)


PathManager.register_handler(ModelZooHandler(), allow_override=True)
