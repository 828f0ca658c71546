"""Messages to a prompt, through the chat template of the tokenizer or of --chat-template."""

import inspect
import re
from pathlib import Path
from typing import Any

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.server.openai_protocol import ChatRequest


def read_template(path: str | None) -> str | None:
    """The text of the file that --chat-template names; ValueError names the flag."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template: {path!r} cannot be read: {error}") from error


class ChatRenderer:
    """Templates write the special tokens themselves."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = template if template is not None else getattr(tokenizer, "chat_template", None)
        self._taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} if tokenizer is not None else set()

    def render(self, request: ChatRequest) -> str:
        """The text of the conversation, ready for the answer; RequestError 400 if the template cannot."""
        if self._tokenizer is None:
            raise RequestError("messages: this model has no tokenizer; send token ids to /v1/completions or /generate", param="messages", code="no_tokenizer")
        if self._template is None:
            way_out = "use /v1/completions, or start the server with --chat-template FILE"
            raise RequestError(f"messages: the tokenizer of this model has no chat template; {way_out}", param="messages", code="no_chat_template")
        messages = [message.plain(f"messages.{i}") for i, message in enumerate(request.messages)]
        continues, variables = request.continue_final_message, self._variables(request)
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self._template if isinstance(self._template, str) else None,
                add_generation_prompt=request.add_generation_prompt and not continues, continue_final_message=continues, tokenize=False, **variables,
            )  # fmt: skip
        except Exception as error:  # whatever a template does with what was sent
            raise RequestError(f"messages: the chat template refuses them: {error}", param="messages", code="invalid_value") from error

    def _variables(self, request: ChatRequest) -> dict[str, Any]:
        """The template's own variables; one that the template does not read is refused."""
        variables = dict(request.chat_template_kwargs)
        if request.reasoning_effort is not None:
            variables["reasoning_effort"] = request.reasoning_effort
        text = self._template if isinstance(self._template, str) else "".join((self._template or {}).values())
        for name in variables:
            if name in self._taken or not re.search(rf"\b{re.escape(name)}\b", text):
                param = "reasoning_effort" if name == "reasoning_effort" else f"chat_template_kwargs.{name}"
                raise RequestError(f"{param}: the chat template of this model does not read it, or not from here", param=param, code="unsupported_parameter")
        return variables
