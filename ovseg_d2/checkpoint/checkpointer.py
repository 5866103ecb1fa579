"""Saving a training run and finding it again, in detectron2's manner."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer as _Checkpointer
from torch import nn

from ovseg_d2.checkpoint.io import atomic_write, read_checkpoint, save_atomic, temporary_name
from ovseg_d2.checkpoint.matching import match_state_dict

logger = logging.getLogger(__name__)

_PERIODIC = re.compile(r"model_(\d{7})\.pth")
_LAST = "last_checkpoint"


class Checkpointer(_Checkpointer):
    """Saves and loads the model and what belongs to the run (optimizer, schedule, ...); a drop-in for fvcore's.

    Files are written whole or not at all, and are read without running what is in them. ``last_checkpoint`` is written
    after the file that it names. Weights from elsewhere come in through ``engine.load_parts``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        keep: int = 0,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: unwrapped from DistributedDataParallel if need be.
            save_dir: the folder of the run; with several machines, one that they share.
            save_to_disk: default: in the main process only.
            keep: how many of the newest periodic checkpoints stay; 0 for all. The final one always does.
            checkpointables: objects with ``state_dict`` and ``load_state_dict``.
        """
        if save_to_disk is None:
            save_to_disk = comm.is_main_process()
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.keep = keep

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``{name}.pth`` with the model, the checkpointables and ``kwargs``, and make it the last checkpoint."""
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir, f"{name}.pth")
        logger.info(f"Saving checkpoint to {path}")
        state = {"model": self.model.state_dict()}
        state.update((key, thing.state_dict()) for key, thing in self.checkpointables.items())
        save_atomic({**state, **kwargs}, path)
        self.tag_last_checkpoint(path.name)
        self._prune()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make a file of ``save_dir`` the one that a resumed run starts from."""
        with atomic_write(Path(self.save_dir, _LAST)) as file:
            file.write(last_filename_basename.encode())

    def get_all_checkpoint_files(self) -> list[str]:
        """The checkpoints in ``save_dir``, oldest first."""
        paths = Path(self.save_dir).glob("model_*.pth")
        return [str(path) for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))]

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint of this very model; what does not fit is a one-line ``ValueError``.

        Args:
            path: a file that :meth:`save` wrote.
            checkpointables: which of them to load; default all.

        Returns:
            What else is in the file, such as ``iteration``.
        """
        return self._restore(read_checkpoint(path), path, checkpointables)

    def resume(self) -> dict[str, Any]:
        """Load the last checkpoint; if it is damaged or gone, the newest readable one before it, with a warning.

        Returns:
            What else is in the file: ``iteration``, ...
        """
        content, path = self._newest_readable()
        everywhere = comm.all_gather(Path(path).name)
        if len(set(everywhere)) > 1:
            raise ValueError(
                f"processes would resume from different checkpoints ({', '.join(sorted(set(everywhere)))}): "
                f"OUTPUT_DIR {self.save_dir} must be one folder that all machines share"
            )
        return self._restore(content, path, None)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """:meth:`resume` if asked for and there is something to resume from, else only the model from ``path``."""
        if resume and self.has_checkpoint():
            return self.resume()
        return self.load(path, checkpointables=[]) if path else {}

    def has_checkpoint(self) -> bool:
        """Whether there is a run in ``save_dir`` to resume."""
        return bool(self.save_dir) and (Path(self.save_dir, _LAST).is_file() or bool(self.get_all_checkpoint_files()))

    def _restore(self, content: dict[str, Any], path: str, checkpointables: list[str] | None) -> dict[str, Any]:
        match = match_state_dict(self.model, content.pop("model"), source=str(path), prefix="")
        match.require_whole()
        match.load(self.model)
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key not in content:
                raise ValueError(f"{path} holds no {key} state, found {', '.join(content) or 'the model only'}")
            try:
                self.checkpointables[key].load_state_dict(content.pop(key))
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{path}: its {key} state does not fit this config: {error}") from error
        logger.info(f"Loaded checkpoint {path}")
        return content

    def _newest_readable(self) -> tuple[dict[str, Any], str]:
        # The file that last_checkpoint names comes first, then the others, newest first.
        tagged = self.get_checkpoint_file()
        paths = [tagged] if tagged else []
        paths += [path for path in reversed(self.get_all_checkpoint_files()) if path != tagged]
        errors = []
        for path in paths:
            try:
                content = read_checkpoint(path)
            except (ValueError, FileNotFoundError) as error:
                errors.append(str(error))
                continue
            if errors:
                logger.warning(f"{errors[0]}; resuming from {path} instead")
            return content, path
        raise ValueError(f"cannot resume from {self.save_dir}: {'; '.join(errors)}")

    def _prune(self) -> None:
        """Remove old periodic checkpoints, and what a killed save left behind."""
        paths = [Path(path) for path in self.get_all_checkpoint_files()]
        old = [path for path in paths if _PERIODIC.fullmatch(path.name)][: -self.keep] if self.keep else []
        for path in [*old, *Path(self.save_dir).glob(temporary_name(Path("model_*.pth")).name)]:
            path.unlink(missing_ok=True)
