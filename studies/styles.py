"""Style entropy and recognition of a run's pictures while it learns.

    python studies/styles.py --lora runs/verdict/b2-seed200 ...     # adds to results/styles.json

For the base and each LoRA that a run of the tiny model kept (`--save-every`), the judge looks at
two pictures of each training prompt, of the noise of before and after. Style entropy is that of the
shares of the three icon styles which its style head sees, at most ln 3 = 1.10 nats.
"""

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Ours first: `support` sets what torch reads when it is imported
from eval import base_parser, evaluate, fill_in, find_judge, guarded, load_lora
from support.pipeline import load_pipeline
from support.prompts import load_prompts
from support.run_folder import ROOT, read_config, read_json, write_json

import torch

STYLES = ROOT / "results/styles.json"


def look(pipeline, prompts):
    """What the judge sees in two pictures of each prompt: recognition and style entropy."""
    from tiny.judge import HEADS, load_judge, probabilities

    judge = load_judge(pipeline.tiny / "judge")
    head = list(HEADS).index("style")
    style = lambda images, _: probabilities(judge, images)[head].argmax(1).float()
    seen, _ = evaluate(pipeline, {"style": style}, prompts, 2, find_judge(pipeline, prompts))
    shares = torch.bincount(torch.tensor(seen["style"]).long()) / len(seen["style"])
    entropy = torch.special.entr(shares).sum().item()
    return {"recognised_of_90": fmean(seen["recognised"]), "style_entropy": entropy}


def measure(args):
    """Add the lines of each run of --lora to results/styles.json."""
    pipeline = load_pipeline(args, torch.device(args.device))
    for folder in map(Path, args.lora):
        config = read_config(folder)
        prompts, _ = load_prompts(config["template"], config["prompts"])
        pipeline.pipe.unload_lora_weights()
        lines = [{"queries": 0, **look(pipeline, prompts)}]
        for path in sorted(folder.glob("lora-round*.safetensors")):
            load_lora(pipeline.pipe, path)
            queries = int(path.stem.removeprefix("lora-round")) * config["queries"]
            lines.append({"queries": queries, **look(pipeline, prompts)})
            print(folder.name, lines[-1])
        write_json(STYLES, (read_json(STYLES) or {}) | {folder.name: lines})


def main(argv=None):
    guarded(measure, fill_in(base_parser(__doc__.split("\n")[0], "runs/styles").parse_args(argv)))


if __name__ == "__main__":
    main()
