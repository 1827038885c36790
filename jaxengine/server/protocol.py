"""Bodies of requests, as OpenAI has them, with vLLM's additions; everything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, override

from pydantic import BeforeValidator, Field, model_validator

from jaxengine.engine.inputs import Prompt
from jaxengine.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from jaxengine.server import bounds
from jaxengine.server.bounds import Strict, at_most, first_wrong
from jaxengine.server.errors import APIError
from jaxengine.server.structured import ResponseFormat, StructuredOutputs, structured_outputs
from jaxengine.server.tools import Tool, ToolChoice

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Texts = Annotated[list[str], at_most(bounds.MAX_WORDS)]
StopTokenIds = Annotated[list[Int32], at_most(bounds.MAX_STOP_TOKENS)]
TokenIds = Annotated[list[Int32], at_most(bounds.MAX_TOKENS)]
Biases = Annotated[dict[str, float], Field(max_length=bounds.MAX_BIASES), BeforeValidator(first_wrong((int, float)))]
Messages = Annotated[list[dict[str, Any]], at_most(bounds.MAX_ITEMS)]

IGNORED = {
    *("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata", "store", "service_tier"),
    "parallel_tool_calls",
}
"""Fields that say nothing about what is generated."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "reasoning_effort": (),
    "documents": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "reasoning": ({},),
    "include": ([],),
    "background": (False,),
    "conversation": (),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "top_logprobs": (0,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "prompt": (),
}
"""Fields that are known and not supported, and their values that ask for nothing."""
_OF_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Body(Strict):
    """What all bodies share: null is the same as nothing."""

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        """Drops what asks for nothing; raises APIError for what is asked in vain."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None:
                continue
            if name in cls.model_fields:
                kept[name] = value
            elif name in UNSUPPORTED:
                if value not in UNSUPPORTED[name]:
                    raise APIError(400, cls._why_not(name), param=name, code="unsupported_field")
            elif name not in IGNORED:
                kept[name] = value
        return kept

    @classmethod
    def _why_not(cls, name: str) -> str:
        if name == "prompt" and "messages" in cls.model_fields:
            return "prompt: this endpoint takes messages; /v1/completions takes a prompt"
        return f"{name} is not supported by this server"


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False


class SamplingBody(Body):
    """What all bodies that ask for generation share. Ranges are checked by `SamplingParams`."""

    stream: bool = False
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], at_most(bounds.MAX_STOPS)] | None = None
    stop_token_ids: StopTokenIds | None = None
    bad_words: Texts | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int32 | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Int32 | None = None
    logit_bias: Biases | None = None
    allowed_token_ids: TokenIds | None = None
    priority: Int32 = 0
    cache_salt: Annotated[str, Field(max_length=bounds.MAX_SALT)] | None = None

    @property
    def form_field(self) -> str:
        """The field that asks for the form of the text."""
        raise NotImplementedError

    def form(self) -> StructuredOutputsParams | None:
        """Returns the form that the text is to have; None for any.

        Raises:
            APIError, ValueError: Fields of it are wrong or do not fit together.
        """
        raise NotImplementedError

    def make_params(self, default: SamplingParams, **decided: Any) -> SamplingParams:
        """Makes parameters: `decided`, then what the body gives, then the model's recommendations.

        Raises:
            APIError: A forced call and another form are both asked for, or stop strings are too long.
            ValueError: A value is out of range.
        """
        num_characters = len(self.stop) if isinstance(self.stop, str) else sum(map(len, self.stop or ()))
        if num_characters > bounds.MAX_STOP_CHARACTERS:
            accepted = f"at most {bounds.MAX_STOP_CHARACTERS} characters together"
            raise APIError(400, f"stop: strings of {accepted} are accepted, got {num_characters}", param="stop")
        form = self.form()
        if form is not None and "structured_outputs" in decided:
            raise APIError(400, "tool_choice: a forced call has a form of its own", param="tool_choice")
        names = {name for name in SamplingParams.__dataclass_fields__ if name in type(self).model_fields}
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        recommended = {name: getattr(default, name) for name in _OF_MODEL}
        fields: dict[str, Any] = recommended | given | {"output_kind": kind, "structured_outputs": form} | decided
        return SamplingParams(**fields)


class GenerationBody(SamplingBody):
    """What completions and chat completions share."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream_options: StreamOptions | None = None
    n: Int32 = 1
    max_tokens: Int32 | None = None
    prompt_logprobs: Int32 | None = None
    return_token_ids: bool = False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Checks what fields say together.

        Raises:
            APIError: They do not fit.
        """
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options: only with stream=true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise APIError(400, "prompt_logprobs: only with stream=false", param="prompt_logprobs")

    @property
    def form_field(self) -> str:
        """The field that asks for a form of the text, for messages."""
        return "structured_outputs" if self.structured_outputs is not None else "response_format"

    def form(self) -> StructuredOutputsParams | None:
        """Returns the form that the text must have; None for any."""
        return structured_outputs(self.response_format, self.structured_outputs)


class CompletionBody(GenerationBody):
    """Body of /v1/completions."""

    prompt: Any
    echo: bool = False
    logprobs: Int32 | None = None
    add_special_tokens: bool = True

    @property
    def prompt_only(self) -> bool:
        """Whether only the prompt, with its log probabilities, is asked for."""
        return self.echo and self.max_tokens == 0

    def prompts(self, cache_salt: str | None) -> list[Prompt]:
        """Returns the prompts: text or token ids, one or several.

        Args:
            cache_salt: Of each.

        Raises:
            APIError: They are of another form, or too many.
        """
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        if several and len(self.prompt) > bounds.MAX_PROMPTS:
            message = (
                f"prompt: at most {bounds.MAX_PROMPTS} prompts are accepted in one request, got {len(self.prompt)}"
            )
            raise APIError(400, message, param="prompt")
        prompts = []
        for value in self.prompt if several else [self.prompt]:
            if isinstance(value, str):
                prompts.append(Prompt(value, None, cache_salt, self.add_special_tokens))
            elif isinstance(value, list) and set(map(type, value)) <= {int}:  # prompts are long
                prompts.append(Prompt(None, value, cache_salt))
            else:
                prompts = []
                break
        if not prompts:
            accepted = "a string, a list of token ids, or a list of such that is not empty"
            raise APIError(400, f"prompt must be {accepted}", param="prompt")
        return prompts

    def sampling_params(self, default: SamplingParams) -> SamplingParams:
        """Returns the parameters of the body, with defaults for what it leaves out."""
        decided: dict[str, Any] = {"logprobs": self.logprobs}
        if self.prompt_only:
            decided["max_tokens"] = 1  # an engine always samples; nobody sees it
        if self.echo and self.logprobs is not None:
            decided["prompt_logprobs"] = self.logprobs
        return self.make_params(default, **decided)


class ConversationBody(Body):
    """What bodies with messages share."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], at_most(bounds.MAX_TOOLS)] = Field(default_factory=list)

    def template_options(self) -> dict[str, Any]:
        """Arguments of `render_chat`: an answer is begun unless told otherwise, or a message is to be continued."""
        add = self.add_generation_prompt
        return {
            "add_generation_prompt": not self.continue_final_message if add is None else add,
            "continue_final_message": self.continue_final_message,
            "chat_template": self.chat_template,
            "chat_template_kwargs": self.chat_template_kwargs,
        }


class ChatBody(GenerationBody, ConversationBody):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Int32 | None = None
    logprobs: bool = False
    top_logprobs: Int32 | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True

    @override
    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs: only with logprobs=true", param="top_logprobs")

    def sampling_params(self, default: SamplingParams, **decided: Any) -> SamplingParams:
        """Returns the parameters of the body, with defaults for what it leaves out."""
        longest = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.make_params(default, max_tokens=longest, logprobs=logprobs, **decided)


class TokenizeBody(ConversationBody):
    """Body of /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Body of /detokenize."""

    tokens: Annotated[list[Int32], at_most(bounds.MAX_TOKENS)]
