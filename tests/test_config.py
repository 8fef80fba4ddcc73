"""The run configuration: what it reads, what it refuses, and in which words."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from irpe_ds.config import RunConfig, load_config
from irpe_ds.errors import ConfigError
from irpe_ds.rpe.config import RPEConfig

MINIMAL = """
name: run
model: {name: deit_tiny_patch16_224}
data: {train: train.beton, val: val.beton}
optim: {warmup_epochs: 0}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def value(config: RunConfig, key: str) -> object:
    found: object = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


class TestReading:
    def test_defaults(self, file: Path) -> None:
        config = load_config(file)
        assert (config.name, config.folder) == ("run", Path("runs/run"))
        assert config.model.rpe is None
        assert config.train.precision == "bf16"
        assert config.data.train == Path("train.beton")

    def test_a_square_size_is_written_as_it_was_read(self, file: Path) -> None:
        for size in (64, [64, 96]):
            config = load_config(file, [f"model.img_size={size}"])
            assert config.model_dump(mode="json")["model"]["img_size"] == size

    def test_recomputation_is_written_as_it_was_read(self, file: Path) -> None:
        for every in (False, True, 3):
            config = load_config(file, [f"model.grad_checkpointing={str(every).lower()}"])
            written = config.model_dump(mode="json")["model"]["grad_checkpointing"]
            assert (written, type(written)) == (every, type(every))

    def test_dump_reads_back_unchanged(self, file: Path) -> None:
        config = load_config(
            file,
            [
                "model.rpe={method: cross, mode: bias, on: qk, ratio: 20, shared_heads: false}",
                "model.img_size=[192, 256]",
                "model.options={patch_size: 8, drop_rate: 0.1}",
                "model.weights=some/weights.pth",
                "optim.lr=1e-3",
                "optim.clip_grad=5",
                "optim.name=lion",
                "model.freeze=[pos_embed, 'blocks.[0-5]']",
                "log.wandb.tags=[a, 'on']",
                "data.workers=3",
            ],
        )
        file.write_text(config.dump())
        assert load_config(file) == config

    @pytest.mark.parametrize("yaml", ["on: q", "'on': q", "{on: q}"])
    def test_the_key_on_is_no_boolean(self, yaml: str, file: Path) -> None:
        yaml = yaml if yaml.startswith("{") else f"{{{yaml}}}"
        file.write_text(MINIMAL.replace("224}", f"224, rpe: {yaml}}}"))
        assert load_config(file).model.rpe == RPEConfig(on="q")

    @pytest.mark.parametrize("text", ["on", "off", "yes", "no", "y"])
    def test_words_are_no_booleans(self, text: str, file: Path) -> None:
        assert load_config(file, [f"name={text}"]).name == text

    @pytest.mark.parametrize(
        ("text", "expected"), [("true", True), ("True", True), ("false", False), ("FALSE", False)]
    )
    def test_true_and_false_are(self, text: str, expected: bool, file: Path) -> None:
        assert load_config(file, [f"log.tensorboard={text}"]).log.tensorboard is expected


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("train.epochs=3", 3),
            ("optim.lr=1e-3", 1e-3),
            ("optim.lr=2", 2.0),
            ("optim.clip_grad=", None),
            ("optim.clip_grad=null", None),
            ("model.name=a=b", "a=b"),
            ("name='7'", "7"),
            ("log.wandb.mode=offline", "offline"),
            ("log.wandb.tags=[a, b]", ("a", "b")),
            ("model.img_size=384", (384, 384)),
            ("model.img_size=[192, 256]", (192, 256)),
            ("model.grad_checkpointing=false", 0),
            ("model.grad_checkpointing=true", 1),
            ("model.grad_checkpointing=3", 3),
            ("model.rpe={}", RPEConfig()),
            ("model.rpe={on: qkv}", RPEConfig(on="qkv")),
            ("model.rpe.on=q", RPEConfig(on="q")),
            ("model.rpe.shared_heads=false", RPEConfig(shared_heads=False)),
            ("model.options.patch_size=8", {"patch_size": 8}),
            ("augment.scale=[0.5, 1]", (0.5, 1.0)),
            ("train.deepspeed=ds_configs/zero3.json", Path("ds_configs/zero3.json")),
        ],
    )
    def test_forms(self, override: str, expected: object, file: Path) -> None:
        key = override.partition("=")[0]
        for section in ("model.rpe", "model.options"):
            if key.startswith(section):
                key = section
        got = value(load_config(file, [override]), key)
        assert got == expected
        assert type(got) is type(expected)

    def test_the_last_one_wins(self, file: Path) -> None:
        overrides = ["train.epochs=3", "train={epochs: 4, global_batch: 8}", "train.epochs=5"]
        train = load_config(file, overrides).train
        assert (train.epochs, train.global_batch) == (5, 8)

    def test_keeps_what_the_file_says_beside_it(self, file: Path) -> None:
        config = load_config(file, ["model.num_classes=10"])
        assert (config.model.name, config.model.num_classes) == ("deit_tiny_patch16_224", 10)


