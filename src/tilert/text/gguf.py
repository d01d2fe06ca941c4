"""A tokenizer from GGUF metadata, written as the files of a Hugging Face model folder.

Two kinds of vocabulary: `gpt2`, byte-level BPE whose text splitting is named by
`tokenizer.ggml.pre`, and `llama`, SentencePiece BPE that stores scores instead of merges. Names,
token types and the splitting rules are those of llama.cpp; where the original tokenizer.json of a
family is known to add something (NFC for Qwen), it is added here too.
Takes metadata as plain values: reading the GGUF file itself is the weights' business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from tilert.errors import UserError
from tilert.text.stream import byte_level_alphabet


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Pre:
    """One pre-tokenizer family: patterns that isolate their matches, one after another."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a split that is a token as a whole is taken as it is
    add_bos: bool = False  # when the file has no add_bos_token
    nfc: bool = False


_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGITS_GPT2 = (r"\p{N}", *_GPT2)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_QWEN2 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",)
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SEED_CODER = (
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
)
# A word is capitals before small letters, so that camelCase is cut at its humps.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}",)
_GPT4O = (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}",)
# The cased letters (Latin, Greek, Cyrillic, Armenian, Georgian, ...) as DeepSeek lists them.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184"
    "Ⰰ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _HAN_HANGUL,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    _HAN_KANA,
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", *_GPT2, r"[0-9][0-9][0-9]")
_BLOOM = (r" ?[^(\s|.,!?…。，、।۔،)]+",)


def _families() -> dict[str, Pre]:
    """`tokenizer.ggml.pre` to its family."""
    groups: tuple[tuple[Pre, str], ...] = (
        (
            Pre(_GPT2),
            "default gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum modern-bert exaone4 "
            "trillion granite-docling",
        ),
        (
            Pre(_DIGITS_GPT2),
            "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        ),
        (
            Pre(_LLAMA3, ignore_merges=True, add_bos=True),
            "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        ),
        (Pre(_LLAMA3), "dbrx smaug-bpe glm4 chatglm-bpe"),
        (Pre(_QWEN2, nfc=True), "qwen2"),
        (Pre(_QWEN2), "deepseek-r1-qwen stablelm2 hunyuan megrez kormo grok-2 solar-open"),
        (Pre(_QWEN35, nfc=True), "qwen35"),
        (Pre(_TEKKEN, ignore_merges=True, add_bos=True), "tekken"),
        (Pre(_GPT4O), "gpt-4o llama4 kanana2 minimax-m2"),
        (Pre(_DEEPSEEK_LLM), "deepseek-llm"),
        (Pre(_DEEPSEEK_CODER), "deepseek-coder"),
        (Pre(_DEEPSEEK_V3), "deepseek-v3 hunyuan-dense joyai-llm"),
        (Pre(_FALCON), "falcon"),
        (Pre(_SEED_CODER), "seed-coder"),
        (Pre(_BAILING), "bailingmoe bailingmoe2 llada-moe"),
        (Pre(_BLOOM), "bloom poro-chat gpt3-finnish"),
        (Pre((*_BLOOM, r"\p{N}")), "viking"),
    )
    return {name: pre for pre, names in groups for name in names.split()}


PRE_TOKENIZERS = _families()

_NAMED_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The tokenizer part of the metadata, checked. Index of the lists = token id."""

    model: str  # gpt2 | llama
    architecture: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[tuple[str, str]] | None
    named: dict[str, int]  # bos_token, ... -> id
    flags: dict[str, bool]  # add_bos_token, add_eos_token, add_space_prefix where stated


def write_gguf_tokenizer(metadata: Mapping[str, object], out_dir: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat templates of a GGUF's metadata.

    `metadata` maps GGUF keys to plain values: strings, numbers, bools, sequences of them.
    Raises UserError for a tokenizer that is not supported, or metadata that is incomplete.
    """
    try:
        vocabulary = _read_vocabulary(metadata)
        if vocabulary.model == "gpt2":
            tokenizer = _byte_level_bpe(vocabulary)
        else:
            tokenizer = _sentencepiece_bpe(vocabulary)
        _add_special_tokens(tokenizer, vocabulary)
        config = _config(vocabulary)
        _add_post_processor(tokenizer, vocabulary, config)
    except (UserError, AssertionError):
        raise
    except Exception as error:  # the package raises bare Exception, e.g. for an unknown merge
        reason = " ".join(f"{error}".split())
        raise UserError(f"the GGUF's vocabulary is inconsistent: {reason}") from error
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (out_dir / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    _write_chat_templates(metadata, out_dir)


def _read_vocabulary(metadata: Mapping[str, object]) -> _Vocabulary:
    def field(name: str) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}")

    model = field("model")
    if model not in ("gpt2", "llama"):
        raise UserError(
            f"the GGUF's tokenizer.ggml.model is {model!r}; 'gpt2' and 'llama' are supported"
        )
    tokens = [str(token) for token in _sequence(field("tokens"))]
    if not tokens:
        raise UserError("the GGUF has no tokenizer.ggml.tokens")
    types = [int(kind) for kind in _sequence(field("token_type"))]
    scores = [float(score) for score in _sequence(field("scores"))]
    for name, values in (("token_type", types), ("scores", scores)):
        if values and len(values) != len(tokens):
            raise UserError(
                f"the GGUF has {len(values)} entries in {name} for {len(tokens)} tokens"
            )
    merges = [_split_merge(str(merge)) for merge in _sequence(field("merges"))]
    named: dict[str, int] = {}
    for name, key in _NAMED_IDS.items():
        if (token_id := field(key)) is None:
            continue
        if not 0 <= int(token_id) < len(tokens):
            raise UserError(f"the GGUF's {key} {token_id} is not one of its {len(tokens)} tokens")
        named[name] = int(token_id)
    flags = ("add_bos_token", "add_eos_token", "add_space_prefix")
    return _Vocabulary(
        model=model,
        architecture=str(metadata.get("general.architecture", "")),
        pre=str(field("pre") or "default"),
        tokens=tokens,
        types=types or [int(TokenType.NORMAL)] * len(tokens),
        scores=scores or None,
        merges=merges or None,
        named=named,
        flags={name: bool(field(name)) for name in flags if field(name) is not None},
    )


def _sequence(value: Any) -> Sequence[Any]:
    return () if value is None else value


def _split_merge(merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)  # the left part is not empty, but may be a space itself
    if at < 0:
        raise UserError(f"the GGUF's merge {merge!r} is not two tokens with a space between them")
    return merge[:at], merge[at + 1 :]


def _byte_level_bpe(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """Byte-level BPE (GPT-2) with the splitting of the vocabulary's family."""
    pre = PRE_TOKENIZERS.get(vocabulary.pre)
    if pre is None:
        raise UserError(
            f"the GGUF's tokenizer.ggml.pre is {vocabulary.pre!r}; "
            f"known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    if vocabulary.merges is None:
        raise UserError("the GGUF has no tokenizer.ggml.merges, which 'gpt2' needs")
    ids: dict[str, int] = {}
    alphabet = byte_level_alphabet()
    letters = set(alphabet.values())
    for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind == TokenType.NORMAL and not letters.issuperset(token):
            # Some converters leave ordinary tokens as plain text; text is matched in byte spelling.
            token = "".join(alphabet[byte] for byte in token.encode("utf-8"))
        ids[token] = token_id
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=vocabulary.merges, ignore_merges=pre.ignore_merges)
    )
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns
    ]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece BPE: spaces are "▁", unknown characters fall back to `<0xNN>` tokens."""
    ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    merges = vocabulary.merges or _merges_from_scores(vocabulary, ids)
    unknown = vocabulary.named.get("unk_token")
    if unknown is None and TokenType.UNKNOWN in vocabulary.types:
        unknown = vocabulary.types.index(TokenType.UNKNOWN)
    unk_token = None if unknown is None else vocabulary.tokens[unknown]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=merges,
            # The stubs want a string, but None (no unknown token) is the default.
            **({} if unk_token is None else {"unk_token": unk_token}),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_mark = normalizers.Replace(" ", "▁")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.flags.get("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_mark])
        steps.append(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = to_mark
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(vocabulary: _Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best token first.

    SentencePiece joins the neighbours whose joined token has the highest score; in merge-list form
    that is this order. Control, byte and unknown tokens are never joined from text.
    """
    if vocabulary.scores is None:
        raise UserError("the GGUF has neither tokenizer.ggml.merges nor tokenizer.ggml.scores")
    scores: Sequence[float] = vocabulary.scores
    if vocabulary.architecture.startswith("gemma"):
        scores = [-float(token_id) for token_id in range(len(scores))]  # scores are not its order
    fixed = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE)
    parts = {token for token, token_id in ids.items() if vocabulary.types[token_id] not in fixed}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token in parts:
        score = scores[ids[token]]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in parts and right in parts:
                ranked.append((-score, -len(left), -len(right), left, right))
    ranked.sort(key=lambda merge: (*merge[:3], ids[merge[3]], ids[merge[4]]))
    return [(left, right) for *_, left, right in ranked]


