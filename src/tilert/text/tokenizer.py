"""The tokenizer of a Hugging Face model folder: text to token ids, ids to text, chat to ids.

Reads `tokenizer.json` with the `tokenizers` package, and what stands beside it (special tokens,
chat templates) by the rules of transformers' AutoTokenizer, so that both give the same ids for the
same folder. Does not know about streaming (stream.py) or GGUF (gguf.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tilert.errors import UserError
from tilert.text.chat import choose_template, read_chat_templates, render_chat

NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Text and chat messages to token ids, and back. Make one with `from_folder`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
    ) -> None:
        # A tokenizer.json may carry the padding and truncation of its training run.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.named_tokens = dict(named_tokens)
        self.chat_templates = dict(chat_templates)
        added = backend.get_added_tokens_decoder()
        self.special_tokens = frozenset(t.content for t in added.values() if t.special)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Loads the tokenizer of a model folder.

        Raises UserError when tokenizer.json is missing or damaged, or a file beside it is.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{folder} holds no tokenizer.json, which is needed for a tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception for every parse error
            raise UserError(f"{file} is not a readable tokenizer: {_one_line(error)}") from error
        config = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # the older pair of files
            config = {**config, **_read_json(folder / "special_tokens_map.json")}
        if backend.padding is not None:  # transformers names its pad token, unless the config does
            config = {"pad_token": backend.padding["pad_token"], **config}
        try:
            _add_config_tokens(backend, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the special tokens in {folder} are damaged: {_one_line(error)}"
            ) from error
        named = {
            name: _content(config[name])
            for name in NAMED_SPECIAL_TOKENS
            if config.get(name) is not None
        }
        return cls(backend, named, read_chat_templates(folder, config))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None when there is no such token."""
        return self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens`, what the post-processor adds (bos).

        Special tokens that are written out in `text` become their ids.
        Raises UserError when `text` holds half of a surrogate pair (no UTF-8 form).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text holds a lone surrogate at position {error.start}; text must be Unicode"
            ) from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text for a chat.

        `chat_template` is the name of one of the model's templates, or template source;
        `continue_final_message` leaves the last message open, to be continued; `kwargs` are
        variables for the template (`enable_thinking`, `documents`, ...).
        Raises UserError when the model has no template or the template fails.
        """
        source = choose_template(self.chat_templates, chat_template, tools is not None)
        variables = {**self.named_tokens, **kwargs}
        return render_chat(
            source, messages, add_generation_prompt, tools, continue_final_message, variables
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of `apply_chat_template`. The template writes bos itself, so none is added."""
        text = self.apply_chat_template(
            messages, add_generation_prompt, tools, chat_template, continue_final_message, **kwargs
        )
        return self.encode(text, add_special_tokens=False)


def _add_config_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Adds the tokens that tokenizer_config.json declares, in the order of transformers, since a
    token that tokenizer.json lacks gets the next free id. Known tokens take the flags declared
    here, and a token with a role (bos, eos, ...) is always special."""
    present = backend.get_added_tokens_decoder()
    if "added_tokens_decoder" in config:
        declared = {int(i): value for i, value in config["added_tokens_decoder"].items()}
        tokens = [_added_token(declared[i], special=False) for i in sorted(declared)]
    else:
        tokens = [present[i] for i in sorted(present)]
    known = {token.content for token in (*present.values(), *tokens)}
    for value in _config_special_tokens(config):
        token = _added_token(value, special=True)
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    named = {_content(config[n]) for n in NAMED_SPECIAL_TOKENS if config.get(n) is not None}
    for token in tokens:
        token.special = token.special or token.content in named
    backend.add_tokens(tokens)


def _config_special_tokens(config: Mapping[str, Any]) -> list[Any]:
    """Values of the special-token keys: the named ones, a model's own `*_token`, the extra list."""
    own = [
        value
        for key, value in config.items()
        if key.endswith("_token")
        and key not in NAMED_SPECIAL_TOKENS
        and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
    ]
    named = [config[name] for name in NAMED_SPECIAL_TOKENS if config.get(name) is not None]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return named + own + list(extra.values() if isinstance(extra, dict) else extra)


def _content(value: Any) -> str:
    return value if isinstance(value, str) else value["content"]


def _added_token(value: Any, special: bool) -> AddedToken:
    """A token from its JSON form; `special` is for a form that does not say."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {
        key: bool(value[key])
        for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if key in value
    }
    return AddedToken(value["content"], **{"special": special, **flags})


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(f"{error}".split())
