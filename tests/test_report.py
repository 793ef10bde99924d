"""What a run shows: pictures, the LoRA's files, the model card, curves, trackers."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_pipeline, make_small, randomise_lora
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import model as model_file
import report
import train
from lora import inject_lora, lora_off, lora_state
from run_folder import LORA


def test_a_grid_has_the_pictures_row_by_row(tmp_path):
    """Tiny ones are enlarged by a whole number; pictures of 128 pixels and more are not."""
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    images = colours[:, :, None, None].expand(3, 3, 32, 32).clone()
    images[0, :, :, :16] = 0.5
    report.save_grid(tmp_path / "a.png", images, 2)
    grid = Image.open(tmp_path / "a.png")
    assert grid.size == (2 * 128 + 3 * 4, 2 * 128 + 3 * 4)
    at = lambda column, row, x=100: grid.getpixel((4 + 132 * column + x, 4 + 132 * row + 64))
    assert (at(0, 0), at(1, 0), at(0, 1)) == ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    assert at(0, 0, 63) == (127, 127, 127) and at(0, 0, 64) == (255, 0, 0)
    assert grid.getpixel((1, 1)) == (255, 255, 255)
    report.save_grid(tmp_path / "b.png", torch.zeros(2, 3, 160, 160), 9)
    assert Image.open(tmp_path / "b.png").size == (332, 168)


def test_the_lora_in_diffusers_and_in_the_web_uis_layout(tmp_path):
    """train.py's model, `load_lora_weights(run)`, fused, and the web UI file: the same picture."""
    ours = make_pipeline()
    inject_lora(ours.unet)
    randomise_lora(ours.unet, 0.2)
    report.write_lora(tmp_path, lora_state(ours.unet))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        settings = dict(num_inference_steps=2, eta=1.0, guidance_scale=5.0, output_type="pt")
        noise = torch.Generator().manual_seed(4)
        return pipe("a cat", latents=latents.clone(), generator=noise, **settings).images

    def same(pipe):
        torch.testing.assert_close(picture(pipe), want, atol=1e-4, rtol=1e-4)

    base, theirs, want = make_pipeline(), make_pipeline(), picture(ours)
    assert (want - picture(base)).abs().max() > 1e-3
    base.load_lora_weights(tmp_path)
    same(base)
    base.fuse_lora()
    base.unload_lora_weights()
    same(base)
    state, webui = (load_file(tmp_path / f) for f in (LORA, "webui_lora.safetensors"))
    assert len(webui) == len(state) // 2 * 3 and all(k.startswith("lora_unet_") for k in webui)
    assert all(v == 4 for k, v in webui.items() if k.endswith(".alpha"))
    theirs.load_lora_weights(tmp_path, weight_name="webui_lora.safetensors")
    same(theirs)


def write_card(folder, **changes):
    """The model card of a run with these settings: front matter and body."""
    flags = ["--model", "none", "--device", "cpu", "--rounds", "2", "--queries", "12"]
    cfg = SimpleNamespace(**vars(train.parse_args(flags)) | changes)
    scores = dict(before=0.1234, after=0.25, gain=0.1266, error=0.01, n=45)
    summary = {"train_score": scores, "unseen_recognised": scores | {"gain": -0.5}}
    report.write_card(folder, cfg, summary, ["a 'quoted' cat", "a dog {x}"])
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return head, body


def test_the_card_of_a_model_of_the_hub(tmp_path):
    """Front matter that the hub reads, settings, every score, the prompts and a grid."""
    head, body = write_card(tmp_path, model=model_file.SD, image_size=256)
    assert f"base_model: {model_file.SD}\n" in head and "text-to-image" in head
    assert f'from_pretrained("{model_file.SD}")' in body and "height=256, width=256)" in body
    assert "24 reward queries\nin 2 rounds" in body and "the method ddpo-bpt-bs" in body
    assert "| train | score | 0.1234 | 0.2500 | +0.1266 | 0.0100 | 45 |" in body
    assert "| unseen | recognised | 0.1234 | 0.2500 | -0.5000 | 0.0100 | 45 |" in body
    assert "- a 'quoted' cat\n- a dog {x}" in body and "prediction_type" not in body
    assert "pipe(\"a 'quoted' cat\", num_inference_steps=20, guidance_scale=5.0, eta=1.0" in body


def test_the_card_of_a_local_base_names_no_path(tmp_path):
    """A folder or a file is no name on the hub; the tiny model is in this repository alone."""
    (tmp_path / "sd.safetensors").write_text("")
    head, body = write_card(tmp_path, model=str(tmp_path / "sd.safetensors"))
    assert "base_model" not in head and 'from_single_file("PATH OF sd.safetensors")' in body
    assert str(tmp_path) not in body
    head, body = write_card(tmp_path, model="tiny", prediction_type="v_prediction")
    assert "base_model" not in head and '"tiny"' not in body
    assert 'from_pretrained("PATH OF THE FOLDER tiny OF B2-DIFFURL\'S REPOSITORY")' in body
    assert 'timestep_spacing="leading", prediction_type="v_prediction")' in body


# ---------------------------------------------------------------- rounds, curves, trackers


def line(i, **more):
    values = {"round": i, "tau": 14, "queries": 12 * i, "reward_mean": 0.5 + i / 10}
    values |= {"kept": 3, "of": 12, "alone_on_prompt": 0, "kl_to_base": 0.25}
    return values | {"seconds": {"sampling": 1.0, "training": 2.5}} | more


