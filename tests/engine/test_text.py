"""From content to tokens: a context that grows turn by turn has the tokens of one rendered at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tests.engine.templates import STYLES, Style
from tests.engine.tokenizers import built_in, ids, variant
from warmkv_server.agents.context import ending_after
from warmkv_server.contract.content import Chat, ChatMessage, Content, RawText, TokenContent
from warmkv_server.contract.conversation import Ending, held_back
from warmkv_server.engine.model import tokenizer as tokenizers
from warmkv_server.errors import InvalidField
from warmkv_server.text.task import TAIL
from warmkv_server.text.text import Text

BOS, END = 0, 1
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"

anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<|[>"), max_size=30)
answers = st.from_regex(r"[A-Za-z][A-Za-z ,.\n]{0,20}[a-z]", fullmatch=True)


def encoded(
    text: Text, content: Content, *, held: Sequence[int] = (), ending: str = "", answer: bool = True
) -> list[int]:
    """The new tokens alone."""
    new = text.encode(content, starts=not held, ending=ending, held=len(held), tail=tuple(held[-TAIL:]), answer=answer)
    ids_: list[int] = new.tokens.tolist()
    return ids_


def behind(text: Text, held: Sequence[int], content: Content, ending: str, answer: bool) -> list[int]:
    """The whole context with content behind it."""
    new = text.encode(content, starts=not held, ending=ending, held=len(held), tail=tuple(held[-TAIL:]), answer=answer)
    return [*held[: len(held) - new.replaced], *new.tokens.tolist()]


@dataclass
class Talk:
    """A conversation in one style, and what a model with that template would have seen of it."""

    style: Style
    tokenizer: TokenizerWrapper

    @cached_property
    def text(self) -> Text:
        return Text(self.tokenizer, len(self.tokenizer))

    def render(self, messages: Sequence[ChatMessage], answer: bool) -> str:
        listed = [{"role": m.role, "content": self._content(m)} for m in messages]
        return str(self.tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=answer))

    def _content(self, message: ChatMessage) -> object:
        if self.style is STYLES["parts"] and message.role != "assistant":
            return [{"type": "text", "text": message.content}]
        return message.content

    def at_once(self, messages: Sequence[ChatMessage], answer: bool) -> list[int]:
        return ids(self.tokenizer, self.render(messages, answer))

    def start(self, *messages: ChatMessage, answer: bool) -> list[int]:
        return encoded(self.text, Chat(messages), answer=answer)

    def go_on(self, held: list[int], *messages: ChatMessage, ending: str, answer: bool) -> list[int]:
        return behind(self.text, held, Chat(messages), ending, answer)

    def answered(self, messages: Sequence[ChatMessage], reply: str, *, finished: bool = True) -> list[int]:
        """What the model writes behind these messages when this is its reply.

        Args:
            finished: whether the end of sequence is behind it, which in some templates ends no answer of earlier turns.
        """
        prompt = self.render(messages, answer=True)
        whole = self.render([*messages, ChatMessage("assistant", reply)], answer=False)
        assert whole.startswith(prompt)
        written = whole.removeprefix(prompt)
        written = written[: written.index(reply) + len(reply) + (finished and self.style is STYLES["llama 2"])]
        return [*ids(self.tokenizer, written), *([self.tokenizer.eos_token_id] if finished else [])]


@pytest.fixture(scope="module", params=STYLES)
def talk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Talk:
    style = STYLES[request.param]
    return Talk(style, style.tokenizer(tmp_path_factory.mktemp("tokenizer")))


def user(content: str) -> ChatMessage:
    return ChatMessage("user", content)


def assistant(content: str) -> ChatMessage:
    return ChatMessage("assistant", content)


@settings(deadline=None, max_examples=15)
@given(
    system=st.none() | anything,
    turns=st.lists(st.tuples(anything, answers), min_size=1, max_size=3),
    last=anything,
    finished=st.booleans(),
)
@example(system=None, turns=[("Hi", "the earlier answer")], last="the earlier answer", finished=True)
@example(system="Be brief.", turns=[("-", "-a")], last="-", finished=False)
@example(system=None, turns=[("", "Aa")], last="\r", finished=True)
def test_follow_ups_have_the_tokens_of_the_whole_conversation(
    talk: Talk, system: str | None, turns: list[tuple[str, str]], last: str, finished: bool
) -> None:
    """Whether the answers before were finished by the model or cut off, by length or by a stop string."""
    messages = [ChatMessage("system", system)] if system is not None and talk.style.takes_system else []
    held: list[int] = []
    for question, reply in [*turns, (last, "")]:
        messages.append(user(question))
        if held:
            held = talk.go_on(held, messages[-1], ending=Ending.ANSWER, answer=True)
        else:
            held = talk.start(*messages, answer=True)
        assert held == talk.at_once(messages, answer=True)
        held = held + (talk.answered(messages, reply, finished=finished) if reply else [])
        messages.append(assistant(reply))


def test_messages_behind_a_closed_turn(talk: Talk) -> None:
    held = talk.start(user("One?"), assistant("Two."), answer=False)
    assert held == talk.at_once([user("One?"), assistant("Two.")], answer=False)
    held = talk.go_on(held, user("Three?"), assistant("Four."), user("Five?"), ending=Ending.TURN, answer=True)
    messages = [user("One?"), assistant("Two."), user("Three?"), assistant("Four."), user("Five?")]
    assert held == talk.at_once(messages, answer=True)


def test_an_answer_given_by_the_caller_behind_a_question(talk: Talk) -> None:
    held = talk.start(user("One?"), answer=False)
    held = talk.go_on(held, assistant("Two."), user("Three?"), ending=Ending.TURN, answer=True)
    assert held == talk.at_once([user("One?"), assistant("Two."), user("Three?")], answer=True)


def test_a_question_added_behind_an_answer_closes_it_first(talk: Talk) -> None:
    """Extend, then Generate with the next question: the generation prompt comes once."""
    first = talk.start(user("One?"), answer=True)
    held = first + talk.answered([user("One?")], "Two.")
    held = talk.go_on(held, user("Three?"), assistant("Four."), ending=Ending.ANSWER, answer=False)
    held = talk.go_on(held, user("Five?"), ending=Ending.TURN, answer=True)
    messages = [user("One?"), assistant("Two."), user("Three?"), assistant("Four."), user("Five?")]
    assert held == talk.at_once(messages, answer=True)


def test_behind_raw_tokens_messages_get_no_beginning_of_text_and_no_default_system_text(talk: Talk) -> None:
    raw = encoded(talk.text, RawText("Once upon a time"), answer=False)
    added = talk.go_on(raw, user("Hi"), ending=Ending.RAW, answer=True)[len(raw) :]
    assert BOS not in added or talk.style.begins_each_turn
    written = str(talk.tokenizer.decode(added))
    assert "careful assistant" not in written
    assert talk.render([user("Hi")], answer=True).endswith(written.removeprefix("\n"))
    assert "Hi" in written


def test_the_text_begins_once(talk: Talk) -> None:
    held = talk.start(user("One?"), answer=True)
    assert held.count(BOS) == talk.render([user("One?")], answer=True).count("<|bos|>") <= 1
    held += talk.answered([user("One?")], "Two.")
    for turn in range(3):
        held = talk.go_on(held, user(f"{turn}?"), ending=Ending.ANSWER, answer=True)
    assert held.count(BOS) <= 1 or talk.style.begins_each_turn


@pytest.fixture
def thinking(tmp_path: Path) -> Talk:
    return Talk(STYLES["thinking"], STYLES["thinking"].tokenizer(tmp_path))


def test_a_template_that_drops_old_thoughts_keeps_those_of_the_context(thinking: Talk) -> None:
    """What the model thought is in its KV: only what is new is written, as the template writes it."""
    held = thinking.start(user("2+2?"), answer=True)
    held += thinking.answered([user("2+2?")], THOUGHT + "Four.")
    before = len(held)
    held = thinking.go_on(held, user("3+3?"), ending=Ending.ANSWER, answer=True)
    messages = [user("2+2?"), assistant(THOUGHT + "Four."), user("3+3?")]
    at_once = thinking.at_once(messages, answer=True)
    assert "Two and two" not in str(thinking.tokenizer.decode(at_once)), "the template must drop it to show anything"
    assert "Two and two" in str(thinking.tokenizer.decode(held))
    assert at_once[-(len(held) - before) :] == held[before:]


@pytest.mark.parametrize(
    ("content", "answered", "previous", "after"),
    [
        (Chat((user("Hi"),)), True, "", Ending.ANSWER),
        (Chat((user("Hi"),)), False, Ending.RAW, "turn user"),
        (RawText("Hi"), True, Ending.TURN, Ending.RAW),
        (TokenContent((7,)), False, Ending.ANSWER, Ending.RAW),
        (None, True, Ending.ANSWER, Ending.ANSWER),
        (None, True, Ending.TURN, Ending.RAW),
        (None, True, "", Ending.RAW),
        (None, True, "strange [", Ending.RAW),
    ],
)
def test_what_a_context_ends_with(
    content: Chat | RawText | TokenContent | None, answered: bool, previous: str, after: str
) -> None:
    assert ending_after(content, answered=answered, previous=previous) == after


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_raw_text_gets_the_beginning_once_and_only_where_it_starts(raw: str) -> None:
    text = Text(built_in(), 4096)

    def encode(content: str, starts: bool) -> list[int]:
        return encoded(text, RawText(content), held=() if starts else (9,), ending="raw")

    alone = ids(built_in(), raw)
    assert encode(raw, starts=False) == alone
    assert encode(raw, starts=True) == list(built_in().encode(raw)) == [BOS, *alone]
    assert encode("<|bos|>" + raw, starts=True) == [BOS, *alone]


def test_a_tokenizer_without_a_beginning_adds_none(tmp_path: Path) -> None:
    bare = variant(tmp_path, bare=True)
    text = Text(bare, 4096)
    assert encoded(text, RawText("so")) == ids(bare, "so")


def test_token_ids_are_taken_as_they_are() -> None:
    text = Text(built_in(), 4096)
    for starts in (True, False):
        taken = encoded(text, TokenContent((0, 7, 4095)), held=() if starts else (1,), ending="raw")
        assert taken == [0, 7, 4095]


@pytest.mark.parametrize("wrong", [-1, 4096, 2**31 - 1])
def test_a_token_id_outside_the_vocabulary_is_named(wrong: int) -> None:
    text = Text(built_in(), 4096)
    with pytest.raises(InvalidField, match=str(wrong)) as caught:
        encoded(text, TokenContent((5, 6, wrong)))
    (violation,) = caught.value.violations
    assert violation.field == "content.token_ids.ids[2]"
    assert "4095" in violation.description


def test_chat_without_a_template_says_what_to_send_instead(tmp_path: Path) -> None:
    text = Text(variant(tmp_path, chat_template=None), 4096)
    with pytest.raises(InvalidField, match=r"no chat template.*content\.text") as caught:
        encoded(text, Chat((user("Hi"),)))
    assert caught.value.violations[0].field == "content.chat"


@pytest.mark.parametrize("starts", [True, False])
def test_messages_that_the_template_refuses_are_the_callers(starts: bool, tmp_path: Path) -> None:
    talk = Talk(STYLES["gemma"], STYLES["gemma"].tokenizer(tmp_path))
    with pytest.raises(InvalidField, match="must alternate") as caught:
        encoded(talk.text, Chat((user("One?"), user("Two?"))), held=() if starts else (END,), ending=Ending.ANSWER)
    assert caught.value.violations[0].field == "content.chat.messages[1]"


def test_threads_may_share_it() -> None:
    text = Text(built_in(), 4096)
    contents = [Chat((user(f"What is {n}?"),)) if n % 2 else RawText("word " * n) for n in range(40)]

    def encode(content: Chat | RawText) -> list[int]:
        return encoded(text, content)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(encode, contents * 5)) == [encode(content) for content in contents] * 5


@pytest.fixture
def styled(tmp_path: Path, request: pytest.FixtureRequest) -> Talk:
    style = STYLES[request.param]
    return Talk(style, style.tokenizer(tmp_path))


@pytest.mark.parametrize("styled", ["llama 2"], indirect=True)
def test_a_space_that_the_model_did_not_write_before_its_end_brings_no_second_end(styled: Talk) -> None:
    held = styled.start(user("One?"), answer=True) + ids(styled.tokenizer, " Two.</s>")
    held = styled.go_on(held, user("Three?"), ending=Ending.ANSWER, answer=True)
    assert styled.tokenizer.decode(held) == "<|bos|>[INST] One? [/INST] Two.</s><|bos|>[INST] Three? [/INST]"


@pytest.mark.parametrize("styled", ["another mark between"], indirect=True)
def test_a_turn_that_the_template_closed_as_the_last_is_closed_as_one_between(styled: Talk) -> None:
    messages = [user("One?"), assistant("Two."), user("Three?")]
    held = styled.start(*messages[:2], answer=False)
    assert styled.tokenizer.decode(held[-1:]) == "<|return|>"
    assert styled.go_on(held, messages[2], ending=Ending.TURN, answer=True) == styled.at_once(messages, answer=True)


@pytest.mark.parametrize("styled", ["llama 2", "gemma"], indirect=True)
def test_a_system_message_waits_for_the_user_whose_turn_it_is_written_in(styled: Talk) -> None:
    system, question = ChatMessage("system", "You are a pirate."), user("Who are you?")
    new = styled.text.encode(Chat((system,)), starts=True, ending="", held=0, tail=(), answer=False)
    assert new.holds_back
    held = new.tokens.tolist()
    assert held, "an agent has tokens"
    ending = ending_after(Chat((system,)), answered=False, previous="", holds_back=True)
    whole = styled.at_once([system, question], answer=True)
    assert whole[: len(held)] == held
    assert styled.go_on(held, question, ending=ending, answer=True) == whole
    with pytest.raises(InvalidField, match=r"together with the user's message") as caught:
        encoded(styled.text, Chat((system,)))
    assert caught.value.violations[0].field == "content.chat.messages[0]"


def test_every_message_is_in_the_tokens_or_refused_by_name(talk: Talk) -> None:
    """At the start and behind an answer, alone and with others, whatever the roles."""
    roles = ("system", "user", "assistant", "tool", "developer")
    plans: list[tuple[str, ...]] = [(role,) for role in roles] + [(role, "user") for role in roles]
    plans += [("system", "system", "user"), ("system", "user", "assistant", "system", "user"), ("user", "system")]
    first = talk.start(user("One?"), answer=True)
    asked = [*first, *talk.answered([user("One?")], "Two.")]
    for plan in plans:
        messages = [ChatMessage(role, f"Words of number {n}.") for n, role in enumerate(plan)]
        for held, ending in (([], ""), (asked, Ending.ANSWER)):
            try:
                whole = behind(talk.text, held, Chat(tuple(messages)), ending, True)
            except InvalidField as refusal:
                (violation,) = refusal.violations
                index = int(violation.field.removeprefix("content.chat.messages[").removesuffix("]"))
                assert index < len(messages)
                assert "; " in violation.description, "what to do instead"
                continue
            written = talk.tokenizer.decode(whole[len(held) - 1 :] if held else whole)
            assert all(message.content in written for message in messages), plan
            assert "'type'" not in written


@pytest.mark.parametrize("styled", ["front"], indirect=True)
@pytest.mark.parametrize(("roles", "lost"), [(("system", "system", "user"), 0), (("user", "tool"), 1)])
def test_the_message_that_a_template_leaves_out_is_named(styled: Talk, roles: tuple[str, ...], lost: int) -> None:
    messages = tuple(ChatMessage(role, f"Number {n}.") for n, role in enumerate(roles))
    with pytest.raises(InvalidField, match="writes nothing") as caught:
        encoded(styled.text, Chat(messages))
    assert caught.value.violations[0].field == f"content.chat.messages[{lost}]"
    with pytest.raises(InvalidField) as caught:
        encoded(styled.text, Chat((ChatMessage("system", "Be brief."), user("So?"))), held=[7], ending=Ending.ANSWER)
    assert caught.value.violations[0].field == "content.chat.messages[0]"


@pytest.mark.parametrize("starts", [True, False])
def test_a_message_that_a_template_leaves_out_for_what_it_says_is_named(starts: bool, tmp_path: Path) -> None:
    template = """\
{%- for m in messages -%}
{%- if m.content.startswith('note:') -%}
{%- elif m.content != 'secret' -%}{{- '<|' + m.role + '|>' + (m.content | tojson) + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}"""
    text = Text(variant(tmp_path, chat_template=template), 4096)

    def said(content: str) -> list[int]:
        messages = Chat((user("Hi"), user(content)))
        return encoded(text, messages, held=() if starts else (END,), ending="" if starts else Ending.ANSWER)

    assert 'a "quoted" word' not in built_in().decode(said('a "quoted" word'))
    for content in ("secret", "note: more of it"):
        with pytest.raises(InvalidField, match="says this") as caught:
            said(content)
        assert caught.value.violations[0].field == "content.chat.messages[1]"


def test_rendering_is_transformers_own(tmp_path: Path) -> None:
    """mlx-lm's wrapper would set `enable_thinking`, which templates tell from one that isn't set."""
    template = (
        "{{ 'set' if enable_thinking is defined else 'plain' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    text = Text(variant(tmp_path, chat_template=template), 4096)
    assert text.tokenizer.decode(encoded(text, Chat((user("Hi"),)))) == "plainHi"


@pytest.mark.parametrize("ending", ["held", "held [", "held [1]", 'held {"a": 1}', "strange", ""])
def test_what_an_archive_from_elsewhere_says_of_its_ending_breaks_nothing(ending: str) -> None:
    text = Text(built_in(), 4096)
    assert held_back(ending) == ()
    assert encoded(text, Chat((user("Hi"),)), held=[7], ending=ending)


def test_a_tokenizer_whose_class_nobody_has_is_what_its_file_says(tmp_path: Path) -> None:
    plain = variant(tmp_path, special=["<|more|>"])
    path = tmp_path / "tokenizer_config.json"
    strange = {"tokenizer_class": "StrangeTokenizer", "auto_map": {"AutoTokenizer": ["strange.StrangeTokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | strange))
    loaded = tokenizers.load(tmp_path)
    for content in ("Hello, world!", "<|more|>", "Über 日本"):
        assert ids(loaded, content) == ids(plain, content)
    assert (loaded.eos_token_id, loaded.chat_template) == (plain.eos_token_id, plain.chat_template)
