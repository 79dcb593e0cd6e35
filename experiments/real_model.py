"""Compare a real chat model here with the same model in torch: transformers, TRL and peft.

    python -m experiments.real_model --model=FOLDER --data=HH --workdir=DIR

FOLDER is a chat model of any supported family in Hugging Face format, and HH has rows as those of
Anthropic/hh-rlhf, whose transcripts become chat messages. Both sides compute in float32. Parts:

    chats    log-probs of 20 pairs of chats by `dpo-jax score`, and logits, beside transformers
    answers  greedy answers to 20 prompts by `dpo-jax sample`, beside generate, token by token
    dpo      20 steps beside TRL's DPOTrainer: the same pairs, order, optimiser and learning rate
    lora     the same with adapters, beside TRL with peft; then peft opens our adapter
    export   what dpo has exported, opened by transformers: logits, and answers of its pipeline

All read the tokens that the model's chat template makes in transformers, up to EOS: TRL by itself
would also train on the newline that some templates write after EOS.

--part picks parts. Those that are done are kept in DIR/PART.json. Writes DIR/real_model.json and
DIR/real_model.md. With SmolLM2-135M it takes about 15 minutes of 2 CPU cores, and 4 GB of memory.
"""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from experiments.commands import in_workdir, machine

BETA, CLIP = 0.1, 10.0  # the paper's
LR, LORA_LR = 2e-7, 1e-5
LORA = dict(rank=8, alpha=16.0)
BATCH = 2  # pairs a step
SIDES = ("chosen", "rejected")
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # of an HH transcript
ROLES = {"Human": "user", "Assistant": "assistant"}
# When a part's model answers.
ANSWERED = (("as it is", "answers"), ("after DPO", "export"))
# Our metric of a step -> TRL's.
MEASURES = {
    "loss/train": "loss",
    "rewards_train/margins": "rewards/margins",
    "logps_train/chosen": "logps/chosen",
    "logps_train/rejected": "logps/rejected",
    "grad_norm": "grad_norm",
}
# The optimiser, the order of the data, and no file but the model. As `experiments.benchmark.trl`.
TRL_SETTINGS = dict(
    optim="rmsprop",
    lr_scheduler_type="constant",
    warmup_steps=0,
    logging_steps=1,
    train_sampling_strategy="sequential",
    report_to=[],
    save_strategy="no",
    bf16=False,
    fp16=False,
    gradient_checkpointing=False,
    max_length=None,
    use_cpu=True,
    disable_tqdm=True,
)
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "What is 7 times 8?",
    "Give me a word that rhymes with 'light'.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Who wrote Hamlet?",
    "List two uses of a paper clip.",
    "What do bees make?",
    "Suggest a name for a black cat.",
    "How many days are in a leap year?",
    "Explain gravity to a child.",
    "Write a line of Python that prints hello.",
    "What is the opposite of 'cold'?",
    "Which planet is closest to the sun?",
    "Give one tip for sleeping better.",
    "What is a haiku?",
    "Finish the proverb: a bird in the hand",
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is compared."""

    chats: int = 20
    longest_chat: int = 256  # tokens
    answers: int = len(QUESTIONS)
    new_tokens: int = 48  # of an answer
    steps: int = 20
    longest_pair: int = 80  # tokens of a prompt and a response that are trained on
    exported_answers: int = 5  # of the exported model


@dataclasses.dataclass(frozen=True)
class Task:
    """What is compared, and where files go."""

    model: str
    data: str
    folder: pathlib.Path
    sizes: Sizes = Sizes()

    @functools.cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def pairs(self, count: int, longest: int) -> list[dict]:
        """Return the first pairs of chats in the data whose two sides have at most `longest`
        tokens.

        Raises ValueError where there are fewer.
        """
        from dpo_jax.data import every_row

        found = []
        for _, fields in every_row.read(self.data, "test"):
            pair = as_pair(fields)
            if pair is None or not self._fits(pair, longest):
                continue
            found.append(pair)
            if len(found) == count:
                return found
        raise ValueError(
            f"--data={self.data}: only {len(found)} of its pairs have at most {longest} tokens; "
            f"expected {count}."
        )

    def _fits(self, pair: dict, longest: int) -> bool:
        return all(sum(map(len, chat_tokens(self.tokenizer, pair, s))) <= longest for s in SIDES)


def as_pair(fields: dict) -> dict | None:
    """Return a row of HH as a prompt and two answers, each a list of messages.

    None where the two sides share no prompt, or an answer is empty or both are the same.
    """
    chats = [as_messages(fields[side]) for side in SIDES]
    prompts = [chat[:-1] for chat in chats]
    answers = [chat[-1:] for chat in chats]
    is_answer = all(one and one[0]["role"] == "assistant" and one[0]["content"] for one in answers)
    if not is_answer or prompts[0] != prompts[1] or answers[0] == answers[1]:
        return None
    roles = [message["role"] for message in prompts[0]]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        return None
    return dict(prompt=prompts[0], chosen=answers[0], rejected=answers[1])


def as_messages(transcript: str) -> list[dict]:
    """Return the turns of an HH transcript as chat messages."""
    _, *parts = TURN.split(transcript)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [dict(role=ROLES[name], content=text.strip()) for name, text in turns]


def chat_tokens(tokenizer, pair: dict, side: str) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and of a response by transformers' template, up to EOS."""
    prompt = prompt_tokens(tokenizer, pair["prompt"])
    whole = tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=True)
    whole = whole["input_ids"]
    response = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt or tokenizer.eos_token_id not in response:
        raise ValueError(
            "the chat template writes a prompt with its answer otherwise than the prompt alone, or "
            "no EOS after the answer: this comparison takes neither."
        )
    return prompt, response[: response.index(tokenizer.eos_token_id) + 1]


