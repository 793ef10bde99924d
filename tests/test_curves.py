"""studies/curves.py: which runs are drawn, how seeds are averaged, how methods differ."""

import json

import numpy as np
import pytest

from studies import curves

CONFIG = {"model": "tiny", "rounds": 2, "algo": "ddpo", "no_bpt": True, "no_bs": True}
CONFIG |= {"reward": "clip", "lr": 1e-3, "made_with": {"torch": "1"}}


def write_run(folder, rewards, gains=None, **settings):
    """A run folder whose rounds have these mean rewards; gains: of its pictures."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"seed": 0} | settings))
    lines = []
    for i, reward in enumerate(rewards):
        line = {"round": i + 1, "queries": 10 * (i + 1), "reward_mean": reward}
        line |= {"recognised": reward / 10, "spread_within_prompt": 0.2 / (i + 1)}
        sampling = 40.0 * (i + 1) + 12 * settings.get("seed", 0)
        lines.append(line | {"seconds": {"sampling": sampling, "training": 20.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if gains is not None:
        summary = {"train_score": {"gain": sum(gains) / len(gains)}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        curves.main([str(word) for word in argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_seeds_are_one_line_and_other_folders_are_another(tmp_path):
    write_run(tmp_path / "ddpo-seed0", [1.0, 2.0])
    write_run(tmp_path / "ddpo-seed1", [3.0, 6.0], seed=1)
    write_run(tmp_path / "ddpo-bpt-seed0-lr0.002", [0.0, 1.0], no_bpt=False)
    found = {label: list(seeds) for label, seeds in curves.find_runs([tmp_path]).items()}
    assert found == {f"{tmp_path}/ddpo-bpt-lr0.002": [0], f"{tmp_path}/ddpo": [0, 1]}


def test_the_names_that_train_py_gives_are_one_line(tmp_path):
    """Its default folders: of seeds alone, and of two rates."""
    from support.run_folder import default_folder

    cfg = CONFIG | {"prompts": None, "template": 1}
    for seed, given in ((0, {}), (1, {}), (0, {"lr": 2e-3})):
        name = default_folder(cfg | {"seed": seed}, given)
        write_run(tmp_path / name, [1.0, 2.0], seed=seed)
    assert [list(seeds) for seeds in curves.find_runs([tmp_path]).values()] == [[0, 1], [0]]


def test_a_curve_is_the_mean_over_seeds_at_queries_that_all_have(tmp_path):
    write_run(tmp_path / "a-seed0", [1.0, 2.0, 9.0], rounds=3)
    write_run(tmp_path / "a-seed1", [3.0, 7.0, 8.0], seed=1, rounds=3)
    (seeds,) = curves.find_runs([tmp_path]).values()
    runs = [lines for _, lines in seeds.values()]
    minutes, rewards = curves.curve([runs[0], runs[1][:2]], "minutes", "reward_mean")
    assert minutes.tolist() == pytest.approx([1.1, 2.8667], abs=1e-4)  # 60, 100 and 72, 112 seconds
    assert rewards.tolist() == [[1, 2], [3, 7]]
    mean, error = curves.over_seeds(rewards)
    assert mean.tolist() == [2, 4.5]
    assert error.tolist() == pytest.approx([1, 2.5])  # half the difference of two
    assert curves.over_seeds(rewards[:1])[1].tolist() == [0, 0]
    queries, spread = curves.curve(runs, "queries", "relative_spread")
    assert queries.tolist() == [10, 20, 30]
    assert spread == pytest.approx(np.array([[1, 1 / 2, 1 / 3]] * 2))
    assert curves.curve(runs, "queries", "kl_to_base")[1].size == 0
    runs[0][1]["new"] = 5.0  # of one run, at one of its rounds
    queries, new = curves.curve(runs, "queries", "new")
    assert queries.tolist() == [20] and new.tolist() == [[5]]


def test_a_picture_is_drawn_and_drawn_anew(tmp_path, capsys):
    write_run(tmp_path / "runs/a", [1.0, 2.0])
    write_run(tmp_path / "runs/cut", [1.0], seed=1)
    for _ in range(2):
        curves.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
        shown = capsys.readouterr().out
        assert "passed over" in shown and "cut has 1 of 2 rounds" in shown
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["curves.png"]


def test_methods_differ_by_the_seed(tmp_path, capsys):
    write_run(tmp_path / "A-seed0", [1.0, 2.0], [1.0, 0.0, 2.0])
    write_run(tmp_path / "A-seed1", [4.0, 4.0], [1.0, 0.0, 2.0], seed=1)
    write_run(tmp_path / "A-seed7", [9.0, 9.0], [9.0, 9.0, 9.0], seed=7)  # it has no pair
    write_run(tmp_path / "B-seed1", [5.0, 7.0], [1.0, 1.0, 3.0], seed=1, no_bs=False)
    write_run(tmp_path / "B-seed0", [2.0, 2.0], [2.0, 1.0, 3.0], no_bs=False)
    rows = curves.difference_rows(curves.find_runs([tmp_path]))
    # Rewards: 2 - 1.5 and 6 - 4, so .5 and 2: their mean, and their std over the root of 2.
    # Gains: the means 2 - 1 and 5/3 - 1
    name = f"{tmp_path}/B"
    rewards = [name, "reward_mean, all rounds", 2, "4.0000", "2.7500", "+1.2500 \u00b1 0.7500"]
    assert rows[0] == rewards
    gains = [name, "gain, train score", 2, "1.8333", "1.0000", "+0.8333 \u00b1 0.1667"]
    assert rows[-1] == gains
    curves.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "+1.2500 \u00b1 0.7500 |" in capsys.readouterr().out


def test_one_seed_has_no_error_over_seeds(tmp_path):
    write_run(tmp_path / "a", [1.0, 1.0])
    write_run(tmp_path / "b", [0.5, 0.5], no_bs=False)
    assert curves.difference_rows(curves.find_runs([tmp_path]))[0][-1] == "-0.5000"


def test_entropies_are_compared_where_both_runs_come():
    """b gets no further than .6, which a reaches half-way between its first and second LoRA."""
    a, b = [], []
    for run, points in (
        (a, [(0.4, 1.0), (0.5, 0.9), (0.45, 0.1), (0.7, 0.5)]),
        (b, [(0.4, 1.0), (0.6, 0.8), (0.5, 0.0)]),
    ):
        for share, entropy in points:
            run.append({"recognised_of_90": share, "style_entropy": entropy})
    assert curves.at_equal_recognition(a, b) == [[pytest.approx(0.7)], [pytest.approx(0.8)]]
    assert curves.at_equal_recognition(b, a) == [[pytest.approx(0.8)], [pytest.approx(0.7)]]
    worse = [a[0], {"recognised_of_90": 0.3, "style_entropy": 0.2}]  # it never gets better
    assert curves.at_equal_recognition(a, worse) == [[1.0], [1.0]]
    as_good = [a[0], {"recognised_of_90": 0.4, "style_entropy": 0.2}]  # no more than before
    assert curves.at_equal_recognition(as_good, as_good) == [[1.0], [1.0]]


def test_shares_are_compared_over_the_minutes_that_both_runs_have():
    """a rises by .1 a minute from minute 1 to 5, b from .2 by .2 a minute, from 2 to 4."""
    line = lambda n, minutes, share: {"queries": n, "minutes": minutes, "recognised": share}
    a = [line(192, 1, 0.1), line(384, 3, 0.3), line(576, 5, 0.5)]
    b = [line(192, 2, 0.2), line(384, 3, 0.4), line(576, 4, 0.6)]
    assert curves.at_equal_time(a, b) == [[pytest.approx(30)], [pytest.approx(40)]]
    assert curves.at_equal_time(b, a) == [[pytest.approx(40)], [pytest.approx(30)]]
    assert curves.at_equal_time(a, a) == [[pytest.approx(30)]] * 2


def test_runs_that_do_not_serve_end_with_one_line(tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    new = write_run(tmp_path / "new", [])
    assert "no run is finished" in fails(capsys, "--runs", new, *out)
    (tmp_path / "empty").mkdir()
    assert "no run is finished" in fails(capsys, "--runs", tmp_path / "empty", *out)
    (new / "config.json").write_text("[]")
    assert "holds no run" in fails(capsys, "--runs", new, *out)
