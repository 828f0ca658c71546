"""The tokenizer of a model directory. No torch."""

import logging
from pathlib import Path
from typing import Any

from sglang_lora_moe.config import Config
from sglang_lora_moe.engine.validate import check_text, too_long

logger = logging.getLogger(__name__)

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(config: Config) -> Any:
    """The Hugging Face tokenizer; None, with a warning, if the model has none. ValueError if one was named and is not there, or cannot be read."""
    from transformers import AutoTokenizer

    path = Path(config.tokenizer_path or config.model_path)
    if not any((path / name).is_file() for name in _FILES):
        if config.tokenizer_path not in (None, config.model_path):
            raise ValueError(f"--tokenizer-path {path}: there is no tokenizer in it (none of {', '.join(_FILES)})")
        logger.warning("%s has no tokenizer: only token ids are served", path)
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever is in those files, the user needs to know which directory it is about
        raise ValueError(f"the tokenizer in {path} cannot be loaded: {type(error).__name__}: {error}") from error


def encode(tokenizer: Any, text: str, capacity: int, param: str, **options: Any) -> list[int]:
    """The token ids of `text`; RequestError for `capacity` or more.

    A text that is far too long is refused by its beginning: each token takes 400 bytes of memory while it is made.
    """
    check_text(text, param)
    length = 8 * capacity  # characters
    while length < len(text):
        if (count := len(tokenizer.encode(text[:length], **options))) > 2 * capacity:  # a few at the cut may be others in the whole text
            raise too_long(f"more than {count}", capacity, param)
        length *= 2
    ids = list(tokenizer.encode(text, **options))
    if len(ids) >= capacity:
        raise too_long(len(ids), capacity, param)
    return ids
