"""What a run shows: a round's numbers and line, pictures, the LoRA's files, the card, trackers."""

import json
import math
import shlex
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_pipeline, randomise_lora
from PIL import Image
from safetensors.torch import load_file

import train
from lora import inject_lora, lora_state
from support import report
from support.command import Stop
from support.pipeline import SD
from support.report import TrainingLog
from support.run_folder import LORA

CPU = torch.device("cpu")

# ---------------------------------------------------------------- a round's numbers


def micro_batches(seed, sizes):
    """For each size log p, log p_old, a share of the loss and DPO's h, at random."""
    draw = torch.Generator().manual_seed(seed)
    for size in sizes:
        log_p_old = torch.randn(size, generator=draw)
        log_p = log_p_old + 0.1 * torch.randn(size, generator=draw)
        h = torch.randn(size // 2, generator=draw)
        yield log_p.requires_grad_(), log_p_old, torch.randn((), generator=draw), h


def test_the_numbers_of_a_round_are_those_of_a_plain_computation():
    """Over micro-batches of unlike sizes in three updates; a new round starts at 0."""
    log = TrainingLog(clip_range=0.1)
    updates = [(3, 5), (4,), (2, 2, 7)]
    norms = [0.5, 2.0, 0.75]
    for seed in (0, 1):
        ratios, hs, losses = [], [], []
        for i, sizes in enumerate(updates):
            for log_p, log_p_old, loss, h in micro_batches(10 * seed + i, sizes):
                log.add(log_p, log_p_old, loss, h)
                difference = log_p.detach().double().numpy() - log_p_old.double().numpy()
                ratios.append((i, np.exp(difference)))
                hs.append(np.abs(h.numpy()))
                losses.append(loss.item())
            log.end_update(torch.tensor(norms[i]), 10 + i)
        found = log.end_round(CPU)
        first = np.concatenate([ratio for i, ratio in ratios if i == 0])
        every = np.concatenate([ratio for _, ratio in ratios])
        assert (found["updates"], found["skipped_updates"]) == (3, 0)
        assert found["trajectories_per_update"] == [10, 11, 12]
        assert found["first_ratio"] == pytest.approx(first.mean(), rel=1e-6)
        assert found["first_max_log_ratio"] == pytest.approx(np.abs(np.log(first)).max(), rel=1e-5)
        clipped = (every > 1.1) | (every < 0.9)
        assert 0 < clipped.mean() < 1 and clipped[: len(first)].mean() != clipped.mean()
        assert found["clip_fraction"] == pytest.approx(clipped.mean())
        assert found["mean_abs_h"] == pytest.approx(np.concatenate(hs).mean(), rel=1e-6)
        assert found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)  # a mean over updates
        assert found["grad_norm"] == pytest.approx(sum(norms) / 3)
        json.dumps(found)


def test_without_pairs_and_without_updates():
    log = TrainingLog(0.1)
    assert log.end_round(CPU) == {"updates": 0, "skipped_updates": 0, "trajectories_per_update": []}
    log.add(torch.ones(2), torch.ones(2), torch.tensor(0.5))
    log.end_update(torch.tensor(1.0), 2)
    found = log.end_round(CPU)
    assert (found["mean_abs_h"], found["first_ratio"], found["loss"]) == (0, 1, 0.5)
    assert found["first_max_log_ratio"] == 0 and found["clip_fraction"] == 0


def test_the_numbers_are_of_all_processes(monkeypatch):
    """Ratios of sums, not means of ratios; the maximum is a maximum."""
    batches = list(micro_batches(0, (3, 9)))
    want, one, other = TrainingLog(0.1), TrainingLog(0.1), TrainingLog(0.1)
    for batch, log in zip(batches, (one, other)):
        log.add(*batch)
        want.add(*batch)
    for log in (want, one, other):
        log.end_update(torch.tensor(2.0), 12)
    want = want.end_round(CPU)
    monkeypatch.setattr(report, "all_sum", lambda v, device: v + other.totals)
    monkeypatch.setattr(report, "all_max", lambda v, device: torch.maximum(v, other.largest))
    found = one.end_round(CPU)
    assert found.pop("trajectories_per_update") == want.pop("trajectories_per_update") == [12]
    assert found == pytest.approx(want)