def prompt_tokens(tokenizer, messages: list[dict]) -> list[int]:
    """Return the ids of a prompt with the cue for an answer."""
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return rendered["input_ids"]


def open_torch(path):
    """Return a folder's torch model in float32, to be run and not trained."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def open_ours(path):
    """Return a folder's model on one device."""
    import jax

    import dpo_jax

    return dpo_jax.load(path, mesh=dict(devices=jax.devices()[:1]))


def torch_logits(model, ids: list[int]) -> np.ndarray:
    """Return a torch model's logits [T, V] of a sequence."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def our_logits(model, sequences: list[list[int]]) -> Iterator[np.ndarray]:
    """Yield our logits [T, V] of each sequence."""
    import jax

    from dpo_jax.models import transformer

    # All are padded to the longest, so that one program does; no token sees what follows it.
    longest = max(map(len, sequences))
    function = jax.jit(functools.partial(transformer.logits, model.config))
    for ids in sequences:
        padded_BT = np.zeros((1, longest), np.int32)
        padded_BT[0, : len(ids)] = ids
        yield np.asarray(function(model.params, padded_BT))[0, : len(ids)]


def log_probs(logits_TV: np.ndarray, prompt: list[int], response: list[int]) -> np.ndarray:
    """Return the log-probs of a response's tokens by the logits of prompt and response, float64."""
    steps_TV = logits_TV[len(prompt) - 1 : -1].astype(np.float64)
    totals_T = np.logaddexp.reduce(steps_TV, axis=-1)
    return steps_TV[np.arange(len(response)), response] - totals_T


def logits_difference(path, theirs, sequences: list[list[int]]) -> float:
    """Return the largest difference of logits between our model of a folder and a torch model."""
    largest = 0.0
    for ids, logits_TV in zip(sequences, our_logits(open_ours(path), sequences), strict=True):
        largest = max(largest, float(np.abs(logits_TV - torch_logits(theirs, ids)).max()))
    return largest


