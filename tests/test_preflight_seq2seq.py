"""What an encoder–decoder actor cannot do is refused by its key, or by the row."""

import pytest
from tiny import bart, t5
from transformers import BertConfig, EncoderDecoderConfig

from chatrlhf.config.schema import Config
from chatrlhf.conversation import Prompt
from chatrlhf.data.epochs import Epochs
from chatrlhf.data.inputs import Rows
from chatrlhf.data.stage_rows import Demonstration, PlainText
from chatrlhf.errors import UserError
from chatrlhf.preflight import check_keys_of_pairs, check_rows_of_pairs

T5 = t5().config
BERTS = EncoderDecoderConfig(encoder=BertConfig().to_dict(), decoder=BertConfig().to_dict(), decoder_start_token_id=1)
PAIR = Demonstration(Prompt.of("a"), "b")


def check(settings=T5, actor=(), trainer=(), rows=(PAIR,), stages=("ACTOR", "RL")) -> None:
    config = Config(actor_config=dict(actor), trainer_config=dict(trainer))
    check_keys_of_pairs(config, list(stages), settings)
    check_rows_of_pairs(Rows(list(rows), [PAIR], {}, Epochs.of_all(len(rows))))


@pytest.mark.parametrize("settings", [T5, bart().config])
def test_what_it_can_do_passes(settings):
    check(settings, {"peft_enable": True}, {"algorithm": "grpo"}, [PAIR, Demonstration(PAIR.prompt, "c", "completion")])


@pytest.mark.parametrize(
    "given, said",
    [
        ({"settings": t5(decoder_start_token_id=None).config}, "names no decoder_start_token_id"),
        ({"settings": BERTS}, "AutoModel knows no encoder-decoder"),
        ({"actor": {"loss_on": "all_turns"}}, "actor_config.loss_on: 'all_turns' asks for a loss on prompts"),
        ({"trainer": {"num_layers_unfrozen": 2}}, "num_layers_unfrozen: 2 parts the one stack"),
        ({"trainer": {"rollout_backend": "vllm"}}, "trainer_config.rollout_backend: vLLM samples from causal models"),
        ({"rows": [PAIR, PlainText("long ago")]}, "is plain text .'long ago'."),
        ({"rows": [Demonstration(PAIR.prompt, "b", "all")]}, "a loss on 'all'"),
        ({"stages": ["PRETRAIN"]}, "pretrain_config: a t5 predicts replies"),
    ],
)
def test_what_it_cannot_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        check(**given)


@pytest.mark.parametrize(
    "given, stages",
    [
        ({"actor": {"loss_on": "all"}}, ["RL"]),
        ({"trainer": {"num_layers_unfrozen": 2, "rollout_backend": "vllm"}}, ["ACTOR"]),
    ],
)
def test_keys_of_a_stage_that_does_not_run_are_let_be(given, stages):
    check(**given, stages=stages)
