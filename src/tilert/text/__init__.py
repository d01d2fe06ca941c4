"""Text to token ids and back: tokenizer, chat template, streaming detokenizer.

Knows the file formats that a Hugging Face model folder and a GGUF file use for their vocabulary.
Must not know models, weights, the engine or HTTP: everything here takes and returns plain strings
and lists of ints.
"""

from __future__ import annotations

from tilert.text.gguf import write_gguf_tokenizer
from tilert.text.stream import Detokenizer
from tilert.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer", "write_gguf_tokenizer"]