class TestBases:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[[str, str], Path]:
        def write(name: str, text: str) -> Path:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            return path

        return write

    def test_the_file_wins_over_its_base_and_the_command_line_over_both(
        self, write: Callable[[str, str], Path]
    ) -> None:
        write("base.yaml", MINIMAL + "train: {epochs: 7, global_batch: 8, log_every: 9}")
        path = write("run.yaml", "base: base.yaml\nname: mine\ntrain: {epochs: 3, log_every: 4}")
        config = load_config(path, ["train.log_every=1"])
        assert (config.name, config.model.name) == ("mine", "deit_tiny_patch16_224")
        train = config.train
        assert (train.global_batch, train.epochs, train.log_every) == (8, 3, 1)

    def test_mappings_merge_deeply_and_the_rest_is_replaced(
        self, write: Callable[[str, str], Path]
    ) -> None:
        write("base.yaml", MINIMAL)
        write(
            "middle.yaml",
            "base: base.yaml\n"
            "model: {rpe: {method: cross, on: qk}, options: {depth: 2}, resolutions: [[0, 64]]}\n"
            "log: {wandb: {project: theirs, tags: [a, b]}}",
        )
        text = "base: middle.yaml\nmodel: {options: {patch_size: 8}, rpe: {on: v}}\n"
        path = write("run.yaml", text + "log: {wandb: {tags: [c]}}")
        config = load_config(path)
        assert config.model.name == "deit_tiny_patch16_224"
        assert config.model.rpe == RPEConfig(method="cross", on="v")
        assert config.model.options == {"depth": 2, "patch_size": 8}
        assert config.model.resolutions == ((0, 64),)
        assert (config.log.wandb.project, config.log.wandb.tags) == ("theirs", ("c",))

    @pytest.mark.parametrize(
        ("below", "above", "expected"),
        [
            ("{method: cross}", "null", None),
            ("null", "{method: cross}", RPEConfig(method="cross")),
            ("{method: cross}", "{}", RPEConfig(method="cross")),
        ],
    )
    def test_null_takes_a_section_away(
        self, below: str, above: str, expected: object, write: Callable[[str, str], Path]
    ) -> None:
        write("base.yaml", MINIMAL.replace("224}", f"224, rpe: {below}}}"))
        path = write("run.yaml", f"base: base.yaml\nmodel: {{rpe: {above}}}")
        assert load_config(path).model.rpe == expected

    def test_of_several_the_last_wins_and_paths_are_relative_to_the_file(
        self, write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write("base.yaml", MINIMAL + "seed: 1")
        write("parts/one.yaml", "base: ../base.yaml\nseed: 2\ntrain: {epochs: 5}")
        write("parts/two.yaml", "base: ../base.yaml\ntrain: {global_batch: 4}")
        path = write("parts/run.yaml", "base: [one.yaml, two.yaml]")
        monkeypatch.chdir("/")
        config = load_config(path)
        assert (config.seed, config.train.epochs, config.train.global_batch) == (1, 5, 4)

    def test_the_resolved_configuration_has_none(
        self, write: Callable[[str, str], Path], tmp_path: Path
    ) -> None:
        write("base.yaml", MINIMAL)
        config = load_config(write("run.yaml", "base: base.yaml"))
        (tmp_path / "base.yaml").unlink()
        assert load_config(write("resolved.yaml", config.dump())) == config

    def test_a_circle(self, write: Callable[[str, str], Path]) -> None:
        write("parts/a.yaml", "base: ../b.yaml")
        path = write("b.yaml", "base: parts/a.yaml")
        with pytest.raises(ConfigError, match=r"parts/a\.yaml: base: .* -> .* -> ") as caught:
            load_config(path)
        assert str(caught.value.got).endswith("parts/../b.yaml")

    @pytest.mark.parametrize(
        ("text", "where", "expected", "got"),
        [
            ("base: no.yaml", "run.yaml: base", "a readable YAML file", "no.yaml: No such file"),
            ("base: [base.yaml, .]", "run.yaml: base", "a readable YAML file", "Is a directory"),
            ("base: broken.yaml", "broken.yaml", "valid YAML", "line 1"),
            ("base: run.yaml", "run.yaml: base", "not based on this", "run.yaml -> "),
            ("base: 3", "run.yaml: base", "the path of a YAML file", "3"),
            ("base: [base.yaml, 3]", "run.yaml: base", "or a list", "3"),
            ("base: ''", "run.yaml: base", "the path of a YAML file", "''"),
            ("base:", "run.yaml: base", "the path of a YAML file", "None"),
        ],
    )
    def test_mistakes(
        self, text: str, where: str, expected: str, got: str, write: Callable[[str, str], Path]
    ) -> None:
        write("base.yaml", MINIMAL)
        write("broken.yaml", "a: [")
        with pytest.raises(ConfigError) as caught:
            load_config(write("run.yaml", text))
        assert str(caught.value.where).endswith(where)
        assert expected in caught.value.expected
        assert got in str(caught.value.got)
        assert "\n" not in str(caught.value)

    def test_not_on_the_command_line(self, file: Path) -> None:
        with pytest.raises(ConfigError, match=r"^base: expected one of the keys"):
            load_config(file, ["base=other.yaml"])


class TestFrozen:
    @pytest.mark.parametrize("key", ["name", "train.epochs", "log.wandb.mode"])
    def test_no_field_can_be_set(self, key: str, file: Path) -> None:
        config = load_config(file)
        *sections, last = key.split(".")
        owner = value(config, ".".join(sections)) if sections else config
        with pytest.raises(ValidationError, match="frozen"):
            setattr(owner, last, "x")

    def test_runs_do_not_share_their_options(self, file: Path) -> None:
        load_config(file).model.options["depth"] = 1
        assert load_config(file).model.options == {}


MISTAKES = {
    "unknown section": ("trian.epochs=3", "trian", "one of the keys name, out", "mean train?"),
    "unknown key": ("train.epoch=3", "train.epoch", "one of the keys epochs, gl", "mean epochs?"),
    "unknown key, deeper": ("log.wandb.tag=a", "log.wandb.tag", "mode, project", "mean tags?"),
    "unknown key of the encoding": ("model.rpe.onn=q", "model.rpe.onn", "method, mode", "mean on?"),
    "unknown key, unlike any": ("train.xyz=3", "train.xyz", "one of the keys", "an unknown key"),
    "no number": ("train.epochs=many", "train.epochs", "a valid integer", "'many'"),
    "not whole": ("train.epochs=3.5", "train.epochs", "a valid integer", "3.5"),
    "not positive": ("train.epochs=0", "train.epochs", "greater than 0", "0"),
    "not a probability": ("augment.hflip=2", "augment.hflip", "less than or equal to 1", "2"),
    "not one of several": ("train.precision=fp8", "train.precision", "'fp32', 'bf16'", "'fp8'"),
    "nothing": ("name=", "name", "a valid string", "None"),
    "too long": ("augment.scale=[0, 1, 1]", "augment.scale", "at most 2 items", "[0, 1, 1]"),
    "a name with a space": ("name=my run", "name", "letters, digits, and . _ -", "'my run'"),
    "a word for an encoding": ("model.rpe=none", "model.rpe", "null or a section", "'none'"),
    "a value for a section": ("train=3", "train", "a valid dictionary", "3"),
    "a section for a value": ("name.x=3", "name", "a valid string", "{'x': 3}"),
    "an encoding on nothing": ("model.rpe.on=", "model.rpe.on", "a valid string", "None"),
    "an encoding on what is not": ("model.rpe.on=x", "model.rpe.on", "subset of 'qkv'", "'x'"),
    "an encoding of no method": ("model.rpe.method=p", "model.rpe.method", "euclidean", "'p'"),
    "not a number": ("optim.lr=.nan", "optim.lr", "a valid number", "'.nan'"),
    "no override": ("train.epochs", "train.epochs", "section.key=value", "'train.epochs'"),
    "no key": ("=3", "=3", "section.key=value", "'=3'"),
    "no YAML": ("train.epochs=[1", "train.epochs", "a YAML value", "'[1'"),
    "an empty part": ("train..epochs=3", "train..epochs", "section.key=value", "train..epochs"),
    "a boolean is no number": ("train.epochs=true", "train.epochs", "integer", "True"),
    "a number is no boolean": ("log.tensorboard=1", "log.tensorboard", "boolean", "1"),
    "infinite": ("optim.lr=1e999", "optim.lr", "a finite number", "inf"),
    "a size below one": ("model.img_size=0", "model.img_size", "a positive integer", "0"),
    "recomputed less often than never": (
        "model.grad_checkpointing=-1",
        "model.grad_checkpointing",
        "true, false or a number of blocks",
        "-1",
    ),
    "freezing less than nothing": (
        "model.freeze=-1",
        "model.freeze",
        "a number of blocks, or a list of names",
        "-1",
    ),
    "distillation without a teacher": (
        "distill.kind=hard",
        "distill.weights",
        "the weights of regnety_160",
        "nothing",
    ),
    "a size of three": (
        "model.img_size=[1, 1, 1]",
        "model.img_size",
        "[height, width]",
        "[1, 1, 1]",
    ),
}


class TestMistakes:
    @pytest.mark.parametrize(
        ("override", "where", "expected", "got"),
        [pytest.param(*row, id=name) for name, row in MISTAKES.items()],
    )
    def test_of_an_override(
        self, override: str, where: str, expected: str, got: str, file: Path
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(file, [override])
        error = caught.value
        assert error.where == where
        assert expected in error.expected
        assert got in str(error.got)
        assert str(error) == f"{where}: expected {error.expected}, got {error.got}"
        assert "\n" not in str(error)

    def test_all_are_told_at_once(self, file: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(file, ["train.epoch=3", "optim.lr=a", "model.rpe.on=x"])
        head, *lines = str(caught.value).splitlines()
        assert head == "3 mistakes in the configuration:"
        keys = sorted(line.split(":")[0].strip() for line in lines)
        assert keys == ["model.rpe.on", "optim.lr", "train.epoch"]

    def test_scientific_notation_where_no_type_is_known(self, file: Path) -> None:
        config = load_config(file, ["model.options.init_values=1e-5"])
        assert config.model.options == {"init_values": 1e-5}

    def test_of_smoothed_labels_that_are_all_present(self, file: Path) -> None:
        load_config(file, ["train.loss=bce"])
        with pytest.raises(
            ConfigError, match=r"^augment\.label_smoothing: expected 0 .*, got 0\.1"
        ):
            load_config(file, ["train.loss=bce", "augment.label_smoothing=0.1"])

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("data.val=null", r"^data\.val: expected a path, or data\.val_share"),
            ("data.val_share=1.0", r"^data\.val_share: expected less than 1, got 1\.0"),
            (
                "model.num_classes=many",
                r"^model\.num_classes: expected an integer above 0, or auto",
            ),
            ("model.num_classes=0", r"or auto, got 0$"),
            ("model.num_classes=true", r"or auto, got True$"),
        ],
    )
    def test_data_and_classes(self, override: str, message: str, file: Path) -> None:
        with pytest.raises(ConfigError, match=message):
            load_config(file, [override])

    @pytest.mark.parametrize("section", ["name", "model", "data"])
    def test_what_is_required(self, section: str, file: Path) -> None:
        file.write_text("\n".join(x for x in MINIMAL.splitlines() if not x.startswith(section)))
        with pytest.raises(ConfigError, match=f"^{section}: expected a value, got nothing"):
            load_config(file)
