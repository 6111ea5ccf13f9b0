"""Tokenizers of the text towers: CLIP's byte-pair encoding, and those of the model hub (SigLIP)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomaly_clip.errors import reason

__all__ = ["CLIPTokenizer", "PromptTokenizer", "tokenizer_of"]

DEFAULT_LENGTH = 77  # of open_clip, for configurations without context_length
WORD_START = "▁"
"""First character of a token that begins a word, in the vocabularies of SigLIP."""


class PromptTokenizer(ABC):
    """Tokens of prompts, as a text tower expects them."""

    @abstractmethod
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids int64 ``(M, context length)``, padded or cut."""

    @abstractmethod
    def lost_end(self, prompt: str) -> str:
        """Return the end of a prompt that there are no tokens for; usually empty."""

    @property
    @abstractmethod
    def words(self) -> list[str]:
        """The tokens that are, or begin, a word."""

    @property
    def vocabulary(self) -> list[str]:
        """Whole words that consist of ASCII letters, sorted."""
        words = self.words
        return sorted(word for word in words if len(word) > 1 and word.isascii() and word.isalpha())


class CLIPTokenizer(PromptTokenizer):
    """CLIP's tokenizer, which comes with open_clip."""

    def __init__(self, context_length: int, options: Mapping[str, Any]) -> None:
        from open_clip import SimpleTokenizer  # slow to import, see weights.py

        self.context_length = context_length
        self._tokenize = SimpleTokenizer(context_length=context_length, **options)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids, padded with zeros; see the base class."""
        return self._tokenize(list(prompts))

    def lost_end(self, prompt: str) -> str:
        """Return the end of a prompt that there are no tokens for; see the base class."""
        limit = self.context_length - 2  # without start and end token
        # No token is shorter than a byte, so most prompts need not be counted.
        if len(prompt.encode("utf-8", "replace")) <= limit:  # names of files need not be UTF-8
            return ""
        return str(self._tokenize.decode(self._tokenize.encode(prompt)[limit:])).strip()

    @property
    def words(self) -> list[str]:
        """The tokens that are a word."""
        tokens = self._tokenize.encoder
        return [word.removesuffix("</w>") for word in tokens if word.endswith("</w>")]


class HubTokenizer(PromptTokenizer):
    """A tokenizer of transformers, from the cache of the model hub or a folder.

    Args:
        model: Name of the model, for messages.
        source: Name of the tokenizer's repository, or a folder.
        context_length: Number of tokens of a prompt.
        options: Further arguments of open_clip's ``HFTokenizer``.

    Raises:
        FileNotFoundError: If its files are neither stored locally nor downloadable.
        ValueError: If transformers is not installed, or cannot read the files.
    """

    def __init__(
        self, model: str, source: str, context_length: int, options: Mapping[str, Any]
    ) -> None:
        try:
            import transformers  # noqa: F401 - only these models need it
        except ImportError:
            raise ValueError(
                f"backbone.name {model}: its texts need the tokenizer {source} of the package "
                f"transformers, which is not installed; pip install 'anomaly_clip[siglip]', or "
                f"choose a model with CLIP's tokenizer, such as ViT-B-16-plus-240"
            ) from None
        from open_clip.tokenizer import HFTokenizer

        self.context_length = context_length
        try:
            self._tokenize = HFTokenizer(source, context_length=context_length, **options)
        except MemoryError:
            raise
        except Exception as error:  # transformers raises many types
            cause = reason(error)[:200] or type(error).__name__
            if Path(source).is_dir():
                raise ValueError(
                    f"backbone.name {model}: the folder {source} of text_cfg.hf_tokenizer_name "
                    f"cannot be read as a tokenizer ({cause}); it needs tokenizer.json and "
                    f"tokenizer_config.json, as the tokenizer's save_pretrained writes them"
                ) from None
            raise FileNotFoundError(
                f"backbone.name {model}: its tokenizer {source} is not in the model hub's cache "
                f"and cannot be downloaded ({cause}); use the model once with a network, or give "
                f"a JSON model configuration whose text_cfg.hf_tokenizer_name is a folder with "
                f"the tokenizer's files"
            ) from None

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids, with the padding of the tokenizer; see the base class."""
        if not prompts:  # which transformers does not take
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        return self._tokenize(list(prompts))

    def lost_end(self, prompt: str) -> str:
        """Return the end of a prompt that there are no tokens for; see the base class."""
        tokenizer: Any = self._tokenize.tokenizer
        limit = self.context_length - tokenizer.num_special_tokens_to_add()
        text = self._tokenize.clean_fn(prompt)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return str(tokenizer.decode(tokens[limit:])).strip() if len(tokens) > limit else ""

    @property
    def words(self) -> list[str]:
        """The tokens that begin a word, or are one."""
        tokens = self._tokenize.tokenizer.get_vocab()
        return [word.removeprefix(WORD_START) for word in tokens if word.startswith(WORD_START)]


def tokenizer_of(model: str, text: Mapping[str, Any]) -> PromptTokenizer:
    """Return the tokenizer of a model, as open_clip's ``get_tokenizer`` chooses it.

    Args:
        model: Name of the model, for messages.
        text: Its ``text_cfg``.
    """
    length = int(text.get("context_length", DEFAULT_LENGTH))
    options = dict(text.get("tokenizer_kwargs") or {})
    if source := text.get("hf_tokenizer_name"):
        if mode := text.get("tokenizer_mode"):
            options["tokenizer_mode"] = mode
        return HubTokenizer(model, str(source), length, options)
    return CLIPTokenizer(length, options)
