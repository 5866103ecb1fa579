"""Backbones that know where their pretrained weights come from."""

from __future__ import annotations

from abc import abstractmethod

from detectron2.modeling import Backbone


class PretrainedBackbone(Backbone):
    """Built with random weights; ``engine.load_parts`` fills it where no checkpoint does."""

    #: The config key that names the weights, for messages.
    weights_key: str

    @property
    @abstractmethod
    def weights_name(self) -> str:
        """What :attr:`weights_key` says; "" for no weights."""

    @abstractmethod
    def pretrained_names(self) -> list[str]:
        """Names in this module's state dict of what the weights give; the rest of it is new."""

    @abstractmethod
    def load_pretrained(self) -> str:
        """Load the weights that :attr:`weights_name` names; all of :meth:`pretrained_names`, or refuse.

        Returns:
            A line for the log.

        Raises:
            ValueError: they cannot be fetched or read, or are of another architecture.
        """
