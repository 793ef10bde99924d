"""studies/verdict.py: the protocol's runs, what is kept of them, and the rules of the verdict."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from studies import curves, verdict

CLAIMS = [
    ["better", "Fig. 1", "recognition", "b2", "ddpo"],
    ["more diverse", "Table 1", "style entropy", "b2", "ddpo"],
    ["cheaper", "36 h", "minutes", "ddpo", "b2"],
    ["new", "Fig. 2", "recognition", "bs", "ddpo"],
    ["as fast", "control", "equal time", "b2", "ddpo"],
]
ROWS = {row: {"seeds": [200, 201], "flags": "--rounds 4"} for row in verdict.DRAWN}
ROWS |= {"bs": {"seeds": [200], "flags": "--rounds 4 --lr RATE-OF-B2"}}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results/ with a small protocol, and its folder of runs."""
    (tmp_path / "results/main").mkdir(parents=True)
    protocol = {"rows": ROWS, "claims": CLAIMS}
    (tmp_path / "results/protocol.json").write_text(json.dumps(protocol))
    monkeypatch.setattr(verdict, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(verdict, "ROOT", tmp_path)
    monkeypatch.setattr(verdict, "draw", lambda panels, path: None)  # it takes a second
    return tmp_path / "results"


def write_run(folder, recognised, gain=0.0, template=1, rounds=4, tau=14):
    """A finished run of `rounds` rounds, if there are as many shares."""
    folder.mkdir(parents=True)
    config = {"rounds": rounds, "template": template, "lr": 1e-3}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for i, share in enumerate(recognised):
        line = {"round": i + 1, "tau": tau + i, "queries": 192 * (i + 1), "recognised": share}
        lines.append(json.dumps(line | {"spread_within_prompt": 0.1 / (i + 1)}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    if len(recognised) == rounds:
        summary = {name: {"gain": gain} for name in verdict.ENDS}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"lora")
        for name in ("before", "after"):
            (folder / f"{name}.json").write_text(json.dumps({"train": {"score": [gain]}}))


def write_four(runs):
    """B² and DDPO, two seeds each: B² is better by .1 and .5, mean .3, error .2."""
    write_run(runs / "b2-seed200", [0.4, 0.5, 0.5, 0.6], 0.5)
    write_run(runs / "ddpo-seed200", [0.4, 0.4, 0.4, 0.4], 0.25)
    write_run(runs / "b2-seed201", [1.0, 0.9, 0.9, 1.0], 0.5)
    write_run(runs / "ddpo-seed201", [0.4, 0.4, 0.5, 0.5], 0.25)


def tables(results):
    """The rows of claims and of rows, as verdict.json has them, by their first cells."""
    verdict.main([])
    found = json.loads((results / "verdict.json").read_text())
    return [{line[0]: line[1:] for line in found[name]} for name in ("claims", "rows")]


# ---------------------------------------------------------------- the rules


def test_beyond_two_errors_a_claim_holds_or_does_not():
    differences = np.array([1.0, 2.0, 3.0])  # mean 2, error 1 / sqrt(3)
    assert verdict.verdict(differences) == "holds"
    assert verdict.verdict(-differences) == "does not hold"


@pytest.mark.parametrize("differences", ([1.0, -2.0, 3.0, 0.5], [0.0, -1.0], [-2.0, 1.0, 1.6]))
def test_else_it_says_how_many_seeds_would_tell(differences):
    """By brute force: the first n at which this mean and this spread are two errors apart."""
    x = np.array(differences)
    n = len(x)
    while abs(x.mean()) <= 2 * x.std(ddof=1) / n**0.5:
        n += 1
    assert verdict.verdict(x) == f"not resolved at {len(x)} seeds, {n} would"


def test_two_errors_are_not_beyond_two_errors():
    assert verdict.verdict(np.array([0.0, 4.0, 2.0, 0.0, 4.0])) == "holds"  # 2, error .894
    x = np.array([0.0, 2.0])  # mean 1, error 1
    assert verdict.verdict(x) == "not resolved at 2 seeds, 9 would"  # at 8 the error is 1/2


def test_one_seed_resolves_nothing_and_no_difference_never_would():
    assert verdict.verdict(np.array([5.0])) == "not resolved at 1 seed"
    assert verdict.verdict(np.array([-1.0, 1.0])) == "not resolved at 2 seeds"


def test_differences_are_paired_by_seed(results):
    """Rows whose seeds differ in level: unpaired, the error would hide the difference."""
    runs = results.parent / "runs"
    for seed, level in ((200, 0.2), (201, 0.8)):
        write_run(runs / f"ddpo-seed{seed}", [level] * 4, 0.1)
        write_run(runs / f"b2-seed{seed}", [level + 0.1] * 4, 0.3)
    verdict.main(["--collect", str(runs)])
    claims, _ = tables(results)
    assert claims["better"][1:4] == ["b2 less ddpo", 2, "holds"]
    assert claims["better"][4:6] == ["+10.00", "+20.00"]


def test_each_claim_has_its_rows_seeds_and_errors(results):
    runs = results.parent / "runs"
    write_four(runs)
    write_run(runs / "ddpo-small-seed200", [0.1] * 4)
    verdict.main(["--collect", str(runs)])
    claims, rows = tables(results)
    # Gains at the end are .5 - .25. 2 (2 error / mean)² is 3.6
    assert claims["better"][2:5] == [2, "not resolved at 2 seeds, 4 would", "+30.00 ± 20.00"]
    assert claims["better"][5:] == ["+25.00"] * 4
    for claim in ("more diverse", "cheaper", "new", "as fast"):
        assert claims[claim][2:] == [0, "not run yet"]
    # The base is (.4 + .4 + 1 + .4 + .1) / 5, of all first rounds
    assert rows["b2"][:2] == ["2 of 2", "+26.50 ± 22.50"]
    assert rows["ddpo-small"][:2] == ["1 of 2", "-36.00"] and rows["bs"] == ["0 of 1"]
    text = (results / "tables.md").read_text()
    assert "1 verdicts" in text and "| new | Fig. 2 | bs less ddpo | 0 | not run yet |" in text


def test_seeds_that_only_one_row_has_are_left_out(results):
    runs = results.parent / "runs"
    write_four(runs)
    shutil.rmtree(runs / "ddpo-seed201")
    verdict.main(["--collect", str(runs)])
    claims, _ = tables(results)
    assert claims["better"][2:5] == [1, "not resolved at 1 seed", "+10.00"]


def test_the_base_is_that_of_the_rows_own_template(results):
    runs = results.parent / "runs"
    write_run(runs / "b2-seed200", [0.4, 0.6, 0.6, 0.8])
    write_run(runs / "bs-seed200", [0.1, 0.2, 0.2, 0.3], template=2)
    verdict.main(["--collect", str(runs)])
    _, rows = tables(results)
    assert rows["b2"][1] == "+20.00" and rows["bs"][1] == "+10.00"


def test_minutes_are_those_measured_apart(results):
    """And interpolated in tau. The goals are between the base's .4 and DDPO's last four, .575."""
    runs = results.parent / "runs"
    write_run(runs / "b2-seed200", [0.4, 0.45, 0.5, 0.55])
    write_run(runs / "ddpo-seed200", [0.4, 0.4, 0.5, 0.6, 0.8], tau=20, rounds=5)
    verdict.main(["--collect", str(runs)])
    measured = {"b2": {"14": 60, "16": 120, "20": 180}, "ddpo": {"20": 240}}
    (results / "seconds.json").write_text(json.dumps(measured))
    claims, rows = tables(results)
    # B²: 1, 1.5, 2, 2.25 minutes a round, for tau 14, 15, 16, 17; DDPO: 4
    assert claims["cheaper"][3:] == ["not resolved at 1 seed", "+13.25"]
    # Both have minutes 4 to 6.75. B²'s rounds end at 1, 2.5, 4.5 and 6.75; DDPO stays at .4
    shares = (0.5 + 0.05 * (4 - 4.5) / 2 / 2, 0.5 + 0.05 * 2.25 / 2.25 / 2)
    mean = (shares[0] * 0.5 + shares[1] * 2.25) / 2.75
    assert claims["as fast"][3:] == ["not resolved at 1 seed", f"+{100 * (mean - 0.4):.2f}"]
    # Half of the gain is at .4875, nine tenths at .5575
    assert rows["b2"][-2:] == ["4.5", "never"] and rows["ddpo"][-2:] == ["12.0", "16.0"]
    (results / "seconds.json").write_text(json.dumps({"ddpo": {"20": 60}}))
    claims, rows = tables(results)
    assert claims["cheaper"][3:] == ["not run yet"]
    assert rows["ddpo"][-2:] == ["3.0", "4.0"] and len(rows["b2"]) == 6


def test_style_entropies_are_paired_where_both_have_them(results):
    runs = results.parent / "runs"
    write_four(runs)
    verdict.main(["--collect", str(runs)])
    line = lambda share, nats: {"queries": 0, "recognised_of_90": share, "style_entropy": nats}
    styles = {"b2-seed200": [line(0.4, 1.0), line(0.6, 0.8)]}
    styles |= {"ddpo-seed200": [line(0.4, 1.0), line(0.5, 0.7)], "b2-seed201": [line(0.4, 1.0)]}
    (results / "styles.json").write_text(json.dumps(styles))
    claims, _ = tables(results)
    assert claims["more diverse"][2:] == [1, "not resolved at 1 seed", "+0.20"]


# ---------------------------------------------------------------- byte for byte


def test_the_same_files_give_the_same_bytes(results, monkeypatch):
    monkeypatch.setattr(verdict, "draw", curves.draw)
    runs = results.parent / "runs"
    write_four(runs)
    verdict.main(["--collect", str(runs)])
    (results / "seconds.json").write_text('{"b2": {"14": 60}}')
    found = []
    for _ in range(2):
        verdict.main([])
        found.append({p.name: p.read_bytes() for p in results.iterdir() if p.is_file()})
        for name in ("tables.md", "verdict.json", "verdict.png"):
            (results / name).unlink()
    assert found[0] == found[1] and {"tables.md", "verdict.json", "verdict.png"} <= set(found[0])


def test_what_is_committed_is_what_the_script_writes(tmp_path, monkeypatch):
    """And of the picture, if this matplotlib is the one that drew it."""
    for name in ("protocol.json", "styles.json", "seconds.json"):
        if (ROOT / "results" / name).exists():
            shutil.copyfile(ROOT / "results" / name, tmp_path / name)
    (tmp_path / "main").mkdir()
    for path in (ROOT / "results/main").glob("*.jsonl"):
        shutil.copyfile(path, tmp_path / "main" / path.name)
    monkeypatch.setattr(verdict, "RESULTS", tmp_path)
    verdict.main([])
    for name in ("tables.md", "verdict.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "results" / name).read_bytes(), name
    picture = ROOT / "results/verdict.png"
    assert picture.exists() == (tmp_path / "verdict.png").exists()
    if picture.exists():
        old, new = (path.read_bytes() for path in (picture, tmp_path / "verdict.png"))
        version = re.compile(rb"Matplotlib version[\d.]+")
        assert old == new or version.findall(old) != version.findall(new)


# ---------------------------------------------------------------- runs


def committed():
    return json.loads((ROOT / "results/protocol.json").read_text(encoding="utf-8"))


def test_the_rows_are_those_of_the_protocol():
    rows = committed()["rows"]
    page = (ROOT / "results/PROTOCOL.md").read_text(encoding="utf-8")
    table = page.split("## Rows, in this order")[1].split("## Decided")[0]
    table += page.split("## Added")[1]
    named = {}
    for line in table.splitlines():
        for name in re.findall(r"`([\w-]+)`", line.split("|")[2] if "|" in line else ""):
            named[name] = int(line.split("|")[4].split()[0])
    seeds = {row: len(about["seeds"]) for row, about in rows.items()}
    assert named == {row: n for row, n in seeds.items() if not row.startswith("tune")}
    first = [about["seeds"][0] for row, about in rows.items()]
    assert first == [100] * 6 + [200] * 22
    claimed = {row for *_, a, b in committed()["claims"] for row in (a, b)}
    assert claimed <= set(rows) and set(verdict.DRAWN) <= set(rows)
    assert len(verdict.all_runs(rows)) == 12 + 62


def test_the_flags_are_those_of_the_protocol():
    import train

    plain, branches = dict(no_bpt=True, no_bs=True, update_size=128, epochs=1), dict(branches=3)
    expected = {"b2": branches, "ddpo": plain, "ddpo-small": dict(no_bpt=True, no_bs=True)}
    expected |= {"group-one": dict(epochs=1), "bs": dict(no_bpt=True, no_bs=False)}
    expected |= {
        "bpt": dict(no_bs=True, no_bpt=False, update_size=128),
        "pg": plain | dict(algo="pg"),
    }
    expected |= {"t2-ddpo": plain | dict(template=2), "t3-b2": dict(template=3, no_bs=False)}
    expected |= {"b2-k5": dict(branches=5, queries=190), "b2-uniform": dict(step_weight="uniform")}
    expected |= {"b2-lr1e-3": branches | dict(lr=1e-3)}
    expected |= {"pg-b2-lr1e-3": branches | dict(algo="pg", lr=1e-3, epochs=2)}
    expected |= {"pg-b2-one": branches | dict(algo="pg", lr=2e-3, epochs=1)}
    expected |= {"dpo-b2": dict(algo="dpo", no_bs=False), "dpok": plain | dict(algo="dpok")}
    for row, about in committed()["rows"].items():
        words = re.sub("RATE-OF-(B2|DDPO)", "1e-3", about["flags"]).split()
        settings = vars(train.parse_args(words))
        common = dict(model="tiny", reward="clip", tau0=14, clip_range=1e-3, queries=192)
        common |= dict(rounds=16, save_every=4, eval_images=2)
        if row.startswith("tune"):
            common |= dict(rounds=8, save_every=0, eval_prompts=0, lr=float(row.split("-lr")[1]))
        for name, value in (common | expected.get(row, {})).items():
            assert settings[name] == value, (row, name)
        side = "DDPO" if settings["no_bs"] else "B2"
        assert (
            row.startswith("tune")
            or f"RATE-OF-{side}" in about["flags"]
            or "RATE" not in str(about)
        )


def test_the_rate_is_the_one_that_the_tuning_chose():
    rows = committed()["rows"]
    for side in ("b2", "ddpo"):
        means = {}
        for rate in ("5e-4", "1e-3", "2e-3"):
            runs = verdict.read_row(f"tune-{side}-lr{rate}").values()
            if len(runs) == 2:
                shares = [[line["recognised"] for line in run["rounds"]] for run in runs]
                means[rate] = np.mean(shares)
        if len(means) == 3:
            best = max(means, key=means.get)
            assert rows[side]["flags"].endswith((f"--lr {best}", f"RATE-OF-{side.upper()}"))


def test_finished_runs_are_kept(results):
    runs = results.parent / "other"
    write_run(runs / "b2-seed201", [0.1, 0.2, 0.3, 0.4])
    write_run(runs / "ddpo-seed200", [0.1, 0.2])  # cut off
    write_run(runs / "bs-seed205", [0.1] * 4)  # no run of the protocol
    (runs / "b2-seed200.log").write_text("a line")
    verdict.main(["--collect", str(runs)])
    write_run(runs / "b2-seed200", [0.5, 0.5, 0.5, 0.5])
    verdict.main(["--collect", str(runs)])
    files = sorted(str(p.relative_to(results / "main")) for p in results.glob("main/**/*.*"))
    lora = "pytorch_lora_weights.safetensors"
    kept = [f"b2-seed200/{name}" for name in ("config.json", lora)]
    assert files == [*kept, "b2.jsonl"]
    assert list(verdict.read_row("b2")) == [200, 201]  # in order
    assert verdict.read_row("b2")[201]["rounds"][3]["recognised"] == 0.4
    before = (results / "main/b2.jsonl").read_bytes()
    verdict.main(["--collect", str(runs)])
    assert (results / "main/b2.jsonl").read_bytes() == before
    lines = (runs / "b2-seed201/metrics.jsonl").read_text()
    (runs / "b2-seed201/metrics.jsonl").write_text(lines.replace("0.4", "0.9"))
    verdict.main(["--collect", str(runs)])  # no run is made again until it agrees
    assert (results / "main/b2.jsonl").read_bytes() == before


def test_a_run_is_made_and_resumed(results, monkeypatch, capsys):
    calls = []

    def call(words, cwd):
        calls.append(words[1:])
        (cwd / "runs/verdict/b2-seed200").mkdir(parents=True, exist_ok=True)
        (cwd / "runs/verdict/b2-seed200/config.json").write_text("{}")
        return SimpleNamespace(returncode=130 if len(calls) == 1 else 0)

    monkeypatch.setattr(verdict.subprocess, "run", call)
    for code in (130, 0):
        with pytest.raises(SystemExit) as stop:
            verdict.main(["--run", "b2-seed200"])
        assert stop.value.code == code
    out = ["--rounds", "4", "--seed", "200", "--out", "runs/verdict/b2-seed200"]
    assert calls == [["train.py", *out], ["train.py", "--resume", "runs/verdict/b2-seed200"]]
    verdict.main(["--list"])
    shown = capsys.readouterr().out
    assert "b2-seed200: python train.py --rounds 4 --seed 200" in shown
    assert len(shown.splitlines()) == len(verdict.all_runs(ROWS)) == 11


@pytest.mark.parametrize("name", ("b3-seed200", "b2-seed7", "group-two-seed200"))
def test_a_run_that_can_not_be_made_ends_with_one_line(results, name, capsys):
    with pytest.raises(SystemExit):
        verdict.main(["--run", name])
    error = capsys.readouterr().err
    assert "no run that flags can make" in error and error.count("\n") == 1