def test_skipped_updates_are_counted_and_five_in_a_row_end_the_run():
    """Also over rounds; a good one in between starts anew."""
    log = TrainingLog(0.1)
    good, bad = torch.tensor(1.0), (torch.tensor(math.nan), torch.tensor(math.inf))

    def update(norm):
        log.add(torch.ones(2), torch.ones(2), torch.tensor(0.5))
        log.end_update(norm, 2)

    for norm in (bad[0], bad[1], bad[0], bad[1], good, bad[0], bad[0]):
        update(norm)
    found = log.end_round(CPU)
    assert (found["updates"], found["skipped_updates"]) == (1, 6)
    assert len(found["trajectories_per_update"]) == 7 and not math.isfinite(found["grad_norm"])
    update(bad[0])
    update(bad[1])
    assert log.end_round(CPU)["skipped_updates"] == 2
    with pytest.raises(Stop, match="5 updates in a row .*--lr or --clip-range"):
        update(bad[0])


def test_the_clock_tells_the_seconds_of_each_phase(monkeypatch):
    times = iter([1.0, 1.5, 4.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(times))
    clock = report.Clock()
    for phase in ("sampling", "reward", "training"):
        clock.start(phase)
    assert clock.stop() == {"sampling": 0.5, "reward": 2.5, "training": 6.0}
    clock.start("sampling")  # the next round
    assert clock.stop() == {"sampling": 1.0}


def test_the_spread_is_within_a_prompt():
    """The std over its pictures, mean over prompts that have two or more."""
    thumbs = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = thumbs[[0, 2, 5]].numpy().std(0, ddof=1).mean(), thumbs[[1, 3]].numpy().std(0, ddof=1)
    got = report.spread(thumbs, ["cat", "dog", "cat", "dog", "bird", "cat"])
    assert got == pytest.approx((a + b.mean()) / 2, rel=1e-5)
    assert report.spread(thumbs[:2], ["cat", "dog"]) == 0.0


# ---------------------------------------------------------------- lines on the screen


def line(i, **more):
    values = {"round": i, "tau": 14, "reward_mean": 0.5 + i / 10}
    values |= {"kept": 3, "of": 12, "alone_on_prompt": 0, "kl_to_base": 0.25}
    return values | {"seconds": {"sampling": 60.0, "training": 40.25}} | more


CFG = SimpleNamespace(rounds=5, threshold=0.5, T=20)


def test_the_line_of_a_round():
    text = report.round_line(line(2), CFG, 0.6)
    assert text.split("  ") == [
        *("round 2/5", "tau 14", "reward 0.7000 (+0.1000)", "kept 3 of 12", "KL 0.250"),
        "100.2 s, about 6 min left",  # three of 100.25 s times the mean of 14 and 20 over 14
    ]
    assert "(-0.2000)" in report.round_line(line(2), CFG, 0.9)
    assert report.round_line(line(5), CFG, 0.6).endswith("about 0 min left")


def test_a_round_that_trains_on_nothing_says_so():
    nothing = line(2, kept=0)
    del nothing["kl_to_base"]
    text = report.round_line(nothing, CFG, 0.6)
    assert "kept 0 of 12" in text and "\n  no branch passed --threshold 0.5: no update" in text
    assert "no branch" not in report.round_line(line(2, kept=1), CFG, 0.6)


@pytest.mark.parametrize("alone, told", [(0, 0), (6, 0), (7, 1), (12, 1)])
def test_scores_that_are_alone_on_their_prompt_are_told(alone, told):
    """Where they are more than half: nearly every root then passes Eq. 5."""
    text = report.round_line(line(2, alone_on_prompt=alone), CFG, 0.6)
    assert text.count("Pass --min-count 16") == told == text.count(f"\n  {alone} scores are of")


def test_the_first_and_the_last_lines(tmp_path):
    """Commands are such that a shell reads them as they are meant."""
    cfg = parsed("--rounds", "7", "--no-bs")
    assert report.first_lines(cfg, "there", 2).splitlines() == [
        "Training none on cpu (fp32, processes: 2).",
        "there: ddpo-bpt, 7 rounds of 255 queries (roots of 1 branches), lr 0.0001, seed 0",
    ]
    assert "Training the bundled tiny model" in report.first_lines(train.parse_args([]), "x", 1)
    prompt = """a "red" fox, $5 in `it's` paw"""
    lines = report.last_lines("it's here", ["  row"], prompt).split("\n")
    assert lines[:3] == ["", "Scores before and after, same noise:", "  row"]
    words = shlex.split(lines[-1].removeprefix("Draw: "))
    assert words == ["python", "eval.py", "--lora", "it's here", "--prompt", prompt]
    assert report.last_lines("x", [], "a cat").startswith("Pictures: x/before-after.png")


# ---------------------------------------------------------------- pictures


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


@pytest.mark.parametrize(
    "prompts, each, workers, numbers",
    [
        (20, 2, 1, range(0, 18, 2)),  # from all over the list, the first picture of each
        (20, 2, 3, range(0, 20, 3)),  # the first process drew every third
        (100, 2, 1, range(0, 72, 8)),  # the grid has 72
        (100, 1, 2, range(0, 100, 10)[:9]),
        (9, 1, 1, range(9)),
        (2, 1, 1, range(2)),
        (5, 4, 1, range(5)),
        (1, 2, 1, range(1)),
        (2, 1, 3, range(1)),
    ],
)
def test_before_above_after_with_the_right_titles_and_ticks(
    tmp_path, monkeypatch, prompts, each, workers, numbers
):
    """Picture number j is of prompt j % prompts; its pixels are as bright as j says."""
    total = prompts * each
    words = [f"prompt {n} {'x ' * 9}" for n in range(prompts)]
    grey = torch.linspace(0, 1, total).view(total, 1, 1, 1).expand(total, 3, 128, 128)
    (tmp_path / "grids").mkdir()
    found = {}
    for when, shown in (("before", grey), ("after", 1 - grey)):
        drawn = shown[::workers][: report.GRID].clone()
        drawn[:, 0, :2] = drawn[:, 0, -2:] = 1  # red above and below
        drawn[:, 1, :, :2] = drawn[:, 1, :, -2:] = 1  # green left and right
        report.save_grid(tmp_path / f"grids/{when}-train.png", drawn, report.COLUMNS)
        right = [float(n % 3 == (when == "after")) for n in range(total)]
        found[when] = {"score": [0.0] * total, "recognised": right}
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append((figure, path)))
    report.before_after(tmp_path, "train", words, found["before"], found["after"], workers)
    (figure, path) = figures[0]
    assert path == tmp_path / "before-after.png" and len(figure.axes) == 18
    for row, when in enumerate(("before", "after")):
        axes = figure.axes[9 * row : 9 * row + 9]
        shown = [ax for ax in axes if ax.images]
        assert len(shown) == len(numbers) and shown == axes[: len(shown)]
        for ax, number in zip(shown, numbers):
            picture = ax.images[0].get_array()[..., :3]
            level = 255 * (number / max(1, total - 1) - row) * (1 - 2 * row)
            assert picture[64, 64].tolist() == pytest.approx([level] * 3, abs=1), (when, number)
            title = " ".join(ax.get_title().split())
            assert title == (words[number].strip() if row == 0 else "")
            texts = [text.get_text() for text in ax.texts]
            assert ("\u2713 right" in texts) == (number % 3 == row)
            assert (when in texts) == (ax is axes[0])
            if len(found["before"]["score"][::workers]) > 1:  # the whole picture, no border
                assert picture.shape[:2] == (128, 128)
                assert (picture[[0, -1], 64, 0] == 255).all()
                assert (picture[64, [0, -1], 1] == 255).all()
    report.pyplot().close(figure)


