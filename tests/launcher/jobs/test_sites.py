"""Site profiles: what a cluster wants in every job; wrong ones are refused in one line that shows no secret."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, TINY, vernier

from configs.errors import ConfigError
from launcher.jobs.site import Site, load_site

EXAMPLE = ROOT / "slurm" / "site.example.yaml"


def site(folder: Path, text: str) -> Site:
    path = folder / "site.yaml"
    path.write_text(text)
    return load_site(str(path))


def test_the_example_loads_and_shows_every_key() -> None:
    example = load_site(str(EXAMPLE))
    told = "\n".join(line.removeprefix("# ") for line in EXAMPLE.read_text().splitlines())
    for model in (Site, type(example.queue), type(example.container)):
        for key in model.model_fields:
            assert f"\n{key}:" in told or f"\n  {key}:" in told, key


def test_every_commented_key_of_the_example_is_right_as_well(tmp_path: Path) -> None:
    key = re.compile(r"# ((  )?[a-z_]+: )")
    everything_told = "\n".join(key.sub(r"\1", line) for line in EXAMPLE.read_text().splitlines())
    everything = site(tmp_path, everything_told)
    assert everything.eval_queue is not None
    assert everything.environment_file is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("queue: {account: my group}", "queue.account: 'my group' has a character that sbatch would misread"),
        ("queue: {partition: $(x)}", "queue.partition: '$(x)' has a character"),
        ('queue: {qos: "a\\nb"}', "queue.qos: 'a\\nb' has a character"),
        ("queue: {sbatch: [mail-type=FAIL]}", "'mail-type=FAIL' should be one option of sbatch"),
        ('queue: {sbatch: ["--x=1\\n#SBATCH --y"]}', "should be one option of sbatch"),
        ("queue: {partitoin: x}", "queue.partitoin: unknown key; known: partition, account,"),
        ("gpu: 8", "gpu: unknown key; known: queue, eval_queue, gpus_per_node"),
        ('gpu_type: "a100\\n#SBATCH --x"', "gpu_type: 'a100\\n#SBATCH --x' should match"),
        ("memory: 64 GB", "memory: '64 GB' should match"),
        ("login: -oProxyCommand=x", "login: '-oProxyCommand=x' should"),
        ('scratch: "/tmp; x"', "scratch: '/tmp; x' should be a path"),
        ("scratch: tmp", "scratch: 'tmp' should be a path"),
        ("scratch: /tmp/$(x)", "scratch: '/tmp/$(x)' should be a path"),
        ("modules: cuda", "modules: 'cuda' should be a valid list"),
        ("environment: {TMPDIR: /x}", "environment: TMPDIR is set in every job; scratch names its folder"),
        ("environment: {A-B: x}", "environment: 'A-B' is no name of a variable"),
        ("environment: {A: [x]}", "environment.A: should be text, true, false or a number"),
        ("environment: {A: }", "environment.A: is null or empty, and should be text; write '' for empty text"),
        ("environment: {A: null}", "environment.A: is null or empty, and should be text"),
        ("environment: {A: 1, A: 2}", "line 1: the key 'A' is given twice"),
        ("gpus_per_node: 4\nmemory: 64G\ngpus_per_node: 8", "line 3: the key 'gpus_per_node' is given twice"),
        ("gpus_per_node: 010", "gpus_per_node: '010' should be a valid integer"),
        ("container: {kind: pyxis}", "container.image: missing; pyxis needs one"),
        ("container: {kind: docker}", "container.kind: 'docker' should be 'none', 'pyxis', 'enroot' or 'apptainer'"),
        ("just words", "expected settings as `key: value` lines, found a single value"),
    ],
)
def test_a_wrong_profile_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        site(tmp_path, text)
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"--site: {tmp_path / 'site.yaml'}: ")
    assert "\n" not in str(refused.value)


def test_variables_and_other_texts_are_taken_to_the_letter(tmp_path: Path) -> None:
    told = site(
        tmp_path,
        "environment: {A: 0644, B: 1:20, C: on, D: 1e3, E: 007, F: 2024-01-01, G: 1.10, H: true, I: 1_000, J: ''}\n"
        "modules: [12.10, 1:20]\nqueue: {account: 0042, partition: on}\ngpu_type: 3090\nmemory: 0\n",
    )
    assert told.environment == {
        "A": "0644", "B": "1:20", "C": "on", "D": "1e3", "E": "007",
        "F": "2024-01-01", "G": "1.10", "H": "true", "I": "1_000", "J": "",
    }  # fmt: skip
    assert told.modules == ["12.10", "1:20"]
    assert (told.queue.account, told.queue.partition, told.gpu_type, told.memory) == ("0042", "on", "3090", "0")
    script = vernier(
        "launch", TINY, f"run.dir={tmp_path / 'run'}", "--site", tmp_path / "site.yaml", "--dry-run"
    ).stdout
    assert "\nexport A=0644\nexport B=1:20\nexport C=on\nexport D=1e3\nexport E=007\n" in script


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "my_credentials"]
)
def test_a_secret_in_a_profile_is_refused_without_being_shown(name: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"environment: {{{name}: hush-hush}}")
    done = vernier("launch", TINY, "--site", path, "--dry-run", code=2)
    assert f"{name} looks like a secret" in done.stderr
    assert "environment_file" in done.stderr
    assert "hush" not in done.stdout + done.stderr


def test_a_profile_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "vernier" / "sites"
    folder.mkdir(parents=True)
    assert load_site(None) == Site()
    (folder / "near.yaml").write_text("gpus_per_node: 4\ntemplate: mine\nenvironment_file: ~/secrets\n")
    near = load_site("near")
    assert near.gpus_per_node == 4
    assert near.template == folder / "mine"  # beside the profile
    assert near.environment_file == Path.home() / "secrets"
    (folder / "default.yaml").write_text("gpus_per_node: 2\n")
    assert load_site(None).gpus_per_node == 2
    with pytest.raises(ConfigError, match=r"--site: far is no file, and no profile in .* \(there: default, near\)"):
        load_site("far")


def test_what_a_run_asks_for_counts_before_its_site(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("gpus_per_node: 8\nmemory: 64G\n")
    plain = ["launch", TINY, f"run.dir={tmp_path / 'run'}", "--site", path, "--dry-run"]
    assert "#SBATCH --gpus-per-node=8\n" in vernier(*plain).stdout
    asked = vernier(*plain, "launch.gpus_per_node=2", "launch.memory=8G").stdout
    assert "#SBATCH --gpus-per-node=2\n" in asked
    assert "#SBATCH --mem=8G\n" in asked


@pytest.mark.parametrize(
    "profile",
    [
        "environment: {WANDB_KEY: hush}",
        "environment: {DATABASE_URL: 'postgres://me:hush@db/x'}",
        "setup: ['export WANDB_API_KEY=hush']",
        "srun: ['--export=ALL,HF_TOKEN=hush']",
        "container: {kind: apptainer, image: a.sif, options: ['--env', 'MY_SECRET=hush']}",
        "queue: {sbatch: ['--export=ALL,MY_TOKEN=hush']}",
    ],
)
def test_whatever_reaches_a_script_is_looked_at_for_secrets(profile: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(profile + "\n")
    with pytest.raises(ConfigError) as caught:
        load_site(str(tmp_path / "site.yaml"))
    assert "looks like a secret" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_what_only_sounds_like_a_secret_is_taken(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        "environment: {TOKENIZERS_PARALLELISM: 'true', KEYBOARD: de}\nsetup: ['export HF_TOKEN=$(cat ~/.token)']\n"
    )
    assert load_site(str(tmp_path / "site.yaml")).environment["TOKENIZERS_PARALLELISM"] == "true"
