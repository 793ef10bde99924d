"""The README's command on the bundled tiny model, cut short, and the pictures of its LoRA."""

import json

import pytest
import torch
from conftest import ROOT

import eval as evaluation
import train

pytestmark = pytest.mark.skipif(
    not (ROOT / "tiny" / "model_index.json").exists(), reason="the tiny model is not built"
)


def test_the_readme_command_trains_scores_and_draws(tmp_path, capsys):
    run = tmp_path / "run"
    train.main(["--reward", "clip", "--template", "1", "--model", "tiny", "--device", "cpu",
                "--out", str(run), "--rounds", "2", "--queries", "16", "--T", "4", "--tau0", "2",
                "--skip-last", "0",
                "--eval-images", "1", "--update-size", "4"])  # fmt: skip
    said = capsys.readouterr().out
    assert said.startswith("Training the bundled tiny model on cpu") and "--model" in said
    assert "train   clip" in said and "unseen  judge" in said and f"--lora {run}" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["tau"] for line in lines] == [2, 4]
    assert lines[0]["first_max_log_ratio"] <= 0.01 * 3e-3
    for name in ("before-train", "before-unseen", "after-train", "after-unseen"):
        assert (run / "grids" / f"{name}.png").stat().st_size > 1000

    evaluation.main(["--lora", str(run), "--prompt", "a cat washing dishes", "--images", "2",
                     "--out", str(tmp_path / "eval")])  # fmt: skip
    assert "| base |" in capsys.readouterr().out
    assert (tmp_path / "eval" / "grid.png").exists()


def test_the_tiny_pipeline_draws_in_diffusers_alone():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "tiny")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a cat washing dishes", num_inference_steps=4, eta=1.0, guidance_scale=5.0,
                 output_type="pt", generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert image.shape == (1, 3, 64, 64) and image.std() > 0.02
