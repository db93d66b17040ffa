import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdlrm.config import Config, about_config, config_toml, load_config, setting_values, settings
from torchdlrm.errors import ConfigError
from torchdlrm.features.schema_file import load_schema
from torchdlrm.planning.plan import plan
from torchdlrm.planning.plan_request import PlanRequest
from torchdlrm.toml import toml_value
from torchdlrm.units import parse_bytes, show_bytes

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def test_a_config_survives_being_written_and_read():
    config = load_config(None, {"model.dense-arch-layer-sizes": "64,128", "validation.max_rows": "5", "seed": "7"})
    assert config.model.dense_arch_layer_sizes == (64, 128)
    assert Config.model_validate(tomllib.loads(config_toml(config))) == config


@given(st.text(st.characters(codec="utf-8")))
def test_every_text_survives_being_written_as_toml(text):
    value = [text, [text, 5, 0.1], True, []]
    assert tomllib.loads(f"value = {toml_value(value)}")["value"] == value
    assert "\n" not in toml_value(value)
    config = load_config(None, {"logging.experiment": text})
    assert Config.model_validate(tomllib.loads(config_toml(config))).logging.experiment == text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    assert load_config(path).model.over_arch_layer_sizes[-1] == 1


def test_all_problems_are_told_at_once_with_key_value_and_remedy(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[train]\nbatch_size = 5\nepochs = "two"\n[optimiser]\nx = 1\n[table_optimizer]\nname = "adm"\n')
    with pytest.raises(ConfigError) as error:
        load_config(
            path,
            {
                "dense-optimizer.learning-rate": "-1",
                "train.epohcs": "3",
                "train.labels": "a,",
                "train.loss-weights.a": "-1",
            },
        )
    message = str(error.value)
    assert f"{path}: train.batch_size: there is no such key; did you mean train.batch_size_global?" in message
    assert f"{path}: train.epochs: must be a valid integer, got 'two'" in message
    assert f"{path}: optimiser: there is no such key" in message
    assert f"{path}: table_optimizer.name: must be one of 'rowwise_adagrad'" in message
    assert "not 'adm'; did you mean adam?" in message
    assert "--dense-optimizer.learning-rate: must be greater than 0, got -1.0" in message
    assert "--train.epohcs: there is no such key; did you mean train.epochs?" in message
    assert "--train.loss-weights.a: must be greater than 0, got -1" in message  # by its key, not by pydantic's types
    assert message.count("loss") == 1


def test_keys_that_contradict_each_other_are_told():
    overrides = {
        "model.embedding_dim": "6",
        "model.over_arch_layer_sizes": "8,2",
        "schedule.warmup_steps": "10",
        "schedule.decay_start_step": "9",
        "schedule.decay_steps": "5",
        "table_optimizer.beta1": "0.1",
        "table_optimizer.name": "sgd",
        "dense_optimizer.momentum": "0.9",
    }
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    message = str(error.value)
    assert "ends with 128, but must end with model.embedding_dim = 6" in message
    assert "model.embedding_dim: must be a multiple of 4" in message
    assert "model.over_arch_layer_sizes: must end with 1, the logit, got 2" in message
    assert "schedule.decay_start_step: 9 is before the end of the warm-up" in message
    assert "table_optimizer.beta1: table_optimizer.name = sgd has no such thing, got 0.1" in message
    assert "dense_optimizer.momentum: dense_optimizer.name = adagrad has no such thing, got 0.9" in message


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"dcn.gated": "true"}, "model.dcn.gated: only model.interaction = dcn reads it, got True with dot"),
        (
            {"interaction": "projection", "projection.branch1_layer_sizes": "256", "dcn.num_layers": "2"},
            "model.dcn.num_layers: only model.interaction = dcn reads it, got 2 with projection",
        ),
        (
            {"interaction": "projection", "projection.branch1_layer_sizes": "256"},
            "model.projection.branch2_layer_sizes: model.interaction = projection needs it; it is not set",
        ),
        (
            {"interaction": "projection", "projection.branch1_layer_sizes": "256,100"},
            "model.projection.branch1_layer_sizes: must end with a multiple of model.embedding_dim = 128, got 100",
        ),
        ({"interaction": "dnc"}, "--model.interaction: must be one of 'dot', 'dcn', 'projection', not 'dnc'"),
    ],
)
def test_an_interaction_has_the_settings_that_it_reads_and_no_others(overrides, problem):
    with pytest.raises(ConfigError) as error:
        load_config(None, {f"model.{name}": value for name, value in overrides.items()})
    assert problem in str(error.value)


