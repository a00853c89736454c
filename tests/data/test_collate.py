"""From text to ids: separate segments, one EOS, what is trained, and padding that is never trained."""

import random

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from chatrlhf.conversation import Prompt, Turn
from chatrlhf.data.collate import pad_right, prompt_batch
from chatrlhf.data.encoder import IGNORED, Encoder, fitting, special_tokens
from chatrlhf.data.stage_rows import Demonstration, PlainText
from chatrlhf.data.templates import FORMATS, Template, arguments_of, get_template
from chatrlhf.errors import DataError
from chatrlhf.models.reward_model import RewardScorer

TALK = Prompt(
    (
        Turn("user", "the cat"),
        Turn("assistant", "sat on"),
        Turn("user", "the mat"),
        Turn("assistant", "the hat"),
        Turn("user", "of the cat"),
    ),
    system="on the hat",
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LOSSES = ["completion", "all_turns", "all"]


def encoder(template: str | Template = "hh", bos: bool = False) -> Encoder:
    tokenizer = tiny.tokenizer()
    if bos:
        tokenizer.bos_token = tokenizer.eos_token  # as OPT's and Llama's tokenizers open every text
        opening = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{opening[0]} $A", None, [opening])
    return Encoder(tokenizer, FORMATS.get(template, template), max_length=64)


def ids(made: Encoder, text: str) -> list[int]:
    return made.tokenizer(text, add_special_tokens=False)["input_ids"]


def eos(made: Encoder) -> int:
    return made.tokenizer.eos_token_id


def shown(made: Encoder, prompt: Prompt | str) -> str:
    arguments = arguments_of(Prompt.of(prompt), made.template.takes_narrative)
    return made.template.render(arguments, special_tokens(made.tokenizer), True)


def test_segments_are_tokenised_separately():
    # With nothing between them "th" + "e cat" would merge to "the" if they were tokenized as one text.
    made = encoder("raw")
    assert made.prompt("th") + made.completion("a", "e cat") == [*ids(made, "th"), *ids(made, "e cat"), eos(made)]
    assert made.prompt("th") + made.completion("a", "e cat") != made.completion("a", "the cat")


@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("text", ["the mat", "the mat\n", "", "{user_input} {} }{"])
def test_a_completion_ends_with_exactly_one_eos(template, text):
    made = encoder(template)
    completion = made.completion("a", text)
    assert completion.count(eos(made)) == 1 and completion[-1] == eos(made)
    before = " " if template in ("chatllama", "hh", "stable_vicuna", "airoboros", "shurale") else ""
    assert made.tokenizer.decode(completion[:-1]) == before + text
    assert made.reply(completion) == made.reply(completion[:-1]) == text


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("text", ["the cat", TALK, "{user_input} {0} }{"])
def test_the_ids_of_a_prompt_are_the_same_for_every_use(template, bos, text):
    made = encoder(template, bos)
    prompt, answer = made.prompt(text), made.completion("a", "sat")
    for loss_on in LOSSES:
        trained, labels = made.labelled(text, "sat", loss_on)
        assert trained == prompt + answer
        assert len(labels) == len(trained)
    scorer = RewardScorer(model=None, encoder=Encoder(made.tokenizer, made.template, max_length=1000))
    assert scorer.encode(text, "sat") == prompt + answer
    rollout = prompt_batch([prompt], [text], pad_id=1)
    assert rollout.input_ids[rollout.attention_mask].tolist() == prompt
    start = [eos(made)] if bos else []
    assert prompt[: len(start)] == start
    assert made.tokenizer.decode(prompt[len(start) :]) == shown(made, text)


def trained_text(made: Encoder, text: str, completion: str, loss_on: str) -> list[str]:
    """The stretches of text that have labels."""
    token_ids, labels = made.labelled(text, completion, loss_on)
    assert all(label in (IGNORED, token) for token, label in zip(token_ids, labels, strict=True))
    runs: list[list[int]] = []
    before = IGNORED
    for label in labels:
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [made.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("bos", [False, True])
def test_what_is_trained_in_a_transcript(bos):
    made = encoder("hh", bos)
    end = made.tokenizer.eos_token
    assert trained_text(made, TALK, "is on", "completion") == [f" is on{end}"]
    assert trained_text(made, TALK, "is on", "all_turns") == [f" sat on{end}", f" the hat{end}", f" is on{end}"]
    assert trained_text(made, TALK, "is on", "all") == [shown(made, TALK) + f" is on{end}"]


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat model's special tokens: one that is no EOS, one that is not special."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|prompter|>"]})
    made.add_tokens(["<think>"])
    made.chat_template = CHATML
    return made


LITERALS = ["<|im_end|>", "<|endoftext|>", "<|pad|>", "sat <|im_start|>assistant\n on", "<|prompter|>", " <|im_end|> "]


@pytest.mark.parametrize("template", [*FORMATS, "chat", "Q: {user_input}\nA:"])
@pytest.mark.parametrize("literal", LITERALS)
def test_a_special_token_written_by_a_user_is_text(template, literal):
    tokenizer = words_tokenizer()
    made = Encoder.of(tokenizer, get_template(template, tokenizer=tokenizer), 64)
    special = set(tokenizer.all_special_ids)

    def specials(prompt: Prompt, completion: str) -> list[int]:
        return [id for id in made.labelled(prompt, completion, "all")[0] if id in special]

    def talk(text: str) -> Prompt:
        turns = (Turn("user", text, text), Turn("assistant", text, text), Turn("user", text))
        return Prompt(turns, system=text, narrative=text, reply_name=text)

    assert specials(talk(literal), literal) == specials(talk("the cat"), "sat")
    assert made.reply(made.completion("a", literal)) == literal


@pytest.mark.parametrize("template", [*FORMATS, "chat", "Q: {user_input}\nA:"])
def test_every_token_of_a_reply_is_trained_and_no_other(template):
    """Each reply has a word of its own, found in the labels; no reader of the text takes part."""
    tokenizer = words_tokenizer()
    made = Encoder.of(tokenizer, get_template(template, tokenizer=tokenizer), 1000)
    chance = random.Random(2)
    for _ in range(20):
        turns = []
        for i in range(chance.randrange(1, 4)):
            turns += [
                Turn("user", f"the {i} cat"),
                Turn("assistant", chance.choice(["sat", "on {x}", "mat\n"]) + f" {i}"),
            ]
        prompt = Prompt((*turns, Turn("user", "and?")), system=chance.choice([None, "the hat"]))
        token_ids, labels = made.labelled(prompt, "is on", "all_turns")
        replies = [turn.text for turn in turns if turn.role == "assistant"]
        runs = trained_text(made, prompt, "is on", "all_turns")
        end = "" if template == "shurale" else tokenizer.eos_token
        lead = made.tokenizer.decode(made.completion("a", "is on")[:-1]).removesuffix("is on")
        assert runs == [lead + reply + end for reply in replies] + [f"{lead}is on{tokenizer.eos_token}"]
        final = made.labelled(prompt, "is on", "completion")
        assert final[0] == token_ids and [label for label in final[1] if label != IGNORED] == made.completion(
            "a", "is on"
        )
        assert made.labelled(prompt, "is on", "all")[1] == token_ids


def test_text_around_a_special_token_is_tokenised_as_the_tokenizer_itself_would():
    tokenizer = words_tokenizer()
    made = Encoder.of(tokenizer, get_template("chat", tokenizer=tokenizer), 64)
    messages = [{"role": "system", "content": "on the hat"}, {"role": "user", "content": "the cat"}]
    prompt = Prompt((Turn("user", "the cat"),), system="on the hat")
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert made.prompt(prompt) == theirs


def test_a_token_that_closes_turns_becomes_the_eos():
    tokenizer = words_tokenizer()
    made = Encoder.of(tokenizer, get_template("chat", tokenizer=tokenizer), 64)
    assert tokenizer.eos_token == "<|im_end|>"
    assert made.completion("a", "sat")[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = tiny.tokenizer()
    Encoder.of(plain, FORMATS["orca"], 64)
    assert plain.eos_token == tiny.tokenizer().eos_token


def test_what_a_template_puts_around_a_reply_is_trained_and_not_shown():
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ '<think>\n\n' if m.role == 'assistant' }}"
    source += "{{ m.content + '\n' + eos_token + '\n' }}{% endfor %}"
    source += "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    made = Encoder.of(words_tokenizer(), Template(source), 64)
    assert made.tokenizer.decode(made.completion("a", "sat")) == f"<think>\n\nsat\n{made.tokenizer.eos_token}"
    assert made.reply(made.completion("a", "sat")) == "sat"
    assert made.tokenizer.convert_tokens_to_ids("<think>") in made.completion("a", "sat")


@pytest.mark.parametrize("bos", [False, True])
def test_a_saved_template_gives_transformers_users_the_same_ids(tmp_path, bos):
    made = encoder("hh", bos)
    made.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    theirs = loaded.apply_chat_template([{"role": "user", "content": "the cat"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert theirs == made.prompt("the cat")
    again = Encoder.of(loaded, Template.load(tmp_path), 64)
    assert again.prompt(TALK) == made.prompt(TALK)  # with one BOS
    assert again.chat_template == made.chat_template


def test_plain_text_is_trained_whole():
    made = encoder("hh", bos=True)
    assert made.plain("the cat") == (
        [eos(made), *ids(made, "the cat"), eos(made)],
        [IGNORED, *ids(made, "the cat"), eos(made)],
    )
    assert made.plain("the cat", ends=False)[0] == [eos(made), *ids(made, "the cat")]
    assert made.actor_row(PlainText("the cat"), "completion") == made.plain("the cat")


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_padding_is_in_no_mask_and_no_loss(pad_is_eos):
    tokenizer = tiny.tokenizer(pad_is_eos=pad_is_eos)
    rows = [[5, 6, 7, tokenizer.eos_token_id], [8, tokenizer.eos_token_id]]
    padded, mask = pad_right(rows, tokenizer.pad_token_id)
    assert padded.tolist() == [rows[0], [*rows[1], tokenizer.pad_token_id, tokenizer.pad_token_id]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert padded.dtype == torch.long and mask.dtype == torch.bool


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_sft_collator_keeps_labels_and_ignores_padding(pad_is_eos):
    collators = pytest.importorskip("trl.trainer.sft_trainer", reason="the SFT stage trains with trl")
    tokenizer = tiny.tokenizer(pad_is_eos=pad_is_eos)
    made = Encoder(tokenizer, FORMATS["hh"], max_length=64)
    rows = [made.labelled("the cat", text, "completion") for text in ("sat", "sat on the mat on the mat")]
    examples = [{"input_ids": token_ids, "labels": labels} for token_ids, labels in rows]
    batch = collators.DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(examples)
    for i, (token_ids, labels) in enumerate(rows):
        assert batch["input_ids"][i, : len(token_ids)].tolist() == token_ids
        assert batch["labels"][i, : len(labels)].tolist() == labels  # its own EOS included
        assert set(batch["labels"][i, len(labels) :].tolist()) <= {IGNORED}
    assert batch["labels"].shape[1] > len(rows[0][1])  # so there was padding to look at


def test_prompts_are_padded_on_the_left_and_repeated_side_by_side():
    batch = prompt_batch([[5], [6, 7, 8]], ["a", "b"], pad_id=0, samples_per_prompt=2)
    assert batch.input_ids.tolist() == [[0, 0, 5], [0, 0, 5], [6, 7, 8], [6, 7, 8]]
    assert batch.attention_mask.tolist() == [[False, False, True]] * 2 + [[True] * 3] * 2
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert batch.texts == ["a", "a", "b", "b"]


def test_rows_that_do_not_fit_are_dropped_and_counted():
    assert fitting(["a", "b", "c"], [3, 9, 8], 8, "file") == (["a", "c"], 1)
    with pytest.raises(DataError, match=r"file: all 2 rows .*shortest 8 tokens, limit 4.*max_sequence_length"):
        fitting(["a", "b"], [8, 9], 4, "file")


def test_long_rows_lose_their_oldest_turns_and_then_their_end():
    made = encoder("hh")
    whole = len(made.labelled(TALK, "is on", "completion")[0])
    last = Prompt((TALK.turns[-1],), system=TALK.system)
    shorter = Prompt(TALK.turns[2:], system=TALK.system)
    for room, expected in ((whole, TALK), (whole - 1, shorter), (len(made.prompt(shorter)) + 3, last)):
        cut = Encoder(made.tokenizer, made.template, room)
        ids, labels = cut.cut_actor_row(Demonstration(TALK, "is on"), "completion")
        want = made.labelled(expected, "is on", "completion")
        assert (ids, labels) == (want[0][:room], want[1][:room]) and len(ids) <= room
    tight = Encoder(made.tokenizer, made.template, 5)
    assert tight.cut_actor_row(Demonstration(TALK, "is on"), "all")[0] == made.prompt(last)[:5]
    assert (
        tight.cut_actor_row(PlainText("the cat sat on the mat"), "all")[0]
        == made.plain("the cat sat on the mat")[0][:5]
    )


def test_what_a_row_is_trained_on_may_be_its_own():
    made = encoder("hh")
    row = Demonstration(TALK, "is on", loss_on="all")
    assert made.actor_row(row, "completion") == made.labelled(TALK, "is on", "all")


def sentence_pieces(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers in the manner of SentencePiece, which put a blank before a text: Llama's, old and new."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if kind == "prepended":
        blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(blanks)
        pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(pieces)
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        made.decoder = decoders.Metaspace(prepend_scheme=kind)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = ["the cat sat on the mat", "Human: the hat\n\nAssistant: is on", "< / s > é { x }"] * 20
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("kind", ["prepended", "first", "always"])
def test_replies_come_back_from_a_tokenizer_that_adds_blanks(kind, template):
    made = Encoder(sentence_pieces(kind), FORMATS[template], 64)
    for text in ("sat on", "the </s> mat", "é{x}"):
        ids = made.completion("a", text)
        assert made.reply(ids) == made.reply(ids[:-1]) == text
        assert ids.count(made.tokenizer.eos_token_id) == 1


def one_that_cuts_and_pads() -> PreTrainedTokenizerFast:
    """As some are saved; a call of the tokenizer does neither."""
    made = tiny.tokenizer()
    made.backend_tokenizer.enable_truncation(3)
    made.backend_tokenizer.enable_padding(length=50)
    return made


def one_that_reads_bos_in_a_text() -> PreTrainedTokenizerFast:
    """Of whole words, its BOS among them: a prompt that begins with it has no other put before it."""
    words = {word: id for id, word in enumerate(["<unk>", "<s>", "</s>", "the", "cat", "sat"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {
    "bytes": tiny.tokenizer,
    "with BOS": lambda: encoder(bos=True).tokenizer,
    "chat": words_tokenizer,
    "pieces": lambda: sentence_pieces("first"),
    "pieces with a normalizer": lambda: sentence_pieces("prepended"),
    "cuts and pads": one_that_cuts_and_pads,
    "BOS in a text": one_that_reads_bos_in_a_text,
    "in Python": ByT5Tokenizer,
}
AWKWARD = [
    *("the cat sat", "", " ", "\n\n the mat ", "{user_input} {0} }{ {{ x }} {% if %}", "CHATRLHF000000TEXT"),
    *("<s> the cat", "sat</s>", "é \u00a0日本語 👩\u200d👩\u200d👧 \u2028\x00", "the cat " * 100, *LITERALS),
]


@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_of_many_are_those_of_each(kind, template):
    made = Encoder.of(KINDS[kind](), FORMATS[template], max_length=64)
    talks = [(Turn("user", text, "Ann"), Turn("assistant", text), Turn("user", text)) for text in AWKWARD]
    prompts: list[Prompt | str] = [*AWKWARD, *map(Prompt, talks)]
    prompts += [Prompt(talk, "the hat", text, text) for talk, text in zip(talks, AWKWARD, strict=True)]
    prompts += [
        Prompt((Turn("user", "sat"),), system=""),
        Prompt((*talks[0], Turn("user", "on", "Bo")), reply_name="A"),
    ]
    assert made.prompt_lengths(prompts) == [len(made.prompt(prompt)) for prompt in prompts]
    assert made.completion_lengths([("a", text) for text in AWKWARD]) == [
        len(made.completion("a", text)) for text in AWKWARD
    ]
    assert made.plain_lengths(AWKWARD) == [len(made.plain(text)[0]) for text in AWKWARD]
    assert made.prompt_lengths([]) == made.completion_lengths([]) == made.plain_lengths([]) == []


@pytest.mark.parametrize("bos", [False, True])
def test_lengths_by_the_template_of_a_chat_model(bos):
    tokenizer = words_tokenizer()
    tokenizer.chat_template = ("{{ bos_token }}" if bos else "") + CHATML
    if bos:
        tokenizer.bos_token = "<|prompter|>"
        opening = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{opening[0]} $A", None, [opening])
    made = Encoder.of(tokenizer, get_template("chat", tokenizer=tokenizer), 64)
    prompts = [TALK, *map(Prompt.of, AWKWARD)]
    assert made.prompt_lengths(prompts) == [len(made.prompt(prompt)) for prompt in prompts]
    assert made.completion_lengths([("a", text) for text in AWKWARD]) == [
        len(made.completion("a", text)) for text in AWKWARD
    ]