def write_rows(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lengths(longest: int) -> dict:
    """Return the fields of config.data for rows of at most `longest` tokens, which are not cut."""
    return dict(max_length=longest, max_prompt_length=longest // 2)


def run_command(*words) -> None:
    """Run dpo-jax with these words, as a user would."""
    subprocess.run([sys.executable, "-m", "dpo_jax", *map(str, words)], check=True)


def compare_chats(task: Task) -> dict:
    """Compare the log-probs of `dpo-jax score`, and logits, with transformers'."""
    sizes, out = task.sizes, task.folder / "scored.jsonl"
    pairs = task.pairs(sizes.chats, sizes.longest_chat)
    run_command(
        *("score", f"--model={task.model}", f"--out={out}", "--per_token"),
        f"--data={write_rows(task.folder / 'chats.jsonl', pairs)}",
        *(f"--{name}={value}" for name, value in lengths(sizes.longest_chat).items()),
    )
    asked = [
        (scored, side, *chat_tokens(task.tokenizer, pair, side))
        for pair, scored in zip(pairs, read_rows(out), strict=True)
        for side in SIDES
    ]
    theirs = open_torch(task.model)
    sequences = [prompt + response for _, _, prompt, response in asked]
    of_logits, of_tokens, of_sums, sums, largest_logit, equal = [], [], [], [], 0.0, 0
    ours = our_logits(open_ours(task.model), sequences)
    for (scored, side, prompt, response), logits_TV in zip(asked, ours, strict=True):
        expected_TV = torch_logits(theirs, prompt + response)
        expected = log_probs(expected_TV, prompt, response)
        if scored[f"token_ids_{side}"] != response:
            raise ValueError(f"score reads other tokens than transformers: {scored}")
        equal += 1
        of_logits.append(np.abs(logits_TV - expected_TV).max())
        of_tokens.append(np.abs(np.array(scored[f"token_logps_{side}"]) - expected).max())
        of_sums.append(abs(scored[f"logp_{side}"] - expected.sum()))
        sums.append(expected.sum())
        largest_logit = max(largest_logit, np.abs(expected_TV).max())
    return dict(
        chats=equal,
        tokens=sum(map(len, sequences)),
        response_tokens=sum(len(response) for *_, response in asked),
        largest_logit=float(largest_logit),
        mean_log_prob=float(np.mean(sums)),
        difference=dict(
            logits=float(max(of_logits)),
            token_log_probs=float(max(of_tokens)),
            response_log_probs=float(max(of_sums)),
        ),
    )


def compare_answers(task: Task) -> dict:
    """Compare greedy answers of `dpo-jax sample` with those of generate."""
    sizes, out = task.sizes, task.folder / "answers.jsonl"
    chats = [[dict(role="user", content=text)] for text in QUESTIONS[: sizes.answers]]
    run_command(
        *("sample", f"--model={task.model}", f"--out={out}", "--temperature=0"),
        f"--prompts={write_rows(task.folder / 'prompts.jsonl', [dict(prompt=c) for c in chats])}",
        f"--max_new_tokens={sizes.new_tokens}",
    )
    theirs, rows = open_torch(task.model), read_rows(out)
    compared = [
        compare_answer(task.tokenizer, theirs, chat, row["completion"], sizes.new_tokens)
        for chat, row in zip(chats, rows, strict=True)
    ]
    return dict(
        answers=len(compared),
        equal=sum("parted" not in one for one in compared),
        tokens=sum(one["tokens"] for one in compared),
        ended=sum(one["ended"] for one in compared),
        # Those that are equal have the same tokens, and so the same log-prob.
        difference=dict(
            answer_log_probs=max(
                (
                    abs(one["log_prob"] - row["logp"])
                    for one, row in zip(compared, rows, strict=True)
                    if "parted" not in one
                ),
                default=0.0,
            )
        ),
        parted=[one["parted"] for one in compared if "parted" in one],
        first=dict(question=QUESTIONS[0], answer=rows[0]["completion"]),
    )


def compare_answer(tokenizer, model, chat: list[dict], text: str, new_tokens: int) -> dict:
    """Compare our greedy answer to a chat with generate's.

    Where they part, `parted` has the place, and how far apart the logits of the two tokens are.
    """
    import torch

    prompt = prompt_tokens(tokenizer, chat)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
        )[0].tolist()
    answer = whole[len(prompt) :]
    logits_TV = torch_logits(model, whole)
    found = dict(
        tokens=len(answer),
        ended=len(answer) < new_tokens,
        log_prob=float(log_probs(logits_TV, prompt, answer).sum()),
    )
    # What follows the prompt's text, as a word's own text may lack the space before it.
    before, after = tokenizer.batch_decode([prompt, whole], skip_special_tokens=True)
    if text != after[len(before) :]:
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        ours.append(tokenizer.eos_token_id)  # where the text ends, if theirs goes on
        both = zip(ours, answer, strict=False)
        place = next(place for place, (one, other) in enumerate(both) if one != other)
        at_V = logits_TV[len(prompt) + place - 1]
        found["parted"] = dict(
            question=chat[-1]["content"],
            place=place,
            gap=float(at_V[answer[place]] - at_V[ours[place]]),
        )
    return found


def training_pairs(task: Task) -> list[dict]:
    """Return the pairs of all steps, in the order of the data."""
    return task.pairs(task.sizes.steps * BATCH, task.sizes.longest_pair)


def train_by_trl(task: Task, model, pairs: list[dict], lr: float) -> tuple[list[dict], object]:
    """Return TRL's log of each step, and the trained torch model."""
    import trl
    from datasets import Dataset

    class OnTokens(trl.DPOTrainer):
        """Trains on rows that have been tokenised."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    # torch gives the input embedding of the padding token no gradient; where that is EOS, as often,
    # a token of the chats would not be trained on that side.
    model.get_input_embeddings().padding_idx = None
    rows = []
    for pair in pairs:
        tokens = {side: chat_tokens(task.tokenizer, pair, side) for side in SIDES}
        row = {f"{side}_ids": response for side, (_, response) in tokens.items()}
        rows.append(row | dict(prompt_ids=tokens["chosen"][0]))
    trainer = OnTokens(
        model=model,
        args=trl.DPOConfig(
            output_dir=str(task.folder / "trl"),
            per_device_train_batch_size=BATCH,
            max_steps=task.sizes.steps,
            learning_rate=lr,
            beta=BETA,
            max_grad_norm=CLIP,
            **TRL_SETTINGS,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=task.tokenizer,
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return history, trainer.model.eval()


def check_tokens(task: Task, examples, pairs: list[dict]) -> None:
    """Raise ValueError where we train on other tokens than transformers' template makes."""
    for example, pair in zip(examples, pairs, strict=True):
        for side, response in zip(SIDES, example.responses, strict=True):
            expected = chat_tokens(task.tokenizer, pair, side)
            if (example.prompt.tolist(), response.tolist()) != expected:
                raise ValueError(f"the two sides would train on different tokens of {pair}")


def encode(task: Task, model, pairs: list[dict]):
    """Return our examples of pairs, with the tokens that transformers has."""
    examples = model.encode(pairs, **lengths(task.sizes.longest_pair))
    check_tokens(task, examples, pairs)
    return examples


def beside(ours: list[dict], theirs: list[dict]) -> dict:
    """Return the metrics of all steps, and the largest difference of each metric."""
    steps = []
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        both = {name: [mine[name], other[name_there]] for name, name_there in MEASURES.items()}
        steps.append(dict(step=number, **both))
    largest = {}
    for name in MEASURES:
        largest[name] = max(abs(step[name][0] - step[name][1]) for step in steps)
    return dict(steps=steps, difference=largest)


def compare_dpo(task: Task) -> dict:
    """Compare a run of DPO with TRL's."""
    import dpo_jax
    from dpo_jax.config import default
    from dpo_jax.training import metrics

    pairs = training_pairs(task)
    encode(task, open_ours(task.model), pairs)
    data = task.folder / "pairs"
    write_rows(data / "train.jsonl", pairs)
    write_rows(data / "test.jsonl", task.pairs(BATCH, task.sizes.longest_pair))
    config = default(("dpo",))
    config.model.path = task.model
    config.data.update(path=str(data), shuffle=False, **lengths(task.sizes.longest_pair))
    config.dpo.update(batch_size=BATCH, steps=task.sizes.steps, lr=LR, beta=BETA, warmup_steps=0)
    config.dpo.update(max_grad_norm=CLIP, eval_every=1000, save_every=1000)
    config.run = "trained"
    exported = dpo_jax.run(config, task.folder / "run", verbose=True)["dpo"]
    ours = [row for row in metrics.read_rows(exported / "metrics.jsonl") if "loss/train" in row]

    theirs, trained = train_by_trl(task, open_torch(task.model), pairs, LR)
    found = beside(ours, theirs)
    sequences = [sum(chat_tokens(task.tokenizer, pair, "chosen"), []) for pair in pairs[:BATCH]]
    found["difference"]["final_logits"] = logits_difference(exported / "hf", trained, sequences)
    return found | dict(lr=LR, beta=BETA, pairs=len(pairs), batch_size=BATCH)


def compare_lora(task: Task) -> dict:
    """Compare DPO of adapters with TRL's by peft, and open our adapter in peft."""
    import peft

    import dpo_jax

    pairs, model = training_pairs(task), open_ours(task.model)
    examples = encode(task, model, pairs)
    trainer = dpo_jax.Trainer(
        model, "dpo", lora=LORA, lr=LORA_LR, beta=BETA, warmup_steps=0, max_grad_norm=CLIP
    )
    # TRL begins with the adapters that we begin with.
    start, ended = task.folder / "adapter_start", task.folder / "adapter"
    trainer.save_adapter(start)
    ours = trainer.fit(examples, batch_size=BATCH, steps=task.sizes.steps, seed=None, verbose=True)
    trainer.save_adapter(ended)
    some = pairs[: 2 * BATCH]
    mine_PK = np.stack([*trainer.model.log_probs(examples[: len(some)])], axis=1)

    adapted = peft.PeftModel.from_pretrained(open_torch(task.model), start, is_trainable=True)
    theirs, trained = train_by_trl(task, adapted, pairs, LORA_LR)
    found = beside(ours, theirs)
    opened = peft.PeftModel.from_pretrained(open_torch(task.model), ended).eval()
    for name, other in dict(trl_log_probs=trained, peft_log_probs=opened).items():
        differences = []
        for pair, mine_K in zip(some, mine_PK, strict=True):
            for side, mine in zip(SIDES, mine_K, strict=True):
                prompt, response = chat_tokens(task.tokenizer, pair, side)
                expected = log_probs(torch_logits(other, prompt + response), prompt, response)
                differences.append(abs(expected.sum() - mine))
        found["difference"][name] = float(max(differences))
    return found | dict(lr=LORA_LR, beta=BETA, pairs=len(pairs), batch_size=BATCH, lora=LORA)


def compare_export(task: Task) -> dict:
    """Open what the part dpo has exported in transformers: logits, and answers by its pipeline."""
    from transformers import AutoModelForCausalLM, pipeline

    folder = task.folder / "run" / "trained" / "hf"
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    pairs = training_pairs(task)[:BATCH]
    sequences = [sum(chat_tokens(task.tokenizer, pair, "chosen"), []) for pair in pairs]
    questions = QUESTIONS[: task.sizes.exported_answers]
    chats = [[dict(role="user", content=text)] for text in questions]
    new_tokens = task.sizes.new_tokens
    ours = open_ours(folder).generate(chats, max_new_tokens=new_tokens, temperature=0.0)
    # The template, and where an answer ends, are those of the exported files.
    answer = pipeline("text-generation", model=str(folder), dtype="float32")
    answers = []
    for chat in chats:
        said = answer(chat, max_new_tokens=new_tokens, do_sample=False)
        answers.append(said[0]["generated_text"][-1]["content"])
    return dict(
        loading={name: len(names) for name, names in info.items()},
        difference=dict(logits=logits_difference(folder, theirs.eval(), sequences)),
        answers=len(chats),
        # The pipeline reads an answer alone, and so without the space that may be before it.
        equal=sum(mine.strip() == other.strip() for mine, other in zip(ours, answers, strict=True)),
        first=dict(question=QUESTIONS[0], answer=answers[0]),
    )


def of(found: dict, *names: str) -> str:
    """Return some of a part's largest differences as words."""
    return ", ".join(f"{found['difference'][name]:.1e}" for name in names)


def chat_rows(found: dict) -> list[tuple[str, str, str]]:
    """Return rows of the table: what, beside what, and the largest differences."""
    logits = f"logits of {found['chats']} chats, {found['tokens']:,} tokens"
    both = f"log-probs of their {found['response_tokens']:,} response tokens, and of responses"
    return [
        (f"{logits}, up to {found['largest_logit']:.0f}", "transformers", of(found, "logits")),
        (both, "transformers", of(found, "token_log_probs", "response_log_probs")),
    ]


def answer_rows(found: dict) -> list[tuple[str, str, str]]:
    equal = f"{found['equal']} of {found['answers']} equal, token by token"
    return [(f"greedy answers, {found['tokens']:,} tokens", "`generate`", equal)]


def step_rows(found: dict) -> list[tuple[str, str, str]]:
    what, beside = ("with LoRA", "TRL, peft") if "lora" in found else ("of DPO", "TRL")
    losses = of(found, "loss/train", "rewards_train/margins")
    log_probs = of(found, "logps_train/chosen", "logps_train/rejected")
    rows = [
        (f"{len(found['steps'])} steps {what}: loss, margin", beside, losses),
        ("their chosen and rejected log-probs, nats", beside, log_probs),
    ]
    if "lora" in found:
        adapter = "log-probs of responses under our exported adapter, nats"
        rows.append((adapter, "peft", of(found, "peft_log_probs")))
    return rows


def export_rows(found: dict) -> list[tuple[str, str, str]]:
    equal = f"{found['equal']} of {found['answers']} equal"
    return [
        ("logits of the exported model", "transformers", of(found, "logits")),
        ("its greedy answers in its chat format", "transformers' pipeline", equal),
    ]


# Part -> what compares it, and the rows that show what was found.
PARTS = dict(
    chats=(compare_chats, chat_rows),
    answers=(compare_answers, answer_rows),
    dpo=(compare_dpo, step_rows),
    lora=(compare_lora, step_rows),
    export=(compare_export, export_rows),
)


def run(task: Task, parts: list[str]) -> dict:
    """Compare these parts, if they are not done; write real_model.json and real_model.md.

    Both hold all parts that are done, these and others.
    """
    from dpo_jax.models import hf, transformer
    from dpo_jax.models.families import from_hf

    task.folder.mkdir(parents=True, exist_ok=True)
    hf_config = hf.read_config(task.model)
    result = dict(
        model=pathlib.Path(task.model).name,
        family=hf_config.model_type,
        weights=count_weights(transformer.abstract(from_hf(hf_config))),
        machine=machine(),
        versions={
            name: importlib.metadata.version(name)
            for name in ("jax", "torch", "transformers", "trl", "peft")
        },
        sizes=dataclasses.asdict(task.sizes),
    )
    for name, (compare, _) in PARTS.items():
        path = task.folder / f"{name}.json"
        if name in parts and not path.exists():
            print(f"part {name}", flush=True)
            path.write_text(json.dumps(compare(task)))
        if path.exists():
            result[name] = json.loads(path.read_text())
    (task.folder / "real_model.json").write_text(json.dumps(result, indent=1) + "\n")
    (task.folder / "real_model.md").write_text(page(result))
    print(table(result))
    return result


def count_weights(shapes) -> int:
    """Return how many numbers a tree of weights has."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def table(result: dict) -> str:
    """Return the largest differences of all parts as a Markdown table."""
    lines = ["| what | beside | largest difference |", "|---|---|---|"]
    for name, (_, rows_of) in PARTS.items():
        if name in result:
            lines += [f"| {' | '.join(cells)} |" for cells in rows_of(result[name])]
    return "\n".join(lines)


def page(result: dict) -> str:
    """Return the results as a page."""
    here = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"# {result['model']} beside torch",
        "",
        f"`python -m experiments.real_model`: a {result['family']} with {result['weights']:,} "
        f"weights, float32, {here['cores']} cores of {here['cpu']}; {versions}.",
        "",
        table(result),
        "",
    ]
    for one in result.get("answers", dict(parted=[]))["parted"]:
        lines += [
            f"The answer to {one['question']!r} parts at token {one['place'] + 1}, where torch's "
            f"logits of the two tokens differ by {one['gap']:.1e}.",
            "",
        ]
    for name, title in (("dpo", "DPO"), ("lora", "LoRA")):
        if name in result:
            lines += [f"## {title}, step by step", "", *step_lines(result[name]), ""]
    said = [(when, result[part]["first"]) for when, part in ANSWERED if part in result]
    for when, first in said:
        lines += [f"To {first['question']!r} it answers, {when}: {first['answer']!r}", ""]
    return "\n".join(lines)


def step_lines(part: dict) -> list[str]:
    """Return the settings of a part's steps, and the steps as the lines of a table."""
    settings = (
        f"β {part['beta']}, learning rate {part['lr']:g}, RMSprop, {part['batch_size']} pairs a "
        "step, in the order of the data; ours and TRL's:"
    )
    shown = {"loss": "loss/train", "margin": "rewards_train/margins"}
    shown |= {"chosen, nats": "logps_train/chosen", "rejected, nats": "logps_train/rejected"}
    lines = [settings, "", f"| step | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
    for step in part["steps"]:
        cells = ["{:.6f}, {:.6f}".format(*step[name]) for name in shown.values()]
        lines.append(" | ".join([f"| {step['step']}", *cells]) + " |")
    return lines


def main():
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    model = flags.DEFINE_string("model", None, "A chat model: a folder in Hugging Face format.")
    data = flags.DEFINE_string(
        "data",
        "Anthropic/hh-rlhf:harmless-base",
        "Rows as those of Anthropic/hh-rlhf: a file, a folder or a name on the hub. Its split test "
        "is read.",
    )
    workdir = flags.DEFINE_string("workdir", None, "Folder of the parts and the results.")
    parts = flags.DEFINE_multi_enum("part", list(PARTS), list(PARTS), "Parts to compare.")
    flags.mark_flags_as_required(["model", "workdir"])
    processes.start()

    def compare():
        with in_workdir(workdir.value) as folder:
            task = Task(model.value, data.value, pathlib.Path(folder).absolute())
            run(task, parts.value)

    command_line.run(compare, __doc__)


if __name__ == "__main__":
    main()