def test_a_config_is_written_with_the_settings_that_its_interaction_reads(tmp_path):
    crossed = load_config(None, {"model.interaction": "dcn", "model.dcn.low_rank_dim": "64"})
    written = config_toml(crossed)
    assert "[model.dcn]\nnum_layers = 3\nlow_rank_dim = 64\n" in written
    (tmp_path / "config.toml").write_text(written)
    assert load_config(tmp_path / "config.toml") == crossed
    assert "dcn" not in config_toml(load_config(None))
    sizes = {f"model.projection.branch{i}_layer_sizes": "64,256" for i in (1, 2)}
    projected = load_config(None, {"model.interaction": "projection", **sizes})
    (tmp_path / "config.toml").write_text(config_toml(projected))
    assert load_config(tmp_path / "config.toml") == projected


def test_an_interaction_is_told_without_the_switches_that_are_off():
    dcn = load_config(None, {"model.interaction": "dcn", "model.dcn.low_rank_dim": "64"}).model
    assert dcn.interaction_text == "dcn (num_layers 3, low_rank_dim 64)"
    gated = dcn.model_copy(update={"dcn": dcn.dcn.model_copy(update={"gated": True})})
    assert gated.interaction_text == "dcn (num_layers 3, low_rank_dim 64, gated)"
    assert load_config(None).model.interaction_text == "dot"


def test_keys_that_contradict_each_other_do_not_wait_for_those_that_are_wrong():
    overrides = {"train.epochs": "two", "lr": "0.1", "model.embedding_dim": "15", "schedule.name": "nope"}
    with pytest.raises(ConfigError) as error:
        load_config(None, {**overrides, "schedule.decay_start_step": "5"})
    message = str(error.value)
    assert "--train.epochs: must be a valid integer, got 'two'" in message
    both = "table_optimizer.learning_rate or dense_optimizer.learning_rate"
    assert f"--lr: there is no such key; did you mean {both}?" in message
    assert "model.embedding_dim: must be a multiple of 4 (FBGEMM's rows), got 15" in message
    assert "neither schedule.name" not in message  # nobody knows yet which name was meant


def test_a_key_that_has_another_name_by_now_is_refused_with_it_but_read_from_a_run(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        "[train]\ndropout_share = 0.25\n[sharding]\nreserved_share = 0.3\nhost_cache_share = 0.1\n"
        '[model]\ninteraction = "dcn"\ndcn_num_layers = 2\ndcn_gated = true\n'
    )
    with pytest.raises(ConfigError) as error:
        load_config(path, {"train.dropout-share": "0.5", "model.interaction-branch1-layer-sizes": "8"})
    assert f"{path}: model.dcn_gated: is called model.dcn.gated now" in str(error.value)
    branch = "model.interaction-branch1-layer-sizes: is called model.projection.branch1_layer_sizes now"
    assert f"--{branch}" in str(error.value)
    assert "--train.dropout-share: is called train.dropout now" in str(error.value)
    assert f"{path}: sharding.reserved_share: is called sharding.reserved_fraction now" in str(error.value)
    assert f"{path}: sharding.host_cache_share: is called sharding.cache_fraction now" in str(error.value)
    of_run = load_config(path, is_of_run=True)
    assert of_run.model.interaction_text == "dcn (num_layers 2, low_rank_dim 512, gated)"
    assert (of_run.train.dropout, of_run.sharding.reserved_fraction, of_run.sharding.cache_fraction) == (0.25, 0.3, 0.1)