def test_the_spread_is_within_a_prompt():
    """The std over its pictures, mean over prompts that have two or more."""
    thumbs = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = thumbs[[0, 2, 5]].numpy().std(0, ddof=1).mean(), thumbs[[1, 3]].numpy().std(0, ddof=1)
    got = report.spread(thumbs, ["cat", "dog", "cat", "dog", "bird", "cat"])
    assert got == pytest.approx((a + b.mean()) / 2, rel=1e-5)
    assert report.spread(thumbs[:2], ["cat", "dog"]) == 0.0


@torch.no_grad()
def test_kl_to_base_is_of_whole_states_in_nats(monkeypatch):
    """Summed over D, mean over states, of this process's roots; processes add up."""
    small = make_small(T=6, guidance=3.0)
    inject_lora(small.unet)
    randomise_lora(small.unet, 0.05)
    x = torch.randn(2, 2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    some, names = torch.tensor([[0, 3, 1], [1, 3, 0], [2, 5, 1], [3, 4, 0]]), ["cat", "dog"]
    want = []
    for p, k in ((0, 1), (0, 0), (1, 1)):  # root 4 is another process's
        for s, t in enumerate((5, 4, 3)):
            now = Normal(*small.policy(x[p, k, s][None], t, [names[p]]))
            with lora_off(small.unet):
                base = Normal(*small.policy(x[p, k, s][None], t, [names[p]]))
            want.append(kl_divergence(now, base).sum().item())
    own, sums = torch.tensor([3, 5]), []

    def with_another(total, device):
        sums.append(total.tolist())
        return total + torch.tensor([1.0, 7])

    got = report.kl_to_base(small, x, 5, names, own, some, 2)
    assert got == pytest.approx(sum(want) / 9, rel=1e-3) and got > 0
    monkeypatch.setattr(report, "all_sum", with_another)
    got = report.kl_to_base(small, x, 5, names, own, some, 100)
    assert got == pytest.approx((sum(want) + 1) / 16, rel=1e-3) and sums[0][1] == 9


def test_the_line_of_a_round():
    cfg = SimpleNamespace(rounds=4, threshold=0.5, min_count=0)
    text = report.round_line(line(2), cfg, 0.6)
    assert text.split("  ") == [
        *("round 2/4", "tau 14", "reward 0.7000 (+0.1000)", "kept 3 of 12", "KL 0.250", "3.5 s")
    ]
    nothing = line(2, kept=0)
    del nothing["kl_to_base"]
    text = report.round_line(nothing, cfg, 0.6)
    assert "KL" not in text and "no branch passed --threshold 0.5" in text


@pytest.mark.parametrize("alone, i, count, told", [(4, 1, 0, 1), (3, 1, 0, 0), (4, 2, 0, 0)])
def test_scores_that_teach_nothing_are_told_once(alone, i, count, told):
    cfg = SimpleNamespace(rounds=4, threshold=0.5, min_count=count)
    text = report.round_line(line(i, alone_on_prompt=alone), cfg, 0.6)
    assert text.count("--min-count 16") == told
    cfg.min_count = 16  # they are normalised by the round
    assert "--min-count" not in report.round_line(line(1, alone_on_prompt=9), cfg, 0.6)


def test_curves_and_pictures_before_and_after(tmp_path):
    """curves.png of what there is; the rows before stand above those after."""
    widths = []
    for more in ({}, {"recognised": 0.5}):  # a panel more, where there is a judge
        lines = [line(1, **more), line(2, clip_fraction=0.1), line(3)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in lines))
        report.plot_curves(tmp_path)
        width, height = Image.open(tmp_path / "curves.png").size
        widths.append(width)
    assert widths[0] > 2 * height > 0 and widths[1] == widths[0] + 400
    (tmp_path / "grids").mkdir()
    for when, colour in (("before", "red"), ("after", "blue")):
        Image.new("RGB", (90, 400), colour).save(tmp_path / f"grids/{when}-train.png")
    report.before_after(tmp_path, "train")
    both = Image.open(tmp_path / "before-after.png")
    assert both.size == (90, 72) and both.getpixel((5, 29)) == (255, 0, 0)
    assert both.getpixel((5, 42)) == (0, 0, 255) and both.getpixel((5, 35)) == (255, 255, 255)


def test_trackers_are_known_and_installed(monkeypatch, capsys):
    report.check_trackers(None)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    for names, words in (("paper", "unknown --report-to paper"), ("wandb", "pip install wandb")):
        with pytest.raises(SystemExit) as stop:
            report.check_trackers(names)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_tensorboard_gets_numbers_and_pictures_by_queries(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    cfg = SimpleNamespace(report_to="tensorboard")
    track = report.open_trackers(cfg, tmp_path)
    track({"reward_mean": 0.5, "of": 12, "skip": None}, 24)
    track({"pictures": picture}, 48)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"reward_mean", "of"}
    assert [(e.step, e.value) for e in events.Scalars("reward_mean")] == [(24, 0.5)]
    assert [e.step for e in events.Images("pictures")] == [48]
    report.open_trackers(SimpleNamespace(report_to=None), tmp_path)({"a": 1.0}, 0)  # nothing
