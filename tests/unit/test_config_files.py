"""Configs by name, and fields set from texts."""

import pytest

from dpo_jax import config_files

LISTED = "dpo, hh, imdb, imdb_small, imdb_smollm2, kto, ppo, rm, sft, tldr, toy"


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("choice", ["toy", "configs/toy.py", "toy:ppo", "configs/toy.py:ppo"])
def test_find_shipped_config_from_anywhere(empty_folder, choice):
    assert config_files.load(choice).data.source == "toy"


@pytest.mark.parametrize("name", config_files.shipped_names())
def test_shipped_configs_load_without_repository(empty_folder, name):
    assert config_files.load(name).stages


def test_find_own_file_first(empty_folder):
    source = "from dpo_jax.config import default\ndef get_config():\n    return default(('sft',))\n"
    (empty_folder / "configs").mkdir()
    (empty_folder / "configs" / "toy.py").write_text(source)
    assert config_files.load("configs/toy.py").stages == ("sft",)
    assert config_files.load("toy").stages != ("sft",)


@pytest.mark.parametrize("name", ["tyo", "configs/nothing.py", "some/where/toy.py", ""])
def test_find_lists_known_names(name):
    with pytest.raises(FileNotFoundError, match=f"--config={name}: .*{LISTED}"):
        config_files.load(name)


def test_find_names_nearest():
    with pytest.raises(FileNotFoundError, match="Did you mean --config=imdb_small"):
        config_files.load("imdb_smal")


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("toy:dpoo", "toy has no method 'dpoo'; it has dpo, .*Did you mean dpo"),
        ("dpo:ppo", "has only one config, so nothing may follow the colon"),
        ("tldr:huge", "expected a size"),
    ],
)
def test_load_refuses_unknown_method(choice, said):
    with pytest.raises(ValueError, match=f"--config={choice}: .*{said}"):
        config_files.load(choice)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1", "has no function get_config"),
        ("def get_config(): pass", "returned NoneType, expected a ConfigDict"),
        ("def get_config(:", "mine.py line 1: SyntaxError"),
        ("import no_such_module", "mine.py line 1: ModuleNotFoundError"),
        ("def get_config():\n    return x", "mine.py line 2: NameError"),
        (
            "from dpo_jax.config import default\ndef get_config():\n"
            "    config = default(('dpo',))\n    config.dpo.beta = 'high'\n    return config",
            "mine.py line 4: TypeError",
        ),
    ],
)
def test_load_names_failing_line(tmp_path, source, said):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(ValueError, match=said):
        config_files.load(str(file))


def override(field, text, choice="toy"):
    config = config_files.load(choice)
    values = config_files.override(config, {field: text})
    assert config_files.value_of(config, field) == values[field]
    return values[field]


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("dpo.beta", "1", 1.0),
        ("dpo.beta", "5e-2", 0.05),
        ("dpo.steps", "7", 7),
        ("dpo.cache_reference", "true", True),
        ("data.shuffle", "False", False),
        ("dpo.loss", "ipo", "ipo"),
        ("data.path", "a=b,c", "a=b,c"),
        ("run", "", ""),
        ("model.lora.targets", "q,v", ("q", "v")),
        ("model.lora.targets", "('q',)", ("q",)),
        ("model.lora.targets", "q", ("q",)),
        ("model.scratch.n_embd", "64", 64),
        # options that the block does not have yet
        ("data.template.enable_thinking", "False", False),
        ("data.template.enable_thinking", "true", True),
        ("data.template.date_string", "26 Jul 2024", "26 Jul 2024"),
        ("data.template.date_string", "2024-10-26", "2024-10-26"),
        ("data.template.budget", "12", 12),
        ("data.template.documents", '["a", null]', ["a", None]),
        ("data.template.letters", "{'a', 'b'}", "{'a', 'b'}"),  # JSON has no sets
        ("model.scratch.rope_theta", "1e6", 1e6),
    ],
)
def test_override_takes_type_of_field(field, text, value):
    found = override(field, text)
    assert found == value and type(found) is type(value)


def test_override_of_tuple():
    assert override("best_of_n.n", "1,4", "toy:best_of_n") == (1, 4)
    assert override("best_of_n.n", "(8, 16)", "toy:best_of_n") == (8, 16)
    assert override("best_of_n.n", "4", "toy:best_of_n") == (4,)


def test_override_of_block():
    assert override("model.scratch", "{'model_type': 'llama'}").to_dict() == {"model_type": "llama"}


@pytest.mark.parametrize(
    "text",
    [
        "{'enable_thinking': False, 'date_string': '26 Jul 2024'}",
        '{"enable_thinking": false, "date_string": "26 Jul 2024"}',
        "enable_thinking=False,date_string=26 Jul 2024",
    ],
)
def test_override_of_template(text):
    expected = {"enable_thinking": False, "date_string": "26 Jul 2024"}
    assert override("data.template", text).to_dict() == expected
    assert override("data.template", "").to_dict() == {}


def test_override_of_template_replaces_options_of_file():
    config = config_files.load("toy")
    config.data.template = {"enable_thinking": True, "budget": 3}
    config_files.override(config, {"data.template.enable_thinking": "False"})
    assert config.data.template.to_dict() == {"enable_thinking": False, "budget": 3}
    config_files.override(config, {"data.template": "budget=4"})
    assert config.data.template.to_dict() == {"budget": 4}


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("dpo.beta", "high", "expected a number. Its value is 2.0 now"),
        ("dpo.steps", "1e3", "expected a whole number"),
        ("dpo.cache_reference", "maybe", "expected True or False"),
        ("dpo", "x", "expected one of its fields"),
        ("data.template", "enable_thinking", "expected one of its fields"),
    ],
)
def test_override_refuses_other_type(field, text, said):
    with pytest.raises(ValueError, match=f"--config.{field}={text}: {said}"):
        override(field, text)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("beta", "Did you mean dpo.beta"),
        ("dpo.betta", "Did you mean dpo.beta"),
        ("dpo.xyz", "config.dpo has .*beta"),
        ("max_lenght", "Did you mean data.max_length"),
        ("dppo.lr", "Did you mean dpo.lr or sft.lr"),
        ("dpo.lr.peak", "no such field"),
        ("data.templates.enable_thinking", "Did you mean data.template.enable_thinking"),
        ("data.tempalte", "Did you mean data.template"),
        ("data.template.a.b", "no such field"),
        ("ppo.lr", "this config runs no stage ppo.*Its stages are sft, pairs, dpo, evaluate"),
    ],
)
def test_override_names_nearest_field(field, said):
    with pytest.raises(ValueError, match=f"--config.{field}: .*{said}"):
        override(field, "1")