def _add_special_tokens(tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens are special; user-defined ones are matched whole, but are ordinary text."""
    special = set(vocabulary.named.values())
    added = []
    for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        is_special = kind == TokenType.CONTROL or token_id in special
        if token and (is_special or kind == TokenType.USER_DEFINED):
            added.append(AddedToken(token, normalized=False, special=is_special))
    tokenizer.add_tokens(added)


def _config(vocabulary: _Vocabulary) -> dict[str, Any]:
    """tokenizer_config.json."""
    if vocabulary.model == "llama":
        add_bos = "bos_token" in vocabulary.named
    else:
        add_bos = PRE_TOKENIZERS[vocabulary.pre].add_bos
    config: dict[str, Any] = {
        "add_bos_token": vocabulary.flags.get("add_bos_token", add_bos),
        "add_eos_token": vocabulary.flags.get("add_eos_token", False),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, token_id in vocabulary.named.items():
        config[name] = vocabulary.tokens[token_id]
    return config


def _add_post_processor(
    tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary, config: Mapping[str, Any]
) -> None:
    """Bos before and eos after the text, where the config asks for them."""
    single, special = ["$A:0"], []
    for name, at in (("bos_token", 0), ("eos_token", len(single))):
        if not config[f"add_{name}"]:
            continue
        if name not in vocabulary.named:
            raise UserError(f"the GGUF sets add_{name} but names no {name}")
        token = config[name]
        single.insert(0 if at == 0 else len(single), f"{token}:0")
        special.append((token, vocabulary.named[name]))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )


def _write_chat_templates(metadata: Mapping[str, object], out_dir: Path) -> None:
    """`tokenizer.chat_template`, and the named ones (`tokenizer.chat_template.tool_use`)."""
    prefix = "tokenizer.chat_template"
    for key, value in metadata.items():
        if not isinstance(value, str):
            continue
        if key == prefix:
            path = out_dir / "chat_template.jinja"
        elif re.fullmatch(re.escape(prefix) + r"\.\w+", key):  # \w: the name becomes a file name
            path = out_dir / "additional_chat_templates" / f"{key[len(prefix) + 1 :]}.jinja"
        else:
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(value, encoding="utf-8")
