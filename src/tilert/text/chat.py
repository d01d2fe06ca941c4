"""Chat templates: Jinja source from a model folder, rendered in a sandbox.

The environment has the settings that Hugging Face templates are written for (trimmed blocks, loop
controls, `raise_exception`, `strftime_now`, a `tojson` that leaves HTML characters alone, the
`generation` tag). A template is untrusted code: it sees plain JSON values only, has no loader, and
its output length is bounded. Its running time is not.
Knows nothing of token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tilert.errors import UserError

MAX_RENDERED_CHARS = 1 << 26
"""A rendered prompt longer than this (64 Mi characters) is a runaway template."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; shown as is."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, not a plain scope: `set` inside it must stay inside, as in training.
        call = self.call_method("_render_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(lineno)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace` without names that start with an underscore (Python internals)."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` must stay free as a keyword
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)  # `self._check` would look for a stored value
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace cannot hold the name {name!r}")


class _Dict:
    """Stands in for the `dict` type, whose class attributes a template has no business with."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    env.globals["dict"] = _Dict()
    env.globals["namespace"] = _Namespace
    return env.from_string(source)


def _plain(value: Any) -> Any:
    """A copy of `value` in exact JSON types, so that a template meets no object with methods that
    write files, and cannot change what the caller holds."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise UserError(
        f"a chat message, tool or template argument holds a {type(value).__name__}; "
        "only JSON values are accepted"
    )


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: no null fields, reasoning under the names in use."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise UserError("a chat needs a non-empty list of messages")
    plain = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"a chat message must be an object with a 'role', not {message!r:.80}")
        # OpenAI clients send `content: null` and `tool_calls: null`; templates expect no key.
        fields = {key: item for key, item in message.items() if item is not None}
        reasoning = next((fields[key] for key in _REASONING_FIELDS if key in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        plain.append(_plain(fields))
    return plain


def _tag_final_message(message: dict[str, Any]) -> str:
    """Appends the tag to the final message's text in place; returns the text before it."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_TAG
        return content
    if isinstance(content, list):
        for block in reversed(content):
            if isinstance(block, dict) and isinstance(block.get("text"), str):
                text = block["text"]
                block["text"] = text + _CONTINUE_TAG
                return text
    raise UserError("continue_final_message needs text content in the final message")


def _cut_at_tag(rendered: str, text: str) -> str:
    """The rendered chat up to the end of the final message's text."""
    at = rendered.rfind(_CONTINUE_TAG.strip())
    if at < 0 or text.strip() not in rendered:
        raise UserError(
            "the chat template does not show the final message, so it cannot be continued"
        )
    if rendered.startswith(_CONTINUE_TAG, at):
        return rendered[:at]
    return rendered[:at].rstrip()  # the template trims messages, so trim ours as well


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    continue_final_message: bool,
    variables: Mapping[str, Any],
) -> str:
    """The prompt that a chat template makes of `messages`.

    Raises UserError when the template does not parse, fails, or refuses the conversation.
    """
    if continue_final_message and add_generation_prompt:
        raise UserError("continue_final_message and add_generation_prompt exclude each other")
    chat = _plain_messages(messages)
    final_text = _tag_final_message(chat[-1]) if continue_final_message else ""
    if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError("every tool must be a JSON schema object")
    values = {"documents": None, **_plain(variables)}
    values["messages"] = chat
    values["tools"] = _plain(tools)
    values["add_generation_prompt"] = add_generation_prompt
    rendered = _render(source, values)
    return _cut_at_tag(rendered, final_text) if continue_final_message else rendered


def _render(source: str, values: Mapping[str, Any]) -> str:
    parts: list[str] = []
    length = 0
    try:
        for part in _compile(source).generate(values):
            parts.append(part)
            length += len(part)
            if length > MAX_RENDERED_CHARS:
                raise jinja2.TemplateError(f"it writes more than {MAX_RENDERED_CHARS} characters")
    except Exception as error:  # a template can raise anything that an expression can
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise UserError(f"the chat template failed: {reason}") from error
    return "".join(parts)


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """All chat templates of a model folder by name; the one without a name is `default`.

    Files win over the `chat_template` key of tokenizer_config.json, as in transformers.
    """
    templates: dict[str, str] = {}
    if (path := folder / "chat_template.jinja").is_file():
        templates["default"] = _read_text(path)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    if templates:
        return templates
    found: Any = config.get("chat_template")
    if found is None and (path := folder / "chat_template.json").is_file():
        try:
            found = json.loads(_read_text(path))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        if isinstance(found, dict):
            found = found.get("chat_template")
    if isinstance(found, list):
        found = {
            entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)
        }
    if isinstance(found, str):
        found = {"default": found}
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(text, str) for name, text in found.items()
    ):
        raise UserError(
            f"the chat_template of {folder} must be a string or a list of named templates"
        )
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def choose_template(templates: Mapping[str, str], requested: str | None, has_tools: bool) -> str:
    """The template source to use: a requested name or source, else `tool_use`, else `default`."""
    if requested is not None:
        return templates.get(requested, requested)
    if has_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if templates:
        raise UserError(
            f"this model has no default chat template; choose one of {sorted(templates)}"
        )
    raise UserError("this model has no chat template; send a plain prompt instead of messages")
