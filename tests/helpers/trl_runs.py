"""Runs of TRL's trainers on a tiny torch model, with the settings of this package's defaults."""

from tests.helpers.tiny_runs import tokenizer

WORDS = 40  # of the tests' tokenizer
FAMILIES = {
    "gpt2": dict(
        model_type="gpt2",
        vocab_size=WORDS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "llama": dict(
        model_type="llama",
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    ),
}


def write_torch_model(family, folder):
    """Write a random torch model, its norms and biases too, with the tests' forty words."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(FAMILIES[family])
    hf_config = AutoConfig.for_model(
        fields.pop("model_type"), bos_token_id=0, eos_token_id=1, **fields
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def train(trainer_class, settings, model_path, rows):
    """Train by TRL; return what it logged of each step, and the trained torch model."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(model_path)
    words.pad_token = "?"
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return history, trainer.model.eval()


def logits_difference(folder, trained) -> float:
    """Return the largest difference of logits between an exported model and a torch model."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(WORDS)[None]
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return (exported(tokens).logits - trained(tokens).logits).abs().max().item()
