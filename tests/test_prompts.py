"""Chats and completions get the text and the ids that vLLM's own renderer gives them."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")
tokenizers = pytest.importorskip("tokenizers")

from vllm.engine.arg_utils import EngineArgs  # noqa: E402  # after importorskip
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest  # noqa: E402
from vllm.entrypoints.openai.completion.protocol import CompletionRequest  # noqa: E402
from vllm.renderers.online_renderer import OnlineRenderer  # noqa: E402
from vllm.renderers.registry import renderer_from_config  # noqa: E402

from scalellm_plugins.frontends import chat_probes, prompts  # noqa: E402
from scalellm_plugins.frontends.prompts import ChatPrompts  # noqa: E402

pytestmark = pytest.mark.vllm

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
CHATML = (
    "{%- for m in messages %}{{ '<|im|>' + m.role + ('=' + m.name if m.name is defined else '') }}"
    "{{- '\n' + m.content + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im|>assistant\n' }}{%- endif %}"
    "{%- if thinking is defined %}{{ '<think>' ~ thinking }}{%- endif %}"
)
DEVELOPER = CHATML + "{# knows 'developer' #}{% if tools %}tools{% endif %}{{ documents }}"
PARTS = (
    "{{ bos_token }}{%- for m in messages %}{{ '[' + m['role'] + ']' }}"
    "{%- for part in m['content'] %}{{ part['text'] | trim }};{%- endfor %}{{ '</s>' }}"
    "{%- endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRICT = (
    "{%- for m in messages %}{%- if m.role == 'system' and not loop.first %}"
    "{{- raise_exception('system first') }}{%- endif %}{{ '[INST]' + m.role + m.content }}"
    "{{- '</s>' + strftime_now('%Y') }}{%- endfor %}"
)


def metaspace_first() -> Any:
    """Like Llama 2 and Mistral: only the very first piece gets the prefix; BOS is added."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["Hello world user assistant system 2026 é 🙂"] * 3, trainer)
    return surrounded(tokenizer, "<s>")


def byte_level() -> Any:
    """Like Llama 3, Qwen and GPT-2, with a token that takes the whitespace on its right."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Hello world user assistant system"] * 3, trainer)
    return surrounded(tokenizer, "<s>", "</s>")


def surrounded(tokenizer: Any, *around: str) -> Any:
    plain = ["<s>", "</s>", "<|im|>", "[INST]", "[user]", "[assistant]", "<think>"]
    tokenizer.add_special_tokens(plain)
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True, normalized=False)])
    tokenizer.add_tokens([tokenizers.AddedToken("word", single_word=True)])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=[around[0], "$A", *around[1:]],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
    )
    return tokenizer


class Case:
    """One model served by vLLM's renderer and by ours."""

    def __init__(self, prompts: ChatPrompts | str, upstream: OnlineRenderer, config: Any) -> None:
        self.prompts, self.upstream, self.config = prompts, upstream, config

    def chat(self, messages: list[Any], **options: bool) -> tuple[str, list[int]] | None:
        """vLLM's text and ids; None if it refuses."""
        try:
            # As after decoding a body of their own: vLLM changes what it validates.
            request = ChatCompletionRequest(model="m", messages=copy.deepcopy(messages), **options)
            rendered = asyncio.run(self.upstream.render_chat(request))
            (prompt,) = rendered[1]
        except Exception:
            return None
        return prompt["prompt"], prompt["prompt_token_ids"]

    def completion(self, text: str) -> list[int]:
        request = CompletionRequest(model="m", prompt=text)
        (prompt,) = asyncio.run(self.upstream.render_completion(request))
        return prompt["prompt_token_ids"]

    def ours(self, messages: list[Any], **options: bool) -> tuple[str, list[int]] | None:
        text = self.prompts.render(messages, **options)
        if text is None:
            return None
        plan = self.prompts.plan_chat(text)
        ids = plan.encode()
        plan.commit()
        return text, ids


def make_case(
    folder: Path | None = None,
    template: str | None = None,
    content_format: str = "auto",
    defaults: dict[str, Any] | None = None,
    **engine: Any,
) -> Case:
    args = EngineArgs(str(DEMO), tokenizer=str(folder or DEMO), enforce_eager=True, **engine)
    config = args.create_engine_config()
    renderer = renderer_from_config(config)
    built = ChatPrompts.build(
        tokenizer=renderer.tokenizer,
        model_config=config.model_config,
        chat_template=template,
        content_format=content_format,
        default_template_kwargs=defaults,
        cache_bytes=1 << 20,
    )
    upstream = OnlineRenderer(
        config.model_config,
        renderer,
        request_logger=None,
        chat_template=template,
        chat_template_content_format=content_format,
        default_chat_template_kwargs=defaults,
    )
    return Case(built, upstream, config)


