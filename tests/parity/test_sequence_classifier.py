"""Reward models of others against transformers, and those that give no reward."""

import jax
import numpy as np
import pytest

from dpo_jax.data.examples import Examples
from dpo_jax.parallel import sharding
from dpo_jax.rewards import make, sequence_classifier
from dpo_jax.sampling.prompts import Conversation
from tests.helpers import tiny_reward_models
from tests.helpers.tiny_reward_models import TOKENIZERS, change_config, write

torch = pytest.importorskip("torch", reason="the independent reference is transformers with torch")

PROMPTS = ["What is the weather in Paris?", "Name a colour of the sea."]
ANSWERS = [
    ["It is nine degrees.", "It rains in the morning, and then?", ""],
    ["Blue, mostly, but sometimes it is green or grey.", "Blue", "grey " * 9],
]
CHAT = [
    dict(role="user", content=PROMPTS[0]),
    dict(role="assistant", content="Nine degrees."),
    dict(role="user", content="And in the morning?"),
]


def asked() -> tuple[list, list, list]:
    """Return prompts, completions and conversations: text, and one prompt of three messages."""
    prompts, completions, conversations = [], [], []
    for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
        prompts += [prompt] * len(answers)
        completions += answers
        conversations += [None] * len(answers)
    # Its text is what another model's template has made of the messages.
    prompts += ["user: ... assistant:"] * 3
    completions += ANSWERS[0]
    conversations += [Conversation(CHAT)] * 3
    return prompts, completions, conversations


def expected_of(model, words, prompts, completions, conversations) -> list[float]:
    """Return transformers' own score of each conversation, alone."""
    scores = []
    for prompt, completion, chat in zip(prompts, completions, conversations, strict=True):
        if words.chat_template:
            messages = chat.messages if chat else [dict(role="user", content=prompt)]
            messages = [*messages, dict(role="assistant", content=completion)]
            ids = words.apply_chat_template(messages, tokenize=True).input_ids
        else:
            ids = words(prompt + completion).input_ids
        if words.bos_token_id is not None:
            assert ids.count(words.bos_token_id) == 1
        with torch.no_grad():
            scores.append(model(torch.tensor([ids])).logits.item())
    return scores


@pytest.mark.parametrize("variant", list(TOKENIZERS))
def test_classifier_equals_transformers(variant, tmp_path):
    folder, model = write(tmp_path, variant)
    words = tiny_reward_models.tokenizer(variant)
    prompts, completions, conversations = asked()
    if not words.chat_template:
        prompts, completions, conversations = prompts[:6], completions[:6], None
    chats = conversations or [None] * len(prompts)
    expected = expected_of(model, words, prompts, completions, chats)
    reward = make.make_reward("model", str(folder), 8, sharding.make_mesh())
    # The policy has another tokenizer.
    tokens = [(np.array([1]), np.array([2, 3]))] * len(prompts)
    found = reward(prompts, completions, tokens, conversations)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert np.ptp(expected) > 0.1
    # In another order, and without the policy's tokens.
    order = np.random.default_rng(0).permutation(len(prompts))
    mixed = [[items[index] for index in order] for items in (prompts, completions, chats)]
    again = reward(*mixed[:2], None, mixed[2])
    np.testing.assert_allclose(again, np.array(expected)[order], atol=1e-4, rtol=0)
    assert reward([], [], [], None).shape == (0,)


@pytest.mark.parametrize("variant, pad", [("gpt2", "<|endoftext|>"), ("qwen2", "<|im_end|>")])
def test_head_is_read_where_transformers_reads_it(variant, pad, tmp_path):
    """A batch that is padded there. Where padding and EOS are one, it ends before the EOS."""
    folder, model = write(tmp_path, variant, pad=pad)
    words = tiny_reward_models.tokenizer(variant)
    words.pad_token = pad
    words.padding_side = "right"
    completions = [f"Blue, mostly{pad if variant == 'gpt2' else ''}", "grey", "green or grey"]
    prompts = [PROMPTS[1]] * 3
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    if words.chat_template:
        texts = []
        for completion in completions:
            answer = dict(role="assistant", content=completion)
            messages = [dict(role="user", content=PROMPTS[1]), answer]
            texts.append(words.apply_chat_template(messages, tokenize=False))
    batch = words(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**batch).logits[:, 0].numpy()
    reward = make.make_reward("model", str(folder), 8, sharding.make_mesh())
    np.testing.assert_allclose(reward(prompts, completions, None), expected, atol=1e-4, rtol=0)


