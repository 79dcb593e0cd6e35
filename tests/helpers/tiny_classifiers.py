"""Tiny random sentiment classifiers in Hugging Face format."""

SIZES = dict(vocab_size=60, num_labels=2, pad_token_id=1, bos_token_id=0, eos_token_id=2)
CLASSIFIERS = {
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        SIZES
        | dict(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=42,
            type_vocab_size=1,
            layer_norm_eps=0.1,
            id2label={0: "NEGATIVE", 1: "POSITIVE"},
        ),
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        SIZES
        | dict(
            dim=32,
            n_layers=3,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=40,
            id2label={0: "pos", 1: "neg"},
        ),
    ),
}


def write_classifier(family, folder):
    """Write a random classifier with a tokenizer of sixty words; return its torch model.

    Every tensor is random, norms and biases too.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    model, config, fields = CLASSIFIERS[family]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(
                1 + 0.3 * noise if "norm" in name.lower() and "weight" in name else 0.3 * noise
            )
    model.save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel(
            {"<s>": 0, "<pad>": 1, "</s>": 2, "?": 3} | {f"w{i}": i + 4 for i in range(56)},
            unk_token="?",
        )
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
    ).save_pretrained(folder)
    return model