def test_sizes_in_bytes_may_have_units_and_a_run_writes_the_number(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[sharding]\nhbm_bytes = "80GB"\nhost_memory_bytes = 5\n')
    config = load_config(path)
    assert (config.sharding.hbm_bytes, config.sharding.host_memory_bytes) == (80 * 10**9, 5)
    assert "hbm_bytes = 80000000000\n" in config_toml(config)
    assert load_config(None, {"sharding.hbm-bytes": "79.1GiB"}).sharding.hbm_bytes == int(79.1 * 2**30)
    for wrong in ("-5", "0", "80XB", "true", "1.5e9"):
        with pytest.raises(ConfigError, match=r"--sharding\.hbm_bytes: must be .*, got "):
            load_config(None, {"sharding.hbm_bytes": wrong})


def test_a_decay_that_is_half_said_is_refused():
    for overrides, expected in (
        ({"schedule.name": "constant", "schedule.decay_steps": "5"}, "constant has no decay"),
        ({"schedule.name": "plateau", "schedule.decay_start_step": "5"}, "plateau has no decay"),
        ({"schedule.decay_start_step": "5"}, "neither schedule.name nor schedule.decay_steps"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load_config(None, overrides)


def test_settings_of_a_plateau_are_refused_where_they_would_not_be_read():
    for name in ({}, {"schedule.name": "cosine"}):
        with pytest.raises(ConfigError, match=r"schedule\.plateau_factor: only schedule\.name = plateau .*, got 0\.5"):
            load_config(None, {**name, "schedule.plateau_factor": "0.5"})
    assert load_config(None, {"schedule.name": "plateau", "schedule.plateau_factor": "0.5"}).schedule.name == "plateau"


def test_a_patience_that_stops_the_run_before_a_plateau_reduces_the_rate_is_refused():
    plateau = {"schedule.name": "plateau", "schedule.plateau_patience_validations": "2"}
    message = r"stop\.patience_validations: 2 stops the run before .* above schedule\.plateau_patience_validations = 2"
    with pytest.raises(ConfigError, match=message):
        load_config(None, {**plateau, "stop.patience_validations": "2"})
    assert load_config(None, {**plateau, "stop.patience_validations": "3"}).stop.patience_validations == 3
    assert load_config(None, {"stop.patience_validations": "1"}).stop.patience_validations == 1


def test_a_missing_or_broken_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such config; name a TOML file, or one of criteo-1tb"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: not a TOML file"):
        load_config(tmp_path / "broken.toml")


@pytest.mark.parametrize("text", ["", "# a comment\n", "[train]\n"])
def test_a_config_that_sets_no_key_is_refused(tmp_path, text):
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"my\.toml: sets no key, so it is no config; `dlrm config NAME` prints one"):
        load_config(tmp_path / "my.toml", {"train.epochs": "2"})


def test_it_is_said_how_many_keys_a_config_sets(tmp_path):
    mine = tmp_path / "my.toml"
    mine.write_text("[train]\nepochs = 2\nseed = 3\n")
    assert "sets 2 keys, none of [model]; 1 overridden; all others" in about_config(mine, {"train.seed": "4"})
    mine.write_text("[model.features.cat_0]\nembedding_dim = 8\n")
    assert about_config(mine, {}) == f"config {mine}: sets 1 key; all others have their defaults"


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_a_bare_name_is_the_preset_whatever_lies_in_the_folder(make, tmp_path, monkeypatch, caplog):
    presets = ("criteo-small", "criteo", "criteo-kaggle")
    for name in presets:
        make(tmp_path / name)
    config, schema = load_config("criteo-small"), load_schema("criteo")
    monkeypatch.chdir(tmp_path)
    assert load_config("criteo-small") == config
    assert load_schema("criteo") == schema
    assert plan(PlanRequest(tables="criteo-kaggle", devices=1)).problem.tables[0].rows == 1460
    kind = "folder" if make is Path.mkdir else "file"
    told = [f"{name}: taken as the preset of that name; the {kind} of that name is ./{name}" for name in presets]
    assert [record.getMessage() for record in caplog.records if record.name == "torchdlrm.toml"] == told
    with pytest.raises(ConfigError, match="is a folder, not a config" if make is Path.mkdir else "sets no key"):
        load_config("./criteo-small")


def test_every_setting_has_a_description_and_is_read_somewhere():
    source_root = Path(__file__).parents[2] / "src" / "torchdlrm"
    sources = "\n".join(
        path.read_text() for path in source_root.rglob("*.py") if not path.is_relative_to(source_root / "config")
    )
    for name, field in settings():
        assert field.description, name
        section, _, leaf = name.rpartition(".")
        assert f".{leaf}" in sources, f"nothing reads {section}.{leaf}"


def test_settings_of_one_feature_are_read_written_and_listed(tmp_path):
    overrides = {
        "model.features.cat-2.embedding-dim": "8",
        "model.features.cat_9.quotient_remainder": "add",
        "model.features.cat_9.num_collisions": "4",
    }
    config = load_config(None, overrides)
    (tmp_path / "written.toml").write_text(config_toml(config))
    assert load_config(tmp_path / "written.toml") == config
    (tmp_path / "typed.toml").write_text(
        '[model.features]\ncat_2.embedding_dim = 8\ncat_9.quotient_remainder = "add"\n'
    )
    assert load_config(tmp_path / "typed.toml") == config
    set_ones = {key: value for key, value in setting_values(config).items() if "features" in key}
    assert set_ones == {"model.features.cat_2.embedding_dim": 8, "model.features.cat_9.quotient_remainder": "add"}
    assert hash(config.model) != hash(Config().model)
    assert "features" not in config_toml(Config())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"cat_2.embeding_dim": "8"}, "there is no such key; did you mean model.features.cat_2.embedding_dim?"),
        ({"cat_2.embedding_dim": "6"}, "must be a multiple of 4 and at most model.embedding_dim = 128, got 6"),
        ({"cat_2.embedding_dim": "132"}, "must be a multiple of 4 and at most model.embedding_dim = 128, got 132"),
        ({"cat_2.quotient_remainder": "concat"}, "must be one of 'mult', 'add', not 'concat'"),
        ({"cat_2.num_collisions": "8"}, "num_collisions: only quotient_remainder reads it"),
        ({"cat_2.quotient_remainder": "add", "cat_2.num_collisions": "1"}, "greater than or equal to 2, got 1"),
        ({"cat_2.quotient_remainder": "add", "cat_2.embedding_dim": "8"}, "set one of both"),
        ({"cat_2": "8"}, "must be a table"),
    ],
)
def test_wrong_settings_of_a_feature_are_told(overrides, words):
    with pytest.raises(ConfigError) as error:
        load_config(None, {f"model.features.{key}": text for key, text in overrides.items()})
    assert words in str(error.value)
    assert "model.features.cat_2" in str(error.value)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("79.1GiB", round(79.1 * 2**30)), ("512", 512), ("1.5 tb", 15 * 10**11)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text, "hbm") == size


@pytest.mark.parametrize("text", ["-80GB", "0", "80XB", "much", "", "1..5GB", "80,000GB", "8GB or so"])
def test_wrong_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="`hbm`"):
        parse_bytes(text, "hbm")


def test_sizes_are_shown_in_decimal_units():
    assert [show_bytes(size) for size in (12, 4_160, 532_480_000_000)] == ["12 B", "4.16 kB", "532.5 GB"]
