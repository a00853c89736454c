"""Models, functions and endpoints as rewards: what each is given and which answers are taken."""

import http.server
import json
import threading

import pytest
import torch
from tiny import llama, said, tokenizer

from chatrlhf.data.encoder import Encoder
from chatrlhf.data.templates import FORMATS
from chatrlhf.errors import ConfigError, RewardError
from chatrlhf.models.reward_model import RewardModel, RewardScorer
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.rl.rewards import FunctionReward, ModelReward, checked_scores, resolve_reward_fn
from chatrlhf.rl.user_functions import load_function

WORDS, OTHER_WORDS = tokenizer(), tokenizer(vocab=262)
USERS = ["the cat", "is the hat on the mat?", "hat"]
REPLIES = ["sat on the mat", "the hat is on the cat", "no"]
POLICY = Encoder(WORDS, FORMATS["chatllama"], 128)


class Recorder(RewardScorer):
    """A reward model that remembers which ids it was given."""

    def score_ids(self, rows, batch_size=64):
        self.rows = [list(row) for row in rows]
        return super().score_ids(rows, batch_size)


def recorder(words=WORDS, template: str = "chatllama", max_length: int = 128) -> Recorder:
    model = RewardModel(llama(vocab=len(words)).base_model, ScalarHead(16), scale=2.0, shift=1.0).eval()
    return Recorder(model, Encoder(words, FORMATS[template], max_length))


# ----- a reward model


@pytest.mark.parametrize(
    "words, template",
    [(WORDS, "chatllama"), (OTHER_WORDS, "chatllama"), (WORDS, "hh")],
    ids=["same ids", "other tokenizer", "other template"],
)
def test_finished_replies_get_the_score_of_their_text(words, template):
    scorer = recorder(words, template)
    scores = ModelReward(scorer, POLICY)(said(POLICY, USERS, REPLIES))
    torch.testing.assert_close(scores, torch.tensor(scorer.score(USERS, REPLIES)), rtol=0, atol=1e-5)
    assert len(set(scores.tolist())) == 3


def test_with_the_same_tokenizer_the_sampled_ids_are_scored():
    # The policy spelled "no" letter by letter; tokenized anew it could come out otherwise.
    rollout = said(POLICY, USERS, REPLIES)
    spelled = [WORDS.convert_tokens_to_ids(letter) for letter in "the"] + [WORDS.eos_token_id]
    assert spelled != POLICY.completion("a", "the")[:-1] + [WORDS.eos_token_id]
    rollout.response_ids[2] = WORDS.pad_token_id
    rollout.response_mask[2] = False
    rollout.response_ids[2, :4], rollout.response_mask[2, :4] = torch.tensor(spelled), True
    scorer = recorder()
    ModelReward(scorer, POLICY)(rollout)
    assert scorer.rows[2] == POLICY.prompt(USERS[2]) + spelled


@pytest.mark.parametrize("words", [WORDS, OTHER_WORDS], ids=["same ids", "other tokenizer"])
def test_a_reply_cut_by_length_has_no_eos(words):
    scorer = recorder(words)
    ModelReward(scorer, POLICY)(said(POLICY, USERS, REPLIES, finished=False))
    assert scorer.rows == [scorer.encode(u, r)[:-1] for u, r in zip(USERS, REPLIES, strict=True)]
    assert all(words.eos_token_id not in row for row in scorer.rows)


def test_a_reply_ended_by_a_stop_string_is_scored_by_its_text():
    # The string's tokens are in the mask, there is no EOS; the text does not hold the string.
    rollout = said(POLICY, USERS, [reply + " STOP" for reply in REPLIES], finished=False)
    rollout.finished[:] = True
    rollout.completions = REPLIES
    scorer = recorder()
    ModelReward(scorer, POLICY)(rollout)
    assert scorer.rows == [scorer.encode(u, r) for u, r in zip(USERS, REPLIES, strict=True)]


def test_a_row_beyond_the_reward_models_context_loses_the_front_of_its_prompt():
    scorer = recorder(max_length=6)
    ModelReward(scorer, POLICY)(said(POLICY, USERS, REPLIES))
    whole = [POLICY.prompt(u) + POLICY.completion("a", r) for u, r in zip(USERS, REPLIES, strict=True)]
    assert scorer.rows == [row[-6:] for row in whole]


# ----- a function


def test_a_function_gets_user_inputs_and_completions_without_template_and_eos():
    seen = []

    def score(prompts, completions):
        seen.append((prompts, completions))
        return [len(completion) for completion in completions]

    scores = FunctionReward(score, "here:score")(said(POLICY, USERS, REPLIES))
    assert seen == [(USERS, REPLIES)]
    assert scores.tolist() == [14.0, 21.0, 2.0] and scores.dtype == torch.float32


def test_a_function_that_edits_its_lists_does_not_edit_the_rollout():
    rollout = said(POLICY, USERS, REPLIES)
    FunctionReward(lambda p, c: [float(len(c.pop())) for _ in list(c)], "here:score")(rollout)
    assert rollout.completions == REPLIES


