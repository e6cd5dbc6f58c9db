"""Messages to text with a compiled chat template, as vLLM's renderer does it.

Handles what nearly all requests consist of (system, developer, user and assistant messages of
text); None stands for everything else and for whatever a template refuses. Follows
`parse_chat_messages` in vLLM's `chat_utils` and `safe_apply_chat_template` in `renderers/hf.py`;
`chat_probes.py` compares the two when a server starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]

ROLES = frozenset({"system", "user", "assistant", "developer"})
# vLLM drops a line that starts so from system messages; such a prompt stays vLLM's business.
BILLING_HEADER = "x-anthropic-billing-header"


class Template(Protocol):
    """A compiled jinja template."""

    def render(self, **variables: Any) -> str:
        """Return the text; raises whatever the template raises."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Which kinds of messages render as vLLM renders them."""

    names: bool = True
    parts: bool = True
    developer: bool = True
    continued: bool = True


@dataclass(frozen=True, slots=True)
class Chat:
    """How one server renders a request that brings no rendering options of its own.

    variables: what the template gets beside the messages. wrap: contents are lists of parts
    (content format "openai") instead of strings.
    """

    source: str
    template: Template
    variables: dict[str, Any]
    wrap: bool
    shapes: Shapes = Shapes()

    @property
    def knows_developer(self) -> bool:
        """Whether the template has the role; vLLM asks the same question of its text."""
        return '"developer"' in self.source or "'developer'" in self.source


def render(
    chat: Chat,
    messages: list[Message],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str | None:
    """Render messages as decoded from JSON, not validated; they are left as they are."""
    conversation = _conversation(chat, messages)
    if not conversation:
        return None
    try:
        if continue_final_message:
            return _continued(chat, conversation, add_generation_prompt)
        return chat.template.render(
            messages=conversation,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **chat.variables,
        )
    except Exception:  # templates raise what they like; vLLM turns it into a 400
        return None


def _conversation(chat: Chat, messages: list[Message]) -> list[Message] | None:
    """Return what vLLM hands to the template; None for a shape that is not handled."""
    conversation: list[Message] = []
    developer = False
    for message in messages:
        if type(message) is not dict:
            return None
        role = message.get("role")
        if type(role) is not str or role not in ROLES:
            return None
        content = _content(chat, message.get("content"), role == "system")
        if content is None:
            return None
        result: Message = {"role": role, "content": content}
        if len(message) != 2:
            name = message.get("name")
            if len(message) != 3 or type(name) is not str or not chat.shapes.names:
                return None
            result["name"] = name
        if role == "developer":
            if not chat.shapes.developer:
                return None
            developer = True
            result["tools"] = None
        conversation.append(result)
    if developer and not chat.knows_developer:
        return _developer_to_system(conversation)
    return conversation


def _content(chat: Chat, content: Any, system: bool) -> str | list[Message] | None:
    """Return text or text parts in the template's format; None if it is anything else."""
    if type(content) is str:
        if system and content.startswith(BILLING_HEADER):
            return None
        return [{"type": "text", "text": content}] if chat.wrap else content
    if type(content) is not list or not chat.shapes.parts:
        return None
    texts = []
    for part in content:
        if type(part) is not dict or len(part) != 2 or part.get("type") != "text":
            return None
        text = part.get("text")
        if type(text) is not str or (system and text.startswith(BILLING_HEADER)):
            return None
        texts.append(text)
    if chat.wrap:
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(filter(None, texts))  # vLLM drops empty ones, newline and all


def _developer_to_system(conversation: list[Message]) -> list[Message]:
    """Make developer messages system messages, and one of all if there are several or a late one.

    A template without the role often allows only one system message, and only at the start.
    """
    for message in conversation:
        if message["role"] == "developer":
            message["role"] = "system"
            del message["tools"]
    systems = [message for message in conversation if message["role"] == "system"]
    if len(systems) == 1 and conversation[0] is systems[0]:
        return conversation
    texts = []
    for message in systems:
        content = message["content"]
        if isinstance(content, list):
            content = "\n".join([part["text"] for part in content])
        if content:
            texts.append(content)
    others = [message for message in conversation if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others]


def _continued(chat: Chat, conversation: list[Message], add_generation_prompt: bool) -> str | None:
    """Leave the last message open, by transformers' own code, which searches the rendered text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if add_generation_prompt or not chat.shapes.continued:
        return None
    rendered, _ = render_jinja_template(
        conversations=[conversation],
        chat_template=chat.source,
        continue_final_message=True,
        **chat.variables,
    )
    text: str = rendered[0]
    return text