def test_bias_of_head_is_added(tmp_path):
    """It is no part of transformers' classes, which leave it out with a warning."""
    folder, model = write(tmp_path, "llama3", bias=True)
    words = tiny_reward_models.tokenizer("llama3")
    expected = expected_of(model, words, PROMPTS, PROMPTS, [None, None])
    reward = make.make_reward("model", str(folder), 8, sharding.make_mesh())
    found = reward(PROMPTS, PROMPTS, None)
    np.testing.assert_allclose(found, np.array(expected) + 0.75, atol=1e-4, rtol=0)


def test_completions_share_their_prompt(tmp_path, monkeypatch):
    folder, _ = write(tmp_path, "qwen2")
    reward = make.make_reward("model", str(folder), 8, sharding.make_mesh())
    laid_out = []
    append = Examples.append

    def record(self, prompt, responses, *args, **options):
        laid_out.append((len(prompt), len(responses[0])))
        return append(self, prompt, responses, *args, **options)

    monkeypatch.setattr(Examples, "append", record)
    reward(PROMPTS[:1] * 3, ["Blue", "grey", "Blue and grey"], None)
    starts = {start for start, _ in laid_out}
    assert len(laid_out) == 3 and len(starts) == 1 and starts.pop() > 20


def test_conversation_begun_in_prompt(tmp_path):
    """Where a prompt is the start of an answer, the completion goes on with it."""
    folder, _ = write(tmp_path, "qwen3")
    reward = make.make_reward("model", str(folder), 8, sharding.make_mesh())
    begun = Conversation(CHAT, begun="It is ")
    found = reward(["a", "b"], ["nine", "It is nine"], None, [begun, Conversation(CHAT)])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_long_text_is_refused_or_cut(tmp_path, capsys):
    folder, model = write(tmp_path, "mistral", max_position_embeddings=24)
    words = tiny_reward_models.tokenizer("mistral")
    prompts, completions = ["grey " * 12, "Blue"], [" and blue " * 4, " sea"]
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="24 positions.*--config.reward.on_long=cut"):
        make.make_reward("model", str(folder), 8, mesh)(prompts, completions, None)
    found = make.make_reward("model", str(folder), 8, mesh, "cut")(prompts, completions, None)
    assert "1 of 2 texts are longer than the 24 positions" in capsys.readouterr().out
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = words(prompt + completion).input_ids
        if len(ids) > 24:
            ids = ids[:1] + ids[-23:]
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).logits.item())
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_conversations_need_template(tmp_path):
    folder, _ = write(tmp_path, "gpt2")
    reward = make.make_reward("model", str(folder), 8, sharding.make_mesh())
    with pytest.raises(ValueError, match="the prompts are conversations.*no chat template"):
        reward(["a"], ["b"], None, [Conversation(CHAT)])


def test_template_refuses_conversation(tmp_path):
    """A template that takes no system message, and names the reason."""
    folder, _ = write(tmp_path, "qwen2")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for message in messages %}{{ message.role + message.content }}{% endfor %}"
    )
    reward = make.make_reward("model", str(folder), 8, sharding.make_mesh())
    assert np.isfinite(reward(["a"], ["b"], None)).all()
    chat = [dict(role="system", content="Be brief."), *CHAT]
    with pytest.raises(ValueError, match="cannot read the prompt 'a'.*no system here"):
        reward(["a"], ["b"], None, [Conversation(chat)])


def test_models_that_give_no_reward_are_refused(tmp_path):
    folder, _ = write(tmp_path / "three", "qwen2", num_labels=3)
    with pytest.raises(ValueError, match="has 3 labels .*takes a sequence classifier with"):
        make.check_reward("model", str(folder))
    folder, _ = write(tmp_path / "quantised", "llama3")
    change_config(folder, quantization_config=dict(quant_method="gptq", bits=4))
    with pytest.raises(ValueError, match="quantization_config = .* is not supported"):
        make.check_reward("model", str(folder))
    from tests.helpers import tiny_models

    language_model = tiny_models.write("llama2", tmp_path / "language")
    tiny_reward_models.tokenizer("llama3").save_pretrained(language_model)
    with pytest.raises(ValueError, match="no reward head .*LlamaForCausalLM.*random rewards"):
        make.check_reward("model", str(language_model))


def test_weights_lie_on_devices_once(tmp_path):
    """Whatever day templates take for today."""
    import datetime

    folder, _ = write(tmp_path, "qwen2")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    days = [datetime.date(2026, 1, day) for day in (1, 2)]
    before = sequence_classifier._opened.cache_info().misses
    rewards = [make.make_reward("model", str(folder), 8, mesh, "error", day) for day in days]
    assert rewards[0] is not rewards[1]
    assert sequence_classifier._opened.cache_info().misses == before + 1
    assert make.make_reward("model", str(folder), 8, mesh, "error", days[0]) is rewards[0]
