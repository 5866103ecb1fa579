"""What the models with a CLIP share: the CLIP and the classes as its text tower sees them."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ovseg_d2.data.templates import get_templates
from ovseg_d2.modeling.clip.build import build_clip_from_config, clip_tokenizer
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.meta_arch.base import OpenVocabSegmentor
from ovseg_d2.modeling.text_classifier import TextClassifier
from ovseg_d2.structures import ImageBatch, MaskProposals, TextClasses, Vocabulary


class ClipSegmentor(OpenVocabSegmentor):
    """Has ``clip`` and makes the classes of each batch from texts; nothing is fixed when it is built."""

    def __init__(self, *, clip: Clip, text_classifier: TextClassifier, **shared: Any) -> None:
        """
        Args:
            clip: with a text tower.
            text_classifier: vocabularies -> class embeddings.
            shared: see :class:`OpenVocabSegmentor`.
        """
        super().__init__(**shared)
        self.clip = clip
        self.text_classifier = text_classifier

    @staticmethod
    def shared_from_config(cfg: CfgNode, **visual_kwargs: Any) -> dict[str, Any]:
        """As in the base class, with CLIP and the text classifier.

        Args:
            visual_kwargs: the method's options of CLIP's image encoder.
        """
        shared = OpenVocabSegmentor.shared_from_config(cfg)
        text = cfg.MODEL.OVSEG.TEXT
        text_classifier = TextClassifier(
            tokenizer=clip_tokenizer(cfg.MODEL.OVSEG.CLIP.NAME),
            templates=get_templates(text.TEMPLATES),
            trained_vocabulary=shared["vocabulary"],
            cache_dir=text.CACHE_DIR,
        )
        return {**shared, "clip": build_clip_from_config(cfg, **visual_kwargs), "text_classifier": text_classifier}

    def text(self, vocabulary: Vocabulary) -> TextClasses:
        """Embeddings (E, P, D) of a vocabulary, kept as long as they are right."""
        return self.text_classifier(self.clip.text, vocabulary)

    def generator_copy(self, images: ImageBatch) -> ImageBatch:
        """The images as the mask generator gets them."""
        return images

    def propose(
        self, generator: nn.Module, images: ImageBatch, text: TextClasses | None, vocabulary: Vocabulary
    ) -> MaskProposals:
        """A generator's masks, from features of the model's own CLIP if it wants them.

        Args:
            text: embeds (E, 1, D) of the classes for its class head, as the model's CLIP has them.
            vocabulary: the classes, for a generator that has a text tower of its own.
        """
        if getattr(generator, "has_own_text", False):
            text = generator.own_text(vocabulary)
        features = self.clip.visual(images.tensor) if getattr(generator, "needs_clip_features", False) else None
        return generator(images, features, text)