@pytest.mark.parametrize("scores", [[1, 2.5], (1, 2.5), torch.tensor([[1.0], [2.5]]), iter([1, 2.5])])
def test_numbers_of_any_kind_are_taken(scores):
    assert checked_scores(scores, ["a", "b"], "f").tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    "scores, complaint",
    [
        ([1.0], "returned 1 scores for 2 completions"),
        ([1.0, 2.0, 3.0], "returned 3 scores for 2 completions"),
        ([1.0, float("nan")], "score 1 is nan .completion 'second'"),
        ([float("-inf"), 1.0], "score 0 is -inf .completion 'first'"),
        (torch.tensor([1.0, torch.nan]), "score 1 is nan"),
        (torch.ones(2, 2), "returned 4 scores for 2 completions"),
        ([1.0, 1e300], "score 1 is 1e.300"),  # finite as a Python float, not as a float32
        ([1.0, 10**400], "expected a list of numbers"),
        ([1.0, "good"], "expected a list of numbers"),
        ([1.0, None], "expected a list of numbers"),
        (None, "expected a list of numbers, got NoneType"),
        (3.0, "expected a list of numbers, got float"),
    ],
)
def test_anything_else_is_refused_with_the_reason(scores, complaint):
    with pytest.raises(RewardError, match=f"^f: {complaint}"):
        checked_scores(scores, ["first", "second"], "f")


@pytest.mark.parametrize("name", ["math", "math:", ":sqrt", "math:nothing", "math:pi", "no.such.module:f"])
def test_a_name_that_is_no_function_is_refused(name):
    with pytest.raises(ConfigError, match="^reward_config.reward_fn: "):
        load_function(name, "reward_config.reward_fn")


# ----- an endpoint

ANSWERS = {
    "/scores": (200, b'{"scores": [1, 2.5, -3]}'),
    "/bare": (200, b"[1, 2.5, -3]"),
    "/few": (200, b'{"scores": [1]}'),
    "/nan": (200, b'{"scores": [1, NaN, 3]}'),
    "/malformed": (200, b'{"scores": [1, 2'),
    "/bytes": (200, b"\xff\xfe\x00"),
    "/elsewhere": (200, b'{"rewards": [1, 2, 3]}'),
    "/number": (200, b"3"),
    "/broken": (500, b"out of memory"),
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Between two tries of an endpoint."""
    monkeypatch.setattr("chatrlhf.rl.http_reward.PAUSES", (0.0, 0.0))


@pytest.fixture
def endpoint(monkeypatch):
    """The address of a server on this machine, and the requests it got."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if self.path == "/no-http":
                self.wfile.write(b"what?\r\n\r\n")
                return
            status, body = ANSWERS[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("path", ["/scores", "/bare"])
def test_an_endpoint_gets_texts_and_gives_scores(endpoint, path):
    url, requests = endpoint
    assert resolve_reward_fn(url + path)(said(POLICY, USERS, REPLIES)).tolist() == [1.0, 2.5, -3.0]
    assert requests == [{"prompts": USERS, "completions": REPLIES}]


@pytest.mark.parametrize(
    "path, complaint",
    [
        ("/few", "returned 1 scores for 3 completions"),
        ("/nan", "score 1 is nan"),
        ("/malformed", "gave no scores"),
        ("/bytes", "gave no scores"),
        ("/no-http", "gave no scores"),
        ("/broken", "gave no scores .*500"),
        ("/elsewhere", "answered without a list of scores"),
        ("/number", "answered without a list of scores"),
    ],
)
def test_a_bad_answer_is_a_reward_error_that_names_the_address(endpoint, path, complaint):
    url, _ = endpoint
    with pytest.raises(RewardError, match=f"{url}{path}.*{complaint}"):
        resolve_reward_fn(url + path)(said(POLICY, USERS, REPLIES))


def test_an_endpoint_that_was_busy_is_asked_again(monkeypatch):
    answers = [503, 429, 200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answers.pop(0))
            self.end_headers()
            self.wfile.write(b'{"scores": [1, 2, 3]}')

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        source = resolve_reward_fn(f"http://127.0.0.1:{server.server_port}")
        assert source(said(POLICY, USERS, REPLIES)).tolist() == [1, 2, 3] and answers == []
        answers[:] = [404, 200]  # what it will say again
        with pytest.raises(RewardError, match="404"):
            source(said(POLICY, USERS, REPLIES))
        assert answers == [200]
        answers[:] = [500] * 4
        with pytest.raises(RewardError, match="500"):
            source(said(POLICY, USERS, REPLIES))
        assert answers == [500]
        server.shutdown()


def test_an_endpoint_that_is_not_there_is_a_reward_error(endpoint):
    with pytest.raises(RewardError, match="gave no scores"):
        resolve_reward_fn("http://127.0.0.1:9/scores")(said(POLICY, USERS, REPLIES))