def test_without_a_judge_there_are_no_ticks_and_the_file_is_a_picture(tmp_path):
    (tmp_path / "grids").mkdir()
    for when in ("before", "after"):
        path = tmp_path / f"grids/{when}-unseen.png"
        report.save_grid(path, torch.rand(2, 3, 16, 16), report.COLUMNS)
    scores = {"score": [0.5, 1.0], "recognised": None}
    open_figures = len(report.pyplot().get_fignums())
    report.before_after(tmp_path, "unseen", ["a cat", "$x_2$ costs $5"], scores, scores)
    assert Image.open(tmp_path / "before-after.png").width > 600
    assert len(report.pyplot().get_fignums()) == open_figures


# ---------------------------------------------------------------- what others load


def test_the_lora_in_diffusers_and_in_the_web_uis_layout(tmp_path):
    """train.py's model, `load_lora_weights(run)`, fused, and the web UI file: the same picture."""
    ours = make_pipeline()
    inject_lora(ours.unet)
    randomise_lora(ours.unet, 0.2)
    run = tmp_path / "my run"
    run.mkdir()
    name = report.write_lora(run, lora_state(ours.unet))
    assert name == "my run_webui.safetensors"
    assert {path.name for path in run.iterdir()} == {name, LORA}
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
    base.load_lora_weights(run)  # of the two files it finds ours
    same(base)
    base.fuse_lora()
    base.unload_lora_weights()
    same(base)
    state, webui = (load_file(run / f) for f in (LORA, name))
    assert len(webui) == len(state) // 2 * 3 and all(k.startswith("lora_unet_") for k in webui)
    assert all(v == 4 for k, v in webui.items() if k.endswith(".alpha"))
    theirs.load_lora_weights(run, weight_name=name)
    same(theirs)