def saved(tokenizer: Any, folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        **options,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    shutil.copy(DEMO / "config.json", folder)
    return folder


CASES: dict[str, Callable[[Path], Case]] = {
    "demo": lambda folder: make_case(),
    "demo-openai-format": lambda folder: make_case(content_format="openai"),
    "chatml-metaspace-first": lambda folder: make_case(
        saved(metaspace_first(), folder, chat_template=CHATML), defaults={"thinking": 3, "no": 1}
    ),
    "developer-byte-level": lambda folder: make_case(
        saved(byte_level(), folder), template=DEVELOPER
    ),
    "parts-byte-level": lambda folder: make_case(
        saved(byte_level(), folder, chat_template=PARTS),
        defaults={"thinking": None, "add_generation_prompt": False},
    ),
    "parts-as-strings": lambda folder: make_case(
        saved(byte_level(), folder), template=CHATML, content_format="string"
    ),
    "strict": lambda folder: make_case(saved(metaspace_first(), folder, chat_template=STRICT)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = CASES[request.param](tmp_path_factory.mktemp("tokenizer"))
    assert isinstance(case.prompts, ChatPrompts)
    return case


TOKENS = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|im|>", "<s>", "</s>", "[INST]"]
PIECES = [
    *TOKENS,
    "<|en",
    "d|>",
    "word",
    " word ",
    " ",
    "\n",
    "\n\n",
    "\t",
    "2 + 3",
    "\x00",
    "\x85",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=8).map("".join)
PART_LISTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), max_size=3)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "developer"]),
            "content": TEXTS | PART_LISTS,
        },
        optional={"name": TEXTS},
    ),
    min_size=1,
    max_size=5,
)


@given(MESSAGES, st.booleans(), st.booleans())
@settings(max_examples=150)
def test_chat_is_vllms_token_for_token(
    case: Case, messages: list[Any], generate: bool, continued: bool
) -> None:
    options = {"add_generation_prompt": generate, "continue_final_message": continued}
    before = copy.deepcopy(messages)
    expected = case.chat(messages, **options)
    assert case.ours(messages, **options) == expected
    assert case.ours(messages, **options) == expected  # from the cache
    assert messages == before


@given(TEXTS.filter(bool))  # vLLM refuses an empty prompt
@settings(max_examples=100)
def test_completion_is_vllms_token_for_token(case: Case, text: str) -> None:
    expected = case.completion(text)
    for _ in range(2):
        plan = case.prompts.plan_completion(text)
        assert plan.encode() == expected
        plan.commit()


def test_everything_was_rendered_here(case: Case) -> None:
    """Or the comparison above would compare nothing: `None` stands for vLLM's own code."""
    assert case.prompts.chat_off is None
    assert case.prompts.cache.off is None
    shapes = case.prompts._chat.shapes
    assert (shapes.names, shapes.parts, shapes.developer, shapes.continued) == (True,) * 4


@pytest.fixture(scope="module")
def demo() -> Case:
    return make_case()


USER = {"role": "user", "content": "Hi"}
TEXT_PART = {"type": "text", "text": "Hi"}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [None],
        ["user"],
        [{}],
        [{"role": "user"}],
        [{"content": "Hi"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": ["Hi"]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{**TEXT_PART, "cache_control": {}}]}],
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
        [{"role": "user", "content": [{"type": "refusal", "text": "x"}]}],
        [{"role": ["user"], "content": "Hi"}],
        [{"role": "tool", "content": "Hi"}],
        [{"role": "assistant", "content": "Hi", "tool_calls": []}],
        [{"role": "assistant", "content": "Hi", "reasoning": "Hm"}],
        [{**USER, "name": None}],
        [{**USER, "name": "x", "task": "y"}],
        [USER, {"role": "robot", "content": "Hi"}],
        [{"role": "system", "content": "x-anthropic-billing-header: 1\nHi"}],
        [{"role": "system", "content": [{"type": "text", "text": "x-anthropic-billing-header"}]}],
    ],
    ids=str,
)
def test_other_shapes_are_left_to_vllm(demo: Case, messages: Any) -> None:
    assert demo.prompts.render(messages) is None


