"""Known models by name."""

import jax
import pytest

from dpo_jax.models import families, hf, transformer
from dpo_jax.planning import presets


@pytest.mark.parametrize(
    ("name", "count"),
    [  # as the hub's pages give them
        ("openai-community/gpt2", 124_439_808),
        ("openai-community/gpt2-large", 774_030_080),
        ("openai-community/gpt2-xl", 1_557_611_200),
        ("EleutherAI/gpt-j-6b", 6_050_882_784),
        ("EleutherAI/pythia-70m", 70_426_624),
        ("EleutherAI/pythia-1b", 1_011_781_632),
        ("EleutherAI/pythia-2.8b-deduped", 2_775_208_960),
        ("EleutherAI/pythia-6.9b", 6_857_302_016),
        ("EleutherAI/pythia-12b", 11_846_072_320),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
        ("allenai/OLMo-2-1124-7B-Instruct", 7_298_617_344),
        ("allenai/OLMo-2-1124-13B", 13_716_198_400),
        ("google/gemma-2-2b-it", 2_614_341_888),
        ("google/gemma-2-9b", 9_241_705_984),
        ("google/gemma-2-27b", 27_227_128_320),
        ("google/gemma-3-1b-it", 999_885_952),
        ("google/gemma-3-4b-it", 3_880_263_168),  # of 4,300,079,472, the text part
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
        ("microsoft/phi-4", 14_659_507_200),
        ("microsoft/Phi-4-mini-instruct", 3_836_021_760),
    ],
)
def test_find_published_parameter_counts(name, count):
    config = families.from_hf(hf.make_config(presets.find(name)))
    assert sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(config))) == count


def test_find_unknown_model():
    assert presets.find("someone/of-their-own") is None