def test_the_web_uis_file_has_the_runs_name_from_within_its_folder(tmp_path, monkeypatch):
    (tmp_path / "my-run").mkdir()
    monkeypatch.chdir(tmp_path / "my-run")
    state = {"unet.a.to_q.lora_A.weight": torch.ones(2, 4)}
    state["unet.a.to_q.lora_B.weight"] = torch.ones(4, 2)
    assert report.write_lora(report.Path("."), state) == "my-run_webui.safetensors"


def parsed(*flags):
    return train.parse_args(["--model", "none", "--device", "cpu", *flags])


def write_card(folder, prompts=("a 'quoted' cat", "a dog {x}"), **changes):
    """The model card of a run with these settings: front matter and body."""
    cfg = SimpleNamespace(**vars(parsed("--rounds", "2", "--queries", "12")) | changes)
    scores = dict(before=0.1234, after=0.25, gain=0.1266, error=0.01, n=45)
    summary = {"train_score": scores, "unseen_recognised": scores | {"gain": -0.5}}
    report.write_card(folder, cfg, summary, list(prompts), "mine_webui.safetensors")
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return head, body


def test_the_card_of_a_model_of_the_hub(tmp_path):
    """Front matter that the hub reads, settings, every score, the prompts and a grid."""
    reward = f"{tmp_path}/secret/mine.py:score"
    head, body = write_card(tmp_path, model=SD, image_size=256, reward=reward)
    assert f"base_model: {SD}\n" in head and "text-to-image" in head
    assert f'from_pretrained("{SD}")' in body and "height=256, width=256)" in body
    assert "24 reward queries\nin 2 rounds, seed 0" in body and "the method ddpo-bpt-bs" in body
    assert "the reward `mine.py:score`" in body and "secret" not in body
    assert "| train | score | 0.1234 | 0.2500 | +0.1266 | 0.0100 | 45 |" in body
    assert "| unseen | recognised | 0.1234 | 0.2500 | -0.5000 | 0.0100 | 45 |" in body
    assert body.endswith("- a 'quoted' cat\n- a dog {x}\n") and "prediction_type" not in body
    assert "pipe(\"a 'quoted' cat\", num_inference_steps=20, guidance_scale=5.0, eta=1.0" in body
    assert "`mine_webui.safetensors` is the same LoRA" in body and "base has the LoRA" not in body


def test_the_card_of_a_local_base_names_no_path(tmp_path):
    """A folder or a file is no name on the hub; the tiny model is in this repository alone."""
    (tmp_path / "sd.safetensors").write_text("")
    model = str(tmp_path / "sd.safetensors")
    head, body = write_card(tmp_path, model=model, base_lora="org/style")
    assert "base_model" not in head and 'from_single_file("PATH OF sd.safetensors")' in body
    assert str(tmp_path) not in body and "The base has the LoRA org/style in it." in body
    head, body = write_card(tmp_path, model="tiny", prediction_type="v_prediction")
    assert "base_model" not in head and 'from_pretrained("PATH OF tiny")' in body
    assert 'timestep_spacing="leading", prediction_type="v_prediction")' in body


@pytest.mark.parametrize("count, more", [(1, ""), (20, ""), (21, "- ... 21 in all"), (999, "999")])
def test_the_card_lists_at_most_twenty_prompts_and_says_how_many(tmp_path, count, more):
    _, body = write_card(tmp_path, [f"prompt {n}" for n in range(count)])
    lines = body.split("## Training prompts\n\n")[1].splitlines()
    assert lines[: min(count, 20)] == [f"- prompt {n}" for n in range(min(count, 20))]
    assert len(lines) == min(count, 20) + (count > 20) and more in lines[-1]