def test_contradicting_options_are_left_to_vllm(demo: Case) -> None:
    assert demo.prompts.render([USER], continue_final_message=True) is None
    assert demo.prompts.render([USER], continue_final_message=True, add_generation_prompt=False)


def test_second_turn_of_a_long_conversation_tokenizes_the_new_messages(demo: Case) -> None:
    rng = random.Random(2)
    words = ["lamp", "Fluss", "12", "été", "if x:", "\n"]
    messages = [
        {"role": role, "content": " ".join(rng.choices(words, k=900))}
        for _ in range(20)
        for role in ("user", "assistant")
    ]
    wrapper = demo.upstream.renderer.tokenizer
    built = rebuilt(demo, cache_bytes=8 << 20)
    for count in (39, 40):
        text = built.render(messages[:count])
        plan = built.plan_chat(text)
        assert plan.encode() == wrapper(text, add_special_tokens=False)["input_ids"]
        plan.commit()
    assert plan.missing_chars == len(messages[39]["content"].strip())


def test_truncation_of_the_shared_tokenizer_does_not_reach_ours(demo: Case) -> None:
    shared = demo.upstream.renderer.tokenizer.backend_tokenizer
    shared.enable_truncation(2)
    shared.enable_padding(length=99)
    text = "one two three four"
    expected = demo.prompts.plan_completion(text).encode()
    assert rebuilt(demo).plan_completion(text).encode() == expected


def rebuilt(case: Case, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "tokenizer": case.upstream.renderer.tokenizer,
        "model_config": case.config.model_config,
        "chat_template": None,
        "content_format": "auto",
        "default_template_kwargs": None,
        "cache_bytes": 1 << 20,
    }
    return ChatPrompts.build(**{**given, **changes})


def test_what_cannot_be_done_is_said(demo: Case) -> None:
    assert "--skip-tokenizer-init" in rebuilt(demo, tokenizer=None)
    taken = rebuilt(demo, default_template_kwargs={"documents": []})
    assert "documents" in taken.chat_off
    assert taken.render([USER]) is None
    assert taken.plan_completion("Hi").encode() == demo.completion("Hi")
    broken = rebuilt(demo, chat_template="{% for %}")
    assert "failed" in broken.chat_off

    class Own(type(demo.upstream.renderer.tokenizer)):
        """A tokenizer of a model's own code."""

    own = copy.copy(demo.upstream.renderer.tokenizer)
    own.__class__ = Own
    Own.apply_chat_template = lambda *_, **__: ""
    assert "apply_chat_template" in rebuilt(demo, tokenizer=own).chat_off
    Own._encode_plus = lambda *_, **__: {}
    assert "_encode_plus" in rebuilt(demo, tokenizer=own)


def test_a_shape_that_vllm_renders_differently_is_left_to_it(
    demo: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A vLLM that puts another separator between parts.
    original = chat_probes.render

    def differs(chat: Any, messages: Any, *options: bool) -> Any:
        text = original(chat, messages, *options)
        return text + " " if isinstance(messages[0]["content"], list) else text

    monkeypatch.setattr(chat_probes, "render", differs)
    built = rebuilt(demo)
    assert built.render([USER]) is not None
    assert built.render([{"role": "user", "content": [TEXT_PART]}]) is None
    monkeypatch.setattr(chat_probes, "render", lambda *_: "something else")
    assert rebuilt(demo).chat_off


def test_a_tokenizer_that_cannot_be_split_is_used_whole(
    demo: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = prompts.choose_cuts
    # Splitting inside of a word changes its tokens.
    monkeypatch.setattr(
        prompts,
        "choose_cuts",
        lambda added, wanted: choose([prompts.AddedToken("l", 9), *added], lambda _: True),
    )
    built = rebuilt(demo)
    assert "splitting" in built.cache.off
    text = built.render([USER])
    assert built.plan_chat(text).encode() == demo.ours([USER])[1]


def test_bpe_dropout_and_split_special_tokens_turn_the_cache_off(
    demo: Case, tmp_path: Path
) -> None:
    split = make_case(saved(byte_level(), tmp_path / "split", split_special_tokens=True))
    assert "ordinary text" in split.prompts.cache.off
    text = "<s>Hello</s>"
    assert split.prompts.plan_completion(text).encode() == split.completion(text)
    random_merges = byte_level()
    random_merges.model.dropout = 0.5
    dropout = make_case(saved(random_merges, tmp_path / "dropout"))
    assert isinstance(dropout.prompts, str) or "random" in dropout.prompts.cache.off