# ---------------------------------------------------------------- trackers


class Spy:
    """Whatever is called on it, it writes down."""

    def __init__(self, calls, name=""):
        self.calls, self.name = calls, name

    def __getattr__(self, name):
        return Spy(self.calls, f"{self.name}.{name}".lstrip("."))

    def __call__(self, *rest, **more):
        self.calls.append((self.name, rest, more))
        return self


@pytest.fixture
def trackers(monkeypatch):
    """What tensorboard and wandb were told, in their place."""
    calls = []
    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter = Spy(calls, "SummaryWriter")
    wandb.init = Spy(calls, "init")
    wandb.errors = SimpleNamespace(Error=ZeroDivisionError)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: name)
    return calls


def open_trackers(run, names, rounds=None, worker=0):
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text('{"model": "m", "rounds": 9, "wandb_id": "abc"}')
    saved = (None, None) if rounds is None else ({}, {"rounds_done": rounds})
    cfg = SimpleNamespace(report_to=names, queries=12)
    return report.open_trackers(cfg, run, saved, worker)


METRICS = {"reward_mean": 0.5, "of": 12, "sizes": [1, 2], "skip": None, "seconds": {"a": 1}}


def test_tensorboard_gets_the_numbers_by_queries(trackers, tmp_path):
    """A resume overwrites what came after the checkpoint. The files lie beside the run."""
    track = open_trackers(tmp_path / "run", ["tensorboard"], rounds=3)
    name, rest, more = trackers.pop()
    assert (name, more) == ("SummaryWriter", {"purge_step": 37})  # the 36 of three rounds are there
    assert rest == (tmp_path / "run-trackers/tensorboard",)
    track(METRICS, 48)
    told = [rest for name, rest, _ in trackers if name == "SummaryWriter.add_scalar"]
    assert told == [("reward_mean", 0.5, 48), ("of", 12, 48)]
    assert trackers[-1][0] == "SummaryWriter.flush"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_wandb_gets_the_runs_own_id(trackers, tmp_path):
    """That of config.json: two runs in folders of one name are two, a resumed one is one."""
    track = open_trackers(tmp_path / "run", ["wandb"])
    name, _, more = trackers[0]
    assert name == "init" and (more["id"], more["name"], more["resume"]) == ("abc", "run", "allow")
    assert more["dir"] == f"{tmp_path}/run-trackers" and (tmp_path / "run-trackers").is_dir()
    assert trackers[1] == ("init.define_metric", ("*",), {"step_metric": "queries"})
    track(METRICS, 24)
    assert trackers[2] == ("init.log", ({"reward_mean": 0.5, "of": 12, "queries": 24},), {})


def test_both_trackers_none_and_other_processes(trackers, tmp_path):
    track = open_trackers(tmp_path / "run", ["tensorboard", "wandb"])
    assert trackers[0][2] == {"purge_step": 1}
    track({"a": 1.0}, 24)
    assert [name for name, *_ in trackers[-3:]] == [
        *("SummaryWriter.add_scalar", "SummaryWriter.flush", "init.log")
    ]
    trackers.clear()
    open_trackers(tmp_path / "run", ["tensorboard", "wandb"], worker=1)({"a": 1.0}, 24)
    open_trackers(tmp_path / "run", [])({"a": 1.0}, 24)
    assert not trackers


def test_wandb_without_a_key_ends_with_one_line(trackers, tmp_path, monkeypatch):
    def no_key(**more):
        raise ZeroDivisionError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_key)
    with pytest.raises(Stop, match="--report-to wandb: no API key .WANDB_MODE=offline"):
        open_trackers(tmp_path / "run", ["wandb"])


def test_a_tracker_that_is_not_installed_ends_with_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    for name in report.TRACKERS:
        with pytest.raises(SystemExit) as stop:
            open_trackers(tmp_path / "run", [name])
        said = f"error: --report-to {name}: pip install {name}\n"
        assert stop.value.code == 2 and capsys.readouterr().err == said


def test_tensorboard_itself_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    open_trackers(tmp_path / "run", ["tensorboard"])(METRICS, 24)
    events = EventAccumulator(str(tmp_path / "run-trackers/tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"reward_mean", "of"}
    assert [(e.step, e.value) for e in events.Scalars("reward_mean")] == [(24, 0.5)]
